"""One loop around the network, for every way of spending its evaluations.

A method says what follows from an evaluation (``Method``); the loop does the rest, the same for all
of them: it evaluates the network on all rows, every row at its own noise levels, keeps what is
finished, gives its slot to the next problem of the queue, and counts.

Everything that a problem draws hangs on its own key and on what it has been through, so that its
result depends neither on its neighbours nor on its slot, nor on how often the loop was interrupted.

Shapes: N problems of the queue, B slots, R = B p rows of the network for p particles each.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from ipr_jax.core import Denoiser, Prediction
from ipr_jax.runtime import sharding
from ipr_jax.sampling import step

Carry = TypeVar("Carry")

INPUT = "input"
"""What iteration 0 is where a method starts from the given images: what its ``start`` says."""

FOREVER = np.iinfo(np.int32).max
"""A number of evaluations or of iterations that is never reached."""


class Problem(NamedTuple):
    """What is to be solved: keys [B], image float32 [B, H, W, C], editable bool [B, h, w]."""

    keys: jax.Array
    image: jax.Array
    editable: jax.Array


class Costs(NamedTuple):
    """What a problem has cost, int32 [B] each.

    Attributes:
        nfe: network evaluations, counted by the loop.
        nbe: backward passes through the network or a verifier, counted by the method.
        nve: calls of a verifier, counted by the method.
    """

    nfe: jax.Array
    nbe: jax.Array
    nve: jax.Array


class State(NamedTuple):
    """Where B problems are. Rows of problem b are b p to b p + p - 1.

    Attributes:
        z: float32 [R, H, W, C], what the network sees next.
        t: float32 [R, h, w], at which noise levels.
        image: float32 [B, H, W, C], the answer so far: where the last iteration ended.
        iteration: int32 [B], iterations that are over.
        done: bool [B], no more evaluations are wanted.
        finite: bool [B], False once an iteration has ended in an image that is not.
        costs: so far.
        memory: what the method remembers, a pytree of arrays, each [B, ...].
    """

    z: jax.Array
    t: jax.Array
    image: jax.Array
    iteration: jax.Array
    done: jax.Array
    finite: jax.Array
    costs: Costs
    memory: Any


class Method(Protocol):
    """A way to spend evaluations: two pure functions of a value.

    The value is a pytree whose leaves are arguments of the compiled program; what else it holds is
    compared by ``==`` and decides which program that is. Both functions treat every problem on its
    own and keep shapes and dtypes.
    """

    def init(self, problem: Problem) -> State:
        """The state before the first evaluation, from ``begin``."""
        ...

    def update(self, problem: Problem, state: State, prediction: Prediction) -> State:
        """What follows from an evaluation of ``state.z`` at ``state.t``.

        Where an iteration ends, ``image`` becomes the answer so far and ``iteration`` one more.
        Rows without meaning (problems that are done or wait) may become anything.
        """
        ...


def begin(problem: Problem, z: jax.Array, t: jax.Array, memory: Any) -> State:
    """A state before the first evaluation; problems without editable patches are done."""
    some, zeros = problem.editable.any(axis=(1, 2)), jnp.zeros(problem.keys.shape, jnp.int32)
    return State(
        z=z,
        t=t,
        image=problem.image,
        iteration=zeros,
        done=~some,
        finite=some | is_finite(problem.image),
        costs=Costs(zeros, zeros, zeros),
        memory=memory,
    )


def is_finite(image: jax.Array) -> jax.Array:
    """Whether images [B, ...] are numbers everywhere: bool [B]."""
    return jnp.isfinite(image).all(axis=tuple(range(1, image.ndim)))


class Answers(NamedTuple):
    """Of N problems, the fields of ``State`` of the same names."""

    image: jax.Array
    iteration: jax.Array
    finite: jax.Array
    costs: Costs


class Work(NamedTuple):
    """A queue in work: all that the loop changes, and with the queue all that is needed to go on.

    Attributes:
        place: int32 [B], place in the queue of what is in a slot.
        state: of the slots.
        answers: of the queue, [N, ...]: those of the problems that have left their slot; None where
            all have one to themselves.
        taken: int32 [1], problems that have got a slot.
        spent: int32 [1], rows that the network has seen, idle ones included.
    """

    place: jax.Array
    state: State
    answers: Answers | None
    taken: jax.Array
    spent: jax.Array


def start(method: Method, queue: Problem, slots: int | None = None) -> Work:
    """Put the first problems of a queue into the slots. Jittable.

    Args:
        method: how to solve them.
        queue: N problems; those that need more evaluations should come first.
        slots: B; None, or at least N = every problem has one to itself.
    """
    number = queue.image.shape[0]
    if slots is None or slots >= number:
        return at_once(method.init(queue))
    state = method.init(jax.tree.map(lambda part: part[:slots], queue))
    unsolved = begin(queue, queue.image, queue.editable, None)
    return at_once(state)._replace(answers=_answers(unsolved))


def at_once(state: State) -> Work:
    """Problems in the state that they are in, with a slot for each."""
    number = state.image.shape[0]
    return Work(
        place=jnp.arange(number, dtype=jnp.int32),
        state=state,
        answers=None,
        taken=jnp.full(1, number, jnp.int32),
        spent=jnp.zeros(1, jnp.int32),
    )


def advance(
    denoise: Denoiser,
    method: Method,
    queue: Problem,
    work: Work,
    *,
    ticks: jax.Array | int = FOREVER,
    iterations: jax.Array | int = FOREVER,
    budget: jax.Array | int = FOREVER,
    parts: tuple[int, ...] = (1,),
    most: int | None = None,
) -> Work:
    """Evaluate the network until nothing is left to do. Jittable; nothing is exchanged with others.

    Args:
        denoise: the model.
        method: how to solve the problems.
        queue: as given to ``start``.
        work: from ``start``, ``at_once`` or ``advance``.
        ticks: int32 scalar, at most so many evaluations.
        iterations: int32 scalar; a problem that has so many behind it waits.
        budget: int32 scalar; a problem that could exceed so many evaluations is done.
        parts: the network is compiled for B / part rows for each of them, and sees the fewest rows
            that hold all problems that are not done.
        most: rows that the network sees at once, as ``sharding.rows_at_once`` says; None = all. If
            there are more, they are split evenly, and only as many parts as hold the problems that
            are not done are evaluated, one after the other; ``parts`` say nothing then.

    Raises:
        ValueError: while tracing: the method's state changes its form, naming the leaf; or the
            denoiser returns no prediction.
    """
    slots, number = work.place.shape[0], queue.image.shape[0]
    rows, images = work.state.z.shape, work.state.image.shape
    particles = 1 if rows == images else rows[0] // images[0]
    widths = tuple(sorted({-(-slots // part) for part in parts})) if len(parts) > 1 else (slots,)
    if most is not None and isinstance(slots, int) and slots * particles > most:
        calls = -(-slots // max(1, most // particles))
        widths = (-(-slots // calls),)

    given = (method, queue, work, jnp.int32(0), jnp.asarray(iterations, jnp.int32))
    method, queue, work, tick, iterations = settled(denoise, method, queue, work.state, given)

    def waiting(state: State) -> jax.Array:
        return ~state.done & (state.iteration < iterations)

    def turn(carry: tuple[jax.Array, Work]) -> tuple[jax.Array, Work]:
        tick, work = carry
        old, busy = work.state, waiting(work.state)
        problem = queue
        if work.answers is not None:
            problem = jax.tree.map(lambda part: part[work.place], queue)
        prediction = on_rows(
            partial(step.predict, denoise),
            busy,
            widths,
            old.z,
            old.t,
            like=Prediction(old.z, old.z, old.t),
            each=particles,
        )
        new = method.update(problem, old, prediction)
        _check_form(old, new)
        costs = new.costs._replace(nfe=old.costs.nfe + particles)
        new = new._replace(
            costs=costs,
            done=new.done | (costs.nfe > jnp.asarray(budget, jnp.int32) - particles),
            finite=old.finite & (is_finite(new.image) | (new.iteration == old.iteration)),
        )
        work = work._replace(
            state=where(busy, new, old), spent=work.spent + particles * _width(busy, widths)
        )
        leaves = work.state.done & ~old.done
        if work.answers is not None:
            work = jax.lax.cond(leaves.any(), refill, lambda work, _: work, work, leaves)
        return tick + 1, work

    def refill(work: Work, leaves: jax.Array) -> Work:
        """Keep the answers of problems that are done and give their slots to the next ones."""
        place = jnp.where(leaves, work.place, number)  # beyond: not written
        answers = jax.tree.map(
            lambda all_, mine: all_.at[place].set(mine, mode="drop"),
            work.answers,
            _answers(work.state),
        )
        later = work.taken + jnp.cumsum(leaves, dtype=jnp.int32) - 1
        enters = leaves & (later < number)
        place = jnp.where(enters, later, work.place)
        state = method.init(jax.tree.map(lambda part: part[place], queue))
        return Work(
            place=place,
            state=where(enters, state, work.state),
            answers=answers,
            taken=work.taken + enters.sum(dtype=jnp.int32),
            spent=work.spent,
        )

    def going(carry: tuple[jax.Array, Work]) -> jax.Array:
        tick, work = carry
        return (tick < ticks) & waiting(work.state).any()

    return jax.lax.while_loop(going, turn, (tick, work))[1]


def settled(denoise: Denoiser, method: Method, queue: Problem, state: State, carry: Carry) -> Carry:
    """``sharding.settled`` for the carry of a loop over evaluations."""

    def given() -> Any:
        prediction = jax.eval_shape(partial(step.predict, denoise), state.z, state.t)
        return denoise, method, queue, prediction

    return sharding.settled(carry, given)


def answers(work: Work) -> Answers:
    """What is known of all problems, in the order of the queue. Jittable."""
    mine = _answers(work.state)
    if work.answers is None:
        return mine
    return jax.tree.map(lambda all_, mine: all_.at[work.place].set(mine), work.answers, mine)


def _answers(state: State) -> Answers:
    return Answers(state.image, state.iteration, state.finite, state.costs)


def where(which: jax.Array, new: State, old: State) -> State:
    """The one state for problems where bool [B], the other elsewhere."""

    def choose(new: jax.Array, old: jax.Array) -> jax.Array:
        mine = which
        if new.shape[:1] != which.shape:
            mine = jnp.repeat(which, new.shape[0] // which.shape[0])
        return by_sample(mine, new, old)

    return jax.tree.map(choose, new, old)


def by_sample(where: jax.Array, new: jax.Array, old: jax.Array) -> jax.Array:
    """Rows of the one where bool [B], else of the other: each [B, ...]."""
    return jnp.where(where.reshape(-1, *(1,) * (new.ndim - 1)), new, old)


def _check_form(old: State, new: State) -> None:
    """Refuse a state that ``update`` has given another form.

    Raises:
        ValueError: names the leaf.
    """

    def form(state: State) -> dict[str, str]:
        leaves = jax.tree_util.tree_leaves_with_path(state)
        return {
            jax.tree_util.keystr(path): f"{leaf.dtype} {list(leaf.shape)}" for path, leaf in leaves
        }

    before, after = form(old), form(new)
    for name in [*before, *(after.keys() - before.keys())]:
        was, now = before.get(name, "missing"), after.get(name, "missing")
        if was != now:
            raise ValueError(
                f"update must keep the form of the state: {name} was {was} and became {now}"
            )


def _narrowest(where: jax.Array, widths: tuple[int, ...]) -> jax.Array:
    """Position of the smallest of the widths, increasing, that is not below the count of True."""
    return (jnp.asarray(widths, jnp.int32) < where.sum(dtype=jnp.int32)).sum(dtype=jnp.int32)


def _calls(where: jax.Array, width: int) -> jax.Array:
    """How many batches of a width hold what is True."""
    return -(-where.sum(dtype=jnp.int32) // width)


def _width(where: jax.Array, widths: tuple[int, ...]) -> jax.Array | int:
    """Of how many rows, for ``on_rows``, the function is evaluated."""
    if widths[-1] < where.shape[0]:
        return widths[-1] * _calls(where, widths[-1])
    if len(widths) == 1:
        return widths[0]
    return jnp.asarray(widths, jnp.int32)[_narrowest(where, widths)]


def on_rows(
    function: Callable[..., Any],
    where: jax.Array,
    widths: tuple[int, ...],
    *arrays: jax.Array,
    like: Any,
    each: int = 1,
) -> Any:
    """Evaluate a function on the rows that count, in the smallest batches that hold them.

    Args:
        function: of arrays [n, ...] for every n in ``widths`` (times ``each``), a pytree of arrays
            [n, ...]; each of its rows follows from the same rows of its arguments.
        where: bool [B], what counts.
        widths: sizes of a batch, increasing; the last is B, or there is one that is less, and as
            many such batches as hold the rows are evaluated one after the other.
        arrays: the arguments, each [B each, ...].
        like: arrays [B each, ...] of the dtypes and shapes that all rows of the result have.
        each: rows that each entry of ``where`` stands for.

    Returns:
        What ``function`` gives, [B each, ...]; without meaning in the rows that do not count.
    """
    size, last = where.shape[0], widths[-1]
    if widths == (size,):
        return function(*arrays)
    first = jnp.argsort(~where)

    def put(found: Any, start: jax.Array | int, width: int) -> Any:
        """With the rows from some place in the order filled in."""
        rows = jax.lax.dynamic_slice_in_dim(first, start, width)
        if each > 1:
            rows = (rows[:, None] * each + jnp.arange(each, dtype=rows.dtype)[None]).reshape(-1)
        new = function(*(part[rows] for part in arrays))
        return jax.tree.map(lambda part, new: part.at[rows].set(new), found, new)

    if last < size:
        return jax.lax.fori_loop(
            0, _calls(where, last), lambda i, found: put(found, i * last, last), like
        )
    branches = [lambda width=width: put(like, 0, width) for width in widths[:-1]]
    return jax.lax.switch(_narrowest(where, widths), [*branches, lambda: function(*arrays)])
