"""Compile the program of a driver before there is anything to run it on."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from ipr_jax.core import Denoiser, check, sample_keys
from ipr_jax.runtime.program import Compiled


def compile(
    driver: Callable[..., Any],
    denoise: Denoiser,
    image_shape: tuple[int, int, int, int],
    grid: tuple[int, int],
    **options: Any,
) -> Compiled:
    """Compile what a call will run: later ones of the same sizes and functions compile nothing.

    Args:
        driver: ``generate``, ``refine``, ``solve`` or ``stream`` of ``ipr_jax``.
        denoise: the model.
        image_shape: (B, H, W, C); for ``solve`` and ``stream``, B samples of the queue.
        grid: (h, w).
        **options: of the driver; those that it takes as arguments of the program, such as ``ratio``
            and the numbers of ``sampling``, may differ in the call; JAX's settings may not.

    Returns:
        How long it took, and the memory that the program needs.

    Raises:
        ValueError: no such driver, or an option or a size that it refuses.
        TypeError: the driver has no such option.
    """
    program = getattr(driver, "program", None)
    if program is None:
        raise ValueError(
            f"driver must be generate, refine, solve or stream of ipr_jax, got {driver}"
        )
    lengths = [isinstance(sizes, Sequence) and len(sizes) for sizes in (image_shape, grid)]
    if lengths != [4, 2]:
        raise ValueError(
            f"image_shape must be (B, H, W, C) and grid (h, w), got {image_shape} and {grid}"
        )
    for size in (*image_shape[1:], *grid):
        check.count("every number of image_shape and grid", size)
    keys = sample_keys(jax.random.key(0), image_shape[0])
    image = np.zeros(image_shape, np.float32)
    editable = np.zeros((image_shape[0], *grid), bool)
    return program(denoise, keys, image, editable, **options).compile()
