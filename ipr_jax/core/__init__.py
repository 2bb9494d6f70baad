"""What every line speaks of: types, patches, input checks, random keys.

Imports no other room.
"""

from ipr_jax.core import check, keys, patches
from ipr_jax.core.keys import rngs, sample_keys
from ipr_jax.core.types import Denoiser, Prediction

__all__ = [
    "Denoiser",
    "Prediction",
    "check",
    "keys",
    "patches",
    "rngs",
    "sample_keys",
]
