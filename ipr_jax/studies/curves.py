"""Scores over iterations, with their intervals and a paper's numbers beside them."""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

# Before any import of matplotlib, which MPLBACKEND would make fail.
from ipr_jax.studies.figures import BLUE, FAINT, PLAIN, STRONG, new_figure, require, write

# isort: split
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, PercentFormatter, ScalarFormatter

from ipr_jax.runtime import files

DASHES = 12
"""From the beginning of a dash to that of the next, in widths of the line."""
LINE = 14
"""Height of a line of what is named beyond the axes, with its margin, in points."""
MOST_INSIDE = 8
"""Arms whose legend is in their panel; that of more is beside it, or they are a list."""
SHADES = ("#9cbfee", BLUE)
"""Of two values of an arm in a list."""
PUBLISHED = "paper, its own task"
"""What the hollow diamonds are."""
ARROWS: dict[tuple[float, float], str] = {
    (-1, 0): "\N{LEFTWARDS ARROW}",
    (1, 0): "\N{RIGHTWARDS ARROW}",
    (0, -1): "\N{DOWNWARDS ARROW}",
    (0, 1): "\N{UPWARDS ARROW}",
}
"""To where a diamond is that is beyond the axes: right and up."""


class Panel(NamedTuple):
    """A score of several arms.

    Attributes:
        label: what it is, such as "valid".
        share: whether it is a share of the samples, in [0, 1], drawn in percent.
        bands: by arm the value with its interval after 0, 1, ... iterations, float [N, 3]: low,
            value, high; low and high are nan where there is no interval.
        published: by arm a paper's value by iteration, drawn as a hollow diamond if the arm has
            come so far, or named at the edge if it is beyond what the arms span; may be empty.
        spent: by arm the evaluations per sample of its values, float [N] above 0, against which
            they are drawn; None = against iterations.
    """

    label: str
    share: bool
    bands: Mapping[str, np.ndarray]
    published: Mapping[str, Mapping[int, float]]
    spent: Mapping[str, np.ndarray] | None = None

    def text(self, value: float) -> str:
        """A value of the score."""
        return f"{value:.1%}" if self.share else f"{value:.3g}"


@PLAIN
def curves(
    path: str | os.PathLike[str],
    panels: Sequence[Panel],
    title: str,
    start: str = "first pass",
) -> None:
    """Draw scores over iterations with their 95% bands, and a paper's numbers beside them.

    Arms without iterations, and many against evaluations, are drawn as a list of values with their
    intervals. The file appears whole or not at all.

    Args:
        path: a PNG file that does not exist, in a folder that does.
        panels: from left to right.
        title: what is compared.
        start: what iteration 0 is.

    Raises:
        FileExistsError: the file exists; it is not overwritten.
        FileNotFoundError: the folder does not exist.
        ValueError: there is no panel, a panel has no arm, or a band is not [N, 3], has a value that
            is not in its interval or is not finite, or as a share is not in [0, 1].
    """
    path = files.refuse_existing(path)
    arms = [len(panel.bands) for panel in panels]
    require(arms and all(arms), "there must be a panel and an arm in every panel", arms)
    for panel in panels:
        for name, band in panel.bands.items():
            _check_band(name, np.asarray(band), panel.share)
    listed = all(len(band) == 1 for panel in panels for band in panel.bands.values())
    many = min(arms) > MOST_INSIDE and all(panel.spent is not None for panel in panels)
    draw = _draw_list if listed else _draw_costs if many else _draw_curves
    rows = 0 if draw is _draw_curves else max(arms)
    beside = sum(2.4 for each in arms if each > MOST_INSIDE and draw is _draw_curves)
    figure = new_figure(2.2 + 4.4 * len(panels) + beside, max(4.2, 1 + 0.25 * rows))
    figure.set_layout_engine("constrained")
    figure.suptitle(title, fontsize=11, weight="bold")
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        draw(axes, panel, start)
        axes.grid(color=FAINT, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    write(figure, path)


def _draw_curves(axes: Axes, panel: Panel, start: str) -> None:
    """Each arm with longer gaps than those before it and its own markers: equal ones are seen."""
    arms = len(panel.bands)
    colours = [colormaps["tab10" if arms <= 10 else "tab20"](number) for number in range(arms)]
    for number, (name, band) in enumerate(panel.bands.items()):
        low, value, high = np.asarray(band, float).T
        places = range(len(value)) if panel.spent is None else panel.spent[name]
        axes.plot(
            places,
            value,
            color=colours[number],
            linestyle=(0, (DASHES * (1 - number / arms), DASHES * number / arms)),
            marker="o",
            markersize=3,
            markevery=(number, arms) if len(value) > 3 * arms else 1,
            label=f"{name}: {panel.text(value[0])} to {panel.text(value[-1])}",
        )
        axes.fill_between(places, low, high, color=colours[number], alpha=0.18, lw=0)
    axes.set_ylabel(f"{panel.label} (%)" if panel.share else panel.label)
    if panel.spent is None:
        axes.set_xlabel(f"iteration (0 = {start}), bands: 95% intervals")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    else:
        axes.set_xlabel("network evaluations per sample, bands: 95% intervals")
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(ScalarFormatter())
    if panel.share:
        axes.yaxis.set_major_formatter(PercentFormatter(1, symbol=""))
    axes.margins(x=0.03)
    _draw_published(axes, panel, colours, lambda number, iteration, value: (iteration, value))


def _draw_list(axes: Axes, panel: Panel, start: str) -> None:
    names = list(panel.bands)
    low, value, high = np.concatenate([np.asarray(panel.bands[name], float) for name in names]).T
    axes.errorbar(value, names, xerr=[value - low, high - value], fmt="o", color=BLUE, capsize=3)
    axes.set_xlabel(f"{panel.label}{' (%)' if panel.share else ''}, {start}, bars: 95% intervals")
    axes.invert_yaxis()
    if panel.share:
        axes.xaxis.set_major_formatter(PercentFormatter(1, symbol=""))
    _draw_published(axes, panel, [STRONG] * len(names), lambda number, _, value: (value, number))


def _draw_costs(axes: Axes, panel: Panel, start: str) -> None:
    """What each arm comes to, named with what it costs, and before that in the lighter shade what
    it has come to for less, if that is a single value. The interval of the first is behind all.
    """
    del start  # what arms come to is no beginning
    assert panel.spent is not None
    names = []
    for row, (name, band) in enumerate(panel.bands.items()):
        least = 0 if len(band) <= len(SHADES) else -1
        values, spent = np.asarray(band, float)[least:], panel.spent[name][least:]
        names.append(f"{name}: {', '.join(f'{each:.0f}' for each in spent)}")
        places = row + 0.3 * (np.arange(len(values)) - (len(values) - 1) / 2)
        shades = SHADES[-len(values) :]
        for (low, value, high), place, shade in zip(values, places, shades, strict=True):
            bar = [[value - low], [high - value]]
            axes.errorbar(value, place, xerr=bar, fmt="o", color=shade, capsize=3)
        if not row:
            axes.axvspan(values[-1, 0], values[-1, 2], color=FAINT, alpha=0.5, lw=0, zorder=0)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_ylabel("method: network evaluations per sample, light and dark")
    share = " (%)" if panel.share else ""
    axes.set_xlabel(f"{panel.label}{share}\nbars: 95% intervals, grey: {next(iter(panel.bands))}")
    if panel.share:
        axes.xaxis.set_major_formatter(PercentFormatter(1, symbol=""))
    strong = [STRONG] * len(names)
    _draw_published(axes, panel, strong, lambda number, _, value: (value, number))


def _draw_published(
    axes: Axes,
    panel: Panel,
    colours: Sequence[Any],
    place: Callable[[int, int, float], tuple[float, float]],
) -> None:
    """A paper's numbers, as far as the arms have come, and the legend.

    They do not change the axes: what is beyond is named at the edge.
    """
    least, most = np.sort([axes.get_xlim(), axes.get_ylim()]).T
    axes.autoscale(False)
    looks = {"linestyle": "", "marker": "D", "markerfacecolor": "none", "zorder": 3}
    known = [
        (number, f"{name}: {panel.text(value)}", np.array(place(number, iteration, value)))
        for number, (name, band) in enumerate(panel.bands.items())
        for iteration, value in panel.published.get(name, {}).items()
        if iteration < len(band)
    ]
    beyond: dict[tuple[float, ...], list[str]] = {}
    for number, text, point in known:
        edge = point.clip(least, most)
        if (edge == point).all():
            size = 7 + 3 * (len(panel.bands) - 1 - number)  # equal ones surround each other
            axes.plot(*point, color=colours[number], markersize=size, **looks)
        else:
            beyond.setdefault((*edge, *np.sign(point - edge)), []).append(text)
    for (x, y, right, up), texts in beyond.items():
        axes.annotate(
            "\n".join(f"{ARROWS[right, up]}\N{WHITE DIAMOND} {text}" for text in texts),
            (x, y),
            (-4 * right, -4 * up or 6),
            textcoords="offset points",
            ha="left" if x < (least + most)[0] / 2 else "right",
            va="top" if up > 0 else "bottom",
            fontsize=8,
        )
    if known:
        axes.plot([], [], color=STRONG, label=PUBLISHED, **looks)
    if axes.get_legend_handles_labels()[0]:
        far = len(panel.bands) > MOST_INSIDE
        where, box = ("center left", (1, 0.5)) if far else ("best", _between(axes, beyond))
        axes.legend(frameon=False, fontsize=9, loc=where, bbox_to_anchor=box)


def _between(
    axes: Axes, notes: Mapping[tuple[float, ...], Sequence[str]]
) -> tuple[float, float, float, float]:
    """The part of the axes, x, y, width and height of 1, that is free of notes at two edges: of
    x, y, right and up as in ``_draw_published``, with their lines.
    """
    figure = axes.get_figure(root=True)
    assert figure is not None
    height = axes.get_window_extent().height / figure.dpi * 72
    below, above = (
        max((len(lines) for (*_, up), lines in notes.items() if up == side), default=0)
        for side in (-1, 1)
    )
    return 0, LINE * below / height, 1, 1 - LINE * (below + above) / height


def _check_band(name: str, band: np.ndarray, share: bool) -> None:
    require(
        band.ndim == 2 and band.shape[1] == 3 and len(band), f"{name} must be [N, 3]", band.shape
    )
    low, value, high = band.T
    none = np.isnan(low) & np.isnan(high)
    inside = (band >= 0) & (band <= 1) if share else np.isfinite(band)
    holds = (low <= value) & (value <= high) & inside.all(axis=1) | none & inside[:, 1]
    rule = "0 <= low <= value <= high <= 1" if share else "low <= value <= high"
    require(holds.all(), f"{name}: {rule} must hold", band.tolist())
