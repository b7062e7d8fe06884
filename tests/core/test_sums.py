"""Per-layer sums: against float64 NumPy, and the same under every sharding.

The model of the sharding tests has a split and a replicated array, a stacked one, and groups.
"""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import optax_spd
from optax_spd import LayerSpec
from optax_spd.core import stage, sums
from optax_spd.layers import plans, trees

# Sums on one device ------------------------------------------------------------------------------

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
        found = sums.sums_over(terms, (1,), stack=stack, keepdims=True)
        for total, term in zip(found, terms, strict=True):
            np.testing.assert_array_equal(total, term.sum(axis=1, keepdims=True))


def test_the_norm_of_a_square_that_rounding_made_negative_is_zero() -> None:
    squares = jnp.array([4.0, 0.0, -1e-9])
    np.testing.assert_array_equal(sums.norm_of(squares), [2.0, 0.0, 0.0])
    slopes = jax.vmap(jax.grad(sums.norm_of))(squares)
    np.testing.assert_array_equal(slopes, [0.25, 0.0, 0.0])


def test_a_scalar_or_one_number_a_layer_becomes_a_vector() -> None:
    plan = plans.plan_layers(trees.flatten({"a": jnp.ones(2), "b": jnp.ones(2)}))
    np.testing.assert_array_equal(sums.per_layer("radii", 3, plan), [3.0, 3.0])
    np.testing.assert_array_equal(sums.per_layer("radii", [1, 2], plan), [1.0, 2.0])
    with pytest.raises(ValueError, match=r"radii must be a scalar .* the 2 layers .* shape \(3,\)"):
        sums.per_layer("radii", np.ones(3), plan)
    empty = plans.plan_layers(trees.flatten({}))
    assert sums.per_layer("radii", [], empty).shape == (1,)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_halves_are_summed_in_float32(dtype: Any) -> None:
    # More than the largest float16, and no bfloat16: a sum in either would show.
    size = 70_001
    theta, zeros = np.ones(size, dtype), np.zeros(size, dtype)
    view = stage.StageOptions(anchor="zero").view([zeros], (), [theta], {})
    products = view.map(lambda d, g: (d.delta * g, d.tentative**2), view.match([theta], "grad"))
    for total in sums.layer_sums(view.plan, products, 2, view.axes):
        assert total.dtype == jnp.float32
        assert float(total[0]) == size


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_the_ratio_of_half_precision_params_has_float32_accuracy(dtype: Any) -> None:
    draw = np.random.default_rng(0)
    theta, theta_0 = (draw.normal(size=(200, 300)).astype(dtype) for _ in range(2))
    delta = theta.astype(np.float64) - theta_0.astype(np.float64)
    step = (0.03 * delta + 0.01 * draw.normal(size=delta.shape)).astype(dtype)
    tx = optax_spd.spd(anchor=[theta_0])
    updates, state = tx.update([step], tx.init([theta]), [theta], grad=[delta.astype(dtype)])

    tentative = delta + step.astype(np.float64)
    old, new = np.linalg.norm(delta), np.linalg.norm(tentative)
    expected = (new - old) / new
    assert expected > 0.01
    np.testing.assert_allclose(state.spd_ratio, [expected], rtol=1e-4)
    assert updates[0].dtype == dtype
    wanted = step.astype(np.float64) - expected * tentative
    np.testing.assert_allclose(np.asarray(updates[0], np.float64), wanted, rtol=2.0**-8, atol=1e-4)


# Sharded training --------------------------------------------------------------------------------

STEPS = 8
NAMES = {"1-D": ("d",), "2-D": ("x", "y")}


def mesh_of(shape: str, axis_type: AxisType = AxisType.Auto) -> jax.sharding.Mesh:
    names = NAMES[shape]
    sizes = {"1-D": (8,), "2-D": (4, 2)}[shape]
    return jax.make_mesh(sizes, names, axis_types=(axis_type,) * len(names))


def model() -> Any:
    draw = np.random.default_rng(1)
    normal = lambda *shape: draw.normal(size=shape).astype(np.float32)
    return {
        "blocks": {"bias": normal(3, 8), "kernel": normal(3, 8, 16)},
        "embed": normal(16, 4),
        "norm": {"scale": normal(5)},
    }


def gradients_of(params: Any) -> Any:
    draw = np.random.default_rng(2)
    return jax.tree.map(lambda x: draw.normal(size=(STEPS, *x.shape)).astype(np.float32), params)


STACKED = optax_spd.stacked("^blocks/")
GROUPED = optax_spd.by_module(layers=STACKED)
SPECS: dict[str, Any] = {
    "1-D": {
        "blocks": {"bias": P(), "kernel": P(None, "d")},
        "embed": P("d"),
        "norm": {"scale": P()},
    },
    "2-D": {
        "blocks": {"bias": P(None, "y"), "kernel": P(None, "x", "y")},
        "embed": P(("x", "y")),
        "norm": {"scale": P()},
    },
}


def run(
    tx: optax.GradientTransformationExtraArgs, params: Any, state: Any, gradients: Any
) -> tuple[Any, Any, jax.Array]:
    """Trains on recorded gradients: params, state, and the ratios of all steps."""

    def step(carry: Any, grads: Any) -> Any:
        params, state = carry
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), optax.tree.get(state, "spd_ratio")

    (params, state), ratios = jax.lax.scan(step, (params, state), gradients)
    return params, state, ratios


def pretrained() -> Any:
    """Another model than the one trained, so that Δ is not zero at first."""
    return jax.tree.map(lambda x: 0.5 * x, model())


@functools.cache
def unsharded(grouped: bool) -> tuple[Any, np.ndarray]:
    params = model()
    tx = optax_spd.adam_spd(0.3, anchor=pretrained(), layers=GROUPED if grouped else STACKED)
    scan = jax.jit(functools.partial(run, tx))
    params, _, ratios = jax.device_get(scan(params, tx.init(params), gradients_of(params)))
    assert np.all(np.any(ratios > 0, axis=0))
    return params, ratios


def assert_trained_alike(params: Any, ratios: Any, grouped: bool) -> None:
    expected, expected_ratios = unsharded(grouped)
    np.testing.assert_allclose(ratios, expected_ratios, rtol=0, atol=1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2e-6),
        jax.device_get(params),
        expected,
    )


def state_specs(tx: Any, state: Any, specs: Any) -> Any:
    """The params' specs for what is shaped like params, replicated for the rest."""
    return optax.tree.map_params(
        tx, lambda _, spec: spec, state, specs, transform_non_params=lambda _: P()
    )


def run_in_shard_map(
    tx: Any, params: Any, specs: Any, gradients: Any, mesh: jax.sharding.Mesh
) -> Any:
    state = tx.init(params)
    in_state = state_specs(tx, state, specs)
    in_grads = jax.tree.map(lambda spec: P(None, *spec), specs, is_leaf=lambda s: isinstance(s, P))
    sharded = jax.shard_map(
        functools.partial(run, tx),
        mesh=mesh,
        in_specs=(specs, in_state, in_grads),
        out_specs=(specs, in_state, P()),
    )
    return jax.jit(sharded)(params, state, gradients)


@pytest.mark.parametrize(("mesh", "grouped"), [("1-D", True), ("2-D", False), ("2-D", True)])
def test_shard_map_with_a_tree_of_specs_equals_one_device(mesh: str, grouped: bool) -> None:
    # In the groups of the 2-D mesh a bias is split over one axis and its kernel over both.
    params, specs = model(), SPECS[mesh]
    tx = optax_spd.adam_spd(
        0.3, anchor=pretrained(), layers=GROUPED if grouped else STACKED, axis_name=specs
    )
    params, _, ratios = run_in_shard_map(tx, params, specs, gradients_of(params), mesh_of(mesh))
    assert_trained_alike(params, ratios, grouped)


def test_shard_map_with_a_prefix_of_specs_equals_one_device() -> None:
    params, prefix = model(), {"blocks": P(None, "d"), "embed": P("d"), "norm": P()}
    specs = {
        "blocks": {"bias": P(None, "d"), "kernel": P(None, "d")},
        "embed": P("d"),
        "norm": {"scale": P()},
    }
    tx = optax_spd.adam_spd(0.3, anchor=pretrained(), layers=STACKED, axis_name=prefix)
    params, _, ratios = run_in_shard_map(tx, params, specs, gradients_of(params), mesh_of("1-D"))
    assert_trained_alike(params, ratios, grouped=False)


@pytest.mark.parametrize(
    ("mesh", "axis_name"), [("1-D", "d"), ("1-D", ("d",)), ("2-D", ("x", "y"))]
)
def test_a_name_or_a_tuple_of_names_splits_every_array(mesh: str, axis_name: Any) -> None:
    params = {k: v for k, v in model().items() if k != "norm"}
    axes = NAMES[mesh]
    specs = {"blocks": {"bias": P(None, axes), "kernel": P(None, axes)}, "embed": P(axes)}
    tx = optax_spd.spd(anchor="zero", layers=STACKED, axis_name=axis_name)
    grads = jax.tree.map(lambda x: x + 0.1, params)
    args = (grads, tx.init(params), params)
    in_state = state_specs(tx, args[1], specs)

    def update(steps: Any, state: Any, params: Any) -> Any:
        return tx.update(steps, state, params, grad=steps)

    sharded = jax.shard_map(
        update,
        mesh=mesh_of(mesh),
        in_specs=(specs, in_state, specs),
        out_specs=(specs, in_state),
    )
    updates, state = jax.jit(sharded)(*args)
    alone = optax_spd.spd(anchor="zero", layers=STACKED)
    expected, one_device = jax.jit(lambda u, s, p: alone.update(u, s, p, grad=u))(*args)
    assert np.all(one_device.spd_ratio > 0)
    np.testing.assert_allclose(state.spd_ratio, one_device.spd_ratio, rtol=0, atol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), updates, expected)


def stage_in_shard_map(specs: Any, mesh: jax.sharding.Mesh) -> tuple[Callable[..., Any], Any]:
    """One update of spd, with the gradients as an argument of their own."""
    tx = optax_spd.spd(anchor="zero", layers=STACKED, axis_name=specs)
    state = tx.init(model())
    in_state = state_specs(tx, state, specs)
    sharded = jax.shard_map(
        lambda steps, state, params, grads: tx.update(steps, state, params, grad=grads),
        mesh=mesh,
        in_specs=(specs, in_state, specs, specs),
        out_specs=(specs, in_state),
    )
    return sharded, state


def test_a_nan_in_a_replicated_array_reaches_no_other_layer() -> None:
    sharded, state = stage_in_shard_map(SPECS["2-D"], mesh_of("2-D"))
    update = jax.jit(sharded)
    params = model()
    sick = params | {"norm": {"scale": np.full(5, np.nan, np.float32)}}
    updates, healthy = update(params, state, params, params)
    assert np.all(healthy.spd_ratio > 0)
    sick_updates, state = update(params, state, params, sick)
    names = optax_spd.layer_names(params, layers=STACKED)
    expected = np.where(np.array(names) == "norm/scale", 0, healthy.spd_ratio)
    np.testing.assert_array_equal(state.spd_ratio, expected)
    np.testing.assert_array_equal(sick_updates["norm"]["scale"], params["norm"]["scale"])
    for part in ("blocks", "embed"):
        jax.tree.map(np.testing.assert_array_equal, sick_updates[part], updates[part])


def test_pmap_over_hand_split_arrays_equals_one_device() -> None:
    params = {"a": model()["embed"]}
    split = lambda tree: jax.tree.map(lambda x: x.reshape(8, 2, 4), tree)
    tx = optax_spd.spd(anchor="zero", axis_name="shard")

    def update(params: Any) -> Any:
        return tx.update(params, tx.init(params), params, grad=params)

    updates, state = jax.pmap(update, axis_name="shard")(split(params))
    # ‖Δ̃‖ = 2‖Δ‖: the ratio is one half, and the projection undoes the step.
    np.testing.assert_allclose(state.spd_ratio, np.full((8, 1), 0.5), rtol=1e-6)
    np.testing.assert_allclose(updates["a"], np.zeros((8, 2, 4)), atol=1e-6)


@pytest.mark.parametrize("inside", [False, True], ids=["no mesh set", "set_mesh"])
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=lambda t: t.name)
def test_jit_may_split_a_stacked_axis_itself(axis_type: AxisType, inside: bool) -> None:
    draw = np.random.default_rng(4)
    normal = lambda *shape: draw.normal(size=shape).astype(np.float32)
    params = {"blocks": {"bias": normal(8, 3), "kernel": normal(2, 8, 3)}, "head": normal(5)}
    specs = {"blocks": {"bias": P("d"), "kernel": P(None, "d")}, "head": P()}
    stacked = optax_spd.stacked("kernel", 1, layers=optax_spd.stacked("bias", 0))
    tx = optax_spd.spd(anchor="zero", layers=optax_spd.by_module(layers=stacked))
    update = jax.jit(lambda params: tx.update(params, tx.init(params), params, grad=params))
    mesh = mesh_of("1-D", axis_type)
    sharded = jax.tree.map(
        lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), params, specs
    )
    with jax.set_mesh(mesh) if inside else contextlib.nullcontext():
        updates, state = update(sharded)
    # ‖Δ̃‖ = 2‖Δ‖ in all nine layers, eight blocks and the head.
    np.testing.assert_allclose(state.spd_ratio, np.full(9, 0.5), rtol=1e-6)
    expected, _ = update(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), updates, expected)
