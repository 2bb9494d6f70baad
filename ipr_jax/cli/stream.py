"""``ipr-jax stream TASK``."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import tyro
from rich.table import Table

from ipr_jax.cli.options import RefinementOptions, get_rule, new_folder, plain, refuse_idle
from ipr_jax.cli.shown import SHOWN_IN_GRID, look_of, say_broken, say_chosen
from ipr_jax.cli.terminal import progress, say, show
from ipr_jax.core import check
from ipr_jax.interrupts import interruptible
from ipr_jax.methods import Refinement
from ipr_jax.models import compute_in
from ipr_jax.runtime import environment, files
from ipr_jax.studies import evaluate, experiments, search
from ipr_jax.tasks import Task


@dataclasses.dataclass(frozen=True)
class StreamOptions(RefinementOptions):
    """The options of ``ipr-jax stream TASK``.

    Attributes:
        samples: how many test samples.
        slots: samples at work at once; larger suits a GPU or TPU.
        stop: when a sample may leave early: none, unchanged (what the scores read in it has not
            changed in an iteration) or verified (the score itself finds it solved, a verifier).
        patience: how often in a row the rule must hold.
    """

    samples: int = 500
    slots: int = 64
    stop: str = "none"
    patience: int = 1


def command_of(task: str) -> Callable[..., Path]:
    """The command ``ipr-jax stream TASK``."""

    def command(
        options: Annotated[StreamOptions, tyro.conf.arg(name="")] = StreamOptions(),
    ) -> Path:
        """Refine many samples with every slot of the batch busy; a rule may let them leave early.

        Writes results.json, samples.npz and samples.png to a new folder.
        """
        return stream(task, options)

    return command


def stream(task: str, options: StreamOptions) -> Path:
    """Run ``ipr-jax stream TASK``.

    Returns:
        The new folder, which appears whole or not at all.

    Raises:
        ValueError, OSError: bad options; nothing has been written.
    """
    from ipr_jax.studies import pictures

    for name in ("samples", "slots", "iterations", "patience"):
        if getattr(options, name) is not None:
            check.count(name, getattr(options, name))
    check.seed(options.seed)
    if options.stop == "none":
        refuse_idle(options, "without --stop no sample leaves early", "patience")
    opened = options.open(task)
    chosen = options.chosen(task, opened.task)
    if isinstance(chosen, Refinement):
        rule = get_rule(options.stop, opened.task)
        chosen = dataclasses.replace(chosen, stop=rule, patience=options.patience)
    else:
        because = f"--method {options.method} takes no stopping rule"
        refuse_idle(options, because, "stop", "patience")
    kind = "oracle" if options.stop == "verified" else search.kind_of(chosen)
    batch = opened.task.test_batch(options.seed, np.arange(options.samples))
    folder = new_folder(options, f"stream-{task}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    files.refuse_existing(folder)
    with interruptible("nothing has been written"), progress("compiling and refining"):
        streamed, found = evaluate.evaluate_stream(
            opened.task,
            compute_in(opened.model, options.precision),
            batch,
            chosen,
            jax.random.key(options.seed),
            slots=options.slots,
        )
    line = evaluate.summarise_stream(streamed, opened.task, found)
    described = {
        "task": task,
        "arguments": plain(options) | {"out": str(folder)},
        "verifier": kind,
        "refinement": experiments.describe(chosen),
        **opened.described,
        **environment.describe(),
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
            **streamed.costs._asdict(),
            finite=streamed.finite,
        )
        files.write_text(part / "results.json", json.dumps(described, indent=1))
        finite = np.flatnonzero(streamed.finite)
        if len(finite):
            many, headline = finite[:SHOWN_IN_GRID], opened.task.headline
            solved = streamed.scores[headline][many]
            grid = look_of(opened.task)(streamed.image[many], batch.editable[many], solved)
            note = f"{'' if options.stop == 'none' else 'up to '}{streamed.iteration} iterations"
            if kind is not None:
                who = "the network" if kind == search.INTERNAL else "a verifier"
                chose = "when to stop" if options.stop == "verified" else "what to keep"
                note += f"; {who} chose {chose}"
            pictures.samples(part / "samples.png", grid, None, headline, note=note)
    asked = f"{streamed.iteration} iterations, stop: {options.stop}, patience: {options.patience}"
    say(f"{task}, {options.samples} samples, {asked}", "bold")
    show(_stream_table(opened.task, line))
    took, compiled = streamed.seconds, streamed.compile_seconds
    say(f"{took:.0f} s, after {compiled:.0f} s of compilation")
    say_broken(line["not_finite"])
    if options.stop == "verified":
        say("a verifier chose when to stop: not rates of refinement without one", "yellow")
    else:
        say_chosen(kind)
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
