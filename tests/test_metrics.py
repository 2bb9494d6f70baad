"""Tallies: parts add up to the whole."""

import itertools
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipr_jax import metrics


def drawn(seed, number):
    rng = np.random.default_rng(seed)
    scores = {
        "valid": rng.random(number) < 0.5,
        "violations": (1000 + rng.integers(0, 9, number)).astype(np.int32),
    }
    return scores, rng.random(number) < 0.8, rng.integers(0, 2**31, number)


@given(seed=st.integers(0, 99), number=st.integers(1, 40), cuts=st.lists(st.integers(0, 40)))
def test_parts_add_up_to_the_whole(seed, number, cuts):
    """Also of parts that are empty or have nothing finite."""
    scores, finite, nfe = drawn(seed, number)
    ends = [0, *sorted(min(cut, number) for cut in cuts), number]
    parts = [
        metrics.tally({name: v[a:b] for name, v in scores.items()}, finite[a:b], nfe[a:b])
        for a, b in itertools.pairwise(ends)
    ]
    total = parts[0]
    for part in parts[1:]:
        total = metrics.add(total, part)
    whole = metrics.tally(scores, finite, nfe)
    assert total[:4] == whole[:4]
    assert total.means["violations"].number == finite.sum()
    assert total.means["violations"] == pytest.approx(whole.means["violations"], rel=1e-12)
    line = metrics.line(total)
    assert line == pytest.approx(metrics.line(whole), rel=1e-12)
    assert json.loads(json.dumps(line, allow_nan=False)) == line


def test_the_moments_are_those_of_numpy():
    scores, finite, nfe = drawn(3, 30)
    found = metrics.tally(scores, finite, nfe)
    values = scores["violations"][finite].astype(np.float64)
    number, mean, squares = found.means["violations"]
    assert (number, mean) == (len(values), pytest.approx(values.mean(), rel=1e-15))
    assert squares / (number - 1) == pytest.approx(values.var(ddof=1), rel=1e-12)
    assert found.rates == {"valid": int((scores["valid"] & finite).sum())}
    assert (found.samples, found.not_finite, found.nfe) == (30, int((~finite).sum()), nfe.sum())
