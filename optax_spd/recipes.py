"""Complete optimizers, ready for any training loop. Optax's own argument order."""

import functools
from typing import Any

import jax
import optax

from optax_spd import checks, in_turn, layers as layers_lib, stages, wrappers
from optax_spd.l2_sp import l2_sp
from optax_spd.spd import stage_of


def adam_spd(
    learning_rate: optax.ScalarOrSchedule,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    eps_root: jax.typing.ArrayLike = 0.0,
    mu_dtype: Any = None,
    *,
    weight_decay: checks.ScalarOrSchedule = 1.0,
    anchor: Any = "initial",
    anchor_dtype: Any = None,
    layers: layers_lib.LayerFn | None = None,
    mask: Any = None,
    axis_name: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Adam with Selective Projection Decay; ``weight_decay`` is *not* multiplied by the rate.

    The optimizer of the paper's experiments (their AdamSPD):
    ``chain(optax.adam(...), spd(...))``. See :func:`optax_spd.spd` for the update.

    Args:
      learning_rate: a float or a schedule.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the denominator outside of the square root.
      eps_root: added inside.
      mu_dtype: dtype of the first moment; None for the parameters'.
      weight_decay: SPD's λ; a float or a schedule. 1 keeps the distance, 0 is plain Adam.
      anchor: see :func:`optax_spd.spd`, as all that follow.
      anchor_dtype: dtype to store the anchor in.
      layers: what a layer is.
      mask: True where SPD applies; Adam applies everywhere.
      axis_name: for hand-split parameters under ``shard_map`` or ``pmap``.

    Returns:
      A transformation with a plain three-argument ``update``. State: Adam's 8 bytes a parameter
      and the anchor's 4 (in float32; 0 with ``anchor="zero"`` or "argument").
      Under ``optax.inject_hyperparams`` name callables and trees in ``static_args``:
      ``("anchor", "anchor_dtype", "layers", "mask", "axis_name", "mu_dtype")``.

    Raises:
      TypeError, ValueError: as :func:`optax_spd.spd`.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax_spd
      >>> tx = optax_spd.adam_spd(1e-3)
      >>> params = {"kernel": jnp.ones((2, 2))}
      >>> state = tx.init(params)
      >>> updates, state = tx.update({"kernel": jnp.ones((2, 2))}, state, params)

    References:
      Tian et al., `Rethinking Weight Decay for Robust Fine-Tuning of Foundation Models
      <https://arxiv.org/abs/2411.01713>`_, NeurIPS 2024.
    """
    adam = optax.adam(learning_rate, b1, b2, eps, eps_root, mu_dtype)
    options = stages.StageOptions(anchor, anchor_dtype, layers, mask, axis_name)
    return in_turn.chain([adam], functools.partial(stage_of, weight_decay), options)


def adamw_l2_sp(
    learning_rate: optax.ScalarOrSchedule,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    eps_root: jax.typing.ArrayLike = 0.0,
    mu_dtype: Any = None,
    *,
    weight_decay: checks.ScalarOrSchedule = 1e-4,
    anchor: Any = "initial",
    anchor_dtype: Any = None,
    mask: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""AdamW whose decoupled weight decay pulls toward the anchor in place of zero.

    .. math::

        u = -\eta\left(\frac{\hat m}{\sqrt{\hat v} + \epsilon} + \lambda (\theta-\theta_0)\right)

    With ``anchor="zero"`` it is ``optax.adamw``.

    Args:
      learning_rate: η, a float or a schedule.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the denominator outside of the square root.
      eps_root: added inside.
      mu_dtype: dtype of the first moment; None for the parameters'.
      weight_decay: λ, a float or a schedule; multiplied by the learning rate, as in AdamW.
      anchor: see :func:`optax_spd.spd`.
      anchor_dtype: dtype to store the anchor in.
      mask: True where the decay applies; Adam applies everywhere.

    Returns:
      A transformation with a plain three-argument ``update``.

    Raises:
      TypeError, ValueError: as :func:`optax_spd.l2_sp`.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax_spd
      >>> tx = optax_spd.adamw_l2_sp(1e-3, weight_decay=0.1)
      >>> params = {"kernel": jnp.ones((2, 2))}
      >>> state = tx.init(params)
      >>> updates, state = tx.update({"kernel": jnp.ones((2, 2))}, state, params)

    References:
      Li et al., `Explicit Inductive Bias for Transfer Learning with Convolutional Networks
      <https://arxiv.org/abs/1802.01483>`_, ICML 2018; Loshchilov & Hutter, `Decoupled Weight Decay
      Regularization <https://arxiv.org/abs/1711.05101>`_, ICLR 2019.
    """
    return wrappers.chain(
        optax.scale_by_adam(b1, b2, eps, eps_root, mu_dtype),
        l2_sp(weight_decay, anchor=anchor, anchor_dtype=anchor_dtype, mask=mask),
        optax.scale_by_learning_rate(learning_rate),
    )
