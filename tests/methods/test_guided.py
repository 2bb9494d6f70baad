"""Refinement guided by scores; and, of all methods that search, what holds of every one of them."""

import dataclasses
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ipr_jax
from ipr_jax import Prediction, Refinement, Sampling
from ipr_jax.core import patches
from ipr_jax.methods import (
    Backtracking,
    Cycles,
    Guided,
    Langevin,
    LeastDoubted,
    Particles,
    Paths,
    Rollover,
    engine,
)
from ipr_jax.methods.engine import FOREVER, Problem
from ipr_jax.methods.scores import verifier

GRID, SHAPE, PATCH = (2, 2), (4, 4, 1), 2
SAMPLING = Sampling(steps_per_patch=3, overlap=0.5, stochasticity=0.9)
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


def bright_corner(iteration, before, after):
    return after[:, 0, 0, 0] > 0


BRIGHT = verifier(brightness, "independent", differentiable=True)
FLAT = verifier(lambda image, level, prediction: jnp.zeros(len(image)), "internal")
DARK = verifier(darkness, "internal")

METHODS = {
    "backtracking": Backtracking(
        verifier=BRIGHT, threshold=(0.3, 0.6), sampling=SAMPLING, checks=2, jump=2, backtracks=4
    ),
    "paths": Paths(verifier=BRIGHT, sampling=SAMPLING, rounds=2, back=0.5),
    "cycles": Cycles(verifier=BRIGHT, sampling=SAMPLING, rounds=3, patience=3),
    "rollover": Rollover(
        verifier=BRIGHT, evaluations=42, sampling=SAMPLING, chains=2, seeds=2, block=2
    ),
    "langevin": Langevin(
        verifier=BRIGHT,
        method=Particles.of("bfs", FLAT, 2, sampling=SAMPLING),
        strength=3.0,
        recurrences=2,
        through=fake,
    ),
    "guided": Guided(
        refinement=REFINEMENT, verifier=BRIGHT, doubt=DARK, chains=2, strength=5.0, temperature=0.1
    ),
    "least doubted": LeastDoubted(
        method=dataclasses.replace(REFINEMENT, stop=bright_corner), samples=3, parts=2
    ),
}


@jax.jit
def begin(made, queue):
    return engine.start(made, queue, slots=3)


@jax.jit
def advance(made, queue, work, ticks):
    return engine.advance(fake, made, queue, work, ticks=ticks)


@pytest.mark.parametrize("name", METHODS)
def test_what_holds_of_every_method(name):
    """Neither slots nor neighbours nor interruptions change a bit; and it finds what it looks for.

    Of the two modes of a pixel, plain passes take one as often as the other.
    """
    method, given = METHODS[name], Problem(*map(jnp.asarray, problems(12)))
    made, some = method.on(GRID), np.asarray(given.editable).any(axis=(1, 2))
    whole = engine.answers(advance(made, given, begin(made, given), FOREVER))
    nfe = np.asarray(whole.costs.nfe)
    assert (nfe[some] > 0).all()
    assert (nfe[~some] == 0).all()
    assert nfe.max() <= method.budget(GRID)
    np.testing.assert_array_equal(whole.iteration, np.where(some, whole.iteration[0], 0))
    assert int(whole.iteration[0]) <= method.passes
    found, was = np.asarray(whole.image), np.asarray(given.image)
    hidden = np.kron(given.editable, np.ones((1, PATCH, PATCH), bool))
    np.testing.assert_array_equal(found[~hidden], was[~hidden])
    if name != "least doubted":  # the others all look for what is bright
        bright, number = (found[hidden] > 0).sum(), hidden.sum()
        assert bright > number / 2 + 2 * np.sqrt(number) / 2, "two standard deviations of chance"

    # In another order, in other slots, interrupted after every 7 evaluations.
    order = np.random.default_rng(1).permutation(12)
    queue = jax.tree.map(lambda part: part[order], given)
    work, before = begin(made, queue), -1
    while int(work.spent[0]) > before:
        before = int(work.spent[0])
        leaves, form = jax.tree.flatten(work)
        work = jax.tree.unflatten(form, [np.array(leaf) for leaf in leaves])
        work = advance(made, queue, work, 7)
    want = jax.tree.map(lambda part: part[order], whole)
    chex.assert_trees_all_equal(engine.answers(work), want)
    for leaf in jax.tree.leaves(work.state.memory):
        assert leaf.shape[0] == 3, "what is remembered is of problems"


@pytest.mark.parametrize("name", METHODS)
def test_forms_are_kept_under_transformations(name):
    """The method is an argument of the program: its numbers do not compile anything."""
    made, queue = METHODS[name].on(GRID), Problem(*map(jnp.asarray, problems(2)))
    state = jax.eval_shape(made.init, queue)
    prediction = jax.eval_shape(fake, state.z, state.t)
    after = jax.eval_shape(made.update, queue, state, prediction)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, after)


# --- refinement guided by scores ------------------------------------------------------------------


def solve(**change):
    return ipr_jax.solve(fake, *problems(8), method=Guided(refinement=REFINEMENT, **change))


def test_with_nothing_to_tell_it_is_plain_refinement():
    plain = ipr_jax.solve(fake, *problems(8), method=REFINEMENT)
    even = verifier(lambda image, level, prediction: jnp.ones_like(level), "internal")
    for found, asked in ((solve(verifier=FLAT), 4), (solve(doubt=even), 4)):
        np.testing.assert_array_equal(found.image, plain.image)
        np.testing.assert_array_equal(found.nfe, plain.nfe)
        np.testing.assert_array_equal(found.nve, np.where(plain.nfe > 0, asked, 0))


@jax.jit
def initial(made, queue):
    return made.init(queue)


@jax.jit
def until(made, queue, state, iterations):
    work = engine.at_once(state)
    return engine.advance(fake, made, queue, work, iterations=iterations).state


@pytest.mark.parametrize(("temperature", "chains"), [(0.0, 1), (0.0, 2), (np.inf, 1)])
def test_what_is_kept(temperature, chains):
    """Iteration by iteration: the answer never gets worse, nor, at 0, what is gone on from."""
    queue = Problem(*map(jnp.asarray, problems(8)))
    method = Guided(
        refinement=REFINEMENT,
        verifier=BRIGHT,
        temperature=temperature,
        chains=chains,
        strength=1e4 * (chains > 1),
    )
    made = method.on(GRID)

    def score(image):
        flat = image.reshape(-1, *SHAPE)
        found = brightness(flat, jnp.zeros((len(flat), *GRID)), None)
        return np.asarray(found).reshape(image.shape[: image.ndim - 3])

    states = [initial(made, queue)]
    for iteration in range(1, method.passes + 1):
        states.append(until(made, queue, states[-1], iteration))
    some = np.asarray(queue.editable).any(axis=(1, 2))
    falls = False
    for before, after in itertools.pairwise(states[1:]):
        memory = after.memory
        falls |= (memory.score < before.memory.score)[some].any()
        np.testing.assert_allclose(memory.score[some], score(memory.image)[some], atol=1e-6)
        np.testing.assert_allclose(memory.best[some], score(after.image)[some], atol=1e-6)
        assert (memory.best >= before.memory.best).all()
        if chains > 1:  # such weights leave the best one alone
            np.testing.assert_array_equal(memory.image[:, 0], memory.image[:, 1])
    assert falls == (temperature > 0)


def test_an_iteration_begins_from_what_is_gone_on_from():
    """Half of a regenerated patch, and what the selection sees, are of the image that is kept."""

    def nothing(keys, number, shape):
        return jnp.zeros((len(keys), *shape), jnp.float32)

    def darkest(keys, number, grid, *, seen):
        return patches.patch_mean(seen.image[..., 0], PATCH)

    refinement = dataclasses.replace(REFINEMENT, level=0.5, noise=nothing, select=darkest)
    made = Guided(refinement=refinement, verifier=BRIGHT, chains=2, strength=1e4).on(GRID)
    keys, image, _ = problems(8)
    queue = Problem(keys, jnp.asarray(image), jnp.ones((8, *GRID), bool))
    before, rejected = initial(made, queue), False
    for iteration in (1, 2, 3):
        state = until(made, queue, before, iteration)
        image = np.asarray(state.memory.image).reshape(-1, *SHAPE)
        means = np.asarray(patches.patch_mean(image[..., 0], PATCH)).reshape(-1, 4)
        region = np.zeros((16, 4), bool)
        np.put_along_axis(region, np.argsort(means, kind="stable")[:, :2], True, axis=1)
        region = region.reshape(-1, *GRID)
        np.testing.assert_array_equal(np.asarray(state.t) > 0, region)
        begun = np.where(np.kron(region, np.ones((1, PATCH, PATCH))), 0.5, 1)[..., None] * image
        np.testing.assert_allclose(state.z, begun, atol=1e-6)
        rejected |= (state.memory.score == before.memory.score).any()
        before = state
    assert rejected


def test_what_is_doubted_is_redone():
    """Half of the patches are, and half of them are beyond doubt."""
    right = jnp.asarray([[[False, True], [False, True]]])
    doubt = verifier(lambda image, level, _: jnp.where(right, 1e6, 0 * level), "internal")
    keys, image, _ = problems(8)
    queue = Problem(keys, jnp.asarray(image), jnp.ones((8, *GRID), bool))
    made = Guided(refinement=REFINEMENT, doubt=doubt).on(GRID)
    state = until(made, queue, initial(made, queue), 1)
    region = np.asarray(state.memory.inner.plan.region)[:, 0]
    np.testing.assert_array_equal(region, np.broadcast_to(right, region.shape))
    np.testing.assert_array_equal(np.asarray(state.t) > 0, region)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, "verifier must be a Verifier where iterations or chains are chosen by its score"),
        ({"doubt": DARK, "chains": 2}, "verifier must be a Verifier where iterations or chains"),
        ({"verifier": brightness}, "verifier must be a Verifier, .* got brightness"),
        ({"verifier": BRIGHT, "temperature": -1.0}, "temperature must be at least 0, got -1.0"),
        ({"verifier": BRIGHT, "chains": 0}, "chains must be a whole number of at least 1, got 0"),
        ({"verifier": BRIGHT, "strength": 1.0}, "strength must be 0 with a single chain, got 1.0"),
        ({"verifier": BRIGHT, "resampling": "luck"}, "resampling must be one of .*, got 'luck'"),
        ({"verifier": BRIGHT, "least": 0.0}, "least must be finite and above 0, got 0.0"),
        (
            {"verifier": BRIGHT, "refinement": Refinement(stop=lambda *_: 0)},
            "stop of refinement must be never",
        ),
        (
            {"doubt": DARK, "refinement": Refinement(select=ipr_jax.fixed_regions)},
            "select of refinement must be fresh_regions .* got fixed_regions",
        ),
    ],
)
def test_impossible_choices_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Guided(**change)
