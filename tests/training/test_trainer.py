"""The trainer: its steps, its files, going on after an interrupt, what it refuses."""

import dataclasses
import functools
import itertools
import json
import subprocess
import sys
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from scipy import stats

import ipr_jax
from ipr_jax import SRM, ModelConfig, TransformerConfig
from ipr_jax.core.keys import rngs
from ipr_jax.models import checkpoint, new_model
from ipr_jax.runtime import resume, sharding
from ipr_jax.tasks.base import Batch, Task
from ipr_jax.training import objective, trainer
from ipr_jax.training.recipes import RECIPES
from ipr_jax.training.trainer import TrainConfig

SMALL = ModelConfig(
    image_size=(4, 4),
    channels=1,
    patch_size=2,
    widths=(4,),
    attention=(False,),
    num_blocks=1,
    time_width=4,
    num_frequencies=4,
    head_width=4,
    num_groups=2,
    dropout=0.0,
)

SMALL_TRANSFORMER = TransformerConfig(
    image_size=(4, 4), channels=1, patch_size=2, width=4, num_layers=1, hidden_width=6
)

RUN = TrainConfig(
    num_steps=6,
    batch_size=4,
    learning_rate=1e-2,
    warmup_steps=2,
    ema_decay=0.9,
    noise_levels="shared",
    seed=3,
    log_every=1,
    save_every=3,
)


@pytest.fixture(autouse=True)
def optax_may_promote(monkeypatch):
    """Optax mixes integers and floats; everything else stays under strict promotion."""
    build = trainer.optimizer

    def standard(function):
        def call(*args):
            with jax.numpy_dtype_promotion("standard"):
                return function(*args)

        return call

    def optimizer(config):
        transform = build(config)
        return optax.GradientTransformation(standard(transform.init), standard(transform.update))

    monkeypatch.setattr(trainer, "optimizer", optimizer)


@functools.cache
def compiled_step(model, config):
    return make_train_step(model, config)


make_train_step = trainer.make_train_step


def placed(state):
    """Placed as in a run; a step is compiled once more for a state that is not."""
    return jax.device_put(state, sharding.whole(sharding.data_mesh()))


@pytest.fixture
def compiled_once(monkeypatch):
    """Runs that differ only in when they log and save share one compiled step."""

    def shared_step(model, config, placed=None):
        return compiled_step(model, dataclasses.replace(config, log_every=1, save_every=1))

    monkeypatch.setattr(trainer, "make_train_step", shared_step)
    return shared_step


def striped_batch(seed, indices):
    """Images of a dark and a bright half; the first patch of every third image is a clue."""
    image = np.empty((len(indices), *SMALL.image_shape), np.float32)
    editable = np.ones((len(indices), *SMALL.grid), bool)
    for row, index in enumerate(indices):
        level = np.random.default_rng([seed, index]).uniform(0.6, 1)
        image[row, :, :2], image[row, :, 2:] = -level, level
        editable[row, 0, 0] = index % 3 != 0
    return Batch(image, editable, np.zeros(len(indices), np.int32))


def unused(*args):
    raise AssertionError("training needs no scores")


TASK = Task(
    name="stripes",
    image_shape=SMALL.image_shape,
    patch_size=SMALL.patch_size,
    training_batch=striped_batch,
    test_batch=unused,
    score=unused,
    rates=("valid",),
    dependencies=np.zeros((1, 1)),
)


def values(config, steps):
    schedule = trainer.learning_rate(config)
    with jax.numpy_dtype_promotion("standard"):
        return [float(schedule(step)) for step in steps]


def test_learning_rate_warms_up_linearly():
    config = TrainConfig(learning_rate=2.0, warmup_steps=4)
    want = [2 * (2e-4 + (1 - 2e-4) * k / 4) for k in range(5)] + [2.0, 2.0]
    assert values(config, [0, 1, 2, 3, 4, 5, 10**6]) == pytest.approx(want, rel=1e-7, abs=2e-7)


def test_learning_rate_falls_as_a_cosine_to_zero():
    config = TrainConfig(learning_rate=2.0, warmup_steps=4, num_steps=12, decay="cosine")
    want = [1 + np.cos(np.pi * k / 8) for k in range(9)]
    assert values(config, range(4, 13)) == pytest.approx(want, rel=1e-6, abs=2e-7)


def test_learning_rate_falls_linearly_to_zero_at_the_end():
    config = TrainConfig(learning_rate=2.0, warmup_steps=4, num_steps=14, decay="linear")
    want = [2.0] * 8 + [4 / 3, 2 / 3, 0]
    assert values(config, range(4, 15)) == pytest.approx(want, rel=1e-5, abs=1e-6)
    timed = dataclasses.replace(config, minutes=1.0)  # the decay is that of the clock
    assert values(timed, range(4, 15)) == pytest.approx([2.0] * 11)


@pytest.mark.parametrize("decay", ["constant", "cosine", "linear"])
def test_learning_rate_without_warm_up_begins_at_its_peak(decay):
    config = TrainConfig(learning_rate=2.0, warmup_steps=0, num_steps=8, decay=decay)
    assert values(config, [0]) == pytest.approx([2.0])


def test_optimizer_is_clipped_adam_with_decoupled_decay(rng):
    config = TrainConfig(learning_rate=0.1, warmup_steps=2, weight_decay=0.3, clip_norm=0.5)
    scales = (1e4, 1e-2, 10.0, 1e-3)  # the norms, of which the first and third are clipped
    directions = rng.normal(size=(len(scales), 6))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    want = rng.normal(size=6)
    params = {"a": jnp.float32(want[:4].reshape(2, 2)), "b": jnp.float32(want[4:])}
    transform = trainer.optimizer(config)
    state = transform.init(params)
    first, second = np.zeros(6), np.zeros(6)
    for step, (scale, direction) in enumerate(zip(scales, directions, strict=True)):
        gradient = scale * direction
        gradients = {"a": jnp.float32(gradient[:4].reshape(2, 2)), "b": jnp.float32(gradient[4:])}
        updates, state = transform.update(gradients, state, params)
        params = optax.apply_updates(params, updates)

        clipped = min(scale, 0.5) * direction
        first = 0.95 * first + 0.05 * clipped
        second = 0.999 * second + 0.001 * clipped**2
        mean = first / (1 - 0.95 ** (step + 1))
        root = np.sqrt(second / (1 - 0.999 ** (step + 1)))
        rate = 0.1 * (2e-4 + (1 - 2e-4) * min(step, 2) / 2)
        want = want - rate * (mean / (root + 1e-8) + 0.3 * want)
        got = np.concatenate([params["a"].ravel(), params["b"]])
        np.testing.assert_allclose(got, want, rtol=2e-5)


@pytest.mark.heavy
def test_muon_turns_the_matrices_of_a_transformer_and_adam_the_rest(rng):
    config = TrainConfig(learning_rate=0.1, warmup_steps=0, weight_decay=0.0, optimizer="muon")
    params = nnx.to_pure_dict(trainer.init(SMALL_TRANSFORMER, config).params)
    gradients = jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32), params
    )
    transform = trainer.optimizer(config)
    updates, _ = transform.update(gradients, transform.init(params), params)
    layer = updates["layers"][0]
    for each in (
        *jnp.moveaxis(layer["qkv"], 1, 0),
        *jnp.moveaxis(layer["up"], 1, 0),
        *(layer["proj"], layer["down"]),
    ):
        values = np.linalg.svd(each, compute_uv=False)
        assert values.min() / (0.1 * max(each.shape) ** 0.5) > 0.5  # nearly a rotation
        assert values.max() / (0.1 * max(each.shape) ** 0.5) < 1.3
    for each in (updates["enter"], updates["level"], updates["tables"]["row"], layer["level"]):
        first = 0.1 * (1 + 0.95 * 0.05 / (1 - 0.95**2))  # Adam's, with Nesterov's momentum
        np.testing.assert_allclose(np.abs(each), first, rtol=1e-3)


def copy(tree):
    return jax.tree.map(np.array, tree)


def same(one, two):
    leaves = zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True)
    return all(np.array_equal(a, b) for a, b in leaves)


def run_steps(state, number, train_step):
    batch, inverse, key = striped_batch(0, np.arange(4)), jnp.ones(1000), jax.random.key(0)
    for _ in range(number):
        state, losses = train_step(state, key, batch, inverse)
        yield state, losses


def test_a_step_donates_its_state_and_is_compiled_once(compiled_once):
    train_step = compiled_once(SMALL, RUN)
    old = placed(trainer.init(SMALL, RUN))
    counts = []
    for done, (state, _) in enumerate(run_steps(old, 3, train_step), start=1):
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old))
        assert int(state.step) == done
        counts.append(train_step._cache_size())
        old = state
    assert counts[0] == counts[1] == counts[2] > 0


@pytest.mark.parametrize(("done", "decay"), [(0, 1 / 10), (1, 2 / 11), (79, 80 / 89), (82, 0.9)])
def test_averaged_weights_follow_the_warm_up(done, decay, compiled_once):
    state = trainer.init(SMALL, RUN)._replace(step=jnp.int32(done))
    state = placed(state._replace(ema=jax.tree.map(lambda leaf: leaf + 1, state.params)))
    before = copy(state.ema)
    [(state, _)] = run_steps(state, 1, compiled_once(SMALL, RUN))
    want = jax.tree.map(lambda a, b: decay * a + (1 - decay) * b, before, copy(state.params))
    for got, leaf in zip(jax.tree.leaves(state.ema), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(got, leaf, rtol=1e-5, atol=1e-6)


def test_training_lowers_the_loss_of_a_fixed_batch(compiled_once):
    batch = striped_batch(0, np.arange(4))
    t = jnp.asarray(np.random.default_rng(0).random((4, *SMALL.grid)), jnp.float32)
    noise = jax.random.normal(jax.random.key(5), batch.image.shape)
    graph = nnx.graphdef(SRM(SMALL, rngs=nnx.Rngs(0)))

    @jax.jit
    def loss(params):
        given = batch.image, noise, t, jnp.ones_like(t)
        return objective.evaluate(nnx.merge(graph, params), *given).total

    state = placed(trainer.init(SMALL, RUN))
    before = loss(state.params)
    *_, (state, _) = run_steps(state, 150, compiled_once(SMALL, RUN))
    assert loss(state.params) < 0.6 * before
    assert loss(state.ema) < 0.6 * before


@pytest.mark.usefixtures("no_learning")
def test_a_batch_in_parts_has_the_gradient_of_the_whole(monkeypatch):
    seen = []

    def recorder(config):
        def update(gradients, state, params):
            jax.debug.callback(lambda tree: seen.append(copy(tree)), gradients)
            return jax.tree.map(jnp.zeros_like, gradients), state

        return optax.GradientTransformation(lambda params: optax.EmptyState(), update)

    monkeypatch.setattr(trainer, "optimizer", recorder)
    found = []
    for parts in (1, 2):
        config = dataclasses.replace(RUN, accumulate=parts)
        [(state, losses)] = run_steps(
            trainer.init(SMALL_TRANSFORMER, config), 1, make_train_step(SMALL_TRANSFORMER, config)
        )
        jax.block_until_ready(state)
        jax.effects_barrier()
        found.append(losses)
    np.testing.assert_allclose(*found, rtol=1e-5)
    for one, two in zip(*map(jax.tree.leaves, seen), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-6)


@pytest.fixture
def no_learning(monkeypatch):
    """Steps that leave the parameters alone."""
    monkeypatch.setattr(trainer, "optimizer", lambda config: optax.set_to_zero())


@pytest.mark.parametrize(
    ("name", "add_zeros"), [("mean-beta", True), ("independent", False), ("shared", True)]
)
@pytest.mark.usefixtures("no_learning")
def test_levels_and_weights_of_a_step(name, add_zeros, monkeypatch):
    def shown(denoise, image, noise, t, weight):
        return objective.Losses(total=jnp.float32(0), velocity=t, vlb=weight, sigma=noise)

    monkeypatch.setattr(objective, "evaluate", shown)
    config = dataclasses.replace(RUN, noise_levels=name, add_zeros=add_zeros)
    train_step = make_train_step(SMALL, config)
    indices, inverse, key = np.arange(300), jnp.arange(1000.0) + 1, jax.random.key(0)
    batch = striped_batch(0, indices)
    state, first = train_step(trainer.init(SMALL, config), key, batch, inverse)
    _, second = train_step(state, key, batch, inverse)
    _, again = train_step(trainer.init(SMALL, config), key, batch, inverse)
    assert same(first, again)
    assert (first.sigma != second.sigma).all()

    t, weight = np.asarray(first.velocity), np.asarray(first.vlb)
    assert (t[~batch.editable] == 0).all()
    assert (weight[~batch.editable] == 0).all()
    learnt = weight > 0
    assert (learnt == (t > 0)).all()
    assert learnt[batch.editable].all() == (not add_zeros)
    assert learnt[batch.editable].mean() > 0.5
    want = 1 + np.minimum((t * np.float32(1000)).astype(int), 999)
    np.testing.assert_array_equal(weight, np.where(learnt, want, 0))
    assert stats.kstest(np.ravel(first.sigma), "norm").pvalue > 0.01


@pytest.mark.usefixtures("no_learning")
def test_dropout_is_drawn_anew_in_every_step(monkeypatch):
    def shown(denoise, image, noise, t, weight):
        shift = denoise(image, jnp.full(t.shape, 0.5)).velocity
        return objective.Losses(total=jnp.float32(0), velocity=shift, vlb=t, sigma=t)

    monkeypatch.setattr(objective, "evaluate", shown)
    train_step = make_train_step(dataclasses.replace(SMALL, dropout=0.5), RUN)

    def velocities():
        state = trainer.init(SMALL, RUN)
        params = jax.tree.map(lambda leaf: leaf + 0.1, state.params)
        state = state._replace(params=params)
        return [losses.velocity for _, losses in run_steps(state, 2, train_step)]

    one, two = velocities()
    assert (one != two).any()
    np.testing.assert_array_equal(velocities(), [one, two])


def lines_of(folder):
    log = folder / "log.jsonl"
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def untimed(lines):
    return [{k: v for k, v in line.items() if not k.startswith("seconds")} for line in lines]


def test_an_interrupted_run_continues_bit_for_bit(tmp_path, compiled_once):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    yielded = list(trainer.train(TASK, SMALL, RUN, whole))
    assert yielded == lines_of(whole)
    assert [line["step"] for line in yielded] == [1, 2, 3, 4, 5, 6]

    killed = trainer.train(TASK, SMALL, RUN, parts)
    assert [line["step"] for line in itertools.islice(killed, 5)] == [1, 2, 3, 4, 5]
    killed.close()
    assert not (parts / "model").exists()
    with (parts / "log.jsonl").open("a") as log:
        log.write('{"step": 6, "tot')
    resumed = trainer.train(TASK, SMALL, RUN, parts, num_workers=1)
    assert [line["step"] for line in resumed] == [4, 5, 6]

    assert untimed(lines_of(parts)) == untimed(lines_of(whole))
    one, two = (checkpoint.open_model(folder / "model") for folder in (whole, parts))
    assert same(*(nnx.state(model) for model, _ in (one, two)))
    assert one[1] == two[1] == {"task": "stripes", "training": dataclasses.asdict(RUN)}

    before = lines_of(whole)
    assert list(trainer.train(TASK, SMALL, RUN, whole)) == []
    assert lines_of(whole) == before


def test_processes_that_would_go_on_from_different_steps_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(resume.multihost_utils, "process_allgather", lambda step: [step, 4])
    message = "processes would go on from different steps, 0, 4; start them again when"
    with pytest.raises(ValueError, match=message):
        next(trainer.train(TASK, SMALL, RUN, tmp_path / "run"))


def test_a_checkpoint_is_there_when_its_line_is_yielded(tmp_path, compiled_once):
    run = trainer.train(TASK, SMALL, RUN, tmp_path)
    assert [line["step"] for line in itertools.islice(run, 3)] == [1, 2, 3]
    run.close()
    assert [line["step"] for line in trainer.train(TASK, SMALL, RUN, tmp_path)] == [4, 5, 6]
    assert ipr_jax.load(tmp_path / "model").config == SMALL


def test_lines_hold_the_mean_since_the_last(tmp_path, compiled_once):
    often = dataclasses.replace(RUN, save_every=6)
    every = list(trainer.train(TASK, SMALL, often, tmp_path / "every"))
    sparse = dataclasses.replace(RUN, log_every=2, save_every=5)
    some = list(trainer.train(TASK, SMALL, sparse, tmp_path / "some"))
    assert [line["step"] for line in some] == [2, 4, 5, 6]
    first = 0
    for line in some:
        for term in objective.Losses._fields:
            mean = np.mean([one[term] for one in every[first : line["step"]]])
            assert line[term] == pytest.approx(mean, rel=1e-6)
        first = line["step"]


@pytest.fixture
def shares(monkeypatch):
    """Steps that only count; what each is given of the learning rate."""
    shares = []

    def counted(model, config, placed):
        def train_step(state, key, batch, inverse, left):
            shares.append(float(left))
            return state._replace(step=state.step + 1), objective.Losses(*jnp.ones(4))

        return train_step

    monkeypatch.setattr(trainer, "make_train_step", counted)
    return shares


def test_a_run_of_some_minutes_ends_with_them_and_its_rate_falls_to_zero(
    tmp_path, monkeypatch, shares
):
    clock = itertools.count()
    monkeypatch.setattr(trainer.time, "perf_counter", lambda: next(clock))
    config = dataclasses.replace(
        RUN, num_steps=10**6, minutes=1.0, decay="linear", log_every=10**6, save_every=10**6
    )
    [line] = trainer.train(TASK, SMALL, config, tmp_path)
    assert line["step"] == len(shares) < 60
    assert 60 <= line["seconds"] < 66
    assert shares == sorted(shares, reverse=True)
    assert [share == 1 for share in shares].count(True) == pytest.approx(0.7 * 28, abs=2)
    assert shares[-1] < 0.15
    assert (tmp_path / "model").exists()
    assert list(trainer.train(TASK, SMALL, config, tmp_path)) == []


@pytest.mark.parametrize(
    ("model", "change", "message"),
    [
        (
            dataclasses.replace(SMALL, image_size=(4, 6)),
            {},
            r"the model makes images \(4, 6, 1\) in 2 x 3 patches, the task stripes needs "
            r"\(4, 4, 1\) in 2 x 2 patches",
        ),
        (SMALL, {"optimizer": "muon"}, "optimizer='muon' is for the layers of a TransformerConfig"),
        (SMALL, {"data": "device"}, "no device draws batches of stripes, use data='host'"),
    ],
    ids=["grid", "muon", "device"],
)
def test_what_does_not_go_together_is_refused(model, change, message, tmp_path):
    config = dataclasses.replace(RUN, **change)
    with pytest.raises(ValueError, match=f"^{message}"):
        next(trainer.train(TASK, model, config, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("change", [{"minutes": 1.0}, {"data": "device"}], ids=str)
def test_several_processes_share_neither_a_clock_nor_drawn_batches(change, tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    task = dataclasses.replace(TASK, drawing=unused)
    (name,) = change
    with pytest.raises(ValueError, match=f"^{name} must be .* for several processes, got"):
        next(trainer.train(task, SMALL, dataclasses.replace(RUN, **change), tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_folder_of_another_run_is_refused_and_left_alone(tmp_path, compiled_once):
    list(trainer.train(TASK, SMALL, RUN, tmp_path))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    others = (
        (dataclasses.replace(TASK, name="spots"), SMALL, RUN),
        (TASK, dataclasses.replace(SMALL, dropout=0.1), RUN),
        (TASK, SMALL, dataclasses.replace(RUN, seed=4)),
    )
    for task, model, config in others:
        with pytest.raises(ValueError, match=f"^{tmp_path} holds a run of another configuration"):
            next(trainer.train(task, model, config, tmp_path))
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_a_run_begins_from_given_weights(tmp_path, shares):
    """Those of a model of the same architecture; of another, nothing is written."""
    list(trainer.train(TASK, SMALL, RUN, tmp_path / "first"))
    model = str(tmp_path / "first" / "model")
    given = trainer.weights(model, SMALL)
    again = dataclasses.replace(RUN, weights=model, seed=4)
    state = trainer.init(SMALL, again, given)
    chex.assert_trees_all_equal(state.params, given)
    chex.assert_trees_all_equal(state.ema, given)
    list(trainer.train(TASK, SMALL, again, tmp_path / "second"))
    found = trainer.weights(str(tmp_path / "second" / "model"), SMALL)
    chex.assert_trees_all_equal(found, given)
    other = dataclasses.replace(SMALL, dropout=0.1)
    for name, message in ((model, "weights must be of "), ("nope", "no model at 'nope'")):
        config = dataclasses.replace(RUN, weights=name)
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            next(trainer.train(TASK, other, config, tmp_path / "third"))
    assert not (tmp_path / "third").exists()


def test_a_transformer_begins_from_one_of_other_pixels(tmp_path):
    """All but the ends are taken, those are drawn; of another grid nothing is."""
    sizes = {"width": 8, "num_layers": 1, "num_heads": 2, "hidden_width": 6, "num_frequencies": 4}
    small = TransformerConfig(image_size=(8, 8), channels=1, patch_size=2, **sizes)
    large = TransformerConfig(
        image_size=(12, 12), channels=2, patch_size=3, pixel_mean=0.3, gain=True, **sizes
    )
    first, other = (nnx.state(new_model(each, rngs=rngs(3))) for each in (small, large))
    checkpoint.save(tmp_path / "first", small, first, {})
    found = trainer.weights(str(tmp_path / "first"), large, seed=1)
    assert jax.tree.structure(found) == jax.tree.structure(other)
    drawn = trainer.init(large, dataclasses.replace(RUN, seed=1)).params
    for name in found:
        source = drawn if name in trainer.PIXEL_WEIGHTS else first
        chex.assert_trees_all_equal(found[name], source[name])
    made = nnx.merge(nnx.graphdef(new_model(large, rngs=rngs(0))), found)
    jax.eval_shape(made, jnp.zeros((1, 12, 12, 2)), jnp.zeros((1, 4, 4)))
    for change in ({"image_size": (9, 9)}, {"num_heads": 1}):
        with pytest.raises(ValueError, match="weights must be of "):
            trainer.weights(str(tmp_path / "first"), dataclasses.replace(large, **change))


def test_a_folder_that_holds_no_run_is_refused_and_left_alone(tmp_path):
    (tmp_path / "log.jsonl").write_text("another's\n")
    with pytest.raises(ValueError, match=f"^{tmp_path} exists and holds no run"):
        next(trainer.train(TASK, SMALL, RUN, tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["log.jsonl"]
    assert (tmp_path / "log.jsonl").read_text() == "another's\n"


def test_an_error_of_the_data_ends_the_run_at_its_step(tmp_path, compiled_once):
    def broken_batch(seed, indices):
        if indices[0] == 4 * RUN.batch_size:
            raise ValueError("no such image")
        return striped_batch(seed, indices)

    task = dataclasses.replace(TASK, training_batch=broken_batch)
    with pytest.raises(ValueError, match="no such image"):
        list(trainer.train(task, SMALL, RUN, tmp_path))
    assert [line["step"] for line in lines_of(tmp_path)] == [1, 2, 3, 4]
    with pytest.raises(ValueError, match=r"^num_workers must be 0 where"):
        next(trainer.train(task, SMALL, RUN, tmp_path / "other", num_workers=1))
    assert not (tmp_path / "other").exists()


def test_parameters_that_are_not_finite_are_not_saved(tmp_path, monkeypatch):
    def broken(model, config, placed):
        def train_step(state, key, batch, inverse, left):
            params = jax.tree.map(lambda leaf: leaf * jnp.nan, state.params)
            return state._replace(params=params), objective.Losses(*jnp.ones(4))

        return train_step

    monkeypatch.setattr(trainer, "make_train_step", broken)
    with pytest.raises(FloatingPointError, match="a parameter is not finite after step 3"):
        list(trainer.train(TASK, SMALL, dataclasses.replace(RUN, save_every=3), tmp_path))
    assert not list((tmp_path / "checkpoints").iterdir())


def test_weights_steps_data_and_loss_weights_share_no_key():
    """Each is folded with small numbers: parameters and steps are counted from 0."""
    keys = [
        jax.random.key_data(jax.random.fold_in(key, number))
        for key in trainer.run_keys(0)
        for number in range(100)
    ]
    assert len(np.unique(np.stack(keys), axis=0)) == 400


@pytest.mark.parametrize(("broken", "log_every"), [(1, 1), (5, 4), (6, 4)])
def test_a_loss_that_is_not_finite_names_its_step(broken, log_every, tmp_path, compiled_once):
    def damaged_batch(seed, indices):
        batch = striped_batch(seed, indices)
        if indices[0] == (broken - 1) * RUN.batch_size:
            batch.image[0, 3, 3, 0] = np.nan
        return batch

    config = dataclasses.replace(RUN, log_every=log_every)
    task = dataclasses.replace(TASK, training_batch=damaged_batch)
    with pytest.raises(FloatingPointError, match=rf"not finite at step {broken}: .*nan"):
        list(trainer.train(task, SMALL, config, tmp_path))
    assert not (tmp_path / "model").exists()
    lines = {1: [1, 2, 3, 4, 5, 6], 4: [3, 4, 6]}[log_every]
    written = [line["step"] for line in lines_of(tmp_path)]
    assert written == [step for step in lines if step < broken]
    saved = 3 if broken > 3 else 0
    resumed = [line["step"] for line in trainer.train(TASK, SMALL, config, tmp_path)]
    assert resumed == [step for step in lines if step > saved]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *(
            ({name: 0}, f"{name} must be a whole number of at least 1, got 0")
            for name in ("num_steps", "batch_size", "accumulate", "log_every", "save_every")
        ),
        *(
            ({name: value}, f"{name} must be positive, got {value}")
            for name in ("learning_rate", "clip_norm", "sharpness", "minutes")
            for value in (0.0, -1.0, float("nan"))
        ),
        *(
            ({name: -1}, f"{name} must be a whole number of at least 0, got -1")
            for name in ("warmup_steps", "seed", "curriculum")
        ),
        ({"seed": 2**32}, "seed must be below 4294967296"),
        ({"num_steps": 2.5}, "num_steps must be a whole number"),
        ({"weight_decay": -1}, "weight_decay must not be negative, got -1"),
        ({"weight_decay": float("nan")}, "weight_decay must not be negative, got nan"),
        ({"ema_decay": 1.0}, r"ema_decay must be in \[0, 1\), got 1.0"),
        ({"ema_decay": -0.1}, r"ema_decay must be in \[0, 1\), got -0.1"),
        ({"decay": "step"}, r"unknown decay 'step'; known: \['constant', 'cosine', 'linear'\]"),
        ({"optimizer": "sgd"}, r"unknown optimizer 'sgd'; known: \['adamw', 'muon'\]"),
        ({"data": "disk"}, r"unknown data 'disk'; known: \['host', 'device'\]"),
        ({"precision": "fp8"}, "unknown precision 'fp8'; known: float32, tf32, bfloat16"),
        ({"accumulate": 3}, "batch_size must be a multiple of accumulate=3, got 64"),
        ({"distortion": 1.5}, r"distortion must be in \[0, 1\], got 1.5"),
        ({"distortion": 0.5}, "distortion needs data='device', got 0.5"),
        ({"curriculum": 5}, "curriculum needs data='device', got 5"),
        ({"noise_levels": "beta"}, "unknown noise_levels 'beta'; known: .*mean-beta.*shared"),
    ],
    ids=str,
)
def test_impossible_settings_are_refused(change, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        TrainConfig(**change)


def test_every_shipped_model_is_made_by_its_recipe():
    for name in checkpoint.SHIPPED:
        model, provenance = checkpoint.open_model(name)
        assert model.config == RECIPES[name].model
        assert TrainConfig(**provenance["training"]) == RECIPES[name].training


@pytest.mark.heavy
def test_damaged_checkpoints():
    """In a process of its own: what Orbax has under way when a read fails complains at any time."""
    plugins = ("-p", "no:unraisableexception", "-p", "no:threadexception")
    file = Path(__file__).parents[1] / "damaged_checkpoints.py"
    words = [sys.executable, "-m", "pytest", "-n", "0", "-q", *plugins, str(file)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
