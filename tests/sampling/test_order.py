"""Which patch starts next."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import regenerate

import ipr_jax
from ipr_jax.sampling import order, schedule
from ipr_jax.sampling.order import ORDERS, graph_order, random_order


def peers(n):
    """Bool [n^2, n^2]: which cells share a row, column or box, spelled out."""
    box = int(n**0.5)
    row, column = np.divmod(np.arange(n * n), n)
    group = np.stack([row, column, row // box * box + column // box])
    same = (group[:, :, None] == group[:, None, :]).any(axis=0)
    return same & ~np.eye(n * n, dtype=bool)


def starts_of(choose, region, overlap=0.0, sigma=None, seed=0):
    """Run the schedule of a pass: the step at which every patch starts."""
    _, h, w = region.shape
    plan = schedule.plan_pass(schedule.make_plan(h * w, 4, overlap), jnp.asarray(region))
    uniform = jax.random.uniform(jax.random.key(seed), region.shape)
    sigma = jnp.ones(region.shape) if sigma is None else jnp.asarray(sigma)
    start = jnp.full(region.shape, schedule.WAITING, jnp.int32)

    @jax.jit
    def step(start, index):
        t = schedule.levels(plan, start, index)
        return schedule.start_patches(plan, start, index, choose(sigma, uniform, t))

    for index in range(int(plan.num_steps.max())):
        start = step(start, index)
    return np.asarray(start)


def test_orders_by_the_predicted_error():
    region = np.ones((2, 2, 2), bool)
    sigma = np.array([[[3.0, 1.0], [4.0, 2.0]], [[1.0, 2.0], [3.0, 4.0]]], np.float32)
    certain = starts_of(ipr_jax.certain_first, region, sigma=sigma)
    assert (certain.reshape(2, 4) // 4 == [[2, 0, 3, 1], [0, 1, 2, 3]]).all()
    uncertain = starts_of(ipr_jax.uncertain_first, region, sigma=sigma)
    assert (uncertain.reshape(2, 4) // 4 == [[1, 3, 0, 2], [3, 2, 1, 0]]).all()
    assert set(ORDERS) == {"certain", "uncertain", "random", "raster"}


@pytest.mark.parametrize("n", [4, 9])
def test_the_graph_order_takes_the_cell_with_the_most_known_peers(n, rng):
    """One cell after the other, at order 1: all cells have equally many peers."""
    region = rng.random((3, n, n)) < 0.7
    start = starts_of(graph_order(peers(n)), region)
    for sample in range(3):
        known = ~region[sample].ravel()
        waiting = region[sample].ravel().copy()
        for cell in np.argsort(start[sample].ravel(), kind="stable")[: waiting.sum()]:
            count = peers(n)[:, known].sum(axis=1)
            assert count[cell] == count[waiting].max()
            waiting[cell], known[cell] = False, True


def test_the_graph_order_weighs_longer_paths_less():
    """A chain 0 - 1 - 2 - 3 with 0 known: its neighbour, then by distance."""
    chain = np.eye(4, k=1) + np.eye(4, k=-1)
    region = np.array([[[False, True, True, True]]])
    start = starts_of(graph_order(chain, max_order=3), region)
    assert start[0, 0, 1:].tolist() == [0, 4, 8]
    t = jnp.array([[[0.0, 1.0, 1.0, 1.0]]])
    priority = graph_order(chain, max_order=3)(t, jnp.zeros_like(t), t)
    # Column-normalised powers by hand: from 0 to 1 in one step 1/2 * 1/2, and in three steps.
    one, normal = np.zeros(4), chain / chain.sum(0)
    one[0] = 1
    by_hand = sum(0.5**k * one @ np.linalg.matrix_power(normal, k) for k in range(4))
    np.testing.assert_allclose(-priority[0, 0] / order.TIES, by_hand, atol=1 / order.TIES)


def test_equals_are_taken_at_random_and_order_0_is_random():
    region = np.ones((4, 3, 3), bool)
    nothing = graph_order(np.ones((9, 9)), max_order=0)
    np.testing.assert_array_equal(starts_of(nothing, region), starts_of(random_order, region))
    firsts = {
        int(np.argmin(starts_of(graph_order(peers(9)), np.ones((1, 9, 9), bool), seed=seed)))
        for seed in range(8)
    }
    assert len(firsts) >= 5


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((np.ones((2, 3)),), {}, r"\[P, P\] and not negative, got \(2, 3\)"),
        ((-np.eye(3),), {}, "not negative"),
        ((np.eye(3),), {"max_order": -1}, "max_order must be a whole number of at least 0"),
        ((np.eye(3),), {"decay": 1.0}, r"decay must be in \(0, 1\), got 1.0"),
    ],
)
def test_impossible_graphs_are_refused(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        graph_order(*arguments, **options)


def test_parallel_sampling_moves_all_patches_together():
    start = starts_of(ipr_jax.certain_first, np.ones((2, 3, 3), bool), overlap=1.0)
    assert (start == 0).all()


def test_a_graph_of_another_grid_is_refused():
    t = jnp.ones((1, 2, 2))
    with pytest.raises(ValueError, match="of 3 patches, the grid 2 x 2"):
        graph_order(np.eye(3))(t, t, t)


def test_repainting_takes_one_noise_level_per_image(rng):
    image = rng.normal(size=(2, 4, 4, 1)).astype(np.float32)
    editable = np.ones((2, 2, 2), bool)
    with pytest.raises(ValueError, match=r"noise must have .* \(2, 4, 4, 1\), got \(4, 4, 1\)"):
        ipr_jax.repaint(lambda z, t: z, image, editable, image[0])
    repainted = ipr_jax.repaint(lambda z, t: z, image, editable, image)
    with pytest.raises(ValueError, match=r"one noise level per image, .* got \(2, 2, 2\)"):
        repainted(image, jnp.ones((2, 2, 2)))


def test_repainting_is_the_published_loop(rng):
    """Image by image: a step, then the clues at the next noise level."""
    shape = (2, 8, 8, 1)
    image, noise, first = rng.standard_normal((3, *shape)).astype(np.float32).clip(-1, 1)
    editable = rng.random((2, 4, 4)) < 0.5
    mask = editable.repeat(2, 1).repeat(2, 2)[..., None]
    levels = [1.0, 0.75, 0.5, 0.25, 0.0]
    seen = []

    def denoise(z, t):
        jax.debug.callback(lambda z: seen.append(np.asarray(z)), z)
        velocity = jnp.tanh(z) + z.mean(axis=(1, 2), keepdims=True)
        return ipr_jax.Prediction(velocity, jnp.zeros_like(z), jnp.ones_like(t))

    z = np.where(mask, first, noise)
    for t, s in itertools.pairwise(levels):
        velocity = np.tanh(z) + z.mean(axis=(1, 2), keepdims=True)
        z = np.where(mask, z + (s - t) * velocity, (1 - s) * image + s * noise)

    repainted = ipr_jax.repaint(denoise, image, editable, noise)
    sampling = ipr_jax.Sampling(overlap=1.0, max_steps=4, stochasticity=0.0)
    keys = ipr_jax.sample_keys(jax.random.key(0), 2)
    out = regenerate(repainted, keys, first, np.ones((2, 1, 1), bool), sampling)
    jax.effects_barrier()
    assert len(seen) == 4
    np.testing.assert_allclose(np.where(mask, out.image, image), z, atol=1e-5)
    np.testing.assert_allclose(seen[0], np.where(mask, first, noise), atol=1e-6)
