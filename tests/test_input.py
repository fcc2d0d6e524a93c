"""Bad input of every kind: flags, folders, image files, full disks.

A mistake ends at once with one plain message.
"""

import errno
import hashlib
import io
import json
import math
import os
import re
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import urllib.error
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CPU, quick_flags
from PIL import Image
from test_data import make_folder

import advanced_techniques as at

NOBODY = 65534


class ReachedDataError(Exception):
    """Raised in place of loading data: the flags were accepted."""


@pytest.fixture
def elsewhere(tmp_path, monkeypatch) -> Path:
    """A working directory of its own, so that default folders are made there."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def nothing_starts(elsewhere, monkeypatch):
    """Loading data, looking for weights and building a model fail the test."""
    for name in ("find_source", "load_data", "find_weights", "new_run"):
        monkeypatch.setattr(
            at, name, lambda *arguments, name=name, **options: pytest.fail(f"{name} was called")
        )


def refusal(capsys, arguments: list[str], one_line: bool = True) -> str:
    """The one message with which a command line is refused: exit code 2, within a second."""
    started = time.process_time()
    with pytest.raises(SystemExit) as stopped:
        at.main(arguments)
    seconds, message = time.process_time() - started, capsys.readouterr().err
    assert stopped.value.code == 2 and "Traceback" not in message, message
    assert message.count("advanced_techniques.py: ") == 1 and message.startswith(
        "advanced_techniques.py: "
    )
    assert not one_line or message.count("\n") == 1, message
    assert seconds < 1, f"{seconds:.1f} s for {message}"
    return message


def option(name: str) -> str:
    return "--" + name.lower().replace("_", "-")


def names(message: str, flag: str) -> bool:
    return flag in message or option(flag) in message


# ---- flags on the command line -------------------------------------------------------------------


def wrong_numbers():
    for flag, (kind, low, high) in at.NUMBERS.items():
        wrong = [
            "-1",
            "-2.5",
            "-1e3",
            "many",
            "nan",
            "inf",
            "-inf",
            "-nan",
            "1e999",
            "0x10",
            "1,000",
            "1 2",
            "true",
            "None",
            str(high + 1) if kind is int else f"{high * 1.01:g}",
        ]
        wrong += (["1.5", "1e3", "3."] if kind is int else []) + (["0"] if low > 0 else [])
        yield from ((flag, text) for text in wrong)


@pytest.mark.parametrize(("flag", "text"), list(wrong_numbers()))
def test_a_number_that_can_not_work_is_refused(flag, text, nothing_starts, capsys):
    message = refusal(capsys, [option(flag), text])
    assert names(message, flag) and re.search(r"number from \S+ to [\d,]+", message)
    shown = message.lower().partition(" = ")[2].partition(":")[0]  # 1e999 may be shown as inf
    assert text.lower() == shown or str(float(shown)) == str(float(text))


@pytest.mark.parametrize(
    "flag", [name for name, value in at.FLAGS.items() if isinstance(value, bool)]
)
@pytest.mark.parametrize("text", ["maybe", "truth", "2", "nan", "tru e"])
def test_a_switch_is_true_or_false(flag, text, nothing_starts, capsys):
    message = refusal(capsys, [option(flag), text])
    assert names(message, flag) and text in message and "true or false" in message


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (
            ["--architectures", "resnet_18"],
            ["ARCHITECTURES", "'resnet_18'", "Did you mean resnet18?"],
        ),
        (
            ["--architectures", "resnet18,efficientnetb0"],
            ["'efficientnetb0'", "Did you mean efficientnet_b0?"],
        ),
        (["--architectures", "ResNet50"], ["'ResNet50'", "Did you mean resnet50?"]),
        (["--architectures", "resnet18.no_such_tag"], ["ARCHITECTURES", "resnet18.no_such_tag"]),
        (["--architectures", "zzzzqqqq"], ["ARCHITECTURES", "zzzzqqqq"]),
        (["--architectures", "hf-hub:timm/resnet18"], ["ARCHITECTURES", "hf-hub:timm/resnet18"]),
        (["--architectures", ""], ["ARCHITECTURES"]),
        (["--architectures", " , ,"], ["ARCHITECTURES"]),
        (
            ["--dataset", "cifar_10"],
            ["DATASET", "cifar_10", "Did you mean cifar10?", "fashion_mnist", "folder"],
        ),
        (["--dataset", "CIFAR10"], ["DATASET", "Did you mean cifar10?"]),
        (["--dataset", "Fashion-MNIST"], ["DATASET", "Did you mean fashion_mnist?"]),
        (["--dataset", "shape"], ["DATASET", "Did you mean shapes?"]),
        (["--dataset", "no/such/folder"], ["DATASET", "no/such/folder"]),
        (["--dataset", "x" * 5000], ["DATASET", "xxx"]),
        (["--dataset", "bad\0name"], ["DATASET"]),
        (["--pretrained", "nome"], ["PRETRAINED", "nome", "auto", "Did you mean none?"]),
        (["--pretrained", "no/such/weights.pth"], ["PRETRAINED", "no/such/weights.pth"]),
        (["--pretrained", "x" * 5000], ["PRETRAINED"]),
        (["--predict", "no/such/image.png"], ["PREDICT", "no/such/image.png"]),
        (["--predict", "x" * 5000], ["PREDICT"]),
        (["--num-epoch", "3"], ["--num-epoch ", "Did you mean --num-epochs?", "--help"]),
        (["--num-epoch=3"], ["--num-epoch ", "Did you mean --num-epochs?"]),
        (["--batch_size", "3"], ["--batch_size", "Did you mean --batch-size?"]),
        (["--BATCH_SIZE", "3"], ["--BATCH_SIZE", "Did you mean --batch-size?"]),
        (["-batch-size", "3"], ["-batch-size", "Did you mean --batch-size?"]),
        (["--no-such-thing-at-all", "3"], ["--no-such-thing-at-all", "--help"]),
        (["resnet18"], ["resnet18", "--help"]),
        (["--batch-size", "8", "16"], ["16"]),
        (["--batch-size"], ["--batch-size"]),
        (["--use-tta", "--seed", "1"], ["--use-tta"]),
    ],
)
def test_a_near_miss_is_named_with_what_was_probably_meant(
    arguments, wanted, nothing_starts, capsys
):
    message = refusal(capsys, arguments)
    assert all(part in message for part in wanted), message


def test_right_flags_reach_the_data_and_nothing_else_stops_them(elsewhere, monkeypatch):
    """The counterpart of all refusals: largest and smallest values, any spelling of true."""

    def reached(flags, device):
        raise ReachedDataError

    monkeypatch.setattr(at, "load_data", reached)
    for place in (1, 2):
        for flag, limits in at.NUMBERS.items():
            if flag not in (
                "IMAGE_SIZE",
                "BATCH_SIZE",
                "GRADIENT_ACCUMULATION_STEPS",
                "TRAIN_IMAGES",
            ):
                with pytest.raises(ReachedDataError):
                    at.main(
                        [
                            "--architectures",
                            "resnet18",
                            "--dataset",
                            "shapes",
                            option(flag),
                            f"{limits[place]:.12g}",
                        ]
                    )
    for text in ("true", "False", "TRUE"):
        assert at.read_flags(["--use-tta", text]).USE_TTA is (text.lower() == "true")
    assert at.read_flags(["--seed=7", "--weight-decay=.5", "--dataset", "fashion_mnist"]).SEED == 7


# ---- constants edited in the file ----------------------------------------------------------------

EDITED = {
    "BATCH_SIZE": [32.5, 32.0, None, True, [32], "many", "", math.nan, math.inf, -1, 0],
    "SEED": [None, "a", 1.0, False],
    "BASE_LEARNING_RATE": ["fast", None, math.nan, math.inf, -math.inf, -1, True, 0, [1e-3], 1j],
    "MEMORY_GB": ["4 GB", None, math.nan],
    "USE_TTA": ["yes", 1, 0, None, 1.0, [], "on"],
    "COMPILE": ["", 0],
    "DATASET": [None, 5, ["shapes"], True, b"shapes", ""],
    "PRETRAINED": [None, False, True, 3, ["none"], ""],
    "DATA_DIR": [None, 3, ["data"], ""],
    "OUTPUT_DIR": [None, 3, ["outputs"], True, ""],
    "PREDICT": [7, True, ["a.png"]],
    "ARCHITECTURES": [
        None,
        18,
        (),
        [],
        "",
        (18,),
        [None],
        ["resnet_18"],
        "resnet18;resnet50",
        True,
        {},
        b"resnet18",
    ],
}


@pytest.mark.parametrize(
    ("flag", "value"), [(flag, value) for flag, values in EDITED.items() for value in values]
)
def test_a_constant_of_a_wrong_type_is_refused(flag, value, nothing_starts, monkeypatch, capsys):
    monkeypatch.setitem(at.FLAGS, flag, value)
    assert names(refusal(capsys, []), flag)


@pytest.mark.parametrize(
    "value",
    [
        ["resnet18", "resnet50"],
        ("resnet18", "resnet50"),
        "resnet18,resnet50",
        " resnet18 , resnet50,",
        ["resnet18,resnet50"],
    ],
)
def test_architectures_may_be_a_list_or_a_bare_string(value, monkeypatch):
    monkeypatch.setitem(at.FLAGS, "ARCHITECTURES", value)
    assert at.read_flags([]).ARCHITECTURES == ("resnet18", "resnet50")
    monkeypatch.setitem(at.FLAGS, "ARCHITECTURES", "resnet18")
    assert at.read_flags([]).ARCHITECTURES == ("resnet18",)


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("BATCH_SIZE", "32"),
        ("USE_TTA", "false"),
        ("MEMORY_GB", 4),
        ("DATASET", Path()),
        ("OUTPUT_DIR", Path("outputs")),
        ("SEED", np.int64(3)),
    ],
)
def test_what_a_constant_may_be_is_read_as_its_type_and_fits_into_results(
    flag, value, elsewhere, monkeypatch, capsys
):
    """Either refused now or fit for the report: not in the way when hours have passed."""
    monkeypatch.setitem(at.FLAGS, flag, value)
    try:
        read = vars(
            at.read_flags(
                [
                    "--data-dir",
                    "/nowhere/data",
                    *([] if flag == "OUTPUT_DIR" else ["--output-dir", "/no"]),
                ]
            )
        )
    except SystemExit as stopped:
        assert stopped.code == 2 and names(capsys.readouterr().err, flag)
        return
    json.dumps(read)
    kinds = {"USE_TTA": bool, "DATASET": str, "OUTPUT_DIR": str, "MEMORY_GB": (int, float)}
    assert isinstance(read[flag], kinds.get(flag, int))
    assert flag != "USE_TTA" or read[flag] is False


# ---- flags that don't fit each other, the images or the disk -------------------------------------


@pytest.mark.parametrize(
    ("architecture", "arguments"),
    [
        ("vit_tiny_patch16_224", ["--image-size", "8"]),
        ("test_vit", ["--image-size", "8"]),
        ("halonet26t", ["--image-size", "96"]),
        ("crossvit_tiny_240", ["--image-size", "96"]),
        ("resnet18", ["--image-size", "32", "--batch-size", "1"]),
    ],
)  # batch statistics of one value
def test_an_image_size_that_a_model_refuses(architecture, arguments, nothing_starts, capsys):
    message = refusal(capsys, ["--architectures", architecture, *arguments])
    assert "IMAGE_SIZE" in message and architecture in message and arguments[1] in message
    assert "BATCH_SIZE" in message or "--batch-size" not in arguments


@pytest.mark.parametrize(
    "arguments",
    [
        ["--image-size", "224", "--architectures", "vit_tiny_patch16_224"],
        ["--image-size", "64", "--architectures", "swin_tiny_patch4_window7_224"],
        ["--image-size", "8", "--architectures", "resnet18"],
    ],
)
def test_an_image_size_that_a_model_takes(arguments, elsewhere, monkeypatch):
    monkeypatch.setattr(at, "load_data", lambda *_: (_ for _ in ()).throw(ReachedDataError))
    with pytest.raises(ReachedDataError):
        at.main([*arguments, "--dataset", "shapes"])


def test_an_update_of_more_images_than_train_images_needs_no_data_to_be_refused(
    nothing_starts, capsys
):
    message = refusal(
        capsys,
        [
            "--dataset",
            "cifar10",
            "--architectures",
            "resnet18",
            "--image-size",
            "32",
            "--train-images",
            "100",
            "--batch-size",
            "30",
        ],
    )
    assert (
        names(message, "GRADIENT_ACCUMULATION_STEPS")
        and names(message, "BATCH_SIZE")
        and "120" in message
    )


@pytest.mark.parametrize(("batch", "steps"), [(8, 4), (25, 1), (32, 4), (24, 2), (1, 10**5)])
def test_an_update_of_more_images_than_an_epoch_is_refused_with_advice_that_works(
    batch, steps, tmp_path, capsys
):
    folder = make_folder(tmp_path / "pets")  # 36 images, 24 of them to train on
    flags = dict(
        DATASET=str(folder),
        TRAIN_IMAGES=0,
        TEST_IMAGES=0,
        BATCH_SIZE=batch,
        GRADIENT_ACCUMULATION_STEPS=steps,
    )
    with pytest.raises(SystemExit) as stopped:
        at.load_data(quick_flags(**flags), CPU)
    message = capsys.readouterr().err
    assert (
        stopped.value.code == 2
        and names(message, "BATCH_SIZE")
        and names(message, "GRADIENT_ACCUMULATION_STEPS")
    )
    assert f"{batch * steps:,}" in message and "24" in message
    advice = re.findall(r"--(batch-size|gradient-accumulation-steps) (\d+)", message)
    assert advice
    flags |= {name.upper().replace("-", "_"): int(value) for name, value in advice}
    at.load_data(quick_flags(**flags), CPU)


def test_a_single_test_image_is_refused_by_its_flag(elsewhere, capsys):
    message = refusal(
        capsys,
        [
            "--dataset",
            "shapes",
            "--test-images",
            "1",
            "--image-size",
            "32",
            "--architectures",
            "test_resnet",
        ],
    )
    assert names(message, "TEST_IMAGES")


@pytest.mark.parametrize("flag", ["OUTPUT_DIR", "DATA_DIR"])
@pytest.mark.parametrize(
    "inside", ["pets", "pets/out", "pets/cat", "other/../pets/out", "link/out"]
)
def test_results_and_caches_never_go_into_the_data_set(
    flag, inside, nothing_starts, elsewhere, capsys
):
    make_folder(elsewhere / "pets", 1)
    (elsewhere / "link").symlink_to("pets")
    before = snapshot(elsewhere / "pets")
    other = dict(OUTPUT_DIR="out", DATA_DIR="data") | {flag: inside}
    message = refusal(
        capsys,
        [
            "--dataset",
            "pets",
            *(part for name, value in other.items() for part in (option(name), value)),
        ],
    )
    assert (
        names(message, flag)
        and inside in message
        and "DATASET" in message
        and snapshot(elsewhere / "pets") == before
    )


@pytest.mark.parametrize("content", [None, b"", b"not weights", "other architecture"])
def test_weights_that_can_not_be_used_end_plainly(content, elsewhere, capsys):
    folder, place = make_folder(elsewhere / "pets"), elsewhere / "weights"
    place.mkdir()
    if isinstance(content, bytes):
        (place / "test_resnet.pth").write_bytes(content)
    elif content:
        torch.save(at.timm.create_model("test_vit").state_dict(), place / "test_resnet.pth")
    with pytest.raises(SystemExit) as stopped:
        at.main(
            [
                "--dataset",
                str(folder),
                "--architectures",
                "test_resnet",
                "--pretrained",
                str(place),
                "--image-size",
                "32",
                "--batch-size",
                "8",
                "--gradient-accumulation-steps",
                "1",
            ]
        )
    message = capsys.readouterr().err
    assert (
        stopped.value.code == 2
        and names(message, "PRETRAINED")
        and "weights" in message
        and "Traceback" not in message
    )


def test_missing_weights_are_noticed_before_data_is_loaded(elsewhere, monkeypatch, capsys):
    (elsewhere / "weights").mkdir()
    monkeypatch.setattr(at, "load_data", lambda *_: pytest.fail("load_data was called"))
    message = refusal(
        capsys, ["--dataset", "cifar10", "--architectures", "resnet18", "--pretrained", "weights"]
    )
    assert names(message, "PRETRAINED") and "resnet18" in message


# ---- folders -------------------------------------------------------------------------------------


def snapshot(folder: Path) -> list[tuple]:
    """Everything in a folder: names, times, contents."""
    return sorted(
        (
            str(path),
            path.lstat().st_mtime_ns,
            path.lstat().st_mode,
            hashlib.md5(path.read_bytes()).hexdigest() if path.is_file() else "",
        )
        for path in (folder, *folder.rglob("*"))
    )


def build(root: Path, layout: dict[str, int]) -> Path:
    """Folders with some images each; a negative count stands for as many hidden files."""
    root.mkdir()
    for place, count in layout.items():
        (root / place).mkdir(parents=True, exist_ok=True)
        for number in range(abs(count)):
            Image.new("RGB", (9, 9), (number * 20, 0, 90)).save(
                root / place / f"{'.' * (count < 0)}{number}.png"
            )
    return root


@pytest.mark.parametrize(
    ("layout", "wanted"),
    [
        ({}, "two class folders"),
        ({"": 5}, "two class folders"),
        ({"cat": 9}, "two class folders"),
        ({".hidden": 9, "cat": 9}, "two class folders"),
        ({"cat": 9, "dog": 0}, "dog"),
        ({"cat": 9, "dog": -3}, "dog"),
        ({"cat": 1, "dog": 1}, "too few"),
        ({"cat": 3, "dog": 2}, "too few"),
        ({"cat": 2, "dog": 2}, "too few"),
        ({"train": 9}, "two class folders"),
        ({"train/cat": 9}, "two class folders"),
        ({"train/cat": 9, "train/dog": 0}, "dog"),
        ({"train/cat": 9, "train/dog": 9, "test/owl": 9}, "owl"),
        ({"train/cat": 9, "train/dog": 9, "test/cat": 1}, "too few"),
        ({"train/cat": 9, "train/dog": 9, "val/cat": 0, "test/cat": 3}, "val"),
    ],
)
def test_a_folder_that_can_not_be_learned_from(layout, wanted, elsewhere, monkeypatch, capsys):
    for name in ("new_run", "decode_all"):
        monkeypatch.setattr(at, name, lambda *arguments, **options: pytest.fail("too late"))
    folder = build(elsewhere / "pets", layout)
    before = snapshot(folder)
    message = refusal(
        capsys,
        [
            "--dataset",
            "pets",
            "--image-size",
            "32",
            "--architectures",
            "test_resnet",
            "--batch-size",
            "2",
            "--gradient-accumulation-steps",
            "1",
            "--pretrained",
            "none",
        ],
    )
    assert (
        "DATASET" in message
        and "pets" in message
        and wanted in message
        and snapshot(folder) == before
    )


def test_a_file_is_not_a_data_set(nothing_starts, elsewhere, capsys):
    Path("pets.zip").write_bytes(b"PK")
    assert "DATASET = pets.zip" in refusal(capsys, ["--dataset", "pets.zip"])


def test_hidden_folders_hold_no_images(tmp_path):
    folder = build(
        tmp_path / "pets", {"cat": 3, "cat/.ipynb_checkpoints": 3, "cat/young": 2, "dog": 3}
    )
    assert len(at.image_folder(folder, 8, quick_flags()).labels) == 8


def in_child(
    work: Callable[[], object], user: int | None = None, size_limit: int | None = None
) -> tuple[int, str]:
    """Run work() in a child process, as another user or with a limit on file sizes.

    Returns its exit code, 0 if it went well, and its messages.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.close(reading)
            sys.stdout = sys.stderr = os.fdopen(writing, "w", errors="backslashreplace")
            signal.alarm(20)
            if size_limit:
                resource.setrlimit(resource.RLIMIT_FSIZE, (size_limit, resource.RLIM_INFINITY))
            if user is not None:
                os.setgroups([])
                os.setgid(user)
                os.setuid(user)
            work()
            code = 0
        except SystemExit as stopped:
            code = stopped.code
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    os.close(writing)
    with os.fdopen(reading) as stream:
        messages = stream.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), messages


@pytest.fixture
def open_folder():
    """A folder that any user can enter, which pytest's own are not."""
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    folder.chmod(0o755)
    yield folder
    for place, _, _ in os.walk(folder):
        Path(place).chmod(0o755)
    shutil.rmtree(folder)


@pytest.fixture
def other_user() -> int | None:
    """Someone whom permissions hold back: nobody where tests run as root, else who runs them."""
    if os.getuid():
        return None
    if in_child(lambda: None, NOBODY)[0]:
        pytest.skip("this container lets nobody become another user")
    return NOBODY


@pytest.mark.parametrize("mode", [0o000, 0o444, 0o111])
@pytest.mark.parametrize("closed", ["pets", "pets/dog", "pets/dog/puppies"])
def test_a_folder_without_permission_is_a_plain_message(closed, mode, open_folder, other_user):
    folder = build(open_folder / "pets", {"cat": 4, "dog": 4, "dog/puppies": 4})
    (open_folder / closed).chmod(mode)
    code, message = in_child(lambda: read_source(folder), other_user)
    assert (
        code == 2 and "Traceback" not in message and closed in message and "ermission" in message
    ), message


def read_source(folder: Path) -> None:
    source = at.image_folder(folder, 8, quick_flags())
    source.read(np.arange(len(source.labels)))


def test_an_image_without_permission_is_listed(open_folder, other_user):
    folder = build(open_folder / "pets", {"cat": 4, "dog": 4})
    (folder / "cat" / "2.png").chmod(0)
    code, message = in_child(lambda: read_source(folder), other_user)
    assert (
        code == 2
        and "1 files" in message
        and str(folder / "cat" / "2.png") in message
        and "Permission denied" in message
    )


@pytest.mark.parametrize("flag", ["DATASET", "PRETRAINED", "PREDICT"])
def test_a_path_below_a_closed_folder_is_refused_by_its_flag(flag, open_folder, other_user):
    (open_folder / "closed" / "pets").mkdir(parents=True)
    (open_folder / "closed").chmod(0)
    code, message = in_child(
        lambda: at.read_flags([option(flag), str(open_folder / "closed" / "pets")]), other_user
    )
    assert code == 2 and flag in message and "Traceback" not in message


def test_an_output_folder_without_permission_is_refused_before_anything_starts(
    open_folder, other_user, nothing_starts
):
    (open_folder / "out").mkdir(mode=0o755)
    (open_folder / "out").chmod(0o555)
    for place in ("out", "out/deeper"):
        code, message = in_child(
            lambda place=place: at.main(
                ["--dataset", "shapes", "--output-dir", str(open_folder / place)]
            ),
            other_user,
        )
        assert (
            code == 2
            and "--output-dir" in message
            and str(open_folder / place) in message
            and "ermission" in message
        )
        assert "Traceback" not in message and not list((open_folder / "out").iterdir())


@pytest.mark.parametrize("place", ["file", "file/deeper", "with_file", "y" * 300, "loop"])
def test_an_output_folder_that_can_not_be(place, nothing_starts, elsewhere, capsys):
    Path("file").write_text("kept")
    Path("with_file").mkdir()
    Path("with_file", "checkpoints").write_text("kept")
    Path("loop").symlink_to("loop")
    make_folder(elsewhere / "pets", 1)
    message = refusal(capsys, ["--dataset", "pets", "--output-dir", place])
    assert names(message, "OUTPUT_DIR") and place in message
    assert Path("file").read_text() == Path("with_file", "checkpoints").read_text() == "kept"


# ---- full and failing disks ----------------------------------------------------------------------

FAILURES = [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS]


@pytest.mark.parametrize("number", FAILURES, ids=errno.errorcode.get)
@pytest.mark.parametrize("place", ["mkdir", "open", "write", "fsync", "replace"])
def test_a_write_that_fails_leaves_the_previous_file_whole(
    place, number, tmp_path, monkeypatch, capsys
):
    file = tmp_path / "out" / "model.pt"
    at.write_whole(file, lambda stream: stream.write(b"previous"))

    def fail(*arguments, **options):
        raise OSError(number, os.strerror(number))

    if place != "write":
        monkeypatch.setattr(at.os if place == "fsync" else at.Path, place, fail)
    with pytest.raises(SystemExit) as stopped:
        at.write_whole(file, fail if place == "write" else lambda stream: stream.write(b"next"))
    message = capsys.readouterr().err
    assert (
        stopped.value.code == 2
        and str(file) in message
        and os.strerror(number) in message
        and "--output-dir" in message
    )
    monkeypatch.undo()
    assert file.read_bytes() == b"previous" and os.listdir(tmp_path / "out") == ["model.pt"]


@pytest.mark.parametrize("first", [True, False], ids=["first", "again"])
def test_a_disk_that_is_really_full_while_a_checkpoint_is_written(first, tmp_path):
    file, tensors = (
        tmp_path / "model.pt",
        {str(index): torch.zeros(2**18) for index in range(6)},
    )  # 1 MB each
    if not first:
        file.write_bytes(b"previous")
    for limit in (100, 2**16, 2**20 + 10**5, 5 * 2**20 + 10**4):
        code, message = in_child(
            lambda: at.write_whole(file, lambda stream: torch.save(tensors, stream)),
            size_limit=limit,
        )
        assert code == 2 and "Traceback" not in message and str(file) in message, message
        assert os.listdir(tmp_path) == ([] if first else ["model.pt"]) and (
            first or file.read_bytes() == b"previous"
        )
    assert (
        in_child(
            lambda: at.write_whole(file, lambda stream: torch.save(tensors, stream)),
            size_limit=2**24,
        )[0]
        == 0
    )
    assert len(torch.load(file)) == 6


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
@pytest.mark.parametrize("kind", ["checkpoint", "figure", "text"])
def test_a_device_without_space(kind, tmp_path, capsys):
    def write(stream):
        if kind == "checkpoint":
            torch.save({"weight": torch.zeros(10**5)}, stream)
        elif kind == "figure":
            at.Figure().savefig(stream, format="png")
        else:
            stream.write(b"few bytes, which wait in the buffer")

    (tmp_path / "file.tmp").symlink_to("/dev/full")
    (tmp_path / "file").write_bytes(b"previous")
    with pytest.raises(SystemExit) as stopped:
        at.write_whole(tmp_path / "file", write)
    message = capsys.readouterr().err
    assert (
        stopped.value.code == 2
        and "No space left on device" in message
        and str(tmp_path / "file") in message
    )
    assert os.listdir(tmp_path) == ["file"] and (tmp_path / "file").read_bytes() == b"previous"


def test_no_room_for_decoded_images(tmp_path, monkeypatch, capsys):
    flags = quick_flags(MEMORY_GB=0, DATA_DIR=str(tmp_path / "data"))
    file = at.decoded_file(flags)

    def fail(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(at.os, "posix_fallocate", fail)
    with pytest.raises(SystemExit) as stopped:
        at.room_for(1000, 64, flags, fresh=True)
    message = capsys.readouterr().err
    assert (
        stopped.value.code == 2
        and str(file) in message
        and "No space left" in message
        and "--data-dir" in message
    )
    monkeypatch.undo()
    code, message = in_child(lambda: at.room_for(1000, 64, flags, fresh=True), size_limit=10**6)
    assert code == 2 and str(file) in message and "Traceback" not in message
    assert not file.exists()  # a part of it would keep the disk full
    assert at.room_for(10, 64, flags, fresh=True).shape == (10, 3, 64, 64)
    assert not file.exists()  # a kill in mid-decoding leaves nothing behind


def test_a_data_folder_that_can_not_be_made(elsewhere, capsys):
    make_folder(elsewhere / "pets")
    Path("data").write_text("kept")
    with pytest.raises(SystemExit) as stopped:
        at.load_data(quick_flags(DATASET="pets", MEMORY_GB=0, TRAIN_IMAGES=0, TEST_IMAGES=0), CPU)
    message = capsys.readouterr().err
    assert (
        stopped.value.code == 2 and "--data-dir" in message and Path("data").read_text() == "kept"
    )


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left"),
        urllib.error.URLError("No answer"),
        ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"),
    ],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("name", ["cifar10", "fashion_mnist"])
def test_a_download_that_fails_is_a_plain_message(name, error, elsewhere, monkeypatch, capsys):
    def load(folder, download):
        raise RuntimeError("not there")

    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr(at, name, load)
    monkeypatch.setattr(at.urllib.request, "urlopen", fail)
    with pytest.raises(SystemExit) as stopped:
        at.find_source(quick_flags(DATASET=name))
    message = capsys.readouterr().err
    assert (
        stopped.value.code == 2
        and str(error.args[-1]) in message
        and "DATASET" in message
        and "Traceback" not in message
    )


# ---- image files ---------------------------------------------------------------------------------

GREY = (200, 200, 200)


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def noise(width: int = 60, height: int = 40) -> Image.Image:
    """An image that compresses badly, so that half of its file is far from all of it."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))


def png_of_size(width: int, height: int) -> bytes:
    """A well-formed PNG of a few bytes whose header claims a size."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content))
            + kind
            + content
            + struct.pack(">I", zlib.crc32(kind + content))
        )

    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
        + chunk(b"IEND", b"")
    )


def palette(**options) -> bytes:
    image = Image.new("P", (9, 9), 1)
    image.putpalette([255, 0, 0, *GREY])
    return encoded(image, "PNG", **options)


def turned(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(Image.new("RGB", (30, 20), GREY), "JPEG", exif=exif)


def with_exif(content: bytes) -> bytes:
    return encoded(Image.new("RGB", (30, 20), GREY), "JPEG", exif=b"Exif\0\0" + content)


GIF = encoded(
    Image.new("L", (9, 9), 200), "GIF", save_all=True, append_images=[Image.new("L", (9, 9), 0)]
)
READABLE = {  # name: content, and the grey that it shows
    "png.png": (encoded(Image.new("RGB", (9, 9), GREY), "PNG"), 200),
    "png_named.jpg": (encoded(Image.new("RGB", (9, 9), GREY), "PNG"), 200),
    "upper.JPEG": (encoded(Image.new("RGB", (9, 9), GREY), "JPEG"), 200),
    "no_suffix": (encoded(Image.new("RGB", (9, 9), GREY), "BMP"), 200),
    "café ☕ (1).png": (encoded(Image.new("RGB", (9, 9), GREY), "PNG"), 200),
    "dot.png": (encoded(Image.new("RGB", (1, 1), GREY), "PNG"), 200),
    "tall.png": (encoded(Image.new("RGB", (1, 5000), GREY), "PNG"), 200),
    "wide.png": (encoded(Image.new("RGB", (5000, 1), GREY), "PNG"), 200),
    "tall.jpg": (encoded(Image.new("RGB", (1, 5000), GREY), "JPEG"), 200),
    "wide.jpg": (encoded(Image.new("RGB", (5000, 1), GREY), "JPEG"), 200),
    "L.png": (encoded(Image.new("L", (9, 9), 200), "PNG"), 200),
    "L.jpg": (encoded(Image.new("L", (9, 9), 200), "JPEG"), 200),
    "LA.png": (encoded(Image.new("LA", (9, 9), (200, 255)), "PNG"), 200),
    "LA_clear.png": (encoded(Image.new("LA", (9, 9), (200, 0)), "PNG"), 255),
    "1_white.png": (encoded(Image.new("1", (9, 9), 1), "PNG"), 255),
    "1_black.png": (encoded(Image.new("1", (9, 9), 0), "PNG"), 0),
    "P.png": (palette(), 200),
    "P_clear.png": (palette(transparency=1), 255),
    "P_other_clear.png": (palette(transparency=0), 200),
    "P_half.png": (palette(transparency=b"\xff\x80"), 228),
    "RGB_clear.png": (encoded(Image.new("RGB", (9, 9), GREY), "PNG", transparency=GREY), 255),
    "L_clear.png": (encoded(Image.new("L", (9, 9), 200), "PNG", transparency=200), 255),
    "RGBA.png": (encoded(Image.new("RGBA", (9, 9), (*GREY, 255)), "PNG"), 200),
    "RGBA_half.png": (encoded(Image.new("RGBA", (9, 9), (*GREY, 128)), "PNG"), 228),
    "CMYK.jpg": (encoded(Image.new("CMYK", (9, 9), (55, 55, 55, 0)), "JPEG"), 200),
    "CMYK.tif": (encoded(Image.new("CMYK", (9, 9), (55, 55, 55, 0)), "TIFF"), 200),
    "LAB.tif": (encoded(Image.new("LAB", (9, 9), (205, 128, 128)), "TIFF"), 199),
    "I16.png": (encoded(Image.fromarray(np.full((9, 9), 200 * 256, np.uint16)), "PNG"), 200),
    "I16_white.png": (encoded(Image.fromarray(np.full((9, 9), 65535, np.uint16)), "PNG"), 255),
    "I16.tif": (encoded(Image.fromarray(np.full((9, 9), 200 * 256, np.uint16)), "TIFF"), 200),
    "I16_big_endian.tif": (encoded(Image.frombytes("I;16B", (9, 9), b"\xc8\0" * 81), "TIFF"), 200),
    "I.tif": (encoded(Image.new("I", (9, 9), 200 * 256), "TIFF"), 200),
    "F.tif": (encoded(Image.new("F", (9, 9), 200), "TIFF"), 200),
    "lzw.tif": (encoded(Image.new("RGB", (9, 9), GREY), "TIFF", compression="tiff_lzw"), 200),
    "animated.gif": (GIF, 200),
    "web.webp": (encoded(Image.new("RGB", (9, 9), GREY), "WEBP"), 200),
    "ppm.ppm": (encoded(Image.new("RGB", (9, 9), GREY), "PPM"), 200),
    "progressive.jpg": (encoded(Image.new("RGB", (99, 99), GREY), "JPEG", progressive=True), 200),
    **{f"turned_{orientation}.jpg": (turned(orientation), 200) for orientation in range(10)},
    "exif_garbage.jpg": (with_exif(b"\xff" * 40), 200),
    "exif_empty.jpg": (with_exif(b""), 200),
    "exif_cut.jpg": (with_exif(b"II*\0\x08\0\0\0\x05\0\x12\x01"), 200),
    "exif_text.jpg": (with_exif(b"no such thing here"), 200),
    "exif_far.jpg": (with_exif(b"MM\0*\xff\xff\xff\xf0"), 200),
}

JPEG, PNG = encoded(noise(), "JPEG"), encoded(noise(), "PNG")
NO_IMAGES = ("list.csv", "Thumbs.db")  # by their names
UNREADABLE = {
    "empty.jpg": b"",
    "empty.png": b"",
    "text.jpg": b"These are my notes on cats.\n",
    "page.png": b"<!DOCTYPE html><html>404",
    "drawing.svg": b'<svg xmlns="http://www.w3.org/2000/svg"/>',
    "list.csv": b"name,class\n1,cat\n",
    "Thumbs.db": b"\xd0\xcf\x11\xe0",
    "cut.jpg": JPEG[: len(JPEG) // 2],
    "cut.png": PNG[: len(PNG) // 2],
    "header.jpg": JPEG[:20],
    "header.png": PNG[:40],
    "one.jpg": JPEG[:1],
    "cut.webp": encoded(noise(), "WEBP")[:200],
    "cut.tif": encoded(noise(), "TIFF")[:300],
    "cut.bmp": encoded(noise(), "BMP")[:300],
    "bomb.png": png_of_size(20000, 20000),
    "bomb_wide.png": png_of_size(2**31 - 1, 1),
    "no_pixels.png": png_of_size(0, 0),
    "zeros.png": b"\0" * 4096,
    "noise.jpg": np.random.default_rng(0).bytes(4096),
}


@pytest.mark.parametrize("name", READABLE)
def test_a_strange_but_whole_image_is_read(name, tmp_path):
    content, grey = READABLE[name]
    (tmp_path / name).write_bytes(content)
    for side in (1, 8, 37):
        images, unreadable = at.decode_all([tmp_path / name], side, quick_flags())
        assert not unreadable and images.shape == (1, 3, side, side)
        assert (images.float() - grey).abs().max() <= 4


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize(
    ("orientation", "stored"),
    list(
        enumerate(
            [
                None,
                Image.Transpose.FLIP_LEFT_RIGHT,
                Image.Transpose.ROTATE_180,
                Image.Transpose.FLIP_TOP_BOTTOM,
                Image.Transpose.TRANSPOSE,
                Image.Transpose.ROTATE_90,
                Image.Transpose.TRANSVERSE,
                Image.Transpose.ROTATE_270,
            ],
            1,
        )
    ),
)
def test_a_turned_picture_is_seen_upright(orientation, stored, kind, tmp_path):
    upright = Image.new("RGB", (32, 32), "black")
    upright.paste("white", (0, 0, 16, 16))
    upright.paste((128, 128, 128), (16, 0, 32, 16))  # no turn and no mirroring looks like another
    exif = Image.Exif()
    exif[0x0112] = orientation
    (upright if stored is None else upright.transpose(stored)).save(
        tmp_path / "image", kind, exif=exif
    )
    seen = at.decode(tmp_path / "image", 32)[0].astype(int)
    wanted = np.asarray(upright)[..., 0].astype(int)
    assert np.abs(seen - wanted).mean() < 8


@pytest.mark.parametrize("name", UNREADABLE)
def test_a_file_that_is_no_image_is_reported(name, tmp_path):
    (tmp_path / name).write_bytes(UNREADABLE[name])
    images, unreadable = at.decode_all([tmp_path / name], 8, quick_flags())
    assert (
        list(unreadable) == [0]
        and unreadable[0].startswith(f"{tmp_path / name}: ")
        and "\n" not in unreadable[0]
    )
    assert not images.any()


def with_unreadable(root: Path) -> tuple[Path, list[Path]]:
    """A folder of three classes with good images, and every kind of bad image among them."""
    folder, bad = make_folder(root, 20), []
    pictures = {name: content for name, content in UNREADABLE.items() if name not in NO_IMAGES}
    for index, (name, content) in enumerate(pictures.items()):
        bad.append(folder / ("cat", "dog", "owl")[index % 3] / name)
        bad[-1].write_bytes(content)
    (folder / "cat" / "gone.png").symlink_to("nowhere.png")
    return folder, [*bad, folder / "cat" / "gone.png"]


def test_unreadable_files_stop_the_run_with_ten_paths_in_one_message_and_all_in_a_file(
    elsewhere, monkeypatch, capsys
):
    monkeypatch.setattr(at, "new_run", lambda *arguments, **options: pytest.fail("too late"))
    folder, bad = with_unreadable(elsewhere / "pets")
    before = snapshot(folder)
    message = refusal(
        capsys,
        [
            "--dataset",
            str(folder),
            "--image-size",
            "32",
            "--architectures",
            "test_resnet",
            "--batch-size",
            "8",
            "--gradient-accumulation-steps",
            "1",
            "--pretrained",
            "none",
        ],
        one_line=False,
    )
    assert f"{len(bad)} files" in message and "--skip-unreadable" in message
    lines = message.splitlines()
    listed = Path("outputs", "unreadable_files.txt").read_text().splitlines()
    assert lines[1:11] == listed[:10] and len(lines) == 12 and len(listed) == len(bad)
    assert f"{len(bad) - 10} more" in lines[11] and "unreadable_files.txt" in lines[11]
    assert [sum(line.startswith(f"{path}: ") for line in listed) for path in bad] == [1] * len(bad)
    assert snapshot(folder) == before


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("memory", [4.0, 0])
def test_unreadable_files_are_left_out_of_every_part_on_request(seed, memory, elsewhere):
    folder, bad = with_unreadable(elsewhere / "pets")
    before = snapshot(folder)
    data, notices = at.load_data(
        quick_flags(
            DATASET=str(folder),
            SKIP_UNREADABLE=True,
            TRAIN_IMAGES=0,
            TEST_IMAGES=0,
            SEED=seed,
            MEMORY_GB=memory,
            DATA_DIR=str(elsewhere / "data"),
        ),
        CPU,
    )
    notice = notices[-1]
    assert notice.startswith(f"SKIP_UNREADABLE: {len(bad)} of {60 + len(bad)} files")
    assert notice.count("\n") == 11 and f"{len(bad) - 10} more" in notice
    everyone = torch.cat(list(data.split.values()))
    assert len(everyone) == len(everyone.unique()) == 60
    assert torch.equal(
        data.images[everyone].float().mean((2, 3)).argmax(1), data.labels[everyone]
    )  # a colour each class
    assert (
        not data.images[~torch.isin(torch.arange(len(data.images)), everyone)].any()
        and snapshot(folder) == before
    )


def test_too_many_unreadable_files_stop_even_so(elsewhere, capsys):
    folder = make_folder(elsewhere / "pets", 20)
    for file in (folder / "owl").iterdir():
        file.write_bytes(b"")
    with pytest.raises(SystemExit) as stopped:
        at.load_data(
            quick_flags(DATASET=str(folder), SKIP_UNREADABLE=True, TRAIN_IMAGES=0, TEST_IMAGES=0),
            CPU,
        )
    message = capsys.readouterr().err
    assert stopped.value.code == 2 and "no image to train on of owl is left" in message
    assert "20 of" in message and str(folder / "owl") in message and "TRAIN_IMAGES" in message


def test_a_pipe_among_the_images_is_reported_instead_of_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    os.mkdir(tmp_path / "folder.png")

    def work():
        signal.alarm(3)
        _, unreadable = at.decode_all(
            [tmp_path / "pipe.png", tmp_path / "folder.png"], 8, quick_flags()
        )
        print(sorted(unreadable))

    assert in_child(work) == (0, "[0, 1]\n")


def test_names_that_are_not_utf8_stop_nothing(elsewhere, capsys):
    try:
        place = elsewhere / os.fsdecode(b"B\xe4ume")
        folder = make_folder(place, 12, (os.fsdecode(b"caf\xe9"), "dog"))
        (folder / "dog" / os.fsdecode(b"gar\xe7on.png")).write_bytes(b"")
    except OSError:
        pytest.skip("this file system takes no such name")
    data, notices = at.load_data(
        quick_flags(
            DATASET=str(folder), SKIP_UNREADABLE=True, TRAIN_IMAGES=0, TEST_IMAGES=0, BATCH_SIZE=4
        ),
        CPU,
    )
    at.say(*notices, *data.classes)
    at.write_text(elsewhere / "report.txt", "\n".join([*notices, *data.classes]))
    assert "gar" in capsys.readouterr().out
    assert r"B\udce4ume" in (elsewhere / "report.txt").read_text()


FORMATS = {
    "jpg": ("JPEG", {}),
    "png": ("PNG", {}),
    "gif": ("GIF", {}),
    "webp": ("WEBP", {}),
    "bmp": ("BMP", {}),
    "tif": ("TIFF", {"compression": "tiff_lzw"}),
    "lossless.webp": ("WEBP", {"lossless": True}),
    "exif.jpg": (
        "JPEG",
        {"exif": b"Exif\0\0MM\0*\0\0\0\x08\0\1\1\x12\0\3\0\0\0\1\0\6\0\0\0\0\0\0"},
    ),
}


def damaged(content: bytes, random: np.random.Generator) -> bytes:
    """A file with some bytes changed, most often near its start, or cut, lost, put in or behind."""
    kind, place = random.integers(6), int(random.integers(len(content)))
    length = int(random.integers(1, 40))
    if kind == 0:
        return content[:place]
    if kind == 1:
        return content[:place] + content[place + length :]
    if kind == 2:
        return content[:place] + random.bytes(length) + content[place:]
    if kind == 3:
        return content + random.bytes(length)
    changed = bytearray(content)
    for _ in range(random.integers(1, 9)):
        changed[
            random.integers(len(content) if random.random() < 0.5 else min(80, len(content)))
        ] = random.integers(256)
    return bytes(changed)


@pytest.mark.parametrize("suffix", FORMATS)
def test_random_damage_is_decoded_or_reported_but_never_raised(suffix, tmp_path, monkeypatch):
    monkeypatch.setattr(
        Image, "MAX_IMAGE_PIXELS", 10**5
    )  # a header that claims more would only take time here
    random, (kind, options) = np.random.default_rng(zlib.crc32(suffix.encode())), FORMATS[suffix]
    content, paths = encoded(noise(40, 30), kind, **options), []
    for number in range(80):
        paths.append(tmp_path / f"{number}.{suffix}")
        paths[-1].write_bytes(damaged(content, random))
    images, unreadable = at.decode_all(paths, 24, quick_flags())
    assert images.shape == (80, 3, 24, 24) and 0 < len(unreadable) < 80
    for number, path in enumerate(paths):
        if number in unreadable:
            assert unreadable[number].startswith(f"{path}: ") and not images[number].any()
        else:
            assert np.array_equal(images[number].numpy(), at.decode(path, 24))
