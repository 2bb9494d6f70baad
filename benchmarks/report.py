"""How a measurement is written down."""

import dataclasses
import json
from typing import Any

from ipr_jax.runtime import files


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
