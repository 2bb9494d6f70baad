"""Precisions in which a network can compute, by name.

Parameters, norms, softmax, noise levels, the arithmetic between evaluations and the images that are
carried stay float32 in all of them.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from ipr_jax.core import Denoiser, Prediction, rngs
from ipr_jax.models.denoiser import Model, new_model


class Precision(NamedTuple):
    """How a network computes.

    Attributes:
        dtype: of activations, and of what convolutions and products take.
        products: of float32 products, as ``jax.default_matmul_precision`` names it; None = the
            device's own.
    """

    dtype: Any
    products: str | None


PRECISIONS: dict[str, Precision] = {
    "float32": Precision(jnp.float32, "highest"),
    "tf32": Precision(jnp.float32, "tensorfloat32"),
    "bfloat16": Precision(jnp.bfloat16, None),
}
"""float32 to its last bit on any device; tf32 on a GPU that has it, as float32 elsewhere."""


def get_precision(name: str) -> Precision:
    """The precision of a name.

    Raises:
        ValueError: unknown; lists the known ones.
    """
    if name not in PRECISIONS:
        raise ValueError(f"unknown precision {name!r}; known: {', '.join(PRECISIONS)}")
    return PRECISIONS[name]


def compute_in(model: Model, precision: str) -> Denoiser:
    """The same weights, computing in a precision.

    Args:
        model: any.
        precision: a name of ``PRECISIONS``.

    Returns:
        A denoiser, a pytree.

    Raises:
        ValueError: an unknown precision; lists the known ones.
    """
    dtype = get_precision(precision).dtype
    if model.dtype != dtype:
        built = nnx.eval_shape(lambda: new_model(model.config, dtype=dtype, rngs=rngs(0)))
        model = nnx.merge(nnx.graphdef(built), nnx.state(model))
    return jax.tree_util.Partial(_CALLS[precision], model)


def _call(precision: str) -> Any:
    def call(model: Model, z: jax.Array, t: jax.Array) -> Prediction:
        with jax.default_matmul_precision(PRECISIONS[precision].products):
            return model(z, t)

    return call


_CALLS = {precision: _call(precision) for precision in PRECISIONS}
