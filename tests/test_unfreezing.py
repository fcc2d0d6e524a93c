"""Gradual unfreezing: who learns when, and that nobody else moves."""

import pytest
import torch
from conftest import random_data, run_of

import advanced_techniques as at

BACKBONES = ["resnet18", "resnet50", "efficientnet_b0", "convnext_atto", "vit_tiny_patch16_224"]
OTHERS = ["tf_efficientnet_lite0", "mobilenetv3_small_100", "regnety_002", "densenet121",
          "swin_tiny_patch4_window7_224"]


@pytest.mark.parametrize("architecture", BACKBONES + OTHERS)
def test_layer_groups_hold_every_parameter_once_and_the_head_alone_comes_first(architecture):
    with torch.device("meta"):
        network = at.timm.create_model(architecture, num_classes=4)
    groups = at.layer_groups(network)
    grouped = [id(parameter) for parameters in groups.values() for parameter in parameters]
    assert sorted(grouped) == sorted(id(parameter) for parameter in network.parameters())
    assert next(iter(groups)) == "head"
    assert all(parameter.shape[0] == 4 for parameter in groups["head"])
    assert len(groups) >= 5 and all(groups.values())


def test_resnet_unfreezes_layer4_then_layer3_then_layer2_in_four_equal_parts():
    run = run_of("resnet18", NUM_EPOCHS=20)
    assert list(run.groups) == ["head", "layer4", "layer3", "layer2", "conv1 to layer1"]
    learning = [at.groups_learning(epoch, run) for epoch in range(20)]
    assert learning == [1] * 5 + [2] * 5 + [3] * 5 + [4] * 5


@pytest.mark.parametrize(("architecture", "groups"), [
    ("tf_efficientnet_lite0", ["blocks.5 to bn2", "blocks.3 to blocks.4", "blocks.2", "blocks.1",
                               "conv_stem to blocks.0"]),
    ("convnext_atto", ["stages.3 to head.norm", "stages.2", "stages.1", "stem.0 to stages.0"]),
    ("vit_tiny_patch16_224", ["blocks.9 to norm", "blocks.6 to blocks.8", "blocks.3 to blocks.5",
                              "cls_token to blocks.2"]),  # one resolution: quarters of the depth
    ("vgg11", ["features.16 to pre_logits.fc2", "features.11 to features.13",
               "features.6 to features.8", "features.0 to features.3"]),
])
def test_a_layer_group_is_what_works_at_one_resolution(architecture, groups):
    with torch.device("meta"):
        network = at.timm.create_model(architecture, num_classes=4)
    assert list(at.layer_groups(network)) == ["head", *groups]


def test_a_network_that_lists_no_strides_is_cut_by_depth_and_equal_labels_lose_nothing():
    with torch.device("meta"):
        network = at.timm.create_model("resnet18", num_classes=4)
        del network.feature_info
    assert list(at.layer_groups(network)) == ["head", "layer4", "layer3", "layer2",
                                              "conv1 to layer1"]
    with torch.device("meta"):
        network = at.timm.create_model("volo_d1_224", num_classes=4)
    grouped = [id(one) for group in at.layer_groups(network).values() for one in group]
    assert sorted(grouped) == sorted(id(parameter) for parameter in network.parameters())


@pytest.mark.parametrize("architecture", BACKBONES)
def test_frozen_layers_stay_bit_identical_and_the_planned_ones_learn(architecture):
    run, data = run_of(architecture, NUM_EPOCHS=4), random_data()
    for epoch in range(4):
        before = {name: tensor.clone() for name, tensor in run.network.state_dict().items()}
        at.train_epoch(run, data, epoch)
        learning = list(run.groups.values())[: epoch + 1]
        planned = {id(parameter) for parameters in learning for parameter in parameters}
        assert {id(p) for p in run.network.parameters() if p.requires_grad} == planned
        after, parameters = run.network.state_dict(), dict(run.network.named_parameters())
        for name, tensor in before.items():
            moved = not torch.equal(tensor, after[name])
            if name in parameters:
                assert moved <= (id(parameters[name]) in planned), name
            else:  # a buffer may move only where its layer learns
                owner = run.network.get_submodule(name.rpartition(".")[0])
                assert moved <= any(id(p) in planned for p in owner.parameters()), name
        assert any(not torch.equal(before[name], after[name]) for name in parameters)
        for group in learning:
            assert all(parameter in run.optimizer.state for parameter in group)


def test_without_gradual_unfreezing_everything_learns_from_the_start():
    run = run_of("resnet18", GRADUAL_UNFREEZING=False, NUM_EPOCHS=4)
    entry = at.train_epoch(run, random_data(), 0)
    everything = sum(parameter.numel() for parameter in run.network.parameters())
    assert entry["trainable_parameters"] == everything
    assert entry["stage"] == 1


def test_random_weights_are_never_frozen():
    run = run_of("resnet18", pretrained=False)
    assert at.groups_learning(0, run) == len(run.groups)
    assert at.learning_rate(0, 3, 5, run) == at.learning_rate(0, 0, 5, run)
