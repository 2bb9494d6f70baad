"""What the tests convert, and the command that does."""

import sys

import jax
import numpy as np
import torch_writer
from conftest import GOLDEN, PREFIXES, golden_config, tensors_of
from flax import nnx

from convert import __main__ as command
from convert import formats
from ipr_jax import ModelConfig
from ipr_jax.models.networks import build

EVEN = GOLDEN / "tiny_even" / "last.ckpt"
MNIST = GOLDEN / "classifiers" / "mnist_classifier.pth"
EVEN_TENSORS = tensors_of(EVEN, PREFIXES["ema"])
MNIST_TENSORS = tensors_of(MNIST)
FLAGS = {
    name: {
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "head_width": config.head_width,
    }
    for name in ("tiny_even", "tiny_sudoku")
    for config in [golden_config(name)]
}
CLUES = ModelConfig(
    image_size=(16, 16),
    channels=1,
    patch_size=16,
    widths=(32, 64),
    attention=(False, True),
    num_blocks=1,
    time_width=32,
    num_frequencies=16,
    head_width=16,
    concat_clues=True,
)
"""Image-level, with its clues as channels of the input."""


def words(given):
    """Fields of a configuration as options of the command."""
    for name, value in given.items():
        yield f"--{name.replace('_', '-')}"
        yield from map(str, value if isinstance(value, tuple) else [value])


def random_tensors(config, seed=0):
    """A state dict of random numbers, the repeated tensors the same objects."""
    rng = np.random.default_rng(seed)
    leaves = dict(nnx.to_flat_state(nnx.state(nnx.eval_shape(lambda: build(config)))))
    tensors = {}
    for entry in formats.of_config(config).table(config):
        array = rng.standard_normal(entry.torch_shape(leaves[entry.path].shape), np.float32)
        array /= max(1, array[0].size) ** 0.5
        if entry.names[0].endswith("running_var"):
            array = np.abs(array) + 1
        tensors |= dict.fromkeys(entry.names, array)
    return tensors


def stored(tensors):
    """Arrays as ``torch_writer.save`` takes them."""
    return {
        name: torch_writer.tensor(
            torch_writer.storage(array, str(id(array))),
            array.shape,
            tuple(step // array.itemsize for step in array.strides),
        )
        for name, array in tensors.items()
    }


def save_tensors(path, tensors):
    return torch_writer.save(path, stored(tensors))


def run(monkeypatch, *arguments):
    """Run the command line; its exit code."""
    monkeypatch.setattr(sys, "argv", ["convert", *map(str, arguments)])
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    try:
        command.main()
    except SystemExit as stop:
        return stop.code
    return 0


def assert_same(a, b):
    """Two networks have the same configuration and the same bits."""
    assert a.config == b.config
    left, right = (nnx.to_pure_dict(nnx.state(network)) for network in (a, b))
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for one, other in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_array_equal(
            np.asarray(one).view(np.uint32), np.asarray(other).view(np.uint32)
        )
