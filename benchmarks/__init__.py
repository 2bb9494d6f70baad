"""Measurements: ``python -m benchmarks.<name>``, from a checkout."""

import sys

from ipr_jax.interrupts import watch

if sys.argv[:1] == ["-m"]:  # as long as Python looks for what it is to run
    watch()
