"""How evaluations are spent: choosing regions, refining, stopping, queues.

Imports the rooms below: ``core``, ``runtime``, ``sampling`` and ``models``.
"""

from ipr_jax.methods import selection, stopping
from ipr_jax.methods.refinement import Refined, Refinement, iterate_of, refine
from ipr_jax.methods.selection import (
    NOISES,
    REGIONS,
    fixed_regions,
    fresh_noise,
    fresh_regions,
    initial_noise,
)
from ipr_jax.methods.stopping import Stop
from ipr_jax.methods.streaming import Streamed, stream

__all__ = [
    "NOISES",
    "REGIONS",
    "Refined",
    "Refinement",
    "Stop",
    "Streamed",
    "fixed_regions",
    "fresh_noise",
    "fresh_regions",
    "initial_noise",
    "iterate_of",
    "refine",
    "selection",
    "stopping",
    "stream",
]
