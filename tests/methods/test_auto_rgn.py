"""Auto-RGN: the original's multipliers; windows against NumPy in float64; layers without a norm."""

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

CASES = {case["name"]: case for case in golden.settings("rgn")}
# Auto-SNR is another criterion; of the others the multipliers are replayed, not the authors'
# training loop, which begins each epoch with a new Adam.
NOT_EXPRESSED = {"rgn_snr"}


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("name", sorted(CASES.keys() - NOT_EXPRESSED))
def test_replays_the_multipliers_of_the_original(name: str, dtype: Any, x64: None) -> None:
    """Each epoch's, from its first parameters and the gradients of its probe batches."""
    settings = CASES[name]
    batches, each = settings["probe_batches"], settings["steps_per_epoch"]
    tuned = [tensor["name"] for tensor in settings["tensors"] if tensor["tuned"]]
    fields = {n: x for n, x in replays.fields("rgn", settings).items() if n in tuned}
    read = lambda field: {n: x[field].astype(dtype) for n, x in fields.items()}
    at = lambda tree, *index: {n: x[index] for n, x in tree.items()}
    with np.load(golden.DATA / "rgn.npz") as arrays:
        ratios, multipliers = (arrays[f"{name}/{key}"] for key in ("metric", "multiplier"))
    tx, params, trained = optax_spd.auto_rgn(every=batches), read("theta0"), read("params")
    update, state = jax.jit(tx.update), tx.init(params)
    order = [optax_spd.layer_names(params).index(n) for n in settings["metric_order"]]
    close = functools.partial(
        np.testing.assert_allclose, rtol=0, atol=1e-9 if dtype == np.float64 else 1e-5
    )
    for epoch in range(settings["epochs"]):
        params = at(trained, epoch * each - 1) if epoch else params
        before = np.asarray(state.auto_rgn_scale)
        for batch in range(batches):
            np.testing.assert_array_equal(state.auto_rgn_scale, before)
            grads = at(read("probe_grads"), epoch, batch)
            _, state = update(grads, state, params, grad=grads)
        assert state.auto_rgn_scale.dtype == dtype
        close(np.asarray(state.auto_rgn_ratio)[order], ratios[epoch])
        close(np.asarray(state.auto_rgn_scale)[order], multipliers[epoch])


# Windows -----------------------------------------------------------------------------------------

SHAPES = {"a": (3, 2), "b": (4,), "c": (2, 2)}


def normal(seed: int, scale: float = 1.0) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(seed)
    return {key: scale * draw.normal(size=shape) for key, shape in SHAPES.items()}


norm = np.linalg.norm


@pytest.mark.parametrize(
    "every", [1, 3, lambda count: jnp.where(count < 4, 2, 3)], ids=["1", "3", "a schedule"]
)
def test_windows_are_those_of_numpy(every: Any, x64: None) -> None:
    """Behind SGD, with parameters that move; the update that closes a window is scaled by it."""
    groups = {"a": "ab", "b": "ab", "c": "c"}
    layers = lambda path, _: optax_spd.LayerSpec(group=groups[path])
    tx = optax_spd.chain(optax.sgd(0.1), optax_spd.auto_rgn(every=every, layers=layers))
    params: Any = normal(0)
    state, update = tx.init(params), jax.jit(tx.update)
    together = lambda tree: np.array(
        [np.hypot(*map(norm, (tree["a"], tree["b"]))), norm(tree["c"])]
    )
    ratios: list[np.ndarray] = []
    scale, closed = np.ones(2), 0
    for step in range(9):
        grads = normal(step + 1, 1 + step)
        ratios.append(together(grads) / together(params))
        length = int(every(step)) if callable(every) else every
        if len(ratios) >= length:
            scale = np.mean(ratios, axis=0) / np.mean(ratios, axis=0).max()
            ratios, closed = [], closed + 1
        updates, state = update(grads, state, params)
        for key, factor in zip("abc", scale[[0, 0, 1]], strict=True):
            np.testing.assert_allclose(updates[key], -0.1 * factor * grads[key], rtol=1e-12)
        params = optax.apply_updates(params, updates)
    assert closed >= 3
    np.testing.assert_allclose(optax.tree.get(state, "auto_rgn_scale"), scale, rtol=1e-12)


# Layers without a norm ---------------------------------------------------------------------------


def scales(steps: list[tuple[Any, Any]], every: int = 2) -> list[np.ndarray]:
    """The multipliers after each step, of (parameters, gradients)."""
    tx = optax_spd.auto_rgn(every=every)
    state, found, update = tx.init(steps[0][0]), [], jax.jit(tx.update)
    for params, grads in steps:
        _, state = update(params, state, params, grad=grads)
        assert np.isfinite(state.auto_rgn_scale).all()
        found.append(np.asarray(state.auto_rgn_scale))
    return found


def test_a_layer_at_zero_keeps_its_multiplier_and_does_not_decide() -> None:
    params = normal(0) | {"b": np.zeros(4)}
    *_, found = scales([(params, normal(1)), (params, normal(2))])
    without = {"a": params["a"], "c": params["c"]}
    grads = [{key: normal(i)[key] for key in without} for i in (1, 2)]
    *_, expected = scales([(without, grads[0]), (without, grads[1])])
    np.testing.assert_array_equal(found, [expected[0], 1, expected[1]])
    # What it was measured at before counts until it is measured again.
    moving = [(normal(0), normal(1)), (normal(0), normal(2))]
    _, first, _, second = scales([*moving, (params, normal(3)), (params, normal(4))])
    assert first[1] < 1
    assert second[1] == first[1]
    assert (second != first)[[0, 2]].any()


@pytest.mark.parametrize("sick", [np.nan, np.inf])
@pytest.mark.parametrize("tree", ["params", "grad"])
def test_a_step_that_is_not_finite_is_left_out_of_its_layer_s_mean(tree: str, sick: float) -> None:
    healthy = [(normal(0), normal(i)) for i in (1, 2)]
    params, grads = normal(0), normal(3)
    {"params": params, "grad": grads}[tree]["a"][0, 0] = sick
    *_, found = scales([healthy[0], (params, grads), healthy[1]], every=3)
    steps = {"a": healthy, "b": [*healthy, (params, grads)], "c": [*healthy, (params, grads)]}
    mean = lambda key: np.mean([norm(g[key]) / norm(p[key]) for p, g in steps[key]])
    means = np.array([mean(key) for key in steps])
    np.testing.assert_allclose(found, means / means.max(), rtol=1e-5)


def test_gradients_of_zero_keep_all_multipliers() -> None:
    zeros = jax.tree.map(np.zeros_like, normal(0))
    *_, first = scales([(normal(0), zeros)], every=1)
    np.testing.assert_array_equal(first, 1)
    before, after = scales([(normal(0), normal(1)), (normal(0), zeros)], every=1)
    np.testing.assert_array_equal(before, after)
    # A single layer without a gradient does not move.
    *_, one = scales([(normal(0), normal(1) | {"a": zeros["a"]})], every=1)
    assert one[0] == 0 < one[1]


def test_a_window_has_one_update_or_more() -> None:
    with pytest.raises(ValueError, match="every must be at least 1, got 0"):
        optax_spd.auto_rgn(every=0)


def test_a_state_of_other_layers_is_found() -> None:
    params = normal(0)
    state = optax_spd.auto_rgn().init(params)
    optax_spd.check_state(state, params)
    with pytest.raises(ValueError, match="made for other layers"):
        optax_spd.check_state(state, {"a": params["a"], "b": params["b"], "d": params["c"]})


@pytest.mark.parametrize("size", [1e-15, 1.0, 1e22])
def test_norms_of_any_size_are_compared(size: float) -> None:
    params = {"a": jnp.ones(4), "b": jnp.ones(4)}
    grads = {"a": jnp.full(4, 2 * size), "b": jnp.full(4, size)}
    tx = optax_spd.auto_rgn(every=1)
    _, state = tx.update(grads, tx.init(params), params, grad=grads)
    np.testing.assert_allclose(state.auto_rgn_scale, [1, 0.5], rtol=1e-6)
