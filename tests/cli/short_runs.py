"""What tests of several commands share: a short refinement, names, the content of folders."""

import dataclasses

import jax
import numpy as np
from flax import nnx

import ipr_jax
from ipr_jax.models import checkpoint
from ipr_jax.models.networks import build
from ipr_jax.studies import shards

PAPER = ipr_jax.Refinement(iterations=2)
METHOD = dataclasses.replace(
    PAPER,
    first=dataclasses.replace(PAPER.first, steps_per_patch=1),
    later=dataclasses.replace(PAPER.later, steps_per_patch=1),
)
"""What ``conftest.SHORT`` says."""
EXAMPLE = "1..4 .... .3.. ...."
SHIPPED = [
    "mini-sudoku",
    "mini-sudoku-transformer",
    "digits-sudoku",
    "mnist-sudoku-transformer",
    "even-pixels-transformer",
]


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def samples_of(folder):
    [found] = shards.read(folder)
    return found


def save_random(folder, config):
    abstract = nnx.state(nnx.eval_shape(lambda: build(config)))
    params = jax.tree.map(lambda leaf: np.full(leaf.shape, 0.1, np.float32), abstract)
    checkpoint.save(folder, config, params, {"made": "of tenths"})
    return folder
