"""Many samples: evaluation, experiments, metrics, pictures, runs on disk.

Imports the rooms below, but for ``training``.
"""

from ipr_jax.studies import evaluate, experiments, metrics, shards

__all__ = [
    "evaluate",
    "experiments",
    "metrics",
    "shards",
]
