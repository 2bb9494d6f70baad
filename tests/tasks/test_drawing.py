"""Boards that a device draws, and digits that it distorts, against those of the host."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from small_run import compile_once

from ipr_jax import TransformerConfig
from ipr_jax.models import checkpoint
from ipr_jax.tasks import boards, digits, drawing, get_task, mini_sudoku, random_boards, sudoku
from ipr_jax.training import trainer

NUMBER = 20_000


def test_small_boards_are_uniform_over_all_of_them():
    every = sudoku.all_boards_4x4()
    drawn = np.asarray(drawing.boards(jnp.asarray(every, jnp.int32), jax.random.key(0), NUMBER))
    _, which = np.unique(
        np.concatenate([every, drawn]).reshape(-1, 16), axis=0, return_inverse=True
    )
    counts = np.bincount(which.ravel()[len(every) :], minlength=len(every))
    assert len(counts) == 288
    assert stats.chisquare(counts).pvalue > 0.01


@pytest.mark.parametrize(("which", "size"), [(0, 96), (287, None)])
def test_a_board_becomes_every_one_that_a_symmetry_makes_of_it(which, size):
    """All 4x4 boards are of two orbits, of 96 and of 192."""
    table = jnp.asarray(sudoku.all_boards_4x4()[which : which + 1], jnp.int32)
    drawn = np.asarray(drawing.boards(table, jax.random.key(1), NUMBER)).reshape(-1, 16)
    _, counts = np.unique(drawn, axis=0, return_counts=True)
    assert len(counts) in (96, 192)
    assert size is None or len(counts) == size
    assert stats.chisquare(counts).pvalue > 0.01


def test_large_boards_are_valid_and_as_the_hosts():
    """The digit of a cell, and whether two rows of a band have the same digits in two boxes."""
    table = random_boards.boards_9x9(0, "train", np.arange(500))
    drawn = np.asarray(drawing.boards(jnp.asarray(table, jnp.int32), jax.random.key(2), 2000))
    assert sudoku.are_valid(drawn).all()
    assert len(np.unique(drawn.reshape(-1, 81), axis=0)) == 2000
    for cell in ((0, 0), (4, 7), (8, 8)):
        counts = np.bincount(drawn[:, *cell], minlength=10)[1:]
        assert stats.chisquare(counts).pvalue > 0.001

    def alike(found):
        one, two = (
            np.sort(found[:, row, columns]) for row, columns in ((0, slice(3)), (1, slice(3, 6)))
        )
        return (one == two).all(axis=1)

    host = alike(random_boards.boards_9x9(1, "test", np.arange(2000)))
    counts = [[each.sum(), len(each) - each.sum()] for each in (host, alike(drawn))]
    assert stats.chi2_contingency(counts).pvalue > 0.001


@functools.cache
def drawn(distortion, most_hidden=1.0):
    draw = mini_sudoku.TASK.drawing(0)
    return jax.jit(lambda: draw(jax.random.key(3), 4000, distortion, most_hidden))()


def test_a_batch_is_as_the_hosts():
    batch = drawn(0.0)
    host = mini_sudoku.TASK.training_batch(0, np.arange(2))
    for one, two in zip(batch, host, strict=True):
        assert one.shape[1:] == two.shape[1:]
        assert np.issubdtype(one.dtype, np.integer) == np.issubdtype(two.dtype, np.integer)
    assert sudoku.are_valid(np.asarray(batch.label)).all()
    hidden = np.asarray(batch.editable).sum(axis=(1, 2))
    assert stats.chisquare(np.bincount(hidden, minlength=17)[1:]).pvalue > 0.01
    by_cell = np.asarray(batch.editable).sum(axis=0).ravel()
    assert stats.chisquare(by_cell).pvalue > 0.01

    images, labels = digits.load_digits("train")
    tiles = np.asarray(batch.image).reshape(-1, 4, 8, 4, 8).swapaxes(2, 3).reshape(-1, 64)
    known = {
        image.tobytes(): label for image, label in zip(images.reshape(-1, 64), labels, strict=True)
    }
    assert [known[tile.tobytes()] for tile in tiles[:3200]] == batch.label.ravel()[:3200].tolist()
    used = len(np.unique(tiles, axis=0))
    assert used == np.isin(labels, range(1, 5)).sum()


def test_the_most_hidden_cells_are_a_share():
    hidden = np.asarray(drawn(0.0, 0.25).editable).sum(axis=(1, 2))
    assert stats.chisquare(np.bincount(hidden, minlength=5)[1:]).pvalue > 0.01
    assert hidden.max() == 4


@pytest.mark.heavy
def test_clues_are_distorted_and_stay_readable():
    plain, moved = drawn(0.0), drawn(1.0)
    np.testing.assert_array_equal(plain.editable, moved.editable)
    one, two = (
        np.asarray(batch.image).reshape(-1, 4, 8, 4, 8).swapaxes(2, 3) for batch in (plain, moved)
    )
    changed = (one != two).any(axis=(3, 4))
    np.testing.assert_array_equal(changed, ~np.asarray(plain.editable))
    assert two.min() >= -1
    assert two.max() <= 1
    read = np.asarray(mini_sudoku.read_board(moved.image))
    assert (read == moved.label)[changed].mean() > 0.97
    ink = [((each[changed] + 1) / 2).sum(axis=(1, 2)) for each in (one, two)]
    assert np.std(ink[1] / ink[0]) > 0.08  # some are thinner, some thicker


def test_digits_that_are_not_distorted_stay_as_they_are():
    images = jnp.asarray(digits.load_digits("train")[0][:20])
    same = drawing.distort(jax.random.key(0), images, jnp.float32(0))
    np.testing.assert_allclose(same, images, atol=1e-6)


@pytest.mark.heavy
def test_a_run_with_drawn_boards_continues_bit_for_bit(tmp_path, monkeypatch):
    monkeypatch.setattr(boards, "TABLE_SIZE", 32)
    model = TransformerConfig(
        image_size=(32, 32), channels=1, patch_size=8, width=8, num_layers=1, hidden_width=8
    )
    config = trainer.TrainConfig(
        num_steps=4,
        batch_size=4,
        warmup_steps=0,
        optimizer="muon",
        noise_levels="sequential",
        per_image=True,
        data="device",
        distortion=0.5,
        curriculum=3,
        log_every=1,
        save_every=2,
    )
    compile_once(monkeypatch)
    with jax.numpy_dtype_promotion("standard"):
        whole = list(trainer.train(mini_sudoku.TASK, model, config, tmp_path / "whole"))
        part = trainer.train(mini_sudoku.TASK, model, config, tmp_path / "parts")
        for _ in range(3):
            next(part)
        part.close()
        rest = list(trainer.train(mini_sudoku.TASK, model, config, tmp_path / "parts"))
    assert [line["step"] for line in rest] == [3, 4]
    assert [line["total"] for line in rest] == [line["total"] for line in whole[2:]]
    one, two = (checkpoint.load(tmp_path / name / "model") for name in ("whole", "parts"))
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_tasks_that_a_device_can_draw():
    assert [get_task(name).drawing is not None for name in ("mini-sudoku", "digits-sudoku")] == [
        True
    ] * 2
    assert get_task("even-pixels").drawing is None
