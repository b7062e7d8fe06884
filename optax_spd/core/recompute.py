"""Rematerialisation: recompute Δ, and a recipe's inner step, for the second pass over the arrays.

A method reads each array twice: to decide, and to act. XLA would keep the results of the first pass
until the second, which is another parameter tree in memory. An optimization barrier hides from XLA
that both passes compute the same, so the second pass recomputes it from the arrays. On TPU this
reduces ``adam_spd``'s temporaries from 3.9 to 0.0 bytes a parameter (benchmarks/README.md).

The deviation is cheap, and is recomputed on every platform. An inner step is recomputed on
accelerators only: XLA:CPU would write both of its results to memory.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_spd import wrappers
from optax_spd.anchors import policy
from optax_spd.core import stage
from optax_spd.layers import trees
from optax_spd.layers.types import PyTree

# Smaller anchors in host memory are not fetched a second time: they need little memory, and each
# branch has a cost (by estimate, PCIe transfers a megabyte in 40 to 60 µs).
MIN_SIZE_TO_REFETCH = 1 << 18


def barrier(tree: PyTree) -> PyTree:
    """The same arrays behind an optimization barrier, so that XLA cannot tell they are equal."""
    # One barrier per array. A joint barrier would wait for all arrays, and in ``shard_map`` its
    # results would vary along every mesh axis that any operand varies along.
    return jax.tree.map(jax.lax.optimization_barrier, tree)


def chain(
    inner: Sequence[optax.GradientTransformation], last: optax.GradientTransformationExtraArgs
) -> optax.GradientTransformationExtraArgs:
    """``optax_spd.chain(*inner, last)``, with the inner step recomputed for the second pass.

    For a stage that uses the inner step in its sums and in its result, so that XLA would keep it
    for all arrays. Recomputing it reads gradients and moments twice.

    Args:
      inner: transformations without side effects.
      last: a stage that passes its extra arguments to :meth:`StageOptions.view` and calls
        :func:`second_pass`.
    """
    plain, inner_chain = optax.chain(*inner, last), optax.chain(*inner)

    def update(
        updates: PyTree, state: Any, params: PyTree = None, **extra_args: Any
    ) -> tuple[PyTree, Any]:
        result: tuple[PyTree, Any]
        if not _is_traced(updates):
            result = plain.update(updates, state, params, **extra_args)
            return result
        *states, last_state = state
        first, _ = inner_chain.update(updates, tuple(states), params, **extra_args)
        # Without a barrier, on CPU, XLA merges the two inner steps into one.
        hidden = jax.lax.platform_dependent(updates, cpu=lambda tree: tree, default=barrier)
        second, states = inner_chain.update(hidden, tuple(states), params, **extra_args)
        result, last_state = last.update(
            first, last_state, params, recomputed_updates=second, **extra_args
        )
        return result, (*states, last_state)

    return wrappers.with_gradient(optax.GradientTransformationExtraArgs(plain.init, update))


def second_pass(view: stage.StageView, changes: Callable[[int], jax.Array]) -> stage.StageView:
    """The view for the second pass over the arrays.

    Args:
      view: the view of the first pass.
      changes: from an active leaf's index to where the second pass needs its deviation (bools
        that broadcast against the array); elsewhere the deviation may be 0.

    Returns:
      The view with deviations recomputed from θ₀. If θ₀ is in host memory, only those of
      arrays that change are recomputed. Deviations from a zero anchor are reused. The updates are
      those that :func:`chain` recomputed, if any.
    """
    if view.recomputed_updates is not None:
        leaves = trees.align(view.flat, view.recomputed_updates, "updates")
        view = dataclasses.replace(view, updates=leaves, tree=view.recomputed_updates)
    on_device = {
        i: theta_0
        for i, theta_0 in enumerate(view.anchor)
        if isinstance(theta_0, jax.core.Tracer) and not policy.is_on_host(theta_0)
    }
    origins = barrier(on_device)
    return dataclasses.replace(
        view,
        deviations=[
            None if d is None else _second_deviation(view, i, d, origins.get(i), changes)
            for i, d in enumerate(view.deviations)
        ],
    )


def _second_deviation(
    view: stage.StageView,
    index: int,
    first: stage.Deviation,
    origin: jax.Array | None,
    changes: Callable[[int], jax.Array],
) -> stage.Deviation:
    """One array's Δ and u; Δ may be 0 if no layer of the array changes."""
    path, theta, theta_0 = view.flat.paths[index], view.flat.leaves[index], view.anchor[index]
    delta = first.delta
    step = trees.as_real(view.updates[index], delta.dtype, "updates", path)
    if origin is not None:
        delta = stage.delta_of(path, theta, origin, delta.dtype)
    elif isinstance(theta_0, jax.core.Tracer) and trees.has_at_least(delta, MIN_SIZE_TO_REFETCH):
        delta = _refetched(path, delta, changes(index).any(), theta, theta_0)
    return stage.Deviation(delta, step)


def _refetched(
    path: trees.Path, first: jax.Array, needed: jax.Array, theta: jax.Array, theta_0: jax.Array
) -> jax.Array:
    """Δ from an anchor in host memory, fetched if it is needed; else 0.

    This is a branch and not a barrier: XLA does not start a branch before it is taken, and would
    copy an array behind a barrier back to host memory.
    """
    delta = functools.partial(stage.delta_of, path, dtype=first.dtype)

    @jax.custom_batching.custom_vmap
    def branch(needed: jax.Array, theta: jax.Array, theta_0: jax.Array) -> jax.Array:
        fetched: jax.Array = jax.lax.cond(
            needed, lambda: delta(theta, theta_0), lambda: jnp.zeros_like(theta, first.dtype)
        )
        return fetched

    # ``vmap`` turns a branch into a select, which does not exist for arrays in host memory. So all
    # anchors of a batch are fetched.
    @branch.def_vmap
    def _(size: int, batched: Sequence[bool], _: Any, *arrays: jax.Array) -> Any:
        axes = [0 if is_batched else None for is_batched in batched[1:]]
        return jax.vmap(delta, axes, axis_size=size)(*arrays), True

    # JAX cannot add derivatives in host memory. Those of the first pass are used instead; they are
    # equal wherever they are needed.
    fetch = jax.custom_jvp(lambda _, *operands: branch(*operands))
    fetch.defjvp(lambda primals, tangents: (fetch(*primals), tangents[0]))
    result: jax.Array = fetch(first, needed, theta, theta_0)
    return result


def _is_traced(tree: PyTree) -> bool:
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree))
