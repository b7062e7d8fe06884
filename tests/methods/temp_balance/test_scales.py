"""From exponents to factors: the original's numbers, and what holds for any exponents."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tempbalance_golden as golden
from hypothesis import given, settings, strategies as st

import optax_spd
from optax_spd.methods.temp_balance.scales import ASSIGNMENTS

NAMES = {"tb_linear_map": "linear", "tb_sqrt": "sqrt", "tb_log2": "log2", "tb_step": "step"}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("case", "function"),
    [
        *((case, function) for case in golden.cases("assign") for function in NAMES),
        *((case, "lr") for case in golden.cases("sigmoid_layerwise")),
    ],
    ids=lambda value: value if isinstance(value, str) else value["name"],
)
def test_assignments_of_the_original(case: dict[str, Any], function: str) -> None:
    options = {
        "min_scale": case.get("lr_min_ratio", 0.5),
        "max_scale": case.get("lr_max_ratio", 1.5),
        "sigmoid_min": case.get("sigmoid_min", 2.0),
        "sigmoid_max": case.get("sigmoid_max", 1.0),
        "temperature": case.get("exp_temp", 10.0),
    }
    assign = NAMES.get(function, "sigmoid")
    alpha = golden.array(case["name"], "alpha")
    found = optax_spd.balance_scales(alpha, assign=assign, **options)
    expected = golden.array(case["name"], function) / case["untuned_lr"]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-9)


# One compiled program for all examples: six exponents, of which some count.
SCALES = {
    assign: jax.jit(
        lambda alpha, where, assign=assign: optax_spd.balance_scales(
            alpha, assign=assign, where=where
        )
    )
    for assign in ASSIGNMENTS
}
EXPONENTS = st.lists(
    st.floats(1.0625, 16, width=32) | st.sampled_from([np.nan, np.inf, 2.0]), min_size=6, max_size=6
)
FLAGS = st.lists(st.booleans(), min_size=6, max_size=6)


@settings(max_examples=60, deadline=None)
@given(EXPONENTS, FLAGS, st.sampled_from(ASSIGNMENTS))
def test_what_does_not_count_gets_1_and_changes_nothing(
    alpha: list[float], where: list[bool], assign: str
) -> None:
    a, flags = np.array(alpha, np.float32), np.array(where)
    found = np.asarray(SCALES[assign](a, flags))
    counted = flags & np.isfinite(a)
    assert np.isfinite(found).all()
    assert (found[~counted] == 1).all()
    if counted.any():
        alone = optax_spd.balance_scales(a[counted], assign=assign)
        np.testing.assert_allclose(found[counted], alone, rtol=1e-5)
    # Heavier tails - smaller exponents - never get a larger factor.
    order = np.argsort(a[counted], kind="stable")
    assert (np.diff(found[counted][order]) >= -1e-5).all()


def test_values_by_hand() -> None:
    alpha = jnp.array([4.0, 2.0, 8.0, 2.0])

    def scales(assign: str, **options: Any) -> np.ndarray:
        return np.asarray(optax_spd.balance_scales(alpha, assign=assign, **options))

    np.testing.assert_allclose(scales("linear", max_scale=3.5), [1.5, 0.5, 3.5, 0.5])
    np.testing.assert_allclose(scales("log2"), [8 / 7, 4 / 7, 12 / 7, 4 / 7], rtol=1e-6)
    np.testing.assert_allclose(scales("step"), [1.0, 0.5, 1.25, 0.75])  # ties as they come
    np.testing.assert_allclose(scales("sqrt").mean(), 1, rtol=1e-6)
    # The mean is 4: not above it, so the lower half's steepness, times a half.
    np.testing.assert_allclose(
        scales("sigmoid", sigmoid_min=0.5, sigmoid_max=2.0),
        [1, 10**-0.25, 10, 10**-0.25],
        rtol=1e-5,
    )


def test_logarithms_that_add_up_to_nothing_leave_the_layers_alone() -> None:
    np.testing.assert_array_equal(optax_spd.balance_scales(jnp.ones(3), assign="log2"), np.ones(3))
    np.testing.assert_array_equal(optax_spd.balance_scales(jnp.zeros(3), assign="sqrt"), np.ones(3))
    found = optax_spd.balance_scales(jnp.array([-4.0, 4.0, 4.0]), assign="sqrt")
    np.testing.assert_array_equal(found, np.ones(3))  # the negative one does not count
    found = optax_spd.balance_scales(jnp.array([0.0, 1.0, 4.0]), assign="sqrt")
    np.testing.assert_allclose(found, [0, 1, 2], rtol=1e-6)  # but 0 has a square root
    found = optax_spd.balance_scales(jnp.array([0.0, 2.0, 8.0]), assign="log2")
    np.testing.assert_allclose(found, [1, 0.5, 1.5])  # nor does one without a logarithm


@pytest.mark.parametrize("assign", ASSIGNMENTS)
def test_no_layer_at_all(assign: str) -> None:
    assert optax_spd.balance_scales(jnp.zeros(0), assign=assign).shape == (0,)


def test_traced_scales() -> None:
    scales = jax.jit(
        lambda low, high: optax_spd.balance_scales([2.0, 3.0], min_scale=low, max_scale=high)
    )
    np.testing.assert_allclose(scales(0.25, 2.0), [0.25, 2.0])


@pytest.mark.parametrize(
    ("alpha", "options", "error", "message"),
    [
        ([2.0], {"assign": "tb_step"}, ValueError, "assign must be one of 'linear'.*'tb_step'"),
        ([2.0], {"min_scale": -1.0}, ValueError, "min_scale must be finite and at least 0"),
        ([2.0], {"max_scale": np.nan}, ValueError, "max_scale must be finite"),
        ([2.0], {"min_scale": 2.0}, ValueError, "min_scale must not exceed max_scale.*2.0 and 1.5"),
        ([2.0], {"temperature": -1.0}, ValueError, "temperature must be"),
        ([2.0], {"sigmoid_min": "2"}, TypeError, "sigmoid_min must be a number"),
        ([[2.0]], {}, ValueError, r"alpha must be a vector.*\(1, 1\)"),
        (["2"], {}, TypeError, "alpha must hold real numbers"),
    ],
)
def test_bad_arguments(alpha: Any, options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        optax_spd.balance_scales(alpha, **options)
