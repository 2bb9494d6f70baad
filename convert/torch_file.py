"""Reads what ``torch.save`` wrote, without PyTorch and without running anything in the file.

Reading has two phases. Unpickling builds only plain data and placeholders: every class or function
that the file names becomes an inert ``Placeholder``, and no storage is read. Then the placeholders
that stand for data (tensors, ordered dicts, sets, ...) are replaced by it, reading the storages
they need. Arrays are read-only views of their storages, so tensors that share memory still do.
"""

import io
import os
import pickle
import sys
import zipfile
from collections.abc import Callable
from typing import IO, Any

import ml_dtypes
import numpy as np

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # opens the files that PyTorch wrote before it used zip
LEGACY_PROTOCOL = 1001

# The element type of each class of storage and, for types without such a class, of each dtype.
ELEMENTS = {
    "BoolStorage": np.dtype(np.bool_),
    "ByteStorage": np.dtype(np.uint8),
    "CharStorage": np.dtype(np.int8),
    "ShortStorage": np.dtype(np.int16),
    "IntStorage": np.dtype(np.int32),
    "LongStorage": np.dtype(np.int64),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "FloatStorage": np.dtype(np.float32),
    "DoubleStorage": np.dtype(np.float64),
    "ComplexFloatStorage": np.dtype(np.complex64),
    "ComplexDoubleStorage": np.dtype(np.complex128),
    "UntypedStorage": np.dtype(np.uint8),
    "uint16": np.dtype(np.uint16),
    "uint32": np.dtype(np.uint32),
    "uint64": np.dtype(np.uint64),
    "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
    "float8_e4m3fnuz": np.dtype(ml_dtypes.float8_e4m3fnuz),
    "float8_e5m2": np.dtype(ml_dtypes.float8_e5m2),
    "float8_e5m2fnuz": np.dtype(ml_dtypes.float8_e5m2fnuz),
}


class Placeholder:
    """Stand for an object that is not built, with all that the file says of it.

    A class or function that the file only refers to is a subclass of Placeholder, with ``module``
    and ``name`` alone.

    Attributes:
        module: where the class or function is that would build it.
        name: its name there.
        args: what would be passed to it; keyword arguments are a last dict.
        state: what the object would be restored from.
        items: what would be put into the object: elements, or (key, value) pairs.
    """

    module: str = ""
    name: str = ""
    args: tuple[Any, ...]
    state: Any
    items: list[Any]

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Record the arguments instead of using them."""
        self = super().__new__(cls)
        self.args, self.state, self.items = (*args, kwargs) if kwargs else args, None, []
        return self

    def __repr__(self) -> str:
        return f"<Placeholder {self.module}.{self.name}>"

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        self.items.append((key, value))

    def append(self, value: Any) -> None:
        """Record an element that the file puts into the object."""
        self.items.append(value)


class _Storage(Placeholder):
    """Stand for the memory of tensors; ``args`` is ("storage", type, key, device, count, ...)."""


class _Attribute(Placeholder):
    """Stand for ``getattr``, by which old pickles name nested classes, methods and enum members."""

    module = "builtins"
    name = "getattr"

    def __new__(cls, owner: Any, *names: Any) -> Any:
        known = isinstance(owner, Placeholder) or _is_reference(owner)
        if known and len(names) == 1:
            return _reference(owner.module, f"{owner.name}.{names[0]}")
        return _reference("builtins", "getattr")(owner, *names)


def _reference(module: str, name: str) -> type[Placeholder]:
    """Return the placeholder of a class or function."""
    return type("Placeholder", (Placeholder,), {"module": module, "name": name})


def _is_reference(value: Any) -> bool:
    """Return whether the value is the placeholder of a class or function."""
    return isinstance(value, type) and issubclass(value, Placeholder)


class _Unpickler(pickle.Unpickler):
    """Unpickle into plain data and placeholders, and collect the storages by key."""

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(file, encoding="utf-8")
        self.storages: dict[str, _Storage] = {}

    def find_class(self, module: str, name: str) -> type[Placeholder]:
        """Return the placeholder of what the file names; nothing is imported."""
        module = "builtins" if module == "__builtin__" else module
        return _Attribute if (module, name) == ("builtins", "getattr") else _reference(module, name)

    def persistent_load(self, pid: Any) -> Any:
        """Return the storage, or the class that old files saved with its source code.

        Raises:
            ValueError: the reference is of another kind.
        """
        match pid:
            case ("storage", kind, str(key), _, int(), *views) if views in ([], [None]):
                if _is_reference(kind):
                    self.storages[key] = _Storage(*pid)
                    return self.storages[key]
            case ("module", kind, *_) if _is_reference(kind):
                return kind
        raise ValueError(f"persistent id {pid!r}: it must be a whole storage or a module")


def _element(kind: Any) -> np.dtype:
    """Return the element type that a class of storage or a dtype stands for.

    Raises:
        ValueError: unknown.
    """
    if not _is_reference(kind) or kind.name not in ELEMENTS:
        raise ValueError(f"elements of type {kind.name}: it must be one of {', '.join(ELEMENTS)}")
    return ELEMENTS[kind.name]


def _octets(data: str | bytes = b"", *_: Any) -> bytes:
    """Return the bytes that old pickles hold as Latin-1 text."""
    return data.encode("latin-1") if isinstance(data, str) else b"" + data


def _first(value: Any, *_: Any) -> Any:
    """Return the first argument: a parameter is its tensor."""
    return value


PLAIN: dict[tuple[str, str], Callable[..., Any]] = {
    ("collections", "OrderedDict"): dict,
    ("collections", "defaultdict"): lambda factory=None, *args: dict(*args),
    ("builtins", "set"): set,
    ("builtins", "frozenset"): frozenset,
    ("builtins", "complex"): complex,
    ("builtins", "slice"): slice,
    ("builtins", "bytes"): _octets,
    ("builtins", "bytearray"): lambda *args: bytearray(_octets(*args)),
    ("_codecs", "encode"): _octets,
    ("torch", "Size"): tuple,
    ("torch._utils", "_rebuild_parameter"): _first,
    ("torch._utils", "_rebuild_parameter_with_state"): _first,
}


class _Builder:
    """Replace the placeholders that stand for data by that data, each object once.

    Args:
        record: the bytes of a storage by its key.
        swap: whether their byte order is not this machine's.
    """

    def __init__(self, record: Callable[[str], bytes], swap: bool) -> None:
        self._record = record
        self._swap = swap
        self._storages: dict[tuple[str, np.dtype], np.ndarray] = {}
        self._built: dict[int, tuple[Any, Any]] = {}  # by id: the object, which keeps its id, built

    def __call__(self, value: Any) -> Any:
        """Return the value with everything in it built.

        Raises:
            ValueError: a tensor or its storage breaks the format.
        """
        if id(value) in self._built:
            return self._built[id(value)][1]
        if isinstance(value, dict):
            built = self._keep(value, {})
            built.update((self(key), self(item)) for key, item in value.items())
            return built
        if isinstance(value, list):
            built = self._keep(value, [])
            built.extend(map(self, value))
            return built
        if isinstance(value, tuple | set | frozenset):
            return self._keep(value, type(value)(map(self, value)))
        return self._object(value) if isinstance(value, Placeholder) else value

    def _keep(self, value: Any, built: Any) -> Any:
        """Return what was built and remember that it stands for the value."""
        self._built[id(value)] = value, built
        return built

    def _object(self, value: Placeholder) -> Any:
        """Return the data that a placeholder stands for, or itself with its contents built."""
        match value:
            case _Storage() if value.args[1].name in ELEMENTS:
                return self._storage(value)
            case Placeholder(module="torch._utils", name="_rebuild_tensor" | "_rebuild_tensor_v2"):
                return self._keep(value, self._tensor(*value.args))
            case Placeholder(module="torch._utils", name="_rebuild_tensor_v3"):
                args, dtype = value.args[:6] + value.args[7:], _element(value.args[6])
                return self._keep(value, self._tensor(*args, dtype=dtype))
            case Placeholder(name="_rebuild_from_type_v2", args=(function, _, args, _)) if (
                _is_reference(function)
            ):
                return self._keep(value, self(function(*args)))
        args, plain = self(value.args), PLAIN.get((value.module, value.name))
        built = self._keep(value, plain(*args) if plain else value)
        if isinstance(built, dict):
            built.update(map(self, value.items))
        elif not plain:
            value.args, value.items, value.state = args, self(value.items), self(value.state)
        return built

    def _tensor(
        self,
        storage: Any,
        offset: int,
        size: tuple[int, ...],
        stride: tuple[int, ...],
        requires_grad: bool = False,
        hooks: Any = None,
        metadata: Any = None,
        dtype: np.dtype | None = None,
    ) -> np.ndarray:
        """Return a view of a storage, from the arguments of PyTorch's rebuilding functions.

        Raises:
            ValueError: the view would leave the storage, or is of conjugate or negative values.
        """
        if not isinstance(storage, _Storage):
            raise ValueError(f"tensor in {storage!r}: it must be in a storage of this file")
        if metadata:
            raise ValueError(f"tensor marked {metadata}: it must have no conj or neg mark")
        size, stride = self(size), self(stride)
        view = f"tensor of size {size}, stride {stride}, offset {offset}"
        counts = (offset, *size, *stride)
        if len(size) != len(stride) or not all(isinstance(n, int) and n >= 0 for n in counts):
            raise ValueError(f"{view}: they must be integers from 0 up, a stride for each size")
        elements = self._storage(storage, dtype)
        if 0 in size:
            return elements[:0].reshape(size)
        end = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) + 1
        if end > elements.size:
            raise ValueError(f"{view}: it must end within the {elements.size} elements stored")
        width, memory = elements.itemsize, elements.view(np.uint8)
        steps = tuple(step * width for step in stride)
        return np.ndarray(size, elements.dtype, memory, offset * width, steps)

    def _storage(self, storage: _Storage, dtype: np.dtype | None = None) -> np.ndarray:
        """Return the elements of a storage, read once for all tensors in it.

        Raises:
            ValueError: not as many bytes as there must be.
        """
        _, kind, key, _, count, *_ = storage.args
        size, dtype = count * _element(kind).itemsize, dtype or _element(kind)
        if (key, dtype) not in self._storages:
            data = self._record(key)
            if len(data) != size:
                raise ValueError(f"storage {key} has {len(data)} bytes: it must have {size}")
            elements = np.frombuffer(data, dtype)
            elements = elements.byteswap() if self._swap else elements
            elements.flags.writeable = False
            self._storages[key, dtype] = elements
        return self._storages[key, dtype]


def _open_zip(file: IO[bytes]) -> tuple[Any, _Builder]:
    """Return the unpickled contents of a zip file and the builder over its storages.

    Raises:
        ValueError: TorchScript, or no PyTorch file.
    """
    archive = zipfile.ZipFile(file)
    names = set(archive.namelist())
    roots = [name.removesuffix("data.pkl") for name in names if name.endswith("/data.pkl")]
    if len(roots) != 1:
        raise ValueError(f"zip file with {len(roots)} records */data.pkl: it must have one")
    root = roots[0]
    if f"{root}constants.pkl" in names:
        raise ValueError("TorchScript archive: it must be what torch.save wrote of a state_dict()")
    order = archive.read(f"{root}byteorder").decode() if f"{root}byteorder" in names else "little"
    if order not in ("little", "big"):
        raise ValueError(f"byte order {order!r}: it must be little or big")
    contents = _Unpickler(io.BytesIO(archive.read(f"{root}data.pkl"))).load()
    return contents, _Builder(lambda key: archive.read(f"{root}data/{key}"), order != sys.byteorder)


def _open_legacy(file: IO[bytes]) -> tuple[Any, _Builder]:
    """Return the unpickled contents of a file from before zip and the builder over its storages.

    Raises:
        ValueError: no PyTorch file.
    """
    if _Unpickler(file).load() != LEGACY_MAGIC or _Unpickler(file).load() != LEGACY_PROTOCOL:
        raise ValueError("it must begin as a zip file or with PyTorch's magic number")
    _Unpickler(file).load()  # facts about the machine that wrote it; storages are little-endian
    unpickler = _Unpickler(file)
    contents, keys = unpickler.load(), _Unpickler(file).load()
    places, position = {}, file.tell()
    for key in keys:
        file.seek(position)
        count = int.from_bytes(file.read(8), "little")
        size = count * _element(unpickler.storages[key].args[1]).itemsize
        places[key] = position + 8, size
        position += 8 + size

    def record(key: str) -> bytes:
        file.seek(places[key][0])
        return file.read(places[key][1])

    return contents, _Builder(record, sys.byteorder != "little")


def _load(path: str | os.PathLike[str], select: Callable[[Any], Any]) -> Any:
    """Return a part of the file, built; only the storages of that part are read.

    Args:
        path: the file.
        select: takes the part from the unpickled contents.

    Raises:
        FileNotFoundError: no such file.
        ValueError: damaged, truncated or not a PyTorch file.
    """
    with open(path, "rb") as file:
        try:
            zipped = file.read(4) == b"PK\x03\x04"
            file.seek(0)
            contents, build = _open_zip(file) if zipped else _open_legacy(file)
            return build(select(contents))
        except Exception as error:  # a damaged pickle can raise anything
            reason = f"{type(error).__name__}: {error}"
            raise ValueError(f"{os.fspath(path)} is no readable PyTorch file: {reason}") from error


def _entries(value: Any) -> dict[Any, Any]:
    """Return the entries of a dict or of an ordered dict's placeholder, else none."""
    if isinstance(value, Placeholder) and value.name == "OrderedDict":
        return dict(*value.args) | dict(value.items)
    return value if isinstance(value, dict) else {}


def read(path: str | os.PathLike[str]) -> Any:
    """Read everything in a file that ``torch.save`` wrote.

    Args:
        path: the file.

    Returns:
        The saved object: tensors as read-only arrays, plain containers and values as themselves,
        ordered and default dicts as dicts, everything else as a ``Placeholder``.

    Raises:
        FileNotFoundError: no such file.
        ValueError: damaged, truncated or not a PyTorch file.
    """
    return _load(path, lambda contents: contents)


def state_dict(path: str | os.PathLike[str], prefix: str = "") -> dict[str, np.ndarray]:
    """Read the tensors of a checkpoint; no others are loaded.

    Args:
        path: the file, with its tensors by name under "state_dict" or else at the top.
        prefix: what the names must begin with; it is cut.

    Returns:
        The arrays, read-only, by name.

    Raises:
        FileNotFoundError: no such file.
        ValueError: damaged, truncated or not a PyTorch file, or no tensor has the prefix.
    """

    def select(contents: Any) -> tuple[set[str], dict[str, Any]]:
        entries = _entries(_entries(contents).get("state_dict", contents))
        named = {name: value for name, value in entries.items() if isinstance(name, str)}
        chosen = {name: value for name, value in named.items() if name.startswith(prefix)}
        heads = {head + dot for head, dot, _ in (name.partition(".") for name in named)}
        return heads, {name.removeprefix(prefix): value for name, value in chosen.items()}

    heads, chosen = _load(path, select)
    tensors = {name: value for name, value in chosen.items() if isinstance(value, np.ndarray)}
    if not tensors:
        raise ValueError(
            f"{os.fspath(path)} has no tensor whose name begins with {prefix!r};"
            f" its names begin with {', '.join(sorted(heads)) or 'nothing'}"
        )
    return tensors
