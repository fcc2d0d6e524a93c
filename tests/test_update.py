"""One optimiser update: accumulation, loss scaling, skipping, clipping, no host synchronisation."""

import copy

import pytest
import torch
from conftest import in_precision, random_data, run_of, tiny_run
from torch.nn import functional as F

import advanced_techniques as at


def cut(inputs: torch.Tensor, labels: torch.Tensor, sizes: list[int]) -> list[at.MicroBatch]:
    """Images and labels as micro-batches of the given sizes."""
    parts = zip(inputs.split(sizes), labels.split(sizes), strict=True)
    return [(*part, place == len(sizes)) for place, part in enumerate(parts, 1)]


@pytest.mark.parametrize("sizes", [[16], [4, 4, 4, 4], [5, 5, 5, 1], [7, 9], [1] * 16])
def test_micro_batches_give_the_gradient_of_one_batch(tiny, sizes, monkeypatch):
    network = tiny.network.double()
    inputs = torch.randn(16, 3, 20, 20, dtype=torch.double)
    labels = torch.arange(16) % 4
    loss = F.cross_entropy(network(inputs), labels, label_smoothing=0.1)
    wanted = torch.autograd.grad(loss, network.parameters())
    seen, single = [], torch.Tensor.float

    def keep_logits(tensor):
        return tensor if tensor.ndim == 2 else single(tensor)  # logits stay 64

    def keep_gradients(parameters, max_norm):
        seen.extend(parameter.grad.clone() for parameter in parameters)
        return torch.ones(())

    monkeypatch.setattr(torch.Tensor, "float", keep_logits)
    monkeypatch.setattr(at.nn.utils, "clip_grad_norm_", keep_gradients)
    at.apply_update(tiny, network, cut(inputs, labels, sizes), 16, [0.0, 0.0])
    names = [id(parameter) for parameter in tiny.parameters]
    for parameter, gradient in zip(network.parameters(), wanted, strict=True):
        own = seen[names.index(id(parameter))]
        torch.testing.assert_close(own, gradient, rtol=0, atol=1e-6)


def test_every_image_is_trained_on_once_an_epoch_in_micro_batches_of_the_given_size():
    run, data = run_of("resnet18"), random_data(count=74)  # 37 to train on: ragged at every level
    plan = at.deal_out(run, data, 0)
    dealt = torch.cat([part.chosen for part in plan])
    assert sorted(dealt.tolist()) == data.split["train"].tolist()
    assert sum(len(part.views) for part in plan) == 37
    assert max(len(part.chosen) for part in plan) <= 16 and len(plan) == 3
    sizes = []
    for part in plan:
        batches = list(at.micro_batches(run, data, part))
        sizes += [len(labels) for _, labels, _ in batches]
        assert [last for _, _, last in batches] == [False] * (len(batches) - 1) + [True]
    assert sum(sizes) == 37 and 1 < min(sizes) <= max(sizes) <= 8


def snapshot(run):
    return copy.deepcopy((run.network.state_dict(), run.optimizer.state_dict()["state"]))


def same(left, right) -> bool:
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    return torch.equal(left, right) if isinstance(left, torch.Tensor) else left == right


@pytest.mark.parametrize("precision", [torch.float16, None])
def test_an_overflowing_update_is_skipped_and_counted_and_the_next_goes_through(tiny, precision):
    in_precision(tiny, precision)
    fine, wild = torch.randn(4, 3, 20, 20), torch.full((4, 3, 20, 20), torch.inf)

    def update(inputs):
        batches = [(inputs, torch.arange(4), True)]
        return int(at.apply_update(tiny, tiny.network, batches, 4, [0.01, 0.01])[2])

    while update(fine):  # a fresh FP16 scale starts high and may have to fall first
        assert tiny.scaler.get_scale() > 1
    before, scale = snapshot(tiny), tiny.scaler.get_scale()
    assert update(wild) == 1
    skipped = snapshot(tiny)
    assert same(before[0], skipped[0]) and same(before[1], skipped[1])
    assert tiny.scaler.get_scale() == scale / 2
    assert update(fine) == 0
    assert not same(before[0], snapshot(tiny)[0])


def test_float16_really_computes_in_float16():
    run, kinds = in_precision(tiny_run(LABEL_SMOOTHING=0.0), torch.float16), []

    def keep_kind(module, inputs, output):
        kinds.append(output.dtype)

    run.network.head.register_forward_hook(keep_kind)
    batches = [(torch.randn(2, 3, 20, 20), torch.arange(2), True)]
    at.apply_update(run, run.network, batches, 2, [0.1, 0.1])
    assert kinds == [torch.float16]


def test_gradients_are_clipped_after_unscaling(monkeypatch):
    run, norms, clip = tiny_run(LABEL_SMOOTHING=0.0), [], torch.nn.utils.clip_grad_norm_

    def keep_norm(*arguments, **options):
        norms.append(clip(*arguments, **options))
        return norms[-1]

    monkeypatch.setattr(at.nn.utils, "clip_grad_norm_", keep_norm)
    run.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    inputs, labels = torch.randn(8, 3, 20, 20), torch.arange(8) % 4
    loss = F.cross_entropy(run.network(inputs), labels)
    gradients = torch.autograd.grad(loss, run.network.parameters())
    wanted = torch.stack([gradient.norm() for gradient in gradients]).norm()
    at.apply_update(run, run.network, [(inputs, labels, True)], 8, [0.1, 0.1])
    torch.testing.assert_close(norms[0], wanted)


@pytest.mark.parametrize("architecture", ["resnet18", "efficientnet_b0"])
def test_the_whole_update_runs_on_the_meta_device(architecture, allow_meta):
    # There tensors hold no numbers, so any .item() and any forgotten CPU tensor raises.
    run, data = run_of(architecture, device=torch.device("meta")), random_data(device="meta")
    at.unfreeze(run, 2)
    views = at.choose_views(torch.rand(20, len(at.RANDOM_NUMBERS)), True)
    part = at.Part(20, data.split["train"], views)
    for _ in range(2):
        batches = at.micro_batches(run, data, part)
        totals = at.apply_update(run, run.network, batches, 20, [0.1] * len(run.groups))
    assert totals.device.type == "meta"
    with pytest.raises((RuntimeError, NotImplementedError)):
        totals[0].item()


def step_of(run, inputs, labels, rate=0.1):
    """How one update moved each parameter."""
    before = [parameter.detach().clone() for parameter in run.parameters]
    at.apply_update(run, run.network, [(inputs, labels, True)], len(labels), [rate, rate])
    pairs = zip(run.parameters, before, strict=True)
    return [parameter.detach() - old for parameter, old in pairs]


def test_a_gradient_of_norm_over_one_is_cut_to_one_before_the_step(tiny):
    tiny.optimizer = torch.optim.SGD(tiny.optimizer.param_groups, lr=0.1)
    for group in tiny.optimizer.param_groups:
        group["weight_decay"] = 0.0
    tiny.network.head.weight.data *= 30
    inputs, labels = torch.randn(8, 3, 20, 20), torch.arange(8) % 4
    loss = F.cross_entropy(tiny.network(inputs), labels, label_smoothing=0.1)
    norms = [gradient.norm() for gradient in torch.autograd.grad(loss, tiny.network.parameters())]
    assert torch.stack(norms).norm() > 2
    moved = step_of(tiny, inputs, labels)
    length = torch.stack([step.norm() for step in moved]).norm().item()
    assert length == pytest.approx(0.1, rel=1e-3)


@pytest.mark.parametrize("decay", [0.05, 0.4])
def test_matrices_are_decayed_by_weight_decay_and_biases_and_norms_are_not(decay):
    run = run_of("resnet18", WEIGHT_DECAY=decay)
    seen = 0
    for group in run.optimizer.param_groups:
        for parameter in group["params"]:
            assert group["weight_decay"] == (decay if parameter.ndim > 1 else 0.0)
            seen += 1
    assert seen == len(list(run.network.parameters()))
    plain, decayed = tiny_run(WEIGHT_DECAY=0.0), tiny_run(WEIGHT_DECAY=decay)
    inputs, labels = torch.randn(8, 3, 20, 20), torch.arange(8) % 4
    weights = [parameter.detach().clone() for parameter in plain.parameters]
    undecayed = step_of(plain, inputs, labels)
    steps = zip(undecayed, step_of(decayed, inputs, labels), weights, strict=True)
    for without, with_decay, weight in steps:
        wanted = -0.1 * decay * weight if weight.ndim > 1 else torch.zeros_like(weight)
        torch.testing.assert_close(with_decay - without, wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_an_epochs_loss_is_that_of_smoothed_labels(smoothing):
    run, data = tiny_run(LABEL_SMOOTHING=smoothing, NUM_EPOCHS=1), random_data()
    run.flags.BASE_LEARNING_RATE = 1e-30  # nothing moves, so all updates see the same network
    losses = []
    for part in at.deal_out(run, data, 0):
        for inputs, labels, _ in at.micro_batches(run, data, part):
            logs = run.network(inputs).log_softmax(1)
            right = -logs.gather(1, labels[:, None])[:, 0]
            losses.append((1 - smoothing) * right - smoothing * logs.mean(1))
    entry = at.train_epoch(run, data, 0)
    assert entry["train_loss"] == pytest.approx(torch.cat(losses).mean().item(), abs=1e-5)


@pytest.mark.parametrize("precision", [torch.float16, torch.bfloat16])
def test_the_loss_is_computed_in_fp32(tiny, monkeypatch, precision):
    kinds, cross_entropy = [], F.cross_entropy
    monkeypatch.setattr(at.F, "cross_entropy", lambda logits, *arguments, **options: (
        kinds.append(logits.dtype), cross_entropy(logits, *arguments, **options))[1])
    batches = [(torch.randn(2, 3, 20, 20), torch.arange(2), True)]
    at.apply_update(in_precision(tiny, precision), tiny.network, batches, 2, [0.1, 0.1])
    assert kinds == [torch.float32]


def test_an_update_leaves_no_gradients_behind(tiny):
    inputs, labels = torch.randn(8, 3, 20, 20), torch.arange(8) % 4
    step_of(tiny, inputs, labels)
    assert all(parameter.grad is None for parameter in tiny.network.parameters())


def test_each_epoch_has_an_order_of_its_own():
    run, data = tiny_run(), random_data()

    def order(epoch):
        return torch.cat([part.chosen for part in at.deal_out(run, data, epoch)]).tolist()

    assert order(0) != sorted(order(0)) and order(0) != order(1) and order(0) == order(0)
    assert len(set(map(tuple, (order(epoch) for epoch in range(5))))) == 5
    first = order(0)
    run.seed = 1
    assert order(0) != first


def test_every_epoch_of_a_run_trains_in_the_order_of_its_number(monkeypatch):
    run, data, orders = tiny_run(NUM_EPOCHS=3), random_data(), []
    produce = at.micro_batches
    monkeypatch.setattr(at, "micro_batches", lambda run, data, part: (
        orders[-1].extend(part.chosen.tolist()), produce(run, data, part))[1])
    for epoch in range(3):
        orders.append([])
        at.train_epoch(run, data, epoch)
    assert all(sorted(order) == data.split["train"].tolist() for order in orders)
    assert orders[0] != orders[1] != orders[2] != orders[0]
