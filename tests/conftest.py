"""Eight virtual CPU devices for every test, and x64 on request."""

from collections.abc import Iterator

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)

# Scripts that made test data need packages that the tests do not.
collect_ignore = ["data"]


@pytest.fixture
def x64() -> Iterator[None]:
    """Turns float64 on for one test."""
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)
