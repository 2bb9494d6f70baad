"""How the shipped models were trained."""

from ipr_jax.training.trainer import TrainConfig

RECIPES: dict[str, TrainConfig] = {
    "mini-sudoku": TrainConfig(
        num_steps=5_000,
        batch_size=64,
        learning_rate=1e-3,
        warmup_steps=300,
        decay="cosine",
    ),
}
"""Training settings by task."""
