"""One page for a finished run or experiment: its samples in motion, its curves, its settings.

The page is a single file that needs no network: the template ``report.html`` beside this module,
with the data of the folder in it as JSON and the images as PNG.
"""

import base64
import io
import json
import os
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

from ipr_jax.methods import Annealed, most_doubted
from ipr_jax.runtime import files
from ipr_jax.studies import metrics, shards
from ipr_jax.studies.metrics import Line
from ipr_jax.tasks import Task, verifiers

NAME = "report.html"
"""The page, in the folder that it is of."""

MOST_BYTES = 4_900_000
"""Of a page; iterations are left out of it first, then samples."""

MOST_MOMENTS = 201
"""Of how many iterations the images are in a page."""

LEAST_MOMENTS = 26
"""Down to how many iterations are left out before samples are."""

ACROSS = 64
"""Patches in a row of a sheet."""

_TEMPLATE = Path(__file__).with_suffix(".html")


def write(folder: str | os.PathLike[str], page: str) -> Path:
    """Write the page of a folder, whole or not at all, in the place of one that is there.

    Raises:
        OSError: it cannot be written.
    """
    path = Path(folder) / NAME
    files.write_text(path, page)
    return path


def of_run(folder: str | os.PathLike[str], task: Task, start: str = "first pass") -> str:
    """The page of a finished run of ``shards.refine``: the first samples after every iteration.

    At most ``MOST_BYTES`` long. Of very many iterations, or large images, some are left out, which
    the page says; its curves and filters know all of them.

    Args:
        folder: of the run, as ``shards.refine`` left it.
        task: whose samples and scores.
        start: what iteration 0 is.

    Returns:
        HTML; the same bits for the same folder.

    Raises:
        FileNotFoundError: the folder holds no finished run.
        ValueError: a file of it is damaged, or it is of another task.
    """
    folder = Path(folder)
    first = next(shards.read(folder))
    lines, config = _read(folder / "metrics.jsonl"), _read(folder / "config.json")
    known = [name for name in (*task.rates, *task.means) if name in first]
    if task.headline not in known:
        raise ValueError(f"{folder} holds no run of the task {task.name}: no {task.headline} in it")
    samples, last = lines[0]["samples"], len(lines) - 1
    data = {
        "title": f"{task.name}: {_count(samples, 'sample')}, {_count(last, 'iteration')}",
        "about": _about(config),
        "start": start,
        "headline": task.headline,
        "panels": _panels(known, {"refined": lines}),
        "table": _by_iteration(known, lines, start),
        "settings": config,
    }
    followed = first["followed"]
    shown = np.flatnonzero(first["broke_at"][: followed.shape[1]] < 0)
    every = np.arange(last + 1)
    if last >= MOST_MOMENTS:
        every = np.unique(np.linspace(0, last, MOST_MOMENTS).round().astype(int))
    while True:
        gallery = _gallery(task, first, samples, shown, every) if len(shown) else None
        page = _page({**data, "iterations": every.tolist(), "gallery": gallery})
        if len(page.encode()) <= MOST_BYTES or len(every) <= 2:
            return page
        if len(every) <= LEAST_MOMENTS and len(shown) > 1:
            shown = shown[: len(shown) // 2]
        else:
            every = np.append(every[:-1:2], last)


def of_experiment(folder: str | os.PathLike[str]) -> str:
    """The page of a finished experiment: the curves and the table of its arms.

    Args:
        folder: with the ``results.json`` of ``experiments.run``.

    Returns:
        HTML; the same bits for the same folder.

    Raises:
        FileNotFoundError: the folder holds no finished experiment.
        ValueError: its results are damaged.
    """
    path = Path(folder) / "results.json"
    results = _read(path) if path.exists() else {}
    if "arms" not in results:
        raise FileNotFoundError(f"{folder} holds no finished experiment: no results.json of one")
    with files.reading(path):
        arms: dict[str, list[Line]] = results.pop("metrics")
        differences = results.pop("differences")
        scores, tabled = (
            [name for name in names if any(map(_has(name), arms.values()))]
            for names in (results["scores"], [*results["scores"], verifiers.INDEPENDENT])
        )
        longest = max(map(len, arms.values()))
        data = {
            "title": f"{results['title']}: {results['task']}, "
            f"{_count(results['samples'], 'sample')}",
            "about": f"{results['source']}; {_about(results)}",
            "start": "start",
            "headline": scores[0] if scores else "",
            "panels": _panels(scores, arms),
            "table": _by_arm(tabled, arms, differences, results["reference"]),
            "settings": results,
            "iterations": list(range(longest)),
            "gallery": None,
        }
    return _page(data)


def _read(path: Path) -> Any:
    """JSON data, or of a file of lines the list of them."""
    with files.reading(path):
        text = path.read_text()
        return (
            [*map(json.loads, text.splitlines())] if path.suffix == ".jsonl" else json.loads(text)
        )


def _page(data: Mapping[str, Any]) -> str:
    """The template with its data, which cannot end the element that it is in."""
    text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    return _TEMPLATE.read_text().replace("{{data}}", text)


def _count(number: int, name: str) -> str:
    return f"{number:,} {name}{'' if number == 1 else 's'}"


def _about(settings: Mapping[str, Any]) -> str:
    """What it was made with: versions, commit and device, as far as the settings tell."""
    versions = settings.get("versions", {})
    said = [f"{name} {version}" for name, version in versions.items() if version]
    said += [str(settings[name]) for name in ("commit", "device") if settings.get(name)]
    return ", ".join(said)


# --- curves and tables ----------------------------------------------------------------------------


def _value(score: str, line: Line) -> str:
    """The name of its value in a line of metrics: a rate's is another than that of its count."""
    return f"{score}_rate" if f"{score}_rate" in line else score


def _has(score: str) -> Any:
    return lambda lines: all(_value(score, line) in line for line in lines)


def _panels(scores: Sequence[str], arms: Mapping[str, list[Line]]) -> list[dict[str, Any]]:
    """Every score of every arm that has it: low, value and high after every iteration."""
    found = []
    for score in scores:
        bands = {
            label: [
                [line.get(name) for name in (f"{score}_low", _value(score, line), f"{score}_high")]
                for line in lines
            ]
            for label, lines in arms.items()
            if _has(score)(lines)
        }
        if bands:
            share = any(f"{score}_rate" in line for lines in arms.values() for line in lines)
            found.append({"score": score, "share": share, "bands": bands})
    return found


def _text(score: str, line: Line) -> str:
    """A value with its interval."""
    value = _value(score, line)
    if value not in line:
        return "-"
    ends = [
        line[value],
        *(line[f"{score}_{end}"] for end in ("low", "high") if f"{score}_{end}" in line),
    ]
    share = value != score
    shown, *interval = (f"{100 * each:.1f}%" if share else f"{each:.3g}" for each in ends)
    return f"{shown} ({' to '.join(interval)})" if interval else shown


def _by_iteration(scores: Sequence[str], lines: Sequence[Line], start: str) -> dict[str, Any]:
    rows = [
        [
            str(line["iteration"] or start),
            *(_text(score, line) for score in scores),
            f"{line['nfe']:.0f}",
        ]
        for line in lines
    ]
    head = ["iteration", *scores, "evaluations per sample"]
    return {"title": "By iteration", "head": head, "rows": rows, "byIteration": True}


def _by_arm(
    scores: Sequence[str],
    arms: Mapping[str, Sequence[Line]],
    differences: Mapping[str, Line],
    reference: str | None,
) -> dict[str, Any]:
    """The last line of every arm, and by how much its headline rate exceeds the reference's."""
    costs = metrics.costs_of(lines[-1] for lines in arms.values())
    head = ["arm", "iterations", *scores, *costs.values()]
    rows = []
    for label, lines in arms.items():
        line = lines[-1]
        cells = [_text(score, line) for score in scores]
        spent = (f"{line[name]:.0f}" for name in costs)
        rows.append([label, str(line["iteration"]), *cells, *spent])
        if differences:
            found = differences.get(label, {})
            ends = [
                f"{100 * found[f'difference{end}']:+.1f}" for end in ("", "_low", "_high") if found
            ]
            rows[-1].append(f"{ends[0]} ({ends[1]} to {ends[2]})" if ends else "-")
    if differences:
        head.append(f"points above {reference}")
    return {"title": "At the end, by arm", "head": head, "rows": rows, "byIteration": False}


# --- samples --------------------------------------------------------------------------------------


def _gallery(
    task: Task,
    first: Mapping[str, np.ndarray],
    samples: int,
    shown: np.ndarray,
    every: np.ndarray,
) -> dict[str, Any]:
    """Some samples of the first file after some iterations: their patches, and what is marked.

    The first sheet has all patches, sample by sample; each of the others those that have changed.
    """
    height, width, _ = task.image_shape
    h, w = task.grid
    stored = first["followed"][every][:, shown]
    images = shards.Storage().stored(shards.to_float(stored))
    tiles = images.reshape(len(every), len(shown), h, height // h, w, width // w, -1)
    tiles = tiles.swapaxes(3, 4).reshape(len(every), len(shown), h * w, height // h, width // w, -1)
    differs = [(now != before).any(axis=(2, 3, 4)) for before, now in pairwise(tiles)]
    differs = [np.zeros((len(shown), h * w), bool), *differs]
    sheets = [_sheet(tiles[0].reshape(-1, *tiles.shape[3:]))]
    sheets += [_sheet(now[which]) for now, which in zip(tiles[1:], differs[1:], strict=True)]

    def seen(function: Callable[[jax.Array], Any]) -> list[Any]:
        """What a jittable function says of all moments; of equal ones it is asked once."""
        found: list[Any] = []
        for each, which in zip(stored, differs, strict=True):
            same = found and not which.any()
            found.append(
                found[-1] if same else jax.device_get(jax.jit(function)(shards.to_float(each)))
            )
        return found

    broken = seen(task.violating) if task.violating else None
    texts = [*map(task.describe, seen(task.score))] if task.describe else None
    left_out = [f"The first {len(shown)} of {_count(samples, 'sample')}"] * (len(shown) < samples)
    if len(every) < every[-1] + 1:
        left_out.append(f"{len(every)} of {every[-1] + 1} moments")
    return {
        "width": width,
        "height": height,
        "rows": h,
        "columns": w,
        "across": ACROSS,
        "cells": broken is not None,
        "note": f"{', '.join(left_out)}." if left_out else "",
        "sheets": sheets,
        "samples": [
            {
                "sample": int(sample),
                "solved": "".join("01"[int(each)] for each in first[task.headline][:, sample]),
                "given": _cells(~first["editable"][sample]),
                "doubted": _doubted(first, sample),
                "changed": [_cells(each[place]) for each in differs],
                "conflict": broken and [_cells(each[place]) for each in broken],
                "captions": texts and [each[place] for each in texts],
            }
            for place, sample in enumerate(shown)
        ],
    }


def _doubted(first: Mapping[str, np.ndarray], sample: int) -> list[int]:
    """The patches of a sample that the network doubts most in the end, of methods that tell."""
    if "doubt" not in first:
        return []
    given = first["doubt"][sample], first["editable"][sample]
    return _cells(most_doubted(*given, calm=Annealed.calm))


def _cells(which: np.ndarray) -> list[int]:
    """The numbers of the patches that are True, row by row."""
    return np.flatnonzero(which).tolist()


def _sheet(tiles: np.ndarray) -> str | None:
    """Patches [N, p, p, C] row by row, as a PNG in a data URI; grayscale as ink on paper."""
    number, height, width, channels = tiles.shape
    if not number:
        return None
    filled = np.concatenate([tiles, np.zeros_like(tiles[:1]).repeat(-number % ACROSS, axis=0)])
    rows = filled.reshape(-1, ACROSS, height, width, channels).swapaxes(1, 2)
    sheet = rows.reshape(-1, ACROSS * width, channels)
    picture = Image.fromarray(sheet if channels == 3 else 255 - sheet[..., 0])
    with io.BytesIO() as file:
        picture.save(file, format="PNG", optimize=True)
        return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
