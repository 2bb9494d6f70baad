"""What the command lines share: where they print, how far they are, and how they end."""

import contextlib
import datetime
import re
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import jax
from rich.console import Console, Group
from rich.live import Live
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from ipr_jax import interrupts
from ipr_jax.runtime import EXHAUSTED, files

QUIET_SECONDS = 10
"""Without a terminal, the least time between two lines on how far a command is."""

_console = partial(Console, markup=False, emoji=False, highlight=False)
"""Text is printed as it is, whatever the names in it."""

console = _console()
errors = _console(stderr=True, soft_wrap=True)


def say(text: str = "", style: str | None = None) -> None:
    """Print lines as they are; a terminal wraps those that are too long for it."""
    console.print(text, style=style, soft_wrap=True)


def show(table: Table) -> None:
    """Print a table, as wide as it is where no terminal limits it."""
    (console if _on_terminal() else _console(width=10_000)).print(table)


def _on_terminal() -> bool:
    return console.is_terminal and not console.is_dumb_terminal


Update = Callable[[str, int, int, Table | None], None]
"""``update(doing, done, total, table)``: what a command is doing, how far it is, what it found."""


@contextlib.contextmanager
def progress(doing: str) -> Iterator[Update]:
    """Tell how far a command is: a bar below what it found or, without a terminal, a line at times.

    Args:
        doing: what it does first.

    Yields:
        A function, to be called as often as there is something new: a line is printed for another
        percent, at most every ``QUIET_SECONDS``.
    """
    if not _on_terminal():
        say(doing)
        yield _lines()
        return
    bar = Progress(
        *(TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn()),
        *(TimeElapsedColumn(), TextColumn("elapsed,"), TimeRemainingColumn(), TextColumn("left")),
        speed_estimate_period=24 * 3600,
    )
    running = bar.add_task(doing, total=None)
    with Live(bar, console=console, transient=True) as live:

        def update(doing: str, done: int, total: int, table: Table | None) -> None:
            bar.update(running, description=doing, completed=done, total=total)
            if table is not None:
                live.update(Group(table, bar))

        yield update


def _lines() -> Update:
    """Progress as lines."""
    started = said = time.monotonic()
    begun, shown = None, 0

    def update(doing: str, done: int, total: int, table: Table | None) -> None:
        nonlocal said, begun, shown
        del table
        now, percent = time.monotonic(), 100 * done // max(1, total)
        if begun is None and done:  # what came before was compilation, too
            begun = now, done
        if percent == shown or now - said < QUIET_SECONDS:
            return
        said, shown = now, percent
        parts = [f"{doing}: {percent}%", f"{_span(now - started)} elapsed"]
        if begun is not None and (since := done - begun[1]) > 0:
            parts.append(f"{_span((total - done) * (now - begun[0]) / since)} left")
        say(", ".join(parts))

    return update


def _span(seconds: float) -> datetime.timedelta:
    """To be printed in hours, minutes and seconds."""
    return datetime.timedelta(seconds=round(seconds))


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """End a command with one clear line and exit code 2 when it is refused.

    Warnings are one line each as well.
    """
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show
            yield
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if not isinstance(error, MemoryError) and EXHAUSTED not in str(error):
            raise
        _complain(
            "error", ": ".join(filter(None, ["out of memory", files.printable(str(error), 200)]))
        )
        sys.exit(2)
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        _complain("error", str(error))
        sys.exit(2)
    except (RuntimeError, AssertionError):
        try:
            jax.devices()
        except (RuntimeError, AssertionError) as error:
            named = f"JAX has no device of JAX_PLATFORMS={jax.config.values['jax_platforms']}"
            _complain("error", ": ".join(filter(None, [named, str(error)])))
            sys.exit(2)
        raise


def unraisable(raised: Any) -> None:
    """Report what is raised where nobody can catch it (``sys.unraisablehook``).

    But for one error: TensorStore raises it for every array of a checkpoint that is not written yet
    when another cannot be written, and that other one is reported.
    """
    if str(raised.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(raised)


def _show(message: Warning | str, *_: Any) -> None:
    """Print a warning, without the line of code that it is from."""
    _complain("warning", str(message))


def _complain(kind: str, said: str) -> None:
    """Print an error or a warning as one line."""
    colour = {"error": "red", "warning": "yellow"}[kind]
    errors.print(Text.assemble((f"{kind}:", colour), " ", files.printable(said)))


_ARGUMENT = re.compile(
    r"(?<=^unknown )\w+|(?<=^no )\w+(?= at )|(?<=^the )task|(?<= takes no )\w+|(?<!\S)\w+(?= must )"
)
"""Where refusals name the argument that they are about."""


@contextlib.contextmanager
def naming(names: Mapping[str, str]) -> Iterator[None]:
    """Let refusals name what was given, where that has another name than the argument it became.

    Args:
        names: what was given, such as ``--batch-size``, by the argument that it became.
    """
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        said = _ARGUMENT.sub(lambda found: names.get(found[0], found[0]), str(error))
        if said == str(error):
            raise
        raise (ValueError if isinstance(error, ValueError) else FileNotFoundError)(said) from error


@contextlib.contextmanager
def signals() -> Iterator[Callable[..., bool]]:
    """``interrupts.asked``, where SIGTERM is as good as Ctrl-C."""
    before = signal.signal(signal.SIGTERM, interrupts.receive)
    try:
        with interrupts.asked() as preempted:
            if jax.distributed.is_initialized():
                preempted()  # from now on, as one that ends at once would end the others
            yield preempted
    finally:
        # One of several processes waits for the others when it is done, and must not end first.
        others = jax.distributed.is_initialized()
        signal.signal(signal.SIGTERM, signal.SIG_IGN if others else before)
