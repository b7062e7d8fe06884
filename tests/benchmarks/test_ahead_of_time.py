"""Steps compiled ahead of time: what is placed where, and errors in place of a compiler."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec as P

from benchmarks import ahead_of_time


@pytest.mark.parametrize(
    ("shape", "devices", "spec"),
    [
        ((8, 16), 2, P(None, "data")),
        ((8, 8), 2, P("data")),
        ((15, 8), 4, P(None, "data")),
        ((15, 9), 2, P()),
        ((16,), 2, P()),
        ((8, 16), 1, P()),
    ],
)
def test_arrays_are_split_along_the_longest_axis_that_divides(
    shape: tuple[int, ...], devices: int, spec: P
) -> None:
    assert ahead_of_time.spec_of(shape, devices) == spec


def test_a_share_is_what_one_device_holds() -> None:
    mesh = Mesh(np.array(jax.devices()[:4]), ("data",))
    arrays = {"kernel": jnp.ones((8, 16), jnp.bfloat16), "bias": jnp.ones(16)}
    tree = ahead_of_time.placed(arrays, mesh)
    assert ahead_of_time.share(tree) == (8 * 4 + 16, 2 * 8 * 4 + 4 * 16)
