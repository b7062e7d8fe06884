"""Where the anchor θ₀ is kept: the weights from which the methods measure the deviation.

A stage keeps its own copy ("initial" or a tree), keeps none ("zero"), or gets one at each update
("argument"), from the caller or ``with_anchor``. Its own copy is an ordinary parameter-shaped tree
in the state, so it is sharded, saved and mapped like Adam's moments.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_spd.layers import checks, trees
from optax_spd.layers.types import PyTree

POLICIES = ("initial", "zero", "argument")


class DroppedAnchor(NamedTuple):
    """A node without leaves, in place of each anchor array that :func:`drop_anchor` removed."""


def holds_anchor(state_class: Any) -> Any:
    """Marks a state class whose field ``anchor`` is the anchor, for ``set_anchor`` to find.

    The field's name alone would not do: a parameter tree may have a field called "anchor". States
    with a ``layer_fingerprint`` are found without the mark.
    """
    state_class.holds_anchor = True
    return state_class


def narrows_anchor(state_class: Any) -> Any:
    """Marks the state of a wrapper whose inner stages see parts of the arrays, with their anchors.

    It has the fields ``anchor`` and ``inner_state``, and two methods, from a whole anchor:
    ``narrowed`` to that of the inner stages, and ``whole_anchor`` to what to keep of it.
    """
    state_class.narrows_anchor = True
    return state_class


def check_anchor(anchor: Any, anchor_dtype: Any, policies: tuple[str, ...] = POLICIES) -> None:
    """Checks ``anchor=`` and ``anchor_dtype=`` when a stage is built.

    Raises:
      TypeError: ``anchor_dtype`` is not a dtype.
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
    """The anchor that a stage's state holds after ``init``.

    Args:
      anchor: the stage's ``anchor=``.
      params: as given to ``init``: arrays, tracers, ``ShapeDtypeStruct`` leaves (answered in
        kind), or Optax's placeholder, which has no leaves (returned as it is, so that
        ``optax.tree_map_params`` recognises the anchor as parameter-like).
      selected: per leaf whether the stage's mask selects it; the others are not copied.
      anchor_dtype: the dtype to store floating leaves in; None for their own.

    Returns:
      A tree with the structure of ``params`` that owns all its arrays, or ``optax.EmptyState()``.
      (With an alias, a step that donates both params and state would fail.)
    """
    if isinstance(anchor, str) and anchor != "initial":
        return optax.EmptyState()
    dtype = None if anchor_dtype is None else checks.check_dtype("anchor_dtype", anchor_dtype)
    flat = trees.only_parameters(trees.flatten(params))
    if not flat.leaves:
        return params
    kept = flat if selected is None else flat.only(selected)
    if isinstance(anchor, str):
        sources = kept.leaves
    else:
        sources = [
            _placed_like(leaf, like)
            for leaf, like in zip(match_anchor(kept, anchor), kept.leaves, strict=True)
        ]
    return flat.unflatten(
        copied(source, leaf, dtype, path)
        for path, leaf, source in zip(kept.paths, kept.leaves, sources, strict=True)
    )


def _placed_like(source: Any, like: Any) -> Any:
    """Moves an anchor array without a committed device to the parameter's devices."""
    if _is_concrete(source) and not source.committed and _is_placed(like):
        return jax.device_put(source, like.sharding)
    return source


def match_anchor(flat: trees.FlatTree, anchor: PyTree, reference_name: str = "params") -> list[Any]:
    """The anchor's leaves in the order of the parameters; each parameter must have one.

    Raises:
      ValueError: paths or shapes differ, or the anchor's leaf is missing where params has an array.
    """
    try:
        leaves = trees.align(flat, anchor, "anchor", reference_name)
    except ValueError as error:
        raise ValueError(f"{error}{_advice(flat, anchor, reference_name)}") from None
    for path, like, leaf in zip(flat.paths, flat.leaves, leaves, strict=True):
        if trees.is_missing(leaf) and not trees.is_missing(like):
            raise ValueError(
                f"anchor is {leaf!r} at {trees.shown(path)}, where params has an array. Give the "
                "pretrained value of every parameter."
            )
    return leaves


def _advice(flat: trees.FlatTree, anchor: PyTree, reference_name: str) -> str:
    """What to do about an anchor that does not match, where the mismatch has a known form."""
    given = trees.flatten(anchor).by_path
    arrays = {p: x for p, x in flat.by_path.items() if not trees.is_missing(x)}
    if not arrays or not arrays.keys() <= given.keys():
        return ""
    devices = {np.shape(held)[:1] for held in arrays.values()}
    if len(devices) == 1 and all(
        np.ndim(held) > 0 and np.shape(held)[1:] == np.shape(given[path])
        for path, held in arrays.items()
    ):
        return (
            f" Every array of {reference_name} has one more leading axis, of size "
            f"{devices.pop()[0]}. If it is replicated for pmap, unreplicate first "
            "(flax.jax_utils.unreplicate)."
        )
    fits = all(np.shape(held) == np.shape(given[path]) for path, held in arrays.items())
    if fits and given.keys() - set(flat.paths):
        return (
            " Give only the parameters: for Flax NNX nnx.state(model, nnx.Param), without batch "
            "statistics and random keys."
        )
    return ""


def copied(source: Any, like: Any, dtype: np.dtype | None, path: trees.Path) -> Any:
    """A copy of ``source`` in a buffer of its own.

    Host data is placed like the leaf ``like``; a ``jax.Array`` keeps its sharding and memory kind.
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
    if _is_placed(like):  # directly to the shards, since the whole may not fit on one device
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
      held: the anchor that the stage's state holds.
      extra_args: the update's extra arguments, for "argument".
      flat_params: the parameters, missing leaves included.
      needed: per leaf whether the anchor is needed.

    Returns:
      Per leaf an array, the number 0 for "zero", or None where it is not needed.

    Raises:
      ValueError: no ``anchor=`` was passed, the anchor was dropped, or it does not match.
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
                f"There is no anchor at {trees.shown(path)} (found {leaf!r}){_remedy(policy, leaf)}"
            )
    return [leaf if need else None for leaf, need in zip(leaves, needed, strict=True)]


def _remedy(policy: Any, leaf: Any) -> str:
    """What to do about a missing anchor array, by what stands in its place."""
    dropped = (
        "the anchor was dropped; call set_anchor(state, pretrained_params) before the next update. "
        "(It is missing after drop_anchor, or when a checkpoint was saved without it.)"
    )
    if isinstance(leaf, optax.MaskedNode):
        return (
            ". A mask left this parameter out of the anchor: call init again with the mask and the "
            "parameters that update gets."
        )
    if leaf is not None:
        return f": {dropped}"
    passed = isinstance(policy, str) and policy == "argument"
    return (
        f". Either {dropped} Or init got no parameter here: call init again with the parameters "
        f"that update gets.{' Or pass an anchor= that has this array.' if passed else ''}"
    )


def is_anchor_leaf(node: Any) -> bool:
    """Whether a node of an anchor tree may stand for a missing or dropped array.

    ``drop_anchor`` leaves a marker. Where a checkpoint has no array, Orbax leaves None or ``...``,
    and flax.serialization ``{}``. A parameter tree may have empty containers of its own, so a
    caller compares with a tree that has all arrays.
    """
    has_children = jax.tree.leaves(node, is_leaf=lambda child: child is not node)
    return node is ... or not has_children


def is_on_host(theta_0: Any) -> bool:
    """Whether the anchor array is in host memory."""
    on_host: bool = jax.typeof(theta_0).memory_space != jax.memory.Space.Device
    return on_host


def on_device(theta_0: Any) -> Any:
    """The anchor array on the device; if the state's is in host memory, a copy of it."""
    return jax.device_put(theta_0, jax.memory.Space.Device) if is_on_host(theta_0) else theta_0
