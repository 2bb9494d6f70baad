"""Weights are found whatever wraps them, the averaged are told from the raw."""

import re

import numpy as np
import pytest
import torch_writer
from converted import EVEN_TENSORS, MNIST_TENSORS, run, stored
from safetensors.numpy import save_file

from convert import source


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
