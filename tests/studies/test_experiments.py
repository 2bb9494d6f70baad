"""The experiments: their arms, their files, going on after an interrupt, the command."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import matplotlib.image
import numpy as np
import pytest
from conftest import TINY, call
from flax import nnx
from small_run import fake

import ipr_jax
from ipr_jax import Prediction
from ipr_jax.cli import experiment as command
from ipr_jax.cli import options
from ipr_jax.methods import Annealed, selection
from ipr_jax.methods.engine import Costs
from ipr_jax.models import checkpoint
from ipr_jax.models.networks import build
from ipr_jax.runtime import files
from ipr_jax.studies import curves, evaluate, experiments, metrics
from ipr_jax.studies.experiments import Arm
from ipr_jax.tasks import TASKS, counting_polygons, get_task
from ipr_jax.tasks.mnist_classifier import MNISTConfig
from ipr_jax.tasks.polygon_classifier import Counts

TASK = get_task("mini-sudoku")
RUN = {"samples": 5, "seed": 3, "batch_size": 4, "settings": {"versions": {}}}


def timeless(lines):
    """Metrics without those that differ from run to run."""
    return [
        {k: v for k, v in line.items() if k not in ("seconds", "samples_per_second")}
        for line in lines
    ]


def run(experiment, denoise, folder, **changes):
    return experiments.run(experiment, TASK, lambda precision: denoise, folder, **RUN | changes)


def collected(lines):
    found = {}
    for label, line in lines:
        found.setdefault(label, []).append(line)
    return found


@pytest.mark.parametrize("name", experiments.EXPERIMENTS)
def test_arms_differ_in_what_the_paper_varies(name):
    experiment = experiments.get_experiment(name).make(TASK, 7)
    assert set(experiment.scores) <= {*TASK.rates, *TASK.means}
    assert experiment.reference is None or experiment.reference in experiment.arms
    for arms in experiment.published.values():
        assert arms.keys() <= experiment.arms.keys()
    refinements = [arm.refinement for arm in experiment.arms.values()]
    described = experiments.describe(experiment)["arms"]
    assert len({json.dumps(described[label]) for label in experiment.arms}) == len(refinements)
    if name in ("frontier", "search", "search-choices"):  # see below and test_search
        return
    if name != "samplers":
        assert all(each.iterations == 7 for each in refinements)
        plain = dataclasses.replace(ipr_jax.Refinement(), iterations=7)
        varied = {"ratio": "ratio", "sudoku-corrupted": "first"}.get(name)
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


def test_what_is_not_the_papers_is_not_named_so():
    methods = {
        "Refinement": ipr_jax.Refinement(),
        "Annealed refinement": Annealed(),
        "Search": ipr_jax.Particles(particles=1),
    }
    for title, method in methods.items():
        made = experiments.plain(TASK, method)
        assert made.title == title
        assert bool(made.published) == made.source.startswith("IPR") == (title == "Refinement")


def test_a_figure_says_that_a_verifier_chose(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(curves, "curves", lambda path, panels, *given: drawn.extend(panels))
    experiment = experiments.plain(TASK, ipr_jax.Particles(particles=1))
    found = {"refined": [{"valid_rate": 0.5, "violations": 1.0}]}
    for kind in ("oracle", None):
        command._draw(tmp_path / "new.png", experiment, TASK, found, {"refined": kind}, 5)
    said = ["valid, verifier: oracle", "violations, verifier: oracle", "valid", "violations"]
    assert [panel.label for panel in drawn] == said


def test_settings_of_the_other_tasks():
    polygons = dataclasses.replace(TASK, name="counting-polygons")
    arm = experiments.refinement(polygons, 3).arms["refined"].refinement
    assert (arm.first.steps_per_patch, arm.first.overlap) == (10, 0.9)
    assert (arm.later.steps_per_patch, arm.later.overlap) == (10, 0.9)
    pixels = experiments.ratio(get_task("even-pixels"), 3).arms["0.10"].refinement
    assert (pixels.first.steps_per_patch, pixels.later.overlap) == (30, 0.9)
    stars = dataclasses.replace(TASK, name="counting-stars")
    assert experiments.as_published(stars, 3) == experiments.as_published(polygons, 3)
    assert experiments.SETTINGS.keys() == set(TASKS)
    assert {each.task for each in experiments.EXPERIMENTS.values()} <= set(TASKS)


def test_published_numbers_are_those_of_the_task():
    def drawn(task):
        return experiments.refinement(task, 3).published

    assert drawn(TASK) == {"valid": {"refined": {0: 0.558, 50: 0.75}}}
    assert set(drawn(get_task("even-pixels"))) == {"saturation_std", "value_std"}
    polygons = get_task("counting-polygons", classify=lambda images: None)
    assert drawn(polygons)["consistent"] == {"refined": {0: 0.154, 50: 0.274}}
    assert drawn(polygons)["uniform"] == {"refined": {0: 0.988, 50: 1.0}}


@pytest.mark.heavy
def test_an_arm_is_an_evaluation(tmp_path):
    experiment = experiments.ratio(TASK, 2)
    found = collected(run(experiment, fake, tmp_path / "run"))
    assert list(found) == ["0.10", "0.25", "0.50"]
    batch = TASK.test_batch(3, np.arange(5))
    for label, lines in found.items():
        arm = experiment.arms[label].refinement
        alone = evaluate.evaluate(TASK, fake, batch, arm, jax.random.key(3), batch_size=4)
        assert timeless(lines) == timeless(evaluate.summarise(progress, TASK) for progress in alone)
        alone = evaluate.evaluate(TASK, fake, batch, arm, jax.random.key(3), batch_size=4)
        solved = ["".join(map(str, each.scores["valid"].astype(int))) for each in alone]
        written = files.read_record(tmp_path / "run" / "arms" / f"{label}.json")
        assert written == {"metrics": lines, "solved": solved}
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert results == config | {"metrics": found, "differences": results["differences"]}
    first_passes = [timeless(lines[:1]) for lines in found.values()]
    assert first_passes[0] == first_passes[1] == first_passes[2]


def test_differences_are_taken_sample_by_sample(tmp_path):
    """Of those that are finite in both arms."""
    experiment = experiments.ratio(TASK, 0)
    list(run(experiment, fake, tmp_path))
    (tmp_path / "results.json").unlink()
    for label, row in {"0.10": "1110x1", "0.25": "11000x", "0.50": "xxxxxx"}.items():
        path = tmp_path / "arms" / f"{label}.json"
        files.write_record(path, files.read_record(path) | {"solved": [row]})
    list(run(experiment, fake, tmp_path))
    found = json.loads((tmp_path / "results.json").read_text())["differences"]
    one, other = np.array([[1, 1, 1, 0], [1, 1, 0, 0]], bool)
    assert found == {"0.10": metrics.difference(one, other), "0.50": {}}
    assert found["0.10"]["difference"] == 0.25


def noise_at(costs):
    """An evaluation that gives noise: evaluations until an iteration, by method."""

    def evaluated(task, denoise, batch, refinement, key, *, batch_size):
        number = len(batch.image)
        finite, zeros = np.ones(number, bool), np.zeros(number, np.int64)
        noise = np.random.default_rng(0).normal(size=batch.image.shape).astype(np.float32)
        scores = jax.device_get(task.score(jnp.asarray(noise)))
        for iteration, nfe in enumerate(costs(refinement)):
            spent = Costs(zeros + nfe, zeros, zeros)
            yield evaluate.Progress(iteration, noise, None, scores, finite, spent, 1, 1, 1, number)

    return evaluated


def test_methods_are_compared_at_equal_evaluations(tmp_path, monkeypatch):
    """With what the reference had come to by then, or has at its first iteration."""
    costs = {2: (48, 58, 68), 1: (10, 14), 52: (*range(10, 62), 65)}
    experiment = dataclasses.replace(
        experiments.frontier(TASK, 0),
        arms={
            "IPR": Arm(refinement=experiments.as_published(TASK, 2), family="IPR"),
            "short": Arm(refinement=Annealed(iterations=1, cycles=1), family="annealed"),
            "long": Arm(refinement=Annealed(iterations=52, cycles=1), family="annealed"),
        },
    )
    evaluated = noise_at(lambda method: costs[method.iterations])
    monkeypatch.setattr(experiments, "evaluate", evaluated)
    list(run(experiment, fake, tmp_path))
    (tmp_path / "results.json").unlink()
    for label, rows in {
        "IPR": ["00001", "00011", "11111"],
        "short": ["11111", "00110"],
        "long": [*["11111"] * 52, "00110"],
    }.items():
        path = tmp_path / "arms" / f"{label}.json"
        files.write_record(path, files.read_record(path) | {"solved": rows})
    list(run(experiment, fake, tmp_path))
    differences = json.loads((tmp_path / "results.json").read_text())["differences"]
    mine, first, second = (
        np.array(list(map(int, row)), bool) for row in ("00110", "00001", "00011")
    )
    assert differences == {
        "short": metrics.difference(mine, first),
        "long": metrics.difference(mine, second),
    }


def test_the_frontier_has_all_budgets():
    arms = experiments.frontier(TASK, 0).arms.items()
    budgets = {label: arm.refinement.budget(TASK.grid) for label, arm in arms}
    once = [budgets[f"one cycle of {each - 4}"] for each in (20, 40, 80, 160)]
    assert once == [20, 40, 80, 160]
    assert budgets["IPR"] >= 640
    assert [budgets[f"best of {each}"] for each in (2, 4, 8)] == [84, 164, 324]
    assert [budgets[f"at most {each}"] for each in (4, 16)] == [164, 644]


def test_a_sample_that_is_not_finite_is_neither_solved_nor_not(tmp_path):
    def broken(z, t):
        return Prediction(z * jnp.nan, z, t)

    experiment = experiments.ratio(TASK, 0)
    lines = collected(run(experiment, broken, tmp_path))["0.10"]
    assert lines[0]["not_finite"] == 5
    assert json.loads((tmp_path / "arms" / "0.10.json").read_text())["solved"] == ["xxxxx"]
    differences = json.loads((tmp_path / "results.json").read_text())["differences"]
    assert differences == {"0.10": {}, "0.50": {}}
    command._say_differences(experiment, differences)  # has nothing to say


def test_corrupted_boards_start_as_they_are(tmp_path, monkeypatch):
    experiment = experiments.corrupted(TASK, 1)
    assert list(experiment.arms) == ["K = 1", "K = 3", "K = 5", "K = 7"]
    found = collected(run(experiment, fake, tmp_path / "run"))
    for lines in found.values():
        assert lines[0]["nfe"] == 0
        assert lines[0]["valid"] == 0
        assert lines[1]["nfe"] == 10 + 3 * 2  # four of 16 cells, 10 steps each, 0.8 overlapped
    assert found["K = 1"][0]["violations"] < found["K = 7"][0]["violations"]
    starts = []
    monkeypatch.setattr(curves, "curves", lambda *given: starts.append(given[-1]))
    command._draw(tmp_path / "new.png", experiment, TASK, found, dict.fromkeys(found), 5)
    assert starts == ["input"]


@pytest.mark.heavy
def test_an_interrupted_experiment_goes_on_after_its_last_finished_arm(tmp_path):
    experiment = experiments.noise_and_regions(TASK, 1)
    whole = collected(run(experiment, fake, tmp_path / "whole"))
    begun = run(experiment, fake, tmp_path / "cut")
    for _ in range(3):  # the first arm, and the first pass of the second
        next(begun)
    begun.close()
    assert [path.name for path in (tmp_path / "cut" / "arms").iterdir()] == [
        "fresh noise and regions.json"
    ]
    assert not (tmp_path / "cut" / "results.json").exists()
    calls = 0

    def counting(z, t):
        nonlocal calls
        calls += 1
        return fake(z, t)

    again = collected(run(experiment, counting, tmp_path / "cut"))
    assert {k: timeless(v) for k, v in again.items()} == {k: timeless(v) for k, v in whole.items()}
    assert calls == 2  # traced: once for each arm that was left

    def never(z, t):
        raise AssertionError("everything is finished")

    finished = collected(run(experiment, never, tmp_path / "cut"))
    assert finished == again


def test_every_arm_has_the_network_in_its_precision(tmp_path):
    asked = []

    def denoise(precision):
        asked.append(precision)
        return fake

    for name in ("precision", "ratio"):
        experiment = experiments.get_experiment(name).make(TASK, 0)
        list(experiments.run(experiment, TASK, denoise, tmp_path / name, **RUN))
    assert asked == ["float32", "bfloat16", None, None, None]


def test_auto_goes_on_with_another_number_and_the_metrics_tell(tmp_path, monkeypatch, tiny_model):
    fitting = [5, 5, 2, 2]

    def still(task, denoise, batch, refinement, key, *, batch_size):
        assert batch_size == "auto"
        zeros = np.zeros(5, np.int64)
        costs = Costs(zeros, zeros, zeros)
        scores = {"valid": zeros > 0, "violations": zeros}
        size = fitting.pop(0)
        yield evaluate.Progress(0, batch.image, None, scores, zeros == 0, costs, 1, 1, 1, size)

    monkeypatch.setattr(experiments, "evaluate", still)
    experiment = experiments.ratio(TASK, 0)
    begun = run(experiment, tiny_model, tmp_path, batch_size="auto")
    next(begun)
    next(begun)
    begun.close()  # after the first arm
    found = collected(run(experiment, tiny_model, tmp_path, batch_size="auto"))
    assert [line["batch_size"] for (line,) in found.values()] == [5, 2, 2]
    results = json.loads((tmp_path / "results.json").read_text())
    assert (results["batch_size"], results["metrics"]) == ("auto", found)


def test_another_experiment_in_the_folder_is_refused(tmp_path, tiny_model):
    experiment = experiments.ratio(TASK, 1)
    run(experiment, tiny_model, tmp_path / "run")
    with pytest.raises(ValueError, match="holds a run of another configuration"):
        run(experiment, tiny_model, tmp_path / "run", seed=4)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="exists and holds no run"):
        run(experiment, tiny_model, tmp_path / "other")
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["notes.txt"]


def test_the_command_writes_metrics_and_a_figure(tmp_path, monkeypatch, tiny_folder):
    monkeypatch.chdir(tmp_path)
    few = tuple(
        dataclasses.replace(each, steps_per_patch=1) for each in experiments.SETTINGS[TASK.name]
    )
    monkeypatch.setitem(experiments.SETTINGS, TASK.name, few)
    options = ("--model", tiny_folder, "--samples", 3, "--iterations", 2)
    code, out, err = call("experiment", "ratio", *options)
    assert (code, err) == (0, "")
    (folder,) = (tmp_path / "results").iterdir()
    assert re.fullmatch("ratio-mini-sudoku-[0-9a-f]{8}", folder.name)
    files = ["arms", "config.json", "ratio-mini-sudoku.png", "report.html", "results.json"]
    assert sorted(path.name for path in folder.iterdir()) == files
    compared = "at the end, compared with 0.25"
    for part in ("Resampling ratio (IPR, figure 6a)", "0.10", "0.50", "valid %", compared):
        assert part in out
    described = json.loads((folder / "results.json").read_text())
    assert (described["samples"], described["seed"], described["source"]) == (
        3,
        0,
        "IPR, figure 6a",
    )
    assert described["arms"]["0.10"]["refinement"]["ratio"] == 0.1
    assert described["published"]["valid"]["0.50"]["50"] == 0.542
    assert {"versions", "device", "commit", "provenance", "metrics"} <= described.keys()
    assert described["model"]["widths"] == [8]
    picture = matplotlib.image.imread(folder / "ratio-mini-sudoku.png")
    assert picture.std() > 0.05
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert call("experiment", "ratio", *options)[0] == 0  # again: there is nothing to do
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("nothing",), "unknown experiment 'nothing'; known: sudoku-hard, sudoku-corrupted, poly"),
        (("ratio", "--task", "sudoku"), f"unknown --task 'sudoku'; known: {', '.join(TASKS)}"),
        (("ratio", "--task", "mnist-sudoku"), "the --task mnist-sudoku needs --data (a folder"),
        (("ratio", "--task", "counting-stars"), "the --task counting-stars needs --classifier ("),
        (("ratio", "--data", "x"), "the task mini-sudoku takes no --data"),
        (("ratio", "--difficulty", "hard"), "the task mini-sudoku takes no --difficulty"),
        (
            ("ratio", "--task", "even-pixels", "--model", "mini-sudoku"),
            "mini-sudoku makes images (32, 32, 1) in 4 x 4 patches of 8, the task even-pixels "
            "needs (32, 32, 3) in 8 x 8 patches of 4",
        ),
        (("precision", "--precision", "bfloat16"), "sets its precision, leave out --precision"),
        (("samplers", "--iterations", 3), "sets its iterations, leave out --iterations"),
        (
            ("sudoku-hard",),
            "the task mnist-sudoku needs --data (a folder with MNIST)",
        ),
        (("ratio", "--samples", 0), "--samples must be a whole number of at least 1, got 0"),
        (("ratio", "--classifier", "mini-sudoku"), "the task mini-sudoku takes no --classifier"),
        (
            ("polygons", "--classifier", "mini-sudoku", "--model", "mini-sudoku"),
            "mini-sudoku must hold the classifier of counting-polygons, PolygonConfig(",
        ),
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


def colour_model(folder):
    """A model of even pixels with random weights."""
    config = dataclasses.replace(TINY, channels=3, patch_size=4)
    network = build(config)
    checkpoint.save(folder, config, nnx.state(network), {"made": "at random"})
    return folder


def test_an_arm_that_the_task_does_not_have_is_refused_before_anything_is_written(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    model = colour_model(tmp_path / "model")
    code, _, err = call("experiment", "sudoku-corrupted", "--task", "even-pixels", "--model", model)
    assert code == 2
    assert err == "error: the --task even-pixels has no cells to swap, take one of Sudoku\n"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_evaluate_reports_all_that_the_task_scores(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = colour_model(tmp_path / "model")
    words = ("--samples", 3, "--iterations", 1, "--first-steps-per-patch", 2, "--ratio", 0.1)
    code, _, err = call("evaluate", "even-pixels", "--model", model, *words, "--out", "run")
    assert (code, err) == (0, "")
    files = ["arms", "config.json", "evaluate-even-pixels.png", "report.html", "results.json"]
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == files
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    arm = results["arms"]["refined"]["refinement"]
    assert (arm["ratio"], arm["first"]["steps_per_patch"]) == (0.1, 2)
    assert (arm["later"]["steps_per_patch"], arm["later"]["overlap"]) == (30, 0.9)
    (first, last) = results["metrics"]["refined"]
    assert {"balanced_rate", "imbalance_low", "saturation_std", "value_std_high"} <= last.keys()
    assert first["nfe"] < last["nfe"]
    assert results["differences"] == {}


@pytest.mark.parametrize(
    ("task", "config"),
    [
        ("mnist-sudoku", MNISTConfig()),
        pytest.param("counting-stars", counting_polygons.STARS.counts, marks=pytest.mark.heavy),
    ],
)
def test_a_classifier_counts_for_its_task_alone(tmp_path, task, config):
    network = build(config)
    checkpoint.save(tmp_path / "classifier", config, nnx.state(network), {"made": "at random"})
    classify, provenance = options._open_classifier(tmp_path / "classifier", task)
    assert provenance == {"made": "at random"}
    seen = classify(np.zeros((2, *config.image_shape), np.float32))
    if task == "mnist-sudoku":
        assert ((seen >= 1) & (seen <= 9)).all()
    else:
        assert ((seen.num_vertices >= 2) & (seen.num_vertices <= 9)).all()
    with pytest.raises(ValueError, match="must hold the classifier of counting-polygons"):
        options._open_classifier(tmp_path / "classifier", "counting-polygons")


def test_scores_of_a_classifier_are_summarised():
    """A made-up classifier, that sees three polygons of four vertices where "3, 4" is stated."""

    def classify(images):
        number = jnp.full(len(images), 3, jnp.int32)
        stated = jnp.stack([number, number + 1], axis=1)
        right = images[:, 0, 0, 0] > 0
        seen = jnp.where(right, 4, 5).astype(jnp.int32)
        return Counts(number, seen, right, stated)

    task = get_task("counting-polygons", classify=classify)
    batch = task.test_batch(0, np.arange(4))
    batch.image[:, 0, 0, 0] = [1, 1, 1, -1]
    still = ipr_jax.Refinement(iterations=0, first=None)
    (progress,) = evaluate.evaluate(task, never_called, batch, still, jax.random.key(0))
    line = evaluate.summarise(progress, task)
    assert (line["consistent"], line["consistent_rate"], line["uniform"]) == (3, 0.75, 3)
    assert 0.3 < line["consistent_low"] < 0.75 < line["consistent_high"] < 1


def never_called(z, t):
    raise AssertionError("nothing is refined")


def test_a_folder_that_a_killed_run_has_only_begun_is_free(tmp_path):
    with files.whole(tmp_path / "config.json") as part:
        part.write_text("{")
    begun = tmp_path / "begun"
    begun.mkdir()
    (begun / part.name).write_text("{")
    files.claim(begun, {"seed": 2})
    assert json.loads((begun / "config.json").read_text()) == {"seed": 2}
