"""Sudoku rules against recorded scores and a slow oracle; digits, mini-sudoku; JAX's settings."""

import contextlib
import functools
import subprocess
import sys
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from ipr_jax.models.networks import build
from ipr_jax.tasks import boards as board_images
from ipr_jax.tasks import (
    counting_polygons,
    digits,
    get_task,
    mini_sudoku,
    polygon_classifier,
    sudoku,
)
from ipr_jax.tasks.counting_polygons import STARS
from ipr_jax.tasks.mnist_classifier import MNISTConfig, load_classifier, read_digits
from ipr_jax.tasks.polygon_classifier import PolygonConfig, read_counts
from ipr_jax.training import digit_reader

GOLDEN = Path(__file__).parents[1] / "golden" / "evaluations.npz"
PUZZLE = "1..4 .... .3.. ...."

read_digits_of = jax.jit(digits.read_digits, static_argnums=1)


@jax.jit
def judged(grid):
    """All that the rules say of boards."""
    return sudoku.duplicate_count(grid), sudoku.is_valid(grid), sudoku.violating_cells(grid)


@jax.jit
def seen(image):
    """All that is seen in images of mini-sudoku."""
    return mini_sudoku.read_board(image), mini_sudoku.violating(image), mini_sudoku.score(image)


# --- boards -----------------------------------------------------------------------------------


def slow_units(grid):
    """Every row, column and box of one board as a list of digits, by the rules of the game."""
    n = len(grid)
    box = round(n**0.5)
    for k in range(n):
        yield [grid[k][j] for j in range(n)]
        yield [grid[i][k] for i in range(n)]
        top, left = k // box * box, k % box * box
        yield [grid[top + i][left + j] for i in range(box) for j in range(box)]


def slow_duplicate_count(grid):
    total = 0
    for unit in slow_units(grid):
        seen = Counter(unit)
        total += sum(abs(seen[digit] - 1) for digit in range(1, len(grid) + 1))
    return total


def slow_violating_cells(grid):
    n = len(grid)
    box = round(n**0.5)

    def clash(a, b, i, j):
        together = a == i or b == j or (a // box == i // box and b // box == j // box)
        return (a, b) != (i, j) and together and grid[a][b] == grid[i][j] != 0

    cells = [(i, j) for i in range(n) for j in range(n)]
    marks = [any(clash(a, b, i, j) for i, j in cells) for a, b in cells]
    return np.array(marks).reshape(n, n)


def boards(n, smallest=0):
    return arrays(np.int8, (n, n), elements=st.integers(smallest, n))


def test_scores_equal_the_published_ones():
    golden = np.load(GOLDEN)
    grids = golden["sudoku_grids"].astype(np.int32)
    count, valid, _ = judged(grids)
    np.testing.assert_array_equal(count, golden["sudoku_duplicate_count"])
    np.testing.assert_array_equal(valid, golden["sudoku_is_valid"])
    assert golden["sudoku_is_valid"].any()
    assert not golden["sudoku_is_valid"].all()


@settings(max_examples=40, deadline=None)
@given(st.one_of(boards(1), boards(4), boards(9, smallest=1)))
def test_scores_equal_a_slow_count(grid):
    count, valid, marks = jax.device_get(judged(grid))
    assert (count.dtype, count.shape) == (jnp.int32, ())
    assert count == slow_duplicate_count(grid.tolist())
    assert valid == (slow_duplicate_count(grid.tolist()) == 0)
    np.testing.assert_array_equal(marks, slow_violating_cells(grid.tolist()))


def test_scores_batch_over_any_leading_axes():
    grids = np.random.default_rng(0).integers(1, 5, (2, 3, 4, 4))
    counts, _, marks = jax.device_get(judged(grids))
    for i, j in np.ndindex(2, 3):
        assert counts[i, j] == slow_duplicate_count(grids[i, j].tolist())
        np.testing.assert_array_equal(marks[i, j], slow_violating_cells(grids[i, j].tolist()))


@pytest.mark.parametrize("shape", [(4,), (4, 9), (5, 5), (0, 0)])
def test_scores_refuse_other_shapes(shape):
    with pytest.raises(ValueError, match="board"):
        sudoku.duplicate_count(np.ones(shape, np.int32))


def test_all_288_boards_are_valid_and_distinct():
    all_boards = sudoku.all_boards_4x4()
    assert (all_boards.shape, all_boards.dtype) == ((288, 4, 4), np.int8)
    assert len({board.tobytes() for board in all_boards}) == 288
    assert all(slow_duplicate_count(board.tolist()) == 0 for board in all_boards)
    assert not all_boards.flags.writeable


# --- puzzles ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        PUZZLE,
        "1..4.....3......",
        "1004\n0000\n0300\n0000\n",
        " 1__4 ____ _3__ ____ ",
        "1 * * 4\r\n* * * *\r\n\r\n* 3 * *\r\n* * * *",
    ],
)
def test_parse_reads_every_spelling(text):
    expected = [[1, 0, 0, 4], [0, 0, 0, 0], [0, 3, 0, 0], [0, 0, 0, 0]]
    puzzle = sudoku.parse_puzzle(text)
    assert puzzle.dtype == np.int8
    np.testing.assert_array_equal(puzzle, expected)


def test_parse_reads_9x9():
    puzzle = sudoku.parse_puzzle("9" + "." * 79 + "1", n=9)
    assert (puzzle.shape, puzzle[0, 0], puzzle[8, 8], puzzle.sum()) == ((9, 9), 9, 1, 10)


@pytest.mark.parametrize(
    ("text", "got"),
    [("", "got 0 in"), ("1..4", "got 4 in"), ("." * 17, "got 17 in"),
     ("5" + "." * 15, "got '5' in row 1, column 1"),
     (".... ..x. .... ....", "got 'x' in row 2, column 3"),
     ("²" + "." * 15, "got '²'"),
     ("1..4 .... .3. ....", "got 15 (3 in row 3) in"),
     ("1 . . 4\n. . . .\n. 3 . . .\n. . .", "got 16 (5 in row 3, 3 in row 4) in")],
)  # fmt: skip
def test_parse_names_rule_value_and_example(text, got):
    with pytest.raises(ValueError, match="4x4 puzzle must be 16 characters") as error:
        sudoku.parse_puzzle(text)
    assert got in str(error.value)
    assert repr(text) in str(error.value)
    assert PUZZLE in str(error.value)
    with pytest.raises(ValueError, match="side 4 or 9, got 5"):
        sudoku.parse_puzzle("." * 25, n=5)


def test_examples_in_messages_are_valid():
    for n in (4, 9):
        with pytest.raises(ValueError, match="valid: ") as error:
            sudoku.parse_puzzle("", n)
        sudoku.parse_puzzle(str(error.value).split("valid: ")[1].strip("'"), n)


BOX, UNITS = "box 1 has the digit 2 in r1c2 and r2c2", ("row", "box")


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        (PUZZLE, []),
        ("1..1 .... .... ....", ["row 1 has the digit 1 in r1c1 and r1c4"]),
        (".2.. .2.. .2.. ....", ["column 2 has the digit 2 in r1c2 and r2c2 and r3c2", BOX]),
        (".... .... ..3. ...3", ["box 4 has the digit 3 in r3c3 and r4c4"]),
        ("11.. .... .... ....", [f"{u} 1 has the digit 1 in r1c1 and r1c2" for u in UNITS]),
        ("123. ...4 .... ....", ["no valid board has all the given digits"]),
    ],
)
def test_contradictions_say_what_is_wrong(text, sentences):
    assert sudoku.contradictions(sudoku.parse_puzzle(text)) == sentences


def test_num_solutions_counts_completions():
    assert sudoku.num_solutions(np.zeros((4, 4), int)) == 288
    assert sudoku.num_solutions(sudoku.parse_puzzle("1... .... .... ....")) == 72
    assert sudoku.num_solutions(sudoku.parse_puzzle("11.. .... .... ....")) == 0
    assert all(sudoku.num_solutions(board) == 1 for board in sudoku.all_boards_4x4())
    with pytest.raises(ValueError, match=r"4x4 puzzles only, got shape \(9, 9\)"):
        sudoku.num_solutions(np.zeros((9, 9), int))


def test_format_board_marks_the_given_cells():
    puzzle = sudoku.parse_puzzle(PUZZLE)
    text = sudoku.format_board(puzzle, puzzle)
    assert text == "\n".join(
        ["[1] . | . [4]", " .  . | .  . ", "------+------", " . [3]| .  . ", " .  . | .  . "]
    )
    plain = sudoku.format_board(sudoku.all_boards_4x4()[0])
    assert sum(character.isdigit() for character in plain) == 16
    assert len(sudoku.format_board(np.ones((9, 9), int)).splitlines()) == 11
    with pytest.raises(ValueError, match="puzzle must have the grid's shape"):
        sudoku.format_board(puzzle, np.zeros((9, 9), int))


# --- digits -----------------------------------------------------------------------------------


def test_splits_are_apart_in_position_and_content():
    (train, train_labels), (test, test_labels) = map(digits.load_digits, ("train", "test"))
    assert (len(train), len(test)) == (digits.FIRST_TEST_IMAGE, 382)
    for images, labels in ((train, train_labels), (test, test_labels)):
        assert (images.dtype, labels.dtype) == (np.float32, np.int32)
        assert (images.min(), images.max()) == (-1, 1)
        assert not images.flags.writeable
        assert not labels.flags.writeable
    everything = np.concatenate([train, test]).reshape(-1, 64)
    from sklearn.datasets import load_digits

    np.testing.assert_array_equal((everything + 1) * 8, load_digits().data)
    assert not {image.tobytes() for image in train} & {image.tobytes() for image in test}
    with pytest.raises(ValueError, match="'train' or 'test', got 'all'"):
        digits.load_digits("all")  # type: ignore[arg-type]


def test_splits_part_between_copies_of_the_form():
    labels = np.concatenate([digits.load_digits(split)[1] for split in ("train", "test")])
    text = "".join(map(str, labels))
    counting = [k for k in range(len(text)) if text.startswith("0123456789", k)]
    starts = [k for k in counting if not any(k - 60 < other < k for other in counting)]
    assert len(starts) == 14
    assert starts[-3] == digits.FIRST_TEST_IMAGE


@pytest.mark.parametrize(("num_digits", "bound"), [(9, 0.985), (4, 0.99)])
def test_reader_knows_unseen_writers(num_digits, bound):
    images, labels = digits.load_digits("test")
    shown = (labels >= 1) & (labels <= num_digits)
    read = read_digits_of(images[shown], num_digits)
    assert (np.asarray(read) == labels[shown]).mean() > bound


def test_read_digits_jits_and_keeps_leading_axes():
    images, _ = digits.load_digits("test")
    tiles = jnp.asarray(images[:24]).reshape(2, 3, 4, 8, 8)
    eager = digits.read_digits(tiles, 4)
    jitted = read_digits_of(tiles, 4)
    assert (jitted.shape, jitted.dtype) == ((2, 3, 4), jnp.int32)
    assert set(np.ravel(jitted)) <= {1, 2, 3, 4}
    np.testing.assert_array_equal(eager, jitted)
    assert read_digits_of(images[0].astype(jnp.bfloat16)).shape == ()
    assert read_digits_of(np.asarray(tiles)[:0]).shape == (0, 3, 4)
    assert seen(np.zeros((0, 32, 32, 1), np.float32))[2]["valid"].shape == (0,)


def test_read_digits_refuses_other_inputs():
    with pytest.raises(ValueError, match=r"\[..., 8, 8\], got \(2, 8, 9\)"):
        digits.read_digits(jnp.zeros((2, 8, 9)))
    with pytest.raises(ValueError, match=r"1\.\.9, got 10"):
        digits.read_digits(jnp.zeros((8, 8)), 10)


@pytest.mark.parametrize("load", [digits.load_reader, load_classifier])
def test_a_network_that_is_changed_changes_no_other(load):
    changed, want = load(), np.array(load().conv1.kernel)
    changed.conv1.kernel[...] = 0 * want
    np.testing.assert_array_equal(load().conv1.kernel, want)


def test_reader_trains():
    images, labels = digits.load_digits("train")
    with jax.numpy_dtype_promotion("standard"):
        reader = digit_reader.train_reader(images[1:10], labels[1:10], num_steps=30)
    read = np.asarray(jax.jit(reader)(images[1:10, ..., None])).argmax(axis=-1) + 1
    assert (read == labels[1:10]).mean() > 0.5


def test_weights_are_never_overwritten():
    for words in ((), ("second",), ("mnist", "folder")):
        with pytest.raises(FileExistsError, match="exists and is not overwritten"):
            digit_reader.main(*words)
    for words, message in (
        (("third",), "which must be one of first, second, mnist, got 'third'"),
        (("mnist",), "mnist needs a folder and the others take none, got None"),
        (("first", "x"), "mnist needs a folder and the others take none, got 'x'"),
    ):
        with pytest.raises(ValueError, match=message):
            digit_reader.main(*words)


# --- mini-sudoku ------------------------------------------------------------------------------


def test_batch_shapes_and_law_of_the_clues():
    image, editable, board = mini_sudoku.batch("train", 0, np.arange(3000))
    assert (image.shape, image.dtype) == ((3000, 32, 32, 1), np.float32)
    assert (editable.shape, editable.dtype) == ((3000, 4, 4), bool)
    assert (board.shape, board.dtype) == ((3000, 4, 4), np.int8)
    clues = (~editable).sum(axis=(1, 2))
    np.testing.assert_allclose(np.bincount(clues) / 3000, 1 / 6, atol=0.03)
    np.testing.assert_allclose((~editable).mean(axis=0), 2.5 / 16, atol=0.03)
    drawn = Counter(row.tobytes() for row in board)
    assert len(drawn) == 288
    expected = 3000 / 288
    assert sum((n - expected) ** 2 / expected for n in drawn.values()) < 287 + 5 * (2 * 287) ** 0.5


def test_batch_rows_depend_on_seed_and_index_alone():
    whole = mini_sudoku.batch("test", 3, np.arange(8))
    part = mini_sudoku.batch("test", 3, np.array([5, 2, 5]))
    for all_rows, rows in zip(whole, part, strict=True):
        np.testing.assert_array_equal(all_rows[[5, 2, 5]], rows)
    assert len({image.tobytes() for image in whole.image}) == 8
    for other in (mini_sudoku.batch("test", 4, np.arange(8)),
                  mini_sudoku.batch("train", 3, np.arange(8))):  # fmt: skip
        assert (other.label != whole.label).any()
    assert mini_sudoku.batch("test", 3, np.zeros(0, int)).image.shape == (0, 32, 32, 1)


@pytest.mark.parametrize("split", ["train", "test"])
def test_batch_shows_digits_of_its_split_alone(split):
    images, labels = digits.load_digits(split)
    known = {image.tobytes(): label for image, label in zip(images, labels, strict=True)}
    image, _, board = mini_sudoku.batch(split, 0, np.arange(300))
    tiles = image.reshape(-1, 4, 8, 4, 8).swapaxes(2, 3).reshape(-1, 8, 8)
    assert [known[tile.tobytes()] for tile in tiles] == board.reshape(-1).tolist()
    shown = {tile.tobytes() for tile in tiles}
    assert len(shown) > 0.99 * ((labels >= 1) & (labels <= 4)).sum()


@pytest.mark.parametrize("num_clues", [(0, 0), (7, 7), (16, 16)])
def test_batch_gives_exactly_the_clues_asked_for(num_clues):
    editable = mini_sudoku.batch("train", 0, np.arange(20), num_clues).editable
    assert ((~editable).sum(axis=(1, 2)) == num_clues[0]).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("all", 0, [0]), "'train' or 'test', got 'all'"),
        (("test", -1, [0]), "seed must be >= 0 .* got -1"),
        (("test", 0, [-1]), "indices a flat list of numbers >= 0"),
        (("test", 0, 3), "indices a flat list of numbers >= 0"),
        (("test", 0, [0], (3, 2)), r"fewest <= most <= 16, got \(3, 2\)"),
        (("test", 0, [0], (0, 17)), r"fewest <= most <= 16, got \(0, 17\)"),
    ],
)
def test_batch_refuses_other_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        mini_sudoku.batch(*arguments)


def test_real_boards_are_read_and_scored_right():
    image, _, board = mini_sudoku.batch("test", 0, np.arange(200))
    read, _, scores = seen(image)
    assert (read.shape, read.dtype) == ((200, 4, 4), jnp.int32)
    assert (np.asarray(read) == board).mean() > 0.99
    scores = jax.device_get(scores)
    np.testing.assert_array_equal(scores["valid"], scores["violations"] == 0)
    np.testing.assert_array_equal(scores["violations"], judged(read)[0])
    assert scores["valid"].mean() > 0.9
    with pytest.raises(ValueError, match=r"\[B, 32, 32, 1\], got \(32, 32, 1\)"):
        mini_sudoku.score(jnp.asarray(image[0]))


def test_a_wrong_cell_is_marked():
    image, _, board = mini_sudoku.batch("test", 0, np.arange(1))
    row = board[0, 0]
    image[0, 0:8, 0:8] = image[0, 0:8, 8:16]
    read, violating, scores = jax.device_get(seen(image))
    np.testing.assert_array_equal(read[0, 0], row[[1, 1, 2, 3]])
    np.testing.assert_array_equal(violating[0, 0], [True, True, False, False])
    assert scores["violations"][0] == 6
    assert not scores["valid"][0]


def test_render_draws_the_puzzle():
    puzzle = sudoku.parse_puzzle(PUZZLE)
    image, editable = mini_sudoku.render(puzzle, seed=7)
    assert (image.shape, image.dtype) == ((32, 32, 1), np.float32)
    np.testing.assert_array_equal(editable, puzzle == 0)
    read = np.asarray(seen(image[None])[0])[0]
    np.testing.assert_array_equal(np.where(editable, 0, read), puzzle)
    tiles = image.reshape(4, 8, 4, 8).swapaxes(1, 2)
    assert (tiles[editable] == -1).all()
    np.testing.assert_array_equal(mini_sudoku.render(puzzle, 7)[0], image)
    assert (mini_sudoku.render(puzzle, 8)[0] != image).any()
    for wrong in (np.full((4, 4), 5), np.zeros((4, 5), int)):
        with pytest.raises(ValueError, match="4x4 grid of 0"):
            mini_sudoku.render(wrong, 0)


# --- JAX's settings ---------------------------------------------------------------------------


def noisy(task):
    """Images of a task with noise, as a user may have them: float64."""
    image = get_task(task).test_batch(0, np.arange(2)).image
    return image + 0.3 * np.random.default_rng(0).standard_normal(image.shape)


def found_in(task):
    """All that a task finds in images."""
    made = get_task(task)
    functions = [made.score, *filter(None, (made.read, made.violating))]
    return jax.jit(lambda images: [function(images) for function in functions])(noisy(task))


@functools.cache
def network(config):
    return nnx.jit(lambda: build(config))()


def found_by_polygons():
    classifier = network(PolygonConfig())

    def find(images):
        task = counting_polygons.make(
            "polygons", lambda images: read_counts(classifier(images), PolygonConfig())
        )
        return classifier(images), task.score(images), task.read(images)

    return jax.jit(find)(noisy("even-pixels").repeat(4, axis=1).repeat(4, axis=2))


def found_by_mnist():
    classifier = network(MNISTConfig())
    logits = jax.jit(classifier)(noisy("mini-sudoku")[:, 4:, 4:])
    return logits, read_digits(logits)


def legible():
    return board_images.legible(
        *digits.load_digits("test"), lambda x: digits.read_digits(x[..., 0])
    )


FUNCTIONS = {
    **{f"{task} scores": functools.partial(found_in, task)
       for task in ("mini-sudoku", "even-pixels")},
    **{f"{task} data": functools.partial(get_task(task).training_batch, 0, np.arange(2))
       for task in ("mini-sudoku", "digits-sudoku", "even-pixels")},
    "corrupted": lambda: get_task("digits-sudoku").corrupted(3).test_batch(0, np.arange(2)),
    "puzzle": lambda: get_task("mini-sudoku").parse_puzzle(PUZZLE, 0),
    "counting-stars data": lambda: counting_polygons.batch(STARS, "train", 0, np.arange(1)),
    "polygons": found_by_polygons,
    "mnist": found_by_mnist,
    "legible": legible,
}  # fmt: skip


@contextlib.contextmanager
def strict():
    with jax.enable_x64(True), jax.debug_nans(True):
        yield


@pytest.mark.parametrize("name", FUNCTIONS)
def test_results_and_dtypes_are_the_same_whatever_jax_is_told(name, monkeypatch):
    """Like everything here, with strict promotion of ranks and dtypes."""
    monkeypatch.setattr(polygon_classifier, "BLOCKS", (1,))  # a quick network of the same kind
    expected = jax.device_get(FUNCTIONS[name]())
    for setting in (strict, jax.disable_jit):
        with setting():
            found = jax.device_get(FUNCTIONS[name]())
        for one, other in zip(*map(jax.tree.leaves, (expected, found)), strict=True):
            assert (one.dtype, one.shape) == (other.dtype, other.shape)
            np.testing.assert_allclose(one, other, rtol=0, atol=2e-6)


def test_import_is_light():
    code = (
        "import sys, ipr_jax.tasks.counting_polygons, ipr_jax.tasks.even_pixels; "
        "heavy = {'sklearn', 'matplotlib', 'torch'}; "
        "assert not {'scipy', *heavy} & set(sys.modules); "
        "import ipr_jax.tasks.mini_sudoku; "
        "assert not heavy & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
