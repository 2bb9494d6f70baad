"""How good a sample is, as methods ask: small functions of an image and of what the network says.

A score sees rows of the network: the predicted clean images, the noise levels that they were
predicted at, and the prediction. A method that chooses by one says of which kind it is, since
samples chosen by what also grades them are no fair comparison with those that were not.
"""

import dataclasses
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from ipr_jax.core import Prediction, check

Score = Callable[[jax.Array, jax.Array, Prediction], jax.Array]
"""``score(image [R, H, W, C], level [R, h, w], prediction) -> float32 [R]``, higher is better, the
logarithm of a likelihood where it has a scale. ``image`` is what the network predicts for level 0;
a patch at level t is uncertain and should weigh 1 - t. Each row follows from its own alone."""

KINDS = ("internal", "independent", "oracle")
"""Where a score comes from: the network itself; a verifier that has learnt from other data than the
one that grades; the score that grades."""


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["score"],
    meta_fields=["kind", "differentiable"],
)
@dataclasses.dataclass(frozen=True)
class Verifier:
    """A score and its kind; ``verifier`` makes it.

    Attributes:
        score: a pytree, so that its arrays are arguments of a compiled program.
        kind: one of ``KINDS``.
        differentiable: whether it has a gradient with respect to the image.
    """

    score: Score
    kind: str
    differentiable: bool


def verifier(score: Score, kind: str, *, differentiable: bool = False) -> Verifier:
    """A score that a method can choose by.

    Args:
        score: a function or a pytree that can be called.
        kind: one of ``KINDS``.
        differentiable: whether it has a gradient with respect to the image.

    Raises:
        ValueError: it cannot be called, or an unknown kind.
    """
    check.function("score", score, "(image, level, prediction) -> scores")
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if jax.tree_util.all_leaves([score]):
        score = jax.tree_util.Partial(score)
    return Verifier(score, kind, differentiable)


def evaluate(
    verifier: Verifier, image: jax.Array, level: jax.Array, prediction: Prediction
) -> jax.Array:
    """What a verifier says of rows, float32 [R]; what is not a number is the worst.

    Raises:
        ValueError: another shape or dtype; at trace.
    """
    found = verifier.score(image, level, prediction)
    found = check.returned("what score returns", found, image.shape[:1], jnp.float32)
    return jnp.where(jnp.isnan(found), -jnp.inf, found)
