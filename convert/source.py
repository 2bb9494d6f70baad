"""A checkpoint file of PyTorch: which network it holds, the weights to take, and what is left."""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import safetensors

from convert import formats, torch_file
from convert.mapping import listed
from ipr_jax import files

METADATA = "ipr_jax"
"""The entry of a safetensors file's metadata in which an export describes its model, as JSON."""


FLOATING = ("F64", "F32", "F16", "BF16")
"""The element types of safetensors that weights may have."""


class Source(NamedTuple):
    """What was read of a file.

    Attributes:
        layout: the format of the network that it holds.
        weights: which were read: "ema", "raw", or "only" where there is one set.
        tensors: those weights by PyTorch name without prefix, read-only.
        ignored: what else the file holds: reasons, and the names that each goes for.
        sha256: of the file, hexadecimal.
        described: what an export says of its model, "config" and "provenance"; else empty.
    """

    layout: formats.Format
    weights: str
    tensors: dict[str, np.ndarray]
    ignored: dict[str, list[str]]
    sha256: str
    described: dict[str, Any]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the tensors, by name."""
        return {name: tensor.shape for name, tensor in self.tensors.items()}


def read(path: str | os.PathLike[str], weights: str = "ema") -> Source:
    """Read the weights of a network from what ``torch.save`` or safetensors wrote.

    Only the chosen weights are loaded.

    Args:
        path: the file.
        weights: "ema" or "raw", where a file has both.

    Raises:
        OSError: there is no such file, or it cannot be read.
        ValueError: it is damaged or of another format, holds no known network or not these
            weights, or has tensors that are of no network; one line that names the path.
    """
    with refusing(path):
        if os.path.exists(path) and not os.path.isfile(path):
            raise ValueError("it is no file")
        with open(path, "rb") as file:
            safe = file.read(9)[8:] == b"{"  # after the length of its header
        source = (_read_safetensors if safe else _read_torch)(path, weights)
        with open(path, "rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return source._replace(sha256=sha256)


@contextlib.contextmanager
def refusing(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn errors about a file into one line that begins with its path."""
    try:
        yield
    except (ValueError, safetensors.SafetensorError) as error:
        text = files.printable(str(error))
        named = text.startswith(os.fspath(path))
        raise ValueError(text if named else f"{os.fspath(path)}: {text}") from error


def _read_torch(path: str | os.PathLike[str], weights: str) -> Source:
    names, others = torch_file.outline(path)
    layout, chosen, prefix = formats.recognise(names, weights)
    used, ignored = _sort(names, layout, prefix)
    tensors = torch_file.state_dict(path, prefix)
    for name in used - tensors.keys():
        ignored.setdefault("no tensor", []).append(prefix + name)
    if others:
        ignored["beside the state dict"] = list(others)
    tensors = {name: tensor for name, tensor in tensors.items() if name in used}
    return Source(layout, chosen, tensors, ignored, "", {})


def _read_safetensors(path: str | os.PathLike[str], weights: str) -> Source:
    with safetensors.safe_open(path, framework="numpy") as file:
        names = list(file.keys())
        layout, chosen, prefix = formats.recognise(names, weights)
        used, ignored = _sort(names, layout, prefix)
        for name in sorted(used):
            element = file.get_slice(prefix + name).get_dtype()
            if element not in FLOATING:
                raise ValueError(f"{name} is {element}, it must be one of {', '.join(FLOATING)}")
        tensors = {name: file.get_tensor(prefix + name) for name in sorted(used)}
        described = _description((file.metadata() or {}).get(METADATA))
    return Source(layout, chosen, tensors, ignored, "", described)


def _description(text: str | None) -> dict[str, Any]:
    """What an export says of its model; nothing for another file.

    Raises:
        ValueError: it is not what an export says.
    """
    if text is None:
        return {}
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its metadata {METADATA} must be JSON: {error}") from error
    parts = ("config", "provenance")
    if not isinstance(data, dict) or not all(isinstance(data.get(part), dict) for part in parts):
        raise ValueError(f"its metadata {METADATA} must be an object with the objects {parts}")
    return data


def _sort(
    names: Iterable[str], layout: formats.Format, prefix: str
) -> tuple[set[str], dict[str, list[str]]]:
    """The names of the wanted weights, prefix cut, and by reason the names to ignore.

    Raises:
        ValueError: there are others.
    """
    other = {start: f"the {kind} weights" for kind, start in layout.prefixes if start != prefix}
    used: set[str] = set()
    ignored: dict[str, list[str]] = {}
    unknown = []
    for name in names:
        own = name.startswith(prefix)
        reasons = [
            why
            for end, why in layout.ignored.items()
            if name == end or (own and name.endswith(end))
        ]
        if own and not reasons:
            used.add(name.removeprefix(prefix))
            continue
        reasons += [why for start, why in other.items() if start and name.startswith(start)]
        if reasons:
            ignored.setdefault(reasons[0], []).append(name)
        else:
            unknown.append(name)
    if unknown:
        raise ValueError(f"tensors of no {layout.title}: {listed(unknown)}")
    return used, ignored
