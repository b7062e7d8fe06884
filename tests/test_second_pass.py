"""Deviations computed anew for the second pass."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax_support import host_memory_works, primitives

from optax_spd import layers, second_pass, stages

PARAMS = {
    "a": jnp.arange(6.0).reshape(2, 3),
    "ids": jnp.arange(2),
    "none": None,
    "stack": jnp.arange(12.0).reshape(3, 4),
}
STACKED = layers.stacked("stack")
PRETRAINED = jax.tree.map(lambda x: x / 3, PARAMS)


def both(pretrained: Any, changing: Any, **options: Any) -> Any:
    """The deviations of the first pass and of the second."""
    options = {"anchor": "argument", "layers": STACKED} | options
    view = stages.StageOptions(**options).view(
        PARAMS, optax.EmptyState(), PARAMS, {"anchor": pretrained}
    )
    return view.deviations, second_pass.again(view, changing).deviations


@pytest.mark.parametrize("mode", ["eager", "jit", "zero"])
def test_they_are_the_same_numbers_read_anew(mode: str) -> None:
    policy = "zero" if mode == "zero" else "argument"
    changing = jnp.zeros(4, bool)

    def run(pretrained: Any) -> Any:
        return both(pretrained, changing, anchor=policy)

    first, second = (run if mode == "eager" else jax.jit(run))(PRETRAINED)
    jax.tree.map(np.testing.assert_array_equal, first, second)
    # What it reads anew XLA must not know for the same.
    found = list(primitives(jax.make_jaxpr(run)(PRETRAINED).jaxpr))
    assert found.count("optimization_barrier") == (0 if mode == "zero" else 2)
    assert "cond" not in found


if host_memory_works():
    ON_HOST = jax.device_put(
        PRETRAINED,
        jax.sharding.SingleDeviceSharding(jax.devices()[0], memory_kind="pinned_host"),
    )

    @pytest.mark.parametrize("changing", [[0, 0, 0, 0], [1, 0, 0, 0], [0, 0, 1, 0], [1, 1, 1, 1]])
    def test_anchors_in_host_memory_are_brought_in_again_for_what_changes(
        changing: list[int], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(second_pass, "BROUGHT_IN_TWICE", 1)
        first, second = jax.jit(both)(ON_HOST, np.array(changing, bool))
        # An array is brought in whole if one of its layers changes.
        assert second[1:3] == [None, None]
        for needed, a, b in [
            (changing[0], first[0], second[0]),
            (any(changing[1:]), first[3], second[3]),
        ]:
            np.testing.assert_array_equal(b.step, a.step)
            np.testing.assert_array_equal(b.delta, a.delta if needed else np.zeros_like(a.delta))

    @pytest.mark.parametrize(
        ("least", "for_one_cpu", "again"), [(1, None, 2), (7, None, 1), (13, None, 0), (1, True, 0)]
    )
    def test_small_arrays_and_those_of_one_cpu_are_brought_in_once(
        least: int, for_one_cpu: bool | None, again: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(second_pass, "BROUGHT_IN_TWICE", least)
        run = lambda anchor, changing: both(anchor, changing, for_one_cpu=for_one_cpu)
        jaxpr = jax.jit(run).trace(ON_HOST, np.ones(4, bool)).jaxpr
        found = list(primitives(jaxpr))
        assert found.count("cond") == again
        assert found.count("device_put") == 2 + again
