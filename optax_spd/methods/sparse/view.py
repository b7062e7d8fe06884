"""The arrays of one update of ``with_sparse``, and the vectors of their chosen entries."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from optax_spd.anchors import policy
from optax_spd.layers import plans, trees
from optax_spd.layers.spec import LayerFn
from optax_spd.layers.types import Mask, PyTree
from optax_spd.methods.sparse import selection
from optax_spd.methods.sparse.state import nested
from optax_spd.sharding import manual_axes

Leaves = dict[trees.Path, Any]
"""Arrays, or what is in their place, by path."""


@dataclasses.dataclass(frozen=True)
class SparseView:
    """An update's arrays, by path in the canonical order.

    Attributes:
      flat: the parameters; missing leaves included.
      stacked_axes: of the arrays that are trained.
      theta: their values.
      updates: their incoming updates, arrays or missing.
    """

    flat: trees.FlatTree
    stacked_axes: dict[trees.Path, tuple[int, ...]]
    theta: Leaves
    updates: Leaves

    @property
    def present(self) -> list[trees.Path]:
        """The paths of arrays that have an update."""
        return [path for path, leaf in self.updates.items() if not trees.is_missing(leaf)]

    def whole(self, tree: PyTree, what: str) -> Leaves:
        """The leaves of a whole tree where there are updates."""
        found = _aligned(self.flat, tree, what, self.present)
        for path, leaf in found.items():
            if trees.is_missing(leaf):
                raise ValueError(
                    f"{what} is {leaf!r} at {trees.shown(path)}, where the update is an array. "
                    f"Pass the whole {what}."
                )
        return found

    def vectors(self, leaves: Leaves, indices: Leaves) -> PyTree:
        """The leaves at the chosen entries, as the inner transformation sees them."""
        return nested(
            {
                path: leaf
                if trees.is_missing(leaf)
                else selection.gathered(
                    policy.on_device(leaf), indices[path], stacked_axes=self.stacked_axes[path]
                )
                for path, leaf in leaves.items()
            }
        )

    def with_entries(self, leaves: Leaves, vectors: PyTree, indices: Leaves) -> Leaves:
        """The leaves with other values at the chosen entries."""
        found = trees.flatten(vectors).by_path
        return {
            path: selection.scattered(
                found[path].astype(leaf.dtype),
                indices[path],
                leaf,
                stacked_axes=self.stacked_axes[path],
            )
            for path, leaf in leaves.items()
        }

    def of_entries(
        self, function: Callable[..., Any], params: PyTree, indices: Leaves
    ) -> Callable[..., Any]:
        """A function of parameters as one of the vectors; all else keeps its value."""
        theta = {path: self.theta[path] for path in self.present}

        def call(vectors: PyTree, *args: Any, **options: Any) -> Any:
            changed = self.with_entries(theta, vectors, indices)
            return function(trees.replace_leaves(params, changed), *args, **options)

        return call

    def rebuild(self, updates: PyTree, vectors: PyTree, indices: Leaves) -> PyTree:
        """The incoming updates with the vectors at the chosen entries, zero elsewhere."""
        theta = self.flat.by_path
        zeros = {
            path: selection.zeros_like(leaf, theta.get(path))
            for path, leaf in trees.flatten(updates).by_path.items()
            if not trees.is_missing(leaf) and jnp.result_type(leaf) != jax.dtypes.float0
        }
        active = {path: zeros[path] for path in self.present}
        return trees.replace_leaves(updates, zeros | self.with_entries(active, vectors, indices))


def view_of(
    updates: PyTree,
    params: PyTree,
    indices: Leaves,
    *,
    fraction: float,
    layers: LayerFn | None,
    mask: Mask,
) -> SparseView:
    """Matches an update's trees with the indices in the state.

    Raises:
      TypeError, ValueError: as ``with_sparse`` documents.
    """
    trees.require_params(params)
    # Arrays that init did not get have no update.
    left_out = trees.flatten(updates).missing - indices.keys()
    flat, plan, _ = plans.planned(params, layers, mask, updates, left_out)
    found = {
        path: (leaf, entry)
        for path, leaf, entry in zip(flat.paths, flat.leaves, plan.arrays, strict=True)
        if entry is not None
    }
    for path, (leaf, _) in found.items():
        needs = "with_sparse needs whole arrays to choose from"
        manual_axes.require_whole(needs, trees.path_name(path), leaf)
    for path in sorted(found.keys() | indices.keys()):
        held = jnp.shape(indices[path]) if path in indices else None
        needed = None
        if path in found:
            leaf, entry = found[path]
            k = selection.entries_per_layer(path, leaf, entry, fraction)
            needed = (*entry.stacked_shape, k)
        if held != needed:
            raise ValueError(
                f"The state's sparse_indices have shape {held} at {trees.shown(path)}, where the "
                f"parameters need {needed} (None: nothing is trained there). Give init and update "
                "the same parameters, fraction=, layers= and mask=. Commonly the state was "
                "restored for another model."
            )
    paths = sorted(found)
    return SparseView(
        flat,
        {path: found[path][1].stacked_axes for path in paths},
        {path: jnp.asarray(found[path][0]) for path in paths},
        _aligned(flat, updates, "updates", paths),
    )


def _aligned(flat: trees.FlatTree, tree: PyTree, what: str, wanted: Iterable[trees.Path]) -> Leaves:
    """The leaves of a whole tree at some paths, arrays or missing."""
    paths = set(wanted)
    masked = flat.only(path in paths for path in flat.paths)
    leaves = dict(zip(flat.paths, trees.align(masked, tree, what), strict=True))
    return {
        path: leaves[path]
        if trees.is_missing(leaves[path])
        else trees.as_real(leaves[path], jnp.result_type(leaves[path]), what, path)
        for path in sorted(paths)
    }
