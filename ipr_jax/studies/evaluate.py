"""Refine many samples of a task and score them after every iteration."""

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ipr_jax.core import Denoiser, check, sample_keys
from ipr_jax.interrupts import PreemptionError
from ipr_jax.methods import Refinement, Stop, Streamed, iterate_of, selection, stopping, stream
from ipr_jax.runtime import Program, memory, sharding
from ipr_jax.sampling import Sampled, first_pass_of
from ipr_jax.studies import metrics
from ipr_jax.tasks import Batch, Task


class Progress(NamedTuple):
    """The samples after an iteration; 0 is the first pass, or the input. N samples.

    Attributes:
        iteration: how many are done.
        image: float32 [N, H, W, C], still on the device.
        scores: the task's, by name, each [N]; those that are bool are False where not finite.
        finite: bool [N]; False = not a number somewhere, to be left out of every rate.
        nfe: int64 [N], network evaluations so far, that each sample's schedules took.
        compile_seconds: before the first pass.
        seconds: since then.
        iteration_seconds: of this iteration.
        batch_size: samples per compiled call, in this iteration.
    """

    iteration: int
    image: jax.Array | np.ndarray
    scores: dict[str, np.ndarray]
    finite: np.ndarray
    nfe: np.ndarray
    compile_seconds: float
    seconds: float
    iteration_seconds: float
    batch_size: int


def evaluate(
    task: Task,
    denoise: Denoiser,
    batch: Batch,
    experiment: Refinement,
    key: jax.Array,
    *,
    batch_size: memory.Size = 64,
    mesh: Mesh | None = None,
    first: int = 0,
    done: Progress | None = None,
    preempted: Callable[[], bool] = lambda: False,
) -> Iterator[Progress]:
    """Complete a batch of puzzles, refine them, and score them after every iteration.

    Args:
        task: whose scores.
        denoise: the model.
        batch: N images with their clues.
        experiment: what to do.
        key: of the run; sample i uses the i-th of ``sample_keys(key, N, first=first)``.
        batch_size: samples per compiled call, at least 1, or "auto", as many as fit on the device;
            halved, with a warning, when its memory is full. Results are the same up to the rounding
            of the network.
        mesh: the devices that share every batch, from ``sharding.data_mesh``; None = all of this
            process. The batch size is rounded up to a multiple of them.
        first: index of the first sample of the batch in the run, at least 0.
        done: the progress to go on from, of the same batch; its image, finite, nfe and iteration
            are read. None = from the beginning.
        preempted: asked again and again, whether to end; the device is not waited for.

    Returns:
        An iterator over the progress after the first pass and after every iteration, or after every
        one that is not done.

    Raises:
        ValueError: the batch is not one of images and masks, a clue or ``batch_size`` is out of
            range.
        MemoryError: with "auto", if a single sample does not fit.
        PreemptionError: ``preempted`` said so.
        jax.errors.JaxRuntimeError: from the device, whose memory is full even at one sample.
    """
    check.count("batch_size", batch_size, auto=True)
    keys = sample_keys(key, len(batch.image), first=first)
    check.batch(keys, batch.image, batch.editable)
    check.clues(batch.image, batch.editable)
    if experiment.first is None:
        check.samples(batch.image, batch.editable)
    mesh = sharding.of_samples(mesh)
    denoise = check.as_pytree(denoise)
    return _run(task, denoise, batch, experiment, keys, batch_size, mesh, done, preempted)


def _run(
    task: Task,
    denoise: Denoiser,
    batch: Batch,
    experiment: Refinement,
    keys: jax.Array,
    batch_size: memory.Size,
    mesh: Mesh | None,
    done: Progress | None,
    preempted: Callable[[], bool],
) -> Iterator[Progress]:
    number, num_patches = len(keys), batch.editable[0].size
    sizes = selection.region_sizes(num_patches, experiment.ratio)
    settings = experiment.later.settings(num_patches)
    score = jax.jit(task.score)
    begin = 0 if done is None else done.iteration + 1
    devices, placed = (1, None) if mesh is None else (mesh.size, sharding.rows(mesh))

    def program(iteration: int, keys: Any, image: Any, editable: Any) -> Program[Sampled]:
        if iteration == 0 and experiment.first is not None:
            first = experiment.first
            arguments = (denoise, keys, image, editable, first.settings(num_patches))
            return Program(first_pass_of, arguments, {"order": first.order, "mesh": mesh})
        return Program(
            iterate_of,
            (denoise, keys, image, editable, iteration, sizes, settings),
            {
                "order": experiment.later.order,
                "select": experiment.select,
                "noise": experiment.noise,
                "mesh": mesh,
            },
        )

    def perform(iteration: int, keys: jax.Array, image: jax.Array, editable: np.ndarray) -> _Done:
        if iteration == 0 and experiment.first is None:
            sampled = Sampled(image, jnp.zeros(len(keys), jnp.int32), jnp.ones(len(keys), bool))
        else:
            given = jax.device_put((keys, image, editable), placed)
            sampled = program(iteration, *given).run()
        scores = score(sampled.image)
        return sampled, {name: scores[name] for name in (*task.rates, *task.means)}

    def warm_up(each: int) -> None:
        """Compile everything; with nothing editable, the loops run zero times."""
        rows = _batches(number, each * devices)[0]
        warm, nothing = image[rows], np.zeros_like(batch.editable[rows])
        for iteration in kinds:
            warm = jax.block_until_ready(perform(iteration, keys[rows], warm, nothing))[0].image

    def advance(iteration: int, image: jax.Array, each: int) -> _Done:
        """All samples, ``each`` at once on a device; all but the images on the host."""
        parts: list[_Done] = []
        for rows in _batches(number, each * devices):
            if preempted():
                raise PreemptionError
            parts.append(perform(iteration, keys[rows], image[rows], batch.editable[rows]))
        _wait(parts, preempted)
        images = jnp.concatenate([sampled.image for sampled, _ in parts])[:number]
        cost, ok, scores = jax.tree.map(
            lambda *pieces: np.concatenate(pieces)[:number],
            *jax.device_get([(sampled.nfe, sampled.finite, scores) for sampled, scores in parts]),
        )
        return Sampled(images, cost, ok), scores

    start = time.perf_counter()
    image = jnp.asarray(batch.image if done is None else done.image)
    iterations = range(begin, experiment.iterations + 1)
    kinds = sorted({min(iteration, 1) for iteration in iterations})
    if not kinds:
        return

    def shapes(each: int) -> Program[Sampled]:
        """What most of the time is spent in, to compile only."""
        given = (
            jax.ShapeDtypeStruct((each * devices, *part.shape[1:]), part.dtype, sharding=placed)
            for part in (keys, image, batch.editable)
        )
        return program(kinds[-1], *given)

    # From here on, sizes are those of one device.
    size = batch_size if batch_size == "auto" else -(-batch_size // devices)
    size = memory.choose(size, -(-number // devices), shapes, besides=2 * image.nbytes)
    _, size = memory.halving(warm_up, size)
    compiled = time.perf_counter()

    before = compiled
    nfe, finite = np.zeros(number, np.int64), np.ones(number, bool)
    if done is not None:
        nfe, finite = done.nfe, done.finite
    for iteration in iterations:
        (sampled, scores), size = memory.halving(partial(advance, iteration, image), size)
        image, now = sampled.image, time.perf_counter()
        nfe, finite = nfe + sampled.nfe, finite & sampled.finite
        yield Progress(
            iteration=iteration,
            image=image,
            scores=_of_finite(scores, finite),
            finite=finite,
            nfe=nfe,
            compile_seconds=compiled - start,
            seconds=now - compiled,
            iteration_seconds=now - before,
            batch_size=size * devices,
        )
        before = time.perf_counter()


_Done = tuple[Sampled, dict[str, Any]]
"""The samples and their scores, by name."""


def _wait(arrays: Any, preempted: Callable[[], bool]) -> None:
    """Until arrays are computed, or ``PreemptionError``; adds up to 1% to the time they take."""
    start = time.perf_counter()
    while not all(leaf.is_ready() for leaf in jax.tree.leaves(arrays)):
        if preempted():
            raise PreemptionError
        time.sleep(min(0.05, 1e-4 + 0.01 * (time.perf_counter() - start)))


def _batches(number: int, size: int) -> np.ndarray:
    """Which samples are in each batch; copies of sample 0, to be dropped, fill up the last one."""
    rows = np.arange(-(-number // size) * size)
    return np.where(rows < number, rows, 0).reshape(-1, size)


def _of_finite(scores: dict[str, np.ndarray], finite: np.ndarray) -> dict[str, np.ndarray]:
    """Scores by name, each [N]; those that are bool are False where a sample is not finite."""
    return {
        name: values & finite if values.dtype == np.bool_ else values
        for name, values in scores.items()
    }


def evaluate_stream(
    task: Task,
    denoise: Denoiser,
    batch: Batch,
    experiment: Refinement,
    key: jax.Array,
    *,
    slots: int = 64,
    stop: Stop = stopping.never,
    patience: int = 1,
) -> tuple[Progress, Streamed]:
    """Complete a batch of puzzles and refine them by ``stream``, and score them at the end.

    Args:
        task: whose scores.
        denoise: the model.
        batch: N images with their clues.
        experiment: what to do, with at least 1 iteration.
        key: of the run; sample i uses the i-th of ``sample_keys(key, N)``.
        slots: samples that the network sees at once, at least 1.
        stop: which samples may leave early.
        patience: how often in a row ``stop`` must hold, at least 1.

    Returns:
        The progress at the end, whose iteration is the most that a sample may have and whose times
        are without scoring; and what ``stream`` gives.

    Raises:
        ValueError: as ``stream``.
    """
    number = len(batch.image)
    keys = sample_keys(key, number)

    def run(image: np.ndarray, editable: np.ndarray) -> Streamed:
        found = stream(
            denoise,
            keys,
            image,
            editable,
            iterations=experiment.iterations,
            slots=slots,
            ratio=experiment.ratio,
            first=experiment.first,
            later=experiment.later,
            select=experiment.select,
            noise=experiment.noise,
            stop=stop,
            patience=patience,
        )
        return jax.block_until_ready(found)

    start = time.perf_counter()
    # With nothing editable, the loop runs zero times: this compiles and does nothing else.
    run(np.zeros_like(batch.image), np.zeros_like(batch.editable))
    compiled = time.perf_counter()
    found = run(batch.image, batch.editable)
    seconds = time.perf_counter() - compiled
    score, finite = jax.jit(task.score), np.asarray(found.finite)
    parts = [score(found.image[rows]) for rows in _batches(number, min(slots, number))]
    scores = {
        name: np.concatenate([part[name] for part in parts])[:number]
        for name in (*task.rates, *task.means)
    }
    progress = Progress(
        iteration=experiment.iterations,
        image=found.image,
        scores=_of_finite(scores, finite),
        finite=finite,
        nfe=np.asarray(found.nfe, np.int64),
        compile_seconds=compiled - start,
        seconds=seconds,
        iteration_seconds=seconds,
        batch_size=min(slots, number),
    )
    return progress, found


def summarise(progress: Progress, task: Task) -> metrics.Line:
    """``metrics.line`` of a progress, with iteration, batch_size, seconds (without compilation) and
    samples_per_second (of this iteration).
    """
    found = metrics.line(metrics.tally(progress.scores, progress.finite, progress.nfe), task.means)
    return found | {
        "iteration": progress.iteration,
        "batch_size": progress.batch_size,
        "seconds": progress.seconds,
        "samples_per_second": len(progress.finite) / progress.iteration_seconds,
    }


def summarise_stream(progress: Progress, task: Task, found: Streamed) -> metrics.Line:
    """``summarise`` of a stream, and what it saved, with 95% intervals.

    Returns:
        Also iterations (mean) with iterations_low and iterations_high; left_early (how many samples
        had fewer than the most) with left_early_rate, left_early_low and left_early_high; wasted
        (the share of the slot evaluations). samples_per_second is that of the whole.
    """
    iterations = np.asarray(found.iterations)
    early = int((iterations < progress.iteration).sum())
    return (
        summarise(progress, task)
        | metrics.mean("iterations", metrics.Moments.of(iterations), progress.iteration)
        | metrics.rate("left_early", early, len(iterations))
        | {"wasted": found.wasted}
    )
