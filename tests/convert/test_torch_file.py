"""Files of ``torch.save``: read as they are, refused in one line, and never run."""

import builtins
import gzip
import json
import os
import pickle
import pickletools
import random
import subprocess
import sys
import time
import zipfile
import zlib
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning
import ml_dtypes
import numpy as np
import pytest
from conftest import GOLDEN, tensors_of
from torch_writer import (
    KINDS,
    Call,
    Storage,
    named,
    save,
    save_legacy,
    storage,
    tensor,
    without_checksums,
)

from convert.torch_file import Placeholder, outline, read, state_dict

FUNCTIONS = read, tensors_of, outline


def refusal(function: Callable[[Path], Any], path: Path) -> str:
    """Return why a file is refused, "" if it is not; the message is one short line about it."""
    try:
        function(path)
    except Exception as error:
        kind, message = type(error), str(error)
    else:
        return ""
    assert kind is ValueError, message
    assert message.startswith(f"{path} ")
    assert message.isprintable()
    assert len(message) < len(str(path)) + 1100
    return message.removeprefix(f"{path} ")


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


def test_sizes_are_compared_before_bytes_are_read(path: Path) -> None:
    save(path, tensor(Storage("FloatStorage", "0", b"\7" * 20, 6), (6,), (1,)))
    path.write_bytes(path.read_bytes().replace(b"\7" * 20, bytes(20)))  # its checksum is wrong
    assert "storage 0 has 20 bytes: it must have 24" in refusal(read, path)


def test_storages_that_are_not_there_are_refused(path: Path) -> None:
    save(path, tensor(Storage("FloatStorage", "0", bytes(24), 6), (6,), (1,)))
    data = path.read_bytes()
    path.write_bytes(data.replace(b"archive/data/0", b"archive/data/1"))
    assert "storage 0 has 0 bytes: it must have 24" in refusal(read, path)


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
        "state alone": object.__new__(kind),
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
def test_files_cut_anywhere_are_refused(path: Path, write: Any) -> None:
    write(path, {"state_dict": {"a": tensor(storage(np.full(10, 7, np.int8)), (10,), (1,))}})
    data = path.read_bytes()
    assert outline(path).states == {(): ("state_dict",), ("state_dict",): ("a",)}
    for kept in range(len(data)):
        path.write_bytes(data[:kept])
        for function in FUNCTIONS:
            reason = refusal(function, path)
            assert reason.startswith("is no readable PyTorch file: it is ") or "storage 0" in reason


def test_flipped_bits_are_noticed(path: Path) -> None:
    save(path, tensor(storage(np.full(100, 7, np.int8)), (100,), (1,)))
    data = bytearray(path.read_bytes())
    data[data.index(b"\x07" * 100) + 9] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="Bad CRC-32"):
        read(path)


def test_files_without_checksums_are_read(path: Path, rng: np.random.Generator) -> None:
    array = rng.standard_normal(100, np.float32)
    save(path, {"state_dict": {"a": tensor(storage(array), (100,), (1,))}})
    assert outline(path).checksums
    assert not outline(without_checksums(path)).checksums
    np.testing.assert_array_equal(tensors_of(path)["a"], array)
    with zipfile.ZipFile(path) as archive:
        assert {entry.CRC for entry in archive.infolist()} == {0}


def test_a_single_missing_checksum_is_damage(path: Path) -> None:
    save(path, {"state_dict": {"a": tensor(storage(np.ones(9)), (9,), (1,))}})
    with zipfile.ZipFile(path, "a") as archive:
        archive.getinfo("archive/data/0").CRC = 0
        archive.comment = b"so that the directory is written anew"
    assert outline(path).checksums
    assert "Bad CRC-32" in refusal(tensors_of, path)


def test_files_from_before_zip_have_no_checksums(path: Path) -> None:
    assert not outline(save_legacy(path, {})).checksums


@pytest.mark.parametrize("function", FUNCTIONS)
def test_foreign_files_are_refused(path: Path, function: Any) -> None:
    with pytest.raises(FileNotFoundError):
        function(path)
    with pytest.raises(OSError, match="Is a directory"):
        function(path.parent)
    generator = random.Random(0)
    neither = "it is neither a zip file nor in PyTorch's format from before zip"
    for data, reason in (
        (b"", "it is empty"),
        (b"P", "it is a text file"),
        (b"version https://git-lfs.github.com/spec/v1\n", "it is a Git LFS pointer (the file it"),
        (b"<!DOCTYPE html>\n", "it is an HTML page"),
        (gzip.compress(b"1"), "it is a gzip file (unpack it first)"),
        (generator.randbytes(10_000), neither),
        (pickle.dumps({"a": 1}), "it is a Python pickle"),
        (pickle.dumps(0x1950A86A20F9469CFC6B), "it is a Python pickle"),
        (pickle.dumps(0x1950A86A20F9469CFC6C) + pickle.dumps(7), "protocol 7: it must be 1001"),
        (b"PK\3\4" + generator.randbytes(10_000), "it is damaged or truncated (BadZipFile: "),
    ):
        path.write_bytes(data)
        assert refusal(function, path).startswith(f"is no readable PyTorch file: {reason}")


def test_other_zip_files_are_refused(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.npy", b"")
    assert "it is a NumPy archive (.npz)" in refusal(read, path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("last.ckpt", bytes(1000))
    assert "it is a zip archive of last.ckpt (unpack it first)" in refusal(read, path)
    with zipfile.ZipFile(save(path, {}, **{"constants.pkl": b""}), "a") as archive:
        archive.writestr("archive/code/a.py", bytes(1000), zipfile.ZIP_DEFLATED)
    assert "TorchScript archive" in refusal(read, path)
    with zipfile.ZipFile(save(path, 1), "a") as archive:
        archive.filelist.append(archive.filelist[0])
        archive.comment = b"so that the directory is written anew"
    assert "two entries archive/data.pkl: names must differ" in refusal(read, path)


def test_messages_are_one_short_line(path: Path) -> None:
    odd = "a\n\u2028b\r\x1b" * 1000
    value = tensor(Storage(odd, "0", b"", 0), (0,), (1,))
    assert "elements of type a b a b" in refusal(read, save(path, value, 4))
    recursive = save(path, b"]" * 100_000 + b"a" * 99_999 + b".")
    assert "RecursionError" in refusal(read, recursive)


READ = """
import json, resource, sys, tracemalloc
from convert import torch_file
resource.setrlimit(resource.RLIMIT_AS, (2**32, 2**32))  # in case memory is not bounded
tracemalloc.start()
answers = []
for path in sys.argv[1:]:
    tracemalloc.reset_peak()
    try:
        answer = repr(torch_file.read(path))
    except ValueError as error:
        answer = str(error)
    answers.append((answer, tracemalloc.get_traced_memory()[1]))
print(json.dumps(answers))
"""


def check_bounded(answers: dict[Path, str]) -> None:
    """Check what files are read as, or why not, in a process that they may bring down."""
    command = [sys.executable, "-c", READ, *map(os.fspath, answers)]
    settings = {"cwd": GOLDEN.parents[1], "env": os.environ | {"OPENBLAS_NUM_THREADS": "1"}}
    output = subprocess.run(
        command, **settings, check=True, timeout=60, stdout=subprocess.PIPE
    ).stdout
    for (path, wanted), (answer, peak) in zip(answers.items(), json.loads(output), strict=True):
        assert wanted in answer, path
        assert peak < 2**24, path


def test_pickles_that_claim_much_take_little(tmp_path: Path) -> None:
    damaged, tuples = "it is damaged or truncated", "tuples in a tuple, "
    doubled = b"q\0000(h\0h\0l"  # from a list, one that has it twice
    answers = {}
    for number, (contents, answer) in enumerate(
        [
            (b"]r\xff\xff\xff\x7f.", "[]"),  # an index of the memo
            (b"]p2147483647\n.", "[]"),
            (b"T" + (2**31 - 1).to_bytes(4, "little") + b"few.", damaged),  # lengths
            (b"B" + (2**32 - 1).to_bytes(4, "little") + b"few.", damaged),
            (b"X" + (2**32 - 1).to_bytes(4, "little") + b"few.", damaged),
            (b"\x8b" + (2**31 - 1).to_bytes(4, "little") + b"few.", damaged),
            (b"\x8d" + (2**40).to_bytes(8, "little") + b"few.", damaged),
            (b"\x8e" + (2**40).to_bytes(8, "little") + b"few.", damaged),
            (b"\x95" + (2**40).to_bytes(8, "little") + b"few.", damaged),
            (b"\x96" + (2**40).to_bytes(8, "little") + b"few.", damaged),
            (b"cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R.", damaged),
            (b"})" + b"\x85" * 10**5 + b"Ns.", tuples),  # a key too deep for the stack of C
            (b"})" + b"2\x86" * 99 + b"Ns.", tuples),  # one with 2^99 paths
            (b"]" + doubled * 60 + b"Q.", "persistent id [[[[[["),
        ]
    ):
        answers[save(tmp_path / f"{number}.zip", contents)] = answer
        answers[save_legacy(tmp_path / f"{number}.legacy", contents)] = answer
    check_bounded(answers)


def test_storages_that_claim_much_take_little(tmp_path: Path) -> None:
    answers = {}
    size = 2**26
    value = tensor(Storage("ByteStorage", "0", b"\7" * 1000, size), (size,), (1,))

    path = save(tmp_path / "deflated", value)
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/1", bytes(size))
    answers[path] = "compressed entry archive/data/1: it must be stored"

    for name, sizes, answer in (
        ("claimed", (2**33, 2**33), "bytes in a file of"),
        ("unequal", (size, 1000), "compressed entry archive/data/0: it must be stored"),
    ):
        path = save(tmp_path / name, value)
        with zipfile.ZipFile(path, "a") as archive:
            entry = archive.getinfo("archive/data/0")
            entry.file_size, entry.compress_size = sizes
            archive.comment = b"so that the directory is written anew"
        answers[path] = answer

    path = save_legacy(tmp_path / "legacy", value)
    answers[path] = f"storage 0 has 1000 bytes: it must have {size}"
    check_bounded(answers)


def test_overlapping_entries_are_refused(path: Path) -> None:
    data = bytes(1000)
    inner = zipfile.ZipInfo("archive/data/1")
    inner.file_size, inner.compress_size, inner.CRC = len(data), len(data), zlib.crc32(data)
    outer = inner.FileHeader() + data
    save(path, {"a": tensor(Storage("ByteStorage", "0", outer, len(outer)), (9,), (1,))})
    with zipfile.ZipFile(path, "a") as archive:
        inner.header_offset = archive.start_dir - len(outer)
        archive.filelist.append(inner)
        archive.comment = b"so that the directory is written anew"
    assert "overlap" in refusal(read, path).lower()


def test_many_tensors_are_read_fast(path: Path) -> None:
    value = {f"{i}": tensor(storage(np.zeros(1), f"{i}"), (1,), (1,)) for i in range(7000)}
    save(path, value)
    start = time.process_time()
    assert len(outline(path).states[()]) == 7000
    assert time.process_time() - start < 2


def test_state_dict_reads_what_is_named_and_no_more(path: Path) -> None:
    one = tensor(storage(np.ones(2, np.float32)), (2,), (1,))
    lost = tensor(Storage("FloatStorage", "1", b"", 2), (2,), (1,))
    names = OrderedDict({"net.w": one, "net.step": 3, "other.w": lost})
    for value, state in (
        (names, ()),
        ({"state_dict": names, "epoch": 1}, ("state_dict",)),
        ({"epoch": 1, "a": {"b": defaultdict(list, names)}}, ("a", "b")),
    ):
        save(path, value)
        got = state_dict(path, state, ["net.w", "net.step"])
        assert got.keys() == {"net.w", "net.step"}
        assert got["net.step"] == 3
        np.testing.assert_array_equal(got["net.w"], [1, 1])
        with pytest.raises(ValueError, match="storage 1 has 0 bytes"):
            state_dict(path, state, ["other.w"])


@pytest.mark.parametrize("write", [save, save_legacy])
def test_outline_is_of_names_and_reads_no_storage(path: Path, write: Any) -> None:
    one = tensor(storage(np.ones(2, np.float32)), (3,), (1,))  # cannot be read
    names = OrderedDict({"net.w": one, "net.step": 3, "other.w": one})
    tensors = "net.w", "net.step", "other.w"
    value = {"epoch": 1, "state_dict": names, "loops": {}, "optimizer": {0: one}, "n": Counter(a=1)}
    assert outline(write(path, value)).states == {
        (): ("epoch", "state_dict", "loops", "optimizer", "n"),
        ("state_dict",): tensors,
        ("loops",): (),
    }
    assert outline(write(path, names)).states == {(): tensors}
    assert outline(write(path, {"model": names, "again": names})).states == {
        (): ("model", "again"),
        ("model",): tensors,
    }
    assert outline(write(path, {})).states == {(): ()}
    for value in ([one], one, None, {4: one}, Call(named("somewhere", "Thing"))):
        for function in (outline, tensors_of):
            reason = refusal(function, write(path, value))
            assert "PyTorch file: it holds " in reason
            assert ": it must hold tensors by name" in reason


def test_dicts_in_dicts_are_listed_once_and_fast(path: Path) -> None:
    inner = {f"{i}": i for i in range(10_000)}
    deep: Any = {}
    for _ in range(50):
        deep = {"a": deep, "b": deep}
    save(path, {"wide": {f"{i}": inner for i in range(10_000)}, "deep": deep})
    start = time.process_time()
    states = outline(path).states
    assert time.process_time() - start < 2
    assert states.keys() == {
        *((), ("wide",), ("wide", "0")),
        *(("deep", *"a" * depth) for depth in range(8)),
    }


@pytest.mark.parametrize("name", ["tiny_even", "tiny_sudoku"])
def test_lightning_checkpoint(name: str) -> None:
    path = GOLDEN / name / "last.ckpt"
    raw, ema = tensors_of(path, "denoiser."), tensors_of(path, "ema_denoiser.module.")
    assert raw.keys() == ema.keys()
    assert len(raw) > 10
    assert any(not np.array_equal(raw[key], ema[key]) for key in raw)
    assert all(array.dtype == np.float32 and np.isfinite(array).all() for array in raw.values())
    whole = read(path)
    assert set(whole) > {"state_dict", "optimizer_states", "callbacks", "loops"}
    assert len(whole["optimizer_states"][0]["state"]) > 0
    np.testing.assert_array_equal(
        whole["state_dict"]["ema_denoiser.n_averaged"], tensors_of(path)["ema_denoiser.n_averaged"]
    )


def test_plain_state_dict() -> None:
    tensors = tensors_of(GOLDEN / "classifiers" / "mnist_classifier.pth")
    assert len(tensors) == 8
    assert sum(array.ndim == 4 for array in tensors.values()) == 2


def described(tensors: dict[str, np.ndarray]) -> list[tuple[Any, ...]]:
    return [(name, a.dtype, a.shape, a.tobytes()) for name, a in tensors.items()]


def mutant(data: bytes, generator: random.Random) -> bytes:
    """Return the bytes with some flipped, cut away, inserted or repeated."""
    draw = generator.randrange
    start, length = draw(len(data)), draw(1, 100)
    match draw(6):
        case 0 | 1:
            changed = bytearray(data)
            for _ in range(draw(1, 4)):
                changed[draw(len(data))] ^= 1 << draw(8)
            return bytes(changed)
        case 2:
            return data[:start]
        case 3:
            return data[:start] + data[start + length :]
        case 4:
            return data[:start] + generator.randbytes(length) + data[start:]
    place = draw(len(data))
    return data[:place] + data[start : start + length] + data[place:]


@pytest.fixture(scope="module")
def events() -> Iterator[list[str]]:
    """What this process does to other things, while the list has an element."""
    done: list[str] = []
    acts = ("os.", "subprocess.", "shutil.", "exec", "compile", "import", "socket.", "ctypes.")

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if not done:
            return
        writes = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if writes or (event.startswith(acts) and not str(arguments[0]).startswith("encodings")):
            done.append(f"{event} {arguments}")

    sys.addaudithook(hook)  # for good
    yield done
    done.clear()


def read_damaged(path: Path, events: list[str]) -> dict[str, np.ndarray]:
    """Return the tensors in a file, none if it is refused, and check that no more is done."""
    got: dict[str, np.ndarray] = {}
    events.append("reading")
    reason = refusal(lambda path: got.update(tensors_of(path)), path)
    done = events[1:]
    events.clear()
    assert done == []
    assert not (reason and got)
    return got


def test_damaged_zip_files_are_refused_or_read_as_they_were(path: Path, events: list[str]) -> None:
    generator = random.Random(0)
    weights = {
        "a.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b.weight": np.ones(1, np.float32),
    }
    lightning.write(path, weights, ema={name: -array for name, array in weights.items()})
    data, original = path.read_bytes(), described(tensors_of(path))
    assert len(original) == 5
    got = []
    for _ in range(2000):
        path.write_bytes(mutant(data, generator))
        got.append(described(read_damaged(path, events)))
    assert all(tensors in ([], original) for tensors in got)
    assert 0 < got.count(original) < 500


def test_every_flipped_byte_of_a_weight_is_noticed(path: Path, events: list[str]) -> None:
    weights = np.arange(100, dtype=np.float32)
    data = lightning.write(path, {"a": weights}).read_bytes()
    start = data.index(weights.tobytes())
    for place in range(start, start + weights.nbytes):
        path.write_bytes(data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :])
        assert read_damaged(path, events) == {}


def test_damaged_legacy_files_are_refused_or_run_nothing(path: Path, events: list[str]) -> None:
    """They have no checksum, so that damaged ones can be read as anything."""
    generator = random.Random(0)
    weights = {name: tensor(storage(np.arange(6.0), name), (2, 3), (3, 1)) for name in "ab"}
    hostile = [Call(os.system, "true"), Call(eval, "1"), Call(os.mkdir, f"{path}.made")]
    data = save_legacy(path, {"state_dict": weights, "hostile": hostile}).read_bytes()
    got = []
    for _ in range(2000):
        path.write_bytes(mutant(data, generator))
        got.append(read_damaged(path, events))
    assert 0 < got.count({}) < len(got)


def kinds(value: Any) -> Any:
    """Return the types in a value."""
    if isinstance(value, dict):
        return {key: kinds(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        return value.dtype
    return [*map(kinds, value)] if isinstance(value, list) else type(value)


def named_in(path: Path) -> tuple[set[str], set[str]]:
    """Return the classes and functions in the pickle of a zip file, and the other entries."""
    with zipfile.ZipFile(path) as archive:
        codes = pickletools.genops(archive.read("archive/data.pkl"))
        others = {name for name in archive.namelist() if "/data/" not in name}
        return {str(arg) for code, arg, _ in codes if code.name == "GLOBAL"}, others


def test_lightning_writer(path: Path, rng: np.random.Generator) -> None:
    example = GOLDEN / "tiny_even" / "last.ckpt"
    raw = {name: rng.standard_normal((3, 4), np.float32) for name in ("a.w", "b.w")}
    raw |= {"b.scale": np.array(5, np.float32), "b.t": raw["a.w"].T, "c.w": raw["a.w"]}
    ema = {name: rng.standard_normal(array.shape, np.float32) for name, array in raw.items()}
    lightning.write(path, raw, ema=ema)
    for prefix, arrays in (("denoiser.", raw), ("ema_denoiser.module.", ema)):
        assert described(tensors_of(path, prefix)) == described(arrays)
    names = [f"denoiser.{name}" for name in raw]
    names += ["ema_denoiser.n_averaged", *(f"ema_denoiser.module.{name}" for name in ema)]
    assert outline(path).states[("state_dict",)] == tuple(names)
    assert outline(path).states[()] == outline(example).states[()]
    assert named_in(path) == named_in(example)

    got, wanted = read(path), read(example)
    assert np.shares_memory(got["state_dict"]["denoiser.a.w"], got["state_dict"]["denoiser.c.w"])
    adam, real = got["optimizer_states"][0], wanted["optimizer_states"][0]
    assert adam["param_groups"][0].pop("params") == list(adam["state"]) == [0, 1, 2, 3]
    assert real["param_groups"][0].pop("params") == list(real["state"])
    for index, shape in enumerate([(3, 4), (3, 4), (), (4, 3)]):
        state = adam["state"][index]
        assert kinds(state) == kinds(real["state"][0])
        assert [array.shape for array in state.values()] == [(), shape, shape]
    averaged = "ema_denoiser.n_averaged"
    assert kinds(got["state_dict"][averaged]) == kinds(wanted["state_dict"][averaged])
    for contents in (got, wanted):
        del contents["state_dict"]
        contents["optimizer_states"][0].pop("state")
    assert kinds(got) == kinds(wanted)


def test_lightning_writer_of_weights_only(path: Path) -> None:
    lightning.write(path, {"a": np.ones(2, np.float32)}, optimizer=False)
    assert set(outline(path).states[()]) == {
        *("epoch", "global_step", "pytorch-lightning_version", "loops", "state_dict")
    }
    assert outline(path).states[("state_dict",)] == ("denoiser.a",)
