"""The command train: what it writes, says and refuses."""

import contextlib
import json
import re
import signal

import jax
import numpy as np
import pytest
from conftest import TINY, call

import ipr_jax
from ipr_jax import interrupts
from ipr_jax.cli import train
from ipr_jax.interrupts import PreemptionError
from ipr_jax.training import trainer
from ipr_jax.training.recipes import RECIPES


def test_an_interrupted_training_says_how_to_go_on(work, monkeypatch):
    def interrupted(*arguments, preempted, **options):
        yield {"step": 1, "total": 1.0, "seconds_per_step": 1.0}
        assert not preempted(2)
        interrupts.receive(number)
        assert preempted(3)
        raise PreemptionError

    monkeypatch.setattr(trainer, "train", interrupted)
    remains = "started again, it goes on from the last checkpoint in run, if there is one"
    for number, want in (
        (signal.SIGINT, (130, f"interrupted: {remains}\n")),
        (signal.SIGTERM, (143, f"terminated: {remains}\n")),
    ):
        code, _, err = call("train", "mini-sudoku", "--out", "run")
        assert (number, code, err) == (number, *want)


def test_training_writes_a_model(work, monkeypatch):
    recipe = RECIPES["mini-sudoku"]._replace(model=TINY)
    monkeypatch.setitem(RECIPES, "mini-sudoku", recipe)
    words = ("train", "mini-sudoku", "--batch-size", 2, "--log-every", 1)
    words += ("--noise-levels", "independent", "--num-steps")
    with jax.numpy_dtype_promotion("standard"):
        code, out, err = call(*words, 2)
        (run,) = (work / "runs").iterdir()
        other = call(*words, 3, "--out", run)
        again = call(*words, 2)
    assert (code, err) == (0, "")
    written = f"written: runs/{run.name}/model\n"
    assert re.fullmatch(rf"compiling\nstep 2 of 2, loss [\d.]+, .* images/s\n{written}", out)
    assert again == (0, f"compiling\nit was finished before\n{written}", "")
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == [1, 2]
    assert all(np.isfinite(line["total"]) for line in log)
    trained = ipr_jax.load(run / "model")
    assert trained.config == TINY
    assert other[0] == 2
    assert "holds a run of another configuration" in other[2]


def test_training_by_the_clock_tells_how_much_of_it_is_over(work, monkeypatch):
    lines = [
        {"step": step, "total": 1.0, "seconds_per_step": 1.0, "seconds": seconds}
        for step, seconds in ((1, 30.0), (90, 40.0), (91, 90.0))
    ]
    told = []
    update = contextlib.nullcontext(lambda *told_now: told.append(told_now))
    monkeypatch.setattr(train, "progress", lambda doing: update)
    monkeypatch.setattr(train.trainer, "train", lambda *_, **__: iter(lines))
    code, _, err = call("train", "mini-sudoku", "--num-steps", 100, "--minutes", 1)
    assert (code, err) == (0, "")
    shares = [done / total for _, done, total, _ in told]
    np.testing.assert_allclose(shares, [0.5, 0.9, 1.0])
    assert told[0][0] == "step 1, loss 1.0000, 64 images/s"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("nope",), f"no recipe to train 'nope'; known: {', '.join(RECIPES)}"),
        (
            ("counting-stars",),
            f"no recipe to train 'counting-stars'; known: {', '.join(RECIPES)}",
        ),
        (
            ("mini-sudoku", "--num-steps", 0),
            "--num-steps must be a whole number of at least 1, got 0",
        ),
        (
            ("mnist-sudoku-transformer",),
            "the task mnist-sudoku needs --files (a folder with MNIST)",
        ),
        (("mini-sudoku", "--files", "x"), "the task mini-sudoku takes no --files"),
        (
            ("mnist-sudoku-transformer", "--files", "none"),
            "none has no t10k-images-idx3-ubyte or t10k-images.idx3-ubyte, with or without .gz, "
            "itself or in raw or MNIST/raw; there is no folder none; get it from "
            "https://ossci-datasets.s3.amazonaws.com/mnist/",
        ),
        (
            ("mini-sudoku", "--num-workers", -1),
            "--num-workers must be a whole number of at least 0, got -1",
        ),
    ],
)
def test_bad_training_is_one_line_and_writes_nothing(work, words, message):
    assert call("train", *words) == (2, "", f"error: {message}\n")
    assert not list(work.iterdir())
