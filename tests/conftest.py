"""What the tests share: the script as a module, flags for quick runs, tiny data, tiny networks."""

import atexit
import hashlib
import http.server
import io
import pickle
import shutil
import sys
import tarfile
import tempfile
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))
import advanced_techniques as at

CPU = torch.device("cpu")
at.FLAGS["EXPORT"] = False  # seconds for each model; the tests that look at it switch it on
SCRATCH = tempfile.mkdtemp()  # for what a test writes but doesn't look at
atexit.register(shutil.rmtree, SCRATCH, ignore_errors=True)


def quick_flags(**changes) -> SimpleNamespace:
    """The script's flags, made small, with some changed."""
    small = dict(IMAGE_SIZE=32, TRAIN_IMAGES=40, TEST_IMAGES=20, BATCH_SIZE=8,
                 GRADIENT_ACCUMULATION_STEPS=2, OUTPUT_DIR=SCRATCH)
    return SimpleNamespace(**at.FLAGS | small | changes)


def random_data(count: int = 40, side: int = 36, classes: int = 4, device: str = "cpu") -> at.Data:
    """Random images with random labels: half to train on, the rest for validation and test."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, classes, (count,), generator=generator)
    cuts = torch.arange(count).tensor_split([count // 2, 3 * count // 4])
    parts = dict(zip(("train", "validation", "test"), cuts, strict=True))
    return at.Data("random", [str(label) for label in range(classes)], images.to(device),
                   labels.to(device), {role: part.to(device) for role, part in parts.items()})


def run_of(architecture: str, pretrained: bool = True, classes: int = 4,
           device: torch.device = CPU, **changes) -> at.Run:
    """A run of a model with random weights, which count as pretrained ones unless said otherwise.

    Without word of it, it trains in FP32, on whatever machine.
    """
    flags = quick_flags(**dict(USE_MIXED_PRECISION=False) | changes)
    job = at.Job(flags, device, random_data(classes=classes))
    run = at.new_run(architecture, at.Weights(architecture, "test", None), 0, job)
    if pretrained:
        run.weights = at.Weights(architecture, "test", {})
    return run


def in_precision(run: at.Run, precision: torch.dtype | None) -> at.Run:
    """The run itself, from now on in another precision."""
    run.precision = precision
    run.scaler = at.make_scaler(run.device, precision)
    return run


class TinyNetwork(nn.Module):
    """A network without batch statistics, so that a batch may be cut anywhere."""

    num_features = 6

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 5, stride=4)
        self.head = nn.Linear(6, 4)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.stem(images)).mean((2, 3)))


def tiny_run(**changes) -> at.Run:
    """A run of TinyNetwork, which always learns as a whole, so no features are kept."""
    torch.manual_seed(0)
    network, flags = TinyNetwork(), quick_flags(**changes)
    groups = dict(head=list(network.head.parameters()), stem=list(network.stem.parameters()))
    return at.Run("tiny", at.Weights("tiny", "test", None), network, groups, 0, flags, CPU,
                  mean=torch.tensor([0.4, 0.5, 0.6]), std=torch.tensor([0.2, 0.25, 0.3]),
                  precision=None, precision_why="", optimizer=at.make_optimizer(groups, flags),
                  scaler=at.make_scaler(CPU, None), micro_batch=flags.BATCH_SIZE,
                  prior=torch.zeros(4))


@pytest.fixture
def tiny() -> at.Run:
    return tiny_run()


@pytest.fixture
def allow_meta(monkeypatch) -> None:
    """Let fused AdamW take tensors of the meta device, which it refuses otherwise."""
    adam = sys.modules["torch.optim.adam"]
    monkeypatch.setattr(adam, "_device_dtype_check_for_fused", lambda *arguments, **options: None)


@pytest.fixture(scope="session")
def script() -> Path:
    assert timm.__version__
    return Path(at.__file__)


@pytest.fixture
def cifar_server(tmp_path, monkeypatch):
    """CIFAR-10's archive in small, served here, so that torchvision's real download runs."""
    random, files = np.random.default_rng(0), {}
    for name in [*(f"data_batch_{index}" for index in range(1, 6)), "test_batch"]:
        files[name] = pickle.dumps(
            {"data": random.integers(0, 256, (10, 3072), np.uint8), "labels": list(range(10))}
        )
    files["batches.meta"] = pickle.dumps({"label_names": [f"class {index}" for index in range(10)]})
    served = tmp_path / "served"
    served.mkdir()
    with tarfile.open(served / "cifar-10-python.tar.gz", "w:gz") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    sums = {name: hashlib.md5(content).hexdigest() for name, content in files.items()}

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory=str(served))

        def log_message(self, *arguments):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    kind = at.torchvision.datasets.CIFAR10
    monkeypatch.setattr(
        kind, "url", f"http://127.0.0.1:{server.server_port}/cifar-10-python.tar.gz"
    )
    monkeypatch.setattr(
        kind, "tgz_md5", hashlib.md5((served / "cifar-10-python.tar.gz").read_bytes()).hexdigest()
    )
    monkeypatch.setattr(
        kind,
        "train_list",
        [[f"data_batch_{index}", sums[f"data_batch_{index}"]] for index in range(1, 6)],
    )
    monkeypatch.setattr(kind, "test_list", [["test_batch", sums["test_batch"]]])
    monkeypatch.setattr(kind, "meta", kind.meta | {"md5": sums["batches.meta"]})
    yield server
    server.shutdown()
