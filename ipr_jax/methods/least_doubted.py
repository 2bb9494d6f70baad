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
from ipr_jax.methods.doubts import PARTS, Doubting
from ipr_jax.methods.engine import Method, Problem, State, by_sample
from ipr_jax.methods.ipr import Refinement

ROUNDS = 2
"""The second of them knows nothing of textures."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LeastDoubted:
    """Several samples of a method, of which the network chooses; no verifier.

    Attributes:
        method: makes each of them; by default a first pass. One that evaluates several images of a
            problem at once is refused.
        samples: of each problem, at least 1. All are evaluated until the last of them is ready.
        parts: into how many each sample is dealt, at least 2 and at most as many as there are
            patches; a sample is asked about by twice as many evaluations.

    Raises:
        ValueError: a value is out of range, naming it and the range.
    """

    method: Any = dataclasses.field(default_factory=lambda: Refinement(iterations=0))
    samples: int = 4
    parts: int = PARTS

    def __post_init__(self) -> None:
        check.count("samples", self.samples)
        check.count("parts", self.parts, least=2)

    @property
    def start(self) -> str:
        """What iteration 0 is, for tables and pictures."""
        return "best of samples"

    @property
    def passes(self) -> int:
        """Over every sample: the only one."""
        return 1

    def budget(self, grid: tuple[int, ...]) -> int:
        """Network evaluations that no sample exceeds."""
        asking = Doubting(self.parts, ROUNDS).evaluations
        return self.samples * (self.method.budget(grid) + asking)

    def least_budget(self, grid: tuple[int, ...]) -> int:
        """The smallest budget: before all have been asked about, there is no answer."""
        return self.budget(grid)

    def on(self, grid: tuple[int, ...]) -> "Contest":
        """The method for a grid of patches (h, w).

        Raises:
            ValueError: the grid has fewer patches than there are parts.
        """
        check.count("parts", self.parts, least=2, below=grid[0] * grid[1] + 1)
        return Contest(self.method.on(grid), Doubting(self.parts, ROUNDS), self.samples)


class Memory(NamedTuple):
    """Of n samples, [B, n, ...] each.

    Attributes:
        sampling: the state of the method that makes them.
        asking: that of ``Doubting``, without meaning before a sample is there.
    """

    sampling: State
    asking: State


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["method"],
    meta_fields=["doubting", "samples"],
)
@dataclasses.dataclass(frozen=True)
class Contest:
    """The method for a grid; ``LeastDoubted.on`` makes it.

    Attributes:
        method: makes samples.
        doubting: asks about them.
        samples: of each problem.
    """

    method: Method
    doubting: Doubting
    samples: int

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
        memory = walk.grouped(Memory(sampling, asking), self.samples)
        return engine.begin(problem, sampling.z, sampling.t, memory)

    def update(self, problem: Problem, state: State, prediction: Prediction) -> State:
        """Go on with samples that are not ready, and ask about the others."""
        rows = walk.particles(problem, self.samples)
        sampling, asking = walk.flat(state.memory)
        ready = sampling.done
        later = self.method.update(rows, sampling, prediction)
        sampling = engine.where(ready, sampling, later)
        asked = self._asked(problem, sampling.image)
        later = self.doubting.update(asked, asking, prediction)
        asking = engine.where(asking.done, asking, later)
        asking = engine.where(ready, asking, self.doubting.init(asked))

        over = walk.grouped(sampling.done & asking.done, self.samples).all(axis=1) & ~state.done
        doubt = jnp.where(rows.editable, asking.memory.doubt, 0).sum(axis=(1, 2))
        doubt = walk.grouped(jnp.where(jnp.isnan(doubt), jnp.inf, doubt), self.samples)
        image, costs = walk.grouped((sampling.image, sampling.costs), self.samples)
        return state._replace(
            z=by_sample(sampling.done, asking.z, sampling.z),
            t=by_sample(sampling.done, asking.t, sampling.t),
            image=by_sample(over, walk.pick(image, doubt.argmin(axis=1)), state.image),
            iteration=state.iteration + over.astype(jnp.int32),
            done=state.done | over,
            costs=state.costs._replace(nbe=costs.nbe.sum(axis=1), nve=costs.nve.sum(axis=1)),
            memory=walk.grouped(Memory(sampling, asking), self.samples),
        )

    def _asked(self, problem: Problem, image: jax.Array) -> Problem:
        """The samples [R, H, W, C] as problems; those of one have the same parts and noise."""
        keys = walk.fresh_keys(problem.keys, 0, jnp.uint32(walk.LAST_KEY))
        keys = jnp.repeat(keys, self.samples)
        return Problem(keys, image, jnp.repeat(problem.editable, self.samples, axis=0))
