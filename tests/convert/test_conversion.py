"""From PyTorch files to models and back, through the command line where users go through it."""

import collections
import concurrent.futures
import gzip
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import lightning
import ml_dtypes
import numpy as np
import pytest
from conftest import GOLDEN, PREFIXES, golden, golden_model, nhwc, tensors_of
from converted import (
    CLUES,
    EVEN,
    FLAGS,
    MNIST,
    MNIST_TENSORS,
    assert_same,
    random_tensors,
    save_tensors,
    words,
)
from flax import nnx
from safetensors.numpy import load_file, save_file

import ipr_jax
from convert import classifiers, conversion, formats, mapping, srm
from ipr_jax.models import checkpoint
from ipr_jax.models.networks import build, open_network
from ipr_jax.tasks.mnist_classifier import read_digits
from ipr_jax.tasks.polygon_classifier import PolygonConfig, read_counts

ROOT = Path(__file__).parents[2]


# --- what comes out -------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "weights"), [("tiny_even", "raw"), ("tiny_sudoku", "ema")])
def test_models_of_lightning_checkpoints(tmp_path, name, weights):
    """``test_model`` compares what ``golden_model`` computes with the recorded outputs."""
    path, out = GOLDEN / name / "last.ckpt", tmp_path / "model"
    conversion.import_checkpoint(path, out, weights=weights, given=FLAGS[name])
    model, provenance = checkpoint.open_model(out)
    assert_same(model, golden_model(name, weights))
    assert provenance["source"] == "last.ckpt"
    assert provenance["weights"] == weights
    sha256 = subprocess.run(["sha256sum", path], capture_output=True, text=True, check=True).stdout
    assert provenance["sha256"] == sha256.split()[0]
    assert provenance["converter"] == "ipr_jax 0.1.0"


BLOCKED = """
import json
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "torchvision", "pytorch_lightning"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocked())
from conftest import call
print(json.dumps([call(*words) for words in json.loads(sys.argv[1])]))
"""


def test_every_command_works_where_torch_cannot_be_imported(tmp_path):
    model, flags = str(tmp_path / "model"), list(words(FLAGS["tiny_even"]))
    lines = [
        ["convert", "import", str(EVEN), model, *flags],
        ["convert", "export", model, f"{model}.safetensors"],
        ["info", model],
        ["convert", "verify", str(EVEN), model],
    ]
    environment = os.environ | {"COLUMNS": "200", "PYTHONPATH": str(ROOT / "tests")}
    program = [sys.executable, "-c", BLOCKED, json.dumps(lines)]
    done = subprocess.run(program, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    imported, exported, told, verified = json.loads(done.stdout)
    for code, _, errors in (imported, exported, told):
        assert (code, errors) == (0, "")
    assert "158 tensors used" in imported[1]
    assert "ignored (the raw weights): 158: denoiser." in imported[1]
    assert "ignored (counts the averaged steps): 1: ema_denoiser.n_averaged" in imported[1]
    assert re.search(r"ignored \(beside the state dict\): \d+: epoch, ", imported[1])
    for part in ("243,111", "4 x 4, one per patch", "GFLOP", "last.ckpt", "ema", "(32, 32)"):
        assert part in told[1]
    assert verified == [2, "", "error: verify needs PyTorch: pip install torch\n"]


def test_digit_classifier_agrees_with_the_published_one(tmp_path):
    conversion.import_checkpoint(MNIST, tmp_path / "model")
    save_file(MNIST_TENSORS, tmp_path / "hub.safetensors")
    conversion.import_checkpoint(tmp_path / "hub.safetensors", tmp_path / "from_hub")
    classifier, _ = open_network(tmp_path / "model")
    assert_same(classifier, open_network(tmp_path / "from_hub")[0])
    recorded = golden("classifiers/mnist_classifier.npz")
    logits = classifier(jnp.asarray(nhwc(recorded["tiles"])))
    np.testing.assert_allclose(logits, recorded["logits"], rtol=0, atol=1e-4)
    np.testing.assert_array_equal(read_digits(logits), recorded["digits"])


def test_a_predicted_zero_is_replaced_by_the_runner_up():
    logits = jnp.asarray([[9.0, 1, 2, 8, 0, 0, 0, 0, 0, 0], [0.0, 0, 0, 0, 0, 0, 0, 0, 0, 1]])
    assert read_digits(logits).tolist() == [3, 9]


@pytest.fixture(scope="module")
def polygon_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("polygons") / "resnet50.pth"
    packed = GOLDEN / "classifiers" / "counting_polygons_resnet50.pth.gz"
    path.write_bytes(gzip.decompress(packed.read_bytes()))
    return path


def test_polygon_classifier_agrees_with_the_published_one(tmp_path, polygon_file):
    read, _ = conversion.import_checkpoint(polygon_file, tmp_path / "model", preset="polygons")
    assert {why: len(names) for why, names in read.ignored.items()} == {
        "counts the batches of training": 53
    }
    classifier, _ = open_network(tmp_path / "model")
    recorded = golden("classifiers/counting_polygons_resnet50.npz")
    logits = jax.jit(lambda network, images: network(images))(
        classifier, jnp.asarray(nhwc(recorded["images"]))
    )
    for name, ours in logits.items():
        np.testing.assert_allclose(ours, recorded[f"logits_{name}"], rtol=0, atol=1e-4)
    counts = read_counts(logits, classifier.config)
    np.testing.assert_array_equal(counts.num_polygons, recorded["pred_num_polygons"])
    np.testing.assert_array_equal(counts.num_vertices, recorded["pred_num_vertices"])
    np.testing.assert_array_equal(counts.is_uniform, recorded["pred_is_uniform"])
    np.testing.assert_array_equal(counts.stated, recorded["pred_num_polygons_vertices"])
    np.testing.assert_array_equal(classifier.config.pairs, recorded["label_pairs"])


def test_stars_with_the_names_of_the_hub(tmp_path):
    config = classifiers.VARIANTS["stars"]
    tensors = {f"model.{name}": array for name, array in random_tensors(config).items()}
    tensors["model.bn1.num_batches_tracked"] = np.array(7)
    save_file(tensors, tmp_path / "stars.safetensors")
    path, out = tmp_path / "stars.safetensors", tmp_path / "model"
    with pytest.raises(ValueError, match=r"give --preset; presets that fit the tensors: stars$"):
        conversion.import_checkpoint(path, out)
    with pytest.raises(
        ValueError, match=r"preset polygons says heads={.*, but its tensors say head"
    ):
        conversion.import_checkpoint(path, out, preset="polygons")
    _, found = conversion.import_checkpoint(path, out, preset="stars")
    assert found == config == PolygonConfig(min_vertices=2, max_vertices=9)


def test_image_level_model_with_clues(tmp_path):
    tensors = random_tensors(CLUES)
    given = {name: getattr(CLUES, name) for name in ("image_size", "patch_size", "head_width")}
    path = lightning.write(tmp_path / "last.ckpt", tensors, ema=tensors)
    _, found = conversion.import_checkpoint(path, tmp_path / "model", given=given)
    assert found == CLUES
    model = ipr_jax.load(tmp_path / "model")
    recorded = golden("image_level_clues.npz")
    image, z, editable = nhwc(recorded["image"]), nhwc(recorded["z"]), recorded["editable"]
    denoise = ipr_jax.condition_on(model, image, editable)
    prediction = jax.jit(denoise)(jnp.asarray(z), jnp.asarray(recorded["t"]))
    for ours, theirs in (
        (prediction.velocity, nhwc(recorded["velocity"])),
        (prediction.variance_fraction, nhwc(recorded["variance_fraction"])),
        (prediction.sigma, recorded["sigma"]),
    ):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-5)
    keys = ipr_jax.sample_keys(jax.random.key(0), 3)
    sampled = ipr_jax.generate(denoise, keys, image, np.ones((3, 1, 1), bool))
    assert sampled.nfe.tolist() == [3, 3, 3]
    assert sampled.finite.all()
    with pytest.raises(ValueError, match="bind them by condition_on"):
        model(jnp.asarray(z), jnp.asarray(recorded["t"]))
    with pytest.raises(ValueError, match=r"the condition must be \[B, 16, 16, 2\] for this model"):
        model(jnp.asarray(z), jnp.asarray(recorded["t"]), condition=jnp.asarray(z))
    with pytest.raises(ValueError, match=r"editable must be \[3, h, w\] over a grid of square pa"):
        ipr_jax.condition_on(model, image, np.ones((3, 5, 5), bool))


def test_a_sequential_model_takes_no_condition(tiny_model):
    image, editable = jnp.zeros((1, 32, 32, 1)), jnp.ones((1, 4, 4), bool)
    with pytest.raises(ValueError, match="takes no condition"):
        ipr_jax.condition_on(tiny_model, image, editable)(image, jnp.ones((1, 4, 4)))


RELEASED = srm.RELEASES.items()


@pytest.mark.parametrize(("name", "config"), RELEASED, ids=srm.RELEASES)
def test_every_release_is_told_from_its_tensors(name, config):
    leaves = dict(nnx.to_flat_state(nnx.state(nnx.eval_shape(lambda: build(config)))))
    shapes = {
        torch: entry.torch_shape(leaves[entry.path].shape)
        for entry in srm.table(config)
        for torch in entry.names
    }
    told = srm.infer(shapes)
    assert told == {field: getattr(config, field) for field in told}
    given = {field: getattr(config, field) for field in ("image_size", "patch_size", "head_width")}
    layout = formats.of_config(config)
    assert formats.configure(layout, shapes, None, "", given) == config
    assert formats.configure(layout, shapes, config, name, {}) == config
    image_level = {f"{data}{end}" for data in ("ep", "cp_ffhq", "ms1000") for end in ("", "_base")}
    width = {"ep": 64, "cp": 128, "ms": 128}[name[:2]]
    assert shapes["model.encoder.blocks.0.0.weight"][:2] == (width, config.channels_in)
    assert config.channels_in == {"ep": 3, "cp": 3, "ms": 1}[name[:2]] + 2 * (
        name in image_level and name[:2] == "ms"
    )
    assert (config.grid == (1, 1)) == (name in image_level)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_other_floating_types_become_float32(tmp_path, dtype):
    kind = getattr(ml_dtypes, dtype, dtype)
    cast = {name: tensor.astype(kind) for name, tensor in MNIST_TENSORS.items()}
    conversion.import_checkpoint(save_tensors(tmp_path / "file.pt", cast), tmp_path / "model")
    classifier, _ = open_network(tmp_path / "model")
    kernel = np.asarray(classifier.fc2.kernel[...])
    assert kernel.dtype == np.float32
    np.testing.assert_array_equal(kernel, cast["fc2.weight"].T.astype(np.float32))


# --- there and back -------------------------------------------------------------------------------


def test_an_export_is_the_state_dict_of_the_denoiser(tmp_path):
    conversion.import_checkpoint(EVEN, tmp_path / "model", given=FLAGS["tiny_even"])
    conversion.export(tmp_path / "model", tmp_path / "model.safetensors")
    exported, original = (
        load_file(tmp_path / "model.safetensors"),
        tensors_of(EVEN, PREFIXES["ema"]),
    )
    assert exported.keys() == original.keys()
    for name, tensor in original.items():
        assert (exported[name].dtype, exported[name].shape) == (tensor.dtype, tensor.shape)
        assert exported[name].tobytes() == tensor.tobytes()


@pytest.mark.heavy
@pytest.mark.filterwarnings("ignore:the published class")
def test_an_import_of_an_export_is_the_same_model(tmp_path):
    other = PolygonConfig(min_vertices=4, max_vertices=8)  # heads like those of the published one
    said = json.dumps({"config": checkpoint.to_json(other), "provenance": {"made": "at random"}})
    polygons = tmp_path / "polygons.pt"
    save_file(random_tensors(other), polygons, metadata={"ipr_jax": said})
    made = {"mini-sudoku": "mini-sudoku"}
    for name, path, given in (
        ("even", EVEN, FLAGS["tiny_even"]),
        ("mnist", MNIST, {}),
        ("polygons", polygons, {}),
    ):
        conversion.import_checkpoint(path, tmp_path / name, given=given)
        made[name] = tmp_path / name
    for name, model in made.items():
        file, back = tmp_path / f"{name}.safetensors", tmp_path / f"{name}-back"
        conversion.export(model, file)
        conversion.import_checkpoint(file, back)  # the architecture is in the file
        (network, first), (again, second) = open_network(model), open_network(back)
        assert_same(network, again)
        assert second["exported from"] == first
        assert second["architecture"] == "the metadata"


# --- whole conversions ----------------------------------------------------------------------------


IMPORT = [sys.executable, "-m", "convert", "import"]
PEAK_MEMORY = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)  # in kB
"""
"""A small process in between: what it starts inherits its peak, not that of the tests."""


@pytest.mark.heavy
@pytest.mark.parametrize("name", ["ep_4", "cp_ffhq_8", "ms1000_28"])
def test_full_size_checkpoints_fit_in_time_and_memory(tmp_path, name):
    """Raw and averaged weights and the optimizer's state, as a training leaves them."""
    config, path, out = srm.RELEASES[name], tmp_path / "last.ckpt", tmp_path / "model"
    averaged = random_tensors(config, seed=1)
    lightning.write(path, random_tensors(config), ema=averaged)
    start = time.monotonic()
    measured = [sys.executable, "-c", PEAK_MEMORY, *IMPORT, path, out, "--preset", name]
    done = subprocess.run(measured, cwd=ROOT, capture_output=True, text=True, check=True)
    assert time.monotonic() - start < 60
    assert int(done.stdout.splitlines()[-1]) * 1024 < 2.5e9
    path.unlink()
    model = ipr_jax.load(out)
    assert model.config == config
    tensors = mapping.extract(model, srm.table(config))
    assert tensors.keys() == averaged.keys()
    assert all(np.array_equal(tensors[name], averaged[name]) for name in tensors)


@pytest.mark.heavy
def test_a_killed_conversion_leaves_nothing_that_opens(tmp_path):
    """Six are killed at any moment, fourteen while they write."""
    rng = np.random.default_rng(0)
    moments = [(False, delay) for delay in rng.uniform(0.5, 2.5, 6)]
    moments += [(True, delay) for delay in rng.uniform(0, 0.3, 14)]
    expected = golden_model("tiny_even", "ema")
    arguments = [EVEN, "model", *words(FLAGS["tiny_even"])]

    def kill(number):
        writing, delay = moments[number]
        folder = tmp_path / str(number)
        folder.mkdir()
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        process = subprocess.Popen(
            [*IMPORT, *arguments], cwd=folder, env=environment, stdout=-3, stderr=-3
        )
        while writing and not list(folder.iterdir()) and process.poll() is None:
            time.sleep(0.001)
        time.sleep(delay)
        process.kill()
        process.wait()

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        list(pool.map(kill, range(len(moments))))
    outcomes = collections.Counter()
    for folder in tmp_path.iterdir():
        left = [path for path in folder.rglob("*") if path.is_dir()]
        for path in left:
            if path == folder / "model":
                assert_same(ipr_jax.load(path), expected)
            elif path.parent != folder / "model":
                with pytest.raises(ValueError, match="is not a model of ipr_jax"):
                    ipr_jax.load(path)
        outcomes["finished" if folder / "model" in left else "begun" if left else "nothing"] += 1
    assert sum(outcomes.values()) == 20
    assert outcomes["begun"] >= 3, outcomes
    begun = next(
        f for f in tmp_path.iterdir() if list(f.glob(".model.*")) and not (f / "model").exists()
    )
    conversion.import_checkpoint(EVEN, begun / "model", given=FLAGS["tiny_even"])
    assert_same(ipr_jax.load(begun / "model"), expected)
    assert [path.name for path in begun.iterdir()] == ["model"]
