"""PyTorch checkpoints to JAX parameters, without PyTorch."""

import sys

from ipr_jax.interrupts import watch

if sys.argv[:1] == ["-m"]:  # as long as Python looks for what it is to run
    watch()
