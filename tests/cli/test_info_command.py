"""The command info: what is in a model, and on what it runs."""

import dataclasses
import importlib.metadata
import json
import re
import sys

import jax
from conftest import TINY, call
from flax import nnx
from short_runs import SHIPPED, save_random

from ipr_jax.models import checkpoint
from ipr_jax.models.config import PRESETS
from ipr_jax.models.networks import build
from ipr_jax.tasks.mnist_classifier import MNISTConfig


def rows_of(out):
    """The printed table: its first column to its second."""
    lines = [re.split(r" {2,}", line.strip(), maxsplit=1) for line in out.splitlines()]
    return {line[0]: line[1] for line in lines if len(line) == 2}


def test_info_prints_what_is_in_a_model():
    code, out, err = call("info", "mini-sudoku")
    assert (code, err) == (0, "")
    rows = rows_of(out)
    config = PRESETS["mini-sudoku"]
    assert {name: rows[name] for name in vars(config)} == {
        name: str(value) for name, value in vars(config).items()
    }
    assert rows["network"] == "SRM"
    assert rows["noise levels"] == "4 x 4, one per patch"
    assert rows["parameters"] == "760,915"
    assert rows["per evaluation of an image"] == "0.197 GFLOP"
    assert rows["task"] == "mini-sudoku"
    assert json.loads(rows["training"])["num_steps"] == 5000


def test_info_of_an_image_level_model_with_clues(work):
    config = dataclasses.replace(TINY, patch_size=32, concat_clues=True)
    save_random(work / "model", config)
    code, out, _ = call("info", "model")
    assert code == 0
    assert rows_of(out)["noise levels"] == "one for the image"


def test_info_of_a_classifier(work):
    network = build(MNISTConfig())
    checkpoint.save(work / "model", network.config, nnx.state(network), {"source": "nowhere"})
    code, out, _ = call("info", "model")
    assert code == 0
    rows = rows_of(out)
    assert rows["network"] == "MNISTClassifier"
    assert rows["parameters"] == f"{320 + 18_496 + 401_536 + 1_290:,}"
    assert rows["source"] == "nowhere"


def test_info_of_nothing_is_one_line():
    message = f"error: no model at 'nothing': give a model folder or one of {SHIPPED}\n"
    assert call("info", "nothing") == (2, "", message)


def test_info_of_the_environment_is_plain_text():
    """What the form for faults asks for."""
    code, out, err = call("info", "--environment")
    assert (code, err) == (0, "")
    facts = dict(line.split(": ", 1) for line in out.splitlines())
    for package in ("ipr_jax", "jax", "jaxlib", "flax", "numpy", "orbax-checkpoint"):
        assert facts[package] == importlib.metadata.version(package)
    assert facts["device"] == f"{jax.local_device_count()} x cpu"
    assert facts["backend"] == "cpu"
    assert facts["python"] == sys.version.split()[0]
    assert facts["JAX_ENABLE_COMPILATION_CACHE"] == "false"
    for words in ((), ("mini-sudoku", "--environment")):
        message = "error: name a MODEL or give --environment\n"
        assert call("info", *words) == (2, "", message)
