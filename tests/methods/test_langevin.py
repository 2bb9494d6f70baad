"""Guidance with recurrence: its gradients, its costs, and its law where that is known."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toys import GRID, PATCH, SHAPE, brightness, problems

import ipr_jax
from ipr_jax import Prediction, Sampling
from ipr_jax.core import patches
from ipr_jax.methods import Langevin, walk
from ipr_jax.methods.engine import Problem
from ipr_jax.methods.langevin import guide, recur
from ipr_jax.methods.scores import verifier
from ipr_jax.sampling import step as steps
from ipr_jax.sampling.step import PassState

SAMPLING = Sampling(steps_per_patch=3, overlap=0.5, stochasticity=0.9)


def fake(z, t):
    """An elementwise denoiser whose certainty differs from patch to patch."""
    velocity = 0.9 * jnp.sin(z) * patches.expand(t, PATCH) + 0.1
    means = patches.patch_mean(jnp.abs(z[..., 0]), PATCH)
    return Prediction(velocity, 0.4 + 0.2 * jnp.tanh(z), 0.1 + means)


def wavy(image, level, prediction):
    """Not the same in any two pixels, and of products of neighbours."""
    place = jnp.arange(image[0].size, dtype=jnp.float32).reshape(1, *SHAPE)
    return jnp.sin(image + place).sum(axis=(1, 2, 3)) * image.mean(axis=(1, 2, 3))


WAVY = verifier(wavy, "independent", differentiable=True)
BRIGHT = verifier(brightness, "independent", differentiable=True)


def solve(given=None, **change):
    method = Langevin(**({"verifier": BRIGHT, "sampling": SAMPLING} | change))
    return ipr_jax.solve(fake, *(given or problems()), method=method), method


@pytest.mark.parametrize("through", [None, fake])
def test_the_shift_is_the_gradient_of_finite_differences(through, rng):
    z = jnp.asarray(rng.normal(size=(1, *SHAPE)), jnp.float32)
    t = jnp.asarray([[[0.3, 0.9], [0.0, 1.0]]], jnp.float32)
    found = fake(z, t)
    guided = jax.jit(partial(guide, WAVY, strength=0.7, through=through))(z, t, found)
    np.testing.assert_array_equal(guided.sigma, found.sigma)
    shift = np.asarray(steps.clean(z, t, guided) - steps.clean(z, t, found))[0]

    step, size = 0.02, 16
    every = np.eye(size, dtype=np.float32).reshape(size, *SHAPE) * step
    many = jnp.repeat(t, 2 * size, axis=0)
    at = z if through else steps.clean(z, t, found)
    moved = jnp.concatenate([at + every, at - every])
    image = steps.clean(moved, many, fake(moved, many)) if through else moved
    up, down = np.split(np.asarray(wavy(image, None, None)), 2)
    slope = ((up - down) / (2 * step)).reshape(SHAPE)
    level = np.asarray(patches.expand(t, PATCH))[0]
    share = level**2 / (level**2 + (1 - level) ** 2)
    if through:
        share = np.where(level < 1, level**2 / np.maximum(1 - level, 1e-9), 0)
    # Differences of scores of size 10 over 0.04, in float32, and the third derivative.
    np.testing.assert_allclose(shift, 0.7 * share * slope, atol=2e-3)
    np.testing.assert_array_equal(shift[level == 0], 0)


def test_no_patch_is_shifted_by_more_than_may_be(rng):
    z = jnp.asarray(rng.normal(size=(3, *SHAPE)), jnp.float32)
    t = jnp.full((3, *GRID), 0.5, jnp.float32)
    found = fake(z, t)
    wild, clipped = (guide(WAVY, z, t, found, strength=50.0, clip=clip) for clip in (np.inf, 0.2))

    def size(guided):
        shift = steps.clean(z, t, guided) - steps.clean(z, t, found)
        return np.sqrt(patches.patch_mean((shift**2)[..., 0], PATCH))

    assert (size(wild) > 0.3).all()
    np.testing.assert_allclose(size(clipped), 0.2, rtol=1e-4)
    broken = verifier(lambda image, *_: jnp.log(image - image).sum((1, 2, 3)), "oracle")
    np.testing.assert_array_equal(guide(broken, z, t, found, strength=1.0).velocity, found.velocity)


def test_costs_and_a_strength_of_zero():
    plain = ipr_jax.generate(fake, *problems(), SAMPLING)
    found, _ = solve(strength=0.0)
    np.testing.assert_array_equal(found.image, plain.image)
    length = np.asarray(plain.nfe)
    np.testing.assert_array_equal(found.nfe, length)
    np.testing.assert_array_equal(found.nbe, length)
    single, method = solve(strength=3.0, recurrences=3)
    np.testing.assert_array_equal(single.nfe, 3 * length)
    np.testing.assert_array_equal(single.nve, 3 * length)
    assert method.budget(GRID) == 3 * length.max()
    assert (brightness(single.image) > brightness(plain.image)).all()
    clue = ~np.kron(problems()[2], np.ones((1, PATCH, PATCH), bool))
    np.testing.assert_array_equal(np.asarray(single.image)[clue], problems()[1][clue])


def test_the_judge_has_the_last_word():
    """The first chain is the one that there is if it is the only one."""
    judged, _ = solve(verifier=WAVY, chains=3, ascents=2, judge=BRIGHT)
    alone, _ = solve(verifier=WAVY, ascents=2)
    assert (brightness(judged.image) >= brightness(alone.image)).all()
    assert (brightness(judged.image) > brightness(alone.image)).any()
    length = np.asarray(alone.nfe)
    np.testing.assert_array_equal(judged.nfe, 3 * length)
    np.testing.assert_array_equal(judged.nbe, 6 * length)
    np.testing.assert_array_equal(judged.nve, 6 * length + 3)


# --- laws -----------------------------------------------------------------------------------------

SIDE, PIXELS = 128, 128 * 128
CENTRE, WIDTH = 1.5, 0.8


def normal(z, t):
    """The exact denoiser of N(0, 1) pixels, one patch."""
    level = patches.expand(t, SIDE)
    image = (1 - level) * z / ((1 - level) ** 2 + level**2)
    velocity = (z - image) / jnp.where(level > 0, level, 1)
    return Prediction(velocity, jnp.zeros_like(z), jnp.ones_like(t))


BELL = verifier(
    lambda image, level, prediction: -((image - CENTRE) ** 2).sum(axis=(1, 2, 3)) / (2 * WIDTH**2),
    "oracle",
    differentiable=True,
)


def blank():
    keys = ipr_jax.sample_keys(jax.random.key(3), 1)
    return keys, np.zeros((1, SIDE, SIDE, 1), np.float32), np.ones((1, 1, 1), bool)


def assert_normal(found, mean, std, bias=0.0):
    """Within five standard errors of all pixels, and a bias."""
    found = np.asarray(found, np.float64)
    assert abs(found.mean() - mean) < 5 * std / PIXELS**0.5 + bias
    assert abs(found.std() - std) < 5 * std / (2 * PIXELS) ** 0.5 + bias


@pytest.mark.parametrize("recurrences", [1, 4])
def test_a_whole_pass_has_the_law_of_its_recursion(recurrences):
    """All is linear: a mean and a variance by step; draws used twice would change them."""
    length, alpha, strength = 8, 0.9, 0.6
    sampling = Sampling(steps_per_patch=length, overlap=1.0, stochasticity=alpha)
    method = Langevin(
        verifier=BELL, strength=strength, sampling=sampling, recurrences=recurrences, clip=np.inf
    )
    found = ipr_jax.solve(normal, *blank(), method=method)
    mean, var = 0.0, 1.0
    for step in range(length):
        t, s = 1 - step / length, 1 - (step + 1) / length
        spread = t**2 + (1 - t) ** 2
        pull = strength * t**2 / spread / WIDTH**2
        slope, offset = (1 - t) / spread * (1 - pull), pull * CENTRE
        b = (1 - t) * s / ((1 - s) * t)
        gamma, sigma = s * np.sqrt(1 - alpha**2 * (1 - b**2)), alpha * s * np.sqrt(1 - b**2)
        factor = (1 - s) * slope + gamma * (1 - (1 - t) * slope) / t
        added = (1 - s) * offset - gamma * (1 - t) * offset / t
        kept = (1 - t) / (1 - s)
        for turn in range(recurrences):
            mean, var = factor * mean + added, factor**2 * var + sigma**2
            if turn + 1 < recurrences:
                mean, var = kept * mean, kept**2 * var + t**2 - (kept * s) ** 2
    assert_normal(found.image, mean, var**0.5)


@pytest.mark.parametrize("through", [None, pytest.param(normal, marks=pytest.mark.heavy)])
def test_a_step_made_again_and_again_is_langevin(through):
    """At one level, in the limit of small steps, its law is q_t(z) exp(strength score(x0(z))).

    The bias is first order in the size of the step, here 1/200.
    """
    length, strength = 200, 0.6
    sampling = Sampling(steps_per_patch=length, overlap=1.0, stochasticity=1.0)
    own = walk.Walk.of(sampling, (1, 1))
    rows = Problem(*map(jnp.asarray, blank()))
    t = 0.5
    step, turns = jnp.full(1, length // 2, jnp.int32), 300

    @jax.jit
    def run(rows):
        level = jnp.full((1, 1, 1), t, jnp.float32)

        def turn(state, count):
            found = normal(state.z, level)
            guided = guide(BELL, state.z, level, found, strength=strength, through=through)
            again = jnp.ones(1, bool)
            return recur(own, rows, state, step, count[None], guided, again), None

        begun = PassState(own.begin(rows).z, jnp.zeros((1, 1, 1), jnp.int32))
        return jax.lax.scan(turn, begun, jnp.arange(turns, dtype=jnp.int32))[0].z

    spread = t**2 + (1 - t) ** 2
    slope = (1 - t) / spread
    precision = 1 / spread + strength * slope**2 / WIDTH**2
    mean = strength * slope * CENTRE / WIDTH**2 / precision
    assert_normal(run(rows), mean, precision**-0.5, bias=0.01)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"verifier": None}, "verifier must be a Verifier, .* got None"),
        ({"verifier": verifier(wavy, "oracle")}, "verifier must be differentiable"),
        ({"strength": -1.0}, "strength must be finite and at least 0, got -1.0"),
        ({"recurrences": 0}, "recurrences must be a whole number of at least 1, got 0"),
        ({"clip": 0.0}, "clip must be above 0, got 0.0"),
        ({"through": 3}, r"through must be a function \(z, t\) -> Prediction, got 3"),
        ({"through": fake, "ascents": 2}, "ascents must be 1 for gradients through the network"),
        ({"judge": BRIGHT}, "judge chooses between chains: they must be at least 2, got 1"),
        ({"judge": wavy, "chains": 2}, "judge must be a Verifier, .* got wavy"),
    ],
)
def test_impossible_choices_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Langevin(**({"verifier": WAVY} | change))
