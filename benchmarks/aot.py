"""What XLA makes of refinement for a TPU, without a TPU: does it fit, what do devices exchange.

``python -m benchmarks.aot`` compiles the program of ``ipr_jax.refine`` ahead of time, by the TPU
compiler of the package libtpu, with the batch spread over the devices of a topology and the
parameters on each of them. It prints a table; ``--out FILE`` also writes everything as JSON.
Nothing is run and nothing is timed but the compiler. Memory is what the compiler reserves. The
settings are the paper's, constants of the program. For the target ``cuda``, which needs a GPU to
compile, the program is lowered to StableHLO and no more.
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
from jax import export
from jax.experimental import topologies
from jax.sharding import Mesh
from rich.console import Console
from rich.table import Table

import ipr_jax
from benchmarks.report import save
from benchmarks.throughput import ITERATIONS
from benchmarks.workload import check_preset, new_model
from ipr_jax import check, experiments, files, flops, sharding
from ipr_jax.config import PRESETS
from ipr_jax.environment import environment
from ipr_jax.memory import EXHAUSTED
from ipr_jax.networks import inputs
from ipr_jax.precision import compute_in, get_precision
from ipr_jax.terminal import one_line_errors


class Chip(NamedTuple):
    """A generation of TPU.

    Attributes:
        hbm_gib: memory of a device, which is a chip.
        options: of its topology, so that a chip is one device, as it is on a machine.
    """

    hbm_gib: int
    options: dict[str, str]


CHIPS = {
    "v4": Chip(32, {"chip_config_name": "megacore"}),
    "v5e": Chip(16, {}),
    "v5p": Chip(95, {}),
    "v6e": Chip(32, {}),
}
"""Source of the sizes: Google's pages on Cloud TPU versions."""

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
    """Compile refinement for TPUs.

    Attributes:
        target: topologies, chips of v4, v5e, v5p or v6e, such as v5e:2x2 or v4:2x2x1; or cuda,
            which is lowered only.
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
            known = re.fullmatch(rf"cuda|({'|'.join(CHIPS)}):\d+(x\d+)+", target)
            if not known:
                raise ValueError(
                    f"target must be cuda or a topology of {', '.join(CHIPS)}, such as v5e:2x2, "
                    f"got {target!r}"
                )


def topology(target: str) -> list[Any]:
    """The devices of a TPU topology, which can be compiled for.

    Raises:
        ModuleNotFoundError: libtpu is not installed; names the extra.
        ValueError: there is no such topology.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise ModuleNotFoundError(
            'compiling for a TPU needs its compiler, libtpu: pip install -e ".[aot]"'
        )
    for name, value in WITHOUT_TPU.items():
        os.environ.setdefault(name, value)
    try:
        chip = CHIPS[target.partition(":")[0]]
        return topologies.get_topology_desc(target, "tpu", **chip.options).devices
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
    config = PRESETS[case.preset]
    _, sampling = experiments.SETTINGS[case.preset]
    refine = partial(ipr_jax.refine, iterations=ITERATIONS, sampling=sampling, mesh=mesh)
    model = jax.eval_shape(lambda: compute_in(new_model(case.preset), case.precision))
    keys = jax.eval_shape(lambda: ipr_jax.sample_keys(jax.random.key(0), case.batch))
    image = jax.ShapeDtypeStruct((case.batch, *config.image_shape), jnp.float32)
    editable = jax.ShapeDtypeStruct((case.batch, *config.grid), jnp.bool_)
    return refine, (model, keys, image, editable)


def gflop_per_sample(preset: str) -> float:
    """Arithmetic of the bare network for one image."""
    given = tuple(inputs(PRESETS[preset], 1).values())
    model = jax.eval_shape(lambda: new_model(preset))
    return flops.count(lambda model, *given: model(*given), model, *given) / 1e9


def compile_for(case: Case) -> dict[str, Any]:
    """Compile refinement for a TPU topology.

    Returns:
        A row of the results: ``fits``; where it does, ``memory_bytes`` of a device and
        ``collectives`` by place; where it does not, what the compiler says.

    Raises:
        ModuleNotFoundError: libtpu is not installed.
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
        "hbm_bytes": CHIPS[case.target.partition(":")[0]].hbm_gib * 2**30,
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
        "fits": True,
        "compile_seconds": took,
        "memory_bytes": memory | {"total": total},
        "collectives": by_place(compiled.as_text() or "", COLLECTIVES),
    }


def lower_for_cuda(case: Case) -> dict[str, Any]:
    """Lower refinement for a GPU: that it can be, and nothing of what a GPU makes of it."""
    refine, given = program(case)
    began = time.perf_counter()
    lowered = export.export(jax.jit(refine), platforms=["cuda"])(*given)
    return case._asdict() | {
        "gflop_per_sample": gflop_per_sample(case.preset),
        "lower_seconds": time.perf_counter() - began,
        "stablehlo_bytes": len(lowered.mlir_module_serialized),
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
        if case.target == "cuda":
            yield lower_for_cuda(case)
            continue
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
        if row["target"] == "cuda":
            cells += ["-"] * 6 + ["lowered, not compiled"]
        elif not row["fits"]:
            cells += ["-"] * 5 + [f"{row['hbm_bytes'] / 2**30:.0f}", "does not fit"]
        else:
            sizes = (row["memory_bytes"][kind] / 2**30 for kind in (*KINDS, "total"))
            cells += [f"{row['compile_seconds']:.0f}", *(f"{size:.2f}" for size in sizes)]
            cells += [f"{row['hbm_bytes'] / 2**30:.0f}", "yes", exchanged(row["collectives"])]
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
    described = environment()
    if importlib.util.find_spec("libtpu") is not None:
        described["versions"]["libtpu"] = importlib.metadata.version("libtpu")
    Console(width=180).print(table(rows))
    print(f"compiled on {described['device']}, jax {described['versions']['jax']}")
    save(args, described, rows=rows)


if __name__ == "__main__":
    with one_line_errors():
        main(tyro.cli(Args))
