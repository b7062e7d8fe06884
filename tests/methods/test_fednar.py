"""FedNAR's local step against the original implementation, and its clip."""

import functools
from typing import Any

import golden
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import replays
from jax.sharding import AxisType, PartitionSpec as P

import optax_spd
from optax_spd.methods.fednar import clip_by_whole_norm

CASES = golden.settings("fednar")
by_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])


def optimizer_of(use_nar: bool, rate: Any, numbers: dict[str, Any]) -> Any:
    """The local step of a case, whose baseline clips before it adds the decay."""
    proximal, max_norm = optax_spd.l2_sp(numbers["mu"]), numbers["max_norm"]
    decay = numbers["weight_decay"]
    if use_nar:
        step = optax_spd.sgd_fednar(rate, weight_decay=decay, max_norm=max_norm)
        return optax_spd.chain(proximal, step)
    decayed = optax.chain(optax.add_decayed_weights(decay), optax.sgd(rate))
    return optax.chain(proximal, clip_by_whole_norm(max_norm), decayed)


@functools.cache
def step_of(use_nar: bool) -> Any:
    @jax.jit
    def step(params: Any, state: Any, grads: Any, rate: Any, numbers: dict[str, Any]) -> Any:
        updates, state = optimizer_of(use_nar, rate, numbers).update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


def replayed(case: dict[str, Any], layout: str, dtype: Any) -> float:
    recorded = replays.recording("fednar", case, layout, dtype)
    numbers = {name: case[name] for name in ("mu", "max_norm", "weight_decay")}
    params = jax.tree.map(jnp.asarray, recorded.theta0)
    state, seen = optimizer_of(case["use_nar"], 0.1, numbers).init(params), []
    for index in range(case["steps"]):
        if index % case["local_steps"] == 0:
            state = optax_spd.set_anchor(state, params)
        grads = jax.tree.map(lambda x, i=index: x[i], recorded.grads)
        step = step_of(case["use_nar"])
        params, state = step(params, state, grads, recorded.rates[index], numbers)
        seen.append(params)
    assert {x.dtype for x in params.values()} == {np.dtype(dtype)}
    stacked = jax.tree.map(lambda *steps: np.stack(steps), *seen)
    return replays.largest_error("fednar", case, layout, stacked)


@pytest.mark.parametrize("layout", ["PyTorch", "Flax", "stacked with zeros"])
@by_case
def test_replays_the_original(case: dict[str, Any], layout: str, x64: None) -> None:
    """PyTorch's clip adds 1e-6 to the norm."""
    assert replayed(case, layout, np.float64) <= 1e-6


@by_case
def test_replays_the_original_in_float32(case: dict[str, Any]) -> None:
    assert replayed(case, "PyTorch", np.float32) <= 1e-5


# Against NumPy -----------------------------------------------------------------------------------


def normal(seed: int) -> dict[str, Any]:
    draw = np.random.default_rng(seed)
    make = lambda *shape: draw.normal(size=shape).astype(np.float32)
    return {"body": {"bias": make(8), "kernel": make(8, 8)}, "head": make(8, 4)}


def whole_norm(tree: Any) -> float:
    return float(
        np.sqrt(sum(np.sum(np.asarray(x, np.float64) ** 2) for x in jax.tree.leaves(tree)))
    )


MASK = {"body": True, "head": False}
FALLING = optax.linear_schedule(0.5, 0.1, 4)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("mask", [None, MASK], ids=["all", "masked"])
@pytest.mark.parametrize("anchor", ["zero", "initial"])
def test_agrees_with_numpy(anchor: str, mask: Any, nesterov: bool) -> None:
    """With momentum of clipped gradients, schedules, and all arrays in the norm under a mask."""
    max_norm = optax.linear_schedule(20.0, 5.0, 4)
    tx = optax_spd.sgd_fednar(
        FALLING, 0.9, nesterov, weight_decay=FALLING, max_norm=max_norm, anchor=anchor, mask=mask
    )
    params = start = normal(0)
    theta, state, update = params, tx.init(params), jax.jit(tx.update)
    origin = jax.tree.map(np.zeros_like, start) if anchor == "zero" else start
    velocity = jax.tree.map(np.zeros_like, start)
    decayed = {"body": {"bias": 1, "kernel": 1}, "head": int(mask is None)}
    fired = 0
    for step in range(5):
        grads = jax.tree.map(lambda x, s=step: (1 + s) * x, normal(step + 1))
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
        rate = decay = float(FALLING(step))
        h = jax.tree.map(
            lambda g, x, a, on, k=decay: g + k * on * (x - a), grads, theta, origin, decayed
        )
        bound, norm = float(max_norm(step)), whole_norm(h)
        fired += norm > bound
        factor = min(1, bound / norm)
        clipped = jax.tree.map(lambda x, f=factor: f * x, h)
        velocity = jax.tree.map(lambda v, c: 0.9 * v + c, velocity, clipped)
        move = jax.tree.map(lambda v, c: c + 0.9 * v if nesterov else v, velocity, clipped)
        theta = jax.tree.map(lambda x, m, r=rate: x - r * m, theta, move)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), params, theta
        )
    assert 0 < fired < 5


def test_around_the_round_s_parameters_it_is_fedprox_s_local_step(x64: None) -> None:
    """With the proximal term as the decay: a recorded baseline that has no other."""
    (case,) = (c for c in CASES if c["name"] == "fednar_prox_nowd")
    recorded = replays.recording("fednar", case, "PyTorch", np.float64)
    params = recorded.theta0
    tx = optax_spd.sgd_fednar(
        lambda count: jnp.asarray(recorded.rates)[count],
        weight_decay=case["mu"],
        max_norm=case["max_norm"],
        anchor="initial",
    )
    state, seen = tx.init(params), []
    for index in range(case["steps"]):
        if index % case["local_steps"] == 0:
            state = optax_spd.set_anchor(state, params)
        grads = jax.tree.map(lambda x, i=index: x[i], recorded.grads)
        updates, state = jax.jit(tx.update)(grads, state, params)
        params = optax.apply_updates(params, updates)
        seen.append(params)
    stacked = jax.tree.map(lambda *steps: np.stack(steps), *seen)
    assert replays.largest_error("fednar", case, "PyTorch", stacked) <= 1e-6


# The clip ----------------------------------------------------------------------------------------


def clipped(updates: Any, max_norm: Any) -> Any:
    tx = clip_by_whole_norm(max_norm)
    return tx.update(updates, tx.init(updates))[0]


@pytest.mark.parametrize("sick", [np.nan, np.inf])
def test_an_array_that_is_not_finite_spoils_no_other(sick: float) -> None:
    tree = {"sick": np.array([sick, 1.0], np.float32), "well": np.array([3.0, 4.0], np.float32)}
    found = clipped(tree, 1.0)
    np.testing.assert_allclose(found["well"], [0.6, 0.8], rtol=1e-6)
    np.testing.assert_array_equal(np.isfinite(found["sick"]), [False, True])


@pytest.mark.parametrize("scale", [1e-30, 1e-10, 1.0, 1e25, 1e36])
def test_a_norm_is_right_whatever_its_size(scale: float) -> None:
    """A square may overflow or vanish."""
    tree = {name: np.array([3.0, 4.0], np.float32) * np.float32(scale) for name in "abc"}
    found = clipped(tree, 1.0)
    length = 5 * scale * np.sqrt(3)
    expected = np.array([3.0, 4.0]) * scale * min(1, 1 / length)
    np.testing.assert_allclose(found["a"], expected, rtol=1e-5)


def test_a_zero_gradient_and_a_zero_bound() -> None:
    zeros = {"w": np.zeros(2, np.float32)}
    np.testing.assert_array_equal(clipped(zeros, 0.0)["w"], zeros["w"])
    np.testing.assert_array_equal(clipped({"w": np.ones(2, np.float32)}, 0.0)["w"], zeros["w"])


def test_every_kind_of_leaf_has_its_part_in_the_norm() -> None:
    tree = {
        "complex": np.array([3.0 + 4.0j], np.complex64),
        "half": jnp.full(4, 6.0, jnp.bfloat16),
        "none": None,
        "masked": optax.MaskedNode(),
        "count": np.arange(3),
        "empty": np.zeros((0, 2), np.float32),
    }
    found = clipped(tree, 6.5)  # half of ‖h‖ = 13
    np.testing.assert_allclose(found["complex"], [1.5 + 2.0j])
    np.testing.assert_array_equal(np.asarray(found["half"], np.float32), np.full(4, 3.0))
    assert found["half"].dtype == jnp.bfloat16
    assert all(found[name] is tree[name] for name in ("none", "masked", "count", "empty"))


SPECS: dict[str, Any] = {
    "names": ({"body": {"bias": P("x"), "kernel": P(None, "x")}, "head": P("x")}, "x"),
    "specs": ({"body": {"bias": P(), "kernel": P("x", "y")}, "head": P("y")}, None),
}


@pytest.mark.parametrize(("specs", "axis_name"), SPECS.values(), ids=SPECS)
def test_shard_map_counts_what_is_replicated_once(specs: Any, axis_name: Any) -> None:
    grads, params = normal(0), normal(1)
    make = lambda axis_name: optax_spd.sgd_fednar(
        0.1, weight_decay=0.5, max_norm=3.0, mask=MASK, axis_name=axis_name
    )
    tx, by_hand = make(None), make(axis_name or specs)
    state = tx.init(params)
    expected, _ = tx.update(grads, state, params)
    np.testing.assert_allclose(whole_norm(expected), 0.1 * 3.0, rtol=1e-6)
    mapped = jax.shard_map(
        lambda g, p: by_hand.update(g, state, p)[0],
        mesh=jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2),
        in_specs=(specs, specs),
        out_specs=specs,
    )
    found = jax.jit(mapped)(grads, params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), found, expected)


def test_wrong_arguments_are_refused() -> None:
    make = lambda **numbers: optax_spd.sgd_fednar(0.1, **{"weight_decay": 0.1, **numbers})
    with pytest.raises(ValueError, match="max_norm must be finite and at least 0, got -1"):
        make(max_norm=-1.0)
    with pytest.raises(ValueError, match="weight_decay must be finite and at least 0, got -2"):
        make(max_norm=1.0, weight_decay=-2.0)
    with pytest.raises(ValueError, match="axis_name must be a mesh axis name"):
        make(max_norm=1.0, axis_name=3)
    with pytest.raises(TypeError, match="max_norm"):
        make()
