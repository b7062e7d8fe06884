r"""AdamP and SGDP: updates without their radial part, for weights whose scale does not matter.

Heo et al.: "AdamP: Slowing Down the Slowdown for Momentum Optimizers on Scale-invariant Weights",
ICLR 2021, https://arxiv.org/abs/2006.08217; the authors' code: clovaai/AdamP. In the paper's
symbols, with weights w, raw gradient g, and the direction p that the optimizer subtracts:

    cos(w, g) = |⟨w, g⟩| / (max(‖w‖, ε) max(‖g‖, ε))      small: the scale of w does not matter
    Π(p)      = p - ŵ ⟨ŵ, p⟩,   ŵ = w / (‖w‖ + ε)         the tangential part of p

    every row:  if max_r cos(w_r, g_r) < δ / √n:           w_r: the weights of one output unit
                    q_r = Π(p_r),  ρ = wd_ratio
    the layer:  else if cos(w, g) < δ / √n:                w: the layer as one row
                    q = Π(p),      ρ = wd_ratio
                else:
                    q = p,         ρ = 1
    u' = q + λ ρ w                                         then times the learning rate

with n the length of the row. Differences from the authors' code:

1. It is a stage between a direction and the learning rate. In :func:`optax_spd.adamp` and
   :func:`optax_spd.sgdp` the numbers are the same, but for 2.
2. SGDP's momentum stays as it is. Without Nesterov momentum the original projects the buffer
   itself; the paper's algorithm projects the update only.
3. A row is an output unit, on whatever axis it lies (``layers=``); the original's is axis 0.
4. A stacked array is several layers, each with a test of its own. In a group all rows of all
   arrays must pass; else the group is one row.
5. A layer whose sums are not finite is not projected. In the original NaN spreads over the tensor.
6. Sums have at least float32 whatever the parameters' dtype.
7. ε = 0 divides by no zero.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_spd import wrappers
from optax_spd.core import rows, stage, sums
from optax_spd.layers import checks
from optax_spd.layers.spec import LayerFn
from optax_spd.layers.types import AxisName, Mask, PyTree
from optax_spd.sharding import manual_axes


class Numbers(NamedTuple):
    """The hyperparameters of one update."""

    weight_decay: jax.Array
    delta: jax.Array
    wd_ratio: jax.Array
    eps: jax.Array

    def astype(self, dtype: Any) -> "Numbers":
        """The same numbers in another dtype."""
        return Numbers(*(number.astype(dtype) for number in self))


class Sums(NamedTuple):
    """What is summed over rows, and over layers; shapes alike.

    Attributes:
      alignment: ⟨w, g⟩.
      weight: ‖w‖².
      gradient: ‖g‖².
      radial: ⟨w, p⟩.
      size: n, the number of weights. Counted as the others are summed, it is right however the
        array is split; XLA makes it a constant.
    """

    alignment: jax.Array
    weight: jax.Array
    gradient: jax.Array
    radial: jax.Array
    size: jax.Array


def measure(d: stage.Deviation, gradient: jax.Array) -> Sums:
    """Elementwise what is summed; with a zero anchor Δ = w."""
    w, g, p = d.delta, gradient, d.step
    return Sums(w * g, w**2, g**2, w * p, jnp.ones_like(w))


def is_tangential(s: Sums, delta: jax.Array, eps: jax.Array) -> jax.Array:
    """Whether cos(w, g) < δ / √n; False where a sum is not finite. Elementwise."""
    cosine = jnp.abs(s.alignment)
    # One after the other, since the product of two norms may overflow.
    for square in (s.weight, s.gradient):
        length = jnp.maximum(sums.norm_of(square), eps)
        cosine = cosine / jnp.where(length > 0, length, 1)
    passes = cosine < delta / jnp.sqrt(jnp.maximum(s.size, 1))
    for x in s:
        passes = passes & jnp.isfinite(x)
    return passes


def radial_coefficient(s: Sums, eps: jax.Array) -> jax.Array:
    """The c of Π(p) = p - c w: ⟨w, p⟩ / (‖w‖ + ε)². Elementwise."""
    length = sums.norm_of(s.weight) + eps
    safe = jnp.where(length > 0, length, 1)
    return s.radial / safe / safe


@functools.partial(jax.jit, static_argnums=1)  # so that arrays of one shape share a trace
def row_terms(numbers: Numbers, dtype: Any, *row: jax.Array) -> tuple[jax.Array, ...]:
    """What is summed over a layer's rows: whether a row fails its test, and its sums."""
    s = Sums(*(x.astype(dtype) for x in row))
    return (~is_tangential(s, numbers.delta, numbers.eps)).astype(dtype), *s


@jax.jit  # so that arrays of one shape share a trace
def act(
    d: stage.Deviation,
    by_row: jax.Array,
    by_layer: jax.Array,
    row_coefficient: jax.Array,
    layer_coefficient: jax.Array,
    numbers: Numbers,
) -> jax.Array:
    """The update q + λ ρ w of one array.

    Args:
      d: w and p.
      by_row: whether the layer's rows pass, each by itself.
      by_layer: whether it is projected as one row.
      row_coefficient: c of each row.
      layer_coefficient: c of the layer.
      numbers: the hyperparameters.
    """
    numbers = numbers.astype(d.step.dtype)
    c = jnp.where(
        sums.sharded_like(by_row, row_coefficient),
        row_coefficient,
        sums.sharded_like(layer_coefficient, row_coefficient),
    )
    fires = by_row | by_layer
    tangential = sums.sharded_like(d.step - c * d.delta, d.step)
    direction = jnp.where(sums.sharded_like(fires, d.step), tangential, d.step)
    decay = numbers.weight_decay * jnp.where(fires, numbers.wd_ratio, 1)
    return direction + sums.sharded_like(sums.times(decay, d.delta), d.step)


def remove_radial(
    weight_decay: checks.ScalarOrSchedule = 0.0,
    *,
    delta: checks.ScalarOrSchedule = 0.1,
    wd_ratio: checks.ScalarOrSchedule = 0.1,
    eps: checks.ScalarOrSchedule = 1e-8,
    layers: LayerFn | None = None,
    mask: Mask = None,
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Removes an update's radial part where the weights' scale does not matter (AdamP, SGDP).

    A normalisation behind a weight makes the loss independent of the weight's scale. Momentum then
    only makes the weight longer, and the steps effectively smaller. Such weights are told by their
    gradient, which is orthogonal to them. Where

    .. math::

        \frac{|\langle w, g\rangle|}{\|w\|\,\|g\|} < \frac{\delta}{\sqrt{n}}:\qquad
        u' = u - \frac{\langle w, u\rangle}{\|w\|^2}\, w + \lambda \rho\, w

    with :math:`\rho` = ``wd_ratio``; elsewhere :math:`u' = u + \lambda w`. This is tried for every
    output unit (n: its number of weights); only if all of a layer's units pass, each loses its
    radial part. Else it is tried for the layer as one vector. Place it between the direction and
    the learning rate, as ``optax_spd.chain(optax.scale_by_adam(), remove_radial(0.01),
    optax.scale_by_learning_rate(1e-3))``, which is :func:`optax_spd.adamp`.

    Args:
      weight_decay: λ >= 0, or a schedule of it; multiplied by the learning rate, as in AdamW.
      delta: δ >= 0, or a schedule of it. With 0 nothing is projected.
      wd_ratio: ρ >= 0, what the decay is multiplied by where an update is projected; or a schedule.
      eps: ε >= 0, the smallest norm to divide by; or a schedule.
      layers: what a layer is, and which axes are its output units, as for :func:`optax_spd.spd`.
        By default the last axis. The authors take the tokens of an embedding table for its units:
        :func:`optax_spd.outputs` with axis 0. Arrays of one axis or none (besides stacked ones) are
        never projected, nor are those whose ``output_axes`` are (): they have no units. In a group
        all units of all arrays must pass; else the group is tried as one vector.
      mask: as for :func:`optax_spd.spd`: True where the projection and the decay apply.
      axis_name: as for :func:`optax_spd.spd`, but not a bare name: it must tell which array axes
        are split.

    Returns:
      A stage whose ``update`` needs ``params`` and the extra argument ``grad`` (the raw gradient;
      ``optax_spd.chain`` supplies it). Updates keep their structure and dtypes. The state is a
      count, for schedules. Integer, empty, None and MaskedNode leaves pass through. Under
      ``optax.inject_hyperparams`` name in ``static_args`` those of ``layers`` and ``mask`` that
      are functions.

    Raises:
      TypeError: a complex parameter (in ``init``), a mask that is not bools, a wrong argument type.
      ValueError: a number negative or not finite, a bare ``axis_name`` (at construction); no
        params, no gradient, trees or shapes that do not match (in ``update``).

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import optax_spd
      >>> tx = optax_spd.chain(optax_spd.remove_radial(delta=1.0), optax.scale(-1.0))
      >>> params = {"kernel": jnp.array([[3.0], [4.0]])}  # one unit with two inputs
      >>> grads = {"kernel": jnp.array([[-3.0], [4.0]])}  # cos = 7/25 < 1/√2
      >>> updates, state = tx.update(grads, tx.init(params), params)
      >>> [round(float(x), 3) for x in updates["kernel"][:, 0]]  # orthogonal to (3, 4)
      [3.84, -2.88]

    References:
      Heo et al., `AdamP: Slowing Down the Slowdown for Momentum Optimizers on Scale-invariant
      Weights <https://arxiv.org/abs/2006.08217>`_, ICLR 2021.

    .. seealso:: :func:`optax_spd.adamp`, :func:`optax_spd.sgdp`
    """
    scheduled = Numbers(weight_decay, delta, wd_ratio, eps)  # type: ignore[arg-type]
    for name, number in scheduled._asdict().items():
        checks.check_scalar(name, number)
    manual_axes.require_specs(axis_name, "remove_radial sums along some of an array's axes only")
    options = stage.StageOptions("zero", None, layers, mask, axis_name)
    measured_array = jax.jit(measure)

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
        grads = view.match(wrappers.require_gradient(extra_args, "remove_radial"), "grad")
        plan = view.plan
        numbers = Numbers(*(checks.value_at(x, state.count, plan.dtype) for x in scheduled))
        of_rows = functools.partial(row_terms, numbers, plan.dtype)
        products = [
            None if d is None or entry is None or not entry.output_axes else measured_array(d, g)
            for entry, d, g in zip(plan.arrays, view.deviations, grads, strict=True)
        ]
        measured = rows.row_sums(plan, products, view.axes, of_rows, 1 + len(Sums._fields))
        failing, whole = measured.totals[0], Sums(*measured.totals[1:])
        has_rows = whole.size > 0
        by_row = has_rows & (failing == 0)
        by_layer = has_rows & ~by_row & is_tangential(whole, numbers.delta, numbers.eps)
        layer_coefficient = radial_coefficient(whole, numbers.eps)

        def new_update(index: int, d: stage.Deviation | None) -> jax.Array | None:
            if d is None:
                return None
            row = measured.local[index]
            new: jax.Array
            if row is None:  # never projected, whatever its group
                new = _decayed(d, numbers)
                return new
            row_coefficient = radial_coefficient(Sums(*row), numbers.eps.astype(row[0].dtype))
            new = act(
                d,
                view.entries(by_row, index),
                view.entries(by_layer, index),
                row_coefficient,
                view.entries(layer_coefficient, index).astype(row_coefficient.dtype),
                numbers,
            )
            return new

        steps = [new_update(index, d) for index, d in enumerate(view.deviations)]
        count = optax.safe_increment(state.count)
        return view.rebuild(steps), stage.CountState(count=count)

    return optax.GradientTransformationExtraArgs(init, update)


@jax.jit
def _decayed(d: stage.Deviation, numbers: Numbers) -> jax.Array:
    """The update u + λ w of an array that is never projected."""
    decay = numbers.weight_decay.astype(d.step.dtype)
    return d.step + sums.sharded_like(sums.times(decay, d.delta), d.step)
