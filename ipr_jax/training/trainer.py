"""The trainer: optimiser, one compiled step, and a loop that logs, saves and resumes.

Everything random hangs on (seed, step), so a resumed run continues bit for bit.
"""

import contextlib
import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from ipr_jax import check, checkpoint, files, resume, sharding
from ipr_jax.config import ModelConfig
from ipr_jax.denoiser import SRM
from ipr_jax.interrupts import PreemptionError
from ipr_jax.keys import rngs
from ipr_jax.tasks.base import Batch, Task
from ipr_jax.training import loader, noise_levels, objective


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How to train; the defaults are those of the released models where they share one.

    Attributes:
        num_steps: optimiser steps.
        batch_size: images per step.
        learning_rate: peak, reached after ``warmup_steps`` of linear warm-up.
        warmup_steps: steps of warm-up.
        decay: what follows the warm-up, constant (as released) or cosine to 0 at ``num_steps``.
        weight_decay: of AdamW.
        clip_norm: largest global gradient norm.
        ema_decay: of the averaged weights; step k uses min(ema_decay, (1 + k) / (10 + k)).
        noise_levels: sampler of training noise levels.
        sharpness: of the mean-beta sampler.
        add_zeros: also set random patches to level 0.
        seed: of weights, data, noise and dropout.
        log_every: steps between log lines.
        save_every: steps between checkpoints.

    Raises:
        ValueError: a value is out of range, naming it and the range.
    """

    num_steps: int = 250_000
    batch_size: int = 64
    learning_rate: float = 1e-4
    warmup_steps: int = 5_000
    decay: Literal["constant", "cosine"] = "constant"
    weight_decay: float = 1e-6
    clip_norm: float = 1.0
    ema_decay: float = 0.9999
    noise_levels: Literal["mean-beta", "independent", "shared"] = "mean-beta"
    sharpness: float = 1.0
    add_zeros: bool = False
    seed: int = 0
    log_every: int = 50
    save_every: int = 500

    def __post_init__(self) -> None:
        for name in ("num_steps", "batch_size", "log_every", "save_every"):
            check.count(name, getattr(self, name))
        check.count("warmup_steps", self.warmup_steps, least=0)
        check.seed(self.seed)
        for name in ("learning_rate", "clip_norm", "sharpness"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay must not be negative, got {self.weight_decay}")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay must be in [0, 1), got {self.ema_decay}")
        for name, known in (
            ("decay", ("constant", "cosine")),
            ("noise_levels", tuple(noise_levels.SAMPLERS)),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"unknown {name} {getattr(self, name)!r}; known: {list(known)}")


class TrainState(NamedTuple):
    """What a step changes.

    Attributes:
        step: int32 scalar, steps done.
        params: NNX state of the model, float32.
        ema: the averaged parameters, the same tree.
        opt_state: of the optimiser.
    """

    step: jax.Array
    params: Any
    ema: Any
    opt_state: Any


def learning_rate(config: TrainConfig) -> optax.Schedule:
    """The rate of step k = 0, 1, ...: linear warm-up from 2e-4 of the peak, then the decay."""
    warmup = optax.linear_schedule(
        2e-4 * config.learning_rate, config.learning_rate, config.warmup_steps
    )
    after = (
        optax.constant_schedule(config.learning_rate)
        if config.decay == "constant"
        else optax.cosine_decay_schedule(
            config.learning_rate, max(1, config.num_steps - config.warmup_steps)
        )
    )
    return optax.join_schedules([warmup, after], [config.warmup_steps])


def optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """Clip by global norm, then AdamW (0.95, 0.999)."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(learning_rate(config), b1=0.95, b2=0.999, weight_decay=config.weight_decay),
    )


class RunKeys(NamedTuple):
    """The keys of a run: of its initial weights, its loss weights, and its steps."""

    init: jax.Array
    density: jax.Array
    step: jax.Array


def run_keys(seed: int) -> RunKeys:
    """Derive the keys of a run from its seed."""
    return RunKeys(*jax.random.split(jax.random.key(seed), 3))


def init(model: ModelConfig, config: TrainConfig) -> TrainState:
    """The state before the first step; weights are drawn from ``config.seed``."""
    params = nnx.state(SRM(model, rngs=rngs(run_keys(config.seed).init)))
    return TrainState(
        step=jnp.int32(0),
        params=params,
        ema=jax.tree.map(jnp.copy, params),
        opt_state=optimizer(config).init(params),
    )


TrainStep = Callable[[TrainState, jax.Array, Batch, jax.Array], tuple[TrainState, objective.Losses]]


def make_train_step(model: ModelConfig, config: TrainConfig, placed: Any = None) -> TrainStep:
    """The compiled ``train_step(state, key, batch, inverse) -> (state, losses)``.

    The state is donated; ``key`` is ``RunKeys.step``, into which every step folds its number;
    ``inverse`` is ``noise_levels.inverse_density``, float32 [1000], or ones. Clues (not editable)
    have level 0 and weight 0. ``placed`` is the sharding of the state, by default that of the one
    it is given.
    """
    graph = nnx.graphdef(nnx.eval_shape(lambda: SRM(model, rngs=rngs(0))))
    transform = optimizer(config)
    sample = noise_levels.SAMPLERS[config.noise_levels](config.sharpness)

    def train_step(
        state: TrainState, key: jax.Array, batch: Batch, inverse: jax.Array
    ) -> tuple[TrainState, objective.Losses]:
        level_key, zero_key, noise_key, dropout_key = jax.random.split(
            jax.random.fold_in(key, state.step), 4
        )
        image = jnp.asarray(batch.image)
        t = sample(level_key, image.shape[0], model.grid)
        weight = noise_levels.weigh(t, inverse)
        if config.add_zeros:
            t, weight = noise_levels.add_zeros(zero_key, t, weight)
        t, weight = jnp.where(batch.editable, t, 0), jnp.where(batch.editable, weight, 0)
        noise = jax.random.normal(noise_key, image.shape)
        dropout = dropout_key if model.dropout else None

        def total(params: Any) -> tuple[jax.Array, objective.Losses]:
            denoise = nnx.merge(graph, params)
            losses = objective.evaluate(
                lambda z, t: denoise(z, t, dropout), image, noise, t, weight
            )
            return losses.total, losses

        gradients, losses = jax.grad(total, has_aux=True)(state.params)
        updates, opt_state = transform.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        decay = jnp.minimum(config.ema_decay, (1 + state.step) / (10 + state.step))
        ema = jax.tree.map(lambda a, b: decay * a + (1 - decay) * b, state.ema, params)
        return TrainState(step=state.step + 1, params=params, ema=ema, opt_state=opt_state), losses

    out_shardings = None if placed is None else (placed, None)
    return jax.jit(train_step, donate_argnums=0, out_shardings=out_shardings)


def _trim_log(path: Path, last_step: int) -> None:
    """Drop the lines after ``last_step``, which a resumed run writes again, and a torn one."""
    if path.exists():
        with files.reading(path):
            lines = path.read_text().splitlines(keepends=True)
            whole = [line for line in lines if line.endswith("\n")]
            kept = [line for line in whole if json.loads(line)["step"] <= last_step]
        files.write_text(path, "".join(kept))


def train(
    task: Task,
    model: ModelConfig,
    config: TrainConfig,
    folder: Path,
    num_workers: int = 0,
    *,
    mesh: Mesh | None = None,
    shard_params: bool = False,
    preempted: Callable[[int], bool] = lambda step: False,
) -> Iterator[dict[str, float]]:
    """Train in ``folder``, from where it stopped if it holds a run of the same configuration.

    Writes ``config.json``, ``log.jsonl``, ``checkpoints/`` (the full state) and, at the end,
    ``model/`` (the averaged weights, for ``ipr_jax.load``).

    Args:
        task: where the training batches come from.
        model: the architecture.
        config: how to train.
        folder: of the run; made if it does not exist.
        num_workers: processes that make the batches, as for ``loader.load``; 0 = a thread. The
            results are the same.
        mesh: the devices that share every batch, from ``sharding.data_mesh``; None = all. Results
            are the same up to rounding.
        shard_params: whether the devices also share one copy of parameters, averages and moments,
            instead of one each.
        preempted: asked after every step, of its number, whether to save the state and end; the
            answer must be the same in all processes.

    Yields:
        A log line every ``config.log_every`` steps and at every checkpoint: step, mean losses since
        the last line, seconds per step.

    Raises:
        ValueError: the folder holds a run of another configuration, or something else;
            ``num_workers`` is not for this task; or the batch cannot be shared equally: nothing has
            been written. Or no checkpoint is whole; a damaged one gives way, with a warning, to the
            one before.
        PreemptionError: ``preempted`` said so; the state is saved.
        FloatingPointError: a loss or a parameter is not finite; names the step, counted from 1 as
            in the log. It is found in time for the next log line, before anything is saved.
    """
    folder = checkpoint.check_path(folder)
    loader.check_workers(task.training_batch, num_workers)
    mesh = mesh or sharding.data_mesh()
    if config.batch_size % mesh.size:
        raise ValueError(
            f"batch_size must be a multiple of the {mesh.size} devices, got {config.batch_size}"
        )
    configuration = {
        "task": task.name,
        "model": dataclasses.asdict(model),
        "training": dataclasses.asdict(config),
    }
    leads = jax.process_index() == 0
    files.claim(folder, configuration)

    keys = run_keys(config.seed)
    inverse = jnp.ones(noise_levels.NUM_BINS)
    if config.noise_levels == "mean-beta":  # the others are uniform
        sample = noise_levels.SAMPLERS[config.noise_levels](config.sharpness)
        inverse = jnp.asarray(noise_levels.inverse_density(sample, keys.density, model.grid))
    abstract = jax.eval_shape(lambda: init(model, config))
    placed = (
        sharding.parts(mesh, abstract)
        if shard_params
        else jax.tree.map(lambda _: sharding.whole(mesh), abstract)
    )
    train_step = make_train_step(model, config, placed)
    wanted = jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        abstract,
        placed,
    )
    with contextlib.ExitStack() as stack:
        manager = stack.enter_context(resume.checkpoints(folder / "checkpoints"))
        saved = resume.restore(manager, lambda _: wanted)
        start, state = saved or (0, sharding.place(init(model, config), placed))
        batches = stack.enter_context(
            contextlib.closing(
                loader.load(
                    task.training_batch,
                    config.seed,
                    config.batch_size,
                    range(start, config.num_steps),
                    num_workers,
                    (jax.process_index(), jax.process_count()),
                )
            )
        )
        log = folder / "log.jsonl"
        if leads:
            _trim_log(log, start)
        everywhere = sharding.whole(mesh)
        inverse = sharding.place(inverse, everywhere)
        step_key = jax.random.wrap_key_data(
            sharding.place(jax.random.key_data(keys.step), everywhere)
        )
        recent: list[objective.Losses] = []
        began = time.perf_counter()
        for done, batch in enumerate(batches, start + 1):
            shared = jax.make_array_from_process_local_data(sharding.rows(mesh), batch)
            state, losses = train_step(state, step_key, shared, inverse)
            recent.append(losses)
            jax.block_until_ready(recent[-3:-2])  # or a signal would wait for many steps
            stop = preempted(done)
            save = stop or done % config.save_every == 0 or done == config.num_steps
            if not save and done % config.log_every:
                continue
            values = np.array(jax.device_get(recent))
            finite = np.isfinite(values).all(axis=1)
            if not finite.all():
                first = int(finite.argmin())
                found = objective.Losses(*values[first].tolist())
                raise FloatingPointError(
                    f"the loss is not finite at step {done - len(recent) + first + 1}: {found}"
                )
            means = objective.Losses(*values.mean(axis=0).tolist())
            seconds = (time.perf_counter() - began) / len(recent)
            line = {"step": done, **means._asdict(), "seconds_per_step": seconds}
            if leads:
                with files.named(log), log.open("a") as file:
                    file.write(json.dumps(line) + "\n")
            if save:
                if not all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params)):
                    raise FloatingPointError(f"a parameter is not finite after step {done}")
                resume.save(manager, done, state)
            if stop:
                raise PreemptionError
            yield line
            recent, began = [], time.perf_counter()
    if not (folder / "model").exists():
        provenance = {"task": task.name, "training": dataclasses.asdict(config)}
        checkpoint.save(folder / "model", model, state.ema, provenance)
