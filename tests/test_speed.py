"""What makes training fast, and that it changes nothing else: cached features, compiling, memory-mapped images."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import CPU, model_of, quick_flags, random_data
from PIL import Image

import advanced_techniques as at

BACKBONES = ["resnet18", "resnet50", "efficientnet_b0", "tf_efficientnet_lite0", "convnext_atto", "vit_tiny_patch16_224",
             "mobilenetv3_small_100", "regnety_002", "densenet121"]


def train_head(architecture: str, epochs: int, data: at.Data, **changes) -> tuple[at.Model, list[int]]:
    """Train for some epochs of a long head-only stage; the model, and how many images its stem saw in each epoch."""
    flags = quick_flags(NUM_EPOCHS=20, **changes)
    model, seen = model_of(architecture, NUM_EPOCHS=20), []
    next(model.network.children()).register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
    optimizer, scaler, counts = at.make_optimizer(model, flags), at.make_scaler(CPU, False), []
    for epoch in range(epochs):
        at.train_epoch(model, data, epoch, optimizer, scaler, False, flags)
        at.validate(model, data, False, flags)
        counts.append(sum(seen))
        seen.clear()
    return model, counts


@pytest.mark.parametrize("architecture", BACKBONES)
def test_the_classifier_on_pooled_features_is_the_whole_network(architecture):
    model, images = model_of(architecture), torch.randn(2, 3, 32, 32)
    model.network.eval()
    with torch.no_grad():
        features = at.pooled_features(model.network, images)
        torch.testing.assert_close(model.network.get_classifier()(features), model.network(images))


@pytest.mark.parametrize("architecture", ["resnet18", "vit_tiny_patch16_224"])
def test_a_cached_view_trains_the_head_like_the_images_themselves(architecture):
    data = random_data()
    (cached, _), (fresh, _) = (train_head(architecture, 2, data, FEATURE_VIEWS=views) for views in (2, 0))
    for left, right in zip(cached.groups["head"], fresh.groups["head"], strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-5)


def test_the_frozen_backbone_sees_each_kept_view_and_each_validation_image_once():
    data = random_data()  # 20 images to train on, 10 to validate
    assert train_head("resnet18", 5, data, FEATURE_VIEWS=2)[1] == [20 + 10, 20, 0, 0, 0]
    assert train_head("resnet18", 5, data, FEATURE_VIEWS=0)[1] == [30] * 5


def test_views_repeat_in_turn_and_the_kept_ones_go_when_the_backbone_learns():
    data, flags = random_data(), quick_flags(NUM_EPOCHS=20, FEATURE_VIEWS=3)
    model, _ = train_head("resnet18", 5, data, FEATURE_VIEWS=3)
    views = [model.features[view] for view in range(3)]
    assert {view for view in model.features if view != "validation"} == {0, 1, 2}
    assert all(view.shape == (20, 512) for view in views) and not torch.allclose(views[0].sort(0)[0], views[1].sort(0)[0])
    at.train_epoch(model, data, 5, at.make_optimizer(model, flags), at.make_scaler(CPU, False), False, flags)
    assert not model.features


def test_validation_from_cached_features_gives_the_same_probabilities():
    data, flags = random_data(), quick_flags(NUM_EPOCHS=20)
    model, _ = train_head("resnet18", 2, data)
    cached = at.validate(model, data, False, flags)
    model.features.clear()
    torch.testing.assert_close(at.validate(model, data, False, flags), cached)


def test_no_more_views_are_kept_than_memory_gb_holds_and_none_once_the_backbone_learns():
    model, one = model_of("resnet18"), 4 * 512 * 1000 / 1e9
    assert at.views_to_keep(model, 1, 1000, quick_flags(FEATURE_VIEWS=5)) == 5
    assert at.views_to_keep(model, 1, 1000, quick_flags(FEATURE_VIEWS=5, MEMORY_GB=2.5 * one)) == 2
    assert at.views_to_keep(model, 1, 1000, quick_flags(FEATURE_VIEWS=5, MEMORY_GB=0.5 * one)) == 0
    assert at.views_to_keep(model, 2, 1000, quick_flags(FEATURE_VIEWS=5)) == 0


def test_the_head_only_stage_runs_on_the_meta_device(monkeypatch):
    monkeypatch.setattr(sys.modules["torch.optim.adam"], "_device_dtype_check_for_fused", lambda *arguments, **options: None)
    model, flags, data = model_of("resnet18"), quick_flags(), random_data(device="meta")
    model.network.to("meta")
    model.groups = at.layer_groups(model.network)
    model.mean, model.std = model.mean.to("meta"), model.std.to("meta")
    at.unfreeze(model, 1)
    optimizer, scaler = at.make_optimizer(model, flags), at.make_scaler(torch.device("meta"), False)
    windows, views = at.epoch_plan(data, 0, 0, flags)
    for window, batches in zip(windows, at.cached_batches(model, data, 0, windows, views, False, flags), strict=True):
        at.apply_update(model.network.get_classifier(), batches, len(window), optimizer, scaler, [0.1] * 6, False, 0.1)


def test_operations_are_those_of_the_paper_and_the_learning_part_follows_what_learns():
    model = model_of("resnet18", classes=1000)
    at.unfreeze(model, 1)
    forward, learning = at.flops_per_image(model, 224)
    assert forward == pytest.approx(2 * 1.8e9, rel=0.02)  # He et al. count 1.8 GFLOP, an addition and a product as one
    assert learning == 2 * 512 * 1000
    at.unfreeze(model, len(model.groups))
    assert at.flops_per_image(model, 224) == (forward, forward)
    at.unfreeze(model, 2)
    convolutions = 2 * 49 * 9 * (256 * 512 + 3 * 512 * 512) + 2 * 49 * 256 * 512  # four of 3x3 and a projection
    assert at.flops_per_image(model, 224)[1] == convolutions + 2 * 512 * 1000


def test_the_peak_share_counts_a_cached_view_once(monkeypatch):
    monkeypatch.setattr(at, "matrix_product_peak", lambda device, mixed: 1e9)
    monkeypatch.setattr(at, "flops_per_image", lambda model, size: (1000, 10))
    model = model_of("resnet18", NUM_EPOCHS=20)
    part = [dict(epoch=epoch, seconds=2.0) for epoch in range(1, 6)]
    assert at.peak_share(model, part, 100, False, quick_flags(NUM_EPOCHS=20, FEATURE_VIEWS=2)) == pytest.approx(
        100 * (2 * 1000 + 5 * 20) / 10 / 1e9)
    assert at.peak_share(model, part, 100, False, quick_flags(NUM_EPOCHS=20, FEATURE_VIEWS=0)) == pytest.approx(
        100 * (5 * 1000 + 5 * 20) / 10 / 1e9)


@pytest.mark.parametrize("architecture, units, wanted", [
    ("resnet18", dict(avx512_bf16=True), torch.bfloat16), ("resnet18", dict(amx_bf16=True), torch.bfloat16),
    ("resnet18", dict(avx2=True, avx512_bf16=False), None), ("efficientnet_b0", dict(avx512_bf16=True), None)])
def test_a_cpu_trains_in_bf16_where_it_gains(architecture, units, wanted, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: units)
    network = model_of(architecture).network
    precision, why = at.choose_precision(network, CPU, quick_flags())
    assert precision == wanted and why.endswith(".")
    assert at.choose_precision(network, CPU, quick_flags(USE_MIXED_PRECISION=False)) == (None, "USE_MIXED_PRECISION is off.")


def test_bf16_trains_without_loss_scaling_and_evaluates_like_fp32():
    model, data, flags = model_of("resnet18", NUM_EPOCHS=4), random_data(), quick_flags(NUM_EPOCHS=4)
    kinds = set()
    model.network.layer4.register_forward_hook(lambda module, inputs, output: kinds.add(output.dtype))
    assert at.make_scaler(CPU, torch.bfloat16).get_scale() == 1
    epochs = at.train_model(model, data, torch.bfloat16, flags)
    assert kinds == {torch.bfloat16} and all(entry["skipped_updates"] == 0 for entry in epochs)
    half, single = (at.predict(model, data, "test", [{}], precision, flags) for precision in (torch.bfloat16, None))
    torch.testing.assert_close(half, single, rtol=0, atol=0.05)


@pytest.mark.parametrize("wanted", [True, False])
def test_compile_is_a_flag(wanted, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: compiled.append(module))
    model = model_of("resnet18", COMPILE=wanted)
    assert compiled == [model.network] * wanted


LIMITED = """
import re, resource, sys
sys.path.insert(0, sys.argv[1])
import advanced_techniques as at
at.choose_device()
used = 1024 * int(re.search(r"VmData:\\s+(\\d+)", open("/proc/self/status").read())[1])
resource.setrlimit(resource.RLIMIT_DATA, (used + 700_000_000,) * 2)
at.main(sys.argv[2:])
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits a process's memory as Linux does")
def test_a_folder_larger_than_memory_trains_from_a_memory_mapped_file(script, tmp_path):
    random = np.random.default_rng(0)
    for index in range(1000):  # decoded to 512 pixels a side: 786 MB, more than the process may have
        path = tmp_path / "images" / f"class{index % 2}" / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (4, 4, 3), dtype=np.uint8)).save(path)
    arguments = [f"--dataset={tmp_path / 'images'}", "--image-size=448", "--architectures=test_resnet", "--pretrained=none",
                 "--num-epochs=1", "--batch-size=4", "--use-tta=false", f"--data-dir={tmp_path / 'data'}",
                 f"--output-dir={tmp_path / 'outputs'}"]

    def limited(memory_gb: float) -> subprocess.CompletedProcess:
        return subprocess.run([sys.executable, "-c", LIMITED, str(script.parent), *arguments, f"--memory-gb={memory_gb}"],
                              capture_output=True, text=True)

    result = limited(0.1)
    assert result.returncode == 0, result.stderr[-2000:]
    assert (tmp_path / "data" / "decoded_images.bin").stat().st_size == 1000 * 3 * 512 * 512
    assert limited(4).returncode != 0  # in memory it doesn't fit: the limit is real
