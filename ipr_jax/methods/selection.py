"""What an iteration regenerates, and from which noise: small functions, passed to the loop."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from ipr_jax.core import check
from ipr_jax.core import keys as random_keys
from ipr_jax.sampling import rank

Selection = Callable[[jax.Array, jax.Array | int, tuple[int, ...]], jax.Array]
"""``select(keys [B], iteration, (h, w)) -> scores``, float32 [B, h, w], from the keys of the
samples and the iteration, from 1, a scalar or one per sample; the editable patches with the lowest
scores are regenerated. Another shape or dtype, such as a mask, is refused at trace."""

Noise = Callable[[jax.Array, jax.Array | int, tuple[int, ...]], jax.Array]
"""``noise(keys [B], iteration, (H, W, C)) -> noise``, float32 [B, H, W, C], standard normal; the
iteration is a scalar or one per sample. Another shape or dtype is refused at trace."""


def fresh_regions(keys: jax.Array, iteration: jax.Array | int, grid: tuple[int, ...]) -> jax.Array:
    """New random patches in every iteration (IPR, algorithm 1 line 3): float32 [B, h, w]."""
    return random_keys.uniform(random_keys.iteration_keys(keys, iteration).region, grid)


def fixed_regions(keys: jax.Array, iteration: jax.Array | int, grid: tuple[int, ...]) -> jax.Array:
    """The random patches of the first iteration in all (IPR, figure 6b): float32 [B, h, w]."""
    del iteration
    return random_keys.uniform(random_keys.iteration_keys(keys, 1).region, grid)


def fresh_noise(keys: jax.Array, iteration: jax.Array | int, shape: tuple[int, ...]) -> jax.Array:
    """New noise in every iteration (IPR, algorithm 1 line 4): float32 [B, H, W, C]."""
    return random_keys.normal(random_keys.iteration_keys(keys, iteration).noise, shape)


def initial_noise(keys: jax.Array, iteration: jax.Array | int, shape: tuple[int, ...]) -> jax.Array:
    """The noise of the first pass in every iteration (IPR, figure 6b): float32 [B, H, W, C]."""
    del iteration
    return random_keys.normal(random_keys.iteration_keys(keys, 0).noise, shape)


REGIONS: dict[str, Selection] = {"fresh": fresh_regions, "fixed": fixed_regions}
"""Region selections by name."""

NOISES: dict[str, Noise] = {"fresh": fresh_noise, "initial": initial_noise}
"""Noise choices by name."""


def check_functions(select: Selection, noise: Noise) -> None:
    """Refuse what cannot be called.

    Raises:
        ValueError: one of the two is no function.
    """
    check.function(
        "select", select, "(keys, iteration, grid) -> scores, see ipr_jax.methods.selection"
    )
    check.function(
        "noise", noise, "(keys, iteration, shape) -> noise, see ipr_jax.methods.selection"
    )


def region_sizes(num_patches: int, ratio: float) -> np.ndarray:
    """How many of n editable patches are regenerated: floor(ratio n), at least 1 where n > 0.

    Args:
        num_patches: P.
        ratio: the resampling ratio, in (0, 1].

    Returns:
        Int32 [P + 1], indexed by n, in the published code's float64 arithmetic.

    Raises:
        ValueError: the ratio is out of range or traced.
    """
    check.number("ratio", ratio, lambda value: 0 < value <= 1, "in (0, 1]")
    sizes = [0, *(max(1, int(n * float(ratio))) for n in range(1, num_patches + 1))]
    return np.array(sizes, np.int32)


def choose(scores: jax.Array, editable: jax.Array, sizes: jax.Array) -> jax.Array:
    """The editable patches with the lowest scores, as many as their number calls for.

    Args:
        scores: float32 [B, h, w].
        editable: bool [B, h, w].
        sizes: int32 [P + 1], ``region_sizes``.

    Returns:
        Bool [B, h, w], exactly ``sizes[editable.sum()]`` True per sample; ties in raster order.

    Raises:
        ValueError: the scores have another shape or dtype; at trace.
    """
    scores = check.returned("what select returns", scores, editable.shape, jnp.float32)
    chosen = jnp.asarray(sizes)[editable.sum(axis=(1, 2))][:, None, None]
    return editable & (rank(scores, editable) < chosen)
