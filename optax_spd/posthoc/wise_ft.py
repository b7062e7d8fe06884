"""WiSE-FT: interpolation between the pretrained and the fine-tuned weights.

Wortsman et al.: "Robust fine-tuning of zero-shot models", CVPR 2022,
https://arxiv.org/abs/2109.01903:

    θ_α = (1 - α) θ₀ + α θ

Difference from the paper: α may be given per layer.
"""

from typing import Any

import jax
import jax.numpy as jnp

from optax_spd.anchors import policy
from optax_spd.core import sums
from optax_spd.layers import checks, plans, trees
from optax_spd.layers.spec import LayerFn, check_layers

PyTree = Any


def wise_ft(
    params: PyTree,
    anchor: PyTree,
    alpha: jax.typing.ArrayLike,
    *,
    layers: LayerFn | None = None,
) -> PyTree:
    r"""Interpolates in weight space: :math:`(1-\alpha)\,\theta_0 + \alpha\,\theta`.

    Use it after training, on any pair of checkpoints. It is cheap enough to try many α on
    validation data, and may be jitted.

    Args:
      params: the fine-tuned parameters θ.
      anchor: the pretrained parameters θ₀; matched by path.
      alpha: 0 gives the anchor and 1 the fine-tuned parameters, exactly; a scalar, or one per
        layer in :func:`optax_spd.layer_names` order. Values outside [0, 1] extrapolate.
      layers: what a layer is, if ``alpha`` is given per layer.

    Returns:
      A tree like ``params``, with its dtypes. Leaves that are not layers (integers, empty, None)
      are those of ``params``.

    Raises:
      TypeError: a complex parameter or anchor.
      ValueError: ``alpha`` is not finite or has another shape; trees or shapes that do not match.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax_spd
      >>> optax_spd.wise_ft({"bias": jnp.ones(2)}, {"bias": jnp.zeros(2)}, alpha=0.25)
      {'bias': Array([0.25, 0.25], dtype=float32)}

    References:
      Wortsman et al., `Robust fine-tuning of zero-shot models
      <https://arxiv.org/abs/2109.01903>`_, CVPR 2022.
    """
    check_layers(layers)
    model = trees.flatten(params)
    flat = trees.only_parameters(model)
    plan = plans.plan_layers(flat, layers)
    checks.check_finite("alpha", alpha)
    vector = sums.per_layer("alpha", alpha, plan)
    layered = flat.only(entry is not None for entry in plan.arrays)
    pretrained = policy.match_anchor(layered, anchor)
    blended = [
        theta
        if entry is None
        else _blend(path, theta, theta_0, sums.spread(entry, vector, jnp.ndim(theta)))
        for path, theta, theta_0, entry in zip(
            flat.paths, model.leaves, pretrained, plan.arrays, strict=True
        )
    ]
    return model.unflatten(blended)


def _blend(path: trees.Path, theta: Any, theta_0: Any, alpha: jax.Array) -> jax.Array:
    dtype = plans.compute_dtype(theta, theta_0)
    pretrained = trees.as_real(policy.on_device(theta_0), dtype, "anchor", path)
    tuned = jnp.asarray(theta, dtype)
    alpha = sums.sharded_like(alpha.astype(dtype), tuned)
    return _interpolated(alpha, pretrained, tuned).astype(jnp.result_type(theta))


@jax.custom_jvp
def _interpolated(alpha: jax.Array, start: jax.Array, end: jax.Array) -> jax.Array:
    """(1 - α) start + α end, with the exact bits at α = 0 and 1.

    The derivatives are those of the formula, also at the ends.
    """
    mixed = (1 - alpha) * start + alpha * end
    # By selects, since 0 times infinity is NaN.
    return jnp.where(alpha == 0, start, jnp.where(alpha == 1, end, mixed))


@_interpolated.defjvp
def _(primals: tuple[jax.Array, ...], tangents: tuple[jax.Array, ...]) -> Any:
    (alpha, start, end), (d_alpha, d_start, d_end) = primals, tangents
    change = sums.times(1 - alpha, d_start) + sums.times(alpha, d_end) + d_alpha * (end - start)
    return _interpolated(alpha, start, end), change
