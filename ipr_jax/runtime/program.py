"""Compiled programs and what they are called with: run now, or compiled ahead of time.

Compiling ahead fills the caches that a call looks in, so the call neither traces nor compiles.
"""

import dataclasses
import functools
import inspect
import time
from collections.abc import Callable, Mapping
from typing import Any, Generic, NamedTuple, ParamSpec, TypeVar, get_args

Given = ParamSpec("Given")
Result = TypeVar("Result")


class Memory(NamedTuple):
    """Bytes on every device while a program runs, as its compiler plans them.

    Attributes:
        arguments: model, images, keys and masks.
        outputs: what it returns.
        temporaries: everything in between.
    """

    arguments: int
    outputs: int
    temporaries: int

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self)


def memory_of(compiled: Any) -> Memory | None:
    """What a ``jax.stages.Compiled`` needs; None where the compiler does not tell."""
    found, kinds = compiled.memory_analysis(), ("argument", "output", "temp")
    return found and Memory(*(getattr(found, f"{kind}_size_in_bytes") for kind in kinds))


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What is known of a program before it runs.

    Attributes:
        seconds: that tracing and compiling took; next to nothing if it was compiled before.
        memory: what it needs; None where the compiler does not tell.
    """

    seconds: float
    memory: Memory | None


def _unchanged(found: Any) -> Any:
    return found


@dataclasses.dataclass(frozen=True)
class Program(Generic[Result]):
    """A function under ``jax.jit`` and what it is called with.

    Attributes:
        function: the jitted function.
        arguments: arrays, or to compile only, ``jax.ShapeDtypeStruct`` (or pytrees of them).
        static: its static arguments by name.
        finish: makes the result of what the function returns.
    """

    function: Any
    arguments: tuple[Any, ...]
    static: Mapping[str, Any]
    finish: Callable[[Any], Result] = _unchanged

    def run(self) -> Result:
        """Call it."""
        return self.finish(self.function(*self.arguments, **self.static))

    def compile(self) -> Compiled:
        """Compile it and do nothing else."""
        start = time.perf_counter()
        compiled = self.function.lower(*self.arguments, **self.static).compile()
        return Compiled(time.perf_counter() - start, memory_of(compiled))


def driver(make: Callable[Given, Program[Result]]) -> Callable[Given, Result]:
    """Turn a function that checks its arguments and makes a program into one that also runs it.

    What makes the program is its attribute ``program``; its signature tells what running returns.
    """

    @functools.wraps(make)
    def run(*args: Given.args, **kwargs: Given.kwargs) -> Result:
        return make(*args, **kwargs).run()

    signature = inspect.signature(make)
    (result,) = get_args(signature.return_annotation)
    run.__annotations__["return"] = result
    run.__signature__ = signature.replace(return_annotation=result)  # pyright: ignore[reportAttributeAccessIssue]
    run.program = make  # pyright: ignore[reportAttributeAccessIssue]
    return run
