"""Scores of images for search with a verifier, other than those that grade, and those too.

Each is a function ``(image, level, prediction) -> float32 [R]``, higher is better, 0 the best, and
a pytree: what it has learnt is an argument of the program. A patch at level t weighs 1 - t. "Soft"
ones have a gradient with respect to the image.

Shapes: R rows, images [R, H, W, C] in [-1, 1], noise levels [R, h, w] in [0, 1].
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ipr_jax.core import check, patches
from ipr_jax.tasks import digits, even_pixels, sudoku
from ipr_jax.tasks.base import Task
from ipr_jax.tasks.polygon_classifier import MAX_POLYGONS, PolygonConfig, read_counts

Score = Callable[[jax.Array, jax.Array, Any], jax.Array]
"""As methods take it, see ``ipr_jax.methods.scores``."""

INDEPENDENT = "independent"
"""The kind and the name of a verifier that is not what grades."""

SHARPNESS = 4.0
"""Of the soft decision between two hues: pure ones count tanh(4) = 0.999."""


@partial(jax.tree_util.register_dataclass, data_fields=["read"], meta_fields=["soft"])
@dataclasses.dataclass(frozen=True)
class _Conflicts:
    read: Callable[[jax.Array], jax.Array]
    soft: bool

    def __call__(self, image: jax.Array, level: jax.Array, prediction: Any) -> jax.Array:
        del prediction
        rows, n, _ = level.shape
        tiles = patches.tokens(image, image.shape[1] // n)
        side = image.shape[1] // n
        logits = self.read(tiles.reshape(rows * n * n, side, side, 1))[:, :n]
        if self.soft:
            chance = jax.nn.softmax(logits, axis=-1)
        else:
            chance = jax.nn.one_hot(logits.argmax(axis=-1), n, dtype=jnp.float32)
        return _pairs(chance.reshape(rows, n * n, n), level, sudoku.units(n))


def _pairs(chance: jax.Array, level: jax.Array, units: jax.Array | np.ndarray) -> jax.Array:
    """Minus pairs of equal digits in units [U, n] of cells that show them by chance [R, P, n]."""
    weighed = (1 - level).reshape(*chance.shape[:2], 1) * chance
    members = weighed[:, units]
    pairs = members.sum(axis=2) ** 2 - (members**2).sum(axis=2)
    return -pairs.sum(axis=(1, 2)) / 2


def conflicts(read: Callable[[jax.Array], jax.Array], *, soft: bool = False) -> Score:
    """Minus the expected number of pairs of equal digits in the rows, columns and boxes of Sudoku.

    A pair counts in each unit that holds it, by the product of the weights of its cells.

    Args:
        read: tiles [T, S, S, 1] -> logits [T, k] of the digits 1..k, k at least the board's side.
        soft: digits as likely as ``read`` says, else each cell's likeliest.
    """
    return _Conflicts(check.as_pytree(read), soft)


@partial(jax.tree_util.register_dataclass, data_fields=[], meta_fields=["soft"])
@dataclasses.dataclass(frozen=True)
class _Imbalance:
    soft: bool

    def __call__(self, image: jax.Array, level: jax.Array, prediction: Any) -> jax.Array:
        del prediction
        red, green, blue = image[..., 0], image[..., 1], image[..., 2]
        x, y = red - (green + blue) / 2, np.float32(np.sqrt(3) / 2) * (green - blue)
        weight = (1 - patches.expand(level, image.shape[1] // level.shape[1]))[..., 0]
        twice = [
            (weight * part).sum(axis=(1, 2), keepdims=True) for part in (x**2 - y**2, 2 * x * y)
        ]
        grey = (twice[0] == 0) & (twice[1] == 0)
        angle = jnp.arctan2(twice[1], jnp.where(grey, 1, twice[0])) / 2
        along = x * jnp.cos(angle) + y * jnp.sin(angle)
        side = along / jnp.sqrt(x**2 + y**2 + 1e-6)
        side = jnp.tanh(SHARPNESS * side) if self.soft else jnp.sign(side)
        excess = (weight * side).sum(axis=(1, 2))
        return -(excess**2) / even_pixels.NUM_PIXELS if self.soft else -jnp.abs(excess) / 2


def imbalance(*, soft: bool = False) -> Score:
    """Minus how many pixels of Even Pixels a hue has too many or, soft, the square of it, scaled.

    Hues are told apart by the axis of the plane of colours along which pixels spread most; the
    published score asks a histogram of hues.

    Args:
        soft: pixels between two hues count in part, else by the side that they are on.
    """
    return _Imbalance(soft)


@partial(jax.tree_util.register_dataclass, data_fields=["classify"], meta_fields=["config", "soft"])
@dataclasses.dataclass(frozen=True)
class _Miscounts:
    classify: Callable[[jax.Array], dict[str, jax.Array]]
    config: PolygonConfig
    soft: bool

    def __call__(self, image: jax.Array, level: jax.Array, prediction: Any) -> jax.Array:
        del prediction
        logits, weight = self.classify(image), (1 - level).mean(axis=(1, 2))
        if not self.soft:
            seen = read_counts(logits, self.config)
            counted = jnp.stack([seen.num_polygons, seen.num_vertices], axis=1)
            consistent = (jnp.sort(counted, axis=1) == seen.stated).all(axis=1)
            wrong = (~consistent).astype(jnp.int32) + (~seen.is_uniform).astype(jnp.int32)
            return -weight * wrong.astype(jnp.float32)
        log = {name: jax.nn.log_softmax(part, axis=1) for name, part in logits.items()}
        places = {pair: place for place, pair in enumerate(map(tuple, self.config.pairs.tolist()))}
        vertices = range(self.config.min_vertices, self.config.max_vertices + 1)
        stated = np.array(
            [
                [places[min(v, count), max(v, count)] for count in range(1, MAX_POLYGONS + 1)]
                for v in vertices
            ]
        )
        both = log["num_vertices"][:, :, None] + log["num_polygons"][:, None, :]
        agree = jax.nn.logsumexp(both + log["numbers_label"][:, stated], axis=(1, 2))
        return weight * (agree + log["is_uniform"][:, 1])


def miscounts(
    classify: Callable[[jax.Array], dict[str, jax.Array]],
    config: PolygonConfig,
    *,
    soft: bool = False,
) -> Score:
    """What is wrong in an image of Counting Polygons or Stars, as a classifier sees it.

    All of the image weighs as its patches do on average.

    Args:
        classify: images -> logits by head, as ``polygon_classifier.PolygonClassifier``.
        config: of the classifier.
        soft: the logarithm of the chance that the numbers stated are those counted and all objects
            are alike; else minus how many of the two do not hold.
    """
    return _Miscounts(check.as_pytree(classify), config, soft)


@partial(jax.tree_util.register_dataclass, data_fields=[], meta_fields=["grade", "error", "rates"])
@dataclasses.dataclass(frozen=True)
class _Oracle:
    grade: Callable[[jax.Array], dict[str, jax.Array]]
    error: str | None
    rates: tuple[str, ...]

    def __call__(self, image: jax.Array, level: jax.Array, prediction: Any) -> jax.Array:
        del prediction
        found, weight = self.grade(image), (1 - level).mean(axis=(1, 2))
        if self.error is not None:
            return -weight * found[self.error].astype(jnp.float32)
        failed = [(~found[name]).astype(jnp.float32) for name in self.rates]
        return -weight * jnp.stack(failed).sum(axis=0)


@partial(jax.tree_util.register_dataclass, data_fields=["units"], meta_fields=["read"])
@dataclasses.dataclass(frozen=True)
class _Graded:
    read: Callable[[jax.Array], jax.Array]
    units: jax.Array

    def __call__(self, image: jax.Array, level: jax.Array, prediction: Any) -> jax.Array:
        del prediction
        places = self.read(image).reshape(len(image), -1) - 1
        chance = jax.nn.one_hot(places, self.units.shape[1], dtype=jnp.float32)
        return _pairs(chance, level, self.units)


def oracle(task: Task) -> Score:
    """What grades the task: minus its first error, such as imbalance, or minus what fails.

    All of the image weighs as its patches do on average; of a task with ``units``, such as Sudoku,
    each cell by itself, as in ``conflicts``, and the digits are those that the grader reads. What
    is chosen by it is no fair comparison; the best of n by it is what is called pass@n.
    """
    if task.units is not None and task.read is not None:
        return _Graded(task.read, jnp.asarray(task.units))
    return _Oracle(task.score, next(iter(task.means), None), task.rates)


class Judge(NamedTuple):
    """What ``methods.scores.verifier`` takes: ``verifier(**judge._asdict())``.

    Attributes:
        score: of images.
        kind: "oracle" = what grades; "independent" = another rule, or learnt from other data.
        differentiable: whether it has a gradient.
    """

    score: Score
    kind: str
    differentiable: bool


def _second_conflicts(*, soft: bool = False) -> Score:
    return conflicts(digits.load_reader(digits.SECOND_WEIGHTS), soft=soft)


def _makers(task: Task) -> dict[str, Callable[[], Judge]]:
    """How to make each verifier of a task, by name."""
    found: dict[str, Callable[[], Judge]] = {"oracle": lambda: Judge(oracle(task), "oracle", False)}
    make: Callable[..., Score] | None = None
    if task.name in ("mini-sudoku", "digits-sudoku"):
        make = _second_conflicts
    elif task.name == "even-pixels":
        make = imbalance
    if make is not None:
        found[INDEPENDENT] = lambda: Judge(make(), INDEPENDENT, False)
        found[f"{INDEPENDENT}-soft"] = lambda: Judge(make(soft=True), INDEPENDENT, True)
    return found


def names(task: Task) -> list[str]:
    """The verifiers of a task: "oracle", for mini-sudoku, digits-sudoku and even-pixels also
    "independent" and "independent-soft".
    """
    return list(_makers(task))


def named(task: Task, name: str) -> Judge:
    """A verifier of a task by name.

    Raises:
        ValueError: the task has none of this name; lists those that it has.
    """
    found = _makers(task)
    if name not in found:
        raise ValueError(
            f"a verifier of {task.name} must be one of {', '.join(found)}, got {name!r}"
        )
    return found[name]()


def seconded(task: Task) -> Task:
    """A task whose scores also tell what its independent verifier finds right, by that name.

    Where it holds in more samples than the task's own, samples were chosen for what it overlooks.
    A task that has no such verifier stays as it is.
    """
    if INDEPENDENT not in names(task):
        return task
    judge = named(task, INDEPENDENT).score

    def score(image: jax.Array) -> dict[str, jax.Array]:
        clean = jnp.zeros((len(image), *task.grid), jnp.float32)
        return task.score(image) | {INDEPENDENT: judge(image, clean, None) == 0}

    return dataclasses.replace(task, score=score, rates=(*task.rates, INDEPENDENT))
