"""A whole pass: regenerate a region of every sample in one compiled loop; generation is its case.

The loop runs to the longest schedule of the batch, a traced number, so one program serves every
ratio and mask; a sample that finishes early is left bit-identical.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ipr_jax.core import Denoiser, check, patches
from ipr_jax.core import keys as random_keys
from ipr_jax.runtime import Program, driver, sharding
from ipr_jax.sampling import schedule
from ipr_jax.sampling import step as steps
from ipr_jax.sampling.order import Order, certain_first
from ipr_jax.sampling.schedule import Plan


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a region is regenerated; the defaults are the paper's for refining Sudoku.

    Attributes:
        steps_per_patch: network evaluations for a single patch, at least 1.
        overlap: in [0, 1], how much of a patch's schedule it shares with the next one's; 1 = all
            patches in parallel.
        max_steps: network evaluations of a pass, whatever its region, at least 1; None = as many as
            ``steps_per_patch`` calls for.
        top_k: patches that start together, at least 1.
        stochasticity: in [0, 1], 0 = deterministic, 1 = ancestral; may be traced.
        temperature: factor of each step's standard deviation, at least 0; may be traced.
        order: which waiting patch starts next.

    Raises:
        ValueError: a value is out of range, or traced where it may not be, naming it and the range.
    """

    steps_per_patch: int = 10
    overlap: float = 0.8
    max_steps: int | None = None
    top_k: int = 1
    stochasticity: float = 0.5
    temperature: float = 1.0
    order: Order = certain_first

    def __post_init__(self) -> None:
        schedule.make_plan(1, self.steps_per_patch, self.overlap, self.max_steps, self.top_k)
        for name, valid, rule in (
            ("stochasticity", lambda value: 0 <= value <= 1, "in [0, 1]"),
            ("temperature", lambda value: 0 <= value < math.inf, "finite and at least 0"),
        ):
            check.number(name, getattr(self, name), valid, rule, traced=True)
        check.function(
            "order", self.order, "(sigma, uniform, t) -> priorities, see ipr_jax.sampling.order"
        )

    def settings(self, num_patches: int) -> "Settings":
        """The traced part, for a grid of ``num_patches``."""
        return Settings(
            schedule.make_plan(
                num_patches, self.steps_per_patch, self.overlap, self.max_steps, self.top_k
            ),
            jnp.float32(self.stochasticity),
            jnp.float32(self.temperature),
        )


class Settings(NamedTuple):
    """The numbers of a pass, arguments of the compiled program: changing them does not recompile.

    Attributes:
        plan: the schedule by region size.
        stochasticity: float32 scalar in [0, 1].
        temperature: float32 scalar, at least 0.
    """

    plan: Plan
    stochasticity: jax.Array
    temperature: jax.Array


FIRST_PASS = Sampling(steps_per_patch=3, overlap=0.0)
"""The paper's settings for the first pass on Sudoku."""

REFINEMENT = Sampling()
"""The paper's settings for its refinement."""


class Sampled(NamedTuple):
    """Samples and what they cost.

    Attributes:
        image: float32 [B, H, W, C].
        nfe: int32 [B], network evaluations that each sample's schedule took.
        finite: bool [B], False for a sample that is not finite everywhere.
    """

    image: jax.Array
    nfe: jax.Array
    finite: jax.Array


def regenerate(
    denoise: Denoiser,
    keys: jax.Array,
    z: jax.Array,
    region: jax.Array,
    settings: Settings,
    order: Order,
) -> Sampled:
    """Denoise a region of every sample, conditioned on the rest. Jittable; checks nothing.

    Args:
        denoise: the model.
        keys: [B], consumed: the order's draw, then the noise of every step.
        z: float32 [B, H, W, C]; noise inside the region, kept bit for bit outside.
        region: bool [B, h, w].
        settings: from ``Sampling.settings``.
        order: which waiting patch starts next.

    Returns:
        The images with the region regenerated.

    Raises:
        ValueError: a function returns something of another shape or dtype; at trace.
    """
    pass_plan = schedule.plan_pass(settings.plan, region)
    order_keys, noise_keys = random_keys.split(keys, 2)
    uniform = random_keys.uniform(order_keys, region.shape[1:])

    def body(index: jax.Array | int, state: steps.PassState) -> steps.PassState:
        noise = random_keys.normal(random_keys.fold(noise_keys, index), z.shape[1:])
        state, _ = steps.step(
            denoise,
            pass_plan,
            state,
            index,
            noise,
            uniform,
            order=order,
            stochasticity=settings.stochasticity,
            temperature=settings.temperature,
        )
        return state

    longest = pass_plan.num_steps.max()
    state = sharding.settled(partial(body, 0), steps.init(z, pass_plan))
    image = jax.lax.fori_loop(0, longest, body, state).z
    return Sampled(image, pass_plan.num_steps, jnp.isfinite(image).all(axis=(1, 2, 3)))


def renoise(image: jax.Array, region: jax.Array, noise: jax.Array) -> jax.Array:
    """Replace the pixels of a region, bool [B, h, w], by noise [B, H, W, C]."""
    return jnp.where(patches.expand(region, image.shape[1] // region.shape[1]), noise, image)


def first_pass(
    denoise: Denoiser,
    keys: jax.Array,
    image: jax.Array,
    editable: jax.Array,
    settings: Settings,
    order: Order,
) -> Sampled:
    """Regenerate everything editable, from noise. Jittable; checks nothing. See ``generate``."""
    own = random_keys.iteration_keys(keys, 0)
    z = renoise(image, editable, random_keys.normal(own.noise, image.shape[1:]))
    return regenerate(denoise, own.denoise, z, editable, settings, order)


@partial(jax.jit, static_argnames=("order", "mesh"))
def first_pass_of(
    denoise: Denoiser,
    keys: jax.Array,
    image: jax.Array,
    editable: jax.Array,
    settings: Settings,
    *,
    order: Order,
    mesh: Mesh | None,
) -> Sampled:
    """``first_pass``, compiled, with the samples spread over a mesh."""
    each = sharding.each_device(
        partial(first_pass, order=order), mesh, in_axes=(None, 0, 0, 0, None), out_axes=0
    )
    return each(denoise, keys, image, editable, settings)


@driver
def generate(
    denoise: Denoiser,
    keys: jax.Array,
    image: jax.Array | np.ndarray,
    editable: jax.Array | np.ndarray,
    sampling: Sampling = FIRST_PASS,
    *,
    mesh: Mesh | None = None,
) -> Program[Sampled]:
    """Generate every editable patch from noise, given the others.

    One compiled program per batch size; keys, masks and all of ``sampling`` but the order are its
    arguments. It may be called under ``jit``, ``vmap`` and ``shard_map``, whatever of its arrays is
    traced. Derivatives are those of forward mode (``jax.jvp``): the number of steps follows from
    the masks, and the loop over it, a ``while_loop``, keeps nothing to go back with.

    Args:
        denoise: the model; a function made anew at every call is compiled at every call.
        keys: [B], from ``sample_keys``; the same keys go to ``refine``.
        image: float32 [B, H, W, C] in [-1, 1]; only its clues are read.
        editable: bool [B, h, w]; False = a clue, returned bit for bit.
        sampling: how.
        mesh: the devices that share the samples, from ``sharding.data_mesh``; None = all of this
            process. A denoiser that is bound to a batch needs a mesh of one device.

    Returns:
        The samples; a batch without editable patches comes back as it is, at 0 evaluations.

    Raises:
        ValueError: keys, images and masks do not belong together, a clue is out of range, an
            argument is of another type, or a function returns another shape or dtype (at trace).
    """
    check.batch(keys, image, editable)
    check.clues(image, editable)
    check.instance("sampling", sampling, Sampling)
    mesh = sharding.of_samples(mesh, denoise, keys, image, editable)
    settings = sampling.settings(editable.shape[1] * editable.shape[2])
    samples = sharding.spread(mesh, keys, jnp.asarray(image), jnp.asarray(editable))
    return Program(
        first_pass_of,
        (check.as_pytree(denoise), *samples, settings),
        {"order": sampling.order, "mesh": mesh},
        lambda found: sharding.cut(found, keys.shape[0], mesh, 0),
    )
