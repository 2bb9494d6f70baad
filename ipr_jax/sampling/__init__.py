"""From a noisy image to a cleaner one: flow, schedule, order, one step, a whole pass.

Imports ``core`` and ``runtime``.
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
from ipr_jax.sampling.passes import (
    FIRST_PASS,
    REFINEMENT,
    Sampled,
    Sampling,
    Settings,
    first_pass_of,
    generate,
    regenerate,
    renoise,
)
from ipr_jax.sampling.schedule import PassPlan

__all__ = [
    "FIRST_PASS",
    "ORDERS",
    "REFINEMENT",
    "Order",
    "PassPlan",
    "Sampled",
    "Sampling",
    "Settings",
    "certain_first",
    "first_pass_of",
    "flow",
    "generate",
    "graph_order",
    "random_order",
    "rank",
    "raster_order",
    "regenerate",
    "renoise",
    "schedule",
    "step",
    "uncertain_first",
]
