"""TempBalance's learning-rate factors as a function of the power-law exponents.

The equations are those of :mod:`optax_spd.methods.temp_balance.stage`. Differences from the
authors' code: exponents that are not finite are left out, and "log2" of exponents that are all 1
gives all layers 1 (theirs gives NaN).
"""

from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from optax_spd.layers import checks, plans

Assignment = Literal["linear", "sqrt", "log2", "step", "sigmoid"]
ASSIGNMENTS = get_args(Assignment)


def balance_scales(
    alpha: jax.typing.ArrayLike,
    *,
    assign: Assignment = "linear",
    min_scale: jax.typing.ArrayLike = 0.5,
    max_scale: jax.typing.ArrayLike = 1.5,
    sigmoid_min: jax.typing.ArrayLike = 2.0,
    sigmoid_max: jax.typing.ArrayLike = 1.0,
    temperature: jax.typing.ArrayLike = 10.0,
    where: jax.typing.ArrayLike | None = None,
) -> jax.Array:
    r"""Computes a learning-rate factor for each layer from the power-law exponents.

    With "linear", and α the exponent of a layer of n:

    .. math::

        s = s_{\min} + (s_{\max} - s_{\min}) \frac{\alpha - \min \alpha}{\max \alpha - \min \alpha}

    "sqrt" is :math:`n \sqrt\alpha / \sum \sqrt\alpha`, and "log2" the same of
    :math:`\log_2 \alpha`. "step" goes by the rank of α. "sigmoid" is a sigmoid of α minus the mean,
    with 10 to its power.

    Args:
      alpha: the exponents, shape (layers,).
      assign: "linear", "sqrt", "log2" or "step" (Zhou et al. 2023), or "sigmoid" (Liu et al. 2024).
      min_scale: the smallest factor of "linear" and "step".
      max_scale: the largest factor of "linear" and "step". "step" does not reach it, since a rank
        is at most n - 1. If all exponents are equal, "linear" gives all layers this factor.
      sigmoid_min: c for exponents up to the mean: the factor is at least 10^(-c/2).
      sigmoid_max: c for exponents above the mean: the factor is at most 10^(c/2).
      temperature: τ of "sigmoid".
      where: per layer whether to include it; None for all. Exponents that are not finite are always
        left out, and so are negative ones for "sqrt" and those up to 0 for "log2".

    Returns:
      The factors, shape (layers,), float64 for float64 exponents, else float32; 1 for a layer that
      is left out.

    Raises:
      TypeError: an argument of the wrong type.
      ValueError: ``alpha`` is not a vector, an unknown ``assign``, a number out of range, or
        ``min_scale`` above ``max_scale``.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax_spd
      >>> print(optax_spd.balance_scales(jnp.array([2.0, 3.0, 4.0])))
      [0.5 1.  1.5]

    References:
      Zhou et al., `Temperature Balancing, Layer-wise Weight Analysis, and Neural Network Training
      <https://arxiv.org/abs/2312.00359>`_, NeurIPS 2023; Liu et al., `Model Balancing Helps
      Low-data Training and Fine-tuning <https://arxiv.org/abs/2410.12178>`_, EMNLP 2024.

    .. seealso:: :func:`optax_spd.temp_balance`, :func:`optax_spd.power_law_alpha`
    """
    check_scales(assign, min_scale, max_scale, sigmoid_min, sigmoid_max, temperature)
    checks.check_real("alpha", alpha)
    a = jnp.asarray(alpha)
    if a.ndim != 1:
        raise ValueError(f"alpha must be a vector with one entry per layer, got shape {a.shape}.")
    a = a.astype(plans.compute_dtype(a))
    counted = jnp.isfinite(a)
    if where is not None:
        counted &= jnp.broadcast_to(jnp.asarray(where, bool), a.shape)
    if assign == "sqrt":
        counted &= a >= 0
    if assign == "log2":
        counted &= a > 0
    n = jnp.sum(counted, dtype=a.dtype)

    def span(fraction: jax.Array) -> jax.Array:
        low, high = jnp.asarray(min_scale, a.dtype), jnp.asarray(max_scale, a.dtype)
        return low + (high - low) * fraction

    if assign == "linear":
        least = jnp.min(a, initial=jnp.inf, where=counted)
        width = jnp.max(a, initial=-jnp.inf, where=counted) - least
        distinct = width > 0
        s = span(jnp.where(distinct, (a - least) / jnp.where(distinct, width, 1), 1))
    elif assign in ("sqrt", "log2"):
        values = (jnp.sqrt if assign == "sqrt" else jnp.log2)(jnp.where(counted, a, 1))
        total = jnp.sum(values, where=counted)
        s = jnp.where(total == 0, 1, n * values / jnp.where(total == 0, 1, total))
    elif assign == "step":
        order = jnp.argsort(jnp.where(counted, a, jnp.inf), stable=True)
        rank = jnp.zeros_like(order).at[order].set(jnp.arange(a.size, dtype=order.dtype))
        s = span(rank.astype(a.dtype) / jnp.maximum(n, 1))
    else:
        x = a - jnp.sum(jnp.where(counted, a, 0)) / jnp.maximum(n, 1)
        steepness = jnp.where(x > 0, jnp.asarray(sigmoid_max), jnp.asarray(sigmoid_min))
        s = 10 ** (steepness.astype(a.dtype) * (jax.nn.sigmoid(temperature * x) - 0.5))
    return jnp.where(counted, s, 1).astype(a.dtype)


def check_scales(
    assign: str,
    min_scale: Any,
    max_scale: Any,
    sigmoid_min: Any,
    sigmoid_max: Any,
    temperature: Any,
) -> None:
    """Checks the concrete arguments of :func:`balance_scales`; raises as documented there."""
    if assign not in ASSIGNMENTS:
        allowed = ", ".join(map(repr, ASSIGNMENTS))
        raise ValueError(f"assign must be one of {allowed}, got {assign!r}.")
    checks.check_scalar("min_scale", min_scale)
    checks.check_scalar("max_scale", max_scale)
    checks.check_scalar("sigmoid_min", sigmoid_min)
    checks.check_scalar("sigmoid_max", sigmoid_max)
    checks.check_scalar("temperature", temperature)
    scales = (min_scale, max_scale)
    concrete = not any(callable(s) or isinstance(s, jax.core.Tracer) for s in scales)
    if assign in ("linear", "step") and concrete and float(min_scale) > float(max_scale):
        raise ValueError(f"min_scale must not exceed max_scale, got {min_scale} and {max_scale}.")
