"""Train the network that reads 8x8 digits.

``python -m ipr_jax.training.digit_reader`` trains it, prints its accuracy and writes the weights
that come with the package, unless they are there already. It takes about a minute on a CPU. With
``second``, it trains another reader, for verifiers that are independent of the one that grades.

The reader that grades has learnt from the 1,276 digits 1..9 of the training split, and knows none
of the test split. The second one has learnt, from another seed, from the 170 of the first half of
the test split (191 images, of one writer's form and half of another's), and from nothing else. So
neither has seen an image of the other's. Clues of test puzzles are drawn from all of the test
split: half of the images that the second reader sees as clues it has learnt from, labels and all,
but nothing of the boards. It reads 94.3% of the training split, whose writers it does not know, and
97.1% of the other half of the test split.

Shapes: N images, H = W = 8, C = 1, values in [-1, 1], -1 = background, 1 = full ink.
"""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.scipy.ndimage import map_coordinates

from ipr_jax.runtime import files
from ipr_jax.tasks.digits import SECOND_WEIGHTS, WEIGHTS, DigitReader, load_digits


def train_reader(
    images: np.ndarray, labels: np.ndarray, *, seed: int = 0, num_steps: int = 4000
) -> DigitReader:
    """Train a reader on distorted copies of the images.

    AdamW with a one-cycle learning rate, batches of 128, smoothed labels. The settings were
    chosen by validation on forms of the training split (two or three held out at a time).

    Args:
        images: float32 [N, 8, 8] in [-1, 1].
        labels: int32 [N] in 1..9.
        seed: int, of the initial weights, the batches, the distortions and the dropout.
        num_steps: int >= 1.
    """
    reader = DigitReader(rngs=nnx.Rngs(seed))
    schedule = optax.cosine_onecycle_schedule(num_steps, peak_value=2e-3)
    optimizer = nnx.Optimizer(reader, optax.adamw(schedule, weight_decay=0.02), wrt=nnx.Param)
    all_images, all_labels = jnp.asarray(images), jnp.asarray(labels)

    @nnx.jit
    def step(reader: DigitReader, optimizer: nnx.Optimizer, key: jax.Array) -> None:
        choice_key, distort_key, dropout_key = jax.random.split(key, 3)
        chosen = jax.random.randint(choice_key, (128,), 0, len(images))
        distort_keys = jax.random.split(distort_key, len(chosen))
        inputs = jax.vmap(_distort)(distort_keys, all_images[chosen])[..., None]
        targets = optax.smooth_labels(jax.nn.one_hot(all_labels[chosen] - 1, 9), 0.05)

        def loss(reader: DigitReader) -> jax.Array:
            logits = reader(inputs, nnx.Rngs(dropout_key))
            return optax.softmax_cross_entropy(logits, targets).mean()

        optimizer.update(reader, nnx.grad(loss)(reader))

    key = jax.random.key(seed)
    for number in range(num_steps):
        step(reader, optimizer, jax.random.fold_in(key, number))
    return reader


def _distort(key: jax.Array, image: jax.Array) -> jax.Array:
    """Rotate, scale, shear and shift one image [8, 8] a little, and add noise to it."""
    affine_key, shift_key, noise_key, level_key = jax.random.split(key, 4)
    limits = jnp.array([0.25, 0.15, 0.1, 0.2])
    affine = jax.random.uniform(affine_key, (4,), minval=-limits, maxval=limits)
    angle, size, stretch, shear = affine
    rotation = jnp.array([[jnp.cos(angle), -jnp.sin(angle)], [jnp.sin(angle), jnp.cos(angle)]])
    scale = jnp.array([[jnp.exp(size + stretch), shear], [0.0, jnp.exp(size)]])
    centre = 3.5
    grid = jnp.indices((8, 8)).astype(jnp.float32) - centre
    shift = jax.random.uniform(shift_key, (2, 1, 1), minval=-0.8, maxval=0.8)
    source = jnp.einsum("ij,jhw->ihw", rotation @ scale, grid) + centre + shift
    moved = map_coordinates(image, list(source), order=1, cval=-1.0)
    noise = jax.random.normal(noise_key, (8, 8)) * jax.random.uniform(level_key, maxval=0.2)
    return jnp.clip(moved + noise, -1.0, 1.0)


def _report(name: str, reader: DigitReader, images: np.ndarray, labels: np.ndarray) -> None:
    """Print how often the reader is right, among 1..9 and, for images of 1..4, among 1..4."""
    logits = np.asarray(reader(jnp.asarray(images)[..., None]))
    accuracy = []
    for largest in (9, 4):
        shown = (labels >= 1) & (labels <= largest)
        right = logits[shown, :largest].argmax(axis=1) + 1 == labels[shown]
        accuracy.append(f"{largest}-way {right.mean():.2%} ({right.sum()} of {len(right)})")
    print(f"{name}: {', '.join(accuracy)}")


def main(*, second: bool = False) -> None:
    """Train a reader, print its accuracy and write its weights.

    Args:
        second: the one for verifiers, see above.

    Raises:
        FileExistsError: if the weights are there already.
    """
    path = files.refuse_existing(Path(str(SECOND_WEIGHTS if second else WEIGHTS)))
    train, test = load_digits("train"), load_digits("test")
    half = len(test[0]) // 2
    parts = {
        "train": train,
        "first half of test": tuple(each[:half] for each in test),
        "second half of test": tuple(each[half:] for each in test),
    }
    images, labels = parts["first half of test" if second else "train"]
    reader = train_reader(images[labels > 0], labels[labels > 0], seed=int(second))
    for name, part in parts.items():
        _report(name, reader, *part)
    state = nnx.to_pure_dict(nnx.state(reader, nnx.Param))
    weights = jax.device_get(nnx.traversals.flatten_mapping(state, sep="."))
    with files.whole(path) as part:
        np.savez(part, allow_pickle=False, **weights)
    print(f"written: {path}")


if __name__ == "__main__":
    main(second=sys.argv[1:] == ["second"])
