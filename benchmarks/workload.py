"""What is timed and profiled: a refinement pass of a preset, with random weights and images."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer
from jax.sharding import Mesh

import ipr_jax
from ipr_jax.core import Denoiser, Prediction
from ipr_jax.models import PRESETS, TRANSFORMERS, Config, Model, compute_in, denoiser
from ipr_jax.runtime import sharding

EDITABLE: dict[str, Sequence[int]] = {
    "mini-sudoku": range(11, 17),
    "even-pixels": [64],
    "counting-polygons": [256],
    "mnist-sudoku": range(55, 82),
    "digits-sudoku": range(55, 82),
}
"""Tasks, and how many patches are editable in their test samples."""

TASKS = {
    **{task: task for task in EDITABLE},
    "mini-sudoku-transformer": "mini-sudoku",
    "digits-sudoku-large": "digits-sudoku",
    "mnist-sudoku-transformer": "mnist-sudoku",
    "even-pixels-lite": "even-pixels",
    "even-pixels-transformer": "even-pixels",
}
"""Presets, and the task of each."""


class Workload(NamedTuple):
    """A batch of a preset on its devices.

    Attributes:
        denoise: the network, with the weights that training begins with.
        keys: [B], of the samples.
        image: float32 [B, H, W, C], uniform in [-1, 1].
        editable: bool [B, h, w], True.
        t: float32 [B, h, w], 0.5.
    """

    denoise: Denoiser
    keys: jax.Array
    image: jax.Array
    editable: jax.Array
    t: jax.Array


def check_preset(preset: str) -> None:
    """Refuse what is no preset.

    Raises:
        ValueError: lists the known ones.
    """
    if preset not in TASKS:
        raise ValueError(f"unknown preset {preset!r}; known: {', '.join(TASKS)}")


def config_of(preset: str) -> Config:
    """The architecture of a preset."""
    return TRANSFORMERS[preset] if preset in TRANSFORMERS else PRESETS[preset]


def new_model(preset: str) -> Model:
    """The network of a preset, with the weights that training begins with."""
    return denoiser.new_model(config_of(preset), rngs=nnx.Rngs(0))


def make(preset: str, batch: int, precision: str, devices: int = 1) -> Workload:
    """A batch of ``batch`` samples, spread evenly over the first ``devices`` devices."""
    config = config_of(preset)
    mesh = ipr_jax.data_mesh(jax.devices()[:devices])
    draw = np.random.default_rng(0).uniform(-1, 1, (batch, *config.image_shape))
    parts = (
        ipr_jax.sample_keys(jax.random.key(0), batch),
        jnp.asarray(draw, jnp.float32),
        jnp.ones((batch, *config.grid), bool),
        jnp.full((batch, *config.grid), 0.5),
    )
    model = compute_in(new_model(preset), precision)
    return Workload(
        jax.device_put(model, sharding.whole(mesh)), *jax.device_put(parts, sharding.rows(mesh))
    )


def _mesh_of(array: jax.Array) -> Mesh:
    return ipr_jax.data_mesh(sorted(array.devices(), key=lambda device: device.id))


def refinement(work: Workload, evaluations: int) -> ipr_jax.Refined:
    """One iteration of refinement, of so many network evaluations, on the devices of the batch."""
    sampling = ipr_jax.Sampling(max_steps=evaluations)
    keys, image, editable = work.keys, work.image, work.editable
    return ipr_jax.refine(
        work.denoise,
        keys,
        image,
        editable,
        iterations=1,
        sampling=sampling,
        mesh=None if isinstance(image, Tracer) else _mesh_of(image),
    )


def network(work: Workload) -> Prediction:
    """One network evaluation on its own."""
    return work.denoise(work.image, work.t)
