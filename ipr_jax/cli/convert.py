"""``ipr-jax convert``: the commands of the package ``convert``, imported when asked for."""

from collections.abc import Callable
from typing import Any

WAYS = ("import", "export", "verify")
"""What can be done with a checkpoint."""


def command_of(way: str) -> Callable[..., Any]:
    """The command of a way.

    Raises:
        ValueError: there is no such way; lists those that there are.
    """
    if way not in WAYS:
        raise ValueError(f"unknown way {way!r}; known: {', '.join(WAYS)}")
    from convert.__main__ import COMMANDS

    return COMMANDS[way]
