"""Checks of arguments when a transformation is built."""

import inspect
import math
import operator
import re
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Schedule = Callable[[jax.typing.ArrayLike], jax.typing.ArrayLike]
ScalarOrSchedule = float | jax.Array | np.ndarray | Schedule

_NOT_THE_CALLER = ("optax_spd", "optax", "jax")


def check_scalar(name: str, value: Any, *, low: float = 0.0, high: float = math.inf) -> None:
    """Raises unless a concrete hyperparameter is in [low, high]; schedules and tracers pass.

    Args:
      name: the argument's name, for the message.
      value: a Python, NumPy or JAX scalar, a schedule, or a tracer.
      low: smallest value allowed.
      high: largest value allowed; infinity allows every finite one.

    Raises:
      TypeError: not a number.
      ValueError: not a scalar, not finite, or out of range.
    """
    if callable(value) or isinstance(value, jax.core.Tracer):
        return
    try:
        if np.ndim(value) != 0:
            raise ValueError(
                f"{name} must be a scalar or a schedule, got an array of shape {np.shape(value)}."
            )
        if isinstance(value, str | bytes):  # float() would parse it
            raise TypeError
        number = float(value)
    except TypeError as error:
        raise TypeError(f"{name} must be a number or a schedule, got {value!r}.") from error
    if not (math.isfinite(number) and low <= number <= high):
        allowed = (
            f" and at least {low:g}" if high == math.inf else f" and between {low:g} and {high:g}"
        )
        if low == -math.inf and high == math.inf:
            allowed = ""
        raise ValueError(f"{name} must be finite{allowed}, got {number}.")


def check_count(name: str, value: Any) -> None:
    """Raises unless a concrete value is an integer of at least 1; tracers pass.

    Raises:
      TypeError: not an integer.
      ValueError: less than 1.
    """
    if isinstance(value, jax.core.Tracer):
        return  # optax.inject_hyperparams passes one
    try:
        if isinstance(value, bool | np.bool_):
            raise TypeError
        number = operator.index(value)
    except TypeError as error:
        raise TypeError(f"{name} must be an integer, got {value!r}.") from error
    if number < 1:
        raise ValueError(f"{name} must be at least 1, got {number}.")


def check_static(name: str, value: Any) -> None:
    """Raises TypeError for a tracer or a schedule, for an argument that shapes the program."""
    if isinstance(value, jax.core.Tracer) or callable(value):
        raise TypeError(
            f"{name} shapes the program, so it must be a plain value, got {value!r}. Under jit or "
            "optax.inject_hyperparams make it static (static_args)."
        )


def check_flag(name: str, value: Any) -> None:
    """Raises TypeError unless ``value`` is a bool."""
    check_static(name, value)
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name} must be True or False, got {value!r}.")


def check_finite(name: str, value: Any) -> None:
    """Raises unless a concrete number or array is finite everywhere; tracers pass.

    Raises:
      TypeError: not numeric.
      ValueError: a NaN or an infinity.
    """
    check_real(name, value)
    if not isinstance(value, jax.core.Tracer) and not np.all(np.isfinite(np.asarray(value))):
        raise ValueError(f"{name} must be finite, got {value}.")


def check_real(name: str, value: Any) -> None:
    """Raises TypeError unless ``value`` is a real number or an array of real numbers."""
    dtype = value.dtype if isinstance(value, jax.core.Tracer) else np.asarray(value).dtype
    if not any(jnp.issubdtype(dtype, kind) for kind in (jnp.floating, jnp.integer)):
        raise TypeError(f"{name} must hold real numbers, got {value!r}.")


def check_dtype(name: str, value: Any) -> np.dtype:
    """Converts an argument to the floating dtype that JAX would store.

    Raises:
      TypeError: not a dtype.
      ValueError: not a floating dtype.
    """
    try:
        dtype = jnp.dtype(value)
    except TypeError as error:
        raise TypeError(f"{name} must be a dtype such as 'bfloat16', got {value!r}.") from error
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"{name} must be a floating dtype, got {dtype}.")
    return jax.dtypes.canonicalize_dtype(dtype)


def compile_pattern(pattern: str) -> re.Pattern[str]:
    """Compiles a path pattern.

    Raises:
      TypeError: not a string.
      ValueError: not a regular expression.
    """
    if not isinstance(pattern, str):
        raise TypeError(f"A path pattern is a regular expression (str), got {pattern!r}.")
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(f"The path pattern {pattern!r} is not valid: {error}.") from error


def value_at(hyperparameter: ScalarOrSchedule, count: jax.Array, dtype: Any) -> jax.Array:
    """The value of a hyperparameter or schedule at step ``count``, as ``dtype``."""
    value = hyperparameter(count) if callable(hyperparameter) else hyperparameter
    return jnp.asarray(value, dtype)


def warn(message: str) -> None:
    """Issues a UserWarning at the nearest caller outside of this package, Optax and JAX.

    How deep a stage lies in wrappers varies, and Python shows a warning once for each line.
    """
    level, frame = 1, inspect.currentframe()
    while frame and frame.f_globals.get("__name__", "").split(".")[0] in _NOT_THE_CALLER:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, UserWarning, stacklevel=level)
