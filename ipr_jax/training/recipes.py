"""How models of this project were trained, the shipped ones among them."""

from typing import NamedTuple

from ipr_jax.config import PRESETS, ModelConfig
from ipr_jax.training.trainer import TrainConfig


class Recipe(NamedTuple):
    """What is trained, and how.

    Attributes:
        model: the architecture.
        training: the settings.
    """

    model: ModelConfig
    training: TrainConfig


RECIPES: dict[str, Recipe] = {
    "mini-sudoku": Recipe(
        PRESETS["mini-sudoku"],
        TrainConfig(
            num_steps=5_000,
            batch_size=64,
            learning_rate=1e-3,
            warmup_steps=300,
            decay="cosine",
        ),
    ),
    "even-pixels": Recipe(
        PRESETS["even-pixels-lite"],
        TrainConfig(
            num_steps=2_500,
            batch_size=64,
            learning_rate=1e-3,
            warmup_steps=200,
            decay="cosine",
        ),
    ),
}
"""Recipes by task."""
