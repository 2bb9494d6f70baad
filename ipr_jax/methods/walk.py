"""The first pass from noise, for methods that search their way through it.

Where such a method is in the pass follows from the step and from the steps at which the patches
started (``step.PassState``); so it can go back to any step by noise alone.

What the first pass of ``ipr.Refinement`` draws, a walk draws from the same keys, those of iteration
0, except that the noise of a step is folded with how many evaluations came before it: a step that
is made twice has different noise. A walk that never goes back is that first pass, bit for bit.

Shapes: R = B p rows for p particles of each of B problems, problem by problem.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from ipr_jax.core import Prediction, check, patches
from ipr_jax.core import keys as random_keys
from ipr_jax.methods.engine import Problem, State, by_sample
from ipr_jax.methods.scores import Verifier, evaluate
from ipr_jax.sampling import Order, PassPlan, Sampling, Settings, flow, renoise, schedule
from ipr_jax.sampling import step as steps
from ipr_jax.sampling.step import PassState, StepInfo

LAST_KEY = 2**32 - 1
"""The key of particle j > 0 is folded with this minus j, which no iteration reaches, and that of
what guides a particle with this."""


@partial(jax.tree_util.register_dataclass, data_fields=["settings"], meta_fields=["order"])
@dataclasses.dataclass(frozen=True)
class Walk:
    """How a pass is walked; ``Walk.of`` makes it.

    Attributes:
        settings: of the pass.
        order: which waiting patch starts next.
    """

    settings: Settings
    order: Order

    @classmethod
    def of(cls, sampling: Sampling, grid: tuple[int, ...]) -> "Walk":
        """For a grid of patches (h, w)."""
        return cls(jax.tree.map(jnp.asarray, sampling.settings(grid[0] * grid[1])), sampling.order)

    def plan(self, editable: jax.Array) -> PassPlan:
        """The schedule of every row."""
        return schedule.plan_pass(self.settings.plan, editable)

    def begin(self, rows: Problem) -> PassState:
        """Before the first step: noise in all that is editable."""
        own = random_keys.iteration_keys(rows.keys, 0)
        noise = random_keys.normal(own.noise, rows.image.shape[1:])
        return steps.init(renoise(rows.image, rows.editable, noise), self.plan(rows.editable))

    def move(
        self,
        rows: Problem,
        state: PassState,
        step: jax.Array,
        count: jax.Array,
        prediction: Prediction,
    ) -> tuple[PassState, StepInfo]:
        """One step on.

        Args:
            rows: R problems.
            state: of the rows, before the step.
            step: int32 [R], its number.
            count: int32 [R], evaluations before this one.
            prediction: of ``state.z``.
        """
        order_keys, _ = random_keys.split(random_keys.iteration_keys(rows.keys, 0).denoise, 2)
        return steps.move(
            prediction,
            self.plan(rows.editable),
            state,
            step,
            self.noise(rows, count),
            random_keys.uniform(order_keys, state.start.shape[1:]),
            order=self.order,
            stochasticity=self.settings.stochasticity,
            temperature=self.settings.temperature,
        )

    def noise(self, rows: Problem, count: jax.Array) -> jax.Array:
        """That of a step after ``count`` evaluations, int32 [R]: float32 [R, H, W, C]."""
        _, keys = random_keys.split(random_keys.iteration_keys(rows.keys, 0).denoise, 2)
        return random_keys.normal(random_keys.fold(keys, count), rows.image.shape[1:])

    def rewind(
        self, rows: Problem, state: PassState, step: jax.Array, to: jax.Array, count: jax.Array
    ) -> PassState:
        """Back to an earlier step: every patch gets the noise that it lacks there.

        Patches that had not started by then wait again, in fresh noise.

        Args:
            rows: R problems.
            state: of the rows.
            step: int32 [R], the step that they are before.
            to: int32 [R], the step that they will be before; where it is not earlier, they stay.
            count: int32 [R], evaluations before the present one.
        """
        plan = self.plan(rows.editable)
        start = jnp.where(state.start >= to[:, None, None], schedule.WAITING, state.start)
        start = jnp.where((to < step)[:, None, None], start, state.start)
        patch = state.z.shape[1] // start.shape[1]
        s, t = (
            patches.expand(schedule.levels(plan, *place), patch)
            for place in ((state.start, step), (start, to))
        )
        noise = random_keys.normal(fresh_keys(rows.keys, 0, count), state.z.shape[1:])
        return PassState(flow.raise_level(state.z, s, t, noise), start)


def fresh_keys(
    keys: jax.Array, iteration: jax.Array | int, count: jax.Array | int = 0
) -> jax.Array:
    """Keys [R] of what a method draws beside the passes, for every number of evaluations."""
    own = random_keys.iteration_keys(keys, iteration).denoise
    return random_keys.fold(random_keys.fold(own, 2), count)  # a pass has two of its own


def particles(problem: Problem, number: int) -> Problem:
    """Every problem ``number`` times, [B] -> [R]; the first of them has its own key."""
    keys = jnp.repeat(problem.keys, number)
    which = jnp.tile(jnp.arange(number, dtype=jnp.uint32), problem.keys.shape)
    own = random_keys.fold(keys, jnp.uint32(LAST_KEY) - which)
    return Problem(
        jnp.where(which == 0, keys, own),
        jnp.repeat(problem.image, number, axis=0),
        jnp.repeat(problem.editable, number, axis=0),
    )


def grouped(tree: Any, number: int) -> Any:
    """Rows by problem: [R, ...] -> [B, p, ...]."""
    return jax.tree.map(lambda leaf: leaf.reshape(-1, number, *leaf.shape[1:]), tree)


def flat(tree: Any) -> Any:
    """The inverse of ``grouped``: [B, p, ...] -> [R, ...]."""
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), tree)


def pick(tree: Any, index: jax.Array) -> Any:
    """Particles by number, int32 [B] or [B, n]: [B, p, ...] -> [B, ...] or [B, n, ...]."""
    problem = jnp.arange(index.shape[0]).reshape(-1, *(1,) * (index.ndim - 1))
    return jax.tree.map(lambda leaf: leaf[problem, index], tree)


def score_where(
    verifier: Verifier,
    where: jax.Array,
    image: jax.Array,
    level: jax.Array,
    prediction: Prediction,
) -> jax.Array:
    """What a verifier says of rows, float32 [R]; -inf, at no cost, where nobody asks.

    Args:
        verifier: the verifier.
        where: bool [R]; rows elsewhere have no meaning.
        image: float32 [R, H, W, C].
        level: float32 [R, h, w].
        prediction: of the rows.
    """

    def asked(*given: Any) -> jax.Array:
        return evaluate(verifier, *given)

    def silent(*given: Any) -> jax.Array:
        del given
        return jnp.full(where.shape, -jnp.inf, jnp.float32)

    return jax.lax.cond(where.any(), asked, silent, image, level, prediction)


def finish(
    state: State, over: jax.Array, number: int, verifier: Verifier, prediction: Prediction
) -> State:
    """Where the pass is over, the best of the particles is the answer; it ends the iteration.

    Args:
        state: after the last step.
        over: bool [B].
        number: particles of each problem; a single one needs no verifier.
        verifier: scores the finished images.
        prediction: the last one of the rows.
    """
    over = over & ~state.done
    nve, chosen = state.costs.nve, jnp.zeros(over.shape, jnp.int32)
    if number > 1:
        level = jnp.zeros_like(state.t)
        score = score_where(verifier, jnp.repeat(over, number), state.z, level, prediction)
        chosen = grouped(score, number).argmax(axis=1)
        nve = nve + number * over.astype(jnp.int32)
    return state._replace(
        image=by_sample(over, pick(grouped(state.z, number), chosen), state.image),
        iteration=state.iteration + over.astype(jnp.int32),
        done=state.done | over,
        costs=state.costs._replace(nve=nve),
    )


def check_verifier(name: str, verifier: Any, *, differentiable: bool = False) -> None:
    """Refuse what is no verifier, or has no gradient where one is needed.

    Raises:
        ValueError: names the argument and what would be valid.
    """
    if not isinstance(verifier, Verifier):
        raise ValueError(
            f"{name} must be a Verifier, see ipr_jax.methods.scores.verifier; "
            f"got {check.told(verifier)}"
        )
    if differentiable and not verifier.differentiable:
        raise ValueError(f"{name} must be differentiable, as its gradient is taken; got one not so")


def check_noisy(sampling: Sampling, why: str) -> None:
    """Refuse a pass without noise of its own where copies must part.

    Raises:
        ValueError: names the value and says why.
    """
    for name in ("stochasticity", "temperature"):
        value = getattr(sampling, name)
        if not isinstance(value, Tracer) and value == 0:
            raise ValueError(f"{name} of sampling must be above 0, else {why}; got {value}")
