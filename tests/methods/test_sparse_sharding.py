"""Sparse increments on a mesh: the same entries as on one device, and no array gathered whole."""

import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import optax_spd

BOTH = pytest.mark.parametrize(
    "axis_type", [AxisType.Auto, AxisType.Explicit], ids=lambda t: t.name
)
SHAPES = {"odd": (40, 72), "split": (64, 96), "stack": (32, 4, 48), "stacks": (8, 32, 24)}
SPECS = {"odd": P(None, "x"), "split": P("x", "y"), "stack": P("x", None, "y"), "stacks": P("x")}
LAYERS = optax_spd.stacked("stack$", axis=1, layers=optax_spd.stacked("stacks", axis=0))
FRACTION = 0.02


def mesh_of(axis_type: AxisType) -> jax.sharding.Mesh:
    return jax.make_mesh((4, 2), ("x", "y"), axis_types=(axis_type,) * 2)


def arrays(seed: int) -> Any:
    """With many equal scores, and a NaN."""
    draw = np.random.default_rng(seed)
    found = {
        name: np.round(4 * draw.normal(size=shape)).astype(np.float32) / 4
        for name, shape in SHAPES.items()
    }
    found["odd"][3, 5] = np.nan
    return found


def optimizer() -> Any:
    inner_layers = optax_spd.stacked("stack", axis=0)
    return optax_spd.with_sparse(
        optax_spd.adam_spd(0.1, layers=inner_layers), FRACTION, layers=LAYERS
    )


@BOTH
def test_the_entries_are_those_of_one_device_and_no_array_is_gathered(axis_type: AxisType) -> None:
    mesh, tx = mesh_of(axis_type), optimizer()
    grads = arrays(0)
    params = {name: np.nan_to_num(x) for name, x in arrays(1).items()}
    expected = jax.jit(tx.update)(grads, tx.init(params), params)
    shardings = {name: NamedSharding(mesh, spec) for name, spec in SPECS.items()}
    with jax.set_mesh(mesh):
        params, grads = jax.device_put((params, grads), (shardings, shardings))
        state = jax.jit(tx.init)(params)
        compiled = jax.jit(tx.update).lower(grads, state, params).compile()
        updates, state = jax.block_until_ready(compiled(grads, state, params))
    for name, chosen in expected[1].sparse_indices.items():
        np.testing.assert_array_equal(state.sparse_indices[name], chosen)
        assert updates[name].sharding.is_equivalent_to(shardings[name], updates[name].ndim)
        np.testing.assert_allclose(updates[name], expected[0][name], rtol=1e-5)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6), state, expected[1]
    )
    assert_nothing_whole(compiled.as_text(), expected[1])


def assert_nothing_whole(text: str, state: Any) -> None:
    """Devices exchange counts, the words of the choice and the chosen entries; none has more."""
    of = r"= (.+?) (all-reduce|all-gather|all-to-all|collective-\w+|reduce-scatter)(?:-start)?\("
    moved = re.findall(of, text)
    assert moved
    assert {name for _, name in moved} <= {"all-reduce", "all-gather"}
    sizes = lambda shapes: [
        math.prod(int(n) for n in shape.split(",") if n)
        for shape in re.findall(r"\b(?:f|s|u|bf|pred)\d*\[([\d,]*)\]", shapes)
    ]
    # Levels and what is above them, in words of 32 bits.
    words = max(2 * math.prod(shape) // 32 for shape in SHAPES.values())
    entries = max(x.size for x in jax.tree.leaves(state.sparse_indices))
    for shapes, name in moved:
        assert max(sizes(shapes), default=0) <= max(words, entries), (name, shapes)
    # Nothing at all is as large as an array of the model.
    assert max(sizes(text)) < min(map(math.prod, SHAPES.values()))


def test_the_state_of_sharded_shapes_is_whole_on_each_device() -> None:
    mesh = mesh_of(AxisType.Auto)
    shapes = {
        name: jax.ShapeDtypeStruct(SHAPES[name], jnp.float32, sharding=NamedSharding(mesh, spec))
        for name, spec in SPECS.items()
    }
    state = optimizer().init(shapes)
    assert all(x.sharding.is_fully_replicated for x in jax.tree.leaves(state.sparse_indices))
    # As a trainer makes the shardings of a state.
    specs = optax.tree.map_params(
        optimizer(), lambda _, spec: spec, state, SPECS, transform_non_params=lambda _: P()
    )
    assert set(jax.tree.leaves(specs, is_leaf=lambda node: isinstance(node, P))) == {P()}
