"""The published PyTorch sampler against ``ipr_jax``: same weights, settings, device and dtype.

``python -m benchmarks.peers --ipr CLONE --torch-python PYTHON`` runs the network and the sampler of
a clone of the IPR repository in a process of its own, in turn with ours. The published sampler
takes one sample at a time, so the networks are compared at the same batch as well. Both comparisons
are made with the network as published and with the same network tuned: its noise levels embedded
once per resolution instead of once per block, channels last, compiled. All must predict the same
first. What the published sampler takes to score samples between iterations is left out, and its
garbage collections find little to search.
"""

import contextlib
import dataclasses
import filecmp
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx
from rich.table import Table

import ipr_jax
from benchmarks.timing import seconds, spread
from convert import mapping, srm
from ipr_jax.cli.options import plain
from ipr_jax.cli.terminal import console, one_line_errors
from ipr_jax.core import check
from ipr_jax.interrupts import interruptible
from ipr_jax.methods import selection
from ipr_jax.models import PRESETS, ModelConfig
from ipr_jax.runtime import environment, files, flops

RELEASED = ("even-pixels", "counting-polygons", "mnist-sudoku")
"""The presets that the published classes can build."""

NEEDED = {
    "ipr": (
        *("src/sampler/ipr_sampler.py", "src/model/wrapper.py"),
        "srmbench/srmbench/evaluations/__init__.py",
    ),
    "srm": ("src/model/wrapper.py",),
}
"""The files that tell a clone."""

SIDES = ("published", "tuned")
"""The networks of ``benchmarks/published.py``."""

PATHS = ("ipr", "srm", "torch_python", "out")
"""Arguments that say nothing of the results; the commits of the clones do."""
SMOKE: dict[str, Any] = {"batch": 1, "iterations": 1, "steps_per_patch": 1, "repeats": 2}
"""Settings to see it work."""
MAX_LOAD = 0.5
"""Load average per core above which timings mean little."""
TOLERANCE = 1e-4
"""Largest difference of the first predictions, relative where they exceed 1."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    """Time the published sampler against this one.

    Attributes:
        ipr: a clone of the IPR repository.
        srm: a clone of the SRM repository, whose network is compared with IPR's file by file.
        torch_python: the Python that has PyTorch and the packages of the clone, with a torchvision
            that has ``write_video`` (0.21 does, 0.28 does not); ``torch.compile`` needs a C++
            compiler, or on a GPU Triton.
        preset: even-pixels, counting-polygons or mnist-sudoku.
        batch: samples at once, in the networks and in our sampler; the published sampler takes
            them one by one.
        iterations: of refinement, after the first pass.
        steps_per_patch: of both passes; the paper's are 30, 10 and (first pass) 3.
        overlap: of both passes, in [0, 1].
        ratio: share of the patches that an iteration regenerates, in (0, 1].
        stochasticity: in [0, 1].
        dtype: float32, or on a GPU bfloat16 (autocast in PyTorch).
        calls: evaluations of the batch in one timing of a bare network.
        repeats: timed rounds, after one warm-up of each.
        smoke: only see it work: 1 sample, 1 iteration, 1 step per patch, 2 rounds.
        busy: time even though the machine is busy.
        out: a new file for all results as JSON.
    """

    ipr: Path
    srm: Path | None = None
    torch_python: Path = Path(sys.executable)
    preset: str = "even-pixels"
    batch: int = 8
    iterations: int = 2
    steps_per_patch: int = 3
    overlap: float = 0.9
    ratio: float = 0.25
    stochasticity: float = 0.5
    dtype: str = "float32"
    calls: int = 5
    repeats: int = 5
    smoke: bool = False
    busy: bool = False
    out: Path | None = None


Round = Mapping[str, Mapping[str, float]]
"""Seconds per network evaluation of one sample, measured in turn.

First by what is timed: "sampler", the published one a sample at a time, ours B at once; "network"
alone, B at once. Then by side: those of ``SIDES``, "ours".
"""


def factors(times: Round, operations: Mapping[str, int], side: str) -> dict[str, float]:
    """How many times as fast ``ipr_jax`` is as a side, and where that comes from.

    Args:
        times: of one round.
        operations: FLOPs of one network evaluation of one sample, by side.
        side: one of ``SIDES``.

    Returns:
        sampler = network * around; network, at the same batch, = arithmetic (fewer FLOPs: each
        distinct noise level is embedded once) * rate (FLOP/s); around is what a sampler adds to its
        network, the batch it takes included.
    """
    sampler, network = (times[what][side] / times[what]["ours"] for what in ("sampler", "network"))
    arithmetic = operations[side] / operations["ours"]
    return {
        "sampler": sampler,
        "network": network,
        "arithmetic": arithmetic,
        "rate": network / arithmetic,
        "around": sampler / network,
    }


def summarise(rounds: Sequence[Round], operations: Mapping[str, int]) -> dict[str, Any]:
    """What the rounds say; every ratio is taken within a round.

    Args:
        rounds: at least one.
        operations: FLOPs of one network evaluation of one sample, by side.

    Returns:
        JSON data: seconds per evaluation as in a ``Round``, the factors by side; every number as
        its median, min and max.
    """
    each = {side: [factors(times, operations, side) for times in rounds] for side in SIDES}
    return {
        "seconds_per_evaluation": {
            what: {side: spread([times[what][side] for times in rounds]) for side in sides}
            for what, sides in rounds[0].items()
        },
        "times_as_fast": {
            side: {name: spread([one[name] for one in found]) for name in found[0]}
            for side, found in each.items()
        },
    }


def check_clone(path: Path, kind: str) -> None:
    """Refuse what is no clone.

    Raises:
        FileNotFoundError: a file is missing, naming it.
    """
    for name in NEEDED[kind]:
        if not (path / name).is_file():
            raise FileNotFoundError(
                f"--{kind} must be a clone of its repository, {path} has no {name}"
            )


def check_args(args: Args) -> str:
    """Refuse before anything is started.

    Returns:
        What PyTorch calls the device of JAX: cpu or cuda.

    Raises:
        ValueError, OSError: an argument is out of range, a clone is none, the machine is busy, or
            there is no such device in PyTorch.
    """
    check_clone(args.ipr, "ipr")
    if args.srm is not None:
        check_clone(args.srm, "srm")
    if args.preset not in RELEASED:
        raise ValueError(f"unknown preset {args.preset!r}; known: {', '.join(RELEASED)}")
    for name in ("batch", "iterations", "calls", "repeats"):
        check.count(name, getattr(args, name))
    selection.region_sizes(1, args.ratio)
    if args.out is not None:
        files.refuse_existing(args.out)
    platform = jax.default_backend()
    if platform not in ("cpu", "gpu"):
        raise ValueError(f"both sides must run on one device, cpu or gpu; JAX runs on {platform}")
    if args.dtype not in ("float32", *(["bfloat16"] if platform == "gpu" else [])):
        raise ValueError(f"dtype must be float32, or bfloat16 on a GPU, got {args.dtype!r}")
    if load_per_core() > MAX_LOAD and not args.busy:
        raise ValueError(
            f"the load average per core must be at most {MAX_LOAD} for timings to mean something, "
            f"it is {load_per_core():.1f}; wait, or give --busy"
        )
    return "cpu" if platform == "cpu" else "cuda"


def load_per_core() -> float:
    """The load average of the last minute, per core."""
    return os.getloadavg()[0] / (os.cpu_count() or 1)


@jax.jit
def predict(model: ipr_jax.SRM, z: jax.Array, t: jax.Array) -> ipr_jax.Prediction:
    """Our bare network, compiled."""
    return model(z, t)


def random_model(config: ModelConfig, dtype: Any) -> ipr_jax.SRM:
    """A network with random weights; those of a new one are 0 where they make its output 0."""
    graph, abstract = nnx.split(
        nnx.eval_shape(lambda: ipr_jax.SRM(config, dtype=dtype, rngs=nnx.Rngs(0)))
    )
    rng = np.random.default_rng(0)

    def draw(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        normal = rng.standard_normal(leaf.shape, np.float32)
        if len(leaf.shape) == 1:
            return jnp.asarray(1 + 0.1 * normal)
        return jnp.asarray(normal / math.prod(leaf.shape[:-1]) ** 0.5)

    return nnx.merge(graph, jax.tree.map(draw, abstract))


Ask = Callable[..., dict[str, Any]]
"""Sends its keyword arguments to the other process as JSON; returns the answer."""


@contextlib.contextmanager
def start(python: Path, log: Path) -> Iterator[Ask]:
    """The process of the published sampler, ``benchmarks/published.py``, until the context ends.

    Args:
        python: what runs it.
        log: a new file for what it prints.

    Yields:
        What asks it; the first request says what to build, every other one what to ``do``. It
        raises ChildProcessError if the process fails, with its last words.

    Raises:
        OSError: there is no such Python.
    """
    variables = {name: text for name, text in os.environ.items() if name != "PYTHONPATH"}
    with (
        log.open("w") as errors,
        subprocess.Popen(
            [str(python), str(Path(__file__).with_name("published.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=variables | {"DEBUG": "false"},
        ) as process,
    ):
        stdin, stdout = process.stdin, process.stdout
        assert stdin is not None
        assert stdout is not None

        def ask(**request: Any) -> dict[str, Any]:
            with contextlib.suppress(BrokenPipeError):
                print(json.dumps(request), file=stdin, flush=True)
            if answer := stdout.readline():
                return json.loads(answer)
            code = process.wait()
            said = [line for line in log.read_text().splitlines() if line.strip()]
            raise ChildProcessError(
                f"the published sampler does not run in {python}: "
                f"{said[-1] if said else f'exit code {code}'} (--torch-python names a Python with "
                "PyTorch and the packages in the clone's requirements.txt)"
            )

        yield ask


def check_agreement(
    model: ipr_jax.SRM, ask: Ask, side: str, batch: int, folder: Path
) -> dict[str, float]:
    """Compare first predictions in float32, on random images and noise levels.

    Args:
        model: ours, which computes in float32.
        ask: the process that has a network with the same weights.
        side: which one of ``SIDES``.
        batch: of the images.
        folder: for the arrays.

    Returns:
        The largest differences by output, relative where outputs exceed 1.

    Raises:
        ValueError: one is above ``TOLERANCE`` or not finite.
    """
    config, rng = model.config, np.random.default_rng(1)
    z = rng.standard_normal((batch, *config.image_shape), np.float32)
    t = rng.random((batch, *config.grid), np.float32)
    t[0, 0] = 0
    t[-1, -1] = 1

    def pixels(patches: np.ndarray) -> np.ndarray:
        return patches.repeat(config.patch_size, 1).repeat(config.patch_size, 2)

    np.savez(folder / "given.npz", allow_pickle=False, z=np.moveaxis(z, -1, 1), t=pixels(t))
    given, out = (str(folder / name) for name in ("given.npz", "theirs.npz"))
    ask(do="predict", side=side, given=given, out=out)
    with jax.default_matmul_precision("highest"):
        ours = predict(model, jnp.asarray(z), jnp.asarray(t))
    arrays = {
        "velocity": np.moveaxis(np.asarray(ours.velocity), -1, 1),
        "variance_fraction": np.moveaxis(np.asarray(ours.variance_fraction), -1, 1),
        "sigma": pixels(np.asarray(ours.sigma))[:, None],
    }
    differences = {}
    with np.load(out) as theirs:
        for name, array in arrays.items():
            scale = np.maximum(1, np.abs(theirs[name]))
            differences[name] = float((np.abs(array - theirs[name]) / scale).max())
    if not all(difference <= TOLERANCE for difference in differences.values()):
        raise ValueError(
            f"first predictions must agree within {TOLERANCE}, {side} and ours differ by "
            f"{differences}"
        )
    return differences


def sampler_of(model: ipr_jax.SRM, args: Args) -> Callable[[], tuple[Any, int]]:
    """What is timed: a first pass and the refinement of images without clues.

    Returns:
        A function without arguments; it gives the images and the evaluations per sample.

    Raises:
        ValueError: a setting is out of range.
    """
    config = model.config
    sampling = ipr_jax.Sampling(
        steps_per_patch=args.steps_per_patch,
        overlap=args.overlap,
        stochasticity=args.stochasticity,
    )
    keys = ipr_jax.sample_keys(jax.random.key(0), args.batch)
    image = jnp.zeros((args.batch, *config.image_shape))
    editable = np.ones((args.batch, *config.grid), bool)
    one = ipr_jax.data_mesh(jax.devices()[:1])

    def run() -> tuple[Any, int]:
        first = ipr_jax.generate(model, keys, image, editable, sampling, mesh=one)
        refined = ipr_jax.refine(
            model,
            keys,
            jnp.clip(first.image, -1, 1),  # random weights overshoot
            editable,
            iterations=args.iterations,
            ratio=args.ratio,
            sampling=sampling,
            mesh=one,
        )
        return refined.image.block_until_ready(), int(first.nfe[0] + refined.nfe[:, 0].sum())

    return run


def measure(args: Args, device: str) -> dict[str, Any]:
    """Build both sides, see that they agree, and time them in turn.

    Returns:
        JSON data: all that was found, with the settings and versions of both sides.

    Raises:
        ValueError, OSError: a setting is out of range, the published sampler does not run, or the
            sides do not agree.
    """
    config, load = PRESETS[args.preset], load_per_core()
    exact = random_model(config, jnp.float32)
    model = exact if args.dtype == "float32" else random_model(config, jnp.dtype(args.dtype))
    sample = sampler_of(model, args)
    z = jnp.zeros((args.batch, *config.image_shape))
    t = jnp.full((args.batch, *config.grid), 0.5)

    def evaluate() -> list[ipr_jax.Prediction]:
        return [predict(model, z, t) for _ in range(args.calls)]

    with (
        files.temporary() as folder,
        start(args.torch_python, folder / "log") as ask,
    ):
        tensors = mapping.extract(exact, srm.table(config))
        np.savez(folder / "tensors.npz", allow_pickle=False, **tensors)
        console.print("starting PyTorch")
        started = ask(
            repository=str(args.ipr.resolve()),
            tensors=str(folder / "tensors.npz"),
            config=dataclasses.asdict(config),
            device=device,
            dtype=args.dtype,
            batch=args.batch,
            sampler={
                "task_name": "unscored",
                "max_ipr_budget": args.iterations,
                "resampling_ratio": args.ratio,
                "ipr_overlap": args.overlap,
                "ipr_steps_per_patch": args.steps_per_patch,
                "overlap": args.overlap,
                "steps_per_patch": args.steps_per_patch,
                "stochasticity": args.stochasticity,
            },
        )
        console.print("compiling")
        evaluations = sample()[1]
        evaluate()
        differences = {}
        for side in SIDES:
            differences[side] = check_agreement(exact, ask, side, args.batch, folder)
            ask(do="network", side=side, calls=1)
            taken = ask(do="sample", side=side)["evaluations"]
            if taken != evaluations:
                raise ValueError(
                    f"both sides must take the same number of evaluations per sample, ours takes "
                    f"{evaluations}, the published sampler {taken}"
                )
        rounds = []
        for number in range(args.repeats):
            console.print(f"round {number + 1} of {args.repeats}")
            samplers = {side: ask(do="sample", side=side)["seconds"] for side in SIDES}
            samplers |= {"ours": seconds(sample) / args.batch}
            networks = {
                side: ask(do="network", side=side, calls=args.calls)["seconds"] for side in SIDES
            }
            networks |= {"ours": seconds(evaluate)}
            rounds.append(
                {
                    "sampler": {side: took / evaluations for side, took in samplers.items()},
                    "network": {
                        side: took / args.calls / args.batch for side, took in networks.items()
                    },
                }
            )
    operations = started.pop("flops") | {"ours": flops.count(predict, model, z[:1], t[:1])}
    return {
        "arguments": {name: v for name, v in plain(args).items() if name not in PATHS},
        "clones": clones(args),
        "pytorch": started,
        **environment.describe(),
        "load_per_core": load,
        "largest_difference": differences,
        "evaluations_per_sample": evaluations,
        "flops_per_evaluation": operations,
        **summarise(rounds, operations),
        "rounds": rounds,
    }


def clones(args: Args) -> dict[str, Any]:
    """The commits of the clones, and in which files of the network they differ."""
    found: dict[str, Any] = {"ipr": environment.commit(args.ipr)}
    if args.srm is not None:
        one, other = (path / "src" / "model" for path in (args.ipr, args.srm))
        names = {
            str(path.relative_to(root)) for root in (one, other) for path in root.rglob("*.py")
        }
        _, different, unread = filecmp.cmpfiles(one, other, sorted(names), shallow=False)
        found |= {"srm": environment.commit(args.srm), "different_files": different + unread}
    return found


def show(result: Mapping[str, Any]) -> None:
    """Print the results as tables."""

    def table(title: str, rows: Mapping[str, Mapping[str, float]], scale: float = 1) -> None:
        made = Table("", "median", "min", "max", box=None, title=title, title_justify="left")
        for name, values in rows.items():
            cells = (f"{scale * values[column]:.2f}" for column in ("median", "min", "max"))
            made.add_row(name, *cells)
        console.print(made, "")

    batch, count = result["arguments"]["batch"], result["flops_per_evaluation"]
    names = {"published": "PyTorch as published", "tuned": "PyTorch tuned", "ours": "ipr_jax"}
    rows = {}
    for what, sides in result["seconds_per_evaluation"].items():
        for side, values in sides.items():
            size = 1 if what == "sampler" and side in SIDES else batch
            rows[f"{names[side]}, {what}, batch {size}"] = values
    table("ms per network evaluation and sample", rows, scale=1000)
    for side, found in result["times_as_fast"].items():
        giga = f"{count[side] / 1e9:.3f} to {count['ours'] / 1e9:.3f} GFLOP"
        titles = {
            "sampler": f"sampler, batch {batch} against 1",
            "network": f"= network, batch {batch}",
            "around": "x what the sampler adds to it",
            "arithmetic": f"network = arithmetic ({giga})",
            "rate": "x FLOP/s",
        }
        table(
            f"ipr_jax is faster than {names[side]} by",
            {title: found[name] for name, title in titles.items()},
        )
    largest = {side: max(found.values()) for side, found in result["largest_difference"].items()}
    console.print(
        f"First predictions differ by {largest['published']:.1e}, tuned by {largest['tuned']:.1e}. "
        f"Load average per core before the start: {result['load_per_core']:.1f}.",
        highlight=False,
    )
    if different := result["clones"].get("different_files"):
        said = f"The clones differ in src/model: {', '.join(different)}."
        console.print(said, style="yellow")


def main(args: Args) -> None:
    """Run the measurement, print it, and write it if asked to.

    Raises:
        ValueError, OSError: refused; nothing has been written.
    """
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if args.smoke:
        args = dataclasses.replace(args, **SMOKE)
    result = measure(args, check_args(args))
    show(result)
    if args.out is not None:
        files.write_text(args.out, json.dumps(result, indent=1))
        console.print(f"written: {args.out}")


if __name__ == "__main__":
    with one_line_errors(), interruptible("nothing has been written"):
        main(tyro.cli(Args))
