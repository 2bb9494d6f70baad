"""Refinement in a file: the program of the library, without the library."""

import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY, call

import ipr_jax
from ipr_jax.methods import export
from ipr_jax.models.checkpoint import SHIPPED

DOCUMENT = (Path(__file__).parents[2] / "docs" / "tpu.md").read_text()
(SNIPPET,) = (
    block
    for block in re.findall(r"^```python\n(.*?)^```$", DOCUMENT, re.DOTALL | re.MULTILINE)
    if "deserialize" in block
)
REST = """
import sys
import numpy as np
other = np.load("other.npz")
for name, found in {
    "all.npz": result,
    "clues.npz": refine(jax.random.key_data(keys)[:3], other["image"], other["editable"]),
}.items():
    np.savez(name, allow_pickle=False, **found)
assert not {"ipr_jax", "flax"} & set(sys.modules)
"""
"""A second batch of another size, and that no library was there."""


@pytest.mark.heavy
def test_a_method_with_a_memory_is_exported(tiny_model, rng):
    method = ipr_jax.Annealed(iterations=3, cycles=2, finish_steps=2)
    program = jax.export.deserialize(export.serialize(tiny_model, method))
    image = rng.uniform(-1, 1, (3, *TINY.image_shape)).astype(np.float32)
    editable, keys = rng.random((3, *TINY.grid)) < 0.7, ipr_jax.sample_keys(jax.random.key(0), 3)
    found = program.call(jax.random.key_data(keys), image, editable)
    want = ipr_jax.solve(tiny_model, keys, image, editable, method=method)
    assert set(found) == {"refined", "nfe", "finite"}
    np.testing.assert_allclose(found["refined"], want.image, atol=2e-5)
    np.testing.assert_array_equal(found["nfe"], want.nfe)


@pytest.mark.gate
def test_the_documented_lines_run_without_the_library_and_equal_it(
    tiny_folder, tiny_model, rng, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    code, out, err = call(
        *("export", tiny_folder, "mini-sudoku.program", "--task", "mini-sudoku"),
        *("--iterations", 2, "--ratio", 0.5, "--first-steps-per-patch", 1, "--steps-per-patch", 2),
    )
    assert (code, err) == (0, "")
    assert out.startswith("written: mini-sudoku.program (0.")
    assert [path.name for path in tmp_path.iterdir()] == ["mini-sudoku.program"]
    image = rng.uniform(-1, 1, (3, *TINY.image_shape)).astype(np.float32)
    editable = rng.random((3, *TINY.grid)) < 0.7
    np.savez("other.npz", allow_pickle=False, image=image, editable=editable)
    run = [sys.executable, "-c", SNIPPET + REST]
    quick = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    done = subprocess.run(run, capture_output=True, text=True, timeout=120, env=quick)
    assert done.returncode == 0, done.stderr

    nothing = np.zeros((16, *TINY.image_shape), np.float32), np.ones((16, *TINY.grid), bool)
    image, editable = (
        np.concatenate(parts) for parts in zip(nothing, (image, editable), strict=True)
    )
    keys = ipr_jax.sample_keys(jax.random.key(0), 16)
    keys = jnp.concatenate([keys, keys[:3]])

    @jax.jit
    def both(keys, image, editable):
        few = ipr_jax.Sampling(steps_per_patch=1, overlap=0.0)
        first = ipr_jax.generate(tiny_model, keys, image, editable, few)
        more = ipr_jax.Sampling(steps_per_patch=2)
        return first, ipr_jax.refine(
            tiny_model, keys, first.image, editable, iterations=2, ratio=0.5, sampling=more
        )

    first, refined = both(keys, image, editable)
    assert (refined.image != first.image).any(axis=(1, 2, 3)).all()
    for name, rows in (("all.npz", slice(16)), ("clues.npz", slice(16, 19))):
        with np.load(name) as file:
            assert set(file) == {"first_pass", "refined", "nfe", "finite"}
            np.testing.assert_allclose(file["first_pass"], first.image[rows], atol=2e-5)
            np.testing.assert_allclose(file["refined"], refined.image[rows], atol=2e-5)
            np.testing.assert_array_equal(
                file["nfe"], first.nfe[rows] + refined.nfe[:, rows].sum(0)
            )
            assert file["finite"].all()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("nope", "out"),
            f"no model at 'nope': give a model folder or one of {list(SHIPPED)}",
        ),
        (("mini-sudoku", "old"), "old exists and is not overwritten"),
        (("mini-sudoku", "none/out"), "none is not a folder, create it first"),
        (("mini-sudoku", "out", "--ratio", "0"), "--ratio must be in (0, 1], got 0.0"),
        (("mini-sudoku", "out", "--order", "x"), "unknown --order 'x'; known: certain, "),
        (("mini-sudoku", "out", "--task", "x"), "unknown --task 'x'; known: "),
        (("{untold}", "out"), "does not tell its task, give --task"),
    ],
)
def test_bad_words_are_refused_and_nothing_is_written(
    words, message, tiny_folder, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "old").write_text("as it was")
    code, out, err = call("export", *(word.format(untold=tiny_folder) for word in words))
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
    assert (tmp_path / "old").read_text() == "as it was"
