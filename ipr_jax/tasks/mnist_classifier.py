"""The benchmark's MNIST digit classifier, for converted weights or those of the package.

``ipr_jax.training.digit_reader`` made the latter, from the first 8,000 test images of MNIST.

Shapes: N images, H = W = 28, C = 1, values in [-1, 1], -1 = background, 1 = full ink.
"""

import functools
import importlib.resources
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from ipr_jax.tasks.convolution import conv3x3
from ipr_jax.tasks.digits import max_pool, with_weights

WEIGHTS = importlib.resources.files("ipr_jax.tasks") / "data" / "mnist_classifier.npz"
"""Those that come with the package."""


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
        conv = functools.partial(conv3x3, rngs=rngs)
        linear = functools.partial(nnx.Linear, precision="highest", rngs=rngs)
        self.config = config
        self.conv1 = conv(1, 32)
        self.conv2 = conv(32, 64)
        self.fc1 = linear(64 * 7 * 7, 128)
        self.fc2 = linear(128, 10)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Score digits: float [N, 28, 28, 1] in [-1, 1] -> logits float32 [N, 10] of 0..9."""
        x = nnx.relu(self.conv1(jnp.asarray(images, jnp.float32)))
        x = max_pool(nnx.relu(self.conv2(max_pool(x))))
        flat = x.transpose(0, 3, 1, 2).reshape(len(x), 64 * 7 * 7)  # channel first, as published
        return self.fc2(nnx.relu(self.fc1(flat)))


def read_digits(logits: jax.Array) -> jax.Array:
    """The digits 1..9 that logits [N, 10] say; a predicted 0 is replaced by the runner-up.

    Returns:
        int32 [N].
    """
    return jnp.argmax(logits[:, 1:], axis=1).astype(jnp.int32) + 1


def read(tiles: jax.Array) -> jax.Array:
    """The digits 1..9 that tiles [N, 28, 28, 1] show, by the weights that come with the package.

    Returns:
        int32 [N].
    """
    return read_digits(load_classifier()(tiles))


def load_classifier() -> MNISTClassifier:
    """The classifier with the weights that come with the package.

    Raises:
        FileNotFoundError: there are none.
    """
    return with_weights(_classifier, WEIGHTS)


def _classifier() -> MNISTClassifier:
    return MNISTClassifier(MNISTConfig(), rngs=nnx.Rngs(0))
