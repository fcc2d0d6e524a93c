"""Whatever ends a run: one sentence, the right exit code, whole files, a folder that is free."""

import csv
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import SCRIPT, call, class_pictures, command, launch

import advanced_techniques as at


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    return class_pictures(tmp_path_factory.mktemp("images"), dict(cat=30, dog=30, owl=30))


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def small(pictures, out, tmp_path) -> list[str]:
    """The arguments of a run that takes two seconds."""
    return command(DATASET=pictures, OUTPUT_DIR=out, DATA_DIR=tmp_path / "data", NUM_EPOCHS=1,
                   ARCHITECTURES="test_resnet")


@pytest.fixture(scope="module")
def trained(pictures, tmp_path_factory) -> Path:
    """The folder of a finished run with those arguments, to be copied."""
    folder = tmp_path_factory.mktemp("trained")
    ended = call(command(DATASET=pictures, OUTPUT_DIR=folder, NUM_EPOCHS=1,
                         ARCHITECTURES="test_resnet"))
    assert ended.code == 0, ended
    return folder


# ---- What nobody foresaw ----


def test_an_unforeseen_error_is_a_sentence_and_its_traceback_a_file(small, out):
    (out / "checkpoints").mkdir(parents=True)
    torch.save(dict(run={}), out / "checkpoints" / "test_resnet.pt")  # what no run leaves there
    ended = launch([*small, "--resume", "true"])
    assert ended.code == 1 and "Traceback" not in ended.out + ended.err
    assert ended.err.startswith("advanced_techniques.py: An unexpected ")
    assert "KeyError" in ended.err and ended.err.count("\n") == 1
    assert f"Its traceback is in {out / 'error.txt'}" in ended.err
    assert "Traceback (most recent call last)" in (out / "error.txt").read_text()


def test_an_end_in_the_second_model_leaves_a_report_on_the_first(small, out):
    (out / "checkpoints" / "test_vit.pt").mkdir(parents=True)
    both = [*small, "--architectures", "test_resnet,test_vit"]
    ended = call(both)
    assert ended.code == 2 and str(out / "checkpoints" / "test_vit.pt") in ended.err
    assert "can't be written" in ended.err and "--resume true" in ended.err
    results = json.loads((out / "results.json").read_text())
    assert [model["name"] for model in results["models"]] == ["test_resnet"]
    report = (out / "report.txt").read_text()
    assert "PARTIAL REPORT on test_resnet" in report and report in ended.out
    picture = Path(small[small.index("--dataset") + 1], "cat", "000.png")
    assert call(["--predict", str(picture), "--output-dir", str(out)]).code == 0
    (out / "checkpoints" / "test_vit.pt").rmdir()
    assert call([*both, "--resume", "true"]).code == 0
    assert "PARTIAL" not in (out / "report.txt").read_text()


@pytest.mark.parametrize("name", ["results.json", "report.txt", "test_predictions.csv",
                                  "checkpoints", "learning_rates.png"])
@pytest.mark.parametrize("kind", ["folder", "file"])
def test_whatever_lies_in_the_way_main_returns_or_stops(name, kind, small, out, trained):
    shutil.copytree(trained, out)
    place = out / name
    shutil.rmtree(place) if place.is_dir() else place.unlink()
    if kind == "folder":
        place.mkdir()
    else:
        place.write_text("no such thing")
    ended = call([*small, "--resume", "true"])  # which lets nothing but a Stop out
    assert ended.code in (0, 1, 2) and "\n" not in ended.err
    assert ended.code == 0 or str(place) in ended.err


@pytest.mark.parametrize("place", ["file", "file/deeper", "/proc/no/such", "x" * 300])
def test_an_output_folder_that_can_not_be_written_is_refused(place, small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    ended = call([*small, "--output-dir", place])
    assert ended.code == 2 and f"OUTPUT_DIR = {place} can't be written" in ended.err
    assert "epoch" not in ended.out


# ---- A full disk ----


def test_a_full_disk_is_a_sentence_and_leaves_whole_files_only(small, out, trained):
    shutil.copytree(trained, out)
    file = out / "checkpoints" / "test_resnet.pt"
    before = file.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, hard))  # no file may grow beyond a megabyte
    try:
        ended = call(small)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert ended.code == 2 and "test_resnet.pt can't be written" in ended.err
    assert "Make room" in ended.err and "--output-dir" in ended.err
    assert file.read_bytes() == before and not list(out.rglob("*.tmp"))


def test_plots_that_can_not_be_drawn_cost_a_line_each(small, out, trained, monkeypatch):
    shutil.copytree(trained, out)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # as where it is broken
    ended = call([*small, "--resume", "true"])
    assert ended.code == 0, ended
    assert ended.out.count("could not be drawn") == len(list(trained.glob("[!v]*.png")))
    assert not list(out.glob("[!v]*.png")) and (out / "train_labels.csv").is_file()


def test_what_the_network_sees_is_drawn_before_training_starts(small, out, monkeypatch):
    def no_training(*_):
        raise at.Stop("no training")
    monkeypatch.setattr(at, "train_model", no_training)
    ended = call(small)
    assert ended.code == 2 and f"{out}/views.png" in ended.out
    assert [file.name for file in out.glob("*.png")] == ["views.png"]


# ---- Two runs in one folder ----


def test_a_folder_is_one_runs_until_it_ends_or_is_killed(small, out, tmp_path):
    log = (tmp_path / "log").open("w+")
    first = subprocess.Popen([sys.executable, SCRIPT, *small, "--num-epochs", "10000"],
                             stdout=log, stderr=log, env=os.environ | dict(PYTHONUNBUFFERED="1"))
    try:
        while "epoch   " not in (tmp_path / "log").read_text():
            assert first.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.05)
        second = call(small)
        assert second.code == 2 and f"OUTPUT_DIR = {out}: another run" in second.err
        assert "--output-dir" in second.err and "epoch" not in second.out
        assert first.poll() is None
    finally:
        first.kill()
        first.wait()
    assert call(small).code == 0
    assert call([*small, "--pretrained", str(tmp_path)]).code == 2  # which frees it too
    assert call([*small, "--resume", "true"]).code == 0


# ---- Names and terminals ----


def test_names_in_any_letters_and_none_survive_an_ascii_terminal(tmp_path):
    pictures = tmp_path / os.fsdecode("bílder 猫 ".encode() + b"\xe9")
    try:
        class_pictures(pictures, {"猫": 20, "chien été": 20, os.fsdecode(b"caf\xe9"): 20})
    except OSError:
        pytest.skip("this file system takes no such name")
    (pictures / "猫" / "000.png").rename(pictures / "猫" / os.fsdecode(b"\xff $x$.png"))
    out = tmp_path / "ergebnis ☕"
    arguments = command(DATASET=pictures, OUTPUT_DIR=out, ARCHITECTURES="test_resnet",
                        NUM_EPOCHS=1, EXPORT=True)
    ended = subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, check=False,
                           timeout=200, env=os.environ | dict(PYTHONIOENCODING="ascii"))
    assert ended.returncode == 0 and not ended.stderr, ended
    assert b"\\u732b" in ended.stdout and ended.stdout.isascii()
    results = json.loads((out / "results.json").read_text("utf-8"))
    classes = set(results["dataset"]["classes"])
    assert {"猫", "chien été"} < classes
    assert "猫" in (out / "report.txt").read_text("utf-8")
    assert len(list(out.glob("*.png"))) == 5 and (out / "ensemble.pt2").is_file()
    ended = call(["--predict", str(pictures), "--output-dir", str(out)])
    assert ended.code == 0 and "Accuracy: " in ended.out
    with (out / "predictions.csv").open(newline="", encoding="utf-8") as stream:
        assert {row["class_1"] for row in csv.DictReader(stream)} <= classes
