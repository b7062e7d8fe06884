"""FTP of parameters that are split by hand."""

import functools
from typing import Any

import jax
import numpy as np
import optax
import oracles
import pytest
from jax.sharding import AxisType, PartitionSpec as P

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


def in_pmap(tx: Any, specs: Any) -> tuple[Any, Any]:
    """Trains with each device's part in its hands, along a leading axis for ``pmap``."""
    axis_of = lambda spec: next((axis for axis, name in enumerate(spec) if name == "x"), None)

    def parts(x: np.ndarray, spec: P, lead: int = 0) -> np.ndarray:
        axis = axis_of(spec)
        return np.stack([x] * 8 if axis is None else np.split(x, 8, axis + lead))

    def whole(parts: np.ndarray, spec: P) -> np.ndarray:
        axis = axis_of(spec)
        if axis is not None:
            return np.concatenate(parts, axis)
        np.testing.assert_array_equal(parts, parts[:1].repeat(8, 0))
        return parts[0]

    split = functools.partial(jax.tree.map, parts)
    state = optax.tree.map_params(
        tx, parts, tx.init(model()), specs, transform_non_params=lambda x: np.stack([x] * 8)
    )
    grads = jax.tree.map(functools.partial(parts, lead=1), gradients(), specs)
    train = jax.pmap(functools.partial(run, tx), axis_name="x")
    params, _, radii = jax.device_get(train(split(model(), specs), state, grads))
    return jax.tree.map(whole, params, specs), whole(radii, P())


@pytest.mark.parametrize("norm", ["mars", "l2"])
def test_pmap_of_split_and_whole_arrays_equals_one_device(norm: str) -> None:
    # Each bias is in a group with a split kernel.
    specs = {"blocks": {"bias": P(), "kernel": P(None, None, "x")}, "embed": P("x")}
    assert_same(in_pmap(optimizer(norm, "modules", specs), specs), norm, "modules")
