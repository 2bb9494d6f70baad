"""What was measured of a model, as the card that ships with it.

``python -m benchmarks.card MODEL FOLDER...`` prints in Markdown what a model is and how it was
trained, and for every folder of ``ipr-jax evaluate`` the scores of the first pass and of some
iterations, with their 95% intervals.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import tyro

from ipr_jax.cli.shown import SHOWN_ITERATIONS
from ipr_jax.cli.terminal import one_line_errors
from ipr_jax.models import checkpoint
from ipr_jax.models.networks import inputs
from ipr_jax.runtime import flops


@dataclasses.dataclass(frozen=True)
class Args:
    """Print the card of a model.

    Attributes:
        model: a shipped model or a model folder.
        results: folders of ``ipr-jax evaluate``.
    """

    model: tyro.conf.Positional[str]
    results: tyro.conf.Positional[tuple[Path, ...]]


def card(args: Args) -> str:
    """The card, in Markdown.

    Raises:
        FileNotFoundError, ValueError: there is no such model or result, or a result is of another
            model.
    """
    model, provenance = checkpoint.open_model(args.model)
    config = json.loads(json.dumps(dataclasses.asdict(model.config)))
    parameters = sum(leaf.size for leaf in jax.tree.leaves(model))
    number = flops.count(lambda model, given: model(**given), model, inputs(model.config, 1))
    told = {
        "network": f"{type(model).__name__}, {parameters:,} parameters, {number / 1e9:,.3f} GFLOP "
        "per evaluation",
        "architecture": _fields(config),
        **{
            name: _fields(value) if isinstance(value, dict) else value
            for name, value in provenance.items()
        },
    }
    lines = [f"# {Path(args.model).name}", "", "| | |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in told.items()]
    for folder in args.results:
        found = json.loads((folder / "results.json").read_text())
        if (found["model"], found["provenance"]) != (config, provenance):
            raise ValueError(f"{folder} must hold results of {args.model}, they are another's")
        lines += ["", *_scores(found)]
    return "\n".join(lines)


def _fields(values: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def _scores(found: dict[str, Any]) -> list[str]:
    """The section of a result."""
    (lines,) = found["metrics"].values()
    headline, *others = found["scores"]
    shown = [line for line in lines if line["iteration"] in (*SHOWN_ITERATIONS, len(lines) - 1)]
    title = ", ".join(filter(None, (found["task"], found["difficulty"])))
    rows = [
        f"## {title}",
        "",
        f"{found['samples']:,} test samples, seed {found['seed']}, {found['precision']}; "
        f"{found['device']}, jax {found['versions']['jax']}, commit {found['commit']}",
        "",
        " | ".join(["| ", headline, "95% interval", *others, "network evaluations per sample |"]),
        "|---" * (4 + len(others)) + "|",
    ]
    for line in shown:
        low, high = (f"{100 * line[f'{headline}_{end}']:.1f}" for end in ("low", "high"))
        rate = f"{100 * line[f'{headline}_rate']:.1f}% ({line[headline]} of {line['samples']})"
        more = [
            f"{100 * line[f'{name}_rate']:.1f}%" if f"{name}_rate" in line else f"{line[name]:.3g}"
            for name in others
        ]
        which = f"iteration {line['iteration']}" if line["iteration"] else "first pass"
        cells = [f"| {which}", rate, f"{low} to {high}", *more, f"{line['nfe']:.0f} |"]
        rows.append(" | ".join(cells))
    return rows


if __name__ == "__main__":
    with one_line_errors():
        print(card(tyro.cli(Args)))
