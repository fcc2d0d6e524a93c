"""Where a run finds itself: folders in use, outputs that nobody reads, notebooks, Ctrl-C."""

import io
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import CPU, quick_flags, random_data
from test_data import make_folder

import advanced_techniques as at

SMALL = ["--export=false", "--architectures=test_resnet", "--pretrained=none",
         "--image-size=32", "--num-epochs=1", "--batch-size=8", "--gradient-accumulation-steps=1"]


@pytest.fixture(scope="module")
def pets(tmp_path_factory) -> Path:
    return make_folder(tmp_path_factory.mktemp("images") / "pets")


@pytest.fixture
def small(pets, tmp_path) -> list[str]:
    """The arguments of a run that takes a second or two."""
    return [*SMALL, f"--dataset={pets}", f"--output-dir={tmp_path / 'out'}",
            f"--data-dir={tmp_path / 'data'}"]


@pytest.fixture
def other_run(tmp_path) -> Iterator[int]:
    """Another process that has taken OUTPUT_DIR and holds it: its number."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        lock = at.check_output(quick_flags(OUTPUT_DIR=str(tmp_path / "out")))
        os.write(writing, b"taken" if lock else b"none")
        time.sleep(60)
        os._exit(0)
    os.close(writing)
    try:
        assert os.read(reading, 10) == b"taken"
        yield child
    finally:
        os.close(reading)
        end(child)


def end(child: int) -> None:
    """Kill a child process, if it is still there."""
    try:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    except (ProcessLookupError, ChildProcessError):
        pass


def refusal(capsys, work: Callable[[], object]) -> str:
    with pytest.raises(SystemExit) as stopped:
        work()
    message = capsys.readouterr().err
    assert stopped.value.code == 2 and "Traceback" not in message
    return message


# ---- Two runs in one OUTPUT_DIR ----


def test_a_second_run_in_the_folder_is_refused_while_the_first_lives(
        other_run, small, tmp_path, capsys):
    before = sorted(path.name for path in (tmp_path / "out").rglob("*"))
    message = refusal(capsys, lambda: at.main(small))
    assert f"OUTPUT_DIR = {tmp_path / 'out'}: another run is writing there" in message
    assert f"process {other_run} on " in message and "--output-dir" in message
    assert sorted(path.name for path in (tmp_path / "out").rglob("*")) == before


def test_a_run_that_was_killed_leaves_the_folder_free(other_run, tmp_path):
    end(other_run)
    assert (tmp_path / "out" / at.LOCK_FILE).is_file()  # it had no time to remove it
    with at.check_output(quick_flags(OUTPUT_DIR=str(tmp_path / "out"))):
        assert f"process {os.getpid()} on " in (tmp_path / "out" / at.LOCK_FILE).read_text()


def test_the_folder_is_taken_until_the_report_is_written_and_free_again_then(
        small, tmp_path, monkeypatch, capsys):
    flags, refused, write_report = at.read_flags(small), [], at.write_report

    def write(*arguments):
        refused.append(refusal(capsys, lambda: at.check_output(flags)))
        write_report(*arguments)

    monkeypatch.setattr(at, "write_report", write)
    at.main(small)
    assert len(refused) == 1 and "another run" in refused[0]
    assert not (tmp_path / "out" / at.LOCK_FILE).exists()
    at.check_output(flags).close()


@pytest.mark.parametrize("end", [KeyboardInterrupt, SystemExit, RuntimeError])
def test_however_a_run_ends_the_folder_is_free_while_the_process_lives_on(
        end, small, monkeypatch):
    """A notebook keeps its process, and the traceback with all that it refers to."""
    def stop(*arguments):
        raise end

    monkeypatch.setattr(at, "load_data", stop)
    with pytest.raises((SystemExit, RuntimeError)) as kept:
        at.main(small)
    flags = at.read_flags(small)
    at.check_output(flags).close()
    assert kept


def test_only_the_first_of_several_processes_takes_the_folder(other_run, tmp_path, monkeypatch):
    monkeypatch.setattr(at, "RANK", 1)
    assert at.check_output(quick_flags(OUTPUT_DIR=str(tmp_path / "out"))) is None


def test_prediction_needs_no_folder_of_its_own(other_run, small, pets, tmp_path, capsys):
    message = refusal(capsys, lambda: at.main([*small, f"--predict={pets}"]))
    assert "another run" not in message and "Train first" in message


def test_a_file_system_without_locks_is_no_hindrance(tmp_path, monkeypatch):
    def unsupported(lock):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(at, "lock_now", unsupported)
    assert at.check_output(quick_flags(OUTPUT_DIR=str(tmp_path / "out"))) is None


def test_without_fcntl_the_locks_of_windows_are_taken(tmp_path, monkeypatch):
    taken = []

    def locking(number, mode, count):
        if taken:
            raise PermissionError(13, "Permission denied")
        taken.append(os.lseek(number, 0, os.SEEK_CUR))

    windows = SimpleNamespace(locking=locking, LK_NBLCK=2)
    monkeypatch.setitem(sys.modules, "fcntl", None)
    monkeypatch.setitem(sys.modules, "msvcrt", windows)
    with (tmp_path / "lock").open("a+b") as lock:
        at.lock_now(lock)
        with pytest.raises(BlockingIOError):
            at.lock_now(lock)
    assert taken[0] > 1000  # the first bytes stay readable


def test_a_lock_that_was_removed_since_it_was_opened_is_none(tmp_path, monkeypatch):
    flags, lock_now = quick_flags(OUTPUT_DIR=str(tmp_path / "out")), at.lock_now
    removed = []

    def late(lock):
        lock_now(lock)
        if not removed:
            removed.append((tmp_path / "out" / at.LOCK_FILE).unlink())

    monkeypatch.setattr(at, "lock_now", late)
    lock = at.check_output(flags)
    assert os.fstat(lock.fileno()).st_nlink == 1


# ---- Outputs that nobody reads, and other surroundings of a notebook ----


class Gone(io.StringIO):
    """A pipe whose reader went away; a file on a full disk fails likewise."""

    def write(self, text: str) -> int:
        raise BrokenPipeError(32, "Broken pipe")


def closed() -> io.StringIO:
    stream = io.StringIO()
    stream.close()
    return stream


OUTPUTS = {"none": lambda: None, "closed": closed, "gone": Gone}


@pytest.mark.parametrize("output", OUTPUTS)
def test_a_run_goes_on_without_an_output_and_writes_its_files(output, small, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdout", OUTPUTS[output]())
    monkeypatch.setattr(sys, "stderr", OUTPUTS[output]())
    at.main(small)
    assert "REPORT" in (tmp_path / "out" / "report.txt").read_text()
    assert len(list((tmp_path / "out").glob("*.png"))) == 6
    at.main([*small, f"--predict={small[-3].partition('=')[2]}"])
    assert (tmp_path / "out" / "predictions.csv").is_file()
    with pytest.raises(SystemExit) as stopped:
        at.main(["--batch-size=0"])
    assert stopped.value.code == 2
    with pytest.raises(SystemExit) as stopped:
        at.main(["--help"])
    assert not stopped.value.code


def test_an_output_that_knows_only_how_to_write_is_written_to(monkeypatch):
    written = []
    monkeypatch.setattr(sys, "stdout", SimpleNamespace(write=written.append))
    at.say("one", "two")
    at.say("three")
    assert "".join(written) == "one\ntwo\nthree\n"


def test_what_an_output_cannot_encode_is_spelt_out(monkeypatch):
    for encoding, shown in (("ascii", "caf\\xe9 \\u732b \\udce9"), ("utf-8", "café 猫 \\udce9")):
        stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        monkeypatch.setattr(sys, "stdout", stream)
        at.say("café 猫 \udce9")
        assert stream.buffer.getvalue().decode(encoding) == f"{shown}\n"


def test_no_file_takes_the_place_of_a_stream_that_was_closed(tmp_path):
    """Else what libraries print lands in a checkpoint."""
    child = os.fork()
    if child == 0:
        os.closerange(0, 3)
        sys.stdin = sys.stdout = sys.stderr = None
        at.settle_in()
        with (tmp_path / "checkpoint").open("w") as file:
            os._exit(file.fileno() < 3)
    assert os.waitpid(child, 0)[1] == 0


def test_a_home_folder_may_be_written_as_a_tilde(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    places = ("dataset", "output_dir", "data_dir", "pretrained", "predict")
    for name in places:
        if name not in ("output_dir", "data_dir"):
            (tmp_path / name).mkdir()
    flags = at.read_flags([f"--{name.replace('_', '-')}=~/{name}" for name in places])
    for name in places:
        assert getattr(flags, name.upper()) == str(tmp_path / name)
    assert at.read_flags(["--dataset=shapes"]).DATASET == "shapes"


def test_a_notebooks_backend_warnings_as_errors_and_head_together(script, pets, tmp_path):
    """A whole run in the surroundings of which each has ended one."""
    reading, writing = os.pipe()
    os.close(reading)  # as head does once it has its lines
    command = [sys.executable, "-W", "error", str(script), *SMALL, f"--dataset={pets}",
               "--output-dir=~/out", "--data-dir=~/data"]
    surroundings = dict(HOME=str(tmp_path), MPLBACKEND="module://no_such_package.backend_inline",
                        OMP_NUM_THREADS="1")
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, timeout=100,
                          env=os.environ | surroundings, check=False)
    os.close(writing)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert len(list((tmp_path / "out").glob("*.png"))) == 6


def test_plots_are_drawn_without_a_deprecated_call(pets, small, monkeypatch):
    monkeypatch.setattr(at, "measure_speed", lambda *arguments: None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        at.main(small)


# ---- Ctrl-C outside of training ----


def interrupted(arguments: list[str], capsys) -> str:
    """What a run says that Ctrl-C ends: with exit code 130."""
    with pytest.raises(SystemExit) as stopped:
        at.main(arguments)
    shown = capsys.readouterr()
    assert stopped.value.code == 130 and "Traceback" not in shown.out + shown.err
    return shown.out[shown.out.index("\nInterrupted."):]


def press_ctrl_c(*arguments: object, **options: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("place", ["find_file", "fetch_archive"])
def test_ctrl_c_in_a_download_says_that_nothing_was_trained(
        place, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(at, place, press_ctrl_c)
    said = interrupted(["--dataset=cifar10", "--image-size=32", "--architectures=test_resnet",
                        f"--pretrained={'auto' if place == 'find_file' else 'none'}",
                        f"--output-dir={tmp_path / 'out'}", f"--data-dir={tmp_path}"], capsys)
    assert "trained nothing yet" in said and "The same command starts anew" in said
    assert "--resume" not in said


def test_a_resumed_run_that_ends_before_its_first_epoch_does_not_say_that_it_starts_anew():
    job = at.Job(quick_flags(RESUME=True), CPU)
    assert at.how_to_go_on(job).endswith("The same command goes on from what an earlier run kept.")


def test_a_stop_that_was_caught_is_told_in_its_own_words(capsys):
    with pytest.raises(SystemExit) as stopped:
        at.stop("The disk is full.")
    capsys.readouterr()
    assert at.reason(stopped.value) == "The disk is full"
    assert at.reason(ValueError("two\nlines")) == "two" and at.reason(ValueError()) == "ValueError"


@pytest.mark.parametrize(("ledger", "ended"), [(None, "the ablation"), ([], "the report")])
def test_what_a_run_was_about_when_it_ended(ledger, ended):
    flags = quick_flags(ABLATION=True, ARCHITECTURES=("test_resnet",))
    job = at.Job(flags, CPU, random_data(), tested=[at.Tested({})])
    job.ledger = ledger
    assert at.model_in_hand(job) == ended


def test_ctrl_c_in_the_first_epoch_says_that_none_was_finished(small, monkeypatch, capsys):
    monkeypatch.setattr(at, "train_epoch", press_ctrl_c)
    said = interrupted(small, capsys)
    assert "No epoch was finished yet" in said and "--resume" not in said


@pytest.mark.parametrize("place", ["collect_results", "plot_curves"])
def test_ctrl_c_in_the_final_report_says_that_all_models_are_finished(
        place, small, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as changed:
        changed.setattr(at, place, press_ctrl_c)
        said = interrupted(small, capsys)
    assert "All models are finished" in said and "PARTIAL REPORT" not in said
    at.main([*small, "--resume=true"])  # as it was told
    assert "holds the finished model" in capsys.readouterr().out
    assert len(list((tmp_path / "out").glob("*.png"))) == 6


def test_ctrl_c_in_the_partial_report_ends_the_run_too(small, monkeypatch, capsys):
    train_epoch = at.train_epoch

    def second(run, data, epoch):
        return press_ctrl_c() if epoch else train_epoch(run, data, epoch)

    monkeypatch.setattr(at, "train_epoch", second)
    monkeypatch.setattr(at, "write_report", press_ctrl_c)
    said = interrupted([*small, "--num-epochs=2"], capsys)
    assert "--resume true goes on from the last finished epoch" in said
    assert "could not be completed" in said


def test_ctrl_c_in_a_prediction_says_that_no_answers_were_written(
        small, pets, tmp_path, monkeypatch, capsys):
    at.main(small)
    capsys.readouterr()
    monkeypatch.setattr(at, "decode_all", press_ctrl_c)
    said = interrupted([*small, f"--predict={pets}"], capsys)
    assert "No answers were written" in said and "--resume" not in said
    assert not (tmp_path / "out" / "predictions.csv").exists()
