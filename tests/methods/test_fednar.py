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

import optax_spd
from optax_spd.methods.fednar import clip_by_whole_norm

CASES = golden.settings("fednar")
by_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])


def optimizer_of(kind: str, rate: Any, numbers: dict[str, Any]) -> Any:
    """A case's local step; the baseline clips before it adds the decay.

    Around the round's parameters the proximal term alone is the decay.
    """
    decay, max_norm, mu = numbers["weight_decay"], numbers["max_norm"], numbers["mu"]
    if kind == "around":
        return optax_spd.sgd_fednar(rate, weight_decay=mu, max_norm=max_norm, anchor="initial")
    if kind == "nar":
        step = optax_spd.sgd_fednar(rate, weight_decay=decay, max_norm=max_norm)
        return optax_spd.chain(optax_spd.l2_sp(mu), step)
    decayed = optax.chain(optax.add_decayed_weights(decay), optax.sgd(rate))
    return optax.chain(optax_spd.l2_sp(mu), clip_by_whole_norm(max_norm), decayed)


@functools.cache
def step_of(kind: str) -> Any:
    @jax.jit
    def step(params: Any, state: Any, grads: Any, rate: Any, numbers: dict[str, Any]) -> Any:
        updates, state = optimizer_of(kind, rate, numbers).update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


def replayed(case: dict[str, Any], layout: str, dtype: Any, kind: str = "") -> float:
    recorded = replays.recording("fednar", case, layout, dtype)
    numbers = {name: case[name] for name in ("mu", "max_norm", "weight_decay")}
    kind = kind or ("nar" if case["use_nar"] else "base")
    params = jax.tree.map(jnp.asarray, recorded.theta0)
    state, seen = optimizer_of(kind, 0.1, numbers).init(params), []
    for index in range(case["steps"]):
        if index % case["local_steps"] == 0:
            state = optax_spd.set_anchor(state, params)
        grads = jax.tree.map(lambda x, i=index: x[i], recorded.grads)
        params, state = step_of(kind)(params, state, grads, recorded.rates[index], numbers)
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


def test_around_the_round_s_parameters_it_is_fedprox_s_local_step(x64: None) -> None:
    (case,) = (c for c in CASES if c["name"] == "fednar_prox_nowd")
    assert replayed(case, "PyTorch", np.float64, "around") <= 1e-6


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
    state, update, fired = tx.init(params), jax.jit(tx.update), 0
    theta = [np.float64(x) for x in jax.tree.leaves(start)]
    origin = [0 * x if anchor == "zero" else x for x in theta]
    decayed = [1, 1, int(mask is None)]  # bias and kernel of the body, and the head
    velocity = [0 * x for x in theta]
    for step in range(5):
        grads = jax.tree.map(lambda x, s=step: (1 + s) * x, normal(step + 1))
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
        rate = decay = float(FALLING(step))
        pulls = [decay * on * (x - a) for x, a, on in zip(theta, origin, decayed, strict=True)]
        h = [g + pull for g, pull in zip(jax.tree.leaves(grads), pulls, strict=True)]
        bound, norm = float(max_norm(step)), whole_norm(h)
        fired += norm > bound
        c = [min(1, bound / norm) * x for x in h]
        velocity = [0.9 * v + x for v, x in zip(velocity, c, strict=True)]
        moves = [x + 0.9 * v if nesterov else v for v, x in zip(velocity, c, strict=True)]
        theta = [x - rate * move for x, move in zip(theta, moves, strict=True)]
        for found, wanted in zip(jax.tree.leaves(params), theta, strict=True):
            np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
    assert 0 < fired < 5


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


def test_a_wrong_axis_name_is_refused() -> None:
    with pytest.raises(ValueError, match="axis_name must be a mesh axis name"):
        optax_spd.sgd_fednar(0.1, weight_decay=0.1, max_norm=1.0, axis_name=3)
