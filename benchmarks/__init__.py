"""Measurements of what the methods cost beside plain Optax optimizers."""
