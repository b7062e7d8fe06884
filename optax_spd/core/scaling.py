"""Multiplies updates by per-layer factors, for the stages that scale learning rates."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optax_spd.core import sums
from optax_spd.layers import plans, trees
from optax_spd.layers.types import PyTree


def scaled(
    updates: PyTree,
    flat: trees.FlatTree,
    plan: plans.LayerPlan,
    scale: jax.Array,
    scalable: np.ndarray | None = None,
) -> PyTree:
    """The updates times a factor for each layer, in their own dtypes.

    Args:
      updates: a tree like the parameters, matched by path.
      flat: the parameters.
      plan: their layers.
      scale: the factors, one per layer.
      scalable: per layer whether its factor may differ from 1; None for all. Arrays without such a
        layer pass through.
    """
    leaves = trees.align(flat, updates, "updates")

    def product(path: trees.Path, entry: Any, leaf: Any) -> jax.Array | None:
        if entry is None or trees.is_missing(leaf):
            return None
        if scalable is not None and not scalable[list(entry.numbers)].any():
            return None
        step = trees.as_real(leaf, plans.compute_dtype(leaf), "updates", path)
        factor = sums.spread(entry, scale, step.ndim).astype(step.dtype)
        # A factor of 0 stops a layer even if its update is not finite.
        return sums.times(factor, step).astype(jnp.result_type(leaf))

    changed = zip(flat.paths, map(product, flat.paths, plan.arrays, leaves), strict=True)
    return trees.replace_leaves(updates, {path: u for path, u in changed if u is not None})
