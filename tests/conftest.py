"""What the tests share: the script as a module, flags for quick runs, tiny data, tiny networks."""

import contextlib
import io
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny networks: threads would wait for each other

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))
import advanced_techniques as at

CPU = torch.device("cpu")
SCRIPT = Path(at.__file__)
if torch.cuda.is_available():  # test_cuda.py alone is about the GPU, which this process keeps
    torch.cuda.init()
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    at.choose_device = lambda: CPU


@pytest.fixture(scope="session", autouse=True)
def scratch(tmp_path_factory) -> Path:
    """A folder for what a test writes but doesn't look at."""
    folder = tmp_path_factory.mktemp("scratch")
    SMALL["OUTPUT_DIR"] = str(folder)
    return folder


SMALL = dict(IMAGE_SIZE=32, TRAIN_IMAGES=40, TEST_IMAGES=20, BATCH_SIZE=8, EXPORT=False,
             GRADIENT_ACCUMULATION_STEPS=2, USE_MIXED_PRECISION=False)


def quick_flags(**changes) -> SimpleNamespace:
    """The script's flags, made small, with some changed; FP32, on whatever machine."""
    return SimpleNamespace(**at.FLAGS | SMALL | changes)


def random_data(count: int = 40, side: int = 36, classes: int = 4, device: str = "cpu") -> at.Data:
    """Random images with random labels: half to train on, the rest for validation and test."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, classes, (count,), generator=generator)
    cuts = torch.arange(count).tensor_split([count // 2, 3 * count // 4])
    parts = dict(zip(("train", "validation", "test"), cuts, strict=True))
    return at.Data("random", [str(label) for label in range(classes)], images.to(device),
                   labels.to(device), {role: part.to(device) for role, part in parts.items()},
                   names=[str(place) for place in range(count)])


def run_of(architecture: str, pretrained: bool = True, device: torch.device = CPU,
           **changes) -> at.Run:
    """A run of a model with random weights, which count as pretrained ones unless said otherwise.
    """
    job = at.Job(quick_flags(**changes), device, random_data())
    run = at.new_run(architecture, at.Weights(architecture, "test"), 0, job)
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

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 5, stride=4)
        self.head = nn.Linear(6, 4)

    def get_classifier(self) -> nn.Module:
        return self.head

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.stem(images)).mean((2, 3)))


def tiny_run(pretrained: bool = False, **changes) -> at.Run:
    """A run of TinyNetwork, which learns as a whole unless it counts as pretrained."""
    torch.manual_seed(0)
    network, flags = TinyNetwork(), quick_flags(**changes)
    groups = dict(head=list(network.head.parameters()), stem=list(network.stem.parameters()))
    weights = at.Weights("tiny", "test", {} if pretrained else None)
    return at.Run("tiny", weights, network, groups, 0, flags, CPU,
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


def class_pictures(root: Path, classes: dict[str, int], side: int = 40, seed: int = 0) -> Path:
    """A folder of class folders: noisy pictures, a colour a class, that a network can tell apart.
    """
    random = np.random.default_rng(seed)
    for place, (name, count) in enumerate(classes.items()):
        folder = root / name
        folder.mkdir(parents=True, exist_ok=True)
        colour = np.array([40 + 170 * (place % 2), 40 + 170 * (place // 2 % 2), 120])
        for number in range(count):
            pixels = colour + random.normal(0, 35, (side, side, 3))
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{number:03d}.png")
    return root


def option(name: str) -> str:
    return "--" + name.lower().replace("_", "-")


def command(**flags) -> list[str]:
    """Arguments of the command line: small, in FP32, without what takes minutes."""
    small = dict(IMAGE_SIZE=32, BATCH_SIZE=8, GRADIENT_ACCUMULATION_STEPS=2, NUM_EPOCHS=4,
                 USE_MIXED_PRECISION=False, EXPORT=False, PRETRAINED="none")
    arguments = []
    for name, value in (small | flags).items():
        shown = ",".join(value) if isinstance(value, tuple) else str(value)
        arguments += [option(name), shown]
    return arguments


@dataclass
class Ended:
    """How a run of the whole program ended."""

    code: int
    out: str
    err: str


def launch(arguments: list[str], environment: dict[str, str] | None = None,
           cwd: Path | None = None) -> Ended:
    """The program in a process of its own, as a user starts it."""
    done = subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True,
                          env=environment, cwd=cwd, timeout=300, check=False)
    return Ended(done.returncode, done.stdout, done.stderr)


def call(arguments: list[str]) -> Ended:
    """main() in this process: what the program would print, and its exit code."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        try:
            at.main(arguments)
        except at.Stop as stopped:
            return Ended(stopped.code, out.getvalue(), str(stopped))
    return Ended(0, out.getvalue(), "")


@dataclass
class Finished:
    """A finished run on a small folder: where it is, and what it printed."""

    pictures: Path
    outputs: Path
    arguments: list[str]
    printed: str


@pytest.fixture(scope="session")
def finished(tmp_path_factory) -> Finished:
    """One run of two tiny models with everything on, for all tests that only look at it."""
    root = tmp_path_factory.mktemp("finished")
    pictures = class_pictures(root / "pets", dict(cat=60, dog=60, owl=40))
    outputs = root / "outputs"
    arguments = command(DATASET=pictures, OUTPUT_DIR=outputs, EXPORT=True,
                        ARCHITECTURES=("test_resnet", "test_convnext"))
    ended = call(arguments)
    assert ended.code == 0, ended
    return Finished(pictures, outputs, arguments, ended.out)
