"""Selective Projection Decay (SPD): weight decay only for layers that move away from the anchor.

Tian, Huang, Kira: "Rethinking Weight Decay for Robust Fine-Tuning of Foundation Models",
NeurIPS 2024, https://arxiv.org/abs/2411.01713, Algorithm 2; the authors' code: GT-RIPL/Selective-
Projection-Decay. In the paper's symbols, for each layer with parameters θ, anchor θ₀, raw gradient
g and the inner optimizer's step u:

    Δ = θ - θ₀                     the deviation now
    Δ̃ = Δ + u                      where the inner optimizer would take it
    c = -⟨g, Δ⟩                     < 0: the descent direction -g points back to the anchor
    r = clip((‖Δ̃‖ - ‖Δ‖) / ‖Δ̃‖, 0, 1)  if c < 0, else 0
    u' = u - λ r Δ̃

Differences from the authors' code:

1. It is a stage behind any optimizer, not an Adam of its own. Behind ``optax.adam`` the numbers are
   the same.
2. ‖Δ̃‖ - ‖Δ‖ is computed as ⟨u, Δ + Δ̃⟩ / (‖Δ̃‖ + ‖Δ‖). The value is the same, without the
   cancellation that in float32 loses all its digits when steps are small.
3. A layer whose c or r is not finite keeps the inner optimizer's update (in the original NaN
   spreads over the layer), and so does a layer with Δ̃ = 0. Norms come from their squares, so in
   float32 a layer also keeps u where ‖Δ̃‖ is below about 1e-19 or above about 1e19.
4. Sums have at least float32 whatever the parameters' dtype.
5. A layer may be a slice of an array or several arrays (``layers=``).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_spd.core.decisions import Decision
from optax_spd.core.layerwise import layerwise
from optax_spd.core.stage import Deviation
from optax_spd.core.sums import norm_of
from optax_spd.layers import checks
from optax_spd.layers.spec import LayerFn
from optax_spd.layers.types import Anchor, AxisName, DType, Mask, PyTree


class SPDState(NamedTuple):
    """State of :func:`spd`.

    Attributes:
      count: number of updates so far, int32; what a scheduled λ is evaluated at.
      anchor: θ₀, a tree like params, or ``optax.EmptyState()`` if none is held.
      layer_fingerprint: identifies the layers of the vectors (:func:`optax_spd.check_state`).
      spd_ratio: r of the last update, one entry per layer in ``layer_names`` order.
      spd_fired: in how many updates so far the layer was pulled back (r > 0), per layer, int32.
    """

    count: jax.Array  # type: ignore[assignment]  # shadows tuple.count, as in Optax
    anchor: PyTree
    layer_fingerprint: jax.Array
    spd_ratio: jax.Array
    spd_fired: jax.Array


def decay_ratio(alignment: jax.Array, growth: jax.Array, old_square: jax.Array) -> jax.Array:
    """The ratio r of Algorithm 2, for one layer or elementwise for a vector of layers.

    Args:
      alignment: ⟨g, Δ⟩ = -c.
      growth: ⟨u, Δ + Δ̃⟩ = ‖Δ̃‖² - ‖Δ‖².
      old_square: ‖Δ‖².

    Returns:
      r in [0, 1]; 0 where c >= 0 and where ‖Δ̃‖ = 0. The driver handles sums that are not finite.
    """
    # ‖Δ̃‖² need not be measured: r > 0 only if growth > 0, and then this sum has no cancellation.
    new_square = old_square + growth
    moved = new_square > 0
    new_norm, old_norm = norm_of(new_square), norm_of(old_square)
    ratio = growth / jnp.where(moved, new_norm * (new_norm + old_norm), 1)
    return jnp.where((alignment > 0) & moved, jnp.clip(ratio, 0, 1), 0)


def measure(d: Deviation, gradient: jax.Array) -> tuple[jax.Array, ...]:
    """What is summed over a layer: ⟨g, Δ⟩, ⟨u, Δ + Δ̃⟩, ‖Δ‖²."""
    # 2Δ + u instead of Δ + Δ̃: XLA:CPU would materialise a Δ̃ used both here and in the update.
    return gradient * d.delta, d.step * (2 * d.delta + d.step), d.delta**2


def decide(
    alignment: jax.Array,
    growth: jax.Array,
    old_square: jax.Array,
    fired: jax.Array,
    *,
    weight_decay: jax.Array,
) -> Decision:
    """Per layer r, and λ r for :func:`act`."""
    ratio = decay_ratio(alignment, growth, old_square)
    fires = ratio > 0
    return Decision(
        record={"spd_ratio": ratio},
        coefficients=(weight_decay * ratio,),
        changes=fires,
        memory={"spd_fired": jnp.where(fires, optax.safe_increment(fired), fired)},
    )


def act(d: Deviation, decay: jax.Array) -> jax.Array:
    """The update u - λ r Δ̃."""
    return d.step - decay * d.tentative


def spd(
    weight_decay: checks.ScalarOrSchedule = 1.0,
    *,
    anchor: Anchor = "initial",
    anchor_dtype: DType = None,
    layers: LayerFn | None = None,
    mask: Mask = None,
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Selective Projection Decay; its λ is *not* multiplied by the learning rate.

    So a ``weight_decay`` of 1e-4, copied from AdamW, does nothing here. λ = 1, the default,
    projects a layer back to the distance from the anchor that it had before the step; λ = 0 is off,
    and λ > 1 pulls further. Only layers with :math:`c = -\langle g, \Delta\rangle < 0` change:

    .. math::

        r = \mathrm{clip}\left(\frac{\|\tilde\Delta\| - \|\Delta\|}{\|\tilde\Delta\|}, 0, 1\right),
        \qquad u' = u - \lambda\, r\, \tilde\Delta

    Here :math:`\Delta = \theta - \theta_0` is how far the layer is from its anchor,
    :math:`\tilde\Delta = \Delta + u` how far the incoming update u would take it, and g the raw
    gradient: c < 0 says that going down the gradient leads back to the anchor. Only the sign of c
    matters. Place it last in the chain, after the learning rate, since it acts on the step that
    would be taken.

    Args:
      weight_decay: λ >= 0, or a schedule of it.
      anchor: θ₀: "initial" (a copy of the params given to ``init``), a tree like params (copied in
        ``init``; in a jitted ``init`` it becomes a constant of the program, so use "initial" there
        and ``set_anchor`` afterwards), "zero" (for LoRA and other added parameters; holds
        nothing), or "argument" (the extra argument ``anchor=`` of every ``update``, see
        :func:`optax_spd.with_anchor`; holds nothing).
      anchor_dtype: dtype to store the anchor in; None for its own.
      layers: what a layer is, see :func:`optax_spd.stacked` and :func:`optax_spd.by_module`; None
        for one per array.
      mask: a tree of bools like params or a prefix of it, or a function of params that returns one
        (:func:`optax_spd.path_mask`): True where SPD applies. Elsewhere no anchor is stored. Mask
        out what is not pretrained, such as a new head.
      axis_name: only under ``shard_map`` or ``pmap`` with parameters split by hand: the axis or
        axes that every array is split over, or the arrays' PartitionSpecs. Leave it None under
        ``jit`` whatever the sharding.

    Returns:
      A stage whose ``update`` needs ``params`` and the extra argument ``grad`` (the raw gradient;
      ``optax_spd.chain`` supplies it). Updates keep their structure and dtypes. The state holds
      ``spd_ratio``, the last r per layer: shape (layers,), the widest parameter dtype and at least
      float32, in the order of :func:`optax_spd.layer_names`; and ``spd_fired``, how many updates
      so far pulled the layer back. Integer, empty, None and MaskedNode leaves pass through. Under
      ``optax.inject_hyperparams`` name in ``static_args`` those of ``layers``, ``mask``, ``anchor``
      and ``anchor_dtype`` that can be called: functions, Equinox models, dtypes as classes.

    Raises:
      TypeError: a complex parameter (in ``init``), a mask that is not bools, a wrong argument type.
      ValueError: ``weight_decay`` negative or not finite, an unknown anchor (at construction); no
        params, no gradient, no anchor, trees or shapes that do not match (in ``update``).

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import optax_spd
      >>> params = {"kernel": jnp.array([3.0, 4.0])}
      >>> tx = optax_spd.chain(optax.adam(0.1), optax_spd.spd(1.0, anchor="zero"))
      >>> state = tx.init(params)
      >>> grads = {"kernel": jnp.array([2.0, -1.0])}  # ⟨g, Δ⟩ > 0, and Adam's step makes Δ grow
      >>> updates, state = tx.update(grads, state, params)
      >>> norm = jnp.linalg.norm(optax.apply_updates(params, updates)["kernel"])
      >>> print(f"{norm:.4f}")  # not 5.0220, where Adam alone would go
      5.0000

    References:
      Tian et al., `Rethinking Weight Decay for Robust Fine-Tuning of Foundation Models
      <https://arxiv.org/abs/2411.01713>`_, NeurIPS 2024.

    .. seealso:: :func:`optax_spd.adam_spd`, :func:`optax_spd.l2_sp`
    """
    checks.check_scalar("weight_decay", weight_decay)
    return layerwise(
        "spd",
        measure=measure,
        decide=decide,
        act=act,
        sums=3,
        state=SPDState,
        memory={"spd_fired": 0},
        hyperparameters={"weight_decay": weight_decay},
        anchor=anchor,
        anchor_dtype=anchor_dtype,
        layers=layers,
        mask=mask,
        axis_name=axis_name,
    )
