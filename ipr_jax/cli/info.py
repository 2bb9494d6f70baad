"""``ipr-jax info MODEL`` and ``ipr-jax info --environment``."""

import dataclasses
import json
from typing import Annotated

import jax
import tyro
from flax import nnx
from rich.table import Table

from ipr_jax.cli.terminal import say, show
from ipr_jax.models import MODELS
from ipr_jax.models.networks import inputs, open_network
from ipr_jax.runtime import environment as machine
from ipr_jax.runtime import files, flops


def info(
    model: Annotated[tyro.conf.Positional[str | None], tyro.conf.arg(metavar="MODEL")] = None,
    environment: bool = False,
) -> None:
    """Print what a model folder holds: architecture, parameters, arithmetic, provenance.

    Args:
        model: a shipped model or a model folder.
        environment: print what the machine has instead: versions, platform, devices.

    Raises:
        ValueError, FileNotFoundError: there is no such model, or neither or both are given.
    """
    if environment == (model is not None):
        raise ValueError("name a MODEL or give --environment")
    if model is None:
        say(machine.text())
        return
    network, provenance = open_network(model)
    config = network.config
    rows = {"network": type(network).__name__}
    rows |= {name: str(value) for name, value in dataclasses.asdict(config).items()}
    if type(config) in MODELS:
        h, w = config.grid
        one = "one for the image" if h * w == 1 else f"{h} x {w}, one per patch"
        rows["noise levels"] = one
    parameters = jax.tree.leaves(nnx.state(network, nnx.Param))
    rows["parameters"] = f"{sum(leaf.size for leaf in parameters):,}"
    number = flops.count(lambda network, given: network(**given), network, inputs(config, 1))
    rows["per evaluation of an image"] = f"{number / 1e9:,.3f} GFLOP"
    for name, value in provenance.items():
        rows[name] = value if isinstance(value, str) else json.dumps(value)
    table = Table(box=None, show_header=False)
    table.add_column(overflow="fold")
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(files.printable(name), files.printable(value))
    show(table)
