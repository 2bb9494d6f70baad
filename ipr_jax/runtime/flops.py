"""Count the arithmetic of a function: 2 x multiply-adds of convolutions and matrix products."""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core


def count(function: Callable[..., Any], *args: Any) -> int:
    """FLOPs of one call; a loop body counts once, padding counts as arithmetic.

    Args:
        function: traced, not run.
        *args: arrays or ``jax.ShapeDtypeStruct`` (or pytrees of them).
    """
    return _count(jax.make_jaxpr(function)(*args).jaxpr)


def _shape(variable: Any) -> tuple[int, ...]:
    return variable.aval.shape


def _count(jaxpr: core.Jaxpr) -> int:
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "conv_general_dilated":
            kernel = _shape(equation.invars[1])
            channels_out = kernel[equation.params["dimension_numbers"].rhs_spec[0]]
            per_output = math.prod(kernel) // channels_out
            total += 2 * math.prod(_shape(equation.outvars[0])) * per_output
        elif equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            shape = _shape(equation.invars[0])
            depth = math.prod(shape[axis] for axis in contracted)
            total += 2 * math.prod(_shape(equation.outvars[0])) * depth
        total += sum(_count(inner) for inner in core.jaxprs_in_params(equation.params))
    return total
