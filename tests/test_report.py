"""The report and its plots, from results.json alone; what the diagnosis says, and when it doesn't.

Once the report reads otherwise: at.write_results(RESULTS, EXAMPLE) writes the example anew.
"""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import matplotlib.figure
import numpy as np
import pytest
import torch
from conftest import CPU, quick_flags, random_data
from PIL import Image

import advanced_techniques as at

EXAMPLE = Path(__file__).parents[1] / "outputs" / "example"
RESULTS = json.loads((EXAMPLE / "results.json").read_text())


def test_the_report_follows_from_results_json(finished):
    for folder in (EXAMPLE, finished.outputs):
        results = json.loads((folder / "results.json").read_text())
        assert at.report_text(results) == (folder / "report.txt").read_text()
        assert at.diagnose(results) == results["diagnosis"]


def test_the_example_has_the_keys_and_the_plots_of_a_run(finished):
    run = json.loads((finished.outputs / "results.json").read_text())
    assert list(RESULTS) == list(run)
    for part in ("flags", "environment", "dataset", "ensemble", "over_classes", "export"):
        assert RESULTS[part].keys() == run[part].keys()
    for part in ("models", "classes"):
        assert RESULTS[part][0].keys() == run[part][0].keys()
    assert RESULTS["speed"]["resnet18"].keys() == run["speed"]["test_resnet"].keys()
    epochs = (results["models"][0]["epochs"][0] for results in (RESULTS, run))
    assert len({tuple(epoch) for epoch in epochs}) == 1
    plots = {file.name for file in finished.outputs.glob("*.png")}
    assert {file.name for file in EXAMPLE.glob("*.png")} == plots | {"ablation.png"}


def draw(plot, folder: Path, results=RESULTS) -> None:
    plot(at.Job(SimpleNamespace(**results["flags"] | dict(OUTPUT_DIR=str(folder)))), results, None)


def test_the_ledgers_plot_is_drawn_from_results_json(tmp_path):
    draw(at.plot_ablation, tmp_path)
    pixels = np.asarray(Image.open(tmp_path / "ablation.png").convert("L"))
    assert pixels.min() < 50 and pixels.max() == 255 and pixels.shape[1] > 500


@pytest.mark.parametrize("left", [
    dict(MPLBACKEND="module://matplotlib_inline.backend_inline", WORLD_SIZE="two", RANK="0"),
    dict(WORLD_SIZE="", RANK="", LOCAL_RANK="", MASTER_PORT=""), dict(RANK="1", LOCAL_RANK="1"),
    dict(WORLD_SIZE="4", RANK="3", MASTER_ADDR="node7", MASTER_PORT="1234")])
def test_what_notebooks_and_schedulers_leave_behind_harms_nothing(left, tmp_path):
    code = ("import advanced_techniques as at\n"
            "with at.plot('empty', 'Nothing', at.SimpleNamespace(OUTPUT_DIR='.')):\n    pass\n"
            "at.say(f'{at.PROCESSES} {at.RANK}')")
    environment = os.environ | dict(PYTHONPATH=str(EXAMPLE.parents[1])) | left
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=tmp_path,
                          capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("1 0\n", "") and (tmp_path / "empty.png").exists()


def test_no_ledger_needs_no_plot(tmp_path, capsys):
    draw(at.plot_ablation, tmp_path, RESULTS | dict(ablation=None))
    assert list(tmp_path.iterdir()) == [] and capsys.readouterr().out == ""


def test_class_names_of_any_kind_are_drawn(tmp_path, capsys):
    data = random_data(count=80)
    data.classes = ["$x", "$\\frac{1$", "猫\nb", "x" * 200]
    final = torch.rand(20, 4, generator=torch.Generator().manual_seed(0)).softmax(1)
    job = at.Job(quick_flags(OUTPUT_DIR=str(tmp_path)), CPU, data)
    for plot in (at.plot_confusion, at.plot_predictions):
        plot(job, RESULTS, final)
    assert len(list(tmp_path.glob("*.png"))) == 2 and capsys.readouterr().out == ""
    assert at.plot_name("x" * 200) == "x" * 13 + "…" + "x" * 8


def test_what_stood_in_is_named_in_every_table_and_plot(monkeypatch, tmp_path):
    texts = []

    def note(figure, stream, **options):
        texts.extend(text.get_text() for text in figure.findobj(matplotlib.text.Text))

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", note)
    draw(at.plot_curves, tmp_path)
    name = "EfficientNet-Lite0 for resnet18"
    assert name in texts
    for title in ("Accuracy", "Calibration", "Speed", "Ablation"):
        assert name in section(title)
    assert name in at.diagnose(changed(**OVERFIT))[0]
    assert at.shown_name(dict(name="resnet18", stands_in_for=None)) == "resnet18"


def test_a_tables_columns_are_as_wide_as_they_need():
    rows = [{"model": "a", "test": 0.5, "n": 12}, {"model": "long name", "test": None},
            {"model": "c", "n": 3, "more": "x"}]
    assert at.table(rows) == ["model       test   n  more",
                              "a          50.0%  12",
                              "long name      -",
                              "c                  3     x"]


def changed(**parts) -> dict:
    """The example's results with some parts changed in a copy; a dictionary adds to what is there.
    """
    results = copy.deepcopy(RESULTS)
    for name, part in parts.items():
        results[name] = results[name] | part if isinstance(part, dict) and part else part
    return results


def section(title: str, results: dict = RESULTS) -> str:
    """The report's lines below a title, as one; "" where there is no such title."""
    _, _, below = at.report_text(results).partition(f"\n\n{title}\n{'-' * len(title)}\n")
    return " ".join(below.partition("\n\n")[0].split())


def without_tta() -> dict:
    results = changed(flags=dict(USE_TTA=False))
    for model in results["models"]:
        for key in [key for key in model if key.startswith("tta_")]:
            del model[key]
        model |= dict(tta_accuracy=None, tta_seconds=5.0)
    return results


def class_entries(count: int) -> dict:
    names = [f"kind{label}" for label in range(count)]
    answers = torch.eye(count).roll(1, 0) if count > 1 else torch.ones(1, 1)
    classes = at.by_class(answers, torch.arange(count), names)
    return dict(classes=classes, over_classes=at.over_classes(classes))


NO_VOTE = dict(ensemble=dict.fromkeys(at.VOTE_FIGURES))


@pytest.mark.parametrize(("title", "results", "there", "gone"), [
    ("Notices", changed(notices=[]), "", "DATASET"),
    ("Notices", changed(notices=["One.", "Two."]), "One. Two.", "DATASET"),
    ("Accuracy", changed(), "ensemble of 3", "xx"),
    ("Accuracy", changed(**NO_VOTE), "TTA gains +0.3 (-0.8 to +1.3) points", "oting"),
    ("Accuracy", without_tta(), "Soft voting gains +2.9 (+1.7 to +4.1)", "TTA gains"),
    ("Classes", changed(**class_entries(1)), "kind0 1 100.0%", "more classes"),
    ("Classes", changed(**class_entries(30)), "And 10 more classes", "kind29"),
    ("Calibration", changed(), "ensemble of 3 0", "xx"),
    ("Calibration", changed(**NO_VOTE), "for resnet18 0", "ensemble"),
    ("Calibration", without_tta(), "for resnet18 0.519", "xx"),
    ("Calibration", changed(models=[RESULTS["models"][0] | dict(temperature=None)]), " - ", "0.80"),
    ("Speed", changed(), "for resnet18 128 67 67 0.39", "xx"),
    ("Speed", changed(), "for resnet18 5%, 80.8% 23%, +0.3 34%", "xx"),
    ("Speed", changed(speed={}), "stage 4", "saves "),
    ("Ablation", changed(), "4 mixed precision not measured", "xx"),
    ("Ablation", changed(), "mixed precision: not measured, not in use here. This CPU", "xx"),
    ("Ablation", changed(), "7 soft vote of 3 seeds 87.4% 85.9% +1.5 (+0.4 to +2.7) x2.60 -", "xx"),
    ("Ablation", changed(ablation=None), "", "techniques"),
    ("Diagnosis", changed(diagnosis=[]), "Nothing stands out.", "precision"),
    ("Handing over", changed(export=None), "", "pt2")])
def test_a_section_says_what_there_is_and_nothing_of_the_rest(title, results, there, gone):
    found = section(title, results)
    assert there in found and gone not in found and (there or not found)


def test_a_section_more_is_a_row_more(monkeypatch):
    monkeypatch.setitem(at.SECTIONS, "Weather", lambda results: [[{"sky": "blue"}], "It is fine."])
    assert section("Weather") == "sky blue It is fine."


def models(epochs=None, **figures) -> dict:
    """All models with other figures; epochs: figures of each of 20 epochs, of their numbers."""
    results = changed()
    for model in results["models"]:
        model |= figures
        for number, epoch in enumerate(model["epochs"]):
            epoch |= {key: first + step * number for key, (first, step) in (epochs or {}).items()}
    return dict(models=results["models"])


def sizes(many: int, few: int, balance: bool = False) -> dict:
    counts = [many, *[few] * 9]
    return dict(dataset=dict(train_images_by_class=counts), flags=dict(BALANCE=balance))


OVERFIT = models(dict(train_accuracy=(0.85, 0), validation_accuracy=(0.7, 0.001),
                      validation_loss=(0.5, 0.01)))
UNDERFIT = models(dict(train_accuracy=(0.3, 0.02), validation_accuracy=(0.3, 0.02)))
FEW = dict(dataset=dict(validation_images=20))
HURT = dict(tta_gain=-0.02, tta_gain_interval=[-0.03, -0.01])
FINDINGS = [  # what is said, of which results, and not of which others, which differ in a detail
    ("overfits", OVERFIT, OVERFIT | FEW),
    ("underfits", UNDERFIT, UNDERFIT | FEW),
    ("TTA hurts by -2.0", models(**HURT), models(**HURT | dict(tta_gain_interval=[-0.03, 0.01]))),
    ("ensemble does not clearly help", dict(ensemble=dict(tta_gain_interval=[-0.01, 0.01])),
     dict(ensemble=dict(gain_interval=[-0.01, 0.01]))),
    ("try --balance true", sizes(301, 100), sizes(300, 100)),
    ("try --balance true", sizes(301, 100), sizes(301, 100, balance=True)),
]


@pytest.mark.parametrize(("finding", "wrong", "nearly"), FINDINGS)
def test_each_finding_is_made_where_it_applies_and_not_otherwise(finding, wrong, nearly):
    (found,) = at.diagnose(changed(**wrong))
    assert finding in found
    assert at.diagnose(changed(**nearly)) == []


def test_updates_that_were_skipped_are_told():
    results = changed(**models(dict(skipped_updates=(1, 0))))
    results["diagnosis"] = at.diagnose(results)
    assert "20 updates had gradients that" in " ".join(at.report_text(results).split())
