"""Fast Trainable Projection (FTP).

Tian, Liu, Smith, Kira: "Fast Trainable Projection for Robust Fine-Tuning", NeurIPS 2023,
https://arxiv.org/abs/2310.19182, Algorithm 1; the authors' code: GT-RIPL/FTP. TPGM's radii, learned
without a validation pass: the training gradient at the projected weights takes the place of the
validation gradient one step later. For each layer with parameters θ, anchor θ₀, raw gradient g and
the inner optimizer's step u, at its step t, with rows j as in :mod:`optax_spd.core.balls`:

    C_t = θ_{t-1} + u - θ₀                               the unconstrained deviation
    N_t,j = Σ |C_t,j| + 1e-8                              (l2: ‖C_t‖ + 1e-8, one for the layer)
    q = Σ_j ⟨g_j, C_{t-1},j⟩ / N_{t-1},j                  the gradient of the loss in γ
    q = κ q  if q > 0                                     gradient annealing
    γ_t = clip(AdamUpdate(γ_{t-1}, q), 1e-8, max_j N_t,j)   γ_1 = 1e-8
    θ_t = θ₀ + clip(γ_t / N_t, 0, 1) C_t

κ (``k``) = 1 is the paper's default; κ < 1 slows the shrinking of radii, κ = 0 leaves only the
clip to shrink them.

Differences from the authors' code:

1. It is a stage behind any optimizer and not an Adam or SGD of its own; behind ``optax.adam`` and
   ``optax.sgd`` the numbers are the same.
2. Each layer counts its own steps. In the original one counter walks over a list of all layers'
   radii, and a missing gradient makes them change places.
3. Row norms of C_{t-1} are computed again from C_{t-1} and not stored beside it; in
   ``state_dtype`` it is rounded first.
4. A layer whose q² or N_t is not finite keeps the inner optimizer's update, and its radius, moments
   and C stay those of its last step (in the original NaN stays forever).
5. Sums are taken in at least float32 whatever the parameters' dtype: in bfloat16 a row's sum has
   no digits left.
6. ``norm="l2"``, for comparison with TPGM's; the original has MARS only. The radii's learning rate,
   a constant 1e-2 there, is an argument, since it bounds how far a short run can go; it and k may
   be schedules.
7. A layer may be a slice of an array or several arrays, and rows lie on any axis (``layers=``),
   since JAX stacks layers and keeps output units last.
8. The update of a row inside the ball passes through by a select, so it is exactly u.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_spd import wrappers
from optax_spd.anchors import policy
from optax_spd.core import balls, recompute, stage, sums
from optax_spd.layers import checks, fingerprints
from optax_spd.layers.spec import LayerFn

PyTree = Any

# The Adam of the radii; fixed in the original, whatever the inner optimizer's.
B1 = 0.9
B2 = 0.999


class RadiusMoments(NamedTuple):
    """Adam's memory of the radii, one entry per layer.

    Attributes:
      steps: how many steps the layer has taken part in, int32.
      first: moment of q. (Not Adam's names: they would hide its moments from ``optax.tree.get``.)
      second: moment of q.
    """

    steps: jax.Array
    first: jax.Array
    second: jax.Array


@policy.holds_anchor
class FTPState(NamedTuple):
    """State of :func:`ftp`.

    Attributes:
      count: number of updates so far, int32; what scheduled arguments are evaluated at.
      anchor: θ₀, a tree like params, or ``optax.EmptyState()`` if none is held.
      layer_fingerprint: tells for which layers the vectors are (:func:`optax_spd.check_state`).
      ftp_deviation: C of each layer's last step, a tree like params; MaskedNode where there is no
        layer.
      ftp_radii: γ after the last update, one entry per layer in ``layer_names`` order.
      ftp_moments: what the radii's Adam remembers.
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
    """AdamUpdate of Algorithm 1 and the clip behind it, for one layer or a vector of layers.

    Args:
      radius: γ_{t-1}.
      moments: of the steps before.
      slope: q, before annealing.
      largest: max_j N_t,j.
      k: κ.
      learning_rate: of the radii.

    Returns:
      γ_t and the moments after the step. In a layer's first step γ = 1e-8, whatever ``largest``
      is, and both moments stay 0; its second step, the first of this Adam, is corrected for t = 2.
    """
    slope = jnp.where(slope > 0, k * slope, slope)
    steps = moments.steps + 1
    mu = B1 * moments.first + (1 - B1) * slope
    nu = B2 * moments.second + (1 - B2) * slope**2
    t = steps.astype(radius.dtype)
    # 1 - b^t by expm1: in float32 the textbook form has no digits to spare at small t.
    mu_hat = mu / -jnp.expm1(t * math.log(B1))
    nu_hat = nu / -jnp.expm1(t * math.log(B2))
    moved = radius - learning_rate * mu_hat / (sums.norm_of(nu_hat) + balls.EPS)
    clipped = jnp.minimum(jnp.maximum(moved, balls.EPS), largest)

    begins = moments.steps == 0
    return jnp.where(begins, balls.EPS, clipped), RadiusMoments(
        steps, jnp.where(begins, 0, mu), jnp.where(begins, 0, nu)
    )


def ftp(
    k: checks.ScalarOrSchedule = 1.0,
    *,
    norm: str = "mars",
    radius_learning_rate: checks.ScalarOrSchedule = 1e-2,
    state_dtype: Any = None,
    anchor: Any = "initial",
    anchor_dtype: Any = None,
    layers: LayerFn | None = None,
    mask: Any = None,
    axis_name: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Fast Trainable Projection: keeps each layer in a ball whose radius is learned in passing.

    .. math::

        \theta_t = \theta_0 + \mathrm{clip}(\gamma_t / N_t, 0, 1)\, C_t, \qquad
        C_t = \theta_{t-1} + u - \theta_0

    The first step takes every row to within 1e-8 of its anchor, also one that started elsewhere;
    from then on the radius moves by about ``radius_learning_rate`` a step, up while the training
    gradient says that going further along the last deviation lowers the loss. So a layer can go no
    further than about ``radius_learning_rate`` times the number of steps: mask out what has to
    move far, such as a new head. It stands last in the chain, after the learning rate.

    With ``anchor="zero"`` the first step zeroes the layer; for LoRA leave "initial", or mask A out.

    Args:
      k: κ in [0, 1], or a schedule of it: what positive gradients of the radius, those that shrink
        it, are multiplied by. 1 constrains most; with 0 only the clip to the layer's largest norm
        shrinks a radius.
      norm: "mars" (each output unit by its own absolute row sum, as in the paper) or "l2".
      radius_learning_rate: of the radii's Adam, >= 0, or a schedule; in units of the norm a step.
      state_dtype: dtype to store C in; None for the parameters'. bfloat16 halves what C costs in
        float32; only the radii's gradient sees the rounding.
      anchor: θ₀, as for :func:`optax_spd.spd`, as all that follow.
      anchor_dtype: dtype to store the anchor in; None for its own.
      layers: what a layer is, and which axes count its output units
        (:func:`optax_spd.outputs`).
      mask: True where FTP applies. Neither anchor nor C is stored where it does not.
      axis_name: for hand-split parameters under ``shard_map`` or ``pmap``; "mars" needs the
        arrays' PartitionSpecs here.

    Returns:
      A stage whose ``update`` needs ``params`` and the extra argument ``grad`` (the raw gradient;
      its size matters little, as Adam's does). Updates keep their structure and dtypes. The state
      holds the anchor and, of the same size, C: 8 bytes a parameter in float32, 4 with bfloat16
      for both, beside Adam's 8. ``ftp_radii`` are the γ: shape (layers,), the widest parameter
      dtype and at least float32, in the order of :func:`optax_spd.layer_names`, in units of the
      norm. Integer, empty, None and MaskedNode leaves pass through. Under
      ``optax.inject_hyperparams`` name ``norm``, ``state_dtype``, ``anchor``, ``anchor_dtype``,
      ``layers``, ``mask`` and ``axis_name`` in ``static_args``.

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
        view = options.view(updates, state.anchor, params, extra_args)
        grad = wrappers.require_gradient(extra_args, "ftp")
        stage.check_vector("ftp_radii", state.ftp_radii, view.plan)

        previous = view.match(state.ftp_deviation, "the state's ftp_deviation")
        current = view.map(lambda d: d.tentative)
        now, slope = balls.norms_and_slope(
            norm, view.plan, view.axes, previous, current, view.match(grad, "grad")
        )
        largest = now.largest + balls.EPS
        radii, moments = radius_update(
            state.ftp_radii,
            state.ftp_moments,
            slope,
            largest,
            checks.value_at(k, state.count, view.plan.dtype),
            checks.value_at(radius_learning_rate, state.count, view.plan.dtype),
        )
        # q² and not q: a second moment that overflows would hold the radius still for good.
        active = jnp.isfinite(slope**2) & jnp.isfinite(largest) & view.has_update
        radii, moments = jax.tree.map(
            lambda new, old: jnp.where(active, new, old),
            (radii, moments),
            (state.ftp_radii, state.ftp_moments),
        )
        factors = balls.factors(view.plan, radii, now, active)
        second = recompute.second_pass(view, active)
        steps = second.map(stage.project_step, factors)
        kept = second.map(_kept, view.spread(active), previous)
        return second.rebuild(steps), FTPState(
            count=optax.safe_increment(state.count),
            anchor=state.anchor,
            layer_fingerprint=state.layer_fingerprint,
            ftp_deviation=view.store(state.ftp_deviation, kept),
            ftp_radii=radii,
            ftp_moments=moments,
        )

    return optax.GradientTransformationExtraArgs(init, update)


def _kept(d: stage.Deviation, active: jax.Array, previous: jax.Array) -> jax.Array:
    """C for the next step; the last one where the layer was not active."""
    return jnp.where(sums.sharded_like(active > 0, previous), d.tentative, previous)
