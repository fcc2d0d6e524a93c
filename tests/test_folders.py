"""Other people's folders: parts by any name, links, stray files, spellings, closed doors."""

import os
import tempfile
import textwrap
import unicodedata
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import call, class_pictures, command, quick_flags
from PIL import Image

import advanced_techniques as at

NOBODY = 65534
PETS = ["cat", "dog"]


def built(root: Path, *places: str, count: int = 3) -> Path:
    """A folder with as many distinct pictures in each of the places below it."""
    root.mkdir(parents=True, exist_ok=True)
    for seed, place in enumerate(places):
        class_pictures(root, {place: count}, 8, seed)
    return root


def parted(*parts: str) -> list[str]:
    return [f"{part}/{name}" for part in parts for name in PETS]


def source_of(folder: Path, **changes) -> at.Source:
    return at.image_folder(folder, quick_flags(**changes))


def refusal(folder: Path) -> str:
    with pytest.raises(at.Stop) as stopped:
        source_of(folder)
    message = str(stopped.value)
    assert message.startswith(f"DATASET = {folder}: ")
    return message


def snapshot(folder: Path) -> list[tuple]:
    return sorted((path, path.lstat().st_mtime_ns) for path in (folder, *folder.rglob("*")))


@pytest.mark.parametrize("names", [
    ("Train", "Val", "Test"), ("TRAIN", "VALIDATION", "TEST"), ("train", "dev", "holdout"),
    ("training", "valid", "Hold-Out"), ("Training Set", "Validation Set", "Test Set"),
    ("seg_train", "seg_val", "seg_test"), ("train2017", "val2017", "test2017"),
    ("TrainData", "DevData", "TestData"), ("a-train", "a-dev-1", "my tests"),
    ("Training", "", "Testing"), ("train", "", "eval"), ("train", "val", "")])
def test_the_usual_names_of_parts_are_known(names, tmp_path):
    role_of = dict(zip(names, ("train", "validation", "test"), strict=True))
    role_of.pop("", None)
    source = source_of(built(tmp_path / "pets", *parted(*role_of)))
    assert source.classes == PETS and len(source.labels) == 6 * len(role_of)
    assert [role_of[path.parts[-3]] for path in source.files] == source.roles.tolist()
    assert any("What is missing" in line for line in source.notices) == (len(role_of) == 2)


@pytest.mark.parametrize(("places", "wanted"), [
    (["train", "test"], "test/, train/"),
    (["train/cat", "Training/cat", "test/cat"], "both be the train part"),
    (["train/cat", "val/cat", "dev/cat"], "both be the validation part"),
    (parted("A", "B"), "A/, B/"),
    (parted("fold1", "fold2", "fold3"), "fold1/"),
    (parted("val", "test"), "test/, val/"),
    (parted("entrenamiento", "prueba"), "prueba/"),
    ([*parted("train", "test"), "extra/cat"], "extra/"),
    ([*parted("train"), "prueba"], "prueba/")])
def test_what_could_be_read_two_ways_is_asked_about(places, wanted, tmp_path):
    assert wanted in refusal(built(tmp_path / "pets", *places))


@pytest.mark.parametrize("classes", [
    ("train", "truck"), ("contest", "strain"), ("test tube", "train station"), ("dev-x", "val"),
    ("car/images", "truck/images")])
def test_classes_that_look_a_little_like_parts_stay_classes(classes, tmp_path):
    source = source_of(built(tmp_path / "things", *classes))
    assert source.classes == [Path(name).parts[0] for name in classes]
    assert set(source.roles) == {""}


@pytest.mark.parametrize("around", [
    ["archive"], ["a/b"], ["pets/train", "pets/test"],
    ["training_set/training_set", "test_set/test_set"]])
def test_folders_around_others_are_looked_through(around, tmp_path):
    source = source_of(built(tmp_path / "top", *parted(*around)))
    assert source.classes == PETS
    assert Counter(source.roles) == ({"": 6} if len(around) == 1 else {"train": 6, "test": 6})


@pytest.mark.parametrize("places", [[], [""], ["cat"], ["train/cat"], [".hidden", "cat"]])
def test_fewer_than_two_classes_are_refused(places, tmp_path):
    assert "two class folders" in refusal(built(tmp_path / "pets", *places))


@pytest.mark.parametrize("part", [".", "train"])
@pytest.mark.parametrize("file", ["1.xml", ".1.png"])
def test_a_class_folder_without_images_is_named(part, file, tmp_path):
    folder = built(tmp_path / "pets", *parted(part))
    (folder / part / "owl").mkdir()
    (folder / part / "owl" / file).write_text("<a/>")
    assert f"no images in {folder / part / 'owl'}" in refusal(folder)


def test_hidden_and_system_files_are_left_out_in_silence(tmp_path):
    folder = built(tmp_path / "pets", *PETS, "__MACOSX/cat", "cat/@eaDir", "dog/.ipynb_checkpoints")
    for name in ("._0.png", ".DS_Store"):
        (folder / "cat" / name).write_bytes(b"\0")
    source = source_of(folder)
    assert source.classes == PETS and len(source.labels) == 6 and len(source.notices) == 1


def test_other_files_and_loose_images_are_told_in_one_line_each(tmp_path):
    folder = built(tmp_path / "pets", *parted("train", "test"))
    for number in range(4):
        (folder / "train" / "cat" / f"{number}.txt").write_text("")
    (folder / "test" / "dog" / "Thumbs.db").write_bytes(b"\xd0\xcf\x11\xe0")
    os.mkfifo(folder / "train" / "dog" / "pipe")
    built(folder, "train", "test", "", "unlabelled/deep", count=2)
    source = source_of(folder)
    assert len(source.labels) == 12 and not any("\n" in line for line in source.notices)
    assert any(line.startswith("6 files are no images") for line in source.notices)
    assert any(line.startswith("8 images lie in no class folder") for line in source.notices)


def test_the_ending_alone_tells_what_is_an_image(tmp_path):
    folder = built(tmp_path / "pets", *PETS)
    for name in ("damaged.JPG", "phone.heic", "raw.CR2", "a.webp"):
        (folder / "cat" / name).write_bytes(b"text")
    Image.new("RGB", (9, 9)).save(folder / "dog" / "picture", "PNG")
    (folder / "dog" / "film.mpg").write_bytes(b"text")
    assert np.bincount(source_of(folder).labels).tolist() == [7, 3]


def found(folder: Path) -> Counter:
    """How often each file, by its class and real path, would be read."""
    source = source_of(folder)
    classes = [source.classes[label] for label in source.labels]
    return Counter(zip(classes, map(os.path.realpath, source.files), strict=True))


def test_linked_folders_are_followed_once_each(tmp_path):
    folder = built(tmp_path / "pets", *PETS)
    store = built(tmp_path / "store", "cats/deep", "more", "secret", "owls")
    (store / "cats" / "more").symlink_to(store / "more")
    (store / "owls" / "up").symlink_to("..")
    (folder / "owl").symlink_to(store / "owls")
    for name in ("linked", "linked again"):
        (folder / "cat" / name).symlink_to(store / "cats")
    seen = found(folder)
    assert set(seen.values()) == {1} and not any("secret" in path for _, path in seen)
    assert Counter(name for name, _ in seen) == dict(cat=9, dog=3, owl=3)
    assert len(at.image_files(folder / "cat", set())[0]) == 9  # as --predict does


@pytest.mark.parametrize("target", [".", "..", "../..", "../dog", "../cat", "/"])
def test_links_that_lead_back_bring_no_image_twice(target, tmp_path):
    folder = built(tmp_path / "pets", *PETS)
    built(tmp_path / "neighbour", "")
    (folder / "cat" / "loop").symlink_to(target)
    (folder / "all").symlink_to(".")
    seen = found(folder)
    assert len(seen) == seen.total() == 6
    assert all(Path(path).parent.name == name for name, path in seen)


@pytest.mark.parametrize("parts", [".", "train test"])
def test_a_class_in_two_unicode_spellings_is_one(parts, tmp_path):
    for part, form in zip((parts.split() * 2)[:2], ("NFD", "NFC"), strict=True):
        for name in ("café", "über"):
            built(tmp_path / "pets", f"{part}/{unicodedata.normalize(form, name)}")
    source = source_of(tmp_path / "pets")
    assert source.classes == ["café", "über"]
    assert np.bincount(source.labels).tolist() == [6, 6]


def test_names_that_are_not_utf8_can_be_written(tmp_path):
    source = source_of(built(tmp_path / os.fsdecode(b"B\xe4ume"), os.fsdecode(b"caf\xe9"), "dog"))
    assert "\n".join([source.name, *source.classes, *source.notices]).encode("utf-8")


@pytest.mark.parametrize(("closed", "mode"), [
    ("pets", 0), ("pets", 0o444), ("pets", 0o111), ("pets/dog", 0), ("pets/dog", 0o444),
    ("pets/dog/puppies", 0), ("pets/dog/puppies", 0o444), ("pets/cat/001.png", 0)])
def test_what_must_not_be_opened_is_named_in_a_sentence(closed, mode):
    def read() -> None:
        source = source_of(folder, OUTPUT_DIR=f"{place}/out")
        source.read(np.arange(len(source.labels)))

    user = os.geteuid()
    with tempfile.TemporaryDirectory(dir="/tmp") as place:  # pytest's own let nobody else in
        os.chmod(place, 0o777)
        folder = built(Path(place, "pets"), *PETS, "dog/puppies")
        read()
        os.chmod(Path(place, closed), mode)
        try:
            os.seteuid(user or NOBODY)  # root may open everything
            with pytest.raises(at.Stop, match="DATASET") as stopped:
                read()
        finally:
            os.seteuid(user)
            os.chmod(Path(place, closed), 0o755)
    assert closed in str(stopped.value) and "Permission denied" in str(stopped.value)


@pytest.mark.parametrize("memory", [0, 1])
def test_nothing_is_written_into_the_folder(memory, tmp_path):
    folder = built(tmp_path / "pets", *parted("train", "test"), count=12)
    (folder / "test" / "dog" / "damaged.png").write_text("")
    before = snapshot(folder)
    at.load_data(at.Job(quick_flags(DATASET=str(folder), DATA_DIR=str(tmp_path / "data"),
                                    SKIP_UNREADABLE=True, MEMORY_GB=memory)))
    assert snapshot(folder) == before


@pytest.mark.parametrize("flag", ["OUTPUT_DIR", "DATA_DIR"])
@pytest.mark.parametrize("inside", ["pets", "pets/cat", "other/../pets/out", "link/x"])
def test_what_is_written_never_lies_in_the_data_set(flag, inside, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = snapshot(built(tmp_path / "pets", *PETS))
    (tmp_path / "link").symlink_to("pets")
    places = dict(OUTPUT_DIR="out", DATA_DIR="data") | {flag: inside}
    ended = call(command(DATASET="pets", **places))
    assert ended.code == 2 and ended.err.startswith(f"{flag} = {inside}: ")
    assert snapshot(tmp_path / "pets") == before


@pytest.mark.parametrize(("names", "table"), [
    (["cat.0.jpg", "cat.1.jpg", "dog.0.jpg"], ""), (["cat_1.png", "dog 2.png", "dog-3.png"], ""),
    (["cat\\x 1.jpg", "dog\\1.jpg"], ""),
    (["0.jpg", "1.jpg", "2.jpg"], "file,label\n0.jpg,cat\n1.jpg,dog\n2.jpg,dog\n")])
def test_three_lines_make_class_folders_of_loose_images(names, table, tmp_path, monkeypatch):
    folder = tmp_path / "loose"
    folder.mkdir()
    for name in names:
        Image.new("RGB", (8, 8)).save(folder / name)
    if table:
        (folder / "labels.csv").write_text(table)
    message = refusal(folder)
    assert f"{len(names)} images lie loose" in message and ("labels.csv" in message) == bool(table)
    monkeypatch.chdir(folder)
    exec(textwrap.dedent("\n".join(message.splitlines()[1:])))  # as a reader would
    assert source_of(folder).classes == PETS


@pytest.mark.parametrize("places", [["fruit/apple", "fruit/grape", "tool/saw"],
                                    ["fruit/red/apple", "tool/saw"], ["fruit", "tool/saw"]])
def test_pictures_that_lie_deeper_are_told_with_both_ways_to_choose(places, tmp_path):
    source = source_of(built(tmp_path / "things", *places))
    (said,) = [line for line in source.notices if "lie deeper" in line]
    assert source.classes == ["fruit", "tool"] and source.clips is None
    assert "outer folder is" in said and "side by side" in said


def test_a_class_with_a_line_break_and_a_folder_called_by_a_dot(tmp_path, monkeypatch):
    folder = built(tmp_path / "pets", "cat\n2", "dog")
    monkeypatch.chdir(folder)
    source = source_of(Path())
    assert source.classes == ["cat\\n2", "dog"]
    assert source.name == "pets" and str(folder) in source.notices[0]
