"""Reads what ``torch.save`` wrote, without PyTorch and without running anything in the file.

Reading has two phases. Unpickling builds only plain data and placeholders: every class or function
that the file names becomes an inert ``Placeholder``, and no storage is read. Then the placeholders
that stand for data (tensors, ordered dicts, sets, ...) are replaced by it, reading the storages
they need. Arrays are read-only views of their storages, so tensors that share memory still do.

What reading takes is bounded by the size of the file, not by what the file claims: nothing
compressed is read, and a claimed size is compared with what there is before it is used.
"""

import collections
import functools
import io
import mmap
import operator
import os
import pickle
import reprlib
import sys
import zipfile
from collections.abc import Callable, Iterable, Mapping
from typing import IO, Any, ClassVar, NamedTuple

import ml_dtypes
import numpy as np

from ipr_jax.runtime import files

State = tuple[str, ...]
"""Where a dict is in a file: the names on the way to it, none for the outermost."""

ZIP_MAGIC = b"PK\x03\x04"
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # opens the files that PyTorch wrote before it used zip
LEGACY_PROTOCOL = 1001
MAX_TUPLES, MAX_DEPTH = 1_000_000, 100  # in a tuple: hashing it takes time for all, and C stack
MAX_NAMES = 8  # on the way to a dict that is listed: with many, listing all takes long

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


def _byte_array(unpickler: Any) -> None:
    """Push a bytearray, without first allocating as many bytes as the file claims."""
    unpickler.load_binbytes8()
    unpickler.stack[-1] = bytearray(unpickler.stack[-1])


def _counting(load: Callable[[Any], None]) -> Callable[[Any], None]:
    """Return what an opcode does to push a tuple, limited to those that can be hashed."""

    def push(unpickler: Any) -> None:
        load(unpickler)
        made, seen = unpickler.stack[-1], unpickler.tuples
        inner = [seen[id(item)] for item in made if id(item) in seen]
        count = 1 + sum(count for count, _, _ in inner)
        depth = 1 + max((depth for _, depth, _ in inner), default=0)
        if count > MAX_TUPLES or depth > MAX_DEPTH:
            raise ValueError(
                f"{count} tuples in a tuple, {depth} deep:"
                f" they must be at most {MAX_TUPLES}, {MAX_DEPTH} deep"
            )
        seen[id(made)] = count, depth, made

    return push


class _Unpickler(pickle._Unpickler):
    """Unpickle into plain data and placeholders, and collect the storages by key.

    The class in C is faster, but allocates whatever index or length the file claims.
    """

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = {
        **pickle._Unpickler.dispatch,
        pickle.BYTEARRAY8[0]: _byte_array,
        **{
            code: _counting(pickle._Unpickler.dispatch[code])
            for code in pickle.TUPLE + pickle.TUPLE1 + pickle.TUPLE2 + pickle.TUPLE3
        },
    }

    def __init__(self, file: Any) -> None:
        super().__init__(file, encoding="utf-8")
        self.storages: dict[str, _Storage] = {}
        self.tuples: dict[int, tuple[int, int, Any]] = {}  # by id: how many, how deep, the tuple

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
        shown = reprlib.repr(pid)
        raise ValueError(f"persistent id {shown}: it must be a whole storage or a module")

    def get_extension(self, code: int) -> None:
        """Refuse what stands for something registered in this process.

        Raises:
            ValueError: always.
        """
        raise ValueError(f"extension code {code}: classes and functions must be named")


def _element(kind: Any) -> np.dtype:
    """Return the element type that a class of storage or a dtype stands for.

    Raises:
        ValueError: unknown.
    """
    if not _is_reference(kind) or kind.name not in ELEMENTS:
        name = getattr(kind, "name", reprlib.repr(kind))
        raise ValueError(f"elements of type {name}: it must be one of {', '.join(ELEMENTS)}")
    return ELEMENTS[kind.name]


def _octets(data: str | bytes = b"", *_: Any) -> bytes:
    """Return the bytes that old pickles hold as Latin-1 text."""
    return data.encode("latin-1") if isinstance(data, str) else b"" + data


def _first(value: Any, *_: Any) -> Any:
    """Return the first argument: a parameter is its tensor."""
    return value


DICTS = ("collections", "OrderedDict"), ("collections", "defaultdict")
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
    ("torch", "Size"): lambda sizes=(): tuple(map(operator.index, sizes)),
    ("torch._utils", "_rebuild_parameter"): _first,
    ("torch._utils", "_rebuild_parameter_with_state"): _first,
}


def _check_size(key: str, size: int, wanted: int) -> None:
    """Compare the bytes that a storage has with those that it must have.

    Raises:
        ValueError: not as many.
    """
    if size != wanted:
        raise ValueError(f"storage {key} has {size} bytes: it must have {wanted}")


class _Builder:
    """Replace the placeholders that stand for data by that data, each object once.

    Args:
        sizes: the number of bytes of each storage, by key.
        record: the bytes of a storage, by key.
        swap: whether their byte order is not this machine's.
    """

    def __init__(
        self, sizes: Mapping[str, int], record: Callable[[str], bytes], swap: bool
    ) -> None:
        self._sizes = sizes
        self._record = functools.cache(record)
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
            shown = reprlib.repr(storage)
            raise ValueError(f"tensor in {shown}: it must be in a storage of this file")
        if metadata:
            shown = reprlib.repr(metadata)
            raise ValueError(f"tensor marked {shown}: it must have no conj or neg mark")
        size, stride = self(size), self(stride)
        counts = (offset, *size, *stride)
        if len(size) != len(stride) or not all(isinstance(n, int) and n >= 0 for n in counts):
            shown = ", ".join(map(reprlib.repr, (size, stride, offset)))
            raise ValueError(
                f"tensor of size, stride, offset {shown}:"
                " they must be integers from 0 up, a stride for each size"
            )
        elements = self._storage(storage, dtype)
        if 0 in size:
            return elements[:0].reshape(size)
        end = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) + 1
        if end > elements.size:
            raise ValueError(
                f"tensor of size, stride, offset {size}, {stride}, {offset}:"
                f" it must end within the {elements.size} elements stored"
            )
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
        _check_size(key, self._sizes.get(key, 0), size)
        if (key, dtype) not in self._storages:
            elements = np.frombuffer(self._record(key), dtype)
            elements = elements.byteswap() if self._swap else elements
            elements.flags.writeable = False
            self._storages[key, dtype] = elements
        return self._storages[key, dtype]


def _open_zip(file: IO[bytes]) -> tuple[Any, _Builder, bool]:
    """Return the unpickled contents of a zip file, the builder over its storages, if it has sums.

    PyTorch can leave out the checksums, which are then 0 for every entry.

    Raises:
        ValueError: TorchScript, no PyTorch file, or entries that could take more memory than the
            file has bytes or hide one another.
    """
    archive = zipfile.ZipFile(file)
    names = archive.namelist()
    roots = [name.removesuffix("data.pkl") for name in names if name.endswith("/data.pkl")]
    if not roots:
        raise ValueError(f"it is {files.kind_of(file.name)}")
    root = roots[0]
    if f"{root}constants.pkl" in names:
        raise ValueError("TorchScript archive: it must be what torch.save wrote of a state_dict()")
    checksums = any(entry.CRC for entry in archive.infolist())
    sizes: dict[str, int] = {}
    for entry in archive.infolist():
        name = entry.filename
        if not checksums:
            del entry.CRC  # so that nothing is compared with it
        if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
            raise ValueError(f"compressed entry {name}: it must be stored as torch.save does")
        if name in sizes:
            raise ValueError(f"two entries {name}: names must differ")
        sizes[name] = entry.file_size
    total, available = sum(sizes.values()), file.seek(0, os.SEEK_END)
    if total > available:
        raise ValueError(f"{total} bytes in a file of {available}: entries must not overlap")
    for entry in archive.infolist():
        archive.open(entry).close()  # compares its name here with the one beside its bytes
    if len(roots) > 1:
        raise ValueError(f"zip file with {len(roots)} records */data.pkl: it must have one")
    order = archive.read(f"{root}byteorder").decode() if f"{root}byteorder" in sizes else "little"
    if order not in ("little", "big"):
        raise ValueError(f"byte order {order!r}: it must be little or big")
    contents = _Unpickler(io.BytesIO(archive.read(f"{root}data.pkl"))).load()
    data = f"{root}data/"
    build = _Builder(
        {name.removeprefix(data): size for name, size in sizes.items() if name.startswith(data)},
        lambda key: archive.read(data + key),
        swap=order != sys.byteorder,
    )
    return contents, build, checksums


def _open_legacy(file: IO[bytes]) -> tuple[Any, _Builder, bool]:
    """Return the same of a file from before zip, which has no checksums.

    Raises:
        ValueError: no PyTorch file, or storages that do not have the bytes that they must have.
    """
    data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    try:
        magic = _Unpickler(data).load()
    except Exception:  # not a pickle
        magic = None
    if magic != LEGACY_MAGIC:
        kind = (
            files.kind_of(file.name) or "neither a zip file nor in PyTorch's format from before zip"
        )
        raise ValueError(f"it is {kind}")
    protocol = _Unpickler(data).load()
    if protocol != LEGACY_PROTOCOL:
        raise ValueError(f"protocol {reprlib.repr(protocol)}: it must be {LEGACY_PROTOCOL}")
    _Unpickler(data).load()  # facts about the machine that wrote it; storages are little-endian
    unpickler = _Unpickler(data)
    contents, keys = unpickler.load(), _Unpickler(data).load()
    places: dict[str, slice] = {}
    for key in keys:
        _, kind, _, _, wanted, *_ = unpickler.storages[key].args
        width, count = _element(kind).itemsize, int.from_bytes(data.read(8), "little")
        start = data.tell()
        _check_size(key, min(count * width, len(data) - start), wanted * width)
        places[key] = slice(start, start + wanted * width)
        data.seek(places[key].stop)
    build = _Builder(
        {key: place.stop - place.start for key, place in places.items()},
        lambda key: data[places[key]],
        swap=sys.byteorder != "little",
    )
    return contents, build, False


def _load(path: str | os.PathLike[str], select: Callable[[Any], Any]) -> tuple[Any, bool]:
    """Return a part of the file, built, and if it has checksums; no other storages are read.

    Args:
        path: the file.
        select: takes the part from the unpickled contents.

    Raises:
        FileNotFoundError: no such file.
        ValueError: damaged, truncated or not a PyTorch file.
    """
    with open(path, "rb") as file:
        try:
            magic = file.read(len(ZIP_MAGIC))
            if not magic:
                raise ValueError("it is empty")
            opened = _open_zip(file) if magic == ZIP_MAGIC else _open_legacy(file)
            contents, build, checksums = opened
            return build(select(contents)), checksums
        except MemoryError:  # a sound file can be too large
            raise
        except Exception as error:  # a damaged pickle can raise anything
            reason = str(error)
            if type(error) is not ValueError:
                reason = f"it is damaged or truncated ({type(error).__name__}: {reason})"
            raise _refusal(path, f"is no readable PyTorch file: {reason}") from error


def _refusal(path: str | os.PathLike[str], reason: str) -> ValueError:
    """Return an error about the file: one printable line, whatever the reason quotes."""
    return ValueError(f"{os.fspath(path)} {files.printable(reason)}")


def _entries(value: Any) -> dict[str, Any] | None:
    """Return the named entries of a dict or of the placeholder of one, None for anything else."""
    if isinstance(value, Placeholder) and (value.module, value.name) in DICTS:
        value = PLAIN[value.module, value.name](*value.args) | dict(value.items)
    if isinstance(value, dict) and all(isinstance(name, str) for name in value):
        return value
    return None


def _states(contents: Any) -> dict[State, dict[str, Any]]:
    """Return the dicts in a file by where they are, outer ones first, each once.

    Raises:
        ValueError: there is none at the top.
    """
    states: dict[State, dict[str, Any]] = {}
    queue: collections.deque[tuple[State, Any]] = collections.deque([((), contents)])
    seen: set[int] = set()
    while queue:
        state, value = queue.popleft()
        if id(value) in seen:
            continue
        seen.add(id(value))
        entries = _entries(value)
        if entries is None:
            continue
        states[state] = entries
        if len(state) < MAX_NAMES:
            queue.extend(((*state, name), inner) for name, inner in entries.items())
    if not states:
        shown = reprlib.repr(contents)
        raise ValueError(f"it holds {shown}: it must hold tensors by name, as a state_dict() does")
    return states


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
    return _load(path, lambda contents: contents)[0]


class Outline(NamedTuple):
    """What a checkpoint holds.

    Attributes:
        states: the names in every dict whose names are text, by where it is, outer ones first.
        checksums: whether the file has what tells that its numbers are whole; PyTorch leaves it out
            with ``torch.utils.serialization.config.save.compute_crc32 = False``.
    """

    states: dict[State, tuple[str, ...]]
    checksums: bool


def outline(path: str | os.PathLike[str]) -> Outline:
    """List the names in a checkpoint; no tensor is loaded.

    Raises:
        FileNotFoundError: no such file.
        ValueError: damaged, truncated or not a PyTorch file of tensors by name.
    """

    def select(contents: Any) -> dict[State, list[str]]:
        return {state: list(entries) for state, entries in _states(contents).items()}

    states, checksums = _load(path, select)
    return Outline({state: tuple(names) for state, names in states.items()}, checksums)


def state_dict(path: str | os.PathLike[str], state: State, names: Iterable[str]) -> dict[str, Any]:
    """Read tensors of a checkpoint; no others are loaded.

    Args:
        path: the file.
        state: where the dict is that holds them.
        names: which ones.

    Returns:
        By name the arrays, read-only, and what is no tensor as in ``read``.

    Raises:
        FileNotFoundError: no such file.
        ValueError: damaged, truncated or not a PyTorch file of these names.
    """

    def select(contents: Any) -> dict[str, Any]:
        entries = _states(contents)[state]
        return {name: entries[name] for name in names}

    return _load(path, select)[0]
