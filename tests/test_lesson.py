"""The lesson's numerics, each computed once more by hand."""

import copy
import inspect
import math

import pytest
import torch
from conftest import CPU, in_precision, quick_flags, random_data, run_of, tiny_run
from torch.nn import functional as F

import advanced_techniques as at


def some_images(count: int, **options) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    images = torch.randn(count, 3, 20, 20, generator=generator, **options)
    return images, torch.arange(count) % 4


def in_cuts(inputs: torch.Tensor, labels: torch.Tensor, sizes: list[int]) -> list[at.MicroBatch]:
    cuts = zip(inputs.split(sizes), labels.split(sizes), strict=True)
    return [(*cut, place == len(sizes)) for place, cut in enumerate(cuts, 1)]


def update(run: at.Run, inputs: torch.Tensor, labels: torch.Tensor, rate: float = 0.1):
    """One update of a single micro-batch: the loss's sum, the right answers, whether skipped."""
    batches = [(inputs, labels, True)]
    rates = [rate] * len(run.groups)
    return at.apply_update(run, run.network, batches, len(labels), rates).tolist()


def true_gradients(run: at.Run, inputs, labels, smoothing: float = 0.1) -> list[torch.Tensor]:
    """Of one loss over all images, in the order of the optimiser's parameters."""
    loss = F.cross_entropy(run.network(inputs), labels, label_smoothing=smoothing)
    return torch.autograd.grad(loss, run.parameters)


def norm_of(tensors) -> float:
    return torch.stack([tensor.norm() for tensor in tensors]).norm().item()


def steps_of(run: at.Run, inputs, labels) -> list[torch.Tensor]:
    """How one update at the rate 0.1 moved each parameter."""
    before = [parameter.detach().clone() for parameter in run.parameters]
    update(run, inputs, labels)
    return [after.detach() - old for after, old in zip(run.parameters, before, strict=True)]


def in_plain_steps(run: at.Run) -> at.Run:
    """The run with an optimiser whose step is the rate times the gradient."""
    run.optimizer = torch.optim.SGD(run.optimizer.param_groups, lr=0.1)
    for group in run.optimizer.param_groups:
        group["weight_decay"] = 0.0
    return run


@pytest.mark.parametrize("sizes", [[16], [4, 4, 4, 4], [5, 5, 5, 1], [7, 9], [1] * 16])
def test_micro_batches_give_the_gradient_of_one_batch(tiny, sizes):
    tiny.network.double()
    inputs, labels = some_images(16, dtype=torch.double)
    wanted = true_gradients(tiny, inputs, labels)
    summed = {}
    for parameter in tiny.parameters:  # the last call for each holds the sum over the micro-batches
        parameter.register_post_accumulate_grad_hook(
            lambda one: summed.update({one: one.grad.clone()}))
    at.apply_update(tiny, tiny.network, in_cuts(inputs, labels, sizes), 16, [0.0, 0.0])
    found = [summed[parameter] for parameter in tiny.parameters]
    torch.testing.assert_close(found, list(wanted), rtol=0, atol=1e-6)


@pytest.mark.parametrize("scale", [1.0, 2.0**12])
@pytest.mark.parametrize("wildness", [1, 30])
def test_gradients_are_unscaled_then_clipped_to_a_norm_of_one_then_used(tiny, scale, wildness):
    in_plain_steps(tiny).scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    tiny.network.head.weight.data *= wildness
    inputs, labels = some_images(8)
    gradients = true_gradients(tiny, inputs, labels)
    norm = norm_of(gradients)
    assert (norm > 2) == (wildness > 1)
    for _ in range(2):  # no gradients are left from the first time
        weights = copy.deepcopy(tiny.network.state_dict())
        steps = steps_of(tiny, inputs, labels)
        tiny.network.load_state_dict(weights)
    wanted = [-0.1 * gradient / max(1, norm) for gradient in gradients]
    torch.testing.assert_close(steps, wanted, rtol=1e-3, atol=1e-6)


def test_the_loss_scale_is_one_and_the_same_for_all_micro_batches_of_an_update(tiny):
    in_plain_steps(tiny).scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=1)
    inputs, labels = some_images(8)
    wanted = true_gradients(tiny, inputs, labels)
    before = [parameter.detach().clone() for parameter in tiny.parameters]
    at.apply_update(tiny, tiny.network, in_cuts(inputs, labels, [2] * 4), 8, [0.1, 0.1])
    assert tiny.scaler.get_scale() == 8
    for after, old, gradient in zip(tiny.parameters, before, wanted, strict=True):
        torch.testing.assert_close(after.detach() - old, -0.1 * gradient / max(1, norm_of(wanted)))


def snapshot(run: at.Run) -> list[torch.Tensor]:
    """Copies of all tensors of the network and of the optimiser."""
    kept = list(run.network.state_dict().values())
    for state in run.optimizer.state_dict()["state"].values():
        kept += state.values()
    return copy.deepcopy(kept)


def same(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    return len(left) == len(right) and all(map(torch.equal, left, right))


@pytest.mark.parametrize("precision", [torch.float16, None])
def test_an_update_that_is_not_finite_is_skipped_and_counted_and_the_next_one_goes_through(
        tiny, precision):
    in_precision(tiny, precision)
    inputs, labels = some_images(4)
    while update(tiny, inputs, labels)[2]:  # a new FP16 scale starts high and may have to fall
        assert tiny.scaler.get_scale() > 1
    before, scale = snapshot(tiny), tiny.scaler.get_scale()
    assert update(tiny, torch.full_like(inputs, torch.inf), labels)[2] == 1
    assert same(before, snapshot(tiny))
    if precision == torch.float16:
        assert tiny.scaler.get_scale() == scale / 2 > 1
    assert update(tiny, inputs, labels)[2] == 0 and not same(before, snapshot(tiny))


@pytest.mark.parametrize("precision", [torch.float16, torch.bfloat16])
def test_products_are_in_16_bits_and_the_loss_over_the_update_is_in_32(tiny, precision):
    in_precision(tiny, precision).scaler = at.make_scaler(CPU, None)
    answers = []
    tiny.network.head.register_forward_hook(lambda module, inputs, output: answers.append(output))
    inputs, labels = some_images(24)
    batches = in_cuts(inputs, labels, [10, 10, 4])
    loss, right, _ = at.apply_update(tiny, tiny.network, batches, 24, [0.0, 0.0]).tolist()
    assert {answer.dtype for answer in answers} == {precision}
    logits = torch.cat(answers).double()
    wanted = F.cross_entropy(logits, labels, reduction="sum", label_smoothing=0.1).item()
    assert loss == pytest.approx(wanted, rel=1e-6)
    assert right == (logits.argmax(1) == labels).sum().item()
    assert all(parameter.dtype == torch.float32 for parameter in tiny.network.parameters())


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_an_epochs_loss_is_that_of_smoothed_labels_over_all_its_images(smoothing):
    run, data = tiny_run(LABEL_SMOOTHING=smoothing, NUM_EPOCHS=1), random_data(count=74)
    run.flags.BASE_LEARNING_RATE = 1e-30  # nothing moves, so all updates see the same network
    losses = []
    for part in at.deal_out(run, data, 0):
        for inputs, labels, _ in at.micro_batches(run, data, part):
            logs = run.network(inputs).log_softmax(1)
            right = -logs.gather(1, labels[:, None])[:, 0]
            losses.append((1 - smoothing) * right - smoothing * logs.mean(1))
    entry = at.train_epoch(run, data, 0)
    assert entry["train_loss"] == pytest.approx(torch.cat(losses).mean().item(), abs=1e-5)


@pytest.mark.parametrize("decay", [0.05, 0.4])
def test_matrices_are_decayed_and_biases_and_norms_are_not(decay):
    run = run_of("test_resnet", WEIGHT_DECAY=decay)
    for group in run.optimizer.param_groups:
        for parameter in group["params"]:
            assert group["weight_decay"] == (decay if parameter.ndim > 1 else 0.0)
    plain, decayed = tiny_run(WEIGHT_DECAY=0.0), tiny_run(WEIGHT_DECAY=decay)
    weights = [parameter.detach().clone() for parameter in plain.parameters]
    without, with_decay = (steps_of(one, *some_images(8)) for one in (plain, decayed))
    for first, second, weight in zip(without, with_decay, weights, strict=True):
        wanted = -0.1 * decay * weight if weight.ndim > 1 else torch.zeros_like(weight)
        torch.testing.assert_close(second - first, wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("architecture", ["resnet18", "efficientnet_b0"])
def test_the_whole_update_runs_on_the_meta_device(architecture, allow_meta):
    # Tensors hold no numbers there, so any .item() and any forgotten CPU tensor raises.
    run, data = run_of(architecture, device=torch.device("meta")), random_data(device="meta")
    at.unfreeze(run, 2)
    part = at.deal_out(run, random_data(), 0)[0]
    part = at.Part(part.images, part.chosen.to("meta"), part.views)
    for _ in range(2):
        batches = at.micro_batches(run, data, part)
        totals = at.apply_update(run, run.network, batches, part.images, [0.1] * len(run.groups))
    assert totals.device.type == "meta"
    with pytest.raises((RuntimeError, NotImplementedError)):
        totals[0].item()


@pytest.mark.parametrize(("architecture", "units", "wanted"), [
    ("resnet18", dict(avx512_bf16=True), torch.bfloat16),
    ("resnet18", dict(amx_bf16=True), torch.bfloat16),
    ("resnet18", dict(avx2=True, avx512_bf16=False), None),
    ("efficientnet_b0", dict(avx512_bf16=True, amx_bf16=True), None)])  # grouped convolutions
def test_a_cpu_trains_in_bf16_where_it_gains(architecture, units, wanted, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: units)
    run = run_of(architecture, USE_MIXED_PRECISION=True)
    assert run.precision == wanted and run.precision_why.endswith(".")
    assert run.scaler.get_scale() == 1
    off = at.choose_precision(run.network, CPU, quick_flags(USE_MIXED_PRECISION=False))
    assert off == (None, "USE_MIXED_PRECISION is off.")
    assert at.make_scaler(CPU, torch.float16).get_scale() > 1000


def test_bf16_trains_and_answers_like_fp32():
    run, data = run_of("test_resnet", NUM_EPOCHS=4), random_data()
    at.train_model(in_precision(run, torch.bfloat16), data)
    assert [entry["skipped_updates"] for entry in run.epochs] == [0] * 4
    half = at.predict(run, data, "test", [{}])
    whole = at.predict(in_precision(run, None), data, "test", [{}])
    torch.testing.assert_close(half, whole, rtol=0, atol=0.05)
    assert not torch.equal(half, whole)


@pytest.mark.parametrize(("kernel", "side"), [(3, 1), (3, 2), (5, 2), (5, 3), (5, 4)])
def test_the_gradients_of_small_maps_are_the_true_ones(kernel, side):
    inputs = torch.randn(3, 4, side, side, dtype=torch.double, requires_grad=True)
    weights = torch.randn(4, 1, kernel, kernel, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(at.SmallMaps.apply, (inputs, weights))
    plain = F.conv2d(inputs, weights, padding=kernel // 2, groups=4)
    torch.testing.assert_close(at.SmallMaps.apply(inputs, weights), plain)


@pytest.mark.parametrize(("units", "architecture"), [
    ("avx2", "mobilenetv3_small_050"), ("avx2", "convnext_atto"), ("", "mobilenetv3_small_050"),
    ("avx2 avx512_f", "mobilenetv3_small_050")])
def test_small_maps_are_for_cpus_that_gain_and_leave_a_network_s_gradients_alone(
        units, architecture, monkeypatch):
    used = []
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(units.split(), True))
    monkeypatch.setattr(at.SmallMaps, "apply",
                        lambda *of, apply=at.SmallMaps.apply: used.append(of) or apply(*of))
    network = run_of(architecture).network.double().eval()
    images, gradients = torch.rand(4, 3, 32, 32).double(), []
    for size in (256, 32):  # the last maps are of 8 x 8 pixels, and of one
        network.zero_grad()
        network(F.interpolate(images, size)).sum().backward()
        assert bool(used) == (units == "avx2" and size == 32)
        used.clear()
        gradients.append([one.grad.clone() for one in network.parameters()])
    for module in network.modules():
        vars(module).pop("forward", None)
    network.zero_grad()
    network(images).sum().backward()
    wanted = [one.grad for one in network.parameters()]
    torch.testing.assert_close(gradients[1], wanted, rtol=1e-9, atol=1e-12)


def rates(updates: list[int], layer: int = 0, pretrained: bool = True, **changes) -> list[float]:
    """At updates of a run with 10 an epoch: 50 in each of four stages, 5 of them warm-up."""
    run = tiny_run(pretrained, **dict(NUM_EPOCHS=20, BASE_LEARNING_RATE=0.01) | changes)
    return [at.learning_rate(update, layer, 10, run) for update in updates]


@pytest.mark.parametrize("start", [0, 50, 100, 150])
def test_each_stage_warms_up_and_follows_a_cosine(start):
    places = [start + place for place in (0, 2, 4, 5, 20, 49)]
    last = 0.01 * (1 + math.cos(math.pi * 44 / 45)) / 2
    assert rates(places) == pytest.approx([0.002, 0.006, 0.01, 0.01, 0.0075, last])


def test_without_stages_there_is_one_warm_up_and_one_cosine():
    wanted = [0.01 / 20, 0.01, 0.01, 0.005]
    assert rates([0, 19, 20, 110], GRADUAL_UNFREEZING=False) == pytest.approx(wanted)
    assert rates([0, 19, 20, 110], pretrained=False) == pytest.approx(wanted)
    assert rates([0, 19, 20, 110], UNFREEZING_STAGES=1) == pytest.approx(wanted)


@pytest.mark.parametrize(("gradual", "length"), [(True, 50), (False, 200)])
def test_step_decay_is_a_tenth_from_a_half_and_a_hundredth_from_three_quarters(gradual, length):
    changes = dict(USE_COSINE_SCHEDULE=False, GRADUAL_UNFREEZING=gradual)
    half, later = math.ceil(length / 2), math.ceil(length * 3 / 4)
    for start in range(0, 200, length):
        places = [start + place for place in (0, half - 1, half, later - 1, later, length - 1)]
        assert rates(places, **changes) == pytest.approx([0.01, 0.01, 1e-3, 1e-3, 1e-4, 1e-4])


@pytest.mark.parametrize("decay", [0.5, 0.3, 1.0])
def test_earlier_groups_learn_more_slowly_and_random_weights_all_alike(decay):
    peaks = [rates([20], layer, LAYER_RATE_DECAY=decay)[0] for layer in range(6)]
    shares = [peak / peaks[0] for peak in peaks]
    assert shares == pytest.approx([1, decay, decay**2, decay**3, decay**4, decay**4])
    alike = [rates([20], layer, False, LAYER_RATE_DECAY=decay)[0] for layer in range(6)]
    assert alike == pytest.approx([0.01] * 6)


def test_one_optimiser_drives_every_parameter_for_life_at_the_rates_of_the_function():
    run = run_of("test_resnet", NUM_EPOCHS=8, LAYER_RATE_DECAY=0.25, BASE_LEARNING_RATE=0.02)
    data, optimizer, steps = random_data(), run.optimizer, []
    last = run.groups["layer4"][0]
    for epoch in range(8):  # of two updates: 20 images in updates of at most 16
        entry = at.train_epoch(run, data, epoch)
        for group in optimizer.param_groups:
            assert group["lr"] == at.learning_rate(epoch * 2 + 1, group["layer"], 2, run)
        assert entry["learning_rate"] == at.learning_rate(epoch * 2 + 1, 0, 2, run)
        held = [one for group in optimizer.param_groups for one in group["params"]]
        assert sorted(map(id, held)) == sorted(map(id, run.network.parameters()))
        assert run.optimizer is optimizer
        steps.append(int(optimizer.state[last]["step"]) if last in optimizer.state else 0)
    assert steps == [0, 0, 2, 4, 6, 8, 10, 12]  # its averages go on through the stages
    peaks = [at.learning_rate(12, layer, 2, run) for layer in range(3)]
    assert peaks == pytest.approx([0.02, 0.005, 0.00125])


# ---- Layer groups and gradual unfreezing ---------------------------------------------------------

GROUPS = {
    "resnet18": ["layer4", "layer3", "layer2", "conv1 to layer1"],
    "resnet50": ["layer4", "layer3", "layer2", "conv1 to layer1"],
    "efficientnet_b0": ["blocks.5 to bn2", "blocks.3 to blocks.4", "blocks.2", "blocks.1",
                        "conv_stem to blocks.0"],
    "tf_efficientnet_lite0": ["blocks.5 to bn2", "blocks.3 to blocks.4", "blocks.2", "blocks.1",
                              "conv_stem to blocks.0"],
    "convnext_atto": ["stages.3 to head.norm", "stages.2", "stages.1", "stem.0 to stages.0"],
    "vit_tiny_patch16_224": ["blocks.9 to norm", "blocks.6 to blocks.8", "blocks.3 to blocks.5",
                             "cls_token to blocks.2"],  # one resolution: quarters of its depth
    "vgg11": ["features.16 to pre_logits.fc2", "features.11 to features.13",
              "features.6 to features.8", "features.0 to features.3"],
    "mobilenetv3_small_100": None, "regnety_002": None, "densenet121": None,
    "swin_tiny_patch4_window7_224": None, "volo_d1_224": None,
}


def network_on_meta(architecture: str) -> torch.nn.Module:
    with torch.device("meta"):
        return at.timm.create_model(architecture, num_classes=4)


@pytest.mark.parametrize("architecture", GROUPS)
def test_layer_groups_hold_every_parameter_once_the_head_alone_first(architecture):
    network = network_on_meta(architecture)
    groups = at.layer_groups(network)
    grouped = [id(parameter) for parameters in groups.values() for parameter in parameters]
    assert sorted(grouped) == sorted(map(id, network.parameters()))
    assert next(iter(groups)) == "head" and len(groups) >= 5 and all(groups.values())
    assert all(parameter.shape[0] == 4 for parameter in groups["head"])
    assert GROUPS[architecture] in (None, list(groups)[1:])


def test_a_network_that_lists_no_strides_is_cut_by_its_depth():
    network = network_on_meta("resnet18")
    del network.feature_info
    assert list(at.layer_groups(network)) == ["head", *GROUPS["resnet18"]]


def table_of_groups() -> list[list[str]]:
    """The script's own table of layer groups: a row a group, its cells as they are written."""
    lines = inspect.getsource(at).partition("# The lesson's three networks in layer groups")[2]
    lines = lines.partition("#\n")[2].partition("#\n")[0].splitlines()
    starts = [lines[0].index(head) for head in ("ResNet", "EfficientNet", "learns", "a side")]
    rows = []
    for line in lines[1:]:
        ends = [*starts[1:], None]
        rows.append([line[start:end].strip() for start, end in zip(starts, ends, strict=True)])
    return rows


@pytest.mark.parametrize(("architecture", "column"), [("resnet18", 0), ("resnet50", 0),
                                                      ("efficientnet_b0", 1)])
def test_the_table_of_the_lesson_s_networks_is_true(architecture, column):
    rows = [row for row in table_of_groups() if row[column]]
    run = run_of(architecture, IMAGE_SIZE=64)
    assert [row[column] for row in rows] == list(run.groups)
    stages = [at.groups_learning(epoch, run) for epoch in range(run.flags.NUM_EPOCHS)]
    sides = []
    for name in list(run.groups)[1:]:
        ending = run.network.get_submodule(name.split(" to ")[-1])
        ending.register_forward_hook(lambda module, inputs, output: sides.append(output.shape[-1]))
    run.network(torch.zeros(2, 3, 64, 64))
    divided = [f"{64 // side}" for side in reversed(sides)]
    assert [row[3] for row in rows] == ["(one answer for the image)", *divided]
    for place, row in enumerate(rows, 1):
        learns = f"stage {place}" if place in stages else "never"
        assert row[2] == learns


def test_the_stage_is_a_function_of_the_epoch_alone():
    run = tiny_run(pretrained=True, NUM_EPOCHS=20)
    assert [at.groups_learning(epoch, run) for epoch in range(20)] == [
        1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 3, 3, 3, 3, 3, 4, 4, 4, 4, 4]
    assert [at.groups_learning(epoch, run) for epoch in (19, 0, 7)] == [4, 1, 2]
    run.flags.NUM_EPOCHS, run.flags.UNFREEZING_STAGES = 7, 3
    assert [at.groups_learning(epoch, run) for epoch in range(7)] == [1, 1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize("architecture", ["test_resnet", "efficientnet_b0", "test_convnext",
                                          "vit_tiny_patch16_224"])
def test_frozen_layers_stay_bit_identical_and_the_planned_ones_learn(architecture):
    run, data = run_of(architecture, NUM_EPOCHS=4), random_data()
    parameters = dict(run.network.named_parameters())
    for epoch in range(4):
        before = copy.deepcopy(run.network.state_dict())
        entry = at.train_epoch(run, data, epoch)
        planned = set()
        for group in list(run.groups.values())[:epoch + 1]:
            planned.update(group)
        assert entry["stage"] == epoch + 1
        assert entry["trainable_parameters"] == sum(one.numel() for one in planned)
        assert all(one in run.optimizer.state for one in planned)
        learned = set()
        for name, tensor in run.network.state_dict().items():
            owner = run.network.get_submodule(name.rpartition(".")[0])
            own = {parameters[name]} if name in parameters else set(owner.parameters())
            if torch.equal(tensor, before[name]):
                assert name in parameters or not own & planned, name  # statistics that stand still
            else:
                assert own <= planned, name
                learned |= own
        last = list(run.groups.values())[epoch]
        assert learned & set(last)


@pytest.mark.parametrize("memory", [0.0, 4.0])
def test_the_head_s_stage_leaves_statistics_alone_and_the_network_in_training_mode(memory):
    run, data = run_of("test_resnet", NUM_EPOCHS=4, MEMORY_GB=memory), random_data()
    at.train_epoch(run, data, 0)
    at.train_epoch(run, data, 1)
    modes = {name: module.training for name, module in run.network.named_children()}
    assert modes["layer4"] and modes["fc"] and run.network.layer4[0].bn1.training
    assert not modes["layer3"] and not modes["layer1"] and not run.network.layer3[0].bn1.training


def test_without_gradual_unfreezing_and_with_random_weights_everything_learns_from_the_start():
    for run in (run_of("test_resnet", GRADUAL_UNFREEZING=False), run_of("test_resnet", False)):
        entry = at.train_epoch(run, random_data(), 0)
        everything = sum(parameter.numel() for parameter in run.network.parameters())
        assert entry["trainable_parameters"] == everything and entry["stage"] == 1


def test_a_single_stage_is_the_head_alone():
    run, data = run_of("test_resnet", NUM_EPOCHS=3, UNFREEZING_STAGES=1), random_data()
    before = copy.deepcopy(run.network.state_dict())
    entries = [at.train_epoch(run, data, epoch) for epoch in range(3)]
    assert [entry["stage"] for entry in entries] == [1, 1, 1]
    after = run.network.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"fc.weight", "fc.bias"}


def test_tta_is_the_mean_of_views_that_are_answered_one_by_one_the_plain_one_first():
    run, data = run_of("test_resnet"), random_data()
    views = at.tta_views(run.flags)
    assert len(views) == 2 and views[0] == {}
    together = at.predict(run, data, "test", views)
    torch.testing.assert_close(together.sum(-1), torch.ones(2, 10))
    one_by_one = [at.predict(run, data, "test", [options])[0] for options in views]
    torch.testing.assert_close(together, torch.stack(one_by_one), rtol=0, atol=1e-6)
    torch.testing.assert_close(at.soft_vote(together), sum(one_by_one) / 2, rtol=0, atol=1e-6)
    with torch.no_grad():
        shown = at.show(data.images[data.split["test"]], run)
        wanted = run.network.eval()(shown).softmax(-1)
    torch.testing.assert_close(together[0], wanted, rtol=0, atol=1e-6)


def test_no_view_is_mirrored_where_left_is_not_right_and_tta_is_a_flag():
    views = at.tta_views(quick_flags(HORIZONTAL_FLIP=False))
    assert views[0] == {} and len(views) == 2
    assert not any(options.get("mirror") for options in views)
    assert at.tta_views(quick_flags(USE_TTA=False)) == [{}]


def test_a_soft_vote_averages_probabilities_not_logits_and_listens_to_who_is_sure():
    logits = torch.tensor([[[9.0, 0.0]], [[0.0, 1.0]], [[0.0, 1.0]]])
    probabilities = logits.softmax(-1)
    vote = at.soft_vote(probabilities)
    torch.testing.assert_close(vote, probabilities.sum(0) / 3)
    assert not torch.allclose(vote, logits.mean(0).softmax(-1), atol=0.1)
    sure, unsure = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.45, 0.55]])
    assert at.soft_vote([sure, unsure, unsure]).argmax() == 0  # a count of votes would say 1
    voters = [torch.rand(50, 4).softmax(-1) for _ in range(3)]
    assert torch.equal(at.soft_vote(voters), at.soft_vote(voters[::-1]))
