"""Batches made ahead: the same whoever makes them, errors in their place, nothing left behind."""

import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from ipr_jax.tasks import mini_sudoku
from ipr_jax.tasks.base import Batch
from ipr_jax.training.loader import load

MAKE = mini_sudoku.TASK.training_batch
WORKERS = [0, 2]
ONE = [0, 1]  # a worker takes seconds to start


def same(one, two):
    return all(np.array_equal(a, b) for a, b in zip(one, two, strict=True))


def numbered(seed, indices):
    """A batch that shows what it was made of, by whom; step 5 of batches of 2 is broken."""
    if indices[0] == 10:
        raise OSError(f"no image {indices[0]}")
    maker = np.array([os.getpid(), jax.config.jax_platforms == "cpu"])
    return Batch(indices[:, None], indices >= 0, maker)


def mostly_late(seed, indices):
    """Later batches are ready earlier."""
    time.sleep(0.2 if indices[0] % 4 == 0 else 0)
    return numbered(seed, indices)


def nothing_left():
    """Whether no process and no thread of a loader is left."""
    threads = {thread.name for thread in threading.enumerate()}
    return not multiprocessing.active_children() and not any("batches" in one for one in threads)


def test_batches_are_those_of_their_steps():
    """Those of workers too: ``test_trainer`` goes on with one, bit for bit."""
    want = [MAKE(3, np.arange(4 * step, 4 * step + 4)) for step in range(7, 15)]
    got = list(load(MAKE, 3, 4, range(7, 15)))
    assert len(got) == len(want)
    assert all(same(one, two) for one, two in zip(got, want, strict=True))
    assert nothing_left()


@pytest.mark.parametrize("num_workers", WORKERS)
def test_order_is_that_of_the_steps_and_makers_see_no_accelerator(num_workers):
    got = list(load(mostly_late, 0, 2, range(6, 12), num_workers))
    assert [batch.image[0, 0] for batch in got] == [12, 14, 16, 18, 20, 22]
    for batch in got:
        process, on_cpu = batch.label
        assert (process == os.getpid()) == (num_workers == 0)
        assert on_cpu or num_workers == 0
    assert nothing_left()


def test_only_the_steps_asked_for_are_made_and_few_of_them_ahead():
    made = []

    def make(seed, indices):
        made.append(int(indices[0]))
        return numbered(seed, indices)

    batches = load(make, 0, 2, range(1000, 10**9))
    assert made == []
    assert [batch.image[0, 0] for batch in itertools.islice(batches, 3)] == [2000, 2002, 2004]
    batches.close()
    assert made == list(range(2000, 2000 + 2 * len(made), 2))
    assert len(made) <= 5
    assert nothing_left()


def test_no_steps_are_no_batches():
    assert list(load(MAKE, 0, 4, range(5, 5))) == []


@pytest.mark.parametrize("num_workers", ONE)
def test_an_error_comes_in_the_place_of_its_batch(num_workers):
    batches = load(numbered, 0, 2, range(2, 9), num_workers)
    assert [batch.image[0, 0] for batch in itertools.islice(batches, 3)] == [4, 6, 8]
    with pytest.raises(OSError, match=r"^no image 10$"):
        next(batches)
    assert next(batches, None) is None
    assert nothing_left()


@pytest.mark.parametrize("num_workers", ONE)
def test_closing_early_leaves_nothing_behind(num_workers):
    batches = load(mostly_late, 0, 2, range(100, 10**9), num_workers)
    next(batches)
    assert not nothing_left()
    batches.close()
    assert nothing_left()


@pytest.mark.parametrize(
    ("batch_size", "num_workers", "message"),
    [
        (0, 0, "batch_size must be a whole number of at least 1, got 0"),
        (4, -1, "num_workers must be a whole number of at least 0, got -1"),
        (4, 1.5, "num_workers must be a whole number of at least 0, got 1.5"),
    ],
)
def test_impossible_loaders_are_refused(batch_size, num_workers, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        load(MAKE, 0, batch_size, range(3), num_workers)


def test_batches_that_no_other_process_can_make_are_refused():
    with pytest.raises(ValueError, match=r"^num_workers must be 0 where .*, got 2: .*lambda"):
        load(lambda seed, indices: MAKE(seed, indices), 0, 4, range(3), 2)


def die(seed, indices):
    if indices[0] == 6:
        os.kill(os.getpid(), signal.SIGKILL)
    return MAKE(seed, indices)


def test_a_worker_that_is_killed_is_an_error_that_says_so():
    batches = load(die, 0, 2, range(10), 1)
    with pytest.raises(ChildProcessError, match=r"was killed, .* fewer num_workers than 1"):
        list(batches)


SCRIPT = """
import os
import numpy as np
from ipr_jax.tasks import mini_sudoku
from ipr_jax.training.loader import load

def make(seed, indices):
    batch = mini_sudoku.TASK.training_batch(seed, indices)
    return batch._replace(label=np.array(os.getpid()))

if __name__ == "__main__":
    for batch in load(make, 0, 2, range(10**9), num_workers=1):
        print(batch.label, flush=True)
"""


def running(process):
    """Whether a process is there and no zombie."""
    try:
        status = Path(f"/proc/{process}/stat").read_text()
    except FileNotFoundError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    "ended_by", [signal.SIGINT, pytest.param(signal.SIGKILL, marks=pytest.mark.heavy)]
)
def test_workers_end_with_the_script_that_started_them(ended_by, tmp_path):
    """SIGINT goes to all of them, as from a terminal, SIGKILL to the script alone."""
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    root = str(Path(__file__).parents[2])
    script = subprocess.Popen(
        [sys.executable, path],
        env=os.environ | {"PYTHONPATH": root},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        lines = [script.stdout.readline() for _ in range(8)]
        assert all(lines), script.stderr.read()
        workers = {int(line) for line in lines}
        assert script.pid not in workers
        if ended_by == signal.SIGINT:
            os.killpg(script.pid, ended_by)
        else:
            script.send_signal(ended_by)
        _, errors = script.communicate(timeout=30)
        if ended_by == signal.SIGINT:
            assert errors.count("Traceback") == 1
        until = time.monotonic() + 10
        while any(running(worker) for worker in workers) and time.monotonic() < until:
            time.sleep(0.05)
        assert not any(running(worker) for worker in workers)
    finally:
        if script.poll() is None:
            os.killpg(script.pid, signal.SIGKILL)
            script.communicate()
