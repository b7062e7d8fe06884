"""The plumbing that all stages share: from trees to matched leaves and back.

A method's file holds its equation; which arrays it concerns, where their anchor is, and how the
result gets back into the caller's tree is the same for all and stands here.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optax_spd import anchors, deviations as deviations_lib, layers as layers_lib, masks, trees

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
      axes: per leaf the hand-mapped mesh axes, or None.
      tree: the incoming updates as they came.
    """

    plan: layers_lib.LayerPlan
    flat: trees.FlatTree
    updates: list[Any]
    deviations: list[Deviation | None]
    axes: list[deviations_lib.AxisNames] | None
    tree: PyTree

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
            matched.append(_as_real(leaf, deviation.delta.dtype, what, path))
        return matched

    def sums(
        self, count: int, products: Callable[..., tuple[jax.Array, ...]], *matched: list[Any]
    ) -> tuple[jax.Array, ...]:
        """Per-layer sums of ``products(deviation, *matched leaves)``: ``count`` vectors."""
        terms = [
            None if deviation is None else products(deviation, *others)
            for deviation, *others in zip(self.deviations, *matched, strict=True)
        ]
        return deviations_lib.layer_sums(self.plan, terms, count, self.axes)

    def rebuild(self, change: Callable[..., jax.Array], *vectors: jax.Array) -> PyTree:
        """The updates with ``change(deviation, *per-layer values)`` where the method acts.

        The per-layer values come shaped to broadcast against the array; the result is cast to the
        update's dtype. Everything else is passed through as it is.
        """
        changed: dict[trees.Path, Any] = {}
        for path, leaf, deviation, entry in zip(
            self.flat.paths, self.updates, self.deviations, self.plan.arrays, strict=True
        ):
            if deviation is None or entry is None:
                continue
            dtype = deviation.delta.dtype
            values = [
                deviations_lib.spread(entry, v, deviation.delta.ndim).astype(dtype) for v in vectors
            ]
            changed[path] = change(deviation, *values).astype(jnp.result_type(leaf))
        return trees.replace_leaves(self.tree, changed)


@dataclasses.dataclass(frozen=True)
class StageOptions:
    """The arguments that all stages with layers and an anchor have in common, checked."""

    anchor: Any = "initial"
    anchor_dtype: Any = None
    layers: layers_lib.LayerFn | None = None
    mask: Any = None
    axis_name: Any = None

    def __post_init__(self) -> None:
        """Refuses arguments that are wrong whatever the parameters."""
        anchors.check_anchor(self.anchor, self.anchor_dtype)
        layers_lib.check_layers(self.layers)
        deviations_lib.check_axis_name(self.axis_name)

    def _plan(self, params: PyTree) -> tuple[trees.FlatTree, list[bool] | None, Any]:
        flat = trees.flatten(params)
        selected = masks.resolve_mask(self.mask, params, flat)
        return flat, selected, layers_lib.plan_layers(flat, self.layers, selected)

    def init(self, params: PyTree) -> tuple[layers_lib.LayerPlan, PyTree]:
        """The layers of ``params``, and what the state holds of the anchor."""
        _, selected, plan = self._plan(params)
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
        flat, _, plan = self._plan(params)
        leaves = trees.align(flat, updates, "updates")
        acts = [
            entry is not None and not trees.is_gap(leaf)
            for entry, leaf in zip(plan.arrays, leaves, strict=True)
        ]
        anchor = anchors.resolve_anchor(self.anchor, held, extra_args, flat, acts)
        steps = [
            _deviation(path, *arrays) if act else None
            for act, path, *arrays in zip(
                acts, flat.paths, leaves, flat.leaves, anchor, strict=True
            )
        ]
        axes = deviations_lib.sharded_axes(self.axis_name, flat, plan)
        return StageView(plan, flat, leaves, steps, axes, updates)


def _deviation(path: trees.Path, update: Any, theta: Any, theta_0: Any) -> Deviation:
    dtype = layers_lib.compute_dtype(theta, update)
    pretrained = _as_real(anchors.on_device(theta_0), dtype, "anchor", path)
    delta = jnp.asarray(theta, dtype) - pretrained
    return Deviation(delta, _as_real(update, dtype, "updates", path))


def _as_real(leaf: Any, dtype: Any, what: str, path: trees.Path) -> jax.Array:
    """``leaf`` in a real dtype; never by dropping an imaginary part."""
    if jnp.issubdtype(jnp.result_type(leaf), jnp.complexfloating):
        raise TypeError(
            f"{what} is complex at {trees.shown(path)}, where the parameter is real. Take its real "
            "part, or wrap the optimizer in optax.contrib.split_real_and_imaginary."
        )
    return jnp.asarray(leaf, dtype)


def check_vector(field: str, vector: jax.Array, plan: layers_lib.LayerPlan) -> None:
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
