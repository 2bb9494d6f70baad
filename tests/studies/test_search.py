"""Searches by name: what they are made of, what they may cost, and how they are run."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from conftest import call
from small_run import fake

import ipr_jax
from ipr_jax import Particles
from ipr_jax.cli.shown import cost_table
from ipr_jax.methods import LeastDoubted
from ipr_jax.methods.scores import KINDS
from ipr_jax.sampling import FIRST_PASS, REFINEMENT, Sampling
from ipr_jax.studies import experiments, report, search
from ipr_jax.tasks import get_task

TASK = get_task("mini-sudoku")
BOTH = {"first": FIRST_PASS, "later": REFINEMENT}


def made(name, budget=None, **changes):
    usual = "independent-soft" if name in search.GRADIENTS else "independent"
    verifier = changes.pop("verifier", "internal" if name in search.ALONE else usual)
    return search.made(TASK, name, verifier, **BOTH | changes, budget=budget)


@pytest.mark.parametrize("name", search.METHODS)
@pytest.mark.parametrize("budget", [150, 200])
def test_none_may_cost_more_than_its_budget(name, budget):
    method = made(name, budget)
    assert 48 <= method.budget(TASK.grid) <= budget
    assert search.kind_of(method) == ("internal" if name in search.ALONE else "independent")


@pytest.mark.parametrize("name", ["ipr-accept", "ipr-chains"])
@pytest.mark.parametrize("ratio", [0.1, 0.5, 1.0, (0.1, 1.0), (1.0, 0.1)])
def test_nor_do_larger_regions_cost_more(name, ratio):
    method = made(name, 200, ratio=ratio)
    assert method.refinement.ratio == ratio
    assert 200 - 2 * 48 < method.budget(TASK.grid) <= 200


def test_particles_are_as_many_as_the_budget_holds():
    assert [made("bfs", budget).particles for budget in (48, 95, 96)] == [1, 1, 2]


def test_the_experiment_leaves_out_what_does_not_fit():
    arms = set(experiments.searches(get_task("even-pixels"), 0).arms)
    assert {"sop, internal, 3 passes", "abcd, internal, 6 passes"} <= arms
    assert "abcd, internal, 3 passes" not in arms


def test_what_a_method_chooses_by_is_named():
    assert search.kind_of(ipr_jax.Refinement()) is None
    assert search.kind_of(ipr_jax.Annealed()) is None
    for name, kind in (("internal", "internal"), ("oracle", "oracle")):
        assert search.kind_of(made("dfs", verifier=name)) == kind
    within = LeastDoubted(method=made("ipr-accept", verifier="oracle"))
    assert search.kind_of(within) == "oracle"
    assert set(KINDS) == {"internal", "independent", "oracle"}


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("luck", {}, "method must be one of best-of-n, .*, got 'luck'"),
        ("dfs", {"budget": 47}, "budget must be at least a first pass, 48 here, got 47"),
        ("sop", {"budget": 60}, "budget must hold a round of Paths, got 60"),
        (
            "rbf",
            {"budget": 48},
            "budget must do for Rollover, got 48: evaluations must be at least",
        ),
        ("ipr-chains", {"budget": 95}, "a first pass of each of two chains, 96 here, got 95"),
        (
            "dfs",
            {"verifier": "me"},
            "verifier of mini-sudoku must be one of oracle, .*, internal, got 'me'",
        ),
        (
            "das",
            {"verifier": "oracle"},
            "a gradient for the method das, independent-soft, got .ora",
        ),
        ("langevin", {"verifier": "internal"}, "must have a gradient for the method langevin"),
        (
            "least-doubted",
            {"verifier": "oracle"},
            "verifier must be internal for the method least-doubted, in which .* got 'oracle'",
        ),
        ("least-doubted", {"budget": 55}, "its sample, 56 here, got 55"),
    ],
)
def test_what_does_not_go_together_is_refused(name, change, message):
    with pytest.raises(ValueError, match=message) as refusal:
        made(name, **change)
    known = name in search.METHODS and change.get("verifier") != "me"
    enough = change.get("budget", 48) >= 48
    assert isinstance(refusal.value, search.UnfitError) == (known and enough)


def test_samples_are_judged_by_a_second_verifier(tmp_path):
    """Whoever chose them, and what that cost is told."""
    quick = Sampling(steps_per_patch=1, overlap=0.0)
    methods = {
        "plain": ipr_jax.Refinement(iterations=0, first=quick),
        "oracle": made("best-of-n", 32, verifier="oracle", first=quick),
    }
    arms = {label: experiments.Arm(refinement=method) for label, method in methods.items()}
    experiment = dataclasses.replace(experiments.searches(TASK, 0), arms=arms, reference="plain")
    settings = {"samples": 4, "seed": 0, "batch_size": 4, "settings": {}}
    list(experiments.run(experiment, TASK, lambda _: fake, tmp_path, **settings))
    results = json.loads((tmp_path / "results.json").read_text())
    last = {label: lines[-1] for label, lines in results["metrics"].items()}
    assert all(0 <= line["independent_rate"] <= 1 for line in last.values())
    assert {label: line["nve"] for label, line in last.items()} == {"plain": 0, "oracle": 2}
    chosen = {label: search.kind_of(method) for label, method in methods.items()}
    page = report.of_experiment(tmp_path)
    for gradients in (0, 3):
        last["oracle"]["nbe"] = gradients
        table = cost_table(TASK, last, chosen, {label: {} for label in last})
        titles = [column.header for column in table.columns]
        assert "verifier calls" in titles
        assert "independent %" in titles
        assert ("gradients" in titles) == (gradients > 0)
    assert "verifier calls" in page
    assert "gradients" not in page


def test_the_experiment_has_every_method_with_every_verifier():
    arms = experiments.searches(TASK, 0).arms
    kinds = {label: search.kind_of(arm.refinement) for label, arm in arms.items()}
    hard = set(search.METHODS) - {*search.GRADIENTS, *search.ALONE}
    of = {kind: {label for label, own in kinds.items() if own == kind} for kind in kinds.values()}
    numbers = [f"{number} passes" for number in (3, 6)]
    assert of == {
        None: {"IPR", *(f"annealed, {each}" for each in numbers)},
        "internal": {
            f"{name}, internal, {each}" for name in (*hard, *search.ALONE) for each in numbers
        },
        "oracle": {f"{name}, oracle, {each}" for name in hard for each in numbers},
        "independent": {f"{name}, independent, {each}" for name in hard for each in numbers}
        | {f"{name}, independent-soft, {each}" for name in search.GRADIENTS for each in numbers},
    }
    for number in (3, 6):
        most = [
            arm.refinement.budget(TASK.grid)
            for label, arm in arms.items()
            if label.endswith(f", {number} passes")
        ]
        assert max(most) == number * 48


def test_each_of_the_choices_of_a_search_is_changed_alone():
    arms = experiments.choices(TASK, 0).arms
    methods = {label: arm.refinement for label, arm in arms.items()}
    base = methods.pop("bfs")
    assert (base.resampling, base.temperature, base.scoring) == ("ssp", "increase", "max")
    for label, method in methods.items():
        name, value = label.split(": ")
        assert getattr(method, name) == value != getattr(base, name)
        assert dataclasses.replace(method, **{name: getattr(base, name)}) == base
    assert len(methods) == 9


@pytest.mark.heavy
@pytest.mark.parametrize("name", ["bfs", "ipr-accept"])
def test_a_search_is_a_command(tiny_folder, tmp_path, name):
    words = ("refine", "--task", "mini-sudoku", "--model", tiny_folder, "--samples", 3)
    searching = ("--method", name, "--verifier", "oracle", "--budget", 100, "--seed", 4)
    code, out, err = call(*words, *searching, "--dtype", "float32", "--out", tmp_path / "run")
    assert (code, err) == (0, "")
    assert "chosen by a verifier (oracle): not rates of refinement without one" in out
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["verifier"] == "oracle"
    (found,) = ipr_jax.shards.read(tmp_path / "run")
    assert "doubt" not in found  # these methods tell of none
    batch = TASK.test_batch(4, np.arange(3))
    solved = ipr_jax.solve(
        ipr_jax.load(tiny_folder),
        ipr_jax.sample_keys(jax.random.key(4), 3),
        batch.image,
        batch.editable,
        method=made(name, 100, verifier="oracle"),
    )
    for cost in ("nfe", "nbe", "nve"):
        np.testing.assert_array_equal(found[cost], getattr(solved, cost))
    line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert line["nve"] == np.mean(solved.nve) > 0
    np.testing.assert_allclose(found["refined"], solved.image, atol=1e-4)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--method", "luck"), "unknown --method 'luck'; known: ipr, annealed, best-of-n, "),
        (("--method", "bfs"), "--method bfs needs --verifier, see --help"),
        (("--verifier", "oracle"), "--method annealed asks no verifier, leave out --verifier"),
        (
            ("--method", "bfs", "--verifier", "oracle", "--iterations", 3),
            "--method bfs spends its --budget, leave out --iterations",
        ),
        (
            ("--method", "bfs", "--verifier", "oracle", "--ratio", 0.5),
            "--method bfs has a first pass only, leave out --ratio",
        ),
        (
            ("--method", "bfs", "--verifier", "oracle", "--budget", 3),
            "--budget must be at least a first pass, 48 here, got 3",
        ),
    ],
)
def test_a_bad_search_is_one_line(tiny_folder, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    code, out, err = call("refine", "--task", "mini-sudoku", "--model", tiny_folder, *words)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err
    assert not list(tmp_path.iterdir())


@pytest.mark.heavy
@pytest.mark.parametrize("name", search.METHODS)
def test_every_search_streams(name):
    """In its own time, whatever else is in the queue; clues stay; costs are within the budget."""
    method = made(name, 150)
    batch, keys = TASK.test_batch(0, np.arange(7)), ipr_jax.sample_keys(jax.random.key(0), 7)
    given = (fake, keys, batch.image, batch.editable)
    whole = ipr_jax.solve(*given, method=method)
    queued = ipr_jax.solve(*given, method=method, slots=3)
    for field in ("iterations", "nfe", "nbe", "nve", "finite"):
        np.testing.assert_array_equal(getattr(queued, field), getattr(whole, field))
    np.testing.assert_allclose(queued.image, whole.image, atol=1e-5)
    assert (np.asarray(whole.nfe) <= 150).all()
    assert ((np.asarray(whole.nve) > 0) == (name not in search.ALONE)).all()
    clue = ~np.kron(batch.editable, np.ones((8, 8), bool))
    np.testing.assert_array_equal(np.asarray(whole.image)[clue], batch.image[clue])
    assert isinstance(method, Particles) == (name in ipr_jax.methods.PUBLISHED)


@pytest.mark.heavy
@pytest.mark.parametrize("name", search.METHODS)
def test_every_search_works_with_64_bits(name):
    method = made(name, 150)
    batch, keys = TASK.test_batch(0, np.arange(2)), ipr_jax.sample_keys(jax.random.key(0), 2)
    with jax.enable_x64(True):
        found = ipr_jax.solve(fake, keys, batch.image, batch.editable, method=method)
    assert found.image.dtype == np.float32
    assert np.asarray(found.finite).all()
