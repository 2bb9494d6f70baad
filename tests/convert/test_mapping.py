"""The table of names: complete, unambiguous, and strict about what does not fit it."""

import re
from collections import Counter

import jax
import numpy as np
import pytest
from conftest import GOLDEN, PREFIXES, golden_config, golden_model, tensors_of
from flax import nnx

from convert import mapping, srm
from ipr_jax import PRESETS, SRM
from ipr_jax.models.networks import build

EVEN = GOLDEN / "tiny_even" / "last.ckpt"
NAMES = ["tiny_even", "tiny_sudoku"]
CONFIGS = PRESETS | {name: golden_config(name) for name in NAMES}
FIRST_TIME = "time_embedding.mlp.0.weight"


def fill(tensors: dict[str, np.ndarray], name: str) -> SRM:
    abstract = nnx.eval_shape(lambda: build(CONFIGS[name]))
    return mapping.fill(abstract, srm.table(CONFIGS[name]), tensors)


def wanted_shapes(name: str) -> dict[mapping.Path, tuple[int, ...]]:
    model = nnx.eval_shape(lambda: build(CONFIGS[name]))
    return {path: leaf.shape for path, leaf in nnx.to_flat_state(nnx.state(model))}


@pytest.mark.parametrize("name", CONFIGS)
def test_every_parameter_has_one_entry_and_every_name_one_place(name):
    table = srm.table(CONFIGS[name])
    assert Counter(entry.path for entry in table) == Counter(wanted_shapes(name).keys())
    assert set(Counter(torch for entry in table for torch in entry.names).values()) == {1}


@pytest.mark.parametrize("name", NAMES)
def test_every_tensor_of_the_published_state_dict_has_an_entry(name):
    tensors, shapes = tensors_of(GOLDEN / name / "last.ckpt", PREFIXES["raw"]), wanted_shapes(name)
    table = srm.table(CONFIGS[name])
    assert {torch for entry in table for torch in entry.names} == tensors.keys()
    for entry in table:
        assert {tensors[torch].shape for torch in entry.names} == {
            entry.torch_shape(shapes[entry.path])
        }
        assert entry.to_jax(tensors[entry.names[0]]).shape == shapes[entry.path]


def test_only_the_time_embedding_is_repeated_once_per_residual_block():
    config = CONFIGS["tiny_sudoku"]
    blocks = len(config.widths) * (2 * config.num_blocks + 1) + 2
    for entry in srm.table(config):
        assert len(entry.names) == (1 + blocks if entry.path[1] == "embed" else 1)


@pytest.mark.parametrize(
    ("torch", "path", "axes"),
    [
        ("model.decoder.out.2.weight", ("out_conv", "kernel"), (2, 3, 1, 0)),
        (FIRST_TIME, ("embed", "linear1", "kernel"), (1, 0)),
        (
            "model.bottleneck.blocks.1.qkv.weight",
            ("bottleneck", 0, "attention", "qkv", "kernel"),
            (1, 0, 2),
        ),
        ("model.decoder.out.0.weight", ("out_norm", "scale"), (0,)),
    ],
)
def test_layout_of_each_kind_of_tensor(torch, path, axes):
    leaf = dict(nnx.to_flat_state(nnx.state(golden_model("tiny_even", "raw"))))["unet", *path]
    tensor = tensors_of(EVEN, PREFIXES["raw"])[torch].transpose(axes)
    np.testing.assert_array_equal(leaf[...], tensor.reshape(leaf.shape))


def test_averaged_and_raw_weights_are_different_models():
    ema, raw = (golden_model("tiny_even", weights) for weights in ("ema", "raw"))
    assert jax.tree.structure(ema) == jax.tree.structure(raw)
    changed = [
        not np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (ema, raw)), strict=True)
    ]
    assert all(changed)


def without(tensors):
    del tensors["model.encoder.blocks.0.0.bias"]


def with_another(tensors):
    tensors["model.label_embedding.weight"] = np.zeros((3, 4), np.float32)


def renamed(tensors):
    tensors["model.encoder.stem.bias"] = tensors.pop("model.encoder.blocks.0.0.bias")


def with_more_channels(tensors):
    tensors["model.decoder.out.2.weight"] = np.zeros((9, 32, 3, 3), np.float32)


def with_fewer_axes(tensors):
    tensors["model.decoder.out.2.weight"] = np.zeros((7, 32), np.float32)


def with_a_wider_kernel(tensors):
    name = "model.bottleneck.blocks.1.qkv.weight"
    tensors[name] = np.repeat(tensors[name], 3, axis=2)


def with_all_times_transposed(tensors):
    for name in list(tensors):
        if name.endswith("mlp.0.weight"):
            tensors[name] = tensors[name].T


def with_one_time_changed(tensors):
    name = "model.decoder.blocks.0.0.norm_with_embedding.t_emb.mlp.0.weight"
    tensors[name] = tensors[name] + np.float32(1e-3)


STEM = "model.encoder.blocks.0.0.bias"
OUT = "model.decoder.out.2.weight"


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (without, [f": - {STEM}"]),
        (with_another, [": + model.label_embedding.weight"]),
        (renamed, ["+ model.encoder.stem.bias; ", f": - {STEM}"]),
        (with_more_channels, [OUT, "(9, 32, 3, 3)", "unet.out_conv.kernel", "(7, 32, 3, 3)"]),
        (with_fewer_axes, [OUT, "(7, 32)", "(7, 32, 3, 3)"]),
        (
            with_a_wider_kernel,
            ["model.bottleneck.blocks.1.qkv.weight", "(96, 32, 3)", "(96, 32, 1)"],
        ),
        (with_all_times_transposed, [FIRST_TIME, "(16, 32)", "(32, 16)"]),
        (with_one_time_changed, [FIRST_TIME, "model.decoder.blocks.0.0.norm_with_embedding"]),
    ],
)
def test_a_state_dict_that_does_not_fit_is_refused_by_name(damage, said):
    tensors = tensors_of(EVEN, PREFIXES["raw"])
    damage(tensors)
    with pytest.raises(ValueError, match=re.escape(said[0])) as raised:
        fill(tensors, "tiny_even")
    for part in said[1:]:
        assert part in str(raised.value)


def test_a_state_dict_of_another_architecture_is_refused():
    with pytest.raises(ValueError, match=r"\d+ too many: \+ .*; \d+ missing: - "):
        fill(tensors_of(EVEN, PREFIXES["raw"]), "tiny_sudoku")
