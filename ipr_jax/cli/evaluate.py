"""``ipr-jax evaluate TASK``."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, ClassVar

import tyro

from ipr_jax.cli.experiment import compare
from ipr_jax.cli.options import BatchOptions, RefinementOptions, new_folder
from ipr_jax.studies import experiments


@dataclasses.dataclass(frozen=True)
class EvaluateOptions(BatchOptions, RefinementOptions):
    """The options of ``ipr-jax evaluate TASK``.

    Attributes:
        samples: how many test samples.
        iterations: of ipr, after the first pass (50); of annealed, in a cycle (40).
    """

    USUAL: ClassVar[int] = 50
    samples: int = 500
    iterations: int | None = None


def command_of(task: str) -> Callable[..., Path]:
    """The command ``ipr-jax evaluate TASK``."""

    def command(
        options: Annotated[EvaluateOptions, tyro.conf.arg(name="")] = EvaluateOptions(),
    ) -> Path:
        """Score a model on many samples after every iteration; if interrupted, it starts anew."""
        opened, name = options.open(task), f"evaluate-{task}"
        refinement = options.chosen(task, opened.task)
        experiment = experiments.plain(opened.task, refinement)
        return compare(
            name,
            experiment,
            opened,
            new_folder(options, name),
            options,
            options.samples,
            options.batch_size,
        )

    return command
