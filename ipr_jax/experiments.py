"""The experiments of the IPR paper: refinements of the same samples that differ in one thing.

An experiment is a table of arms; each is refined and scored on its own, from the same samples and
the same keys. Finished arms are files, so an interrupted experiment goes on where it stopped.
"""

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ipr_jax import check, files, selection
from ipr_jax.evaluate import Refinement, evaluate, summarise
from ipr_jax.order import ORDERS, graph_order
from ipr_jax.regenerate import FIRST_PASS, REFINEMENT, Sampling
from ipr_jax.tasks.base import Task
from ipr_jax.types import Denoiser

Line = dict[str, float | int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arm:
    """One of the things that an experiment compares.

    Attributes:
        refinement: what to do.
        swapped: pairs of patches swapped in solved samples, which are then refined without a first
            pass; 0 = the task's own samples.
    """

    refinement: Refinement
    swapped: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
    """One figure of a paper.

    Attributes:
        title: what is compared.
        source: the figure or table.
        arms: what is compared with what, by label.
        published: the headline score of the paper by label and iteration, on its own task.
    """

    title: str
    source: str
    arms: Mapping[str, Arm]
    published: Mapping[str, Mapping[int, float]]


SETTINGS: dict[str, tuple[Sampling, Sampling]] = {
    "counting-polygons": (Sampling(overlap=0.9), Sampling(overlap=0.9)),
    "even-pixels": (
        Sampling(steps_per_patch=30, overlap=0.9),
        Sampling(steps_per_patch=30, overlap=0.9),
    ),
}
"""The paper's first pass and refinement by task (IPR, table 1); for others those of Sudoku."""


def _arm(task: Task, iterations: int, swapped: int = 0, **changes: Any) -> Arm:
    first, later = SETTINGS.get(task.name, (FIRST_PASS, REFINEMENT))
    return Arm(
        refinement=Refinement(
            iterations=iterations, first=None if swapped else first, later=later, **changes
        ),
        swapped=swapped,
    )


def refinement(task: Task, iterations: int) -> Experiment:
    """The headline score over iterations (IPR, figures 3a, 4 and 5)."""
    published = {"mnist-sudoku": {0: 0.558, 50: 0.75}, "counting-polygons": {0: 0.154, 50: 0.274}}
    return Experiment(
        title="Iterative Partial Refinement",
        source="IPR, figures 3a, 4 and 5",
        arms={"refined": _arm(task, iterations)},
        published={"refined": published.get(task.name, {})},
    )


def ratio(task: Task, iterations: int) -> Experiment:
    """The share of the patches that an iteration regenerates (IPR, figure 6a)."""
    ratios = (0.1, 0.25, 0.5)
    return Experiment(
        title="Resampling ratio",
        source="IPR, figure 6a",
        arms={f"{each:.2f}": _arm(task, iterations, ratio=each) for each in ratios},
        published={
            "0.10": {0: 0.558, 50: 0.726},
            "0.25": {0: 0.558, 50: 0.75},
            "0.50": {0: 0.558, 50: 0.542},
        },
    )


def noise_and_regions(task: Task, iterations: int) -> Experiment:
    """Fresh or fixed noise, fresh or fixed regions (IPR, figure 6b)."""
    return Experiment(
        title="Noise and regions",
        source="IPR, figure 6b",
        arms={
            "fresh noise and regions": _arm(task, iterations),
            "initial noise": _arm(task, iterations, noise=selection.initial_noise),
            "fixed regions": _arm(task, iterations, select=selection.fixed_regions),
        },
        published={
            "fresh noise and regions": {0: 0.558, 50: 0.75},
            "fixed regions": {0: 0.558, 50: 0.57},
        },
    )


def corrupted(task: Task, iterations: int) -> Experiment:
    """Solved boards with K pairs of cells swapped, all editable (IPR, figure 3b).

    Raises:
        ValueError: the task has no solved boards to swap cells of.
    """
    if task.corrupted is None:
        raise ValueError(f"the task {task.name} has no cells to swap, take one of Sudoku")
    cells = task.grid[0] * task.grid[1]
    return Experiment(
        title="Recovery of corrupted boards",
        source="IPR, figure 3b",
        arms={
            f"K = {pairs}": _arm(task, iterations, swapped=pairs)
            for pairs in (1, 3, 5, 7, 9)
            if 2 * pairs <= cells
        },
        published={},
    )


def samplers(task: Task, iterations: int) -> Experiment:
    """Ways to sample once, at equal network evaluations (SRM, the tables of its section 5)."""
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
    }
    return Experiment(
        title="Samplers",
        source="SRM, section 5",
        arms={
            label: Arm(refinement=Refinement(iterations=0, first=way))
            for label, way in ways.items()
        },
        published={},
    )


EXPERIMENTS: dict[str, Callable[[Task, int], Experiment]] = {
    "refinement": refinement,
    "ratio": ratio,
    "noise-and-regions": noise_and_regions,
    "corrupted": corrupted,
    "samplers": samplers,
}
"""Experiments by name: functions of the task and the number of iterations."""


def get_experiment(name: str) -> Callable[[Task, int], Experiment]:
    """The experiment of a name.

    Raises:
        ValueError: unknown; lists the known ones.
    """
    if name not in EXPERIMENTS:
        raise ValueError(f"unknown experiment {name!r}; known: {sorted(EXPERIMENTS)}")
    return EXPERIMENTS[name]


def describe(experiment: Experiment) -> dict[str, Any]:
    """An experiment as JSON data; functions by name."""
    return json.loads(json.dumps(dataclasses.asdict(experiment), default=lambda f: f.__name__))


def run(
    experiment: Experiment,
    task: Task,
    denoise: Denoiser,
    folder: Path,
    *,
    samples: int,
    seed: int,
    chunk: int,
    settings: Mapping[str, Any],
) -> Iterator[tuple[str, Line]]:
    """Refine and score every arm in ``folder``, from where it stopped if it holds this experiment.

    Writes ``config.json`` (the experiment and ``settings``) and, when an arm is finished, its
    metrics as ``arms/LABEL.json``, each whole or not at all.

    Args:
        experiment: what to compare.
        task: whose test samples and scores.
        denoise: the model.
        folder: a new one, or one that holds this experiment.
        samples: how many test samples, at least 1; the same in every arm.
        seed: of samples and noise.
        chunk: samples per compiled call, at least 1.
        settings: JSON data that tells how the numbers come about: model, versions, device.

    Returns:
        An iterator over (label, metrics of an iteration), also those of arms that were finished.

    Raises:
        ValueError: bad arguments, or the folder holds something else.
    """
    check.count("samples", samples)
    check.count("chunk", chunk)
    check.seed(seed)
    described = {"task": task.name, "samples": samples, "seed": seed, "chunk": chunk}
    text = json.dumps(described | describe(experiment) | dict(settings), indent=1)
    written = folder / "config.json"
    if written.exists():
        if written.read_text() != text:
            raise ValueError(
                f"{folder} holds another experiment, or one of another model, version or device; "
                f"choose another folder or the settings in {written}"
            )
    elif folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} exists and holds no experiment; choose another folder")
    else:
        (folder / "arms").mkdir(parents=True)
        files.write_text(written, text)
    return _run(experiment, task, denoise, folder, samples, seed, chunk)


def _run(
    experiment: Experiment,
    task: Task,
    denoise: Denoiser,
    folder: Path,
    samples: int,
    seed: int,
    chunk: int,
) -> Iterator[tuple[str, Line]]:
    for label, arm in experiment.arms.items():
        path = folder / "arms" / f"{label}.json"
        if path.exists():
            yield from ((label, line) for line in json.loads(path.read_text()))
            continue
        source = task.corrupted(arm.swapped) if arm.swapped and task.corrupted else task
        batch = source.test_batch(seed, np.arange(samples))
        lines, key = [], jax.random.key(seed)
        for progress in evaluate(task, denoise, batch, arm.refinement, key, chunk=chunk):
            lines.append(summarise(progress))
            yield label, lines[-1]
        files.write_text(path, json.dumps(lines))
