"""What the published checkpoints hold: for each network its names, its table, its architecture."""

import dataclasses
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from convert import classifiers, srm, torch_model
from convert.mapping import Entry
from convert.torch_file import State
from ipr_jax.models import PRESETS, ModelConfig
from ipr_jax.tasks.mnist_classifier import MNISTConfig
from ipr_jax.tasks.polygon_classifier import PolygonConfig

WRAPPERS = (
    *("_orig_mod", "module", "_forward_module"),  # torch.compile, DDP and DeepSpeed
    *("_fsdp_wrapped_module", "_checkpoint_wrapped_module"),  # FSDP, recomputed activations
)
"""What wrappers of PyTorch insert in the names of the modules that they wrap."""

COUNTERS = {
    "num_batches_tracked": "counts the batches of training",
    **dict.fromkeys(("n_averaged", "num_updates", "initted", "step"), "counts the averaged steps"),
}
"""Why a tensor is left out, by the last part of its name."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Format:
    """How the files of PyTorch hold a network.

    Attributes:
        title: what to call it.
        config: the class of its configuration.
        signs: how names of this network begin; together, no other has them.
        table: its parameters.
        infer: attributes of the configuration, from the shapes of its tensors.
        presets: the released architectures, by name.
        untold: fields that the tensors do not tell and that may be given.
        twin: the same in PyTorch, ``(tensors, config, **inputs) -> outputs by name``, all of them
            NumPy arrays, images channel first.
    """

    title: str
    config: type
    signs: tuple[str, ...]
    table: Callable[[Any], list[Entry]]
    infer: Callable[[Mapping[str, tuple[int, ...]]], dict[str, Any]]
    presets: Mapping[str, Any]
    untold: tuple[str, ...] = ()
    twin: Callable[..., dict[str, np.ndarray]]


FORMATS = (
    Format(
        title="SRM denoiser",
        config=ModelConfig,
        signs=("model.encoder.",),
        table=srm.table,
        infer=srm.infer,
        presets=srm.RELEASES | PRESETS,
        untold=("image_size", "patch_size", "head_width"),
        twin=torch_model.srm,
    ),
    Format(
        title="MNIST classifier",
        config=MNISTConfig,
        signs=("conv1.", "fc1."),
        table=classifiers.mnist_table,
        infer=lambda shapes: {},
        presets={},
        twin=torch_model.mnist_classifier,
    ),
    Format(
        title="polygon classifier",
        config=PolygonConfig,
        signs=("fc.heads.",),
        table=classifiers.polygon_table,
        infer=classifiers.infer_polygon,
        presets=classifiers.VARIANTS,
        twin=torch_model.polygon_classifier,
    ),
)
"""Every network that can be converted."""


class Found(NamedTuple):
    """The weights of a network in a file.

    Attributes:
        layout: the format of the network.
        weights: which they are: "ema" or "raw", or "only" where nothing tells.
        state: where the dict is that holds them.
        prefix: what their names begin with, but for what wrappers insert.
    """

    layout: Format
    weights: str
    state: State
    prefix: str

    def __str__(self) -> str:
        """Where they are, for people."""
        return f"{self.prefix or self.layout.title} {place(self.state)}"


def of_config(config: Any) -> Format:
    """The format of a configuration's network.

    Raises:
        ValueError: it has none; names those that have.
    """
    for layout in FORMATS:
        if isinstance(config, layout.config):
            return layout
    known = ", ".join(layout.config.__name__ for layout in FORMATS)
    raise ValueError(f"PyTorch has the networks of {known}, not of {type(config).__name__}")


def first(names: Sequence[str], most: int = 3) -> str:
    """The first names, and whether there are more."""
    return ", ".join([*names[:most], *(["..."] if len(names) > most else [])])


def place(state: State) -> str:
    """Where a dict is in a file, for people."""
    return f"in {'/'.join(state)}" if state else "at the top of the file"


def unwrapped(name: str) -> str:
    """The name of a tensor without what wrappers insert."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def recognise(states: Mapping[State, Sequence[str]], weights: str) -> tuple[Found, list[Found]]:
    """Tell which network a file holds, and where its weights are.

    Args:
        states: the names in every dict of the file.
        weights: "ema" or "raw", which to take where there are both.

    Returns:
        The weights to take, and all that were found.

    Raises:
        ValueError: no known network, not these weights, or several of them.
    """
    found = [
        Found(layout, _which(state, prefix, names), state, prefix)
        for state, wrapped in states.items()
        for names in [set(map(unwrapped, wrapped))]
        for layout in FORMATS
        for prefix in sorted(_prefixes(layout, names))
    ]
    if not found:
        titles = ", ".join(layout.title for layout in FORMATS)
        largest = sorted(states.items(), key=lambda item: -len(item[1]))[:4]
        shown = [f"{place(state)}: {first(names)}" for state, names in largest if names]
        raise ValueError(
            f"its names are of no known network ({titles}); {'; '.join(shown) or 'none'}"
        )
    if any(each.weights == "ema" for each in found):
        found = [each._replace(weights=each.weights.replace("only", "raw")) for each in found]
    fitting = [each for each in found if each.weights in (weights, "only")]
    if len(fitting) > 1:
        places = "; ".join(map(str, fitting))
        raise ValueError(f"it holds {len(fitting)} networks, save one in a file alone: {places}")
    if not fitting:
        there = ", ".join(each.weights for each in found)
        raise ValueError(f"it has no {weights} weights, only {there}")
    return fitting[0], found


def _prefixes(layout: Format, names: Collection[str]) -> set[str]:
    """What names of a network begin with, the same before every sign of it."""
    return set.intersection(
        *(
            {name[:at] for name in names if (at := f".{name}".find(f".{sign}")) >= 0}
            for sign in layout.signs
        )
    )


def _which(state: State, prefix: str, names: Collection[str]) -> str:
    """Which weights begin with a prefix, by its words and those on the way to their dict."""
    words = re.findall("[a-z]+", ".".join((*state, prefix)).lower())
    if "online" in words:
        return "raw"
    if "ema" in words or f"{prefix}n_averaged" in names:
        return "ema"
    return "raw" if words[-1:] == ["denoiser"] else "only"


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
    needless = [name for name in given if name not in layout.untold]
    if needless:
        raise ValueError(f"{layout.title}: {', '.join(needless)} cannot be given")
    told = layout.infer(shapes)
    if base is None:
        missing = [name for name in layout.untold if name not in given]
        if missing or not told.keys() <= layout.config.__dataclass_fields__.keys():
            fitting = [
                name for name, preset in layout.presets.items() if not differences(preset, told)
            ]
            raise ValueError(
                f"its tensors do not tell everything: give {', '.join(missing)}"
                f"{', or ' if missing else ''}--preset; presets that fit the tensors: "
                f"{', '.join(fitting) or 'none'}"
            )
        return layout.config(**told, **given)
    wrong = differences(base, told)
    if wrong:
        raise ValueError(f"{origin} says {wrong[0]}, but its tensors say {wrong[1]}")
    return dataclasses.replace(base, **given)


def as_typed(text: str) -> str:
    """A text with the fields that can be given as the options that give them."""
    for layout in FORMATS:
        for name in layout.untold:
            text = re.sub(rf"\b{name}\b", f"--{name.replace('_', '-')}", text)
    return text


def differences(config: Any, values: Mapping[str, Any]) -> tuple[str, str] | None:
    """Where a configuration has other values: its own and the others, for an error; or None."""
    wrong = [name for name, value in values.items() if getattr(config, name) != value]
    if not wrong:
        return None
    return (
        ", ".join(f"{name}={getattr(config, name)}" for name in wrong),
        ", ".join(f"{name}={values[name]}" for name in wrong),
    )
