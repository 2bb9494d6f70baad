"""How a measurement is written down."""

import dataclasses
import json
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console
from rich.table import Table

from ipr_jax.runtime import environment, files

Rows = list[dict[str, Any]]
"""What was measured, a row each."""


def publish(args: Any, measured: Iterator[dict[str, Any]], table: Callable[[Rows], Table]) -> None:
    """Measure, print the table and what it ran on, and ``save`` the rows.

    Args:
        args: as for ``save``.
        measured: measures when it is asked for a row.
        table: of the rows.

    Raises:
        FileExistsError: before anything is measured: ``args.out`` is there.
        FileNotFoundError: likewise: its folder is not.
    """
    if args.out is not None:
        files.refuse_existing(args.out)
    rows = list(measured)
    described = environment.describe()
    Console(width=180).print(table(rows))
    print(f"{described['device']}, jax {described['versions']['jax']}, {described['commit']}")
    save(args, described, rows=rows)


def save(args: Any, described: dict[str, Any], **found: Any) -> None:
    """Write settings, what they ran on, and what was found; whole or not at all.

    Args:
        args: the settings, a dataclass; ``args.out`` is the file, None = nothing is written.
        described: from ``environment``.
        **found: JSON data.
    """
    if args.out is not None:
        settings = dataclasses.asdict(args) | {"out": None}
        text = json.dumps({"arguments": settings, **described, **found}, indent=1)
        files.write_text(args.out, text)
