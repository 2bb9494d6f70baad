"""The experiments of the IPR paper: refinements of the same samples that differ in one thing.

An experiment is a table of arms; each is refined and scored on its own, from the same samples and
the same keys. Finished arms are files, so an interrupted experiment goes on where it stopped.
"""

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from ipr_jax.core import Denoiser, check
from ipr_jax.methods import Annealed, Refinement, selection
from ipr_jax.runtime import files, memory
from ipr_jax.sampling import FIRST_PASS, ORDERS, REFINEMENT, Sampling, graph_order, random_order
from ipr_jax.studies import search
from ipr_jax.studies.evaluate import evaluate, summarise
from ipr_jax.studies.metrics import Line, difference
from ipr_jax.tasks import Task, verifiers


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arm:
    """One of the things that an experiment compares.

    Attributes:
        refinement: what to do, as for ``evaluate``.
        swapped: pairs of patches swapped in solved samples, which are then refined without a first
            pass; 0 = the task's own samples.
        precision: of the network; None = as asked for.
        family: of arms that differ in what they may cost alone.
    """

    refinement: Any
    swapped: int = 0
    precision: str | None = None
    family: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
    """One figure of a paper.

    Attributes:
        title: what is compared.
        source: the figure or table.
        arms: what is compared with what, by label.
        reference: label of the arm that the others are compared with; None = with nothing.
        at_equal_cost: whether with what it has come to at their number of evaluations, else at the
            end; the figure then shows scores against evaluations, a line for each family.
        seconded: whether the task's independent verifier judges all samples as well.
        scores: names of the task's scores that the figure shows.
        published: the paper's numbers on its own task, by score, label and iteration.
    """

    title: str
    source: str
    arms: Mapping[str, Arm]
    reference: str | None
    scores: tuple[str, ...]
    published: Mapping[str, Mapping[str, Mapping[int, float]]]
    at_equal_cost: bool = False
    seconded: bool = False


_POLYGONS = Sampling(overlap=0.9)
_PIXELS = Sampling(steps_per_patch=30, overlap=0.9)
SETTINGS: dict[str, tuple[Sampling, Sampling]] = {
    "mini-sudoku": (FIRST_PASS, REFINEMENT),
    "digits-sudoku": (FIRST_PASS, REFINEMENT),
    "mnist-sudoku": (FIRST_PASS, REFINEMENT),
    "even-pixels": (_PIXELS, _PIXELS),
    "counting-polygons": (_POLYGONS, _POLYGONS),
    "counting-stars": (_POLYGONS, _POLYGONS),
}
"""The first pass and the refinement by task (IPR, table 1)."""

PUBLISHED: dict[str, dict[int, float]] = {
    "valid": {0: 0.558, 50: 0.75},
    "consistent": {0: 0.154, 50: 0.274},
    "uniform": {0: 0.988, 50: 1.0},
    "saturation_std": {0: 0.0073, 50: 0.0027},
    "value_std": {0: 0.0047, 50: 0.0021},
}
"""IPR's scores by iteration (its sections 4.2 to 4.4)."""


def as_published(task: Task, iterations: int, **changes: Any) -> Refinement:
    """The paper's refinement of a task, with changes."""
    first, later = SETTINGS[task.name]
    return Refinement(**{"iterations": iterations, "first": first, "later": later} | changes)


def plain(task: Task, refinement: Any) -> Experiment:
    """One method, and all that the task reports of it; the paper's numbers are beside its own."""
    scores = (*task.rates, *task.means)
    if isinstance(refinement, Refinement):
        title, source, published = "Refinement", "IPR, figures 3a, 4 and 5", PUBLISHED
    else:
        title = "Annealed refinement" if isinstance(refinement, Annealed) else "Search"
        source, published = "not in the paper", {}
    return Experiment(
        title=title,
        source=source,
        arms={"refined": Arm(refinement=refinement)},
        reference=None,
        scores=scores,
        published={name: {"refined": published[name]} for name in scores if name in published},
    )


def refinement(task: Task, iterations: int) -> Experiment:
    """What refinement does for a task (IPR, figures 3a, 4 and 5)."""
    return plain(task, as_published(task, iterations))


def ratio(task: Task, iterations: int) -> Experiment:
    """The share of the patches that an iteration regenerates (IPR, figure 6a)."""
    arms = {
        f"{each:.2f}": Arm(refinement=as_published(task, iterations, ratio=each))
        for each in (0.1, 0.25, 0.5)
    }
    published = {"0.10": {0: 0.558, 50: 0.726}, "0.25": PUBLISHED["valid"], "0.50": {50: 0.542}}
    return Experiment(
        title="Resampling ratio",
        source="IPR, figure 6a",
        arms=arms,
        reference="0.25",
        scores=(task.headline,),
        published={"valid": published},
    )


def noise_and_regions(task: Task, iterations: int) -> Experiment:
    """Fresh or fixed noise, fresh or fixed regions (IPR, figure 6b)."""
    ways = {
        "fresh noise and regions": {},
        "initial noise": {"noise": selection.initial_noise},
        "fixed regions": {"select": selection.fixed_regions},
    }
    return Experiment(
        title="Noise and regions",
        source="IPR, figure 6b",
        arms={
            label: Arm(refinement=as_published(task, iterations, **changes))
            for label, changes in ways.items()
        },
        reference="fresh noise and regions",
        scores=(task.headline,),
        published={
            "valid": {"fresh noise and regions": PUBLISHED["valid"], "fixed regions": {50: 0.57}}
        },
    )


def corrupted(task: Task, iterations: int) -> Experiment:
    """Solved boards with K pairs of cells swapped, all editable (IPR, figure 3b)."""
    cells = task.grid[0] * task.grid[1]
    return Experiment(
        title="Recovery of corrupted boards",
        source="IPR, figure 3b",
        arms={
            f"K = {pairs}": Arm(
                refinement=as_published(task, iterations, first=None), swapped=pairs
            )
            for pairs in (1, 3, 5, 7, 9)
            if 2 * pairs <= cells
        },
        reference=None,
        scores=(task.headline,),
        published={},
    )


BUDGETS = (20, 40, 80, 160, 320, 640)
"""Network evaluations per sample that methods are compared at."""


def frontier(task: Task, iterations: int) -> Experiment:
    """What methods without a verifier come to at 20 to 640 evaluations per sample."""
    del iterations  # the budgets tell
    paper = as_published(task, 0)
    later = as_published(task, 1).budget(task.grid) - paper.budget(task.grid)
    length = -(-(BUDGETS[-1] - paper.budget(task.grid)) // later)
    arms = {"IPR": Arm(refinement=as_published(task, max(1, length)), family="IPR")}
    finish = Annealed.finish_parts * Annealed.finish_steps
    for budget in BUDGETS[:4]:
        method = Annealed(iterations=budget - finish, cycles=1)
        arms[f"one cycle of {method.iterations}"] = Arm(refinement=method, family="one cycle")
    for cycles in (2, 4, 8):
        method = Annealed(cycles=cycles, calm=0)
        arms[f"best of {cycles}"] = Arm(refinement=method, family="best of cycles of 40")
    for cycles in (4, 16):
        method = Annealed(cycles=cycles)
        arms[f"at most {cycles}"] = Arm(refinement=method, family="cycles until calm")
    return _at_equal_cost("Solved samples at equal cost", "not in the papers", task, arms)


SEARCHED = (3, 6)
"""What every search may cost, in first passes over a board without clues."""


def searches(task: Task, iterations: int) -> Experiment:
    """Every search with all verifiers that it can use, at the evaluations of 3 and 6 passes where
    these do for it.
    """
    del iterations  # the budgets tell
    first, later = SETTINGS[task.name]
    passes = as_published(task, 0).budget(task.grid)
    step = as_published(task, 1).budget(task.grid) - passes
    paper = as_published(task, max(1, (SEARCHED[-1] - 1) * passes // step))
    arms = {"IPR": Arm(refinement=paper, family="IPR")}
    for number in SEARCHED:
        method = Annealed(cycles=number * passes // Annealed.iterations)
        arms[f"annealed, {number} passes"] = Arm(refinement=method, family="annealed")
    for kind in (search.INTERNAL, *verifiers.names(task)):
        for name in search.METHODS:
            soft = kind.endswith("soft")
            if soft != (name in search.GRADIENTS):
                continue
            for number in SEARCHED:
                budget = number * passes
                try:
                    method = search.made(task, name, kind, first=first, later=later, budget=budget)
                except search.UnfitError:
                    continue
                label = f"{name}, {kind}, {number} passes"
                arms[label] = Arm(refinement=method, family=name)
    made = _at_equal_cost("Search at equal cost", "methods of several papers", task, arms)
    return dataclasses.replace(made, seconded=True)


def choices(task: Task, iterations: int) -> Experiment:
    """BFS, and BFS with one of its choices made in another way, by the independent verifier."""
    del iterations  # nothing is refined
    first, later = SETTINGS[task.name]
    base = search.made(task, "bfs", verifiers.INDEPENDENT, first=first, later=later)
    others = {
        f"{name}: {value}": Arm(refinement=dataclasses.replace(base, **{name: value}))
        for name, values in search.CHOICES.items()
        for value in values
    }
    return Experiment(
        title="Choices of BFS",
        source="after classical search, arXiv 2505.23614",
        arms={"bfs": Arm(refinement=base)} | others,
        reference="bfs",
        scores=(task.headline,),
        published={},
        seconded=True,
    )


def _at_equal_cost(title: str, source: str, task: Task, arms: dict[str, Arm]) -> Experiment:
    """Arms compared with IPR's at their numbers of evaluations."""
    return Experiment(
        title=title,
        source=source,
        arms=arms,
        reference="IPR",
        scores=(task.headline,),
        published={},
        at_equal_cost=True,
    )


def samplers(task: Task, iterations: int) -> Experiment:
    """Ways to sample once, at equal network evaluations (after SRM, arXiv 2502.21075)."""
    del iterations  # nothing is refined
    base = Sampling(max_steps=1000, stochasticity=1.0)
    ways = {
        "parallel": dataclasses.replace(base, overlap=1.0),
        "parallel, deterministic": dataclasses.replace(base, overlap=1.0, stochasticity=0.0),
        **{
            f"{name}, one by one": dataclasses.replace(base, overlap=0.0, order=order)
            for name, order in (ORDERS | {"graph": graph_order(task.dependencies)}).items()
        },
        "certain, overlap 0.75": dataclasses.replace(base, overlap=0.75),
        "random, overlap 0.75": dataclasses.replace(base, overlap=0.75, order=random_order),
    }
    return Experiment(
        title="Samplers",
        source="after SRM",
        arms={
            label: Arm(refinement=Refinement(iterations=0, first=way))
            for label, way in ways.items()
        },
        reference="certain, one by one",
        scores=(task.headline,),
        published={},
    )


def precision(task: Task, iterations: int) -> Experiment:
    """The same refinement with the network in float32 and in bfloat16."""
    return Experiment(
        title="Precision of the network",
        source="not in the papers",
        arms={
            name: Arm(refinement=as_published(task, iterations), precision=name)
            for name in ("float32", "bfloat16")
        },
        reference="float32",
        scores=(task.headline,),
        published={},
    )


class Definition(NamedTuple):
    """How to make an experiment of a task and a number of iterations.

    Attributes:
        make: makes it.
        task: it is run on this one unless another is asked for.
        counted: whether it has the number of iterations that is asked for.
    """

    make: Callable[[Task, int], Experiment]
    task: str
    counted: bool = True


EXPERIMENTS: dict[str, Definition] = {
    "sudoku-hard": Definition(refinement, "mnist-sudoku"),
    "sudoku-corrupted": Definition(corrupted, "mini-sudoku"),
    "polygons": Definition(refinement, "counting-polygons"),
    "even-pixels": Definition(refinement, "even-pixels"),
    "ratio": Definition(ratio, "mini-sudoku"),
    "noise-and-regions": Definition(noise_and_regions, "mini-sudoku"),
    "frontier": Definition(frontier, "mini-sudoku", counted=False),
    "search": Definition(searches, "mini-sudoku", counted=False),
    "search-choices": Definition(choices, "mini-sudoku", counted=False),
    "samplers": Definition(samplers, "mini-sudoku", counted=False),
    "precision": Definition(precision, "mini-sudoku"),
}
"""Experiments by name."""


def get_experiment(name: str) -> Definition:
    """The experiment of a name.

    Raises:
        ValueError: unknown; lists the known ones.
    """
    if name not in EXPERIMENTS:
        raise ValueError(f"unknown experiment {name!r}; known: {', '.join(EXPERIMENTS)}")
    return EXPERIMENTS[name]


def describe(experiment: Experiment | Refinement) -> dict[str, Any]:
    """What is done, as JSON data; functions and networks by name."""

    def plain(value: Any) -> dict[str, Any] | str:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return {each.name: getattr(value, each.name) for each in dataclasses.fields(value)}
        return getattr(value, "__name__", type(value).__name__)

    return json.loads(json.dumps(experiment, default=plain))


def run(
    experiment: Experiment,
    task: Task,
    denoise: Callable[[str | None], Denoiser],
    folder: Path,
    *,
    samples: int,
    seed: int,
    batch_size: memory.Size,
    settings: Mapping[str, Any],
) -> Iterator[tuple[str, Line]]:
    """Refine and score every arm in ``folder``, from where it stopped if it holds this experiment.

    Writes ``config.json`` (the experiment and ``settings``); when an arm is finished
    ``arms/LABEL.json``, its metrics and which samples were solved after every iteration, a text of
    1, 0 and x (not finite);
    when all are ``results.json``, all settings, all metrics and the differences between arms. Each
    is there whole or not at all.

    Args:
        experiment: what to compare.
        task: whose test samples and scores.
        denoise: the model in the precision of an arm.
        folder: a new one, or one that holds this experiment.
        samples: how many test samples, at least 1; the same in every arm.
        seed: of samples and noise.
        batch_size: samples per compiled call, at least 1, or "auto"; the metrics tell the number.
        settings: JSON data that tells how the numbers come about: model, versions, device.

    Returns:
        An iterator over (label, metrics of an iteration), also those of arms that were finished.

    Raises:
        ValueError: before anything is written: bad arguments, an arm that the task does not have,
            or the folder holds something else.
    """
    check.count("samples", samples)
    check.count("batch_size", batch_size, auto=True)
    check.seed(seed)
    if experiment.seconded:
        task = verifiers.seconded(task)
    for arm in experiment.arms.values():
        source(task, arm.swapped).test_batch(seed, np.arange(1))
    task.check_scores()
    described = {
        "task": task.name,
        "samples": samples,
        "seed": seed,
        "batch_size": batch_size,
        **describe(experiment),
        **settings,
    }
    files.claim(folder, described)

    def advance() -> Iterator[tuple[str, Line]]:
        for label, arm in experiment.arms.items():
            path = folder / "arms" / f"{label}.json"
            if path.exists():
                yield from ((label, line) for line in _finished(path)["metrics"])
                continue
            batch = source(task, arm.swapped).test_batch(seed, np.arange(samples))
            key, lines, solved = jax.random.key(seed), [], []
            model = denoise(arm.precision)
            for progress in evaluate(
                task, model, batch, arm.refinement, key, batch_size=batch_size
            ):
                lines.append(summarise(progress, task))
                holds = progress.scores[task.headline]
                marks = np.where(progress.finite, np.where(holds, "1", "0"), "x")
                solved.append("".join(marks.tolist()))
                yield label, lines[-1]
            path.parent.mkdir(exist_ok=True)
            files.write_record(path, {"metrics": lines, "solved": solved})
        arms = {label: _finished(folder / "arms" / f"{label}.json") for label in experiment.arms}
        found = {
            "metrics": {label: arm["metrics"] for label, arm in arms.items()},
            "differences": _differences(experiment, arms),
        }
        files.agree(folder / "results.json", json.dumps(described | found, indent=1), "arms/")

    return advance()


def _finished(path: Path) -> dict[str, Any]:
    """What is written of an arm.

    Raises:
        ValueError: it is damaged.
    """
    try:
        return files.read_record(path)
    except ValueError as error:
        raise ValueError(f"{error}; remove it to run this arm again") from error


def source(task: Task, swapped: int) -> Task:
    """The task whose samples are refined: itself, or solved samples with swapped pairs of patches.

    Raises:
        ValueError: the task has no cells to swap, or not so many.
    """
    if not swapped:
        return task
    if task.corrupted is None:
        raise ValueError(f"the task {task.name} has no cells to swap, take one of Sudoku")
    return task.corrupted(swapped)


def _differences(experiment: Experiment, arms: Mapping[str, Mapping[str, list]]) -> dict[str, Line]:
    """By how much the final headline rate of each arm exceeds the reference's, sample by sample.

    A sample that is not finite in one of the two is left out.
    """
    if experiment.reference is None:
        return {}
    reference = arms[experiment.reference]

    def compared(arm: Mapping[str, list]) -> Line:
        row = len(reference["metrics"]) - 1
        if experiment.at_equal_cost:
            spent = arm["metrics"][-1]["nfe"]
            row = max(0, sum(line["nfe"] <= spent for line in reference["metrics"]) - 1)
        pairs = zip(arm["solved"][-1], reference["solved"][row], strict=True)
        known = [(one == "1", other == "1") for one, other in pairs if "x" not in (one, other)]
        return difference(*np.array(known, bool).reshape(-1, 2).T)

    return {label: compared(arm) for label, arm in arms.items() if label != experiment.reference}
