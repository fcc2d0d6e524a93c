"""One optimiser update: accumulation, loss scaling, skipping, clipping, no host synchronisation."""

import copy
import sys

import pytest
import torch
from conftest import CPU, model_of, quick_flags, random_data
from torch.nn import functional as F

import advanced_techniques as at


@pytest.mark.parametrize("sizes", [[16], [4, 4, 4, 4], [5, 5, 5, 1], [7, 9], [1] * 16])
def test_micro_batches_give_the_gradient_of_one_batch(tiny, sizes, monkeypatch):
    network = tiny.network.double()
    inputs, labels = torch.randn(16, 3, 20, 20, dtype=torch.double), torch.arange(16) % 4
    wanted = torch.autograd.grad(F.cross_entropy(network(inputs), labels, label_smoothing=0.1), network.parameters())

    seen = []
    single = torch.Tensor.float
    monkeypatch.setattr(torch.Tensor, "float", lambda tensor: tensor if tensor.ndim == 2 else single(tensor))  # logits stay 64
    monkeypatch.setattr(at.nn.utils, "clip_grad_norm_", lambda parameters, max_norm: (
        seen.extend(parameter.grad.clone() for parameter in parameters), torch.ones(()))[1])
    optimizer, scaler = at.make_optimizer(tiny, quick_flags()), at.make_scaler(CPU, False)
    batches = zip(inputs.split(sizes), labels.split(sizes), strict=True)
    at.apply_update(network, batches, 16, optimizer, scaler, [0.0, 0.0], False, 0.1)
    names = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    for parameter, gradient in zip(network.parameters(), wanted, strict=True):
        torch.testing.assert_close(seen[names.index(id(parameter))], gradient, rtol=0, atol=1e-6)


def test_every_image_is_trained_on_once_an_epoch_in_micro_batches_of_the_given_size():
    data, flags = random_data(count=74), quick_flags()  # 37 images to train on: ragged at every level
    windows, views = at.epoch_plan(data, 0, 0, flags)
    assert sorted(torch.cat(windows).tolist()) == data.split["train"].tolist() and len(views) == 37
    assert max(map(len, windows)) <= 16 and len(windows) == 3
    model = model_of("resnet18")
    sizes = [len(labels) for window in windows for _, labels in at.micro_batches(data, window, views[:len(window)],
                                                                                 model, flags)]
    assert sum(sizes) == 37 and 1 < min(sizes) <= max(sizes) <= 8


def snapshot(model, optimizer):
    return copy.deepcopy((model.network.state_dict(), optimizer.state_dict()["state"]))


def same(left, right) -> bool:
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    return torch.equal(left, right) if isinstance(left, torch.Tensor) else left == right


@pytest.mark.parametrize("mixed", [torch.float16, None])
def test_an_overflowing_update_is_skipped_and_counted_and_the_next_goes_through(tiny, mixed):
    optimizer, scaler = at.make_optimizer(tiny, quick_flags()), at.make_scaler(CPU, mixed)
    scale = scaler.get_scale()
    fine, wild = torch.randn(4, 3, 20, 20), torch.full((4, 3, 20, 20), torch.inf)

    def update(inputs):
        totals = at.apply_update(tiny.network, [(inputs, torch.arange(4))], 4, optimizer, scaler, [0.01, 0.01], mixed, 0.1)
        return int(totals[2])

    while update(fine):  # a fresh FP16 scale starts high and may have to fall first
        assert scaler.get_scale() > 1
    before, scale = snapshot(tiny, optimizer), scaler.get_scale()
    assert update(wild) == 1
    skipped = snapshot(tiny, optimizer)
    assert same(before[0], skipped[0]) and same(before[1], skipped[1])
    assert scaler.get_scale() == scale / 2
    assert update(fine) == 0
    assert not same(before[0], snapshot(tiny, optimizer)[0])


def test_float16_really_computes_in_float16(tiny):
    kinds = []
    tiny.network.head.register_forward_hook(lambda module, inputs, output: kinds.append(output.dtype))
    optimizer, scaler = at.make_optimizer(tiny, quick_flags()), at.make_scaler(CPU, torch.float16)
    batches = [(torch.randn(2, 3, 20, 20), torch.arange(2))]
    at.apply_update(tiny.network, batches, 2, optimizer, scaler, [0.1, 0.1], torch.float16, 0.0)
    assert kinds == [torch.float16]


def test_gradients_are_clipped_after_unscaling(tiny, monkeypatch):
    norms, clip = [], torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(at.nn.utils, "clip_grad_norm_", lambda *arguments, **options: (
        norms.append(clip(*arguments, **options)), norms[-1])[1])
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    inputs, labels = torch.randn(8, 3, 20, 20), torch.arange(8) % 4
    loss = F.cross_entropy(tiny.network(inputs), labels)
    wanted = torch.stack([grad.norm() for grad in torch.autograd.grad(loss, tiny.network.parameters())]).norm()
    at.apply_update(tiny.network, [(inputs, labels)], 8, at.make_optimizer(tiny, quick_flags()), scaler, [0.1, 0.1],
                    False, 0.0)
    torch.testing.assert_close(norms[0], wanted)


@pytest.mark.parametrize("architecture", ["resnet18", "efficientnet_b0"])
def test_the_whole_update_runs_on_the_meta_device(architecture, monkeypatch):
    # On the meta device tensors hold no numbers, so any .item() and any forgotten CPU tensor raises.
    monkeypatch.setattr(sys.modules["torch.optim.adam"], "_device_dtype_check_for_fused", lambda *arguments, **options: None)
    model, flags = model_of(architecture), quick_flags()
    data = random_data(device="meta")
    model.network.to("meta")
    model.groups = at.layer_groups(model.network)
    model.mean, model.std = model.mean.to("meta"), model.std.to("meta")
    at.unfreeze(model, 2)
    optimizer, scaler = at.make_optimizer(model, flags), at.make_scaler(torch.device("meta"), False)
    window, views = data.split["train"], at.choose_views(torch.rand(20, at.RANDOM_NUMBERS), True)
    for _ in range(2):
        totals = at.apply_update(model.network, at.micro_batches(data, window, views, model, flags), 20, optimizer, scaler,
                                 [0.1] * len(model.groups), False, 0.1)
    assert totals.device.type == "meta"
    with pytest.raises((RuntimeError, NotImplementedError)):
        totals[0].item()
