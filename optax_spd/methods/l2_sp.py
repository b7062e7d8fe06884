"""L2-SP: weight decay toward the pretrained weights, the same for every layer.

Li, Grandvalet, Davoine: "Explicit Inductive Bias for Transfer Learning with Convolutional
Networks", ICML 2018, https://arxiv.org/abs/1802.01483. The penalty on pretrained parameters is
λ/2 ‖θ - θ₀‖², so its gradient is

    λ Δ = λ (θ - θ₀)

Difference from the paper: it also has a plain L2 penalty on the new layers. Here that is a second
stage, ``optax.add_decayed_weights`` or ``anchor="zero"``, under the complementary mask.

Chen et al.: "Cautious Weight Decay", ICLR 2026, https://arxiv.org/abs/2510.12402, decays an entry
only where the optimizer does not push it away from zero. With u the direction that is subtracted
(before the learning rate flips its sign), elementwise:

    u' = u + λ θ [u θ >= 0]

Differences from the paper:

1. Here the decay may be toward any anchor: u' = u + λ Δ [u Δ >= 0]. ``anchor="zero"`` is the
   paper's.
2. Signs are compared, not the product with zero, which underflows to 0 for small numbers and would
   then decay.
3. An entry where u or Δ is NaN is not decayed.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_spd.anchors import policy
from optax_spd.core import stage, sums
from optax_spd.layers import checks
from optax_spd.layers.types import Anchor, DType, Mask, PyTree


@policy.holds_anchor
class L2SPState(NamedTuple):
    """State of :func:`l2_sp`.

    Attributes:
      count: number of updates so far, int32; what a scheduled λ is evaluated at.
      anchor: θ₀, a tree like params, or ``optax.EmptyState()`` if none is held.
    """

    count: jax.Array  # type: ignore[assignment]  # shadows tuple.count, as in Optax
    anchor: PyTree


def l2_sp(
    weight_decay: checks.ScalarOrSchedule,
    *,
    anchor: Anchor = "initial",
    anchor_dtype: DType = None,
    mask: Mask = None,
    cautious: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Adds :math:`\lambda(\theta - \theta_0)` to the update: weight decay toward the anchor.

    Place it where ``optax.add_decayed_weights``, which adds :math:`\lambda\theta`, would stand.
    First in the chain, before ``scale_by_adam``, it is the paper's penalty
    :math:`\frac{\lambda}{2}\|\theta - \theta_0\|^2`. Between ``scale_by_adam`` and the learning
    rate it is decoupled and multiplied by the learning rate, as in AdamW
    (:func:`optax_spd.adamw_l2_sp`). After the learning rate its sign would be wrong.

    With ``cautious=True`` it adds, entry by entry,

    .. math::

        \lambda (\theta - \theta_0)\, [u\, (\theta - \theta_0) \ge 0]

    where u is the incoming update: the decay is left out where the step goes away from the anchor.
    In the paper (Cautious Weight Decay) u is the direction of the optimizer, so place it behind
    ``scale_by_adam`` or ``trace``, and ``anchor="zero"``.

    Args:
      weight_decay: λ >= 0, or a schedule of it.
      anchor: θ₀, as for :func:`optax_spd.spd`.
      anchor_dtype: dtype to store the anchor in; None for its own.
      mask: as for :func:`optax_spd.spd`: True where the decay applies.
      cautious: whether to decay only the entries with :math:`u\,(\theta - \theta_0) \ge 0`.

    Returns:
      A stage whose ``update`` needs ``params``. Updates keep their structure and dtypes. Under
      ``optax.inject_hyperparams`` name in ``static_args`` those of ``mask``, ``anchor`` and
      ``anchor_dtype`` that can be called: functions, Equinox models, dtypes as classes.

    Raises:
      TypeError: a complex parameter (in ``init``), a mask that is not bools, ``cautious`` not a
        bool.
      ValueError: ``weight_decay`` negative or not finite, an unknown anchor (at construction); no
        params, no anchor, trees or shapes that do not match (in ``update``).

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import optax_spd
      >>> tx = optax.chain(optax_spd.l2_sp(0.5), optax.sgd(1.0))
      >>> state = tx.init({"bias": jnp.array([1.0])})
      >>> updates, state = tx.update({"bias": jnp.zeros(1)}, state, {"bias": jnp.array([3.0])})
      >>> updates
      {'bias': Array([-1.], dtype=float32)}

      Cautious, it pulls only the entry that the gradient does not push outward:

      >>> tx = optax.chain(optax_spd.l2_sp(0.5, anchor="zero", cautious=True), optax.sgd(1.0))
      >>> params = {"bias": jnp.array([2.0, 2.0])}
      >>> tx.update({"bias": jnp.array([1.0, -1.0])}, tx.init(params), params)[0]
      {'bias': Array([-2.,  1.], dtype=float32)}

    References:
      Li et al., `Explicit Inductive Bias for Transfer Learning with Convolutional Networks
      <https://arxiv.org/abs/1802.01483>`_, ICML 2018; Chen et al., `Cautious Weight Decay
      <https://arxiv.org/abs/2510.12402>`_, ICLR 2026.

    .. seealso:: :func:`optax_spd.spd`, the selective form
    """
    checks.check_scalar("weight_decay", weight_decay)
    checks.check_flag("cautious", cautious)
    options = stage.StageOptions(anchor, anchor_dtype, mask=mask)

    def init(params: PyTree) -> L2SPState:
        _, held = options.init(params)
        return L2SPState(count=jnp.zeros((), jnp.int32), anchor=held)

    def update(
        updates: PyTree, state: L2SPState, params: PyTree = None, **extra_args: Any
    ) -> tuple[PyTree, L2SPState]:
        view = options.view(updates, state.anchor, params, extra_args)
        decay = checks.value_at(weight_decay, state.count, view.plan.dtype)
        steps = view.map(functools.partial(_with_decay, decay, bool(cautious)))
        count = optax.safe_increment(state.count)
        return view.rebuild(steps), L2SPState(count, state.anchor)

    return optax.GradientTransformationExtraArgs(init, update)


@functools.partial(jax.jit, static_argnums=1)  # so that arrays of one shape share a trace
def _with_decay(decay: jax.Array, cautious: bool, d: stage.Deviation) -> jax.Array:
    """U + λ Δ; u where λ = 0, also if Δ is not finite, and where a cautious decay is left out."""
    delta = sums.sharded_like(d.delta, d.step)
    pull = sums.times(decay.astype(d.step.dtype), delta)
    if cautious:
        pull = jnp.where(jnp.sign(d.step) * jnp.sign(delta) >= 0, pull, 0)
    return d.step + pull
