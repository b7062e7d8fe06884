"""What stages are made of: the layerwise driver, matching of trees, sums, balls, recomputing."""
