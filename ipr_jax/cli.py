"""The command line ``ipr-jax``: refine, evaluate, stream, experiment, train, info and export."""

import contextlib
import dataclasses
import datetime
import hashlib
import io
import json
import logging
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import tyro
from flax import nnx
from jax.experimental import multihost_utils
from rich.table import Table

from ipr_jax import (
    cache,
    check,
    checkpoint,
    evaluate,
    experiments,
    export,
    files,
    flops,
    metrics,
    shards,
)
from ipr_jax.denoiser import MODELS
from ipr_jax.environment import environment, version
from ipr_jax.hosts import HostOptions, ended_together
from ipr_jax.interrupts import interruptible
from ipr_jax.networks import inputs, open_network
from ipr_jax.options import (
    BatchOptions,
    Opened,
    PassOptions,
    RefinementOptions,
    TaskOptions,
    get_rule,
    plain,
    refuse_idle,
    typed,
)
from ipr_jax.precision import compute_in, get_precision
from ipr_jax.shards import Storage
from ipr_jax.tasks import TASKS, get_task
from ipr_jax.tasks.base import Batch, Task
from ipr_jax.terminal import naming, one_line_errors, progress, say, show, signals, unraisable
from ipr_jax.training import trainer
from ipr_jax.training.recipes import RECIPES

SHOWN_IN_GRID = 64
SHOWN_ITERATIONS = (0, 1, 2, 5, 10, 20, 50, 100)


@dataclasses.dataclass(frozen=True)
class RefineOptions(HostOptions, BatchOptions, RefinementOptions):
    """The options of ``ipr-jax refine``.

    Attributes:
        task: the benchmark: mini-sudoku, digits-sudoku, mnist-sudoku, even-pixels,
            counting-polygons or counting-stars.
        puzzle: refine your own puzzle instead, such as "1..4 .... .3.. ....".
        swapped: refine solved boards with so many pairs of cells swapped instead, all editable.
        samples: how many (64), or how many tries at your own puzzle (1).
        shard_size: samples per file.
        dtype: of the images in files: uint8 (0 to 255 for -1 to 1) or float32.
        save_minutes: between two checkpoints of unfinished samples; 0 = after every iteration.
    """

    task: str = "mini-sudoku"
    puzzle: str | None = None
    swapped: int = 0
    samples: int | None = None
    shard_size: int = Storage.shard_size
    dtype: str = Storage.dtype
    save_minutes: float = Storage.save_minutes


@dataclasses.dataclass(frozen=True)
class EvaluateOptions(BatchOptions, RefinementOptions):
    """The options of ``ipr-jax evaluate TASK``.

    Attributes:
        samples: how many test samples.
        iterations: iterations after the first pass.
    """

    samples: int = 500
    iterations: int = 50


@dataclasses.dataclass(frozen=True)
class StreamOptions(RefinementOptions):
    """The options of ``ipr-jax stream TASK``.

    Attributes:
        samples: how many test samples.
        slots: samples that the network sees at once; larger suits a GPU or TPU.
        stop: when a sample may leave early: none, unchanged (what the scores read in it has not
            changed in an iteration) or verified (the score itself finds it solved, a verifier).
        patience: how often in a row the rule must hold.
    """

    samples: int = 500
    slots: int = 64
    stop: str = "none"
    patience: int = 1


@dataclasses.dataclass(frozen=True)
class ExperimentOptions(BatchOptions, TaskOptions):
    """The options of ``ipr-jax experiment NAME``.

    Attributes:
        task: another benchmark than the experiment's own: mini-sudoku, digits-sudoku,
            mnist-sudoku, even-pixels, counting-polygons or counting-stars.
        samples: how many test samples, the same in every arm.
        iterations: iterations after the first pass.
    """

    task: str | None = None
    samples: int = 500
    iterations: int = 50


@dataclasses.dataclass(frozen=True)
class ExportOptions(PassOptions):
    """The options of ``ipr-jax export MODEL OUT``.

    Attributes:
        task: the benchmark whose settings hold where nothing is given: mini-sudoku, digits-sudoku,
            mnist-sudoku, even-pixels, counting-polygons or counting-stars; by default the one that
            the model was trained on, if it tells.
        precision: of the network: float32, tf32 (a GPU's, float32 elsewhere) or bfloat16.
    """

    task: str | None = None
    precision: str = "float32"


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
    for warning in puzzle.warnings:
        say(f"This puzzle has no solution: {warning}.", "yellow")
    return lambda indices: Batch(*(part.repeat(len(indices), axis=0) for part in puzzle.batch))


def _folder(options: TaskOptions, name: str) -> Path:
    """That of the options, or a new one."""
    now = datetime.datetime.now().strftime("%Y%m%d-%H%M%S-%f")
    return options.out or Path("results") / f"{name}-{now}"


def _same_folder(folder: Path, options: Any, default: Any) -> Path:
    """That of the same command, which goes on there: options other than by default have another."""
    usual = plain(default)
    given = {name: v for name, v in plain(options).items() if name != "out" and v != usual[name]}
    digest = hashlib.sha256(json.dumps(given).encode()).hexdigest()[:8]
    return folder.with_name(f"{folder.name}-{digest}") if given else folder


def _table(task: Task, lines: list[dict[str, Any]], start: str) -> Table:
    """The scores of the task, the headline with its interval, and what they cost; ``start`` is
    what iteration 0 is.
    """
    table = Table(box=None, header_style="bold")
    rates = [f"{name} %" for name in task.rates[1:]]
    timed = all("samples_per_second" in line for line in lines)
    for title in (
        *("iteration", f"{task.headline} %", "95% interval", *rates, *task.means),
        "evaluations per sample",
        *(["samples/s"] if timed else []),
    ):
        table.add_column(title, justify="right")

    def percent(line: dict[str, Any], *names: str) -> str:
        return " to ".join(f"{100 * line[name]:.1f}" if name in line else "-" for name in names)

    for line in lines:
        ends = (f"{task.headline}_low", f"{task.headline}_high")
        table.add_row(
            str(line["iteration"] or start),
            percent(line, f"{task.headline}_rate"),
            percent(line, *ends) if ends[0] in line else "-",
            *(percent(line, f"{name}_rate") for name in task.rates[1:]),
            *(f"{line[name]:.3g}" if name in line else "-" for name in task.means),
            f"{line['nfe']:.0f}",
            *([f"{line['samples_per_second']:.1f}"] if timed else []),
        )
    return table


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
    experiment = options.refinement(options.task)
    task, model, opened = options.open(options.task)
    number = (64 if options.puzzle is None else 1) if options.samples is None else options.samples
    run = shards.Run(
        task=task,
        denoise=compute_in(model, options.precision),
        source=_source(task, options),
        experiment=dataclasses.replace(experiment, first=None) if options.swapped else experiment,
        samples=number,
        seed=options.seed,
        batch_size=options.batch_size,
        storage=Storage(
            shard_size=options.shard_size, dtype=options.dtype, save_minutes=options.save_minutes
        ),
    )
    start = run.experiment.start
    sample = run.source(np.arange(1))  # refuses what cannot be made, before anything is written
    folder = _folder(options, options.task)
    aside = {field.name for field in dataclasses.fields(HostOptions)} | {"out", "save_minutes"}
    described = {
        "arguments": {name: v for name, v in plain(options).items() if name not in aside},
        "refinement": experiments.describe(run.experiment),
        **opened,
        **environment(),
    }
    remains = f"started again with --out {folder}, it goes on"
    status = None
    with interruptible(remains), signals() as preempted:
        steps = shards.refine(run, folder, described, preempted=preempted)
        with contextlib.closing(steps), progress("compiling") as update:
            for status in steps:
                update("refining", status.done, status.total, _table(task, status.lines, start))
    assert status is not None
    finished = (folder / "manifest.json").exists()
    lines = status.lines
    if finished:
        text = (folder / "metrics.jsonl").read_text()
        lines = [json.loads(line) for line in text.splitlines()]
    show(_table(task, lines, start))
    say(f"{status.seconds:.0f} s, after {status.compile_seconds:.0f} s of compilation")
    if not finished:
        say(f"other processes have not finished their part of {folder}")
        return folder
    broken = json.loads((folder / "manifest.json").read_text())["not_finite"]
    named = [f"{each['sample']} at iteration {each['iteration']}" for each in broken]
    _say_broken(len(broken), named)
    first = next(shards.read(folder))
    with contextlib.suppress(FileExistsError):  # another process, done at the same time, draws them
        _draw_samples(folder, task, first, start)
    if options.puzzle is not None:
        _say_puzzle(task, folder, sample.label[0], lines[-1])
    say(f"\nwritten: {folder}")
    return folder


def _say_broken(number: float, named: Sequence[str] = (), most: int = 5) -> None:
    """How many samples are not finite, and the first of them by name."""
    if number:
        more = ", ..." if len(named) > most else ""
        names = f" ({', '.join(named[:most])}{more})" if named else ""
        say(f"not finite and not counted: {number} samples{names}", "red")


def _say_puzzle(task: Task, folder: Path, given: np.ndarray, line: metrics.Line) -> None:
    """The board of a puzzle before and after: a solved one of several tries, if there is any."""
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
    for title, which in (("first_pass", 0), ("refined", -1)):
        verdict = task.headline if shown[task.headline][which, try_] else f"not {task.headline}"
        say(f"\n{title.replace('_', ' ')} ({verdict}), given cells in brackets", "bold")
        say(task.format_sample(shards.to_float(shown[title][try_]), given))


def _look(task: Task) -> Callable[[Any, np.ndarray, np.ndarray], Any]:
    """``(images, editable, solved) -> pictures.Samples``, what is drawn of samples."""
    from ipr_jax import pictures

    violating = jax.jit(task.violating) if task.violating else None
    score = jax.jit(task.score)

    def look(images: Any, editable: np.ndarray, solved: np.ndarray) -> pictures.Samples:
        image = shards.to_float(np.asarray(images))
        return pictures.Samples(
            image,
            editable,
            solved,
            np.asarray(violating(image)) if violating else None,
            task.describe(jax.device_get(score(image))) if task.describe else None,
        )

    return look


def _draw_samples(folder: Path, task: Task, arrays: Mapping[str, np.ndarray], start: str) -> None:
    """Draw the finite samples of the first file, unless they were drawn: many at the end, few over
    the iterations, one in motion.
    """
    from ipr_jax import pictures

    look, headline, editable = _look(task), task.headline, arrays["editable"]
    solved, followed = arrays[headline], arrays["followed"]
    finite = np.flatnonzero(arrays["broke_at"] < 0)
    last = len(solved) - 1
    path = folder / "samples.png"
    if len(finite) and not path.exists():
        many = finite[:SHOWN_IN_GRID]
        grid = look(arrays["refined"][many], editable[many], solved[last][many])
        pictures.samples(path, grid, last, headline, start)
    few = finite[finite < followed.shape[1]]
    if not len(few):
        return
    moments = {
        which: look(images[few], editable[few], solved[which][few])
        for which, images in enumerate(followed)
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


def stream(task: str, options: StreamOptions) -> Path:
    """Run ``ipr-jax stream TASK``.

    Returns:
        The new folder, which appears whole or not at all.

    Raises:
        ValueError, OSError: bad options; nothing has been written.
    """
    from ipr_jax import pictures

    for name in ("samples", "slots", "iterations", "patience"):
        check.count(name, getattr(options, name))
    check.seed(options.seed)
    if options.stop == "none":
        refuse_idle(options, "without --stop no sample leaves early", "patience")
    refinement = options.refinement(task)
    opened = options.open(task)
    rule = get_rule(options.stop, opened.task)
    batch = opened.task.test_batch(options.seed, np.arange(options.samples))
    folder = _folder(options, f"stream-{task}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    files.refuse_existing(folder)
    with interruptible("nothing has been written"), progress("compiling and refining"):
        streamed, found = evaluate.evaluate_stream(
            opened.task,
            compute_in(opened.model, options.precision),
            batch,
            refinement,
            jax.random.key(options.seed),
            slots=options.slots,
            stop=rule,
            patience=options.patience,
        )
    line = evaluate.summarise_stream(streamed, opened.task, found)
    described = {
        "task": task,
        "arguments": plain(options) | {"out": str(folder)},
        "uses_verifier": options.stop == "verified",
        "refinement": experiments.describe(refinement),
        **opened.described,
        **environment(),
        "metrics": line,
    }
    with files.whole(folder) as part:
        part.mkdir()
        np.savez_compressed(
            part / "samples.npz",
            allow_pickle=False,
            refined=streamed.image,
            editable=batch.editable,
            **streamed.scores,
            iterations=found.iterations,
            nfe=streamed.nfe,
            finite=streamed.finite,
        )
        files.write_text(part / "results.json", json.dumps(described, indent=1))
        finite = np.flatnonzero(streamed.finite)
        if len(finite):
            many, headline = finite[:SHOWN_IN_GRID], opened.task.headline
            solved = streamed.scores[headline][many]
            grid = _look(opened.task)(streamed.image[many], batch.editable[many], solved)
            note = f"{'' if options.stop == 'none' else 'up to '}{options.iterations} iterations"
            if described["uses_verifier"]:
                note += "; a verifier chose when to stop"
            pictures.samples(part / "samples.png", grid, None, headline, note=note)
    asked = f"{options.iterations} iterations, stop: {options.stop}, patience: {options.patience}"
    say(f"{task}, {options.samples} samples, {asked}", "bold")
    show(_stream_table(opened.task, line))
    took, compiled = streamed.seconds, streamed.compile_seconds
    say(f"{took:.0f} s, after {compiled:.0f} s of compilation")
    _say_broken(line["not_finite"])
    if described["uses_verifier"]:
        say("a verifier chose when to stop: not rates of refinement without one", "yellow")
    say(f"\nwritten: {folder}")
    return folder


def _stream_table(task: Task, line: dict[str, Any]) -> Table:
    """What a stream found and what it took, with intervals where there are any."""
    table = Table(box=None, header_style="bold")
    for title in ("", "", "95% interval"):
        table.add_column(title, justify="right")
    rows = {
        **{name: (f"{name}_rate", "{:.1%}") for name in task.rates},
        **{name: (name, "{:.3g}") for name in task.means},
        "iterations": ("iterations", "{:.1f}"),
        "left early": ("left_early_rate", "{:.1%}"),
        "evaluations per sample": ("nfe", "{:.1f}"),
        "wasted evaluations": ("wasted", "{:.1%}"),
        "samples/s": ("samples_per_second", "{:.2f}"),
    }
    for title, (name, shape) in rows.items():
        value = shape.format(line[name]) if name in line else "-"
        ends = (f"{name.removesuffix('_rate')}_{end}" for end in ("low", "high"))
        table.add_row(title, value, " to ".join(shape.format(line[e]) for e in ends if e in line))
    return table


def compare(
    name: str,
    experiment: experiments.Experiment,
    opened: Opened,
    options: EvaluateOptions | ExperimentOptions,
    folder: Path,
) -> Path:
    """Run an experiment, say what it found, and draw it.

    Args:
        name: of the figure.
        experiment: what to compare.
        opened: the task and the model.
        options: samples, batch size and seed.
        folder: where to.

    Returns:
        The folder.

    Raises:
        ValueError: bad options, or the folder holds something else.
    """
    task, model, described = opened
    lines = experiments.run(
        experiment,
        task,
        lambda precision: compute_in(model, precision or options.precision),
        folder,
        samples=options.samples,
        seed=options.seed,
        batch_size=options.batch_size,
        settings=described | {"precision": options.precision} | environment(),
    )
    found: dict[str, list[experiments.Line]] = {label: [] for label in experiment.arms}
    total = sum(arm.refinement.iterations + 1 for arm in experiment.arms.values())
    goes_on = (
        "it goes on after the last finished arm" if len(experiment.arms) > 1 else "it begins anew"
    )
    remains = f"started again with --out {folder}, {goes_on}"
    with interruptible(remains), progress("compiling") as update:
        for done, (label, line) in enumerate(lines, 1):
            found[label].append(line)
            update(label, done, total, None)
    say(f"{experiment.title} ({experiment.source})", "bold")
    for label, arm in found.items():
        say(f"\n{label}", "bold")
        rows = [line for line in arm if line["iteration"] in (*SHOWN_ITERATIONS, len(arm) - 1)]
        show(_table(task, rows, experiment.arms[label].refinement.start))
        broken = [line["not_finite"] for line in arm]
        more = np.diff(broken, prepend=0)
        named = [f"{more[which]} at iteration {which}" for which in np.flatnonzero(more)]
        _say_broken(broken[-1], named)
    _say_differences(experiment, folder)
    _draw(folder / f"{name}.png", experiment, task, found, options.samples)
    say(f"\nwritten: {folder}")
    return folder


def _say_differences(experiment: experiments.Experiment, folder: Path) -> None:
    found = json.loads((folder / "results.json").read_text())["differences"]
    differences = {label: line for label, line in found.items() if line}
    if differences:
        say(f"\nat the end, compared with {experiment.reference}", "bold")
    for label, line in differences.items():
        low, high = (f"{100 * line[f'difference_{end}']:+.1f}" for end in ("low", "high"))
        say(f"{label}: {100 * line['difference']:+.1f} points, 95% interval {low} to {high}")


def _draw(
    path: Path,
    experiment: experiments.Experiment,
    task: Task,
    found: dict[str, list[experiments.Line]],
    samples: int,
) -> None:
    """Draw the scores of an experiment, as far as there are any, unless it was drawn."""
    from ipr_jax import pictures

    panels = []
    for score in experiment.scores:
        share = score in task.rates
        value = f"{score}_rate" if share else score
        ends = (f"{score}_low", value, f"{score}_high")
        bands = {
            label: np.array([[line.get(end, np.nan) for end in ends] for line in arm])
            for label, arm in found.items()
            if all(value in line for line in arm)
        }
        if bands:
            published = experiment.published.get(score, {})
            panels.append(pictures.Panel(score.replace("_", " "), share, bands, published))
    if panels and not path.exists():
        title = f"{experiment.title}: {task.name}, {samples} samples"
        starts = dict.fromkeys(arm.refinement.start for arm in experiment.arms.values())
        pictures.curves(path, panels, title, " or ".join(starts))


def train(
    name: str,
    config: trainer.TrainConfig,
    out: Path | None = None,
    num_workers: int = 0,
    shard_params: bool = False,
    hosts: HostOptions = HostOptions(),
) -> Path:
    """Run ``ipr-jax train NAME``.

    Args:
        name: of a recipe.
        config: how to train.
        out: the folder of the run; by default runs/NAME, with other settings one beside it.
        num_workers: processes that make the batches, 0 = a thread.
        shard_params: whether the devices share one copy of the parameters, instead of one each.
        hosts: the processes that share every batch.

    Returns:
        The folder of the trained model.

    Raises:
        ValueError: bad arguments, or the folder holds another run.
        FloatingPointError: a loss is not finite; names the step.
        ConnectionError: other processes cannot be reached.
    """
    hosts.join()
    check.count("num_workers", num_workers, least=0)
    recipe = RECIPES[name]
    if config.noise_levels != "mean-beta":
        refuse_idle(config, "--noise-levels mean-beta alone has a sharpness", "sharpness")
    folder = out or _same_folder(Path("runs") / name, config, recipe.training)
    remains = f"started again, it goes on from the last checkpoint in {folder}"
    with contextlib.ExitStack() as stack:
        stack.enter_context(interruptible(remains))
        if jax.process_count() > 1:  # they agree on a step
            preempted = multihost_utils.reached_preemption_sync_point
        else:
            preempted = stack.enter_context(signals())
        update = stack.enter_context(progress("compiling"))
        lines = trainer.train(
            get_task(recipe.task or name),
            recipe.model,
            config,
            folder,
            num_workers,
            shard_params=shard_params,
            preempted=preempted,
        )
        for line in lines:
            step, loss = int(line["step"]), f"loss {line['total']:.4f}"
            rate = config.batch_size / line["seconds_per_step"]
            said = f"step {step} of {config.num_steps}, {loss}, {rate:.3g} images/s"
            update(said, step, config.num_steps, None)
    say(f"written: {folder / 'model'}")
    return folder / "model"


def info(
    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")],
) -> None:
    """Print what a model folder holds: architecture, parameters, arithmetic, provenance.

    Args:
        model: a shipped model or a model folder.
    """
    network, provenance = open_network(model)
    config = network.config
    rows = {"network": type(network).__name__}
    rows |= {name: str(value) for name, value in dataclasses.asdict(config).items()}
    if type(config) in MODELS:
        h, w = config.grid
        one = "one for the image" if h * w == 1 else f"{h} x {w}, one per patch"
        rows["noise levels"] = one
    parameters = jax.tree.leaves(nnx.state(network, nnx.Param))
    rows["parameters"] = f"{sum(leaf.size for leaf in parameters):,}"
    number = flops.count(lambda network, given: network(**given), network, inputs(config, 1))
    rows["per evaluation of an image"] = f"{number / 1e9:,.3f} GFLOP"
    for name, value in provenance.items():
        rows[name] = value if isinstance(value, str) else json.dumps(value)
    table = Table(box=None, show_header=False)
    table.add_column(overflow="fold")
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(files.printable(name), files.printable(value))
    show(table)


def export_program(
    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")],
    out: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OUT")],
    options: Annotated[ExportOptions, tyro.conf.arg(name="")] = ExportOptions(),
) -> None:
    """Write first pass and refinement as one file that runs without this library.

    The file is a program of JAX for CPU, GPU and TPU, with the weights inside, for any batch size:
    jax.export.deserialize(bytes).call(key_data, image, editable).

    Args:
        model: a shipped model or a model folder.
        out: a new file.
        options: how to refine.
    """
    files.refuse_existing(out)
    get_precision(options.precision)
    network, provenance = checkpoint.open_model(model)
    task = options.task or provenance.get("task")
    if task is None:
        raise ValueError(f"{model} does not tell its task, give --task")
    program = export.serialize(network, options.refinement(task), options.precision)
    with files.whole(out) as part:
        part.write_bytes(program)
    say(f"written: {out} ({len(program) / 2**20:,.1f} MiB)")


def _refine_command(
    options: Annotated[RefineOptions, tyro.conf.arg(name="")] = RefineOptions(),
) -> Path:
    """Complete puzzles, then refine them by Iterative Partial Refinement.

    Without options: 64 handwritten mini-sudoku puzzles, a first pass, 20 iterations, and a new
    folder with samples/, manifest.json, metrics.jsonl, config.json, and samples.png, refinement.png
    and refinement.gif to look at. Started again with the same --out, it goes on where it stopped.
    """
    return refine(options)


def _evaluate_command(task: str) -> Callable[..., Path]:
    """The command ``ipr-jax evaluate TASK``."""

    def command(
        options: Annotated[EvaluateOptions, tyro.conf.arg(name="")] = EvaluateOptions(),
    ) -> Path:
        """Score a model on many samples after every iteration; if interrupted, it starts anew."""
        refinement, name = options.refinement(task), f"evaluate-{task}"
        opened = options.open(task)
        experiment = experiments.plain(opened.task, refinement)
        return compare(name, experiment, opened, options, _folder(options, name))

    return command


def _stream_command(task: str) -> Callable[..., Path]:
    """The command ``ipr-jax stream TASK``."""

    def command(
        options: Annotated[StreamOptions, tyro.conf.arg(name="")] = StreamOptions(),
    ) -> Path:
        """Refine many samples with every slot of the batch busy; a rule may let them leave early.

        Writes results.json, samples.npz and samples.png to a new folder.
        """
        return stream(task, options)

    return command


def _experiment_command(name: str) -> Callable[..., Path]:
    """The command ``ipr-jax experiment NAME``.

    Raises:
        ValueError: no such experiment; lists those that there are.
    """
    definition = experiments.get_experiment(name)

    def command(
        options: Annotated[ExperimentOptions, tyro.conf.arg(name="")] = ExperimentOptions(),
    ) -> Path:
        opened = options.open(options.task or definition.task)
        made = definition.make(opened.task, options.iterations)
        arms = made.arms.values()
        for option, idle in (
            ("precision", all(arm.precision for arm in arms)),
            ("iterations", options.iterations not in {arm.refinement.iterations for arm in arms}),
            ("difficulty", all(arm.swapped for arm in arms)),
        ):
            if idle:
                refuse_idle(options, f"the experiment {name} sets its {option}", option)
        title = f"{name}-{opened.task.name}"
        folder = options.out or _same_folder(Path("results") / title, options, ExperimentOptions())
        return compare(title, made, opened, options, folder)

    command.__doc__ = f"{definition.make.__doc__}\n\nArgs:\n    options: its options."
    return command


def _train_command(name: str) -> Callable[..., Path]:
    """The command ``ipr-jax train NAME``, with the settings of the recipe as defaults.

    Raises:
        ValueError: no such recipe; lists those that there are.
    """
    if name not in RECIPES:
        known = ", ".join(RECIPES)
        raise ValueError(f"no recipe to train {name!r}; known: {known}")

    def command(
        config: Annotated[trainer.TrainConfig, tyro.conf.arg(name="")] = RECIPES[name].training,
        out: Path | None = None,
        num_workers: int = 0,
        shard_params: bool = False,
        hosts: Annotated[HostOptions, tyro.conf.arg(name="")] = HostOptions(),
    ) -> Path:
        return train(name, config, out, num_workers, shard_params, hosts)

    command.__doc__ = (
        f"Train by the recipe {name}; started again with the same settings, it goes on.\n\n"
        "Args:\n    config: how to train.\n"
        "    out: the folder of the run; by default runs/NAME, with other settings one beside it.\n"
        "    num_workers: processes that make the batches, 0 = a thread; results are the same.\n"
        "    shard_params: share one copy of the parameters among the devices, not one each.\n"
        "    hosts: the processes that share every batch."
    )
    return command


def _one_of(names: Iterable[str]) -> Any:
    """The help of a word that is one of some names."""
    return tyro.conf.arg(help=f"one of {', '.join(names)}.")


def _evaluate_help(task: Annotated[tyro.conf.Positional[str], _one_of(TASKS)]) -> None:
    """Score a model on a task; ``ipr-jax evaluate TASK --help`` lists the options."""
    _evaluate_command(task)


def _stream_help(task: Annotated[tyro.conf.Positional[str], _one_of(TASKS)]) -> None:
    """Refine until a rule lets samples leave; ``ipr-jax stream TASK --help`` lists the options."""
    _stream_command(task)


def _experiment_help(
    name: Annotated[tyro.conf.Positional[str], _one_of(experiments.EXPERIMENTS)],
) -> None:
    """Run an experiment of the papers; ``ipr-jax experiment NAME --help`` lists the options."""
    _experiment_command(name)


def _train_help(name: Annotated[tyro.conf.Positional[str], _one_of(RECIPES)]) -> None:
    """Train a denoiser by a recipe; ``ipr-jax train NAME --help`` lists the settings."""
    _train_command(name)


NAMED = {
    "evaluate": _evaluate_command,
    "stream": _stream_command,
    "experiment": _experiment_command,
    "train": _train_command,
}
"""Commands whose options depend on the word that follows."""


COMMANDS = {
    "refine": _refine_command,
    "evaluate": _evaluate_help,
    "stream": _stream_help,
    "experiment": _experiment_help,
    "train": _train_help,
    "info": info,
    "export": export_program,
}
"""All commands; of those in ``NAMED``, what tells of the word that is missing."""


def main() -> None:
    """Do what the command line says: bad arguments end with one clear line."""
    words = sys.argv[1:]
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # what it cannot show is no error
    for library in ("absl", "matplotlib"):  # what Orbax logs, it also raises
        logging.getLogger(library).setLevel(logging.CRITICAL)
    sys.unraisablehook = unraisable
    with ended_together(), one_line_errors(), naming(typed(words)):
        for name in (*words, os.getcwd()):
            files.utf8(name)
        if words == ["--version"]:
            say(f"ipr_jax {version()}")
            return
        cache.enable()
        if len(words) > 1 and words[0] in NAMED and not words[1].startswith("-"):
            command = NAMED[words[0]](words[1])
            tyro.cli(command, prog=f"ipr-jax {words[0]} {words[1]}", args=words[2:])
        else:
            about = "Iterative Partial Refinement; ipr-jax --version prints the version."
            tyro.extras.subcommand_cli_from_dict(
                COMMANDS, prog="ipr-jax", description=about, args=words
            )
