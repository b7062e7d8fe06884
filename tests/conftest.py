"""Eight virtual CPU devices for every test, and x64 on request."""

import itertools
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


FINISHED = itertools.count(1)


@pytest.fixture(autouse=True)
def _programs_are_freed() -> Iterator[None]:
    """Drops all compiled programs now and then.

    Kept until the end they take 5 GB, and more memory maps than Linux allows one process: 65,530.
    """
    yield
    if next(FINISHED) % 1000 == 0:
        jax.clear_caches()
