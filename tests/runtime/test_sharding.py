"""Many devices: eight virtual ones, in a process of their own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FILE = Path(__file__).parents[1] / "eight_devices.py"


@pytest.mark.parametrize(
    "kind",
    [
        "not heavy",
        pytest.param("gate", marks=pytest.mark.gate),
        pytest.param("heavy and not gate", marks=pytest.mark.heavy),
    ],
)
def test_on_eight_devices(kind):
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    words = [sys.executable, "-m", "pytest", "-n", "0", "-q", "-m", kind, str(FILE)]
    done = subprocess.run(
        words, env=os.environ | {"XLA_FLAGS": flags}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
