"""The public names, which are those of ``ipr_jax``."""

from ipr_jax.ahead import compile
from ipr_jax.checkpoint import load
from ipr_jax.config import PRESETS, TRANSFORMERS, ModelConfig, TransformerConfig
from ipr_jax.denoiser import SRM, condition_on, repaint
from ipr_jax.keys import sample_keys
from ipr_jax.order import (
    certain_first,
    graph_order,
    random_order,
    raster_order,
    uncertain_first,
)
from ipr_jax.program import Compiled, Memory
from ipr_jax.refinement import Refined, refine
from ipr_jax.regenerate import FIRST_PASS, REFINEMENT, Sampled, Sampling, generate
from ipr_jax.selection import fixed_regions, fresh_noise, fresh_regions, initial_noise
from ipr_jax.sharding import data_mesh
from ipr_jax.streaming import Streamed, stream
from ipr_jax.transformer import PatchTransformer
from ipr_jax.types import Denoiser, Prediction

__all__ = [
    "FIRST_PASS",
    "PRESETS",
    "REFINEMENT",
    "SRM",
    "TRANSFORMERS",
    "Compiled",
    "Denoiser",
    "Memory",
    "ModelConfig",
    "PatchTransformer",
    "Prediction",
    "Refined",
    "Sampled",
    "Sampling",
    "Streamed",
    "TransformerConfig",
    "certain_first",
    "compile",
    "condition_on",
    "data_mesh",
    "fixed_regions",
    "fresh_noise",
    "fresh_regions",
    "generate",
    "graph_order",
    "initial_noise",
    "load",
    "random_order",
    "raster_order",
    "refine",
    "repaint",
    "sample_keys",
    "stream",
    "uncertain_first",
]
