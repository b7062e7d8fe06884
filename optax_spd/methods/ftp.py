"""Fast Trainable Projection (FTP): TPGM's radii, learned without a validation pass.

Tian, Liu, Smith, Kira: "Fast Trainable Projection for Robust Fine-Tuning", NeurIPS 2023,
https://arxiv.org/abs/2310.19182, Algorithm 1; the authors' code: GT-RIPL/FTP. The training gradient
at the projected weights, one step later, replaces TPGM's validation gradient. For each layer with
parameters θ, anchor θ₀, raw gradient g and the inner optimizer's step u, at the layer's step t,
with rows j as in :mod:`optax_spd.core.balls`:

    C_t = θ_{t-1} + u - θ₀                               the unconstrained deviation
    N_t,j = Σ |C_t,j| + 1e-8                              (l2: ‖C_t‖ + 1e-8, one for the layer)
    q = Σ_j ⟨g_j, C_{t-1},j⟩ / N_{t-1},j                  the gradient of the loss in γ
    q = κ q  if q > 0                                     gradient annealing
    γ_t = clip(AdamUpdate(γ_{t-1}, q), 1e-8, max_j N_t,j)   γ_1 = 1e-8
    θ_t = θ₀ + clip(γ_t / N_t, 0, 1) C_t

κ (``k``) = 1 is the paper's default. κ < 1 slows the shrinking of radii; with κ = 0 only the clip
shrinks them.

Differences from the authors' code:

1. It is a stage behind any optimizer, not an Adam or SGD of its own. Behind ``optax.adam`` and
   ``optax.sgd`` the numbers are the same.
2. Each layer counts its own steps. In the original a single counter runs over a list of all layers'
   radii, so a missing gradient assigns radii to the wrong layers.
3. The row norms of C_{t-1} are recomputed from the stored C_{t-1}, which ``state_dtype`` may have
   rounded. The original stores them.
4. A layer whose q² or N_t is not finite keeps the inner optimizer's update, and its radius, moments
   and C do not change (in the original NaN stays forever).
5. Sums have at least float32 whatever the parameters' dtype: in bfloat16 a row's sum would lose all
   its digits.
6. ``norm="l2"`` is ours, for comparison with TPGM; the original has MARS only. The radii's learning
   rate, a constant 1e-2 in the original, is an argument, since it bounds how far a short run can
   go. It and k may be schedules.
7. A layer may be a slice of an array or several arrays, and rows lie on any axis (``layers=``),
   since JAX stacks layers and keeps output units last.
8. A row inside its ball keeps exactly u, by a select.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_spd import wrappers
from optax_spd.core import balls, recompute, stage, sums
from optax_spd.layers import checks, fingerprints
from optax_spd.layers.spec import LayerFn
from optax_spd.layers.types import Anchor, AxisName, DType, Mask, Norm, PyTree

# The radii's Adam. As in the original they do not depend on the inner optimizer's.
B1 = 0.9
B2 = 0.999


class RadiusMoments(NamedTuple):
    """State of the radii's Adam, one entry per layer.

    Attributes:
      steps: the number of steps in which the layer was active, int32.
      first: first moment of q. (Not named ``mu``: ``optax.tree.get`` fails on a second match, and
        would no longer find the inner Adam's.)
      second: second moment of q.
    """

    steps: jax.Array
    first: jax.Array
    second: jax.Array


class FTPState(NamedTuple):
    """State of :func:`ftp`.

    Attributes:
      count: number of updates so far, int32; what scheduled arguments are evaluated at.
      anchor: θ₀, a tree like params, or ``optax.EmptyState()`` if none is held.
      layer_fingerprint: identifies the layers of the vectors (:func:`optax_spd.check_state`).
      ftp_deviation: C of each layer's last step, a tree like params; MaskedNode where there is no
        layer.
      ftp_radii: γ after the last update, one entry per layer in ``layer_names`` order.
      ftp_moments: state of the radii's Adam.
    """

    count: jax.Array  # type: ignore[assignment]  # shadows tuple.count, as in Optax
    anchor: PyTree
    layer_fingerprint: jax.Array
    ftp_deviation: PyTree
    ftp_radii: jax.Array
    ftp_moments: RadiusMoments


def radius_update(
    radius: jax.Array,
    moments: RadiusMoments,
    slope: jax.Array,
    largest: jax.Array,
    k: jax.Array,
    learning_rate: jax.Array,
) -> tuple[jax.Array, RadiusMoments]:
    """AdamUpdate of Algorithm 1 and the clip after it, for one layer or a vector of layers.

    Args:
      radius: γ_{t-1}.
      moments: before the step.
      slope: q, before annealing.
      largest: max_j N_t,j.
      k: κ.
      learning_rate: of the radii.

    Returns:
      γ_t and the moments after the step. In a layer's first step γ = 1e-8, whatever ``largest``
      is, and both moments stay 0. Its second step, Adam's first, has the bias correction of t = 2.
    """
    slope = jnp.where(slope > 0, k * slope, slope)
    steps = moments.steps + 1
    mu = B1 * moments.first + (1 - B1) * slope
    nu = B2 * moments.second + (1 - B2) * slope**2
    t = steps.astype(radius.dtype)
    # 1 - b^t by expm1: in float32 the textbook form loses digits at small t.
    mu_hat = mu / -jnp.expm1(t * math.log(B1))
    nu_hat = nu / -jnp.expm1(t * math.log(B2))
    moved = radius - learning_rate * mu_hat / (sums.norm_of(nu_hat) + balls.EPS)
    clipped = jnp.minimum(jnp.maximum(moved, balls.EPS), largest)

    is_first = moments.steps == 0
    return jnp.where(is_first, balls.EPS, clipped), RadiusMoments(
        steps, jnp.where(is_first, 0, mu), jnp.where(is_first, 0, nu)
    )


def ftp(
    k: checks.ScalarOrSchedule = 1.0,
    *,
    norm: Norm = "mars",
    radius_learning_rate: checks.ScalarOrSchedule = 1e-2,
    state_dtype: DType = None,
    anchor: Anchor = "initial",
    anchor_dtype: DType = None,
    layers: LayerFn | None = None,
    mask: Mask = None,
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Fast Trainable Projection: keeps each layer in a ball of a radius learned from gradients.

    .. math::

        \theta_t = \theta_0 + \mathrm{clip}(\gamma_t / N_t, 0, 1)\, C_t, \qquad
        C_t = \theta_{t-1} + u - \theta_0

    Here C is how far the incoming update u would take the layer from its anchor, N the norm of each
    output unit of C, and γ the layer's radius: Adam moves it by the gradient of the training loss.

    The first step takes every row to within 1e-8 of its anchor, even if it started elsewhere. From
    then on the radius moves by about ``radius_learning_rate`` a step; it grows while, by the
    training gradient, a larger deviation lowers the loss. So a layer can go no further than about
    ``radius_learning_rate`` times the number of steps: mask out what has to move far, such as a new
    head. Place it last in the chain, after the learning rate.

    With ``anchor="zero"`` the first step zeroes the layer; for LoRA leave "initial", or mask A out.

    Args:
      k: κ in [0, 1], or a schedule of it: the factor on positive gradients of the radius, which
        shrink it. 1 constrains most; with 0 only the clip to the layer's largest norm shrinks a
        radius.
      norm: "mars" (each output unit by its own absolute row sum, as in the paper) or "l2".
      radius_learning_rate: of the radii's Adam, >= 0, or a schedule; in units of the norm a step.
      state_dtype: dtype to store C in; None for the parameters'. With bfloat16 C takes half of its
        float32 size; only the radii's gradient sees the rounding.
      anchor: θ₀, as for :func:`optax_spd.spd`.
      anchor_dtype: dtype to store the anchor in; None for its own.
      layers: what a layer is, and which axes are output units (:func:`optax_spd.outputs`).
      mask: True where FTP applies. Neither anchor nor C is stored where it does not.
      axis_name: for hand-split parameters under ``shard_map`` or ``pmap``; "mars" needs the
        arrays' PartitionSpecs here.

    Returns:
      A stage whose ``update`` needs ``params`` and the extra argument ``grad`` (the raw gradient;
      its scale matters little, since the radii's optimizer is Adam). Updates keep their structure
      and dtypes. The state holds the anchor and C, of the same size: 8 bytes a parameter in
      float32, 4 with bfloat16 for both, in addition to Adam's 8. ``ftp_radii`` holds γ: shape
      (layers,), the widest parameter dtype and at least float32, in the order of
      :func:`optax_spd.layer_names`, in units of the norm. Integer, empty, None and MaskedNode
      leaves pass through. Under ``optax.inject_hyperparams`` name in ``static_args`` those of
      ``layers``, ``mask``, ``anchor``, ``anchor_dtype`` and ``state_dtype`` that can be called:
      functions, Equinox models, dtypes as classes.

    Raises:
      TypeError: a complex parameter (in ``init``), a mask that is not bools, a wrong argument type.
      ValueError: ``k`` outside [0, 1], a negative ``radius_learning_rate``, an unknown norm or
        anchor (at construction); no params, no gradient, no anchor, trees or shapes that do not
        match (in ``update``).

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import optax_spd
      >>> params = {"bias": jnp.zeros(2)}
      >>> tx = optax_spd.chain(optax.sgd(1.0), optax_spd.ftp())
      >>> state = tx.init(params)
      >>> for _ in range(3):
      ...     updates, state = tx.update({"bias": jnp.array([1.0, -1.0])}, state, params)
      ...     params = optax.apply_updates(params, updates)
      ...     print(f"{jnp.sum(jnp.abs(params['bias'])):.4f}")  # the radius grows
      0.0000
      0.0074
      0.0160

    References:
      Tian et al., `Fast Trainable Projection for Robust Fine-Tuning
      <https://arxiv.org/abs/2310.19182>`_, NeurIPS 2023.

    .. seealso:: :func:`optax_spd.adam_ftp`, :func:`optax_spd.sgd_ftp`, :func:`optax_spd.tpgm`
    """
    checks.check_scalar("k", k, high=1.0)
    checks.check_scalar("radius_learning_rate", radius_learning_rate)
    balls.check_norm(norm, axis_name)
    options = stage.StageOptions(anchor, anchor_dtype, layers, mask, axis_name)
    if state_dtype is not None:
        state_dtype = checks.check_dtype("state_dtype", state_dtype)

    def init(params: PyTree) -> FTPState:
        plan, held = options.init(params)
        size, dtype = plan.vector_size, plan.dtype
        return FTPState(
            count=jnp.zeros((), jnp.int32),
            anchor=held,
            layer_fingerprint=fingerprints.of_plan(plan),
            ftp_deviation=stage.zeros_like_layers(params, plan, state_dtype),
            ftp_radii=jnp.zeros(size, dtype),
            ftp_moments=RadiusMoments(
                jnp.zeros(size, jnp.int32), jnp.zeros(size, dtype), jnp.zeros(size, dtype)
            ),
        )

    def update(
        updates: PyTree, state: FTPState, params: PyTree = None, **extra_args: Any
    ) -> tuple[PyTree, FTPState]:
        vectors = {"ftp_radii": state.ftp_radii}
        view = options.view(updates, state.anchor, params, extra_args, vectors)
        grad = wrappers.require_gradient(extra_args, "ftp")

        previous = view.match(state.ftp_deviation, "the state's ftp_deviation")
        current = view.map(lambda d: d.tentative)
        norms, slope = balls.norms_and_slope(
            norm, view.plan, view.axes, previous, current, view.match(grad, "grad")
        )
        largest = norms.largest + balls.EPS
        radii, moments = radius_update(
            state.ftp_radii,
            state.ftp_moments,
            slope,
            largest,
            checks.value_at(k, state.count, view.plan.dtype),
            checks.value_at(radius_learning_rate, state.count, view.plan.dtype),
        )
        # q² must be finite too: a second moment that overflows would freeze the radius for good.
        active = jnp.isfinite(slope**2) & jnp.isfinite(largest) & view.has_update
        radii, moments = jax.tree.map(
            lambda new, old: jnp.where(active, new, old),
            (radii, moments),
            (state.ftp_radii, state.ftp_moments),
        )
        factors = balls.factors(view.plan, radii, norms, active)
        second = recompute.second_pass(view, functools.partial(view.entries, active))
        steps = second.map(stage.project_step, factors)
        deviations = second.map(_next_deviation, view.spread(active), previous)
        return second.rebuild(steps), FTPState(
            count=optax.safe_increment(state.count),
            anchor=state.anchor,
            layer_fingerprint=state.layer_fingerprint,
            ftp_deviation=view.store(state.ftp_deviation, deviations),
            ftp_radii=radii,
            ftp_moments=moments,
        )

    return optax.GradientTransformationExtraArgs(init, update)


@jax.jit  # so that arrays of one shape share a trace
def _next_deviation(d: stage.Deviation, active: jax.Array, previous: jax.Array) -> jax.Array:
    """C for the next step; the previous one where the layer is not active."""
    current = sums.sharded_like(d.tentative, previous)
    return jnp.where(sums.sharded_like(active > 0, previous), current, previous)
