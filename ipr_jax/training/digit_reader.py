"""Train the networks that read digits.

``python -m ipr_jax.training.digit_reader`` trains the one that reads 8x8 digits, prints its
accuracy and writes the weights that come with the package, unless they are there already. It takes
about a minute on a CPU. With ``second``, it trains another reader, for verifiers that are
independent of the one that grades; with ``mnist FOLDER``, the one that reads the digits of MNIST,
from the first 8,000 of its test images (``mnist.load_split_test``), in some minutes.

The reader of 8x8 digits that grades has learnt from the 1,276 digits 1..9 of the training split,
and knows none of the test split. The second one has learnt, from another seed, from the 170 of the
first half of the test split (191 images, of one writer's form and half of another's), and from
nothing else. So neither has seen an image of the other's. Clues of test puzzles are drawn from all
of the test split: half of the images that the second reader sees as clues it has learnt from,
labels and all, but nothing of the boards. It reads 94.3% of the training split, whose writers it
does not know, and 97.1% of the other half of the test split. The one of MNIST reads 99.27% of the
digits 1..9 among the last 2,000 test images, 1,780 of 1,793.

Shapes: N images, H = W = S = 8 or 28, C = 1, values in [-1, 1], -1 = background, 1 = full ink.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.scipy.ndimage import map_coordinates

from ipr_jax.runtime import files
from ipr_jax.tasks import mnist, mnist_classifier
from ipr_jax.tasks.base import SPLITS
from ipr_jax.tasks.digits import SECOND_WEIGHTS, WEIGHTS, DigitReader, load_digits


def train_reader(
    images: np.ndarray, labels: np.ndarray, *, seed: int = 0, num_steps: int = 4000
) -> DigitReader:
    """Train a reader of 8x8 digits on distorted copies of the images.

    AdamW with a one-cycle learning rate, batches of 128, smoothed labels. The settings were
    chosen by validation on forms of the training split (two or three held out at a time).

    Args:
        images: float32 [N, 8, 8] in [-1, 1].
        labels: int32 [N] in 1..9.
        seed: int, of the initial weights, the batches, the distortions and the dropout.
        num_steps: int >= 1.
    """
    reader = DigitReader(rngs=nnx.Rngs(seed))
    _fit(reader, lambda reader, x, key: reader(x, nnx.Rngs(key)), images, labels, seed, num_steps)
    return reader


def train_mnist_classifier(
    images: np.ndarray, labels: np.ndarray, *, seed: int = 0, num_steps: int = 1500
) -> mnist_classifier.MNISTClassifier:
    """Train the benchmark's classifier of MNIST, in the same way.

    Args:
        images: float32 [N, 28, 28] in [-1, 1].
        labels: int32 [N] in 0..9.
        seed: int, of the initial weights, the batches and the distortions.
        num_steps: int >= 1.
    """
    config = mnist_classifier.MNISTConfig()
    classifier = mnist_classifier.MNISTClassifier(config, rngs=nnx.Rngs(seed))
    _fit(classifier, lambda classifier, x, _: classifier(x), images, labels, seed, num_steps)
    return classifier


def _fit(
    network: Any,
    logits_of: Callable[[Any, jax.Array, jax.Array], jax.Array],
    images: np.ndarray,
    labels: np.ndarray,
    seed: int,
    num_steps: int,
) -> None:
    """Train ``logits_of(network, images [128, S, S, 1], key)``, whose last class is digit 9."""
    schedule = optax.cosine_onecycle_schedule(num_steps, peak_value=2e-3)
    optimizer = nnx.Optimizer(network, optax.adamw(schedule, weight_decay=0.02), wrt=nnx.Param)
    all_images, all_labels = jnp.asarray(images), jnp.asarray(labels)

    @nnx.jit
    def step(network: Any, optimizer: nnx.Optimizer, key: jax.Array) -> None:
        choice_key, distort_key, dropout_key = jax.random.split(key, 3)
        chosen = jax.random.randint(choice_key, (128,), 0, len(images))
        distort_keys = jax.random.split(distort_key, len(chosen))
        inputs = jax.vmap(_distort)(distort_keys, all_images[chosen])[..., None]

        def loss(network: Any) -> jax.Array:
            logits = logits_of(network, inputs, dropout_key)
            number = logits.shape[1]
            one_hot = jax.nn.one_hot(all_labels[chosen] - 10 + number, number)
            targets = optax.smooth_labels(one_hot, 0.05)
            return optax.softmax_cross_entropy(logits, targets).mean()

        optimizer.update(network, nnx.grad(loss)(network))

    key = jax.random.key(seed)
    for number in range(num_steps):
        step(network, optimizer, jax.random.fold_in(key, number))


def _distort(key: jax.Array, image: jax.Array) -> jax.Array:
    """Rotate, scale, shear and shift one image [S, S] a little, and add noise to it."""
    size = len(image)
    affine_key, shift_key, noise_key, level_key = jax.random.split(key, 4)
    limits = jnp.array([0.25, 0.15, 0.1, 0.2])
    affine = jax.random.uniform(affine_key, (4,), minval=-limits, maxval=limits)
    angle, scale, stretch, shear = affine
    rotation = jnp.array([[jnp.cos(angle), -jnp.sin(angle)], [jnp.sin(angle), jnp.cos(angle)]])
    change = jnp.array([[jnp.exp(scale + stretch), shear], [0.0, jnp.exp(scale)]])
    centre = (size - 1) / 2
    grid = jnp.indices((size, size)).astype(jnp.float32) - centre
    limit = 0.1 * size
    shift = jax.random.uniform(shift_key, (2, 1, 1), minval=-limit, maxval=limit)
    source = jnp.einsum("ij,jhw->ihw", rotation @ change, grid) + centre + shift
    moved = map_coordinates(image, list(source), order=1, cval=-1.0)
    noise = jax.random.normal(noise_key, image.shape)
    noise *= jax.random.uniform(level_key, maxval=0.2)
    return jnp.clip(moved + noise, -1.0, 1.0)


def _report(name: str, logits_of: Callable[[jax.Array], jax.Array], part: tuple[Any, Any]) -> None:
    """Print how often logits are right, among 1..9 and, for images of 1..4, among 1..4."""
    images, labels = part
    logits = np.asarray(logits_of(jnp.asarray(images)[..., None]))[:, -9:]
    accuracy = []
    for largest in (9, 4):
        shown = (labels >= 1) & (labels <= largest)
        right = logits[shown, :largest].argmax(axis=1) + 1 == labels[shown]
        accuracy.append(f"{largest}-way {right.mean():.2%} ({right.sum()} of {len(right)})")
    print(f"{name}: {', '.join(accuracy)}")


def main(which: str = "first", folder: str | None = None) -> None:
    """Train a network, print its accuracy and write its weights.

    Args:
        which: first, second or mnist, see above.
        folder: with the test images of MNIST.

    Raises:
        ValueError: it is none of them, or there must be a folder, or none.
        FileExistsError: if the weights are there already.
        FileNotFoundError: the folder lacks a file.
    """
    place = {"first": WEIGHTS, "second": SECOND_WEIGHTS, "mnist": mnist_classifier.WEIGHTS}
    if which not in place:
        raise ValueError(f"which must be one of {', '.join(place)}, got {which!r}")
    if (folder is None) == (which == "mnist"):
        raise ValueError(f"mnist needs a folder and the others take none, got {folder!r}")
    path = files.refuse_existing(Path(str(place[which])))
    if folder is not None:
        parts = {split: mnist.load_split_test(folder, split) for split in SPLITS}
        reader = train_mnist_classifier(*parts["train"])
    else:
        train, test = load_digits("train"), load_digits("test")
        half = len(test[0]) // 2
        parts = {
            "train": train,
            "first half of test": (test[0][:half], test[1][:half]),
            "second half of test": (test[0][half:], test[1][half:]),
        }
        images, labels = parts["train" if which == "first" else "first half of test"]
        seed = int(which == "second")
        reader = train_reader(images[labels > 0], labels[labels > 0], seed=seed)
    for name, part in parts.items():
        _report(name, reader, part)
    state = nnx.to_pure_dict(nnx.state(reader, nnx.Param))
    weights = jax.device_get(nnx.traversals.flatten_mapping(state, sep="."))
    with files.whole(path) as part:
        np.savez(part, allow_pickle=False, **weights)
    print(f"written: {path}")


if __name__ == "__main__":
    main(*sys.argv[1:])
