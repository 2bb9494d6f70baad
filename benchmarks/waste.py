"""How many evaluations ``stream`` wastes on hard Sudoku: counted, not timed.

``python -m benchmarks.waste`` prints a table; ``--out FILE`` also writes everything as JSON. Counts
follow from the schedules, the given cells and who leaves when, not from what the network says: here
it does nothing, on cells of one pixel. Samples leave by chance, each after any pass.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.table import Table

import ipr_jax
from benchmarks.report import publish
from ipr_jax.cli.terminal import one_line_errors
from ipr_jax.core import check
from ipr_jax.methods import Stop, stopping
from ipr_jax.tasks.boards import DIFFICULTIES


@dataclasses.dataclass(frozen=True)
class Args:
    """Count wasted evaluations.

    Attributes:
        samples: in the queue.
        slots: samples at work at once.
        chance: with which a sample may leave after a pass, in [0, 1); 0 = no stopping rule.
        iterations: after the first pass, the most.
        seed: of the puzzles and of the samples.
        out: a new JSON file.
    """

    samples: tuple[int, ...] = (500, 512)
    slots: tuple[int, ...] = (64,)
    chance: tuple[float, ...] = (0.0, 0.03)
    iterations: int = 50
    seed: int = 0
    out: Path | None = None

    def __post_init__(self) -> None:
        for name, numbers in {"samples": self.samples, "slots": self.slots}.items():
            for number in numbers:
                check.count(name, number)
        check.count("iterations", self.iterations)
        for chance in self.chance:
            if not 0 <= chance < 1:
                raise ValueError(f"chance must be in [0, 1), got {chance}")
        check.seed(self.seed)


def still(z: jax.Array, t: jax.Array) -> ipr_jax.Prediction:
    """A denoiser that says nothing, quickly; patches are of one pixel."""
    return ipr_jax.Prediction(0.3 * z, 0 * z, t + jnp.abs(z[..., 0]))


def hard(number: int, seed: int = 0) -> tuple[jax.Array, np.ndarray, np.ndarray]:
    """The keys, images and masks of Sudokus with 0 to 26 given cells of one pixel."""
    rng = np.random.default_rng(seed)
    fewest, most = DIFFICULTIES["hard"]
    given = rng.integers(fewest, most, number, endpoint=True)
    editable = rng.permuted(np.arange(81) >= given[:, None], axis=1).reshape(number, 9, 9)
    image = np.zeros((number, 9, 9, 1), np.float32)
    return ipr_jax.sample_keys(jax.random.key(seed), number), image, editable


def by_chance(chance: float) -> Stop:
    """A rule that holds with a probability, after every pass anew; 0 = never."""

    def solved(images: jax.Array) -> jax.Array:
        return (1e4 * jnp.abs(images.mean(axis=(1, 2, 3)))) % 1 < chance

    return stopping.verified(solved) if chance else stopping.never


def count(samples: int, slots: int, chance: float, args: Args) -> dict[str, Any]:
    """Count the evaluations of one queue."""
    found = ipr_jax.stream(
        still,
        *hard(samples, args.seed),
        iterations=args.iterations,
        slots=slots,
        stop=by_chance(chance),
    )
    return {
        "samples": samples,
        "slots": slots,
        "chance": chance,
        "left_early": float((found.iterations < args.iterations).mean()),
        "evaluations": int(found.nfe.sum()),
        "slot_evaluations": int(found.slot_evaluations),
        "wasted": found.wasted,
    }


def run(args: Args) -> Iterator[dict[str, Any]]:
    """Count for every chance, number of slots and number of samples."""
    for chance in args.chance:
        for slots in args.slots:
            for samples in args.samples:
                yield count(samples, slots, chance, args)


def table(rows: list[dict[str, Any]]) -> Table:
    """The counts, a row per queue."""
    shown = Table(box=None, header_style="bold")
    for title in ("samples", "slots", "chance", "left early", "evaluations/sample", "wasted"):
        shown.add_column(title, justify="right")
    for row in rows:
        shown.add_row(
            *(str(row[name]) for name in ("samples", "slots")),
            f"{100 * row['chance']:g}%" if row["chance"] else "none",
            f"{100 * row['left_early']:.0f}%",
            f"{row['evaluations'] / row['samples']:,.0f}",
            f"{100 * row['wasted']:.1f}%",
        )
    return shown


def main(args: Args) -> None:
    """Run the counts and print them."""
    publish(args, run(args), table)


if __name__ == "__main__":
    with one_line_errors():
        main(tyro.cli(Args))
