"""Refinement guided by scores; and, of all methods that search, what holds of every one of them."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ipr_jax
from ipr_jax import (
    Backtracking,
    Cycles,
    Guided,
    Langevin,
    Paths,
    Prediction,
    Refinement,
    Rollover,
    Sampling,
)
from ipr_jax.core import patches
from ipr_jax.methods import engine
from ipr_jax.methods.engine import Problem
from ipr_jax.methods.scores import verifier

GRID, SHAPE, PATCH = (2, 2), (4, 4, 1), 2
SAMPLING = Sampling(steps_per_patch=3, overlap=0.5, stochasticity=0.9)
STRAIGHT = Sampling(steps_per_patch=3, overlap=0.5, stochasticity=0.0)
REFINEMENT = Refinement(
    iterations=3,
    ratio=0.5,
    first=SAMPLING,
    later=Sampling(steps_per_patch=2, overlap=0.5, stochasticity=0.9),
)


def fake(z, t):
    """Every pixel is 1 or -1, rather what it is already; elementwise."""
    level = patches.expand(t, PATCH)
    image = jnp.clip(2 * z, -1, 1)
    velocity = jnp.where(level > 0, (z - image) / jnp.where(level > 0, level, 1), 0)
    means = patches.patch_mean(jnp.abs(z[..., 0]), PATCH)
    return Prediction(velocity, 0.4 + 0.1 * image, 0.1 + means)


def problems(number, seed=0):
    rng = np.random.default_rng(seed)
    image = rng.uniform(-1, 1, (number, *SHAPE)).astype(np.float32)
    editable = rng.random((number, *GRID)) < 0.7
    editable[1] = False
    return ipr_jax.sample_keys(jax.random.key(seed), number), image, editable


def brightness(image, level, prediction):
    """Of the patches by how certain they are."""
    means = patches.patch_mean(image[..., 0], PATCH)
    return ((1 - level) * means).sum(axis=(1, 2))


def darkness(image, level, prediction):
    return jax.nn.relu(-patches.patch_mean(image[..., 0], PATCH))


BRIGHT = verifier(brightness, "independent", differentiable=True)
FLAT = verifier(lambda image, level, prediction: jnp.zeros(len(image)), "internal")
DARK = verifier(darkness, "internal")

METHODS = {
    "backtracking": Backtracking(
        verifier=BRIGHT, threshold=(0.0, 0.2), sampling=SAMPLING, checks=2, jump=2, backtracks=3
    ),
    "paths": Paths(verifier=BRIGHT, sampling=STRAIGHT, rounds=2, back=0.5),
    "cycles": Cycles(verifier=BRIGHT, sampling=STRAIGHT, rounds=3, patience=2),
    "rollover": Rollover(
        verifier=BRIGHT, evaluations=42, sampling=SAMPLING, chains=2, seeds=2, block=2
    ),
    "langevin": Langevin(
        verifier=BRIGHT, sampling=SAMPLING, chains=2, recurrences=2, through=fake, judge=FLAT
    ),
    "guided": Guided(
        refinement=REFINEMENT, verifier=BRIGHT, doubt=DARK, chains=2, strength=5.0, temperature=0.1
    ),
}
FIELDS = ("image", "iterations", "nfe", "nbe", "nve", "finite")


@pytest.mark.parametrize("name", METHODS)
def test_neither_slots_nor_neighbours_nor_interruptions_change_a_bit(name):
    """And clues are kept, and no more is spent than is told."""
    method, given = METHODS[name], problems(6)
    made, queue = method.on(GRID), Problem(*map(jnp.asarray, given))
    whole = ipr_jax.solve(fake, *given, method=method)
    some = given[2].any(axis=(1, 2))
    assert (np.asarray(whole.nfe)[some] > 0).all()
    np.testing.assert_array_equal(np.asarray(whole.nfe)[~some], 0)
    assert int(whole.nfe.max()) <= method.budget(GRID)
    assert int(whole.iterations.max()) <= method.passes
    clue = ~np.kron(given[2], np.ones((1, PATCH, PATCH), bool))
    np.testing.assert_array_equal(np.asarray(whole.image)[clue], given[1][clue])
    assert not np.isclose(np.asarray(whole.image)[~clue], given[1][~clue]).any()

    # A queue in two slots, in another order, interrupted after every 7 evaluations.
    order = np.array([4, 1, 0, 5, 3, 2])
    queue = jax.tree.map(lambda part: part[order], queue)
    start = jax.jit(partial(engine.start, slots=2))
    advance = jax.jit(partial(engine.advance, fake))
    work, before = start(made, queue), -1
    while int(work.spent[0]) > before:
        before = int(work.spent[0])
        leaves, form = jax.tree.flatten(work)
        work = jax.tree.unflatten(form, [np.array(leaf) for leaf in leaves])
        work = advance(made, queue, work, ticks=7)
    image, iteration, finite, costs = engine.answers(work)
    found = (image, iteration, *costs, finite)
    for field, part in zip(FIELDS, found, strict=True):
        np.testing.assert_array_equal(part, getattr(whole, field)[order], err_msg=field)
    for leaf in jax.tree.leaves(work.state.memory):
        assert leaf.shape[0] == 2, "what is remembered is of problems"


@pytest.mark.parametrize("name", METHODS)
def test_forms_are_kept_under_transformations(name):
    """The method is an argument of the program: its numbers do not compile anything."""
    made, queue = METHODS[name].on(GRID), Problem(*map(jnp.asarray, problems(2)))
    state = jax.eval_shape(made.init, queue)
    prediction = jax.eval_shape(fake, state.z, state.t)
    after = jax.eval_shape(made.update, queue, state, prediction)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, after)
