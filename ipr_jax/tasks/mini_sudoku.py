"""Mini-sudoku: 4x4 boards of handwritten digits, to be completed from a few given cells.

Shapes: B samples, [B, h, w] = [B, 4, 4] cells, which are the patches, [B, H, W, C] =
[B, 32, 32, 1] images in [-1, 1]. ``editable`` is True where the model generates the cell, False
where the cell is a given clue. ``split`` selects the writers: no digit image is in both splits.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from ipr_jax.tasks import sudoku
from ipr_jax.tasks.base import Batch, Puzzle, Split, Task
from ipr_jax.tasks.digits import load_digits, read_digits

SIDE = 4
PATCH_SIZE = 8
IMAGE_SHAPE = (SIDE * PATCH_SIZE, SIDE * PATCH_SIZE, 1)
NUM_CELLS = SIDE * SIDE
EMPTY = -1.0


def batch(
    split: Split, seed: int, indices: np.ndarray, num_clues: tuple[int, int] = (0, 5)
) -> Batch:
    """Draw boards, each a function of (split, seed, its index) alone.

    The board is uniform over the 288 valid ones, every cell a uniformly drawn image of its digit
    from ``split``, the number of given cells uniform over ``num_clues``, their positions uniform
    without replacement. ``label`` is the board, int8 [B, 4, 4] in 1..4.

    Args:
        split: "train" or "test", the writers of the digits.
        seed: int >= 0.
        indices: int [B], each >= 0; equal indices give equal rows, whatever else is in the batch.
        num_clues: fewest and most given cells, both inclusive, 0 <= fewest <= most <= 16.

    Raises:
        ValueError: if ``split``, ``seed``, ``indices`` or ``num_clues`` is out of its range.
    """
    fewest, most = num_clues
    if not 0 <= fewest <= most <= NUM_CELLS:
        raise ValueError(f"num_clues must satisfy 0 <= fewest <= most <= 16, got {num_clues}")
    board_draw, count_draw, image_draw, order_draw = np.split(
        _uniforms(split, seed, indices), [1, 2, 2 + NUM_CELLS], axis=1
    )
    boards = sudoku.all_boards_4x4()
    board = boards[_integers(board_draw[:, 0], len(boards))]
    count = fewest + _integers(count_draw, most - fewest + 1)
    rank = order_draw.argsort(axis=1).argsort(axis=1)
    return Batch(
        image=_draw_image(board, image_draw.reshape(-1, SIDE, SIDE), split),
        editable=(rank >= count).reshape(-1, SIDE, SIDE),
        label=board,
    )


def render(puzzle: np.ndarray, seed: int, split: Split = "test") -> tuple[np.ndarray, np.ndarray]:
    """Draw a puzzle's given cells as handwritten digits.

    Args:
        puzzle: int [4, 4], 1..4 = a given digit, 0 = an empty cell.
        seed: int >= 0, chooses each cell's image uniformly among those of its digit.
        split: "train" or "test", the writers of the digits.

    Returns:
        image: float32 [32, 32, 1] in [-1, 1], empty cells all -1.
        editable: bool [4, 4], True where the puzzle is empty.

    Raises:
        ValueError: if ``puzzle`` is not 4x4 with values in 0..4, or ``split`` or ``seed`` is
            invalid.
    """
    puzzle = np.asarray(puzzle)
    if puzzle.shape != (SIDE, SIDE) or not np.isin(puzzle, range(SIDE + 1)).all():
        raise ValueError(f"a puzzle must be a 4x4 grid of 0 (empty) to 4, got {puzzle.tolist()}")
    draw = _uniforms(split, seed, np.zeros(1, int))[:, 2 : 2 + NUM_CELLS]
    image = _draw_image(puzzle[None], draw.reshape(1, SIDE, SIDE), split)
    return image[0], puzzle == 0


def read_board(images: jax.Array) -> jax.Array:
    """Read the digit in every cell. Jittable.

    Args:
        images: float [B, 32, 32, 1] in [-1, 1].

    Returns:
        int32 [B, 4, 4] in 1..4; a cell that shows no digit is read as the one it resembles most.

    Raises:
        ValueError: if the images have another shape.
    """
    if images.ndim != 4 or images.shape[1:] != IMAGE_SHAPE:
        raise ValueError(f"images must have shape [B, 32, 32, 1], got {images.shape}")
    tiles = images.reshape(len(images), SIDE, PATCH_SIZE, SIDE, PATCH_SIZE).swapaxes(2, 3)
    return read_digits(tiles, num_digits=SIDE)


def score(images: jax.Array) -> dict[str, jax.Array]:
    """Score boards by the digits read from them. Jittable.

    Args:
        images: float [B, 32, 32, 1] in [-1, 1].

    Returns:
        valid: bool [B], every row, column and box has each of 1..4 once.
        violations: int32 [B] >= 0, the published duplicate count; 0 = valid.

    Raises:
        ValueError: if the images have another shape.
    """
    violations = sudoku.duplicate_count(read_board(images))
    return {"valid": violations == 0, "violations": violations}


def violating(images: jax.Array) -> jax.Array:
    """Mark the cells whose digit stands in their row, column or box again. Jittable.

    Args:
        images: float [B, 32, 32, 1] in [-1, 1].

    Returns:
        bool [B, 4, 4].

    Raises:
        ValueError: if the images have another shape.
    """
    return sudoku.violating_cells(read_board(images))


def parse_puzzle(text: str, seed: int) -> Puzzle:
    """Read a user's puzzle and draw its given cells with digits of the test split.

    Args:
        text: as ``sudoku.parse_puzzle`` takes it.
        seed: int >= 0, chooses each given cell's image.

    Raises:
        ValueError: the text is not a 4x4 puzzle.
    """
    board = sudoku.parse_puzzle(text, SIDE)
    image, editable = render(board, seed)
    return Puzzle(Batch(image[None], editable[None], board[None]), sudoku.contradictions(board))


def format_sample(image: np.ndarray, label: np.ndarray) -> str:
    """What a board shows, as text; cells that are not 0 in ``label``, int [4, 4], in brackets."""
    return sudoku.format_board(np.asarray(read_board(jnp.asarray(image[None]))[0]), label)


def _uniforms(split: Split, seed: int, indices: np.ndarray) -> np.ndarray:
    """Draw 34 numbers in [0, 1) per index: float64 [B, 34]."""
    indices = np.asarray(indices)
    if seed < 0 or indices.ndim != 1 or (indices < 0).any():
        raise ValueError(
            f"seed must be >= 0 and indices a flat list of numbers >= 0, got {seed}, {indices}"
        )
    _digit_table(split)  # refuses an unknown split
    split_id = ("train", "test").index(split)
    rows = [np.random.default_rng((seed, split_id, int(i))).random(34) for i in indices]
    return np.array(rows).reshape(-1, 34)


def _integers(uniform: np.ndarray, bound: np.ndarray | int) -> np.ndarray:
    """Turn numbers in [0, 1) into integers in 0..bound-1, equally likely to within 2**-53."""
    return (uniform * bound).astype(np.int64)


@functools.cache
def _digit_table(split: Split) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sort the images by digit: images [N + 1, 8, 8], first position [5] and count [5] of 0..4.

    Digit 0 is the empty cell: one blank image.
    """
    images, labels = load_digits(split)
    groups = [np.full((1, PATCH_SIZE, PATCH_SIZE), EMPTY, np.float32)]
    groups += [images[labels == digit] for digit in range(1, SIDE + 1)]
    counts = np.array([len(group) for group in groups])
    return np.concatenate(groups), np.cumsum(counts) - counts, counts


def _draw_image(board: np.ndarray, uniform: np.ndarray, split: Split) -> np.ndarray:
    """Draw boards [B, 4, 4] with one number in [0, 1) per cell: float32 [B, 32, 32, 1]."""
    images, first, count = _digit_table(split)
    tiles = images[first[board] + _integers(uniform, count[board])]
    return tiles.swapaxes(2, 3).reshape(-1, *IMAGE_SHAPE)


TASK = Task(
    name="mini-sudoku",
    training_batch=functools.partial(batch, "train", num_clues=(0, NUM_CELLS - 1)),
    test_batch=functools.partial(batch, "test"),
    score=score,
    rates=("valid",),
    means=("violations",),
    violating=violating,
    parse_puzzle=parse_puzzle,
    format_sample=format_sample,
)
"""Trained with 0 to 15 given cells, tested with 0 to 5."""
