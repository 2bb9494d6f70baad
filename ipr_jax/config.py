"""Architectures: one frozen dataclass, and the released models by name."""

import dataclasses

from ipr_jax import check


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
        if len(self.image_size) != 2:
            raise ValueError(f"image_size must be height and width, got {self.image_size}")
        for name, values in (("image_size", self.image_size), ("widths", self.widths)):
            for value in values:
                check.count(f"every number of {name}", value)
        for value in (*self.attention, self.concat_clues):
            if not isinstance(value, bool):
                raise ValueError(f"attention and concat_clues must be True or False, got {value!r}")
        for size in self.image_size:
            if size % self.patch_size:
                raise ValueError(
                    f"image_size must be positive multiples of patch_size={self.patch_size}, "
                    f"got {self.image_size}"
                )
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
"""Architectures by name: the three released ones, and the small ones that ship trained."""
