"""The denoisers: the SRM's U-Net with its three heads read as a ``Prediction``, and all by name."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ipr_jax.core import Denoiser, Prediction, check, patches
from ipr_jax.models.config import Config, ModelConfig, TransformerConfig
from ipr_jax.models.transformer import PatchTransformer
from ipr_jax.models.unet import UNet
from ipr_jax.sampling import flow


class SRM(nnx.Module):
    """A Spatial Reasoning Model: ``model(z, t)`` is a ``Denoiser``, and a pytree.

    Attributes:
        config: the architecture.
        unet: the network.
    """

    def __init__(self, config: ModelConfig, *, dtype: Any = jnp.float32, rngs: nnx.Rngs):
        """Build with random weights.

        Args:
            config: the architecture.
            dtype: compute dtype; parameters, norms, softmax and noise levels stay float32.
            rngs: source of the initial weights.
        """
        self.config = config
        self.unet = UNet(config, dtype=dtype, rngs=rngs)

    @property
    def dtype(self) -> Any:
        """The compute dtype."""
        return self.unet.dtype

    def __call__(
        self,
        z: jax.Array,
        t: jax.Array,
        key: jax.Array | None = None,
        condition: jax.Array | None = None,
    ) -> Prediction:
        """Predict velocity, variance fraction and sigma.

        Args:
            z: float [B, H, W, C], noisy images.
            t: float [B, h, w] in [0, 1], noise level per patch; computed with in float32.
            key: for dropout while training; None evaluates without dropout.
            condition: for ``config.concat_clues`` only, from ``condition_on``.

        Returns:
            The prediction, float32.

        Raises:
            ValueError: a shape is not that of the model, or the condition is missing or not for
                this model; at trace.
        """
        if (condition is not None) != self.config.concat_clues:
            raise ValueError(
                "a model with concat_clues=True needs its clues, bind them by condition_on"
                if self.config.concat_clues
                else "this model takes no condition: its clues are patches at noise level 0"
            )
        check.model_inputs(self.config, z, t)
        channels = self.config.channels
        if condition is not None:
            shape = (*self.config.image_size, 1 + channels)
            check.same_rows("the condition", condition, shape, z)
        out = self.unet(z if condition is None else jnp.concatenate([z, condition], -1), t, key)
        log_variance = patches.patch_mean(out[..., -1], self.config.patch_size)
        return Prediction(
            velocity=out[..., :channels],
            variance_fraction=(out[..., channels : 2 * channels] + 1) / 2,
            sigma=jnp.exp(0.5 * log_variance),
        )


Model = SRM | PatchTransformer
"""Any denoiser that a model folder can hold."""

MODELS: dict[type, Callable[..., Model]] = {ModelConfig: SRM, TransformerConfig: PatchTransformer}
"""The denoiser of each class of configuration, called as ``SRM`` is."""


def new_model(config: Config, *, dtype: Any = jnp.float32, rngs: Any) -> Model:
    """The denoiser of a configuration, with random weights; see ``SRM``."""
    return MODELS[type(config)](config, dtype=dtype, rngs=rngs)


def condition_on(model: SRM, image: jax.Array, editable: jax.Array) -> Denoiser:
    """Give an image-level model its clues, which enter as channels of its input.

    The result completes whole images by ``generate`` with a mask bool [B, 1, 1] of one patch. The
    clues guide the network, but are not copied into the image; the published sampler resets them
    after every step.

    Args:
        model: with ``config.concat_clues``.
        image: float32 [B, H, W, C] in [-1, 1]; only its clues are read.
        editable: bool [B, h, w] over any grid of square patches; False = a clue.

    Returns:
        A denoiser for this batch, a pytree.

    Raises:
        ValueError: the grid is not one of square patches of the images, or the model is no SRM.

    Source: the image-level baseline of Spatial Reasoning Models, arXiv 2502.21075.
    """
    check.instance("model", model, SRM)
    check.grid(image, editable)
    mask = patches.expand(jnp.asarray(editable), image.shape[1] // editable.shape[1])
    clues = jnp.where(mask, 0, jnp.asarray(image))
    condition = jnp.concatenate([mask.astype(clues.dtype), clues], axis=-1)
    return jax.tree_util.Partial(_conditioned, model, condition)


def _conditioned(model: SRM, condition: jax.Array, z: jax.Array, t: jax.Array) -> Prediction:
    return model(z, t, condition=condition)


def repaint(denoise: Denoiser, image: jax.Array, editable: jax.Array, noise: jax.Array) -> Denoiser:
    """Let any denoiser see the clues at the noise level of the rest, at every evaluation.

    For image-level models, which have no patches at level 0. What a pass returns in the place of
    the clues is of no use: put them back with ``jnp.where``.

    Args:
        denoise: the model, with one noise level per image: t is [B, 1, 1].
        image: float32 [B, H, W, C] in [-1, 1]; only its clues are read.
        editable: bool [B, h, w] over any grid of square patches; False = a clue.
        noise: float32 [B, H, W, C], standard normal, that the clues are noised with.

    Returns:
        A denoiser for this batch, a pytree.

    Raises:
        ValueError: the grid is not one of square patches of the images, or the noise has another
            shape; while tracing, there are several noise levels per image.

    Source: the image-level baseline of Spatial Reasoning Models, arXiv 2502.21075, which resets the
    clues after every step.
    """
    check.grid(image, editable)
    if not check.is_array(noise) or noise.dtype != jnp.float32:
        raise ValueError(f"noise must be float32 [B, H, W, C], got {check.told(noise)}")
    if noise.shape != image.shape:
        raise ValueError(f"noise must have the images' shape {image.shape}, got {noise.shape}")
    mask = patches.expand(jnp.asarray(editable), image.shape[1] // editable.shape[1])
    return jax.tree_util.Partial(
        _repainted, check.as_pytree(denoise), jnp.asarray(image), mask, jnp.asarray(noise)
    )


def _repainted(
    denoise: Denoiser,
    image: jax.Array,
    mask: jax.Array,
    noise: jax.Array,
    z: jax.Array,
    t: jax.Array,
) -> Prediction:
    if t.shape[1:] != (1, 1):
        raise ValueError(f"there must be one noise level per image, t [B, 1, 1], got {t.shape}")
    level = t[..., None]
    return denoise(jnp.where(mask, z, flow.interpolate(image, noise, level)), t)
