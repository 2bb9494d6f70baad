"""The streaming driver: the plain one's results, whatever the slots, and few wasted evaluations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ipr_jax
from ipr_jax import Prediction, Sampling, memory, selection, stopping
from ipr_jax.order import random_order, raster_order
from ipr_jax.streaming import stream

FIRST = Sampling(steps_per_patch=2, overlap=0.25)
LATER = Sampling(steps_per_patch=3, overlap=0.5, order=random_order, stochasticity=0.9)


def fake(z, t):
    """A denoiser in which every patch hears of all others."""
    everything = z.mean(axis=(1, 2), keepdims=True)
    sigma = jnp.abs(z.reshape(len(z), 3, 2, 3, 2, 1)).mean(axis=(2, 4, 5)) + t
    return Prediction(jnp.tanh(z + everything), 0.5 * jnp.tanh(z), sigma)


def queue(number, seed=0):
    """Samples of 3x3 patches of 2x2 pixels with any number of clues."""
    rng = np.random.default_rng(seed)
    image = rng.uniform(-1, 1, (number, 6, 6, 1)).astype(np.float32)
    editable = rng.random((number, 3, 3)) < rng.random((number, 1, 1))
    return ipr_jax.sample_keys(jax.random.key(seed), number), image, editable


def plain(keys, image, editable, iterations, first=FIRST, **options):
    """The same by the plain driver: images, evaluations."""
    nfe = np.zeros(len(keys), np.int32)
    if first is not None:
        sampled = ipr_jax.generate(fake, keys, image, editable, first)
        image, nfe = sampled.image, np.asarray(sampled.nfe)
    if iterations:
        options = {"sampling": LATER, "iterations": iterations} | options
        refined = ipr_jax.refine(fake, keys, image, editable, **options)
        image, nfe = refined.image, nfe + np.asarray(refined.nfe).sum(axis=0)
    return np.asarray(image), nfe


@pytest.mark.parametrize(("number", "slots"), [(1, 1), (9, 4), (3, 5)])
@settings(max_examples=10)
@given(seed=st.integers(0, 99))
def test_it_equals_the_plain_driver(number, slots, seed):
    keys, image, editable = queue(number, seed)
    found = stream(fake, keys, image, editable, iterations=3, slots=slots, first=FIRST, later=LATER)
    want, nfe = plain(keys, image, editable, 3)
    np.testing.assert_allclose(found.image, want, atol=2e-6)
    np.testing.assert_array_equal(found.nfe, nfe)
    np.testing.assert_array_equal(found.iterations, np.where(editable.any(axis=(1, 2)), 3, 0))
    assert found.finite.all()
    assert nfe.sum() <= found.evaluations * min(slots, number)
    clue = ~editable.repeat(2, 1).repeat(2, 2)
    np.testing.assert_array_equal(np.asarray(found.image)[clue], image[clue])


@pytest.mark.parametrize(
    "options",
    [
        {"first": None},
        {"noise": selection.initial_noise},
        {"select": selection.fixed_regions, "ratio": 0.6},
        {"first": Sampling(steps_per_patch=1, order=raster_order, temperature=0.5)},
    ],
    ids=["given images", "initial noise", "fixed regions", "another first pass"],
)
def test_it_takes_what_the_plain_driver_takes(options):
    keys, image, editable = queue(7)
    options = {"first": FIRST} | options
    found = stream(fake, keys, image, editable, iterations=2, slots=3, later=LATER, **options)
    want, nfe = plain(keys, image, editable, 2, **options)
    np.testing.assert_allclose(found.image, want, atol=2e-6)
    np.testing.assert_array_equal(found.nfe, nfe)


def bright(images):
    return images.mean(axis=(1, 2, 3)) > 0.1


def signs(images):
    return jnp.sign(images[:, ::2, ::2, 0])


@pytest.mark.parametrize(
    ("stop", "patience"),
    [
        (stopping.verified(bright), 1),
        (stopping.unchanged(signs), 1),
        (stopping.unchanged(signs), 2),
    ],
    ids=["verified", "unchanged", "unchanged twice"],
)
def test_a_sample_leaves_when_its_rule_has_held(stop, patience):
    """And is then what the plain driver makes of it in as many iterations."""
    keys, image, editable = queue(20, seed=5)
    options = {"slots": 4, "first": FIRST, "later": LATER, "stop": stop, "patience": patience}
    found = stream(fake, keys, image, editable, iterations=6, **options)
    history = [plain(keys, image, editable, iterations)[0] for iterations in range(7)]
    before = [image, *history]
    for sample in np.flatnonzero(editable.any(axis=(1, 2))):
        streak, left = 0, 6
        for iteration in range(7):
            one = slice(sample, sample + 1)
            pair = before[iteration][one], history[iteration][one]
            streak = streak + 1 if stop(jnp.array([iteration]), *map(jnp.asarray, pair))[0] else 0
            if streak == patience:
                left = iteration
                break
        assert found.iterations[sample] == left
        np.testing.assert_allclose(found.image[sample], history[left][sample], atol=2e-6)
    assert len(np.unique(found.iterations)) > 2


def test_a_sample_that_breaks_is_reported_and_the_others_are_as_they_were():
    keys, image, editable = queue(8, seed=2)
    editable[:] = True
    editable[3, 1, 1] = editable[6, 0, 0] = False
    image[3, 2:4, 2:4] = 0.5  # a clue that makes the denoiser fail

    def broken(z, t):
        bad = (z[:, 2, 2] == 0.5).all(axis=-1)[:, None, None, None]
        return fake(jnp.where(bad, jnp.nan, z), t)

    options = {"iterations": 2, "slots": 3, "first": FIRST, "later": LATER}
    found = stream(broken, keys, image, editable, **options)
    whole = stream(fake, keys, image, editable, **options)
    good = np.arange(8) != 3
    np.testing.assert_array_equal(found.finite, good)
    np.testing.assert_allclose(found.image[good], whole.image[good], atol=2e-6)


def still(z, t):
    """Does nothing, quickly."""
    return Prediction(0.3 * z, 0 * z, t + jnp.abs(z[..., 0]))


def hard(number):
    """Sudokus of one pixel per cell with 0 to 26 given cells."""
    rng = np.random.default_rng(0)
    given = rng.integers(0, 27, number)
    editable = rng.permuted(np.arange(81) >= given[:, None], axis=1).reshape(number, 9, 9)
    image = np.zeros((number, 9, 9, 1), np.float32)
    return ipr_jax.sample_keys(jax.random.key(0), number), image, editable


def wasted(found, slots):
    return 1 - int(found.nfe.sum()) / (int(found.evaluations) * slots)


@pytest.mark.parametrize("iterations", [pytest.param(5), pytest.param(50, marks=pytest.mark.heavy)])
def test_few_evaluations_are_wasted_on_hard_sudokus(iterations):
    found = stream(still, *hard(128), iterations=iterations, slots=16)
    assert wasted(found, 16) < 0.03


def test_few_evaluations_are_wasted_when_most_samples_leave_early():
    """Some stop after any pass, by chance; 20 samples per slot."""
    lucky = stopping.verified(lambda images: (1e4 * images[:, 0, 0, 0]) % 1 < 0.3)
    found = stream(still, *hard(320), iterations=20, slots=16, stop=lucky)
    assert (found.iterations < 20).mean() > 0.8
    assert wasted(found, 16) < 0.05


def test_numbers_are_arguments_of_one_program():
    keys, image, editable = queue(5)
    calls = 0

    def counting(z, t):
        nonlocal calls
        calls += 1
        return fake(z, t)

    for iterations, ratio, patience, temperature in ((1, 0.2, 1, 1.0), (3, 0.7, 2, 0.5)):
        later = Sampling(temperature=temperature)
        options = {"ratio": ratio, "patience": patience, "later": later, "slots": 2}
        stream(counting, keys, image, editable, iterations=iterations, **options)
    assert calls == 1


def test_auto_takes_as_many_slots_as_fit(monkeypatch):
    slots = []

    def all_of(needed, available, most):
        slots.append(most)
        assert needed(most) > 3 * 6 * 6 * 4
        return most

    monkeypatch.setattr(memory, "largest", all_of)
    options = {"iterations": 3, "first": FIRST, "later": LATER}
    found = stream(fake, *queue(3), slots="auto", **options)
    np.testing.assert_array_equal(found.image, stream(fake, *queue(3), **options).image)
    assert slots == [3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"iterations": 0}, "iterations must be a whole number of at least 1, got 0"),
        ({"slots": 0}, 'slots must be a whole number of at least 1 or "auto", got 0'),
        ({"patience": 0}, "patience must be a whole number of at least 1, got 0"),
        ({"ratio": 0.0}, r"ratio must be in \(0, 1\], got 0.0"),
    ],
)
def test_bad_numbers_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        stream(fake, *queue(2), **{"iterations": 1} | options)


def test_bad_images_are_refused():
    keys, image, editable = queue(3)
    image[1] = 9.0
    editable[1] = True
    stream(fake, keys, image, editable, iterations=1)  # only clues are read
    with pytest.raises(ValueError, match=r"magnitude of 9\.0 in sample 1"):
        stream(fake, keys, image, editable, iterations=1, first=None)
    with pytest.raises(ValueError, match=r"keys must be a key array \[3\]"):
        stream(fake, keys[:2], image, editable, iterations=1)
