"""Guidance by the gradient of a score, with recurrence: annealed Langevin dynamics.

Every step of a pass goes where the score grows: what the network predicts for level 0 is shifted
along the gradient of a verifier, and the step is made with that prediction. It may be made several
times: its noise is given back and it is made anew (``recur``). A step down with all its noise and
up again is, to first order, a Langevin step at that noise level; so the more of them, the closer
are samples to p(x) exp(strength score), level by level.

The shift is that of the tilted law. By Tweedie's formula the mean image is (z + t^2 S) / (1 - t), S
the gradient of the log density of z, to which the score adds its own with respect to z. That one
goes through the network (``through``), or, at the cost of the verifier alone, takes images to be
normal with unit variance: it is the gradient with respect to the predicted image, times the
variance t^2 / (t^2 + (1 - t)^2) that is left of it.

Sources: Ye and others, arXiv 2409.15761 (training-free guidance); Zhang and others, arXiv
2505.23614, whose proposition 1 is the limit. There the noise that the image implies is left as it
was; here it follows from the shifted image, without which small steps have no limit.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ipr_jax.core import Denoiser, Prediction, check, patches
from ipr_jax.methods import engine, walk
from ipr_jax.methods.engine import Problem, State
from ipr_jax.methods.scores import Verifier, evaluate
from ipr_jax.methods.walk import Walk
from ipr_jax.sampling import FIRST_PASS, Sampling, schedule
from ipr_jax.sampling import step as steps
from ipr_jax.sampling.step import PassState

TINY = np.finfo(np.float32).tiny


@dataclasses.dataclass(frozen=True, kw_only=True)
class Langevin:
    """A guided pass with recurrence.

    Attributes:
        verifier: whose gradient guides; differentiable.
        strength: power of the score's exponential, at least 0; may be traced.
        sampling: of the pass; stochasticity 1 makes a recurrence a Langevin step.
        recurrences: how often every step is made, at least 1.
        ascents: gradients per evaluation, at least 1; each goes its part of the way.
        clip: the largest shift of a patch, as root mean square, above 0.
        through: the network, for gradients through it; None = with respect to the image alone.
        chains: samples of which the best one is the answer, at least 1.
        judge: scores the finished ones; None = ``verifier``. Another one than guides is hard to
            deceive.

    Raises:
        ValueError: a value is out of range or of another type, naming it and what is valid.
    """

    verifier: Verifier
    strength: float = 1.0
    sampling: Sampling = FIRST_PASS
    recurrences: int = 1
    ascents: int = 1
    clip: float = 1.0
    through: Denoiser | None = None
    chains: int = 1
    judge: Verifier | None = None

    start = "search"
    """What iteration 0 is, for tables and pictures."""

    passes = 1
    """Iterations: the pass."""

    def __post_init__(self) -> None:
        walk.check_verifier("verifier", self.verifier, differentiable=True)
        rule = "finite and at least 0"
        check.number("strength", self.strength, lambda v: 0 <= v < np.inf, rule, traced=True)
        check.instance("sampling", self.sampling, Sampling)
        for name in ("recurrences", "ascents", "chains"):
            check.count(name, getattr(self, name))
        check.number("clip", self.clip, lambda value: value > 0, "above 0")
        if self.through is not None:
            check.function("through", self.through, "(z, t) -> Prediction")
            if self.ascents > 1:
                raise ValueError(
                    f"ascents must be 1 for gradients through the network, got {self.ascents}"
                )
        if self.judge is not None:
            walk.check_verifier("judge", self.judge)
            if self.chains == 1:
                raise ValueError("judge chooses between chains: they must be at least 2, got 1")

    def budget(self, grid: tuple[int, ...]) -> int:
        """Network evaluations that no sample exceeds."""
        plan = self.sampling.settings(grid[0] * grid[1]).plan
        return self.chains * self.recurrences * int(plan.num_steps.max())

    def on(self, grid: tuple[int, ...]) -> "Guidance":
        """The method for a grid of patches (h, w)."""
        return Guidance(
            walk=Walk.of(self.sampling, grid),
            verifier=self.verifier,
            judge=self.judge or self.verifier,
            through=None if self.through is None else check.as_pytree(self.through),
            strength=jnp.float32(self.strength),
            clip=jnp.float32(self.clip),
            recurrences=jnp.int32(self.recurrences),
            ascents=self.ascents,
            chains=self.chains,
        )


def guide(
    verifier: Verifier,
    z: jax.Array,
    t: jax.Array,
    prediction: Prediction,
    *,
    strength: jax.Array | float,
    clip: jax.Array | float = np.inf,
    ascents: int = 1,
    through: Denoiser | None = None,
) -> Prediction:
    """A prediction whose clean image is shifted to where a score is higher.

    Args:
        verifier: whose gradient is taken; where it is no number, it counts as 0.
        z: float32 [R, H, W, C].
        t: float32 [R, h, w].
        prediction: of the network, for both.
        strength: power of the score's exponential.
        clip: the largest root mean square of the shift of a patch.
        ascents: gradients, each of which goes its part of the way.
        through: the network, evaluated once more, for one gradient through it.

    Returns:
        The prediction with another velocity; the same where t = 0, and through the network, where
        t = 1.
    """
    patch = z.shape[1] // t.shape[1]
    level, image = patches.expand(t, patch), steps.clean(z, t, prediction)

    def of_image(image: jax.Array) -> jax.Array:
        return evaluate(verifier, image, t, prediction).sum()

    def of_z(z: jax.Array) -> jax.Array:
        found = steps.predict(through, z, t)  # pyright: ignore[reportArgumentType]
        return evaluate(verifier, steps.clean(z, t, found), t, found).sum()

    def uphill(score: Callable[[jax.Array], jax.Array], at: jax.Array) -> jax.Array:
        gradient = jax.grad(score)(at)
        return jnp.where(jnp.isfinite(gradient), gradient, 0)

    if through is None:
        variance = level**2 / (level**2 + (1 - level) ** 2)
        shifted = image
        for _ in range(ascents):
            shifted = shifted + strength * variance / ascents * uphill(of_image, shifted)
        shift = shifted - image
    else:
        noisy = level < 1
        share = level**2 / jnp.where(noisy, 1 - level, 1)
        shift = jnp.where(noisy, strength * share * uphill(of_z, z), 0)
    size = jnp.sqrt(patches.patch_mean((shift**2).mean(axis=3), patch))
    shift = shift * patches.expand(jnp.minimum(1, clip / jnp.maximum(size, TINY)), patch)
    some = level > 0
    velocity = prediction.velocity - jnp.where(some, shift / jnp.where(some, level, 1), 0)
    return prediction._replace(velocity=velocity)


def recur(
    walk: Walk,
    rows: Problem,
    state: PassState,
    step: jax.Array,
    count: jax.Array,
    prediction: Prediction,
    again: jax.Array,
) -> PassState:
    """One step on, and where it is to be made again, its noise back: the levels of before.

    Args:
        walk: the pass.
        rows: R problems.
        state: of the rows, before the step.
        step: int32 [R], its number.
        count: int32 [R], evaluations before this one.
        prediction: of ``state.z``, guided or not.
        again: bool [R].
    """
    moved, _ = walk.move(rows, state, step, count, prediction)

    def back(moved: PassState) -> PassState:
        return walk.rewind(rows, moved, step + 1, jnp.where(again, step, step + 1), count)

    return jax.lax.cond(again.any(), back, lambda moved: moved, moved)


class Memory(NamedTuple):
    """Where the chains of a problem are.

    Attributes:
        start: int32 [B, c, h, w], the step at which each patch started.
        step: int32 [B], steps that are done.
        turn: int32 [B], how often the present one has been made.
    """

    start: jax.Array
    step: jax.Array
    turn: jax.Array


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["walk", "verifier", "judge", "through", "strength", "clip", "recurrences"],
    meta_fields=["ascents", "chains"],
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Guidance:
    """The method for a grid; ``Langevin.on`` makes it.

    Attributes:
        walk: the pass.
        verifier: whose gradient guides.
        judge: scores the finished images of several chains.
        through: the network, or None.
        strength: float32 scalar.
        clip: float32 scalar.
        recurrences: int32 scalar.
        ascents: gradients per evaluation.
        chains: of which the best one is the answer.
    """

    walk: Walk
    verifier: Verifier
    judge: Verifier
    through: Denoiser | None
    strength: jax.Array
    clip: jax.Array
    recurrences: jax.Array
    ascents: int
    chains: int

    def init(self, problem: Problem) -> State:
        """Before the first step of the pass."""
        rows, zeros = walk.particles(problem, self.chains), jnp.zeros(problem.keys.shape, jnp.int32)
        begun = self.walk.begin(rows)
        t = schedule.levels(self.walk.plan(rows.editable), begun.start, 0)
        memory = Memory(walk.grouped(begun.start, self.chains), zeros, zeros)
        return engine.begin(problem, begun.z, t, memory)

    def update(self, problem: Problem, state: State, prediction: Prediction) -> State:
        """A guided step, made again or gone on from."""
        rows, memory = walk.particles(problem, self.chains), state.memory
        plan = self.walk.plan(rows.editable)
        guided = guide(
            self.verifier,
            state.z,
            state.t,
            prediction,
            strength=self.strength,
            clip=self.clip,
            ascents=self.ascents,
            through=self.through,
        )
        again = memory.turn + 1 < self.recurrences
        given = (memory.step, state.costs.nfe // self.chains, again)
        step, count, each = (jnp.repeat(part, self.chains) for part in given)
        before = PassState(state.z, walk.flat(memory.start))
        after = recur(self.walk, rows, before, step, count, guided, each)
        step = memory.step + (~again).astype(jnp.int32)
        turn = jnp.where(again, memory.turn + 1, 0)
        gradients = self.chains * self.ascents
        costs = state.costs._replace(
            nbe=state.costs.nbe + gradients, nve=state.costs.nve + gradients
        )
        state = state._replace(
            z=after.z,
            t=schedule.levels(plan, after.start, jnp.repeat(step, self.chains)),
            costs=costs,
            memory=Memory(walk.grouped(after.start, self.chains), step, turn),
        )
        over = step >= plan.num_steps[:: self.chains]
        return walk.finish(state, over, self.chains, self.judge, prediction)
