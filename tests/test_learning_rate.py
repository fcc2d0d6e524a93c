"""The learning rate at points computed by hand, and that it reaches the optimiser."""

import math

import pytest
from conftest import CPU, model_of, quick_flags, random_data

import advanced_techniques as at


@pytest.fixture
def model(tiny):
    tiny.gradual = True
    return tiny


FLAGS = quick_flags(NUM_EPOCHS=20, BASE_LEARNING_RATE=0.01)


def rate(update, group, model, flags=FLAGS):
    return at.learning_rate(update, group, 10, model, flags)  # 10 updates an epoch, 50 a stage, 5 of warm-up


@pytest.mark.parametrize("start", [0, 50, 100, 150])
def test_warm_up_and_cosine_in_every_stage(model, start):
    assert rate(start, 0, model) == pytest.approx(0.01 / 5)
    assert rate(start + 4, 0, model) == pytest.approx(0.01)
    assert rate(start + 5, 0, model) == pytest.approx(0.01)
    assert rate(start + 20, 0, model) == pytest.approx(0.01 * (1 + math.cos(math.pi / 3)) / 2) == pytest.approx(0.0075)
    assert rate(start + 49, 0, model) == pytest.approx(0.01 * (1 + math.cos(math.pi * 44 / 45)) / 2)


def test_earlier_groups_learn_more_slowly(model):
    assert [rate(20, group, model) / rate(20, 0, model) for group in range(6)] == pytest.approx(
        [1, 0.5, 0.25, 0.125, 0.0625, 0.0625])


def test_one_cosine_without_stages(model):
    model.gradual = False
    assert rate(19, 0, model) == rate(20, 0, model) == pytest.approx(0.01)
    assert rate(110, 0, model) == pytest.approx(0.005)


def test_step_decay_at_a_half_and_three_quarters(model):
    flags = quick_flags(NUM_EPOCHS=20, BASE_LEARNING_RATE=0.01, USE_COSINE_SCHEDULE=False)
    assert [rate(update, 0, model, flags) for update in (0, 99, 100, 149, 150, 199)] == pytest.approx(
        [0.01, 0.01, 0.001, 0.001, 0.0001, 0.0001])


def test_the_rate_stays_attached_to_the_one_optimizer_through_every_stage():
    model, flags = model_of("resnet18"), quick_flags(NUM_EPOCHS=4)
    data = random_data()
    optimizer, scaler = at.make_optimizer(model, flags), at.make_scaler(CPU, False)
    for epoch in range(4):
        at.train_epoch(model, data, epoch, optimizer, scaler, False, flags)
        updates = 2  # 20 images in updates of at most 16
        for group in optimizer.param_groups:
            assert group["lr"] == at.learning_rate(epoch * updates + 1, group["layer"], updates, model, flags)
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        assert held == {id(parameter) for parameter in model.network.parameters()}
