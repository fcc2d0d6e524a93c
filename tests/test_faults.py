"""What goes wrong in training: memory that runs out, numbers that are not finite."""

import copy

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


def limit_memory(network, limit: int, error: Exception = OUT_OF_MEMORY[0]) -> list[int]:
    """Let memory run out for more images at once; returns the sizes that are tried."""
    tried, forward = [], network.forward

    def limited(images):
        tried.append(len(images))
        if len(images) > limit:
            raise error
        return forward(images)

    network.forward = limited
    return tried


def train(run: at.Run, data: at.Data, epochs: int = 1) -> at.Run:
    for epoch in range(epochs):
        run.epochs.append(at.train_epoch(run, data, epoch))
    return run


def assert_same_weights(left: at.Run, right: at.Run) -> None:
    own, other = (run.network.state_dict() for run in (left, right))
    torch.testing.assert_close(own, other, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("limit", "error"), [
    *((limit, OUT_OF_MEMORY[0]) for limit in (1, 3, 4, 7)),
    *((4, error) for error in OUT_OF_MEMORY[1:])])
def test_halving_the_micro_batch_gives_the_same_weights(limit, error, capsys):
    data = random_data(count=64)  # 32 images: two updates of two micro-batches of 8
    plain = train(tiny_run(NUM_EPOCHS=2), data, 2)
    short = tiny_run(NUM_EPOCHS=2)
    tried = limit_memory(short.network, limit, error)
    train(short, data, 2)
    assert short.micro_batch == {1: 1, 3: 2, 4: 4, 7: 4}[limit]
    assert f"micro-batches of {short.micro_batch} instead of" in capsys.readouterr().out
    assert sum(size for size in tried if size <= limit) == 64  # each image once an epoch
    assert_same_weights(short, plain)


@pytest.mark.parametrize("failing", [0, 1, 5, 8])
@pytest.mark.parametrize("backward", [False, True])
def test_memory_that_runs_out_anywhere_repeats_that_update_alone(failing, backward):
    data = random_data(count=64)  # 32 images: three updates of three micro-batches
    flags = dict(NUM_EPOCHS=1, BATCH_SIZE=4, GRADIENT_ACCUMULATION_STEPS=3)
    plain, short, calls = train(tiny_run(**flags), data), tiny_run(**flags), []

    def fail_once(*_):
        calls.append(1)
        if len(calls) == failing + 1:
            raise torch.OutOfMemoryError("injected")

    if backward:
        short.network.stem.weight.register_hook(fail_once)
    else:
        short.network.register_forward_pre_hook(fail_once)
    train(short, data)
    assert short.micro_batch == 2
    assert short.epochs[0]["train_loss"] == pytest.approx(plain.epochs[0]["train_loss"], abs=1e-6)
    assert_same_weights(short, plain)


def test_one_image_that_does_not_fit_stops_with_advice(tiny):
    limit_memory(tiny.network, 0)
    with pytest.raises(at.Stop, match=r"1 images? in a micro-batch.*IMAGE_SIZE.*--architectures"):
        train(tiny, random_data())


def test_memory_that_runs_out_in_the_step_stops_and_the_step_is_not_repeated(tiny):
    steps = []

    def no_room(*_):
        steps.append(1)
        raise torch.OutOfMemoryError("injected")

    tiny.optimizer.register_step_pre_hook(no_room)
    with pytest.raises(at.Stop, match=r"AdamW.*--architectures") as stopped:
        train(tiny, random_data())
    assert stopped.value.code == 2 and len(steps) == 1 and tiny.micro_batch == 8


def test_other_errors_are_not_taken_for_lack_of_memory(tiny):
    tried = limit_memory(tiny.network, 0, RuntimeError("shapes don't fit"))
    with pytest.raises(RuntimeError, match="shapes don't fit"):
        train(tiny, random_data())
    assert len(tried) == 1


def test_evaluation_halves_its_batches_too(tiny):
    data = random_data()
    views = at.tta_views(tiny.flags)
    wanted = at.predict(tiny, data, "test", views)
    tried = limit_memory(tiny.network, 3)
    torch.testing.assert_close(at.predict(tiny, data, "test", views), wanted)
    assert tiny.micro_batch == 2 and tried.count(8) == 1


def test_features_are_kept_in_smaller_parts_where_memory_runs_out():
    data, plain, short = random_data(), *(run_of("test_resnet", NUM_EPOCHS=20) for _ in range(2))
    train(plain, data)
    limit_memory(short.network, 4)
    train(short, data)
    assert short.micro_batch == 4
    torch.testing.assert_close(short.kept[0], plain.kept[0], rtol=1e-4, atol=1e-4)


def spoil(network, first: int, last: int = 10**9) -> None:
    """Let the training passes number first to last - 1 answer with what is no number."""
    passes = []

    def spoiled(module, inputs, answers):
        passes.append(1)
        return answers * torch.nan if first <= len(passes) - 1 < last else answers

    network.register_forward_hook(spoiled)


@pytest.mark.parametrize("precision", [None, torch.bfloat16])
def test_a_non_finite_update_outside_of_fp16_stops_and_is_not_applied(precision):
    tiny = tiny_run(NUM_EPOCHS=2, BATCH_SIZE=16, GRADIENT_ACCUMULATION_STEPS=1)
    in_precision(tiny, precision)
    data = random_data(count=96)  # three updates an epoch
    spoil(tiny.network, 3)
    train(tiny, data)
    before = copy.deepcopy(tiny.network.state_dict())
    advice = r"epoch 2, update 1: .*not finite, 1 times.*BASE_LEARNING_RATE"
    with pytest.raises(at.Stop, match=advice) as stopped:
        at.train_epoch(tiny, data, 1)
    assert stopped.value.code == 2
    torch.testing.assert_close(tiny.network.state_dict(), before, rtol=0, atol=0)


def short_updates(epochs: int) -> tuple[at.Run, at.Data]:
    """A run in FP16 with three updates of four images in an epoch, and its data."""
    tiny = tiny_run(NUM_EPOCHS=epochs, BATCH_SIZE=4, GRADIENT_ACCUMULATION_STEPS=1)
    return in_precision(tiny, torch.float16), random_data(count=24)


def test_fp16_skips_and_counts_and_stops_after_twenty_in_a_row_across_epochs():
    tiny, data = short_updates(9)
    spoil(tiny.network, 6)
    train(tiny, data, 8)
    assert [entry["skipped_updates"] for entry in tiny.epochs[2:]] == [3] * 6
    assert tiny.epochs[-1]["skipped_in_a_row"] == 18
    with pytest.raises(at.Stop, match=r"update 2: .*20 times in a row.*USE_MIXED_PRECISION"):
        at.train_epoch(tiny, data, 8)
    assert all(parameter.isfinite().all() for parameter in tiny.network.parameters())


def test_a_few_overflows_are_mended_by_loss_scaling():
    tiny, data = short_updates(6)
    before = tiny.scaler.get_scale()
    spoil(tiny.network, 0, 5)
    train(tiny, data, 6)
    assert sum(entry["skipped_updates"] for entry in tiny.epochs) >= 5
    assert tiny.epochs[-1]["skipped_updates"] == tiny.epochs[-1]["skipped_in_a_row"] == 0
    assert tiny.epochs[-1]["loss_scale"] < before


def test_a_network_that_answers_the_validation_images_with_no_number_stops(tiny):
    def lost(module, inputs, answers):
        return answers if module.training else answers * torch.nan

    tiny.network.register_forward_hook(lost)
    with pytest.raises(at.Stop, match=r"validation loss is not finite.*BASE_LEARNING_RATE"):
        at.train_model(tiny, random_data())
    assert not tiny.epochs
