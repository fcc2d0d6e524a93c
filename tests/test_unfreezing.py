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
    assert list(run.groups) == ["head", "layer4", "layer3", "layer2", "layer1", "conv1"]
    learning = [at.groups_learning(epoch, run) for epoch in range(20)]
    assert learning == [1] * 5 + [2] * 5 + [3] * 5 + [4] * 5


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
