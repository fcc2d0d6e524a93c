"""An epoch's plan, and features that are kept for the head: the same training, in less time."""

import copy
import dataclasses
import weakref

import pytest
import torch
from conftest import in_precision, random_data, run_of, tiny_run
from torch import nn

import advanced_techniques as at

BACKBONES = ["test_resnet", "test_convnext", "test_efficientnet", "test_vit", "densenet121"]


def order_of(plan: list[at.Part]) -> list[int]:
    return torch.cat([part.chosen for part in plan]).tolist()


def views_of(seed: int, epoch: int, **changes) -> torch.Tensor:
    run = dataclasses.replace(tiny_run(**changes), seed=seed)
    return torch.cat([part.views for part in at.deal_out(run, random_data(), epoch)])


@pytest.mark.parametrize(("images", "updates"), [(16, 1), (17, 2), (20, 2), (37, 3), (49, 4)])
def test_an_epoch_shows_each_image_once_and_no_update_rests_on_a_leftover(images, updates):
    run, data = run_of("test_resnet", BATCH_SIZE=8), random_data(count=2 * images)
    plan = at.plan_epoch(run, data, 19)
    assert sorted(order_of(plan)) == data.split["train"].tolist()
    sizes, micro = [len(part.chosen) for part in plan], []
    assert len(sizes) == updates == at.updates_an_epoch(data, run.flags)
    assert max(sizes) <= 16 and max(sizes) - min(sizes) <= 1
    for part in plan:
        batches = list(at.micro_batches(run, data, part))
        assert sum(len(labels) for _, labels, _ in batches) == part.images == len(part.views)
        micro += [len(labels) for _, labels, _ in batches]
        assert [last for _, _, last in batches] == [False] * (len(batches) - 1) + [True]
    assert 1 < min(micro) <= max(micro) <= 8


def test_a_single_image_is_in_no_micro_batch_of_its_own():
    run, data = run_of("test_resnet", BATCH_SIZE=2), random_data(count=10)  # five to train on
    sizes = []
    for part in at.deal_out(run, data, 0):
        sizes += [len(labels) for _, labels, _ in at.micro_batches(run, data, part)]
    assert sorted(sizes) == [2, 3]


def test_order_and_views_come_from_seed_and_epoch():
    run, data = tiny_run(), random_data()
    orders = [order_of(at.deal_out(run, data, epoch)) for epoch in range(5)]
    assert len(set(map(tuple, orders))) == 5 and orders[0] != sorted(orders[0])
    assert order_of(at.deal_out(run, data, 0)) == orders[0]
    run.seed = 1
    assert order_of(at.deal_out(run, data, 0)) not in orders
    views = views_of(0, 0)
    assert len(views.unique(dim=0)) == len(views) == 20 and torch.equal(views, views_of(0, 0))
    for other in (views_of(0, 1), views_of(1, 0)):
        assert (views != other).any(1).all()


def test_an_epoch_mirrors_some_images_and_none_where_left_is_not_right():
    widths = views_of(0, 0)[:, 0]  # of the window: below 0 where it is mirrored
    assert 0 < (widths < 0).sum() < 20
    assert (views_of(0, 0, HORIZONTAL_FLIP=False)[:, 0] > 0).all()


def count_passes(network: nn.Module) -> list[int]:
    """The sizes of the batches that its first layer sees from now on."""
    seen: list[int] = []
    first = next(module for module in network.modules() if isinstance(module, nn.Conv2d))
    first.register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    return seen


def trained(run: at.Run, data: at.Data, epochs: range) -> at.Run:
    for epoch in epochs:
        at.train_epoch(run, data, epoch)
        at.validate(run, data)
    return run


def assert_same_weights(left: at.Run, right: at.Run, start: dict[str, torch.Tensor]) -> None:
    own, other = (run.network.state_dict() for run in (left, right))
    torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-5)
    assert any(not torch.equal(start[name], one) for name, one in own.items())


@pytest.mark.parametrize("architecture", BACKBONES)
def test_kept_features_train_the_head_like_the_images_themselves_in_less_time(architecture):
    slow = dict(BASE_LEARNING_RATE=1e-3)  # AdamW makes a step of the rate's size of any rounding
    data, size = random_data(), 160 if architecture == "test_vit" else 32
    kept, images = (run_of(architecture, NUM_EPOCHS=20, FEATURE_VIEWS=3, IMAGE_SIZE=size,
                           MEMORY_GB=memory, **slow) for memory in (4.0, 0.0))
    start = {name: tensor.clone() for name, tensor in kept.network.state_dict().items()}
    kept_saw, images_saw = count_passes(kept.network), count_passes(images.network)
    trained(kept, data, range(4))
    trained(images, data, range(4))
    assert kept.kept and not images.kept
    assert_same_weights(kept, images, start)
    # Three views of 20 images and one of 10 validation images; two images tell whether it works.
    assert sum(images_saw) >= 4 * 30 and sum(kept_saw) <= 3 * 20 + 10 + 4


def test_memory_gb_is_the_limit_of_what_is_kept():
    data = random_data()
    needed = 4 * 512 * (20 * 5 + 10) / 1e9  # bytes of 5 views of 20 images, and of 10 images
    for memory, fits in ((1.01 * needed, True), (0.99 * needed, False)):
        run = run_of("resnet18", NUM_EPOCHS=20, FEATURE_VIEWS=5, MEMORY_GB=memory)
        at.train_epoch(run, data, 0)
        assert bool(run.kept) == fits


def test_views_take_turns_and_are_let_go_when_the_next_stage_begins():
    run, data, seen = run_of("test_resnet", NUM_EPOCHS=20, FEATURE_VIEWS=2), random_data(), []
    held = []
    for epoch in range(5):
        at.unfreeze(run, 1)
        plan = at.plan_epoch(run, data, epoch)
        seen.append(torch.cat([part.features for part in plan]))
        held.append(order_of(plan))
        assert torch.equal(torch.cat([part.views for part in plan]),
                           torch.cat([part.views for part in at.deal_out(run, data, epoch % 2)]))
    assert held[0] == held[2] == held[4] != held[1] == held[3]
    assert torch.equal(seen[0], seen[4]) and torch.equal(seen[1], seen[3])
    assert not torch.allclose(seen[0].sort(0)[0], seen[1].sort(0)[0])
    at.validate(run, data)
    alive = [weakref.ref(tensor) for tensor in run.kept.values()]
    del plan, seen
    at.train_epoch(run, data, 5)
    assert len(alive) == 3 and not any(reference() is not None for reference in alive)


def test_always_new_views_where_feature_views_is_0_and_for_networks_that_learn_as_a_whole():
    data = random_data()
    for run in (run_of("test_resnet", NUM_EPOCHS=20, FEATURE_VIEWS=0), tiny_run(NUM_EPOCHS=20)):
        orders = [order_of(at.plan_epoch(run, data, epoch)) for epoch in range(3)]
        assert orders[0] != orders[1] != orders[2] != orders[0] and not run.kept


@pytest.mark.parametrize("precision", [None, torch.bfloat16])
@pytest.mark.parametrize("architecture", ["test_resnet", "test_convnext"])
def test_validation_from_features_equals_validation_from_images(architecture, precision):
    run = in_precision(run_of(architecture, NUM_EPOCHS=20), precision)
    data = random_data()
    trained(run, data, range(2))
    seen = count_passes(run.network)
    from_features = at.validate(run, data)
    assert not seen and from_features.shape == (10, 4)
    whole = at.predict(run, data, "validation", [{}])[0]
    torch.testing.assert_close(from_features, whole, rtol=0, atol=1e-5)
    run.kept = {}
    torch.testing.assert_close(at.validate(run, data), whole, rtol=0, atol=0)
    at.train_epoch(run, data, 1)  # from features that are made again
    assert torch.allclose(at.validate(run, data).sum(1), torch.ones(10))


class Headed(nn.Module):
    """A small backbone and a head, and what else has a say in the answer."""

    def __init__(self, second: float = 0.0, in_place: bool = False, late: bool = False) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 5, stride=4)
        self.classifier = nn.Sequential(nn.SiLU(inplace=in_place), nn.Linear(6, 4))
        self.other = nn.Linear(6, 4)
        self.drop = nn.Dropout(0.5)
        self.second, self.late = second, late

    def get_classifier(self) -> nn.Module:
        return self.classifier

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = self.stem(images)
        if self.late:  # a map of answers, which are averaged behind the head
            return self.classifier(features.permute(0, 2, 3, 1)).mean((1, 2))
        pooled = self.drop(features.mean((2, 3)))
        answers = self.second * self.other(pooled)
        return answers + self.classifier(pooled)


@pytest.mark.parametrize(("how", "keeps"), [
    (dict(), True), (dict(second=0.5), False), (dict(in_place=True), False),
    (dict(late=True), False)], ids=["plain", "two heads", "in place", "not the last"])
def test_a_head_that_is_not_all_there_is_behind_the_features_learns_from_images(how, keeps):
    torch.manual_seed(0)
    network, blank = Headed(**how), tiny_run(pretrained=True, NUM_EPOCHS=8)
    groups = dict(head=list(network.classifier.parameters()), stem=list(network.stem.parameters()))
    run = dataclasses.replace(blank, network=network, groups=groups,
                              optimizer=at.make_optimizer(groups, blank.flags))
    data = random_data()
    network.other.requires_grad_(False)
    before = network.classifier[1].weight.clone()
    at.train_epoch(run, data, 0)
    assert all(module.training for module in network.classifier.modules())
    trained(run, data, range(1, 2))
    assert bool(run.kept) == keeps and not torch.equal(before, network.classifier[1].weight)
    whole = at.predict(run, data, "validation", [{}])[0]
    torch.testing.assert_close(at.validate(run, data), whole, rtol=0, atol=1e-5)
    if keeps:  # as the frozen part answers when it isn't in training: nothing is dropped
        plan = at.plan_epoch(run, data, 1)
        views = torch.cat([part.views for part in plan])
        features = network.stem(at.augment(data.images[order_of(plan)], views, run)).mean((2, 3))
        torch.testing.assert_close(run.kept[1], features, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("batch", "images"), [(4, 8), (8, 16), (32, 20)])
def test_a_trial_is_two_micro_batches_and_leaves_the_run_alone(batch, images):
    run = tiny_run(BATCH_SIZE=batch, GRADIENT_ACCUMULATION_STEPS=8)
    data = random_data()  # 20 to train on
    before = copy.deepcopy(run.network.state_dict())
    update, count = at.trial_update(run, data, groups=2)
    update()
    assert count == images and not run.optimizer.state
    assert all(torch.equal(before[name], value) for name, value in run.network.state_dict().items())
