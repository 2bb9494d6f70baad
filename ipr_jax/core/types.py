"""The types that every stage shares.

Shape letters, used in every docstring of the package:

=========  =======================================================================
B          samples in the batch
H, W, C    image height, width, channels; images are NHWC, float32 in [-1, 1]
h, w, P    patch grid height, width, number of patches P = h * w
t          noise level in [0, 1], one per patch, [B, h, w]; 1 = pure noise, 0 = clean
editable   bool [B, h, w]; True = the model generates this patch, False = a given clue
region     bool [B, h, w]; the patches being regenerated now, a subset of ``editable``
=========  =======================================================================
"""

from collections.abc import Callable
from typing import NamedTuple

import jax


class Prediction(NamedTuple):
    """What a denoiser says about a noisy image.

    Attributes:
        velocity: float32 [B, H, W, C], the expected ``noise - image``.
        variance_fraction: float32 [B, H, W, C], where the log standard deviation of the next step
            lies between its lower (0) and upper (1) bound; not clipped.
        sigma: float32 [B, h, w], positive, the expected error of the velocity of each patch.
    """

    velocity: jax.Array
    variance_fraction: jax.Array
    sigma: jax.Array


Denoiser = Callable[[jax.Array, jax.Array], Prediction]
"""``denoise(z [B, H, W, C], t [B, h, w]) -> Prediction``: any JAX model of this form can be
refined. One that is a pytree (an NNX module, ``jax.tree_util.Partial``) enters compiled programs as
an argument; a plain function is a constant of the program, so that one made anew at every call,
such as a lambda, is compiled at every call. So it is with all functions that are passed in."""
