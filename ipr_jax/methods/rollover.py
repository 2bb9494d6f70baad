"""Rollover budget forcing: proposals for the next place until one is better than all before.

Every chain stands at a place of its pass and has a quota of proposals there. A proposal goes on by
a block of steps with noise of its own, and a verifier scores what the network predicts there. The
first that beats every score before it is gone to at once, and what it left of the quota is rolled
over to the next place; when the quota is used up, the chain goes to the best of its proposals. The
last place but one gets all that remains, and from the best proposal there the pass is finished.

It takes exactly as many evaluations as it is given, whatever the sample.

Source: Kim and others, arXiv 2503.19385. There, a block is one step, and what the network predicts
for level 0 is the answer; here it is a finished pass. Evaluations that do not make a whole block go
to more first noises.
"""

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ipr_jax.core import Prediction, check
from ipr_jax.core import keys as random_keys
from ipr_jax.methods import engine, walk
from ipr_jax.methods.engine import Problem, State, by_sample
from ipr_jax.methods.scores import Verifier
from ipr_jax.methods.walk import Walk
from ipr_jax.sampling import FIRST_PASS, Sampling, renoise, schedule
from ipr_jax.sampling import step as steps
from ipr_jax.sampling.step import PassState


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rollover:
    """Rollover budget forcing.

    Attributes:
        verifier: scores the predicted clean images.
        evaluations: of the network for every sample, a multiple of ``chains``.
        sampling: of the pass; not deterministic.
        chains: that share the evaluations, at least 1; the best one is the answer.
        seeds: at least so many first noises are tried for each chain, at least 1.
        block: steps of a proposal, at least 1.

    Raises:
        ValueError: a value is out of range or of another type, naming it and what is valid.
    """

    verifier: Verifier
    evaluations: int
    sampling: Sampling = FIRST_PASS
    chains: int = 2
    seeds: int = 4
    block: int = 10

    start = "search"
    """What iteration 0 is, for tables and pictures."""

    passes = 1
    """Iterations: the pass."""

    def __post_init__(self) -> None:
        walk.check_verifier("verifier", self.verifier)
        check.instance("sampling", self.sampling, Sampling)
        for name in ("evaluations", "chains", "seeds", "block"):
            check.count(name, getattr(self, name))
        if self.evaluations % self.chains:
            raise ValueError(
                f"evaluations must be a multiple of chains, which share them, "
                f"got {self.evaluations} for {self.chains}"
            )
        walk.check_noisy(self.sampling, "all proposals would be equal")

    def budget(self, grid: tuple[int, ...]) -> int:
        """Network evaluations of every sample."""
        del grid
        return self.evaluations

    def on(self, grid: tuple[int, ...]) -> "Proposals":
        """The method for a grid of patches (h, w).

        Raises:
            ValueError: the evaluations do not do for the longest pass, naming how many do.
        """
        steps = np.maximum(self.sampling.settings(grid[0] * grid[1]).plan.num_steps, 1)
        places = -(-steps // self.block)
        last = (places - 1) * self.block
        tail = steps - last - 1
        own = self.evaluations // self.chains
        least = int((self.seeds + last + tail).max())
        if own < least:
            raise ValueError(
                f"evaluations must be at least {least * self.chains} on a grid of "
                f"{grid[0]} x {grid[1]} patches: for each of {self.chains} chains {self.seeds} "
                f"seeds and a pass; got {self.evaluations}"
            )
        proposals = np.where(places > 1, (own - self.seeds - tail) // self.block, 0)
        return Proposals(
            walk=Walk.of(self.sampling, grid),
            verifier=self.verifier,
            table=Table(
                *(
                    jnp.asarray(part, jnp.int32)
                    for part in (
                        own - tail - proposals * self.block,
                        proposals * self.block,
                        np.maximum(proposals // places, 1),
                        places - 2,
                    )
                )
            ),
            block=jnp.int32(self.block),
            chains=self.chains,
        )


class Table(NamedTuple):
    """What a chain spends its evaluations on, by the number of editable patches: int32 [P + 1].

    Attributes:
        seeds: first noises.
        search: evaluations of proposals.
        share: proposals of a place.
        last: the last place from which proposals are made; -1 if there is only one.
    """

    seeds: jax.Array
    search: jax.Array
    share: jax.Array
    last: jax.Array


class Ledger(NamedTuple):
    """What a chain has had, [R] each.

    Attributes:
        place: int32, blocks that are done.
        used: int32, proposals made from here.
        quota: int32, how many may be made.
        best: float32, the best score that any place began with or was gone to for.
        here: float32, the best score of the proposals from here.
    """

    place: jax.Array
    used: jax.Array
    quota: jax.Array
    best: jax.Array
    here: jax.Array


class Verdict(NamedTuple):
    """What follows from a proposal: bool [R] each.

    Attributes:
        better: it is the best one from here so far.
        accepted: it is gone to.
        forced: the best one is gone to, as the quota is used up.
    """

    better: jax.Array
    accepted: jax.Array
    forced: jax.Array


def settle(
    ledger: Ledger, score: jax.Array, share: jax.Array, last: jax.Array
) -> tuple[Ledger, Verdict]:
    """Account for a proposal.

    Args:
        ledger: before it.
        score: float32 [R], of the proposal.
        share: int32 [R], what a new place adds to the quota.
        last: int32 [R], the place that is not left.
    """
    used = ledger.used + 1
    better = (score > ledger.here) | (used == 1)
    here = jnp.where(better, score, ledger.here)
    improved, leaving = score > ledger.best, ledger.place < last
    accepted = improved & leaving
    forced = leaving & ~improved & (used >= ledger.quota)
    moved = accepted | forced
    left = jnp.where(accepted, ledger.quota - used, 0)
    found = Ledger(
        place=ledger.place + moved.astype(jnp.int32),
        used=jnp.where(moved, 0, used),
        quota=jnp.where(moved, share + left, ledger.quota),
        best=jnp.where(improved, score, ledger.best),
        here=here,
    )
    return found, Verdict(better, accepted, forced)


class Spot(NamedTuple):
    """A point that proposals can be made from, with what the network says of it: [R, ...] each."""

    state: PassState
    prediction: Prediction


class Memory(NamedTuple):
    """Of c chains: [B, c, ...] each.

    Attributes:
        start: int32, the step at which each patch started.
        step: int32, steps that are done.
        ledger: of the proposals.
        base: where they are made from.
        best: the best proposal from there.
    """

    start: jax.Array
    step: jax.Array
    ledger: Ledger
    base: Spot
    best: Spot


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["walk", "verifier", "table", "block"],
    meta_fields=["chains"],
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Proposals:
    """The method for a grid; ``Rollover.on`` makes it.

    Attributes:
        walk: the pass.
        verifier: scores the predicted clean images.
        table: what the evaluations are spent on.
        block: int32 scalar, steps of a proposal.
        chains: that share the evaluations.
    """

    walk: Walk
    verifier: Verifier
    table: Table
    block: jax.Array
    chains: int

    def init(self, problem: Problem) -> State:
        """Before the first noises are seen."""
        rows = walk.particles(problem, self.chains)
        begun = self.walk.begin(rows)
        t = schedule.levels(self.walk.plan(rows.editable), begun.start, 0)
        zeros = jnp.zeros(rows.keys.shape, jnp.int32)
        none = jnp.full(rows.keys.shape, -jnp.inf, jnp.float32)
        quota = self._table(rows).share
        image = jnp.zeros_like(begun.z)
        spot = Spot(begun, Prediction(image, image, jnp.ones_like(t)))
        memory = Memory(begun.start, zeros, Ledger(zeros, zeros, quota, none, none), spot, spot)
        return engine.begin(problem, begun.z, t, walk.grouped(memory, self.chains))

    def update(self, problem: Problem, state: State, prediction: Prediction) -> State:
        """Score what is complete, and take the next step from where that leads."""
        rows, memory = walk.particles(problem, self.chains), walk.flat(state.memory)
        plan, table = self.walk.plan(rows.editable), self._table(rows)
        count = jnp.repeat(state.costs.nfe // self.chains, self.chains)
        now = Spot(PassState(state.z, memory.start), prediction)
        seeding, searched = count < table.seeds, count + 1 - table.seeds
        searching = ~seeding & (searched <= table.search)
        proposed = searching & (searched % self.block == 0)
        scored = (seeding | proposed) & ~jnp.repeat(state.done, self.chains)
        image = steps.clean(state.z, state.t, prediction)
        score = walk.score_where(self.verifier, scored, image, state.t, prediction)

        # A first noise is gone to if it is the best; a proposal, if the ledger says so.
        first = seeding & ((score > memory.ledger.best) | (count == 0))
        settled, verdict = settle(memory.ledger, score, table.share, table.last)
        begun = memory.ledger._replace(best=jnp.where(first, score, memory.ledger.best))
        best = _choose(proposed & verdict.better, now, memory.best)
        base = _choose(first | (proposed & verdict.accepted), now, memory.base)
        base = _choose(proposed & verdict.forced, best, base)
        ledger = jax.tree.map(partial(jnp.where, proposed), settled, memory.ledger)
        ledger = jax.tree.map(partial(jnp.where, seeding), begun, ledger)

        # The next step is from the base, or from the best proposal when all are made, or goes on.
        again, finish = proposed | (searched == 0), proposed & (searched == table.search)
        origin = _choose(finish, best, _choose(again, base, now))
        step = jnp.where(again, ledger.place * self.block, memory.step)
        step = jnp.where(finish, (table.last + 1) * self.block, step)
        after, _ = self.walk.move(rows, origin.state, step, count, origin.prediction)
        more = searched < 0  # first noises: the pass is not begun
        after = _choose(more, self._seeds(rows, more, count), after)
        step = jnp.where(more, 0, step + 1)
        memory = Memory(after.start, step, ledger, base, best)
        state = state._replace(
            z=after.z,
            t=schedule.levels(plan, after.start, step),
            costs=state.costs._replace(
                nve=state.costs.nve + self._of_problem(scored).astype(jnp.int32) * self.chains
            ),
            memory=walk.grouped(memory, self.chains),
        )
        over = self._of_problem(step >= plan.num_steps)
        return walk.finish(state, over, self.chains, self.verifier, origin.prediction)

    def _seeds(self, rows: Problem, more: jax.Array, count: jax.Array) -> PassState:
        """Another first noise, where one is wanted."""

        def drawn(keys: jax.Array) -> jax.Array:
            noise = random_keys.normal(keys, rows.image.shape[1:])
            return renoise(rows.image, rows.editable, noise)

        keys = walk.fresh_keys(rows.keys, 0, count)
        z = jax.lax.cond(more.any(), drawn, lambda _: rows.image, keys)
        return PassState(z, jnp.full(rows.editable.shape, schedule.WAITING, jnp.int32))

    def _table(self, rows: Problem) -> Table:
        """The table's entries of every row."""
        size = rows.editable.sum(axis=(1, 2))
        return jax.tree.map(lambda part: part[size], self.table)

    def _of_problem(self, of_row: jax.Array) -> jax.Array:
        """What is the same for all chains of a problem: [R] -> [B]."""
        return of_row.reshape(-1, self.chains)[:, 0]


def _choose(where: jax.Array, one: Any, other: Any) -> Any:
    """Rows of the one where bool [R], else of the other."""
    return jax.tree.map(partial(by_sample, where), one, other)
