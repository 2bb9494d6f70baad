"""Models on disk: an Orbax checkpoint that holds parameters, architecture and provenance."""

import contextlib
import dataclasses
import errno
import importlib.resources
import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx

from ipr_jax import interrupts
from ipr_jax.core import rngs
from ipr_jax.models.config import Config
from ipr_jax.models.denoiser import MODELS, Model, new_model
from ipr_jax.runtime import files

SHIPPED = (
    "mini-sudoku",
    "mini-sudoku-transformer",
    "digits-sudoku",
    "mnist-sudoku-transformer",
    "even-pixels-transformer",
)
"""Models that come with the package."""

DEFAULTS = {
    "mini-sudoku": "mini-sudoku-transformer",
    "digits-sudoku": "digits-sudoku",
    "mnist-sudoku": "mnist-sudoku-transformer",
    "even-pixels": "even-pixels-transformer",
}
"""By task, the best."""

_UNFINISHED = ".unfinished"
"""How the name of a model ends that is being written; a killed process leaves it behind."""


def save(
    path: str | os.PathLike[str], config: Any, params: Any, provenance: dict[str, Any]
) -> None:
    """Write a model; the folder appears whole or not at all.

    Args:
        path: a folder that does not exist, in one that does.
        config: the architecture, a dataclass of numbers, strings and tuples of them; its class
            tells ``open_as`` which network it is.
        params: NNX state of the network.
        provenance: JSON data on where the weights come from.

    Raises:
        FileExistsError: the folder exists; it is not overwritten.
        FileNotFoundError: the folder that it would be in does not exist.
        OSError: it cannot be written there, such as on a full disk.
        ValueError: a path that Orbax cannot write to.
    """
    path = check_path(files.refuse_existing(path))
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    free = shutil.disk_usage(path.parent).free
    if free < size:
        said = f"{os.strerror(errno.ENOSPC)}, {free} bytes are free, up to {size} are needed"
        raise OSError(errno.ENOSPC, said, str(path))
    unfinished = path.with_name(f".{path.name}{_UNFINISHED}")  # the same for every process
    leads = jax.process_index() == 0

    def clean() -> None:
        if leads:
            for suffix in ("", ocp.utils.TMP_DIR_SUFFIX):
                shutil.rmtree(f"{unfinished}{suffix}", ignore_errors=True)

    with interrupts.cleaned(clean):
        try:
            with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
                checkpointer.save(
                    unfinished,
                    args=ocp.args.Composite(
                        params=ocp.args.StandardSave(nnx.to_pure_dict(params)),
                        config=ocp.args.JsonSave(to_json(config)),
                        provenance=ocp.args.JsonSave(provenance),
                    ),
                    force=True,  # a killed process may have left it
                )
        except BaseException:
            for _ in range(10):  # its threads are not stopped, and may be writing still
                clean()
                time.sleep(0.1)
            raise
        if leads:
            files.seal(unfinished)
            unfinished.rename(path)
    ocp.multihost.sync_global_processes("saved")  # the others wait until it is there


def check_path(path: str | os.PathLike[str], signs: str = "*?[]\\") -> Path:
    """The absolute path, if Orbax can write a checkpoint there.

    Args:
        path: of a model, or of the folder of a training.
        signs: those that it must be without.

    Raises:
        ValueError: a part of the path would be taken for a pattern, or is not UTF-8, or the name
            for that of an unfinished checkpoint.
    """
    path = files.utf8(Path(path).absolute())
    found = [char for char in signs if char in str(path)]
    if found:
        rule = "the path of a model or of a training must be without"
        raise ValueError(f"{path} has {' '.join(found)}: {rule}")
    for mark in (ocp.utils.TMP_DIR_SUFFIX, _UNFINISHED):
        if mark in path.name:
            raise ValueError(f"{path}: {mark} marks unfinished models, rename it")
    return path


def load(path_or_name: str | os.PathLike[str], *, dtype: Any = jnp.float32) -> Model:
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
) -> tuple[Model, dict[str, Any]]:
    """``load``, with the provenance that was saved beside the weights."""

    def build(config: Config) -> Model:
        return new_model(config, dtype=dtype, rngs=rngs(0))

    return open_as(path_or_name, dict.fromkeys(MODELS, build))


def open_as(
    path_or_name: str | os.PathLike[str], networks: Mapping[type, Callable[[Any], Any]]
) -> tuple[Any, dict[str, Any]]:
    """Open a folder that holds one of several networks.

    Args:
        path_or_name: a folder, or one of ``SHIPPED``.
        networks: for each class of configuration the function that builds its network.

    Returns:
        The network, and the provenance that was saved beside the weights.

    Raises:
        FileNotFoundError: neither a folder nor a shipped model; lists the shipped ones.
        ValueError: the folder holds none of these networks, with the reason.
    """
    path = _found(path_or_name)
    _check(path)
    with _opening(path) as checkpointer:
        parts = {name: ocp.args.JsonRestore() for name in ("config", "provenance")}
        described = checkpointer.restore(path, args=ocp.args.Composite(**parts))
        provenance = dict(described["provenance"])
        config = from_json(dict(described["config"]), networks)
        build = networks[type(config)]
        graph, state = nnx.split(nnx.eval_shape(lambda: build(config)))
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        placed = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here),
            nnx.to_pure_dict(state),
        )
        restored = checkpointer.restore(
            path,
            args=ocp.args.Composite(params=ocp.args.StandardRestore(placed)),
        )
    # Through the host: arrays that are bound to no device follow where the caller computes.
    params = jax.device_put(jax.tree.map(np.asarray, restored["params"]))
    nnx.replace_by_pure_dict(state, params)
    return nnx.merge(graph, state), provenance


def provenance_of(path_or_name: str | os.PathLike[str]) -> dict[str, Any]:
    """What was saved beside the weights of a model, or of another network, without them.

    Raises:
        FileNotFoundError: neither a folder nor a shipped model; lists the shipped ones.
        ValueError: the folder is not a model, with the reason; its weights are not looked at.
    """
    path = _found(path_or_name)
    if reason := _lacking(path):
        raise ValueError(reason)
    with _opening(path) as checkpointer:
        wanted = ocp.args.Composite(provenance=ocp.args.JsonRestore())
        return dict(checkpointer.restore(path, args=wanted)["provenance"])


def _found(path_or_name: str | os.PathLike[str]) -> Path:
    """The folder of a model.

    Raises:
        FileNotFoundError: neither a folder nor a shipped model; lists the shipped ones.
        ValueError: the folder is that of an unfinished one, or Orbax cannot open it.
    """
    path = Path(path_or_name)
    if str(path_or_name) in SHIPPED:
        path = Path(str(importlib.resources.files("ipr_jax") / "models" / str(path_or_name)))
    if any(mark in path.name for mark in (ocp.utils.TMP_DIR_SUFFIX, _UNFINISHED)):
        raise ValueError(f"{path.absolute()} is not a model of ipr_jax: it was never finished")
    path = check_path(path, "\\")
    if not path.is_dir():
        there = f", which is {files.kind_of(path) or 'a file'}" if path.exists() else ""
        wanted = f"give a model folder or one of {list(SHIPPED)}" + (
            f"; {_WRITERS}" if there else ""
        )
        raise FileNotFoundError(f"no model at {str(path_or_name)!r}{there}: {wanted}")
    return path


@contextlib.contextmanager
def _opening(path: Path) -> Iterator[ocp.Checkpointer]:
    """Read parts of a model; of several processes each reads for itself.

    Raises:
        ValueError: something in the folder is no part of a model, or damaged.
    """
    process = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(primary_host=process, active_processes={process})
    try:
        handler = ocp.CompositeCheckpointHandler()
        with ocp.Checkpointer(handler, multiprocessing_options=alone) as checkpointer:
            yield checkpointer
    except (MemoryError, jax.errors.JaxRuntimeError):
        raise
    except Exception as error:  # without checksums, a damaged file may raise anything
        reason = files.printable(str(error), 300)
        raise ValueError(f"{path} is not a model of ipr_jax: {reason}") from error


_WRITERS = "ipr-jax train and ipr-jax convert import write models"
_PARTS = ("config", "params", "provenance")
"""The folders in that of a model."""
_RUNS = {
    ("config.json", "checkpoints"): "a training",
    ("config.json", "samples"): "a refinement",
    ("config.json", "arms"): "an experiment",
    ("results.json", "samples.npz"): "a stream",
}
"""What is in the folder of a run."""


def _check(path: Path) -> None:
    """Make sure that a folder is a model, as it was saved.

    Raises:
        ValueError: it is damaged or something else, with its path and the reason.
    """
    if (path / files.SUMS).exists():
        files.check_seal(path)
    elif reason := _lacking(path):
        raise ValueError(reason)
    else:
        warnings.warn(f"{path} has no {files.SUMS}: it cannot be checked for damage", stacklevel=4)


def _lacking(path: Path) -> str:
    """Why a folder cannot be a model; empty where it can."""
    missing = [part for part in _PARTS if not (path / part).is_dir()]
    if not missing:
        return ""
    seen = _seen(path) or f"it has no {missing[0]}"
    return f"{path} is not a model of ipr_jax: {seen}; {_WRITERS}"


def _seen(path: Path) -> str:
    """What a folder that is no model is; empty where that is not clear."""
    inside = {each.name for each in path.iterdir()}
    if not inside:
        return "it is empty"
    for names, run in _RUNS.items():
        if inside.issuperset(names):
            model = f", its model is {path / 'model'}" if "model" in inside else ""
            return f"it is the folder of {run}{model}"
    return ""


def to_json(config: Any) -> dict[str, Any]:
    """A configuration as JSON data: the name of its class under "kind", and its fields."""
    return {"kind": type(config).__name__, **dataclasses.asdict(config)}


def from_json(data: Mapping[str, Any], known: Iterable[type]) -> Any:
    """The configuration that ``to_json`` described.

    Raises:
        ValueError, TypeError: it is of none of the known classes, or damaged.
    """
    fields = {name: tuple(v) if isinstance(v, list) else v for name, v in data.items()}
    kind, kinds = fields.pop("kind", None), {config.__name__: config for config in known}
    if kind not in kinds:
        raise ValueError(f"its kind is {kind!r}, where one of {sorted(kinds)} is needed")
    return kinds[kind](**fields)
