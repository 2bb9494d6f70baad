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


def random(sigma: jax.Array, uniform: jax.Array) -> jax.Array:
    """A uniformly random order, fixed over the pass."""
    del sigma
    return uniform


def raster(sigma: jax.Array, uniform: jax.Array) -> jax.Array:
    """Row by row, from the top left."""
    del uniform
    _, h, w = sigma.shape
    return jnp.broadcast_to(jnp.arange(h * w, dtype=jnp.float32).reshape(1, h, w), sigma.shape)


ORDERS: dict[str, Order] = {"certain": certain_first, "random": random, "raster": raster}
"""Orders by name."""
