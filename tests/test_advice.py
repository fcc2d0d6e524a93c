"""The report claims and advises only what was measured."""

import pytest
import torch
from conftest import random_data, run_of
from test_evidence import FINDINGS, healthy

import advanced_techniques as at


def found(finding: str, **flags) -> str:
    """What the diagnosis says where this goes wrong, with other flags; "" where it says nothing."""
    results = healthy()
    results["flags"] = at.FLAGS | flags
    FINDINGS[finding](results)
    return " ".join(at.diagnose(results))


def measured_speed(monkeypatch, micro_batch: int = 8, pretrained: bool = True, **flags) -> dict:
    monkeypatch.setattr(at, "measure_update", lambda *arguments: (50.0, None))
    run = run_of("test_resnet", pretrained, **flags)
    run.micro_batch = micro_batch
    run.epochs = [dict(stage=1, seconds=1.0, skipped_updates=0)]
    return at.measure_speed(run, random_data())


@pytest.mark.parametrize(
    "options", [dict(pretrained=False), dict(GRADUAL_UNFREEZING=False)], ids=["random", "off"]
)
def test_where_nothing_was_frozen_freezing_saved_nothing_and_nothing_is_said(monkeypatch, options):
    model = dict(name="a", stands_in_for=None, tta_accuracy=None, precision_why="",
                 epochs=[dict(skipped_updates=0)])
    speed = measured_speed(monkeypatch, **options)
    assert speed["freezing_saves"] is None and speed["images_per_second_all_layers"] == 50
    assert "freezing" not in " ".join(at.speed_lines(model, speed))
    frozen = measured_speed(monkeypatch)
    assert isinstance(frozen["freezing_saves"], float)
    frozen["freezing_saves"] = -0.1  # it cost time, as on another device after a resumption
    assert "freezing saved" not in " ".join(at.speed_lines(model, frozen))
    frozen["freezing_saves"] = 0.4
    assert "freezing saved" in " ".join(at.speed_lines(model, frozen))


def test_larger_micro_batches_are_not_tried_where_memory_ran_out(monkeypatch):
    assert measured_speed(monkeypatch, 8)["double_batch_images_per_second"] == 50
    assert measured_speed(monkeypatch, 4)["double_batch_images_per_second"] is None


def test_larger_micro_batches_are_advised_only_where_the_update_stays_the_same():
    finding = "don't fill the device"
    assert "--gradient-accumulation-steps 3" in found(finding, GRADIENT_ACCUMULATION_STEPS=6)
    assert found(finding, GRADIENT_ACCUMULATION_STEPS=1) == ""
    assert found(finding, GRADIENT_ACCUMULATION_STEPS=3) == ""


def test_memory_is_advised_only_where_images_lie_in_a_file(tmp_path):
    results = healthy()
    FINDINGS["waited for images"](results)
    assert "MEMORY_GB" not in at.diagnose(results)[0]
    results["dataset"]["memory_mapped"] = True
    assert "MEMORY_GB" in at.diagnose(results)[0]
    data = random_data()
    assert at.describe_dataset(data)["memory_mapped"] is False
    file = str(tmp_path / "images.bin")
    mapped = torch.from_file(file, shared=True, size=data.images.numel(), dtype=torch.uint8)
    data.images = mapped.view(data.images.shape)
    assert at.describe_dataset(data)["memory_mapped"] is True


def test_mixed_precision_that_saves_memory_is_of_use():
    results = healthy()
    results["speed"]["first"].update(fp32_images_per_second=99.0, mixed_peak_bytes=700,
                                     fp32_peak_bytes=1000)
    assert at.diagnose(results) == []
    results["speed"]["first"].update(mixed_peak_bytes=990)
    assert "brings nothing" in at.diagnose(results)[0]


def test_fewer_epochs_are_not_advised_where_accuracy_still_rose():
    results = healthy()
    for model in results["models"]:
        for entry in model["epochs"]:
            entry["validation_loss"] = 0.5 + 0.01 * entry["epoch"]
            entry["train_accuracy"] = 0.99
    (rising,) = at.diagnose(results)
    assert "would cost" in rising
    for model in results["models"]:
        for entry in model["epochs"]:
            entry["validation_accuracy"] = 0.8
    advice = [finding for finding in at.diagnose(results) if "overfits" in finding]
    assert "lower NUM_EPOCHS" in advice[0]


def test_mirroring_is_blamed_only_where_it_is_on():
    assert "HORIZONTAL_FLIP" in found("TTA hurts")
    assert "HORIZONTAL_FLIP" not in found("TTA hurts", HORIZONTAL_FLIP=False)


def test_an_ensemble_without_effect_is_to_be_left_off_not_to_be_changed_at_random():
    results = healthy()
    results["models"][1]["validation_accuracy"] = 0.9
    FINDINGS["ensemble does not clearly help"](results)
    (finding,) = at.diagnose(results)
    assert "USE_ENSEMBLE" in finding and "second alone" in finding
    assert "+0.0 (-1.0 to +1.0) points" in finding and "all of them get 40.0% wrong" in finding
    assert "--architectures" not in finding


def test_the_vote_is_judged_as_the_run_answers():
    results = healthy()
    results["ensemble"]["gain_interval"] = [-0.01, 0.01]  # without TTA
    assert at.diagnose(results) == []


def test_models_without_errors_share_none():
    results = healthy()
    FINDINGS["ensemble does not clearly help"](results)
    results["ensemble"]["shared_errors"] = None
    (finding,) = at.diagnose(results)
    assert "No model errs" in finding and "gets wrong" not in finding


@pytest.mark.parametrize(("rows", "wanted"), [(8, "0.4"), (6, "0.3")])
def test_one_line_below_the_ledger_says_what_chance_alone_would_give(rows, wanted):
    measured = dict(technique="one", why="", accuracy_on=0.5, accuracy_off=0.5, change=0.0,
                    interval=[0.0, 0.0], time_ratio=1.0, memory_ratio=None,
                    verdict="no clear effect")
    left_out = dict(technique="another", why="it is off in this run", verdict="not measured")
    results = healthy() | dict(ablation=[measured] * rows + [left_out])
    table = at.ablation_table(results)
    assert f"{wanted} verdicts" in table[-1] and f"{rows} rows" in table[-1]
    assert at.ablation_table(healthy() | dict(ablation=None)) == []
