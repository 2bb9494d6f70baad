"""Writing files whole or not at all, and never over existing ones."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
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


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A path in the same folder that takes the place of ``path`` if all goes well."""
    part = path.with_name(f".{uuid4().hex}.{path.name}")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def printable(text: str, limit: int = 1000) -> str:
    """Text from a file as one line without control characters, cut at ``limit`` characters."""
    kept = "".join(char if char.isprintable() else " " for char in text[:limit])
    return " ".join(kept.split())


def write_text(path: Path, text: str) -> None:
    """Write or replace a text file, whole or not at all."""
    with whole(path) as part:
        part.write_text(text)
