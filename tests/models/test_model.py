"""The backbone: parity with the published network, its size, its arithmetic."""

import dataclasses
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import PREFIXES, golden, golden_config, golden_model, nhwc
from flax import nnx

from ipr_jax import PRESETS, SRM, ModelConfig
from ipr_jax.core import patches
from ipr_jax.core.keys import rngs
from ipr_jax.models import precision, unet
from ipr_jax.models.networks import build
from ipr_jax.runtime import flops

TINY = ModelConfig(
    image_size=(20, 12),
    channels=2,
    patch_size=4,
    widths=(8, 16, 16),
    attention=(False, True, False),
    num_blocks=1,
    time_width=8,
    num_frequencies=8,
    head_width=8,
    num_groups=4,
)


evaluate = jax.jit(lambda model, z, t, key=None: model(z, t, key))


def randomised(config: ModelConfig, **options) -> SRM:
    """A model without the zero initialisations, so that every part matters."""
    model = nnx.eval_shape(lambda: SRM(config, rngs=rngs(0), **options))
    rng = np.random.default_rng(1)
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * 0.2, leaf.dtype), model
    )


@pytest.mark.parametrize("weights", PREFIXES)
@pytest.mark.parametrize("name", ["tiny_even", "tiny_sudoku"])
def test_forward_equals_the_published_network(name, weights):
    want = golden(f"{name}/forward.npz")
    config = golden_config(name)
    model = golden_model(name, weights)
    got = evaluate(model, nhwc(want["x"]), want["t_patch"])
    sigma = want[f"{weights}_sigma"][:, 0, :: config.patch_size, :: config.patch_size]
    np.testing.assert_allclose(got.velocity, nhwc(want[f"{weights}_velocity"]), atol=2e-5)
    fraction = nhwc(want[f"{weights}_variance_fraction"])
    np.testing.assert_allclose(got.variance_fraction, fraction, atol=2e-5)
    np.testing.assert_allclose(got.sigma, sigma, atol=2e-5)


@pytest.mark.parametrize(
    ("preset", "parameters", "gflop", "share_of_published"),
    [
        ("even-pixels", 19_718_791, 3.474, 0.38 * 9.225),
        ("counting-polygons", 76_765_191, 126.38, 0.57 * 226.14),
        ("mnist-sudoku", 118_994_691, 484.60, 0.56 * 876.17),
    ],
)
def test_size_and_arithmetic_of_the_released_architectures(
    preset, parameters, gflop, share_of_published
):
    config = PRESETS[preset]
    model = nnx.eval_shape(lambda: build(config))
    assert sum(leaf.size for leaf in jax.tree.leaves(model)) == parameters
    z = jax.ShapeDtypeStruct((1, *config.image_shape), jnp.float32)
    t = jax.ShapeDtypeStruct((1, *config.grid), jnp.float32)
    counted = flops.count(lambda model, z, t: model(z, t), model, z, t) / 1e9
    assert counted == pytest.approx(gflop, rel=2e-4)
    assert counted <= share_of_published


@pytest.mark.parametrize("seed_or_key", [0, jax.random.key(1)], ids=["seed", "key"])
def test_a_new_network_has_the_keys_of_flax(seed_or_key):
    given = [nnx.state(SRM(TINY, rngs=keys(seed_or_key))) for keys in (nnx.Rngs, rngs)]
    for got, want in zip(*map(jax.tree.leaves, given), strict=True):
        np.testing.assert_array_equal(got, want)


def test_flops_of_known_functions():
    a, b = jnp.ones((3, 5)), jnp.ones((5, 7))
    assert flops.count(lambda a, b: jax.nn.silu(a) @ b, a, b) == 2 * 3 * 5 * 7
    conv = nnx.Conv(4, 6, (3, 3), rngs=nnx.Rngs(0))
    assert flops.count(conv, jnp.ones((2, 8, 8, 4))) == 2 * (2 * 8 * 8 * 6) * (3 * 3 * 4)
    looped = flops.count(lambda a, b: jax.lax.fori_loop(0, 9, lambda _, x: x @ b @ b.T, a), a, b)
    assert looped == 2 * (2 * 3 * 5 * 7)


@pytest.mark.parametrize(
    ("grid", "patch_size", "distinct"),
    [
        (8, 4, {32: 8, 16: 8, 8: 8, 4: 4}),
        (16, 8, {128: 16, 64: 16, 32: 16, 16: 16, 8: 8}),
        (9, 28, {252: 9, 126: 9, 63: 9, 32: 11, 16: 9, 8: 8}),
    ],
)
def test_distinct_positions_of_every_resolution(grid, patch_size, distinct):
    for target, number in distinct.items():
        assert len(patches.axis_resize(grid, patch_size, target).low) == number


def taps(size, target):
    """What every target reads, in float32 with a fused multiply-add: (low, high, weight)."""
    scale = Fraction(float(np.float32(size) / np.float32(target)))
    for i in range(target):
        source = np.float32(max(scale * Fraction(2 * i + 1, 2) - Fraction(1, 2), 0))
        low = int(source)
        yield low, min(low + 1, size - 1), source - np.float32(low)


def bilinear(pixels, target):
    """Every position by itself: float32 [B, H, W] -> [B, *target]."""
    found, one = np.empty((len(pixels), *target), np.float32), np.float32(1)
    for i, (a, b, u) in enumerate(taps(pixels.shape[1], target[0])):
        for j, (c, d, v) in enumerate(taps(pixels.shape[2], target[1])):
            above = (one - v) * pixels[:, a, c] + v * pixels[:, a, d]
            below = (one - v) * pixels[:, b, c] + v * pixels[:, b, d]
            found[:, i, j] = (one - u) * above + u * below
    return found


SIZES = [(9, 28, 32), (8, 4, 4), (3, 5, 4)]
INEXACT = [
    (5, 9, 23),
    (9, 5, 12),
    (3, 15, 6),
    (7, 9, 32),
    (7, 5, 18),
    (11, 9, 50),
    (9, 4, 5),
    (3, 7, 11),
]
"""Ratios that binary fractions do not hold; at 50 and 5, rounding twice makes a difference."""


@pytest.mark.parametrize(("grid", "patch_size", "target"), SIZES + INEXACT)
def test_resize_equals_a_pixel_by_pixel_bilinear_one(grid, patch_size, target, rng):
    t = rng.random((2, grid, grid)).astype(np.float32)
    plan = patches.axis_resize(grid, patch_size, target)
    for place, (low, high, weight) in zip(
        plan.position, taps(grid * patch_size, target), strict=True
    ):
        patch, other = low // patch_size, high // patch_size
        assert plan.low[place] == patch
        assert plan.weight[place] == (0 if patch == other else weight)
        assert plan.weight[place] == 0 or plan.high[place] == other
    distinct = np.asarray(patches.resize_levels(jnp.asarray(t), plan, plan))
    got = distinct[:, plan.position][:, :, plan.position]
    pixels = np.kron(t, np.ones((1, patch_size, patch_size), np.float32))
    np.testing.assert_allclose(got, bilinear(pixels, (target, target)), atol=2e-7)


class PixelLevels:
    """The noise levels of an odd-sized network as published: resized and embedded per pixel."""

    def __init__(self, config, embed, t):
        self.config, self.embed = config, embed
        self.pixels = np.kron(t, np.ones((1, config.patch_size, config.patch_size), np.float32))

    def at(self, size):
        half, levels = self.config.num_frequencies // 2, bilinear(self.pixels, size)
        exponent = np.float32(-np.log(10000)) * np.arange(half, dtype=np.float32) / np.float32(half)
        level = np.maximum(np.float32(1000) * levels - np.float32(1), np.float32(0))
        angle = level[..., None] * np.exp(exponent)
        features = np.concatenate([np.cos(angle), np.sin(angle)], axis=-1)
        hidden = self.linear(self.embed.linear1, features)
        return jnp.asarray(self.silu(self.linear(self.embed.linear2, self.silu(hidden))))

    def spread(self, values, size):
        return values

    @staticmethod
    def linear(layer, x):
        return x @ np.asarray(layer.kernel[...]) + np.asarray(layer.bias[...])

    @staticmethod
    def silu(x):
        return x / (np.float32(1) + np.exp(-x))


def test_forward_of_an_odd_size_equals_levels_embedded_per_pixel(rng, monkeypatch):
    """45 x 75 pixels, then 23 x 38; 12 frequencies, no power of two."""
    odd = {"image_size": (45, 75), "patch_size": 3, "num_frequencies": 24, "time_width": 32}
    config = dataclasses.replace(TINY, **odd, widths=(8, 16), attention=(False, False))
    model = randomised(config)
    z = jnp.asarray(rng.normal(size=(2, *config.image_shape)), jnp.float32)
    t = rng.random((2, *config.grid)).astype(np.float32)
    got = evaluate(model, z, t)
    oracle = PixelLevels(config, model.unet.embed, t)
    monkeypatch.setattr(unet, "Levels", lambda *_: oracle)
    want = jax.jit(lambda z: model(z, t))(z)
    for one, other in zip(got, want, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_patch_mean_undoes_expand(rng):
    t = jnp.asarray(rng.random((2, 3, 4)), jnp.float32)
    pixels = patches.expand(t, 5)
    assert pixels.shape == (2, 15, 20, 1)
    np.testing.assert_array_equal(pixels[:, ::5, ::5, 0], t)
    np.testing.assert_allclose(patches.patch_mean(pixels[..., 0], 5), t, rtol=1e-6)


@pytest.mark.parametrize("offset", [0.0, 10.0, 1000.0])
def test_group_norm_does_not_cancel(offset, rng):
    x = (rng.normal(size=(2, 5, 7, 8)) + offset).astype(np.float32)
    groups = x.astype(np.float64).reshape(2, 35, 4, 2)
    centred = groups - groups.mean((1, 3), keepdims=True)
    want = centred / np.sqrt((centred**2).mean((1, 3), keepdims=True) + 1e-5)
    got = unet.GroupNorm(8, 4)(jnp.asarray(x))
    np.testing.assert_allclose(got, want.reshape(x.shape), atol=2e-6 + 2e-7 * offset)


def test_odd_sizes_and_every_sample_by_itself(rng):
    model = randomised(TINY)
    z = jnp.asarray(rng.normal(size=(2, *TINY.image_shape)), jnp.float32)
    t = jnp.asarray(rng.random((2, *TINY.grid)), jnp.float32)
    whole = evaluate(model, z, t)
    assert whole.velocity.shape == z.shape
    assert whole.sigma.shape == t.shape
    alone = evaluate(model, z[1:2], t[1:2])
    for one, many in zip(alone, whole, strict=True):
        np.testing.assert_allclose(one[0], many[1], atol=1e-5)


def test_compute_dtype_changes_little_and_parameters_stay_float32(rng):
    low, full = randomised(TINY, dtype=jnp.bfloat16), randomised(TINY)
    assert {leaf.dtype for leaf in jax.tree.leaves(low)} == {jnp.dtype(jnp.float32)}
    z = jnp.asarray(rng.normal(size=(2, *TINY.image_shape)), jnp.float32)
    t = jnp.asarray(rng.random((2, *TINY.grid)), jnp.float32)
    a, b = evaluate(low, z, t), evaluate(full, z, t)
    assert a.velocity.dtype == jnp.float32
    difference = np.abs(a.velocity - b.velocity).max()
    assert 0 < difference < 0.05 * np.abs(b.velocity).max()


def test_precisions_share_the_weights_and_change_the_products(rng):
    model = randomised(TINY)
    z = jnp.asarray(rng.normal(size=(2, *TINY.image_shape)), jnp.float32)
    t = jnp.asarray(rng.random((2, *TINY.grid)), jnp.float32)
    low = randomised(TINY, dtype=jnp.bfloat16)
    for name, same, products in (
        ("float32", model, (jax.lax.Precision.HIGHEST,) * 2),
        ("tf32", model, (jax.lax.Precision.HIGH,) * 2),
        ("bfloat16", low, None),
    ):
        denoise = precision.compute_in(model, name)
        for got, wanted in zip(jax.jit(denoise)(z, t), evaluate(same, z, t), strict=True):
            np.testing.assert_array_equal(got, wanted)
        made = jax.make_jaxpr(denoise)(z, t).eqns
        convolutions = [each for each in made if each.primitive.name == "conv_general_dilated"]
        assert {each.params["precision"] for each in convolutions} == {products}
    with pytest.raises(ValueError, match="unknown precision 'fp8'; known: float32, tf32, bfloat16"):
        precision.compute_in(model, "fp8")


def test_dropout_needs_a_key(rng):
    model = randomised(TINY)
    z = jnp.asarray(rng.normal(size=(1, *TINY.image_shape)), jnp.float32)
    t = jnp.full((1, *TINY.grid), 0.5)
    one, two = (evaluate(model, z, t, jax.random.key(i)).velocity for i in (0, 1))
    assert np.abs(one - two).max() > 1e-3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_size": (20, 13)}, "multiples of patch_size=4"),
        ({"widths": (8, 18, 16)}, "multiples of num_groups=4"),
        ({"attention": (True,)}, "each of the 3 widths"),
        ({"head_width": 3}, "multiples of head_width=3"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\)"),
        ({"num_blocks": 0}, "num_blocks must be a whole number of at least 1, got 0"),
        ({"num_frequencies": 7}, "even"),
    ],
)
def test_impossible_architectures_are_refused(change, message):
    fields = {name: getattr(TINY, name) for name in TINY.__dataclass_fields__}
    with pytest.raises(ValueError, match=message):
        ModelConfig(**fields | change)


def test_wrong_shapes_are_refused_by_the_model():
    model = nnx.eval_shape(lambda: build(TINY))
    with pytest.raises(ValueError, match=r"\[B, 20, 12, 2\]"):
        jax.eval_shape(model, jnp.ones((1, 20, 20, 2)), jnp.ones((1, 5, 3)))
    with pytest.raises(ValueError, match=r"\[B, 5, 3\]"):
        jax.eval_shape(model, jnp.ones((1, 20, 12, 2)), jnp.ones((1, 5, 4)))
