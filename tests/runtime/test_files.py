"""Files: what one is said to be, which one an error names, and that damaged ones are refused."""

import errno
import gzip
import io
import json
import lzma
import os
import pickle
import re
import tarfile
import zipfile

import numpy as np
import pytest
import torch_writer
from safetensors.numpy import save

from ipr_jax.runtime import files
from ipr_jax.runtime.files import kind_of
from ipr_jax.studies import shards
from ipr_jax.training import trainer

UNPACK = "(unpack it first)"


def written(write, *arguments):
    """What a function writes into a file."""
    file = io.BytesIO()
    write(file, *arguments)
    return file.getvalue()


def tar(file):
    with tarfile.open(fileobj=file, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("last.ckpt"))


def zipped(*names):
    def write(file):
        with zipfile.ZipFile(file, "w") as archive:
            for name in names:
                archive.writestr(name, b"1")

    return written(write)


LEGACY = 0x1950A86A20F9469CFC6C
KINDS = {
    b"": "an empty file",
    b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a": (
        "a Git LFS pointer (the file itself was not downloaded)"
    ),
    b"\n<!DOCTYPE html>\n<html>": "an HTML page",
    b"\xef\xbb\xbf<HTML lang=en>": "an HTML page",
    b'<?xml version="1.0"?><Error><Code>AccessDenied</Code>': "an XML document",
    b'{"metadata": {"total_size": 9}, "weight_map": {"a": "model-00001-of-00002.safetensors"}}': (
        "the index of a model in several files (the tensors are in those that it names)"
    ),
    b'{"error": "Repository not found"}': "a JSON file",
    b"[1, 2]": "a JSON file",
    b"Dear reader,": "a text file",
    ("ü" * 4096).encode()[1:]: None,
    b"a" + ("ü" * 4096).encode(): "a text file",
    written(tar): f"a tar archive {UNPACK}",
    gzip.compress(b"1"): f"a gzip file {UNPACK}",
    lzma.compress(b"1"): f"an xz file {UNPACK}",
    b"7z\xbc\xaf\x27\x1c\0\4": f"a 7z archive {UNPACK}",
    zipped("last.ckpt"): f"a zip archive of last.ckpt {UNPACK}",
    zipped("a/", "a/b\n", "a/c", "a/d"): f"a zip archive of a/, a/b , a/c {UNPACK}",
    zipped(): f"a zip archive of nothing {UNPACK}",
    zipped("last.ckpt")[:-1]: "a zip archive that is cut short or damaged",
    zipped("archive/data.pkl", "archive/version"): "a PyTorch file",
    pickle.dumps(LEGACY, 2) + pickle.dumps(1001, 2): "a PyTorch file",
    pickle.dumps({"a": 1}): "a Python pickle",
    b"\x80": None,
    written(np.save, np.zeros(2)): "a NumPy array (.npy)",
    written(lambda file: np.savez(file, a=np.zeros(2))): "a NumPy archive (.npz)",
    save({"a": np.zeros(2)}): "a safetensors file",
    b"\x89PNG\r\n\x1a\n": "a PNG image",
    bytes(range(128, 256)): None,
    bytes(4096): None,
}


@pytest.mark.parametrize("number", range(len(KINDS)))
def test_a_file_is_told_from_its_first_bytes(tmp_path, number):
    data, kind = list(KINDS.items())[number]
    path = tmp_path / "last.ckpt"
    path.write_bytes(data)
    assert kind_of(path) == kind


def test_what_is_no_file(tmp_path):
    assert kind_of(tmp_path) == "a folder"
    os.mkfifo(tmp_path / "pipe")
    assert kind_of(tmp_path / "pipe") == "a pipe, socket or device"
    with pytest.raises(FileNotFoundError):
        kind_of(tmp_path / "none")


def test_what_torch_wrote_is_named_so(tmp_path):
    for write in (torch_writer.save, torch_writer.save_legacy):
        assert kind_of(write(tmp_path / "file.pt", {})) == "a PyTorch file"


# --- damage ---------------------------------------------------------------------------------------


def exactly(text):
    return f"^{re.escape(text)}$"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "No space left"), "[Errno 28] No space left: '{}'"),
        (OSError("encoder error -2"), "{}: encoder error -2"),  # Pillow's
    ],
)
def test_a_full_disk_names_the_file(tmp_path, error, said):
    path = tmp_path / "samples.npz"
    with pytest.raises(OSError, match=exactly(said.format(path))), files.whole(path):
        raise error
    assert not list(tmp_path.iterdir())


def test_a_missing_folder_names_the_file_that_was_to_be_there(tmp_path):
    (tmp_path / "file").write_text("")
    for folder, error in (("none", FileNotFoundError), ("file", NotADirectoryError)):
        path = tmp_path / folder / "results.json"
        with pytest.raises(error) as raised:
            files.write_text(path, "{}")
        assert raised.value.filename == str(path)


def test_an_error_of_another_file_is_left(tmp_path):
    with pytest.raises(FileNotFoundError) as raised, files.whole(tmp_path / "file"):
        (tmp_path / "another").read_text()
    assert raised.value.filename == str(tmp_path / "another")


def test_a_folder_that_cannot_be_written_to_is_refused_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(PermissionError, match=exactly(f"{tmp_path} cannot be written to")):
        files.refuse_existing(tmp_path / "out")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (zipfile.BadZipFile("File is not\na zip file"), "BadZipFile: File is not a zip file"),
        (KeyError("shards"), "KeyError: 'shards'"),
        (EOFError(), "EOFError: "),
    ],
)
def test_whatever_a_damaged_file_raises_names_it(tmp_path, error, said):
    path = tmp_path / "x"
    with (
        pytest.raises(ValueError, match=exactly(f"{path} is damaged ({said})")),
        files.reading(path),
    ):
        raise error


def test_damaged_files_of_runs_are_refused_by_name(tmp_path):
    for name, content, read in (
        ("config.json", b'{"seed": 1', lambda: files.claim(tmp_path, {"seed": 1})),
        ("config.json", b"\xff\xfe", lambda: files.claim(tmp_path, {"seed": 1})),
        ("manifest.json", b"", lambda: next(shards.read(tmp_path))),
        ("manifest.json", b"[]", lambda: next(shards.read(tmp_path))),
        ("log.jsonl", b"step 1\n", lambda: trainer._trim_log(tmp_path / "log.jsonl", 1)),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=rf"^{tmp_path / name} is damaged \(\w+Error: "):
            read()


def test_an_array_file_that_is_none_is_refused_by_name(tmp_path):
    """Though it is the one that the manifest describes."""
    (tmp_path / "part.npz").write_bytes(b"PK\x03\x04 and no more")
    digest = files.digest(tmp_path / "part.npz")
    listed = {"shards": [{"file": "part.npz", "sha256": digest}]}
    (tmp_path / "manifest.json").write_text(json.dumps(listed))
    with pytest.raises(ValueError, match=r"part\.npz is damaged \(BadZipFile: "):
        next(shards.read(tmp_path))
    np.savez(tmp_path / "part.npz", allow_pickle=False, valid=np.ones(2))
    listed["shards"][0]["sha256"] = files.digest(tmp_path / "part.npz")
    (tmp_path / "manifest.json").write_text(json.dumps(listed))
    assert list(next(shards.read(tmp_path))) == ["valid"]
