"""The benchmarks by name."""

import os
from collections.abc import Callable
from typing import Any

from ipr_jax.tasks import counting_polygons, digits_sudoku, even_pixels, mini_sudoku, mnist_sudoku
from ipr_jax.tasks.base import Task

TASKS = (
    *("mini-sudoku", "digits-sudoku", "mnist-sudoku"),
    *("even-pixels", "counting-polygons", "counting-stars"),
)
"""Every task, by the name that the command line uses."""


def get_task(
    name: str,
    *,
    difficulty: str | None = None,
    data: str | os.PathLike[str] | None = None,
    classify: Callable[..., Any] | None = None,
) -> Task:
    """The task of a name.

    Args:
        name: of ``TASKS``.
        difficulty: of the test puzzles of 9x9 Sudoku: easy, medium or hard (the default).
        data: for mnist-sudoku the folder or file of ``mnist_sudoku.open_boards``; for the counting
            tasks a folder of backgrounds, if others than the bundled ones are wanted.
        classify: for mnist-sudoku the digits of tiles, ``[N, 28, 28, 1] -> int32 [N]``; for the
            counting tasks ``images -> polygon_classifier.Counts``.

    Raises:
        ValueError: the name is unknown (the known ones are listed), something is missing or is not
            for this task.
        FileNotFoundError: names the missing file of data.
    """
    counting = name.startswith("counting-")
    takes = {
        "difficulty": (difficulty, name in ("digits-sudoku", "mnist-sudoku")),
        "data": (data, name == "mnist-sudoku" or counting),
        "classifier": (classify, name == "mnist-sudoku" or counting),
    }
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}; known: {', '.join(TASKS)}")
    for option, (value, taken) in takes.items():
        if value is not None and not taken:
            raise ValueError(f"the task {name} takes no {option}")
    if name == "mini-sudoku":
        return mini_sudoku.TASK
    if name == "even-pixels":
        return even_pixels.TASK
    if name == "digits-sudoku":
        return digits_sudoku.make(difficulty or "hard")
    if classify is None:
        raise ValueError(f"the task {name} needs a classifier: the folder of a converted one")
    if counting:
        return counting_polygons.make(name.removeprefix("counting-"), classify, data)
    if data is None:
        raise ValueError(f"the task {name} needs data: a folder with MNIST")
    return mnist_sudoku.make(mnist_sudoku.open_boards(data, classify), difficulty or "hard")
