"""How fast refinement is, against the bare network and against what the device can do.

``python -m benchmarks.throughput`` prints a table; ``--out FILE`` also writes everything as JSON.
For every precision and batch: a refinement pass of some network evaluations and as many calls of
the bare compiled network are timed, in turn with those of the other presets, after a warm-up and
apart from compilation; so is a large matrix product, once per precision. Weights and images are
random. ``--preset mini-sudoku mini-sudoku-transformer`` compares architectures at the same task.
"""

import dataclasses
import statistics
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.table import Table

from benchmarks import workload
from benchmarks.report import publish
from benchmarks.timing import seconds, spread
from ipr_jax.cli.terminal import one_line_errors
from ipr_jax.core import check
from ipr_jax.methods import selection
from ipr_jax.models import get_precision
from ipr_jax.runtime import flops, memory_of
from ipr_jax.studies import experiments

ITERATIONS = 50
"""Of the paper's refinement."""


@dataclasses.dataclass(frozen=True)
class Args:
    """Measure throughput.

    Attributes:
        preset: architectures.
        batch: samples at once.
        precision: float32, tf32 (a GPU's, float32 elsewhere) or bfloat16 (parameters, norms, noise
            levels and the images between steps stay float32).
        devices: over how many devices the batch is spread.
        evaluations: of the network in a timed pass.
        repeats: timed pairs.
        smoke: small sizes, two minutes on two cores.
        out: a new JSON file.
    """

    preset: tuple[str, ...] = ("mini-sudoku", "even-pixels")
    batch: tuple[int, ...] = (1, 8, 64)
    precision: tuple[str, ...] = ("float32",)
    devices: int = 1
    evaluations: int = 10
    repeats: int = 7
    smoke: bool = False
    out: Path | None = None

    def __post_init__(self) -> None:
        for name in ("devices", "evaluations", "repeats"):
            check.count(name, getattr(self, name))
        for batch in self.batch:
            check.count("batch", batch)
            if batch % self.devices:
                raise ValueError(f"batch must be a multiple of devices={self.devices}, got {batch}")
        for preset in self.preset:
            workload.check_preset(preset)
        for precision in self.precision:
            get_precision(precision)
        if self.devices > jax.device_count():
            raise ValueError(f"devices must be at most {jax.device_count()}, got {self.devices}")


def product_rate(precision: str, repeats: int) -> float:
    """FLOP/s of a large square matrix product on one device, the best of ``repeats``."""
    size, chained = (2048, 1) if jax.default_backend() == "cpu" else (8192, 8)
    dtype, products = get_precision(precision)
    x = (jax.random.normal(jax.random.key(0), (size, size)) / size**0.5).astype(dtype)

    @jax.jit
    def multiply(x: jax.Array) -> jax.Array:
        for _ in range(chained):
            x = jnp.matmul(x, x, precision=products)
        return x

    seconds(lambda: multiply(x))
    return chained * 2 * size**3 / min(seconds(lambda: multiply(x)) for _ in range(repeats))


def paper_evaluations(preset: str) -> float:
    """Network evaluations per sample at the paper's settings, the mean over its task's puzzles."""
    task = workload.TASKS[preset]
    editable = np.array(workload.EDITABLE[task])
    made, most = experiments.SETTINGS[task], max(editable)
    first, later = (sampling.settings(most).plan.num_steps for sampling in made)
    regions = selection.region_sizes(most, 0.25)[editable]
    return float(np.mean(first[editable] + ITERATIONS * later[regions]))


class _Timed(NamedTuple):
    """What is timed of a preset: its workload, the bare network compiled, and how long that took,
    and the seconds of passes and of bare networks so far.
    """

    work: workload.Workload
    bare: Any
    compiled: float
    loops: list[float]
    bares: list[float]


def measure(
    presets: Sequence[str], batch: int, precision: str, rate: float, args: Args
) -> list[dict[str, Any]]:
    """Time passes of several presets in turn, each against as many calls of the bare network.

    Args:
        presets: the architectures.
        batch: samples at once.
        precision: of the networks.
        rate: FLOP/s of a matrix product on all devices.
        args: how many devices, evaluations and repeats.

    Returns:
        A row for each: JSON data.
    """

    def loop(timed: _Timed) -> Any:
        return workload.refinement(timed.work, args.evaluations)

    def outside(timed: _Timed) -> Any:
        return [timed.bare(timed.work) for _ in range(args.evaluations)]

    every = []
    for preset in presets:
        work = workload.make(preset, batch, precision, args.devices)
        began = time.perf_counter()
        bare = jax.jit(workload.network).lower(work).compile()
        every.append(_Timed(work, bare, time.perf_counter() - began, [], []))
        jax.block_until_ready((loop(every[-1]), outside(every[-1])))
    for timed in args.repeats * every:
        timed.loops.append(seconds(partial(loop, timed)))
        timed.bares.append(seconds(partial(outside, timed)))
    return [
        _row(preset, precision, rate, args, timed)
        for preset, timed in zip(presets, every, strict=True)
    ]


def _row(preset: str, precision: str, rate: float, args: Args, timed: _Timed) -> dict[str, Any]:
    batch = len(timed.work.image)
    each, alone = (
        statistics.median(times) / args.evaluations for times in (timed.loops, timed.bares)
    )
    number = flops.count(workload.network, timed.work)
    memory = memory_of(timed.bare)
    pairs = zip(timed.loops, timed.bares, strict=True)
    return {
        "preset": preset,
        "precision": precision,
        "batch": batch,
        "devices": args.devices,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(timed.work.denoise)),
        "compile_seconds": timed.compiled,
        "ms_per_evaluation": {"loop": 1e3 * each, "bare": 1e3 * alone},
        "loop_over_bare": spread([inside / out for inside, out in pairs]),
        "sample_evaluations_per_second": batch / each,
        "refined_samples_per_second": batch / each / paper_evaluations(preset),
        "gflop_per_sample": number / batch / 1e9,
        "flop_per_second": number / each,
        "product_flop_per_second": rate,
        "share_of_product": number / each / rate,
        "memory_bytes": memory and memory.total,
    }


def run(args: Args) -> Iterator[dict[str, Any]]:
    """Measure every precision and batch, all presets in turn."""
    for precision in args.precision:
        rate = args.devices * product_rate(precision, args.repeats)
        for batch in args.batch:
            yield from measure(args.preset, batch, precision, rate, args)


def table(rows: list[dict[str, Any]]) -> Table:
    """The figures, a row per measurement."""
    shown = Table(box=None, header_style="bold")
    titles = (
        *("preset", "precision", "parameters", "GFLOP/sample", "batch", "compile s"),
        *("ms/evaluation", "loop / bare", "evaluated/s", "refined/s, paper", "GFLOP/s"),
        *("of a product", "MiB"),
    )
    for number, title in enumerate(titles):
        shown.add_column(title, justify="left" if number < 2 else "right")
    for row in rows:
        ratio = row["loop_over_bare"]
        shown.add_row(
            row["preset"],
            row["precision"],
            f"{row['parameters']:,}",
            f"{row['gflop_per_sample']:.3g}",
            str(row["batch"]),
            f"{row['compile_seconds']:.1f}",
            f"{row['ms_per_evaluation']['loop']:.3g}",
            f"{ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})",
            f"{row['sample_evaluations_per_second']:,.0f}",
            f"{row['refined_samples_per_second']:.3g}",
            f"{row['flop_per_second'] / 1e9:,.0f}",
            f"{100 * row['share_of_product']:.0f}%",
            f"{row['memory_bytes'] / 2**20:,.0f}" if row["memory_bytes"] else "-",
        )
    return shown


def main(args: Args) -> None:
    """Run the measurement and print it."""
    if args.smoke:
        args = dataclasses.replace(args, batch=(1, 8), evaluations=2, repeats=3)
    publish(args, run(args), table)


if __name__ == "__main__":
    with one_line_errors():
        main(tyro.cli(Args))
