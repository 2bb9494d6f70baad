"""What the documents claim and a computer can check: commands, and costs from the schedule."""

import dataclasses
import importlib
import json
import os
import re
import subprocess
import tomllib
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import browsed

import ipr_jax
from convert.__main__ import ImportArgs
from ipr_jax.cli.convert import WAYS
from ipr_jax.cli.evaluate import EvaluateOptions
from ipr_jax.cli.experiment import ExperimentOptions
from ipr_jax.cli.export import ExportOptions
from ipr_jax.cli.hosts import HostOptions
from ipr_jax.cli.main import COMMANDS
from ipr_jax.cli.refine import RefineOptions
from ipr_jax.cli.stream import StreamOptions
from ipr_jax.methods import selection
from ipr_jax.studies import experiments
from ipr_jax.tasks import TASKS, get_task
from ipr_jax.training import RECIPES
from ipr_jax.training.trainer import TrainConfig

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
DOCS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
DOCS += NOTEBOOKS
REPRODUCE = (ROOT / "docs" / "reproduce.md").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def fields(*classes):
    return {field.name for each in classes for field in dataclasses.fields(each)}


OPTIONS = {
    "refine": fields(RefineOptions),
    "evaluate": fields(EvaluateOptions),
    "stream": fields(StreamOptions),
    "experiment": fields(ExperimentOptions),
    "export": fields(ExportOptions),
    "train": fields(TrainConfig, HostOptions) | {"out", "files", "num_workers", "shard_params"},
    "convert": fields(ImportArgs),
    "info": {"environment"},
    "report": set(),
}
"""Every command, and its options."""


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
    for command, name, given in named:
        words = {"experiment": experiments.EXPERIMENTS, "train": RECIPES, "convert": WAYS}
        words |= {"evaluate": TASKS, "stream": TASKS}
        assert command in OPTIONS
        assert not name or command not in words or name in words[command]
        for option in re.findall(r"--([\w-]+)", given):
            assert option == "help" or option.replace("-", "_") in OPTIONS[command]


def test_all_commands_are_listed():
    listed = (ROOT / "docs" / "commands.md").read_text()
    assert OPTIONS.keys() == COMMANDS.keys()
    for command in COMMANDS:
        assert f"| `ipr-jax {command} " in listed or f"| `ipr-jax {command}`" in listed


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


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_links_lead_to_files(path):
    links = re.findall(r"\]\(([^)#\s]+)", path.read_text())
    gone = [link for link in links if "://" not in link and not (path.parent / link).exists()]
    assert not [link for link in gone if link not in ("changelog.md", "contributing.md")]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_notebooks_are_shown_as_they_were_run(path):
    """From the first cell to the last, without a warning or a place on the machine; and small."""
    assert path.stat().st_size < 100_000
    assert f"notebooks/{path.stem}.md\n" in (ROOT / "mkdocs.yml").read_text()
    cells = json.loads(path.read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == [*range(1, len(code) + 1)]
    outputs = [output for cell in code for output in cell["outputs"]]
    printed = [output for output in outputs if output["output_type"] == "stream"]
    assert all("image/png" in output["data"] for output in outputs if output not in printed)
    assert {output["name"] for output in printed} == {"stdout"}
    for output in printed:
        assert not re.search(r"(?<![\w.])/\w+/|[Ww]arning", "".join(output["text"]))


@pytest.mark.browser
@pytest.mark.parametrize("page", ["index.html", "notebooks/first_puzzle.html"])
def test_the_site_is_searched_from_disk(page, tmp_path):
    """Needs the extra ``docs``, too."""
    from playwright.sync_api import expect

    words = ["mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    subprocess.run(words, cwd=ROOT, env=environment, check=True, capture_output=True)
    with browsed(tmp_path / page) as tab:
        tab.locator(".md-search__input").click()
        tab.keyboard.type("annealed refinement")
        found = tab.locator(".md-search-result__item").filter(has_text="Annealed refinement")
        expect(found).not_to_have_count(0)
        found.first.locator("a").first.click()
        tab.wait_for_url("**/annealed.html?h=*")
        expect(tab.locator("article mark")).not_to_have_count(0)


def test_the_reference_has_every_public_name():
    listed = re.findall(r"^::: (\S+)$", (ROOT / "docs" / "reference.md").read_text(), re.MULTILINE)
    assert set(ipr_jax.__all__) <= {name.rpartition(".")[2] for name in listed}
    for name in listed:
        module, _, attribute = name.rpartition(".")
        assert hasattr(importlib.import_module(module), attribute)


def code_of(page):
    """The Python of a page of the documentation."""
    text = (ROOT / "docs" / page).read_text()
    return re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def test_the_example_of_python_is_that_of_the_readme():
    assert f"```python\n{code_of('python.md')[0]}```" in (ROOT / "README.md").read_text()


def test_the_denoiser_of_the_page_makes_what_it_knows(capsys):
    (code,) = code_of("denoiser.md")
    exec(compile(code, "denoiser.md", "exec"), {"__name__": "page"})
    assert float(capsys.readouterr().out) == 1


def test_the_task_of_the_page_scores():
    code, _ = code_of("tasks.md")
    exec(compile(code, "tasks.md", "exec"), names := {"__name__": "page"})
    batch = names["TASK"].test_batch(0, np.arange(5))
    assert names["TASK"].score(batch.image)["striped"].all()
    found = names["TASK"].score(jnp.asarray(batch.image).at[:, 2, 1].multiply(-1))
    assert not found["striped"].any()
    assert (found["wrong_rows"] == 1).all()


def test_the_task_of_the_page_is_evaluated_run_and_shown(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    exec(compile("\n".join(code_of("tasks.md")), "tasks.md", "exec"), {"__name__": "page"})
    assert capsys.readouterr().out.count("'striped_rate'") == 3
    assert {"manifest.json", "report.html"} <= {path.name for path in Path("stripes").iterdir()}
