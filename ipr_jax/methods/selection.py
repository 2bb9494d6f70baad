"""What an iteration regenerates, and from which noise: small functions, passed to the loop."""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ipr_jax.core import check
from ipr_jax.core import keys as random_keys
from ipr_jax.sampling import rank

Selection = Callable[..., jax.Array]
"""``select(keys [B], iteration, (h, w)) -> scores``, float32 [B, h, w], from the keys of the
samples and the iteration, from 1, a scalar or one per sample; the editable patches with the lowest
scores are regenerated. One that has a parameter ``seen`` is also given ``seen=Seen(...)``. Another
shape or dtype, such as a mask, is refused at trace."""

Noise = Callable[[jax.Array, jax.Array | int, tuple[int, ...]], jax.Array]
"""``noise(keys [B], iteration, (H, W, C)) -> noise``, float32 [B, H, W, C], standard normal; the
iteration is a scalar or one per sample. Another shape or dtype is refused at trace."""


UNSEEN = 1e12
"""The doubt about a patch that was not predicted yet: above all others."""


class Seen(NamedTuple):
    """What is known of the patches of B samples when a region is chosen, or a sample may leave.

    Attributes:
        image: float32 [B, H, W, C], the samples as they are.
        doubt: float32 [B, h, w], by how much, mean square, the network's prediction of a patch from
            the others differed from what stood there when it was last regenerated.
        sigma: float32 [B, h, w], the predicted error of its velocity when it was last noisy.
        age: int32 [B, h, w], iterations since it was last regenerated, the first of all included.
    """

    image: jax.Array
    doubt: jax.Array
    sigma: jax.Array
    age: jax.Array


def nothing_seen(image: jax.Array, editable: jax.Array) -> Seen:
    """Before the first prediction; there is nothing to doubt about clues."""
    unseen = jnp.where(editable, jnp.float32(UNSEEN), 0)
    return Seen(image, unseen, unseen, jnp.zeros(editable.shape, jnp.int32))


def takes_seen(function: Callable[..., Any]) -> bool:
    """Whether a selection or a stopping rule wants to know what was seen."""
    try:
        return "seen" in inspect.signature(function).parameters
    except (TypeError, ValueError):  # it does not tell
        return False


def ask(function: Callable[..., Any], *given: Any, seen: Seen | None) -> Any:
    """Call a selection or a stopping rule, with what was seen if it takes it."""
    return function(*given, seen=seen) if takes_seen(function) else function(*given)


MEASURES: dict[str, Callable[[Seen], jax.Array]] = {
    "doubt": lambda seen: seen.doubt,
    "sigma": lambda seen: seen.sigma,
    "age": lambda seen: seen.age.astype(jnp.float32),
}
"""What ``Informed`` goes by, by name."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Informed:
    """A selection: random patches, rather those that look wrong. It costs no evaluation.

    A patch is drawn with a weight: the product of its measures, each with ``least`` added so that
    none starves, to the power 1 / temperature.

    Attributes:
        by: one or several of ``MEASURES``.
        temperature: above 0; small = always the worst patches, large = any.
        least: above 0.

    Raises:
        ValueError: a value is out of range or a name unknown.
    """

    by: tuple[str, ...] = ("doubt",)
    temperature: float = 1.0
    least: float = 0.02

    def __post_init__(self) -> None:
        if not self.by or not set(self.by) <= MEASURES.keys():
            raise ValueError(f"by must be some of {', '.join(MEASURES)}, got {self.by!r}")
        for name in ("temperature", "least"):
            check.number(name, getattr(self, name), lambda value: 0 < value < np.inf, "above 0")

    @property
    def __name__(self) -> str:
        return f"informed by {', '.join(self.by)}"

    def __call__(
        self, keys: jax.Array, iteration: jax.Array | int, grid: tuple[int, ...], *, seen: Seen
    ) -> jax.Array:
        """Scores, float32 [B, h, w]."""
        logs = [jnp.log(MEASURES[measure](seen) + self.least) for measure in self.by]
        return weighted_regions(keys, iteration, sum(logs[1:], logs[0]) / self.temperature)


def fresh_regions(keys: jax.Array, iteration: jax.Array | int, grid: tuple[int, ...]) -> jax.Array:
    """New random patches in every iteration (IPR, algorithm 1 line 3): float32 [B, h, w], uniform
    in [0, 1); those with the lowest are taken.
    """
    return random_keys.uniform(random_keys.iteration_keys(keys, iteration).region, grid)


def weighted_regions(
    keys: jax.Array, iteration: jax.Array | int, log_weights: jax.Array
) -> jax.Array:
    """New patches in every iteration, drawn by their weights without replacement.

    The score of a patch is when its clock rings, of exponential clocks, as a logarithm.

    Args:
        keys: [B], of the samples.
        iteration: scalar or [B].
        log_weights: float32 [B, h, w].
    """
    uniform = fresh_regions(keys, iteration, log_weights.shape[1:])
    return jnp.log(-jnp.log1p(-uniform)) - log_weights


def fixed_regions(keys: jax.Array, iteration: jax.Array | int, grid: tuple[int, ...]) -> jax.Array:
    """The random patches of the first iteration in all (IPR, figure 6b): float32 [B, h, w]."""
    del iteration
    return random_keys.uniform(random_keys.iteration_keys(keys, 1).region, grid)


def fresh_noise(keys: jax.Array, iteration: jax.Array | int, shape: tuple[int, ...]) -> jax.Array:
    """New noise in every iteration (IPR, algorithm 1 line 4): float32 [B, H, W, C]."""
    return random_keys.normal(random_keys.iteration_keys(keys, iteration).noise, shape)


def initial_noise(keys: jax.Array, iteration: jax.Array | int, shape: tuple[int, ...]) -> jax.Array:
    """The noise of the first pass in every iteration (IPR, figure 6b): float32 [B, H, W, C]."""
    del iteration
    return random_keys.normal(random_keys.iteration_keys(keys, 0).noise, shape)


INFORMED = Informed()
"""Rather the patches that the network disagreed with when it saw them last."""

REGIONS: dict[str, Selection] = {
    "fresh": fresh_regions,
    "fixed": fixed_regions,
    "informed": INFORMED,
}
"""Region selections by name."""

NOISES: dict[str, Noise] = {"fresh": fresh_noise, "initial": initial_noise}
"""Noise choices by name."""


def check_functions(select: Selection, noise: Noise) -> None:
    """Refuse what cannot be called.

    Raises:
        ValueError: one of the two is no function.
    """
    check.function(
        "select", select, "(keys, iteration, grid) -> scores, see ipr_jax.methods.selection"
    )
    check.function(
        "noise", noise, "(keys, iteration, shape) -> noise, see ipr_jax.methods.selection"
    )


def region_sizes(num_patches: int, ratio: float) -> np.ndarray:
    """How many of n editable patches are regenerated: floor(ratio n), at least 1 where n > 0.

    Args:
        num_patches: P.
        ratio: the resampling ratio, in (0, 1].

    Returns:
        Int32 [P + 1], indexed by n, in the published code's float64 arithmetic.

    Raises:
        ValueError: the ratio is out of range or traced.
    """
    check.number("ratio", ratio, lambda value: 0 < value <= 1, "in (0, 1]")
    sizes = [0, *(max(1, int(n * float(ratio))) for n in range(1, num_patches + 1))]
    return np.array(sizes, np.int32)


def choose(scores: jax.Array, editable: jax.Array, number: jax.Array) -> jax.Array:
    """The editable patches with the lowest scores.

    Args:
        scores: float32 [B, h, w].
        editable: bool [B, h, w].
        number: int32 [B], how many, at most as many as are editable.

    Returns:
        Bool [B, h, w], exactly so many True per sample; ties in raster order.

    Raises:
        ValueError: the scores have another shape or dtype; at trace.
    """
    scores = check.returned("what select returns", scores, editable.shape, jnp.float32)
    return editable & (rank(scores, editable) < number[:, None, None])
