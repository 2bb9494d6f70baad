"""Where the time of a refinement pass goes: kernels by their cost, and how much of it is what.

``python -m benchmarks.profile --preset even-pixels --batch 8`` traces a pass of some network
evaluations, after a warm-up, and prints its most expensive kernels; ``--out FILE`` also writes
JSON. Weights and images are random.

A kernel is an operation of the compiled program that the trace times as one, with all that XLA has
fused into it. It counts as a convolution if there is one in it, else as a matrix product if there
is one, else as other.
"""

import collections
import dataclasses
import functools
import itertools
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import tyro
from jax.profiler import ProfileData
from rich.console import Console
from rich.table import Table

from benchmarks import workload
from benchmarks.report import save
from benchmarks.timing import seconds
from ipr_jax.cli.terminal import one_line_errors
from ipr_jax.core import check
from ipr_jax.models import get_precision
from ipr_jax.runtime import environment, files

CLASSES = ("convolution", "matrix product", "other")
SHOWN = 10
"""Kernels in the table."""


@dataclasses.dataclass(frozen=True)
class Args:
    """Profile a refinement pass.

    Attributes:
        preset: architecture.
        batch: samples at once.
        precision: float32, tf32 (a GPU's, float32 elsewhere) or bfloat16.
        evaluations: of the network in the pass.
        out: a new JSON file.
    """

    preset: str = "even-pixels"
    batch: int = 8
    precision: str = "float32"
    evaluations: int = 5
    out: Path | None = None

    def __post_init__(self) -> None:
        workload.check_preset(self.preset)
        check.count("batch", self.batch)
        get_precision(self.precision)
        check.count("evaluations", self.evaluations)


class Operation(NamedTuple):
    """An operation of a compiled program.

    Attributes:
        result: its type and shape, without layout.
        holds: the convolutions and matrix products in it and in what it calls: class and operands.
        inside: the names of the operations that it calls.
    """

    result: str
    holds: tuple[tuple[str, str], ...]
    inside: frozenset[str]

    @property
    def kind(self) -> str:
        """One of ``CLASSES``."""
        held = {kind for kind, _ in self.holds}
        return next((kind for kind in CLASSES if kind in held), "other")


_LINE = re.compile(r"\s+(?:ROOT )?%?([\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\(([^()]*)")
_COMPUTATION = re.compile(r"(?:ENTRY )?%?([\w.-]+) .*\{$")
_CALLED = re.compile(
    r"(?:calls|to_apply|body|condition|(?:true|false|branch)_computations?)"
    r"=(?:\{([^}]*)\}|([\w%.-]+))"
)
_NAME = re.compile(r"[\w.-]+")
_LAYOUT = re.compile(r"\{[^}]*\}")
_LIBRARY = {
    "convolution": re.compile(r'custom_call_target="[^"]*conv', re.IGNORECASE),
    "matrix product": re.compile(r'custom_call_target="[^"]*(?:gemm|matmul)', re.IGNORECASE),
}


def _own_class(opcode: str, line: str) -> str | None:
    """What an operation is itself; a TPU's matrix products are convolutions by opcode."""
    if opcode == "dot" or (opcode == "convolution" and 'dot_general"' in line):
        return "matrix product"
    if opcode == "convolution":
        return "convolution"
    if opcode == "custom-call":
        return next((kind for kind, target in _LIBRARY.items() if target.search(line)), None)
    return None


def operations(text: str) -> dict[str, Operation]:
    """The operations of a compiled program by name, from its text."""
    bodies: dict[str, list[str]] = {}
    body: list[str] = []
    results: dict[str, str] = {}
    own: dict[str, tuple[str, str]] = {}
    called: dict[str, list[str]] = {}
    for line in text.splitlines():
        if match := _LINE.match(line):
            name, result, opcode, operands = match.groups()
            body.append(name)
            results[name] = _LAYOUT.sub("", result)
            called[name] = _NAME.findall(" ".join(map("".join, _CALLED.findall(line))))
            if kind := _own_class(opcode, line):
                given = [results[each] for each in _NAME.findall(operands) if each in results]
                own[name] = kind, " x ".join(given[:2])
        elif match := _COMPUTATION.match(line):
            body = bodies.setdefault(match[1], [])

    def inside(name: str) -> Iterator[str]:
        for computation in called[name]:
            yield from bodies.get(computation, ())

    @functools.cache
    def holds(name: str) -> tuple[tuple[str, str], ...]:
        inner = itertools.chain.from_iterable(map(holds, inside(name)))
        return (own[name], *inner) if name in own else tuple(inner)

    return {
        name: Operation(result, holds(name), frozenset(inside(name)))
        for name, result in results.items()
    }


_DEVICES = {"/device:GPU": "Stream", "/device:TPU": "XLA Ops"}
"""Planes of accelerators, and their lines that have the operations."""


def events(trace: Any) -> Iterator[tuple[str, float]]:
    """The runs of operations that a trace times on its devices: name and milliseconds.

    Accelerators have a plane each, with kernels in the streams of a GPU and operations in a line of
    a TPU; on a CPU they are among the events of its threads.

    Args:
        trace: a ``jax.profiler.ProfileData``.
    """
    planes = list(trace.planes)
    accelerators = any(plane.name.startswith(tuple(_DEVICES)) for plane in planes)
    places = _DEVICES if accelerators else {"": ""}
    for plane, (device, kind) in itertools.product(planes, places.items()):
        for line in plane.lines if plane.name.startswith(device) else ():
            for event in line.events if line.name.startswith(kind) else ():
                operation = dict(event.stats).get("hlo_op", event.name if accelerators else None)
                if operation is not None:
                    name = str(operation).partition(" = ")[0].removeprefix("%")
                    yield name, event.duration_ns / 1e6


def kernels(
    program: dict[str, Operation], timed: Iterable[tuple[str, float]]
) -> list[dict[str, Any]]:
    """Add up the runs of every kernel.

    What only runs other operations, such as a loop, is left out: it calls operations that are timed
    themselves.

    Args:
        program: its operations.
        timed: name and milliseconds of every run of an operation.

    Returns:
        JSON data: name, class, holds, result, ms, share of the time of all and count; most
        expensive first.
    """
    runs = collections.defaultdict[str, list[float]](list)
    for name, ms in timed:
        runs[name].append(ms)
    unknown = Operation("", (), frozenset())
    leaves = {
        name: program.get(name, unknown)
        for name in runs
        if not program.get(name, unknown).inside & runs.keys()
    }
    total = sum(sum(runs[name]) for name in leaves)
    rows = [
        {
            "name": name,
            "class": operation.kind,
            "holds": [{"class": kind, "operands": given} for kind, given in operation.holds],
            "result": operation.result,
            "ms": sum(runs[name]),
            "share": sum(runs[name]) / total,
            "count": len(runs[name]),
        }
        for name, operation in leaves.items()
    ]
    return sorted(rows, key=lambda row: -row["ms"])


def measure(preset: str, batch: int, precision: str, evaluations: int) -> dict[str, Any]:
    """Trace a pass of ``evaluations``.

    Returns:
        JSON data: the kernels, the share of every class, the time of all kernels, which may run
        side by side, and of the pass without and with the profiler.

    Raises:
        ValueError: the traces of this backend time no operation.
    """
    work = workload.make(preset, batch, precision)
    refine = functools.partial(workload.refinement, evaluations=evaluations)
    compiled = jax.jit(refine).lower(work).compile()
    seconds(lambda: compiled(work))
    alone = seconds(lambda: compiled(work))
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with files.temporary() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            traced = seconds(lambda: compiled(work))
        (path,) = folder.rglob("*.xplane.pb")
        rows = kernels(
            operations(compiled.as_text() or ""), events(ProfileData.from_file(str(path)))
        )
    if not rows:
        raise ValueError(f"a trace of {jax.default_backend()} times no operation")
    shares = collections.Counter(dict.fromkeys(CLASSES, 0.0))
    for row in rows:
        shares[row["class"]] += row["share"]
    return {
        "kernels": rows,
        "share_by_class": dict(shares),
        "ms": {
            "kernels": sum(row["ms"] for row in rows),
            "pass_profiled": 1e3 * traced,
            "pass": 1e3 * alone,
        },
    }


def show(result: dict[str, Any]) -> None:
    """Print the most expensive kernels and the shares."""
    shown = Table(box=None, header_style="bold")
    titles = ("kernel", "class", "operands", "result", "ms", "share", "runs")
    for number, title in enumerate(titles):
        shown.add_column(title, justify="left" if number < 4 else "right", overflow="fold")
    for row in result["kernels"][:SHOWN]:
        held = [each["operands"] for each in row["holds"] if each["class"] == row["class"]]
        shown.add_row(
            *(row["name"], row["class"], "\n".join(held), row["result"]),
            *(f"{row['ms']:.1f}", f"{100 * row['share']:.1f}%", str(row["count"])),
        )
    console = Console(width=120)
    console.print(shown)
    shares = ", ".join(
        f"{kind} {100 * share:.1f}%" for kind, share in result["share_by_class"].items()
    )
    ms = result["ms"]
    console.print(
        f"{shares}; all {len(result['kernels'])} kernels {ms['kernels']:.0f} ms, the pass "
        f"{ms['pass']:.0f} ms, under the profiler {ms['pass_profiled']:.0f} ms",
        highlight=False,
    )


def main(args: Args) -> None:
    """Profile and print."""
    if args.out is not None:
        files.refuse_existing(args.out)
    result = measure(args.preset, args.batch, args.precision, args.evaluations)
    show(result)
    save(args, environment.describe(), **result)


if __name__ == "__main__":
    with one_line_errors():
        main(tyro.cli(Args))
