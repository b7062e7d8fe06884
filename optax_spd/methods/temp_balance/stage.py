"""TempBalance: scales each layer's learning rate by the spectrum of its weights.

Zhou, Pang, Liu, Yang, Yan, Gal, Mahoney, Yang: "Temperature Balancing, Layer-wise Weight Analysis,
and Neural Network Training", NeurIPS 2023, https://arxiv.org/abs/2312.00359; the authors' code:
YefanZhou/TempBalance. Liu et al.: "Model Balancing Helps Low-data Training and Fine-tuning", EMNLP
2024, https://arxiv.org/abs/2410.12178; the authors' code: ZihangHLiu/ModelBalancing. For each of n
layers with incoming update u and power-law exponent α of the weights' spectrum
(:mod:`optax_spd.methods.temp_balance.power_law`; a small α means a heavy tail: a well-trained
layer):

    u' = s u

    "linear"    s = s_min + (s_max - s_min) (α - min α) / (max α - min α)
    "sqrt"      s = n √α / Σ √α
    "log2"      s = n log2 α / Σ log2 α
    "step"      s = s_min + (s_max - s_min) rank(α) / n,  rank 0 the smallest
    "sigmoid"   s = 10^(c (1 / (1 + exp(-τ x)) - 1/2)),  x = α - mean α,
                c = c_max if x > 0, else c_min

The first four are from the 2023 paper, per layer. The last is from the 2024 paper, which gives all
layers of a block one s, from the mean of their α.

Differences from the authors' code:

1. It scales updates and does not set learning rates. Behind ``optax.adam`` or ``optax.sgd`` the
   effect is the same, decoupled weight decay included.
2. The first step is already balanced. Their code sets rates after a step, so the first step has
   the base rate.
3. The first and last layers are balanced by default; their code leaves them out by default. All
   arrays with two axes are balanced, embeddings too; theirs takes linear and convolution layers.
4. A layer without a usable α (not finite, all eigenvalues equal, no candidate for a tail) is left
   out and has s = 1. In their code NaN would spread to all layers.
5. Modules are associated by path, because a pytree does not preserve module order. So
   normalisation keeps its update unless ``follows`` names its layer; in their code it follows the
   layer in front of it, or the one with the same number.
"""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_spd.core import scaling, stage
from optax_spd.layers import checks, fingerprints, masks, plans
from optax_spd.layers.spec import LayerFn, check_layers
from optax_spd.layers.types import Mask, PyTree
from optax_spd.methods.temp_balance import groups, power_law, weights
from optax_spd.methods.temp_balance.scales import Assignment, balance_scales, check_scales

UNITS = ("layer", "block")


class TempBalanceState(NamedTuple):
    """State of :func:`temp_balance`.

    Attributes:
      count: number of updates so far, int32; what schedules are evaluated at.
      layer_fingerprint: identifies the layers of the vectors (:func:`optax_spd.check_state`).
      measured: the count at which the spectra were last computed, int32.
      temp_balance_alpha: α at that count, one entry per layer in ``layer_names`` order; 0 for a
        layer without a usable α.
      temp_balance_scale: s, one entry per layer; 1 for a layer that is not balanced.
    """

    count: jax.Array  # type: ignore[assignment]  # shadows tuple.count, as in Optax
    layer_fingerprint: jax.Array
    measured: jax.Array
    temp_balance_alpha: jax.Array
    temp_balance_scale: jax.Array


def temp_balance(
    *,
    every: int | checks.Schedule = 100,
    fit: power_law.FitMethod = "median",
    assign: Assignment = "linear",
    min_scale: checks.ScalarOrSchedule = 0.5,
    max_scale: checks.ScalarOrSchedule = 1.5,
    min_eigenvalues: int = 50,
    unit: Literal["layer", "block"] = "layer",
    block: str | None = None,
    follows: groups.Follows | None = None,
    skip_first: bool = False,
    skip_last: bool = False,
    normalize: bool = False,
    xmin_pos: float = 2,
    conv_norm: float = 0.5,
    filter_zeros: bool = False,
    bins: int = 100,
    sigmoid_min: checks.ScalarOrSchedule = 2.0,
    sigmoid_max: checks.ScalarOrSchedule = 1.0,
    temperature: checks.ScalarOrSchedule = 10.0,
    layers: LayerFn | None = None,
    mask: Mask = None,
) -> optax.GradientTransformationExtraArgs:
    r"""TempBalance; place it directly *behind* the optimizer that it balances.

    In front of Adam it would do nothing, since Adam divides every scale out again. Every ``every``
    updates it estimates the power-law exponent α of each weight matrix's spectrum. Until the next
    estimate it multiplies the layer's update:

    .. math::

        u' = s\,u, \qquad
        s = s_{min} + (s_{max} - s_{min}) \frac{\alpha - \min \alpha}{\max \alpha - \min \alpha}

    and likewise for the other ``assign``. The first update is already balanced. Between estimates
    a step costs one multiplication. It needs no gradient and no anchor.

    Arrays with at least two axes and ``min_eigenvalues`` eigenvalues are balanced, except those
    named "bias". Biases and other arrays with fewer axes follow the weights of their module.
    Everything else keeps its update (normalisation too, unless ``follows`` or ``unit="block"``
    includes it). The state shows the result for a model, in :func:`optax_spd.layer_names` order.
    A model without such weights (LoRA of rank 8) is not balanced at all. Embedding tables are
    balanced unless masked out. A weight of low rank needs ``filter_zeros=True``: most of its
    eigenvalues are rounding errors, its α follows them, and that shifts the factors of all layers.
    In ``optax.partition`` or ``optax.masked`` each part is balanced
    separately.

    Args:
      every: compute the spectra on updates 0, ``every``, 2 ``every``, ...; or a schedule of the
        interval, evaluated at each update.
      fit: "median", "goodness-of-fit" or "fix-finger", see :func:`optax_spd.power_law_alpha`.
      assign: "linear", "sqrt", "log2", "step" or "sigmoid", see :func:`optax_spd.balance_scales`.
      min_scale: smallest factor. A schedule of any scale argument is evaluated when the spectra
        are computed.
      max_scale: largest factor.
      min_eigenvalues: weights with fewer are left out. A convolution has positions times
        min(in, out).
      unit: "layer" (Zhou et al. 2023) or "block" (Liu et al. 2024: all arrays of a block share the
        factor of its weights' mean α; arrays outside blocks keep their update).
      block: for ``unit="block"``: a regular expression searched in layer names. The text it matches
        (its groups, if it has any) names the block. None for the first key of the path whose number
        differs from its siblings' ("encoder/layer_3", "h/0"), and the index of a stacked layer.
        Two stacks (encoder and decoder) need a pattern: ``r"^(\w+)/.*(\[\d+\])$"``.
      follows: for ``unit="layer"``: a function from a module's path to the path of the module whose
        factor its arrays with fewer than two axes take, such as normalisation after its layer.
      skip_first: leave out the first layer with at least two axes, in natural order of the layer
        names ("block_2" before "block_10").
      skip_last: leave out the last. That order need not be the network's: ``mask`` is the surer way
        to leave out a stem or a head.
      normalize: divide the factors by their mean over the balanced layers.
      xmin_pos: see :func:`optax_spd.power_law_alpha`.
      conv_norm: likewise. Convolutions are arrays with one output axis and at least four axes, or
        with ``spatial_axes`` in their :class:`optax_spd.LayerSpec`.
      filter_zeros: leave out eigenvalues up to 1e-5; for weights of low rank.
      bins: number of histogram bins for "fix-finger".
      sigmoid_min: see :func:`optax_spd.balance_scales`.
      sigmoid_max: likewise.
      temperature: τ of "sigmoid".
      layers: what a layer is, see :func:`optax_spd.stacked`. Each slice of a stacked array has a
        spectrum of its own; a group has the mean α of its arrays. Give attention kernels their
        output axes (:func:`optax_spd.outputs`), or a kernel (embed, heads, head_dim) is read as a
        matrix of embed times heads inputs. Give PyTorch-like convolutions (Equinox's) their output
        and spatial axes.
      mask: a tree of bools or a function of params: True where the method applies.

    Returns:
      A stage whose ``update`` needs ``params``. Updates keep structure and dtypes. The state holds
      two numbers a layer. Under ``jit`` with sharding each device decomposes all matrices,
      gathering a few at a time. Under ``vmap`` every step computes the spectra, since ``vmap``
      turns a condition into a select. ``optax.MultiSteps`` updates the inner stage on each
      micro-step, so all micro-steps of a step that is due compute the spectra. Under
      ``optax.inject_hyperparams`` name in ``static_args`` the numbers that shape the program,
      ``min_eigenvalues``, ``xmin_pos``, ``conv_norm`` and ``bins``, and those of ``follows``,
      ``layers`` and ``mask`` that are functions.

    Raises:
      TypeError: an argument of the wrong type, a complex parameter.
      ValueError: an unknown ``fit``, ``assign`` or ``unit``, a number out of range (at
        construction); no params, trees that do not match, weights split by ``shard_map`` (in
        ``update``; not detected under ``pmap`` and ``check_vma=False``).

    Example:
      >>> import jax
      >>> import optax
      >>> import optax_spd
      >>> params = {"a": jax.random.normal(jax.random.key(0), (64, 64)), "b": jax.numpy.eye(64)}
      >>> params["b"] = params["b"] + 0.1 * params["a"]  # a lighter tail than a's
      >>> tx = optax.chain(optax.adam(1e-3), optax_spd.temp_balance(every=100))
      >>> updates, state = tx.update(params, tx.init(params), params)
      >>> print(optax.tree.get(state, "temp_balance_scale"))  # "a", "b"
      [0.5 1.5]

    References:
      Zhou et al., `Temperature Balancing, Layer-wise Weight Analysis, and Neural Network Training
      <https://arxiv.org/abs/2312.00359>`_, NeurIPS 2023; Liu et al., `Model Balancing Helps
      Low-data Training and Fine-tuning <https://arxiv.org/abs/2410.12178>`_, EMNLP 2024.

    .. seealso:: :func:`optax_spd.layerwise_lr_decay`
    """
    scalars = {
        "min_scale": min_scale,
        "max_scale": max_scale,
        "sigmoid_min": sigmoid_min,
        "sigmoid_max": sigmoid_max,
        "temperature": temperature,
    }
    check_scales(assign, **scalars)
    if unit not in UNITS:
        raise ValueError(f"unit must be one of {', '.join(map(repr, UNITS))}, got {unit!r}.")
    if not callable(every):
        checks.check_count("every", every)
    checks.check_static("min_eigenvalues", min_eigenvalues)
    checks.check_count("min_eigenvalues", min_eigenvalues)
    for name, flag in (
        ("skip_first", skip_first),
        ("skip_last", skip_last),
        ("normalize", normalize),
    ):
        checks.check_flag(name, flag)
    if follows is not None and (unit == "block" or not callable(follows)):
        raise ValueError(
            'follows must be a function from module path to module path, for unit="layer" only, '
            f"got {follows!r} with unit={unit!r}."
        )
    if block is not None and unit != "block":
        raise ValueError(f'block={block!r} needs unit="block", got unit={unit!r}.')
    pattern = None if block is None else checks.compile_pattern(block)
    check_layers(layers)
    options = power_law.Fit(fit, xmin_pos, conv_norm, filter_zeros, bins)

    def init(params: PyTree) -> TempBalanceState:
        plan = plans.planned(params, layers, mask).plan
        return TempBalanceState(
            count=jnp.zeros((), jnp.int32),
            layer_fingerprint=fingerprints.of_plan(plan),
            measured=jnp.zeros((), jnp.int32),
            temp_balance_alpha=jnp.zeros(plan.vector_size, plan.dtype),
            temp_balance_scale=jnp.ones(plan.vector_size, plan.dtype),
        )

    def update(
        updates: PyTree, state: TempBalanceState, params: PyTree = None, **extra_args: Any
    ) -> tuple[PyTree, TempBalanceState]:
        del extra_args
        vectors = {"temp_balance_scale": state.temp_balance_scale}
        flat, plan = stage.planned(updates, params, layers, mask, vectors)
        selection = weights.select(
            flat, plan, min_eigenvalues, skip_first=skip_first, skip_last=skip_last
        )
        if not selection.balanced.any():
            return updates, state._replace(count=optax.safe_increment(state.count))
        group: groups.Modules | groups.Blocks
        if unit == "layer":
            group = groups.modules(flat, selection, follows, unmasked=masks.is_unmasked(flat))
        else:
            group = groups.blocks(plan, pattern, unmasked=masks.is_unmasked(flat))

        def measure() -> tuple[jax.Array, ...]:
            alpha, usable = selection.alphas(flat.leaves, options)
            values = {
                name: checks.value_at(value, state.count, plan.dtype)
                for name, value in scalars.items()
            }

            def scales(alpha: jax.Array, where: jax.Array) -> jax.Array:
                return balance_scales(alpha, assign=assign, where=where, **values)

            scale = group.scales(alpha, usable, scales, normalize=normalize)
            return state.count, alpha, scale.astype(plan.dtype)

        def reuse() -> tuple[jax.Array, ...]:
            vectors = (state.temp_balance_alpha, state.temp_balance_scale)
            return state.measured, *(vector.astype(plan.dtype) for vector in vectors)

        interval = every(state.count) if callable(every) else every
        due = (state.count == 0) | (state.count - state.measured >= interval)
        measured, alpha, scale = jax.lax.cond(due, measure, reuse)
        new_updates = scaling.scaled(updates, flat, plan, scale, group.scalable)
        return new_updates, TempBalanceState(
            optax.safe_increment(state.count), state.layer_fingerprint, measured, alpha, scale
        )

    return optax.GradientTransformationExtraArgs(init, update)
