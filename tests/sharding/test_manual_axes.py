"""What ``axis_name=`` may say, and what is read from it. (How sums use it: test_rows.py.)"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, PartitionSpec as P

import optax_spd
from optax_spd.layers import plans, trees
from optax_spd.sharding import manual_axes


def planned(params: Any, layers: Any = None) -> tuple[trees.FlatTree, plans.LayerPlan]:
    flat = trees.flatten(params)
    return flat, plans.plan_layers(flat, layers)


@pytest.mark.parametrize("axis_name", [3, (), ("d", 3), {"a": "d"}, {}], ids=repr)
def test_axis_name_is_names_or_specs(axis_name: Any) -> None:
    with pytest.raises(ValueError, match="axis_name must be a mesh axis name") as error:
        optax_spd.spd(axis_name=axis_name)
    assert repr(axis_name) in str(error.value)


@pytest.mark.parametrize(
    "axis_name",
    [None, "d", ("x", "y"), P(), P("d"), {"a": P("d"), "b": [P(), P(("x", "y"))]}],
    ids=repr,
)
def test_names_and_specs_pass(axis_name: Any) -> None:
    manual_axes.check_axis_name(axis_name)
    assert manual_axes.is_names(axis_name) == (axis_name in ["d", ("x", "y")])


def test_specs_must_fit_the_parameters() -> None:
    flat, plan = planned({"a": jnp.ones((8, 4)), "b": jnp.ones(8)}, optax_spd.stacked("a"))
    for specs, message in (
        ({"a": P(None, "d")}, "axis_name has no entry for the parameter 'b'"),
        ({"a": P(None, "d"), "b": P(), "c": P()}, "axis_name has an entry at 'c'"),
        # shard_map refuses None for an array too: it is no way to write P().
        ({"a": P(None, "d"), "b": None}, "axis_name .*'b'"),
        ({"a": P("d"), "b": P()}, r"splits 'a' over \('d',\) along axis 0"),
    ):
        with pytest.raises(ValueError, match=message):
            manual_axes.sharded_axes(specs, flat, plan)


def test_names_split_every_array_and_specs_say_along_which_axis() -> None:
    flat, plan = planned({"a": jnp.ones((8, 2, 8)), "b": jnp.ones(8), "ids": jnp.arange(8)})
    read = lambda axis_name: manual_axes.sharded_axes(axis_name, flat, plan)
    assert read(None) is None
    assert read("d") == [{"d": None}] * 3
    assert read(("x", "y")) == [{"x": None, "y": None}] * 3
    specs = {"a": P("x", None, ("y", "z")), "b": P(), "ids": P("z")}
    assert read(specs) == [{"x": 0, "y": 2, "z": 2}, {}, {}]  # integers are no layer
    assert read(P("d")) == [{"d": 0}, {"d": 0}, {}]


def test_a_prefix_of_specs_covers_what_is_below() -> None:
    flat, plan = planned({"blocks": {"bias": jnp.ones(8), "kernel": jnp.ones((8, 2))}, "b": 1.0})
    specs = {"blocks": P("d"), "b": P()}
    assert manual_axes.sharded_axes(specs, flat, plan) == [{}, {"d": 0}, {"d": 0}]


def seen_inside(map_over: Callable[..., Any]) -> list[frozenset[str]]:
    """The varying axes of a split and of a replicated argument, of their sum, and of a mean."""
    seen: list[frozenset[str]] = []

    def look(split: jax.Array, replicated: jax.Array) -> jax.Array:
        arrays = (split, replicated, split + replicated, jax.lax.pmean(split, "x"))
        seen.extend(map(manual_axes.varying_axes, arrays))
        return split

    jax.eval_shape(map_over(look), jnp.ones((8, 2)), jnp.ones(2))
    return seen


@pytest.mark.parametrize(
    ("check_vma", "split"),
    [(True, frozenset({"x", "y"})), (False, frozenset())],
    ids=["checked", "unchecked"],
)
def test_varying_axes_are_those_a_checked_shard_map_knows(
    check_vma: bool, split: frozenset[str]
) -> None:
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)

    def map_over(look: Callable[..., Any]) -> Any:
        return jax.shard_map(
            look,
            mesh=mesh,
            in_specs=(P(("x", "y")), P()),
            out_specs=P(("x", "y")),
            check_vma=check_vma,
        )

    assert seen_inside(map_over) == [split, frozenset(), split, split - {"x"}]


def test_nothing_is_known_to_vary_in_pmap_and_outside_of_maps() -> None:
    assert (
        seen_inside(lambda look: jax.pmap(look, axis_name="x", in_axes=(0, None)))
        == [frozenset()] * 4
    )
    assert manual_axes.varying_axes(jnp.ones(2)) == frozenset()
