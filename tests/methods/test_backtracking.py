"""Depth-first search: what it costs, what it keeps, and that it finds what the verifier wants."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import golden
from toys import BRIGHT, PATCH, SAMPLING, brightness, fake

import ipr_jax
from ipr_jax import Prediction, Sampling
from ipr_jax.methods.backtracking import Backtracking
from ipr_jax.methods.engine import Problem
from ipr_jax.methods.scores import verifier
from ipr_jax.sampling.step import PassState

GRID, SHAPE = (3, 3), (6, 6, 1)


def problems(number=5, seed=0):
    rng = np.random.default_rng(seed)
    image = rng.uniform(-1, 1, (number, *SHAPE)).astype(np.float32)
    editable = rng.random((number, *GRID)) < 0.8
    return ipr_jax.sample_keys(jax.random.key(seed), number), image, editable


def solve(threshold, given=None, **change):
    method = Backtracking(
        **({"verifier": BRIGHT, "threshold": threshold, "sampling": SAMPLING, "checks": 3} | change)
    )
    return ipr_jax.solve(fake, *(given or problems()), method=method), method


@pytest.mark.parametrize(("jump", "backtracks"), [(2, 4), (1, 3), (5, 0)])
def test_it_costs_a_pass_and_what_it_goes_back(jump, backtracks):
    plain = ipr_jax.generate(fake, *problems(), SAMPLING)
    found, method = solve(-np.inf, jump=jump, backtracks=backtracks)
    np.testing.assert_array_equal(found.nfe, plain.nfe)
    np.testing.assert_array_equal(found.image, plain.image)
    np.testing.assert_array_equal(found.nve, 3)
    found, _ = solve(np.inf, jump=jump, backtracks=backtracks)
    # All of them at the first check, before which there are more steps than it jumps.
    first = -(-np.asarray(plain.nfe) // 3)
    again = np.minimum(jump + 1, first)
    np.testing.assert_array_equal(found.nfe, np.asarray(plain.nfe) + backtracks * again)
    np.testing.assert_array_equal(found.nve, 3 + backtracks)
    assert np.max(found.nfe) <= method.budget(GRID)


def test_the_best_of_what_it_has_had_goes_on():
    """With every visit one more candidate at the last check, the answer never gets worse."""
    threshold = (-np.inf, -np.inf, np.inf)
    found = [solve(threshold, jump=3, backtracks=n)[0] for n in range(5)]
    scores = np.array([np.asarray(brightness(each.image, None, None)) for each in found])
    assert (np.diff(scores, axis=0) >= 0).all()
    assert (scores[-1] > scores[0]).sum() >= 4
    np.testing.assert_array_equal(found[4].nfe, np.asarray(found[0].nfe) + 4 * (3 + 1))
    clue = ~np.kron(problems()[2], np.ones((1, PATCH, PATCH), bool))
    np.testing.assert_array_equal(np.asarray(found[4].image)[clue], problems()[1][clue])


def test_what_cannot_be_told_is_below_every_threshold():
    blind = verifier(lambda image, level, prediction: image[:, 0, 0, 0] * jnp.nan, "internal")
    found, _ = solve(-1e9, verifier=blind, jump=1, backtracks=2)
    plain = ipr_jax.generate(fake, *problems(), SAMPLING)
    np.testing.assert_array_equal(found.nfe, np.asarray(plain.nfe) + 2 * 2)
    assert np.isfinite(found.image).all()


def test_it_walks_as_the_published_search_does():
    """With the same scores: one patch, whose predicted image is the score."""
    want = golden("search/backtracking.npz")
    length, checks = int(want["length"]), int(want["checks"])
    made = Backtracking(
        verifier=verifier(lambda image, level, prediction: image[:, 0, 0, 0], "oracle"),
        threshold=float(want["threshold"]),
        sampling=Sampling(steps_per_patch=length, overlap=1.0),
        checks=checks,
        jump=int(want["jump"]),
        backtracks=int(want["backtracks"]),
    ).on((1, 1))
    image, editable = np.zeros((1, 1, 1, 1), np.float32), np.ones((1, 1, 1), bool)
    keys = ipr_jax.sample_keys(jax.random.key(0), 1)
    problem = Problem(keys, jnp.asarray(image), jnp.asarray(editable))

    @jax.jit
    def evaluate(state, score):
        velocity = (state.z - score) / state.t[..., None]
        found = Prediction(velocity, jnp.zeros_like(state.z), jnp.ones_like(state.t))
        after, _ = made.walk.move(
            problem,
            PassState(state.z, state.memory.start),
            state.memory.step,
            state.costs.nfe,
            found,
        )
        new = made.update(problem, state, found)
        return new._replace(costs=new.costs._replace(nfe=new.costs.nfe + 1)), after.z

    for case in range(3):
        state, moved = jax.jit(made.init)(problem), []
        scores, steps, used, chosen = (
            want[f"{name}_{case}"] for name in ("scores", "steps", "used", "chosen")
        )
        for number, score in enumerate(scores):
            assert not state.done[0]
            assert int(state.memory.step[0]) == steps[number]
            state, after = evaluate(state, score)
            moved.append(after)
            assert int(state.memory.used[0]) == used[number]
            if chosen[number] >= 0:
                np.testing.assert_array_equal(state.z, moved[chosen[number]])
        assert state.done[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"verifier": None}, "verifier must be a Verifier, .* got None"),
        ({"verifier": brightness}, "verifier must be a Verifier, .* got brightness"),
        ({"threshold": (0.0, 1.0)}, "one number or one for each of 8 checks, got 2"),
        ({"threshold": np.nan}, "threshold must be a number, got nan"),
        ({"checks": 0}, "checks must be a whole number of at least 1, got 0"),
        ({"jump": 0}, "jump must be a whole number of at least 1, got 0"),
        ({"backtracks": -1}, "backtracks must be a whole number of at least 0, got -1"),
    ],
)
def test_impossible_choices_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Backtracking(**({"verifier": BRIGHT, "threshold": 0.0} | change))
