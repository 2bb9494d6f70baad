"""The convolution of readers and classifiers against JAX's own."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ipr_jax.tasks.convolution import convolve


@pytest.mark.parametrize(("kernel", "strides", "padding"), [(3, 1, "SAME"), (7, 2, 3), (1, 2, 0)])
def test_values_and_derivatives_are_those_of_jax(kernel, strides, padding, rng):
    def layer(**options):
        return nnx.Conv(
            *(2, 5, (kernel, kernel)),
            strides=strides,
            padding=padding,
            precision="highest",
            rngs=nnx.Rngs(0),
            **options,
        )

    def loss(convolution, image):
        return (convolution(image) ** 3).mean()

    image, slope = jnp.asarray(rng.normal(size=(2, 3, 9, 8, 2)), jnp.float32)

    @partial(jax.jit, static_argnames="options")
    def all_of(image, slope, options=()):
        convolution = layer(**dict(options))
        graph, weights = nnx.split(convolution)

        def of(weights, image):
            return loss(nnx.merge(graph, weights), image)

        tangent = jax.jvp(partial(of, weights), [image], [slope])
        each = jax.vmap(jax.grad(partial(of, weights)))(image[:, None])
        return convolution(image), jax.grad(of, (0, 1))(weights, image), tangent, each

    want = all_of(image, slope)
    found = all_of(image, slope, options=(("conv_general_dilated", convolve),))
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_the_gradient_by_the_image_is_a_convolution_as_cpus_are_fast_at():
    convolution = nnx.Conv(2, 5, (3, 3), conv_general_dilated=convolve, rngs=nnx.Rngs(0))
    program = jax.make_jaxpr(jax.grad(lambda image: convolution(image).sum()))
    specs = [
        equation.params["dimension_numbers"].rhs_spec
        for equation in program(jnp.zeros((1, 8, 8, 2))).eqns
        if equation.primitive is jax.lax.conv_general_dilated_p
    ]
    assert specs == 2 * [(3, 2, 0, 1)]  # forwards and back
