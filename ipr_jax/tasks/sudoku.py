"""Sudoku boards as integer grids: rules, scores, reading and printing puzzles.

Shapes: `...` any leading axes, n digits = rows = columns = boxes; a box is isqrt(n) x isqrt(n).
A cell holds a digit in 1..n; 0 is an empty cell.
"""

import functools
import itertools
import math

import numpy as np


@functools.cache
def units(n: int) -> np.ndarray:
    """List the cells of every row, column and box.

    Returns:
        int32 [3n, n], read-only: n rows, n columns, n boxes, as indices into the flat board.

    Raises:
        ValueError: if n is not a positive square, so that there are no square boxes.
    """
    box = math.isqrt(max(n, 0))
    if n < 1 or box * box != n:
        raise ValueError(f"a board's side must be a positive square (1, 4, 9, 16, ...), got {n}")
    cells = np.arange(n * n, dtype=np.int32).reshape(n, n)
    boxes = cells.reshape(box, box, box, box).swapaxes(1, 2).reshape(n, n)
    table = np.concatenate([cells, cells.T, boxes])
    table.setflags(write=False)
    return table


@functools.cache
def all_boards_4x4() -> np.ndarray:
    """Enumerate every valid 4x4 board.

    Returns:
        int8 [288, 4, 4], digits 1..4, in lexicographic order, read-only.
    """
    rows = np.array(list(itertools.permutations((1, 2, 3, 4))), np.int8)
    boards = rows[np.array(list(itertools.product(range(len(rows)), repeat=4)))]
    digits_seen = np.bitwise_or.reduce(1 << boards.reshape(-1, 16)[:, units(4)[4:]], axis=-1)
    boards = boards[(digits_seen == 0b11110).all(axis=-1)]
    boards.setflags(write=False)
    return boards
