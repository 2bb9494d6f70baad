"""Between the patch grid and the pixels: expansion, averages, and the exact resize of noise levels.

Shape letters are those of ``ipr_jax.core.types``.
"""

from functools import lru_cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


def expand(per_patch: jax.Array, patch_size: int) -> jax.Array:
    """Repeat each patch's value over its pixels: [B, h, w] -> [B, H, W, 1]."""
    batch, h, w = per_patch.shape
    tiled = jnp.broadcast_to(per_patch[:, :, None, :, None], (batch, h, patch_size, w, patch_size))
    return tiled.reshape(batch, h * patch_size, w * patch_size, 1)


def patch_mean(pixels: jax.Array, patch_size: int) -> jax.Array:
    """Average over the pixels of each patch: [B, H, W] -> [B, h, w]."""
    batch, height, width = pixels.shape
    h, w = height // patch_size, width // patch_size
    return pixels.reshape(batch, h, patch_size, w, patch_size).mean(axis=(2, 4))


def mean_square(one: jax.Array, other: jax.Array, patch_size: int) -> jax.Array:
    """Mean square difference of images [B, H, W, C] by patch: [B, h, w]."""
    return patch_mean(((one - other) ** 2).mean(axis=3), patch_size)


def tokens(image: jax.Array, patch_size: int) -> jax.Array:
    """The pixels of every patch, patches row by row: [B, H, W, C] -> [B, P, S S C]."""
    batch, height, width, channels = image.shape
    h, w = height // patch_size, width // patch_size
    split = image.reshape(batch, h, patch_size, w, patch_size, channels).swapaxes(2, 3)
    return split.reshape(batch, h * w, -1)


def untokens(pixels: jax.Array, image_shape: tuple[int, int, int], patch_size: int) -> jax.Array:
    """The inverse of ``tokens``: [B, P, S S C] -> [B, H, W, C]."""
    height, width, channels = image_shape
    h, w = height // patch_size, width // patch_size
    split = pixels.reshape(-1, h, w, patch_size, patch_size, channels).swapaxes(2, 3)
    return split.reshape(-1, *image_shape)


class AxisResize(NamedTuple):
    """A bilinear resize of a piecewise constant axis, reduced to its distinct results.

    Attributes:
        low, high: int [D], the two patches that each distinct position mixes.
        weight: float32 [D], the share of ``high``.
        position: int [target], which distinct one each target position is.
    """

    low: np.ndarray
    high: np.ndarray
    weight: np.ndarray
    position: np.ndarray


@lru_cache
def axis_resize(patches: int, patch_size: int, target: int) -> AxisResize:
    """Plan the resize of ``patches * patch_size`` constant-per-patch positions to ``target``.

    Bilinear with half-pixel centres and no antialiasing (``align_corners=False``): target i reads
    source N / target (i + 1/2) - 1/2, clamped at 0, between its two neighbours. A position whose
    neighbours lie in one patch is that patch; equal positions are listed once.

    All in float32, as PyTorch does, since the time embedding multiplies what rounding leaves by
    1000; with a fused multiply-add, as PyTorch is compiled for GPUs and for CPUs since AVX2, so
    that the position is rounded once.
    """
    source = patches * patch_size
    scale = np.float32(source) / np.float32(target)
    fused = scale.astype(np.float64) * (np.arange(target) + 0.5) - 0.5  # exact
    position = np.maximum(fused.astype(np.float32), 0)
    first = position.astype(int)
    second = np.minimum(first + 1, source - 1)
    low, high = first // patch_size, second // patch_size
    weight = np.where(low == high, 0, position - first.astype(np.float32))
    high = np.where(weight == 0, low, high)
    triples = np.stack([low, high, weight], axis=1)
    distinct, index = np.unique(triples, axis=0, return_inverse=True)
    return AxisResize(
        low=distinct[:, 0].astype(int),
        high=distinct[:, 1].astype(int),
        weight=distinct[:, 2].astype(np.float32),
        position=index.reshape(-1),
    )


def resize_levels(t: jax.Array, rows: AxisResize, columns: AxisResize) -> jax.Array:
    """Noise levels at the distinct positions of a resolution: [B, h, w] -> [B, Dy, Dx]."""

    def mix(x: jax.Array, axis: int, plan: AxisResize) -> jax.Array:
        if not plan.weight.any():
            return jnp.take(x, plan.low, axis=axis)
        shape = [1] * x.ndim
        shape[axis] = -1
        weight = jnp.asarray(plan.weight).reshape(shape)
        return (1 - weight) * jnp.take(x, plan.low, axis=axis) + weight * jnp.take(
            x, plan.high, axis=axis
        )

    return mix(mix(t, 1, rows), 2, columns)
