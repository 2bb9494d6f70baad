"""A checkpoint file of PyTorch: which network it holds, the weights to take, and what is left."""

import hashlib
import json
import os
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import safetensors

from convert import networks, torch_file
from convert.mapping import listed

METADATA = "ipr_jax"
"""The entry of a safetensors file's metadata in which an export describes its model, as JSON."""


class Source(NamedTuple):
    """What was read of a file.

    Attributes:
        network: which it holds.
        weights: which were read: "ema", "raw", or "only" where there is one set.
        tensors: those weights by PyTorch name without prefix, read-only.
        ignored: what else the file holds: reasons, and the names that each goes for.
        sha256: of the file, hexadecimal.
        described: what an export says of its model, "config" and "provenance"; else empty.
    """

    network: networks.Network
    weights: str
    tensors: dict[str, np.ndarray]
    ignored: dict[str, list[str]]
    sha256: str
    described: dict[str, Any]


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
    with open(path, "rb") as file:
        safe = file.read(9)[8:] == b"{"  # after the length of its header
        file.seek(0)
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    try:
        return (_read_safetensors if safe else _read_torch)(path, weights, sha256)
    except (ValueError, safetensors.SafetensorError) as error:
        text = " ".join(str(error).split())
        named = str(path) in text
        raise ValueError(text if named else f"{os.fspath(path)}: {text}") from error


def _read_torch(path: str | os.PathLike[str], weights: str, sha256: str) -> Source:
    names, others = torch_file.outline(path)
    network, chosen, prefix = networks.recognise(names, weights)
    used, ignored = _sort(names, network, prefix)
    tensors = torch_file.state_dict(path, prefix)
    for name in used - tensors.keys():
        ignored.setdefault("no tensor", []).append(prefix + name)
    if others:
        ignored["no weights"] = list(others)
    tensors = {name: tensor for name, tensor in tensors.items() if name in used}
    return Source(network, chosen, tensors, ignored, sha256, {})


def _read_safetensors(path: str | os.PathLike[str], weights: str, sha256: str) -> Source:
    with safetensors.safe_open(path, framework="numpy") as file:
        names = list(file.keys())
        network, chosen, prefix = networks.recognise(names, weights)
        used, ignored = _sort(names, network, prefix)
        tensors = {name: file.get_tensor(prefix + name) for name in sorted(used)}
        described = json.loads((file.metadata() or {}).get(METADATA, "{}"))
    return Source(network, chosen, tensors, ignored, sha256, described)


def _sort(
    names: Iterable[str], network: networks.Network, prefix: str
) -> tuple[set[str], dict[str, list[str]]]:
    """The names of the wanted weights, prefix cut, and by reason the names to ignore.

    Raises:
        ValueError: there are others.
    """
    other = {start: f"the {kind} weights" for kind, start in network.prefixes if start != prefix}
    used: set[str] = set()
    ignored: dict[str, list[str]] = {}
    unknown = []
    for name in names:
        reasons = [why for end, why in network.ignored.items() if name.endswith(end)]
        if not reasons and name.startswith(prefix):
            used.add(name.removeprefix(prefix))
            continue
        reasons += [why for start, why in other.items() if start and name.startswith(start)]
        if reasons:
            ignored.setdefault(reasons[0], []).append(name)
        else:
            unknown.append(name)
    if unknown:
        raise ValueError(f"{len(unknown)} tensors are of no {network.title}: {listed(unknown)}")
    return used, ignored
