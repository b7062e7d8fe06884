"""Rematerialisation: recompute Δ, and a recipe's inner step, for the second pass over the arrays.

A method reads each array twice: to decide, and to act. XLA would keep what the first pass computed
until the second, which is another parameter tree in memory. An optimization barrier stops XLA from
seeing that both passes compute the same, so the second computes it again from the arrays. On TPU
that takes ``adam_spd``'s temporaries from 3.9 to 0.0 bytes a parameter (benchmarks/README.md).

On CPU both passes share one result. XLA's CPU backend gains nothing there, and would compute and
write a recomputed inner step a second time.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_spd import wrappers
from optax_spd.anchors import policy
from optax_spd.core import stage, sums
from optax_spd.layers import trees
from optax_spd.sharding import manual_axes

PyTree = Any

# Smaller anchors in host memory are not fetched a second time. Together they are little, and each
# branch has a price (an estimate: a megabyte crosses PCIe in 40 to 60 µs).
MIN_SIZE_TO_REFETCH = 1 << 18


def barrier(tree: PyTree) -> PyTree:
    """The same arrays; on accelerators XLA computes anew what is made of them."""
    return jax.lax.platform_dependent(tree, cpu=lambda tree: tree, default=_optimization_barrier)


def _optimization_barrier(tree: PyTree) -> PyTree:
    """One barrier for all arrays that ``shard_map`` knows to vary along the same mesh axes.

    Arrays that pass through one barrier leave it varying along the axes of all of them.
    """
    leaves, treedef = jax.tree.flatten(tree)
    varying = [manual_axes.varying_axes(leaf) for leaf in leaves]
    for axes in dict.fromkeys(varying):
        places = [i for i, found in enumerate(varying) if found == axes]
        behind = jax.lax.optimization_barrier([leaves[i] for i in places])
        for i, leaf in zip(places, behind, strict=True):
            leaves[i] = leaf
    return jax.tree.unflatten(treedef, leaves)


def chain(
    inner: Sequence[optax.GradientTransformation], last: optax.GradientTransformationExtraArgs
) -> optax.GradientTransformationExtraArgs:
    """``optax_spd.chain(*inner, last)``, whose inner step is recomputed for the second pass.

    For a stage that needs the inner step in more than one sum and one result: XLA would keep it for
    all arrays. Recomputing it reads gradients and moments twice.

    Args:
      inner: transformations without side effects, which take no extra arguments but the chain's.
      last: a stage that hands its extra arguments to :meth:`StageOptions.view` and calls
        :func:`second_pass`.
    """
    plain, steps = optax.chain(*inner, last), optax.chain(*inner)

    def update(
        updates: PyTree, state: Any, params: PyTree = None, **extra_args: Any
    ) -> tuple[PyTree, Any]:
        result: tuple[PyTree, Any]
        if not _is_traced(updates):
            result = plain.update(updates, state, params, **extra_args)
            return result
        *states, last_state = state
        first, _ = steps.update(updates, tuple(states), params, **extra_args)
        second, states = steps.update(barrier(updates), tuple(states), params, **extra_args)
        result, last_state = last.update(
            first, last_state, params, recomputed_updates=second, **extra_args
        )
        return result, (*states, last_state)

    return wrappers.with_gradient(optax.GradientTransformationExtraArgs(plain.init, update))


def second_pass(view: stage.StageView, changing: jax.Array) -> stage.StageView:
    """The view for the second pass over the arrays.

    Args:
      view: of the first pass.
      changing: per layer whether the second pass needs its deviation; the others' may be 0.

    Returns:
      The same with deviations recomputed from θ₀: always where it is on the device, and where it is
      in host memory for layers that are ``changing``. Deviations from a zero anchor are reused. The
      updates are those recomputed by :func:`chain`, if there are any.
    """
    if view.recomputed_updates is not None:
        leaves = trees.align(view.flat, view.recomputed_updates, "updates")
        view = dataclasses.replace(view, updates=leaves, tree=view.recomputed_updates)
    on_device = {
        i: theta_0
        for i, theta_0 in enumerate(view.anchor)
        if isinstance(theta_0, jax.core.Tracer) and not policy.is_on_host(theta_0)
    }
    origins = barrier(on_device) if on_device else {}
    return dataclasses.replace(
        view,
        deviations=[
            None if d is None else _second_deviation(view, i, d, origins.get(i), changing)
            for i, d in enumerate(view.deviations)
        ],
    )


def _second_deviation(
    view: stage.StageView,
    index: int,
    first: stage.Deviation,
    origin: jax.Array | None,
    changing: jax.Array,
) -> stage.Deviation:
    """One array's Δ and u; Δ may be 0 where no layer is ``changing``."""
    path, theta, theta_0 = view.flat.paths[index], view.flat.leaves[index], view.anchor[index]
    entry, delta = view.plan.arrays[index], first.delta
    assert entry is not None
    step = trees.as_real(view.updates[index], delta.dtype, "updates", path)
    if origin is not None:
        delta = stage.delta_of(path, theta, origin, delta.dtype)
    elif isinstance(theta_0, jax.core.Tracer) and delta.size >= MIN_SIZE_TO_REFETCH:
        needed = sums.spread(entry, changing, delta.ndim).any()
        delta = _refetched(path, delta, needed, theta, theta_0)
    return stage.Deviation(delta, step)


def _refetched(
    path: trees.Path, first: jax.Array, needed: jax.Array, theta: jax.Array, theta_0: jax.Array
) -> jax.Array:
    """Δ from an anchor in host memory, fetched if it is needed; else 0.

    A branch, because XLA does not start a branch before it knows that it is taken. A barrier on an
    array in host memory would make XLA write it back there.
    """
    delta = functools.partial(stage.delta_of, path, dtype=first.dtype)

    @jax.custom_batching.custom_vmap
    def branch(needed: jax.Array, theta: jax.Array, theta_0: jax.Array) -> jax.Array:
        fetched: jax.Array = jax.lax.cond(
            needed, lambda: delta(theta, theta_0), lambda: jnp.zeros_like(theta, first.dtype)
        )
        return fetched

    # JAX turns a branch that differs within a batch into a select, also between arrays in host
    # memory, where it cannot select.
    @branch.def_vmap
    def _(size: int, batched: Sequence[bool], _: Any, *arrays: jax.Array) -> Any:
        axes = [0 if is_batched else None for is_batched in batched[1:]]
        return jax.vmap(delta, axes, axis_size=size)(*arrays), True

    # JAX cannot add up derivatives in host memory either. Those of the first pass are the same,
    # wherever they count.
    fetch = jax.custom_jvp(lambda _, *operands: branch(*operands))
    fetch.defjvp(lambda primals, tangents: (fetch(*primals), tangents[0]))
    result: jax.Array = fetch(first, needed, theta, theta_0)
    return result


def _is_traced(tree: PyTree) -> bool:
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree))
