"""Descriptions of layers, and how they compose. (What a plan makes of them: test_plan.py.)"""

import jax.numpy as jnp

import optax_spd
from optax_spd import LayerSpec


def test_stacked_refines_only_what_matches_and_keeps_the_rest_of_the_description() -> None:
    base = lambda path, array: LayerSpec(output_axes=(0,), group=path[0])
    describe = optax_spd.stacked("blocks/.*kernel", 1, layers=base)
    assert describe("blocks/kernel", None) == LayerSpec((1,), (0,), "b")
    assert describe("head/kernel", None) == LayerSpec((), (0,), "h")
    assert optax_spd.stacked("no such path")("head", None) == LayerSpec()


def test_stacked_and_outputs_compose_in_either_order() -> None:
    one = optax_spd.outputs("query", (1, 2), layers=optax_spd.stacked("query", -1))
    other = optax_spd.stacked("query", -1, layers=optax_spd.outputs("query", (1, 2)))
    assert one("query/kernel", None) == other("query/kernel", None) == LayerSpec((-1,), (1, 2))


def test_by_module_keeps_groups_that_are_given() -> None:
    given = lambda path, array: LayerSpec(group="norms") if "scale" in path else LayerSpec()
    params = {f"{m}": {"kernel": jnp.ones(1), "scale": jnp.ones(1)} for m in "ab"}
    names = optax_spd.layer_names(params, layers=optax_spd.by_module(layers=given))
    assert names == ["a", "norms", "b"]
