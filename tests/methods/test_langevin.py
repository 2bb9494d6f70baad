"""Local search: its gradients, its costs, what it is around, and its law where that is known."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toys import GRID, PATCH, SHAPE, brightness, problems

import ipr_jax
from ipr_jax import Prediction, Sampling
from ipr_jax.core import keys as random_keys
from ipr_jax.core import patches
from ipr_jax.methods import (
    Annealed,
    Backtracking,
    Guided,
    Langevin,
    Particles,
    Refinement,
    Rollover,
)
from ipr_jax.methods.engine import Problem
from ipr_jax.methods.langevin import guide, recur
from ipr_jax.methods.scores import verifier
from ipr_jax.sampling import step as steps

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


PASS = Particles(particles=1, sampling=SAMPLING)


def solve(given=None, **change):
    method = Langevin(**({"verifier": BRIGHT, "method": PASS} | change))
    return ipr_jax.solve(fake, *(given or problems()), method=method), method


@pytest.mark.parametrize(("through", "smoothed"), [(None, False), (fake, False), (None, True)])
def test_the_shift_is_the_gradient_of_finite_differences(through, smoothed, rng):
    z = jnp.asarray(rng.normal(size=(1, *SHAPE)), jnp.float32)
    t = jnp.asarray([[[0.3, 0.9], [0.0, 1.0]]], jnp.float32)
    found, level = fake(z, t), np.asarray(patches.expand(t, PATCH))[0]
    share = level**2 / (level**2 + (1 - level) ** 2)
    noise = 0.3 * rng.normal(size=(3, *z.shape)).astype(np.float32) if smoothed else None
    guided = jax.jit(partial(guide, WAVY, strength=0.7, through=through))(z, t, found, noise=noise)
    np.testing.assert_array_equal(guided.sigma, found.sigma)
    shift = np.asarray(steps.clean(z, t, guided) - steps.clean(z, t, found))[0]

    step, size = 0.02, 16
    every = np.eye(size, dtype=np.float32).reshape(size, *SHAPE) * step
    many = jnp.repeat(t, 2 * size, axis=0)
    at = z if through else steps.clean(z, t, found)
    moved = jnp.concatenate([at + every, at - every])
    image = steps.clean(moved, many, fake(moved, many)) if through else moved
    value = np.asarray(wavy(image, None, None))
    if smoothed:
        under = [np.exp(wavy(image + share**0.5 * each, None, None)) for each in noise]
        value = np.log(np.mean(under, axis=0))
    up, down = np.split(value, 2)
    slope = ((up - down) / (2 * step)).reshape(SHAPE)
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
    steep = verifier(lambda image, *_: 1e25 * image.sum((1, 2, 3)), "oracle", differentiable=True)
    for clip in (0.2, np.inf):
        moved = guide(steep, z, t, found, strength=1.0, clip=clip)
        assert np.isfinite(moved.velocity).all()
        assert (size(moved) > 0.19).all()
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
    # At the first step all are noise, and there is no level to visit again.
    np.testing.assert_array_equal(single.nfe, 3 * length - 2)
    np.testing.assert_array_equal(single.nve, single.nfe)
    assert method.budget(GRID) == 3 * length.max()
    smooth, _ = solve(strength=3.0, smoothing=0.1, draws=2)
    np.testing.assert_array_equal(smooth.nbe, length)
    np.testing.assert_array_equal(smooth.nve, 2 * length)
    assert (smooth.image != solve(strength=3.0)[0].image).any()
    assert (brightness(single.image) > brightness(plain.image)).all()
    clue = ~np.kron(problems()[2], np.ones((1, PATCH, PATCH), bool))
    np.testing.assert_array_equal(np.asarray(single.image)[clue], problems()[1][clue])


def test_another_verifier_has_the_last_word():
    """The first chain is the one that there is if it is the only one."""
    best = Particles.of("best-of-n", BRIGHT, 3, sampling=SAMPLING)
    judged, method = solve(verifier=WAVY, method=best, ascents=2)
    alone, _ = solve(verifier=WAVY, ascents=2)
    assert (brightness(judged.image) >= brightness(alone.image)).all()
    assert (brightness(judged.image) > brightness(alone.image)).any()
    length = np.asarray(alone.nfe)
    np.testing.assert_array_equal(judged.nfe, 3 * length)
    np.testing.assert_array_equal(judged.nbe, 6 * length)
    np.testing.assert_array_equal(judged.nve, 6 * length + 3)
    assert method.least_budget(GRID) == 3 * length.max()


AROUND = {
    "bfs": Particles.of("bfs", BRIGHT, 3, sampling=SAMPLING),
    "dfs": Backtracking(verifier=BRIGHT, threshold=0.3, sampling=SAMPLING, checks=3, jump=2),
    "rbf": Rollover(verifier=BRIGHT, evaluations=42, sampling=SAMPLING, chains=2, seeds=2, block=2),
    "ipr": Refinement(iterations=2, ratio=0.5, first=SAMPLING),
    "ipr-chains": Guided(
        refinement=Refinement(iterations=1, first=SAMPLING), verifier=BRIGHT, chains=2, strength=1.0
    ),
    "annealed": Annealed(iterations=4, cycles=2),
}


@pytest.mark.parametrize(
    "name",
    [
        name if name in ("dfs", "ipr") else pytest.param(name, marks=pytest.mark.heavy)
        for name in AROUND
    ],
)
def test_around_any_method(name):
    """Without strength it is that method, up to rounding; with it, what it guides is brighter."""
    inner = AROUND[name]
    given = problems(24)
    plain = ipr_jax.solve(fake, *given, method=inner)
    same, _ = solve(given, method=inner, strength=0.0)
    np.testing.assert_allclose(same.image, plain.image, atol=1e-6)
    for field in ("iterations", "nfe"):
        np.testing.assert_array_equal(getattr(same, field), getattr(plain, field))
    np.testing.assert_array_equal(same.nbe, plain.nfe)
    np.testing.assert_array_equal(same.nve, plain.nve + plain.nfe)
    more, method = solve(given, method=inner, strength=3.0, recurrences=2)
    assert (more.nfe <= method.budget(GRID)).all()
    np.testing.assert_array_equal(more.iterations, plain.iterations)
    if name != "annealed":  # which has patches at levels 0 and 1 only, but for its finish
        assert (more.nfe > plain.nfe).all()
    assert brightness(more.image).mean() > brightness(plain.image).mean() + 0.03
    assert (method.start, method.passes) == (inner.start, inner.passes)


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
        verifier=BELL,
        method=Particles(particles=1, sampling=sampling),
        strength=strength,
        recurrences=recurrences,
        depth=0.25,
        clip=np.inf,
    )
    found = ipr_jax.solve(normal, *blank(), method=method)

    def moved(mean, var, t, s, alpha):
        """By a guided step from t to s."""
        spread = t**2 + (1 - t) ** 2
        pull = strength * t**2 / spread / WIDTH**2
        slope, offset = (1 - t) / spread * (1 - pull), pull * CENTRE
        b = (1 - t) * s / ((1 - s) * t)
        gamma, sigma = s * np.sqrt(1 - alpha**2 * (1 - b**2)), alpha * s * np.sqrt(1 - b**2)
        factor = (1 - s) * slope + gamma * (1 - (1 - t) * slope) / t
        added = (1 - s) * offset - gamma * (1 - t) * offset / t
        return factor * mean + added, factor**2 * var + sigma**2

    mean, var = 0.0, 1.0
    for step in range(length):
        t, s = 1 - step / length, 1 - (step + 1) / length
        for _ in range(recurrences - 1 if t < 1 else 0):
            mean, var = moved(mean, var, t, 0.75 * t, 1.0)
            kept = (1 - t) / (1 - 0.75 * t)
            mean, var = kept * mean, kept**2 * var + t**2 - (kept * 0.75 * t) ** 2
        mean, var = moved(mean, var, t, s, alpha)
    assert_normal(found.image, mean, var**0.5)


@pytest.mark.parametrize("through", [None, pytest.param(normal, marks=pytest.mark.heavy)])
def test_a_step_made_again_and_again_is_langevin(through):
    """At one level, in the limit of small steps, its law is q_t(z) exp(strength score(x0(z))).

    The bias is first order in what is taken off, here a hundredth.
    """
    t, strength, turns = 0.5, 0.6, 300
    keys, image, _ = blank()

    @jax.jit
    def run(keys):
        level = jnp.full((1, 1, 1), t, jnp.float32)

        def turn(z, count):
            guided = guide(BELL, z, level, normal(z, level), strength=strength, through=through)
            return recur(random_keys.fold(keys, count), z, level, guided, depth=0.01), None

        begun = jax.random.normal(jax.random.key(0), image.shape)
        return jax.lax.scan(turn, begun, jnp.arange(turns))[0]

    spread = t**2 + (1 - t) ** 2
    slope = (1 - t) / spread
    precision = 1 / spread + strength * slope**2 / WIDTH**2
    mean = strength * slope * CENTRE / WIDTH**2 / precision
    assert_normal(run(keys), mean, precision**-0.5, bias=0.01)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"verifier": None}, "verifier must be a Verifier, .* got None"),
        ({"verifier": verifier(wavy, "oracle")}, "verifier must be differentiable"),
        ({"strength": -1.0}, r"strength must be in \[0, 1e\+18\], got -1.0"),
        ({"strength": 1e39}, r"strength must be in \[0, 1e\+18\], got 1e\+39"),
        ({"method": Particles}, r"method must have init\(problem\) and update"),
        ({"recurrences": 0}, "recurrences must be a whole number of at least 1, got 0"),
        ({"clip": 0.0}, "clip must be above 0, got 0.0"),
        ({"through": 3}, r"through must be a function \(z, t\) -> Prediction, got 3"),
        ({"through": fake, "ascents": 2}, "ascents must be 1 for gradients through the network"),
        ({"depth": 0.0}, r"depth must be in \(0, 1\], got 0.0"),
        ({"smoothing": -0.1}, r"smoothing must be in \[0, 1e\+18\], got -0.1"),
        ({"draws": 2}, "draws must be 1 without smoothing, got 2"),
    ],
)
def test_impossible_choices_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Langevin(**({"verifier": WAVY} | change))


def test_a_method_without_an_end_needs_a_budget():
    made = PASS.on(GRID)
    with pytest.raises(ValueError, match=r"method must tell how many .* as budget\(grid\), within"):
        solve(method=made)
    method = Langevin(verifier=BRIGHT, method=made, strength=0.0)
    found = ipr_jax.solve(fake, *problems(), method=method, budget=100)
    np.testing.assert_array_equal(found.image, solve(strength=0.0)[0].image)
    with pytest.raises(ValueError, match=r"method must have init\(problem\) and update.* got 3"):
        solve(method=3)


def test_one_inside_of_another_has_noise_of_its_own():
    """Two that each visit every level twice, but for the first, of noise: no key is used twice."""
    sampling = Sampling(steps_per_patch=4, overlap=1.0, stochasticity=0.9)
    method = Particles(particles=1, sampling=sampling)
    for _ in range(2):
        method = Langevin(verifier=BELL, method=method, strength=0.0, recurrences=2, depth=0.25)
    found = ipr_jax.solve(normal, *blank(), method=method)
    made, keys = method.on((1, 1)), blank()[0]

    @jax.jit
    def used(problem):
        return [
            jax.random.key_data(key)
            for one in (made, made.method)
            for key in one._keys(problem, one.init(problem), 1)
        ]

    each = used(Problem(keys, *blank()[1:]))
    assert len({np.asarray(key).tobytes() for key in each}) == 4
    assert int(found.nfe[0]) == 1 + 3 * 4
