"""The benchmarks by name."""

import os
from collections.abc import Callable
from typing import Any

from ipr_jax.tasks import (
    counting_polygons,
    digits_sudoku,
    even_pixels,
    mini_sudoku,
    mnist_classifier,
    mnist_sudoku,
)
from ipr_jax.tasks.base import Task

_CLASSIFIER = "the folder of a converted one"
TAKES: dict[str, dict[str, str]] = {
    "mini-sudoku": {},
    "digits-sudoku": {"difficulty": ""},
    "mnist-sudoku": {"difficulty": "", "data": "a folder with MNIST", "classifier": ""},
    "even-pixels": {},
    "counting-polygons": {"data": "", "classifier": _CLASSIFIER},
    "counting-stars": {"data": "", "classifier": _CLASSIFIER},
}
"""What every task takes: what it has to be where it must be given, nothing where it need not."""

TASKS = tuple(TAKES)
"""Every task, by the name that the command line uses."""


def missing(name: str, **given: Any) -> dict[str, str]:
    """What a task needs and is not given, and what it has to be.

    Args:
        name: of ``TASKS``.
        **given: by name, as in ``TAKES``; None is not given.

    Raises:
        ValueError: the name is unknown (the known ones are listed), or the task does not take what
            is given.
    """
    if name not in TAKES:
        raise ValueError(f"unknown task {name!r}; known: {', '.join(TASKS)}")
    for option, value in given.items():
        if value is not None and option not in TAKES[name]:
            raise ValueError(f"the task {name} takes no {option}")
    return {option: what for option, what in TAKES[name].items() if what and given[option] is None}


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
        classify: for mnist-sudoku the digits of tiles, ``[N, 28, 28, 1] -> int32 [N]``, by default
            what the classifier of the package reads; for the counting tasks
            ``images -> polygon_classifier.Counts``.

    Raises:
        ValueError: the name is unknown (the known ones are listed), something is missing or is not
            for this task.
        FileNotFoundError: names the missing file of data.
    """
    lacks = missing(name, difficulty=difficulty, data=data, classifier=classify)
    if lacks:
        needs = ", ".join(f"{option} ({what})" for option, what in lacks.items())
        raise ValueError(f"the task {name} needs {needs}")
    if name == "mini-sudoku":
        return mini_sudoku.TASK
    if name == "even-pixels":
        return even_pixels.TASK
    if name == "digits-sudoku":
        return digits_sudoku.make(difficulty or "hard")
    if name == "mnist-sudoku":
        assert data is not None
        boards_of = mnist_sudoku.open_boards(data, classify or mnist_classifier.read)
        return mnist_sudoku.make(boards_of, difficulty or "hard")
    assert classify is not None
    return counting_polygons.make(name.removeprefix("counting-"), classify, data)
