"""What stages are built from: the layerwise driver, tree matching, sums, balls, recomputation."""
