"""The formulas of rectified flow: recorded values, limits, gradients, exact laws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import golden, nhwc
from hypothesis import given
from hypothesis import strategies as st

from ipr_jax.sampling import flow

LEVEL = st.one_of(st.sampled_from([0.0, 0.5, 1.0]), st.floats(2**-20, 1 - 2**-20, width=32))


@pytest.mark.parametrize("stochasticity", [0.0, 0.5, 1.0])
def test_step_equals_the_published_one(stochasticity):
    want = golden("flow.npz")
    z, velocity, fraction = (nhwc(want[k]) for k in ("z", "velocity", "variance_fraction"))
    t, s = want["t"], want["t_next"]
    mean = flow.step_mean(z, t, s, velocity, stochasticity)
    std = flow.step_std(t, s, stochasticity, fraction)
    np.testing.assert_allclose(mean, nhwc(want[f"mean_{stochasticity}"]), atol=2e-5)
    np.testing.assert_allclose(std, nhwc(want[f"std_{stochasticity}"]), atol=2e-5)


def test_posterior_equals_the_published_one():
    want = golden("flow.npz")
    mean, std = flow.posterior(nhwc(want["x"]), nhwc(want["eps"]), want["t"], want["t_next"], 1.0)
    np.testing.assert_allclose(mean, nhwc(want["q_mean"]), atol=2e-5)
    np.testing.assert_allclose(std, nhwc(want["q_std"]), atol=2e-5)


@jax.jit
def step_value_and_gradients(*arguments):
    def both(t, s, velocity, fraction, stochasticity):
        mean = flow.step_mean(jnp.float32(0.3), t, s, velocity, stochasticity)
        return mean + flow.step_std(t, s, stochasticity, fraction)

    return jax.value_and_grad(both, argnums=(0, 1, 2, 3, 4))(*arguments)


@given(LEVEL, LEVEL, st.floats(0, 1, width=32), st.floats(-1, 2, width=32))
def test_values_and_gradients_are_finite(a, b, stochasticity, fraction):
    t, s = max(a, b), min(a, b)
    arguments = (np.float32(x) for x in (t, s, -0.7, fraction, stochasticity))
    value, gradients = step_value_and_gradients(*arguments)
    assert np.isfinite([value, *gradients]).all()


@pytest.mark.parametrize("stochasticity", [0.0, 0.5, 1.0])
def test_limits(stochasticity, rng):
    z, velocity, fraction = (jnp.asarray(rng.normal(size=50), jnp.float32) for _ in range(3))
    zero, one, half = (jnp.full(50, level, jnp.float32) for level in (0, 1, 0.5))
    for t in (half, one):  # ending at 0 gives the clean image without noise
        mean = flow.step_mean(z, t, zero, velocity, stochasticity)
        np.testing.assert_allclose(mean, flow.clean_image(z, t, velocity), atol=1e-6)
        np.testing.assert_array_equal(flow.step_std(t, zero, stochasticity, fraction), 0)
    for level in (zero, one):  # where the level stays at an end, nothing moves
        np.testing.assert_array_equal(flow.step_mean(z, level, level, velocity, stochasticity), z)
        np.testing.assert_array_equal(flow.step_std(level, level, stochasticity, fraction), 0)


def test_deterministic_step_follows_the_straight_line(rng):
    image, noise = (jnp.asarray(rng.normal(size=100), jnp.float32) for _ in range(2))
    t, s = (jnp.asarray(rng.random(100), jnp.float32) for _ in range(2))
    t, s = jnp.maximum(t, s), jnp.minimum(t, s)
    z = flow.interpolate(image, noise, t)
    got = flow.step_mean(z, t, s, flow.velocity_of(image, noise), 0.0)
    np.testing.assert_allclose(got, flow.interpolate(image, noise, s), atol=1e-6)


@pytest.mark.parametrize("stochasticity", [0.0, 0.5, 1.0])
def test_posterior_keeps_the_marginal_law(stochasticity):
    """Given the image, a step from z_t must land on N((1 - s) image, s^2), whatever its noise."""
    t, s, image = jnp.float32(0.8), jnp.float32(0.35), jnp.float32(0.4)
    # z_s = (1 - s) image + gamma noise + std fresh, so its variance is gamma^2 + std^2.
    _, std = flow.posterior(image, jnp.float32(0), t, s, stochasticity)
    gamma = flow.noise_kept(t, s, stochasticity)
    np.testing.assert_allclose(gamma**2 + std**2, s**2, rtol=1e-6)


def test_a_raised_level_is_that_of_the_forward_process(rng):
    """Given the image, z_s raised to t must be N((1 - t) image, t^2), as if noised at once."""
    for s, t, image in ((0.0, 0.7, 0.4), (0.35, 0.8, -0.3), (0.8, 0.8001, 0.4), (0.5, 1.0, 0.9)):
        noise, fresh = rng.normal(size=(2, 200_000)).astype(np.float32)
        z = flow.interpolate(jnp.float32(image), noise, jnp.float32(s))
        found = np.asarray(flow.raise_level(z, jnp.float32(s), jnp.float32(t), fresh), np.float64)
        # Standard errors of a mean and of a standard deviation of 200,000, five times.
        assert abs(found.mean() - (1 - t) * image) < 5 * t / 200_000**0.5
        assert abs(found.std() - t) < 5 * t / 400_000**0.5
        kept = (1 - t) / (1 - s)
        one, none = np.float32(1), np.float32(0)
        levels = np.float32(s), np.float32(t)
        np.testing.assert_allclose(flow.raise_level(one, *levels, none), kept, rtol=1e-3)
        added = np.sqrt(t**2 - (kept * s) ** 2)
        np.testing.assert_allclose(flow.raise_level(none, *levels, one), added, rtol=1e-3)


def test_limits_of_a_raised_level(rng):
    z, noise = (jnp.asarray(rng.normal(size=50), jnp.float32) for _ in range(2))
    zero, one, half = (jnp.full(50, level, jnp.float32) for level in (0, 1, 0.5))
    for level in (zero, half, one):
        np.testing.assert_array_equal(flow.raise_level(z, level, level, noise), z)
        np.testing.assert_array_equal(flow.raise_level(z, level, zero, noise), z)
    for level in (zero, half):
        np.testing.assert_array_equal(flow.raise_level(z, level, one, noise), noise)


raised_value_and_gradients = jax.jit(jax.value_and_grad(flow.raise_level, argnums=(0, 1, 2, 3)))


@given(LEVEL, LEVEL)
def test_raised_levels_and_their_gradients_are_finite(s, t):
    arguments = (np.float32(x) for x in (0.3, s, t, -1.2))
    value, gradients = raised_value_and_gradients(*arguments)
    assert np.isfinite([value, *gradients]).all()
