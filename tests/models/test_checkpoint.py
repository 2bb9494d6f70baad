"""Models on disk: bit for bit the same, whole or absent, and damage is named."""

import hashlib
import os
import re
import shutil
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY
from flax import nnx

import ipr_jax
from ipr_jax import ModelConfig
from ipr_jax.models import checkpoint
from ipr_jax.runtime import files

PROVENANCE = {"task": "none", "settings": {"seed": 3, "widths": [1, 2]}, "note": None}


@pytest.fixture(scope="module")
def saved(tmp_path_factory, tiny_model):
    path = tmp_path_factory.mktemp("models") / "model"
    checkpoint.save(path, TINY, nnx.state(tiny_model), PROVENANCE)
    return path


@pytest.fixture
def copied(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "copy")


@pytest.fixture
def unsealed(copied):
    """A model that was saved before there were checksums."""
    (copied / files.SUMS).unlink()
    return copied


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


def test_provenance_is_read_without_the_weights(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "copy")
    (tmp_path / "copy" / "params" / "manifest.ocdbt").unlink()
    assert checkpoint.provenance_of(tmp_path / "copy") == PROVENANCE
    with pytest.raises(FileNotFoundError, match=r"'no-such-model'.*mini-sudoku"):
        checkpoint.provenance_of("no-such-model")
    with pytest.raises(ValueError, match=r"is not a model of ipr_jax: it has no config"):
        checkpoint.provenance_of(tmp_path)
    (tmp_path / "copy" / "provenance" / "metadata").write_text("{")
    with pytest.raises(ValueError, match=r"copy is not a model of ipr_jax: "):
        checkpoint.provenance_of(tmp_path / "copy")


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
    files.seal(copied)
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


WRITERS = "ipr-jax train and ipr-jax convert import write models"


def test_a_file_is_no_model(tmp_path):
    path = tmp_path / "weights.ckpt"
    path.write_bytes(b"<!DOCTYPE html>")
    told = f"no model at '{path}', which is an HTML page: give a model folder or one of "
    with pytest.raises(FileNotFoundError) as refused:
        ipr_jax.load(path)
    assert str(refused.value) == f"{told}{list(checkpoint.SHIPPED)}; {WRITERS}"


@pytest.mark.parametrize(
    ("names", "seen"),
    [
        ((), "it is empty"),
        (("model.safetensors",), "it has no config"),
        (("config/metadata", "params/d"), "it has no provenance"),
        (("config.json", "model.safetensors"), "it has no config"),
        (("config.json", "samples/00000.npz"), "it is the folder of a refinement"),
        (("config.json", "arms/refined.json"), "it is the folder of an experiment"),
        (("results.json", "samples.npz"), "it is the folder of a stream"),
        (("config.json", "checkpoints/500/x"), "it is the folder of a training"),
        (
            ("config.json", "checkpoints/500/x", "model/SHA256SUMS"),
            "it is the folder of a training, its model is {folder}/model",
        ),
    ],
)
def test_a_folder_of_something_else_is_said_to_be_one(tmp_path, names, seen):
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match="is not a model") as refused:
        ipr_jax.load(tmp_path)
    said = f"{tmp_path} is not a model of ipr_jax: {seen.format(folder=tmp_path)}; {WRITERS}"
    assert str(refused.value) == said


@pytest.mark.parametrize("opened", [True, False])
@pytest.mark.parametrize(
    ("name", "message"),
    [
        (b"a\\b", r"has \\: the path of a model or of a training must be without"),
        (b"\xff", r"is not UTF-8, rename it"),
        (b"a.orbax-checkpoint-tmp", "marks unfinished models, rename it|it was never finished$"),
        (b".a.unfinished", "marks unfinished models, rename it|it was never finished$"),
    ],
)
def test_a_path_that_orbax_does_not_take_is_refused(copied, tiny_model, name, message, opened):
    path = copied.with_name(os.fsdecode(name))
    saving = {"config": TINY, "params": nnx.state(tiny_model), "provenance": {}}
    if opened:
        copied.rename(path)
    use = ipr_jax.load if opened else partial(checkpoint.save, **saving)
    with pytest.raises(ValueError, match=message):
        use(path)


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


def test_what_a_killed_process_left_does_not_hinder(tmp_path, tiny_model, monkeypatch):
    path, params = tmp_path / "model", nnx.state(tiny_model)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)  # as if it could not
        patch.setattr(files, "seal", lambda folder: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            checkpoint.save(path, TINY, params, PROVENANCE)
    assert [left.name for left in tmp_path.iterdir()] == [".model.unfinished"]
    checkpoint.save(path, TINY, params, PROVENANCE)
    assert checkpoint.open_model(path)[1] == PROVENANCE
    assert list(tmp_path.iterdir()) == [path]


def test_checksums_are_those_of_all_files(saved):
    """As sha256sum writes them."""
    lines = (saved / "SHA256SUMS").read_text().splitlines()
    assert lines == sorted(lines, key=lambda line: line[66:])
    digests = {
        str(path.relative_to(saved)): hashlib.sha256(data).hexdigest()
        for path, data in contents(saved).items()
    }
    del digests["SHA256SUMS"]
    assert {line[66:]: line[:64] for line in lines} == digests
    assert {line[64:66] for line in lines} == {"  "}


def halved(data):
    return data[: len(data) // 2]


def flipped(data):
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


@pytest.mark.parametrize("change", [halved, flipped])
def test_damage_of_any_file_is_refused_by_its_name(copied, change):
    names = [path.relative_to(copied) for path, data in contents(copied).items() if data]
    assert len(names) > 15
    for name in names:
        data = (copied / name).read_bytes()
        (copied / name).write_bytes(change(data))
        what = "" if str(name) == files.SUMS else f"{name} is not what its SHA256SUMS tell$"
        with pytest.raises(ValueError, match=f"^{copied} is damaged: {what}"):
            ipr_jax.load(copied)
        (copied / name).write_bytes(data)
    assert ipr_jax.load(copied).config == TINY


def test_a_flipped_bit_anywhere_in_the_checksums_is_refused(copied):
    sums = copied / files.SUMS
    data = sums.read_bytes()
    for place in range(0, len(data), 1 if len(data) < 2000 else 7):
        sums.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        with pytest.raises(ValueError, match=f"^{copied} is damaged: "):
            files.check_seal(copied)
    sums.write_bytes(data)
    files.check_seal(copied)


def test_a_file_too_few_or_too_many_is_refused_by_its_name(copied):
    for path in contents(copied):
        name = path.relative_to(copied)
        if str(name) != files.SUMS:
            path.rename(copied.with_name("aside"))
            with pytest.raises(ValueError, match=f"^{copied} is damaged: {name} is missing$"):
                ipr_jax.load(copied)
            copied.with_name("aside").rename(path)
    (copied / "params" / "more").touch()
    said = f"^{copied} is damaged: params/more is not among its SHA256SUMS$"
    with pytest.raises(ValueError, match=said):
        ipr_jax.load(copied)


def test_a_model_without_checksums_opens_with_a_warning(unsealed, tiny_model):
    said = f"^{unsealed} has no SHA256SUMS: it cannot be checked for damage$"
    with pytest.warns(UserWarning, match=said) as warned:
        loaded = ipr_jax.load(unsealed)
    assert len(warned) == 1
    for want, got in zip(jax.tree.leaves(tiny_model), jax.tree.leaves(loaded), strict=True):
        np.testing.assert_array_equal(got, want)


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
def test_what_a_model_without_checksums_cannot_be_is_refused(unsealed, damage):
    name, change = DAMAGES[damage]
    before = (unsealed / name).read_text()
    (unsealed / name).write_text(change(before))
    assert (unsealed / name).read_text() != before
    refused = pytest.raises(ValueError, match=f"^{unsealed} is not a model of ipr_jax: [^\n]*$")
    with pytest.warns(UserWarning, match="cannot be checked"), refused:
        ipr_jax.load(unsealed)


LOAD = """
import sys, warnings, ipr_jax
warnings.simplefilter("ignore")
for path in sys.argv[1:]:
    try:
        ipr_jax.load(path)
    except ValueError as error:
        print(str(error).partition(": ")[0])
"""


def test_weights_that_cannot_be_read_without_checksums_are_refused(unsealed, tmp_path):
    paths = [shutil.copytree(unsealed, tmp_path / name) for name in ("halved", "flipped", "narrow")]
    for path, change in zip(paths, (halved, flipped), strict=False):
        parts = list((path / "params" / "d").iterdir())
        assert parts
        for part in parts:
            part.write_bytes(change(part.read_bytes()))
    described = paths[2] / "config" / "metadata"
    text = described.read_text()
    assert '"time_width": 8' in text
    described.write_text(text.replace('"time_width": 8', '"time_width": 6'))
    # In a process of its own: reads that Orbax has under way when one fails complain at any time.
    command = [sys.executable, "-c", LOAD, *map(str, paths)]
    told = subprocess.run(command, capture_output=True, text=True, check=True)
    assert told.stdout.splitlines() == [f"{path} is not a model of ipr_jax" for path in paths]
