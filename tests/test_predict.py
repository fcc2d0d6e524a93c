"""--predict: what was trained classifies images, by the vote that the run measured."""

import csv
import errno
import hashlib
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CPU, quick_flags, random_data, run_of
from PIL import Image
from test_data import make_folder

import advanced_techniques as at

NAMES = ("test_resnet", "test_vit")
CLASSES = ("cat", "dog", "owl")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Networks as small as these lose more than they gain by a second thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def training(folder: Path, output: Path) -> list[str]:
    """The command line that trains both models on a folder."""
    flags = dict(dataset=folder, architectures=",".join(NAMES), pretrained="none", image_size=32,
                 num_epochs=4, batch_size=16, gradient_accumulation_steps=1, output_dir=output,
                 data_dir=output.parent / "data")
    return [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run on a tiny folder: its OUTPUT_DIR, test images, and probabilities."""
    place = tmp_path_factory.mktemp("run")
    folder = make_folder(place / "pets", count=30)
    arguments = training(folder, place / "out")
    at.main(arguments)
    flags = at.small_profile(at.read_flags(arguments), CPU)
    source, _ = at.find_source(flags)
    chosen = at.split(source, flags.TRAIN_IMAGES, flags.TEST_IMAGES, flags.SEED)["test"]
    paths = [path for name in source.classes for path in sorted((folder / name).iterdir())]
    measured = [
        torch.load(place / "out" / "checkpoints" / f"{name}.pt")["finished"]["averaged"].numpy()
        for name in NAMES
    ]
    assert (
        np.abs(measured[0] - measured[1]).max() > 0.05
    )  # else a test could not tell one model from the vote
    return place / "out", [paths[index] for index in chosen], measured


@pytest.fixture
def run_folder(trained, tmp_path) -> Path:
    """A copy of the run's output folder, to be changed."""
    return Path(
        shutil.copytree(trained[0], tmp_path / "out", ignore=shutil.ignore_patterns("*.png"))
    )


def predict(target: Path, output: Path) -> None:
    at.main(
        [
            "--predict",
            str(target),
            "--output-dir",
            str(output),
            "--data-dir",
            str(output.parent / "data"),
        ]
    )


def refusal(capsys, target: Path, output: Path) -> str:
    with pytest.raises(SystemExit) as stopped:
        predict(target, output)
    captured = capsys.readouterr()
    assert stopped.value.code == 2 and "Traceback" not in captured.err and not captured.out
    assert captured.err.splitlines()[-1].startswith("advanced_techniques.py: ")
    return captured.err


def printed(line: str) -> tuple[str, dict[str, float]]:
    """The path, the classes and their probabilities of a line: "cat.png: cat 90.1%, dog 9.9%"."""
    path, _, answer = line.rpartition(": ")
    return path, {
        name: float(share) / 100 for name, share in re.findall(r"(\w+) ([\d.]+)%", answer)
    }


def contents(folder: Path) -> list[tuple]:
    return sorted(
        (
            str(path),
            path.lstat().st_mtime_ns,
            hashlib.md5(path.read_bytes()).hexdigest() if path.is_file() else "",
        )
        for path in (folder, *folder.rglob("*"))
    )


def rows(output: Path) -> dict[str, dict[str, float]]:
    """predictions.csv: for each path its classes with their probabilities, best first."""
    with (output / "predictions.csv").open(newline="") as stream:
        header, *lines = csv.reader(stream)
    assert header == [
        "path",
        *(f"{kind}_{place}" for place in (1, 2, 3) for kind in ("class", "probability")),
    ]
    assert len({line[0] for line in lines}) == len(lines)
    return {line[0]: dict(zip(line[1::2], map(float, line[2::2]), strict=True)) for line in lines}


def agrees(answer: dict[str, float], wanted: np.ndarray, tolerance: float = 0.002) -> bool:
    assert (
        list(answer) == [CLASSES[index] for index in np.argsort(-wanted)]
        or np.diff(np.sort(wanted)).min() < tolerance
    )
    return set(answer) == set(CLASSES) and all(
        abs(answer[name] - share) < tolerance for name, share in zip(CLASSES, wanted, strict=True)
    )


def choose(file: Path, labels: torch.Tensor, validation: float, right: int, sure: float) -> None:
    """Let a checkpoint say that its model is so good on validation, and right so often on test."""
    saved = torch.load(file)
    answer = torch.where(torch.arange(len(labels)) < right, labels, (labels + 1) % 3)
    shares = torch.full((len(labels), 3), (1 - sure) / 2).scatter(1, answer[:, None], sure)
    saved["finished"] |= dict(plain=shares, averaged=shares)
    accuracies = dict(validation_accuracy=validation, test_accuracy=right / len(labels))
    saved["finished"]["entry"] |= accuracies
    torch.save(saved, file)


@pytest.mark.parametrize("best", [0, 1])
@pytest.mark.parametrize("ensemble", [True, False])
def test_the_single_model_is_chosen_on_validation_and_never_on_test(
    ensemble, best, trained, run_folder
):
    """A report from models of which the better one on validation is the worse one on test."""
    folder, paths, _ = trained
    labels = torch.tensor([CLASSES.index(path.parent.name) for path in paths])
    checkpoints = run_folder / "checkpoints"
    choose(checkpoints / f"{NAMES[best]}.pt", labels, validation=0.9, right=6, sure=0.5)
    choose(checkpoints / f"{NAMES[1 - best]}.pt", labels, validation=0.8, right=9, sure=0.9)
    command = training(folder.parent / "pets", run_folder)
    data = str(folder.parent / "data")
    at.main([*command, f"--data-dir={data}", "--resume=true", f"--use-ensemble={ensemble}"])
    results = json.loads((run_folder / "results.json").read_text())
    wrong = sum(entry["errors"] for entry in results["classes"])  # of the final model
    assert len(labels) - wrong == (9 if ensemble else 6)  # the vote follows the surer one
    gain = results["ensemble"]["gain_over_best"]
    assert gain == pytest.approx(3 / len(labels)) if ensemble else gain is None


@pytest.mark.parametrize("which", [0, 7, -1])
def test_one_image_gets_the_soft_vote_that_the_run_measured(which, trained, run_folder, capsys):
    _, paths, measured = trained
    predict(paths[which], run_folder)
    (line,) = capsys.readouterr().out.splitlines()
    path, answer = printed(line)
    assert path == str(paths[which]) and agrees(
        answer, (measured[0][which] + measured[1][which]) / 2
    )
    assert not agrees(answer, measured[0][which]) and not (run_folder / "predictions.csv").exists()


def test_the_vote_by_hand_with_plain_timm_and_pillow(trained, run_folder, capsys):
    """The same again with nothing of the script: networks, views, softmax and mean written out."""
    _, paths, _ = trained
    predict(paths[3], run_folder)
    answer = printed(capsys.readouterr().out.strip())[1]
    votes = []
    for name in NAMES:
        saved = torch.load(run_folder / "checkpoints" / f"{name}.pt")
        network = at.timm.create_model(
            name, num_classes=3, **(dict(img_size=32) if name == "test_vit" else {})
        ).eval()
        network.load_state_dict(saved["state_dict"])
        settings = at.timm.get_pretrained_cfg(name)
        side = saved["stored_size"]
        image = at.ImageOps.fit(
            Image.open(paths[3]).convert("RGB"), (side, side), Image.Resampling.BILINEAR
        )
        pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None] / 255
        pixels = (pixels - torch.tensor(settings.mean)[:, None, None]) / torch.tensor(settings.std)[
            :, None, None
        ]
        for zoom in (1, 1.1):
            middle = (
                torch.linspace(-1, 1, 2 * 32 + 1)[1::2] * 32 / side / zoom
            )  # centres of the 32 pixels
            grid = torch.stack(torch.meshgrid(middle, middle, indexing="xy"), -1)[None]
            seen = torch.nn.functional.grid_sample(pixels, grid, align_corners=False)
            with torch.no_grad():
                votes += [network(seen).softmax(-1)[0], network(seen.flip(-1)).softmax(-1)[0]]
    assert len(votes) == 8 and agrees(answer, torch.stack(votes).mean(0).numpy(), 0.01)


def test_a_folder_gets_a_table_and_stays_as_it_was(trained, run_folder, tmp_path, capsys):
    _, paths, measured = trained
    folder = tmp_path / "new"
    (folder / "deeper").mkdir(parents=True)
    wanted = {}
    for number, path in enumerate(paths):
        target = folder / ("deeper" if number % 2 else "") / f"{number}, {path.name}"
        shutil.copy(path, target)
        wanted[str(target)] = (measured[0][number] + measured[1][number]) / 2
    for number in range(8):  # more than are shown
        Image.new("L", (50, 9), number * 30).save(folder / f"grey {number}.png")
    (folder / "notes.txt").write_text("no image")
    (folder / "deeper" / "empty.jpg").write_bytes(b"")
    (folder / ".hidden.png").write_bytes(paths[0].read_bytes())
    before = contents(folder)
    predict(folder, run_folder)
    captured = capsys.readouterr()
    table = rows(run_folder)
    assert set(table) == {*wanted, *(str(folder / f"grey {number}.png") for number in range(8))}
    assert all(agrees(table[path], shares) for path, shares in wanted.items())
    assert all(sum(answer.values()) == pytest.approx(1, abs=2e-4) for answer in table.values())
    assert all(
        list(answer.values()) == sorted(answer.values(), reverse=True) for answer in table.values()
    )
    assert contents(folder) == before
    for name in ("notes.txt", "deeper/empty.jpg"):
        assert sum(line.count(str(folder / name)) > 0 for line in captured.err.splitlines()) == 1
    *shown, last = captured.out.splitlines()
    assert len(shown) == 20 and f"{len(table)} images" in last and "2 left out" in last
    assert str(run_folder / "predictions.csv") in last
    for line in shown:
        path, answer = printed(line)
        assert answer == pytest.approx(table[path], abs=6e-4)


@pytest.mark.parametrize("best", [0, 1])
def test_without_the_ensemble_the_best_model_by_validation_answers_alone(
    best, trained, run_folder, capsys
):
    _, paths, measured = trained
    file = run_folder / "results.json"
    results = json.loads(file.read_text())
    results["flags"]["USE_ENSEMBLE"] = False
    for index, model in enumerate(results["models"]):
        model["validation_accuracy"], model["test_accuracy"] = (
            0.5 + 0.1 * (index == best),
            0.9 - 0.1 * (index == best),
        )
    file.write_text(json.dumps(results))
    predict(paths[0], run_folder)
    answer = printed(capsys.readouterr().out.strip())[1]
    assert agrees(answer, measured[best][0]) and not agrees(answer, measured[1 - best][0])


@pytest.mark.parametrize("ensemble", [True, False])
def test_a_model_that_was_interrupted_does_not_vote(ensemble, trained, run_folder, capsys):
    _, paths, measured = trained
    file = run_folder / "results.json"
    results = json.loads(file.read_text())
    results["flags"]["USE_ENSEMBLE"] = ensemble
    results["models"][1] |= dict(
        test_accuracy=None, test_loss=None, tta_accuracy=None, validation_accuracy=1.0
    )
    file.write_text(json.dumps(results))
    predict(paths[0], run_folder)
    assert agrees(printed(capsys.readouterr().out.strip())[1], measured[0][0])
    results["models"][0]["test_accuracy"] = None
    file.write_text(json.dumps(results))
    assert "interrupted" in refusal(capsys, paths[0], run_folder)


def test_without_views_only_the_plain_one_votes(trained, run_folder, capsys):
    _, paths, _ = trained
    file = run_folder / "results.json"
    results = json.loads(file.read_text())
    results["flags"]["USE_TTA"] = False
    file.write_text(json.dumps(results))
    predict(paths[0], run_folder)
    plain = [
        torch.load(run_folder / "checkpoints" / f"{name}.pt")["finished"]["plain"][0].numpy()
        for name in NAMES
    ]
    assert agrees(printed(capsys.readouterr().out.strip())[1], (plain[0] + plain[1]) / 2)


def test_nothing_trained_yet(trained, tmp_path, capsys):
    message = refusal(capsys, trained[1][0], tmp_path / "nowhere")
    assert (
        "PREDICT" in message
        and "Train first" in message
        and "results.json" in message
        and "--output-dir" in message
    )
    assert not (tmp_path / "nowhere").exists()  # a misspelt folder is not made


def test_a_name_that_is_not_utf8_is_classified_like_any_other(
    trained, run_folder, tmp_path, capsys
):
    (tmp_path / "new").mkdir()
    try:
        shutil.copy(trained[1][0], tmp_path / "new" / os.fsdecode(b"caf\xe9.png"))
    except OSError:
        pytest.skip("this file system takes no such name")
    shutil.copy(trained[1][0], tmp_path / "new" / "ordinary ☕.png")
    predict(tmp_path / "new", run_folder)
    assert "2 images" in capsys.readouterr().out
    first, second = rows(run_folder).values()
    assert first == second


def test_models_of_an_older_version_answer_with_a_word_of_warning(
    trained, run_folder, capsys, monkeypatch
):
    predict(trained[1][0], run_folder)
    assert "older version" not in capsys.readouterr().err
    monkeypatch.setattr(at, "RECIPE", at.RECIPE + 1)
    predict(trained[1][0], run_folder)
    assert "PREDICT: an older version" in capsys.readouterr().err


def test_nothing_to_classify(trained, run_folder, tmp_path, capsys):
    (tmp_path / "none").mkdir()
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "text.jpg").write_text("no image")
    for name in ("none", "text.png", "bad"):
        message = refusal(capsys, tmp_path / name, run_folder)
        assert "PREDICT" in message and str(tmp_path / name) in message
    assert not (run_folder / "predictions.csv").exists()


RESULTS = [
    "",
    "{",
    "[]",
    "null",
    "7",
    '"text"',
    "{}",
    '{"models": 3}',
    '{"models": null, "flags": {}}',
    '{"models": [{}]}',
    '{"models": [], "flags": {}}',
    '{"models": ["resnet18"], "flags": {"USE_ENSEMBLE": true}}',
    '{"models": [{"name": "test_vit", "test_accuracy": 1}], "flags": []}',
    '{"models": [{"name": 5, "test_accuracy": 1}], "flags": {"USE_ENSEMBLE": true}}',
    '{"models": [{"name": "other", "test_accuracy": 1}], "flags": {"USE_ENSEMBLE": true}}',
]


@pytest.mark.parametrize("content", [*RESULTS, b"\xff\xfe\0", "half", "folder"])
def test_damaged_results_are_a_plain_message(content, trained, run_folder, capsys):
    file = run_folder / "results.json"
    whole = file.read_bytes()
    file.unlink()
    if content == "folder":
        file.mkdir()
    else:
        file.write_bytes(
            whole[: len(whole) // 2]
            if content == "half"
            else content
            if isinstance(content, bytes)
            else content.encode()
        )
    message = refusal(capsys, trained[1][0], run_folder)
    assert "PREDICT" in message and str(run_folder) in message


def damaged_checkpoint(kind: str, file: Path) -> None:
    content = file.read_bytes()
    saved = torch.load(file)
    file.unlink()
    if kind in ("empty", "text", "half", "start", "zeros"):
        file.write_bytes(
            {
                "empty": b"",
                "text": b"not a checkpoint",
                "half": content[: len(content) // 2],
                "start": b"\0" * 100 + content[100:],
                "zeros": b"\0" * len(content),
            }[kind]
        )
    elif kind == "folder":
        file.mkdir()
    elif kind != "gone":
        state = saved["state_dict"]
        changes = dict(
            no_dictionary=[1, 2],
            nothing={},
            weights_only=state,
            other_model=saved | dict(architecture=NAMES[file.stem == NAMES[0]]),
            unknown_model=saved | dict(architecture="no_such_model"),
            fewer_classes=saved | dict(classes=["cat", "dog"]),
            other_classes=saved | dict(classes=["oak", "elm", "ash"]),
            lost_layer=saved | dict(state_dict=dict(list(state.items())[:-1])),
            no_weights=saved | dict(state_dict={}),
            no_size={key: value for key, value in saved.items() if key != "stored_size"},
        )
        torch.save(changes[kind], file)


@pytest.mark.parametrize(
    "kind",
    [
        "gone",
        "empty",
        "text",
        "half",
        "start",
        "zeros",
        "folder",
        "no_dictionary",
        "nothing",
        "weights_only",
        "other_model",
        "unknown_model",
        "fewer_classes",
        "other_classes",
        "lost_layer",
        "no_weights",
        "no_size",
    ],
)
@pytest.mark.parametrize("name", NAMES)
def test_a_damaged_checkpoint_is_a_plain_message(kind, name, trained, run_folder, capsys):
    damaged_checkpoint(kind, run_folder / "checkpoints" / f"{name}.pt")
    message = refusal(capsys, trained[1][0], run_folder)
    assert "PREDICT" in message and str(run_folder) in message


def test_models_of_another_run_do_not_answer_under_this_runs_name(
    trained, run_folder, tmp_path, capsys
):
    """A second run there that was killed early: results.json is still the first run's."""
    file = run_folder / "checkpoints" / f"{NAMES[0]}.pt"
    saved = torch.load(file)
    del saved["finished"]
    saved["epochs"] = saved["epochs"][:1]
    torch.save(saved, file)
    message = refusal(capsys, trained[1][0], run_folder)
    assert "PREDICT" in message and str(run_folder) in message


def test_the_folder_that_was_learned_from_may_be_gone(trained, tmp_path, capsys):
    output, paths, _ = trained
    at.main([f"--predict={paths[0]}", f"--output-dir={output}", f"--dataset={tmp_path / 'gone'}",
             f"--pretrained={tmp_path / 'gone'}"])
    assert str(paths[0]) in capsys.readouterr().out


def test_models_in_a_folder_that_may_only_be_read_answer_into_the_current_one(
        trained, tmp_path, monkeypatch, capsys):
    output, paths, _ = trained
    before = sorted(output.iterdir())
    monkeypatch.chdir(tmp_path)
    open_file = Path.open

    def read_only(file, mode="r", *options, **named):
        if file.parent == output and "w" in mode:
            raise OSError(errno.EROFS, "Read-only file system")
        return open_file(file, mode, *options, **named)

    monkeypatch.setattr(Path, "open", read_only)
    at.main([f"--predict={paths[0].parents[1]}", f"--output-dir={output}"])
    assert (tmp_path / "predictions.csv").is_file() and sorted(output.iterdir()) == before
    said = capsys.readouterr().out
    assert "can't be written (Read-only file system)" in said and "Accuracy: " in said


def test_answers_that_nowhere_can_be_written_stop_with_a_message_of_their_own(
        tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    output = tmp_path / "output"
    (output / "predictions.csv").mkdir(parents=True)  # whatever holds the name
    rows = [("a.png", [("cat", 0.75), ("dog", 0.25)])]
    at.write_answers(rows, 0, quick_flags(OUTPUT_DIR=str(output)))
    assert "a.png,cat,0.7500,dog,0.2500" in (tmp_path / "predictions.csv").read_text()
    (tmp_path / "predictions.csv").unlink()
    (tmp_path / "predictions.csv").mkdir()
    with pytest.raises(SystemExit):
        at.write_answers(rows, 0, quick_flags(OUTPUT_DIR=str(output)))
    message = capsys.readouterr().err
    assert "PREDICT" in message and "--resume" not in message
    assert not list(tmp_path.glob("**/*.tmp"))


def test_pictures_to_classify_are_decoded_apart_from_those_of_a_training(
        trained, tmp_path, monkeypatch):
    output, paths, _ = trained
    seen = []
    decoded_file = at.decoded_file
    monkeypatch.setattr(at, "decoded_file", lambda flags: seen.append(flags) or decoded_file(flags))
    at.main([f"--predict={paths[0]}", f"--output-dir={output}", "--memory-gb=0",
             f"--data-dir={tmp_path}"])
    assert seen and all(str(paths[0]) == flags.PREDICT for flags in seen)


def test_models_see_pictures_as_they_were_trained_to():
    run, data = run_of("test_resnet"), random_data()
    saved = at.checkpoint(run, data)
    saved["mean"], saved["std"] = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]  # of another version of timm
    stored = at.stored_run("test_resnet", saved, run.flags, CPU)
    assert stored.mean.tolist() == pytest.approx([0.1, 0.2, 0.3])
    assert stored.std.tolist() == pytest.approx([0.4, 0.5, 0.6])
    assert at.checkpoint(stored, data)["mean"] == stored.mean.tolist()
    del saved["mean"], saved["std"]  # an older file
    assert torch.equal(at.stored_run("test_resnet", saved, run.flags, CPU).mean, run.mean)
