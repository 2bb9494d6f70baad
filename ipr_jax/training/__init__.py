"""Training sequential diffusion models: noise levels, objective, optimiser, trainer."""
