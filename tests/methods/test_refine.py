"""The whole loop: recorded traces, invariants, independence, an oracle, exact laws, bad input."""

import dataclasses
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import golden, golden_config, golden_model, nhwc, regenerate
from hypothesis import given, settings
from hypothesis import strategies as st

import ipr_jax
from ipr_jax import Prediction, Sampling
from ipr_jax.core import check
from ipr_jax.core.keys import iteration_keys
from ipr_jax.methods import engine, selection
from ipr_jax.sampling import Settings, order, renoise, schedule
from ipr_jax.sampling import step as steps

GRID, PATCH = (3, 3), 2
SHAPE = (6, 6, 1)


def fake(z, t):
    """An elementwise denoiser whose certainty differs from patch to patch."""
    per_pixel = ipr_jax.core.patches.expand(t, z.shape[1] // t.shape[1])
    velocity = 0.9 * z * per_pixel + 0.1
    means = ipr_jax.core.patches.patch_mean(jnp.abs(z[..., 0]), z.shape[1] // t.shape[1])
    return Prediction(velocity, 0.4 + 0.2 * jnp.tanh(z), 0.1 + means)


def puzzle(seed: int, batch: int = 4):
    rng = np.random.default_rng(seed)
    image = rng.uniform(-1, 1, (batch, *SHAPE)).astype(np.float32)
    editable = rng.random((batch, *GRID)) < rng.random((batch, 1, 1))
    return image, editable


def pixels(mask, patch=PATCH):
    return np.kron(mask, np.ones((1, patch, patch), bool))[..., None]


# --- the published trace, step by step ------------------------------------------------------------


@partial(jax.tree_util.register_dataclass, data_fields=["settings", "noise"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Replay:
    """A pass over what is editable with recorded noise [steps, H, W, C], as a method."""

    settings: Settings
    noise: jax.Array

    def init(self, problem):
        plan = schedule.plan_pass(self.settings.plan, problem.editable)
        start, zeros = (
            steps.init(problem.image, plan).start,
            jnp.zeros(len(problem.keys), jnp.int32),
        )
        return engine.begin(problem, problem.image, schedule.levels(plan, start, 0), (start, zeros))

    def update(self, problem, state, prediction):
        plan = schedule.plan_pass(self.settings.plan, problem.editable)
        start, step = state.memory
        moved, levels = steps.move(
            prediction,
            plan,
            steps.PassState(state.z, start),
            step,
            self.noise[step],
            jnp.zeros(start.shape, jnp.float32),
            order=order.certain_first,
            stochasticity=self.settings.stochasticity,
            temperature=self.settings.temperature,
        )
        over = step + 1 >= plan.num_steps
        return state._replace(
            z=moved.z,
            t=levels.s,
            image=engine.by_sample(over, moved.z, state.image),
            iteration=state.iteration + over.astype(jnp.int32),
            done=over,
            memory=(moved.start, step + 1),
        )


@pytest.mark.parametrize(
    ("name", "trace", "first", "later"),
    [
        (
            "tiny_even",
            "ipr_deterministic",
            Sampling(steps_per_patch=4, overlap=0.5, stochasticity=0.0),
            Sampling(steps_per_patch=3, overlap=0.25, stochasticity=0.0),
        ),
        (
            "tiny_even",
            "ipr_stochastic",
            Sampling(steps_per_patch=4, overlap=0.75),
            Sampling(steps_per_patch=5, overlap=0.8),
        ),
        (
            "tiny_sudoku",
            "ipr_clues",
            Sampling(steps_per_patch=3, overlap=0.0),
            Sampling(steps_per_patch=10, overlap=0.8),
        ),
    ],
)
def test_replay_of_the_published_sampler(name, trace, first, later):
    """Fed its noise and regions, every pass has its levels, so its patch order, and images."""
    want, config, model = (
        golden(f"{name}/{trace}.npz"),
        golden_config(name),
        golden_model(name, "ema"),
    )
    (h, w), patch = config.grid, config.patch_size
    noise = iter(nhwc(want["step_noise"]))
    start, advance = jax.jit(engine.start), jax.jit(partial(engine.advance, model))
    longest = max(each.settings(h * w).plan.num_steps.max() for each in (first, later))

    def run(image, region, sampling, index):
        problem = engine.Problem(
            ipr_jax.sample_keys(jax.random.key(0), 1), jnp.asarray(image), jnp.asarray(region)
        )
        settings = sampling.settings(h * w)
        number = int(schedule.plan_pass(settings.plan, problem.editable).num_steps[0])
        drawn = np.zeros((longest, *image.shape[1:]), np.float32)
        drawn[:number] = [next(noise) for _ in range(number)]
        work = start(method := Replay(settings, jnp.asarray(drawn)), problem)
        levels = [work.state.t.ravel()]
        for _ in range(number):
            work = advance(method, problem, work, ticks=1)
            levels.append(work.state.t.ravel())
        assert work.state.done
        np.testing.assert_allclose(np.stack(levels), want[f"schedule_{index}"], atol=1e-7)
        np.testing.assert_allclose(work.state.image[0], nhwc(want["snapshots"][index]), atol=5e-5)
        return work.state.image

    image, editable = nhwc(want["z_init"]), np.ones((1, h, w), bool)
    if "mask" in want:
        editable = want["mask"][:, 0, ::patch, ::patch] > 0.5
        image = nhwc(want["masked"] + want["mask"] * want["z_init"])
    image = run(image, editable, first, 0)
    patch_noise = iter(nhwc(want["patch_noise"]))
    for index, chosen in enumerate(want["regions"], start=1):
        region = np.zeros(h * w, bool)
        region[chosen] = True
        region = region.reshape(1, h, w)
        fresh = np.zeros_like(image)
        for number in chosen:
            row, column = divmod(int(number), w)
            fresh[0, row * patch : (row + 1) * patch, column * patch : (column + 1) * patch] = next(
                patch_noise
            )
        renoised = renoise(jnp.asarray(image), jnp.asarray(region), jnp.asarray(fresh))
        image = run(renoised, region, later, index)
    np.testing.assert_allclose(image, nhwc(want["final"]), atol=5e-5)
    assert next(noise, None) is None
    assert next(patch_noise, None) is None


# --- an independent slow oracle -------------------------------------------------------------------


def oracle_pass(z, region, plan, noise, priority_of, stochasticity, temperature):
    """One sample, float64, patch by patch, step by step; noise is [steps, H, W, C]."""
    z, n = z.astype(np.float64), int(region.sum())
    num_steps, length = int(plan.num_steps[n]), int(plan.block_length[n])
    start = {}
    for m in range(num_steps):

        def level(cell, step):
            if not region[cell] or step >= num_steps:
                return 0.0
            return 1.0 if cell not in start else max(0.0, 1 - max(0, step - start[cell]) / length)

        cells = list(np.ndindex(region.shape))
        t = {cell: level(cell, m) for cell in cells}
        t_map = np.array([[t[i, j] for j in range(GRID[1])] for i in range(GRID[0])])
        prediction = fake(jnp.asarray(z[None], jnp.float32), jnp.asarray(t_map[None], jnp.float32))
        priority = priority_of(np.asarray(prediction.sigma[0]))
        for _ in range(int((plan.block_starts[n] == m).sum())):
            waiting = [cell for cell in cells if region[cell] and cell not in start]
            start[min(waiting, key=lambda cell: priority[cell])] = m
        velocity = np.asarray(prediction.velocity[0], np.float64)
        fraction = np.asarray(prediction.variance_fraction[0], np.float64)
        for i, j in cells:
            a, b = t[i, j], level((i, j), m + 1)
            if b >= a:
                continue
            area = np.s_[i * PATCH : (i + 1) * PATCH, j * PATCH : (j + 1) * PATCH]
            ratio = (1 - a) * b / ((1 - b) * a)
            gamma = b * np.sqrt(1 - stochasticity**2 * (1 - ratio**2))
            u, v = velocity[area], fraction[area]
            mean = (1 - b) * (z[area] - a * u) + gamma * (z[area] + (1 - a) * u)
            std = 0.0
            if b > 0 and stochasticity > 0:
                small = stochasticity * b * np.sqrt(1 - ratio**2)
                large = stochasticity * a * np.sqrt(1 - ratio**2)
                std = np.exp(v * np.log(large) + (1 - v) * np.log(small))
            z[area] = mean + temperature * std * noise[m][area]
    return z


@pytest.mark.parametrize("name", order.ORDERS)
@pytest.mark.parametrize(
    ("steps_per_patch", "overlap", "stochasticity", "temperature"),
    [(3, 0.0, 0.5, 1.0), (4, 0.8, 1.0, 0.7), (2, 0.5, 0.0, 1.0)],
)
def test_regenerate_equals_a_slow_oracle(
    name, steps_per_patch, overlap, stochasticity, temperature
):
    image, region = puzzle(3)
    sampling = Sampling(
        steps_per_patch=steps_per_patch,
        overlap=overlap,
        stochasticity=stochasticity,
        temperature=temperature,
        order=order.ORDERS[name],
    )
    settings = sampling.settings(9)
    keys = ipr_jax.sample_keys(jax.random.key(5), 4)
    got = regenerate(fake, keys, image, region, sampling)
    for sample in range(4):
        order_key, noise_key = jax.random.split(iteration_keys(keys, 0).denoise[sample])
        uniform = np.asarray(jax.random.uniform(order_key, GRID))
        num_steps = int(settings.plan.num_steps[region[sample].sum()])
        noise = [
            np.asarray(jax.random.normal(jax.random.fold_in(noise_key, m), SHAPE), np.float64)
            for m in range(num_steps)
        ]
        priority = {
            "certain": lambda sigma: sigma,
            "uncertain": lambda sigma: -sigma,
            "random": lambda sigma, uniform=uniform: uniform,
            "raster": lambda sigma: np.arange(9).reshape(GRID),
        }[name]
        want = oracle_pass(
            image[sample],
            region[sample],
            settings.plan,
            noise,
            priority,
            stochasticity,
            temperature,
        )
        assert got.costs.nfe[sample] == num_steps
        np.testing.assert_allclose(got.image[sample], want, atol=2e-5)


# --- invariants -----------------------------------------------------------------------------------


@settings(max_examples=20)
@given(st.integers(0, 10_000), st.sampled_from([0.01, 0.25, 0.5, 1.0]))
def test_clues_and_untouched_patches_stay_bit_identical(seed, ratio):
    image, editable = puzzle(seed)
    keys = ipr_jax.sample_keys(jax.random.key(seed), 4)
    first = ipr_jax.generate(fake, keys, image, editable)
    clue = ~pixels(editable)
    np.testing.assert_array_equal(np.where(clue, first.image, 0), np.where(clue, image, 0))
    refined = ipr_jax.refine(
        fake, keys, first.image, editable, iterations=3, ratio=ratio, record=keep
    )
    sizes = selection.region_sizes(9, ratio)[editable.sum((1, 2))]
    plan = Sampling().settings(9).plan
    before = np.asarray(first.image)
    for number, after in enumerate(np.asarray(refined.recorded), start=1):
        scores = selection.fresh_regions(keys, jnp.int32(number), GRID)
        region = np.asarray(selection.choose(scores, jnp.asarray(editable), jnp.asarray(sizes)))
        assert not (region & ~editable).any()
        np.testing.assert_array_equal(region.sum((1, 2)), sizes)
        untouched = ~pixels(region)
        np.testing.assert_array_equal(np.where(untouched, after, 0), np.where(untouched, before, 0))
        assert ((after != before) | untouched).all()  # every chosen patch is new
        before = after
    np.testing.assert_array_equal(refined.nfe, np.tile(plan.num_steps[sizes], (3, 1)))
    assert np.asarray(refined.finite).all()


def keep(image):
    return image


@given(st.integers(1, 300), st.floats(0.001, 1))
def test_region_sizes(n, ratio):
    sizes = selection.region_sizes(n, ratio)
    assert sizes[0] == 0
    assert 1 <= sizes[n] <= n
    assert sizes[n] == 1 or sizes[n] <= ratio * n < sizes[n] + 1


def test_region_sizes_are_those_of_the_published_arithmetic():
    """In float64, 0.29 x 100 is just below 29."""
    assert selection.region_sizes(100, 0.29)[100] == 28
    assert selection.region_sizes(81, 0.25)[[1, 3, 4, 61, 81]].tolist() == [1, 1, 1, 15, 20]
    assert selection.region_sizes(16, 1.0).tolist() == list(range(17))


def test_selection_is_uniform():
    keys = ipr_jax.sample_keys(jax.random.key(0), 20_000)
    editable = jnp.broadcast_to(
        jnp.array([[[True, True, False], [True, False, True]]]), (20_000, 2, 3)
    )
    scores = selection.fresh_regions(keys, jnp.int32(1), (2, 3))
    chosen = np.asarray(selection.choose(scores, editable, jnp.full(20_000, 2, jnp.int32)))
    assert (chosen.sum((1, 2)) == 2).all()
    rate = chosen.mean(0)[np.asarray(editable[0])]
    np.testing.assert_allclose(rate, 0.5, atol=4 * 0.5 / np.sqrt(20_000))


# --- one compile, one key per sample --------------------------------------------------------------


def test_the_denoiser_is_traced_once():
    calls = 0

    def counting(z, t):
        nonlocal calls
        calls += 1
        return fake(z, t)

    denoise = chex.assert_max_traces(counting, n=1)
    for seed, (ratio, stochasticity, temperature, overlap) in enumerate(
        [(0.25, 0.5, 1.0, 0.8), (0.9, 0.0, 0.3, 0.0), (0.1, 1.0, 1.0, 0.95)]
    ):
        image, editable = puzzle(seed)
        keys = ipr_jax.sample_keys(jax.random.key(seed), 4)
        sampling = Sampling(
            stochasticity=stochasticity,
            temperature=temperature,
            overlap=overlap,
            steps_per_patch=2 + seed,
        )
        ipr_jax.refine(
            denoise, keys, image, editable, iterations=5, ratio=ratio, sampling=sampling, start=seed
        )
    assert calls == 1


def test_a_sample_does_not_depend_on_its_batch():
    image, editable = puzzle(11)
    keys = ipr_jax.sample_keys(jax.random.key(2), 4)

    def run(rows):
        first = ipr_jax.generate(fake, keys[rows], image[rows], editable[rows])
        return ipr_jax.refine(fake, keys[rows], first.image, editable[rows], iterations=4)

    whole = run(slice(None))
    for i in range(4):
        alone = run(slice(i, i + 1))
        np.testing.assert_array_equal(alone.image[0], whole.image[i])
        np.testing.assert_array_equal(alone.nfe[:, 0], whole.nfe[:, i])
    np.testing.assert_array_equal(
        jax.random.key_data(ipr_jax.sample_keys(jax.random.key(2), 2, first=2)),
        jax.random.key_data(keys[2:]),
    )


def test_iterations_can_be_continued():
    image, editable = puzzle(5)
    keys = ipr_jax.sample_keys(jax.random.key(1), 4)
    whole = ipr_jax.refine(fake, keys, image, editable, iterations=4)
    half = ipr_jax.refine(fake, keys, image, editable, iterations=2)
    rest = ipr_jax.refine(fake, keys, half.image, editable, iterations=2, start=2)
    np.testing.assert_array_equal(rest.image, whole.image)


def test_regions_and_noise_fixed_or_fresh():
    keys = ipr_jax.sample_keys(jax.random.key(1), 3)
    one, two = (selection.fresh_regions(keys, jnp.int32(i), GRID) for i in (1, 2))
    assert (one != two).all()
    np.testing.assert_array_equal(selection.fixed_regions(keys, jnp.int32(2), GRID), one)
    one, two = (selection.fresh_noise(keys, jnp.int32(i), SHAPE) for i in (0, 2))
    assert (one != two).all()
    np.testing.assert_array_equal(selection.initial_noise(keys, jnp.int32(2), SHAPE), one)
    # generation starts from that noise: a denoiser without velocity leaves it in place
    image, editable = puzzle(1, 3)
    still = ipr_jax.generate(
        lambda z, t: Prediction(-z / jnp.maximum(1 - ipr_jax.core.patches.expand(t, 2), 1), z, t),
        keys,
        image,
        np.ones_like(editable),
        Sampling(steps_per_patch=1, overlap=0.0, stochasticity=0.0),
    )
    np.testing.assert_allclose(still.image, 2 * one, rtol=1e-5)


def test_record_is_the_only_thing_kept():
    image, editable = puzzle(5)
    keys = ipr_jax.sample_keys(jax.random.key(1), 4)
    plain = ipr_jax.refine(fake, keys, image, editable, iterations=3)
    assert plain.recorded is None
    assert plain.nfe.shape == plain.finite.shape == (3, 4)
    recorded = ipr_jax.refine(fake, keys, image, editable, iterations=3, record=keep)
    assert recorded.recorded.shape == (3, 4, *SHAPE)
    np.testing.assert_allclose(recorded.recorded[-1], plain.image, rtol=1e-5)


def test_a_sample_that_breaks_is_reported_alone():
    image, editable = puzzle(8)
    editable[:] = True
    image[2] = 0.75

    def breaking(z, t):
        prediction = fake(z, t)
        bad = (jnp.arange(z.shape[0]) == 2)[:, None, None, None]
        return prediction._replace(velocity=jnp.where(bad, jnp.nan, prediction.velocity))

    keys = ipr_jax.sample_keys(jax.random.key(1), 4)
    got = ipr_jax.refine(breaking, keys, image, editable, iterations=2)
    want = ipr_jax.refine(fake, keys, image, editable, iterations=2)
    np.testing.assert_array_equal(got.finite, [[True, True, False, True]] * 2)
    for i in (0, 1, 3):
        np.testing.assert_array_equal(got.image[i], want.image[i])


def test_nothing_editable_costs_nothing():
    image, editable = puzzle(8)
    keys = ipr_jax.sample_keys(jax.random.key(1), 4)
    for result in (
        ipr_jax.generate(fake, keys, image, np.zeros_like(editable)),
        ipr_jax.refine(fake, keys, image, np.zeros_like(editable), iterations=3),
    ):
        np.testing.assert_array_equal(result.image, image)
        assert not np.asarray(result.nfe).any()


@pytest.mark.parametrize(("shape", "grid"), [((4, 6, 3), (2, 3)), ((2, 2, 1), (1, 1))])
def test_grids_that_are_not_square_and_single_patches(shape, grid):
    image = np.zeros((1, *shape), np.float32)
    keys = ipr_jax.sample_keys(jax.random.key(0), 1)
    first = ipr_jax.generate(fake, keys, image, np.ones((1, *grid), bool))
    refined = ipr_jax.refine(fake, keys, first.image, np.ones((1, *grid), bool), iterations=2)
    assert np.isfinite(refined.image).all()
    assert (np.asarray(refined.image) != np.asarray(first.image)).any()


def test_generation_is_compiled_once():
    denoise = chex.assert_max_traces(lambda z, t: fake(z, t), n=1)
    for seed, stochasticity in enumerate([0.0, 0.5, 1.0]):
        image, editable = puzzle(seed)
        keys = ipr_jax.sample_keys(jax.random.key(seed), 4)
        sampling = Sampling(stochasticity=stochasticity, steps_per_patch=1 + seed)
        assert ipr_jax.generate(denoise, keys, image, editable, sampling).finite.all()


@pytest.mark.parametrize("size", [1, 100], ids=["in range", "far beyond"])
def test_correction_of_a_given_image(size):
    """Without clues any image can be refined: only chosen patches change, from the first on."""
    image, editable = puzzle(6)
    image = image * np.float32(size)
    keys = ipr_jax.sample_keys(jax.random.key(1), 4)
    everything = np.ones_like(editable)
    refined = ipr_jax.refine(fake, keys, image, everything, iterations=1, ratio=0.25)
    changed = (np.asarray(refined.image) != image).reshape(4, 3, 2, 3, 2).any((2, 4))
    np.testing.assert_array_equal(changed.sum((1, 2)), 2)


# --- exact laws -----------------------------------------------------------------------------------

COVARIANCE = (
    np.array(
        [[1.0, 0.8, 0.3, 0.0], [0.8, 1.0, 0.5, 0.1], [0.3, 0.5, 1.0, -0.4], [0.0, 0.1, -0.4, 1.0]]
    )
    * 0.16
)
MEAN = np.array([0.3, -0.2, 0.1, 0.0])


def gaussian(z, t):
    """The exact denoiser of four correlated one-pixel patches, at any mix of noise levels."""
    batch = z.shape[0]
    level = t.reshape(batch, 4)
    keep = 1 - level
    covariance = jnp.asarray(COVARIANCE, jnp.float32)[None]
    mean = jnp.asarray(MEAN, jnp.float32)[None]
    joint = keep[:, :, None] * covariance * keep[:, None, :]
    joint = joint + jnp.eye(4)[None] * (level[:, None, :] ** 2 + 1e-6)
    residual = z.reshape(batch, 4) - keep * mean
    solved = jnp.linalg.solve(joint, residual[..., None])[..., 0]
    image = mean + jnp.einsum("bij,bj->bi", covariance * keep[:, None, :], solved)
    noise = level * solved
    velocity = (noise - image).reshape(z.shape)
    return Prediction(velocity, jnp.zeros_like(z), t + 1)


def law(image):
    """Mean [4] and covariance [4, 4] of images of four pixels."""
    flat = image.reshape(-1, 4)
    centred = flat - flat.mean(axis=0, keepdims=True)
    return flat.mean(axis=0), centred.T @ centred / (len(flat) - 1)


NUMBER = 20_000
DEVIATION = 0.16 * np.sqrt(2 / NUMBER)
"""Of the entries of a covariance of so many samples."""


def laws(steps_per_patch, stochasticity, iterations, start=None):
    """Means [K + 1, 4] and covariances [K + 1, 4, 4] after a first pass and every iteration."""
    keys = ipr_jax.sample_keys(jax.random.key(0), NUMBER)
    image, editable = np.ones((NUMBER, 2, 2, 1), np.float32), np.ones((NUMBER, 2, 2), bool)
    sampling = Sampling(
        steps_per_patch=steps_per_patch,
        overlap=0.5,
        stochasticity=stochasticity,
        order=ipr_jax.random_order,
    )
    if start is None:
        start = ipr_jax.generate(gaussian, keys, image, editable, sampling).image
    options = {"iterations": iterations, "ratio": 0.5, "sampling": sampling, "record": law}
    refined = ipr_jax.refine(gaussian, keys, start, editable, **options).recorded
    return [np.stack([one, *more]) for one, more in zip(law(start), refined, strict=True)]


HEAVY = [
    pytest.param(*each, marks=pytest.mark.heavy)
    for each in ((0.0, 3, 5), *((s, 5, 5 * np.sqrt(5)) for s in (0.5, 1.0)))
]


@pytest.mark.parametrize(("stochasticity", "iterations", "deviations"), HEAVY)
def test_the_gaussian_law_is_generated_and_kept_by_refinement(
    stochasticity, iterations, deviations
):
    """With the exact denoiser all iterations sample the data law, whatever is regenerated.

    The steps of the flow are first order, so twice the fine result minus the coarse one is free of
    their leading error; what is left is that of 20,000 samples, the larger by sqrt(5) where the two
    results draw noise of their own.
    """
    (_, coarse), (mean, fine) = (laws(steps, stochasticity, iterations) for steps in (20, 40))
    assert (np.abs(mean - MEAN) < 5 * np.sqrt(np.diag(COVARIANCE) / NUMBER)).all()
    error = np.abs(2 * fine - coarse - COVARIANCE).max()
    assert error < deviations * DEVIATION
    assert error < 0.5 * np.abs(fine - COVARIANCE).max()  # first order indeed


@pytest.mark.heavy
def test_corrupted_images_get_to_the_law_that_is_generated():
    """From the same wrong image, in 40 iterations."""
    wrong = jnp.ones((NUMBER, 2, 2, 1)).at[::2].set(-1)
    mean, covariance = laws(20, 0.0, 40, wrong)
    want_mean, want = laws(20, 0.0, 1)
    far = np.abs(covariance - want[:1]).max(axis=(1, 2))
    assert far[0] > 0.5
    assert far[-1] < 5 * np.sqrt(2) * DEVIATION
    assert np.abs(mean[-1] - want_mean[0]).max() < 5 * np.sqrt(2 * 0.16 / NUMBER)


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [1, 4, 9])
def test_a_single_nan_is_found_in_batches_of_any_size(number):
    image, editable = np.zeros((number, 32, 32, 1), np.float32), np.ones((number, 4, 4), bool)
    image[-1, -1, -1] = np.nan
    with pytest.raises(ValueError, match=f"magnitude of nan in sample {number - 1}$"):
        check.samples(image, editable)
    with pytest.raises(ValueError, match=f"magnitude of nan in sample {number - 1}$"):
        check.clues(image, ~editable)


def test_bad_input_is_refused_before_anything_is_compiled():
    image, editable = puzzle(0)
    keys = ipr_jax.sample_keys(jax.random.key(0), 4)

    def never(z, t):
        raise AssertionError("traced")

    def refine(**change):
        arguments = {"keys": keys, "image": image, "editable": editable, "iterations": 1}
        return ipr_jax.refine(never, **arguments | change)

    editable[0, 0, 0], editable[1, 0, 0] = True, False
    missing, wild, loud = image.copy(), image.copy(), image.copy()
    missing[0, 0, 0] = np.nan
    wild[0, 0, 0] = np.inf
    loud[1, 0, 0] = 1.5
    for change, message in [
        ({"ratio": 0.0}, r"ratio must be in \(0, 1\], got 0.0"),
        ({"ratio": 1.5}, r"ratio must be in \(0, 1\], got 1.5"),
        ({"iterations": 0}, "iterations must be a whole number of at least 1, got 0"),
        ({"start": -1}, "start must be a whole number of at least 0, got -1"),
        ({"iterations": 2.5}, "whole number of at least 1, got 2.5"),
        ({"image": image.astype(np.float64)}, "float32"),
        ({"image": (image * 127).astype(np.uint8)}, "float32 .* got uint8"),
        ({"image": image[0]}, r"\[B, H, W, C\]"),
        ({"image": missing}, "must be in .* got a magnitude of nan in sample 0"),
        ({"image": wild}, "must be in .* got a magnitude of inf in sample 0"),
        ({"image": loud}, r"clue pixels must be in \[-1, 1\], got a magnitude of 1.5 in sample 1"),
        ({"editable": editable[:, :2]}, "square patches of the 6x6 images"),
        ({"editable": editable[:2]}, r"must be \[4, h, w\]"),
        ({"editable": editable.astype(np.float32)}, "bool"),
        ({"keys": keys[:2]}, r"key array \[4\]"),
        ({"keys": jnp.zeros((4, 2), jnp.uint32)}, "from sample_keys"),
    ]:
        with pytest.raises(ValueError, match=message):
            refine(**change)
    with pytest.raises(ValueError, match="magnitude of nan"):
        ipr_jax.generate(never, keys, np.full_like(image, np.nan), np.zeros_like(editable))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps_per_patch": 0}, "steps_per_patch must be a whole number of at least 1, got 0"),
        ({"overlap": 1.1}, r"overlap must be in \[0, 1\], got 1.1"),
        ({"max_steps": 0}, "max_steps must be a whole number of at least 1, got 0"),
        ({"stochasticity": 1.1}, r"stochasticity must be in \[0, 1\], got 1.1"),
        ({"temperature": -1.0}, "temperature must be finite and at least 0, got -1.0"),
        ({"temperature": float("nan")}, "got nan"),
    ],
)
def test_impossible_samplings_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**change)


def test_a_denoiser_of_another_shape_is_refused():
    image, editable = puzzle(0)
    keys = ipr_jax.sample_keys(jax.random.key(0), 4)
    with pytest.raises(ValueError, match=r"sigma must have shape \(4, 3, 3\)"):
        ipr_jax.generate(lambda z, t: Prediction(z, z, z), keys, image, editable)
