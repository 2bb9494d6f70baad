"""What a task is: data and scores, as plain functions."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Split = Literal["train", "test"]
SPLITS: tuple[Split, Split] = ("train", "test")


class Batch(NamedTuple):
    """Images of a task, with their clues and what they show.

    Attributes:
        image: float32 [B, H, W, C] in [-1, 1], clues and the rest.
        editable: bool [B, h, w]; False = a clue.
        label: int [B, ...], of the task's own kind; for Sudoku the digits of the board.
    """

    image: np.ndarray
    editable: np.ndarray
    label: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Task:
    """A benchmark.

    Attributes:
        name: as in ``TASKS``; also that of its recipe, if it has one.
        image_shape: (H, W, C).
        patch_size: pixels per side of a patch; h = H / patch_size, w = W / patch_size.
        training_batch: ``(seed, indices [B]) -> Batch`` of the training split.
        test_batch: ``(seed, indices [B]) -> Batch`` of the test split, clues as the benchmark gives
            them. Both are deterministic in (seed, index).
        score: jittable, ``images [B, H, W, C] -> scores by name, each [B]``.
        rates: names of the scores that are bool, reported as a share of the samples; the first is
            the headline.
        dependencies: bool or float [P, P] >= 0, how much each patch (column) depends on each, for
            ``order.graph_order``.
        means: names of the others that are reported, as means, and the most that each can be; the
            least is 0.
        read: jittable, ``images -> int [B, ...]``, what the scores read in them, such as the digits
            of the cells; None where they read nothing.
        violating: jittable, ``images -> bool [B, h, w]``, the patches that break a rule; None where
            no patch does by itself.
        units: int [U, n], patches (in reading order) of which no two may show the same of what
            ``read`` finds, 1 to n; None where there are no such rules.
        parse_puzzle: ``(text, seed) -> Batch`` of one image, a user's own puzzle; ``label`` holds 0
            where it is empty. A text that is none, or clues that contradict each other, are a
            ``ValueError``. None where there are no puzzles, and so are the next two.
        format_sample: ``(image [H, W, C], label) -> str``, what a sample shows, for a terminal.
        explain: ``(image [H, W, C], label) -> str``, which patches break a rule and whether clues
            have changed, parts of a sentence.
        describe: ``scores by name, each [B] -> B texts``, what was found in each sample, in the few
            words that fit below it; from all that ``score`` gives, on the host. None where the
            image says it.
        drawing: ``seed -> draw``, training batches made by the device that trains: ``draw`` is a
            pytree and jittable, ``(key, batch, distortion, most_hidden) -> Batch`` as
            ``drawing.draw`` without its tables. None where only the host makes them.
        corrupted: ``K -> Task``, this task tested on solved samples of which K pairs of patches
            were swapped, everything editable; None where there are no clues.
    """

    name: str
    image_shape: tuple[int, int, int]
    patch_size: int
    training_batch: Callable[[int, np.ndarray], Batch]
    test_batch: Callable[[int, np.ndarray], Batch]
    score: Callable[[jax.Array], dict[str, jax.Array]]
    rates: tuple[str, ...]
    dependencies: np.ndarray
    means: Mapping[str, float] = field(default_factory=dict)
    read: Callable[[jax.Array], jax.Array] | None = None
    violating: Callable[[jax.Array], jax.Array] | None = None
    units: np.ndarray | None = None
    parse_puzzle: Callable[[str, int], Batch] | None = None
    format_sample: Callable[[np.ndarray, np.ndarray], str] | None = None
    explain: Callable[[np.ndarray, np.ndarray], str] | None = None
    describe: Callable[[Mapping[str, np.ndarray]], list[str]] | None = None
    drawing: Callable[[int], Callable[..., Batch]] | None = None
    corrupted: "Callable[[int], Task] | None" = None

    @property
    def headline(self) -> str:
        """The score that says whether a sample solves the task."""
        return self.rates[0]

    @property
    def grid(self) -> tuple[int, int]:
        """(h, w), the patch grid."""
        height, width, _ = self.image_shape
        return height // self.patch_size, width // self.patch_size

    def check_scores(self) -> None:
        """Refuse a task whose ``score`` does not give what is to be reported; nothing is computed.

        Raises:
            ValueError: names what is missing, or of another kind, and what there is.
        """
        image = jax.ShapeDtypeStruct((1, *self.image_shape), jnp.float32)
        found = jax.eval_shape(self.score, image)
        for kind, names in (("rates", self.rates), ("means", self.means)):
            is_bool = kind == "rates"
            valid = [name for name, each in found.items() if (each.dtype == bool) == is_bool]
            for name in names:
                if name not in valid:
                    raise ValueError(
                        f"{kind} of the task {self.name} must be scores that are "
                        f"{'bool' if is_bool else 'numbers'}, {', '.join(valid) or 'none'}; "
                        f"got {name!r}"
                    )


def generators(
    seed: int, split: Split, indices: np.ndarray, stream: int = 0
) -> Iterator[np.random.Generator]:
    """The random numbers of samples, each a function of (seed, split, its index, stream) alone.

    Args:
        seed: int >= 0.
        split: "train" or "test".
        indices: int [B], each >= 0.
        stream: int >= 0, which of a sample's independent draws.

    Raises:
        ValueError: an argument is out of its range.
    """
    indices = np.asarray(indices)
    if seed < 0 or indices.ndim != 1 or (indices < 0).any():
        raise ValueError(
            f"seed must be >= 0 and indices a flat list of numbers >= 0, got {seed}, {indices}"
        )
    if split not in SPLITS:
        raise ValueError(f"split must be 'train' or 'test', got {split!r}")
    which = (stream,) if stream else ()
    key = (seed, SPLITS.index(split))
    return (np.random.default_rng((*key, index, *which)) for index in indices.tolist())
