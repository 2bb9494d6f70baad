"""Keep compiled programs on disk, so that a command compiles them once and not in every run."""

import os
import warnings
from pathlib import Path

import jax


def folder() -> Path:
    """Where the commands keep them: ``ipr_jax`` in the user's folder of caches."""
    caches = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(caches) if os.path.isabs(caches) else Path.home() / ".cache") / "ipr_jax"


def enable() -> None:
    """Keep programs in ``folder()``, and take them from there.

    JAX's own settings come first: the folder may be named by ``JAX_COMPILATION_CACHE_DIR``, and
    nothing is kept with ``JAX_ENABLE_COMPILATION_CACHE=false``. Nor, with a warning, where the
    folder cannot be written to: then everything is compiled anew.
    """
    settings = jax.config.values
    theirs = settings["jax_compilation_cache_dir"]
    if not settings["jax_enable_compilation_cache"] or "://" in (theirs or ""):
        return
    try:
        path = Path(theirs) if theirs else folder()
    except RuntimeError:  # there is no home
        return
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        usable = os.access(path, os.R_OK | os.W_OK | os.X_OK)
    except OSError:
        usable = False
    if not usable:
        warnings.warn(f"no compiled programs are kept: {path} cannot be written to", stacklevel=2)
        jax.config.update("jax_enable_compilation_cache", False)
    elif not theirs:
        jax.config.update("jax_compilation_cache_dir", str(path))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
