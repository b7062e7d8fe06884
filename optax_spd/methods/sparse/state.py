"""The state of ``with_sparse``: which entries were chosen, and whole trees read at them."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_spd.anchors import policy
from optax_spd.layers import trees
from optax_spd.layers.plans import ArrayLayers
from optax_spd.layers.types import PyTree
from optax_spd.methods.sparse import selection


@policy.narrows_anchor
class WithSparseState(NamedTuple):
    """State of :func:`with_sparse`.

    The trees have the paths of the arrays that ``with_sparse`` applies to, as nested dicts.

    Attributes:
      count: number of updates so far, int32; the first one chooses.
      sparse_indices: the chosen entries, per array int32 of shape (sizes of its stacked axes, k):
        ascending positions in C order in a layer. A layer's size marks an unused place.
      sparse_layout: per array int32 of shape (2, rank): its sizes, and 1 for each stacked axis.
        Arrays of rank 0 have none.
      anchor: ``optax.EmptyState()``, or a whole anchor that :func:`optax_spd.set_anchor` got before
        the choice.
      inner_state: state of the wrapped transformation, for the chosen entries only.
    """

    count: jax.Array  # type: ignore[assignment]  # shadows tuple.count, as in Optax
    sparse_indices: PyTree
    sparse_layout: PyTree
    anchor: PyTree
    inner_state: Any

    def whole_anchor(self, anchor: PyTree) -> PyTree:
        """The arrays of a whole anchor to keep for the choice; EmptyState once it is made."""
        if isinstance(self.count, jax.core.Tracer):
            raise ValueError(
                "set_anchor on a state of with_sparse depends on whether the entries are chosen, "
                "which is not known while tracing. Call it outside of jit."
            )
        if np.any(np.asarray(self.count) > 0):
            return optax.EmptyState()
        return nested({path: leaf for path, leaf, *_ in matched(self, anchor, "anchor")})

    def narrowed(self, anchor: PyTree) -> PyTree:
        """A whole anchor at the chosen entries; zeros before the choice."""
        return nested(
            {
                path: selection.gathered(jnp.asarray(leaf), indices, stacked_axes=axes)
                for path, leaf, indices, axes in matched(self, anchor, "anchor")
            }
        )


Matched = tuple[trees.Path, Any, jax.Array, tuple[int, ...]]


def matched(state: WithSparseState, tree: PyTree, what: str) -> list[Matched]:
    """Per array its path, the leaf of a whole tree, the indices and the stacked axes.

    Raises:
      ValueError: the tree lacks an array of the state, or has it in another shape.
    """
    found = trees.flatten(tree).by_path
    layouts = trees.flatten(state.sparse_layout).by_path
    result = []
    for path, indices in trees.flatten(state.sparse_indices).by_path.items():
        shape, stacked_axes = _from_layout(layouts.get(path))
        leaf: Any = found.get(path)
        if not trees.is_array(leaf):
            raise ValueError(
                f"{what} has no array at {trees.shown(path)}, where with_sparse trains. The "
                f"nearest paths in it: {trees.nearest_paths(path, found)}."
            )
        if jnp.shape(leaf) != shape:
            raise ValueError(
                f"{what} does not match the parameters of with_sparse at {trees.shown(path)}: it "
                f"has shape {jnp.shape(leaf)}, the parameter has shape {shape}."
            )
        result.append((path, leaf, indices, stacked_axes))
    return result


def layout_of(shape: tuple[int, ...], entry: ArrayLayers) -> jax.Array:
    """An array's sizes, and 1 for each stacked axis, as the state holds them."""
    is_stacked = [axis in entry.stacked_axes for axis in range(len(shape))]
    return jnp.asarray([list(shape), is_stacked], jnp.int32)


def _from_layout(layout: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shape and the stacked axes, from what the state holds of an array."""
    if layout is None:
        return (), ()
    sizes, is_stacked = np.asarray(layout)
    shape = tuple(int(size) for size in sizes)
    return shape, tuple(int(axis) for axis in np.flatnonzero(is_stacked))


def nested(leaves: dict[trees.Path, Any]) -> PyTree:
    """Nested dicts with these leaves at their paths; a leaf at the empty path is the tree."""
    if () in leaves:
        return leaves[()]
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = leaf
    return tree


def sparse_mask(state: PyTree, params: PyTree) -> PyTree:
    """Shows which entries :func:`optax_spd.with_sparse` chose, as a mask like the parameters.

    For looking: it runs on the host and makes an array for each parameter.

    Args:
      state: the state of a whole optimizer, however nested.
      params: the parameters, as given to ``init``.

    Returns:
      A tree like ``params`` of bool arrays, True where an entry is trained. It is False everywhere
      before the first update. None and MaskedNode stay.

    Raises:
      ValueError: nothing in ``state`` is of ``with_sparse``, or it is of other parameters.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import optax_spd
      >>> params = {"kernel": jnp.zeros((2, 3))}
      >>> tx = optax_spd.with_sparse(optax.sgd(1.0), fraction=0.2)
      >>> grads = {"kernel": jnp.array([[0.1, -3.0, 0.2], [0.0, 0.3, 2.0]])}
      >>> _, state = tx.update(grads, tx.init(params), params)
      >>> optax_spd.sparse_mask(state, params)["kernel"].astype(int)
      Array([[0, 1, 0],
             [0, 0, 1]], dtype=int32)
    """
    flat = trees.flatten(params)
    nodes = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, WithSparseState))
    found = [node for node in nodes if isinstance(node, WithSparseState)]
    if not found:
        raise ValueError(
            "The state holds no choice of entries: it is not the state of with_sparse. A "
            "checkpoint restored without the structure of tx.init(params) is plain dicts: restore "
            "it into that structure."
        )
    masks = flat.unflatten(
        leaf if trees.is_missing(leaf) else jnp.zeros(jnp.shape(leaf), bool) for leaf in flat.leaves
    )
    for node in found:
        changed = {}
        for path, mask, indices, stacked_axes in matched(node, masks, "params"):
            ones = jnp.ones(indices.shape, bool)
            changed[path] = selection.scattered(ones, indices, mask, stacked_axes=stacked_axes)
        masks = trees.replace_leaves(masks, changed)
    return masks
