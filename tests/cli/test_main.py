"""The command line as a whole: help, version, what is not understood, warnings, errors."""

import dataclasses
import importlib.metadata
import os
import re
import subprocess
import sys
import warnings

import jax
import pytest
from conftest import call

from ipr_jax import __main__
from ipr_jax.cli.evaluate import EvaluateOptions
from ipr_jax.cli.experiment import ExperimentOptions
from ipr_jax.cli.refine import RefineOptions
from ipr_jax.cli.stream import StreamOptions
from ipr_jax.cli.terminal import one_line_errors
from ipr_jax.studies import experiments
from ipr_jax.tasks import TASKS
from ipr_jax.training.recipes import RECIPES
from ipr_jax.training.trainer import TrainConfig


@pytest.mark.parametrize(
    ("words", "fields"),
    [
        (("refine",), dataclasses.fields(RefineOptions)),
        (("evaluate", "even-pixels"), dataclasses.fields(EvaluateOptions)),
        (("stream", "even-pixels"), dataclasses.fields(StreamOptions)),
        (("experiment", "samplers"), dataclasses.fields(ExperimentOptions)),
        (("train", "mini-sudoku"), dataclasses.fields(TrainConfig)),
    ],
)
def test_help_explains_every_option(words, fields):
    code, out, err = call(*words, "--help")
    assert (code, err) == (0, "")
    said = " ".join(out.replace("│", " ").split())
    for field in fields:
        option = f"--{field.name.replace('_', '-')}"
        assert option in said
        bare = rf"{option}(, --no-\S+)?( \S+)? \(default"
        assert not re.search(bare, said), "a description stands before the default"
    assert "Attributes" not in said


def test_help_names_the_commands():
    code, out, _ = call("--help")
    assert code == 0
    for command in ("refine", "evaluate", "stream", "experiment", "train", "info", "convert"):
        assert command in out
    for words, names in {
        "train NAME": RECIPES,
        "evaluate TASK": TASKS,
        "stream TASK": TASKS,
        "experiment NAME": experiments.EXPERIMENTS,
        "convert WAY": ("import", "export", "verify"),
    }.items():
        code, out, _ = call(words.split()[0], "--help")
        said = " ".join(out.replace("│", " ").split())
        assert code == 0
        assert f"ipr-jax {words} --help" in said
        assert f"one of {', '.join(names)}." in said


def test_the_version_is_that_of_the_package():
    said = f"ipr_jax {importlib.metadata.version('ipr_jax')}\n"
    assert call("--version") == (0, said, "")
    assert "ipr-jax --version" in call("--help")[1]


@pytest.mark.parametrize(
    "words",
    [(), ("nope",), ("train",), ("evaluate",), ("stream",), ("experiment",), ("refine", "--nope")],
)
def test_what_is_not_understood_ends_with_2(work, words):
    code, out, err = call(*words)
    assert code == 2
    assert "Traceback" not in out + err
    assert not list(work.iterdir())


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED:\nfull"),
            ": RESOURCE_EXHAUSTED: full",
        ),
        (MemoryError(), ""),
    ],
)
def test_warnings_and_a_full_memory_are_one_line(capsys, error, said):
    @one_line_errors()
    def command():
        warnings.simplefilter("always")
        warnings.warn("so it\nis", stacklevel=1)
        raise error

    with pytest.raises(SystemExit) as end:
        command()
    assert end.value.code == 2
    assert capsys.readouterr().err == f"warning: so it is\nerror: out of memory{said}\n"


def test_other_errors_of_the_device_are_shown_whole():
    error = jax.errors.JaxRuntimeError("INTERNAL: broken")
    with pytest.raises(jax.errors.JaxRuntimeError, match="broken"), one_line_errors():
        raise error


def test_the_installed_command_is_this_one(work):
    (command,) = importlib.metadata.entry_points(group="console_scripts", name="ipr-jax")
    assert command.load() is __main__.main
    words = [sys.executable, "-m", "ipr_jax", "refine"]
    bare = {"capture_output": True, "text": True, "cwd": work, "timeout": 120}
    done = subprocess.run(words, env=os.environ | {"JAX_PLATFORMS": "abacus"}, **bare)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: JAX has no device of JAX_PLATFORMS=abacus: Unable to ")
    assert done.stderr.count("\n") == 1
    assert not list(work.iterdir())
