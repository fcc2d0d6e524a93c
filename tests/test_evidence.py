"""The report's evidence: intervals, paired gains, calibration, the ablation's paired runs."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
from conftest import CPU, quick_flags, random_data, run_of
from test_end_to_end import numbers, run

import advanced_techniques as at


def test_wilson_intervals_equal_published_ones():
    assert at.wilson_interval(0.5, 10) == pytest.approx([0.2366, 0.7634], abs=1e-4)
    assert at.wilson_interval(0.0, 10) == pytest.approx([0.0, 0.2775], abs=1e-4)
    assert at.wilson_interval(81 / 263, 263) == pytest.approx(
        [0.2553, 0.3662], abs=1e-4
    )  # Newcombe, 1998, table I


def test_wilson_intervals_cover_the_truth_about_95_times_in_100():
    draws = np.random.default_rng(0).binomial(200, 0.9, 2000)
    covered = [
        low <= 0.9 <= high for low, high in (at.wilson_interval(draw / 200, 200) for draw in draws)
    ]
    assert 0.93 < np.mean(covered) < 0.97


def probabilities_of(right: list[bool], data: at.Data, confidence: float = 0.7) -> torch.Tensor:
    """Probabilities that predict the label where `right` says so, else the next class."""
    labels = data.labels[data.split["test"]]
    predicted = torch.where(torch.tensor(right), labels, (labels + 1) % 4)
    rest = (1 - confidence) / 3
    return torch.full((len(labels), 4), rest).scatter(1, predicted[:, None], confidence)


def test_calibration_error_is_the_gap_between_confidence_and_accuracy():
    data = random_data(count=400)  # 100 to test on
    labels = data.labels[data.split["test"]]
    for share in (0, 30, 70, 100):
        answer = probabilities_of([index < share for index in range(100)], data)
        assert at.calibration_error(answer, labels) == pytest.approx(
            abs(0.7 - share / 100), abs=1e-6
        )
    halves = torch.cat(
        [
            probabilities_of([True] * 100, data, 0.9)[:50],
            probabilities_of([False] * 100, data, 0.5)[50:],
        ]
    )
    assert at.calibration_error(halves, labels) == pytest.approx(0.5 * 0.1 + 0.5 * 0.5, abs=1e-6)
    assert at.calibration_error(torch.nn.functional.one_hot(labels, 4).float(), labels) == 0
    # Of 15 bins two, though of 10 one, hold these: 0.62 all right, 0.68 all wrong.
    near = torch.cat([probabilities_of([True] * 100, data, 0.62)[:50],
                      probabilities_of([False] * 100, data, 0.68)[50:]])
    assert at.calibration_error(near, labels) == pytest.approx(0.5 * (0.38 + 0.68), abs=1e-6)


def test_mcnemars_exact_test_equals_the_binomial_counted_by_hand():
    data = random_data(count=40)  # 10 to test on
    first, second = (
        [True] * 6 + [False] * 4,
        [False] * 5 + [True] * 2 + [False] * 3,
    )  # 5 won, 1 lost
    labels = data.truth("test")
    result = at.paired_gain(probabilities_of(first, data), probabilities_of(second, data), labels)
    assert result["gain"] == pytest.approx(0.4)
    tosses = list(itertools.product((0, 1), repeat=6))
    assert result["gain_chance"] == pytest.approx(
        np.mean([abs(sum(toss) - 3) >= 2 for toss in tosses])
    )
    same = at.paired_gain(probabilities_of(first, data), probabilities_of(first, data), labels)
    assert same == dict(gain=0.0, gain_interval=[0.0, 0.0], gain_chance=1.0)


def test_a_paired_interval_is_narrower_than_two_independent_ones_and_that_of_a_bootstrap_by_hand():
    data, random = random_data(count=1200), np.random.default_rng(1)  # 300 to test on
    first = random.random(300) < 0.8
    second = first ^ (random.random(300) < 0.05)  # agrees on 95 %
    answers = [probabilities_of(list(right), data) for right in (first, second)]
    result = at.paired_gain(*answers, data.truth("test"))
    difference = first.astype(float) - second
    wanted = np.quantile(
        [difference[random.integers(0, 300, 300)].mean() for _ in range(4000)], [0.025, 0.975]
    )
    assert result["gain_interval"] == pytest.approx(wanted, abs=0.006)
    unpaired = math.sqrt(first.var() / 300 + second.var() / 300)
    assert np.diff(result["gain_interval"])[0] < 0.6 * 2 * 1.96 * unpaired


def test_the_crossed_interval_covers_the_truth_and_sees_both_seeds_and_images():
    random, covered = np.random.default_rng(2), []
    for _ in range(100):  # seeds and images both vary; the true change is 0.02
        chance = 0.02 + random.normal(0, 0.02, 3)[:, None] + random.normal(0, 0.2, 400)
        differences = np.where(random.random((3, 400)) < np.abs(chance), np.sign(chance), 0)
        _, (low, high) = at.crossed_interval(differences)
        covered.append(low <= 0.02 <= high)
    assert np.mean(covered) > 0.9
    images_only = np.tile(np.array([1.0] * 10 + [0.0] * 90), (3, 1))
    change, (low, high) = at.crossed_interval(images_only)
    assert change == pytest.approx(0.1) and high - low == pytest.approx(
        2 * 1.984 * math.sqrt(0.0909 / 100), rel=0.02
    )
    seeds_only = np.array([0.0, 1.0, 0.5])[:, None] * np.ones((1, 50))
    _, (low, high) = at.crossed_interval(seeds_only)
    assert high - low == pytest.approx(
        2 * 4.303 * 0.5 / math.sqrt(3), rel=0.03
    )  # Student's t with two degrees of freedom
    assert at.crossed_interval(np.zeros((3, 50))) == (0.0, [0.0, 0.0])


def fake_run(
    share_right: float, data: at.Data, seconds: float, memory: int | None, seed: int
) -> dict:
    right = np.random.default_rng(seed).permutation(100) < 100 * share_right
    return dict(final=probabilities_of(list(right), data), spent=seconds, memory=memory)


@pytest.mark.parametrize(
    ("on", "off", "verdict"),
    [(0.9, 0.5, "helps"), (0.5, 0.9, "hurts"), (0.8, 0.8, "no clear effect")],
)
def test_a_row_of_the_ledger_says_what_happened(on, off, verdict):
    data = random_data(count=400)
    runs = [
        [fake_run(share, data, seconds, memory, seed) for seed in range(3)]
        for share, seconds, memory in ((on, 10.0, 300), (off, 40.0, 600))
    ]
    row = at.ledger_row("a technique", *runs, data.truth("test"))
    assert row["verdict"] == verdict and row["change"] == pytest.approx(on - off)
    assert row["time_ratio"] == 0.25 and row["memory_ratio"] == 0.5
    assert row["interval"][0] <= row["change"] <= row["interval"][1]


def test_the_ablation_prints_a_ledger_and_reuses_what_was_trained(script, tmp_path):
    torch.manual_seed(0)
    torch.save(at.timm.create_model("test_resnet").state_dict(), tmp_path / "test_resnet.pth")
    arguments = [
        "--dataset=shapes",
        "--architectures=test_resnet",
        f"--pretrained={tmp_path}",
        f"--data-dir={tmp_path}",
        "--ablation=true",
        "--ablation-seeds=2",
    ]
    results, output = run(script, tmp_path / "out", *arguments)
    rows = {row["technique"]: row for row in results["ablation"]}
    assert set(rows) == {*at.without_technique(quick_flags()), "the same, in equal time",
                         "all of these together", "soft vote of 2 seeds"}
    measured = [name for name, row in rows.items() if not row["why"]]
    assert {
        "gradient accumulation",
        "cosine annealing",
        "gradual unfreezing",
        "test-time augmentation",
    } <= set(measured)
    for name in measured:
        row = rows[name]
        assert row["interval"][0] <= row["change"] <= row["interval"][1] and row["time_ratio"] > 0
        assert row["change"] == pytest.approx(row["accuracy_on"] - row["accuracy_off"], abs=1e-9)
    model = results["models"][0]
    assert "Ablation" in output and (tmp_path / "out" / "ablation.png").is_file()
    assert "The ablation trains test_resnet " in output
    kept = sorted(path.name for path in (tmp_path / "out" / "checkpoints").iterdir())
    assert (
        "ablation_without_cosine_annealing_2.pt" in kept and "ablation_everything_1.pt" not in kept
    )
    (
        tmp_path / "out" / "checkpoints" / "ablation_nothing_2.pt"
    ).unlink()  # as if interrupted in the last training
    again, output = run(script, tmp_path / "out", *arguments, "--resume=true")
    assert (
        output.count("epoch   1/4") == 1
        and output.count("holds the finished model") == len(kept) - 1
    )
    assert again["models"][0]["test_accuracy"] == model["test_accuracy"]
    clock = ("time_ratio", "memory_ratio")
    assert [
        {key: value for key, value in row.items() if key not in clock}
        for row in results["ablation"]
    ] == [
        {key: value for key, value in row.items() if key not in clock} for row in again["ablation"]
    ]


def test_the_first_run_is_the_first_seed_of_everything_on(monkeypatch):
    """The ablation must train exactly what it says: flags, seeds and split per run."""
    trained, data = [], random_data(count=400)

    def record(run, data, keep):
        assert not keep
        changed = {
            name: value for name, value in vars(run.flags).items() if value != vars(base)[name]
        }
        trained.append((run.name, run.seed, changed))
        return finished(run.seed, 10.0 if run.gradual else 25.0)

    def finished(seed, seconds=10.0):
        answer = probabilities_of([index < 70 for index in range(100)], data)
        entry = dict(
            name="test_resnet",
            architecture="test_resnet",
            seconds=seconds,
            plain_seconds=1.0,
            tta_seconds=4.0,
            training_tensor_bytes=None,
            validation_accuracy=0.5,
            precision="bfloat16",
            precision_why="",
            epochs=[dict(stage=4)],
        )
        return at.Tested(entry, answer, answer)

    base = quick_flags(ARCHITECTURES=("test_resnet",), ABLATION_SEEDS=2, SEED=5)
    monkeypatch.setattr(at, "train_and_test", record)
    weights = at.Weights("test_resnet", "", {})
    monkeypatch.setattr(
        at, "new_network", lambda name, classes, *_: at.timm.create_model(name, num_classes=classes)
    )
    rows = at.ablate(at.Job(base, CPU, data, weights=[weights], tested=[finished(5)]))
    everything_off = dict(
        USE_MIXED_PRECISION=False,
        BATCH_SIZE=16,
        GRADIENT_ACCUMULATION_STEPS=1,
        USE_COSINE_SCHEDULE=False,
        GRADUAL_UNFREEZING=False,
        USE_TTA=False,
    )
    wanted = [
        ("mixed_precision", dict(USE_MIXED_PRECISION=False)),
        ("gradient_accumulation", dict(BATCH_SIZE=16, GRADIENT_ACCUMULATION_STEPS=1)),
        ("cosine_annealing", dict(USE_COSINE_SCHEDULE=False)),
        ("gradual_unfreezing", dict(GRADUAL_UNFREEZING=False)),
    ]
    expected = []
    for seed in (1, 2):
        expected += [(f"ablation_everything_{seed}", 4 + seed, {})] * (seed > 1)
        expected += [(f"ablation_without_{name}_{seed}", 4 + seed, off) for name, off in wanted]
        expected += [(f"ablation_nothing_{seed}", 4 + seed, everything_off)]
    for seed in (1, 2):  # 8 of 20 epochs of all layers take as long
        in_time = dict(GRADUAL_UNFREEZING=False, NUM_EPOCHS=8)
        expected += [(f"ablation_in_equal_time_{seed}", 4 + seed, in_time)]
    assert trained == expected
    # Of several processes none may try for more memory, alone or together with the rest.
    trained.clear()
    monkeypatch.setattr(at, "PROCESSES", 2)
    monkeypatch.setattr(at, "from_first_process", lambda ask: ask())
    together = at.ablate(at.Job(base, CPU, data, weights=[weights], tested=[finished(5)]))
    assert at.OTHERS_TOGETHER in {row["technique"] for row in together}
    changed = [change for _, _, change in trained]
    assert dict(USE_COSINE_SCHEDULE=False, GRADUAL_UNFREEZING=False, USE_TTA=False) in changed
    for name in ("BATCH_SIZE", "USE_MIXED_PRECISION"):
        assert not any(name in change for change in changed)
    tta = next(row for row in rows if row["technique"] == "test-time augmentation")
    assert tta["time_ratio"] == pytest.approx(14 / 11) and tta["memory_ratio"] is None


@pytest.mark.parametrize(("seconds", "epochs"), [(39, 7), (41, 8), (5, 1), (4, None), (100, None)])
def test_equal_time_is_as_many_whole_epochs_of_all_layers_as_fit(seconds, epochs):
    flags = quick_flags(NUM_EPOCHS=20)
    runs = {"everything": [at.Tested(dict(seconds=seconds))],
            "without gradual unfreezing": [at.Tested(dict(seconds=100))]}
    variants = at.in_equal_time(flags, runs)
    shorter = dict(GRADUAL_UNFREEZING=False, NUM_EPOCHS=epochs)
    assert variants == ({"in equal time": shorter} if epochs else {})


def test_the_ledger_compares_at_equal_time_and_votes_with_the_best_on_validation():
    data = random_data(count=400)
    labels = data.truth("test")

    def model(right: set[int], validation: float, epochs: int = 20, seconds: float = 10.0):
        answer = probabilities_of([index in right for index in range(100)], data)
        entry = dict(architecture=str(len(right)), seconds=seconds,
                     plain_seconds=1.0, tta_seconds=1.0,
                     training_tensor_bytes=100, precision="float32", precision_why="FP32.",
                     validation_accuracy=validation, epochs=[{}] * epochs)
        return at.Tested(entry, answer.flip(1), answer)  # without TTA it answers otherwise

    weak, strong = set(range(60)), set(range(80))
    weights = at.Weights("test_resnet", "", {})
    chosen = [model(weak, 0.9), model(strong, 0.8)]  # on validation the weaker one is better
    job = at.Job(quick_flags(ABLATION_SEEDS=2), CPU, data, weights=[weights], tested=chosen)
    shorter = [model(set(range(50)), 0.9, 7, 9.0)] * 2
    runs = dict.fromkeys(("everything", "nothing"), chosen) | {"in equal time": shorter}
    for name in at.without_technique(job.flags):
        runs[f"without {name}"] = chosen
    rows = {row["technique"]: row for row in at.ledger(job, runs, {})}
    equal = rows["the same, in equal time"]
    assert equal["change"] == pytest.approx(0.7 - 0.5) and equal["epochs_off"] == 7
    assert equal["time_ratio"] == pytest.approx(1.1)
    for name in ("soft vote of 2 seeds", "soft vote of 2 architectures"):
        vote = at.soft_vote(tested.averaged for tested in chosen)
        right = (vote.argmax(1) == labels).double().mean().item()
        assert rows[name]["accuracy_off"] == pytest.approx(0.6)
        assert rows[name]["accuracy_on"] == pytest.approx(right)
        assert rows[name]["time_ratio"] == pytest.approx(2)
    del runs["in equal time"]
    rows = {row["technique"]: row for row in at.ledger(job, runs, {})}
    assert "no epoch, or no fewer" in rows["the same, in equal time"]["why"]
    for name in ("soft vote of 2 seeds", "soft vote of 2 architectures"):
        assert rows[name]["memory_ratio"] is None  # of models that are trained one by one
    chosen[1].entry["architecture"] = "60"  # as where one network stands in for both
    rows = {row["technique"]: row for row in at.ledger(job, runs, {})}
    assert "soft vote of 2 models" in rows and "soft vote of 2 architectures" not in rows
    chosen[0].entry["memory_ran_out"] = True  # so without accumulation, it was with it after all
    rows = {row["technique"]: row for row in at.ledger(job, runs, {})}
    assert "don't fit in memory" in rows["gradient accumulation"]["why"]
    assert rows["all of these together"]["memory_ran_out"]
    assert not any(row.get("memory_ran_out") for row in rows.values() if "all of" not in
                   row["technique"])


def memory_of_trial(**flags):
    """What training a model takes, as the trial before it finds on a CPU."""
    run, data = run_of("test_resnet", NUM_EPOCHS=4, **flags), random_data()
    run.pace = at.measure_pace(run, data)
    return at.training_tensors(run)


def test_memory_of_training_on_a_cpu_is_what_its_tensors_take_whatever_went_before():
    first = memory_of_trial()
    held = torch.ones(100_000_000)  # 400 MB that training doesn't answer for
    assert 0 < first < held.nbytes
    del held
    assert memory_of_trial() == first
    assert memory_of_trial(USE_COSINE_SCHEDULE=False) == first
    assert memory_of_trial(BATCH_SIZE=16, GRADIENT_ACCUMULATION_STEPS=1) > 1.05 * first
    assert memory_of_trial(GRADUAL_UNFREEZING=False) > first  # gradients of all layers


def test_kept_features_count_as_memory_of_training():
    run, data = run_of("test_resnet", NUM_EPOCHS=4), random_data()
    for epoch in (0, 2):
        at.train_epoch(run, data, epoch)
        at.validate(run, data)
        held = sum(features.nbytes for features in run.kept.features.values())
        assert held == at.kept_bytes(run.kept.border, 1, run, data)  # one epoch, so one view
    few = memory_of_trial(FEATURE_VIEWS=1)
    bytes_a_view = at.kept_bytes(run.kept.border, 2, run, data) - held
    assert memory_of_trial(FEATURE_VIEWS=500) > few + 400 * bytes_a_view
    assert memory_of_trial(FEATURE_VIEWS=500, MEMORY_GB=0.0) < few + bytes_a_view


def test_memory_of_work_is_that_of_its_fullest_moment():
    kept = []

    def work():
        large = torch.ones(1_000_000)
        kept.append(torch.ones(500_000))
        del large
        kept.append(torch.ones(700_000))

    assert at.allocated_at_peak(work) == 4 * 1_500_000
    assert at.memory_of(work, CPU) == 4 * 1_500_000


def test_memory_of_training_is_that_of_its_fullest_stage_with_gradients_and_averages(monkeypatch):
    taken = iter([400_000_000, 300_000_000, 200_000_000, 100_000_000])
    monkeypatch.setattr(at, "allocated_at_peak", lambda work: next(taken))
    run, data = run_of("test_resnet", NUM_EPOCHS=4, FEATURE_VIEWS=0), random_data()
    head = sum(parameter.nbytes for parameter in run.network.get_classifier().parameters())
    run.pace = at.measure_pace(run, data)
    assert at.training_tensors(run) == 400_000_000 + 3 * head  # the head alone learns there


def test_a_profiler_that_does_not_start_is_no_reason_to_stop(monkeypatch):
    def refuse(profile):
        raise RuntimeError("this build has no profiler")

    monkeypatch.setattr(torch.profiler.profile, "start", refuse)
    assert at.memory_of(int, CPU) is None
    assert memory_of_trial() is None


def test_an_accelerator_counts_its_memory_itself_above_what_was_held_before(monkeypatch):
    run, data = run_of("test_resnet", NUM_EPOCHS=2), random_data()
    monkeypatch.setattr(at, "reset_peak_memory", lambda device: 1000)
    monkeypatch.setattr(at, "peak_memory", lambda device: 1700)
    assert at.memory_of(int, torch.device("cuda")) == 700
    at.train_model(run, data)
    assert at.training_tensors(run) is None  # on a CPU the trial tells
    run.device = torch.device("cuda")
    assert at.training_tensors(run) == at.training_memory(run) == 700
    run.device = CPU
    del run.epochs[1]
    at.train_model(run, data)  # resumed: its averages of the gradients were there before
    run.device = torch.device("cuda")
    assert len(run.epochs) == 2 and at.training_tensors(run) is None
    monkeypatch.setattr(at, "reset_peak_memory", lambda device: None)
    assert at.memory_of(int, torch.device("cuda")) is None


def test_that_memory_ran_out_is_kept():
    run, data = run_of("test_resnet", NUM_EPOCHS=1), random_data()
    at.train_model(run, data)
    assert at.trained_entry(run, data)["memory_ran_out"] is False
    run.micro_batch //= 2
    assert at.trained_entry(run, data)["memory_ran_out"] is True


@pytest.mark.parametrize(("off", "precision", "trained"), [
    (("USE_TTA",), "bfloat16", True),
    (("USE_MIXED_PRECISION", "USE_COSINE_SCHEDULE", "GRADUAL_UNFREEZING"), "float32", False),
    (("USE_COSINE_SCHEDULE", "GRADUAL_UNFREEZING"), "float32", False),  # this CPU has no units
])
def test_nothing_is_trained_without_all_where_training_would_be_the_same(
        monkeypatch, capsys, off, precision, trained):
    data = random_data(count=400)
    names = []

    def record(run, data, keep):
        names.append(run.name)
        return finished()

    def finished():
        answer = probabilities_of([True] * 100, data)
        entry = dict(name="test_resnet", architecture="test_resnet", seconds=1.0,
                     plain_seconds=1.0, tta_seconds=1.0, training_tensor_bytes=None,
                     validation_accuracy=0.5, precision=precision, precision_why="",
                     epochs=[dict(stage=1)])
        return at.Tested(entry, answer, answer)

    monkeypatch.setattr(at, "train_and_test", record)
    monkeypatch.setattr(
        at, "new_network", lambda name, classes, *_: at.timm.create_model(name, num_classes=classes)
    )
    flags = quick_flags(ARCHITECTURES=("test_resnet",), ABLATION_SEEDS=1,
                        GRADIENT_ACCUMULATION_STEPS=1, **dict.fromkeys(off, False))
    job = at.Job(flags, CPU, data, weights=[at.Weights("test_resnet", "", {})], tested=[finished()])
    rows = at.ablate(job)
    assert ("ablation_nothing_1" in names) == trained
    assert any(row["technique"] == at.ALL_TOGETHER for row in rows) == trained
    assert trained or names == []
    assert ("nothing to train" in capsys.readouterr().out) != trained


@pytest.mark.parametrize("processes", [1, 2])
def test_what_can_not_be_measured_is_said_with_the_reason(processes, monkeypatch):
    monkeypatch.setattr(at, "PROCESSES", processes)
    flags = quick_flags(USE_COSINE_SCHEDULE=False)
    first = at.Tested(dict(precision="float32", precision_why="It has no units."))
    job = at.Job(flags, CPU, weights=[at.Weights("test_resnet", "", None)], tested=[first])
    unused = at.unused_techniques(job)
    assert unused.pop("cosine annealing") == "it is off in this run"
    assert "It has no units." in unused.pop("mixed precision")
    assert "never frozen" in unused.pop("gradual unfreezing")
    if processes > 1:  # without it, memory may run out, which ends the job
        assert "several processes" in unused.pop("gradient accumulation")
    assert not unused
    first.entry["precision"] = "bfloat16"
    unused = at.unused_techniques(job)
    assert ("several processes" in unused.get("mixed precision", "")) == (processes > 1)


def test_of_one_seed_the_ledger_says_what_its_intervals_leave_out():
    row = dict(technique="a technique", why="", accuracy_on=0.9, accuracy_off=0.8, change=0.1,
               interval=[0.05, 0.15], time_ratio=1.0, memory_ratio=None, verdict="helps")
    model = dict(name="model", stands_in_for=None)
    for seeds, said, unsaid in ((1, "what another seed would", "chance alone"),
                                (3, "chance alone", "what another seed would")):
        table = at.ablation_table(dict(ablation=[row], models=[model],
                                       flags=at.FLAGS | dict(ABLATION_SEEDS=seeds)))
        assert said in " ".join(table) and f"model, {seeds} seed{'s' * (seeds > 1)}: " in table[0]
        assert unsaid not in " ".join(table)


def test_a_vote_is_said_to_be_taken_once_where_there_is_one():
    row = dict(technique="soft vote of 12 architectures", why="", accuracy_on=0.9, accuracy_off=0.8,
               change=0.1, interval=[0.05, 0.15], time_ratio=1.0, memory_ratio=None,
               verdict="helps")
    results = dict(models=[dict(name="model", stands_in_for=None)], flags=at.FLAGS)
    table = at.ablation_table(results | dict(ablation=[row]))
    heading = next(line for line in table if line.startswith("technique"))
    shown = next(line for line in table if line.startswith("soft vote"))
    assert heading.index("verdict") == shown.index("helps")  # the name fits its column
    assert "not what other seeds would" in " ".join(table)
    single = at.ablation_table(results | dict(ablation=[row | dict(technique="cosine annealing")]))
    assert "vote" not in " ".join(single)


def test_images_that_all_changed_alike_tell_nothing_of_others():
    for right in (1.0, -1.0):
        change, interval = at.crossed_interval(np.full((1, 2), right))
        assert change == right and at.verdict_of(interval) == "no clear effect"
    assert at.crossed_interval(np.zeros((1, 2))) == (0.0, [0.0, 0.0])


def test_the_plot_of_the_ledger_shows_changes_and_names_a_single_technique():
    def row(technique, change):
        return dict(technique=technique, why="", change=change, verdict="helps",
                    interval=[change - 0.01, change + 0.02])

    rows = [row("cosine annealing", 0.02), row("the same, in equal time", 0.05),
            row("all of these together", 0.04), row("soft vote of 3 seeds", 0.03)]
    figure = at.plot_ablation(rows)
    assert figure._suptitle.get_text().startswith("Cosine annealing helps most: +2.0")
    lines = figure.axes[0].lines[1:]  # behind the line at zero, an interval and a dot each
    for place, entry in enumerate(rows):
        ends, dot = lines[2 * place : 2 * place + 2]
        assert list(ends.get_xdata()) == pytest.approx([100 * end for end in entry["interval"]])
        assert list(dot.get_xdata()) == pytest.approx([100 * entry["change"]])


def healthy() -> dict:
    """Results about which there is nothing to say; tests make one thing wrong at a time."""
    epochs = [
        dict(
            epoch=epoch + 1,
            stage=epoch // 5 + 1,
            validation_accuracy=0.8 + 0.002 * epoch,
            train_accuracy=0.9,
            validation_loss=0.6 - 0.01 * epoch,
            loss_scale=65536.0,
            waiting_seconds=0.1,
            seconds=10.0,
        )
        for epoch in range(20)
    ]
    models = [
        dict(
            name=name,
            stands_in_for=None,
            precision="float16",
            precision_why="FP16.",
            epochs=epochs,
            test_accuracy=0.9,
            validation_accuracy=0.84,
            tta_gain=0.01,
            tta_gain_interval=[0.001, 0.02],
        )
        for name in ("first", "second")
    ]
    speed = dict(
        double_batch_images_per_second=110.0,
        images_per_second_all_layers=100.0,
        mixed_images_per_second=100.0,
        fp32_images_per_second=50.0,
        mixed_peak_bytes=None,
        fp32_peak_bytes=None,
    )
    return dict(
        dataset=dict(memory_mapped=False, validation_images=1000, classes=["cat", "dog"],
                     train_images_by_class=[300, 100]),
        models=models,
        speed=dict(first=speed, second=dict(speed)),
        flags=at.FLAGS,
        ablation=None,
        ensemble=dict(accuracy=0.92, gain_interval=[0.01, 0.03], shared_errors=0.4,
                      tta_gain_over_best=0.02, tta_gain_interval=[0.01, 0.03]),
        classes=[dict(name=f"class {index}", images=100, errors=10) for index in range(4)],
    )


def change_epochs(results, change):
    for model in results["models"]:
        model["epochs"] = [entry | change(entry) for entry in model["epochs"]]


FINDINGS = {
    "waited for images": lambda results: change_epochs(
        results, lambda entry: dict(waiting_seconds=2.0)
    ),
    "don't fill the device": lambda results: results["speed"]["first"].update(
        double_batch_images_per_second=140.0
    ),
    "mixed precision brings nothing here (": lambda results: results["speed"]["first"].update(
        fp32_images_per_second=99.0
    ),
    "mixed precision brings nothing here. This CPU": lambda results: (
        results["models"][0].update(
            precision="float32", precision_why="This CPU has no units for 16 bits."
        ),
        results["speed"]["first"].update(mixed_images_per_second=None),
    ),
    "loss scale keeps falling": lambda results: change_epochs(
        results, lambda entry: dict(loss_scale=2.0 ** -entry["epoch"])
    ),
    "overfits": lambda results: change_epochs(
        results,
        lambda entry: dict(
            validation_loss=0.5 + 0.01 * entry["epoch"],
            train_accuracy=0.99,
            validation_accuracy=0.7 + 0.001 * entry["epoch"],
        ),
    ),
    "underfits": lambda results: change_epochs(
        results,
        lambda entry: dict(
            train_accuracy=0.3 + 0.02 * entry["epoch"],
            validation_accuracy=0.3 + 0.02 * entry["epoch"],
        ),
    ),
    "stage 3 brought no": lambda results: change_epochs(
        results,
        lambda entry: dict(
            validation_accuracy={1: 0.8, 2: 0.85, 3: 0.84, 4: 0.88}[entry["stage"]],
            train_accuracy=0.95,
        ),
    ),
    "TTA hurts": lambda results: results["models"][0].update(
        tta_gain=-0.02, tta_gain_interval=[-0.03, -0.01]
    ),
    "ensemble does not clearly help": lambda results: results["ensemble"].update(
        tta_gain_over_best=0.0, tta_gain_interval=[-0.01, 0.01]
    ),
    "Class class 2 carries": lambda results: results["classes"][2].update(errors=60),
}


def test_nothing_is_said_where_nothing_is_wrong():
    assert at.diagnose(healthy()) == []


@pytest.mark.parametrize("finding", FINDINGS)
def test_each_finding_is_made_where_it_applies_and_names_a_flag(finding):
    results = healthy()
    FINDINGS[finding](results)
    found = at.diagnose(results)
    assert len(found) == 1 and finding in found[0], found
    assert any(
        name in found[0] or "--" + name.lower().replace("_", "-") in found[0] for name in at.FLAGS
    )


def test_few_validation_images_are_not_read_too_closely():
    for finding in ("overfits", "underfits"):
        results = healthy()
        FINDINGS[finding](results)
        results["dataset"]["validation_images"] = 10  # one image is ten points
        assert at.diagnose(results) == []


def test_the_ablation_does_not_advise_itself():
    results = healthy()
    results["ablation"] = [dict(technique="gradual unfreezing")]
    FINDINGS["stage 3 brought no"](results)
    first, second = at.diagnose(results)
    assert first.startswith("first: ") and "the ledger tells" in first
    assert second.startswith("second: ") and "a ledger of its own would tell" in second
    assert "--ablation" not in first + second
    results["ablation"] = None
    (both,) = at.diagnose(results)
    assert "--ablation true measures, for the first of ARCHITECTURES" in both


def test_what_several_models_share_is_said_once():
    results = healthy()
    FINDINGS["waited for images"](results)
    assert at.diagnose(results)[0].startswith("first, second: ")


def test_waiting_is_measured_where_images_come_slowly(monkeypatch, tiny):
    data = random_data()

    class Slow(torch.Tensor):
        def __getitem__(self, index):
            at.time.sleep(0.05)
            return super().__getitem__(index).as_subclass(torch.Tensor)

    data.images = data.images.as_subclass(Slow)
    entry = at.train_epoch(tiny, data, 0)
    assert 0.15 <= entry["waiting_seconds"] <= entry["seconds"]


def test_numbers_of_two_equal_runs_are_compared_without_the_clock():
    first = dict(seconds=1.0, accuracy=0.5, nested=[dict(plain_seconds=2.0, loss=1.0)])
    assert numbers(first) == dict(accuracy=0.5, nested=[dict(loss=1.0)]) and json.dumps(
        numbers(first)
    )
