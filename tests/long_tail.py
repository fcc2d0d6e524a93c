"""What is BALANCE worth where classes are rare? python tests/long_tail.py

Not a test. Cuts a long tail from the training images of Fashion-MNIST: 1,000 of the first class
down to 10 of the last, as in Cui et al. (2019), "Class-Balanced Loss". The head of
EfficientNet-Lite0 learns from them without BALANCE and with it, with three seeds, which also draw
the images. Both answer 2,000 others of the training images; the test images are not looked at.
"""

from __future__ import annotations

import copy
import statistics
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
import advanced_techniques as at

MOST, LEAST = 1000, 10  # images of the commonest class, and of the rarest
VALIDATION = 2000
SEEDS = 3
T_QUANTILE = 4.303  # 97.5 % of Student's t, two degrees of freedom


def long_tailed(labels: np.ndarray, pool: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    """Indices to train on, ever fewer of each class, and to validate on, drawn from a pool."""
    pool = np.random.default_rng(seed).permutation(pool)
    validation, pool = pool[:VALIDATION], pool[VALIDATION:]
    classes = labels.max() + 1
    train = []
    for label in range(classes):
        count = round(MOST * (LEAST / MOST) ** (label / (classes - 1)))
        train.append(pool[labels[pool] == label][:count])
    return dict(train=np.concatenate(train), validation=validation, test=validation[:0])


def fashion_job(seed: int, folder: str) -> at.Job:
    """The script's own job on Fashion-MNIST, with a long tail."""
    flags = at.read_flags(["--dataset", "fashion_mnist", "--architectures", "tf_efficientnet_lite0",
                           "--seed", str(seed), "--output-dir", folder])
    device = at.choose_device()
    flags = at.small_profile(flags, device)
    source, _ = at.find_source(flags)
    parts = long_tailed(source.labels, np.flatnonzero(source.roles == "train"), seed)
    everything = np.concatenate(list(parts.values()))
    images = at.within_size(source.read(everything), flags)
    labels = torch.from_numpy(source.labels[everything]).long()
    cuts = torch.arange(len(everything)).split([len(part) for part in parts.values()])
    split = dict(zip(parts, cuts, strict=True))
    data = at.Data(source.name, list(source.classes), images, labels, split)
    return at.Job(flags, device, data, weights=at.find_all_weights(flags))


def recalls(run: at.Run, data: at.Data) -> Tensor:
    """The head's training, then the recall of each class of the validation images, [classes]."""
    for epoch in at.stage_epochs(0, run):
        at.train_epoch(run, data, epoch)
    labels = data.truth("validation")
    right = at.is_right(at.validate(run, data), labels).double()
    return torch.stack([right[labels == label].mean() for label in range(len(data.classes))])


def interval(differences: list[float]) -> str:
    """Their mean in points, and its 95 % interval over the seeds."""
    mean = statistics.mean(differences)
    half = T_QUANTILE * statistics.stdev(differences) / len(differences) ** 0.5
    return f"{100 * mean:+.1f} ({100 * (mean - half):+.1f} to {100 * (mean + half):+.1f})"


def main() -> None:
    balanced, plain = [], []
    for seed in range(SEEDS):
        with tempfile.TemporaryDirectory() as folder:
            job = fashion_job(seed, folder)
            counts = torch.bincount(job.data.truth("train")).double()
            found = {}
            for balance in (False, True):
                job.flags.BALANCE = balance
                run = at.new_run("lite0", job.weights[0], seed, copy.copy(job))
                found[balance] = recalls(run, job.data)
        gain = found[True] - found[False]
        balanced.append(float(gain.mean()))
        plain.append(float((gain * counts).sum() / counts.sum()))  # as if answers had the tail, too
        print(f"seed {seed}: balanced accuracy {found[False].mean():.1%} without BALANCE, "
              f"{found[True].mean():.1%} with it", flush=True)
    print(f"With BALANCE, {SEEDS} seeds, points: balanced accuracy {interval(balanced)}, plain "
          f"accuracy {interval(plain)}")


if __name__ == "__main__":
    main()
