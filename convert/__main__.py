"""The command line ``ipr-jax convert``, also as ``python -m convert``."""

import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.table import Table
from rich.text import Text

from convert import conversion, formats
from ipr_jax.cli.terminal import console, one_line_errors, unraisable
from ipr_jax.runtime import files

Checkpoint = Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="CHECKPOINT")]
Model = Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
Out = Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OUT")]

TOLERANCE = 1e-4
"""Largest difference that ``verify`` accepts, relative to the largest magnitude or 1."""


def say(text: str) -> None:
    """Print one line, whatever the names in it."""
    console.print(Text(files.printable(text)), soft_wrap=True)


@dataclass(frozen=True)
class ImportArgs:
    """The options of ``ipr-jax convert import``.

    Attributes:
        checkpoint: a Lightning .ckpt, a .pt or .pth state dict, or a .safetensors file.
        out: the new model folder.
        preset: the release that it is: ep, ep_4, ep_4_bs050, ep_4_bs100, cp_ffhq, cp_ffhq_8,
            ms1000, ms1000_28, ms1000_28_df; or an architecture of ipr_jax by name; for a classifier
            of counts, polygons or stars.
        weights: the averaged weights or those of the last step, where a file has both.
        image_size: height and width in pixels, where no preset gives them.
        patch_size: pixels per side of a patch, that of the image for an image-level model.
        head_width: channels per attention head.
        allow_nonfinite: convert weights that are not finite, too.
    """

    checkpoint: Checkpoint
    out: Out
    preset: str | None = None
    weights: Literal["ema", "raw"] = "ema"
    image_size: tuple[int, int] | None = None
    patch_size: int | None = None
    head_width: int | None = None
    allow_nonfinite: bool = False


def import_(args: Annotated[ImportArgs, tyro.conf.arg(name="")]) -> None:
    """Convert a PyTorch checkpoint to a model folder.

    PyTorch is not needed, and nothing in the file is run.
    """
    flags = {name: getattr(args, name) for name in ("image_size", "patch_size", "head_width")}
    read, config = conversion.import_checkpoint(
        args.checkpoint,
        args.out,
        weights=args.weights,
        preset=args.preset,
        given={name: value for name, value in flags.items() if value is not None},
        allow_nonfinite=args.allow_nonfinite,
    )
    which = "" if read.weights == "only" else f", {read.weights} weights"
    say(f"{read.layout.title}{which}: {len(read.tensors)} tensors used")
    for note in read.notes:
        say(note)
    for reason, names in read.ignored.items():
        say(f"ignored ({reason}): {len(names)}: {formats.first(names)}")
    say(str(config))
    say(f"written: {args.out}")


def export(model: Model, out: Out) -> None:
    """Write a model as safetensors under the names that it has in PyTorch.

    Args:
        model: a shipped model or a model folder.
        out: the new file, *.safetensors.
    """
    count = conversion.export(model, out)
    say(f"written: {out}, {count} tensors")


def verify(
    checkpoint: Checkpoint,
    model: Model,
    batch: int = 2,
    seed: int = 0,
) -> None:
    """Compare a converted model with PyTorch, which must be installed, on random inputs.

    Args:
        checkpoint: what was converted.
        model: the model folder that came of it.
        batch: how many inputs.
        seed: of the inputs.
    """
    found = conversion.verify(checkpoint, model, batch=batch, seed=seed)
    table = Table(box=None, header_style="bold")
    for title in ("output", "largest difference", "largest magnitude"):
        table.add_column(title, justify="left" if title == "output" else "right")
    for name, (difference, magnitude) in found.items():
        table.add_row(Text(files.printable(name)), f"{difference:.1e}", f"{magnitude:.2g}")
    console.print(table)
    wrong = [name for name, (d, m) in found.items() if not d <= TOLERANCE * max(1, m)]
    if wrong:
        raise ValueError(
            f"{', '.join(wrong)} must agree to {TOLERANCE:g} of 1 or of the largest magnitude"
        )


COMMANDS = {"import": import_, "export": export, "verify": verify}
"""All commands."""


def main() -> None:
    """Entry point of ``python -m convert``: refusals end with one clear line, exit code 2."""
    for name in ("absl", "asyncio"):  # by which Orbax also logs what it raises
        logging.getLogger(name).setLevel(logging.CRITICAL)
    sys.unraisablehook = unraisable
    with one_line_errors():
        tyro.extras.subcommand_cli_from_dict(COMMANDS, prog="python -m convert")


if __name__ == "__main__":
    main()
