"""Every search, by a verifier or the network itself, made for a task and a budget of evaluations.

All sample as the task's first pass does, so that what differs is how the budget is spent.
"""

import bisect
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ipr_jax.core import Prediction
from ipr_jax.methods import (
    PUBLISHED,
    Backtracking,
    Cycles,
    Guided,
    Langevin,
    LeastDoubted,
    Particles,
    Paths,
    Refinement,
    Rollover,
    scores,
)
from ipr_jax.methods.scores import Verifier
from ipr_jax.sampling import Sampling
from ipr_jax.tasks import Task, verifiers

PASSES = 4
"""What a search may cost by default, in first passes over a board without clues."""

INTERNAL = "internal"
"""The name and the kind of the network's own certainty."""

CALM = -0.5
"""The least score that depth-first search goes on with: nothing that is there is wrong."""

JUMP = 0.1
"""The share of a pass that it goes back."""


class UnfitError(ValueError):
    """A method that a task, a verifier or a budget does not do for."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """What a method is made for.

    Attributes:
        task: the benchmark.
        first: how its first pass samples.
        later: how its refinement samples.
        ratio: the share of the patches that an iteration of it regenerates.
        verifier: to choose by.
        budget: network evaluations that no sample exceeds.
    """

    task: Task
    first: Sampling
    later: Sampling
    ratio: float | tuple[float, ...]
    verifier: Verifier
    budget: int

    @property
    def steps(self) -> int:
        """Evaluations of a first pass over a board without clues."""
        return _steps(self.first, self.task.grid)

    @property
    def refinement(self) -> Refinement:
        """As many iterations as the budget allows."""
        given = Refinement(iterations=0, ratio=self.ratio, first=self.first, later=self.later)

        def cost(iterations: int) -> int:
            return dataclasses.replace(given, iterations=iterations).budget(self.task.grid)

        # Each costs at least one evaluation, and none costs the first pass, which the budget holds.
        most = bisect.bisect_right(range(self.budget + 1), self.budget, key=cost) - 1
        return dataclasses.replace(given, iterations=most)


def _steps(sampling: Sampling, grid: tuple[int, int]) -> int:
    return int(sampling.settings(grid[0] * grid[1]).plan.num_steps.max())


def _particles(name: str) -> Callable[[Setting], Any]:
    def make(given: Setting) -> Particles:
        number = given.budget // given.steps
        return Particles.of(name, given.verifier, number, sampling=given.first)

    return make


def _depth_first(given: Setting) -> Backtracking:
    jump = max(1, round(JUMP * given.steps))
    backtracks = (given.budget - given.steps) // (jump + 1)
    return Backtracking(
        verifier=given.verifier,
        threshold=CALM,
        sampling=given.first,
        jump=jump,
        backtracks=backtracks,
    )


def _rounds(kind: type[Paths] | type[Cycles]) -> Callable[[Setting], Any]:
    def make(given: Setting) -> Any:
        """The most rounds that fit, of two samples, or of one if two do not."""
        for keep in (2, 1):
            for rounds in range(16, 0, -1):
                method = kind(
                    verifier=given.verifier, sampling=given.first, keep=keep, rounds=rounds
                )
                if method.budget(given.task.grid) <= given.budget:
                    return method
        raise UnfitError(f"budget must hold a round of {kind.__name__}, got {given.budget}")

    return make


def _rollover(given: Setting) -> Rollover:
    evaluations = given.budget - given.budget % 2
    method = Rollover(verifier=given.verifier, evaluations=evaluations, sampling=given.first)
    try:
        method.on(given.task.grid)
    except ValueError as error:
        raise UnfitError(f"budget must do for Rollover, got {given.budget}: {error}") from None
    return method


def _guided(make: Callable[[Setting], Any]) -> Callable[[Setting], Langevin]:
    """Another method, every prediction of which follows the gradient."""
    return lambda given: Langevin(verifier=given.verifier, method=make(given))


def _accepting(given: Setting) -> Guided:
    return Guided(refinement=given.refinement, verifier=given.verifier)


def _chains(given: Setting) -> Guided:
    """Half of the budget for each of two."""
    if given.budget < 2 * given.steps:
        raise UnfitError(
            f"budget must hold a first pass of each of two chains, {2 * given.steps} here, "
            f"got {given.budget}"
        )
    half = dataclasses.replace(given, budget=given.budget // 2)
    return Guided(
        refinement=half.refinement, verifier=given.verifier, temperature=1.0, chains=2, strength=1.0
    )


def _least_doubted(given: Setting) -> LeastDoubted:
    one = LeastDoubted(method=Refinement(iterations=0, first=given.first), samples=1)
    cost = one.budget(given.task.grid)
    if given.budget < cost:
        raise UnfitError(
            f"budget must hold a first pass and the questions about its sample, {cost} here, "
            f"got {given.budget}"
        )
    return dataclasses.replace(one, samples=given.budget // cost)


METHODS: dict[str, Callable[[Setting], Any]] = {
    **{name: _particles(name) for name in PUBLISHED},
    "least-doubted": _least_doubted,
    "dfs": _depth_first,
    "sop": _rounds(Paths),
    "abcd": _rounds(Cycles),
    "rbf": _rollover,
    "langevin": _guided(_particles("best-of-n")),
    "bfs-langevin": _guided(_particles("bfs")),
    "dfs-langevin": _guided(_depth_first),
    "ipr-accept": _accepting,
    "ipr-chains": _chains,
}
"""How to make each method, by name."""

GRADIENTS = ("das", "langevin", "bfs-langevin", "dfs-langevin")
"""Those that follow the gradient of a score."""

ALONE = ("least-doubted",)
"""Those in which the network chooses by evaluations of its own, and no score: ``INTERNAL``."""


CHOICES: dict[str, tuple[str, ...]] = {
    "resampling": ("multinomial", "residual", "stratified", "systematic"),
    "temperature": ("constant", "infinite"),
    "scoring": ("current", "difference", "sum"),
}
"""What BFS could do instead of what its paper found best: ssp, increase and max."""


def made(
    task: Task,
    name: str,
    verifier: str,
    *,
    first: Sampling,
    later: Sampling,
    ratio: float | tuple[float, ...] = Refinement.ratio,
    budget: int | None = None,
) -> Any:
    """A method by name.

    Args:
        task: the benchmark.
        name: of ``METHODS``.
        verifier: by name: of ``verifiers.named``, or ``INTERNAL``, the network's own certainty,
            or its doubt where the method is one of ``ALONE``.
        first: how the first pass samples.
        later: how the iterations of refinement do.
        ratio: the share of the patches that each of these regenerates, see ``Refinement``.
        budget: network evaluations that no sample exceeds, at least those of a first pass over a
            board without clues; None = ``PASSES`` of them.

    Raises:
        ValueError: no such method or verifier, or the budget is below a first pass.
        UnfitError: the method and the verifier do not go together, or the budget is too small for
            the method.
    """
    if name not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {name!r}")
    steps = _steps(first, task.grid)
    budget = PASSES * steps if budget is None else budget
    if budget < steps:
        raise ValueError(f"budget must be at least a first pass, {steps} here, got {budget}")
    known = (*verifiers.names(task), INTERNAL)
    if verifier not in known:
        raise ValueError(
            f"verifier of {task.name} must be one of {', '.join(known)}, got {verifier!r}"
        )
    if verifier == INTERNAL:
        judge = scores.verifier(certainty, INTERNAL)
    else:
        judge = scores.verifier(**verifiers.named(task, verifier)._asdict())
    if name in GRADIENTS and not judge.differentiable:
        made = {each: verifiers.named(task, each) for each in verifiers.names(task)}
        soft = [each for each, other in made.items() if other.differentiable]
        raise UnfitError(
            f"verifier must have a gradient for the method {name}, "
            f"{' or '.join(soft) or 'which none here has'}, got {verifier!r}"
        )
    if name in ALONE and verifier != INTERNAL:
        raise UnfitError(
            f"verifier must be {INTERNAL} for the method {name}, in which the network alone "
            f"chooses, got {verifier!r}"
        )
    return METHODS[name](Setting(task, first, later, ratio, judge, budget))


def certainty(image: jax.Array, level: jax.Array, prediction: Prediction) -> jax.Array:
    """Minus the error of the velocity that the network expects, by patch: float32 [R]."""
    del image, level
    return -prediction.sigma.mean(axis=(1, 2), dtype=jnp.float32)


def kind_of(method: Any) -> str | None:
    """Of which kind what a method chooses by is, of ``scores.KINDS``, of several the least fair.

    None = by no score and no question of its own: the paper's refinement, and annealed refinement,
    which keeps a cycle by predictions that it makes anyway.
    """
    fields = [getattr(method, name, None) for name in ("verifier", "score", "guide", "doubt")]
    kinds = {each.kind for each in fields if isinstance(each, Verifier)}
    kinds |= {INTERNAL} if isinstance(method, LeastDoubted) else set()
    if (within := getattr(method, "method", None)) is not None:
        kinds |= {kind_of(within)} - {None}
    return max(kinds, key=scores.KINDS.index, default=None)
