"""Random 9x9 boards and their corruption, boards drawn with digits, the Sudoku tasks."""

import hashlib
import itertools
import math
import time

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from ipr_jax.models.config import PRESETS
from ipr_jax.tasks import (
    boards,
    digits,
    digits_sudoku,
    get_task,
    mini_sudoku,
    random_boards,
    sudoku,
)
from ipr_jax.tasks.base import generators

NUM_BOARDS = 6_670_903_752_021_072_936_960
"""Of valid 9x9 boards: Felgenhauer and Jarvis 2006."""
TASK = digits_sudoku.make()
seeds = st.integers(0, 2**40)
splits = st.sampled_from(["train", "test"])
positions = st.lists(st.integers(0, 2**40), max_size=5).map(lambda rows: np.array(rows, np.int64))


def sha256(*arrays):
    digest = hashlib.sha256()
    for array in map(np.ascontiguousarray, arrays):
        digest.update(f"{array.dtype}{array.shape}".encode() + array.tobytes())
    return digest.hexdigest()


def crossing(layout):
    """Every column layout, as a tuple, that has no two digits of a row in the same column."""
    rows = [[digit for digit in range(9) if layout[digit] == line] for line in range(3)]
    found = []
    for columns in itertools.product(itertools.permutations(range(3)), repeat=3):
        column = {d: c for row, line in zip(rows, columns, strict=True)
                  for d, c in zip(row, line, strict=True)}  # fmt: skip
        found.append([column[digit] for digit in range(9)])
    return np.array(found)


# --- random boards --------------------------------------------------------------------------------


@settings(max_examples=30)
@given(seeds, splits, positions)
def test_boards_are_valid_and_depend_on_seed_split_and_index_alone(seed, split, indices):
    drawn = random_boards.boards_9x9(seed, split, indices)
    assert (drawn.dtype, drawn.shape) == (np.int8, (len(indices), 9, 9))
    assert sudoku.are_valid(drawn).all()
    again = random_boards.boards_9x9(seed, split, np.concatenate([[7], indices[::-1]]).astype(int))
    np.testing.assert_array_equal(again[1:], drawn[::-1])


def test_boards_of_other_seeds_splits_and_indices_are_others():
    one = random_boards.boards_9x9(0, "train", np.arange(600))
    seed, split = random_boards.boards_9x9(1, "train", np.arange(600)), random_boards.boards_9x9(
        0, "test", np.arange(600))  # fmt: skip
    assert len({board.tobytes() for board in [*one, *seed, *split]}) == 1800


def test_boards_are_the_same_everywhere():
    text = "746139852812567394395842716639274185128653479574981263457316928983725641261498537"
    assert "".join(map(str, random_boards.boards_9x9(0, "test", np.arange(1)).ravel())) == text
    digest = "2d1487bd22534f17bf87543b3485b646ecf236e3c9553036f4dd854b5cf99212"
    assert sha256(random_boards.boards_9x9(2, "train", np.array([9, 10**6, 2**33]))) == digest


def test_the_draws_count_all_boards():
    """Digits, draws, the two stacks' column orders: their mean number of ways is no accident."""
    numbers = np.random.default_rng(0).integers(math.prod(random_boards.CHOICES), size=200_000)
    ways = random_boards._draw(numbers).ways
    counted = math.factorial(9) * math.prod(random_boards.CHOICES[1:]) * 36 * ways.mean()
    error = ways.std() / ways.mean() / len(ways) ** 0.5
    assert error < 2e-3
    assert abs(counted / NUM_BOARDS - 1) < 3 * error


def test_the_ways_are_those_of_a_slow_count():
    numbers = np.random.default_rng(1).integers(math.prod(random_boards.CHOICES), size=4)
    draw, lines = random_boards._draw(numbers), random_boards._layouts().lines
    for k in range(len(numbers)):
        counts = []
        for stack in (1, 2):
            first, second, third = (crossing(lines[draw.rows[band, stack, k]]) for band in range(3))
            allowed = {tuple(column) for column in third}
            apart = (first[:, None] != second).all(axis=-1)
            left = 3 - first[:, None] - second
            counts.append(sum(tuple(column) in allowed for column in left[apart].tolist()))
        assert 36 * draw.ways[k] == math.prod(counts)
    assert (random_boards._layouts().ways.min(), random_boards._layouts().ways.max()) == (16, 288)


def test_accepted_draws_are_as_many_as_their_ways():
    numbers = np.random.default_rng(2).integers(math.prod(random_boards.CHOICES), size=200_000)
    draw = random_boards._draw(numbers)
    expected = draw.ways / 288**2
    spread = (expected * (1 - expected)).sum() ** 0.5
    assert abs(draw.accepted.sum() - expected.sum()) < 3 * spread


@pytest.fixture(scope="module")
def many():
    return random_boards.boards_9x9(0, "train", np.arange(6000))


def test_every_digit_is_equally_likely_in_every_cell(many):
    counts = (many[..., None] == np.arange(1, 10)).sum(axis=0)
    p = stats.chisquare(counts, axis=-1).pvalue
    assert p.shape == (9, 9)
    assert p.min() > 1e-4
    assert 0.3 < np.median(p) < 0.7


def test_pairs_of_cells_agree_as_often_as_in_all_boards(many):
    """In another row and column, but in the same band or stack: 1/6; otherwise 1/9."""
    same = (many.reshape(-1, 81, 1) == many.reshape(-1, 1, 81)).mean(axis=0)
    row, column = np.divmod(np.arange(81), 9)
    close = (row[:, None] // 3 == row // 3) | (column[:, None] // 3 == column // 3)
    expected = np.where(close, 1 / 6, 1 / 9) * ~sudoku.dependencies(9)
    np.fill_diagonal(expected, 1)
    np.testing.assert_allclose(same, expected, atol=5 * (1 / 6 * 5 / 6 / len(many)) ** 0.5)


def test_boards_are_not_all_the_same_up_to_symmetry(many):
    """Swaps of two digits at the corners of a rectangle: symmetries keep their number."""
    one, other = np.triu_indices(9, 1)
    top, bottom = many[:500, one], many[:500, other]
    equal = (top[:, :, one] == bottom[:, :, other]) & (top[:, :, other] == bottom[:, :, one])
    counts = equal.sum(axis=(1, 2))
    assert len(np.unique(counts)) > 20
    assert np.bincount(counts).max() < 0.2 * len(counts)


def test_boards_are_drawn_fast():
    """100,000 of them in 30 s on a core; asserted with four times the time that they take."""
    random_boards.boards_9x9(0, "train", np.arange(1))
    start = time.process_time()
    random_boards.boards_9x9(3, "train", np.arange(3000))
    assert time.process_time() - start < 0.9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-1, "test", [0]), "seed must be >= 0 .* got -1"),
        ((0, "all", [0]), "'train' or 'test', got 'all'"),
        ((0, "test", [-1]), "indices a flat list of numbers >= 0"),
        ((0, "test", 3), "indices a flat list of numbers >= 0"),
    ],
)
def test_other_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        random_boards.boards_9x9(*arguments)
    with pytest.raises(ValueError, match=message):
        digits_sudoku.BOARDS.batch(arguments[1], arguments[0], arguments[2], (0, 1))


def test_streams_of_a_sample_are_independent():
    first, second, third = (
        next(iter(generators(0, "test", np.array([5]), stream))).random(4) for stream in range(3)
    )
    assert not set(first) & set(second) & set(third)
    np.testing.assert_array_equal(first, np.random.default_rng((0, 1, 5)).random(4))


# --- rules on the host ----------------------------------------------------------------------------


@given(st.lists(st.integers(-300, 300), min_size=16, max_size=16), st.integers(0, 287))
def test_validity_on_the_host_is_that_of_the_score(cells, number):
    board = sudoku.all_boards_4x4()[number].astype(int)
    grids = np.stack([np.reshape(cells, (4, 4)), board, board + 4, board * (board > 1)])
    np.testing.assert_array_equal(sudoku.are_valid(grids), sudoku.is_valid(grids))
    assert sudoku.are_valid(grids[1])


@pytest.mark.parametrize(("n", "peers"), [(1, 0), (4, 7), (9, 20)])
def test_dependencies_are_shared_rows_columns_and_boxes(n, peers):
    table = sudoku.dependencies(n)
    box = math.isqrt(n)
    cells = list(itertools.product(range(n), repeat=2))
    expected = [
        [x != y and (x[0] == y[0] or x[1] == y[1] or
         (x[0] // box, x[1] // box) == (y[0] // box, y[1] // box)) for y in cells]
        for x in cells
    ]  # fmt: skip
    np.testing.assert_array_equal(table, expected)
    assert (table.dtype, table.flags.writeable) == (bool, False)
    assert (table.sum(axis=1) == peers).all()
    with pytest.raises(ValueError, match="positive square"):
        sudoku.dependencies(6)


# --- corruption -----------------------------------------------------------------------------------


@given(seeds, st.integers(1, 40))
def test_corrupted_boards_differ_in_two_cells_per_pair_and_are_invalid(seed, pairs):
    board = random_boards.boards_9x9(seed, "test", np.arange(1))[0]
    before = board.copy()
    wrong = sudoku.corrupt(board, pairs, np.random.default_rng(seed))
    np.testing.assert_array_equal(board, before)
    assert (wrong != board).sum() == 2 * pairs
    assert not sudoku.are_valid(wrong)
    np.testing.assert_array_equal(np.sort(wrong, axis=None), np.sort(board, axis=None))
    again = sudoku.corrupt(board, pairs, np.random.default_rng(seed))
    np.testing.assert_array_equal(wrong, again)


def test_a_swap_that_leaves_a_valid_board_is_not_taken():
    """Of the swaps of two pairs on a 4x4 board, some do."""
    board = sudoku.all_boards_4x4()[0]
    rng = np.random.default_rng(0)
    drawn = [sudoku.corrupt(board, 2, rng) for _ in range(2000)]
    assert not sudoku.are_valid(np.stack(drawn)).any()
    assert (np.stack(drawn) != board).mean(axis=0).min() > 0.15


def test_every_pair_of_different_digits_is_swapped_equally_often():
    board = sudoku.all_boards_4x4()[5]
    rng = np.random.default_rng(1)
    drawn = np.stack([sudoku.corrupt(board, 1, rng) for _ in range(3000)])
    _, counts = np.unique(drawn, axis=0, return_counts=True)
    assert len(counts) == 16 * 12 / 2
    assert stats.chisquare(counts).pvalue > 1e-3


@pytest.mark.parametrize("pairs", [-1, 0, 41])
def test_other_numbers_of_pairs_are_refused(pairs):
    for wrong in (
        lambda: sudoku.corrupt(np.ones((9, 9), int), pairs, np.random.default_rng(0)),
        lambda: TASK.corrupted(pairs),
        lambda: digits_sudoku.BOARDS.corrupted("test", 0, np.arange(0), pairs),
    ):
        with pytest.raises(ValueError, match=rf"pairs must be in 1\.\.40 .* got {pairs}"):
            wrong()


def test_only_valid_boards_are_corrupted():
    with pytest.raises(ValueError, match="only a valid board"):
        sudoku.corrupt(np.ones((4, 4), int), 1, np.random.default_rng(0))


# --- boards of digits -----------------------------------------------------------------------------


def test_mini_sudoku_is_what_it_was():
    """The shipped model was trained, and recorded results were made, with these very samples."""
    assert sha256(*mini_sudoku.batch("test", 3, np.arange(64))) == (
        "1002f510f38567f8a0d4aaf6cd0b5c39aaed978b9722c2ff24a0602673edc76f"
    )
    assert sha256(*mini_sudoku.TASK.training_batch(0, np.arange(1000, 1064))) == (
        "b537b36db1db47aa740ada67866e2268e931748916f4d539b322ba8428b3a210"
    )
    assert sha256(*mini_sudoku.TASK.test_batch(7, np.array([5, 2, 5, 10**7]))) == (
        "f2dd54d852db2f0990931e9c1cec395b1a1e1dea22da38e65f628d75fb28eb01"
    )
    assert sha256(*mini_sudoku.render(np.arange(16).reshape(4, 4) % 5, 2, "train")) == (
        "1fc416b7a49c131e25a1df093d7502cdd86467333f81abd458be21c3b05e35e9"
    )
    assert sha256(*mini_sudoku.TASK.parse_puzzle("1..4 .... .3.. ....", 11)) == (
        "898bc108d2be7307baaf4593c7f6ef2a4fa2592b3f00d0a41f282efd18f9426a"
    )


@pytest.mark.parametrize("name", ["mini-sudoku", "digits-sudoku"])
def test_tasks_know_the_shape_of_their_images(name):
    task = get_task(name)
    assert task.name == name
    batch = task.test_batch(0, np.arange(2))
    assert batch.image.shape[1:] == task.image_shape
    h, w, _ = task.image_shape
    assert batch.editable.shape[1:] == (h // task.patch_size, w // task.patch_size)
    if name in PRESETS:
        config = PRESETS[name]
        assert (task.image_shape, task.patch_size) == (config.image_shape, config.patch_size)


@settings(max_examples=20)
@given(seeds, splits, positions, st.integers(0, 81), st.integers(0, 81), st.integers(1, 40))
def test_samples_depend_on_split_seed_and_index_alone(seed, split, indices, a, b, pairs):
    clues = (min(a, b), max(a, b))
    for draw, argument in (
        (digits_sudoku.BOARDS.batch, clues),
        (digits_sudoku.BOARDS.corrupted, pairs),
    ):
        batch = draw(split, seed, indices, argument)
        again = draw(split, seed, np.concatenate([indices[::-1], [3]]).astype(int), argument)
        for part, other in zip(batch, again, strict=True):
            np.testing.assert_array_equal(part, other[:-1][::-1])
        np.testing.assert_array_equal(batch.label, random_boards.boards_9x9(seed, split, indices))
    given_cells = 81 - digits_sudoku.BOARDS.batch(split, seed, indices, clues).editable.sum((1, 2))
    assert ((given_cells >= clues[0]) & (given_cells <= clues[1])).all()


@pytest.mark.parametrize("difficulty", boards.DIFFICULTIES)
def test_difficulties_are_ranges_of_given_cells(difficulty):
    fewest, most = {"easy": (54, 80), "medium": (27, 53), "hard": (0, 26)}[difficulty]
    batch = digits_sudoku.make(difficulty).test_batch(0, np.arange(400))
    given_cells = (~batch.editable).sum(axis=(1, 2))
    assert (given_cells.min(), given_cells.max()) == (fewest, most)
    np.testing.assert_allclose(given_cells.mean(), (fewest + most) / 2, atol=1.6)


def test_training_gives_0_to_80_cells():
    batch = TASK.training_batch(0, np.arange(1500))
    given_cells = (~batch.editable).sum(axis=(1, 2))
    assert (given_cells.min(), given_cells.max()) == (0, 80)
    np.testing.assert_allclose((~batch.editable).mean(axis=0), 40 / 81, atol=0.07)


def test_real_boards_are_read_as_they_are():
    score = jax.jit(TASK.score)
    batch = TASK.test_batch(0, np.arange(100))
    np.testing.assert_array_equal(digits_sudoku.BOARDS.read_board(batch.image), batch.label)
    assert score(batch.image)["valid"].all()
    assert not TASK.violating(batch.image[:3]).any()


def test_corrupted_boards_are_scored_as_such():
    score = jax.jit(TASK.score)
    valid = TASK.test_batch(0, np.arange(20))
    for pairs in (1, 9):
        batch = TASK.corrupted(pairs).test_batch(0, np.arange(20))
        assert batch.editable.all()
        np.testing.assert_array_equal(batch.label, valid.label)
        changed = np.asarray(digits_sudoku.BOARDS.read_board(batch.image)) != batch.label
        assert (changed.sum(axis=(1, 2)) == 2 * pairs).all()
        pixels = changed.repeat(8, axis=1).repeat(8, axis=2)[..., None]
        np.testing.assert_array_equal(
            np.where(pixels, 0, batch.image), np.where(pixels, 0, valid.image)
        )
        assert not score(batch.image)["valid"].any()
        assert TASK.violating(batch.image).any(axis=(1, 2)).all()


@pytest.mark.parametrize("split", ["train", "test"])
def test_boards_show_digits_of_their_split_alone(split):
    images, labels = digits.load_digits(split)
    known = {image.tobytes(): label for image, label in zip(images, labels, strict=True)}
    batch = digits_sudoku.BOARDS.batch(split, 0, np.arange(40), (0, 0))
    tiles = batch.image.reshape(-1, 9, 8, 9, 8).swapaxes(2, 3).reshape(-1, 8, 8)
    assert [known[tile.tobytes()] for tile in tiles] == batch.label.reshape(-1).tolist()
    assert len({tile.tobytes() for tile in tiles}) > 0.85 * (labels > 0).sum()
    misread = (labels > 0).sum() - (digits_sudoku.BOARDS.tiles(split).number[1:]).sum()
    assert misread == {"train": 0, "test": 3}[split]


def test_a_puzzle_of_nine_digits_is_drawn_and_checked():
    text = (
        "53..7.... 6..195... .98....6. 8...6...3 4..8.3..1 7...2...6 .6....28. ...419..5 ....8..79"
    )
    puzzle = TASK.parse_puzzle(text, 0)
    assert (~puzzle.editable).sum() == 30
    shown = TASK.format_sample(puzzle.image[0], puzzle.label[0])
    assert shown.splitlines()[0].startswith("[5][3]")
    said = "a puzzle must have a solution, got one where row 1 has the digit 1 in r1c1 and r1c2"
    with pytest.raises(ValueError, match=rf"^{said} \(and 1 more\)$"):
        TASK.parse_puzzle("11" + "." * 79, 0)
    with pytest.raises(ValueError, match="9x9 puzzle must be 81 characters"):
        TASK.parse_puzzle("1..4", 0)


def test_what_is_wrong_with_a_board_is_told_by_cell():
    board = TASK.test_batch(0, np.arange(1)).label[0].copy()
    given = board.copy()
    given[3:] = 0

    def explained():
        image, _ = digits_sudoku.BOARDS.render(board, 0)
        return TASK.explain(image, given)

    assert explained() == "no cells conflict; none of the 27 given digits has changed"
    one, two = board[0, 0], board[0, 8]
    board[0, 0] = two
    marked = np.zeros((9, 9), bool)
    marked[:, 0] = board[:, 0] == two
    marked[:3, :3] |= board[:3, :3] == two
    marked[0, 8] = True
    cells = " ".join(sudoku.names(marked))
    want = f"{marked.sum()} cells conflict: {cells}; given digits that changed: r1c1"
    assert explained() == want
    assert cells.startswith("r1c1 r1c9 ")
    assert one != two


def test_other_difficulties_clues_and_shapes_are_refused():
    with pytest.raises(ValueError, match=r"unknown difficulty 'x'; known: \['easy', 'medium', 'h"):
        digits_sudoku.make("x")
    for clues in ((3, 2), (-1, 2), (0, 82)):
        with pytest.raises(ValueError, match="0 <= fewest <= most <= 81, got"):
            digits_sudoku.BOARDS.batch("test", 0, np.arange(1), clues)
    with pytest.raises(ValueError, match=r"\[B, 72, 72, 1\], got \(2, 32, 32, 1\)"):
        TASK.score(np.zeros((2, 32, 32, 1), np.float32))
    with pytest.raises(ValueError, match="9x9 grid of 0"):
        digits_sudoku.BOARDS.render(np.full((9, 9), 10), 0)


def test_every_digit_needs_an_image():
    images, labels = digits.load_digits("test")
    with pytest.raises(ValueError, match=r"every digit in 1\.\.9 needs an image, 7 has none"):
        boards.sort_tiles(images[labels != 7], labels[labels != 7], 9)
