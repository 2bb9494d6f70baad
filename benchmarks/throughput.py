"""How fast refinement is, against the bare network and against what the device can do.

``python -m benchmarks.throughput`` prints a table; ``--out FILE`` also writes everything as JSON.
For every preset, precision and batch: a refinement pass of some network evaluations and as many
calls of the bare compiled network are timed in turn, after a warm-up and apart from compilation;
so is a large matrix product, once per precision. Weights and images are random.
"""

import dataclasses
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from benchmarks import workload
from benchmarks.report import save
from benchmarks.timing import seconds, spread
from ipr_jax.cli.terminal import one_line_errors
from ipr_jax.core import check
from ipr_jax.methods import selection
from ipr_jax.models import get_precision
from ipr_jax.runtime import environment, files, flops, memory_of
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
    """Network evaluations per sample at the paper's settings, the mean over its puzzles."""
    editable = np.array(workload.EDITABLE[preset])
    made, most = experiments.SETTINGS[preset], max(editable)
    first, later = (sampling.settings(most).plan.num_steps for sampling in made)
    regions = selection.region_sizes(most, 0.25)[editable]
    return float(np.mean(first[editable] + ITERATIONS * later[regions]))


def measure(preset: str, batch: int, precision: str, rate: float, args: Args) -> dict[str, Any]:
    """Time a pass against as many calls of the bare network.

    Args:
        preset: the architecture.
        batch: samples at once.
        precision: of the network.
        rate: FLOP/s of a matrix product on all devices.
        args: how many devices, evaluations and repeats.

    Returns:
        A row: JSON data.
    """
    work = workload.make(preset, batch, precision, args.devices)
    began = time.perf_counter()
    bare = jax.jit(workload.network).lower(work).compile()
    compiled = time.perf_counter() - began

    def loop() -> Any:
        return workload.refinement(work, args.evaluations)

    def outside() -> Any:
        return [bare(work) for _ in range(args.evaluations)]

    jax.block_until_ready((loop(), outside()))
    pairs = [(seconds(loop), seconds(outside)) for _ in range(args.repeats)]
    each, alone = (
        statistics.median(times) / args.evaluations for times in zip(*pairs, strict=True)
    )
    number = flops.count(workload.network, work)
    memory = memory_of(bare)
    return {
        "preset": preset,
        "precision": precision,
        "batch": batch,
        "devices": args.devices,
        "compile_seconds": compiled,
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
    """Measure every preset, precision and batch."""
    for precision in args.precision:
        rate = args.devices * product_rate(precision, args.repeats)
        for preset in args.preset:
            for batch in args.batch:
                yield measure(preset, batch, precision, rate, args)


def table(rows: list[dict[str, Any]]) -> Table:
    """The figures, a row per measurement."""
    shown = Table(box=None, header_style="bold")
    titles = (
        *("preset", "precision", "batch", "compile s", "ms/evaluation", "loop / bare"),
        *("refined/s, paper", "GFLOP/s", "of a product", "MiB"),
    )
    for number, title in enumerate(titles):
        shown.add_column(title, justify="left" if number < 2 else "right")
    for row in rows:
        ratio = row["loop_over_bare"]
        shown.add_row(
            row["preset"],
            row["precision"],
            str(row["batch"]),
            f"{row['compile_seconds']:.1f}",
            f"{row['ms_per_evaluation']['loop']:.3g}",
            f"{ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})",
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
    if args.out is not None:
        files.refuse_existing(args.out)
    rows = list(run(args))
    described = environment.describe()
    Console(width=140).print(table(rows))
    print(f"{described['device']}, jax {described['versions']['jax']}, {described['commit']}")
    save(args, described, rows=rows)


if __name__ == "__main__":
    with one_line_errors():
        main(tyro.cli(Args))
