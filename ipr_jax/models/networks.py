"""Every network that a model folder can hold: the denoiser and the benchmarks' classifiers."""

import os
from typing import Any

import jax
import jax.numpy as jnp

from ipr_jax.core import rngs
from ipr_jax.models import checkpoint
from ipr_jax.models.config import ModelConfig
from ipr_jax.models.denoiser import MODELS
from ipr_jax.tasks.mnist_classifier import MNISTClassifier, MNISTConfig
from ipr_jax.tasks.polygon_classifier import PolygonClassifier, PolygonConfig

NETWORKS: dict[type, Any] = {
    **MODELS,
    MNISTConfig: MNISTClassifier,
    PolygonConfig: PolygonClassifier,
}
"""The network of each class of configuration."""


def build(config: Any) -> Any:
    """The network of a configuration, with random weights; abstract under ``nnx.eval_shape``."""
    return NETWORKS[type(config)](config, rngs=rngs(0))


def open_network(path_or_name: str | os.PathLike[str]) -> tuple[Any, dict[str, Any]]:
    """Open any model folder, or a shipped model by name.

    Returns:
        The network, which has a ``config``, and the provenance of its weights.

    Raises:
        FileNotFoundError, ValueError: as ``ipr_jax.load``.
    """
    return checkpoint.open_as(path_or_name, dict.fromkeys(NETWORKS, build))


def inputs(config: Any, batch: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of what a network is called with, by the name of its argument, all float32."""
    shape = (batch, *config.image_shape)
    shapes = {"images": shape}
    if type(config) in MODELS:
        shapes = {"z": shape, "t": (batch, *config.grid)}
    if isinstance(config, ModelConfig) and config.concat_clues:
        shapes["condition"] = (*shape[:-1], 1 + config.channels)
    return {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
