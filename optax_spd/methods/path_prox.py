"""PathProx: the proximal step of weight decay on the units between two layers.

Yang, Zhang, Shenouda, Papailiopoulos, Lee, Nowak: "PathProx: A Proximal Gradient Algorithm for
Weight Decay Regularized Deep Neural Networks", https://arxiv.org/abs/2210.03069; the authors' code:
Leiay/PathProx. A *pair* is the weights W, with bias b, and V, with bias c, around a layer of ReLU
units: w_j is what enters unit j, b_j its bias, v_j what leaves it. For the parameters that the
optimizer's step leads to, with learning rate η and τ = λ η:

    balance, for pairs l = 1, ..., L in the order of the network (s_0 = 1):
        p_l = Σ_j ‖w_j‖ ‖v_j‖ / s_{l-1},   M = (Π_l Σ_j ‖w_j‖ ‖v_j‖)^(1/L),   s_l = M / p_l
        b ← s_{l-1} b,   V ← s_l V / s_{l-1},   c ← s_l c
    proximal step, for each unit:
        r_j = ‖w_j‖        (with regularize_bias ‖(w_j, b_j)‖, and no balance)
        w_j ← w_j / r_j,   b_j ← b_j / r_j
        v_j ← 0  if ‖v_j‖ <= τ,  else v_j - τ v_j / ‖v_j‖

The balance gives all pairs the same path norm M and does not change the function of a chain of
pairs. The proximal step does change it: v_j is not multiplied by r_j, as in the authors' code.

Differences from the authors' code:

1. It is a stage behind ``optax.sgd``. The decay of the other layers, which their optimizer adds to
   the gradient, is ``optax.add_decayed_weights`` with a mask.
2. If V has no bias, the next pair is compensated all the same. Their code leaves it out, which
   changes the function. W need not have a bias either.
3. Where r_j = 0, w_j and b_j are left alone. Their code divides b_j by 1e-6 there. (As in their
   code, other norms and path norms in a denominator are at least 1e-6.)
4. Where r_j or ‖v_j‖ is not finite, what would be divided by it is left alone. If a path norm is
   not finite, no pair is balanced in this step.
5. Norms and what follows from them have at least float32 whatever the parameters' dtype.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_spd.core import sums
from optax_spd.layers import checks, pairs as layer_pairs, plans, trees
from optax_spd.layers.pairs import Pair
from optax_spd.layers.types import PyTree
from optax_spd.sharding import manual_axes

FLOOR = 1e-6


class PathProxState(NamedTuple):
    """State of :func:`path_prox`.

    Attributes:
      count: number of updates so far, int32; what schedules are evaluated at.
    """

    count: jax.Array  # type: ignore[assignment]  # shadows tuple.count, as in Optax


def input_norms(pair: Pair, *, regularize_bias: bool = False) -> jax.Array:
    """‖w_j‖, or with the bias ‖(w_j, b_j)‖; shape (units,)."""
    square = jnp.sum(pair.w**2, axis=tuple(range(pair.w.ndim - 1)))
    square = sums.replicated(square)
    if regularize_bias and pair.b is not None:
        square += sums.replicated(pair.b**2)
    return sums.norm_of(square)


def output_norms(pair: Pair) -> jax.Array:
    """‖v_j‖; shape (units,)."""
    others = (*range(pair.v.ndim - 2), pair.v.ndim - 1)
    return sums.norm_of(sums.replicated(jnp.sum(pair.v**2, axis=others)))


def balance_factors(path_norms: Sequence[jax.Array]) -> list[jax.Array]:
    """S_l for each pair, from their path norms; 1 for all if one is not finite."""
    norms = jnp.stack(path_norms)
    mean = jnp.exp(jnp.mean(jnp.log(jnp.maximum(norms, FLOOR))))
    factors = []
    before = jnp.ones_like(mean)
    for norm in norms:
        before = mean / jnp.maximum(norm / jnp.maximum(before, FLOOR), FLOOR)
        factors.append(before)
    usable = jnp.all(jnp.isfinite(norms))
    return [jnp.where(usable, factor, 1) for factor in factors]


def balanced(pairs: Sequence[Pair]) -> list[Pair]:
    """The pairs of a chain, in its order, scaled to have the same path norm."""
    factors = balance_factors([jnp.sum(input_norms(p) * output_norms(p)) for p in pairs])
    found = []
    before = jnp.ones_like(factors[0])
    for (w, b, v, c), factor in zip(pairs, factors, strict=True):
        scaled_b = None if b is None else before * b
        scaled_c = None if c is None else factor * c
        found.append(Pair(w, scaled_b, factor * v / before, scaled_c))
        before = factor
    return found


def proximal(pair: Pair, threshold: jax.Array, *, regularize_bias: bool = False) -> Pair:
    """The proximal step of one pair with τ = ``threshold``."""
    r, out = input_norms(pair, regularize_bias=regularize_bias), output_norms(pair)
    r = jnp.where((r > 0) & jnp.isfinite(r), jnp.maximum(r, FLOOR), 1)
    kept = jnp.where(out <= threshold, 0, 1 - threshold / jnp.maximum(out, FLOOR))
    kept = jnp.where(jnp.isfinite(out), kept, 1)
    w = pair.w / _along(r, pair.w, -1)
    b = None if pair.b is None else pair.b / _along(r, pair.b, -1)
    v = sums.times(_along(kept, pair.v, -2), pair.v)
    return Pair(w, b, v, pair.c)


def _along(values: jax.Array, array: jax.Array, axis: int) -> jax.Array:
    """One value for each unit, shaped to broadcast against an array with its units on an axis."""
    others = tuple(a for a in range(array.ndim) if a != axis % array.ndim)
    return sums.sharded_like(jnp.expand_dims(values, others), array)


def path_prox(
    learning_rate: optax.ScalarOrSchedule,
    weight_decay: checks.ScalarOrSchedule,
    pairs: Sequence[tuple[str, str]],
    *,
    balance: bool = True,
    regularize_bias: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""PathProx; place it last in the chain, behind ``optax.sgd`` with the same learning rate.

    For networks with ReLU units (or another activation f with :math:`f(s x) = s f(x)` for s > 0)
    between two Dense or two Conv layers: MLPs, convolutional networks like VGG. Weight decay on
    both layers is equivalent to a group lasso on the units, whose proximal step sets the weights
    out of a unit to exactly zero. With :math:`\tau = \lambda\eta` it replaces the parameters that
    the optimizer leads to by

    .. math::

        w_j \leftarrow \frac{w_j}{\|w_j\|}, \qquad b_j \leftarrow \frac{b_j}{\|w_j\|}, \qquad
        v_j \leftarrow \left(1 - \frac{\tau}{\|v_j\|}\right)_+ v_j

    for each unit j with incoming weights w, bias b and outgoing weights v. Before that the pairs
    are balanced: they get the same :math:`\sum_j \|w_j\| \|v_j\|`. **The balance keeps the function
    of the network only if the pairs are a chain**: what is between one pair and the next may be
    ReLU, pooling and layers without a bias, all of which scale with their input. With
    normalisation, residual connections or layers with a bias in between use ``balance=False``. The
    proximal step itself changes the function, and the first one that of a pretrained network a lot.

    Do not decay the arrays of the pairs otherwise. Decay the other weights, which the paper does
    too, in front of the optimizer: ``optax.add_decayed_weights(weight_decay, mask)``.

    Args:
      learning_rate: η >= 0, a float or a schedule: that of the optimizer.
      weight_decay: λ >= 0, or a schedule of it. With 0 the weights are balanced and normalised all
        the same.
      pairs: for each layer of units (pattern of the weights into it, pattern of those out of it),
        in the order of the network. A pattern is a regular expression searched in the "/"-joined
        path and must match exactly one array with two or more axes. Kernels have Flax's layout:
        (inputs, outputs), with spatial axes in front. A layer's bias is the array named "bias"
        beside the kernel, if there is one.
      balance: whether to balance the pairs.
      regularize_bias: whether the norm of :math:`w_j` includes the bias :math:`b_j`. Then nothing
        is balanced, whatever ``balance`` says, as in the authors' code. Decay the other biases,
        also those of the layers out of the units, with the other weights.

    Returns:
      A stage whose ``update`` needs ``params``. Updates keep their structure and dtypes; norms are
      computed in at least float32. Arrays that are in no pair keep their update. The state holds a
      count. It works under ``jit`` with any sharding, but not on arrays that ``shard_map`` or
      ``pmap`` splits, nor on stacked layers (``nn.scan``). (Those without a bias look like a
      convolution and are not refused.) Under ``optax.inject_hyperparams`` no argument is needed in
      ``static_args``.

    Raises:
      TypeError: ``pairs`` is not a sequence of pairs of patterns, a flag that is not a bool, a
        complex kernel.
      ValueError: ``learning_rate`` or ``weight_decay`` negative or not finite, an invalid pattern
        (at construction); a pattern that matches no kernel or several, kernels that do not fit
        together, a stacked bias (in ``init``); no params, trees or shapes that do not match, a pair
        of which a part has no update, arrays split by ``shard_map`` (in ``update``; not detected
        under ``pmap`` and ``check_vma=False``).

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import optax_spd
      >>> params = {
      ...     "up": {"kernel": jnp.array([[3.0, 0.6], [4.0, 0.8]]), "bias": jnp.array([5.0, 1.0])},
      ...     "down": {"kernel": jnp.array([[0.0, 2.0], [0.05, 0.0]])},
      ... }
      >>> tx = optax.chain(optax.sgd(0.1), optax_spd.path_prox(0.1, 1.0, [("up", "down")]))
      >>> zeros = jax.tree.map(jnp.zeros_like, params)
      >>> updates, state = tx.update(zeros, tx.init(params), params)
      >>> params = optax.apply_updates(params, updates)
      >>> print(params["up"]["kernel"].round(3))  # columns of norm 1
      [[0.6 0.6]
       [0.8 0.8]]
      >>> print(params["down"]["kernel"].round(2))  # one row shrunk by 0.1, the other zero
      [[0.  1.9]
       [0.  0. ]]

    References:
      Yang et al., `PathProx: A Proximal Gradient Algorithm for Weight Decay Regularized Deep Neural
      Networks <https://arxiv.org/abs/2210.03069>`_, 2022.
    """
    checks.check_scalar("learning_rate", learning_rate)
    checks.check_scalar("weight_decay", weight_decay)
    checks.check_flag("balance", balance)
    checks.check_flag("regularize_bias", regularize_bias)
    patterns = layer_pairs.checked(pairs)

    def init(params: PyTree) -> PathProxState:
        flat = trees.only_parameters(trees.flatten(params))
        layer_pairs.found(patterns, flat)
        return PathProxState(jnp.zeros((), jnp.int32))

    def update(
        updates: PyTree, state: PathProxState, params: PyTree = None, **extra_args: Any
    ) -> tuple[PyTree, PathProxState]:
        del extra_args
        trees.require_params(params)
        flat = trees.only_parameters(trees.flatten(params), updates)
        leaves = trees.align(flat, updates, "updates")
        found = layer_pairs.with_update(layer_pairs.found(patterns, flat), flat, leaves)
        new_state = PathProxState(optax.safe_increment(state.count))
        if not found:
            return updates, new_state
        arrays = [i for pair in found for i in pair if i is not None]
        dtype = plans.compute_dtype(*(x[i] for i in arrays for x in (flat.leaves, leaves)))

        def tentative(index: int | None) -> jax.Array | None:
            if index is None:
                return None
            manual_axes.require_whole(
                "path_prox needs whole arrays",
                trees.path_name(flat.paths[index]),
                flat.leaves[index],
            )
            step = trees.as_real(leaves[index], dtype, "updates", flat.paths[index])
            return jnp.asarray(flat.leaves[index], dtype) + step

        new = [Pair(*map(tentative, pair)) for pair in found]
        if balance and not regularize_bias and len(new) > 1:
            new = balanced(new)
        rate, decay = (
            checks.value_at(x, state.count, dtype) for x in (learning_rate, weight_decay)
        )
        new = [proximal(p, rate * decay, regularize_bias=bool(regularize_bias)) for p in new]
        changed = {}
        for indices, pair in zip(found, new, strict=True):
            for index, array in zip(indices, pair, strict=True):
                if index is not None:
                    step = array - jnp.asarray(flat.leaves[index], dtype)
                    changed[flat.paths[index]] = step.astype(jnp.result_type(leaves[index]))
        return trees.replace_leaves(updates, changed), new_state

    return optax.GradientTransformationExtraArgs(init, update)
