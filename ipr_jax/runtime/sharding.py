"""Many devices: a mesh of one axis, ``data``, over which samples are spread.

Refinement exchanges nothing: every device runs the whole program on its own samples, and none waits
for another. Training sums gradients over the devices; parameters are whole on each, or in parts.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ipr_jax.core import check

AXIS = "data"

CPU_PATCHES = 1296
"""Of all images that a network sees at once on a CPU: few enough that what it computes stays in the
cache, and enough that its operations take longer than to begin them."""

Carry = TypeVar("Carry")


def data_mesh(devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of one axis, ``data``, over devices; by default over all of them, of every process.

    Raises:
        ValueError: there are no devices, or one of them twice.
    """
    devices = jax.devices() if devices is None else devices
    listed = isinstance(devices, Sequence | np.ndarray)
    if not listed or not all(isinstance(device, jax.Device) for device in devices):
        raise ValueError(f"devices must be such as jax.devices() lists, got {check.told(devices)}")
    if not len(devices) or len(set(devices)) < len(devices):
        raise ValueError(f"devices must be at least one, and each once, got {list(devices)}")
    return Mesh(np.array(devices), (AXIS,))


def whole(mesh: Mesh) -> NamedSharding:
    """The same on every device."""
    return NamedSharding(mesh, PartitionSpec())


def rows(mesh: Mesh) -> NamedSharding:
    """Of an array [B, ...], B a multiple of the devices: every device has its own samples."""
    return NamedSharding(mesh, PartitionSpec(AXIS))


def place(tree: Any, shardings: Any) -> Any:
    """Arrays that every process has the same of, on the devices of all."""
    return jax.device_put(jax.tree.map(np.asarray, tree), shardings)


def check_mesh(mesh: Mesh) -> None:
    """Refuse a mesh over which samples cannot be spread.

    Raises:
        ValueError: it is none, or has other axes than ``data``, or devices of other processes.
    """
    if not isinstance(mesh, Mesh):
        raise ValueError(f"mesh must be None or from data_mesh, got {check.told(mesh)}")
    if mesh.axis_names != (AXIS,):
        raise ValueError(f"the mesh must have one axis, {AXIS!r}, got {mesh.axis_names}")
    if any(device.process_index != jax.process_index() for device in mesh.devices.flat):
        raise ValueError("the mesh must be of devices of this process; every process has its own")


def of_samples(mesh: Mesh | None, *given: Any) -> Mesh | None:
    """The mesh that a driver spreads its samples over; None where there is nothing to spread.

    Args:
        mesh: what the caller asks for; None = all devices of this process.
        *given: the model and the samples; inside of a caller's own ``jit`` or the like they are
            left where they are.

    Raises:
        ValueError: samples cannot be spread over the mesh.
    """
    if mesh is None:
        new = jnp.zeros(())  # traced inside of a ``jit``, whatever else is
        traced = any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves((new, given)))
        mesh = None if traced else data_mesh(jax.local_devices())
    else:
        check_mesh(mesh)
    return None if mesh is None or mesh.size == 1 else mesh


def rows_at_once(mesh: Mesh | None, grid: tuple[int, ...]) -> int | None:
    """How many images of (h, w) patches a network should see at once; None = the more the better.

    Args:
        mesh: the devices; None = the default one.
        grid: (h, w).
    """
    platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
    return max(1, CPU_PATCHES // math.prod(grid)) if platform == "cpu" else None


def spread(mesh: Mesh | None, keys: jax.Array, image: Any, editable: Any) -> tuple[Any, ...]:
    """Keys, images and masks on the devices, filled up with samples that have nothing to do.

    Returns:
        The three, of a number of samples that the mesh divides; as they are if it is None.
    """
    if mesh is None:
        return keys, image, editable
    if len(keys) % mesh.size:
        places = np.arange(-(-len(keys) // mesh.size) * mesh.size)
        own = places < len(keys)
        taken = np.where(own, places, 0)
        keys, image, editable = keys[taken], image[taken], editable[taken] & own[:, None, None]
    return jax.device_put((keys, image, editable), rows(mesh))


def each_device(
    function: Callable[..., Any], mesh: Mesh | None, in_axes: Sequence[int | None], out_axes: Any
) -> Callable[..., Any]:
    """The function on every device, with that device's own samples; nothing is exchanged.

    Args:
        function: of arrays and pytrees; jittable.
        mesh: over which samples are spread; None gives the function itself.
        in_axes: for every argument the axis of its samples, None = all devices have it whole.
        out_axes: the same for the result, a prefix of its tree.
    """
    if mesh is None:
        return function

    def spec(axis: int | None) -> PartitionSpec:
        return PartitionSpec() if axis is None else PartitionSpec(*[None] * axis, AXIS)

    return jax.shard_map(
        function,
        mesh=mesh,
        in_specs=tuple(spec(axis) for axis in in_axes),
        out_specs=jax.tree.map(spec, out_axes),
        check_vma=False,
    )


def settled(carry: Carry, given: Callable[[], Any]) -> Carry:
    """The carry that a loop begins with, as one that its body does not change the type of.

    Inside of a caller's own ``shard_map``, what is the same on all devices has another type than
    what is not; the carry gets that of whatever differs on most.

    Args:
        carry: to begin with.
        given: what its body works with, arrays or shapes of ``jax.eval_shape``; not called
            elsewhere, or where such types are not checked.
    """
    mapped = jax.sharding.get_abstract_mesh().manual_axes
    if not any(_varies(jax.typeof(jax.lax.axis_index(axis))) for axis in mapped):
        return carry
    leaves = jax.tree.leaves((carry, given()))
    axes = frozenset().union(*map(_varies, leaves))

    def widen(leaf: jax.Array) -> jax.Array:
        return jax.lax.pcast(leaf, tuple(axes - _varies(leaf)), to="varying")

    return jax.tree.map(widen, carry)


def _varies(leaf: Any) -> frozenset[str]:
    """The axes of a caller's ``shard_map`` over which an array, or a shape or type, differs."""
    kind = leaf if hasattr(leaf, "manual_axis_type") else jax.typeof(leaf)
    return kind.manual_axis_type.varying


def cut(found: Any, number: int, mesh: Mesh | None, out_axes: Any) -> Any:
    """A result of ``each_device`` without the samples that filled it up."""
    if mesh is None or number % mesh.size == 0:
        return found

    def first(axis: int, leaves: Any) -> Any:
        return jax.tree.map(lambda leaf: jax.lax.slice_in_dim(leaf, 0, number, axis=axis), leaves)

    return jax.tree.map(first, out_axes, found)


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
