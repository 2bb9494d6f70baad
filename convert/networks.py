"""What the published checkpoints hold: for each network its names, its table, its architecture."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from convert import classifiers, srm, torch_model
from convert.mapping import Entry
from ipr_jax.config import PRESETS, ModelConfig
from ipr_jax.tasks.mnist_classifier import MNISTConfig
from ipr_jax.tasks.polygon_classifier import PolygonConfig


@dataclass(frozen=True, kw_only=True)
class Network:
    """A network in the files of PyTorch.

    Attributes:
        title: what to call it.
        config: the class of its configuration.
        prefixes: what its names may begin with, each after which weights these are: "ema", "raw",
            or "only" where a file holds one set.
        sign: what a name begins with, after the prefix, that only this network has.
        table: its parameters.
        infer: fields of the configuration, from the shapes of its tensors.
        presets: the released architectures, by name.
        untold: fields that the tensors do not tell.
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


NETWORKS = (
    Network(
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
    Network(
        title="MNIST classifier",
        config=MNISTConfig,
        prefixes=(("only", ""),),
        sign="fc1.",
        table=classifiers.mnist_table,
        infer=lambda shapes: {},
        presets={},
        ignored={},
        twin=lambda tensors, config, images: torch_model.mnist_classifier(tensors, images),
    ),
    Network(
        title="polygon classifier",
        config=PolygonConfig,
        prefixes=(("only", ""), ("only", "model.")),
        sign="fc.heads.",
        table=classifiers.polygon_table,
        infer=classifiers.infer_polygon,
        presets=classifiers.VARIANTS,
        ignored={".num_batches_tracked": "counts the batches of training"},
        twin=lambda tensors, config, images: torch_model.polygon_classifier(tensors, images),
    ),
)
"""Every network that can be converted."""


def of_config(config: Any) -> Network:
    """The network of a configuration."""
    return next(network for network in NETWORKS if isinstance(config, network.config))


def recognise(names: Iterable[str], weights: str) -> tuple[Network, str, str]:
    """Tell which network a file holds, and where its weights are.

    Args:
        names: of its tensors.
        weights: "ema" or "raw", which to take where there are both.

    Returns:
        The network, which weights were found, and what their names begin with.

    Raises:
        ValueError: no known network, or not these weights.
    """
    names = list(names)
    found = [
        (network, kind, prefix)
        for network in NETWORKS
        for kind, prefix in network.prefixes
        if any(name.startswith(prefix + network.sign) for name in names)
    ]
    if not found:
        titles = ", ".join(network.title for network in NETWORKS)
        raise ValueError(f"its names are those of no network that is known here: {titles}")
    for choice in found:
        if choice[1] in (weights, "only"):
            return choice
    there = [kind for _, kind, _ in found]
    raise ValueError(f"it has no {weights} weights; choose by --weights from {there}")


def configure(
    network: Network,
    shapes: Mapping[str, tuple[int, ...]],
    base: Any | None,
    origin: str,
    given: Mapping[str, Any],
) -> Any:
    """The configuration of a network: what its tensors tell, and what has to be said.

    Args:
        network: which.
        shapes: of its tensors, by name without prefix.
        base: a configuration that the tensors must agree with, or None.
        origin: where ``base`` comes from, for errors.
        given: values of fields that the tensors do not tell; they override ``base``.

    Raises:
        ValueError: base and tensors contradict each other (both are named), a value is missing or
            needless, or the architecture is impossible.
    """
    needless = given.keys() - set(network.untold)
    if needless:
        raise ValueError(f"a {network.title} takes no {sorted(needless)}")
    told = network.infer(shapes)
    if base is None:
        missing = [name for name in network.untold if name not in given]
        if missing:
            fitting = [name for name, preset in network.presets.items() if _agrees(preset, told)]
            flags = ", ".join(f"--{name.replace('_', '-')}" for name in missing)
            raise ValueError(
                f"its tensors do not tell everything: give {flags}, or --preset; "
                f"presets that fit the tensors: {fitting or 'none'}"
            )
        return network.config(**told, **given)
    if not _agrees(base, told):
        lists = [
            ", ".join(
                f"{name}={values[name]}" for name in told if getattr(base, name) != told[name]
            )
            for values in (vars(base), told)
        ]
        raise ValueError(f"{origin} says {lists[0]}, but its tensors say {lists[1]}")
    return network.config(**vars(base) | given)


def _agrees(config: Any, told: Mapping[str, Any]) -> bool:
    return all(getattr(config, name) == value for name, value in told.items())
