"""One denoising step under mixed noise levels: the innermost function of the library.

Pure: every random number enters as an argument. The engine of ``ipr_jax.methods`` evaluates the
network by ``predict``; a method moves its samples by ``move``.
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from ipr_jax.core import Denoiser, Prediction, check, patches
from ipr_jax.sampling import flow, schedule
from ipr_jax.sampling.order import Order
from ipr_jax.sampling.schedule import PassPlan


class PassState(NamedTuple):
    """What a step changes.

    Attributes:
        z: float32 [B, H, W, C], the partly denoised images.
        start: int32 [B, h, w], the step at which each patch started; ``WAITING`` if not yet.
    """

    z: jax.Array
    start: jax.Array


class StepInfo(NamedTuple):
    """What a step saw: float32 [B, h, w] noise levels before it (``t``) and after it (``s``)."""

    t: jax.Array
    s: jax.Array


def init(z: jax.Array, plan: PassPlan) -> PassState:
    """The state before the first step, from images whose region holds noise."""
    return PassState(z=z, start=jnp.full(plan.region.shape, schedule.WAITING, jnp.int32))


def predict(denoise: Denoiser, z: jax.Array, t: jax.Array) -> Prediction:
    """Evaluate the network once: of float32 [B, H, W, C] at levels [B, h, w].

    Raises:
        ValueError: it is no prediction of these shapes, in floats.
    """
    found = denoise(z, t)
    if not isinstance(found, tuple) or len(found) != len(Prediction._fields):
        raise ValueError(f"the denoiser must return a Prediction, got {check.told(found)}")
    shapes = (z.shape, z.shape, t.shape)
    return Prediction(
        *(
            check.returned(f"the denoiser's {name}", part, shape, jnp.float32)
            for name, part, shape in zip(Prediction._fields, found, shapes, strict=True)
        )
    )


def clean(z: jax.Array, t: jax.Array, prediction: Prediction) -> jax.Array:
    """What the network predicts for level 0, of float32 [B, H, W, C] at levels [B, h, w].

    It is z itself, bit for bit, where the level is 0.
    """
    level = patches.expand(t, z.shape[1] // t.shape[1])
    return jnp.where(level > 0, flow.clean_image(z, level, prediction.velocity), z)


def move(
    prediction: Prediction,
    plan: PassPlan,
    state: PassState,
    index: jax.Array | int,
    noise: jax.Array,
    uniform: jax.Array,
    *,
    order: Order,
    stochasticity: jax.Array | float,
    temperature: jax.Array | float,
) -> tuple[PassState, StepInfo]:
    """Move every patch of the region along its schedule, given one evaluation of the network.

    Args:
        prediction: of ``state.z`` at the levels before the step, ``schedule.levels``.
        plan: of the pass.
        state: before the step.
        index: int32 scalar or [B], the number of the step, from 0.
        noise: float32 [B, H, W, C], standard normal, used where the step is stochastic.
        uniform: float32 [B, h, w] in [0, 1), the same in all steps of a pass, for random orders.
        order: which waiting patches start.
        stochasticity: scalar or [B], 0 = deterministic to 1 = ancestral.
        temperature: scalar or [B], factor of the step's standard deviation, at least 0.

    Returns:
        The state after the step, bit-identical where the level is 0, and the noise levels.

    Raises:
        ValueError: the order returns something of another shape or dtype; at trace.
    """
    chex.assert_equal_shape([noise, state.z])
    chex.assert_equal_shape([uniform, state.start, plan.region])
    t = schedule.levels(plan, state.start, index)
    priority = order(prediction.sigma, uniform, t)
    priority = check.returned("what order returns", priority, t.shape, jnp.float32)
    start = schedule.start_patches(plan, state.start, index, priority)
    s = schedule.levels(plan, start, index + 1)
    stochasticity, temperature = (
        jnp.reshape(jnp.asarray(value), (-1, 1, 1, 1)) for value in (stochasticity, temperature)
    )

    patch_size = state.z.shape[1] // t.shape[1]
    t_pixel, s_pixel = patches.expand(t, patch_size), patches.expand(s, patch_size)
    mean = flow.step_mean(state.z, t_pixel, s_pixel, prediction.velocity, stochasticity)
    std = flow.step_std(t_pixel, s_pixel, stochasticity, prediction.variance_fraction)
    moving = s_pixel < t_pixel
    z = jnp.where(moving, mean + temperature * std * noise, state.z)
    return PassState(z=z, start=start), StepInfo(t, s)
