"""What the network doubts about samples."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ipr_jax
from ipr_jax import Prediction
from ipr_jax.core import patches
from ipr_jax.methods.doubts import deal, most_doubted

GRID, PATCH = (3, 4), 2
RNG = np.random.default_rng(0)
TARGET, IMAGE = RNG.uniform(-1, 1, (2, 5, 6, 8, 1)).astype(np.float32)
KEYS = ipr_jax.sample_keys(jax.random.key(0), 5)


def certain(z, t):
    """It predicts the first target for patches that are noise, and tells what it saw by sigma."""
    return Prediction(z - TARGET[:1], z, 1 + jnp.ones_like(t) * t.sum(axis=(1, 2), keepdims=True))


def mean(z, t):
    """A patch is predicted to be the mean of the pixels that are not hidden."""
    known = patches.expand(1 - t, PATCH)
    seen = (z * known).sum(axis=(1, 2, 3), keepdims=True) / known.sum(axis=(1, 2, 3), keepdims=True)
    return Prediction(z - seen, z, t)


@pytest.mark.parametrize("parts", [2, 5, 12])
def test_every_patch_is_compared_with_its_prediction(parts):
    found = ipr_jax.doubts(certain, KEYS, IMAGE, grid=GRID, parts=parts)
    want = ((IMAGE - TARGET[:1]) ** 2).reshape(5, 3, PATCH, 4, PATCH).mean(axis=(2, 4))
    np.testing.assert_allclose(found, want, rtol=1e-5)


def test_a_patch_is_predicted_from_the_others_alone():
    """What stands in it does not enter; what stands elsewhere does."""

    found = np.asarray(ipr_jax.doubts(mean, KEYS, IMAGE, grid=GRID, parts=12))
    tiles = IMAGE.reshape(5, 3, PATCH, 4, PATCH)
    for row, column in np.ndindex(GRID):
        others = np.ones((5, *GRID), bool)
        others[:, row, column] = False
        guess = tiles.mean(axis=(2, 4))[others].reshape(5, -1).mean(axis=1)
        want = ((tiles[:, row, :, column] - guess[:, None, None]) ** 2).mean(axis=(1, 2))
        np.testing.assert_allclose(found[:, row, column], want, rtol=1e-4)


def test_a_second_round_asks_about_what_the_first_predicted():
    """Both rounds by hand."""
    parts = 3

    found = ipr_jax.doubts(mean, KEYS, IMAGE, grid=GRID, parts=parts, rounds=2)
    part = np.asarray(deal(KEYS, GRID, parts))
    tiles = IMAGE.reshape(5, 3, PATCH, 4, PATCH).mean(axis=(2, 4), dtype=np.float64)

    def predicted(values):
        rest = [np.where(part == each, np.nan, values) for each in range(parts)]
        means = np.stack([np.nanmean(each, axis=(1, 2)) for each in rest], axis=1)
        return np.take_along_axis(means, part.reshape(5, -1), axis=1).reshape(part.shape)

    first = predicted(tiles)
    want = (predicted(first) - first) ** 2
    np.testing.assert_allclose(found, want, rtol=1e-3, atol=1e-8)
    assert want.max() > 1e-4


def test_in_the_second_round_textures_are_not_doubted():
    """What is predicted of patches does not depend on the others: nothing changes."""
    np.testing.assert_array_equal(
        ipr_jax.doubts(certain, KEYS, IMAGE, grid=GRID, parts=4, rounds=2), 0
    )


def test_parts_are_dealt_evenly_and_by_sample():
    dealt = np.asarray(deal(KEYS, GRID, 5))
    for sample in dealt:
        assert sorted(np.bincount(sample.ravel()).tolist()) == [2, 2, 2, 3, 3]
    assert len({sample.tobytes() for sample in dealt}) == 5
    np.testing.assert_array_equal(deal(KEYS[2:3], GRID, 5)[0], dealt[2])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"parts": 1}, "parts must be a whole number of at least 2"),
        ({"parts": 13}, "parts must be .* got 13"),
        ({"rounds": 0}, "rounds must be a whole number of at least 1, got 0"),
        ({"grid": (4, 4)}, "patch"),
        ({"image": IMAGE * np.nan}, "finite"),
    ],
)
def test_what_cannot_be_doubted_is_refused(change, message):
    given = {"image": IMAGE, "grid": GRID} | change
    with pytest.raises(ValueError, match=message):
        ipr_jax.doubts(certain, KEYS, **given)


def test_the_most_doubted_patches_are_few_and_editable():
    doubt, editable = np.array([[9, 1, 2], [3, 4, 0]], np.float32), np.ones((2, 3), bool)
    editable[0, 0] = False
    found = most_doubted(doubt, editable, calm=10)
    assert found.tolist() == [[False, False, True], [True, True, False]]
    assert not most_doubted(doubt, editable, calm=10.1).any()
    few = most_doubted(doubt, np.array([[0, 1, 0], [0, 0, 1]], bool), calm=0.5)
    assert few.tolist() == [[False, True, False], [False, False, False]]
