"""Search with a verifier: several samples of each problem at once, of which the better go on.

Every problem has N particles, each on a first pass of its own. At some steps a score looks at what
the network predicts for each of them; those with high scores are copied, those with low ones given
up (``resampling``), and all move on with fresh noise, so that copies part. In the end one of the N
samples is the answer. The weights are those of a Feynman-Kac model: with N large, a finite
temperature and a resampler that is unbiased, a sample of the final weights is one of
p(x) exp(strength score(x)), p what the network samples.

=============  ==================================================  ===============================
here           elsewhere                                           meaning
=============  ==================================================  ===============================
strength       lambda, 1 / beta, 1 / alpha                         factor of the score
potential      G                                                   what a score adds to log weights
figure         the argument of G: reward, its difference, maximum  what is compared
product        the product of the potentials along a lineage       here its logarithm
=============  ==================================================  ===============================

Particle 0 draws what a plain first pass draws, and all move as ``walk`` has it.

Sources: SVDD (arXiv 2408.08252), DAS (2501.05803), FK steering (2501.06848), classical search
(2505.23614), TreeG (2502.11420), DSearch (2503.02039).
"""

import dataclasses
import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ipr_jax.core import Prediction, check, patches
from ipr_jax.core import keys as random_keys
from ipr_jax.methods import engine, resampling, scores, walk
from ipr_jax.methods.engine import Costs, Problem, State, by_sample
from ipr_jax.methods.scores import Verifier
from ipr_jax.methods.walk import Walk
from ipr_jax.sampling import FIRST_PASS, Sampling, flow, schedule
from ipr_jax.sampling import step as steps

TEMPERATURES = ("constant", "increase", "infinite")
SCORINGS = ("current", "difference", "max", "sum")
RESAMPLINGS = (*resampling.RESAMPLERS, "top")
ANSWERS = ("best", "sample")
INITS = ("own", "shared")

SATURATION = 0.87
"""The share of a pass after which an increasing temperature is at its full strength (DAS: 0.008 per
step reaches 2 at step 87 of 100)."""

EXTREME = np.float32(1e20)
"""Scores are clipped to this size, so that their differences are numbers."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Particles:
    """A search by particles; ``Particles.of`` has those of the papers.

    Attributes:
        particles: N of each problem, at least 1.
        score: from ``scores.verifier``; None for a single particle, which is a plain first pass.
        resampling: how ancestors are drawn, of ``RESAMPLINGS``; "top" keeps those of the highest
            weights, ``beam`` says how many; None = only the answer is chosen.
        scoring: what is compared: "current" = the score; "difference" = what it has risen by since
            the last time, so that weights telescope; "max" = the highest so far; "sum" = all so
            far.
        temperature: of the weights: "constant"; "increase" = rising from 0 to full strength over
            ``SATURATION`` of the pass; "infinite" = only the best have a weight, equal ones equal.
        strength: factor of the score in the logarithm of a weight, at least 0.
        every: the share of a pass between two scorings, in [0, 1]; 0 = every step.
        window: the shares of a pass at the first and the last scoring, 0 <= first <= last <= 1.
        ess: resample where the effective number of particles is below this share of N, in (0, 1];
            1 = wherever weights differ. Weights are kept until then.
        beam: for "top", the share of the particles kept at the beginning of a pass and at its end,
            each in [0, 1], at least one particle; in between it changes evenly.
        gradient: whether particles that are scored also move up the gradient of the score, which
            their weights then take back (DAS). It goes through the score alone: how the prediction
            follows the noisy image is taken as 1 - t, not as the network's derivative.
        guide: whose gradient that is, another score than that which chooses, so that particles do
            not go where the one errs; None = that of the score.
        init: "own" = every particle begins from noise of its own, "shared" = all from the same.
        answer: "best" = the sample of the highest score; "sample" = one drawn by the final weights,
            corrected so that they are exp(strength score) along every lineage.
        sampling: how a particle samples; its pass is that of ``generate``.

    Raises:
        ValueError: a value is out of range or unknown, naming it and what is valid; several
            particles or a gradient without a score that has it; all particles would stay equal.
    """

    particles: int = 4
    score: Verifier | None = None
    resampling: str | None = "ssp"
    scoring: str = "max"
    temperature: str = "increase"
    strength: float = 1.0
    every: float = 0.0625
    window: tuple[float, float] = (0.1, 1.0)
    ess: float = 1.0
    beam: tuple[float, float] = (0.5, 0.5)
    gradient: bool = False
    guide: Verifier | None = None
    init: str = "own"
    answer: str = "best"
    sampling: Sampling = FIRST_PASS

    def __post_init__(self) -> None:
        check.count("particles", self.particles)
        check.instance("sampling", self.sampling, Sampling)
        for name, value, known in (
            ("resampling", "ssp" if self.resampling is None else self.resampling, RESAMPLINGS),
            ("scoring", self.scoring, SCORINGS),
            ("temperature", self.temperature, TEMPERATURES),
            ("init", self.init, INITS),
            ("answer", self.answer, ANSWERS),
        ):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
        for name, value, valid, rule in (
            ("strength", self.strength, lambda v: 0 <= v < np.inf, "finite and at least 0"),
            ("every", self.every, lambda v: 0 <= v <= 1, "in [0, 1]"),
            ("ess", self.ess, lambda v: 0 < v <= 1, "in (0, 1]"),
        ):
            check.number(name, value, valid, rule)
        for name in ("window", "beam"):
            value = getattr(self, name)
            if not isinstance(value, tuple | list) or len(value) != 2:
                raise ValueError(f"{name} must be two, of the first and the last, got {value}")
            for share in value:
                check.number(name, share, lambda v: 0 <= v <= 1, "in [0, 1]")
        if self.window[0] > self.window[1]:
            raise ValueError(f"window must not fall, got {self.window[0]} to {self.window[1]}")
        for name in ("score", "guide"):
            if getattr(self, name) is not None:
                check.instance(name, getattr(self, name), Verifier)
        self._check_whole()

    def _check_whole(self) -> None:
        """Refuse what does not fit together.

        Raises:
            ValueError: says what.
        """
        several = self.particles > 1
        if self.score is None and (several or self.gradient):
            what = f"{self.particles} particles" if several else "a gradient"
            raise ValueError(
                f"score must be from ipr_jax.methods.scores.verifier for {what}, got None"
            )
        if self.guide is not None and not self.gradient:
            raise ValueError("guide must be None without a gradient; valid with: gradient=True")
        upwards = self.guide or self.score
        if self.gradient and upwards is not None and not upwards.differentiable:
            raise ValueError(
                f"gradient must be False where the {'guide' if self.guide else 'score'} is not "
                f"differentiable, got True; verifier(..., differentiable=True) says that it is"
            )
        if self.gradient and self.temperature == "infinite":
            raise ValueError(
                "gradient must be False at an infinite temperature, got True; "
                "valid with: constant, increase"
            )
        if several and (self.resampling or self.init == "shared"):
            walk.check_noisy(self.sampling, "copies of a particle would stay equal")

    @classmethod
    def of(
        cls, name: str, score: Verifier | None = None, particles: int = 4, **changes: Any
    ) -> "Particles":
        """A method by the name of its paper.

        Args:
            name: of ``PUBLISHED``.
            score: to choose by.
            particles: N.
            **changes: of what ``PUBLISHED`` says, or of other attributes.

        Raises:
            ValueError: no such name, or as for ``Particles``.
        """
        if name not in PUBLISHED:
            raise ValueError(f"name must be one of {', '.join(PUBLISHED)}, got {name!r}")
        return cls(score=score, particles=particles, **PUBLISHED[name] | changes)

    @property
    def start(self) -> str:
        """What iteration 0 is, for tables and pictures."""
        return "search"

    @property
    def passes(self) -> int:
        """Over every sample: the only one."""
        return 1

    def budget(self, grid: tuple[int, ...]) -> int:
        """Network evaluations that no sample exceeds."""
        plan = self.sampling.settings(grid[0] * grid[1]).plan
        return self.particles * int(plan.num_steps.max())

    def least_budget(self, grid: tuple[int, ...]) -> int:
        """The smallest budget: before all passes are over, there is no answer."""
        return self.budget(grid)

    def on(self, grid: tuple[int, ...]) -> "Population":
        """The method for a grid of patches (h, w)."""
        plan = self.sampling.settings(grid[0] * grid[1]).plan
        lengths = np.maximum(plan.num_steps, 1)[:, None]
        step = np.arange(lengths.max() + 1)
        share = np.minimum(step / lengths, 1)  # of the pass that is over, [P + 1, steps]
        strength = np.full(share.shape, self.strength)
        if self.temperature == "infinite":
            strength[:] = np.inf
        elif self.temperature == "increase":
            strength *= np.minimum(2 ** (share / SATURATION) - 1, 1)
        # A step is scored if one of the marks first, first + every, ... up to last is in it.
        (first, last), every, close = self.window, max(self.every, 1e-9), 1e-6
        number = np.floor((last - first) / every + close) + 1
        edges = np.arange(lengths.max() + 2) - close
        before = np.ceil((edges - first * lengths) / (every * lengths)).clip(0, number)
        scored = (np.diff(before) > 0) & (self.resampling is not None or self.gradient)
        kept = np.round(self.particles * (self.beam[0] + share * (self.beam[1] - self.beam[0])))
        name = "ssp" if self.resampling is None else self.resampling
        return Population(
            walk=Walk.of(self.sampling, grid),
            score=self.score,
            guide=self.guide,
            strength=jnp.asarray(strength, jnp.float32),
            scored=jnp.asarray(scored),
            kept=jnp.asarray(np.maximum(kept, 1), jnp.int32),
            ess=jnp.float32(self.ess),
            scoring=jnp.int32(SCORINGS.index(self.scoring)),
            resampling=jnp.int32(RESAMPLINGS.index(name)),
            shared=jnp.asarray(self.init == "shared"),
            drawn=jnp.asarray(self.answer == "sample"),
            particles=self.particles,
            selects=self.resampling is not None and self.particles > 1,
            gradient=self.gradient,
        )


PUBLISHED: dict[str, dict[str, Any]] = {
    "best-of-n": {"resampling": None},
    "svdd": {
        "temperature": "infinite",
        "scoring": "current",
        "resampling": "best",
        "every": 0.0,
        "window": (0.0, 1.0),
        "init": "shared",
    },
    "smc": {
        "temperature": "constant",
        "scoring": "difference",
        "resampling": "multinomial",
        "every": 0.0,
        "window": (0.0, 1.0),
    },
    "das": {
        "temperature": "increase",
        "scoring": "difference",
        "resampling": "ssp",
        "every": 0.0,
        "window": (0.0, 1.0),
        "ess": 0.5,
        "gradient": True,
    },
    "fk-steering": {
        "temperature": "constant",
        "strength": 10.0,
        "scoring": "max",
        "resampling": "multinomial",
        "every": 0.2,
        "window": (0.2, 0.8),
    },
    "bfs": {
        "temperature": "increase",
        "scoring": "max",
        "resampling": "ssp",
        "every": 0.25,
        "window": (0.25, 1.0),
    },
    "treeg": {
        "temperature": "constant",
        "scoring": "current",
        "resampling": "top",
        "every": 0.0,
        "window": (0.0, 1.0),
    },
    "dsearch": {
        "temperature": "constant",
        "scoring": "current",
        "resampling": "top",
        "beam": (1.0, 0.0),
        "every": 0.0,
        "window": (0.0, 1.0),
    },
}
"""What the papers chose, as far as it carries over: the strength depends on the score."""


class Memory(NamedTuple):
    """Of the particles.

    Attributes:
        start: int32 [B, N, h, w], the step at which each patch started.
        step: int32 [B], steps that are done.
        history: float32 [B, N], the highest score so far, or the sum.
        product: float32 [B, N], the logarithm of the potentials along the lineage, the highest 0.
        log_weights: float32 [B, N], since particles were last resampled; in the end those of the
            samples.
        scores: float32 [B, N], of the samples, once they are there.
    """

    start: jax.Array
    step: jax.Array
    history: jax.Array
    product: jax.Array
    log_weights: jax.Array
    scores: jax.Array


class Rows(NamedTuple):
    """All of every particle, rows [R, ...]: what goes on where it is resampled.

    Attributes:
        z: float32 [R, H, W, C].
        t: float32 [R, h, w].
        start: int32 [R, h, w].
        prediction: of the network.
        push: float32 [R, H, W, C], where to move for a better score; None without a gradient.
        history: float32 [R], as in ``Memory``.
        product: float32 [R], likewise.
    """

    z: jax.Array
    t: jax.Array
    start: jax.Array
    prediction: Prediction
    push: jax.Array | None
    history: jax.Array
    product: jax.Array


@partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        *("walk", "score", "guide", "strength", "scored", "kept", "ess"),
        *("scoring", "resampling", "shared", "drawn"),
    ],
    meta_fields=["particles", "selects", "gradient"],
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Population:
    """The method for a grid; ``Particles.on`` makes it. One program serves all that resample.

    Attributes:
        walk: the pass.
        score: to choose by, or None.
        guide: whose gradient, if it is not that of the score.
        strength: float32 [P + 1, K + 1], by size of the region and step; infinite = the limit.
        scored: bool [P + 1, K + 1], whether a step begins with a scoring.
        kept: int32 [P + 1, K + 1], for "top".
        ess: float32 scalar.
        scoring: int32 scalar, its place in ``SCORINGS``.
        resampling: int32 scalar, its place in ``RESAMPLINGS``.
        shared: bool scalar, whether particles begin from the same noise.
        drawn: bool scalar, whether the answer is drawn.
        particles: N.
        selects: whether particles are resampled.
        gradient: whether they move up the gradient.
    """

    walk: Walk
    score: Verifier | None
    guide: Verifier | None
    strength: jax.Array
    scored: jax.Array
    kept: jax.Array
    ess: jax.Array
    scoring: jax.Array
    resampling: jax.Array
    shared: jax.Array
    drawn: jax.Array
    particles: int
    selects: bool
    gradient: bool

    def init(self, problem: Problem) -> State:
        """Before the first step of the pass."""
        each, same = walk.particles(problem, self.particles), self._rows(problem.keys)
        begun = self.walk.begin(each._replace(keys=jnp.where(self.shared, same, each.keys)))
        zeros = jnp.zeros((*problem.keys.shape, self.particles), jnp.float32)
        lowest = self.scoring == SCORINGS.index("max")
        memory = Memory(
            start=walk.grouped(begun.start, self.particles),
            step=jnp.zeros(problem.keys.shape, jnp.int32),
            history=jnp.where(lowest, -EXTREME, zeros),
            product=zeros,
            log_weights=zeros,
            scores=zeros,
        )
        t = schedule.levels(self.walk.plan(each.editable), begun.start, 0)
        return engine.begin(problem, begun.z, t, memory)

    def update(self, problem: Problem, state: State, prediction: Prediction) -> State:
        """Score and resample where it is time, then move every particle along its schedule."""
        memory, each = state.memory, walk.particles(problem, self.particles)
        size, step = problem.editable.sum(axis=(1, 2)), self._rows(memory.step)
        keys = walk.fresh_keys(problem.keys, 0, memory.step)
        rows = Rows(
            z=state.z,
            t=state.t,
            start=memory.start.reshape(state.t.shape),
            prediction=prediction,
            push=jnp.zeros_like(state.z) if self.gradient else None,
            history=memory.history.reshape(-1),
            product=memory.product.reshape(-1),
        )
        log_weights, costs = memory.log_weights, state.costs
        if self.selects or self.gradient:
            now = self.scored[size, memory.step] & ~state.done
            rows, log_weights, costs = jax.lax.cond(
                now.any(),
                partial(self._select, keys, size, memory.step, now),
                lambda *same: same,
                rows,
                log_weights,
                costs,
            )
        before = steps.PassState(rows.z, rows.start)
        moved, levels = self.walk.move(each, before, step, step, rows.prediction)
        z = moved.z
        if rows.push is not None:
            # Apart from the step, so that this is compiled, and rounded, as in a plain pass.
            noise, settings = self.walk.noise(each, step), self.walk.settings
            apart = (moved.z, levels, rows.prediction.variance_fraction, noise)
            z, (t, s), fraction, noise = jax.lax.optimization_barrier(apart)
            t, s = (patches.expand(part, z.shape[1] // t.shape[1]) for part in (t, s))
            std = settings.temperature * flow.step_std(t, s, settings.stochasticity, fraction)
            push = std * rows.push
            z = jnp.where(push == 0, z, z + std * push)
            # Where the push leads away from p, the weight takes it back.
            ratio = -(push * noise + push**2 / 2).sum(axis=(1, 2, 3))
            log_weights = log_weights + self._grouped(ratio)
        state = state._replace(
            z=z,
            t=levels.s,
            costs=costs,
            memory=Memory(
                start=self._grouped(moved.start),
                step=memory.step + 1,
                history=self._grouped(rows.history),
                product=self._grouped(rows.product),
                log_weights=log_weights,
                scores=memory.scores,
            ),
        )
        over = (state.memory.step >= self.walk.settings.plan.num_steps[size]) & ~state.done
        finish = partial(self._finish, keys, size, rows.prediction)
        return jax.lax.cond(over.any(), finish, lambda state, _: state, state, over)

    def _select(
        self,
        keys: jax.Array,
        size: jax.Array,
        step: jax.Array,
        now: jax.Array,
        rows: Rows,
        log_weights: jax.Array,
        costs: Costs,
    ) -> tuple[Rows, jax.Array, Costs]:
        """Score the particles of the problems whose time it is, and resample them."""
        again = self._rows(now)
        image = steps.clean(rows.z, rows.t, rows.prediction)
        number = jnp.where(now, self.particles, 0).astype(jnp.int32)
        costs = costs._replace(nve=costs.nve + number)
        if self.gradient:
            total = partial(self._total, self.guide or self.score, rows)
            (_, value), slope = jax.value_and_grad(total, has_aux=True)(image)
            costs = costs._replace(nbe=costs.nbe + number)
            ahead = self._rows(self.strength[size, step + 1])[:, None, None, None]
            level = patches.expand(rows.t, rows.z.shape[1] // rows.t.shape[1])
            slope = ahead * (1 - level) * jnp.where(jnp.isfinite(slope), slope, 0)
            rows = rows._replace(push=by_sample(again, slope, jnp.zeros_like(slope)))
        else:
            value = self._value(self.score, image, rows.t, rows.prediction)
        if self.guide is not None:
            costs = costs._replace(nve=costs.nve + number)
            value = self._value(self.score, image, rows.t, rows.prediction)
        figure = jnp.select(
            [self.scoring == SCORINGS.index("max"), self.scoring == SCORINGS.index("sum")],
            [jnp.maximum(rows.history, value), rows.history + value],
            value,
        )
        rows = rows._replace(history=jnp.where(again, figure, rows.history))
        new, product = self._weigh(
            log_weights,
            self._grouped(figure),
            self._grouped(rows.product),
            self.strength[size, step],
            telescopes=self.scoring == SCORINGS.index("difference"),
        )
        log_weights = by_sample(now, new, log_weights)
        rows = rows._replace(product=jnp.where(again, product.reshape(-1), rows.product))
        if not self.selects:
            return rows, log_weights, costs

        def draw(uniform: jax.Array, log_weights: jax.Array, kept: jax.Array) -> jax.Array:
            top = partial(resampling.top, kept=kept)
            every = [*resampling.RESAMPLERS.values(), top]
            return jax.lax.switch(self.resampling, every, uniform, log_weights)

        uniform = random_keys.uniform(keys, (self.particles,))
        ancestors = jax.vmap(draw)(uniform, log_weights, self.kept[size, step])
        few = resampling.effective_number(log_weights) < self.ess * self.particles
        differ = log_weights.max(axis=1) > log_weights.min(axis=1)
        chosen = now & differ & (few | (self.ess >= 1))
        places = jnp.arange(self.particles, dtype=jnp.int32)[None]
        ancestors = jnp.where(chosen[:, None], ancestors, places)
        rows = walk.flat(walk.pick(walk.grouped(rows, self.particles), ancestors))
        return rows, by_sample(chosen, jnp.zeros_like(log_weights), log_weights), costs

    def _finish(
        self,
        keys: jax.Array,
        size: jax.Array,
        prediction: Prediction,
        state: State,
        over: jax.Array,
    ) -> State:
        """Score the samples of the problems whose pass is over, and answer one."""
        memory, chosen = state.memory, jnp.zeros(over.shape, jnp.int32)
        if self.score is not None:
            value = self._value(self.score, state.z, jnp.zeros_like(state.t), prediction)
            value = self._grouped(value)
            log_weights, _ = self._weigh(
                memory.log_weights,
                value,
                memory.product,
                self.strength[size, memory.step],
                telescopes=True,
            )
            draw = jax.vmap(jax.random.categorical)
            drawn = draw(random_keys.fold(keys, self.particles), log_weights)
            chosen = jnp.where(self.drawn, drawn, value.argmax(axis=1)).astype(jnp.int32)
            memory = memory._replace(
                log_weights=by_sample(over, log_weights, memory.log_weights),
                scores=by_sample(over, value, memory.scores),
            )
            number = jnp.where(over, self.particles, 0).astype(jnp.int32)
            state = state._replace(costs=state.costs._replace(nve=state.costs.nve + number))
        image = walk.pick(walk.grouped(state.z, self.particles), chosen)
        return state._replace(
            image=by_sample(over, image, state.image),
            iteration=state.iteration + over.astype(jnp.int32),
            done=state.done | over,
            memory=memory,
        )

    def _weigh(
        self,
        log_weights: jax.Array,
        figure: jax.Array,
        product: jax.Array,
        strength: jax.Array,
        *,
        telescopes: jax.Array | bool,
    ) -> tuple[jax.Array, jax.Array]:
        """Log weights after a potential, and the product with it: [B, N] each, the highest 0.

        Where potentials telescope, their product is exp(strength figure), but for what is the same
        for all particles of a problem.
        """
        strength = strength[:, None]
        infinite = jnp.isinf(strength)
        potential = jnp.where(infinite, 0, strength) * figure
        potential = potential - jnp.where(telescopes, product, 0)
        limit = jnp.where(figure == figure.max(axis=1, keepdims=True), 0, -jnp.inf)
        log_weights = jnp.where(infinite, limit, log_weights + potential)
        product = jnp.where(infinite, product, product + potential)
        return _highest_0(log_weights), _highest_0(product)

    def _value(
        self, score: Verifier | None, image: jax.Array, level: jax.Array, prediction: Prediction
    ) -> jax.Array:
        """The scores of rows, as numbers: float32 [R]."""
        assert score is not None  # or there is nothing to choose
        found = scores.evaluate(score, image, level, prediction)
        return jnp.clip(found, -EXTREME, EXTREME)

    def _total(
        self, score: Verifier | None, rows: Rows, image: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """The sum of the scores of rows, whose gradient is that of each, and the scores."""
        value = self._value(score, image, rows.t, rows.prediction)
        return value.sum(), value

    def _rows(self, of_problem: jax.Array) -> jax.Array:
        """What is the same for all particles of a problem: [B, ...] -> [R, ...]."""
        return jnp.repeat(of_problem, self.particles, axis=0)

    def _grouped(self, rows: jax.Array) -> jax.Array:
        """Rows [R, ...] by problem, [B, N, ...]."""
        return walk.grouped(rows, self.particles)


def _highest_0(logarithms: jax.Array) -> jax.Array:
    """In times of the highest, [B, N]."""
    return logarithms - logarithms.max(axis=1, keepdims=True)


def best_of(scores: np.ndarray, grades: np.ndarray) -> np.ndarray:
    """What the best of n particles is worth, for every n up to N, from one run of N.

    The mean over all choices of n of the N particles, of those of equal scores the first; for
    scores that are the grades, bool, this is the unbiased estimate of pass@n.

    Args:
        scores: [..., N], by which the best is chosen.
        grades: bool or float [..., N], what each is worth.

    Returns:
        Float64 [..., N], of n = 1 to N.
    """
    number = scores.shape[-1]
    order = np.argsort(-np.asarray(scores, np.float64), axis=-1, kind="stable")
    grades = np.take_along_axis(np.asarray(grades, np.float64), order, axis=-1)
    chance = np.zeros((number, number))  # that of n the best has place k
    for n, place in np.ndindex(number, number):
        chance[n, place] = math.comb(number - 1 - place, n) / math.comb(number, n + 1)
    return grades @ chance.T
