"""Where images come from, how they are split, and how they are augmented."""

import gzip
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CPU, quick_flags, random_data, run_of, tiny_run
from PIL import Image

import advanced_techniques as at

DEBIAN = Path("/usr/share/datasets/fashion-mnist")


def source(counts=(50, 30, 20), role="") -> at.Source:
    labels = np.repeat(np.arange(len(counts)), counts)
    return at.Source(
        "test",
        [str(index) for index in range(len(counts))],
        labels,
        np.full(len(labels), role),
        lambda chosen: torch.zeros(len(chosen), 3, 4, 4, dtype=torch.uint8),
    )


def test_the_split_is_disjoint_stratified_and_repeatable():
    parts = at.split(source(), 0, 0, 7)
    everything = np.concatenate(list(parts.values()))
    assert sorted(everything) == list(range(100))
    for part in parts.values():
        shares = np.bincount(source().labels[part], minlength=3) / len(part)
        assert shares == pytest.approx([0.5, 0.3, 0.2], abs=0.06)
    again = at.split(source(), 0, 0, 7)
    assert all(np.array_equal(parts[role], again[role]) for role in parts)
    assert not np.array_equal(parts["train"], at.split(source(), 0, 0, 8)["train"])


def test_limits_and_official_roles_are_kept():
    given = source((200, 200))
    given.roles = np.array((["train"] * 150 + ["test"] * 50) * 2)
    parts = at.split(given, 40, 30, 0)
    assert {role: len(part) for role, part in parts.items()} == dict(
        test=30, validation=20, train=40
    )
    assert set(given.roles[parts["test"]]) == {"test"} and set(
        given.roles[parts["validation"]]
    ) == {"train"}
    assert not set(parts["train"]) & set(parts["validation"])


@pytest.mark.parametrize(("images", "train_limit", "validation", "train"), [
    (60_000, 2_400, 1_000, 2_400),  # plenty to spare
    (60_000, 0, 5_000, 55_000),  # what 5,000 leave of a fifth is trained on
    (2_900, 2_400, 500, 2_400),  # what is to spare
    (2_500, 2_400, 300, 2_200),  # little to spare: an eighth of the training images
    (3_600, 2_400, 720, 2_400),  # a fifth of the source
    (60_000, 100, 50, 100),  # half of the training images
    (60_000, 50_000, 5_000, 50_000),
])
def test_validation_is_large_enough_to_tell(images, train_limit, validation, train):
    given = source((images // 2 + 5, images // 2 + 5))
    roles = ["test"] * 5 + ["train"] * (images // 2)
    given.roles = np.array(roles * 2, dtype="<U10")
    parts = at.split(given, train_limit, 0, 0)
    assert {role: len(part) for role, part in parts.items()} == dict(
        test=10, validation=validation, train=train)
    assert len(np.unique(np.concatenate(list(parts.values())))) == 10 + validation + train
    given.roles[5 : images // 2] = "validation"  # half of them, given by the source
    given_by_source = at.split(given, train_limit, 0, 0)["validation"]
    assert len(given_by_source) == min(at.enough_to_tell(train_limit, images // 2), images // 2 - 5)


def test_too_few_images_stop_with_a_plain_message(capsys):
    with pytest.raises(SystemExit) as stopped:
        at.split(source((3, 1)), 0, 0, 0)
    assert stopped.value.code == 2 and "too few images" in capsys.readouterr().err


def test_validation_and_test_images_are_untouched_by_augmentation(monkeypatch):
    run, data = run_of("resnet18"), random_data()
    monkeypatch.setattr(at, "augment", lambda *_: pytest.fail("evaluation augmented an image"))
    first = at.predict(run, data, "validation", [{}])
    assert torch.equal(first, at.predict(run, data, "validation", [{}]))


def test_each_image_has_its_own_augmentation_that_does_not_depend_on_its_batch():
    run = run_of("resnet18")
    images = random_data().images[:1].repeat(16, 1, 1, 1)
    generator = torch.Generator().manual_seed(3)
    random = torch.rand(16, len(at.RANDOM_NUMBERS), generator=generator)
    views = at.choose_views(random, True)
    together = at.augment(images, views, run)
    assert together.shape == (16, 3, 32, 32) and together.is_contiguous(
        memory_format=torch.channels_last
    )
    assert all(not torch.allclose(together[0], other, atol=0.1) for other in together[1:])
    images = (
        random_data().images[:16] // torch.arange(1, 17, dtype=torch.uint8)[:, None, None, None]
    )  # ever darker
    together = at.augment(images, views, run)
    alone = torch.cat([at.augment(images[i : i + 1], views[i : i + 1], run) for i in range(16)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-4)


def test_an_epoch_shows_each_image_its_own_way_and_mirrors_only_where_that_is_allowed():
    def views_of(seed, epoch, **changes):
        run = tiny_run(**changes)
        run.seed = seed
        return torch.cat([part.views for part in at.deal_out(run, random_data(), epoch)])

    views = views_of(0, 0)
    assert len(views.unique(dim=0)) == len(views) == 20 and torch.equal(views, views_of(0, 0))
    assert all((views != views_of(seed, epoch)).any(1).all() for seed, epoch in ((0, 1), (1, 0)))
    mirrored = views[:, 0] < 0  # the window's width
    assert 0 < mirrored.sum() < 20
    assert (views_of(0, 0, HORIZONTAL_FLIP=False)[:, 0] > 0).all()


NEUTRAL = dict.fromkeys(range(len(at.RANDOM_NUMBERS)), 0.5) | {0: 1.0, 4: 0.9, 9: 0.9}


def augmented(changes: dict[int, float], flip: bool = True, size: int = 36) -> torch.Tensor:
    random = torch.tensor([[(NEUTRAL | changes)[index] for index in range(len(NEUTRAL))]])
    run = run_of("resnet18", IMAGE_SIZE=size)
    return at.augment(random_data().images[:1], at.choose_views(random, flip), run)


def test_neutral_numbers_only_normalise_and_each_number_does_its_own_work():
    plain = at.show(random_data().images[:1], run_of("resnet18", IMAGE_SIZE=36))
    torch.testing.assert_close(augmented({}), plain, rtol=0, atol=1e-3)
    torch.testing.assert_close(augmented({4: 0.1}), plain.flip(-1), rtol=0, atol=1e-3)
    torch.testing.assert_close(augmented({4: 0.1}, flip=False), plain, rtol=0, atol=1e-3)
    for index in (0, 5, 6, 7, 8):  # area, rotation, brightness, contrast, saturation
        assert not torch.allclose(augmented({index: 0.1}), plain, atol=0.05), index
    erased = augmented({9: 0.1})
    hole = (erased == 0).all(1)[0]
    assert 0.03 < hole.float().mean() < 0.2 and torch.equal(
        erased[0][:, ~hole], augmented({})[0][:, ~hole]
    )


def test_colour_jitter_equals_its_textbook_form():
    images, run = random_data().images[:1].float(), run_of("resnet18")
    got = augmented({6: 0.9, 7: 0.2, 8: 0.7})
    grey = torch.tensor([0.299, 0.587, 0.114])[:, None, None]
    wanted = images[0] / 255
    wanted = 1.2 * wanted + (1 - 1.2) * (wanted * grey).sum(
        0
    )  # saturation: away from each pixel's grey
    wanted = (
        0.82 * wanted + (1 - 0.82) * (images[0] / 255 * grey).sum(0).mean()
    )  # contrast: towards the mean grey
    wanted = (1.24 * wanted - run.mean[:, None, None]) / run.std[:, None, None]  # brightness
    torch.testing.assert_close(got[0], wanted, rtol=0, atol=1e-4)


def test_random_views_keep_to_the_ranges_that_they_promise():
    generator = torch.Generator().manual_seed(4)
    views = at.choose_views(torch.rand(4000, len(at.RANDOM_NUMBERS), generator=generator), True)
    window, colour, _, _, half = views.split(list(at.VIEW_NUMBERS.values()), dim=1)
    (across, turned, right), (_, _, down) = window.view(-1, 2, 3).permute(1, 2, 0)
    assert 0.47 < (across < 0).float().mean() < 0.53  # mirrored
    angle = (turned / across).atan().rad2deg().abs()
    assert 9.9 < angle.max() < 10.001
    width, height = window.view(-1, 2, 3)[:, :, :2].norm(dim=2).unbind(1)
    area, aspect = width * height, width / height
    assert 0.39 < area.min() < 0.41 and 0.99 < area.max() < 1.001
    assert aspect.min() > 0.74 and aspect.max() < 1.35
    assert (right.abs() + width).max() < 1.001 and (down.abs() + height).max() < 1.001
    assert right.std() > 0.05 and down.std() > 0.05
    light = colour.view(-1, 3, 3).sum(2)  # brightness times contrast, each between 0.7 and 1.3
    assert 0.49 <= light.min() < 0.55 and 1.6 < light.max() <= 1.691
    erased = half.amin(1) > 0
    assert 0.22 < erased.float().mean() < 0.28
    assert half[erased].min() >= 0.1 and half[erased].max() <= 0.4


@pytest.mark.parametrize("kind", ["show", "augment"])
def test_the_network_sees_pixels_less_the_mean_over_the_deviation_of_its_weights(kind):
    colour = torch.tensor([30, 120, 250], dtype=torch.uint8)
    images = colour[None, :, None, None].repeat(1, 1, 36, 36)
    random = torch.tensor([[NEUTRAL[index] for index in range(len(NEUTRAL))]])
    run = run_of("resnet18")
    seen = at.show(images, run)
    if kind == "augment":
        seen = at.augment(images, at.choose_views(random, True), run)
    wanted = [
        (30 / 255 - 0.485) / 0.229,
        (120 / 255 - 0.456) / 0.224,
        (250 / 255 - 0.406) / 0.225,
    ]
    wanted = torch.tensor(wanted)[:, None, None].expand(3, 32, 32)
    torch.testing.assert_close(seen[0], wanted, rtol=0, atol=1e-4)


def test_shapes_come_from_the_seed_alone():
    chosen = np.arange(30)
    images = at.shapes(5).read(chosen)
    assert images.shape == (30, 3, 64, 64) and images.dtype == torch.uint8
    assert torch.equal(images, at.shapes(5).read(chosen)) and not torch.equal(
        images, at.shapes(6).read(chosen)
    )
    assert len(at.shapes(5).classes) == 10


MODES = ["L", "RGB", "RGBA", "LA", "P", "CMYK", "1", "I;16"]


@pytest.mark.parametrize("mode", MODES)
def test_any_mode_becomes_the_same_rgb(tmp_path, mode):
    grey = np.full((20, 30), 200, np.uint8)
    image = (
        Image.fromarray(grey.astype(np.uint16) * 256)
        if mode == "I;16"
        else Image.fromarray(grey).convert(mode)
    )
    file = tmp_path / ("image.tif" if mode == "CMYK" else "image.png")
    image.save(file)
    expected = 255 if mode == "1" else 200
    decoded = at.decode(file, 16)
    assert decoded.shape == (3, 16, 16) and abs(decoded.astype(int).mean() - expected) < (
        80 if mode == "1" else 4
    )


def test_transparency_lies_over_white_and_exif_rotation_is_applied(tmp_path):
    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert (at.decode(tmp_path / "clear.png", 8) == 255).all()
    image = Image.new("RGB", (16, 16), "black")
    image.paste("white", (0, 0, 16, 4))  # white on top ...
    exif = Image.Exif()
    exif[0x0112] = 3  # ... in a picture taken upside down
    image.save(tmp_path / "turned.png", exif=exif)
    decoded = at.decode(tmp_path / "turned.png", 16)
    assert decoded[:, -3:].min() == 255 and decoded[:, :8].max() == 0


def make_folder(root: Path, count: int = 12, classes=("cat", "dog", "owl")) -> Path:
    random = np.random.default_rng(0)
    for index, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for number in range(count):
            pixels = random.integers(0, 90, (24, 30, 3), np.uint8)
            pixels[..., index % 3] += 160
            Image.fromarray(pixels).save(root / name / f"{number}.png")
    return root


def test_a_folder_of_class_folders(tmp_path):
    folder = make_folder(tmp_path / "pets")
    before = sorted((path, path.stat().st_mtime_ns) for path in folder.rglob("*"))
    data, notice = at.load_data(
        quick_flags(DATASET=str(folder), TRAIN_IMAGES=0, TEST_IMAGES=0), CPU
    )
    assert data.classes == ["cat", "dog", "owl"] and len(data.images) == 36 and "pets" in notice[0]
    assert torch.equal(
        data.images.float().mean((2, 3)).argmax(1), data.labels
    )  # each image kept its label
    assert before == sorted((path, path.stat().st_mtime_ns) for path in folder.rglob("*"))


def test_a_folder_with_train_val_and_test(tmp_path):
    for part, count in (("train", 10), ("val", 4), ("test", 6)):
        make_folder(tmp_path / "pets" / part, count)
    data, _ = at.load_data(
        quick_flags(DATASET=str(tmp_path / "pets"), TRAIN_IMAGES=0, TEST_IMAGES=0), CPU
    )
    assert {role: len(part) for role, part in data.split.items()} == dict(
        test=18, validation=12, train=30
    )


def test_large_sets_go_to_a_memory_mapped_file(tmp_path, monkeypatch):
    folder = make_folder(tmp_path / "pets")
    small = quick_flags(DATASET=str(folder), DATA_DIR=str(tmp_path / "data"), MEMORY_GB=1e-6)
    made = []
    make_file = at.make_file
    monkeypatch.setattr(at, "make_file", lambda *to: (made.append(to), make_file(*to)))
    mapped, _ = at.load_data(small, CPU)
    plain, _ = at.load_data(quick_flags(DATASET=str(folder)), CPU)
    assert torch.equal(mapped.images, plain.images)
    ((file, size),) = made
    assert file.parent == tmp_path / "data" and size == mapped.images.nbytes
    if sys.platform.startswith("linux"):
        assert str(file) in Path("/proc/self/maps").read_text()  # not in memory of its own
        assert not file.exists()  # nobody has to clear it away


def test_runs_that_share_a_data_folder_map_files_of_their_own(tmp_path, monkeypatch):
    def file(**changes):
        return at.decoded_file(quick_flags(DATA_DIR=str(tmp_path), **changes))

    monkeypatch.chdir(tmp_path)
    first = file(OUTPUT_DIR="a")
    assert first.parent == tmp_path
    assert first == file(OUTPUT_DIR=str(tmp_path / "a"))  # all of a run's processes agree
    assert first != file(OUTPUT_DIR="b")
    assert first != file(OUTPUT_DIR="a", PREDICT="photos")
    assert first != file(OUTPUT_DIR="\udce4")  # a name that isn't UTF-8
    monkeypatch.setattr(at.platform, "node", lambda: "another machine")
    assert first != file(OUTPUT_DIR="a")


def test_unreadable_files_are_named_together(tmp_path, capsys):
    folder = make_folder(tmp_path / "pets")
    for name in ("cat/broken.png", "dog/empty.jpg"):
        (folder / name).write_bytes(b"not an image" if "broken" in name else b"")
    with pytest.raises(SystemExit) as stopped:
        at.load_data(quick_flags(DATASET=str(folder), TRAIN_IMAGES=0, TEST_IMAGES=0), CPU)
    message = capsys.readouterr().err
    assert stopped.value.code == 2 and "broken.png" in message and "empty.jpg" in message


def test_auto_downloads_cifar10_once_and_then_finds_it(cifar_server, tmp_path):
    flags = quick_flags(DATASET="auto", DATA_DIR=str(tmp_path / "data"))
    found, notice = at.find_source(flags)
    assert found.name == "CIFAR-10" and "downloaded" in notice and found.classes[3] == "class 3"
    assert found.read(np.arange(3)).shape == (3, 3, 32, 32) and (found.roles == "train").sum() == 50
    cifar_server.shutdown()
    assert "was found" in at.find_source(flags)[1]


def nothing_here(folder, download):
    raise RuntimeError("not there")


def test_without_a_network_auto_falls_back_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(at.torchvision.datasets.CIFAR10, "url", "http://127.0.0.1:9/cifar.tar.gz")
    monkeypatch.setattr(at, "fashion_mnist", nothing_here)
    found, notice = at.find_source(quick_flags(DATASET="auto", DATA_DIR=str(tmp_path)))
    assert found.name == "shapes" and "CIFAR-10 is not in" in notice and "shapes" in notice
    with pytest.raises(SystemExit):
        at.find_source(quick_flags(DATASET="cifar10", DATA_DIR=str(tmp_path)))


@pytest.mark.skipif(
    not DEBIAN.is_dir(), reason="Debian's package dataset-fashion-mnist is not installed"
)
def test_fashion_mnist_is_found_in_debians_copy(tmp_path):
    found = at.fashion_mnist(tmp_path, download=False)
    assert (
        len(found.labels) == 70000
        and found.classes[9] == "Ankle boot"
        and (found.roles == "test").sum() == 10000
    )
    assert found.read(np.array([0, 69999])).shape == (2, 3, 28, 28)


def test_a_damaged_copy_of_fashion_mnist_is_refused(tmp_path, capsys):
    packed = tmp_path / "packed"
    packed.mkdir()
    for content in (
        b"\0" * 100,
        b"\0" * (16 + 60000 * 784),
    ):  # too short; the right size, but no IDX header
        (packed / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(content, 1))
        with pytest.raises(SystemExit):
            at.unpack_fashion_mnist(tmp_path / "raw", packed)
        assert "damaged" in capsys.readouterr().err
