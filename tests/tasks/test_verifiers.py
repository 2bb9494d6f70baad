"""Verifiers against slow counts, the published scores and finite differences."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

import ipr_jax
from ipr_jax import Prediction
from ipr_jax.core import patches
from ipr_jax.methods import scores
from ipr_jax.methods.particles import Particles
from ipr_jax.tasks import counting_polygons, digits, even_pixels, get_task, sudoku, verifiers
from ipr_jax.tasks.polygon_classifier import PolygonConfig, read_counts

CONFIG = PolygonConfig()
SIDE = 2


def boards_of(n, number, rng):
    """Random boards [number, n, n] and images whose tiles are as bright as their digit."""
    board = rng.integers(1, n + 1, (number, n, n))
    return board, np.kron(board, np.ones((1, SIDE, SIDE)))[..., None].astype(np.float32)


def bright(tiles):
    """Logits of digits 1..9: the nearer the brightness, the likelier."""
    return -((tiles.mean(axis=(1, 2)) - jnp.arange(1.0, 10.0)[None]) ** 2)


@jax.jit
def judged(score, image, level):
    return score(image, level, None)


def slow_pairs(board, weight):
    return sum(
        weight.flat[one] * weight.flat[other]
        for unit in sudoku.units(len(board))
        for one, other in itertools.combinations(unit, 2)
        if board.flat[one] == board.flat[other]
    )


@pytest.mark.parametrize("n", [4, 9])
def test_conflicts_are_the_pairs_of_equal_digits_by_the_weights_of_their_cells(n, rng):
    board, image = boards_of(n, 6, rng)
    level = rng.random((6, n, n)).astype(np.float32)
    level[0], level[1] = 0, 1
    found = judged(verifiers.conflicts(bright), image, level)
    want = [-slow_pairs(each, 1 - t) for each, t in zip(board, level, strict=True)]
    np.testing.assert_allclose(found, want, rtol=1e-5)
    assert found[0] < 0 == found[1]


def test_valid_boards_have_no_conflict(rng):
    image = np.kron(sudoku.all_boards_4x4(), np.ones((1, SIDE, SIDE)))[..., None]
    level = np.zeros((288, 4, 4))
    found = judged(verifiers.conflicts(bright), image.astype(np.float32), level)
    assert (np.asarray(found) == 0).all()


def test_soft_conflicts_are_expected_ones(rng):
    board, image = boards_of(4, 3, rng)
    level = rng.random((3, 4, 4)).astype(np.float32)
    hard, soft, sharp = (
        np.asarray(judged(verifiers.conflicts(read, soft=soft), image, level))
        for read, soft in ((bright, False), (bright, True), (lambda x: 40 * bright(x), True))
    )
    np.testing.assert_allclose(sharp, hard, rtol=1e-4)
    chance = special.softmax(-((board[..., None] - np.arange(1.0, 5)) ** 2), axis=-1)
    chance = (chance * (1 - level)[..., None]).reshape(3, 16, 4)
    want = [
        -sum(
            each[i] @ each[j]
            for unit in sudoku.units(4)
            for i, j in itertools.combinations(unit, 2)
        )
        for each in chance
    ]
    np.testing.assert_allclose(soft, want, rtol=1e-4)


def test_imbalance_is_the_published_one_where_pixels_have_two_hues(rng):
    batch = even_pixels.TASK.test_batch(0, np.arange(6))
    image, pair = np.array(batch.image), even_pixels.color_pairs()[batch.label]
    first = (image == pair[:, :1, None]).all(axis=3)
    for row, flips in enumerate((0, 1, 2, 7, 100, 300)):  # of the first hue to the second
        places = np.argwhere(first[row])[:flips]
        image[row][tuple(places.T)] = pair[row, 1]
    level = np.zeros((6, 8, 8), np.float32)
    published = np.asarray(jax.jit(even_pixels.scores)(image)["imbalance"])
    np.testing.assert_array_equal(published, [0, 1, 2, 7, 100, 300])
    hard = judged(verifiers.imbalance(), image, level)
    soft = verifiers.imbalance(soft=True)(image, level, None)
    np.testing.assert_array_equal(hard, -published.astype(np.float32))
    np.testing.assert_allclose(soft, -((2.0 * published) ** 2) / 1024, rtol=0.01)
    level[:, :, 4:] = 1  # what is not known does not count
    unknown = level.repeat(4, axis=1).repeat(4, axis=2)[..., None] > 0
    half = np.where(unknown, rng.normal(size=image.shape), image)
    found = judged(verifiers.imbalance(), half.astype(np.float32), level)
    wanted = judged(verifiers.imbalance(), image, level)
    np.testing.assert_array_equal(found, wanted)


def classify(images):
    """Logits that are smooth functions of the pixels of a corner."""
    found, first = {}, 0
    for name, classes in CONFIG.heads.items():
        found[name] = 3 * images[:, 0, first : first + classes, 0]
        first += classes
    return found


def drawn(rng, number=6):
    image = np.zeros((number, 128, 128, 3), np.float32)
    image[:, 0, :, 0] = rng.normal(size=(number, 128))
    return image


def test_miscounts(rng):
    image, level = drawn(rng, 400), np.zeros((400, 16, 16), np.float32)
    level[7] = 0.5
    seen = jax.jit(counting_polygons.scores, static_argnums=1)(
        image, lambda images: read_counts(classify(images), CONFIG)
    )
    hard = judged(verifiers.miscounts(classify, CONFIG), image, level)
    wrong = 2.0 - np.asarray(seen["consistent"]) - np.asarray(seen["uniform"])
    np.testing.assert_array_equal(hard, -wrong * np.where(np.arange(400) == 7, 0.5, 1))
    assert set(wrong.tolist()) == {0, 1, 2}

    logits = classify(image[:3])
    chance = {name: special.softmax(each, axis=-1) for name, each in logits.items()}
    want = np.zeros(3)
    for count, vertices in itertools.product(range(1, 10), range(3, 8)):
        stated = CONFIG.pairs.tolist().index([min(count, vertices), max(count, vertices)])
        want += (
            chance["num_polygons"][:, count - 1]
            * chance["num_vertices"][:, vertices - 3]
            * chance["numbers_label"][:, stated]
        )
    soft = judged(verifiers.miscounts(classify, CONFIG, soft=True), image[:3], level[:3])
    np.testing.assert_allclose(soft, np.log(want * chance["is_uniform"][:, 1]), rtol=1e-5)


SOFT = {
    "mini-sudoku": verifiers.conflicts(bright, soft=True),
    "even-pixels": verifiers.imbalance(soft=True),
    "counting-polygons": verifiers.miscounts(classify, CONFIG, soft=True),
}


@pytest.mark.parametrize("name", SOFT)
def test_gradients_are_finite_differences(name, rng):
    score = SOFT[name]
    image, patch = drawn(rng, 2), 8
    if name != "counting-polygons":
        task = get_task(name)
        image, patch = task.test_batch(0, np.arange(2)).image, task.patch_size
    image = (image + 0.3 * rng.normal(size=image.shape)).astype(np.float32)
    level = rng.random((2, image.shape[1] // patch, image.shape[2] // patch)).astype(np.float32)
    direction = rng.normal(size=image.shape).astype(np.float32)

    def along(step):
        return score(image + step * direction, level, None)

    step = np.float32(1e-3 if name == "even-pixels" else 1e-2)

    @jax.jit
    def measured(start):
        _, slope = jax.jvp(along, [start], [jnp.ones_like(start)])
        return slope, (along(start + step) - along(start - step)) / (2 * step)

    slope, difference = jax.device_get(measured(np.float32(0)))
    largest = np.abs(slope).max()
    np.testing.assert_allclose(slope, difference, rtol=0, atol=0.02 * largest)
    assert largest > 0.01
    gradient = jax.jit(jax.grad(lambda x: score(x, level, None).sum()))(np.zeros_like(image))
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("name", ["mini-sudoku", "digits-sudoku", "even-pixels"])
def test_the_oracle_is_what_grades_and_the_independent_one_is_another(name, rng):
    task = get_task(name)
    image = task.test_batch(0, np.arange(8)).image
    spoilt = rng.random(image.shape) < 0.1
    spoilt[:2] = False
    image = np.where(spoilt, rng.normal(size=image.shape), image)
    image, level = image.astype(np.float32), np.zeros((8, *task.grid), np.float32)
    oracle = verifiers.named(task, "oracle")
    assert (oracle.kind, oracle.differentiable) == ("oracle", False)
    graded = jax.jit(task.score)(image)
    if task.read is None:
        errors = np.asarray(graded[next(iter(task.means))], np.float32)
        np.testing.assert_allclose(judged(oracle.score, image, level + 0.75), -errors / 4)
    else:
        boards = np.asarray(jax.jit(task.read)(image))
        weight = rng.random(level.shape).astype(np.float32)
        errors = np.array([slow_pairs(each, np.ones(task.grid)) for each in boards])
        want = [-slow_pairs(*each) for each in zip(boards, weight, strict=True)]
        np.testing.assert_allclose(judged(oracle.score, image, 1 - weight), want, rtol=1e-5)
        np.testing.assert_array_equal(errors == 0, graded["valid"])
        assert 0 < (errors == 0).sum() < 8
    of_other_name = verifiers.oracle(dataclasses.replace(task, name="mine"))
    for score in (oracle.score, of_other_name):
        np.testing.assert_array_equal(judged(score, image, level), -errors)
    for which in ("independent", "independent-soft"):
        judge = verifiers.named(task, which)
        assert (judge.kind, judge.differentiable) == ("independent", which.endswith("soft"))
        found = np.asarray(judged(judge.score, image, level))
        assert (found <= 0).all()
        assert (found != -errors).any()
        again = verifiers.named(task, which).score
        assert jax.tree.structure(judge.score) == jax.tree.structure(again)


def test_a_second_verifier_judges_what_a_task_grades(rng):
    task = get_task("mini-sudoku")
    image = task.test_batch(0, np.arange(8)).image
    image = np.where(rng.random(image.shape) < 0.1, np.float32(1), image)
    both = verifiers.seconded(task)
    assert both.rates == (*task.rates, "independent")
    found, graded = jax.jit(both.score)(image), jax.jit(task.score)(image)
    level = np.zeros((8, *task.grid), np.float32)
    right = np.asarray(judged(verifiers.named(task, "independent").score, image, level)) == 0
    np.testing.assert_array_equal(found.pop("independent"), right)
    assert 0 < right.sum() < 8
    for name, values in graded.items():
        np.testing.assert_array_equal(found.pop(name), values)
    assert not found
    alone = counting_polygons.make("stars", lambda images: read_counts(classify(images), CONFIG))
    assert verifiers.seconded(alone) is alone


def test_an_oracle_without_errors_counts_what_fails(rng):
    task = counting_polygons.make("polygons", lambda images: read_counts(classify(images), CONFIG))
    image = drawn(rng, 100)
    found = judged(verifiers.oracle(task), image, np.zeros((100, 16, 16), np.float32))
    seen = jax.jit(task.score)(image)
    np.testing.assert_array_equal(
        found, np.asarray(seen["consistent"]) * 1.0 + np.asarray(seen["uniform"]) - 2
    )


def test_unknown_verifiers_are_refused():
    with pytest.raises(ValueError, match=r"of even-pixels must be one of oracle, .*, got 'mine'"):
        verifiers.named(get_task("even-pixels"), "mine")
    task = counting_polygons.make("stars", lambda images: read_counts(classify(images), CONFIG))
    with pytest.raises(ValueError, match="of counting-stars must be one of oracle, got"):
        verifiers.named(task, "independent")


def test_the_second_reader_reads_what_neither_it_nor_its_like_has_seen():
    second = digits.load_reader(digits.SECOND_WEIGHTS)
    images, labels = digits.load_digits("train")
    shown = labels > 0
    logits = jax.jit(second)(images[shown][..., None])
    right = (np.asarray(logits).argmax(axis=1) + 1 == labels[shown]).mean()
    assert 0.94 < right < 0.95  # as its maker reports


def test_a_search_takes_them():
    """What a reader has learnt is an argument of the program, within its branches too."""

    def fake(z, t):
        return Prediction(0.9 * z * patches.expand(t, 8), 0 * z, 1 + t)

    task = get_task("mini-sudoku")
    batch = task.test_batch(0, np.arange(2))
    judge = verifiers.named(task, "independent-soft")
    method = Particles.of("das", scores.verifier(**judge._asdict()), 2, every=0.5)
    keys = ipr_jax.sample_keys(jax.random.key(0), 2)
    found = ipr_jax.solve(fake, keys, batch.image, batch.editable, method=method)
    assert np.asarray(found.finite).all()
    np.testing.assert_array_equal(found.nve, 2 * 3)
    np.testing.assert_array_equal(found.nbe, 2 * 2)
