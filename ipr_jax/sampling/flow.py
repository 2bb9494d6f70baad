"""Rectified flow: the one place of each formula between a clean image and noise.

=========================  ==================  ==========================================
here                       paper               meaning
=========================  ==================  ==========================================
image, noise, z            x, epsilon, z_t     clean image, N(0, I) noise, their mixture
t, s                       t, t*               noise level now and after the step, s <= t
velocity                   u_t                 noise - image
stochasticity              alpha               0 = deterministic (DDIM-like), 1 = ancestral
variance_fraction          v_theta             between the bounds of the step's std
=========================  ==================  ==========================================

Source: SRM (arXiv 2502.21075), section 3 and appendix A. Every function is elementwise: noise
levels broadcast against images, and t and s may differ per patch. All 0/0 limits are taken by the
double-where idiom, so that values and gradients are finite at t, s in {0, 1} and at t = s.
"""

import jax
import jax.numpy as jnp


def interpolate(image: jax.Array, noise: jax.Array, t: jax.Array) -> jax.Array:
    """z_t = (1 - t) image + t noise."""
    return (1 - t) * image + t * noise


def velocity_of(image: jax.Array, noise: jax.Array) -> jax.Array:
    """The velocity dz/dt = noise - image that a denoiser learns."""
    return noise - image


def clean_image(z: jax.Array, t: jax.Array, velocity: jax.Array) -> jax.Array:
    """The image that a velocity implies: z - t velocity."""
    return z - t * velocity


def _unexplained(t: jax.Array, s: jax.Array) -> tuple[jax.Array, jax.Array]:
    """1 - b^2 with b = ((1 - t) s) / ((1 - s) t), and where the ratio has a limit only."""
    limit = (t == 0) | (s == 1)
    safe_t = jnp.where(limit, 1, t)
    safe_s = jnp.where(limit, 0, s)
    ratio = ((1 - safe_t) * safe_s) / ((1 - safe_s) * safe_t)
    return 1 - ratio**2, limit


def _sqrt(x: jax.Array) -> jax.Array:
    """Square root of max(x, 0) whose gradient at 0 is 0."""
    positive = x > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, x, 1)), 0)


def noise_kept(t: jax.Array, s: jax.Array, stochasticity: jax.Array | float) -> jax.Array:
    """Gamma = s sqrt(1 - a^2 (1 - b^2)): how much of the predicted noise stays; s where s = 1."""
    unexplained, limit = _unexplained(t, s)
    gamma = s * _sqrt(1 - stochasticity**2 * unexplained)
    return jnp.where(limit, jnp.where(t == 0, jnp.zeros_like(s), s), gamma)


def step_std(
    t: jax.Array, s: jax.Array, stochasticity: jax.Array | float, variance_fraction: jax.Array
) -> jax.Array:
    """Standard deviation of the step from t to s, in the shape of ``variance_fraction``.

    Geometric interpolation between a s sqrt(1 - b^2) (fraction 0) and a t sqrt(1 - b^2) (fraction
    1); 0 where s = 0, t = 0 or s = 1.
    """
    unexplained, limit = _unexplained(t, s)
    moving = ~limit & (s > 0)
    log_t = jnp.log(jnp.where(moving, t, 1))
    log_s = jnp.log(jnp.where(moving, s, 1))
    level = jnp.exp(variance_fraction * log_t + (1 - variance_fraction) * log_s)
    return jnp.where(moving, stochasticity * _sqrt(unexplained) * level, 0)


def step_mean(
    z: jax.Array,
    t: jax.Array,
    s: jax.Array,
    velocity: jax.Array,
    stochasticity: jax.Array | float,
) -> jax.Array:
    """Mean of the step from t to s: (1 - s)(z - t u) + gamma (z + (1 - t) u)."""
    noise = z + (1 - t) * velocity
    return (1 - s) * clean_image(z, t, velocity) + noise_kept(t, s, stochasticity) * noise


def raise_level(z: jax.Array, s: jax.Array, t: jax.Array, noise: jax.Array) -> jax.Array:
    """Bring z from level s up to level t >= s by fresh noise: the forward process, given z.

    k z + sqrt(t^2 - k^2 s^2) noise with k = (1 - t) / (1 - s): the noise alone where t = 1 > s, z
    itself, bit for bit, where t <= s.
    """
    rising = t > s
    safe_s = jnp.where(rising, s, 0)
    kept = (1 - t) / (1 - safe_s)
    # t^2 - k^2 s^2, without the difference of close numbers.
    variance = (t - safe_s) / (1 - safe_s) * (t + kept * safe_s)
    return jnp.where(rising, kept * z + _sqrt(variance) * noise, z)


def posterior(
    image: jax.Array,
    noise: jax.Array,
    t: jax.Array,
    s: jax.Array,
    stochasticity: jax.Array | float,
) -> tuple[jax.Array, jax.Array]:
    """Mean and standard deviation of z_s given z_t when image and noise are known."""
    mean = (1 - s) * image + noise_kept(t, s, stochasticity) * noise
    return mean, step_std(t, s, stochasticity, jnp.zeros_like(image))
