"""Search by particles: the plain pass, who goes on, exact laws, costs, and what is refused."""

import itertools
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ipr_jax
from ipr_jax import Prediction, Sampling
from ipr_jax.core import patches
from ipr_jax.methods import engine, particles, scores
from ipr_jax.methods.engine import Problem
from ipr_jax.methods.particles import PUBLISHED, Particles, best_of
from ipr_jax.sampling import flow
from ipr_jax.studies.evaluate import evaluate
from ipr_jax.tasks import get_task

GRID, SHAPE, PATCH, N = (3, 3), (6, 6, 1), 2, 4
SAMPLING = Sampling(steps_per_patch=3, overlap=0.5)
BUSY = [0, 1, 3, 4]
"""Of the problems, those that have something to do."""
SELECTING = tuple(name for name in PUBLISHED if name != "best-of-n")


def fake(z, t):
    """An elementwise denoiser whose certainty differs from patch to patch."""
    patch = z.shape[1] // t.shape[1]
    velocity = 0.9 * z * patches.expand(t, patch) + 0.1
    means = patches.patch_mean(jnp.abs(z[..., 0]), patch)
    return Prediction(velocity, 0.4 + 0.2 * jnp.tanh(z), 0.1 + means)


def near(target, weight, broken, image, level, prediction):
    """How near the pixels are to a target, those of a patch at level t by 1 - t; no number where
    they are bright and the worst one where they are dark, if broken.
    """
    del prediction
    share = 1 - patches.expand(level, image.shape[1] // level.shape[1])
    found = -weight * (share * (image - target) ** 2).sum(axis=(1, 2, 3))
    mean = broken * image.mean(axis=(1, 2, 3))
    return jnp.select([mean > 0.1, mean < -0.1], [jnp.nan, -jnp.inf], found)


def verifier(*given):
    """One program for all targets, weights and what is broken."""
    given = [jnp.float32(value) for value in (*given, *(0.5, 1.0, 0.0)[len(given) :])]
    score = jax.tree_util.Partial(near, *given)
    return scores.verifier(score, "independent", differentiable=True)


def method(name, number=N, given=(), **changes):
    options = {"sampling": SAMPLING} | changes
    return Particles.of(name, verifier(*given), number, **options)


def problems(number=5, seed=0):
    rng = np.random.default_rng(seed)
    image = rng.uniform(-1, 1, (number, *SHAPE)).astype(np.float32)
    editable = rng.random((number, *GRID)) < 0.7
    editable[2] = False
    return ipr_jax.sample_keys(jax.random.key(seed), number), image, editable


def pixels(mask):
    return np.kron(mask, np.ones((1, PATCH, PATCH), bool))[..., None]


@partial(jax.jit, static_argnames="denoise")
def state_on(denoise, population, problem, ticks):
    work = engine.start(population, problem)
    return engine.advance(denoise, population, problem, work, ticks=ticks).state


def state_of(chosen, ticks=1000, given=None, denoise=fake, grid=GRID):
    problem = Problem(*map(jnp.asarray, given or problems()))
    return jax.device_get(state_on(denoise, chosen.on(grid), problem, ticks))


def each(rows, number=N):
    """Rows by problem."""
    return rows.reshape(-1, number, *rows.shape[1:])


# --- the plain pass -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain():
    return ipr_jax.generate(fake, *problems(), SAMPLING)


def test_one_particle_is_the_plain_pass_bit_for_bit(plain):
    for name in PUBLISHED:
        found = state_of(method(name, 1, gradient=False))
        np.testing.assert_array_equal(found.image, plain.image)
        np.testing.assert_array_equal(found.costs.nfe, plain.nfe)
    unscored = ipr_jax.solve(fake, *problems(), method=Particles(particles=1, sampling=SAMPLING))
    np.testing.assert_array_equal(unscored.image, plain.image)
    assert not np.asarray(unscored.nve).any()


def test_so_is_the_first_of_several_and_the_others_differ_from_it(plain):
    samples = each(state_of(method("best-of-n")).z)
    np.testing.assert_array_equal(samples[:, 0], plain.image)
    free = pixels(problems()[2])
    for one, other in itertools.combinations(range(N), 2):
        differs = (samples[:, one] != samples[:, other]) == free
        assert differs.all()


def test_particles_may_begin_from_the_same_noise():
    begun = each(state_of(method("svdd"), 0).z)
    np.testing.assert_array_equal(begun, np.repeat(begun[:, :1], N, axis=1))
    np.testing.assert_array_equal(begun[:, 0], each(state_of(method("bfs"), 0).z)[:, 0])


# --- who goes on ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SELECTING)
def test_equal_scores_select_nobody(name):
    found, never = (state_of(method(name, given=(0.5, 0.0), ess=ess)) for ess in (1.0, 1e-9))
    np.testing.assert_array_equal(found.z, never.z)
    np.testing.assert_array_equal(found.image, each(found.z)[:, 0])
    alone = state_of(method("best-of-n", init=method(name).init))
    np.testing.assert_allclose(found.z, alone.z, atol=1e-5)
    chosen = state_of(method(name, ess=1.0))
    assert (np.abs(chosen.z - alone.z) > 1e-3).any()


@pytest.mark.parametrize("resampling", ["best", "ssp", "multinomial"])
def test_at_an_infinite_temperature_all_come_from_the_best(resampling):
    """Shown by the scores that they bring along, from the only scoring, before step 4."""
    once = {"window": (0.5, 0.5), "scoring": "current", "temperature": "infinite"}
    common = Sampling(steps_per_patch=8, overlap=1.0)
    chosen = method("bfs", resampling=resampling, sampling=common, **once)
    before, after = state_of(chosen, 4), state_of(chosen, 5)
    z, level = jnp.asarray(before.z), jnp.asarray(before.t)
    image = flow.clean_image(z, patches.expand(level, PATCH), fake(z, level).velocity)
    value = np.asarray(near(0.5, 1.0, 0.0, image, level, None)).reshape(-1, N)
    assert (before.memory.history == 0).all()
    for problem in BUSY:
        assert len(set(value[problem].tolist())) == N
        best = np.full(N, value[problem].max())
        np.testing.assert_allclose(after.memory.history[problem], best, rtol=1e-5)


def test_copies_part_at_once():
    found = each(state_of(method("svdd"), 1).z)
    for one, other in itertools.combinations(range(N), 2):
        assert (found[0, one] != found[0, other]).any()


def test_every_choice_of_temperature_scoring_and_resampling_runs():
    """One program; the answer is the best of the samples, and clues are as given."""
    _, image, editable = problems()
    clue = ~pixels(editable)

    @jax.jit
    def value_of(state):
        return near(0.5, 1.0, 0.0, state.z, jnp.zeros_like(state.t), None)

    totals = {}
    for temperature, scoring, resampling in itertools.product(
        particles.TEMPERATURES, particles.SCORINGS, particles.RESAMPLINGS
    ):
        chosen = method(
            "bfs", temperature=temperature, scoring=scoring, resampling=resampling, every=0.1
        )
        state = state_of(chosen)
        value = np.asarray(value_of(state)).reshape(-1, N)
        np.testing.assert_allclose(state.memory.scores[BUSY], value[BUSY], rtol=1e-5)
        best = each(state.z)[np.arange(5), state.memory.scores.argmax(axis=1)]
        np.testing.assert_array_equal(state.image[BUSY], best[BUSY])
        np.testing.assert_array_equal(state.image[clue], image[clue])
        assert np.isfinite(state.image).all()
        totals[temperature, scoring, resampling] = value.mean()
    alone = value_of(state_of(method("best-of-n")))
    assert np.mean(list(totals.values())) > np.asarray(alone).mean()


@pytest.mark.parametrize("name", ["das", "smc"])
def test_what_is_no_number_is_given_up(name):
    """A score that is nan or infinite for some particles, even for all, breaks nothing."""
    given = {"given": (0.5, 1.0, 1.0)}
    found, never = (state_of(method(name, ess=ess, **given)) for ess in (1.0, 1e-9))
    assert found.finite.all()
    assert not np.isnan(found.memory.log_weights).any()
    kept, all_ = ((each.memory.scores[BUSY] > -1e19).mean() for each in (found, never))
    assert 0.1 < all_ < kept - 0.1


# --- the gradient ---------------------------------------------------------------------------------


@pytest.mark.parametrize("scoring", ["current", "max"])
def test_a_score_that_no_particle_has_weighs_nothing(scoring):
    """At the first step there is no patch to judge."""

    def judge(first, image, level, prediction):
        return jnp.where((level == 1).all(axis=(1, 2)), first, image.mean(axis=(1, 2, 3)))

    keys, image, editable = problems(4)
    given, found = (keys, image, np.ones_like(editable)), []
    for first in (-1.0, jnp.nan):
        score = scores.verifier(jax.tree_util.Partial(judge, jnp.float32(first)), "independent")
        options = {"scoring": scoring, "strength": 5.0, "ess": 1e-9, "answer": "sample"}
        chosen = Particles.of("smc", score, 8, sampling=SAMPLING, **options)
        found.append(state_of(chosen, given=given))
    assert np.ptp(found[0].memory.log_weights, axis=1).min() > 0.1
    np.testing.assert_allclose(*(state.memory.log_weights for state in found), atol=1e-5)
    np.testing.assert_array_equal(*(state.image for state in found))


def test_a_gradient_moves_by_the_variance_of_the_step_and_the_weight_takes_it_back():
    """The second of three common steps, from level 2/3 to 1/3."""
    parallel = Sampling(steps_per_patch=3, overlap=1.0)
    plain = method("best-of-n", sampling=parallel)
    guided = method("das", sampling=parallel, ess=1e-9, temperature="constant", strength=0.7)
    before, after, pushed = state_of(plain, 1), state_of(plain, 2), state_of(guided, 2)
    free = np.repeat(pixels(problems()[2]), N, axis=0)
    t, s = np.where(free, 2 / 3, 0), np.where(free, 1 / 3, 0)
    z = before.z.astype(np.float64)
    np.testing.assert_allclose(before.t.max(), 2 / 3, rtol=1e-6)
    prediction = fake(jnp.asarray(before.z), jnp.asarray(before.t))
    velocity, fraction = (np.asarray(part, np.float64) for part in prediction[:2])
    guess = z - t * velocity
    step = 1e-4  # central differences of a quadratic are exact
    slope = ((1 - t) * ((guess - step - 0.5) ** 2 - (guess + step - 0.5) ** 2)) / (2 * step)
    kept = (1 - t) * s / np.where(free, (1 - s) * t, 1)
    std = np.where(
        free, 0.5 * np.sqrt(1 - kept**2) * (2 / 3) ** fraction * (1 / 3) ** (1 - fraction), 0
    )
    push = 0.7 * std**2 * (1 - t) * slope
    np.testing.assert_allclose(pushed.z - after.z, push, atol=1e-6)
    assert np.abs(push).max() > 0.01
    np.testing.assert_array_equal(pushed.z[~free], after.z[~free])

    mean = np.asarray(
        flow.step_mean(
            jnp.asarray(before.z),
            jnp.asarray(t, jnp.float32),
            jnp.asarray(s, jnp.float32),
            prediction.velocity,
            0.5,
        )
    )
    safe = np.where(free, std, 1)

    def density(x):
        return np.where(free, -(((x - mean) / safe) ** 2) / 2, 0).sum(axis=(1, 2, 3))

    ratio = density(pushed.z) - np.where(
        free, -(((pushed.z - mean - push) / safe) ** 2) / 2, 0
    ).sum(axis=(1, 2, 3))
    one_scoring = state_of(guided, 1).memory
    gain = pushed.memory.product - one_scoring.product
    found = pushed.memory.log_weights - one_scoring.log_weights - gain
    found, ratio = found - found[:, :1], ratio.reshape(-1, N)
    np.testing.assert_allclose(found[BUSY], (ratio - ratio[:, :1])[BUSY], atol=2e-4)


# --- exact laws -----------------------------------------------------------------------------------

STEPS, PROBLEMS, MANY, TARGET = 12, 1000, 32, 0.8
MEAN = 0.1


def gaussian(z, t):
    """The exact denoiser of independent pixels N(MEAN, 1) whose levels all fall by 1 / STEPS, with
    the exact variance of its ancestral steps.
    """
    t = t[..., None]
    s = jnp.maximum(t - 1 / STEPS, 1e-6)
    keep = 1 - t
    total = keep**2 + t**2
    solved = (z - keep * MEAN) / total
    image, noise, unknown = MEAN + keep * solved, t * solved, t**2 / total
    kept = keep * s / ((1 - s) * t + 1e-12)
    gamma = s * kept
    variance = s**2 * (1 - kept**2)
    whole = variance + ((1 - s) - gamma * keep / (t + 1e-12)) ** 2 * unknown
    fraction = jnp.log(whole / variance) / 2 / jnp.log((t + 1e-12) / s)
    return Prediction(noise - image, jnp.where(t > s, fraction, 0), t[..., 0] + 1)


def law(name, number=PROBLEMS, **changes):
    """The state after so many problems, of which all four pixels are alike."""
    chosen = Particles.of(
        name,
        verifier(TARGET, 0.5),
        MANY,
        answer="sample",
        sampling=Sampling(steps_per_patch=STEPS, overlap=1.0, stochasticity=1.0),
        **changes,
    )
    keys = ipr_jax.sample_keys(jax.random.key(0), number)
    given = keys, np.ones((number, 2, 2, 1), np.float32), np.ones((number, 2, 2), bool)
    return state_of(chosen, given=given, denoise=gaussian, grid=(2, 2))


def tilted(strength):
    """Of the pixels, whose last step loses what is unknown at level 1 / STEPS."""
    variance = 1 - 1 / (1 + (STEPS - 1) ** 2)
    precision = 1 / variance + strength
    return (MEAN / variance + strength * TARGET) / precision, 1 / precision


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("smc", {}),
        ("smc", {"strength": 2.0, "resampling": "stratified"}),
        pytest.param("das", {"gradient": False}, marks=pytest.mark.heavy),
        ("das", {}),
        ("das", {"temperature": "constant", "ess": 1.0, "resampling": "residual"}),
        ("fk-steering", {"strength": 1.0}),
        ("fk-steering", {"strength": 1.0, "scoring": "sum"}),
        ("bfs", {"every": 0.2, "scoring": "current", "resampling": "systematic"}),
    ],
)
def test_tilted_gaussians(name, changes):
    """With the final weights corrected, every choice samples p exp(strength score)."""
    image = law(name, **changes).image
    mean, variance = image.mean(), image.var()
    want_mean, want_variance = tilted(changes.get("strength", 1.0))
    pixels = 4 * PROBLEMS
    assert abs(mean - want_mean) < 4 * np.sqrt(want_variance / pixels) + 0.02
    assert abs(variance - want_variance) < want_variance * (4 * np.sqrt(2 / pixels) + 0.04)
    assert abs(want_mean - MEAN) > 0.3  # far from what is not tilted


def test_a_guide_that_leads_elsewhere_does_not_change_the_law():
    """Its gradient is a proposal, of which the weights take back what it brings."""
    state = law("das", guide=verifier(-TARGET, 0.2))
    want_mean, want_variance = tilted(1.0)
    assert abs(state.image.mean() - want_mean) < 4 * np.sqrt(want_variance / (4 * PROBLEMS)) + 0.02
    assert (state.costs.nve == MANY * (2 * STEPS + 1)).all()
    assert (state.costs.nbe == MANY * STEPS).all()


def test_at_strength_0_it_is_the_law_of_the_network():
    image = law("smc", strength=0.0).image
    mean, variance = image.mean(), image.var()
    want_mean, want_variance = tilted(0.0)
    assert abs(mean - want_mean) < 4 * np.sqrt(want_variance / (4 * PROBLEMS))
    assert abs(variance - want_variance) < 4 * want_variance * np.sqrt(2 / (4 * PROBLEMS))


# --- the engine -----------------------------------------------------------------------------------


def test_neither_slots_nor_neighbours_change_a_bit():
    chosen, (keys, image, editable) = method("das"), problems()
    whole = state_of(chosen)
    queued = ipr_jax.solve(fake, keys, image, editable, method=chosen, slots=2)
    np.testing.assert_array_equal(queued.image, whole.image)
    for name in whole.costs._fields:
        np.testing.assert_array_equal(getattr(queued, name), getattr(whole.costs, name))
    alone = state_of(chosen, given=(keys[4:], image[4:], editable[4:]))
    np.testing.assert_array_equal(alone.image, whole.image[4:])
    np.testing.assert_array_equal(alone.memory.scores, whole.memory.scores[4:])


@pytest.mark.parametrize("name", PUBLISHED)
def test_costs(name, plain):
    found, steps = state_of(method(name)), np.asarray(plain.nfe)
    some = steps > 0
    scorings = {"best-of-n": 0 * steps, "fk-steering": 4 * some, "bfs": 3 * some}.get(name, steps)
    np.testing.assert_array_equal(found.costs.nfe, N * steps)
    np.testing.assert_array_equal(found.costs.nve, N * (scorings + some))
    np.testing.assert_array_equal(found.costs.nbe, N * scorings if name == "das" else 0 * steps)
    np.testing.assert_array_equal(found.iteration, some)


def test_samples_are_scored_in_parts_as_together():
    """``evaluate`` has particles in the rows of its state."""
    task = get_task("mini-sudoku")
    batch, key, chosen = task.test_batch(0, np.arange(7)), jax.random.key(0), method("bfs")
    (line,) = evaluate(task, fake, batch, chosen, key, batch_size=3)
    given = ipr_jax.sample_keys(key, 7), batch.image, batch.editable
    found = state_of(chosen, given=given, grid=task.grid)
    jax.tree.map(np.testing.assert_array_equal, line.state, found)
    np.testing.assert_array_equal(line.image, found.image)
    np.testing.assert_array_equal(line.costs.nfe, found.costs.nfe)
    assert line.state.z.shape == (7 * N, 32, 32, 1)


def test_it_is_exported_with_the_batch_size_left_open():
    keys, image, editable = problems()
    chosen = method("bfs")

    def run(data, image, editable):
        keys = jax.random.wrap_key_data(data, impl="threefry2x32")
        solved = ipr_jax.solve(fake, keys, image, editable, method=chosen)
        return solved.image, solved.nfe

    (b,) = jax.export.symbolic_shape("b")
    data = jax.random.key_data(keys)
    shapes = (
        jax.ShapeDtypeStruct((b, *part.shape[1:]), part.dtype) for part in (data, image, editable)
    )
    program = jax.export.export(jax.jit(run), platforms=("cpu", "cuda", "tpu"))(*shapes)
    again = jax.export.deserialize(program.serialize())
    found, nfe = again.call(data[:4], image[:4], editable[:4])
    want = state_of(chosen)
    np.testing.assert_allclose(found, want.image[:4], atol=1e-6)
    np.testing.assert_array_equal(nfe, want.costs.nfe[:4])


# --- the best of n --------------------------------------------------------------------------------


def test_the_best_of_n_is_the_mean_over_all_choices(rng):
    value = rng.integers(0, 4, (3, 6)).astype(np.float32)  # with ties: the first of them
    grades = rng.random((3, 6))
    found = best_of(value, grades)
    for row, n in itertools.product(range(3), range(1, 7)):
        picks = [
            grades[row, max(some, key=lambda i: value[row, i])]
            for some in itertools.combinations(range(6), n)
        ]
        np.testing.assert_allclose(found[row, n - 1], np.mean(picks))
    solved = grades > 0.6
    passed = best_of(solved, solved)
    assert (np.diff(passed, axis=1) >= 0).all()
    np.testing.assert_allclose(passed[:, 0], solved.mean(axis=1))
    np.testing.assert_allclose(passed[:, -1], solved.any(axis=1))


# --- what is refused ------------------------------------------------------------------------------

NO_NOISE = Sampling(stochasticity=0.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"particles": 0}, "particles must be a whole number of at least 1, got 0"),
        ({"score": None}, r"score must be from .*verifier for 4 particles, got None"),
        ({"score": None, "particles": 1, "gradient": True}, "for a gradient, got None"),
        ({"score": near}, "score must be of type Verifier, got near"),
        ({"resampling": "ess"}, "resampling must be one of multinomial, .* top, got 'ess'"),
        ({"scoring": "mean"}, "scoring must be one of current, difference, max, sum, got 'mean'"),
        ({"temperature": "zero"}, "temperature must be one of constant, increase, infinite"),
        ({"init": "same"}, "init must be one of own, shared, got 'same'"),
        ({"answer": "first"}, "answer must be one of best, sample, got 'first'"),
        ({"strength": -1.0}, "strength must be finite and at least 0, got -1.0"),
        ({"every": 1.5}, r"every must be in \[0, 1\], got 1.5"),
        ({"ess": 0.0}, r"ess must be in \(0, 1\], got 0.0"),
        ({"window": 0.5}, "window must be two, of the first and the last, got 0.5"),
        ({"window": (0.5, 0.2)}, "window must not fall, got 0.5 to 0.2"),
        ({"beam": (2.0, 0.5)}, r"beam must be in \[0, 1\], got 2.0"),
        ({"sampling": NO_NOISE}, "stochasticity of sampling must be above 0, else copies"),
        (
            {"sampling": NO_NOISE, "resampling": None, "init": "shared"},
            "stochasticity of sampling must be above 0, else copies of a particle",
        ),
        ({"gradient": True, "temperature": "infinite"}, "False at an infinite temperature"),
        (
            {"gradient": True, "score": scores.verifier(near, "oracle")},
            "gradient must be False where the score is not differentiable, got True",
        ),
        ({"guide": verifier()}, "guide must be None without a gradient"),
        (
            {"gradient": True, "guide": scores.verifier(near, "oracle")},
            "gradient must be False where the guide is not differentiable, got True",
        ),
    ],
)
def test_what_cannot_be_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Particles(**{"score": verifier()} | change)


def test_so_are_unknown_names_and_budgets_that_end_before_an_answer():
    with pytest.raises(ValueError, match=r"name must be one of best-of-n, svdd, .*, got 'mcts'"):
        Particles.of("mcts", verifier())
    Particles.of("best-of-n", verifier(), sampling=NO_NOISE)  # without copies, none are equal
    chosen = method("bfs")
    with pytest.raises(ValueError, match="budget must be a whole number of at least 60, got 59"):
        ipr_jax.solve(fake, *problems(), method=chosen, budget=59)
    assert (np.asarray(ipr_jax.solve(fake, *problems(), method=chosen, budget=60).nfe) <= 60).all()


def test_all_particles_of_a_problem_are_seen_at_once():
    """Of two problems here, as more rows than seven would be."""
    chosen, problem = method("bfs").on(GRID), Problem(*map(jnp.asarray, problems()))
    whole, found = (
        jax.jit(partial(engine.advance, fake, most=most))(
            chosen, problem, engine.start(chosen, problem)
        )
        for most in (None, 2 * N + 1)
    )
    chex.assert_trees_all_close(found.state, whole.state, atol=2e-6)
    steps = np.asarray(found.state.costs.nfe) // N
    busy = [(steps > tick).sum() for tick in range(steps.max())]
    assert int(found.spent[0]) == sum(2 * N * -(-each // 2) for each in busy)
    assert int(whole.spent[0]) == 5 * N * steps.max()
