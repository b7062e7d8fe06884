"""The plumbing between a caller's trees and a method's equation."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_spd
from optax_spd.core import stage
from optax_spd.layers import plans, spec, trees


def view_of(
    updates: Any, params: Any, extra: dict[str, Any] | None = None, **options: Any
) -> stage.StageView:
    options = {"anchor": "zero"} | options
    return stage.StageOptions(**options).view(updates, optax.EmptyState(), params, extra or {})


def test_rebuild_passes_everything_else_through_as_the_same_object() -> None:
    params = {
        "changed": jnp.ones(2),
        "count": jnp.arange(3),
        "empty": jnp.ones((0, 4)),
        "masked": jnp.ones(2),
        "none": None,
        "node": optax.MaskedNode(),
        "without update": jnp.ones(2),
    }
    updates = {
        "changed": jnp.full(2, 3.0),
        "count": np.zeros(3, np.int32),
        "empty": np.ones((0, 4), np.float32),
        "masked": np.ones(2, np.float32),
        "none": None,
        "node": optax.MaskedNode(),
        "without update": None,
    }
    mask = {name: name != "masked" for name in params}
    new = view_of(updates, params, mask=mask).rebuild(lambda d: d.step + 1)
    assert new.keys() == updates.keys()
    np.testing.assert_array_equal(new["changed"], [4.0, 4.0])
    for name in updates.keys() - {"changed"}:
        assert new[name] is updates[name], name


def test_rebuild_hands_each_layer_its_own_values_and_keeps_the_updates_dtype() -> None:
    params = {"a": jnp.ones((2, 3), jnp.bfloat16), "b": jnp.ones((4,))}
    updates = {"a": jnp.zeros((2, 3), jnp.float16), "b": jnp.zeros(4, jnp.bfloat16)}
    view = view_of(updates, params, layers=spec.stacked("a", axis=1))
    new = view.rebuild(
        lambda d, v, w: d.step + v + w,
        view.spread(jnp.arange(4.0)),
        view.spread(10 * jnp.arange(4.0)),
    )
    np.testing.assert_array_equal(new["a"], np.tile([0.0, 11.0, 22.0], (2, 1)))
    np.testing.assert_array_equal(new["b"], np.full(4, 33.0))
    assert new["a"].dtype == jnp.float16
    assert new["b"].dtype == jnp.bfloat16


def test_rebuild_keeps_the_callers_containers() -> None:
    # EasyDeL and others hand over plain dicts for boxed parameters, or the reverse.
    updates = {"list": [jnp.ones(1), (jnp.ones(2),)]}
    new = view_of(updates, updates).rebuild(lambda d: -d.step)
    assert jax.tree.structure(new) == jax.tree.structure(updates)
    np.testing.assert_array_equal(new["list"][1][0], [-1.0, -1.0])


def test_deviations_are_taken_in_float32_at_least() -> None:
    theta, theta_0 = jnp.full(3, 1.0, jnp.bfloat16), jnp.full(3, 0.5, jnp.bfloat16)
    step = jnp.full(3, 2.0**-12, jnp.bfloat16)  # lost in a bfloat16 sum with 0.5
    view = view_of([step], [theta], {"anchor": [theta_0]}, anchor="argument")
    (deviation,) = view.deviations
    assert deviation is not None
    assert {x.dtype for x in deviation} == {jnp.dtype(jnp.float32)}
    np.testing.assert_array_equal(deviation.delta, np.full(3, 0.5))
    np.testing.assert_array_equal(deviation.step, np.full(3, 2.0**-12))
    np.testing.assert_array_equal(deviation.tentative, np.full(3, 0.5 + 2.0**-12))


def test_one_float64_array_makes_the_vectors_float64(x64: None) -> None:
    wide, narrow = jnp.ones(2, jnp.float64), jnp.ones(2, jnp.bfloat16)
    view = view_of([wide, narrow], [wide, narrow])
    assert view.plan.dtype == jnp.float64
    assert view.deviations[0] is not None
    assert view.deviations[0].delta.dtype == jnp.float64
    assert view.deviations[1] is not None
    assert view.deviations[1].delta.dtype == jnp.float32
    (square,) = view.sums(1, lambda d: (d.delta**2,))
    assert square.dtype == jnp.float64


def test_match_orders_by_the_parameters_and_skips_what_does_not_act() -> None:
    params = {"a": jnp.ones(2), "b": jnp.arange(2), "c": jnp.ones(1, jnp.bfloat16)}
    view = view_of(params, params)
    matched = view.match({"c": np.full(1, 2.0), "b": None, "a": np.full(2, 3.0)}, "grad")
    assert matched[1] is None
    assert matched[0] is not None
    assert matched[2] is not None
    np.testing.assert_array_equal(matched[0], [3.0, 3.0])
    np.testing.assert_array_equal(matched[2], [2.0])
    assert matched[2].dtype == jnp.float32


def test_match_refuses_a_gap_where_the_update_is_an_array() -> None:
    params = {"a": jnp.ones(2), "b": jnp.ones(2)}
    view = view_of({"a": jnp.ones(2), "b": None}, params)
    view.match({"a": jnp.ones(2), "b": None}, "grad")  # no update there, so none is needed
    with pytest.raises(ValueError, match="grad is None at 'a'"):
        view.match({"a": None, "b": jnp.ones(2)}, "grad")
    with pytest.raises(ValueError, match=r"grad is MaskedNode\(\) at 'a'"):
        view.match({"a": optax.MaskedNode(), "b": None}, "grad")


def test_updates_that_do_not_fit_the_parameters_are_refused() -> None:
    params = {"a": jnp.ones(2), "b": jnp.ones(3)}
    with pytest.raises(ValueError, match="updates does not match params: it has no leaf at 'b'"):
        view_of({"a": jnp.ones(2)}, params)
    with pytest.raises(ValueError, match=r"at 'b': updates has shape \(4,\)"):
        view_of({"a": jnp.ones(2), "b": jnp.ones(4)}, params)


def test_check_vector_names_the_field_and_both_counts() -> None:
    plan = plans.plan_layers(trees.flatten({"a": jnp.ones(2), "b": jnp.ones(3)}))
    stage.check_vector("spd_ratio", jnp.zeros(2), plan)
    for wrong in (jnp.zeros(3), jnp.zeros(()), jnp.zeros((1, 2))):
        with pytest.raises(ValueError, match="state's spd_ratio has shape") as error:
            stage.check_vector("spd_ratio", wrong, plan)
        assert str(wrong.shape) in str(error.value)
        assert "2 layers" in str(error.value)


def test_a_state_made_for_other_layers_is_refused() -> None:
    params = {"blocks": jnp.ones((3, 2)), "head": jnp.ones(2)}
    made = optax_spd.spd(layers=optax_spd.stacked("blocks"))
    used = optax_spd.spd()
    with pytest.raises(ValueError, match=r"spd_ratio has shape \(4,\).* 2 layers"):
        used.update(params, made.init(params), params, grad=params)


def test_options_are_checked_when_a_stage_is_built() -> None:
    with pytest.raises(ValueError, match="anchor must be one of 'initial', 'zero', 'argument'"):
        stage.StageOptions(anchor="pretrained")
    with pytest.raises(TypeError, match="layers must be a function"):
        stage.StageOptions(layers={"a": spec.LayerSpec()})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="axis_name must be a mesh axis name"):
        stage.StageOptions(axis_name=3)
