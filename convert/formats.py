"""What the published checkpoints hold: for each network its names, its table, its architecture."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from convert import classifiers, srm, torch_model
from convert.mapping import Entry
from ipr_jax.config import PRESETS, ModelConfig
from ipr_jax.tasks.mnist_classifier import MNISTConfig
from ipr_jax.tasks.polygon_classifier import PolygonConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Format:
    """How the files of PyTorch hold a network.

    Attributes:
        title: what to call it.
        config: the class of its configuration.
        prefixes: what its names may begin with, each after which weights these are: "ema", "raw",
            or "only" where a file holds one set.
        sign: what a name begins with, after the prefix, that only this network has.
        table: its parameters.
        infer: attributes of the configuration, from the shapes of its tensors.
        presets: the released architectures, by name.
        untold: fields that the tensors do not tell and that may be given.
        ignored: why a tensor is left out, by the end of its name.
        twin: the same in PyTorch, ``(tensors, config, **inputs) -> outputs by name``, all of them
            NumPy arrays, images channel first.
    """

    title: str
    config: type
    prefixes: tuple[tuple[str, str], ...]
    sign: str
    table: Callable[[Any], list[Entry]]
    infer: Callable[[Mapping[str, tuple[int, ...]]], dict[str, Any]]
    presets: Mapping[str, Any]
    untold: tuple[str, ...] = ()
    ignored: Mapping[str, str]
    twin: Callable[..., dict[str, np.ndarray]]


FORMATS = (
    Format(
        title="SRM denoiser",
        config=ModelConfig,
        prefixes=(("ema", "ema_denoiser.module."), ("raw", "denoiser."), ("only", "")),
        sign="model.encoder.",
        table=srm.table,
        infer=srm.infer,
        presets=srm.RELEASES | PRESETS,
        untold=("image_size", "patch_size", "head_width"),
        ignored={"ema_denoiser.n_averaged": "counts the averaged steps"},
        twin=torch_model.srm,
    ),
    Format(
        title="MNIST classifier",
        config=MNISTConfig,
        prefixes=(("only", ""),),
        sign="fc1.",
        table=classifiers.mnist_table,
        infer=lambda shapes: {},
        presets={},
        ignored={},
        twin=torch_model.mnist_classifier,
    ),
    Format(
        title="polygon classifier",
        config=PolygonConfig,
        prefixes=(("only", ""), ("only", "model.")),
        sign="fc.heads.",
        table=classifiers.polygon_table,
        infer=classifiers.infer_polygon,
        presets=classifiers.VARIANTS,
        ignored={".num_batches_tracked": "counts the batches of training"},
        twin=torch_model.polygon_classifier,
    ),
)
"""Every network that can be converted."""


def of_config(config: Any) -> Format:
    """The format of a configuration's network."""
    return next(layout for layout in FORMATS if isinstance(config, layout.config))


def recognise(names: Iterable[str], weights: str) -> tuple[Format, str, str]:
    """Tell which network a file holds, and where its weights are.

    Args:
        names: of its tensors.
        weights: "ema" or "raw", which to take where there are both.

    Returns:
        The format, which weights were found, and what their names begin with.

    Raises:
        ValueError: no known network, or not these weights.
    """
    names = list(names)
    found = [
        (layout, kind, prefix)
        for layout in FORMATS
        for kind, prefix in layout.prefixes
        if any(name.startswith(prefix + layout.sign) for name in names)
    ]
    if not found:
        titles = ", ".join(layout.title for layout in FORMATS)
        raise ValueError(f"its names are those of no network that is known here: {titles}")
    for choice in found:
        if choice[1] in (weights, "only"):
            return choice
    there = ", ".join(kind for _, kind, _ in found)
    raise ValueError(f"it has no {weights} weights, only {there}")


def configure(
    layout: Format,
    shapes: Mapping[str, tuple[int, ...]],
    base: Any | None,
    origin: str,
    given: Mapping[str, Any],
) -> Any:
    """The configuration of a network: what its tensors tell, and what has to be said.

    Args:
        layout: the format of the network.
        shapes: of its tensors, by name without prefix.
        base: a configuration that the tensors must agree with, or None.
        origin: where ``base`` comes from, for errors.
        given: values of fields that the tensors do not tell; they override ``base``.

    Raises:
        ValueError: base and tensors contradict each other (both are named), a value is missing or
            needless, or the architecture is impossible.
    """
    needless = given.keys() - set(layout.untold)
    if needless:
        raise ValueError(f"{layout.title}: {sorted(needless)} cannot be given")
    told = layout.infer(shapes)
    if base is None:
        missing = [name for name in layout.untold if name not in given]
        if missing or not told.keys() <= layout.config.__dataclass_fields__.keys():
            fitting = [
                name for name, preset in layout.presets.items() if not differences(preset, told)
            ]
            flags = ", ".join(f"--{name.replace('_', '-')}" for name in missing)
            raise ValueError(
                f"its tensors do not tell everything: give {flags}{', or ' if flags else ''}"
                f"--preset; presets that fit the tensors: {', '.join(fitting) or 'none'}"
            )
        return layout.config(**told, **given)
    wrong = differences(base, told)
    if wrong:
        raise ValueError(f"{origin} says {wrong[0]}, but its tensors say {wrong[1]}")
    return dataclasses.replace(base, **given)


def differences(config: Any, values: Mapping[str, Any]) -> tuple[str, str] | None:
    """Where a configuration has other values: its own and the others, for an error; or None."""
    wrong = [name for name, value in values.items() if getattr(config, name) != value]
    if not wrong:
        return None
    return (
        ", ".join(f"{name}={getattr(config, name)}" for name in wrong),
        ", ".join(f"{name}={values[name]}" for name in wrong),
    )
