"""What makes training fast and changes nothing else: kept features, compiling, mapped images."""

import functools
import subprocess
import sys

import benchmark
import numpy as np
import pytest
import torch
from conftest import CPU, in_precision, quick_flags, random_data, run_of
from PIL import Image

import advanced_techniques as at

BACKBONES = ["resnet18", "resnet50", "efficientnet_b0", "tf_efficientnet_lite0", "convnext_atto",
             "vit_tiny_patch16_224", "mobilenetv3_small_100", "regnety_002", "densenet121"]


def train_head(architecture: str, epochs: int, data: at.Data,
               **changes) -> tuple[at.Run, list[int]]:
    """Train for some epochs of a long head-only stage; how many images the stem saw in each."""
    run, seen, counts = run_of(architecture, NUM_EPOCHS=20, **changes), [], []

    def count_images(module, inputs, output):
        seen.append(len(inputs[0]))

    next(run.network.children()).register_forward_hook(count_images)
    for epoch in range(epochs):
        at.train_epoch(run, data, epoch)
        at.validate(run, data)
        counts.append(sum(seen))
        seen.clear()
    return run, counts


@pytest.mark.parametrize("architecture", BACKBONES)
def test_the_classifier_on_pooled_features_is_the_whole_network(architecture):
    network, images = run_of(architecture).network, torch.randn(2, 3, 32, 32)
    network.eval()
    with torch.no_grad():
        features = at.pooled_features(network, images)
        torch.testing.assert_close(network.get_classifier()(features), network(images))


@pytest.mark.parametrize("architecture", ["resnet18", "vit_tiny_patch16_224"])
def test_a_cached_view_trains_the_head_like_the_images_themselves(architecture):
    data = random_data()
    cached, _ = train_head(architecture, 2, data, FEATURE_VIEWS=2)
    fresh, _ = train_head(architecture, 2, data, FEATURE_VIEWS=0)
    for left, right in zip(cached.groups["head"], fresh.groups["head"], strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-5)


def test_the_frozen_backbone_sees_each_kept_view_and_each_validation_image_once():
    data = random_data()  # 20 images to train on, 10 to validate
    assert train_head("resnet18", 5, data, FEATURE_VIEWS=2)[1] == [20 + 10, 20, 0, 0, 0]
    assert train_head("resnet18", 5, data, FEATURE_VIEWS=0)[1] == [30] * 5


def test_views_repeat_in_turn_and_the_kept_ones_go_when_the_backbone_learns():
    data = random_data()
    run, _ = train_head("resnet18", 5, data, FEATURE_VIEWS=3)
    views = [run.features[view] for view in range(3)]
    assert {view for view in run.features if view != "validation"} == {0, 1, 2}
    assert all(view.shape == (20, 512) for view in views)
    assert not torch.allclose(views[0].sort(0)[0], views[1].sort(0)[0])
    at.train_epoch(run, data, 5)
    assert not run.features


def test_validation_from_cached_features_gives_the_same_probabilities():
    data = random_data()
    run, _ = train_head("resnet18", 2, data)
    cached = at.validate(run, data)
    run.features.clear()
    torch.testing.assert_close(at.validate(run, data), cached)


def test_no_more_views_are_kept_than_memory_gb_holds_and_none_once_the_backbone_learns():
    run, one = run_of("resnet18", NUM_EPOCHS=20, FEATURE_VIEWS=5), 4 * 512 * 1000 / 1e9
    assert at.groups_learning(0, run) == 1 and at.groups_learning(5, run) == 2
    assert at.views_to_keep(run, 0, 1000) == 5
    assert at.views_to_keep(run, 5, 1000) == 0
    run.flags.MEMORY_GB = 2.5 * one
    assert at.views_to_keep(run, 0, 1000) == 2
    run.flags.MEMORY_GB = 0.5 * one
    assert at.views_to_keep(run, 0, 1000) == 0


def test_the_head_only_stage_runs_on_the_meta_device(allow_meta):
    run, data = run_of("resnet18", device=torch.device("meta")), random_data(device="meta")
    at.unfreeze(run, 1)
    for part in at.plan_epoch(run, data, 0):
        assert part.features.device.type == "meta"
        batches = at.micro_batches(run, data, part)
        at.apply_update(run, at.learning_part(run), batches, part.images, [0.1] * 6)


def test_operations_are_those_of_the_paper_and_the_learning_part_follows_what_learns():
    run = run_of("resnet18", classes=1000, IMAGE_SIZE=224)
    at.unfreeze(run, 1)
    forward, learning = benchmark.flops_per_image(run)
    # He et al. count 1.8 GFLOP, an addition and a product as one
    assert forward == pytest.approx(2 * 1.8e9, rel=0.02)
    assert learning == 2 * 512 * 1000
    at.unfreeze(run, len(run.groups))
    assert benchmark.flops_per_image(run) == (forward, forward)
    at.unfreeze(run, 2)
    # layer4: four convolutions of 3x3 and a projection
    convolutions = 2 * 49 * 9 * (256 * 512 + 3 * 512 * 512) + 2 * 49 * 256 * 512
    assert benchmark.flops_per_image(run)[1] == convolutions + 2 * 512 * 1000


def test_the_peak_share_counts_a_cached_view_once(monkeypatch):
    monkeypatch.setattr(benchmark, "matrix_product_peak", lambda device, precision: 1e9)
    monkeypatch.setattr(benchmark, "flops_per_image", lambda run: (1000, 10))
    epochs = [dict(epoch=epoch, seconds=2.0) for epoch in range(1, 6)]
    kept = run_of("resnet18", NUM_EPOCHS=20, FEATURE_VIEWS=2)
    wanted = 100 * (2 * 1000 + 5 * 20) / 10 / 1e9
    assert benchmark.peak_share(kept, epochs, 100) == pytest.approx(wanted)
    fresh = run_of("resnet18", NUM_EPOCHS=20, FEATURE_VIEWS=0)
    wanted = 100 * (5 * 1000 + 5 * 20) / 10 / 1e9
    assert benchmark.peak_share(fresh, epochs, 100) == pytest.approx(wanted)


@pytest.mark.parametrize("architecture, units, wanted", [
    ("resnet18", dict(avx512_bf16=True), torch.bfloat16),
    ("resnet18", dict(amx_bf16=True), torch.bfloat16),
    ("resnet18", dict(avx2=True, avx512_bf16=False), None),
    ("efficientnet_b0", dict(avx512_bf16=True), None)])
def test_a_cpu_trains_in_bf16_where_it_gains(architecture, units, wanted, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: units)
    network = run_of(architecture).network
    precision, why = at.choose_precision(network, CPU, quick_flags())
    assert precision == wanted and why.endswith(".")
    off = at.choose_precision(network, CPU, quick_flags(USE_MIXED_PRECISION=False))
    assert off == (None, "USE_MIXED_PRECISION is off.")


def test_bf16_trains_without_loss_scaling_and_evaluates_like_fp32():
    run, data = in_precision(run_of("resnet18", NUM_EPOCHS=4), torch.bfloat16), random_data()
    kinds = set()

    def keep_kind(module, inputs, output):
        kinds.add(output.dtype)

    run.network.layer4.register_forward_hook(keep_kind)
    assert run.scaler.get_scale() == 1
    at.train_model(run, data)
    assert len(run.epochs) == 4 and kinds == {torch.bfloat16}
    assert all(entry["skipped_updates"] == 0 for entry in run.epochs)
    half = at.predict(run, data, "test", [{}])
    single = at.predict(in_precision(run, None), data, "test", [{}])
    torch.testing.assert_close(half, single, rtol=0, atol=0.05)


@pytest.mark.parametrize("wanted", [True, False])
def test_compile_is_a_flag(wanted, monkeypatch):
    compiled = []

    def keep(module):
        compiled.append(module)

    monkeypatch.setattr(torch.nn.Module, "compile", keep)
    run = run_of("resnet18", COMPILE=wanted)
    assert compiled == [run.network] * wanted


def test_every_model_is_compiled_in_every_stage_also_the_second_of_its_class(monkeypatch):
    """torch.compile gives up on a class of networks after eight graphs unless it starts anew."""
    graphs = []

    def counting(graph, inputs):
        def call(*arguments):
            graphs.append(len(arguments))
            return graph.forward(*arguments)
        return call

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counting))
    data, passes = random_data(), []
    for seed in range(2):
        run = run_of("test_resnet", COMPILE=True, NUM_EPOCHS=4, FEATURE_VIEWS=0,
                     BATCH_SIZE=8 + seed)
        forward, eager = type(run.network).forward, []

        def watched(network, images, forward=forward, eager=eager):
            if not torch.compiler.is_compiling():
                eager.append(1)
            return forward(network, images)

        monkeypatch.setattr(type(run.network), "forward", watched)
        for epoch in range(4):
            graphs.clear()
            at.train_epoch(run, data, epoch)
            at.predict(run, data, "validation", [{}])
            passes.append(len(graphs))
        monkeypatch.undo()
        monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counting))
        assert not eager, f"model {seed + 1} ran {len(eager)} times without its graphs"
    assert all(count > 0 for count in passes)


def test_the_speed_section_counts_what_the_epochs_took(monkeypatch):
    monkeypatch.setattr(at, "measure_update", lambda run, data, precision, micro_batch: (
        {None: 50.0, torch.bfloat16: 80.0}[precision] * (1 if micro_batch == 8 else 2), 1000))
    seconds = [1.0, 3.0, 4.0, 4.0, 5.0, 5.0, 10.0, 10.0]
    run, data = run_of("test_resnet"), random_data()  # 20 images to train on
    run.epochs = [dict(stage=place // 2 + 1, seconds=spent) for place, spent in enumerate(seconds)]
    speed = at.measure_speed(run, data)
    assert speed["images_per_second_by_stage"] == {"1": 10.0, "2": 5.0, "3": 4.0, "4": 2.0}
    assert speed["images_per_second_all_layers"] == 50 and speed["mixed_images_per_second"] is None
    # All layers at 50 images/s would have taken 160 / 50 = 3.2 s instead of 42.
    assert speed["freezing_saves"] == pytest.approx(1 - 42 / 3.2)
    assert speed["double_batch_images_per_second"] == 100
    speed = at.measure_speed(in_precision(run, torch.bfloat16), data)
    assert speed["freezing_saves"] == pytest.approx(1 - 42 / 2)
    assert speed["mixed_images_per_second"] == 80 and speed["fp32_images_per_second"] == 50


LIMITED = """
import re, resource, sys
sys.path.insert(0, sys.argv[1])
import advanced_techniques as at
at.choose_device()
used = 1024 * int(re.search(r"VmData:\\s+(\\d+)", open("/proc/self/status").read())[1])
resource.setrlimit(resource.RLIMIT_DATA, (used + 500_000_000,) * 2)
at.main(sys.argv[2:])
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits memory as Linux does")
def test_a_folder_larger_than_memory_trains_from_a_memory_mapped_file(script, tmp_path):
    random = np.random.default_rng(0)
    # Decoded to 512 pixels a side: 551 MB, more than the process may have.
    for index in range(700):
        path = tmp_path / "images" / f"class{index % 2}" / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (4, 4, 3), dtype=np.uint8)).save(path)
    command = [sys.executable, "-c", LIMITED, str(script.parent),
               f"--dataset={tmp_path / 'images'}", "--image-size=448",
               "--architectures=test_resnet", "--pretrained=none", "--num-epochs=1",
               "--batch-size=4", "--use-tta=false", f"--data-dir={tmp_path / 'data'}",
               f"--output-dir={tmp_path / 'outputs'}"]

    def limited(memory_gb: float) -> subprocess.CompletedProcess:
        return subprocess.run([*command, f"--memory-gb={memory_gb}"], capture_output=True,
                              text=True)

    result = limited(0.1)
    assert result.returncode == 0, result.stderr[-2000:]
    assert (tmp_path / "data" / "decoded_images.bin").stat().st_size == 700 * 3 * 512 * 512
    assert limited(4).returncode != 0  # in memory it doesn't fit: the limit is real
