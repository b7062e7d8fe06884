"""TPGM after training: learns radii for a pair of checkpoints.

Tian et al., CVPR 2023; the equations are in :mod:`optax_spd.methods.tpgm`. The paper uses TPGM this
way on ImageNet: one bi-level loop on the finished weights. The differences from the authors' code
listed in :mod:`optax_spd.methods.tpgm` apply here too, as far as they concern the loop.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_spd.core import balls, bilevel
from optax_spd.layers import plans, trees
from optax_spd.layers.spec import LayerFn
from optax_spd.layers.types import Mask, Norm, PyTree
from optax_spd.posthoc.project import displacement, matched_anchor, plan_of


class FittedRadii(NamedTuple):
    """Result of :func:`fit_radii`.

    Attributes:
      params: the projected parameters, a tree like params.
      radii: γ, one entry per layer in ``layer_names`` order.
      losses: the validation loss of each inner step, before the step changes the radii.
    """

    params: PyTree
    radii: jax.Array
    losses: jax.Array


def fit_radii(
    params: PyTree,
    anchor: PyTree,
    validation_fn: bilevel.ValidationFn,
    validation_batches: PyTree,
    *,
    radius_optimizer: optax.GradientTransformation | None = None,
    norm: Norm = "mars",
    layers: LayerFn | None = None,
    mask: Mask = None,
) -> FittedRadii:
    r"""Learns per-layer radii after training and projects the parameters onto them.

    .. math::

        \min_\gamma\; L_{\mathrm{val}}\left(\theta_0 +
        \min\left(1, \frac{\gamma}{n}\right) (\theta - \theta_0)\right)

    γ are the radii, one per layer, and n is the norm of a layer's (or each output unit's) deviation
    from the anchor θ₀. Each validation batch is one step of ``radius_optimizer``. γ starts at half
    of each layer's smallest row norm. Works on any pair of checkpoints, whatever trained them, in
    the time of a few hundred validation steps.

    Args:
      params: the fine-tuned parameters θ; they may be sharded.
      anchor: the pretrained parameters θ₀; matched by path.
      validation_fn: (params, batch) -> scalar loss, in evaluation mode. Compiled code is reused in
        later calls with the *same* function and optimizer objects: make both once, outside loops.
        The cache keeps them alive, with everything they close over.
      validation_batches: a tree of arrays with a leading axis, one entry per inner step. All
        batches are on the device at once.
      radius_optimizer: updates the radii, as for :func:`optax_spd.tpgm`. Adam's rate times the
        number of batches bounds how far a radius can move, in units of the norm.
      norm: "mars" (each output unit by its own absolute row sum) or "l2".
      layers: what a layer is, and which axes are output units (:func:`optax_spd.outputs`).
      mask: True where to project; the other parameters stay as they are.

    Returns:
      A named tuple (params, radii, losses). The projected parameters keep structure and
      dtypes; the radii have shape (layers,), the losses (inner steps,).

    Raises:
      TypeError: a complex parameter, a ``validation_fn`` that is not a function or not hashable.
      ValueError: an unknown norm, trees or shapes that do not match, batches without a common
        leading axis, a ``validation_fn`` that does not return a scalar.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import optax_spd
      >>> fitted = optax_spd.fit_radii(
      ...     {"bias": jnp.array([3.0, 4.0])}, {"bias": jnp.zeros(2)},
      ...     lambda params, batch: jnp.sum((params["bias"] - batch) ** 2), jnp.ones((10, 2)),
      ...     radius_optimizer=optax.sgd(0.1), norm="l2")
      >>> print(f"{fitted.radii[0]:.2f}, loss {fitted.losses[0]:.2f} -> {fitted.losses[-1]:.2f}")
      1.52, loss 1.25 -> 0.06

    References:
      Tian et al., `Trainable Projected Gradient Method for Robust Fine-tuning
      <https://arxiv.org/abs/2303.10720>`_, CVPR 2023.

    .. seealso:: :func:`optax_spd.tpgm`, :func:`optax_spd.project`, :func:`optax_spd.wise_ft`
    """
    optimizer = bilevel.checked_optimizer(radius_optimizer)
    balls.check_norm(norm)
    bilevel.check_validation(validation_fn, validation_batches)
    try:
        hash(validation_fn)
    except TypeError as error:
        raise TypeError(
            f"validation_fn must be hashable, since compiled code is cached by it, got "
            f"{validation_fn!r}. Wrap it in a function: def loss(params, batch): ..."
        ) from error
    plan = plan_of(params, layers, mask)
    pretrained = matched_anchor(params, anchor, plan)
    flat = trees.flatten(params)
    arrays = trees.only_parameters(flat).leaves
    settings = [None if x is y else x for x, y in zip(flat.leaves, arrays, strict=True)]
    leaves, radii, losses = _fit(
        arrays,
        pretrained,
        validation_batches,
        flat.treedef,
        _Settings(settings),
        validation_fn,
        optimizer,
        norm,
        plan,
    )
    return FittedRadii(flat.unflatten(_filled(leaves, settings)), radii, losses)


class _Settings:
    """Leaves that are no parameters, as a static argument: compared by type and value.

    (1 and True are equal, but programs with them differ. What has no hash is compared by identity.)
    """

    def __init__(self, leaves: list[Any]) -> None:
        """Keeps the leaves, so that an identity stays theirs."""
        self.leaves = leaves
        self.key = tuple((type(x), x if _has_hash(x) else id(x)) for x in leaves)

    def __eq__(self, other: object) -> bool:
        """Whether all leaves are equal and of equal types."""
        return isinstance(other, _Settings) and self.key == other.key

    def __hash__(self) -> int:
        """The hash of types and values."""
        return hash(self.key)


def _has_hash(value: Any) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True


@functools.partial(
    jax.jit,
    static_argnames=("structure", "settings", "validation_fn", "optimizer", "norm", "plan"),
)
def _fit(
    arrays: list[Any],
    pretrained: list[Any],
    batches: PyTree,
    structure: Any,
    settings: _Settings,
    validation_fn: bilevel.ValidationFn,
    optimizer: optax.GradientTransformation,
    norm: Norm,
    plan: plans.LayerPlan,
) -> tuple[list[Any], jax.Array, jax.Array]:
    """The fitted leaves, the radii and the losses.

    ``settings`` are the leaves that are no parameters, such as activation functions: constants of
    the program, for ``validation_fn``.
    """
    params = jax.tree_util.tree_unflatten(structure, _filled(arrays, settings.leaves))
    displaced = displacement(params, pretrained, plan)
    (norms,) = balls.ball_norms(norm, plan, None, displaced.deltas)
    active = jnp.isfinite(norms.largest)
    constraint = bilevel.Constraint(plan, displaced.deltas, norms, active, None)

    def loss_fn(projected: bilevel.Leaves, batch: PyTree) -> jax.Array:
        return bilevel.scalar_loss(validation_fn, displaced.filled(projected), batch)

    zeros = jnp.zeros(plan.vector_size, plan.dtype)
    start, _ = constraint.started(zeros, jnp.zeros(plan.vector_size, bool))
    learned = bilevel.learn_radii(
        constraint, loss_fn, displaced.projected, batches, optimizer, start, optimizer.init(zeros)
    )
    projected = displaced.projected(constraint.factors(learned.radii))
    return _filled(projected, arrays), learned.radii[: len(plan.names)], learned.losses


def _filled(leaves: Sequence[Any], others: Sequence[Any]) -> list[Any]:
    """The leaves, with those of ``others`` in place of None."""
    return [other if leaf is None else leaf for leaf, other in zip(leaves, others, strict=True)]
