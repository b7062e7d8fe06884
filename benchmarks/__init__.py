"""Measurements of the methods' cost compared with plain Optax optimizers."""
