import builtins
import io
import os
import pickle
import sys
import types
import zipfile
from collections import OrderedDict, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import ml_dtypes
import numpy as np
import pytest

from convert.torch_file import Placeholder, read, state_dict

GOLDEN = Path(__file__).parent / "golden"
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
    kind: str
    key: str
    data: bytes
    count: int


def storage(array: np.ndarray, key: str = "0") -> Storage:
    return Storage(f"{KINDS[array.dtype.name]}Storage", key, array.tobytes(), array.size)


def tensor(store: Storage, size: Any, stride: Any, offset: int = 0, **metadata: bool) -> Call:
    arguments = store, offset, size, stride, False, OrderedDict()
    marks = (metadata,) if metadata else ()
    return Call(named("torch._utils", "_rebuild_tensor_v2"), *arguments, *marks)


def named(module: str, name: str) -> type:
    """Return a class that pickles as a name in a module that is there while pickling only."""
    if not hasattr(MODULES.setdefault(module, types.ModuleType(module)), name):
        setattr(MODULES[module], name, type(name, (), {"__module__": module}))
    return getattr(MODULES[module], name)


MODULES: dict[str, types.ModuleType] = {"torch": types.ModuleType("torch")}


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
    if isinstance(value, bytes):
        return value, {}
    file = io.BytesIO()
    pickler = Pickler(file, protocol)
    with patch.dict(sys.modules, MODULES):
        pickler.dump(value)
    return file.getvalue(), pickler.storages


def save(path: Path, value: Any, protocol: int = 2, **records: bytes) -> Path:
    contents, storages = pickled(value, protocol)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", contents)
        for name, data in records.items():
            archive.writestr(f"archive/{name}", data)
        for key, store in storages.items():
            archive.writestr(f"archive/data/{key}", store.data)
    return path


def save_legacy(path: Path, value: Any, protocol: int = 2) -> Path:
    contents, storages = pickled(value, protocol)
    with open(path, "wb") as file:
        for head in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}):
            pickle.dump(head, file, 2)
        file.write(contents)
        pickle.dump(sorted(storages), file, 2)
        for _, store in sorted(storages.items()):
            file.write(store.count.to_bytes(8, "little") + store.data)
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "file.pt"


@pytest.mark.parametrize("dtype", [*KINDS])
@pytest.mark.parametrize("write", [save, save_legacy])
def test_dtypes(path: Path, dtype: str, write: Any) -> None:
    array = np.array([[0, 1, 1], [1, 0, 1]]).astype(getattr(ml_dtypes, dtype, dtype))
    got = read(write(path, tensor(storage(array), (2, 3), (3, 1))))
    assert got.dtype == array.dtype
    np.testing.assert_array_equal(got, array)
    assert not got.flags.writeable


@pytest.mark.parametrize("dtype", ["uint16", "uint64", "float8_e4m3fn"])
def test_dtypes_without_a_storage_class(path: Path, dtype: str) -> None:
    array = np.arange(4).astype(getattr(ml_dtypes, dtype, dtype))
    store = Storage("UntypedStorage", "0", array.tobytes(), array.nbytes)
    rebuild = named("torch._utils", "_rebuild_tensor_v3")
    value = Call(rebuild, store, 1, (3,), (1,), False, OrderedDict(), named("torch", dtype))
    got = read(save(path, value))
    assert got.dtype == array.dtype
    np.testing.assert_array_equal(got, array[1:])


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("write", [save, save_legacy])
def test_views_share_their_storage(path: Path, write: Any, protocol: int) -> None:
    array = np.arange(12, dtype=np.float32)
    store = storage(array)
    views = {
        "whole": tensor(store, (3, 4), (4, 1)),
        "transposed": tensor(store, (4, 3), (1, 4)),
        "sliced": tensor(store, (2, 2), (4, 2), offset=5),
        "expanded": tensor(store, (5, 2), (0, 1), offset=10),
        "scalar": tensor(store, (), (), offset=11),
        "empty": tensor(store, (0, 3), (3, 1)),
        "other": tensor(storage(-array, "1"), (12,), (1,)),
    }
    got = read(write(path, views, protocol))
    whole = array.reshape(3, 4)
    np.testing.assert_array_equal(got["whole"], whole)
    np.testing.assert_array_equal(got["transposed"], whole.T)
    np.testing.assert_array_equal(got["sliced"], whole[1:, 1::2])
    np.testing.assert_array_equal(got["expanded"], np.broadcast_to(array[10:], (5, 2)))
    assert got["scalar"] == 11
    assert got["scalar"].shape == ()
    assert got["empty"].shape == (0, 3)
    np.testing.assert_array_equal(got["other"], -array)
    assert all(np.shares_memory(got["whole"], got[name]) for name in ("transposed", "sliced"))
    assert not np.shares_memory(got["whole"], got["other"])


@pytest.mark.parametrize(
    ("size", "stride", "offset"),
    [
        ((7,), (1,), 0),
        ((6,), (1,), 1),
        ((2,), (6,), 0),
        ((2, 3), (4, 1), 0),
        ((1,), (1,), -1),
        ((2,), (-1,), 3),
        ((-1,), (1,), 0),
        ((2**62, 2), (2**62, 1), 0),
        ((2,), (2**64,), 0),
        ((2, 3), (1,), 0),
        ((2.0,), (1,), 0),
    ],
)
def test_views_outside_their_storage_are_refused(
    path: Path, size: Any, stride: Any, offset: int
) -> None:
    store = storage(np.zeros(6, np.float32))
    with pytest.raises(ValueError, match=r"file\.pt .*tensor of size"):
        read(save(path, tensor(store, size, stride, offset)))


@pytest.mark.parametrize("write", [save, save_legacy])
def test_storages_with_bytes_missing_are_refused(path: Path, write: Any) -> None:
    store = Storage("FloatStorage", "0", bytes(20), 6)
    with pytest.raises(ValueError, match="storage 0 has 20 bytes: it must have 24"):
        read(write(path, tensor(store, (6,), (1,))))


def test_unknown_tensors_are_refused(path: Path) -> None:
    with pytest.raises(ValueError, match="type QInt8Storage: it must be one of BoolStorage"):
        read(save(path, tensor(Storage("QInt8Storage", "0", b"", 0), (0,), (1,))))
    store = storage(np.zeros(1, np.complex64))
    with pytest.raises(ValueError, match=r"marked \{'conj': True\}"):
        read(save(path, tensor(store, (1,), (1,), conj=True)))
    with pytest.raises(ValueError, match="it must be in a storage of this file"):
        read(save(path, tensor(Call(named("torch", "f")), (1,), (1,))))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "complex64", "uint8"])
def test_byte_order(path: Path, dtype: str) -> None:
    array = np.arange(5).astype(getattr(ml_dtypes, dtype, dtype))
    value = tensor(storage(array.byteswap()), (5,), (1,))
    order = "big" if sys.byteorder == "little" else "little"
    got = read(save(path, value, byteorder=order.encode()))
    assert got.dtype == array.dtype
    np.testing.assert_array_equal(got, array)
    with pytest.raises(ValueError, match="byte order 'middle': it must be little or big"):
        read(save(path, value, byteorder=b"middle"))


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_plain_values(path: Path, protocol: int) -> None:
    value = {
        "ordered": OrderedDict(a=1, b=OrderedDict(c=(2, [3]))),
        "default": defaultdict(list, d=[4]),
        "atoms": [None, True, 2**70, -1.5, "é", b"\xff\0", b"", 2j, bytearray(b"\xfe")],
        "sets": [{1, 2}, frozenset([(3, 4)])],
        "slice": slice(1, 2),
    }
    value["cycle"] = cycle = [value["ordered"]]
    cycle.append(cycle)
    got = read(save(path, value, protocol))
    assert got["cycle"][1] is got["cycle"]
    assert got["cycle"][0] is got["ordered"]
    assert {name: got[name] for name in value if name != "cycle"} == {
        name: value[name] for name in value if name != "cycle"
    }
    assert type(got["ordered"]) is type(got["ordered"]["b"]) is type(got["default"]) is dict
    assert list(map(type, got["atoms"])) == list(map(type, value["atoms"]))


def test_parameters_and_sizes(path: Path) -> None:
    one = tensor(storage(np.ones(2, np.float32)), (2,), (1,))
    hooks = OrderedDict()
    value = [
        Call(named("torch._utils", "_rebuild_parameter"), one, True, hooks),
        Call(named("torch._utils", "_rebuild_parameter_with_state"), one, True, hooks, {"a": 1}),
        Call(
            named("torch._tensor", "_rebuild_from_type_v2"),
            *(*one.reduced[:1], named("torch", "Tensor"), one.reduced[1], {"a": 1}),
        ),
        Call(named("torch", "Size"), (2, 3)),
        storage(np.ones(2, np.float32)),
    ]
    *tensors, size, store = read(save(path, value))
    assert size == (2, 3)
    for array in (*tensors, store):
        assert type(array) is np.ndarray
        np.testing.assert_array_equal(array, [1, 1])


@pytest.mark.parametrize("protocol", [2, 4])
def test_placeholders(path: Path, protocol: int) -> None:
    one = tensor(storage(np.ones(2, np.float32)), (2,), (1,))
    kind = named("somewhere", "Thing")
    value = {
        "called": Call(kind, "x", one, state={"y": one}, items=[1, 2], pairs=[("k", one)]),
        "reference": kind,
        "method": Call(getattr, kind, "method"),
        "built by it": Call(Call(getattr, kind, "Nested"), 3),
        "state alone": kind.__new__(kind),
    }
    value["state alone"].z = 5
    got = read(save(path, value, protocol))
    called = got["called"]
    assert isinstance(called, Placeholder)
    assert (called.module, called.name) == ("somewhere", "Thing")
    assert called.args[0] == "x"
    assert called.args[1] is called.state["y"] is called.items[2][1]
    np.testing.assert_array_equal(called.args[1], [1, 1])
    assert (called.items[:2], called.items[2][0]) == ([1, 2], "k")
    assert repr(called) == "<Placeholder somewhere.Thing>"
    assert issubclass(got["reference"], Placeholder)
    assert got["reference"].name == "Thing"
    assert got["method"].name == "Thing.method"
    assert (got["built by it"].name, got["built by it"].args) == ("Thing.Nested", (3,))
    assert got["state alone"].state == {"z": 5}


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("write", [save, save_legacy])
def test_nothing_in_the_file_is_run(path: Path, write: Any, protocol: int) -> None:
    marker = path.with_name("marker")
    code = f"open({os.fspath(marker)!r}, 'w').close()"
    command = f"{sys.executable} -c {code!r}"
    hostile = [
        Call(os.system, command),
        Call(eval, code),
        Call(exec, code),
        Call(open, os.fspath(marker), "w"),
        Call(builtins.__import__, "this"),
        Call(Call(getattr, Call(builtins.__import__, "os"), "system"), command),
        Call(np.save, os.fspath(marker), 1),
    ]
    got = read(write(path, hostile, protocol))
    assert [value.name for value in got] == [
        *("system", "eval", "exec", "open", "__import__", "__import__.system", "save"),
    ]
    assert all(isinstance(value, Placeholder) for value in got)
    assert not marker.exists()
    assert "this" not in sys.modules


def test_nothing_is_run_by_any_opcode(path: Path) -> None:
    marker = path.with_name("marker")
    argument = f"S{os.fspath(marker)!r}\n".encode()
    for call in (
        b"(" + argument + b"ios\nmkdir\n.",
        b"(cos\nmkdir\n" + argument + b"o.",
        b"cos\nmkdir\n(" + argument + b"tR.",
        b"cos\nmkdir\n(" + argument + b"t\x81.",
        b"cos\nmkdir\n(" + argument + b"t}\x92.",
        b"\x80\x04\x8c\x02os\x8c\x05mkdir\x93(" + argument + b"tR.",
    ):
        got = read(save(path, call))
        assert (got.module, got.name, got.args) == ("os", "mkdir", (os.fspath(marker),))
    for call in (
        b"cos\nmkdir\n(" + argument + b"tb.",  # sets the state of a class
        b"cbuiltins\ngetattr\n(}S'get'\ntR" + b"(S'a'\ntR.",  # calls a method of a dict
        b"(" + argument + b"tQ.",  # an unknown persistent id
    ):
        with pytest.raises(ValueError, match="no readable PyTorch file"):
            read(save(path, call))
    assert not marker.exists()


@pytest.mark.parametrize("write", [save, save_legacy])
@pytest.mark.parametrize("kept", [0, 4, 0.5, -1])
def test_truncated_files_are_refused(path: Path, write: Any, kept: float) -> None:
    write(path, tensor(storage(np.full(100, 7, np.int8)), (100,), (1,)))
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * kept) if kept == 0.5 else int(kept)])
    with pytest.raises(ValueError, match=r"file\.pt is no readable PyTorch file: "):
        read(path)


def test_flipped_bits_are_noticed(path: Path) -> None:
    save(path, tensor(storage(np.full(100, 7, np.int8)), (100,), (1,)))
    data = bytearray(path.read_bytes())
    data[data.index(b"\x07" * 100) + 9] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="Bad CRC-32"):
        read(path)


def test_foreign_files_are_refused(path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read(path)
    path.write_bytes(b"not a PyTorch file")
    with pytest.raises(ValueError, match="invalid load key"):
        read(path)
    path.write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(ValueError, match="PyTorch's magic number"):
        read(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.npy", b"")
    with pytest.raises(ValueError, match="zip file with 0 records"):
        read(path)
    with pytest.raises(ValueError, match="TorchScript archive"):
        read(save(path, {}, **{"constants.pkl": b""}))
    with pytest.raises(ValueError, match="RecursionError"):
        read(save(path, b"]" * 100_000 + b"a" * 99_999 + b"."))


def test_state_dict_selects_by_prefix_and_reads_no_more(path: Path) -> None:
    one = tensor(storage(np.ones(2, np.float32)), (2,), (1,))
    lost = tensor(Storage("FloatStorage", "1", b"", 2), (2,), (1,))
    names = OrderedDict({"net.w": one, "net.step": 3, "other.w": lost})
    for value in ({"state_dict": names, "epoch": 1}, names):
        save(path, value)
        got = state_dict(path, "net.")
        assert list(got) == ["w"]
        np.testing.assert_array_equal(got["w"], [1, 1])
        with pytest.raises(ValueError, match="storage 1 has 0 bytes"):
            state_dict(path)
        with pytest.raises(ValueError, match=r"file\.pt .*'ema\.'; .*begin with net\., other\."):
            state_dict(path, "ema.")
    with pytest.raises(ValueError, match=r"begins with ''; .*begin with nothing"):
        state_dict(save(path, [one]))


@pytest.mark.parametrize("name", ["tiny_even", "tiny_sudoku"])
def test_lightning_checkpoint(name: str) -> None:
    path = GOLDEN / name / "last.ckpt"
    raw, ema = state_dict(path, "denoiser."), state_dict(path, "ema_denoiser.module.")
    assert raw.keys() == ema.keys()
    assert len(raw) > 10
    assert any(not np.array_equal(raw[key], ema[key]) for key in raw)
    assert all(array.dtype == np.float32 and np.isfinite(array).all() for array in raw.values())
    whole = read(path)
    assert set(whole) > {"state_dict", "optimizer_states", "callbacks", "loops"}
    assert len(whole["optimizer_states"][0]["state"]) > 0
    np.testing.assert_array_equal(
        whole["state_dict"]["ema_denoiser.n_averaged"], state_dict(path)["ema_denoiser.n_averaged"]
    )


def test_plain_state_dict() -> None:
    tensors = state_dict(GOLDEN / "classifiers" / "mnist_classifier.pth")
    assert len(tensors) == 8
    assert sum(array.ndim == 4 for array in tensors.values()) == 2
