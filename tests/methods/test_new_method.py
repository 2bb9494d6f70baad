"""A method is one file: that of docs/methods.md gets all that the library's own has."""

import dataclasses
import hashlib
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ipr_jax
from ipr_jax import Prediction
from ipr_jax.core import patches
from ipr_jax.interrupts import PreemptionError
from ipr_jax.studies import shards
from ipr_jax.studies.evaluate import evaluate, summarise
from ipr_jax.tasks import Batch, get_task

PAGE = (Path(__file__).parents[2] / "docs" / "methods.md").read_text()
DEFINED, USED = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
TASK, PATCH = get_task("mini-sudoku"), 8


def fake(z, t):
    """An elementwise denoiser."""
    velocity = 0.9 * z * patches.expand(t, PATCH) + 0.1
    sigma = 0.1 + patches.patch_mean(jnp.abs(z[..., 0]), PATCH)
    return Prediction(velocity, 0.4 + 0.2 * jnp.tanh(z), sigma)


@pytest.fixture(scope="module")
def method():
    """As the page defines it, in a module of its own."""
    names = {"__name__": "page"}
    exec(DEFINED, names)
    return names["Remask"]()


@pytest.fixture(scope="module")
def given():
    batch = TASK.test_batch(0, np.arange(9))
    return ipr_jax.sample_keys(jax.random.key(0), 9), batch.image, batch.editable


@pytest.fixture(scope="module")
def found(method, given):
    return ipr_jax.solve(fake, *given, method=method)


def test_the_lines_of_the_page_run(method, given, found):
    keys, images, editable = given
    names = {"ipr_jax": ipr_jax, "model": fake, "Remask": type(method), "keys": keys}
    names["puzzles"] = Batch(images, editable, None)
    exec(USED, names)
    np.testing.assert_array_equal(names["found"].image, found.image)
    np.testing.assert_array_equal(found.nfe, np.where(editable.any(axis=(1, 2)), 8, 0))
    clue = ~np.kron(editable, np.ones((PATCH, PATCH), bool))
    np.testing.assert_array_equal(np.asarray(found.image)[clue], images[clue])


def test_it_streams(method, given, found):
    queued = ipr_jax.solve(fake, *given, method=method, slots=4)
    for name in ("image", "iterations", "finite", "nfe"):
        np.testing.assert_array_equal(getattr(queued, name), getattr(found, name))


def test_it_is_scored_after_every_iteration(method, given, found):
    batch = TASK.test_batch(0, np.arange(9))
    lines = list(evaluate(TASK, fake, batch, method, jax.random.key(0), batch_size=4))
    assert [summarise(line, TASK)["nfe"] for line in lines] == list(range(1, 9))
    np.testing.assert_array_equal(lines[-1].image, found.image)


def test_files_are_the_same_however_often_it_is_killed(method, tmp_path):
    run = shards.Run(
        task=TASK,
        denoise=fake,
        source=lambda indices: TASK.test_batch(0, indices),
        experiment=method,
        samples=9,
        seed=0,
        batch_size=4,
        storage=shards.Storage(shard_size=5, save_minutes=0),
    )

    def digests(folder):
        return {
            path.name: hashlib.sha256(path.read_bytes()).hexdigest()
            for path in (folder / "samples").glob("*.npz")
        }

    list(shards.refine(run, tmp_path / "whole", {}))
    rng, starts = np.random.default_rng(0), 0
    while not (tmp_path / "killed" / "manifest.json").exists():
        asked, last = 0, rng.integers(1, 12)

        def preempted(last=last):
            nonlocal asked
            asked += 1
            return asked > last

        starts += 1
        try:
            list(shards.refine(run, tmp_path / "killed", {}, preempted=preempted))
        except PreemptionError:
            continue
    assert starts > 3
    assert digests(tmp_path / "killed") == digests(tmp_path / "whole")
    assert len(digests(tmp_path / "whole")) == 2


def test_it_is_exported_with_the_batch_size_left_open(method, given, found):
    keys, image, editable = given

    def run(data, image, editable):
        keys = jax.random.wrap_key_data(data, impl="threefry2x32")
        solved = ipr_jax.solve(fake, keys, image, editable, method=method)
        return solved.image, solved.nfe

    (b,) = jax.export.symbolic_shape("b")
    data = jax.random.key_data(keys)
    shapes = (
        jax.ShapeDtypeStruct((b, *part.shape[1:]), part.dtype) for part in (data, image, editable)
    )
    program = jax.export.export(jax.jit(run), platforms=("cpu", "cuda", "tpu"))(*shapes)
    again = jax.export.deserialize(program.serialize())
    image, nfe = again.call(data[:5], image[:5], editable[:5])
    np.testing.assert_allclose(image, found.image[:5], atol=1e-6)
    np.testing.assert_array_equal(nfe, found.nfe[:5])


def test_what_does_not_fit_is_refused(method, given):
    keys, image, editable = given
    batch = TASK.test_batch(0, np.arange(2))
    with pytest.raises(ValueError, match=r"must tell passes and start, .* got a IPR"):
        evaluate(TASK, fake, batch, ipr_jax.Refinement().on((4, 4)), jax.random.key(0))
    with pytest.raises(ValueError, match=r"method must have init\(problem\) and update"):
        ipr_jax.solve(fake, *given, method="ipr", budget=1)
    derived = type("Derived", (type(method),), {})
    fields = {field.name: getattr(method, field.name) for field in dataclasses.fields(method)}
    with pytest.raises(ValueError, match="method must be a pytree, got a Derived, which is none: "):
        ipr_jax.solve(fake, *given, method=derived(**fields), budget=1)
    broken = np.full_like(image, np.nan)
    whole = np.ones_like(editable)
    for starting in (ipr_jax.Refinement(first=None), ipr_jax.Annealed(from_noise=False)):
        with pytest.raises(ValueError, match="got a magnitude of nan in sample 0"):
            ipr_jax.solve(fake, keys, broken, whole, method=starting)
