"""Refine a queue of samples with every slot of the batch busy.

Samples differ in how many network evaluations they take: in their number of clues, and in their
iterations where a rule lets them leave. Here a slot whose sample is finished takes the next one of
the queue, inside the compiled program. Every sample's draws hang on its own key, its iteration and
its step, so its result is that of ``generate`` and ``refine``, up to the rounding of the network.

Shapes: N samples of the queue, B slots.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ipr_jax.core import Denoiser, check
from ipr_jax.core import keys as random_keys
from ipr_jax.methods import selection, stopping
from ipr_jax.methods.selection import Noise, Selection
from ipr_jax.methods.stopping import Stop
from ipr_jax.runtime import Program, driver, memory, sharding
from ipr_jax.sampling import (
    FIRST_PASS,
    REFINEMENT,
    Order,
    PassPlan,
    Sampling,
    Settings,
    renoise,
    schedule,
)
from ipr_jax.sampling import step as steps

PARTS = (4, 2, 1)
"""With a stopping rule, the network is compiled for a quarter, a half and all of the slots: the
fewest sizes that waste less than 5% at 8 samples per slot. Without one, one size does."""


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


class Queue(NamedTuple):
    """The samples to refine: keys [N], image [N, H, W, C], editable [N, h, w]."""

    keys: jax.Array
    image: jax.Array
    editable: jax.Array


class Slots(NamedTuple):
    """What is in the slots.

    Attributes:
        sample: int32 [B], place in the queue; beyond the last = the slot is idle.
        iteration: int32 [B], 0 = the first pass.
        before: float32 [B, H, W, C], the images before this pass.
        state: of the pass; before its first step, the images are those of ``before``.
        step: int32 [B], steps of the pass that are done.
        streak: int32 [B], how often in a row the stopping rule has held.
        nfe: int32 [B], network evaluations of the passes that are over.
        finite: bool [B], after the passes that are over.
    """

    sample: jax.Array
    iteration: jax.Array
    before: jax.Array
    state: steps.PassState
    step: jax.Array
    streak: jax.Array
    nfe: jax.Array
    finite: jax.Array


class Done(NamedTuple):
    """The samples that have left: the first fields of ``Streamed``."""

    image: jax.Array
    iterations: jax.Array
    nfe: jax.Array
    finite: jax.Array


class Carry(NamedTuple):
    """What a turn changes.

    Attributes:
        slots: what is in them.
        done: the samples that have left.
        taken: int32 scalar, samples that have entered.
        evaluated: int32 scalar, ``slot_evaluations`` so far.
    """

    slots: Slots
    done: Done
    taken: jax.Array
    evaluated: jax.Array


class Passes(NamedTuple):
    """The first pass and the iterations, stacked: settings [2, ...]; sizes int32 [P + 1]."""

    settings: Settings
    sizes: jax.Array


class Functions(NamedTuple):
    """What the caller passes in; ``orders`` of the first pass and of the iterations."""

    orders: tuple[Order, Order]
    select: Selection
    noise: Noise
    stop: Stop


@driver
def stream(
    denoise: Denoiser,
    keys: jax.Array,
    image: jax.Array | np.ndarray,
    editable: jax.Array | np.ndarray,
    *,
    iterations: jax.Array | int,
    slots: memory.Size = 64,
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
    the slots, then a quarter, once they hold all samples that are left. One compiled program per
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
        slots: B, samples that the network sees at once, at least 1; "auto" = as many as fit on the
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
    check.count("patience", patience, traced=True)
    check.batch(keys, image, editable)
    check.clues(image, editable)
    if first is None:
        check.samples(image, editable)
    else:
        check.instance("first", first, Sampling)
    check.instance("later", later, Sampling)
    selection.check_functions(select, noise)
    check.function("stop", stop, "(iteration, before, after) -> bool, see ipr_jax.methods.stopping")
    mesh, number = sharding.of_samples(mesh, denoise, keys, image, editable), len(keys)
    num_patches = editable.shape[1] * editable.shape[2]
    two = [(first or later).settings(num_patches), later.settings(num_patches)]
    arguments = (
        check.as_pytree(denoise),
        Queue(*sharding.spread(mesh, keys, jnp.asarray(image), jnp.asarray(editable))),
        Passes(
            jax.tree.map(lambda *parts: jnp.stack([jnp.asarray(part) for part in parts]), *two),
            jnp.asarray(selection.region_sizes(num_patches, ratio)),
        ),
        jnp.asarray(iterations, jnp.int32),
        jnp.asarray(patience, jnp.int32),
    )
    static = {
        "first_iteration": int(first is None),
        "functions": Functions(((first or later).order, later.order), select, noise, stop),
        "mesh": mesh,
    }

    def finish(found: Streamed) -> Streamed:
        if mesh is None:
            return found
        image, done, nfe, finite = sharding.cut(found[:4], number, mesh, 0)
        return Streamed(image, done, nfe, finite, found.slot_evaluations.sum(dtype=jnp.int32))

    def at(slots: int) -> Program[Streamed]:
        return Program(_stream, arguments, {"slots": slots, **static}, finish)

    devices = 1 if mesh is None else mesh.size  # sizes are those of one device
    size = slots if slots == "auto" else -(-slots // devices)
    return at(memory.choose(size, -(-number // devices), at))


@partial(jax.jit, static_argnames=("slots", "first_iteration", "functions", "mesh"))
def _stream(
    denoise: Denoiser,
    queue: Queue,
    passes: Passes,
    iterations: jax.Array,
    patience: jax.Array,
    *,
    mesh: Mesh | None,
    **static: Any,
) -> Streamed:
    each = sharding.each_device(
        partial(_stream_one, **static), mesh, in_axes=(None, 0, None, None, None), out_axes=0
    )
    found = each(denoise, queue, passes, iterations, patience)
    return found if mesh else found._replace(slot_evaluations=found.slot_evaluations[0])


def _stream_one(
    denoise: Denoiser,
    queue: Queue,
    passes: Passes,
    iterations: jax.Array,
    patience: jax.Array,
    *,
    slots: int,
    first_iteration: int,
    functions: Functions,
) -> Streamed:
    longest_first = jnp.argsort(-queue.editable.sum(axis=(1, 2)))
    queue = jax.tree.map(lambda part: part[longest_first], queue)
    number, h, w = queue.editable.shape
    shape = queue.image.shape[1:]
    parts = (1,) if functions.stop is stopping.never else PARTS
    widths = np.array(sorted({-(-slots // part) for part in parts}), np.int32)
    end = queue.editable.any(axis=(1, 2)).sum(dtype=jnp.int32)  # nothing is editable from there on

    def order(kind: jax.Array, sigma: jax.Array, uniform: jax.Array, t: jax.Array) -> jax.Array:
        first, later = (
            check.returned("what order returns", each(sigma, uniform, t), t.shape, jnp.float32)
            for each in functions.orders
        )
        return jnp.where((kind == 0)[:, None, None], first, later)

    def advance(old: Slots, busy: jax.Array) -> tuple[steps.PassState, jax.Array]:
        """One step in every busy slot; also how many its pass takes, 0 in an idle one."""
        keys, editable = queue.keys[old.sample], queue.editable[old.sample]
        own = random_keys.iteration_keys(keys, old.iteration)

        scores = functions.select(keys, old.iteration, (h, w))
        region = selection.choose(scores, editable, passes.sizes)
        noise = functions.noise(keys, old.iteration, shape)
        noise = check.returned("what noise returns", noise, (slots, *shape), jnp.float32)
        kind = jnp.minimum(old.iteration, 1)
        if first_iteration == 0:
            region = jnp.where((kind == 0)[:, None, None], editable, region)
            fresh = random_keys.normal(own.noise, shape)
            noise = jnp.where((kind == 0)[:, None, None, None], fresh, noise)
        region &= busy[:, None, None]
        size = region.sum(axis=(1, 2))
        plan = PassPlan(region, *(table[kind, size] for table in passes.settings.plan))
        begins = (old.step == 0)[:, None, None, None]
        z = jnp.where(begins, renoise(old.before, region, noise), old.state.z)
        order_keys, noise_keys = random_keys.split(own.denoise, 2)
        state, _ = steps.step(
            partial(_on_rows, denoise, busy, widths),
            plan,
            old.state._replace(z=z),
            old.step,
            random_keys.normal(random_keys.fold(noise_keys, old.step), shape),
            random_keys.uniform(order_keys, (h, w)),
            order=partial(order, kind),
            stochasticity=passes.settings.stochasticity[kind],
            temperature=passes.settings.temperature[kind],
        )
        return state, plan.num_steps

    def stop(iteration: jax.Array, before: jax.Array, after: jax.Array) -> jax.Array:
        found = functions.stop(iteration, before, after)
        return check.returned("what stop returns", found, iteration.shape, jnp.bool_)

    def turn(carry: Carry) -> Carry:
        """A step, then what follows for the slots whose pass is over."""
        old, done = carry.slots, carry.done
        busy = old.sample < end
        state, num_steps = advance(old, busy)
        over = (old.step + 1 >= num_steps) & busy
        image = state.z
        nfe = jnp.where(over, old.nfe + num_steps, old.nfe)
        finite = old.finite & (jnp.isfinite(image).all(axis=(1, 2, 3)) | ~over)
        holds = _on_rows(stop, over, widths, old.iteration, old.before, image)
        streak = jnp.where(over, jnp.where(holds, old.streak + 1, 0), old.streak)
        leaves = over & ((old.iteration >= iterations) | (streak >= patience))

        place = jnp.where(leaves, old.sample, number)  # beyond the end: written nowhere
        done = jax.tree.map(
            lambda kept, new: kept.at[place].set(new, mode="drop"),
            done,
            Done(image, old.iteration, nfe, finite),
        )
        taken = carry.taken + jnp.cumsum(leaves, dtype=jnp.int32) - 1
        sample = jnp.where(leaves, jnp.minimum(taken, end), old.sample)
        image = jnp.where(leaves[:, None, None, None], queue.image[sample], image)
        slots = Slots(
            sample=sample,
            iteration=jnp.where(leaves, first_iteration, old.iteration + over.astype(jnp.int32)),
            before=jnp.where(over[:, None, None, None], image, old.before),
            state=steps.PassState(
                image, jnp.where(over[:, None, None], schedule.WAITING, state.start)
            ),
            step=jnp.where(over, 0, old.step + 1),
            streak=jnp.where(leaves, 0, streak),
            nfe=jnp.where(leaves, 0, nfe),
            finite=finite | leaves,
        )
        return Carry(
            slots,
            done,
            carry.taken + leaves.sum(dtype=jnp.int32),
            carry.evaluated + jnp.asarray(widths)[_narrowest(busy, widths)],
        )

    zeros, image = jnp.zeros(slots, jnp.int32), queue.image[:slots]
    carry = Carry(
        slots=Slots(
            sample=jnp.minimum(jnp.arange(slots, dtype=jnp.int32), end),
            iteration=jnp.full(slots, first_iteration, jnp.int32),
            before=image,
            state=steps.PassState(image, jnp.full((slots, h, w), schedule.WAITING, jnp.int32)),
            step=zeros,
            streak=zeros,
            nfe=zeros,
            finite=jnp.ones(slots, bool),
        ),
        done=Done(
            image=queue.image,
            iterations=jnp.zeros(number, jnp.int32),
            nfe=jnp.zeros(number, jnp.int32),
            finite=jnp.ones(number, bool),
        ),
        taken=jnp.int32(slots),
        evaluated=jnp.int32(0),
    )
    carry = sharding.settled(turn, carry)
    carry = jax.lax.while_loop(lambda carry: (carry.slots.sample < end).any(), turn, carry)
    place = jnp.argsort(longest_first)
    done = Done(*(part[place] for part in carry.done))
    return Streamed(*done, carry.evaluated[None])


def _narrowest(where: jax.Array, widths: np.ndarray) -> jax.Array:
    """Position of the smallest of the widths, increasing, that is not below the count of True."""
    return (jnp.asarray(widths) < where.sum(dtype=jnp.int32)).sum(dtype=jnp.int32)


def _on_rows(
    function: Callable[..., Any], where: jax.Array, widths: np.ndarray, *arrays: jax.Array
) -> Any:
    """Evaluate a function on the rows that count, in the smallest batch that holds them.

    Args:
        function: of arrays [n, ...] for every n in ``widths``, a pytree of arrays [n, ...]; each of
            its rows follows from the same rows of its arguments.
        where: bool [B], the rows that count.
        widths: int32, sizes of a batch, increasing; the last is B.
        arrays: the arguments, each [B, ...].

    Returns:
        What ``function`` gives, [B, ...]; without meaning in the rows that do not count.
    """
    first = jnp.argsort(~where)

    def narrow(width: int) -> Callable[..., Any]:
        def branch(*arrays: jax.Array) -> Any:
            rows = first[:width]
            found = function(*(each[rows] for each in arrays))
            return jax.tree.map(
                lambda part: (
                    jnp.zeros((len(where), *part.shape[1:]), part.dtype).at[rows].set(part)
                ),
                found,
            )

        return branch

    branches = [*map(narrow, widths[:-1]), function]
    return jax.lax.switch(_narrowest(where, widths), branches, *arrays)
