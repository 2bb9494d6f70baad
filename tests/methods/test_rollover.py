"""Rollover budget forcing: it spends what it is given, and accounts for it as the published one."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import golden
from toys import BRIGHT, FLAT, GRID, PATCH, SAMPLING, brightness, fake, problems

import ipr_jax
from ipr_jax import Prediction, Sampling
from ipr_jax.methods import Rollover, engine
from ipr_jax.methods.engine import Problem
from ipr_jax.methods.scores import verifier


@pytest.mark.parametrize("chains", [1, 3])
@pytest.mark.parametrize("block", [1, 3, 20])
def test_it_spends_all_it_is_given(chains, block):
    """Whatever the length of the pass, which here is 4 to 10 steps."""
    best = []
    for own in (13, 40):
        method = Rollover(
            verifier=BRIGHT,
            evaluations=own * chains,
            sampling=SAMPLING,
            chains=chains,
            seeds=4,
            block=block,
        )
        found = ipr_jax.solve(fake, *problems(6, 5), method=method)
        np.testing.assert_array_equal(found.nfe, own * chains)
        np.testing.assert_array_equal(found.iterations, 1)
        clue = ~np.kron(problems(6, 5)[2], np.ones((1, PATCH, PATCH), bool))
        np.testing.assert_array_equal(np.asarray(found.image)[clue], problems(6, 5)[1][clue])
        best.append(np.asarray(brightness(found.image, None, None)).mean())
    assert best[1] > best[0]


@pytest.mark.parametrize("block", [1, 3])
def test_where_nothing_is_better_and_nothing_is_left_it_is_a_plain_pass(block):
    keys, image, editable = problems(6, 5)
    editable = np.ones_like(editable)
    plain = ipr_jax.generate(fake, keys, image, editable, SAMPLING)
    method = Rollover(
        verifier=FLAT, evaluations=10, sampling=SAMPLING, chains=1, seeds=1, block=block
    )
    found = ipr_jax.solve(fake, keys, image, editable, method=method)
    np.testing.assert_array_equal(found.nfe, plain.nfe)
    # Two programs, of which XLA may contract products and sums in one and not in the other.
    np.testing.assert_allclose(found.image, plain.image, rtol=0, atol=3e-7)


def test_chains_are_judged_by_what_their_answers_come_from():
    """By a score that asks the prediction, where the last block is the last step."""

    def sure(image, level, prediction):
        return -prediction.sigma.mean(axis=(1, 2))

    keys, image, editable = problems(6, 5)
    problem = Problem(keys, jnp.asarray(image), jnp.asarray(np.ones_like(editable)))
    made = Rollover(
        verifier=verifier(sure, "internal"), evaluations=90, sampling=SAMPLING, chains=3, block=3
    ).on(GRID)
    steps = int(made.walk.plan(problem.editable).num_steps[0])
    assert steps % 3 == 1, "nothing follows what was chosen but a step"
    work = jax.jit(partial(engine.advance, fake))(made, problem, engine.start(made, problem))
    state = work.state
    sigma = np.asarray(state.memory.best.prediction.sigma).mean(axis=(2, 3))
    assert (np.ptp(sigma, axis=1) > 1e-4).all()
    answers = np.asarray(state.z).reshape(6, 3, *image.shape[1:])
    np.testing.assert_array_equal(state.image, answers[np.arange(6), sigma.argmin(axis=1)])


def test_it_accounts_as_the_published_one():
    """With the same scores: one patch, whose predicted image is the score."""
    want = golden("search/rollover.npz")
    chains, seeds = int(want["chains"]), want["seeds"]
    made = Rollover(
        verifier=verifier(lambda image, level, prediction: image[:, 0, 0, 0], "oracle"),
        evaluations=int(want["evaluations"]),
        sampling=Sampling(steps_per_patch=int(want["steps"]), overlap=1.0),
        chains=chains,
        seeds=len(seeds),
        block=1,
    ).on((1, 1))
    image, editable = np.zeros((1, 1, 1, 1), np.float32), np.ones((1, 1, 1), bool)
    keys = ipr_jax.sample_keys(jax.random.key(0), 1)
    problem = Problem(keys, jnp.asarray(image), jnp.asarray(editable))

    @jax.jit
    def evaluate(state, score):
        velocity = (state.z - score[:, None, None, None]) / state.t[..., None]
        found = Prediction(velocity, jnp.zeros_like(state.z), jnp.ones_like(state.t))
        new = made.update(problem, state, found)
        return new._replace(costs=new.costs._replace(nfe=new.costs.nfe + chains))

    state, proposed = jax.jit(made.init)(problem), []
    for score in seeds:
        state = evaluate(state, score)
    np.testing.assert_allclose(state.memory.ledger.best[0], seeds.max(axis=0), atol=1e-6)
    for number, score in enumerate(want["scores"]):
        proposed.append(np.asarray(state.z))
        state = evaluate(state, score)
        ledger = state.memory.ledger
        for name in ("place", "used", "quota"):
            np.testing.assert_array_equal(getattr(ledger, name)[0], want[name][number])
        np.testing.assert_allclose(ledger.best[0], want["best"][number], atol=1e-6)
        stays = want["used"][number] > 0
        here = np.where(stays, ledger.here[0], want["here"][number])
        np.testing.assert_allclose(here, want["here"][number], atol=1e-6)
        for chain in range(chains):
            if ledger.place[0, chain]:
                base = proposed[int(want["base"][number, chain]) - 1][chain]
                np.testing.assert_array_equal(state.memory.base.state.z[0, chain], base)
            if stays[chain]:
                best = proposed[int(want["here_latent"][number, chain]) - 1][chain]
                np.testing.assert_array_equal(state.memory.best.state.z[0, chain], best)
    assert {2, 3} <= set(want["place"].ravel())  # by rollover and by force


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"verifier": None}, "verifier must be a Verifier, .* got None"),
        ({"evaluations": 101}, "a multiple of chains, which share them, got 101 for 2"),
        ({"block": 0}, "block must be a whole number of at least 1, got 0"),
        ({"seeds": 0}, "seeds must be a whole number of at least 1, got 0"),
        (
            {"sampling": Sampling(stochasticity=0.0)},
            "stochasticity of sampling must be above 0, else all proposals would be equal; got 0.0",
        ),
        (
            {"sampling": Sampling(temperature=0.0)},
            "temperature of sampling must be above 0, else all proposals would be equal; got 0.0",
        ),
        ({"evaluations": 20}, "at least 26 on a grid of 2 x 2 patches: for each of 2 chains 4"),
    ],
)
def test_impossible_choices_are_refused(change, message):
    given = {"verifier": BRIGHT, "evaluations": 100, "sampling": SAMPLING} | change
    with pytest.raises(ValueError, match=message):
        Rollover(**given).on(GRID)
