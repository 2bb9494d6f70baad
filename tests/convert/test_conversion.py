"""From PyTorch files to models and back, through the command line where users go through it."""

import collections
import concurrent.futures
import dataclasses
import gzip
import importlib.util
import json
import os
import re
import shutil
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
import torch_writer
from conftest import GOLDEN, PREFIXES, golden, golden_config, golden_model, nhwc, tensors_of
from flax import nnx
from safetensors.numpy import load_file, save_file

import ipr_jax
from convert import __main__ as command
from convert import classifiers, conversion, formats, mapping, source, srm, torch_model
from ipr_jax import ModelConfig
from ipr_jax.models import checkpoint
from ipr_jax.models.networks import build, open_network
from ipr_jax.tasks.mnist_classifier import read_digits
from ipr_jax.tasks.polygon_classifier import PolygonConfig, read_counts

ROOT = Path(__file__).parents[2]
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
STEM = "model.encoder.blocks.0.0.weight"


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


# --- what comes out -------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", ["ema", "raw"])
@pytest.mark.parametrize("name", ["tiny_even", "tiny_sudoku"])
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
import sys
import time
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "torchvision", "pytorch_lightning"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocked())
program, *sys.argv = sys.argv[1:]
sys.argv.insert(0, program)
if program == "convert":
    from convert.__main__ import main
else:
    from ipr_jax.cli.main import main
main()
"""


def test_every_command_works_where_torch_cannot_be_imported(tmp_path):
    def run(program, *arguments):
        command = [sys.executable, "-c", BLOCKED, program, *map(str, arguments)]
        environment = os.environ | {"COLUMNS": "200"}
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)

    flags = list(words(FLAGS["tiny_even"]))
    done = run("convert", "import", EVEN, tmp_path / "model", *flags)
    assert (done.returncode, done.stderr) == (0, "")
    assert "158 tensors used" in done.stdout
    assert "ignored (the raw weights): 158: denoiser." in done.stdout
    assert "ignored (counts the averaged steps): 1: ema_denoiser.n_averaged" in done.stdout
    assert re.search(r"ignored \(beside the state dict\): \d+: epoch, ", done.stdout)
    done = run("convert", "export", tmp_path / "model", tmp_path / "model.safetensors")
    assert (done.returncode, done.stderr) == (0, "")
    done = run("ipr-jax", "info", tmp_path / "model")
    assert (done.returncode, done.stderr) == (0, "")
    for part in ("243,111", "4 x 4, one per patch", "GFLOP", "last.ckpt", "ema", "(32, 32)"):
        assert part in done.stdout
    done = run("convert", "verify", EVEN, tmp_path / "model")
    assert done.returncode == 2
    assert done.stderr == "error: verify needs PyTorch: pip install torch\n"


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
    logits = classifier(jnp.asarray(nhwc(recorded["images"])))
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


@pytest.mark.parametrize("weights", ["ema", "raw"])
def test_an_export_is_the_state_dict_of_the_denoiser(tmp_path, weights):
    conversion.import_checkpoint(
        EVEN, tmp_path / "model", weights=weights, given=FLAGS["tiny_even"]
    )
    conversion.export(tmp_path / "model", tmp_path / "model.safetensors")
    exported, original = (
        load_file(tmp_path / "model.safetensors"),
        tensors_of(EVEN, PREFIXES[weights]),
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


# --- how names are wrapped ------------------------------------------------------------------------


def under(prefix, tensors=MNIST_TENSORS):
    return stored({f"{prefix}{name}": tensor for name, tensor in tensors.items()})


def inside(wrapper, tensors):
    """The names of modules that were wrapped one by one: all blocks of the U-Net."""
    return stored({re.sub(r"(\.\d+\.)", rf"\1{wrapper}.", name): t for name, t in tensors.items()})


SHARD = torch_writer.Call(torch_writer.named("torch.distributed.tensor", "DTensor"))
NUMBER = torch_writer.tensor(torch_writer.storage(np.array(3, np.int64), "n"), (), ())
WRAPPED = {
    "DDP, compiled": (under("module._orig_mod."), "at the top of the file", "_orig_mod, module"),
    "compiled, DDP": (under("_orig_mod.module."), "at the top of the file", "_orig_mod, module"),
    "a prefix": (under("net.classifier."), "at the top of the file", "net, classifier"),
    "DeepSpeed": (
        {"module": under(""), "ds_config": {"a": 1}, "param_shapes": [under("")]},
        "in module",
        "",
    ),
    "Lightning, DeepSpeed": (
        {"state_dict": under("_forward_module.model."), "epoch": 3},
        "in state_dict",
        "model, _forward_module",
    ),
    "model_state_dict": ({"model_state_dict": under("")}, "in model_state_dict", ""),
    "model": ({"model": under(""), "optimizer": {"state": {0: NUMBER}}}, "in model", ""),
    "params": ({"params": under("")}, "in params", ""),
    "ema": ({"step": 7, "ema": under("module.")}, "in ema", "module"),
    "deep": ({"a": {"b": {"c": under("model.")}}}, "in a/b/c", "model"),
    "twice the same": ([each := under("")] and {"model": each, "net": each}, "in model", ""),
    "averaged": (under("module.") | {"n_averaged": NUMBER}, "at the top of the file", "module"),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_wrapped_weights_are_found_and_it_says_where(tmp_path, name):
    contents, place, cut = WRAPPED[name]
    read = source.read(torch_writer.save(tmp_path / "file.pt", contents))
    assert read.notes == [f"found {place}" + (f"; left out of their names: {cut}" if cut else "")]
    assert read.tensors.keys() == MNIST_TENSORS.keys()
    for own, tensor in MNIST_TENSORS.items():
        np.testing.assert_array_equal(read.tensors[own], tensor)


@pytest.mark.parametrize("wrapper", ["_fsdp_wrapped_module", "_checkpoint_wrapped_module"])
def test_wrappers_inside_of_a_network_are_left_out(tmp_path, wrapper):
    path = torch_writer.save(tmp_path / "file.pt", inside(wrapper, EVEN_TENSORS))
    read = source.read(path)
    assert read.notes == [f"found at the top of the file; left out of their names: {wrapper}"]
    assert {own: t.tobytes() for own, t in read.tensors.items()} == {
        own: t.tobytes() for own, t in EVEN_TENSORS.items()
    }


AVERAGES = {name: tensor + 1 for name, tensor in MNIST_TENSORS.items()}


@pytest.mark.parametrize(
    "contents",
    [
        {"model": under(""), "ema": under("", AVERAGES), "opt": {}},
        {"state_dict": under(""), "state_dict_ema": under("", AVERAGES)},
        {"model_state_dict": under("module."), "EMA": {"shadow": under("", AVERAGES)}},
        {"ema": under("online_model.") | under("ema_model.", AVERAGES) | {"initted": 1, "step": 2}},
        under("net.") | under("net_ema.module.", AVERAGES) | {"net_ema.n_averaged": NUMBER},
        {"model": under(""), "swa": under("module.", AVERAGES) | {"n_averaged": NUMBER}},
        under("") | under("ema.", AVERAGES),
    ],
)
def test_averaged_weights_are_told_from_raw_ones(tmp_path, contents):
    path = torch_writer.save(tmp_path / "file.pt", contents)
    for weights, wanted in (("ema", AVERAGES), ("raw", MNIST_TENSORS)):
        read = source.read(path, weights)
        assert read.weights == weights
        np.testing.assert_array_equal(read.tensors["fc2.bias"], wanted["fc2.bias"])


@pytest.mark.parametrize(
    ("contents", "reason"),
    [
        (
            {"generator": under(""), "teacher": under("")},
            "2 networks, save one in a file alone: MNIST classifier in generator; MNIST classifier "
            "in teacher",
        ),
        (
            under("a.") | under("b."),
            "2 networks, save one in a file alone: a. at the top of the file; b. at the top of the",
        ),
        (
            {"state_dict": {"blocks.0.fc1.weight": 1, "blocks.1.fc1.weight": 2}, "epoch": 3},
            "its names are of no known network (SRM denoiser, MNIST classifier, polygon "
            "classifier); at the top of the file: state_dict, epoch; in state_dict: "
            "blocks.0.fc1.weight, blocks.1.fc1.weight",
        ),
        (
            {"net": {f"layer{number}": number for number in range(5)}, "epoch": 3, "extra": {}},
            "in net: layer0, layer1, layer2, ...; at the top of the file: net, epoch, extra",
        ),
        ({}, "polygon classifier); none"),
        (
            {
                name: torch_writer.Call(torch_writer.named("torch.distributed.tensor", "DTensor"))
                for name in MNIST_TENSORS
            },
            "conv1.weight must be a tensor, it is <Placeholder torch.distributed.tensor.DTensor>",
        ),
        (
            under("") | under("module."),
            "conv1.weight and module.conv1.weight must not both be there",
        ),
    ],
)
def test_weights_that_are_not_plainly_there_are_refused(tmp_path, contents, reason):
    path = torch_writer.save(tmp_path / "file.pt", contents)
    with pytest.raises(ValueError, match=re.escape(reason)):
        source.read(path)


def test_averaged_weights_are_not_taken_for_raw_ones(tmp_path):
    path = torch_writer.save(tmp_path / "file.pt", {"ema": under("")})
    with pytest.raises(ValueError, match=r"has no raw weights, only ema$"):
        source.read(path, "raw")


def test_tensors_that_safetensors_stores_once_are_read_under_every_name(tmp_path):
    """``safetensors.torch.save_model`` leaves a name of the same tensor to the metadata."""
    repeated = [name for name in EVEN_TENSORS if ".t_emb." in name]
    own = {name: "time_embedding" + name.partition(".t_emb")[2] for name in repeated}
    kept = {f"module.{name}": t for name, t in EVEN_TENSORS.items() if name not in own}
    said = {f"module.{name}": f"module.{same}" for name, same in own.items()}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"} | said)
    read = source.read(tmp_path / "model.safetensors")
    assert len(repeated) == 32
    assert read.tensors.keys() == EVEN_TENSORS.keys()
    for name, tensor in EVEN_TENSORS.items():
        np.testing.assert_array_equal(read.tensors[name], tensor)


def test_it_says_what_is_unusual_about_a_file(tmp_path, monkeypatch, capsys):
    path = torch_writer.save(tmp_path / "file.pt", {"[v2]:smile:": under("module.")})
    assert run(monkeypatch, "import", torch_writer.without_checksums(path), tmp_path / "model") == 0
    assert capsys.readouterr().out.splitlines() == [
        "MNIST classifier: 8 tensors used",
        "found in [v2]:smile:; left out of their names: module",
        "it has no checksums: weights that were damaged since would not be noticed",
        "MNISTConfig()",
        f"written: {tmp_path / 'model'}",
    ]


# --- what is refused ------------------------------------------------------------------------------


def damaged(change):
    """The averaged weights of a small model, changed, in a checkpoint of their own."""

    def write(path):
        tensors = dict(EVEN_TENSORS)
        change(tensors)
        return save_tensors(path, tensors)

    return write


def cut(path):
    path.write_bytes(EVEN.read_bytes()[:-1000])


def flip(path):
    data = bytearray(EVEN.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def described(**metadata):
    def write(path):
        save_file(EVEN_TENSORS, path, metadata=metadata)

    return write


def bomb(path):
    import zipfile

    torch_writer.save(path, {})
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/0", bytes(10_000_000))


HUGE = torch_writer.tensor(torch_writer.storage(np.ones(1, np.float32), "x"), (1 << 40,), (0,))
NAN = np.float32("nan")
NORM = "model.decoder.out.0.weight"
REFUSED = {
    "empty": (lambda path: path.write_bytes(b""), "it is empty"),
    "folder": (Path.mkdir, "it is a folder and no file"),
    "missing": (lambda path: None, "No such file"),
    "text": (lambda path: path.write_text("Dear reader, this is not it"), "it is a text file"),
    "a pointer": (
        lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d"),
        "it is a Git LFS pointer (the file itself was not downloaded)",
    ),
    "a page": (lambda path: path.write_text("\n<!doctype html>\n<p>"), "it is an HTML page"),
    "an index": (
        lambda path: path.write_text('{"weight_map": {"a": "model-00001-of-00002.safetensors"}}'),
        "it is the index of a model in several files (the tensors are in those that it names)",
    ),
    "JSON like safetensors": (lambda path: path.write_text('{"a": [{"b": 1}]}'), "a JSON file"),
    "packed": (lambda path: path.write_bytes(gzip.compress(b"1")), "it is a gzip file (unpack it"),
    "zip of something else": (
        lambda path: torch_writer.save(path, {"epoch": 3}),
        "its names are of no known network (SRM denoiser, MNIST classifier, polygon classifier); "
        "at the top of the file: epoch",
    ),
    "a list": (lambda path: torch_writer.save(path, [1, 2]), "it must hold tensors by name"),
    "cut": (cut, "no readable PyTorch file"),
    "flipped": (flip, "no readable PyTorch file"),
    "zip bomb": (bomb, "compressed entry archive/data/0"),
    "cut safetensors": (
        lambda path: path.write_bytes((8).to_bytes(8, "little") + b'{"a":1'),
        "is no readable safetensors file: Error while deserializing header: ",
    ),
    "metadata that is cut": (described(ipr_jax="[1"), "its metadata ipr_jax must be JSON: Expect"),
    "metadata that is deep": (described(ipr_jax="[" * 100_000), "ipr_jax must be JSON: maximum re"),
    "metadata that is a number": (described(ipr_jax="7"), "ipr_jax must be an object with"),
    "metadata with half of it": (described(ipr_jax='{"config": {}}'), "must be an object with"),
    "metadata without a kind": (
        described(ipr_jax='{"config": {}, "provenance": {}}'),
        "its kind is None, where one of ['ModelConfig'] is needed",
    ),
    "metadata of another field": (
        described(ipr_jax='{"config": {"kind": "ModelConfig", "size": 3}, "provenance": {}}'),
        "its metadata describes no SRM denoiser: ",
    ),
    "float8": (
        lambda path: save_file(
            {name: array.astype(ml_dtypes.float8_e4m3fn) for name, array in MNIST_TENSORS.items()},
            path,
        ),
        "is F8_E4M3, it must be one of F64, F32, F16, BF16",
    ),
    "a pipe": (os.mkfifo, "it is a pipe, socket or device and no file"),
    "a name of many lines": (
        damaged(lambda t: t.update({"model.\n\x1b[2J[red]x": t[NORM]})),
        "1 too many: + model. [2J[red]x",
    ),
    "too large for float32": (
        damaged(lambda t: t.update({NORM: np.full(32, 1e300)})),
        "weights must be finite in float32 (or give --allow-nonfinite), 1 tensors are not: model.d",
    ),
    "a tensor that claims to be huge": (
        lambda path: torch_writer.save(path, stored(EVEN_TENSORS) | {NORM: HUGE}),
        f"{NORM} has shape (1099511627776,); unet.out_norm.scale needs (32,)",
    ),
    "names that are no text": (
        lambda path: torch_writer.save(path, {1: 2, "fc1.": 3}),
        "it must hold tensors by name",
    ),
    "missing tensor": (
        damaged(lambda t: t.pop(NORM)),
        f"the tensors are not those of this architecture; 1 missing: - {NORM}",
    ),
    "superfluous tensor": (
        damaged(lambda t: t.update(more=t[NORM])),
        "architecture; 1 too many: + more",
    ),
    "misshapen tensor": (
        damaged(lambda t: t.update({NORM: t[NORM][:-1]})),
        f"{NORM} has shape (31,); unet.out_norm.scale needs (32,)",
    ),
    "integers": (
        damaged(lambda t: t.update({NORM: t[NORM].astype(np.int64)})),
        f"{NORM} is int64, it must be of a floating type",
    ),
    "a stem with other channels": (
        damaged(lambda t: t.update({STEM: np.repeat(t[STEM], 2, 1)})),
        "an SRM maps C or 2C + 1 channels to 2C + 1, these tensors map 6 to 7",
    ),
    "no stem": (damaged(lambda t: t.pop(STEM)), f"{STEM}, which must have 4 axes, got no such"),
    "times that differ": (
        damaged(lambda t: t.update({"time_embedding.mlp.0.bias": t["time_embedding.mlp.2.bias"]})),
        "repeated tensors must be equal: time_embedding.mlp.0.bias and",
    ),
    "not finite": (
        damaged(lambda t: t.update({NORM: t[NORM] * NAN})),
        f"weights must be finite in float32 (or give --allow-nonfinite), 1 tensors are not: {NORM}",
    ),
    "a foreign tensor in a checkpoint": (
        lambda path: torch_writer.save(
            path,
            {
                "denoiser.model.encoder.x": 1,
                "ema_denoiser.module.model.encoder.x": 1,
                "teacher.x": 1,
            },
        ),
        "tensors of no SRM denoiser: teacher.x",
    ),
    "no averaged weights": (
        lambda path: lightning.write(path, EVEN_TENSORS),
        "it has no ema weights, only raw",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_bad_file_ends_in_one_line_and_leaves_nothing(tmp_path, monkeypatch, capsys, name):
    make, reason = REFUSED[name]
    path, out = tmp_path / "bad.ckpt", tmp_path / "made" / "model"
    make(path)
    out.parent.mkdir()
    assert run(monkeypatch, "import", path, out, *words(FLAGS["tiny_even"])) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ")
    assert told.count("\n") == 1
    assert str(path) in told
    assert reason in told
    assert len(told) < 2000
    assert not list(out.parent.iterdir())


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (
            ["--preset", "ep_5"],
            "unknown preset 'ep_5'; presets for SRM denoiser: ep, ep_base, ep_4",
        ),
        (["--preset", "ep_4"], "preset ep_4 says widths=(64, 128, 128, 256), attention=(False, F"),
        (["--preset", "ms1000"], "concat_clues=True, but its tensors say channels=3, widths=(32, "),
        ([], "give --image-size, --patch-size, --head-width, or --preset; presets that fit the te"),
        (["--patch-size", "4"], "give --image-size, --head-width, or --preset"),
        (
            [*words(FLAGS["tiny_even"] | {"patch_size": 5})],
            "--image-size must be positive multiples of --patch-size=5",
        ),
        ([*words(FLAGS["tiny_even"] | {"head_width": 5})], "multiples of --head-width=5, got 32"),
    ],
)
def test_what_the_tensors_do_not_tell_must_be_said_and_fit(
    tmp_path, monkeypatch, capsys, options, reason
):
    assert run(monkeypatch, "import", EVEN, tmp_path / "model", *options) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"error: {EVEN}: ")
    assert told.count("\n") == 1
    assert reason in told
    assert not list(tmp_path.iterdir())


def test_presets_that_fit_are_offered(tmp_path):
    tensors = random_tensors(srm.RELEASES["ep"])
    path = save_tensors(tmp_path / "ep.pt", tensors)
    fitting = "ep, ep_base, ep_4, ep_4_bs050, ep_4_bs100, even-pixels"
    with pytest.raises(ValueError, match=rf"presets that fit the tensors: {fitting}$"):
        conversion.import_checkpoint(path, tmp_path / "model")
    _, config = conversion.import_checkpoint(
        path, tmp_path / "model", preset="ep", given={"patch_size": 8}
    )
    assert config == dataclasses.replace(srm.RELEASES["ep"], patch_size=8)
    assert open_network(tmp_path / "model")[1]["architecture"] == "preset ep and patch_size=8"


def test_a_classifier_takes_no_patches(tmp_path):
    with pytest.raises(ValueError, match="MNIST classifier: --patch-size cannot be given"):
        conversion.import_checkpoint(MNIST, tmp_path / "model", given={"patch_size": 4})


def test_weights_that_are_not_finite_are_converted_on_demand(tmp_path, monkeypatch, capsys):
    path = damaged(lambda t: t.update({NORM: t[NORM] * NAN}))(tmp_path / "bad.ckpt")
    options = [*words(FLAGS["tiny_even"]), "--allow-nonfinite"]
    assert run(monkeypatch, "import", path, tmp_path / "model", *options) == 0
    model = ipr_jax.load(tmp_path / "model")
    assert np.isnan(model.unet.out_norm.scale[...]).all()


COMMANDS = [("import", "no.ckpt"), ("export", "no-model")]
"""What is refused for its results is refused before anything is read."""


@pytest.mark.parametrize("arguments", COMMANDS)
def test_existing_results_are_kept(tmp_path, monkeypatch, capsys, arguments):
    (tmp_path / "there").write_text("mine")
    assert run(monkeypatch, *arguments, tmp_path / "there") == 2
    assert "exists and is not overwritten" in capsys.readouterr().err
    assert run(monkeypatch, *arguments, tmp_path / "none" / "there") == 2
    assert "is not a folder, create it first" in capsys.readouterr().err
    assert (tmp_path / "there").read_text() == "mine"
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("arguments", COMMANDS)
def test_places_that_cannot_be_written_to_are_refused(tmp_path, monkeypatch, capsys, arguments):
    assert run(monkeypatch, *arguments, tmp_path / os.fsdecode(b"\xff.safetensors")) == 2
    assert "\\udcff.safetensors' is not UTF-8, rename it\n" in capsys.readouterr().err
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert run(monkeypatch, *arguments, tmp_path / "out.safetensors") == 2
    assert capsys.readouterr().err == f"error: {tmp_path} cannot be written to\n"
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_whose_path_is_not_utf8_is_refused(tmp_path, monkeypatch, capsys):
    path = tmp_path / os.fsdecode(b"\xff.ckpt")
    path.write_bytes(MNIST.read_bytes())
    assert run(monkeypatch, "import", path, tmp_path / "model") == 2
    told = capsys.readouterr().err
    assert told == f"error: '{tmp_path}/\\udcff.ckpt' is not UTF-8, rename it\n"


@pytest.mark.parametrize("name", ["nope.pt", "model", "model.SAFETENSORS.bin"])
def test_an_export_is_named_safetensors(tmp_path, monkeypatch, capsys, name):
    assert run(monkeypatch, "export", "mini-sudoku", tmp_path / name) == 2
    told = capsys.readouterr().err
    assert (
        told == f"error: {tmp_path / name} must end in .safetensors, the format that is written\n"
    )
    assert not list(tmp_path.iterdir())


def test_too_little_space_is_refused_before_anything_is_written(tmp_path, monkeypatch, capsys):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    assert run(monkeypatch, "import", MNIST, tmp_path / "model") == 2
    size = sum(tensor.size * 4 for tensor in MNIST_TENSORS.values())
    assert capsys.readouterr().err == (
        f"error: [Errno 28] No space left on device, 1000 bytes are free, up to {size} are needed: "
        f"'{tmp_path / 'model'}'\n"
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("kib", "arguments"),
    [
        (10, ("import", EVEN, "model", *words(FLAGS["tiny_even"]))),
        (100, ("import", EVEN, "model", *words(FLAGS["tiny_even"]))),
        (10, ("export", "mini-sudoku", "model.safetensors")),
    ],
)
def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, kib, arguments):
    """No file can be larger than that, as on a disk that is full."""
    full = ("bash", "-c", f'trap "" XFSZ; ulimit -f {kib}; exec "$0" "$@"')
    command = [*full, sys.executable, "-m", "convert", *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert "file too large" in done.stderr.lower()
    assert done.stderr.count("error: ") == 1
    assert done.stderr.count("\n") == 1 + done.stderr.count("warning: ")
    assert not list(tmp_path.iterdir())


def test_an_export_for_another_number_of_groups_names_the_line_to_change(tmp_path):
    path = tmp_path / "model.safetensors"
    said = (
        "the published class computes something else with these weights: it has "
        "nn.GroupNorm(32, d) in src/model/denoiser/norm_layers.py, which must be nn.GroupNorm(8, d)"
    )
    with pytest.warns(UserWarning, match=f"^{re.escape(said)}$"):
        conversion.export("mini-sudoku", path)
    assert len(load_file(path)) == 212


def test_verify_names_the_number_of_groups_that_it_compares_at(tmp_path, monkeypatch):
    monkeypatch.setattr(torch_model, "import_torch", lambda: None)
    with (
        pytest.warns(UserWarning, match=r"which must be nn\.GroupNorm\(8, d\)$"),
        pytest.raises(FileNotFoundError),
    ):
        conversion.verify(tmp_path / "none.ckpt", "mini-sudoku")


def test_names_are_printed_as_they_are(monkeypatch, capsys):
    found = {"[v2]": (1e-6, 1.0), "[/x]:smile:": (1.0, 1.0)}
    monkeypatch.setattr(conversion, "verify", lambda *arguments, **options: found)
    assert run(monkeypatch, "verify", "a", "b") == 2
    said = capsys.readouterr()
    assert [line.split() for line in said.out.splitlines()[1:]] == [
        ["[v2]", "1.0e-06", "1"],
        ["[/x]:smile:", "1.0e+00", "1"],
    ]
    assert said.err.startswith("error: [/x]")
    assert run(monkeypatch, "import", "[v2]/[bold]x.ckpt", "model") == 2
    told = capsys.readouterr().err
    assert told == "error: [Errno 2] No such file or directory: '[v2]/[bold]x.ckpt'\n"


def test_a_folder_of_another_network_is_refused(tmp_path):
    conversion.import_checkpoint(MNIST, tmp_path / "model")
    needed = r"kind is 'MNISTConfig', where one of \['ModelConfig', 'TransformerConfig'\]"
    with pytest.raises(ValueError, match=needed):
        ipr_jax.load(tmp_path / "model")


def test_metadata_preset_and_options_must_agree(tmp_path):
    path = tmp_path / "mini.safetensors"
    with pytest.warns(UserWarning, match="published class"):
        conversion.export("mini-sudoku", path)
    for options, said in (
        ({"given": {"patch_size": 4}}, "says --patch-size=8, but preset or options --patch-size=4"),
        ({"preset": "ep_4"}, "says channels=1, .* or options channels=3, "),
    ):
        with pytest.raises(ValueError, match=f"its metadata {said}"):
            conversion.import_checkpoint(path, tmp_path / "other", **options)
    conversion.import_checkpoint(path, tmp_path / "model", preset="mini-sudoku")


@pytest.mark.parametrize("name", ["m[1]", "m*", "what?", "m.orbax-checkpoint-tmp"])
def test_names_that_orbax_cannot_write_are_refused(tmp_path, monkeypatch, capsys, name):
    assert run(monkeypatch, "import", MNIST, tmp_path / name) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["a b", "[red]x", "ü", "e"])
def test_files_of_any_name_are_read_and_named(tmp_path, monkeypatch, capsys, name):
    path = tmp_path / name
    path.write_bytes(MNIST.read_bytes())
    assert run(monkeypatch, "import", path, tmp_path / "model") == 0
    assert open_network(tmp_path / "model")[1]["source"] == name
    path.write_text("no checkpoint")
    assert run(monkeypatch, "import", path, tmp_path / "other") == 2
    assert str(path) in capsys.readouterr().err


def test_what_cannot_be_printed_is_left_out_of_the_report(tmp_path, monkeypatch, capsys):
    path, beside = tmp_path / "last.ckpt", {"[/x]": 1, "\ud800\x1b[2J": 2}
    torch_writer.save(path, {"state_dict": stored(MNIST_TENSORS)} | beside)
    assert run(monkeypatch, "import", path, tmp_path / "model") == 0
    assert "ignored (beside the state dict): 2: [/x], [2J" in capsys.readouterr().out


def test_every_release_is_in_the_help():
    named = set(re.findall(r"\w+", command.ImportArgs.__doc__))
    releases = {name for name in srm.RELEASES if not name.endswith("_base")}
    assert named >= releases | classifiers.VARIANTS.keys()


def test_verify_compares_with_pytorch_where_that_is_installed_and_else_asks_for_it(tmp_path):
    given = {name: getattr(CLUES, name) for name in ("image_size", "patch_size", "head_width")}
    for config, options in ((CLUES, {"given": given}), (PolygonConfig(), {"preset": "polygons"})):
        kind = type(config).__name__
        path, out = tmp_path / f"{kind}.safetensors", tmp_path / kind
        save_file(random_tensors(config), path)
        conversion.import_checkpoint(path, out, **options)
        if importlib.util.find_spec("torch") is None:
            with pytest.raises(ModuleNotFoundError, match="verify needs PyTorch: pip install tor"):
                conversion.verify(path, out)
        else:
            for difference, magnitude in conversion.verify(path, out).values():
                assert difference <= 2e-5 * max(1, magnitude)
                assert magnitude > 0.1


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
