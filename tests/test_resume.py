"""Interruption: a run killed at any moment ends in the same numbers; Ctrl-C ends cleanly."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import CPU, in_precision, quick_flags, random_data, run_of
from test_end_to_end import numbers

import advanced_techniques as at

# Imports the script once and forks a child for each run: importing PyTorch takes seconds.
SERVER = """
import io, json, os, signal, sys, threading, time, traceback
sys.path.insert(0, sys.argv[1])
import advanced_techniques as at

def die(*arguments, **options):
    os.kill(os.getpid(), signal.SIGKILL)

def wait(*arguments, **options):
    print("waiting for a signal", flush=True)
    time.sleep(100)

def die_during(function, delay):
    def doomed(*arguments, **options):
        timer = threading.Timer(delay, die)
        timer.daemon = True
        timer.start()
        return function(*arguments, **options)
    return doomed

def end_at(call, function, end):
    def counted(*arguments, **options):
        counted.left -= 1
        return (end if counted.left < 0 else function)(*arguments, **options)
    counted.left = call
    return counted

def save_half(call, function):
    def counted(state, stream):
        counted.left -= 1
        if counted.left < 0:
            whole = io.BytesIO()
            function(state, whole)
            stream.write(whole.getvalue()[: len(whole.getvalue()) // 2])
            stream.flush()
            die()
        function(state, stream)
    counted.left = call
    return counted

for line in sys.stdin:
    job = json.loads(line)
    child = os.fork()
    if child == 0:
        output = os.open(job["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's & has it ignored
        place, call = job["die"] or (None, 0)
        if place == "save":
            at.torch.save = save_half(call, at.torch.save)
        elif place:
            owner = at.Path if place == "replace" else at
            work = getattr(owner, place)
            end = wait if job["wait"] else die
            if job["delay"] is not None:
                end = die_during(work, job["delay"])
            setattr(owner, place, end_at(call, work, end))
        try:
            at.main(job["arguments"])
        except SystemExit as stopped:
            sys.stdout.flush()
            os._exit(stopped.code)
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
        sys.stdout.flush()
        os._exit(0)
    print(child, flush=True)
    sys.stdin.readline()  # until the test wants the end: until then the child keeps its number
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def start(script, tmp_path_factory):
    """start(folder, resume, die) gives a run's process id, a function that waits, its output.

    die is where it kills itself: a function, and how many calls of it go well before. With wait it
    prints a line there instead, and waits for a signal; with delay it goes on, and dies so many
    seconds later, in the middle of whatever it is doing then.
    """
    shared = tmp_path_factory.mktemp("shared")
    for name in ("test_resnet", "test_efficientnet"):
        torch.save(
            at.timm.create_model(name).state_dict(), shared / f"{name}.pth"
        )  # "pretrained", so stages apply
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER, str(script.parent)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )

    def begin(folder, resume=False, die=None, wait=False, delay=None, **changes):
        flags = (
            dict(
                dataset="shapes",
                architectures="test_resnet,test_efficientnet",
                pretrained=shared,
                image_size=32,
                train_images=60,
                test_images=20,
                num_epochs=8,
                export=False,
                batch_size=8,
                gradient_accumulation_steps=2,
                output_dir=folder,
                data_dir=shared,
                resume=resume,
            )
            | changes
        )
        arguments = [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]
        folder.mkdir(exist_ok=True)
        job = dict(arguments=arguments, die=die, wait=wait, delay=delay)
        job["output"] = str(folder / "output.txt")
        server.stdin.write(json.dumps(job) + "\n")
        server.stdin.flush()
        child = int(server.stdout.readline())

        def ended():
            server.stdin.write("\n")
            server.stdin.flush()
            return int(server.stdout.readline())

        return SimpleNamespace(
            child=child, wait=ended, output=lambda: (folder / "output.txt").read_text()
        )

    yield begin
    server.stdin.close()
    server.wait()


@pytest.fixture(scope="module")
def whole(start, tmp_path_factory):
    """The folder of a run that was never interrupted, and how long it took."""
    folder = tmp_path_factory.mktemp("whole")
    run = start(folder)
    started = time.monotonic()  # the script is imported by now
    assert run.wait() == 0, run.output()
    return folder, time.monotonic() - started


def assert_same(folder, other):
    first, second = (json.loads((place / "results.json").read_text()) for place in (folder, other))
    for results in (first, second):
        results["flags"].pop("RESUME")
    assert numbers(first) == numbers(second)
    for name in ("test_resnet", "test_efficientnet"):
        states = [
            torch.load(place / "checkpoints" / f"{name}.pt", weights_only=True)
            for place in (folder, other)
        ]
        for kind in ("plain", "averaged"):
            assert torch.equal(*(state["finished"][kind] for state in states))
        left, right = (state["state_dict"] for state in states)
        assert left.keys() == right.keys() and all(
            torch.equal(left[key], right[key]) for key in left
        )
    assert not list((other / "checkpoints").glob("*.tmp")) and not list(
        (other / "checkpoints").glob("*.damaged")
    )


# Eight epochs, two a stage, four updates an epoch, a save after each: moments of each kind.
MOMENTS = [
    ("train_epoch", 0),
    ("train_epoch", 3),
    ("train_epoch", 4),
    ("apply_update", 2),
    ("apply_update", 9),
    ("apply_update", 18),
    ("apply_update", 30),
    ("validate", 5),
    ("save", 0),
    ("save", 1),
    ("save", 6),
    ("save", 8),
    ("replace", 0),
    ("replace", 4),
    ("predict", 11),
    ("measure_speed", 0),
    ("train_epoch", 8),
    ("save", 12),
    ("write_report", 0),
    ("plot_curves", 0),
]


@pytest.mark.parametrize("die", MOMENTS, ids=lambda die: f"{die[0]}-{die[1]}")
def test_a_run_killed_at_any_step_ends_in_the_same_numbers(start, whole, tmp_path, die):
    folder = tmp_path / "killed"
    assert start(folder, die=die).wait() == -signal.SIGKILL
    resumed = start(folder, resume=True)
    assert resumed.wait() == 0, resumed.output()
    assert_same(whole[0], folder)


@pytest.mark.parametrize("seed", range(3))
def test_a_run_killed_again_and_again_at_random_ends_in_the_same_numbers(
    start, whole, tmp_path, seed
):
    moments, kills, folder = random.Random(seed), 0, tmp_path / "killed"
    while True:
        place, calls = moments.choice([("apply_update", 12), ("validate", 4), ("replace", 5)])
        die = (place, moments.randrange(1, calls)) if kills < 8 else None
        run = start(folder, resume=True, die=die, delay=moments.uniform(0, 0.05))
        if run.wait() == 0:
            break
        kills += 1
        assert kills <= 8, run.output()
    assert kills >= 3
    assert_same(whole[0], folder)


def test_finished_models_are_not_trained_again(start, whole, tmp_path):
    folder = tmp_path / "killed"
    assert (
        start(folder, die=("train_epoch", 9)).wait() == -signal.SIGKILL
    )  # in the second model's second epoch
    resumed = start(folder, resume=True)
    assert resumed.wait() == 0
    assert "test_resnet.pt holds the finished model" in resumed.output()
    assert "test_efficientnet.pt holds 1 of 8 epochs" in resumed.output()
    assert resumed.output().count("epoch   1/8") == 0 and resumed.output().count("epoch   2/8") == 1


def interrupt(run, folder):
    """Send Ctrl-C once the run says that it waits for it."""
    output = folder / "output.txt"
    while not (output.exists() and "waiting for a signal" in output.read_text()):
        time.sleep(0.01)
    os.kill(run.child, signal.SIGINT)


def test_ctrl_c_leaves_a_checkpoint_and_a_partial_report(start, whole, tmp_path):
    folder = tmp_path / "stopped"
    run = start(folder, die=("train_epoch", 10), wait=True)  # in the second model's third epoch
    interrupt(run, folder)
    assert run.wait() == 130, run.output()
    output = run.output()
    assert "Traceback" not in output and "--resume true" in output and "PARTIAL REPORT" in output
    results = json.loads((folder / "results.json").read_text())
    finished, stopped = results["models"]
    assert finished["test_accuracy"] is not None and stopped["test_accuracy"] is None
    assert len(stopped["epochs"]) == 2 and results["ensemble"]["accuracy"] is None
    resumed = start(folder, resume=True)
    assert resumed.wait() == 0
    assert_same(whole[0], folder)


def test_ctrl_c_before_training_ends_with_code_130_too(start, tmp_path):
    run = start(tmp_path / "stopped", die=("load_data", 0), wait=True)
    interrupt(run, tmp_path / "stopped")
    assert run.wait() == 130 and "Traceback" not in run.output()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (dict(base_learning_rate=0.001), "BASE_LEARNING_RATE was 0.004 and is 0.001"),
        (dict(image_size=40), "IMAGE_SIZE"),
        (dict(seed=1), "SEED"),
        (dict(train_images=50), "TRAIN_IMAGES"),
        (dict(batch_size=4), "BATCH_SIZE"),
        (dict(use_tta=False), "USE_TTA"),
    ],
)
def test_a_checkpoint_from_other_flags_is_refused_by_name(start, whole, changes, named):
    before = (whole[0] / "results.json").read_bytes()
    run = start(whole[0], resume=True, **changes)
    assert run.wait() == 2 and named in run.output() and "Traceback" not in run.output()
    assert (whole[0] / "results.json").read_bytes() == before


def saved_run(tmp_path):
    """A checkpoint after two epochs of a small model: its file, the run, its data."""
    run = run_of("test_resnet", NUM_EPOCHS=2, OUTPUT_DIR=str(tmp_path), RESUME=True,
                 ARCHITECTURES=("test_resnet",))
    data = random_data()
    at.train_model(run, data)
    return tmp_path / "checkpoints" / "test_resnet.pt", run, data


def test_other_images_are_refused(tmp_path, capsys):
    _, run, data = saved_run(tmp_path)
    assert at.read_checkpoint(run, data)["epochs"] == run.epochs
    data.fingerprint = 1
    with pytest.raises(SystemExit):
        at.read_checkpoint(run, data)
    assert "checksum of the images" in capsys.readouterr().err


def test_what_an_earlier_ablation_left_is_trained_anew(tmp_path, capsys):
    _, run, data = saved_run(tmp_path)
    run.name = "ablation_without_cosine_annealing_2"
    at.save_checkpoint(run, data)
    assert at.read_checkpoint(run, data)["epochs"] == run.epochs  # of this one: gone on from
    run.flags.NUM_EPOCHS = 8  # nobody set what the time of the first training decides
    assert at.read_checkpoint(run, data) is None
    said = capsys.readouterr().out
    assert "comes from an earlier ablation" in said and "starts from its first epoch" in said


def test_a_checkpoint_of_another_recipe_is_refused(tmp_path, capsys, monkeypatch):
    _, run, data = saved_run(tmp_path)
    monkeypatch.setattr(at, "RECIPE", at.RECIPE + 1)
    with pytest.raises(SystemExit):
        at.read_checkpoint(run, data)
    assert "the recipe's version was" in capsys.readouterr().err


def test_the_fingerprint_tells_images_labels_and_splits_apart():
    def fingerprint(**changes):
        return at.load_data(quick_flags(DATASET="shapes", **changes), CPU)[0].fingerprint

    assert (
        fingerprint() == fingerprint()
        and len({fingerprint(), fingerprint(SEED=1), fingerprint(TRAIN_IMAGES=41)}) == 3
    )


def test_an_older_checkpoint_of_a_later_model_is_refused_before_the_first_one_trains(
        tmp_path, capsys):
    names = ("test_resnet", "test_vit")
    older = run_of("test_vit", NUM_EPOCHS=2, OUTPUT_DIR=str(tmp_path), ARCHITECTURES=names)
    data = random_data()
    at.save_checkpoint(older, data)
    run = run_of("test_resnet", NUM_EPOCHS=4, OUTPUT_DIR=str(tmp_path), ARCHITECTURES=names,
                 RESUME=True)
    with pytest.raises(SystemExit):
        at.resume(run, data)
    message = capsys.readouterr().err
    assert "test_vit.pt comes from another run: NUM_EPOCHS was 2 and is 4." in message
    at.save_checkpoint(run, data)  # the first one's own is there, and of this run
    with pytest.raises(SystemExit):
        at.resume(run, data)
    assert "test_vit.pt comes from another run" in capsys.readouterr().err
    at.checkpoint_file(older).write_bytes(b"damaged")  # set aside when its turn comes
    assert at.resume(run, data) is None
    at.checkpoint_file(older).unlink()
    older.flags.NUM_EPOCHS = 4  # the same run, if with another seed and other weights
    older.seed = 1
    at.save_checkpoint(older, data)
    assert at.resume(run, data) is None


def test_the_micro_batch_may_change_if_the_update_stays(tmp_path):
    _, run, data = saved_run(tmp_path)
    run.flags.BATCH_SIZE //= 2
    run.flags.GRADIENT_ACCUMULATION_STEPS *= 2
    assert at.read_checkpoint(run, data)


@pytest.mark.parametrize("damage", ["empty", "half", "noise", "foreign"])
def test_a_damaged_checkpoint_is_set_aside_and_said(tmp_path, capsys, damage):
    file, run, data = saved_run(tmp_path)
    content = file.read_bytes()
    noise = random.Random(0).randbytes(len(content))
    if damage == "foreign":
        torch.save(dict(weights=[1, 2, 3]), file)
    else:
        file.write_bytes(dict(empty=b"", half=content[: len(content) // 2], noise=noise)[damage])
    assert at.read_checkpoint(run, data) is None
    assert (
        "damaged" in capsys.readouterr().out
        and file.with_suffix(".damaged").is_file()
        and not file.exists()
    )


def test_a_checkpoint_can_run_no_code(tmp_path):
    class Trap:
        def __reduce__(self):
            return (pytest.fail, ("a checkpoint ran code",))

    file, run, data = saved_run(tmp_path)
    torch.save(dict(run=Trap()), file)
    assert at.read_checkpoint(run, data) is None


def test_a_full_disk_leaves_the_last_checkpoint_whole(tmp_path, capsys, monkeypatch):
    file, run, data = saved_run(tmp_path)
    content = file.read_bytes()

    def full(state, stream):
        stream.write(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    run.epochs.clear()
    with pytest.raises(SystemExit) as stopped:
        at.train_model(run, data)
    message = capsys.readouterr().err
    assert stopped.value.code == 2 and "No space left" in message and "--output-dir" in message
    assert file.read_bytes() == content and [path.name for path in file.parent.iterdir()] == [
        file.name
    ]


@pytest.mark.parametrize("mixed", [torch.float16, torch.bfloat16, None])
def test_dropout_and_the_loss_scale_go_on_where_they_were(tmp_path, monkeypatch, mixed):
    data, train_epoch = random_data(), at.train_epoch

    def fresh(folder):
        flags = dict(NUM_EPOCHS=4, GRADUAL_UNFREEZING=False, RESUME=True)
        run = in_precision(run_of("test_resnet", OUTPUT_DIR=str(tmp_path / folder), **flags), mixed)
        if mixed == torch.float16:  # a scale that has to fall before the interruption
            run.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20)
        run.network.drop_rate = 0.5
        return run

    whole = fresh("whole")
    at.train_model(whole, data)
    assert mixed != torch.float16 or (
        whole.epochs[1]["loss_scale"] < 2**20 and whole.epochs[3]["skipped_updates"] == 0
    )

    def interrupted(run, data, epoch):
        if epoch == 2:
            raise KeyboardInterrupt
        return train_epoch(run, data, epoch)

    monkeypatch.setattr(at, "train_epoch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        at.train_model(fresh("stopped"), data)
    monkeypatch.setattr(at, "train_epoch", train_epoch)
    torch.rand(7)  # whatever else drew random numbers since
    resumed = fresh("stopped")
    assert at.resume(resumed, data) is None and len(resumed.epochs) == 2
    at.train_model(resumed, data)
    assert [entry["loss_scale"] for entry in resumed.epochs] == [
        entry["loss_scale"] for entry in whole.epochs
    ]
    left, right = whole.network.state_dict(), resumed.network.state_dict()
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_weights_that_the_hub_has_meanwhile_cached_are_the_same_weights(tmp_path):
    run, data = run_of("test_resnet"), random_data()
    signatures = []
    for how in ("downloaded", "cached"):
        found = at.Found(str(tmp_path / "model.safetensors"), how)
        run.weights = at.make_weights("resnet18", quick_flags(PRETRAINED="auto"), found)
        assert how in run.weights.origin
        signatures.append(at.run_signature(run, data))
    assert signatures[0] == signatures[1]
