"""Several processes, each with devices of its own, on this machine."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import IPR, call
from small_run import bits, train, trained

from ipr_jax.cli.hosts import HostOptions

ROOT = Path(__file__).parents[2]


def begun(words, devices):
    """A program with every set of words at once, each on so many virtual devices."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    environment = os.environ | {
        "XLA_FLAGS": flags,
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests"))),
    }
    pipe = subprocess.PIPE
    return [
        subprocess.Popen(
            [sys.executable, *map(str, each)], stdout=pipe, stderr=pipe, text=True, env=environment
        )
        for each in words
    ]


def processes(words, devices):
    """The same, until they end."""
    running = begun(words, devices)
    said = [each.communicate(timeout=300) for each in running]
    assert [each.returncode for each in running] == [0] * len(running), said
    return [out for out, _ in said]


def address():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{found.getsockname()[1]}"


@pytest.mark.gate
def test_two_processes_make_what_one_makes(tiny_folder, tmp_path):
    """Both told to end with samples in work, they go on from there."""
    words = ("-m", "ipr_jax", "refine", *IPR, "--model", tiny_folder, "--samples", 16)
    words += ("--iterations", 6, "--shard-size", 4, "--save-minutes", 0, "--out")
    processes([(*words, tmp_path / "one")], 4)
    two = tmp_path / "two"

    def parts():
        coordinator = ("--coordinator", address(), "--num-processes", 2, "--process-id")
        return [(*words, two, *coordinator, k) for k in range(2)]

    both, deadline = begun(parts(), 4), time.monotonic() + 200
    while not list(two.glob("state-1/[0-9]*")):
        assert time.monotonic() < deadline
        assert [each.poll() for each in both] == [None, None]
        time.sleep(0.01)
    for each in both:
        each.send_signal(signal.SIGTERM)
    errors = [each.communicate(timeout=200)[1] for each in both]
    assert [each.returncode for each in both] == [143, 143], errors
    assert list(two.glob("state-1/[0-9]*"))
    said = processes(parts(), 4)
    assert bits(tmp_path / "one") == bits(two)
    assert "written: " in said[0] + said[1]


@pytest.mark.heavy
def test_an_error_of_one_process_is_not_waited_with(tiny_folder, tmp_path):
    """One of two seeds is refused, whichever comes second; neither waits for the other for days."""
    words = ("-m", "ipr_jax", "refine", *IPR, "--model", tiny_folder, "--out", tmp_path / "run")
    where = ("--coordinator", address(), "--num-processes", 2, "--process-id")
    both = begun([(*words, *where, 0), (*words, "--seed", 1, *where, 1)], 4)
    errors = [each.communicate(timeout=200)[1] for each in both]
    refused = "holds a run of another configuration (arguments.seed is "
    ended = [(each.returncode, refused in error) for each, error in zip(both, errors, strict=True)]
    assert ended.count((2, True)) == 1, errors


@pytest.mark.heavy
def test_training_in_two_processes_ends_with_143_at_the_same_step(tmp_path):
    folder = tmp_path / "run"
    words = ("-m", "ipr_jax", "train", "mini-sudoku", "--batch-size", 4, "--log-every", 1)
    where = ("--coordinator", address(), "--num-processes", 2, "--process-id")
    both = begun([(*words, "--out", folder, *where, k) for k in range(2)], 1)
    deadline = time.monotonic() + 200
    while not (folder / "log.jsonl").exists():
        assert time.monotonic() < deadline
        assert [each.poll() for each in both] == [None, None]
        time.sleep(0.1)
    both[1].send_signal(signal.SIGTERM)
    errors = [each.communicate(timeout=200)[1] for each in both]
    assert [each.returncode for each in both] == [143, 143], errors
    assert all("terminated: started again, it goes on" in error for error in errors)
    (saved,) = (folder / "checkpoints").iterdir()
    last = json.loads((folder / "log.jsonl").read_text().splitlines()[-1])
    assert last["step"] == int(saved.name)


@pytest.mark.heavy
def test_two_processes_train_as_one_does(tmp_path):
    program = ROOT / "tests" / "small_run.py"
    where = address()
    processes([(program, tmp_path / "two", where, k) for k in range(2)], 2)
    list(train(tmp_path / "one"))
    (lines, _), (want, _) = trained(tmp_path / "two"), trained(tmp_path / "one")
    for line, one in zip(lines, want, strict=True):
        assert line == pytest.approx(one, rel=1e-4)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--coordinator", "here:1"), "--coordinator, --num-processes and --process-id must be g"),
        (("--process-id", 0), "error: --coordinator, --num-processes and --process-id must be gi"),
        (
            ("--coordinator", "here:1", "--num-processes", 2, "--process-id", 2),
            "error: --process-id must be in [0, 2), got 2",
        ),
        (
            ("--coordinator", "here:1", "--num-processes", 0, "--process-id", 0),
            "error: --num-processes must be a whole number of at least 1, got 0",
        ),
        (
            ("--coordinator", "here", "--num-processes", 2, "--process-id", 1),
            "error: --coordinator must be HOST:PORT, got 'here'",
        ),
        (
            ("--distributed", "--coordinator", "a:1", "--num-processes", 1, "--process-id", 0),
            "error: --distributed finds the others itself, leave out --coordinator",
        ),
    ],
)
def test_what_does_not_belong_together_is_one_line(words, message):
    code, out, err = call("refine", *words)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err


def test_an_environment_without_others_is_said(monkeypatch):
    def nothing(*arguments, **options):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr("jax.distributed.initialize", nothing)
    with pytest.raises(ValueError, match="does not tell of other processes; give --coordinator"):
        HostOptions(distributed=True).join()
