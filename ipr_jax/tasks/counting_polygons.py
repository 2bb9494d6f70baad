"""Counting Polygons and Counting Stars: equal objects on a photograph, and their two numbers.

An image shows 1 to 9 objects, all with equally many vertices (points, for stars), the number of
objects and the number of vertices, as digits, all in one colour and without touching. Nothing is
given: the model makes up the photograph, the objects and the numbers.

Shapes: B samples, [B, H, W, C] = [B, 128, 128, 3] images in [-1, 1], [B, h, w] = [B, 16, 16]
patches, N objects of K corners. Positions are (x, y) in pixels from the top left corner.

Source: Wewer et al., Spatial Reasoning with Denoising Models, arXiv 2502.21075, whose images differ
in three things. Their circles come from a file that is not documented; here they are drawn anew,
with radii as in the published examples and two pixels apart. Their digits are Roboto, the top left
corner in the middle of the circle; here they are DejaVu Sans, which comes with matplotlib, in the
middle. Their photographs are FFHQ; here a folder of any images, or two that scikit-learn has.
"""

import colorsys
import functools
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import distribution
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from ipr_jax.runtime import files
from ipr_jax.tasks import image_files
from ipr_jax.tasks.base import Batch, Split, Task, generators
from ipr_jax.tasks.locality import gaussian_locality
from ipr_jax.tasks.polygon_classifier import MAX_POLYGONS, Counts, PolygonConfig

SIDE = 128
PATCH_SIZE = 8
IMAGE_SHAPE = (SIDE, SIDE, 3)
SUPERSAMPLING = 4
"""Objects and digits are drawn this much larger and then reduced."""

RADII = (0.08 * SIDE, 0.16 * SIDE)
"""Least and largest radius of the circle around an object or a digit."""
GAP = 2.0
"""Least distance between two such circles."""
NUM_TRIALS = 64
"""Positions tried for a circle before all of them are drawn anew."""

SATURATION = 1.0
VALUE = 0.9
HUE_BLUR = 26
"""Standard deviation of the blur of the background's hue histogram, in its 256 bins."""

TEST_FRACTION = 0.05
"""Of a folder of backgrounds: the last ones in the order of their names."""
FIRST_TRAINING_COLUMN = 256
"""Of the bundled photographs, 427 pixels high and 640 wide: test crops lie to the left of it."""
CROP_SIDES = (128, 192)
"""Least and largest side of a crop of them."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """What is counted.

    Attributes:
        counts: fewest and most vertices; the configuration of the classifier.
        inner_radius: of stars, as a fraction of the outer one; None for polygons.

    Raises:
        ValueError: a count is not one digit, an object has no area, or the radius is not in (0, 1).
    """

    counts: PolygonConfig
    inner_radius: float | None

    def __post_init__(self) -> None:
        if self.counts.max_vertices > 9:
            raise ValueError(
                f"max_vertices must be one digit, at most 9, got {self.counts.max_vertices}"
            )
        least = 3 if self.inner_radius is None else 2
        if self.counts.min_vertices < least:
            raise ValueError(
                f"min_vertices must be at least 3 for polygons and 2 for stars, "
                f"got {self.counts.min_vertices}"
            )
        if self.inner_radius is not None and not 0 < self.inner_radius < 1:
            raise ValueError(f"inner_radius must be in (0, 1) or None, got {self.inner_radius}")


POLYGONS = Variant(counts=PolygonConfig(), inner_radius=None)
STARS = Variant(counts=PolygonConfig(min_vertices=2, max_vertices=9), inner_radius=0.1)
VARIANTS: dict[str, Variant] = {"polygons": POLYGONS, "stars": STARS}
"""The published variants by name."""


def get_variant(name: str) -> Variant:
    """The variant of a name.

    Raises:
        ValueError: unknown; lists the known ones.
    """
    if name not in VARIANTS:
        raise ValueError(f"unknown variant {name!r}; known: {sorted(VARIANTS)}")
    return VARIANTS[name]


class Scene(NamedTuple):
    """Where everything is in an image.

    Attributes:
        objects: float64 [N, K, 2], corners in order; K = vertices, for stars twice as many, the
            outer ones at even positions.
        circles: float64 [N + 2, 3], x, y and radius of the disjoint circles around the objects, the
            number of objects and the number of vertices.
        digits: float64 [2, 4], left, top, right and bottom of the ink of these two numbers.
        label: int32 [2], the two numbers.
    """

    objects: np.ndarray
    circles: np.ndarray
    digits: np.ndarray
    label: np.ndarray


# --- data -----------------------------------------------------------------------------------------


def batch(
    variant: Variant,
    split: Split,
    seed: int,
    indices: np.ndarray,
    backgrounds: str | os.PathLike[str] | None = None,
) -> Batch:
    """Draw images, each a function of (variant, split, seed, its index) and backgrounds alone.

    The numbers of objects and of vertices are uniform and independent. The colour is the hue that
    is rarest in the background, with saturation 1 and value 0.9. ``label`` is int32 [B, 2], the
    number of objects and the number of vertices.

    Args:
        variant: ``POLYGONS``, ``STARS`` or one's own.
        split: "train" or "test". They share no background: a folder's last 5% are for tests, and
            the left parts of the bundled photographs. In training, half of them are mirrored.
        seed: int >= 0.
        indices: int [B], each >= 0; equal indices give equal rows, whatever else is in the batch.
        backgrounds: folder of photographs (FFHQ in the paper), searched with its subfolders, read
            by ``image_files.read``, and scaled and cropped to a centred square; None = crops of the
            two photographs that come with scikit-learn, all hues rotated by a random angle.

    Raises:
        ValueError: ``split``, ``seed`` or ``indices`` is out of its range, ``backgrounds`` has
            fewer than 2 images or one that cannot be read.
    """
    scene_rngs = generators(seed, split, indices)
    background_rngs = generators(seed, split, indices, stream=1)
    images = np.empty((len(indices), *IMAGE_SHAPE), np.float32)
    label = np.empty((len(indices), 2), np.int32)
    for row, rngs in enumerate(zip(scene_rngs, background_rngs, strict=True)):
        scene = _draw_scene(variant, rngs[0])
        background = _draw_background(split, rngs[1], backgrounds)
        background.paste(rarest_color(background), mask=_render(scene))
        images[row], label[row] = np.asarray(background), scene.label
    images /= 255 / 2
    images -= 1
    grid = (SIDE // PATCH_SIZE, SIDE // PATCH_SIZE)
    return Batch(image=images, editable=np.ones((len(indices), *grid), bool), label=label)


def get_scene(variant: Variant, split: Split, seed: int, index: int) -> Scene:
    """Where everything is in the image that ``batch`` gives for the same arguments.

    Raises:
        ValueError: ``split``, ``seed`` or ``index`` is out of its range.
    """
    return _draw_scene(variant, next(generators(seed, split, np.array([index]))))


def rarest_color(background: Image.Image) -> tuple[int, int, int]:
    """The colour whose hue is rarest in an image, by its histogram blurred around the wheel."""
    from scipy.ndimage import gaussian_filter1d

    histogram = np.array(background.convert("HSV").getchannel("H").histogram(), np.float64)
    blurred = gaussian_filter1d(histogram, HUE_BLUR, mode="wrap", radius=127)
    red, green, blue = colorsys.hsv_to_rgb(blurred.argmin() / 255, SATURATION, VALUE)
    return int(red * 255), int(green * 255), int(blue * 255)


# --- objects and numbers --------------------------------------------------------------------------


def _draw_scene(variant: Variant, rng: np.random.Generator) -> Scene:
    counts = variant.counts
    num_objects = int(rng.integers(1, MAX_POLYGONS, endpoint=True))
    num_vertices = int(rng.integers(counts.min_vertices, counts.max_vertices, endpoint=True))
    label = np.array([num_objects, num_vertices], np.int32)
    circles = rng.permutation(_place_circles(num_objects + 2, rng))
    rotation = rng.uniform(0, 2 * np.pi, num_objects)
    digits = [_digit_box(*pair) for pair in zip(circles[num_objects:], label, strict=True)]
    return Scene(
        objects=_corners(circles[:num_objects], rotation, num_vertices, variant.inner_radius),
        circles=circles,
        digits=np.array(digits),
        label=label,
    )


def _corners(
    circles: np.ndarray, rotation: np.ndarray, num_vertices: int, inner_radius: float | None
) -> np.ndarray:
    """Corners of objects in circles [N, 3], turned by angles [N]: float64 [N, K, 2]."""
    radii = np.tile([1.0] if inner_radius is None else [1.0, inner_radius], num_vertices)
    angles = rotation[:, None] + 2 * np.pi * np.arange(len(radii)) / len(radii)
    offsets = radii[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=-1)
    return circles[:, None, :2] + circles[:, None, 2:] * offsets


def _place_circles(number: int, rng: np.random.Generator) -> np.ndarray:
    """Draw disjoint circles inside the image, largest first: float64 [number, 3], x, y, radius.

    Radii and positions are uniform, but for what does not fit: where no position that is tried
    for a circle is free, all are drawn anew.
    """
    while True:
        radii = np.sort(rng.uniform(*RADII, number))[::-1]
        placed = np.empty((0, 3))
        for radius in radii:
            trials = rng.uniform(radius, SIDE - radius, (NUM_TRIALS, 2))
            distances = np.linalg.norm(trials[:, None] - placed[:, :2], axis=2)
            free = (distances >= placed[:, 2] + radius + GAP).all(axis=1)
            if not free.any():
                break
            placed = np.vstack([placed, [*trials[free.argmax()], radius]])
        else:
            return placed


@functools.cache
def _digit(number: int, size: int) -> Image.Image:
    """A digit in DejaVu Sans with lines ``size`` pixels high, cropped to its ink: 0 to 255."""
    # Found without importing matplotlib, which fails where MPLBACKEND names what is not installed.
    path = distribution("matplotlib").locate_file("matplotlib/mpl-data/fonts/ttf/DejaVuSans.ttf")
    font = ImageFont.truetype(str(path), size, layout_engine=ImageFont.Layout.BASIC)
    image = Image.new("L", (2 * size, 2 * size))
    ImageDraw.Draw(image).text((size // 2, 0), str(number), fill=255, font=font)
    return image.crop(image.getbbox())


def _digit_in(circle: np.ndarray, number: int) -> Image.Image:
    """The digit for a circle [3]: its radius is the height of a line."""
    return _digit(int(number), int(circle[2] * SUPERSAMPLING))


def _digit_box(circle: np.ndarray, number: int) -> np.ndarray:
    """The box of a digit in the middle of a circle [3]: float64 [4]."""
    size = np.array(_digit_in(circle, number).size)
    corner = np.round(circle[:2] * SUPERSAMPLING - size / 2)
    return np.concatenate([corner, corner + size]) / SUPERSAMPLING


def _render(scene: Scene) -> Image.Image:
    """Where the objects and the numbers are: an image of 0 to 255."""
    large = Image.new("L", (SIDE * SUPERSAMPLING, SIDE * SUPERSAMPLING))
    draw = ImageDraw.Draw(large)
    for corners in scene.objects * SUPERSAMPLING:
        draw.polygon(corners.ravel().tolist(), fill=255)
    for circle, number, box in zip(scene.circles[-2:], scene.label, scene.digits, strict=True):
        left, top, _, _ = (box * SUPERSAMPLING).astype(int)
        large.paste(_digit_in(circle, number), (left, top))
    return large.resize((SIDE, SIDE), Image.Resampling.BICUBIC)


# --- backgrounds ----------------------------------------------------------------------------------


def _draw_background(
    split: Split, rng: np.random.Generator, folder: str | os.PathLike[str] | None
) -> Image.Image:
    if folder is None:
        photographs = _photographs(split)
        image = _vary(photographs[rng.integers(len(photographs))], rng)
    else:
        paths = _paths(Path(folder))
        num_test = max(1, int(TEST_FRACTION * len(paths)))
        paths = paths[-num_test:] if split == "test" else paths[:-num_test]
        image = _read(paths[rng.integers(len(paths))])
    return ImageOps.mirror(image) if split == "train" and rng.random() < 0.5 else image


@functools.cache
def _photographs(split: Split) -> list[Image.Image]:
    from sklearn.datasets import load_sample_images

    start, stop = (FIRST_TRAINING_COLUMN, None) if split == "train" else (0, FIRST_TRAINING_COLUMN)
    return [Image.fromarray(image[:, start:stop]) for image in load_sample_images().images]


def _vary(photograph: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Crop a photograph at random and turn its hues by a random angle."""
    side = rng.integers(*CROP_SIDES, endpoint=True)
    left, top = rng.integers(0, np.array(photograph.size) - side, endpoint=True)
    box = (left, top, left + side, top + side)
    crop = photograph.resize((SIDE, SIDE), Image.Resampling.BICUBIC, box=box)
    hue, saturation, value = crop.convert("HSV").split()
    hue = hue.point(np.roll(np.arange(256), rng.integers(256)).tolist())
    return Image.merge("HSV", (hue, saturation, value)).convert("RGB")


@functools.cache
def _paths(folder: Path) -> list[Path]:
    paths = image_files.find(folder) if folder.is_dir() else []
    if len(paths) < 2:
        raise ValueError(
            f"backgrounds must be a folder with at least 2 images "
            f"({', '.join(image_files.SUFFIXES)}), found {len(paths)}: {files.contents(folder)}"
        )
    return paths


def _read(path: Path) -> Image.Image:
    return ImageOps.fit(image_files.read(path), (SIDE, SIDE), Image.Resampling.BICUBIC)


# --- scores ---------------------------------------------------------------------------------------


def scores(images: jax.Array, classify: Callable[[jax.Array], Counts]) -> dict[str, jax.Array]:
    """Score images by what a classifier counts in them. Jittable, for a given ``classify``.

    Args:
        images: float [B, 128, 128, 3] in [-1, 1].
        classify: images -> ``Counts``, as ``polygon_classifier`` gives them.

    Returns:
        consistent: bool [B], the two numbers stated are those counted, in either order.
        uniform: bool [B], all objects have equally many vertices.
        num_polygons: int32 [B], objects counted.
        num_vertices: int32 [B], vertices counted, points for stars.
        stated: int32 [B, 2], the numbers stated.

    Raises:
        ValueError: if the images have another shape.
    """
    if images.ndim != 4 or images.shape[1:] != IMAGE_SHAPE:
        raise ValueError(f"images must have shape [B, 128, 128, 3], got {images.shape}")
    seen = classify(images)
    counted = jnp.stack([seen.num_polygons, seen.num_vertices], axis=1)
    return {
        "consistent": (jnp.sort(counted, axis=1) == jnp.sort(seen.stated, axis=1)).all(axis=1),
        "uniform": seen.is_uniform,
        "num_polygons": seen.num_polygons,
        "num_vertices": seen.num_vertices,
        "stated": seen.stated,
    }


def read(images: jax.Array, classify: Callable[[jax.Array], Counts]) -> jax.Array:
    """What ``scores`` compares: the numbers counted and stated, and if all objects are alike.

    Returns:
        int32 [B, 5].
    """
    seen = classify(images)
    alike = seen.is_uniform.astype(jnp.int32)
    return jnp.column_stack([seen.num_polygons, seen.num_vertices, seen.stated, alike])


def describe(found: Mapping[str, np.ndarray], corners: str) -> list[str]:
    """The numbers that images state and those counted: "says 3, 5: 3 x 5 corners".

    Args:
        found: what ``scores`` gives for B images.
        corners: what the vertices are called.

    Returns:
        B texts; where the objects differ, "says 3, 5: 3 x 5, unequal".
    """
    names = ("stated", "num_polygons", "num_vertices", "uniform")
    return [
        f"says {first}, {second}: {objects} x {vertices}{f' {corners}' if uniform else ', unequal'}"
        for (first, second), objects, vertices, uniform in zip(
            *(found[name].tolist() for name in names), strict=True
        )
    ]


def make(
    variant: str,
    classify: Callable[[jax.Array], Counts],
    backgrounds: str | os.PathLike[str] | None = None,
) -> Task:
    """The task of a variant; nothing is given: every image is generated from noise.

    Args:
        variant: "polygons" or "stars".
        classify: images -> ``Counts``, as ``polygon_classifier`` gives them.
        backgrounds: as for ``batch``. Every image is checked now, by ``image_files.check``:
            100,000 of 128x128 in JPEG or PNG take 4 s on a CPU core, from a fast disk.

    Raises:
        ValueError: no such variant, or ``backgrounds`` has fewer than 2 images or one that cannot
            be read.
    """
    of_variant = functools.partial(batch, get_variant(variant))
    for path in _paths(Path(backgrounds)) if backgrounds is not None else ():
        image_files.check(path)
    return Task(
        name=f"counting-{variant}",
        image_shape=IMAGE_SHAPE,
        patch_size=PATCH_SIZE,
        training_batch=functools.partial(of_variant, "train", backgrounds=backgrounds),
        test_batch=functools.partial(of_variant, "test", backgrounds=backgrounds),
        score=functools.partial(scores, classify=classify),
        read=functools.partial(read, classify=classify),
        rates=("consistent", "uniform"),
        dependencies=gaussian_locality(SIDE // PATCH_SIZE, SIDE // PATCH_SIZE),
        describe=functools.partial(
            describe, corners="corners" if get_variant(variant).inner_radius is None else "points"
        ),
    )
