"""Pairs of kernels with a layer of units in between, found by path patterns.

For methods that act on what enters and what leaves a unit (PathProx). Kernels have Flax's layout,
(..., inputs, outputs), and a layer's bias is the array named "bias" beside its kernel.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp

from optax_spd.layers import checks, masks, plans, trees


class Pair(NamedTuple):
    """The four arrays around a layer of units, or where they are in a tree.

    Attributes:
      w: weights into the units, shape (..., inputs, units).
      b: their bias, shape (units,), or None.
      v: weights out of the units, shape (..., units, outputs).
      c: their bias, shape (outputs,), or None.
    """

    w: Any
    b: Any
    v: Any
    c: Any


def checked(pairs: Any) -> list[tuple[Any, Any]]:
    """The compiled patterns.

    Raises:
      TypeError: not a sequence of pairs of patterns.
      ValueError: no pair, or an invalid pattern.
    """
    if not _is_sequence(pairs) or not all(_is_sequence(p) and len(p) == 2 for p in pairs):
        raise TypeError(
            "pairs must be a sequence of (pattern of the weights into the units, pattern of those "
            f"out of them), such as [('dense_0', 'dense_1')], got {pairs!r}."
        )
    if not pairs:
        raise ValueError("pairs is empty, so the method would never act.")
    return [(checks.compile_pattern(w), checks.compile_pattern(v)) for w, v in pairs]


def _is_sequence(x: Any) -> bool:
    return isinstance(x, Sequence) and not isinstance(x, str)


def found(patterns: Sequence[tuple[Any, Any]], flat: trees.FlatTree) -> list[Pair]:
    """For each pair the indices of its arrays in the tree.

    None are found in a part of a tree (in ``optax.partition``) that has no array of any pair.

    Raises:
      ValueError: a pattern does not match exactly one kernel, or kernels do not fit together.
    """
    kernels = {
        trees.path_name(path): index
        for index, (path, leaf) in enumerate(zip(flat.paths, flat.leaves, strict=True))
        if _is_kernel(path, leaf, patterns)
    }
    matches = [
        [[name for name in kernels if regex.search(name)] for regex in pair] for pair in patterns
    ]
    if not masks.is_unmasked(flat) and not any(names for pair in matches for names in pair):
        return []
    result: list[Pair] = []
    used: dict[str, int] = {}
    for number, (pair, (ins, outs)) in enumerate(zip(patterns, matches, strict=True)):
        for regex, names in zip(pair, (ins, outs), strict=True):
            if len(names) != 1:
                _raise_for_matches(number, regex.pattern, names, flat, [*kernels])
        w, v = ins[0], outs[0]
        for name in (w, v):
            if name in used or w == v:
                raise ValueError(
                    f"pairs[{number}] matches {name!r}, which is in pairs[{used.get(name, number)}]"
                    " already. Each kernel belongs to one pair, and is either into its units or "
                    "out of them."
                )
        used |= dict.fromkeys((w, v), number)
        _check_fit(number, w, v, *(jnp.shape(flat.leaves[kernels[name]]) for name in (w, v)))
        b, c = (_bias_of(number, kernels[name], flat) for name in (w, v))
        result.append(Pair(kernels[w], b, kernels[v], c))
    return result


def _is_kernel(path: trees.Path, leaf: Any, patterns: Sequence[tuple[Any, Any]]) -> bool:
    """Whether a leaf can be a kernel; raises TypeError for a complex one that is matched."""
    if trees.is_missing(leaf) or len(jnp.shape(leaf)) < 2 or path[-1:] == ("bias",):
        return False
    name = trees.path_name(path)
    if jnp.issubdtype(jnp.result_type(leaf), jnp.complexfloating):
        if any(regex.search(name) for pair in patterns for regex in pair):
            raise TypeError(f"pairs matches {name!r}, which is complex; its units have no ReLU.")
        return False
    return plans.can_be_layer(leaf)


def _raise_for_matches(
    number: int, pattern: str, names: list[str], flat: trees.FlatTree, kernels: list[str]
) -> None:
    if names:
        raise ValueError(
            f"The pattern {pattern!r} of pairs[{number}] matches {len(names)} kernels: "
            f"{', '.join(map(repr, names[:5]))}. Narrow it to one, and give each pair an entry of "
            "its own."
        )
    nearest = trees.nearest_paths(pattern, [(name,) for name in kernels])
    hint = ""
    if not masks.is_unmasked(flat):
        hint = (
            " Other arrays of pairs= are here, so a mask or partition around the stage splits the "
            "pairs: put the stage behind it."
        )
    raise ValueError(
        f"The pattern {pattern!r} of pairs[{number}] matches no kernel (an array with two or more "
        f"axes). The nearest: {nearest}.{hint}"
    )


def _check_fit(
    number: int, w: str, v: str, w_shape: tuple[int, ...], v_shape: tuple[int, ...]
) -> None:
    """Raises ValueError unless the units that W leads to are those that V comes from."""
    told = f"pairs[{number}] cannot pair {w!r} of shape {w_shape} with {v!r} of shape {v_shape}: "
    if len(w_shape) != len(v_shape):
        raise ValueError(
            told + "both must be Dense kernels (two axes), or both convolutions with as many "
            "spatial axes."
        )
    if w_shape[-1] != v_shape[-2]:
        raise ValueError(
            told + f"the first has {w_shape[-1]} output units (its last axis), the second "
            f"{v_shape[-2]} inputs (its last but one). Pair a layer with the one that its units "
            "feed. Kernels must have Flax's layout, (..., inputs, outputs)."
        )


def _bias_of(number: int, kernel: int, flat: trees.FlatTree) -> int | None:
    """The index of the bias beside a kernel, or None if there is none."""
    path = (*flat.paths[kernel][:-1], "bias")
    if path not in flat.paths or kernel == flat.paths.index(path):
        return None
    index = flat.paths.index(path)
    bias, units = flat.leaves[index], jnp.shape(flat.leaves[kernel])[-1]
    if trees.is_missing(bias):
        return None
    if jnp.shape(bias) != (units,):
        raise ValueError(
            f"pairs[{number}] takes {trees.shown(path)} for the bias of the {units} output units "
            f"of {trees.shown(flat.paths[kernel])}, but it has shape {jnp.shape(bias)}. Stacked "
            "layers (nn.scan) cannot be in a pair."
        )
    return index


def with_update(pairs: list[Pair], flat: trees.FlatTree, leaves: list[Any]) -> list[Pair]:
    """The pairs, or none if no array of any pair has an update.

    Raises:
      ValueError: some of their arrays have an update, and some have not.
    """
    indices = [i for pair in pairs for i in pair if i is not None]
    missing = [i for i in indices if trees.is_missing(leaves[i])]
    if len(missing) == len(indices):
        return []
    if missing:
        raise ValueError(
            f"The update is {leaves[missing[0]]!r} at {trees.shown(flat.paths[missing[0]])}, which "
            "is in pairs=, while other arrays of the pairs have one. Pairs are changed together: "
            "train all their arrays, or leave the pair out of pairs=."
        )
    return pairs
