"""Image files as they are meant to be seen: turned, transparent, damaged, of many bits."""

import csv
import io
import os
import struct
import threading
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import call, class_pictures, command, quick_flags
from PIL import Image

import advanced_techniques as at

GREY = (200, 200, 200)


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def flat(mode: str, value, kind: str = "PNG", size=(9, 9), **options) -> bytes:
    return encoded(Image.new(mode, size, value), kind, **options)


def palette(**options) -> bytes:
    image = Image.new("P", (9, 9), 1)
    image.putpalette([255, 0, 0, *GREY])
    return encoded(image, **options)


def decoded(*paths: Path, scale: list[float] | None = None, side: int = 16, **changes):
    """Pixels of image files, int [n, 3, side, side]."""
    scale = [] if scale is None else scale
    images, unreadable = at.decode_all(paths, side, quick_flags(**changes), scale)
    assert not unreadable
    return images.astype(int)


READABLE = [  # the grey that is seen, and a file that shows it
    (200, flat("RGB", GREY, "WEBP")), (200, flat("RGB", GREY, size=(1, 5000))),
    (200, flat("RGB", GREY, "JPEG", (5000, 1))), (200, flat("L", 200, "BMP", (1, 1))),
    (255, flat("L", 200, transparency=200)), (255, flat("1", 1)),
    (200, flat("LA", (200, 255))), (255, flat("LA", (200, 0))),
    (255, palette(transparency=1)), (200, palette(transparency=0)),
    (228, palette(transparency=b"\xff\x80")),
    (255, flat("RGB", GREY, transparency=GREY)),
    (228, flat("RGBA", (*GREY, 128))), (255, flat("RGBA", (255, 0, 0, 0))),
    (200, flat("CMYK", (55, 55, 55, 0), "JPEG"))]


@pytest.mark.parametrize("case", range(len(READABLE)))
def test_a_strange_but_whole_image_is_read(case, tmp_path):
    grey, content = READABLE[case]
    (tmp_path / "café ☕.jpg").write_bytes(content)
    for side, fit in ((1, "crop"), (37, "crop"), (37, "squash")):
        seen = decoded(tmp_path / "café ☕.jpg", side=side, FIT=fit)
        assert seen.shape == (1, 3, side, side) and np.abs(seen - grey).max() <= 4


TURNS = ("", "FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE", "ROTATE_90",
         "TRANSVERSE", "ROTATE_270")  # how pictures of orientation 1 to 8 are stored


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_picture_is_seen_upright(orientation, kind, tmp_path):
    upright = Image.fromarray(np.kron([[255, 128], [0, 0]], np.ones((16, 16))).astype(np.uint8))
    turn = TURNS[orientation - 1]
    stored = upright.transpose(Image.Transpose[turn]) if turn else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.convert("RGB").save(tmp_path / "image", kind, exif=exif)
    assert np.abs(decoded(tmp_path / "image", side=32)[0, 0] - np.asarray(upright)).mean() < 8


@pytest.mark.parametrize(("fit", "along", "across"), [
    ("crop", 255, 255), ("squash", 0, 255), ("pad", 0, at.GREY)])
@pytest.mark.parametrize("tall", [False, True])
def test_an_image_becomes_a_square_as_fit_says(fit, along, across, tall, tmp_path):
    pixels = np.zeros((40, 80), np.uint8)
    pixels[:, 20:60] = 255
    Image.fromarray(pixels.T if tall else pixels).save(tmp_path / "a.png")
    seen = decoded(tmp_path / "a.png", side=40, FIT=fit)[0, 0]
    seen = seen.T if tall else seen
    assert seen[20, [3, 20, 36]].tolist() == [along, 255, along]
    assert seen[[3, 20, 36], 20].tolist() == [across, 255, across]


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8))
JPEG, PNG = encoded(NOISE, "JPEG"), encoded(NOISE)


def chunk(kind: bytes, content: bytes) -> bytes:
    checksum = struct.pack(">I", zlib.crc32(kind + content))
    return struct.pack(">I", len(content)) + kind + content + checksum


def png(width: int, height: int, bits: int, rows: bytes) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, 2, 0, 0, 0))
    return PNG[:8] + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def job_on(folder: Path, memory: float, **changes) -> at.Job:
    data = str(folder.parent / "data")
    return at.Job(quick_flags(DATASET=str(folder), DATA_DIR=data, MEMORY_GB=memory, **changes))


UNREADABLE = {  # name: content, and what is said of it
    "empty.jpg": (b"", "cannot identify image file"),
    "phone.HEIC": (b"\0\0\0\x18ftypheic" + b"\0" * 40, "Save it as JPEG"),
    "bomb.png": (png(20_000, 20_000, 8, b"\0"), "exceeds limit"),
    "text.jpg": (b"My notes", ""),
    "zeros.png": (b"\0" * 4096, ""),
    "no_pixels.png": (png(0, 0, 8, b"\0"), ""),
    **{f"cut.{kind}": (encoded(NOISE, kind)[:300], "")
       for kind in ("JPEG", "PNG", "TIFF", "WEBP", "BMP")}}


@pytest.mark.parametrize("memory", [0, 1])
def test_unreadable_files_are_told_or_left_out(memory, tmp_path):
    folder = class_pictures(tmp_path / "pets", dict(cat=20, dog=20))
    for name, (content, _) in UNREADABLE.items():
        (folder / "cat" / name).write_bytes(content)
    job = job_on(folder, memory, OUTPUT_DIR=str(tmp_path / "out"))
    with pytest.raises(at.Stop, match="--skip-unreadable true") as stopped:
        at.load_data(job)
    lines = (tmp_path / "out" / "unreadable_files.txt").read_text().splitlines()
    assert str(stopped.value).splitlines()[1:11] == lines[:10] < lines
    said = {Path(line.partition(": ")[0]).name: line for line in lines}
    assert sorted(said) == sorted(UNREADABLE)
    assert all(what in said[name] for name, (_, what) in UNREADABLE.items())
    job.flags.SKIP_UNREADABLE = True
    data = at.load_data(job)
    used = {Path(data.names[place]).name for part in data.split.values() for place in part}
    assert sum(map(len, data.split.values())) == 40 and not used & set(UNREADABLE)
    assert "SKIP_UNREADABLE" in "".join(job.notices)


def test_nobody_waits_for_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    writer = os.open(tmp_path / "pipe.png", os.O_RDWR)
    timer = threading.Timer(60, os.close, [writer])
    timer.start()
    _, unreadable = at.decode_all([tmp_path / "pipe.png"], 8, quick_flags(), [])
    assert "not a file" in unreadable[0] and timer.is_alive()
    timer.cancel()
    os.close(writer)


METADATA = [
    (PNG, 33, chunk(b"zTXt", b"a\0\0" + zlib.compress(b"x" * 3_000_000))),
    (PNG, 33, chunk(b"tEXt", b"a\0" + b"x" * 900_000) * 80),
    (PNG, 33, chunk(b"iCCP", b"a\0\0" + zlib.compress(b"x" * 3_000_000))),
    (PNG, 33, chunk(b"eXIf", b"nonsense")),
    (JPEG, 2, b"\xff\xe1\0\x46Exif\0\0MM\0*\0\0\0\x08" + b"\xff" * 54),
    (JPEG, 2, b"\xff\xe2\0\x2eMPF\0II*\0\x08\0\0\0\x09\0" + b"\xff" * 30)]


@pytest.mark.parametrize("case", range(len(METADATA)))
def test_a_picture_with_bad_metadata_is_read(case, tmp_path):
    plain, place, extra = METADATA[case]
    (tmp_path / "odd").write_bytes(plain[:place] + extra + plain[place:])
    (tmp_path / "plain").write_bytes(plain)
    assert np.array_equal(*decoded(tmp_path / "odd", tmp_path / "plain"))


TYPES = {"png": np.uint16, "I16.tif": np.uint16, "I.tif": np.int32, "F.tif": np.float32}


def save(path: Path, values: np.ndarray) -> Path:
    Image.fromarray(values.astype(TYPES[path.name.partition(".")[2]])).save(path)
    return path


def ramps(folder: Path, kind: str, high: float, low: float = 0, hot: bool = False) -> list:
    """60 gradients, ever brighter; hot: a broken pixel in each, one broken as a whole."""
    paths = []
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(60):
        values = np.linspace(low, low + (high - low) * (number + 1) / 60, 256)
        if hot:
            values[100 if number != 7 else slice(None)] = 65535
        paths.append(save(folder / f"{number:02d}.{kind}", values.reshape(16, 16)))
    return paths


@pytest.mark.parametrize(("kind", "low", "high"), [
    *[(kind, 0, high) for kind in TYPES for high in (255, 4095, 65535)],
    ("I.tif", -1000, 3000), ("F.tif", -1000, 3000), ("F.tif", 0, 0.01)])
def test_one_scale_keeps_relative_brightness(kind, low, high, tmp_path):
    scale = []
    seen = decoded(*ramps(tmp_path, kind, high, low), scale=scale)[:, 0]
    white = low + (high - low) * 59 / 60
    assert scale == pytest.approx([low, white], abs=(high - low) / 50) and seen[-1].max() == 255
    assert seen[:, 8, 8] == pytest.approx(np.arange(1, 61) * seen[58, 8, 8] / 59, abs=2)


@pytest.mark.parametrize("kind", TYPES)
def test_hot_pixels_darken_nothing(kind, tmp_path):
    clean = decoded(*ramps(tmp_path / "clean", kind, 4000))
    hot = decoded(*ramps(tmp_path / "hot", kind, 4000, hot=True))
    assert (np.abs(clean - hot) > 12).mean() < 0.03


def test_not_a_number_is_black_and_hides_nothing(tmp_path):
    values = np.linspace(0, 1, 256).reshape(16, 16)
    values[0, :3] = np.nan, np.inf, -np.inf
    seen = decoded(save(tmp_path / "1.F.tif", values))[0, 0]
    assert seen[0, :3].tolist() == [0, 255, 0] and seen[-1, -1] == 255 and 120 < seen[8, 8] < 140
    assert not decoded(save(tmp_path / "2.F.tif", values * np.nan)).any()


def test_colours_need_no_scale(tmp_path):
    rows = (b"\0" + struct.pack(">27H", *[51400, 25700, 0] * 9)) * 9
    (tmp_path / "deep.png").write_bytes(png(9, 9, 16, rows))
    Image.new("RGB", (9, 9), (200, 100, 0)).save(tmp_path / "grey.png")
    scale = []
    seen = decoded(tmp_path / "deep.png", tmp_path / "grey.png", scale=scale)
    assert not scale and np.abs(seen.mean((2, 3)) - [200, 100, 0]).max() <= 1


def test_whole_numbers_count_from_nought(tmp_path):
    scale = []
    decoded(*ramps(tmp_path, "png", 40, 30), scale=scale)
    assert scale[0] == 0


def test_predict_shows_an_image_at_the_scale_of_the_run(tmp_path):
    for name, high in (("dark", 1000), ("light", 4000)):
        ramps(tmp_path / "pets" / name, "png", high)
    output = tmp_path / "out"
    ended = call(command(DATASET=tmp_path / "pets", OUTPUT_DIR=output, NUM_EPOCHS=1,
                         ARCHITECTURES=("test_resnet",)))
    assert "more than 8 bits" in ended.out and "--predict too" in ended.out
    with (output / "test_predictions.csv").open(newline="") as stream:
        row = next(csv.DictReader(stream))
    ended = call(["--predict", row["image"], "--output-dir", str(output)])
    assert "{image}: {predicted_class}, {probability}".format_map(row)[:-1] in ended.out


def test_large_sets_are_mapped_and_leave_no_file(tmp_path):
    folder = class_pictures(tmp_path / "pets", dict(cat=20, dog=20))
    both = [at.load_data(job_on(folder, memory)).images for memory in (1, 1e-6)]
    assert torch.equal(*both) and not list((tmp_path / "data").iterdir())
    maps = Path("/proc/self/maps")
    assert not maps.exists() or f"{tmp_path}/data/" in maps.read_text()


@pytest.mark.parametrize(("place", "count"), [("file", 1), ("data", 2**44)])
def test_a_data_folder_without_room_is_a_sentence(place, count, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(at.Stop, match="--data-dir"):
        at.room_for((count, 99), quick_flags(MEMORY_GB=0, DATA_DIR=str(tmp_path / place)))
    assert not list(tmp_path.glob("data/*"))


@pytest.mark.parametrize(("kind", "told"), [("TIFF", True), ("GIF", True), ("WEBP", True),
                                            ("PNG", True), ("MPO", False)])
def test_files_with_several_pictures_are_told(kind, told, tmp_path, capsys):
    pages = [Image.new("RGB", (16, 16), (place * 99, 80, 60)) for place in range(3)]
    pages[0].save(tmp_path / "stack", kind, save_all=True, append_images=pages[1:])
    images, _ = at.decode_all([tmp_path / "stack", tmp_path / "gone"], 16, quick_flags(), [])
    assert images[0, 0].mean() < 20  # the first
    assert ("1 files hold several pictures" in capsys.readouterr().out) == told
