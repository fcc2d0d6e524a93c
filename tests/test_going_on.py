"""Going on from a checkpoint elsewhere: other paths, another device, nothing there, forgotten."""

import pytest
import torch
from conftest import in_precision, random_data, run_of

import advanced_techniques as at


def saved_run(tmp_path, precision=None, **changes):
    """A run with one epoch of two in its checkpoint."""
    run = run_of("test_resnet", NUM_EPOCHS=2, OUTPUT_DIR=str(tmp_path), RESUME=True,
                 ARCHITECTURES=("test_resnet",), **changes)
    in_precision(run, precision)
    run.epochs = [dict(epoch=1, seconds=1.0)]
    at.save_checkpoint(run, random_data())
    return run


@pytest.mark.parametrize(("flag", "before", "after"), [
    ("DATASET", "pets", "elsewhere/pets"), ("DATASET", "pets", "pets/"),
    ("PRETRAINED", "weights", "weights/")])
def test_the_checksum_of_the_images_decides_and_not_where_they_lie(flag, before, after, tmp_path):
    run = saved_run(tmp_path, **{flag: before})
    setattr(run.flags, flag, after)
    assert at.read_checkpoint(run, random_data())["epochs"]


@pytest.mark.parametrize("without", [dict(FEATURE_VIEWS=0), dict(GRADUAL_UNFREEZING=False), {}])
def test_memory_may_change_unless_it_decides_which_views_are_learned_from(
        without, tmp_path, capsys):
    run = saved_run(tmp_path, MEMORY_GB=4.0, **without)
    run.flags.MEMORY_GB = 1e-9
    if without:
        assert at.read_checkpoint(run, random_data())["epochs"]
        return
    with pytest.raises(SystemExit):
        at.read_checkpoint(run, random_data())
    message = capsys.readouterr().err
    assert "MEMORY_GB was 4.0 and is 1e-09" in message and "delete the file" in message


def test_classes_of_other_names_are_refused(tmp_path, capsys):
    run, data = saved_run(tmp_path), random_data()
    data.classes = ["other", *data.classes[1:]]
    with pytest.raises(SystemExit):
        at.read_checkpoint(run, data)
    assert "class names" in capsys.readouterr().err


@pytest.mark.parametrize("before", [torch.float16, torch.bfloat16, None])
@pytest.mark.parametrize("after", [torch.float16, torch.bfloat16, None])
def test_a_loss_scale_is_taken_over_for_the_same_precision_alone(before, after, tmp_path):
    saved_run(tmp_path, before)
    run = run_of("test_resnet", NUM_EPOCHS=2, OUTPUT_DIR=str(tmp_path), RESUME=True)
    in_precision(run, after)
    at.resume(run, random_data())
    assert len(run.epochs) == 1
    assert run.scaler.get_scale() == (2.0**16 if after == torch.float16 else 1.0)


def test_nothing_to_go_on_from_is_said(tmp_path, capsys):
    run = run_of("test_resnet", OUTPUT_DIR=str(tmp_path), RESUME=True)
    assert at.resume(run, random_data()) is None
    assert "test_resnet.pt is not there; test_resnet starts" in capsys.readouterr().out


def test_a_forgotten_resume_is_said_before_the_checkpoint_is_overwritten(tmp_path, capsys):
    run = saved_run(tmp_path)
    run.flags.RESUME = False
    assert at.resume(run, random_data()) is None
    message = capsys.readouterr().out
    assert "overwritten" in message and "--resume true" in message
