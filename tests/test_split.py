"""Who learns from which images: the split, its limits, and pictures that are there twice."""

import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import class_pictures, quick_flags
from PIL import Image, ImageEnhance, ImageOps
from torch.nn import functional as F

import advanced_techniques as at


def source(*counts: int, role: str = "") -> at.Source:
    labels = np.repeat(np.arange(len(counts)), counts)
    names = ["cat", "dog", "owl", "emu"][: len(counts)]
    return at.Source("test", names, labels, np.full(len(labels), role, "<U10"), lambda _: None)


def sizes(parts: dict[str, np.ndarray]) -> dict[str, int]:
    together = np.concatenate(list(parts.values()))
    assert len(np.unique(together)) == len(together)
    return {role: len(part) for role, part in parts.items()}


def test_the_split_is_disjoint_stratified_and_the_same_for_all():
    given = source(50, 30, 20)
    parts = at.split(given, 0, 0, 7)
    assert sizes(parts) == dict(test=20, validation=16, train=64)
    for part in parts.values():
        shares = np.bincount(given.labels[part], minlength=3) / len(part)
        assert shares == pytest.approx([0.5, 0.3, 0.2], abs=0.06)
    again, other = (at.split(given, 0, 0, seed)["train"].tolist() for seed in (7, 8))
    assert parts["train"].tolist() == again != other


@pytest.mark.parametrize("limit", [0, 20])
@pytest.mark.parametrize("seed", range(6))
def test_a_class_with_one_image_is_trained_on(seed, limit):
    given = source(60, 60, 1, 1)
    parts = at.split(given, limit, 0, seed)
    learned = np.bincount(given.labels[parts["train"]], minlength=4)
    assert learned[2] == learned[3] == 1
    assert sizes(parts)["train"] == (limit or 122 - len(parts["test"]) - len(parts["validation"]))


def test_limits_and_roles_that_are_given_are_kept():
    given = source(200, 200)
    given.roles[:] = (["train"] * 150 + ["test"] * 50) * 2
    parts = at.split(given, 40, 30, 0)
    assert sizes(parts) == dict(test=30, validation=20, train=40)
    assert set(given.roles[parts["test"]]) == {"test"}
    assert set(given.roles[np.concatenate([parts["validation"], parts["train"]])]) == {"train"}
    given.roles[:100] = "validation"
    assert (given.roles[at.split(given, 0, 0, 0)["validation"]] == "validation").all()


@pytest.mark.parametrize(("images", "limit", "validation", "train"), [
    (60_000, 2_400, 1_000, 2_400), (60_000, 50_000, 5_000, 50_000), (60_000, 0, 5_000, 55_000),
    (2_900, 2_400, 500, 2_400),  # what is to spare
    (2_500, 2_400, 300, 2_200),  # an eighth of the training images
    (3_600, 2_400, 720, 2_400), (60_000, 100, 50, 100)])
def test_validation_is_large_enough_to_tell(images, limit, validation, train):
    given = source(images // 2 + 5, images // 2 + 5, role="train")
    given.roles[[*range(5), *range(-5, 0)]] = "test"
    parts = sizes(at.split(given, limit, 0, 0))
    assert parts == dict(test=10, validation=validation, train=train)


def test_too_few_images_stop_with_a_sentence():
    with pytest.raises(at.Stop, match="DATASET test: too few images"):
        at.split(source(3, 1), 0, 0, 0)


def test_a_class_that_the_training_part_lacks_is_named():
    given = source(30, 30, 5, role="train")
    given.roles[-5:] = "test"
    with pytest.raises(at.Stop, match="no image to train on of owl"):
        at.split(given, 0, 0, 0)


def test_what_the_parts_lack_is_said(tmp_path):
    folder = class_pictures(tmp_path / "pets", dict(cat=30, dog=30, owl=1), 8)
    data, said = loaded(folder, TRAIN_IMAGES=20, TEST_IMAGES=10)
    unused = 61 - sum(map(len, data.split.values()))
    assert f"{unused} of 61 images are not used" in said and "one update" not in said
    assert "No validation images of owl" in said and "No test images of owl" in said
    assert "more than the 20 images" in loaded(folder, TRAIN_IMAGES=20, BATCH_SIZE=11)[1]


# ---- Copies ----


def photo(seed: int, width: int = 120, height: int = 90) -> Image.Image:
    """A picture with detail of every size."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.zeros(1, 3, height, width)
    for cells in (3, 6, 12, 24, 48):
        noise = torch.rand(1, 3, cells, cells, generator=generator) - 0.5
        image += F.interpolate(noise, (height, width), mode="bicubic") * 12 / cells
    image = (image - image.min()) / (image.max() - image.min())
    return Image.fromarray((image[0].permute(1, 2, 0) * 255).byte().numpy())


KINDS = {  # what is done to a picture, how the copy is stored, and how well
    "as it is": (lambda image: image, "png", 100),
    "encoded anew": (lambda image: image, "jpg", 60),
    "half size": (lambda image: image.resize((60, 45)), "jpg", 80),
    "mirrored": (ImageOps.mirror, "png", 100),
    "brighter": (lambda image: ImageEnhance.Brightness(image).enhance(1.1), "png", 100),
}


def copy(kind: str, seed: int, folder: Path) -> None:
    change, ending, quality = KINDS[kind]
    change(photo(seed)).save(folder / f"{seed:03d}_copy.{ending}", quality=quality)


def photos(root: Path, *parts: str, count: int = 20) -> Path:
    folders = [root / part / name for part in parts for name in ("cat", "dog")]
    for place, folder in enumerate(folders):
        folder.mkdir(parents=True)
        for seed in range(place * count, (place + 1) * count):
            photo(seed).save(folder / f"{seed:03d}.png")
    return root


def loaded(folder: Path, **changes) -> tuple[at.Data, str]:
    """The images of a folder, and what is said of copies and parts."""
    flags = dict(DATASET=str(folder), TRAIN_IMAGES=0, TEST_IMAGES=0) | changes
    job = at.Job(quick_flags(**flags))
    return at.load_data(job), "\n".join(job.notices)


@pytest.mark.parametrize("kind", KINDS)
def test_copies_stay_in_one_part_where_the_split_is_ours(kind, tmp_path):
    folder = photos(tmp_path / "pets", ".", count=30)
    for seed in (*range(12), *range(30, 42)):
        copy(kind, seed, folder / ("cat" if seed < 30 else "dog"))
    data, said = loaded(folder)
    owners = [{Path(data.names[place]).name[:3] for place in part.tolist()}
              for part in data.split.values()]
    assert len(set.union(*owners)) == sum(map(len, owners)) == 60
    assert sum(map(len, data.split.values())) == 84 and len(data.split["test"]) >= 8
    assert "24 images show the same" in said and "kept in one part" in said


@pytest.mark.parametrize("kind", KINDS)
def test_copies_in_a_given_split_are_told(kind, tmp_path):
    folder = photos(tmp_path / "pets", "train", "val", "test", count=12)
    for seed in range(7):
        copy(kind, seed, folder / "test" / "cat")
    for seed in range(12, 15):
        copy(kind, seed, folder / "val" / "cat")
    data, said = loaded(folder)
    assert len(data.split["test"]) == 31
    assert "7 test images are also in another part" in said
    assert "3 validation images are also in another part" in said
    assert ("COPIES" in loaded(folder, HORIZONTAL_FLIP=False)[1]) == (kind != "mirrored")


def test_different_pictures_are_no_copies_and_their_split_stays(tmp_path):
    data, said = loaded(photos(tmp_path / "pets", "."))
    assert "COPIES" not in said
    assert torch.equal(torch.cat(list(data.split.values())), torch.arange(40))


def test_a_picture_in_two_classes_is_told(tmp_path):
    folder = photos(tmp_path / "pets", ".")
    copy("encoded anew", 0, folder / "dog")
    assert "1 images lie in more than one class" in loaded(folder)[1]


def different(images: torch.Tensor) -> int:
    parts = dict(train=np.arange(len(images)))
    return len(np.unique(at.number_copies(images, parts, quick_flags())))


@pytest.mark.parametrize("kind", ["noise", "flat", "shapes", "ramps", "one layout"])
def test_images_without_common_detail_are_no_copies(kind):
    noise = np.random.default_rng(0).integers(0, 256, (240, 3, 36, 36), np.uint8)
    if kind == "shapes":
        images = at.shapes(quick_flags()).read(np.arange(240))
    elif kind == "noise":
        images = noise
    else:
        ramp = np.linspace(0, dict(flat=0, ramps=15).get(kind, 200), 36)
        added = noise // 7 if kind == "one layout" else np.arange(240)[:, None, None, None]
        images = (noise * 0 + ramp + added).astype(np.uint8)
    assert different(torch.from_numpy(images)) == 240


def test_three_thousand_images_take_seconds():
    pixels = np.random.default_rng(0).integers(0, 256, (3000, 3, 64, 64), np.uint8)
    images = torch.from_numpy(pixels)
    images[2900:] = images[:100].flip(-1)
    started = time.process_time()
    assert different(images) == 2900
    assert time.process_time() - started < 15


def test_a_fixed_camera_leaves_every_part_its_classes(tmp_path):
    for name, level in (("empty", 20), ("parcel", 230)):
        (tmp_path / "belt" / name).mkdir(parents=True)
        for number in range(40):
            picture = photo(0)
            picture.paste((level, number, 90), (50, 40, 53, 43))
            picture.save(tmp_path / "belt" / name / f"{number}.png")
    data, said = loaded(tmp_path / "belt")
    assert "COPIES" in said
    for role, part in data.split.items():
        assert len(part) >= 8 and len(data.labels[part].unique()) == 2, role
