"""Freezing: excludes arrays from training, without any optimizer state for them.

Kumar, Shen, Bubeck, Gunasekar: "How to Fine-Tune Vision Models with SGD", 2022,
https://arxiv.org/abs/2211.09359. Their finding: AdamW beats SGD in fine-tuning where the first
layer (the embedding) has gradients far larger than the rest; with that layer frozen, SGD does as
well or better, at two thirds of AdamW's memory.

Differences from the paper: the embedding layer is found by path (it need not be the first array),
and any part can be frozen under any optimizer.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import optax

from optax_spd import wrappers
from optax_spd.layers import masks, trees
from optax_spd.layers.types import PyTree
from optax_spd.sharding import placement

Frozen = str | Sequence[str] | PyTree | Callable[[PyTree], PyTree]


def with_frozen(
    inner: optax.GradientTransformation, frozen: Frozen
) -> optax.GradientTransformationExtraArgs:
    """Trains some arrays with ``inner`` and freezes the others, without any state for them.

    It is ``optax.selective_transform`` by path. ``inner`` sees ``MaskedNode`` in place of the
    frozen arrays: it keeps no moments and no anchor for them, and their gradients, NaN or not, do
    not enter its clipping norm. Their updates are zero. Wrap the whole optimizer in it,
    ``optax.MultiSteps`` and :func:`optax_spd.with_anchor` included: stages outside see the frozen
    arrays.

    Args:
      inner: any transformation, usually a whole optimizer.
      frozen: what to freeze, as

        - one or several regular expressions, searched in the "/"-joined paths
          (:func:`optax_spd.path_mask`): an array that matches any of them is frozen;
        - a tree of bools, like params or a prefix of it, True where an array is frozen;
        - a function from params to such a tree.

    Returns:
      A transformation that passes extra arguments (``grad=``, ``anchor=``, ...) on to ``inner``.
      Updates keep their structure and dtypes: a frozen array's gradient may be None or MaskedNode
      (then so is its update). The state is ``inner``'s, for the trained arrays only. The mask is
      static: for gradual unfreezing make a new transformation in each phase.

    Raises:
      TypeError: ``inner`` is not a transformation; ``frozen`` holds anything but bools.
      ValueError: an invalid pattern (at construction); a pattern that matches no parameter, with
        the nearest paths, a ``frozen`` that does not fit params or leaves nothing to train (in
        ``init``).

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import optax
      >>> import optax_spd
      >>> params = {"embed": jnp.ones((8, 2)), "head": jnp.ones(2)}
      >>> tx = optax_spd.with_frozen(optax.adam(1e-3), "^embed")
      >>> state = tx.init(params)
      >>> sum(x.nbytes for x in jax.tree.leaves(state))  # two moments of the head, and a count
      20
      >>> updates, state = tx.update(params, state, params)
      >>> float(abs(updates["embed"]).max())
      0.0

    .. seealso:: :func:`optax_spd.sgd_freeze_embed`, :func:`optax_spd.layerwise_lr_decay`
    """
    inner = wrappers.as_transformation("with_frozen", inner)
    select = _selection(frozen)

    def init(params: PyTree) -> Any:
        params = trees.without_settings(params)
        mask = _mask_of(params, select)
        _check_something_trains(params, mask)
        tx = optax.transforms.selective_transform(inner, freeze_mask=mask)
        return placement.shard_like_params(tx.init(params), params)

    def update(
        updates: PyTree, state: Any, params: PyTree = None, **extra_args: Any
    ) -> tuple[PyTree, Any]:
        # The mask is made from params, since a frozen array's gradient may be missing. Without
        # params it is made from the updates; a pattern may then match only missing ones, which
        # must not raise, so they are marked as masked.
        if params is None:
            mask = _mask_of(updates, lambda tree: select(_with_masked_missing(tree)))
        else:
            params = trees.without_settings(params, updates)
            mask = _mask_of(params, select, updates)
        tx = optax.transforms.selective_transform(inner, freeze_mask=mask)
        if params is not None:
            _check_state(state, updates, mask, lambda: tx.init(params))
        new_updates, new_state = tx.update(updates, state, params, **extra_args)
        return new_updates, new_state

    return optax.GradientTransformationExtraArgs(init, update)


def _check_state(state: Any, updates: PyTree, frozen: PyTree, init: Callable[[], PyTree]) -> None:
    """Raises ValueError if the state holds None where a trained parameter needs an array.

    Orbax restores None where a checkpoint was saved with other parameters frozen.

    Args:
      state: as ``update`` got it.
      updates: the incoming updates; a parameter trains where there is one.
      frozen: bools like params.
      init: makes the state of these parameters. It is traced only if a None is suspicious, to tell
        a lost array from a None of the inner transformation's own.
    """
    is_frozen = trees.flatten(frozen).by_path
    trained = {
        path
        for path, leaf in trees.flatten(updates).by_path.items()
        if not trees.is_missing(leaf) and not is_frozen.get(path, True)
    }
    suspicious = {}
    for path, leaf in trees.flatten(state, unique=False).by_path.items():
        starts = [start for start in range(len(path) + 1) if path[start:] in trained]
        # A stage that finds no anchor raises itself: set_anchor mends that, without another init.
        if leaf is None and starts and path[: starts[0]][-1:] != ("anchor",):
            suspicious[path] = path[starts[0] :]
    if not suspicious:
        return
    made = trees.flatten(jax.eval_shape(init), unique=False).by_path
    for path, parameter in suspicious.items():
        if hasattr(made.get(path), "shape"):
            raise ValueError(
                f"The state holds None at {trees.shown(path)}, where init makes an array for the "
                f"parameter {trees.shown(parameter)}, which trains in this update. Either init saw "
                "that parameter as None or frozen, or a checkpoint was restored that lacks the "
                "array, most often one saved with other parameters frozen. Call init again with "
                "these parameters and this frozen=."
            )


def _selection(frozen: Frozen) -> Callable[[PyTree], PyTree]:
    """Converts any form of ``frozen=`` to a function from params to a (prefix) tree of bools."""
    patterns = (frozen,) if isinstance(frozen, str) else frozen
    if isinstance(patterns, list | tuple | set | frozenset) and any(
        isinstance(p, str) for p in patterns
    ):
        return masks.path_mask(*patterns)
    if masks.is_mask_function(frozen):
        return frozen  # type: ignore[return-value]
    return lambda _: frozen


def _with_masked_missing(tree: PyTree) -> PyTree:
    """The tree with ``MaskedNode`` in place of every missing leaf."""
    flat = trees.flatten(tree)
    return flat.unflatten(
        optax.MaskedNode() if trees.is_missing(leaf) else leaf for leaf in flat.leaves
    )


def _mask_of(tree: PyTree, select: Callable[[PyTree], PyTree], updates: PyTree = None) -> PyTree:
    """The bools that ``select`` gives, broadcast to the structure of ``tree``.

    Missing leaves stay as they are. For ``updates`` see :func:`optax_spd.layers.masks.bools`.
    """
    flat = trees.flatten(tree)
    if not flat.leaves:
        return False  # Optax's params placeholder has no leaves, so no mask fits it
    frozen = select(tree)
    if frozen is False and flat.paths != [()]:
        raise ValueError(
            "frozen gives one False for the whole tree, so nothing would be frozen: leave "
            "with_frozen out, or pass a tree of bools. If this is optax.inject_hyperparams, which "
            "takes every callable for a schedule, name the argument in its static_args."
        )
    is_frozen = masks.bools("frozen", frozen, flat, updates)
    return flat.unflatten(
        leaf if trees.is_missing(leaf) else value
        for leaf, value in zip(flat.leaves, is_frozen, strict=True)
    )


def _check_something_trains(params: PyTree, mask: PyTree) -> None:
    flat = trees.flatten(params)
    if masks.is_unmasked(flat) and all(jax.tree.leaves(mask)):
        raise ValueError(
            "frozen is True for every parameter, so nothing would be trained. The parameter "
            f"paths: {trees.nearest_paths('', flat.paths, count=5)}."
        )
