"""Resampling: the laws of the numbers of children, and the published code on the same draws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ipr_jax.methods import resampling
from tests.conftest import golden

N, DRAWS = 7, 4000
LOG_WEIGHTS = {
    "uneven": np.log(np.array([1, 2, 0.5, 4, 0.1, 3, 1])),
    "some without": np.array([-np.inf, 0, -np.inf, 1, 2, -np.inf, -np.inf]),
    "far apart": np.array([0, -200, 3, 900, 899, 0, -5.0]),
    "equal": np.zeros(N),
}
UNBIASED = ("multinomial", "systematic", "stratified", "residual", "ssp")


@jax.jit
def children(log_weights):
    """Of many draws by every resampler: how many children each particle has, int [DRAWS, N]."""
    uniform = jax.random.uniform(jax.random.key(0), (DRAWS, N), jnp.float32)

    def count(resampler):
        ancestors = jax.vmap(resampler, (0, None))(uniform, log_weights)
        return ancestors, jax.nn.one_hot(ancestors, N, dtype=jnp.int32).sum(axis=1)

    return {name: count(resampler) for name, resampler in resampling.RESAMPLERS.items()}


@pytest.fixture(scope="module", params=LOG_WEIGHTS)
def drawn(request):
    log_weights = LOG_WEIGHTS[request.param].astype(np.float32)
    weights = np.exp(np.float64(log_weights) - log_weights.max())
    return N * weights / weights.sum(), jax.device_get(children(log_weights))


@pytest.mark.parametrize("name", resampling.RESAMPLERS)
def test_ancestors_are_places_in_order(drawn, name):
    expected, found = drawn
    ancestors, number = found[name]
    assert ancestors.dtype == np.int32
    assert (np.diff(ancestors, axis=1) >= 0).all()
    assert (number.sum(axis=1) == N).all()
    assert (number[:, expected == 0] == 0).all()


@pytest.mark.parametrize("name", UNBIASED)
def test_on_average_children_are_as_many_as_weights_say(drawn, name):
    expected, found = drawn
    number = found[name][1]
    deviation = np.sqrt(expected / DRAWS)  # at most, that of independent draws
    assert (np.abs(number.mean(axis=0) - expected) <= 5 * deviation + 1e-5 * expected).all()


@pytest.mark.parametrize("name", ["systematic", "ssp"])
def test_children_are_rounded_down_or_up(drawn, name):
    expected, found = drawn
    number = found[name][1]
    assert (number >= np.floor(expected - 1e-5)).all()
    assert (number <= np.ceil(expected + 1e-5)).all()


def test_residual_children_are_at_least_as_many_as_are_sure(drawn):
    expected, found = drawn
    assert (found["residual"][1] >= np.floor(expected - 1e-5)).all()


@pytest.mark.parametrize("name", UNBIASED[1:])
def test_variances_are_below_those_of_independent_draws(drawn, name):
    _, found = drawn
    variance = {which: found[which][1].var(axis=0).sum() for which in UNBIASED}
    assert variance[name] <= 0.75 * variance["multinomial"]


def test_ssp_children_are_not_positively_correlated(drawn):
    _, found = drawn
    covariance = np.cov(found["ssp"][1].T)
    assert covariance[~np.eye(N, dtype=bool)].max() < 5 * 0.5 / np.sqrt(DRAWS)


def test_the_best_and_the_first_of_equals():
    log_weights = jnp.asarray([0.0, 3.0, -1.0, 3.0, 2.0, -jnp.inf], jnp.float32)
    uniform = jnp.zeros(6, jnp.float32)
    np.testing.assert_array_equal(resampling.best(uniform, log_weights), [1] * 6)
    for kept, want in ((2, [1, 1, 1, 3, 3, 3]), (4, [0, 1, 1, 3, 3, 4]), (6, range(6))):
        np.testing.assert_array_equal(resampling.top(uniform, log_weights, kept), want)


@pytest.mark.parametrize("name", resampling.RESAMPLERS)
def test_one_particle_has_one_child(name):
    for weight in (0.0, 0.9):
        found = resampling.RESAMPLERS[name](*jnp.full((2, 1), weight, jnp.float32))
        np.testing.assert_array_equal(found, [0])


def test_effective_numbers():
    log_weights = jnp.asarray([[0, 0, 0, 0], [9, 9, -99, -99], [0, -99, -99, -99]], jnp.float32)
    np.testing.assert_allclose(resampling.effective_number(log_weights), [4, 2, 1], rtol=1e-6)


@pytest.mark.parametrize("name", ["multinomial", "systematic", "stratified", "ssp"])
def test_the_published_code_draws_the_same_from_the_same_numbers(name):
    """Residual resampling is not compared: what it draws there is among the first places only."""
    recorded = golden("search/resampling.npz")
    find = jax.vmap(resampling.RESAMPLERS[name])
    found = find(recorded[f"{name}_uniform"], jnp.log(recorded["weights"]))
    np.testing.assert_array_equal(found, recorded[f"{name}_ancestors"])
