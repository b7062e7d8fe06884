"""SPD against the original implementation and against float64 NumPy; precision; the jaxpr."""

import functools
from typing import Any, NamedTuple

import golden
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest
import torch_like

import optax_spd
from optax_spd.methods.spd import decay_ratio

CASES = golden.settings("spd")


class Numbers(NamedTuple):
    """A case's hyperparameters."""

    b1: float
    b2: float
    eps: float
    weight_decay: float


def numbers_of(settings: dict[str, Any]) -> Numbers:
    return Numbers(*settings["betas"], settings["eps"], settings["weight_decay"])


def optimizer_of(task: golden.Task, numbers: Numbers, amsgrad: bool, form: str) -> tuple[Any, bool]:
    """The case's optimizer in one of its forms, and whether the caller passes ``grad=``."""
    anchor = "zero" if task.anchor is None else task.anchor
    rate = lambda count: task.lr[count]
    b1, b2, eps, decay = numbers
    if amsgrad:
        inner = optax.chain(
            torch_like.scale_by_amsgrad(b1, b2, eps), optax.scale_by_learning_rate(rate)
        )
    else:
        inner = optax.adam(rate, b1, b2, eps)
    stage = optax_spd.spd(decay, anchor=anchor)
    if form == "optax.chain":
        return optax.chain(inner, stage), True
    if form == "optax_spd.chain":
        return optax_spd.chain(inner, stage), False
    return optax_spd.adam_spd(rate, b1, b2, eps, weight_decay=decay, anchor=anchor), False


def run(task: golden.Task, numbers: Numbers, amsgrad: bool, form: str) -> tuple[Any, jax.Array]:
    """Parameters and ratios after every step."""
    read = lambda state: optax.tree.get(state, "spd_ratio")
    tx, pass_grad = optimizer_of(task, numbers, amsgrad, form)
    return golden.replayed(tx, task, pass_grad, read)


@functools.cache
def program(form: str, amsgrad: Numbers | None = None) -> Any:
    """``run`` compiled, for all cases whose arrays have the same shapes.

    The hyperparameters are arguments, except where amsgrad needs them in NumPy. With x64 they
    are float64 as Python's are, and weakly typed, too: float32 arrays stay float32.
    """
    if amsgrad:
        return jax.jit(lambda task, _: run(task, amsgrad, True, form))
    return jax.jit(lambda task, numbers: run(task, numbers, False, form))


# The recipe's Adam cannot be exchanged for the original's amsgrad. A few cases are enough of a
# chain that gets ``grad=`` from outside.
REPLAYS = [(c, "optax_spd.chain" if c["amsgrad"] else "adam_spd") for c in CASES]
REPLAYS += [(c, "optax.chain") for c in CASES[::6]]


@pytest.mark.parametrize(
    ("settings", "form"), REPLAYS, ids=[f"{c['name']}-{form}" for c, form in REPLAYS]
)
def test_replays_the_original(settings: dict[str, Any], form: str, x64: None) -> None:
    # With x64 for float32 cases too: Optax's bias corrections need it. All arrays stay float32.
    case, numbers = golden.load("spd", settings), numbers_of(settings)
    params, ratios = program(form, numbers if settings["amsgrad"] else None)(case.task(), numbers)
    assert_replayed(case, params, ratios, 1e-9 if settings["dtype"] == "float64" else 1e-5)


@pytest.mark.parametrize(
    "settings", [c for c in CASES if c["dtype"] == "float32"], ids=lambda c: c["name"]
)
def test_replays_float32_without_x64(settings: dict[str, Any]) -> None:
    case, numbers = golden.load("spd", settings), numbers_of(settings)
    # As arguments the hyperparameters would be float32: 1 - 0.999 would lose its digits.
    replay = jax.jit(lambda task: run(task, numbers, settings["amsgrad"], "optax_spd.chain"))
    params, ratios = replay(case.task())
    assert_replayed(case, params, ratios, 1e-5)


def assert_replayed(case: golden.Case, params: Any, ratios: jax.Array, tolerance: float) -> None:
    names = optax_spd.layer_names(case.theta0)
    steps = case.settings["steps"]
    assert ratios.dtype == case.settings["dtype"]
    fired = 0
    for name in case.theta0:
        assert params[name].dtype == case.settings["dtype"]
        np.testing.assert_allclose(params[name][:steps], case.params[name], rtol=0, atol=tolerance)
        expected = case.fields[name]["ratio"]
        np.testing.assert_allclose(
            ratios[:steps, names.index(name)], expected, rtol=0, atol=tolerance, err_msg=name
        )
        fired += int((expected > 0).sum())
    assert fired == case.settings["stats"]["ratio_pos"] > 0


# Behind any optimizer --------------------------------------------------------------------------


RATE = optax.warmup_cosine_decay_schedule(0.0, 0.05, 5, 60)
INNER: dict[str, optax.GradientTransformation] = {
    "sgd with momentum": optax.sgd(0.1, momentum=0.9),
    "adamw": optax.adamw(0.03, weight_decay=0.01),
    "lion": optax.lion(0.02),
    "adafactor": optax.adafactor(0.2, min_dim_size_to_factor=2, momentum=0.9),
    "muon": optax.contrib.muon(0.05),
    "adam on a schedule": optax.adam(RATE),
}
SCHEDULE = optax.piecewise_constant_schedule(2.0, {15: 0.25, 30: 2.0})  # exact in float32


@pytest.mark.parametrize(
    ("inner", "decay"),
    [*((inner, 1.0) for inner in INNER.values()), (INNER["sgd with momentum"], SCHEDULE)],
    ids=[*INNER, "scheduled"],
)
def test_agrees_with_numpy_behind_any_optimizer(inner: Any, decay: Any, x64: None) -> None:
    tx = optax_spd.chain(inner, optax_spd.spd(decay))
    rng = np.random.default_rng(0)
    params = theta_0 = {"bias": rng.normal(size=5), "kernel": rng.normal(size=(4, 5))}

    @jax.jit
    def train(grads: Any, state: Any, inner_state: Any, params: Any) -> Any:
        inner_updates, inner_state = inner.update(grads, inner_state, params)
        updates, state = tx.update(grads, state, params)
        return inner_updates, inner_state, state, optax.apply_updates(params, updates)

    state, inner_state = tx.init(params), inner.init(params)
    fired, steps = 0, 40
    for step in range(steps):
        # Away from θ₀ and back again, so that momentum and gradient often disagree.
        swing = lambda x, t=step: 0.3 * np.sin(t / 3) * np.cos(np.arange(x.size)).reshape(x.shape)
        grads = {
            name: x - theta_0[name] - swing(x) + 0.02 * rng.normal(size=x.shape)
            for name, x in params.items()
        }
        inner_updates, inner_state, state, new_params = train(grads, state, inner_state, params)
        ratios = dict(zip(optax_spd.layer_names(params), state[1].spd_ratio, strict=True))
        lam = float(decay(jnp.int32(step))) if callable(decay) else decay
        for name in params:
            step_taken, ratio = oracles.spd_step(
                inner_updates[name], params[name], theta_0[name], grads[name], lam
            )
            expected = np.asarray(params[name]) + step_taken
            np.testing.assert_allclose(new_params[name], expected, rtol=0, atol=1e-12)
            np.testing.assert_allclose(ratios[name], ratio, rtol=0, atol=1e-12)
            fired += ratio > 0
        params = new_params
    assert fired >= 0.15 * steps * len(params), f"SPD fired only {fired} times"
    assert sum(state[1].spd_fired) == fired


# Precision -------------------------------------------------------------------------------------


def random_layers(
    relative_step: float, size: int, seed: int, count: int = 128
) -> dict[str, np.ndarray]:
    """float32 layers (rows) with ‖u‖ = relative_step ‖Δ‖, where SPD fires."""
    rng = np.random.default_rng(seed)
    anchor = rng.normal(size=(count, size))
    delta = 0.1 * rng.normal(size=(count, size))
    step = delta * rng.uniform(0.1, 1, (count, 1)) + 0.1 * rng.normal(size=(count, size))
    step *= (
        relative_step
        * np.linalg.norm(delta, axis=1, keepdims=True)
        / np.linalg.norm(step, axis=1, keepdims=True)
    )
    arrays = {"params": anchor + delta, "anchor": anchor, "updates": step, "grad": delta}
    return {name: array.astype(np.float32) for name, array in arrays.items()}


def ratios_of(layers: dict[str, np.ndarray]) -> np.ndarray:
    """r of each row, from the stage itself."""
    tx = optax_spd.spd(anchor="argument", layers=optax_spd.stacked("", 0))
    params, updates = jnp.asarray(layers["params"]), jnp.asarray(layers["updates"])
    _, state = jax.jit(tx.update)(
        updates, tx.init(params), params, grad=layers["grad"], anchor=layers["anchor"]
    )
    return np.asarray(state.spd_ratio)


def textbook_ratio(layers: dict[str, np.ndarray], dtype: Any) -> np.ndarray:
    """(‖Δ̃‖ - ‖Δ‖) / ‖Δ̃‖ as written in the paper, in a given dtype."""
    theta, theta_0, u = (layers[k].astype(dtype) for k in ("params", "anchor", "updates"))
    delta = theta - theta_0
    new_norm, old_norm = (np.linalg.norm(d, axis=1) for d in (delta + u, delta))
    return np.clip((new_norm - old_norm) / new_norm, 0, 1).astype(np.float64)


@pytest.mark.parametrize("size", [7, 1000, 50_000])
@pytest.mark.parametrize("relative_step", [1e-5, 1e-3, 1e-2, 0.3, 5.0, 1e3])
def test_no_step_loses_digits(relative_step: float, size: int) -> None:
    """Small steps lose a hundred times less than the paper's formula, others less than 1e-6."""
    layers = random_layers(relative_step, size, seed=1, count=128 if size < 10_000 else 24)
    ours = ratios_of(layers)
    textbook, exact = (textbook_ratio(layers, dtype) for dtype in (np.float32, np.float64))
    fires = exact > 0
    assert fires.mean() > 0.5
    np.testing.assert_allclose(ours, exact, rtol=0, atol=1e-6)
    our_error, textbook_error = (np.median(np.abs(r - exact)[fires]) for r in (ours, textbook))
    if relative_step <= 1e-2:
        assert textbook_error > 0
        assert our_error <= textbook_error / 100


# One layer's decision --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("alignment", "growth", "old_square", "expected"),
    [
        (1.0, 5.0, 4.0, 1 / 3),  # (3 - 2) / 3
        (0.0, 5.0, 4.0, 0.0),  # c = 0 does not fire: the inequality is strict
        (-1.0, 5.0, 4.0, 0.0),
        (1.0, -5.0, 9.0, 0.0),  # moving toward the anchor anyway
        (1.0, 9.0, 0.0, 1.0),
        (1.0, -4.0, 4.0, 0.0),  # lands on the anchor
        (1.0, -4.0000005, 4.0, 0.0),  # the same, rounded to the other side
        (1.0, 0.0, 0.0, 0.0),  # 0/0
        (np.nan, 5.0, 4.0, 0.0),
        (1.0, np.nan, 4.0, 0.0),
        (1.0, 3e38, 3e38, 0.0),  # the sum overflows
    ],
)
def test_decay_ratio(alignment: float, growth: float, old_square: float, expected: float) -> None:
    ratio = decay_ratio(*map(jnp.asarray, (alignment, growth, old_square)))
    np.testing.assert_allclose(ratio, expected, rtol=1e-6)


def test_large_decay_passes_through_the_anchor() -> None:
    tx = optax_spd.spd(3.0, anchor="zero")
    params, updates = jnp.array([1.0]), jnp.array([1.0])
    updates, _ = tx.update(updates, tx.init(params), params, grad=jnp.array([1.0]))
    # r = 1/2, so λ r = 1.5 and θ' = 2 - 1.5 * 2
    np.testing.assert_allclose(optax.apply_updates(params, updates), [-1.0], rtol=1e-6)


def test_decay_is_not_multiplied_by_the_learning_rate() -> None:
    def distance(rate: float) -> float:
        tx = optax_spd.chain(optax.sign_sgd(rate), optax_spd.spd(1.0, anchor="zero"))
        params = jnp.array([3.0, 4.0])
        updates, state = tx.update(jnp.array([2.0, -1.0]), tx.init(params), params)
        assert state[1].spd_ratio[0] > 0
        return float(jnp.linalg.norm(optax.apply_updates(params, updates)))

    np.testing.assert_allclose([distance(0.1), distance(0.01)], 5.0, rtol=1e-6)


def test_gradients_through_a_step_are_finite() -> None:
    def trained(params: jax.Array, rate: jax.Array, decay: jax.Array) -> jax.Array:
        tx = optax_spd.chain(optax.sgd(rate), optax_spd.spd(decay))
        state, start = tx.init(params), params
        for grad in (2 * start, -3 * start):  # the first step starts at Δ = 0
            updates, state = tx.update(grad, state, params)
            params = optax.apply_updates(params, updates)
        return jnp.sum(params)

    arguments = (jnp.array([1.0, 2.0]), jnp.asarray(0.1), jnp.asarray(1.0))
    gradients = jax.grad(trained, argnums=(0, 1, 2))(*arguments)
    assert all(bool(jnp.isfinite(g).all()) for g in gradients)


@pytest.mark.parametrize("exponent", range(-30, 31, 3))
def test_the_ratio_does_not_depend_on_the_scale_or_is_zero(exponent: int) -> None:
    """In float32 the squares of norms below 1e-19 vanish, and those above 1e19 overflow."""
    scale = np.float32(10.0**exponent)
    params, step = {"w": scale * jnp.array([3.0, 4.0])}, {"w": scale * jnp.array([0.3, 0.4])}
    tx = optax_spd.spd(anchor="zero")
    updates, state = tx.update(step, tx.init(params), params, grad={"w": jnp.ones(2)})
    if -18 <= exponent <= 18:
        np.testing.assert_allclose(state.spd_ratio, [0.5 / 5.5], rtol=1e-5)
    else:
        np.testing.assert_array_equal(state.spd_ratio, [0.0])
        np.testing.assert_array_equal(updates["w"], step["w"])
