"""Per-layer sums: against float64 NumPy, and the same under every sharding."""

import functools
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec as P

import optax_spd
from optax_spd import LayerSpec
from optax_spd.core import sums
from optax_spd.layers import plans, trees

SHAPES = [(), (5,), (2, 3), (3, 2), (2, 3, 4), (0, 3)]


@st.composite
def described_arrays(draw: st.DrawFn) -> dict[str, tuple[tuple[int, ...], LayerSpec]]:
    """A tree of shapes, each with stacked axes and perhaps a group of its stacked sizes."""
    described = {}
    for index in range(draw(st.integers(1, 5))):
        shape = draw(st.sampled_from(SHAPES))
        axes = draw(st.lists(st.sampled_from(range(len(shape))), unique=True)) if shape else []
        sizes = tuple(shape[a] for a in sorted(axes))
        group = f"group{sizes}" if draw(st.booleans()) else None
        described[f"p{index}"] = (shape, LayerSpec(stacked_axes=axes, group=group))
    return described


@hypothesis.given(described=described_arrays(), seed=st.integers(0, 9))
@hypothesis.settings(max_examples=25, deadline=None, derandomize=True)
def test_sums_equal_numpy_in_float64(
    described: dict[str, tuple[tuple[int, ...], LayerSpec]], seed: int
) -> None:
    draw = np.random.default_rng(seed)
    count = 2
    terms = {
        name: tuple(draw.normal(size=shape).astype(np.float32) for _ in range(count))
        for name, (shape, _) in described.items()
    }
    expected: dict[str, np.ndarray] = {}
    for name, (shape, spec) in described.items():
        if 0 in shape:
            continue
        axes = sorted(spec.stacked_axes)
        sizes = [shape[a] for a in axes]
        for index in np.ndindex(*sizes):
            key = (spec.group or name) + (f"[{','.join(map(str, index))}]" if axes else "")
            rows = [
                np.moveaxis(t.astype(np.float64), axes, range(len(axes)))[index]
                for t in terms[name]
            ]
            expected[key] = expected.get(key, 0) + np.array([row.sum() for row in rows])

    flat = trees.flatten({name: np.ones(shape) for name, (shape, _) in described.items()})
    plan = plans.plan_layers(flat, lambda path, _: described[path][1])
    totals = jax.jit(lambda terms: sums.layer_sums(plan, [terms[n] for n in described], count))(
        terms
    )
    assert all(s.shape == (max(1, len(expected)),) for s in totals)
    assert set(plan.names) == set(expected)
    table = np.array([expected[name] for name in plan.names]).reshape(-1, count)
    for s, column in zip(totals, table.T, strict=True):
        np.testing.assert_allclose(s[: len(table)], column, rtol=0, atol=1e-5)


def test_a_layer_without_products_sums_to_zero() -> None:
    flat = trees.flatten({"a": jnp.ones(2), "b": jnp.ones((2, 2)), "n": jnp.arange(2)})
    plan = plans.plan_layers(flat, optax_spd.stacked("b"))
    products = [None, (jnp.ones((2, 2)),), None]
    (totals,) = sums.layer_sums(plan, products, 1)
    np.testing.assert_array_equal(totals, [0.0, 2.0, 2.0])
    (totals,) = sums.layer_sums(plan, [None] * 3, 1)
    np.testing.assert_array_equal(totals, [0.0, 0.0, 0.0])
    empty = plans.plan_layers(trees.flatten({}))
    assert [s.shape for s in sums.layer_sums(empty, [], 3)] == [(1,)] * 3


def test_spread_is_the_inverse_of_a_sum_over_slices() -> None:
    array = np.arange(24.0, dtype=np.float32).reshape(2, 3, 4)
    flat = trees.flatten({"a": jnp.ones(5), "b": array})
    plan = plans.plan_layers(flat, optax_spd.stacked("b", (0, 2)))
    (totals,) = sums.layer_sums(plan, [(jnp.ones(5),), (jnp.asarray(array),)], 1)
    assert plan.arrays[1] is not None
    spread = sums.spread(plan.arrays[1], totals, 3)
    np.testing.assert_array_equal(spread, array.sum(axis=1, keepdims=True))


def test_more_operands_than_one_all_reduce_merges_are_stacked() -> None:
    assert sums.needs_stacking([(0, 0, 0)] * 86)
    assert not sums.needs_stacking([(0, 0, 0)] * 85 + [None])
    terms = tuple(np.float32(np.arange(6).reshape(2, 3) + k) for k in range(2))
    for stack in (False, True):
        found = sums.sums_over(terms, axes=(1,), stack=stack, keepdims=True)
        for total, term in zip(found, terms, strict=True):
            np.testing.assert_array_equal(total, term.sum(axis=1, keepdims=True))


def test_the_norm_of_a_square_that_rounding_made_negative_is_zero() -> None:
    squares = jnp.array([4.0, 0.0, -1e-9])
    np.testing.assert_array_equal(sums.norm_of(squares), [2.0, 0.0, 0.0])
    for slope in (jax.grad, jax.jacfwd):
        slopes = jax.vmap(slope(sums.norm_of))(squares)
        np.testing.assert_array_equal(slopes, [0.25, 0.0, 0.0])


def test_a_scalar_or_one_number_a_layer_becomes_a_vector() -> None:
    plan = plans.plan_layers(trees.flatten({"a": jnp.ones(2), "b": jnp.ones(2)}))
    np.testing.assert_array_equal(sums.per_layer("radii", 3, plan), [3.0, 3.0])
    np.testing.assert_array_equal(sums.per_layer("radii", [1, 2], plan), [1.0, 2.0])
    with pytest.raises(ValueError, match=r"radii must be a scalar .* the 2 layers .* shape \(3,\)"):
        sums.per_layer("radii", np.ones(3), plan)
    empty = plans.plan_layers(trees.flatten({}))
    assert sums.per_layer("radii", [], empty).shape == (1,)


# Under sharding ----------------------------------------------------------------------------------
# (Whole stages on hand-split parameters: test_layerwise.py.)


def spd_step(params: Any, **options: Any) -> tuple[Any, jax.Array]:
    """A step that doubles the deviation: each layer's ratio is 1/2, and SPD undoes the step."""
    tx = optax_spd.spd(anchor="zero", **options)
    updates, state = tx.update(params, tx.init(params), params, grad=params)
    return updates, state.spd_ratio


def assert_undone(updates: Any, ratios: Any) -> None:
    np.testing.assert_allclose(ratios, np.full_like(ratios, 0.5), rtol=1e-6)
    jax.tree.map(lambda u: np.testing.assert_allclose(u, np.zeros_like(u), atol=1e-6), updates)


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(4).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("axis_name", ["d", ("d",), ("x", "y")])
def test_a_name_or_a_tuple_of_names_splits_every_array(axis_name: Any) -> None:
    names = ("x", "y") if axis_name == ("x", "y") else ("d",)
    sizes = (4, 2) if len(names) == 2 else (8,)
    mesh = jax.make_mesh(sizes, names, axis_types=(AxisType.Auto,) * len(names))
    params = {"blocks": normal(3, 8, 2), "embed": normal(16, 4)}
    specs = {"blocks": P(None, names), "embed": P(names)}
    step = functools.partial(spd_step, layers=optax_spd.stacked("blocks"), axis_name=axis_name)
    mapped = jax.shard_map(step, mesh=mesh, in_specs=(specs,), out_specs=(specs, P()))
    assert_undone(*jax.jit(mapped)(params))


def test_pmap_over_hand_split_arrays_equals_one_device() -> None:
    step = functools.partial(spd_step, axis_name="shard")
    assert_undone(*jax.pmap(step, axis_name="shard")({"a": normal(8, 2, 4)}))
