"""Evaluation: progress, batch sizes, costs, broken samples, the summary."""

import dataclasses
import json
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ipr_jax
from ipr_jax import FIRST_PASS, REFINEMENT, Prediction, Sampling
from ipr_jax.core import patches
from ipr_jax.interrupts import PreemptionError
from ipr_jax.methods import Annealed, Solved, selection
from ipr_jax.methods.engine import Costs
from ipr_jax.methods.ipr import Refinement
from ipr_jax.runtime import memory
from ipr_jax.studies import evaluate as loop
from ipr_jax.studies import shards
from ipr_jax.studies.evaluate import Progress, evaluate, summarise, summarise_stream
from ipr_jax.tasks import get_task
from ipr_jax.tasks.base import Batch

TASK = get_task("mini-sudoku")
PATCH = 8
EXPERIMENT = Refinement(iterations=3)
KEY = jax.random.key(7)
RESULTS = ("image", "finite", "costs", "scores")


def fake(z, t):
    """An elementwise denoiser whose certainty differs from patch to patch."""
    velocity = 0.9 * z * patches.expand(t, PATCH) + 0.1
    means = patches.patch_mean(jnp.abs(z[..., 0]), PATCH)
    return Prediction(velocity, 0.4 + 0.2 * jnp.tanh(z), 0.1 + means)


@pytest.fixture(scope="module")
def batch():
    return TASK.test_batch(3, np.arange(7))


@pytest.fixture(scope="module")
def whole(batch):
    """The progress with the fake, all seven samples at once."""
    return list(evaluate(TASK, fake, batch, EXPERIMENT, KEY, batch_size=7))


def keep(image):
    return image


# --- the loop -------------------------------------------------------------------------------------


def test_progress_is_yielded_after_the_first_pass_and_every_iteration(whole, batch):
    assert [progress.iteration for progress in whole] == [0, 1, 2, 3]
    for progress in whole:
        assert progress.image.shape == batch.image.shape
        assert progress.finite.all()
        want = TASK.score(jnp.asarray(progress.image))
        chex.assert_trees_all_equal(progress.scores, jax.device_get(want))
        clue = ~np.kron(batch.editable, np.ones((1, PATCH, PATCH), bool))
        np.testing.assert_array_equal(progress.image[clue], batch.image[clue])
    since, own = (
        np.array([getattr(progress, name) for progress in whole])
        for name in ("seconds", "iteration_seconds")
    )
    assert (own > 0).all()
    assert (np.cumsum(own) <= since).all()


def test_the_batch_size_changes_nothing_and_is_compiled_once(whole, batch):
    calls = 0

    def counting(z, t):
        nonlocal calls
        calls += 1
        return fake(z, t)

    for denoise, batch_size in ((counting, 3), (fake, 64)):
        run = evaluate(TASK, denoise, batch, EXPERIMENT, KEY, batch_size=batch_size)
        for got, want in zip(run, whole, strict=True):
            for name in RESULTS:
                chex.assert_trees_all_equal(getattr(got, name), getattr(want, name))
    assert calls == 1  # of all passes


@pytest.mark.heavy
def test_nor_does_it_with_a_real_model(tiny_model, batch):
    experiment = Refinement(iterations=2)
    whole, parts = (
        list(evaluate(TASK, tiny_model, batch, experiment, KEY, batch_size=batch_size))
        for batch_size in (7, 3)
    )
    for one, other in zip(whole, parts, strict=True):
        np.testing.assert_allclose(one.image, other.image, atol=1e-4)
        for name in RESULTS[1:]:
            chex.assert_trees_all_equal(getattr(one, name), getattr(other, name))


def same_results(got, want):
    for one, other in zip(got, want, strict=True):
        for name in RESULTS:
            chex.assert_trees_all_equal(getattr(one, name), getattr(other, name))


def test_auto_is_as_many_as_fit_and_is_reported(whole, batch, monkeypatch):
    def three(needed, available, most):
        assert most == 7
        assert available == 10**9 - 4 * batch.image.nbytes
        assert needed(7) > 7 * 3 * 32 * 32 * 4
        return 3

    monkeypatch.setattr(memory, "usable_bytes", lambda: 10**9)
    monkeypatch.setattr(memory, "largest", three)
    got = list(evaluate(TASK, fake, batch, EXPERIMENT, KEY, batch_size="auto"))
    same_results(got, whole)
    assert [summarise(progress, TASK)["batch_size"] for progress in got] == [3] * 4
    assert [summarise(progress, TASK)["batch_size"] for progress in whole] == [7] * 4


def full(function, largest, begin=0):
    """A compiled function that runs out of memory beyond some images, from a pass on."""

    def run(denoise, method, problem, state, passes, ticks, **static):
        if len(state.image) > largest and passes >= begin:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
        return function(denoise, method, problem, state, passes, ticks, **static)

    return run


@pytest.mark.parametrize(
    ("begin", "sizes", "seconds"), [(0, [3, 3, 3, 3], loop.CHUNK_SECONDS), (3, [7, 7, 3, 3], 0)]
)
def test_a_full_memory_halves_the_batch_and_changes_nothing(
    whole, batch, monkeypatch, begin, sizes, seconds
):
    monkeypatch.setattr(loop, "CHUNK_SECONDS", seconds)
    monkeypatch.setattr(loop, "advance_on", full(loop.advance_on, 4, begin))
    with pytest.warns(UserWarning, match="out of memory with 7 samples at once, going on with 3"):
        got = list(evaluate(TASK, fake, batch, EXPERIMENT, KEY))
    same_results(got, whole)
    assert [progress.batch_size for progress in got] == sizes


def test_a_memory_that_is_full_with_one_sample_is_an_error(batch, monkeypatch):
    monkeypatch.setattr(loop, "advance_on", full(loop.advance_on, 0))
    correction = Refinement(iterations=1, first=None)
    run = evaluate(TASK, fake, batch, correction, KEY)
    warned = pytest.warns(UserWarning, match="out of memory")
    with warned, pytest.raises(jax.errors.JaxRuntimeError, match="EXHAUSTED"):
        next(run)


def test_costs_add_up_as_planned(whole, batch):
    num_editable = batch.editable.sum((1, 2))
    sizes = selection.region_sizes(16, EXPERIMENT.ratio)[num_editable]
    first = FIRST_PASS.settings(16).plan.num_steps[num_editable]
    later = REFINEMENT.settings(16).plan.num_steps[sizes]
    assert len(set(num_editable)) > 1
    for progress in whole:
        np.testing.assert_array_equal(progress.costs.nfe, first + progress.iteration * later)


def test_it_is_generate_then_refine_with_every_choice_passed_on(batch):
    experiment = Refinement(
        iterations=2,
        ratio=0.5,
        first=Sampling(steps_per_patch=2, overlap=0.5, order=ipr_jax.raster_order),
        later=Sampling(steps_per_patch=4, stochasticity=1.0, order=ipr_jax.random_order),
        select=ipr_jax.fixed_regions,
        noise=ipr_jax.initial_noise,
    )
    got = list(evaluate(TASK, fake, batch, experiment, KEY))
    keys = ipr_jax.sample_keys(KEY, 7)
    first = ipr_jax.generate(fake, keys, batch.image, batch.editable, experiment.first)
    later = ipr_jax.refine(
        fake,
        keys,
        first.image,
        batch.editable,
        iterations=2,
        ratio=0.5,
        sampling=experiment.later,
        select=ipr_jax.fixed_regions,
        noise=ipr_jax.initial_noise,
        record=keep,
    )
    for progress, image in zip(got, [first.image, *later.recorded], strict=True):
        np.testing.assert_allclose(progress.image, image, atol=2e-6)
    np.testing.assert_array_equal(got[-1].costs.nfe, first.nfe + later.nfe.sum(0))


def breaking(z, t):
    """The fake, but not a number where the first clue pixel is 1."""
    prediction = fake(z, t)
    velocity = jnp.where(z[:, :1, :1] == 1, jnp.nan, prediction.velocity)
    return prediction._replace(velocity=velocity)


def always_valid(images):
    return {
        "valid": jnp.ones(images.shape[0], bool),
        "violations": (images.sum((1, 2, 3)) > 0).astype(jnp.int32),
    }


def test_some_samples_are_taken_with_all_their_particles_and_put_together_again():
    tree = {"one": np.arange(5), "two": np.arange(20).reshape(10, 2), "none": np.zeros((5, 0))}
    parts = [loop._take(tree, np.array(rows), 5) for rows in ([0, 1], [2, 3], [4, 0])]
    np.testing.assert_array_equal(parts[2]["one"], [4, 0])
    np.testing.assert_array_equal(parts[2]["two"], [[16, 17], [18, 19], [0, 1], [2, 3]])
    chex.assert_trees_all_equal(loop._joined(parts, 2, 5), tree)


@pytest.mark.parametrize("size", [3, 7])
def test_it_ends_before_the_first_evaluation_if_told_so(batch, size):
    steps = evaluate(TASK, fake, batch, EXPERIMENT, KEY, batch_size=size, preempted=lambda: True)
    with pytest.raises(PreemptionError):
        next(steps)


@pytest.mark.parametrize("size", [2, 7])
def test_only_what_has_changed_is_scored_again(batch, size):
    """Of several cycles, after the first one the answer changes at the end of a cycle at most."""
    scored = []

    def score(image):
        jax.debug.callback(lambda image: scored.append(len(image)), image)
        return TASK.score(image)

    task = dataclasses.replace(TASK, score=score)
    method = Annealed(iterations=3, cycles=3, calm=0.0, finish_steps=0)
    run = list(evaluate(task, fake, batch, method, KEY, batch_size=size))
    jax.effects_barrier()
    before = np.full_like(batch.image, np.nan)
    want = [size]  # to compile
    for progress in run:
        image = np.asarray(progress.image)
        changed = (image != before).any(axis=(1, 2, 3)).sum()
        want += [size] * -(-changed // size)
        chex.assert_trees_all_equal(progress.scores, jax.device_get(TASK.score(image)))
        before = image
    assert scored == want
    one, other = (progress.scores["violations"] for progress in run[-2:])
    assert not np.shares_memory(one, other)
    assert len(want) <= 1 + 5 * -(-7 // size)  # of nine iterations


@pytest.mark.parametrize("broken", [0, 4])
def test_a_sample_that_breaks_is_reported_alone(batch, broken):
    """In batches of three, where sample 0 also fills up the last one."""
    image, editable = batch.image.copy(), batch.editable.copy()
    editable[:, 0, 0] = False
    image[:, 0, 0] = 0.0
    image[broken, 0, 0] = 1.0
    marked = Batch(image, editable, batch.label)
    task = dataclasses.replace(TASK, score=always_valid)
    got = list(evaluate(task, breaking, marked, EXPERIMENT, KEY, batch_size=3))
    want = list(evaluate(task, fake, marked, EXPERIMENT, KEY, batch_size=7))
    others = np.arange(7) != broken
    for one, other in zip(got, want, strict=True):
        np.testing.assert_array_equal(one.finite, others)
        np.testing.assert_array_equal(one.scores["valid"], others)
        for name in RESULTS:
            pair = getattr(one, name), getattr(other, name)
            chex.assert_trees_all_equal(*jax.tree.map(lambda leaf: np.asarray(leaf)[others], pair))
        line = summarise(one, TASK)
        assert (line["samples"], line["not_finite"], line["valid"]) == (7, 1, 6)
        assert line["valid_rate"] == 1.0


# --- the summary ----------------------------------------------------------------------------------


def progress_of(valid, violations, finite):
    number = len(valid)
    return Progress(
        iteration=2,
        image=jnp.zeros((number, 1, 1, 1)),
        state=None,
        scores={"valid": np.array(valid), "violations": np.array(violations, np.int32)},
        finite=np.array(finite),
        costs=Costs(np.arange(number), np.arange(number) + 1, np.arange(number) + 2),
        compile_seconds=5.0,
        seconds=9.0,
        iteration_seconds=4.0,
        batch_size=3,
    )


def assert_an_interval(line, name, variance, quantile, number, most):
    """Its ends are what a rate would have to be for its variance to reach the mean."""
    mean, ends = line[name], (line[f"{name}_low"], line[f"{name}_high"])
    assert ends[0] < mean < ends[1]
    for end in ends:
        scale = end * (most - end) / (mean * (most - mean))
        assert (mean - end) ** 2 == pytest.approx(quantile**2 * variance * scale / number)


def test_a_line_counts_the_finite_samples_only():
    line = summarise(
        progress_of(
            [True, False, True, False, False], [0, 2, 0, 4, 99], [True, True, True, True, False]
        ),
        TASK,
    )
    variance = (1.5**2 + 0.5**2 + 1.5**2 + 2.5**2) / 3
    assert_an_interval(line, "violations", variance, 3.182446, 4, 72)  # Student's t, 3 degrees
    assert line == pytest.approx(
        {
            "iteration": 2,
            "samples": 5,
            "batch_size": 3,
            "not_finite": 1,
            "valid": 2,
            "valid_rate": 0.5,
            "valid_low": line["valid_low"],
            "valid_high": 1 - line["valid_low"],
            "violations": 1.5,
            "violations_low": line["violations_low"],
            "violations_high": line["violations_high"],
            "nfe": 2.0,
            "nbe": 3.0,
            "nve": 4.0,
            "seconds": 9.0,
            "samples_per_second": 1.25,
        },
        rel=1e-4,
    )


def test_a_stream_is_a_line_with_what_it_saved():
    progress = progress_of([True, False, False], [0, 2, 4], [True] * 3)
    zeros = np.zeros(3, np.int32)
    iterations, nfe = np.array([2, 1, 0], np.int32), np.array([30, 20, 10], np.int32)
    found = Solved(progress.image, iterations, zeros == 0, nfe, zeros, zeros, np.int32(80))
    line = summarise_stream(progress, TASK, found)
    assert line == line | summarise(progress, TASK)
    assert (line["iterations"], line["left_early"], line["wasted"]) == (1, 2, 0.25)
    assert line["left_early_rate"] == pytest.approx(2 / 3)
    assert_an_interval(line, "iterations", 1, 4.302653, 3, 2)
    assert {"left_early_low", "left_early_high"} <= line.keys()


def test_nothing_finite_gives_no_rate_and_one_sample_no_interval():
    none = summarise(progress_of([False] * 3, [7] * 3, [False] * 3), TASK)
    assert (none["samples"], none["not_finite"], none["valid"]) == (3, 3, 0)
    assert not {"valid_rate", "valid_low", "valid_high", "violations"} & set(none)
    one = summarise(progress_of([False], [7], [True]), TASK)
    assert one["violations"] == 7.0
    assert not {"violations_low", "violations_high"} & set(one)
    for line in (none, one):
        assert json.loads(json.dumps(line, allow_nan=False)) == line


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"iterations": -1}, "iterations must be a whole number of at least 0, got -1"),
        ({"ratio": 0.0}, r"ratio must be in \(0, 1\], got 0.0"),
        ({"ratio": 1.5}, r"ratio must be in \(0, 1\], got 1.5"),
        ({"ratio": float("nan")}, r"ratio must be in \(0, 1\], got nan"),
    ],
)
def test_impossible_experiments_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Refinement(**change)


def test_bad_batches_are_refused_before_anything_is_compiled(batch):
    def never(z, t):
        raise AssertionError("traced")

    loud = batch.image.copy()
    loud[6][~np.kron(batch.editable[6], np.ones((PATCH, PATCH), bool))] = 1.5
    for change, batch_size, message in [
        ({"image": batch.image[:0], "editable": batch.editable[:0]}, 7, "num_samples .* got 0"),
        ({"image": batch.image.astype(np.float64)}, 7, "float32"),
        ({"editable": batch.editable[:5]}, 7, r"editable must be \[7, h, w\]"),
        ({"editable": np.tile(batch.editable, (2, 1, 1))}, 7, r"editable must be \[7, h, w\]"),
        (
            {"image": loud},
            3,
            r"clue pixels must be in \[-1, 1\], got a magnitude of 1.5 in sample 6",
        ),
        ({}, 0, 'batch_size must be a whole number of at least 1 or "auto", got 0'),
    ]:
        with pytest.raises(ValueError, match=message):
            next(
                evaluate(
                    TASK, never, batch._replace(**change), EXPERIMENT, KEY, batch_size=batch_size
                )
            )


def test_correction_starts_from_the_given_images():
    """Boards with two cells swapped: nothing is evaluated first, and every patch may change."""
    batch = TASK.test_batch(0, np.arange(3))
    image = batch.image.copy()
    image[:, :8, :8], image[:, 8:16, 16:24] = batch.image[:, 8:16, 16:24], batch.image[:, :8, :8]
    batch = batch._replace(image=image, editable=np.ones_like(batch.editable))
    correction = Refinement(iterations=2, first=None)
    given, *_, last = evaluate(TASK, fake, batch, correction, jax.random.key(0))
    np.testing.assert_array_equal(given.image, image)
    assert not given.costs.nfe.any()
    assert (last.costs.nfe > 0).all()
    assert (np.asarray(last.image) != image).any()
    broken = batch._replace(image=np.where(image > 0, np.nan, image))
    with pytest.raises(ValueError, match="magnitude of nan"):
        evaluate(TASK, fake, broken, correction, jax.random.key(0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rates": ("solved",)}, "rates of the task mini-sudoku must be scores that are bool, val"),
        ({"rates": ("violations",)}, "that are bool, valid; got 'violations'"),
        ({"means": {"valid": 1}}, "means of the task .* that are numbers, violations; got 'valid'"),
    ],
)
def test_a_task_that_does_not_score_what_it_tells_is_refused(tmp_path, batch, change, message):
    task = dataclasses.replace(TASK, **change)
    with pytest.raises(ValueError, match=message):
        evaluate(task, fake, batch, EXPERIMENT, KEY, batch_size=2)
    with pytest.raises(ValueError, match=message):
        loop.evaluate_stream(task, fake, batch, EXPERIMENT, KEY, slots=2)
    test = partial(task.test_batch, 0)
    run = shards.Run(task=task, denoise=fake, source=test, experiment=EXPERIMENT, samples=2, seed=0)
    with pytest.raises(ValueError, match=message):
        shards.refine(run, tmp_path / "run", {})
    assert not list(tmp_path.iterdir())
