"""Solve problems by a method in one compiled program; on several devices each has its share."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ipr_jax.core import Denoiser, check
from ipr_jax.methods import engine
from ipr_jax.methods.engine import FOREVER, INPUT, Answers, Method, Problem, State
from ipr_jax.runtime import Program, Size, driver, memory, sharding

Result = TypeVar("Result")


class Found(NamedTuple):
    """What the program gives, in the order of the queue.

    Attributes:
        answers: of every problem, each [N, ...].
        spent: int32 scalar, rows that the network saw, idle ones included.
    """

    answers: Answers
    spent: jax.Array


def _solve(
    denoise: Denoiser,
    method: Method,
    queue: Problem,
    budget: jax.Array,
    before: jax.Array,
    *,
    slots: int | None,
    parts: tuple[int, ...],
    most: int | None,
) -> Found:
    order = None
    if slots is not None and slots < queue.image.shape[0]:
        order = jnp.argsort(-queue.editable.sum(axis=(1, 2)))
        queue = jax.tree.map(lambda part: part[order], queue)
    work = engine.start(method, queue, slots)
    work = engine.advance(denoise, method, queue, work, budget=budget, parts=parts, most=most)
    answers = engine.answers(work)
    if order is not None:
        place = jnp.argsort(order)
        answers = jax.tree.map(lambda part: part[place], answers)
    iteration = jnp.maximum(answers.iteration - before, 0)
    return Found(answers._replace(iteration=iteration), work.spent)


@partial(jax.jit, static_argnames=("slots", "parts", "most", "mesh"))
def _solve_on(
    denoise: Denoiser,
    method: Method,
    queue: Problem,
    budget: jax.Array,
    before: jax.Array,
    *,
    mesh: Mesh | None,
    **static: Any,
) -> Found:
    """A queue, solved, with the problems spread over a mesh; then ``spent`` is by device."""
    each = sharding.each_device(
        partial(_solve, **static), mesh, in_axes=(None, None, 0, None, None), out_axes=0
    )
    found = each(denoise, method, queue, budget, before)
    return found if mesh else found._replace(spent=found.spent[0])


@partial(jax.jit, static_argnames="mesh")
def begin_on(method: Method, problem: Problem, *, mesh: Mesh | None) -> State:
    """``method.init``, compiled, with the problems spread over a mesh."""
    each = sharding.each_device(
        lambda method, problem: method.init(problem), mesh, in_axes=(None, 0), out_axes=0
    )
    return each(method, problem)


@partial(jax.jit, static_argnames=("most", "mesh"))
def advance_on(
    denoise: Denoiser,
    method: Method,
    problem: Problem,
    state: State,
    iterations: jax.Array | int,
    ticks: jax.Array | int = FOREVER,
    *,
    most: int | None,
    mesh: Mesh | None,
) -> State:
    """``engine.advance`` with a slot for each problem, compiled, spread over a mesh."""

    def every(
        denoise: Denoiser,
        method: Method,
        problem: Problem,
        state: State,
        iterations: jax.Array,
        ticks: jax.Array,
    ) -> State:
        work = engine.at_once(state)
        work = engine.advance(
            denoise, method, problem, work, iterations=iterations, ticks=ticks, most=most
        )
        return work.state

    each = sharding.each_device(every, mesh, in_axes=(None, None, 0, 0, None, None), out_axes=0)
    return each(denoise, method, problem, state, iterations, ticks)


def spread(
    mesh: Mesh | None,
    keys: jax.Array,
    image: jax.Array | np.ndarray,
    editable: jax.Array | np.ndarray,
) -> Problem:
    """A queue on the devices of a mesh, filled up with problems that have nothing to do."""
    return Problem(*sharding.spread(mesh, keys, jnp.asarray(image), jnp.asarray(editable)))


def program(
    denoise: Denoiser,
    method: Method,
    queue: Problem,
    mesh: Mesh | None,
    finish: Callable[[Found], Result],
    *,
    slots: Size | None = None,
    budget: int = FOREVER,
    before: int = 0,
    parts: tuple[int, ...] = (1,),
    most: int | None = None,
) -> Program[Result]:
    """The program that solves a queue.

    Args:
        denoise: the model.
        method: how, for the grid of the queue.
        queue: N problems, on the host.
        mesh: the devices that share them; None = where the arrays are.
        finish: makes the result, on the host, of what was found.
        slots: problems at work at once, "auto" = as many as fit; None = all.
        budget: evaluations that no problem exceeds.
        before: iterations that do not count as such, as a first pass.
        parts: as for ``engine.advance``.
        most: likewise; None also where the model may be bound to the batch.
    """
    number, devices = queue.image.shape[0], 1 if mesh is None else mesh.size
    numbers = np.int32(budget), np.int32(before)
    arguments = (check.as_pytree(denoise), method, spread(mesh, *queue), *numbers)

    def own(found: Found) -> Result:
        if mesh is not None:
            answers = sharding.cut(found.answers, number, mesh, 0)
            found = Found(answers, found.spent.sum(dtype=jnp.int32))
        return finish(found)

    static = {"parts": parts, "most": most, "mesh": mesh}

    def at(slots: int | None) -> Program[Result]:
        return Program(_solve_on, arguments, static | {"slots": slots}, own)

    if slots is None:
        return at(None)
    size = slots if slots == "auto" else -(-slots // devices)  # sizes are those of one device
    return at(memory.choose(size, -(-number // devices), at))


class Solved(NamedTuple):
    """Answers and what they cost. N problems.

    Attributes:
        image: float32 [N, H, W, C].
        iterations: int32 [N], iterations of the method.
        finite: bool [N], False for a problem with an iteration whose image was not finite.
        nfe: int32 [N], network evaluations.
        nbe: int32 [N], backward passes.
        nve: int32 [N], calls of a verifier.
        row_evaluations: int32 scalar, rows that the network saw, idle ones included.
    """

    image: jax.Array
    iterations: jax.Array
    finite: jax.Array
    nfe: jax.Array
    nbe: jax.Array
    nve: jax.Array
    row_evaluations: jax.Array

    @property
    def idle(self) -> float:
        """The share of the rows that no problem needed, in [0, 1)."""
        spent = int(self.row_evaluations)
        return 1 - int(np.asarray(self.nfe).sum()) / spent if spent else 0.0


def of_grid(method: Any, grid: tuple[int, ...]) -> Method:
    """The method for a grid, of one that is made for it (by ``on``) or serves any.

    Raises:
        ValueError: it is no method, or no pytree.
    """
    check_method(method)
    made = method.on(grid) if hasattr(method, "on") else method
    check_method(made)
    if jax.tree_util.all_leaves([made]):
        name = type(made).__name__
        raise ValueError(
            f"method must be a pytree, got a {name}, which is none: register the class, and every "
            f"one derived from it, by jax.tree_util.register_dataclass"
        )
    return made


def budget_of(method: Any, grid: tuple[int, ...]) -> int:
    """Network evaluations that no sample of a method within another one exceeds.

    Raises:
        ValueError: the method does not tell.
    """
    if not hasattr(method, "budget"):
        raise ValueError(
            f"method must tell how many evaluations it takes, as budget(grid), within another "
            f"one; got {check.told(method)}"
        )
    return method.budget(grid)


def check_method(method: Any) -> None:
    """Refuse what is no method and makes none.

    Raises:
        ValueError: says what it must have.
    """
    names = ("on",) if hasattr(method, "on") else ("init", "update")
    if isinstance(method, type) or not all(callable(getattr(method, each, None)) for each in names):
        raise ValueError(
            f"method must have init(problem) and update(problem, state, prediction), "
            f"see ipr_jax.methods.engine; got {check.told(method)}"
        )


@driver
def solve(
    denoise: Denoiser,
    keys: jax.Array,
    image: jax.Array | np.ndarray,
    editable: jax.Array | np.ndarray,
    *,
    method: Any,
    slots: Size | None = None,
    budget: int | None = None,
    mesh: Mesh | None = None,
) -> Program[Solved]:
    """Solve problems by any method; a slot whose problem is done takes the next one.

    One compiled program per number of problems and slots and choice of functions; what the method
    holds of arrays and numbers is its arguments. Under ``jit`` and the like, and for derivatives,
    it is as ``generate``.

    Args:
        denoise: the model, for any number of images, each on its own.
        keys: [N], from ``sample_keys``.
        image: float32 [N, H, W, C]; clues in [-1, 1].
        editable: bool [N, h, w]; False = a clue, returned bit for bit. A problem without editable
            patches comes back as it is, at 0 evaluations.
        method: an ``engine.Method``, or what makes one for a grid, such as ``Refinement``; what has
            ``row_parts`` has the network compiled for them, the ``parts`` of ``engine.advance``.
        slots: problems at work at once, at least 1; "auto" = as many as fit on the device; None =
            all of them. On a CPU the network sees many of them in parts, and only as many as hold
            those that are not done (``runtime.sharding.rows_at_once``).
        budget: network evaluations that no problem exceeds, at least 1 or what the method tells as
            its ``least_budget``; None where the method tells itself, as ``Refinement`` does.
        mesh: as for ``generate``; each device has its share of the queue and of the slots.

    Returns:
        The answers, and what they cost.

    Raises:
        ValueError: keys, images and masks do not belong together, a clue is out of range, a pixel
            that the method starts from is not finite, an argument is of another type, or the method
            has no end; at trace, ``update`` gives the state another form, or a function returns
            another shape or dtype.
        MemoryError: with ``slots="auto"``, if a single problem does not fit.
    """
    check.batch(keys, image, editable)
    check.clues(image, editable)
    if getattr(method, "start", None) == INPUT:
        check.samples(image, editable)
    if slots is not None:
        slots = check.count("slots", slots, auto=True)
    grid = (editable.shape[1], editable.shape[2])
    made = of_grid(method, grid)
    if budget is None:
        derived = getattr(method, "budget", None)
        if derived is None:
            raise ValueError(
                f"{type(method).__name__} does not tell how many evaluations it takes, give budget"
            )
        budget = derived(grid)
    least = getattr(method, "least_budget", None)
    evaluations: int = check.count("budget", budget, 1 if least is None else least(grid))
    shared = sharding.of_samples(mesh, denoise, keys, image, editable)
    most = sharding.rows_at_once(mesh, grid)

    def finish(found: Found) -> Solved:
        image, iteration, finite, costs = found.answers
        return Solved(image, iteration, finite, *costs, found.spent)

    queue = Problem(keys, jnp.asarray(image), jnp.asarray(editable))
    parts = getattr(method, "row_parts", (1,))
    return program(
        denoise,
        made,
        queue,
        shared,
        finish,
        slots=slots,
        budget=evaluations,
        parts=parts,
        most=most,
    )
