"""Input checks, on the host, before anything is compiled or written."""

import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from ipr_jax import patches

IMAGE_RANGE = 1.0
"""Images are in [-1, 1]."""
SAMPLE_RANGE = 4.0
"""Generated pixels are not clipped and overshoot; beyond this they are no image in [-1, 1]."""

ArrayLike = jax.Array | np.ndarray


def count(name: str, value: Any, least: int = 1, *, auto: bool = False) -> None:
    """Refuse what is not a whole number of at least ``least``, nor "auto" where that may be.

    Raises:
        ValueError: names the value and the range.
    """
    if auto and value == "auto":
        return
    or_auto = ' or "auto"' if auto else ""
    try:
        valid = operator.index(value) >= least and not isinstance(value, bool)
    except TypeError:
        valid = False
    if not valid:
        raise ValueError(f"{name} must be a whole number of at least {least}{or_auto}, got {value}")


def seed(value: Any) -> None:
    """Refuse what is no seed of a random key: a whole number in [0, 2**32).

    Raises:
        ValueError: names the value and the range.
    """
    count("seed", value, least=0)
    if value >= 2**32:
        raise ValueError(f"seed must be below {2**32}, got {value}")


def model_inputs(config: Any, z: jax.Array, t: jax.Array) -> None:
    """Refuse noisy images or levels that are not of a model's shape.

    Args:
        config: of the model, with an ``image_shape`` and a ``grid``.
        z: [B, H, W, C].
        t: [B, h, w].

    Raises:
        ValueError: names the shape that is needed and the one that was given.
    """
    for name, array, shape in (
        ("images", z, config.image_shape),
        ("the patch grid", t, config.grid),
    ):
        same_rows(name, array, shape, z.shape[0])


def same_rows(name: str, array: jax.Array, shape: tuple[int, ...], batch: int) -> None:
    """Refuse an array that is not of a shape [B, ...] that a model needs.

    Raises:
        ValueError: names the shape that is needed and the one that was given.
    """
    if array.shape != (batch, *shape):
        raise ValueError(
            f"{name} must be [B, {', '.join(map(str, shape))}] for this model, "
            f"got {list(array.shape)}"
        )


def batch(keys: jax.Array, image: ArrayLike, editable: ArrayLike) -> None:
    """Refuse keys, images and masks whose dtypes or shapes do not belong together.

    Raises:
        ValueError: names what is wrong and what would be valid.
    """
    grid(image, editable)
    size = image.shape[0]
    if not jnp.issubdtype(keys.dtype, jax.dtypes.prng_key) or keys.shape != (size,):
        raise ValueError(
            f"keys must be a key array [{size}], one per image, from sample_keys; "
            f"got {keys.dtype} {list(keys.shape)}"
        )


def grid(image: ArrayLike, editable: ArrayLike) -> None:
    """Refuse images and masks whose dtypes or shapes do not belong together.

    Raises:
        ValueError: names what is wrong and what would be valid.
    """
    if image.ndim != 4 or image.dtype != jnp.float32 or not image.shape[0]:
        raise ValueError(
            f"image must be float32 [B, H, W, C], B at least 1, "
            f"got {image.dtype} {list(image.shape)}"
        )
    if editable.ndim != 3 or editable.dtype != jnp.bool_:
        raise ValueError(
            f"editable must be bool [B, h, w], got {editable.dtype} {list(editable.shape)}"
        )
    size, height, width, _ = image.shape
    _, h, w = editable.shape
    square = h and w and height % h == 0 and width % w == 0 and height // h == width // w
    if editable.shape[0] != size or not square:
        raise ValueError(
            f"editable must be [{size}, h, w] over a grid of square patches of the "
            f"{height}x{width} images, got {list(editable.shape)}"
        )


def clues(image: ArrayLike, editable: ArrayLike) -> None:
    """Refuse clue pixels that are not in [-1, 1]; traced arrays pass.

    Raises:
        ValueError: gives the worst value and its sample.
    """
    _within(image, editable, False, IMAGE_RANGE, "clue pixels must be in [-1, 1]")


def samples(image: ArrayLike, editable: ArrayLike) -> None:
    """Refuse generated pixels that cannot come from images in [-1, 1]; traced arrays pass.

    Raises:
        ValueError: gives the worst value and its sample.
    """
    rule = f"pixels must be in [-1, 1] (generated ones may overshoot to {SAMPLE_RANGE:g})"
    _within(image, editable, True, SAMPLE_RANGE, rule)


@jax.jit
def _worst(image: jax.Array, editable: jax.Array, where: jax.Array) -> jax.Array:
    """The largest magnitude of each sample where its mask is so, nan if there is one: [B]."""
    pixels = patches.expand(editable == where, image.shape[1] // editable.shape[1])
    return jnp.max(jnp.where(pixels, jnp.abs(image), 0), axis=(1, 2, 3))


def _within(image: ArrayLike, editable: ArrayLike, where: bool, limit: float, rule: str) -> None:
    """Refuse pixels beyond a limit in the patches whose mask is ``where``."""
    if isinstance(image, Tracer) or isinstance(editable, Tracer):
        return
    worst = np.asarray(_worst(image, editable, where))
    bad = np.flatnonzero(~(worst <= limit))
    if len(bad):
        raise ValueError(f"{rule}, got a magnitude of {worst[bad[0]]} in sample {bad[0]}")


def as_pytree(function: Callable[..., Any]) -> Callable[..., Any]:
    """A callable that can be an argument of a compiled function.

    NNX modules and other pytrees pass; any other callable becomes a constant of the program.
    """
    opaque = jax.tree_util.all_leaves([function])
    return jax.tree_util.Partial(function) if opaque else function
