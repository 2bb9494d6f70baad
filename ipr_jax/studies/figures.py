"""What all pictures share: matplotlib whatever its user has set, colours, a figure, a file."""

import contextlib
import os
import sys
from pathlib import Path

if "matplotlib" not in sys.modules:  # it cannot be imported if MPLBACKEND is of another place
    _named = os.environ.pop("MPLBACKEND", None)
    import matplotlib

    if _named is not None:
        os.environ["MPLBACKEND"] = _named
        with contextlib.suppress(ValueError):
            matplotlib.rcParams["backend"] = _named  # for the figures of others: all here are files

import numpy as np
from matplotlib import style
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from ipr_jax.runtime import files

RED, GREEN, BLUE = (0.86, 0.08, 0.10), (0.05, 0.62, 0.25), (0.20, 0.48, 0.88)
ORANGE = (1.0, 0.58, 0.0)
FAINT, STRONG = (0.84, 0.84, 0.84), (0.35, 0.35, 0.35)
DPI = 200

PLAIN = style.context(["default", {"text.parse_math": False}])
"""Whatever the user's matplotlib is set to, and with every text as it is."""


def new_figure(width: float, height: float) -> Figure:
    """A white figure of a size in inches, for a file."""
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def rendered(figure: Figure) -> Image.Image:
    """A figure as a picture, RGB."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def write(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, whole or not at all."""
    with files.whole(path) as part, part.open("xb") as file:
        figure.savefig(file, format="png")


def require(holds: object, rule: str, value: object) -> None:
    """Refuse what does not hold.

    Raises:
        ValueError: names the rule and the value.
    """
    if not holds:
        raise ValueError(f"{rule}, got {value}")
