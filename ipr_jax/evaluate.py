"""Refine many samples of a task and score them after every iteration."""

import dataclasses
import time
from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np
from scipy import stats

from ipr_jax import check, selection
from ipr_jax.keys import sample_keys
from ipr_jax.refine import iterate
from ipr_jax.regenerate import FIRST_PASS, REFINEMENT, Sampling, generate
from ipr_jax.selection import Noise, Selection
from ipr_jax.tasks.base import Batch, Task
from ipr_jax.types import Denoiser


@dataclasses.dataclass(frozen=True, kw_only=True)
class Refinement:
    """A whole experiment: a first pass, then iterations.

    Attributes:
        iterations: after the first pass, at least 0.
        ratio: the share of the editable patches that an iteration regenerates, in (0, 1].
        first: how the first pass samples.
        later: how the iterations sample.
        select: which patches an iteration regenerates.
        noise: from which noise.

    Raises:
        ValueError: a value is out of range, naming it and the range.
    """

    iterations: int = 20
    ratio: float = 0.25
    first: Sampling = FIRST_PASS
    later: Sampling = REFINEMENT
    select: Selection = selection.fresh_regions
    noise: Noise = selection.fresh_noise

    def __post_init__(self) -> None:
        if self.iterations < 0:
            raise ValueError(f"iterations must be at least 0, got {self.iterations}")
        selection.region_sizes(1, self.ratio)


class Progress(NamedTuple):
    """The samples after an iteration; 0 is the first pass. N samples.

    Attributes:
        iteration: how many are done.
        image: float32 [N, H, W, C].
        valid: bool [N].
        violations: int32 [N].
        finite: bool [N]; False = not a number somewhere, to be left out of every rate.
        nfe: int64 [N], network evaluations so far, that each sample's schedules took.
        seconds: since the start, compilation included.
        iteration_seconds: of this iteration.
    """

    iteration: int
    image: np.ndarray
    valid: np.ndarray
    violations: np.ndarray
    finite: np.ndarray
    nfe: np.ndarray
    seconds: float
    iteration_seconds: float


def evaluate(
    task: Task,
    denoise: Denoiser,
    batch: Batch,
    experiment: Refinement,
    key: jax.Array,
    *,
    chunk: int = 64,
) -> Iterator[Progress]:
    """Complete a batch of puzzles, refine them, and score them after every iteration.

    Args:
        task: whose scores.
        denoise: the model.
        batch: N images with their clues.
        experiment: what to do.
        key: of the run; sample i uses the i-th of ``sample_keys(key, N)``.
        chunk: samples per compiled call, at least 1; no result depends on it.

    Yields:
        The progress after the first pass and after every iteration.

    Raises:
        ValueError: the batch is not one of images and masks, a clue or ``chunk`` is out of range.
    """
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    number = len(batch.image)
    keys = sample_keys(key, number)
    check.batch(keys, batch.image, batch.editable)
    check.clues(batch.image, batch.editable)
    chunk = min(chunk, number)
    # The last chunk is filled up with copies of sample 0, whose results are dropped.
    rows = np.arange(-(-number // chunk) * chunk)
    chunks = np.where(rows < number, rows, 0).reshape(-1, chunk)
    images: list[jax.Array | np.ndarray] = [batch.image[rows] for rows in chunks]
    num_patches = batch.editable[0].size
    sizes = selection.region_sizes(num_patches, experiment.ratio)
    settings = experiment.later.settings(num_patches)
    advance = jax.jit(iterate, static_argnames=("order", "select", "noise"))
    score = jax.jit(task.score)
    nfe = np.zeros(number, np.int64)
    finite = np.ones(number, bool)
    start = time.perf_counter()
    for iteration in range(experiment.iterations + 1):
        began = time.perf_counter()
        parts: list[tuple[np.ndarray, ...]] = []
        for index, rows in enumerate(chunks):
            if iteration == 0:
                sampled = generate(
                    denoise, keys[rows], images[index], batch.editable[rows], experiment.first
                )
            else:
                sampled = advance(
                    check.as_pytree(denoise),
                    keys[rows],
                    images[index],
                    batch.editable[rows],
                    iteration,
                    sizes,
                    settings,
                    order=experiment.later.order,
                    select=experiment.select,
                    noise=experiment.noise,
                )
            images[index] = sampled.image
            scores = score(sampled.image)
            parts.append(jax.device_get((*sampled, scores["valid"], scores["violations"])))
        image, cost, ok, valid, violations = (
            np.concatenate(part)[:number] for part in zip(*parts, strict=True)
        )
        nfe, finite = nfe + cost, finite & ok
        now = time.perf_counter()
        yield Progress(
            iteration, image, valid & finite, violations, finite, nfe, now - start, now - began
        )


def summarise(progress: Progress) -> dict[str, float | int]:
    """One line of metrics: rates and means over the finite samples, with 95% intervals.

    Returns:
        iteration, samples, not_finite, valid, valid_rate with valid_low and valid_high (Wilson),
        violations with violations_low and violations_high (normal), nfe (mean per sample, so far),
        seconds, samples_per_second (of this iteration). Without a finite sample there are no rate
        and no mean, with a single one the violations have no interval.
    """
    finite = progress.finite
    counted, valid = int(finite.sum()), int(progress.valid.sum())
    line: dict[str, float | int] = {
        "iteration": progress.iteration,
        "samples": len(finite),
        "not_finite": len(finite) - counted,
        "valid": valid,
    }
    if counted:
        low, high = stats.binomtest(valid, counted).proportion_ci(0.95, method="wilson")
        violations = progress.violations[finite]
        line |= {
            "valid_rate": valid / counted,
            "valid_low": float(low),
            "valid_high": float(high),
            "violations": float(violations.mean()),
        }
        if counted > 1:
            error = 1.96 * float(violations.std(ddof=1)) / counted**0.5
            line["violations_low"] = line["violations"] - error
            line["violations_high"] = line["violations"] + error
    return line | {
        "nfe": float(progress.nfe.mean()),
        "seconds": progress.seconds,
        "samples_per_second": len(finite) / progress.iteration_seconds,
    }
