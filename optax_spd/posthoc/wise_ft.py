"""WiSE-FT: interpolation between the pretrained and the fine-tuned weights.

Wortsman et al.: "Robust fine-tuning of zero-shot models", CVPR 2022,
https://arxiv.org/abs/2109.01903:

    θ_α = (1 - α) θ₀ + α θ

Differences from the paper:

1. α may be given per layer.
2. A mask leaves arrays, such as a new head, at their fine-tuned value.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optax_spd.anchors import policy
from optax_spd.core import sums
from optax_spd.layers import checks, masks, plans, trees
from optax_spd.layers.spec import LayerFn, check_layers
from optax_spd.layers.types import Mask, PyTree


def wise_ft(
    params: PyTree,
    anchor: PyTree,
    alpha: jax.typing.ArrayLike,
    *,
    layers: LayerFn | None = None,
    mask: Mask = None,
) -> PyTree:
    r"""Interpolates in weight space: :math:`(1-\alpha)\,\theta_0 + \alpha\,\theta`.

    Use it after training, on any pair of checkpoints. It is cheap enough to try many α on
    validation data, and may be jitted.

    Args:
      params: the fine-tuned parameters θ.
      anchor: the pretrained parameters θ₀; matched by path.
      alpha: 0 gives the anchor and 1 the fine-tuned parameters, exactly; a scalar, or one per
        layer in :func:`optax_spd.layer_names` order, such as those of
        :func:`optax_spd.lines_alpha`. Values outside [0, 1] extrapolate. With a mask it may have
        one for each layer of ``params`` (``layer_names(params, layers)``) or one for each layer
        under the mask (``layer_names(params, layers, mask)``).
      layers: what a layer is, if ``alpha`` is given per layer.
      mask: True where to interpolate, as for :func:`optax_spd.spd`. Elsewhere the parameters keep
        their fine-tuned value, and no anchor is needed: leave out a new head.

    Returns:
      A tree like ``params``, with its dtypes. Leaves that are not layers (integers, empty, None)
      or not under the mask are those of ``params``.

    Raises:
      TypeError: a complex parameter or anchor, a mask that is not bools.
      ValueError: ``alpha`` is not finite or has another shape; trees or shapes that do not match;
        a mask that selects nothing.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax_spd
      >>> optax_spd.wise_ft({"bias": jnp.ones(2)}, {"bias": jnp.zeros(2)}, alpha=0.25)
      {'bias': Array([0.25, 0.25], dtype=float32)}

    References:
      Wortsman et al., `Robust fine-tuning of zero-shot models
      <https://arxiv.org/abs/2109.01903>`_, CVPR 2022.

    .. seealso:: :func:`optax_spd.lines_alpha`, an α that grows with depth
    """
    check_layers(layers)
    model = trees.flatten(params)
    flat = trees.only_parameters(model)
    selected = masks.resolve_mask(mask, flat)
    plan = plans.plan_layers(flat, layers, selected)
    checks.check_finite("alpha", alpha)
    if selected is not None and np.ndim(alpha) == 1:
        alpha = _under_mask(jnp.asarray(alpha), plans.plan_layers(flat, layers).names, plan.names)
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


def _under_mask(alpha: jax.Array, every: tuple[str, ...], masked: tuple[str, ...]) -> jax.Array:
    """One α for each layer under the mask, from those or from one for each layer of the tree.

    Args:
      alpha: the argument.
      every: the names of all layers.
      masked: the names of the layers under the mask.

    Raises:
      ValueError: another number; or both have as many layers, in another order.
    """
    if len(alpha) not in (len(every), len(masked)):
        raise ValueError(
            f"alpha must be a scalar or hold one value for each of the {len(every)} layers of "
            f"params, or for each of the {len(masked)} under the mask (see layer_names), got shape "
            f"{alpha.shape}."
        )
    if len(alpha) != len(every) or every == masked:
        return alpha
    if len(every) == len(masked):
        raise ValueError(
            f"alpha has {len(alpha)} values, and the layers have another order under the mask "
            f"({', '.join(map(repr, masked))}) than in the whole tree "
            f"({', '.join(map(repr, every))}), since the mask leaves out a part of a group. Put "
            "whole groups under the mask, or give the left-out arrays a group of their own."
        )
    numbers = {name: number for number, name in enumerate(every)}
    return alpha[np.array([numbers[name] for name in masked], np.int32)]


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
