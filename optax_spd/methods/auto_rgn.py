"""Auto-RGN: scales each layer's learning rate by its relative gradient norm.

Lee, Chen, Tajwar, Kumar, Yao, Liang, Finn: "Surgical Fine-Tuning Improves Adaptation to
Distribution Shifts", ICLR 2023, https://arxiv.org/abs/2210.11466; the authors' code:
anniesch/surgical-finetuning. For layer i with parameters θᵢ, raw gradient gᵢ and incoming update
uᵢ, averaged over the steps of a window:

    rᵢ = mean ‖gᵢ‖ / ‖θᵢ‖
    sᵢ = rᵢ / maxⱼ rⱼ
    u'ᵢ = sᵢ uᵢ

Differences from the authors' code:

1. It scales updates and does not set learning rates. Behind ``optax.adam`` or ``optax.sgd`` the
   effect is the same, and Adam keeps its moments; theirs builds a new Adam at each epoch.
2. The window is ``every`` training steps. Theirs is the first five batches of an epoch, in a pass
   of its own at parameters that do not change. So here s = 1 until the update that
   closes the first window, which is the first that is scaled.
3. A layer with ‖θ‖ = 0 in all of the window keeps its s (1 at first) and is left out of the
   maximum. Their code divides by zero.
4. A step in which ‖g‖ or ‖θ‖ is not finite is left out of its layer's mean. (A norm below about
   1e-19 in float32 counts as 0.) If all gradients are
   zero, s is kept.
5. A layer may be a slice of an array or several arrays (``layers=``). All arrays under ``mask=``
   are measured, and all others keep their update. Their code neither measures nor trains arrays
   with "bn" in their name.
6. Auto-SNR, the other criterion in their code, is not here.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_spd import wrappers
from optax_spd.core import balls, scaling, stage
from optax_spd.layers import checks, fingerprints
from optax_spd.layers.spec import LayerFn
from optax_spd.layers.types import AxisName, Mask, PyTree


class AutoRGNState(NamedTuple):
    """State of :func:`auto_rgn`.

    Attributes:
      count: number of updates so far, int32; what a scheduled ``every`` is evaluated at.
      layer_fingerprint: identifies the layers of the vectors (:func:`optax_spd.check_state`).
      window: number of updates in the current window, int32.
      auto_rgn_total: the sum of ‖g‖ / ‖θ‖ over the current window, one entry per layer in
        ``layer_names`` order.
      auto_rgn_steps: how many updates that sum is over, per layer, int32.
      auto_rgn_ratio: r, the mean over the last window; 0 for a layer that was not measured in it.
      auto_rgn_scale: s, what the last update was multiplied by, per layer; 1 until the update that
        closes the first window, which is the first that is scaled.
    """

    count: jax.Array  # type: ignore[assignment]  # shadows tuple.count, as in Optax
    layer_fingerprint: jax.Array
    window: jax.Array
    auto_rgn_total: jax.Array
    auto_rgn_steps: jax.Array
    auto_rgn_ratio: jax.Array
    auto_rgn_scale: jax.Array


def relative_norm(
    gradient_norm: jax.Array, parameter_norm: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """‖g‖ / ‖θ‖, elementwise for a vector of layers.

    Args:
      gradient_norm: ‖g‖.
      parameter_norm: ‖θ‖.

    Returns:
      The ratio, and where it is defined: both norms finite and ‖θ‖ > 0. Elsewhere it is 0.
    """
    is_defined = jnp.isfinite(gradient_norm) & jnp.isfinite(parameter_norm) & (parameter_norm > 0)
    ratio = jnp.where(is_defined, gradient_norm, 0) / jnp.where(is_defined, parameter_norm, 1)
    is_defined &= jnp.isfinite(ratio)
    return jnp.where(is_defined, ratio, 0), is_defined


def multipliers(ratio: jax.Array, measured: jax.Array, last: jax.Array) -> jax.Array:
    """S = r / max r, for a vector of layers.

    Args:
      ratio: r.
      measured: which layers have one.
      last: the multipliers until now.

    Returns:
      From 0 to 1 for the measured layers. The others keep their last one, and so do all if no r is
      above 0.
    """
    largest = jnp.max(jnp.where(measured, ratio, 0))
    scale = ratio / jnp.where(largest > 0, largest, 1)
    return jnp.where(measured & (largest > 0), scale, last)


def auto_rgn(
    *,
    every: int | checks.Schedule = 100,
    layers: LayerFn | None = None,
    mask: Mask = None,
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Auto-RGN; place it directly *behind* the optimizer whose layers it scales.

    In front of Adam it would do nothing, since Adam divides every scale out again. Place it before
    :func:`optax_spd.spd`, ``tpgm`` and ``ftp``. Each layer's update is multiplied by its relative
    gradient norm over the largest one:

    .. math::

        u_i' = \frac{r_i}{\max_j r_j}\, u_i, \qquad
        r_i = \mathrm{mean}\, \frac{\|g_i\|}{\|\theta_i\|}

    where the mean is over a window of ``every`` updates. The multipliers are 1 until the first
    window closes. The update that closes a window is the first that is scaled by it.

    The largest ratio decides about all layers. A layer that starts at zero, such as the bias of a
    new head or LoRA's second factor, is tiny after one step and has a huge ratio, so that all
    others nearly stop: leave such layers out with ``mask``.

    Args:
      every: the number of updates in a window, at least 1; or a schedule of it, evaluated at each
        update.
      layers: what a layer is, see :func:`optax_spd.stacked`; None for one per array, with weight
        and bias apart, as in the authors' code.
      mask: as for :func:`optax_spd.spd`: True for the layers that are measured and scaled. The
        others keep their update.
      axis_name: as for :func:`optax_spd.spd`.

    Returns:
      A stage whose ``update`` needs ``params`` and the extra argument ``grad`` (the raw gradient;
      ``optax_spd.chain`` supplies it). Updates keep their structure and dtypes; norms are computed
      in at least float32. A layer with :math:`\|\theta\| = 0`, or without a finite gradient, in all
      of a window keeps its multiplier and is left out of the maximum. The state holds
      ``auto_rgn_scale``, the multipliers, and ``auto_rgn_ratio``, r of the last window: shape
      (layers,), in the order of :func:`optax_spd.layer_names`. Integer, empty, None and MaskedNode
      leaves pass through. Inside ``optax.partition`` or ``optax.masked`` the maximum is that of its
      part of the tree. Under ``optax.inject_hyperparams`` name in ``static_args`` those of
      ``layers`` and ``mask`` that are functions.

    Raises:
      TypeError: ``every`` is not an integer, a complex parameter, a mask that is not bools.
      ValueError: ``every`` less than 1 (at construction); no params, no gradient, trees or shapes
        that do not match (in ``update``).

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import optax_spd
      >>> params = {"a": jnp.array([3.0, 4.0]), "b": jnp.array([1.0, 0.0])}
      >>> tx = optax_spd.chain(optax.sgd(1.0), optax_spd.auto_rgn(every=1))
      >>> grads = {"a": jnp.array([0.0, 1.0]), "b": jnp.array([0.0, 1.0])}
      >>> updates, state = tx.update(grads, tx.init(params), params)
      >>> print(optax.tree.get(state, "auto_rgn_scale"))  # 1/5 and 1/1, over the largest
      [0.2 1. ]
      >>> print(updates["a"])
      [-0.  -0.2]

    References:
      Lee et al., `Surgical Fine-Tuning Improves Adaptation to Distribution Shifts
      <https://arxiv.org/abs/2210.11466>`_, ICLR 2023.

    .. seealso:: :func:`optax_spd.temp_balance`, :func:`optax_spd.layerwise_lr_decay`
    """
    if not callable(every):
        checks.check_count("every", every)
    options = stage.StageOptions("zero", None, layers, mask, axis_name)

    def init(params: PyTree) -> AutoRGNState:
        plan, _ = options.init(params)
        size = plan.vector_size
        return AutoRGNState(
            count=jnp.zeros((), jnp.int32),
            layer_fingerprint=fingerprints.of_plan(plan),
            window=jnp.zeros((), jnp.int32),
            auto_rgn_total=jnp.zeros(size, plan.dtype),
            auto_rgn_steps=jnp.zeros(size, jnp.int32),
            auto_rgn_ratio=jnp.zeros(size, plan.dtype),
            auto_rgn_scale=jnp.ones(size, plan.dtype),
        )

    def update(
        updates: PyTree, state: AutoRGNState, params: PyTree = None, **extra_args: Any
    ) -> tuple[PyTree, AutoRGNState]:
        vectors = {"auto_rgn_scale": state.auto_rgn_scale}
        view = options.view(updates, optax.EmptyState(), params, extra_args, vectors)
        gradients = view.match(wrappers.require_gradient(extra_args, "auto_rgn"), "grad")
        weights = view.map(lambda d: d.delta)  # with a zero anchor Δ = θ
        norms = balls.ball_norms("l2", view.plan, view.axes, gradients, weights)
        ratio, is_defined = relative_norm(*(norm.largest for norm in norms))
        total = state.auto_rgn_total + ratio
        steps = state.auto_rgn_steps + is_defined.astype(jnp.int32)

        interval = every(state.count) if callable(every) else every
        window = state.window + 1
        closes = window >= interval
        mean = total / jnp.maximum(steps, 1).astype(total.dtype)
        scale = multipliers(mean, steps > 0, state.auto_rgn_scale)
        new_state = AutoRGNState(
            count=optax.safe_increment(state.count),
            layer_fingerprint=state.layer_fingerprint,
            window=jnp.where(closes, 0, window),
            auto_rgn_total=jnp.where(closes, 0, total),
            auto_rgn_steps=jnp.where(closes, 0, steps),
            auto_rgn_ratio=jnp.where(closes, mean, state.auto_rgn_ratio),
            auto_rgn_scale=jnp.where(closes, scale, state.auto_rgn_scale),
        )
        scaled = scaling.scaled(updates, view.flat, view.plan, new_state.auto_rgn_scale)
        return scaled, new_state

    return optax.GradientTransformationExtraArgs(init, update)
