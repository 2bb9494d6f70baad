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
from ipr_jax.runtime import files

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
        notes: what else to know of how they were read, a line each.
        described: what an export says of its model, "config" and "provenance"; else empty.
        sha256: of the file, hexadecimal.
    """

    layout: formats.Format
    weights: str
    tensors: dict[str, np.ndarray]
    ignored: dict[str, list[str]]
    notes: list[str]
    described: dict[str, Any]
    sha256: str = ""

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
    files.utf8(path)
    with refusing(path):
        if os.path.exists(path) and not os.path.isfile(path):
            raise ValueError(f"it is {files.kind_of(path)} and no file")
        with open(path, "rb") as file:
            safe = file.read(9)[4:] == b"\0\0\0\0{"  # after the length of its header
        source = (_read_safetensors if safe else _read_torch)(path, weights)
        with open(path, "rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return source._replace(sha256=sha256)


@contextlib.contextmanager
def refusing(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn errors about a file into one line that begins with its path."""
    try:
        yield
    except safetensors.SafetensorError as error:
        reason = files.printable(str(error))
        raise ValueError(f"{os.fspath(path)} is no readable safetensors file: {reason}") from error
    except ValueError as error:
        text = files.printable(str(error))
        named = text.startswith(os.fspath(path))
        raise ValueError(text if named else f"{os.fspath(path)}: {text}") from error


def _read_torch(path: str | os.PathLike[str], weights: str) -> Source:
    states, checksums = torch_file.outline(path)
    chosen, found = formats.recognise(states, weights)
    used, ignored = _sort(states[chosen.state], chosen, found)
    read = torch_file.state_dict(path, chosen.state, used.values())
    others = {name: value for name, value in read.items() if not isinstance(value, np.ndarray)}
    if others and len(others) == len(read):
        name, value = next(iter(others.items()))
        raise ValueError(f"{name} must be a tensor, it is {files.printable(repr(value), 100)}")
    if others:
        ignored["no tensor"] = list(others)
    beside = [
        name
        for depth, own in enumerate(chosen.state)
        for name in states[chosen.state[:depth]]
        if name != own
    ]
    if beside:
        ignored["beside the state dict"] = beside
    tensors = {name: read[wrapped] for name, wrapped in used.items() if wrapped not in others}
    notes = _notes(chosen, used.values())
    if not checksums:
        notes.append("it has no checksums: weights that were damaged since would not be noticed")
    return Source(chosen.layout, chosen.weights, tensors, ignored, notes, {})


def _read_safetensors(path: str | os.PathLike[str], weights: str) -> Source:
    with safetensors.safe_open(path, framework="numpy") as file:
        stored = {name: name for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata() or {}
        for name, same in metadata.items():  # of tensors that share memory only one is stored
            if same in stored:
                stored.setdefault(name, same)
        chosen, found = formats.recognise({(): list(stored)}, weights)
        used, ignored = _sort(stored, chosen, found)
        for wrapped in used.values():
            element = file.get_slice(stored[wrapped]).get_dtype()
            if element not in FLOATING:
                known = ", ".join(FLOATING)
                raise ValueError(f"{wrapped} is {element}, it must be one of {known}")
        tensors = {name: file.get_tensor(stored[wrapped]) for name, wrapped in used.items()}
    notes, described = _notes(chosen, used.values()), _description(metadata.get(METADATA))
    return Source(chosen.layout, chosen.weights, tensors, ignored, notes, described)


def _notes(chosen: formats.Found, wrapped: Iterable[str]) -> list[str]:
    """Where weights were, if not by their own names at the top of the file."""
    inserted = {part for name in wrapped for part in name.split(".")} & set(formats.WRAPPERS)
    cut = [*chosen.prefix.split(".")[:-1], *sorted(inserted)]
    left_out = f"; left out of their names: {', '.join(cut)}" if cut else ""
    return [f"found {formats.place(chosen.state)}{left_out}"] if chosen.state or cut else []


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
    names: Iterable[str], chosen: formats.Found, found: Iterable[formats.Found]
) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Where the chosen weights are by their own names, and by reason the names to ignore.

    Raises:
        ValueError: there are others, or two that only wrappers tell apart.
    """
    here = [each for each in found if each.state == chosen.state]
    here.sort(key=lambda each: len(each.prefix), reverse=True)  # the longest that fits counts
    used: dict[str, str] = {}
    ignored: dict[str, list[str]] = {}
    unknown = []
    for name in names:
        plain = formats.unwrapped(name)
        owner = next((each for each in here if plain.startswith(each.prefix)), None)
        reason = formats.COUNTERS.get(plain.rpartition(".")[2])
        if reason is None and owner is not None and owner is not chosen:
            reason = f"the {owner.weights} weights"
        if reason is not None:
            ignored.setdefault(reason, []).append(name)
        elif owner is None:
            unknown.append(name)
        else:
            first = used.setdefault(plain.removeprefix(chosen.prefix), name)
            if first != name:
                raise ValueError(f"{first} and {name} must not both be there")
    if unknown:
        raise ValueError(f"tensors of no {chosen.layout.title}: {listed(unknown)}")
    return used, ignored
