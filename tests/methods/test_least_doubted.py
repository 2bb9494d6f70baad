"""The best of several samples by what the network doubts about them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ipr_jax
from ipr_jax import Annealed, Particles, Prediction, Refinement, Sampling
from ipr_jax.core import patches
from ipr_jax.methods import Backtracking, Langevin, LeastDoubted, Rollover, engine, walk
from ipr_jax.methods.engine import Problem
from ipr_jax.methods.scores import verifier

GRID, PATCH, BATCH = (3, 3), 2, 6
FIRST = Refinement(iterations=0, first=Sampling(steps_per_patch=3, overlap=0.5, stochasticity=0.9))
LATER = Sampling(steps_per_patch=2, overlap=0.5, stochasticity=0.9)


def follows(z, t):
    """A patch follows from what it is, as far as it is known, and from the mean of all that is."""
    known = patches.expand(1 - t, PATCH)
    seen = (z * known).sum(axis=(1, 2, 3), keepdims=True) / (
        known.sum(axis=(1, 2, 3), keepdims=True) + 0.1
    )
    image = jnp.tanh(2 * known * z + 3 * seen + 0.4 * z)
    level = patches.expand(t, PATCH)
    velocity = jnp.where(level > 0, (z - image) / jnp.where(level > 0, level, 1), 0)
    return Prediction(velocity, 0.4 + 0.1 * image, 0.1 + t)


def brighter(iteration, before, after):
    return after.mean(axis=(1, 2, 3)) > before.mean(axis=(1, 2, 3))


def problems():
    rng = np.random.default_rng(0)
    image = rng.uniform(-1, 1, (BATCH, 6, 6, 1)).astype(np.float32)
    editable = rng.random((BATCH, *GRID)) < 0.8
    editable[1] = False
    return ipr_jax.sample_keys(jax.random.key(3), BATCH), image, editable


def solve(method, *given):
    return ipr_jax.solve(follows, *(given or problems()), method=method)


@pytest.mark.parametrize(
    ("inner", "unequal"),
    [
        (FIRST, False),
        (Annealed(iterations=5, cycles=3), False),
        (Refinement(iterations=4, ratio=0.3, first=None, later=LATER, stop=brighter), True),
        (Refinement(iterations=0, first=None), False),
    ],
    ids=["first pass", "annealed", "until brighter", "at once"],
)
def test_the_answer_is_the_sample_that_is_doubted_least(inner, unequal):
    """As when samples are made, asked about and compared one by one; they may take longer or less,
    or be there from the first.
    """
    samples, parts = 4, 3
    keys, image, editable = problems()
    found = solve(LeastDoubted(method=inner, samples=samples, parts=parts))
    rows = walk.particles(Problem(keys, jnp.asarray(image), jnp.asarray(editable)), samples)
    made = solve(inner, *rows)
    own = jnp.repeat(walk.fresh_keys(keys, 0, jnp.uint32(walk.LAST_KEY)), samples)
    doubt = ipr_jax.doubts(follows, own, made.image, grid=GRID, parts=parts, rounds=2)
    doubt = np.where(rows.editable, doubt, 0).sum(axis=(1, 2)).reshape(BATCH, samples)
    chosen = doubt.argmin(axis=1)
    each = np.asarray(made.image).reshape(BATCH, samples, *image.shape[1:])
    want = each[np.arange(BATCH), chosen]
    np.testing.assert_allclose(found.image, want, atol=1e-6)
    some = editable.any(axis=(1, 2))
    assert (len(set(chosen[some])) > 1) == (inner.passes > 0)
    nfe = np.asarray(made.nfe).reshape(BATCH, samples)
    assert (nfe.max(axis=1) > nfe.min(axis=1)).any() == unequal
    np.testing.assert_array_equal(
        found.nfe, np.where(some, samples * (nfe.max(axis=1) + 2 * parts), 0)
    )
    np.testing.assert_array_equal(found.nve, 0)


def sharpened(z, t):
    """Elementwise."""
    level = patches.expand(t, PATCH)
    velocity = jnp.where(level > 0, z - jnp.clip(2 * z, -1, 1), 0)
    return Prediction(velocity, jnp.full_like(z, 0.4), 0.1 + t)


BRIGHT = verifier(
    lambda image, level, prediction: image.mean(axis=(1, 2, 3)), "independent", differentiable=True
)
GUIDED = Langevin(verifier=BRIGHT, strength=30.0, recurrences=2, smoothing=0.1)


@pytest.mark.parametrize(
    "inner",
    [
        Backtracking(verifier=BRIGHT, threshold=9.0, sampling=FIRST.first, jump=2, backtracks=4),
        Rollover(verifier=BRIGHT, evaluations=60, sampling=FIRST.first, chains=1, seeds=2, block=2),
        dataclasses.replace(GUIDED, method=FIRST),
    ],
    ids=["dfs", "rbf", "langevin"],
)
def test_a_method_does_within_what_it_does_alone(inner):
    """Up to rounding, also one that draws or decides by how many evaluations it has had."""
    with jax.enable_x64(True):
        method = LeastDoubted(method=inner, samples=1, parts=2)
        found, plain = (
            ipr_jax.solve(sharpened, *problems(), method=each) for each in (method, inner)
        )
    np.testing.assert_allclose(found.image, plain.image, atol=1e-6)
    some = problems()[2].any(axis=(1, 2))
    np.testing.assert_array_equal(found.nfe, np.asarray(plain.nfe) + 4 * some)
    for cost in ("nve", "nbe"):
        np.testing.assert_array_equal(getattr(found, cost), getattr(plain, cost))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Endless:
    """It tells how many evaluations it takes, and leaves it to others to end it."""

    def budget(self, grid):
        return 3

    def init(self, problem):
        return engine.begin(problem, problem.image, problem.editable.astype(jnp.float32), None)

    def update(self, problem, state, prediction):
        image = state.image + 1
        return state._replace(z=image, image=image, iteration=state.iteration + 1)


def test_a_method_ends_within_its_budget():
    found, plain = solve(LeastDoubted(method=Endless(), samples=2, parts=2)), solve(Endless())
    np.testing.assert_array_equal(found.image, plain.image)
    some = problems()[2].any(axis=(1, 2))
    np.testing.assert_array_equal(plain.nfe, 3 * some)
    np.testing.assert_array_equal(found.nfe, 2 * (3 + 4) * some)
    np.testing.assert_array_equal(found.iterations, some)


def test_all_samples_are_paid():
    inner = dataclasses.replace(GUIDED, method=FIRST)
    one, found = solve(inner), solve(LeastDoubted(method=inner, samples=3, parts=2))
    assert np.asarray(one.nbe).max() > 0
    np.testing.assert_array_equal(found.nve, 3 * np.asarray(one.nve))
    np.testing.assert_array_equal(found.nbe, 3 * np.asarray(one.nbe))


def test_guidance_within_and_around_has_noise_of_its_own():
    inner = LeastDoubted(method=dataclasses.replace(GUIDED, method=FIRST))
    assert dataclasses.replace(GUIDED, method=inner).on(GRID).within == 1
    assert dataclasses.replace(GUIDED, method=LeastDoubted()).on(GRID).within == 0


@pytest.mark.parametrize("denoise", [follows, sharpened], ids=["spreads", "keeps to its patch"])
def test_what_is_not_a_number_is_never_chosen(denoise):
    """A sample that the method has spoilt loses to every other one."""

    def spoilt(z, t):
        prediction = denoise(z, t)
        bad = (t == 1).all(axis=(1, 2)) & (z[:, 0, 0, 0] > 0)
        velocity = jnp.where(bad[:, None, None, None], jnp.nan, prediction.velocity)
        return prediction._replace(velocity=velocity)

    keys, image, _ = problems()
    editable = np.ones((BATCH, *GRID), bool)
    given = (spoilt, keys, image, editable)
    first = ipr_jax.solve(*given, method=FIRST)
    assert 0 < np.asarray(first.finite).sum() < BATCH
    found = ipr_jax.solve(*given, method=LeastDoubted(method=FIRST, samples=8, parts=2))
    assert np.asarray(found.finite).all()
    assert np.isfinite(found.image).all()


def test_an_image_that_it_starts_from_is_checked():
    keys, image, editable = problems()
    given = Refinement(iterations=1, first=None, later=LATER)
    with pytest.raises(ValueError, match="finite"):
        solve(LeastDoubted(method=given), keys, image * np.nan, np.ones_like(editable))
    assert LeastDoubted(method=given).start == ipr_jax.methods.INPUT


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"samples": 0}, "samples must be a whole number of at least 1, got 0"),
        ({"parts": 1}, "parts must be a whole number of at least 2, got 1"),
        ({"parts": 10}, "parts must be .* got 10"),
        ({"method": 3}, "method must have init.* got 3"),
        ({"method": FIRST.on(GRID)}, "method must tell how many evaluations it takes"),
        (
            {"method": Particles(particles=2, score=verifier(lambda *_: 0, "internal"))},
            "must evaluate one image of a problem at a time, got one that evaluates 2",
        ),
    ],
)
def test_what_cannot_be_compared_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        solve(dataclasses.replace(LeastDoubted(method=FIRST), **change))
