"""The benchmarks: data, scores, classifiers; ``get_task`` by name.

Imports ``core`` and ``runtime``.
"""

from ipr_jax.tasks import boards, counting_polygons, mnist, random_boards
from ipr_jax.tasks.base import Batch, Split, Task
from ipr_jax.tasks.registry import TASKS, get_task, missing

__all__ = [
    "TASKS",
    "Batch",
    "Split",
    "Task",
    "boards",
    "counting_polygons",
    "get_task",
    "missing",
    "mnist",
    "random_boards",
]
