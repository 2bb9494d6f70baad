"""Sudoku boards drawn and rendered by a compiled function, so that no step waits for the host.

A board is one of a table, its digits, bands, stacks, and rows and columns inside of them permuted,
and transposed or not, all uniformly. These symmetries are one-to-one on the valid boards: a board
that is drawn is as uniform over all of them as one of the table, by itself. Two boards are
independent but for being of one orbit more often, once in as many as the table has.

Shapes: B boards of n x n cells of S x S pixels, N boards in the table.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.ndimage import map_coordinates

from ipr_jax.tasks.base import Batch

LIMITS = {"angle": 0.2, "size": 0.12, "stretch": 0.08, "shear": 0.15, "shift": 0.7}
"""How far a distortion of 1 goes: radians, logarithms of a factor, a slope, pixels of 8."""
THICKNESS = (-0.2, 0.4)
"""From how thin to how thick: the share of a 3 x 3 erosion, and of a dilation."""


class Tables(NamedTuple):
    """What is drawn from.

    Attributes:
        boards: int32 [N, n, n] in 1..n, valid, independent and uniform.
        images: float32 [M, S, S] in [-1, 1], images of digits, sorted by digit.
        first: int32 [n + 1], the position of the first image of each digit, 0 being no digit.
        number: int32 [n + 1], how many images each digit has.
    """

    boards: jax.Array
    images: jax.Array
    first: jax.Array
    number: jax.Array


def draw(
    tables: Tables,
    key: jax.Array,
    batch: int,
    distortion: jax.Array | float,
    most_hidden: jax.Array | float,
) -> Batch:
    """Draw puzzles; jittable.

    Every cell is a uniformly drawn image of its digit. Clues are distorted, each by itself, so that
    those of other writers are read; what is to be generated is not, as it would be learnt blurred.
    The number of hidden cells is uniform from 1 to a share of all, their places are uniform.

    Args:
        tables: see ``Tables``.
        key: consumed.
        batch: number of boards B, static.
        distortion: in [0, 1], share of ``LIMITS`` and ``THICKNESS`` up to which digits are shifted,
            turned, scaled, sheared, thickened and thinned.
        most_hidden: in (0, 1], share of the cells that are hidden at most.

    Returns:
        A batch as ``Task.training_batch`` makes it, of arrays of JAX.
    """
    keys = jax.random.split(key, 5)
    n, size = tables.boards.shape[1], tables.images.shape[1]
    board = boards(tables.boards, keys[0], batch)
    number = tables.number[board]
    uniform = jax.random.uniform(keys[1], board.shape) * number.astype(jnp.float32)
    chosen = jnp.minimum(uniform.astype(jnp.int32), number - 1)
    most = jnp.ceil(jnp.float32(most_hidden) * n * n)
    hidden = 1 + jnp.floor(jax.random.uniform(keys[3], (batch, 1)) * most)
    rank = jax.random.uniform(keys[4], (batch, n * n)).argsort(axis=1).argsort(axis=1)
    editable = (rank < jnp.minimum(hidden, most).astype(jnp.int32)).reshape(board.shape)
    tiles = tables.images[tables.first[board] + chosen].reshape(-1, size, size)
    distorted = distort(keys[2], tiles, jnp.float32(distortion))
    tiles = jnp.where(editable.reshape(-1, 1, 1), tiles, distorted)
    image = tiles.reshape(batch, n, n, size, size).swapaxes(2, 3)
    parts: Any = image.reshape(batch, n * size, n * size, 1), editable, board
    return Batch(*parts)


def boards(table: jax.Array, key: jax.Array, batch: int) -> jax.Array:
    """Draw valid boards: int32 [B, n, n]."""
    choice, digits, rows, columns, flip = jax.random.split(key, 5)
    n = table.shape[1]
    board = table[jax.random.randint(choice, (batch,), 0, len(table))]
    board = jnp.take_along_axis(board, _lines(rows, batch, n)[:, :, None], axis=1)
    board = jnp.take_along_axis(board, _lines(columns, batch, n)[:, None, :], axis=2)
    turned = jax.random.bernoulli(flip, shape=(batch, 1, 1))
    board = jnp.where(turned, board.swapaxes(1, 2), board)
    relabelled = _permutations(digits, (batch, n)) + 1
    return jnp.take_along_axis(relabelled[:, None], board - 1, axis=2)


def _permutations(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Independent uniform permutations along the last axis, of 0, 1, ..."""
    return jax.random.uniform(key, shape).argsort(axis=-1)


def _lines(key: jax.Array, batch: int, n: int) -> jax.Array:
    """Permute bands, and the lines inside of each: int32 [B, n]."""
    side = math.isqrt(n)
    band_key, line_key = jax.random.split(key)
    bands = _permutations(band_key, (batch, side))
    return (side * bands[:, :, None] + _permutations(line_key, (batch, side, side))).reshape(-1, n)


def distort(key: jax.Array, tiles: jax.Array, strength: jax.Array) -> jax.Array:
    """Move and thicken images of digits, each by itself.

    Args:
        key: consumed.
        tiles: float32 [N, S, S] in [-1, 1], -1 = background.
        strength: in [0, 1]; 0 leaves them as they are.

    Returns:
        Float32 [N, S, S] in [-1, 1].
    """
    number, size, _ = tiles.shape
    affine_key, shift_key, thickness_key = jax.random.split(key, 3)
    limits = strength * jnp.float32(
        [LIMITS[name] for name in ("angle", "size", "stretch", "shear")]
    )
    angle, scale, stretch, shear = jnp.moveaxis(
        limits[None] * jax.random.uniform(affine_key, (number, 4), minval=-1, maxval=1), 1, 0
    )
    cos, sin, zero = jnp.cos(angle), jnp.sin(angle), jnp.zeros_like(angle)
    turn = jnp.stack([cos, -sin, sin, cos], axis=1).reshape(-1, 2, 2)
    slant = jnp.stack([jnp.exp(scale + stretch), shear, zero, jnp.exp(scale)], axis=1)
    limit = strength * LIMITS["shift"] * size / 8
    shift = limit * jax.random.uniform(shift_key, (number, 2, 1, 1), minval=-1, maxval=1)
    centre = (size - 1) / 2
    grid = jnp.indices((size, size)).astype(jnp.float32) - centre
    source = jnp.einsum("nij,jhw->nihw", turn @ slant.reshape(-1, 2, 2), grid) + centre + shift
    moved = jax.vmap(lambda image, at: map_coordinates(image, list(at), order=1, cval=-1.0))(
        tiles, source
    )
    thin, thick = THICKNESS
    amount = strength * jax.random.uniform(thickness_key, (number, 1, 1), minval=thin, maxval=thick)
    thicker = jax.lax.reduce_window(moved, -1.0, jax.lax.max, (1, 3, 3), (1, 1, 1), "SAME")
    thinner = jax.lax.reduce_window(moved, 1.0, jax.lax.min, (1, 3, 3), (1, 1, 1), "SAME")
    changed = jnp.where(amount > 0, thicker, thinner)
    return jnp.clip(moved + jnp.abs(amount) * (changed - moved), -1, 1)
