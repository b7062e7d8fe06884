"""Programs that use optax_spd; the library itself imports nothing from here."""
