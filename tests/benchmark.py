"""How much faster than the loop that everybody teaches? Not a test: python tests/benchmark.py [--quick] [--help]

Runs the textbook fine-tuning loop and the project's trainer in turn, each run in a process of its own, on the same
images, backbone, weights, schedule and seeds, and prints medians over the seeds and their ratios. Times vary from
machine to machine; the ratios are what counts. Fashion-MNIST where it is installed, else the built-in shapes.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
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
        self.images, self.labels = data.images[data.split[role]], data.labels[data.split[role]]
        self.transform = transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.images[index].permute(1, 2, 0).numpy())), int(self.labels[index])


def textbook_loader(data: at.Data, role: str, model: at.Model, flags: SimpleNamespace) -> DataLoader:
    """A DataLoader with workers and torchvision's transforms, the same ones as the trainer's own augmentation."""
    normalise = transforms.Normalize(model.mean.tolist(), model.std.tolist())
    size = flags.IMAGE_SIZE
    if role == "train":
        steps = [transforms.RandomResizedCrop(size, scale=(0.4, 1.0)), transforms.RandomHorizontalFlip(),
                 transforms.RandomRotation(10), transforms.ColorJitter(0.3, 0.3, 0.5), transforms.ToTensor(), normalise,
                 transforms.RandomErasing(0.25)]
    else:
        steps = [transforms.Resize((size, size)), transforms.ToTensor(), normalise]
    return DataLoader(PerImage(data, role, transforms.Compose(steps)), batch_size=flags.BATCH_SIZE,
                      shuffle=role == "train", num_workers=2)


def textbook_accuracy(network: nn.Module, loader: DataLoader) -> float:
    network.eval()
    correct = 0
    with torch.no_grad():
        for inputs, labels in loader:
            correct += (network(inputs).argmax(1) == labels).sum().item()
    return correct / len(loader.dataset)


def textbook(model: at.Model, data: at.Data, flags: SimpleNamespace) -> dict[str, Any]:
    """The plain loop: NCHW, frozen BatchNorm in training mode, .item() on every batch, a new optimiser a stage."""
    network = model.network.to(memory_format=torch.contiguous_format)
    loaders = {role: textbook_loader(data, role, model, flags) for role in ("train", "validation", "test")}
    criterion = nn.CrossEntropyLoss(label_smoothing=flags.LABEL_SMOOTHING)
    accumulation, stage, waited, times, accuracies = flags.GRADIENT_ACCUMULATION_STEPS, None, 0.0, [], []
    started = time.perf_counter()
    for epoch in range(flags.NUM_EPOCHS):
        if at.stage_of(epoch, flags.NUM_EPOCHS, True) != stage:
            stage = at.stage_of(epoch, flags.NUM_EPOCHS, True)
            groups = list(model.groups.values())
            for index, parameters in enumerate(groups):
                for parameter in parameters:
                    parameter.requires_grad = index <= stage
            optimizer = torch.optim.AdamW(
                [dict(params=parameters, lr=flags.BASE_LEARNING_RATE * flags.LAYER_RATE_DECAY ** index)
                 for index, parameters in enumerate(groups[:stage + 1])], weight_decay=flags.WEIGHT_DECAY)
            updates = -(-len(loaders["train"]) // accumulation)
            scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates * flags.NUM_EPOCHS // at.STAGES)
        network.train()
        running_loss, correct, batches = 0.0, 0, iter(loaders["train"])
        for step in range(len(loaders["train"])):
            asked = time.perf_counter()
            inputs, labels = next(batches)
            waited += time.perf_counter() - asked
            outputs = network(inputs)
            loss = criterion(outputs, labels)
            (loss / accumulation).backward()
            if (step + 1) % accumulation == 0 or step + 1 == len(loaders["train"]):
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
    return dict(times=times, accuracies=accuracies, waited=waited, memory=memory, test=test,
                augmented=images_per_second(len(data.split["train"]), lambda: exhaust(loaders["train"])))


def trainer(model: at.Model, data: at.Data, flags: SimpleNamespace) -> dict[str, Any]:
    """The project's own training, watched from outside: no line of it knows that it is timed."""
    waited, times, plan, produce, validate = [], [], at.epoch_plan, at.micro_batches, at.validate

    def timed_plan(*arguments: Any) -> Any:
        asked = time.perf_counter()
        answer = plan(*arguments)
        waited.append(time.perf_counter() - asked)
        return answer

    def timed_batches(*arguments: Any) -> Any:
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

    at.epoch_plan, at.micro_batches, at.validate = timed_plan, timed_batches, timed_validate
    mixed, _ = at.choose_precision(model.network, model.mean.device, flags)
    started = time.perf_counter()
    epochs = at.train_model(model, data, mixed, flags)
    memory = peak_memory()
    test = at.score(at.predict(model, data, "test", [{}], mixed, flags)[0], data, "test")[1]

    def augment_epoch() -> None:
        windows, views = plan(data, 0, 0, flags)
        exhaust(produce(data, torch.cat(windows), views, model, flags))

    return dict(times=times, accuracies=[entry["validation_accuracy"] for entry in epochs], waited=sum(waited),
                memory=memory, test=test, augmented=images_per_second(len(data.split["train"]), augment_epoch))


def exhaust(batches: Iterable) -> None:
    """Take every batch and keep none."""
    for _ in batches:
        pass


def images_per_second(images: int, epoch: Callable[[], Any]) -> float:
    """Speed of an epoch that does nothing but augment its images: the median of five."""
    return statistics.median(images / at.seconds_of(epoch, CPU) for _ in range(5))


def peak_memory() -> float:
    """Peak resident memory of this process in bytes; a DataLoader's workers are not counted."""
    return at.peak_memory(CPU) or math.nan


def one_run(kind: str, architecture: str, seed: int, changes: dict[str, Any]) -> None:
    """One run in this process; prints its figures as the last line, as JSON."""
    device = CPU if kind == "textbook" else at.choose_device()
    if device.type != "cpu":
        raise SystemExit("tests/benchmark.py compares on a CPU; hide the accelerator to run it here.")
    flags = SimpleNamespace(**at.FLAGS | dict(IMAGE_SIZE=96, TEST_IMAGES=2000, SEED=seed) | changes)
    try:
        at.fashion_mnist(Path(flags.DATA_DIR), download=False)
        flags.DATASET = "fashion_mnist"
    except RuntimeError:
        flags.DATASET = "shapes"
    data, _ = at.load_data(flags, device)
    shipped = at.stand_in_weights() if architecture == at.STAND_IN else None
    weights = at.Weights(architecture, "", dict(state_dict=shipped) if shipped else None)
    model = at.build_model(architecture, weights, len(data.classes), seed, flags, device)
    model.gradual, model.rate_decay = True, flags.LAYER_RATE_DECAY  # random weights are timed like pretrained ones
    print(json.dumps(dict(textbook=textbook, trainer=trainer)[kind](model, data, flags) | dict(dataset=data.name)))


def run(kind: str, architecture: str, seed: int, changes: dict[str, Any]) -> dict[str, Any]:
    """One run in a fresh process: its figures."""
    command = [sys.executable, __file__, "--one", kind, architecture, str(seed), json.dumps(changes)]
    result = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])
    print(f"  {architecture} {kind}, seed {seed}: {result['times'][-1]:.1f} s, validation {result['accuracies'][-1]:.1%}, "
          f"test {result['test']:.1%}", flush=True)
    return result


def compare(architecture: str, seeds: int, changes: dict[str, Any]) -> None:
    """Both loops in turn over the seeds; prints the table of medians and ratios."""
    rows: dict[str, list[tuple[float, float]]] = {}
    for seed in range(seeds):
        book, ours = (run(kind, architecture, seed, changes) for kind in ("textbook", "trainer"))
        target = book["accuracies"][-1]
        reached = [next((spent for spent, accuracy in zip(one["times"], one["accuracies"], strict=True)
                         if accuracy >= target), float("inf")) for one in (book, ours)]
        for name, values in {
                "whole schedule (s)": (book["times"][-1], ours["times"][-1]),
                "until the textbook's final validation accuracy (s)": (book["times"][-1], reached[1]),
                "the same, textbook's first time too (s)": tuple(reached),
                "augmentation alone (images/s)": (book["augmented"], ours["augmented"]),
                "waiting for data (% of the time)": tuple(100 * one["waited"] / one["times"][-1] for one in (book, ours)),
                "peak memory (MB)": (book["memory"] / 1e6, ours["memory"] / 1e6),
                "final validation accuracy (%)": (100 * target, 100 * ours["accuracies"][-1]),
                "test accuracy (%)": (100 * book["test"], 100 * ours["test"])}.items():
            rows.setdefault(name, []).append(values)
    print(f"\n{architecture}, {book['dataset']}, medians over {seeds} seed(s)\n"
          f"{'':52}{'textbook':>10}{'trainer':>10}{'ratio':>8}")
    for name, pairs in rows.items():
        book, ours = (statistics.median(column) for column in zip(*pairs, strict=True))
        ratio = statistics.median(second / first for first, second in pairs)
        print(f"{name:52}{book:10.1f}{ours:10.1f}{ratio:8.2f}")
    print(flush=True)


def cost(architecture: str, changes: dict[str, Any]) -> None:
    """Seconds and peak memory of the trainer as images grow in number and in size; four epochs, one a stage."""
    print(f"{architecture}: four epochs, one in each stage\n{'images':>8}{'pixels':>8}{'seconds':>9}{'ms/image':>10}{'MB':>8}")
    for count, size in ((1000, 96), (2000, 96), (4000, 96), (8000, 96), (2000, 64), (2000, 128)):
        settings = changes | dict(TRAIN_IMAGES=count, IMAGE_SIZE=size, NUM_EPOCHS=4, TEST_IMAGES=200)
        command = [sys.executable, __file__, "--one", "trainer", architecture, "0", json.dumps(settings)]
        result = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])
        spent = result["times"][-1]
        print(f"{count:8,}{size:8}{spent:9.1f}{1000 * spent / (4 * count):10.2f}{result['memory'] / 1e6:8.0f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="300 images, 8 epochs, one backbone: under two minutes")
    parser.add_argument("--seeds", type=int, default=1, help="runs of each loop (default: 1)")
    parser.add_argument("--architectures", default=f"{at.STAND_IN},resnet18", help="comma-separated timm names")
    parser.add_argument("--images", type=int, default=1500, help="training images (default: 1500)")
    parser.add_argument("--epochs", type=int, default=20, help="epochs, a multiple of 4 (default: 20)")
    parser.add_argument("--cost", action="store_true", help="instead: time and memory as the work grows")
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        kind, architecture, seed, changes = options.one
        one_run(kind, architecture, int(seed), json.loads(changes))
        return
    if options.quick:
        options.images, options.epochs, options.architectures = 300, 8, at.STAND_IN
    with tempfile.TemporaryDirectory() as folder:
        changes = dict(TRAIN_IMAGES=options.images, NUM_EPOCHS=options.epochs, DATA_DIR=folder)
        for architecture in options.architectures.split(","):
            if options.cost:
                cost(architecture, changes)
            else:
                compare(architecture, options.seeds, changes)


if __name__ == "__main__":
    main()
