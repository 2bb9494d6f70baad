"""Search over paths: several samples go on, back by fresh noise, and on again; the best stay.

Some seeds go along a pass. Then, round after round, the best of what there is are kept, each is
copied, every copy goes back by a share of the pass, where noise of its own makes it another, and on
to the place of the next choice. ``Paths`` chooses at places that move from the middle of the pass
to its end (search over paths); ``Cycles`` finishes the pass every time, chooses among old and new,
and goes back by different shares at once, so that how far back is best need not be known.

Levels are those of the schedule of the pass. With ``overlap=1``, all patches have one level and the
shares are noise levels, as in the papers; else those patches wait again that had not started.

Sources: Ma and others, arXiv 2501.09732, search over paths; Lee and others, arXiv 2505.14036, the
bidirectional cycles. There, seeds are denoised before they are copied; here the network sees the
same number of rows all the time, and all of them are seeds.
"""

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ipr_jax.core import Prediction, check
from ipr_jax.methods import engine, walk
from ipr_jax.methods.engine import FOREVER, Problem, State, by_sample
from ipr_jax.methods.scores import Verifier
from ipr_jax.methods.walk import Walk
from ipr_jax.sampling import FIRST_PASS, Sampling, schedule
from ipr_jax.sampling import step as steps
from ipr_jax.sampling.step import PassState

LOWEST = np.finfo(np.float32).min
"""The score of a sample that a verifier cannot tell: still above none at all."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Paths:
    """Search over paths.

    Attributes:
        verifier: scores the predicted clean images.
        sampling: of the pass; may be deterministic.
        keep: samples that stay after a round, at least 1.
        branches: copies of each, at least 1.
        rounds: choices after the first one, at least 1.
        first: the share of the pass before the first choice, in (0, 1]; from there the choices
            move evenly to its end.
        back: the share of the pass that is undone after a choice, in [0, 1].
        by_seed: whether the best copy of each seed is kept; else the best of all.

    Raises:
        ValueError: a value is out of range or of another type, naming it and what is valid.
    """

    verifier: Verifier
    sampling: Sampling = FIRST_PASS
    keep: int = 2
    branches: int = 2
    rounds: int = 4
    first: float = 0.5
    back: float = 0.25
    by_seed: bool = True

    start = "first choice"
    """What iteration 0 is, for tables and pictures."""

    def __post_init__(self) -> None:
        _check(self)
        check.count("rounds", self.rounds)
        check.number("first", self.first, lambda value: 0 < value <= 1, "in (0, 1]")
        check.number("back", self.back, lambda value: 0 <= value <= 1, "in [0, 1]")
        if self.back == 0 and self.branches > 1:
            walk.check_noisy(self.sampling, "copies that do not go back would stay equal")

    @property
    def passes(self) -> int:
        """Choices."""
        return self.rounds + 1

    def budget(self, grid: tuple[int, ...]) -> int:
        """Network evaluations of the samples that take most."""
        return self.on(grid).cost(self.rounds)

    def on(self, grid: tuple[int, ...]) -> "Rounds":
        """The method for a grid of patches (h, w)."""
        return _rounds(self, grid, self.first, (self.back,), self.by_seed, None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cycles:
    """Cycles between finished samples and noisy ones.

    Attributes:
        verifier: scores the finished images.
        sampling: of the pass; may be deterministic.
        keep: samples that stay after a round, at least 1.
        branches: copies of each, at least 1.
        rounds: at most so many after the first pass, at least 0.
        back: shares of the pass that are undone, in (0, 1]; the copies of a sample take turns.
        patience: a sample is done when nothing new was kept in so many rounds, at least 1; None =
            it has all rounds.

    Raises:
        ValueError: a value is out of range or of another type, naming it and what is valid.
    """

    verifier: Verifier
    sampling: Sampling = FIRST_PASS
    keep: int = 2
    branches: int = 2
    rounds: int = 4
    back: tuple[float, ...] = (0.25, 0.5)
    patience: int | None = None

    start = "search"
    """What iteration 0 is, for tables and pictures."""

    def __post_init__(self) -> None:
        _check(self)
        check.count("rounds", self.rounds, least=0)
        if not isinstance(self.back, tuple | list) or not self.back:
            raise ValueError(f"back must be a tuple of at least one share, got {self.back}")
        for share in self.back:
            check.number("back", share, lambda value: 0 < value <= 1, "in (0, 1]")
        if len(self.back) > self.branches:
            raise ValueError(
                f"back must be at most one share for each of {self.branches} branches, "
                f"got {len(self.back)}"
            )
        if self.patience is not None:
            check.count("patience", self.patience)

    @property
    def passes(self) -> int:
        """The first pass and the rounds."""
        return self.rounds + 1

    def budget(self, grid: tuple[int, ...]) -> int:
        """Network evaluations that no sample exceeds."""
        return self.on(grid).cost(self.rounds)

    def on(self, grid: tuple[int, ...]) -> "Rounds":
        """The method for a grid of patches (h, w)."""
        return _rounds(self, grid, 1.0, tuple(self.back), False, self.patience or FOREVER)


def _check(config: Paths | Cycles) -> None:
    walk.check_verifier("verifier", config.verifier)
    check.instance("sampling", config.sampling, Sampling)
    check.count("keep", config.keep)
    check.count("branches", config.branches)


def _rounds(
    config: Paths | Cycles,
    grid: tuple[int, ...],
    first: float,
    back: tuple[float, ...],
    by_seed: bool,
    patience: int | None,
) -> "Rounds":
    """The method of a configuration; ``patience`` None = old ones are not kept."""
    steps = np.asarray(config.sampling.settings(grid[0] * grid[1]).plan.num_steps)
    shares = np.resize(back, config.branches)
    undone = np.rint(np.outer(steps, shares))
    return Rounds(
        walk=Walk.of(config.sampling, grid),
        verifier=config.verifier,
        firsts=jnp.asarray(np.clip(np.rint(first * steps), 1, None), jnp.int32),
        backs=jnp.asarray(np.where(shares > 0, np.maximum(undone, 1), 0), jnp.int32),
        rounds=jnp.int32(config.rounds),
        patience=jnp.int32(patience or 0),
        keep=config.keep,
        by_seed=by_seed,
        keeps_old=patience is not None,
    )


class Kept(NamedTuple):
    """The best finished samples, best first. N of them.

    Attributes:
        z: float32 [B, N, H, W, C].
        start: int32 [B, N, h, w], the step at which each patch started.
        score: float32 [B, N].
    """

    z: jax.Array
    start: jax.Array
    score: jax.Array


class Memory(NamedTuple):
    """Where the particles are.

    Attributes:
        start: int32 [B, p, h, w], the step at which each patch started.
        step: int32 [B, p], steps that are done.
        streak: int32 [B], rounds in a row in which nothing new was kept.
        kept: the old ones; None where they are not kept.
    """

    start: jax.Array
    step: jax.Array
    streak: jax.Array
    kept: Kept | None


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["walk", "verifier", "firsts", "backs", "rounds", "patience"],
    meta_fields=["keep", "by_seed", "keeps_old"],
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Rounds:
    """The method for a grid of P patches; ``Paths.on`` and ``Cycles.on`` make it.

    Attributes:
        walk: the pass.
        verifier: scores the predicted clean images.
        firsts: int32 [P + 1], steps before the first choice, by the number of editable patches.
        backs: int32 [P + 1, branches], steps that each copy goes back.
        rounds: int32 scalar.
        patience: int32 scalar.
        keep: samples that stay.
        by_seed: whether one copy of each seed stays.
        keeps_old: whether the old ones may stay, too.
    """

    walk: Walk
    verifier: Verifier
    firsts: jax.Array
    backs: jax.Array
    rounds: jax.Array
    patience: jax.Array
    keep: int
    by_seed: bool
    keeps_old: bool

    @property
    def number(self) -> int:
        """Particles."""
        return self.keep * self.backs.shape[1]

    def target(self, length: Any, size: Any, number: Any, xp: Any = jnp) -> Any:
        """The step of choice ``number``, from 0, of passes of ``length`` steps: int32, as them."""
        first = xp.minimum(xp.asarray(self.firsts)[size], length)
        return first + (length - first) * number // xp.maximum(xp.asarray(self.rounds), 1)

    def cost(self, rounds: int) -> int:
        """Network evaluations that no problem exceeds; on the host."""
        length = np.asarray(self.walk.settings.plan.num_steps)
        choices = np.arange(rounds + 1, dtype=np.int32)[:, None]
        target = self.target(length, np.arange(len(length)), choices, np)
        begun = np.maximum(target[:-1] - np.asarray(self.backs).max(axis=1), 0)
        total = target[0] + np.maximum(target[1:] - begun, 1).sum(axis=0)
        return self.number * int(total.max())

    def init(self, problem: Problem) -> State:
        """Before the first step of the seeds."""
        rows = walk.particles(problem, self.number)
        begun = self.walk.begin(rows)
        t = schedule.levels(self.walk.plan(rows.editable), begun.start, 0)
        zeros = jnp.zeros(problem.keys.shape, jnp.int32)
        z, start = walk.grouped((begun.z, begun.start), self.number)
        kept = None
        if self.keeps_old:
            none = jnp.full((len(zeros), self.keep), -jnp.inf, jnp.float32)
            kept = Kept(z[:, : self.keep], start[:, : self.keep], none)
        memory = Memory(start, jnp.zeros(start.shape[:2], jnp.int32), zeros, kept)
        return engine.begin(problem, begun.z, t, memory)

    def update(self, problem: Problem, state: State, prediction: Prediction) -> State:
        """A step on, for those that are not yet where the next choice is."""
        rows, memory = walk.particles(problem, self.number), state.memory
        plan = self.walk.plan(rows.editable)
        step, before = memory.step.reshape(-1), PassState(state.z, walk.flat(memory.start))
        size = problem.editable.sum(axis=(1, 2))
        length = walk.grouped(plan.num_steps, self.number)[:, 0]
        target = self.target(length, size, state.iteration)
        going = step < jnp.repeat(target, self.number)
        count = jnp.repeat(state.costs.nfe // self.number, self.number)
        moved, _ = self.walk.move(rows, before, step, count, prediction)
        after = jax.tree.map(partial(by_sample, going), moved, before)
        step = step + going.astype(jnp.int32)
        there = (walk.grouped(step, self.number) >= target[:, None]).all(axis=1) & ~state.done
        given = (state, after, step, there, size, prediction)
        return jax.lax.cond(
            there.any(), partial(self._choose, problem, rows), partial(self._go_on, rows), *given
        )

    def _go_on(
        self, rows: Problem, state: State, after: PassState, step: jax.Array, *_: Any
    ) -> State:
        """Nobody is at a choice."""
        return state._replace(
            z=after.z,
            t=schedule.levels(self.walk.plan(rows.editable), after.start, step),
            memory=state.memory._replace(
                start=walk.grouped(after.start, self.number), step=walk.grouped(step, self.number)
            ),
        )

    def _choose(
        self,
        problem: Problem,
        rows: Problem,
        state: State,
        after: PassState,
        step: jax.Array,
        there: jax.Array,
        size: jax.Array,
        prediction: Prediction,
    ) -> State:
        """Keep the best of the particles that are at a choice, copy them and send them back."""
        memory, number, branches = state.memory, self.number, self.backs.shape[1]
        length = self.walk.plan(rows.editable).num_steps
        finished = step >= length
        image = by_sample(finished, after.z, steps.clean(state.z, state.t, prediction))
        level = by_sample(finished, jnp.zeros_like(state.t), state.t)
        asked = jnp.repeat(there, number)
        score = walk.score_where(self.verifier, asked, image, level, prediction)
        score = jnp.maximum(score, LOWEST)
        score, image, z, start = walk.grouped((score, image, after.z, after.start), number)
        all_, kept, streak = Kept(z, start, score), memory.kept, memory.streak
        if kept is not None:  # before the new ones, so that equals do not replace them
            image = jnp.concatenate([kept.z, image], axis=1)
            all_ = jax.tree.map(lambda *each: jnp.concatenate(each, axis=1), kept, all_)
        if self.by_seed:
            best = score.reshape(-1, self.keep, branches).argmax(axis=2).astype(jnp.int32)
            best = best + branches * jnp.arange(self.keep, dtype=jnp.int32)[None]
        else:
            best = jax.lax.top_k(all_.score, self.keep)[1]
        if kept is not None:
            streak = jnp.where((best < self.keep).all(axis=1), streak + 1, 0)
            streak = by_sample(there, streak, memory.streak)
            kept = jax.tree.map(partial(by_sample, there), walk.pick(all_, best), kept)

        parents = walk.flat(walk.pick(all_, jnp.repeat(best, branches, axis=1)))
        to = jnp.maximum(step - jnp.tile(self.backs[size], (1, self.keep)).reshape(-1), 0)
        count = jnp.repeat(state.costs.nfe // number, number)
        again = self.walk.rewind(rows, PassState(parents.z, parents.start), step, to, count)
        after = jax.tree.map(partial(by_sample, asked), again, after)
        iteration = state.iteration + there.astype(jnp.int32)
        done = iteration > self.rounds
        if kept is not None:
            done = done | (streak >= self.patience)
        state = state._replace(
            image=by_sample(there, walk.pick(image, all_.score.argmax(axis=1)), state.image),
            iteration=iteration,
            done=state.done | (there & done),
            costs=state.costs._replace(nve=state.costs.nve + number * there.astype(jnp.int32)),
            memory=memory._replace(streak=streak, kept=kept),
        )
        return self._go_on(rows, state, after, jnp.where(asked, to, step))
