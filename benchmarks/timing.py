"""How every measurement takes its times."""

import statistics
import time
from collections.abc import Callable, Sequence

import jax


def seconds(function: Callable[[], object]) -> float:
    """Wall time of a call in seconds, its device work included."""
    start = time.perf_counter()
    jax.block_until_ready(function())
    return time.perf_counter() - start


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, min and max of at least one value."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}
