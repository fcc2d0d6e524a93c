"""How long a run will take is said before it does, from what was measured."""

import dataclasses
import re

import pytest
import torch
from conftest import CPU, quick_flags, random_data, run_of

import advanced_techniques as at

LEARNING = {0: 0.011, 1: 0.02, 2: 0.03, 3: 0.04}  # seconds an image, by stage
PACE = at.Pace(LEARNING, answer=0.01, keeping={0, 1, 2, 3})


def timed(done: int = 0, slower: float = 1.0, **changes) -> tuple[at.Run, at.Data]:
    """A run of 20 epochs with some behind it, which took so many times what the pace says."""
    run, data = run_of("test_resnet", NUM_EPOCHS=20, **changes), random_data()
    run.pace = PACE
    for epoch in range(done):
        run.epochs.append(dict(seconds=slower * at.learning_seconds(epoch, run, data)))
    return run, data  # 20 images to train on, 10 to validate, 10 to test


def test_an_epoch_takes_its_stage_s_pace_and_validation():
    run, data = timed()
    run.pace = dataclasses.replace(PACE, keeping=set())
    for epoch, stage in ((0, 0), (5, 1), (10, 2), (19, 3)):
        assert at.learning_seconds(epoch, run, data) == pytest.approx(20 * LEARNING[stage])
        assert at.validation_seconds(epoch, run, data) == pytest.approx(10 * 0.01)


def test_kept_features_are_made_once():
    run, data = timed(FEATURE_VIEWS=2)
    learning = [at.learning_seconds(epoch, run, data) for epoch in (0, 1, 2)]
    assert learning == pytest.approx([20 * 0.011, 20 * 0.011, 20 * 0.001])
    validation = [at.validation_seconds(epoch, run, data) for epoch in (0, 1, 2)]
    assert validation == pytest.approx([10 * 0.01, 0, 0])


def test_what_is_to_come_shrinks_and_follows_how_long_it_really_took():
    run, data = timed()
    whole = at.seconds_to_come(run, data)
    run, data = timed(done=5)
    rest = at.seconds_to_come(run, data)
    behind = sum(at.learning_seconds(epoch, run, data) for epoch in range(5))
    behind += sum(at.validation_seconds(epoch, run, data) for epoch in range(5))
    assert rest == pytest.approx(whole - behind)
    early, data = timed(done=5, slower=3.0)
    late, data = timed(done=19, slower=3.0)
    on_time, data = timed(done=19)
    assert rest < at.seconds_to_come(early, data) < 1.5 * rest  # the head's epochs weigh little
    grown = at.seconds_to_come(late, data) / at.seconds_to_come(on_time, data)
    assert 2.5 < grown < 3


def test_the_trial_leaves_the_network_as_it_was():
    run, data = run_of("test_resnet", NUM_EPOCHS=20), random_data()
    before = {name: values.clone() for name, values in run.network.state_dict().items()}
    pace = at.measure_pace(run, data)
    assert set(pace.learning) == {0, 1, 2, 3} and min(pace.learning.values()) > 0
    assert pace.answer > 0 and pace.keeping == {0, 1, 2, 3}
    for name, values in run.network.state_dict().items():
        assert torch.equal(values, before[name]), name
    assert all(parameter.grad is None for parameter in run.network.parameters())
    whole = run_of("test_resnet", NUM_EPOCHS=20, GRADUAL_UNFREEZING=False)
    pace = at.measure_pace(whole, data)
    assert set(pace.learning) == {0} and not pace.keeping


def test_features_that_memory_does_not_hold_save_no_time():
    run, data = run_of("test_resnet", NUM_EPOCHS=20, MEMORY_GB=2e-5), random_data()
    keeping = at.measure_pace(run, data).keeping
    assert keeping and keeping < {0, 1, 2, 3}  # those of the head alone are small
    for epoch, stage in ((0, 0), (5, 1), (10, 2), (15, 3)):
        at.unfreeze(run, at.groups_learning(epoch, run))
        run.kept = None
        kept = at.keep_features(run, data, epoch)
        assert (kept.tail is not None) == (stage in keeping)


def test_the_models_after_a_resumed_one_take_their_whole_time(capsys, monkeypatch):
    run, data = timed(done=19, ARCHITECTURES=("test_resnet",) * 3)
    whole, _ = timed()
    run.name = "test_resnet_1"
    monkeypatch.setattr(at, "measure_pace", lambda run, data: PACE)
    monkeypatch.setattr(at, "duration", lambda seconds: f"{seconds:.3f}")
    at.say_time_to_come(run, data)
    in_all = at.seconds_to_come(run, data) + 2 * at.seconds_to_come(whole, data)
    assert f"about {in_all:.3f} in all" in capsys.readouterr().out


def test_the_ablation_is_announced_with_the_model_that_comes_before_it(capsys, monkeypatch):
    monkeypatch.setattr(at, "measure_pace", lambda run, data: PACE)
    run, data = timed(ARCHITECTURES=("test_resnet",), ABLATION=True)
    at.say_time_to_come(run, data)
    assert "the ablation comes after that." in capsys.readouterr().out
    run.name = "ablation_nothing_1"
    at.say_time_to_come(run, data)
    assert "comes after" not in capsys.readouterr().out


def test_training_is_the_same_with_the_trial_and_without():
    data = random_data()
    runs = [run_of("test_resnet", NUM_EPOCHS=4) for _ in range(2)]
    at.say_time_to_come(runs[0], data)
    for run in runs:
        at.train_epoch(run, data, 3)
    for left, right in zip(runs[0].network.state_dict().values(),
                           runs[1].network.state_dict().values(), strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize(("place", "said"), [
    (0, "in all if the 2 models after it take as long"),
    (1, "in all if the model after it takes as long"), (2, "test_resnet_3.")])
def test_the_run_is_estimated_from_the_models_to_come(place, said, capsys, monkeypatch):
    run, data = timed(ARCHITECTURES=("test_resnet",) * 3)
    run.name = f"test_resnet_{place + 1}"
    monkeypatch.setattr(at, "measure_pace", lambda run, data: PACE)
    at.say_time_to_come(run, data)
    printed = capsys.readouterr().out
    assert said in printed and f"About {at.duration(at.seconds_to_come(run, data))} for" in printed


def test_a_whole_training_says_how_long_before_and_after_each_epoch_but_the_last(capsys, tmp_path):
    data = random_data()
    flags = quick_flags(ARCHITECTURES=("test_resnet",), PRETRAINED="none", NUM_EPOCHS=3,
                        OUTPUT_DIR=str(tmp_path), USE_MIXED_PRECISION=False)
    job = at.Job(flags, CPU, data)
    run = at.new_run("test_resnet", at.Weights("test_resnet", "random", None), 0, job)
    at.train_and_test(run, data)
    printed = capsys.readouterr().out
    assert re.search(r"About \d+ s for test_resnet\.", printed)
    assert [line.endswith("to go") for line in printed.splitlines() if "  epoch " in line] == [
        True, True, False]


@pytest.mark.parametrize(("seconds", "said"), [(0.2, "1 s"), (89, "89 s"), (100, "2 min"),
                                               (3600, "60 min"), (9000, "2.5 h")])
def test_times_are_said_in_the_unit_that_suits_them(seconds, said):
    assert at.duration(seconds) == said


def test_nothing_is_promised_where_compiling_takes_the_time(capsys):
    run, data = timed(COMPILE=False)
    run.flags.COMPILE = True
    run.pace = None
    at.say_time_to_come(run, data)
    assert capsys.readouterr().out == "" and at.time_left(run, data) == ""


def test_the_run_also_tries_what_it_hands_over():
    run, data = timed(EXPORT=True)  # 10 test images
    assert at.trial_seconds(run, data) == pytest.approx(10 * 4 * 0.01)
    run.flags.USE_TTA = False
    assert at.trial_seconds(run, data) == pytest.approx(10 * 0.01)
    run.precision = torch.bfloat16  # then the models answer in FP32 as well
    assert at.trial_seconds(run, data) == pytest.approx(2 * 10 * 0.01)
    run.flags.EXPORT = False
    assert at.trial_seconds(run, data) == 0


def test_the_run_s_time_counts_every_model_s_share_of_that_trial(capsys, monkeypatch):
    run, data = timed(ARCHITECTURES=("test_resnet",) * 3, EXPORT=True)
    run.name = "test_resnet_1"
    monkeypatch.setattr(at, "measure_pace", lambda run, data: PACE)
    monkeypatch.setattr(at, "duration", lambda seconds: f"{seconds:.3f}")
    at.say_time_to_come(run, data)
    in_all = 3 * at.seconds_to_come(run, data) + 3 * 0.4
    assert f"about {in_all:.3f} in all" in capsys.readouterr().out


@pytest.mark.parametrize(("resume", "tail"), [
    (False, "."), (True, ". What an earlier run finished of it is not repeated.")])
def test_the_ablation_says_how_many_trainings_come_and_how_long_they_take(resume, tail):
    off = at.without_technique(quick_flags())
    variants = {"everything": {}}
    for name in ("cosine annealing", "gradual unfreezing"):
        variants[f"without {name}"] = off[name]
    variants["nothing"] = off["cosine annealing"] | off["gradual unfreezing"]
    epochs = [dict(kept_features=True)] * 2 + [dict(kept_features=False)] * 2
    first = at.Tested(dict(name="model", seconds=600.0, plain_seconds=60.0, tta_seconds=240.0,
                           epochs=epochs), speed=dict(freezing_saves=0.5))
    job = at.Job(quick_flags(ABLATION_SEEDS=3, RESUME=resume), CPU, random_data(), tested=[first])
    # 10 images to validate, 10 to test. A seed: everything, no cosine, in equal time, each of 600
    # and 240 seconds and two validations of 60; twice all layers, 1200, 240 and four validations.
    assert 3 * (3 * 960 + 2 * 1680) - 960 == 17_760  # seconds, or 4.9 hours
    said = at.ablation_to_come(job, variants)
    assert said == f"\nThe ablation trains model up to 14 more times: about 4.9 h{tail}"
    first.speed = None  # where it could not be measured, all layers take as long to train
    assert "14 more times: about 3.9 h." in at.ablation_to_come(job, variants)
