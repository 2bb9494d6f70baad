"""What a result was made with: versions, device, commit."""

import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax


def version() -> str:
    """The version of the package, from its metadata."""
    return importlib.metadata.version("ipr_jax")


def describe() -> dict[str, Any]:
    """The versions, the device and the commit that a result is made with, as JSON data.

    Returns:
        versions (of packages, None for one that is not installed), python, device (such as "1 x
        cpu", those of this process), cpu_count, and commit, with ``-dirty`` where files have
        changed, or None outside of a checkout.
    """
    packages = ("ipr_jax", "jax", "jaxlib", "flax", "numpy")
    return {
        "versions": {name: _version(name) for name in packages},
        "python": sys.version.split()[0],
        "device": f"{jax.local_device_count()} x {jax.devices()[0].device_kind}",
        "cpu_count": os.cpu_count(),
        "commit": commit(),
    }


def text() -> str:
    """What a report of a fault should tell of the machine: a line per fact, plain text.

    Versions, platform, device, and the variables that JAX and XLA read.
    """
    found = describe()
    facts = found.pop("versions") | {name: _version(name) for name in ("optax", "orbax-checkpoint")}
    facts |= found | {
        "platform": platform.platform(),
        "backend": jax.default_backend(),
        "processes": jax.process_count(),
    }
    facts |= {
        name: value
        for name, value in sorted(os.environ.items())
        if name.startswith(("JAX_", "XLA_", "LIBTPU_")) or name == "CUDA_VISIBLE_DEVICES"
    }
    return "\n".join(f"{name}: {value}" for name, value in facts.items())


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit(checkout: Path = Path(__file__).parents[2]) -> str | None:
    """The commit of a checkout, with ``-dirty`` where files have changed; None if it is none."""
    if not (checkout / ".git").exists():
        return None
    words = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
