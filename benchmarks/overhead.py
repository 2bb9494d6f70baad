"""What the refinement loop costs beside the network: time per evaluation inside and outside of it.

``python -m benchmarks.overhead`` times ``refine`` with every patch editable and as many calls of
the bare compiled network, in turn, and prints medians and the ratio of each pair.
"""

import dataclasses
import json
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import tyro

import ipr_jax
from ipr_jax.environment import environment
from ipr_jax.tasks import get_task


@dataclasses.dataclass(frozen=True)
class Args:
    """Time the loop against the bare network.

    Attributes:
        task: the benchmark whose puzzles and model are used.
        batch: samples.
        iterations: of one timed refinement.
        repeats: timed pairs, after one warm-up of each.
    """

    task: str = "mini-sudoku"
    batch: int = 64
    iterations: int = 2
    repeats: int = 9


def seconds(function: Callable[[], object]) -> float:
    """Wall time of a call, its device work included."""
    start = time.perf_counter()
    jax.block_until_ready(function())
    return time.perf_counter() - start


def main(args: Args) -> None:
    """Run the measurement and print one JSON object."""
    model = ipr_jax.load(args.task)
    puzzles = get_task(args.task).test_batch(0, np.arange(args.batch))
    keys = ipr_jax.sample_keys(jax.random.key(0), args.batch)
    image, editable = jnp.asarray(puzzles.image), np.ones_like(puzzles.editable)
    bare = jax.jit(lambda model, z, t: model(z, t))
    t = jnp.full(editable.shape, 0.5)

    def inside() -> ipr_jax.Refined:
        return ipr_jax.refine(model, keys, image, editable, iterations=args.iterations)

    evaluations = int(inside().nfe.max(axis=1).sum())

    def outside() -> object:
        return [bare(model, image, t) for _ in range(evaluations)]

    jax.block_until_ready((inside(), outside()))
    pairs = [(seconds(inside), seconds(outside)) for _ in range(args.repeats)]
    ratios = [a / b for a, b in pairs]
    result = {
        "batch": args.batch,
        "evaluations": evaluations,
        "ms_per_evaluation": {
            name: 1000 * statistics.median(times) / evaluations
            for name, times in zip(("loop", "bare"), zip(*pairs, strict=True), strict=True)
        },
        "ratio": {
            "median": statistics.median(ratios),
            "min": min(ratios),
            "max": max(ratios),
        },
        **environment(),
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main(tyro.cli(Args))
