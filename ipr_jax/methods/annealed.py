"""Annealed refinement: one evaluation per iteration, of a share of the patches that falls.

An iteration hides some patches behind fresh noise, predicts them all at once from the others, and
keeps the prediction. At first everything is hidden, in the end a tenth, and rather what the network
disagreed with when it saw it last; no first pass is needed. What comes out is an average of what
the patches may look like, so a few common steps from a middle noise level give them texture again.

Of a sample's keys of evaluation k, from 0, that of the region chooses what is hidden, that of the
noise hides it, and that of the pass draws the first images and the steps of the finish.

Relatives: MaskGIT (arXiv 2202.04200), remasking samplers (arXiv 2503.00307).
"""

import dataclasses
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
from ipr_jax.sampling import flow, renoise


@dataclasses.dataclass(frozen=True, kw_only=True)
class Annealed:
    """Annealed refinement; the defaults were chosen on 4x4 Sudoku.

    Attributes:
        iterations: evaluations before the finish, at least 1.
        ratio: the share of the editable patches that the first and the last of them hide, in (0, 1]
            and not rising; in between it falls evenly.
        select: which patches an iteration hides; by default rather those that the network disagreed
            with when it saw them last.
        from_noise: whether all editable patches are noise at first; else the images are given.
        finish_steps: evaluations of the finish, at least 0.
        finish_level: noise level that it begins from, in (0, 1].
        stochasticity: of its steps, in [0, 1].

    Raises:
        ValueError: a value is out of range, naming it and the range.
    """

    iterations: int = 40
    ratio: tuple[float, float] = (1.0, 0.1)
    select: Selection = INFORMED
    from_noise: bool = True
    finish_steps: int = 4
    finish_level: float = 0.5
    stochasticity: float = 0.5

    def __post_init__(self) -> None:
        check.count("iterations", self.iterations)
        if not isinstance(self.ratio, tuple | list) or len(self.ratio) != 2:
            raise ValueError(f"ratio must be two, of the first and the last, got {self.ratio}")
        check.count("finish_steps", self.finish_steps, least=0)
        for ratio in self.ratio:
            selection.region_sizes(1, ratio)
        if self.ratio[0] < self.ratio[1]:
            raise ValueError(f"ratio must not rise, got {self.ratio[0]} to {self.ratio[1]}")
        selection.check_functions(self.select)
        check.number("finish_level", self.finish_level, lambda value: 0 < value <= 1, "in (0, 1]")
        check.number("stochasticity", self.stochasticity, lambda v: 0 <= v <= 1, "in [0, 1]")

    @property
    def start(self) -> str:
        """What iteration 0 is, for tables and pictures."""
        return "first guess" if self.from_noise else INPUT

    @property
    def passes(self) -> int:
        """Iterations, the finish included."""
        return self.iterations + int(self.finish_steps > 0)

    def budget(self, grid: tuple[int, ...]) -> int:
        """Network evaluations of every sample."""
        del grid
        return self.iterations + self.finish_steps

    def on(self, grid: tuple[int, ...]) -> "Annealing":
        """The method for a grid of patches (h, w)."""
        ratios = np.linspace(*self.ratio, self.iterations)
        sizes = [selection.region_sizes(grid[0] * grid[1], ratio) for ratio in ratios]
        levels = np.linspace(self.finish_level, 0, self.finish_steps + 1, dtype=np.float32)
        return Annealing(
            sizes=jnp.asarray(np.stack(sizes)),
            levels=jnp.asarray(levels),
            stochasticity=jnp.float32(self.stochasticity),
            select=self.select,
            from_noise=self.from_noise,
        )


class Memory(NamedTuple):
    """What is remembered.

    Attributes:
        seen: of the patches.
        step: int32 [B], evaluations that are over.
    """

    seen: Seen
    step: jax.Array


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["sizes", "levels", "stochasticity"],
    meta_fields=["select", "from_noise"],
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Annealing:
    """The method for a grid; ``Annealed.on`` makes it.

    Attributes:
        sizes: int32 [T, P + 1], how many of n editable patches an iteration hides.
        levels: float32 [F + 1], of the finish, before its steps and after the last.
        stochasticity: float32 scalar.
        select: as for ``Annealed``.
        from_noise: as for ``Annealed``.
    """

    sizes: jax.Array
    levels: jax.Array
    stochasticity: jax.Array
    select: Selection
    from_noise: bool

    def init(self, problem: Problem) -> State:
        """Before the first evaluation."""
        image, step = problem.image, jnp.zeros(problem.keys.shape, jnp.int32)
        if self.from_noise:
            drawn = random_keys.iteration_keys(problem.keys, 0).denoise
            image = renoise(image, problem.editable, random_keys.normal(drawn, image.shape[1:]))
        memory = Memory(selection.nothing_seen(image, problem.editable), step)
        z, t = self._hide(problem, memory)
        return engine.begin(problem, z, t, memory)._replace(image=image)

    def update(self, problem: Problem, state: State, prediction: Prediction) -> State:
        """Keep what was predicted and hide something else; in the finish, move all together."""
        number, length = len(self.sizes), len(self.levels) - 1
        hiding, step = state.memory.step < number, state.memory.step + 1
        patch = state.z.shape[1] // state.t.shape[1]
        hidden, level = state.t > 0, patches.expand(state.t, patch)
        guess = renoise(state.image, hidden, flow.clean_image(state.z, level, prediction.velocity))
        change = patches.patch_mean(((guess - state.image) ** 2).mean(axis=3), patch)
        looked, before = hidden & hiding[:, None, None], state.memory.seen
        seen = Seen(
            image=guess,
            doubt=jnp.where(looked, change, before.doubt),
            sigma=jnp.where(looked, prediction.sigma, before.sigma),
            age=jnp.where(looked, 0, before.age + 1),
        )
        memory = Memory(seen, step)
        if not length:
            z, t = self._hide(problem, memory)
            return self._after(state, z, t, guess, memory, hiding, step >= number)
        # The finish: the level after this step, of everything editable.
        after = self.levels[jnp.clip(step - number, 0, length)][:, None, None]
        s = jnp.where(problem.editable, after, 0)
        s_pixel = patches.expand(s, patch)
        own = random_keys.iteration_keys(problem.keys, step)
        drawn = random_keys.normal(own.denoise, state.z.shape[1:])
        mean = flow.step_mean(state.z, level, s_pixel, prediction.velocity, self.stochasticity)
        std = flow.step_std(level, s_pixel, self.stochasticity, prediction.variance_fraction)
        moved = renoise(state.z, hidden, mean + std * drawn)
        begun = flow.interpolate(guess, drawn, s_pixel)
        z, t = self._hide(problem, memory)
        z = by_sample(step < number, z, by_sample(step == number, begun, moved))
        t = by_sample(step < number, t, s)
        over = step >= number + length
        image = by_sample(hiding, guess, by_sample(over, moved, state.image))
        return self._after(state, z, t, image, memory, hiding | over, over)

    def _after(
        self,
        state: State,
        z: jax.Array,
        t: jax.Array,
        image: jax.Array,
        memory: Memory,
        ended: jax.Array,
        done: jax.Array,
    ) -> State:
        iteration = state.iteration + ended.astype(jnp.int32)
        return state._replace(
            z=z, t=t, image=image, iteration=iteration, done=state.done | done, memory=memory
        )

    def _hide(self, problem: Problem, memory: Memory) -> tuple[jax.Array, jax.Array]:
        """The images with some patches hidden, and the noise levels."""
        image, editable, step = memory.seen.image, problem.editable, memory.step
        scores = selection.ask(
            self.select, problem.keys, step, editable.shape[1:], seen=memory.seen
        )
        row = jnp.minimum(step, len(self.sizes) - 1)
        hidden = selection.choose(scores, editable, self.sizes[row, editable.sum(axis=(1, 2))])
        noise = selection.fresh_noise(problem.keys, step, image.shape[1:])
        return renoise(image, hidden, noise), hidden.astype(jnp.float32)
