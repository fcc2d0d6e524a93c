"""How much faster than the textbook loop? python tests/benchmark.py [--quick] [--help]
When does unfreezing pay? python tests/benchmark.py --unfreezing

Not a test. Runs the textbook fine-tuning loop and the project's trainer in turn, each run in a
process of its own, on the same images, backbone, weights, schedule and seeds, and prints medians
over the seeds and their ratios. Times vary from machine to machine; the ratios are what counts.
Fashion-MNIST where it is installed, else the built-in shapes.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

sys.path.insert(0, str(Path(__file__).parents[1]))
import advanced_techniques as at

CPU = torch.device("cpu")


class PerImage(Dataset):
    """Images of one role, transformed one by one, as tutorials do it."""

    def __init__(self, data: at.Data, role: str, transform: Any) -> None:
        self.images = data.images[data.split[role]]
        self.labels = data.labels[data.split[role]]
        self.transform = transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        pixels = self.images[index].permute(1, 2, 0).numpy()
        return self.transform(Image.fromarray(pixels)), int(self.labels[index])


def textbook_loader(data: at.Data, role: str, run: at.Run) -> DataLoader:
    """A DataLoader with workers and torchvision's transforms, those of the trainer's own."""
    normalise = transforms.Normalize(run.mean.tolist(), run.std.tolist())
    size = run.flags.IMAGE_SIZE
    steps = [transforms.Resize((size, size)), transforms.ToTensor(), normalise]
    if role == "train":
        steps = [transforms.RandomResizedCrop(size, scale=(0.4, 1.0)),
                 transforms.RandomHorizontalFlip(), transforms.RandomRotation(10),
                 transforms.ColorJitter(0.3, 0.3, 0.5), transforms.ToTensor(), normalise,
                 transforms.RandomErasing(0.25)]
    return DataLoader(PerImage(data, role, transforms.Compose(steps)),
                      batch_size=run.flags.BATCH_SIZE, shuffle=role == "train", num_workers=2)


def textbook_accuracy(network: nn.Module, loader: DataLoader) -> float:
    network.eval()
    correct = 0
    with torch.no_grad():
        for inputs, labels in loader:
            correct += (network(inputs).argmax(1) == labels).sum().item()
    return correct / len(loader.dataset)


def textbook_stage(run: at.Run, stage: int, updates: int) -> tuple[Any, Any]:
    """Freeze all but the first layer groups; a new optimiser, a new scheduler."""
    groups = list(run.groups.values())
    settings = []
    for layer, parameters in enumerate(groups):
        for parameter in parameters:
            parameter.requires_grad = layer <= stage
        if layer <= stage:
            rate = run.flags.BASE_LEARNING_RATE * run.flags.LAYER_RATE_DECAY**layer
            settings.append(dict(params=parameters, lr=rate))
    optimizer = torch.optim.AdamW(settings, weight_decay=run.flags.WEIGHT_DECAY)
    return optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)


def textbook(run: at.Run, data: at.Data) -> dict[str, Any]:
    """The plain loop: frozen BatchNorm in training mode, .item() a batch, an optimiser a stage."""
    flags = run.flags
    network = run.network.to(memory_format=torch.contiguous_format)
    loaders = {role: textbook_loader(data, role, run) for role in ("train", "validation", "test")}
    train = loaders["train"]
    criterion = nn.CrossEntropyLoss(label_smoothing=flags.LABEL_SMOOTHING)
    accumulation = flags.GRADIENT_ACCUMULATION_STEPS
    updates = math.ceil(len(train) / accumulation) * flags.NUM_EPOCHS // flags.UNFREEZING_STAGES
    times, accuracies, stage = [], [], None
    started = time.perf_counter()
    for epoch in range(flags.NUM_EPOCHS):
        if at.stage_of(epoch, run) != stage:
            stage = at.stage_of(epoch, run)
            optimizer, scheduler = textbook_stage(run, stage, updates)
        network.train()
        running_loss, correct = 0.0, 0
        for step, (inputs, labels) in enumerate(train):
            outputs = network(inputs)
            loss = criterion(outputs, labels)
            (loss / accumulation).backward()
            if (step + 1) % accumulation == 0 or step + 1 == len(train):
                nn.utils.clip_grad_norm_(network.parameters(), 1.0)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            running_loss += loss.item()
            correct += (outputs.argmax(1) == labels).sum().item()
        accuracies.append(textbook_accuracy(network, loaders["validation"]))
        times.append(time.perf_counter() - started)
    memory = peak_memory()
    test = textbook_accuracy(network, loaders["test"])
    return dict(times=times, accuracies=accuracies, memory=memory, test=test)


def trainer(run: at.Run, data: at.Data) -> dict[str, Any]:
    """The project's own training, watched from outside: no line of it knows that it is timed.

    Without the checkpoints, which the textbook loop doesn't write either.
    """
    times: list[float] = []
    at.save_checkpoint = lambda run, data: times.append(time.perf_counter() - started)
    started = time.perf_counter()
    at.train_model(run, data)
    test = at.score(at.predict(run, data, "test", at.PLAIN)[0], data.truth("test"))[1]
    return dict(times=times, accuracies=[entry["validation_accuracy"] for entry in run.epochs],
                memory=peak_memory(), test=test)


def peak_memory() -> float:
    """Peak resident memory of this process in bytes; a DataLoader's workers are not counted."""
    return 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def one_run(kind: str, architecture: str, seed: int, changes: dict[str, Any]) -> None:
    """One run in this process; prints its figures as the last line, as JSON."""
    small = dict(IMAGE_SIZE=80, TEST_IMAGES=1500, SEED=seed)
    flags = SimpleNamespace(**at.FLAGS | small | changes)
    flags.DATASET = "fashion_mnist" if at.DEBIAN_FASHION_MNIST.is_dir() else "shapes"
    # choose_device() also makes the trainer's memory allocation faster
    job = at.Job(flags, CPU if kind == "textbook" else at.choose_device())
    job.data = at.load_data(job)
    shipped = at.shipped_weights(architecture, architecture) if architecture in at.SHIPPED else None
    run = at.new_run(architecture, shipped or at.Weights(architecture, ""), seed, job)
    run.weights = at.Weights(architecture, "", {})  # random weights are timed like pretrained ones
    loop = dict(textbook=textbook, trainer=trainer)[kind]
    print(json.dumps(loop(run, job.data) | dict(dataset=job.data.name)))


def in_a_process(kind: str, architecture: str, seed: int,
                 changes: dict[str, Any]) -> dict[str, Any]:
    """One run in a fresh process: its figures, which it prints last."""
    command = [sys.executable, __file__, "--one", kind, architecture, str(seed),
               json.dumps(changes)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    result = json.loads(output.splitlines()[-1])
    print(f"  {architecture} {kind}, seed {seed}: {result['times'][-1]:.1f} s, validation "
          f"{result['accuracies'][-1]:.1%}, test {result['test']:.1%}", flush=True)
    return result


def compare(architecture: str, seeds: int, changes: dict[str, Any]) -> None:
    """Both loops in turn over the seeds; prints the table of medians and ratios."""
    rows: dict[str, list[tuple[float, float]]] = {}
    for seed in range(seeds):
        book, ours = (in_a_process(kind, architecture, seed, changes)
                      for kind in ("textbook", "trainer"))
        for name, pair in figures(book, ours).items():
            rows.setdefault(name, []).append(pair)
    print(f"\n{architecture}, {book['dataset']}, medians over {seeds} seed(s)\n"
          f"{'':52}{'textbook':>10}{'trainer':>10}{'ratio':>8}")
    for name, pairs in rows.items():
        textbooks, trainers = zip(*pairs, strict=True)
        ratio = statistics.median(second / first for first, second in pairs)
        print(f"{name:52}{statistics.median(textbooks):10.1f}{statistics.median(trainers):10.1f}"
              f"{ratio:8.2f}")
    print(flush=True)


def figures(book: dict[str, Any], ours: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """What is compared, of the textbook loop and of the trainer."""
    target = book["accuracies"][-1]
    reached = (time_until(target, book), time_until(target, ours))
    return {
        "whole schedule (s)": (book["times"][-1], ours["times"][-1]),
        "until the textbook's final validation accuracy (s)": (book["times"][-1], reached[1]),
        "the same, textbook's first time too (s)": reached,
        "peak memory (MB)": (book["memory"] / 1e6, ours["memory"] / 1e6),
        "final validation accuracy (%)": (100 * target, 100 * ours["accuracies"][-1]),
        "test accuracy (%)": (100 * book["test"], 100 * ours["test"]),
    }


def time_until(accuracy: float, one: dict[str, Any]) -> float:
    """Seconds until a run first reached a validation accuracy."""
    for spent, reached in zip(one["times"], one["accuracies"], strict=True):
        if reached >= accuracy:
            return spent
    return math.inf


# ---- When does unfreezing pay? ----

STAMPS = Path("/usr/share/tuxpaint/stamps")  # Debian's tuxpaint-stamps-default: small photographs
KINDS = ("animals/birds", "animals/fish", "animals/insects", "animals/mammals", "food/fruit",
         "food/vegetables", "plants/flowers")
EPOCHS = {200: 16, 800: 8, 2400: 4}  # of so many training images: more updates of more
AT_ONCE = dict(GRADUAL_UNFREEZING=False)
WAYS = {"gradual": {}, "head alone": dict(UNFREEZING_STAGES=1), "all layers, equal epochs": AT_ONCE,
        "all layers, equal time": AT_ONCE}


def unfreezing(seeds: int, architecture: str, folder: str) -> None:
    """Print how accurate each way of unfreezing is, far from ImageNet and near it."""
    at.save_checkpoint = lambda run, data: None
    at.say = lambda *lines: None
    small = dict(USE_TTA=False, DATA_DIR=folder, OUTPUT_DIR=folder, IMAGE_SIZE=64, TEST_IMAGES=2000)
    fashion = small | dict(DATASET="fashion_mnist")
    tasks = {}
    for images, epochs in EPOCHS.items() if at.DEBIAN_FASHION_MNIST.is_dir() else ():
        changes = fashion | dict(TRAIN_IMAGES=images, NUM_EPOCHS=epochs)
        tasks[f"Fashion-MNIST, {images:,} images"] = changes, [at.load_data(job_with(changes))]
    if STAMPS.is_dir():
        changes = small | dict(NUM_EPOCHS=8)
        tasks["photographs, about 150 images"] = changes, folds(job_with(changes), folder)
    for name, (changes, parts) in tasks.items():
        print(f"\n{name}, {changes['NUM_EPOCHS']} epochs ({architecture}, {seeds} seeds)")
        rights: dict[str, list[Tensor]] = {way: [] for way in WAYS}
        times: dict[str, list[float]] = {way: [] for way in WAYS}
        for seed in range(seeds):
            for way, flags in WAYS.items():
                chosen = changes | flags
                if way == "all layers, equal time":
                    share = times["gradual"][-1] / times["all layers, equal epochs"][-1]
                    chosen["NUM_EPOCHS"] = math.ceil(min(1, share) * changes["NUM_EPOCHS"])
                right, seconds = trained(architecture, parts, seed, chosen)
                rights[way].append(right)
                times[way].append(seconds)
        print_ways(rights, times)


def print_ways(rights: dict[str, list[Tensor]], times: dict[str, list[float]]) -> None:
    """The rows of a task, and a sentence on what to do; bool [images] and seconds of each seed."""
    clear = {}
    gradual = torch.stack(rights["gradual"]).double()
    for way, found in rights.items():
        right = torch.stack(found).double()
        change, interval = at.crossed_interval((right - gradual).numpy())
        clear[way] = (interval[0] > 0) - (interval[1] < 0)  # 1: clearly better, -1: worse
        told = "" if way == "gradual" else at.points(change, interval)
        print(f"  {way:26}{right.mean():8.1%}   {told:26}{statistics.mean(times[way]):7.0f} s")
    print("  The head alone is " + ("clearly worse." if clear["head alone"] < 0 else "no worse."),
          {1: "In equal time all layers at once are better.", -1: "In equal time gradually is "
           "better.", 0: "In equal time it makes no clear difference whether all layers learn at "
           "once."}[clear["all layers, equal time"]],
          "With time to spare: all layers." if clear["all layers, equal epochs"] > 0 else "",
          flush=True)


def job_with(changes: dict[str, Any]) -> at.Job:
    """A job with some flags changed."""
    return at.Job(SimpleNamespace(**at.FLAGS | changes), at.choose_device())


def trained(architecture: str, parts: list[at.Data], seed: int,
            changes: dict[str, Any]) -> tuple[Tensor, float]:
    """Whether the answers to the test images of all parts are right, and seconds of training."""
    right, seconds = [], 0.0
    for data in parts:
        job = job_with(changes)
        job.data = data
        run = at.new_run(architecture, at.shipped_weights(architecture, architecture), seed, job)
        at.train_model(run, data)
        seconds += sum(entry["seconds"] for entry in run.epochs)
        answers = at.predict(run, data, "test", at.PLAIN)[0]
        right.append(at.is_right(answers, data.truth("test")))
    return torch.cat(right), seconds


def folds(job: at.Job, folder: str, count: int = 5) -> list[at.Data]:
    """The photographs as so many data sets, each with another share of them to test on."""
    place = Path(folder, "stamps")
    for kind in KINDS:
        (place / Path(kind).name).mkdir(parents=True)
        for file in (STAMPS / kind).rglob("*.png"):
            if "cartoon" not in file.parts:
                shutil.copy(file, place / Path(kind).name)
    source = at.image_folder(place, job.flags)
    everything = at.np.arange(len(source.labels))
    order = at.stratified_order(source.labels, everything, at.np.random.default_rng(0))
    images = torch.from_numpy(source.read(order))
    labels = torch.from_numpy(source.labels[order])
    parts = []
    for fold in range(count):
        test = torch.from_numpy(everything % count == fold)
        train = (~test).nonzero()[:, 0]
        # Nothing is chosen by validation images: some of the training images will do.
        split = dict(train=train, validation=train[:20], test=test.nonzero()[:, 0])
        parts.append(at.Data(source.name, source.classes, images, labels, split))
    return parts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true",
                        help="300 images, 8 epochs, one backbone: under two minutes")
    parser.add_argument("--unfreezing", action="store_true", help="print the table of unfreezing")
    parser.add_argument("--seeds", type=int, default=1, help="runs of each loop (default: 1)")
    parser.add_argument("--architectures", default="tf_efficientnet_lite0,resnet18",
                        help="comma-separated timm names")
    parser.add_argument("--images", type=int, default=800, help="training images (default: 800)")
    parser.add_argument("--epochs", type=int, default=20,
                        help="epochs, a multiple of 4 (default: 20)")
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if torch.accelerator.is_available():
        parser.error("it compares on a CPU: hide the accelerator, as by CUDA_VISIBLE_DEVICES=")
    if options.one:
        kind, architecture, seed, changes = options.one
        one_run(kind, architecture, int(seed), json.loads(changes))
        return
    if options.quick:
        options.images, options.epochs, options.architectures = 300, 8, "tf_efficientnet_lite0"
    with tempfile.TemporaryDirectory() as folder:
        if options.unfreezing:
            unfreezing(options.seeds, options.architectures.split(",")[0], folder)
            return
        changes = dict(TRAIN_IMAGES=options.images, NUM_EPOCHS=options.epochs, DATA_DIR=folder,
                       OUTPUT_DIR=folder)
        for architecture in options.architectures.split(","):
            compare(architecture, options.seeds, changes)


if __name__ == "__main__":
    main()
