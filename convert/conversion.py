"""Between files of PyTorch and models of ``ipr_jax``: import, export, verify."""

import importlib.metadata
import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import save

from convert import formats, mapping, source, srm, torch_model
from ipr_jax.core import check
from ipr_jax.models import checkpoint
from ipr_jax.models.networks import build, inputs, open_network
from ipr_jax.runtime import files


def import_checkpoint(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    weights: str = "ema",
    preset: str | None = None,
    given: Mapping[str, Any] | None = None,
    allow_nonfinite: bool = False,
) -> tuple[source.Source, Any]:
    """Convert a checkpoint to a model folder, which appears whole or not at all.

    Args:
        path: what ``torch.save`` or safetensors wrote.
        out: the new folder.
        weights: "ema" or "raw", where a file has both.
        preset: the released architecture that it is.
        given: fields of the configuration that the tensors do not tell; they override the preset.
        allow_nonfinite: convert weights that are not finite, too.

    Returns:
        What was read, and the configuration of the model.

    Raises:
        OSError: there is no such file, or ``out`` exists or cannot be written.
        ValueError: the file is refused, in one line with its path and the reason.
    """
    out = checkpoint.check_path(files.refuse_existing(out))
    read = source.read(path, weights)
    with source.refusing(path):
        try:
            config, origin = _configure(read, preset, given or {})
        except ValueError as error:
            raise ValueError(formats.as_typed(str(error))) from error
        table = read.layout.table(config)
        network = mapping.fill(nnx.eval_shape(lambda: build(config)), table, read.tensors)
        broken = mapping.nonfinite(network, table)
        if broken and not allow_nonfinite:
            raise ValueError(
                f"weights must be finite in float32 (or give --allow-nonfinite), "
                f"{len(broken)} tensors are not: {mapping.listed(broken)}"
            )
    provenance = {
        "source": Path(path).name,
        "sha256": read.sha256,
        "weights": read.weights,
        "ignored": {reason: len(names) for reason, names in read.ignored.items()},
        "architecture": origin,
        "converter": f"ipr_jax {importlib.metadata.version('ipr_jax')}",
    }
    if read.described:
        provenance["exported from"] = read.described["provenance"]
    checkpoint.save(out, config, nnx.state(network), provenance)
    return read, config


def _configure(
    read: source.Source, preset: str | None, given: Mapping[str, Any]
) -> tuple[Any, str]:
    """The configuration of what was read, and where it comes from."""
    layout, base, origin = read.layout, None, "the tensors"
    if preset is not None:
        if preset not in layout.presets:
            known = ", ".join(layout.presets) or "none"
            raise ValueError(f"unknown preset {preset!r}; presets for {layout.title}: {known}")
        base, origin = layout.presets[preset], f"preset {preset}"
    if read.described:
        try:
            described = checkpoint.from_json(read.described["config"], [layout.config])
        except TypeError as error:
            raise ValueError(f"its metadata describes no {layout.title}: {error}") from error
        claims = (vars(base) if base else {}) | dict(given)
        if wrong := formats.differences(described, claims):
            raise ValueError(f"its metadata says {wrong[0]}, but preset or options {wrong[1]}")
        base, origin = described, "the metadata"
    config = formats.configure(layout, read.shapes, base, origin, given)
    flags = ", ".join(f"{name}={value}" for name, value in given.items())
    return config, f"{origin} and {flags}" if flags else origin


def export(model: str | os.PathLike[str], out: str | os.PathLike[str]) -> int:
    """Write a model as safetensors under its PyTorch names; the file appears whole or not at all.

    Args:
        model: a model folder or a shipped model.
        out: the new file, ``*.safetensors``.

    Returns:
        How many tensors were written.

    Raises:
        OSError: there is no such model, or ``out`` exists or cannot be written.
        ValueError: the folder holds no model that there is in PyTorch, or ``out`` has another name.
    """
    out = files.utf8(files.refuse_existing(out))
    if out.suffix != ".safetensors":
        raise ValueError(f"{out} must end in .safetensors, the format that is written")
    network, provenance = open_network(model)
    _warn_of_groups(network.config)
    tensors = mapping.extract(network, formats.of_config(network.config).table(network.config))
    described = {"config": checkpoint.to_json(network.config), "provenance": provenance}
    metadata = {"format": "pt", source.METADATA: json.dumps(described)}
    with files.whole(out) as part:
        part.write_bytes(save(tensors, metadata))
    return len(tensors)


def _warn_of_groups(config: Any) -> None:
    """Say that the published class computes something else, if it does; it loads all the same."""
    published = srm.PUBLISHED_GROUPS
    if getattr(config, "num_groups", published) != published:
        warnings.warn(
            f"the published class computes something else with these weights: it has "
            f"nn.GroupNorm({published}, d) in src/model/denoiser/norm_layers.py, which must be "
            f"nn.GroupNorm({config.num_groups}, d)",
            stacklevel=3,
        )


def verify(
    path: str | os.PathLike[str], model: str | os.PathLike[str], *, batch: int = 2, seed: int = 0
) -> dict[str, tuple[float, float]]:
    """Compare a converted model with PyTorch on random inputs.

    What the tensors do not tell (patch size, head width, groups) is that of the model on both
    sides, so a wrong value does not show; a number of groups that the published class does not have
    is warned of.

    Args:
        path: the checkpoint.
        model: the folder that it was converted to.
        batch: random inputs.
        seed: of the inputs.

    Returns:
        By output: the largest absolute difference, and the largest magnitude.

    Raises:
        ModuleNotFoundError: PyTorch is not installed.
        OSError, ValueError: the checkpoint or the model cannot be read, or they are of different
            networks.
    """
    torch_model.import_torch()
    check.count("batch", batch)
    check.seed(seed)
    network, provenance = open_network(model)
    config, layout = network.config, formats.of_config(network.config)
    _warn_of_groups(config)
    read = source.read(path, "raw" if provenance.get("weights") == "raw" else "ema")
    with source.refusing(path):
        if read.layout is not layout:
            raise ValueError(
                f"it holds a network of kind {read.layout.title}, {model} {layout.title}"
            )
        formats.configure(read.layout, read.shapes, config, f"model {model}", {})
    rng = np.random.default_rng(seed)
    arguments = {
        name: (rng.random if name == "t" else rng.standard_normal)(shape.shape, np.float32)
        for name, shape in inputs(config, batch).items()
    }
    theirs = read.layout.twin(
        read.tensors, config, **{name: _channel_first(array) for name, array in arguments.items()}
    )
    with jax.default_matmul_precision("highest"):
        output = network(**{name: jnp.asarray(array) for name, array in arguments.items()})
    ours = {name: _channel_first(array) for name, array in _by_name(output).items()}
    return {
        name: (float(np.abs(ours[name] - array).max()), float(np.abs(array).max()))
        for name, array in theirs.items()
    }


def _by_name(output: Any) -> dict[str, np.ndarray]:
    """The outputs of any network by name."""
    if isinstance(output, jax.Array):
        output = {"logits": output}
    named = output if isinstance(output, dict) else output._asdict()
    return {name: np.asarray(array) for name, array in named.items()}


def _channel_first(array: np.ndarray) -> np.ndarray:
    """Images as PyTorch has them; other arrays as they are."""
    return np.ascontiguousarray(np.moveaxis(array, -1, 1)) if array.ndim == 4 else array
