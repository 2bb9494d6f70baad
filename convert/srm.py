"""The SRM denoiser in the published state dict: its table, and what its tensors tell of it."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from convert.mapping import Entry, Path, layer
from ipr_jax.models import PRESETS, ModelConfig

_EP, _CP, _MS = (PRESETS[name] for name in ("even-pixels", "counting-polygons", "mnist-sudoku"))

_EP_BASE = dataclasses.replace(_EP, patch_size=32)
_CP_BASE = dataclasses.replace(_CP, patch_size=128)
_MS_BASE = dataclasses.replace(_MS, patch_size=252, concat_clues=True)

RELEASES: dict[str, ModelConfig] = {
    "ep": _EP_BASE,
    "ep_base": _EP_BASE,
    "ep_4": _EP,
    "ep_4_bs050": _EP,
    "ep_4_bs100": _EP,
    "cp_ffhq": _CP_BASE,
    "cp_ffhq_base": _CP_BASE,
    "cp_ffhq_8": _CP,
    "ms1000": _MS_BASE,
    "ms1000_base": _MS_BASE,
    "ms1000_28": _MS,
    "ms1000_28_df": _MS,
}
"""The architecture of every released SRM checkpoint. Those without a number after the data set are
the image-level baselines, whose published configurations are called ``*_base``."""

PUBLISHED_GROUPS = 32
"""Groups of every norm of the published class, which takes no other number."""

Shapes = Mapping[str, tuple[int, ...]]


def _res_block(torch: str, path: Path, shortcut: bool) -> list[Entry]:
    norm2 = f"{torch}.norm_with_embedding"
    entries = [
        *layer(f"{torch}.conv_1.0", (*path, "norm1"), "vector"),
        *layer(f"{torch}.conv_1.2", (*path, "conv1"), "conv"),
        *layer(f"{norm2}.embedding_layer.1", (*path, "level"), "linear"),
        *layer(f"{norm2}.norm", (*path, "norm2"), "vector"),
        *layer(f"{torch}.conv_2.2", (*path, "conv2"), "conv"),
    ]
    return entries + (layer(f"{torch}.shortcut", (*path, "shortcut"), "conv") if shortcut else [])


def _attention(torch: str, path: Path) -> list[Entry]:
    return [
        *layer(f"{torch}.norm", (*path, "norm"), "vector"),
        *layer(f"{torch}.qkv", (*path, "qkv"), "linear1d"),
        *layer(f"{torch}.proj", (*path, "proj"), "linear1d"),
    ]


def table(config: ModelConfig) -> list[Entry]:
    """Every parameter of ``SRM(config)``, with the PyTorch names relative to the denoiser."""
    widths, unet = config.widths, ("unet",)
    entries = layer("model.encoder.blocks.0.0", (*unet, "stem"), "conv")
    res_blocks: list[str] = []

    def res(torch: str, path: Path, channels_in: int, channels_out: int) -> None:
        entries.extend(_res_block(torch, path, channels_in != channels_out))
        res_blocks.append(torch)

    current, skips, index = widths[0], [widths[0]], 0
    for level, width in enumerate(widths):
        for _ in range(config.num_blocks):
            torch, path = f"model.encoder.blocks.{index + 1}", (*unet, "encoder", index)
            res(f"{torch}.0", (*path, "res"), current, width)
            if config.attention[level]:
                entries.extend(_attention(f"{torch}.1", (*path, "attention")))
            current, index = width, index + 1
            skips.append(current)
        if level != len(widths) - 1:
            torch = f"model.encoder.blocks.{index + 1}.0.downsample"
            entries.extend(layer(torch, (*unet, "encoder", index), "conv"))
            index += 1
            skips.append(current)

    res("model.bottleneck.blocks.0", (*unet, "bottleneck", 0, "res"), current, current)
    entries.extend(_attention("model.bottleneck.blocks.1", (*unet, "bottleneck", 0, "attention")))
    res("model.bottleneck.blocks.2", (*unet, "bottleneck", 1, "res"), current, current)

    index = 0
    for level, width in reversed(list(enumerate(widths))):
        for block in range(config.num_blocks + 1):
            torch, path = f"model.decoder.blocks.{index}", (*unet, "decoder", index)
            res(f"{torch}.0", (*path, "res"), current + skips.pop(), width)
            if config.attention[level]:
                entries.extend(_attention(f"{torch}.1", (*path, "attention")))
            if block == config.num_blocks and level > 0:
                up = f"{torch}.{1 + config.attention[level]}.conv"
                entries.extend(layer(up, (*path, "up"), "conv"))
            current, index = width, index + 1

    entries.extend(layer("model.decoder.out.0", (*unet, "out_norm"), "vector"))
    entries.extend(layer("model.decoder.out.2", (*unet, "out_conv"), "conv"))

    owners = ["time_embedding", *(f"{name}.norm_with_embedding.t_emb" for name in res_blocks)]
    for torch, linear in (("mlp.0", "linear1"), ("mlp.2", "linear2")):
        for suffix, leaf, kind in (("weight", "kernel", "linear"), ("bias", "bias", "vector")):
            names = tuple(f"{owner}.{torch}.{suffix}" for owner in owners)
            entries.append(Entry(names, (*unet, "embed", linear, leaf), kind))
    return entries


def infer(shapes: Shapes) -> dict[str, Any]:
    """What the shapes of the tensors tell of the architecture, by field of ``ModelConfig``.

    The first block of a level stands for the level: whether the others agree, ``fill`` checks.

    Args:
        shapes: by PyTorch name, relative to the denoiser.

    Raises:
        ValueError: a tensor to tell it from is missing, or the channels are those of no SRM.
    """

    def shape(name: str, axes: int) -> tuple[int, ...]:
        if len(shapes.get(name, ())) != axes:
            raise ValueError(
                f"the architecture shows in {name}, which must have {axes} axes, "
                f"got {shapes.get(name, 'no such tensor')}"
            )
        return shapes[name]

    channels_out = shape("model.decoder.out.2.weight", 4)[0]
    channels_in = shape("model.encoder.blocks.0.0.weight", 4)[1]
    channels = (channels_out - 1) // 2
    if channels_out != 2 * channels + 1 or channels_in not in (channels, channels_out):
        raise ValueError(
            f"an SRM maps C or 2C + 1 channels to 2C + 1, these tensors map {channels_in} to "
            f"{channels_out}"
        )
    blocks: dict[int, set[str]] = {}
    for name in shapes:
        if match := re.fullmatch(r"model\.encoder\.blocks\.(\d{1,9})\.(.+)", name):
            blocks.setdefault(int(match[1]), set()).add(match[2])
    levels: list[list[int]] = [[]]
    for index in sorted(blocks.keys() - {0}):
        if "0.downsample.weight" in blocks[index]:
            levels.append([])
        else:
            levels[-1].append(index)
    if not all(levels):
        raise ValueError("an SRM has residual blocks in every level of its encoder")
    firsts = [level[0] for level in levels]
    time_width, num_frequencies = shape("time_embedding.mlp.0.weight", 2)
    return {
        "channels": channels,
        "widths": tuple(
            shape(f"model.encoder.blocks.{index}.0.conv_1.2.weight", 4)[0] for index in firsts
        ),
        "attention": tuple("1.qkv.weight" in blocks[index] for index in firsts),
        "num_blocks": len(levels[0]),
        "time_width": time_width,
        "num_frequencies": num_frequencies,
        "concat_clues": channels_in != channels,
    }
