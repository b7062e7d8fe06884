"""Auto-RGN: the original's multipliers; windows against NumPy in float64; layers without a norm."""

from typing import Any

import golden
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_spd

CASES = {case["name"]: case for case in golden.settings("rgn")}
# Auto-SNR is another criterion; of the others the multipliers are replayed, not the authors'
# training loop, which begins each epoch with a new Adam.
NOT_EXPRESSED = {"rgn_snr"}
FIELDS = ("theta0", "params", "probe_grads")


def fields_of(settings: dict[str, Any], dtype: Any) -> dict[str, dict[str, np.ndarray]]:
    """By field the tensors that the original tunes."""
    tuned = [tensor["name"] for tensor in settings["tensors"] if tensor["tuned"]]
    with np.load(golden.DATA / "rgn.npz") as arrays:
        read = lambda key: {n: arrays[f"{settings['name']}/{n}/{key}"].astype(dtype) for n in tuned}
        return {key: read(key) for key in FIELDS}


def epochs(settings: dict[str, Any], dtype: Any) -> list[tuple[Any, Any]]:
    """For each epoch the parameters at its start, and the gradients of its probe batches."""
    fields, each = fields_of(settings, dtype), settings["steps_per_epoch"]
    found = []
    for epoch in range(settings["epochs"]):
        if epoch == 0:
            start = fields["theta0"]
        else:
            start = {name: x[epoch * each - 1] for name, x in fields["params"].items()}
        found.append((start, {name: x[epoch] for name, x in fields["probe_grads"].items()}))
    return found


def transposed(tree: dict[str, Any], leading: int) -> dict[str, Any]:
    return {name: np.moveaxis(x, leading, -1) for name, x in tree.items()}


def biases_stacked(tree: dict[str, Any], leading: int) -> dict[str, Any]:
    """The two biases of one shape in one array, along its last axis."""
    others = {name: x for name, x in tree.items() if name not in STACK}
    return others | {"stack": np.stack([tree[name] for name in STACK], axis=leading + 1)}


STACK = ("conv1.bias", "fc.bias")
LAYOUTS = {
    "PyTorch's": (lambda tree, leading: tree, optax_spd.outputs("", 0)),
    "Flax's": (transposed, None),
    "stacked": (biases_stacked, optax_spd.stacked("stack", 1)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("name", sorted(CASES.keys() - NOT_EXPRESSED))
def test_replays_the_multipliers_of_the_original(
    name: str, dtype: Any, layout: str, x64: None
) -> None:
    settings, (arrange, layers) = CASES[name], LAYOUTS[layout]
    batches, atol = settings["probe_batches"], 1e-9 if dtype == np.float64 else 1e-5
    tx = optax_spd.auto_rgn(every=batches, layers=layers)
    update, state = jax.jit(tx.update), None
    with np.load(golden.DATA / "rgn.npz") as arrays:
        fields = {key: arrays[f"{name}/{key}"] for key in ("metric", "multiplier")}
    for epoch, (start, probes) in enumerate(epochs(settings, dtype)):
        params, grads = arrange(start, 0), arrange(probes, 1)
        state = tx.init(params) if state is None else state
        before = np.asarray(state.auto_rgn_scale)
        for batch in range(batches):
            np.testing.assert_array_equal(state.auto_rgn_scale, before)
            given = {key: x[batch] for key, x in grads.items()}
            _, state = update(given, state, params, grad=given)
        names = [
            f"stack[{STACK.index(n)}]" if layout == "stacked" and n in STACK else n
            for n in settings["metric_order"]
        ]
        order = [optax_spd.layer_names(params, layers).index(n) for n in names]
        assert state.auto_rgn_scale.dtype == dtype
        vectors = {"metric": state.auto_rgn_ratio, "multiplier": state.auto_rgn_scale}
        for field, vector in vectors.items():
            expected = fields[field][epoch]
            np.testing.assert_allclose(np.asarray(vector)[order], expected, rtol=0, atol=atol)


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
