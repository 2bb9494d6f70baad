"""Annealed refinement: one evaluation per iteration, of a share of the patches that falls.

An iteration hides some patches behind fresh noise, predicts them all at once from the others, and
keeps the prediction. At first everything is hidden, in the end a tenth, and rather what the network
disagreed with when it saw it last; no first pass is needed. By how much it disagreed, summed over
the patches, tells samples that hold together from others, at no evaluation of its own: the best of
several cycles is kept, and a sample in which nothing is doubted needs no other. What comes out is
an average of what the patches may look like; a finish gives them texture again, by a few steps from
a middle noise level, of all patches at once or first of some and then of the others.

Of a sample's keys of evaluation k, from 0, that of the region chooses what is hidden, that of the
noise hides it, and that of the pass draws the first images and the steps of the finish. The region
of its first evaluation deals out the parts of the finish.

Relatives: MaskGIT (arXiv 2202.04200), remasking samplers (arXiv 2503.00307), informed correctors
(arXiv 2407.21243).
"""

import dataclasses
import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ipr_jax.core import Prediction, check, patches
from ipr_jax.core import keys as random_keys
from ipr_jax.methods import engine, selection
from ipr_jax.methods.engine import INPUT, Problem, State, by_sample
from ipr_jax.methods.selection import INFORMED, Seen, Selection
from ipr_jax.sampling import flow, rank, renoise
from ipr_jax.sampling import step as steps


@dataclasses.dataclass(frozen=True, kw_only=True)
class Annealed:
    """Annealed refinement; the defaults were chosen on Sudoku of 4x4 and 9x9 cells.

    Attributes:
        iterations: evaluations of a cycle, at least 1.
        ratio: the share of the editable patches that the first and the last of them hide, in (0, 1]
            and not rising; in between it falls evenly.
        cycles: how many at most, at least 1; the sample that is doubted least is kept.
        calm: the doubt, summed over the patches, below which a sample needs no other cycle, at
            least 0; 0 = it has them all.
        select: which patches an iteration hides; by default rather those that the network disagreed
            with when it saw them last.
        from_noise: whether all editable patches are noise at first; else the images are given.
        finish_steps: evaluations that each part of the finish takes, at least 0; 0 = no finish.
        finish_level: noise level that they begin from, in (0, 1].
        finish_parts: into how many random parts the patches are dealt out, at least 1; a sample of
            fewer patches has as many parts as patches.
        stochasticity: of the steps of the finish, in [0, 1].

    Raises:
        ValueError: a value is out of range, naming it and the range.
    """

    iterations: int = 40
    ratio: tuple[float, float] = (1.0, 0.1)
    cycles: int = 4
    calm: float = 0.01
    select: Selection = INFORMED
    from_noise: bool = True
    finish_steps: int = 4
    finish_level: float = 0.3
    finish_parts: int = 1
    stochasticity: float = 0.5

    def __post_init__(self) -> None:
        check.count("iterations", self.iterations)
        check.count("cycles", self.cycles)
        if not isinstance(self.ratio, tuple | list) or len(self.ratio) != 2:
            raise ValueError(f"ratio must be two, of the first and the last, got {self.ratio}")
        check.count("finish_steps", self.finish_steps, least=0)
        check.count("finish_parts", self.finish_parts)
        for ratio in self.ratio:
            selection.region_sizes(1, ratio)
        if self.ratio[0] < self.ratio[1]:
            raise ValueError(f"ratio must not rise, got {self.ratio[0]} to {self.ratio[1]}")
        check.number("calm", self.calm, lambda value: 0 <= value < math.inf, "at least 0")
        check.function(
            "select", self.select, "(keys, iteration, grid) -> scores, see selection.Selection"
        )
        check.number("finish_level", self.finish_level, lambda value: 0 < value <= 1, "in (0, 1]")
        check.number("stochasticity", self.stochasticity, lambda v: 0 <= v <= 1, "in [0, 1]")

    @property
    def start(self) -> str:
        """What iteration 0 is, for tables and pictures."""
        return "first guess" if self.from_noise else INPUT

    @property
    def passes(self) -> int:
        """The most iterations, the finish included."""
        return self.cycles * self.iterations + int(self.finish_steps > 0)

    def budget(self, grid: tuple[int, ...]) -> int:
        """Network evaluations that no sample exceeds."""
        del grid
        return self.cycles * self.iterations + self.finish_parts * self.finish_steps

    def on(self, grid: tuple[int, ...]) -> "Annealing":
        """The method for a grid of patches (h, w)."""
        ratios = np.linspace(*self.ratio, self.iterations)
        sizes = [selection.region_sizes(grid[0] * grid[1], ratio) for ratio in ratios]
        levels = np.linspace(self.finish_level, 0, self.finish_steps + 1, dtype=np.float32)
        return Annealing(
            sizes=jnp.asarray(np.stack(sizes)),
            levels=jnp.asarray(levels),
            finish_parts=jnp.int32(self.finish_parts),
            stochasticity=jnp.float32(self.stochasticity),
            calm=jnp.float32(self.calm),
            cycles=self.cycles,
            select=self.select,
            from_noise=self.from_noise,
        )


class Best(NamedTuple):
    """The sample that is doubted least, of those at the end of a cycle.

    Attributes:
        seen: of it.
        doubt: float32 [B], summed over its editable patches.
    """

    seen: Seen
    doubt: jax.Array


class Memory(NamedTuple):
    """What is remembered.

    Attributes:
        seen: of the patches.
        best: None where there is one cycle only.
        step: int32 [B], evaluations that are over.
        finish: int32 [B], with how many of them the finish begins.
    """

    seen: Seen
    best: Best | None
    step: jax.Array
    finish: jax.Array


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["sizes", "levels", "finish_parts", "stochasticity", "calm"],
    meta_fields=["cycles", "select", "from_noise"],
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Annealing:
    """The method for a grid; ``Annealed.on`` makes it.

    Attributes:
        sizes: int32 [T, P + 1], how many of n editable patches an iteration of a cycle hides.
        levels: float32 [F + 1], of the finish of a part, before its steps and after the last.
        finish_parts: int32 scalar.
        stochasticity: float32 scalar.
        calm: float32 scalar.
        cycles: as for ``Annealed``.
        select: as for ``Annealed``.
        from_noise: as for ``Annealed``.
    """

    sizes: jax.Array
    levels: jax.Array
    finish_parts: jax.Array
    stochasticity: jax.Array
    calm: jax.Array
    cycles: int
    select: Selection
    from_noise: bool

    def init(self, problem: Problem) -> State:
        """Before the first evaluation."""
        image, step = problem.image, jnp.zeros(problem.keys.shape, jnp.int32)
        if self.from_noise:
            drawn = random_keys.iteration_keys(problem.keys, 0).denoise
            image = renoise(image, problem.editable, random_keys.normal(drawn, image.shape[1:]))
        seen = selection.nothing_seen(image, problem.editable)
        best = Best(seen, jnp.full(step.shape, jnp.inf, jnp.float32)) if self.cycles > 1 else None
        memory = Memory(seen, best, step, jnp.full_like(step, self.cycles * len(self.sizes)))
        z, t = self._hide(problem, memory)
        return engine.begin(problem, z, t, memory)._replace(image=image)

    def update(self, problem: Problem, state: State, prediction: Prediction) -> State:
        """Keep what was predicted and hide something else; in the finish, move what is noisy."""
        hiding, step = state.memory.step < state.memory.finish, state.memory.step + 1
        patch, hidden, seen = state.z.shape[1] // state.t.shape[1], state.t > 0, state.memory.seen
        guess = steps.clean(state.z, state.t, prediction)
        change = patches.mean_square(guess, seen.image, patch)
        seen = Seen(
            image=guess,
            doubt=jnp.where(hidden, change, seen.doubt),
            sigma=jnp.where(hidden, prediction.sigma, seen.sigma),
            age=jnp.where(hidden, 0, seen.age + 1),
        )
        seen = jax.tree.map(partial(by_sample, hiding), seen, state.memory.seen)
        memory = state.memory._replace(seen=seen, step=step)
        if memory.best is not None:
            memory = self._keep_best(problem, memory, hiding)
        z, t = self._hide(problem, memory)
        over, image = step >= memory.finish, memory.seen.image
        if memory.best is not None:  # the answer so far is that of the best cycle
            known = memory.best.doubt < jnp.inf
            image = by_sample(known, memory.best.seen.image, image)
        if len(self.levels) > 1:
            z, t, moved, over = self._finish(problem, state, prediction, memory, z, t)
            image = by_sample(over, moved, image)
        ended = hiding | over
        return state._replace(
            z=z,
            t=t,
            image=by_sample(ended, image, state.image),
            iteration=state.iteration + ended.astype(jnp.int32),
            done=state.done | over,
            memory=memory,
        )

    def doubts(self, state: State) -> jax.Array:
        """By how much the network doubts each patch of the answer, before the finish, [B, h, w]."""
        best = state.memory.best
        return (state.memory.seen if best is None else best.seen).doubt

    def _keep_best(self, problem: Problem, memory: Memory, hiding: jax.Array) -> Memory:
        """At the end of a cycle, go on from the best so far, or to the finish if it is calm."""
        assert memory.best is not None
        ended = hiding & (memory.step % len(self.sizes) == 0)
        doubt = jnp.where(problem.editable, memory.seen.doubt, 0).sum(axis=(1, 2))
        better = ended & ~(doubt > memory.best.doubt)
        best = jax.tree.map(partial(by_sample, better), Best(memory.seen, doubt), memory.best)
        seen = jax.tree.map(partial(by_sample, ended), best.seen, memory.seen)
        finish = jnp.where(ended & (best.doubt < self.calm), memory.step, memory.finish)
        return Memory(seen, best, memory.step, finish)

    def _finish(
        self,
        problem: Problem,
        state: State,
        prediction: Prediction,
        memory: Memory,
        z: jax.Array,
        t: jax.Array,
    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """Images and levels where it begins or goes on, the images after this step of it, and who
        is through with it.
        """
        begun, length = memory.step - memory.finish, len(self.levels) - 1
        turn, within = jnp.divmod(jnp.maximum(begun, 0), length)
        patch = state.z.shape[1] // state.t.shape[1]
        own = random_keys.iteration_keys(problem.keys, memory.step)
        drawn = random_keys.normal(own.denoise, state.z.shape[1:])
        after = self.levels[jnp.where(within == 0, length, within)][:, None, None]
        level, s = (
            patches.expand(each, patch) for each in (state.t, jnp.where(state.t > 0, after, 0))
        )
        mean = flow.step_mean(state.z, level, s, prediction.velocity, self.stochasticity)
        std = flow.step_std(level, s, self.stochasticity, prediction.variance_fraction)
        moved = renoise(state.z, state.t > 0, mean + std * drawn)

        number = problem.editable.sum(axis=(1, 2), dtype=jnp.int32)
        parts = jnp.minimum(self.finish_parts, number)
        dealt = selection.fresh_regions(problem.keys, memory.finish, problem.editable.shape[1:])
        place = rank(dealt, problem.editable) * parts[:, None, None]
        part = place // jnp.maximum(number, 1)[:, None, None]
        mine = problem.editable & (part == turn[:, None, None])
        t = by_sample(begun < 0, t, jnp.where(mine, self.levels[within][:, None, None], 0))
        whole = by_sample(begun == 0, memory.seen.image, moved)
        noisy = flow.interpolate(whole, drawn, patches.expand(t, patch))
        z = by_sample(begun < 0, z, by_sample(within == 0, noisy, moved))
        return z, t, moved, begun >= parts * length

    def _hide(self, problem: Problem, memory: Memory) -> tuple[jax.Array, jax.Array]:
        """The images with some patches hidden, and the noise levels."""
        image, editable, step = memory.seen.image, problem.editable, memory.step
        scores = selection.ask(
            self.select, problem.keys, step, editable.shape[1:], seen=memory.seen
        )
        sizes = self.sizes[step % len(self.sizes), editable.sum(axis=(1, 2))]
        hidden = selection.choose(scores, editable, sizes)
        noise = selection.fresh_noise(problem.keys, step, image.shape[1:])
        return renoise(image, hidden, noise), hidden.astype(jnp.float32)
