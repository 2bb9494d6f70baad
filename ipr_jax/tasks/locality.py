"""How much patches say about each other, for an order that follows a graph.

Shapes: h, w = the patch grid, P = h*w patches, row by row.
"""

import math

import numpy as np

from ipr_jax.core import check


def gaussian_locality(h: int, w: int, sigma: float = 2.0) -> np.ndarray:
    """Dependence by nearness: a Gaussian of the distance, for images without a known structure.

    The Gaussian is cut off at n/2 patches, rounded down, along either axis, n the larger side of
    the grid. It sums to 1 over the whole window, so rows of patches near the border sum to less.

    Args:
        h: height of the grid, at least 1.
        w: width of the grid, at least 1.
        sigma: standard deviation in patches, above 0.

    Returns:
        float32 [P, P], symmetric, the largest value on the diagonal.

    Raises:
        ValueError: a size or ``sigma`` is out of its range.

    Source: Wewer et al., arXiv 2502.21075: the default of the data sets, Even Pixels and Counting
    Polygons among them, with sigma = 2.
    """
    check.count("h", h)
    check.count("w", w)
    if not 0 < sigma < math.inf:
        raise ValueError(f"sigma must be above 0 and finite, got {sigma}")
    reach = max(h, w) // 2

    def weight(offset: np.ndarray) -> np.ndarray:
        return np.where(np.abs(offset) <= reach, np.exp(-((offset / sigma) ** 2) / 2), 0)

    total = weight(np.arange(-reach, reach + 1)).sum()
    along_h, along_w = (
        weight(np.subtract.outer(np.arange(n), np.arange(n))) / total for n in (h, w)
    )
    return np.kron(along_h, along_w).astype(np.float32)
