"""A user's images, read as people see them."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ipr_jax.runtime import files

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
"""What the names of images end with."""
ENDS = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}
"""The last bytes of whole files, by format."""
BITS = 258
"""The tag of a TIFF file that tells how many bits a gray value has."""
PHOTOMETRIC = 262
"""The tag of a TIFF file that is 0 where white is 0, and 1 where black is."""


def find(folder: str | os.PathLike[str]) -> list[Path]:
    """The images of a folder and its subfolders by their names, in order; hidden ones are left out.

    Raises:
        OSError: a folder cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise error

    return sorted(
        Path(place, name)
        for place, _, names in os.walk(folder, onerror=refuse)
        for name in names
        if name.lower().endswith(SUFFIXES) and not name.startswith(".")
    )


def check(path: Path) -> None:
    """Refuse a file that ``read`` refuses, without reading all of it where that is not needed.

    JPEG and PNG images that end as they should are opened only: their size and their form are then
    known to be sound, but not every pixel. All others are read.

    Raises:
        ValueError: as ``read``.
    """
    with _open(path) as (image, file):
        end = ENDS.get(image.format or "", b"")
        file.seek(-len(end), os.SEEK_END)
        whole = file.read() == end != b""
    if not whole:
        read(path)


def read(path: Path) -> Image.Image:
    """Read an image as people see it, in RGB.

    It is upright, by its EXIF orientation, and the first one of several in a file. What is
    transparent lies on white. Gray values of 16 bits, or 12, are white at the largest number of so
    many bits; floats are black at 0 and white at 1, as viewers show them. Whole numbers of 32 bits
    or with a sign, and floats that are not in 0..1, tell nobody what is black and what is white:
    they are refused. Colour profiles are left aside.

    Raises:
        ValueError: it is no image, damaged, too large for Pillow's limit, or its black and white
            are not known; one line that names the file.
    """
    with _open(path) as (image, _):
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode == "F" or image.mode.startswith("I"):
            return Image.fromarray(_gray(image)).convert("RGB")
        if image.has_transparency_data:
            shown = image.convert("RGBA")
            white = Image.new("RGBA", shown.size, "white")
            return Image.alpha_composite(white, shown).convert("RGB")
        return image.convert("RGB")


@contextlib.contextmanager
def _open(path: Path) -> Iterator[tuple[Image.Image, BinaryIO]]:
    """An image whose pixels are not read yet, and its file; whatever is raised names the path.

    Not by its path: Pillow would map it into memory, and scramble what is not upright.
    """
    with files.refusing(path, "an image", "image"), path.open("rb") as file:
        try:
            image = Image.open(file)
        except UnidentifiedImageError:
            raise ValueError("it is damaged or of no kind that Pillow reads") from None
        with image:
            yield image, file


def _gray(image: Image.Image) -> np.ndarray:
    """Gray values that are not of 8 bits: uint8 [H, W]."""
    if image.mode == "I":
        raise ValueError("its gray values are of 32 bits or have a sign, they must be of 8 or 16")
    tags = getattr(image, "tag_v2", {})
    white = 1 if image.mode == "F" else 2 ** tags.get(BITS, (16,))[0] - 1
    values = np.asarray(image, np.float32)
    if not ((values >= 0) & (values <= white)).all():
        raise ValueError(
            f"its gray values must be in 0..{white}, got {values.min()}..{values.max()}"
        )
    gray = np.rint(values * (255 / white)).astype(np.uint8)
    if tags.get(PHOTOMETRIC) == 0:
        gray = 255 - gray
    return np.where(values == image.info.get("transparency"), np.uint8(255), gray)
