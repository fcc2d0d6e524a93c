"""Pictures that are there twice: found, kept in one part, told, and left out of a second figure."""

import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CPU, quick_flags
from PIL import Image, ImageEnhance, ImageOps
from torch.nn import functional as F

import advanced_techniques as at


def photo(seed: int, width: int = 120, height: int = 90) -> Image.Image:
    """A picture with detail of every size, as photographs have."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.zeros(1, 3, height, width)
    for cells in (3, 6, 12, 24, 48):
        noise = torch.rand(1, 3, cells, cells, generator=generator) - 0.5
        image += F.interpolate(noise, (height, width), mode="bicubic") * 12 / cells
    image = (image - image.min()) / (image.max() - image.min())
    return Image.fromarray((image[0].permute(1, 2, 0) * 255).byte().numpy())


def as_it_is(image: Image.Image, path: Path) -> None:
    image.save(path)


def encoded_anew(image: Image.Image, path: Path) -> None:
    image.save(path, "JPEG", quality=60)


def half_size(image: Image.Image, path: Path) -> None:
    image.resize((image.width // 2, image.height // 2)).save(path, "JPEG", quality=80)


def mirrored(image: Image.Image, path: Path) -> None:
    ImageOps.mirror(image).save(path)


def brighter(image: Image.Image, path: Path) -> None:
    ImageEnhance.Brightness(image).enhance(1.1).save(path)


KINDS = [as_it_is, encoded_anew, half_size, mirrored, brighter]


def folder_of(root: Path, parts: tuple[str, ...], count: int = 20) -> Path:
    """Different pictures with labels that mean nothing."""
    seed = 0
    for part in parts:
        for name in ("cat", "dog"):
            (root / part / name).mkdir(parents=True)
            for number in range(count):
                photo(seed).save(root / part / name / f"{number:03d}.png")
                seed += 1
    return root


def loaded(folder: Path, **changes) -> tuple[at.Data, list[str]]:
    flags = dict(DATASET=str(folder), TRAIN_IMAGES=0, TEST_IMAGES=0) | changes
    return at.load_data(quick_flags(**flags), CPU)


@pytest.mark.parametrize("kind", KINDS)
def test_copies_stay_in_one_part_where_the_split_is_ours(kind, tmp_path):
    folder = folder_of(tmp_path / "pets", ("",), 30)
    for name, start in (("cat", 0), ("dog", 30)):
        for number in range(12):
            kind(photo(start + number), folder / name / f"{number:03d}_copy.png")
    data, notices = loaded(folder)
    parts = {role: part.numpy() for role, part in data.split.items()}
    owner = {place: role for role, part in parts.items() for place in part.tolist()}
    assert len(owner) == 84
    copies = at.find_copies(data.images, parts, quick_flags())
    groups = at.groups_of(copies.near, np.arange(84))
    assert len(groups) == 24 and all(len(group) == 2 for group in groups)
    assert all(owner[first] == owner[second] for first, second in groups)
    assert abs(len(parts["test"]) - 16) <= 2 and abs(len(parts["validation"]) - 13) <= 2
    said = "\n".join(notices)
    assert "24 images show the same" in said and "kept in one part" in said
    assert not data.copied.any()


@pytest.mark.parametrize("kind", KINDS)
def test_copies_in_a_given_split_are_told(kind, tmp_path):
    folder = folder_of(tmp_path / "pets", ("train", "val", "test"))
    for number in range(7):
        kind(photo(number), folder / "test" / "cat" / f"copy{number}.png")
    for number in range(3):
        kind(photo(number), folder / "val" / "cat" / f"copy{number}.png")
    data, notices = loaded(folder)
    assert len(data.split["test"]) == 47 and data.copied.sum() == 7
    said = "\n".join(notices)
    assert "7 of 47 test images are also in another part" in said and "copy" in said
    assert "3 of 43 validation images" in said


def test_different_pictures_are_no_copies(tmp_path):
    data, notices = loaded(folder_of(tmp_path / "pets", ("",)))
    assert not any("COPIES" in notice for notice in notices) and not data.copied.any()


@pytest.mark.parametrize("images", ["noise", "flat", "shapes", "ramps"])
def test_images_without_common_detail_are_no_near_copies(images):
    random = np.random.default_rng(0)
    pixels = torch.from_numpy(random.integers(0, 256, (400, 3, 36, 36), np.uint8))
    if images == "flat":
        pixels = torch.arange(240, dtype=torch.uint8)[:, None, None, None].repeat(1, 3, 36, 36)
    if images == "shapes":
        pixels = at.shapes(0).read(np.arange(400))
    if images == "ramps":
        levels = torch.arange(200)[:, None, None, None] / 4 + torch.linspace(0, 200, 36)
        pixels = levels.byte().expand(200, 3, 36, 36).contiguous()
    parts = {"train": np.arange(len(pixels))}
    copies = at.find_copies(pixels, parts, quick_flags())
    assert np.array_equal(copies.near, copies.identical)


def test_pictures_of_one_scene_are_no_copies_and_leave_every_part_its_classes(tmp_path):
    background = photo(0)
    generator = np.random.default_rng(0)
    for name in ("empty", "parcel"):
        (tmp_path / "belt" / name).mkdir(parents=True)
        for number in range(40):
            picture = background.copy()
            across, down = generator.integers(20, 70, 2)
            colour = tuple(generator.integers(0, 256, 3).tolist())
            picture.paste(colour, (across, down, across + 4, down + 4))
            picture.save(tmp_path / "belt" / name / f"{number}.png")
    picture.save(tmp_path / "belt" / "parcel" / "again.png")
    data, notices = loaded(tmp_path / "belt")
    assert any("pictures of one scene" in notice for notice in notices)
    for part in data.split.values():
        assert len(data.labels[part].unique()) == 2
    everyone = torch.cat([data.split[role] for role in ("train", "validation", "test")])
    pixels = [data.images[place].numpy().tobytes() for place in everyone.tolist()]
    assert len(set(pixels)) == len(pixels) - 1  # the one that is there twice
    assert not data.copied.any()


def test_a_class_keeps_its_only_picture_to_learn_from_and_others_are_kept_together():
    labels = np.array([0] * 10 + [1] * 2)
    owner = np.array([0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 0, 1])  # 0 to learn from, 1 to test on
    groups = [np.array([5, 6, 7, 10]), np.array([0, 8])]  # a copy of the tenth is tested on
    at.deal_groups(groups, owner, labels)
    assert (owner[groups[0]] == 0).all() and len(set(owner[groups[1]])) == 1


def test_mirrored_pictures_are_others_where_left_and_right_matter(tmp_path):
    folder = folder_of(tmp_path / "pets", ("train", "test"))
    mirrored(photo(0), folder / "test" / "cat" / "copy.png")
    assert loaded(folder)[0].copied.sum() == 1
    assert loaded(folder, HORIZONTAL_FLIP=False)[0].copied.sum() == 0


def test_one_picture_in_two_classes_is_told(tmp_path):
    folder = folder_of(tmp_path / "pets", ("",))
    photo(0).save(folder / "dog" / "copy.png")
    _, notices = loaded(folder)
    assert any("more than one class" in notice for notice in notices)


def test_the_split_without_copies_stays_as_it_was(tmp_path):
    folder = folder_of(tmp_path / "pets", ("",))
    data, _ = loaded(folder)
    assert torch.equal(torch.cat(list(data.split.values())), torch.arange(40))


def test_a_class_of_copies_alone_is_learned(tmp_path):
    folder = folder_of(tmp_path / "pets", ("",))
    (folder / "blank").mkdir()
    for number in range(20):
        Image.new("RGB", (40, 30), "white").save(folder / "blank" / f"{number}.png")
    data, notices = loaded(folder)
    labels = data.labels[data.split["train"]]
    assert (labels == data.classes.index("blank")).sum() >= 10
    assert any("No test images of blank" in notice for notice in notices)


def test_five_thousand_images_take_seconds():
    random = np.random.default_rng(0)
    pixels = torch.from_numpy(random.integers(0, 256, (5000, 3, 64, 64), np.uint8))
    pixels[2500:] = pixels[:2500].flip(-1)
    started = time.process_time()
    copies = at.find_copies(pixels, {"train": np.arange(5000)}, quick_flags())
    assert time.process_time() - started < 10
    assert len(at.groups_of(copies.near, np.arange(5000))) == 2500


def test_the_report_has_the_accuracy_without_copies():
    labels = torch.arange(20) % 2
    right = F.one_hot(labels, 2).float()
    answers = torch.where(torch.arange(20)[:, None] < 15, right, 1 - right)
    images = torch.zeros(20, 3, 4, 4, dtype=torch.uint8)
    data = at.Data("pets", ["cat", "dog"], images, labels, {"test": torch.arange(20)})
    data.copied = np.arange(20) < 10  # all right; of the others, half
    job = at.Job(quick_flags(USE_ENSEMBLE=False), CPU, data)
    job.tested.append(at.Tested(dict(name="first", validation_accuracy=1.0), answers, answers))
    section = at.without_copies(job)
    assert section["models"]["first"] == 0.5 and section["final"]["accuracy"] == 0.5
    line = " ".join(at.copies_lines(section))
    assert "10 of the 20 test images" in line and "first 50.0%" in line
    data.copied = np.ones(20, bool)
    assert "nothing of other images" in " ".join(at.copies_lines(at.without_copies(job)))
    data.copied = np.zeros(20, bool)
    assert at.copies_lines(at.without_copies(job)) == []
