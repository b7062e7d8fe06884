"""L2-SP: the gradient of its penalty, AdamW around another point than zero."""

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

STEPS = 10


def trees_of() -> tuple[Any, Any, Any]:
    """Parameters, pretrained parameters, and what the loss pulls toward."""
    draw = np.random.default_rng(0)
    normal = lambda *shape: draw.normal(size=shape).astype(np.float32)
    make = lambda: {"dense": {"bias": normal(3), "kernel": normal(2, 3)}, "head": normal(4)}
    return make(), make(), make()


def data_loss(params: Any, target: Any) -> jax.Array:
    errors = jax.tree.map(lambda p, t: jnp.sum((p - t) ** 4), params, target)
    return 0.1 * jax.tree.reduce(jnp.add, errors)


def penalty(params: Any, anchor: Any, decay: Any) -> jax.Array:
    squares = jax.tree.map(lambda p, a: jnp.sum((p - a) ** 2), params, anchor)
    return decay / 2 * jax.tree.reduce(jnp.add, squares)


def train(tx: optax.GradientTransformation, params: Any, gradient: Any) -> Any:
    """``gradient`` is a function of the parameters and the step."""

    @jax.jit
    def run(params: Any) -> Any:
        def step(carry: Any, count: jax.Array) -> Any:
            params, state = carry
            updates, state = tx.update(gradient(params, count), state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, tx.init(params)), jnp.arange(STEPS))[0][0]

    return jax.device_get(run(params))


def assert_close(a: Any, b: Any, atol: float = 1e-6) -> None:
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=atol), a, b)


def differ(a: Any, b: Any) -> bool:
    return all(
        np.abs(x - y).max() > 1e-3
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


INNER = {
    "sgd": functools.partial(optax.sgd, 0.1, momentum=0.9),
    "adam": functools.partial(optax.adam, 0.1),
}
DECAYS = {"constant": 0.3, "schedule": optax.linear_schedule(0.5, 0.0, STEPS)}


@pytest.mark.parametrize("decay", DECAYS.values(), ids=DECAYS)
@pytest.mark.parametrize("inner", INNER.values(), ids=INNER)
def test_first_in_the_chain_it_is_the_gradient_of_the_penalty(inner: Any, decay: Any) -> None:
    params, anchor, target = trees_of()
    value = decay if callable(decay) else lambda count: decay

    def whole(params: Any, count: jax.Array) -> Any:
        return jax.grad(lambda p: data_loss(p, target) + penalty(p, anchor, value(count)))(params)

    plain = lambda params, count: jax.grad(data_loss)(params, target)
    expected = train(inner(), params, whole)
    ours = train(optax.chain(optax_spd.l2_sp(decay, anchor=anchor), inner()), params, plain)
    assert_close(ours, expected, atol=2e-5)
    assert differ(ours, train(inner(), params, plain))


def everything_but_bias(params: Any) -> Any:
    return {"dense": {"bias": False, "kernel": True}, "head": True}


@pytest.mark.parametrize("mask", [None, everything_but_bias], ids=["all", "masked"])
@pytest.mark.parametrize(
    "rate", [0.1, optax.cosine_decay_schedule(0.1, STEPS)], ids=["rate", "schedule"]
)
def test_around_zero_it_is_adamw(mask: Any, rate: Any) -> None:
    params, _, target = trees_of()
    plain = lambda params, count: jax.grad(data_loss)(params, target)
    ours = optax_spd.adamw_l2_sp(rate, weight_decay=0.2, anchor="zero", mask=mask)
    expected = train(optax.adamw(rate, weight_decay=0.2, mask=mask), params, plain)
    assert_close(train(ours, params, plain), expected)
    assert differ(
        expected["dense"]["kernel"], train(optax.adam(rate), params, plain)["dense"]["kernel"]
    )


def test_around_an_anchor_it_is_adamw_in_the_coordinates_of_the_deviation() -> None:
    # With φ = θ - θ₀ as the parameters, decay toward the anchor is decay toward zero.
    params, anchor, target = trees_of()
    minus = lambda a, b: jax.tree.map(lambda x, y: x - y, a, b)
    plain = lambda params, count: jax.grad(data_loss)(params, target)
    shifted = lambda phi, count: jax.grad(data_loss)(phi, minus(target, anchor))
    ours = train(optax_spd.adamw_l2_sp(0.05, weight_decay=0.5, anchor=anchor), params, plain)
    phi = train(optax.adamw(0.05, weight_decay=0.5), minus(params, anchor), shifted)
    assert_close(minus(ours, anchor), phi, atol=1e-5)
    assert differ(ours, train(optax.adam(0.05), params, plain))


@pytest.mark.parametrize("sick", [np.nan, np.inf])
def test_a_decay_of_zero_keeps_every_bit_whatever_the_anchor_holds(sick: float) -> None:
    params = {"w": jnp.array([1.0, 2.0])}
    tx = optax_spd.l2_sp(lambda count: jnp.where(count == 0, 0.0, 0.5), anchor="argument")
    anchor, state = {"w": jnp.array([sick, 0.0])}, tx.init(params)
    updates, state = tx.update(params, state, params, anchor=anchor)
    np.testing.assert_array_equal(updates["w"], params["w"])
    updates, _ = tx.update(params, state, params, anchor=anchor)
    np.testing.assert_array_equal(np.isfinite(updates["w"]), [False, True])


def test_the_derivative_of_a_decay_of_zero_is_the_deviation() -> None:
    params, anchor = {"w": jnp.array([3.0, 4.0])}, {"w": jnp.array([1.0, 1.0])}

    def total(decay: jax.Array) -> jax.Array:
        tx = optax_spd.l2_sp(decay, anchor=anchor)
        return jnp.sum(tx.update(params, tx.init(params), params)[0]["w"])

    for decay in (0.0, 0.5):
        np.testing.assert_allclose(jax.grad(total)(decay), 5.0, rtol=1e-6)


# Cautious weight decay ---------------------------------------------------------------------------

CASES = golden.settings("cautious")


@functools.cache
def program(base: str, nesterov: bool) -> Any:
    """A replay of all cases of a kind; their numbers are arguments, as float64 as Python's."""

    def run(recorded: replays.Recording, numbers: dict[str, Any], anchor: Any) -> Any:
        rate, decay = (lambda count: recorded.rates[count]), numbers["weight_decay"]
        options: dict[str, Any] = {"anchor": anchor or "zero", "cautious": True}
        if base == "adam":
            adam = (*numbers["betas"], numbers["eps"])
            tx = optax_spd.adamw_l2_sp(rate, *adam, weight_decay=decay, **options)
        else:
            trace = optax.trace(numbers["momentum"], nesterov)
            stage = optax_spd.l2_sp(decay, **options)
            tx = optax.chain(trace, stage, optax.scale_by_learning_rate(rate))
        return replays.run(tx, recorded)

    return jax.jit(run)


# With x64 in float32 too: Optax's bias corrections need it. All arrays stay float32.
@pytest.mark.parametrize(
    ("layout", "dtype"),
    [("PyTorch", "float64"), ("Flax", "float64"), ("stacked", "float64"), ("PyTorch", "float32")],
)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_cautious_decay_replays(case: Any, layout: str, dtype: str, x64: None) -> None:
    recorded = replays.recording("cautious", case, layout, dtype)
    place, fields = replays.LAYOUTS[layout].place, replays.fields("cautious", case)
    anchor = {k: place(f["anchor"].astype(dtype)) for k, f in fields.items() if "anchor" in f}
    numbers = {k: case[k] for k in ("weight_decay", "betas", "eps", "momentum") if k in case}
    found = program(case["base"], case.get("nesterov", False))(recorded, numbers, anchor)
    assert {x.dtype for x in found.values()} == {np.dtype(dtype)}
    error = replays.largest_error("cautious", case, layout, found)
    assert error <= (1e-9 if dtype == "float64" else 1e-5)


def test_what_is_decayed_cautiously() -> None:
    """Both signs, an update of zero, numbers whose product underflows, and NaN."""
    tiny = 1e-30
    u = np.array([1, -1, 1, -1, 0, tiny, -tiny, np.nan, 1], np.float32)
    delta = np.array([2, -2, -2, 2, 2, tiny, tiny, 2, np.nan], np.float32)
    decayed = np.array([1, 1, 0, 0, 1, 1, 0, 0, 0], bool)
    tx = optax_spd.l2_sp(0.5, anchor="zero", cautious=True)
    updates, _ = jax.jit(tx.update)({"w": u}, tx.init({"w": delta}), {"w": delta})
    expected = np.where(decayed, u + np.float32(0.5) * delta, u)
    np.testing.assert_array_equal(updates["w"], expected)
    assert (decayed[:5] == (u * delta >= 0)[:5]).all()


@pytest.mark.parametrize("make", [optax_spd.l2_sp, functools.partial(optax_spd.adamw_l2_sp, 0.1)])
def test_cautious_is_a_flag(make: Any) -> None:
    with pytest.raises(TypeError, match="cautious"):
        make(weight_decay=0.1, cautious=1)
