"""Iterative Partial Refinement (arXiv 2605.19317, algorithm 1), as a method of the engine.

A first pass from noise, or a given image; then, over and over: choose a region of each sample,
re-noise it, regenerate it conditioned on the rest.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ipr_jax.core import Prediction, check, patches
from ipr_jax.core import keys as random_keys
from ipr_jax.methods import engine, selection, stopping
from ipr_jax.methods.engine import Problem, State, by_sample
from ipr_jax.methods.selection import Noise, Seen, Selection
from ipr_jax.methods.stopping import Stop
from ipr_jax.sampling import (
    FIRST_PASS,
    REFINEMENT,
    Order,
    PassPlan,
    Sampling,
    Settings,
    flow,
    renoise,
    schedule,
)
from ipr_jax.sampling import step as steps

PARTS = (4, 2, 1)
"""With a stopping rule, the network is compiled for a quarter, a half and all of the slots: the
fewest sizes that waste less than 5% at 8 samples per slot. Without one, one size does."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Refinement:
    """A whole experiment: a first pass, then iterations.

    Attributes:
        iterations: after the first pass, at least 0; with a stopping rule, the most.
        ratio: the share of the editable patches that an iteration regenerates, in (0, 1]; their
            number is floor(ratio n), at least 1. One, or one per iteration, of which the last stays
            to the end; so are the next two.
        level: the noise level that they are raised to, in (0, 1]; 1 = they become noise.
        later: how the iterations sample, all in the same order.
        first: how the first pass samples; None starts from the given images (correction mode).
        select: which patches an iteration regenerates.
        noise: from which noise.
        stop: which samples may leave early.
        patience: how often in a row ``stop`` must hold, at least 1.

    Raises:
        ValueError: a value is out of range or of another type, naming it and what is valid.
    """

    iterations: int = 20
    ratio: float | tuple[float, ...] = 0.25
    level: float | tuple[float, ...] = 1.0
    later: Sampling | tuple[Sampling, ...] = REFINEMENT
    first: Sampling | None = FIRST_PASS
    select: Selection = selection.fresh_regions
    noise: Noise = selection.fresh_noise
    stop: Stop = stopping.never
    patience: int = 1

    def __post_init__(self) -> None:
        check.count("iterations", self.iterations, least=0, traced=True)
        check.count("patience", self.patience, traced=True)
        for ratio in _each(self.ratio):
            selection.region_sizes(1, ratio)
        for level in _each(self.level):
            check.number("level", level, lambda value: 0 < value <= 1, "in (0, 1]")
        if self.first is not None:
            check.instance("first", self.first, Sampling)
        for later in _each(self.later):
            check.instance("later", later, Sampling)
        orders = {later.order for later in _each(self.later)}
        if len(orders) != 1:
            raise ValueError(
                f"later must be one Sampling or several of the same order, got {self.later!r}"
            )
        selection.check_functions(self.select, self.noise)
        check.function(
            "stop",
            self.stop,
            "(iteration, before, after) -> bool, see ipr_jax.methods.stopping",
        )

    @property
    def informed(self) -> bool:
        """Whether a function wants to know what was seen."""
        return any(map(selection.takes_seen, (self.select, self.stop)))

    @property
    def start(self) -> str:
        """What iteration 0 is, for tables and pictures."""
        return engine.INPUT if self.first is None else "first pass"

    @property
    def passes(self) -> int:
        """Over every sample: the first pass, if there is one, and the iterations."""
        return self.iterations + int(self.first is not None)

    @property
    def row_parts(self) -> tuple[int, ...]:
        """Sizes that the network is compiled for, see ``engine.advance``."""
        return (1,) if self.stop is stopping.never else PARTS

    def on(self, grid: tuple[int, ...], *, start: jax.Array | int = 0) -> "IPR":
        """The method for a grid of patches.

        Args:
            grid: (h, w).
            start: iterations already done, if there is no first pass.
        """
        num_patches = grid[0] * grid[1]
        samplings = [self.first or _each(self.later)[0], *_each(self.later)]
        settings = [each.settings(num_patches) for each in samplings]
        sizes = [selection.region_sizes(num_patches, ratio) for ratio in _each(self.ratio)]
        return IPR(
            passes=jax.tree.map(
                lambda *each: jnp.stack([jnp.asarray(part) for part in each]), *settings
            ),
            sizes=jnp.asarray(np.stack(sizes)),
            levels=jnp.asarray(_each(self.level), jnp.float32),
            first=jnp.asarray(start + 1 if self.first is None else 0, jnp.int32),
            iterations=jnp.asarray(self.passes, jnp.int32),
            patience=jnp.asarray(self.patience, jnp.int32),
            orders=(samplings[0].order, samplings[-1].order),
            select=self.select,
            noise=self.noise,
            stop=self.stop,
            informed=self.informed,
        )

    def budget(self, grid: tuple[int, ...]) -> int:
        """Network evaluations that no sample exceeds, at least 1.

        Raises:
            ValueError: the iterations are traced.
        """
        check.count("iterations", self.iterations, least=0)

        num_patches = grid[0] * grid[1]

        def steps(sampling: Sampling, ratio: float) -> int:
            """Of the region that takes most."""
            sizes = selection.region_sizes(num_patches, ratio)
            return int(sampling.settings(num_patches).plan.num_steps[sizes].max())

        laters, ratios = _each(self.later), _each(self.ratio)
        total = 0 if self.first is None else steps(self.first, 1.0)
        for i in range(min(self.iterations, max(len(laters), len(ratios)))):
            often = self.iterations - i if i + 1 >= max(len(laters), len(ratios)) else 1
            later, ratio = laters[min(i, len(laters) - 1)], ratios[min(i, len(ratios) - 1)]
            total += often * steps(later, ratio)
        return max(1, total)


def _each(value: object) -> tuple:
    """One or several values as several."""
    return tuple(value) if isinstance(value, tuple | list) and len(value) else (value,)


GoingOn = Callable[[jax.Array, Seen | None], tuple[jax.Array, Seen | None]]
"""What the next pass begins from, and what is known of it: images float32 [B, H, W, C] and what was
seen when the pass before ended, where it has; of other samples the result is not used."""


class Memory(NamedTuple):
    """Of the pass in work.

    Attributes:
        plan: its schedule.
        start: int32 [B, h, w], the step at which each patch started.
        step: int32 [B], steps that are done.
        streak: int32 [B], how often in a row the stopping rule has held.
        seen: what was seen of the patches; None if nobody asks.
    """

    plan: PassPlan
    start: jax.Array
    step: jax.Array
    streak: jax.Array
    seen: Seen | None


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["passes", "sizes", "levels", "first", "iterations", "patience"],
    meta_fields=["orders", "select", "noise", "stop", "informed"],
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class IPR:
    """The method for a grid; ``Refinement.on`` makes it.

    Attributes:
        passes: settings [1 + K, ...], of the first pass and of the iterations, of which the last
            stays; so do sizes and levels.
        sizes: int32 [K, P + 1], ``selection.region_sizes``.
        levels: float32 [K], noise levels that a region is raised to.
        first: int32 scalar, the number of the first iteration; 0 = a first pass from noise.
        iterations: int32 scalar, how many, the first pass included.
        patience: int32 scalar, how often in a row ``stop`` must hold.
        orders: of the first pass and of the iterations.
        select: which patches an iteration regenerates.
        noise: from which noise.
        stop: which samples may leave early.
        informed: whether a function wants to know what was seen.
    """

    passes: Settings
    sizes: jax.Array
    levels: jax.Array
    first: jax.Array
    iterations: jax.Array
    patience: jax.Array
    orders: tuple[Order, Order]
    select: Selection
    noise: Noise
    stop: Stop
    informed: bool

    def init(self, problem: Problem) -> State:
        """Before the first step of the first pass."""
        zeros = jnp.zeros(problem.keys.shape, jnp.int32)
        seen = None
        if self.informed:
            seen = selection.nothing_seen(problem.image, problem.editable)
        z, t, memory = self._begin(problem, problem.image, zeros, zeros, seen)
        state = engine.begin(problem, z, t, memory)
        return state._replace(done=state.done | (self.iterations < 1))

    def update(
        self,
        problem: Problem,
        state: State,
        prediction: Prediction,
        going_on: GoingOn = lambda *found: found,
    ) -> State:
        """Move every patch along its schedule; where the pass is over, begin the next one.

        ``going_on`` says what that begins from.
        """
        memory, number = state.memory, self.first + state.iteration
        kind = self._row(number, self.passes.stochasticity)
        own = random_keys.iteration_keys(problem.keys, number)
        order_keys, noise_keys = random_keys.split(own.denoise, 2)

        def order(sigma: jax.Array, uniform: jax.Array, t: jax.Array) -> jax.Array:
            first, later = (
                check.returned("what order returns", each(sigma, uniform, t), t.shape, jnp.float32)
                for each in self.orders
            )
            return by_sample(number == 0, first, later)

        moved, levels = steps.move(
            prediction,
            memory.plan,
            steps.PassState(state.z, memory.start),
            memory.step,
            random_keys.normal(random_keys.fold(noise_keys, memory.step), state.z.shape[1:]),
            random_keys.uniform(order_keys, state.t.shape[1:]),
            order=order,
            stochasticity=self.passes.stochasticity[kind],
            temperature=self.passes.temperature[kind],
        )
        memory = memory._replace(start=moved.start, step=memory.step + 1)
        if memory.seen is not None:
            sigma = jnp.where(state.t > 0, prediction.sigma, memory.seen.sigma)
            memory = memory._replace(seen=memory.seen._replace(sigma=sigma))
        state = state._replace(z=moved.z, t=levels.s, memory=memory)
        over = (memory.step >= memory.plan.num_steps) & ~state.done
        return jax.lax.cond(
            over.any(), partial(self._next, problem, going_on), lambda state, _: state, state, over
        )

    def _next(self, problem: Problem, going_on: GoingOn, state: State, over: jax.Array) -> State:
        """End the pass of some samples and begin the next one."""
        memory, number = state.memory, self.first + state.iteration
        seen = memory.seen
        if seen is not None:
            seen = self._look(state, number)
        streak = memory.streak
        if self.stop is not stopping.never:
            widths = tuple(sorted({-(-over.shape[0] // part) for part in PARTS}))
            given = (number, state.image, state.z, *(seen or ()))
            holds = engine.on_rows(self._holds, over, widths, *given, like=over)
            streak = jnp.where(over, jnp.where(holds, streak + 1, 0), streak)
        image = by_sample(over, state.z, state.image)
        iteration = state.iteration + over.astype(jnp.int32)
        done = over & ((iteration >= self.iterations) | (streak >= self.patience))
        origin, seen = going_on(image, seen)
        z, t, begun = self._begin(problem, origin, iteration, streak, seen)
        return state._replace(
            z=by_sample(over, z, state.z),
            t=by_sample(over, t, state.t),
            image=image,
            iteration=iteration,
            done=state.done | done,
            memory=jax.tree.map(partial(by_sample, over), begun, memory),
        )

    def _look(self, state: State, number: jax.Array) -> Seen:
        """What was seen, after a pass. What stood in a patch before the first one is not known."""
        memory = state.memory
        region, patch = memory.plan.region, state.z.shape[1] // state.t.shape[1]
        change = patches.mean_square(state.z, state.image, patch)
        known = region & (number > 0)[:, None, None]
        return Seen(
            image=state.z,
            doubt=jnp.where(known, change, memory.seen.doubt),
            sigma=memory.seen.sigma,
            age=jnp.where(region, 0, memory.seen.age + 1),
        )

    def _holds(
        self, number: jax.Array, before: jax.Array, after: jax.Array, *seen: jax.Array
    ) -> jax.Array:
        """What the stopping rule says."""
        given = Seen(*seen) if seen else None
        found = selection.ask(self.stop, number, before, after, seen=given)
        return check.returned("what stop returns", found, number.shape, jnp.bool_)

    @staticmethod
    def _row(number: jax.Array, table: jax.Array) -> jax.Array:
        """The row of a table, of which the last stays."""
        return jnp.clip(number, 0, len(table) - 1)

    def _begin(
        self,
        problem: Problem,
        image: jax.Array,
        iteration: jax.Array,
        streak: jax.Array,
        seen: Seen | None,
    ) -> tuple[jax.Array, jax.Array, Memory]:
        """Noisy images, noise levels and memory before the first step of a pass."""
        keys, editable = problem.keys, problem.editable
        number = self.first + iteration
        at_first, kind = number == 0, self._row(number, self.passes.stochasticity)
        scores = selection.ask(self.select, keys, number, editable.shape[1:], seen=seen)
        sizes = self.sizes[self._row(number - 1, self.sizes), editable.sum(axis=(1, 2))]
        region = selection.choose(scores, editable, sizes)
        region = by_sample(at_first, editable, region)
        level = jnp.where(at_first, 1, self.levels[self._row(number - 1, self.levels)])
        fresh = random_keys.normal(random_keys.iteration_keys(keys, number).noise, image.shape[1:])
        noise = self.noise(keys, number, image.shape[1:])
        noise = check.returned("what noise returns", noise, image.shape, jnp.float32)
        noise = by_sample(at_first, fresh, noise)
        mixed = by_sample(level < 1, flow.interpolate(image, noise, _pixels(level)), noise)
        size = region.sum(axis=(1, 2))
        tables = (table[kind, size] for table in self.passes.plan)
        plan = PassPlan(region, *tables, level=level)
        begun = steps.init(renoise(image, region, mixed), plan)
        return (
            begun.z,
            schedule.levels(plan, begun.start, 0),
            Memory(plan, begun.start, jnp.zeros_like(iteration), streak, seen),
        )


def _pixels(level: jax.Array) -> jax.Array:
    """Levels [B] in a shape that broadcasts to images."""
    return level[:, None, None, None]
