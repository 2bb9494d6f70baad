"""Which particles go on: small functions of their weights.

A resampler maps ``(uniform [N], log_weights [N])`` to ancestors, int32 [N] in 0..N-1, not falling:
the particle that each of the N places goes on from. Every random number enters as an argument, in
[0, 1). It is of one problem; ``jax.vmap`` makes it one of many, each with draws of its own. Weights
need not add up to 1; one of them is above 0. Particle i of the normalised weight W_i has N W_i
children on average, but for "best" and "top".
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

Resampler = Callable[[jax.Array, jax.Array], jax.Array]
"""``resampler(uniform [N], log_weights [N]) -> ancestors``, int32 [N]."""

BELOW_ONE = np.float32(1 - 2.0**-24)
"""The largest number below 1, for points that are rounded to it."""


def multinomial(uniform: jax.Array, log_weights: jax.Array) -> jax.Array:
    """Every place draws its ancestor by itself."""
    return _at(jax.nn.softmax(log_weights), jnp.sort(uniform))


def stratified(uniform: jax.Array, log_weights: jax.Array) -> jax.Array:
    """At N points of the cumulated weights, one drawn in each N-th of them."""
    number = len(log_weights)
    points = (jnp.arange(number, dtype=jnp.float32) + uniform) / number
    return _at(jax.nn.softmax(log_weights), points)


def systematic(uniform: jax.Array, log_weights: jax.Array) -> jax.Array:
    """At N evenly spaced points of the cumulated weights, all moved by the first draw."""
    return stratified(jnp.broadcast_to(uniform[:1], uniform.shape), log_weights)


def residual(uniform: jax.Array, log_weights: jax.Array) -> jax.Array:
    """floor(N W_i) children each; the other places draw by what is left of the weights."""
    number = len(log_weights)
    expected = number * jax.nn.softmax(log_weights)
    sure = jnp.floor(expected)
    places, left = jnp.arange(number, dtype=jnp.int32), expected - sure
    counts = sure.astype(jnp.int32)
    drawn = places >= counts.sum(dtype=jnp.int32)
    return jnp.sort(jnp.where(drawn, _at(left, uniform), _repeated(counts)))


def ssp(uniform: jax.Array, log_weights: jax.Array) -> jax.Array:
    """Srinivasan sampling: floor(N W_i) or one more, the number of children negatively associated.

    Two particles at a time settle between themselves which of their broken expectations is rounded;
    the other goes on to the next.

    Source: Gerber, Chopin and Whiteley, arXiv 1707.01845.
    """
    number = len(log_weights)
    expected = number * jax.nn.softmax(log_weights)
    sure = jnp.floor(expected)
    broken, places = expected - sure, jnp.arange(number, dtype=jnp.int32)

    def settle(
        carry: tuple[jax.Array, jax.Array, jax.Array], each: tuple[jax.Array, ...]
    ) -> tuple[tuple[jax.Array, jax.Array, jax.Array], None]:
        one, share, counts = carry  # the particle that goes on, and its expectation
        other, its, drawn = each
        both = share + its
        below = both < 1
        up = jnp.where(below, its, 1 - share)  # likelihood that the other one's is rounded up
        whole = jnp.where(below, both, 2 - both)
        rises = drawn < up / jnp.where(whole > 0, whole, 1)
        stays = jnp.where(rises == below, other, one)
        leaves = jnp.where(rises == below, one, other)
        counts = counts.at[leaves].add(jnp.where(below, 0, 1))
        return (stays, jnp.where(below, both, both - 1), counts), None

    start = places[0], broken[0], sure.astype(jnp.int32)
    (last, share, counts), _ = jax.lax.scan(settle, start, (places[1:], broken[1:], uniform[1:]))
    return _repeated(counts.at[last].add(jnp.round(share).astype(jnp.int32)))


def best(uniform: jax.Array, log_weights: jax.Array) -> jax.Array:
    """All from the one of the highest weight, the first of equals."""
    return top(uniform, log_weights, 1)


def top(uniform: jax.Array, log_weights: jax.Array, kept: jax.Array | int) -> jax.Array:
    """From the ``kept`` of the highest weights, the first of equals, equally often up to one.

    Args:
        uniform: not used.
        log_weights: [N].
        kept: int32 scalar in 1..N.
    """
    del uniform
    number = len(log_weights)
    order = jnp.argsort(-log_weights, stable=True).astype(jnp.int32)
    place = jnp.arange(number, dtype=jnp.int32) % jnp.asarray(kept, jnp.int32)
    return jnp.sort(order[place])


RESAMPLERS: dict[str, Resampler] = {
    "multinomial": multinomial,
    "systematic": systematic,
    "stratified": stratified,
    "residual": residual,
    "ssp": ssp,
    "best": best,
}
"""By name, those that need no other number."""


def effective_number(log_weights: jax.Array) -> jax.Array:
    """The effective sample size 1 / sum W_i^2 of weights [..., N]: in 1..N, [...]."""
    return 1 / (jax.nn.softmax(log_weights, axis=-1) ** 2).sum(axis=-1)


def _at(weights: jax.Array, points: jax.Array) -> jax.Array:
    """Whose part of the cumulated weights each point in [0, 1) is in; never one of weight 0."""
    cumulated = jnp.cumsum(weights)
    points = cumulated[-1] * jnp.minimum(points, BELOW_ONE)
    return jnp.searchsorted(cumulated, points, side="right").astype(jnp.int32)


def _repeated(counts: jax.Array) -> jax.Array:
    """Every particle as often as its count, int32 [N]: where they add up to less, the last."""
    places = jnp.arange(len(counts), dtype=jnp.int32)
    found = jnp.searchsorted(jnp.cumsum(counts), places, side="right").astype(jnp.int32)
    return jnp.minimum(found, len(counts) - 1)
