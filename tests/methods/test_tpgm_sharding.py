"""TPGM in shard_map and pmap, where parameters or the validation batch are split by hand."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, PartitionSpec as P

import optax_spd

both_norms = pytest.mark.parametrize("norm", ["l2", "mars"])
STEPS, INNER = 3, 2
SHAPES = {
    "blocks": {"bias": (3, 8), "kernel": (3, 8, 16)},
    "embed": (16, 8),
    "norm": (5,),
}
STACKED = optax_spd.stacked("^blocks/")
GROUPED = optax_spd.by_module(layers=STACKED)
SPECS: dict[str, Any] = {
    "rows": {"blocks": {"bias": P(), "kernel": P(None, "x")}, "embed": P("x"), "norm": P()},
    "columns": {
        "blocks": {"bias": P(None, "y"), "kernel": P(None, None, "x")},
        "embed": P(None, ("x", "y")),
        "norm": P(),
    },
    "both": {
        "blocks": {"bias": P(None, "x"), "kernel": P(None, "x", "y")},
        "embed": P("y", "x"),
        "norm": P(),
    },
}


def arrays(seed: int, *leading: int, scale: float = 1.0) -> Any:
    draw = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: (scale * draw.normal(size=(*leading, *shape))).astype(np.float32),
        SHAPES,
        is_leaf=lambda node: isinstance(node, tuple),
    )


def with_leading(specs: Any) -> Any:
    return jax.tree.map(lambda s: P(None, *s), specs, is_leaf=lambda s: isinstance(s, P))


def mesh_of(axis_type: AxisType = AxisType.Auto) -> jax.sharding.Mesh:
    return jax.make_mesh((4, 2), ("x", "y"), axis_types=(axis_type,) * 2)


def half_distance(params: Any, batch: Any) -> Any:
    parts = jax.tree.map(lambda x, y: jnp.sum((x - y) ** 2) / 2, params, batch)
    return sum(jax.tree.leaves(parts))


def run(tx: Any, loss: Any, params: Any, state: Any, updates: Any, batches: Any) -> Any:
    """Steps with recorded updates and validation batches."""

    def step(carry: Any, xs: Any) -> Any:
        (params, state), (steps, batches) = carry, xs
        extra = {"validation_fn": loss, "validation_batches": batches}
        steps, state = tx.update(steps, state, params, **extra)
        return (optax.apply_updates(params, steps), state), None

    return jax.lax.scan(step, (params, state), (updates, batches))[0]


def build(norm: str, layers: Any = None, **options: Any) -> Any:
    return optax_spd.tpgm(optax.sgd(0.02), norm=norm, layers=layers, every=2, **options)


@functools.cache
def on_one_device(norm: str, grouped: bool) -> Any:
    params, updates, batches = inputs()
    tx = build(norm, GROUPED if grouped else STACKED)
    step = jax.jit(functools.partial(run, tx, half_distance))
    trained, state = jax.device_get(step(params, tx.init(params), updates, batches))
    assert np.all(state.tpgm_radii > 0.01)
    return trained, state.tpgm_radii


def inputs() -> Any:
    """Parameters; updates of all steps; validation batches of all steps."""
    return arrays(0), arrays(1, STEPS, scale=0.5), arrays(2, STEPS, INNER, scale=0.3)


def assert_alike(found: Any, expected: Any) -> None:
    params, state = jax.device_get(found)
    wanted, radii = expected
    np.testing.assert_allclose(state.tpgm_radii, radii, rtol=1e-4, atol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), params, wanted)


# shard_map ----------------------------------------------------------------------------------------


def summed_distance(specs: Any) -> Callable[..., Any]:
    """The loss of all devices: each array's part summed over the axes that split it."""

    def loss(params: Any, batch: Any) -> Any:
        def part(x: jax.Array, y: jax.Array, spec: P) -> jax.Array:
            names = tuple(jax.tree.leaves(tuple(spec)))
            local = jnp.sum((x - y) ** 2) / 2
            return jax.lax.psum(local, names) if names else local

        return sum(jax.tree.leaves(jax.tree.map(part, params, batch, specs)))

    return loss


def state_specs(tx: Any, state: Any, specs: Any) -> Any:
    return optax.tree.map_params(
        tx, lambda _, spec: spec, state, specs, transform_non_params=lambda _: P()
    )


def run_in_shard_map(tx: Any, specs: Any, mesh: jax.sharding.Mesh, trees: Any) -> Any:
    params, updates, batches = trees
    state = tx.init(params)
    in_state = state_specs(tx, state, specs)
    sharded = jax.shard_map(
        functools.partial(run, tx, summed_distance(specs)),
        mesh=mesh,
        in_specs=(specs, in_state, with_leading(specs), with_leading(with_leading(specs))),
        out_specs=(specs, in_state),
    )
    return jax.jit(sharded)(params, state, updates, batches)


@both_norms
@pytest.mark.parametrize(("specs", "grouped"), [("rows", True), ("columns", False), ("both", True)])
def test_shard_map_with_specs(specs: str, grouped: bool, norm: str) -> None:
    spec = SPECS[specs]
    tx = build(norm, GROUPED if grouped else STACKED, axis_name=spec)
    found = run_in_shard_map(tx, spec, mesh_of(), inputs())
    assert_alike(found, on_one_device(norm, grouped))


# Data parallelism by hand -------------------------------------------------------------------------


def squared_error(params: Any, batch: Any) -> jax.Array:
    x, y = batch
    return jnp.mean((jnp.tanh(x @ params["kernel"]) + params["bias"] - y) ** 2)


def regression() -> Any:
    draw = np.random.default_rng(0)
    normal = lambda *shape: draw.normal(size=shape).astype(np.float32)
    params = {"bias": normal(4), "kernel": normal(6, 4)}
    updates = {"bias": normal(STEPS, 4), "kernel": normal(STEPS, 6, 4)}
    return params, updates, (normal(STEPS, INNER, 16, 6), normal(STEPS, INNER, 16, 4))


@both_norms
def test_shard_map_over_the_validation_batch(norm: str) -> None:
    params, updates, batches = regression()
    tx = build(norm)
    state = tx.init(params)
    alone = jax.jit(functools.partial(run, tx, squared_error))
    expected, wanted = alone(params, state, updates, batches)
    mean_error = lambda params, batch: jax.lax.pmean(squared_error(params, batch), "d")
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
    sharded = jax.shard_map(
        functools.partial(run, tx, mean_error),
        mesh=mesh,
        in_specs=(P(), P(), P(), P(None, None, "d")),
        out_specs=P(),
    )
    found = jax.jit(sharded)(params, state, updates, batches)
    assert_alike(found, (jax.device_get(expected), np.asarray(wanted.tpgm_radii)))


@pytest.mark.parametrize("how", ["shard_map", "shard_map unchecked", "pmap"])
def test_the_radii_of_hand_split_arrays_are_those_of_one_device(how: str) -> None:
    # Outside of a checked shard_map a psum's gradient is a psum too: 8 times too large.
    draw = np.random.default_rng(0)
    params, updates, batches = (
        draw.normal(size=shape).astype(np.float32) for shape in ((8, 4), (8, 4), (2, 8, 4))
    )

    def radii(axis_name: Any, params: Any, updates: Any, batches: Any) -> jax.Array:
        tx = optax_spd.tpgm(optax.sgd(0.01), norm="l2", axis_name=axis_name)

        def loss(params: Any, batch: Any) -> jax.Array:
            part = jnp.sum((params - batch) ** 2)
            return part if axis_name is None else jax.lax.psum(part, axis_name)

        extra = {"validation_fn": loss, "validation_batches": batches}
        return tx.update(updates, tx.init(params), params, **extra)[1].tpgm_radii

    expected = jax.jit(functools.partial(radii, None))(params, updates, batches)
    if how == "pmap":
        found = jax.pmap(functools.partial(radii, "d"), axis_name="d")(
            params.reshape(8, 1, 4),
            updates.reshape(8, 1, 4),
            batches.reshape(2, 8, 1, 4).swapaxes(0, 1),
        )[0]
    else:
        sharded = jax.shard_map(
            functools.partial(radii, "d"),
            mesh=jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,)),
            in_specs=(P("d"), P("d"), P(None, "d")),
            out_specs=P(),
            check_vma=how == "shard_map",
        )
        found = jax.jit(sharded)(params, updates, batches)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
