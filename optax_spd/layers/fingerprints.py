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

PyTree = Any


def of_plan(plan: plans.LayerPlan, *, in_front: bool = False) -> jax.Array:
    """The fingerprint of the layers, an int32 scalar.

    The upper half depends on the arrays' paths, which an anchor has too (:func:`of_arrays`); the
    lower half on the layers' names and on how ``layers=`` divides the arrays.

    Args:
      plan: the layers.
      in_front: whether the state sees stacked axes in front of all others (:func:`fingerprinted`).
    """
    entries = [entry for entry in plan.arrays if entry is not None]
    arrays = of_arrays(entry.name for entry in entries)
    divided = sorted(
        f"{e.name} {tuple(range(len(e.stacked_axes))) if in_front else e.stacked_axes} {e.start}"
        for e in entries
    )
    bits = np.array([_checksum([*plan.names, *divided]), arrays], "<u2")
    return jnp.asarray(bits.view("<i4")[0], jnp.int32)


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
    expected = {front: np.asarray(of_plan(plan, in_front=front)) for front in (False, True)}
    found = list(fingerprinted(state))
    if not found:
        raise ValueError(
            "The state holds no values per layer. Either none of its stages keeps any, or a "
            "checkpoint was restored without the structure of tx.init(params) and is plain dicts "
            "and lists: restore it into that structure."
        )
    for node, in_front in found:
        # A state made under vmap holds several equal fingerprints.
        if np.any(np.asarray(node.layer_fingerprint) != expected[in_front]):
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
        return "layer_fingerprint" in getattr(node, "_fields", ()) or _makes_vectors(node)

    for node in jax.tree.leaves(state, is_leaf=is_found):
        if is_found(node):
            if not _makes_vectors(node):
                yield node, in_front
            others = [getattr(node, field) for field in node._fields]
            yield from fingerprinted(others, in_front or _makes_vectors(node))


def _makes_vectors(node: Any) -> bool:
    return bool(getattr(node, "narrows_anchor", False))
