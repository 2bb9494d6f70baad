"""What runs and stores programs: devices, compilation, memory, files.

Imports ``core``.
"""

from ipr_jax.runtime import cache, environment, files, flops, memory, resume, sharding, snapshots
from ipr_jax.runtime.ahead import compile
from ipr_jax.runtime.memory import EXHAUSTED, Size
from ipr_jax.runtime.program import Compiled, Memory, Program, driver, memory_of
from ipr_jax.runtime.sharding import data_mesh

__all__ = [
    "EXHAUSTED",
    "Compiled",
    "Memory",
    "Program",
    "Size",
    "cache",
    "compile",
    "data_mesh",
    "driver",
    "environment",
    "files",
    "flops",
    "memory",
    "memory_of",
    "resume",
    "sharding",
    "snapshots",
]
