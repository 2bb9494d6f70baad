"""The lines of the pages on annealed refinement and on search, on the shipped model."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"

BEFORE = """
import jax
import numpy as np

import ipr_jax
from ipr_jax.tasks import get_task

task = get_task("mini-sudoku")
puzzles = task.test_batch(0, np.arange(4))
model = ipr_jax.load("mini-sudoku-transformer")
keys = ipr_jax.sample_keys(jax.random.key(0), 4)
found = None
"""

AFTER = """
if found is None:
    found = ipr_jax.solve(model, keys, puzzles.image, puzzles.editable, method=method)
print(task.score(found.image)["valid"].sum())
found = None
"""


@pytest.mark.gate
@pytest.mark.parametrize(("page", "blocks"), [("annealed.md", 1), ("search.md", 4)])
def test_the_lines_of_a_page_solve_puzzles(page, blocks, tmp_path):
    """In a program of their own, with XLA as users have it: they take hundreds of evaluations."""
    code = re.findall(r"^```python\n(.*?)^```$", (DOCS / page).read_text(), re.DOTALL | re.M)
    assert len(code) == blocks
    program = BEFORE + "".join(lines + AFTER for lines in code)
    run = [sys.executable, "-c", program]
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    done = subprocess.run(
        run, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=600
    )
    assert done.returncode == 0, done.stderr
    solved = [int(line) for line in done.stdout.splitlines()]
    assert len(solved) == blocks
    assert min(solved) >= 3
