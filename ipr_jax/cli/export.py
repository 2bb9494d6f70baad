"""``ipr-jax export MODEL OUT``."""

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from ipr_jax.cli.options import PassOptions
from ipr_jax.cli.terminal import say
from ipr_jax.methods import export
from ipr_jax.models import checkpoint, get_precision
from ipr_jax.runtime import files


@dataclasses.dataclass(frozen=True)
class ExportOptions(PassOptions):
    """The options of ``ipr-jax export MODEL OUT``.

    Attributes:
        task: the benchmark whose settings hold where nothing is given: mini-sudoku, digits-sudoku,
            mnist-sudoku, even-pixels, counting-polygons or counting-stars; by default the one that
            the model was trained on, if it tells.
        precision: of the network: float32, tf32 (a GPU's, float32 elsewhere) or bfloat16.
    """

    task: str | None = None
    precision: str = "float32"


def export_program(
    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")],
    out: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OUT")],
    options: Annotated[ExportOptions, tyro.conf.arg(name="")] = ExportOptions(),
) -> None:
    """Write first pass and refinement as one file that runs without this library.

    The file is a program of JAX for CPU, GPU and TPU, with the weights inside, for any batch size:
    jax.export.deserialize(bytes).call(key_data, image, editable).

    Args:
        model: a shipped model or a model folder.
        out: a new file.
        options: how to refine.
    """
    files.refuse_existing(out)
    get_precision(options.precision)
    network, provenance = checkpoint.open_model(model)
    task = options.task or provenance.get("task")
    if task is None:
        raise ValueError(f"{model} does not tell its task, give --task")
    program = export.serialize(network, options.chosen(task), options.precision)
    with files.whole(out) as part:
        part.write_bytes(program)
    say(f"written: {out} ({len(program) / 2**20:,.1f} MiB)")
