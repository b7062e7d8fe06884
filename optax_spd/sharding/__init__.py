"""Mesh axes that split arrays by hand, and the sharding of optimizer state."""
