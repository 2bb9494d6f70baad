"""When a sample has been refined enough: small functions, passed to the streaming driver.

A rule maps ``(iteration, before, after)`` to bool [B], whether the sample may leave: ``iteration``
int32 [B], 0 = the first pass; ``before`` and ``after`` float32 [B, H, W, C], the images before and
after it. A rule that has a parameter ``seen`` is also given ``seen=selection.Seen(...)``. A sample
leaves when the rule has held ``patience`` times in a row.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from ipr_jax.methods.selection import Seen

Stop = Callable[..., jax.Array]
"""A rule, evaluated after every step on a quarter of the slots, or more if more passes are over: it
should cost little beside the network. What it says of a sample follows from that sample alone.
Another shape or dtype is refused at trace."""


def never(iteration: jax.Array, before: jax.Array, after: jax.Array) -> jax.Array:
    """All samples have the same number of iterations."""
    del before, after
    return jnp.zeros(iteration.shape, bool)


def unchanged(read: Callable[[jax.Array], jax.Array]) -> Stop:
    """What the image shows has not changed in an iteration; no verifier.

    Args:
        read: jittable, ``images [B, H, W, C] -> [B, ...]``, such as the digits of the cells.

    Returns:
        The rule; equal arguments give different functions, of which each is compiled.
    """

    def stop(iteration: jax.Array, before: jax.Array, after: jax.Array) -> jax.Array:
        same = (read(before) == read(after)).reshape(len(after), -1).all(axis=1)
        return same & (iteration > 0)

    return stop


def verified(solved: Callable[[jax.Array], jax.Array]) -> Stop:
    """A verifier finds the sample solved, if only after the first pass.

    Rates of samples that stop so are not those of refinement without a verifier.

    Args:
        solved: jittable, ``images [B, H, W, C] -> bool [B]``.

    Returns:
        The rule; equal arguments give different functions, of which each is compiled.
    """

    def stop(iteration: jax.Array, before: jax.Array, after: jax.Array) -> jax.Array:
        del iteration, before
        return solved(after)

    return stop


def undoubted(threshold: float) -> Stop:
    """The network doubts no patch; no verifier, and no evaluation of its own.

    Args:
        threshold: the doubt of a patch, ``selection.Seen.doubt``, below which it stands.

    Returns:
        The rule; equal arguments give different functions, of which each is compiled.
    """

    def stop(iteration: jax.Array, before: jax.Array, after: jax.Array, *, seen: Seen) -> jax.Array:
        del iteration, before, after
        return (seen.doubt < threshold).all(axis=(1, 2))

    return stop
