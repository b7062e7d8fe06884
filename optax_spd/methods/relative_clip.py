r"""SIBERT's clip: SGD's gradient clipped relative to the norm of the weights.

Li, Bhojanapalli, Zaheer, Reddi, Kumar: "Robust Training of Neural Networks Using Scale Invariant
Architectures", ICML 2022, https://arxiv.org/abs/2202.00980 (there is no code of the authors). In
the paper's symbols, with the scale-invariant parameters x, their gradient g, learning rate η,
weight decay λ and clipping factor C:

    f = min(1, √(2 C λ / η) ‖x‖ / ‖g‖)         ‖·‖ over all of these parameters together
    x ← (1 - η λ) x - η f g

Differences from the paper:

1. ``clipping`` is √C, 2 in the paper's experiments.
2. Without a decay (λ = 0) the clip is off. By the formula it would stop all training.
3. With a rate of 0 (η = 0) f is 1.
4. An array whose x or g is not finite is left out of both norms, so that it spoils no other array.
5. Norms have at least float32, and are finite if their arrays are.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_spd.core import stage, sums
from optax_spd.core.balls import clip_factor, whole_norms
from optax_spd.layers import checks
from optax_spd.layers.types import AxisName, Mask, PyTree


def relative_factor(
    weight_norm: jax.Array,
    gradient_norm: jax.Array,
    learning_rate: jax.Array,
    weight_decay: jax.Array,
    clipping: jax.Array,
) -> jax.Array:
    """The factor f; 1 where η, λ or ‖g‖ is 0.

    Args:
      weight_norm: ‖x‖.
      gradient_norm: ‖g‖.
      learning_rate: η >= 0.
      weight_decay: λ >= 0.
      clipping: √C >= 0.
    """
    is_on = (learning_rate > 0) & (weight_decay > 0)
    ratio = jnp.where(is_on, weight_decay, 0) / jnp.where(is_on, learning_rate, 1)
    largest = clipping * sums.norm_of(2 * ratio) * weight_norm
    return jnp.where(is_on, clip_factor(gradient_norm, largest), 1)


def clip_by_relative_norm(
    learning_rate: checks.ScalarOrSchedule,
    weight_decay: checks.ScalarOrSchedule,
    clipping: checks.ScalarOrSchedule = 2.0,
    *,
    mask: Mask = None,
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Clips the gradient's norm relative to the weights' (SIBERT); in front of decay and SGD.

    ``optax.chain(clip_by_relative_norm(η, λ), optax.add_decayed_weights(λ), optax.sgd(η))``, with
    the same η and λ in each. The incoming gradient g is multiplied by

    .. math::

        f = \min\left(1, \sqrt{\frac{2 C \lambda}{\eta}}\,\frac{\|x\|}{\|g\|}\right)

    with norms over all parameters x together. It is for networks whose loss does not depend on the
    scale of x, trained by SGD without momentum: the decay then finds the scale at which steps have
    the right size, and the clip keeps single large gradients from making the weights longer.

    Args:
      learning_rate: η >= 0 of the SGD behind, or its schedule. While it is 0, f is 1.
      weight_decay: λ >= 0 of the decay behind, or a schedule of it. With 0 the clip is off.
      clipping: √C >= 0, or a schedule of it.
      mask: as for :func:`optax_spd.spd`: True for the scale-invariant parameters. Only these count
        in the norms and are clipped; give the decay the mask that it needs itself.
      axis_name: as for :func:`optax_spd.spd`.

    Returns:
      A stage whose ``update`` needs ``params``. Updates keep their structure and dtypes. The state
      is a count, for schedules. Integer, empty, None and MaskedNode leaves pass through. An array
      whose weights or gradient are not finite counts in no norm; it is multiplied by f as all
      others. Under ``optax.inject_hyperparams`` name
      ``mask`` in ``static_args`` if it is a function.

    Raises:
      TypeError: a complex parameter (in ``init``), a mask that is not bools.
      ValueError: a number negative or not finite (at construction); no params, trees or shapes that
        do not match (in ``update``).

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import optax_spd
      >>> tx = optax.chain(
      ...     optax_spd.clip_by_relative_norm(0.1, 0.05, clipping=1.0),
      ...     optax.add_decayed_weights(0.05),
      ...     optax.sgd(0.1))
      >>> params = {"kernel": jnp.array([3.0, 4.0])}
      >>> grads = {"kernel": jnp.array([40.0, -30.0])}  # ten times as long: f = 1/10
      >>> updates, state = tx.update(grads, tx.init(params), params)
      >>> [round(float(x), 3) for x in updates["kernel"]]
      [-0.415, 0.28]

    References:
      Li et al., `Robust Training of Neural Networks Using Scale Invariant Architectures
      <https://arxiv.org/abs/2202.00980>`_, ICML 2022.
    """
    scheduled = {
        "learning_rate": learning_rate,
        "weight_decay": weight_decay,
        "clipping": clipping,
    }
    for name, number in scheduled.items():
        checks.check_scalar(name, number)
    options = stage.StageOptions("zero", None, mask=mask, axis_name=axis_name)

    def init(params: PyTree) -> stage.CountState:
        options.init(params)
        return stage.CountState(count=jnp.zeros((), jnp.int32))

    def update(
        updates: PyTree,
        state: stage.CountState,
        params: PyTree = None,
        **extra_args: Any,
    ) -> tuple[PyTree, stage.CountState]:
        view = options.view(updates, optax.EmptyState(), params, extra_args)
        weights, gradients = view.map(lambda d: d.delta), view.map(lambda d: d.step)
        norms = whole_norms(view.plan, view.axes, weights, gradients)
        numbers = {
            k: checks.value_at(x, state.count, view.plan.dtype) for k, x in scheduled.items()
        }
        factor = relative_factor(*norms, **numbers)
        steps = view.map(lambda d: sums.times(factor.astype(d.step.dtype), d.step))
        count = optax.safe_increment(state.count)
        return view.rebuild(steps), stage.CountState(count=count)

    return optax.GradientTransformationExtraArgs(init, update)
