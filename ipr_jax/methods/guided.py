"""Iterative Partial Refinement that listens to a score: what is kept, what goes on, what is redone.

Plain refinement keeps every iteration and redoes any patches. Here a verifier may say whether an
iteration is kept; of several chains, those with better scores may take the place of others after
every round; a doubt about every patch may say which ones are rather redone; and the answer is the
best image that there has been. Each of these is a few lines around ``ipr.IPR``, whose draws they
leave as they are.

What an iteration ends in is what the network predicts at its last step, so that nothing is
evaluated besides.
"""

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ipr_jax.core import Prediction, check
from ipr_jax.core import keys as random_keys
from ipr_jax.methods import engine, ipr, selection, stopping, walk
from ipr_jax.methods.engine import Problem, State, by_sample
from ipr_jax.methods.ipr import IPR, Refinement
from ipr_jax.methods.resampling import RESAMPLERS, Resampler
from ipr_jax.methods.scores import Verifier, evaluate
from ipr_jax.methods.selection import Seen
from ipr_jax.sampling import step as steps


@dataclasses.dataclass(frozen=True, kw_only=True)
class Guided:
    """Refinement guided by scores.

    Attributes:
        refinement: the first pass and the iterations; without a stopping rule.
        verifier: scores the image after every iteration, the best of which is the answer; None =
            the last one is, and every iteration is kept.
        temperature: an iteration that lowers the score by d is kept with probability
            exp(-d / temperature), at least 0: 0 = only what is as good, infinity = all. What the
            first pass makes, or without one the first iteration, is kept.
        chains: refinements of every sample, at least 1.
        strength: after every iteration, chains go on from chains drawn by exp(strength score), at
            least 0; 0 = each from itself.
        resampling: how they are drawn, a name of ``resampling.RESAMPLERS``.
        doubt: a verifier whose score is one of every patch, float32 [R, h, w], at least 0: the
            higher, the rather it is redone; None = any.
        least: added to the doubt, so that no patch starves, above 0.

    Raises:
        ValueError: a value is out of range or of another type, naming it and what is valid.
    """

    refinement: Refinement = dataclasses.field(default_factory=Refinement)
    verifier: Verifier | None = None
    temperature: float = 0.0
    chains: int = 1
    strength: float = 0.0
    resampling: str = "ssp"
    doubt: Verifier | None = None
    least: float = 0.1

    def __post_init__(self) -> None:
        check.instance("refinement", self.refinement, Refinement)
        if self.refinement.stop is not stopping.never:
            raise ValueError(
                f"stop of refinement must be never, as chains end together, "
                f"got {check.told(self.refinement.stop)}"
            )
        check.count("chains", self.chains)
        check.number("temperature", self.temperature, lambda v: v >= 0, "at least 0")
        check.number("strength", self.strength, lambda v: 0 <= v < np.inf, "finite and at least 0")
        check.number("least", self.least, lambda v: 0 < v < np.inf, "finite and above 0")
        if self.resampling not in RESAMPLERS:
            names = ", ".join(RESAMPLERS)
            raise ValueError(f"resampling must be one of {names}, got {self.resampling!r}")
        if self.verifier is not None:
            walk.check_verifier("verifier", self.verifier)
        elif self.doubt is None or self.chains > 1:
            raise ValueError(
                "verifier must be a Verifier where iterations or chains are chosen by its score, "
                "see ipr_jax.methods.scores.verifier; got None"
            )
        if self.strength > 0 and self.chains == 1:
            raise ValueError(f"strength must be 0 with a single chain, got {self.strength}")
        if self.doubt is not None:
            walk.check_verifier("doubt", self.doubt)
            if self.refinement.select is not selection.fresh_regions:
                raise ValueError(
                    "select of refinement must be fresh_regions where a doubt chooses the regions, "
                    f"got {check.told(self.refinement.select)}"
                )

    @property
    def start(self) -> str:
        """What iteration 0 is, for tables and pictures."""
        return self.refinement.start

    @property
    def passes(self) -> int:
        """Over every sample: the first pass, if there is one, and the iterations."""
        return self.refinement.passes

    def budget(self, grid: tuple[int, ...]) -> int:
        """Network evaluations that no sample exceeds."""
        return self.chains * self.refinement.budget(grid)

    def on(self, grid: tuple[int, ...]) -> "Listening":
        """The method for a grid of patches (h, w)."""
        return Listening(
            ipr=self.refinement.on(grid),
            verifier=self.verifier,
            doubt=self.doubt,
            temperature=jnp.float32(self.temperature),
            strength=jnp.float32(self.strength),
            least=jnp.float32(self.least),
            resample=RESAMPLERS[self.resampling],
            chains=self.chains,
        )


TINY = np.finfo(np.float32).tiny
"""The least patience of a temperature of infinity: above none."""


class Memory(NamedTuple):
    """Of c chains.

    Attributes:
        inner: of the refinement, [B, c, ...].
        image: float32 [B, c, H, W, C], what the present iterations began from.
        score: float32 [B, c], of these images.
        doubt: float32 [B, c, h, w], about their patches.
        best: float32 [B], the score of the answer so far.
    """

    inner: ipr.Memory
    image: jax.Array
    score: jax.Array
    doubt: jax.Array
    best: jax.Array


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["ipr", "verifier", "doubt", "temperature", "strength", "least"],
    meta_fields=["resample", "chains"],
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Listening:
    """The method for a grid; ``Guided.on`` makes it.

    Attributes:
        ipr: the refinement.
        verifier: or None.
        doubt: or None.
        temperature: float32 scalar.
        strength: float32 scalar.
        least: float32 scalar.
        resample: how chains are drawn.
        chains: how many.
    """

    ipr: IPR
    verifier: Verifier | None
    doubt: Verifier | None
    temperature: jax.Array
    strength: jax.Array
    least: jax.Array
    resample: Resampler
    chains: int

    def init(self, problem: Problem) -> State:
        """Before the first step of the first pass."""
        begun = self.ipr.init(walk.particles(problem, self.chains))
        inner, image, doubt = walk.grouped(
            (begun.memory, begun.image, jnp.zeros_like(begun.t)), self.chains
        )
        score = jnp.full(image.shape[:2], -jnp.inf, jnp.float32)
        memory = Memory(inner, image, score, doubt, score[:, 0])
        state = engine.begin(problem, begun.z, begun.t, memory)
        return state._replace(done=begun.done[:: self.chains])

    def update(self, problem: Problem, state: State, prediction: Prediction) -> State:
        """A step of every chain; where an iteration ends, listen before the next one begins."""
        rows, memory = walk.particles(problem, self.chains), state.memory
        inner, before = walk.flat((memory.inner, memory.image))
        ends = (inner.step + 1 >= inner.plan.num_steps)[:: self.chains] & ~state.done
        heard = jax.lax.cond(
            ends.any(), partial(self._listen, rows), self._ignore, state, ends, prediction
        )

        def aimed(keys: jax.Array, number: jax.Array | int, grid: tuple[int, ...]) -> jax.Array:
            """Rather those that are doubted."""
            del grid
            weights = walk.flat(heard.doubt) + self.least
            return selection.weighted_regions(keys, number, jnp.log(weights))

        method = self.ipr if self.doubt is None else dataclasses.replace(self.ipr, select=aimed)
        counts = (state.iteration, state.done, state.finite, state.costs)
        iteration, done, finite, costs = jax.tree.map(
            partial(jnp.repeat, repeats=self.chains), counts
        )
        own = State(state.z, state.t, before, iteration, done, finite, costs, inner)

        def kept(image: jax.Array) -> jax.Array:
            """The images, or where they are not kept those before them."""
            return by_sample(heard.kept.reshape(-1), image, before)

        def chosen(of_chains: Any) -> Any:
            """What chains have that others go on from."""
            return walk.flat(walk.pick(walk.grouped(of_chains, self.chains), heard.parents))

        def going_on(image: jax.Array, seen: Seen | None) -> tuple[jax.Array, Seen | None]:
            """Of an iteration that is rejected, what it has told of its patches stays known."""
            if seen is not None:
                seen = seen._replace(image=kept(seen.image))
            return chosen((kept(image), seen))

        after = method.update(rows, own, prediction, going_on)
        new = walk.grouped(after.image, self.chains)
        top = heard.score.argmax(axis=1)
        best = walk.pick(heard.score, top)
        better = ends & (best >= memory.best)
        asked = self.chains * sum(each is not None for each in (self.verifier, self.doubt))
        return state._replace(
            z=after.z,
            t=after.t,
            image=by_sample(better, walk.pick(new, top), state.image),
            iteration=state.iteration + ends.astype(jnp.int32),
            done=state.done | after.done[:: self.chains],
            costs=state.costs._replace(nve=state.costs.nve + asked * ends.astype(jnp.int32)),
            memory=Memory(
                inner=walk.grouped(after.memory, self.chains),
                image=walk.grouped(chosen(kept(after.image)), self.chains),
                score=heard.after,
                doubt=heard.doubt,
                best=jnp.where(better, best, memory.best),
            ),
        )

    def _listen(
        self, rows: Problem, state: State, ends: jax.Array, prediction: Prediction
    ) -> "Heard":
        """Ask the verifiers about what iterations end in."""
        memory, number = state.memory, self.ipr.first + state.iteration
        image, level = steps.clean(state.z, state.t, prediction), jnp.zeros_like(state.t)
        score, doubt = jnp.zeros_like(memory.score), memory.doubt
        if self.verifier is not None:
            score = evaluate(self.verifier, image, level, prediction)
            score = walk.grouped(score, self.chains)
        if self.doubt is not None:
            doubt = self.doubt.score(image, level, prediction)
            doubt = check.returned("what doubt returns", doubt, level.shape, jnp.float32)
            doubt = walk.grouped(jnp.where(doubt > 0, doubt, 0), self.chains)

        own = walk.fresh_keys(rows.keys, jnp.repeat(number, self.chains), 0)
        patience = jnp.maximum(-jnp.log1p(-random_keys.uniform(own, ())), TINY)
        patience = self.temperature * walk.grouped(patience, self.chains)
        kept = (score >= memory.score) | (memory.score - score <= patience)
        kept = kept & ends[:, None]
        after = jnp.where(kept, score, memory.score)
        doubt = by_sample(kept.reshape(-1), walk.flat(doubt), walk.flat(memory.doubt))

        parents = self._identity(state)
        if self.chains > 1:
            best = after.max(axis=1, keepdims=True)
            log_weights = jnp.where(after == best, 0, self.strength * (after - best))
            log_weights = jnp.where(self.strength > 0, log_weights, 0)
            own = walk.fresh_keys(rows.keys[:: self.chains], number, 1)
            uniform = random_keys.uniform(own, (self.chains,))
            drawn = jax.vmap(self.resample)(uniform, log_weights)
            some = ends & (log_weights < 0).any(axis=1)  # equals stay where they are
            parents = by_sample(some, drawn, parents)
        after, doubt = walk.pick((after, walk.grouped(doubt, self.chains)), parents)
        return Heard(score, kept, parents, after, doubt)

    def _ignore(self, state: State, ends: jax.Array, prediction: Prediction) -> "Heard":
        """No iteration ends."""
        del ends, prediction
        score = state.memory.score
        none = jnp.zeros(score.shape, bool)
        return Heard(score, none, self._identity(state), score, state.memory.doubt)

    def _identity(self, state: State) -> jax.Array:
        """Every chain goes on from itself: int32 [B, c]."""
        each = jnp.arange(self.chains, dtype=jnp.int32)[None]
        return jnp.broadcast_to(each, state.memory.score.shape)


class Heard(NamedTuple):
    """What is said at the end of an iteration.

    Attributes:
        score: float32 [B, c], of the new images.
        kept: bool [B, c], whether they are kept.
        parents: int32 [B, c], of which chain each goes on.
        after: float32 [B, c], scores of what the chains go on from.
        doubt: float32 [B, c, h, w], about its patches.
    """

    score: jax.Array
    kept: jax.Array
    parents: jax.Array
    after: jax.Array
    doubt: jax.Array
