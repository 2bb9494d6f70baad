"""Small runs that tests stop, damage and kill: of samples, and, as a program, of training."""

import hashlib
import itertools
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from conftest import TINY
from flax import nnx

from ipr_jax import Prediction
from ipr_jax.cli.hosts import HostOptions
from ipr_jax.core import patches
from ipr_jax.methods.ipr import Refinement
from ipr_jax.models import checkpoint
from ipr_jax.studies import shards
from ipr_jax.studies.shards import Run, Storage
from ipr_jax.tasks import get_task
from ipr_jax.training import trainer

TASK = get_task("mini-sudoku")
SETTINGS = {"what": "a test"}
EXPERIMENT = Refinement(iterations=3)
EVERY = Storage(shard_size=4, save_minutes=0)


def fake(z, t):
    """An elementwise denoiser: the same bits in a batch of any size."""
    velocity = 0.9 * z * patches.expand(t, 8) + 0.1
    means = patches.patch_mean(jnp.abs(z[..., 0]), 8)
    return Prediction(velocity, 0.4 + 0.2 * jnp.tanh(z), 0.1 + means)


def source(indices):
    return TASK.test_batch(5, indices)


def run_of(**changes):
    given = {
        "task": TASK,
        "denoise": fake,
        "source": source,
        "experiment": EXPERIMENT,
        "samples": 10,
        "seed": 7,
        "storage": EVERY,
    }
    return Run(**given | changes)


def bits(folder):
    """The digests of all final files."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def done(folder, **changes):
    return list(shards.refine(run_of(**changes), folder, SETTINGS))


def whole(folder):
    parts = list(shards.read(folder))
    return {
        name: np.concatenate([part[name] for part in parts], 1 if parts[0][name].ndim == 2 else 0)
        for name in parts[-1]
    }


def lines_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def stopped_after(number, folder, **changes):
    """Begin, and close after some messages."""
    run = shards.refine(run_of(**changes), folder, SETTINGS)
    said = list(itertools.islice(run, number))
    run.close()
    return said


def damage(path, how, at=0.5):
    """Cut a file, or flip a bit of it, at a share of its bytes."""
    data = bytearray(path.read_bytes())
    at = int(at * len(data))
    if how == "flipped":
        data[at] ^= 16
    path.write_bytes(data if how == "flipped" else data[:at])


TRAINING = trainer.TrainConfig(
    num_steps=8,
    batch_size=4,
    warmup_steps=1,
    noise_levels="shared",
    log_every=1,
    save_every=2,
)


def train(folder, **options):
    with jax.numpy_dtype_promotion("standard"):  # Optax mixes integers and floats
        yield from trainer.train(TASK, TINY, TRAINING, folder, **options)


def compile_once(monkeypatch):
    """Let trainings of the same settings on the same devices share one compiled step."""
    make, made = trainer.make_train_step, {}

    def shared(model, config, placed):
        which = model, config, tuple(jax.tree.leaves(placed))
        if which not in made:
            made[which] = make(model, config, placed)
        return made[which]

    monkeypatch.setattr(trainer, "make_train_step", shared)


def trained(folder):
    """All that a training leaves but its times: the log, the weights."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    for line in lines:
        del line["seconds_per_step"], line["seconds"]
    model = checkpoint.load(folder / "model")
    return lines, [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(nnx.state(model))]


if __name__ == "__main__":
    out, *others = sys.argv[1:]
    if others:
        HostOptions(coordinator=others[0], num_processes=2, process_id=int(others[1])).join()
    for _ in train(Path(out)):
        pass
    if jax.process_index() == jax.process_count() - 1:  # each reads for itself
        checkpoint.load(Path(out) / "model")
