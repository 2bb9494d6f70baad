"""Parameters by their PyTorch names: what a table of entries says, in both directions.

PyTorch images are NCHW and its kernels OIHW; here images are NHWC and kernels HWIO.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

Path = tuple[str | int, ...]

NAMED = 8
"""How many names an error lists."""

# For each kind of tensor, the axes of the PyTorch array in the order of the JAX array.
_AXES = {"vector": (0,), "linear": (1, 0), "linear1d": (1, 0, 2), "conv": (2, 3, 1, 0)}


@dataclass(frozen=True)
class Entry:
    """One parameter: where it lives on each side, and how its axes correspond.

    Attributes:
        names: the PyTorch names; all hold the same values (the time embedding is repeated in every
            block of the published state dict).
        path: the path of the parameter in the NNX state.
        kind: ``vector``, ``linear``, ``linear1d`` (a linear map stored as a width-1 convolution) or
            ``conv``.
    """

    names: tuple[str, ...]
    path: Path
    kind: str

    def torch_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the PyTorch tensor, from that of the JAX parameter."""
        axes = _AXES[self.kind]
        padded = (*shape, 1) if self.kind == "linear1d" else shape
        return tuple(padded[axes.index(axis)] for axis in range(len(axes)))

    def to_jax(self, tensor: np.ndarray) -> np.ndarray:
        """A PyTorch tensor in the layout of the JAX parameter."""
        array = tensor.transpose(_AXES[self.kind])
        return array[..., 0] if self.kind == "linear1d" else array

    def to_torch(self, array: np.ndarray) -> np.ndarray:
        """A JAX parameter in the layout of the PyTorch tensor."""
        padded = array[..., None] if self.kind == "linear1d" else array
        return padded.transpose(np.argsort(_AXES[self.kind]))


def layer(torch: str, path: Path, kind: str, *, bias: bool = True) -> list[Entry]:
    """Weight and bias of a layer; norms call their weight scale, the others kernel."""
    weight = "scale" if kind == "vector" else "kernel"
    entries = [Entry((f"{torch}.weight",), (*path, weight), kind)]
    return entries + ([Entry((f"{torch}.bias",), (*path, "bias"), "vector")] if bias else [])


def listed(names: Iterable[str], sign: str = "") -> str:
    """The first ``NAMED`` of the names, sorted, each after the sign, and the number left out."""
    ordered = [f"{sign}{name}" for name in sorted(names)]
    more = f" and {len(ordered) - NAMED} more" if len(ordered) > NAMED else ""
    return ", ".join(ordered[:NAMED]) + more


def fill(abstract: Any, entries: list[Entry], tensors: Mapping[str, np.ndarray]) -> Any:
    """Build a network from a PyTorch state dict.

    Args:
        abstract: the network from ``nnx.eval_shape``.
        entries: its table.
        tensors: PyTorch names to arrays of any floating type; every one is used.

    Returns:
        The network, float32 parameters.

    Raises:
        ValueError: a tensor is missing or superfluous, has another shape or is not of a floating
            type, or repeated tensors differ.
    """
    wanted = {name for entry in entries for name in entry.names}
    superfluous, missing = tensors.keys() - wanted, wanted - tensors.keys()
    if superfluous or missing:
        lists = [
            f"{len(names)} {what}: {listed(names, sign)}"
            for what, sign, names in (("too many", "+ ", superfluous), ("missing", "- ", missing))
            if names
        ]
        raise ValueError(f"the tensors are not those of this architecture; {'; '.join(lists)}")
    graph, state = nnx.split(abstract)
    leaves = dict(nnx.to_flat_state(state))
    filled: set[Path] = set()
    for entry in entries:
        first, *others = (tensors[name] for name in entry.names)
        shape = entry.torch_shape(leaves[entry.path].shape)
        if first.shape != shape:
            raise ValueError(
                f"{entry.names[0]} has shape {first.shape}; "
                f"{'.'.join(map(str, entry.path))} needs {shape}"
            )
        if not jnp.issubdtype(first.dtype, jnp.floating):
            raise ValueError(f"{entry.names[0]} is {first.dtype}, it must be of a floating type")
        for name, other in zip(entry.names[1:], others, strict=True):
            if not np.array_equal(first, other, equal_nan=True):
                raise ValueError(f"repeated tensors must be equal: {entry.names[0]} and {name}")
        with np.errstate(over="ignore"):
            parameter = entry.to_jax(first).astype(np.float32)
        leaves[entry.path] = leaves[entry.path].replace(jax.device_put(parameter))
        filled.add(entry.path)
    if filled != leaves.keys():
        unfilled = (".".join(map(str, path)) for path in leaves.keys() - filled)
        raise ValueError(f"parameters without a tensor: {listed(unfilled)}")
    return nnx.merge(graph, nnx.from_flat_state(list(leaves.items())))


def nonfinite(network: Any, entries: list[Entry]) -> list[str]:
    """The first PyTorch names of the parameters that are not finite everywhere."""
    leaves = dict(nnx.to_flat_state(nnx.state(network)))
    return [entry.names[0] for entry in entries if not jnp.isfinite(leaves[entry.path][...]).all()]


def extract(network: Any, entries: list[Entry]) -> dict[str, np.ndarray]:
    """The PyTorch state dict of a network: ``fill`` backwards, repeated tensors under every name.

    Args:
        network: with float32 parameters.
        entries: its table.

    Returns:
        PyTorch names to float32 arrays.
    """
    leaves = dict(nnx.to_flat_state(nnx.state(network)))
    tensors = {}
    for entry in entries:
        tensor = np.ascontiguousarray(entry.to_torch(np.asarray(leaves[entry.path][...])))
        tensors |= dict.fromkeys(entry.names, tensor)
    return tensors
