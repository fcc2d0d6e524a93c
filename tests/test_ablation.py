"""The ledger: what each technique is worth, against the same training without it."""

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from conftest import call, class_pictures, command, quick_flags
from safetensors.torch import save_file

import advanced_techniques as at


@pytest.fixture(scope="module")
def ablated(tmp_path_factory) -> SimpleNamespace:
    """One tiny ablation, interrupted in the middle and gone on with."""
    root = tmp_path_factory.mktemp("ablated")
    torch.manual_seed(0)
    save_file(timm.create_model("test_resnet").state_dict(), root / "test_resnet.safetensors")
    pictures = class_pictures(root / "pets", dict(cat=24, dog=24, owl=20))
    arguments = command(DATASET=pictures, OUTPUT_DIR=root / "out", PRETRAINED=root, ABLATION=True,
                        ARCHITECTURES="test_resnet", ABLATION_SEEDS=2, NUM_EPOCHS=4)
    assert call(arguments).code == 0
    checkpoints = root / "out" / "checkpoints"
    before = {file.name: file.stat().st_mtime_ns for file in checkpoints.iterdir()}
    lost = next(checkpoints.glob("ablation_without_3_cosine_annealing_rate_x*_2.pt"))
    lost.unlink()
    ended = call([*arguments, "--resume", "true"])
    assert ended.code == 0
    again = [file.name for file in checkpoints.iterdir()
             if file.stat().st_mtime_ns != before.get(file.name)]
    results = json.loads((root / "out" / "results.json").read_text())
    return SimpleNamespace(rows=results["ablation"], again=again, lost=lost.name,
                           printed=ended.out, names=set(before))


def test_rows_come_in_the_order_of_the_techniques(ablated):
    names = [row["technique"] for row in ablated.rows]
    assert re.fullmatch(r"\.\.\. all layers, equal time: [1-4] epochs", names.pop(1))
    numbered = [f"{number} {name}" for name, (number, _) in at.TECHNIQUES.items()]
    assert names == [numbered[0], "... the head alone", *numbered[1:], "all of these together",
                     "7 soft vote of 2 seeds"]
    assert all(f"\n{name}" in ablated.printed for name in names)


def test_what_is_not_in_use_is_not_measured_and_says_why(ablated):
    row = next(row for row in ablated.rows if row["technique"] == "4 mixed precision")
    assert row["verdict"] == "not measured" and row["why"] == "it is off in this run"
    assert "mixed precision: not measured, it is off in this run" in ablated.printed


def test_verdicts_follow_from_intervals_and_costs_are_ratios(ablated):
    for row in ablated.rows:
        if row["why"]:
            continue
        low, high = row["interval"]
        wanted = "helps" if low > 0 else "hurts" if high < 0 else "no clear effect"
        assert row["verdict"] == wanted and row["time_ratio"] > 0
    by_name = {row["technique"]: row for row in ablated.rows}
    assert by_name["5 gradient accumulation"]["memory_ratio"] < 1
    assert by_name["3 cosine annealing"]["memory_ratio"] == pytest.approx(1, abs=0.01)
    assert by_name["7 soft vote of 2 seeds"]["memory_ratio"] is None
    assert by_name["7 soft vote of 2 seeds"]["time_ratio"] > 1.2


def test_an_interrupted_ablation_repeats_nothing_that_was_trained(ablated):
    assert ablated.again == [ablated.lost]
    assert "ablation_everything_2.pt" in ablated.names
    assert "ablation_everything_1.pt" not in ablated.names  # the lesson has trained it already


@pytest.mark.parametrize(("validation", "best"), [
    ({2e-3: 0.9, 4e-3: 0.8, 8e-3: 0.7}, 0.5), ({2e-3: 0.8, 4e-3: 0.8, 8e-3: 0.8}, 1),
    ({2e-3: 0.7, 4e-3: 0.8, 8e-3: 0.9}, 2)])
def test_the_rate_without_a_technique_is_chosen_on_validation_images(
        validation, best, monkeypatch):
    def train(job, variant, off, seed):
        rate = off["BASE_LEARNING_RATE"]
        reached = validation[rate]
        return at.Tested(None, None, dict(seed=seed, rate=rate, validation_accuracy=reached,
                                          test_accuracy=1 - reached))

    monkeypatch.setattr(at, "train_variant", train)
    tested, taken = at.train_without(at.Job(quick_flags(ABLATION_SEEDS=3)), "x", {})
    assert taken == best and [one.entry["seed"] for one in tested] == [0, 1, 2]
    assert {one.entry["rate"] for one in tested} == {4e-3 * best}


def test_a_row_by_hand():
    labels = torch.tensor([0, 0, 1, 1, 1])
    right = torch.eye(2)[labels]
    one_wrong = right.clone()
    one_wrong[0] = torch.tensor([0.0, 1.0])
    on = [dict(final=right, time=3.0, memory=10), dict(final=one_wrong, time=5.0, memory=10)]
    off = [dict(final=one_wrong, time=2.0, memory=20), dict(final=one_wrong, time=2.0, memory=20)]
    job = at.Job(data=at.Data("", ["a", "b"], torch.zeros(5), labels, dict(test=torch.arange(5))))
    row = at.ledger_row("x", on, off, job)
    assert row["accuracy_on"] == pytest.approx(0.9) and row["accuracy_off"] == pytest.approx(0.8)
    assert row["change"] == pytest.approx(0.1)
    assert (row["time_ratio"], row["memory_ratio"]) == (2.0, 0.5)
    differences = np.zeros((2, 5))
    differences[0, 0] = 1
    assert (row["change"], row["interval"]) == at.crossed_interval(differences)
