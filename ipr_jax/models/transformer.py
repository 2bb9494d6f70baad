"""A patch transformer as the denoiser: one token per patch, each with its own noise level.

The level of a token enters as scale, shift and gate of every layer, by one projection that all
layers share (adaLN-single of arXiv 2310.00426, after DiT, arXiv 2212.09748). Where a patch lies is
known from learned tables and from learned biases of the attention; which patches have to do with
each other is learned. Input and output are scaled by the level as in EDM (arXiv 2206.00364), with
the mean m and the standard deviation s of the images' pixels. Of z = (1 - t) x + t eps and the
velocity u = eps - x, with var = (1 - t)^2 s^2 + t^2,

- (z - (1 - t) m) / sqrt(var) has unit variance,
- the best linear prediction of u is (t - (1 - t) s^2) / var (z - (1 - t) m) - m,
- what remains of u has the standard deviation s / sqrt(var), in units of which the network answers;
  with a gain, that answer is a + g x for the input x of unit variance, pixel by pixel.

With ``balance`` the sum of the n pixels of a channel is taken to be n m, with a standard deviation
of 1. The best linear answer is then f = s t / sqrt(var) S / (V + 1), where S is the sum of all
x - m as predicted above, and V that of their variances s^2 t^2 / var. The network sees f and
answers a + (1 + b) f, with a b for every patch and channel.

Shape letters are those of ``ipr_jax.core.types``; d = width, N = heads, P tokens.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ipr_jax.core import Prediction, check, patches
from ipr_jax.models.config import COORDINATES, TransformerConfig

GATE = 0.3
"""Share of every layer's answer that is added to the tokens at first."""
BIAS_SCALE = 8.0
"""Of the biases of the attention, which so learn as many times as fast."""

MATRICES = {"qkv": (0, 2), "proj": (0, 1), "up": (0, 2), "down": (0, 1)}
"""The matrices of a layer by name: their axes of input and output. Other axes count them."""

_matrix = nnx.initializers.variance_scaling(
    1.0, "fan_in", "truncated_normal", in_axis=0, dtype=jnp.float32
)
_table = nnx.initializers.normal(0.7, dtype=jnp.float32)
_bias = nnx.initializers.normal(0.02, dtype=jnp.float32)


def _rms_norm(x: jax.Array) -> jax.Array:
    """Unit mean square over the last axis, computed in float32."""
    wide = x.astype(jnp.float32)
    mean = jnp.mean(wide**2, axis=-1, keepdims=True)
    return (wide * jax.lax.rsqrt(mean + 1e-6)).astype(x.dtype)


class Layer(nnx.Module):
    """Attention, then a SwiGLU, each scaled, shifted and gated by the level of the token.

    Matrices have their input first and their output last, so that an optimiser can tell; ``qkv``
    and ``up`` hold three and two of them, side by side.
    """

    def __init__(self, config: TransformerConfig, *, dtype: Any, rngs: Any):
        width, hidden, self.num_heads = config.width, config.hidden_width, config.num_heads
        self.dtype = dtype
        self.qkv = nnx.Param(_matrix(rngs.params(), (width, 3, width)))
        self.proj = nnx.Param(_matrix(rngs.params(), (width, width)))
        self.up = nnx.Param(_matrix(rngs.params(), (width, 2, hidden)))
        self.down = nnx.Param(_matrix(rngs.params(), (hidden, width)))
        self.level = nnx.Param(jnp.zeros((6, width), jnp.float32).at[jnp.array([2, 5])].set(GATE))
        self.sharpness = nnx.Param(jnp.ones((self.num_heads,), jnp.float32))
        self.bias = nnx.Dict(
            {
                name: nnx.Param(_bias(rngs.params(), (self.num_heads, size, size)))
                for name, size in zip(
                    config.attention_bias, config.table_sizes(config.attention_bias), strict=True
                )
            }
        )

    def __call__(self, x: jax.Array, level: jax.Array, places: dict[str, np.ndarray]) -> jax.Array:
        """[B, P, d] -> the same, with levels float32 [B, P, 6, d], and each token's coordinates."""
        level = (level + self.level[...][None, None]).astype(self.dtype)
        shift, scale, gate, shift2, scale2, gate2 = (level[:, :, i] for i in range(6))
        x = x + gate * self.attend(_rms_norm(x) * (1 + scale) + shift, places)
        y = jnp.einsum("bpd,dkh->bpkh", _rms_norm(x) * (1 + scale2) + shift2, self.cast(self.up))
        return x + gate2 * (nnx.silu(y[:, :, 0]) * y[:, :, 1] @ self.cast(self.down))

    def attend(self, x: jax.Array, places: dict[str, np.ndarray]) -> jax.Array:
        """Multi-head self-attention over all tokens, queries and keys normalised."""
        batch, tokens, width = x.shape
        qkv = jnp.einsum("bpd,dke->bpke", x, self.cast(self.qkv))
        qkv = qkv.reshape(batch, tokens, 3, self.num_heads, -1)
        query, key, value = (qkv[:, :, i] for i in range(3))
        sharpness = self.cast(self.sharpness)[None, None, :, None]
        bias = None
        for name, table in self.bias.items():
            place = places[name]
            part = BIAS_SCALE * table[...][:, place[:, None], place[None]]
            bias = part if bias is None else bias + part
        with jax.numpy_dtype_promotion("standard"):  # it takes bfloat16 with float32 logits
            mixed = jax.nn.dot_product_attention(
                _rms_norm(query) * sharpness,
                _rms_norm(key),
                value,
                bias=None if bias is None else bias[None],
            )
        return mixed.reshape(batch, tokens, width) @ self.cast(self.proj)

    def cast(self, parameter: Any) -> jax.Array:
        """A parameter as it is computed with."""
        return parameter[...].astype(self.dtype)


class PatchTransformer(nnx.Module):
    """A transformer over patches: ``model(z, t)`` is a ``Denoiser``, and a pytree.

    Attributes:
        config: the architecture.
        dtype: compute dtype.
    """

    def __init__(self, config: TransformerConfig, *, dtype: Any = jnp.float32, rngs: Any):
        """Build with random weights.

        Args:
            config: the architecture.
            dtype: compute dtype; parameters, norms, softmax and noise levels stay float32.
            rngs: source of the initial weights.
        """
        self.config, self.dtype = config, dtype
        width, pixels = config.width, config.patch_size**2 * config.channels
        more = config.channels if config.balance else 0
        self.enter = nnx.Param(_matrix(rngs.params(), (pixels + more, width)))
        self.tables = nnx.Dict(
            {
                name: nnx.Param(_table(rngs.params(), (size, width)))
                for name, size in zip(
                    config.coordinates, config.table_sizes(config.coordinates), strict=True
                )
            }
        )
        self.embed = nnx.Param(_matrix(rngs.params(), (config.num_frequencies, width)))
        self.embed_bias = nnx.Param(jnp.zeros((width,), jnp.float32))
        self.level = nnx.Param(jnp.zeros((width, 6, width), jnp.float32))
        self.layers = nnx.List(
            [Layer(config, dtype=dtype, rngs=rngs) for _ in range(config.num_layers)]
        )
        self.last_level = nnx.Param(jnp.zeros((2, width), jnp.float32))
        outputs = more + (3 if config.gain else 2) * pixels + 1
        self.leave = nnx.Param(jnp.zeros((width, outputs), jnp.float32))

    def __call__(self, z: jax.Array, t: jax.Array) -> Prediction:
        """Predict velocity, variance fraction and sigma.

        Args:
            z: float [B, H, W, C], noisy images.
            t: float32 [B, h, w] in [0, 1], noise level per patch.

        Returns:
            The prediction, float32.

        Raises:
            ValueError: a shape is not that of the model; at trace.
        """
        config = self.config
        check.model_inputs(config, z, t)
        mean, std = config.pixel_mean, config.pixel_std
        level = t.reshape(t.shape[0], -1, 1)
        variance = ((1 - level) * std) ** 2 + level**2
        centred = patches.tokens(z.astype(jnp.float32), config.patch_size) - (1 - level) * mean
        scaled = centred * jax.lax.rsqrt(variance)
        rest = std * jax.lax.rsqrt(variance)
        linear = jnp.zeros((*scaled.shape[:2], 0), scaled.dtype)
        if config.balance:
            told = self.of_the_sum((1 - level) * rest**2 * centred, (level * rest) ** 2)
            linear = level * rest * told
        raw = self.network(jnp.concatenate([scaled, linear], axis=-1), level)
        share, raw = jnp.split(raw, [linear.shape[-1]], axis=-1)
        velocity, fraction, *gain = jnp.split(raw[..., :-1], 3 if config.gain else 2, axis=-1)
        if gain:
            velocity = velocity + gain[0] * scaled
        if config.balance:
            velocity = velocity + jnp.tile((1 + share) * linear, config.patch_size**2)
        velocity = (level - (1 - level) * std**2) / variance * centred - mean + rest * velocity
        velocity, fraction = (
            patches.untokens(each, config.image_shape, config.patch_size)
            for each in (velocity, fraction)
        )
        sigma = (rest * jnp.exp(0.5 * raw[..., -1:])).reshape(t.shape)
        return Prediction(velocity, (fraction + 1) / 2, sigma)

    def of_the_sum(self, x: jax.Array, variance: jax.Array) -> jax.Array:
        """S / (V + 1) of predictions x - m, [B, P, S S C], and variances, [B, P, 1]: [B, 1, C]."""
        pixels = x.reshape(len(x), -1, self.config.channels)
        spread = self.config.patch_size**2 * variance.sum(axis=1, keepdims=True)
        return pixels.sum(axis=1, keepdims=True) / (spread + 1)

    def network(self, x: jax.Array, t: jax.Array) -> jax.Array:
        """Scaled pixels and levels to scaled outputs, without the formulas of the noise.

        Args:
            x: float32 [B, P, S S C], the pixels of every patch; with ``balance`` [B, P, S S C + C],
                what the sum tells after them.
            t: float32 [B, P, 1], its level.

        Returns:
            Float32 [B, P, 2 S S C + 1]: velocity, variance fraction, log-variance of the error; or
            [B, P, 3 S S C + 1], with the gain before the last; with ``balance`` C more, before all.
        """
        config = self.config
        places = {name: COORDINATES[name](*config.grid) for name in COORDINATES}
        embedded = nnx.silu(
            _waves(t, config.num_frequencies) @ self.embed[...] + self.embed_bias[...][None, None]
        ).astype(self.dtype)
        level = jnp.einsum("bpd,dke->bpke", embedded, self.level[...].astype(self.dtype))
        level = level.astype(jnp.float32)
        x = x.astype(self.dtype) @ self.enter[...].astype(self.dtype)
        for name, table in self.tables.items():
            x = x + table[...][places[name]][None].astype(self.dtype)
        for _ in range(config.repeats):
            for layer in self.layers:
                x = layer(x, level, places)
        last = (level[:, :, :2] + self.last_level[...][None, None]).astype(self.dtype)
        x = _rms_norm(x) * (1 + last[:, :, 1]) + last[:, :, 0]
        return (x @ self.leave[...].astype(self.dtype)).astype(jnp.float32)


def _waves(t: jax.Array, number: int) -> jax.Array:
    """Cosines and sines of levels, periods from 4 down to 1/32: [..., 1] -> [..., number]."""
    frequencies = np.geomspace(math.pi / 2, 64 * math.pi, number // 2, dtype=np.float32)
    angle = t * frequencies.reshape((1,) * (t.ndim - 1) + (-1,))
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)
