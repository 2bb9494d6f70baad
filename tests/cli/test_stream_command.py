"""The command stream: what it writes, when samples leave it, and what it refuses."""

import dataclasses
import json
import re

import numpy as np
import pytest
from conftest import SHORT, call
from short_runs import METHOD, samples_of

from ipr_jax.cli.options import get_rule
from ipr_jax.cli.stream import StreamOptions
from ipr_jax.methods import Solved
from ipr_jax.methods.engine import Costs
from ipr_jax.studies import evaluate, experiments, pictures
from ipr_jax.tasks import get_task
from ipr_jax.tasks.mini_sudoku import BOARDS

TASK = get_task("mini-sudoku")


def test_a_stream_gives_what_refinement_gives(finished, tiny_folder, work):
    words = ("stream", "mini-sudoku", "--model", tiny_folder, *SHORT, "--seed", 4, "--slots", 2)
    code, out, err = call(*words, "--out", "run")
    assert (code, err) == (0, "")
    run = work / "run"
    files = ["results.json", "samples.npz", "samples.png"]
    assert sorted(path.name for path in run.iterdir()) == files
    with np.load(run / "samples.npz") as file:
        saved, refined = dict(file), samples_of(finished[0])
    np.testing.assert_allclose(saved["refined"], refined["refined"], atol=2e-5)
    for name in ("editable", "nfe"):
        np.testing.assert_array_equal(saved[name], refined[name])
    np.testing.assert_array_equal(saved["finite"], refined["broke_at"] < 0)
    for name in ("valid", "violations"):
        np.testing.assert_array_equal(saved[name], refined[name][-1])
    np.testing.assert_array_equal(saved["iterations"], [2, 2, 2])
    told = json.loads((run / "results.json").read_text())
    assert told["arguments"].keys() == {field.name for field in dataclasses.fields(StreamOptions)}
    assert told["refinement"] == experiments.describe(METHOD)
    assert (told["provenance"], told["verifier"]) == ({"made": "at random"}, None)
    assert {"versions", "device", "commit"} <= told.keys()
    line = told["metrics"]
    assert line["nfe"] == pytest.approx(saved["nfe"].mean())
    assert (line["samples"], line["iterations"], line["left_early"]) == (3, 2, 0)
    assert 0 < line["wasted"] < 0.5
    for row in ("valid", "iterations", "left early", "evaluations per sample", "samples/s"):
        assert re.search(rf"^ *{row} +[\d.]", out, re.MULTILINE)
    assert re.search(r"^\d+ s, after \d+ s of compilation$", out, re.MULTILINE)
    assert "verifier" not in out
    code, out, err = call(*words, "--out", "run")
    assert (code, out) == (2, "")
    assert err == "error: run exists and is not overwritten\n"


def test_a_stream_that_fails_leaves_nothing(tiny_folder, work, monkeypatch):
    def full(*arguments, **options):
        raise MemoryError

    words = ("stream", "mini-sudoku", "--model", tiny_folder, *SHORT, "--out", "run")
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "evaluate_stream", full)
        assert call(*words)[0] == 2
    assert not list(work.iterdir())
    still(monkeypatch)
    monkeypatch.setattr(pictures, "samples", full)  # when all the rest is written
    assert call(*words)[0] == 2
    assert not list(work.iterdir())


def still(monkeypatch):
    """Streams give back what they are given."""

    def stream(task, model, batch, *arguments, **options):
        number = len(batch.image)
        zeros = np.zeros(number, np.int32)
        scores = {"valid": zeros > 0, "violations": np.zeros(number)}
        progress = evaluate.Progress(
            20, batch.image, None, scores, zeros == 0, Costs(*[zeros] * 3), 1.0, 2.0, 2.0, 2
        )
        return progress, Solved(batch.image, zeros, zeros == 0, *[zeros] * 3, np.int32(10))

    monkeypatch.setattr(evaluate, "evaluate_stream", stream)


def test_a_stream_with_a_verifier_says_so(tiny_folder, work, monkeypatch):
    def still(task, model, batch, experiment, key, *, slots):
        assert (experiment.ratio, slots, experiment.patience) == (0.5, 2, 3)
        valid = np.asarray(task.score(batch.image)["valid"])
        stop = experiment.stop(None, None, batch.image)
        np.testing.assert_array_equal(stop, valid)
        finite, numbers = np.arange(3) != 1, np.array([4, 1, 2], np.int32)
        scores = {"valid": valid & finite, "violations": np.zeros(3)}
        progress = evaluate.Progress(
            20, batch.image, None, scores, finite, Costs(*[numbers] * 3), 1.0, 2.0, 2.0, 2
        )
        return progress, Solved(batch.image, numbers, finite, *[numbers] * 3, np.int32(10))

    notes = []
    monkeypatch.setattr(evaluate, "evaluate_stream", still)
    monkeypatch.setattr(pictures, "samples", lambda *_, note: notes.append(note))
    words = ("--samples", 3, "--slots", 2, "--ratio", 0.5, "--stop", "verified", "--patience", 3)
    code, out, _ = call("stream", "mini-sudoku", "--model", tiny_folder, *words, "--out", "run[v2]")
    assert code == 0
    assert out.endswith("\n\nwritten: run[v2]\n")
    assert "a verifier chose when to stop" in out
    assert notes == ["up to 20 iterations; a verifier chose when to stop"]
    assert "not finite and not counted: 1 samples" in out
    told = json.loads((work / "run[v2]" / "results.json").read_text())
    assert told["verifier"] == "oracle"
    assert told["metrics"]["wasted"] == pytest.approx(0.3)
    assert told["metrics"]["left_early"] == 3


def test_the_rule_unchanged_reads_the_digits():
    rule = get_rule("unchanged", TASK)
    board = TASK.test_batch(0, np.arange(3)).label
    draw = np.stack([BOARDS.render(board[0], seed)[0] for seed in (0, 1)])
    other = BOARDS.render(board[1], 0)[0]
    before, after = np.stack([draw[0]] * 3), np.stack([draw[1], draw[1], other])
    np.testing.assert_array_equal(rule(np.array([1, 0, 1]), before, after), [True, False, False])
    with pytest.raises(ValueError, match="stop must be one of none, verified for the task even-pi"):
        get_rule("unchanged", get_task("even-pixels"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--slots", 0), "--slots must be a whole number of at least 1, got 0"),
        (("--patience", 0), "--patience must be a whole number of at least 1, got 0"),
        (("--samples", 0), "--samples must be a whole number of at least 1, got 0"),
        (("--iterations", 0), "--iterations must be a whole number of at least 1, got 0"),
        (
            ("--stop", "x"),
            "--stop must be one of none, unchanged, verified for the task mini-sudoku, got 'x'",
        ),
    ],
)
def test_a_bad_stream_is_one_line_and_writes_nothing(tiny_folder, work, words, message):
    found = call("stream", "mini-sudoku", "--model", tiny_folder, *words)
    assert found == (2, "", f"error: {message}\n")
    assert not list(work.iterdir())
