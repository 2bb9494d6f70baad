"""The benchmark's MNIST digit classifier, for converted weights.

Shapes: N images, H = W = 28, C = 1, values in [-1, 1], -1 = background, 1 = full ink.
"""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx


@dataclass(frozen=True)
class MNISTConfig:
    """The published architecture; nothing in it varies."""

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C)."""
        return 28, 28, 1


class MNISTClassifier(nnx.Module):
    """Two convolutions and two linear layers, 421,642 weights.

    Source: the classifier of the MNIST Sudoku benchmark, arXiv 2502.21075.
    """

    def __init__(self, config: MNISTConfig, *, rngs: nnx.Rngs):
        """Build with random weights."""
        conv = functools.partial(nnx.Conv, kernel_size=(3, 3), precision="highest", rngs=rngs)
        linear = functools.partial(nnx.Linear, precision="highest", rngs=rngs)
        self.config = config
        self.conv1 = conv(1, 32)
        self.conv2 = conv(32, 64)
        self.fc1 = linear(64 * 7 * 7, 128)
        self.fc2 = linear(128, 10)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Score digits: float [N, 28, 28, 1] in [-1, 1] -> logits float32 [N, 10] of 0..9."""
        x = nnx.relu(self.conv1(jnp.asarray(images, jnp.float32)))
        x = nnx.max_pool(x, (2, 2), (2, 2))
        x = nnx.max_pool(nnx.relu(self.conv2(x)), (2, 2), (2, 2))
        flat = x.transpose(0, 3, 1, 2).reshape(len(x), 64 * 7 * 7)  # channel first, as published
        return self.fc2(nnx.relu(self.fc1(flat)))


def read_digits(logits: jax.Array) -> jax.Array:
    """The digits 1..9 that logits [N, 10] say; a predicted 0 is replaced by the runner-up.

    Returns:
        int32 [N].
    """
    return jnp.argmax(logits[:, 1:], axis=1).astype(jnp.int32) + 1
