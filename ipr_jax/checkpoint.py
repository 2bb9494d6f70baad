"""Models on disk: an Orbax checkpoint that holds parameters, architecture and provenance."""

import dataclasses
import importlib.resources
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx

from ipr_jax.config import ModelConfig
from ipr_jax.denoiser import SRM

SHIPPED = ("mini-sudoku",)
"""Models that come with the package."""


def save(
    path: str | os.PathLike[str], config: ModelConfig, params: Any, provenance: dict[str, Any]
) -> None:
    """Write a model; the folder appears whole or not at all.

    Args:
        path: a folder that does not exist.
        config: the architecture.
        params: NNX state of ``SRM(config)``.
        provenance: JSON data on where the weights come from.

    Raises:
        FileExistsError: the folder exists; it is not overwritten.
    """
    path = Path(path).absolute()
    if path.exists():
        raise FileExistsError(f"{path} exists and is not overwritten")
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        checkpointer.save(
            path,
            args=ocp.args.Composite(
                params=ocp.args.StandardSave(nnx.to_pure_dict(params)),
                config=ocp.args.JsonSave(dataclasses.asdict(config)),
                provenance=ocp.args.JsonSave(provenance),
            ),
        )


def load(path_or_name: str | os.PathLike[str], *, dtype: Any = jnp.float32) -> SRM:
    """Open a model that was saved, trained, converted, or that ships with the package.

    Args:
        path_or_name: a folder, or one of ``SHIPPED``.
        dtype: compute dtype; parameters stay float32.

    Returns:
        The model, a ``Denoiser``.

    Raises:
        FileNotFoundError: neither a folder nor a shipped model; lists the shipped ones.
        ValueError: the folder is not a model, with the reason.
    """
    return open_model(path_or_name, dtype=dtype)[0]


def open_model(
    path_or_name: str | os.PathLike[str], *, dtype: Any = jnp.float32
) -> tuple[SRM, dict[str, Any]]:
    """``load``, with the provenance that was saved beside the weights."""
    path = Path(path_or_name)
    if str(path_or_name) in SHIPPED:
        path = Path(str(importlib.resources.files("ipr_jax") / "models" / str(path_or_name)))
    if not path.is_dir():
        raise FileNotFoundError(
            f"no model at {str(path_or_name)!r}: give a model folder or one of {list(SHIPPED)}"
        )
    path = path.absolute()
    try:
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
            described = checkpointer.restore(
                path,
                args=ocp.args.Composite(
                    config=ocp.args.JsonRestore(), provenance=ocp.args.JsonRestore()
                ),
            )
            fields: dict[str, Any] = {
                name: tuple(value) if isinstance(value, list) else value
                for name, value in dict(described["config"]).items()
            }
            config, provenance = ModelConfig(**fields), dict(described["provenance"])
            abstract = nnx.eval_shape(lambda: SRM(config, dtype=dtype, rngs=nnx.Rngs(0)))
            graph, state = nnx.split(abstract)
            here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
            placed = jax.tree.map(
                lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here),
                nnx.to_pure_dict(state),
            )
            restored = checkpointer.restore(
                path,
                args=ocp.args.Composite(params=ocp.args.StandardRestore(placed)),
            )
    except (KeyError, TypeError, ValueError, FileNotFoundError) as error:
        raise ValueError(f"{path} is not a model of ipr_jax: {error}") from error
    # Through the host: arrays that are bound to no device follow where the caller computes.
    params = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)), restored["params"])
    nnx.replace_by_pure_dict(state, params)
    return nnx.merge(graph, state), provenance
