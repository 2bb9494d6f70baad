"""How Ctrl-C ends a command: with one line and exit code 130, from its first moment to its last.

Nothing is raised. An exception that may come anywhere is lost where it comes in a callback of XLA,
and Python crashes as it ends where it came while XLA made a program. Instead a thread waits for the
signal, whatever the others are doing, cleans up and ends the process. Who has something to save
asks whether the signal came, saves, and raises ``PreemptionError``.

This file imports nothing that takes time.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

PREEMPTED = 128 + signal.SIGTERM
"""Exit code of what SIGTERM ended."""

_NAMES = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}
_lock = threading.RLock()
_remains: list[str] = []
"""What the line says as well; the last counts."""
_cleaning: list[Callable[[], Any]] = []
"""What is done before the process ends, the last first."""
_asking = threading.Event()
"""Whether somebody asks what came."""
_came: list[int] = []
"""The signals that were left to who asks."""


class PreemptionError(Exception):
    """The process was told to end, and what it had done is saved."""


def watch() -> None:
    """End the process on Ctrl-C from now on; called before any other thread is started.

    Not where it is ignored, as in what a shell has started in the background.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # other threads inherit it
        threading.Thread(target=_wait, daemon=True).start()


def _wait() -> None:
    while True:
        receive(signal.sigwait({signal.SIGINT}))


def receive(number: int, frame: FrameType | None = None) -> None:
    """End the process for a signal, or leave that to who asks; a second Ctrl-C ends it at once.

    It can also be the handler of a signal.
    """
    with _lock:
        if not _asking.is_set() or (number == signal.SIGINT and number in _came):
            _end(number)
        _came.append(number)


def _end(number: int) -> None:
    for clean in reversed(_cleaning):
        with contextlib.suppress(Exception):
            clean()
    with contextlib.suppress(OSError):
        if os.isatty(1):
            os.write(1, b"\x1b[?25h\n")  # the cursor, which a progress bar hides
        os.write(2, os.fsencode(_line(number)))
    os._exit(128 + number)


def _line(number: int) -> str:
    return ": ".join([_NAMES[signal.Signals(number)], *_remains[-1:]]) + "\n"


@contextlib.contextmanager
def cleaned(clean: Callable[[], Any]) -> Iterator[None]:
    """Call a function at the end of the block, or before a signal ends the process in it."""
    _cleaning.append(clean)
    try:
        yield
    finally:
        clean()
        _cleaning.remove(clean)


@contextlib.contextmanager
def interruptible(remains: str) -> Iterator[None]:
    """Say what remains where a signal, or ``PreemptionError``, ends the command in the block."""
    _remains.append(remains)
    try:
        yield
    except PreemptionError:
        number = _came[0] if _came else signal.SIGTERM  # which JAX alone may have noticed
        sys.stderr.write(_line(number))
        sys.exit(128 + number)
    finally:
        _remains.pop()


@contextlib.contextmanager
def asked() -> Iterator[Callable[..., bool]]:
    """A function of anything that tells whether a signal came, for who saves and ends then.

    Before it is first called there is nothing to save, and a signal ends the process. One that
    comes after the last call raises ``PreemptionError`` at the end of the block.
    """

    def ask(*_: Any) -> bool:
        _asking.set()
        return bool(_came)

    _came.clear()
    try:
        yield ask
    finally:
        with _lock:
            _asking.clear()
    if _came:
        raise PreemptionError
