"""Depth-first search: what it costs, what it keeps, and that it finds what the verifier wants."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ipr_jax
from ipr_jax import Prediction, Sampling
from ipr_jax.core import patches
from ipr_jax.methods.backtracking import Backtracking
from ipr_jax.methods.scores import verifier

GRID, SHAPE, PATCH = (3, 3), (6, 6, 1), 2
SAMPLING = Sampling(steps_per_patch=4, overlap=0.5, stochasticity=0.9)


def fake(z, t):
    """An elementwise denoiser whose certainty differs from patch to patch."""
    velocity = 0.9 * z * patches.expand(t, PATCH) + 0.1
    means = patches.patch_mean(jnp.abs(z[..., 0]), PATCH)
    return Prediction(velocity, 0.4 + 0.2 * jnp.tanh(z), 0.1 + means)


def problems(number=5, seed=0):
    rng = np.random.default_rng(seed)
    image = rng.uniform(-1, 1, (number, *SHAPE)).astype(np.float32)
    editable = rng.random((number, *GRID)) < 0.8
    return ipr_jax.sample_keys(jax.random.key(seed), number), image, editable


def brightness(image, level, prediction):
    return image.mean(axis=(1, 2, 3))


BRIGHT = verifier(brightness, "independent")


def solve(threshold, given=None, **change):
    method = Backtracking(
        **({"verifier": BRIGHT, "threshold": threshold, "sampling": SAMPLING, "checks": 3} | change)
    )
    return ipr_jax.solve(fake, *(given or problems()), method=method), method


@pytest.mark.parametrize(("jump", "backtracks"), [(2, 4), (1, 3), (5, 0)])
def test_it_costs_a_pass_and_what_it_goes_back(jump, backtracks):
    plain = ipr_jax.generate(fake, *problems(), SAMPLING)
    found, method = solve(-np.inf, jump=jump, backtracks=backtracks)
    np.testing.assert_array_equal(found.nfe, plain.nfe)
    np.testing.assert_array_equal(found.image, plain.image)
    np.testing.assert_array_equal(found.nve, 3)
    found, _ = solve(np.inf, jump=jump, backtracks=backtracks)
    # All of them at the first check, before which there are more steps than it jumps.
    first = -(-np.asarray(plain.nfe) // 3)
    again = np.minimum(jump + 1, first)
    np.testing.assert_array_equal(found.nfe, np.asarray(plain.nfe) + backtracks * again)
    np.testing.assert_array_equal(found.nve, 3 + backtracks)
    assert np.max(found.nfe) <= method.budget(GRID)
