"""What the benchmarks share: spreads, bytes of buffers, trees, steps, and their command lines."""

import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import optax
import pytest
from jax_support import host_memory_works

from benchmarks import measuring, memory, reporting, vit


def test_spreads_and_ratios() -> None:
    expected = {"lower_quartile": 2, "median": 3, "upper_quartile": 4}
    assert measuring.spread([5, 1, 4, 2, 3]) == expected
    # A slow round slows both, and the ratio is the same.
    assert set(measuring.ratio([3, 30], [2, 20]).values()) == {1.5}


def test_whether_huge_pages_are_set() -> None:
    assert reporting.huge_pages("glibc.malloc.check=3:glibc.malloc.hugetlb=1")
    for other in ("", "glibc.malloc.check=3", "glibc.malloc.hugetlb=0"):
        assert not reporting.huge_pages(other)


def test_bytes_are_split_by_memory_and_a_buffer_held_twice_counts_once() -> None:
    on_host = jax.sharding.SingleDeviceSharding(jax.devices()[0], memory_kind="pinned_host")
    tree = {"device": jnp.ones(3), "host": jax.device_put(jnp.ones(5), on_host)}
    assert measuring.bytes_by_memory(tree) == (12, 20)
    params = {"kernel": jnp.ones((4, 4))}
    candidate = measuring.make_candidate(optax.adam(1e-3), params, params)
    adam, rest = candidate.state
    assert measuring.state_bytes(candidate) == (2 * 4 * 16, 4)
    candidate.state = (adam._replace(nu=adam.mu), rest)
    assert measuring.state_bytes(candidate) == (4 * 16, 4)


@pytest.mark.parametrize("misplaced", [20, 0])
def test_arguments_in_host_memory_are_not_the_devices(misplaced: int) -> None:
    """XLA may count the 20 bytes of a host anchor, which is donated, as the device's."""
    right = 20 - misplaced
    sizes = {"argument": (80, right), "output": (30, right), "alias": (28, right), "temp": (7, 0)}
    account = {}
    for name, (device, host) in sizes.items():
        account[f"{name}_size_in_bytes"] = device + (0 if name == "temp" else misplaced)
        account[f"host_{name}_size_in_bytes"] = host
    compiled = SimpleNamespace(memory_analysis=lambda: SimpleNamespace(**account))
    step = memory.step_memory(compiled, host_bytes=20)
    found = (step["peak"], step["host_peak"], step["misplaced"])
    assert found == (80 + 2 + 7, 20, misplaced)
    assert (memory.host_memory_missing() is None) == host_memory_works()


def test_the_default_tree_is_vit_b16() -> None:
    shapes = jax.tree.leaves(vit.vit_shapes(vit.SCALES["vit-b16"]), is_leaf=vit.is_shape)
    assert len(shapes) == 152
    # 86,567,656: what the literature gives as 86 M, with the head for 1000 classes.
    assert sum(math.prod(shape) for shape in shapes) == 86_567_656
