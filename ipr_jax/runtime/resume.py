"""What all processes have together, on disk: Orbax checkpoints that are known to be whole."""

import contextlib
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from ipr_jax.runtime import files
from ipr_jax.runtime.files import printable


@contextlib.contextmanager
def checkpoints(folder: Path) -> Iterator[ocp.CheckpointManager]:
    """The checkpoints in a folder, of which the last two are kept; written in the background.

    All processes save together. What a killed one left unfinished is removed. At the end, what is
    being written is finished.

    Args:
        folder: made if it does not exist.

    Raises:
        ValueError: another run is using the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stack = contextlib.ExitStack()
    if jax.process_index() == 0:
        stack.enter_context(files.locked(folder))
        for unfinished in folder.glob(f"*{ocp.utils.TMP_DIR_SUFFIX}*"):
            shutil.rmtree(unfinished)
    options = ocp.CheckpointManagerOptions(max_to_keep=2, create=False)
    with stack, ocp.CheckpointManager(folder.absolute(), options=options) as manager:
        yield manager


def _checksum(tree: Any) -> np.ndarray:
    """A number that differs if one value of a tree does, uint32 [].

    The tree holds arrays of 32 bits, or integers or booleans of fewer.
    Sums of integers do not depend on their order, so it is the same on any number of devices.
    """
    return np.asarray(_on_devices(tree).addressable_data(0))


@jax.jit
def _on_devices(tree: Any) -> jax.Array:
    def weigh(numbers: Any) -> Any:
        place = jnp.arange(numbers.size, dtype=np.uint32).reshape(numbers.shape)
        return (numbers * (2 * place + 1)).sum(dtype=np.uint32)

    def bits(leaf: Any) -> Any:
        return leaf.view(np.uint32) if leaf.dtype.itemsize == 4 else leaf.astype(np.uint32)

    return weigh(jnp.stack([weigh(bits(leaf)) for leaf in jax.tree.leaves(tree)]))


def save(manager: ocp.CheckpointManager, step: int, state: Any) -> None:
    """Begin to write a copy of a state, a tree of arrays of JAX, as of a step.

    Raises:
        ValueError: the step is not larger than that of every checkpoint that is there.
    """
    given = ocp.args.StandardSave({"state": state, "checksum": _checksum(state)})
    if not manager.save(step, args=given):
        raise ValueError(f"{manager.directory} has later checkpoints than step {step}")


def restore(manager: ocp.CheckpointManager, wanted: Any) -> tuple[int, Any] | None:
    """The last state that is whole; damaged ones after it are removed, with a warning.

    Args:
        manager: from ``checkpoints``.
        wanted: the tree of ``jax.ShapeDtypeStruct``, with their shardings.

    Returns:
        Its step and the state; None if there is no checkpoint.

    Raises:
        ValueError: there are checkpoints and none is whole, or processes differ in which is.
        MemoryError, jax.errors.JaxRuntimeError: the state does not fit on the devices.
    """
    steps = sorted(manager.all_steps(), reverse=True)
    for step in steps:
        given = {"state": wanted, "checksum": jax.ShapeDtypeStruct((), np.uint32)}
        try:
            found = manager.restore(step, args=ocp.args.StandardRestore(given))
            if _checksum(found["state"]) != found["checksum"]:
                raise ValueError("its checksum differs")
        except (MemoryError, AssertionError, jax.errors.JaxRuntimeError):
            raise  # from the devices or the other processes
        except Exception as error:  # a damaged file may raise anything
            warnings.warn(
                f"{manager.directory / str(step)} is damaged and left out: "
                f"{printable(str(error), 200)}",
                stacklevel=2,
            )
            continue
        manager.wait_until_finished()
        for damaged in (other for other in steps if other > step):
            manager.delete(damaged)
        _agree(step)
        return step, found["state"]
    _agree(0)
    if steps:
        raise ValueError(
            f"no checkpoint in {manager.directory} is whole; remove it to start from the beginning"
        )
    return None


def _agree(step: int) -> None:
    """Make sure that all processes go on from the same step, 0 = from the beginning.

    Raises:
        ValueError: they do not.
    """
    steps = sorted({*np.ravel(multihost_utils.process_allgather(np.int32(step))).tolist()})
    if len(steps) > 1:
        raise ValueError(
            f"the processes would go on from different steps, {', '.join(map(str, steps))}; start "
            "them again when all see the same files"
        )
