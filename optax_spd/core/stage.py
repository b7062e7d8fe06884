"""Tree handling shared by all stages: match the caller's trees by leaf, and rebuild the updates.

A method's module holds its equations. This one finds the arrays that the method changes and their
anchor, and puts the results back into the caller's tree.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_spd.anchors import policy
from optax_spd.core import sums
from optax_spd.layers import plans, trees
from optax_spd.layers.spec import LayerFn, check_layers
from optax_spd.layers.types import Anchor, AxisName, DType, Mask, PyTree
from optax_spd.sharding import manual_axes, placement


class CountState(NamedTuple):
    """State of a stage that keeps nothing else.

    Attributes:
      count: number of updates so far, int32; what schedules are evaluated at.
    """

    count: jax.Array  # type: ignore[assignment]  # shadows tuple.count, as in Optax


class Deviation(NamedTuple):
    """An array's deviation from its anchor, and its step, both in at least float32.

    Attributes:
      delta: Δ = θ - θ₀.
      step: u, the incoming update.
    """

    delta: jax.Array
    step: jax.Array

    @property
    def tentative(self) -> jax.Array:
        """Δ̃ = Δ + u, where the inner optimizer would take the deviation."""
        return self.delta + self.step


@dataclasses.dataclass(frozen=True)
class StageView:
    """A stage's trees in one update, as lists of leaves in the order of the parameters.

    A leaf is *active* if the method may change it: it is a layer under the mask, and has an update.

    Attributes:
      plan: the layers.
      flat: the parameters; missing leaves included.
      updates: the incoming updates' leaves; missing leaves included.
      deviations: per active leaf its Deviation, else None.
      anchor: per active leaf θ₀, in device or host memory; else None.
      axes: per leaf the mesh axes that split it by hand, or None.
      tree: the incoming updates as a tree.
      recomputed_updates: the incoming updates recomputed for the second pass, or None.
    """

    plan: plans.LayerPlan
    flat: trees.FlatTree
    updates: list[Any]
    deviations: list[Deviation | None]
    anchor: list[Any]
    axes: list[manual_axes.MeshAxes] | None
    tree: PyTree
    recomputed_updates: PyTree = None

    def match(self, tree: PyTree, what: str) -> list[jax.Array | None]:
        """Per active leaf the leaf of ``tree``, in the deviation's dtype; else None."""
        leaves = trees.align(self.flat, tree, what)
        matched: list[jax.Array | None] = []
        for path, leaf, deviation in zip(self.flat.paths, leaves, self.deviations, strict=True):
            if deviation is None:
                matched.append(None)
                continue
            if trees.is_missing(leaf):
                raise ValueError(
                    f"{what} is {leaf!r} at {trees.shown(path)}, where the update is an array. "
                    f"Pass the whole {what}."
                )
            matched.append(trees.as_real(leaf, deviation.delta.dtype, what, path))
        return matched

    def spread(self, vector: jax.Array) -> list[jax.Array | None]:
        """A per-layer vector's entries, shaped to broadcast against each array, in its dtype."""
        return sums.spread_over(self.plan, vector, self.map(lambda d: d.delta))

    def entries(self, vector: jax.Array, index: int) -> jax.Array:
        """A per-layer vector's entries for one active leaf, shaped to broadcast against it."""
        entry, deviation = self.plan.arrays[index], self.deviations[index]
        assert entry is not None
        assert deviation is not None
        return sums.spread(entry, vector, deviation.delta.ndim)

    def map(self, function: Callable[..., Any], *matched: Sequence[Any]) -> list[Any]:
        """Per active leaf ``function(deviation, *matched leaves)``, else None."""
        return [
            None if deviation is None else function(deviation, *others)
            for deviation, *others in zip(self.deviations, *matched, strict=True)
        ]

    def rebuild(self, steps: Sequence[jax.Array | None]) -> PyTree:
        """The incoming updates with the given steps, in the incoming dtypes; None keeps a leaf."""
        return trees.replace_leaves(
            self.tree,
            {
                path: changed.astype(jnp.result_type(leaf))
                for path, leaf, changed in zip(self.flat.paths, self.updates, steps, strict=True)
                if changed is not None
            },
        )

    def store(self, tree: PyTree, leaves: Sequence[jax.Array | None]) -> PyTree:
        """A parameter-shaped tree of the state with new leaves, in its own dtypes.

        Args:
          tree: the state's tree, made by :func:`zeros_like_layers`.
          leaves: per leaf of the parameters the new value, or None to keep the old one.
        """
        old = trees.align(self.flat, tree, "the state")
        return trees.replace_leaves(
            tree,
            {
                path: new.astype(held.dtype)
                for path, new, held in zip(self.flat.paths, leaves, old, strict=True)
                if new is not None
            },
        )

    @property
    def has_update(self) -> np.ndarray:
        """Per layer whether one of its arrays has an update in this step."""
        present = np.zeros(self.plan.vector_size, bool)
        for deviation, entry in zip(self.deviations, self.plan.arrays, strict=True):
            if deviation is not None and entry is not None:
                present[list(entry.numbers)] = True
        return present


@dataclasses.dataclass(frozen=True)
class StageOptions:
    """The checked arguments that all stages with layers and an anchor share.

    Attributes:
      anchor, anchor_dtype, layers, mask, axis_name: as the stages document.
    """

    anchor: Anchor = "initial"
    anchor_dtype: DType = None
    layers: LayerFn | None = None
    mask: Mask = None
    axis_name: AxisName = None

    def __post_init__(self) -> None:
        """Raises for invalid arguments, as far as they can be checked without parameters."""
        policy.check_anchor(self.anchor, self.anchor_dtype)
        check_layers(self.layers)
        manual_axes.check_axis_name(self.axis_name)

    def init(self, params: PyTree) -> tuple[plans.LayerPlan, PyTree]:
        """The layers of ``params``, and the anchor that the state holds."""
        _, plan, selected = plans.planned(params, self.layers, self.mask)
        held = policy.init_anchor(self.anchor, params, selected, self.anchor_dtype)
        if not isinstance(self.anchor, str):
            held = placement.shard_like_params(held, params)
        return plan, held

    def view(
        self,
        updates: PyTree,
        held: PyTree,
        params: PyTree,
        extra_args: dict[str, Any],
        vectors: Mapping[str, jax.Array] | None = None,
    ) -> StageView:
        """Matches an update's trees by path.

        Args:
          updates: the incoming updates.
          held: the anchor that the state holds.
          params: the parameters before the step.
          extra_args: the update's extra arguments.
          vectors: the state's per-layer vectors, by name.

        Raises:
          TypeError, ValueError: as the stages document.
        """
        flat, plan = planned(updates, params, self.layers, self.mask, vectors or {}, held)
        leaves = trees.align(flat, updates, "updates")
        active = [
            entry is not None and not trees.is_missing(leaf)
            for entry, leaf in zip(plan.arrays, leaves, strict=True)
        ]
        anchor = policy.resolve_anchor(self.anchor, held, extra_args, flat, active)
        deviations = [
            deviation_of(path, *arrays) if is_active else None
            for is_active, path, *arrays in zip(
                active, flat.paths, leaves, flat.leaves, anchor, strict=True
            )
        ]
        axes = manual_axes.sharded_axes(self.axis_name, flat, plan)
        recomputed = extra_args.get("recomputed_updates")
        return StageView(plan, flat, leaves, deviations, anchor, axes, updates, recomputed)


def deviation_of(path: trees.Path, update: Any, theta: Any, theta_0: Any) -> Deviation:
    """One array's Δ and u, in the compute dtype."""
    dtype = plans.compute_dtype(theta, update)
    delta = delta_of(path, theta, theta_0, dtype)
    return Deviation(delta, trees.as_real(update, dtype, "updates", path))


def delta_of(path: trees.Path, theta: Any, theta_0: Any, dtype: Any) -> jax.Array:
    """θ - θ₀; the anchor is fetched if it is in host memory."""
    return jnp.asarray(theta, dtype) - trees.as_real(
        policy.on_device(theta_0), dtype, "anchor", path
    )


def applied(theta: Any, update: Any) -> Any:
    """θ + u in the parameter's dtype; θ where the update cannot be added (``float0``)."""
    if jnp.result_type(update) == jax.dtypes.float0:
        return theta
    return jnp.asarray(theta + update, jnp.result_type(theta))


@jax.jit  # so that arrays of one shape share a trace
def project_step(d: Deviation, factor: jax.Array) -> jax.Array:
    """The update that makes the deviation f Δ̃; exactly u where f = 1."""
    # f Δ̃ - Δ = u - (1 - f) Δ̃. The first form cancels for f near 1 and a small step, the second for
    # f near 0.
    projected = jnp.where(
        factor < 0.5, factor * d.tentative - d.delta, d.step - (1 - factor) * d.tentative
    )
    outside = sums.sharded_like(factor < 1, d.step)
    return jnp.where(outside, sums.sharded_like(projected, d.step), d.step)


def zeros_like_layers(params: PyTree, plan: plans.LayerPlan, dtype: Any = None) -> PyTree:
    """Zeros like the parameters that are layers, with their sharding; MaskedNode for the others.

    Args:
      params: as given to ``init``: arrays, tracers, ``ShapeDtypeStruct`` leaves (answered in
        kind), or Optax's placeholder (returned as it is).
      plan: their layers.
      dtype: of the zeros; None for each parameter's own.
    """
    flat = trees.only_parameters(trees.flatten(params))
    if not flat.leaves:
        return params
    kept = flat.only(entry is not None for entry in plan.arrays)
    return kept.unflatten(
        leaf if trees.is_missing(leaf) else _zeros_like(leaf, dtype) for leaf in kept.leaves
    )


def _zeros_like(leaf: Any, dtype: Any) -> Any:
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(leaf.shape, dtype or leaf.dtype, sharding=leaf.sharding)
    return placement.with_sharding_of(jnp.zeros_like(leaf, dtype=dtype), leaf)


def planned(
    updates: PyTree,
    params: PyTree,
    layers: LayerFn | None,
    mask: Mask,
    vectors: Mapping[str, jax.Array],
    held: PyTree = None,
) -> tuple[trees.FlatTree, plans.LayerPlan]:
    """The parameters in an update and their layers, which are those that ``init`` found.

    ``init`` may have got the trained arrays only, and ``update`` the whole model. Arrays that
    ``init`` did not get have no update, and the anchor in the state is None there. A state without
    an anchor tells by the length of its vectors.

    Args:
      updates: the incoming updates.
      params: the parameters, or a model with other leaves besides.
      layers: as the stages document.
      mask: likewise.
      vectors: the state's per-layer vectors, by name.
      held: the anchor in the state, ``optax.EmptyState()`` or None if there is none.

    Raises:
      ValueError: no params, or a vector without one entry for each layer.
    """
    trees.require_params(params)
    has_anchor = held is not None and not isinstance(held, optax.EmptyState)
    missing = trees.flatten(updates).missing
    choices: list[set[trees.Path]] = [set()]
    if missing and has_anchor:
        anchors = trees.flatten(held, policy.is_anchor_leaf).by_path
        choices = [{path for path in missing if anchors.get(path, 0) is None}]
    elif missing:
        choices.append(missing)
    tried = []
    for left_out in choices:
        flat, plan, _ = plans.planned(params, layers, mask, updates, left_out)
        if all(np.shape(vector) == (plan.vector_size,) for vector in vectors.values()):
            return flat, plan
        tried.append(plan)
    plan = tried[0]
    field = next(f for f, v in vectors.items() if np.shape(v) != (plan.vector_size,))
    names = ", ".join(map(repr, plan.names[:3]))
    raise ValueError(
        f"The state's {field} has shape {np.shape(vectors[field])}, with one entry for each layer "
        f"that init got, but update gets {len(plan.names)} layers under the "
        f"mask{names and f', such as {names}'}. Give both the same parameters, layers= and mask=. "
        "Commonly the state was restored for another model."
    )
