"""A tree's layers: their names, their axes, and their places in the per-layer vectors."""

import collections
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.core import freeze

import optax_spd
from optax_spd import LayerSpec
from optax_spd.layers import plans, trees


class Pair(NamedTuple):
    kernel: Any
    bias: Any


def plan_of(params: Any, layers: Any = None) -> plans.LayerPlan:
    return plans.plan_layers(trees.flatten(params), layers)


# Names -------------------------------------------------------------------------------------------


def test_by_default_every_array_is_a_layer() -> None:
    params = {"dense": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}, "scale": jnp.ones(())}
    assert optax_spd.layer_names(params) == ["dense/bias", "dense/kernel", "scale"]
    assert optax_spd.spd().init(params).spd_ratio.shape == (3,)


def boxed(array: jax.Array) -> Any:
    return nn.Partitioned(array, names=(None,) * array.ndim)


CONTAINERS: dict[str, tuple[Any, list[str]]] = {
    "dict": (
        {"dense": {"kernel": jnp.ones((1, 1)), "bias": jnp.ones(1)}},
        ["dense/bias", "dense/kernel"],
    ),
    "FrozenDict": (
        freeze({"dense": {"kernel": jnp.ones((1, 1)), "bias": jnp.ones(1)}}),
        ["dense/bias", "dense/kernel"],
    ),
    "Partitioned": (
        {"dense": {"kernel": boxed(jnp.ones((1, 1))), "bias": boxed(jnp.ones(1))}},
        ["dense/bias", "dense/kernel"],
    ),
    "nnx.State": (
        nnx.State(
            {"dense": {"kernel": nnx.Param(jnp.ones((1, 1))), "bias": nnx.Param(jnp.ones(1))}}
        ),
        ["dense/bias", "dense/kernel"],
    ),
    "list": ([jnp.ones(1), [jnp.ones(1)]], ["0", "1/0"]),
    "NamedTuple": (Pair(jnp.ones((1, 1)), [jnp.ones(1)]), ["bias/0", "kernel"]),
    "array": (jnp.ones(1), [""]),
}


@pytest.mark.parametrize(("params", "names"), CONTAINERS.values(), ids=CONTAINERS)
def test_names_do_not_depend_on_containers_and_boxes(params: Any, names: list[str]) -> None:
    assert optax_spd.layer_names(params) == names
    shapes = jax.eval_shape(lambda: params)
    assert optax_spd.layer_names(shapes) == names  # names are for the host: no array is needed


def test_layers_are_in_the_order_of_the_paths_strings_whatever_the_containers() -> None:
    # A list, restored from a checkpoint, may come back as a dict; a dataclass as anything.
    arrays = [jnp.ones(i + 1) for i in range(11)]
    forms = [
        {"blocks": arrays, "a": Pair(jnp.ones(1), jnp.ones(2))},
        {
            "blocks": {str(i): x for i, x in enumerate(arrays)},
            "a": {"bias": jnp.ones(2), "kernel": jnp.ones(1)},
        },
        collections.OrderedDict(blocks=tuple(arrays), a=Pair(jnp.ones(1), jnp.ones(2))),
    ]
    order = ["0", "1", "10", *map(str, range(2, 10))]
    for params in forms:
        flat, plan, _ = plans.planned(params, None, None)
        assert plan.names == ("a/bias", "a/kernel", *(f"blocks/{i}" for i in order))
        for path, entry, leaf in zip(flat.paths, plan.arrays, flat.leaves, strict=True):
            assert entry is not None
            assert plan.names[entry.start] == "/".join(path)
            if path[0] == "blocks":
                assert leaf.shape == (int(path[1]) + 1,)
    # Level by level: "a/z" is before "a-b/z", though "-" is before "/".
    assert optax_spd.layer_names({"a-b": {"z": jnp.ones(1)}, "a": {"z": jnp.ones(1)}}) == [
        "a/z",
        "a-b/z",
    ]


def test_names_follow_the_mask() -> None:
    params = {"a": jnp.ones(1), "b": jnp.ones(1)}
    assert optax_spd.layer_names(params, mask={"a": False, "b": True}) == ["b"]


@pytest.mark.parametrize(
    "leaf",
    [jnp.arange(3), np.zeros(2, bool), jnp.ones((0, 3)), None, optax.MaskedNode(), 7],
    ids=["int", "bool", "empty", "None", "MaskedNode", "Python int"],
)
def test_leaves_that_are_no_layers(leaf: Any) -> None:
    assert optax_spd.layer_names({"a": leaf, "b": jnp.ones(2)}) == ["b"]
    # Orbax cannot save an empty array, hence one unused entry where there is no layer at all.
    tx = optax_spd.spd(anchor="zero")
    state = tx.init({"a": leaf})
    assert state.spd_ratio.shape == (1,)
    updates, state = tx.update({"a": leaf}, state, {"a": leaf}, grad={"a": leaf})
    assert updates["a"] is leaf
    np.testing.assert_array_equal(state.spd_ratio, [0.0])


# Places in the vectors ---------------------------------------------------------------------------


def mixed_plan() -> plans.LayerPlan:
    """A stacked array and one that is none, among them a group of two whose members are apart."""
    params = {
        "a": jnp.ones((2, 3)),
        "b": jnp.ones((3, 4)),
        "c": jnp.ones(5),
        "d": jnp.ones((4, 3)),
        "ids": jnp.arange(3),
    }
    described = {
        "a": LayerSpec(),
        "b": LayerSpec(stacked_axes=(0,), group="g"),
        "c": LayerSpec(),
        "d": LayerSpec(stacked_axes=(1,), group="g"),
    }
    return plan_of(params, lambda path, array: described[path])


def test_arrays_of_a_group_share_their_places() -> None:
    plan = mixed_plan()
    assert plan.names == ("a", "g[0]", "g[1]", "g[2]", "c")
    numbers = {entry.name: entry.numbers for entry in plan.arrays if entry is not None}
    assert numbers == {"a": range(1), "b": range(1, 4), "c": range(4, 5), "d": range(1, 4)}
    assert [entry.count for entry in plan.arrays if entry is not None] == [1, 3, 1, 3]


def test_several_stacked_axes_count_in_row_major_order() -> None:
    plan = plan_of({"a": jnp.ones(2), "w": jnp.ones((2, 5, 3))}, optax_spd.stacked("w", (2, 0)))
    assert plan.names[1:] == ("w[0,0]", "w[0,1]", "w[0,2]", "w[1,0]", "w[1,1]", "w[1,2]")
    entry = plan.arrays[1]
    assert entry is not None
    assert (entry.stacked_shape, entry.numbers) == ((2, 3), range(1, 7))
    assert entry.stacked_axes == (0, 2)


def test_a_tree_without_layers_has_one_unused_entry() -> None:
    plan = plan_of({"ids": jnp.arange(3), "none": None})
    assert (plan.names, plan.vector_size, plan.dtype) == ((), 1, jnp.float32)


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        ([jnp.bfloat16, jnp.float16], jnp.float32),
        ([jnp.bfloat16, jnp.float64], jnp.float64),
        ([], jnp.float32),
    ],
    ids=["halves", "one float64", "nothing"],
)
def test_vectors_have_the_widest_dtype_and_at_least_float32(
    dtypes: list[Any], expected: Any, x64: None
) -> None:
    params = {f"p{i}": jnp.ones(2, dtype) for i, dtype in enumerate(dtypes)}
    wide = {"ids": np.arange(2, dtype=np.int64), "empty": np.ones((0, 2))}  # no layers
    assert plan_of(params | wide).dtype == expected
    assert plans.compute_dtype(*params.values()) == expected


def test_arrays_under_the_mask_count_for_nothing() -> None:
    params = {"a": jnp.ones(2), "b": jnp.ones((3, 2)), "c": jnp.ones(2)}
    layers = optax_spd.stacked("b")
    flat, plan, selected = plans.planned(params, layers, {"a": False, "b": True, "c": True})
    assert selected == [False, True, True]
    assert flat.paths == [("a",), ("b",), ("c",)]
    assert plan.arrays[0] is None
    assert plan.names == ("b[0]", "b[1]", "b[2]", "c")
    assert plans.planned(params, layers, None).selected is None


# Output axes -------------------------------------------------------------------------------------


def test_outputs_names_axes_of_the_whole_array() -> None:
    params = {
        "conv": jnp.ones((3, 3, 2, 4)),
        "embedding": jnp.ones((7, 5)),
        "query": jnp.ones((2, 6, 3, 4)),
        "bias": jnp.ones((2, 4)),
        "scale": jnp.ones(3),
    }
    layers = optax_spd.outputs(
        "query", (-2, -1), layers=optax_spd.stacked("query|bias", layers=None)
    )
    plan = plan_of(params, optax_spd.outputs("embedding", 0, layers=layers))
    axes = {entry.name: entry.output_axes for entry in plan.arrays if entry is not None}
    assert axes == {
        "conv": (3,),
        "embedding": (0,),
        "query": (2, 3),
        "bias": (),  # one row: rank 1 when the stacked axis is removed
        "scale": (),
    }


@pytest.mark.parametrize(("axis", "output"), [(0, 2), (1, 2), (2, 1), (-1, 1)])
def test_the_default_output_axis_is_the_last_that_is_not_stacked(axis: int, output: int) -> None:
    (entry,) = plan_of(jnp.ones((2, 3, 4)), optax_spd.stacked("", axis)).arrays
    assert entry is not None
    assert entry.output_axes == (output,)


def test_an_array_of_one_row_has_no_output_axes_whatever_is_said() -> None:
    layers = optax_spd.outputs("", 5, layers=optax_spd.stacked(""))
    (entry,) = plan_of(jnp.ones((2, 3)), layers).arrays
    assert entry is not None
    assert entry.output_axes == ()


# Groups ------------------------------------------------------------------------------------------


def test_any_hashable_but_none_is_a_group_label() -> None:
    label = lambda path, array: LayerSpec(group=(1, "x") if path in "ab" else 0)
    plan = plan_of({name: jnp.ones(1) for name in "abcd"}, label)
    assert plan.names == ("(1, 'x')", "0")
    assert [entry.start for entry in plan.arrays if entry is not None] == [0, 0, 1, 1]


# Descriptions that do not fit --------------------------------------------------------------------


def test_arrays_of_a_group_must_be_stacked_alike() -> None:
    params = {"a": jnp.ones((3, 2)), "b": jnp.ones((4, 2)), "c": jnp.ones(2)}
    group = lambda path, array: LayerSpec((0,) if array.ndim == 2 else (), group="all")
    with pytest.raises(ValueError, match="'a' and 'b' in the group 'all'") as error:
        optax_spd.layer_names(params, layers=group)
    assert "sizes (3,) and (4,)" in str(error.value)
    with pytest.raises(ValueError, match=r"'a' and 'c' .* sizes \(3,\) and \(\)"):
        optax_spd.layer_names({"a": params["a"], "c": params["c"]}, layers=group)


@pytest.mark.parametrize("axis", [2, -3])
def test_an_axis_that_the_array_does_not_have(axis: int) -> None:
    params = {"a": jnp.ones((3, 2))}
    for kind, layers in (
        ("stacked", optax_spd.stacked("a", axis)),
        ("output", optax_spd.outputs("a", axis)),
    ):
        with pytest.raises(ValueError, match=rf"the {kind} axis {axis} of 'a'.* shape \(3, 2\)"):
            optax_spd.spd(layers=layers).init(params)


def test_an_axis_cannot_be_stacked_and_output() -> None:
    layers = optax_spd.outputs("a", (-1, 1), layers=optax_spd.stacked("a", 2))
    with pytest.raises(ValueError, match="an axis cannot be both") as error:
        optax_spd.layer_names({"a": jnp.ones((2, 3, 4))}, layers=layers)
    assert "'a' of shape (2, 3, 4)" in str(error.value)


def test_an_axis_named_twice() -> None:
    with pytest.raises(ValueError, match=r"a stacked axis of 'a' twice: \(0, -2\)"):
        optax_spd.layer_names({"a": jnp.ones((2, 3))}, layers=optax_spd.stacked("a", (0, -2)))


def test_what_layers_returns_must_be_specs() -> None:
    with pytest.raises(TypeError, match="must return a LayerSpec, got 0 for 'a'"):
        optax_spd.layer_names({"a": jnp.ones(1)}, layers=lambda path, array: 0)


def test_spatial_axes_are_checked_as_the_others() -> None:
    def planned(**axes: Any) -> Any:
        spec = optax_spd.LayerSpec(**axes)
        return optax_spd.layer_names({"conv": jnp.ones((6, 8, 3, 3))}, layers=lambda *_: spec)

    assert planned(output_axes=(0,), spatial_axes=(-2, -1)) == ["conv"]
    with pytest.raises(ValueError, match=r"the spatial axis 4 of 'conv'"):
        planned(spatial_axes=(4,))
    for clash in ({"output_axes": (0,)}, {"stacked_axes": (0,)}):
        with pytest.raises(ValueError, match=r"spatial axes \(0, 2\), and some of them are"):
            planned(spatial_axes=(0, 2), **clash)
