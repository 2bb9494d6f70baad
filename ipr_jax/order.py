"""Which waiting patch starts next: small functions, passed to the loop.

An order maps ``(sigma, uniform)``, both float32 [B, h, w], to priorities of that shape; the lowest
starts first. ``sigma`` is the predicted error of each patch now; ``uniform``, in [0, 1), is drawn
once per pass.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

Order = Callable[[jax.Array, jax.Array], jax.Array]


def certain_first(sigma: jax.Array, uniform: jax.Array) -> jax.Array:
    """The patch with the lowest predicted error (SRM, section 4.3; the IPR paper's order)."""
    del uniform
    return sigma


def random_order(sigma: jax.Array, uniform: jax.Array) -> jax.Array:
    """A uniformly random order, fixed over the pass."""
    del sigma
    return uniform


def raster_order(sigma: jax.Array, uniform: jax.Array) -> jax.Array:
    """Row by row, from the top left."""
    del uniform
    _, h, w = sigma.shape
    return jnp.broadcast_to(jnp.arange(h * w, dtype=jnp.float32).reshape(1, h, w), sigma.shape)


ORDERS: dict[str, Order] = {
    "certain": certain_first,
    "random": random_order,
    "raster": raster_order,
}
"""Orders by name."""


def rank(scores: jax.Array, candidates: jax.Array) -> jax.Array:
    """Place every patch in the order of its score: the lowest of a sample's candidates is 0.

    Args:
        scores: float32 [B, h, w]; infinite ones and nan come last among the candidates.
        candidates: bool [B, h, w]; the others rank behind them.

    Returns:
        Int32 [B, h, w], a permutation of 0 to P - 1 per sample; ties in raster order.
    """
    flat = (scores.reshape(len(scores), -1), ~candidates.reshape(len(scores), -1))
    place = jnp.argsort(jnp.lexsort(flat, axis=-1), axis=-1)
    return place.astype(jnp.int32).reshape(scores.shape)
