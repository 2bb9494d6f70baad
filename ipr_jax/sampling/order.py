"""Which waiting patch starts next: small functions, passed to the loop.

An order maps ``(sigma, uniform, t)``, all float32 [B, h, w], to priorities of that shape; the
lowest starts first. Another shape or dtype is refused at trace. ``sigma`` is the predicted error of
each patch now; ``uniform``, in [0, 1), is drawn once per pass; ``t`` is the noise level of each
patch now, 0 = known.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from ipr_jax.core import check

Order = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]

TIES = 2.0**13
"""Certainties that are equal when multiplied by this and rounded are a tie."""


def certain_first(sigma: jax.Array, uniform: jax.Array, t: jax.Array) -> jax.Array:
    """The patch with the lowest predicted error (SRM, section 4.3; the IPR paper's order).

    Returns:
        Float32 [B, h, w], ``sigma``.
    """
    del uniform, t
    return sigma


def uncertain_first(sigma: jax.Array, uniform: jax.Array, t: jax.Array) -> jax.Array:
    """The patch with the highest predicted error.

    Returns:
        Float32 [B, h, w], minus ``sigma``.
    """
    del uniform, t
    return -sigma


def random_order(sigma: jax.Array, uniform: jax.Array, t: jax.Array) -> jax.Array:
    """A uniformly random order, fixed over the pass.

    Returns:
        Float32 [B, h, w], ``uniform``.
    """
    del sigma, t
    return uniform


def raster_order(sigma: jax.Array, uniform: jax.Array, t: jax.Array) -> jax.Array:
    """Row by row, from the top left.

    Returns:
        Float32 [B, h, w], 0 to P - 1.
    """
    del uniform, t
    _, h, w = sigma.shape
    return jnp.broadcast_to(jnp.arange(h * w, dtype=jnp.float32).reshape(1, h, w), sigma.shape)


def graph_order(dependencies: np.ndarray, *, max_order: int = 1, decay: float = 0.5) -> Order:
    """The patch that the known ones say most about, by a graph of which patches depend.

    A patch knows itself as far as it is denoised, and its neighbours' mean knowledge, weighted by
    ``decay``, theirs by ``decay`` squared, and so on; equals are taken at random.

    Args:
        dependencies: float or bool [P, P], >= 0, how much each patch (column) depends on each.
        max_order: longest path in the graph that counts, at least 0; 0 = random order.
        decay: in (0, 1), the weight lost along an edge.

    Returns:
        The order; equal arguments give different functions, of which each is compiled.

    Raises:
        ValueError: an argument is out of its range or traced; at trace, the grid has another P.

    Source: the graph-sequential sampler of SRM (arXiv 2502.21075). There, certainties are divided
    by the largest of the whole batch before ties are sought; here no sample sees another.
    """
    if isinstance(dependencies, Tracer):
        raise ValueError("dependencies cannot be traced: they are constants of the program")
    matrix = np.asarray(dependencies, np.float32)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not (matrix >= 0).all():
        raise ValueError(f"dependencies must be [P, P] and not negative, got {matrix.shape}")
    check.count("max_order", max_order, least=0)
    check.number("decay", decay, lambda value: 0 < value < 1, "in (0, 1)")
    weights = power = np.eye(len(matrix), dtype=np.float32)
    for order in range(1, max_order + 1):
        power = power @ matrix
        power = power / np.maximum(power.sum(axis=0, keepdims=True), np.finfo(np.float32).tiny)
        weights = weights + np.float32(decay**order) * power

    def graph(sigma: jax.Array, uniform: jax.Array, t: jax.Array) -> jax.Array:
        del sigma
        if t[0].size != len(weights):
            h, w = t.shape[1:]
            raise ValueError(f"the graph is of {len(weights)} patches, the grid {h} x {w}")
        known = (1 - t).reshape(t.shape[0], -1)
        certainty = jnp.dot(known, weights, precision="highest").reshape(t.shape)
        return uniform - jnp.round(TIES * certainty)

    return graph


ORDERS: dict[str, Order] = {
    "certain": certain_first,
    "uncertain": uncertain_first,
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
    batch = scores.shape[0]
    flat = (scores.reshape(batch, -1), ~candidates.reshape(batch, -1))
    place = jnp.argsort(jnp.lexsort(flat, axis=-1), axis=-1)
    return place.astype(jnp.int32).reshape(scores.shape)
