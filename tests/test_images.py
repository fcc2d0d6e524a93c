"""Image files as they are meant to be seen: turned, transparent, damaged, of more than 8 bits."""

import csv
import io
import os
import struct
import sys
import threading
import time
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


def decoded(paths: list[Path], scale: list[float] | None = None, side: int = 16,
            **changes) -> np.ndarray:
    """Pixels of image files, int [n, 3, side, side]."""
    scale = [] if scale is None else scale
    images, unreadable = at.decode_all(paths, side, quick_flags(**changes), scale)
    assert not unreadable
    return images.astype(int)


READABLE = {  # name: content, and the grey that it shows
    "png_named.jpg": (flat("RGB", GREY), 200),
    "no_suffix": (flat("RGB", GREY, "BMP"), 200),
    "café ☕ (1).png": (flat("RGB", GREY, size=(1, 1)), 200),
    "tall.png": (flat("RGB", GREY, size=(1, 5000)), 200),
    "wide.jpg": (flat("RGB", GREY, "JPEG", (5000, 1)), 200),
    "L.jpg": (flat("L", 200, "JPEG"), 200),
    "L_clear.png": (flat("L", 200, transparency=200), 255),
    "LA.png": (flat("LA", (200, 255)), 200),
    "LA_clear.png": (flat("LA", (200, 0)), 255),
    "1_white.png": (flat("1", 1), 255),
    "1_black.png": (flat("1", 0), 0),
    "P.png": (palette(), 200),
    "P_clear.png": (palette(transparency=1), 255),
    "P_other_clear.png": (palette(transparency=0), 200),
    "P_half.png": (palette(transparency=b"\xff\x80"), 228),
    "RGB_clear.png": (flat("RGB", GREY, transparency=GREY), 255),
    "RGBA_half.png": (flat("RGBA", (*GREY, 128)), 228),
    "RGBA_clear.png": (flat("RGBA", (255, 0, 0, 0)), 255),
    "CMYK.jpg": (flat("CMYK", (55, 55, 55, 0), "JPEG"), 200),
    "LAB.tif": (flat("LAB", (205, 128, 128), "TIFF"), 199),
    "lzw.tif": (flat("RGB", GREY, "TIFF", compression="tiff_lzw"), 200),
    "animated.gif": (flat("L", 200, "GIF", append_images=[Image.new("L", (9, 9))], save_all=True),
                     200),
    "web.webp": (flat("RGB", GREY, "WEBP"), 200),
}


@pytest.mark.parametrize("name", READABLE)
def test_a_strange_but_whole_image_is_read(name, tmp_path):
    content, grey = READABLE[name]
    (tmp_path / name).write_bytes(content)
    for side in (1, 37):
        for fit in ("crop", "squash"):
            seen = decoded([tmp_path / name], None, side, FIT=fit)
            assert seen.shape == (1, 3, side, side) and np.abs(seen - grey).max() <= 4


STORED = dict(zip(range(2, 9), ("FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE",
                                "ROTATE_90", "TRANSVERSE", "ROTATE_270"), strict=True))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_picture_is_seen_upright(orientation, kind, tmp_path):
    upright = stored = Image.new("L", (32, 32), "black")
    upright.paste("white", (0, 0, 16, 16))
    upright.paste(128, (16, 0, 32, 16))
    if orientation in STORED:
        stored = upright.transpose(Image.Transpose[STORED[orientation]])
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.convert("RGB").save(tmp_path / "image", kind, exif=exif)
    assert np.abs(decoded([tmp_path / "image"], None, 32)[0, 0] - np.asarray(upright)).mean() < 8


@pytest.mark.parametrize(("fit", "along", "across"), [
    ("crop", [255, 255, 255], [255] * 3), ("squash", [0, 255, 0], [255] * 3),
    ("pad", [0, 255, 0], [at.GREY, 255, at.GREY])])
@pytest.mark.parametrize("tall", [False, True])
def test_an_image_becomes_a_square_as_fit_says(fit, along, across, tall, tmp_path):
    image = Image.new("RGB", (80, 40), "black")
    image.paste("white", (20, 0, 60, 40))
    (image.transpose(Image.Transpose.ROTATE_90) if tall else image).save(tmp_path / "a.png")
    seen = decoded([tmp_path / "a.png"], None, 40, FIT=fit)[0, 0]
    seen = seen.T if tall else seen
    assert seen[20, [3, 20, 36]].tolist() == along and seen[[3, 20, 36], 20].tolist() == across


# ---- Files that can't be read, and metadata ----

NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8))
JPEG, PNG = encoded(NOISE, "JPEG"), encoded(NOISE)


def chunk(kind: bytes, content: bytes, wrong: int = 0) -> bytes:
    checksum = zlib.crc32(kind + content) ^ wrong
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)


def png(width: int, height: int, bits: int, rows: bytes) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, 2, 0, 0, 0))
    return PNG[:8] + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


UNREADABLE = {  # name: content, and what is said of it
    "empty.jpg": (b"", "the file is empty"),
    "text.jpg": (b"These are my notes on cats.\n", ""),
    "drawing.svg": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', ""),
    "phone.HEIC": (b"\0\0\0\x18ftypheic" + b"\0" * 40, "Save it as JPEG"),
    "cut.jpg": (JPEG[: len(JPEG) // 2], ""),
    "cut.png": (PNG[: len(PNG) // 2], ""),
    "one.jpg": (JPEG[:1], ""),
    "cut.webp": (encoded(NOISE, "WEBP")[:200], ""),
    "cut.tif": (encoded(NOISE, "TIFF")[:300], ""),
    "cut.bmp": (encoded(NOISE, "BMP")[:300], ""),
    "bomb.png": (png(20_000, 20_000, 8, b"\0"), "Save it smaller"),
    "no_pixels.png": (png(0, 0, 8, b"\0"), ""),
    "zeros.png": (b"\0" * 4096, ""),
}


def with_unreadable(root: Path) -> Path:
    folder = class_pictures(root / "pets", dict(cat=20, dog=20), 30)
    for name, (content, _) in UNREADABLE.items():
        (folder / "cat" / name).write_bytes(content)
    return folder


def test_unreadable_files_are_named_at_once_with_the_way_out(tmp_path):
    ended = call(command(DATASET=with_unreadable(tmp_path), OUTPUT_DIR=tmp_path / "out",
                         ARCHITECTURES=("test_resnet",)))
    assert ended.code == 2 and "--skip-unreadable true" in ended.err
    lines = (tmp_path / "out" / "unreadable_files.txt").read_text().splitlines()
    assert ended.err.splitlines()[1:11] == lines[:10] and f"All {len(lines)}" in ended.err
    said = {Path(line.partition(": ")[0]).name: line for line in lines}
    assert sorted(said) == sorted(UNREADABLE) and len(lines) == len(UNREADABLE)
    assert all(what in said[name] for name, (_, what) in UNREADABLE.items())


@pytest.mark.parametrize("memory", [0, 1])
def test_unreadable_files_are_left_out_on_request(memory, tmp_path):
    job = at.Job(quick_flags(DATASET=str(with_unreadable(tmp_path)), SKIP_UNREADABLE=True,
                             TRAIN_IMAGES=0, TEST_IMAGES=0, MEMORY_GB=memory,
                             DATA_DIR=str(tmp_path / "data")))
    data = at.load_data(job)
    used = torch.cat(list(data.split.values()))
    assert len(used) == len(used.unique()) == 40
    assert not {Path(data.names[place]).name for place in used} & set(UNREADABLE)
    (said,) = [notice for notice in job.notices if "SKIP_UNREADABLE" in notice]
    assert f"All {len(UNREADABLE)}" in said


def test_a_pipe_is_no_image_and_nobody_waits_for_it(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    writer = os.open(tmp_path / "pipe.png", os.O_RDWR)  # whoever reads ends when this is closed
    timer = threading.Timer(5, os.close, [writer])
    timer.start()
    started = time.monotonic()
    _, unreadable = at.decode_all([tmp_path / "pipe.png"], 8, quick_flags(), [])
    assert "not a file" in unreadable[0] and time.monotonic() - started < 60
    timer.cancel()
    os.close(writer)


def test_a_class_of_which_nothing_is_left_stops_even_so(tmp_path):
    folder = class_pictures(tmp_path / "pets", dict(cat=20, dog=20, owl=20))
    for file in (folder / "owl").iterdir():
        file.write_bytes(b"")
    with pytest.raises(at.Stop, match="no image to train on of owl"):
        at.load_data(at.Job(quick_flags(DATASET=str(folder), SKIP_UNREADABLE=True)))


def jpeg_with(marker: int, content: bytes) -> bytes:
    size = struct.pack(">H", len(content) + 2)
    return JPEG[:2] + bytes([255, marker]) + size + content + JPEG[2:]


METADATA = {
    f"{name}.png": PNG[:33] + extra + PNG[33:] for name, extra in dict(  # behind the header
        text=chunk(b"zTXt", b"a\0\0" + zlib.compress(b"x" * 3_000_000)),
        texts=chunk(b"tEXt", b"a\0" + b"x" * 900_000) * 80,
        profile=chunk(b"iCCP", b"a\0\0" + zlib.compress(b"x" * 3_000_000)),
        exif=chunk(b"eXIf", b"nonsense"),
        cut_exif=chunk(b"eXIf", b"II*\0\x08\0\0\0\xff\xff\x12\1")).items()
} | {
    "exif.jpg": jpeg_with(0xE1, b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + b"\xff" * 60),
    "exif_far.jpg": jpeg_with(0xE1, b"Exif\0\0MM\0*\xff\xff\xff\xf0"),
    "comment.jpg": jpeg_with(0xFE, b"x" * 60_000),
    "panorama.jpg": jpeg_with(0xE2, b"MPF\0II*\0\x08\0\0\0\x09\0" + b"\xff" * 30),
    "photoshop.jpg": jpeg_with(0xED, b"Photoshop 3.0\0" + b"8BIM\x03\xed\xff" * 9),
    "profile.jpg": jpeg_with(0xE2, b"ICC_PROFILE\0\x01\x09" + b"x" * 60_000),
}


@pytest.mark.parametrize("name", METADATA)
def test_a_picture_with_bad_metadata_is_read(name, tmp_path):
    (tmp_path / name).write_bytes(METADATA[name])
    (tmp_path / "plain").write_bytes(PNG if name.endswith("png") else JPEG)
    seen, plain = decoded([tmp_path / name, tmp_path / "plain"])
    assert np.array_equal(seen, plain)


# ---- Pixels of more than 8 bits ----

TYPES = {"png": np.uint16, "I16.tif": np.uint16, "I.tif": np.int32, "F.tif": np.float32}


def save(path: Path, values: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values.astype(TYPES[path.name.partition(".")[2]])).save(path)
    return path


def ramps(folder: Path, kind: str, brightest: float, lowest: float = 0, hot: bool = False) -> list:
    """60 gradients, ever brighter; hot: with a broken pixel each, and one broken as a whole."""
    paths = []
    for number in range(60):
        values = np.linspace(lowest, lowest + (brightest - lowest) * (number + 1) / 60, 256)
        if hot:
            values[100 if number != 7 else slice(None)] = 65535
        paths.append(save(folder / f"{number:02d}.{kind}", values.reshape(16, 16)))
    return paths


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("brightest", [255, 4095, 65535])
def test_one_scale_keeps_the_relative_brightness_of_images(kind, brightest, tmp_path):
    scale = []
    seen = decoded(ramps(tmp_path, kind, brightest), scale)[:, 0]
    assert scale == pytest.approx([0, brightest * 59 / 60], rel=0.02, abs=brightest / 400)
    assert seen[-1].max() == 255
    assert seen[:, 8, 8] == pytest.approx(np.arange(1, 61) * seen[58, 8, 8] / 59, abs=2)


@pytest.mark.parametrize("kind", ["png", "I.tif", "F.tif"])
def test_hot_pixels_and_a_broken_image_darken_nothing(kind, tmp_path):
    clean = decoded(ramps(tmp_path / "clean", kind, 4000))
    hot = decoded(ramps(tmp_path / "hot", kind, 4000, hot=True))
    assert (np.abs(clean - hot) > 12).mean() < 0.03


@pytest.mark.parametrize("kind", ["I.tif", "F.tif"])
def test_negative_values_are_not_cut_off(kind, tmp_path):
    scale = []
    seen = decoded(ramps(tmp_path, kind, 3000, -1000), scale)
    assert scale[0] == pytest.approx(-1000, abs=20) and np.ptp(seen[30]) > 50


def test_not_a_number_is_black_and_hides_nothing(tmp_path):
    values = np.linspace(0, 1, 256).reshape(16, 16)
    values[0, :3] = np.nan, np.inf, -np.inf
    seen = decoded([save(tmp_path / "1.F.tif", values)])[0, 0]
    assert seen[0, :3].tolist() == [0, 255, 0] and seen[-1, -1] == 255 and 120 < seen[8, 8] < 140
    assert not decoded([save(tmp_path / "2.F.tif", np.full((16, 16), np.nan))]).any()


def test_a_scale_that_is_given_stays_and_eight_bits_need_none(tmp_path):
    Image.new("L", (16, 16), 77).save(tmp_path / "grey.png")
    paths = [*ramps(tmp_path, "png", 1000), tmp_path / "grey.png"]
    scale, nothing = [0.0, 4095.0], []
    seen = decoded(paths, scale)
    assert scale == [0, 4095] and seen[59].max() == round(255 * 1000 / 4095)
    assert (seen[60] == 77).all() and (decoded(paths[60:], nothing) == 77).all() and not nothing


def test_sixteen_bits_a_colour_are_read_as_pillow_has_them(tmp_path):
    rows = (b"\0" + struct.pack(">27H", *[51400, 25700, 0] * 9)) * 9
    (tmp_path / "deep.png").write_bytes(png(9, 9, 16, rows))
    seen = decoded([tmp_path / "deep.png"])[0]
    assert np.abs(seen.mean((1, 2)) - [200, 100, 0]).max() <= 1


def test_predict_shows_a_single_image_at_the_scale_of_the_run(tmp_path):
    for name, brightest in (("dark", 1000), ("light", 4000)):
        ramps(tmp_path / "pets" / name, "png", brightest)
    output = tmp_path / "out"
    ended = call(command(DATASET=tmp_path / "pets", OUTPUT_DIR=output, NUM_EPOCHS=1,
                         ARCHITECTURES=("test_resnet",)))
    assert ended.code == 0 and "more than 8 bits" in ended.out and "--predict too" in ended.out
    with (output / "test_predictions.csv").open(newline="") as stream:
        row = next(csv.DictReader(stream))
    ended = call(["--predict", row["image"], "--output-dir", str(output)])
    shown = f"{row['predicted_class']}, {row['probability'][:5]}"
    assert f"{row['image']}: {shown}" in ended.out


# ---- Larger than memory ----


def test_large_sets_are_mapped_from_a_file_that_is_not_left_behind(tmp_path):
    folder = class_pictures(tmp_path / "pets", dict(cat=20, dog=20))
    data = tmp_path / "data"
    both = [at.load_data(at.Job(quick_flags(DATASET=str(folder), DATA_DIR=str(data),
                                            MEMORY_GB=memory))).images for memory in (1, 1e-6)]
    assert torch.equal(*both) and not list(data.iterdir())
    if sys.platform == "linux":
        assert f"{data}/" in Path("/proc/self/maps").read_text()


@pytest.mark.parametrize(("place", "count"), [("file", 1), ("data", 2**44)])
def test_a_data_folder_without_room_is_a_sentence(place, count, tmp_path):
    (tmp_path / "file").write_text("kept")
    flags = quick_flags(MEMORY_GB=0, DATA_DIR=str(tmp_path / place))
    with pytest.raises(at.Stop, match="--data-dir"):
        at.room_for((count, 3, 64, 64), flags)
    assert (tmp_path / "file").read_text() == "kept" and not list(tmp_path.glob("data/*"))
