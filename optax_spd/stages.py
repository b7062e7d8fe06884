"""The plumbing that all stages share: from trees to matched leaves and back.

A method's file holds its equation; which arrays it concerns, where their anchor is, and how the
result gets back into the caller's tree is the same for all and stands here.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optax_spd import (
    anchors,
    deviations as deviations_lib,
    layers as layers_lib,
    mapped_axes,
    one_cpu as one_cpu_lib,
    placement,
    plans,
    trees,
)

PyTree = Any


class Deviation(NamedTuple):
    """One array's step, all in one dtype of at least float32.

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
    """A stage's trees at one update, as lists of leaves in the order of the parameters.

    Attributes:
      plan: the layers.
      flat: the parameters, with gaps.
      updates: the incoming updates' leaves, with gaps.
      deviations: per leaf where the method acts its Deviation, else None.
      anchor: per leaf where the method acts θ₀, wherever it lives; else None.
      axes: per leaf the hand-mapped mesh axes, or None.
      tree: the incoming updates as they came.
      for_one_cpu: as in :class:`StageOptions`.
      updates_anew: the incoming updates' numbers once more, for a second pass; None if there is no
        need for it.
    """

    plan: plans.LayerPlan
    flat: trees.FlatTree
    updates: list[Any]
    deviations: list[Deviation | None]
    anchor: list[Any]
    axes: list[mapped_axes.MeshAxes] | None
    tree: PyTree
    for_one_cpu: bool | None
    updates_anew: PyTree = None

    def match(self, tree: PyTree, what: str) -> list[jax.Array | None]:
        """Per leaf where the method acts the leaf of ``tree``, in the deviation's dtype."""
        leaves = trees.align(self.flat, tree, what)
        matched: list[jax.Array | None] = []
        for path, leaf, deviation in zip(self.flat.paths, leaves, self.deviations, strict=True):
            if deviation is None:
                matched.append(None)
                continue
            if trees.is_gap(leaf):
                raise ValueError(
                    f"{what} is {leaf!r} at {trees.shown(path)}, where the update is an array. "
                    f"Pass the whole {what}."
                )
            matched.append(trees.as_real(leaf, deviation.delta.dtype, what, path))
        return matched

    def sums(
        self, count: int, products: Callable[..., tuple[jax.Array, ...]], *matched: Sequence[Any]
    ) -> tuple[jax.Array, ...]:
        """Per-layer sums of ``products(deviation, *matched leaves)``: ``count`` vectors."""
        terms = self.map(products, *matched)
        return deviations_lib.layer_sums(self.plan, terms, count, self.axes)

    def spread(self, vector: jax.Array) -> list[jax.Array | None]:
        """A per-layer vector's entries, shaped to broadcast against each array, in its dtype."""
        return deviations_lib.spread_over(self.plan, vector, self.map(lambda d: d.delta))

    def map(self, function: Callable[..., Any], *matched: Sequence[Any]) -> list[Any]:
        """``function(deviation, *matched leaves)`` where the method acts, else None."""
        return [
            None if deviation is None else function(deviation, *others)
            for deviation, *others in zip(self.deviations, *matched, strict=True)
        ]

    def rebuild(self, change: Callable[..., jax.Array], *matched: Sequence[Any]) -> PyTree:
        """The updates with ``change(deviation, *matched leaves)`` where the method acts."""
        return self.rebuilt(self.map(change, *matched))

    def rebuilt(self, steps: Sequence[jax.Array | None]) -> PyTree:
        """The updates with other leaves where the method acts, in the dtypes that they came in.

        Everything else is passed through as it is.
        """
        return trees.replace_leaves(
            self.tree,
            {
                path: changed.astype(jnp.result_type(leaf))
                for path, leaf, changed in zip(self.flat.paths, self.updates, steps, strict=True)
                if changed is not None
            },
        )

    def choose(
        self, *matched: Sequence[Any], one_cpu: Callable[[], Any], default: Callable[[], Any]
    ) -> Any:
        """The form for one CPU where that is what the program is compiled for, else the default.

        Args:
          *matched: what the forms read besides the deviations.
          one_cpu: the one form.
          default: the other.
        """
        if self.for_one_cpu is not None:
            return one_cpu() if self.for_one_cpu else default()
        if self.axes is not None or not one_cpu_lib.possible(self.deviations, matched):
            return default()
        return jax.lax.platform_dependent(cpu=one_cpu, default=default)

    def store(self, tree: PyTree, leaves: Sequence[jax.Array | None]) -> PyTree:
        """A parameter-shaped tree of the state with new leaves where there are some, in its dtypes.

        Args:
          tree: what the state holds, made by :func:`zeros_like_layers`.
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
    def taking_part(self) -> np.ndarray:
        """Per layer whether it has an update; a layer without one keeps what the state says."""
        present = np.zeros(self.plan.vector_size, bool)
        for deviation, entry in zip(self.deviations, self.plan.arrays, strict=True):
            if deviation is not None and entry is not None:
                present[list(entry.numbers)] = True
        return present


@dataclasses.dataclass(frozen=True)
class StageOptions:
    """The arguments that all stages with layers and an anchor have in common, checked.

    Attributes:
      anchor, anchor_dtype, layers, mask, axis_name: as the stages document.
      for_one_cpu: whether to take a stage's form for one CPU, where it has one, or its other; None
        for the one that suits what the program is compiled for.
    """

    anchor: Any = "initial"
    anchor_dtype: Any = None
    layers: layers_lib.LayerFn | None = None
    mask: Any = None
    axis_name: Any = None
    for_one_cpu: bool | None = None

    def __post_init__(self) -> None:
        """Refuses arguments that are wrong whatever the parameters."""
        anchors.check_anchor(self.anchor, self.anchor_dtype)
        layers_lib.check_layers(self.layers)
        mapped_axes.check_axis_name(self.axis_name)

    @property
    def anchor_is_zero(self) -> bool:
        """Whether θ₀ = 0."""
        return isinstance(self.anchor, str) and self.anchor == "zero"

    def init(self, params: PyTree) -> tuple[plans.LayerPlan, PyTree]:
        """The layers of ``params``, and what the state holds of the anchor."""
        _, plan, selected = plans.planned(params, self.layers, self.mask)
        return plan, anchors.init_anchor(self.anchor, params, selected, self.anchor_dtype)

    def view(
        self, updates: PyTree, held: PyTree, params: PyTree, extra_args: dict[str, Any]
    ) -> StageView:
        """Matches an update's trees by path.

        Args:
          updates: the incoming updates.
          held: what the state holds of the anchor.
          params: the parameters before the step.
          extra_args: the update's extra arguments.

        Raises:
          TypeError, ValueError: as the stages document.
        """
        trees.require_params(params)
        flat, plan, _ = plans.planned(params, self.layers, self.mask)
        leaves = trees.align(flat, updates, "updates")
        acts = [
            entry is not None and not trees.is_gap(leaf)
            for entry, leaf in zip(plan.arrays, leaves, strict=True)
        ]
        anchor = anchors.resolve_anchor(self.anchor, held, extra_args, flat, acts)
        steps = [
            deviation_of(path, *arrays) if act else None
            for act, path, *arrays in zip(
                acts, flat.paths, leaves, flat.leaves, anchor, strict=True
            )
        ]
        axes = mapped_axes.sharded_axes(self.axis_name, flat, plan)
        anew = extra_args.get("updates_anew")
        return StageView(plan, flat, leaves, steps, anchor, axes, updates, self.for_one_cpu, anew)


def deviation_of(path: trees.Path, update: Any, theta: Any, theta_0: Any) -> Deviation:
    """One array's Δ and u, in the dtype to compute in."""
    dtype = plans.compute_dtype(theta, update)
    delta = delta_of(path, theta, theta_0, dtype)
    return Deviation(delta, trees.as_real(update, dtype, "updates", path))


def delta_of(path: trees.Path, theta: Any, theta_0: Any, dtype: Any) -> jax.Array:
    """θ - θ₀, which is brought in if it lives in host memory."""
    return jnp.asarray(theta, dtype) - trees.as_real(
        anchors.on_device(theta_0), dtype, "anchor", path
    )


def applied(theta: Any, update: Any) -> Any:
    """θ + u in the parameter's dtype; θ where the update cannot be added (``float0``)."""
    if jnp.result_type(update) == jax.dtypes.float0:
        return theta
    return jnp.asarray(theta + update, jnp.result_type(theta))


def pulled(d: Deviation, factor: jax.Array) -> jax.Array:
    """The update that takes the deviation to f Δ̃; where f = 1, u itself."""
    # f Δ̃ - Δ = u - (1 - f) Δ̃. With a factor near 1 and a small step the first is the difference of
    # nearly equal numbers; with a factor near 0 the second is.
    drawn_in = jnp.where(
        factor < 0.5, factor * d.tentative - d.delta, d.step - (1 - factor) * d.tentative
    )
    outside = deviations_lib.predicate_like(factor < 1, d.step)
    return jnp.where(outside, drawn_in, d.step)


def scaled(
    updates: PyTree,
    flat: trees.FlatTree,
    plan: plans.LayerPlan,
    scale: jax.Array,
    concerned: np.ndarray | None = None,
) -> PyTree:
    """The updates times a factor for each layer, in their own dtypes.

    Args:
      updates: a tree like the parameters, matched by path.
      flat: the parameters.
      plan: their layers.
      scale: the factors, one per layer.
      concerned: per layer whether it may have another factor than 1: arrays without such a layer
        pass through. None for all.
    """
    leaves = trees.align(flat, updates, "updates")

    def product(path: trees.Path, entry: Any, leaf: Any) -> jax.Array | None:
        if entry is None or trees.is_gap(leaf):
            return None
        if concerned is not None and not concerned[list(entry.numbers)].any():
            return None
        step = trees.as_real(leaf, plans.compute_dtype(leaf), "updates", path)
        factor = deviations_lib.spread(entry, scale, step.ndim).astype(step.dtype)
        # A factor of 0 stops a layer, also one whose update is not finite.
        stopped = deviations_lib.predicate_like(factor == 0, step)
        return jnp.where(stopped, 0, step * factor).astype(jnp.result_type(leaf))

    changed = zip(flat.paths, map(product, flat.paths, plan.arrays, leaves), strict=True)
    return trees.replace_leaves(updates, {path: u for path, u in changed if u is not None})


def zeros_like_layers(params: PyTree, plan: plans.LayerPlan, dtype: Any = None) -> PyTree:
    """Zeros like the parameters that are layers, MaskedNode for the others, placed as they are.

    Args:
      params: as given to ``init``: arrays, tracers, ``ShapeDtypeStruct`` leaves (answered in
        kind), or Optax's placeholder (answered with itself).
      plan: their layers.
      dtype: of the zeros; None for each parameter's own.
    """
    flat = trees.flatten(params)
    if not flat.leaves:
        return params
    kept = flat.only(entry is not None for entry in plan.arrays)
    return kept.unflatten(
        leaf if trees.is_gap(leaf) else _zeros_like(leaf, dtype) for leaf in kept.leaves
    )


def _zeros_like(leaf: Any, dtype: Any) -> Any:
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(leaf.shape, dtype or leaf.dtype, sharding=leaf.sharding)
    return placement.tied(jnp.zeros_like(leaf, dtype=dtype), leaf)


def check_vector(field: str, vector: jax.Array, plan: plans.LayerPlan) -> None:
    """Refuses a state made for another number of layers than the parameters have.

    Raises:
      ValueError: naming the field and both counts.
    """
    if np.shape(vector) != (plan.vector_size,):
        raise ValueError(
            f"The state's {field} has shape {np.shape(vector)}, but the parameters have "
            f"{len(plan.names)} layers under the mask. The state was made for other parameters, or "
            "with other layers= or mask=; call init again, or restore the matching checkpoint."
        )
