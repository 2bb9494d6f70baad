"""What a file is said to be that is not what was asked for."""

import gzip
import io
import lzma
import os
import pickle
import tarfile
import zipfile

import numpy as np
import pytest
import torch_writer
from safetensors.numpy import save

from ipr_jax.files import kind_of

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
