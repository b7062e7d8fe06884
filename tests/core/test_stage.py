"""The plumbing between a caller's trees and a method's equation."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_spd
from optax_spd.core import stage, sums
from optax_spd.layers import plans, spec


def view_of(
    updates: Any, params: Any, extra: dict[str, Any] | None = None, **options: Any
) -> stage.StageView:
    options = {"anchor": "zero"} | options
    return stage.StageOptions(**options).view(updates, optax.EmptyState(), params, extra or {})


def test_rebuild_hands_each_layer_its_own_values_and_keeps_the_updates_dtype() -> None:
    params = {"a": jnp.ones((2, 3), jnp.bfloat16), "b": jnp.ones((4,))}
    updates = {"a": jnp.zeros((2, 3), jnp.float16), "b": jnp.zeros(4, jnp.bfloat16)}
    view = view_of(updates, params, layers=spec.stacked("a", axis=1))
    assert view.has_update.tolist() == [True] * 4
    values = (view.spread(k * jnp.arange(4.0)) for k in (1, 10))
    new = view.rebuild(view.map(lambda d, v, w: d.step + v + w, *values))
    np.testing.assert_array_equal(new["a"], np.tile([0.0, 11.0, 22.0], (2, 1)))
    np.testing.assert_array_equal(new["b"], np.full(4, 33.0))
    assert (new["a"].dtype, new["b"].dtype) == (jnp.float16, jnp.bfloat16)


def test_one_float64_array_makes_the_vectors_float64(x64: None) -> None:
    wide, narrow = jnp.ones(2, jnp.float64), jnp.ones(2, jnp.bfloat16)
    view = view_of([wide, narrow, wide], [wide, narrow, narrow])
    assert [d.delta.dtype for d in view.deviations if d] == ["float64", "float32", "float64"]
    assert view.plan.dtype == jnp.float64
    (square,) = sums.layer_sums(view.plan, view.map(lambda d: (d.delta**2,)), 1, view.axes)
    assert square.dtype == jnp.float64


def test_match_orders_by_the_parameters_and_needs_leaves_where_the_update_is_an_array() -> None:
    params = {"a": jnp.ones(2), "b": jnp.arange(2), "c": jnp.ones(1, jnp.bfloat16)}
    view = view_of(params, params)
    first, none, last = view.match({"c": np.full(1, 2.0), "b": None, "a": np.full(2, 3.0)}, "grad")
    assert none is None
    assert first is not None
    assert last is not None
    np.testing.assert_array_equal(first, [3.0, 3.0])
    np.testing.assert_array_equal(last, [2.0])
    assert last.dtype == jnp.float32
    view = view_of({"a": jnp.ones(2), "b": None}, params | {"c": None})
    view.match({"a": jnp.ones(2), "b": None}, "grad")  # no update there, so none is needed
    for gap in (None, optax.MaskedNode()):
        with pytest.raises(ValueError, match=r"grad is .* at 'a', where the update is"):
            view.match({"a": gap, "b": jnp.ones(2)}, "grad")


@pytest.mark.parametrize("factor", [0.0, 1e-6, 0.3, 0.49, 0.51, 0.9, 1 - 1e-6, 1.0])
def test_a_projected_step_has_no_cancellation_whatever_the_factor(factor: float) -> None:
    # Toward either end one of its two forms is the difference of nearly equal numbers.
    draw = np.random.default_rng(0)
    delta = draw.normal(size=1000).astype(np.float32)
    size = 1e4 if factor < 0.01 else 1e-4
    step = (size * draw.normal(size=1000)).astype(np.float32)
    found = stage.project_step(stage.Deviation(delta, step), jnp.float32(factor))
    f, wide, u = np.float64(np.float32(factor)), delta.astype(np.float64), step.astype(np.float64)
    exact = f * (wide + u) - wide
    np.testing.assert_allclose(found, exact, rtol=2e-6, atol=2e-7 * (1 - f))
    if factor == 1:
        np.testing.assert_array_equal(found, step)


def test_a_float0_update_leaves_its_parameter() -> None:
    theta = jnp.arange(3)
    assert stage.applied(theta, np.zeros(3, jax.dtypes.float0)) is theta
    half = jnp.ones(2, jnp.bfloat16)
    assert stage.applied(half, jnp.ones(2)).dtype == jnp.bfloat16


def test_zeros_like_layers_answer_in_kind() -> None:
    params = {"a": jnp.ones(2, jnp.bfloat16), "ids": jnp.arange(2), "none": None}
    plan = plans.planned(params, None, None).plan
    for dtype, expected in ((None, jnp.bfloat16), (jnp.float32, jnp.float32)):
        for tree, kind in ((params, jax.Array), (jax.eval_shape(lambda: params), object)):
            zeros = stage.zeros_like_layers(tree, plan, dtype)
            assert isinstance(zeros["a"], kind)
            assert (zeros["a"].shape, zeros["a"].dtype) == ((2,), expected)
            assert (zeros["ids"], zeros["none"]) == (optax.MaskedNode(), None)
    assert stage.zeros_like_layers({}, plan) == {}


def test_the_anchor_tells_which_arrays_init_did_not_get() -> None:
    """One of those it got may miss its update in a step; another is unknown to the state."""
    array = jnp.ones(2)
    params = {"a": array, "b": array, "statistics": array}
    updates = {"a": array, "b": None, "statistics": None}
    held = {"a": array, "b": array, "statistics": None}
    planned = lambda size, held: stage.planned(
        updates, params, None, None, {"ratio": jnp.zeros(size)}, held
    )
    assert planned(2, held)[1].names == ("a", "b")
    with pytest.raises(ValueError, match="2 layers under the mask"):
        planned(1, held)
    assert planned(3, params)[1].names == ("a", "b", "statistics")


def test_a_mask_may_have_none_where_a_model_is_not_trained() -> None:
    array = jnp.ones(2)
    params = {"a": array, "b": array, "steps": jnp.arange(3)}
    mask = {"a": True, "b": False, "steps": None}
    tx = optax_spd.l2_sp(0.5, mask=mask, anchor="zero")
    state = tx.init({"a": array, "b": array, "steps": None})
    updates, _ = tx.update({"a": array, "b": array, "steps": None}, state, params)
    np.testing.assert_array_equal(updates["a"], [1.5, 1.5])
    np.testing.assert_array_equal(updates["b"], [1.0, 1.0])
    with pytest.raises(TypeError, match="mask must hold True or False, got None at 'steps'"):
        tx.update({"a": array, "b": array, "steps": params["steps"]}, state, params)
