"""The networks in PyTorch, run straight from a state dict: what a conversion is compared with.

It computes what the published code does, sharing no computation with ``ipr_jax``: noise levels are
embedded per pixel in every block, with that block's own copy of the weights, and the layers are
found by the names of the tensors. PyTorch is imported when a network is run. Images are NCHW.
"""

import importlib
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from ipr_jax.models import ModelConfig
from ipr_jax.tasks.mnist_classifier import MNISTConfig
from ipr_jax.tasks.polygon_classifier import PolygonConfig

Tensor = Any


def import_torch() -> Any:
    """Import PyTorch.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    try:
        return importlib.import_module("torch")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("verify needs PyTorch: pip install torch") from error


class _Layers:
    """The layers of a state dict by name, each as a function of its input."""

    def __init__(self, tensors: Mapping[str, np.ndarray]):
        self.torch = import_torch()
        self.functional = self.torch.nn.functional
        self.tensors = tensors

    def __contains__(self, layer: str) -> bool:
        return f"{layer}.weight" in self.tensors

    def parts(self, name: str) -> list[str]:
        """The names of the numbered parts of a sequence, in order."""
        prefix = f"{name}."
        below = (other.removeprefix(prefix) for other in self.tensors if other.startswith(prefix))
        return [f"{prefix}{i}" for i in sorted({int(rest.partition(".")[0]) for rest in below})]

    def tensor(self, array: np.ndarray) -> Tensor:
        """A float32 copy in PyTorch."""
        return self.torch.from_numpy(np.array(array, np.float32))

    def own(self, layer: str, leaf: str) -> Tensor:
        """A tensor of a layer."""
        return self.tensor(self.tensors[f"{layer}.{leaf}"])

    def conv(self, layer: str, x: Tensor, stride: int = 1) -> Tensor:
        """Convolve [N, C, ...] in one or two dimensions, padded by half the kernel."""
        weight = self.own(layer, "weight")
        convolve = {3: self.functional.conv1d, 4: self.functional.conv2d}[weight.ndim]
        bias = self.own(layer, "bias") if f"{layer}.bias" in self.tensors else None
        return convolve(x, weight, bias, stride=stride, padding=weight.shape[-1] // 2)

    def linear(self, layer: str, x: Tensor) -> Tensor:
        """Map the last axis."""
        return self.functional.linear(x, self.own(layer, "weight"), self.own(layer, "bias"))

    def group_norm(self, layer: str, x: Tensor, num_groups: int) -> Tensor:
        """Normalise [N, C, ...] per group of channels."""
        weight, bias = self.own(layer, "weight"), self.own(layer, "bias")
        return self.functional.group_norm(x, num_groups, weight, bias, eps=1e-5)

    def batch_norm(self, layer: str, x: Tensor) -> Tensor:
        """Normalise [N, C, ...] by the recorded statistics."""
        leaves = ("running_mean", "running_var", "weight", "bias")
        mean, variance, weight, bias = (self.own(layer, leaf) for leaf in leaves)
        return self.functional.batch_norm(x, mean, variance, weight, bias, eps=1e-5)


class _UNet:
    """The U-Net of a denoiser: ``unet(x)`` for fixed noise levels."""

    def __init__(self, layers: _Layers, config: ModelConfig, level: Tensor):
        """Keep the noise levels, [B, 1, H, W]."""
        self.layers, self.config, self.level = layers, config, level
        self.torch, self.functional = layers.torch, layers.functional

    def __call__(self, x: Tensor) -> Tensor:
        """[B, channels in, H, W] -> [B, channels out, H, W]."""
        layers, skips = self.layers, []
        for block in layers.parts("model.encoder.blocks"):
            x = self.sequence(block, x, skips)
            skips.append(x)
        x = self.sequence("model.bottleneck.blocks", x, skips)
        for block in layers.parts("model.decoder.blocks"):
            x = self.sequence(block, self.torch.cat([x, skips.pop()], dim=1), skips)
        x = layers.group_norm("model.decoder.out.0", x, self.config.num_groups)
        return layers.conv("model.decoder.out.2", self.functional.silu(x))

    def sequence(self, name: str, x: Tensor, skips: list[Tensor]) -> Tensor:
        """Run the parts of a block; an upsampling goes to the size of the last skip.

        Raises:
            ValueError: the tensors of a part are of no known kind of layer.
        """
        for part in self.layers.parts(name):
            if f"{part}.norm_with_embedding.norm" in self.layers:
                x = self.res_block(part, x)
            elif f"{part}.qkv" in self.layers:
                x = self.attention(part, x)
            elif f"{part}.downsample" in self.layers:
                x = self.layers.conv(f"{part}.downsample", x, stride=2)
            elif f"{part}.conv" in self.layers:
                x = self.functional.interpolate(x, size=skips[-1].shape[2:], mode="nearest")
                x = self.layers.conv(f"{part}.conv", x)
            elif part in self.layers:
                x = self.layers.conv(part, x)
            else:
                raise ValueError(f"{part} must be a layer of the published U-Net")
        return x

    def embedding(self, name: str, size: tuple[int, int]) -> Tensor:
        """Embed the noise level of every position of a resolution, [B, *size, features]."""
        half = self.config.num_frequencies // 2
        level = self.functional.interpolate(
            self.level, size=size, mode="bilinear", align_corners=False, antialias=False
        )[:, 0]
        index = self.torch.arange(half, dtype=self.torch.float32)
        frequencies = self.torch.exp(-math.log(10_000) * index / half)
        angle = (1000 * level - 1).clamp(min=0)[..., None] * frequencies
        features = self.torch.cat([angle.cos(), angle.sin()], dim=-1)
        hidden = self.functional.silu(self.layers.linear(f"{name}.mlp.0", features))
        return self.layers.linear(f"{name}.mlp.2", hidden)

    def res_block(self, name: str, x: Tensor) -> Tensor:
        """Norm, SiLU, conv; add the noise level; norm, SiLU, conv; plus the input."""
        layers, silu, num_groups = self.layers, self.functional.silu, self.config.num_groups
        y = layers.group_norm(f"{name}.conv_1.0", x, num_groups)
        y = layers.conv(f"{name}.conv_1.2", silu(y))
        norm = f"{name}.norm_with_embedding"
        embedded = silu(self.embedding(f"{norm}.t_emb", y.shape[2:]))
        y = y + layers.linear(f"{norm}.embedding_layer.1", embedded).movedim(-1, 1)
        y = layers.group_norm(f"{norm}.norm", y, num_groups)
        y = layers.conv(f"{name}.conv_2.2", silu(y))
        shortcut = f"{name}.shortcut"
        return y + (layers.conv(shortcut, x) if shortcut in layers else x)

    def attention(self, name: str, x: Tensor) -> Tensor:
        """Self-attention over all positions, plus the input."""
        width = self.config.head_width
        normal = self.layers.group_norm(f"{name}.norm", x, self.config.num_groups)
        qkv = self.layers.conv(f"{name}.qkv", normal.flatten(2))
        query, key, value = qkv.unflatten(1, (-1, 3, width)).unbind(2)  # [B, head, width, position]
        logits = (query * width**-0.25).transpose(2, 3) @ (key * width**-0.25)
        mixed = value @ logits.softmax(dim=-1).transpose(2, 3)
        return x + self.layers.conv(f"{name}.proj", mixed.flatten(1, 2)).reshape(x.shape)


def srm(
    tensors: Mapping[str, np.ndarray],
    config: ModelConfig,
    z: np.ndarray,
    t: np.ndarray,
    condition: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """Run a denoiser.

    Args:
        tensors: the state dict, names relative to the denoiser.
        config: ``channels``, ``patch_size``, ``num_frequencies``, ``head_width`` and ``num_groups``
            are used; the blocks and their widths are those of ``tensors``.
        z: float32 [B, C, H, W], noisy images.
        t: float32 [B, h, w] in [0, 1], noise level per patch.
        condition: float32 [B, 1 + C, H, W], the mask (1 = to be generated) and the masked image,
            for a model that takes them as more channels; None for a model that does not.

    Returns:
        Float32 ``velocity`` and ``variance_fraction`` [B, C, H, W] and ``sigma`` [B, h, w].

    Raises:
        ModuleNotFoundError: PyTorch is not installed.
        ValueError: ``t`` does not fit ``z``, or there are layers that the published U-Net lacks.
        KeyError: a tensor is missing.
    """
    patch_size, channels = config.patch_size, config.channels
    if (t.shape[0], t.shape[1] * patch_size, t.shape[2] * patch_size) != (len(z), *z.shape[2:]):
        raise ValueError(
            f"t must have a noise level for each patch of {patch_size} x {patch_size} pixels "
            f"of z {list(z.shape)}, got {list(t.shape)}"
        )
    layers = _Layers(tensors)
    level = layers.tensor(t.repeat(patch_size, axis=1).repeat(patch_size, axis=2))[:, None]
    x = layers.tensor(z if condition is None else np.concatenate([z, condition], axis=1))
    out = _UNet(layers, config, level)(x)
    log_variance = layers.functional.avg_pool2d(out[:, -1:], patch_size)[:, 0]
    return {
        "velocity": out[:, :channels].numpy(),
        "variance_fraction": ((out[:, channels : 2 * channels] + 1) / 2).numpy(),
        "sigma": (log_variance / 2).exp().numpy(),
    }


def mnist_classifier(
    tensors: Mapping[str, np.ndarray], config: MNISTConfig, images: np.ndarray
) -> dict[str, np.ndarray]:
    """Run the classifier of digits.

    Args:
        tensors: the state dict.
        config: not used.
        images: float32 [N, 1, 28, 28] in [-1, 1].

    Returns:
        Float32 ``logits`` [N, 10].

    Raises:
        ModuleNotFoundError: PyTorch is not installed.
        KeyError: a tensor is missing.
    """
    layers = _Layers(tensors)
    relu, x = layers.functional.relu, layers.tensor(images)
    for conv in ("conv1", "conv2"):
        x = layers.functional.max_pool2d(relu(layers.conv(conv, x)), 2)
    hidden = relu(layers.linear("fc1", x.flatten(1)))
    return {"logits": layers.linear("fc2", hidden).numpy()}


def polygon_classifier(
    tensors: Mapping[str, np.ndarray], config: PolygonConfig, images: np.ndarray
) -> dict[str, np.ndarray]:
    """Run the classifier of polygons: a ResNet of bottleneck blocks with several heads.

    Args:
        tensors: the state dict.
        config: not used, the heads are those of ``tensors``.
        images: float32 [N, 3, 128, 128] in [-1, 1].

    Returns:
        By the name of each head its float32 logits, [N, classes].

    Raises:
        ModuleNotFoundError: PyTorch is not installed.
        KeyError: a tensor is missing.
    """
    layers = _Layers(tensors)
    relu, max_pool = layers.functional.relu, layers.functional.max_pool2d

    def conv_norm(name: str, conv: str, norm: str, x: Tensor, stride: int = 1) -> Tensor:
        return layers.batch_norm(f"{name}{norm}", layers.conv(f"{name}{conv}", x, stride))

    x = relu(conv_norm("", "conv1", "bn1", layers.tensor(images), stride=2))
    x = max_pool(x, 3, stride=2, padding=1)
    for stage in ("layer1", "layer2", "layer3", "layer4"):
        for block in layers.parts(stage):
            stride = 2 if block.endswith(".0") and stage != "layer1" else 1
            y = relu(conv_norm(block, ".conv1", ".bn1", x))
            y = relu(conv_norm(block, ".conv2", ".bn2", y, stride))
            y = conv_norm(block, ".conv3", ".bn3", y)
            if f"{block}.downsample.0" in layers:
                x = conv_norm(block, ".downsample.0", ".downsample.1", x, stride)
            x = relu(x + y)
    features = x.mean(dim=(2, 3))
    heads = sorted({name.split(".")[2] for name in tensors if name.startswith("fc.heads.")})
    return {head: layers.linear(f"fc.heads.{head}", features).numpy() for head in heads}
