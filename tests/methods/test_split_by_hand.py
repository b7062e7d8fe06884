"""Parameters that a caller splits by hand, in shard_map or pmap, train as on one device."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest
from jax.sharding import AxisType, PartitionSpec as P

import optax_spd

STEPS, INNER = 4, 2
SHAPES = {"blocks": {"bias": (3, 8), "kernel": (3, 8, 8)}, "embed": (8, 4)}
STACKED = optax_spd.stacked("^blocks/")
LAYERS = {"apart": STACKED, "modules": optax_spd.by_module(layers=STACKED)}
# The kernels are split along inputs, outputs or both; the bias as its module's outputs, or not.
SPECS: dict[str, Any] = {
    "inputs": {"blocks": {"bias": P(), "kernel": P(None, "x")}, "embed": P("x")},
    "outputs": {"blocks": {"bias": P(None, "x"), "kernel": P(None, None, "x")}, "embed": P("x")},
    "both": {"blocks": {"bias": P(None, "y"), "kernel": P(None, "x", "y")}, "embed": P(("x", "y"))},
    "one bias": {"blocks": {"bias": P(), "kernel": P(None, "y", "x")}, "embed": P("y", "x")},
    "some": {"blocks": {"bias": P(), "kernel": P(None, None, "x")}, "embed": P("x")},
}


normal = functools.partial(oracles.normal_tree, SHAPES)


def recorded() -> tuple[Any, Any]:
    """Gradients that turn round and validation batches, both with a leading step axis."""
    turning = np.cos(np.arange(STEPS, dtype=np.float32))
    drift = lambda x, noise: turning.reshape(-1, *[1] * x.ndim) * x + 0.3 * noise
    return jax.tree.map(drift, normal(0), normal(1, STEPS)), normal(2, STEPS, INNER)


MODEL, RECORDED = normal(0), recorded()
MESH = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
ANCHOR = jax.tree.map(lambda x: 0.9 * x, MODEL)


def ftp(norm: Any, **options: Any) -> Any:
    return optax_spd.sgd_ftp(0.1, norm=norm, radius_learning_rate=0.2, anchor=ANCHOR, **options)


def tpgm(norm: Any, **options: Any) -> Any:
    stage = optax_spd.tpgm(optax.sgd(0.002), norm=norm, anchor=ANCHOR, every=2, **options)
    return optax.chain(optax.sgd(0.5), stage)


def auto_rgn(**options: Any) -> Any:
    return optax_spd.chain(optax.sgd(0.1), optax_spd.auto_rgn(every=2, **options))


def relative_clip(layers: Any, axis_name: Any = None) -> Any:
    clip = optax_spd.clip_by_relative_norm(0.1, 0.01, 0.5, axis_name=axis_name)
    return optax.chain(clip, optax.sgd(0.1))


def fednar(layers: Any, axis_name: Any = None) -> Any:
    return optax_spd.sgd_fednar(
        0.1, weight_decay=0.5, max_norm=3.0, mask={"blocks": True, "embed": False},
        axis_name=axis_name,
    )  # fmt: skip


OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "ftp in mars": functools.partial(ftp, "mars"),
    "ftp in l2": functools.partial(ftp, "l2"),
    "tpgm in mars": functools.partial(tpgm, "mars"),
    "tpgm in l2": functools.partial(tpgm, "l2"),
    "auto_rgn": auto_rgn,
    "clip_by_relative_norm": relative_clip,
    "sgd_fednar": fednar,
}
FIELDS = ("ftp_radii", "tpgm_radii", "auto_rgn_scale")

Run = tuple[Any, list[Any]]  # the last parameters, and what the method decided in every step


def run(tx: Any, loss: Any, params: Any, state: Any, recorded: Any) -> Run:
    def step(carry: Any, recorded: Any) -> Any:
        params, state = carry
        grads, batches = recorded
        extra = {"validation_fn": loss, "validation_batches": batches}
        updates, state = tx.update(grads, state, params, **extra)
        decided = [optax.tree.get(state, field) for field in FIELDS]
        return (optax.apply_updates(params, updates), state), decided

    (params, _), decided = jax.lax.scan(step, (params, state), recorded)
    return params, decided


def names_of(spec: P) -> tuple[str, ...]:
    return tuple(jax.tree.leaves(tuple(spec)))


def distance(specs: Any, params: Any, batch: Any) -> jax.Array:
    """Half the squared distance, each array's part summed over the axes that split it."""

    def part(x: jax.Array, y: jax.Array, spec: P) -> jax.Array:
        local = jnp.sum((x - y) ** 2) / 2
        return jax.lax.psum(local, names_of(spec)) if names_of(spec) else local

    return jnp.stack(jax.tree.leaves(jax.tree.map(part, params, batch, specs))).sum()


WHOLE = jax.tree.map(lambda _: P(), MODEL)


@functools.cache
def on_one_device(name: str, layers: str) -> Run:
    tx = OPTIMIZERS[name](layers=LAYERS[layers])
    train = jax.jit(functools.partial(run, tx, functools.partial(distance, WHOLE)))
    params, decided = jax.device_get(train(MODEL, tx.init(MODEL), RECORDED))
    for vectors in jax.tree.leaves(decided):
        assert np.all(vectors[-1] > 0.01)
        assert len(np.unique(vectors[-1])) == len(vectors[-1])
    return params, decided


def assert_same(found: Run, expected: Run) -> None:
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=5e-6)
    jax.tree.map(close, jax.device_get(found), expected)


def under(specs: Any, *leading: None) -> Any:
    is_spec = lambda node: isinstance(node, P)
    return jax.tree.map(lambda spec: P(*leading, *spec), specs, is_leaf=is_spec)


def in_shard_map(tx: Any, specs: Any, recorded: Any = RECORDED, check_vma: bool = True) -> Run:
    """Trains with each device's part in its hands."""
    state = tx.init(MODEL)
    state_specs = optax.tree.map_params(
        tx, lambda _, spec: spec, state, specs, transform_non_params=lambda _: P()
    )
    sharded = jax.shard_map(
        functools.partial(run, tx, functools.partial(distance, specs)),
        mesh=MESH,
        in_specs=(specs, state_specs, (under(specs, None), under(specs, None, None))),
        out_specs=(specs, P()),
        check_vma=check_vma,
    )
    return jax.jit(sharded)(MODEL, state, recorded)


@pytest.mark.parametrize(
    ("name", "split", "layers"),
    [
        ("ftp in mars", "inputs", "modules"),
        ("ftp in mars", "outputs", "modules"),
        ("ftp in mars", "both", "apart"),
        ("ftp in mars", "both", "modules"),
        ("ftp in mars", "one bias", "modules"),
        ("ftp in l2", "both", "modules"),
        ("ftp in l2", "one bias", "apart"),
        ("tpgm in mars", "inputs", "modules"),
        ("tpgm in mars", "outputs", "apart"),
        ("tpgm in mars", "one bias", "modules"),
        ("tpgm in l2", "both", "modules"),
        ("tpgm in l2", "outputs", "apart"),
        ("auto_rgn", "one bias", "modules"),
        ("auto_rgn", "outputs", "apart"),
        ("clip_by_relative_norm", "one bias", "apart"),
        ("sgd_fednar", "one bias", "apart"),
    ],
)
def test_shard_map_with_specs_equals_one_device(name: str, split: str, layers: str) -> None:
    specs = SPECS[split]
    tx = OPTIMIZERS[name](layers=LAYERS[layers], axis_name=specs)
    assert_same(in_shard_map(tx, specs), on_one_device(name, layers))


@pytest.mark.parametrize("check_vma", [True, False], ids=["checked", "unchecked"])
@pytest.mark.parametrize("name", [n for n in OPTIMIZERS if "mars" not in n])
def test_a_bare_name_splits_every_array(name: str, check_vma: bool) -> None:
    """Outside of a checked shard_map a psum's gradient is a psum too: the loss's, too large."""
    tx = OPTIMIZERS[name](layers=STACKED, axis_name="x")
    assert_same(
        in_shard_map(tx, SPECS["outputs"], check_vma=check_vma), on_one_device(name, "apart")
    )


def in_pmap(tx: Any, specs: Any) -> Run:
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

    split = lambda tree, lead=0: jax.tree.map(functools.partial(parts, lead=lead), tree, specs)
    state = optax.tree.map_params(
        tx, parts, tx.init(MODEL), specs, transform_non_params=lambda x: np.stack([x] * 8)
    )
    grads, batches = RECORDED
    train = jax.pmap(functools.partial(run, tx, functools.partial(distance, specs)), axis_name="x")
    params, decided = jax.device_get(
        train(split(MODEL), state, (split(grads, 1), split(batches, 2)))
    )
    return jax.tree.map(whole, params, specs), jax.tree.map(lambda x: whole(x, P()), decided)


@pytest.mark.parametrize("name", ["ftp in mars", "ftp in l2", "tpgm in mars", "tpgm in l2"])
def test_pmap_of_split_and_whole_arrays_equals_one_device(name: str) -> None:
    specs = SPECS["some"]  # each bias is in a group with a split kernel
    tx = OPTIMIZERS[name](layers=LAYERS["modules"], axis_name=specs)
    assert_same(in_pmap(tx, specs), on_one_device(name, "modules"))


@pytest.mark.parametrize("name", ["tpgm in mars", "tpgm in l2"])
def test_shard_map_over_the_validation_batch(name: str) -> None:
    tx = OPTIMIZERS[name](layers=STACKED)
    examples = normal(3, STEPS, INNER, 8)

    def mean_distance(params: Any, batch: Any, axis: str | None = None) -> jax.Array:
        each = jax.vmap(functools.partial(distance, WHOLE), (None, 0))(params, batch).mean()
        return each if axis is None else jax.lax.pmean(each, axis)

    train = functools.partial(run, tx)
    expected = jax.jit(functools.partial(train, mean_distance))
    sharded = jax.shard_map(
        functools.partial(train, functools.partial(mean_distance, axis="d")),
        mesh=jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,)),
        in_specs=(P(), P(), (P(), P(None, None, "d"))),
        out_specs=P(),
    )
    arguments = MODEL, tx.init(MODEL), (RECORDED[0], examples)
    assert_same(jax.jit(sharded)(*arguments), jax.device_get(expected(*arguments)))


# AdamP's test -------------------------------------------------------------------------------------


def without_radial(x: np.ndarray, w: np.ndarray, axis: int | None) -> np.ndarray:
    """The part of x that is orthogonal to w, along an axis or as a whole."""
    inner, square = (np.sum(a * w, axis=axis, keepdims=True) for a in (x, w))
    return x - inner / square * w


@functools.cache
def without_radial_parts() -> tuple[Any, Any]:
    """A gradient, and what becomes of the updates ``normal(4)`` on one device.

    The first block passes by rows, the second as a whole only, the third not at all.
    """
    w, u, grads = MODEL["blocks"]["kernel"], normal(4)["blocks"]["kernel"], normal(5)
    g = grads["blocks"]["kernel"]
    g[0], g[1], g[2] = without_radial(g[0], w[0], 0), without_radial(g[1], w[1], None), w[2]
    tx = optax_spd.remove_radial(0.2, layers=STACKED)
    found, _ = jax.jit(tx.update)(normal(4), tx.init(MODEL), MODEL, grad=grads)
    projected = [
        without_radial(u[0], w[0], 0) + 0.2 * 0.1 * w[0],
        without_radial(u[1], w[1], None) + 0.2 * 0.1 * w[1],
        u[2] + 0.2 * w[2],
    ]
    np.testing.assert_allclose(found["blocks"]["kernel"], projected, rtol=1e-4, atol=1e-5)
    return grads, found


@pytest.mark.parametrize("split", ["inputs", "outputs", "both", "one bias"])
def test_remove_radial_tests_and_projects_as_on_one_device(split: str) -> None:
    specs, (grads, expected) = SPECS[split], without_radial_parts()
    tx = optax_spd.remove_radial(0.2, layers=STACKED, axis_name=specs)
    state = tx.init(MODEL)
    mapped = jax.shard_map(
        lambda p, w, g: tx.update(p, state, w, grad=g)[0],
        mesh=MESH,
        in_specs=(specs, specs, specs),
        out_specs=specs,
    )
    found = jax.jit(mapped)(normal(4), MODEL, grads)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    jax.tree.map(close, found, expected)
