"""``ipr-jax refine``."""

import contextlib
import dataclasses
import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated

import jax
import numpy as np
import tyro

from ipr_jax.cli.hosts import HostOptions
from ipr_jax.cli.options import BatchOptions, RefinementOptions, new_folder, plain, refuse_idle
from ipr_jax.cli.shown import (
    SHOWN_IN_GRID,
    SHOWN_IN_MOTION,
    SHOWN_IN_ROWS,
    SHOWN_ITERATIONS,
    look_of,
    say_broken,
    say_chosen,
    shown_of,
    table_of,
)
from ipr_jax.cli.terminal import progress, say, show, signals
from ipr_jax.core import check
from ipr_jax.interrupts import interruptible
from ipr_jax.methods import Annealed, Refinement, most_doubted
from ipr_jax.models import checkpoint, compute_in
from ipr_jax.runtime import environment
from ipr_jax.studies import experiments, metrics, search, shards
from ipr_jax.studies.shards import Storage
from ipr_jax.tasks import TASKS, Batch, Task
from ipr_jax.tasks.registry import TAKES
from ipr_jax.tasks.sudoku import names

SUDOKU = ("mini-sudoku", "digits-sudoku", "mnist-sudoku")
"""The tasks that annealed refinement is for: there a patch follows from the others, so that to
predict it is to draw it."""


@dataclasses.dataclass(frozen=True)
class RefineOptions(HostOptions, BatchOptions, RefinementOptions):
    """The options of ``ipr-jax refine``.

    Attributes:
        task: the benchmark: mini-sudoku (4x4), digits-sudoku (9x9), mnist-sudoku, even-pixels,
            counting-polygons or counting-stars; by default that of the model, if --model is given,
            or of the puzzle, or medium puzzles of digits-sudoku.
        puzzle: refine your own puzzle instead, of 81 characters, or of 16 for mini-sudoku, such as
            "1..4 .... .3.. ....": row by row, with a dot, 0, _ or * for an empty cell.
        swapped: refine solved boards with so many pairs of cells swapped instead, all editable, by
            ipr.
        method: annealed (one evaluation per iteration, of fewer and fewer patches; the default for
            Sudoku), ipr (the paper's, the default for other tasks), least-doubted (of several
            samples, the network's choice), or a search with a --verifier: best-of-n, svdd, smc,
            das, fk-steering, bfs, treeg, dsearch, dfs, sop, abcd, rbf, langevin, bfs-langevin,
            dfs-langevin, ipr-accept or ipr-chains.
        samples: how many (64), or how many tries at your own puzzle (1).
        shard_size: samples per file.
        dtype: of the images in files: uint8 (0 to 255 for -1 to 1) or float32.
        save_minutes: between two checkpoints of unfinished samples; 0 = after every
            iteration, and about every 20 seconds.
    """

    task: str | None = None
    puzzle: str | None = None
    swapped: int = 0
    samples: int | None = None
    shard_size: int = Storage.shard_size
    dtype: str = Storage.dtype
    save_minutes: float = Storage.save_minutes


def command(
    options: Annotated[RefineOptions, tyro.conf.arg(name="")] = RefineOptions(),
) -> Path:
    """Complete puzzles by refinement: predict, hide some of it again, predict again.

    Without options: 64 handwritten 9x9 Sudoku puzzles, annealed refinement, and a new folder with
    samples/, manifest.json, metrics.jsonl, config.json, and to look at report.html, samples.png,
    refinement.png and refinement.gif. Started again with the same --out, it goes on where it
    stopped.
    """
    return refine(options)


def refine(options: RefineOptions) -> Path:
    """Run ``ipr-jax refine``.

    Returns:
        The folder.

    Raises:
        ValueError, OSError: bad options, or the folder holds something else; nothing has been
            written. Or a file cannot be written.
        ConnectionError: other processes cannot be reached.
    """
    options.join()
    if jax.process_count() > 1 and options.out is None:
        raise ValueError("several processes share a folder, give --out")
    options = _completed(options)
    assert options.task is not None
    task, model, opened = options.open(options.task)
    experiment = options.chosen(options.task, task)
    if options.swapped:
        assert isinstance(experiment, Refinement)
        experiment = dataclasses.replace(experiment, first=None)
    number = (64 if options.puzzle is None else 1) if options.samples is None else options.samples
    run = shards.Run(
        task=task,
        denoise=compute_in(model, options.precision),
        source=_source(task, options),
        experiment=experiment,
        samples=number,
        seed=options.seed,
        batch_size=options.batch_size,
        storage=Storage(
            shard_size=options.shard_size, dtype=options.dtype, save_minutes=options.save_minutes
        ),
    )
    start = experiment.start
    sample = run.source(np.arange(1))  # refuses what cannot be made, before anything is written
    folder = new_folder(options, task.name)
    aside = {field.name for field in dataclasses.fields(HostOptions)} | {"out", "save_minutes"}
    described = {
        "arguments": {name: v for name, v in plain(options).items() if name not in aside},
        "start": start,
        "verifier": search.kind_of(experiment),
        "refinement": experiments.describe(experiment),
        **opened,
        **environment.describe(),
    }
    remains = f"started again with --out {folder}, it goes on"
    status = None
    of = task.name if options.difficulty is None else f"{task.name}, {options.difficulty}"
    name = options.model or checkpoint.DEFAULTS[task.name]
    with interruptible(remains), signals() as preempted:
        steps = shards.refine(run, folder, described, preempted=preempted)
        say(f"samples: {number} of {of}; method: {options.method}; model: {name}")
        with contextlib.closing(steps), progress("compiling") as update:
            for status in steps:
                update(
                    "refining",
                    status.done,
                    status.total,
                    table_of(task, shown_of(status.lines), start),
                )
    assert status is not None
    finished = (folder / "manifest.json").exists()
    lines = status.lines
    if finished:
        text = (folder / "metrics.jsonl").read_text()
        lines = [json.loads(line) for line in text.splitlines()]
    show(table_of(task, shown_of(lines), start))
    say(f"{status.seconds:.0f} s, after {status.compile_seconds:.0f} s of compilation")
    if not finished:
        say(f"other processes have not finished their part of {folder}")
        return folder
    say_chosen(search.kind_of(experiment))
    broken = json.loads((folder / "manifest.json").read_text())["not_finite"]
    named = [f"{each['sample']} at iteration {each['iteration']}" for each in broken]
    say_broken(len(broken), named)
    first = next(shards.read(folder))
    with contextlib.suppress(FileExistsError):  # another process, done at the same time, draws them
        _draw_samples(folder, task, first, start)
    if not (folder / "report.html").exists():
        from ipr_jax.studies import report

        report.write(folder, report.of_run(folder, task, start))
    if options.puzzle is not None:
        _say_puzzle(task, folder, sample.label[0], lines[-1], start)
    say(f"\nwritten: {folder}")
    return folder


def _completed(options: RefineOptions) -> RefineOptions:
    """The options with the task and the method that they leave open.

    Raises:
        ValueError: boards with swapped cells are to be refined otherwise than by ipr.
    """
    if options.swapped and options.method not in (None, "ipr"):
        raise ValueError(
            f"boards with swapped cells are refined by --method ipr, got {options.method!r}"
        )
    task, difficulty, puzzle = options.task, options.difficulty, options.puzzle
    if task is None and options.model is not None:
        task = checkpoint.provenance_of(options.model).get("task")
    if task not in TASKS and options.task is None:
        small = puzzle is not None and len("".join(puzzle.split())) < 40
        task = "mini-sudoku" if small else "digits-sudoku"
    if "difficulty" in TAKES.get(task or "", ()) and puzzle is None and not options.swapped:
        difficulty = difficulty or "medium"
    annealed = task in SUDOKU and not options.swapped
    method = options.method or ("annealed" if annealed else "ipr")
    return dataclasses.replace(options, task=task, difficulty=difficulty, method=method)


def _source(task: Task, options: RefineOptions) -> Callable[[np.ndarray], Batch]:
    """The samples of some indices."""
    check.count("swapped", options.swapped, least=0)
    if options.swapped:
        aside = ("difficulty", "first_steps_per_patch", "first_overlap")
        refuse_idle(options, "boards with swapped cells are refined as they are", *aside)
    if options.puzzle is None:
        return partial(experiments.source(task, options.swapped).test_batch, options.seed)
    refuse_idle(options, "--puzzle is a board of its own", "swapped", "difficulty")
    if task.parse_puzzle is None:
        raise ValueError(f"the task {task.name} has no puzzles, leave out --puzzle")
    puzzle = task.parse_puzzle(options.puzzle, options.seed)
    return lambda indices: Batch(*(part.repeat(len(indices), axis=0) for part in puzzle))


def _say_puzzle(
    task: Task, folder: Path, given: np.ndarray, line: metrics.Line, start: str
) -> None:
    """The board of a puzzle before and after, and what has become of it: a solved one of several
    tries, if there is any.
    """
    tries, solved = line["samples"], line[task.headline]
    found = shards.read(folder)
    shown = next(found)
    while solved and not shown[task.headline][-1].any():
        shown = next(found)
    try_ = int(np.argmax(2 * shown[task.headline][-1] + (shown["broke_at"] < 0)))
    if tries > 1:
        chosen = "; one of them is shown, chosen by the rules, a verifier" if solved else ""
        say(f"\n{solved} of {tries} tries are {task.headline}{chosen}")
    assert task.format_sample is not None
    assert task.explain is not None
    boards = (("first_pass", start, 0), ("refined", "refined", -1))
    history = shown[task.headline][:, try_]
    verdicts = [task.headline if holds else f"not {task.headline}" for holds in history]
    for name, title, which in boards[: len(history)]:
        say(f"\n{title} ({verdicts[which]}), given cells in brackets", "bold")
        say(task.format_sample(shards.to_float(shown[name][try_]), given))
    if len(history) == 1:
        when = f"after the {start}"
    elif history[-1]:
        since = int(np.flatnonzero(~history).max(initial=-1)) + 1
        when = f"from {f'iteration {since}' if since else f'the {start}'} on"
    else:
        when = f"after {len(history) - 1} iterations"
    explained = task.explain(shards.to_float(shown["refined"][try_]), given)
    doubted = ""
    if "doubt" in shown:
        cells = names(most_doubted(shown["doubt"][try_], given == 0, calm=Annealed.calm))
        doubted = f"; the network doubts {' '.join(cells) or 'none of its cells'}"
    say(f"\nThe board is {verdicts[-1]} {when}; {explained}{doubted}.")


def _draw_samples(folder: Path, task: Task, arrays: Mapping[str, np.ndarray], start: str) -> None:
    """Draw the finite samples of the first file, unless they were drawn: many at the end, few over
    the iterations, one in motion.
    """
    from ipr_jax.studies import pictures

    look, headline, editable = look_of(task), task.headline, arrays["editable"]
    solved, followed = arrays[headline], arrays["followed"]
    finite = np.flatnonzero(arrays["broke_at"] < 0)
    last = len(solved) - 1
    path = folder / "samples.png"
    if len(finite) and not path.exists():
        many = finite[:SHOWN_IN_GRID]
        grid = look(arrays["refined"][many], editable[many], solved[last][many])
        pictures.samples(path, grid, last, headline, start)
    few = finite[finite < followed.shape[1]][:SHOWN_IN_ROWS]
    if not len(few):
        return
    frames = np.linspace(0, last, min(last, SHOWN_IN_MOTION) + 1, dtype=int).tolist()
    moments = {
        which: look(followed[which][few], editable[few], solved[which][few])
        for which in sorted({*frames, *(i for i in (*SHOWN_ITERATIONS, last) if i <= last)})
    }
    path = folder / "refinement.png"
    if not path.exists():
        chosen = (*SHOWN_ITERATIONS, last)
        columns = {which: shown for which, shown in moments.items() if which in chosen}
        pictures.refinement(path, columns, headline, start)
    path = folder / "refinement.gif"
    if not path.exists():
        improved = int((~solved[0][few] & solved[last][few]).argmax())  # 0 if there is none
        pictures.animation(path, moments, improved, headline, start)
