"""Rates and means with 95% intervals, from tallies that add up: parts are counted, then summed.

All intervals are score intervals: they stay in the range of what they are of, at any number of
samples. That of a rate is Wilson's (1927), that of a mean Wilson's with the variance that was
found, that of a difference of rates of the same samples Newcombe's (1998, method 10).
"""

from collections.abc import Iterable, Mapping
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

from ipr_jax.methods.engine import Costs

Line = dict[str, float | int]
"""Numbers by name, as JSON data."""

COSTS = {"nfe": "evaluations per sample", "nve": "verifier calls", "nbe": "gradients"}
"""What a sample costs, by the name in a line."""

Z = NormalDist().inv_cdf(0.975)


class Moments(NamedTuple):
    """Of some numbers: how many, their mean, and the sum of the squared distances from it."""

    number: int
    mean: float
    squares: float

    @classmethod
    def of(cls, values: np.ndarray) -> "Moments":
        """Of values [N], in float64."""
        values = np.asarray(values, np.float64)
        if not len(values):
            return cls(0, 0.0, 0.0)
        mean = values[0] + (values - values[0]).mean()  # of equal values it is that value
        return cls(len(values), float(mean), float(((values - mean) ** 2).sum()))


class Tally(NamedTuple):
    """What some samples scored.

    Attributes:
        samples: how many.
        not_finite: how many of them are left out of rates and means.
        nfe: network evaluations of all samples together.
        rates: for every score that is bool, of how many it holds.
        means: for every other score its moments.
        nbe: backward passes of all together.
        nve: their calls of a verifier.
    """

    samples: int
    not_finite: int
    nfe: int
    rates: dict[str, int]
    means: dict[str, Moments]
    nbe: int = 0
    nve: int = 0


def tally(scores: Mapping[str, np.ndarray], finite: np.ndarray, costs: Costs) -> Tally:
    """The tally of N samples.

    Args:
        scores: by name, each [N]; those that are bool are rates, the others means.
        finite: bool [N], False = to be left out.
        costs: int [N] each.
    """
    counted = {name: values[finite] for name, values in scores.items()}
    shares = {name for name, values in counted.items() if values.dtype == np.bool_}
    return Tally(
        samples=len(finite),
        not_finite=int((~finite).sum()),
        rates={name: int(counted[name].sum()) for name in counted if name in shares},
        means={name: Moments.of(counted[name]) for name in counted if name not in shares},
        **{name: int(each.sum(dtype=np.int64)) for name, each in costs._asdict().items()},
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
        rates={name: count + other.rates[name] for name, count in one.rates.items()},
        means={name: both(found, other.means[name]) for name, found in one.means.items()},
        **{name: getattr(one, name) + getattr(other, name) for name in Costs._fields},
    )


def costs_of(lines: Iterable[Mapping[str, float]]) -> dict[str, str]:
    """Those of ``COSTS`` that some have: of network evaluations always, of others if any."""
    every = list(lines)
    return {
        name: title
        for name, title in COSTS.items()
        if name == "nfe" or any(line.get(name) for line in every)
    }


def line(tally: Tally, most: Mapping[str, float]) -> Line:
    """Rates and means over the finite samples, with 95% intervals.

    Args:
        tally: what was scored.
        most: by name the most that each of the means can be; the least is 0.

    Returns:
        samples, not_finite; for a bool score such as valid what ``rate`` gives, for another such as
        violations what ``mean`` gives; nfe, nbe and nve (means per sample, so far).
    """
    found: Line = {"samples": tally.samples, "not_finite": tally.not_finite}
    for name, count in tally.rates.items():
        found |= rate(name, count, tally.samples - tally.not_finite)
    for name, moments in tally.means.items():
        found |= mean(name, moments, most[name])
    return found | {name: getattr(tally, name) / tally.samples for name in Costs._fields}


def rate(name: str, count: int, samples: int) -> Line:
    """How many of some samples, and their rate with its interval (Wilson).

    Returns:
        NAME (the count); of at least 1 sample also NAME_rate, NAME_low and NAME_high.
    """
    if not samples:
        return {name: count}
    share = count / samples
    low, high = _wilson(share, Z**2 / samples)
    return {name: count, f"{name}_rate": share, f"{name}_low": low, f"{name}_high": high}


def mean(name: str, moments: Moments, most: float) -> Line:
    """The mean of numbers in [0, most], and its interval.

    It is the interval of a rate, at as many samples as give a rate the variance that was found, and
    with the quantile of Student's t.

    Returns:
        NAME, NAME_low and NAME_high; of no numbers nothing, of equal ones no interval, as how far
        they spread is not known.
    """
    from scipy import special

    number, centre, squares = moments
    if not number:
        return {}
    if not squares:
        return {name: centre}
    share, quantile = centre / most, special.stdtrit(number - 1, 0.975)
    variance = squares / (number - 1) / most**2
    low, high = _wilson(share, float(quantile**2) / number * variance / (share * (1 - share)))
    return {name: centre, f"{name}_low": most * low, f"{name}_high": most * high}


def difference(one: np.ndarray, other: np.ndarray) -> Line:
    """By how much a rate exceeds another, of the same samples, and its interval (Newcombe).

    Args:
        one: bool [N], of which samples the first holds.
        other: bool [N], of which the second does.

    Returns:
        difference, difference_low and difference_high, in [-1, 1]; of no samples nothing.
    """
    number = len(one)
    if not number:
        return {}
    first, second = float(one.mean()), float(other.mean())
    (low, high), (other_low, other_high) = (
        _wilson(share, Z**2 / number) for share in (first, second)
    )
    both, neither = int((one & other).sum()), int((~one & ~other).sum())
    agreement = both * neither - int((one & ~other).sum()) * int((~one & other).sum())
    if agreement > 0:
        agreement = max(agreement - number / 2, 0)  # for continuity
    scale = number**2 * (first * (1 - first) * second * (1 - second)) ** 0.5
    correlation = agreement / scale if scale else 0.0

    def reach(a: float, b: float) -> float:
        return (a**2 - 2 * correlation * a * b + b**2) ** 0.5

    return {
        "difference": first - second,
        "difference_low": first - second - reach(first - low, other_high - second),
        "difference_high": first - second + reach(high - first, second - other_low),
    }


def _wilson(share: float, spread: float) -> tuple[float, float]:
    """The ends of Wilson's interval of a share; the spread is z^2 / n > 0."""

    def low(share: float) -> float:
        root = (spread * share * (1 - share) + spread**2 / 4) ** 0.5
        return share**2 / (share + spread / 2 + root)

    return low(share), 1 - low(1 - share)
