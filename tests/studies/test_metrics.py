"""Tallies: parts add up to the whole. Intervals: published ones, where they are, their coverage."""

import itertools
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from ipr_jax.methods.engine import Costs
from ipr_jax.studies import metrics
from ipr_jax.studies.metrics import Moments
from ipr_jax.tasks import get_task
from ipr_jax.tasks.sudoku import duplicate_count

MOST = {"violations": 2000}


def drawn(seed, number):
    rng = np.random.default_rng(seed)
    scores = {
        "valid": rng.random(number) < 0.5,
        "violations": (1000 + rng.integers(0, 9, number)).astype(np.int32),
    }
    return scores, rng.random(number) < 0.8, Costs(*rng.integers(0, 2**31, (3, number)))


@given(seed=st.integers(0, 99), number=st.integers(1, 40), cuts=st.lists(st.integers(0, 40)))
def test_parts_add_up_to_the_whole(seed, number, cuts):
    """Also of parts that are empty or have nothing finite."""
    scores, finite, costs = drawn(seed, number)
    ends = [0, *sorted(min(cut, number) for cut in cuts), number]
    parts = [
        metrics.tally(
            {name: v[a:b] for name, v in scores.items()},
            finite[a:b],
            Costs(*(each[a:b] for each in costs)),
        )
        for a, b in itertools.pairwise(ends)
    ]
    total = parts[0]
    for part in parts[1:]:
        total = metrics.add(total, part)
    whole = metrics.tally(scores, finite, costs)
    assert total._replace(means=None) == whole._replace(means=None)
    assert total.means["violations"].number == finite.sum()
    assert total.means["violations"] == pytest.approx(whole.means["violations"], rel=1e-12)
    line = metrics.line(total, MOST)
    assert line == pytest.approx(metrics.line(whole, MOST), rel=1e-12)
    assert json.loads(json.dumps(line, allow_nan=False)) == line


def test_the_moments_are_those_of_numpy():
    scores, finite, costs = drawn(3, 30)
    found = metrics.tally(scores, finite, costs)
    values = scores["violations"][finite].astype(np.float64)
    number, mean, squares = found.means["violations"]
    assert (number, mean) == (len(values), pytest.approx(values.mean(), rel=1e-15))
    assert squares / (number - 1) == pytest.approx(values.var(ddof=1), rel=1e-12)
    assert found.rates == {"valid": int((scores["valid"] & finite).sum())}
    assert (found.samples, found.not_finite) == (30, int((~finite).sum()))
    assert [found.nfe, found.nbe, found.nve] == [each.sum() for each in costs]
    means = metrics.line(found, MOST)
    assert [means[name] for name in Costs._fields] == [each.mean() for each in costs]


# --- intervals ------------------------------------------------------------------------------------


def samples_of(table):
    """Of which samples two rates hold, from how often: both, the first, the second, neither."""
    return np.repeat([True, True, False, False], table), np.repeat([True, False] * 2, table)


def tables(number, kinds):
    """All ways to share a number of samples among some kinds."""
    return [
        counts
        for counts in itertools.product(range(number + 1), repeat=kinds)
        if sum(counts) == number
    ]


def ends(line, name):
    return line[f"{name}_low"], line[f"{name}_high"]


@pytest.mark.parametrize(
    ("table", "interval"),
    [
        ((20, 12, 2, 16), (0.0562, 0.3292)),  # Newcombe 1998, method 10
        ((1, 1, 7, 12), (-0.507, -0.026)),  # Fagerland, Lydersen and Laake 2014
        ((59, 6, 16, 80), (-0.1186, -0.0046)),  # Fagerland, Lydersen and Laake 2017, chapter 8
        ((8, 3, 1, 2), (-0.1574, 0.4136)),  # Tang, Ling, Ling and Tian 2010
    ],
)
def test_differences_have_the_published_intervals(table, interval):
    found = metrics.difference(*samples_of(table))
    assert found["difference"] == pytest.approx((table[1] - table[2]) / sum(table), abs=1e-15)
    digits = 3 if table[0] == 1 else 4
    assert [round(end, digits) for end in ends(found, "difference")] == list(interval)


@pytest.mark.parametrize("number", range(1, 13))
def test_a_difference_is_inside_its_interval_and_that_in_its_range(number):
    for table in tables(number, 4):
        one, other = samples_of(table)
        found, swapped = metrics.difference(one, other), metrics.difference(other, one)
        low, high = ends(found, "difference")
        assert -1 <= low <= found["difference"] <= high <= 1
        assert high - low > 0.28
        assert ends(swapped, "difference") == pytest.approx((-high, -low), abs=1e-15)


@pytest.mark.parametrize("number", [4, 8, 12])
@pytest.mark.parametrize(
    "shares",
    [
        (0.6, 0.2, 0.1, 0.1),
        (0.3, 0.3, 0.2, 0.2),
        (0.85, 0.05, 0.05, 0.05),
        (0.5, 0.4, 0.05, 0.05),
        (0.1, 0.1, 0.1, 0.7),
        (0.9, 0.1, 0.0, 0.0),
    ],
)
def test_intervals_of_differences_cover_the_true_one(number, shares):
    """Exactly, over all samples that can be: the interval of a normal mean has 0.34 to 0.999."""
    counts = tables(number, 4)
    found = [ends(metrics.difference(*samples_of(table)), "difference") for table in counts]
    low, high = np.array(found).T
    inside = (low <= shares[1] - shares[2]) & (shares[1] - shares[2] <= high)
    assert stats.multinomial.pmf(counts, number, shares)[inside].sum() > 0.945


@pytest.mark.parametrize("number", range(1, 13))
def test_rates_have_the_wilson_interval_of_scipy(number):
    for count in range(number + 1):
        found = metrics.rate("valid", count, number)
        want = stats.binomtest(count, number).proportion_ci(0.95, method="wilson")
        assert (found["valid"], found["valid_rate"]) == (count, count / number)
        assert ends(found, "valid") == pytest.approx((want.low, want.high), abs=1e-12)
    assert metrics.rate("valid", 0, 5)["valid_low"] == 0
    assert metrics.rate("valid", 5, 5)["valid_high"] == 1


def test_of_shares_the_mean_has_almost_the_interval_of_a_rate():
    values = np.arange(1000) < 137
    rate = metrics.rate("valid", 137, 1000)
    mean = metrics.mean("valid", Moments.of(values), 1)
    assert ends(mean, "valid") == pytest.approx(ends(rate, "valid"), abs=1e-4)


@pytest.mark.parametrize(
    ("values", "shares", "most"),
    [
        ((0, 4, 10), (0.7, 0.2, 0.1), 72),
        ((0, 2, 6), (0.86, 0.1, 0.04), 72),
        ((5, 10, 20), (0.2, 0.2, 0.6), 20),
        ((0.01, 0.02, 0.05), (0.3, 0.4, 0.3), 0.5),
    ],
)
@pytest.mark.parametrize("number", [2, 4, 8, 16])
def test_intervals_of_means_are_in_their_range_and_cover_the_true_one(number, values, shares, most):
    """Exactly, over all samples that can be and are not all equal: those have none."""
    likely = covered = 0
    for counts in tables(number, 3):
        drawn = np.repeat(values, counts)
        found = metrics.mean("score", Moments.of(drawn), most)
        assert found["score"] == pytest.approx(drawn.mean(), rel=1e-14)
        assert ("score_low" in found) == (np.ptp(drawn) > 0)
        if np.ptp(drawn):
            low, high = ends(found, "score")
            assert 0 < low < drawn.mean() < high < most
            chance = stats.multinomial.pmf(counts, number, shares)
            likely += chance
            covered += chance * (low <= np.dot(values, shares) <= high)
    assert covered / likely > 0.92


def test_of_nothing_there_is_no_rate_no_mean_and_no_difference():
    none = np.zeros(0, bool)
    assert metrics.rate("valid", 0, 0) == {"valid": 0}
    assert metrics.mean("score", Moments.of(none), 1) == {}
    assert metrics.difference(none, none) == {}


@pytest.mark.parametrize("value", [0.0, 0.1, 1 / 3, 7.0])
@pytest.mark.parametrize("number", [1, 3, 7])
def test_equal_values_have_a_mean_and_no_interval(value, number):
    """Also added up from parts."""
    parts = metrics.Tally(1, 0, 0, {}, {"score": Moments.of(np.array([value]))})
    total = parts
    for _ in range(number - 1):
        total = metrics.add(total, parts)
    for moments in (Moments.of(np.full(number, value)), total.means["score"]):
        assert moments == (number, value, 0)
        assert metrics.mean("score", moments, 9) == {"score": value}


def test_samples_that_are_not_finite_are_in_no_interval():
    scores = {"valid": np.array([True, False, False]), "violations": np.array([1, 3, 99])}
    part = {name: values[:2] for name, values in scores.items()}
    costs = Costs(*np.zeros((3, 3), int))
    with_broken = metrics.tally(scores, np.array([True, True, False]), costs)
    without = metrics.tally(part, np.array([True, True]), Costs(*np.zeros((3, 2), int)))
    want = metrics.line(without, MOST) | {"samples": 3, "not_finite": 1}
    assert metrics.line(with_broken, MOST) == want


@pytest.mark.parametrize("name", ["mini-sudoku", "digits-sudoku"])
def test_a_board_of_one_digit_has_the_most_violations(name):
    task = get_task(name)
    assert duplicate_count(np.ones(task.grid, np.int32)) == task.means["violations"]


def test_the_worst_even_pixels_have_the_most_of_every_score():
    """All of one hue; half of them grey; half of them black."""
    task = get_task("even-pixels")
    red, white, black = (1, -1, -1), (1, 1, 1), (-1, -1, -1)
    pairs = np.array([[red, red], [red, white], [black, white]], np.float32)
    scores = task.score(pairs.repeat(512, axis=1).reshape(3, 32, 32, 3))
    assert [scores[name][i] for i, name in enumerate(task.means)] == list(task.means.values())
