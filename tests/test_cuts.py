"""How an epoch is dealt into updates and these into micro-batches: evenly, and no image alone."""

import pytest
import torch
from conftest import random_data, run_of, tiny_run

import advanced_techniques as at


@pytest.mark.parametrize("most", [2, 3, 4, 7, 32])
@pytest.mark.parametrize("shares", [1, 2, 3])
def test_no_share_of_a_part_is_a_single_image(most, shares):
    for images in range(2 * shares, 200):
        if most < 2 * shares:
            continue
        parts = torch.arange(images).tensor_split(at.even_parts(images, most, shares))
        sizes = [len(share) for part in parts for share in part.tensor_split(shares)]
        assert min(sizes) >= 2 and max(sizes) - min(sizes) <= 2
        assert max(map(len, parts)) < most + 2 * shares
        if images % most == 0:
            assert [len(part) for part in parts] == [most] * (images // most)


def test_a_limit_of_one_image_is_kept():
    assert at.even_parts(7, 1) == 7


def test_an_update_of_seven_in_twos_leaves_no_image_alone_and_batch_norm_trains():
    run = run_of("resnet18", pretrained=False, BATCH_SIZE=2, GRADIENT_ACCUMULATION_STEPS=4)
    data = random_data(count=14)  # seven to train on, of 32 pixels a side: one value a channel
    part, = at.deal_out(run, data, 0)
    sizes = [len(labels) for _, labels, _ in at.micro_batches(run, data, part)]
    assert sorted(sizes) == [2, 2, 3]
    assert at.train_epoch(run, data, 0)["train_loss"] > 0


def test_no_update_is_left_with_a_single_image():
    run = run_of("resnet18", pretrained=False, BATCH_SIZE=2, GRADIENT_ACCUMULATION_STEPS=1)
    data = random_data(count=14)
    assert [part.images for part in at.deal_out(run, data, 0)] == [3, 2, 2]
    assert at.updates_an_epoch(data, run.flags) == 3
    assert at.train_epoch(run, data, 0)["train_loss"] > 0


def test_sizes_that_divide_evenly_are_cut_as_ever():
    run, data = tiny_run(), random_data(count=64)
    parts = at.deal_out(run, data, 0)
    assert [part.images for part in parts] == [16, 16]
    sizes = [len(labels) for _, labels, _ in at.micro_batches(run, data, parts[0])]
    assert sizes == [8, 8]


def test_memory_that_runs_out_down_to_one_image_stops_in_a_sentence(monkeypatch, capsys):
    run = run_of("resnet18", pretrained=False)
    forward = run.network.forward

    def limited(images):
        if len(images) > 1:
            raise torch.OutOfMemoryError("injected")
        return forward(images)

    monkeypatch.setattr(run.network, "forward", limited)
    with pytest.raises(SystemExit) as stopped:
        at.train_epoch(run, random_data(), 0)
    message = capsys.readouterr().err
    assert stopped.value.code == 2 and "resnet18" in message and "BatchNorm" in message
    assert "single image" in message and "--architectures" in message


def test_micro_batches_of_one_image_are_refused_by_batch_size(capsys):
    run = run_of("resnet18", pretrained=False, BATCH_SIZE=1)
    with pytest.raises(SystemExit):
        at.train_epoch(run, random_data(), 0)
    assert "raise BATCH_SIZE = 1 to 2 or more" in capsys.readouterr().err


def test_other_wrong_values_are_not_taken_for_a_single_image():
    def wrong():
        raise ValueError("another one")

    with pytest.raises(ValueError, match="another one"):
        at.within_memory(wrong, tiny_run())
