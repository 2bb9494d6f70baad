"""The benchmarks by name."""

from ipr_jax.tasks import digits_sudoku, mini_sudoku
from ipr_jax.tasks.base import Task

TASKS: dict[str, Task] = {task.name: task for task in (mini_sudoku.TASK, digits_sudoku.TASK)}
"""Every task that needs no download, by the name that the command line uses."""


def get_task(name: str) -> Task:
    """The task of a name.

    Raises:
        ValueError: unknown; lists the known ones.
    """
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}; known: {sorted(TASKS)}")
    return TASKS[name]
