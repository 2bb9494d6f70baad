"""The best of several samples by the network alone: the answer is the one that it doubts least.

Every problem is sampled several times, by any method that looks at one image of it. Each sample is
then asked about in two rounds (``Doubting``): what every patch is predicted to be from the others,
and by how much that changes once these are replaced by what is predicted of them. The sums of these
changes over the editable patches tell samples that hold together from others, as a verifier does,
without knowing any rule.

Relatives: the pseudo-likelihood (Besag, 1975), best-of-n by self-certainty (arXiv 2502.18581).
"""

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ipr_jax.core import Prediction, check
from ipr_jax.methods import engine, walk
from ipr_jax.methods.doubts import PARTS, Asked, Doubting
from ipr_jax.methods.engine import INPUT, Method, Problem, State, by_sample
from ipr_jax.methods.ipr import Refinement
from ipr_jax.methods.solving import budget_of, check_method, of_grid

ROUNDS = 2
"""A single one would doubt unusual textures."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LeastDoubted:
    """Several samples of a method, of which the network chooses; no verifier.

    The first of them draws what the method draws alone, from the same key; the others, and what
    asks, draw from keys that are folded from it.

    Attributes:
        method: makes each of them; by default a first pass. One that evaluates several images of a
            problem at once is refused.
        samples: of each problem, at least 1. All are evaluated until the last of them is ready.
        parts: into how many each sample is dealt, at least 2 and at most as many as there are
            patches; a sample is asked about by twice as many evaluations.

    Raises:
        ValueError: ``method`` is none, or a value is out of range, naming it and the range.
    """

    method: Any = dataclasses.field(default_factory=partial(Refinement, iterations=0))
    samples: int = 4
    parts: int = PARTS

    def __post_init__(self) -> None:
        check_method(self.method)
        check.count("samples", self.samples)
        check.count("parts", self.parts, least=2)

    @property
    def start(self) -> str:
        """What iteration 0 is, for tables and pictures."""
        return INPUT if getattr(self.method, "start", None) == INPUT else "search"

    @property
    def passes(self) -> int:
        """Over every sample: the only one."""
        return 1

    @property
    def row_parts(self) -> tuple[int, ...]:
        """Sizes that the network is compiled for, see ``engine.advance``."""
        return getattr(self.method, "row_parts", (1,))

    def budget(self, grid: tuple[int, ...]) -> int:
        """Network evaluations that no sample exceeds.

        Raises:
            ValueError: ``method`` does not tell its own.
        """
        return self.samples * (budget_of(self.method, grid) + self.doubting.evaluations)

    def least_budget(self, grid: tuple[int, ...]) -> int:
        """The smallest budget: before all have been asked about, there is no answer.

        Raises:
            ValueError: ``method`` does not tell its own.
        """
        return self.budget(grid)

    @property
    def doubting(self) -> Doubting:
        """What asks about samples."""
        return Doubting(self.parts, ROUNDS)

    def on(self, grid: tuple[int, ...]) -> "Contest":
        """The method for a grid of patches (h, w).

        Raises:
            ValueError: ``method`` is none or does not tell its own budget, or the grid has fewer
                patches than there are parts.
        """
        check.count("parts", self.parts, least=2, below=grid[0] * grid[1] + 1)
        most = jnp.int32(budget_of(self.method, grid))
        return Contest(of_grid(self.method, grid), most, self.doubting, self.samples)


class Memory(NamedTuple):
    """Of n samples, [B, n, ...] each.

    Attributes:
        sampling: the state of the method that makes them.
        asking: of ``Doubting``, at its beginning before a sample is there.
    """

    sampling: State
    asking: Asked


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["method", "most"],
    meta_fields=["doubting", "samples"],
)
@dataclasses.dataclass(frozen=True)
class Contest:
    """The method for a grid; ``LeastDoubted.on`` makes it.

    Attributes:
        method: makes samples.
        most: int32 scalar, evaluations that each may take.
        doubting: asks about them.
        samples: of each problem.
    """

    method: Method
    most: jax.Array
    doubting: Doubting
    samples: int

    @property
    def within(self) -> int:
        """How often the samples are guided, as ``langevin.Guidance`` counts it: -1 = not at all."""
        return getattr(self.method, "within", -1)

    def init(self, problem: Problem) -> State:
        """All samples are about to be made.

        Raises:
            ValueError: the method evaluates several images of a problem at once.
        """
        rows = walk.particles(problem, self.samples)
        sampling = self.method.init(rows)
        if sampling.z.shape != rows.image.shape:
            each = sampling.z.shape[0] // rows.image.shape[0]
            raise ValueError(
                f"method must evaluate one image of a problem at a time, "
                f"got one that evaluates {each}"
            )
        asking = self.doubting.init(self._asked(problem, sampling.image))
        z, t = self._next(sampling, asking)
        memory = walk.grouped(Memory(sampling, asking.memory), self.samples)
        return engine.begin(problem, z, t, memory)

    def update(self, problem: Problem, state: State, prediction: Prediction) -> State:
        """Go on with samples that are not ready, and ask about the others."""
        rows = walk.particles(problem, self.samples)
        sampling, asking = walk.flat(state.memory)
        ready = sampling.done
        later = self.method.update(rows, sampling, prediction)
        nfe = sampling.costs.nfe + 1  # the loop counts and ends no method but the outer one
        costs = later.costs._replace(nfe=nfe)
        later = later._replace(costs=costs, done=later.done | (nfe >= self.most))
        sampling = engine.where(ready, sampling, later)

        def ask() -> tuple[jax.Array, jax.Array, Asked]:
            asked = self._asked(problem, sampling.image)
            begun = self.doubting.init(asked)
            before = begun._replace(z=state.z, t=state.t, memory=asking)
            after = self.doubting.update(asked, before, prediction)
            after = engine.where(ready, after, begun)
            memory = engine.where(self._over(asking), before, after).memory
            return *self._next(sampling, after), memory

        def wait() -> tuple[jax.Array, jax.Array, Asked]:
            return sampling.z, sampling.t, asking

        z, t, asking = jax.lax.cond(sampling.done.any(), ask, wait)
        over = walk.grouped(self._over(asking), self.samples).all(axis=1) & ~state.done
        doubt = jnp.where(rows.editable, asking.doubt, 0).sum(axis=(1, 2))
        known = engine.is_finite(sampling.image) & jnp.isfinite(doubt)
        doubt = walk.grouped(jnp.where(known, doubt, jnp.inf), self.samples)
        image, costs = walk.grouped((sampling.image, sampling.costs), self.samples)
        nbe, nve = (part.sum(axis=1, dtype=jnp.int32) for part in (costs.nbe, costs.nve))
        return state._replace(
            z=z,
            t=t,
            image=by_sample(over, walk.pick(image, doubt.argmin(axis=1)), state.image),
            iteration=state.iteration + over.astype(jnp.int32),
            done=state.done | over,
            costs=state.costs._replace(nbe=nbe, nve=nve),
            memory=walk.grouped(Memory(sampling, asking), self.samples),
        )

    def _over(self, asking: Asked) -> jax.Array:
        """Bool [R], whether all has been asked about a sample."""
        return asking.step >= self.doubting.evaluations

    def _asked(self, problem: Problem, image: jax.Array) -> Problem:
        """The samples [R, H, W, C] as problems; those of one have the same parts and noise."""
        keys = walk.fresh_keys(problem.keys, 0, jnp.uint32(walk.LAST_KEY))
        keys = jnp.repeat(keys, self.samples)
        return Problem(keys, image, jnp.repeat(problem.editable, self.samples, axis=0))

    def _next(self, sampling: State, asking: State) -> tuple[jax.Array, jax.Array]:
        """What the network sees next, and at which levels: of a sample that is there, what asks."""
        made = sampling.done
        return by_sample(made, asking.z, sampling.z), by_sample(made, asking.t, sampling.t)
