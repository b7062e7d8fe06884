"""Replaces or removes the anchors in an existing optimizer state.

An optimizer's state may be nested (chain, masked, partition, MultiSteps, ...), but a stage's own
state is always the NamedTuple that its ``init`` made. So anchors are found at any depth.
"""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_spd.anchors import policy
from optax_spd.layers import checks, fingerprints, plans, trees
from optax_spd.layers.types import DType, PyTree


def set_anchor(state: PyTree, anchor: PyTree, *, anchor_dtype: DType = None) -> PyTree:
    """Replaces every anchor in a nested optimizer state.

    For trainers that load the pretrained weights after ``tx.init``, and for restoring a state
    saved without its anchor (:func:`drop_anchor`).

    Args:
      state: the state of a whole optimizer, through any ``chain``, ``masked``, ``partition``,
        ``MultiSteps``, ``inject_hyperparams``, ``apply_if_finite``, or an ``nnx.Optimizer``'s
        ``opt_state``.
      anchor: the full parameter tree, regardless of masks in the optimizer and of
        :func:`optax_spd.with_sparse`, which takes its entries of it. Leaves are matched by path;
        containers (dict, FrozenDict, nnx.State) and boxes may differ from the state's. A checkpoint
        without the anchor leaves None, ``...`` or ``{}`` in place of arrays (Orbax,
        flax.serialization), and an array given here fills it. Where ``init`` got None, as for what
        is no array in an Equinox model, the tree may have anything.
      anchor_dtype: the dtype to store floating leaves in; None for the replaced leaf's, or for
        the new leaf's own if the anchor was dropped.

    Returns:
      The state with copies of the given arrays. A ``jax.Array`` keeps its own sharding and memory
      kind. A NumPy array takes the replaced leaf's; a dropped anchor has none, so give sharded
      arrays in a sharded run.

    Raises:
      ValueError: the state holds no anchor; paths or shapes differ (names the first); the state's
        per-layer vectors were made for other parameters.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import optax_spd
      >>> tx = optax_spd.adam_spd(1e-3)
      >>> state = tx.init({"kernel": jnp.zeros(2)})
      >>> state = optax_spd.set_anchor(state, {"kernel": jnp.ones(2)})
      >>> optax.tree.get(state, "anchor")
      {'kernel': Array([1., 1.], dtype=float32)}
    """
    dtype = None if anchor_dtype is None else checks.check_dtype("anchor_dtype", anchor_dtype)
    return _map_anchors(lambda node, tree: _replaced(node, tree, dtype), state, anchor, dtype)


def _replaced(node: Any, anchor: PyTree, dtype: np.dtype | None) -> PyTree:
    """The new anchor of one stage's state."""
    flat = trees.flatten(node.anchor, is_leaf=policy.is_anchor_leaf)
    found = trees.flatten(anchor).by_path
    expected = [
        _expected_leaf(path, leaf, found)
        for path, leaf in zip(flat.paths, flat.leaves, strict=True)
    ]
    as_init = [x if x is None else y for x, y in zip(flat.leaves, expected, strict=True)]
    if _none_is_from_init(node, flat, flat._replace(leaves=as_init)):
        expected = as_init
    reference = flat._replace(leaves=expected)
    sources = policy.match_anchor(reference, anchor, "the state's anchor")
    _check_layers(node, reference)
    return flat.unflatten(
        old
        if trees.is_missing(like)
        else policy.copied(
            source,
            like,
            dtype or (None if policy.is_anchor_leaf(old) else jnp.result_type(old)),
            path,
        )
        for path, old, like, source in zip(flat.paths, flat.leaves, expected, sources, strict=True)
    )


def _none_is_from_init(node: Any, held: trees.FlatTree, as_init: trees.FlatTree) -> bool:
    """Whether each None of the held anchor is what ``init`` put there.

    Otherwise it stands for an array that a checkpoint did not have. A checkpoint has an anchor or
    none, so the arrays that are left tell, and else the layers that the state was made for.
    """
    has_arrays = any(
        isinstance(leaf, policy.DroppedAnchor) or not policy.is_anchor_leaf(leaf)
        for leaf in held.leaves
    )
    fits = _has_layers_of(node, as_init)
    return has_arrays if fits is None else fits


def _expected_leaf(path: trees.Path, held: Any, found: dict[trees.Path, Any]) -> Any:
    """The array whose shape the new anchor must have at ``path``.

    It is the held array. If that is missing, because it was dropped or the checkpoint had none, its
    shape is unknown, and the new anchor's own array is returned. None if there is none either: the
    parameters have None or an empty container there.
    """
    given = found.get(path)
    if isinstance(held, optax.MaskedNode) or not policy.is_anchor_leaf(held):
        return held
    if trees.is_array(given):
        return given
    if isinstance(held, policy.DroppedAnchor):
        return held
    below = [p for p in found if len(p) > len(path) and p[: len(path)] == path]
    if below:
        raise ValueError(
            f"The state's anchor is {held!r} at {trees.shown(path)}, where the new anchor has a "
            f"whole subtree ({trees.shown(below[0])}, ...). Restore the checkpoint into the "
            "structure of tx.init(params), or of drop_anchor(tx.init(params)), and call set_anchor "
            "then."
        )
    return None


def drop_anchor(state: PyTree) -> PyTree:
    """Removes every anchor from a nested optimizer state, to save the state without them.

    The pretrained checkpoint already has those weights. A dropped state is for saving only:
    ``update`` raises until :func:`set_anchor` puts the anchor back.

    Args:
      state: as for :func:`set_anchor`.

    Returns:
      The state with a leafless marker in place of each anchor array.

    Raises:
      ValueError: the state holds no anchor, or its per-layer vectors were made for other
        parameters.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import optax_spd
      >>> params = {"kernel": jnp.ones((8, 8))}
      >>> state = optax_spd.adam_spd(1e-3).init(params)
      >>> size = lambda tree: sum(x.nbytes for x in jax.tree.leaves(tree))
      >>> size(state) - size(optax_spd.drop_anchor(state)) == size(params)
      True
    """

    def dropped(node: Any, _: None) -> PyTree:
        flat = trees.flatten(node.anchor, is_leaf=policy.is_anchor_leaf)
        if not all(policy.is_anchor_leaf(leaf) for leaf in flat.leaves):
            _check_layers(node, flat)
        return flat.unflatten(
            leaf if policy.is_anchor_leaf(leaf) else policy.DroppedAnchor() for leaf in flat.leaves
        )

    return _map_anchors(dropped, state)


def _check_layers(node: Any, anchor: trees.FlatTree) -> None:
    """Raises if a state's per-layer vectors were made for other arrays than its anchor has."""
    if _has_layers_of(node, anchor) is False:
        names = _layer_arrays(anchor)
        raise ValueError(
            f"The state {type(node).__name__} was made for other parameters than its anchor has "
            f"({len(names)} arrays, such as {', '.join(map(repr, names[:3]))}). Commonly a "
            "checkpoint of another model was restored, or init got other arrays: give set_anchor "
            "the parameters that init got."
        )


def _has_layers_of(node: Any, anchor: trees.FlatTree) -> bool | None:
    """Whether a state's vectors were made for the arrays of an anchor; None if it cannot tell."""
    fingerprint = getattr(node, "layer_fingerprint", None)
    is_array = isinstance(fingerprint, jax.Array | np.ndarray)
    if not is_array or isinstance(fingerprint, jax.core.Tracer):
        return None
    expected = fingerprints.of_arrays(_layer_arrays(anchor))
    return bool(np.all(fingerprints.arrays_half(fingerprint) == expected))


def _layer_arrays(anchor: trees.FlatTree) -> list[str]:
    return [
        trees.path_name(path)
        for path, leaf in zip(anchor.paths, anchor.leaves, strict=True)
        if not policy.is_anchor_leaf(leaf) and plans.can_be_layer(leaf)
    ]


def _map_anchors(
    change: Callable[[Any, PyTree], PyTree],
    state: PyTree,
    whole: PyTree = None,
    dtype: np.dtype | None = None,
) -> PyTree:
    """The state with changed anchors.

    Args:
      change: from a stage's state and the anchor given for its parameters to its new anchor.
      state: a nested state.
      whole: the anchor given for all parameters; None if there is none.
      dtype: to keep a whole anchor in; None for its own.
    """
    count = 0

    def walk(node: PyTree, given: PyTree) -> PyTree:
        nonlocal count
        if fingerprints.makes_vectors(node):
            return narrow(node, given)
        if not _holds_anchor(node):
            return node
        count += 1
        others = {
            field: below(getattr(node, field), given) for field in node._fields if field != "anchor"
        }
        return node._replace(anchor=change(node, given), **others)

    def below(tree: PyTree, given: PyTree) -> PyTree:
        return jax.tree.map(lambda node: walk(node, given), tree, is_leaf=_has_anchors)

    def narrow(node: Any, given: PyTree) -> PyTree:
        held = jax.tree.leaves(node.inner_state, is_leaf=_holds_anchor)
        if not any(map(_holds_anchor, held)):
            return node
        if given is None:
            inner_state = below(node.inner_state, None)
            return node._replace(anchor=optax.EmptyState(), inner_state=inner_state)
        flat = trees.flatten(node.whole_anchor(given))
        kept = flat.unflatten(
            policy.copied(leaf, leaf, dtype, path)
            for path, leaf in zip(flat.paths, flat.leaves, strict=True)
        )
        inner_state = below(node.inner_state, node.narrowed(given))
        return node._replace(anchor=kept, inner_state=inner_state)

    new_state = below(state, whole)
    if count == 0:
        raise ValueError(
            "The state holds no anchor: its stages use anchor='zero' or 'argument', or it is not "
            "the state of an optax_spd stage. A checkpoint restored without the structure of "
            "tx.init(params) is plain dicts and lists: restore it into that structure. Of an "
            "nnx.Optimizer give optimizer.opt_state; nnx.state(optimizer) has lost the structure."
        )
    return new_state


def holders(state: PyTree) -> Iterator[Any]:
    """The states that hold an anchor of whole arrays in a nested state."""
    for node in jax.tree.leaves(state, is_leaf=_has_anchors):
        if _holds_anchor(node):
            yield node
            yield from holders(
                [x for x, f in zip(node, node._fields, strict=True) if f != "anchor"]
            )


def _has_anchors(node: Any) -> bool:
    return fingerprints.makes_vectors(node) or _holds_anchor(node)


def _holds_anchor(node: Any) -> bool:
    """Whether ``node`` is a stage's state that holds an anchor."""
    has_one = getattr(node, "holds_anchor", False) or (
        fingerprints.has_fingerprint(node) and "anchor" in node._fields
    )
    return has_one and not isinstance(node.anchor, optax.EmptyState)
