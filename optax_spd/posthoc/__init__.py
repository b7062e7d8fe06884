"""Functions of two checkpoints, for use after training."""
