"""SIFT: trains few entries of each layer, with optimizer state for these alone."""
