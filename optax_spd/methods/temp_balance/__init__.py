"""TempBalance: learning rates of layers, balanced by the spectra of their weights."""
