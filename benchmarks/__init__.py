"""Measurements: ``python -m benchmarks.<name>``, from a checkout."""
