"""From a noisy image to a cleaner one: flow, schedule, order, settings, one step.

Imports ``core``.
"""

from ipr_jax.sampling import flow, schedule, step
from ipr_jax.sampling.order import (
    ORDERS,
    Order,
    certain_first,
    graph_order,
    random_order,
    rank,
    raster_order,
    uncertain_first,
)
from ipr_jax.sampling.schedule import PassPlan
from ipr_jax.sampling.settings import FIRST_PASS, REFINEMENT, Sampling, Settings, renoise

__all__ = [
    "FIRST_PASS",
    "ORDERS",
    "REFINEMENT",
    "Order",
    "PassPlan",
    "Sampling",
    "Settings",
    "certain_first",
    "flow",
    "graph_order",
    "random_order",
    "rank",
    "raster_order",
    "renoise",
    "schedule",
    "step",
    "uncertain_first",
]
