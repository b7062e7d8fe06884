"""Parameter trees as lists of (path, leaf), matched by path and not by container type.

The same parameter may be in a dict, a FrozenDict or an nnx.State, in a linen ``Partitioned`` or an
NNX ``Variable`` box, or missing, as ``MaskedNode`` or ``None``. Its path is the same in all.
"""

import difflib
import math
from collections.abc import Callable, Iterable, Set
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_spd.layers.types import PyTree

Path = tuple[str, ...]


class FlatTree(NamedTuple):
    """A tree's paths (without the keys of boxes), its leaves in the same order, its treedef."""

    paths: list[Path]
    leaves: list[Any]
    treedef: Any

    @property
    def by_path(self) -> dict[Path, Any]:
        """The leaves by their paths."""
        return dict(zip(self.paths, self.leaves, strict=True))

    @property
    def missing(self) -> set[Path]:
        """The paths of missing leaves."""
        return {p for p, leaf in zip(self.paths, self.leaves, strict=True) if is_missing(leaf)}

    def only(self, wanted: Iterable[bool]) -> "FlatTree":
        """The same tree, with ``MaskedNode`` where ``wanted`` is False."""
        leaves = [
            leaf if want or is_missing(leaf) else optax.MaskedNode()
            for leaf, want in zip(self.leaves, wanted, strict=True)
        ]
        return self._replace(leaves=leaves)

    def without(self, paths: Set[Path]) -> "FlatTree":
        """The same tree, with None in place of the leaves at or below these paths."""
        leaves = [
            None if not is_missing(leaf) and _prefix_in(path, paths) is not None else leaf
            for path, leaf in zip(self.paths, self.leaves, strict=True)
        ]
        return self._replace(leaves=leaves)

    def unflatten(self, leaves: Iterable[Any]) -> PyTree:
        """The tree with other leaves in the same places."""
        return jax.tree_util.tree_unflatten(self.treedef, leaves)


def is_missing(node: Any) -> bool:
    """Whether ``node`` is a missing leaf: ``None`` or ``optax.MaskedNode``."""
    return node is None or isinstance(node, optax.MaskedNode)


def path_name(path: Path) -> str:
    """The keys of a path joined by "/", as in layer names; patterns are searched in it."""
    return "/".join(path)


def shown(path: Path) -> str:
    """A path as error messages show it."""
    return repr(path_name(path)) if path else "the tree itself"


def flatten(
    tree: PyTree, is_leaf: Callable[[Any], bool] = is_missing, *, unique: bool = True
) -> FlatTree:
    """Flattens ``tree``, keeping missing leaves.

    Args:
      tree: any tree.
      is_leaf: which nodes to treat as missing leaves.
      unique: whether to raise for paths that are spelled alike.

    Raises:
      ValueError: two leaves have the same path, as the keys 1 and "1" have.
    """
    with_path, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)
    keys = [keys for keys, _ in with_path]
    paths = _without_box_keys(keys)
    if unique and len(set(map(path_name, paths))) < len(paths):
        _raise_for_one_path(paths, keys)
    return FlatTree(paths, [leaf for _, leaf in with_path], treedef)


def _raise_for_one_path(paths: list[Path], key_paths: list[tuple[Any, ...]]) -> None:
    first: dict[str, tuple[Any, ...]] = {}
    for path, keys in zip(paths, key_paths, strict=True):
        other = first.setdefault(path_name(path), keys)
        if other is not keys:
            raise ValueError(
                f"Two leaves have the path {path_name(path)!r}: "
                f"tree{jax.tree_util.keystr(other)} and tree{jax.tree_util.keystr(keys)}. Leaves "
                "are matched by path, so each needs one of its own: rename a key."
            )


def only_parameters(flat: FlatTree, updates: PyTree = None) -> FlatTree:
    """The same tree, with None in place of each leaf that is no parameter.

    A model may hold more than arrays: activation functions, strings, flags, a dropout rate. Arrays
    are parameters. A Python number is a parameter if it has an update, and so is a complex array,
    which the methods then refuse. If there are no updates yet, a number is a parameter in a tree
    that holds only arrays and numbers.

    Args:
      flat: the parameters, or a whole model.
      updates: the updates; None if there are none yet.
    """
    if all(_is_real_array(leaf) or is_missing(leaf) for leaf in flat.leaves):
        return flat
    if updates is None:
        if all(is_array(leaf) or is_missing(leaf) or is_number(leaf) for leaf in flat.leaves):
            return flat
        return flat._replace(leaves=[x if is_array(x) else _missing(x) for x in flat.leaves])
    has_update = {p for p, u in flatten(updates).by_path.items() if not is_missing(u)}
    return flat._replace(
        leaves=[
            leaf
            if _is_real_array(leaf) or (path in has_update and (is_array(leaf) or is_number(leaf)))
            else _missing(leaf)
            for path, leaf in zip(flat.paths, flat.leaves, strict=True)
        ]
    )


def without_settings(params: PyTree, updates: PyTree = None) -> PyTree:
    """The tree with None in place of each leaf that is no parameter (:func:`only_parameters`)."""
    flat = flatten(params)
    parameters = only_parameters(flat, updates)
    return params if parameters is flat else parameters.unflatten(parameters.leaves)


def _missing(leaf: Any) -> Any:
    return leaf if is_missing(leaf) else None


def is_array(leaf: Any) -> bool:
    """Whether a leaf is an array, or describes one."""
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")


def _is_real_array(leaf: Any) -> bool:
    return is_array(leaf) and not jnp.issubdtype(leaf.dtype, jnp.complexfloating)


def is_number(leaf: Any) -> bool:
    """Whether a leaf is a Python number. A bool is a flag, not a number."""
    return isinstance(leaf, int | float | complex) and not isinstance(leaf, bool)


def _without_box_keys(key_paths: list[tuple[Any, ...]]) -> list[Path]:
    """Key paths as strings, without the keys that boxes add.

    A box (linen ``Partitioned``, NNX ``Variable``) is a node whose only child is the attribute
    ``value``. A dict key "value" (Flax attention has one) is not an attribute and is kept, as is a
    field ``value`` with siblings.
    """
    children: dict[tuple[Any, ...], set[Any]] = {}
    for keys in key_paths:
        for depth, key in enumerate(keys):
            children.setdefault(keys[:depth], set()).add(key)

    def is_box_key(keys: tuple[Any, ...], depth: int) -> bool:
        key = keys[depth]
        return (
            isinstance(key, jax.tree_util.GetAttrKey)
            and key.name == "value"
            and len(children[keys[:depth]]) == 1
        )

    return [
        tuple(
            jax.tree_util.keystr((key,), simple=True)
            for depth, key in enumerate(keys)
            if not is_box_key(keys, depth)
        )
        for keys in key_paths
    ]


def align(
    reference: FlatTree,
    tree: PyTree,
    what: str,
    reference_name: str = "params",
    is_leaf: Callable[[Any], bool] = is_missing,
) -> list[Any]:
    """The leaves of ``tree`` in the order of ``reference``, matched by path.

    If the leaf of ``tree`` is missing at a path or above it, the missing leaf is returned. If the
    leaf of ``reference`` is missing, it is returned, and ``tree`` may hold anything there.

    Args:
      reference: defines paths and order.
      tree: the tree with the leaves, of any container and box types.
      what: what ``tree`` is, for the message.
      reference_name: what ``reference`` is, for the message.
      is_leaf: which nodes of ``tree`` to treat as missing leaves.

    Raises:
      ValueError: a path or a shape differs; names the first path and both shapes.
    """
    flat = flatten(tree, is_leaf)
    found = flat.by_path
    missing = {p for p, leaf in found.items() if is_leaf(leaf)}
    aligned = []
    for path, leaf in zip(reference.paths, reference.leaves, strict=True):
        if is_missing(leaf):
            aligned.append(leaf)
            continue
        matching_path = path if path in found else _prefix_in(path, missing)
        if matching_path is None:
            raise ValueError(
                f"{what} does not match {reference_name}: it has no leaf at {shown(path)}, where "
                f"{reference_name} has one{_of_shape(leaf)}. Pass a tree with the same paths; the "
                f"nearest in {what}: {nearest_paths(path, flat.paths)}."
            )
        match = found[matching_path]
        if not is_leaf(match) and jnp.shape(match) != jnp.shape(leaf):
            raise ValueError(
                f"{what} does not match {reference_name} at {shown(path)}: {what} has shape "
                f"{jnp.shape(match)}, {reference_name} has shape {jnp.shape(leaf)}."
            )
        aligned.append(match)
    _check_known_paths(reference, flat, missing, what, reference_name)
    return aligned


def _of_shape(leaf: Any) -> str:
    return f" of shape {jnp.shape(leaf)}" if hasattr(leaf, "shape") else ""


def _check_known_paths(
    reference: FlatTree, flat: FlatTree, missing: set[Path], what: str, reference_name: str
) -> None:
    """Raises ValueError if ``flat`` has a leaf at a path that ``reference`` does not have."""
    known, reference_missing = set(reference.paths), reference.missing
    for path in flat.paths:
        if path in known or path in missing or _prefix_in(path, reference_missing) is not None:
            continue
        raise ValueError(
            f"{what} does not match {reference_name}: it has a leaf at {shown(path)}, where "
            f"{reference_name} has none. The nearest paths in {reference_name}: "
            f"{nearest_paths(path, reference.paths)}."
        )


def _prefix_in(path: Path, paths: Set[Path]) -> Path | None:
    """The prefix of ``path`` (itself included) in ``paths``; of leaves there is at most one."""
    for depth in range(len(path) + 1):
        if path[:depth] in paths:
            return path[:depth]
    return None


def broadcast_prefix(
    reference: FlatTree, prefix: PyTree, what: str, is_leaf: Callable[[Any], bool]
) -> list[Any]:
    """For each leaf of ``reference`` the leaf of the prefix tree that covers it.

    Raises:
      ValueError: a path of ``reference`` is not covered, or one of ``prefix`` covers nothing.
    """
    flat = flatten(prefix, lambda node: is_missing(node) or is_leaf(node))
    found = flat.by_path
    entries, used = set(found), set()
    covering = []
    for path, leaf in zip(reference.paths, reference.leaves, strict=True):
        covering_path = _prefix_in(path, entries)
        if covering_path is not None:
            used.add(covering_path)
        elif not is_missing(leaf):
            raise ValueError(
                f"{what} has no entry for the parameter {shown(path)}. Give it the structure of "
                f"params or a prefix of it; its own paths: {nearest_paths(path, flat.paths)}."
            )
        covering.append(None if covering_path is None else found[covering_path])
    missing = reference.missing
    for path, leaf in found.items():
        if path not in used and not is_missing(leaf) and _prefix_in(path, missing) is None:
            raise ValueError(
                f"{what} has an entry at {shown(path)}, where params has nothing. The nearest "
                f"paths in params: {nearest_paths(path, reference.paths)}."
            )
    return covering


def replace_leaves(tree: PyTree, changed: dict[Path, Any]) -> PyTree:
    """``tree`` with the leaves at some paths replaced."""
    flat = flatten(tree)
    return flat.unflatten(
        changed.get(path, leaf) for path, leaf in zip(flat.paths, flat.leaves, strict=True)
    )


def nearest_paths(wanted: Path | str, paths: Iterable[Path], count: int = 3) -> str:
    """The paths most like ``wanted``, quoted, for an error message."""
    name = wanted if isinstance(wanted, str) else path_name(wanted)
    names = list(dict.fromkeys(path_name(p) for p in paths))
    close = difflib.get_close_matches(name, names, n=count, cutoff=0.3) or names[:count]
    return ", ".join(repr(n) if n else "the tree itself" for n in close) if close else "none"


def require_params(params: PyTree) -> None:
    """Raises Optax's own error if ``params`` is None."""
    if params is None:
        # Optax does not export its message, but this stage raises it.
        optax.add_decayed_weights(0.0).update((), optax.EmptyState(), None)
        raise ValueError("params is None; this transformation needs the current parameters.")


def as_real(leaf: Any, dtype: Any, what: str, path: Path) -> jax.Array:
    """``leaf`` in a real dtype; raises TypeError for a complex leaf."""
    if jnp.issubdtype(jnp.result_type(leaf), jnp.complexfloating):
        raise TypeError(
            f"{what} is complex at {shown(path)}, where the parameter is real. Take its real "
            "part, or wrap the optimizer in optax.contrib.split_real_and_imaginary."
        )
    return jnp.asarray(leaf, dtype)


def has_at_least(array: Any, size: int) -> bool:
    """Whether an array has this many elements; False for one with symbolic dimensions."""
    shape = jnp.shape(array)
    return all(isinstance(n, int) for n in shape) and math.prod(shape) >= size
