"""The benchmark's classifier of counting polygons and stars, for converted weights: a ResNet-50.

Shapes: B images, H = W = 128, C = 3, values in [-1, 1].
"""

import functools
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ipr_jax.core import check
from ipr_jax.tasks.convolution import convolve

BLOCKS = (3, 4, 6, 3)
"""Residual blocks per stage of a ResNet-50."""
MAX_POLYGONS = 9
"""Most polygons in an image; the fewest is 1."""


@dataclass(frozen=True, kw_only=True)
class PolygonConfig:
    """What the classifier tells apart.

    Attributes:
        min_vertices: fewest vertices of a polygon, or points of a star.
        max_vertices: most of them.

    Raises:
        ValueError: a count is below 1 or the range of vertices empty.
    """

    min_vertices: int = 3
    max_vertices: int = 7

    def __post_init__(self) -> None:
        for name in ("min_vertices", "max_vertices"):
            check.count(name, getattr(self, name))
        if self.min_vertices > self.max_vertices:
            raise ValueError(
                f"min_vertices must not exceed max_vertices={self.max_vertices}, "
                f"got {self.min_vertices}"
            )

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C)."""
        return 128, 128, 3

    @property
    def pairs(self) -> np.ndarray:
        """Int [pairs, 2]: the two numbers (low, high) that an image may state, in label order."""
        found = {
            (min(vertices, polygons), max(vertices, polygons)): None
            for vertices in range(self.min_vertices, self.max_vertices + 1)
            for polygons in range(1, MAX_POLYGONS + 1)
        }
        return np.array(list(found), np.int32)

    @property
    def heads(self) -> dict[str, int]:
        """Classes of every head, by name."""
        return {
            "num_polygons": MAX_POLYGONS,
            "num_vertices": self.max_vertices - self.min_vertices + 1,
            "is_uniform": 2,
            "numbers_label": len(self.pairs),
        }


class Counts(NamedTuple):
    """What the classifier sees in images.

    Attributes:
        num_polygons: int32 [B], in 1..``MAX_POLYGONS``.
        num_vertices: int32 [B], in min_vertices..max_vertices.
        is_uniform: bool [B], whether all polygons have equally many vertices.
        stated: int32 [B, 2], the two numbers written in the image, smaller first.
    """

    num_polygons: jax.Array
    num_vertices: jax.Array
    is_uniform: jax.Array
    stated: jax.Array


class ConvNorm(nnx.Module):
    """A convolution without bias that pads by kernel // 2, then batch norm by fixed statistics."""

    def __init__(
        self, channels_in: int, channels_out: int, kernel: int, strides: int = 1, *, rngs: nnx.Rngs
    ):
        padding = kernel // 2
        self.conv = nnx.Conv(
            channels_in,
            channels_out,
            (kernel, kernel),
            strides=strides,
            padding=((padding, padding), (padding, padding)),
            use_bias=False,
            precision="highest",
            conv_general_dilated=convolve,
            rngs=rngs,
        )
        self.norm = nnx.BatchNorm(channels_out, use_running_average=True, epsilon=1e-5, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, h, w, channels_in] -> [B, h', w', channels_out]."""
        return self.norm(self.conv(x))


class Bottleneck(nnx.Module):
    """1x1, 3x3 (which strides) and 1x1 convolutions with norms, plus the input."""

    def __init__(self, channels_in: int, width: int, strides: int, *, rngs: nnx.Rngs):
        self.reduce = ConvNorm(channels_in, width, 1, rngs=rngs)
        self.spatial = ConvNorm(width, width, 3, strides, rngs=rngs)
        self.expand = ConvNorm(width, 4 * width, 1, rngs=rngs)
        self.shortcut = (
            ConvNorm(channels_in, 4 * width, 1, strides, rngs=rngs)
            if strides > 1 or channels_in != 4 * width
            else None
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, h, w, channels_in] -> [B, h', w', 4 width]."""
        y = nnx.relu(self.spatial(nnx.relu(self.reduce(x))))
        return nnx.relu(self.expand(y) + (x if self.shortcut is None else self.shortcut(x)))


class PolygonClassifier(nnx.Module):
    """A ResNet-50 (stride in the 3x3 convolutions) with a linear head per question.

    Source: the classifier of the Counting Polygons benchmark, arXiv 2502.21075; He et al. 2016.
    """

    def __init__(self, config: PolygonConfig, *, rngs: nnx.Rngs):
        """Build with random weights."""
        self.config = config
        self.stem = ConvNorm(3, 64, 7, 2, rngs=rngs)
        blocks, current = [], 64
        for stage, number in enumerate(BLOCKS):
            width = 64 * 2**stage
            for index in range(number):
                strides = 2 if stage > 0 and index == 0 else 1
                blocks.append(Bottleneck(current, width, strides, rngs=rngs))
                current = 4 * width
        self.blocks = nnx.List(blocks)
        linear = functools.partial(nnx.Linear, precision="highest", rngs=rngs)
        self.heads = nnx.Dict({name: linear(current, n) for name, n in config.heads.items()})

    def __call__(self, images: jax.Array) -> dict[str, jax.Array]:
        """Answer every question.

        Args:
            images: float [B, 128, 128, 3] in [-1, 1].

        Returns:
            Logits by head, float32 [B, classes]; the classes are those of ``config.heads``.
        """
        x = nnx.relu(self.stem(jnp.asarray(images, jnp.float32)))
        x = nnx.max_pool(x, (3, 3), (2, 2), padding=((1, 1), (1, 1)))  # pyright: ignore[reportArgumentType]
        for block in self.blocks:
            x = block(x)
        pooled = x.mean(axis=(1, 2))
        return {name: head(pooled) for name, head in self.heads.items()}


def read_counts(logits: dict[str, jax.Array], config: PolygonConfig) -> Counts:
    """The most probable answer to every question, from the logits of ``PolygonClassifier``."""
    best = {name: jnp.argmax(values, axis=1).astype(jnp.int32) for name, values in logits.items()}
    return Counts(
        num_polygons=best["num_polygons"] + 1,
        num_vertices=best["num_vertices"] + config.min_vertices,
        is_uniform=best["is_uniform"] == 1,
        stated=jnp.asarray(config.pairs)[best["numbers_label"]],
    )
