"""The benchmarks by name."""

import functools

from ipr_jax.tasks import mini_sudoku
from ipr_jax.tasks.base import Batch, Split, Task

TASKS: dict[str, Task] = {
    "mini-sudoku": Task(
        name="mini-sudoku",
        training_batch=functools.partial(mini_sudoku.batch, "train", num_clues=(0, 15)),
        test_batch=functools.partial(mini_sudoku.batch, "test"),
    ),
}
"""Every task, by the name that the command line uses."""


def get_task(name: str) -> Task:
    """The task of a name.

    Raises:
        ValueError: unknown; lists the known ones.
    """
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}; known: {sorted(TASKS)}")
    return TASKS[name]


__all__ = ["TASKS", "Batch", "Split", "Task", "get_task"]
