"""Refinement as users call it: ``generate``, ``refine`` and ``stream``, on the engine."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ipr_jax.core import Denoiser, check
from ipr_jax.methods import engine, selection, solving, stopping
from ipr_jax.methods.engine import Problem, State
from ipr_jax.methods.ipr import IPR, Refinement
from ipr_jax.methods.selection import Noise, Selection
from ipr_jax.methods.solving import Found
from ipr_jax.methods.stopping import Stop
from ipr_jax.runtime import Program, Size, driver, sharding
from ipr_jax.sampling import FIRST_PASS, REFINEMENT, Sampling

Record = Callable[[jax.Array], Any]
"""``record(image [B, H, W, C]) -> pytree``, what to keep of every iteration."""


class Sampled(NamedTuple):
    """Samples and what they cost.

    Attributes:
        image: float32 [B, H, W, C].
        nfe: int32 [B], network evaluations that each sample's schedule took.
        finite: bool [B], False for a sample that is not finite everywhere.
    """

    image: jax.Array
    nfe: jax.Array
    finite: jax.Array


@driver
def generate(
    denoise: Denoiser,
    keys: jax.Array,
    image: jax.Array | np.ndarray,
    editable: jax.Array | np.ndarray,
    sampling: Sampling = FIRST_PASS,
    *,
    mesh: Mesh | None = None,
) -> Program[Sampled]:
    """Generate every editable patch from noise, given the others.

    One compiled program per batch size; keys, masks and all of ``sampling`` but the order are its
    arguments. It may be called under ``jit``, ``vmap`` and ``shard_map``, whatever of its arrays is
    traced. Derivatives are those of forward mode (``jax.jvp``): the number of steps follows from
    the masks, and the loop over it, a ``while_loop``, keeps nothing to go back with.

    Args:
        denoise: the model; a function made anew at every call is compiled at every call.
        keys: [B], from ``sample_keys``; the same keys go to ``refine``.
        image: float32 [B, H, W, C] in [-1, 1]; only its clues are read.
        editable: bool [B, h, w]; False = a clue, returned bit for bit.
        sampling: how.
        mesh: the devices that share the samples, from ``sharding.data_mesh``; None = all of this
            process. A denoiser that is bound to a batch needs a mesh of one device.

    Returns:
        The samples; a batch without editable patches comes back as it is, at 0 evaluations.

    Raises:
        ValueError: keys, images and masks do not belong together, a clue is out of range, an
            argument is of another type, or a function returns another shape or dtype (at trace).
    """
    check.batch(keys, image, editable)
    check.clues(image, editable)
    check.instance("sampling", sampling, Sampling)
    mesh = sharding.of_samples(mesh, denoise, keys, image, editable)
    method = Refinement(iterations=0, first=sampling, later=sampling).on(editable.shape[1:])

    def finish(found: Found) -> Sampled:
        answers = found.answers
        return Sampled(answers.image, answers.costs.nfe, answers.finite)

    queue = Problem(keys, jnp.asarray(image), jnp.asarray(editable))
    return solving.program(denoise, method, queue, mesh, finish)


class Refined(NamedTuple):
    """Refined samples and what happened on the way.

    Attributes:
        image: float32 [B, H, W, C].
        nfe: int32 [iterations, B], network evaluations that each sample's schedule took.
        finite: bool [iterations, B], False where a sample was not finite after the iteration.
        recorded: what ``record`` gave, stacked over the iterations; None without it.
    """

    image: jax.Array
    nfe: jax.Array
    finite: jax.Array
    recorded: Any


_AXES = Refined(0, 1, 1, 1)  # pyright: ignore[reportArgumentType]
"""Of the samples in a result."""


@partial(jax.jit, static_argnames=("iterations", "record", "mesh"))
def _refine(
    denoise: Denoiser,
    method: IPR,
    queue: Problem,
    *,
    iterations: int,
    record: Record | None,
    mesh: Mesh | None,
) -> Refined:
    def every(denoise: Denoiser, method: IPR, queue: Problem) -> Refined:
        def body(state: State, iteration: jax.Array) -> tuple[State, tuple[Any, ...]]:
            work = engine.at_once(state)
            work = engine.advance(denoise, method, queue, work, iterations=iteration)
            new = work.state
            kept = None if record is None else _recorded(record, new.image)
            return new, (new.costs.nfe - state.costs.nfe, engine.is_finite(new.image), kept)

        which = jnp.arange(1, iterations + 1, dtype=jnp.int32)
        state = method.init(queue)
        state = engine.settled(denoise, method, queue, state, state)
        state, info = jax.lax.scan(body, state, which)
        return Refined(state.image, *info)

    return sharding.each_device(every, mesh, (None, None, 0), _AXES)(denoise, method, queue)


@driver
def refine(
    denoise: Denoiser,
    keys: jax.Array,
    image: jax.Array | np.ndarray,
    editable: jax.Array | np.ndarray,
    *,
    iterations: int,
    ratio: float = 0.25,
    sampling: Sampling = REFINEMENT,
    select: Selection = selection.fresh_regions,
    noise: Noise = selection.fresh_noise,
    record: Record | None = None,
    start: jax.Array | int = 0,
    mesh: Mesh | None = None,
) -> Program[Refined]:
    """Refine samples: re-noise and regenerate a random region of each, over and over.

    No verifier and no training. The images may come from ``generate`` or be given, for example
    corrupted boards with every patch editable (correction mode). One compiled program per batch
    size, number of iterations and choice of functions, so that functions made anew at every call
    are compiled at every call; keys, masks, ratio and the rest of ``sampling`` are its arguments.
    Under ``jit`` and the like, and for derivatives, it is as ``generate``.

    Args:
        denoise: the model.
        keys: [B], from ``sample_keys``, as given to ``generate``.
        image: float32 [B, H, W, C] in [-1, 1]; pixels that are no clues may overshoot as far as
            they are finite.
        editable: bool [B, h, w]; False = a clue, returned bit for bit.
        iterations: how many, at least 1.
        ratio: the share of the editable patches that an iteration regenerates, in (0, 1]; their
            number is floor(ratio n), at least 1.
        sampling: how a region is regenerated.
        select: which patches.
        noise: from which noise.
        record: what to keep of the images of every iteration, arrays; by default nothing.
        start: iterations already done, at least 0, may be traced; ``refine(20)`` equals
            ``refine(10)``, then ``refine(10, start=10)`` with the same keys, unless the selection
            goes by what was seen, of which a new call knows nothing.
        mesh: as for ``generate``; on several devices, what ``record`` gives must be by sample.

    Returns:
        The refined samples, their costs, and what was recorded.

    Raises:
        ValueError: keys, images and masks do not belong together, a clue is out of range, a pixel
            is not finite (leave such samples out by ``finite``), a number is out of its range, an
            argument is of another type, or a function returns another shape or dtype (at trace).
    """
    iterations = check.count("iterations", iterations)
    check.count("start", start, least=0, below=2**31 - iterations, traced=True)
    check.batch(keys, image, editable)
    check.clues(image, editable)
    check.samples(image, editable)
    check.instance("sampling", sampling, Sampling)
    selection.region_sizes(1, ratio)
    if record is not None:
        check.function("record", record, "image -> arrays")
    mesh = sharding.of_samples(mesh, denoise, keys, image, editable)
    if mesh is not None and record is not None:
        _check_record(record, image)
    refinement = Refinement(
        iterations=iterations, ratio=ratio, first=None, later=sampling, select=select, noise=noise
    )
    return Program(
        _refine,
        (
            check.as_pytree(denoise),
            refinement.on(editable.shape[1:], start=start),
            solving.spread(mesh, keys, image, editable),
        ),
        {"iterations": iterations, "record": record, "mesh": mesh},
        lambda found: sharding.cut(found, keys.shape[0], mesh, _AXES),
    )


def _check_record(record: Record, image: jax.Array | np.ndarray) -> None:
    """Refuse what cannot be put together from the devices.

    Raises:
        ValueError: something recorded is not by sample.
    """
    for leaf in jax.tree.leaves(jax.eval_shape(partial(_recorded, record), image)):
        if leaf.shape[:1] != image.shape[:1]:
            raise ValueError(
                f"with several devices, what is recorded must be by sample, "
                f"[{image.shape[0]}, ...], got {list(leaf.shape)}"
            )


def _recorded(record: Record, image: jax.Array) -> Any:
    """What is to be kept of the images.

    Raises:
        ValueError: something of it is neither an array nor a number.
    """
    found = record(image)
    for leaf in jax.tree.leaves(found):
        if not check.is_array(leaf) and not isinstance(leaf, bool | int | float | np.generic):
            raise ValueError(f"record must return arrays, got {check.told(leaf)}")
    return found


class Streamed(NamedTuple):
    """Refined samples, in the order of the queue, and what they took.

    Attributes:
        image: float32 [N, H, W, C].
        iterations: int32 [N], iterations done, without the first pass.
        nfe: int32 [N], network evaluations that each sample's schedules took.
        finite: bool [N], False for a sample that was not finite after some iteration.
        slot_evaluations: int32 scalar, samples that the network saw, idle slots included, summed
            over its evaluations.
    """

    image: jax.Array
    iterations: jax.Array
    nfe: jax.Array
    finite: jax.Array
    slot_evaluations: jax.Array

    @property
    def wasted(self) -> float:
        """The share of the slot evaluations that no sample needed, in [0, 1)."""
        spent = int(self.slot_evaluations)
        return 1 - int(self.nfe.sum()) / spent if spent else 0.0


@driver
def stream(
    denoise: Denoiser,
    keys: jax.Array,
    image: jax.Array | np.ndarray,
    editable: jax.Array | np.ndarray,
    *,
    iterations: jax.Array | int,
    slots: Size = 64,
    ratio: float = 0.25,
    first: Sampling | None = FIRST_PASS,
    later: Sampling = REFINEMENT,
    select: Selection = selection.fresh_regions,
    noise: Noise = selection.fresh_noise,
    stop: Stop = stopping.never,
    patience: jax.Array | int = 1,
    mesh: Mesh | None = None,
) -> Program[Streamed]:
    """Generate and refine samples; a slot whose sample is finished takes the next one.

    Samples with many editable patches go first, so that the slots run empty at about the same time.
    With a stopping rule nobody knows which samples are long: there, the network sees only a half of
    the slots, then a quarter, once they hold all samples that are left; on a CPU it sees many slots
    in parts, and only as many as hold them (``runtime.sharding.rows_at_once``). One program per
    number of samples and slots and choice of functions, so that functions made anew at every call
    are compiled at every call. Under ``jit`` and the like, and for derivatives, it is as
    ``generate``; but JAX refuses ``vmap`` of it inside of a ``shard_map`` that checks what varies.

    Args:
        denoise: the model, for any number of images, each on its own.
        keys: [N], from ``sample_keys``.
        image: float32 [N, H, W, C] in [-1, 1]; with a first pass only the clues are read.
        editable: bool [N, h, w]; False = a clue, returned bit for bit. A sample without editable
            patches comes back as it is, at 0 evaluations.
        iterations: after the first pass, at least 1; with a stopping rule, the most. May be traced.
        slots: B, samples at work at once, at least 1; "auto" = as many as fit on the
            device, which costs up to two more compilations.
        ratio: the share of the editable patches that an iteration regenerates, in (0, 1].
        first: how the first pass samples; None starts from the given images.
        later: how the iterations sample.
        select: which patches an iteration regenerates.
        noise: from which noise.
        stop: which samples may leave early.
        patience: how often in a row ``stop`` must hold, at least 1; may be traced.
        mesh: as for ``generate``; each device has its share of the queue and of the slots.

    Returns:
        The samples, and what they took.

    Raises:
        ValueError: keys, images and masks do not belong together, a clue is out of range, a pixel
            is not finite, a number is out of its range, an argument is of another type, or a
            function returns another shape or dtype (at trace).
        MemoryError: with ``slots="auto"``, if a single one does not fit.
    """
    check.count("iterations", iterations, traced=True)
    slots = check.count("slots", slots, auto=True)
    check.batch(keys, image, editable)
    check.clues(image, editable)
    if first is None:
        check.samples(image, editable)
    refinement = Refinement(
        iterations=iterations,  # pyright: ignore[reportArgumentType]
        ratio=ratio,
        first=first,
        later=later,
        select=select,
        noise=noise,
        stop=stop,
        patience=patience,  # pyright: ignore[reportArgumentType]
    )
    shared = sharding.of_samples(mesh, denoise, keys, image, editable)
    most = sharding.rows_at_once(mesh, editable.shape[1:])

    def finish(found: Found) -> Streamed:
        image, iterations, finite, costs = found.answers
        return Streamed(image, iterations, costs.nfe, finite, found.spent)

    return solving.program(
        denoise,
        refinement.on(editable.shape[1:]),
        Problem(keys, jnp.asarray(image), jnp.asarray(editable)),
        shared,
        finish,
        slots=slots,
        before=int(first is not None),
        parts=refinement.row_parts,
        most=most,
    )
