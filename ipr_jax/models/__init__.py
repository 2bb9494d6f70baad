"""Networks and the folders they are kept in; those that ship lie beside.

Imports ``core``, ``runtime``, ``tasks`` (whose classifiers are networks, too) and ``sampling``.
"""

from ipr_jax.models import checkpoint, denoiser
from ipr_jax.models.checkpoint import load
from ipr_jax.models.config import PRESETS, TRANSFORMERS, Config, ModelConfig, TransformerConfig
from ipr_jax.models.denoiser import MODELS, SRM, Model, condition_on, new_model, repaint
from ipr_jax.models.precision import compute_in, get_precision
from ipr_jax.models.transformer import MATRICES, PatchTransformer

__all__ = [
    "MATRICES",
    "MODELS",
    "PRESETS",
    "SRM",
    "TRANSFORMERS",
    "Config",
    "Model",
    "ModelConfig",
    "PatchTransformer",
    "TransformerConfig",
    "checkpoint",
    "compute_in",
    "condition_on",
    "denoiser",
    "get_precision",
    "load",
    "new_model",
    "repaint",
]
