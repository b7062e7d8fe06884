"""Masks: which parameters a method applies to, given by path, as a tree or as a function."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax

from optax_spd.layers import checks, trees
from optax_spd.layers.types import PyTree


def path_mask(*patterns: str) -> Callable[[PyTree], PyTree]:
    """Makes a mask that is True for parameters whose path matches one of the patterns.

    Args:
      *patterns: regular expressions searched in the "/"-joined path ("encoder/layer_0/kernel").

    Returns:
      A function from params to a tree of bools of the same structure, for every ``mask=`` here and
      in Optax (``optax.masked``).

    Raises:
      TypeError, ValueError: no pattern, or one that is not a regular expression. When called: a
        pattern that matches nothing, with the nearest paths. A tree without arrays or with a
        ``MaskedNode`` is exempt, since another mask may have removed the matches.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax_spd
      >>> optax_spd.path_mask("kernel$")({"bias": jnp.ones(2), "kernel": jnp.ones((2, 2))})
      {'bias': False, 'kernel': True}
    """
    if not patterns:
        raise ValueError("path_mask needs at least one pattern.")
    compiled = [checks.compile_pattern(pattern) for pattern in patterns]

    def mask(params: PyTree) -> PyTree:
        flat = trees.flatten(params)
        names = [trees.path_name(path) for path in flat.paths]
        if is_unmasked(flat):
            present = [
                n for n, leaf in zip(names, flat.leaves, strict=True) if not trees.is_missing(leaf)
            ]
            for regex in compiled:
                if not any(regex.search(name) for name in present):
                    raise ValueError(
                        f"The pattern {regex.pattern!r} matches no parameter path. The nearest: "
                        f"{trees.nearest_paths(regex.pattern, flat.paths)}.{_hint(flat)}"
                    )
        return flat.unflatten(
            leaf if trees.is_missing(leaf) else any(regex.search(name) for regex in compiled)
            for name, leaf in zip(names, flat.leaves, strict=True)
        )

    return mask


def _hint(flat: trees.FlatTree) -> str:
    if flat.paths != [()]:
        return ""
    return (
        " It was called with a bare array: if this is optax.inject_hyperparams, which takes every "
        "callable for a schedule, name the mask in its static_args."
    )


def is_unmasked(flat: trees.FlatTree) -> bool:
    """Whether the tree has array leaves, and no other mask has removed any."""
    masked = any(isinstance(leaf, optax.MaskedNode) for leaf in flat.leaves)
    return not masked and any(not trees.is_missing(leaf) for leaf in flat.leaves)


def resolve_mask(
    mask: PyTree | Callable[..., Any] | None, flat: trees.FlatTree, updates: PyTree = None
) -> list[bool] | None:
    """Per leaf of ``flat`` whether the method applies; None if there is no mask.

    Raises:
      TypeError: an entry is not a bool.
      ValueError: the mask does not fit the tree, or selects nothing in a complete tree.
    """
    if mask is None:
        return None
    if not flat.leaves:
        return []  # Optax's params placeholder has no leaves, so no mask fits it
    tree = mask(flat.unflatten(flat.leaves)) if is_mask_function(mask) else mask
    selected = bools("mask", tree, flat, updates)
    if is_unmasked(flat) and not any(selected):
        raise ValueError(
            "mask is False for every parameter, so the method would never act. The parameter "
            f"paths: {trees.nearest_paths('', flat.paths, count=5)}."
        )
    return selected


def bools(name: str, tree: PyTree, flat: trees.FlatTree, updates: PyTree = None) -> list[bool]:
    """Per leaf of ``flat`` the bool that covers it in a (prefix) tree; False for a missing leaf.

    A tree made for the trained part of a model has None for the rest, which counts as False.

    Args:
      name: the argument that the tree was given as, for the message.
      tree: bools like the parameters, or a prefix.
      flat: the parameters, which may be the whole model.
      updates: the incoming updates, which tell what is trained; None if there are none yet.

    Raises:
      TypeError: an entry is not a bool.
      ValueError: the tree does not fit.
    """
    covering = trees.broadcast_prefix(flat, tree, name, lambda _: False)
    has_none = updates is not None and any(value is None for value in covering)
    untrained = trees.flatten(updates).missing if has_none else set()
    found = []
    for path, leaf, value in zip(flat.paths, flat.leaves, covering, strict=True):
        if trees.is_missing(leaf) or (value is None and path in untrained):
            found.append(False)
        elif isinstance(value, bool | np.bool_):
            found.append(bool(value))
        else:
            raise TypeError(
                f"{name} must hold True or False, got {value!r} at {trees.shown(path)}."
            )
    return found


def is_mask_function(mask: Any) -> bool:
    """Whether ``mask`` is a function, not a callable tree of bools (an Equinox module)."""
    leaves = jax.tree.leaves(mask)
    is_tree = bool(leaves) and all(isinstance(leaf, bool | np.bool_) for leaf in leaves)
    return callable(mask) and not is_tree
