"""PyTorch checkpoints to JAX parameters and back, without PyTorch."""
