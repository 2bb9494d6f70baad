"""Many devices: eight virtual ones, in a process of their own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FILE = Path(__file__).parents[1] / "eight_devices.py"


@pytest.mark.parametrize("kind", ["not heavy", pytest.param("heavy", marks=pytest.mark.heavy)])
def test_on_eight_devices(kind):
    run(os.environ.get("XLA_FLAGS", ""), "-m", kind)


@pytest.mark.heavy
def test_bits_on_eight_devices_with_xla_as_users_have_it():
    run("", "-m", "heavy or not heavy", "-k", "what_one_device_makes or stream_too or shipped")


def run(flags, *words):
    """Run the tests of eight devices, or some of them, with flags of XLA."""
    flags += " --xla_force_host_platform_device_count=8"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-n", "0", "-q", *words, str(FILE)],
        env=os.environ | {"XLA_FLAGS": flags},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
