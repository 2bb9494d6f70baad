"""Ctrl-C ends every command with one line and exit code 130, whatever it is doing."""

import itertools
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ipr_jax import interrupts
from ipr_jax.interrupts import PreemptionError, asked, cleaned, interruptible, receive

ROOT = Path(__file__).parents[1]
COMMAND = ("-m", "ipr_jax")


@pytest.fixture
def ended(monkeypatch):
    """The process does not end; a function of a signal tells with which code it would have."""

    class EndError(BaseException):
        pass

    def end(code):
        raise EndError(code)

    def code(number):
        with pytest.raises(EndError) as raised:
            receive(number)
        return raised.value.args[0]

    monkeypatch.setattr(interrupts.os, "_exit", end)
    return code


def test_a_signal_ends_the_process_with_one_line(ended, capfd):
    assert ended(signal.SIGINT) == 130
    with interruptible("outside"), interruptible("it is here"):
        assert ended(signal.SIGINT) == 130
        assert ended(signal.SIGTERM) == 143
    said = "interrupted\ninterrupted: it is here\nterminated: it is here\n"
    assert capfd.readouterr() == ("", said)


def test_what_is_unfinished_is_cleaned_by_the_last_first(ended):
    done = []
    with cleaned(lambda: done.append("first")), cleaned(lambda: done.append("second")):
        ended(signal.SIGINT)
        assert done == ["second", "first"]
    ended(signal.SIGINT)
    assert done == ["second", "first"] * 2


def test_who_asks_ends_by_itself_and_a_second_interrupt_at_once(ended, capfd):
    @interruptible("it goes on")
    def run():
        with asked() as preempted:
            assert ended(signal.SIGINT) == 130  # nobody has asked
            assert not preempted()
            receive(signal.SIGTERM)
            receive(signal.SIGTERM)
            receive(signal.SIGINT)
            assert preempted()
            assert ended(signal.SIGINT) == 130
            raise PreemptionError

    with pytest.raises(SystemExit) as end:
        run()
    assert end.value.code == 143
    line = "ed: it goes on\n"
    assert capfd.readouterr().err == f"interrupt{line}interrupt{line}terminat{line}"
    assert ended(signal.SIGINT) == 130  # nobody asks any more


def test_a_signal_after_the_last_question_is_not_lost(capfd):
    @interruptible("it is done")
    def run():
        with asked() as preempted:
            assert not preempted()
            receive(signal.SIGINT)

    with pytest.raises(SystemExit) as end:
        run()
    assert end.value.code == 130
    assert capfd.readouterr().err == "interrupted: it is done\n"


def begun(*words, **environment):
    """A program that takes no compiled ones from anywhere."""
    variables = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)} | environment
    return subprocess.Popen(
        [sys.executable, *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=variables,
        cwd=ROOT,
    )


def interrupted_at(process, text):
    """Interrupt a program when it says something; its exit code, and what it says then."""
    with process:
        for line in process.stderr:
            if text in line:
                break
        process.send_signal(signal.SIGINT)
        said = process.stderr.read()
    return process.returncode, said


@pytest.mark.parametrize("module", ["ipr_jax", "convert", "benchmarks.waste"])
def test_interrupted_while_importing(module):
    process = begun("-X", "importtime", "-m", module, "--help")
    code, said = interrupted_at(process, "jax._src.config")
    assert code == 130
    others = [line for line in said.splitlines() if not line.startswith("import time:")]
    assert others == ["interrupted"]  # imports go on until the process ends


def test_interrupted_while_compiling(tiny_folder, tmp_path):
    out = tmp_path / "new" / "run"
    words = ("stream", "mini-sudoku", "--model", tiny_folder, "--samples", 2, "--out", out)
    process = begun(*COMMAND, *words, JAX_LOG_COMPILES="1")
    code, said = interrupted_at(process, "Compiling jit(_solve_on")
    assert code == 130
    assert said.endswith("interrupted: nothing has been written\n")
    assert "Traceback" not in said
    assert not list(out.parent.iterdir())


def test_what_is_ignored_stays_ignored():
    """As of what a shell has started in the background."""
    code = (
        "import signal, os; signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "from ipr_jax import interrupts; interrupts.watch()\n"
        "os.kill(os.getpid(), signal.SIGINT); print('here')"
    )
    out, err = begun("-c", code).communicate(timeout=60)
    assert (out, err) == ("here\n", "")


SMALL = ("--samples", 32, "--iterations", 3)
COMMANDS = {
    "refine": (*COMMAND, "refine", *SMALL),
    "evaluate": (*COMMAND, "evaluate", "mini-sudoku", *SMALL),
    "stream": (*COMMAND, "stream", "mini-sudoku", *SMALL),
    "train": (*COMMAND, "train", "mini-sudoku", "--num-steps", 4, "--batch-size", 8),
    "profile": ("-m", "benchmarks.profile", "--batch", 1),
}
"""The shipped model, or its training; pictures are drawn at the end."""
GO_ON = ("refine", "evaluate", "train")
"""Those that may be given a folder with results of theirs."""


@pytest.mark.heavy
@pytest.mark.parametrize("command", COMMANDS)
def test_interrupted_at_random_moments(command, tmp_path, pytestconfig):
    """From the first tenth of a second on; every try compiles anew. The last goes on, or again."""
    words, rng = (*COMMANDS[command], "--out"), random.Random(0)

    def complete(out):
        with begun(*words, out) as process:
            process.communicate()
        assert process.returncode == 0

    places = (tmp_path / str(number) for number in itertools.count())
    start, tries, out = time.monotonic(), 0, next(places)
    complete(out)
    whole = time.monotonic() - start
    while tries < pytestconfig.getoption("kills"):
        out = next(places)
        with begun(*words, out) as process:
            try:
                process.wait(rng.uniform(0.1, whole))
                continue  # it was faster than the first
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGINT)
            sent = time.monotonic()
            _, err = process.communicate(timeout=120)
        tries += 1
        if process.returncode == 0:  # as it was about to end
            assert time.monotonic() - sent < 1
        else:
            assert (process.returncode, err.count("\n")) == (130, 1), err
            assert err.startswith("interrupted")
    if command in GO_ON or not out.exists():
        complete(out)
