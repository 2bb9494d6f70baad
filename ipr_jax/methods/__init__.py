"""How evaluations are spent: the engine, and methods that run on it.

Imports the rooms below: ``core``, ``runtime``, ``sampling`` and ``models``.
"""

from ipr_jax.methods import engine, scores, selection, stopping
from ipr_jax.methods.annealed import Annealed
from ipr_jax.methods.backtracking import Backtracking
from ipr_jax.methods.doubts import doubts, most_doubted
from ipr_jax.methods.engine import INPUT
from ipr_jax.methods.guided import Guided
from ipr_jax.methods.ipr import Refinement
from ipr_jax.methods.langevin import Langevin
from ipr_jax.methods.least_doubted import LeastDoubted
from ipr_jax.methods.particles import PUBLISHED, Particles
from ipr_jax.methods.paths import Cycles, Paths
from ipr_jax.methods.refinement import Refined, Sampled, Streamed, generate, refine, stream
from ipr_jax.methods.rollover import Rollover
from ipr_jax.methods.selection import (
    NOISES,
    REGIONS,
    fixed_regions,
    fresh_noise,
    fresh_regions,
    initial_noise,
)
from ipr_jax.methods.solving import Solved, advance_on, begin_on, of_grid, solve
from ipr_jax.methods.stopping import Stop

__all__ = [
    "INPUT",
    "NOISES",
    "PUBLISHED",
    "REGIONS",
    "Annealed",
    "Backtracking",
    "Cycles",
    "Guided",
    "Langevin",
    "LeastDoubted",
    "Particles",
    "Paths",
    "Refined",
    "Refinement",
    "Rollover",
    "Sampled",
    "Solved",
    "Stop",
    "Streamed",
    "advance_on",
    "begin_on",
    "doubts",
    "engine",
    "fixed_regions",
    "fresh_noise",
    "fresh_regions",
    "generate",
    "initial_noise",
    "most_doubted",
    "of_grid",
    "refine",
    "scores",
    "selection",
    "solve",
    "stopping",
    "stream",
]
