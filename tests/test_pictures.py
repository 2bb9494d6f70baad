from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from ipr_jax import pictures

CELL = 50
BOARDS_FROM = 230
"""Rows of the picture above this one are text."""


def boards(columns: int = 2, rows: int = 1, channels: int = 1) -> dict[str, Any]:
    """Boards of 4x4 cells with a bright stroke on a dark ground, no clue, none valid."""
    stroke = np.full((8, 8, channels), -1, np.float32)
    stroke[2:6, 3:5] = 1
    return {
        "images": np.tile(stroke, (columns, rows, 4, 4, 1)),
        "editable": np.ones((rows, 4, 4), bool),
        "violating": np.zeros((columns, rows, 4, 4), bool),
        "valid": np.zeros((columns, rows), bool),
        "iterations": list(range(columns)),
    }


def rates() -> dict[str, Any]:
    rate = np.array([0.5, 0.75, 0.8])
    return {
        "iterations": [0, 1, 5],
        "rate": rate,
        "low": rate - 0.1,
        "high": rate + 0.1,
        "label": "valid boards",
    }


def read(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)[BOARDS_FROM:]


def changed(before: np.ndarray, after: np.ndarray) -> tuple[np.ndarray, slice, slice]:
    """Say which pixels differ, and the rows and columns of the picture that hold them."""
    where = (before != after).any(axis=-1)
    y, x = np.nonzero(where)
    return where, slice(y.min(), y.max() + 1), slice(x.min(), x.max() + 1)


@pytest.fixture
def draw(tmp_path: Path) -> Any:
    def draw(**arrays: Any) -> np.ndarray:
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.png"
        pictures.refinement(path, **arrays)
        return read(path)

    return draw


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are saved from now on."""
    figures = []
    savefig = Figure.savefig

    def save(self: Figure, *args: Any, **kwargs: Any) -> None:
        figures.append(self)
        savefig(self, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", save)
    return figures


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
    arrays["valid"][0, 0] = True
    framed = draw(**arrays)
    where, y, x = changed(plain, framed)
    red, green, blue = framed[where].T
    assert (green > red + 80).all()
    assert (green > blue + 50).all()
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
        red, green, blue = marked[half][where].T
        assert (blue > green + 50).all()
        assert (blue > red + 100).all()
        inside = (slice(y.start + 4, y.stop - 4), slice(x.start + 4, x.stop - 4))
        assert (marked[half][inside] == plain[half][inside]).all()


def test_a_violating_clue_shows_both(draw: Any) -> None:
    arrays = boards(columns=1)
    arrays["editable"][0, 0, 0] = False
    clue = draw(**arrays)
    arrays["violating"][0, 0, 0, 0] = True
    where, *_ = changed(clue, draw(**arrays))
    ring = (clue[..., 2] > clue[..., 0] + 100) & (clue[..., 2] > clue[..., 1] + 50)
    assert where.sum() == 40 * 40
    assert ring.any()
    assert not (where & ring).any()


def test_grayscale_is_dark_on_light_and_colour_as_it_is(draw: Any) -> None:
    gray, colour = boards(columns=1), boards(columns=1, channels=3)
    assert np.median(draw(**gray)) == 255
    colour["images"][:] = [1, -1, 0]
    assert (draw(**colour) == [255, 0, 128]).all(axis=-1).sum() == 160 * 160


def test_pixels_beyond_the_range_are_clipped(draw: Any) -> None:
    arrays = boards()
    far = boards()
    far["images"] *= 3
    assert (draw(**arrays) == draw(**far)).all()


def test_lines_between_boxes_are_darker_than_between_cells(draw: Any) -> None:
    arrays = boards(columns=1)
    arrays["images"][:] = -1
    down = draw(**arrays)[:, 540 - CELL // 2].mean(axis=-1)  # through the middle of cells
    outline, box, cells = 2 * 2, 2, 3 * 2
    assert (down < 100).sum() == outline + box
    assert ((down > 200) & (down < 230)).sum() == cells


def test_the_texts_tell_what_happened(draw: Any, drawn: list[Figure]) -> None:
    arrays = boards(columns=3, rows=4)
    arrays["valid"][0, :1] = arrays["valid"][1, :2] = arrays["valid"][2] = True
    draw(**arrays | {"iterations": [0, 1, 20]})
    texts = [text.get_text() for text in drawn[0].texts]
    assert texts == [
        "Iterative partial refinement",
        "1 of 4 boards valid after the first pass, 4 of 4 after 20 iterations",
        *("first pass", "1 of 4 valid"),
        *("1 iteration", "2 of 4 valid"),
        *("20 iterations", "4 of 4 valid"),
    ]
    legend = [text.get_text() for text in drawn[0].legends[0].get_texts()]
    assert legend == ["clue", "violates a rule", "valid board"]


def test_the_curve_names_its_axes_band_and_start(tmp_path: Path, drawn: list[Figure]) -> None:
    pictures.curve(tmp_path / "curve.png", **rates())
    (axes,) = drawn[0].axes
    assert axes.get_title() == "Valid boards\n50.0% after the first pass, 80.0% after 5 iterations"
    assert axes.get_xlabel() == "refinement (iterations after the first pass)"
    assert axes.get_ylabel() == "valid boards (%)"
    legend = [text.get_text() for text in axes.get_legend().get_texts()]
    assert legend == ["valid boards", "first pass", "95% band"]
    assert [path.name for path in tmp_path.iterdir()] == ["curve.png"]


@pytest.mark.parametrize(
    ("function", "arguments"), [(pictures.refinement, boards()), (pictures.curve, rates())]
)
class TestFile:
    def test_nothing_else_is_left(self, tmp_path: Path, function: Any, arguments: Any) -> None:
        function(str(tmp_path / "new.png"), **arguments)
        assert [path.name for path in tmp_path.iterdir()] == ["new.png"]

    def test_an_existing_one_is_kept(self, tmp_path: Path, function: Any, arguments: Any) -> None:
        path = tmp_path / "old.png"
        path.write_bytes(b"old")
        with pytest.raises(FileExistsError, match=r"old\.png exists"):
            function(path, **arguments)
        assert path.read_bytes() == b"old"
        assert list(tmp_path.iterdir()) == [path]

    def test_a_failure_leaves_nothing(
        self, tmp_path: Path, function: Any, arguments: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def savefig(self: Figure, file: Any, **_: Any) -> None:
            file.write(b"half")
            raise OSError("disk full")

        monkeypatch.setattr(Figure, "savefig", savefig)
        with pytest.raises(OSError, match="disk full"):
            function(tmp_path / "new.png", **arguments)
        assert not list(tmp_path.iterdir())

    def test_a_missing_folder_is_named(self, tmp_path: Path, function: Any, arguments: Any) -> None:
        with pytest.raises(FileNotFoundError, match="nowhere is not a folder"):
            function(tmp_path / "nowhere" / "new.png", **arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": np.zeros((2, 1, 32, 32), np.float32)}, r"images .*got float32 \[2, 1, 32, 32"),
        ({"images": np.zeros((2, 1, 32, 32, 1))}, "images must be float32.*got float64"),
        ({"images": np.zeros((2, 1, 32, 32, 2), np.float32)}, r"1 or 3\].*32, 2\]"),
        ({"images": np.zeros((0, 1, 32, 32, 1), np.float32)}, r"got float32 \[0, 1"),
        ({"images": np.full((2, 1, 32, 32, 1), np.nan, np.float32)}, "finite, got nan"),
        ({"editable": np.ones((1, 5, 5), bool)}, r"square patches of the 32x32.*\[1, 5, 5\]"),
        ({"editable": np.ones((1, 4, 8), bool)}, r"square patches.*\[1, 4, 8\]"),
        ({"editable": np.ones((4, 4), bool)}, r"editable .*got \[4, 4\]"),
        ({"editable": np.ones((3, 4, 4), bool)}, r"editable must be bool \[1, 4, 4\].*\[3, 4"),
        ({"editable": np.ones((1, 4, 4))}, "editable must be bool.*got float64"),
        ({"violating": np.ones((1, 4, 4), bool)}, r"violating must be bool \[2, 1, 4, 4\]"),
        ({"valid": np.ones((1, 2), bool)}, r"valid must be bool \[2, 1\], got bool \[1, 2\]"),
        ({"iterations": [0]}, r"iterations must be 2 increasing.*got \[0\]"),
        ({"iterations": [3, 3]}, r"got \[3, 3\]"),
        ({"iterations": [-1, 3]}, r"got \[-1, 3\]"),
    ],
)
def test_boards_that_do_not_fit_are_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        pictures.refinement(tmp_path / "new.png", **boards() | changes)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rate": np.float64(0.5)}, r"rate must be \[N\]"),
        ({"low": np.zeros(2)}, r"low must be \[3\], got \[2\]"),
        ({"high": np.ones((3, 1))}, r"high must be \[3\], got \[3, 1\]"),
        ({"low": np.full(3, 0.6)}, "low <= rate <= high"),
        ({"high": np.full(3, 1.1)}, "high <= 1"),
        ({"rate": np.full(3, np.nan)}, "must hold"),
        ({"iterations": [0, 2, 1]}, r"3 increasing numbers >= 0.*got \[0, 2, 1\]"),
    ],
)
def test_curves_that_do_not_fit_are_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        pictures.curve(tmp_path / "new.png", **rates() | changes)
    assert not list(tmp_path.iterdir())


def test_several_curves_with_the_papers_numbers(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(pictures, "_write", lambda figure, path: drawn.append(figure))
    band = np.array([[0.4, 0.5, 0.6], [0.5, 0.6, 0.7]])
    bands = {"a": (range(2), band), "b": (range(2), band[::-1]), "once": (range(1), band[:1])}
    pictures.curves(tmp_path / "x.png", bands, {"b": {1: 0.75, 50: 0.8}}, "valid", "Both")
    axes = drawn[0].axes[0]
    assert axes.get_title() == "Both"
    assert axes.get_ylabel() == "valid (%)"
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == [
        "a: 50.0% to 60.0%",
        "b: 60.0% to 50.0%",
        "once: 50.0%",
        "paper, its own task",
    ]
    lines = {line.get_label(): line for line in axes.lines}
    np.testing.assert_array_equal(lines["a: 50.0% to 60.0%"].get_ydata(), [0.5, 0.6])
    diamonds = [line for line in axes.lines if line.get_marker() == "D" and len(line.get_xdata())]
    assert [(*line.get_xdata(), *line.get_ydata()) for line in diamonds] == [(1, 0.75)]
    assert len(axes.collections) == 4  # a band each, and the bar of a single moment


@pytest.mark.parametrize(
    ("bands", "message"),
    [
        ({}, "there must be an arm, got 0"),
        ({"a": ([0, 0], np.ones((2, 3)))}, "iterations must be 2 increasing numbers"),
    ],
)
def test_impossible_curves_are_refused(tmp_path, bands, message):
    with pytest.raises(ValueError, match=message):
        pictures.curves(tmp_path / "x.png", bands, {}, "valid", "None")
    assert not list(tmp_path.iterdir())
