"""Several processes that train one model together: torchrun, with gloo on the CPU."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import timm
import torch
from conftest import SCRIPT, Ended, class_pictures, command, launch, random_data, tiny_run

import advanced_techniques as at

ONE_THREAD = os.environ | dict(OMP_NUM_THREADS="1")


@pytest.fixture(scope="module")
def arguments(tmp_path_factory) -> list[str]:
    """A network without batch statistics, unfrozen stage by stage; nothing divides by two."""
    root = tmp_path_factory.mktemp("shared")
    torch.manual_seed(0)
    torch.save(timm.create_model("test_convnext").state_dict(), root / "test_convnext.pth")
    pictures = class_pictures(root / "pets", dict(cat=31, dog=30, owl=30, hen=30, fox=30))
    # At a low rate: Adam divides by the gradient's size, so it lets rounding grow near zero.
    return command(DATASET=pictures, PRETRAINED=root, ARCHITECTURES="test_convnext", BATCH_SIZE=5,
                   GRADIENT_ACCUMULATION_STEPS=3, BASE_LEARNING_RATE=0.0005, USE_TTA=True,
                   TRAIN_IMAGES=81, TEST_IMAGES=21, DATA_DIR=root)


def together(arguments: list[str], timeout: float = 200, script: Path = SCRIPT) -> Ended:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
                "--standalone"]
    ended = subprocess.run([*torchrun, str(script), *arguments], capture_output=True, text=True,
                           timeout=timeout, env=ONE_THREAD, check=False)
    return Ended(ended.returncode, ended.stdout, ended.stderr)


def outcome(folder: Path) -> tuple[dict, dict]:
    saved = torch.load(folder / "checkpoints" / "test_convnext.pt", weights_only=True)
    return saved, json.loads((folder / "results.json").read_text())


def test_two_processes_end_in_the_numbers_of_one(arguments, tmp_path):
    # Some variables of torchrun, as notebooks leave them behind, make one process wait for none.
    alone = launch([*arguments, "--output-dir", str(tmp_path / "one")],
                   ONE_THREAD | dict(WORLD_SIZE="2", RANK="1", MASTER_ADDR="localhost"))
    both = together([*arguments, "--output-dir", str(tmp_path / "two")])
    for ended in (alone, both):
        assert ended.code == 0, ended.err[-2000:]
        assert ended.out.count("ADVANCED TRANSFER LEARNING: REPORT") == 1
        assert ended.out.count("epoch   1/4") == ended.out.count("epoch   4/4") == 1
    (one, results), (two, shared) = (outcome(tmp_path / name) for name in ("one", "two"))
    for key, value in one["state_dict"].items():
        torch.testing.assert_close(two["state_dict"][key], value, rtol=0, atol=1e-5)
    for key in ("plain", "averaged", "validation", "belief"):
        wanted = one["finished"][key]
        torch.testing.assert_close(two["finished"][key], wanted, rtol=0, atol=1e-5)
    assert shared["dataset"] == results["dataset"]
    assert [shared["dataset"][f"{role}_images"] for role in ("train", "test")] == [81, 21]
    first, second = (found["models"][0] for found in (results, shared))
    assert first["test_accuracy"] == second["test_accuracy"]
    assert first["test_loss"] == pytest.approx(second["test_loss"], abs=1e-5)
    for before, after in zip(first["epochs"], second["epochs"], strict=True):
        assert [after[key] for key in ("stage", "train_accuracy", "validation_accuracy")] == \
               [before[key] for key in ("stage", "train_accuracy", "validation_accuracy")]
        assert after["train_loss"] == pytest.approx(before["train_loss"], abs=1e-5)
    assert [entry["stage"] for entry in second["epochs"]] == [1, 2, 3, 4]
    files = {path.relative_to(tmp_path / "two") for path in (tmp_path / "two").rglob("*")}
    assert files == {path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*")}


def test_a_stop_in_one_process_ends_both(arguments, tmp_path):
    (tmp_path / "checkpoints" / "test_convnext.pt").mkdir(parents=True)  # the first one writes
    started = time.monotonic()
    ended = together([*arguments, "--output-dir", str(tmp_path)], 90)
    assert ended.code != 0 and time.monotonic() - started < 80
    assert "test_convnext.pt can't be written" in ended.err
    assert 'File "' + str(SCRIPT) not in ended.err


def epoch_by_plain_descent() -> dict[str, torch.Tensor]:
    """Weights after an epoch in which, unlike under Adam, the gradients' size counts."""
    run = tiny_run(LABEL_SMOOTHING=0.0)
    groups = [dict(params=group["params"], layer=group["layer"])
              for group in run.optimizer.param_groups]
    run.optimizer = torch.optim.SGD(groups, lr=0.1)
    at.train_epoch(run, random_data(41), 0)
    return run.network.state_dict()


EPOCH_OF_TWO = """
import sys
sys.path[:0] = sys.argv[1:3]
import torch
from conftest import run_of
from test_processes import at, epoch_by_plain_descent, random_data
at.meet_processes(torch.device("cpu"))
torch.save(epoch_by_plain_descent(), sys.argv[3] + str(at.RANK))
run = run_of("test_resnet", GRADUAL_UNFREEZING=False)
fresh = run.network.bn1.running_mean.clone()
at.train_epoch(run, random_data(41), 0)
for name, tensor in run.network.state_dict().items():
    both = [torch.empty_like(tensor) for _ in range(2)]
    torch.distributed.all_gather(both, tensor)
    assert torch.equal(*both), name
assert not torch.equal(run.network.bn1.running_mean, fresh)
"""


def test_processes_end_an_epoch_with_one_network_batch_statistics_included(tmp_path):
    (tmp_path / "epoch.py").write_text(EPOCH_OF_TWO)
    places = [SCRIPT.parent, Path(__file__).parent, tmp_path / "weights"]
    ended = together(list(map(str, places)), script=tmp_path / "epoch.py")
    assert ended.code == 0, ended.err[-2000:]
    wanted = epoch_by_plain_descent()
    for rank in "01":
        weights = torch.load(f"{places[2]}{rank}")
        for key, value in wanted.items():
            torch.testing.assert_close(weights[key], value, rtol=0, atol=1e-6)
