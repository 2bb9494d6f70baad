"""Draw the figures of docs/concepts.md from the functions of the library: python docs/figures.py.

docs/figures/report.png is a screenshot of the page that ``ipr-jax refine`` writes.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

import ipr_jax
from ipr_jax.core import patches
from ipr_jax.methods import selection
from ipr_jax.sampling import renoise, schedule
from ipr_jax.tasks import get_task

OUT = Path(__file__).parent / "figures"
TASK = get_task("mini-sudoku")
SIDE = 8  # pixels of a cell
BLUE, ORANGE, RED = "#337ae0", "#ff9400", "#db141a"


def show(axes: Axes, image: np.ndarray, title: str) -> None:
    """An image [32, 32, 1] as ink on paper, with the lines of its cells."""
    axes.imshow(image[..., 0], cmap="gray_r", vmin=-1, vmax=1)
    axes.set_title(title, fontsize=10)
    axes.set_xticks(np.arange(0, 33, SIDE) - 0.5, labels=[])
    axes.set_yticks(np.arange(0, 33, SIDE) - 0.5, labels=[])
    axes.tick_params(length=0)
    axes.grid(color="#999999", linewidth=0.5)


def frame(axes: Axes, cells: np.ndarray, colour: str, style: str = "-") -> None:
    """Outline the cells of a mask bool [4, 4]."""
    for row, column in np.argwhere(cells):
        corner = SIDE * column + 0.1, SIDE * row + 0.1
        looks = {"fill": False, "edgecolor": colour, "linewidth": 2, "linestyle": style}
        axes.add_patch(Rectangle(corner, SIDE - 1.2, SIDE - 1.2, **looks))


def levels() -> Figure:
    """One solved board at three patterns of noise levels."""
    batch = TASK.test_batch(0, np.arange(1))
    noise = jax.random.normal(jax.random.key(1), batch.image.shape)
    clue = ~batch.editable[0]
    middle = np.where(clue, 0, np.repeat([[0.0], [0.0], [0.5], [1.0]], 4, axis=1))
    region = np.zeros((4, 4))
    region[[0, 1, 3], [2, 0, 3]] = 1
    figure = Figure(figsize=(9, 3.7), layout="constrained")
    for axes, (title, pattern) in zip(
        figure.subplots(1, 3),
        {
            "first pass, at its start": np.where(clue, 0, 1.0),
            "row by row, half way": middle,
            "refinement: some cells again": np.where(clue, 0, region),
        }.items(),
        strict=True,
    ):
        t = patches.expand(jnp.asarray(pattern, jnp.float32)[None], SIDE)
        show(axes, np.asarray((1 - t) * batch.image + t * noise)[0], title)
        frame(axes, clue, BLUE)
        for (row, column), level in np.ndenumerate(pattern):
            place = SIDE * column + 7, SIDE * row + 6.5
            box = {"facecolor": "white", "edgecolor": "none", "pad": 0.8}
            axes.text(*place, f"{level:g}", ha="right", fontsize=7, color=RED, bbox=box)
    figure.supxlabel("the number is the noise level of the cell; blue: given", fontsize=9)
    return figure


def passes() -> Figure:
    """The noise levels of 16 patches during a pass, for three overlaps."""
    figure = Figure(figsize=(9, 3), layout="constrained")
    columns = figure.subplots(1, 3, sharey=True)
    for axes, overlap in zip(columns, (0.0, 0.8, 1.0), strict=True):
        plan = schedule.make_plan(16, 10, overlap)
        known = schedule.plan_pass(plan, jnp.ones((1, 4, 4), bool))
        raster = jnp.arange(16.0).reshape(1, 4, 4)
        start = jnp.full((1, 4, 4), schedule.WAITING, jnp.int32)
        rows = []
        for step in range(int(plan.num_steps[16])):
            start = schedule.start_patches(known, start, step, raster)
            rows.append(np.asarray(schedule.levels(known, start, step)).reshape(16))
        picture = axes.imshow(np.array(rows).T, aspect="auto", cmap="magma_r", vmin=0, vmax=1)
        axes.set_title(f"overlap {overlap:g}: {len(rows)} evaluations", fontsize=10)
        axes.set_xlabel("evaluation")
    columns[0].set_ylabel("patch")
    figure.colorbar(picture, ax=columns, label="noise level")
    return figure


def iteration() -> Figure:
    """The first board that an iteration makes valid: before, its region as noise, and after."""
    number = 32
    batch, model = TASK.test_batch(0, np.arange(number)), ipr_jax.load(TASK.name)
    keys = ipr_jax.sample_keys(jax.random.key(0), number)
    first = ipr_jax.generate(model, keys, batch.image, batch.editable)
    after = ipr_jax.refine(model, keys, first.image, batch.editable, iterations=1)
    valid = [np.asarray(TASK.score(image)["valid"]) for image in (first.image, after.image)]
    sample = int(np.argmax(~valid[0] & valid[1]))
    assert TASK.violating is not None
    before, result = np.asarray(first.image[sample]), np.asarray(after.image[sample])
    differs = (before != result).reshape(4, SIDE, 4, SIDE).any(axis=(1, 3))
    noise = selection.fresh_noise(keys, 1, TASK.image_shape)[sample]
    hidden = renoise(before[None], jnp.asarray(differs)[None], noise[None])
    figure = Figure(figsize=(9, 3.7), layout="constrained")
    looks = {"before": before, "its region, as noise": np.asarray(hidden)[0], "after": result}
    for axes, (title, image) in zip(figure.subplots(1, 3), looks.items(), strict=True):
        show(axes, image, title)
        frame(axes, ~batch.editable[sample], BLUE)
        frame(axes, differs, ORANGE, "--")
        if image is not looks["its region, as noise"]:
            for row, column in np.argwhere(np.asarray(TASK.violating(image[None]))[0]):
                corner = SIDE * column - 0.5, SIDE * row - 0.5
                axes.add_patch(Rectangle(corner, SIDE, SIDE, color=RED, alpha=0.3, linewidth=0))
    given = "blue: given" if not batch.editable[sample].all() else "nothing is given"
    told = f"test board {sample}; {given}, orange: regenerated, red: in conflict"
    figure.supxlabel(told, fontsize=9)
    return figure


if __name__ == "__main__":
    OUT.mkdir(exist_ok=True)
    for name, draw in (("levels", levels), ("schedule", passes), ("iteration", iteration)):
        draw().savefig(OUT / f"{name}.png", dpi=100)
        print(f"written: {OUT / name}.png")
