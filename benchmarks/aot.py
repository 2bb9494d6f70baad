"""What XLA makes of refinement for TPUs and GPUs, without one: does it fit, what is exchanged.

``python -m benchmarks.aot`` compiles the program of ``ipr_jax.refine`` ahead of time, for a TPU by
the package libtpu, for a GPU by the plugin of ``jax[cuda12]``, with the batch spread over the
devices of a topology and the parameters on each of them. It prints a table; ``--out FILE`` also
writes everything as JSON. Nothing is run and nothing is timed but the compiler. Memory is what the
compiler reserves. The settings are the paper's, constants of the program. On a GPU that is there,
XLA also times kernels and chooses among them, so that memory may differ there.
"""

import dataclasses
import importlib.metadata
import importlib.util
import itertools
import os
import re
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import tyro
from jax.experimental import topologies
from jax.sharding import Mesh
from rich.console import Console
from rich.table import Table

import ipr_jax
from benchmarks.report import save
from benchmarks.throughput import ITERATIONS
from benchmarks.workload import TASKS, check_preset, config_of, new_model
from ipr_jax.cli.terminal import one_line_errors
from ipr_jax.core import check
from ipr_jax.models import compute_in, get_precision
from ipr_jax.models.networks import inputs
from ipr_jax.runtime import EXHAUSTED, environment, files, flops, sharding
from ipr_jax.studies import experiments


class Chip(NamedTuple):
    """A generation of TPU, or a GPU.

    Attributes:
        hbm_gib: memory of a device, which is a chip.
        options: of its topology, so that a chip is one device, as it is on a machine.
    """

    hbm_gib: float
    options: dict[str, str]


HOPPER = """
gpu_device_info {{
  cuda_compute_capability {{ major: 9 }}
  core_count: 132
  fpus_per_core: 128
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  memory_bandwidth: {bandwidth}
  device_memory_size: {memory}
}}
platform_name: "CUDA"
runtime_version {{ major: 12 minor: 9 }}
dnn_version_info {{ major: 9 minor: 8 }}
device_description_str: "{name}"
"""
"""What XLA otherwise asks the GPU: of one with 132 multiprocessors, compute capability 9.0."""


def hopper(name: str, hbm_gib: float, bandwidth: int) -> Chip:
    """A GPU by the size of its memory and its bandwidth, bytes per second."""
    config = HOPPER.format(name=name, memory=int(hbm_gib * 2**30), bandwidth=bandwidth)
    return Chip(hbm_gib, {"target_config": config})


TPUS = {
    "v4": Chip(32, {"chip_config_name": "megacore"}),
    "v5e": Chip(16, {}),
    "v5p": Chip(95, {}),
    "v6e": Chip(32, {}),
}
"""Source of the sizes: Google's pages on Cloud TPU versions."""

GPUS = {
    "h100": hopper("NVIDIA H100 80GB HBM3", 79.2, 3_350_000_000_000),
    "h200": hopper("NVIDIA H200", 139.8, 4_800_000_000_000),
}
"""The SXM modules: bandwidths of NVIDIA's data sheets; memory, about what their driver reports."""

CHIPS = TPUS | GPUS

KINDS = ("argument", "output", "temp")
"""Of memory on a device."""

WITHOUT_TPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
"""Environment of a libtpu that shall not look for a TPU; of no effect on what is compiled."""

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)
"""Operations by which devices exchange data."""

PLACES = ("once", "per iteration", "per evaluation")
"""Where an operation is, by the loops around it: none, that of the iterations, that of a pass."""


@dataclasses.dataclass(frozen=True)
class Args:
    """Compile refinement for TPUs and GPUs.

    Attributes:
        target: topologies of TPUs, chips of v4, v5e, v5p or v6e, such as v5e:2x2 or v4:2x2x1; or
            GPUs of a machine, h100 or h200 and how many, such as h200:8.
        preset: architectures.
        batch: samples at once, on all chips together.
        precision: float32, tf32 (a GPU's, float32 elsewhere) or bfloat16 (parameters, norms, noise
            levels and the images between steps stay float32).
        max_batch: also search the largest batch that fits, to a sixteenth.
        out: a new JSON file.
    """

    target: tuple[str, ...] = ("v5e:2x2",)
    preset: tuple[str, ...] = ("even-pixels",)
    batch: tuple[int, ...] = (64,)
    precision: tuple[str, ...] = ("bfloat16",)
    max_batch: bool = False
    out: Path | None = None

    def __post_init__(self) -> None:
        for batch in self.batch:
            check.count("batch", batch)
        for preset in self.preset:
            check_preset(preset)
        for precision in self.precision:
            get_precision(precision)
        for target in self.target:
            tpus, gpus = (rf"({'|'.join(chips)})" for chips in (TPUS, GPUS))
            if not re.fullmatch(rf"{tpus}:\d+(x\d+)+|{gpus}:[1-9]\d*", target):
                raise ValueError(
                    f"target must be a topology of {', '.join(TPUS)}, such as v5e:2x2, or a number "
                    f"of {', '.join(GPUS)}, such as h200:1, got {target!r}"
                )


def topology(target: str) -> list[Any]:
    """The devices of a topology, which can be compiled for.

    Raises:
        ModuleNotFoundError: the compiler is not installed; names the package.
        ValueError: there is no such topology.
    """
    kind, _, shape = target.partition(":")
    if kind in GPUS:
        if importlib.util.find_spec("jax_cuda12_plugin") is None:
            raise ModuleNotFoundError(
                "compiling for a GPU needs its compiler: "
                f'pip install "jax[cuda12]=={jax.__version__}"'
            )
        options = {"topology": f"1x1x{shape}", **GPUS[kind].options}
        return topologies.get_topology_desc("", "cuda", **options).devices
    if importlib.util.find_spec("libtpu") is None:
        raise ModuleNotFoundError(
            'compiling for a TPU needs its compiler, libtpu: pip install -e ".[aot]"'
        )
    for name, value in WITHOUT_TPU.items():
        os.environ.setdefault(name, value)
    try:
        return topologies.get_topology_desc(target, "tpu", **TPUS[kind].options).devices
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(f"no topology {target}: {error}") from error


def by_place(hlo: str, operations: tuple[str, ...]) -> dict[str, dict[str, int]]:
    """Count operations of a compiled program of refinement by the loops around them.

    Args:
        hlo: the program's text; asynchronous operations count by their start.
        operations: names, such as "all-reduce".

    Returns:
        For each of ``PLACES`` how many there are of each operation that is there.
    """
    wanted = re.compile(rf" ({'|'.join(operations)})(?:-start)?\(")
    called = re.compile(r"\b(body|condition|calls|to_apply|\w+_computations?)=(\{[^}]*\}|[^,\s]+)")
    inside: dict[str, list[str]] = {}
    entry = current = ""
    for line in hlo.splitlines():
        head = re.match(r"(ENTRY )?%?([\w.-]+) .*\{$", line)
        if head:
            current = head[2]
            inside[current] = []
            entry = current if head[1] else entry
        elif current:
            inside[current].append(line)

    found: dict[str, dict[str, int]] = {place: {} for place in PLACES}

    def walk(computation: str, loops: int) -> None:
        here = found[PLACES[min(loops, len(PLACES) - 1)]]
        for line in inside[computation]:
            for match in wanted.finditer(line):
                here[match[1]] = here.get(match[1], 0) + 1
            for kind, names in called.findall(line):
                for name in re.findall(r"[\w.-]+", names):
                    walk(name, loops + (kind in ("body", "condition")))

    walk(entry, 0)
    return found


class Case(NamedTuple):
    """What to compile for what: the fields of ``Args``, one value each."""

    target: str
    preset: str
    precision: str
    batch: int


def program(case: Case, mesh: Mesh | None = None) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Refinement by the paper's settings, and its arguments: the model, then a batch.

    Returns:
        A function of model, keys [B], image [B, H, W, C] and editable [B, h, w], and these as
        ``jax.ShapeDtypeStruct``.
    """
    config = config_of(case.preset)
    _, sampling = experiments.SETTINGS[TASKS[case.preset]]
    refine = partial(ipr_jax.refine, iterations=ITERATIONS, sampling=sampling, mesh=mesh)
    model = jax.eval_shape(lambda: compute_in(new_model(case.preset), case.precision))
    keys = jax.eval_shape(lambda: ipr_jax.sample_keys(jax.random.key(0), case.batch))
    image = jax.ShapeDtypeStruct((case.batch, *config.image_shape), jnp.float32)
    editable = jax.ShapeDtypeStruct((case.batch, *config.grid), jnp.bool_)
    return refine, (model, keys, image, editable)


def gflop_per_sample(preset: str) -> float:
    """Arithmetic of the bare network for one image."""
    given = tuple(inputs(config_of(preset), 1).values())
    model = jax.eval_shape(lambda: new_model(preset))
    return flops.count(lambda model, *given: model(*given), model, *given) / 1e9


def compile_for(case: Case) -> dict[str, Any]:
    """Compile refinement for a topology.

    Returns:
        A row of the results: ``fits``; unless the compiler refuses, ``memory_bytes`` of a device
        and ``collectives`` by place; if it does, what it says.

    Raises:
        ModuleNotFoundError: the compiler is not installed.
        ValueError: there is no such topology, or its chips do not divide the batch.
    """
    devices = topology(case.target)
    if case.batch % len(devices):
        chips = f"the {len(devices)} chips of {case.target}"
        raise ValueError(f"batch must be a multiple of {chips}, got {case.batch}")
    mesh = ipr_jax.data_mesh(devices)
    refine, (model, *batched) = program(case, mesh)

    def place(leaf: Any, where: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

    lowered = jax.jit(refine).lower(
        jax.tree.map(lambda leaf: place(leaf, sharding.whole(mesh)), model),
        *(place(leaf, sharding.rows(mesh)) for leaf in batched),
    )
    row = case._asdict() | {
        "devices": len(devices),
        "device_kind": devices[0].device_kind,
        "hbm_bytes": int(CHIPS[case.target.partition(":")[0]].hbm_gib * 2**30),
        "gflop_per_sample": gflop_per_sample(case.preset),
    }
    began = time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if EXHAUSTED not in str(error):
            raise
        return row | {"fits": False, "said": files.printable(str(error))}
    took = time.perf_counter() - began
    sizes = compiled.memory_analysis()
    memory = {kind: getattr(sizes, f"{kind}_size_in_bytes") for kind in (*KINDS, "alias")}
    total = sum(memory[kind] for kind in KINDS) - memory["alias"]
    return row | {
        "fits": total <= row["hbm_bytes"],
        "compile_seconds": took,
        "memory_bytes": memory | {"total": total},
        "collectives": by_place(compiled.as_text() or "", COLLECTIVES),
    }


def largest(attempt: Callable[[int], dict[str, Any]], first: dict[str, Any]) -> dict[str, Any]:
    """Search the largest batch that fits, to a sixteenth of it.

    Memory is nearly affine in the batch: tried next is the batch that would nearly fill the device,
    or else the middle between what fits and what does not.

    Args:
        attempt: the row of a batch, as of ``compile_for``.
        first: the row to begin with.

    Returns:
        The row of the largest batch that was found to fit, or of one sample per device if that does
        not, with ``too_large``, the least batch that was found not to fit.
    """
    devices, row, best = first["devices"], first, first
    fits, too_large = 0, None  # samples per device
    while True:
        each = row["batch"] // devices
        if row["fits"]:
            fits, best, memory = each, row, row["memory_bytes"]
            room, taken = (x - memory["argument"] for x in (row["hbm_bytes"], memory["total"]))
            guess = int(31 / 32 * fits * room / taken)
        else:
            too_large, guess = each, 0
        step = max(1, fits // 16)
        if too_large is None:
            guess = max(guess, fits + step)
        elif too_large - fits <= step:
            return (best if fits else row) | {"too_large": too_large * devices}
        elif not fits + step <= guess < too_large:
            guess = (fits + too_large) // 2
        row = attempt(guess * devices)


def run(args: Args) -> Iterator[dict[str, Any]]:
    """Compile for every target, preset, precision and batch."""
    for words in itertools.product(args.target, args.preset, args.precision, args.batch):
        case = Case(*words)
        row = compile_for(case)
        yield row
        if args.max_batch:
            yield largest(lambda batch, case=case: tried(case._replace(batch=batch)), row)


def tried(case: Case) -> dict[str, Any]:
    """``compile_for``, said at once: a search compiles for many minutes."""
    row = compile_for(case)
    found = "does not fit"
    if row["fits"]:
        found = f"{row['memory_bytes']['total'] / 2**30:.2f} GiB, {row['compile_seconds']:.0f} s"
    print(f"{case.target} {case.preset}, batch {case.batch:,}: {found}", flush=True)
    return row


def table(rows: list[dict[str, Any]]) -> Table:
    """What was found, a row per program; memory in GiB per device."""
    shown = Table(box=None, header_style="bold")
    titles = ("target", "preset", "precision", "batch", "GFLOP/sample", "compile s")
    for number, title in enumerate((*titles, *KINDS, "total", "of HBM", "fits", "exchanged")):
        shown.add_column(title, justify="right" if 2 < number < 11 else "left")
    for row in rows:
        cells = [row["target"], row["preset"], row["precision"], f"{row['batch']:,}"]
        cells.append(f"{row['gflop_per_sample']:.3g}")
        if "memory_bytes" not in row:
            cells += ["-"] * 5 + [f"{row['hbm_bytes'] / 2**30:.0f}", "does not fit"]
        else:
            sizes = (row["memory_bytes"][kind] / 2**30 for kind in (*KINDS, "total"))
            cells += [f"{row['compile_seconds']:.0f}", *(f"{size:.2f}" for size in sizes)]
            cells += [f"{row['hbm_bytes'] / 2**30:.0f}", "yes" if row["fits"] else "no"]
            cells.append(exchanged(row["collectives"]))
        shown.add_row(*cells)
    return shown


def exchanged(collectives: dict[str, dict[str, int]]) -> str:
    """Collectives by place in words."""
    places = {
        place: ", ".join(f"{number} {name}" for name, number in found.items())
        for place, found in collectives.items()
    }
    return "; ".join(f"{place}: {found}" for place, found in places.items() if found) or "nothing"


def main(args: Args) -> None:
    """Compile and print."""
    if args.out is not None:
        files.refuse_existing(args.out)
    jax.config.update("jax_platforms", "cpu")
    rows = list(run(args))
    described = environment.describe()
    for name in ("libtpu", "jax-cuda12-plugin"):
        if importlib.util.find_spec(name.replace("-", "_")) is not None:
            described["versions"][name] = importlib.metadata.version(name)
    Console(width=180).print(table(rows))
    print(f"compiled on {described['device']}, jax {described['versions']['jax']}")
    save(args, described, rows=rows)


if __name__ == "__main__":
    with one_line_errors():
        main(tyro.cli(Args))
