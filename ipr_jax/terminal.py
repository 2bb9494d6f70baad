"""What the command lines share: where they print, and how they end."""

import contextlib
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
from rich.console import Console
from rich.markup import escape

from ipr_jax import interrupts
from ipr_jax.files import printable
from ipr_jax.memory import EXHAUSTED

console = Console()
errors = Console(stderr=True, soft_wrap=True, highlight=False)


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
        said = ": ".join(filter(None, ["out of memory", escape(printable(str(error), 200))]))
        errors.print(f"[red]error:[/] {said}")
        sys.exit(2)
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        errors.print(f"[red]error:[/] {escape(printable(str(error)))}")
        sys.exit(2)


def unraisable(raised: Any) -> None:
    """Report what is raised where nobody can catch it (``sys.unraisablehook``).

    But for one error: TensorStore raises it for every array of a checkpoint that is not written yet
    when another cannot be written, and that other one is reported.
    """
    if str(raised.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(raised)


def _show(message: Warning | str, *_: Any) -> None:
    """Print a warning, without the line of code that it is from."""
    errors.print(f"[yellow]warning:[/] {escape(printable(str(message)))}")


@contextlib.contextmanager
def signals() -> Iterator[Callable[..., bool]]:
    """``interrupts.asked``, where SIGTERM is as good as Ctrl-C."""
    before = signal.signal(signal.SIGTERM, interrupts.receive)
    try:
        with interrupts.asked() as preempted:
            yield preempted
    finally:
        # One of several processes waits for the others when it is done, and must not end first.
        others = jax.distributed.is_initialized()
        signal.signal(signal.SIGTERM, signal.SIG_IGN if others else before)
