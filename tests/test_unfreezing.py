"""Gradual unfreezing: who learns when, and that nobody else moves."""

import pytest
import torch
from conftest import CPU, model_of, quick_flags, random_data

import advanced_techniques as at

BACKBONES = ["resnet18", "resnet50", "efficientnet_b0", "convnext_atto", "vit_tiny_patch16_224"]


@pytest.mark.parametrize("architecture", [*BACKBONES, "tf_efficientnet_lite0", "mobilenetv3_small_100", "regnety_002",
                                          "densenet121", "swin_tiny_patch4_window7_224"])
def test_layer_groups_hold_every_parameter_once_and_the_head_alone_comes_first(architecture):
    with torch.device("meta"):
        network = at.timm.create_model(architecture, num_classes=4)
    groups = at.layer_groups(network)
    grouped = [id(parameter) for parameters in groups.values() for parameter in parameters]
    assert sorted(grouped) == sorted(id(parameter) for parameter in network.parameters())
    assert next(iter(groups)) == "head" and all(parameter.shape[0] == 4 for parameter in groups["head"])
    assert len(groups) >= 5 and all(groups.values())


def test_resnet_unfreezes_layer4_then_layer3_then_layer2_in_four_equal_parts():
    model = model_of("resnet18", NUM_EPOCHS=20)
    assert list(model.groups) == ["head", "layer4", "layer3", "layer2", "layer1", "conv1"]
    assert [at.groups_trained(epoch, 20, model) for epoch in range(20)] == [1] * 5 + [2] * 5 + [3] * 5 + [4] * 5


@pytest.mark.parametrize("architecture", BACKBONES)
def test_frozen_layers_stay_bit_identical_and_the_planned_ones_learn(architecture):
    model, data, flags = model_of(architecture), random_data(), quick_flags(NUM_EPOCHS=4)
    optimizer, scaler = at.make_optimizer(model, flags), at.make_scaler(CPU, False)
    for epoch in range(4):
        before = {name: tensor.clone() for name, tensor in model.network.state_dict().items()}
        at.train_epoch(model, data, epoch, optimizer, scaler, False, flags)
        planned = {id(parameter) for parameters in list(model.groups.values())[: epoch + 1] for parameter in parameters}
        assert {id(p) for p in model.network.parameters() if p.requires_grad} == planned
        after, parameters = model.network.state_dict(), dict(model.network.named_parameters())
        for name, tensor in before.items():
            moved = not torch.equal(tensor, after[name])
            if name in parameters:
                assert moved <= (id(parameters[name]) in planned), name
            else:  # a buffer may move only where its layer learns
                owner = name.rpartition(".")[0]
                assert moved <= any(id(p) in planned for p in model.network.get_submodule(owner).parameters()), name
        assert any(not torch.equal(before[name], after[name]) for name in parameters)
        for group in list(model.groups.values())[: epoch + 1]:
            assert all(parameter in optimizer.state for parameter in group)


def test_without_gradual_unfreezing_everything_learns_from_the_start():
    model, data = model_of("resnet18", GRADUAL_UNFREEZING=False), random_data()
    flags = quick_flags(NUM_EPOCHS=4, GRADUAL_UNFREEZING=False)
    entry = at.train_epoch(model, data, 0, at.make_optimizer(model, flags), at.make_scaler(CPU, False), False, flags)
    assert entry["trainable_parameters"] == sum(parameter.numel() for parameter in model.network.parameters())
    assert entry["stage"] == 1


def test_random_weights_are_never_frozen():
    model = model_of("resnet18", pretrained=False)
    assert at.groups_trained(0, 20, model) == len(model.groups) and model.rate_decay == 1.0
