"""Iterative Partial Refinement of sequential diffusion models, batched in one compiled program.

The names are those of ``public``, imported when one is first used: that takes a second, in which a
command already answers Ctrl-C.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ipr_jax.public import *  # noqa: F403
else:
    import importlib.util

    MODULES = {
        "order": "sampling",
        "selection": "methods",
        "stopping": "methods",
        "shards": "studies",
    }
    """Modules that the documents name as if they were here, and the rooms that they are in."""

    def __getattr__(name: str) -> Any:
        if name == "__version__":
            return importlib.import_module("importlib.metadata").version("ipr_jax")
        place = f"{MODULES[name]}.{name}" if name in MODULES else name
        if importlib.util.find_spec(f"ipr_jax.{place}"):
            return importlib.import_module(f"ipr_jax.{place}")
        return getattr(importlib.import_module("ipr_jax.public"), name)

    def __dir__() -> list[str]:
        return [*globals(), *importlib.import_module("ipr_jax.public").__all__]
