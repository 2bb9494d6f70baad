"""Refine any number of samples into files of a fixed number each, in bounded memory.

A run is a folder. ``samples/00000.npz`` has its first samples, ``samples/00000.json`` the checksum
of that file and what to add up of it: samples are done when that record is there. ``state-0/`` has
how far process 0 is with its next samples. Of n processes each takes every n-th file and waits for
none; the one that finds all records writes ``metrics.jsonl`` and ``manifest.json``.
"""

import contextlib
import dataclasses
import json
import math
import os
import shutil
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial, reduce
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np

from ipr_jax.core import Denoiser, check, sample_keys
from ipr_jax.interrupts import PreemptionError
from ipr_jax.methods import engine, of_grid
from ipr_jax.runtime import files, memory, snapshots
from ipr_jax.studies import metrics
from ipr_jax.studies.evaluate import Progress, evaluate, last_iteration
from ipr_jax.studies.metrics import Line, Moments, Tally
from ipr_jax.tasks import Batch, Task

Tree = TypeVar("Tree")

FOLLOWED = 64
"""Of how many samples of a run the images of every iteration are kept."""

FOLLOWED_BYTES = 2**25
"""What these images may take; of as many as fit, but of at least 8 samples."""

MADE_AT_ONCE = 64
"""Samples; a run that is told to end does not wait for more of them."""

Tallies = list[Tally]
"""Of the same samples, after the first pass (or of the input) and after every iteration."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Storage:
    """How a run is kept.

    Attributes:
        shard_size: samples per file.
        dtype: of the images in files: uint8, 0 to 255 for -1 to 1, or float32.
        save_minutes: between two checkpoints of the samples in work; 0 = whenever there is news:
            after every iteration, and about every ``evaluate.CHUNK_SECONDS`` in a long one.

    Raises:
        ValueError: a value is out of range, naming it and the range.
    """

    shard_size: int = 4096
    dtype: str = "uint8"
    save_minutes: float = 5.0

    def __post_init__(self) -> None:
        check.count("shard_size", self.shard_size)
        if self.dtype not in ("uint8", "float32"):
            raise ValueError(f"dtype must be uint8 or float32, got {self.dtype!r}")
        if not self.save_minutes >= 0:
            raise ValueError(f"save_minutes must be at least 0, got {self.save_minutes}")

    def stored(self, images: Any) -> np.ndarray:
        """Images in [-1, 1] as they are in files; what is not a number is 0 in uint8."""
        images = np.asarray(images)
        if self.dtype == "float32":
            return images
        return np.clip(np.rint(np.nan_to_num(127.5 * (images + 1), nan=0.0)), 0, 255).astype("u1")


def to_float(images: np.ndarray) -> np.ndarray:
    """Images from files as float32 in [-1, 1]; those that are uint8 are off by up to 1 / 255."""
    return images.astype(np.float32) / 127.5 - 1 if images.dtype == np.uint8 else images


class Shard(NamedTuple):
    """The samples of a file: its number, the index of its first sample, how many there are."""

    number: int
    first: int
    samples: int

    def path(self, folder: Path, suffix: str) -> Path:
        """Where a run has it."""
        return folder / "samples" / f"{self.number:05}{suffix}"


class State(NamedTuple):
    """What is known of the n samples of a file, R iterations and a first pass.

    They are refined b at a time. All but the images in work is filled in as it becomes known.

    Attributes:
        samples: int32 [], of how many everything is known.
        iteration: int32 [], the last that the next b samples have behind them; -1 = none.
        work: of those, all [b, ...]: where the engine is with them, also within an iteration; 0
            before the first evaluation.
        first_pass: as stored, [n, H, W, C].
        refined: as stored, [n, H, W, C].
        followed: as stored, [R + 1, k, H, W, C], the first samples of the run; None for others.
        costs: int32 [R + 1, n] each, so far.
        broke_at: int32 [n], the first iteration after which a sample is not finite, or -1.
        doubt: float32 [n, h, w], by how much the network doubts the patches of the refined images;
            None of methods that do not tell.
        scores: by name, each [R + 1, n].
    """

    samples: Any
    iteration: Any
    work: engine.State
    first_pass: Any
    refined: Any
    followed: Any
    costs: engine.Costs
    broke_at: Any
    doubt: Any
    scores: dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """Samples to refine.

    Attributes:
        task: whose scores.
        denoise: the model.
        source: ``indices [n] -> Batch``, the samples of these indices.
        experiment: what to do, as for ``evaluate``.
        samples: how many, at least 1.
        seed: of the noise; the keys are ``sample_keys(jax.random.key(seed), samples)``.
        batch_size: samples per compiled call, as for ``evaluate``, and in work at once; with "auto"
            all of a file are.
        storage: how they are kept.

    Raises:
        ValueError: a value is out of range, naming it and the range.
    """

    task: Task
    denoise: Denoiser
    source: Callable[[np.ndarray], Batch]
    experiment: Any
    samples: int
    seed: int
    batch_size: memory.Size = 64
    storage: Storage = Storage()

    def __post_init__(self) -> None:
        check.count("samples", self.samples)
        check.count("batch_size", self.batch_size, auto=True)
        check.seed(self.seed)
        last_iteration(self.experiment)

    @property
    def shards(self) -> list[Shard]:
        """All files."""
        size = self.storage.shard_size
        return [
            Shard(number, first, min(size, self.samples - first))
            for number, first in enumerate(range(0, self.samples, size))
        ]

    @property
    def passes(self) -> int:
        """Over every sample: the first pass and the iterations."""
        return last_iteration(self.experiment) + 1

    def state(self, shard: Shard) -> State:
        """Its shapes and dtypes: the tree of ``jax.ShapeDtypeStruct``."""
        n, shape, grid = shard.samples, self.task.image_shape, self.task.grid
        b = n if self.batch_size == "auto" else min(n, self.batch_size)
        image = jax.ShapeDtypeStruct((b, *shape), np.float32)
        editable = jax.ShapeDtypeStruct((b, *grid), np.bool_)
        given = jax.eval_shape(lambda: sample_keys(jax.random.key(0), b)), image, editable
        method = of_grid(self.experiment, grid)
        work = jax.eval_shape(lambda *given: method.init(engine.Problem(*given)), *given)
        images = jax.ShapeDtypeStruct((n, *shape), np.dtype(self.storage.dtype))
        passes, stored = self.passes, images.dtype
        scores = jax.eval_shape(self.task.score, image)
        each = passes * math.prod(shape) * stored.itemsize
        followed = (passes, min(n, FOLLOWED, max(8, FOLLOWED_BYTES // each)), *shape)
        return State(
            samples=jax.ShapeDtypeStruct((), np.int32),
            iteration=jax.ShapeDtypeStruct((), np.int32),
            work=work,
            first_pass=images,
            refined=images,
            followed=None if shard.number else jax.ShapeDtypeStruct(followed, stored),
            costs=jax.tree.map(lambda _: jax.ShapeDtypeStruct((passes, n), np.int32), work.costs),
            broke_at=jax.ShapeDtypeStruct((n,), np.int32),
            doubt=jax.ShapeDtypeStruct((n, *grid), np.float32)
            if hasattr(method, "doubts")
            else None,
            scores={
                name: jax.ShapeDtypeStruct((passes, n), scores[name].dtype)
                for name in (*self.task.rates, *self.task.means)
            },
        )


class Status(NamedTuple):
    """How far this process is.

    Attributes:
        done: passes over a sample, of ``total``.
        total: first passes and iterations of all samples of this process.
        lines: metrics by iteration, of the samples that are done; until there are any, of those in
            work.
        compile_seconds: of this call, so far.
        seconds: the same without compilation.
    """

    done: int
    total: int
    lines: list[Line]
    compile_seconds: float
    seconds: float


def refine(
    run: Run,
    folder: str | os.PathLike[str],
    settings: Mapping[str, Any],
    *,
    preempted: Callable[[], bool] = lambda: False,
) -> Generator[Status, None, None]:
    """Refine the samples of a run in a folder, from where it stopped if it holds this run.

    Files of samples, metrics and manifest are the same bits however often it stopped, on the same
    devices, unless a full memory halved the batch. Of several processes each calls this with the
    same arguments.

    Args:
        run: what to do.
        folder: a new one, or one that holds this run.
        settings: JSON data that tells all that decides the results: model, versions, devices.
        preempted: asked again and again, whether to save the state and end; the device is not
            waited for.

    Returns:
        A generator of how far it is, after every pass over a batch and every file; it works as it
        is asked for the next. Closed early, it saves the state.

    Raises:
        ValueError: before anything is written: the folder holds something else, a file is not what
            its record says, its path is not UTF-8, or as ``Task.check_scores``. Later: another
            process is at work in it, no state of the samples in work is whole, or metrics or
            manifest do not agree with the files of samples.
        PreemptionError: ``preempted`` said so; the state is saved.
        OSError: a file cannot be written; what was written before is whole.
    """
    folder = Path(folder)
    files.utf8(folder.absolute())
    run.task.check_scores()
    files.claim(folder, settings)
    for other in folder.glob("state-*"):  # of a start with more processes, which may be at work
        if other.name[6:].isdigit() and int(other.name[6:]) >= jax.process_count():
            with files.locked(other):
                pass
    (folder / "samples").mkdir(exist_ok=True)
    own = run.shards[jax.process_index() :: jax.process_count()]
    found = {shard: _recorded(_verified(folder, shard)) for shard in own if _done(folder, shard)}
    return _refine(run, folder, own, found, preempted)


def _refine(
    run: Run,
    folder: Path,
    own: Sequence[Shard],
    found: dict[Shard, Tallies],
    preempted: Callable[[], bool],
) -> Generator[Status, None, None]:
    start, compiled, total = time.perf_counter(), 0.0, _sum(found.values())
    lines = _lines(run, total)

    def status(state: State | None = None) -> Status:
        """With what is done of the samples in work."""
        nonlocal lines
        begun = 0
        if state is not None:
            through, at_work = slice(0, int(state.samples)), _rows(state)
            number, iteration = at_work.stop - at_work.start, int(state.iteration)
            begun = run.passes * through.stop + number * (iteration + 1)
            if through.stop and (iteration < 0 or not lines):
                lines = _lines(run, _sum([_tallies(state, through, run.passes)], total))
            elif not through.stop and not total:
                lines = _lines(run, _tallies(state, at_work, iteration + 1))
        return Status(
            done=run.passes * sum(shard.samples for shard in found) + begun,
            total=run.passes * sum(shard.samples for shard in own),
            lines=lines,
            compile_seconds=compiled,
            seconds=time.perf_counter() - start - compiled,
        )

    folder_of_state = folder / f"state-{jax.process_index()}"
    todo = [shard for shard in own if shard not in found]
    size, saved, kept = run.batch_size, time.monotonic(), 0

    def save(work: engine.State | None = None, minutes: float = 0.0) -> None:
        """Save what is new, if it is time to, with how far the samples in work have come."""
        nonlocal state, saved, kept
        if work is not None:
            state = state._replace(work=work)
        if _progress(state) != kept and time.monotonic() - saved >= 60 * minutes:
            snapshots.save(folder_of_state, shard.number, state)
            saved, kept = time.monotonic(), _progress(state)

    save_if_due = partial(save, minutes=run.storage.save_minutes)
    with contextlib.ExitStack() as stack:
        stack.enter_context(snapshots.own(folder_of_state))
        begun = _begun(run, folder_of_state, todo)
        todo.sort(key=lambda shard: shard not in begun)  # its state goes before others come
        yield status(*begun.values())
        batches = stack.enter_context(contextlib.closing(_ahead(run.source, todo)))
        for shard, batch in zip(todo, batches, strict=True):
            state = begun.get(shard) or _before(run, shard)
            kept = _progress(state)
            try:
                while state.samples < shard.samples:
                    steps = evaluate(
                        run.task,
                        run.denoise,
                        _filled(batch, state),
                        run.experiment,
                        jax.random.key(run.seed),
                        batch_size=size,
                        first=shard.first + int(state.samples),
                        done=_work_begun(state),
                        preempted=preempted,
                        keep=save_if_due,
                    )
                    before = compiled
                    for progress in steps:
                        state = _after(run, state, progress)
                        compiled = before + progress.compile_seconds
                        full = shard.samples == run.storage.shard_size
                        if full or progress.batch_size < len(state.work.image):
                            size = progress.batch_size  # not if a short file has no more samples
                        save_if_due()
                        yield status(state)
            except (PreemptionError, KeyboardInterrupt, GeneratorExit):
                save()
                raise
            _write(run, folder, shard, batch.editable, state)
            snapshots.remove(folder_of_state)
            saved = time.monotonic()
            found[shard] = _tallies(state, slice(0, shard.samples), run.passes)
            total = _sum([found[shard]], total)
            yield status()
    shutil.rmtree(folder_of_state, ignore_errors=True)
    _finish(run, folder)


def _ahead(
    source: Callable[[np.ndarray], Batch], shards: Sequence[Shard]
) -> Generator[Batch, None, None]:
    """The samples of each file; while one is in use, the next is being made, until it is closed."""
    closed = threading.Event()

    def make(shard: Shard) -> Batch:
        end, parts = shard.first + shard.samples, []
        for first in range(shard.first, end, MADE_AT_ONCE):
            if closed.is_set():
                break
            parts.append(source(np.arange(first, min(first + MADE_AT_ONCE, end))))
        return jax.tree.map(lambda *each: np.concatenate(each), *parts)

    made: Future[Batch] | None = None
    with ThreadPoolExecutor(1) as maker:
        try:
            for shard in shards:
                before, made = made, maker.submit(make, shard)
                if before is not None:
                    yield before.result()
            if made is not None:
                yield made.result()
        finally:
            closed.set()


# --- the samples in work --------------------------------------------------------------------------


def _before(run: Run, shard: Shard) -> State:
    """Nothing is done."""
    state = _zeros(run.state(shard))
    return state._replace(iteration=np.int32(-1), broke_at=state.broke_at - 1)


def _zeros(tree: Tree) -> Tree:
    """Zeros in its shapes and dtypes."""
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), tree)


def _work_begun(state: State) -> tuple[int, engine.State] | None:
    """Where the samples in work are, if something was done with them."""
    begun = state.iteration >= 0 or state.work.costs.nfe.any()
    return (int(state.iteration), state.work) if begun else None


def _rows(state: State) -> slice:
    """Those in work, of the samples of the file."""
    return slice(
        int(state.samples), min(int(state.samples) + len(state.work.image), len(state.refined))
    )


def _filled(batch: Batch, state: State) -> Batch:
    """Of the samples of the file those in work; copies of the last one, of which nothing is to be
    done, make b of them.
    """
    rows, own = _index(state), _rows(state)
    given = Batch(*(part[rows] for part in batch))
    given.editable[own.stop - own.start :] = False
    return given


def _index(state: State) -> np.ndarray:
    """Which samples of the file are in the b places."""
    rows = _rows(state)
    return np.minimum(rows.start + np.arange(len(state.work.image)), rows.stop - 1)


def _after(run: Run, state: State, progress: Progress) -> State:
    """With what a pass over the samples in work did, filled in."""
    rows, which = _rows(state), progress.iteration
    number, last = rows.stop - rows.start, which == run.passes - 1
    if last or which == 0 or state.followed is not None:
        images = run.storage.stored(progress.image[:number])
        if which == 0:
            state.first_pass[rows] = images
        if last:
            state.refined[rows] = images
            if progress.doubt is not None:
                state.doubt[rows] = progress.doubt[:number]
        if state.followed is not None:
            followed = state.followed[which, rows]
            followed[:] = images[: len(followed)]
    for kept, found in zip(state.costs, progress.costs, strict=True):
        kept[which, rows] = found[:number]
    for name, values in state.scores.items():
        values[which, rows] = progress.scores[name][:number]
    broke = ~progress.finite[:number] & (state.broke_at[rows] < 0)
    state.broke_at[rows][broke] = which
    return state._replace(
        samples=np.int32(rows.stop if last else rows.start),
        iteration=np.int32(-1 if last else which),
        work=_zeros(state.work) if last else progress.state,
    )


def _tallies(state: State, rows: slice, passes: int) -> Tallies:
    """Of some samples, after every one of the first passes."""
    broke_at = state.broke_at[rows]
    return [
        metrics.tally(
            {name: values[which, rows] for name, values in state.scores.items()},
            (broke_at < 0) | (broke_at > which),
            jax.tree.map(lambda each: each[which, rows], state.costs),  # noqa: B023
        )
        for which in range(passes)
    ]


def _progress(state: State) -> int:
    """Evaluations and iterations that are done; it rises with each of them."""
    at_work = _rows(state)
    own = np.asarray(state.work.costs.nfe)[: at_work.stop - at_work.start]
    spent = int(state.costs.nfe[-1].sum(dtype=np.int64) + own.sum(dtype=np.int64))
    return spent + len(state.costs.nfe) * int(state.samples) + int(state.iteration) + 1


def _begun(run: Run, folder: Path, todo: Sequence[Shard]) -> dict[Shard, State]:
    """The state that was saved last, and of which samples, of those that are to do."""
    snapshots.remove(folder, lambda number: run.shards[number] not in todo)
    saved = snapshots.restore(folder, lambda number: run.state(run.shards[number]))
    return {} if saved is None else {run.shards[saved[0]]: saved[1]}


# --- files ----------------------------------------------------------------------------------------


def _done(folder: Path, shard: Shard) -> bool:
    return shard.path(folder, ".json").exists()


def _write(run: Run, folder: Path, shard: Shard, editable: np.ndarray, state: State) -> None:
    """The samples, and then the record that says that they are there."""
    arrays = {
        "first_pass": state.first_pass,
        "refined": state.refined,
        "editable": editable,
        **state.scores,
        **{name: each[-1] for name, each in state.costs._asdict().items()},
        "broke_at": state.broke_at,
    }
    for name in ("followed", "doubt"):
        if (array := getattr(state, name)) is not None:
            arrays[name] = array
    path = shard.path(folder, ".npz")
    for killed in path.parent.glob(f".*.{path.stem}.*"):
        killed.unlink(missing_ok=True)
    with files.whole(path) as part:
        with part.open("xb") as file:
            np.savez(file, allow_pickle=False, **arrays)
        digest = files.digest(part)
    broken = np.flatnonzero(state.broke_at >= 0)
    record = {
        "file": str(path.relative_to(folder)),
        **shard._asdict(),
        "bytes": path.stat().st_size,
        "sha256": digest,
        "not_finite": [
            {"sample": shard.first + int(i), "iteration": int(state.broke_at[i])} for i in broken
        ],
        "tallies": [each._asdict() for each in _tallies(state, slice(None), run.passes)],
    }
    files.write_record(shard.path(folder, ".json"), record)


def _record(folder: Path, shard: Shard) -> dict[str, Any]:
    """What is written of a file.

    Raises:
        ValueError: it is damaged, or of other samples.
    """
    path = shard.path(folder, ".json")
    try:
        record = files.read_record(path)
    except ValueError as error:
        raise ValueError(f"{error}; remove it to refine its samples again") from error
    if any(record[name] != value for name, value in shard._asdict().items()):
        raise ValueError(f"{path} is of other samples; remove it to refine its samples again")
    return record


def _verified(folder: Path, shard: Shard) -> dict[str, Any]:
    """The record of a file, if the file is as it says.

    Raises:
        ValueError: the record is damaged, or the file is missing or another.
    """
    record, path = _record(folder, shard), shard.path(folder, ".npz")
    if not path.exists() or files.digest(path) != record["sha256"]:
        raise ValueError(
            f"{path} is not the file that {path.stem}.json describes; remove both to refine its "
            "samples again"
        )
    return record


def _recorded(record: Mapping[str, Any]) -> Tallies:
    """The tallies of a record."""
    return [
        Tally(**each | {"means": {name: Moments(*m) for name, m in each["means"].items()}})
        for each in record["tallies"]
    ]


def _sum(parts: Iterable[Tallies], total: Tallies | None = None) -> Tallies:
    """Of all samples together; of none, no tallies."""
    every = [*([total] if total else []), *parts]
    return [reduce(metrics.add, tallies) for tallies in zip(*every, strict=True)]


def _lines(run: Run, tallies: Tallies) -> list[Line]:
    """Metrics by iteration."""
    return [
        {"iteration": which, **metrics.line(each, run.task.means)}
        for which, each in enumerate(tallies)
    ]


def _finish(run: Run, folder: Path) -> None:
    """Write metrics and manifest, if all files of all processes are there.

    Raises:
        ValueError: they are there, and are others.
    """
    if not all(_done(folder, shard) for shard in run.shards):
        return
    for left in folder.glob("state-*"):  # of more processes than went on
        with contextlib.suppress(ValueError, FileNotFoundError), files.locked(left):
            shutil.rmtree(left, ignore_errors=True)
    records = [_record(folder, shard) for shard in run.shards]
    lines = _lines(run, _sum(map(_recorded, records)))
    manifest = {
        "samples": run.samples,
        "dtype": run.storage.dtype,
        "not_finite": [broken for record in records for broken in record["not_finite"]],
        "shards": [
            {name: record[name] for name in ("file", "first", "samples", "bytes", "sha256")}
            for record in records
        ],
    }
    for name, text in (
        ("metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines)),
        ("manifest.json", json.dumps(manifest, indent=1)),
    ):
        files.agree(folder / name, text, "samples/")


def read(folder: str | os.PathLike[str]) -> Iterator[dict[str, np.ndarray]]:
    """The files of a finished run one after the other, each verified.

    Args:
        folder: of the run.

    Yields:
        The arrays of a file, of its n samples: first_pass (without one, the input) and refined,
        [n, H, W, C], as stored (``to_float``); editable, bool [n, h, w]; every score, [R + 1, n];
        nfe, nbe and nve, what each has cost, int32 [n]; broke_at, int32 [n], the iteration after
        which a sample was first not finite, or -1; doubt, float32 [n, h, w], by how much the
        network doubts each patch, of methods that tell; in the first file followed,
        [R + 1, k, H, W, C], the first samples after every iteration.

    Raises:
        FileNotFoundError: the folder holds no finished run.
        ValueError: the manifest is damaged, or a file is not what it says.
    """
    listed = Path(folder) / "manifest.json"
    if not listed.exists():
        raise FileNotFoundError(f"{folder} holds no finished run: no manifest.json")
    with files.reading(listed):
        shards = json.loads(listed.read_text())["shards"]
        digests = {listed.parent / shard["file"]: shard["sha256"] for shard in shards}
    for path, digest in digests.items():
        if not path.exists() or files.digest(path) != digest:
            raise ValueError(f"{path} is not the file that {listed} describes")
        with files.reading(path), path.open("rb") as file, np.load(file) as arrays:
            found = dict(arrays)
        yield found
