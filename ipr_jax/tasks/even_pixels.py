"""Even Pixels: images of two opposite hues, each on exactly half of the pixels.

Shapes: B samples, [B, H, W, C] = [B, 32, 32, 3] images in [-1, 1], [B, h, w] = [B, 8, 8] patches,
all of them editable: nothing is given.

Source: Wewer et al., Spatial Reasoning with Denoising Models, arXiv 2502.21075.
"""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ipr_jax.tasks.base import Batch, Split, Task, generators
from ipr_jax.tasks.locality import gaussian_locality

SIDE = 32
PATCH_SIZE = 4
IMAGE_SHAPE = (SIDE, SIDE, 3)
NUM_PIXELS = SIDE * SIDE
SATURATION = 255
VALUE = 178
"""Saturation 1 and value 0.7 in 8 bits, rounded down."""
NUM_OFFSETS = 255
"""Pairs of opposite hues that 8 bits can tell apart."""
NUM_BINS = 256
"""Of the hue histogram of the published score."""


def batch(split: Split, seed: int, indices: np.ndarray) -> Batch:
    """Draw images, each a function of (split, seed, its index) alone.

    The pair of hues is uniform over the 255 of ``color_pairs``, the set of the 512 pixels that
    have its second colour uniform over all such sets. ``label`` is the pair, int32 [B] in 0..254.

    Args:
        split: "train" or "test", apart in their random numbers only.
        seed: int >= 0.
        indices: int [B], each >= 0; equal indices give equal rows, whatever else is in the batch.

    Raises:
        ValueError: if ``split``, ``seed`` or ``indices`` is out of its range.
    """
    rngs = generators(seed, split, indices)
    draws = np.empty((len(indices), 1 + NUM_PIXELS))
    for row, rng in zip(draws, rngs, strict=True):
        rng.random(out=row)
    pair = (draws[:, 0] * NUM_OFFSETS).astype(np.int32)
    second = np.zeros((len(pair), NUM_PIXELS), np.int8)
    chosen = draws[:, 1:].argpartition(NUM_PIXELS // 2, axis=1)[:, : NUM_PIXELS // 2]
    np.put_along_axis(second, chosen, 1, axis=1)
    return Batch(
        image=color_pairs()[pair[:, None], second].reshape(-1, *IMAGE_SHAPE),
        editable=np.ones((len(pair), SIDE // PATCH_SIZE, SIDE // PATCH_SIZE), bool),
        label=pair,
    )


@functools.cache
def color_pairs() -> np.ndarray:
    """The pairs of opposite colours: float32 [255, 2, 3] in [-1, 1], read-only.

    The data set draws an offset in [0, 0.5), takes it and itself plus 0.5 as hues and rounds both
    down to 255ths, for Pillow to make the colours. Rounding leaves 255 pairs, equally likely: with
    k the offset in 510ths, rounded down, the hues are floor(k / 2) and floor((k + 255) / 2).
    """
    from PIL import Image

    k = np.arange(NUM_OFFSETS)
    hue = np.stack([k // 2, (k + 255) // 2], axis=1).astype(np.uint8)
    channels = [hue, np.full_like(hue, SATURATION), np.full_like(hue, VALUE)]
    rgb = Image.merge("HSV", [Image.fromarray(channel) for channel in channels]).convert("RGB")
    colors = np.asarray(rgb, np.float32) / 255 * 2 - 1
    colors.setflags(write=False)
    return colors


def scores(images: jax.Array) -> dict[str, jax.Array]:
    """Score images as the benchmark does. Jittable.

    The wheel of hues is cut into two halves, one of them centred on the most frequent bin of the
    hue histogram: the published borders lie midway between that peak and the opposite one. Colours
    are told apart by that cut alone, and a grey pixel has hue 0, so an image may be balanced and
    far from two colours; the other two scores say so.

    Args:
        images: float [B, 32, 32, 3]; clipped to [-1, 1].

    Returns:
        balanced: bool [B], either half has exactly 512 pixels.
        imbalance: int32 [B] in 0..512, the pixels that a half has too many or too few.
        saturation_std: float32 [B], over the pixels; 0 in the data.
        value_std: float32 [B], over the pixels; 0 in the data.

    Raises:
        ValueError: if the images have another shape.
    """
    if images.ndim != 4 or images.shape[1:] != IMAGE_SHAPE:
        raise ValueError(f"images must have shape [B, 32, 32, 3], got {images.shape}")
    images = jnp.asarray(images, jnp.float32)
    hue, saturation, value = rgb_to_hsv(((images + 1) / 2).clip(0, 1))
    # The last bin has its right edge; a hue just below 0 is rounded up to it.
    bins = (hue * NUM_BINS).astype(jnp.int32).clip(0, NUM_BINS - 1).reshape(-1, NUM_PIXELS)
    histogram = jax.vmap(functools.partial(jnp.bincount, length=NUM_BINS))(bins)
    peak = histogram.argmax(axis=1, keepdims=True).astype(jnp.int32)
    near_peak = (bins - peak + NUM_BINS // 4) % NUM_BINS < NUM_BINS // 2
    imbalance = jnp.abs(near_peak.sum(axis=1, dtype=jnp.int32) - NUM_PIXELS // 2)
    return {
        "balanced": imbalance == 0,
        "imbalance": imbalance,
        "saturation_std": _std(saturation),
        "value_std": _std(value),
    }


def describe(found: Mapping[str, np.ndarray]) -> list[str]:
    """How many pixels have the rarer hue and the other one, such as "500 : 524 pixels".

    Args:
        found: what ``scores`` gives for B images.

    Returns:
        B texts.
    """
    half = NUM_PIXELS // 2
    return [f"{half - each} : {half + each} pixels" for each in found["imbalance"].tolist()]


def rgb_to_hsv(rgb: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Convert colours bit for bit as matplotlib does in float32, where division is exact. Jittable.

    Args:
        rgb: float32 [..., 3] in [0, 1].

    Returns:
        hue, saturation, value: float32 [...] in [0, 1]; hue and saturation 0 where there is none.
    """
    red, green, blue = rgb[..., 0], rgb[..., 1], rgb[..., 2]
    value = rgb.max(axis=-1)
    delta = value - rgb.min(axis=-1)
    divisor = jnp.where(delta > 0, delta, 1)
    sextant = jnp.select(  # of equal largest channels the last one counts
        [delta == 0, blue == value, green == value],
        [0.0, 4 + (red - green) / divisor, 2 + (blue - red) / divisor],
        (green - blue) / divisor,
    )
    # One divisor for all would be compiled to a product with its reciprocal, rounded otherwise.
    six = lax.optimization_barrier(jnp.full_like(sextant, 6))
    hue = jnp.mod(sextant / six, 1.0)
    return hue, delta / jnp.where(value > 0, value, 1), value


def _std(channel: jax.Array) -> jax.Array:
    """Standard deviation over the pixels of [B, 32, 32], from the first one on: 0 if all equal."""
    return (channel - channel[:, :1, :1]).std(axis=(1, 2))


TASK = Task(
    name="even-pixels",
    image_shape=IMAGE_SHAPE,
    patch_size=PATCH_SIZE,
    training_batch=functools.partial(batch, "train"),
    test_batch=functools.partial(batch, "test"),
    score=scores,
    rates=("balanced",),
    dependencies=gaussian_locality(SIDE // PATCH_SIZE, SIDE // PATCH_SIZE),
    means={"imbalance": NUM_PIXELS // 2, "saturation_std": 0.5, "value_std": 0.5},
    describe=describe,
)
"""Nothing is given: every image is generated from noise."""
