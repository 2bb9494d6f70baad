"""How training noise levels are drawn: one per patch, and what each is worth in the loss.

Source: SRM (arXiv 2502.21075), section 4. ``mean_beta`` draws the mean level of an image uniformly
and splits it over the patches by a tree of beta draws, so that images of every mean and of very
unequal patches occur; ``independent`` draws every patch by itself, ``shared`` one level per image.
``sequential`` draws those of a pass at a random time, in half of the images.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

NUM_BINS = 1000
NUM_NORMALISATION_SAMPLES = 80_000
_EPSILON = 1e-6

LARGEST_SPREAD = 3.0
"""Of the logits of the levels of an image, in ``sequential``."""

Sampler = Callable[[jax.Array, jax.Array], jax.Array]
"""``sample(key, editable [B, h, w]) -> t``, float32 [B, h, w] in [0, 1]; the key is consumed. The
levels of clues are of no consequence."""


def independent(key: jax.Array, batch: int, grid: tuple[int, int]) -> jax.Array:
    """Every patch uniform in [0, 1] by itself."""
    return jax.random.uniform(key, (batch, *grid))


def shared(key: jax.Array, batch: int, grid: tuple[int, int]) -> jax.Array:
    """One level per image, uniform in [0, 1]."""
    return jnp.broadcast_to(jax.random.uniform(key, (batch, 1, 1)), (batch, *grid))


class _Split(NamedTuple):
    """One level of the tree over patches, static.

    Attributes:
        sizes: [nodes] patches under each node.
        first: [nodes] patches under its first child; 0 for a leaf, which is not split.
    """

    sizes: np.ndarray
    first: np.ndarray


def _tree(patches: int) -> list[_Split]:
    """The halving of ``patches`` down to single ones, level by level."""
    levels, sizes = [], np.array([patches])
    while sizes.max() > 1:
        first = np.where(sizes > 1, sizes // 2, 0)
        levels.append(_Split(sizes, first))
        children = np.stack([first, sizes - first], axis=1).reshape(-1)
        sizes = children[children > 0]
    return levels


def mean_beta(key: jax.Array, batch: int, grid: tuple[int, int], *, sharpness: float) -> jax.Array:
    """Uniform mean level, split over the patches by halving with Beta(a, a) shares.

    Args:
        key: consumed.
        batch: number of images B.
        grid: (h, w).
        sharpness: scales a = (n - 1 - n mod 2)^1.05 at a node of n patches; larger values make the
            patches of an image more alike. The released models use 0.5 to 1.

    Returns:
        Float32 [B, h, w] in [0, 1].
    """
    patches = grid[0] * grid[1]
    mean_key, split_key, shuffle_key = jax.random.split(key, 3)
    total = jax.random.uniform(mean_key, (batch, 1)) * patches
    for depth, (sizes, first) in enumerate(_tree(patches)):
        split = sizes > 1
        size, half = sizes[split].astype(np.float32), first[split].astype(np.float32)
        a = (sizes[split] - 1 - sizes[split] % 2) ** 1.05 * sharpness  # in float64, as published
        a = a.astype(np.float32)[None]
        share = jax.random.beta(jax.random.fold_in(split_key, depth), a, a, (batch, a.shape[1]))
        parent = total[:, split]
        largest = jnp.minimum(parent, half[None])
        smallest = jnp.maximum(parent - jnp.minimum(parent, (size - half)[None]), 0)
        part = smallest + (largest - smallest) * share
        first_child = jnp.zeros_like(total).at[:, split].set(part)
        children = jnp.stack([first_child, total - first_child], axis=2).reshape(batch, -1)
        exists = np.stack([first > 0, np.ones_like(split)], axis=1).reshape(-1)
        total = children[:, exists]
    t = jax.random.permutation(shuffle_key, total, axis=1, independent=True)
    return jnp.clip(t, 0, 1).reshape(batch, *grid)


def sequential(key: jax.Array, editable: jax.Array) -> jax.Array:
    """Half of the images at a random time of a pass of random overlap, half at levels of any kind.

    In a pass over the editable patches in random order, a front moves over them; before it they are
    noise, behind it finished, and in between their level falls linearly. Its width is log-uniform,
    from a single patch (no overlap) to four times all of them (nearly parallel), its place uniform.
    In the other images the logits of the levels are normal around that of a uniform number, with a
    standard deviation that is uniform up to ``LARGEST_SPREAD``.

    Args:
        key: consumed.
        editable: bool [B, h, w].

    Returns:
        Float32 [B, h, w] in [0, 1].
    """
    order_key, image_key, normal_key = jax.random.split(key, 3)
    flat = editable.reshape(len(editable), -1)
    uniform = jnp.where(flat, jax.random.uniform(order_key, flat.shape), jnp.inf)
    number = jnp.maximum(flat.sum(axis=1, keepdims=True), 1).astype(jnp.float32)
    place = (uniform.argsort(axis=1).argsort(axis=1).astype(jnp.float32) + 0.5) / number
    which, one, two = jnp.split(jax.random.uniform(image_key, (len(flat), 3)), 3, axis=1)
    width = 4**one * number ** (one - 1)
    front = jnp.clip((place - two * (1 + width)) / width + 1, 0, 1)
    logit = jnp.log(two + _EPSILON) - jnp.log1p(_EPSILON - two)
    spread = LARGEST_SPREAD * one * jax.random.normal(normal_key, flat.shape)
    return jnp.where(which < 0.5, front, jax.nn.sigmoid(logit + spread)).reshape(editable.shape)


def _of_shape(sample: Callable[[jax.Array, int, Any], jax.Array]) -> Sampler:
    """A sampler that does not look at which patches are editable."""
    return lambda key, editable: sample(key, len(editable), editable.shape[1:])


SAMPLERS: dict[str, Callable[[float], Sampler]] = {
    "mean-beta": lambda sharpness: _of_shape(partial(mean_beta, sharpness=sharpness)),
    "independent": lambda sharpness: _of_shape(independent),
    "shared": lambda sharpness: _of_shape(shared),
    "sequential": lambda sharpness: sequential,
}
"""Samplers by name, made from the sharpness (which only mean-beta reads)."""


def inverse_density(sample: Sampler, key: jax.Array, grid: tuple[int, int]) -> np.ndarray:
    """Loss weights that undo the sampler's density over levels, from 80,000 images.

    Args:
        sample: the sampler, of images without clues.
        key: consumed.
        grid: (h, w).

    Returns:
        Float32 [1000], 1 / density of each bin of [0, 1].
    """
    counts = np.zeros(NUM_BINS)
    chunk = max(1, min(NUM_NORMALISATION_SAMPLES, 2**21 // (grid[0] * grid[1])))
    draw, editable = jax.jit(sample), jnp.ones((chunk, *grid), bool)
    for index in range(-(-NUM_NORMALISATION_SAMPLES // chunk)):
        t = np.asarray(draw(jax.random.fold_in(key, index), editable))
        counts += np.histogram(t, bins=NUM_BINS, range=(0, 1))[0]
    density = counts / counts.mean()
    return ((1 + _EPSILON) / (density + _EPSILON)).astype(np.float32)


def weigh(t: jax.Array, inverse: jax.Array) -> jax.Array:
    """Look up the loss weight of each level: [B, h, w] -> [B, h, w]."""
    bins = jnp.clip((t * NUM_BINS).astype(jnp.int32), 0, NUM_BINS - 1)
    return inverse[bins]


def per_image(t: jax.Array) -> jax.Array:
    """Loss weights by which images of few noisy patches count as those of many.

    Args:
        t: float32 [B, h, w] noise levels.

    Returns:
        Float32 [B, 1, 1], patches by how many of them are noisy, at most 20.
    """
    return jnp.minimum(1 / jnp.maximum((t > 0).mean(axis=(1, 2), keepdims=True), 1e-6), 20)


def add_zeros(key: jax.Array, t: jax.Array, weight: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Set a random number of random patches of each image to level 0 and weight 0.

    The share of zeros is uniform in [0, 1] and independent for each image, so that the model also
    learns to denoise beside finished patches.

    Args:
        key: consumed.
        t: float32 [B, h, w] noise levels.
        weight: float32 [B, h, w] loss weights.

    Returns:
        The new levels and weights.
    """
    batch, h, w = t.shape
    ratio_key, order_key = jax.random.split(key)
    ratio = jax.random.uniform(ratio_key, (batch, 1))
    position = jnp.arange(1, h * w + 1, dtype=jnp.float32) / (h * w)
    position = jnp.broadcast_to(position, (batch, h * w))
    rank = jax.random.permutation(order_key, position, axis=1, independent=True)
    zero = (rank < ratio).reshape(t.shape)
    return jnp.where(zero, 0, t), jnp.where(zero, 0, weight)
