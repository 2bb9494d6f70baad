"""Pictures of a refinement: the boards after chosen iterations, and a metric over iterations.

Shapes: K moments of the refinement, B samples, [B, h, w] patches ("cells"), [K, B, H, W, C] images
in [-1, 1]. Grayscale images (C = 1) are shown as dark ink on white paper, colour images (C = 3) as
they are.
"""

import os
from collections.abc import Mapping, Sequence
from math import isqrt
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator, PercentFormatter

from ipr_jax.files import refuse_existing, whole

RED, GREEN, BLUE = (0.86, 0.08, 0.10), (0.05, 0.62, 0.25), (0.20, 0.48, 0.88)
FAINT, STRONG = (0.84, 0.84, 0.84), (0.35, 0.35, 0.35)
TINT = 0.42
"""Opacity of the red over a violating cell: the digit stays legible."""

DPI = 200
WIDTH = 160  # of the image in a board, at least; all these sizes are in pixels of the picture
GUTTER = 5  # around a cell: a grid line, then the blue of a clue
OUTLINE, FRAME, GAP = 2, 6, 7
HEADER, MARGIN, MIN_WIDTH = 236, 20, 1080


def refinement(
    path: str | os.PathLike[str],
    images: np.ndarray,
    editable: np.ndarray,
    violating: np.ndarray,
    valid: np.ndarray,
    iterations: Sequence[int],
) -> None:
    """Draw samples while they are refined: a row per sample, a column per moment.

    Clues have a blue border, violating cells are red, valid boards stand in a green frame. The
    file appears whole or not at all.

    Args:
        path: a PNG file that does not exist, in a folder that does.
        images: float32 [K, B, H, W, C] in [-1, 1], C = 1 or 3; beyond is clipped.
        editable: bool [B, h, w]; False = a clue.
        violating: bool [K, B, h, w], the cells that violate a rule.
        valid: bool [K, B], the boards that violate none.
        iterations: int [K] >= 0, increasing, how many each column has had; 0 = first pass.

    Raises:
        FileExistsError: the file exists; it is not overwritten.
        FileNotFoundError: the folder does not exist.
        ValueError: shapes or dtypes do not belong together, a pixel is not finite, or the
            iterations do not increase.
    """
    path = refuse_existing(path)
    images, editable, violating, valid = map(np.asarray, (images, editable, violating, valid))
    _check_boards(images, editable, violating, valid)
    _check_iterations(iterations, len(images))
    count = [f"{found} of {valid.shape[1]}" for found in valid.sum(axis=1)]
    boards = _boards(images, editable, violating, valid)
    _, rows, height, width, _ = boards.shape
    sheet = boards.transpose(1, 2, 0, 3, 4).reshape(rows * height, -1, 3)
    left = max(MARGIN, (MIN_WIDTH - sheet.shape[1]) // 2)
    size = np.array([sheet.shape[1] + 2 * left, sheet.shape[0] + HEADER + MARGIN])
    figure = _figure(size[0] / DPI, size[1] / DPI)
    figure.figimage(sheet, left, MARGIN, origin="upper")

    def write(x: float, below: float, text: str, **style: Any) -> None:
        figure.text(x / size[0], 1 - below / size[1], text, ha="center", va="center", **style)

    write(size[0] / 2, 38, "Iterative partial refinement", fontsize=12, weight="bold")
    summary = _summary(f"{count[0]} boards valid", count[-1], iterations)
    write(size[0] / 2, 84, summary, fontsize=9)
    for column, (moment, found) in enumerate(zip(iterations, count, strict=True)):
        x = left + (column + 0.5) * width
        write(x, HEADER - 52, _moment(moment), fontsize=8, weight="bold")
        write(x, HEADER - 22, f"{found} valid", fontsize=7, color=STRONG)
    handles = [
        Patch(facecolor="white", edgecolor=BLUE, linewidth=1.5, label="clue"),
        Patch(facecolor=(*RED, TINT), label="violates a rule"),
        Patch(facecolor="white", edgecolor=GREEN, linewidth=2.5, label="valid board"),
    ]
    place = {"loc": "center", "bbox_to_anchor": (0.5, 1 - 134 / size[1]), "ncols": 3}
    looks = {"fontsize": 8, "frameon": False, "handlelength": 1.2, "handleheight": 1.2}
    figure.legend(handles=handles, **place, **looks)
    _write(figure, path)


class Panel(NamedTuple):
    """A score of several arms.

    Attributes:
        label: what it is, such as "valid".
        share: whether it is a share of the samples, in [0, 1], drawn in percent.
        bands: by arm the value with its interval after 0, 1, ... iterations, float [N, 3]: low,
            value, high.
        published: by arm a paper's value by iteration, drawn as a hollow diamond if the arm has
            come so far; may be empty.
    """

    label: str
    share: bool
    bands: Mapping[str, np.ndarray]
    published: Mapping[str, Mapping[int, float]]


def curves(path: str | os.PathLike[str], panels: Sequence[Panel], title: str) -> None:
    """Draw scores over iterations with their 95% bands, and a paper's numbers beside them.

    Arms without iterations are drawn as a list of values with their intervals. The file appears
    whole or not at all.

    Args:
        path: a PNG file that does not exist, in a folder that does.
        panels: from left to right.
        title: what is compared.

    Raises:
        FileExistsError: the file exists; it is not overwritten.
        FileNotFoundError: the folder does not exist.
        ValueError: there is no panel or no arm, or a value is not in its interval.
    """
    path = refuse_existing(path)
    _require(panels and all(panel.bands for panel in panels), "there must be an arm", len(panels))
    for panel in panels:
        for name, band in panel.bands.items():
            _check_band(name, np.asarray(band), panel.share)
    listed = all(len(band) == 1 for panel in panels for band in panel.bands.values())
    figure = _figure(2.2 + 4.4 * len(panels), 4.2)
    figure.set_layout_engine("constrained")
    figure.suptitle(title, fontsize=11, weight="bold")
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        (_draw_list if listed else _draw_curves)(axes, panel)
        axes.grid(color=FAINT, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    _write(figure, path)


def _draw_curves(axes: Axes, panel: Panel) -> None:
    for number, (name, band) in enumerate(panel.bands.items()):
        low, value, high = np.asarray(band, float).T
        colour, iterations = f"C{number}", range(len(value))
        shown = [f"{each:.1%}" if panel.share else f"{each:.3g}" for each in (value[0], value[-1])]
        axes.plot(
            iterations,
            value,
            "o-",
            color=colour,
            markersize=3,
            label=f"{name}: {shown[0]} to {shown[1]}",
        )
        axes.fill_between(iterations, low, high, color=colour, alpha=0.18, linewidth=0)
        known = {m: v for m, v in panel.published.get(name, {}).items() if m < len(value)}
        axes.plot(list(known), list(known.values()), "D", color=colour, markerfacecolor="white")
    if any(panel.published.values()):
        axes.plot([], [], "D", color=STRONG, markerfacecolor="white", label="paper, its own task")
    axes.set_xlabel("refinement (iterations after the first pass), bands: 95%")
    axes.set_ylabel(f"{panel.label} (%)" if panel.share else panel.label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    if panel.share:
        axes.yaxis.set_major_formatter(PercentFormatter(1, symbol=""))
    axes.margins(x=0.03)
    axes.legend(frameon=False, fontsize=9)


def _draw_list(axes: Axes, panel: Panel) -> None:
    names = list(panel.bands)
    low, value, high = np.concatenate([np.asarray(panel.bands[name]) for name in names]).T
    axes.errorbar(value, names, xerr=[value - low, high - value], fmt="o", color=BLUE, capsize=3)
    axes.invert_yaxis()
    axes.set_xlabel(f"{panel.label}{' (%)' if panel.share else ''}, intervals: 95%")
    if panel.share:
        axes.xaxis.set_major_formatter(PercentFormatter(1, symbol=""))


def _check_band(name: str, band: np.ndarray, share: bool) -> None:
    _require(
        band.ndim == 2 and band.shape[1] == 3 and len(band), f"{name} must be [N, 3]", band.shape
    )
    ordered = (band[:, 0] <= band[:, 1]) & (band[:, 1] <= band[:, 2])
    inside = (band >= 0) & (band <= 1) if share else np.isfinite(band)
    rule = "0 <= low <= value <= high <= 1" if share else "low <= value <= high"
    _require(ordered.all() and inside.all(), f"{name}: {rule} must hold", band.tolist())


def _boards(
    images: np.ndarray, editable: np.ndarray, violating: np.ndarray, valid: np.ndarray
) -> np.ndarray:
    """Draw every board in its frame: uint8 [K, B, height, width, 3]."""
    columns, rows, height, width, channels = images.shape
    h, w = editable.shape[1:]
    shade = np.clip((images + 1) / 2, 0, 1)
    shade = shade if channels == 3 else np.repeat(1 - shade, 3, axis=-1)
    scale = -(-WIDTH // width)
    shade = shade.repeat(scale, axis=2).repeat(scale, axis=3)
    patch = scale * height // h
    tiles = shade.reshape(columns, rows, h, patch, w, patch, 3).swapaxes(3, 4)
    tiles = _pad(tiles, GUTTER, np.ones(3))
    side = tiles.shape[4]
    inset = np.minimum(np.arange(side), np.arange(side)[::-1])
    inset = np.minimum(inset[:, None], inset)[..., None]
    ring = (inset > 0) & (inset < GUTTER)
    tiles = np.where(_per_pixel(violating), _tint(tiles), tiles)
    tiles = np.where(_per_pixel(~editable) & ring, BLUE, tiles)
    tiles = np.where(inset == 0, FAINT, tiles)
    boards = tiles.swapaxes(3, 4).reshape(columns, rows, h * side, w * side, 3)
    if h == w == isqrt(h) ** 2:
        for line in range(isqrt(h) * side, h * side, isqrt(h) * side):
            boards[:, :, line - 1 : line + 1] = STRONG
            boards[:, :, :, line - 1 : line + 1] = STRONG
    boards = _pad(boards, OUTLINE, np.array(STRONG))
    boards = _pad(boards, FRAME, np.where(_per_pixel(valid), GREEN, 1.0))
    return np.rint(_pad(boards, GAP, np.ones(3)) * 255).astype(np.uint8)


def _per_pixel(mask: np.ndarray) -> np.ndarray:
    """Append axes that broadcast over pixels and channels: [...] -> [..., 1, 1, 1]."""
    return mask[..., None, None, None]


def _tint(colour: np.ndarray) -> np.ndarray:
    """Lay translucent red over colours [..., 3] in [0, 1]."""
    return (1 - TINT) * colour + TINT * np.array(RED)


def _pad(pictures: np.ndarray, width: int, colour: np.ndarray) -> np.ndarray:
    """Surround pictures [..., H, W, 3] by ``width`` pixels of a colour that broadcasts to them."""
    *lead, height, across, _ = pictures.shape
    shape = (*lead, height + 2 * width, across + 2 * width, 3)
    padded = np.broadcast_to(colour, shape).astype(pictures.dtype)
    padded[..., width:-width, width:-width, :] = pictures
    return padded


def _moment(iterations: int) -> str:
    """Name a moment: "first pass", "1 iteration", "2 iterations"."""
    return f"{iterations} iteration{'' if iterations == 1 else 's'}" if iterations else "first pass"


def _summary(first: str, last: str, iterations: Sequence[int]) -> str:
    """Say both values: "``first`` after the first pass, ``last`` after 20 iterations"."""
    said = f"{first} after {_moment(iterations[0])}"
    if len(iterations) > 1:
        said += f", {last} after {_moment(iterations[-1])}"
    return said.replace("first pass", "the first pass")


def _require(holds: object, rule: str, value: object) -> None:
    if not holds:
        raise ValueError(f"{rule}, got {value}")


def _check_iterations(iterations: Sequence[int], count: int) -> None:
    increasing = all(a < b for a, b in zip((-1, *iterations), iterations, strict=False))
    rule = f"iterations must be {count} increasing numbers >= 0 (at least one)"
    _require(0 < len(iterations) == count and increasing, rule, list(iterations))


def _check_boards(
    images: np.ndarray, editable: np.ndarray, violating: np.ndarray, valid: np.ndarray
) -> None:
    fits = images.ndim == 5 and images.dtype == np.float32 and images.shape[-1] in (1, 3)
    rule = "images must be float32 [K, B, H, W, 1 or 3]"
    _require(fits and images.size, rule, f"{images.dtype} {list(images.shape)}")
    _require(np.isfinite(images).all(), "images must be finite", "nan or infinity")
    columns, rows, height, width, _ = images.shape
    h, w = editable.shape[1:] if editable.ndim == 3 else (0, 0)
    square = h and w and height % h == 0 == width % w and height // h == width // w
    rule = f"editable must be [{rows}, h, w] over square patches of the {height}x{width} images"
    _require(square, rule, list(editable.shape))
    for name, array, shape in (
        ("editable", editable, (rows, h, w)),
        ("violating", violating, (columns, rows, h, w)),
        ("valid", valid, (columns, rows)),
    ):
        fits = array.shape == shape and array.dtype == np.bool_
        rule = f"{name} must be bool {list(shape)}"
        _require(fits, rule, f"{array.dtype} {list(array.shape)}")


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _write(figure: Figure, path: Path) -> None:
    with whole(path) as part, part.open("xb") as file:
        figure.savefig(file, format="png")
