"""Iterative Partial Refinement (arXiv 2605.19317, algorithm 1): the outer loop."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ipr_jax.core import Denoiser, check
from ipr_jax.core import keys as random_keys
from ipr_jax.methods import selection
from ipr_jax.methods.selection import Noise, Selection
from ipr_jax.runtime import Program, driver, sharding
from ipr_jax.sampling import (
    FIRST_PASS,
    REFINEMENT,
    Order,
    Sampled,
    Sampling,
    Settings,
    regenerate,
    renoise,
)

Record = Callable[[jax.Array], Any]
"""``record(image [B, H, W, C]) -> pytree``, what to keep of every iteration."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Refinement:
    """A whole experiment: a first pass, then iterations.

    Attributes:
        iterations: after the first pass, at least 0.
        ratio: the share of the editable patches that an iteration regenerates, in (0, 1].
        first: how the first pass samples; None starts from the given images (correction mode).
        later: how the iterations sample.
        select: which patches an iteration regenerates.
        noise: from which noise.

    Raises:
        ValueError: a value is out of range, naming it and the range.
    """

    iterations: int = 20
    ratio: float = 0.25
    first: Sampling | None = FIRST_PASS
    later: Sampling = REFINEMENT
    select: Selection = selection.fresh_regions
    noise: Noise = selection.fresh_noise

    def __post_init__(self) -> None:
        check.count("iterations", self.iterations, least=0)
        selection.region_sizes(1, self.ratio)

    @property
    def start(self) -> str:
        """What iteration 0 is, for tables and pictures."""
        return "input" if self.first is None else "first pass"


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


def iterate(
    denoise: Denoiser,
    keys: jax.Array,
    image: jax.Array,
    editable: jax.Array,
    iteration: jax.Array | int,
    sizes: jax.Array,
    settings: Settings,
    *,
    order: Order,
    select: Selection,
    noise: Noise,
) -> Sampled:
    """One iteration: choose a region, re-noise it, regenerate it. Jittable; checks nothing.

    Args:
        denoise: the model.
        keys: [B], of the samples, the same in every iteration.
        image: float32 [B, H, W, C], the samples so far.
        editable: bool [B, h, w].
        iteration: int32 scalar, from 1.
        sizes: int32 [P + 1], ``selection.region_sizes``.
        settings: from ``Sampling.settings``.
        order: which waiting patch starts next.
        select: which patches are regenerated.
        noise: from which noise.

    Returns:
        The samples; patches outside the region are bit-identical.

    Raises:
        ValueError: a function returns something of another shape or dtype; at trace.
    """
    region = selection.choose(select(keys, iteration, editable.shape[1:]), editable, sizes)
    new = noise(keys, iteration, image.shape[1:])
    new = check.returned("what noise returns", new, image.shape, jnp.float32)
    return regenerate(
        denoise,
        random_keys.iteration_keys(keys, iteration).denoise,
        renoise(image, region, new),
        region,
        settings,
        order,
    )


@partial(jax.jit, static_argnames=("order", "select", "noise", "mesh"))
def iterate_of(
    denoise: Denoiser,
    keys: jax.Array,
    image: jax.Array,
    editable: jax.Array,
    iteration: jax.Array | int,
    sizes: jax.Array,
    settings: Settings,
    *,
    order: Order,
    select: Selection,
    noise: Noise,
    mesh: Mesh | None,
) -> Sampled:
    """``iterate``, compiled, with the samples spread over a mesh."""
    one = partial(iterate, order=order, select=select, noise=noise)
    each = sharding.each_device(one, mesh, (None, 0, 0, 0, None, None, None), out_axes=0)
    return each(denoise, keys, image, editable, iteration, sizes, settings)


_AXES = Refined(0, 1, 1, 1)  # pyright: ignore[reportArgumentType]
"""Of the samples in a result."""


@partial(jax.jit, static_argnames=("iterations", "order", "select", "noise", "record", "mesh"))
def _refine(
    denoise: Denoiser,
    keys: jax.Array,
    image: jax.Array,
    editable: jax.Array,
    start: jax.Array,
    sizes: jax.Array,
    settings: Settings,
    *,
    iterations: int,
    order: Order,
    select: Selection,
    noise: Noise,
    record: Record | None,
    mesh: Mesh | None,
) -> Refined:
    one = partial(iterate, order=order, select=select, noise=noise)

    def every(
        denoise: Denoiser,
        keys: jax.Array,
        image: jax.Array,
        editable: jax.Array,
        start: jax.Array,
        *numbers: Any,
    ) -> Refined:
        def body(image: jax.Array, iteration: jax.Array) -> tuple[jax.Array, tuple[Any, ...]]:
            sampled = one(denoise, keys, image, editable, iteration, *numbers)
            recorded = None if record is None else _recorded(record, sampled.image)
            return sampled.image, (sampled.nfe, sampled.finite, recorded)

        which = start + jnp.arange(1, iterations + 1, dtype=jnp.int32)
        image = sharding.settled(lambda image: body(image, which[0])[0], image)
        image, info = jax.lax.scan(body, image, which)
        return Refined(image, *info)

    each = sharding.each_device(every, mesh, (None, 0, 0, 0, None, None, None), _AXES)
    return each(denoise, keys, image, editable, start, sizes, settings)


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
            ``refine(10)``, then ``refine(10, start=10)`` with the same keys.
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
    selection.check_functions(select, noise)
    if record is not None:
        check.function("record", record, "image -> arrays")
    num_patches = editable.shape[1] * editable.shape[2]
    mesh = sharding.of_samples(mesh, denoise, keys, image, editable)
    if mesh is not None and record is not None:
        _check_record(record, image)
    arguments = (
        check.as_pytree(denoise),
        *sharding.spread(mesh, keys, jnp.asarray(image), jnp.asarray(editable)),
        jnp.asarray(start, jnp.int32),
        selection.region_sizes(num_patches, ratio),
        sampling.settings(num_patches),
    )
    static = {
        "iterations": iterations,
        "order": sampling.order,
        "select": select,
        "noise": noise,
        "record": record,
        "mesh": mesh,
    }
    return Program(
        _refine, arguments, static, lambda found: sharding.cut(found, keys.shape[0], mesh, _AXES)
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
