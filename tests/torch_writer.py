"""Writes files as ``torch.save`` does, without PyTorch: any pickle, well formed or hostile."""

import io
import pickle
import sys
import types
import zipfile
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

KINDS = {
    "bool": "Bool",
    "uint8": "Byte",
    "int8": "Char",
    "int16": "Short",
    "int32": "Int",
    "int64": "Long",
    "float16": "Half",
    "bfloat16": "BFloat16",
    "float32": "Float",
    "float64": "Double",
    "complex64": "ComplexFloat",
    "complex128": "ComplexDouble",
}
MODULES: dict[str, types.ModuleType] = {"torch": types.ModuleType("torch")}


def named(module: str, name: str) -> type:
    """Return a class that pickles as a name in a module that is there while pickling only."""
    if not hasattr(MODULES.setdefault(module, types.ModuleType(module)), name):
        setattr(MODULES[module], name, type(name, (), {"__module__": module}))
    return getattr(MODULES[module], name)


class Call:
    """Pickles as the call of a function or class, with a state and contents."""

    def __init__(
        self, function: Any, *args: Any, state: Any = None, items: Any = (), pairs: Any = ()
    ):
        self.reduced = function, args, state, iter(items), iter(pairs)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.reduced

    def __call__(self) -> None:
        """Be what another call may be of."""


@dataclass
class Storage:
    """Pickles as the memory of tensors; an array is written in C order."""

    kind: str
    key: str
    data: bytes | np.ndarray
    count: int

    @property
    def octets(self) -> memoryview:
        if isinstance(self.data, bytes):
            return memoryview(self.data)
        return np.ascontiguousarray(self.data).reshape(-1).view(np.uint8).data


def storage(array: np.ndarray, key: str = "0") -> Storage:
    return Storage(f"{KINDS[array.dtype.name]}Storage", key, array, array.size)


def tensor(store: Any, size: Any, stride: Any, offset: int = 0, **metadata: bool) -> Call:
    arguments = store, offset, size, stride, False, OrderedDict()
    marks = (metadata,) if metadata else ()
    return Call(named("torch._utils", "_rebuild_tensor_v2"), *arguments, *marks)


class Pickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO, protocol: int) -> None:
        super().__init__(file, protocol)
        self.storages: dict[str, Storage] = {}

    def persistent_id(self, obj: Any) -> Any:
        if not isinstance(obj, Storage):
            return None
        self.storages[obj.key] = obj
        return "storage", named("torch", obj.kind), obj.key, "cpu", obj.count


def pickled(value: Any, protocol: int) -> tuple[bytes, dict[str, Storage]]:
    """Return a pickle and the storages in it; bytes are a pickle already."""
    if isinstance(value, bytes):
        return value, {}
    file = io.BytesIO()
    pickler = Pickler(file, protocol)
    with patch.dict(sys.modules, MODULES):
        pickler.dump(value)
    return file.getvalue(), pickler.storages


def save(path: Path, value: Any, protocol: int = 2, /, **records: bytes) -> Path:
    """Write a zip file; storages are not copied, but for one at a time that is not in C order."""
    contents, storages = pickled(value, protocol)
    with zipfile.ZipFile(path, "w") as archive:

        def write(name: str, data: memoryview) -> None:
            entry = zipfile.ZipInfo(f"archive/{name}")
            entry.file_size = data.nbytes  # known in advance: decides on zip64
            with archive.open(entry, "w") as file:
                file.write(data)

        for name, data in {"data.pkl": contents, **records}.items():
            write(name, memoryview(data))
        for key, store in storages.items():
            write(f"data/{key}", store.octets)
    return path


def without_checksums(path: Path) -> Path:
    """Make a file what it is with ``torch.utils.serialization.config.save.compute_crc32 = False``.

    PyTorch 2.13 then writes 0 for the checksum of every entry, before and after its bytes and in
    the directory.
    """
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            start = entry.header_offset + 14
            data[start : start + 4] = bytes(4)
        at = archive.start_dir
        for _ in archive.infolist():
            data[at + 16 : at + 20] = bytes(4)
            at += 46 + sum(
                int.from_bytes(data[at + i : at + i + 2], "little") for i in (28, 30, 32)
            )
    path.write_bytes(data)
    return path


def save_legacy(path: Path, value: Any, protocol: int = 2) -> Path:
    """Write a file in the format from before zip."""
    contents, storages = pickled(value, protocol)
    with open(path, "wb") as file:
        for head in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}):
            pickle.dump(head, file, 2)
        file.write(contents)
        pickle.dump(sorted(storages), file, 2)
        for _, store in sorted(storages.items()):
            file.write(store.count.to_bytes(8, "little"))
            file.write(store.octets)
    return path
