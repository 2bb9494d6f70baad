"""How many samples fit on the device at once, from what the compiler says that programs need."""

import math
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, TypeVar

import jax
import psutil

from ipr_jax.runtime.program import Program

Size = int | Literal["auto"]
"""Samples at once: a number of at least 1, or "auto", as many as fit on the device."""

SHARE = 0.9
"""Of the free memory of a device, what "auto" plans with."""

CPU_SHARE = 0.4
"""The same for a CPU, whose kernels were seen to take up to 2.1 times what the compiler plans."""

EXHAUSTED = "RESOURCE_EXHAUSTED"
"""What the message of an error holds when a device's memory is full."""

Result = TypeVar("Result")


def choose(
    requested: Size, most: int, program: Callable[[int], Program], *, besides: int = 0
) -> int:
    """The number of samples at once that was asked for, at most ``most``.

    What a program is called with counts as if it were not on the device yet.

    Args:
        requested: a number, or "auto".
        most: how many there are.
        program: what is to run, by the number of samples at once.
        besides: bytes that will be needed for other things.

    Raises:
        MemoryError: "auto", and not even one sample fits.
        jax.errors.JaxRuntimeError: "auto", and the compiler itself runs out of memory at one.
        ValueError: "auto", and the device or its compiler does not tell what is needed or free.
    """
    if requested != "auto":
        return min(requested, most)

    def needed(size: int) -> float:
        try:
            memory = program(size).compile().memory
        except jax.errors.JaxRuntimeError as error:
            if EXHAUSTED not in str(error) or size == 1:
                raise
            return math.inf
        if memory is None:
            raise ValueError('"auto" needs a compiler that tells how much memory a program takes')
        return memory.total

    return largest(needed, usable_bytes() - besides, most)


def largest(needed: Callable[[int], float], available: int, most: int) -> int:
    """The largest number whose need fits, by two or three calls where the need is a line.

    The need at 1 and at ``most`` predicts it; where the need is no line, the prediction shrinks by
    quarters until it fits, and a larger number may have fitted too.

    Args:
        needed: bytes by number, rising; ``math.inf`` if it is too much to tell. Every call costs.
        available: bytes.
        most: the largest number, at least 1.

    Returns:
        A number in [1, most] that fits.

    Raises:
        MemoryError: 1 does not fit; says what it needs.
    """
    while (whole := needed(most)) == math.inf and most > 1:
        most //= 2
    if whole <= available:
        return most
    least = needed(1) if most > 1 else whole
    if least > available:
        raise MemoryError(f"a single sample needs {least:,} bytes, {available:,} may be used")
    found = 1 + int((available - least) * (most - 1) // (whole - least))
    while found > 1 and needed(found) > available:
        found = 3 * found // 4
    return found


def halving(work: Callable[[int], Result], size: int) -> tuple[Result, int]:
    """Do some work, with half as many samples at once whenever the device's memory is full.

    Args:
        work: by the number of samples at once; the same whatever it is.
        size: to begin with.

    Returns:
        What it gave, and the number at which it went through.

    Raises:
        jax.errors.JaxRuntimeError: the memory is full even at 1, or something else is wrong.
    """
    while True:
        try:
            return work(size), size
        except jax.errors.JaxRuntimeError as error:
            if EXHAUSTED not in str(error) or size == 1:
                raise
        warnings.warn(
            f"out of memory with {size} samples at once, going on with {size // 2}", stacklevel=2
        )
        size //= 2


def usable_bytes() -> int:
    """What to plan with of the free memory of a device that computes; CPUs share the machine's.

    Raises:
        ValueError: the device does not tell.
    """
    device = jax.local_devices()[0]
    stats = device.memory_stats()
    if stats and "bytes_limit" in stats:
        return int(SHARE * (stats["bytes_limit"] - stats["bytes_in_use"]))
    if device.platform != "cpu":
        raise ValueError(f'"auto" needs a device that tells its free memory, {device} does not')
    free = min([psutil.virtual_memory().available, *map(_left, _groups())])
    return int(CPU_SHARE * free / len(jax.local_devices()))


def _groups() -> Iterator[Path]:
    """The control groups that this process is in, of both versions, and those around them."""
    root = Path("/sys/fs/cgroup")
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:  # not Linux
        return
    for _, controllers, group in (line.split(":", 2) for line in lines):
        if controllers in ("", "memory"):
            folder = root / controllers / group.strip("/")
            yield from (folder, *folder.parents)


def _left(group: Path) -> float:
    """Bytes that a control group may still use; infinite without a limit."""
    for limit, usage, cached in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        try:
            most, used = ((group / name).read_text() for name in (limit, usage))
            stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        except OSError:
            continue
        if most.strip() != "max":
            return int(most) - int(used) + int(stat.get(cached, 0))
    return math.inf
