"""The streaming driver: the plain one's results, whatever the slots, and few wasted evaluations.

All queues of one size and all rules are constants: what is compiled here takes most of the time.
"""

import heapq
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ipr_jax
from benchmarks import waste
from ipr_jax import FIRST_PASS, REFINEMENT, Prediction, Sampling
from ipr_jax.methods import selection, stopping
from ipr_jax.methods.refinement import stream
from ipr_jax.runtime import memory
from ipr_jax.sampling.order import random_order, raster_order

FIRST = Sampling(steps_per_patch=2, overlap=0.25)
LATER = Sampling(steps_per_patch=3, overlap=0.5, order=random_order, stochasticity=0.9)
NUMBER, SLOTS, ITERATIONS = 20, 4, 6
TRACED = []
"""The batch sizes that the denoiser was compiled for."""


def fake(z, t):
    """A denoiser in which every patch hears of all others; the clue 0.5 makes it fail."""
    TRACED.append(len(z))
    everything = z.mean(axis=(1, 2), keepdims=True)
    sigma = jnp.abs(z.reshape(len(z), 3, 2, 3, 2, 1)).mean(axis=(2, 4, 5)) + t
    fails = (z[:, 2:3, 2:3] == 0.5).all(axis=3, keepdims=True)
    velocity = jnp.where(fails, jnp.nan, jnp.tanh(z + everything))
    return Prediction(velocity, 0.5 * jnp.tanh(z), sigma)


def queue(seed=0):
    """Samples of 3x3 patches of 2x2 pixels with any number of clues."""
    rng = np.random.default_rng(seed)
    image = rng.uniform(-1, 1, (NUMBER, 6, 6, 1)).astype(np.float32)
    editable = rng.random((NUMBER, 3, 3)) < rng.random((NUMBER, 1, 1))
    return ipr_jax.sample_keys(jax.random.key(seed), NUMBER), image, editable


def streamed(*given, iterations=3, slots=SLOTS, first=FIRST, later=LATER, **options):
    options |= {"first": first, "later": later}
    return stream(fake, *given, iterations=iterations, slots=slots, **options)


def everything(image):
    return image


def plain(keys, image, editable, first=FIRST, **options):
    """The same by the plain driver: images and evaluations after 0, 1, ... ITERATIONS."""
    nfe = np.zeros(len(keys), np.int32)
    if first is not None:
        sampled = ipr_jax.generate(fake, keys, image, editable, first)
        image, nfe = np.asarray(sampled.image), np.asarray(sampled.nfe)
    options |= {"sampling": LATER, "iterations": ITERATIONS, "record": everything}
    refined = ipr_jax.refine(fake, keys, image, editable, **options)
    images = np.concatenate([image[None], refined.recorded])
    return images, np.cumsum([nfe, *refined.nfe], axis=0)


def slot_evaluations(nfe, editable, slots, widths):
    """What they are where every slot takes the next sample as soon as its own is finished."""
    free = [0] * slots
    for each in nfe[np.argsort(-editable.sum(axis=(1, 2)), kind="stable")]:
        heapq.heappush(free, heapq.heappop(free) + int(each))
    ends = sorted(free)
    seen = [min(width for width in widths if width >= slots - over) for over in range(slots)]
    return int(np.diff(ends, prepend=0) @ seen)


@settings(max_examples=10)
@given(seed=st.integers(0, 99))
def test_it_equals_the_plain_driver(seed):
    keys, image, editable = queue(seed)
    found = streamed(keys, image, editable)
    images, nfe = plain(keys, image, editable)
    np.testing.assert_allclose(found.image, images[3], atol=2e-6)
    np.testing.assert_array_equal(found.nfe, nfe[3])
    np.testing.assert_array_equal(found.iterations, np.where(editable.any(axis=(1, 2)), 3, 0))
    assert found.finite.all()
    clue = ~editable.repeat(2, 1).repeat(2, 2)
    np.testing.assert_array_equal(np.asarray(found.image)[clue], image[clue])
    spent = slot_evaluations(nfe[3], editable, SLOTS, (SLOTS,))
    assert found.slot_evaluations == spent
    assert found.wasted == pytest.approx(1 - nfe[3].sum() / spent)


def test_more_slots_than_samples():
    keys, image, editable = queue(seed=7)
    images, nfe = plain(keys, image, editable)
    found = streamed(keys[:1], image[:1], editable[:1], slots=5)
    np.testing.assert_allclose(found.image, images[3][:1], atol=2e-6)
    np.testing.assert_array_equal(found.nfe, nfe[3][:1])
    assert (int(found.slot_evaluations), found.wasted) == (nfe[3][0], 0)


def test_nothing_to_do():
    keys, image, editable = queue()
    found = streamed(keys, image, np.zeros_like(editable))
    np.testing.assert_array_equal(found.image, image)
    assert (int(found.slot_evaluations), found.wasted) == (0, 0)


@pytest.mark.parametrize(
    "options",
    [
        {"first": None},
        {
            "first": Sampling(steps_per_patch=1, order=raster_order, temperature=0.5),
            "noise": selection.initial_noise,
            "select": selection.fixed_regions,
            "ratio": 0.6,
        },
    ],
    ids=["given images", "another first pass, initial noise, fixed regions"],
)
def test_it_takes_what_the_plain_driver_takes(options):
    found = streamed(*queue(), **options)
    images, nfe = plain(*queue(), **options)
    np.testing.assert_allclose(found.image, images[3], atol=2e-6)
    np.testing.assert_array_equal(found.nfe, nfe[3])


BRIGHT = stopping.verified(lambda images: images.mean(axis=(1, 2, 3)) > 0.1)
SIGNS = stopping.unchanged(lambda images: jnp.sign(images[:, ::2, ::2, 0]))


@pytest.mark.parametrize(
    ("stop", "patience"),
    [(BRIGHT, 1), (SIGNS, 1), (SIGNS, 2)],
    ids=["verified", "unchanged", "unchanged twice"],
)
def test_a_sample_leaves_when_its_rule_has_held(stop, patience):
    """And is then what the plain driver makes of it in as many iterations; the batch shrinks."""
    keys, image, editable = queue(seed=5)
    options = {"iterations": ITERATIONS, "stop": stop, "patience": patience}
    found = streamed(keys, image, editable, **options)
    history, nfe = plain(keys, image, editable)
    before = np.concatenate([image[None], history])
    holds = np.stack(
        [
            stop(jnp.full(NUMBER, iteration), jnp.asarray(before[iteration]), jnp.asarray(after))
            for iteration, after in enumerate(history)
        ]
    )
    for sample in np.flatnonzero(editable.any(axis=(1, 2))):
        streak, left = 0, ITERATIONS
        for iteration in range(ITERATIONS + 1):
            streak = streak + 1 if holds[iteration, sample] else 0
            if streak == patience:
                left = iteration
                break
        assert found.iterations[sample] == left
        assert found.nfe[sample] == nfe[left, sample]
        np.testing.assert_allclose(found.image[sample], history[left][sample], atol=2e-6)
    assert len(np.unique(found.iterations)) > 2
    spent = slot_evaluations(np.asarray(found.nfe), editable, SLOTS, (1, 2, 4))
    assert found.slot_evaluations == spent


def test_a_sample_that_breaks_is_reported_and_the_others_are_as_they_were():
    keys, image, editable = queue(seed=2)
    editable[3, 1, 1] = False
    editable[3, 0, 0] = True
    whole = streamed(keys, image, editable)
    image[3, 2:4, 2:4] = 0.5
    found = streamed(keys, image, editable)
    good = np.arange(NUMBER) != 3
    np.testing.assert_array_equal(found.finite, good)
    np.testing.assert_allclose(found.image[good], whole.image[good], atol=2e-6)


def test_numbers_are_arguments_of_one_program():
    streamed(*queue())
    traced = len(TRACED)
    for iterations, ratio, patience, temperature in ((1, 0.2, 1, 1.0), (3, 0.7, 2, 0.5)):
        later = Sampling(temperature=temperature, order=random_order)
        options = {"ratio": ratio, "patience": patience, "later": later}
        streamed(*queue(seed=1), iterations=iterations, **options)
    assert len(TRACED) == traced


@pytest.mark.parametrize("iterations", [5, 50])
def test_few_evaluations_are_wasted_on_hard_sudokus(iterations):
    """By the schedules: samples differ in their given cells only."""
    _, _, editable = waste.hard(128)
    given, sizes = editable.sum(axis=(1, 2)), selection.region_sizes(81, 0.25)
    first, later = (each.settings(81).plan.num_steps for each in (FIRST_PASS, REFINEMENT))
    nfe = first[given] + iterations * later[sizes[given]]
    assert nfe.sum() / slot_evaluations(nfe, editable, 16, (16,)) > 0.97


def test_few_evaluations_are_wasted_when_most_samples_leave_early(tmp_path):
    """Eight samples per slot."""
    out = tmp_path / "waste.json"
    args = waste.Args(samples=(64,), slots=(8,), chance=(0.2,), iterations=10, out=out)
    waste.main(args)
    result = json.loads(out.read_text())
    assert {"arguments", "versions", "device", "commit"} <= result.keys()
    (row,) = result["rows"]
    assert (row["samples"], row["slots"], row["chance"]) == (64, 8, 0.2)
    assert row["left_early"] > 0.8
    assert row["wasted"] < 0.05
    assert row["wasted"] == pytest.approx(1 - row["evaluations"] / row["slot_evaluations"])
    with pytest.raises(FileExistsError, match="is not overwritten"):
        waste.main(args)


@pytest.mark.heavy
@pytest.mark.parametrize(("chance", "most"), [(0.0, 0.03), (0.03, 0.05)])
def test_few_evaluations_are_wasted_in_50_iterations(chance, most):
    assert waste.count(256, 32, chance, waste.Args())["wasted"] < most


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
    assert slots == [20]


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
        streamed(*queue(), **options)


def test_bad_images_are_refused():
    keys, image, editable = queue()
    image[1] = 9.0
    editable[1] = True
    streamed(keys, image, editable)  # only clues are read
    streamed(keys, image, editable, first=None)  # finite ones may be of any size
    image[1] = np.inf
    with pytest.raises(ValueError, match=r"magnitude of inf in sample 1"):
        streamed(keys, image, editable, first=None)
    with pytest.raises(ValueError, match=r"keys must be a key array \[20\]"):
        streamed(keys[:2], image, editable)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": (0,)}, "samples must be a whole number of at least 1, got 0"),
        ({"slots": (0,)}, "slots must be a whole number of at least 1, got 0"),
        ({"iterations": 0}, "iterations must be a whole number of at least 1, got 0"),
        ({"chance": (1.0,)}, r"chance must be in \[0, 1\), got 1.0"),
        ({"seed": -1}, "seed must be a whole number of at least 0, got -1"),
    ],
)
def test_bad_counts_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        waste.Args(**options)
