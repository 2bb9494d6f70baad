"""Train a model in the minutes that an accelerator is there for, and say how good it is.

``python -m benchmarks.train --out DIR --minutes 8 --recipe digits-sudoku-large`` trains by the
clock, saves the averaged weights in ``DIR/run/model`` and spends the rest of the minutes on test
puzzles, a first pass and then refinement. ``DIR/card.json`` and ``DIR/card.md`` say what was found;
they are written anew as soon as there is more. Nothing begins after the minutes, compilation
included.
"""

import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro

from ipr_jax.cli.options import plain
from ipr_jax.cli.terminal import console, one_line_errors
from ipr_jax.core import check
from ipr_jax.interrupts import interruptible
from ipr_jax.models import TransformerConfig, checkpoint, compute_in, get_precision
from ipr_jax.runtime import environment, files
from ipr_jax.studies import evaluate, experiments
from ipr_jax.tasks import Task, get_task
from ipr_jax.tasks.boards import DIFFICULTIES
from ipr_jax.tasks.registry import TAKES
from ipr_jax.training import RECIPES, Recipe, trainer

TRAINING_SHARE = 0.8
"""Of the minutes; the rest is for the test puzzles."""
SMOKE: dict[str, Any] = {"minutes": 0.1, "batch_size": 8, "samples": 4, "iterations": 1}
"""Settings to see it work, with a network of one narrow layer."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    """Train for some minutes.

    Attributes:
        out: a new folder.
        minutes: for training and test together.
        recipe: what is trained, and how.
        batch_size: boards per step, if not those of the recipe.
        precision: of the network, if not that of the recipe: float32, tf32 or bfloat16.
        width: of a transformer, if not that of the recipe; the features inside of its SwiGLU are
            three times as many.
        num_layers: of a transformer, if not those of the recipe.
        repeats: of its layers, if not those of the recipe. With other sizes it begins from random
            weights.
        learning_rate: if not that of the recipe.
        samples: test puzzles of each difficulty.
        iterations: of their refinement.
        files: folder of MNIST, for a recipe that needs it.
        smoke: only see it work.
    """

    out: Path
    minutes: float = 8
    recipe: str = "digits-sudoku-large"
    batch_size: int | None = None
    precision: str | None = None
    width: int | None = None
    num_layers: int | None = None
    repeats: int | None = None
    learning_rate: float | None = None
    samples: int = 256
    iterations: int = 20
    files: Path | None = None
    smoke: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.minutes < float("inf"):
            raise ValueError(f"minutes must be above 0 and finite, got {self.minutes}")
        if self.recipe not in RECIPES:
            raise ValueError(f"unknown recipe {self.recipe!r}; known: {', '.join(RECIPES)}")
        if self.precision is not None:
            get_precision(self.precision)
        for name in ("samples", "iterations"):
            check.count(name, getattr(self, name))


def adapted(args: Args) -> Recipe:
    """The recipe, with what the arguments change.

    Raises:
        ValueError: a value does not fit, or the recipe's model has no such part.
    """
    recipe, model = RECIPES[args.recipe], RECIPES[args.recipe].model
    sizes = {name: getattr(args, name) for name in ("width", "num_layers", "repeats")}
    sizes = {name: value for name, value in sizes.items() if value is not None}
    if sizes and not isinstance(model, TransformerConfig):
        raise ValueError(f"{', '.join(sizes)} must be those of a transformer, not of {args.recipe}")
    if "width" in sizes:
        sizes["hidden_width"] = 3 * sizes["width"]
    settings = {name: getattr(args, name) for name in ("batch_size", "precision", "learning_rate")}
    training = dataclasses.replace(
        recipe.training,
        minutes=TRAINING_SHARE * args.minutes,
        num_steps=10**9,
        decay="linear",
        save_every=2_000,
        weights=None if sizes else recipe.training.weights,
        **{name: value for name, value in settings.items() if value is not None},
    )
    return Recipe(dataclasses.replace(model, **sizes), training, recipe.task or args.recipe)


class Card:
    """What has been found so far, on disk.

    Attributes:
        found: JSON data.
    """

    def __init__(self, folder: Path, **found: Any):
        """Write the first of it."""
        self.folder, self.found = folder, found
        self.add()

    def add(self, **found: Any) -> None:
        """Add to it, and write it."""
        self.found |= found
        files.write_text(self.folder / "card.json", json.dumps(self.found, indent=1))
        files.write_text(self.folder / "card.md", self.markdown())

    def markdown(self) -> str:
        """The same to read."""
        found = self.found
        lines = [f"# {found['arguments']['recipe']}", ""]
        lines += [f"- device: {found['device']}", f"- model: {found['model']}"]
        if "training" in found:
            seen, rate = found["training"]["images"], found["training"]["images_per_second"]
            minutes = found["training"]["seconds"] / 60
            lines.append(f"- trained on {seen:,} images in {minutes:.1f} minutes, {rate:,.0f}/s")
            lines.append(f"- loss of the velocity: {found['training']['velocity']:.4f}")
        for name, rows in found["test"].items():
            headline = next(key for key in rows[0] if key.endswith("_rate")).removesuffix("_rate")
            lines += [
                "",
                f"## {name}",
                "",
                f"| iteration | {headline} % | 95% interval | samples |",
            ]
            lines.append("|---|---|---|---|")
            for row in rows:
                rate, low, high = (
                    f"{100 * row[f'{headline}_{end}']:.1f}" for end in ("rate", "low", "high")
                )
                lines.append(
                    f"| {row['iteration']} | {rate} | {low} to {high} | {row['samples']} |"
                )
        return "\n".join([*lines, ""])


def train(task: Task, recipe: Recipe, folder: Path, card: Card) -> None:
    """Train, and keep the card up to date."""
    config, said = recipe.training, 0.0
    for line in trainer.train(task, recipe.model, config, folder):
        rate = config.batch_size / line["seconds_per_step"]
        images = int(line["step"]) * config.batch_size
        card.add(training={**line, "images": images, "images_per_second": rate})
        if line["seconds"] > said + 10:
            said = line["seconds"]
            console.print(
                f"{said:4.0f} s: {images:,} images, {rate:,.0f}/s, loss {line['velocity']:.4f}",
                highlight=False,
            )


def test(recipe: Recipe, folder: Path, card: Card, args: Args, end: float) -> None:
    """Complete and refine test puzzles until the time is over: first passes of all, then more."""
    assert recipe.task is not None
    model, _ = checkpoint.open_model(folder / "model")
    denoise = compute_in(model, recipe.training.precision)
    names = tuple(DIFFICULTIES) if "difficulty" in TAKES[recipe.task] else (None,)
    headline, running = "", {}
    for name in names:
        task = get_task(recipe.task, difficulty=name, data=args.files)
        headline = task.headline
        puzzles = task.test_batch(0, np.arange(args.samples))
        refinement = experiments.as_published(task, args.iterations)
        steps = evaluate.evaluate(
            task, denoise, puzzles, refinement, jax.random.key(0), batch_size=args.samples
        )
        running[name or recipe.task] = task, steps
    rows: dict[str, list[Any]] = {}
    for _ in range(args.iterations + 1):
        for name, (task, steps) in running.items():
            if time.monotonic() > end:
                return
            rows.setdefault(name, []).append(evaluate.summarise(next(steps), task))
            card.add(test=rows)
            last = rows[name][-1]
            rate = f"{100 * last[f'{headline}_rate']:.1f}% {headline}"
            console.print(f"{name}, {last['iteration']} iterations: {rate}", highlight=False)


def main(args: Args) -> None:
    """Train and test.

    Raises:
        ValueError, OSError: refused; nothing has been written.
    """
    end = time.monotonic() + 60 * args.minutes
    if args.smoke:
        args = dataclasses.replace(args, **SMOKE, width=16, num_layers=1)
        end = time.monotonic() + 120
    recipe = adapted(args)
    assert recipe.task is not None
    task = get_task(recipe.task, data=args.files)
    task.training_batch(recipe.training.seed, np.arange(1))  # refuses damaged files
    files.refuse_existing(args.out).mkdir()
    card = Card(
        args.out,
        arguments=plain(args) | {"out": None, "files": None},
        model=dataclasses.asdict(recipe.model),
        settings=dataclasses.asdict(recipe.training),
        test={},
        **environment.describe(),
    )
    with interruptible(f"{args.out} has what was done"):
        train(task, recipe, args.out / "run", card)
        test(recipe, args.out / "run", card, args, end)
    console.print(f"written: {args.out}")


if __name__ == "__main__":
    with one_line_errors():
        main(tyro.cli(Args))
        sys.exit(0)
