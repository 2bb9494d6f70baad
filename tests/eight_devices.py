"""What eight devices do; test_sharding.py runs this file in a process that has as many."""

import dataclasses

import jax
import numpy as np
import pytest
from conftest import TINY
from flax import nnx

from ipr_jax import checkpoint, sharding
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


@pytest.fixture(autouse=True)
def optax_may_promote():
    with jax.numpy_dtype_promotion("standard"):
        yield


def train(folder, mesh, **options):
    lines = list(trainer.train(get_task("mini-sudoku"), TINY, RUN, folder, mesh=mesh, **options))
    model, _ = checkpoint.open_model(folder / "model")
    return lines, jax.tree.leaves(nnx.state(model))


def test_training_does_not_depend_on_the_devices(tmp_path):
    assert len(jax.devices()) == 8
    lines, weights = train(tmp_path / "one", ONE)
    for options in ({}, {"shard_params": True}):
        folder = tmp_path / str(options)
        begun = trainer.train(get_task("mini-sudoku"), TINY, RUN, folder, mesh=ALL, **options)
        assert [next(begun)["step"] for _ in range(3)] == [1, 2, 3]
        begun.close()
        resumed, found = train(folder, ALL, **options)
        assert [line["step"] for line in resumed] == [3, 4]
        assert resumed[-1]["total"] == pytest.approx(lines[-1]["total"], rel=1e-4)
        for got, want in zip(found, weights, strict=True):
            np.testing.assert_allclose(got, want, atol=2e-4)


def test_one_copy_of_the_parameters_is_split():
    abstract = jax.eval_shape(lambda: trainer.init(TINY, RUN))
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
