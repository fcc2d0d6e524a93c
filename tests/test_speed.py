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


def train(architecture: str, epochs: range, data: at.Data,
          **changes) -> tuple[at.Run, list[int]]:
    """Train for some of 20 epochs; how many images the stem saw in each."""
    run, seen, counts = run_of(architecture, NUM_EPOCHS=20, **changes), [], []

    def count_images(module, inputs, output):
        seen.append(len(inputs[0]))

    next(run.network.children()).register_forward_hook(count_images)
    for epoch in epochs:
        at.train_epoch(run, data, epoch)
        at.validate(run, data)
        counts.append(sum(seen))
        seen.clear()
    return run, counts


def kept_at(run: at.Run, learning: int, data: at.Data) -> at.Kept:
    at.unfreeze(run, learning)
    return at.keep_features(run, data, (learning - 1) * 5)


CUT_ANYWHERE = [name for name in BACKBONES if name != "vit_tiny_patch16_224"]


@pytest.mark.parametrize(("architecture", "learning"), [
    *[(name, learning) for name in CUT_ANYWHERE for learning in (1, 2, 3, 4)],
    ("vit_tiny_patch16_224", 1)])
def test_the_network_behind_its_frozen_layers_answers_as_the_whole_does(architecture, learning):
    run, data = run_of(architecture, NUM_EPOCHS=20), random_data()
    kept = kept_at(run, learning, data)
    assert kept.tail is not None
    learns = {id(parameter) for parameter in kept.tail.parameters()}
    assert learns == {id(parameter) for group in list(run.groups.values())[:learning]
                      for parameter in group}
    run.network.eval()
    kept.tail.eval()
    images = torch.randn(5, 3, 32, 32)
    with torch.no_grad():
        features = at.features_at(kept.border, run.network, images)
        torch.testing.assert_close(kept.tail(features), run.network(images))


def test_a_network_that_can_not_be_cut_there_learns_from_the_images():
    run, data = run_of("vit_tiny_patch16_224", NUM_EPOCHS=20), random_data()
    assert kept_at(run, 2, data).tail is None  # the positions are added outside of any module
    assert at.learning_part(run) is run.network


@pytest.mark.parametrize(("architecture", "stage"), [("resnet18", 0), ("vit_tiny_patch16_224", 0),
                                                     ("resnet18", 1), ("convnext_atto", 2)])
def test_kept_views_train_like_the_images_themselves(architecture, stage):
    data = random_data()
    epochs = range(5 * stage, 5 * stage + 2)
    slow = dict(BASE_LEARNING_RATE=1e-3)  # AdamW makes a step of the rate's size of any rounding
    kept, _ = train(architecture, epochs, data, FEATURE_VIEWS=2, **slow)
    fresh, _ = train(architecture, epochs, data, FEATURE_VIEWS=0, **slow)
    assert kept.kept.tail is not None and fresh.kept.tail is None
    for left, right in zip(kept.parameters, fresh.parameters, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-5)
    for left, right in zip(kept.network.buffers(), fresh.network.buffers(), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("stage", "passes"), [(0, [20, 20, 0, 0, 0]), (2, [20, 20, 20, 0, 0])])
def test_the_frozen_layers_see_each_kept_view_and_each_validation_image_once(stage, passes):
    data = random_data()  # 20 images to train on, 10 to validate; 2 are tried twice before
    epochs = range(5 * stage, 5 * stage + 5)
    passes[0] += 4 + 10
    assert train("resnet18", epochs, data, FEATURE_VIEWS=2)[1] == passes
    assert train("resnet18", epochs, data, FEATURE_VIEWS=0)[1] == [30] * 5


def test_views_take_turns_and_the_kept_ones_go_when_more_layers_learn():
    data = random_data()
    run, _ = train("resnet18", range(5), data, FEATURE_VIEWS=3)
    views = [run.kept.features[view] for view in range(3)]
    assert set(run.kept.features) == {0, 1, 2, "validation"}
    assert all(view.shape == (20, 512) for view in views)
    assert not torch.allclose(views[0].sort(0)[0], views[1].sort(0)[0])
    at.train_epoch(run, data, 5)
    assert set(run.kept.features) == {5}  # a view of this stage's own
    assert run.kept.features[5].shape == (20, 256, 2, 2)
    at.train_epoch(run, data, 8)
    assert set(run.kept.features) == {5, 5 + 3 % 3}


@pytest.mark.parametrize(("epochs", "views"), [(4, [2, 2]), (20, [2, 3]), (100, [2, 13])])
def test_once_more_than_the_head_learns_a_view_serves_twice_at_most(epochs, views):
    run = run_of("test_resnet", NUM_EPOCHS=epochs, FEATURE_VIEWS=2)
    assert [at.views_to_keep(0, run), at.views_to_keep(epochs // 2, run)] == views
    run.flags.FEATURE_VIEWS = 40
    assert at.views_to_keep(epochs // 2, run) == 40


@pytest.mark.parametrize("stage", [0, 1])
def test_validation_from_kept_features_gives_the_same_probabilities(stage):
    data = random_data()
    run, _ = train("resnet18", range(5 * stage, 5 * stage + 2), data)
    assert run.kept.tail is not None
    from_features = at.validate(run, data)
    run.kept = at.Kept(1)
    torch.testing.assert_close(at.validate(run, data), from_features)


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_features_are_kept_in_the_sixteen_bits_that_they_are_made_in(precision):
    run, data = in_precision(run_of("resnet18", NUM_EPOCHS=20), precision), random_data()
    for epoch in (5, 6, 7):
        at.train_epoch(run, data, epoch)
    assert {features.dtype for features in run.kept.features.values()} == {precision}
    whole = at.predict(run, data, "validation", at.VIEWS[:1])[0]
    torch.testing.assert_close(at.validate(run, data), whole, rtol=0, atol=1e-6)


def test_features_that_memory_gb_does_not_hold_are_not_kept():
    data = random_data()
    needed = 4 * 512 * (20 * 5 + 10) / 1e9  # the pooled features of 20 images and 10
    for memory, fits in ((1.01 * needed, True), (0.99 * needed, False)):
        run = run_of("resnet18", NUM_EPOCHS=20, FEATURE_VIEWS=5, MEMORY_GB=memory)
        assert (kept_at(run, 1, data).tail is not None) == fits
    assert kept_at(run, len(run.groups), data).tail is None  # nothing is frozen


def test_an_epoch_from_kept_features_says_so_instead_of_its_speed():
    run, data = run_of("resnet18", NUM_EPOCHS=4, FEATURE_VIEWS=1, GRADUAL_UNFREEZING=True), None
    data = random_data()
    at.train_model(run, data)
    assert [entry["kept_features"] for entry in run.epochs] == [True] * 4
    assert "kept features" in at.epoch_line(run, data)
    assert "images/s" not in at.epoch_line(run, data)
    run.epochs[-1]["kept_features"] = False
    assert "images/s" in at.epoch_line(run, data)


@pytest.mark.parametrize("gradual", [True, False])
def test_an_epoch_that_trains_all_layers_says_so(gradual):
    run = run_of("resnet18", NUM_EPOCHS=4, GRADUAL_UNFREEZING=gradual)
    run.epochs = [dict(epoch=4, seconds=1.0, kept_features=False, train_loss=1.0,
                       train_accuracy=0.5, validation_loss=1.0, validation_accuracy=0.5)]
    names = "head, layer4, layer3, layer2" if gradual else "all layers"
    assert at.epoch_line(run, random_data()).endswith(f"learning: {names}")


def test_the_head_only_stage_runs_on_the_meta_device(allow_meta, monkeypatch):
    monkeypatch.setattr(at, "same_answers", lambda answers, whole: True)  # there are no numbers
    run, data = run_of("resnet18", device=torch.device("meta")), random_data(device="meta")
    at.unfreeze(run, 1)
    for part in at.plan_epoch(run, data, 0):
        assert part.features.device.type == "meta"
        batches = at.micro_batches(run, data, part)
        at.apply_update(run, at.learning_part(run), batches, part.images, [0.1] * 6)


@pytest.mark.parametrize(("device", "capability", "cuda", "name"), [
    ("cpu", None, "13.0", "FP32"), ("cuda", (7, 0), "13.0", "FP32"),
    ("cuda", (8, 0), "13.0", "TF32"), ("cuda", (9, 4), None, "FP32")])  # the last is AMD's
def test_tf32_is_not_called_fp32(device, capability, cuda, name, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    assert at.plain_precision(torch.device(device)) == name
    speed = dict(images_per_second_by_stage={"1": 1.0}, images_per_second_all_layers=2.0,
                 freezing_saves=None, mixed_images_per_second=2.0, fp32_images_per_second=1.0,
                 mixed_peak_bytes=None, fp32_peak_bytes=None, without_mixed=name)
    model = dict(name="m", architecture="m", stands_in_for=None, epochs=[], tta_accuracy=None,
                 precision_why="FP16.")
    assert f"and in {name} 1." in " ".join(at.speed_lines(model, speed))


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
    epochs = [dict(epoch=epoch, seconds=2.0, kept_features=True) for epoch in range(1, 6)]
    kept = run_of("resnet18", NUM_EPOCHS=20, FEATURE_VIEWS=2)
    wanted = 100 * (2 * 990 + 5 * 30) / 10 / 1e9
    assert benchmark.peak_share(kept, epochs, 100) == pytest.approx(wanted)
    fresh = run_of("resnet18", NUM_EPOCHS=20, FEATURE_VIEWS=0)
    epochs = [entry | dict(kept_features=False) for entry in epochs]
    wanted = 100 * (5 * 990 + 5 * 30) / 10 / 1e9
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


def counting_backend():
    """A backend of torch.compile that runs graphs as they are, and the list that it counts in."""
    graphs = []

    def counting(graph, inputs):
        def call(*arguments):
            graphs.append(len(arguments))
            return graph.forward(*arguments)
        return call

    return graphs, counting


def test_every_model_is_compiled_in_every_stage_also_the_second_of_its_class(monkeypatch):
    """torch.compile gives up on a class of networks after eight graphs unless it starts anew."""
    graphs, counting = counting_backend()
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


def test_what_stands_behind_kept_features_is_compiled_too(monkeypatch):
    graphs, counting = counting_backend()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counting))
    run = run_of("test_resnet", COMPILE=True, NUM_EPOCHS=4, FEATURE_VIEWS=2)
    at.train_epoch(run, random_data(), 1)
    assert run.kept.tail is not None and graphs


def test_features_are_kept_by_all_processes_or_by_none(monkeypatch):
    run, data = run_of("resnet18", NUM_EPOCHS=20), random_data()
    monkeypatch.setattr(at, "in_all_processes", lambda true, device: False)  # another can't
    assert kept_at(run, 1, data).tail is None
    monkeypatch.undo()
    monkeypatch.setattr(at, "PROCESSES", 3)
    monkeypatch.setattr(at, "sum_over_processes", lambda value: value + 1)
    assert not at.in_all_processes(True, CPU)
    monkeypatch.setattr(at, "sum_over_processes", lambda value: value + 2)
    assert at.in_all_processes(True, CPU)


def test_the_precision_does_not_decide_whether_features_are_kept():
    run, data = run_of("resnet18", NUM_EPOCHS=20, MEMORY_GB=4 * 512 * 50.5 / 1e9), random_data()
    for precision in (torch.float16, torch.float32):  # 2 views of 20 images, and 10: at 4 bytes
        assert at.fits(torch.zeros(2, 512, dtype=precision), 2, run, data)
        assert not at.fits(torch.zeros(2, 520, dtype=precision), 2, run, data)


class OnAnAccelerator:
    """Features of two images, 64 numbers each, on a device that this machine lacks."""

    device = torch.device("cuda")

    def __getitem__(self, place):
        return torch.zeros(64)


@pytest.mark.parametrize(("free", "fit"), [(2 * 12_800, True), (2 * 12_799, False)])
def test_on_an_accelerator_kept_features_take_half_of_what_is_free_there(monkeypatch, free, fit):
    run, data = run_of("test_resnet"), random_data()  # 20 images to train on, 10 to validate
    monkeypatch.setattr(torch.accelerator, "get_memory_info", lambda: (free, 10**12))
    assert at.fits(OnAnAccelerator(), 2, run, data) == fit  # 50 images at 256 bytes


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
resource.setrlimit(resource.RLIMIT_DATA, (used + 700_000_000,) * 2)
at.main(sys.argv[2:])
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits memory as Linux does")
def test_a_folder_larger_than_memory_trains_from_a_memory_mapped_file(script, tmp_path):
    random = np.random.default_rng(0)
    # Decoded to 512 pixels a side: 786 MB, more than the process may have.
    for index in range(1000):
        part = "train" if index < 240 else "test"  # to test takes less time
        path = tmp_path / "images" / part / f"class{index % 2}" / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (4, 4, 3), dtype=np.uint8)).save(path)
    command = [sys.executable, "-c", LIMITED, str(script.parent),
               f"--dataset={tmp_path / 'images'}", "--image-size=448",
               "--architectures=test_resnet", "--pretrained=none", "--num-epochs=1",
               "--batch-size=4", "--use-tta=false", "--export=false",
               f"--data-dir={tmp_path / 'data'}",
               f"--output-dir={tmp_path / 'outputs'}"]

    def limited(memory_gb: float) -> subprocess.CompletedProcess:
        return subprocess.run([*command, f"--memory-gb={memory_gb}"], capture_output=True,
                              text=True)

    result = limited(0.1)
    assert result.returncode == 0, result.stderr[-2000:]
    assert not list((tmp_path / "data").glob("*.bin"))  # it is gone with the run
    assert limited(4).returncode != 0  # in memory it doesn't fit: the limit is real
