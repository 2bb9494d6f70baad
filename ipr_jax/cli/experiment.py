"""``ipr-jax experiment NAME``, and what ``evaluate`` shares with it."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from ipr_jax.cli.options import BatchOptions, Opened, TaskOptions, refuse_idle, same_folder
from ipr_jax.cli.shown import SHOWN_ITERATIONS, cost_table, say_broken, say_chosen, table_of
from ipr_jax.cli.terminal import progress, say, show
from ipr_jax.interrupts import interruptible
from ipr_jax.models import compute_in
from ipr_jax.runtime import Size, environment
from ipr_jax.studies import evaluate, experiments, search
from ipr_jax.tasks import Task


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


def command_of(name: str) -> Callable[..., Path]:
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
            ("iterations", not definition.counted),
            ("difficulty", all(arm.swapped for arm in arms)),
        ):
            if idle:
                refuse_idle(options, f"the experiment {name} sets its {option}", option)
        title = f"{name}-{opened.task.name}"
        folder = options.out or same_folder(Path("results") / title, options, ExperimentOptions())
        return compare(title, made, opened, folder, options, options.samples, options.batch_size)

    command.__doc__ = f"{definition.make.__doc__}\n\nArgs:\n    options: its options."
    return command


def compare(
    name: str,
    experiment: experiments.Experiment,
    opened: Opened,
    folder: Path,
    options: TaskOptions,
    samples: int,
    batch_size: Size,
) -> Path:
    """Run an experiment, say what it found, and draw it.

    Args:
        name: of the figure.
        experiment: what to compare.
        opened: the task and the model.
        folder: where to.
        options: precision and seed.
        samples: how many.
        batch_size: samples per compiled call.

    Returns:
        The folder.

    Raises:
        ValueError: bad options, or the folder holds something else.
    """
    task, model, described = opened
    chosen = {label: search.kind_of(arm.refinement) for label, arm in experiment.arms.items()}
    lines = experiments.run(
        experiment,
        task,
        lambda precision: compute_in(model, precision or options.precision),
        folder,
        samples=samples,
        seed=options.seed,
        batch_size=batch_size,
        settings=described
        | {"precision": options.precision, "verifiers": {k: v for k, v in chosen.items() if v}}
        | environment.describe(),
    )
    found: dict[str, list[experiments.Line]] = {label: [] for label in experiment.arms}
    total = sum(evaluate.last_iteration(arm.refinement) + 1 for arm in experiment.arms.values())
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
        broken = [line["not_finite"] for line in arm]
        tabled = not experiment.at_equal_cost or label == experiment.reference
        if tabled or broken[-1]:
            say(f"\n{label}", "bold")
        if tabled:
            rows = [line for line in arm if line["iteration"] in (*SHOWN_ITERATIONS, len(arm) - 1)]
            show(table_of(task, rows, experiment.arms[label].refinement.start))
        more = np.diff(broken, prepend=0)
        named = [f"{more[which]} at iteration {which}" for which in np.flatnonzero(more)]
        say_broken(broken[-1], named)
    differences = json.loads((folder / "results.json").read_text())["differences"]
    if experiment.at_equal_cost:
        say(f"\nat equal evaluations, compared with {experiment.reference}", "bold")
        ends = {label: arm[-1] for label, arm in found.items() if label != experiment.reference}
        show(cost_table(task, ends, chosen, differences))
    else:
        for kind in sorted({kind for kind in chosen.values() if kind}):
            say_chosen(kind)
        _say_differences(experiment, differences)
    _draw(folder / f"{name}.png", experiment, task, found, chosen, samples)
    if not (folder / "report.html").exists():
        from ipr_jax.studies import report

        report.write(folder, report.of_experiment(folder))
    say(f"\nwritten: {folder}")
    return folder


def _say_differences(
    experiment: experiments.Experiment, differences: Mapping[str, experiments.Line]
) -> None:
    found = {label: line for label, line in differences.items() if line}
    if found:
        say(f"\nat the end, compared with {experiment.reference}", "bold")
    for label, line in found.items():
        low, high = (f"{100 * line[f'difference_{end}']:+.1f}" for end in ("low", "high"))
        say(f"{label}: {100 * line['difference']:+.1f} points, 95% interval {low} to {high}")


def _draw(
    path: Path,
    experiment: experiments.Experiment,
    task: Task,
    found: dict[str, list[experiments.Line]],
    chosen: Mapping[str, str | None],
    samples: int,
) -> None:
    """Draw the scores of an experiment, as far as there are any, unless it was drawn.

    Arms that choose by a verifier have a panel for its kind, with those that ask none.
    """
    from ipr_jax.studies import curves

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
        if not bands:
            continue
        published = experiment.published.get(score, {})
        name = score.replace("_", " ")
        kinds = sorted({kind for label in bands if (kind := chosen[label])})
        if not experiment.at_equal_cost:
            title = f"{name}, verifier: {', '.join(kinds)}" if kinds else name
            panels.append(curves.Panel(title, share, bands, published))
            continue
        for kind in kinds or [None]:
            some = {label: bands[label] for label in bands if chosen[label] in (None, kind)}
            title = f"{name}, verifier: {kind}" if kind else name
            lines, spent = _by_family(experiment, some, found)
            panels.append(curves.Panel(title, share, lines, published, spent))
    if panels and not path.exists():
        title = f"{experiment.title}: {task.name}, {samples} samples"
        starts = dict.fromkeys(arm.refinement.start for arm in experiment.arms.values())
        curves.curves(path, panels, title, " or ".join(starts))


def _by_family(
    experiment: experiments.Experiment,
    bands: dict[str, np.ndarray],
    found: dict[str, list[experiments.Line]],
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Bands and evaluations of each family: all iterations of an arm that has none beside it, else
    what each arm has come to.
    """
    families: dict[str, list[str]] = {}
    for label in bands:
        families.setdefault(experiment.arms[label].family or label, []).append(label)
    lines, spent = {}, {}
    for family, labels in families.items():
        rows = slice(None) if len(labels) == 1 else slice(-1, None)
        lines[family] = np.concatenate([bands[label][rows] for label in labels])
        spent[family] = np.array([line["nfe"] for label in labels for line in found[label][rows]])
    return lines, spent
