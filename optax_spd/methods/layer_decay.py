"""Layer-wise learning-rate decay: smaller steps for layers nearer to the input.

Howard & Ruder: "Universal Language Model Fine-tuning for Text Classification", ACL 2018,
https://arxiv.org/abs/1801.06146 (discriminative fine-tuning); Clark et al.: "ELECTRA", ICLR 2020,
https://arxiv.org/abs/2003.10555; Bao et al.: "BEiT", ICLR 2022, https://arxiv.org/abs/2106.08254.
A layer at depth d of a model whose head is at depth D takes its step times

    s = max(s_min, decay^(D - d))

Differences from those papers and their code:

1. It scales the update, not the learning rate. Behind ``optax.adamw`` that is the same, weight
   decay included.
2. Depths are BEiT's: the embeddings are one below layer 0, and everything after the last layer is
   one above it, with the full rate. ELECTRA's code skips one depth below the head, so all its
   layers' rates are smaller by one more factor. ULMFiT has a factor of 1/2.6.
3. ``min_scale`` is ours.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_spd.core import scaling, stage
from optax_spd.layers import checks, depth as depths, fingerprints, plans, trees
from optax_spd.layers.spec import LayerFn, check_layers
from optax_spd.layers.types import Mask, PyTree

UNNUMBERED = depths.Consequences(
    left_out="so they have the full rate, whatever their number. If they are to decay too, as a "
    "second tower, match them as well or put the stage into each part of an optax.partition. If "
    "not, say so: leave them out with mask=, or give depth= as a function that returns None for "
    "them.",
    no_match="so none would be scaled",
    no_match_in_part="so the distance of the embeddings ({}) from the head is unknown. Put the "
    "stage behind the partition or mask, where it sees all layers, or give depth= as a function.",
)


class LayerDecayState(NamedTuple):
    """State of :func:`layerwise_lr_decay`.

    Attributes:
      count: number of updates so far, int32; what a scheduled decay is evaluated at.
      layer_fingerprint: identifies the layers of the vectors (:func:`optax_spd.check_state`).
      layer_decay_scale: s of the last update (initially of the first), one entry per layer in
        ``layer_names`` order.
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
    # The derivative of 0^0 would be NaN.
    power = jnp.where(height == 0, 1, jnp.power(decay, jnp.where(height == 0, 1, height)))
    return jnp.maximum(min_scale, power)


def layerwise_lr_decay(
    decay: checks.ScalarOrSchedule,
    depth: depths.Depth,
    *,
    min_scale: checks.ScalarOrSchedule = 0.0,
    layers: LayerFn | None = None,
    mask: Mask = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Scales each layer's update by its depth; place it *behind* the optimizer, never before.

    ``optax.chain(optax.adam(1e-3), layerwise_lr_decay(0.75, ...))``. Before Adam it would do
    **nothing**, since Adam divides every scale out again. Place it before :func:`optax_spd.spd`,
    ``tpgm`` and ``ftp``, which act on the scaled step. A layer's update is multiplied by

    .. math::

        s = \max\left(s_{\min}, \mathrm{decay}^{\,D - d}\right)

    where d is the layer's depth and D the head's.

    Args:
      decay: the factor from one layer to the one below, from 0 to 1 (usual: 0.65 to 0.9), or a
        schedule of it. With 0 only layers at depth D move.
      depth: d, as one of

        - a regular expression with one group, the layer's number (``r"layer_(\d+)/"``), searched
          in the layer names (:func:`optax_spd.layer_names`; a stacked layer's ends in "[i]", so
          ``r"\[(\d+)\]$"`` counts the layers of a scanned model). Then D is the largest number
          plus one: the last layer has the scale ``decay``. Layers that do not match are embeddings
          (:data:`optax_spd.DEFAULT_EMBEDDING_PATTERNS`), one below the smallest number, or
          everything else, such as the head and the last normalisation, at depth D: full rate. A
          ``UserWarning`` says if that includes blocks numbered like those that match;
        - a function from layer name to d, or to None for full rate. Then D is the largest d.
      min_scale: the smallest scale, from 0 to 1, or a schedule of it.
      layers: what a layer is, see :func:`optax_spd.stacked`; None for one per array.
      mask: as for :func:`optax_spd.spd`. Where it is False the scale is 1, and the layer is
        ignored in D.

    Returns:
      A stage whose ``update`` needs ``params``. Updates keep their structure and dtypes; scales
      are computed in at least float32. The state holds ``layer_decay_scale``, s per layer: shape
      (layers,), in the order of :func:`optax_spd.layer_names`. Integer, empty, None and MaskedNode
      leaves pass through. Inside ``optax.partition`` or ``optax.masked`` D is that of its part of
      the tree. This is right for the towers of a CLIP model, and wrong for a part without the last
      layers: then put it behind, ``chain(partition(...), layerwise_lr_decay(...))``. Under
      ``optax.inject_hyperparams`` name in ``static_args`` those of ``depth``, ``layers`` and
      ``mask`` that are functions. Under ``shard_map`` leave the stacked axes whole.

    Raises:
      TypeError: a complex parameter, a mask that is not bools, a wrong argument type, a depth that
        is not a number.
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

      The state has what each layer gets, from ``init`` on:

      >>> scales = optax.tree.get(tx.init(params), "layer_decay_scale")
      >>> dict(zip(optax_spd.layer_names(params), map(float, scales)))
      {'embed': 0.125, 'head': 1.0, 'layer_0': 0.25, 'layer_1': 0.5}

    References:
      Howard & Ruder, `Universal Language Model Fine-tuning for Text Classification
      <https://arxiv.org/abs/1801.06146>`_, ACL 2018; Clark et al., `ELECTRA
      <https://arxiv.org/abs/2003.10555>`_, ICLR 2020; Bao et al., `BEiT
      <https://arxiv.org/abs/2106.08254>`_, ICLR 2022.

    .. seealso:: :func:`optax_spd.with_frozen`, which also saves memory
    """
    checks.check_scalar("decay", decay, high=1.0)
    checks.check_scalar("min_scale", min_scale, high=1.0)
    check_layers(layers)
    heights = depths.heights_from(depth, UNNUMBERED)

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
        vectors = {"layer_decay_scale": state.layer_decay_scale}
        flat, plan = stage.planned(updates, params, layers, mask, vectors)
        scale = scales(flat, plan, state.count)
        new_updates = scaling.scaled(updates, flat, plan, scale)
        return new_updates, LayerDecayState(
            optax.safe_increment(state.count), state.layer_fingerprint, scale
        )

    return optax.GradientTransformationExtraArgs(init, update)
