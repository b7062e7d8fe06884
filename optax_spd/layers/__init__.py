"""The ground floor: what a layer is, and parameter trees, masks and arguments."""
