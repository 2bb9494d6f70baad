"""Training: noise levels, objective, batches, the trainer, recipes by task.

Imports the rooms below, but for ``methods``.
"""

from ipr_jax.training import loader, noise_levels, trainer
from ipr_jax.training.recipes import RECIPES, Recipe

__all__ = [
    "RECIPES",
    "Recipe",
    "loader",
    "noise_levels",
    "trainer",
]
