"""LiNeS: interpolation coefficients that grow linearly with a block's depth.

Wang, Dimitriadis, Favero, Ortiz-Jimenez, Fleuret, Frossard: "LiNeS: Post-training Layer Scaling
Prevents Forgetting and Enhances Model Merging", ICLR 2025, https://arxiv.org/abs/2410.17146; the
authors' code: wang-kee/LiNeS. For block l of L, with a = α_min:

    α_l = a + (1 - a) l / (L - 1)      l = 0, ..., L - 1
    α   = a                            outside the blocks

and θ = θ₀ + α (θ - θ₀) for each array. So the first blocks return to the pretrained weights more
than the last, which keep their fine-tuned values.

Differences from the authors' code:

1. Which block an array belongs to is read from its path by ``depth=``. Their code takes the
   smallest number below L that stands between dots anywhere in the name, so the sublayer number of
   "blocks.3.mlp.0.weight" counts as block 0.
2. L comes from the blocks that are there, and numbers need not begin at 0; in their code it is an
   argument, and blocks from L on count as outside.
3. With a single block α = a; their code divides by zero.
4. Theirs has two more coefficients for merging several tasks, a + b l/(L - 1). That is
   ``a + b * lines_alpha(params, 0.0, depth)``.
"""

import jax
import jax.numpy as jnp
import numpy as np

from optax_spd.layers import checks, depth as depths, plans
from optax_spd.layers.spec import LayerFn, check_layers
from optax_spd.layers.types import PyTree

UNNUMBERED = depths.Consequences(
    left_out="so their alpha is min_alpha, whatever their number. If they are blocks too, as a "
    "second tower, match them as well. If not, say so: give depth= as a function that returns None "
    "for them.",
    no_match="so the alpha of every layer would be min_alpha",
    no_match_in_part="so the alpha of every layer would be min_alpha, not of the embeddings ({}) "
    "alone. Give all of params, without a MaskedNode, or give depth= as a function.",
)


def lines_alpha(
    params: PyTree,
    min_alpha: jax.typing.ArrayLike,
    depth: depths.Depth,
    *,
    layers: LayerFn | None = None,
) -> jax.Array:
    r"""One α per layer for :func:`optax_spd.wise_ft`, growing linearly with depth (LiNeS).

    .. math::

        \alpha_l = a + (1 - a)\, \frac{l}{L - 1}

    for block :math:`l = 0, \ldots, L - 1`, with :math:`a` = ``min_alpha``; a for all layers
    outside the blocks. A head that was pretrained gets a as well; leave out a new one with
    ``wise_ft(..., mask=)``. Choose a on validation data.

    Args:
      params: the parameters; arrays or ``ShapeDtypeStruct`` leaves.
      min_alpha: a, usually in [0, 1]: 0 gives the first block and all layers outside the blocks
        their pretrained values, and 1 changes nothing. May be traced.
      depth: the block's number, as in :func:`optax_spd.layerwise_lr_decay`: a regular expression
        with one group, searched in the layer names, or a function from layer name to number, or to
        None outside the blocks. The smallest number is l = 0, the largest l = L - 1. If all have
        one number, α = a. A function may give different numbers to towers of different depths. A
        ``UserWarning`` says if blocks numbered like those that match are left out.
      layers: what a layer is; give ``wise_ft`` the same. The layers of a scanned model have a
        number with :func:`optax_spd.stacked`: ``depth=r"\[(\d+)\]$"``.

    Returns:
      Shape (layers,), the widest parameter dtype and at least float32, in the order of
      ``layer_names(params, layers)``.

    Raises:
      TypeError: a complex parameter, a wrong argument type, a depth that is not a number.
      ValueError: ``min_alpha`` not a finite scalar, a pattern without exactly one group or that
        matches no layer, a depth that is not finite.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax_spd
      >>> params = {name: jnp.ones(1) for name in ("embed", "layer_0", "layer_1", "layer_2")}
      >>> alpha = optax_spd.lines_alpha(params, 0.2, r"layer_(\d+)")
      >>> {name: round(float(a), 2) for name, a in zip(optax_spd.layer_names(params), alpha)}
      {'embed': 0.2, 'layer_0': 0.2, 'layer_1': 0.6, 'layer_2': 1.0}
      >>> anchor = {name: jnp.zeros(1) for name in params}
      >>> optax_spd.wise_ft(params, anchor, alpha)["layer_1"]
      Array([0.6], dtype=float32)

    References:
      Wang et al., `LiNeS: Post-training Layer Scaling Prevents Forgetting and Enhances Model
      Merging <https://arxiv.org/abs/2410.17146>`_, ICLR 2025.

    .. seealso:: :func:`optax_spd.wise_ft`
    """
    check_layers(layers)
    checks.check_finite("min_alpha", min_alpha)
    if np.ndim(min_alpha) != 0:
        raise ValueError(f"min_alpha must be a scalar, got the shape {np.shape(min_alpha)}.")
    flat, plan, _ = plans.planned(params, layers, None)
    numbers = depths.numbers_from(depth, UNNUMBERED)(plan, flat)
    lowest = min(numbers.values(), default=0.0)
    span = max(numbers.values(), default=0.0) - lowest
    share = np.zeros(len(plan.names))
    for layer, number in numbers.items():
        share[layer] = (number - lowest) / span if span else 0.0
    a = jnp.asarray(min_alpha, plan.dtype)
    return a + (1 - a) * jnp.asarray(share, plan.dtype)
