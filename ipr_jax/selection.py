"""What an iteration regenerates, and from which noise: small functions, passed to the loop."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from ipr_jax import keys as random_keys
from ipr_jax.order import rank

Selection = Callable[[jax.Array, jax.Array | int, tuple[int, ...]], jax.Array]
"""``select(keys [B], iteration, (h, w)) -> scores``, float32 [B, h, w], from the keys of the
samples and the iteration, from 1, a scalar or one per sample; the editable patches with the lowest
scores are regenerated."""

Noise = Callable[[jax.Array, jax.Array | int, tuple[int, ...]], jax.Array]
"""``noise(keys [B], iteration, (H, W, C)) -> noise``, float32 [B, H, W, C], standard normal; the
iteration is a scalar or one per sample."""


def fresh_regions(keys: jax.Array, iteration: jax.Array | int, grid: tuple[int, ...]) -> jax.Array:
    """New random patches in every iteration (IPR, algorithm 1 line 3)."""
    return random_keys.uniform(random_keys.iteration_keys(keys, iteration).region, grid)


def fixed_regions(keys: jax.Array, iteration: jax.Array | int, grid: tuple[int, ...]) -> jax.Array:
    """The random patches of the first iteration in every iteration (IPR, figure 6b)."""
    del iteration
    return random_keys.uniform(random_keys.iteration_keys(keys, 1).region, grid)


def fresh_noise(keys: jax.Array, iteration: jax.Array | int, shape: tuple[int, ...]) -> jax.Array:
    """New noise in every iteration (IPR, algorithm 1 line 4)."""
    return random_keys.normal(random_keys.iteration_keys(keys, iteration).noise, shape)


def initial_noise(keys: jax.Array, iteration: jax.Array | int, shape: tuple[int, ...]) -> jax.Array:
    """The noise that the first pass started from, in every iteration (IPR, figure 6b)."""
    del iteration
    return random_keys.normal(random_keys.iteration_keys(keys, 0).noise, shape)


REGIONS: dict[str, Selection] = {"fresh": fresh_regions, "fixed": fixed_regions}
"""Region selections by name."""

NOISES: dict[str, Noise] = {"fresh": fresh_noise, "initial": initial_noise}
"""Noise choices by name."""


def region_sizes(num_patches: int, ratio: float) -> np.ndarray:
    """How many of n editable patches are regenerated: floor(ratio n), at least 1 where n > 0.

    Args:
        num_patches: P.
        ratio: the resampling ratio, in (0, 1].

    Returns:
        Int32 [P + 1], indexed by n, in the published code's float64 arithmetic.

    Raises:
        ValueError: the ratio is out of range.
    """
    if not 0 < ratio <= 1:
        raise ValueError(f"ratio must be in (0, 1], got {ratio}")
    sizes = [0, *(max(1, int(n * ratio)) for n in range(1, num_patches + 1))]
    return np.array(sizes, np.int32)


def choose(scores: jax.Array, editable: jax.Array, sizes: jax.Array) -> jax.Array:
    """The editable patches with the lowest scores, as many as their number calls for.

    Args:
        scores: float32 [B, h, w].
        editable: bool [B, h, w].
        sizes: int32 [P + 1], ``region_sizes``.

    Returns:
        Bool [B, h, w], exactly ``sizes[editable.sum()]`` True per sample; ties in raster order.
    """
    chosen = jnp.asarray(sizes)[editable.sum(axis=(1, 2))][:, None, None]
    return editable & (rank(scores, editable) < chosen)
