"""Even pixels: the data against its law, the scores against recorded ones and matplotlib."""

from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import golden, nhwc
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib import colors
from PIL import Image
from scipy import ndimage

from ipr_jax.tasks import even_pixels
from ipr_jax.tasks.locality import gaussian_locality

score = jax.jit(even_pixels.scores)
splits = st.sampled_from(["train", "test"])


def slow_imbalance(image):
    """The published count: borders halfway between the peak of the histogram and its opposite."""
    hue = colors.rgb_to_hsv(np.clip((image + 1) / 2, 0, 1))[..., 0]
    histogram = np.histogram(hue, bins=256, range=(0, 1))[0]
    low = histogram.argmax() % 128
    start, stop = sorted((low + 64, low + 192 if low + 192 <= 256 else low - 64))
    return abs(histogram[start:stop].sum() - 512)


# --- data -----------------------------------------------------------------------------------------


@settings(max_examples=30)
@given(splits, st.integers(0, 2**40), st.lists(st.integers(0, 2**40), min_size=1, max_size=3))
def test_half_of_the_pixels_have_each_of_two_opposite_hues(split, seed, indices):
    image, editable, label = even_pixels.batch(split, seed, np.array(indices))
    assert (image.shape, image.dtype) == ((len(indices), 32, 32, 3), np.float32)
    assert (editable.shape, editable.dtype) == ((len(indices), 8, 8), bool)
    assert (label.shape, label.dtype) == ((len(indices),), np.int32)
    assert editable.all()
    for pixels, pair in zip(image.reshape(-1, 1024, 3), label, strict=True):
        found, counts = np.unique(pixels, axis=0, return_counts=True)
        assert counts.tolist() == [512, 512]
        hue, saturation, value = colors.rgb_to_hsv((found + 1) / 2).T
        assert abs(abs(hue[0] - hue[1]) - 0.5) < 1 / 255
        np.testing.assert_array_equal(saturation, 1)
        np.testing.assert_allclose(value, 178 / 255, atol=1e-7)
        assert {tuple(c) for c in found} == {tuple(c) for c in even_pixels.color_pairs()[pair]}


def test_the_color_pairs_are_those_of_the_published_data_and_equally_likely():
    fine = (np.arange(255 * 40) + 0.5) / (510 * 40)
    hues = np.floor(np.stack([fine, fine + 0.5], axis=1) * 255).astype(int)
    first_seen = list(dict.fromkeys(map(tuple, hues.tolist())))
    assert set(Counter(map(tuple, hues.tolist())).values()) == {40}
    rgb = [
        [Image.new("HSV", (1, 1), (hue, 255, 178)).convert("RGB").getpixel((0, 0)) for hue in pair]
        for pair in first_seen
    ]
    pairs = even_pixels.color_pairs()
    np.testing.assert_allclose(pairs, np.array(rgb) / 127.5 - 1, atol=1e-7)
    assert not pairs.flags.writeable


def test_the_law_of_the_data():
    image, _, label = even_pixels.batch("train", 0, np.arange(2550))
    counts = np.bincount(label, minlength=255)
    assert ((counts - 10) ** 2 / 10).sum() < 254 + 5 * (2 * 254) ** 0.5
    second = (image == even_pixels.color_pairs()[label, 1][:, None, None]).all(axis=-1)
    share = second.mean(axis=0)
    assert abs(share - 0.5).max() < 5 * 0.5 / 2550**0.5
    assert share.std() > 0.5 * 0.5 / 2550**0.5
    neighbours = np.corrcoef(second[:, :, 1:].ravel(), second[:, :, :-1].ravel())[0, 1]
    assert abs(neighbours + 1 / 1023) < 0.005


def test_rows_depend_on_split_seed_and_index_alone():
    whole = even_pixels.batch("test", 3, np.arange(8))
    part = even_pixels.batch("test", 3, np.array([5, 2, 5]))
    for all_rows, rows in zip(whole, part, strict=True):
        np.testing.assert_array_equal(all_rows[[5, 2, 5]], rows)
    assert len({image.tobytes() for image in whole.image}) == 8
    for other in (even_pixels.batch("test", 4, np.arange(8)),
                  even_pixels.batch("train", 3, np.arange(8))):  # fmt: skip
        assert (other.image != whole.image).any(axis=(1, 2, 3)).all()
    assert even_pixels.batch("test", 3, np.zeros(0, int)).image.shape == (0, 32, 32, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("all", 0, [0]), "'train' or 'test', got 'all'"),
        (("test", -1, [0]), "seed must be >= 0 .* got -1"),
        (("test", 0, [-1]), "indices a flat list of numbers >= 0"),
        (("test", 0, 3), "indices a flat list of numbers >= 0"),
    ],
)
def test_other_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        even_pixels.batch(*arguments)


# --- scores ---------------------------------------------------------------------------------------


def test_scores_equal_the_published_ones():
    recorded = golden("evaluations.npz")
    for scores in (score(nhwc(recorded["even_images"])),
                   even_pixels.scores(jnp.asarray(nhwc(recorded["even_images"])))):  # fmt: skip
        assert scores["imbalance"].dtype == jnp.int32
        np.testing.assert_array_equal(scores["imbalance"], recorded["even_color_imbalance_count"])
        np.testing.assert_array_equal(scores["balanced"], recorded["even_is_color_count_even"] == 1)
        for name in ("saturation_std", "value_std"):
            assert scores[name].dtype == jnp.float32
            np.testing.assert_allclose(scores[name], recorded[f"even_{name}"], atol=2e-7)


def noisy(rng, scale):
    image = even_pixels.batch("test", 0, np.arange(400)).image
    return (image + scale * rng.standard_normal(image.shape)).astype(np.float32)


@pytest.mark.parametrize("levels", [None, 255, 8])
@pytest.mark.parametrize("scale", [0.05, 0.3, 2])
def test_imbalance_equals_a_slow_count(rng, levels, scale):
    """``levels``: rounded to so many steps, which gives many equal channels and hues on edges."""
    image = noisy(rng, scale)
    if levels:
        image = np.round((image.clip(-1, 1) + 1) / 2 * levels).astype(np.float32) / levels * 2 - 1
    imbalance = np.asarray(score(image)["imbalance"])
    np.testing.assert_array_equal(imbalance, [slow_imbalance(x) for x in image])
    np.testing.assert_array_equal(score(image)["balanced"], imbalance == 0)
    if scale == 2:
        assert len(set(imbalance.tolist())) > 20


def test_hues_are_those_of_matplotlib_bit_for_bit(rng):
    rgb = rng.uniform(0, 1, (600_000, 3)).astype(np.float32)
    rgb[:200_000] = np.round(rgb[:200_000] * 128) / 128
    rgb[:3] = [[0, 0, 0], [1, 1, 1], [0.5, 0.5, 0.5]]
    rgb[3:99] = [1, 0, 1e-9]  # a hue that is rounded up to 1
    rgb[99, :] = [1, 1e-9, 0]
    expected = colors.rgb_to_hsv(rgb)
    assert expected[3, 0] == 1
    for ours, theirs in zip(jax.jit(even_pixels.rgb_to_hsv)(rgb), expected.T, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@given(st.integers(0, 254), st.integers(0, 512))
def test_imbalance_is_the_number_of_pixels_on_the_wrong_side(pair, moved):
    image = np.repeat(even_pixels.color_pairs()[pair], [512 - moved, 512 + moved], axis=0)
    scores = score(image.reshape(1, 32, 32, 3))
    assert scores["imbalance"][0] == moved
    assert scores["balanced"][0] == (moved == 0)
    assert even_pixels.describe(scores) == [f"{512 - moved} : {512 + moved} pixels"]
    assert scores["saturation_std"][0] == scores["value_std"][0] == 0


def test_bad_images_are_unbalanced_or_refused():
    assert score(jnp.full((1, 32, 32, 3), jnp.nan))["imbalance"][0] == 512
    assert score(jnp.zeros((0, 32, 32, 3)))["balanced"].shape == (0,)
    with pytest.raises(ValueError, match=r"\[B, 32, 32, 3\], got \(32, 32, 3\)"):
        even_pixels.scores(jnp.zeros((32, 32, 3)))


# --- locality -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("h", "w"), [(8, 8), (16, 16), (5, 7), (4, 9), (2, 1), (1, 1)])
def test_locality_is_a_blur_of_every_patch(h, w):
    reach = max(h, w) // 2
    distance = np.arange(-reach, reach + 1)
    kernel = np.exp(-(distance[:, None] ** 2 + distance**2) / 8)
    blurred = [
        ndimage.convolve(patch.reshape(h, w), kernel / kernel.sum(), mode="constant").ravel()
        for patch in np.eye(h * w)
    ]
    matrix = gaussian_locality(h, w)
    assert matrix.dtype == np.float32
    np.testing.assert_allclose(matrix, blurred, rtol=1e-6)
    np.testing.assert_array_equal(matrix, matrix.T)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 8), "h must be a whole number of at least 1, got 0"),
        ((8, 2.5), "w must be a whole number of at least 1, got 2.5"),
        ((8, 8, 0.0), "sigma must be above 0 and finite, got 0.0"),
        ((8, 8, float("nan")), "sigma must be above 0 and finite, got nan"),
    ],
)
def test_locality_refuses_other_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        gaussian_locality(*arguments)
