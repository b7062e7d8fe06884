"""Checks of hyperparameters: what passes, what is refused, and in which words."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optax_spd.layers import checks

ONE_IN_MANY_TYPES = [1, 1.0, np.float32(1), np.float64(1), np.array(1.0), np.int64(1), jnp.ones(())]


@pytest.mark.parametrize("value", ONE_IN_MANY_TYPES, ids=lambda value: type(value).__name__)
def test_scalars_of_every_kind_are_checked(value: Any) -> None:
    checks.check_scalar("k", value, low=1.0, high=1.0)  # both bounds are allowed values
    with pytest.raises(ValueError, match=r"k must be finite and at least 2, got 1\.0"):
        checks.check_scalar("k", value, low=2.0)
    with pytest.raises(ValueError, match=r"k must be finite and between 0 and 0\.5, got 1\.0"):
        checks.check_scalar("k", value, high=0.5)


def test_tracers_and_schedules_are_not_looked_at() -> None:
    checks.check_scalar("decay", optax.constant_schedule(-1.0))
    seen = []

    @jax.jit
    def f(x: jax.Array) -> jax.Array:
        checks.check_scalar("decay", x)
        checks.check_finite("alpha", x)
        seen.append(isinstance(x, jax.core.Tracer))
        return x

    f(jnp.asarray(-1.0))
    assert seen == [True]


def test_finite_arrays_pass_and_others_do_not() -> None:
    for value in (-3, 0.5, np.ones((2, 2)), jnp.ones(3, jnp.bfloat16), [0.0, 1.0]):
        checks.check_finite("alpha", value)
    for bad in (math.nan, [0.0, math.inf], jnp.array([1.0, jnp.nan])):
        with pytest.raises(ValueError, match="alpha must be finite"):
            checks.check_finite("alpha", bad)
    for wrong in (None, "1"):
        with pytest.raises(TypeError, match="alpha must hold real numbers"):
            checks.check_finite("alpha", wrong)


def test_patterns_are_compiled_or_refused() -> None:
    assert checks.compile_pattern("layer_[0-3]/").search("encoder/layer_2/kernel")
    with pytest.raises(ValueError, match=r"pattern '\*bad' is not valid: nothing to repeat"):
        checks.compile_pattern("*bad")
    with pytest.raises(TypeError, match="regular expression"):
        checks.compile_pattern(3)  # type: ignore[arg-type]


def test_value_at_evaluates_schedules_and_casts() -> None:
    count = jnp.asarray(3, jnp.int32)
    schedule = optax.linear_schedule(0.0, 1.0, 4)
    value = checks.value_at(schedule, count, jnp.float32)
    np.testing.assert_allclose(value, 0.75)
    for constant in (2, np.float64(2), jnp.asarray(2.0, jnp.bfloat16)):
        value = checks.value_at(constant, count, jnp.float32)
        assert value.dtype == jnp.float32
        assert value == 2


def test_counts_are_integers_from_1() -> None:
    for fine in (1, np.int64(7), 2**40):
        checks.check_count("every", fine)
    jax.jit(lambda every: checks.check_count("every", every))(0)
    for bad in (0, -3):
        with pytest.raises(ValueError, match=f"every must be at least 1, got {bad}"):
            checks.check_count("every", bad)
    for bad in (1.0, True, "1", None):
        with pytest.raises(TypeError, match="every must be an integer"):
            checks.check_count("every", bad)


def test_what_shapes_the_program_is_no_tracer_and_no_schedule() -> None:
    checks.check_static("bins", 3)
    checks.check_flag("skip", np.True_)
    for check, bad in ((checks.check_static, lambda _: 3), (checks.check_flag, 1)):
        with pytest.raises(TypeError, match="bins"):
            check("bins", bad)
    with pytest.raises(TypeError, match="bins shapes the program"):
        jax.jit(lambda bins: checks.check_static("bins", bins))(3)
