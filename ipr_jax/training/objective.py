"""The SRM training objective (arXiv 2502.21075, section 3 and appendix A).

Three terms, each weighted per patch and averaged over every pixel and channel: the rectified-flow
velocity error, the variational bound for the variance fraction (in bits; the velocity is held
fixed in it), and the negative log-likelihood for sigma (likewise).
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ipr_jax.core import Denoiser, Prediction, patches
from ipr_jax.sampling import flow

VLB_STEP = 1e-3
"""The bound's step down in noise level."""
SMALLEST_LEVEL = 1e-5
"""Below this noise level a step ends at the clean image."""
SIGMA_WEIGHT = 0.01
"""Weight of the sigma term in the total."""
LOG_STD_RANGE = (-15.0, 10.0)
"""Where log standard deviations are clamped, as published."""


class Losses(NamedTuple):
    """Scalar float32 losses; ``total = velocity + vlb + 0.01 sigma``."""

    total: jax.Array
    velocity: jax.Array
    vlb: jax.Array
    sigma: jax.Array


def _gaussian_kl(
    mean_q: jax.Array, log_std_q: jax.Array, mean_p: jax.Array, log_std_p: jax.Array
) -> jax.Array:
    """KL(q || p) of diagonal Gaussians, in nats, elementwise."""
    log_ratio = 2 * (log_std_q - log_std_p)
    distance = (mean_q - mean_p) ** 2 * jnp.exp(-2 * log_std_p)
    return 0.5 * (distance + jnp.exp(log_ratio) - log_ratio - 1)


def _gaussian_nll(x: jax.Array, mean: jax.Array, log_std: jax.Array) -> jax.Array:
    """Negative log density of a diagonal Gaussian, in nats, elementwise."""
    return 0.5 * (math.log(2 * math.pi) + 2 * log_std + (x - mean) ** 2 * jnp.exp(-2 * log_std))


def _normal_cdf(x: jax.Array) -> jax.Array:
    """The tanh approximation of the standard normal distribution function."""
    return 0.5 * (1 + jnp.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def _discretised_nll(x: jax.Array, mean: jax.Array, log_std: jax.Array) -> jax.Array:
    """Negative log probability of 8-bit images in [-1, 1] under a Gaussian, in nats."""
    inverse_std = jnp.exp(-log_std)
    below = _normal_cdf((x - mean - 1 / 255) * inverse_std)
    above = _normal_cdf((x - mean + 1 / 255) * inverse_std)
    probability = jnp.where(x < -0.999, above, jnp.where(x > 0.999, 1 - below, above - below))
    return -jnp.log(jnp.maximum(probability, 1e-12))


def _safe_log(std: jax.Array) -> jax.Array:
    """Clamped log of a standard deviation that may be 0; gradient 0 where it is."""
    positive = std > 0
    log_std = jnp.where(positive, jnp.log(jnp.where(positive, std, 1)), -jnp.inf)
    return jnp.clip(log_std, *LOG_STD_RANGE)


def losses(
    prediction: Prediction,
    z: jax.Array,
    image: jax.Array,
    noise: jax.Array,
    t: jax.Array,
    weight: jax.Array,
) -> Losses:
    """Evaluate the objective for one prediction.

    Args:
        prediction: of the denoiser at (z, t).
        z: float32 [B, H, W, C], ``flow.interpolate(image, noise, t)``.
        image: float32 [B, H, W, C] in [-1, 1].
        noise: float32 [B, H, W, C], standard normal.
        t: float32 [B, h, w] in [0, 1], noise level per patch.
        weight: float32 [B, h, w], loss weight per patch; 0 leaves a patch out.

    Returns:
        The total and its three terms.
    """
    patch_size = image.shape[1] // t.shape[1]
    t, weight = patches.expand(t, patch_size), patches.expand(weight, patch_size)
    target = flow.velocity_of(image, noise)
    velocity = jnp.mean(weight * (prediction.velocity - target) ** 2)

    fixed = jax.lax.stop_gradient(prediction.velocity)
    last = t - VLB_STEP < SMALLEST_LEVEL
    s = jnp.where(last, 0, t - VLB_STEP)
    mean_p = flow.step_mean(z, t, s, fixed, 1.0)
    log_std_p = _safe_log(flow.step_std(t, s, 1.0, prediction.variance_fraction))
    mean_q, std_q = flow.posterior(image, noise, t, s, 1.0)
    kl = _gaussian_kl(mean_q, _safe_log(std_q), mean_p, log_std_p)
    bits = jnp.where(last, _discretised_nll(image, mean_p, log_std_p), kl) / math.log(2)
    vlb = jnp.mean(weight * bits)

    log_sigma = _safe_log(patches.expand(prediction.sigma, patch_size))
    sigma = jnp.mean(weight * _gaussian_nll(target, fixed, log_sigma))
    return Losses(velocity + vlb + SIGMA_WEIGHT * sigma, velocity, vlb, sigma)


def evaluate(
    denoise: Denoiser, image: jax.Array, noise: jax.Array, t: jax.Array, weight: jax.Array
) -> Losses:
    """Noise the images, predict, and evaluate the objective; arguments as in ``losses``."""
    z = flow.interpolate(image, noise, patches.expand(t, image.shape[1] // t.shape[1]))
    return losses(denoise(z, t), z, image, noise, t, weight)
