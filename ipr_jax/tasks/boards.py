"""Sudoku boards drawn with images of digits: what all Sudoku tasks have in common.

Shapes: B samples, n digits, [B, h, w] = [B, n, n] cells, which are the patches, S pixels per side
of a cell, [B, H, W, C] = [B, n S, n S, 1] images in [-1, 1]. ``editable`` is True where the model
generates the cell, False where the cell is a given clue. A board is int [n, n], digits 1..n.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ipr_jax.tasks import drawing, sudoku
from ipr_jax.tasks.base import Batch, Split, Task, generators

ReadDigits = Callable[[jax.Array], jax.Array]
"""What tiles show: jittable, float [N, S, S, 1] in [-1, 1] -> int32 [N] in 1..n."""

EMPTY = -1.0
DIFFICULTIES = {"easy": (54, 80), "medium": (27, 53), "hard": (0, 26)}
"""Fewest and most given cells of a 9x9 puzzle, both inclusive (SRM's test configurations)."""


TABLE_SIZE = 2**14
"""Boards from which a device makes others; the host draws them in seconds."""


class Tiles(NamedTuple):
    """Images of digits, sorted by digit; 0 is the empty cell, one blank image.

    Attributes:
        images: float32 [N + 1, S, S] in [-1, 1].
        first: int [n + 1], the position of the first image of each digit.
        number: int [n + 1], how many images each digit has, at least 1.
    """

    images: np.ndarray
    first: np.ndarray
    number: np.ndarray


def sort_tiles(images: np.ndarray, labels: np.ndarray, n: int) -> Tiles:
    """Sort images by digit; those of one digit keep their order, those of 0 are left out.

    Args:
        images: float32 [N, S, S] in [-1, 1].
        labels: int [N].
        n: the largest digit.

    Raises:
        ValueError: a digit in 1..n has no image.
    """
    groups = [np.full((1, *images.shape[1:]), EMPTY, np.float32)]
    groups += [images[labels == digit] for digit in range(1, n + 1)]
    number = np.array([len(group) for group in groups])
    if not number.all():
        raise ValueError(f"every digit in 1..{n} needs an image, {number.argmin()} has none")
    return Tiles(np.concatenate(groups), np.cumsum(number) - number, number)


def legible(
    images: np.ndarray, labels: np.ndarray, read_digits: ReadDigits
) -> tuple[np.ndarray, np.ndarray]:
    """Keep the images that are read as their digit, so that boards of them score as they are.

    A board has 81 digits: at 99% read right, every other board would be scored as not valid. The
    published images are selected by the confidence of a classifier.

    Args:
        images: float32 [N, S, S] in [-1, 1].
        labels: int [N].
        read_digits: as in ``DigitBoards``.
    """
    read = jax.jit(read_digits)
    parts = [images[start : start + 1000, ..., None] for start in range(0, len(images), 1000)]
    found = np.concatenate([np.zeros(0, np.int32), *(np.asarray(read(part)) for part in parts)])
    return images[found == labels], labels[found == labels]


def draw_image(board: np.ndarray, chosen: np.ndarray, tiles: Tiles) -> np.ndarray:
    """Draw boards.

    Args:
        board: int [B, n, n], 0 = an empty cell.
        chosen: int [B, n, n] >= 0, which of the images of its digit each cell has.
        tiles: the images, of the digits 1..n.

    Returns:
        float32 [B, n S, n S, 1] in [-1, 1].
    """
    image = tiles.images[tiles.first[board] + chosen].swapaxes(2, 3)
    _, n, size, _, _ = image.shape
    return image.reshape(-1, n * size, n * size, 1)


def clue_range(difficulty: str) -> tuple[int, int]:
    """Fewest and most given cells of a difficulty.

    Raises:
        ValueError: no such difficulty; lists those that there are.
    """
    if difficulty not in DIFFICULTIES:
        raise ValueError(f"unknown difficulty {difficulty!r}; known: {list(DIFFICULTIES)}")
    return DIFFICULTIES[difficulty]


def integers(uniform: np.ndarray, bound: np.ndarray | int) -> np.ndarray:
    """Turn numbers in [0, 1) into integers in 0..bound-1, equally likely to within 2**-53."""
    return (uniform * bound).astype(np.int64)


def uniforms(seed: int, split: Split, indices: np.ndarray, number: int) -> np.ndarray:
    """Draw numbers in [0, 1), each row a function of (seed, split, its index) alone.

    More numbers begin with the same ones.

    Returns:
        float64 [B, number].

    Raises:
        ValueError: if ``seed``, ``split`` or ``indices`` is out of its range.
    """
    rows = [rng.random(number) for rng in generators(seed, split, indices)]
    return np.array(rows).reshape(-1, number)


@dataclass(frozen=True)
class DigitBoards:
    """Sudoku in handwriting, for any size of board and any digits.

    Attributes:
        n: digits of the board, a square.
        patch_size: S.
        tiles: ``split -> Tiles`` with the digits 1..n.
        draw_boards: ``(seed, split, indices [B]) -> int8 [B, n, n]``, valid boards, each a function
            of its index alone.
        read_digits: what tiles show.
    """

    n: int
    patch_size: int
    tiles: Callable[[Split], Tiles]
    draw_boards: Callable[[int, Split, np.ndarray], np.ndarray]
    read_digits: ReadDigits

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C)."""
        return self.n * self.patch_size, self.n * self.patch_size, 1

    def batch(
        self, split: Split, seed: int, indices: np.ndarray, num_clues: tuple[int, int]
    ) -> Batch:
        """Draw puzzles, each a function of (split, seed, its index) alone.

        Every cell is a uniformly drawn image of its digit from ``split``, the number of given cells
        uniform over ``num_clues``, their positions uniform without replacement. ``label`` is the
        board, int8 [B, n, n].

        Args:
            split: "train" or "test".
            seed: int >= 0.
            indices: int [B], each >= 0; equal indices give equal rows, whatever else is there.
            num_clues: fewest and most given cells, both inclusive, 0 <= fewest <= most <= n*n.

        Raises:
            ValueError: if ``split``, ``seed``, ``indices`` or ``num_clues`` is out of its range.
        """
        (fewest, most), cells = num_clues, self.n**2
        if not 0 <= fewest <= most <= cells:
            raise ValueError(
                f"num_clues must satisfy 0 <= fewest <= most <= {cells}, got {num_clues}"
            )
        count_draw, image_draw, order_draw = self._uniforms(split, seed, indices)
        board = self.draw_boards(seed, split, indices)
        count = fewest + integers(count_draw, most - fewest + 1)
        rank = order_draw.argsort(axis=1).argsort(axis=1)
        return Batch(
            image=self._draw(board, image_draw, split),
            editable=(rank >= count).reshape(board.shape),
            label=board,
        )

    def corrupted(self, split: Split, seed: int, indices: np.ndarray, pairs: int) -> Batch:
        """Draw valid boards in which pairs of cells were swapped; every cell may be changed.

        The boards are those of ``batch``, and so are the images of the cells that stay. ``label``
        is the valid board, int8 [B, n, n].

        Args:
            split: "train" or "test".
            seed: int >= 0.
            indices: int [B], each >= 0; equal indices give equal rows, whatever else is there.
            pairs: swapped pairs, in 1..n*n // 2; see ``sudoku.corrupt``.

        Raises:
            ValueError: if ``split``, ``seed``, ``indices`` or ``pairs`` is out of its range.
        """
        sudoku.check_pairs(pairs, self.n)
        _, image_draw, _ = self._uniforms(split, seed, indices)
        board = self.draw_boards(seed, split, indices)
        wrong = np.empty_like(board)
        for row, rng in enumerate(generators(seed, split, indices, stream=2)):
            wrong[row] = sudoku.corrupt(board[row], pairs, rng)
        return Batch(
            image=self._draw(wrong, image_draw, split),
            editable=np.ones(board.shape, bool),
            label=board,
        )

    def drawing(self, seed: int) -> Callable[..., Batch]:
        """What draws training batches on a device: ``drawing.draw`` with its tables bound.

        Args:
            seed: of the table of ``TABLE_SIZE`` boards.
        """
        tiles = self.tiles("train")
        tables = drawing.Tables(
            boards=jnp.asarray(self.draw_boards(seed, "train", np.arange(TABLE_SIZE)), jnp.int32),
            images=jnp.asarray(tiles.images),
            first=jnp.asarray(tiles.first, jnp.int32),
            number=jnp.asarray(tiles.number, jnp.int32),
        )
        return jax.tree_util.Partial(drawing.draw, tables)

    def render(
        self, puzzle: np.ndarray, seed: int, split: Split = "test"
    ) -> tuple[np.ndarray, np.ndarray]:
        """Draw a puzzle's given cells as handwritten digits.

        Args:
            puzzle: int [n, n], 1..n = a given digit, 0 = an empty cell.
            seed: int >= 0, chooses each cell's image uniformly among those of its digit.
            split: "train" or "test".

        Returns:
            image: float32 [H, W, 1] in [-1, 1], empty cells all -1.
            editable: bool [n, n], True where the puzzle is empty.

        Raises:
            ValueError: if ``puzzle`` is not n x n with values in 0..n, or ``split`` or ``seed`` is
                invalid.
        """
        puzzle, n = np.asarray(puzzle), self.n
        if puzzle.shape != (n, n) or not np.isin(puzzle, range(n + 1)).all():
            raise ValueError(
                f"a puzzle must be a {n}x{n} grid of 0 (empty) to {n}, got {puzzle.tolist()}"
            )
        _, image_draw, _ = self._uniforms(split, seed, np.zeros(1, int))
        return self._draw(puzzle[None], image_draw, split)[0], puzzle == 0

    def read_board(self, images: jax.Array) -> jax.Array:
        """Read the digit in every cell. Jittable.

        Args:
            images: float [B, H, W, 1] in [-1, 1].

        Returns:
            int32 [B, n, n] in 1..n; a cell that shows no digit is read as the one it resembles
            most.

        Raises:
            ValueError: if the images have another shape.
        """
        if images.ndim != 4 or images.shape[1:] != self.image_shape:
            shape = ", ".join(map(str, self.image_shape))
            raise ValueError(f"images must have shape [B, {shape}], got {images.shape}")
        n, size = self.n, self.patch_size
        tiles = images.reshape(len(images), n, size, n, size).swapaxes(2, 3)
        return self.read_digits(tiles.reshape(-1, size, size, 1)).reshape(-1, n, n)

    def score(self, images: jax.Array) -> dict[str, jax.Array]:
        """Score boards by the digits read from them. Jittable.

        Args:
            images: float [B, H, W, 1] in [-1, 1].

        Returns:
            valid: bool [B], every row, column and box has each of 1..n once.
            violations: int32 [B] >= 0, the published duplicate count; 0 = valid.

        Raises:
            ValueError: if the images have another shape.
        """
        violations = sudoku.duplicate_count(self.read_board(images))
        return {"valid": violations == 0, "violations": violations}

    def violating(self, images: jax.Array) -> jax.Array:
        """Mark the cells whose digit stands in their row, column or box again. Jittable.

        Args:
            images: float [B, H, W, 1] in [-1, 1].

        Returns:
            bool [B, n, n].

        Raises:
            ValueError: if the images have another shape.
        """
        return sudoku.violating_cells(self.read_board(images))

    def parse_puzzle(self, text: str, seed: int) -> Batch:
        """Read a user's puzzle and draw its given cells with digits of the test split.

        Args:
            text: as ``sudoku.parse_puzzle`` takes it.
            seed: int >= 0, chooses each given cell's image.

        Returns:
            A batch of one; ``label`` is the puzzle, 0 = empty.

        Raises:
            ValueError: the text is not an n x n puzzle, or its digits contradict each other.
        """
        board = sudoku.parse_puzzle(text, self.n)
        if wrong := sudoku.contradictions(board):
            more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
            raise ValueError(f"a puzzle must have a solution, got one where {wrong[0]}{more}")
        image, editable = self.render(board, seed)
        return Batch(image[None], editable[None], board[None])

    def format_sample(self, image: np.ndarray, label: np.ndarray) -> str:
        """What a board shows, as text; cells that are not 0 in ``label`` [n, n] in brackets."""
        board = self.read_board(jnp.asarray(image[None]))[0]
        return sudoku.format_board(np.asarray(board), label)

    def explain(self, image: np.ndarray, label: np.ndarray) -> str:
        """Which cells of a board have a digit that stands in their row, column or box again, and
        which of the given ones, not 0 in ``label`` [n, n], are read as another digit.
        """
        board = self.read_board(jnp.asarray(image[None]))[0]
        conflicts = sudoku.names(np.asarray(sudoku.violating_cells(board)))
        changed = sudoku.names((label != 0) & (np.asarray(board) != label))
        return "; ".join(
            [
                f"{len(conflicts)} cells conflict: {' '.join(conflicts)}"
                if conflicts
                else "no cells conflict",
                f"given digits that changed: {' '.join(changed)}"
                if changed
                else f"none of the {np.count_nonzero(label)} given digits has changed",
            ]
        )

    def task(self, name: str, test_batch: Callable[[int, np.ndarray], Batch]) -> Task:
        """The task: trained with 0 to all but one of the cells given, tested on ``test_batch``."""
        return Task(
            name=name,
            training_batch=functools.partial(self.batch, "train", num_clues=(0, self.n**2 - 1)),
            test_batch=test_batch,
            score=self.score,
            rates=("valid",),
            dependencies=sudoku.dependencies(self.n),
            means={"violations": 6 * self.n * (self.n - 1)},  # of a board of one digit
            read=self.read_board,
            violating=self.violating,
            units=sudoku.units(self.n),
            parse_puzzle=self.parse_puzzle,
            format_sample=self.format_sample,
            explain=self.explain,
            drawing=self.drawing,
            corrupted=functools.partial(self.corrections, name),
            image_shape=self.image_shape,
            patch_size=self.patch_size,
        )

    def puzzles(self, name: str, difficulty: str) -> Task:
        """``task``, tested on puzzles of a difficulty.

        Raises:
            ValueError: no such difficulty; lists those that there are.
        """
        num_clues = clue_range(difficulty)
        return self.task(name, functools.partial(self.batch, "test", num_clues=num_clues))

    def corrections(self, name: str, pairs: int) -> Task:
        """``task``, tested on boards with ``pairs`` swapped pairs of cells.

        Raises:
            ValueError: ``pairs`` is out of its range.
        """
        sudoku.check_pairs(pairs, self.n)
        return self.task(name, functools.partial(self.corrupted, "test", pairs=pairs))

    def _uniforms(
        self, split: Split, seed: int, indices: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Draw for the number of clues [B, 1], the images [B, n, n] and the clues [B, n*n]."""
        cells = self.n**2
        draws = uniforms(seed, split, indices, 2 + 2 * cells)  # the first may choose the board
        _, count, image, order = np.split(draws, [1, 2, 2 + cells], axis=1)
        return count, image.reshape(-1, self.n, self.n), order

    def _draw(self, board: np.ndarray, uniform: np.ndarray, split: Split) -> np.ndarray:
        """Draw boards [B, n, n] with one number in [0, 1) per cell: float32 [B, H, W, 1]."""
        tiles = self.tiles(split)
        return draw_image(board, integers(uniform, tiles.number[board]), tiles)
