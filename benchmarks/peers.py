"""The published PyTorch sampler against ``ipr_jax``: same weights, settings, device and dtype.

``python -m benchmarks.peers --ipr CLONE --torch-python PYTHON`` runs the network and the sampler of
a clone of the IPR repository in a process of its own, one sample at a time as it ships, in turn
with ``generate`` and ``refine``, and says where the ratio comes from. What the published sampler
takes to score samples between iterations is left out. Both must predict the same first.
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
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx
from rich.table import Table

import ipr_jax
from benchmarks.timing import seconds, spread
from convert import mapping, srm
from ipr_jax import check, environment, files, flops, selection
from ipr_jax.config import PRESETS, ModelConfig
from ipr_jax.interrupts import interruptible
from ipr_jax.options import plain
from ipr_jax.terminal import console, one_line_errors

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

PATHS = ("ipr", "srm", "torch_python", "out")
"""Arguments that say nothing of the results; the commits of the clones do."""
SMOKE: dict[str, Any] = {"batch": 2, "iterations": 1, "steps_per_patch": 1, "repeats": 2}
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
            that has ``write_video`` (0.21 does, 0.28 does not).
        preset: even-pixels, counting-polygons or mnist-sudoku.
        batch: samples at once on our side; the published sampler takes them one by one.
        iterations: of refinement, after the first pass.
        steps_per_patch: of both passes; the paper's are 30, 10 and (first pass) 3.
        overlap: of both passes, in [0, 1].
        ratio: share of the patches that an iteration regenerates, in (0, 1].
        stochasticity: in [0, 1].
        dtype: float32, or on a GPU bfloat16 (autocast in PyTorch).
        calls: evaluations in one timing of a bare network.
        repeats: timed rounds, after one warm-up of each.
        smoke: only see it work: 2 samples, 1 iteration, 1 step per patch, 2 rounds.
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
    calls: int = 10
    repeats: int = 5
    smoke: bool = False
    busy: bool = False
    out: Path | None = None


class Round(NamedTuple):
    """Seconds per network evaluation of one sample, measured in turn.

    Attributes:
        theirs: the published sampler, a sample at a time; it does not score them.
        their_network: its network alone.
        ours: ``generate`` and ``refine`` at batch B.
        ours_alone: the same at batch 1.
        our_network: our network alone, at batch 1.
    """

    theirs: float
    their_network: float
    ours: float
    ours_alone: float
    our_network: float


def factors(times: Round, their_flops: int, our_flops: int) -> dict[str, float]:
    """How many times as fast ``refine`` is, and four factors whose product that is.

    Args:
        times: of one round.
        their_flops: of one evaluation of the published network.
        our_flops: of one of ours.

    Returns:
        total; arithmetic (fewer FLOPs per evaluation: the time embedding is computed once per
        distinct noise level), rate (FLOP/s of the bare networks), loop (what a sampler adds to its
        network) and batching (B samples at once instead of one).
    """
    network = times.their_network / times.our_network
    arithmetic = their_flops / our_flops
    return {
        "total": times.theirs / times.ours,
        "arithmetic": arithmetic,
        "rate": network / arithmetic,
        "loop": times.theirs / times.ours_alone / network,
        "batching": times.ours_alone / times.ours,
    }


def summarise(
    rounds: Sequence[Round], evaluations: int, their_flops: int, our_flops: int
) -> dict[str, Any]:
    """What the rounds say; every ratio is taken within a round.

    Args:
        rounds: at least one.
        evaluations: of a sample, the same on both sides.
        their_flops: of one evaluation of the published network.
        our_flops: of one of ours.

    Returns:
        JSON data: seconds per evaluation and per sample, what the samplers add to their networks
        in seconds per evaluation, the factors, and the share of the arithmetic in the logarithm of
        the total, None where a round found us no faster.
    """
    by_name = {name: [getattr(one, name) for one in rounds] for name in Round._fields}
    each = [factors(one, their_flops, our_flops) for one in rounds]
    faster = all(one["total"] > 1 for one in each)
    shares = [math.log(one["arithmetic"]) / math.log(one["total"]) for one in each if faster]
    return {
        "seconds_per_evaluation": {name: spread(values) for name, values in by_name.items()},
        "seconds_per_sample": {
            name: spread([evaluations * value for value in by_name[name]])
            for name in ("theirs", "ours", "ours_alone")
        },
        "beside_the_network": {
            "theirs": spread([one.theirs - one.their_network for one in rounds]),
            "ours_alone": spread([one.ours_alone - one.our_network for one in rounds]),
        },
        "factors": {name: spread([one[name] for one in each]) for name in each[0]},
        "share_of_arithmetic": spread(shares) if faster else None,
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


class Peer:
    """The process of the published sampler; a context manager that ends it."""

    def __init__(self, python: Path, log: Path, *, passive: bool):
        """Start ``benchmarks/published.py``.

        Args:
            python: what runs it.
            log: a new file for what it prints.
            passive: whether its threads sleep while they wait, instead of spinning.

        Raises:
            OSError: there is no such Python.
        """
        variables = {
            name: text
            for name, text in os.environ.items()
            if name not in ("PYTHONPATH", "OMP_WAIT_POLICY")
        }
        variables["DEBUG"] = "false"
        if passive:
            variables["OMP_WAIT_POLICY"] = "PASSIVE"
        words = [str(python), str(Path(__file__).with_name("published.py"))]
        pipe = subprocess.PIPE
        self._python, self._log = python, log
        with log.open("w") as file:
            self._process = subprocess.Popen(
                words, stdin=pipe, stdout=pipe, stderr=file, text=True, env=variables
            )

    def __enter__(self) -> "Peer":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()

    def start(self, job: Mapping[str, Any]) -> float:
        """Build what ``published.build`` is told to; the seconds that imports and that take.

        Raises:
            ChildProcessError: it fails; with its last words.
        """
        return self._exchange(job)["seconds"]

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Call a method of ``published.Published``.

        Raises:
            ChildProcessError: it fails; with its last words.
        """
        return self._exchange({"do": do, **arguments})

    def _exchange(self, request: Mapping[str, Any]) -> dict[str, Any]:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(request), file=stdin, flush=True)
        if answer := stdout.readline():
            return json.loads(answer)
        code = self._process.wait()
        said = [line for line in self._log.read_text().splitlines() if line.strip()]
        raise ChildProcessError(
            f"the published sampler does not run in {self._python}: "
            f"{said[-1] if said else f'exit code {code}'} (--torch-python names a Python with "
            "PyTorch and the packages in the clone's requirements.txt)"
        )


class Started(NamedTuple):
    """A published sampler that is ready.

    Attributes:
        peer: its process.
        policy: how its threads wait: default or passive.
        start_seconds: what its imports and its network took.
    """

    peer: Peer
    policy: str
    start_seconds: float


@contextlib.contextmanager
def faster_peer(
    python: Path, job: Mapping[str, Any], folder: Path, calls: int
) -> Iterator[Started]:
    """The published sampler with that wait policy of its threads that suits it better.

    Args:
        python: what runs it.
        job: what it is to build.
        folder: for what it prints.
        calls: evaluations of its network to tell by.

    Raises:
        OSError: it does not run; with its last words.
    """
    with contextlib.ExitStack() as stack:
        found: list[tuple[float, Started]] = []
        for policy in ("default", "passive") if job["device"] == "cpu" else ("default",):
            log, passive = folder / f"{policy}.log", policy == "passive"
            peer = stack.enter_context(Peer(python, log, passive=passive))
            started = Started(peer, policy, peer.start(job))
            peer.ask("network", calls=1)
            found.append((peer.ask("network", calls=calls)["seconds"], started))
        yield min(found, key=lambda each: each[0])[1]


def check_agreement(model: ipr_jax.SRM, peer: Peer, folder: Path) -> dict[str, float]:
    """Compare the first predictions in float32, on random images and noise levels.

    Args:
        model: ours, which computes in float32.
        peer: the published network with the same weights.
        folder: for the arrays.

    Returns:
        The largest differences by output, relative where outputs exceed 1.

    Raises:
        ValueError: one is above ``TOLERANCE`` or not finite.
    """
    config, rng = model.config, np.random.default_rng(1)
    z = rng.standard_normal((2, *config.image_shape), np.float32)
    t = rng.random((2, *config.grid), np.float32)
    t[0, 0] = 0
    t[1, 0] = 1

    def pixels(patches: np.ndarray) -> np.ndarray:
        return patches.repeat(config.patch_size, 1).repeat(config.patch_size, 2)

    np.savez(folder / "given.npz", allow_pickle=False, z=np.moveaxis(z, -1, 1), t=pixels(t))
    given, out = (str(folder / name) for name in ("given.npz", "theirs.npz"))
    peer.ask("predict", given=given, out=out)
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
            f"the first predictions must agree within {TOLERANCE}, they differ by {differences}"
        )
    return differences


def sampler_of(model: ipr_jax.SRM, args: Args, batch: int) -> Callable[[], tuple[Any, int]]:
    """What is timed: a first pass and the refinement of ``batch`` images without clues.

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
    keys = ipr_jax.sample_keys(jax.random.key(0), batch)
    image = jnp.zeros((batch, *config.image_shape))
    editable = np.ones((batch, *config.grid), bool)
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
    ours, alone = (sampler_of(model, args, batch) for batch in (args.batch, 1))
    z, t = jnp.zeros((1, *config.image_shape)), jnp.full((1, *config.grid), 0.5)
    our_flops = flops.count(predict, model, z, t)
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(files.temporary())
        tensors = mapping.extract(exact, srm.table(config))
        np.savez(folder / "tensors.npz", allow_pickle=False, **tensors)
        job = {
            "repository": str(args.ipr.resolve()),
            "tensors": str(folder / "tensors.npz"),
            "config": dataclasses.asdict(config),
            "device": device,
            "dtype": args.dtype,
            "sampler": {
                "task_name": "unscored",
                "max_ipr_budget": args.iterations,
                "resampling_ratio": args.ratio,
                "ipr_overlap": args.overlap,
                "ipr_steps_per_patch": args.steps_per_patch,
                "overlap": args.overlap,
                "steps_per_patch": args.steps_per_patch,
                "stochasticity": args.stochasticity,
            },
        }
        console.print("starting PyTorch")
        peer, policy, started = stack.enter_context(
            faster_peer(args.torch_python, job, folder, args.calls)
        )
        differences = check_agreement(exact, peer, folder)
        described, counted = peer.ask("describe"), peer.ask("count")
        console.print("compiling")
        warm = {"ours": seconds(ours), "ours_alone": seconds(alone)}
        warm["our_network"] = seconds(lambda: predict(model, z, t))
        evaluations = alone()[1]
        if counted["evaluations"] != evaluations:
            raise ValueError(
                f"both sides must take the same number of evaluations per sample, ours takes "
                f"{evaluations}, the published sampler {counted['evaluations']}"
            )
        rounds = []
        for number in range(args.repeats):
            console.print(f"round {number + 1} of {args.repeats}")
            rounds.append(
                Round(
                    ours=seconds(ours) / evaluations / args.batch,
                    theirs=peer.ask("sample")["seconds"] / evaluations,
                    ours_alone=seconds(alone) / evaluations,
                    their_network=peer.ask("network", calls=args.calls)["seconds"],
                    our_network=seconds(lambda: [predict(model, z, t) for _ in range(args.calls)])
                    / args.calls,
                )
            )
    their_flops = described.pop("flops")
    return {
        "arguments": {name: v for name, v in plain(args).items() if name not in PATHS},
        "clones": clones(args),
        "pytorch": described | {"wait_policy": policy},
        **environment.environment(),
        "load_per_core": load,
        "largest_difference": differences,
        "evaluations_per_sample": evaluations,
        "flops_per_evaluation": {"theirs": their_flops, "ours": our_flops},
        "warm_up_seconds": {
            "their_start": started,
            "their_first_sample": counted["seconds"],
            **warm,
        },
        **summarise(rounds, evaluations, their_flops, our_flops),
        "rounds": [one._asdict() for one in rounds],
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

    def line(values: Mapping[str, float], scale: float = 1, digits: int = 2) -> list[str]:
        return [f"{scale * values[name]:.{digits}f}" for name in ("median", "min", "max")]

    def table(title: str, rows: Mapping[str, list[str]]) -> None:
        made = Table("", "median", "min", "max", box=None, title=title, title_justify="left")
        for name, cells in rows.items():
            made.add_row(name, *cells)
        console.print(made, "")

    batch, number = result["arguments"]["batch"], result["evaluations_per_sample"]
    titles = {
        "theirs": "published sampler, batch 1",
        "ours": f"ipr_jax, batch {batch}",
        "ours_alone": "ipr_jax, batch 1",
        "their_network": "published network alone, batch 1",
        "our_network": "our network alone, batch 1",
    }
    per = result["seconds_per_evaluation"]
    table(
        "ms per network evaluation and sample",
        {title: line(per[name], 1000) for name, title in titles.items()}
        | {
            f"{titles[name]}, beside the network": line(values, 1000)
            for name, values in result["beside_the_network"].items()
        },
    )
    table(
        f"seconds per sample of {number} evaluations",
        {
            titles[name]: line(values, digits=3)
            for name, values in result["seconds_per_sample"].items()
        },
    )
    count = {name: value / 1e9 for name, value in result["flops_per_evaluation"].items()}
    causes = {
        "total": "ipr_jax is faster by",
        "arithmetic": f"= arithmetic ({count['theirs']:.3f} to {count['ours']:.3f} GFLOP)",
        "rate": "x FLOP/s of the networks",
        "loop": "x loop around the network",
        "batching": f"x batch {batch} instead of 1",
    }
    table("factors", {title: line(result["factors"][name]) for name, title in causes.items()})
    if share := result["share_of_arithmetic"]:
        low, middle, high = (f"{100 * share[name]:.0f}%" for name in ("min", "median", "max"))
        console.print(f"The time embedding's share of the gain: {middle} ({low} to {high}).")
    else:
        console.print(
            "ipr_jax was not faster in every round, so no shares are given.", style="yellow"
        )
    warm = ", ".join(f"{name} {value:.1f}" for name, value in result["warm_up_seconds"].items())
    for text in (
        f"Not counted, seconds of the first calls with what they compile: {warm}.",
        f"The first predictions differ by {max(result['largest_difference'].values()):.1e}.",
        f"Load average per core before the start: {result['load_per_core']:.1f}.",
    ):
        console.print(text.replace("_", " "), highlight=False)
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
