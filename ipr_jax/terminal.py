"""What the command lines share: where they print, and how they end."""

import contextlib
import sys
from collections.abc import Iterator

from rich.console import Console
from rich.markup import escape

from ipr_jax.files import printable

console = Console()
errors = Console(stderr=True, soft_wrap=True, highlight=False)


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """End a command with one clear line and exit code 2 when it is refused, 130 on an interrupt."""
    try:
        yield
    except MemoryError:
        errors.print("[red]error:[/] out of memory")
        sys.exit(2)
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        errors.print(f"[red]error:[/] {escape(printable(str(error)))}")
        sys.exit(2)
    except KeyboardInterrupt:
        errors.print("interrupted")
        sys.exit(130)


@contextlib.contextmanager
def interruptible(remains: str) -> Iterator[None]:
    """End with exit code 130 on an interrupt, and say what remains of the run."""
    try:
        yield
    except KeyboardInterrupt:
        errors.print(f"interrupted: {remains}")
        sys.exit(130)
