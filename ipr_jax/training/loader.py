"""Training batches, made ahead of the steps that need them."""

import collections
import functools
import itertools
import multiprocessing
import os
import pickle
import signal
import threading
from collections.abc import Callable, Generator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import jax
import numpy as np

from ipr_jax.core import check
from ipr_jax.tasks import Batch

GRACE_SECONDS = 30
"""For how long a process that makes batches goes on when it is told to end."""

MakeBatch = Callable[[int, np.ndarray], Batch]
"""``(seed, indices [B]) -> Batch``, such as ``Task.training_batch``."""


def load(
    make_batch: MakeBatch,
    seed: int,
    batch_size: int,
    steps: range,
    num_workers: int = 0,
    part: tuple[int, int] = (0, 1),
) -> Generator[Batch]:
    """Make the batches of some steps while earlier ones are used; close it to stop early.

    Step k has the samples k * batch_size to (k + 1) * batch_size - 1, whoever makes them. An error
    of ``make_batch`` is raised in place of its batch. Closing waits for the batches in work.

    Args:
        make_batch: where they come from; for processes it can be pickled.
        seed: of the samples, int >= 0.
        batch_size: samples per batch, at least 1.
        steps: whose batches are made, in that order.
        num_workers: processes that make them; 0 = a thread of this one. They see no accelerator,
            end with this process, and import its main module: a script that starts them runs under
            ``if __name__ == "__main__":``.
        part: (i, n), the i-th of n equal parts of every batch, for one of n hosts.

    Returns:
        A generator of batches, one per step.

    Raises:
        ValueError: ``batch_size`` or ``num_workers`` is out of range, the batch has no such part,
            or ``make_batch`` cannot be pickled.
    """
    check.count("batch_size", batch_size)
    index, number = part
    if batch_size % number:
        raise ValueError(f"batch_size must be a multiple of {number} hosts, got {batch_size}")
    check_workers(make_batch, num_workers)
    own = np.arange(batch_size).reshape(number, -1)[index]
    make = functools.partial(_make_step, make_batch, seed, batch_size, own)
    return _ahead(num_workers, make, steps)


def check_workers(make_batch: MakeBatch, num_workers: int) -> None:
    """Refuse a number of workers that cannot make these batches.

    Raises:
        ValueError: it is no whole number of at least 0, or it is positive and ``make_batch`` cannot
            be pickled.
    """
    check.count("num_workers", num_workers, least=0)
    if num_workers:
        try:
            pickle.dumps(make_batch)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise ValueError(
                f"num_workers must be 0 where batches cannot be made by other processes, "
                f"got {num_workers}: {error}"
            ) from error


def _make_step(
    make_batch: MakeBatch, seed: int, batch_size: int, own: np.ndarray, step: int
) -> Batch:
    return make_batch(seed, step * batch_size + own)


def _ahead(num_workers: int, make: Callable[[int], Batch], steps: range) -> Generator[Batch]:
    """Map in order; two steps per worker are in work or done and not yet taken."""
    waiting = iter(steps)
    pool = _open_pool(num_workers)
    try:
        ahead = itertools.islice(waiting, 2 * max(1, num_workers))
        pending = collections.deque(pool.submit(make, step) for step in ahead)
        while pending:
            try:
                batch = pending.popleft().result()
            except BrokenProcessPool as error:
                raise ChildProcessError(
                    "a process that makes batches was killed, as when the memory is full; fewer "
                    f"num_workers than {num_workers} take less of it"
                ) from error
            pending.extend(pool.submit(make, step) for step in itertools.islice(waiting, 1))
            yield batch
    finally:
        pool.shutdown(cancel_futures=True)


def _open_pool(num_workers: int) -> Executor:
    if not num_workers:
        return ThreadPoolExecutor(1, thread_name_prefix="batches")
    spawn = multiprocessing.get_context("spawn")  # a fork of a process that runs JAX may hang
    return ProcessPoolExecutor(num_workers, mp_context=spawn, initializer=_start_worker)


def _start_worker() -> None:
    # Signals are for the process that loads, which ends this one when it has saved its state.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: threading.Timer(GRACE_SECONDS, os._exit, (1,)).start())
    jax.config.update("jax_platforms", "cpu")
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this process if its parent is killed, which cannot tell it to."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
