"""Complete optimizers, with Optax's own argument order.

    adam_spd          u = Adam(g),                            then SPD: the paper's AdamSPD
    adamw_l2_sp       u = AdamW(g), decay toward the anchor
    adam_tpgm         u = Adam(g),                            then TPGM's projection
    adam_ftp          u = AdamW(g),                           then FTP's: the authors' AdamP
    sgd_ftp           u = SGD(g + λ θ, momentum),             then FTP's: the authors' SGDP
    adamp             u = AdamW(g) without radial parts:      AdamP of Heo et al.
    sgdp              u = SGD(g) without radial parts:        SGDP of Heo et al.
    sgd_fednar        u = SGD(clip(g + λ (θ - θ₀))):          FedNAR's local step
    sgd_freeze_embed  u = SGD(g), embeddings frozen

The equations and the papers are in :mod:`optax_spd.methods`. Differences from the authors'
optimizers: there is no amsgrad, and dampening in ``sgdp`` only, since Optax's Adam and SGD do not
have them; learning rate, weight decay and k may be schedules.
"""

from typing import Any

import jax
import optax

from optax_spd import wrappers
from optax_spd.core import recompute
from optax_spd.layers import checks
from optax_spd.layers.embeddings import DEFAULT_EMBEDDING_PATTERNS
from optax_spd.layers.spec import LayerFn
from optax_spd.layers.types import Anchor, AxisName, DType, Mask, Norm
from optax_spd.methods.adamp.directions import dampened_trace, scale_by_nesterov_adam
from optax_spd.methods.adamp.stage import remove_radial
from optax_spd.methods.fednar import clip_by_whole_norm
from optax_spd.methods.freezing import Frozen, with_frozen
from optax_spd.methods.ftp import ftp
from optax_spd.methods.l2_sp import l2_sp
from optax_spd.methods.spd import spd
from optax_spd.methods.tpgm import tpgm


def adam_spd(
    learning_rate: optax.ScalarOrSchedule,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    eps_root: jax.typing.ArrayLike = 0.0,
    mu_dtype: DType = None,
    *,
    weight_decay: checks.ScalarOrSchedule = 1.0,
    anchor: Anchor = "initial",
    anchor_dtype: DType = None,
    layers: LayerFn | None = None,
    mask: Mask = None,
    axis_name: AxisName = None,
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
      anchor: as for :func:`optax_spd.spd`.
      anchor_dtype: dtype to store the anchor in; None for its own.
      layers: what a layer is, as for :func:`optax_spd.spd`.
      mask: True where SPD applies; Adam applies everywhere.
      axis_name: for hand-split parameters under ``shard_map`` or ``pmap``.

    Returns:
      A transformation with a plain three-argument ``update``. The state takes 8 bytes a parameter
      for Adam and 4 for the anchor (in float32; 0 with ``anchor="zero"`` or "argument").
      Under ``optax.inject_hyperparams`` name in ``static_args`` those of ``layers``, ``mask``,
      ``anchor``, ``anchor_dtype`` and ``mu_dtype`` that can be called: functions, Equinox models,
      dtypes as classes.

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
    stage = spd(
        weight_decay,
        anchor=anchor,
        anchor_dtype=anchor_dtype,
        layers=layers,
        mask=mask,
        axis_name=axis_name,
    )
    return wrappers.chain(adam, stage)


def adamw_l2_sp(
    learning_rate: optax.ScalarOrSchedule,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    eps_root: jax.typing.ArrayLike = 0.0,
    mu_dtype: DType = None,
    *,
    weight_decay: checks.ScalarOrSchedule = 1e-4,
    anchor: Anchor = "initial",
    anchor_dtype: DType = None,
    mask: Mask = None,
    cautious: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""AdamW whose decoupled weight decay pulls toward the anchor instead of zero.

    .. math::

        u = -\eta\left(\frac{\hat m}{\sqrt{\hat v} + \epsilon} + \lambda (\theta-\theta_0)\right)

    With ``anchor="zero"`` it is ``optax.adamw``, and with ``cautious=True`` as well AdamW with
    Cautious Weight Decay.

    Args:
      learning_rate: η, a float or a schedule.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the denominator outside of the square root.
      eps_root: added inside.
      mu_dtype: dtype of the first moment; None for the parameters'.
      weight_decay: λ, a float or a schedule; multiplied by the learning rate, as in AdamW.
        The default is AdamW's, too weak to see here: start with 0.01 / (peak learning rate).
      anchor: see :func:`optax_spd.spd`.
      anchor_dtype: dtype to store the anchor in.
      mask: True where the decay applies; Adam applies everywhere.
      cautious: whether to decay only where Adam's direction does not go away from the anchor, see
        :func:`optax_spd.l2_sp`.

    Returns:
      A transformation with a plain three-argument ``update``. Under ``optax.inject_hyperparams``
      name in ``static_args`` those of ``mask``, ``anchor``, ``anchor_dtype`` and ``mu_dtype`` that
      can be called: functions, Equinox models, dtypes as classes.

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
      Regularization <https://arxiv.org/abs/1711.05101>`_, ICLR 2019; Chen et al., `Cautious Weight
      Decay <https://arxiv.org/abs/2510.12402>`_, ICLR 2026.
    """
    return wrappers.chain(
        optax.scale_by_adam(b1, b2, eps, eps_root, mu_dtype),
        l2_sp(weight_decay, anchor=anchor, anchor_dtype=anchor_dtype, mask=mask, cautious=cautious),
        optax.scale_by_learning_rate(learning_rate),
    )


def adam_tpgm(
    learning_rate: optax.ScalarOrSchedule,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    eps_root: jax.typing.ArrayLike = 0.0,
    mu_dtype: DType = None,
    *,
    radius_optimizer: optax.GradientTransformation | None = None,
    norm: Norm = "mars",
    every: int = 1,
    anchor: Anchor = "initial",
    anchor_dtype: DType = None,
    layers: LayerFn | None = None,
    mask: Mask = None,
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Adam, projected onto balls around the anchor with radii learned on validation data.

    ``chain(optax.adam(...), tpgm(...))``. See :func:`optax_spd.tpgm` for the update, and for the
    extra arguments ``validation_fn=`` and ``validation_batches=`` of ``update``.

    Args:
      learning_rate: a float or a schedule.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the denominator outside of the square root.
      eps_root: added inside.
      mu_dtype: dtype of the first moment; None for the parameters'.
      radius_optimizer: as in :func:`optax_spd.tpgm`.
      norm: as in :func:`optax_spd.tpgm`.
      every: as in :func:`optax_spd.tpgm`.
      anchor: as in :func:`optax_spd.tpgm`.
      anchor_dtype: as in :func:`optax_spd.tpgm`.
      layers: as in :func:`optax_spd.tpgm`.
      axis_name: as in :func:`optax_spd.tpgm`.
      mask: True where TPGM applies; Adam applies everywhere.

    Returns:
      A transformation whose ``update`` takes the validation objective as extra arguments. The state
      takes 8 bytes a parameter for Adam and 4 for the anchor (in float32).
      Under ``optax.inject_hyperparams`` name in ``static_args`` those of ``layers``, ``mask``,
      ``anchor``, ``anchor_dtype`` and ``mu_dtype`` that can be called: functions, Equinox models,
      dtypes as classes.

    Raises:
      TypeError, ValueError: as :func:`optax_spd.tpgm`.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax_spd
      >>> tx = optax_spd.adam_tpgm(1e-3, every=10)
      >>> params = {"kernel": jnp.ones((2, 2))}
      >>> state = tx.init(params)
      >>> updates, state = tx.update(
      ...     {"kernel": jnp.ones((2, 2))}, state, params,
      ...     validation_fn=lambda params, batch: jnp.mean((batch @ params["kernel"]) ** 2),
      ...     validation_batches=jnp.ones((1, 4, 2)))

    References:
      Tian et al., `Trainable Projected Gradient Method for Robust Fine-tuning
      <https://arxiv.org/abs/2303.10720>`_, CVPR 2023.
    """
    adam = optax.adam(learning_rate, b1, b2, eps, eps_root, mu_dtype)
    stage = tpgm(
        radius_optimizer,
        norm=norm,
        every=every,
        anchor=anchor,
        anchor_dtype=anchor_dtype,
        layers=layers,
        mask=mask,
        axis_name=axis_name,
    )
    return recompute.chain([adam], stage)


def adam_ftp(
    learning_rate: optax.ScalarOrSchedule,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    eps_root: jax.typing.ArrayLike = 0.0,
    mu_dtype: DType = None,
    *,
    k: checks.ScalarOrSchedule = 1.0,
    weight_decay: checks.ScalarOrSchedule = 0.0,
    norm: Norm = "mars",
    radius_learning_rate: checks.ScalarOrSchedule = 1e-2,
    state_dtype: DType = None,
    anchor: Anchor = "initial",
    anchor_dtype: DType = None,
    layers: LayerFn | None = None,
    mask: Mask = None,
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Adam with Fast Trainable Projection (the authors' AdamP).

    Adam with decoupled weight decay, then the projection of its step: see :func:`optax_spd.ftp`
    for the update.

    Args:
      learning_rate: a float or a schedule.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the denominator outside of the square root.
      eps_root: added inside.
      mu_dtype: dtype of the first moment; None for the parameters'.
      k: see :func:`optax_spd.ftp`; a float or a schedule.
      weight_decay: toward zero and multiplied by the learning rate, as in AdamW; a float or a
        schedule. It applies everywhere, whatever ``mask``.
      norm: as in :func:`optax_spd.ftp`.
      radius_learning_rate: as in :func:`optax_spd.ftp`.
      state_dtype: as in :func:`optax_spd.ftp`.
      anchor: as in :func:`optax_spd.ftp`.
      anchor_dtype: as in :func:`optax_spd.ftp`.
      layers: as in :func:`optax_spd.ftp`.
      axis_name: as in :func:`optax_spd.ftp`.
      mask: True where FTP applies; Adam applies everywhere.

    Returns:
      A transformation with a plain three-argument ``update``. The state takes 8 bytes a parameter
      for Adam, 4 for the anchor and 4 for the last deviation (in float32).
      Under ``optax.inject_hyperparams`` name in ``static_args`` those of ``layers``, ``mask``,
      ``anchor``, ``anchor_dtype``, ``state_dtype`` and ``mu_dtype`` that can be called: functions,
      Equinox models, dtypes as classes.

    Raises:
      TypeError, ValueError: as :func:`optax_spd.ftp`; ``weight_decay`` negative or not finite.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax_spd
      >>> tx = optax_spd.adam_ftp(1e-3)
      >>> params = {"kernel": jnp.ones((2, 2))}
      >>> state = tx.init(params)
      >>> updates, state = tx.update({"kernel": jnp.ones((2, 2))}, state, params)

    References:
      Tian et al., `Fast Trainable Projection for Robust Fine-Tuning
      <https://arxiv.org/abs/2310.19182>`_, NeurIPS 2023.
    """
    inner = [
        optax.scale_by_adam(b1, b2, eps, eps_root, mu_dtype),
        _decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    ]
    stage = ftp(
        k,
        norm=norm,
        radius_learning_rate=radius_learning_rate,
        state_dtype=state_dtype,
        anchor=anchor,
        anchor_dtype=anchor_dtype,
        layers=layers,
        mask=mask,
        axis_name=axis_name,
    )
    return recompute.chain(inner, stage)


def sgd_ftp(
    learning_rate: optax.ScalarOrSchedule,
    momentum: jax.typing.ArrayLike | None = None,
    nesterov: bool = False,
    *,
    k: checks.ScalarOrSchedule = 1.0,
    weight_decay: checks.ScalarOrSchedule = 0.0,
    norm: Norm = "mars",
    radius_learning_rate: checks.ScalarOrSchedule = 1e-2,
    state_dtype: DType = None,
    anchor: Anchor = "initial",
    anchor_dtype: DType = None,
    layers: LayerFn | None = None,
    mask: Mask = None,
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    r"""SGD with Fast Trainable Projection (the authors' SGDP).

    SGD on the gradient plus λθ, then the projection of its step: see :func:`optax_spd.ftp` for the
    update. The radii are learned from the gradient without λθ.

    Args:
      learning_rate: a float or a schedule.
      momentum: decay of the momentum; None for none.
      nesterov: whether to use Nesterov momentum.
      k: see :func:`optax_spd.ftp`; a float or a schedule.
      weight_decay: λ of an L2 penalty toward zero, added to the gradient; a float or a schedule.
        It applies everywhere, whatever ``mask``.
      norm: as in :func:`optax_spd.ftp`.
      radius_learning_rate: as in :func:`optax_spd.ftp`.
      state_dtype: as in :func:`optax_spd.ftp`.
      anchor: as in :func:`optax_spd.ftp`.
      anchor_dtype: as in :func:`optax_spd.ftp`.
      layers: as in :func:`optax_spd.ftp`.
      axis_name: as in :func:`optax_spd.ftp`.
      mask: True where FTP applies; SGD applies everywhere.

    Returns:
      A transformation with a plain three-argument ``update``. The state takes 4 bytes a parameter
      for the anchor, 4 for the last deviation, and 4 for momentum if used (in float32).
      Under ``optax.inject_hyperparams`` name in ``static_args`` those of ``layers``, ``mask``,
      ``anchor``, ``anchor_dtype`` and ``state_dtype`` that can be called: functions, Equinox
      models, dtypes as classes.

    Raises:
      TypeError, ValueError: as :func:`optax_spd.ftp`; ``weight_decay`` negative or not finite.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax_spd
      >>> tx = optax_spd.sgd_ftp(1e-2, momentum=0.9, nesterov=True)
      >>> params = {"kernel": jnp.ones((2, 2))}
      >>> state = tx.init(params)
      >>> updates, state = tx.update({"kernel": jnp.ones((2, 2))}, state, params)

    References:
      Tian et al., `Fast Trainable Projection for Robust Fine-Tuning
      <https://arxiv.org/abs/2310.19182>`_, NeurIPS 2023.
    """
    sgd = optax.sgd(learning_rate, momentum, nesterov)
    stage = ftp(
        k,
        norm=norm,
        radius_learning_rate=radius_learning_rate,
        state_dtype=state_dtype,
        anchor=anchor,
        anchor_dtype=anchor_dtype,
        layers=layers,
        mask=mask,
        axis_name=axis_name,
    )
    return wrappers.chain(_decayed_weights(weight_decay), sgd, stage)


def adamp(
    learning_rate: optax.ScalarOrSchedule,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    eps_root: jax.typing.ArrayLike = 0.0,
    mu_dtype: DType = None,
    *,
    weight_decay: checks.ScalarOrSchedule = 0.0,
    delta: checks.ScalarOrSchedule = 0.1,
    wd_ratio: checks.ScalarOrSchedule = 0.1,
    nesterov: bool = False,
    layers: LayerFn | None = None,
    mask: Mask = None,
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    r"""AdamP: AdamW without the updates' radial part on scale-invariant weights.

    ``chain(optax.scale_by_adam(...), remove_radial(...), optax.scale_by_learning_rate(...))``. See
    :func:`optax_spd.remove_radial` for the update. The authors of FTP call another optimizer AdamP:
    that is :func:`optax_spd.adam_ftp`.

    Args:
      learning_rate: a float or a schedule.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the denominator outside of the square root, and the smallest norm to divide by.
      eps_root: added inside.
      mu_dtype: dtype of the first moment; None for the parameters'.
      weight_decay: multiplied by the learning rate, as in AdamW; a float or a schedule.
      delta: as in :func:`optax_spd.remove_radial`.
      wd_ratio: as in :func:`optax_spd.remove_radial`.
      nesterov: whether to use the Nesterov momentum of the authors' code; it differs from
        ``optax.nadam``'s in a bias correction.
      layers: as in :func:`optax_spd.remove_radial`.
      mask: True where the projection and the decay apply; Adam applies everywhere.
      axis_name: as in :func:`optax_spd.remove_radial`.

    Returns:
      A transformation with a plain three-argument ``update``. The state takes 8 bytes a parameter
      (in float32), as Adam's.
      Under ``optax.inject_hyperparams`` name in ``static_args`` those of ``layers``, ``mask`` and
      ``mu_dtype`` that can be called: functions, dtypes as classes.

    Raises:
      TypeError, ValueError: as :func:`optax_spd.remove_radial`.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax_spd
      >>> tx = optax_spd.adamp(1e-3, weight_decay=1e-2)
      >>> params = {"kernel": jnp.ones((2, 2))}
      >>> state = tx.init(params)
      >>> updates, state = tx.update({"kernel": jnp.ones((2, 2))}, state, params)

    References:
      Heo et al., `AdamP: Slowing Down the Slowdown for Momentum Optimizers on Scale-invariant
      Weights <https://arxiv.org/abs/2006.08217>`_, ICLR 2021.
    """
    checks.check_flag("nesterov", nesterov)
    adam = scale_by_nesterov_adam if nesterov else optax.scale_by_adam
    stage = remove_radial(
        weight_decay,
        delta=delta,
        wd_ratio=wd_ratio,
        eps=eps,  # type: ignore[arg-type]  # an ArrayLike may be complex, too
        layers=layers,
        mask=mask,
        axis_name=axis_name,
    )
    return wrappers.chain(
        adam(b1, b2, eps, eps_root, mu_dtype), stage, optax.scale_by_learning_rate(learning_rate)
    )


def sgdp(
    learning_rate: optax.ScalarOrSchedule,
    momentum: jax.typing.ArrayLike | None = None,
    nesterov: bool = False,
    *,
    dampening: jax.typing.ArrayLike = 0.0,
    weight_decay: checks.ScalarOrSchedule = 0.0,
    delta: checks.ScalarOrSchedule = 0.1,
    wd_ratio: checks.ScalarOrSchedule = 0.1,
    layers: LayerFn | None = None,
    mask: Mask = None,
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    r"""SGDP: SGD without the updates' radial part on scale-invariant weights.

    Momentum, :func:`optax_spd.remove_radial`, learning rate. The weight decay λ is decoupled:

    .. math::

        u = -\eta\left(q + \rho\,\frac{\lambda}{1 - \mu}\,\theta\right)

    with q the direction of SGD with momentum μ, projected where the test passes. The momentum
    itself is not projected (in the authors' code it is, without Nesterov momentum). The authors of
    FTP call another optimizer SGDP: that is :func:`optax_spd.sgd_ftp`.

    Args:
      learning_rate: η, a float or a schedule.
      momentum: μ, from 0 to below 1; None for none.
      nesterov: whether to use Nesterov momentum.
      dampening: from 0 to 1: gradients enter the momentum times 1 - ``dampening``, from the first
        on.
      weight_decay: λ, a float or a schedule; multiplied by the learning rate and divided by 1 - μ.
      delta: as in :func:`optax_spd.remove_radial`.
      wd_ratio: as in :func:`optax_spd.remove_radial`.
      layers: as in :func:`optax_spd.remove_radial`.
      mask: True where the projection and the decay apply; SGD applies everywhere.
      axis_name: as in :func:`optax_spd.remove_radial`.

    Returns:
      A transformation with a plain three-argument ``update``. The state takes 4 bytes a parameter
      for momentum, if used (in float32).
      Under ``optax.inject_hyperparams`` name in ``static_args`` those of ``layers`` and ``mask``
      that are functions.

    Raises:
      TypeError, ValueError: as :func:`optax_spd.remove_radial`; ``momentum`` or ``dampening`` out
        of range.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax_spd
      >>> tx = optax_spd.sgdp(0.1, momentum=0.9, nesterov=True, weight_decay=1e-4)
      >>> params = {"kernel": jnp.ones((2, 2))}
      >>> state = tx.init(params)
      >>> updates, state = tx.update({"kernel": jnp.ones((2, 2))}, state, params)

    References:
      Heo et al., `AdamP: Slowing Down the Slowdown for Momentum Optimizers on Scale-invariant
      Weights <https://arxiv.org/abs/2006.08217>`_, ICLR 2021.
    """
    checks.check_flag("nesterov", nesterov)
    checks.check_scalar("dampening", dampening, high=1.0)
    stage = remove_radial(
        _over_one_minus(momentum, weight_decay),
        delta=delta,
        wd_ratio=wd_ratio,
        layers=layers,
        mask=mask,
        axis_name=axis_name,
    )
    direction = dampened_trace(momentum, dampening, nesterov)
    return wrappers.chain(direction, stage, optax.scale_by_learning_rate(learning_rate))


def sgd_fednar(
    learning_rate: optax.ScalarOrSchedule,
    momentum: jax.typing.ArrayLike | None = None,
    nesterov: bool = False,
    *,
    weight_decay: checks.ScalarOrSchedule,
    max_norm: checks.ScalarOrSchedule,
    anchor: Anchor = "zero",
    anchor_dtype: DType = None,
    mask: Mask = None,
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    r"""FedNAR's local step: SGD with the weight decay inside the gradient clipping.

    .. math::

        h = g + \lambda (\theta - \theta_0), \qquad
        u = -\eta\, h \min\left(1, \frac{A}{\|h\|}\right)

    with the norm over all parameters together. FedNAR's θ₀ is zero. With ``anchor="initial"``, and
    :func:`optax_spd.set_anchor` on what the server sends at the start of a round, it is FedProx's
    local step with the same clip. For both, ``optax_spd.chain(l2_sp(mu), sgd_fednar(...))``.

    Args:
      learning_rate: η, a float or a schedule. The authors anneal it from round to round.
      momentum: decay of the momentum of clipped gradients; None, as in the paper, for none.
      nesterov: whether to use Nesterov momentum.
      weight_decay: λ >= 0, a float or a schedule.
      max_norm: A >= 0, the largest norm of gradient and decay together, a float or a schedule; 10
        in the authors' code.
      anchor: θ₀, as for :func:`optax_spd.spd`.
      anchor_dtype: dtype to store the anchor in; None for its own.
      mask: True where the decay applies. All arrays count in the norm and are clipped.
      axis_name: as for :func:`optax_spd.spd`.

    Returns:
      A transformation with a plain three-argument ``update``. The state takes 4 bytes a parameter
      for momentum, if used, and 4 for an anchor, if held (in float32). An array that is not finite
      is left out of the norm and reaches no other array.
      Under ``optax.inject_hyperparams`` name in ``static_args`` those of ``mask``, ``anchor`` and
      ``anchor_dtype`` that can be called: functions, Equinox models, dtypes as classes.

    Raises:
      TypeError, ValueError: as :func:`optax_spd.l2_sp`; ``max_norm`` negative or not finite.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax_spd
      >>> tx = optax_spd.sgd_fednar(1.0, weight_decay=1.0, max_norm=1.0)
      >>> params, grads = {"kernel": jnp.array([3.0, 0.0])}, {"kernel": jnp.array([0.0, 4.0])}
      >>> updates, state = tx.update(grads, tx.init(params), params)  # h = (3, 4), ‖h‖ = 5
      >>> [round(float(x), 3) for x in updates["kernel"]]
      [-0.6, -0.8]

    References:
      Li et al., `FedNAR: Federated Optimization with Normalized Annealing Regularization
      <https://arxiv.org/abs/2310.03163>`_, NeurIPS 2023; Li et al., `Federated Optimization in
      Heterogeneous Networks <https://arxiv.org/abs/1812.06127>`_, MLSys 2020.
    """
    return wrappers.chain(
        l2_sp(weight_decay, anchor=anchor, anchor_dtype=anchor_dtype, mask=mask),
        clip_by_whole_norm(max_norm, axis_name=axis_name),
        optax.sgd(learning_rate, momentum, nesterov),
    )


def sgd_freeze_embed(
    learning_rate: optax.ScalarOrSchedule,
    momentum: float | None = 0.9,
    nesterov: bool = False,
    *,
    embedding: Frozen = DEFAULT_EMBEDDING_PATTERNS,
) -> optax.GradientTransformationExtraArgs:
    """SGD with the embedding layer frozen: AdamW's accuracy in fine-tuning, with less memory.

    ``with_frozen(optax.sgd(learning_rate, momentum, nesterov), embedding)``. In float32 training
    takes 12 bytes a parameter: 4 each for the parameter, its gradient and the momentum. With
    ``momentum=None`` it takes 8; AdamW takes 16. Frozen parameters have no momentum.

    Args:
      learning_rate: a float or a schedule.
      momentum: decay of the momentum; None for none.
      nesterov: whether to use Nesterov momentum.
      embedding: what is frozen, as for :func:`optax_spd.with_frozen`; by default the embedding
        layer of the common Flax models (:data:`optax_spd.DEFAULT_EMBEDDING_PATTERNS`). The paper
        freezes the patch embedding (or the stem) of vision models.

    Returns:
      A transformation with a plain three-argument ``update``. Under ``optax.inject_hyperparams``
      name ``embedding`` in ``static_args`` if it is a function.

    Raises:
      TypeError, ValueError: as :func:`optax_spd.with_frozen`, also if no embedding is found.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax_spd
      >>> params = {"embedding": {"kernel": jnp.ones((4, 2))}, "head": {"kernel": jnp.ones((2, 2))}}
      >>> tx = optax_spd.sgd_freeze_embed(0.1, momentum=None)
      >>> updates, state = tx.update(params, tx.init(params), params)
      >>> [float(updates[name]["kernel"].min()) for name in ("embedding", "head")]
      [0.0, -0.10000000149011612]

    References:
      Kumar et al., `How to Fine-Tune Vision Models with SGD
      <https://arxiv.org/abs/2211.09359>`_, 2022.

    .. seealso:: :func:`optax_spd.layerwise_lr_decay`
    """
    return with_frozen(optax.sgd(learning_rate, momentum, nesterov), embedding)


def _decayed_weights(weight_decay: checks.ScalarOrSchedule) -> optax.GradientTransformation:
    """Adds λθ to the update."""
    checks.check_scalar("weight_decay", weight_decay)
    # add_decayed_weights takes no schedule in Optax 0.2.5, and never advances it in 0.2.6.
    if callable(weight_decay):
        return l2_sp(weight_decay, anchor="zero")
    return optax.add_decayed_weights(weight_decay)


def _over_one_minus(
    momentum: jax.typing.ArrayLike | None, weight_decay: checks.ScalarOrSchedule
) -> Any:
    """λ / (1 - μ)."""
    checks.check_scalar("weight_decay", weight_decay)
    if momentum is None:
        return weight_decay
    if callable(momentum):
        raise TypeError(
            f"momentum must be a number or None, got {momentum!r}. For a schedule wrap the "
            "optimizer: optax.inject_hyperparams(optax_spd.sgdp)(..., momentum=schedule)."
        )
    checks.check_scalar("momentum", momentum, high=1.0)
    if not isinstance(momentum, jax.core.Tracer) and momentum == 1:
        raise ValueError(
            "momentum must be below 1, got 1: SGDP divides the weight decay by 1 - momentum."
        )
    if callable(weight_decay):
        return lambda count: weight_decay(count) / (1 - momentum)
    return weight_decay / (1 - momentum)
