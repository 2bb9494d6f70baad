"""How models of this project were trained, the shipped ones among them."""

import dataclasses
from typing import NamedTuple

from ipr_jax.models import PRESETS, TRANSFORMERS, Config
from ipr_jax.training.trainer import TrainConfig


class Recipe(NamedTuple):
    """What is trained, and how.

    Attributes:
        model: the architecture.
        training: the settings.
        task: the benchmark; None = it has the recipe's name.
    """

    model: Config
    training: TrainConfig
    task: str | None = None


_BOARDS = TrainConfig(
    learning_rate=2e-3,
    warmup_steps=50,
    decay="linear",
    optimizer="muon",
    weight_decay=1e-4,
    ema_decay=0.998,
    noise_levels="sequential",
    per_image=True,
    data="device",
    distortion=0.7,
)
"""What the transformers have in common."""

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
    "mini-sudoku-transformer": Recipe(
        TRANSFORMERS["mini-sudoku-transformer"],
        dataclasses.replace(
            _BOARDS, num_steps=60_000, batch_size=64, minutes=40.0, log_every=100, save_every=1000
        ),
        task="mini-sudoku",
    ),
    "even-pixels-transformer": Recipe(
        TRANSFORMERS["even-pixels-transformer"],
        dataclasses.replace(
            _BOARDS,
            num_steps=60_000,
            batch_size=64,
            minutes=40.0,
            accumulate=4,
            data="host",
            distortion=0.0,
            log_every=100,
            save_every=1000,
        ),
        task="even-pixels",
    ),
    "digits-sudoku": Recipe(
        TRANSFORMERS["digits-sudoku"],
        dataclasses.replace(
            _BOARDS, num_steps=30_000, batch_size=32, curriculum=1_000, minutes=135.0, log_every=100
        ),
    ),
    "mnist-sudoku-transformer": Recipe(
        TRANSFORMERS["mnist-sudoku-transformer"],
        dataclasses.replace(
            _BOARDS,
            num_steps=30_000,
            batch_size=32,
            distortion=0.3,
            minutes=80.0,
            weights="digits-sudoku",
            log_every=100,
        ),
        task="mnist-sudoku",
    ),
    "digits-sudoku-large": Recipe(
        TRANSFORMERS["digits-sudoku-large"],
        dataclasses.replace(
            _BOARDS,
            num_steps=20_000,
            batch_size=512,
            learning_rate=1e-3,
            ema_decay=0.999,
            curriculum=200,
            precision="bfloat16",
        ),
        task="digits-sudoku",
    ),
}
"""Recipes by name, which is also that of the model. The large one is for an accelerator."""
