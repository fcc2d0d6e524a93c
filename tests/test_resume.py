"""Interruption: a run killed at any moment ends in the same numbers; Ctrl-C ends it cleanly."""

import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import (
    SCRIPT,
    call,
    class_pictures,
    command,
    in_precision,
    random_data,
    run_of,
)

import advanced_techniques as at

NAMES = ("test_resnet", "test_convnext")


def work(arguments: list[str], output: Path) -> None:
    """main() in a forked process, as a terminal would show it."""
    stream = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(stream, 1)
    os.dup2(stream, 2)
    try:
        at.main(arguments)
    except at.Stop as stopped:
        print(stopped, flush=True)
        sys.exit(stopped.code)


@pytest.fixture(scope="module")
def server():
    """A process that has imported the script, which takes seconds, and forks runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("PYTHONPATH", str(SCRIPT.parent))
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["advanced_techniques"])
        yield context


@pytest.fixture(scope="module")
def arguments(tmp_path_factory) -> list[str]:
    """Two models that count as pretrained, so that they are unfrozen stage by stage."""
    root = tmp_path_factory.mktemp("shared")
    for name in NAMES:
        torch.save(at.timm.create_model(name).state_dict(), root / f"{name}.pth")
    pictures = class_pictures(root / "pets", dict(cat=30, dog=30, owl=30, hen=30, fox=30))
    return command(DATASET=pictures, ARCHITECTURES=NAMES, PRETRAINED=root, NUM_EPOCHS=4)


@pytest.fixture(scope="module")
def begin(server, arguments):
    """begin(folder, resume) starts a run, whose lines go to folder/said.txt."""
    started = []

    def run(folder: Path, resume: bool = False):
        folder.mkdir(exist_ok=True)
        own = [*arguments, "--output-dir", str(folder), "--resume", str(resume)]
        (folder / "said.txt").write_text("")
        started.append(server.Process(target=work, args=(own, folder / "said.txt")))
        started[-1].start()
        return started[-1]

    yield run
    for process in started:
        process.kill()


@pytest.fixture(scope="module")
def whole(begin, tmp_path_factory) -> Path:
    """The folder of a run that was never interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    ended(begin(folder), folder)
    return folder


def said(folder: Path) -> str:
    return (folder / "said.txt").read_text()


def ended(process, folder: Path, code: int = 0) -> None:
    process.join(100)
    assert process.exitcode == code, said(folder)


def wait_for(words: str, process, folder: Path) -> None:
    while words not in said(folder) and process.is_alive():
        time.sleep(0.002)


def without_times(epochs: list[dict]) -> list[dict]:
    return [{key: value for key, value in one.items() if key != "seconds"} for one in epochs]


def assert_same(folder: Path, other: Path) -> None:
    for name in NAMES:
        first, second = (torch.load(place / "checkpoints" / f"{name}.pt", weights_only=True)
                         for place in (folder, other))
        assert without_times(first["epochs"]) == without_times(second["epochs"])
        for left, right in ((first["state_dict"], second["state_dict"]),
                            (first["finished"], second["finished"])):
            for key, value in left.items():
                assert not torch.is_tensor(value) or torch.equal(value, right[key]), key
    for file in ("test_predictions.csv", "train_labels.csv"):
        assert (folder / file).read_bytes() == (other / file).read_bytes()


# What a run has said when it is killed, so many seconds later: in the first model's first epoch,
# in others, while it is tested, in the second model's, in the report.
MOMENTS = [("At most", 0.1), ("epoch   1/4", 0.0), ("epoch   3/4", 0.05), ("epoch   4/4", 0.03),
           ("\ntest_convnext: weights", 0.4), ("ADVANCED", 0.2)]
AT_RANDOM = [("At most", random.Random(place).uniform(0, 0.8)) for place in range(5)]


@pytest.mark.parametrize("moments", [MOMENTS, AT_RANDOM], ids=["each kind", "random"])
def test_a_run_killed_again_and_again_ends_bit_for_bit_in_the_same_numbers(
        moments, begin, whole, tmp_path):
    for words, delay in moments:
        process = begin(tmp_path, resume=True)
        wait_for(words, process, tmp_path)
        time.sleep(delay)
        process.kill()
        process.join()
        (tmp_path / "checkpoints").mkdir(exist_ok=True)  # what a write that was cut off leaves
        (tmp_path / "checkpoints" / "test_convnext.pt.tmp").write_bytes(b"half")
    ended(begin(tmp_path, resume=True), tmp_path)
    assert_same(whole, tmp_path)


def test_ctrl_c_reports_what_is_finished_and_the_rest_is_gone_on_from(
        begin, arguments, whole, tmp_path):
    said_by = (tmp_path / "said.txt").open("w+")
    environment = os.environ | dict(OMP_NUM_THREADS="1", PYTHONUNBUFFERED="1")
    process = subprocess.Popen(
        [sys.executable, SCRIPT, *arguments, "--output-dir", tmp_path], env=environment,
        stdout=said_by, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # ignored where jobs are
    second = "\ntest_convnext: weights"
    while second not in said(tmp_path) or "epoch   1/4" not in said(tmp_path).split(second)[1]:
        assert process.poll() is None
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.startswith("advanced_techniques.py: Interrupted.") and "--resume true" in err
    assert err.count("\n") == 1 and "Traceback" not in said(tmp_path)
    assert "PARTIAL REPORT on test_resnet" in (tmp_path / "report.txt").read_text()
    first = tmp_path / "checkpoints" / "test_resnet.pt"
    before = first.read_bytes()
    ended(begin(tmp_path, resume=True), tmp_path)
    assert f"{first} holds the finished model" in said(tmp_path)
    assert "epoch   1/4" not in said(tmp_path) and "epoch   4/4" in said(tmp_path)
    assert first.read_bytes() == before
    assert_same(whole, tmp_path)


# ---- What is gone on from, and what is not ----


@pytest.fixture
def folder(whole, tmp_path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "whole"))


def resumed(arguments: list[str], folder: Path, *changes: str):
    return call([*arguments, "--output-dir", str(folder), "--resume", "true", *changes])


REFUSED = [
    ("--base-learning-rate 0.001", "BASE_LEARNING_RATE was 0.004 and is 0.001"),
    ("--num-epochs 8", "NUM_EPOCHS was 4 and is 8"),
    ("--batch-size 4", "BATCH_SIZE x GRADIENT_ACCUMULATION_STEPS was 16 and is 8"),
    ("--seed 1", "SEED plus the model's place in ARCHITECTURES was 0 and is 1"),
    ("--image-size 40", "IMAGE_SIZE"), ("--use-tta false", "USE_TTA"), ("--fit pad", "FIT"),
    ("--balance true", "BALANCE"), ("--feature-views 0", "FEATURE_VIEWS"),
    ("--pretrained none", "the model's first weights"),
    ("--train-images 50", "the checksum of the images")]


@pytest.mark.parametrize(("changes", "named"), REFUSED, ids=[changes for changes, _ in REFUSED])
def test_another_runs_checkpoint_is_refused_by_name(changes, named, arguments, folder):
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    refusal = resumed(arguments, folder, *changes.split())
    assert refusal.code == 2 and named in refusal.err and "comes from another run" in refusal.err
    assert "goes on from" not in refusal.err  # no command does
    assert all(file.read_bytes() == content for file, content in before.items())


@pytest.mark.parametrize(("old", "new", "named"), [
    ("cat", "lynx", "the checksum of the class names"),
    ("cat/000.png", "dog/cat.png", "the checksum of the images")])
def test_other_classes_and_other_labels_are_refused(old, new, named, arguments, folder, tmp_path):
    place = arguments.index("--dataset") + 1
    pictures = Path(shutil.copytree(arguments[place], tmp_path / "pets"))
    changes = ["--dataset", str(pictures), "--data-dir", str(tmp_path), "--memory-gb", "1",
               "--use-ensemble", "false", "--batch-size", "4",
               "--gradient-accumulation-steps", "4"]
    # Where the images lie decides nothing, and neither do other flags or how an update is cut.
    assert resumed(arguments, folder, *changes).out.count("holds the finished model") == 2
    (pictures / old).rename(pictures / new)
    refusal = resumed(arguments, folder, *changes)
    assert refusal.code == 2 and named in refusal.err


@pytest.mark.parametrize("change", [-1, 1])
def test_another_recipe_is_refused_and_flags_that_came_or_went_are_not(change, arguments, folder):
    for name in NAMES:
        file = folder / "checkpoints" / f"{name}.pt"
        saved = torch.load(file, weights_only=True)
        del saved["run"]["FEATURE_VIEWS"]
        saved["run"]["A_FLAG_THAT_WENT"] = 1
        torch.save(saved, file)
    assert resumed(arguments, folder).out.count("holds the finished model") == 2
    saved["run"]["the recipe's version"] += change
    torch.save(saved, file)
    refusal = resumed(arguments, folder)
    assert refusal.code == 2 and "the recipe's version was" in refusal.err


@pytest.mark.parametrize("damage", ["empty", "half", "noise", "code"])
def test_a_damaged_checkpoint_is_a_sentence(damage, arguments, folder):
    class Trap:
        def __reduce__(self):
            return (pytest.fail, ("a checkpoint ran code",))

    file = folder / "checkpoints" / "test_resnet.pt"
    content = file.read_bytes()
    parts = dict(empty=b"", half=content[: len(content) // 2],
                 noise=random.Random(0).randbytes(1000))
    if damage == "code":
        torch.save(dict(run=Trap()), file)
    else:
        file.write_bytes(parts[damage])
    refusal = resumed(arguments, folder)
    assert refusal.code == 2 and f"{file} can't be read" in refusal.err
    assert "Delete it to train this model anew" in refusal.err


def test_without_resume_an_old_checkpoint_is_told_of_before_it_is_overwritten(arguments, folder):
    file = folder / "checkpoints" / "test_resnet.pt"
    again = call([*arguments, "--output-dir", str(folder), "--num-epochs", "1"])
    assert again.code == 0, again
    told = again.out.index(f"{file} of an earlier run is overwritten")
    assert told < again.out.index("epoch   1/1") and "--resume true" in again.out
    assert len(torch.load(file, weights_only=True)["epochs"]) == 1


@pytest.mark.parametrize("precision", [torch.float16, None])
def test_half_a_micro_batch_loss_scale_and_dropout_survive(precision, tmp_path):
    flags = dict(NUM_EPOCHS=4, OUTPUT_DIR=str(tmp_path), RESUME=True, GRADUAL_UNFREEZING=False)
    run, data = in_precision(run_of("test_resnet", **flags), precision), random_data()
    run.epochs = [at.train_epoch(run, data, 0)]
    run.micro_batch = 3
    scale = run.scaler.get_scale()
    if precision:
        run.scaler.update(scale := 1024.0)
    at.save_checkpoint(run, data)
    fresh = in_precision(run_of("test_resnet", **flags), precision)
    fresh.network.drop_rate = run.network.drop_rate = 0.5
    assert at.resume(fresh, data) is None
    assert (fresh.micro_batch, fresh.scaler.get_scale()) == (3, scale)
    first, second = (at.train_epoch(one, data, 1) for one in (run, fresh))
    assert first["train_loss"] == second["train_loss"]
