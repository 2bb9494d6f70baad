"""A method as one file that runs without this library: a serialized JAX program.

The file is what ``jax.export`` makes of it, with the weights inside and the batch size left open.
It is read by ``jax.export.deserialize``, wherever JAX and the package flatbuffers are installed.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import export

from ipr_jax.core import check
from ipr_jax.methods import engine
from ipr_jax.methods.engine import Problem
from ipr_jax.methods.ipr import Refinement
from ipr_jax.methods.solving import of_grid
from ipr_jax.models import Model, compute_in

PLATFORMS = ("cpu", "cuda", "tpu")
"""Where the program runs."""


def serialize(model: Model, method: Any, precision: str = "float32") -> bytearray:
    """Make the program of a model and a method.

    Its arguments, of which it checks no value: the data of the samples' keys, uint32 [b, 2]; image,
    float32 [b, H, W, C] in [-1, 1], of which only the clues are read if the method begins from
    noise; editable, bool [b, h, w]. Its result is a dictionary: ``refined``, float32 [b, H, W, C];
    ``nfe``, int32 [b], network evaluations of each sample; ``finite``, bool [b], False for a sample
    that was not finite at some time; and of a ``Refinement`` with a first pass also ``first_pass``,
    float32 [b, H, W, C]. The size b of a batch is any; the program is compiled for each.

    Args:
        model: its weights become constants of the program.
        method: what to do, as for ``solve``, and with an end of its own.
        precision: of the network, a name of ``PRECISIONS``.

    Returns:
        The program, for ``jax.export.deserialize``.

    Raises:
        ValueError: it is no method, an unknown precision, or the model needs a condition.
    """
    denoise = check.as_pytree(compute_in(model, precision))
    made = of_grid(method, model.config.grid)

    def run(key_data: jax.Array, image: jax.Array, editable: jax.Array) -> dict[str, jax.Array]:
        keys = jax.random.wrap_key_data(key_data, impl="threefry2x32")
        problem, found = Problem(keys, image, editable), {}
        work = engine.at_once(made.init(problem))
        if isinstance(method, Refinement) and method.first is not None:
            work = engine.advance(denoise, made, problem, work, iterations=1)
            found["first_pass"] = work.state.image
        state = engine.advance(denoise, made, problem, work).state
        return {
            **found,
            "refined": state.image,
            "nfe": state.costs.nfe,
            "finite": state.finite,
        }

    (b,) = export.symbolic_shape("b")
    shapes = (
        jax.ShapeDtypeStruct((b, 2), jnp.uint32),
        jax.ShapeDtypeStruct((b, *model.config.image_shape), jnp.float32),
        jax.ShapeDtypeStruct((b, *model.config.grid), jnp.bool_),
    )
    return export.export(jax.jit(run), platforms=PLATFORMS)(*shapes).serialize()
