"""Refine many samples of a task and score them after every iteration."""

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ipr_jax.core import Denoiser, check, sample_keys
from ipr_jax.interrupts import PreemptionError
from ipr_jax.methods import INPUT, Solved, advance_on, begin_on, of_grid, solve
from ipr_jax.methods.engine import Costs, Problem, State
from ipr_jax.runtime import Program, memory, sharding
from ipr_jax.studies import metrics
from ipr_jax.tasks import Batch, Task

CHUNK_SECONDS = 20.0
"""About how long the devices compute before the host has the state to go on from; one evaluation of
all samples may take longer."""


class Progress(NamedTuple):
    """The samples after an iteration; 0 is the first pass, or the input. N samples.

    Attributes:
        iteration: how many are done.
        image: float32 [N, H, W, C], still on the device.
        state: of the engine, likewise, all that is needed to go on; None of a queue.
        scores: the task's, by name, each [N]; those that are bool are False where not finite.
        finite: bool [N]; False = not a number somewhere, to be left out of every rate.
        costs: int64 [N] each, so far.
        compile_seconds: before the first pass.
        seconds: since then.
        iteration_seconds: of this iteration.
        batch_size: samples per compiled call, in this iteration.
        doubt: float32 [N, h, w], by how much the network doubts each patch, of methods that tell it
            by ``doubts(state)``; else None.
    """

    iteration: int
    image: jax.Array
    state: State | None
    scores: dict[str, np.ndarray]
    finite: np.ndarray
    costs: Costs
    compile_seconds: float
    seconds: float
    iteration_seconds: float
    batch_size: int
    doubt: np.ndarray | None = None


def last_iteration(experiment: Any) -> int:
    """The number of the last iteration of a method that tells its ``passes`` and ``start``.

    Iteration 0 is its first one, or the input.

    Raises:
        ValueError: it does not tell them.
    """
    if not all(hasattr(experiment, name) for name in ("passes", "start")):
        raise ValueError(
            "a method whose iterations are scored must tell passes and start, see "
            f"docs/methods.md; got {check.told(experiment)}"
        )
    return experiment.passes - int(experiment.start != INPUT)


def evaluate(
    task: Task,
    denoise: Denoiser,
    batch: Batch,
    experiment: Any,
    key: jax.Array,
    *,
    batch_size: memory.Size = 64,
    mesh: Mesh | None = None,
    first: int = 0,
    done: tuple[int, State] | None = None,
    preempted: Callable[[], bool] = lambda: False,
    keep: Callable[[State], Any] = lambda state: None,
) -> Iterator[Progress]:
    """Complete a batch of puzzles, refine them, and score them after every iteration.

    Args:
        task: whose scores.
        denoise: the model.
        batch: N images with their clues.
        experiment: what to do: a ``Refinement``, or another method that tells ``passes``, how many
            iterations it has, and ``start``, what iteration 0 is.
        key: of the run; sample i uses the i-th of ``sample_keys(key, N, first=first)``.
        batch_size: samples per compiled call, at least 1, or "auto", as many as fit on the device;
            halved, with a warning, when its memory is full. Results are the same up to the rounding
            of the network.
        mesh: the devices that share every batch, from ``sharding.data_mesh``; None = all of this
            process. The batch size is rounded up to a multiple of them.
        first: index of the first sample of the batch in the run, at least 0.
        done: the last iteration that is over (-1 = none) and the state to go on from, of the same
            batch; None = from the beginning.
        preempted: asked again and again, whether to end; the device is not waited for.
        keep: given the state to go on from about every ``CHUNK_SECONDS`` within an iteration.

    Returns:
        An iterator over the progress after the first pass and after every iteration, or after every
        one that is not done.

    Raises:
        ValueError: the batch is not one of images and masks, a clue or ``batch_size`` is out of
            range, or as ``Task.check_scores``.
        MemoryError: with "auto", if a single sample does not fit.
        PreemptionError: ``preempted`` said so.
        jax.errors.JaxRuntimeError: from the device, whose memory is full even at one sample.
    """
    check.count("batch_size", batch_size, auto=True)
    task.check_scores()
    keys = sample_keys(key, len(batch.image), first=first)
    check.batch(keys, batch.image, batch.editable)
    check.clues(batch.image, batch.editable)
    last_iteration(experiment)
    if experiment.start == INPUT:
        check.samples(batch.image, batch.editable)
    shared = sharding.of_samples(mesh)
    most = sharding.rows_at_once(mesh, batch.editable.shape[1:])
    denoise = check.as_pytree(denoise)
    return _run(
        task, denoise, batch, experiment, keys, batch_size, most, shared, done, preempted, keep
    )


def _run(
    task: Task,
    denoise: Denoiser,
    batch: Batch,
    experiment: Any,
    keys: jax.Array,
    batch_size: memory.Size,
    most: int | None,
    mesh: Mesh | None,
    done: tuple[int, State] | None,
    preempted: Callable[[], bool],
    keep: Callable[[State], Any],
) -> Iterator[Progress]:
    number, grid = len(keys), batch.editable.shape[1:]
    method, last = of_grid(experiment, grid), last_iteration(experiment)
    devices, placed = (1, None) if mesh is None else (mesh.size, sharding.rows(mesh))
    score, told = jax.jit(task.score), (*task.rates, *task.means)
    doubts = (made := getattr(method, "doubts", None)) and jax.jit(made)

    def in_parts(
        each: int, function: Callable[..., Any], which: np.ndarray, *trees: Any
    ) -> list[Any]:
        """A function of arrays [N, ...], or [N p, ...] where a sample has p particles, of some
        samples, ``each`` at once on a device; the last part is filled up by copies.
        """
        parts, batches = [], _batches(len(which), each * devices)
        whole = len(which) == number == each * devices
        for places in batches:
            if preempted():
                raise PreemptionError
            own = trees if whole else [_take(tree, which[places], number) for tree in trees]
            parts.append(function(*jax.device_put(own, placed)))
        _wait(parts, preempted)
        return parts

    def advance(problem: Problem, state: State, passes: int, ticks: int) -> State:
        if not experiment.passes:
            return state
        return advance_on(denoise, method, problem, state, passes, ticks, most=most, mesh=mesh)

    def scores_of(image: jax.Array) -> dict[str, jax.Array]:
        scores = score(image)
        return {name: scores[name] for name in told}

    def score_some(
        each: int, which: np.ndarray, image: jax.Array | np.ndarray
    ) -> dict[str, np.ndarray]:
        """The scores of some samples."""
        parts = jax.device_get(in_parts(min(each, most or each), scores_of, which, image))
        return {name: np.concatenate([part[name] for part in parts])[: len(which)] for name in told}

    def of_all(each: int, function: Callable[..., State], *trees: Any) -> State:
        """A state that a function makes of all samples."""
        parts = in_parts(each, function, every, *trees)
        return parts[0] if number == each * devices else _joined(parts, each * devices, number)

    start, every = time.perf_counter(), np.arange(number)
    problem = Problem(keys, jnp.asarray(batch.image), jnp.asarray(batch.editable))
    begin = 0 if done is None else done[0] + 1
    iterations = range(begin, last + 1)
    if not iterations:
        return

    def program(each: int) -> Program[State]:
        """What most of the time is spent in, to compile only."""
        shapes = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(
                (leaf.shape[0] // number * each * devices, *leaf.shape[1:]),
                leaf.dtype,
                sharding=placed,
            ),
            (problem, jax.eval_shape(method.init, problem)),
        )
        static = {"most": most, "mesh": mesh}
        return Program(advance_on, (denoise, method, *shapes, 0, 0), static)

    def warm_up(each: int) -> None:
        """Compile everything; of no iterations, the loop runs zero times."""
        own = _take(problem, _batches(number, each * devices)[0], number)
        own = jax.device_put(own, placed)
        state = advance(own, begin_on(method, own, mesh=mesh), 0, 0)
        score_some(each, every[:1], batch.image)
        jax.block_until_ready(state)

    # From here on, sizes are those of one device.
    size = batch_size if batch_size == "auto" else -(-batch_size // devices)
    size = memory.choose(size, -(-number // devices), program, besides=4 * batch.image.nbytes)
    _, size = memory.halving(warm_up, size)
    if done is None:
        state = of_all(size, partial(begin_on, method, mesh=mesh), problem)
    else:
        state = jax.tree.map(jnp.asarray, done[1])
    compiled = before = time.perf_counter()
    scored: jax.Array | None = None
    scores: dict[str, np.ndarray] = {}
    found: Any = None
    pace: float | None = None  # seconds that an evaluation of a part takes
    for iteration in iterations:
        if found is None or not found[-1]:  # once all are done, nothing changes any more
            passes = iteration + experiment.passes - last
            while active := _active(state, passes, size * devices):
                ticks = 1 if pace is None else max(1, round(CHUNK_SECONDS / (pace * active)))
                run = partial(advance, passes=passes, ticks=ticks)
                begun = time.perf_counter()
                state, size = memory.halving(
                    lambda each: of_all(each, run, problem, state),  # noqa: B023
                    size,
                )
                if _active(state, passes, size * devices):
                    keep(state)
                    pace = (time.perf_counter() - begun) / (ticks * active)
            changed = every if scored is None else np.flatnonzero(_differ(state.image, scored))
            scored = state.image
            if len(changed):
                new, size = memory.halving(
                    lambda each: score_some(each, changed, state.image),  # noqa: B023
                    size,
                )
                scores = {name: _with(scores.get(name), changed, new[name]) for name in told}
            found = jax.device_get((state.finite, state.costs, state.done.all()))
        finite, costs, _ = found
        now = time.perf_counter()
        yield Progress(
            iteration=iteration,
            image=state.image,
            state=state,
            scores=_of_finite(scores, finite),
            finite=finite,
            costs=jax.tree.map(np.int64, costs),
            compile_seconds=compiled - start,
            seconds=now - compiled,
            iteration_seconds=now - before,
            batch_size=size * devices,
            doubt=None if doubts is None else np.asarray(doubts(state)),
        )
        before = time.perf_counter()


def _active(state: State, passes: int, size: int) -> int:
    """In how many parts of a size there is something to do until all have so many iterations."""
    done, iteration = jax.device_get((state.done, state.iteration))
    waiting = ~done & (iteration < passes)
    return int(waiting[_batches(len(waiting), size)].any(axis=1).sum())


@partial(jax.jit, static_argnames="number")
def _take(tree: Any, rows: jax.Array | np.ndarray, number: int) -> Any:
    """Some samples of arrays [N, ...], or [N p, ...] where a sample has p particles."""

    def some(leaf: jax.Array) -> jax.Array:
        particles = len(leaf) // number  # said, not -1: a leaf may be of size 0
        split = leaf.reshape(number, particles, *leaf.shape[1:])
        return split[rows].reshape(len(rows) * particles, *leaf.shape[1:])

    return jax.tree.map(some, tree)


@partial(jax.jit, static_argnames=("size", "number"))
def _joined(parts: Sequence[Any], size: int, number: int) -> Any:
    """The first samples of parts of a size, particles as above."""

    def join(*leaves: jax.Array) -> jax.Array:
        return jnp.concatenate(leaves)[: len(leaves[0]) // size * number]

    return jax.tree.map(join, *parts)


@jax.jit
def _differ(image: jax.Array, other: jax.Array) -> jax.Array:
    """Which of the images [N, ...] are not the same as the others: bool [N]."""
    return (image != other).any(axis=tuple(range(1, image.ndim)))


def _with(values: np.ndarray | None, rows: np.ndarray, new: np.ndarray) -> np.ndarray:
    """A copy of values [N] with new ones in some rows; None = in all."""
    if values is None:
        return new
    values = values.copy()
    values[rows] = new
    return values


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
        name: values & finite if values.dtype == np.bool_ else values.copy()
        for name, values in scores.items()
    }


def evaluate_stream(
    task: Task,
    denoise: Denoiser,
    batch: Batch,
    experiment: Any,
    key: jax.Array,
    *,
    slots: int = 64,
) -> tuple[Progress, Solved]:
    """Complete a batch of puzzles and refine them as a queue, and score them at the end.

    Args:
        task: whose scores.
        denoise: the model.
        batch: N images with their clues.
        experiment: what to do.
        key: of the run; sample i uses the i-th of ``sample_keys(key, N)``.
        slots: samples at work at once, at least 1.

    Returns:
        The progress at the end, whose iteration is the most that a sample may have and whose times
        are without scoring; and what ``solve`` gives, its iterations without the first pass.

    Raises:
        ValueError: as ``solve``, or as ``Task.check_scores``.
    """
    task.check_scores()
    number = len(batch.image)
    keys = sample_keys(key, number)

    def run(editable: np.ndarray) -> Solved:
        found = solve(denoise, keys, batch.image, editable, method=experiment, slots=slots)
        return jax.block_until_ready(found)

    start = time.perf_counter()
    run(np.zeros_like(batch.editable))  # compiles: with nothing editable, the loop runs zero times
    compiled = time.perf_counter()
    found = run(batch.editable)
    seconds = time.perf_counter() - compiled
    last = last_iteration(experiment)
    iterations = np.asarray(found.iterations) - (experiment.passes - last)
    found = found._replace(iterations=np.maximum(iterations, 0))
    score, finite = jax.jit(task.score), np.asarray(found.finite)
    parts = [score(found.image[rows]) for rows in _batches(number, min(slots, number))]
    scores = {
        name: np.concatenate([part[name] for part in parts])[:number]
        for name in (*task.rates, *task.means)
    }
    progress = Progress(
        iteration=last,
        image=found.image,
        state=None,
        scores=_of_finite(scores, finite),
        finite=finite,
        costs=jax.tree.map(np.int64, Costs(found.nfe, found.nbe, found.nve)),
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
    tally = metrics.tally(progress.scores, progress.finite, progress.costs)
    return metrics.line(tally, task.means) | {
        "iteration": progress.iteration,
        "batch_size": progress.batch_size,
        "seconds": progress.seconds,
        "samples_per_second": len(progress.finite) / progress.iteration_seconds,
    }


def summarise_stream(progress: Progress, task: Task, found: Solved) -> metrics.Line:
    """``summarise`` of a stream, and what it saved, with 95% intervals.

    Returns:
        Also iterations (mean) with iterations_low and iterations_high; left_early (how many samples
        had fewer than the most) with left_early_rate, left_early_low and left_early_high; wasted
        (the share of the rows that the network saw). samples_per_second is that of the whole.
    """
    iterations = np.asarray(found.iterations)
    early = int((iterations < progress.iteration).sum())
    return (
        summarise(progress, task)
        | metrics.mean("iterations", metrics.Moments.of(iterations), progress.iteration)
        | metrics.rate("left_early", early, len(iterations))
        | {"wasted": found.idle}
    )
