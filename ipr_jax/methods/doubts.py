"""What the network doubts about finished samples: every patch predicted from others.

The patches of a sample, clues too, are dealt at random into a few parts. Each part in turn is
hidden behind noise and predicted from the rest, which takes one evaluation; the doubt about a patch
is by how much, mean square, the prediction differs from what stands there. A patch that the others
contradict is doubted, and so is a clue that the model misread.

A prediction is an average of what a patch may look like, so that a patch also differs from it by
its texture. Another round asks about the predictions instead of the sample: what every patch is
predicted to be, and by how much that changes once the others are replaced by what is predicted of
them. In a sample that holds together, it does not.
"""

import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ipr_jax.core import Denoiser, Prediction, check, patches
from ipr_jax.methods import engine, selection
from ipr_jax.methods.engine import FOREVER, Problem, State, by_sample
from ipr_jax.methods.solving import advance_on, begin_on, spread
from ipr_jax.runtime import Program, driver, sharding
from ipr_jax.sampling import rank, renoise
from ipr_jax.sampling import step as steps

PARTS = 4
"""Into how many parts a sample is dealt: fewer hide more of what a patch follows from."""

MOST_DOUBTED = 3
"""Patches of a sample that are shown as doubted."""


def deal(keys: jax.Array, grid: tuple[int, ...], parts: int) -> jax.Array:
    """The part of every patch, int32 [B, h, w] in [0, parts); parts differ by at most a patch."""
    uniform = selection.fresh_regions(keys, 0, grid)
    return rank(uniform, jnp.ones(uniform.shape, bool)) % parts


def most_doubted(
    doubt: np.ndarray, editable: np.ndarray, *, calm: float, number: int = MOST_DOUBTED
) -> np.ndarray:
    """The editable patches of a sample that are doubted most, on the host.

    Args:
        doubt: float32 [h, w].
        editable: bool [h, w].
        calm: of a sample whose doubts add up to less, no patch is.
        number: of patches; more where the last of them are doubted equally.

    Returns:
        Bool [h, w].
    """
    doubt = np.where(editable, doubt, 0)
    least = np.sort(doubt, axis=None)[-number:].min()
    return (doubt >= least) & (doubt > 0) & (doubt.sum() >= calm)


class Asked(NamedTuple):
    """What is remembered of the questions.

    Attributes:
        image: float32 [B, H, W, C], what this round asks about.
        found: float32 [B, H, W, C], the same with what is predicted of the parts that are over.
        doubt: float32 [B, h, w].
        step: int32 [B], evaluations that are over.
    """

    image: jax.Array
    found: jax.Array
    doubt: jax.Array
    step: jax.Array


@partial(jax.tree_util.register_dataclass, data_fields=[], meta_fields=["parts", "rounds"])
@dataclasses.dataclass(frozen=True)
class Doubting:
    """The method that finds the doubts and leaves the samples as they are.

    Attributes:
        parts: evaluations of a round.
        rounds: how often; all hide the same parts behind the same noise.
    """

    parts: int = PARTS
    rounds: int = 1

    @property
    def evaluations(self) -> int:
        """That a sample takes."""
        return self.parts * self.rounds

    def init(self, problem: Problem) -> State:
        """The first part is hidden."""
        image, step = problem.image, jnp.zeros(problem.keys.shape, jnp.int32)
        memory = Asked(image, image, jnp.zeros(problem.editable.shape, jnp.float32), step)
        z, t = self._hide(problem, memory)
        return engine.begin(problem, z, t, memory)

    def update(self, problem: Problem, state: State, prediction: Prediction) -> State:
        """Compare what was hidden and hide the next part."""
        memory, hidden = state.memory, state.t > 0
        clean = steps.clean(state.z, state.t, prediction)
        change = patches.mean_square(clean, memory.image, clean.shape[1] // hidden.shape[1])
        found, step = renoise(memory.found, hidden, clean), memory.step + 1
        memory = Asked(
            image=by_sample(step % self.parts == 0, found, memory.image),
            found=found,
            doubt=jnp.where(hidden, change, memory.doubt),
            step=step,
        )
        z, t = self._hide(problem, memory)
        done = state.done | (step >= self.evaluations)
        return state._replace(z=z, t=t, done=done, memory=memory)

    def _hide(self, problem: Problem, memory: Asked) -> tuple[jax.Array, jax.Array]:
        dealt = deal(problem.keys, problem.editable.shape[1:], self.parts)
        hidden = dealt == (memory.step % self.parts)[:, None, None]
        noise = selection.fresh_noise(problem.keys, 0, problem.image.shape[1:])
        return renoise(memory.image, hidden, noise), hidden.astype(jnp.float32)


@partial(jax.jit, static_argnames=("most", "mesh"))
def _doubts(
    denoise: Denoiser, method: Doubting, queue: Problem, *, most: int | None, mesh: Mesh | None
) -> jax.Array:
    state = begin_on(method, queue, mesh=mesh)
    return advance_on(denoise, method, queue, state, FOREVER, most=most, mesh=mesh).memory.doubt


@driver
def doubts(
    denoise: Denoiser,
    keys: jax.Array,
    image: jax.Array | np.ndarray,
    *,
    grid: tuple[int, int],
    parts: int = PARTS,
    rounds: int = 1,
    mesh: Mesh | None = None,
) -> Program[jax.Array]:
    """What the network doubts about samples; no verifier, and ``parts * rounds`` evaluations.

    Args:
        denoise: the model.
        keys: [B], from ``sample_keys``; they deal the parts and hide them.
        image: float32 [B, H, W, C], finite.
        grid: (h, w), of the patches.
        parts: at least 2 and at most as many as there are patches; each is predicted from the
            others.
        rounds: at least 1; 2 = by how much what is predicted of a patch changes once the others
            are replaced by what is predicted of them.
        mesh: as for ``generate``.

    Returns:
        Float32 [B, h, w], mean square by which a patch, clues too, differs from its prediction,
        which is also how unusual its texture is; of several rounds, by which its last prediction
        differs from the one before.

    Raises:
        ValueError: keys, images and grid do not belong together, a pixel is not finite, or a number
            is out of its range.
    """
    editable = np.ones((image.shape[0], *grid), bool)
    check.batch(keys, image, editable)
    check.samples(image, editable)
    check.count("parts", parts, least=2, below=grid[0] * grid[1] + 1)
    check.count("rounds", rounds)
    shared = sharding.of_samples(mesh, denoise, keys, image, editable)
    most = sharding.rows_at_once(mesh, grid)
    queue = spread(shared, keys, image, editable)
    arguments = check.as_pytree(denoise), Doubting(parts, rounds), queue
    static = {"most": most, "mesh": shared}
    return Program(
        _doubts, arguments, static, lambda found: sharding.cut(found, len(keys), shared, 0)
    )
