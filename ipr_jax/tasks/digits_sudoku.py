"""Digits Sudoku: 9x9 boards of the 8x8 handwritten digits of scikit-learn.

The benchmark of MNIST Sudoku in small, without a download and with the reader that comes with the
package.

Shapes: B samples, [B, h, w] = [B, 9, 9] cells, which are the patches, [B, H, W, C] =
[B, 72, 72, 1] images in [-1, 1]. ``editable`` is True where the model generates the cell, False
where the cell is a given clue. ``split`` selects the writers: no digit image is in both splits.
Images that the reader misreads are left out: 3 of the 344 digits 1..9 for tests, none for training.
"""

import functools

import jax

from ipr_jax.tasks import boards, digits, random_boards
from ipr_jax.tasks.base import Split, Task


def _read_digits(tiles: jax.Array) -> jax.Array:
    return digits.read_digits(tiles[..., 0])


@functools.cache
def _tiles(split: Split) -> boards.Tiles:
    return boards.sort_tiles(*boards.legible(*digits.load_digits(split), _read_digits), 9)


BOARDS = boards.DigitBoards(9, 8, _tiles, random_boards.boards_9x9, _read_digits)
"""9x9 boards of the 8x8 digits of scikit-learn, uniform over the valid ones."""


def make(difficulty: str = "hard") -> Task:
    """The task, trained with 0 to 80 given cells and tested with those of a difficulty.

    Args:
        difficulty: "easy", "medium" or "hard".

    Raises:
        ValueError: no such difficulty.
    """
    return BOARDS.puzzles("digits-sudoku", difficulty)
