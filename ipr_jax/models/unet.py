"""The SRM U-Net (arXiv 2502.21075), NHWC, conditioned on one noise level per patch.

The published network evaluates its time embedding per pixel in every residual block. The level is
constant inside a patch, so each distinct level of a resolution is embedded once here and broadcast;
where the published bilinear resize mixes patches, the distinct mixtures are embedded. The function
is the same to rounding at 0.38 to 0.56 of the FLOPs.

Shape letters are those of ``ipr_jax.core.types``; h', w' is the size of a resolution level.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ipr_jax.core import patches
from ipr_jax.models.config import ModelConfig

Dtype = Any

_torch_init = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def _conv(
    channels_in: int,
    channels_out: int,
    kernel: int,
    *,
    dtype: Dtype,
    rngs: nnx.Rngs,
    **options: Any,
) -> nnx.Conv:
    """A convolution that pads by kernel // 2 on every side, at any stride."""
    padding = kernel // 2
    options.setdefault("kernel_init", _torch_init)
    return nnx.Conv(
        channels_in,
        channels_out,
        (kernel, kernel),
        padding=((padding, padding), (padding, padding)),
        dtype=dtype,
        rngs=rngs,
        **options,
    )


class GroupNorm(nnx.Module):
    """Group norm over contiguous channels, epsilon 1e-5, statistics in float32."""

    def __init__(self, channels: int, num_groups: int):
        self.scale = nnx.Param(jnp.ones((channels,), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((channels,), jnp.float32))
        self.num_groups = num_groups

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalise [B, ..., channels]; the result has the dtype of ``x``."""
        batch, channels = x.shape[0], x.shape[-1]
        flat = x.reshape(batch, -1, channels).astype(jnp.float32)

        def per_group(moment: jax.Array) -> jax.Array:
            means = moment.reshape(batch, self.num_groups, -1).mean(axis=2, keepdims=True)
            return jnp.broadcast_to(
                means, (batch, self.num_groups, channels // self.num_groups)
            ).reshape(batch, channels)

        centred = flat - per_group(flat.mean(axis=1))[:, None]
        scale = jax.lax.rsqrt(per_group((centred**2).mean(axis=1)) + 1e-5) * self.scale[...][None]
        out = centred * scale[:, None] + self.bias[...][None, None]
        return out.astype(x.dtype).reshape(x.shape)


class TimeEmbedding(nnx.Module):
    """Noise levels to features, in float32: sinusoids of max(1000 t - 1, 0), then a 2-layer MLP."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        half = config.num_frequencies // 2
        self.num_frequencies = half
        width = config.time_width
        self.linear1 = nnx.Linear(
            2 * half, width, kernel_init=_torch_init, precision="highest", rngs=rngs
        )
        self.linear2 = nnx.Linear(
            width, width, kernel_init=_torch_init, precision="highest", rngs=rngs
        )

    def __call__(self, t: jax.Array) -> jax.Array:
        """Embed levels: [...] -> float32 [..., time_width]."""
        half = self.num_frequencies
        exponent = np.float32(-np.log(10000.0)) * np.arange(half, dtype=np.float32)
        frequencies = np.exp(exponent / np.float32(half))  # in the published order
        angle = jnp.maximum(1000 * t - 1, 0)[..., None] * frequencies.reshape(
            (1,) * t.ndim + (half,)
        )
        features = jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)
        return self.linear2(nnx.silu(self.linear1(features)))


class Levels:
    """SiLU of the embedded noise levels at every resolution of one forward pass, each made once."""

    def __init__(self, config: ModelConfig, embed: TimeEmbedding, t: jax.Array):
        self.grid, self.patch_size = config.grid, config.patch_size
        self.embed, self.t = embed, t
        self.made: dict[tuple[bytes, ...], jax.Array] = {}

    def axes(self, size: tuple[int, int]) -> tuple[patches.AxisResize, patches.AxisResize]:
        """The row and column plans of a resolution."""
        rows, columns = (
            patches.axis_resize(n, self.patch_size, target)
            for n, target in zip(self.grid, size, strict=True)
        )
        return rows, columns

    def at(self, size: tuple[int, int]) -> jax.Array:
        """Float32 [B, Dy, Dx, time_width] for the resolution of ``size`` (h', w')."""
        rows, columns = self.axes(size)
        key = tuple(part.tobytes() for plan in (rows, columns) for part in plan[:3])
        if key not in self.made:
            self.made[key] = nnx.silu(self.embed(patches.resize_levels(self.t, rows, columns)))
        return self.made[key]

    def spread(self, distinct: jax.Array, size: tuple[int, int]) -> jax.Array:
        """Give every position its distinct value: [B, Dy, Dx, c] -> [B, h', w', c]."""
        for axis, plan in zip((1, 2), self.axes(size), strict=True):
            distinct = jnp.take(distinct, plan.position, axis=axis, indices_are_sorted=True)
        return distinct


class ResBlock(nnx.Module):
    """Norm, SiLU, conv; add the noise level; norm, SiLU, dropout, conv; plus the input."""

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        config: ModelConfig,
        *,
        dtype: Dtype,
        rngs: nnx.Rngs,
    ):
        self.norm1 = GroupNorm(channels_in, config.num_groups)
        self.conv1 = _conv(channels_in, channels_out, 3, dtype=dtype, rngs=rngs)
        self.level = nnx.Linear(config.time_width, channels_out, kernel_init=_torch_init, rngs=rngs)
        self.norm2 = GroupNorm(channels_out, config.num_groups)
        self.dropout = nnx.Dropout(config.dropout)
        self.conv2 = _conv(
            channels_out,
            channels_out,
            3,
            dtype=dtype,
            rngs=rngs,
            kernel_init=nnx.initializers.zeros,
        )
        self.shortcut = (
            _conv(channels_in, channels_out, 1, dtype=dtype, rngs=rngs)
            if channels_in != channels_out
            else None
        )

    def __call__(self, x: jax.Array, levels: Levels, key: jax.Array | None) -> jax.Array:
        """[B, h', w', channels_in] -> [B, h', w', channels_out]; dropout where a key is given."""
        y = self.conv1(nnx.silu(self.norm1(x)))
        size = (y.shape[1], y.shape[2])
        y = y + levels.spread(self.level(levels.at(size)).astype(y.dtype), size)
        y = nnx.silu(self.norm2(y))
        if key is not None:
            y = self.dropout(y, deterministic=False, rngs=key)
        return self.conv2(y) + (x if self.shortcut is None else self.shortcut(x))


class Attention(nnx.Module):
    """Multi-head self-attention over all positions, plus the input. Output channels of ``qkv`` are
    head-major: head, then q, k, v, then channel.
    """

    def __init__(self, channels: int, config: ModelConfig, *, dtype: Dtype, rngs: nnx.Rngs):
        self.norm = GroupNorm(channels, config.num_groups)
        self.qkv = nnx.Linear(
            channels, 3 * channels, kernel_init=_torch_init, dtype=dtype, rngs=rngs
        )
        self.proj = nnx.Linear(
            channels, channels, kernel_init=nnx.initializers.zeros, dtype=dtype, rngs=rngs
        )
        self.num_heads = channels // config.head_width

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, h', w', channels] -> the same."""
        batch, channels = x.shape[0], x.shape[-1]
        qkv = self.qkv(self.norm(x)).reshape(
            batch, -1, self.num_heads, 3, channels // self.num_heads
        )
        query, key, value = (qkv[:, :, :, i] for i in range(3))
        scale = jnp.asarray((channels // self.num_heads) ** -0.25, x.dtype)
        logits = jnp.einsum("bqhc,bkhc->bhqk", query * scale, key * scale)
        weights = jax.nn.softmax(logits.astype(jnp.float32)).astype(x.dtype)
        out = jnp.einsum("bhqk,bkhc->bqhc", weights, value)
        return self.proj(out.reshape(x.shape)) + x


class Block(nnx.Module):
    """One residual block, with attention where its level attends, and an optional upsampling."""

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        config: ModelConfig,
        *,
        attend: bool,
        upsample: bool = False,
        dtype: Dtype,
        rngs: nnx.Rngs,
    ):
        self.res = ResBlock(channels_in, channels_out, config, dtype=dtype, rngs=rngs)
        self.attention = Attention(channels_out, config, dtype=dtype, rngs=rngs) if attend else None
        self.up = _conv(channels_out, channels_out, 3, dtype=dtype, rngs=rngs) if upsample else None

    def __call__(self, x: jax.Array, levels: Levels, key: jax.Array | None) -> jax.Array:
        """[B, h', w', channels_in] -> [B, h', w', channels_out], before any upsampling."""
        x = self.res(x, levels, key)
        return x if self.attention is None else self.attention(x)


def _nearest(x: jax.Array, size: tuple[int, int]) -> jax.Array:
    """Nearest resize by source index floor(i * source / target), [B, ., ., c] -> [B, *size, c]."""
    for axis, target in zip((1, 2), size, strict=True):
        index = np.arange(target) * x.shape[axis] // target
        x = jnp.take(x, index, axis=axis, indices_are_sorted=True)
    return x


class UNet(nnx.Module):
    """Noisy images and noise levels to ``config.channels_out`` maps of the same size."""

    def __init__(self, config: ModelConfig, *, dtype: Dtype = jnp.float32, rngs: nnx.Rngs):
        """Draw the weights from ``rngs``; parameters are float32, compute ``dtype``."""
        widths, attention = config.widths, config.attention
        self.config = config
        self.dtype = dtype
        self.embed = TimeEmbedding(config, rngs=rngs)
        self.stem = _conv(config.channels_in, widths[0], 3, dtype=dtype, rngs=rngs)
        skips = [widths[0]]
        current = widths[0]
        encoder: list[nnx.Module] = []
        for level, width in enumerate(widths):
            for _ in range(config.num_blocks):
                encoder.append(
                    Block(current, width, config, attend=attention[level], dtype=dtype, rngs=rngs)
                )
                current = width
                skips.append(current)
            if level != len(widths) - 1:
                encoder.append(_conv(current, current, 3, dtype=dtype, rngs=rngs, strides=2))
                skips.append(current)
        self.encoder = nnx.List(encoder)
        self.bottleneck = nnx.List(
            [
                Block(current, current, config, attend=attend, dtype=dtype, rngs=rngs)
                for attend in (True, False)
            ]
        )
        decoder: list[Block] = []
        for level, width in reversed(list(enumerate(widths))):
            for index in range(config.num_blocks + 1):
                last = index == config.num_blocks
                decoder.append(
                    Block(
                        current + skips.pop(),
                        width,
                        config,
                        attend=attention[level],
                        upsample=last and level > 0,
                        dtype=dtype,
                        rngs=rngs,
                    )
                )
                current = width
        self.decoder = nnx.List(decoder)
        self.out_norm = GroupNorm(current, config.num_groups)
        self.out_conv = _conv(
            current,
            config.channels_out,
            3,
            dtype=dtype,
            rngs=rngs,
            kernel_init=nnx.initializers.zeros,
        )

    def __call__(self, z: jax.Array, t: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """Evaluate the network.

        Args:
            z: float [B, H, W, channels_in], noisy images and what is concatenated to them.
            t: float [B, h, w] in [0, 1], noise level per patch; computed with in float32.
            key: for dropout while training; None evaluates without dropout.

        Returns:
            Float32 [B, H, W, channels_out].
        """
        count = 0

        def next_key() -> jax.Array | None:
            nonlocal count
            count += 1
            return None if key is None else jax.random.fold_in(key, count)

        levels = Levels(self.config, self.embed, t.astype(jnp.float32))
        x = self.stem(z.astype(self.dtype))
        skips = [x]
        for stage in self.encoder:
            x = stage(x, levels, next_key()) if isinstance(stage, Block) else stage(x)
            skips.append(x)
        for block in self.bottleneck:
            x = block(x, levels, next_key())
        for block in self.decoder:
            x = block(jnp.concatenate([x, skips.pop()], axis=-1), levels, next_key())
            if block.up is not None:
                x = block.up(_nearest(x, (skips[-1].shape[1], skips[-1].shape[2])))
        return self.out_conv(nnx.silu(self.out_norm(x))).astype(jnp.float32)
