"""Refinement that follows the iteration, and that sees what the network said before."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ipr_jax
from ipr_jax import Prediction, Refinement, Sampling
from ipr_jax.core import keys as random_keys
from ipr_jax.core import patches
from ipr_jax.methods import stopping
from ipr_jax.methods.engine import Problem
from ipr_jax.methods.selection import Informed

GRID, SHAPE, PATCH = (3, 3), (6, 6, 1), 2
FAST, SLOW = Sampling(steps_per_patch=1, overlap=1.0), Sampling(steps_per_patch=3, overlap=0.5)


def fake(z, t):
    """A denoiser in which every patch hears of all others of its image."""
    velocity = jnp.tanh(z + z.mean(axis=(1, 2), keepdims=True)) * patches.expand(t, PATCH)
    return Prediction(velocity, 0.4 + 0.2 * jnp.tanh(z), patches.patch_mean(z[..., 0] ** 2, PATCH))


def problems(number=4, seed=0):
    rng = np.random.default_rng(seed)
    image = rng.uniform(-1, 1, (number, *SHAPE)).astype(np.float32)
    editable = rng.random((number, *GRID)) < 0.7
    return ipr_jax.sample_keys(jax.random.key(seed), number), image, editable


def history(refinement, keys, image, editable):
    """The images after 0, 1, ... iterations of a refinement of given images."""
    images = [image]
    for number in range(1, refinement.iterations + 1):
        shorter = Refinement(**{**vars(refinement), "iterations": number, "stop": stopping.never})
        found = ipr_jax.solve(fake, keys, image, editable, method=shorter)
        images.append(np.asarray(found.image))
    return np.stack(images)


def change(before, after):
    """Mean square change of every patch: [B, h, w]."""
    tiles = ((after - before) ** 2).reshape(-1, GRID[0], PATCH, GRID[1], PATCH)
    return tiles.mean(axis=(2, 4))


def test_ratio_and_sampling_follow_the_iteration():
    keys, image, editable = problems()
    method = Refinement(iterations=4, ratio=(0.9, 0.5, 0.2), later=(SLOW, FAST), first=None)
    found = ipr_jax.solve(fake, keys, image, editable, method=method)
    nfe = 0
    for i, (ratio, later) in enumerate(((0.9, SLOW), (0.5, FAST), (0.2, FAST), (0.2, FAST))):
        refined = ipr_jax.refine(
            fake, keys, image, editable, iterations=1, start=i, ratio=ratio, sampling=later
        )
        image, nfe = refined.image, nfe + refined.nfe[0]
    np.testing.assert_array_equal(found.image, image)
    np.testing.assert_array_equal(found.nfe, nfe)
    assert method.budget(GRID) == 14 + 3  # eight patches of 3 steps, half of which are shared


def test_patches_are_raised_to_a_level():
    keys, image, editable = problems()
    problem = Problem(keys, jnp.asarray(image), jnp.asarray(editable))
    method = Refinement(iterations=2, ratio=0.5, level=(0.25, 1.0), later=FAST, first=None)
    state = jax.jit(method.on(GRID).init)(problem)
    region = np.asarray(state.t) > 0
    np.testing.assert_array_equal(np.asarray(state.t)[region], 0.25)
    np.testing.assert_array_equal(region.sum((1, 2)), np.maximum(1, editable.sum((1, 2)) // 2))
    noise = random_keys.normal(random_keys.iteration_keys(keys, 1).noise, SHAPE)
    mixed = np.where(
        np.kron(region, np.ones((2, 2)))[..., None], 0.75 * image + 0.25 * noise, image
    )
    np.testing.assert_allclose(state.z, mixed, atol=1e-6)
    levels = []

    def watched(z, t):
        jax.debug.callback(lambda t: levels.append(np.unique(t[t > 0])), t)
        return fake(z, t)

    three = Refinement(iterations=2, level=(0.25, 1.0), later=SLOW, ratio=1.0, first=None)
    jax.block_until_ready(ipr_jax.solve(watched, keys[:1], image[:1], editable[:1], method=three))
    assert max(map(max, levels[: len(levels) // 2])) == 0.25
    assert max(map(max, levels)) == 1


def test_what_was_looked_at_longest_ago_comes_next():
    keys, image, _ = problems()
    editable = np.ones((4, *GRID), bool)
    method = Refinement(
        iterations=12,
        ratio=0.12,  # a single patch
        later=FAST,
        first=None,
        select=Informed(by=("age",), temperature=0.01),
    )
    images = history(method, keys, image, editable)
    visited = np.stack([change(before, after) > 0 for before, after in itertools.pairwise(images)])
    np.testing.assert_array_equal(visited.sum((2, 3)), 1)
    visits = np.argmax(visited.reshape(12, 4, 9), axis=2)
    for sample in range(4):  # a round of all nine, and again in the same order
        assert sorted(visits[:9, sample]) == list(range(9))
        np.testing.assert_array_equal(visits[9:, sample], visits[:3, sample])


def test_what_changed_most_comes_next():
    keys, image, editable = problems(seed=3)
    method = Refinement(
        iterations=8, ratio=0.3, later=FAST, first=None, select=Informed(temperature=0.001)
    )
    images = history(method, keys, image, editable)
    doubt = np.where(editable, 1e12, 0)
    for before, after in itertools.pairwise(images):
        moved = change(before, after)
        for sample in range(4):
            chosen = moved[sample] > 0
            assert doubt[sample][chosen].min() >= doubt[sample][~chosen & editable[sample]].max()
        doubt = np.where(moved > 0, moved, doubt)


def test_a_sample_leaves_when_nothing_in_it_is_doubted():
    keys, image, editable = problems(seed=5)
    settings = {"iterations": 30, "ratio": 0.5, "later": FAST, "first": None}
    images = history(Refinement(**settings), keys, image, editable)
    doubt, left = np.full((4, *GRID), 1e12) * editable, np.full(4, 30)
    for number, (before, after) in enumerate(itertools.pairwise(images), 1):
        moved = change(before, after)
        doubt = np.where(moved > 0, moved, doubt)
        calm = (doubt < 1.0).all(axis=(1, 2))
        left = np.where(calm & (left == 30), number, left)
    assert 1 < left.min() < 30, left
    stop = stopping.undoubted(1.0)
    found = ipr_jax.solve(
        fake, keys, image, editable, method=Refinement(**settings, stop=stop), slots=2
    )
    np.testing.assert_array_equal(found.iterations, left)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ratio": (0.5, 1.5)}, r"ratio must be in \(0, 1\], got 1.5"),
        ({"ratio": ()}, r"ratio must be in \(0, 1\], got a tuple"),
        ({"level": 0.0}, r"level must be in \(0, 1\], got 0.0"),
        ({"later": (FAST, None)}, "later must be of type Sampling, got None"),
        (
            {"later": (FAST, Sampling(order=ipr_jax.random_order))},
            "later must be one Sampling or several of the same order",
        ),
    ],
)
def test_impossible_courses_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Refinement(**change)
