"""Input checks, on the host, before anything is compiled or written.

What is traced has no value yet: its shape and dtype are checked, its values pass.
"""

import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from ipr_jax.core import patches

IMAGE_RANGE = 1.0
"""Images are in [-1, 1]; pixels that were generated are not clipped and overshoot."""

ArrayLike = jax.Array | np.ndarray


def is_array(value: Any) -> bool:
    """Whether a value is an array of NumPy or JAX, traced or not."""
    return isinstance(value, jax.Array | np.ndarray)


def told(value: Any) -> str:
    """What an error says of a value: an array's dtype and shape, what is short, or its type."""
    if is_array(value) and (value.ndim or isinstance(value, Tracer)):
        return f"{value.dtype} {list(value.shape)}"
    if value is None or isinstance(value, str):
        return repr(value)
    if is_array(value) or isinstance(value, bool | int | float | np.generic):
        return str(value)
    return getattr(value, "__name__", f"a {type(value).__name__}")


def count(
    name: str,
    value: Any,
    least: int = 1,
    *,
    below: int = 2**31,
    auto: bool = False,
    traced: bool = False,
) -> Any:
    """Refuse what is not a whole number in [least, below), nor "auto" where that may be.

    Args:
        name: what the error calls it.
        value: of it.
        least: the smallest.
        below: above the largest; programs count in int32.
        auto: whether "auto" is valid, too.
        traced: whether a traced scalar is, which is not compared.

    Returns:
        The value, as an int unless it is "auto" or traced.

    Raises:
        ValueError: names the value and the range.
    """
    if auto and isinstance(value, str) and value == "auto":
        return value
    or_auto = ' or "auto"' if auto else ""
    rule = f"a whole number of at least {least}{or_auto}"
    if _traced(name, value, jnp.integer, rule, traced):
        return value
    try:
        whole = operator.index(value)  # pyright: ignore[reportArgumentType]
    except TypeError:
        whole = least - 1
    if whole < least or isinstance(value, bool):
        raise ValueError(f"{name} must be {rule}, got {told(value)}")
    if whole >= below:
        raise ValueError(f"{name} must be below {below}, got {whole}")
    return whole


def seed(value: Any) -> None:
    """Refuse what is no seed of a random key: a whole number in [0, 2**32).

    Raises:
        ValueError: names the value and the range.
    """
    count("seed", value, least=0, below=2**32)


def number(
    name: str, value: Any, valid: Callable[[Any], bool], rule: str, *, traced: bool = False
) -> None:
    """Refuse what is not a number of some range.

    Args:
        name: what the error calls it.
        value: of it.
        valid: whether a number is in the range.
        rule: the range, after "must be".
        traced: whether a traced scalar is valid, too, which is not compared.

    Raises:
        ValueError: names the value and the range.
    """
    if _traced(name, value, jnp.number, rule, traced):
        return
    plain = value.item() if is_array(value) and not value.ndim else value
    try:
        inside = np.ndim(plain) == 0 and bool(valid(plain))
    except (TypeError, ValueError):  # not a number
        inside = False
    if not inside:
        raise ValueError(f"{name} must be {rule}, got {told(value)}")


def _traced(name: str, value: Any, kind: Any, rule: str, allowed: bool) -> bool:
    """Whether a number is traced, so that it cannot be compared.

    Raises:
        ValueError: it is, and either may not be or is no scalar of this kind.
    """
    if not isinstance(value, Tracer):
        return False
    if not allowed:
        raise ValueError(
            f"{name} must be known before the program is traced, "
            f"it cannot be an argument of jit, vmap or the like; got {told(value)}"
        )
    if value.shape or not jnp.issubdtype(value.dtype, kind):
        raise ValueError(f"{name} must be {rule}, got {told(value)}")
    return True


def function(name: str, value: Any, form: str) -> None:
    """Refuse what cannot be called.

    Args:
        name: what the error calls it.
        value: of it.
        form: how it is called and what it gives.

    Raises:
        ValueError: names the value and the form.
    """
    if not callable(value):
        raise ValueError(f"{name} must be a function {form}, got {told(value)}")


def instance(name: str, value: Any, kind: type) -> None:
    """Refuse what is not of a type.

    Raises:
        ValueError: names the value and the type.
    """
    if not isinstance(value, kind):
        raise ValueError(f"{name} must be of type {kind.__name__}, got {told(value)}")


def returned(name: str, value: Any, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """What a function that was passed in returned, at trace.

    Args:
        name: what the error calls it.
        value: of it.
        shape: that it must have.
        dtype: that it must have; for float32, floats of any width will do.

    Returns:
        The value, of that dtype.

    Raises:
        ValueError: it has another shape or dtype; names both.
    """
    kind = jnp.floating if dtype == jnp.float32 else dtype
    if not is_array(value) or value.shape != shape or not jnp.issubdtype(value.dtype, kind):
        raise ValueError(
            f"{name} must have shape {shape} and be {jnp.dtype(dtype)}, got {told(value)}"
        )
    return jnp.asarray(value, dtype)


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
        same_rows(name, array, shape, z)


def same_rows(name: str, array: jax.Array, shape: tuple[int, ...], z: jax.Array) -> None:
    """Refuse what is no array of a shape [B, ...] that a model needs, B as of the images z.

    Raises:
        ValueError: names the shape that is needed and the one that was given.
    """
    if not is_array(array) or array.shape != (*z.shape[:1], *shape):
        raise ValueError(
            f"{name} must be [B, {', '.join(map(str, shape))}] for this model, got {told(array)}"
        )


def batch(keys: jax.Array, image: ArrayLike, editable: ArrayLike) -> None:
    """Refuse keys, images and masks whose dtypes or shapes do not belong together.

    Raises:
        ValueError: names what is wrong and what would be valid.
    """
    grid(image, editable)
    size = image.shape[0]
    if not is_key(keys) or keys.shape != (size,):
        raise ValueError(
            f"keys must be a key array [{size}], one per image, from sample_keys; got {told(keys)}"
        )


def is_key(value: Any) -> bool:
    """Whether a value is a key or an array of keys, of the kind that ``jax.random.key`` makes."""
    return is_array(value) and jnp.issubdtype(value.dtype, jax.dtypes.prng_key)


def grid(image: ArrayLike, editable: ArrayLike) -> None:
    """Refuse images and masks whose dtypes or shapes do not belong together.

    Raises:
        ValueError: names what is wrong and what would be valid.
    """
    if not is_array(image) or image.ndim != 4 or image.dtype != jnp.float32 or not image.shape[0]:
        raise ValueError(f"image must be float32 [B, H, W, C], B at least 1, got {told(image)}")
    if not is_array(editable) or editable.ndim != 3 or editable.dtype != jnp.bool_:
        raise ValueError(f"editable must be bool [B, h, w], got {told(editable)}")
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
    """Refuse editable pixels that are not finite; traced arrays pass.

    They may be of any size: what a model generates is not clipped.

    Raises:
        ValueError: gives the worst value and its sample.
    """
    rule = "pixels must be in [-1, 1] (generated ones may overshoot, but must be finite)"
    _within(image, editable, True, float(jnp.finfo(jnp.float32).max), rule)


@jax.jit
def _worst(image: jax.Array, editable: jax.Array, where: jax.Array) -> jax.Array:
    """The largest magnitude of each sample where its mask is so, nan if there is one: [B]."""
    pixels = patches.expand(editable == where, image.shape[1] // editable.shape[1])
    size, axes = jnp.where(pixels, jnp.abs(image), 0), (1, 2, 3)
    # XLA's maximum on a CPU passes over nan where it takes several numbers at once.
    return jnp.where(jnp.isnan(size).any(axis=axes), jnp.nan, jnp.max(size, axis=axes))


def _within(image: ArrayLike, editable: ArrayLike, where: bool, limit: float, rule: str) -> None:
    """Refuse pixels beyond a limit in the patches whose mask is ``where``."""
    if isinstance(image, Tracer) or isinstance(editable, Tracer):
        return
    # The caller may be tracing, though not these arrays, or looking for nan.
    with jax.ensure_compile_time_eval(), jax.debug_nans(False):
        worst = np.asarray(_worst(image, editable, where))
    bad = np.flatnonzero(~(worst <= limit))
    if len(bad):
        raise ValueError(f"{rule}, got a magnitude of {worst[bad[0]]} in sample {bad[0]}")


def as_pytree(denoise: Callable[..., Any]) -> Callable[..., Any]:
    """A denoiser that can be an argument of a compiled function.

    NNX modules and other pytrees pass; any other callable becomes a constant of the program.

    Raises:
        ValueError: it cannot be called.
    """
    function("denoise", denoise, "(z, t) -> Prediction")
    opaque = jax.tree_util.all_leaves([denoise])
    return jax.tree_util.Partial(denoise) if opaque else denoise
