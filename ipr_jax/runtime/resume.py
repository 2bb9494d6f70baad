"""The state of a run on disk, from which it goes on: Orbax checkpoints, known to be whole."""

import contextlib
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from ipr_jax.runtime import files
from ipr_jax.runtime.files import printable


@contextlib.contextmanager
def checkpoints(folder: Path, *, own: bool = False) -> Iterator[ocp.CheckpointManager]:
    """The checkpoints in a folder, of which the last two are kept; written in the background.

    What a killed process left unfinished is removed. At the end, what is being written is finished.

    Args:
        folder: made if it does not exist.
        own: whether every process has a folder of its own; otherwise all processes save together.

    Raises:
        ValueError: another run is using the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    process = jax.process_index()
    stack = contextlib.ExitStack()
    if own or process == 0:
        stack.enter_context(files.locked(folder))
        for unfinished in folder.glob(f"*{ocp.utils.TMP_DIR_SUFFIX}*"):
            shutil.rmtree(unfinished)
    alone = ocp.options.MultiprocessingOptions(
        primary_host=process,
        active_processes={process},
        barrier_sync_key_prefix=f"process-{process}",
    )
    options = ocp.CheckpointManagerOptions(
        max_to_keep=2,
        create=False,
        multiprocessing_options=alone if own else ocp.options.MultiprocessingOptions(),
    )
    with stack, ocp.CheckpointManager(folder.absolute(), options=options) as manager:
        yield manager


def checksum(tree: Any) -> np.ndarray:
    """A number that differs if one value of a tree does, uint32 [].

    The tree holds arrays of 32 bits, or integers or booleans of fewer.
    Sums of integers do not depend on their order, so it is the same on any number of devices. Of
    NumPy's arrays it is computed without the devices, which may be busy.
    """
    if all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(tree)):
        return np.asarray(_checksum(tree, np))
    return np.asarray(_on_devices(tree).addressable_data(0))


def _checksum(tree: Any, xp: Any = jnp) -> Any:
    def weigh(numbers: Any) -> Any:
        place = xp.arange(numbers.size, dtype=np.uint32).reshape(numbers.shape)
        return (numbers * (2 * place + 1)).sum(dtype=np.uint32)

    def bits(leaf: Any) -> Any:
        return leaf.view(np.uint32) if leaf.dtype.itemsize == 4 else leaf.astype(np.uint32)

    return weigh(xp.stack([weigh(bits(leaf)) for leaf in jax.tree.leaves(tree)]))


_on_devices = jax.jit(_checksum)


def save(manager: ocp.CheckpointManager, step: int, state: Any) -> None:
    """Begin to write a state, a tree of arrays that must not change any more, as of a step.

    Raises:
        ValueError: the step is not larger than that of every checkpoint that is there.
    """
    given = ocp.args.StandardSave({"state": state, "checksum": checksum(state)})
    if not manager.save(step, args=given):
        raise ValueError(f"{manager.directory} has later checkpoints than step {step}")


def remove(manager: ocp.CheckpointManager, unwanted: Callable[[int], bool]) -> None:
    """Remove the checkpoints of some steps."""
    manager.wait_until_finished()
    for step in manager.all_steps():
        if unwanted(step):
            manager.delete(step)


def restore(manager: ocp.CheckpointManager, wanted: Callable[[int], Any]) -> tuple[int, Any] | None:
    """The last state that is whole; damaged ones after it are removed, with a warning.

    Args:
        manager: from ``checkpoints``.
        wanted: the tree of ``jax.ShapeDtypeStruct`` by step; what has a sharding becomes an array
            of JAX, the rest one of NumPy.

    Returns:
        Its step and the state; None if there is no checkpoint.

    Raises:
        ValueError: there are checkpoints and none is whole.
    """
    steps = sorted(manager.all_steps(), reverse=True)
    for step in steps:
        given = {"state": wanted(step), "checksum": jax.ShapeDtypeStruct((), np.uint32)}
        try:
            found = manager.restore(step, args=ocp.args.StandardRestore(given))
            if checksum(found["state"]) != found["checksum"]:
                raise ValueError("its checksum differs")
        except MemoryError:
            raise
        except Exception as error:  # a damaged file may raise anything
            warnings.warn(
                f"{manager.directory / str(step)} is damaged and left out: "
                f"{printable(str(error), 200)}",
                stacklevel=2,
            )
            continue
        remove(manager, lambda other, step=step: other > step)
        return step, found["state"]
    if steps:
        raise ValueError(
            f"no checkpoint in {manager.directory} is whole; remove it to start from the beginning"
        )
    return None
