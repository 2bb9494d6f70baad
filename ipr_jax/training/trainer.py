"""The trainer: optimiser, one compiled step, and a loop that logs, saves and resumes.

Everything random hangs on (seed, step), so a resumed run continues bit for bit.
"""

import contextlib
import dataclasses
import json
import math
import os
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
from flax import nnx
from jax.sharding import Mesh

from ipr_jax.core import check, rngs
from ipr_jax.interrupts import PreemptionError
from ipr_jax.models import (
    MATRICES,
    Config,
    ModelConfig,
    TransformerConfig,
    checkpoint,
    get_precision,
    new_model,
)
from ipr_jax.runtime import files, resume, sharding
from ipr_jax.tasks import Batch, Task
from ipr_jax.training import loader, noise_levels, objective

PIXEL_FIELDS = (
    *("image_size", "channels", "patch_size", "pixel_mean", "pixel_std"),
    *("gain", "balance"),
)
"""What two transformers may differ in that have all but ``PIXEL_WEIGHTS`` in common."""
PIXEL_WEIGHTS = ("enter", "leave")
"""The parameters of a transformer that turn pixels into tokens and back."""

DECAYS: dict[str, Callable[[Any], Any]] = {
    "constant": lambda done: jnp.ones_like(done),
    "cosine": lambda done: 0.5 * (1 + jnp.cos(jnp.pi * done)),
    "linear": lambda done: jnp.minimum(1, (1 - done) / 0.3),
}
"""What is left of the peak learning rate, by the share in [0, 1] of the run that is done."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How to train; the defaults are those of the released models where they share one.

    Attributes:
        num_steps: optimiser steps.
        batch_size: images per step.
        learning_rate: peak, reached after ``warmup_steps`` of linear warm-up.
        warmup_steps: steps of warm-up.
        decay: what follows the warm-up, constant (as released), cosine to 0 at the end, or linear:
            constant, and to 0 over the last 30%.
        minutes: of wall-clock time, compilation included, after which no step begins but the
            first; the decay then follows the time, and ``num_steps`` is the most. None = the clock
            does not matter.
        optimizer: adamw, or muon for the matrices of a transformer's layers and AdamW for the rest.
        weight_decay: of both.
        accumulate: parts of a batch that are computed one after the other, to need less memory.
        clip_norm: largest global gradient norm.
        ema_decay: of the averaged weights; step k uses min(ema_decay, (1 + k) / (10 + k)).
        noise_levels: sampler of training noise levels.
        sharpness: of the mean-beta sampler.
        add_zeros: also set random patches to level 0.
        per_image: weigh every image's loss by 1 / its share of noisy patches, at most 20.
        data: whether the host draws the batches, or the device.
        distortion: of the digits that the device draws, in [0, 1].
        curriculum: steps over which the most cells that the device hides grow to all of them.
        precision: of the network: float32, tf32 (a GPU's, float32 elsewhere) or bfloat16.
        weights: a shipped model or a model folder to begin from, of the same architecture; of a
            transformer of the same but for its pixels, all but what pixels enter and leave by.
            None = weights are drawn from the seed.
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
    decay: Literal["constant", "cosine", "linear"] = "constant"
    minutes: float | None = None
    optimizer: Literal["adamw", "muon"] = "adamw"
    weight_decay: float = 1e-6
    accumulate: int = 1
    clip_norm: float = 1.0
    ema_decay: float = 0.9999
    noise_levels: Literal["mean-beta", "independent", "shared", "sequential"] = "mean-beta"
    sharpness: float = 1.0
    add_zeros: bool = False
    per_image: bool = False
    data: Literal["host", "device"] = "host"
    distortion: float = 0.0
    curriculum: int = 0
    precision: str = "tf32"
    weights: str | None = None
    seed: int = 0
    log_every: int = 50
    save_every: int = 500

    def __post_init__(self) -> None:
        for name in ("num_steps", "batch_size", "accumulate", "log_every", "save_every"):
            check.count(name, getattr(self, name))
        for name in ("warmup_steps", "curriculum"):
            check.count(name, getattr(self, name), least=0)
        check.seed(self.seed)
        get_precision(self.precision)
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"batch_size must be a multiple of accumulate={self.accumulate}, "
                f"got {self.batch_size}"
            )
        if self.minutes is not None and not 0 < self.minutes < math.inf:
            raise ValueError(f"minutes must be positive, got {self.minutes}")
        if not 0 <= self.distortion <= 1:
            raise ValueError(f"distortion must be in [0, 1], got {self.distortion}")
        for name in ("learning_rate", "clip_norm", "sharpness"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay must not be negative, got {self.weight_decay}")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay must be in [0, 1), got {self.ema_decay}")
        for name, known in (
            ("decay", tuple(DECAYS)),
            ("optimizer", ("adamw", "muon")),
            ("noise_levels", tuple(noise_levels.SAMPLERS)),
            ("data", ("host", "device")),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"unknown {name} {getattr(self, name)!r}; known: {list(known)}")
        for name in ("distortion", "curriculum"):
            if getattr(self, name) and self.data == "host":
                raise ValueError(f"{name} needs data='device', got {getattr(self, name)}")


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
    """The rate of step k = 0, 1, ...: linear warm-up from 2e-4 of the peak, then the decay.

    With ``config.minutes`` the decay is not in it: a step is told how much is left.
    """
    warmup = optax.linear_schedule(
        2e-4 * config.learning_rate, config.learning_rate, config.warmup_steps
    )
    decay = DECAYS[config.decay if config.minutes is None else "constant"]
    steps = max(1, config.num_steps - config.warmup_steps)

    def after(step: Any) -> Any:
        done = jnp.minimum(jnp.asarray(step, jnp.float32) / steps, 1)
        return config.learning_rate * decay(done)

    return optax.join_schedules([warmup, after], [config.warmup_steps])


def optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """Clip by global norm, then AdamW (0.95, 0.999), or Muon (0.95) with updates as large as its.

    Both change a number by about the learning rate in a step.
    """
    if config.optimizer == "adamw":
        transform = optax.adamw(
            learning_rate(config), b1=0.95, b2=0.999, weight_decay=config.weight_decay
        )
    else:
        transform = optax.contrib.muon(
            learning_rate(config),
            weight_decay=config.weight_decay,
            adam_b1=0.95,
            adam_weight_decay=config.weight_decay,
            muon_weight_dimension_numbers=_matrices,
            consistent_rms=1.0,
        )
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), transform)


def _matrices(params: Any) -> Any:
    """Which parameters are matrices of a transformer's layers, as Muon is told."""

    def axes(path: Any, _: Any) -> Any:
        names = [getattr(key, "key", None) for key in path]
        found = [MATRICES[name] for name in names if name in MATRICES]
        return optax.contrib.MuonDimensionNumbers(*found[0]) if found else None

    return jax.tree_util.tree_map_with_path(axes, params)


class RunKeys(NamedTuple):
    """The keys of a run: of its initial weights, its loss weights, its steps, its data."""

    init: jax.Array
    density: jax.Array
    step: jax.Array
    data: jax.Array


def run_keys(seed: int) -> RunKeys:
    """Derive the keys of a run from its seed."""
    return RunKeys(*jax.random.split(jax.random.key(seed), 4))


def init(model: Config, config: TrainConfig, params: Any = None) -> TrainState:
    """The state before the first step; weights are drawn from ``config.seed`` or given."""
    if params is None:
        params = nnx.state(new_model(model, rngs=rngs(run_keys(config.seed).init)))
    return TrainState(
        step=jnp.int32(0),
        params=params,
        ema=jax.tree.map(jnp.copy, params),
        opt_state=optimizer(config).init(params),
    )


def weights(name: str, model: Config, seed: int = 0) -> Any:
    """The parameters of a shipped model or of a model folder.

    Args:
        name: of it.
        model: the architecture that is wanted; of a transformer that differs in ``PIXEL_FIELDS``
            only, on the same grid, all parameters but ``PIXEL_WEIGHTS`` are taken.
        seed: draws what is not taken.

    Raises:
        ValueError, FileNotFoundError: there is none, or it is of another architecture.
    """
    found, _ = checkpoint.open_model(name)
    if found.config == model:
        return nnx.state(found)
    if isinstance(model, TransformerConfig) and isinstance(found.config, TransformerConfig):
        same = {each: getattr(model, each) for each in PIXEL_FIELDS}
        if model.grid == found.config.grid and dataclasses.replace(found.config, **same) == model:
            drawn = nnx.state(new_model(model, rngs=rngs(run_keys(seed).init)))
            own = nnx.State({each: drawn[each] for each in PIXEL_WEIGHTS})
            return nnx.merge_state(nnx.state(found), own)
    but = ""
    if isinstance(model, TransformerConfig):
        but = f" (or another {', '.join(PIXEL_FIELDS)} on the same grid)"
    raise ValueError(f"weights must be of {model}{but}, {name} is of {found.config}")


TrainStep = Callable[..., tuple[TrainState, objective.Losses]]


def make_train_step(model: Config, config: TrainConfig, placed: Any = None) -> TrainStep:
    """The compiled ``train_step(state, key, batch, inverse, left=1) -> (state, losses)``.

    The state is donated; ``key`` is ``RunKeys.step``, into which every step folds its number;
    ``inverse`` is ``noise_levels.inverse_density``, float32 [1000], or ones; ``left`` is the factor
    of the learning rate. Clues (not editable) have level 0, and what has level 0 has weight 0.
    ``placed`` is the sharding of the state, by default that of the one it is given.
    """
    precision = get_precision(config.precision)
    graph = nnx.graphdef(
        nnx.eval_shape(lambda: new_model(model, dtype=precision.dtype, rngs=rngs(0)))
    )
    transform = optimizer(config)
    sample = noise_levels.SAMPLERS[config.noise_levels](config.sharpness)
    dropout = isinstance(model, ModelConfig) and model.dropout > 0

    def gradients_of(
        params: Any, key: jax.Array, *given: jax.Array
    ) -> tuple[Any, objective.Losses]:
        def total(params: Any) -> tuple[jax.Array, objective.Losses]:
            denoise = nnx.merge(graph, params)
            keyed = (lambda z, t: denoise(z, t, key)) if dropout else denoise
            losses = objective.evaluate(keyed, *given)
            return losses.total, losses

        with jax.default_matmul_precision(precision.products):
            return jax.grad(total, has_aux=True)(params)

    def train_step(
        state: TrainState,
        key: jax.Array,
        batch: Batch,
        inverse: jax.Array,
        left: jax.Array | float = 1.0,
    ) -> tuple[TrainState, objective.Losses]:
        level_key, zero_key, noise_key, dropout_key = jax.random.split(
            jax.random.fold_in(key, state.step), 4
        )
        image = jnp.asarray(batch.image)
        t = sample(level_key, jnp.asarray(batch.editable))
        weight = noise_levels.weigh(t, inverse)
        if config.add_zeros:
            t, weight = noise_levels.add_zeros(zero_key, t, weight)
        t = jnp.where(batch.editable, t, 0)
        weight = jnp.where(t > 0, weight, 0)
        if config.per_image:
            weight = weight * noise_levels.per_image(t)
        noise = jax.random.normal(noise_key, image.shape)
        given = (image, noise, t, weight)
        if config.accumulate == 1:
            gradients, losses = gradients_of(state.params, dropout_key, *given)
        else:
            # Rows that lie side by side go to different parts: each device keeps its own.
            parts = jax.tree.map(
                lambda each: each.reshape(-1, config.accumulate, *each.shape[1:]).swapaxes(0, 1),
                given,
            )
            keys = jax.random.split(dropout_key, config.accumulate)

            def add(total: Any, part: Any) -> tuple[Any, None]:
                return jax.tree.map(jnp.add, total, gradients_of(state.params, *part)), None

            zero = jax.tree.map(
                lambda leaf: jnp.zeros(leaf.shape, leaf.dtype),
                jax.eval_shape(gradients_of, state.params, keys[0], *(p[0] for p in parts)),
            )
            total, _ = jax.lax.scan(add, zero, (keys, *parts))
            gradients, losses = jax.tree.map(lambda leaf: leaf / config.accumulate, total)
        updates, opt_state = transform.update(gradients, state.opt_state, state.params)
        updates = jax.tree.map(lambda leaf: left * leaf, updates)
        params = optax.apply_updates(state.params, updates)
        decay = jnp.minimum(config.ema_decay, (1 + state.step) / (10 + state.step))
        ema = jax.tree.map(lambda a, b: decay * a + (1 - decay) * b, state.ema, params)
        return TrainState(step=state.step + 1, params=params, ema=ema, opt_state=opt_state), losses

    out_shardings = None if placed is None else (placed, None)
    return jax.jit(train_step, donate_argnums=0, out_shardings=out_shardings)


def _trim_log(path: Path, last_step: int) -> float:
    """Drop the lines after ``last_step``, which a resumed run writes again, and a torn one.

    Returns:
        Seconds that the run had taken until then.
    """
    if not path.exists():
        return 0.0
    with files.reading(path):
        lines = path.read_text().splitlines(keepends=True)
        whole = [line for line in lines if line.endswith("\n")]
        kept = [line for line in whole if json.loads(line)["step"] <= last_step]
    files.write_text(path, "".join(kept))
    return json.loads(kept[-1])["seconds"] if kept else 0.0


def _drawn(
    task: Task, config: TrainConfig, key: jax.Array, placed: Any, steps: range
) -> Generator[Batch]:
    """Batches that the devices draw, each a function of the key and its step alone."""
    assert task.drawing is not None

    def draw(drawing: Any, step: jax.Array) -> Batch:
        grown = jnp.minimum((step + 1).astype(jnp.float32) / max(1, config.curriculum), 1)
        return drawing(jax.random.fold_in(key, step), config.batch_size, config.distortion, grown)

    drawing, compiled = task.drawing(config.seed), jax.jit(draw, out_shardings=placed)
    return (compiled(drawing, np.int32(step)) for step in steps)


def _check(task: Task, model: Config, config: TrainConfig) -> None:
    """Refuse what does not go together.

    Raises:
        ValueError: names the rule, the value, and what fits.
    """
    made, needed = (
        f"{each.image_shape} in {each.grid[0]} x {each.grid[1]} patches" for each in (model, task)
    )
    if made != needed:
        raise ValueError(f"the model makes images {made}, the task {task.name} needs {needed}")
    if config.optimizer == "muon" and not isinstance(model, TransformerConfig):
        raise ValueError("optimizer='muon' is for the layers of a TransformerConfig, use 'adamw'")
    if config.data == "device" and task.drawing is None:
        raise ValueError(f"no device draws batches of {task.name}, use data='host'")
    for name, value, alone in (("minutes", config.minutes, None), ("data", config.data, "host")):
        if value != alone and jax.process_count() > 1:
            raise ValueError(f"{name} must be {alone!r} for several processes, got {value!r}")


def train(
    task: Task,
    model: Config,
    config: TrainConfig,
    folder: str | os.PathLike[str],
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
        the last line, seconds per step, and seconds that the run has taken, in all sittings.

    Raises:
        ValueError: the folder holds a run of another configuration, or something else;
            ``num_workers`` is not for this task; there are no such weights; task, model,
            configuration and the number of processes do not go together; or the batch cannot be
            shared equally: nothing has been written. Or no checkpoint is whole; a damaged one gives
            way, with a warning, to the one before.
        PreemptionError: ``preempted`` said so; the state is saved.
        FloatingPointError: a loss or a parameter is not finite; names the step, counted from 1 as
            in the log. It is found in time for the next log line, before anything is saved.
    """
    began_run = time.perf_counter()
    folder = checkpoint.check_path(folder)
    loader.check_workers(task.training_batch, num_workers)
    mesh = sharding.data_mesh() if mesh is None else mesh
    _check(task, model, config)
    if config.batch_size % mesh.size:
        raise ValueError(
            f"batch_size must be a multiple of the {mesh.size} devices, got {config.batch_size}"
        )
    configuration = {
        "task": task.name,
        "model": dataclasses.asdict(model),
        "training": dataclasses.asdict(config),
    }
    given = None if config.weights is None else weights(config.weights, model, config.seed)
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
        saved = resume.restore(manager, wanted)
        start, state = saved or (0, sharding.place(init(model, config, given), placed))
        log = folder / "log.jsonl"
        before = _trim_log(log, start) if leads else 0.0

        def progress() -> float:
            """The share of the minutes that is over; 0 if they do not matter."""
            if config.minutes is None:
                return 0.0
            seconds = before + time.perf_counter() - began_run
            return min(1.0, seconds / (60 * config.minutes))

        steps = range(start, start if start and progress() == 1 else config.num_steps)
        if config.data == "device":
            batches = _drawn(task, config, keys.data, sharding.rows(mesh), steps)
        else:
            batches = loader.load(
                task.training_batch,
                config.seed,
                config.batch_size,
                steps,
                num_workers,
                (jax.process_index(), jax.process_count()),
            )
        stack.enter_context(contextlib.closing(batches))
        everywhere = sharding.whole(mesh)
        inverse = sharding.place(inverse, everywhere)
        step_key = jax.random.wrap_key_data(
            sharding.place(jax.random.key_data(keys.step), everywhere)
        )
        recent: list[objective.Losses] = []
        began = time.perf_counter()
        for done, batch in enumerate(batches, start + 1):
            if config.data == "host":
                batch = jax.make_array_from_process_local_data(sharding.rows(mesh), batch)
            share = progress()
            left = DECAYS[config.decay](np.float32(share)) if share else np.float32(1)
            state, losses = train_step(state, step_key, batch, inverse, left)
            recent.append(losses)
            jax.block_until_ready(recent[-3:-2])  # or a signal would wait for many steps
            stop = preempted(done)
            ended = done == config.num_steps or progress() == 1
            save = stop or ended or done % config.save_every == 0
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
            line["seconds"] = before + time.perf_counter() - began_run
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
            if ended:
                break
    if not (folder / "model").exists():
        provenance = {"task": task.name, "training": dataclasses.asdict(config)}
        checkpoint.save(folder / "model", model, state.ema, provenance)
