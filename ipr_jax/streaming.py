"""Refine a queue of samples with every slot of the batch busy.

Samples differ in how many network evaluations they take: in their number of clues, and in their
iterations where a rule lets them leave. Here a slot whose sample is finished takes the next one of
the queue, inside the compiled program. Every sample's draws hang on its own key, its iteration and
its step, so its result is that of ``generate`` and ``refine``, up to the rounding of the network.

Shapes: N samples of the queue, B slots.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ipr_jax import check, memory, selection, stopping
from ipr_jax import keys as random_keys
from ipr_jax import step as steps
from ipr_jax.order import Order
from ipr_jax.program import Program, driver
from ipr_jax.regenerate import FIRST_PASS, REFINEMENT, Sampling, Settings, renoise
from ipr_jax.schedule import PassPlan
from ipr_jax.selection import Noise, Selection
from ipr_jax.stopping import Stop
from ipr_jax.types import Denoiser


class Streamed(NamedTuple):
    """Refined samples, in the order of the queue, and what they took.

    Attributes:
        image: float32 [N, H, W, C].
        iterations: int32 [N], iterations done, without the first pass.
        nfe: int32 [N], network evaluations that each sample's schedules took.
        finite: bool [N], False for a sample that was not finite after some iteration.
        evaluations: int32 scalar, evaluations of the network on all B slots.
    """

    image: jax.Array
    iterations: jax.Array
    nfe: jax.Array
    finite: jax.Array
    evaluations: jax.Array


class Queue(NamedTuple):
    """The samples to refine: keys [N], image [N, H, W, C], editable [N, h, w]."""

    keys: jax.Array
    image: jax.Array
    editable: jax.Array


class Pass(NamedTuple):
    """The passes that the slots are in, each at its own step.

    Attributes:
        plan: schedules; idle slots have an empty region.
        state: of the denoising.
        step: int32 [B], steps done.
        uniform: float32 [B, h, w] in [0, 1), for random orders.
        noise_keys: [B], of the noise of the steps.
    """

    plan: PassPlan
    state: steps.PassState
    step: jax.Array
    uniform: jax.Array
    noise_keys: jax.Array


class Slots(NamedTuple):
    """What is in the slots.

    Attributes:
        sample: int32 [B], place in the queue; beyond the last = the slot is idle.
        iteration: int32 [B], 0 = the first pass.
        before: float32 [B, H, W, C], the images before this pass.
        now: this pass.
        streak: int32 [B], how often in a row the stopping rule has held.
        nfe: int32 [B], network evaluations of the passes that are over.
        finite: bool [B], after the passes that are over.
    """

    sample: jax.Array
    iteration: jax.Array
    before: jax.Array
    now: Pass
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
    """What a turn changes; ``taken`` counts samples that have entered, ``turns`` evaluations."""

    slots: Slots
    done: Done
    taken: jax.Array
    turns: jax.Array


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
    iterations: int,
    slots: memory.Size = 64,
    ratio: float = 0.25,
    first: Sampling | None = FIRST_PASS,
    later: Sampling = REFINEMENT,
    select: Selection = selection.fresh_regions,
    noise: Noise = selection.fresh_noise,
    stop: Stop = stopping.never,
    patience: int = 1,
) -> Program[Streamed]:
    """Generate and refine samples; a slot whose sample is finished takes the next one.

    Samples with many editable patches go first, so that the slots run empty at about the same time.
    One compiled program per number of samples and slots and choice of functions.

    Args:
        denoise: the model.
        keys: [N], from ``sample_keys``.
        image: float32 [N, H, W, C] in [-1, 1]; with a first pass only the clues are read.
        editable: bool [N, h, w]; False = a clue, returned bit for bit. A sample without editable
            patches comes back as it is, at 0 evaluations.
        iterations: after the first pass, at least 1; with a stopping rule, the most.
        slots: B, samples that the network sees at once, at least 1; "auto" = as many as fit on the
            device, which costs up to two more compilations.
        ratio: the share of the editable patches that an iteration regenerates, in (0, 1].
        first: how the first pass samples; None starts from the given images.
        later: how the iterations sample.
        select: which patches an iteration regenerates.
        noise: from which noise.
        stop: which samples may leave early.
        patience: how often in a row ``stop`` must hold, at least 1.

    Returns:
        The samples. ``1 - nfe.sum() / (evaluations * B)`` is the share of evaluations wasted.

    Raises:
        ValueError: keys, images and masks do not belong together, a pixel is out of range, or a
            number is out of its range.
        MemoryError: with ``slots="auto"``, if a single one does not fit.
    """
    check.count("iterations", iterations)
    check.count("slots", slots, auto=True)
    check.count("patience", patience)
    check.batch(keys, image, editable)
    check.clues(image, editable)
    if first is None:
        check.samples(image, editable)
    num_patches = editable.shape[1] * editable.shape[2]
    two = [(first or later).settings(num_patches), later.settings(num_patches)]
    arguments = (
        check.as_pytree(denoise),
        Queue(keys, jnp.asarray(image), jnp.asarray(editable)),
        Passes(
            jax.tree.map(lambda *parts: jnp.stack([jnp.asarray(part) for part in parts]), *two),
            jnp.asarray(selection.region_sizes(num_patches, ratio)),
        ),
        jnp.int32(iterations),
        jnp.int32(patience),
    )
    static = {
        "first_iteration": int(first is None),
        "functions": Functions(((first or later).order, later.order), select, noise, stop),
    }

    def at(slots: int) -> Program[Streamed]:
        return Program(_stream, arguments, {"slots": slots, **static})

    return at(memory.choose(slots, len(keys), at))


@partial(jax.jit, static_argnames=("slots", "first_iteration", "functions"))
def _stream(
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
    end = queue.editable.any(axis=(1, 2)).sum(dtype=jnp.int32)  # nothing is editable from there on

    def start(sample: jax.Array, iteration: jax.Array, image: jax.Array) -> Pass:
        """Begin a pass in every slot; an idle one has nothing to do."""
        keys, editable = queue.keys[sample], queue.editable[sample]
        own = random_keys.iteration_keys(keys, iteration)

        def each(function: Any, shape: tuple[int, ...]) -> jax.Array:
            one = jax.vmap(lambda key, iteration: function(key[None], iteration, shape)[0])
            return one(keys, iteration)

        region = selection.choose(each(functions.select, (h, w)), editable, passes.sizes)
        noise = each(functions.noise, shape)
        if first_iteration == 0:
            is_first = iteration == 0
            region = jnp.where(is_first[:, None, None], editable, region)
            fresh = random_keys.normal(own.noise, shape)
            noise = jnp.where(is_first[:, None, None, None], fresh, noise)
        region &= (sample < end)[:, None, None]
        order_keys, noise_keys = random_keys.split(own.denoise, 2)
        kind, size = jnp.minimum(iteration, 1), region.sum(axis=(1, 2))
        plan = PassPlan(region, *(table[kind, size] for table in passes.settings.plan))
        return Pass(
            plan=plan,
            state=steps.init(renoise(image, region, noise), plan),
            step=jnp.zeros(slots, jnp.int32),
            uniform=random_keys.uniform(order_keys, (h, w)),
            noise_keys=noise_keys,
        )

    def advance(now: Pass, iteration: jax.Array) -> Pass:
        """One step in every slot."""
        kind = jnp.minimum(iteration, 1)

        def order(sigma: jax.Array, uniform: jax.Array, t: jax.Array) -> jax.Array:
            first, later = (each(sigma, uniform, t) for each in functions.orders)
            return jnp.where((kind == 0)[:, None, None], first, later)

        state, _ = steps.step(
            denoise,
            now.plan,
            now.state,
            now.step,
            random_keys.normal(random_keys.fold(now.noise_keys, now.step), shape),
            now.uniform,
            order=order,
            stochasticity=passes.settings.stochasticity[kind],
            temperature=passes.settings.temperature[kind],
        )
        return now._replace(state=state, step=now.step + 1)

    def turn(carry: Carry) -> Carry:
        """A step, then what follows for the slots whose pass is over."""
        old, done = carry.slots, carry.done
        now = advance(old.now, old.iteration)
        over = (now.step >= now.plan.num_steps) & (old.sample < end)
        image = now.state.z
        nfe = jnp.where(over, old.nfe + now.plan.num_steps, old.nfe)
        finite = old.finite & (jnp.isfinite(image).all(axis=(1, 2, 3)) | ~over)
        holds = functions.stop(old.iteration, old.before, image)
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
        iteration = jnp.where(leaves, first_iteration, old.iteration + over.astype(jnp.int32))
        image = jnp.where(leaves[:, None, None, None], queue.image[sample], image)
        begun = start(sample, iteration, image)

        def where_over(new: jax.Array, kept: jax.Array) -> jax.Array:
            return jnp.where(over.reshape(-1, *[1] * (new.ndim - 1)), new, kept)

        filled = Slots(
            sample=sample,
            iteration=iteration,
            before=where_over(image, old.before),
            now=jax.tree.map(where_over, begun, now),
            streak=jnp.where(leaves, 0, streak),
            nfe=jnp.where(leaves, 0, nfe),
            finite=finite | leaves,
        )
        return Carry(filled, done, carry.taken + leaves.sum(dtype=jnp.int32), carry.turns + 1)

    sample = jnp.minimum(jnp.arange(slots, dtype=jnp.int32), end)
    iteration = jnp.full(slots, first_iteration, jnp.int32)
    zeros, true = jnp.zeros(slots, jnp.int32), jnp.ones(slots, bool)
    image = queue.image[:slots]
    begun = start(sample, iteration, image)
    carry = Carry(
        slots=Slots(sample, iteration, image, begun, zeros, zeros, true),
        done=Done(
            image=queue.image,
            iterations=jnp.zeros(number, jnp.int32),
            nfe=jnp.zeros(number, jnp.int32),
            finite=jnp.ones(number, bool),
        ),
        taken=jnp.int32(slots),
        turns=jnp.int32(0),
    )
    carry = jax.lax.while_loop(lambda carry: (carry.slots.sample < end).any(), turn, carry)
    place = jnp.argsort(longest_first)
    done = Done(*(part[place] for part in carry.done))
    return Streamed(*done, carry.turns)
