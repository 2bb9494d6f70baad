"""Small problems for methods that search: images of 2x2 patches, a denoiser, and scores."""

import jax
import jax.numpy as jnp
import numpy as np

import ipr_jax
from ipr_jax import Prediction, Sampling
from ipr_jax.core import patches
from ipr_jax.methods.scores import verifier

GRID, SHAPE, PATCH = (2, 2), (4, 4, 1), 2
SAMPLING = Sampling(steps_per_patch=4, overlap=0.5, stochasticity=0.9)


def fake(z, t):
    """An elementwise denoiser whose certainty differs from patch to patch."""
    velocity = 0.9 * z * patches.expand(t, PATCH) + 0.1
    means = patches.patch_mean(jnp.abs(z[..., 0]), PATCH)
    return Prediction(velocity, 0.4 + 0.2 * jnp.tanh(z), 0.1 + means)


def problems(number=5, sizes=4, seed=0):
    """Keys, images, and masks of which 1, 2, ... patches are editable, at most ``sizes``, and so on
    again.
    """
    image = np.random.default_rng(seed).uniform(-1, 1, (number, *SHAPE)).astype(np.float32)
    editable = np.arange(4).reshape(1, *GRID) <= (np.arange(number) % sizes)[:, None, None]
    return ipr_jax.sample_keys(jax.random.key(seed), number), image, editable


def brightness(image, level=None, prediction=None):
    return image.mean(axis=(1, 2, 3))


BRIGHT = verifier(brightness, "independent")
FLAT = verifier(lambda image, level, prediction: jnp.zeros(len(image)), "internal")
