import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from ipr_jax.studies import curves, figures, pictures
from ipr_jax.tasks import counting_polygons, even_pixels

CELL = 50
BOARD = 4 * CELL + 2 * (pictures.OUTLINE + pictures.FRAME + pictures.GAP)
GREEN, BLUE, ORANGE = (
    [round(255 * part) for part in colour]
    for colour in (figures.GREEN, figures.BLUE, figures.ORANGE)
)


def boards(columns: int = 2, rows: int = 1, channels: int = 1) -> dict[str, Any]:
    """Boards of 4x4 cells with a bright stroke on a dark ground, no clue, none valid."""
    stroke = np.full((8, 8, channels), -1, np.float32)
    stroke[2:6, 3:5] = 1
    return {
        "image": np.tile(stroke, (columns, rows, 4, 4, 1)),
        "editable": np.ones((rows, 4, 4), bool),
        "solved": np.zeros((columns, rows), bool),
        "violating": np.zeros((columns, rows, 4, 4), bool),
        "captions": None,
        "iterations": list(range(columns)),
    }


def moments(arrays: dict[str, Any]) -> dict[int, pictures.Samples]:
    """The same by iteration."""
    image, solved, violating = (arrays[name] for name in ("image", "solved", "violating"))
    return {
        iteration: pictures.Samples(
            image[column],
            arrays["editable"],
            solved[column],
            None if violating is None else violating[column],
            None if arrays["captions"] is None else arrays["captions"][column],
        )
        for column, iteration in enumerate(arrays["iterations"])
    }


def panel(**changes: Any) -> curves.Panel:
    """A share of the samples, over two iterations."""
    band = np.array([[0.4, 0.5, 0.6], [0.5, 0.6, 0.7], [0.6, 0.75, 0.8]])
    bands = {"a": band, "b": band[::-1]}
    published = {"b": {1: 0.7, 50: 0.8}}
    whole = {"label": "valid", "share": True, "bands": bands, "published": published}
    return curves.Panel(**whole | changes)


def strip(path: Path | str, **arrays: Any) -> None:
    pictures.refinement(path, moments(boards() | arrays), "valid")


def grid(path: Path | str) -> None:
    pictures.samples(path, moments(boards())[0], 0, "valid")


def motion(path: Path | str) -> None:
    pictures.animation(path, moments(boards()), 0, "valid")


def lines(path: Path | str) -> None:
    curves.curves(path, [panel()], "Two arms")


def read(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def changed(before: np.ndarray, after: np.ndarray) -> tuple[np.ndarray, slice, slice]:
    """Say which pixels differ, and the rows and columns of the picture that hold them."""
    where = (before != after).any(axis=-1)
    y, x = np.nonzero(where)
    return where, slice(y.min(), y.max() + 1), slice(x.min(), x.max() + 1)


def pixels_of(colour: list[int], picture: np.ndarray) -> np.ndarray:
    return (picture == colour).all(axis=-1)


@pytest.fixture
def draw(tmp_path: Path) -> Callable[..., np.ndarray]:
    """Draw a strip and return what is below its texts."""

    def draw(**arrays: Any) -> np.ndarray:
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.png"
        strip(path, **arrays)
        picture = read(path)
        rows = len(arrays["editable"])
        return picture[len(picture) - pictures.MARGIN - rows * BOARD :]

    return draw


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are drawn from now on."""
    figures, draw = [], FigureCanvasAgg.draw

    def watched(self: FigureCanvasAgg) -> None:
        if self.figure not in figures:
            figures.append(self.figure)
        draw(self)

    monkeypatch.setattr(FigureCanvasAgg, "draw", watched)
    return figures


def texts_of(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.texts]


def legend_of(drawn: Figure | Axes) -> list[str]:
    legends = drawn.legends if isinstance(drawn, Figure) else [drawn.get_legend()]
    return [text.get_text() for legend in legends if legend for text in legend.get_texts()]


# --- boards ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
def test_a_violating_cell_is_redder_and_its_digit_legible(draw: Any, channels: int) -> None:
    arrays = boards(channels=channels)
    plain = draw(**arrays)
    arrays["violating"][1, 0, 2, 3] = True
    tinted = draw(**arrays)
    where, y, x = changed(plain, tinted)
    redness = np.array([1, -0.5, -0.5])
    assert (tinted[where] @ redness > plain[where] @ redness).all()
    assert CELL - 4 <= y.stop - y.start <= CELL
    assert CELL - 4 <= x.stop - x.start <= CELL
    assert y.start > 2 * CELL
    assert x.start > plain.shape[1] / 2 + 3 * CELL
    brightness = tinted[y, x].mean(axis=-1)
    assert brightness.max() - brightness.min() > 100


def test_a_valid_board_has_a_green_frame(draw: Any) -> None:
    arrays = boards()
    plain = draw(**arrays)
    arrays["solved"][0, 0] = True
    framed = draw(**arrays)
    where, y, x = changed(plain, framed)
    assert (framed[where] == GREEN).all()
    assert y.stop - y.start > 4 * CELL
    assert x.stop - x.start > 4 * CELL
    assert x.stop <= plain.shape[1] / 2
    assert (framed[y, x][10:-10, 10:-10] == plain[y, x][10:-10, 10:-10]).all()


def test_a_clue_has_a_blue_border_in_every_column_and_keeps_its_pixels(draw: Any) -> None:
    arrays = boards()
    plain = draw(**arrays)
    arrays["editable"][0, 1, 0] = False
    marked = draw(**arrays)
    left = slice(None), slice(None, plain.shape[1] // 2)
    right = slice(None), slice(plain.shape[1] // 2, None)
    for half in (left, right):
        where, y, x = changed(plain[half], marked[half])
        assert (marked[half][where] == BLUE).all()
        inside = (slice(y.start + 4, y.stop - 4), slice(x.start + 4, x.stop - 4))
        assert (marked[half][inside] == plain[half][inside]).all()


def test_a_violating_clue_shows_both(draw: Any) -> None:
    arrays = boards(columns=1)
    arrays["editable"][0, 0, 0] = False
    clue = draw(**arrays)
    arrays["violating"][0, 0, 0, 0] = True
    where, *_ = changed(clue, draw(**arrays))
    ring = pixels_of(BLUE, clue)
    assert where.sum() == 40 * 40
    assert ring.any()
    assert not (where & ring).any()


def test_grayscale_is_dark_on_light_and_colour_as_it_is(draw: Any) -> None:
    gray, colour = boards(columns=1), boards(columns=1, channels=3)
    assert np.median(draw(**gray)) == 255
    colour["image"][:] = [1, -1, 0]
    assert pixels_of([255, 0, 128], draw(**colour)).sum() == 160 * 160


def test_pixels_beyond_the_range_are_clipped(draw: Any) -> None:
    arrays = boards()
    far = boards()
    far["image"] *= 3
    assert (draw(**arrays) == draw(**far)).all()


def test_lines_between_boxes_are_darker_than_between_cells(draw: Any) -> None:
    arrays = boards(columns=1)
    arrays["image"][:] = -1
    down = draw(**arrays)[:, 540 - CELL // 2].mean(axis=-1)  # through the middle of cells
    outline, box, cells = 2 * 2, 2, 3 * 2
    assert (down < 100).sum() == outline + box
    assert ((down > 200) & (down < 230)).sum() == cells


def test_an_image_without_cells_is_drawn_in_one_piece(tmp_path: Path) -> None:
    """As soon as there is a clue, there are cells."""
    arrays = boards(columns=1, channels=3) | {"violating": None}
    arrays["image"][:] = [1, -1, 0]
    strip(tmp_path / "whole.png", **arrays)
    y, x = np.nonzero(pixels_of([255, 0, 128], read(tmp_path / "whole.png")))
    assert len(y) == 160 * 160
    assert (np.ptp(y), np.ptp(x)) == (159, 159)
    arrays["editable"][0, 3, 3] = False
    strip(tmp_path / "cells.png", **arrays)
    y, x = np.nonzero(pixels_of([255, 0, 128], read(tmp_path / "cells.png")))
    assert len(y) == 160 * 160
    assert (np.ptp(y), np.ptp(x)) == (4 * CELL - 11, 4 * CELL - 11)


# --- refinement -----------------------------------------------------------------------------------


def test_the_texts_tell_what_happened(tmp_path: Path, drawn: list[Figure]) -> None:
    arrays = boards(columns=3, rows=4) | {"iterations": [0, 1, 20]}
    arrays["solved"][0, :1] = arrays["solved"][1, :2] = arrays["solved"][2] = True
    pictures.refinement(tmp_path / "new.png", moments(arrays), "balanced")
    assert texts_of(drawn[0]) == [
        "Refinement",
        "1 of 4 balanced in the first pass, 4 of 4 after 20 iterations",
        *("first pass", "1 of 4 balanced"),
        *("1 iteration", "2 of 4 balanced"),
        *("20 iterations", "4 of 4 balanced"),
        *[""] * 12,
    ]


def test_what_is_corrected_is_the_input(tmp_path: Path, drawn: list[Figure]) -> None:
    shown = moments(boards())
    pictures.refinement(tmp_path / "a.png", shown, "valid", "input")
    pictures.samples(tmp_path / "b.png", shown[0], 0, "valid", "input")
    pictures.animation(tmp_path / "c.gif", shown, 0, "valid", "input")
    curves.curves(tmp_path / "d.png", [panel()], "Two arms", "input")
    strip, grid, frame, *_, lines = drawn
    assert texts_of(strip)[1:3] == ["0 of 1 valid in the input, 0 of 1 after 1 iteration", "input"]
    assert texts_of(grid)[0] == "1 sample in the input: 0 valid"
    assert texts_of(frame)[0] == "input"
    assert lines.axes[0].get_xlabel() == "iteration (0 = input), bands: 95% intervals"


@pytest.mark.parametrize("marks", [(), ("clue",), ("valid",), ("clue", "violates a rule", "valid")])
def test_the_legend_names_the_marks_that_occur(
    tmp_path: Path, drawn: list[Figure], marks: tuple[str, ...]
) -> None:
    arrays = boards()
    arrays["editable"][0, 0, 0] = "clue" not in marks
    arrays["violating"][1, 0, 0, 0] = "violates a rule" in marks
    arrays["solved"][0, 0] = "valid" in marks
    strip(tmp_path / "new.png", **arrays)
    assert legend_of(drawn[0]) == list(marks)


def test_captions_stand_below_their_images(tmp_path: Path, drawn: list[Figure]) -> None:
    arrays = boards(rows=3)
    strip(tmp_path / "plain.png", **arrays)
    captions = [[f"{row} then {column}" for row in range(3)] for column in range(2)]
    strip(tmp_path / "new.png", **arrays | {"captions": captions})
    plain, captioned = read(tmp_path / "plain.png"), read(tmp_path / "new.png")
    assert len(captioned) == len(plain) + 3 * pictures.CAPTION
    dark = captioned.min(axis=2) < 160
    for text in drawn[1].texts[-6:]:
        row, column = map(int, text.get_text().split(" then "))
        x, y = text.get_position()
        assert (x < 0.5) == (column == 0)
        bottom = len(captioned) - round(y * len(captioned))
        last = len(captioned) - pictures.MARGIN - (2 - row) * (BOARD + pictures.CAPTION)
        assert last - pictures.CAPTION - 7 < bottom < last
        across = round(x * captioned.shape[1])
        assert dark[bottom - 9 : bottom + 9, across - 50 : across + 50].any()
        assert not dark[bottom - 17 : bottom - 14, across - 50 : across + 50].any()


NINES = {"stated": [[9, 9]], "num_polygons": [9], "num_vertices": [9], "uniform": [True]}
CAPTIONS = {
    "balanced": even_pixels.describe({"imbalance": np.zeros(1, int)}),
    "consistent": counting_polygons.describe(
        {name: np.array(value) for name, value in NINES.items()}, "corners"
    ),
}


@pytest.mark.parametrize(("headline", "side"), [("balanced", 32), ("consistent", 128)])
def test_texts_of_neighbours_do_not_touch(
    tmp_path: Path, drawn: list[Figure], headline: str, side: int
) -> None:
    colour, captions = np.zeros((8, side, side, 3), np.float32), CAPTIONS[headline] * 8
    shown = pictures.Samples(colour, np.ones((8, 4, 4), bool), np.ones(8, bool), None, captions)
    pictures.refinement(tmp_path / "new.png", {50: shown, 100: shown}, headline)
    places = [text.get_window_extent() for text in drawn[0].texts[2:]]
    assert len(places) == 2 * 2 + 2 * 8
    assert not any(a.overlaps(b.padded(3)) for a, b in itertools.combinations(places, 2))


# --- samples --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "rows", "columns"), [(1, 1, 1), (2, 1, 2), (5, 2, 3), (9, 3, 3), (64, 8, 8)]
)
def test_samples_fill_a_grid_row_by_row(
    tmp_path: Path, number: int, rows: int, columns: int
) -> None:
    arrays = boards(columns=1, rows=number)
    arrays["solved"][0, -1] = True
    arrays["image"][:] = 1
    shown = moments(arrays)[0]
    pictures.samples(tmp_path / "new.png", shown, 20, "valid")
    side, ink = BOARD, 4 * (CELL - 2 * pictures.GUTTER)
    black = pixels_of([0, 0, 0], read(tmp_path / "new.png"))
    height, width = black.shape
    assert width == max(pictures.MIN_WIDTH, columns * side + 2 * pictures.MARGIN)
    top, left = height - pictures.MARGIN - rows * side, (width - columns * side) // 2
    inside = black[top : top + rows * side, left : left + columns * side]
    count = inside.reshape(rows, side, columns, side).sum(axis=(1, 3))
    assert (count.ravel() == [ink**2] * number + [0] * (rows * columns - number)).all()
    green = pixels_of(GREEN, read(tmp_path / "new.png"))[top:, left:]
    y, x = np.nonzero(green)
    assert y.min() // side == (number - 1) // columns == y.max() // side
    assert x.min() // side == (number - 1) % columns == x.max() // side


@pytest.mark.parametrize(
    ("number", "iteration", "title"),
    [
        (4, 20, "4 samples after 20 iterations: 3 consistent"),
        (1, 0, "1 sample in the first pass: 0 consistent"),
        (4, None, "4 samples: 3 consistent"),
    ],
)
def test_the_title_of_samples_says_it_all(
    tmp_path: Path, drawn: list[Figure], number: int, iteration: int | None, title: str
) -> None:
    arrays = boards(columns=1, rows=number) | {"captions": [list("abcd"[:number])]}
    arrays["solved"][0, 1:] = True
    pictures.samples(tmp_path / "new.png", moments(arrays)[0], iteration, "consistent")
    assert texts_of(drawn[0]) == [title, *"abcd"[:number]]
    assert legend_of(drawn[0]) == ["consistent"] * (number > 1)


def test_a_note_stands_below_the_title(tmp_path: Path, drawn: list[Figure]) -> None:
    shown = moments(boards())[0]
    pictures.samples(tmp_path / "new.png", shown, None, "valid", note="a verifier chose")
    assert texts_of(drawn[0])[:2] == ["1 sample: 0 valid", "a verifier chose"]


# --- animation ------------------------------------------------------------------------------------


def frames_of(path: Path) -> tuple[list[np.ndarray], list[int]]:
    """The frames of an animation, and how long each is shown."""
    frames, durations = [], []
    with Image.open(path) as image:
        assert image.format == "GIF"
        assert image.info["loop"] == 0
        for number in range(image.n_frames):
            image.seek(number)
            frames.append(np.asarray(image.convert("RGB")).astype(int))
            durations.append(image.info["duration"])
    return frames, durations


def near(colour: list[int], picture: np.ndarray) -> np.ndarray:
    return np.abs(picture - colour).max(axis=-1) < 12


@pytest.mark.parametrize(
    ("columns", "durations"), [(1, [3000]), (2, [1200, 3000]), (4, [1200, 500, 500, 3000])]
)
def test_an_animation_has_a_frame_per_moment_and_holds_the_last(
    tmp_path: Path, columns: int, durations: list[int]
) -> None:
    pictures.animation(tmp_path / "new.gif", moments(boards(columns)), 0, "valid")
    with Image.open(tmp_path / "new.gif") as image:
        assert image.n_frames == columns
    if columns > 1:
        frames, held = frames_of(tmp_path / "new.gif")
        assert held == durations
        assert len({frame.shape for frame in frames}) == 1


def test_what_was_regenerated_is_outlined(tmp_path: Path) -> None:
    """In one line around neighbours; in the first frame, nothing."""
    arrays = boards(columns=3, rows=2)
    arrays["image"][1:, 1, 8:16, 16:32] *= -0.5  # cells (1, 2) and (1, 3)
    arrays["image"][2, 0] *= 0.5  # another sample
    pictures.animation(tmp_path / "new.gif", moments(arrays), 1, "valid")
    frames, _ = frames_of(tmp_path / "new.gif")
    side, cell = frames[0].shape[1], 8 * 10 + 10
    top = len(frames[0]) - pictures.MARGIN - 4 * cell - 15
    left = (side - 4 * cell) // 2
    legend = slice(0, top)
    outlines = [near(ORANGE, frame)[top:, left:] for frame in frames]
    assert not outlines[0].any()
    assert not outlines[2].any()
    y, x = np.nonzero(outlines[1])
    assert (y.min(), y.max() + 1, x.min(), x.max() + 1) == (cell, 2 * cell, 2 * cell, 4 * cell)
    assert outlines[1].sum() == 2 * 4 * (2 * cell + cell - 8)
    assert all(near(ORANGE, frame)[legend].any() for frame in frames)


def test_a_frame_says_when_it_is_and_whether_it_is_solved(
    tmp_path: Path, drawn: list[Figure]
) -> None:
    arrays = boards(columns=3) | {"captions": [["a"], ["b"], ["c"]], "iterations": [0, 1, 7]}
    arrays["solved"][2] = True
    pictures.animation(tmp_path / "new.gif", moments(arrays), 0, "valid")
    assert [texts_of(figure) for figure in drawn] == [
        ["first pass", "not valid", "a"],
        ["iteration 1 of 7", "not valid", "b"],
        ["iteration 7 of 7", "valid", "c"],
    ]
    assert [figure.texts[1].get_color() for figure in drawn] == [
        *(figures.RED, figures.RED, figures.GREEN)
    ]
    assert [legend_of(figure) for figure in drawn] == [["valid"]] * 3
    frames, _ = frames_of(tmp_path / "new.gif")
    below = slice(len(frames[0]) // 2, None)
    assert [near(GREEN, each)[below].any() for each in frames] == [False, False, True]


def test_an_animation_of_mini_sudoku_is_small(tmp_path: Path, rng: np.random.Generator) -> None:
    """Even if every cell is noise, every time."""
    arrays = boards(columns=21)
    arrays["image"] = rng.uniform(-1, 1, arrays["image"].shape).astype(np.float32)
    pictures.animation(tmp_path / "new.gif", moments(arrays), 0, "valid")
    with Image.open(tmp_path / "new.gif") as image:
        assert image.n_frames == 21
    assert (tmp_path / "new.gif").stat().st_size < 1e6


@pytest.mark.parametrize("sample", [-1, 1])
def test_a_sample_that_is_not_there_is_refused(tmp_path: Path, sample: int) -> None:
    with pytest.raises(ValueError, match=rf"sample must be in 0\.\.0, got {sample}"):
        pictures.animation(tmp_path / "new.gif", moments(boards()), sample, "valid")
    assert not list(tmp_path.iterdir())


# --- files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", [strip, grid, motion, lines])
class TestFile:
    def test_nothing_else_is_left(self, tmp_path: Path, function: Any) -> None:
        function(str(tmp_path / "new"))
        assert [path.name for path in tmp_path.iterdir()] == ["new"]
        with Image.open(tmp_path / "new") as image:
            assert image.format == ("GIF" if function is motion else "PNG")

    def test_an_existing_one_is_kept(self, tmp_path: Path, function: Any) -> None:
        path = tmp_path / "old.png"
        path.write_bytes(b"old")
        with pytest.raises(FileExistsError, match=r"old\.png exists"):
            function(path)
        assert path.read_bytes() == b"old"
        assert list(tmp_path.iterdir()) == [path]

    def test_a_failure_leaves_nothing(
        self, tmp_path: Path, function: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def savefig(self: Figure, file: Any, **_: Any) -> None:
            file.write(b"half")
            raise OSError("disk full")

        def save(self: Image.Image, path: Path, **_: Any) -> None:
            path.write_bytes(b"half")
            raise OSError("disk full")

        monkeypatch.setattr(Figure, "savefig", savefig)
        monkeypatch.setattr(Image.Image, "save", save)
        with pytest.raises(OSError, match="disk full"):
            function(tmp_path / "new.png")
        assert not list(tmp_path.iterdir())

    def test_a_missing_folder_is_named(self, tmp_path: Path, function: Any) -> None:
        with pytest.raises(FileNotFoundError, match="nowhere is not a folder"):
            function(tmp_path / "nowhere" / "new.png")


def test_texts_are_printed_as_they_are(tmp_path: Path, drawn: list[Figure]) -> None:
    name = r"$\alpha_{ [bold]x[/bold] $5 % \no"
    arrays = boards() | {"captions": [[name], [name]]}
    shown = moments(arrays)
    pictures.refinement(tmp_path / "a.png", shown, name, name)
    pictures.samples(tmp_path / "b.png", shown[0], 0, name, name, name)
    pictures.animation(tmp_path / "c.gif", shown, 0, name, name)
    bands = panel().bands["a"]
    lines = panel(label=name, bands={name: bands}, published={name: {0: 0.1}})
    rows = panel(label=name, bands={name: bands[:1]}, published={name: {0: 0.1}})
    curves.curves(tmp_path / "d.png", [lines], name, name)
    curves.curves(tmp_path / "e.png", [rows], name, name)
    for figure in drawn:
        texts = [text for text in figure.findobj(Text) if text.get_text()]
        assert not any(text.get_parse_math() for text in texts)
        assert sum(name in text.get_text() for text in texts) >= 2


@pytest.mark.parametrize("function", [strip, grid, motion, lines])
def test_the_users_settings_of_matplotlib_change_nothing(tmp_path: Path, function: Any) -> None:
    function(tmp_path / "plain")
    own = {"text.usetex": True, "font.size": 30, "axes.facecolor": "black", "savefig.dpi": 50}
    with matplotlib.rc_context(own):
        function(tmp_path / "own")
        assert matplotlib.rcParams["font.size"] == 30
    assert (tmp_path / "own").read_bytes() == (tmp_path / "plain").read_bytes()


DRAW = """
import os, pathlib, sys
from ipr_jax.tasks import counting_polygons
counting_polygons._digit(3, 20)
assert "matplotlib" not in sys.modules
from ipr_jax.studies import curves, pictures
import numpy as np
one = pictures.Samples(np.zeros((1, 8, 8, 1), np.float32), *np.ones((2, 1, 1, 1), bool))
one = one._replace(solved=np.ones(1, bool))
band = np.array([[0.1, 0.2, 0.3]])
pictures.refinement("a.png", {0: one}, "valid")
pictures.samples("b.png", one, 0, "valid")
pictures.animation("c.gif", {0: one}, 0, "valid")
curves.curves("d.png", [curves.Panel("valid", True, {"a": band}, {})], "One")
import matplotlib
print(sorted(path.name for path in pathlib.Path().iterdir()), os.environ["MPLBACKEND"])
print(matplotlib.get_backend())
"""


@pytest.mark.parametrize(("backend", "used"), [("not here", "agg"), ("svg", "svg")])
def test_every_picture_is_drawn_whatever_the_backend(
    tmp_path: Path, backend: str, used: str
) -> None:
    """And the backend stays that of the user's own figures."""
    environment = os.environ | {"MPLBACKEND": backend}
    words = [sys.executable, "-c", DRAW]
    ran = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert ran.stdout == f"['a.png', 'b.png', 'c.gif', 'd.png'] {backend}\n{used}\n"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image": np.zeros((2, 1, 32, 32), np.float32)}, r"image .*got float32 \[1, 32, 32\]"),
        ({"image": np.zeros((2, 1, 32, 32, 1))}, "image must be float32.*got float64"),
        ({"image": np.zeros((2, 1, 32, 32, 2), np.float32)}, r"1 or 3\].*32, 2\]"),
        ({"image": np.zeros((2, 0, 32, 32, 1), np.float32)}, r"got float32 \[0, 32"),
        ({"image": np.full((2, 1, 32, 32, 1), np.nan, np.float32)}, "finite, got nan"),
        ({"editable": np.ones((1, 5, 5), bool)}, r"square patches of the 32x32.*\[1, 5, 5\]"),
        ({"editable": np.ones((1, 4, 8), bool)}, r"square patches.*\[1, 4, 8\]"),
        ({"editable": np.ones((4, 4), bool)}, r"editable .*got \[4, 4\]"),
        ({"editable": np.ones((3, 4, 4), bool)}, r"editable must be bool \[1, 4, 4\].*\[3, 4"),
        ({"editable": np.ones((1, 4, 4))}, "editable must be bool.*got float64"),
        ({"violating": np.ones((2, 4, 4), bool)}, r"violating must be bool \[1, 4, 4\], got bool"),
        ({"solved": np.ones((2, 2), bool)}, r"solved must be bool \[1\], got bool \[2\]"),
        ({"captions": [["a", "b"], ["c"]]}, "captions must be 1 texts or None, got 2"),
    ],
)
@pytest.mark.parametrize("function", ["refinement", "samples", "animation"])
def test_boards_that_do_not_fit_are_refused(
    tmp_path: Path, function: str, changes: dict[str, Any], message: str
) -> None:
    given = moments(boards() | changes)
    path = tmp_path / "new"
    draw = {
        "refinement": partial(pictures.refinement, path, given),
        "samples": partial(pictures.samples, path, given[0], 0),
        "animation": partial(pictures.animation, path, given, 0),
    }
    with pytest.raises(ValueError, match=message):
        draw[function](headline="valid")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("draw", [strip, motion])
@pytest.mark.parametrize("iterations", [[], [3, 1], [-1, 3]])
def test_moments_must_be_in_order(tmp_path: Path, draw: Any, iterations: list[int]) -> None:
    given = moments(boards() | {"iterations": iterations})
    arguments = (0, "valid") if draw is motion else ("valid",)
    function = pictures.animation if draw is motion else pictures.refinement
    with pytest.raises(ValueError, match="iterations must be increasing numbers") as error:
        function(tmp_path / "new", given, *arguments)
    assert str(error.value).endswith(f"got {iterations}")
    assert not list(tmp_path.iterdir())


def test_an_iteration_below_0_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"numbers >= 0 \(at least one\), got \[-1\]"):
        pictures.samples(tmp_path / "new.png", moments(boards())[0], -1, "valid")
    assert not list(tmp_path.iterdir())


def test_moments_of_other_samples_are_refused(tmp_path: Path) -> None:
    first, second = moments(boards()).values()
    clue = np.zeros((1, 4, 4), bool)
    for other, message in (
        (moments(boards(channels=3))[0], r"images \[1, 32, 32, 1\].*got \[1, 32, 32, 3\]"),
        (second._replace(editable=clue), "the same clues, got .* and other clues"),
        (second._replace(captions=["a"]), "must have captions, or none, got them in 1 of 2"),
    ):
        with pytest.raises(ValueError, match=message):
            pictures.refinement(tmp_path / "new.png", {0: first, 1: other}, "valid")
    assert not list(tmp_path.iterdir())


# --- curves ---------------------------------------------------------------------------------------


def diamonds_of(axes: Axes) -> list[tuple[Any, ...]]:
    """The places of the hollow diamonds that are drawn."""
    shown = [line for line in axes.lines if line.get_marker() == "D"]
    assert all(line.get_markerfacecolor() == "none" for line in shown)
    return [place for line in shown for place in zip(*line.get_data(), strict=True)]


def test_curves_have_bands_and_the_papers_numbers_as_far_as_they_go(
    tmp_path: Path, drawn: list[Figure]
) -> None:
    shown = panel()
    curves.curves(tmp_path / "new.png", [shown], "Two arms")
    (axes,) = drawn[0].axes
    assert drawn[0].get_suptitle() == "Two arms"
    assert axes.get_xlabel() == "iteration (0 = first pass), bands: 95% intervals"
    assert axes.get_ylabel() == "valid (%)"
    assert legend_of(axes) == ["a: 50.0% to 75.0%", "b: 75.0% to 50.0%", "paper, its own task"]
    found = {str(line.get_label()): line for line in axes.lines}
    np.testing.assert_array_equal(
        found["a: 50.0% to 75.0%"].get_data(), [range(3), [0.5, 0.6, 0.75]]
    )
    assert diamonds_of(axes) == [(1, 0.7)]
    assert len(axes.collections) == 2
    for band, collection in zip(shown.bands.values(), axes.collections, strict=True):
        corners = {tuple(corner) for corner in collection.get_paths()[0].vertices}
        assert corners == {(m, band[m, end]) for m in range(3) for end in (0, 2)}


@pytest.mark.parametrize("up", [True, False])
def test_the_legend_does_not_lie_on_what_is_beyond(
    tmp_path: Path, drawn: list[Figure], up: bool
) -> None:
    """Where the arms leave one corner free, and the note is in it."""
    rising = np.linspace(0, 0.06, 21)[:, None] * [0.7, 1, 1.4] + 0.002
    flat = np.broadcast_to([0.002, 0.006, 0.017], (21, 3))
    bands = {"fresh noise and regions": rising, "initial noise": rising, "fixed regions": flat}
    if not up:
        bands = {name: 0.1 - band[:, ::-1] for name, band in bands.items()}
    published = {"fresh noise and regions": {0: 0.558 if up else 0.0}}
    curves.curves(tmp_path / "new.png", [panel(bands=bands, published=published)], "Three arms")
    (axes,) = drawn[0].axes
    (note,) = axes.texts
    legend = axes.get_legend()
    assert legend is not None
    assert not legend.get_window_extent().overlaps(note.get_window_extent())


@pytest.mark.parametrize("published", [{}, {"b": {3: 0.8}}, {"other": {0: 0.5}}])
def test_without_a_papers_number_there_is_no_mark_for_it(
    tmp_path: Path, drawn: list[Figure], published: dict[str, dict[int, float]]
) -> None:
    curves.curves(tmp_path / "new.png", [panel(published=published)], "Two arms")
    (axes,) = drawn[0].axes
    assert diamonds_of(axes) == []
    assert legend_of(axes) == ["a: 50.0% to 75.0%", "b: 75.0% to 50.0%"]


def test_arms_without_iterations_are_a_list(tmp_path: Path, drawn: list[Figure]) -> None:
    bands = {"a": np.array([[0.4, 0.5, 0.7]]), "b": np.array([[0.1, 0.2, 0.25]])}
    shown = panel(bands=bands, published={"b": {0: 0.3, 50: 0.8}})
    curves.curves(tmp_path / "new.png", [shown], "Two arms")
    (axes,) = drawn[0].axes
    assert axes.get_xlabel() == "valid (%), first pass, bars: 95% intervals"
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b"]
    top, bottom = axes.transData.transform([(0, 0), (0, 1)])[:, 1]
    assert top > bottom, "the first arm is on top"
    (bars,) = axes.collections
    segments = [path.vertices for path in bars.get_paths()]
    np.testing.assert_allclose(segments, [[(0.4, 0), (0.7, 0)], [(0.1, 1), (0.25, 1)]])
    assert axes.lines[0].get_xdata().tolist() == [0.5, 0.2]
    assert diamonds_of(axes) == [(0.3, 1)]
    assert legend_of(axes) == ["paper, its own task"]


def test_many_arms_of_some_cost_are_a_list(tmp_path: Path, drawn: list[Figure]) -> None:
    """Of one with iterations the last; of others both values, the cheaper one above."""
    names = [f"arm {number}" for number in range(9)]
    bands = dict.fromkeys(names, np.array([[0.4, 0.5, 0.7], [0.5, 0.6, 0.8]]))
    bands["arm 0"] = panel().bands["a"]
    spent = dict.fromkeys(names, np.array([20, 41.4])) | {"arm 0": np.array([10, 30, 50])}
    for some in (names, names[:8]):
        part = {name: bands[name] for name in some}
        shown = panel(bands=part, published={}, spent=spent)
        curves.curves(tmp_path / f"{len(some)}.png", [shown], "Many arms")
    many, few = (figure.axes[0] for figure in drawn)
    labels = [label.get_text() for label in many.get_yticklabels()]
    assert labels == ["arm 0: 50", *(f"{name}: 20, 41" for name in names[1:])]
    assert many.get_xlabel() == "valid (%)\nbars: 95% intervals, grey: arm 0"
    points = [line.get_xydata()[0].tolist() for line in many.lines if line.get_marker() == "o"]
    want = [[0.75, 0]]
    want += [[x, row + y] for row in range(1, 9) for x, y in ((0.5, -0.15), (0.6, 0.15))]
    np.testing.assert_allclose(points, want)
    (behind,) = many.patches
    np.testing.assert_allclose((behind.get_x(), behind.get_x() + behind.get_width()), (0.6, 0.8))
    assert few.get_xlabel() == "network evaluations per sample, bands: 95% intervals"


def test_a_papers_number_beyond_the_axes_is_named_at_the_edge(
    tmp_path: Path, drawn: list[Figure]
) -> None:
    """And does not stretch them."""
    far = {"a": {0: 0.05, 1: 0.55}, "b": {0: 0.05, 2: 0.95}}
    alone = {name: band[:1] for name, band in panel().bands.items()}
    for shown in (panel(published={}), panel(published=far)):
        curves.curves(tmp_path / f"curves{len(shown.published)}.png", [shown], "Two arms")
    listed = panel(bands=alone, published=far)
    for shown in (panel(bands=alone, published={}), listed):
        curves.curves(tmp_path / f"list{len(shown.published)}.png", [shown], "Two arms")
    plain, found, plain_list, rows = (figure.axes[0] for figure in drawn)
    for before, after in ((plain, found), (plain_list, rows)):
        assert after.get_xlim() == before.get_xlim()
        assert after.get_ylim() == before.get_ylim()
        assert legend_of(after)[-1] == "paper, its own task"
    assert [(text.get_text(), text.xy) for text in found.texts] == [
        ("\u2193\u25c7 a: 5.0%\n\u2193\u25c7 b: 5.0%", (0, found.get_ylim()[0])),
        ("\u2191\u25c7 b: 95.0%", (2, found.get_ylim()[1])),
    ]
    assert diamonds_of(found) == [(1, 0.55)]
    left = rows.get_xlim()[0]
    assert [(text.get_text(), text.xy) for text in rows.texts] == [
        ("\u2190\u25c7 a: 5.0%", (left, 0)),
        ("\u2190\u25c7 b: 5.0%", (left, 1)),
    ]


@pytest.mark.parametrize("arms", [2, 3, 5])
def test_equal_curves_are_all_seen(tmp_path: Path, drawn: list[Figure], arms: int) -> None:
    """So are equal diamonds, of different sizes."""
    band = np.linspace(0.2, 0.8, 31)[:, None] + [-0.1, 0, 0.1]
    names = [f"arm {number}" for number in range(arms)]
    published = {name: {5: 0.5} for name in names}
    shown = panel(bands=dict.fromkeys(names, band), published=published)
    curves.curves(tmp_path / "new.png", [shown], "Equal")
    curves.curves(tmp_path / "one.png", [panel(bands={"one": band}, published={})], "Equal")
    (left, bottom), (right, top) = drawn[0].axes[0].transData.transform([(6, 0), (26, 1)])

    def seen(path: Path, colour: str) -> int:
        picture = read(path)[::-1][int(bottom) : int(top), int(left) : int(right)]
        return pixels_of([round(255 * part) for part in to_rgb(colour)], picture).sum()

    whole = seen(tmp_path / "one.png", "C0")
    for number in range(arms):
        assert seen(tmp_path / "new.png", f"C{number}") > whole / arms / 2
    diamonds = [line for line in drawn[0].axes[0].lines if line.get_marker() == "D"]
    assert len({line.get_markersize() for line in diamonds[:arms]}) == arms


def test_without_an_interval_there_is_no_band(tmp_path: Path, drawn: list[Figure]) -> None:
    none = np.nan
    band = np.array([[1, 2, 3], [none, 1, none], [none, 0, none]])
    shown = panel(label="violations", share=False, bands={"a": band, "b": band[1:]}, published={})
    curves.curves(tmp_path / "new.png", [shown], "Two arms")
    (axes,) = drawn[0].axes
    assert legend_of(axes) == ["a: 2 to 0", "b: 1 to 0"]
    assert axes.lines[0].get_ydata().tolist() == [2, 1, 0]
    assert [len(each.get_paths()) for each in axes.collections] == [1, 0]


def test_several_panels_stand_side_by_side(tmp_path: Path, drawn: list[Figure]) -> None:
    mean = panel(label="imbalance", share=False, bands={"a": np.array([[8.0, 9, 10], [1, 2, 3.5]])})
    curves.curves(tmp_path / "one.png", [panel()], "Two arms")
    curves.curves(tmp_path / "new.png", [panel(), mean], "Two arms")
    left, right = drawn[1].axes
    assert left.get_position().x1 < right.get_position().x0
    assert left.get_position().y0 == pytest.approx(right.get_position().y0)
    assert read(tmp_path / "new.png").shape[1] > read(tmp_path / "one.png").shape[1]
    assert (left.get_ylabel(), right.get_ylabel()) == ("valid (%)", "imbalance")
    assert legend_of(right) == ["a: 9 to 2"]


@pytest.mark.parametrize(
    ("panels", "message"),
    [
        ([], r"a panel and an arm in every panel, got \[\]"),
        ([panel(), panel(bands={})], r"an arm in every panel, got \[2, 0\]"),
        ([panel(bands={"a": np.ones(3)})], r"a must be \[N, 3\], got \(3,\)"),
        ([panel(bands={"a": np.ones((2, 2))})], r"a must be \[N, 3\], got \(2, 2\)"),
        ([panel(bands={"a": np.ones((0, 3))})], r"a must be \[N, 3\], got \(0, 3\)"),
        ([panel(bands={"a": np.array([[0.6, 0.5, 0.7]])})], "a: 0 <= low <= value <= high <= 1"),
        ([panel(bands={"a": np.array([[0.4, 0.5, 0.3]])})], "low <= value <= high"),
        (
            [panel(bands={"a": np.array([[0.4, 0.5, 1.1]])})],
            r"must hold, got \[\[0.4, 0.5, 1.1",
        ),
        ([panel(bands={"a": np.array([[-0.1, 0.5, 1]])})], "must hold"),
        ([panel(bands={"a": np.array([[0.1, np.nan, 1]])})], "must hold"),
        ([panel(bands={"a": np.array([[0.1, 0.5, np.nan]])})], "must hold"),
        ([panel(bands={"a": np.array([[np.nan, 1.5, np.nan]])})], "must hold"),
        ([panel(share=False, bands={"a": np.array([[0, 1, np.inf]])})], "a: low <= value <= high"),
        ([panel(share=False, bands={"a": np.array([[2.0, 1, 3]])})], "a: low <= value <= high"),
    ],
)
def test_curves_that_do_not_fit_are_refused(
    tmp_path: Path, panels: list[curves.Panel], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        curves.curves(tmp_path / "new.png", panels, "None")
    assert not list(tmp_path.iterdir())
