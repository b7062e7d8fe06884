"""Axes that the caller split by hand, and where the arrays of a state are placed."""
