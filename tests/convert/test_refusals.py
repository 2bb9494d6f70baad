"""What a conversion refuses, asks for and says; what is refused is one line and leaves nothing."""

import dataclasses
import gzip
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import lightning
import ml_dtypes
import numpy as np
import pytest
import torch_writer
from converted import (
    CLUES,
    EVEN,
    EVEN_TENSORS,
    FLAGS,
    MNIST,
    MNIST_TENSORS,
    random_tensors,
    run,
    save_tensors,
    stored,
    words,
)
from safetensors.numpy import load_file, save_file

import ipr_jax
from convert import __main__ as command
from convert import classifiers, conversion, srm, torch_model
from ipr_jax.models.networks import open_network
from ipr_jax.tasks.polygon_classifier import PolygonConfig

ROOT = Path(__file__).parents[2]
STEM = "model.encoder.blocks.0.0.weight"


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
    installed = importlib.util.find_spec("torch") is not None
    configs = ((CLUES, {"given": given}), (PolygonConfig(), {"preset": "polygons"}))
    for config, options in configs if installed else configs[:1]:
        kind = type(config).__name__
        path, out = tmp_path / f"{kind}.safetensors", tmp_path / kind
        save_file(random_tensors(config), path)
        conversion.import_checkpoint(path, out, **options)
        if not installed:
            with pytest.raises(ModuleNotFoundError, match="verify needs PyTorch: pip install tor"):
                conversion.verify(path, out)
        else:
            for difference, magnitude in conversion.verify(path, out).values():
                assert difference <= 2e-5 * max(1, magnitude)
                assert magnitude > 0.1
