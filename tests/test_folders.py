"""Other people's folders: split folders by any name, links, sidecars, Unicode, stray images."""

import os
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CPU, quick_flags
from PIL import Image

import advanced_techniques as at


def pictures(folder: Path, count: int = 3, start: int = 0) -> None:
    """Distinct small images, number by number."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(start, start + count):
        noise = np.random.default_rng(number).integers(0, 256, (8, 8, 3), np.uint8)
        Image.fromarray(noise).save(folder / f"{number}.png")


def data_set(root: Path, parts: tuple[str, ...], classes: tuple[str, ...] = ("cat", "dog")) -> Path:
    for part in parts:
        for name in classes:
            pictures(root / part / name)
    return root


def source_of(folder: Path) -> at.Source:
    return at.image_folder(folder, 8, quick_flags())


def refusal(folder: Path, capsys) -> str:
    with pytest.raises(SystemExit) as stopped:
        source_of(folder)
    message = capsys.readouterr().err
    assert stopped.value.code == 2 and message.count("\n") == 1 and "DATASET" in message
    return message


# ---- split folders -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "names",
    [
        ("Train", "Val", "Test"),
        ("TRAIN", "VALIDATION", "TEST"),
        ("train", "dev", "holdout"),
        ("training", "valid", "Hold-Out"),
        ("Training Set", "Validation Set", "Test Set"),
        ("train_images", "val_images", "test"),
        ("seg_train", "seg_val", "seg_test"),
        ("train2017", "val2017", "test2017"),
        ("01-Train", "02-Val", "03-Test"),
        ("TrainData", "DevData", "TestData"),
    ],
)
def test_the_usual_names_of_split_folders_are_known(names, tmp_path):
    source = source_of(data_set(tmp_path / "pets", names))
    assert source.classes == ["cat", "dog"]
    for role in ("train", "validation", "test"):
        assert (source.roles == role).sum() == 6
    assert any(names[0] in notice and "trained on" in notice for notice in source.notices)


@pytest.mark.parametrize("names", [("Training", "Testing"), ("Train", "TEST"), ("train", "eval")])
def test_a_part_that_is_missing_is_said(names, tmp_path):
    source = source_of(data_set(tmp_path / "pets", names))
    assert source.classes == ["cat", "dog"] and set(source.roles) == {"train", "test"}
    assert any("set apart for validation" in notice for notice in source.notices)


@pytest.mark.parametrize(
    ("parts", "wanted"),
    [
        (("A", "B"), "A/, B/"),
        (("fold1", "fold2", "fold3"), "fold1/"),
        (("Val", "Test"), "Test/, Val/"),
        (("entrenamiento", "prueba"), "entrenamiento/"),
        (("train", "testing_things_more"), "train/"),
        (("train", "val", "dev"), "validation"),
        (("Train", "train", "test"), "train"),
    ],
)
def test_folders_that_may_be_parts_or_classes_are_asked_about(parts, wanted, tmp_path, capsys):
    folder = data_set(tmp_path / "pets", parts)
    assert wanted in refusal(folder, capsys)


def test_a_class_that_the_training_part_lacks_is_named(tmp_path, capsys):
    folder = data_set(tmp_path / "pets", ("train", "test"))
    pictures(folder / "test" / "unknown", 3, 50)
    source = source_of(folder)
    with pytest.raises(SystemExit):
        at.split(source, 0, 0, 0)
    message = capsys.readouterr().err
    assert "no folder unknown" in message and "TRAIN_IMAGES" not in message


def test_parts_without_class_folders_are_no_classes(tmp_path, capsys):
    for part in ("train", "test"):
        pictures(tmp_path / "pets" / part)
    message = refusal(tmp_path / "pets", capsys)
    assert "train" in message and "class folders" in message


@pytest.mark.parametrize(
    "classes",
    [("train", "truck"), ("strain", "contest"), ("test tube", "train station"), ("val", "dev-x")],
)
def test_classes_that_are_called_a_little_like_parts_stay_classes(classes, tmp_path):
    source = source_of(data_set(tmp_path, ("things",), classes) / "things")
    assert source.classes == sorted(classes) and set(source.roles) == {""}


def test_classes_with_one_folder_each_of_the_same_name_stay_classes(tmp_path):
    for name in ("cat", "dog"):
        pictures(tmp_path / "pets" / name / "images")
    assert source_of(tmp_path / "pets").classes == ["cat", "dog"]


def test_a_folder_around_the_data_set_is_named(tmp_path, capsys):
    data_set(tmp_path / "archive", ("pets",))
    assert str(tmp_path / "archive" / "pets") in refusal(tmp_path / "archive", capsys)


def test_what_archives_leave_behind_is_no_class(tmp_path):
    folder = data_set(tmp_path / "pets", ("",))
    pictures(folder / "__MACOSX" / "cat")
    pictures(folder / "cat" / "@eaDir")
    source = source_of(folder)
    assert source.classes == ["cat", "dog"] and len(source.labels) == 6


# ---- links ---------------------------------------------------------------------------------------


def read_names(monkeypatch, folder: Path) -> list[tuple[str, str]]:
    """The class and real path of each image that would be read."""
    asked: list[Path] = []

    def decode_all(paths, *_):
        asked.extend(paths)
        return None, {}

    monkeypatch.setattr(at, "decode_all", decode_all)
    source = source_of(folder)
    source.read(np.arange(len(source.labels)))
    classes = [source.classes[label] for label in source.labels]
    return list(zip(classes, map(os.path.realpath, asked), strict=True))


def test_linked_folders_are_followed_each_once(tmp_path, monkeypatch):
    folder = data_set(tmp_path / "pets", ("",))
    pictures(tmp_path / "store" / "cats" / "deep", 4, 10)
    pictures(tmp_path / "store" / "more", 2, 20)
    (tmp_path / "store" / "cats" / "more").symlink_to(tmp_path / "store" / "more")
    for name in ("linked", "linked again"):
        (folder / "cat" / name).symlink_to(tmp_path / "store" / "cats")
    found = read_names(monkeypatch, folder)
    assert len(found) == len(set(found)) == 12
    assert sum(name == "cat" for name, _ in found) == 9


@pytest.mark.parametrize("target", [".", "..", "../..", "../dog", "../cat", "/"])
def test_links_that_lead_back_bring_no_image_twice(target, tmp_path, monkeypatch):
    folder = data_set(tmp_path / "pets", ("",))
    pictures(tmp_path / "neighbour")
    (folder / "cat" / "loop").symlink_to(target)
    found = read_names(monkeypatch, folder)
    assert len(found) == 6
    assert all(Path(path).parent.name == name for name, path in found)
    assert any("Not followed: 1" in notice for notice in source_of(folder).notices)


def test_a_link_to_the_data_set_itself_is_no_class(tmp_path):
    folder = data_set(tmp_path / "pets", ("",))
    (folder / "all").symlink_to(".")
    assert source_of(folder).classes == ["cat", "dog"]


def test_loops_outside_and_class_folders_that_are_links(tmp_path, monkeypatch):
    pictures(tmp_path / "store" / "cats")
    (tmp_path / "store" / "cats" / "up").symlink_to("..")
    pictures(tmp_path / "store" / "secret", 2, 50)
    folder = data_set(tmp_path / "pets", ("",), ("dog",))
    (folder / "cat").symlink_to(tmp_path / "store" / "cats")
    found = read_names(monkeypatch, folder)
    assert len(found) == 6 and not any("secret" in path for _, path in found)


def test_two_classes_that_are_one_folder_are_refused(tmp_path, capsys):
    folder = data_set(tmp_path / "pets", ("",))
    (folder / "a kitten").symlink_to("cat")
    message = refusal(folder, capsys)
    assert "a kitten" in message and "Not followed" in message


def test_predict_follows_links_too(tmp_path):
    pictures(tmp_path / "store", 2)
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "linked").symlink_to(tmp_path / "store")
    (tmp_path / "store" / "back").symlink_to(tmp_path / "new")
    assert len(at.files_below(tmp_path / "new")) == 2


# ---- files that are no images --------------------------------------------------------------------


def test_sidecars_are_left_out_and_counted_by_kind_in_one_line(tmp_path):
    folder = data_set(tmp_path / "pets", ("",))
    for name in ("cat", "dog"):
        for number in range(3):
            (folder / name / f"{number}.txt").write_text("P5 a caption\n")
            (folder / name / f"{number}.JSON").write_text("{}")
        (folder / name / "Thumbs.db").write_bytes(b"\xd0\xcf\x11\xe0" * 100)
        (folder / name / "empty").write_bytes(b"")
    os.mkfifo(folder / "cat" / "pipe")
    source = source_of(folder)
    assert len(source.labels) == 6
    (line,) = [notice for notice in source.notices if "no images" in notice]
    for counted in ("6 .txt", "6 .json", "2 .db", "3 without an ending"):
        assert counted in line
    assert "\n" not in line
    source.read(np.arange(6))  # nothing of it is decoded, so nothing stops here


def test_images_under_strange_names_stay_images(tmp_path):
    folder = data_set(tmp_path / "pets", ("",))
    for number, name in enumerate(("no_ending", "picture.jpg_large", "picture.001")):
        Image.new("RGB", (9, 9), (number, 0, 0)).save(folder / "cat" / name, "PNG")
    (folder / "cat" / "damaged.jpg").write_bytes(b"text")
    (folder / "cat" / "phone.heic").write_bytes(b"\0\0\0\x18ftypheic")
    assert len(source_of(folder).labels) == 6 + 5


def test_a_class_of_sidecars_alone_is_refused(tmp_path, capsys):
    folder = data_set(tmp_path / "pets", ("",))
    (folder / "labels").mkdir()
    (folder / "labels" / "1.xml").write_text("<a/>")
    message = refusal(folder, capsys)
    assert "labels" in message and "1 .xml" in message


def test_unreadable_files_show_ten_and_go_to_a_file(tmp_path, capsys):
    unreadable = {number: f"{number:03d}.png: damaged" for number in range(25)}
    flags = quick_flags(OUTPUT_DIR=str(tmp_path / "out"))
    with pytest.raises(SystemExit):
        at.stop_at_unreadable(unreadable, flags)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 12 and "25 files" in lines[0] and "15 more" in lines[-1]
    listed = (tmp_path / "out" / "unreadable_files.txt").read_text().splitlines()
    assert listed == sorted(unreadable.values()) and str(tmp_path / "out") in lines[-1]
    (tmp_path / "file").write_text("")
    no_folder = quick_flags(OUTPUT_DIR=str(tmp_path / "file"))
    assert "can't be written" in at.shown_unreadable(unreadable, no_folder)[-1]


# ---- names and places ----------------------------------------------------------------------------


def test_a_class_in_two_unicode_spellings_is_one(tmp_path):
    names = ("café", "über", "a")
    for part, form in (("train", "NFC"), ("val", "NFD"), ("test", "NFD")):
        for name in names:
            pictures(tmp_path / "pets" / part / unicodedata.normalize(form, name))
    source = source_of(tmp_path / "pets")
    assert source.classes == sorted(unicodedata.normalize("NFC", name) for name in names)
    assert np.bincount(source.labels).tolist() == [9, 9, 9]


def test_two_spellings_beside_each_other_are_one_class(tmp_path):
    for form in ("NFC", "NFD"):
        pictures(tmp_path / "pets" / unicodedata.normalize(form, "café"))
    pictures(tmp_path / "pets" / "dog")
    assert np.bincount(source_of(tmp_path / "pets").labels).tolist() == [6, 3]


def test_images_outside_class_folders_are_said(tmp_path):
    folder = data_set(tmp_path / "pets", ("train", "val"))
    pictures(folder / "test", 4)
    pictures(folder / "train", 2)
    pictures(folder / "unlabelled" / "deep", 5)
    (folder / "labels.csv").write_text("")
    said = "\n".join(source_of(folder).notices)
    assert "2 images lie beside the class folders" in said
    assert "4 images" in said and "test" in said and "5 images" in said and "unlabelled" in said
    assert "set apart for test" in said and "labels.csv" not in said


def test_loose_images_beside_classes_are_said(tmp_path):
    folder = data_set(tmp_path / "pets", ("",))
    pictures(folder, 3)
    assert any("3 images lie beside" in notice for notice in source_of(folder).notices)


# ---- parts that lack something -------------------------------------------------------------------


def plain_source(counts: dict[str, int]) -> at.Source:
    labels = np.repeat(np.arange(len(counts)), list(counts.values()))
    return at.Source("test", list(counts), labels, np.full(len(labels), ""), lambda chosen: None)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("limit", [0, 20])
def test_a_class_with_one_image_is_trained_on_whatever_the_seed(seed, limit):
    source = plain_source({"cat": 60, "dog": 60, "owl": 1, "emu": 1})
    parts = at.split(source, limit, 0, seed)
    learned = source.labels[parts["train"]].tolist()
    assert learned.count(2) == learned.count(3) == 1
    assert len(parts["train"]) == (limit or 122 - len(parts["test"]) - len(parts["validation"]))
    everyone = np.concatenate(list(parts.values()))
    assert len(everyone) == len(set(everyone.tolist()))


def test_what_no_part_has_is_said():
    source = plain_source({"cat": 60, "dog": 60, "owl": 1})
    parts = at.split(source, 20, 10, 0)
    said = list(at.part_notices(source, torch.from_numpy(source.labels), parts))
    used = sum(len(part) for part in parts.values())
    # part_notices counts by the parts' indices, which are the source's own here
    assert any(f"{121 - used:,} of 121 images are not used" in line for line in said)
    assert any(line.startswith("No validation images of owl") for line in said)
    assert any(line.startswith("No test images of owl") for line in said)
    assert any("A single image to train on of owl" in line for line in said)


# ---- images larger than what is seen -------------------------------------------------------------


@pytest.mark.parametrize(("size", "stored"), [(32, 37), (16, 18), (56, 64), (64, 64), (96, 64)])
def test_images_are_shown_nearly_whole_below_their_stored_size(size, stored):
    data, _ = at.load_data(quick_flags(DATASET="shapes", IMAGE_SIZE=size), CPU)
    assert data.images.shape[-1] == stored and data.images.dtype == torch.uint8
