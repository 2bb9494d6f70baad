"""Many devices: eight virtual ones, in a process of their own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FILE = Path(__file__).parents[1] / "eight_devices.py"


@pytest.mark.parametrize("kind", ["not heavy", pytest.param("heavy", marks=pytest.mark.heavy)])
def test_on_eight_devices(kind):
    """The long ones with XLA as users have it: the bits are the same there."""
    flags = os.environ.get("XLA_FLAGS", "") if kind == "not heavy" else ""
    flags += " --xla_force_host_platform_device_count=8"
    words = [sys.executable, "-m", "pytest", "-n", "0", "-q", "-m", kind, str(FILE)]
    done = subprocess.run(
        words, env=os.environ | {"XLA_FLAGS": flags}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
