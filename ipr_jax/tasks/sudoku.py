"""Sudoku boards as integer grids: rules, scores, reading and printing puzzles.

Shapes: ``...`` any leading axes, B boards, n digits = rows = columns = boxes; a box is isqrt(n) x
isqrt(n). A cell holds a digit in 1..n; 0 is an empty cell. ``duplicate_count``, ``is_valid`` and
``violating_cells`` can be jitted and batched; the others run on the host.
"""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
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
def dependencies(n: int) -> np.ndarray:
    """Which cells constrain each other: those that share a row, column or box.

    Returns:
        bool [n*n, n*n], symmetric, False on the diagonal, read-only; cells in reading order.

    Raises:
        ValueError: as for ``units``.
    """
    member = np.zeros((3 * n, n * n), np.int32)
    np.put_along_axis(member, units(n), 1, axis=1)
    table = (member.T @ member > 0) & ~np.eye(n * n, dtype=bool)
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
    boards = boards[are_valid(boards)]
    boards.setflags(write=False)
    return boards


def duplicate_count(grid: jax.Array) -> jax.Array:
    """Measure how far boards are from valid: the published distance, 0 = valid.

    The sum of |occurrences - 1| over every row, column and box and every digit 1..n: a digit
    that stands twice in a row counts 1, and so does the one it displaces. A cell outside 1..n
    is no digit, so in an otherwise valid board it counts 3.

    Args:
        grid: int [..., n, n].

    Returns:
        int32 [...], >= 0.

    Raises:
        ValueError: if the last two axes are not equal to one positive square number.

    Source: srmbench, the evaluation of MNIST Sudoku ("duplicate_count").
    """
    flat, n = _flatten(grid)
    digits = jnp.arange(1, n + 1, dtype=jnp.int32)
    members = flat[..., units(n)]
    digits = digits.reshape((1,) * members.ndim + (n,))
    occurrences = (members[..., None] == digits).sum(axis=-2, dtype=jnp.int32)
    return jnp.abs(occurrences - 1).sum(axis=(-2, -1), dtype=jnp.int32)


def is_valid(grid: jax.Array) -> jax.Array:
    """Tell which boards hold every digit 1..n once in each row, column and box.

    Args:
        grid: int [..., n, n].

    Returns:
        bool [...].

    Raises:
        ValueError: as for ``duplicate_count``.
    """
    return duplicate_count(grid) == 0


def are_valid(grids: np.ndarray) -> np.ndarray:
    """``is_valid`` on the host: bool [...] of int [..., n, n]."""
    grids = np.asarray(grids)
    n = _side(grids.shape)
    flat = grids.reshape(*grids.shape[:-2], n * n)
    seen = np.bitwise_or.reduce(1 << flat[..., units(n)].astype(np.int32), axis=-1)
    return (seen == 2 ** (n + 1) - 2).all(axis=-1) & ((flat >= 1) & (flat <= n)).all(axis=-1)


def violating_cells(grid: jax.Array) -> jax.Array:
    """Mark the cells that share a row, column or box with an equal digit.

    Args:
        grid: int [..., n, n]; empty cells (0) violate nothing.

    Returns:
        bool [..., n, n].

    Raises:
        ValueError: as for ``duplicate_count``.
    """
    flat, n = _flatten(grid)
    equal = (flat[..., :, None] == flat[..., None, :]) & (flat > 0)[..., None]
    peers = jnp.asarray(dependencies(n)).reshape((1,) * (flat.ndim - 1) + (n * n, n * n))
    return (equal & peers).any(axis=-1).reshape(grid.shape)


def corrupt(board: np.ndarray, pairs: int, rng: np.random.Generator) -> np.ndarray:
    """Swap random pairs of cells of a valid board, so that it is not valid any more.

    Uniform over all ways to choose disjoint pairs of cells with two different digits that leave an
    invalid board: 2 * pairs cells change, and none of them twice.

    Args:
        board: int [n, n], valid.
        pairs: int in 1..n*n // 2; for n = 9, the IPR paper has 1, 3, 5, 7 and 9.
        rng: consumed.

    Returns:
        The corrupted board, of the same dtype.

    Raises:
        ValueError: if ``board`` is not valid or ``pairs`` out of its range.
    """
    board = _single(board)
    check_pairs(pairs, len(board))
    if not are_valid(board):
        raise ValueError(f"only a valid board can be corrupted, got {board.tolist()}")
    while True:
        one, other = rng.permutation(board.size)[: 2 * pairs].reshape(2, pairs)
        swapped = board.flatten()
        swapped[one], swapped[other] = swapped[other], swapped[one]
        swapped = swapped.reshape(board.shape)
        if (board != swapped).sum() == 2 * pairs and not are_valid(swapped):
            return swapped


def check_pairs(pairs: int, n: int) -> None:
    """Refuse a number of pairs of cells that an n x n board does not have.

    Raises:
        ValueError: names the value and the range.
    """
    most = n * n // 2
    if not 1 <= pairs <= most:
        raise ValueError(f"pairs must be in 1..{most} on a {n}x{n} board, got {pairs}")


def parse_puzzle(text: str, n: int = 4) -> np.ndarray:
    """Read a puzzle from text.

    Args:
        text: n*n characters row by row, with any spaces or newlines between them: a digit 1..n,
            or one of ``.``, ``0``, ``_``, ``*`` for an empty cell.
        n: the board's side, 4 or 9.

    Returns:
        int8 [n, n], 0 = empty.

    Raises:
        ValueError: if the number of characters is not n*n, or not n in each of n rows that are set
            apart, or a character is none of the above.
    """
    if n not in (4, 9):
        raise ValueError(f"a puzzle in text must have side 4 or 9, got {n}")
    cells = "".join(text.split())
    rule = f"a {n}x{n} puzzle must be {n * n} characters out of 1..{n} and . 0 _ * (empty)"
    example = {4: "1..4 .... .3.. ....", 9: " ".join(["1........", *["." * 9] * 8])}[n]
    for place, cell in enumerate(cells):
        if cell not in "123456789"[:n] + ".0_*":
            where = f"row {place // n + 1}, column {place % n + 1}"
            raise ValueError(f"{rule}, got {cell!r} in {where} of {text!r}; valid: {example!r}")
    lines = ["".join(line.split()) for line in text.strip().splitlines() if line.strip()]
    rows = lines if len(lines) > 1 else text.split()
    uneven = [f"{len(row)} in row {k}" for k, row in enumerate(rows, 1) if len(row) != n]
    where = f" ({', '.join(uneven)})" if uneven and len(rows) == n else ""
    if len(cells) != n * n or where:
        raise ValueError(f"{rule}, got {len(cells)}{where} in {text!r}; valid: {example!r}")
    digits = [0 if cell in "._*" else int(cell) for cell in cells]
    return np.array(digits, np.int8).reshape(n, n)


def names(marked: np.ndarray) -> list[str]:
    """Name the cells of a board that are marked, bool [n, n]: r1c2 is the second of the first row.

    In reading order.
    """
    return [f"r{row}c{column}" for row, column in (np.argwhere(marked) + 1).tolist()]


def contradictions(puzzle: np.ndarray) -> list[str]:
    """Say which given digits contradict each other, or that no board completes them.

    Args:
        puzzle: int [n, n], 0 = empty. Whether it can be completed is examined for n = 4 only.

    Returns:
        One sentence per digit that a row, column or box has more than once, rows and columns
        counted from 1, boxes in reading order, cells as ``names`` has them; or one sentence that
        there is no completion; or an empty list.

    Raises:
        ValueError: if the puzzle is not square with a positive square side.
    """
    puzzle = _single(puzzle)
    flat, n = puzzle.reshape(-1), len(puzzle)
    kinds = [f"{kind} {k}" for kind in ("row", "column", "box") for k in range(1, n + 1)]
    found = []
    for kind, unit in zip(kinds, units(n), strict=True):
        digits, occurrences = np.unique(flat[unit], return_counts=True)
        for digit in digits[(digits > 0) & (occurrences > 1)].tolist():
            inside = np.isin(np.arange(n * n), unit).reshape(n, n)
            cells = " and ".join(names(inside & (puzzle == digit)))
            found.append(f"{kind} has the digit {digit} in {cells}")
    if not found and n == 4 and num_solutions(puzzle) == 0:
        found.append("no valid board has all the given digits")
    return found


def num_solutions(puzzle: np.ndarray) -> int:
    """Count the valid boards that agree with the given cells of a 4x4 puzzle.

    Args:
        puzzle: int [4, 4], 0 = empty.

    Returns:
        0..288; a puzzle in the strict sense has exactly 1.

    Raises:
        ValueError: if the puzzle is not 4x4.
    """
    puzzle = np.asarray(puzzle)
    if puzzle.shape != (4, 4):
        raise ValueError(f"solutions are counted for 4x4 puzzles only, got shape {puzzle.shape}")
    agrees = (all_boards_4x4() == puzzle) | (puzzle == 0)
    return int(agrees.all(axis=(1, 2)).sum())


def format_board(grid: np.ndarray, puzzle: np.ndarray | None = None) -> str:
    """Lay out a board as text, boxes apart.

    Args:
        grid: int [n, n]; 0 is printed as a dot.
        puzzle: int [n, n] or None; cells that are given there are put in brackets.

    Returns:
        Lines joined by newlines, without one at the end.

    Raises:
        ValueError: if the grid is not square with a positive square side, or ``puzzle`` has
            another shape.
    """
    grid = _single(grid)
    given = np.zeros(grid.shape, bool) if puzzle is None else np.asarray(puzzle) != 0
    if given.shape != grid.shape:
        raise ValueError(f"puzzle must have the grid's shape {grid.shape}, got {given.shape}")
    n = len(grid)
    box, width = math.isqrt(n), len(str(n))
    lines = []
    for digits, clues in zip(grid.tolist(), given.tolist(), strict=True):
        cells = [
            f"[{digit or '.':>{width}}]" if clue else f" {digit or '.':>{width}} "
            for digit, clue in zip(digits, clues, strict=True)
        ]
        lines.append("|".join("".join(cells[k : k + box]) for k in range(0, n, box)))
    rule = "+".join(["-" * (box * (width + 2))] * box)
    bands = ["\n".join(lines[k : k + box]) for k in range(0, n, box)]
    return f"\n{rule}\n".join(bands)


def _side(shape: tuple[int, ...]) -> int:
    if len(shape) < 2 or shape[-1] != shape[-2]:
        raise ValueError(f"a board must have shape [..., n, n], got {shape}")
    units(shape[-1])  # refuses a side without square boxes
    return shape[-1]


def _single(grid: np.ndarray) -> np.ndarray:
    grid = np.asarray(grid)
    if grid.ndim != 2:
        raise ValueError(f"expected one board [n, n], got shape {grid.shape}")
    _side(grid.shape)
    return grid


def _flatten(grid: jax.Array) -> tuple[jax.Array, int]:
    n = _side(grid.shape)
    return jnp.asarray(grid).astype(jnp.int32).reshape(*grid.shape[:-2], n * n), n
