"""Models on disk: bit for bit the same, whole or absent, and damage is named."""

import re
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY
from flax import nnx

import ipr_jax
from ipr_jax import ModelConfig, checkpoint

PROVENANCE = {"task": "none", "settings": {"seed": 3, "widths": [1, 2]}, "note": None}


@pytest.fixture(scope="module")
def saved(tmp_path_factory, tiny_model):
    path = tmp_path_factory.mktemp("models") / "model"
    checkpoint.save(path, TINY, nnx.state(tiny_model), PROVENANCE)
    return path


@pytest.fixture
def copied(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "copy")


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_loaded_model_is_the_saved_one(saved, tiny_model):
    loaded, provenance = checkpoint.open_model(saved)
    assert loaded.config == TINY
    assert provenance == PROVENANCE
    assert jax.tree.structure(loaded) == jax.tree.structure(tiny_model)
    for want, got in zip(jax.tree.leaves(tiny_model), jax.tree.leaves(loaded), strict=True):
        assert got.dtype == want.dtype == jnp.float32
        np.testing.assert_array_equal(got, want)


def test_every_field_of_the_architecture_is_kept(tmp_path):
    config = ModelConfig(
        image_size=(6, 4),
        channels=2,
        patch_size=2,
        widths=(6, 3),
        attention=(False, True),
        num_blocks=1,
        time_width=5,
        num_frequencies=4,
        head_width=3,
        num_groups=3,
        dropout=0.25,
    )
    model = nnx.eval_shape(lambda: ipr_jax.SRM(config, rngs=nnx.Rngs(0)))
    params = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), nnx.state(model))
    checkpoint.save(str(tmp_path / "model"), config, params, {})
    assert ipr_jax.load(str(tmp_path / "model")).config == config


def test_a_relative_path_is_that_of_the_working_folder(saved, monkeypatch):
    monkeypatch.chdir(saved.parent)
    assert ipr_jax.load(saved.name).config == TINY


def test_a_model_is_loaded_where_there_is_not_the_device_that_saved_it(copied):
    placement = copied / "params" / "_sharding"
    text = placement.read_text()
    moved = re.sub(r"(device_str\W+)\w+:\d+", r"\1nowhere:5", text)
    assert moved != text
    placement.write_text(moved)
    leaf = jax.tree.leaves(ipr_jax.load(copied))[0]
    assert leaf.devices() == {jax.local_devices()[0]}
    assert not leaf.committed  # follows the other arguments, and one program serves all calls


def test_the_compute_dtype_is_chosen_on_loading(saved, rng):
    low, full = ipr_jax.load(saved, dtype=jnp.bfloat16), ipr_jax.load(saved)
    assert {leaf.dtype for leaf in jax.tree.leaves(low)} == {jnp.dtype(jnp.float32)}
    for a, b in zip(jax.tree.leaves(low), jax.tree.leaves(full), strict=True):
        np.testing.assert_array_equal(a, b)
    assert (low.unet.dtype, full.unet.dtype) == (jnp.bfloat16, jnp.float32)


def test_a_loaded_model_is_an_argument_of_a_compiled_function(saved, tiny_model, rng):
    traces = []

    @jax.jit
    def velocity(model, z, t):
        traces.append(model)
        return model(z, t).sigma

    z = jnp.asarray(rng.normal(size=(2, *TINY.image_shape)), jnp.float32)
    t = jnp.asarray(rng.random((2, *TINY.grid)), jnp.float32)
    loaded = ipr_jax.load(saved)
    np.testing.assert_array_equal(velocity(loaded, z, t), velocity(tiny_model, z, t))
    assert len(traces) == 1


def test_an_unknown_name_lists_the_shipped_models():
    with pytest.raises(FileNotFoundError, match=r"'no-such-model'.*mini-sudoku"):
        ipr_jax.load("no-such-model")


def test_a_file_is_no_model(tmp_path):
    path = tmp_path / "weights.ckpt"
    path.write_bytes(b"PK")
    with pytest.raises(FileNotFoundError, match=f"{path}"):
        ipr_jax.load(path)


def test_nothing_is_overwritten(saved, tiny_model):
    before = contents(saved)
    with pytest.raises(FileExistsError, match=f"{saved} exists"):
        checkpoint.save(saved, TINY, jax.tree.map(jnp.zeros_like, nnx.state(tiny_model)), {})
    assert contents(saved) == before


def test_a_failed_save_leaves_no_model_and_can_be_repeated(tmp_path, tiny_model):
    path, params = tmp_path / "model", nnx.state(tiny_model)
    with pytest.raises(TypeError, match="not JSON serializable"):
        checkpoint.save(path, TINY, params, {"task": object()})
    assert not list(tmp_path.iterdir())
    checkpoint.save(path, TINY, params, PROVENANCE)
    assert checkpoint.open_model(path)[1] == PROVENANCE
    assert list(tmp_path.iterdir()) == [path]


def replaced(old, new):
    return lambda text: text.replace(old, new)


DAMAGES = {
    "cut config": ("config/metadata", lambda text: text[:20]),
    "config of another kind": ("config/metadata", lambda text: "[1, 2]"),
    "unknown field": ("config/metadata", replaced("num_blocks", "blocks")),
    "impossible value": ("config/metadata", replaced('"channels": 1', '"channels": -1')),
    "value of another type": ("config/metadata", replaced('"channels": 1', '"channels": "1"')),
    "another architecture": ("config/metadata", replaced('"num_blocks": 1', '"num_blocks": 2')),
    "provenance of another kind": ("provenance/metadata", lambda text: "[1, 2]"),
    "cut index of parameters": ("params/_METADATA", lambda text: text[:100]),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_refused_with_the_path(copied, damage):
    name, change = DAMAGES[damage]
    before = (copied / name).read_text()
    (copied / name).write_text(change(before))
    assert (copied / name).read_text() != before
    with pytest.raises(ValueError, match=f"^{copied} is not a model of ipr_jax: "):
        ipr_jax.load(copied)


@pytest.mark.parametrize("part", ["config", "provenance", "params"])
def test_an_incomplete_model_is_refused_with_its_path(copied, part):
    shutil.rmtree(copied / part)
    with pytest.raises(ValueError, match=f"^{copied} is not a model of ipr_jax: .*{part}"):
        ipr_jax.load(copied)


def test_a_foreign_folder_is_refused_with_its_path(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(bytes(8))
    with pytest.raises(ValueError, match=f"^{tmp_path} is not a model of ipr_jax: "):
        ipr_jax.load(tmp_path)


def halved(data):
    return data[: len(data) // 2]


def flipped(data):
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 0xFF]) + data[middle + 1 :]


LOAD = """
import sys, ipr_jax
for path in sys.argv[1:]:
    try:
        ipr_jax.load(path)
    except ValueError as error:
        print(str(error).partition(": ")[0])
"""


def test_damaged_weights_are_refused_with_the_path(saved, tmp_path):
    paths = [shutil.copytree(saved, tmp_path / name) for name in ("halved", "flipped", "narrow")]
    for path, change in zip(paths, (halved, flipped), strict=False):
        files = list((path / "params" / "d").iterdir())
        assert files
        for file in files:
            file.write_bytes(change(file.read_bytes()))
    described = paths[2] / "config" / "metadata"
    text = described.read_text()
    assert '"time_width": 8' in text
    described.write_text(text.replace('"time_width": 8', '"time_width": 6'))
    # In a process of its own: reads that Orbax has under way when one fails complain at any time.
    command = [sys.executable, "-c", LOAD, *map(str, paths)]
    told = subprocess.run(command, capture_output=True, text=True, check=True)
    assert told.stdout.splitlines() == [f"{path} is not a model of ipr_jax" for path in paths]
