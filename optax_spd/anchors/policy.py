"""Where the anchor θ₀ lives: the weights that every method here measures the distance from.

A stage keeps its own copy ("initial" or a tree), keeps none ("zero"), or is handed one at each
update ("argument"), by the caller or by ``with_anchor``. What a stage keeps is an ordinary
parameter-shaped tree in its state, so it is sharded, saved and mapped like Adam's moments.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_spd.layers import checks, trees

PyTree = Any

POLICIES = ("initial", "zero", "argument")


class DroppedAnchor(NamedTuple):
    """Stands, leafless, where :func:`drop_anchor` took an anchor array away."""


def holds_anchor(state_class: Any) -> Any:
    """Marks a state class whose field ``anchor`` is the anchor, for ``set_anchor`` to find.

    A mark and not the field's name alone: a parameter tree may have a field called "anchor".
    """
    state_class.holds_anchor = True
    return state_class


def check_anchor(anchor: Any, anchor_dtype: Any, policies: tuple[str, ...] = POLICIES) -> None:
    """Checks ``anchor=`` and ``anchor_dtype=`` when a stage is built.

    Raises:
      TypeError: ``anchor_dtype`` is no dtype.
      ValueError: an unknown policy, None, a dtype that is not floating, or a dtype for an anchor
        that the state does not hold.
    """
    if anchor is None or (isinstance(anchor, str) and anchor not in policies):
        allowed = ", ".join(repr(p) for p in policies)
        raise ValueError(f"anchor must be one of {allowed} or a tree like params, got {anchor!r}.")
    if anchor_dtype is None:
        return
    if isinstance(anchor, str) and anchor != "initial":
        raise ValueError(
            f"anchor_dtype={anchor_dtype!r} says how the state stores the anchor, but with "
            f"anchor={anchor!r} the state stores none. Leave anchor_dtype out."
        )
    checks.check_dtype("anchor_dtype", anchor_dtype)


def init_anchor(
    anchor: Any,
    params: PyTree,
    selected: list[bool] | None = None,
    anchor_dtype: Any = None,
) -> PyTree:
    """What a stage's state holds of the anchor at first.

    Args:
      anchor: the stage's ``anchor=``.
      params: as given to ``init``: arrays, tracers, ``ShapeDtypeStruct`` leaves (answered in
        kind), or Optax's placeholder for any parameter tree, which has no leaves (answered with
        itself, so that ``optax.tree_map_params`` knows the anchor for a copy of the parameters).
      selected: per leaf whether the stage's mask selects it; the others are not copied.
      anchor_dtype: the dtype to store floating leaves in; None for their own.

    Returns:
      A tree with the structure of ``params`` that owns all of its arrays (an alias would kill a
      step that donates both params and state), or ``optax.EmptyState()``.
    """
    if isinstance(anchor, str) and anchor != "initial":
        return optax.EmptyState()
    dtype = None if anchor_dtype is None else checks.check_dtype("anchor_dtype", anchor_dtype)
    flat = trees.flatten(params)
    if not flat.leaves:
        return params
    kept = flat if selected is None else flat.only(selected)
    if isinstance(anchor, str):
        sources = kept.leaves
    else:
        sources = [
            _beside(leaf, like)
            for leaf, like in zip(match_anchor(kept, anchor), kept.leaves, strict=True)
        ]
    return flat.unflatten(
        copied(source, leaf, dtype, path)
        for path, leaf, source in zip(kept.paths, kept.leaves, sources, strict=True)
    )


def _beside(source: Any, like: Any) -> Any:
    """An anchor array that was put nowhere in particular, put where the parameter is."""
    if _is_concrete(source) and not source.committed and _is_placed(like):
        return jax.device_put(source, like.sharding)
    return source


def match_anchor(flat: trees.FlatTree, anchor: PyTree, reference_name: str = "params") -> list[Any]:
    """The anchor's leaves in the order of the parameters; each parameter must have one.

    Raises:
      ValueError: paths or shapes differ, or the anchor has a gap where params has an array.
    """
    leaves = trees.align(flat, anchor, "anchor", reference_name)
    for path, like, leaf in zip(flat.paths, flat.leaves, leaves, strict=True):
        if trees.is_missing(leaf) and not trees.is_missing(like):
            raise ValueError(
                f"anchor is {leaf!r} at {trees.shown(path)}, where params has an array. Give the "
                "pretrained value of every parameter."
            )
    return leaves


def copied(source: Any, like: Any, dtype: np.dtype | None, path: trees.Path) -> Any:
    """A copy of ``source`` in a buffer of its own, placed as the leaf ``like`` if it is host data.

    A ``jax.Array`` keeps its sharding and memory kind.
    """
    if trees.is_missing(like):
        return like
    if dtype is None or not jnp.issubdtype(jnp.result_type(source), jnp.floating):
        dtype = jnp.result_type(source)
    if isinstance(like, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(like.shape, dtype, sharding=like.sharding)
    if isinstance(source, jax.ShapeDtypeStruct):
        raise TypeError(
            f"anchor is a ShapeDtypeStruct at {trees.shown(path)}; it must hold the weights."
        )
    if isinstance(source, jax.Array):
        return jnp.copy(source) if source.dtype == dtype else source.astype(dtype)
    if _is_placed(like):  # straight to its shards: whole, it may not fit on one device
        return jax.device_put(np.asarray(source).astype(dtype), like.sharding, may_alias=False)
    return jnp.array(source, dtype)


def _is_placed(leaf: Any) -> bool:
    """Whether the caller chose the devices that an array is on."""
    return _is_concrete(leaf) and leaf.committed


def _is_concrete(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer)


def resolve_anchor(
    policy: Any,
    held: PyTree,
    extra_args: dict[str, Any],
    flat_params: trees.FlatTree,
    needed: list[bool],
) -> list[Any]:
    """The anchor's leaves in the order of the parameters, ready for use in an update.

    Args:
      policy: the stage's ``anchor=``.
      held: what the stage's state holds.
      extra_args: the update's extra arguments, for "argument".
      flat_params: the parameters, with gaps.
      needed: per leaf whether the method acts there.

    Returns:
      Per leaf an array, the number 0 for "zero", or None where it is not needed.

    Raises:
      ValueError: no ``anchor=`` was handed over, the anchor was dropped, or it does not match.
    """
    if isinstance(policy, str) and policy == "zero":
        return [0 if need else None for need in needed]
    if isinstance(policy, str) and policy == "argument":
        held = extra_args.get("anchor")
        if held is None:
            raise ValueError(
                "This stage was built with anchor='argument', but update got no anchor. Pass it "
                "(tx.update(grads, state, params, anchor=pretrained)), wrap the chain in "
                "optax_spd.with_anchor, or build the stage with anchor='initial'."
            )
    wanted = flat_params.only(needed)  # a head that is masked out need not be in the anchor
    leaves = trees.align(wanted, held, "anchor", is_leaf=is_anchor_leaf)
    for path, leaf, need in zip(flat_params.paths, leaves, needed, strict=True):
        if need and is_anchor_leaf(leaf):
            raise ValueError(
                f"There is no anchor at {trees.shown(path)} ({leaf!r} stands there): the anchor "
                "was dropped; call set_anchor(state, pretrained_params) before the next update. "
                "(It is missing after drop_anchor, or when a checkpoint was saved without it.)"
            )
    return [leaf if need else None for leaf, need in zip(leaves, needed, strict=True)]


def is_anchor_leaf(node: Any) -> bool:
    """A place in an anchor tree that holds no array."""
    return trees.is_missing(node) or isinstance(node, DroppedAnchor)


def is_on_host(theta_0: Any) -> bool:
    """Whether the anchor array lives in host memory."""
    on_host: bool = jax.typeof(theta_0).memory_space != jax.memory.Space.Device
    return on_host


def on_device(theta_0: Any) -> Any:
    """The anchor array, brought in if it lives in host memory; the held one stays there."""
    return jax.device_put(theta_0, jax.memory.Space.Device) if is_on_host(theta_0) else theta_0
