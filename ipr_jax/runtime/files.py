"""Files and folders: written whole or not at all, never over others; what they are; if whole."""

import codecs
import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

from ipr_jax import interrupts


def refuse_existing(path: str | os.PathLike[str]) -> Path:
    """The path, if nothing is there and something can be written there.

    Raises:
        FileExistsError: something is there.
        FileNotFoundError: its folder is not.
        PermissionError: its folder cannot be written to.
        ValueError: it is not UTF-8.
    """
    path = utf8(path)
    if os.path.lexists(path):
        raise FileExistsError(f"{path} exists and is not overwritten")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent} is not a folder, create it first")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise PermissionError(f"{path.parent} cannot be written to")
    return path


def utf8(path: str | os.PathLike[str]) -> Path:
    """The path, if it is text in UTF-8: others cannot be written in JSON, nor opened by Orbax.

    Raises:
        ValueError: it is not.
    """
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError:
        raise ValueError(f"{os.fspath(path)!r} is not UTF-8, rename it") from None
    return Path(path)


_PART = re.compile(r"\.[0-9a-f]{32}\.")
"""How the name of what is not yet whole begins; a killed process leaves it behind."""


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A path in the same folder that takes the place of ``path``, a file or a new folder, if all
    goes well.

    Raises:
        OSError: it cannot be written; names it.
    """
    part = path.with_name(f".{uuid4().hex}.{path.name}")
    with interrupts.cleaned(partial(_remove, part)), named(path, part):
        yield part
        handle = os.open(part, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
        os.replace(part, path)


def _remove(path: Path) -> None:
    """Remove a file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


@contextlib.contextmanager
def temporary() -> Iterator[Path]:
    """A new folder among the system's temporary files, removed at the end."""
    folder = Path(tempfile.mkdtemp())
    with interrupts.cleaned(partial(_remove, folder)):
        yield folder


@contextlib.contextmanager
def named(path: Path, part: Path | None = None) -> Iterator[None]:
    """Let an error of the system name a file, where it names none, or the unfinished one."""
    try:
        yield
    except OSError as error:
        if error.filename is not None and Path(error.filename) != part:
            raise
        if error.errno is None:
            raise OSError(f"{path}: {error}") from error
        raise OSError(error.errno, error.strerror, str(path)) from error


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Let whatever a damaged file raises be an error that names it.

    Raises:
        ValueError: the file is damaged.
        OSError: it cannot be read.
    """
    try:
        with named(path):
            yield
    except (OSError, MemoryError):
        raise
    except Exception as error:
        said = f"{type(error).__name__}: {printable(str(error), 200)}"
        raise ValueError(f"{path} is damaged ({said})") from error


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Have a folder to oneself, where the file system can tell.

    Raises:
        ValueError: another process has it.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"another process is at work in {folder}; wait for it, or choose another folder"
            ) from None
        except OSError:  # not all file systems of networks have locks
            pass
        yield
    finally:
        os.close(handle)


def printable(text: str, limit: int = 1000) -> str:
    """Text from a file as one line without control characters, cut at ``limit`` characters."""
    kept = "".join(char if char.isprintable() else " " for char in text[:limit])
    return " ".join(kept.split())


_BEGINNINGS = {
    b"version https://git-lfs": "a Git LFS pointer (the file itself was not downloaded)",
    b"<!doctype html": "an HTML page",
    b"<html": "an HTML page",
    b"<?xml": "an XML document",
    b"%pdf-": "a PDF document",
    b"\x1f\x8b": "a gzip file (unpack it first)",
    b"BZh": "a bzip2 file (unpack it first)",
    b"\xfd7zXZ\0": "an xz file (unpack it first)",
    b"\x28\xb5\x2f\xfd": "a Zstandard file (unpack it first)",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive (unpack it first)",
    b"Rar!\x1a\x07": "a RAR archive (unpack it first)",
    b"\x93NUMPY": "a NumPy array (.npy)",
    b"\x89HDF\r\n": "an HDF5 file",
    b"\x89PNG\r\n": "a PNG image",
    b"\xff\xd8\xff": "a JPEG image",
    b"GGUF": "a GGUF file",
    b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.": "a PyTorch file",  # from before it used zip
}
"""How files begin; text in lower case, as it may be written in any."""


def kind_of(path: str | os.PathLike[str]) -> str | None:
    """What a file is by its first bytes, whatever its name, for the error that refuses it.

    Returns:
        A phrase such as "an HTML page", "a folder" or "a tar archive (unpack it first)"; None where
        it is of no known kind.

    Raises:
        OSError: it cannot be read.
    """
    if os.path.isdir(path):
        return "a folder"
    if os.path.exists(path) and not os.path.isfile(path):
        return "a pipe, socket or device"  # from which reading might wait for ever
    with open(path, "rb") as file:
        head = file.read(4096)
    if not head:
        return "an empty file"
    if head.startswith((b"PK\3\4", b"PK\5\6")):
        return _kind_of_zip(path)
    if head[257:262] == b"ustar":
        return "a tar archive (unpack it first)"
    if head[4:9] == b"\0\0\0\0{":  # after the length of its header
        return "a safetensors file"
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    for beginning, kind in _BEGINNINGS.items():
        if head.startswith(beginning) or start.startswith(beginning):
            return kind
    if head[0] == 0x80 and head[1:2] in (b"\2", b"\3", b"\4", b"\5"):  # its protocol
        return "a Python pickle"
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(head)  # the last character may be cut
    except UnicodeDecodeError:
        return None
    if not all(char.isprintable() or char.isspace() for char in text):
        return None
    if start.startswith(b"{") and b'"weight_map"' in head:
        return "the index of a model in several files (the tensors are in those that it names)"
    return "a JSON file" if start.startswith((b"{", b"[")) else "a text file"


def contents(folder: Path, most: int = 8) -> str:
    """What is in a folder, or that there is none: a sentence for the error that misses a file."""
    if not folder.exists():
        return f"there is no folder {folder}"
    if not folder.is_dir():
        return f"{folder} is {kind_of(folder) or 'a file'} and no folder"
    names = sorted(each.name for each in folder.iterdir())
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{folder} holds {printable(', '.join(names[:most])) or 'nothing'}{more}"


@contextlib.contextmanager
def refusing(path: str | os.PathLike[str], needed: str, kind: str) -> Iterator[None]:
    """Turn whatever is raised while a file is read into one line.

    It says what the file is, if ``kind_of`` knows that and it is something else; or what is wrong.

    Args:
        path: the file.
        needed: what it should be, such as "an image".
        kind: how that ends what ``kind_of`` says of such a file, if anything.

    Raises:
        ValueError: the block raised something.
    """
    try:
        yield
    except Exception as error:  # readers of damaged files raise anything
        wrong = getattr(error, "strerror", None) or str(error) or type(error).__name__
        with contextlib.suppress(OSError):
            found = kind_of(path)
            wrong = wrong if found is None or found.endswith(kind) else f"it is {found}"
        raise ValueError(f"{path} cannot be read as {needed}: {printable(wrong)}") from error


def _kind_of_zip(path: str | os.PathLike[str]) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except Exception:  # a damaged one can raise anything
        return "a zip archive that is cut short or damaged"
    if any(name.endswith("/data.pkl") for name in names):
        return "a PyTorch file"
    if names and all(name.endswith(".npy") for name in names):
        return "a NumPy archive (.npz)"
    return f"a zip archive of {printable(', '.join(names[:3]), 200) or 'nothing'} (unpack it first)"


def write_text(path: Path, text: str) -> None:
    """Write or replace a text file, whole or not at all."""
    with whole(path) as part:
        part.write_text(text)


def agree(path: Path, text: str, source: str) -> None:
    """Write a text file that follows from others, or make sure that it does.

    Raises:
        ValueError: it does not follow from ``source``.
    """
    if not path.exists():
        write_text(path, text)
    elif path.read_text(errors="replace") != text:
        raise ValueError(f"{path} does not agree with the files in {source}; remove it")


def write_record(path: Path, record: Mapping[str, Any]) -> None:
    """Write JSON data and its checksum, whole or not at all."""
    write_text(path, json.dumps({**record, "checksum": _checksum(record)}))


def read_record(path: Path) -> dict[str, Any]:
    """What ``write_record`` wrote.

    Raises:
        ValueError: it is damaged.
    """
    record: dict[str, Any] = {}
    try:
        record = json.loads(path.read_text())
        whole = record.pop("checksum") == _checksum(record)
    except (ValueError, KeyError, TypeError, AttributeError):
        whole = False
    if not whole:
        raise ValueError(f"{path} is damaged")
    return record


def _checksum(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record).encode()).hexdigest()


def digest(path: Path) -> str:
    """The sha256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


SUMS = "SHA256SUMS"
"""The file with the digests of all others of a folder, for ``sha256sum -c`` as well."""


_SUM = re.compile("[0-9a-f]{64}  .+")


def seal(folder: Path) -> None:
    """Write ``SUMS`` into a folder."""
    lines = [f"{digest(folder / name)}  {name}\n" for name in sorted(_inside(folder))]
    write_text(folder / SUMS, "".join(lines))


def check_seal(folder: Path) -> None:
    """Make sure that a folder is as it was sealed.

    Raises:
        ValueError: a file is missing, too many or another; names the folder and the first of them.
    """
    text = (folder / SUMS).read_bytes().decode(errors="replace")
    lines = text.removesuffix("\n").split("\n")
    for number, line in enumerate(lines, 1):
        if not _SUM.fullmatch(line):
            raise ValueError(f"{folder} is damaged: line {number} of its {SUMS} is not one of them")
    sealed, found = {line[66:]: line[:64] for line in lines}, _inside(folder)
    for name in sorted(sealed.keys() | found):
        if name not in found:
            raise ValueError(f"{folder} is damaged: {name} is missing")
        if name not in sealed:
            raise ValueError(f"{folder} is damaged: {name} is not among its {SUMS}")
    for name, sha256 in sealed.items():
        if digest(folder / name) != sha256:
            raise ValueError(f"{folder} is damaged: {name} is not what its {SUMS} tell")


def _inside(folder: Path) -> set[str]:
    """All files of a folder but ``SUMS``, by their path in it."""
    paths = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {path.as_posix() for path in paths} - {SUMS}


def _differences(there: Any, here: Any, most: int = 3) -> str:
    """The first settings that differ, with their values, of two configurations in JSON."""

    def flat(tree: Any, name: str = "") -> dict[str, str]:
        if not isinstance(tree, dict):
            return {name: json.dumps(tree)}
        parts = [flat(value, f"{name}.{key}".strip(".")) for key, value in tree.items()]
        return {name: value for part in parts for name, value in part.items()}

    old, new = flat(there), flat(here)
    differ = [
        f"{name} is {printable(old.get(name, 'missing'), 60)} there and "
        f"{printable(new.get(name, 'missing'), 60)} here"
        for name in [*new, *(old.keys() - new.keys())]
        if old.get(name) != new.get(name)
    ]
    more = [f"{len(differ) - most} more"] if len(differ) > most else []
    return ", ".join(differ[:most] + more)


def claim(folder: Path, configuration: Mapping[str, Any]) -> None:
    """Make the folder of a run that can go on, or make sure that it holds the same one.

    Args:
        folder: a new or empty one, or that of a run, with its ``config.json``.
        configuration: JSON data that tells all that decides the run's results.

    Raises:
        ValueError: the folder holds a run of another configuration, or something else.
        OSError: it cannot be written to.
    """
    path, text = folder / "config.json", json.dumps(configuration, indent=1)
    found = list(folder.iterdir()) if folder.exists() else []
    if not path.exists():  # looked at last: another process may be making the same folder
        if not all(_PART.match(each.name) for each in found):
            raise ValueError(f"{folder} exists and holds no run; choose another folder")
        folder.mkdir(parents=True, exist_ok=True)
        _create(path, text)
    with reading(path):
        there = json.loads(path.read_text())
    if there != (here := json.loads(text)):
        raise ValueError(
            f"{folder} holds a run of another configuration ({_differences(there, here)}); choose "
            f"another folder or the settings in {path}"
        )


def _create(path: Path, text: str) -> None:
    """Write a text file whole, unless another process was faster."""
    first = path.with_name(f".{uuid4().hex}.{path.name}")
    try:
        with named(path, first):
            write_text(first, text)
        os.link(first, path)
    except FileExistsError:
        pass
    except OSError:
        if not first.exists():  # it cannot be written
            raise
        os.replace(first, path)  # not all file systems have links
    finally:
        first.unlink(missing_ok=True)
