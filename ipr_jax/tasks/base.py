"""What a task is: data and scores, as plain functions."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

Split = Literal["train", "test"]


class Batch(NamedTuple):
    """Images of a task, with their clues.

    Attributes:
        image: float32 [B, H, W, C] in [-1, 1].
        editable: bool [B, h, w]; False = a clue.
    """

    image: np.ndarray
    editable: np.ndarray


@dataclass(frozen=True)
class Task:
    """A benchmark.

    Attributes:
        name: as in ``TASKS``; also the preset of its architecture.
        training_batch: ``(seed, indices [B]) -> Batch`` of the training split.
        test_batch: ``(seed, indices [B]) -> Batch`` of the test split, clues as the benchmark gives
            them. Both are deterministic in (seed, index).
    """

    name: str
    training_batch: Callable[[int, np.ndarray], Batch]
    test_batch: Callable[[int, np.ndarray], Batch]
