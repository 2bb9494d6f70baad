"""The lines of the pages on annealed refinement and on search, on the shipped model."""

import re
from pathlib import Path

import jax
import numpy as np
import pytest

import ipr_jax
from ipr_jax.tasks import get_task

DOCS = Path(__file__).parents[2] / "docs"
TASK = get_task("mini-sudoku")


@pytest.mark.heavy
@pytest.mark.parametrize(("page", "blocks"), [("annealed.md", 1), ("search.md", 3)])
def test_the_lines_of_a_page_solve_puzzles(page, blocks):
    puzzles = TASK.test_batch(0, np.arange(8))
    model = ipr_jax.load("mini-sudoku-transformer")
    keys = ipr_jax.sample_keys(jax.random.key(0), 8)
    names = {"ipr_jax": ipr_jax, "model": model, "keys": keys, "puzzles": puzzles}
    code = re.findall(r"^```python\n(.*?)^```$", (DOCS / page).read_text(), re.DOTALL | re.M)
    assert len(code) == blocks
    for lines in code:
        names.pop("found", None)
        exec(compile(lines, page, "exec"), names)
        found = names.get("found") or ipr_jax.solve(
            model, keys, puzzles.image, puzzles.editable, method=names["method"]
        )
        assert TASK.score(found.image)["valid"].sum() >= 6
