"""Which weights a backbone gets, and that it really gets them."""

import sys

import pytest
import timm
import torch
from conftest import CPU, quick_flags, random_data

import advanced_techniques as at


def build(name, weights, seed=0, **changes):
    return at.new_run(name, weights, seed, at.Job(quick_flags(**changes), CPU, random_data()))


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    monkeypatch.setattr(at.hub, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(at.hub, "HF_HUB_CACHE", str(tmp_path / "hub"))


def test_a_local_file_or_folder_is_loaded(tmp_path):
    torch.manual_seed(3)
    donor = timm.create_model("resnet18")
    torch.save(donor.state_dict(), tmp_path / "resnet18.pth")
    for pretrained in (tmp_path, tmp_path / "resnet18.pth"):
        weights = at.find_weights("resnet18", quick_flags(PRETRAINED=str(pretrained)))
        model = build("resnet18", weights)
        assert torch.equal(model.network.conv1.weight, donor.conv1.weight)
        assert model.network.fc.out_features == 4
        assert model.gradual


def test_a_missing_file_is_a_plain_message(tmp_path, capsys):
    with pytest.raises(SystemExit):
        at.find_weights("resnet18", quick_flags(PRETRAINED=str(tmp_path)))
    assert "PRETRAINED" in capsys.readouterr().err


def test_weights_in_the_hubs_cache_need_no_network(tmp_path, monkeypatch):
    donor, cached = timm.create_model("resnet18"), tmp_path / "cached.pth"
    monkeypatch.setattr(
        at.huggingface_hub, "try_to_load_from_cache", lambda repository, file: str(cached)
    )
    torch.save(donor.state_dict(), cached)
    weights = at.find_weights("resnet18", quick_flags())
    model = build("resnet18", weights)
    assert torch.equal(model.network.layer4[1].conv2.weight, donor.layer4[1].conv2.weight)
    assert weights.stands_in_for is None and "cached" in weights.origin


def test_the_stand_in_has_imagenet_weights_another_seed_another_head():
    weights = at.find_weights("resnet18", quick_flags())
    assert (weights.architecture, weights.stands_in_for) == (at.STAND_IN, "resnet18")
    first, second = (build("resnet18", weights, seed).network for seed in (0, 1))
    assert torch.equal(first.conv_stem.weight, weights.overlay["state_dict"]["conv_stem.weight"])
    assert torch.equal(first.blocks[6][0].bn2.running_var, second.blocks[6][0].bn2.running_var)
    assert not torch.equal(first.classifier.weight, second.classifier.weight)
    assert "STANDS IN for resnet18" in at.weight_notices([weights])[0]


def without(monkeypatch, *architectures):
    """Make the packages of these of at.SHIPPED look as if they were not installed."""
    for architecture in architectures:
        module = at.SHIPPED[architecture].package.replace("-", "_")
        monkeypatch.setitem(sys.modules, module, None)


def test_without_the_packages_random_weights_are_said_loudly(monkeypatch):
    without(monkeypatch, *at.SHIPPED)
    weights = at.find_weights("resnet18", quick_flags())
    assert weights.architecture == "resnet18" and weights.overlay is None
    assert "NO IMAGENET WEIGHTS" in at.weight_notices([weights])[0]
    assert not build("resnet18", weights).gradual


@pytest.mark.parametrize(
    ("architecture", "mean", "std"),
    [
        ("resnet18", [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ("mobilevitv2_050", [0.0] * 3, [1.0] * 3),
        ("tf_efficientnet_b0.ap_in1k", [0.5] * 3, [0.5] * 3),
        ("tf_efficientnet_b0", [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
    ],
)
def test_images_are_normalised_as_the_weights_own_settings_say(architecture, mean, std):
    run = build("any name", at.Weights(architecture, "test", None))
    assert run.mean.tolist() == pytest.approx(mean) and run.std.tolist() == pytest.approx(std)
