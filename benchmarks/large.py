"""A large run on disk against the same refinement in memory: samples per second, and peak memory.

``python -m benchmarks.large`` refines samples of mini-sudoku by a tiny network with random
weights, in four evaluations each, so that all the rest weighs more than it ever does: first some of
them in memory, then all of them into files, then those in memory again. ``--out FILE`` also writes
all as JSON.
"""

import dataclasses
import resource
import time
from pathlib import Path

import jax
import numpy as np
import tyro
from flax import nnx
from rich.console import Console

from benchmarks.report import save
from ipr_jax import SRM, ModelConfig, Sampling
from ipr_jax.cli.terminal import one_line_errors
from ipr_jax.core import check
from ipr_jax.methods import Refinement
from ipr_jax.runtime import environment, files
from ipr_jax.studies import shards
from ipr_jax.studies.evaluate import evaluate
from ipr_jax.tasks import get_task

TINY = ModelConfig(
    image_size=(32, 32),
    channels=1,
    patch_size=8,
    widths=(8, 8, 8),
    attention=(False, False, False),
    num_blocks=1,
    time_width=8,
    num_frequencies=8,
    head_width=8,
    num_groups=4,
    dropout=0.0,
)
EXPERIMENT = Refinement(iterations=2, first=Sampling(max_steps=2), later=Sampling(max_steps=1))


@dataclasses.dataclass(frozen=True)
class Args:
    """Refine many samples into files.

    Attributes:
        samples: into files.
        in_memory: in one batch in memory, before and after.
        batch_size: samples per compiled call.
        out: a new JSON file.
    """

    samples: int = 200_000
    in_memory: int = 16_384
    batch_size: int = 256
    out: Path | None = None

    def __post_init__(self) -> None:
        for name in ("samples", "in_memory", "batch_size"):
            check.count(name, getattr(self, name))


def main(args: Args) -> None:
    """Run ``python -m benchmarks.large``.

    Raises:
        FileExistsError, FileNotFoundError: ``args.out`` exists, or its folder does not.
    """
    if args.out is not None:
        files.refuse_existing(args.out)
    made_with, task = environment.describe(), get_task("mini-sudoku")
    model = SRM(TINY, rngs=nnx.Rngs(0))

    def source(indices: np.ndarray):
        return task.test_batch(0, indices)

    def in_memory() -> float:
        """Samples per second, without compilation."""
        batch = source(np.arange(args.in_memory))
        *_, last = evaluate(
            task, model, batch, EXPERIMENT, jax.random.key(0), batch_size=args.batch_size
        )
        return args.in_memory / last.seconds

    def on_disk(folder: Path) -> float:
        """The same; writing, and making what is refined, included."""
        run = shards.Run(
            task=task,
            denoise=model,
            source=source,
            experiment=EXPERIMENT,
            samples=args.samples,
            seed=0,
            batch_size=args.batch_size,
        )
        start = time.perf_counter()
        *_, last = shards.refine(run, folder, {"benchmark": "large"})
        return args.samples / (time.perf_counter() - start - last.compile_seconds)

    before = in_memory()
    with files.temporary() as folder:
        rate = on_disk(folder / "run")
        written = sum(file.stat().st_size for file in folder.rglob("*.npz"))
    after = in_memory()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    found = {
        "in_memory_per_second": [before, after],
        "on_disk_per_second": rate,
        "ratio": 2 * rate / (before + after),
        "peak_bytes": peak,
        "written_bytes": written,
    }
    console = Console()
    console.print(
        f"{args.samples:,} samples into files ({written / 2**20:,.0f} MiB): {rate:,.0f} per "
        f"second, {found['ratio']:.2f} times the rate in memory ({before:,.0f} before, "
        f"{after:,.0f} after); peak memory {peak / 2**30:.2f} GiB",
        highlight=False,
    )
    save(args, made_with, **found)


if __name__ == "__main__":
    with one_line_errors():
        main(tyro.cli(Args, prog="python -m benchmarks.large"))
