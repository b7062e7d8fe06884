r"""FedNAR: weight decay inside the gradient clipping of federated learning's local steps.

Li, Li, Tian, Ho, Xing, Wang: "FedNAR: Federated Optimization with Normalized Annealing
Regularization", NeurIPS 2023, https://arxiv.org/abs/2310.03163; the authors' code:
ljb121002/fednar. A client's local step on the parameters θ, with gradient g, weight decay λ and
bound A:

    h = g + λ θ
    θ ← θ - η h min(1, A / ‖h‖)            ‖·‖ over all parameters together

Clipped before the decay is added, a client whose gradient is small moves by its decay alone, as far
as λ takes it; here gradient and decay share the bound. With θ - θ₀ in place of θ, θ₀ being the
parameters that the server sent, it is the local step of FedProx (Li et al.: "Federated Optimization
in Heterogeneous Networks", MLSys 2020, https://arxiv.org/abs/1812.06127) with the same clip.

The decay is :func:`optax_spd.l2_sp`; this module has the clip, and :func:`optax_spd.sgd_fednar` is
both in front of SGD. Differences from the authors' code:

1. The bound is divided by ‖h‖. PyTorch's clip, which they use, adds 1e-6 to it.
2. An array whose h is not finite is left out of the norm, so that it spoils no other array. In
   PyTorch a single NaN makes all of h NaN.
3. The norm is finite if h is, even if a square overflows.
4. ``learning_rate``, λ and A may be schedules. "Annealing" in the paper is η's, once a round.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_spd.core.balls import clip_factor, whole_norms
from optax_spd.core.stage import CountState
from optax_spd.layers import checks, plans, trees
from optax_spd.layers.types import AxisName, PyTree
from optax_spd.sharding import manual_axes


def clip_by_whole_norm(
    max_norm: checks.ScalarOrSchedule, *, axis_name: AxisName = None
) -> optax.GradientTransformation:
    """``optax.clip_by_global_norm`` for hand-split arrays, half precision and schedules.

    Args:
      max_norm: A >= 0, the largest norm of all updates together; or a schedule of it.
      axis_name: as for :func:`optax_spd.spd`.

    Raises:
      ValueError: ``max_norm`` negative or not finite.
    """
    checks.check_scalar("max_norm", max_norm)
    manual_axes.check_axis_name(axis_name)

    def init(params: PyTree) -> CountState:
        del params
        return CountState(count=jnp.zeros((), jnp.int32))

    def update(
        updates: PyTree, state: CountState, params: PyTree = None
    ) -> tuple[PyTree, CountState]:
        del params
        flat = trees.flatten(updates)
        sizes = flat._replace(leaves=[_size(leaf) for leaf in flat.leaves])
        plan = plans.plan_layers(sizes)
        axes = manual_axes.sharded_axes(axis_name, flat, plan)
        arrays = [
            None if entry is None else jnp.asarray(leaf, plans.compute_dtype(leaf))
            for entry, leaf in zip(plan.arrays, sizes.leaves, strict=True)
        ]
        (norm,) = whole_norms(plan, axes, arrays)
        factor = clip_factor(norm, checks.value_at(max_norm, state.count, plan.dtype))
        clipped = {
            path: _scaled(factor, leaf)
            for path, entry, leaf in zip(flat.paths, plan.arrays, flat.leaves, strict=True)
            if entry is not None
        }
        count = optax.safe_increment(state.count)
        return trees.replace_leaves(updates, clipped), CountState(count=count)

    return optax.GradientTransformation(init, update)


def _size(leaf: Any) -> Any:
    """A leaf that is real; of a complex one, the absolute values, which have its norm."""
    if trees.is_missing(leaf) or not jnp.issubdtype(jnp.result_type(leaf), jnp.complexfloating):
        return leaf
    return jnp.abs(leaf)


@jax.jit  # so that arrays of one shape share a trace
def _scaled(factor: jax.Array, leaf: jax.Array) -> jax.Array:
    """The product, rounded once to the leaf's dtype."""
    dtype = jnp.result_type(leaf)
    wide = jnp.promote_types(dtype, jnp.float32)
    return (factor.astype(plans.compute_dtype(leaf)) * jnp.asarray(leaf, wide)).astype(dtype)
