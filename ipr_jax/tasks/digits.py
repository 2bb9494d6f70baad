"""The 8x8 handwritten digits of scikit-learn, and a small network that reads them.

Shapes: N images, H = W = 8, C = 1, values in [-1, 1], -1 = background, 1 = full ink.

The weights come with the package; ``ipr_jax.training.digit_reader`` made them. There is a second
reader, for verifiers: another seed, and none of the images of the first, which grades.
"""

import copy
import functools
import importlib.resources
import math
from collections.abc import Callable
from importlib.resources.abc import Traversable
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ipr_jax.tasks.base import Split
from ipr_jax.tasks.convolution import conv3x3

Network = TypeVar("Network", bound=nnx.Module)

FIRST_TEST_IMAGE = 1415
"""Position of the first test image: the start of the twelfth of fourteen copies of the form."""

WEIGHTS = importlib.resources.files("ipr_jax.tasks") / "data" / "digit_reader.npz"

SECOND_WEIGHTS = importlib.resources.files("ipr_jax.tasks") / "data" / "second_digit_reader.npz"
"""Of the second reader; see ``ipr_jax.training.digit_reader`` for what it has seen."""


@functools.cache
def load_digits(split: Split) -> tuple[np.ndarray, np.ndarray]:
    """Load the digit images of one split.

    The split is by position, between two writers' forms, because the 1,797 images are in the
    order in which they were collected. The data set does not record who wrote which image, but
    its label sequence repeats almost unchanged fourteen times, starting each time with
    0123456789 three times over: everybody filled in the same form. The first eleven copies are
    the training split, the last three the test split. The description of the data speaks of
    thirteen writers, so one of them may have filled in two copies; no form is in both splits,
    but nobody can rule out that this one writer is.

    Args:
        split: "train" (1,415 images) or "test" (382 images).

    Returns:
        images: float32 [N, 8, 8] in [-1, 1] (ink 0..16, divided by 8, minus 1), read-only.
        labels: int32 [N] in 0..9, read-only.

    Raises:
        ValueError: if ``split`` is neither "train" nor "test".

    Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI 1998, of
    which scikit-learn ships the test part.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split must be 'train' or 'test', got {split!r}")
    from sklearn.datasets import load_digits as load_all

    data, target = load_all(return_X_y=True)
    part = slice(FIRST_TEST_IMAGE) if split == "train" else slice(FIRST_TEST_IMAGE, None)
    images = (data[part].reshape(-1, 8, 8) / 8 - 1).astype(np.float32)
    labels = target[part].astype(np.int32)
    images.setflags(write=False)
    labels.setflags(write=False)
    return images, labels


def max_pool(x: jax.Array) -> jax.Array:
    """The maxima of squares of 2x2: [N, 2 h, 2 w, C] -> [N, h, w, C]; nnx's has a slow gradient."""
    number, height, width, channels = x.shape
    return x.reshape(number, height // 2, 2, width // 2, 2, channels).max(axis=(2, 4))


class DigitReader(nnx.Module):
    """Classify 8x8 digits 1..9: three convolutions and two linear layers, 53,609 weights."""

    def __init__(self, *, rngs: nnx.Rngs):
        conv = functools.partial(conv3x3, rngs=rngs)
        linear = functools.partial(nnx.Linear, precision="highest", rngs=rngs)
        self.conv1 = conv(1, 32)
        self.conv2 = conv(32, 32)
        self.conv3 = conv(32, 64)
        self.hidden = linear(2 * 2 * 64, 96)
        self.dropout = nnx.Dropout(0.4)
        self.logits = linear(96, 9)

    def __call__(self, images: jax.Array, rngs: nnx.Rngs | None = None) -> jax.Array:
        """Score the digits: float32 [N, 8, 8, 1] in [-1, 1] -> logits float32 [N, 9] of 1..9.

        With ``rngs``, hidden units are dropped out, as in training; without, the result is exact.
        """
        x = nnx.relu(self.conv1(images))
        x = max_pool(nnx.relu(self.conv2(x)))
        x = max_pool(nnx.relu(self.conv3(x)))
        x = nnx.relu(self.hidden(x.reshape(len(x), 2 * 2 * 64)))
        return self.logits(self.dropout(x, deterministic=rngs is None, rngs=rngs))


def read_digits(tiles: jax.Array, num_digits: int = 9) -> jax.Array:
    """Read the digit in every tile: the most probable of 1..num_digits. Jittable.

    A tile that shows none of these digits is read as the one it resembles most; the published
    Sudoku score likewise replaces a predicted 0 by the runner-up.

    Args:
        tiles: float [..., 8, 8] in [-1, 1].
        num_digits: static int in 1..9, the largest digit that may be answered.

    Returns:
        int32 [...] in 1..num_digits.

    Raises:
        ValueError: if the tiles are not 8x8 or ``num_digits`` is not in 1..9.
        FileNotFoundError: if there are no weights (``ipr_jax.training.digit_reader`` makes them).
    """
    if tiles.shape[-2:] != (8, 8):
        raise ValueError(f"tiles must have shape [..., 8, 8], got {tiles.shape}")
    if not 1 <= num_digits <= 9:
        raise ValueError(f"num_digits must be in 1..9, got {num_digits}")
    num_tiles = math.prod(tiles.shape[:-2])
    images = jnp.asarray(tiles).astype(jnp.float32).reshape(num_tiles, 8, 8, 1)
    best = jnp.argmax(load_reader()(images)[:, :num_digits], axis=-1)
    return best.astype(jnp.int32).reshape(tiles.shape[:-2]) + 1


def load_reader(path: Traversable = WEIGHTS) -> DigitReader:
    """A reader with its weights.

    Raises:
        FileNotFoundError: there are none.
    """
    return with_weights(_reader, path)


def _reader() -> DigitReader:
    return DigitReader(rngs=nnx.Rngs(0))


def with_weights(build: Callable[[], Network], path: Traversable) -> Network:
    """A network with the weights of a file ``.npz``, whose names are paths joined by dots.

    Args:
        build: makes the network, of any weights; called once for every file, and traced.
        path: the file, read once.

    Raises:
        FileNotFoundError: there is none.
    """
    return copy.deepcopy(_read(build, path))


@functools.cache
def _read(build: Callable[[], Network], path: Traversable) -> Network:
    network = nnx.eval_shape(build)
    with path.open("rb") as file, np.load(file) as weights:
        nnx.update(network, nnx.traversals.unflatten_mapping(dict(weights), sep="."))
    return network
