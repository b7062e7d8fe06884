"""Functions of two checkpoints, for after training."""
