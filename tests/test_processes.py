"""Several processes that train one model together, by PyTorch's torchrun and gloo on the CPU."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import random_data
from test_data import make_folder

import advanced_techniques as at


@pytest.fixture(scope="module")
def train(script, tmp_path_factory):
    """train(processes, architecture) returns the checkpoint, the results and the output."""
    shared = tmp_path_factory.mktemp("shared")
    done = {}

    def run(processes, architecture, **changes):
        key = (processes, architecture, *changes.items())
        if key in done:
            return done[key]
        if not (shared / f"{architecture}.pth").exists():
            torch.manual_seed(0)
            torch.save(
                at.timm.create_model(architecture).state_dict(), shared / f"{architecture}.pth"
            )
        folder = tmp_path_factory.mktemp("outputs")
        command = launch(processes, script, architecture, shared, folder, **changes)
        ended = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=300,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        assert ended.returncode == 0, ended.stderr[-3000:]
        saved = torch.load(folder / "checkpoints" / f"{architecture}.pt", weights_only=True)
        done[key] = saved, json.loads((folder / "results.json").read_text()), ended.stdout
        return done[key]

    return run


def launch(processes, script, architecture, shared, folder, **changes):
    # At the default rate Adam, which divides by the gradient's size, lets rounding grow to 3e-5 in
    # gradients near zero.
    flags = (
        dict(
            dataset="shapes",
            base_learning_rate=0.001,
            architectures=architecture,
            pretrained=shared,
            image_size=32,
            train_images=70,
            test_images=21,
            num_epochs=4,
            batch_size=6,
            gradient_accumulation_steps=4,
            output_dir=folder,
            data_dir=folder,
            use_mixed_precision=False,
            export=False,
        )
        | changes
    )
    engine = (
        ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--standalone"]
        if processes > 1
        else []
    )
    return [
        sys.executable,
        *engine,
        str(script),
        *(f"--{name.replace('_', '-')}={value}" for name, value in flags.items()),
    ]


def difference(first, second):
    return max(
        (first[name].double() - second[name].double()).abs().max().item()
        for name in first
        if first[name].dtype.is_floating_point
    )


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_end_with_the_weights_of_one(train, processes):
    (alone, results, _), (together, shared_results, output) = (
        train(count, "test_vit") for count in (1, processes)
    )
    assert difference(alone["state_dict"], together["state_dict"]) < 3e-5
    torch.testing.assert_close(
        alone["finished"]["averaged"], together["finished"]["averaged"], rtol=0, atol=1e-4
    )
    model, shared_model = results["models"][0], shared_results["models"][0]
    assert (
        model["test_accuracy"] == shared_model["test_accuracy"]
        and shared_results["dataset"]["test_images"] == 21
    )
    assert [entry["stage"] for entry in shared_model["epochs"]] == [1, 2, 3, 4]
    for entry, other in zip(model["epochs"], shared_model["epochs"], strict=True):
        assert entry["train_loss"] == pytest.approx(other["train_loss"], abs=1e-4)
        assert entry["train_accuracy"] == other["train_accuracy"]
    assert (
        output.count("ADVANCED TRANSFER LEARNING: REPORT") == 1 and output.count("epoch   1/4") == 1
    )


def test_batch_statistics_differ_a_little_and_accuracy_little(train):
    # Each process normalises over its own micro-batches, as on one device with smaller ones:
    # weights move by Adam's steps, not by rounding. 0.02 is ten updates' worth of the largest
    # learning rate that batch-normed layers have.
    (alone, _, _), (together, _, _) = (train(count, "test_resnet") for count in (1, 2))
    learned = {name for name in alone["state_dict"] if "running" not in name}
    left, right = ({name: one["state_dict"][name] for name in learned} for one in (alone, together))
    assert 0 < difference(left, right) < 0.02


def test_a_folder_is_decoded_once_and_shared(train, tmp_path):
    folder = make_folder(tmp_path / "pets", count=20)
    (folder / "cat" / "broken.png").write_bytes(b"no image")
    alone, _, _ = train(1, "test_vit", dataset=folder, skip_unreadable=True, test_images=10)
    together, results, output = train(
        2, "test_vit", dataset=folder, skip_unreadable=True, test_images=10
    )
    assert difference(alone["state_dict"], together["state_dict"]) < 3e-5
    assert (
        "1 of" in output
        and "left out" in output
        and results["dataset"]["classes"] == ["cat", "dog", "owl"]
    )


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_worker_ends_the_job(script, tmp_path, victim):
    command = launch(2, script, "test_vit", "none", tmp_path, num_epochs=500)
    job = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        for line in job.stdout:
            if "epoch   2/500" in line:
                break
        workers = subprocess.run(
            ["pgrep", "-P", str(job.pid)], capture_output=True, text=True
        ).stdout.split()
        workers = [
            pid
            for pid in workers
            if b"advanced_techniques.py" in Path(f"/proc/{pid}/cmdline").read_bytes()
        ]
        assert len(workers) == 2
        os.kill(int(workers[victim]), signal.SIGKILL)
        started = time.monotonic()
        assert job.wait(timeout=60) != 0
        assert time.monotonic() - started < 60
        time.sleep(0.5)
        assert not any(os.path.exists(f"/proc/{pid}") for pid in workers)
    finally:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
        job.stdout.close()
        job.stderr.close()


def test_gradients_are_exchanged_once_an_update(tiny):
    """DistributedDataParallel exchanges them only where require_backward_grad_sync says so."""
    exchanged = []

    class Wrapped(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.network, self.require_backward_grad_sync = tiny.network, True

        def forward(self, images):
            exchanged.append(self.require_backward_grad_sync)
            return self.network(images)

    data = random_data(count=64)
    views = at.choose_views(torch.rand(32, len(at.RANDOM_NUMBERS)), True)
    part = at.Part(32, data.split["train"], views)
    at.apply_update(tiny, Wrapped(), at.micro_batches(tiny, data, part), 32, [0.1, 0.1])
    assert exchanged == [False, False, False, True]


@pytest.mark.parametrize("kind", ["xpu", "mps", "cuda"])
def test_the_accelerator_is_the_one_that_pytorch_finds(monkeypatch, kind):
    chosen = []
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.setattr(torch.accelerator, "set_device_index", chosen.append)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device(kind))
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda wanted: None)
    monkeypatch.setattr(at, "LOCAL_RANK", 1)
    assert at.choose_device() == torch.device(kind, 1) and chosen == [1]
    monkeypatch.setattr(at, "LOCAL_RANK", 2)
    with pytest.raises(SystemExit):
        at.choose_device()


EPOCH_OF_TWO = """
import sys
sys.path[:0] = sys.argv[1:]
import torch
from conftest import random_data, run_of
import advanced_techniques as at
torch.distributed.init_process_group("gloo")
run, data = run_of("test_resnet", GRADUAL_UNFREEZING=False), random_data()
at.train_epoch(run, data, 0)
for kind in (run.network.named_buffers(), run.network.named_parameters()):
    for name, tensor in kind:
        both = [torch.empty_like(tensor) for _ in range(2)]
        torch.distributed.all_gather(both, tensor.detach())
        assert torch.equal(*both), name
fresh = run_of("test_resnet")
assert not torch.equal(run.network.bn1.running_mean, fresh.network.bn1.running_mean)
"""


def test_all_processes_end_an_epoch_with_one_network_batch_statistics_included(script, tmp_path):
    (tmp_path / "epoch.py").write_text(EPOCH_OF_TWO)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node=2",
        "--standalone",
        str(tmp_path / "epoch.py"),
        str(script.parent),
        str(script.parent / "tests"),
    ]
    ended = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
