"""TempBalance: scales each layer's learning rate by the spectrum of its weights."""
