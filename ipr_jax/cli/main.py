"""The command line ``ipr-jax``: a table of its commands, and how it begins and ends."""

import inspect
import io
import logging
import os
import sys
from collections.abc import Callable, Iterable
from typing import Annotated, Any, NamedTuple

import tyro

from ipr_jax.cli import convert, evaluate, experiment, export, info, refine, report, stream, train
from ipr_jax.cli.hosts import ended_together
from ipr_jax.cli.options import typed
from ipr_jax.cli.terminal import naming, one_line_errors, say, unraisable
from ipr_jax.runtime import cache, environment, files
from ipr_jax.studies.experiments import EXPERIMENTS
from ipr_jax.tasks import TASKS
from ipr_jax.training import RECIPES


class Named(NamedTuple):
    """A command whose options depend on the word that follows it.

    Attributes:
        command_of: makes the command of a word, or raises ValueError.
        about: what it does, the beginning of a sentence.
        kind: what the word is called.
        words: those that there are.
    """

    command_of: Callable[[str], Callable[..., Any]]
    about: str
    kind: str
    words: Iterable[str]

    def without(self, name: str) -> Callable[..., Any]:
        """What the command does without its word, or for its help alone: tell of the word."""

        def tell(**given: str) -> None:
            self.command_of(given[self.kind])

        tell.__doc__ = (
            f"{self.about}; ``ipr-jax {name} {self.kind.upper()} --help`` lists the options."
        )
        word = tyro.conf.arg(metavar=self.kind.upper(), help=f"one of {', '.join(self.words)}.")
        annotation = Annotated[tyro.conf.Positional[str], word]
        tell.__annotations__ = {self.kind: annotation}
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        parameter = inspect.Parameter(self.kind, kind, annotation=annotation)
        tell.__signature__ = inspect.Signature([parameter])
        return tell


COMMANDS: dict[str, Named | Callable[..., Any]] = {
    "refine": refine.command,
    "evaluate": Named(evaluate.command_of, "Score a model on a task", "task", TASKS),
    "stream": Named(stream.command_of, "Refine until a rule lets samples leave", "task", TASKS),
    "experiment": Named(
        experiment.command_of, "Run an experiment of the papers", "name", EXPERIMENTS
    ),
    "train": Named(train.command_of, "Train a denoiser by a recipe", "name", RECIPES),
    "report": report.report,
    "convert": Named(convert.command_of, "Convert PyTorch checkpoints", "way", convert.WAYS),
    "info": info.info,
    "export": export.export_program,
}
"""All commands."""


def main() -> None:
    """Do what the command line says: bad arguments end with one clear line."""
    words = sys.argv[1:]
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # what it cannot show is no error
    for library in ("absl", "asyncio", "matplotlib"):  # what Orbax logs, it also raises
        logging.getLogger(library).setLevel(logging.CRITICAL)
    sys.unraisablehook = unraisable
    with ended_together(), one_line_errors(), naming(typed(words)):
        for name in (*words, os.getcwd()):
            files.utf8(name)
        if words == ["--version"]:
            say(f"ipr_jax {environment.version()}")
            return
        cache.enable()
        named = COMMANDS.get(words[0]) if len(words) > 1 and not words[1].startswith("-") else None
        if isinstance(named, Named):
            command = named.command_of(words[1])
            tyro.cli(command, prog=f"ipr-jax {words[0]} {words[1]}", args=words[2:])
            return
        commands = {
            name: each.without(name) if isinstance(each, Named) else each
            for name, each in COMMANDS.items()
        }
        about = "Iterative Partial Refinement; ipr-jax --version prints the version."
        tyro.extras.subcommand_cli_from_dict(
            commands, prog="ipr-jax", description=about, args=words
        )
