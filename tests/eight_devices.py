"""What eight devices do; test_sharding.py runs this file in a process that has as many."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_run
from conftest import TINY
from flax import nnx
from small_run import compile_once

import ipr_jax
from ipr_jax import TRANSFORMERS, PatchTransformer, Prediction, Sampling
from ipr_jax.core.keys import rngs
from ipr_jax.models import checkpoint
from ipr_jax.runtime import sharding
from ipr_jax.sampling.order import random_order
from ipr_jax.studies import evaluate, search
from ipr_jax.tasks import get_task
from ipr_jax.training import trainer

ONE = sharding.data_mesh(jax.devices()[:1])
ALL = sharding.data_mesh()

RUN = trainer.TrainConfig(
    num_steps=4,
    batch_size=16,
    learning_rate=1e-2,
    warmup_steps=1,
    ema_decay=0.9,
    noise_levels="shared",
    log_every=1,
    save_every=2,
)
TRANSFORMER = dataclasses.replace(
    TRANSFORMERS["mini-sudoku-transformer"], width=16, num_layers=2, hidden_width=24, repeats=2
)
RUNS = {
    "U-Net": (TINY, RUN),
    "transformer": (
        TRANSFORMER,
        dataclasses.replace(
            RUN, optimizer="muon", noise_levels="sequential", per_image=True, data="device"
        ),
    ),
}
"""Architectures and how they are trained: one on batches of the host, one on the devices' own."""


# --- refinement -----------------------------------------------------------------------------------

FIRST = Sampling(steps_per_patch=2, overlap=0.25)
LATER = Sampling(steps_per_patch=3, overlap=0.5, order=random_order, stochasticity=0.9)


def fake(z, t):
    """A denoiser in which every patch hears of all others of its image."""
    everything = z.mean(axis=(1, 2), keepdims=True)
    sigma = jnp.abs(z.reshape(z.shape[0], 3, 2, 3, 2, 1)).mean(axis=(2, 4, 5)) + t
    return Prediction(jnp.tanh(z + everything), 0.5 * jnp.tanh(z), sigma)


def queue(number):
    """Samples of 3x3 patches of 2x2 pixels with any number of clues."""
    rng = np.random.default_rng(number)
    image = rng.uniform(-1, 1, (number, 6, 6, 1)).astype(np.float32)
    editable = rng.random((number, 3, 3)) < rng.random((number, 1, 1))
    return ipr_jax.sample_keys(jax.random.key(0), number), image, editable


def both(denoise, keys, image, editable, mesh, **options):
    first = ipr_jax.generate(denoise, keys, image, editable, FIRST, mesh=mesh)
    refined = ipr_jax.refine(
        denoise, keys, first.image, editable, iterations=2, sampling=LATER, mesh=mesh, **options
    )
    return jax.tree.leaves((first, refined))


@pytest.mark.parametrize("number", [9, pytest.param(64, marks=pytest.mark.heavy)])
def test_every_sample_is_what_one_device_makes_of_it(number):
    given = queue(number)

    def record(image):
        return {"mean": image.mean(axis=(1, 2, 3)), "image": image}

    one = both(fake, *given, ONE, record=record)
    for mesh in (ALL,) if number == 9 else (ALL, None):
        for got, want in zip(both(fake, *given, mesh, record=record), one, strict=True):
            np.testing.assert_array_equal(got, want)


@pytest.mark.heavy
def test_a_transformer_makes_the_same_samples_on_each():
    model = PatchTransformer(TRANSFORMER, rngs=rngs(0))
    puzzles = get_task("mini-sudoku").test_batch(0, np.arange(9))
    given = ipr_jax.sample_keys(jax.random.key(0), 9), puzzles.image, puzzles.editable
    for got, want in zip(both(model, *given, ALL), both(model, *given, ONE), strict=True):
        assert got.dtype == want.dtype
        np.testing.assert_allclose(got, want, atol=1e-4)


@pytest.mark.heavy
@pytest.mark.parametrize("number", [5, 64])
def test_a_stream_too(number):
    options = {"iterations": 3, "slots": 16, "first": FIRST, "later": LATER}
    many, one = (ipr_jax.stream(fake, *queue(number), mesh=mesh, **options) for mesh in (ALL, ONE))
    for name in ("image", "iterations", "nfe", "finite"):
        np.testing.assert_array_equal(getattr(many, name), getattr(one, name))
    assert many.slot_evaluations >= many.nfe.sum()


@pytest.mark.parametrize(
    ("driver", "options"),
    [
        pytest.param(ipr_jax.refine, {"iterations": 2}, marks=pytest.mark.heavy),
        (ipr_jax.stream, {"iterations": 2}),
        *(
            pytest.param(*(ipr_jax.solve, {"method": method, "slots": 8}), marks=pytest.mark.heavy)
            for method in (ipr_jax.Refinement(iterations=2), ipr_jax.Annealed(iterations=3))
        ),
    ],
)
def test_devices_exchange_nothing(driver, options):
    program = driver.program(fake, *queue(9), mesh=ALL, **options)
    text = program.function.lower(*program.arguments, **program.static).compile().as_text()
    assert "while" in text
    exchanged = r"all-gather|all-reduce|all-to-all|reduce-scatter|collective-permute"
    assert not re.findall(exchanged, text)
    reduced = jax.jit(jnp.sum).lower(jax.device_put(jnp.ones(8), sharding.rows(ALL)))
    assert re.findall(exchanged, reduced.compile().as_text())


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("annealed", marks=pytest.mark.heavy),
        pytest.param("bfs", marks=pytest.mark.gate),
        pytest.param("rbf", marks=pytest.mark.heavy),
    ],
)
def test_every_method_is_the_same_on_each(name):
    task, first, later = get_task("mini-sudoku"), FIRST, LATER
    method = ipr_jax.Annealed(iterations=4)
    if name != "annealed":
        method = search.made(task, name, "oracle", first=first, later=later)
    puzzles, keys = task.test_batch(0, np.arange(9)), ipr_jax.sample_keys(jax.random.key(0), 9)
    many, one = (
        ipr_jax.solve(
            small_run.fake, keys, puzzles.image, puzzles.editable, method=method, slots=8, mesh=mesh
        )
        for mesh in (ALL, ONE)
    )
    for field in ("iterations", "nfe", "nbe", "nve", "finite"):
        np.testing.assert_array_equal(getattr(many, field), getattr(one, field))
    np.testing.assert_allclose(many.image, one.image, atol=1e-5)


@pytest.mark.heavy
def test_the_shipped_model_makes_the_same_boards():
    task, model = get_task("mini-sudoku"), ipr_jax.load("mini-sudoku")
    puzzles = task.test_batch(0, np.arange(9))
    experiment = ipr_jax.Refinement(iterations=1, first=FIRST, later=FIRST)

    def boards(mesh):
        run = evaluate.evaluate(
            task, model, puzzles, experiment, jax.random.key(0), batch_size=16, mesh=mesh
        )
        return list(run)

    for got, want in zip(boards(ALL), boards(ONE), strict=True):
        np.testing.assert_allclose(got.image, want.image, atol=1e-4)
        np.testing.assert_array_equal(got.costs.nfe, want.costs.nfe)
        np.testing.assert_array_equal(got.scores["valid"], want.scores["valid"])
    assert (got.batch_size, want.batch_size) == (16, 9)


def test_meshes_and_records_that_do_not_fit_are_refused():
    given, options = queue(8), {"iterations": 1, "record": jnp.mean}
    program = ipr_jax.refine.program(fake, *given, mesh=ONE, **options)
    program.function.trace(*program.arguments, **program.static)
    with pytest.raises(ValueError, match=r"must be by sample, \[8, \.\.\.\], got \[\]"):
        ipr_jax.refine(fake, *given, mesh=ALL, **options)
    square = jax.make_mesh((2, 4), ("data", "model"))
    with pytest.raises(ValueError, match="one axis, 'data', got \\('data', 'model'\\)"):
        ipr_jax.generate(fake, *given, mesh=square)


# --- training -------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def optax_may_promote():
    with jax.numpy_dtype_promotion("standard"):
        yield


def train(made, folder, mesh, **options):
    lines = list(trainer.train(get_task("mini-sudoku"), *made, folder, mesh=mesh, **options))
    model, _ = checkpoint.open_model(folder / "model")
    return lines, jax.tree.leaves(nnx.state(model))


@pytest.mark.parametrize(
    "made",
    [
        pytest.param(RUNS["U-Net"], marks=pytest.mark.heavy, id="U-Net"),
        pytest.param(RUNS["transformer"], marks=pytest.mark.gate, id="transformer"),
    ],
)
def test_training_does_not_depend_on_the_devices(made, tmp_path, monkeypatch):
    compile_once(monkeypatch)
    assert len(jax.devices()) == 8
    lines, weights = train(made, tmp_path / "one", ONE)
    for options in ({}, {"shard_params": True}):
        folder = tmp_path / str(options)
        begun = trainer.train(get_task("mini-sudoku"), *made, folder, mesh=ALL, **options)
        assert [next(begun)["step"] for _ in range(3)] == [1, 2, 3]
        begun.close()
        resumed, found = train(made, folder, ALL, **options)
        assert [line["step"] for line in resumed] == [3, 4]
        assert resumed[-1]["total"] == pytest.approx(lines[-1]["total"], rel=1e-4)
        for got, want in zip(found, weights, strict=True):
            np.testing.assert_allclose(got, want, atol=2e-4)


@pytest.mark.parametrize("made", RUNS.values(), ids=list(RUNS))
def test_one_copy_of_the_parameters_is_split(made):
    abstract = jax.eval_shape(lambda: trainer.init(*made))
    placed = sharding.parts(ALL, abstract)
    bytes_of = [leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract)]
    shards = [
        np.prod(where.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf, where in zip(jax.tree.leaves(abstract), jax.tree.leaves(placed), strict=True)
    ]
    assert sum(shards) < 1.2 * sum(bytes_of) / 8


def test_a_batch_that_cannot_be_shared_is_refused(tmp_path):
    config = dataclasses.replace(RUN, batch_size=12)
    with pytest.raises(ValueError, match="must be a multiple of the 8 devices, got 12"):
        next(trainer.train(get_task("mini-sudoku"), TINY, config, tmp_path / "run", mesh=ALL))
    assert not (tmp_path / "run").exists()
