"""Random 9x9 Sudoku boards, each of all that are valid equally likely.

Shapes: ``...`` any leading axes, B boards. On the host.
"""

import functools
import itertools
import math
from typing import NamedTuple

import numpy as np

from ipr_jax.tasks.base import Split, generators

TRIALS = 128
"""How many draws are tried at once."""
CHOICES = (288 * 288, 56, 216, 216, 56, 56, 56)
"""What a number below their product chooses: a threshold of acceptance and six layouts."""


def boards_9x9(seed: int, split: Split, indices: np.ndarray) -> np.ndarray:
    """Draw valid boards, each a function of (seed, split, its index) alone.

    Each of the 6,670,903,752,021,072,936,960 valid boards is equally likely. In a box, the digits
    lie in three rows and in three columns of three; such a spread over three lines is a layout,
    one of 1,680. A board is the same as a row layout and a column layout for each of its nine
    boxes, so that

    - in a band, three boxes side by side, every digit is in three different rows;
    - in a stack, three boxes below each other, every digit is in three different columns;
    - in a box, no two digits share both row and column: its two layouts cross.

    All layouts but the column layouts of the second and third stack are drawn uniformly. The
    former can then be completed in 6w ways, the latter in 6v, w and v in 16..288 being a matter of
    their row layouts. The draw is accepted with probability wv / 288^2, as one in 75 is, which
    makes all boards equally likely; then each stack's completion is drawn uniformly.

    Args:
        seed: int >= 0.
        split: "train" or "test", apart in their random numbers only.
        indices: int [B], each >= 0; equal indices give equal boards, whatever else is in the batch.

    Returns:
        int8 [B, 9, 9] in 1..9.

    Raises:
        ValueError: if ``seed``, ``split`` or ``indices`` is out of its range.

    Source of the number: B. Felgenhauer and F. Jarvis, Mathematics of Sudoku I, 2006.
    """
    rngs = generators(seed, split, indices, stream=1)
    boards = [np.empty((0, 9, 9), np.int8)]
    while chunk := list(itertools.islice(rngs, 512)):
        boards.append(_draw_boards(chunk))
    return np.concatenate(boards)


class _Layouts(NamedTuple):
    """The 1,680 layouts, L = 0..1679 in lexicographic order, and how they combine.

    Attributes:
        lines: int8 [L, 9], the line 0..2 of every digit 0..8.
        second: int16 [L, 56], the layouts that have every digit in another line.
        third: int16 [L, 56], the one that has every digit in the line that is left.
        crossing: int16 [L, 216], the layouts that cross it.
        rank: int8 [L, 9], the place of every digit if they are listed line by line. Relabelled by
            it, the layout is number 0.
        relabelled: int16 [L, L], the second layout relabelled by the rank of the first.
        completions: int16 [2016, 3], the column layouts of a stack of which the first crosses
            layout 0 and has the digits 0, 1, 2 in this order.
        completes: bool [2, L, 2016], whether the second, and the third, of them crosses a layout.
        ways: int32 [L, L], how many completions cross both layouts.
    """

    lines: np.ndarray
    second: np.ndarray
    third: np.ndarray
    crossing: np.ndarray
    rank: np.ndarray
    relabelled: np.ndarray
    completions: np.ndarray
    completes: np.ndarray
    ways: np.ndarray


@functools.cache
def _layouts() -> _Layouts:
    """Tabulate, by products of matrices of small whole numbers, which float32 has exactly."""
    words = np.array(list(itertools.product(range(3), repeat=9)))
    lines = words[(np.sort(words, axis=1) == np.repeat(range(3), 3)).all(axis=1)]
    place = 3 ** np.arange(8, -1, -1)
    number = np.zeros(3**9, np.int16)
    number[lines @ place] = np.arange(len(lines))

    def product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return (a.astype(np.float32) @ b.astype(np.float32).T).astype(np.int32)

    one_hot = np.eye(3)[lines].reshape(-1, 27)
    second = np.nonzero(product(one_hot, one_hot) == 0)[1].reshape(-1, 56)
    third = number[(3 - lines[:, None] - lines[second]) @ place]
    crosses = product(8**lines, 2**lines) == 511  # the sum of nine different powers of two
    crossing = np.nonzero(crosses)[1].reshape(-1, 216)
    rank = lines.argsort(axis=1, kind="stable").argsort(axis=1)
    first = crossing[0][(lines[crossing[0], :3] == range(3)).all(axis=1)]
    completions = np.stack([first.repeat(56), second[first].ravel(), third[first].ravel()], axis=1)
    completes = np.stack([crosses[:, completions[:, 1]], crosses[:, completions[:, 2]]])
    return _Layouts(
        lines=lines.astype(np.int8),
        second=second.astype(np.int16),
        third=third,
        crossing=crossing.astype(np.int16),
        rank=rank.astype(np.int8),
        relabelled=number[product(place[rank], lines)],
        completions=completions.astype(np.int16),
        completes=completes,
        ways=product(*completes),
    )


class _Draw(NamedTuple):
    """A draw of all layouts but the column layouts of the second and third stack.

    Attributes:
        rows: int [3, 3, ...], the row layouts by band and stack.
        columns: int [3, ...], the column layouts of the first stack by band.
        relabelled: int [2, 2, ...], the row layouts of the second and third band in the second and
            third stack, relabelled by the rank of the first band's.
        ways: int32 [...], wv of ``boards_9x9``, in 16^2..288^2.
        accepted: bool [...], true with probability ways / 288^2.
    """

    rows: np.ndarray
    columns: np.ndarray
    relabelled: np.ndarray
    ways: np.ndarray
    accepted: np.ndarray


def _draw(numbers: np.ndarray) -> _Draw:
    """The draws that numbers in 0..prod(CHOICES)-1, int [...], stand for; the first box is 0..8."""
    table = _layouts()
    threshold, column, row_1, row_2, *bands = np.unravel_index(numbers, CHOICES)
    start = int(np.flatnonzero((table.lines == np.tile(range(3), 3)).all(axis=1))[0])
    columns = np.stack(
        [np.full_like(column, start), table.second[start, column], table.third[start, column]]
    )
    crossing = [table.crossing[columns[1], row_1], table.crossing[columns[2], row_2]]
    left = np.stack([np.zeros_like(column), *crossing])
    rows = np.stack([left, table.second[left, bands], table.third[left, bands]], axis=1)
    relabelled = table.relabelled[rows[0, 1:], rows[1:, 1:]]
    ways = table.ways[relabelled[0], relabelled[1]].prod(axis=0)
    return _Draw(rows, columns, relabelled, ways, threshold < ways)


def _draw_boards(rngs: list[np.random.Generator]) -> np.ndarray:
    """Draw a board with each generator: int8 [B, 9, 9]."""
    numbers = np.empty(len(rngs), np.int64)
    waiting = np.arange(len(rngs))
    while len(waiting):
        tried = np.stack([rngs[row].integers(math.prod(CHOICES), size=TRIALS) for row in waiting])
        accepted = _draw(tried).accepted
        numbers[waiting] = tried[np.arange(len(tried)), accepted.argmax(axis=1)]
        waiting = waiting[~accepted.any(axis=1)]

    table, draw = _layouts(), _draw(numbers)
    chosen = np.empty((2, len(rngs)), np.int64)
    for stack, row in np.ndindex(chosen.shape):
        second, third = draw.relabelled[:, stack, row]
        possible = np.flatnonzero(table.completes[0, second] & table.completes[1, third])
        chosen[stack, row] = possible[rngs[row].integers(len(possible))]
    column = np.empty((3, 3, len(rngs), 9), np.int8)  # by band, stack and digit
    column[:, 0] = table.lines[draw.columns]
    rank = table.rank[draw.rows[0, 1:]]
    for band in range(3):
        found = table.lines[table.completions[chosen, band]]
        column[band, 1:] = np.take_along_axis(found, rank, axis=-1)
    for row, rng in enumerate(rngs):
        for stack in (1, 2):
            column[:, stack, row] = rng.permutation(3)[column[:, stack, row]]

    digits = np.stack([rng.permutation(9) for rng in rngs]) + 1
    boxes = 3 * np.arange(3)
    row = table.lines[draw.rows] + boxes[:, None, None, None]
    column += boxes[:, None, None].astype(np.int8)
    boards = np.empty((len(rngs), 9, 9), np.int8)
    boards[np.arange(len(rngs))[:, None], row, column] = digits
    return boards
