"""Many devices: a mesh of one axis, ``data``, over which samples are spread.

Refinement exchanges nothing: every device runs the whole program on its own samples, and none waits
for another. Training sums gradients over the devices; parameters are whole on each, or in parts.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

AXIS = "data"


def data_mesh(devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of one axis, ``data``, over devices; by default over all of them, of every process."""
    return Mesh(np.array(jax.devices() if devices is None else devices), (AXIS,))


def whole(mesh: Mesh) -> NamedSharding:
    """The same on every device."""
    return NamedSharding(mesh, PartitionSpec())


def rows(mesh: Mesh) -> NamedSharding:
    """Of an array [B, ...], B a multiple of the devices: every device has its own samples."""
    return NamedSharding(mesh, PartitionSpec(AXIS))


def parts(mesh: Mesh, tree: Any) -> Any:
    """The sharding of every array of a tree, for one copy of it over all devices.

    The longest axis that the number of devices divides is split (fully sharded data parallelism);
    an array that has none is whole on every device.

    Args:
        mesh: from ``data_mesh``.
        tree: of arrays or ``jax.ShapeDtypeStruct``.
    """

    def split(leaf: Any) -> NamedSharding:
        axes = [axis for axis, size in enumerate(leaf.shape) if size and size % mesh.size == 0]
        if not axes:
            return whole(mesh)
        axis = max(axes, key=lambda axis: leaf.shape[axis])
        return NamedSharding(mesh, PartitionSpec(*[None] * axis, AXIS))

    return jax.tree.map(split, tree)
