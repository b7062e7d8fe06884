"""A pretrained transformer, fine-tuned robustly: `python -m examples.demo`."""
