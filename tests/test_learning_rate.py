"""The learning rate at points computed by hand, and that it reaches the optimiser."""

import math

import pytest
from conftest import CPU, quick_flags, random_data, run_of, tiny_run

import advanced_techniques as at


def run_with(**changes) -> at.Run:
    run = tiny_run(**dict(NUM_EPOCHS=20, BASE_LEARNING_RATE=0.01) | changes)
    run.weights = at.Weights("tiny", "test", {})  # counts as pretrained
    return run


@pytest.fixture
def run() -> at.Run:
    return run_with()


def rate(update, layer, run):
    # 10 updates an epoch, 50 a stage, 5 of warm-up
    return at.learning_rate(update, layer, 10, run)


@pytest.mark.parametrize("start", [0, 50, 100, 150])
def test_warm_up_and_cosine_in_every_stage(run, start):
    assert rate(start, 0, run) == pytest.approx(0.01 / 5)
    assert rate(start + 4, 0, run) == pytest.approx(0.01)
    assert rate(start + 5, 0, run) == pytest.approx(0.01)
    third = 0.01 * (1 + math.cos(math.pi / 3)) / 2
    assert rate(start + 20, 0, run) == pytest.approx(third) == pytest.approx(0.0075)
    assert rate(start + 49, 0, run) == pytest.approx(0.01 * (1 + math.cos(math.pi * 44 / 45)) / 2)


@pytest.mark.parametrize("decay", [0.5, 0.3, 1.0])
def test_earlier_groups_learn_more_slowly(decay):
    run = run_with(LAYER_RATE_DECAY=decay)
    shares = [rate(20, layer, run) / rate(20, 0, run) for layer in range(6)]
    assert shares == pytest.approx([1, decay, decay**2, decay**3, decay**4, decay**4])


def test_a_pretrained_model_is_built_with_the_rates_of_its_flags():
    state = at.timm.create_model("test_resnet").state_dict()
    flags = quick_flags(LAYER_RATE_DECAY=0.25, BASE_LEARNING_RATE=0.02, NUM_EPOCHS=4)
    weights = at.Weights("test_resnet", "test", dict(state_dict=state))
    run = at.new_run("test_resnet", weights, 0, at.Job(flags, CPU, random_data()))
    at.train_epoch(run, random_data(), 3)
    rates = {group["layer"]: group["lr"] for group in run.optimizer.param_groups}
    shares = [rates[layer] / rates[0] for layer in range(4)]
    assert shares == pytest.approx([1, 0.25, 0.25**2, 0.25**3])
    peak = at.learning_rate(6, 0, 2, run)  # the first update after the warm-up of the last stage
    assert peak == pytest.approx(0.02)


def test_one_cosine_without_stages():
    run = run_with(GRADUAL_UNFREEZING=False)
    assert rate(19, 0, run) == rate(20, 0, run) == pytest.approx(0.01)
    assert rate(110, 0, run) == pytest.approx(0.005)


def test_step_decay_at_a_half_and_three_quarters_of_each_stage():
    run = run_with(USE_COSINE_SCHEDULE=False)
    for stage in range(4):  # of 50 updates
        positions = [stage * 50 + place for place in (0, 24, 25, 37, 38, 49)]
        assert [rate(update, 0, run) for update in positions] == pytest.approx(
            [0.01, 0.01, 0.001, 0.001, 0.0001, 0.0001])


def test_step_decay_over_the_whole_run_where_there_are_no_stages():
    run = run_with(USE_COSINE_SCHEDULE=False, GRADUAL_UNFREEZING=False)
    assert [rate(update, 0, run) for update in (0, 99, 100, 149, 150, 199)] == pytest.approx(
        [0.01, 0.01, 0.001, 0.001, 0.0001, 0.0001])


def test_the_rate_stays_attached_to_the_one_optimizer_through_every_stage():
    run, data = run_of("resnet18", NUM_EPOCHS=4), random_data()
    optimizer = run.optimizer
    for epoch in range(4):
        at.train_epoch(run, data, epoch)
        updates = 2  # 20 images in updates of at most 16
        for group in optimizer.param_groups:
            wanted = at.learning_rate(epoch * updates + 1, group["layer"], updates, run)
            assert group["lr"] == wanted
        assert run.optimizer is optimizer
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        assert held == {id(parameter) for parameter in run.network.parameters()}
