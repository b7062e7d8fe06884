"""TPGM's bi-level loop: learns radii by the gradient of a validation loss, batch by batch.

Shared by :func:`optax_spd.tpgm`, whose module has the paper's equations, and
:func:`optax_spd.fit_radii`.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_spd.core import balls, sums
from optax_spd.layers import plans, trees
from optax_spd.layers.types import PyTree
from optax_spd.sharding import manual_axes

Leaves = list[jax.Array | None]
ValidationFn = Callable[[PyTree, PyTree], jax.typing.ArrayLike]

DEFAULT_OPTIMIZER = optax.adam(1e-2)
"""The authors' optimizer of the radii."""


class Constraint(NamedTuple):
    """The deviations that the radii bound; constant during one bi-level loop.

    Attributes:
      plan: the layers.
      deltas: per leaf the deviation Δ̃ to be projected, None where there is no layer.
      norms: the norms of the deviations.
      active: per layer whether its radius is learned: it has an update and its norm is finite.
      axes: per leaf the mesh axes that split it by hand, or None.
    """

    plan: plans.LayerPlan
    deltas: Leaves
    norms: balls.BallNorms
    active: jax.Array
    axes: Sequence[manual_axes.MeshAxes] | None

    def started(
        self, radii: jax.Array, started: jax.Array, initial: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """Starts the radii of active layers, at ``initial`` or half their smallest row norm.

        A layer that has not moved counts as not started.
        """
        starting = self.active & ~started
        radii = jnp.where(starting, self.norms.smallest / 2 if initial is None else initial, radii)
        return radii, started | (self.active & (self.norms.largest > 0))

    def clipped(self, radii: jax.Array) -> jax.Array:
        """clip(γ, 1e-8, max n); max n if it is below 1e-8."""
        inside = jnp.minimum(jnp.maximum(radii, balls.EPS), self.norms.largest)
        return jnp.where(self.active, inside, radii)

    def factors(self, radii: jax.Array) -> Leaves:
        """The factor of the projection, per leaf."""
        return balls.factors(self.plan, radii, self.norms, self.active)

    def radius_gradient(self, radii: jax.Array, weight_gradients: Leaves) -> jax.Array:
        """∂L/∂γ = Σ_j [0 < γ/(n_j + 1e-8) < 1] ⟨∂L/∂θ'_j, Δ̃_j⟩ / (n_j + 1e-8), per layer."""
        axes, copies = self._gradient_axes()
        terms: list[tuple[jax.Array, ...] | None] = []
        for entry, g, delta, rows in zip(
            self.plan.arrays, weight_gradients, self.deltas, self.norms.rows, strict=True
        ):
            if entry is None or g is None or delta is None or rows is None:
                terms.append(None)
                continue
            radius = sums.spread(entry, radii, rows.ndim).astype(rows.dtype)
            length = rows + balls.EPS
            # Strict: no gradient flows where the ratio is exactly 1 (jnp.clip's would be 1/2).
            inside = (radius > 0) & (radius / length < 1)
            weight = jnp.where(inside, 1 / (copies * length), 0)
            terms.append((g.astype(delta.dtype) * delta * weight,))
        (gradient,) = sums.layer_sums(self.plan, terms, 1, axes)
        return gradient

    def _gradient_axes(self) -> tuple[Sequence[manual_axes.MeshAxes] | None, int]:
        """The mesh axes to sum weight gradients over, and how often that counts the loss.

        ``shard_map`` with ``check_vma=True`` differentiates the loss. ``pmap``, and ``shard_map``
        without the check, differentiate the sum of all devices' losses, and each device in its own
        copy of a replicated array. There the gradients of all copies are summed, and the sum is
        divided by the number of devices.
        """
        names = {name for axes in self.axes or () for name in axes}
        if self.axes is None or all(
            set(axes) <= manual_axes.varying_axes(delta)
            for axes, delta in zip(self.axes, self.deltas, strict=True)
            if delta is not None
        ):
            return self.axes, 1
        everywhere = dict.fromkeys(sorted(names))
        return [everywhere] * len(self.axes), jax.lax.psum(1, tuple(everywhere))


class Learned(NamedTuple):
    """Result of :func:`learn_radii`: radii, their optimizer's state, the loss of each step."""

    radii: jax.Array
    optimizer_state: PyTree
    losses: jax.Array


def learn_radii(
    constraint: Constraint,
    loss_fn: Callable[[Leaves, PyTree], jax.Array],
    place: Callable[[Leaves], Leaves],
    batches: PyTree,
    optimizer: optax.GradientTransformation,
    radii: jax.Array,
    optimizer_state: PyTree,
) -> Learned:
    """Takes one step of the radii's optimizer per validation batch, in a ``lax.scan``.

    Args:
      constraint: the deviations that the radii bound.
      loss_fn: (projected parameters per leaf, batch) -> scalar.
      place: (factors per leaf) -> projected parameters per leaf.
      batches: validation batches with a leading axis.
      optimizer: of the radii; it also gets the loss, as ``value=``.
      radii: the initial radii.
      optimizer_state: the optimizer's initial state.

    Returns:
      The radii after the last step, clipped. A layer keeps its radius if the loss or its gradient
      is not finite; the optimizer keeps its state if the loss is not finite.
    """
    update = optax.with_extra_args_support(optimizer).update

    def step(carry: tuple[jax.Array, PyTree], batch: PyTree) -> Any:
        radii, state = carry
        radii = constraint.clipped(radii)
        projected = place(constraint.factors(radii))
        loss, weight_gradients = jax.value_and_grad(loss_fn)(projected, batch)
        gradient = constraint.radius_gradient(radii, weight_gradients)

        loss_is_finite = jnp.isfinite(loss)
        # The square must be finite too: an overflowing second moment would freeze the radius.
        learns = constraint.active & loss_is_finite & jnp.isfinite(gradient**2)
        gradient = jnp.where(learns, gradient, 0)
        change, new_state = update(gradient, state, radii, value=loss)
        new_radii = optax.apply_updates(radii, change)
        new_radii = jnp.where(learns & jnp.isfinite(new_radii), new_radii, radii)
        next_state = jax.tree.map(
            lambda new, old: _select(loss_is_finite, new, old), new_state, state
        )
        return (new_radii, next_state), loss

    start = radii, optimizer_state
    if len(jax.tree.leaves(batches)[0]) == 1:
        # XLA keeps a loop of one turn, and on CPUs convolutions inside loops are slow.
        (radii, optimizer_state), loss = step(start, jax.tree.map(lambda array: array[0], batches))
        losses = loss[None]
    else:
        (radii, optimizer_state), losses = jax.lax.scan(step, start, batches)
    return Learned(constraint.clipped(radii), optimizer_state, losses)


def _select(condition: jax.Array, new: jax.Array, old: jax.Array) -> jax.Array:
    selected = jnp.where(condition, new, old)
    # A scheduled rate may promote a moment, but a scan's carry must keep its dtype.
    return selected if selected.dtype == old.dtype else selected.astype(old.dtype)


def scalar_loss(validation_fn: ValidationFn, params: PyTree, batch: PyTree) -> jax.Array:
    """The validation loss.

    Raises:
      ValueError: it is not a real scalar.
    """
    loss = validation_fn(params, batch)
    leaves = jax.tree.leaves(loss)
    if len(leaves) != 1 or leaves[0] is not loss or not _is_real_scalar(loss):
        got = jax.tree.map(_describe, loss)
        raise ValueError(
            f"validation_fn must return one real number, the mean loss of the batch, got {got}. "
            "Leave auxiliary outputs out and average over the batch."
        )
    return jnp.asarray(loss)


def _describe(value: Any) -> str:
    if hasattr(value, "dtype"):
        return f"{value.dtype}{list(jnp.shape(value))}"
    return f"{type(value).__name__} {value!r}"


def _is_real_scalar(loss: Any) -> bool:
    if not isinstance(loss, float) and not hasattr(loss, "dtype"):
        return False
    return jnp.shape(loss) == () and jnp.issubdtype(jnp.result_type(loss), jnp.floating)


def checked_optimizer(
    optimizer: optax.GradientTransformation | None,
) -> optax.GradientTransformation:
    """The optimizer of the radii; the default for None.

    Raises:
      TypeError: it is not a gradient transformation.
    """
    if optimizer is None:
        return DEFAULT_OPTIMIZER
    if not (hasattr(optimizer, "init") and hasattr(optimizer, "update")):
        raise TypeError(
            f"radius_optimizer must be a gradient transformation such as optax.adam(1e-2), got "
            f"{optimizer!r}."
        )
    return optimizer


def check_validation(validation_fn: Any, validation_batches: Any) -> None:
    """Checks the two arguments of a bi-level step.

    Raises:
      TypeError: ``validation_fn`` is not a function.
      ValueError: the batches have no common leading axis.
    """
    if not callable(validation_fn):
        raise TypeError(
            f"validation_fn must be a function (params, batch) -> loss, got {validation_fn!r}."
        )
    flat = trees.flatten(validation_batches, unique=False)
    arrays = [
        (path, np.shape(leaf))
        for path, leaf in zip(flat.paths, flat.leaves, strict=True)
        if not trees.is_missing(leaf)
    ]
    if not arrays:
        raise ValueError("validation_batches holds no array. Give it at least one batch.")
    first_path, first = arrays[0]
    for path, shape in arrays:
        if not shape or shape[0] == 0:
            raise ValueError(
                f"validation_batches must have a leading axis, one entry an inner step, but has "
                f"shape {shape} at {trees.shown(path)}. For one batch add an axis of size 1."
            )
        if shape[0] != first[0]:
            raise ValueError(
                f"validation_batches has leading axes that differ: {first[0]} at "
                f"{trees.shown(first_path)}, {shape[0]} at {trees.shown(path)}. The leading axis "
                "counts the inner steps, so all arrays must agree in it."
            )
