"""Whole small runs of the program, as a user starts it, and what they leave in OUTPUT_DIR."""

import json
import subprocess
import sys

import pytest
from test_data import DEBIAN, make_folder

import advanced_techniques as at

QUICK = [
    "--export=false",
    "--image-size",
    "32",
    "--train-images",
    "60",
    "--test-images",
    "40",
    "--num-epochs",
    "4",
    "--batch-size",
    "16",
    "--gradient-accumulation-steps",
    "2",
]
PLOTS = {
    "training_curves",
    "accuracy_against_cost",
    "learning_rates",
    "confusion_matrix",
    "class_accuracy",
    "predictions",
}


def run(script, folder, *arguments):
    command = [sys.executable, str(script), *QUICK, "--output-dir", str(folder), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "results.json").read_text()), done.stdout


def numbers(results):
    """The results without what a clock or the machine's memory decides."""
    measured = ("images_per_second", "speed", "OUTPUT_DIR", "diagnosis", "peak_memory_bytes",
                "training_memory_bytes", "training_tensor_bytes",
                "architectures")
    if isinstance(results, dict):
        return {
            key: numbers(value)
            for key, value in results.items()
            if "seconds" not in key and key not in measured
        }
    return [numbers(value) for value in results] if isinstance(results, list) else results


def test_shapes_with_all_techniques_twice_give_the_same_numbers(script, tmp_path):
    arguments = [
        "--dataset",
        "shapes",
        "--architectures",
        "resnet18,efficientnet_b0",
        "--data-dir",
        str(tmp_path),
    ]
    results, output = run(script, tmp_path / "one", *arguments)
    again, _ = run(script, tmp_path / "two", *arguments)
    assert numbers(results) == numbers(again)
    assert {path.stem for path in (tmp_path / "one").glob("*.png")} == PLOTS
    assert len(list((tmp_path / "one" / "checkpoints").iterdir())) == 2
    assert (tmp_path / "one" / "report.txt").read_text() in output and "ensemble of 2" in output
    assert set(results) == {
        "flags",
        "environment",
        "dataset",
        "models",
        "ensemble",
        "speed",
        "classes",
        "over_classes",
        "ablation",
        "export",
        "architectures",
        "diagnosis",
    }
    assert set(results["flags"]) == set(at.FLAGS)
    assert results["dataset"]["train_images"] == 60
    assert results["dataset"]["validation_images"] == 30
    for model in results["models"]:
        assert (
            0 <= model["test_accuracy"] <= 1
            and 0 <= model["tta_accuracy"] <= 1
            and model["test_loss"] > 0
        )
        assert [entry["stage"] for entry in model["epochs"]] in ([1, 2, 3, 4], [1, 1, 1, 1])
        speed = results["speed"][model["name"]]
        assert speed["images_per_second_all_layers"] > 0
        assert (speed["mixed_images_per_second"] is None) == (
            model["precision"] == "float32"
        ) and model["precision_why"]
        low, high = model["test_interval"]
        assert (
            0 <= low <= model["test_accuracy"] <= high <= 1
            and 0 <= model["tta_calibration_error"] <= 1
        )
        assert "peak_flops" not in speed
    best = max(results["models"], key=lambda model: model["validation_accuracy"])["test_accuracy"]
    gain = results["ensemble"]["accuracy"] - best
    assert results["ensemble"]["gain_over_best"] == pytest.approx(gain)


def test_a_folder_of_ones_own_images_is_learned(script, tmp_path):
    folder = make_folder(tmp_path / "pets", count=30)  # the classes differ in colour
    results, _ = run(
        script,
        tmp_path / "out",
        "--dataset",
        str(folder),
        "--architectures",
        "resnet18",
        "--num-epochs",
        "6",
        "--pretrained",
        "none",
        "--gradient-accumulation-steps",
        "1",
        "--base-learning-rate",
        "0.002",
    )
    assert results["dataset"]["classes"] == ["cat", "dog", "owl"]
    assert results["models"][0]["test_accuracy"] > 0.6 and results["ensemble"]["accuracy"] is None
    assert results["models"][0]["weights"] == "random weights"


@pytest.mark.skipif(
    not DEBIAN.is_dir(), reason="Debian's package dataset-fashion-mnist is not installed"
)
def test_fashion_mnist_is_learned(script, tmp_path):
    results, _ = run(
        script,
        tmp_path / "out",
        "--dataset",
        "fashion_mnist",
        "--architectures",
        "resnet18",
        "--data-dir",
        str(tmp_path / "data"),
        "--train-images",
        "400",
        "--image-size",
        "48",
        "--num-epochs",
        "8",
    )
    model = results["models"][0]
    assert model["test_accuracy"] > 0.5
    assert model["epochs"][-1]["train_loss"] < model["epochs"][0]["train_loss"]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--batch-size", "0"], "BATCH_SIZE"),
        (["--batch-size", "many"], "BATCH_SIZE = many"),
        (["--no-such-flag", "1"], "no-such"),
        (["--dataset", "no/such/folder"], "DATASET"),
        (["--architectures", "resnet_18"], "resnet_18"),
        (["--use-tta", "maybe"], "USE_TTA = maybe"),
        (["--base-learning-rate", "inf"], "BASE_LEARNING_RATE"),
        (["--label-smoothing", "1"], "LABEL_SMOOTHING"),
        (["--architectures", ","], "ARCHITECTURES"),
        (["--image-size", "-1"], "IMAGE_SIZE"),
    ],
)
def test_a_wrong_flag_ends_with_exit_code_2_and_one_plain_message(
    arguments, named, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        at.main(arguments)
    message = capsys.readouterr().err
    assert stopped.value.code == 2 and named in message and "Traceback" not in message


def test_flags_are_typed_like_their_constants_and_help_lists_them_all(capsys):
    flags = at.read_flags(
        [
            "--architectures",
            "resnet18, vit_tiny_patch16_224",
            "--use-tta",
            "false",
            "--num-epochs",
            "3",
        ]
    )
    assert (
        flags.ARCHITECTURES == ("resnet18", "vit_tiny_patch16_224")
        and flags.USE_TTA is False
        and flags.NUM_EPOCHS == 3
    )
    with pytest.raises(SystemExit):
        at.read_flags(["--help"])
    shown = capsys.readouterr().out
    assert all("--" + name.lower().replace("_", "-") in shown for name in at.FLAGS)
    assert "micro-batches in one update" in shown
