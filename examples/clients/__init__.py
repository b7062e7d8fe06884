"""The optimizers inside other people's trainers and models, each file an example to copy."""
