"""The command line: ``ipr-jax refine``, ``experiment``, ``train`` and ``info``."""

import contextlib
import dataclasses
import datetime
import importlib.metadata
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

import jax
import numpy as np
import tyro
from flax import nnx
from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from ipr_jax import check, checkpoint, evaluate, experiments, files, flops
from ipr_jax.config import PRESETS, ModelConfig
from ipr_jax.denoiser import SRM
from ipr_jax.networks import inputs, open_network
from ipr_jax.order import ORDERS
from ipr_jax.regenerate import FIRST_PASS, REFINEMENT, Sampling
from ipr_jax.selection import NOISES, REGIONS
from ipr_jax.tasks import get_task
from ipr_jax.tasks.base import Batch, Task
from ipr_jax.tasks.mnist_classifier import MNISTClassifier, read_digits
from ipr_jax.tasks.polygon_classifier import PolygonClassifier, read_counts
from ipr_jax.training import trainer
from ipr_jax.training.recipes import RECIPES

SHOWN_PUZZLES = 8
SHOWN_ITERATIONS = (0, 1, 2, 5, 10, 20, 50, 100)

Value = TypeVar("Value")
console = Console()
errors = Console(stderr=True, soft_wrap=True, highlight=False)


@dataclasses.dataclass(frozen=True)
class RefineArgs:
    """The options of ``ipr-jax refine``.

    Attributes:
        task: the benchmark: mini-sudoku, digits-sudoku, mnist-sudoku, even-pixels,
            counting-polygons or counting-stars.
        model: a shipped model or a model folder.
        difficulty: of 9x9 puzzles: easy, medium or hard (54-80, 27-53 or 0-26 given cells).
        data: folder of MNIST or of backgrounds, for the tasks that take one.
        classifier: model folder of a converted classifier, for the tasks that need one.
        puzzle: refine your own puzzle instead, such as "1..4 .... .3.. ....".
        samples: how many puzzles (64), or how many tries at your own (1).
        iterations: iterations after the first pass.
        chunk: samples per compiled call; larger suits a GPU or TPU.
        ratio: share of the editable patches that an iteration regenerates, in (0, 1].
        steps_per_patch: network evaluations for a single patch.
        overlap: share of its schedule that a patch has in common with the next, in [0, 1].
        first_steps_per_patch: network evaluations for a single patch, in the first pass.
        first_overlap: overlap in the first pass, in [0, 1].
        stochasticity: 0 = deterministic to 1 = ancestral.
        temperature: factor of every step's noise, at least 0.
        order: which patch is denoised next: certain, uncertain, random or raster.
        regions: fresh random patches in every iteration, or the fixed ones of the first.
        noise: fresh noise in every iteration, or the initial one again.
        seed: of puzzles and noise.
        out: the new folder; by default one under results/.
    """

    task: str = "mini-sudoku"
    model: str = "mini-sudoku"
    difficulty: str | None = None
    data: Path | None = None
    classifier: Path | None = None
    puzzle: str | None = None
    samples: int | None = None
    iterations: int = 20
    chunk: int = 64
    ratio: float = 0.25
    steps_per_patch: int = REFINEMENT.steps_per_patch
    overlap: float = REFINEMENT.overlap
    first_steps_per_patch: int = FIRST_PASS.steps_per_patch
    first_overlap: float = FIRST_PASS.overlap
    stochasticity: float = REFINEMENT.stochasticity
    temperature: float = REFINEMENT.temperature
    order: str = "certain"
    regions: str = "fresh"
    noise: str = "fresh"
    seed: int = 0
    out: Path | None = None

    def experiment(self) -> evaluate.Refinement:
        """What to do, checked.

        Raises:
            ValueError: a value is out of range or a name unknown.
        """
        shared = {
            "stochasticity": self.stochasticity,
            "temperature": self.temperature,
            "order": _known("order", self.order, ORDERS),
        }
        return evaluate.Refinement(
            iterations=self.iterations,
            ratio=self.ratio,
            first=Sampling(
                steps_per_patch=self.first_steps_per_patch, overlap=self.first_overlap, **shared
            ),
            later=Sampling(steps_per_patch=self.steps_per_patch, overlap=self.overlap, **shared),
            select=_known("regions", self.regions, REGIONS),
            noise=_known("noise", self.noise, NOISES),
        )


@dataclasses.dataclass(frozen=True)
class ExperimentArgs:
    """The options of ``ipr-jax experiment NAME``.

    Attributes:
        task: the benchmark: mini-sudoku, digits-sudoku, mnist-sudoku, even-pixels,
            counting-polygons or counting-stars.
        model: a shipped model or a model folder.
        difficulty: of 9x9 puzzles: easy, medium or hard (54-80, 27-53 or 0-26 given cells).
        data: folder of MNIST or of backgrounds, for the tasks that take one.
        classifier: model folder of a converted classifier, for the tasks that need one.
        samples: how many test samples, the same in every arm.
        iterations: iterations after the first pass.
        chunk: samples per compiled call; larger suits a GPU or TPU.
        seed: of samples and noise.
        out: the folder; by default one under results/. Started again, the experiment goes on there.
    """

    task: str = "mini-sudoku"
    model: str = "mini-sudoku"
    difficulty: str | None = None
    data: Path | None = None
    classifier: Path | None = None
    samples: int = 500
    iterations: int = 50
    chunk: int = 64
    seed: int = 0
    out: Path | None = None


def _open_task(args: RefineArgs | ExperimentArgs) -> Task:
    """The task with its data and classifier.

    Raises:
        ValueError, FileNotFoundError: unknown, or something is missing or does not fit.
    """
    classify = None if args.classifier is None else _open_classifier(args.classifier)
    return get_task(args.task, difficulty=args.difficulty, data=args.data, classify=classify)


def _open_classifier(path: Path) -> Callable[[jax.Array], Any]:
    """What the images of a task show, by the classifier in a folder.

    Raises:
        ValueError, FileNotFoundError: there is none.
    """
    network, _ = open_network(path)
    if isinstance(network, MNISTClassifier):
        return lambda tiles: read_digits(network(tiles))
    if isinstance(network, PolygonClassifier):
        return lambda images: read_counts(network(images), network.config)
    raise ValueError(f"{path} must hold a classifier, it holds a {type(network).__name__}")


def _open_model(name: str, task: Task) -> tuple[SRM, dict[str, Any]]:
    """A model that makes the images of a task, and its provenance.

    Raises:
        ValueError, FileNotFoundError: there is none, or its images are others.
    """
    model, provenance = checkpoint.open_model(name)
    made, needed = (
        f"{source.image_shape} in {source.grid[0]} x {source.grid[1]} patches of "
        f"{source.patch_size}"
        for source in (model.config, task)
    )
    if made != needed:
        raise ValueError(f"{name} makes images {made}, the task {task.name} needs {needed}")
    return model, provenance


def _known(kind: str, name: str, table: Mapping[str, Value]) -> Value:
    if name not in table:
        raise ValueError(f"unknown {kind} {name!r}; known: {sorted(table)}")
    return table[name]


def environment() -> dict[str, Any]:
    """The versions and the device that a result was made with."""
    packages = ("ipr_jax", "jax", "jaxlib", "flax", "numpy")
    return {
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "python": sys.version.split()[0],
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "cpu_count": os.cpu_count(),
    }


def _plain(args: Any) -> dict[str, Any]:
    """Options as JSON data."""
    fields = dataclasses.asdict(args)
    return {name: str(v) if isinstance(v, Path) else v for name, v in fields.items()}


def _puzzles(task: Task, args: RefineArgs) -> Batch:
    number = args.samples if args.samples is not None else (1 if args.puzzle is not None else 64)
    check.count("samples", number)
    check.count("chunk", args.chunk)
    check.seed(args.seed)
    if args.puzzle is None:
        return task.test_batch(args.seed, np.arange(number))
    if task.parse_puzzle is None:
        raise ValueError(f"the task {task.name} has no puzzles, leave out --puzzle")
    puzzle = task.parse_puzzle(args.puzzle, args.seed)
    for warning in puzzle.warnings:
        console.print(f"[yellow]This puzzle has no solution: {warning}.")
    return Batch(*(np.repeat(part, number, axis=0) for part in puzzle.batch))


def _new_folder(args: RefineArgs) -> Path:
    """Make the output folder, which must not exist."""
    now = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    folder = args.out or Path("results") / f"{args.task}-{now}"
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        raise ValueError(f"{folder} exists and is not overwritten; choose another --out") from None
    return folder


def _table(task: Task, lines: list[dict[str, Any]]) -> Table:
    """The scores of the task, the headline with its interval, and what they cost."""
    table = Table(box=None, header_style="bold")
    rates = [f"{name} %" for name in task.rates[1:]]
    for title in (
        *("iteration", f"{task.headline} %", "95% interval", *rates, *task.means),
        *("evaluations per sample", "samples/s"),
    ):
        table.add_column(title, justify="right")

    def percent(line: dict[str, Any], *names: str) -> str:
        return " to ".join(f"{100 * line[name]:.1f}" if name in line else "-" for name in names)

    for line in lines:
        ends = (f"{task.headline}_low", f"{task.headline}_high")
        table.add_row(
            "first pass" if line["iteration"] == 0 else str(line["iteration"]),
            percent(line, f"{task.headline}_rate"),
            percent(line, *ends) if ends[0] in line else "-",
            *(percent(line, f"{name}_rate") for name in task.rates[1:]),
            *(f"{line[name]:.3g}" if name in line else "-" for name in task.means),
            f"{line['nfe']:.0f}",
            f"{line['samples_per_second']:.1f}",
        )
    return table


def refine(args: RefineArgs) -> Path:
    """Run ``ipr-jax refine``.

    Returns:
        The new folder.

    Raises:
        ValueError, FileNotFoundError: bad arguments; nothing has been written.
    """
    task, experiment = _open_task(args), args.experiment()
    model, provenance = _open_model(args.model, task)
    batch = _puzzles(task, args)
    folder = _new_folder(args)
    described = {
        "arguments": _plain(args) | {"out": str(folder)},
        "model": dataclasses.asdict(model.config),
        "provenance": provenance,
        **environment(),
    }
    files.write_text(folder / "config.json", json.dumps(described, indent=1))

    history: list[evaluate.Progress] = []
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    )
    running = bar.add_task("compiling", total=experiment.iterations + 1)
    lines: list[dict[str, Any]] = []
    key = jax.random.key(args.seed)
    steps = evaluate.evaluate(task, model, batch, experiment, key, chunk=args.chunk)
    remains = f"{folder} has the metrics of the finished iterations"
    with _interruptible(remains), Live(bar, console=console, transient=True) as live:
        for progress in steps:
            lines.append(evaluate.summarise(progress))
            with (folder / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(lines[-1]) + "\n")
            kept = progress.iteration in (*SHOWN_ITERATIONS, experiment.iterations)
            image = np.asarray(progress.image) if kept else np.empty(0)
            history.append(progress._replace(image=image))
            bar.update(running, advance=1, description="refining")
            grid = Table.grid()
            grid.add_row(_table(task, lines))
            grid.add_row(bar)
            live.update(grid)
    console.print(_table(task, lines))
    compiled, took = history[-1].compile_seconds, history[-1].seconds
    console.print(f"{took:.0f} s, after {compiled:.0f} s of compilation")
    if lines[-1]["not_finite"]:
        console.print(f"[red]not finite and not counted: {lines[-1]['not_finite']} samples")
    _save(folder, task, batch, history)
    if args.puzzle is not None and task.format_sample is not None:
        for title, progress in (("first pass", history[0]), ("refined", history[-1])):
            verdict = task.headline if progress.scores[task.headline][0] else f"not {task.headline}"
            console.print(f"\n{title} ({verdict}), given cells in brackets", style="bold")
            board = task.format_sample(np.asarray(progress.image[0]), batch.label[0])
            console.print(board, markup=False, highlight=False)
    console.print(f"\nwritten: {folder}")
    return folder


@contextlib.contextmanager
def _interruptible(remains: str) -> Iterator[None]:
    """End with exit code 130 on an interrupt, and say what remains of the run."""
    try:
        yield
    except KeyboardInterrupt:
        errors.print(f"interrupted: {remains}")
        sys.exit(130)


def _save(folder: Path, task: Task, batch: Batch, history: list[evaluate.Progress]) -> None:
    from ipr_jax import pictures

    with files.whole(folder / "samples.npz") as path:
        np.savez_compressed(
            path,
            allow_pickle=False,
            first_pass=history[0].image,
            refined=history[-1].image,
            editable=batch.editable,
            **{
                name: np.stack([progress.scores[name] for progress in history])
                for name in (*task.rates, *task.means)
            },
            finite=history[-1].finite,
            nfe=history[-1].nfe,
        )
    finite = np.flatnonzero(history[-1].finite)[:SHOWN_PUZZLES]
    columns = [progress for progress in history if progress.image.size]
    if len(finite):
        images = np.stack([progress.image[finite] for progress in columns])
        nothing = np.zeros_like(batch.editable[finite])
        violating = jax.jit(task.violating) if task.violating else lambda image: nothing
        pictures.refinement(
            folder / "refinement.png",
            images,
            batch.editable[finite],
            np.stack([violating(image) for image in images]),
            np.stack([progress.scores[task.headline][finite] for progress in columns]),
            [progress.iteration for progress in columns],
        )


def experiment(name: str, args: ExperimentArgs) -> Path:
    """Run ``ipr-jax experiment NAME``.

    Args:
        name: of ``experiments.EXPERIMENTS``.
        args: the options.

    Returns:
        The folder.

    Raises:
        ValueError, FileNotFoundError: bad arguments, or the folder holds something else.
    """
    from ipr_jax import pictures

    make, task = experiments.get_experiment(name), _open_task(args)
    made = make(task, args.iterations)
    model, provenance = _open_model(args.model, task)
    folder = args.out or Path("results") / f"{name}-{task.name}"
    settings = {"arguments": _plain(args) | {"out": None}, "provenance": provenance}
    lines = experiments.run(
        made,
        task,
        model,
        folder,
        samples=args.samples,
        seed=args.seed,
        chunk=args.chunk,
        settings=settings | environment(),
    )
    found: dict[str, list[experiments.Line]] = {label: [] for label in made.arms}
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    )
    remains = f"started again, it goes on after the last finished arm in {folder}"
    with _interruptible(remains), Live(bar, console=console, transient=True):
        total = sum(arm.refinement.iterations + 1 for arm in made.arms.values())
        running = bar.add_task("compiling", total=total)
        for label, line in lines:
            found[label].append(line)
            bar.update(running, advance=1, description=label)
    console.print(f"{made.title} ({made.source})", style="bold")
    ends = [f"{task.headline}_{part}" for part in ("low", "rate", "high")]
    for label, arm in found.items():
        console.print(f"\n{label}", style="bold")
        shown = [line for line in arm if line["iteration"] in (*SHOWN_ITERATIONS, len(arm) - 1)]
        console.print(_table(task, shown))
    bands = {
        label: (range(len(arm)), np.array([[line[end] for end in ends] for line in arm]))
        for label, arm in found.items()
        if all(end in line for end in ends for line in arm)
    }
    picture = folder / f"{name}.png"
    if bands and not picture.exists():
        title = f"{made.title}: {task.name}, {args.samples} samples"
        pictures.curves(picture, bands, made.published, task.headline, title)
    console.print(f"\nwritten: {folder}")
    return folder


def train(task: str, config: trainer.TrainConfig, out: Path | None) -> Path:
    """Run ``ipr-jax train TASK``.

    Args:
        task: the benchmark.
        config: how to train.
        out: the folder of the run; by default runs/TASK.

    Returns:
        The folder of the trained model.

    Raises:
        ValueError: bad arguments, or the folder holds another run.
        FloatingPointError: a loss is not finite; names the step.
    """
    folder = out or Path("runs") / task
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
    )
    with _interruptible(f"started again, it goes on from the last checkpoint in {folder}"), bar:
        running = bar.add_task("compiling", total=config.num_steps)
        for line in trainer.train(get_task(task), PRESETS[task], config, folder):
            loss = f"loss {line['total']:.4f}, {line['seconds_per_step']:.2f} s per step"
            bar.update(running, completed=line["step"], description=loss)
    console.print(f"written: {folder / 'model'}")
    return folder / "model"


def _train_command(task: str) -> Callable[..., Path]:
    """The command ``ipr-jax train TASK``, with the settings of the task's recipe as defaults.

    Raises:
        ValueError: no such task, or it has no recipe.
    """
    if task not in RECIPES:
        known = ", ".join(RECIPES)
        raise ValueError(f"no recipe to train the task {task!r}; known: {known}")

    def command(
        config: Annotated[trainer.TrainConfig, tyro.conf.arg(name="")] = RECIPES[task],
        out: Path | None = None,
    ) -> Path:
        return train(task, config, out)

    command.__doc__ = (
        f"Train a denoiser on {task}; started again with the same settings, it goes on.\n\n"
        "Args:\n    config: how to train.\n    out: the folder of the run; by default runs/TASK."
    )
    return command


def _train_help(task: tyro.conf.Positional[str]) -> None:
    """Train a denoiser on a task; ``ipr-jax train TASK --help`` lists the settings.

    Args:
        task: the benchmark.
    """
    _train_command(task)


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
    if isinstance(config, ModelConfig):
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
        table.add_row(*(Text(files.printable(text)) for text in (name, value)))
    console.print(table)


def _experiment_command(name: str) -> Callable[..., Path]:
    """The command ``ipr-jax experiment NAME``."""

    def command(
        args: Annotated[ExperimentArgs, tyro.conf.arg(name="")] = ExperimentArgs(),
    ) -> Path:
        return experiment(name, args)

    command.__doc__ = f"{experiments.get_experiment(name).__doc__}\n\nArgs:\n    args: the options."
    return command


def _experiment_help(name: tyro.conf.Positional[str]) -> None:
    """Run an experiment of the papers: refinement, ratio, noise-and-regions, corrupted or samplers.

    ``ipr-jax experiment NAME --help`` lists the options.

    Args:
        name: the experiment.
    """
    experiments.get_experiment(name)


def _refine_command(args: Annotated[RefineArgs, tyro.conf.arg(name="")] = RefineArgs()) -> Path:
    """Complete puzzles, then refine them by Iterative Partial Refinement.

    Without options: 64 handwritten mini-sudoku puzzles, a first pass, 20 iterations, and a new
    folder with samples.npz, metrics.jsonl, config.json and refinement.png.
    """
    return refine(args)


def main() -> None:
    """Entry point of ``ipr-jax``: bad arguments and interrupts end with one clear line."""
    words = sys.argv[1:]
    try:
        named = len(words) > 1 and not words[1].startswith("-")
        if named and words[0] in ("train", "experiment"):
            command = _train_command if words[0] == "train" else _experiment_command
            prog = f"ipr-jax {words[0]} {words[1]}"
            tyro.cli(command(words[1]), prog=prog, args=words[2:])
        else:
            commands = {
                "refine": _refine_command,
                "experiment": _experiment_help,
                "train": _train_help,
                "info": info,
            }
            tyro.extras.subcommand_cli_from_dict(commands, prog="ipr-jax", args=words)
    except (ValueError, OSError, FloatingPointError) as error:
        errors.print(f"[red]error:[/] {escape(str(error))}")
        sys.exit(2)
    except KeyboardInterrupt:
        errors.print("interrupted")
        sys.exit(130)


if __name__ == "__main__":
    main()
