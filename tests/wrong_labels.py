"""Does train_labels.csv find wrong labels? python tests/wrong_labels.py

Not a test. Gives every twentieth training image of the default job on Fashion-MNIST another label,
trains EfficientNet-Lite0 on them, and counts how many of the images whose label it believes least
are those. Some labels of Fashion-MNIST are wrong or arguable anyway, which counts against it.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import advanced_techniques as at

SHARE = 0.05


def plant(data: at.Data) -> torch.Tensor:
    """Give a share of the training images another class's label; bool [n], which ones."""
    generator = torch.Generator().manual_seed(7)
    train = data.split["train"]
    planted = torch.zeros(len(train), dtype=torch.bool)
    planted[torch.randperm(len(train), generator=generator)[: round(SHARE * len(train))]] = True
    chosen = train[planted]
    others = torch.randint(1, len(data.classes), (len(chosen),), generator=generator)
    data.labels[chosen] = (data.labels[chosen] + others) % len(data.classes)
    return planted


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        flags = at.read_flags(["--dataset", "fashion_mnist", "--architectures",
                               "tf_efficientnet_lite0", "--output-dir", folder])
        job = at.Job(flags, at.choose_device())
        job.flags = at.small_profile(flags, job.device)
        job.weights = at.find_all_weights(job.flags)
        job.data, _ = at.load_data(job.flags, job.device)
        planted = plant(job.data)
        run = at.new_run("lite0", job.weights[0], job.flags.SEED, job)
        tested = at.train_and_test(run, job.data)
    order = tested.belief.argsort(stable=True)
    for share in (0.025, SHARE, 0.1, 0.2):
        front = planted[order][: round(share * len(planted))]
        found = int(front.sum())
        print(f"the first {share:.1%} of the list: {found} of {len(front)} are planted "
              f"(precision {found / len(front):.1%}, recall {found / int(planted.sum()):.1%})")


if __name__ == "__main__":
    main()
