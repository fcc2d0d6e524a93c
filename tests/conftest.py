"""What the tests share: the script as a module, flags for quick runs, a tiny data set, a tiny network."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))
import advanced_techniques as at

CPU = torch.device("cpu")


def quick_flags(**changes) -> SimpleNamespace:
    """The script's flags, made small, with some changed."""
    small = dict(IMAGE_SIZE=32, TRAIN_IMAGES=40, TEST_IMAGES=20, BATCH_SIZE=8, GRADIENT_ACCUMULATION_STEPS=2)
    return SimpleNamespace(**at.FLAGS | small | changes)


def random_data(count: int = 40, side: int = 36, classes: int = 4, device: str = "cpu") -> at.Data:
    """Random images with random labels: half to train on, the rest for validation and test."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, classes, (count,), generator=generator)
    parts = dict(zip(("train", "validation", "test"), torch.arange(count).tensor_split([count // 2, 3 * count // 4]),
                     strict=True))
    return at.Data("random", [str(label) for label in range(classes)], images.to(device), labels.to(device),
                   {role: part.to(device) for role, part in parts.items()})


def model_of(architecture: str, pretrained: bool = True, classes: int = 4, **changes) -> at.Model:
    """A model with random weights that is treated as a pretrained one unless said otherwise."""
    flags = quick_flags(**changes)
    model = at.build_model(architecture, at.Weights(architecture, "test", None), classes, 0, flags, CPU)
    if pretrained:
        model.gradual, model.rate_decay = flags.GRADUAL_UNFREEZING, flags.LAYER_RATE_DECAY
    return model


class TinyNetwork(nn.Module):
    """A network without batch statistics, so that a batch may be cut anywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 5, stride=4)
        self.head = nn.Linear(6, 4)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.stem(images)).mean((2, 3)))


@pytest.fixture
def tiny() -> at.Model:
    torch.manual_seed(0)
    network = TinyNetwork()
    groups = dict(head=list(network.head.parameters()), stem=list(network.stem.parameters()))
    return at.Model("tiny", at.Weights("tiny", "test", None), network, groups, torch.full((3,), 0.5),
                    torch.full((3,), 0.5), False, 0.5, 0)


@pytest.fixture(scope="session")
def script() -> Path:
    assert timm.__version__
    return Path(at.__file__)
