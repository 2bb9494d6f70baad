"""One random key per sample, so that a sample does not depend on its batch.

A sample's key is folded with the iteration (0 = generation) and split by use; within a pass, the
noise key is folded with the step. Every draw hangs on (sample, iteration, step) and nothing else.
"""

import itertools
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ipr_jax.core import check


def sample_keys(key: jax.Array, num_samples: int, *, first: jax.Array | int = 0) -> jax.Array:
    """Keys of samples ``first`` to ``first + num_samples - 1`` of a run.

    Args:
        key: of the run, from ``jax.random.key``; not to be used for anything else.
        num_samples: how many, at least 1.
        first: index of the first sample, at least 0; may be traced. Indices are below 2**32.

    Returns:
        Key array [num_samples]; each depends on ``key`` and its own index only.

    Raises:
        ValueError: the key is of the old kind or not a single one, or a count or an index is out of
            its range.
    """
    if not check.is_key(key) or key.shape:
        raise ValueError(f"the key must come from jax.random.key, got {check.told(key)}")
    num_samples = check.count("num_samples", num_samples)
    check.count("first", first, least=0, below=2**32 + 1 - num_samples, traced=True)
    indices = jnp.asarray(first, jnp.uint32) + jnp.arange(num_samples, dtype=jnp.uint32)
    return jax.vmap(jax.random.fold_in, (None, 0))(key, indices)


def fold(keys: jax.Array, data: jax.Array | int) -> jax.Array:
    """``jax.random.fold_in`` of a number, scalar or [B], into every sample's key: [B] -> [B]."""
    return jax.vmap(jax.random.fold_in)(keys, jnp.broadcast_to(jnp.asarray(data), keys.shape))


def split(keys: jax.Array, num: int) -> list[jax.Array]:
    """``num`` independent keys per sample: [B] -> num x [B]."""
    parts = jax.vmap(lambda key: jax.random.split(key, num))(keys)
    return [parts[:, i] for i in range(num)]


def normal(keys: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Standard normal float32 [B, *shape], row i from key i."""
    return jax.vmap(lambda key: jax.random.normal(key, shape, jnp.float32))(keys)


def uniform(keys: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Float32 [B, *shape] uniform in [0, 1), row i from key i."""
    return jax.vmap(lambda key: jax.random.uniform(key, shape, jnp.float32))(keys)


class IterationKeys(NamedTuple):
    """The keys of one iteration, each [B]: choice of the region, its noise, the denoising pass."""

    region: jax.Array
    noise: jax.Array
    denoise: jax.Array


def iteration_keys(keys: jax.Array, iteration: jax.Array | int) -> IterationKeys:
    """Derive the keys of an iteration, 0 = generation, from those of the samples."""
    return IterationKeys(*split(fold(keys, iteration), 3))


def rngs(seed_or_key: int | jax.Array) -> Any:
    """The ``rngs`` of a new network, for its initial weights: the keys ``nnx.Rngs`` would give.

    ``nnx.Rngs`` counts in an array what it has given. Under a trace, as in ``nnx.eval_shape``,
    every count makes JAX look through all that was traced before: the largest released network
    took 1.9 to 2.6 seconds of a CPU, and takes 0.3 to 0.5.

    Args:
        seed_or_key: a seed, or a scalar key from ``jax.random.key``; it is folded with the number
            of each draw, from 0, and is not to be used for anything else.

    Returns:
        An object of which ``params()`` is the next key, as the layers of ``nnx`` call it.
    """
    key = jax.random.key(seed_or_key) if isinstance(seed_or_key, int) else seed_or_key
    numbers = itertools.count()
    return SimpleNamespace(params=lambda: jax.random.fold_in(key, next(numbers)))
