"""A user's images of every kind, as people see them or refused by name."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from ipr_jax.tasks import image_files

GRAY = np.array([[0, 64, 128], [192, 255, 32]], np.uint8)
RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)
COLORS = np.array([[RED, GREEN, BLUE], [WHITE, (0, 0, 0), (200, 100, 50)]], np.uint8)
CLEAR = np.array([[255, 0, 51], [255, 255, 0]], np.uint8)
"""How opaque pixels are."""
OVER_WHITE = np.array([[RED, WHITE, (204, 204, 255)], [WHITE, (0, 0, 0), WHITE]], np.uint8)
"""What people see of ``COLORS`` then."""
HIDDEN_GRAY = np.array([[0, 255, 230], [192, 255, 255]], np.uint8)


def saved(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png16(values, color, *chunks, size=None):
    """A PNG file with 16 bits per channel, of numbers [H, W, C]."""
    h, w = size or values.shape[:2]
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in values)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", w, h, 16, color, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(lines))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + body + chunk(b"IEND", b"")


def tiff(array, *, bits=None, photometric=None, order="<", orientation=1):
    """A TIFF file of numbers [H, W] or [H, W, C] of the array's type."""
    h, w, channels = (*array.shape, 1)[:3]
    bits = bits or 8 * array.itemsize
    if bits == 12:
        each = np.unpackbits(array.astype(">u2").view(np.uint8), axis=1).reshape(h, w, 16)[..., 4:]
        pixels = np.packbits(each.reshape(h, -1), axis=1).tobytes()
    else:
        pixels = array.astype(array.dtype.newbyteorder(order)).tobytes()
    tags = {
        256: w,
        257: h,
        258: bits,
        259: 1,
        262: (1 if channels == 1 else 2) if photometric is None else photometric,
        273: 0,
        274: orientation,
        277: channels,
        278: h,
        279: len(pixels),
        339: {"u": 1, "i": 2, "f": 3}[array.dtype.kind],
    }
    end = 8 + 2 + 12 * len(tags) + 4
    tags[273] = end + 2 * channels
    entries = b"".join(
        struct.pack(f"{order}HHII", tag, 3, channels, end)
        if tag == 258 and channels > 2
        else struct.pack(f"{order}HHIHH", tag, 3, 1, value, 0)
        for tag, value in tags.items()
    )
    start = {"<": b"II", ">": b"MM"}[order] + struct.pack(f"{order}HI", 42, 8)
    many = struct.pack(f"{order}{channels}H", *[bits] * channels)
    return start + struct.pack(f"{order}H", len(tags)) + entries + bytes(4) + many + pixels


def paletted():
    image = Image.new("P", (3, 2))
    image.putpalette(COLORS.reshape(-1).tolist())
    image.putdata(range(6))
    return image


def several(kind, **options):
    frames = [Image.fromarray(COLORS), Image.new("RGB", (3, 2), "gray")]
    return saved(frames[0], kind, save_all=True, append_images=frames[1:], **options)


gray, colors = Image.fromarray(GRAY), Image.fromarray(COLORS)
clear_gray = Image.merge("LA", (gray, Image.fromarray(CLEAR)))
clear = Image.merge("RGBA", (*colors.split(), Image.fromarray(CLEAR)))
GRAY16, COLORS16 = GRAY.astype(np.uint16) * 257, COLORS.astype(np.uint16) * 257
CLEAR16 = CLEAR.astype(np.uint16)[..., None] * 257
GRAY12 = np.rint(GRAY * (4095 / 255)).astype(np.uint16)

IMAGES = {
    "1": (saved(gray.point(lambda value: 255 * (value > 100)).convert("1"), "PNG"),
          255 * (GRAY > 100)),
    "L": (saved(gray, "PNG"), GRAY),
    "L, one gray is clear": (saved(gray, "PNG", transparency=64), np.where(GRAY == 64, 255, GRAY)),
    "LA": (saved(clear_gray, "PNG"), HIDDEN_GRAY),
    "LA of 16 bits": (png16(np.concatenate([GRAY16[..., None], CLEAR16], -1), 4), HIDDEN_GRAY),
    "P": (saved(paletted(), "PNG"), COLORS),
    "P, a color is clear": (saved(paletted(), "PNG", transparency=1),
                            np.where((COLORS == GREEN).all(-1, keepdims=True), 255, COLORS)),
    "P, colors are clear": (saved(paletted(), "PNG", transparency=CLEAR.tobytes()), OVER_WHITE),
    "P of a GIF, a color is clear": (
        saved(paletted(), "GIF", transparency=1),
        np.where((COLORS == GREEN).all(-1, keepdims=True), 255, COLORS),
    ),
    "RGB": (saved(colors, "BMP"), COLORS),
    "RGB, a color is clear": (saved(colors, "PNG", transparency=GREEN),
                              np.where((COLORS == GREEN).all(-1, keepdims=True), 255, COLORS)),
    "RGB of 16 bits": (png16(COLORS16, 2), COLORS),
    "RGB of 16 bits, TIFF": (tiff(COLORS16), COLORS),
    "RGB of 16 bits, big endian": (tiff(COLORS16, order=">"), COLORS),
    "RGBA": (saved(clear, "PNG"), OVER_WHITE),
    "RGBA of a WebP": (saved(clear, "WEBP", lossless=True, exact=True), OVER_WHITE),
    "RGBA of 16 bits": (png16(np.concatenate([COLORS16, CLEAR16], -1), 6), OVER_WHITE),
    "CMYK": (saved(colors.convert("CMYK"), "TIFF"), COLORS),
    "YCbCr": (saved(gray.convert("YCbCr"), "TIFF"), GRAY),
    "I;16": (png16(GRAY16, 0), GRAY),
    "I;16, one gray is clear": (png16(GRAY16, 0, chunk(b"tRNS", struct.pack(">H", 64 * 257))),
                                np.where(GRAY == 64, 255, GRAY)),
    "I;16 of a TIFF": (tiff(GRAY16), GRAY),
    "I;16B": (tiff(GRAY16, order=">"), GRAY),
    "I;16, white is 0": (tiff(~GRAY16, photometric=0), GRAY),
    "I;16 of 12 bits": (tiff(GRAY12, bits=12), GRAY),
    "L, white is 0": (tiff(~GRAY, photometric=0), GRAY),
    "F": (tiff((GRAY / 255).astype(np.float32)), GRAY),
    "F, big endian": (tiff((GRAY / 255).astype(np.float32), order=">"), GRAY),
    "F, white is 0": (tiff((1 - GRAY / 255).astype(np.float32), photometric=0), GRAY),
    "animated GIF": (several("GIF"), COLORS),
    "animated PNG": (several("PNG"), COLORS),
    "animated WebP": (several("WEBP", lossless=True), COLORS),
    "pages": (several("TIFF"), COLORS),
}  # fmt: skip


def rgb(array):
    return np.broadcast_to(array.reshape(2, 3, -1), (2, 3, 3))


@pytest.fixture
def path(tmp_path):
    """Names say nothing: what is in a file counts."""
    return tmp_path / "a.tif"


@pytest.mark.parametrize("name", IMAGES)
def test_images_are_read_as_people_see_them(path, name):
    data, expected = IMAGES[name]
    path.write_bytes(data)
    image_files.check(path)
    seen = image_files.read(path)
    assert seen.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(seen), rgb(expected))


def test_a_photograph_in_cmyk_is_read_as_people_see_it(path):
    """JPEG is not exact."""
    path.write_bytes(saved(colors.resize((48, 32), 0).convert("CMYK"), "JPEG", quality=100))
    np.testing.assert_allclose(np.asarray(image_files.read(path))[8::16, 8::16], COLORS, atol=3)


STORED = {
    1: lambda upright: upright,
    2: np.fliplr,
    3: lambda upright: np.rot90(upright, 2),
    4: np.flipud,
    5: lambda upright: upright.swapaxes(0, 1),
    6: np.rot90,
    7: lambda upright: np.rot90(upright, 2).swapaxes(0, 1),
    8: lambda upright: np.rot90(upright, -1),
}
"""How an image lies in its file, by its orientation."""


@pytest.mark.parametrize("orientation", STORED)
def test_images_are_upright(path, orientation):
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](COLORS)))
    exif = Image.Exif()
    exif[0x0112] = orientation
    for kind, options in (("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {})):
        path.write_bytes(saved(stored, kind, exif=exif, **options))
        np.testing.assert_array_equal(np.asarray(image_files.read(path)), COLORS)
    for array in (GRAY, GRAY16, COLORS):
        path.write_bytes(tiff(STORED[orientation](array), orientation=orientation))
        expected = rgb(GRAY) if array is GRAY16 else rgb(array)
        np.testing.assert_array_equal(np.asarray(image_files.read(path)), expected)
    large = stored.resize((16 * stored.width, 16 * stored.height), 0)
    path.write_bytes(saved(large, "JPEG", exif=exif, quality=100, subsampling=0))
    seen = np.asarray(image_files.read(path))[8::16, 8::16]
    np.testing.assert_allclose(seen, COLORS, atol=3)


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
WHOLE = {kind: saved(NOISE, kind) for kind in ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")}
REFUSED = {
    **{f"half of a {kind}": (data[: len(data) // 2], r"\w") for kind, data in WHOLE.items()},
    "nothing": (b"", "it is an empty file"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\noid", "it is a Git LFS pointer"),
    "page": (b"<!DOCTYPE html>\n<html>", "it is an HTML page"),
    "text": (b"text", "it is a text file"),
    "noise": (bytes(range(128, 256)), "it is damaged or of no kind that Pillow reads"),
    "bomb": (
        png16(GRAY16, 0, size=(50_000, 50_000)),
        r"Image size \(2500000000 pixels\) exceeds limit",
    ),
    "I": (tiff(GRAY.astype(np.int32)), "its gray values are of 32 bits or have a sign"),
    "I, signed": (tiff(GRAY.astype(np.int16)), "its gray values are of 32 bits or have a sign"),
    "F to 255": (
        tiff(GRAY.astype(np.float32)),
        r"its gray values must be in 0\.\.1, got 0\.0\.\.255\.0",
    ),
    "F below 0": (
        tiff(GRAY / np.float32(255) - 1),
        r"its gray values must be in 0\.\.1, got -1\.0\.\.0\.0",
    ),
    "F, nan": (
        tiff(np.full((2, 3), np.nan, np.float32)),
        r"its gray values must be in 0\.\.1, got nan",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_files_are_refused_by_name(path, name):
    data, message = REFUSED[name]
    path.write_bytes(data)
    for function in (image_files.check, image_files.read):
        with pytest.raises(ValueError, match=rf"a\.tif cannot be read as an image: {message}") as e:
            function(path)
        assert "\n" not in str(e.value)


def test_what_cannot_be_opened_is_refused_by_name(path, monkeypatch):
    with pytest.raises(ValueError, match=r"a\.tif cannot be read as an image: No such file or dir"):
        image_files.check(path)
    path.mkdir()
    with pytest.raises(ValueError, match=r"a\.tif cannot be read as an image: it is a folder"):
        image_files.check(path)

    def refuse(*_):
        raise PermissionError(13, "Permission denied", "a.tif")

    monkeypatch.setattr(Image, "open", refuse)
    with pytest.raises(ValueError, match=r"a\.tif cannot be read as an image: it is a folder"):
        image_files.read(path)


def test_sound_images_are_opened_and_those_in_doubt_are_read(path, monkeypatch):
    seen = []
    monkeypatch.setattr(image_files, "read", seen.append)
    for kind, data in WHOLE.items():
        path.write_bytes(data)
        image_files.check(path)
        assert bool(seen) == (kind not in image_files.ENDS)
        path.write_bytes(data + b"more")
        image_files.check(path)
        assert seen.pop() == path
        seen.clear()


def test_images_are_found_by_their_names_in_order(tmp_path):
    names = ["b/2.TIFF", "a.png", "b/10.jpg", "c/d/e.gif", "z.webp", "y.bmp"]
    others = ["a.txt", "png", "._a.png", "b/.hidden.jpg"]
    for name in names + others:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "folder.png").mkdir()
    assert image_files.find(tmp_path) == sorted(tmp_path / name for name in names)
    with pytest.raises(FileNotFoundError, match="none"):
        image_files.find(tmp_path / "none")
