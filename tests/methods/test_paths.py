"""Search over paths and cycles: what they cost, what they keep, and when they end."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toys import BRIGHT, FLAT, GRID, SAMPLING, SHAPE, brightness, fake, problems

import ipr_jax
from ipr_jax import Sampling
from ipr_jax.methods import Cycles, Paths, engine, walk
from ipr_jax.methods.engine import Problem
from ipr_jax.sampling import step as steps
from ipr_jax.sampling.step import PassState

LENGTH = np.array([4, 6, 8, 10, 4])
"""Steps of the passes."""


COMMON = {"verifier": BRIGHT, "sampling": SAMPLING}


def solve(method):
    return ipr_jax.solve(fake, *problems(), method=method)


def of_cost(length, first, back, rounds, particles):
    """Evaluations, counted round by round."""
    start = here = max(1, round(first * length)) if rounds else length
    total = here
    for number in range(1, rounds + 1):
        there = start + (length - start) * number // rounds
        undone = max(1, round(back * length)) if back else 0
        total += max(1, there - max(0, here - undone))
        here = there
    return particles * total


@pytest.mark.parametrize(("rounds", "first", "back"), [(3, 0.5, 0.3), (2, 0.7, 1.0), (4, 1.0, 0.1)])
def test_paths_cost_a_pass_and_what_is_undone(rounds, first, back):
    method = Paths(**COMMON, keep=2, branches=3, rounds=rounds, first=first, back=back)
    found = solve(method)
    want = [of_cost(length, first, back, rounds, 6) for length in LENGTH]
    np.testing.assert_array_equal(found.nfe, want)
    np.testing.assert_array_equal(found.nve, 6 * (rounds + 1))
    np.testing.assert_array_equal(found.iterations, method.passes)
    assert method.budget(GRID) == max(want)


def test_a_single_path_is_a_plain_pass():
    """Bit for bit as XLA is by default; tests may see another rounding, see conftest."""
    plain = ipr_jax.generate(fake, *problems(), SAMPLING)
    for method in (
        Paths(verifier=FLAT, sampling=SAMPLING, keep=1, branches=1, rounds=2, back=0.0),
        Cycles(verifier=FLAT, sampling=SAMPLING, keep=1, branches=1, rounds=0, back=(0.5,)),
    ):
        found = solve(method)
        np.testing.assert_allclose(found.image, plain.image, rtol=0, atol=5e-7)
        np.testing.assert_array_equal(found.nfe, plain.nfe)


@pytest.mark.parametrize("by_seed", [True, pytest.param(False, marks=pytest.mark.heavy)])
def test_the_best_of_each_seed_or_of_all_go_on(by_seed):
    keys, image, editable = problems()
    queue = Problem(keys, jnp.asarray(image), jnp.ones(editable.shape, bool))
    made = Paths(**COMMON, keep=2, branches=3, rounds=1, first=0.5, back=0.0, by_seed=by_seed).on(
        GRID
    )

    @jax.jit
    def choose(made, work):
        """The fifth evaluation of ten, after which is the first choice."""
        before = engine.advance(fake, made, queue, work, ticks=4).state
        found = fake(before.z, before.t)
        rows, count = walk.particles(queue, 6), jnp.full(30, 4, jnp.int32)
        place = PassState(before.z, walk.flat(before.memory.start))
        moved, _ = made.walk.move(rows, place, count, count, found)
        score = brightness(steps.clean(before.z, before.t, found))
        return walk.grouped((score, moved.z), 6), made.update(queue, before, found)

    (score, moved), after = choose(made, engine.at_once(jax.jit(made.init)(queue)))
    np.testing.assert_array_equal(after.iteration, 1)
    score, found = np.asarray(score), np.asarray(after.z).reshape(5, 2, 3, *SHAPE)
    for sample in range(5):
        best = np.argsort(-score[sample])[:2]
        if by_seed:
            best = [score[sample, :3].argmax(), 3 + score[sample, 3:].argmax()]
        for seed in range(2):
            for copy in range(3):
                want = moved[sample, best[seed]]
                np.testing.assert_allclose(found[sample, seed, copy], want, atol=1e-6)
        np.testing.assert_allclose(brightness(after.image)[sample], score[sample].max(), atol=1e-6)


def test_cycles_keep_the_best_that_there_has_been():
    found = [
        solve(Cycles(**COMMON, keep=2, branches=2, rounds=rounds, back=(0.25, 0.5)))
        for rounds in range(5)
    ]
    scores = np.array([np.asarray(brightness(each.image)) for each in found])
    assert (np.diff(scores, axis=0) >= 0).all()
    assert (scores[-1] > scores[0]).all()
    want = [of_cost(length, 1.0, 0.5, 4, 4) for length in LENGTH]
    np.testing.assert_array_equal(found[4].nfe, want)
    np.testing.assert_array_equal(found[4].nve, 4 * 5)


def test_cycles_end_when_nothing_new_is_kept():
    common = {"sampling": SAMPLING, "rounds": 9, "patience": 2}
    flat = solve(Cycles(verifier=FLAT, **common))
    np.testing.assert_array_equal(flat.iterations, 3)  # a first pass and two rounds of equals
    bright = solve(Cycles(verifier=BRIGHT, **common))
    assert len(set(np.asarray(bright.iterations))) > 1
    assert (np.asarray(bright.iterations) > 3).any()


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        (Paths, {"verifier": None}, "verifier must be a Verifier, .* got None"),
        (Paths, {"branches": 0}, "branches must be a whole number of at least 1, got 0"),
        (Paths, {"keep": 0}, "keep must be a whole number of at least 1, got 0"),
        (Paths, {"rounds": 0}, "rounds must be a whole number of at least 1, got 0"),
        (Paths, {"first": 0.0}, r"first must be in \(0, 1\], got 0.0"),
        (Paths, {"back": 1.5}, r"back must be in \[0, 1\], got 1.5"),
        (
            Paths,
            {"back": 0.0, "sampling": Sampling(stochasticity=0.0)},
            "stochasticity of sampling must be above 0, else copies that do not go back would stay",
        ),
        (Cycles, {"back": (0.0,)}, r"back must be in \(0, 1\], got 0.0"),
        (Cycles, {"back": 0.5}, "back must be a tuple of at least one share, got 0.5"),
        (Cycles, {"back": (0.1, 0.2, 0.3)}, "at most one share for each of 2 branches, got 3"),
        (Cycles, {"patience": 0}, "patience must be a whole number of at least 1, got 0"),
    ],
)
def test_impossible_choices_are_refused(kind, change, message):
    with pytest.raises(ValueError, match=message):
        kind(**(COMMON | change))
