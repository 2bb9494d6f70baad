"""``ipr-jax train NAME``."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import jax
import numpy as np
import tyro
from jax.experimental import multihost_utils

from ipr_jax.cli.hosts import HostOptions
from ipr_jax.cli.options import digest, refuse_idle, same_folder
from ipr_jax.cli.terminal import naming, progress, say, signals
from ipr_jax.core import check
from ipr_jax.interrupts import interruptible
from ipr_jax.tasks import get_task, missing
from ipr_jax.training import RECIPES, trainer


def command_of(name: str) -> Callable[..., Path]:
    """The command ``ipr-jax train NAME``, with the settings of the recipe as defaults.

    Raises:
        ValueError: no such recipe; lists those that there are.
    """
    if name not in RECIPES:
        known = ", ".join(RECIPES)
        raise ValueError(f"no recipe to train {name!r}; known: {known}")

    def command(
        config: Annotated[trainer.TrainConfig, tyro.conf.arg(name="")] = RECIPES[name].training,
        out: Path | None = None,
        files: Path | None = None,
        num_workers: int = 0,
        shard_params: bool = False,
        hosts: Annotated[HostOptions, tyro.conf.arg(name="")] = HostOptions(),
    ) -> Path:
        return train(name, config, out, files, num_workers, shard_params, hosts)

    command.__doc__ = (
        f"Train by the recipe {name}; started again with the same settings, it goes on.\n\n"
        "Args:\n    config: how to train.\n"
        "    out: the folder of the run; by default runs/NAME, with other settings one beside it.\n"
        "    files: folder with MNIST, for the recipe that needs it (elsewhere: data).\n"
        "    num_workers: processes that make the batches, 0 = a thread; results are the same.\n"
        "    shard_params: share one copy of the parameters among the devices, not one each.\n"
        "    hosts: the processes that share every batch."
    )
    return command


def train(
    name: str,
    config: trainer.TrainConfig,
    out: Path | None = None,
    files: Path | None = None,
    num_workers: int = 0,
    shard_params: bool = False,
    hosts: HostOptions = HostOptions(),
) -> Path:
    """Run ``ipr-jax train NAME``.

    Args:
        name: of a recipe.
        config: how to train.
        out: the folder of the run; by default runs/NAME, with other settings one beside it.
        files: folder with MNIST, for the recipe that needs it.
        num_workers: processes that make the batches, 0 = a thread.
        shard_params: whether the devices share one copy of the parameters, instead of one each.
        hosts: the processes that share every batch.

    Returns:
        The folder of the trained model.

    Raises:
        ValueError: bad arguments, or the folder holds another run.
        FloatingPointError: a loss is not finite; names the step.
        ConnectionError: other processes cannot be reached.
    """
    hosts.join()
    check.count("num_workers", num_workers, least=0)
    recipe = RECIPES[name]
    of = recipe.task or name
    with naming({"data": "files"}):
        if lacks := missing(of, data=files, classifier=None):
            raise ValueError(f"the task {of} needs --files ({lacks['data']})")
        task = get_task(of, data=files)
    task.training_batch(config.seed, np.arange(1))  # refuses damaged files
    if config.noise_levels != "mean-beta":
        refuse_idle(config, "--noise-levels mean-beta alone has a sharpness", "sharpness")
    folder = out or same_folder(Path("runs") / name, config, recipe.training)
    if out is None and files is not None:
        folder = folder.with_name(f"{folder.name}-{digest(str(files.absolute()))}")
    remains = f"started again, it goes on from the last checkpoint in {folder}, if there is one"
    with contextlib.ExitStack() as stack:
        stack.enter_context(interruptible(remains))
        if jax.process_count() > 1:  # they agree on a step
            preempted = multihost_utils.reached_preemption_sync_point
        else:
            preempted = stack.enter_context(signals())
        update = stack.enter_context(progress("compiling"))
        lines = trainer.train(
            task,
            recipe.model,
            config,
            folder,
            num_workers,
            shard_params=shard_params,
            preempted=preempted,
        )
        said = "it was finished before"
        for line in lines:
            step, loss = int(line["step"]), f"loss {line['total']:.4f}"
            rate = config.batch_size / line["seconds_per_step"]
            last = f" of {config.num_steps}" if config.minutes is None else ""
            said = f"step {step}{last}, {loss}, {rate:.3g} images/s"
            over = 0 if config.minutes is None else line["seconds"] / (60 * config.minutes)
            share = min(1, max(over, step / config.num_steps))
            update(said, round(10_000 * share), 10_000, None)
    say(said)
    say(f"written: {folder / 'model'}")
    return folder / "model"
