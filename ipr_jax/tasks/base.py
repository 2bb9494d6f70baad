"""What a task is: data and scores, as plain functions."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import numpy as np

Split = Literal["train", "test"]


class Batch(NamedTuple):
    """Images of a task, with their clues and what they show.

    Attributes:
        image: float32 [B, H, W, C] in [-1, 1], clues and the rest.
        editable: bool [B, h, w]; False = a clue.
        label: int [B, ...], of the task's own kind; for Sudoku the digits of the board.
    """

    image: np.ndarray
    editable: np.ndarray
    label: np.ndarray


class Puzzle(NamedTuple):
    """A user's own puzzle.

    Attributes:
        batch: of one image; ``label`` holds 0 where the puzzle is empty.
        warnings: sentences on why it cannot be solved; empty if it can.
    """

    batch: Batch
    warnings: list[str]


@dataclass(frozen=True)
class Task:
    """A benchmark.

    Attributes:
        name: as in ``TASKS``; also that of its architecture in ``PRESETS``.
        training_batch: ``(seed, indices [B]) -> Batch`` of the training split.
        test_batch: ``(seed, indices [B]) -> Batch`` of the test split, clues as the benchmark gives
            them. Both are deterministic in (seed, index).
        score: jittable, ``images [B, H, W, C] -> scores by name, each [B]``.
        rates: names of the scores that are bool, reported as a share of the samples; the first is
            the headline.
        means: names of the others, reported as means.
        violating: jittable, ``images -> bool [B, h, w]``, the patches that break a rule.
        parse_puzzle: ``(text, seed) -> Puzzle``; a malformed text is a ``ValueError``.
        format_sample: ``(image [H, W, C], label) -> str``, what a sample shows, for a terminal.
    """

    name: str
    training_batch: Callable[[int, np.ndarray], Batch]
    test_batch: Callable[[int, np.ndarray], Batch]
    score: Callable[[jax.Array], dict[str, jax.Array]]
    rates: tuple[str, ...]
    means: tuple[str, ...]
    violating: Callable[[jax.Array], jax.Array]
    parse_puzzle: Callable[[str, int], Puzzle]
    format_sample: Callable[[np.ndarray, np.ndarray], str]

    @property
    def headline(self) -> str:
        """The score that says whether a sample solves the task."""
        return self.rates[0]
