"""Two checkpoints, matched leaf by leaf: what the functions that work after training share."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optax_spd import anchors, deviations, layers as layers_lib, plans, trees

PyTree = Any


class Displacement(NamedTuple):
    """Two checkpoints as lists of leaves, in the order of the parameters.

    Attributes:
      flat: the parameters, with gaps.
      anchors: per layer's leaf θ₀ in at least float32, else None.
      deltas: per layer's leaf Δ = θ - θ₀, else None.
    """

    flat: trees.FlatTree
    anchors: list[jax.Array | None]
    deltas: list[jax.Array | None]

    def projected(self, multipliers: Sequence[jax.Array | None]) -> list[jax.Array | None]:
        """Per layer's leaf θ₀ + f Δ in the parameter's dtype; θ itself where f = 1."""
        return [
            None
            if theta_0 is None or delta is None or f is None
            else jnp.where(
                deviations.predicate_like(f < 1, delta),
                (theta_0 + f * delta).astype(jnp.result_type(theta)),
                theta,
            )
            for theta, theta_0, delta, f in zip(
                self.flat.leaves, self.anchors, self.deltas, multipliers, strict=True
            )
        ]

    def filled(self, leaves: Sequence[jax.Array | None]) -> PyTree:
        """The parameter tree with other values in its layers."""
        return self.flat.unflatten(
            theta if leaf is None else leaf
            for theta, leaf in zip(self.flat.leaves, leaves, strict=True)
        )


def plan_of(params: PyTree, layers: layers_lib.LayerFn | None, mask: Any) -> plans.LayerPlan:
    """The layers of a parameter tree under a mask."""
    layers_lib.check_layers(layers)
    return plans.planned(params, layers, mask).plan


def matched_anchor(params: PyTree, anchor: PyTree, plan: plans.LayerPlan) -> list[Any]:
    """Per leaf the anchor's array where there is a layer, else None.

    Raises:
      ValueError: the trees do not match there.
    """
    wanted = trees.flatten(params).only(entry is not None for entry in plan.arrays)
    leaves = anchors.match_anchor(wanted, anchor)
    return [
        None if entry is None else leaf for entry, leaf in zip(plan.arrays, leaves, strict=True)
    ]


def displacement(params: PyTree, pretrained: Sequence[Any], plan: plans.LayerPlan) -> Displacement:
    """How far a checkpoint is from the anchor's leaves, as :func:`matched_anchor` gives them.

    Raises:
      TypeError: the anchor is complex.
    """
    flat = trees.flatten(params)
    anchors_found: list[jax.Array | None] = []
    deltas: list[jax.Array | None] = []
    for path, entry, theta, theta_0 in zip(
        flat.paths, plan.arrays, flat.leaves, pretrained, strict=True
    ):
        if entry is None:
            anchors_found.append(None)
            deltas.append(None)
            continue
        dtype = plans.compute_dtype(theta, theta_0)
        pretrained_leaf = trees.as_real(anchors.on_device(theta_0), dtype, "anchor", path)
        anchors_found.append(pretrained_leaf)
        deltas.append(jnp.asarray(theta, dtype) - pretrained_leaf)
    return Displacement(flat, anchors_found, deltas)
