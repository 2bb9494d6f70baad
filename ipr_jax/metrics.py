"""Rates and means with 95% intervals, from tallies that add up: parts are counted, then summed."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

Line = dict[str, float | int]
"""Numbers by name, as JSON data."""


class Moments(NamedTuple):
    """Of some numbers: how many, their mean, and the sum of the squared distances from it."""

    number: int
    mean: float
    squares: float

    @classmethod
    def of(cls, values: np.ndarray) -> "Moments":
        """Of values [N], in float64."""
        values = np.asarray(values, np.float64)
        mean = float(values.mean()) if len(values) else 0.0
        return cls(len(values), mean, float(((values - mean) ** 2).sum()))


class Tally(NamedTuple):
    """What some samples scored.

    Attributes:
        samples: how many.
        not_finite: how many of them are left out of rates and means.
        nfe: network evaluations of all samples together.
        rates: for every score that is bool, of how many it holds.
        means: for every other score its moments.
    """

    samples: int
    not_finite: int
    nfe: int
    rates: dict[str, int]
    means: dict[str, Moments]


def tally(scores: Mapping[str, np.ndarray], finite: np.ndarray, nfe: np.ndarray) -> Tally:
    """The tally of N samples.

    Args:
        scores: by name, each [N]; those that are bool are rates, the others means.
        finite: bool [N], False = to be left out.
        nfe: int [N], network evaluations.
    """
    counted = {name: values[finite] for name, values in scores.items()}
    shares = {name for name, values in counted.items() if values.dtype == np.bool_}
    return Tally(
        samples=len(finite),
        not_finite=int((~finite).sum()),
        nfe=int(nfe.sum(dtype=np.int64)),
        rates={name: int(counted[name].sum()) for name in counted if name in shares},
        means={name: Moments.of(counted[name]) for name in counted if name not in shares},
    )


def add(one: Tally, other: Tally) -> Tally:
    """The tally of both together (Chan, Golub and LeVeque 1979, equation 2.1)."""

    def both(a: Moments, b: Moments) -> Moments:
        number = a.number + b.number
        share, distance = b.number / max(number, 1), b.mean - a.mean
        squares = a.squares + b.squares + distance**2 * a.number * share
        return Moments(number, a.mean + distance * share, squares)

    return Tally(
        samples=one.samples + other.samples,
        not_finite=one.not_finite + other.not_finite,
        nfe=one.nfe + other.nfe,
        rates={name: count + other.rates[name] for name, count in one.rates.items()},
        means={name: both(found, other.means[name]) for name, found in one.means.items()},
    )


def line(tally: Tally) -> Line:
    """Rates and means over the finite samples, with 95% intervals.

    Returns:
        samples, not_finite; for a bool score such as valid: valid (how many), valid_rate with
        valid_low and valid_high (Wilson); for another such as violations: violations (the mean)
        with violations_low and violations_high (normal); nfe (mean per sample, so far). Without a
        finite sample there are no rate and no mean, with a single one the means have no interval.
    """
    found: Line = {"samples": tally.samples, "not_finite": tally.not_finite}
    for name, count in tally.rates.items():
        found |= rate(name, count, tally.samples - tally.not_finite)
    for name, moments in tally.means.items():
        found |= mean(name, moments)
    return found | {"nfe": tally.nfe / tally.samples}


def rate(name: str, count: int, samples: int) -> Line:
    """How many of some samples, and their rate with its interval (Wilson)."""
    from scipy import stats

    if not samples:
        return {name: count}
    low, high = stats.binomtest(count, samples).proportion_ci(0.95, method="wilson")
    return {
        name: count,
        f"{name}_rate": count / samples,
        f"{name}_low": float(low),
        f"{name}_high": float(high),
    }


def mean(name: str, moments: Moments) -> Line:
    """The mean and its 95% interval (normal), as NAME, NAME_low and NAME_high.

    Without values there is no mean, with a single one no interval.
    """
    number, centre, squares = moments
    if number == 0:
        return {}
    if number == 1:
        return {name: centre}
    error = 1.96 * (squares / (number - 1) / number) ** 0.5
    return {name: centre, f"{name}_low": centre - error, f"{name}_high": centre + error}
