"""Where the anchor θ₀ lives, and how to change it in a finished state."""
