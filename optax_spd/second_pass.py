"""Deviations computed anew for the pass that changes the updates.

A method reads each layer twice: to decide, and to act. What the first pass computed, XLA would keep
for the second until all layers are decided: another parameter tree. So the second computes it from
the arrays again.
"""

import dataclasses

import jax
import jax.numpy as jnp

from optax_spd import anchors, plans, stages

# An array in host memory with at least so many numbers is brought in for either pass. Together the
# smaller ones are little, and the larger ones' copies take longer than what a branch costs.
BROUGHT_IN_TWICE = 1 << 18


def again(view: stages.StageView, changing: jax.Array) -> stages.StageView:
    """The view for a second pass over the arrays.

    Args:
      view: of the first pass.
      changing: per layer whether the second pass needs its deviation; the others' may be 0.

    Returns:
      The same with deviations computed anew: from arrays θ₀ on the device always, from those in
      host memory where the layer is ``changing``. Those that no array θ₀ leads to stay as they
      are, and in a program for one CPU those of anchors in host memory.
    """
    pairs = zip(view.deviations, view.plan.arrays, strict=True)
    return dataclasses.replace(
        view,
        deviations=[
            None if d is None or entry is None else _anew(view, i, d, _any_of(entry, changing))
            for i, (d, entry) in enumerate(pairs)
        ],
    )


def _any_of(entry: plans.ArrayLayers, vector: jax.Array) -> jax.Array:
    return vector[entry.numbers.start : entry.numbers.stop].any()


def _anew(
    view: stages.StageView, index: int, first: stages.Deviation, needed: jax.Array
) -> stages.Deviation:
    """One array's Δ and u; Δ is 0 where it is not needed and costs a copy."""
    theta_0 = view.anchor[index]
    arrays = view.flat.paths[index], view.updates[index], view.flat.leaves[index]
    if not isinstance(theta_0, jax.core.Tracer):
        return first
    if not anchors.is_on_host(theta_0):
        # The barrier outlives XLA's search for equal operations, which is all that it has to.
        return stages.deviation_of(*arrays, jax.lax.optimization_barrier(theta_0))
    if view.for_one_cpu or first.delta.size < BROUGHT_IN_TWICE:
        return first
    # A branch is not computed before it is known to be needed. (Of a barrier on an array in host
    # memory XLA makes a copy back to the host.)
    delta = jax.lax.cond(
        needed,
        lambda: stages.deviation_of(*arrays, theta_0).delta,
        lambda: jnp.zeros_like(first.delta),
    )
    return first._replace(delta=delta)
