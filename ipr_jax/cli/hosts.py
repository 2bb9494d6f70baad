"""Several processes, each with the devices of its host, by JAX's own runtime."""

import contextlib
import dataclasses
import os
import re
import sys
import traceback
from collections.abc import Iterator

import jax

from ipr_jax.core import check
from ipr_jax.interrupts import PREEMPTED

SHUTDOWN_SECONDS = 7 * 24 * 3600
"""For how long a process that is done waits for the others to end."""


@dataclasses.dataclass(frozen=True)
class HostOptions:
    """Several processes that share the work; start the same command in each.

    Attributes:
        distributed: find the other processes by the environment: a TPU slice, Slurm, Open MPI,
            Kubernetes.
        coordinator: find them by the address HOST:PORT of process 0 instead.
        num_processes: with a coordinator, how many there are.
        process_id: with a coordinator, which one this is, from 0.

    Raises:
        ValueError: what belongs together is not given together, or is out of range.
    """

    distributed: bool = False
    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None

    def __post_init__(self) -> None:
        given = [self.coordinator, self.num_processes, self.process_id]
        if None in given and given != [None] * 3:
            raise ValueError(
                "--coordinator, --num-processes and --process-id must be given together, got "
                f"{', '.join(map(repr, given))}"
            )
        if self.distributed and self.coordinator is not None:
            raise ValueError("--distributed finds the others itself, leave out --coordinator")
        if self.coordinator is None or self.num_processes is None or self.process_id is None:
            return
        if not re.fullmatch(r".+:\d+", self.coordinator):
            raise ValueError(f"--coordinator must be HOST:PORT, got {self.coordinator!r}")
        check.count("--num-processes", self.num_processes)
        if not 0 <= self.process_id < self.num_processes:
            known = f"[0, {self.num_processes})"
            raise ValueError(f"--process-id must be in {known}, got {self.process_id}")

    def join(self) -> None:
        """Join the other processes, if there are any; before anything else is done by JAX.

        Raises:
            ValueError: the environment does not tell of any.
            ConnectionError: the others cannot be reached.
        """
        if not self.distributed and self.coordinator is None:
            return
        try:
            jax.distributed.initialize(
                self.coordinator,
                self.num_processes,
                self.process_id,
                shutdown_timeout_seconds=SHUTDOWN_SECONDS,
            )
        except ValueError as error:
            if not self.distributed:
                raise
            raise ValueError(
                "the environment does not tell of other processes; give --coordinator, "
                f"--num-processes and --process-id ({error})"
            ) from error
        except RuntimeError as error:
            raise ConnectionError(f"the other processes cannot be reached: {error}") from error


@contextlib.contextmanager
def ended_together() -> Iterator[None]:
    """Let an error end this process at once, which JAX makes known to the others.

    Else it would wait, until they are done, to leave them in order; and they, in what they compute
    together, for it. That is right for a process that is done or was preempted, as they are then.
    """
    try:
        yield
    except BaseException as error:
        in_order = isinstance(error, SystemExit) and error.code in (None, 0, PREEMPTED)
        if in_order or not jax.distributed.is_initialized():
            raise
        code = error.code if isinstance(error, SystemExit) else 1
        if not isinstance(error, SystemExit):
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)
