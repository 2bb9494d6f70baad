"""The plan of a pass: recorded tables, tables by hand, invariants of whole passes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import golden
from hypothesis import given
from hypothesis import strategies as st

from ipr_jax.sampling import order, schedule

NAMES = ["sudoku_init", "sudoku_ipr", "even_pixels", "counting_polygons", "overlap075"]


@pytest.mark.parametrize("name", NAMES)
def test_plans_equal_the_published_ones(name):
    recorded = golden("schedules.npz")
    want = {k.removeprefix(f"{name}_"): v for k, v in recorded.items() if k.startswith(name)}
    sizes = want["num_unknown"]
    plan = schedule.make_plan(
        int(sizes.max()), int(want["steps_per_patch"]), float(want["overlap"])
    )
    np.testing.assert_array_equal(plan.num_steps[sizes], want["max_steps"])
    np.testing.assert_array_equal(plan.block_length[sizes], want["block_length"])
    for row, n in enumerate(sizes):
        np.testing.assert_array_equal(plan.block_starts[n, :n], want["block_starts"][row, :n])


@pytest.mark.parametrize(
    ("n", "steps_per_patch", "overlap", "num_steps", "length", "starts"),
    [
        (1, 3, 0.0, 3, 3, [0]),  # one patch
        (3, 2, 0.0, 6, 2, [0, 2, 4]),  # one after the other
        (3, 4, 0.5, 8, 4, [0, 2, 4]),  # half a block apart
        (2, 1, 0.0, 2, 1, [0, 1]),  # one step each
        (3, 10, 0.99, 11, 11, [0, 0, 0]),  # all together: one start for all
        (3, 10, 1.0, 10, 10, [0, 0, 0]),  # in parallel
    ],
)
def test_plans_by_hand(n, steps_per_patch, overlap, num_steps, length, starts):
    plan = schedule.make_plan(n, steps_per_patch, overlap)
    assert plan.num_steps[n] == num_steps
    assert plan.block_length[n] == length
    assert plan.block_starts[n].tolist() == starts
    assert plan.num_steps[0] == 0


@pytest.mark.parametrize(
    ("n", "overlap", "max_steps", "top_k", "length", "starts"),
    [
        (4, 0.0, 8, 1, 2, [0, 2, 4, 6]),
        (4, 0.5, 10, 1, 4, [0, 2, 4, 6]),
        (4, 1.0, 8, 1, 8, [0, 0, 0, 0]),
        (4, 0.0, 8, 2, 4, [0, 0, 4, 4]),
        (3, 0.0, 8, 2, 4, [0, 0, 4]),  # the last block is not full
        (4, 0.0, 2, 1, 1, [0, 0, 1, 1]),  # fewer steps than patches
    ],
)
def test_plans_of_a_fixed_number_of_steps_by_hand(n, overlap, max_steps, top_k, length, starts):
    plan = schedule.make_plan(n, 3, overlap, max_steps, top_k)
    assert plan.num_steps.tolist() == [0] + [max_steps] * n
    assert plan.block_length[n] == length
    assert plan.block_starts[n].tolist() == starts


levels = jax.jit(schedule.levels)
start_patches = jax.jit(schedule.start_patches)


@given(
    st.sampled_from([(1, 1), (2, 3), (4, 4)]),
    st.integers(1, 12),
    st.floats(0, 1),
    st.none() | st.integers(1, 30),
    st.integers(1, 5),
    st.sampled_from(schedule.CLOCKS),
    st.randoms(use_true_random=False),
)
def test_invariants_of_a_whole_pass(
    grid, steps_per_patch, overlap, max_steps, top_k, clock, random
):
    """Levels start at 1, stay in [0, 1], never rise, move while steps remain, and end at 0.

    The published rounding may leave nothing to do in the last step.
    """
    h, w = grid
    region = np.array([random.random() < 0.6 for _ in range(2 * h * w)]).reshape(2, h, w)
    plan = schedule.make_plan(h * w, steps_per_patch, overlap, max_steps, top_k, clock)
    pass_plan = schedule.plan_pass(plan, jnp.asarray(region))
    start = jnp.full((2, h, w), schedule.WAITING, jnp.int32)
    sizes = region.sum((1, 2))
    np.testing.assert_array_equal(pass_plan.num_steps, plan.num_steps[sizes])
    before = np.asarray(levels(pass_plan, start, 0))
    np.testing.assert_array_equal(before, region.astype(np.float32))
    for step in range(int(pass_plan.num_steps.max())):
        priority = jnp.asarray([random.random() for _ in range(2 * h * w)], jnp.float32)
        start = start_patches(pass_plan, start, step, priority.reshape(2, h, w))
        started = (np.asarray(start) != schedule.WAITING).sum((1, 2))
        due = ((plan.block_starts[sizes] <= step) & (plan.block_starts[sizes] >= 0)).sum(1)
        np.testing.assert_array_equal(started, due)
        after = np.asarray(levels(pass_plan, start, step + 1))
        assert (after >= 0).all()
        assert (after <= before).all()
        for sample in range(2):
            if step < pass_plan.num_steps[sample]:
                done = (before[sample] == 0).all() and step == pass_plan.num_steps[sample] - 1
                assert (after[sample] < before[sample]).any() or done
        before = after
    np.testing.assert_array_equal(before, 0)
    assert ((np.asarray(start) != schedule.WAITING) == region).all()


def test_the_clock_of_variance_preserving_diffusion():
    """By integrating its betas, and as published for the flow that it is matched with."""
    length = 10
    plan = schedule.plan_pass(
        schedule.make_plan(1, length, 0, clock="vp"), np.ones((1, 1, 1), bool)
    )
    start = jnp.zeros((1, 1, 1), jnp.int32)
    found = [float(levels(plan, start, step)[0, 0, 0]) for step in range(length + 1)]
    assert (found[0], found[-1]) == (1, 0)
    for step in range(1, length):
        time = np.linspace(0, 1 - step / length, 100_001)
        kept = np.exp(-np.trapezoid(0.1 + 19.9 * time, time))  # of the image's variance
        want = np.sqrt(1 - kept) / (np.sqrt(1 - kept) + np.sqrt(kept))
        np.testing.assert_allclose(found[step], want, rtol=1e-5)
    np.testing.assert_allclose(found[1:10:2], [0.983, 0.922, 0.773, 0.552, 0.254], atol=5e-4)


def test_lowest_priority_starts_first_and_ties_in_raster_order():
    plan = schedule.make_plan(4, 10, 0.99)  # starts all four at step 0
    pass_plan = schedule.plan_pass(plan, jnp.ones((1, 2, 2), bool))
    one = pass_plan._replace(block_starts=jnp.array([[0, 1, 1, 2]]))
    start = np.full((1, 2, 2), schedule.WAITING, np.int32)
    priority = jnp.array([[[2.0, 1.0], [1.0, 1.0]]])
    for step in range(3):
        start = start_patches(one, start, step, priority)
    assert start.tolist() == [[[2, 0], [1, 1]]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 3, 0.0), "num_patches must be a whole number of at least 1, got 0"),
        ((4, 0, 0.0), "steps_per_patch must be a whole number of at least 1, got 0"),
        ((4, 2.5, 0.0), "got 2.5"),
        ((4, 3, 1.1), r"\[0, 1\], got 1.1"),
        ((4, 3, -0.1), r"\[0, 1\], got -0.1"),
        ((4, 3, float("nan")), r"\[0, 1\], got nan"),
        ((4, 3, 0.0, 0), "max_steps must be a whole number of at least 1, got 0"),
        ((4, 3, 0.0, None, 0), "top_k must be a whole number of at least 1, got 0"),
        ((4, 3, 0.0, None, 1, "slow"), "clock must be one of linear, vp, got 'slow'"),
    ],
)
def test_impossible_schedules_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        schedule.make_plan(*arguments)


@pytest.mark.parametrize("bad", [np.inf, np.nan, -np.inf])
def test_patches_without_a_finite_priority_start_in_their_turn(bad):
    plan = schedule.plan_pass(
        schedule.make_plan(4, 1, 0.0), jnp.array([[[True, False], [True, True]]])
    )
    start = jnp.full((1, 2, 2), schedule.WAITING, jnp.int32)
    for step in range(3):
        start = start_patches(plan, start, step, jnp.full((1, 2, 2), bad, jnp.float32))
    assert start.tolist() == [[[0, schedule.WAITING], [1, 2]]]


@given(
    st.lists(
        st.tuples(st.floats(width=32, allow_subnormal=False), st.booleans()),  # XLA takes them as 0
        min_size=6,
        max_size=6,
    )
)
def test_rank_is_a_permutation_with_candidates_first(patches):
    scores, candidates = (np.array(part).reshape(1, 2, 3) for part in zip(*patches, strict=True))
    rank = np.asarray(order.rank(jnp.asarray(scores, jnp.float32), jnp.asarray(candidates)))
    assert sorted(rank.ravel()) == list(range(6))
    assert sorted(rank[candidates]) == list(range(candidates.sum()))
    finite = candidates & np.isfinite(scores)
    placed = scores[finite][np.argsort(rank[finite])]
    assert (np.diff(placed) >= 0).all()
