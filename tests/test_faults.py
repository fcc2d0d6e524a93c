"""What may go wrong in an update: numbers that are not finite, memory that runs out."""

import copy
import re

import pytest
import torch
from conftest import in_precision, random_data, run_of, tiny_run

import advanced_techniques as at

OUT_OF_MEMORY = [
    torch.OutOfMemoryError("injected"),
    MemoryError(),
    RuntimeError("MPS backend out of memory (...)"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:114] DefaultCPUAllocator: can't allocate memory"),
    RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
]


def limit_forward(network, limit: int, error: Exception | None = None):
    """Let a forward pass of more images run out of memory; returns the sizes that were tried."""
    tried, forward = [], network.forward

    def limited(images):
        tried.append(len(images))
        if len(images) > limit:
            raise error or torch.OutOfMemoryError("injected")
        return forward(images)

    network.forward = limited
    return tried


def train(run, data, epochs=1):
    return [at.train_epoch(run, data, epoch) for epoch in range(epochs)]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: str(error)[:12] or "MemoryError")
@pytest.mark.parametrize("limit", [1, 3, 4, 7])
def test_halving_the_micro_batch_gives_the_same_weights(limit, error, capsys):
    data = random_data(count=64)  # 32 images: two updates of two micro-batches of 8
    plain, tiny = tiny_run(NUM_EPOCHS=2), tiny_run(NUM_EPOCHS=2)
    train(plain, data, 2)
    tried = limit_forward(tiny.network, limit, error)
    train(tiny, data, 2)
    assert tiny.micro_batch == {1: 1, 3: 2, 4: 4, 7: 4}[limit]
    assert f"micro-batches of {tiny.micro_batch} instead of" in capsys.readouterr().out
    assert sum(size for size in tried if size <= limit) == 64  # each image once an epoch
    for left, right in zip(tiny.network.parameters(), plain.network.parameters(), strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=1e-6)


@pytest.mark.parametrize("failing", range(6))
def test_memory_that_runs_out_at_any_micro_batch_repeats_that_update_alone(failing):
    data, flags = random_data(count=64), dict(BATCH_SIZE=4, GRADIENT_ACCUMULATION_STEPS=3)
    plain, tiny = tiny_run(NUM_EPOCHS=1, **flags), tiny_run(NUM_EPOCHS=1, **flags)
    calls, forward = [], tiny.network.forward
    train(plain, data)  # 32 images: three updates of three micro-batches

    def fail_once(images):
        calls.append(len(images))
        if len(calls) == failing + 1:
            raise torch.OutOfMemoryError("injected")
        return forward(images)

    tiny.network.forward = fail_once
    entry, = train(tiny, data)
    assert entry["train_loss"] > 0 and tiny.micro_batch == 2
    for left, right in zip(tiny.network.parameters(), plain.network.parameters(), strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=1e-6)


def test_backward_passes_run_out_too():
    plain, tiny, data = tiny_run(NUM_EPOCHS=1), tiny_run(NUM_EPOCHS=1), random_data()
    train(plain, data)
    calls = []

    def hook(gradient):
        calls.append(1)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("injected")

    handle = tiny.network.stem.weight.register_hook(hook)
    train(tiny, data)
    handle.remove()
    assert tiny.micro_batch == 4 and len(calls) > 2
    own, wanted = tiny.network.stem.weight, plain.network.stem.weight
    torch.testing.assert_close(own, wanted, rtol=0, atol=1e-6)


def test_one_image_that_does_not_fit_is_a_plain_message(tiny, capsys):
    limit_forward(tiny.network, 0)
    with pytest.raises(SystemExit) as stopped:
        train(tiny, random_data())
    message = capsys.readouterr().err
    assert stopped.value.code == 2 and "IMAGE_SIZE" in message and "--architectures" in message


def test_memory_that_runs_out_in_the_step_stops_instead_of_stepping_twice(
        tiny, capsys, monkeypatch):
    def no_room(*arguments, **options):
        raise torch.OutOfMemoryError("injected")

    monkeypatch.setattr(torch.optim.AdamW, "step", no_room)
    with pytest.raises(SystemExit) as stopped:
        train(tiny, random_data())
    assert stopped.value.code == 2 and "AdamW" in capsys.readouterr().err


def test_other_errors_are_not_taken_for_lack_of_memory(tiny):
    limit_forward(tiny.network, 0, RuntimeError("shapes don't fit"))
    with pytest.raises(RuntimeError, match="shapes don't fit"):
        train(tiny, random_data())


def test_evaluation_halves_its_batches_too(tiny):
    data = random_data()
    wanted = at.predict(tiny, data, "test", at.VIEWS)
    tried = limit_forward(tiny.network, 3)
    torch.testing.assert_close(at.predict(tiny, data, "test", at.VIEWS), wanted)
    assert tiny.micro_batch == 2 and max(tried) == 8 and tried.count(8) == 1


def test_cached_features_survive_a_lack_of_memory():
    data = random_data()
    plain, short = run_of("resnet18", NUM_EPOCHS=20), run_of("resnet18", NUM_EPOCHS=20)
    train(plain, data)
    forward = short.network.forward

    def limited(images):
        if len(images) > 4:
            raise torch.OutOfMemoryError("injected")
        return forward(images)

    short.network.forward = limited
    train(short, data)
    assert short.micro_batch == 4
    torch.testing.assert_close(short.kept.features[0], plain.kept.features[0], rtol=1e-4, atol=1e-4)


def poison(monkeypatch, first: int, last: int):
    """Let the augmented micro-batches number first to last - 1 be infinite."""
    calls, augment = [], at.augment

    def poisoned(*arguments):
        calls.append(1)
        value = torch.inf if first <= len(calls) - 1 < last else 0.5
        return torch.full_like(augment(*arguments), value)

    monkeypatch.setattr(at, "augment", poisoned)


@pytest.mark.parametrize("mixed", [None, torch.bfloat16])
def test_a_non_finite_update_in_fp32_stops_the_run_and_is_not_applied(mixed, monkeypatch, capsys):
    tiny = tiny_run(NUM_EPOCHS=2, BATCH_SIZE=16, GRADIENT_ACCUMULATION_STEPS=1)
    in_precision(tiny, mixed)
    data = random_data(count=96)
    poison(monkeypatch, 3, 4)  # the first update of the second epoch
    tiny.epochs.append(at.train_epoch(tiny, data, 0))
    with pytest.raises(SystemExit) as stopped:
        at.train_epoch(tiny, data, 1)
    message = capsys.readouterr().err
    assert stopped.value.code == 2 and "epoch 2, update 1" in message
    assert "BASE_LEARNING_RATE" in message
    assert "loss scale" in message and "USE_MIXED_PRECISION" not in message
    assert all(torch.isfinite(parameter).all() for parameter in tiny.network.parameters())


def short_updates(epochs):
    """A run in FP16 with three updates of four images in an epoch, and its data."""
    tiny = tiny_run(NUM_EPOCHS=epochs, BATCH_SIZE=4, GRADIENT_ACCUMULATION_STEPS=1)
    return in_precision(tiny, torch.float16), random_data(count=24)


def test_fp16_skips_counts_and_stops_after_twenty_in_a_row_across_epochs(monkeypatch, capsys):
    tiny, data = short_updates(9)
    poison(monkeypatch, 9, 10**9)
    for epoch in range(9):
        if epoch == 3:
            before = copy.deepcopy(tiny.network.state_dict())
        tiny.epochs.append(at.train_epoch(tiny, data, epoch))
    assert [entry["skipped_updates"] for entry in tiny.epochs[3:]] == [3] * 6
    assert tiny.epochs[-1]["skipped_in_a_row"] == 18
    # The loss is that of the images whose loss was finite: none.
    assert all(entry["train_loss"] == 0 for entry in tiny.epochs[3:])
    with pytest.raises(SystemExit) as stopped:
        at.train_epoch(tiny, data, 9 - 1)
    message = capsys.readouterr().err
    assert stopped.value.code == 2 and "update 2" in message and "20 times in a row" in message
    assert "USE_MIXED_PRECISION" in message
    after = tiny.network.state_dict()
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())


def test_a_few_overflows_are_mended_by_loss_scaling(monkeypatch):
    tiny, data = short_updates(4)
    before = tiny.scaler.get_scale()
    poison(monkeypatch, 0, 5)
    epochs = train(tiny, data, 4)
    assert sum(entry["skipped_updates"] for entry in epochs) >= 5
    assert epochs[-1]["skipped_updates"] == 0
    assert epochs[-1]["loss_scale"] < before


def test_a_network_that_answers_nan_to_the_validation_images_stops(tiny, monkeypatch, capsys):
    monkeypatch.setattr(at, "validate", lambda *arguments: torch.full((10, 4), torch.nan))
    with pytest.raises(SystemExit):
        at.train_model(tiny, random_data())
    assert "validation loss is not finite" in capsys.readouterr().err


@pytest.mark.parametrize("size", [2, 3, 8, 9, 25, 32, 49])
@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("halved", [False, True])
def test_of_several_processes_one_without_memory_names_flags_that_keep_the_update(
        size, steps, halved, monkeypatch, capsys):
    monkeypatch.setattr(at, "PROCESSES", 3)
    monkeypatch.setattr(at, "RANK", 2)
    monkeypatch.setattr(at, "LOCAL_RANK", 2)
    whole = 2 * size - 1 if halved else size
    tiny = tiny_run(BATCH_SIZE=whole, GRADIENT_ACCUMULATION_STEPS=steps)
    tiny.micro_batch = size  # halved by a process that was alone, as its checkpoint tells
    limit_forward(tiny.network, 0)
    with pytest.raises(SystemExit) as stopped:
        at.within_memory(lambda: tiny.network(torch.zeros(size, 3, 20, 20)), tiny)
    message = capsys.readouterr().err
    assert stopped.value.code == 2 and "process 2 ran out of memory" in message
    batch, accumulation = map(int, re.findall(r"--[a-z-]+ (\d+)", message))
    assert batch < size and batch * accumulation == whole * steps
    assert "--resume true" in message
