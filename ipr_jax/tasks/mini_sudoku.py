"""Mini-sudoku: 4x4 boards of handwritten digits, to be completed from a few given cells.

Shapes: B samples, [B, h, w] = [B, 4, 4] cells, which are the patches, [B, H, W, C] =
[B, 32, 32, 1] images in [-1, 1]. ``editable`` is True where the model generates the cell, False
where the cell is a given clue. ``split`` selects the writers: no digit image is in both splits.
"""

import functools

import jax
import numpy as np

from ipr_jax.tasks import boards, digits, sudoku
from ipr_jax.tasks.base import Batch, Split


@functools.cache
def _tiles(split: Split) -> boards.Tiles:
    return boards.sort_tiles(*digits.load_digits(split), 4)


def _draw_boards(seed: int, split: Split, indices: np.ndarray) -> np.ndarray:
    """Draw uniformly of the 288 valid boards: int8 [B, 4, 4]."""
    every = sudoku.all_boards_4x4()
    return every[boards.integers(boards.uniforms(seed, split, indices, 1)[:, 0], len(every))]


def _read_digits(tiles: jax.Array) -> jax.Array:
    return digits.read_digits(tiles[..., 0], num_digits=4)


BOARDS = boards.DigitBoards(4, 8, _tiles, _draw_boards, _read_digits)
"""4x4 boards of the 8x8 digits of scikit-learn, uniform over the valid ones."""


def batch(
    split: Split, seed: int, indices: np.ndarray, num_clues: tuple[int, int] = (0, 5)
) -> Batch:
    """Draw puzzles of 0 to 5 given cells, unless said otherwise; see ``DigitBoards.batch``."""
    return BOARDS.batch(split, seed, indices, num_clues)


render = BOARDS.render
read_board = BOARDS.read_board
score = BOARDS.score
violating = BOARDS.violating
parse_puzzle = BOARDS.parse_puzzle
format_sample = BOARDS.format_sample

TASK = BOARDS.task("mini-sudoku", functools.partial(batch, "test"))
"""Trained with 0 to 15 given cells, tested with 0 to 5."""
