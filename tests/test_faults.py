"""What may go wrong in an update: numbers that are not finite, memory that runs out."""

import copy

import pytest
import torch
from conftest import CPU, model_of, quick_flags, random_data

import advanced_techniques as at

OUT_OF_MEMORY = [torch.OutOfMemoryError("injected"), MemoryError(), RuntimeError("MPS backend out of memory (...)"),
                 RuntimeError("[enforce fail at alloc_cpu.cpp:114] DefaultCPUAllocator: can't allocate memory"),
                 RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")]


@pytest.fixture(autouse=True)
def one_group_head(tiny, monkeypatch):
    """The tiny network has no timm methods: it always learns as a whole, so no features are cached."""
    tiny.network.num_features = 6


def limit_forward(network, limit: int, error: Exception | None = None):
    """Let the forward pass of more than `limit` images run out of memory; returns the batch sizes that were tried."""
    tried, forward = [], network.forward

    def limited(images):
        tried.append(len(images))
        if len(images) > limit:
            raise error or torch.OutOfMemoryError("injected")
        return forward(images)

    network.forward = limited
    return tried


def train(model, data, flags, epochs=1, mixed=None):
    optimizer, scaler = at.make_optimizer(model, flags), at.make_scaler(CPU, mixed)
    return [at.train_epoch(model, data, epoch, optimizer, scaler, mixed, flags) for epoch in range(epochs)]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: str(error)[:12] or "MemoryError")
@pytest.mark.parametrize("limit", [1, 3, 4, 7])
def test_halving_the_micro_batch_gives_the_same_weights(tiny, limit, error, capsys):
    data, flags = random_data(count=64), quick_flags(NUM_EPOCHS=2)  # 32 images: two updates of two micro-batches of 8
    plain = copy.deepcopy(tiny)
    train(plain, data, flags, 2)
    tried = limit_forward(tiny.network, limit, error)
    train(tiny, data, flags, 2)
    assert tiny.micro_batch == {1: 1, 3: 2, 4: 4, 7: 4}[limit]
    assert f"micro-batches of {tiny.micro_batch} instead of" in capsys.readouterr().out
    assert sum(size for size in tried if size <= limit) == 64  # each image once an epoch
    for left, right in zip(tiny.network.parameters(), plain.network.parameters(), strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=1e-6)


@pytest.mark.parametrize("failing", range(6))
def test_memory_that_runs_out_at_any_micro_batch_repeats_that_update_alone(tiny, failing):
    data, flags = random_data(count=64), quick_flags(NUM_EPOCHS=1, BATCH_SIZE=4, GRADIENT_ACCUMULATION_STEPS=3)
    plain, calls, forward = copy.deepcopy(tiny), [], tiny.network.forward
    train(plain, data, flags)  # 32 images: three updates of three micro-batches

    def fail_once(images):
        calls.append(len(images))
        if len(calls) == failing + 1:
            raise torch.OutOfMemoryError("injected")
        return forward(images)

    tiny.network.forward = fail_once
    entry, = train(tiny, data, flags)
    assert entry["train_loss"] > 0 and tiny.micro_batch == 2
    for left, right in zip(tiny.network.parameters(), plain.network.parameters(), strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=1e-6)


def test_backward_passes_run_out_too(tiny):
    plain, data, flags = copy.deepcopy(tiny), random_data(), quick_flags(NUM_EPOCHS=1)
    train(plain, data, flags)
    calls = []

    def hook(gradient):
        calls.append(1)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("injected")

    handle = tiny.network.stem.weight.register_hook(hook)
    train(tiny, data, flags)
    handle.remove()
    assert tiny.micro_batch == 4 and len(calls) > 2
    torch.testing.assert_close(tiny.network.stem.weight, plain.network.stem.weight, rtol=0, atol=1e-6)


def test_one_image_that_does_not_fit_is_a_plain_message(tiny, capsys):
    limit_forward(tiny.network, 0)
    with pytest.raises(SystemExit) as stopped:
        train(tiny, random_data(), quick_flags(NUM_EPOCHS=1))
    message = capsys.readouterr().err
    assert stopped.value.code == 2 and "IMAGE_SIZE" in message and "--architectures" in message


def test_memory_that_runs_out_in_the_step_stops_instead_of_stepping_twice(tiny, capsys, monkeypatch):
    def no_room(*arguments, **options):
        raise torch.OutOfMemoryError("injected")

    monkeypatch.setattr(torch.optim.AdamW, "step", no_room)
    with pytest.raises(SystemExit) as stopped:
        train(tiny, random_data(), quick_flags(NUM_EPOCHS=1))
    assert stopped.value.code == 2 and "AdamW" in capsys.readouterr().err


def test_other_errors_are_not_taken_for_lack_of_memory(tiny):
    limit_forward(tiny.network, 0, RuntimeError("shapes don't fit"))
    with pytest.raises(RuntimeError, match="shapes don't fit"):
        train(tiny, random_data(), quick_flags(NUM_EPOCHS=1))


def test_evaluation_halves_its_batches_too(tiny):
    data, flags = random_data(), quick_flags()
    wanted = at.predict(tiny, data, "test", at.VIEWS, None, flags)
    tried = limit_forward(tiny.network, 3)
    torch.testing.assert_close(at.predict(tiny, data, "test", at.VIEWS, None, flags), wanted)
    assert tiny.micro_batch == 2 and max(tried) == 8 and tried.count(8) == 1


def test_cached_features_survive_a_lack_of_memory():
    data, flags = random_data(), quick_flags(NUM_EPOCHS=20)
    plain, short = model_of("resnet18", NUM_EPOCHS=20), model_of("resnet18", NUM_EPOCHS=20)
    train(plain, data, flags)
    features = short.network.forward_features
    short.network.forward_features = lambda images: features(images) if len(images) <= 4 else (
        _ for _ in ()).throw(torch.OutOfMemoryError("injected"))
    train(short, data, flags)
    assert short.micro_batch == 4
    torch.testing.assert_close(short.features[0], plain.features[0], rtol=1e-4, atol=1e-4)


def poison(monkeypatch, first: int, last: int):
    """Let the augmented micro-batches number first to last - 1 be infinite."""
    calls, augment = [], at.augment

    def poisoned(*arguments):
        calls.append(1)
        return torch.full_like(augment(*arguments), torch.inf if first <= len(calls) - 1 < last else 0.5)

    monkeypatch.setattr(at, "augment", poisoned)


@pytest.mark.parametrize("mixed", [None, torch.bfloat16])
def test_a_non_finite_update_in_fp32_stops_the_run_and_is_not_applied(tiny, mixed, monkeypatch, capsys):
    data, flags = random_data(count=96), quick_flags(NUM_EPOCHS=2, BATCH_SIZE=16, GRADIENT_ACCUMULATION_STEPS=1)
    poison(monkeypatch, 3, 4)  # the first update of the second epoch
    optimizer, scaler = at.make_optimizer(tiny, flags), at.make_scaler(CPU, mixed)
    tiny.epochs.append(at.train_epoch(tiny, data, 0, optimizer, scaler, mixed, flags))
    with pytest.raises(SystemExit) as stopped:
        at.train_epoch(tiny, data, 1, optimizer, scaler, mixed, flags)
    message = capsys.readouterr().err
    assert stopped.value.code == 2 and "epoch 2, update 1" in message and "BASE_LEARNING_RATE" in message
    assert "loss scale" in message and "USE_MIXED_PRECISION" not in message
    assert all(torch.isfinite(parameter).all() for parameter in tiny.network.parameters())


def test_fp16_skips_counts_and_stops_after_twenty_in_a_row_across_epochs(tiny, monkeypatch, capsys):
    data, flags = random_data(count=24), quick_flags(NUM_EPOCHS=9, BATCH_SIZE=4, GRADIENT_ACCUMULATION_STEPS=1)
    optimizer, scaler = at.make_optimizer(tiny, flags), at.make_scaler(CPU, torch.float16)  # three updates an epoch
    poison(monkeypatch, 9, 10**9)
    for epoch in range(9):
        if epoch == 3:
            before = copy.deepcopy(tiny.network.state_dict())
        tiny.epochs.append(at.train_epoch(tiny, data, epoch, optimizer, scaler, torch.float16, flags))
    assert [entry["skipped_updates"] for entry in tiny.epochs[3:]] == [3] * 6 and tiny.epochs[-1]["skipped_in_a_row"] == 18
    assert all(entry["train_loss"] == 0 for entry in tiny.epochs[3:])  # of the images whose loss was finite: none
    with pytest.raises(SystemExit) as stopped:
        at.train_epoch(tiny, data, 9 - 1, optimizer, scaler, torch.float16, flags)
    message = capsys.readouterr().err
    assert stopped.value.code == 2 and "update 2" in message and "20 times in a row" in message
    assert "USE_MIXED_PRECISION" in message
    assert all(torch.equal(tensor, before[name]) for name, tensor in tiny.network.state_dict().items())


def test_a_few_overflows_are_mended_by_loss_scaling(tiny, monkeypatch):
    data, flags = random_data(count=24), quick_flags(NUM_EPOCHS=4, BATCH_SIZE=4, GRADIENT_ACCUMULATION_STEPS=1)
    poison(monkeypatch, 0, 5)
    epochs = train(tiny, data, flags, 4, torch.float16)
    assert sum(entry["skipped_updates"] for entry in epochs) >= 5 and epochs[-1]["skipped_updates"] == 0
    assert epochs[-1]["loss_scale"] < at.make_scaler(CPU, torch.float16).get_scale()


def test_a_network_that_answers_nan_to_the_validation_images_stops(tiny, monkeypatch, capsys):
    monkeypatch.setattr(at, "validate", lambda *arguments: torch.full((10, 4), torch.nan))
    with pytest.raises(SystemExit):
        at.train_model(tiny, random_data(), None, quick_flags(NUM_EPOCHS=1))
    assert "validation loss is not finite" in capsys.readouterr().err
