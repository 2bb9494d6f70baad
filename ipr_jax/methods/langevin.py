"""Local search inside of any method: guidance by the gradient of a score, with recurrence.

Whatever the method does with an evaluation, it does with a prediction that is shifted to where the
score grows. Before it does, the levels at which the network was asked may be visited several times:
a share of their noise is taken off by the guided prediction and given back afresh (``recur``). That
is, to first order, a Langevin step at those levels; so the more of them and the smaller the share,
the closer are samples to p(x) exp(strength score), level by level. Around a plain pass it is
annealed Langevin dynamics, around several of which the best is chosen, a local verifier inside and
a global one outside, and around BFS or DFS local search inside of global search.

The shift is that of the tilted law. By Tweedie's formula the mean image is (z + t^2 S) / (1 - t), S
the gradient of the log density of z, to which the score adds its own with respect to z. That one
goes through the network (``through``), or, at the cost of the verifier alone, takes images to be
normal with unit variance: it is the gradient with respect to the predicted image, times the
variance t^2 / (t^2 + (1 - t)^2) that is left of it.

Sources: Ye and others, arXiv 2409.15761 (training-free guidance); Zhang and others, arXiv
2505.23614, whose proposition 1 is the limit. There the noise that the image implies is left as it
was; here it follows from the shifted image, without which small steps have no limit. There a
recurrence takes a step of the schedule off; here it takes a share of any level, as a method may
have no schedule.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ipr_jax.core import Denoiser, Prediction, check, patches
from ipr_jax.core import keys as random_keys
from ipr_jax.methods import engine, walk
from ipr_jax.methods.engine import Costs, Method, Problem, State
from ipr_jax.methods.particles import Particles
from ipr_jax.methods.scores import Verifier, evaluate
from ipr_jax.methods.solving import budget_of, check_method, of_grid
from ipr_jax.sampling import flow
from ipr_jax.sampling import step as steps

TINY = np.finfo(np.float32).tiny
LARGEST = 1e18
"""Shifts are clipped to this size, so that their squares are numbers."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Langevin:
    """A method with local search by the gradient of a score.

    Attributes:
        verifier: whose gradient guides; differentiable.
        method: what is guided, of any kind; by default a single first pass. One that chooses by
            another verifier than guides is less misled by the errors of either.
        strength: power of the score's exponential, at least 0; may be traced.
        recurrences: how often every level is visited, at least 1; those after the first are of
            patches between noise and clean ones, and are left out where there are none.
        depth: the share of its level by which a recurrence takes a patch down, in (0, 1].
        ascents: gradients per evaluation, at least 1; each goes its part of the way.
        smoothing: the score is that of images under noise, of so many standard deviations of what
            the level leaves open, at least 0.
        draws: of that noise, over which the exponential of the score is averaged before it is
            raised to ``strength``, at least 1.
        clip: the largest shift of a patch, as root mean square, above 0.
        through: the network, for gradients through it, whose forward passes ``nfe`` does not count;
            None = with respect to the image alone.

    Raises:
        ValueError: a value is out of range or of another type, naming it and what is valid.
    """

    verifier: Verifier
    method: Any = dataclasses.field(default_factory=partial(Particles, particles=1))
    strength: float = 1.0
    recurrences: int = 1
    depth: float = 0.2
    ascents: int = 1
    smoothing: float = 0.0
    draws: int = 1
    clip: float = 1.0
    through: Denoiser | None = None

    def __post_init__(self) -> None:
        walk.check_verifier("verifier", self.verifier, differentiable=True)
        for name in ("recurrences", "ascents", "draws"):
            check.count(name, getattr(self, name))
        check_method(self.method)
        rule = f"in [0, {LARGEST:.0e}]"
        check.number("strength", self.strength, lambda v: 0 <= v <= LARGEST, rule, traced=True)
        check.number("smoothing", self.smoothing, lambda v: 0 <= v <= LARGEST, rule)
        check.number("depth", self.depth, lambda v: 0 < v <= 1, "in (0, 1]")
        check.number("clip", self.clip, lambda value: value > 0, "above 0")
        if self.draws > 1 and not self.smoothing:
            raise ValueError(f"draws must be 1 without smoothing, got {self.draws}")
        if self.through is not None:
            check.function("through", self.through, "(z, t) -> Prediction")
            if self.ascents > 1:
                raise ValueError(
                    f"ascents must be 1 for gradients through the network, got {self.ascents}"
                )

    @property
    def start(self) -> str:
        """What iteration 0 is, for tables and pictures."""
        return self.method.start

    @property
    def passes(self) -> int:
        """Iterations of the method."""
        return self.method.passes

    def budget(self, grid: tuple[int, ...]) -> int:
        """Network evaluations that no sample exceeds.

        Raises:
            ValueError: ``method`` does not tell its own.
        """
        return self.recurrences * budget_of(self.method, grid)

    def least_budget(self, grid: tuple[int, ...]) -> int:
        """The smallest budget."""
        least = getattr(self.method, "least_budget", None)
        return 1 if least is None else self.recurrences * least(grid)

    def on(self, grid: tuple[int, ...]) -> "Guidance":
        """The method for a grid of patches (h, w).

        Raises:
            ValueError: ``method`` is none.
        """
        method = of_grid(self.method, grid)
        return Guidance(
            method=method,
            verifier=self.verifier,
            through=None if self.through is None else check.as_pytree(self.through),
            strength=jnp.float32(self.strength),
            depth=jnp.float32(self.depth),
            smoothing=jnp.float32(self.smoothing),
            clip=jnp.float32(self.clip),
            recurrences=self.recurrences,
            ascents=self.ascents,
            draws=self.draws if self.smoothing else 0,
            within=getattr(method, "within", -1) + 1,
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
    noise: jax.Array | None = None,
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
        noise: float32 [n, R, H, W, C], times the standard deviation that t leaves of an image; the
            exponential of the score is averaged over the image with each of them. None = none.
        through: the network, evaluated once more, for one gradient through it.

    Returns:
        The prediction with another velocity; the same where t = 0, and through the network, where
        t = 1.
    """
    patch = z.shape[1] // t.shape[1]
    level, image = patches.expand(t, patch), steps.clean(z, t, prediction)
    variance = level**2 / (level**2 + (1 - level) ** 2)

    def score(image: jax.Array, prediction: Prediction) -> jax.Array:
        if noise is None:
            return evaluate(verifier, image, t, prediction).sum()
        values = [
            evaluate(verifier, image + jnp.sqrt(variance) * each, t, prediction) for each in noise
        ]
        return jax.nn.logsumexp(jnp.stack(values), axis=0).sum()

    def of_z(z: jax.Array) -> jax.Array:
        found = steps.predict(through, z, t)  # pyright: ignore[reportArgumentType]
        return score(steps.clean(z, t, found), found)

    def uphill(score: Callable[[jax.Array], jax.Array], at: jax.Array) -> jax.Array:
        gradient = jax.grad(score)(at)
        return jnp.where(jnp.isfinite(gradient), gradient, 0)

    if through is None:
        shifted = image
        for _ in range(ascents):
            slope = uphill(lambda image: score(image, prediction), shifted)
            shifted = shifted + strength * variance / ascents * slope
        shift = shifted - image
    else:
        noisy = level < 1
        share = level**2 / jnp.where(noisy, 1 - level, 1)
        shift = jnp.where(noisy, strength * share * uphill(of_z, z), 0)
    shift = jnp.clip(shift, -LARGEST, LARGEST)
    size = jnp.sqrt(patches.patch_mean((shift**2).mean(axis=3), patch))
    shift = shift * patches.expand(jnp.minimum(1, clip / jnp.maximum(size, TINY)), patch)
    some = level > 0
    velocity = prediction.velocity - jnp.where(some, shift / jnp.where(some, level, 1), 0)
    return prediction._replace(velocity=velocity)


def recur(
    keys: jax.Array,
    z: jax.Array,
    t: jax.Array,
    prediction: Prediction,
    *,
    depth: jax.Array | float,
) -> jax.Array:
    """Take a share of the noise off and give it back: about a Langevin step at these levels.

    Args:
        keys: [R], of the noise; consumed.
        z: float32 [R, H, W, C].
        t: float32 [R, h, w].
        prediction: for both, guided or not.
        depth: the share of a level that is taken off.

    Returns:
        Float32 [R, H, W, C]; patches at level 0 and 1 are as they were.
    """
    patch = z.shape[1] // t.shape[1]
    level = patches.expand(t, patch)
    lower = patches.expand(jnp.where(t < 1, t * (1 - depth), t), patch)
    down, up = (random_keys.normal(each, z.shape[1:]) for each in random_keys.split(keys, 2))
    mean = flow.step_mean(z, level, lower, prediction.velocity, 1.0)
    std = flow.step_std(level, lower, 1.0, prediction.variance_fraction)
    return jnp.where(level > lower, flow.raise_level(mean + std * down, lower, level, up), z)


class Memory(NamedTuple):
    """What is remembered.

    Attributes:
        method: by the method.
        costs: those that the method knows of.
        turn: int32 [B], how often the present levels have been visited.
    """

    method: Any
    costs: Costs
    turn: jax.Array


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["method", "verifier", "through", "strength", "depth", "smoothing", "clip"],
    meta_fields=["recurrences", "ascents", "draws", "within"],
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Guidance:
    """The method for a grid; ``Langevin.on`` makes it.

    Attributes:
        method: what is guided.
        verifier: whose gradient guides.
        through: the network, or None.
        strength: float32 scalar.
        depth: float32 scalar.
        smoothing: float32 scalar.
        clip: float32 scalar.
        recurrences: how often levels are visited.
        ascents: gradients per evaluation.
        draws: of the noise that smooths the score; 0 = it is not smoothed.
        within: how many others the method is guided by already, whose noise is not this one's.
    """

    method: Method
    verifier: Verifier
    through: Denoiser | None
    strength: jax.Array
    depth: jax.Array
    smoothing: jax.Array
    clip: jax.Array
    recurrences: int
    ascents: int
    draws: int
    within: int

    def init(self, problem: Problem) -> State:
        """As the method begins."""
        state = self.method.init(problem)
        turn = jnp.zeros(problem.keys.shape, jnp.int32)
        return state._replace(memory=Memory(state.memory, state.costs, turn))

    def update(self, problem: Problem, state: State, prediction: Prediction) -> State:
        """Visit the levels again, or do what the method does with the guided prediction."""
        number = state.z.shape[0] // problem.keys.shape[0]
        keys, smooth = self._keys(problem, state, number)
        noise = None
        if self.draws:
            each = random_keys.normal(smooth, (self.draws, *state.z.shape[1:]))
            noise = self.smoothing * jnp.moveaxis(each, 1, 0)
        guided = guide(
            self.verifier,
            state.z,
            state.t,
            prediction,
            strength=self.strength,
            clip=self.clip,
            ascents=self.ascents,
            noise=noise,
            through=self.through,
        )
        after = partial(self._go_on, problem, state, guided)
        after = after() if self.recurrences == 1 else self._visit(keys, state, guided, after)
        gradients = number * self.ascents
        costs = after.costs._replace(
            nbe=after.costs.nbe + gradients,
            nve=after.costs.nve + gradients * max(1, self.draws),
        )
        return after._replace(costs=costs)

    def _go_on(self, problem: Problem, state: State, guided: Prediction) -> State:
        """What the method does with a prediction."""
        own, number = state.memory.costs, state.z.shape[0] // problem.keys.shape[0]
        inner = state._replace(costs=own, memory=state.memory.method)
        inner = self.method.update(problem, inner, guided)
        costs = jax.tree.map(
            lambda all_, now, before: all_ + now - before, state.costs, inner.costs, own
        )
        own = inner.costs._replace(nfe=own.nfe + number)
        memory = Memory(inner.memory, own, jnp.zeros_like(state.memory.turn))
        return inner._replace(costs=costs, memory=memory)

    def _visit(
        self, keys: jax.Array, state: State, guided: Prediction, go_on: Callable[[], State]
    ) -> State:
        """Visit the levels again where they have not been often enough; elsewhere go on."""
        number, memory = state.z.shape[0] // state.done.shape[0], state.memory
        between = walk.grouped((state.t > 0) & (state.t < 1), number).any(axis=(1, 2, 3))
        again = (memory.turn + 1 < self.recurrences) & between & ~state.done
        visited = state._replace(
            z=recur(keys, state.z, state.t, guided, depth=self.depth),
            memory=memory._replace(turn=memory.turn + 1),
        )
        return jax.lax.cond(
            again.all(), lambda: visited, lambda: engine.where(again, visited, go_on())
        )

    def _keys(self, problem: Problem, state: State, number: int) -> list[jax.Array]:
        """Keys of the rows, [R]: of the noise of a recurrence, and of that which smooths."""
        rows = walk.particles(problem, number)
        own = random_keys.fold(rows.keys, jnp.uint32(walk.LAST_KEY))
        count = jnp.repeat(state.costs.nfe // number, number)
        return random_keys.split(random_keys.fold(own, count), 2 * self.within + 2)[-2:]
