"""A finished run: what it writes and hands over; the same flags give the same again."""

import csv
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from conftest import (
    CPU,
    Finished,
    call,
    class_pictures,
    command,
    quick_flags,
    random_data,
    run_of,
)
from PIL import Image
from torch.nn import functional as F

import advanced_techniques as at

NAMES = ("test_resnet", "test_vit")


@pytest.fixture(scope="module")
def hard(tmp_path_factory) -> Finished:
    """Its models err: foxes look like cats, and five owls lie among the dogs."""
    root = tmp_path_factory.mktemp("hard")
    pictures = class_pictures(root / "pets", dict(cat=40, dog=40, owl=40, hen=40, fox=40))
    for file in sorted((pictures / "owl").iterdir())[:5]:
        file.rename(pictures / "dog" / f"planted_{file.name}")
    (pictures / "dog" / "notes.txt").write_text("no image")
    arguments = command(DATASET=pictures, OUTPUT_DIR=root / "outputs", ARCHITECTURES=NAMES)
    ended = call(arguments)
    assert ended.code == 0, ended
    return Finished(pictures, root / "outputs", arguments, ended.out)


def results_of(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text("utf-8"))


def checkpoint_of(folder: Path, name: str) -> dict:
    return torch.load(folder / "checkpoints" / f"{name}.pt", weights_only=True)


def rows_of(file: Path) -> list[dict[str, str]]:
    with file.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def test_results_hold_every_key_that_other_programs_read(finished):
    results = results_of(finished.outputs)
    assert results["flags"].keys() == at.FLAGS.keys() and results["flags"]["IMAGE_SIZE"] == 32
    for name in ("device", "device_name", "python", "torch", "torchvision", "timm"):
        assert isinstance(results["environment"][name], str)
    data = results["dataset"]
    assert (data["name"], data["classes"]) == ("pets", ["cat", "dog", "owl"])
    assert [data[f"{role}_images"] for role in ("train", "validation", "test")] == [103, 25, 32]
    assert [entry["name"] for entry in results["classes"]] == data["classes"]
    assert sum(entry["images"] for entry in results["classes"]) == data["test_images"]
    assert results["ablation"] is None
    assert results["speed"].keys() == {"test_resnet", "test_convnext"}
    assert results["diagnosis"] and all(isinstance(line, str) for line in results["diagnosis"])


def test_each_models_entry_is_whole(finished):
    results = results_of(finished.outputs)
    images = results["dataset"]["train_images"]
    for name, model in zip(("test_resnet", "test_convnext"), results["models"], strict=True):
        assert model["name"] == model["architecture"] == name
        assert (model["weights"], model["stands_in_for"]) == ("random weights", None)
        network = timm.create_model(name, num_classes=3)
        assert model["parameters"] == sum(one.numel() for one in network.parameters())
        low, high = model["test_interval"]
        assert 0 <= low <= model["test_accuracy"] <= high <= 1
        assert [entry["epoch"] for entry in model["epochs"]] == [1, 2, 3, 4]
        for entry in model["epochs"]:
            assert entry["stage"] == 1 and entry["trainable_parameters"] == model["parameters"]
            assert 0 <= entry["train_accuracy"] <= 1 and entry["train_loss"] > 0
        spent = sum(entry["seconds"] for entry in model["epochs"])
        assert model["seconds"] == pytest.approx(spent)
        assert model["images_per_second"] == pytest.approx(4 * images / spent)
        assert model["validation_accuracy"] == entry["validation_accuracy"]


def test_the_vote_is_the_mean_of_the_models_and_its_gain_is_over_the_best(hard):
    results = results_of(hard.outputs)
    vote = results["ensemble"]
    finished = [checkpoint_of(hard.outputs, name)["finished"] for name in NAMES]
    rows = rows_of(hard.outputs / "test_predictions.csv")
    averaged = torch.stack([one["averaged"] for one in finished]).mean(0)
    shares = sorted(f"{share:.4f}" for share in averaged.amax(1).tolist())
    assert shares == sorted(row["probability"] for row in rows)
    right = sum(row["true_class"] == row["predicted_class"] for row in rows)
    assert vote["tta_accuracy"] == pytest.approx(right / len(rows)) and right < len(rows)
    best = max(results["models"], key=lambda model: model["validation_accuracy"])
    assert vote["gain_over_best"] == pytest.approx(vote["accuracy"] - best["test_accuracy"])
    first, second = (one["plain"].argmax(1) for one in finished)
    assert vote["disagreement"] == pytest.approx((first != second).double().mean().item())
    assert sum(entry["errors"] for entry in results["classes"]) == len(rows) - right


def test_the_report_is_what_was_printed_and_names_what_answers(finished):
    report = (finished.outputs / "report.txt").read_text("utf-8")
    assert report.partition("\nHanding over")[0] in finished.printed
    for words in ("test_convnext: random weights", "ensemble of 2", "with TTA", "Diagnosis",
                  "103 training, 25 validation, 32 test"):
        assert words in report, words


def test_the_most_confidently_wrong_answers_stand_first(hard):
    rows = rows_of(hard.outputs / "test_predictions.csv")
    assert len(rows) == results_of(hard.outputs)["dataset"]["test_images"]
    sure = [float(row["probability"]) for row in rows]
    right = [row["true_class"] == row["predicted_class"] for row in rows]
    wrong = right.count(False)
    assert wrong > 4 and right == sorted(right)
    assert sure[:wrong] == sorted(sure[:wrong], reverse=True)
    assert sure[wrong:] == sorted(sure[wrong:])
    assert all(Path(row["image"]).parent.name == row["true_class"] for row in rows)


def test_wrong_labels_stand_first_among_the_training_images(hard):
    rows = rows_of(hard.outputs / "train_labels.csv")
    assert len(rows) == results_of(hard.outputs)["dataset"]["train_images"]
    beliefs = [float(row["belief"]) for row in rows]
    assert beliefs == sorted(beliefs) and beliefs[0] >= 0 and beliefs[-1] <= 1
    assert all(Path(row["image"]).parent.name == row["class"] for row in rows)
    planted = [place for place, row in enumerate(rows) if "planted" in row["image"]]
    assert planted and planted == list(range(len(planted)))


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext"])
def test_timm_loads_the_networks(name, finished):
    folder = finished.outputs / "models" / name
    network = timm.create_model(f"local-dir:{folder}", pretrained=True)
    saved = checkpoint_of(finished.outputs, name)
    torch.testing.assert_close(network.state_dict(), saved["state_dict"], rtol=0, atol=0)
    settings = network.pretrained_cfg
    assert settings["label_names"] == ["cat", "dog", "owl"] and settings["input_size"][1] == 32
    assert list(settings["mean"]) == pytest.approx(saved["mean"])
    assert (settings["crop_mode"], settings["crop_pct"]) == ("center", pytest.approx(32 / 37))


ALONE = """
import json, sys
sys.modules.update(dict.fromkeys(("timm", "torchvision", "PIL", "advanced_techniques")))
import torch
extra = {"classes.json": ""}
program = torch.export.load(sys.argv[1], extra_files=extra).module()
images = torch.load(sys.argv[2])
answers = {name: program(image[None])[0].tolist() for name, image in images.items()}
twice = program(torch.stack([images[sys.argv[3]]] * 2))
assert torch.allclose(twice[1], torch.tensor(answers[sys.argv[3]]), atol=1e-6)
print(json.dumps([json.loads(extra["classes.json"]), answers]))
"""


def test_the_program_answers_with_torch_alone_as_predict_does(finished, tmp_path):
    outputs = shutil.copytree(finished.outputs, tmp_path / "copy")
    folder = tmp_path / "new"
    folder.mkdir()
    pictures = sorted(finished.pictures.rglob("*.png"))[::30]
    sizes = [(37, 37), (40, 90), (131, 52), (20, 21), (300, 40)]
    images = {}
    for place, size in enumerate(sizes):
        target = str(folder / f"{place}.png")
        Image.open(pictures[place]).resize(size).save(target)
        images[target] = torch.from_numpy(np.array(Image.open(target))).permute(2, 0, 1)
    torch.save(images, tmp_path / "images.pt")
    assert call(["--predict", str(folder), "--output-dir", str(outputs)]).code == 0
    ended = subprocess.run(
        [sys.executable, "-c", ALONE, outputs / "ensemble.pt2", tmp_path / "images.pt", target],
        capture_output=True, text=True, timeout=200, check=False)
    assert ended.returncode == 0, ended.stderr[-2000:]
    classes, answers = json.loads(ended.stdout)
    rows = rows_of(outputs / "predictions.csv")
    assert classes == ["cat", "dog", "owl"] and len(rows) == len(sizes)
    for row in rows:
        shares = dict(zip(classes, answers[row["path"]], strict=True))
        assert max(shares, key=shares.get) == row["class_1"]
        assert shares[row["class_1"]] == pytest.approx(float(row["probability_1"]), abs=1e-3)
    export = results_of(outputs)["export"]
    assert export["images"] == export["same_class"] == 32 and export["largest_difference"] < 1e-3


def test_predict_answers_the_test_images_as_the_run_did(hard, tmp_path):
    outputs = shutil.copytree(hard.outputs, tmp_path / "copy")
    one = next(hard.pictures.rglob("*.png"))
    ended = call(["--predict", str(one), str(hard.pictures), "--output-dir", str(outputs)])
    assert ended.code == 0, ended
    rows = {row["path"]: row for row in rows_of(outputs / "predictions.csv")}
    for tested in rows_of(hard.outputs / "test_predictions.csv"):
        row = rows[tested["image"]]
        assert row["class_1"] == tested["predicted_class"]
        assert float(row["probability_1"]) == pytest.approx(float(tested["probability"]), abs=1e-3)
    right = sum(Path(path).parent.name == row["class_1"] for path, row in rows.items())
    assert f"Accuracy: {right / 200:.1%}" in ended.out and right < len(rows) == 200
    assert "201 images classified, 1 left out" in ended.out


def assert_predicted(tested: dict[str, str], outputs: Path) -> None:
    """--predict answers an image as the run did, though what was learned from may be gone."""
    line, = call(["--predict", tested["image"], "--output-dir", str(outputs),
                  "--dataset", "gone"]).out.splitlines()
    path, _, answer = line.rpartition(": ")
    name, share, *_ = answer.split(", ")
    assert (path, name) == (tested["image"], tested["predicted_class"])
    assert float(share) == pytest.approx(float(tested["probability"]), abs=1e-3)


def test_predict_answers_one_image_and_writes_nothing(hard):
    before = sorted(hard.outputs.rglob("*"))
    assert_predicted(rows_of(hard.outputs / "test_predictions.csv")[-1], hard.outputs)
    assert sorted(hard.outputs.rglob("*")) == before


RESULTS, CHECKPOINT = "results.json", "checkpoints/test_vit.pt"


@pytest.mark.parametrize(("name", "content", "named"), [
    (RESULTS, "none", "Train first"), (RESULTS, "half", "results.json can't be used"),
    (RESULTS, "[1]", "results.json can't"), (RESULTS, '{"models": []}', "results.json can't"),
    (RESULTS, "other", "of another run"), (CHECKPOINT, "half", "test_vit.pt can't be read"),
    (CHECKPOINT, "none", "test_vit.pt")])
def test_predict_refuses_what_is_no_finished_run(name, content, named, hard, finished, tmp_path):
    outputs = shutil.copytree(hard.outputs, tmp_path / "copy")
    before = (outputs / name).read_bytes()
    changes = dict(half=before[: len(before) // 2],
                   other=(finished.outputs / RESULTS).read_bytes())
    (outputs / name).write_bytes(changes.get(content, content.encode()))
    if content == "none":
        (outputs / name).unlink()
    ended = call(["--predict", str(next(hard.pictures.rglob("*.png"))),
                  "--output-dir", str(outputs)])
    assert ended.code == 2 and named in ended.err and str(outputs) in ended.err
    assert not ended.out and "--resume" not in ended.err


@pytest.mark.parametrize("target", ["empty", "text.png", "gone.png"])
def test_predict_of_nothing_is_a_sentence(target, hard, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.png").write_text("no image")
    ended = call(["--predict", str(tmp_path / target), "--output-dir", str(hard.outputs)])
    assert ended.code == 2 and "PREDICT" in ended.err and target in ended.err


def numbers(results):
    """Results without what clock, memory and place decide."""
    measured = ".*second.*|.*bytes|speed|OUTPUT_DIR|diagnosis"
    if isinstance(results, dict):
        return {key: numbers(value) for key, value in results.items()
                if not re.fullmatch(measured, key)}
    return [numbers(value) for value in results] if isinstance(results, list) else results


def test_the_same_flags_elsewhere_give_the_same_numbers_and_weights(hard, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.rand(7)
    arguments = [*hard.arguments, "--output-dir", "again/here"]
    assert call(arguments).code == 0
    again = tmp_path / "again" / "here"
    assert numbers(results_of(again)) == numbers(results_of(hard.outputs))
    for file in ("test_predictions.csv", "train_labels.csv"):
        assert (again / file).read_bytes() == (hard.outputs / file).read_bytes()
    for name in NAMES:
        first, second = (checkpoint_of(folder, name) for folder in (hard.outputs, again))
        torch.testing.assert_close(first["state_dict"], second["state_dict"], rtol=0, atol=0)


@pytest.mark.parametrize("best", [0, 1])
def test_without_the_vote_the_model_best_on_validation_answers(best, hard, tmp_path):
    outputs = shutil.copytree(hard.outputs, tmp_path / "copy")
    for place, name in enumerate(NAMES):
        saved = checkpoint_of(outputs, name)
        saved["finished"]["entry"]["validation_accuracy"] = 0.9 if place == best else 0.8
        torch.save(saved, outputs / "checkpoints" / f"{name}.pt")
    changes = ["--output-dir", str(outputs), "--resume", "true", "--use-ensemble", "false"]
    assert call([*hard.arguments, *changes]).code == 0
    vote = results_of(outputs)["ensemble"]
    assert vote["accuracy"] is vote["gain_over_best"] is vote["disagreement"] is None
    own = checkpoint_of(outputs, NAMES[best])["finished"]["averaged"].amax(1).tolist()
    rows = rows_of(outputs / "test_predictions.csv")
    assert sorted(row["probability"] for row in rows) == sorted(f"{share:.4f}" for share in own)
    assert_predicted(rows[0], outputs)


def test_one_model_without_views(hard, tmp_path):
    outputs = tmp_path / "outputs"
    assert call([*hard.arguments, "--output-dir", str(outputs), "--use-tta", "false",
                 "--architectures", "test_resnet"]).code == 0
    results, usual = results_of(outputs), results_of(hard.outputs)
    model, = results["models"]
    assert model["tta_accuracy"] is None and set(results["ensemble"].values()) == {None}
    assert model["test_accuracy"] == usual["models"][0]["test_accuracy"]
    assert "ensemble of" not in (outputs / "report.txt").read_text()
    rows = rows_of(outputs / "test_predictions.csv")
    assert_predicted(rows[0], outputs)


def test_balance_gives_classes_half_the_logarithm_of_their_share():
    data = random_data()
    data.labels[:20] = torch.tensor([0] * 10 + [1] * 5 + [2] * 4 + [3])
    prior = at.log_prior(data, quick_flags(BALANCE=True), CPU)
    wanted = [0.5 * np.log(share) for share in (0.5, 0.25, 0.2, 0.05)]
    assert prior.tolist() == pytest.approx(wanted)
    assert not at.log_prior(data, quick_flags(), CPU).any()
    run = run_of("test_convnext", LABEL_SMOOTHING=0.0)
    run.network.eval()
    run.prior = prior
    inputs, labels = torch.rand(6, 3, 32, 32), torch.tensor([0, 1, 2, 3, 0, 1])
    by_hand = F.cross_entropy(run.network(inputs) + prior, labels, reduction="sum").item()
    loss, *_ = at.apply_update(run, run.network, [(inputs, labels, True)], 6, [0.0] * 9)
    assert loss.item() == pytest.approx(by_hand, rel=1e-5)
