"""How real the digits of refined boards look, and how various the boards of a puzzle are.

``python -m benchmarks.fidelity`` solves every puzzle several times by several methods and prints a
table; ``--out FILE`` also writes everything as JSON. A method that blurs digits has distances and a
spread below those of real ones, the first row; one that always finds the same board has fewer
distinct boards than uniform draws of the puzzle's solutions. Digits are what is read, so misread
ones add to the spread.

Shapes: P puzzles, R boards of each, n digits, S pixels per side of a cell, M or K images of digits.
"""

import dataclasses
from collections.abc import Callable, Iterator
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
from ipr_jax.models import checkpoint
from ipr_jax.studies import search
from ipr_jax.studies.experiments import SETTINGS
from ipr_jax.tasks import digits_sudoku, get_task, mini_sudoku, sudoku
from ipr_jax.tasks.base import Split
from ipr_jax.tasks.boards import DigitBoards, clue_range

BOARDS = {"mini-sudoku": mini_sudoku.BOARDS, "digits-sudoku": digits_sudoku.BOARDS}

METHODS: dict[str, Any] = {
    "first pass": ipr_jax.Refinement(iterations=0),
    "IPR, 20 iterations": ipr_jax.Refinement(iterations=20),
    "annealed, one cycle": ipr_jax.Annealed(cycles=1),
    "annealed": ipr_jax.Annealed(),
    "annealed, finish from 0.4": ipr_jax.Annealed(finish_level=0.4, finish_steps=8),
    "annealed, finish from 0.6": ipr_jax.Annealed(finish_level=0.6, finish_steps=8),
    "annealed, from 0.6 in 2 parts": ipr_jax.Annealed(finish_level=0.6, finish_parts=2),
    "annealed, from 0.8 in 4 parts": ipr_jax.Annealed(finish_level=0.8, finish_parts=4),
}

REAL = "real digits"
"""The row of the images that the model was trained on, beside those of the other writers."""

MEASURED = ("distance", "spread", "distinct")

RESAMPLES = 1000
"""Of the puzzles, for an interval."""


@dataclasses.dataclass(frozen=True)
class Args:
    """Measure fidelity and diversity.

    Attributes:
        task: mini-sudoku or digits-sudoku.
        difficulty: of 9x9 puzzles: easy, medium or hard; 4x4 ones have none.
        puzzles: how many.
        tries: how often each is solved.
        slots: samples at work at once.
        verifier: by what searches choose, such as independent; None = without searches.
        seed: of the puzzles and of the samples.
        out: a new JSON file.
    """

    task: str = "mini-sudoku"
    difficulty: str = "medium"
    puzzles: int = 64
    tries: int = 16
    slots: int = 64
    verifier: str | None = None
    seed: int = 1
    out: Path | None = None

    def __post_init__(self) -> None:
        if self.task not in BOARDS:
            raise ValueError(f"task must be one of {', '.join(BOARDS)}, got {self.task!r}")
        clue_range(self.difficulty)
        for name in ("puzzles", "tries", "slots"):
            check.count(name, getattr(self, name))
        check.seed(self.seed)
        self.methods()

    def methods(self) -> dict[str, Any]:
        """What is measured, by name.

        Raises:
            ValueError: the task has no such verifier.
        """
        if self.verifier is None:
            return METHODS
        task = get_task(self.task)
        first, later = SETTINGS[self.task]
        kinds = {
            name: search.INTERNAL if name in search.ALONE else self.verifier
            for name in search.METHODS
            if name not in search.GRADIENTS
        }
        searches = {
            f"{name}, {kind}": search.made(task, name, kind, first=first, later=later)
            for name, kind in kinds.items()
        }
        return METHODS | searches


# --- what is measured -----------------------------------------------------------------------------


def nearest(images: np.ndarray, real: np.ndarray) -> np.ndarray:
    """The distance of images [M, S, S] to the nearest of others [K, S, S]: root mean square over
    the pixels, float64 [M].
    """
    one, other = (part.reshape(len(part), -1).astype(np.float64) for part in (images, real))
    squares = (one**2).sum(1)[:, None] - 2 * one @ other.T + (other**2).sum(1)
    return np.sqrt(np.maximum(squares.min(axis=1), 0) / one.shape[1])


def deviations(images: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The mean square over the pixels by which images [M, S, S] differ from the mean image of their
    label [M], without bias: float64 [M].
    """
    found = np.zeros(len(images))
    for label in np.unique(labels):
        mine = images[labels == label].astype(np.float64)
        squares = ((mine - mine.mean(axis=0)) ** 2).mean(axis=(1, 2))
        found[labels == label] = squares * len(mine) / max(1, len(mine) - 1)
    return found


def expected_distinct(solutions: int, draws: int) -> float:
    """How many of some solutions are expected in independent uniform draws."""
    return solutions * (1 - (1 - 1 / solutions) ** draws)


def solutions_of(puzzles: np.ndarray) -> np.ndarray:
    """How many 4x4 boards complete each of some puzzles, int [P, 4, 4], 0 = empty: int [P]."""
    every = sudoku.all_boards_4x4()
    fits = (puzzles[:, None] == 0) | (puzzles[:, None] == every)
    return fits.all(axis=(2, 3)).sum(axis=1)


def interval(values: Callable[[np.ndarray], float], number: int, seed: int) -> dict[str, float]:
    """A value of all puzzles and its 95% interval: the percentiles of resampled puzzles.

    Args:
        values: the value of the puzzles of these numbers, int [number].
        number: of puzzles.
        seed: of the resampling.
    """
    rng = np.random.default_rng(seed)
    found = [values(rng.integers(0, number, number)) for _ in range(RESAMPLES)]
    low, high = np.quantile(found, [0.025, 0.975]).tolist()
    return {"value": float(values(np.arange(number))), "low": low, "high": high}


def measure(
    boards: DigitBoards, image: np.ndarray, editable: np.ndarray, puzzle: np.ndarray, seed: int
) -> dict[str, Any]:
    """What several boards of each of P puzzles are like.

    Args:
        boards: the size of the board and the digits.
        image: float32 [P, R, H, W, 1], all finite: R boards of each.
        editable: bool [P, n, n], the cells that are looked at.
        puzzle: int [P, n, n], the given digits, 0 = empty.
        seed: of the intervals.

    Returns:
        distance (of a generated digit to the nearest real one of other writers) and spread (root
        mean square, of the digits of a kind, in times of that of real ones, which are held fixed),
        with intervals; valid, how many boards are; distinct, how many different ones of them,
        puzzle by puzzle, in times of the number expected in uniform draws of the puzzle's
        solutions, of 9x9 boards in times of their number; None where no board is valid.
    """
    number, tries = image.shape[:2]
    n, size = boards.n, boards.patch_size
    flat = image.reshape(-1, *boards.image_shape)
    read = np.concatenate([boards.read_board(jnp.asarray(part)) for part in _parts(flat)])
    cells = (
        flat.reshape(-1, n, size, n, size).swapaxes(2, 3).reshape(number, tries, n, n, size, size)
    )
    digits = read.reshape(number, tries, n, n)
    chosen = np.broadcast_to(editable[:, None], digits.shape)
    real, labels = real_digits(boards, "test")
    distance = nearest(cells[chosen], real)
    usual = by_digit(deviations(real, labels), labels)
    deviation = deviations(cells[chosen], digits[chosen]) / usual[digits[chosen]]
    owner = np.broadcast_to(np.arange(number)[:, None, None, None], digits.shape)[chosen]
    weight = np.bincount(owner, minlength=number)
    distances, spreads = (np.bincount(owner, each, number) for each in (distance, deviation))
    valid = np.asarray(sudoku.duplicate_count(jnp.asarray(read))).reshape(number, tries) == 0
    distinct = np.array(
        [len(np.unique(mine[good], axis=0)) for mine, good in zip(digits, valid, strict=True)]
    )
    expected = valid.sum(axis=1).astype(float)
    if n == 4:
        given = zip(solutions_of(puzzle).tolist(), expected.tolist(), strict=True)
        expected = np.array([expected_distinct(total, int(good)) for total, good in given])

    def ratio(one: np.ndarray, other: np.ndarray, power: float = 1.0) -> dict[str, float]:
        return interval(lambda i: (one[i].sum() / max(other[i].sum(), 1e-9)) ** power, number, seed)

    return {
        "distance": ratio(distances, weight),
        "spread": ratio(spreads, weight, 0.5),
        "valid": int(valid.sum()),
        "distinct": ratio(distinct, expected) if valid.any() else None,
    }


def by_digit(values: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The mean of the values [M] of each label [M] from 1: float64 [n + 1], by label."""
    return np.bincount(labels, values) / np.maximum(np.bincount(labels), 1)


def real_digits(boards: DigitBoards, split: Split) -> tuple[np.ndarray, np.ndarray]:
    """The images of a split [M, S, S] and what they show, int [M]."""
    tiles = boards.tiles(split)
    return tiles.images[1:], np.repeat(np.arange(1, boards.n + 1), tiles.number[1:])


def _parts(images: np.ndarray, size: int = 256) -> list[np.ndarray]:
    return [images[start : start + size] for start in range(0, len(images), size)]


# --- the run --------------------------------------------------------------------------------------


def run(args: Args) -> Iterator[dict[str, Any]]:
    """Measure real digits, and what every method makes of the same puzzles with the same keys."""
    boards = BOARDS[args.task]
    known, labels = real_digits(boards, "train")
    other, other_labels = real_digits(boards, "test")
    usual = by_digit(deviations(other, other_labels), other_labels)
    spread = (deviations(known, labels) / usual[labels]).mean() ** 0.5
    yield {"method": REAL, "distance": nearest(known, other).mean(), "spread": spread}
    difficulty = args.difficulty if args.task == "digits-sudoku" else None
    task = get_task(args.task, difficulty=difficulty)
    batch = task.test_batch(args.seed, np.arange(args.puzzles))
    model = checkpoint.load(checkpoint.DEFAULTS[args.task])
    keys = ipr_jax.sample_keys(jax.random.key(args.seed), args.puzzles * args.tries)
    image, editable = (
        np.repeat(part, args.tries, axis=0) for part in (batch.image, batch.editable)
    )
    for name, method in args.methods().items():
        found = ipr_jax.solve(model, keys, image, editable, method=method, slots=args.slots)
        if not np.asarray(found.finite).all():
            raise ValueError(f"all samples must be finite, {name} gives some that are not")
        made = np.asarray(found.image).reshape(args.puzzles, args.tries, *boards.image_shape)
        puzzle = np.where(batch.editable, 0, batch.label)
        yield {
            "method": name,
            "nfe": float(np.asarray(found.nfe).mean()),
            **measure(boards, made, batch.editable, puzzle, args.seed),
        }


def table(rows: list[dict[str, Any]], args: Args) -> Table:
    """What was found, a row per method."""
    shown = Table(box=None, header_style="bold")
    shown.add_column("method")
    for title in ("evaluations", "valid", *MEASURED):
        shown.add_column(title, justify="right")

    def text(value: Any) -> str:
        if isinstance(value, dict):
            return "{value:.3f} ({low:.3f} to {high:.3f})".format(**value)
        return "" if value is None else f"{value:.3f}"

    for row in rows:
        shown.add_row(
            row["method"],
            f"{row['nfe']:.0f}" if "nfe" in row else "",
            f"{row['valid']} of {args.puzzles * args.tries}" if "valid" in row else "",
            *(text(row.get(name)) for name in MEASURED),
        )
    return shown


def main(args: Args) -> None:
    """Run the methods and print what they are like."""
    publish(args, run(args), lambda rows: table(rows, args))


if __name__ == "__main__":
    with one_line_errors():
        main(tyro.cli(Args))
