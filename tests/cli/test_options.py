"""Options that several commands share: those without effect, and the folders they decide."""

import dataclasses
import re

import pytest
from conftest import call

from ipr_jax.cli import experiment, refine, stream
from ipr_jax.cli.experiment import ExperimentOptions
from ipr_jax.cli.options import Opened, TaskOptions, same_folder
from ipr_jax.tasks import get_task


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("refine", "--task", "digits-sudoku", "--puzzle", "." * 81, "--difficulty", "easy"),
            "--puzzle is a board of its own, leave out --difficulty",
        ),
        (
            ("refine", "--task", "digits-sudoku", "--swapped", 2, "--difficulty", "easy"),
            "boards with swapped cells are refined as they are, leave out --difficulty",
        ),
        (
            ("experiment", "sudoku-corrupted", "--task", "digits-sudoku", "--difficulty", "easy"),
            "the experiment sudoku-corrupted sets its difficulty, leave out --difficulty",
        ),
        (
            ("stream", "digits-sudoku", "--patience", 2),
            "without --stop no sample leaves early, leave out --patience",
        ),
        (
            ("stream", "digits-sudoku", "--method", "annealed", "--stop", "unchanged"),
            "--method annealed takes no stopping rule, leave out --stop",
        ),
        (
            ("refine", "--swapped", 2, "--method", "annealed"),
            "boards with swapped cells are refined by --method ipr, got 'annealed'",
        ),
        (
            ("train", "mini-sudoku", "--noise-levels", "shared", "--sharpness", 2),
            "--noise-levels mean-beta alone has a sharpness, leave out --sharpness",
        ),
    ],
)
def test_options_without_effect_are_refused(work, monkeypatch, words, message):
    """Without a model of 9x9 boards at hand."""

    def opened(options, task):
        return Opened(get_task(task, difficulty=options.difficulty), None, {})

    monkeypatch.setattr(TaskOptions, "open", opened)
    for command in (refine, experiment, stream):
        monkeypatch.setattr(command, "compute_in", lambda model, precision: None)
    assert call(*words) == (2, "", f"error: {message}\n")
    assert not list(work.iterdir())


def test_a_command_that_goes_on_has_its_folder_and_another_one_another(tmp_path):
    usual = ExperimentOptions()

    def folder(**changes):
        options = dataclasses.replace(usual, **changes)
        return same_folder(tmp_path / "ratio", options, usual)

    assert folder() == folder(out=tmp_path) == tmp_path / "ratio"
    others = [folder(seed=1), folder(seed=2), folder(samples=1), folder(model="m", seed=1)]
    assert len({*others, folder()}) == 5
    assert others[0] == folder(seed=1)
    assert re.fullmatch("ratio-[0-9a-f]{8}", others[0].name)
