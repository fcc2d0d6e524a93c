"""Whatever ends a run early: what is finished is reported, answers and is gone on from."""

import functools
import json
import subprocess
import sys

import pytest
import torch

import advanced_techniques as at

MODELS = "test_resnet,test_efficientnet"


def fail_at(call, function, error):
    """A function whose calls end with an error, or where it is None a stop, from a call on."""
    calls = []

    def failing(*arguments, **options):
        calls.append(1)
        if len(calls) > call and error is None:
            at.stop("BASE_LEARNING_RATE is too high.")
        if len(calls) > call:
            raise error
        return function(*arguments, **options)

    return failing


@pytest.fixture
def arguments(tmp_path, monkeypatch):
    """A quick run's command line; neither timed nor plotted."""
    monkeypatch.setattr(at, "measure_speed", lambda run, data: None)
    monkeypatch.setattr(at, "draw_plots", lambda job, results: {})
    monkeypatch.setattr(at, "plot_rates", lambda run, data: at.Figure())
    flags = dict(dataset="shapes", architectures=MODELS, pretrained="none", image_size=32,
                 train_images=40, test_images=10, num_epochs=2, batch_size=8,
                 gradient_accumulation_steps=2, use_tta=False, data_dir=tmp_path / "data",
                 output_dir=tmp_path / "out")
    return [f"{at.option(name.upper())}={value}" for name, value in flags.items()]


ENDS = [  # the function that fails, the calls before it does, with what, and what is finished
    ("train_epoch", 3, RuntimeError("shapes don't fit"), [2, 1]),
    ("train_epoch", 2, ValueError("no epoch yet"), [2]),
    ("judge_model", 1, AssertionError(), [2, 2]),
    ("new_run", 1, KeyError("no such head"), [2]),
    ("save_checkpoint", 3, RuntimeError("first line\nsecond line"), [2, 2]),
    ("stop_if_loss_is_lost", 3, None, [2, 1]),
]


@pytest.mark.parametrize(("place", "calls", "error", "epochs"), ENDS)
def test_any_end_after_a_finished_model_leaves_a_report_that_predict_uses(
        place, calls, error, epochs, arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(at, place, fail_at(calls, getattr(at, place), error))
    with pytest.raises(SystemExit if error is None else type(error)) as ended:
        at.main(arguments)
    shown = capsys.readouterr()
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [len(model["epochs"]) for model in results["models"]] == epochs
    assert results["models"][0]["test_accuracy"] is not None
    report = (tmp_path / "out" / "report.txt").read_text()
    assert "PARTIAL REPORT: test_efficientnet" in report and "--resume true" in report
    assert "--predict answers with what is finished: test_resnet." in shown.out
    assert "--architectures test_resnet --resume true" in shown.out
    file = tmp_path / "out" / "error.txt"
    if error is None:
        assert ended.value.code == 2 and not file.exists()
        assert "BASE_LEARNING_RATE is too high." in report
    else:
        assert str(file) in shown.err and shown.err.count("\n") == 1
        assert "test_efficientnet" in shown.err and type(error).__name__ in report
        assert "Traceback" in file.read_text() and "Traceback" not in shown.err + shown.out
    monkeypatch.undo()
    at.main([*arguments, f"--predict={some_image(tmp_path)}"])
    assert "%" in capsys.readouterr().out


def some_image(folder):
    """An image file."""
    file = folder / "image.png"
    at.Image.new("RGB", (40, 40), "red").save(file)
    return file


def test_an_error_before_any_model_is_a_sentence_and_writes_no_report(
        arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(at, "load_data", fail_at(0, None, RuntimeError("a surprise")))
    with pytest.raises(RuntimeError):
        at.main(arguments)
    message = capsys.readouterr().err
    assert "(RuntimeError: a surprise)" in message and message.count("\n") == 1
    assert "a surprise" in (tmp_path / "out" / "error.txt").read_text()
    assert not (tmp_path / "out" / "results.json").exists()


def test_where_the_traceback_cannot_be_kept_it_is_shown(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    flags = at.SimpleNamespace(OUTPUT_DIR=str(tmp_path / "file" / "deeper"))
    assert "can't be written" in at.keep_traceback(RuntimeError("a surprise"), flags)
    assert "RuntimeError: a surprise" in capsys.readouterr().err


def test_a_report_that_fails_too_hides_nothing(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(at, "train_epoch", fail_at(2, at.train_epoch, RuntimeError("the cause")))
    monkeypatch.setattr(at, "draw_plots", fail_at(0, None, ValueError("no plot")))
    with pytest.raises(RuntimeError, match="the cause"):
        at.main(arguments)
    assert "the cause" in capsys.readouterr().err
    assert (tmp_path / "out" / "results.json").is_file()


def test_an_ablation_that_ends_early_leaves_what_the_finished_models_hand_over(
        arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(at, "ablate", fail_at(0, at.ablate, RuntimeError("no memory")))
    with pytest.raises(RuntimeError):
        at.main([*arguments, "--ablation=true", "--export=true"])
    out = tmp_path / "out"
    assert "PARTIAL REPORT: the ablation was under way" in (out / "report.txt").read_text()
    assert (out / "ensemble.pt2").is_file() and (out / "models" / "test_resnet").is_dir()
    assert "Without the ablation: --ablation false --resume true." in capsys.readouterr().out
    at.main([*arguments, "--ablation=false", "--resume=true", "--export=true"])
    assert "PARTIAL" not in (out / "report.txt").read_text()


@pytest.mark.parametrize("error", [RuntimeError("no clock"), SystemExit(2), KeyboardInterrupt()])
def test_a_model_is_kept_though_its_speed_cannot_be_measured(
        error, arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(at, "measure_speed", fail_at(0, None, error))
    run = functools.partial(at.main, arguments)
    if isinstance(error, KeyboardInterrupt):
        with pytest.raises(SystemExit) as ended:
            run()
        assert ended.value.code == 130
    else:
        run()
        assert "test_resnet is finished, but its speed" in capsys.readouterr().out
    kept = torch.load(tmp_path / "out" / "checkpoints" / "test_resnet.pt", weights_only=True)
    assert kept["finished"]["entry"]["test_accuracy"] is not None and kept["state_dict"]


def test_the_program_ends_with_code_1_and_no_traceback(script, arguments, tmp_path):
    code = ("import runpy, sys; sys.argv = sys.argv[1:]; import torch; "
            "torch.optim.AdamW.step = None; runpy.run_path(sys.argv[0], run_name='__main__')")
    ended = subprocess.run([sys.executable, "-c", code, str(script), *arguments, "--export=false"],
                           capture_output=True, text=True, timeout=100)
    assert ended.returncode == 1 and "Traceback" not in ended.stderr + ended.stdout, ended.stderr
    assert "error.txt" in ended.stderr and "test_resnet" in ended.stderr
    assert "Traceback" in (tmp_path / "out" / "error.txt").read_text()
