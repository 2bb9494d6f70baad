"""Architectures: a frozen dataclass for each, and the released and recommended ones by name."""

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np

from ipr_jax.core import check


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The architecture of one denoiser.

    Attributes:
        image_size: (H, W) in pixels, multiples of ``patch_size``.
        channels: image channels C.
        patch_size: pixels per side of a square patch; every patch has its own noise level. An
            image-level model has one patch, the image.
        widths: channels of each resolution level, finest first, multiples of ``num_groups``.
        attention: whether the blocks of each level attend; as long as ``widths``.
        num_blocks: residual blocks per encoder level (a decoder level has one more).
        time_width: features of the embedded noise level.
        num_frequencies: sines plus cosines that encode a noise level, even.
        head_width: channels per attention head; divides the width of every attending level.
        num_groups: groups of every group norm.
        dropout: rate inside residual blocks while training, in [0, 1).
        concat_clues: whether the mask and the clues enter as further channels of the input, as in
            image-level models that complete images.

    Raises:
        ValueError: a size does not fit, naming the rule and the value.
    """

    image_size: tuple[int, int]
    channels: int
    patch_size: int
    widths: tuple[int, ...]
    attention: tuple[bool, ...]
    num_blocks: int = 2
    time_width: int = 512
    num_frequencies: int = 256
    head_width: int = 64
    num_groups: int = 32
    dropout: float = 0.1
    concat_clues: bool = False

    def __post_init__(self) -> None:
        positive = (
            "channels",
            "patch_size",
            "num_blocks",
            "time_width",
            "num_frequencies",
            "head_width",
            "num_groups",
        )
        for name in positive:
            check.count(name, getattr(self, name))
        if not self.widths or len(self.attention) != len(self.widths):
            raise ValueError(
                f"attention must say yes or no for each of the {len(self.widths)} widths "
                f"{self.widths} (at least one), got {self.attention}"
            )
        _check_image_size(self.image_size, self.patch_size)
        for value in self.widths:
            check.count("every number of widths", value)
        for value in (*self.attention, self.concat_clues):
            if not isinstance(value, bool):
                raise ValueError(f"attention and concat_clues must be True or False, got {value!r}")
        for width in self.widths:
            if width % self.num_groups:
                raise ValueError(
                    f"widths must be positive multiples of num_groups={self.num_groups}, "
                    f"got {self.widths}"
                )
        attending = [w for w, yes in zip(self.widths, self.attention, strict=True) if yes]
        for width in [*attending, self.widths[-1]]:
            if width % self.head_width:
                raise ValueError(
                    f"attending levels and the deepest one must be multiples of "
                    f"head_width={self.head_width}, got {width}"
                )
        if self.num_frequencies % 2:
            raise ValueError(f"num_frequencies must be even, got {self.num_frequencies}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")

    @property
    def grid(self) -> tuple[int, int]:
        """(h, w), the patch grid."""
        return self.image_size[0] // self.patch_size, self.image_size[1] // self.patch_size

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C)."""
        return (*self.image_size, self.channels)

    @property
    def channels_in(self) -> int:
        """Channels of the network's input: the noisy image, then mask and clues if concatenated."""
        return 2 * self.channels + 1 if self.concat_clues else self.channels

    @property
    def channels_out(self) -> int:
        """Channels of the network's output: velocity, variance, log-variance of the error."""
        return 2 * self.channels + 1


def _box(h: int, w: int) -> np.ndarray:
    side = math.isqrt(h)
    row, column = np.indices((h, w)) // side
    return row * side + column


COORDINATES: dict[str, Callable[[int, int], np.ndarray]] = {
    "row": lambda h, w: np.repeat(np.arange(h), w),
    "column": lambda h, w: np.tile(np.arange(w), h),
    "cell": lambda h, w: np.arange(h * w),
    "box": lambda h, w: _box(h, w).reshape(-1),
}
"""What a patch may know of where it lies in a grid: ``(h, w) -> int [h w]`` from 0, row by row. The
boxes are those of a square grid whose side is a square, as on a Sudoku board."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """The architecture of a denoiser that is a transformer over patches.

    Attributes:
        image_size: (H, W) in pixels, multiples of ``patch_size``.
        channels: image channels C.
        patch_size: pixels per side of a square patch; every patch is a token.
        width: features of a token.
        num_layers: layers of attention and SwiGLU.
        num_heads: heads of every attention; divides ``width``.
        repeats: how often the layers are run one after the other, with the same weights.
        hidden_width: features inside of every SwiGLU.
        num_frequencies: sines plus cosines that encode a noise level, even.
        coordinates: names of ``COORDINATES``, of each of which a patch has a learned embedding.
        attention_bias: names of ``COORDINATES``, for each pair of whose values every head of every
            layer has a learned bias.
        pixel_mean: about the mean of the images' pixels, by which the input is centred.
        pixel_std: about their standard deviation, by which input and output are scaled.
        gain: whether the velocity of a pixel also has a learned multiple of its input, so that a
            token can take the noise off more pixels than it has features; for large patches.
        balance: whether every image is taken to have the mean ``pixel_mean``, channel by channel,
            which no patch can tell by itself: what that says of each is added to what the network
            sees and answers. The mean then has to be that of every image, not about it.

    Raises:
        ValueError: a size does not fit, naming the rule and the value.
    """

    image_size: tuple[int, int]
    channels: int
    patch_size: int
    width: int = 128
    num_layers: int = 4
    num_heads: int = 4
    repeats: int = 1
    hidden_width: int = 384
    num_frequencies: int = 64
    coordinates: tuple[str, ...] = ("row", "column", "cell")
    attention_bias: tuple[str, ...] = ("row", "column")
    pixel_mean: float = 0.0
    pixel_std: float = 1.0
    gain: bool = False
    balance: bool = False

    def __post_init__(self) -> None:
        for name in (
            *("channels", "patch_size", "width", "num_layers", "num_heads", "repeats"),
            *("hidden_width", "num_frequencies"),
        ):
            check.count(name, getattr(self, name))
        _check_image_size(self.image_size, self.patch_size)
        if self.width % self.num_heads:
            raise ValueError(
                f"width must be a multiple of num_heads={self.num_heads}, got {self.width}"
            )
        if self.num_frequencies % 2:
            raise ValueError(f"num_frequencies must be even, got {self.num_frequencies}")
        for name in ("gain", "balance"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, got {getattr(self, name)!r}")
        for field in ("coordinates", "attention_bias"):
            self._check_names(field)
        if not abs(self.pixel_mean) < math.inf:
            raise ValueError(f"pixel_mean must be finite, got {self.pixel_mean}")
        if not 0 < self.pixel_std < math.inf:
            raise ValueError(f"pixel_std must be positive, got {self.pixel_std}")

    def _check_names(self, field: str) -> None:
        names, (h, w) = getattr(self, field), self.grid
        fitting = [name for name in COORDINATES if name != "box" or h == w == math.isqrt(h) ** 2]
        for name in names:
            if name not in COORDINATES:
                raise ValueError(f"unknown name {name!r} in {field}; those that fit: {fitting}")
            if name not in fitting:
                raise ValueError(
                    f"{name!r} in {field} needs a square grid whose side is a square, the grid is "
                    f"{h} x {w}; those that fit: {fitting}"
                )
        if len(set(names)) != len(names):
            raise ValueError(f"{field} must name each coordinate once, got {names}")

    @property
    def grid(self) -> tuple[int, int]:
        """(h, w), the patch grid."""
        return self.image_size[0] // self.patch_size, self.image_size[1] // self.patch_size

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C)."""
        return (*self.image_size, self.channels)

    def table_sizes(self, names: Sequence[str]) -> list[int]:
        """How many values each coordinate has on the grid."""
        return [int(COORDINATES[name](*self.grid).max()) + 1 for name in names]


def _check_image_size(image_size: tuple[int, int], patch_size: int) -> None:
    if len(image_size) != 2:
        raise ValueError(f"image_size must be height and width, got {image_size}")
    for size in image_size:
        check.count("every number of image_size", size)
    if any(size % patch_size for size in image_size):
        raise ValueError(
            f"image_size must be positive multiples of patch_size={patch_size}, got {image_size}"
        )


Config = ModelConfig | TransformerConfig
"""The architecture of any denoiser."""


_LITE = ModelConfig(
    image_size=(32, 32),
    channels=1,
    patch_size=8,
    widths=(16, 32, 64),
    attention=(False, False, True),
    num_blocks=1,
    time_width=128,
    head_width=32,
    num_groups=8,
    dropout=0.0,
)

PRESETS: dict[str, ModelConfig] = {
    "even-pixels": ModelConfig(
        image_size=(32, 32),
        channels=3,
        patch_size=4,
        widths=(64, 128, 128, 256),
        attention=(False, False, True, True),
    ),
    "counting-polygons": ModelConfig(
        image_size=(128, 128),
        channels=3,
        patch_size=8,
        widths=(128, 128, 256, 256, 512),
        attention=(False, False, False, True, True),
    ),
    "mnist-sudoku": ModelConfig(
        image_size=(252, 252),
        channels=1,
        patch_size=28,
        widths=(128, 128, 256, 256, 512, 512),
        attention=(False, False, False, False, True, True),
    ),
    "mini-sudoku": _LITE,
    "even-pixels-lite": dataclasses.replace(_LITE, channels=3, patch_size=4),
}
"""U-Nets by name: the three released ones, and the small ones that ship trained."""

_BOARDS = TransformerConfig(
    image_size=(72, 72),
    channels=1,
    patch_size=8,
    coordinates=("row", "column", "cell", "box"),
    pixel_mean=-0.4,
    pixel_std=0.75,
)

TRANSFORMERS: dict[str, TransformerConfig] = {
    "mini-sudoku-transformer": dataclasses.replace(
        _BOARDS, image_size=(32, 32), width=96, hidden_width=256
    ),
    "digits-sudoku": _BOARDS,
    "digits-sudoku-large": dataclasses.replace(
        _BOARDS, width=256, hidden_width=768, num_layers=8, num_heads=8
    ),
    "mnist-sudoku-transformer": dataclasses.replace(
        _BOARDS, image_size=(252, 252), patch_size=28, pixel_mean=-0.74, pixel_std=0.62, gain=True
    ),
    "even-pixels-transformer": TransformerConfig(
        image_size=(32, 32),
        channels=3,
        patch_size=4,
        width=96,
        hidden_width=256,
        coordinates=("row", "column"),
        attention_bias=(),
        pixel_mean=-0.302,
        pixel_std=0.6,
        balance=True,
    ),
}
"""Transformers by name."""
