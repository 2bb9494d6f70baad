"""What one process has in work, on disk: trees of NumPy arrays in files that are known to be whole.

Orbax is for what all processes have together: it writes the NumPy arrays of process 0 alone, and
savers that know nothing of each other wait for the same signals.
"""

import contextlib
import io
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np

from ipr_jax.runtime import files

Tree = TypeVar("Tree")

KEPT = 2
"""How many are kept: the one before the last is for when that is damaged."""


@contextlib.contextmanager
def own(folder: Path) -> Iterator[None]:
    """Have a folder of snapshots to oneself; what a killed process left unfinished is removed.

    Args:
        folder: made if it does not exist.

    Raises:
        ValueError: another process has it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with files.locked(folder):
        for unfinished in folder.glob(".*.npz"):
            unfinished.unlink(missing_ok=True)
        yield


def save(folder: Path, subject: int, tree: Any) -> None:
    """Write a tree of NumPy arrays.

    Args:
        folder: one's own.
        subject: what it is of, at least 0.
        tree: with any leaves that NumPy takes for arrays.

    Raises:
        OSError: it cannot be written; the earlier ones are still there.
    """
    before = _found(folder)
    number = 1 + max(before, default=0)
    with files.whole(folder / f"{number:08}-{subject:05}.npz") as part, part.open("xb") as file:
        np.savez(file, allow_pickle=False, **_flat(tree))
    for old in sorted(before)[: len(before) + 1 - KEPT]:
        before[old].unlink(missing_ok=True)


def restore(folder: Path, wanted: Callable[[int], Tree]) -> tuple[int, Tree] | None:
    """The last tree that is whole; damaged ones after it are removed, with a warning.

    Args:
        folder: one's own.
        wanted: the tree of ``jax.ShapeDtypeStruct`` by subject.

    Returns:
        Its subject and the tree; None if there is none at all.

    Raises:
        ValueError: there are some and none is whole.
    """
    found = _found(folder)
    damaged = []
    for path in (found[number] for number in sorted(found, reverse=True)):
        subject = _subject(path)
        shapes = wanted(subject)
        try:
            tree = _read(path, shapes)
        except ValueError as error:
            warnings.warn(f"{error}; it is left out", stacklevel=2)
            damaged.append(path)
            continue
        for other in damaged:
            other.unlink(missing_ok=True)
        return subject, tree
    if found:
        raise ValueError(
            f"no state in {folder} is whole; remove that folder to start its samples again"
        )
    return None


def remove(folder: Path, unwanted: Callable[[int], bool] = lambda subject: True) -> None:
    """Remove the snapshots of some subjects."""
    for path in _found(folder).values():
        if unwanted(_subject(path)):
            path.unlink(missing_ok=True)


def _found(folder: Path) -> dict[int, Path]:
    """Those that are there, by when they were written."""
    return {int(path.stem.split("-")[0]): path for path in folder.glob("[0-9]*-[0-9]*.npz")}


def _subject(path: Path) -> int:
    return int(path.stem.split("-")[1])


def _flat(tree: Any) -> dict[str, Any]:
    """The leaves by their path."""
    leaves, _ = jax.tree.flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _read(path: Path, wanted: Tree) -> Tree:
    """The arrays of a file as the tree that is wanted.

    Raises:
        ValueError: it is damaged, or has other arrays.
    """
    with files.reading(path):
        data = io.BytesIO(path.read_bytes())  # so that an OSError is one of the disk
        with zipfile.ZipFile(data) as archive:
            if broken := archive.testzip():
                raise ValueError(f"{broken} is not what was written")
        data.seek(0)
        with np.load(data) as file:
            arrays = dict(file)
        shapes = _flat(wanted)
        if arrays.keys() != shapes.keys():
            raise ValueError("its arrays are others")
        leaves = [_as(arrays[name], leaf) for name, leaf in shapes.items()]
        return jax.tree.unflatten(jax.tree.structure(wanted), leaves)


def _as(array: np.ndarray, wanted: Any) -> np.ndarray:
    """An array of a file, if it has the shape and the dtype that are wanted.

    Raises:
        ValueError: it has others.
    """
    if array.dtype.kind == "V" and array.dtype.itemsize == wanted.dtype.itemsize:
        array = array.view(wanted.dtype)  # what NumPy does not know, such as bfloat16
    if (array.shape, array.dtype) != (wanted.shape, wanted.dtype):
        raise ValueError("its arrays are others")
    return array
