"""Whether a network ever waits for its training batches: their rates against its own.

``python -m benchmarks.data`` times, for every task, batches of 64 made in turn with the steps (in
the loop), by the thread and by the processes of ``ipr_jax.training.loader``, and training steps of
the task's network on this device. Medians of windows after a warm-up; a table, and JSON on stdout.

A network waits where it trains on more images per second than the better loader makes, which is
where it computes at more than the TFLOP/s of the last column (2 x multiply-adds of a traced step).
Steps that are long are timed for one image and scaled.
"""

import dataclasses
import functools
import itertools
import json
import math
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

from ipr_jax.cli.terminal import one_line_errors
from ipr_jax.core import check
from ipr_jax.models import PRESETS, TRANSFORMERS, Config
from ipr_jax.runtime import environment, flops
from ipr_jax.tasks import (
    TASKS,
    Batch,
    Split,
    boards,
    counting_polygons,
    get_task,
    mnist,
    random_boards,
)
from ipr_jax.training import loader, noise_levels, trainer

BATCH_SIZE = 64
LONG_STEP = 3e11
"""FLOPs of a training step from which it is timed for one image."""
STEPS = range(10**9)

NETWORKS: dict[str, Config] = {
    **{task: PRESETS[task] for task in TASKS if task in PRESETS},
    "digits-sudoku": TRANSFORMERS["digits-sudoku"],
    "counting-stars": PRESETS["counting-polygons"],
}
"""The network of every task; that of digits-sudoku is mini-sudoku's on larger images."""


@dataclasses.dataclass(frozen=True)
class Args:
    """Time the batches and the networks that use them.

    Attributes:
        tasks: those that are timed.
        mnist: folder with the test images of MNIST, for mnist-sudoku as well.
        num_workers: processes of the loader.
        seconds: least length of a timed window.
        repeats: windows, and training steps, after a warm-up of one.
        smoke: one task and short windows, to see that it runs.
    """

    tasks: tuple[str, ...] = (
        *("mini-sudoku", "digits-sudoku", "even-pixels"),
        *("counting-polygons", "counting-stars"),
    )
    mnist: Path | None = None
    num_workers: int = 2
    seconds: float = 3.0
    repeats: int = 5
    smoke: bool = False

    def __post_init__(self) -> None:
        check.count("num_workers", self.num_workers)
        check.count("repeats", self.repeats)
        if not 0 < self.seconds < math.inf:
            raise ValueError(f"seconds must be above 0 and finite, got {self.seconds}")
        for task in self.tasks:
            if task not in NETWORKS:
                raise ValueError(f"unknown task {task!r}; known: {', '.join(NETWORKS)}")


@functools.cache
def mnist_tiles(folder: Path, split: Split) -> boards.Tiles:
    """The test images, whatever the split: as many are cut and pasted either way."""
    return boards.sort_tiles(*mnist.load_mnist(folder, "test"), 9)


def unread(tiles: jax.Array) -> jax.Array:
    """What reads the digits; training batches are not scored.

    Raises:
        NotImplementedError: always.
    """
    raise NotImplementedError("batches are timed without scores")


def batches_of(task: str, mnist_folder: Path | None) -> loader.MakeBatch:
    """What makes the training batches of a task, without the classifier that scores it.

    Raises:
        ValueError: mnist-sudoku without a folder, or no such task.
    """
    if task.startswith("counting-"):
        variant = counting_polygons.get_variant(task.removeprefix("counting-"))
        return functools.partial(counting_polygons.batch, variant, "train")
    if task == "mnist-sudoku" and mnist_folder is not None:
        tiles = functools.partial(mnist_tiles, mnist_folder)
        made = boards.DigitBoards(9, mnist.SIDE, tiles, random_boards.boards_9x9, unread)
        return made.puzzles(task, "hard").training_batch
    return get_task(task).training_batch


def rate(batches: Iterator[Batch], seconds: float, repeats: int) -> float:
    """Batches per second: the median of windows after one of warm-up."""
    next(batches)
    rates = []
    for _ in range(1 + repeats):
        start = time.perf_counter()
        for number, _ in enumerate(batches, 1):
            took = time.perf_counter() - start
            if took >= seconds:
                rates.append(number / took)
                break
    return statistics.median(rates[1:])


def loading(make_batch: loader.MakeBatch, args: Args) -> dict[str, float]:
    """Batches per second in the loop, of the thread and of the processes."""
    size = BATCH_SIZE
    inline = (make_batch(0, np.arange(k * size, (k + 1) * size)) for k in itertools.count())
    rates = {"loop": rate(inline, args.seconds, args.repeats)}
    for name, number in (("thread", 0), ("processes", args.num_workers)):
        batches = loader.load(make_batch, 0, size, STEPS, number)
        rates[name] = rate(batches, args.seconds, args.repeats)
        batches.close()
    return rates


@functools.cache
def training(model: Config, repeats: int) -> dict[str, Any]:
    """The arithmetic of a training step per image, and batches per second on this device."""
    config = trainer.TrainConfig(noise_levels="independent")  # compiles sooner
    train_step = trainer.make_train_step(model, config)
    key, inverse = trainer.run_keys(0).step, jnp.ones(noise_levels.NUM_BINS)

    def batch(size: int) -> Batch:
        image = np.zeros((size, *model.image_shape), np.float32)
        return Batch(image, np.ones((size, *model.grid), bool), np.zeros(size, np.int32))

    abstract = jax.eval_shape(lambda: trainer.init(model, config))
    per_image = flops.count(train_step, abstract, key, batch(1), inverse)
    size = BATCH_SIZE if per_image * BATCH_SIZE < LONG_STEP else 1
    state, times = trainer.init(model, config), []
    for _ in range(1 + repeats):
        start = time.perf_counter()
        state, _ = jax.block_until_ready(train_step(state, key, batch(size), inverse))
        times.append(time.perf_counter() - start)
    return {
        "gflop_per_image": per_image / 1e9,
        "timed_images": size,
        "batches_per_second": size / BATCH_SIZE / statistics.median(times[1:]),
    }


def measure(task: str, args: Args) -> dict[str, Any]:
    """One row: rates of batches and of the network, and where a faster one begins to wait."""
    batches = loading(batches_of(task, args.mnist), args)
    network = training(NETWORKS[task], args.repeats)
    images = BATCH_SIZE * max(batches["thread"], batches["processes"])
    limits = {
        "images_per_second": images,
        "tflop_per_second": images * network["gflop_per_image"] / 1e3,
    }
    return {"batches_per_second": batches, "network": network, "network_waits_above": limits}


def table(rows: dict[str, dict[str, Any]], num_workers: int) -> Table:
    """The rows for a terminal."""
    made = Table(title=f"batches of {BATCH_SIZE} per second", box=None, header_style="bold")
    made.add_column("task", no_wrap=True)
    for title in (
        *("in the loop", "thread", f"{num_workers} processes", "network here"),
        *("waits above images/s", "TFLOP/s"),
    ):
        made.add_column(title, justify="right")
    for task, row in rows.items():
        limits = row["network_waits_above"]
        numbers = [*row["batches_per_second"].values(), row["network"]["batches_per_second"]]
        made.add_row(
            task,
            *(f"{number:.3g}" for number in numbers),
            f"{limits['images_per_second']:,.0f}",
            f"{limits['tflop_per_second']:,.1f}",
        )
    return made


def main(args: Args) -> None:
    """Run the measurement, print a table to stderr and one JSON object to stdout."""
    if args.smoke:
        args = Args(tasks=("mini-sudoku",), num_workers=1, seconds=0.1, repeats=1)
    more = ("mnist-sudoku",) if args.mnist else ()
    console, rows = Console(stderr=True), {}
    for task in dict.fromkeys(args.tasks + more):
        with console.status(task):
            rows[task] = measure(task, args)
    console.print(table(rows, args.num_workers))
    settings = {"batch_size": BATCH_SIZE, "num_workers": args.num_workers, "seconds": args.seconds}
    result = {**settings, "repeats": args.repeats, "tasks": rows, **environment.describe()}
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    with one_line_errors():
        main(tyro.cli(Args))
