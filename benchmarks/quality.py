"""What refinement does for a model: valid rates over many test puzzles, with 95% intervals.

``python -m benchmarks.quality --out FOLDER`` writes ``quality.json`` (metrics after every
iteration, settings, versions, device, commit) and ``quality.png`` into a new folder.
"""

import dataclasses
import json
import subprocess
from pathlib import Path

import jax
import numpy as np
import tyro
from rich.progress import track

from ipr_jax import check, checkpoint, files, pictures
from ipr_jax.cli import environment
from ipr_jax.evaluate import Refinement, evaluate, summarise
from ipr_jax.tasks import get_task


@dataclasses.dataclass(frozen=True)
class Args:
    """Measure the valid rate of a model before and after refinement.

    Attributes:
        out: the new folder.
        task: the benchmark.
        model: a shipped model or a model folder.
        samples: test puzzles.
        iterations: after the first pass.
        ratio: share of the editable patches that an iteration regenerates, in (0, 1].
        seed: of puzzles and noise.
        chunk: samples per compiled call; larger suits a GPU or TPU.
    """

    out: Path
    task: str = "mini-sudoku"
    model: str = "mini-sudoku"
    samples: int = 2048
    iterations: int = 30
    ratio: float = 0.25
    seed: int = 0
    chunk: int = 64


def commit() -> str:
    """The commit of the checkout, with ``-dirty`` where files have changed."""
    words = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()


def main(args: Args) -> None:
    """Run the measurement."""
    check.count("samples", args.samples)
    task = get_task(args.task)
    experiment = Refinement(iterations=args.iterations, ratio=args.ratio)
    model, provenance = checkpoint.open_model(args.model)
    batch = task.test_batch(args.seed, np.arange(args.samples))
    key = jax.random.key(args.seed)
    run = evaluate(task, model, batch, experiment, key, chunk=args.chunk)
    described = {
        "arguments": dataclasses.asdict(args) | {"out": str(args.out)},
        "commit": commit(),
        **environment(),
        "model": dataclasses.asdict(model.config),
        "provenance": provenance,
    }
    args.out.mkdir(parents=True)
    lines = []
    for progress in track(run, "iterations", total=args.iterations + 1):
        lines.append(summarise(progress))
        result = json.dumps(described | {"metrics": lines}, indent=1)
        files.write_text(args.out / "quality.json", result)
    rate, low, high = (
        np.array([line[name] for line in lines])
        for name in ("valid_rate", "valid_low", "valid_high")
    )
    pictures.curve(
        args.out / "quality.png",
        range(args.iterations + 1),
        rate,
        low,
        high,
        f"valid boards, {args.task}",
    )


if __name__ == "__main__":
    main(tyro.cli(Args))
