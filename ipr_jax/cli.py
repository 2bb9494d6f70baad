"""The command line: ``ipr-jax refine`` and ``ipr-jax train``."""

from pathlib import Path
from typing import Annotated

import tyro

from ipr_jax.config import PRESETS
from ipr_jax.tasks import get_task
from ipr_jax.training import trainer
from ipr_jax.training.recipes import RECIPES


def train(name: str, config: trainer.TrainConfig, out: Path) -> None:
    for line in trainer.train(get_task(name), PRESETS[name], config, out):
        print(line, flush=True)


def main() -> None:
    args = tyro.cli(Annotated[trainer.TrainConfig, tyro.conf.arg(name="")], default=RECIPES["mini-sudoku"])
    train("mini-sudoku", args, Path("runs/mini-sudoku"))

if __name__ == "__main__":
    main()
