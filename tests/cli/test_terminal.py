"""What the command lines share: text as it is, tables, progress, refusals, errors of one line."""

import io
import itertools
import re
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest
from conftest import call
from rich.table import Table

from ipr_jax.cli import main as cli
from ipr_jax.cli import terminal
from ipr_jax.cli.options import typed
from ipr_jax.models import checkpoint

ROOT = Path(__file__).parents[2]
NAME = "runs[v2]/:smile: [red]x[/] \\[b]"
"""A path of what Rich would take for markup and emoji."""


@pytest.fixture
def screen(monkeypatch):
    """A terminal of 60 columns; what is on it is ``screen.file``."""
    made = terminal._console(file=io.StringIO(), force_terminal=True, width=60, color_system=None)
    monkeypatch.setattr(terminal, "console", made)
    monkeypatch.delenv("TERM", raising=False)
    return made


@pytest.fixture
def clock(monkeypatch):
    """Seconds, which pass when a test says so."""
    now = [0.0]
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now[0])
    return now


# --- text -----------------------------------------------------------------------------------------


def test_text_and_cells_are_printed_as_they_are(capsys):
    table = Table(NAME, box=None)
    table.add_row(NAME)
    terminal.say(f"{NAME}{'x' * 200}", "red")
    terminal.show(table)
    terminal._complain("error", NAME)
    with terminal.progress(NAME):
        pass
    out, err = capsys.readouterr()
    cell = f" {NAME} "
    assert out.splitlines() == [f"{NAME}{'x' * 200}", cell, cell, NAME]
    assert err == f"error: {NAME}\n"


def test_a_bar_shows_text_as_it_is(screen):
    with terminal.progress(NAME) as update:
        update(f"{NAME} 1", 1, 2, None)
    written = screen.file.getvalue()
    assert f"{NAME} 1" in written
    assert "50%" in written


@pytest.mark.parametrize("command", ["refine", "evaluate mini-sudoku", "stream mini-sudoku"])
def test_a_name_that_is_not_utf8_is_refused_before_anything_is_done(tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    for words in (("--model", "bad\udcff"), ("--out", "bad\udcff"), ("--data", "bad\udcff/x")):
        said = f"error: {words[1]!r} is not UTF-8, rename it\n"
        assert call(*command.split(), *words) == (2, "", said)
    (tmp_path / "bad\udcff").mkdir()
    monkeypatch.chdir(tmp_path / "bad\udcff")
    code, out, err = call(*command.split())
    assert (code, out) == (2, "")
    assert err.endswith("bad\\udcff' is not UTF-8, rename it\n")
    assert not list(Path.cwd().iterdir())


def test_a_model_is_neither_opened_nor_saved_under_such_a_name(tmp_path):
    path = tmp_path / "bad\udcff"
    path.mkdir()
    with pytest.raises(ValueError, match=r"bad\\udcff' is not UTF-8, rename it"):
        checkpoint.load(path)
    with pytest.raises(ValueError, match=r"bad\\udcff' is not UTF-8, rename it"):
        checkpoint.check_path(path)


def test_what_the_output_cannot_encode_is_no_error(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", stream)
    monkeypatch.setattr("sys.argv", ["ipr-jax", "--version"])
    cli.main()
    terminal.say("written: ü")
    assert stream.buffer.getvalue().endswith(b"\nwritten: \\xfc\n")


def test_nothing_is_printed_past_these_functions():
    found = {
        path.name
        for path in (ROOT / "ipr_jax").rglob("*.py")
        if re.search(r"\bconsole\b|\bConsole\b", path.read_text())
    }
    assert found == {"terminal.py"}


# --- tables ---------------------------------------------------------------------------------------


def test_a_table_is_cut_by_a_terminal_alone(screen, monkeypatch, capsys):
    table = Table(box=None)
    for number in range(9):
        table.add_column(f"column-number-{number}")
    table.add_row(*map(str, range(9)))
    terminal.show(table)
    assert max(map(len, screen.file.getvalue().splitlines())) == 60
    monkeypatch.undo()
    monkeypatch.setenv("COLUMNS", "20")
    terminal.show(table)
    head, row = capsys.readouterr().out.splitlines()
    assert head.split() == [f"column-number-{number}" for number in range(9)]
    assert row.split() == [str(number) for number in range(9)]


# --- progress -------------------------------------------------------------------------------------


def said_of(capsys, clock, updates):
    with terminal.progress("compiling") as update:
        for seconds, done in updates:
            clock[0] += seconds
            update("refining", done, 200, None)
    return capsys.readouterr().out.splitlines()


def test_progress_is_a_line_for_a_percent_and_ten_seconds(capsys, clock):
    updates = [(5, 2), (4, 3), (1, 3), (1, 4), (3600, 102), (20, 103), (1, 104)]
    assert said_of(capsys, clock, updates) == [
        "compiling",
        "refining: 1%, 0:00:10 elapsed, 0:16:25 left",  # 1 in 5 s, 197 to do
        "refining: 51%, 1:00:11 elapsed, 0:58:54 left",  # 100 in 3606 s, 98 to do
        "refining: 52%, 1:00:32 elapsed, 0:56:54 left",
    ]


def test_the_time_before_anything_is_done_does_not_count(capsys, clock):
    """A compilation of 300 s; then 2 in 20 s."""
    assert said_of(capsys, clock, [(1, 0), (300, 2), (20, 4)]) == [
        "compiling",
        "refining: 1%, 0:05:01 elapsed",
        "refining: 2%, 0:05:21 elapsed, 0:32:40 left",  # 196 to do
    ]


@pytest.mark.parametrize("seconds", [0.0011, 1, 3600])
def test_there_are_never_thousands_of_lines(capsys, clock, seconds):
    lines = said_of(capsys, clock, itertools.repeat((seconds, 0), 50))
    assert lines == ["compiling"]
    with terminal.progress("compiling") as update:
        for done in range(20_000):
            clock[0] += seconds
            update("training", done, 20_000, None)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + min(99, int(20_000 * seconds) // 10)


def test_what_began_in_the_middle_is_not_guessed_at(capsys, clock):
    assert said_of(capsys, clock, [(11, 100)])[1:] == ["refining: 50%, 0:00:11 elapsed"]


# --- refusals and errors --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "named"),
    [
        ("batch_size must be at least 1", "--batch-size must be at least 1"),
        ("a 4x4 puzzle must be 16 characters", "a 4x4 --puzzle must be 16 characters"),
        ("unknown noise 'noise'; known: noise", "unknown --noise 'noise'; known: noise"),
        ("the task x takes no noise", "the --task x takes no --noise"),
        ("no model at 'model'", "no --model at 'model'"),
        ("/my/task must hold noise", "/my/task must hold noise"),
        ("order must be one of noise", "order must be one of noise"),
    ],
)
def test_a_refusal_names_what_was_typed(said, named):
    words = ("--batch-size", "0", "--puzzle=1", "--noise", "x", "--task", "x", "--model", "x")
    with (
        pytest.raises(ValueError, match=f"^{re.escape(named)}$"),
        terminal.naming(typed(words)),
    ):
        raise ValueError(said)


@pytest.mark.parametrize("error", [AssertionError(), RuntimeError("Unable to initialize")])
def test_a_device_that_is_not_there_is_one_line(capsys, monkeypatch, error):
    """JAX raises either, from wherever it is first needed."""

    def devices():
        raise error

    monkeypatch.setattr(jax, "devices", devices)
    monkeypatch.setattr(jax, "config", SimpleNamespace(values={"jax_platforms": "cuda"}))
    with pytest.raises(SystemExit) as end, terminal.one_line_errors():
        devices()
    assert end.value.code == 2
    reason = f": {error}" if str(error) else ""
    assert capsys.readouterr().err == f"error: JAX has no device of JAX_PLATFORMS=cuda{reason}\n"


def test_other_errors_are_shown_whole():
    for error in (AssertionError("broken"), RuntimeError("broken")):
        with pytest.raises(type(error), match="broken"), terminal.one_line_errors():
            raise error
    assert jax.devices()
