"""FTP in parameters that are split by hand, and where its state lives."""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import optax_spd

STEPS = 5
STACKED = optax_spd.stacked("^blocks/")
LAYERS = {"apart": STACKED, "modules": optax_spd.by_module(layers=STACKED)}
# The kernels are split along inputs, outputs or both; the bias as its module's outputs, or not.
SPECS: dict[str, Any] = {
    "inputs": {"blocks": {"bias": P(), "kernel": P(None, "x")}, "embed": P("x")},
    "outputs": {"blocks": {"bias": P(None, "x"), "kernel": P(None, None, "x")}, "embed": P()},
    "both": {"blocks": {"bias": P(None, "y"), "kernel": P(None, "x", "y")}, "embed": P(("x", "y"))},
    "replicated bias": {"blocks": {"bias": P(), "kernel": P(None, "y", "x")}, "embed": P("y", "x")},
}


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def model() -> Any:
    return {
        "blocks": {"bias": normal(0, 2, 8), "kernel": normal(1, 2, 8, 8)},
        "embed": normal(2, 8, 4),
    }


def gradients() -> Any:
    turning = np.cos(np.arange(STEPS, dtype=np.float32))
    one = lambda x: turning.reshape(-1, *[1] * x.ndim) * x + 0.3 * normal(3, STEPS, *x.shape)
    return jax.tree.map(one, model())


def optimizer(norm: str, layers: str, axis_name: Any = None) -> Any:
    return optax_spd.sgd_ftp(
        0.1,
        norm=norm,
        radius_learning_rate=0.2,
        anchor=jax.tree.map(lambda x: 0.9 * x, model()),
        layers=LAYERS[layers],
        axis_name=axis_name,
    )


def run(tx: Any, params: Any, state: Any, grads: Any) -> tuple[Any, Any, jax.Array]:
    def step(carry: Any, grads: Any) -> Any:
        params, state = carry
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), oracles.decisions(state)

    (params, state), radii = jax.lax.scan(step, (params, state), grads)
    return params, state, radii


@functools.cache
def unsharded(norm: str, layers: str) -> tuple[Any, Any]:
    params, radii = oracles.train(optimizer(norm, layers), model(), gradients())
    assert np.all(radii[-1] > 0.05)
    assert len(np.unique(radii[-1])) == len(radii[-1])
    return params, radii


def assert_same(found: tuple[Any, Any], norm: str, layers: str) -> None:
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2e-6),
        jax.device_get(found),
        unsharded(norm, layers),
    )


def in_shard_map(tx: Any, specs: Any) -> tuple[Any, Any]:
    """Trains with each device's part in its hands."""
    is_spec = lambda s: isinstance(s, P)
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    state = tx.init(model())
    state_specs = optax.tree.map_params(
        tx, lambda _, spec: spec, state, specs, transform_non_params=lambda _: P()
    )
    grad_specs = jax.tree.map(lambda spec: P(None, *spec), specs, is_leaf=is_spec)
    sharded = jax.shard_map(
        functools.partial(run, tx),
        mesh=mesh,
        in_specs=(specs, state_specs, grad_specs),
        out_specs=(specs, state_specs, P()),
    )
    params, _, radii = jax.jit(sharded)(model(), state, gradients())
    return params, radii


@pytest.mark.parametrize(
    ("split", "norm", "layers"),
    [
        ("inputs", "mars", "modules"),
        ("outputs", "mars", "modules"),
        ("both", "mars", "apart"),
        ("both", "mars", "modules"),
        ("replicated bias", "mars", "modules"),
        ("both", "l2", "modules"),
        ("replicated bias", "l2", "apart"),
    ],
)
def test_shard_map_with_specs_equals_one_device(split: str, norm: str, layers: str) -> None:
    specs = SPECS[split]
    assert_same(in_shard_map(optimizer(norm, layers, specs), specs), norm, layers)


def test_a_bare_name_splits_every_array_in_l2() -> None:
    specs = {
        "blocks": {"bias": P(None, "x"), "kernel": P(None, None, "x")},
        "embed": P("x"),
    }
    found = in_shard_map(optimizer("l2", "modules", "x"), specs)
    assert_same(found, "l2", "modules")


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=lambda t: t.name)
@pytest.mark.parametrize("jitted", [False, True], ids=["eager init", "jitted init"])
def test_the_deviation_is_split_like_its_parameter_from_the_start(
    jitted: bool, axis_type: AxisType
) -> None:
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(axis_type,) * 2)
    tx = optax_spd.adam_ftp(0.1, state_dtype=jnp.bfloat16)
    params = jax.tree.map(
        lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), model(), SPECS["both"]
    )
    with jax.set_mesh(mesh):
        state = (jax.jit(tx.init) if jitted else tx.init)(params)
        _, after = jax.jit(tx.update)(params, state, params)
    for held in (state, after):
        deviation = optax.tree.get(held, "ftp_deviation")
        for c, theta in zip(jax.tree.leaves(deviation), jax.tree.leaves(params), strict=True):
            assert c.dtype == jnp.bfloat16
            assert c.sharding.is_equivalent_to(theta.sharding, c.ndim), c.sharding


def test_a_jitted_step_gathers_nothing() -> None:
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    place = lambda tree: jax.tree.map(
        lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), tree, SPECS["both"]
    )
    tx = optimizer("mars", "modules")
    params = place(model())
    text = jax.jit(tx.update).lower(params, tx.init(params), params).compile().as_text()
    assert "all-reduce" in text
    for moved in ("all-gather", "collective-permute", "all-to-all"):
        assert moved not in text


@pytest.mark.parametrize(
    ("spec", "most"), [(P("x"), 1), (P(None, "x"), 2)], ids=["inputs split", "outputs split"]
)
@pytest.mark.parametrize("norm", ["mars", "l2"])
@pytest.mark.parametrize("stage", [optax_spd.ftp, optax_spd.tpgm], ids=["ftp", "tpgm"])
def test_one_reduction_for_many_arrays(stage: Any, norm: str, spec: P, most: int) -> None:
    """And one more for the largest row where rows are spread over devices."""
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    arrays = {f"kernel_{i}": jnp.ones((16, 8)) for i in range(12)}
    params = jax.device_put(arrays, NamedSharding(mesh, spec))
    tx = optax_spd.with_gradient(stage(norm=norm))
    text = jax.jit(tx.update).lower(params, tx.init(params), params).compile().as_text()
    assert 1 <= len(re.findall(r" all-reduce(?:-start)?\(", text)) <= most
