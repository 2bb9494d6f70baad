"""The command refine: what it writes, draws and says."""

import dataclasses
import importlib.metadata
import json
import re
import signal
from typing import NamedTuple

import jax
import numpy as np
import pytest
from conftest import FEW, IPR, SHORT, TINY, call
from PIL import Image
from short_runs import EXAMPLE, METHOD, names_in, samples_of, save_random

import ipr_jax
from ipr_jax import interrupts
from ipr_jax.cli import refine
from ipr_jax.cli.refine import RefineOptions
from ipr_jax.methods.engine import Costs
from ipr_jax.studies import evaluate, experiments, pictures, shards
from ipr_jax.tasks import get_task
from ipr_jax.tasks.mini_sudoku import BOARDS

TASK = get_task("mini-sudoku")
FILES = ["config.json", "manifest.json", "metrics.jsonl"]
PICTURES = ["refinement.gif", "refinement.png", "report.html", "samples.png"]
HOSTS = {"distributed", "coordinator", "num_processes", "process_id"}


def lines_of(folder):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    text = (folder / "metrics.jsonl").read_text()
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


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


def test_the_seed_decides_everything(finished, tiny_folder, work, monkeypatch):
    folder, _ = finished
    for name in ("samples", "refinement", "animation"):
        monkeypatch.setattr(pictures, name, lambda *given: None)
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
            number = options["first"] + np.arange(len(progress.image))
            finite = number != 1
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
    words = ("--samples", 10, "--batch-size", 3, "--iterations", 4, *FEW)
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
