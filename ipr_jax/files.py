"""Writing files whole or not at all, and never over existing ones."""

import contextlib
import fcntl
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4


def refuse_existing(path: str | os.PathLike[str]) -> Path:
    """The path, if nothing is there and its folder is.

    Raises:
        FileExistsError: something is there.
        FileNotFoundError: its folder is not.
    """
    path = Path(path)
    if os.path.lexists(path):
        raise FileExistsError(f"{path} exists and is not overwritten")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent} is not a folder, create it first")
    return path


_PART = re.compile(r"\.[0-9a-f]{32}\.")
"""How the name of a file begins that is not yet whole; a killed process leaves it behind."""


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A path in the same folder that takes the place of ``path`` if all goes well."""
    part = path.with_name(f".{uuid4().hex}.{path.name}")
    try:
        yield part
        with part.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


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
            raise ValueError(f"another process is at work in {folder}") from None
        except OSError:  # not all file systems of networks have locks
            pass
        yield
    finally:
        os.close(handle)


def printable(text: str, limit: int = 1000) -> str:
    """Text from a file as one line without control characters, cut at ``limit`` characters."""
    kept = "".join(char if char.isprintable() else " " for char in text[:limit])
    return " ".join(kept.split())


def write_text(path: Path, text: str) -> None:
    """Write or replace a text file, whole or not at all."""
    with whole(path) as part:
        part.write_text(text)


def _differences(there: str, text: str, most: int = 3) -> str:
    """The first settings that differ, with their values, of two configurations in JSON."""

    def flat(tree: Any, name: str = "") -> dict[str, str]:
        if not isinstance(tree, dict):
            return {name: json.dumps(tree)}
        parts = [flat(value, f"{name}.{key}".strip(".")) for key, value in tree.items()]
        return {name: value for part in parts for name, value in part.items()}

    try:
        old, new = flat(json.loads(there)), flat(json.loads(text))
    except ValueError:
        return ""
    named = [
        f"{name} is {printable(old.get(name, 'missing'), 60)} there and "
        f"{printable(new.get(name, 'missing'), 60)} here"
        for name in [*new, *(old.keys() - new.keys())]
        if old.get(name) != new.get(name)
    ]
    more = [f"{len(named) - most} more"] if len(named) > most else []
    return f" ({', '.join(named[:most] + more)})" if named else ""


def claim(folder: Path, configuration: Mapping[str, Any]) -> None:
    """Make the folder of a run that can go on, or make sure that it holds the same one.

    Args:
        folder: a new or empty one, or that of a run, with its ``config.json``.
        configuration: JSON data that tells all that decides the run's results.

    Raises:
        ValueError: the folder holds a run of another configuration, or something else.
    """
    path, text = folder / "config.json", json.dumps(configuration, indent=1)
    found = list(folder.iterdir()) if folder.exists() else []
    if not path.exists():  # looked at last: another process may be making the same folder
        if not all(_PART.match(each.name) for each in found):
            raise ValueError(f"{folder} exists and holds no run; choose another folder")
        folder.mkdir(parents=True, exist_ok=True)
        _create(path, text)
    there = path.read_text()
    if there != text:
        raise ValueError(
            f"{folder} holds a run of another configuration{_differences(there, text)}; choose "
            f"another folder or the settings in {path}"
        )


def _create(path: Path, text: str) -> None:
    """Write a text file whole, unless another process was faster."""
    first = path.with_name(f".{uuid4().hex}.{path.name}")
    try:
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
