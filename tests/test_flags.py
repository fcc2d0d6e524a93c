"""Flags: read wherever they are written; a wrong one ends the program at once, in a sentence."""

import contextlib
import io
import json
import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import SCRIPT, call, class_pictures, option

import advanced_techniques as at


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch) -> None:
    """A working directory with a file and an empty folder."""
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    Path("empty").mkdir()


def refusal(*arguments: str) -> str:
    """The sentence with which flags are refused; who takes them finds a file for OUTPUT_DIR."""
    at_once = time.process_time() + 2
    before = sorted(Path().rglob("*"))
    ended = call(["--output-dir", "file", *arguments])
    assert ended.code == 2 and ended.out == "" and "\n" not in ended.err, ended
    assert time.process_time() < at_once and sorted(Path().rglob("*")) == before
    return ended.err


NUMBERS = {name: at.LIMITS.get(name, at.ANY_NUMBER) for name, value in at.FLAGS.items()
           if type(value) in (int, float)}


def wrong_numbers(name: str) -> list[str]:
    low, high = NUMBERS[name]
    wrong = ["-1", "-2.5", "-1e3", "-.5", "many", "nan", "inf", "-inf", "-nan", "1e999", "0x10",
             "1,000", "1 2", "true", "None", "", str(high + 1)]
    if isinstance(at.FLAGS[name], int):
        wrong += ["1.5", "1e3", "3."]
    return wrong + ["0"] * (low > 0)


@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_that_can_not_work_is_refused_with_its_limits(name):
    low, high = NUMBERS[name]
    kind = "whole number" if isinstance(at.FLAGS[name], int) else "number"
    for text in wrong_numbers(name):
        said = f"{name} = {text}: it has to be a {kind} from {low:g} to {high:,}."
        assert refusal(option(name), text) == said


def test_every_number_has_limits_and_may_reach_them():
    assert set(at.LIMITS) < set(NUMBERS)
    for place in (0, 1):
        words = [f"{option(name)}={limits[place]}" for name, limits in NUMBERS.items()]
        read = vars(at.read_flags(words))
        for name, limits in NUMBERS.items():
            assert read[name] == limits[place] and type(read[name]) is type(at.FLAGS[name])


SWITCHES = [name for name, value in at.FLAGS.items() if isinstance(value, bool)]


@pytest.mark.parametrize("name", SWITCHES)
def test_a_switch_is_true_or_false(name):
    for text in ("maybe", "truth", "2", "1", "nan", "tru e", ""):
        assert refusal(option(name), text) == f"{name} = {text}: it has to be true or false."
    for text in ("true", "False", "TRUE"):
        assert getattr(at.read_flags([option(name), text]), name) is (text.lower() == "true")


NEAR_MISSES = {
    "--architectures resnet_18": ["ARCHITECTURES", "'resnet_18'", "Did you mean resnet18,"],
    "--architectures ResNet50": ["'ResNet50'", "Did you mean resnet50,"],
    "--architectures resnet18.no_such_tag": ["ARCHITECTURES", "'resnet18.no_such_tag'"],
    "--architectures ,": ["ARCHITECTURES"],
    "--dataset cifar_10": ["DATASET = cifar_10", "mean cifar10?", "fashion_mnist", "folder"],
    "--dataset Fashion-MNIST": ["DATASET", "Did you mean fashion_mnist?"],
    "--dataset no/such/folder": ["DATASET = no/such/folder", "no such file or folder"],
    "--dataset " + "x" * 5000: ["DATASET = xxx"],
    "--dataset bad\0name": ["DATASET"],
    "--dataset=": ["DATASET", "text"],
    "--fit crob": ["FIT = crob", "crop, pad, squash", "Did you mean crop?"],
    "--pretrained nome": ["PRETRAINED = nome", "auto", "Did you mean none?"],
    "--predict no/such/image.png": ["PREDICT = no/such/image.png", "no such file"],
    "--num-epoch 3": ["--num-epoch is", "Did you mean --num-epochs?", "--help"],
    "-batch-size 3": ["-batch-size", "Did you mean --batch-size?"],
    "--no-such-thing-at-all 3": ["--no-such-thing-at-all", "--help"],
    "--batch-size 8 16": ["16", "--help"],
    "--batch-size": ["--batch-size", "--help"],
    "--use-tta --seed 1": ["--use-tta", "--help"],
}


@pytest.mark.parametrize("words", NEAR_MISSES)
def test_a_near_miss_is_named_with_what_was_probably_meant(words):
    message = refusal(*words.split(" "))
    assert [part for part in NEAR_MISSES[words] if part not in message] == [], message


OTHERS = {  # what other trainers' users write: the flag that is named, or the word that tells why
    "--lr": "base-learning-rate", "--bs": "batch-size", "--size": "image-size",
    "--model": "architectures", "--backbone": "architectures", "--arch": "architectures",
    "--train-dir": "dataset", "--data-root": "dataset", "--data": "dataset",
    "--weights": "pretrained", "--out": "output-dir", "--wd": "weight-decay",
    "--eval": "predict", "--amp": "use-mixed-precision", "-b": "batch-size",
    "--epochs": "num-epochs", "--img_size": "image-size", "--LR": "base-learning-rate",
    "--num-workers": "by all cores", "--device": "accelerator", "--patience": "NUM_EPOCHS",
    "--optimizer": "AdamW", "--sched": "USE_COSINE_SCHEDULE", "--zoom": None, "--xyz": None}


@pytest.mark.parametrize("word", OTHERS)
def test_flags_of_other_trainers_lead_to_ours_or_tell_why_not(word):
    message = refusal(word, "16")
    said = OTHERS[word]
    if said is None:
        assert "Did you mean" not in message
    else:
        assert (f"Did you mean --{said}?" in message) or said in message


def test_a_lone_path_names_both_flags_and_a_list_is_taken(tmp_path):
    message = refusal("my/pictures")
    assert "--dataset my/pictures" in message and "--predict my/pictures" in message
    flags = at.read_flags(["--architectures", "resnet18", "resnet50", "--seed", "3"])
    assert flags.ARCHITECTURES == ("resnet18", "resnet50") and flags.SEED == 3
    for name in ("a, b.png", "c.png"):
        (tmp_path / name).touch()
    files = [str(file) for file in sorted(tmp_path.iterdir())]
    assert tuple(files) == at.read_flags(["--predict", *files]).PREDICT


@pytest.mark.parametrize(("name", "said"), [
    ("mobilenet_v2", "mobilenetv2_"), ("vit_b_16", "vit_base_patch16_224"),
    ("swin_t", "swin_s3_tiny_224"), ("efficientnet-b0", "Did you mean efficientnet_b0,"),
    ("resnet_18x", "Did you mean"), ("my_own_net", "timm.list_models")])
def test_torchvisions_names_lead_to_timms(name, said):
    message = refusal("--architectures", name)
    assert said in message and (name != "my_own_net" or "Did you" not in message)


@pytest.mark.parametrize(("name", "now"), [
    ("tf_efficientnet_b0_ns", "tf_efficientnet_b0.ns_jft_in1k"),
    ("convnext_tiny_in22k", "convnext_tiny.fb_in22k"), ("swsl_resnet18", "resnet18.fb_swsl"),
    ("vit_small_patch16_224_dino", "vit_small_patch16_224.dino")])
def test_older_names_that_timm_takes_are_taken_under_the_present_one(name, now, capsys):
    (taken,) = at.read_flags(["--architectures", name]).ARCHITECTURES
    assert taken.startswith(now) and f"{name} is called {taken}" in capsys.readouterr().out


@pytest.mark.parametrize("place", ["cat", "train/cat", "Training Set/cat"])
def test_images_where_downloads_go_are_asked_about(place, tmp_path):
    class_pictures(tmp_path / "data", {place: 2, place.replace("cat", "dog"): 2}, 8)
    message = refusal("--data-dir", str(tmp_path / "data"))
    assert "DATA_DIR" in message and f"--dataset {tmp_path / 'data'} meant?" in message
    other = tmp_path / "other"
    class_pictures(other / "pets", dict(cat=2, dog=2), 8)  # a data set kept where downloads go
    assert str(other) == at.read_flags(["--data-dir", str(other)]).DATA_DIR


@pytest.mark.parametrize(("names", "size", "fitted"), [
    (("vit_small_patch14_dinov2",), 96, 98), (("vit_tiny_patch16_224", "resnet18"), 100, 112),
    (("convnext_atto", "vit_tiny_patch16_224"), 90, 96), (("resnet18",), 97, 97),
    (("convnext_atto",), 90, 92)])
def test_an_image_size_is_fitted_to_the_patches_and_said(names, size, fitted, capsys):
    flags = at.fit_to_patches(SimpleNamespace(ARCHITECTURES=names, IMAGE_SIZE=size))
    assert fitted == flags.IMAGE_SIZE
    assert (f"IMAGE_SIZE is {fitted}" in capsys.readouterr().out) == (fitted != size)


EDITED = {
    "BATCH_SIZE": [32.5, None, True, "many", "", math.nan, math.inf, -1, 0],
    "SEED": [None, "a", 1.5, False],
    "BASE_LEARNING_RATE": ["fast", None, math.nan, math.inf, -1, True, 0, 1j],
    "MEMORY_GB": ["4 GB", None, math.nan],
    "USE_TTA": ["yes", 1, 0, None, 1.0, [], "on"],
    "FIT": [None, "", 3, "Crop"],
    "DATASET": [None, 5, ["shapes"], True, b"shapes", ""],
    "PRETRAINED": [None, False, 3, ["none"], ""],
    "DATA_DIR": [None, 3, ["data"], ""],
    "PREDICT": [7, True, None, ["a.png", 7]],
    "ARCHITECTURES": [None, 18, (), [], "", (18,), [None], ["resnet_18"], "resnet18;resnet50",
                      True, {}, b"resnet18"],
}


@pytest.mark.parametrize("name", EDITED)
def test_a_constant_of_a_wrong_type_is_refused(name, monkeypatch):
    for value in EDITED[name]:
        monkeypatch.setattr(at, name, value)
        assert name in refusal(), value


@pytest.mark.parametrize(("name", "value", "wanted"), [
    ("BATCH_SIZE", "16", 16), ("SEED", np.int64(3), 3), ("USE_TTA", "false", False),
    ("MEMORY_GB", 4, 4.0), ("DATASET", Path("empty"), "empty"), ("OUTPUT_DIR", Path("o"), "o"),
    ("DATA_DIR", "~/data", os.path.expanduser("~/data")),
    ("ARCHITECTURES", ["resnet18", "resnet50"], ("resnet18", "resnet50")),
    ("ARCHITECTURES", " resnet18 , resnet50,", ("resnet18", "resnet50")),
    ("ARCHITECTURES", ["resnet18,resnet50"], ("resnet18", "resnet50")),
    ("ARCHITECTURES", "resnet18.a1_in1k", ("resnet18.a1_in1k",)),
])
def test_what_a_constant_may_be_is_read_as_its_type_and_fits_into_results(name, value, wanted,
                                                                          monkeypatch):
    monkeypatch.setattr(at, name, value)
    read = vars(at.read_flags([]))
    assert read[name] == wanted and type(read[name]) is type(at.FLAGS[name])
    assert list(read) == list(at.FLAGS) and json.dumps(read)


def tried(name: str, size: int, batch: int) -> str:
    """How a run ends whose pretrained weights, looked for after the networks, aren't there."""
    ended = call(["--architectures", name, f"--image-size={size}", f"--batch-size={batch}",
                  "--output-dir=out", "--pretrained=empty", "--dataset=shapes"])
    assert ended.code == 2 and ended.out == "" and "\n" not in ended.err
    assert os.listdir("out") in ([], [".lock"]) and not Path("data").exists()
    return ended.err


@pytest.mark.parametrize(("name", "size", "batch"), [
    ("crossvit_tiny_240", 96, 32), ("halonet26t", 96, 32),
    ("resnet18", 32, 1), ("levit_128s", 224, 2), ("deit_tiny_distilled_patch16_224", 224, 2)])
def test_a_network_that_can_not_train_so_is_refused_at_once(name, size, batch):
    message = tried(name, size, batch)
    assert message.startswith(f"ARCHITECTURES: {name} can't train on batches of BATCH_SIZE = ")
    assert f"BATCH_SIZE = {batch} images of IMAGE_SIZE = {size} (" in message


@pytest.mark.parametrize(("name", "size"), [
    ("vit_tiny_patch16_224", 96), ("resnet18", 8), ("swin_tiny_patch4_window7_224", 64),
    ("crossvit_9_240", 240)])
def test_a_network_that_can_train_so_is_taken(name, size):
    message = tried(name, size, 2)
    assert message.startswith("PRETRAINED = empty") and name in message


def written_flags() -> list[tuple[str, str]]:
    """Titles of groups, with no comment, and flags with theirs, as the script's text has them."""
    lines = SCRIPT.read_text("utf-8").partition("\n# ==== Flags")[2].splitlines()[1:]
    written = []
    for line in lines[:lines.index(next(line for line in lines if line.startswith("FLAGS")))]:
        code, _, comment = line.partition("# ")
        name = code.partition(" = ")[0]
        if line:
            written.append((option(name), comment) if code else (f"{comment}:", ""))
    return written


def test_help_lists_every_flag_once_with_its_comment_in_the_groups_of_the_file():
    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit) as stopped:
        at.main(["--help"])
    shown = out.getvalue()
    written = written_flags()
    flags = [name for name, comment in written if comment]
    assert stopped.value.code == 0 and flags == list(map(option, at.FLAGS))
    assert len(written) == len(flags) + 4
    headed = re.findall(r"^(?:  (--\S+) VALUE|(\S.*:)$)", shown, re.M)
    assert [flag or title for flag, title in headed][-len(written):] == [one for one, _ in written]
    words = " ".join(shown.split())
    for name, comment in written:
        shown = words.replace(" [VALUE ...]", "")
        assert f"{name} VALUE {comment} (default: " in shown or not comment


def test_a_new_flag_is_one_line_and_a_row_of_limits(tmp_path):
    text = SCRIPT.read_text("utf-8")
    for old, new in {"\nSEED = ": "\nNEW_SWITCH = False  # 100 % new\nNEW_FLAG = 3  # new too",
                     '\n    "IMAGE_SIZE": (': '\n    "NEW_FLAG": (2, 5),'}.items():
        assert text.count(old) == 1
        text = text.replace(old, new + old)
    copy = tmp_path / "changed.py"
    copy.write_text(text, "utf-8")
    started = [subprocess.Popen([sys.executable, copy, *words], stdout=-1, stderr=-1, text=True)
               for words in (["--help"], ["--new-flag", "9"])]
    (shown, _), (printed, refused) = [process.communicate() for process in started]
    assert re.search(r"\n  --new-switch VALUE\s+100 % new \(default: False\)\n", shown)
    assert re.search(r"\n  --new-flag VALUE +new too \(default: 3\)\n", shown)
    assert printed == "" and [process.returncode for process in started] == [0, 2]
    assert refused.partition(": ") == (
        "advanced_techniques.py", ": ", "NEW_FLAG = 9: it has to be a whole number from 2 to 5.\n")


# ---- In a notebook ----

PASTED = """
import sys
text = open(sys.argv.pop(1)).read()
for line in {edits}:
    name = line.partition(" = ")[0]
    start = text.index("\\n" + name + " = ") + 1
    text = text[:start] + line + text[text.index("\\n", start):]
names = dict(__name__="__main__")
sys.argv[1:] = ["-f", "kernel.json"]
exec(compile(text, "<cell>", "exec"), names)
"""


def test_constants_count_when_main_is_called_from_a_notebook_and_twice(tmp_path, monkeypatch):
    pictures = class_pictures(tmp_path / "pets", dict(cat=12, dog=12), 8)
    monkeypatch.setattr(sys, "argv", ["kernel", "-f", "kernel.json"])
    small = dict(ARCHITECTURES="test_resnet", NUM_EPOCHS=1, IMAGE_SIZE=32, PRETRAINED="none",
                 EXPORT=False, DATASET=str(pictures), BATCH_SIZE=8)
    for name, value in small.items():
        monkeypatch.setattr(at, name, value)
    for epochs in (1, 2):
        monkeypatch.setattr(at, "NUM_EPOCHS", epochs)
        at.main()
        results = json.loads(Path("outputs", "results.json").read_text())
        assert len(results["models"][0]["epochs"]) == epochs
    monkeypatch.setattr(at, "FIT", "crob")
    with pytest.raises(at.Stop, match="FIT = crob") as stopped:
        at.main()
    assert stopped.value._render_traceback_() == [str(stopped.value)]


def test_pasted_into_a_cell_the_script_runs(tmp_path):
    pictures = class_pictures(tmp_path / "pets", dict(cat=12, dog=12), 8)
    edits = [f"DATASET = {str(pictures)!r}", "ARCHITECTURES = ('test_resnet',)", "NUM_EPOCHS = 1",
             "IMAGE_SIZE = 32", "PRETRAINED = 'none'", "EXPORT = False", "BATCH_SIZE = 8"]
    Path("cell.py").write_text(PASTED.format(edits=edits))
    ended = subprocess.run([sys.executable, "cell.py", str(SCRIPT)], capture_output=True, text=True,
                           check=False)
    assert ended.returncode == 0, ended.stderr
    assert "Written to outputs/" in ended.stdout and Path("outputs", "results.json").exists()
