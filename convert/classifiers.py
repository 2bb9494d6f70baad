"""The benchmark classifiers in their state dicts: tables, and what their tensors tell of them."""

from collections.abc import Mapping
from typing import Any

from convert.mapping import Entry, Path, layer
from ipr_jax.tasks.mnist_classifier import MNISTConfig
from ipr_jax.tasks.polygon_classifier import BLOCKS, PolygonConfig

VARIANTS: dict[str, PolygonConfig] = {
    "polygons": PolygonConfig(),
    "stars": PolygonConfig(min_vertices=2, max_vertices=9),
}
"""The published classifiers of counting tasks."""


def mnist_table(config: MNISTConfig) -> list[Entry]:
    """Every parameter of ``MNISTClassifier``."""
    del config  # nothing varies
    kinds = {"conv1": "conv", "conv2": "conv", "fc1": "linear", "fc2": "linear"}
    return [entry for name, kind in kinds.items() for entry in layer(name, (name,), kind)]


def _conv_norm(conv: str, norm: str, path: Path) -> list[Entry]:
    statistics = {"running_mean": "mean", "running_var": "var"}
    return [
        *layer(conv, (*path, "conv"), "conv", bias=False),
        *layer(norm, (*path, "norm"), "vector"),
        *(
            Entry((f"{norm}.{torch}",), (*path, "norm", leaf), "vector")
            for torch, leaf in statistics.items()
        ),
    ]


def polygon_table(config: PolygonConfig) -> list[Entry]:
    """Every parameter and statistic of ``PolygonClassifier(config)``."""
    entries = _conv_norm("conv1", "bn1", ("stem",))
    position = 0
    for stage, number in enumerate(BLOCKS, start=1):
        for index in range(number):
            torch, path = f"layer{stage}.{index}", ("blocks", position)
            for k, part in enumerate(("reduce", "spatial", "expand"), start=1):
                entries += _conv_norm(f"{torch}.conv{k}", f"{torch}.bn{k}", (*path, part))
            if index == 0:
                names = f"{torch}.downsample.0", f"{torch}.downsample.1"
                entries += _conv_norm(*names, (*path, "shortcut"))
            position += 1
    for name in config.heads:
        entries += layer(f"fc.heads.{name}", ("heads", name), "linear")
    return entries


def infer_polygon(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """The classes of every head; which counts they stand for, the tensors do not tell."""
    prefix, suffix = "fc.heads.", ".weight"
    return {
        "heads": {
            name.removeprefix(prefix).removesuffix(suffix): shape[0] if shape else 0
            for name, shape in shapes.items()
            if name.startswith(prefix) and name.endswith(suffix)
        }
    }
