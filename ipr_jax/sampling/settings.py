"""How a region is sampled: the settings of a pass, and the noise that it begins from."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ipr_jax.core import check, patches
from ipr_jax.sampling import schedule
from ipr_jax.sampling.order import Order, certain_first
from ipr_jax.sampling.schedule import Plan


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a region is regenerated; the defaults are the paper's for refining Sudoku.

    Attributes:
        steps_per_patch: network evaluations for a single patch, at least 1.
        overlap: in [0, 1], how much of a patch's schedule it shares with the next one's; 1 = all
            patches in parallel.
        max_steps: network evaluations of a pass, whatever its region, at least 1; None = as many as
            ``steps_per_patch`` calls for.
        top_k: patches that start together, at least 1.
        clock: how the level of a patch falls, of ``schedule.CLOCKS``: "linear", or "vp", slowly at
            first, as in variance-preserving diffusion.
        stochasticity: in [0, 1], 0 = deterministic, 1 = ancestral; may be traced.
        temperature: factor of each step's standard deviation, at least 0; may be traced.
        order: which waiting patch starts next.

    Raises:
        ValueError: a value is out of range, or traced where it may not be, naming it and the range.
    """

    steps_per_patch: int = 10
    overlap: float = 0.8
    max_steps: int | None = None
    top_k: int = 1
    clock: str = "linear"
    stochasticity: float = 0.5
    temperature: float = 1.0
    order: Order = certain_first

    def __post_init__(self) -> None:
        self._plan(1)
        for name, valid, rule in (
            ("stochasticity", lambda value: 0 <= value <= 1, "in [0, 1]"),
            ("temperature", lambda value: 0 <= value < math.inf, "finite and at least 0"),
        ):
            check.number(name, getattr(self, name), valid, rule, traced=True)
        check.function(
            "order", self.order, "(sigma, uniform, t) -> priorities, see ipr_jax.sampling.order"
        )

    def _plan(self, num_patches: int) -> Plan:
        return schedule.make_plan(
            num_patches, self.steps_per_patch, self.overlap, self.max_steps, self.top_k, self.clock
        )

    def settings(self, num_patches: int) -> "Settings":
        """The traced part, for a grid of ``num_patches``."""
        return Settings(
            self._plan(num_patches),
            jnp.float32(self.stochasticity),
            jnp.float32(self.temperature),
        )


class Settings(NamedTuple):
    """The numbers of a pass, arguments of the compiled program: changing them does not recompile.

    Attributes:
        plan: the schedule by region size.
        stochasticity: float32 scalar in [0, 1].
        temperature: float32 scalar, at least 0.
    """

    plan: Plan
    stochasticity: jax.Array
    temperature: jax.Array


FIRST_PASS = Sampling(steps_per_patch=3, overlap=0.0)
"""The paper's settings for the first pass on Sudoku."""

REFINEMENT = Sampling()
"""The paper's settings for its refinement."""


def renoise(image: jax.Array, region: jax.Array, noise: jax.Array) -> jax.Array:
    """Replace the pixels of a region, bool [B, h, w], by noise [B, H, W, C]."""
    return jnp.where(patches.expand(region, image.shape[1] // region.shape[1]), noise, image)
