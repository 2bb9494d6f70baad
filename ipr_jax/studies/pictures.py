"""Pictures of a refinement: its samples, and one of them in motion.

Shapes: B samples, [B, h, w] patches ("cells"), [B, H, W, C] images in [-1, 1]. Grayscale images
(C = 1) are shown as dark ink on white paper, colour images (C = 3) as they are. A solved sample
stands in a green frame, a clue has a blue border, a cell that violates a rule is red.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from math import isqrt
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

# Before any import of matplotlib, which MPLBACKEND would make fail.
from ipr_jax.studies.figures import (
    BLUE,
    DPI,
    FAINT,
    GREEN,
    ORANGE,
    PLAIN,
    RED,
    STRONG,
    new_figure,
    rendered,
    require,
)

# isort: split
from matplotlib.patches import Patch
from PIL import Image
from scipy.ndimage import minimum_filter

from ipr_jax.runtime import files

WHITE = np.full(3, 255, np.uint8)

TINT = 0.42
"""Opacity of the red over a violating cell: the digit stays legible."""

WIDTH, MIN_WIDTH = 160, 1080  # of an image and of the picture; all these sizes are in pixels
FRAME_WIDTH, MIN_FRAME_WIDTH = 320, 480  # the same in an animation
GUTTER = 5  # around a cell: a grid line, then the blue of a clue
OUTLINE, FRAME, GAP, MARGIN = 2, 6, 7, 20
TITLE, LINE, HEADS, CAPTION = 62, 48, 76, 30  # the heights of texts

FIRST, NEXT, LAST = 1200, 500, 3000  # milliseconds of a frame


class Samples(NamedTuple):
    """Samples at a moment of their refinement, and what is marked in them.

    Attributes:
        image: float32 [B, H, W, C] in [-1, 1], C = 1 or 3; beyond is clipped.
        editable: bool [B, h, w]; False = a clue.
        solved: bool [B].
        violating: bool [B, h, w], the cells that violate a rule. None where no cell does by itself;
            then images are drawn in one piece, unless they have clues.
        captions: B short texts, each drawn below its image; None = no texts.
    """

    image: np.ndarray
    editable: np.ndarray
    solved: np.ndarray
    violating: np.ndarray | None = None
    captions: Sequence[str] | None = None


@PLAIN
def refinement(
    path: str | os.PathLike[str],
    moments: Mapping[int, Samples],
    headline: str,
    start: str = "first pass",
) -> None:
    """Draw samples while they are refined: a row per sample, a column per moment.

    The file appears whole or not at all.

    Args:
        path: a PNG file that does not exist, in a folder that does.
        moments: by iteration, increasing, the same B samples after it.
        headline: what solved samples are, such as "valid".
        start: what iteration 0 is.

    Raises:
        FileExistsError: the file exists; it is not overwritten.
        FileNotFoundError: the folder does not exist.
        ValueError: there is no moment, shapes or dtypes do not belong together, a pixel is not
            finite, or the iterations do not increase.
    """
    path = files.refuse_existing(path)
    _check_moments(moments)
    found = [f"{shown.solved.sum()} of {len(shown.solved)}" for shown in moments.values()]
    whens = [_when(iteration, start) for iteration in moments]
    says = f"{found[0]} {headline} {whens[0]}"
    if len(moments) > 1:
        says += f", {found[-1]} {whens[-1]}"
    names = [_iterations(iteration) if iteration else start for iteration in moments]
    sheet = _Sheet(
        boards=np.stack([_boards(shown) for shown in moments.values()], axis=1),
        captions=_captions(moments.values()),
        title="Refinement",
        says=says,
        heads=[(name, f"{each} {headline}") for name, each in zip(names, found, strict=True)],
        legend=_legend(moments.values(), headline),
    )
    _write(_draw_sheet(sheet), path)


@PLAIN
def samples(
    path: str | os.PathLike[str],
    shown: Samples,
    iteration: int | None,
    headline: str,
    start: str = "first pass",
    note: str = "",
) -> None:
    """Draw samples in a grid, row by row, about as many rows as columns.

    The file appears whole or not at all.

    Args:
        path: a PNG file that does not exist, in a folder that does.
        shown: B samples.
        iteration: the one after which they are, at least 0; None = not the same one for all.
        headline: what solved samples are, such as "valid".
        start: what iteration 0 is.
        note: a line on how they were made; may be empty.

    Raises:
        FileExistsError: the file exists; it is not overwritten.
        FileNotFoundError: the folder does not exist.
        ValueError: shapes or dtypes do not belong together, a pixel is not finite, or the
            iteration is below 0.
    """
    path = files.refuse_existing(path)
    _check_moments({iteration or 0: shown})
    number, boards = len(shown.solved), _boards(shown)
    columns = isqrt(number - 1) + 1
    empty = -number % columns
    boards = np.concatenate([boards, np.full_like(boards[:1], 255).repeat(empty, axis=0)])
    captions = _captions([shown])
    said = f"{number} sample{'' if number == 1 else 's'}"
    if iteration is not None:
        said += f" {_when(iteration, start)}"
    sheet = _Sheet(
        boards=boards.reshape(-1, columns, *boards.shape[1:]),
        captions=captions
        if captions is None
        else np.append(captions, [""] * empty).reshape(-1, columns),
        title=f"{said}: {shown.solved.sum()} {headline}",
        says=note,
        legend=_legend([shown], headline),
    )
    _write(_draw_sheet(sheet), path)


@PLAIN
def animation(
    path: str | os.PathLike[str],
    moments: Mapping[int, Samples],
    sample: int,
    headline: str,
    start: str = "first pass",
) -> None:
    """Draw one sample while it is refined, as frames that play forever, the last one held.

    The patches in which it differs from the moment before are outlined. The file appears whole or
    not at all.

    Args:
        path: a GIF file that does not exist, in a folder that does.
        moments: by iteration, increasing, the same B samples after it.
        sample: which of them, in 0..B-1.
        headline: what a solved sample is, such as "valid".
        start: what iteration 0 is.

    Raises:
        FileExistsError: the file exists; it is not overwritten.
        FileNotFoundError: the folder does not exist.
        ValueError: as for ``refinement``, or there is no such sample.
    """
    path = files.refuse_existing(path)
    _check_moments(moments)
    number = len(next(iter(moments.values())).solved)
    require(0 <= sample < number, f"sample must be in 0..{number - 1}", sample)
    shown = [_only(sample, each) for each in moments.values()]
    changed = [_changed(*pair) for pair in zip([shown[0], *shown], shown, strict=False)]
    legend = _legend(shown, headline, outlined=bool(np.any(changed)))
    frames = []
    for iteration, now, region in zip(moments, shown, changed, strict=True):
        solved = now.solved[0]
        sheet = _Sheet(
            boards=_boards(now, FRAME_WIDTH, region)[None],
            captions=_captions([now]),
            title=f"iteration {iteration} of {max(moments)}" if iteration else start,
            says=headline if solved else f"not {headline}",
            colour=GREEN if solved else RED,
            legend=legend,
        )
        picture = _draw_sheet(sheet, MIN_FRAME_WIDTH)
        frames.append(picture.quantize(256, dither=Image.Dither.NONE))
    durations = [FIRST, *[NEXT] * (len(frames) - 2), LAST][-len(frames) :]
    with files.whole(path) as part:
        looks = {"append_images": frames[1:], "duration": durations, "loop": 0}
        frames[0].save(part, format="GIF", save_all=True, **looks)


class _Sheet(NamedTuple):
    """Boards in rows and columns, and the texts around them.

    Attributes:
        boards: uint8 [rows, columns, height, width, 3].
        captions: str [rows, columns], below each board, or None.
        title: the first line.
        says: the second one; may be empty.
        colour: of it.
        heads: two lines above each column; may be empty.
        legend: may be empty.
    """

    boards: np.ndarray
    captions: np.ndarray | None
    title: str
    legend: Sequence[Patch]
    says: str = ""
    colour: tuple[float, float, float] = (0.0, 0.0, 0.0)
    heads: Sequence[tuple[str, str]] = ()


def _draw_sheet(sheet: _Sheet, min_width: int = MIN_WIDTH) -> Image.Image:
    rows, columns, height, width, _ = sheet.boards.shape
    captions = np.full((rows, columns), "") if sheet.captions is None else sheet.captions
    height += 0 if sheet.captions is None else CAPTION
    left = max(MARGIN, (min_width - columns * width) // 2)
    across = columns * width + 2 * left
    legend_columns = min(len(sheet.legend), 2 if across < MIN_WIDTH else 4)
    says = TITLE + LINE * bool(sheet.says)
    marked = says + (-(-len(sheet.legend) // legend_columns) * LINE if sheet.legend else 0)
    top = marked + (HEADS if sheet.heads else 0)
    down = top + rows * height + MARGIN
    figure = new_figure(across / DPI, down / DPI)

    def write(x: float, y: float, text: str, **style: Any) -> None:
        figure.text(x / across, 1 - y / down, text, ha="center", va="center", **style)

    bold = {"weight": "bold"}
    write(across / 2, 38, sheet.title, fontsize=12, **bold)
    if sheet.says:
        write(across / 2, TITLE + 22, sheet.says, fontsize=9, color=sheet.colour)
    for column, (head, below) in enumerate(sheet.heads):
        x = left + (column + 0.5) * width
        write(x, top - 52, head, fontsize=8, **bold)
        write(x, top - 22, below, fontsize=7, color=STRONG)
    for (row, column), caption in np.ndenumerate(captions):
        x, y = left + (column + 0.5) * width, top + (row + 1) * height - CAPTION / 2 - GAP / 2
        write(x, y, caption, fontsize=7, color=STRONG)
    if sheet.legend:
        place = {"loc": "center", "bbox_to_anchor": (0.5, 1 - (says + marked) / 2 / down)}
        looks = {"fontsize": 8, "frameon": False, "handlelength": 1.2, "handleheight": 1.2}
        figure.legend(handles=sheet.legend, ncols=legend_columns, **place, **looks)
    picture = rendered(figure)
    for row, boards in enumerate(sheet.boards):
        picture.paste(Image.fromarray(np.concatenate(boards, axis=1)), (left, top + row * height))
    return picture


def _legend(shown: Iterable[Samples], headline: str, outlined: bool = False) -> list[Patch]:
    """Name the marks that occur."""
    shown = list(shown)
    clue = Patch(facecolor="white", edgecolor=BLUE, linewidth=1.5, label="clue")
    violating = Patch(facecolor=(*RED, TINT), label="violates a rule")
    solved = Patch(facecolor="white", edgecolor=GREEN, linewidth=2.5, label=headline)
    region = Patch(facecolor="white", edgecolor=ORANGE, linewidth=2.5, label="regenerated")
    occurs = [
        (region, outlined),
        (clue, not all(each.editable.all() for each in shown)),
        (violating, any(each.violating is not None and each.violating.any() for each in shown)),
        (solved, any(each.solved.any() for each in shown)),
    ]
    return [mark for mark, there in occurs if there]


def _captions(shown: Iterable[Samples]) -> np.ndarray | None:
    """The texts below the images, a column per moment: str [B, K], or None."""
    texts = [each.captions for each in shown if each.captions is not None]
    return np.array(texts).T if texts else None


def _only(sample: int, shown: Samples) -> Samples:
    """One of the samples, B = 1."""
    where = slice(sample, sample + 1)
    return Samples(
        shown.image[where],
        shown.editable[where],
        shown.solved[where],
        None if shown.violating is None else shown.violating[where],
        None if shown.captions is None else shown.captions[where],
    )


def _changed(before: Samples, after: Samples) -> np.ndarray:
    """The patches that differ: bool [B, h, w]."""
    _, height, width, _ = after.image.shape
    number, h, w = after.editable.shape
    differs = (before.image != after.image).reshape(number, h, height // h, w, width // w, -1)
    return differs.any(axis=(2, 4, 5))


def _boards(shown: Samples, least: int = WIDTH, outlined: np.ndarray | None = None) -> np.ndarray:
    """Draw images in their frames, at least so many pixels wide, some patches [B, h, w] outlined.

    Returns:
        uint8 [B, height, width, 3].
    """
    number, height, width, channels = shown.image.shape
    h, w = shown.editable.shape[1:]
    shade = np.clip((shown.image + 1) / 2, 0, 1)
    shade = _rgb(shade if channels == 3 else np.repeat(1 - shade, 3, axis=-1))
    scale = -(-least // width)
    shade = shade.repeat(scale, axis=1).repeat(scale, axis=2)
    if shown.violating is None and shown.editable.all():
        boards, side = shade, scale * height // h
    else:
        tiles = shade.reshape(number, h, scale * height // h, w, -1, 3).swapaxes(2, 3)
        tiles = _cells(tiles, ~shown.editable, shown.violating)
        side = tiles.shape[3]
        boards = tiles.swapaxes(2, 3).reshape(number, h * side, w * side, 3)
        if h == w == isqrt(h) ** 2:
            for line in range(isqrt(h) * side, h * side, isqrt(h) * side):
                boards[:, line - 1 : line + 1] = _rgb(STRONG)
                boards[:, :, line - 1 : line + 1] = _rgb(STRONG)
    if outlined is not None:
        region = outlined.repeat(side, axis=1).repeat(side, axis=2)
        for colour, line in ((_rgb(ORANGE), 4), (WHITE, 2)):
            size = (1, 2 * line + 1, 2 * line + 1)
            inside = np.asarray(minimum_filter(region, size=size, mode="constant"))
            boards = np.where((region != inside)[..., None], colour, boards)
            region = inside
    boards = _pad(boards, OUTLINE, _rgb(STRONG))
    boards = _pad(boards, FRAME, np.where(_per_pixel(shown.solved), _rgb(GREEN), WHITE))
    return _pad(boards, GAP, WHITE)


def _cells(tiles: np.ndarray, clue: np.ndarray, violating: np.ndarray | None) -> np.ndarray:
    """Surround cells, uint8 [B, h, w, S, S, 3], by grid lines, and mark them."""
    tiles = _pad(tiles, GUTTER, WHITE)
    inset = np.minimum(np.arange(tiles.shape[3]), np.arange(tiles.shape[3])[::-1])
    inset = np.minimum(inset[:, None], inset)[..., None]
    ring = (inset > 0) & (inset < GUTTER)
    if violating is not None and violating.any():
        tiles[violating] = _tint(tiles[violating])
    tiles = np.where(_per_pixel(clue) & ring, _rgb(BLUE), tiles)
    return np.where(inset == 0, _rgb(FAINT), tiles)


def _per_pixel(mask: np.ndarray) -> np.ndarray:
    """Append axes that broadcast over pixels and channels: [...] -> [..., 1, 1, 1]."""
    return mask[..., None, None, None]


def _rgb(colour: ArrayLike) -> np.ndarray:
    """Colours [..., 3] in [0, 1] as uint8."""
    return np.rint(np.asarray(colour) * np.float32(255)).astype(np.uint8)


def _tint(colour: np.ndarray) -> np.ndarray:
    """Lay translucent red over colours, uint8 [..., 3]."""
    return _rgb((1 - TINT) * colour.astype(np.float32) / 255 + TINT * np.array(RED, np.float32))


def _pad(pictures: np.ndarray, width: int, colour: np.ndarray) -> np.ndarray:
    """Surround pictures, uint8 [..., H, W, 3], by ``width`` pixels of such colours."""
    *lead, height, across, _ = pictures.shape
    shape = (*lead, height + 2 * width, across + 2 * width, 3)
    padded = np.broadcast_to(colour, shape).astype(pictures.dtype)
    padded[..., width:-width, width:-width, :] = pictures
    return padded


def _iterations(number: int) -> str:
    return f"{number} iteration{'' if number == 1 else 's'}"


def _when(iteration: int, start: str) -> str:
    """Such as "in the first pass" or "after 2 iterations"."""
    return f"after {_iterations(iteration)}" if iteration else f"in the {start}"


def _check_moments(moments: Mapping[int, Samples]) -> None:
    iterations = list(moments)
    increasing = all(a < b for a, b in zip((-1, *iterations), iterations, strict=False))
    rule = "iterations must be increasing numbers >= 0 (at least one)"
    require(iterations and increasing, rule, iterations)
    first, *later = moments.values()
    for shown in (first, *later):
        _check_samples(shown)
        rule = f"all moments must have images {list(first.image.shape)} and the same clues"
        fits = shown.image.shape == first.image.shape
        same = fits and np.array_equal(shown.editable, first.editable)
        require(same, rule, f"{list(shown.image.shape)}{' and other clues' if fits else ''}")
    captioned = [shown.captions is not None for shown in moments.values()]
    rule = "all moments must have captions, or none"
    require(len(set(captioned)) == 1, rule, f"them in {sum(captioned)} of {len(captioned)}")


def _check_samples(shown: Samples) -> None:
    image, editable = shown.image, shown.editable
    fits = image.ndim == 4 and image.dtype == np.float32 and image.shape[-1] in (1, 3)
    rule = "image must be float32 [B, H, W, 1 or 3]"
    require(fits and image.size, rule, f"{image.dtype} {list(image.shape)}")
    require(np.isfinite(image).all(), "image must be finite", "nan or infinity")
    number, height, width, _ = image.shape
    h, w = editable.shape[1:] if editable.ndim == 3 else (0, 0)
    square = h and w and height % h == 0 == width % w and height // h == width // w
    rule = f"editable must be [{number}, h, w] over square patches of the {height}x{width} images"
    require(square, rule, list(editable.shape))
    for name, array, shape in (
        ("editable", editable, (number, h, w)),
        ("violating", shown.violating, (number, h, w)),
        ("solved", shown.solved, (number,)),
    ):
        if array is not None:
            fits = array.shape == shape and array.dtype == np.bool_
            rule = f"{name} must be bool {list(shape)}"
            require(fits, rule, f"{array.dtype} {list(array.shape)}")
    texts = number if shown.captions is None else len(shown.captions)
    require(texts == number, f"captions must be {number} texts or None", texts)


def _write(picture: Image.Image, path: Path) -> None:
    """As PNG, whole or not at all."""
    with files.whole(path) as part:
        picture.save(part, format="PNG", dpi=(DPI, DPI))
