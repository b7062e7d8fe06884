"""A fingerprint of a state's layers, to check that a state belongs to its parameters.

Per-layer vectors hold no names. A state restored for another model, or with other ``layers=`` or
``mask=``, may have the right shapes but belong to other layers. The fingerprint in the state
detects this.
"""

import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optax_spd.layers import plans
from optax_spd.layers.spec import LayerFn, check_layers
from optax_spd.layers.types import PyTree


def of_plan(plan: plans.LayerPlan) -> jax.Array:
    """The fingerprint of the layers, an int32 scalar.

    The upper half depends on the arrays' paths, which an anchor has too (:func:`of_arrays`); the
    lower half on the layers' names and on how ``layers=`` divides the arrays.
    """
    return jnp.asarray(expected(plan)[False])


def expected(plan: plans.LayerPlan) -> dict[bool, np.int32]:
    """The fingerprint that a state of these layers has, on the host.

    The key is whether the state sees stacked axes in front of all others (:func:`fingerprinted`).
    """
    entries = [entry for entry in plan.arrays if entry is not None]
    arrays = of_arrays(entry.name for entry in entries)

    def of_axes(axes: Callable[[plans.ArrayLayers], tuple[int, ...]]) -> np.int32:
        divided = sorted(f"{entry.name} {axes(entry)} {entry.start}" for entry in entries)
        bits = np.array([_checksum([*plan.names, *divided]), arrays], "<u2")
        return np.int32(bits.view("<i4")[0])

    return {
        False: of_axes(lambda entry: entry.stacked_axes),
        True: of_axes(lambda entry: tuple(range(len(entry.stacked_axes)))),
    }


def of_arrays(names: Iterable[str]) -> int:
    """The fingerprint of the arrays with these paths, 16 bits."""
    return _checksum(sorted(names))


def arrays_half(fingerprint: Any) -> np.ndarray:
    """The upper half of a fingerprint, comparable to :func:`of_arrays`."""
    return (np.asarray(fingerprint) >> 16) & 0xFFFF


def _checksum(names: Iterable[str]) -> int:
    # Each name ends in a newline, so that one empty name is not the same as none.
    return zlib.crc32("".join(f"{name}\n" for name in names).encode()) & 0xFFFF


def check_state(
    state: PyTree,
    params: PyTree,
    *,
    layers: LayerFn | None = None,
    mask: PyTree | Callable[[PyTree], PyTree] | None = None,
) -> None:
    """Checks that a state was made for the layers of ``params``; call it after every restore.

    The vectors of a state hold one number per layer and no names. Restored for another model, or
    with other ``layers=`` or ``mask=``, they can have the right length but belong to other layers.
    This function compares the fingerprint in the state. It runs on the host and waits for the
    state; do not call it inside ``jit``.

    Args:
      state: the state of a whole optimizer, however nested.
      params: the parameters, as given to ``init`` (arrays or ``ShapeDtypeStruct`` leaves). For a
        stage inside ``optax.masked`` or ``partition`` give that stage's state, and ``mask``.
      layers: the stage's ``layers=``.
      mask: the stage's ``mask=``. Where stages have different ones, check each stage's state.

    Raises:
      ValueError: a state was made for other layers, or nothing in ``state`` holds values per layer.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax_spd
      >>> params = {"kernel": jnp.ones((2, 2))}
      >>> state = optax_spd.adam_spd(1e-3).init(params)
      >>> optax_spd.check_state(state, params)
    """
    check_layers(layers)
    plan = plans.planned(params, layers, mask).plan
    known = expected(plan)
    found = list(fingerprinted(state))
    if not found:
        raise ValueError(
            "The state holds no values per layer. Either none of its stages keeps any, or a "
            "checkpoint was restored without the structure of tx.init(params) and is plain dicts "
            "and lists: restore it into that structure."
        )
    for node, in_front in found:
        # A state made under vmap holds several equal fingerprints.
        if np.any(np.asarray(node.layer_fingerprint) != known[in_front]):
            raise ValueError(
                f"The state {type(node).__name__} was made for other layers than the "
                f"{len(plan.names)} that params has under the given layers= and mask=, such as "
                f"{', '.join(map(repr, plan.names[:3]))}. Give check_state what init got: the same "
                "parameters, layers= and mask=. If it got them, the state is that of another model."
            )


def fingerprinted(state: PyTree, in_front: bool = False) -> Iterator[tuple[Any, bool]]:
    """The states with a fingerprint in a nested state.

    Yields:
      A state, and whether its arrays have their stacked axes in front of all others, because they
      are the vectors that a wrapper (``with_sparse``) makes of the parameters.
    """

    def is_found(node: Any) -> bool:
        return has_fingerprint(node) or makes_vectors(node)

    for node in jax.tree.leaves(state, is_leaf=is_found):
        if has_fingerprint(node):
            yield node, in_front
        if is_found(node):
            yield from fingerprinted([*node], in_front or makes_vectors(node))


def has_fingerprint(node: Any) -> bool:
    """Whether ``node`` is a state with values per layer."""
    return "layer_fingerprint" in getattr(node, "_fields", ())


def makes_vectors(node: Any) -> bool:
    """Whether ``node`` is the state of a wrapper whose inner stages see parts of the arrays.

    :func:`optax_spd.anchors.policy.narrows_anchor` marks it.
    """
    return bool(getattr(node, "narrows_anchor", False))
