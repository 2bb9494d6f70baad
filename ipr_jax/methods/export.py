"""Refinement as one file that runs without this library: a serialized JAX program.

The file is what ``jax.export`` makes of the first pass and the iterations, with the weights inside
and the batch size left open. It is read by ``jax.export.deserialize``, wherever JAX and the package
flatbuffers are installed.
"""

import jax
import jax.numpy as jnp
from jax import export

from ipr_jax.methods import stopping
from ipr_jax.methods.ipr import Refinement
from ipr_jax.methods.refinement import generate, refine
from ipr_jax.models import Model, compute_in

PLATFORMS = ("cpu", "cuda", "tpu")
"""Where the program runs."""


def serialize(model: Model, refinement: Refinement, precision: str = "float32") -> bytearray:
    """Make the program of a model: ``generate``, then ``refine``.

    Its arguments, of which it checks no value: the data of the samples' keys, uint32 [b, 2]; image,
    float32 [b, H, W, C] in [-1, 1], of which only the clues are read if there is a first pass;
    editable, bool [b, h, w]. Its result is a dictionary: ``first_pass`` and ``refined``, float32
    [b, H, W, C]; ``nfe``, int32 [b], network evaluations that each sample's schedules took;
    ``finite``, bool [b], False for a sample that was not finite at some time. The size b of a batch
    is any; the program is compiled for each.

    Args:
        model: its weights become constants of the program.
        refinement: what to do, with at least 1 iteration; without a first pass, ``first_pass`` is
            the given image.
        precision: of the network, a name of ``PRECISIONS``.

    Returns:
        The program, for ``jax.export.deserialize``.

    Raises:
        ValueError: no iterations, a stopping rule, an unknown precision, or the model needs a
            condition.
    """
    if refinement.stop is not stopping.never:
        raise ValueError(f"stop must be never for an export, got {refinement.stop.__name__}")
    denoise = compute_in(model, precision)

    def run(key_data: jax.Array, image: jax.Array, editable: jax.Array) -> dict[str, jax.Array]:
        keys = jax.random.wrap_key_data(key_data, impl="threefry2x32")
        nfe, finite = jnp.zeros(keys.shape, jnp.int32), jnp.ones(keys.shape, bool)
        if refinement.first is not None:
            image, nfe, finite = generate(denoise, keys, image, editable, refinement.first)
        refined = refine(
            denoise,
            keys,
            image,
            editable,
            iterations=refinement.iterations,
            ratio=refinement.ratio,
            sampling=refinement.later,
            select=refinement.select,
            noise=refinement.noise,
        )
        return {
            "first_pass": image,
            "refined": refined.image,
            "nfe": nfe + refined.nfe.sum(axis=0),
            "finite": finite & refined.finite.all(axis=0),
        }

    (b,) = export.symbolic_shape("b")
    shapes = (
        jax.ShapeDtypeStruct((b, 2), jnp.uint32),
        jax.ShapeDtypeStruct((b, *model.config.image_shape), jnp.float32),
        jax.ShapeDtypeStruct((b, *model.config.grid), jnp.bool_),
    )
    return export.export(jax.jit(run), platforms=PLATFORMS)(*shapes).serialize()
