"""Trainable Projected Gradient Method (TPGM): radii around the anchor, learned on validation data.

Tian, Dai, Ma, He, Liu, Kira: "Trainable Projected Gradient Method for Robust Fine-tuning",
CVPR 2023, https://arxiv.org/abs/2303.10720, Algorithm 1 and 2; the authors' code: PotatoTian/TPGM.
Each layer is kept in a ball around its anchor, and the radii γ of the balls are learned on
validation data, with the weights held fixed. For each layer with parameters θ, anchor θ₀ and the
inner optimizer's step u, with rows j and norms n_j as in :mod:`optax_spd.core.balls`:

    Δ̃ = θ + u - θ₀                              where the inner optimizer would take it
    γ = min_j n_j / 2                            initially
    for each validation batch:                   the bi-level loop, every ``every`` updates
        γ = clip(γ, 1e-8, max_j n_j)
        Π(γ)_j = θ₀,j + clip(γ / (n_j + 1e-8), 0, 1) Δ̃_j
        γ = Optimizer(γ, ∂L_validation(Π(γ)) / ∂γ)
    γ = clip(γ, 1e-8, max_j n_j)
    θ' = Π(γ)

Differences from the authors' code:

1. It is a stage behind any optimizer, not a class that iterates over a model. ``mask=`` replaces
   their list of excluded layers.
2. ∂L/∂γ is written out (:meth:`optax_spd.core.bilevel.Constraint.radius_gradient`). As in their
   code n and Δ̃ are constants, and no gradient flows where γ/(n + 1e-8) is exactly 1.
3. A layer that has not moved has radius 0, and its radius starts when it first moves. Their code
   raises an exception for it in current PyTorch.
4. A loss or gradient that is not finite leaves the radii as they are. A layer whose Δ̃ is not finite
   keeps the inner optimizer's update (in the original NaN stays forever).
5. Sums have at least float32 whatever the parameters' dtype: in bfloat16 a row's sum would lose all
   its digits.
6. A layer may be a slice of an array or several arrays, and rows lie on any axis (``layers=``),
   since JAX stacks layers and keeps output units last.
7. With ``radii=`` and no validation data the radii stay as given. In their code every projection
   also lowers the radii to the largest norm, so they would shrink to that of the first step.
8. The caller passes the loss and sets evaluation mode. Their code copies the model, switches the
   copy to evaluation mode and uses cross-entropy.
9. The caller passes the batches of each call, since a pure function cannot hold a data loader.
   Their loader continues where it stopped. ``every=k`` replaces calling theirs every k steps.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_spd.core import balls, bilevel, recompute, stage, sums
from optax_spd.layers import checks, fingerprints, trees
from optax_spd.layers.spec import LayerFn
from optax_spd.layers.types import Anchor, AxisName, DType, Mask, Norm, PyTree


class TPGMState(NamedTuple):
    """State of :func:`tpgm`.

    Attributes:
      count: number of updates so far, int32; what ``every`` refers to.
      anchor: θ₀, a tree like params, or ``optax.EmptyState()`` if none is held.
      layer_fingerprint: identifies the layers of the vectors (:func:`optax_spd.check_state`).
      tpgm_radii: γ after the last update, one entry per layer in ``layer_names`` order.
      tpgm_started: per layer whether its radius has started, bool.
      radius_state: state of the radii's optimizer.
    """

    count: jax.Array  # type: ignore[assignment]  # shadows tuple.count, as in Optax
    anchor: PyTree
    layer_fingerprint: jax.Array
    tpgm_radii: jax.Array
    tpgm_started: jax.Array
    radius_state: PyTree


def tpgm(
    radius_optimizer: optax.GradientTransformation | None = None,
    *,
    norm: Norm = "mars",
    every: int = 1,
    radii: jax.typing.ArrayLike | None = None,
    anchor: Anchor = "initial",
    anchor_dtype: DType = None,
    layers: LayerFn | None = None,
    mask: Mask = None,
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Trainable Projected Gradient Method: radii around the anchor, learned on validation data.

    .. math::

        \theta' = \theta_0 + \min\left(1, \frac{\gamma}{n}\right) \tilde\Delta, \qquad
        \gamma \leftarrow \mathrm{Adam}\left(\gamma,
        \frac{\partial L_{\mathrm{val}}(\theta')}{\partial \gamma}\right)

    Here :math:`\tilde\Delta = \theta + u - \theta_0` is how far the incoming update u would take
    the layer from its anchor, n its norm (of each output unit, or of the layer), and γ the layer's
    radius, which descends the validation loss.

    Pass the validation objective to ``update``, as extra arguments:

    - ``validation_fn``: (params, batch) -> scalar loss. It gets the full parameter tree: layers are
      projected, and arrays outside ``mask`` have their tentative values θ + u. Write it for
      evaluation mode (no dropout, frozen statistics).
    - ``validation_batches``: a tree of arrays with a leading axis, one entry per inner step. Draw
      new ones for every call, from the distribution that you tune hyperparameters on.

    Without both it only clips and projects. Then the radii start at half of the *first* step's
    smallest row norm and never grow, which a ``UserWarning`` says: give ``radii=`` to project onto
    fixed balls. Place it last in the chain, after the learning rate.

    Args:
      radius_optimizer: updates the radii, as one vector; None for ``optax.adam(1e-2)``. Its
        learning rate is in units of the norm a step and may be a schedule of inner steps. It gets
        the validation loss as ``value=``, but cannot reevaluate it (no line searches).
      norm: "mars" (each output unit by its own absolute row sum) or "l2".
      every: learn on updates 0, every, 2 every, ...; the others only project and do not run
        ``validation_fn``.
      radii: initial radii: a scalar, or one per layer in :func:`optax_spd.layer_names` order; None
        for half the smallest row norm of the layer's first deviation. Without validation data they
        stay as given. With it they are clipped to the layer's largest norm like any radius, so
        with a larger value the first step is taken in full.
      anchor: θ₀, as for :func:`optax_spd.spd`.
      anchor_dtype: dtype to store the anchor in; None for its own.
      layers: what a layer is, and which axes are output units (:func:`optax_spd.outputs`).
      mask: True where TPGM applies. Do not use ``optax.masked`` instead: inside it the stage cannot
        see the full tree that ``validation_fn`` needs.
      axis_name: for hand-split parameters under ``shard_map`` or ``pmap``; "mars" needs the
        arrays' PartitionSpecs here. ``validation_fn`` must then return the loss of all devices.

    Returns:
      A stage whose ``update`` needs ``params``. Updates keep their structure and dtypes. The state
      holds the anchor (4 bytes a parameter in float32) and per-layer vectors only. ``tpgm_radii``
      holds γ: shape (layers,), the widest parameter dtype and at least float32, in units of the
      norm. An update that learns needs memory for one more copy of the parameters (their
      projection), and for ``validation_fn`` and its gradient. Under ``optax.inject_hyperparams``
      name in ``static_args`` those of ``layers``, ``mask``, ``anchor`` and ``anchor_dtype`` that
      can be called: functions, Equinox models, dtypes as classes. Inside ``optax.MultiSteps``
      validation runs on every micro-step; see the documentation for how to avoid it.

    Raises:
      TypeError: a complex parameter (in ``init``), a mask that is not bools, a wrong argument type.
      ValueError: ``every`` < 1, negative ``radii``, an unknown norm or anchor (at construction); no
        params, no anchor, trees or shapes that do not match, ``validation_batches`` without a
        common leading axis, a ``validation_fn`` that does not return a scalar or that comes
        without batches or inside ``optax.masked`` or ``partition`` (in ``update``).

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import optax_spd
      >>> params = {"bias": jnp.zeros(2)}
      >>> tx = optax.chain(optax.sgd(1.0), optax_spd.tpgm(optax.sgd(0.1), norm="l2"))
      >>> state = tx.init(params)
      >>> updates, state = tx.update(
      ...     {"bias": jnp.array([-3.0, -4.0])}, state, params,
      ...     validation_fn=lambda params, batch: jnp.sum((params["bias"] - batch) ** 2),
      ...     validation_batches=jnp.ones((10, 2)))
      >>> print(f"{state[1].tpgm_radii[0]:.2f}")  # from 2.5 to where (3, 4) r is nearest to (1, 1)
      1.52

    References:
      Tian et al., `Trainable Projected Gradient Method for Robust Fine-tuning
      <https://arxiv.org/abs/2303.10720>`_, CVPR 2023.

    .. seealso:: :func:`optax_spd.adam_tpgm`, :func:`optax_spd.fit_radii`, :func:`optax_spd.ftp`
    """
    optimizer = bilevel.checked_optimizer(radius_optimizer)
    balls.check_norm(norm, axis_name)
    options = stage.StageOptions(anchor, anchor_dtype, layers, mask, axis_name)
    checks.check_count("every", every)
    if radii is not None:
        balls.check_radii(radii)

    def init(params: PyTree) -> TPGMState:
        plan, held = options.init(params)
        start = jnp.zeros(plan.vector_size, plan.dtype)
        # Optax's params placeholder has no layers, so a vector of radii would not fit it.
        if radii is not None and plan.names:
            # A copy, so that donating the state does not donate the caller's array.
            start = jnp.array(sums.per_layer("radii", radii, plan))
        return TPGMState(
            count=jnp.zeros((), jnp.int32),
            anchor=held,
            layer_fingerprint=fingerprints.of_plan(plan),
            tpgm_radii=start,
            tpgm_started=jnp.zeros(plan.vector_size, bool),
            radius_state=optimizer.init(jnp.zeros_like(start)),
        )

    def update(
        updates: PyTree, state: TPGMState, params: PyTree = None, **extra_args: Any
    ) -> tuple[PyTree, TPGMState]:
        vectors = {"tpgm_radii": state.tpgm_radii}
        view = options.view(updates, state.anchor, params, extra_args, vectors)
        validate = _validation(view, params, extra_args)

        tentative = view.map(lambda d: d.tentative)
        (norms,) = balls.ball_norms(norm, view.plan, view.axes, tentative)
        active = jnp.isfinite(norms.largest) & view.has_update
        constraint = bilevel.Constraint(view.plan, tentative, norms, active, view.axes)
        initial = None if radii is None else sums.per_layer("radii", radii, view.plan)
        start, started = constraint.started(state.tpgm_radii, state.tpgm_started, initial)

        def learn() -> tuple[jax.Array, PyTree]:
            learned = bilevel.learn_radii(
                constraint,
                *validate,  # type: ignore[misc]
                optimizer=optimizer,
                radii=start,
                optimizer_state=state.radius_state,
            )
            return learned.radii, learned.optimizer_state

        def only_clip() -> tuple[jax.Array, PyTree]:
            return constraint.clipped(start), state.radius_state

        if validate is None and radii is not None:
            new_radii, radius_state = start, state.radius_state
        elif validate is None:
            _warn_of_no_learning(view)
            new_radii, radius_state = only_clip()
        elif isinstance(every, int) and every == 1:
            new_radii, radius_state = learn()
        else:
            new_radii, radius_state = jax.lax.cond(state.count % every == 0, learn, only_clip)

        factors = constraint.factors(new_radii)
        second = recompute.second_pass(view, functools.partial(view.entries, active))
        return second.rebuild(second.map(stage.project_step, factors)), TPGMState(
            count=optax.safe_increment(state.count),
            anchor=state.anchor,
            layer_fingerprint=state.layer_fingerprint,
            tpgm_radii=new_radii,
            tpgm_started=started,
            radius_state=radius_state,
        )

    return optax.GradientTransformationExtraArgs(init, update)


def _warn_of_no_learning(view: stage.StageView) -> None:
    """Warns that an update without validation data and without ``radii=`` learns nothing."""
    if any(deviation is not None for deviation in view.deviations):
        checks.warn(
            "update got no validation data, so tpgm only projects and learns no radii. If no "
            "update gets any, no radius exceeds half of its layer's first deviation, and the "
            "layers are held near their anchor. Pass validation_fn= and validation_batches= to "
            "update, or give fixed balls: optax.chain(optimizer, optax_spd.tpgm(radii=...))."
        )


def _validation(view: stage.StageView, params: PyTree, extra_args: dict[str, Any]) -> Any:
    """``loss_fn``, ``place`` and ``batches`` for :func:`bilevel.learn_radii`.

    None if ``update`` got no validation data.
    """
    validation_fn: Any = extra_args.get("validation_fn")
    batches = extra_args.get("validation_batches")
    if validation_fn is None and batches is None:
        return None
    if validation_fn is None or batches is None:
        raise ValueError(
            f"update got {'validation_fn' if batches is None else 'validation_batches'} but no "
            f"{'validation_batches' if batches is None else 'validation_fn'}. Pass both to learn "
            "the radii, or neither to project only."
        )
    bilevel.check_validation(validation_fn, batches)
    for path, leaf in zip(view.flat.paths, view.flat.leaves, strict=True):
        if isinstance(leaf, optax.MaskedNode):
            raise ValueError(
                f"validation_fn needs the full parameter tree, but params is masked at "
                f"{trees.shown(path)}: tpgm is inside optax.masked or optax.partition. Put it "
                "outside and give it mask= (optax.chain(optax.masked(...), tpgm(mask=...)))."
            )
    others = {
        path: stage.applied(theta, u)
        for path, theta, u, d in zip(
            view.flat.paths, view.flat.leaves, view.updates, view.deviations, strict=True
        )
        if d is None and not trees.is_missing(theta) and not trees.is_missing(u)
    }

    def place(factors: bilevel.Leaves) -> bilevel.Leaves:
        return view.map(
            lambda d, f, theta: stage.applied(theta, stage.project_step(d, f)),
            factors,
            view.flat.leaves,
        )

    def loss_fn(projected: bilevel.Leaves, batch: PyTree) -> jax.Array:
        layered = {
            path: leaf
            for path, leaf in zip(view.flat.paths, projected, strict=True)
            if leaf is not None
        }
        full = trees.replace_leaves(params, {**others, **layered})
        return bilevel.scalar_loss(validation_fn, full, batch)

    return loss_fn, place, batches
