"""How much faster than the textbook loop? python tests/benchmark.py [--quick] [--help]

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
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
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
    times, accuracies, waited, stage = [], [], 0.0, None
    started = time.perf_counter()
    for epoch in range(flags.NUM_EPOCHS):
        if at.stage_of(epoch, run) != stage:
            stage = at.stage_of(epoch, run)
            optimizer, scheduler = textbook_stage(run, stage, updates)
        network.train()
        running_loss, correct, batches = 0.0, 0, iter(train)
        for step in range(len(train)):
            asked = time.perf_counter()
            inputs, labels = next(batches)
            waited += time.perf_counter() - asked
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
    augmented = images_per_second(len(data.split["train"]), lambda: exhaust(train))
    return dict(times=times, accuracies=accuracies, waited=waited, memory=memory, test=test,
                augmented=augmented)


def trainer(run: at.Run, data: at.Data) -> dict[str, Any]:
    """The project's own training, watched from outside: no line of it knows that it is timed.

    Without the checkpoints, which the textbook loop doesn't write either.
    """
    waited, times = [], []
    deal_out, produce, validate = at.deal_out, at.micro_batches, at.validate

    def timed_plan(*arguments: Any) -> Any:
        asked = time.perf_counter()
        answer = deal_out(*arguments)
        waited.append(time.perf_counter() - asked)
        return answer

    def timed_batches(*arguments: Any) -> Iterator[at.MicroBatch]:
        batches = produce(*arguments)
        while True:
            asked = time.perf_counter()
            batch = next(batches, None)
            waited.append(time.perf_counter() - asked)
            if batch is None:
                return
            yield batch

    def timed_validate(*arguments: Any) -> Tensor:
        answer = validate(*arguments)
        times.append(time.perf_counter() - started)
        return answer

    at.deal_out, at.micro_batches, at.validate = timed_plan, timed_batches, timed_validate
    at.save_checkpoint = lambda run, data: None
    started = time.perf_counter()
    at.train_model(run, data)
    spent = sum(waited)
    test = at.score(at.predict(run, data, "test", [{}])[0], data.truth("test"))[1]

    def augment_epoch() -> None:
        plan = deal_out(run, data, 0)
        views = torch.cat([part.views for part in plan])
        chosen = torch.cat([part.chosen for part in plan])
        exhaust(produce(run, data, at.Part(len(chosen), chosen, views)))

    return dict(times=times, accuracies=[entry["validation_accuracy"] for entry in run.epochs],
                waited=spent, memory=peak_memory(), test=test,
                augmented=images_per_second(len(data.split["train"]), augment_epoch))


def exhaust(batches: Iterable) -> None:
    """Take every batch and keep none."""
    for _ in batches:
        pass


def images_per_second(images: int, epoch: Callable[[], Any]) -> float:
    """Speed of an epoch that does nothing but augment its images: the median of five."""
    return statistics.median(images / at.seconds_of(epoch, CPU) for _ in range(5))


def peak_memory() -> float:
    """Peak resident memory of this process in bytes; a DataLoader's workers are not counted."""
    return 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def one_run(kind: str, architecture: str, seed: int, changes: dict[str, Any]) -> None:
    """One run in this process; prints its figures as the last line, as JSON."""
    small = dict(IMAGE_SIZE=96, TEST_IMAGES=2000, SEED=seed)
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
    """One run in a fresh process: its figures."""
    command = [sys.executable, __file__, "--one", kind, architecture, str(seed),
               json.dumps(changes)]
    result = last_line(command)
    print(f"  {architecture} {kind}, seed {seed}: {result['times'][-1]:.1f} s, validation "
          f"{result['accuracies'][-1]:.1%}, test {result['test']:.1%}", flush=True)
    return result


def last_line(command: list[str]) -> dict[str, Any]:
    """What a process prints last, which is JSON."""
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(output.splitlines()[-1])


def compare(architecture: str, seeds: int, changes: dict[str, Any]) -> None:
    """Both loops in turn over the seeds; prints the table of medians and ratios."""
    rows: dict[str, list[tuple[float, float]]] = {}
    for seed in range(seeds):
        book = in_a_process(kind="textbook", architecture=architecture, seed=seed, changes=changes)
        ours = in_a_process(kind="trainer", architecture=architecture, seed=seed, changes=changes)
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
    waited = [100 * one["waited"] / one["times"][-1] for one in (book, ours)]
    return {
        "whole schedule (s)": (book["times"][-1], ours["times"][-1]),
        "until the textbook's final validation accuracy (s)": (book["times"][-1], reached[1]),
        "the same, textbook's first time too (s)": reached,
        "augmentation alone (images/s)": (book["augmented"], ours["augmented"]),
        "waiting for data (% of the time)": (waited[0], waited[1]),
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true",
                        help="300 images, 8 epochs, one backbone: under two minutes")
    parser.add_argument("--seeds", type=int, default=1, help="runs of each loop (default: 1)")
    parser.add_argument("--architectures", default="tf_efficientnet_lite0,resnet18",
                        help="comma-separated timm names")
    parser.add_argument("--images", type=int, default=1500, help="training images (default: 1500)")
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
        changes = dict(TRAIN_IMAGES=options.images, NUM_EPOCHS=options.epochs, DATA_DIR=folder,
                       OUTPUT_DIR=folder)
        for architecture in options.architectures.split(","):
            compare(architecture, options.seeds, changes)


if __name__ == "__main__":
    main()
