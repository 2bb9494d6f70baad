"""Depth-first search: a pass that goes some steps back wherever a score is too low.

At evenly spaced checks of the pass a verifier scores the predicted clean image. Below the check's
threshold, the sample gets back the noise of ``jump`` steps ago and goes on from there with fresh
draws. When it has gone back as often as it may, the best of what it has ever had at a check goes on
instead. Samples that are easy cost little more than a pass, hard ones up to the budget.

Source: Zhang and others, arXiv 2505.23614, depth-first search without gradients. There all patches
have the same noise level; here a sample goes back along the schedule of its pass, so that patches
that had not started wait again.
"""

import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ipr_jax.core import Prediction, check
from ipr_jax.methods import engine, walk
from ipr_jax.methods.engine import Problem, State, by_sample
from ipr_jax.methods.scores import Verifier
from ipr_jax.methods.walk import Walk
from ipr_jax.sampling import FIRST_PASS, Sampling, schedule
from ipr_jax.sampling import step as steps
from ipr_jax.sampling.step import PassState


@dataclasses.dataclass(frozen=True, kw_only=True)
class Backtracking:
    """A pass with backtracking.

    Attributes:
        verifier: scores the predicted clean images.
        threshold: the least score that goes on, for all checks or one for each of them, the last
            of which sees the finished image; scores grow along a pass.
        sampling: of the pass.
        checks: in a pass, at least 1; where it has fewer steps, after every step.
        jump: steps from a check that failed to where the sample goes on, at least 1.
        backtracks: how often a sample may go back, at least 0.

    Raises:
        ValueError: a value is out of range or of another type, naming it and what is valid.
    """

    verifier: Verifier
    threshold: float | tuple[float, ...]
    sampling: Sampling = FIRST_PASS
    checks: int = 8
    jump: int = 20
    backtracks: int = 4

    start = "search"
    """What iteration 0 is, for tables and pictures."""

    passes = 1
    """Iterations, of which the pass with all that it goes back is one."""

    def __post_init__(self) -> None:
        walk.check_verifier("verifier", self.verifier)
        check.instance("sampling", self.sampling, Sampling)
        check.count("checks", self.checks)
        check.count("jump", self.jump)
        check.count("backtracks", self.backtracks, least=0)
        given = self.threshold if isinstance(self.threshold, tuple | list) else [self.threshold]
        if len(given) not in (1, self.checks):
            raise ValueError(
                f"threshold must be one number or one for each of {self.checks} checks, "
                f"got {len(given)}"
            )
        for value in given:
            check.number("threshold", value, lambda v: not np.isnan(v), "a number")

    def budget(self, grid: tuple[int, ...]) -> int:
        """Network evaluations that no sample exceeds."""
        plan = self.sampling.settings(grid[0] * grid[1]).plan
        return int(plan.num_steps.max()) + self.backtracks * (self.jump + 1)

    def on(self, grid: tuple[int, ...]) -> "DepthFirst":
        """The method for a grid of patches (h, w)."""
        return DepthFirst(
            walk=Walk.of(self.sampling, grid),
            verifier=self.verifier,
            thresholds=jnp.broadcast_to(jnp.asarray(self.threshold, jnp.float32), (self.checks,)),
            jump=jnp.int32(self.jump),
            backtracks=jnp.int32(self.backtracks),
        )


class Memory(NamedTuple):
    """Where a sample is, and the best that it has had after every check. E checks.

    Attributes:
        start: int32 [B, h, w], the step at which each patch started.
        step: int32 [B], steps that are done.
        used: int32 [B], how often it has gone back.
        best: float32 [B, E], scores.
        best_z: float32 [B, E, H, W, C], the images after the step.
        best_start: int32 [B, E, h, w], likewise.
    """

    start: jax.Array
    step: jax.Array
    used: jax.Array
    best: jax.Array
    best_z: jax.Array
    best_start: jax.Array


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["walk", "verifier", "thresholds", "jump", "backtracks"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class DepthFirst:
    """The method for a grid; ``Backtracking.on`` makes it.

    Attributes:
        walk: the pass.
        verifier: scores the predicted clean images.
        thresholds: float32 [E].
        jump: int32 scalar.
        backtracks: int32 scalar.
    """

    walk: Walk
    verifier: Verifier
    thresholds: jax.Array
    jump: jax.Array
    backtracks: jax.Array

    def init(self, problem: Problem) -> State:
        """Before the first step of the pass."""
        begun, zeros = self.walk.begin(problem), jnp.zeros(problem.keys.shape, jnp.int32)
        t = schedule.levels(self.walk.plan(problem.editable), begun.start, 0)
        number, checks = zeros.shape[0], len(self.thresholds)
        memory = Memory(
            start=begun.start,
            step=zeros,
            used=zeros,
            best=jnp.full((number, checks), -jnp.inf, jnp.float32),
            best_z=jnp.zeros((number, checks, *begun.z.shape[1:]), jnp.float32),
            best_start=jnp.zeros((number, checks, *t.shape[1:]), jnp.int32),
        )
        return engine.begin(problem, begun.z, t, memory)

    def update(self, problem: Problem, state: State, prediction: Prediction) -> State:
        """A step on; at a check, perhaps some steps back."""
        memory, plan = state.memory, self.walk.plan(problem.editable)
        before = PassState(state.z, memory.start)
        after, _ = self.walk.move(problem, before, memory.step, state.costs.nfe, prediction)
        length = jnp.maximum(plan.num_steps, 1)
        passed = (memory.step + 1) * len(self.thresholds) // length
        checked = (passed > memory.step * len(self.thresholds) // length) & ~state.done
        state = state._replace(
            z=after.z,
            costs=state.costs._replace(nve=state.costs.nve + checked.astype(jnp.int32)),
            memory=memory._replace(start=after.start, step=memory.step + 1),
        )
        image = steps.clean(before.z, state.t, prediction)
        level = by_sample(memory.step + 1 >= plan.num_steps, jnp.zeros_like(state.t), state.t)
        state = jax.lax.cond(
            checked.any(),
            partial(self._check, problem),
            lambda state, *_: state,
            *(state, checked, passed - 1, image, level, prediction),
        )
        memory = state.memory
        state = state._replace(t=schedule.levels(plan, memory.start, memory.step))
        over = memory.step >= plan.num_steps
        return walk.finish(state, over, 1, self.verifier, prediction)

    def _check(
        self,
        problem: Problem,
        state: State,
        checked: jax.Array,
        which: jax.Array,
        image: jax.Array,
        level: jax.Array,
        prediction: Prediction,
    ) -> State:
        """Score samples that are at a check, and take back those that fail."""
        memory, each = state.memory, jnp.arange(len(which))
        score = walk.score_where(self.verifier, checked, image, level, prediction)
        which = jnp.maximum(which, 0)
        better = checked & (score >= memory.best[each, which])

        def kept(best: jax.Array, now: jax.Array) -> jax.Array:
            return best.at[each, which].set(by_sample(better, now, best[each, which]))

        best = kept(memory.best, score)
        best_z = kept(memory.best_z, state.z)
        best_start = kept(memory.best_start, memory.start)

        failed = checked & (score < self.thresholds[which])
        back = failed & (memory.used < self.backtracks)
        to = jnp.where(back, jnp.maximum(memory.step - 1 - self.jump, 0), memory.step)
        here = PassState(state.z, memory.start)
        again = self.walk.rewind(problem, here, memory.step, to, state.costs.nfe)
        best_here = PassState(best_z[each, which], best_start[each, which])
        z, start = jax.tree.map(partial(by_sample, failed & ~back), best_here, again)
        used = memory.used + back.astype(jnp.int32)
        return state._replace(z=z, memory=Memory(start, to, used, best, best_z, best_start))
