"""What the documents claim and a computer can check: commands, and costs from the schedule."""

import dataclasses
import re
import tomllib
from pathlib import Path

import numpy as np
import pytest

from ipr_jax.cli.evaluate import EvaluateOptions
from ipr_jax.cli.experiment import ExperimentOptions
from ipr_jax.cli.export import ExportOptions
from ipr_jax.cli.refine import RefineOptions
from ipr_jax.cli.stream import StreamOptions
from ipr_jax.methods import selection
from ipr_jax.studies import experiments
from ipr_jax.tasks import TASKS, get_task

DOCS = [
    Path(__file__).parents[1] / name for name in ("README.md", "docs/reproduce.md", "docs/tpu.md")
]
REPRODUCE = DOCS[1].read_text()


def rows(after):
    """The cells of the last table below a heading, without its head."""
    section = REPRODUCE.partition(f"## {after}\n")[2].partition("\n## ")[0]
    table = section.rpartition("|---|\n")[2].partition("\n\n")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table]


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_commands_exist(path):
    text = path.read_text()
    named = re.findall(
        r"ipr-jax (\w+)(?: ([a-z][\w-]*))?((?: --[\w-]+(?: [^\s`-][^\s`]*)?)*)", text
    )
    assert named
    options = {
        "refine": RefineOptions,
        "evaluate": EvaluateOptions,
        "stream": StreamOptions,
        "experiment": ExperimentOptions,
        "export": ExportOptions,
    }
    for command, name, given in named:
        assert command in (*options, "train", "info", "report")
        if command == "experiment" and name:
            assert name in experiments.EXPERIMENTS
        if command in ("evaluate", "stream") and name:
            assert name in TASKS
        known = {field.name for field in dataclasses.fields(options[command])} if given else set()
        for option in re.findall(r"--([\w-]+)", given):
            assert option == "help" or option.replace("-", "_") in known


def test_every_experiment_is_described():
    for name in experiments.EXPERIMENTS:
        assert f"`ipr-jax experiment {name}`" in REPRODUCE


SUDOKU = get_task("mini-sudoku")
HARD = range(55, 82)
"""Cells to fill in, of 81, with 0 to 26 given ones."""


@pytest.mark.parametrize("row", rows("Cost"), ids=lambda row: f"{row[0]}, {row[1]}")
def test_costs_follow_from_the_schedule(row):
    name, arm, first, later, total, gflop, pflop = row
    editable = {"mnist-sudoku": HARD, "counting-polygons": [256], "even-pixels": [64]}[name]
    task = dataclasses.replace(SUDOKU, name=name)
    made = experiments.as_published(task, 50)
    if arm.startswith("ratio"):
        made = dataclasses.replace(made, ratio=float(arm.split()[1]))
    else:
        made, editable = dataclasses.replace(made, first=None), [81]
    sizes = selection.region_sizes(256, made.ratio)
    steps = made.later.settings(256).plan.num_steps
    begun = 0 if made.first is None else made.first.settings(256).plan.num_steps[editable].mean()
    each = steps[sizes[editable]].mean()
    assert (first, later) == (f"{begun:.0f}", f"{each:.1f}")
    assert total == f"{begun + 50 * each:.0f}"
    assert float(pflop) == pytest.approx(500 * float(gflop) * (begun + 50 * each) / 1e6, rel=1e-2)


def test_published_numbers_are_those_of_the_experiments():
    said = {tuple(row[1:4]) for row in rows("The paper's numbers")}
    ratios = experiments.ratio(SUDOKU, 50).published["valid"]
    for label, numbers in ratios.items():
        row = (f"valid boards, ratio {label}", "55.8%", f"{numbers[50]:.1%}")
        assert row in said
    for score, (start, end) in {
        "numbers match (`consistent`)": np.array([*experiments.PUBLISHED["consistent"].values()]),
        "saturation std": [*experiments.PUBLISHED["saturation_std"].values()],
        "value std": [*experiments.PUBLISHED["value_std"].values()],
    }.items():
        shown = [f"{value:.1%}" if value > 0.1 else f"{value}" for value in (start, end)]
        assert (score, *shown) in said


ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_the_version_is_that_of_one_place():
    assert f"\nversion: {PROJECT['version']}\n" in (ROOT / "CITATION.cff").read_text()
    versions = re.findall(r"^## (\S+),", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert versions[0] == PROJECT["version"]
    for path in (ROOT / "ipr_jax").rglob("*.py"):
        assert f'"{PROJECT["version"]}"' not in path.read_text(), path


def test_the_oldest_versions_are_those_of_the_project():
    table = (ROOT / "CONTRIBUTING.md").read_text().partition("## Versions that are tested")[2]
    listed = dict(re.findall(r"^\| ([\w-]+)(?:, jaxlib)? \| ([\d.]+) \|", table, re.MULTILINE))
    needed = dict(line.split(">=") for line in PROJECT["dependencies"])
    assert listed.pop("Python") == PROJECT["requires-python"].removeprefix(">=")
    assert listed == {name: needed[name] for name in listed}
    assert len(listed) == 5
