"""PyTorch checkpoints to JAX parameters, without PyTorch."""
