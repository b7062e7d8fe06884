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


def boxed(array: jax.Array) -> Any:
    return nn.Partitioned(array, names=(None,) * array.ndim)


KERNEL, BIAS = jnp.ones((1, 1)), jnp.ones(1)
DENSE = ["dense/bias", "dense/kernel"]
CONTAINERS: dict[str, tuple[Any, list[str]]] = {
    "dict": ({"dense": {"kernel": KERNEL, "bias": BIAS}}, DENSE),
    "FrozenDict": (freeze({"dense": {"kernel": KERNEL, "bias": BIAS}}), DENSE),
    "Partitioned": ({"dense": {"kernel": boxed(KERNEL), "bias": boxed(BIAS)}}, DENSE),
    "nnx.State": (
        nnx.State({"dense": {"kernel": nnx.Param(KERNEL), "bias": nnx.Param(BIAS)}}),
        DENSE,
    ),
    "list": ([BIAS, [BIAS]], ["0", "1/0"]),
    "NamedTuple": (Pair(KERNEL, [BIAS]), ["bias/0", "kernel"]),
    "array": (BIAS, [""]),
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
        {"blocks": arrays, "a": Pair(KERNEL, BIAS)},
        {"blocks": {str(i): x for i, x in enumerate(arrays)}, "a": Pair(KERNEL, BIAS)._asdict()},
        collections.OrderedDict(blocks=tuple(arrays), a=Pair(KERNEL, BIAS)),
    ]
    order = ["0", "1", "10", *map(str, range(2, 10))]
    for params in forms:
        flat, plan, _ = plans.planned(params, None, None)
        assert plan.names == ("a/bias", "a/kernel", *(f"blocks/{i}" for i in order))
        for path, entry, leaf in zip(flat.paths, plan.arrays, flat.leaves, strict=True):
            assert entry is not None
            assert plan.names[entry.start] == "/".join(path)
            assert path[0] == "a" or leaf.shape == (int(path[1]) + 1,)
    # Level by level: "a/z" is before "a-b/z", though "-" is before "/".
    assert optax_spd.layer_names({"a-b": {"z": BIAS}, "a": {"z": BIAS}}) == ["a/z", "a-b/z"]


@pytest.mark.parametrize(
    "leaf",
    [jnp.arange(3), np.zeros(2, bool), jnp.ones((0, 3)), None, optax.MaskedNode(), 7],
    ids=["int", "bool", "empty", "None", "MaskedNode", "Python int"],
)
def test_leaves_that_are_no_layers(leaf: Any) -> None:
    assert optax_spd.layer_names({"a": leaf, "b": jnp.ones(2)}) == ["b"]
    # Orbax cannot save an empty array, hence one unused entry where there is no layer at all.
    plan = plan_of({"a": leaf})
    assert (plan.names, plan.vector_size, plan.dtype) == ((), 1, jnp.float32)


def test_arrays_of_a_group_share_their_places() -> None:
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
    plan = plan_of(params, lambda path, array: described[path])
    assert plan.names == ("a", "g[0]", "g[1]", "g[2]", "c")
    numbers = {entry.name: entry.numbers for entry in plan.arrays if entry is not None}
    assert numbers == {"a": range(1), "b": range(1, 4), "c": range(4, 5), "d": range(1, 4)}
    assert [entry.count for entry in plan.arrays if entry is not None] == [1, 3, 1, 3]
    # Any hashable but None is a group's label.
    label = lambda path, array: LayerSpec(group=(1, "x") if path in "ab" else 0)
    plan = plan_of(dict.fromkeys("abcd", BIAS), label)
    assert plan.names == ("(1, 'x')", "0")
    assert [entry.start for entry in plan.arrays if entry is not None] == [0, 0, 1, 1]


def test_several_stacked_axes_count_in_row_major_order() -> None:
    plan = plan_of({"a": jnp.ones(2), "w": jnp.ones((2, 5, 3))}, optax_spd.stacked("w", (2, 0)))
    assert plan.names[1:] == ("w[0,0]", "w[0,1]", "w[0,2]", "w[1,0]", "w[1,1]", "w[1,2]")
    entry = plan.arrays[1]
    assert entry is not None
    assert (entry.stacked_shape, entry.numbers) == ((2, 3), range(1, 7))
    assert entry.stacked_axes == (0, 2)


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


def test_outputs_names_axes_of_the_whole_array() -> None:
    params = {
        "conv": jnp.ones((3, 3, 2, 4)),
        "embedding": jnp.ones((7, 5)),
        "query": jnp.ones((2, 6, 3, 4)),
        "bias": jnp.ones((2, 4)),
        "scale": jnp.ones(3),
    }
    layers = optax_spd.outputs("query", (-2, -1), layers=optax_spd.stacked("query|bias"))
    layers = optax_spd.outputs("embedding", 0, layers=layers)
    plan = plan_of(params, optax_spd.outputs("bias", 5, layers=layers))
    axes = {entry.name: entry.output_axes for entry in plan.arrays if entry is not None}
    assert axes == {
        "conv": (3,),
        "embedding": (0,),
        "query": (2, 3),
        "bias": (),  # one row, whatever is said: rank 1 when the stacked axis is removed
        "scale": (),
    }


@pytest.mark.parametrize(("axis", "output"), [(0, 2), (1, 2), (2, 1), (-1, 1)])
def test_the_default_output_axis_is_the_last_that_is_not_stacked(axis: int, output: int) -> None:
    (entry,) = plan_of(jnp.ones((2, 3, 4)), optax_spd.stacked("", axis)).arrays
    assert entry is not None
    assert entry.output_axes == (output,)


def spec(**axes: Any) -> Any:
    return lambda path, array: LayerSpec(**axes)


def arrays(*shapes: tuple[int, ...]) -> list[Any]:
    return [jnp.ones(shape) for shape in shapes]


ALIKE = {path: jnp.ones(2) for path in "ab"}


@pytest.mark.parametrize(
    ("params", "layers", "message"),
    [
        (
            arrays((3, 2), (4, 2)),
            spec(stacked_axes=(0,), group="all"),
            r"'0' and '1' in the group 'all', but .* sizes \(3,\) and \(4,\)",
        ),
        (
            arrays((3, 2), (2,)),
            lambda _, array: LayerSpec((0,) if array.ndim == 2 else (), group="all"),
            r"'0' and '1' .* sizes \(3,\) and \(\)",
        ),
        (arrays((3, 2)), spec(stacked_axes=(2,)), r"the stacked axis 2 of '0'.* shape \(3, 2\)"),
        (arrays((3, 2)), spec(stacked_axes=(-3,)), r"the stacked axis -3 of '0'.* shape \(3, 2\)"),
        (arrays((3, 2)), spec(output_axes=(2,)), r"the output axis 2 of '0'.* shape \(3, 2\)"),
        (arrays((3, 2)), spec(stacked_axes=(0, -2)), r"a stacked axis of '0' twice: \(0, -2\)"),
        (
            arrays((2, 3, 4)),
            spec(stacked_axes=(2,), output_axes=(-1, 1)),
            r"'0' of shape \(2, 3, 4\) .* an axis cannot be both",
        ),
        (arrays((6, 8, 3)), spec(spatial_axes=(4,)), "the spatial axis 4 of '0'"),
        (
            arrays((6, 8, 3)),
            spec(spatial_axes=(0, 2), output_axes=(0,)),
            r"spatial axes \(0, 2\), and some of them are",
        ),
        (
            arrays((6, 8, 3)),
            spec(spatial_axes=(0, 2), stacked_axes=(0,)),
            r"spatial axes \(0, 2\), and some of them are",
        ),
        ({"a": jnp.ones(1)}, lambda *_: 0, "must return a LayerSpec, got 0 for 'a'"),
        ({"a": jnp.ones(1, complex)}, None, r"'a' is complex .*split_real_and_imaginary"),
        ({"a": jnp.ones(1)}, "a", r"optax_spd\.stacked, outputs and by_module"),
        # Two layers of one name.
        (
            ALIKE,
            lambda path, _: LayerSpec(group={"a": None, "b": "a"}[path]),
            "Two layers have the name 'a'.*'a'.*'b'",
        ),
        (
            ALIKE,
            lambda path, _: LayerSpec(group={"a": 1, "b": "1"}[path]),
            "Two layers have the name '1'.*'a'.*'b'",
        ),
        (
            {"w": jnp.ones((2, 3)), "w[1]": jnp.ones(3)},
            optax_spd.stacked("^w$"),
            r"name 'w\[1\]': that of the array 'w' and .* 'w\[1\]'",
        ),
    ],
)
def test_what_does_not_fit_is_named(params: Any, layers: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        optax_spd.spd(layers=layers).init(params)


def test_an_array_in_the_group_of_its_own_name_is_one_layer_with_the_others() -> None:
    assert optax_spd.layer_names(ALIKE, layers=spec(group="a")) == ["a"]
