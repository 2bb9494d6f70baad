"""Keep compiled programs on disk, so that a command compiles them once and not in every run."""

import os
from pathlib import Path

import jax


def folder() -> Path:
    """Where the commands keep them: ``ipr_jax`` in the user's folder of caches."""
    caches = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(caches) if os.path.isabs(caches) else Path.home() / ".cache") / "ipr_jax"


def enable() -> None:
    """Keep programs in ``folder()``, and take them from there.

    JAX's own settings come first: nothing is done with ``JAX_COMPILATION_CACHE_DIR`` set, whose
    folder JAX uses, nor with ``JAX_ENABLE_COMPILATION_CACHE=false``. Nor without a folder that can
    be written to: then everything is compiled anew.
    """
    settings = jax.config.values
    if settings["jax_compilation_cache_dir"] or not settings["jax_enable_compilation_cache"]:
        return
    try:
        path = folder()
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # RuntimeError: there is no home
        return
    if os.access(path, os.W_OK | os.X_OK):
        jax.config.update("jax_compilation_cache_dir", str(path))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
