"""SIFT: sparse increment fine-tuning, which trains few entries of each layer.

Song, Li, Wang, Zhang: "Sparse is Enough in Fine-tuning Pre-trained Large Language Models", ICML
2024, https://arxiv.org/abs/2312.11875. In a layer of n entries, with g₀ the first gradient,

    k   = min(int(fraction n) + 1, n)
    S   = positions of the k largest |g₀|              fixed from then on
    θ_S ← θ_S + inner(g_S, θ_S)                         all other entries keep their value

The optimizer ``inner`` sees vectors of k numbers, so its state exists for these alone. SAFT and
GaLLoP, which are other sparse methods, choose by other scores. That is ``score=``.

Differences from the authors' code:

1. The first gradient chooses the entries and makes the first step. There it chooses and is dropped.
2. A step is made when its gradient arrives. There it waits in a vector of increments until the next
   backward pass, so that gradients are those of the step before, and the last step is lost.
3. All arrays choose at the same step. There the last array of the backward pass lags by one step,
   and never trains if the loop clears the model's gradients instead of the optimizer's.
4. Weight decay in ``inner`` decays θ_S. There it decays the vector of increments, which is zero.
5. Of equal scores the lowest positions are taken. There the order of equal ones is undefined.
6. A NaN is never chosen. There it counts as the largest.
7. Each slice of a stacked array is a layer and has its own k entries.
"""

import zlib
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from optax_spd import wrappers
from optax_spd.anchors import edit
from optax_spd.layers import checks, plans, trees
from optax_spd.layers.spec import LayerFn, check_layers
from optax_spd.layers.types import Mask, PyTree
from optax_spd.methods.sparse import selection
from optax_spd.methods.sparse.state import WithSparseState, layout_of, nested
from optax_spd.methods.sparse.view import Leaves, SparseView, view_of

ScoreFn = Callable[[str, jax.Array, jax.Array], jax.Array]
Score = Literal["gradient", "magnitude", "random"] | ScoreFn


def _random(path: str, _grad: jax.Array, param: jax.Array) -> jax.Array:
    # One seed for each path: the same entries on every machine and mesh, and in every run.
    key = jax.random.fold_in(jax.random.key(0), zlib.crc32(path.encode()))
    return jax.random.uniform(key, param.shape, jnp.float32)


SCORES: dict[str, ScoreFn] = {
    "gradient": lambda _, grad, _param: jnp.abs(grad),
    "magnitude": lambda _, _grad, param: jnp.abs(param),
    "random": _random,
}


def with_sparse(
    inner: optax.GradientTransformation,
    fraction: float,
    *,
    score: Score = "gradient",
    layers: LayerFn | None = None,
    mask: Mask = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Trains few entries of each layer, chosen by the first gradient, with state for these alone.

    In the first update the :math:`k = \min(\lfloor \text{fraction} \cdot n \rfloor + 1, n)` entries
    of each layer with the largest score are chosen, and stay:

    .. math::

        \theta_S \leftarrow \theta_S + \mathrm{inner}(g_S, \theta_S),
        \qquad S = \text{top-}k(|g_0|)

    All other entries keep their value. Adam's moments cost 8 · fraction bytes a parameter, the
    indices 4 · fraction, an anchor (:func:`optax_spd.spd`, :func:`optax_spd.l2_sp`,
    :func:`optax_spd.ftp` inside) another 4 · fraction. It does not save the gradient: JAX still
    computes all of it, and the update is an array like the parameter. Wrap the whole optimizer in
    it, so that the incoming updates are the gradient.

    Args:
      inner: any transformation, usually a whole optimizer. It sees nested dicts with the paths of
        the arrays that are trained, each a vector: shape (k,), or (sizes of the stacked axes, k).
        So its own ``layers=`` has stacked axes first, ``optax_spd.stacked(pattern, axis=0)``,
        whichever axis they are here; output axes play no role, a vector is one row. Patterns match
        as ever; a tree like params (``mask=``, labels, ``anchor=``) does not fit.
      fraction: of the entries, from 0 to 1; at least one a layer is chosen.
      score: which entries count most,

        - "gradient": \|g\|, with g the ``grad=`` of the update, else the incoming update;
        - "magnitude": \|θ\|;
        - "random": uniform, from a fixed seed and the array's path. So a scanned and an unrolled
          model, whose paths differ, choose other entries;
        - a function (path, grad, param) -> scores, three arrays of one shape.

        Of equal scores the entry first in C order is chosen. A NaN is never chosen: if fewer than k
        scores are numbers, fewer entries are trained.
      layers: what a layer is, see :func:`optax_spd.stacked`; None for one per array. Each array
        chooses by itself, in a group (:func:`optax_spd.by_module`) too.
      mask: True where the method applies; all other arrays keep their value, without any state.

    Returns:
      A transformation that needs ``params``. It passes extra arguments on to ``inner``: ``grad=``
      and ``anchor=`` at the chosen entries, ``validation_fn=`` and ``value_fn=`` as functions of
      them. Updates keep their structure and dtypes; those of integer and empty arrays are zero,
      None and MaskedNode stay. An array without an update in the first step is never trained. The
      state holds ``sparse_indices``
      (:func:`optax_spd.sparse_mask` shows them), and ``inner``'s state, which is made anew from the
      chosen values: an anchor inside is what the parameters are in the first update, not what they
      were at ``init``. :func:`optax_spd.set_anchor` takes a whole tree. Called before the first
      update, it keeps all of it in the state, until it is called again after that. Everything in
      the state is whole on each device, and no part of it is parameter-like for
      ``optax.tree.map_params``. ``shard_map`` is an error, since each device would choose from its
      own part: use ``jit``. (It is not detected with ``check_vma=False``, nor under ``pmap``.)

    Raises:
      TypeError: ``inner`` is not a transformation; a traced ``fraction``; a complex parameter; a
        mask that is not bools.
      ValueError: ``fraction`` outside [0, 1], an unknown ``score``; a layer of more than
        2,147,483,647 entries (in ``init``); scores of another shape, or complex; no params; a
        state of other parameters, or without its anchor (in ``update``).

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import optax
      >>> import optax_spd
      >>> params = {"kernel": jnp.ones((4, 5))}
      >>> tx = optax_spd.with_sparse(optax_spd.adam_spd(0.5), fraction=0.1)
      >>> state = tx.init(params)
      >>> updates, state = tx.update({"kernel": jnp.arange(20.0).reshape(4, 5)}, state, params)
      >>> optax.tree.get(state, "sparse_indices")
      {'kernel': Array([17, 18, 19], dtype=int32)}
      >>> updates["kernel"][3].round(2)
      Array([ 0. ,  0. , -0.5, -0.5, -0.5], dtype=float32)

    References:
      Song et al., `Sparse is Enough in Fine-tuning Pre-trained Large Language Models
      <https://arxiv.org/abs/2312.11875>`_, ICML 2024.

    .. seealso:: :func:`optax_spd.with_frozen`, which leaves out whole arrays
    """
    inner = wrappers.as_transformation("with_sparse", inner)
    checks.check_static("fraction", fraction)
    checks.check_scalar("fraction", fraction, high=1.0)
    if not callable(score) and score not in SCORES:
        allowed = ", ".join(map(repr, SCORES))
        raise ValueError(
            f"score must be one of {allowed} or a function (path, grad, param) -> scores, "
            f"got {score!r}."
        )
    check_layers(layers)
    inner = optax.with_extra_args_support(inner)
    scores = score if callable(score) else SCORES[score]

    def init(params: PyTree) -> WithSparseState:
        count, no_anchor = jnp.zeros((), jnp.int32), optax.EmptyState()
        flat, plan, _ = plans.planned(params, layers, mask)
        if not flat.leaves:
            # Optax's params placeholder. What the state holds has other shapes than the parameters
            # and must not get their shardings.
            return WithSparseState(count, 0, 0, no_anchor, 0)
        indices, layouts, values = {}, {}, {}
        for path, leaf, entry in zip(flat.paths, flat.leaves, plan.arrays, strict=True):
            if entry is None:
                continue
            k = selection.entries_per_layer(path, leaf, entry, fraction)
            size = selection.layer_size(jnp.shape(leaf), entry.stacked_axes)
            indices[path] = _filled(leaf, (*entry.stacked_shape, k), jnp.int32, size)
            values[path] = _filled(leaf, (*entry.stacked_shape, k), jnp.result_type(leaf), 0)
            if jnp.ndim(leaf):
                layouts[path] = layout_of(jnp.shape(leaf), entry)
        inner_state = inner.init(nested(values))
        return WithSparseState(count, nested(indices), nested(layouts), no_anchor, inner_state)

    def update(
        updates: PyTree, state: WithSparseState, params: PyTree = None, **extra_args: Any
    ) -> tuple[PyTree, WithSparseState]:
        held = trees.flatten(state.sparse_indices).by_path
        if not jax.tree.leaves(params) and params is not None:
            return updates, state
        view = view_of(updates, params, held, fraction=fraction, layers=layers, mask=mask)
        whole = {
            name: view.whole(extra_args[name], name)
            for name in ("grad", "anchor")
            if extra_args.get(name) is not None
        }

        def choose() -> tuple[dict[trees.Path, jax.Array], PyTree]:
            indices = held | _chosen(view, whole.get("grad", view.updates), held, scores)
            inner_state = _initial(inner, state.inner_state, view.vectors(view.theta, indices))
            if not isinstance(state.anchor, optax.EmptyState):
                anchor = trees.flatten(state.anchor).by_path
                inner_state = edit.set_anchor(inner_state, view.vectors(anchor, indices))
            return indices, inner_state

        indices, inner_state = jax.lax.cond(
            state.count == 0, choose, lambda: (held, state.inner_state)
        )
        extra_args |= {name: view.vectors(leaves, indices) for name, leaves in whole.items()}
        extra_args |= {
            name: view.of_entries(extra_args[name], params, indices)
            for name in ("validation_fn", "value_fn")
            if callable(extra_args.get(name))
        }
        steps, inner_state = inner.update(
            view.vectors(view.updates, indices),
            inner_state,
            view.vectors(view.theta, indices),
            **extra_args,
        )
        count = optax.safe_increment(state.count)
        return view.rebuild(updates, steps, indices), WithSparseState(
            count, nested(indices), state.sparse_layout, state.anchor, inner_state
        )

    return optax.GradientTransformationExtraArgs(init, update)


def _filled(like: Any, shape: tuple[int, ...], dtype: Any, value: int) -> Any:
    """A constant array that is whole on each device of the parameter ``like``."""
    # A tracer's sharding is not known.
    sharding = None if isinstance(like, jax.core.Tracer) else getattr(like, "sharding", None)
    whole = None
    if isinstance(sharding, NamedSharding):
        whole = NamedSharding(sharding.mesh, PartitionSpec())
    if isinstance(like, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=whole)
    array = jnp.full(shape, value, dtype)
    return array if whole is None else jax.device_put(array, whole)


def _chosen(
    view: SparseView, grads: Leaves, held: Leaves, scores: ScoreFn
) -> dict[trees.Path, jax.Array]:
    """The indices of the entries with the largest scores, where there are updates."""
    choices: dict[trees.Path, selection.Choice] = {}
    never = None
    for path in view.present:
        grad, param = grads[path], view.theta[path]
        if never is not None:
            # One array after the other, so that this takes the memory of the largest alone. XLA
            # cannot know that this is False, and XLA:CPU removes barriers before it schedules.
            grad, param = (jax.lax.select(never, jnp.zeros_like(x), x) for x in (grad, param))
        found = _checked_scores(scores, path, grad, param)
        choices[path] = selection.choose(found, held[path].shape[-1], view.stacked_axes[path])
        never = jax.lax.population_count(choices[path].above[0, 0]) > selection.WORD
    positions = selection.positions(choices)
    return {path: found.reshape(held[path].shape) for path, found in positions.items()}


def _checked_scores(
    scores: ScoreFn, path: trees.Path, grad: jax.Array, param: jax.Array
) -> jax.Array:
    """The scores of an array, in at least float32; also integers and bools are scores."""
    name = trees.path_name(path)
    found = jnp.asarray(scores(name, grad, param))
    is_real = any(
        jnp.issubdtype(found.dtype, kind) for kind in (jnp.floating, jnp.integer, jnp.bool_)
    )
    if found.shape != param.shape or not is_real:
        raise ValueError(
            f"score must give one real number for each entry: for {name!r} of shape {param.shape} "
            f"it gave {found.dtype}{list(found.shape)}."
        )
    return found.astype(plans.compute_dtype(found))


def _initial(inner: optax.GradientTransformation, held: PyTree, values: PyTree) -> PyTree:
    """The inner state, with all that ``init`` makes of the parameters' values made of these.

    ``init`` got zeros. What it makes of values is where it makes something else of zeros; the rest
    keeps what it holds: hyperparameters that were changed since, counts that were set.
    """
    of_values, of_zeros = inner.init(values), inner.init(jax.tree.map(jnp.zeros_like, values))
    structures = {jax.tree.structure(tree) for tree in (held, of_values)}
    if len(structures) > 1:
        raise ValueError(
            "The inner state of with_sparse has another structure than init gives it. Either the "
            "anchor was dropped; call set_anchor(state, pretrained_params) before the next update. "
            "Or the state was restored for another optimizer."
        )

    def merged(old: Any, new: Any, zero: Any) -> Any:
        if jnp.shape(old) != jnp.shape(new):
            return old  # the inner stage tells what does not fit
        if jnp.result_type(new) != jnp.result_type(old):  # a random key cannot be cast
            new = jnp.asarray(new, jnp.result_type(old))
        return jnp.where(new == zero, old, new)

    return jax.tree.map(merged, held, of_values, of_zeros)
