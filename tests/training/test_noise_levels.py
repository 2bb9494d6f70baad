"""Noise levels and their weights, against recorded statistics and closed forms."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import golden
from scipy import stats

from ipr_jax.training import noise_levels

SETTINGS = ["sudoku", "even_pixels", "counting_polygons"]
NUM_RECORDED, NUM_DRAWN = 20_000, 10_000


def mean_beta_by_numpy(key, batch, grid, *, sharpness):
    """With the draws of ``jax.random.beta`` by NumPy, as constants, which compiles sooner."""
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))

    def beta(key, a, b, shape):
        return jnp.asarray(rng.beta(a, b, shape), jnp.float32)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(jax.random, "beta", beta)
        return jax.jit(lambda key: noise_levels.mean_beta(key, batch, grid, sharpness=sharpness))(
            key
        )


class Recorded:
    """What was recorded of one setting, and draws of our own, [NUM_DRAWN, P]."""

    def __init__(self, name):
        statistics = golden("time_sampler.npz")
        for field in (
            "marginal_hist50",
            "mean_quantiles",
            "std_given_mean",
            "zero_fraction_quantiles",
            "weight_by_t50",
        ):
            setattr(self, field, statistics[f"{name}_{field}"])
        self.grid = tuple(statistics[f"{name}_grid"].tolist())
        self.patches = self.grid[0] * self.grid[1]
        self.sharpness = float(statistics[f"{name}_beta_sharpness"])
        self.drawn = mean_beta_by_numpy(
            jax.random.key(0), NUM_DRAWN, self.grid, sharpness=self.sharpness
        )
        self.t = np.asarray(self.drawn).reshape(NUM_DRAWN, self.patches)
        counts = [np.histogram(row, bins=50, range=(0, 1))[0] for row in self.t]
        self.densities = 50 * np.array(counts) / self.patches


recorded = functools.cache(Recorded)


def assert_within_5_errors(difference, error):
    np.testing.assert_array_less(np.abs(difference), 5 * error)


@pytest.mark.parametrize("name", SETTINGS)
def test_mean_beta_has_the_recorded_density(name):
    want = recorded(name)
    error = want.densities.std(axis=0) * np.sqrt(1 / NUM_DRAWN + 1 / NUM_RECORDED)
    assert_within_5_errors(want.densities.mean(axis=0) - want.marginal_hist50, error)


@pytest.mark.parametrize("name", SETTINGS)
def test_mean_beta_spreads_the_patches_as_recorded(name):
    want = recorded(name)
    spread = want.t.std(axis=1, ddof=1)
    decile = np.clip((10 * want.t.mean(axis=1)).astype(int), 0, 9)
    groups = [spread[decile == i] for i in range(10)]
    counts = np.array([len(group) for group in groups])
    share = counts / NUM_DRAWN
    error = np.array([group.std() for group in groups]) * np.sqrt(
        1 / counts + 1 / (share * NUM_RECORDED)
    )
    assert_within_5_errors([g.mean() for g in groups] - want.std_given_mean, error)


@pytest.mark.parametrize("name", SETTINGS)
def test_mean_of_an_image_is_the_uniform_draw(name):
    want = recorded(name)
    means = want.t.mean(axis=1)
    assert stats.kstest(means, "uniform").pvalue > 0.01
    quantiles = np.linspace(0, 1, 11)[1:-1]
    error = np.sqrt(quantiles * (1 - quantiles) * (1 / NUM_DRAWN + 1 / NUM_RECORDED))
    assert_within_5_errors(np.quantile(means, quantiles) - want.mean_quantiles[1:-1], error)
    mean_key = jax.random.split(jax.random.key(0), 3)[0]
    np.testing.assert_allclose(means, jax.random.uniform(mean_key, (NUM_DRAWN,)), atol=1e-6)


@pytest.mark.parametrize("name", SETTINGS)
def test_mean_beta_treats_all_patches_alike(name):
    t = recorded(name).t
    for moment in (t, t**2):
        gap = moment - moment.mean(axis=1, keepdims=True)
        assert_within_5_errors(gap.mean(axis=0), gap.std(axis=0) / np.sqrt(NUM_DRAWN))
    half = t.shape[1] // 2
    siblings = (t[:, 0 : 2 * half : 2] * t[:, 1 : 2 * half : 2]).mean(axis=1)
    strangers = (t[:, :half] * t[:, half : 2 * half]).mean(axis=1)
    gap = siblings - strangers
    assert_within_5_errors(gap.mean(), gap.std() / np.sqrt(NUM_DRAWN))


@pytest.mark.parametrize("name", SETTINGS)
def test_weights_are_as_recorded(name, monkeypatch):
    want = recorded(name)
    monkeypatch.setattr(noise_levels, "NUM_NORMALISATION_SAMPLES", NUM_DRAWN)
    got = noise_levels.inverse_density(
        lambda key, editable: want.drawn[: len(editable)], jax.random.key(0), want.grid
    )
    weight = 1 / (1 / got.astype(np.float64)).reshape(50, 20).mean(axis=1)
    relative = want.densities.std(axis=0) / want.densities.mean(axis=0)
    error = weight * relative * np.sqrt(1 / NUM_DRAWN + 1 / 80_000)
    assert_within_5_errors(weight - want.weight_by_t50, error)


@pytest.mark.parametrize("name", SETTINGS)
def test_share_of_zeros_is_as_recorded(name):
    want = recorded(name)
    t, _ = jax.jit(noise_levels.add_zeros)(jax.random.key(1), want.drawn, want.drawn)
    share = np.mean(np.asarray(t) == 0, axis=(1, 2))
    quantiles = np.linspace(0, 1, 11)[1:-1]
    error = np.sqrt(quantiles * (1 - quantiles) * (1 / NUM_DRAWN + 1 / NUM_RECORDED))
    gap = np.quantile(share, quantiles) - want.zero_fraction_quantiles[1:-1]
    assert_within_5_errors(gap, error + 0.2 / want.patches)  # 1 / P: quantiles of a discrete law


def sampler(name, sharpness=1.0):
    """The sampler of a name, of a number of images without clues."""
    sample = noise_levels.SAMPLERS[name](sharpness)
    return lambda key, batch, grid: sample(key, jnp.ones((batch, *grid), bool))


@pytest.mark.parametrize("name", noise_levels.SAMPLERS)
@pytest.mark.parametrize("grid", [(1, 1), (2, 3)])
def test_levels_are_in_range_and_hang_on_the_key(name, grid):
    one, same, other = (sampler(name)(jax.random.key(i), NUM_DRAWN, grid) for i in (0, 0, 1))
    assert one.shape == (NUM_DRAWN, *grid)
    assert one.dtype == jnp.float32
    assert 0 <= one.min() < 0.01
    assert 0.99 < one.max() <= 1
    np.testing.assert_array_equal(one, same)
    assert (one != other)[(one > 0) & (one < 1)].all()


def test_mean_beta_halves_the_patches_with_the_published_concentrations(monkeypatch):
    used = []

    def beta(key, a, b, shape):
        np.testing.assert_array_equal(a, b)
        used.extend(np.ravel(a).tolist())
        return jnp.full(shape, 0.5)

    monkeypatch.setattr(jax.random, "beta", beta)
    jax.eval_shape(lambda key: sampler("mean-beta", 0.5)(key, 2, (3, 3)), jax.random.key(0))
    # 9 = 4 + 5, then 4 = 2 + 2 and 5 = 2 + 3, then twos and the three, then its two.
    want = 0.5 * np.array([7, 3, 3, 1, 1, 1, 1, 1]) ** 1.05
    assert sorted(used) == sorted(want.astype(np.float32).tolist())


def test_mean_beta_is_the_same_law_whoever_draws_the_shares():
    """What the recorded statistics show of NumPy's shares holds of those of JAX."""
    ours, by_numpy = (
        draw(jax.random.key(i), NUM_DRAWN, (2, 3), sharpness=0.5)
        for i, draw in enumerate((noise_levels.mean_beta, mean_beta_by_numpy))
    )
    for statistic in (np.std, np.max):
        one, two = (statistic(np.asarray(t), axis=(1, 2)) for t in (ours, by_numpy))
        assert stats.ks_2samp(one, two).pvalue > 0.01


def test_a_sharper_sampler_makes_patches_more_alike():
    low, medium, high = (
        sampler("mean-beta", sharpness)(jax.random.key(0), NUM_DRAWN, (2, 3))
        .std(axis=(1, 2))
        .mean()
        for sharpness in (0.5, 1.0, 4.0)
    )
    assert low > 1.2 * medium
    assert medium > 1.2 * high


def test_shared_levels_are_equal_in_an_image_and_uniform():
    t = np.asarray(sampler("shared")(jax.random.key(0), NUM_DRAWN, (3, 2))).reshape(-1, 6)
    assert (t == t[:, :1]).all()
    assert stats.kstest(t[:, 0], "uniform").pvalue > 0.01


def test_independent_levels_are_independent_and_uniform():
    t = np.asarray(sampler("independent")(jax.random.key(0), NUM_DRAWN, (3, 2))).reshape(-1, 6)
    assert stats.kstest(t.ravel(), "uniform").pvalue > 0.01
    correlation = np.corrcoef(t, rowvar=False)[np.triu_indices(6, 1)]
    assert_within_5_errors(correlation, 1 / np.sqrt(NUM_DRAWN))


def test_added_zeros_are_a_uniform_number_of_random_patches():
    number, grid = NUM_DRAWN, (3, 4)
    t = np.random.default_rng(0).uniform(0.1, 1, (number, *grid)).astype(np.float32)
    weight = 1 + t
    new_t, new_weight = jax.jit(noise_levels.add_zeros)(jax.random.key(1), t, weight)
    zero = np.asarray(new_t) == 0
    np.testing.assert_array_equal(new_t, np.where(zero, 0, t))
    np.testing.assert_array_equal(new_weight, np.where(zero, 0, weight))
    counts = np.bincount(zero.sum(axis=(1, 2)), minlength=13)
    assert counts[12] == 0  # something is left to learn in every image
    assert stats.chisquare(counts[:12]).pvalue > 0.01
    flat = zero.reshape(number, 12)
    share = 5.5 / 12  # a count uniform in 0..11
    assert_within_5_errors(flat.mean(axis=0) - share, np.sqrt(share * (1 - share) / number))
    pairs = np.einsum("bi,bj->ij", flat, flat, dtype=np.float64)[np.triu_indices(12, 1)] / number
    both = np.mean([k * (k - 1) for k in range(12)]) / (12 * 11)
    assert_within_5_errors(pairs - both, np.sqrt(both * (1 - both) / number))


def test_sequential_levels_are_those_of_passes_and_others():
    """In a pass, the levels are those of a line of places that are equally far apart."""
    sample = jax.jit(noise_levels.SAMPLERS["sequential"](1.0))
    inside, passes, whole = np.random.default_rng(0).random((NUM_DRAWN, 3, 4)) < 0.7, 0, 0
    t = np.asarray(sample(jax.random.key(0), inside))
    assert t.dtype == np.float32
    assert (t >= 0).all()
    assert (t <= 1).all()
    for levels in (each[mask] for each, mask in zip(t, inside, strict=True) if mask.sum() > 2):
        gaps = np.diff(np.sort(levels[(levels > 1e-6) & (levels < 1 - 1e-6)]))
        whole += 1
        passes += len(gaps) < 2 or np.ptp(gaps) < 1e-4
    assert 0.5 - 0.02 < passes / whole < 0.5 + 0.03  # of the others, few are so by chance
    means = [each[mask].mean() for each, mask in zip(t, inside, strict=True) if mask.any()]
    assert stats.ks_2samp(means, 1 - np.array(means)).pvalue > 0.01
    one = np.zeros((NUM_DRAWN, 3, 4), bool)
    one[:, 1, 1] = True
    alone = np.asarray(sample(jax.random.key(2), one))[:, 1, 1]
    assert stats.ks_2samp(alone, 1 - alone).pvalue > 0.01


def test_images_of_few_noisy_patches_weigh_more():
    t = np.zeros((3, 4, 8), np.float32)
    t[0, 0] = 0.5
    t[1, 0, 0] = 1e-3
    t[2] = 1
    got = noise_levels.per_image(jnp.asarray(t))
    np.testing.assert_allclose(got, np.float32([4, 20, 1]).reshape(3, 1, 1), rtol=1e-6)


def test_weights_undo_the_density():
    def rising(key, editable):
        """Density 2 t."""
        return jnp.sqrt(jax.random.uniform(key, editable.shape))

    inverse = noise_levels.inverse_density(rising, jax.random.key(0), (2, 2))
    assert inverse.shape == (1000,)
    assert inverse.dtype == np.float32
    middle = (np.arange(1000) + 0.5) / 1000
    drawn = 4 * noise_levels.NUM_NORMALISATION_SAMPLES
    expected = drawn * 2 * middle / 1000
    common = expected > 100
    counts = drawn / 1000 / inverse[common]
    assert_within_5_errors(counts - expected[common], np.sqrt(expected[common]))

    t = np.asarray(rising(jax.random.key(1), jnp.ones((20_000, 2, 2))))
    weight = np.asarray(noise_levels.weigh(jnp.asarray(t), jnp.asarray(inverse)))
    for low, high in itertools.pairwise(np.linspace(0, 1, 6)):
        share = weight * ((t >= low) & (t < high))
        error = share.std() / np.sqrt(share.size)
        assert_within_5_errors(share.mean() - (high - low), 1.2 * error)


def test_weights_are_looked_up_by_bin():
    inverse = jnp.arange(1000.0)
    t = jnp.float32([[[0.0, 0.0005, 0.0015], [0.5005, 0.9995, 1.0]]])
    want = [[[0, 0, 1], [500, 999, 999]]]
    np.testing.assert_array_equal(noise_levels.weigh(t, inverse), want)
