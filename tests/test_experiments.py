"""The experiments: their arms, their files, going on after an interrupt, the command."""

import contextlib
import dataclasses
import io
import json
import sys

import jax
import matplotlib.image
import numpy as np
import pytest

from ipr_jax import checkpoint, cli, evaluate, experiments, selection
from ipr_jax.tasks import TASKS, get_task

TASK = get_task("mini-sudoku")
RUN = {"samples": 5, "seed": 3, "chunk": 4, "settings": {"versions": {}}}


def call(*words):
    """Run the command line in this process: exit code, standard output and standard error."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["ipr-jax", *map(str, words)])
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                cli.main()
                code = 0
            except SystemExit as end:
                code = end.code
    return code, out.getvalue(), err.getvalue()


def timeless(lines):
    """Metrics without those that differ from run to run."""
    return [
        {k: v for k, v in line.items() if k not in ("seconds", "samples_per_second")}
        for line in lines
    ]


def collected(run):
    found = {}
    for label, line in run:
        found.setdefault(label, []).append(line)
    return found


@pytest.mark.parametrize("name", experiments.EXPERIMENTS)
def test_arms_differ_in_what_the_paper_varies(name):
    experiment = experiments.get_experiment(name)(TASK, 7)
    assert experiment.published.keys() <= experiment.arms.keys()
    refinements = [arm.refinement for arm in experiment.arms.values()]
    assert len(
        {json.dumps(experiments.describe(experiment)["arms"][k]) for k in experiment.arms}
    ) == len(refinements)
    if name != "samplers":
        assert all(each.iterations == 7 for each in refinements)
        plain = dataclasses.replace(evaluate.Refinement(), iterations=7)
        varied = {"ratio": "ratio", "corrupted": "first"}.get(name)
        for each in refinements:
            if varied:
                each = dataclasses.replace(each, **{varied: getattr(plain, varied)})
            if name == "noise-and-regions":
                each = dataclasses.replace(
                    each, noise=selection.fresh_noise, select=selection.fresh_regions
                )
            assert each == plain
    else:
        assert all(each.iterations == 0 and each.first.max_steps == 1000 for each in refinements)


def test_settings_of_the_other_tasks():
    polygons = dataclasses.replace(TASK, name="counting-polygons")
    arm = experiments.refinement(polygons, 3).arms["refined"].refinement
    assert (arm.first.steps_per_patch, arm.first.overlap) == (10, 0.9)
    assert (arm.later.steps_per_patch, arm.later.overlap) == (10, 0.9)
    pixels = experiments.ratio(get_task("even-pixels"), 3).arms["0.10"].refinement
    assert (pixels.first.steps_per_patch, pixels.later.overlap) == (30, 0.9)
    with pytest.raises(ValueError, match="even-pixels has no cells to swap"):
        experiments.corrupted(get_task("even-pixels"), 3)


def test_an_arm_is_an_evaluation(tmp_path, tiny_model):
    experiment = experiments.ratio(TASK, 2)
    run = experiments.run(experiment, TASK, tiny_model, tmp_path / "run", **RUN)
    found = collected(run)
    assert list(found) == ["0.10", "0.25", "0.50"]
    batch = TASK.test_batch(3, np.arange(5))
    for label, lines in found.items():
        arm = experiment.arms[label].refinement
        alone = evaluate.evaluate(TASK, tiny_model, batch, arm, jax.random.key(3), chunk=4)
        assert timeless(lines) == timeless(map(evaluate.summarise, alone))
        assert json.loads((tmp_path / "run" / "arms" / f"{label}.json").read_text()) == lines
    first_passes = [timeless(lines[:1]) for lines in found.values()]
    assert first_passes[0] == first_passes[1] == first_passes[2]


def test_corrupted_boards_start_as_they_are(tmp_path, tiny_model):
    experiment = experiments.corrupted(TASK, 1)
    assert list(experiment.arms) == ["K = 1", "K = 3", "K = 5", "K = 7"]
    found = collected(experiments.run(experiment, TASK, tiny_model, tmp_path / "run", **RUN))
    for lines in found.values():
        assert lines[0]["nfe"] == 0
        assert lines[0]["valid"] == 0
        assert lines[1]["nfe"] == 10 + 3 * 2  # four of 16 cells, 10 steps each, 0.8 overlapped
    assert found["K = 1"][0]["violations"] < found["K = 7"][0]["violations"]


def test_an_interrupted_experiment_goes_on_after_its_last_finished_arm(tmp_path, tiny_model):
    experiment = experiments.noise_and_regions(TASK, 1)
    whole = collected(experiments.run(experiment, TASK, tiny_model, tmp_path / "whole", **RUN))
    run = experiments.run(experiment, TASK, tiny_model, tmp_path / "cut", **RUN)
    for _ in range(3):  # the first arm, and the first pass of the second
        next(run)
    run.close()
    assert [path.name for path in (tmp_path / "cut" / "arms").iterdir()] == [
        "fresh noise and regions.json"
    ]
    calls = 0

    def counting(z, t):
        nonlocal calls
        calls += 1
        return tiny_model(z, t)

    again = collected(experiments.run(experiment, TASK, counting, tmp_path / "cut", **RUN))
    assert {k: timeless(v) for k, v in again.items()} == {k: timeless(v) for k, v in whole.items()}
    assert calls == 3  # traced: one first pass, and each kind of iteration that was left

    def never(z, t):
        raise AssertionError("everything is finished")

    finished = collected(experiments.run(experiment, TASK, never, tmp_path / "cut", **RUN))
    assert finished == again


def test_another_experiment_in_the_folder_is_refused(tmp_path, tiny_model):
    experiment = experiments.ratio(TASK, 1)
    experiments.run(experiment, TASK, tiny_model, tmp_path / "run", **RUN)
    with pytest.raises(ValueError, match="holds another experiment"):
        experiments.run(experiment, TASK, tiny_model, tmp_path / "run", **RUN | {"seed": 4})
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="exists and holds no experiment"):
        experiments.run(experiment, TASK, tiny_model, tmp_path / "other", **RUN)
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["notes.txt"]


def test_the_command_writes_metrics_and_a_figure(tmp_path, monkeypatch, tiny_folder):
    monkeypatch.chdir(tmp_path)
    options = ("--model", tiny_folder, "--samples", 6, "--iterations", 2)
    code, out, err = call("experiment", "ratio", *options)
    assert (code, err) == (0, "")
    folder = tmp_path / "results" / "ratio-mini-sudoku"
    assert sorted(path.name for path in folder.iterdir()) == ["arms", "config.json", "ratio.png"]
    for part in ("Resampling ratio (IPR, figure 6a)", "0.10", "0.25", "0.50", "valid %"):
        assert part in out
    described = json.loads((folder / "config.json").read_text())
    assert (described["samples"], described["seed"], described["source"]) == (
        6,
        0,
        "IPR, figure 6a",
    )
    assert described["arms"]["0.10"]["refinement"]["ratio"] == 0.1
    assert described["published"]["0.50"]["50"] == 0.542
    assert {"versions", "device", "provenance", "arguments"} <= described.keys()
    picture = matplotlib.image.imread(folder / "ratio.png")
    assert picture.std() > 0.05
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert call("experiment", "ratio", *options)[0] == 0  # again: there is nothing to do
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("nothing",), "unknown experiment 'nothing'; known: ['corrupted', 'noise-and-regions', "),
        (("ratio", "--task", "sudoku"), f"unknown task 'sudoku'; known: {', '.join(TASKS)}"),
        (("ratio", "--task", "mnist-sudoku"), "the task mnist-sudoku needs a classifier"),
        (("ratio", "--task", "counting-stars"), "the task counting-stars needs a classifier"),
        (("ratio", "--task", "mini-sudoku", "--data", "x"), "the task mini-sudoku takes no data"),
        (("ratio", "--difficulty", "hard"), "the task mini-sudoku takes no difficulty"),
        (
            ("ratio", "--task", "even-pixels"),
            "mini-sudoku makes images (32, 32, 1) in 4 x 4 patches of 8, the task even-pixels "
            "needs (32, 32, 3) in 8 x 8 patches of 4",
        ),
        (("corrupted", "--task", "even-pixels"), "the task even-pixels has no cells to swap"),
        (("ratio", "--samples", 0), "samples must be a whole number of at least 1, got 0"),
        (("ratio", "--classifier", "mini-sudoku"), "must hold a classifier, it holds a SRM"),
    ],
)
def test_bad_experiments_are_one_line_and_write_nothing(tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    code, _, err = call("experiment", *words)
    assert code == 2
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err
    assert not list(tmp_path.iterdir())


def test_a_classifier_counts_for_its_task(tmp_path, tiny_model):
    from flax import nnx

    from ipr_jax.networks import build
    from ipr_jax.tasks.mnist_classifier import MNISTConfig

    network = build(MNISTConfig())
    checkpoint.save(tmp_path / "digits", network.config, nnx.state(network), {})
    classify = cli._open_classifier(tmp_path / "digits")
    digits = np.asarray(classify(np.zeros((3, 28, 28, 1), np.float32)))
    assert digits.shape == (3,)
    assert ((digits >= 1) & (digits <= 9)).all()
