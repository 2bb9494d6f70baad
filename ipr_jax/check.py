"""Input checks of the public functions, on the host, before anything is compiled."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

IMAGE_RANGE = 1.0
"""Images are in [-1, 1]."""
SAMPLE_RANGE = 4.0
"""Generated pixels are not clipped and overshoot; beyond this they are no image in [-1, 1]."""


ArrayLike = jax.Array | np.ndarray


def batch(keys: jax.Array, image: ArrayLike, editable: ArrayLike) -> None:
    """Refuse keys, images and masks whose dtypes or shapes do not belong together.

    Raises:
        ValueError: names what is wrong and what would be valid.
    """
    if image.ndim != 4 or image.dtype != jnp.float32:
        raise ValueError(
            f"image must be float32 [B, H, W, C], got {image.dtype} {list(image.shape)}"
        )
    if editable.ndim != 3 or editable.dtype != jnp.bool_:
        raise ValueError(
            f"editable must be bool [B, h, w], got {editable.dtype} {list(editable.shape)}"
        )
    size = image.shape[0]
    if not jnp.issubdtype(keys.dtype, jax.dtypes.prng_key) or keys.shape != (size,):
        raise ValueError(
            f"keys must be a key array [{size}], one per image, from sample_keys; "
            f"got {keys.dtype} {list(keys.shape)}"
        )
    _, height, width, _ = image.shape
    _, h, w = editable.shape
    square = h and w and height % h == 0 and width % w == 0 and height // h == width // w
    if editable.shape[0] != size or not square:
        raise ValueError(
            f"editable must be [{size}, h, w] over a grid of square patches of the "
            f"{height}x{width} images, got {list(editable.shape)}"
        )


def clues(image: ArrayLike, editable: ArrayLike) -> None:
    """Refuse clue pixels that are not in [-1, 1].

    Raises:
        ValueError: gives the worst value and its sample.
    """
    _within(image, ~np.asarray(editable), IMAGE_RANGE, "clue pixels must be in [-1, 1]")


def samples(image: ArrayLike, editable: ArrayLike) -> None:
    """Refuse generated pixels that cannot come from images in [-1, 1].

    Raises:
        ValueError: gives the worst value and its sample.
    """
    rule = f"pixels must be in [-1, 1] (generated ones may overshoot to {SAMPLE_RANGE:g})"
    _within(image, np.asarray(editable), SAMPLE_RANGE, rule)


def _within(image: ArrayLike, where: np.ndarray, limit: float, rule: str) -> None:
    if isinstance(image, Tracer):
        return
    patch = image.shape[1] // where.shape[1]
    pixels = np.kron(where, np.ones((1, patch, patch), bool))[..., None]
    excess = np.where(pixels, np.abs(np.asarray(image)), 0)
    bad = ~(excess <= limit)
    if bad.any():
        sample, row, column, channel = np.argwhere(bad)[0]
        value = np.asarray(image)[sample, row, column, channel]
        raise ValueError(f"{rule}, got {value} in sample {sample} at row {row}, column {column}")


def as_pytree(function: Callable[..., Any]) -> Callable[..., Any]:
    """A callable that can be an argument of a compiled function.

    NNX modules and other pytrees pass; any other callable becomes a constant of the program.
    """
    leaf_only = jax.tree.leaves(function) == [function]
    return jax.tree_util.Partial(function) if leaf_only else function
