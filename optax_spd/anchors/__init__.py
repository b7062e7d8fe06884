"""Where the anchor θ₀ is kept, and how to change it in an existing state."""
