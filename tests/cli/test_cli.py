"""The command line: what it writes, says and refuses."""

import contextlib
import dataclasses
import importlib.metadata
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import warnings
from typing import NamedTuple

import jax
import numpy as np
import pytest
from conftest import IPR, TINY, call
from flax import nnx
from PIL import Image

import ipr_jax
from ipr_jax import __main__, interrupts
from ipr_jax.cli import experiment, refine, stream, train
from ipr_jax.cli.evaluate import EvaluateOptions
from ipr_jax.cli.experiment import ExperimentOptions
from ipr_jax.cli.options import Opened, TaskOptions, get_rule, same_folder
from ipr_jax.cli.refine import RefineOptions
from ipr_jax.cli.stream import StreamOptions
from ipr_jax.cli.terminal import one_line_errors
from ipr_jax.interrupts import PreemptionError
from ipr_jax.methods import Solved
from ipr_jax.methods.engine import Costs
from ipr_jax.models import checkpoint
from ipr_jax.models.config import PRESETS
from ipr_jax.models.networks import build, open_network
from ipr_jax.studies import evaluate, experiments, pictures, shards
from ipr_jax.tasks import TASKS, get_task
from ipr_jax.tasks.mini_sudoku import BOARDS
from ipr_jax.tasks.mnist_classifier import MNISTConfig
from ipr_jax.training import trainer
from ipr_jax.training.recipes import RECIPES
from ipr_jax.training.trainer import TrainConfig

TASK = get_task("mini-sudoku")
FILES = ["config.json", "manifest.json", "metrics.jsonl"]
PICTURES = ["refinement.gif", "refinement.png", "report.html", "samples.png"]
HOSTS = {"distributed", "coordinator", "num_processes", "process_id"}
FEW = ("--first-steps-per-patch", 1, "--steps-per-patch", 1)
SHORT = ("--samples", 3, "--iterations", 2, *FEW)
PAPER = ipr_jax.Refinement(iterations=2)
METHOD = dataclasses.replace(
    PAPER,
    first=dataclasses.replace(PAPER.first, steps_per_patch=1),
    later=dataclasses.replace(PAPER.later, steps_per_patch=1),
)
"""What ``SHORT`` says."""


def lines_of(folder):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    text = (folder / "metrics.jsonl").read_text()
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def samples_of(folder):
    [found] = shards.read(folder)
    return found


def save_random(folder, config):
    abstract = nnx.state(nnx.eval_shape(lambda: build(config)))
    params = jax.tree.map(lambda leaf: np.full(leaf.shape, 0.1, np.float32), abstract)
    checkpoint.save(folder, config, params, {"made": "of tenths"})
    return folder


@pytest.fixture
def work(tmp_path, monkeypatch):
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def finished(tiny_folder, tmp_path_factory):
    """A finished run: its folder and what the command said."""
    folder = tmp_path_factory.mktemp("runs") / "new" / "run :smile:"
    words = ("--seed", 4, "--dtype", "float32", "--out", folder)
    return folder, call("refine", *IPR, "--model", tiny_folder, *SHORT, *words)


# --- refine ---------------------------------------------------------------------------------------


def test_it_writes_its_files_and_says_where(finished):
    folder, (code, out, err) = finished
    assert (code, err) == (0, "")
    assert names_in(folder) == sorted([*FILES, *PICTURES, "samples"])
    assert names_in(folder / "samples") == ["00000.json", "00000.npz"]
    rows = [line.split()[0] for line in out.splitlines() if line.strip()]
    assert rows[:6] == ["samples:", "compiling", "iteration", "first", "1", "2"]
    assert out.startswith("samples: 3 of mini-sudoku; method: ipr; model: ")
    assert re.search(r"^\d+ s, after \d+ s of compilation$", out, re.MULTILINE)
    assert out.endswith(f"\n\nwritten: {folder}\n")
    for name in ("refinement.png", "samples.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    assert (folder / "report.html").read_text().startswith("<!doctype html>")
    with Image.open(folder / "refinement.gif") as image:
        assert (image.format, image.n_frames) == ("GIF", 3)


def test_the_samples_are_those_of_the_library(finished, tiny_model):
    folder, _ = finished
    saved = samples_of(folder)
    batch = TASK.test_batch(4, np.arange(3))
    run = evaluate.evaluate(TASK, tiny_model, batch, METHOD, jax.random.key(4))
    first, *_, last = history = list(run)
    assert set(saved) == {
        *("first_pass", "refined", "followed", "editable"),
        *("valid", "violations", "broke_at", "nfe", "nbe", "nve"),
    }
    np.testing.assert_array_equal(saved["first_pass"], first.image)
    np.testing.assert_array_equal(saved["refined"], last.image)
    np.testing.assert_array_equal(saved["followed"], [each.image for each in history])
    np.testing.assert_array_equal(saved["editable"], batch.editable)
    for name in ("valid", "violations"):
        np.testing.assert_array_equal(saved[name], [each.scores[name] for each in history])
    np.testing.assert_array_equal(saved["broke_at"], [-1] * 3)
    np.testing.assert_array_equal(saved["nfe"], last.costs.nfe)
    clue = ~np.kron(batch.editable, np.ones((1, 8, 8), bool))
    assert clue.any()
    for name in ("first_pass", "refined"):
        np.testing.assert_array_equal(saved[name][clue], batch.image[clue])


def test_the_metrics_are_one_line_per_iteration(finished):
    folder, _ = finished
    lines = lines_of(folder)
    assert [line["iteration"] for line in lines] == [0, 1, 2]
    saved = samples_of(folder)
    for number, line in enumerate(lines):
        assert (line["samples"], line["not_finite"]) == (3, 0)
        assert line["valid_rate"] == pytest.approx(saved["valid"][number].mean())
        assert line["violations"] == pytest.approx(saved["violations"][number].mean())
    assert lines[-1]["nfe"] == pytest.approx(saved["nfe"].mean())


def test_the_configuration_tells_how_it_was_made(finished, tiny_folder):
    folder, _ = finished
    told = json.loads((folder / "config.json").read_text())
    fields = {field.name for field in dataclasses.fields(RefineOptions)}
    assert set(told["arguments"]) == fields - HOSTS - {"out", "save_minutes"}
    assert told["arguments"] | {"seed": 4, "model": str(tiny_folder)} == told["arguments"]
    assert told["model"]["widths"] == [8]
    assert told["provenance"] == {"made": "at random"}
    assert told["versions"]["jax"] == jax.__version__
    assert told["versions"]["ipr_jax"] == importlib.metadata.version("ipr_jax")
    assert told["device"].startswith(f"{jax.local_device_count()} x ")


def test_the_report_is_made_again(finished, work):
    """With the same bits, from what the folder tells."""
    page = (finished[0] / "report.html").read_bytes()
    shutil.copytree(finished[0], work / "copy")
    (work / "copy" / "report.html").unlink()
    assert call("report", "copy") == (0, "written: copy/report.html\n", "")
    assert (work / "copy" / "report.html").read_bytes() == page
    (work / "copy" / "manifest.json").unlink()
    refused = "error: copy holds no finished run: no manifest.json\n"
    assert call("report", "copy") == (2, "", refused)
    (work / "copy" / "config.json").write_text("{}")
    code, _, err = call("report", "copy")
    assert code == 2
    assert err.startswith("error: copy was not written by ipr-jax refine; for a run of shards.ref")
    code, _, err = call("report", "nowhere")
    assert (code, err) == (2, "error: no config.json in nowhere: there is no folder nowhere\n")


def test_the_seed_decides_everything(finished, tiny_folder, work):
    folder, _ = finished
    for seed in (4, 5):
        words = ("--seed", seed, "--dtype", "float32", "--out", work / str(seed))
        call("refine", *IPR, "--model", tiny_folder, *SHORT, *words)
    for name, want in samples_of(folder).items():
        np.testing.assert_array_equal(samples_of(work / "4")[name], want)
    for name in ("first_pass", "refined", "editable"):
        assert (samples_of(work / "5")[name] != samples_of(folder)[name]).any()


def test_an_own_puzzle_is_printed_before_and_after(tiny_folder, work):
    """Also: what became of it is said at the end; the default folder is a new one."""
    puzzle = "1..4 .... .3.. ...3"
    code, out, err = call(
        "refine",
        *IPR,
        "--model",
        tiny_folder,
        "--puzzle",
        puzzle,
        "--samples",
        3,
        "--iterations",
        1,
        *FEW,
    )
    assert (code, err) == (0, "")
    assert "\n0 of 3 tries are valid\n" in out
    (folder,) = (work / "results").iterdir()
    assert folder.name.startswith("mini-sudoku-")
    assert names_in(folder) == sorted([*FILES, *PICTURES, "samples"])
    saved = samples_of(folder)
    given = np.array([1, 0, 0, 4, 0, 0, 0, 0, 0, 3, 0, 0, 0, 0, 0, 3]).reshape(4, 4)
    np.testing.assert_array_equal(saved["editable"], [given == 0] * 3)
    assert (saved["refined"][0] != saved["refined"][1]).any()
    printed = out.splitlines()
    for title, name in (("first pass (", "first_pass"), ("refined (", "refined")):
        (at,) = [i for i, line in enumerate(printed) if line.startswith(title)]
        assert "not valid), given cells in brackets" in printed[at]
        board = "\n".join(printed[at + 1 : at + 6])
        assert board == TASK.format_sample(shards.to_float(saved[name][0]), given)
        assert [board.count(text) for text in "[]"] == [4, 4]
    explained = TASK.explain(shards.to_float(saved["refined"][0]), given)
    assert "cells conflict: r" in explained
    assert explained.endswith("; none of the 4 given digits has changed")
    assert out.split("\n\n")[-2:] == [
        f"The board is not valid after 1 iterations; {explained}.",
        f"written: {folder.relative_to(work)}\n",
    ]


class Work(NamedTuple):
    """All of a state that is looked at."""

    image: np.ndarray
    costs: Costs


def test_an_own_puzzle_is_one_sample_and_its_metrics_are_json(tiny_folder, work, monkeypatch):
    def still(task, model, batch, *arguments, **options):
        zeros = np.zeros(len(batch.image), np.int64)
        scores = {"valid": zeros > 0, "violations": zeros}
        costs = Costs(zeros, zeros, zeros)
        state = Work(batch.image, costs)
        yield evaluate.Progress(0, batch.image, state, scores, zeros == 0, costs, 1, 1, 1, 1)

    monkeypatch.setattr(shards, "evaluate", still)
    words = ("--puzzle", "." * 16, "--iterations", 0, "--out", "run")
    code, out, _ = call("refine", *IPR, "--model", tiny_folder, *words)
    assert code == 0
    assert "tries" not in out
    (line,) = lines_of(work / "run")
    assert line["samples"] == 1


def test_annealed_refinement_of_a_puzzle_names_the_cells_that_are_doubted(tiny_folder, work):
    """Of 16 cells, so that the task need not be said."""
    words = ("--puzzle", "1..4 .... .3.. ....", "--iterations", 2, "--cycles", 2, "--out", "run")
    code, out, err = call("refine", "--model", tiny_folder, *words)
    assert (code, err) == (0, "")
    assert "first guess (" in out
    assert "first pass" not in out
    (found,) = ipr_jax.shards.read(work / "run")
    given = np.array([[1, 0, 0, 4], [0] * 4, [0, 3, 0, 0], [0] * 4])
    doubt = np.where(given == 0, found["doubt"][0], 0)
    worst = np.argsort(-doubt, axis=None)[:3]
    cells = " ".join(f"r{i // 4 + 1}c{i % 4 + 1}" for i in sorted(worst.tolist()))
    assert out.split("the network doubts ")[1].startswith(f"{cells}.")


def test_of_several_tries_at_a_puzzle_a_valid_one_is_printed(tiny_folder, work, monkeypatch):
    """The fourth of five, in the second file; none of the others is."""
    solved = TASK.corrupted(1).test_batch(0, np.arange(1)).label[0]
    board, _ = BOARDS.render(solved, 0)

    def told(task, model, batch, *arguments, first, **options):
        places = np.arange(first, first + len(batch.image))
        nfe, valid = np.zeros(len(places), np.int64), places == 3
        image = np.where(valid[:, None, None, None], board, batch.image)
        for number in range(2):
            scores = {"valid": valid & (number > 0), "violations": nfe}
            costs = Costs(nfe, nfe, nfe)
            state = Work(image, costs)
            yield evaluate.Progress(number, image, state, scores, nfe == 0, costs, 1, 1, 1, 64)

    monkeypatch.setattr(shards, "evaluate", told)
    words = ("--puzzle", "." * 16, "--samples", 5, "--shard-size", 2, "--iterations", 1)
    code, out, _ = call("refine", *IPR, "--model", tiny_folder, *words)
    assert code == 0
    said = "1 of 5 tries are valid; one of them is shown, chosen by the rules, a verifier"
    printed = out.splitlines()
    assert said in printed
    for title in ("first pass (not valid)", "refined (valid)"):
        at = printed.index(f"{title}, given cells in brackets")
        want = TASK.format_sample(board, np.zeros((4, 4), int))
        assert "\n".join(printed[at + 1 : at + 6]) == want
    told = (
        "The board is valid from iteration 1 on; no cells conflict; none of the 0 given digits has"
    )
    assert f"{told} changed." in printed


def test_an_existing_folder_is_left_alone(tiny_folder, work):
    (work / "old").mkdir()
    (work / "old" / "kept").write_text("as it was")
    code, out, err = call("refine", *IPR, "--model", tiny_folder, *SHORT, "--out", "old")
    assert (code, out) == (2, "")
    assert err == "error: old exists and holds no run; choose another folder\n"
    assert names_in(work / "old") == ["kept"]
    assert (work / "old" / "kept").read_text() == "as it was"
    code, _, err = call("refine", *IPR, "--model", tiny_folder, *SHORT, "--out", "old/kept/below")
    assert (code, err.count("\n")) == (2, 1)
    assert "Not a directory: 'old/kept/below'" in err


EXAMPLE = "1..4 .... .3.. ...."
SHIPPED = [
    "mini-sudoku",
    "mini-sudoku-transformer",
    "digits-sudoku",
    "mnist-sudoku-transformer",
    "even-pixels-transformer",
]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("--task", "chess"),
            "unknown --task 'chess'; known: mini-sudoku, digits-sudoku, mnist-su",
        ),
        (
            ("--task", "mnist-sudoku"),
            "the --task mnist-sudoku needs --data (a folder with MNIST)",
        ),
        (("--difficulty", "easy"), "the --task mini-sudoku takes no --difficulty"),
        (("--classifier", "mini-sudoku"), "the --task mini-sudoku takes no --classifier"),
        (("--data", "x"), "the --task mini-sudoku takes no --data"),
        (
            ("--task", "counting-stars", "--classifier", "nope"),
            f"no --classifier at 'nope': give a model folder or one of {SHIPPED}",
        ),
        (("--swapped", "-1"), "--swapped must be a whole number of at least 0, got -1"),
        (("--swapped", "9"), "--swapped must be in 1..8 on a 4x4 board, got 9"),
        (
            ("--swapped", "1", "--puzzle", EXAMPLE),
            "--puzzle is a board of its own, leave out --swapped",
        ),
        (("--swapped", "1", "--first-overlap", "0"), "are, leave out --first-overlap"),
        (("--task", "digits-sudoku", "--difficulty", "x"), "unknown --difficulty 'x'; known: "),
        (
            ("--model", "no[v2]"),
            f"no --model at 'no[v2]': give a model folder or one of {SHIPPED}",
        ),
        (("--model", "."), "is not a model of ipr_jax: "),
        (("--order", "x"), "unknown --order 'x'; known: certain, uncertain, random, raster"),
        (("--regions", "x"), "unknown --regions 'x'; known: fresh, fixed"),
        (("--noise", "[x]"), "unknown --noise '[x]'; known: fresh, initial"),
        (("--ratio", "0"), "--ratio must be in (0, 1], got 0.0"),
        (("--ratio=1.5",), "--ratio must be in (0, 1], got 1.5"),
        (("--overlap", "1.1"), "--overlap must be in [0, 1], got 1.1"),
        (("--precision", "fp8"), "unknown --precision 'fp8'; known: float32, tf32, bfloat16"),
        (("--first-overlap", "-0.5"), "--first-overlap must be in [0, 1], got -0.5"),
        (
            ("--steps-per-patch", "0"),
            "--steps-per-patch must be a whole number of at least 1, got 0",
        ),
        (
            ("--first_steps_per_patch", "0"),
            "--first_steps_per_patch must be a whole number of at least 1, got 0",
        ),
        (
            ("--first-steps-per-patch", "0", "--steps-per-patch", "1"),
            "--first-steps-per-patch must be a whole number of at least 1, got 0",
        ),
        (("--samples", "0"), "--samples must be a whole number of at least 1, got 0"),
        (("--iterations", "-1"), "--iterations must be a whole number of at least 0, got -1"),
        (("--temperature", "-1"), "--temperature must be finite and at least 0, got -1.0"),
        (("--temperature", "nan"), "--temperature must be finite and at least 0, got nan"),
        (("--stochasticity", "2"), "--stochasticity must be in [0, 1], got 2.0"),
        (("--seed", "-1"), "--seed must be a whole number of at least 0, got -1"),
        (("--seed", "4294967296"), "--seed must be below 4294967296, got 4294967296"),
        (("--batch-size", "0"), '--batch-size must be a whole number of at least 1 or "auto", go'),
        (("--shard-size", "0"), "--shard-size must be a whole number of at least 1, got 0"),
        (("--dtype", "u1"), "--dtype must be uint8 or float32, got 'u1'"),
        (("--save-minutes", "-1"), "--save-minutes must be at least 0, got -1.0"),
        (("--puzzle", "1..4"), f"4x4 --puzzle must be 16 .* got 4 in '1..4'; valid: '{EXAMPLE}'"),
        (
            ("--puzzle", "5" * 16),
            f"out of 1..4 .* got '5' in row 1, column 1 of '{'5' * 16}'; valid: '{EXAMPLE}'",
        ),
        (
            ("--puzzle", "1..1 .... .... ...."),
            "a --puzzle must have a solution, got one where row 1 has the digit 1 in r1c1 and r1c4",
        ),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(tiny_folder, work, words, message):
    """It names the option as it was typed."""
    if "--model" not in words:
        words = ("--model", tiny_folder, *words)
    if not {"--task", "--method"} & set(words):
        words = (*IPR, *words)
    code, out, err = call("refine", *words)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.endswith("\n")
    assert err.count("\n") == 1
    for part in message.split(" .* "):
        assert part in err
    assert not list(work.iterdir())


def test_all_that_a_task_needs_is_said_at_once(work):
    code, out, err = call("evaluate", "counting-stars")
    assert (code, out) == (2, "")
    assert err == (
        "error: the task counting-stars needs --classifier (the folder of a converted one), "
        "--model (a folder, none ships)\n"
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("refine", "--task", "digits-sudoku", "--puzzle", "." * 81, "--difficulty", "easy"),
            "--puzzle is a board of its own, leave out --difficulty",
        ),
        (
            ("refine", "--task", "digits-sudoku", "--swapped", 2, "--difficulty", "easy"),
            "boards with swapped cells are refined as they are, leave out --difficulty",
        ),
        (
            ("experiment", "sudoku-corrupted", "--task", "digits-sudoku", "--difficulty", "easy"),
            "the experiment sudoku-corrupted sets its difficulty, leave out --difficulty",
        ),
        (
            ("stream", "digits-sudoku", "--patience", 2),
            "without --stop no sample leaves early, leave out --patience",
        ),
        (
            ("stream", "digits-sudoku", "--method", "annealed", "--stop", "unchanged"),
            "--method annealed takes no stopping rule, leave out --stop",
        ),
        (
            ("refine", "--swapped", 2, "--method", "annealed"),
            "boards with swapped cells are refined by --method ipr, got 'annealed'",
        ),
        (
            ("train", "mini-sudoku", "--noise-levels", "shared", "--sharpness", 2),
            "--noise-levels mean-beta alone has a sharpness, leave out --sharpness",
        ),
    ],
)
def test_options_without_effect_are_refused(work, monkeypatch, words, message):
    """Without a model of 9x9 boards at hand."""

    def opened(options, task):
        return Opened(get_task(task, difficulty=options.difficulty), None, {})

    monkeypatch.setattr(TaskOptions, "open", opened)
    for command in (refine, experiment, stream):
        monkeypatch.setattr(command, "compute_in", lambda model, precision: None)
    assert call(*words) == (2, "", f"error: {message}\n")
    assert not list(work.iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_size": (16, 16)}, "makes images (16, 16, 1) in 2 x 2 patches of 8"),
        ({"patch_size": 4}, "makes images (32, 32, 1) in 8 x 8 patches of 4"),
    ],
)
def test_a_model_of_other_images_is_refused(tmp_path, work, change, message):
    other = save_random(tmp_path / "other", dataclasses.replace(TINY, **change))
    code, out, err = call("refine", *IPR, "--model", other)
    assert (code, out) == (2, "")
    needs = "the task mini-sudoku needs (32, 32, 1) in 4 x 4 patches of 8"
    assert err == f"error: {other} {message}, {needs}\n"
    assert [path.name for path in work.iterdir()] == ["other"]


def test_an_interrupted_run_says_how_to_go_on(finished, tiny_folder, work, monkeypatch):
    whole = evaluate.evaluate

    def interrupted(*arguments, **options):
        for progress in whole(*arguments, **options):
            if progress.iteration == 1:
                interrupts.receive(signal.SIGINT)
            yield progress

    words = ("refine", *IPR, "--model", tiny_folder, *SHORT, "--seed", 4, "--dtype", "float32")
    with monkeypatch.context() as patch:
        patch.setattr(shards, "evaluate", interrupted)
        code, _, err = call(*words, "--out", "run :x: [v2]")
    assert code == 130
    assert err == "interrupted: started again with --out run :x: [v2], it goes on\n"
    assert names_in(work / "run :x: [v2]") == ["config.json", "samples", "state-0"]
    assert call(*words, "--out", "run :x: [v2]")[0] == 0
    for name, want in samples_of(finished[0]).items():
        np.testing.assert_array_equal(samples_of(work / "run :x: [v2]")[name], want)


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


def test_samples_that_break_are_said_and_not_drawn(tiny_folder, work, monkeypatch):
    whole = evaluate.evaluate

    def broken(*arguments, **options):
        for progress in whole(*arguments, **options):
            finite = np.full_like(progress.finite, progress.iteration == 0)
            scores = progress.scores | {"valid": progress.scores["valid"] & finite}
            yield progress._replace(finite=finite, scores=scores)

    monkeypatch.setattr(shards, "evaluate", broken)
    code, out, _ = call("refine", *IPR, "--model", tiny_folder, *SHORT, "--out", "run")
    assert code == 0
    named = ", ".join(f"{sample} at iteration 1" for sample in range(3))
    assert f"\nnot finite and not counted: 3 samples ({named})\n" in out
    np.testing.assert_array_equal(samples_of(work / "run")["broke_at"], [1] * 3)
    assert names_in(work / "run") == [*FILES, "report.html", "samples"]


def test_what_is_drawn(tiny_folder, work, monkeypatch):
    """Of 10 samples, the first 8 over chosen iterations, and the one that improves in motion; those
    that are not finite, nowhere.
    """
    whole, drawn = evaluate.evaluate, {}

    def told(*arguments, **options):
        for progress in whole(*arguments, **options):
            number, finite = np.arange(10), np.arange(10) != 1
            solved = finite & (number > 2) & (number < 4 + progress.iteration)
            yield progress._replace(finite=finite, scores=progress.scores | {"valid": solved})

    def keep(name):
        def function(path, *arguments):
            drawn[name] = (path.name, *arguments)

        monkeypatch.setattr(pictures, name, function)

    monkeypatch.setattr(shards, "evaluate", told)
    monkeypatch.setattr(refine, "SHOWN_ITERATIONS", (0, 2))
    for name in ("samples", "refinement", "animation"):
        keep(name)
    words = ("--samples", 10, "--iterations", 4, *FEW)
    assert call("refine", *IPR, "--model", tiny_folder, *words, "--out", "run")[0] == 0
    saved = samples_of(work / "run")
    name, grid, iteration, headline, start = drawn["samples"]
    assert (name, iteration, headline, start) == ("samples.png", 4, "valid", "first pass")
    finite = [0, 2, 3, 4, 5, 6, 7, 8, 9]
    few = finite[:8]
    np.testing.assert_array_equal(grid.image, shards.to_float(saved["refined"])[finite])
    np.testing.assert_array_equal(grid.editable, saved["editable"][finite])
    np.testing.assert_array_equal(grid.solved, saved["valid"][-1][finite])
    np.testing.assert_array_equal(grid.violating, TASK.violating(grid.image))
    name, moments, headline, _ = drawn["refinement"]
    assert (name, list(moments), headline) == ("refinement.png", [0, 2, 4], "valid")
    for number, source in ((0, "first_pass"), (4, "refined")):
        want = shards.to_float(saved[source])[few]
        np.testing.assert_array_equal(moments[number].image, want)
        np.testing.assert_array_equal(moments[number].solved, saved["valid"][number][few])
    name, moments, sample, headline, _ = drawn["animation"]
    assert (name, list(moments), headline) == ("refinement.gif", [0, 1, 2, 3, 4], "valid")
    assert finite[sample] == 4


def test_a_task_without_puzzles_and_without_clues(tmp_path, work):
    colour = dataclasses.replace(TINY, channels=3, patch_size=4)
    model = save_random(tmp_path / "colour", colour)
    words = ("refine", "--task", "even-pixels", "--model", model)
    code, out, err = call(*words, *SHORT, "--out", "run")
    assert (code, err) == (0, "")
    for part in ("balanced %", "95% interval", "imbalance", "saturation_std", "value_std"):
        assert part in out
    saved = samples_of(work / "run")
    assert saved["editable"].all()
    assert saved["balanced"].shape == saved["imbalance"].shape == (3, 3)
    assert names_in(work / "run") == sorted([*FILES, *PICTURES, "samples"])
    code, _, err = call(*words, "--puzzle", EXAMPLE)
    assert (code, err) == (2, "error: the --task even-pixels has no puzzles, leave out --puzzle\n")


def test_solved_boards_with_swapped_cells_are_refined_as_they_are(tiny_folder, work, monkeypatch):
    starts = []
    for name in ("samples", "refinement", "animation"):
        monkeypatch.setattr(pictures, name, lambda *given: starts.append(given[-1]))
    few = ("--samples", 3, "--iterations", 2, "--steps-per-patch", 1)  # there is no first pass
    words = ("--swapped", 2, "--seed", 4, "--dtype", "float32", "--out", "run")
    code, out, _ = call("refine", *IPR, "--model", tiny_folder, *few, *words)
    assert code == 0
    assert starts == ["input"] * 3
    assert re.search(r"^ *input +0\.0 ", out, re.MULTILINE)
    assert "first pass" not in out
    saved = samples_of(work / "run")
    swapped = TASK.corrupted(2).test_batch(4, np.arange(3))
    np.testing.assert_array_equal(saved["first_pass"], swapped.image)
    assert saved["editable"].all()
    assert not saved["valid"][0].any()


@pytest.mark.parametrize(
    ("options", "task", "difficulty", "method"),
    [
        ({}, "digits-sudoku", "medium", "annealed"),
        ({"puzzle": EXAMPLE}, "mini-sudoku", None, "annealed"),
        ({"model": "mini-sudoku"}, "mini-sudoku", None, "annealed"),
        ({"model": "digits-sudoku"}, "digits-sudoku", "medium", "annealed"),
        ({"model": "digits-sudoku", "method": "ipr"}, "digits-sudoku", "medium", "ipr"),
        ({"model": "digits-sudoku", "difficulty": "hard"}, "digits-sudoku", "hard", "annealed"),
        ({"model": "mini-sudoku", "task": "digits-sudoku"}, "digits-sudoku", "medium", "annealed"),
        ({"task": "mnist-sudoku"}, "mnist-sudoku", "medium", "annealed"),
        ({"task": "mnist-sudoku", "swapped": 2}, "mnist-sudoku", None, "ipr"),
        ({"task": "even-pixels"}, "even-pixels", None, "ipr"),
        ({"task": "even-pixels", "method": "annealed"}, "even-pixels", None, "annealed"),
    ],
)
def test_the_task_is_that_of_the_model_or_of_the_puzzle(options, task, difficulty, method):
    completed = refine._completed(RefineOptions(**options))
    assert (completed.task, completed.difficulty, completed.method) == (task, difficulty, method)


def test_every_option_is_read():
    """Each option that belongs to the experiment changes it; the others are tested by what they do:
    the task with its data, model, puzzle, samples and seed above, the folder, the precision; the
    batch size in test_evaluate, how samples are kept in test_shards, other processes in test_hosts.
    """
    changes = {
        "iterations": 7,
        "ratio": 0.5,
        "steps_per_patch": 4,
        "overlap": 0.5,
        "first_steps_per_patch": 4,
        "first_overlap": 0.5,
        "stochasticity": 0.25,
        "temperature": 0.5,
        "order": "raster",
        "regions": "fixed",
        "noise": "initial",
    }
    annealed = {"iterations": 7, "cycles": 3, "calm": 0.1, "stochasticity": 0.25}
    annealed |= {"regions": "fresh"}
    elsewhere = {"task", "model", "puzzle", "swapped", "samples", "batch_size", "seed", "out"}
    elsewhere |= {"difficulty", "data", "classifier", "precision", "method"}
    elsewhere |= {"verifier", "budget"}  # in test_search
    elsewhere |= {"shard_size", "dtype", "save_minutes", *HOSTS}
    fields = {field.name for field in dataclasses.fields(RefineOptions)}
    assert fields == elsewhere | set(changes) | set(annealed)
    for method, table in (("ipr", changes), ("annealed", annealed)):
        made = [RefineOptions(method=method).chosen("mini-sudoku")]
        for name, value in table.items():
            made.append(RefineOptions(**{"method": method, name: value}).chosen("mini-sudoku"))
            others = RefineOptions(
                **{"method": "ipr" if method == "annealed" else "annealed"} | {name: value}
            )
            if name not in changes.keys() & annealed.keys():
                with pytest.raises(ValueError, match=f"leave out --{name.replace('_', '-')}"):
                    others.chosen("mini-sudoku")
        assert len({json.dumps(experiments.describe(each)) for each in made}) == len(made)


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


# --- default folders ------------------------------------------------------------------------------


def test_a_command_that_goes_on_has_its_folder_and_another_one_another(tmp_path):
    usual = ExperimentOptions()

    def folder(**changes):
        options = dataclasses.replace(usual, **changes)
        return same_folder(tmp_path / "ratio", options, usual)

    assert folder() == folder(out=tmp_path) == tmp_path / "ratio"
    others = [folder(seed=1), folder(seed=2), folder(samples=1), folder(model="m", seed=1)]
    assert len({*others, folder()}) == 5
    assert others[0] == folder(seed=1)
    assert re.fullmatch("ratio-[0-9a-f]{8}", others[0].name)


def test_evaluations_are_new_folders_each(tiny_folder, work, monkeypatch):
    """Of 4 samples, 2 break at the first iteration and 1 at the second: that is said."""

    def told(task, denoise, batch, refinement, key, *, batch_size):
        for number in range(3):
            finite = np.arange(4) >= (0, 2, 3)[number]
            nfe = np.zeros(4, np.int64)
            scores = {"valid": finite, "violations": nfe}
            yield evaluate.Progress(
                number, batch.image, None, scores, finite, Costs(*[nfe] * 3), 1.0, 1.0, 1.0, 4
            )

    monkeypatch.setattr(experiments, "evaluate", told)
    words = ("evaluate", "mini-sudoku", "--model", tiny_folder, "--iterations", 2)
    for _ in range(2):
        code, out, err = call(*words, "--samples", 4)
        assert (code, err) == (0, "")
        said = "not finite and not counted: 3 samples (2 at iteration 1, 1 at iteration 2)"
        assert said in out.splitlines()
    folders = sorted((work / "results").iterdir())
    assert [re.sub(r"[\d-]+$", "", path.name) for path in folders] == ["evaluate-mini-sudoku"] * 2
    assert out.endswith(f"\n\nwritten: results/{folders[-1].name}\n")
    _, out, _ = call(*words, "--samples", 4, "--out", "run[v2]")
    assert out.endswith("\n\nwritten: run[v2]\n")
    _, _, err = call(*words, "--samples", 5, "--out", "run[v2]")
    said = "run[v2] holds a run of another configuration (samples is 4 there and 5 here); choose"
    assert err == f"error: {said} another folder or the settings in run[v2]/config.json\n"


# --- train ----------------------------------------------------------------------------------------


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


# --- info -----------------------------------------------------------------------------------------


def rows_of(out):
    """The printed table: its first column to its second."""
    lines = [re.split(r" {2,}", line.strip(), maxsplit=1) for line in out.splitlines()]
    return {line[0]: line[1] for line in lines if len(line) == 2}


def test_info_prints_what_is_in_a_model():
    code, out, err = call("info", "mini-sudoku")
    assert (code, err) == (0, "")
    rows = rows_of(out)
    config = PRESETS["mini-sudoku"]
    assert {name: rows[name] for name in vars(config)} == {
        name: str(value) for name, value in vars(config).items()
    }
    assert rows["network"] == "SRM"
    assert rows["noise levels"] == "4 x 4, one per patch"
    assert rows["parameters"] == "760,915"
    assert rows["per evaluation of an image"] == "0.197 GFLOP"
    assert rows["task"] == "mini-sudoku"
    assert json.loads(rows["training"])["num_steps"] == 5000


def test_info_of_an_image_level_model_with_clues(work):
    config = dataclasses.replace(TINY, patch_size=32, concat_clues=True)
    save_random(work / "model", config)
    code, out, _ = call("info", "model")
    assert code == 0
    assert rows_of(out)["noise levels"] == "one for the image"


def test_info_of_a_classifier(work):
    network = build(MNISTConfig())
    checkpoint.save(work / "model", network.config, nnx.state(network), {"source": "nowhere"})
    code, out, _ = call("info", "model")
    assert code == 0
    rows = rows_of(out)
    assert rows["network"] == "MNISTClassifier"
    assert rows["parameters"] == f"{320 + 18_496 + 401_536 + 1_290:,}"
    assert rows["source"] == "nowhere"


def test_info_of_nothing_is_one_line():
    message = f"error: no model at 'nothing': give a model folder or one of {SHIPPED}\n"
    assert call("info", "nothing") == (2, "", message)


def test_info_of_the_environment_is_plain_text():
    """What the form for faults asks for."""
    code, out, err = call("info", "--environment")
    assert (code, err) == (0, "")
    facts = dict(line.split(": ", 1) for line in out.splitlines())
    for package in ("ipr_jax", "jax", "jaxlib", "flax", "numpy", "orbax-checkpoint"):
        assert facts[package] == importlib.metadata.version(package)
    assert facts["device"] == f"{jax.local_device_count()} x cpu"
    assert facts["backend"] == "cpu"
    assert facts["python"] == sys.version.split()[0]
    assert facts["JAX_ENABLE_COMPILATION_CACHE"] == "false"
    for words in ((), ("mini-sudoku", "--environment")):
        message = "error: name a MODEL or give --environment\n"
        assert call("info", *words) == (2, "", message)


# --- convert --------------------------------------------------------------------------------------


def test_models_are_converted_by_the_command_as_well(work):
    """In the package that is installed: what there is to convert is tested in tests/convert."""
    save_random(work / "model", MNISTConfig())
    code, out, err = call("convert", "export", "model", "there.safetensors")
    assert (code, err) == (0, "")
    assert out.startswith("written: there.safetensors, ")
    code, out, err = call("convert", "import", "there.safetensors", "back")
    assert (code, err) == (0, "")
    assert out.endswith("written: back\n")
    before, after = (nnx.state(open_network(name)[0]) for name in ("model", "back"))
    jax.tree.map(np.testing.assert_array_equal, before, after)
    message = "error: unknown way 'swap'; known: import, export, verify\n"
    assert call("convert", "swap") == (2, "", message)


# --- the command ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "fields"),
    [
        (("refine",), dataclasses.fields(RefineOptions)),
        (("evaluate", "even-pixels"), dataclasses.fields(EvaluateOptions)),
        (("stream", "even-pixels"), dataclasses.fields(StreamOptions)),
        (("experiment", "samplers"), dataclasses.fields(ExperimentOptions)),
        (("train", "mini-sudoku"), dataclasses.fields(TrainConfig)),
    ],
)
def test_help_explains_every_option(words, fields):
    code, out, err = call(*words, "--help")
    assert (code, err) == (0, "")
    said = " ".join(out.replace("│", " ").split())
    for field in fields:
        option = f"--{field.name.replace('_', '-')}"
        assert option in said
        bare = rf"{option}(, --no-\S+)?( \S+)? \(default"
        assert not re.search(bare, said), "a description stands before the default"
    assert "Attributes" not in said


def test_help_names_the_commands():
    code, out, _ = call("--help")
    assert code == 0
    for command in ("refine", "evaluate", "stream", "experiment", "train", "info", "convert"):
        assert command in out
    for words, names in {
        "train NAME": RECIPES,
        "evaluate TASK": TASKS,
        "stream TASK": TASKS,
        "experiment NAME": experiments.EXPERIMENTS,
        "convert WAY": ("import", "export", "verify"),
    }.items():
        code, out, _ = call(words.split()[0], "--help")
        said = " ".join(out.replace("│", " ").split())
        assert code == 0
        assert f"ipr-jax {words} --help" in said
        assert f"one of {', '.join(names)}." in said


def test_the_version_is_that_of_the_package():
    said = f"ipr_jax {importlib.metadata.version('ipr_jax')}\n"
    assert call("--version") == (0, said, "")
    assert "ipr-jax --version" in call("--help")[1]


@pytest.mark.parametrize(
    "words",
    [(), ("nope",), ("train",), ("evaluate",), ("stream",), ("experiment",), ("refine", "--nope")],
)
def test_what_is_not_understood_ends_with_2(work, words):
    code, out, err = call(*words)
    assert code == 2
    assert "Traceback" not in out + err
    assert not list(work.iterdir())


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED:\nfull"),
            ": RESOURCE_EXHAUSTED: full",
        ),
        (MemoryError(), ""),
    ],
)
def test_warnings_and_a_full_memory_are_one_line(capsys, error, said):
    @one_line_errors()
    def command():
        warnings.simplefilter("always")
        warnings.warn("so it\nis", stacklevel=1)
        raise error

    with pytest.raises(SystemExit) as end:
        command()
    assert end.value.code == 2
    assert capsys.readouterr().err == f"warning: so it is\nerror: out of memory{said}\n"


def test_other_errors_of_the_device_are_shown_whole():
    error = jax.errors.JaxRuntimeError("INTERNAL: broken")
    with pytest.raises(jax.errors.JaxRuntimeError, match="broken"), one_line_errors():
        raise error


def test_the_installed_command_is_this_one(work):
    (command,) = importlib.metadata.entry_points(group="console_scripts", name="ipr-jax")
    assert command.load() is __main__.main
    words = [sys.executable, "-m", "ipr_jax", "refine"]
    bare = {"capture_output": True, "text": True, "cwd": work, "timeout": 120}
    done = subprocess.run(words, env=os.environ | {"JAX_PLATFORMS": "abacus"}, **bare)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: JAX has no device of JAX_PLATFORMS=abacus: Unable to ")
    assert done.stderr.count("\n") == 1
    assert not list(work.iterdir())
