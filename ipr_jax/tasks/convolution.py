"""A convolution whose gradient is fast within the loops of a program, too."""

from functools import partial
from typing import Any

import jax
from flax import nnx
from jax import lax


def convolve(
    image: jax.Array,
    kernel: jax.Array,
    strides: Any,
    padding: Any,
    *,
    dimension_numbers: lax.ConvDimensionNumbers,
    **options: Any,
) -> jax.Array:
    """``jax.lax.conv_general_dilated``, for ``nnx.Conv(conv_general_dilated=convolve)``.

    Its gradient with respect to the image is a convolution by the kernel with its axes of channels
    exchanged. In the body of a loop XLA does not put these back in order for the fast routines of a
    CPU, and takes seven times as long (measured: JAX 0.10.2). Here the derivative is written with
    the exchanged kernel, so that its transpose has the usual one. It is forward mode that is slow
    then, and that computes the convolution by the kernel's tangent even where that is 0.

    Args:
        image: float32 [N, H, W, C].
        kernel: float32 [a, b, C, D].
        strides: of ``conv_general_dilated``, as are the others.
        padding: likewise.
        dimension_numbers: which axes of image, kernel and result are which.
        options: likewise.

    Returns:
        float32 [N, H', W', D].
    """
    numbers = dimension_numbers
    apply = partial(lax.conv_general_dilated, window_strides=strides, padding=padding, **options)
    out, into, *rest = numbers.rhs_spec
    exchanged = numbers._replace(rhs_spec=(into, out, *rest))

    @jax.custom_jvp
    def run(image: jax.Array, kernel: jax.Array) -> jax.Array:
        return apply(image, kernel, dimension_numbers=numbers)

    @run.defjvp
    def derivative(
        given: tuple[jax.Array, jax.Array], slopes: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array]:
        (image, kernel), (of_image, of_kernel) = given, slopes
        turned = kernel.swapaxes(into, out)
        by_image = apply(of_image, turned, dimension_numbers=exchanged)
        return run(image, kernel), by_image + apply(image, of_kernel, dimension_numbers=numbers)

    return run(image, kernel)


conv3x3 = partial(nnx.Conv, kernel_size=(3, 3), precision="highest", conv_general_dilated=convolve)
"""``conv3x3(C, D, rngs=...)``, the layer of readers of digits: [N, H, W, C] -> [N, H, W, D]."""
