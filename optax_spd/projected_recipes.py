"""Complete optimizers with learned radii, ready for any training loop.

    adam_tpgm    u = Adam(g),                    then TPGM's projection of the step u
    adam_ftp     u = AdamW(g),                   then FTP's: the authors' AdamP
    sgd_ftp      u = SGD(g + λ θ, momentum),     then FTP's: the authors' SGDP

The projections are in :mod:`optax_spd.tpgm` (Tian et al., CVPR 2023,
https://arxiv.org/abs/2303.10720) and :mod:`optax_spd.ftp` (Tian et al., NeurIPS 2023,
https://arxiv.org/abs/2310.19182). Differences from the authors' optimizers:

1. No amsgrad and no dampening: Optax's amsgrad computes another maximum and its momentum has no
   dampening. Chains of other stages with ``ftp`` have both.
2. Learning rate, weight decay and k may be schedules, as everywhere in Optax.
"""

import functools
from typing import Any

import jax
import optax

from optax_spd import checks, in_turn, layers as layers_lib, stages
from optax_spd.ftp import stage_of as ftp_stage_of
from optax_spd.l2_sp import l2_sp
from optax_spd.tpgm import stage_of as tpgm_stage_of


def adam_tpgm(
    learning_rate: optax.ScalarOrSchedule,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    eps_root: jax.typing.ArrayLike = 0.0,
    mu_dtype: Any = None,
    *,
    radius_optimizer: optax.GradientTransformation | None = None,
    norm: str = "mars",
    every: int = 1,
    anchor: Any = "initial",
    anchor_dtype: Any = None,
    layers: layers_lib.LayerFn | None = None,
    mask: Any = None,
    axis_name: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Adam in balls around the anchor, whose radii are learned on validation data.

    ``chain(optax.adam(...), tpgm(...))``. See :func:`optax_spd.tpgm` for the update, and for
    ``validation_fn=`` and ``validation_batches=``, which ``update`` takes.

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
      A transformation whose ``update`` takes the validation objective as extra arguments. State:
      Adam's 8 bytes a parameter and the anchor's 4 (in float32).
      Under ``optax.inject_hyperparams`` name callables and trees in ``static_args``:
      ``("radius_optimizer", "norm", "anchor", "anchor_dtype", "layers", "mask", "axis_name",
      "mu_dtype")``.

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
    options = stages.StageOptions(anchor, anchor_dtype, layers, mask, axis_name)
    stage = functools.partial(tpgm_stage_of, radius_optimizer, norm, every, None)
    validation = ("validation_fn", "validation_batches")
    return in_turn.chain([adam], stage, options, inner_twice=True, whole_for=validation)


def adam_ftp(
    learning_rate: optax.ScalarOrSchedule,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    eps_root: jax.typing.ArrayLike = 0.0,
    mu_dtype: Any = None,
    *,
    k: checks.ScalarOrSchedule = 1.0,
    weight_decay: checks.ScalarOrSchedule = 0.0,
    norm: str = "mars",
    radius_learning_rate: checks.ScalarOrSchedule = 1e-2,
    state_dtype: Any = None,
    anchor: Any = "initial",
    anchor_dtype: Any = None,
    layers: layers_lib.LayerFn | None = None,
    mask: Any = None,
    axis_name: Any = None,
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
      A transformation with a plain three-argument ``update``. State: Adam's 8 bytes a parameter,
      the anchor's 4 and the last deviation's 4 (in float32).
      Under ``optax.inject_hyperparams`` name callables, dtypes and trees in ``static_args``:
      ``("norm", "state_dtype", "anchor", "anchor_dtype", "layers", "mask", "axis_name",
      "mu_dtype")``.

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
    options = stages.StageOptions(anchor, anchor_dtype, layers, mask, axis_name)
    stage = functools.partial(ftp_stage_of, k, norm, radius_learning_rate, state_dtype)
    return in_turn.chain(inner, stage, options, inner_twice=True)


def sgd_ftp(
    learning_rate: optax.ScalarOrSchedule,
    momentum: jax.typing.ArrayLike | None = None,
    nesterov: bool = False,
    *,
    k: checks.ScalarOrSchedule = 1.0,
    weight_decay: checks.ScalarOrSchedule = 0.0,
    norm: str = "mars",
    radius_learning_rate: checks.ScalarOrSchedule = 1e-2,
    state_dtype: Any = None,
    anchor: Any = "initial",
    anchor_dtype: Any = None,
    layers: layers_lib.LayerFn | None = None,
    mask: Any = None,
    axis_name: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""SGD with Fast Trainable Projection (the authors' SGDP).

    SGD on the gradient plus λθ, then the projection of its step: see :func:`optax_spd.ftp` for the
    update. The radii see the gradient without λθ.

    Args:
      learning_rate: a float or a schedule.
      momentum: its decay, or None for none.
      nesterov: whether momentum is Nesterov's.
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
      A transformation with a plain three-argument ``update``. State, in float32: the anchor's 4
      bytes a parameter, the last deviation's 4, and 4 with momentum.
      Under ``optax.inject_hyperparams`` name callables, dtypes and trees in ``static_args``:
      ``("nesterov", "norm", "state_dtype", "anchor", "anchor_dtype", "layers", "mask",
      "axis_name")``.

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
    inner = [
        _decayed_weights(weight_decay),
        optax.sgd(learning_rate, momentum, nesterov),
    ]
    options = stages.StageOptions(anchor, anchor_dtype, layers, mask, axis_name)
    stage = functools.partial(ftp_stage_of, k, norm, radius_learning_rate, state_dtype)
    return in_turn.chain(inner, stage, options)


def _decayed_weights(weight_decay: checks.ScalarOrSchedule) -> optax.GradientTransformation:
    """Adds λθ to the update."""
    checks.check_scalar("weight_decay", weight_decay)
    # Optax 0.2.5 takes no schedule here, and 0.2.6 never advances it.
    if callable(weight_decay):
        return l2_sp(weight_decay, anchor="zero")
    return optax.add_decayed_weights(weight_decay)
