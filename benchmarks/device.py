"""What an accelerator does, measured in one call of a few minutes.

``python -m benchmarks.device --out DIR`` compares predictions with those of the CPU, counts the
boards that the shipped model solves in float32 and in bfloat16, times every preset in every
precision at growing batches until memory is short, and profiles the largest preset at its best
batch; with ``--ipr CLONE --torch-python PYTHON`` it also times the published sampler. Every part
has a file of its own in DIR, written as soon as there is something to write. Nothing begins that
does not fit into the minutes; ``summary.json`` says what was left out and why.
"""

import dataclasses
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console

import ipr_jax
from benchmarks import peers, profile, throughput, workload
from ipr_jax.cli.options import plain
from ipr_jax.cli.terminal import console, one_line_errors
from ipr_jax.core import check
from ipr_jax.interrupts import interruptible
from ipr_jax.methods import selection
from ipr_jax.models import compute_in, get_precision
from ipr_jax.runtime import EXHAUSTED, environment, files
from ipr_jax.studies import evaluate
from ipr_jax.tasks import get_task

MODEL = "mini-sudoku"
"""The shipped model, and its task."""
TOLERANCE = 2e-5
"""Largest difference between devices, relative where outputs exceed 1."""
FIRST_BATCH = {
    "mini-sudoku": 1024,
    "even-pixels": 256,
    "counting-polygons": 16,
    "mnist-sudoku": 8,
    "mini-sudoku-transformer": 1024,
    "digits-sudoku": 256,
    "digits-sudoku-large": 64,
    "mnist-sudoku-transformer": 64,
    "even-pixels-lite": 256,
    "even-pixels-transformer": 256,
}
"""Of every preset."""
GROWTH = 4
"""From one batch to the next."""
PEER = "even-pixels"
"""The preset that the published sampler is timed with."""
SMOKE: dict[str, Any] = {
    "preset": ("mini-sudoku",),
    "precision": ("float32",),
    "batches": 2,
    "boards": 16,
    "iterations": 1,
}
"""Settings to see it work."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    """Measure an accelerator.

    Attributes:
        out: a new folder.
        minutes: nothing begins after them, or that would not be done by then.
        preset: architectures to time.
        precision: to time them in.
        batches: at most so many of each preset and precision, each 4 times the one before.
        boards: that the shipped model completes, and then refines.
        iterations: of that refinement.
        ipr: a clone of the IPR repository, to time its sampler as well.
        torch_python: the Python that has PyTorch and the packages of the clone.
        smoke: only see it work: the smallest preset and batches, two minutes on two cores.
    """

    out: Path
    minutes: float = 8
    preset: tuple[str, ...] = (
        *("mini-sudoku", "even-pixels", "counting-polygons", "mnist-sudoku"),
        "digits-sudoku-large",
    )
    precision: tuple[str, ...] = ("bfloat16", "tf32", "float32")
    batches: int = 8
    boards: int = 512
    iterations: int = 10
    ipr: Path | None = None
    torch_python: Path = Path(sys.executable)
    smoke: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.minutes < float("inf"):
            raise ValueError(f"minutes must be above 0 and finite, got {self.minutes}")
        for preset in self.preset:
            workload.check_preset(preset)
        for precision in self.precision:
            get_precision(precision)
        for name in ("batches", "boards", "iterations"):
            check.count(name, getattr(self, name))


class Run:
    """One call: its settings, what it has found so far, and the time that is left.

    Attributes:
        args: the settings.
        found: what every part has found, by its name.
        left_out: what was not done, and why.
    """

    def __init__(self, args: Args):
        """Start the clock."""
        self.args = args
        self.found: dict[str, Any] = {}
        self.left_out: dict[str, str] = {}
        self._end = time.monotonic() + 60 * args.minutes

    def fits(self, name: str, seconds: float = 0) -> bool:
        """Whether something that may take ``seconds`` can begin; if not, it is left out."""
        left = self._end - time.monotonic()
        if left > seconds:
            return True
        self.left_out[name] = f"it may take {seconds:.0f} s and {max(left, 0):.0f} s are left"
        return False

    def summarise(self) -> None:
        """Write the settings, what the device is, and what has been left out so far."""
        described = {name: v for name, v in plain(self.args).items() if name not in peers.PATHS}
        self.write(
            "summary", {"arguments": described, **environment.describe(), "left_out": self.left_out}
        )

    def write(self, name: str, found: Any) -> None:
        """Write a file into the folder, which is made when there is one."""
        self.args.out.mkdir(exist_ok=True)
        files.write_text(self.args.out / f"{name}.json", json.dumps(found, indent=1))


Part = Callable[[Run], Iterator[Any]]
"""Yields JSON data, all that it has found so far."""


def first_predictions(device: Any) -> dict[str, np.ndarray]:
    """What the shipped model predicts in float32 on a device, for noise at levels from 0 to 1."""
    with jax.default_device(device):
        model = ipr_jax.load(MODEL)
        keys = ipr_jax.sample_keys(jax.random.key(0), 16)
        z = selection.initial_noise(keys, jnp.int32(0), model.config.image_shape)
        t = jax.random.uniform(jax.random.key(1), (16, *model.config.grid))
        found = jax.jit(lambda denoise, z, t: denoise(z, t))(compute_in(model, "float32"), z, t)
        return jax.device_get(found._asdict())


def agreement(_: Run) -> Iterator[Any]:
    """Predictions of the device and of the CPU, from the same keys.

    Raises:
        ValueError: they differ by more than ``TOLERANCE``; RuntimeError without a CPU backend.
    """
    here, cpu = (first_predictions(device) for device in (jax.devices()[0], jax.devices("cpu")[0]))
    differences = {
        name: float((np.abs(here[name] - want) / np.maximum(1, np.abs(want))).max())
        for name, want in cpu.items()
    }
    yield {"largest_difference": differences, "tolerance": TOLERANCE}
    if not all(difference <= TOLERANCE for difference in differences.values()):
        raise ValueError(
            f"predictions must be those of the CPU within {TOLERANCE}, they differ by {differences}"
        )


def boards(run: Run) -> Iterator[Any]:
    """Scores of the shipped model after every iteration, in float32 and in bfloat16."""
    task, model = get_task(MODEL), ipr_jax.load(MODEL)
    puzzles = task.test_batch(0, np.arange(run.args.boards))
    refinement = ipr_jax.Refinement(iterations=run.args.iterations)
    lines: dict[str, list[Any]] = {}
    for precision in ("float32", "bfloat16"):
        denoise = compute_in(model, precision)
        steps = evaluate.evaluate(task, denoise, puzzles, refinement, jax.random.key(0))
        lines[precision] = [evaluate.summarise(progress, task) for progress in steps]
        last = lines[precision][-1]
        console.print(
            f"{precision}: {last['valid']} of {last['samples']} boards are valid after "
            f"{last['iteration']} iterations"
        )
        yield lines


def published(run: Run) -> Iterator[Any]:
    """The published sampler, in float32 (on a GPU, TF32) and, on a GPU, in bfloat16."""
    if run.args.ipr is None:
        run.left_out["published"] = "--ipr names no clone"
    results, longest = {}, 0.0
    for args in peer_args(run.args):
        began = time.monotonic()
        if run.fits(f"published, {args.dtype}", longest):
            results[args.dtype] = peers.measure(args, peers.check_args(args))
            peers.show(results[args.dtype])
            yield results
        longest = time.monotonic() - began


def peer_args(args: Args) -> list[peers.Args]:
    """What to ask ``benchmarks.peers``: nothing without a clone."""
    if args.ipr is None:
        return []
    # What this call has compiled counts as load, which the result tells.
    asked = peers.Args(
        ipr=args.ipr, torch_python=args.torch_python, preset=PEER, repeats=3, busy=True
    )
    if args.smoke:
        asked = dataclasses.replace(asked, **peers.SMOKE)
    dtypes = ("float32",) if jax.default_backend() == "cpu" else ("float32", "bfloat16")
    return [dataclasses.replace(asked, dtype=dtype) for dtype in dtypes]


def speed(run: Run) -> Iterator[Any]:
    """Throughput of every preset and precision, all at one batch before any at the next.

    A batch is measured if it and a profile fit, each as long as the longest one so far.
    """
    args = run.args
    how = throughput.Args(evaluations=1 if args.smoke else 5, repeats=1 if args.smoke else 3)
    rates = {name: throughput.product_rate(name, how.repeats) for name in args.precision}
    rows: list[dict[str, Any]] = []
    growing, longest = list(itertools.product(args.preset, args.precision)), 0.0
    for number in range(args.batches):
        for preset, precision in tuple(growing):
            batch = (1 if args.smoke else FIRST_BATCH[preset]) * GROWTH**number
            name, began = f"{preset}, {precision}, batch {batch}", time.monotonic()
            if run.fits(name, 2 * longest):
                console.print(name, highlight=False)
                try:
                    rows += throughput.measure((preset,), batch, precision, rates[precision], how)
                    yield rows
                except jax.errors.JaxRuntimeError as error:
                    if EXHAUSTED not in str(error):
                        raise
                    run.left_out[name] = "memory is short"
                longest = max(longest, time.monotonic() - began)
            if name in run.left_out:
                growing.remove((preset, precision))
    Console(width=180).print(throughput.table(rows))


def best(rows: list[dict[str, Any]], preset: str) -> dict[str, dict[str, Any]]:
    """The row of the batch with the most samples per second, by precision."""
    fastest: dict[str, dict[str, Any]] = {}
    for row in sorted(rows, key=lambda row: row["sample_evaluations_per_second"]):
        if row["preset"] == preset:
            fastest[row["precision"]] = row
    return fastest


def against_published(run: Run) -> Iterator[Any]:
    """How many times as fast as the published sampler, with its dtype and our precision.

    Computed, for its network as published and tuned: its measured seconds per evaluation and
    sample, without scoring, times ours per second in the refinement loop at the best batch.
    """
    ours = {
        precision: row["sample_evaluations_per_second"]
        for precision, row in best(run.found["speed"], PEER).items()
    }
    theirs = {
        dtype: {side: result["seconds_per_evaluation"]["sampler"][side] for side in peers.SIDES}
        for dtype, result in run.found["published"].items()
    }
    yield {
        "preset": PEER,
        "times_as_fast": {
            dtype: {
                side: {precision: took["median"] * rate for precision, rate in ours.items()}
                for side, took in sides.items()
            }
            for dtype, sides in theirs.items()
        },
    }


def kernels(run: Run) -> Iterator[Any]:
    """The profile of the last preset that has run, at the best batch of its first precision."""
    last = max(run.found["speed"], key=lambda row: run.args.preset.index(row["preset"]))
    rows = best(run.found["speed"], last["preset"])
    row = next(rows[name] for name in run.args.precision if name in rows)
    evaluations = 1 if run.args.smoke else 3
    found = profile.measure(row["preset"], row["batch"], row["precision"], evaluations)
    profile.show(found)
    yield {name: row[name] for name in ("preset", "batch", "precision")} | found


PARTS: dict[str, tuple[Part, tuple[str, ...]]] = {
    "agreement": (agreement, ()),
    "boards": (boards, ()),
    "published": (published, ()),
    "speed": (speed, ()),
    "against_published": (against_published, ("published", "speed")),
    "kernels": (kernels, ("speed",)),
}
"""The parts in their order, and the parts that each reads."""


def measure(run: Run, parts: Mapping[str, tuple[Part, tuple[str, ...]]] = PARTS) -> bool:
    """Do every part that there is time for, and write what it finds.

    A part that fails is left out, and the next one begins.

    Returns:
        Whether none has failed.
    """
    good = True
    for name, (part, needs) in parts.items():
        missing = [need for need in needs if not run.found.get(need)]
        if missing:
            run.left_out[name] = f"without {' and '.join(missing)}"
        elif run.fits(name):
            console.rule(name.replace("_", " "))
            try:
                for found in part(run):
                    run.found[name] = found
                    run.write(name, found)
            except Exception as error:  # whatever it is, what else there is to find is worth more
                run.left_out[name] = f"{type(error).__name__}: {files.printable(str(error))}"
                console.print(run.left_out[name], style="red", markup=False)
                good = False
        run.summarise()
    return good


def main(args: Args) -> bool:
    """Measure, and say what was left out.

    Returns:
        Whether no part has failed.

    Raises:
        ValueError, OSError: refused; nothing has been written.
    """
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if args.smoke:
        args = dataclasses.replace(args, **SMOKE)
    for asked in peer_args(args):
        peers.check_args(asked)
    files.refuse_existing(args.out)
    run = Run(args)
    with interruptible(f"{args.out} has what was done"):
        good = measure(run)
    for name, why in run.left_out.items():
        console.print(f"left out: {name}: {why}", markup=False, highlight=False)
    console.print(f"written: {args.out}")
    return good


if __name__ == "__main__":
    with one_line_errors():
        sys.exit(0 if main(tyro.cli(Args)) else 1)
