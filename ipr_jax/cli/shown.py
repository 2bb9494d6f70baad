"""What commands show of samples: tables, and what is drawn of them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from rich.table import Table

from ipr_jax.cli.terminal import say
from ipr_jax.studies import metrics, search, shards
from ipr_jax.tasks import Task, verifiers

SHOWN_IN_GRID = 64
SHOWN_IN_ROWS = 8
MOST_ROWS = 32
SHOWN_IN_MOTION = 30
SHOWN_ITERATIONS = (0, 1, 2, 5, 10, 20, 40, 50, 100)


def shown_of(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those that a table shows: all of a few, else some and the last."""
    if len(lines) <= MOST_ROWS:
        return lines
    return [line for line in lines[:-1] if line["iteration"] in SHOWN_ITERATIONS] + lines[-1:]


def table_of(task: Task, lines: list[dict[str, Any]], start: str) -> Table:
    """The scores of the task, the headline with its interval, and what they cost; ``start`` is
    what iteration 0 is.
    """
    found = Table(box=None, header_style="bold")
    rates = [f"{name} %" for name in task.rates[1:]]
    timed = all("samples_per_second" in line for line in lines)
    for title in (
        *("iteration", f"{task.headline} %", "95% interval", *rates, *task.means),
        "evaluations per sample",
        *(["samples/s"] if timed else []),
    ):
        found.add_column(title, justify="right")

    for line in lines:
        ends = (f"{task.headline}_low", f"{task.headline}_high")
        found.add_row(
            str(line["iteration"] or start),
            _percent(line, f"{task.headline}_rate"),
            _percent(line, *ends),
            *(_percent(line, f"{name}_rate") for name in task.rates[1:]),
            *(f"{line[name]:.3g}" if name in line else "-" for name in task.means),
            f"{line['nfe']:.0f}",
            *([f"{line['samples_per_second']:.1f}"] if timed else []),
        )
    return found


def _percent(line: Mapping[str, Any], *names: str, sign: str = "") -> str:
    """Numbers of a line as points of a hundred; "-" where it has none."""
    if not line.keys() >= set(names):
        return "-"
    return " to ".join(f"{100 * line[name]:{sign}.1f}" for name in names)


def cost_table(
    task: Task,
    lines: Mapping[str, Mapping[str, Any]],
    chosen: Mapping[str, str | None],
    differences: Mapping[str, Mapping[str, Any]],
) -> Table:
    """What each of some methods came to and cost, what it chose by, and by how many points it
    differs from a reference, by label.
    """
    found = Table(box=None, header_style="bold")
    found.add_column("method")
    found.add_column("verifier")
    interval = "95% interval"
    costs = metrics.costs_of(lines.values())
    second = verifiers.INDEPENDENT
    others = [second] if any(f"{second}_rate" in line for line in lines.values()) else []
    for title in (
        *costs.values(),
        *(f"{task.headline} %", interval, "points", interval),
        *(f"{name} %" for name in others),
    ):
        found.add_column(title, justify="right")
    for label, line in lines.items():
        found.add_row(
            label,
            chosen[label] or "none",
            *(f"{line[name]:.0f}" for name in costs),
            _percent(line, f"{task.headline}_rate"),
            _percent(line, f"{task.headline}_low", f"{task.headline}_high"),
            _percent(differences[label], "difference", sign="+"),
            _percent(differences[label], "difference_low", "difference_high", sign="+"),
            *(_percent(line, f"{name}_rate") for name in others),
        )
    return found


def say_broken(number: float, named: Sequence[str] = (), most: int = 5) -> None:
    """How many samples are not finite, and the first of them by name."""
    if number:
        more = ", ..." if len(named) > most else ""
        names = f" ({', '.join(named[:most])}{more})" if named else ""
        say(f"not finite and not counted: {number} samples{names}", "red")


def say_chosen(kind: str | None) -> None:
    """That samples were chosen, and by what, of ``methods.scores.KINDS``; None = they were not."""
    if kind == search.INTERNAL:
        say("the network chose what to keep: not rates of refinement without a choice", "yellow")
    elif kind is not None:
        say(f"chosen by a verifier ({kind}): not rates of refinement without one", "yellow")


def look_of(task: Task) -> Callable[[Any, np.ndarray, np.ndarray], Any]:
    """``(images, editable, solved) -> pictures.Samples``, what is drawn of samples."""
    from ipr_jax.studies import pictures

    violating = jax.jit(task.violating) if task.violating else None
    score = jax.jit(task.score)

    def of(images: Any, editable: np.ndarray, solved: np.ndarray) -> pictures.Samples:
        image = shards.to_float(np.asarray(images))
        return pictures.Samples(
            image,
            editable,
            solved,
            np.asarray(violating(image)) if violating else None,
            task.describe(jax.device_get(score(image))) if task.describe else None,
        )

    return of
