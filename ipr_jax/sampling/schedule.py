"""When each patch of a region starts, and its noise level before every step.

=================  =====  ===================================================================
here               paper  meaning
=================  =====  ===================================================================
num_steps          S      network evaluations of a pass: ceil(p + (n - 1)(1 - o) p)
block_length       L      steps that one patch takes: ceil(l), l = S / ((n - 1)(1 - o) + 1)
block_starts[k]           step at which the k-th patch starts: floor(k l (1 - o))
clock                     how the level of a patch falls from its first step to its last
=================  =====  ===================================================================

for a region of n patches, p steps per patch and overlap o. With ``max_steps``, S is that number for
every region; with ``top_k`` > 1, blocks are of that many patches and n counts blocks. At o = 1 all
patches run in parallel. Source: SRM (arXiv 2502.21075), appendix A. The published code computes
these in float32, whose rounding changes some plans; so does this table, on the host. Where rounding
gives several patches one start, all of them start there.

The clock "vp" is that of variance-preserving diffusion, whose noise falls slowly at first: with a
share r of its steps left, a patch has the level at which the ratio of noise to image is the one of
Ho and others (arXiv 2006.11239, betas from 0.1 to 20; so used by Kim and others, arXiv 2503.19385).
"""

import math
from functools import lru_cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ipr_jax.core import check
from ipr_jax.sampling.order import rank

WAITING = np.iinfo(np.int32).max
"""The start of a patch that has not started."""


CLOCKS = ("linear", "vp")
"""Clocks by name."""
BETAS = (0.1, 20.0)
"""Of the clock "vp", at r = 0 and 1."""


class Plan(NamedTuple):
    """The schedule for every region size n = 0 to P; arrays, so that compiled programs take any.

    Attributes:
        num_steps: int32 [P + 1].
        block_length: int32 [P + 1].
        block_starts: int32 [P + 1, P]; -1 where k >= n.
        clock: int32 [P + 1], the place of the clock in ``CLOCKS``, the same for all.
    """

    num_steps: np.ndarray
    block_length: np.ndarray
    block_starts: np.ndarray
    clock: np.ndarray


class PassPlan(NamedTuple):
    """The schedule of one pass over one region per sample.

    Attributes:
        region: bool [B, h, w], the patches to be regenerated.
        num_steps: int32 [B].
        block_length: int32 [B].
        block_starts: int32 [B, P].
        clock: int32 [B].
        level: float32 [B], in (0, 1], that of a patch that waits; 1 = it is noise.
    """

    region: jax.Array
    num_steps: jax.Array
    block_length: jax.Array
    block_starts: jax.Array
    clock: jax.Array
    level: jax.Array


def make_plan(
    num_patches: int,
    steps_per_patch: int,
    overlap: float,
    max_steps: int | None = None,
    top_k: int = 1,
    clock: str = "linear",
) -> Plan:
    """Tabulate the schedule.

    Args:
        num_patches: P, the largest region.
        steps_per_patch: p, at least 1.
        overlap: o in [0, 1]; 0 = one patch after the other, 1 = all in parallel.
        max_steps: S of every region, at least 1; None = as many as ``steps_per_patch`` calls for.
        top_k: patches that start together, at least 1.
        clock: of ``CLOCKS``.

    Raises:
        ValueError: an argument is out of range, unknown or traced.
    """
    counts = [
        check.count("num_patches", num_patches),
        check.count("steps_per_patch", steps_per_patch),
        check.count("top_k", top_k),
        None if max_steps is None else check.count("max_steps", max_steps),
    ]
    check.number("overlap", overlap, lambda value: 0 <= value <= 1, "in [0, 1]")
    if not isinstance(clock, str) or clock not in CLOCKS:
        raise ValueError(f"clock must be one of {', '.join(CLOCKS)}, got {clock!r}")
    return _tabulate(float(overlap), CLOCKS.index(clock), *counts)


@lru_cache
def _tabulate(
    overlap: float,
    clock: int,
    num_patches: int,
    steps_per_patch: int,
    top_k: int,
    max_steps: int | None,
) -> Plan:
    apart = np.float32(1 - overlap)
    num_steps = np.zeros(num_patches + 1, np.int32)
    block_length = np.ones(num_patches + 1, np.int32)
    block_starts = np.full((num_patches + 1, num_patches), -1, np.int32)
    for n in range(1, num_patches + 1):
        gaps = np.float32(-(-n // top_k) - 1) * apart
        steps = max_steps or math.ceil(
            np.float32(steps_per_patch) + gaps * np.float32(steps_per_patch)
        )
        # PyTorch divides a number by a tensor as reciprocal times number; the rounding matters.
        ideal_length = (np.float32(1) / (gaps + np.float32(1))) * np.float32(steps)
        check.count("the steps of a pass", steps)
        num_steps[n] = steps
        block_length[n] = math.ceil(ideal_length)
        starts = (np.arange(n) // top_k).astype(np.float32) * ideal_length * apart
        block_starts[n, :n] = np.floor(starts)
    return Plan(num_steps, block_length, block_starts, np.full_like(num_steps, clock))


def plan_pass(plan: Plan, region: jax.Array) -> PassPlan:
    """Look up the schedule of each sample's region, bool [B, h, w]."""
    size = region.sum(axis=(1, 2))
    tables = (jnp.asarray(table)[size] for table in plan)
    return PassPlan(region, *tables, level=jnp.ones(size.shape, jnp.float32))


def levels(plan: PassPlan, start: jax.Array, step: jax.Array | int) -> jax.Array:
    """Noise levels before a step.

    Args:
        plan: of the pass.
        start: int32 [B, h, w], the step at which each patch started; ``WAITING`` if not yet.
        step: int32 scalar or [B], m, from 0.

    Returns:
        Float32 [B, h, w]: the plan's level for waiting patches, then down to 0 in block_length
        steps, by the plan's clock; 0 outside the region and from the sample's last step on.
    """
    length, step = plan.block_length[:, None, None], _per_patch(step)
    elapsed = jnp.maximum(step - start, 0)
    left = jnp.maximum(length - elapsed, 0).astype(jnp.float32) / length.astype(jnp.float32)
    left = jnp.where(plan.clock[:, None, None] == CLOCKS.index("vp"), _vp(left), left)
    active = plan.region & (step < plan.num_steps[:, None, None])
    return jnp.where(active, plan.level[:, None, None] * left, 0)


def _vp(left: jax.Array) -> jax.Array:
    """The level that variance-preserving diffusion has with a share r of its time left; 1 at 1."""
    faded = left**2 / 2 * (BETAS[1] - BETAS[0]) + left * BETAS[0]
    noise = jnp.sqrt(-jnp.expm1(-faded))
    return jnp.where(left < 1, noise / (noise + jnp.exp(-faded / 2)), 1)


def start_patches(
    plan: PassPlan, start: jax.Array, step: jax.Array | int, priority: jax.Array
) -> jax.Array:
    """Start as many waiting patches as the plan has blocks at this step.

    Args:
        plan: of the pass.
        start: int32 [B, h, w], as in ``levels``.
        step: int32 scalar or [B], m.
        priority: float32 [B, h, w]; the lowest start first, ties in raster order.

    Returns:
        The new ``start``.
    """
    step = _per_patch(step)
    starting = plan.block_starts[:, None] == step
    num_starting = starting.sum(axis=2, keepdims=True, dtype=jnp.int32)
    waiting = plan.region & (start == WAITING)
    return jnp.where(waiting & (rank(priority, waiting) < num_starting), step, start)


def _per_patch(step: jax.Array | int) -> jax.Array:
    """A step, scalar or [B], in a shape that broadcasts to [B, h, w]."""
    return jnp.reshape(jnp.asarray(step, jnp.int32), (-1, 1, 1))
