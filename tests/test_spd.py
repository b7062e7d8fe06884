"""SPD against the original implementation, against float64 NumPy, and its own properties."""

from typing import Any

import golden
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_spd
from optax_spd.spd import decay_ratio

CASES = golden.settings("spd")


def scale_by_original_amsgrad(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    """Adam whose second moment is the running maximum of the *un*corrected v, as in PyTorch.

    Optax's amsgrad takes the maximum after the bias correction: other numbers.
    """

    def init(params: Any) -> Any:
        zeros = jax.tree.map(jnp.zeros_like, params)
        return jnp.zeros((), jnp.int32), zeros, zeros, zeros

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        count, m, v, s = state
        count = count + 1
        m = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, m, updates)
        v = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g**2, v, updates)
        s = jax.tree.map(jnp.maximum, s, v)
        step = jax.tree.map(
            lambda m, s: m / (1 - b1**count) / (jnp.sqrt(s) / jnp.sqrt(1 - b2**count) + eps), m, s
        )
        return step, (count, m, v, s)

    return optax.GradientTransformation(init, update)


def inner_of(case: golden.Case) -> optax.GradientTransformation:
    b1, b2 = case.settings["betas"]
    eps = case.settings["eps"]
    rate = lambda count: case.lr[count]
    if case.settings["amsgrad"]:
        return optax.chain(
            scale_by_original_amsgrad(b1, b2, eps), optax.scale_by_learning_rate(rate)
        )
    return optax.adam(rate, b1, b2, eps)


def optimizer_of(case: golden.Case, form: str) -> tuple[Any, bool]:
    """The case's optimizer in one of the four forms, and whether the caller passes ``grad=``."""
    anchor = "zero" if case.anchor is None else case.anchor
    decay = case.settings["weight_decay"]
    inner, stage = inner_of(case), optax_spd.spd(decay, anchor=anchor)
    if form == "optax.chain":
        return optax.chain(inner, stage), True
    if form == "optax_spd.chain":
        return optax_spd.chain(inner, stage), False
    if form == "with_gradient":
        return optax_spd.with_gradient(optax.chain(inner, stage)), False
    b1, b2 = case.settings["betas"]
    return (
        optax_spd.adam_spd(
            lambda count: case.lr[count],
            b1,
            b2,
            case.settings["eps"],
            weight_decay=decay,
            anchor=anchor,
        ),
        False,
    )


def run(case: golden.Case, tx: Any, pass_grad: bool) -> tuple[Any, jax.Array]:
    """Parameters and ratios after every step."""

    def step(carry: Any, index: jax.Array) -> Any:
        params, state = carry
        grads = case.gradient(index, params)
        extra = {"grad": grads} if pass_grad else {}
        updates, state = tx.update(grads, state, params, **extra)
        params = optax.apply_updates(params, updates)
        return (params, state), (params, optax.tree.get(state, "spd_ratio"))

    scan = jax.jit(lambda carry: jax.lax.scan(step, carry, jnp.arange(case.settings["steps"]))[1])
    return scan((case.theta0, tx.init(case.theta0)))


@pytest.mark.parametrize("form", ["optax.chain", "optax_spd.chain", "with_gradient", "adam_spd"])
@pytest.mark.parametrize("settings", CASES, ids=[c["name"] for c in CASES])
def test_replays_the_original(settings: dict[str, Any], form: str, x64: None) -> None:
    case = golden.load("spd", settings)
    if form == "adam_spd" and settings["amsgrad"]:
        form = "with_gradient"  # Adam cannot be exchanged inside the recipe
    tx, pass_grad = optimizer_of(case, form)
    params, ratios = run(case, tx, pass_grad)
    tolerance = 1e-9 if settings["dtype"] == "float64" else 1e-5
    names = optax_spd.layer_names(case.theta0)
    fired = 0
    for name in case.theta0:
        assert params[name].dtype == settings["dtype"]
        np.testing.assert_allclose(params[name], case.params[name], rtol=0, atol=tolerance)
        expected = case.fields[name]["ratio"]
        np.testing.assert_allclose(
            ratios[:, names.index(name)], expected, rtol=0, atol=tolerance, err_msg=name
        )
        fired += int((expected > 0).sum())
    assert fired == settings["stats"]["ratio_pos"] > 0
