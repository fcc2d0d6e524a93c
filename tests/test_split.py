"""Who learns from which images: the split, its limits, and pictures that are there twice."""

import re
import zlib
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
    with pytest.raises(at.Stop, match="too few images for a test part: 0, of 2 that"):
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


# ---- Clips: pictures that belong together ----

INNER = "{kind}/clip_{clip:02}/frame_{frame:03}.png"
FLAT = "{kind}/clip_{clip:02}_frame_{frame:03}.png"
PATIENT = "{kind}/P{clip}-{frame} left.png"
TRACK = "{kind}/{clip:05}_{frame:05}.png"


def clips(root: Path, layout: str, parts: tuple[str, ...] = (".",), count: int = 12) -> Path:
    """For each of two classes so many clips of five frames, dealt out over the parts by frame."""
    for place in range(2 * count):
        for frame in range(5):
            part = parts[frame % len(parts)]
            name = layout.format(kind=("cat", "dog")[place % 2], clip=place, frame=frame)
            (root / part / name).parent.mkdir(parents=True, exist_ok=True)
            photo(place * 5 + frame).save(root / part / name)
    return root


@pytest.mark.parametrize("layout", [INNER, FLAT, PATIENT, TRACK])
@pytest.mark.parametrize("limit", [0, 60])
def test_a_clip_stays_in_one_part_where_the_split_is_ours(layout, limit, tmp_path):
    data, said = loaded(clips(tmp_path / "films", layout), TRAIN_IMAGES=limit)
    assert "come in 24 clips" in said and "another part" not in said
    owners = [{re.sub(r"[^/]*?\d+( left)?\.png$", "", name.replace("-", "/").replace("_", "/"))
               for name in map(data.names.__getitem__, part)} for part in data.split.values()]
    assert sum(map(len, owners)) == len(set.union(*owners)) >= 15
    for role in ("validation", "test"):
        assert len(data.split[role]) >= 8 and len(data.truth(role).unique()) == 2, role


@pytest.mark.parametrize("layout", [INNER, FLAT])
def test_clips_that_cross_a_given_split_are_told(layout, tmp_path):
    _, said = loaded(clips(tmp_path / "films", layout, ("train", "test")))
    assert "CLIPS: 48 test images are of clips that are also in another part" in said


@pytest.mark.parametrize("names", [
    ["{kind}/{kind}.{place}.png"], ["{kind}/{place}.png"], ["{kind}/all/{place}.png"],
    ["{kind}/{place:03}_{kind}.png"], ["{kind}/{hash}.png"]])
def test_a_class_in_one_piece_and_names_all_different_are_no_clips(names, tmp_path):
    for place in range(60):
        name = names[0].format(kind=("cat", "dog")[place % 2], place=place,
                               hash=f"{zlib.crc32(bytes([place])):08x}b")
        (tmp_path / "pets" / name).parent.mkdir(parents=True, exist_ok=True)
        photo(place).save(tmp_path / "pets" / name)
    assert "CLIPS" not in loaded(tmp_path / "pets")[1]


@pytest.mark.parametrize(("counts", "limit", "wanted"), [
    ((1000, 30, 30), 200, [140, 30, 30]), ((500, 200, 20), 120, [50, 50, 20]),
    ((60, 60, 60), 90, [30, 30, 30])])
def test_a_limit_fills_classes_up_evenly_and_leaves_the_test_its_shares(counts, limit, wanted):
    given = source(*counts)
    given.roles[:] = "train"
    tests = source(*[count // 5 for count in counts], role="test")
    both = at.Source("test", given.classes, np.concatenate([given.labels, tests.labels]),
                     np.concatenate([given.roles, tests.roles]), None)
    both.roles[: len(given.labels)][::3] = "validation"
    counts_left = np.bincount(both.labels[both.roles == "train"])
    parts = at.split(both, limit, 30, 0)
    learned = np.bincount(both.labels[parts["train"]])
    assert learned.sum() == limit and (learned >= np.minimum(counts_left, wanted) - 1).all()
    shares = np.bincount(both.labels[parts["test"]], minlength=3) / 30
    assert shares == pytest.approx(np.array(counts) / sum(counts), abs=0.04)


def test_a_limit_tells_what_is_left_of_each_class_where_they_differ(tmp_path):
    folder = class_pictures(tmp_path / "pets", dict(cat=60, dog=8, owl=8))
    assert "rare ones whole: cat 10 of 60, " in loaded(folder, TRAIN_IMAGES=20)[1]
    assert "rare ones" not in loaded(folder)[1]
