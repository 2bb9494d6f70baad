"""Annealed refinement against a slow copy of it, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ipr_jax
from ipr_jax import Prediction
from ipr_jax.core import patches
from ipr_jax.core.keys import iteration_keys
from ipr_jax.methods.annealed import Annealed
from ipr_jax.methods.selection import Informed

GRID, SHAPE, PATCH = (3, 3), (6, 6, 1), 2


def fake(z, t):
    """A denoiser in which every patch hears of all others of its image."""
    everything = z.mean(axis=(1, 2), keepdims=True)
    velocity = jnp.tanh(z + everything) * patches.expand(t, PATCH)
    return Prediction(velocity, 0.4 + 0.2 * jnp.tanh(z), patches.patch_mean(z[..., 0] ** 2, PATCH))


def problems(number=4, seed=0):
    rng = np.random.default_rng(seed)
    image = rng.uniform(-1, 1, (number, *SHAPE)).astype(np.float32)
    editable = rng.random((number, *GRID)) < 0.7
    return ipr_jax.sample_keys(jax.random.key(seed), number), image, editable


def pixels(mask):
    return np.kron(mask, np.ones((PATCH, PATCH)))[..., None]


def predict(z, t):
    found = fake(jnp.asarray(z[None], jnp.float32), jnp.asarray(t[None], jnp.float32))
    return (np.asarray(part[0], np.float64) for part in found)


def slow(method, key, image, editable):
    """One sample, patch by patch, in float64: the images after every iteration."""
    image, number = image.astype(np.float64), int(editable.sum())
    cells = [cell for cell in np.ndindex(GRID) if editable[cell]]
    seen = {"doubt": dict.fromkeys(cells, 1e12), "sigma": dict.fromkeys(cells, 1e12)}
    seen["age"] = dict.fromkeys(cells, 0)

    def draws(step):
        own = iteration_keys(key[None], step)
        uniform = np.asarray(jax.random.uniform(own.region[0], GRID), np.float64)
        noises = (
            np.asarray(jax.random.normal(each[0], SHAPE)) for each in (own.noise, own.denoise)
        )
        return uniform, *noises

    if method.from_noise:
        image = np.where(pixels(editable) > 0, draws(0)[2], image)
    history, least, finish = [], np.inf, method.cycles * method.iterations
    for step in range(finish):
        uniform, noise, _ = draws(step)
        share = np.linspace(*method.ratio, method.iterations)[step % method.iterations]
        clock = {cell: uniform[cell] for cell in cells}
        if isinstance(method.select, Informed):
            for cell in cells:
                weight = np.prod(
                    [seen[name][cell] + method.select.least for name in method.select.by]
                )
                clock[cell] = -np.log1p(-clock[cell]) / weight ** (1 / method.select.temperature)
        hidden = np.zeros(GRID)
        for cell in sorted(cells, key=clock.get)[: max(1, int(share * number))]:
            hidden[cell] = 1
        z = np.where(pixels(hidden) > 0, noise, image)
        velocity, _, sigma = predict(z, hidden)
        guess = np.where(pixels(hidden) > 0, z - velocity, image)
        for i, j in cells:
            area = np.s_[PATCH * i : PATCH * (i + 1), PATCH * j : PATCH * (j + 1)]
            seen["age"][i, j] = 0 if hidden[i, j] else seen["age"][i, j] + 1
            if hidden[i, j]:
                seen["doubt"][i, j] = ((guess[area] - image[area]) ** 2).mean()
                seen["sigma"][i, j] = sigma[i, j]
        image = guess
        if (step + 1) % method.iterations == 0:
            doubt = sum(seen["doubt"].values())
            if doubt <= least:
                best, least = (image, {name: dict(of) for name, of in seen.items()}), doubt
            image, seen = best[0], {name: dict(of) for name, of in best[1].items()}
        history.append(image)
        if (step + 1) % method.iterations == 0 and least < method.calm and method.cycles > 1:
            finish = step + 1
            break
    if method.finish_steps:
        a, top = method.stochasticity, method.finish_level
        dealt, parts = draws(finish)[0], min(number, method.finish_parts)
        ordered = sorted(cells, key=dealt.__getitem__)
        for part in range(parts):
            mine = np.zeros(GRID)
            for place, cell in enumerate(ordered):
                mine[cell] = place * parts // number == part
            own = pixels(mine) > 0
            z = (1 - top) * image + top * draws(finish)[2]
            for step in range(method.finish_steps):
                t, s = (top * (1 - k / method.finish_steps) for k in (step, step + 1))
                velocity, fraction, _ = predict(np.where(own, z, image), t * mine)
                kept = (1 - t) * s / ((1 - s) * t)
                finish += 1
                noise = draws(finish)[2]
                mean = (1 - s) * (z - t * velocity)
                mean = mean + s * np.sqrt(1 - a**2 * (1 - kept**2)) * (z + (1 - t) * velocity)
                std = a * np.sqrt(1 - kept**2) * t**fraction * s ** (1 - fraction) if s else 0.0
                z = mean + std * noise
            image = np.where(own, z, image)
        history.append(image)
    return history


@pytest.mark.parametrize(
    "method",
    [
        Annealed(iterations=6, cycles=1),
        Annealed(iterations=4, cycles=2, finish_level=0.6, finish_parts=2),
        Annealed(iterations=5, cycles=4, ratio=(0.6, 0.1), calm=0.4),
        pytest.param(
            Annealed(iterations=2, cycles=1, finish_parts=6, finish_level=1.0),
            marks=pytest.mark.heavy,
        ),
        pytest.param(
            Annealed(iterations=2, cycles=2, finish_parts=1, finish_steps=1),
            marks=pytest.mark.heavy,
        ),
        pytest.param(
            Annealed(iterations=3, cycles=3, calm=0.0, finish_steps=0), marks=pytest.mark.heavy
        ),
        Annealed(iterations=6, cycles=1, select=ipr_jax.fresh_regions, finish_steps=0),
        Annealed(
            iterations=9, cycles=1, select=Informed(by=("doubt", "sigma", "age"), temperature=0.5)
        ),
        Annealed(iterations=3, cycles=1, ratio=(0.6, 0.2), from_noise=False, stochasticity=1.0),
    ],
)
def test_it_equals_a_slow_copy(method):
    keys, image, editable = problems()
    found = ipr_jax.solve(fake, keys, image, editable, method=method)
    for sample in range(4):
        want = slow(method, keys[sample], image[sample], editable[sample])
        assert found.iterations[sample] == len(want)
        parts = min(method.finish_parts, editable[sample].sum())
        assert found.nfe[sample] == len(want) + max(0, parts * method.finish_steps - 1)
        np.testing.assert_allclose(found.image[sample], want[-1], atol=2e-5)
    clue = pixels(~editable[0]) > 0
    np.testing.assert_array_equal(np.asarray(found.image[0])[clue], image[0][clue])


def test_what_the_editable_pixels_were_does_not_matter_from_noise():
    keys, image, editable = problems()
    hidden = np.stack([pixels(each) > 0 for each in editable])
    one, other = (
        ipr_jax.solve(fake, keys, given, editable, method=Annealed(iterations=4))
        for given in (image, np.where(hidden, 0, image).astype(np.float32))
    )
    np.testing.assert_array_equal(one.image, other.image)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cycles": 0}, "cycles must be a whole number of at least 1, got 0"),
        ({"calm": -1.0}, "calm must be at least 0, got -1.0"),
        ({"iterations": 0}, "iterations must be a whole number of at least 1, got 0"),
        ({"ratio": 0.5}, "ratio must be two, of the first and the last, got 0.5"),
        ({"ratio": (0.1, 0.5)}, "ratio must not rise, got 0.1 to 0.5"),
        ({"ratio": (1.5, 0.5)}, r"ratio must be in \(0, 1\], got 1.5"),
        ({"ratio": (1.0, 0.0)}, r"ratio must be in \(0, 1\], got 0.0"),
        ({"select": None}, r"select must be a function"),
        ({"finish_steps": -1}, "finish_steps must be a whole number of at least 0, got -1"),
        ({"finish_parts": 0}, "finish_parts must be a whole number of at least 1, got 0"),
        ({"finish_level": 0.0}, r"finish_level must be in \(0, 1\], got 0.0"),
        ({"stochasticity": 2.0}, r"stochasticity must be in \[0, 1\], got 2.0"),
    ],
)
def test_impossible_choices_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Annealed(**change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"by": ()}, r"by must be some of doubt, sigma, age, got \(\)"),
        ({"by": ("luck",)}, r"by must be some of doubt, sigma, age, got \('luck',\)"),
        ({"temperature": 0.0}, "temperature must be above 0, got 0.0"),
        ({"least": 0.0}, "least must be above 0, got 0.0"),
    ],
)
def test_impossible_selections_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Informed(**change)
