"""What the pass that changes the updates computes anew.

A method reads each layer twice: to decide, and to act. What the first pass computed, XLA would keep
for the second until all layers are decided: another parameter tree. So the second computes it from
the arrays again: the deviation, and in :func:`chain` the inner optimizer's step as well.

XLA looks for equal operations and keeps the first result. An optimization barrier outlives that
search, which is all that it has to.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_spd import anchors, deviations, stages, trees, wrappers

PyTree = Any

# An array in host memory with at least so many numbers is brought in for either pass. Together the
# smaller ones are little, and a branch for each would cost more than it saves (an estimate: a
# megabyte crosses PCIe in 40 to 60 µs).
MIN_SIZE_TO_REFETCH = 1 << 18


def chain(
    inner: Sequence[optax.GradientTransformation], stage: optax.GradientTransformationExtraArgs
) -> optax.GradientTransformationExtraArgs:
    """``optax_spd.chain(*inner, stage)``, for an inner step that XLA would keep.

    Such is Adam's step where a stage wants it for more than one sum and one result. Computing it
    twice reads gradient and moments twice.

    Args:
      inner: transformations whose update can be computed twice: pure, and without extra arguments
        but the chain's.
      stage: the stage, which passes its extra arguments on to :func:`again`'s view.
    """
    plain, steps = optax.chain(*inner, stage), optax.chain(*inner)

    def update(
        updates: PyTree, state: Any, params: PyTree = None, **extra_args: Any
    ) -> tuple[PyTree, Any]:
        result: tuple[PyTree, Any]
        if not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(updates)):
            result = plain.update(updates, state, params, **extra_args)
            return result
        *states, last = state
        first, _ = steps.update(updates, tuple(states), params, **extra_args)
        anew, states = steps.update(
            jax.lax.optimization_barrier(updates), tuple(states), params, **extra_args
        )
        new, last = stage.update(first, last, params, updates_anew=anew, **extra_args)
        return new, (*states, last)

    return wrappers.with_gradient(optax.GradientTransformationExtraArgs(plain.init, update))


def again(view: stages.StageView, changing: jax.Array) -> stages.StageView:
    """The view for a second pass over the arrays.

    Args:
      view: of the first pass.
      changing: per layer whether the second pass needs its deviation; the others' may be 0.

    Returns:
      The same with the updates computed anew, if they were handed over, and the deviations: from
      arrays θ₀ on the device always, from those in host memory where the layer is ``changing``.
      Those that no array θ₀ leads to stay as they are, and in a stage's form for one CPU those of
      anchors in host memory.
    """
    if view.updates_anew is not None:
        leaves = trees.align(view.flat, view.updates_anew, "updates")
        view = dataclasses.replace(view, updates=leaves, tree=view.updates_anew)
    pairs = zip(view.deviations, view.plan.arrays, strict=True)
    return dataclasses.replace(
        view,
        deviations=[
            None
            if d is None or entry is None
            else _anew(view, i, d, deviations.spread(entry, changing, d.delta.ndim).any())
            for i, (d, entry) in enumerate(pairs)
        ],
    )


def _anew(
    view: stages.StageView, index: int, first: stages.Deviation, needed: jax.Array
) -> stages.Deviation:
    """One array's Δ and u; Δ is 0 where it is not needed and costs a copy."""
    path, theta, theta_0 = view.flat.paths[index], view.flat.leaves[index], view.anchor[index]
    delta = first.delta
    step = trees.as_real(view.updates[index], delta.dtype, "updates", path)
    if not isinstance(theta_0, jax.core.Tracer):
        return stages.Deviation(delta, step)
    if not anchors.is_on_host(theta_0):
        theta_0 = jax.lax.optimization_barrier(theta_0)
        return stages.Deviation(stages.delta_of(path, theta, theta_0, delta.dtype), step)
    # On one CPU layers are taken in turn, and a copy costs what it saves.
    if view.for_one_cpu or delta.size < MIN_SIZE_TO_REFETCH:
        return stages.Deviation(delta, step)
    return stages.Deviation(_refetched(path, delta, needed, theta, theta_0), step)


def _refetched(
    path: trees.Path, first: jax.Array, needed: jax.Array, theta: jax.Array, theta_0: jax.Array
) -> jax.Array:
    """Δ from an anchor in host memory, brought in if it is needed; else 0.

    A branch is not computed before it is known to be needed: of TPGM and FTP, which need nearly
    all, that is the purpose. (Of a barrier on an array in host memory XLA makes a copy back there.)
    """
    delta = functools.partial(stages.delta_of, path, dtype=first.dtype)

    @jax.custom_batching.custom_vmap
    def branch(needed: jax.Array, theta: jax.Array, theta_0: jax.Array) -> jax.Array:
        fetched: jax.Array = jax.lax.cond(
            needed, lambda: delta(theta, theta_0), lambda: jnp.zeros_like(theta, first.dtype)
        )
        return fetched

    # Of a branch that differs within a batch JAX makes a selection, also between arrays in host
    # memory, which it cannot do.
    @branch.def_vmap
    def _(size: int, batched: Sequence[bool], _: Any, *arrays: jax.Array) -> Any:
        axes = [0 if is_batched else None for is_batched in batched[1:]]
        return jax.vmap(delta, axes, axis_size=size)(*arrays), True

    # Nor can it add up derivatives in host memory. Those of the first pass are the same, wherever
    # they count.
    fetch = jax.custom_jvp(lambda _, *operands: branch(*operands))
    fetch.defjvp(lambda primals, tangents: (fetch(*primals), tangents[0]))
    result: jax.Array = fetch(first, needed, theta, theta_0)
    return result
