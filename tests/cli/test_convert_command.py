"""The command convert, of the installed package."""

import jax
import numpy as np
from conftest import call
from flax import nnx
from short_runs import save_random

from ipr_jax.models.networks import open_network
from ipr_jax.tasks.mnist_classifier import MNISTConfig


def test_models_are_converted_by_the_command_as_well(work):
    """In the package that is installed: what there is to convert is tested in tests/convert."""
    save_random(work / "model", MNISTConfig())
    code, out, err = call("convert", "export", "model", "there.safetensors")
    assert (code, err) == (0, "")
    assert out.startswith("written: there.safetensors, ")
    code, out, err = call("convert", "import", "there.safetensors", "back")
    assert (code, err) == (0, "")
    assert out.endswith("written: back\n")
    before, after = (nnx.state(open_network(name)[0]) for name in ("model", "back"))
    jax.tree.map(np.testing.assert_array_equal, before, after)
    message = "error: unknown way 'swap'; known: import, export, verify\n"
    assert call("convert", "swap") == (2, "", message)
