"""The SRM denoiser: the U-Net with its three heads read as a ``Prediction``."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ipr_jax import patches
from ipr_jax.config import ModelConfig
from ipr_jax.types import Prediction
from ipr_jax.unet import UNet


class SRM(nnx.Module):
    """A Spatial Reasoning Model: ``model(z, t)`` is a ``Denoiser``, and a pytree.

    Attributes:
        config: the architecture.
        unet: the network, with 2 C + 1 output channels: velocity, variance, log-variance of the
            velocity's error.
    """

    def __init__(self, config: ModelConfig, *, dtype: Any = jnp.float32, rngs: nnx.Rngs):
        """Build with random weights.

        Args:
            config: the architecture.
            dtype: compute dtype; parameters, norms, softmax and noise levels stay float32.
            rngs: source of the initial weights.
        """
        self.config = config
        self.unet = UNet(config, 2 * config.channels + 1, dtype=dtype, rngs=rngs)

    def __call__(self, z: jax.Array, t: jax.Array, key: jax.Array | None = None) -> Prediction:
        """Predict velocity, variance fraction and sigma.

        Args:
            z: float [B, H, W, C], noisy images.
            t: float32 [B, h, w] in [0, 1], noise level per patch.
            key: for dropout while training; None evaluates without dropout.

        Returns:
            The prediction, float32.

        Raises:
            ValueError: a shape is not that of the model; at trace.
        """
        for name, array, shape in (
            ("images", z, self.config.image_shape),
            ("the patch grid", t, self.config.grid),
        ):
            if array.shape[1:] != shape or array.shape[0] != z.shape[0]:
                raise ValueError(
                    f"{name} must be [B, {', '.join(map(str, shape))}] for this model, "
                    f"got {list(array.shape)}"
                )
        channels = self.config.channels
        out = self.unet(z, t, key)
        log_variance = patches.patch_mean(out[..., -1], self.config.patch_size)
        return Prediction(
            velocity=out[..., :channels],
            variance_fraction=(out[..., channels : 2 * channels] + 1) / 2,
            sigma=jnp.exp(0.5 * log_variance),
        )
