"""Pixels of more than 8 bits, metadata that can't be read, and pictures that can't."""

import csv
import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CPU, quick_flags
from PIL import Image

import advanced_techniques as at


def save(path: Path, values: np.ndarray, kind: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    types = {"png": np.uint16, "I.tif": np.int32, "I16.tif": np.uint16, "F.tif": np.float32}
    Image.fromarray(values.astype(types[kind])).save(path)


def save_colour(path: Path, values: np.ndarray) -> None:
    """A PNG or TIFF file of 16 bits: [H, W, 3] RGB, [H, W, 4] with alpha, [H, W, 2] grey and alpha.

    The fourth band of a TIFF file is any other, such as infrared. Pillow can't write them.
    """
    height, width, bands = values.shape
    if path.suffix == ".png":
        rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
        kind = {2: 4, 3: 2, 4: 6}[bands]
        header = struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0)
        content = b"\x89PNG\r\n\x1a\n"
        for name, body in ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")):
            checksum = zlib.crc32(name + body)
            content += struct.pack(">I", len(body)) + name + body + struct.pack(">I", checksum)
    else:
        order = "<" if path.name.startswith("little") else ">"
        tags = {256: width, 257: height, 258: 16, 259: 1, 262: 2, 273: 200, 277: bands,
                278: height, 279: values.size * 2} | ({338: 0} if bands == 4 else {})
        content = (b"II" if order == "<" else b"MM") + struct.pack(order + "HIH", 42, 8, len(tags))
        for tag, value in tags.items():
            count = bands if tag == 258 else 1
            value = 190 if tag == 258 else value
            kind = 4 if tag in (273, 279) else 3
            content += struct.pack(order + "HHI", tag, kind, count)
            if tag in (258, 273, 279):  # an address or a long number
                content += struct.pack(order + "I", value)
            else:
                content += struct.pack(order + "HH", value, 0)
        content = content.ljust(190, b"\0") + struct.pack(f"{order}{bands}H", *[16] * bands)
        content = content.ljust(200, b"\0") + values.astype(order + "u2").tobytes()
    path.write_bytes(content)


def decoded(paths: list[Path], scale: dict | None = None) -> np.ndarray:
    images, unreadable = at.decode_all(paths, 16, quick_flags(), scale)
    assert not unreadable
    return images.numpy()[:, 0].astype(float)


def many(folder: Path, brightest: float, kind: str, lowest: float = 0, count: int = 12) -> list:
    """Images of a gradient each, ever brighter, from `lowest` up to `brightest`."""
    ramp = np.linspace(0, 1, 16 * 16).reshape(16, 16)
    paths = []
    for number in range(count):
        values = lowest + (brightest - lowest) * ramp * (number + 1) / count
        paths.append(folder / f"{number:02d}.{kind}")
        save(paths[-1], values, kind)
    return paths


@pytest.mark.parametrize("kind", ["png", "I16.tif", "I.tif"])
@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
def test_whole_numbers_are_scaled_by_the_bits_that_the_data_set_uses(kind, bits, tmp_path):
    scale = {}
    shown = decoded(many(tmp_path, 2**bits - 1, kind), scale)
    assert scale == {"whole": [0, 2**bits - 1]}
    assert shown[-1].max() == 255 and shown[0].max() == pytest.approx(255 / 12, abs=1)


@pytest.mark.parametrize(("brightest", "white"), [(1, 1), (0.01, 2**-6), (200, 256), (5000, 8192)])
def test_real_numbers_are_scaled_by_what_the_data_set_reaches(brightest, white, tmp_path):
    scale = {}
    shown = decoded(many(tmp_path, brightest, "F.tif"), scale)
    assert scale == {"real": [0, white]}
    assert shown[-1].max() == pytest.approx(255 * brightest / white, abs=3)


@pytest.mark.parametrize("kind", ["png", "I.tif", "F.tif"])
@pytest.mark.parametrize("broken", [1, 4])
def test_hot_pixels_darken_nothing(kind, broken, tmp_path):
    clean = many(tmp_path / "clean", 4000, kind)
    hot = many(tmp_path / "hot", 4000, kind)
    for path in hot:
        values = np.array(Image.open(path), dtype=float)
        values.flat[100 : 100 + broken] = 65535
        save(path, values, kind)
    difference = np.abs(decoded(clean) - decoded(hot))
    assert (difference > 12).mean() < 0.02


@pytest.mark.parametrize("kind", ["I.tif", "F.tif"])
def test_negative_values_are_not_cut_off(kind, tmp_path):
    scale = {}
    shown = decoded(many(tmp_path, 3000, kind, lowest=-1000), scale)
    assert next(iter(scale.values()))[0] == -1024
    assert np.ptp(shown[0]) > 10 and shown.max() > 180
    below = many(tmp_path / "below", -5, kind, lowest=-60)
    assert np.ptp(decoded(below)) > 150


def test_not_a_number_is_black_and_hides_nothing(tmp_path):
    values = np.linspace(0, 1, 256).reshape(16, 16)
    values[0, :3] = np.nan, np.inf, -np.inf
    save(tmp_path / "1.F.tif", values, "F.tif")
    shown = decoded([tmp_path / "1.F.tif"])[0]
    assert shown[-1, -1] == 255 and shown[0, 0] == 0 and 100 < shown[8, 8] < 160


def test_values_in_a_narrow_range_fill_the_scale(tmp_path):
    assert np.ptp(decoded(many(tmp_path, 30500, "png", lowest=29000))) > 100


def test_one_image_broken_as_a_whole_darkens_nothing(tmp_path):
    paths = many(tmp_path, 4000, "png", count=60)
    save(paths[7], np.full((16, 16), 65535), "png")
    scale = {}
    decoded(paths, scale)
    assert scale == {"whole": [0, 4095]}


def test_a_scale_that_is_given_stays_also_for_a_single_image(tmp_path):
    paths = many(tmp_path, 1000, "png")
    scale = {"whole": [0.0, 4095.0]}
    assert decoded(paths, scale).max() == pytest.approx(255 * 1000 / 4095, abs=1)
    assert scale == {"whole": [0, 4095]}
    alone = [decoded([path], dict(scale))[0] for path in paths]
    assert np.array_equal(np.stack(alone), decoded(paths, scale))


def test_each_kind_of_pixels_has_its_own_scale_and_eight_bits_need_none(tmp_path):
    paths = many(tmp_path / "a", 4000, "png") + many(tmp_path / "b", 1, "F.tif")
    Image.new("L", (16, 16), 77).save(tmp_path / "grey.png")
    scale = {}
    shown = decoded([*paths, tmp_path / "grey.png"], scale)
    assert scale == {"whole": [0, 4095], "real": [0, 1]}
    assert (shown[-1] == 77).all() and shown[11].max() > 240 and shown[23].max() > 250


@pytest.mark.parametrize(("name", "bands"), [("rgb.png", 3), ("rgba.png", 4), ("grey.png", 2),
                                             ("little.tif", 3), ("big.tif", 3)])
def test_colours_of_twelve_bits_are_neither_dark_nor_coarse(name, bands, tmp_path):
    values = np.random.default_rng(0).integers(0, 4096, (16, 16, bands))
    values[0, 0] = 4095
    if bands != 3:
        values[..., -1] = 65535
        values[1, 1] = 0  # transparent, so white, and no reason to widen the scale
    save_colour(tmp_path / name, values)
    with Image.open(tmp_path / name) as image:
        read = at.deep_values(image, at.deep_pixels(image))
    colours = values if bands == 3 else values[..., :-1]
    seen = np.ones((16, 16), bool)
    seen[1, 1] = bands == 3
    assert np.array_equal(read[seen], np.broadcast_to(colours, (16, 16, 3))[seen])
    scale = {}
    images, unreadable = at.decode_all([tmp_path / name], 16, quick_flags(), scale)
    assert not unreadable and scale == {"colour": [0, 4095]}
    shown = images[0].permute(1, 2, 0).numpy()
    assert np.abs(shown - read / 4095 * 255)[seen].max() <= 0.5
    assert bands == 3 or (shown[1, 1] == 255).all()


@pytest.mark.parametrize("order", ["little", "big"])
def test_a_fourth_band_hides_nothing_and_is_not_seen(order, tmp_path):
    values = np.random.default_rng(0).integers(0, 4096, (16, 16, 4))
    path = tmp_path / f"{order}.tif"
    save_colour(path, values)
    with Image.open(path) as image:
        assert np.array_equal(at.deep_values(image, at.deep_pixels(image)), values[..., :3])
    assert decoded([path])[0].max() > 200


def test_colours_of_sixteen_bits_turn_with_their_file(tmp_path):
    values = np.zeros((16, 16, 3), int)
    values[:8] = 65535
    save_colour(tmp_path / "a.png", values)
    content = (tmp_path / "a.png").read_bytes()
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    body = b"eXIf" + exif.tobytes()[6:]
    chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    (tmp_path / "a.png").write_bytes(content[:33] + chunk + content[33:])
    shown = decoded([tmp_path / "a.png"])[0]
    assert (shown[8:] == 255).all() and (shown[:8] == 0).all()


def test_a_data_set_of_twelve_bits_says_and_keeps_its_scale(tmp_path):
    for name, brightest in (("dark", 900), ("bright", 4000)):
        many(tmp_path / "pets" / name, brightest, "png", count=30)
    flags = quick_flags(DATASET=str(tmp_path / "pets"), TRAIN_IMAGES=0, TEST_IMAGES=0)
    data, notices = at.load_data(flags, CPU)
    assert data.scale == {"whole": [0, 4095]}
    (said,) = [notice for notice in notices if "more than 8 bits" in notice]
    assert "4,095" in said and "--predict" in said
    means = data.images.float().mean((1, 2, 3))
    assert means[data.labels == 0].max() > 100


# ---- metadata ------------------------------------------------------------------------------------


def picture() -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 256, (24, 32, 3), np.uint8)
    return Image.fromarray(noise).resize((64, 48))


def chunk(kind: bytes, content: bytes, right: bool = True) -> bytes:
    checksum = zlib.crc32(kind + content) ^ (not right)
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)


def png_with(extra: bytes) -> bytes:
    stream = io.BytesIO()
    picture().save(stream, "PNG")
    content = stream.getvalue()
    return content[:33] + extra + content[33:]  # behind the header


def jpeg_with(extra: bytes) -> bytes:
    stream = io.BytesIO()
    picture().save(stream, "JPEG", quality=95)
    content = stream.getvalue()
    return content[:2] + extra + content[2:]


def segment(marker: int, content: bytes) -> bytes:
    return bytes([255, marker]) + struct.pack(">H", len(content) + 2) + content


def strange_exif() -> bytes:
    """EXIF that turns a picture upside down, with a text where a number belongs."""
    entries = struct.pack("<HHII", 0x0112, 3, 1, 3) + struct.pack("<HHI4s", 0x011A, 2, 4, b"abc\0")
    return b"Exif\0\0II*\0\x08\0\0\0\x02\0" + entries + b"\0\0\0\0"


METADATA = {
    "text.png": png_with(chunk(b"zTXt", b"a\0\0" + zlib.compress(b"x" * 3_000_000))),
    "texts.png": png_with(chunk(b"tEXt", b"a\0" + b"x" * 900_000) * 80),
    "profile.png": png_with(chunk(b"iCCP", b"a\0\0" + zlib.compress(b"x" * 3_000_000))),
    "checksum.png": png_with(chunk(b"tEXt", b"a\0b", right=False)),
    "exif.png": png_with(chunk(b"eXIf", b"nonsense")),
    "cut_exif.png": png_with(chunk(b"eXIf", b"II*\0\x08\0\0\0\xff\xff\x12\1")),
    "exif.jpg": jpeg_with(segment(0xE1, b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + b"\xff" * 60)),
    "comment.jpg": jpeg_with(segment(0xFE, b"x" * 60_000) * 20),
    "panorama.jpg": jpeg_with(segment(0xE2, b"MPF\0II*\0\x08\0\0\0\x09\0" + b"\xff" * 30)),
    "photoshop.jpg": jpeg_with(segment(0xED, b"Photoshop 3.0\0" + b"8BIM\x03\xed\xff" * 9)),
    "profile.jpg": jpeg_with(segment(0xE2, b"ICC_PROFILE\0\x01\x09" + b"x" * 60_000)),
}


@pytest.mark.parametrize("name", METADATA)
def test_a_picture_with_bad_metadata_is_read(name, tmp_path):
    (tmp_path / name).write_bytes(METADATA[name])
    plain = png_with(b"") if name.endswith("png") else jpeg_with(b"")
    (tmp_path / "plain").write_bytes(plain)
    images, unreadable = at.decode_all([tmp_path / name, tmp_path / "plain"], 24, quick_flags())
    assert not unreadable and (images[0] == images[1]).all()


def test_exif_that_can_not_be_written_again_still_turns_the_picture(tmp_path):
    (tmp_path / "turned.jpg").write_bytes(jpeg_with(segment(0xE1, strange_exif())))
    (tmp_path / "plain.jpg").write_bytes(jpeg_with(b""))
    turned = at.decode(tmp_path / "turned.jpg", 24).astype(int)
    plain = at.decode(tmp_path / "plain.jpg", 24).astype(int)
    assert np.abs(turned - plain[:, ::-1, ::-1]).mean() < 3


def test_a_cut_picture_stays_unreadable(tmp_path):
    content = png_with(chunk(b"tEXt", b"a\0b", right=False))
    (tmp_path / "cut.png").write_bytes(content[: len(content) // 2])
    _, unreadable = at.decode_all([tmp_path / "cut.png"], 24, quick_flags())
    assert list(unreadable) == [0]


@pytest.mark.parametrize(
    ("name", "content", "wanted"),
    [
        ("phone.heic", b"\0\0\0\x18ftypheic" + b"\0" * 40, ("HEIC", "JPEG")),
        ("phone.jpg", b"\0\0\0\x18ftypmif1" + b"\0" * 40, ("HEIC", "JPEG")),
        ("empty.jpg", b"", ("empty",)),
        ("lfs.jpg", b"version https://git-lfs.github.com/spec/v1\noid", ("git lfs pull",)),
        ("page.jpg", b"<!DOCTYPE html>", ("no image",)),
    ],
)
def test_a_picture_that_can_not_be_read_says_what_to_do(name, content, wanted, tmp_path):
    (tmp_path / name).write_bytes(content)
    _, unreadable = at.decode_all([tmp_path / name], 8, quick_flags())
    assert all(part in unreadable[0] for part in wanted), unreadable[0]


def test_a_scan_beyond_the_limit_says_what_to_do(tmp_path, monkeypatch):
    Image.new("L", (300, 200)).save(tmp_path / "scan.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    _, unreadable = at.decode_all([tmp_path / "scan.png"], 8, quick_flags())
    assert "60,000 pixels" in unreadable[0] and "smaller" in unreadable[0]


# ---- prediction ----------------------------------------------------------------------------------


def test_predict_answers_as_the_run_measured_in_every_format(tmp_path):
    """Each test image alone and all together: the scale is the run's, not the files'."""
    random = np.random.default_rng(0)
    folder = tmp_path / "pets"
    for name, level in (("dark", 0.2), ("light", 0.6)):
        (folder / name).mkdir(parents=True)
        for number in range(30):
            values = level * random.uniform(0.5, 1.5, (16, 16))
            kind = ("png", "I.tif", "F.tif", "8.png", "turned.jpg", "rgb.png")[number % 6]
            path = folder / name / f"{number}.{kind}"
            if kind == "8.png":
                Image.fromarray((values * 255).astype(np.uint8)).save(path)
            elif kind == "turned.jpg":
                grey = Image.fromarray((values * 255).astype(np.uint8))
                grey.save(path, exif=strange_exif())
            elif kind == "rgb.png":
                save_colour(path, (values * 4000).astype(int)[..., None].repeat(3, axis=2))
            else:
                save(path, values * (1 if kind == "F.tif" else 4000), kind)
    output = ["--output-dir", str(tmp_path / "out"), "--data-dir", str(tmp_path / "data")]
    arguments = ["--dataset", str(folder), "--architectures", "test_resnet", "--pretrained", "none"]
    arguments += ["--image-size", "32", "--num-epochs", "1", "--batch-size", "8"]
    at.main([*arguments, "--gradient-accumulation-steps", "1", *output])
    flags = at.small_profile(at.read_flags([*arguments, *output]), CPU)
    source, _ = at.find_source(flags)
    chosen = at.split(source, flags.TRAIN_IMAGES, flags.TEST_IMAGES, flags.SEED)["test"]
    saved = torch.load(tmp_path / "out" / "checkpoints" / "test_resnet.pt")
    measured = saved["finished"]["averaged"].numpy()
    assert saved["scale"] == {"whole": [0, 4095], "real": [0, 1], "colour": [0, 4095]}
    at.main(["--predict", str(folder), *output])
    with (tmp_path / "out" / "predictions.csv").open(newline="") as stream:
        rows = {row["path"]: row for row in csv.DictReader(stream)}
    assert len(rows) == 60
    for index, probabilities in zip(chosen, measured, strict=True):
        row = rows[str(source.files[index])]
        wanted = probabilities[source.classes.index(row["class_1"])]
        assert float(row["probability_1"]) == pytest.approx(wanted, abs=2e-4)
    alone = tmp_path / "alone"
    alone.mkdir()
    deep = next(file for file in (source.files[index] for index in chosen) if ".F." in file.name)
    (alone / deep.name).write_bytes(deep.read_bytes())
    at.main(["--predict", str(alone), *output])
    with (tmp_path / "out" / "predictions.csv").open(newline="") as stream:
        (row,) = csv.DictReader(stream)
    assert row["probability_1"] == rows[str(deep)]["probability_1"]


@pytest.mark.parametrize("bands", [1, 3])
def test_a_transparent_colour_of_16_bits_lies_over_white(bands, tmp_path):
    shape = (9, 9) if bands == 1 else (9, 9, 3)
    values = np.full(shape, 30_000, np.uint16)
    values[:3] = 700  # the colour that is marked as transparent
    file = tmp_path / "pets" / "clear.png"
    if bands == 1:
        save(file, values, "png")
    else:
        file.parent.mkdir()
        save_colour(file, values)
    marked = struct.pack(f">{bands}H", *[700] * bands)
    chunk = struct.pack(">I", len(marked)) + b"tRNS" + marked
    content = file.read_bytes()
    header_end = content.index(b"IDAT") - 4
    checksum = struct.pack(">I", zlib.crc32(b"tRNS" + marked))
    file.write_bytes(content[:header_end] + chunk + checksum + content[header_end:])
    with Image.open(file) as image:
        shown = np.asarray(at.as_seen(image, None))
    assert (shown[:3] == 255).all() and (shown[3:] == round(30_000 * 255 / 32_767)).all()


@pytest.mark.parametrize("text", ["-9999", "-9999.0 ", "none"])
def test_where_nothing_was_measured_says_nothing_of_black_and_white(text, tmp_path):
    values = np.tile(np.linspace(0, 0.6, 20, dtype=np.float32), (20, 1))
    values[:2] = -9999
    file = tmp_path / "tile.tif"
    Image.fromarray(values).save(file, tiffinfo={at.NO_DATA: text})
    with Image.open(file) as image:
        kind = at.deep_pixels(image)
        reach = at.extent(at.deep_values(image, kind))
        shown = np.asarray(at.as_seen(image, None)).astype(int)
    assert (reach[0] >= 0) == (text != "none")
    assert (len(np.unique(shown[2:])) > 10) == (text != "none")
    assert (shown[:2] == shown.min()).all()
