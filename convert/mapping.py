"""The one table between the published PyTorch state dict and ``ipr_jax.SRM``.

PyTorch images are NCHW and its kernels OIHW; here images are NHWC and kernels HWIO.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from flax import nnx

from ipr_jax.config import ModelConfig
from ipr_jax.denoiser import SRM

Path = tuple[str | int, ...]

# For each kind of tensor, the axes of the PyTorch array in the order of the JAX array.
_AXES = {"vector": (0,), "linear": (1, 0), "linear1d": (1, 0, 2), "conv": (2, 3, 1, 0)}


@dataclass(frozen=True)
class Entry:
    """One parameter: where it lives on each side, and how its axes correspond.

    Attributes:
        names: the PyTorch names; all hold the same values (the time embedding is repeated in every
            block of the published state dict).
        path: the path of the parameter in the NNX state.
        kind: ``vector``, ``linear``, ``linear1d`` (a linear map stored as a width-1 convolution) or
            ``conv``.
    """

    names: tuple[str, ...]
    path: Path
    kind: str

    def torch_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the PyTorch tensor, from that of the JAX parameter."""
        axes = _AXES[self.kind]
        padded = (*shape, 1) if self.kind == "linear1d" else shape
        return tuple(padded[axes.index(axis)] for axis in range(len(axes)))

    def to_jax(self, tensor: np.ndarray) -> np.ndarray:
        """A PyTorch tensor in the layout of the JAX parameter."""
        array = tensor.transpose(_AXES[self.kind])
        return array[..., 0] if self.kind == "linear1d" else array


def _layer(torch: str, path: Path, kind: str) -> list[Entry]:
    """Weight and bias of a layer; norms call their weight scale, the others kernel."""
    weight = "scale" if kind == "vector" else "kernel"
    return [
        Entry((f"{torch}.weight",), (*path, weight), kind),
        Entry((f"{torch}.bias",), (*path, "bias"), "vector"),
    ]


def _res_block(torch: str, path: Path, shortcut: bool) -> list[Entry]:
    norm2 = f"{torch}.norm_with_embedding"
    entries = [
        *_layer(f"{torch}.conv_1.0", (*path, "norm1"), "vector"),
        *_layer(f"{torch}.conv_1.2", (*path, "conv1"), "conv"),
        *_layer(f"{norm2}.embedding_layer.1", (*path, "level"), "linear"),
        *_layer(f"{norm2}.norm", (*path, "norm2"), "vector"),
        *_layer(f"{torch}.conv_2.2", (*path, "conv2"), "conv"),
    ]
    return entries + (_layer(f"{torch}.shortcut", (*path, "shortcut"), "conv") if shortcut else [])


def _attention(torch: str, path: Path) -> list[Entry]:
    return [
        *_layer(f"{torch}.norm", (*path, "norm"), "vector"),
        *_layer(f"{torch}.qkv", (*path, "qkv"), "linear1d"),
        *_layer(f"{torch}.proj", (*path, "proj"), "linear1d"),
    ]


def table(config: ModelConfig) -> list[Entry]:
    """Every parameter of ``SRM(config)``, with the PyTorch names relative to the denoiser."""
    widths, unet = config.widths, ("unet",)
    entries = _layer("model.encoder.blocks.0.0", (*unet, "stem"), "conv")
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
            entries.extend(_layer(torch, (*unet, "encoder", index), "conv"))
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
                entries.extend(_layer(up, (*path, "up"), "conv"))
            current, index = width, index + 1

    entries.extend(_layer("model.decoder.out.0", (*unet, "out_norm"), "vector"))
    entries.extend(_layer("model.decoder.out.2", (*unet, "out_conv"), "conv"))

    owners = ["time_embedding", *(f"{name}.norm_with_embedding.t_emb" for name in res_blocks)]
    for torch, layer in (("mlp.0", "linear1"), ("mlp.2", "linear2")):
        for suffix, leaf, kind in (("weight", "kernel", "linear"), ("bias", "bias", "vector")):
            names = tuple(f"{owner}.{torch}.{suffix}" for owner in owners)
            entries.append(Entry(names, (*unet, "embed", layer, leaf), kind))
    return entries


def _difference(problem: str, have: set[str], want: set[str]) -> str:
    lines = [f"+ {name}" for name in sorted(have - want)]
    lines += [f"- {name}" for name in sorted(want - have)]
    return "\n".join([problem, *lines])


def to_model(tensors: Mapping[str, np.ndarray], config: ModelConfig) -> SRM:
    """Build the model of a PyTorch denoiser state dict.

    Args:
        tensors: PyTorch names, relative to the denoiser, to arrays; every one is used.
        config: the architecture that the tensors belong to.

    Returns:
        The model, float32 parameters.

    Raises:
        ValueError: a tensor is missing or superfluous (listed with - and +), has another shape, or
            the repeated time embeddings differ.
    """
    entries = table(config)
    wanted = {name for entry in entries for name in entry.names}
    if wanted != set(tensors):
        raise ValueError(
            _difference(
                "the state dict is not that of this architecture; superfluous (+) and missing (-):",
                set(tensors),
                wanted,
            )
        )
    model = nnx.eval_shape(lambda: SRM(config, rngs=nnx.Rngs(0)))
    graph, abstract = nnx.split(model)
    state = dict(nnx.to_flat_state(abstract))
    filled: set[Path] = set()
    for entry in entries:
        first, *others = (tensors[name] for name in entry.names)
        parameter = state[entry.path]
        shape = entry.torch_shape(parameter.shape)
        if first.shape != shape:
            raise ValueError(
                f"{entry.names[0]} has shape {first.shape}; "
                f"{'.'.join(map(str, entry.path))} needs {shape}"
            )
        for name, other in zip(entry.names[1:], others, strict=True):
            if not np.array_equal(first, other):
                raise ValueError(f"repeated tensors must be equal: {entry.names[0]} and {name}")
        state[entry.path] = parameter.replace(jnp.asarray(entry.to_jax(first), jnp.float32))
        filled.add(entry.path)
    if filled != set(state):
        missing = sorted(".".join(map(str, path)) for path in set(state) - filled)
        raise ValueError(f"parameters without a tensor: {missing}")
    return nnx.merge(graph, nnx.from_flat_state(list(state.items())))
