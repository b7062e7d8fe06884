"""Layer-wise learning-rate decay: the nearer a layer is to the input, the smaller its steps.

Howard & Ruder: "Universal Language Model Fine-tuning for Text Classification", ACL 2018,
https://arxiv.org/abs/1801.06146 (discriminative fine-tuning); Clark et al.: "ELECTRA", ICLR 2020,
https://arxiv.org/abs/2003.10555; Bao et al.: "BEiT", ICLR 2022, https://arxiv.org/abs/2106.08254.
A layer at depth d of a model whose head is at depth D takes its step times

    s = max(s_min, decay^(D - d))

Differences from those papers and their code:

1. It scales the update and not the learning rate. Behind ``optax.adamw`` that is the same, weight
   decay included.
2. Depths are BEiT's: the embeddings are one below layer 0, what follows the last layer is one above
   it and has the full rate. ELECTRA's code leaves out one more depth, so that all its layers' rates
   are smaller by one factor. ULMFiT has a factor of 1/2.6.
3. ``min_scale`` is ours.
"""

import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_spd.core import scaling, stage
from optax_spd.layers import checks, embeddings, fingerprints, masks, plans, trees
from optax_spd.layers.spec import LayerFn, check_layers

PyTree = Any
Depth = str | Callable[[str], float | None]
_EMBEDDING = re.compile("|".join(embeddings.DEFAULT_EMBEDDING_PATTERNS))


class LayerDecayState(NamedTuple):
    """State of :func:`layerwise_lr_decay`.

    Attributes:
      count: number of updates so far, int32; what a scheduled decay is evaluated at.
      layer_fingerprint: tells for which layers the vectors are (:func:`optax_spd.check_state`).
      layer_decay_scale: s of the last update (before the first: of the next), one entry per layer
        in ``layer_names`` order.
    """

    count: jax.Array  # type: ignore[assignment]  # shadows tuple.count, as in Optax
    layer_fingerprint: jax.Array
    layer_decay_scale: jax.Array


def decay_scale(decay: jax.Array, height: jax.Array, min_scale: jax.Array) -> jax.Array:
    """The scale s of a layer, elementwise for a vector of layers.

    Args:
      decay: from 0 to 1.
      height: D - d >= 0, how many layers below the head.
      min_scale: s_min.

    Returns:
      max(s_min, decay^(D - d)), with 0^0 = 1.
    """
    return jnp.maximum(min_scale, jnp.power(decay, height))


def layerwise_lr_decay(
    decay: checks.ScalarOrSchedule,
    depth: Depth,
    *,
    min_scale: checks.ScalarOrSchedule = 0.0,
    layers: LayerFn | None = None,
    mask: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Scales each layer's update by its depth; place it *behind* the optimizer, never before.

    ``optax.chain(optax.adam(1e-3), layerwise_lr_decay(0.75, ...))``. Before Adam it would do
    **nothing**: Adam divides by the gradient's size, and the scale with it. Behind the optimizer it
    scales the step that is taken; before :func:`optax_spd.spd`, ``tpgm`` and ``ftp``, which judge
    that step. A layer's update is multiplied by

    .. math::

        s = \max\left(s_{\min}, \mathrm{decay}^{\,D - d}\right)

    where d is the layer's depth and D the head's.

    Args:
      decay: the factor from one layer to the one below, from 0 to 1 (usual: 0.65 to 0.9), or a
        schedule of it. With 0 only what is at depth D moves.
      depth: d, as one of

        - a regular expression with one group, the layer's number (``r"layer_(\d+)/"``), searched
          in the layer names (:func:`optax_spd.layer_names`; a stacked layer's ends in "[i]", so
          ``r"\[(\d+)\]$"`` counts the layers of a scanned model). Then D is the largest number
          plus one: the last layer has the scale ``decay``. Embeddings
          (:data:`optax_spd.DEFAULT_EMBEDDING_PATTERNS`) that it does not match are one below the
          smallest, and everything else it does not match, such as the head and the last
          normalisation, is at depth D: full rate;
        - a function from layer name to d, or to None for full rate. Then D is the largest d.
      min_scale: the smallest scale, from 0 to 1, or a schedule of it.
      layers: what a layer is, see :func:`optax_spd.stacked`; None for one per array.
      mask: as for :func:`optax_spd.spd`: where False, the scale is 1 and the layer does not count
        for D.

    Returns:
      A stage whose ``update`` needs ``params``. Updates keep their structure and dtypes; scales
      are taken in at least float32. The state holds ``layer_decay_scale``, s per layer: shape
      (layers,), in the order of :func:`optax_spd.layer_names`. Integer, empty, None and MaskedNode
      leaves pass through. It counts the layers that it is shown: inside ``optax.partition`` or
      ``optax.masked`` those of its part only, which is right for the towers of a CLIP model, and
      wrong where a part lacks the last layers (then put it behind: ``chain(partition(...),
      layerwise_lr_decay(...))``). Under ``optax.inject_hyperparams`` name ``depth``, ``layers``
      and ``mask`` in ``static_args``. Under ``shard_map`` leave the stacked axes whole.

    Raises:
      TypeError: a complex parameter, a mask that is not bools, a wrong argument type, a depth that
        is no number.
      ValueError: ``decay`` or ``min_scale`` outside [0, 1], a pattern without exactly one group
        (at construction); a pattern that matches no layer, with the nearest; a depth that is not
        finite, no params, trees or shapes that do not match.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import optax_spd
      >>> params = {name: jnp.ones(2) for name in ("embed", "layer_0", "layer_1", "head")}
      >>> tx = optax.chain(optax.adam(1.0), optax_spd.layerwise_lr_decay(0.5, r"layer_(\d+)"))
      >>> updates, state = tx.update(params, tx.init(params), params)
      >>> {name: round(float(update[0]), 3) for name, update in updates.items()}
      {'embed': -0.125, 'head': -1.0, 'layer_0': -0.25, 'layer_1': -0.5}

    References:
      Howard & Ruder, `Universal Language Model Fine-tuning for Text Classification
      <https://arxiv.org/abs/1801.06146>`_, ACL 2018; Clark et al., `ELECTRA
      <https://arxiv.org/abs/2003.10555>`_, ICLR 2020; Bao et al., `BEiT
      <https://arxiv.org/abs/2106.08254>`_, ICLR 2022.

    .. seealso:: :func:`optax_spd.with_frozen`, which saves the memory too
    """
    checks.check_scalar("decay", decay, high=1.0)
    checks.check_scalar("min_scale", min_scale, high=1.0)
    check_layers(layers)
    heights = _by_pattern(depth) if isinstance(depth, str) else _by_function(depth)

    def scales(flat: trees.FlatTree, plan: plans.LayerPlan, count: jax.Array) -> jax.Array:
        return decay_scale(
            checks.value_at(decay, count, plan.dtype),
            jnp.asarray(heights(plan, flat), plan.dtype),
            checks.value_at(min_scale, count, plan.dtype),
        )

    def init(params: PyTree) -> LayerDecayState:
        count = jnp.zeros((), jnp.int32)
        flat, plan, _ = plans.planned(params, layers, mask)
        return LayerDecayState(count, fingerprints.of_plan(plan), scales(flat, plan, count))

    def update(
        updates: PyTree, state: LayerDecayState, params: PyTree = None, **extra_args: Any
    ) -> tuple[PyTree, LayerDecayState]:
        del extra_args
        trees.require_params(params)
        flat, plan, _ = plans.planned(params, layers, mask)
        stage.check_vector("layer_decay_scale", state.layer_decay_scale, plan)
        scale = scales(flat, plan, state.count)
        new_updates = scaling.scaled(updates, flat, plan, scale)
        return new_updates, LayerDecayState(
            optax.safe_increment(state.count), state.layer_fingerprint, scale
        )

    return optax.GradientTransformationExtraArgs(init, update)


Heights = Callable[[plans.LayerPlan, trees.FlatTree], np.ndarray]


def _by_pattern(pattern: str) -> Heights:
    """Heights D - d from the number in a layer's name, embeddings at the bottom."""
    regex = checks.compile_pattern(pattern)
    if regex.groups != 1:
        raise ValueError(
            f"depth={pattern!r} has {regex.groups} groups; it must have exactly one, around the "
            r"layer's number, as 'layer_(\d+)'. Write other groups as (?:...)."
        )

    def heights(plan: plans.LayerPlan, flat: trees.FlatTree) -> np.ndarray:
        found = np.zeros(plan.vector_size)
        matches = [regex.search(name) for name in plan.names]
        numbers = {
            i: _number(match.group(1), name, pattern)
            for i, (name, match) in enumerate(zip(plan.names, matches, strict=True))
            if match is not None
        }
        below = sorted(_embeddings(plan) - set(numbers))
        if not numbers:
            _refuse_no_layers(pattern, plan, flat, below)
            return found
        top = max(numbers.values()) + 1
        for i, number in numbers.items():
            found[i] = top - number
        found[below] = top - min(numbers.values()) + 1
        return found

    return heights


def _number(text: str | None, name: str, pattern: str) -> float:
    try:
        number = float(text)  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"The group of depth={pattern!r} matches {text!r} in the layer {name!r}; it must be "
            r"the layer's number, as in 'layer_(\d+)'."
        ) from error
    return _finite(number, name)


def _finite(number: float, name: str) -> float:
    if not math.isfinite(number):
        raise ValueError(f"depth gives {number} for the layer {name!r}; it must be finite.")
    return number


def _embeddings(plan: plans.LayerPlan) -> set[int]:
    """The layers with an embedding array in them: by its path, since a group has a label."""
    return {
        number
        for entry in plan.arrays
        if entry is not None and _EMBEDDING.search(entry.name)
        for number in entry.numbers
    }


def _refuse_no_layers(
    pattern: str, plan: plans.LayerPlan, flat: trees.FlatTree, below: list[int]
) -> None:
    """Refuses a pattern that matches nothing, unless another mask may have taken what it would."""
    nearest = trees.nearest_paths(pattern, [(name,) for name in plan.names])
    if masks.is_whole(flat):
        raise ValueError(
            f"depth={pattern!r} matches no layer, so none would be scaled. The nearest layer "
            f"names: {nearest}. Stacked layers have a number only with layers=stacked(...)."
        )
    if below:
        raise ValueError(
            f"depth={pattern!r} matches no layer of this part of the tree, so how far below the "
            f"head the embeddings are ({plan.names[below[0]]!r}) cannot be told. Put "
            "layerwise_lr_decay behind the partition or mask, where it sees all layers, or give "
            "depth= as a function."
        )


def _by_function(depth: Callable[[str], Any]) -> Heights:
    """Heights D - d from a function of the layer's name."""
    if not callable(depth):
        raise TypeError(
            "depth must be a regular expression with one group or a function from layer name to "
            f"number, got {depth!r}."
        )

    def heights(plan: plans.LayerPlan, flat: trees.FlatTree) -> np.ndarray:
        del flat
        found = np.zeros(plan.vector_size)
        numbers = {
            i: _real(number, name)
            for i, name in enumerate(plan.names)
            if (number := depth(name)) is not None
        }
        top = max(numbers.values(), default=0.0)
        for i, number in numbers.items():
            found[i] = top - number
        return found

    return heights


def _real(number: Any, name: str) -> float:
    is_number = isinstance(number, int | float | np.integer | np.floating)
    if not is_number or isinstance(number, bool):
        raise TypeError(
            f"depth must return a number or None, got {number!r} for the layer {name!r}."
        )
    return _finite(float(number), name)
