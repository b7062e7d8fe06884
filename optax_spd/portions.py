"""Which arrays an optimizer's step on one CPU takes at a time (:mod:`optax_spd.in_turn`).

What is decided together is taken together. Small arrays of one shape are stacked: a thousand
biases would otherwise take a thousand kernels of each kind.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optax_spd import layers as layers_lib, plans

PyTree = Any

# In elements: arrays up to the one size are stacked with others of their shape, up to the other in
# all.
SMALL_ARRAY = 2**16
LARGEST_STACK = 2**18


class Portion(NamedTuple):
    """Arrays that are taken at a time: a unit's, or small ones of one shape, to be stacked."""

    leaves: list[int]
    stacked: bool

    def places(self, plan: plans.LayerPlan) -> list[int]:
        """Where its layers stand in the per-layer vectors."""
        firsts = self.leaves if self.stacked else self.leaves[:1]
        entries = (plan.arrays[i] for i in firsts)
        return [number for entry in entries if entry is not None for number in entry.numbers]

    def specs(self, plan: plans.LayerPlan) -> tuple[layers_lib.LayerSpec, ...]:
        """What layers its arrays have as they are taken, stacked or not; () for no layer."""
        entries = [entry for entry in map(plan.arrays.__getitem__, self.leaves) if entry]
        if self.stacked:
            outputs = tuple(1 + axis for axis in entries[0].output_axes)
            return (layers_lib.LayerSpec(stacked_axes=(0,), output_axes=outputs),)
        return tuple(
            layers_lib.LayerSpec(entry.stacked_axes, entry.output_axes, group="unit")
            for entry in entries
        )


def portions(plan: plans.LayerPlan, kinds: Sequence[Any]) -> list[Portion]:
    """Divides the leaves up: first what is no layer, then the layers.

    Args:
      plan: the layers.
      kinds: per leaf something hashable that starts with its shape, or () for a gap; only leaves
        with equal kinds, and with the same output axes, are stacked.
    """
    others = (i for i, entry in enumerate(plan.arrays) if entry is None and kinds[i])
    found = [Portion([i], stacked=False) for i in others]
    stacks: dict[Any, list[int]] = {}
    for unit in plan.units:
        first = unit.leaves[0]
        entry, size = plan.arrays[first], math.prod(kinds[first][0])
        kind = (kinds[first], entry.output_axes if entry else ())
        if len(unit.leaves) > 1 or plan.stacked_axes(first) or size > SMALL_ARRAY:
            found.append(Portion(unit.leaves, stacked=False))
            continue
        stack = stacks.get(kind)
        if stack is None or (len(stack) + 1) * size > LARGEST_STACK:
            stack = stacks[kind] = []
            found.append(Portion(stack, stacked=True))
        stack.append(first)
    return found


def kind_of(leaf: PyTree) -> tuple[Any, ...]:
    """What must be equal in arrays to be stacked: shapes and types of what belongs to each.

    Args:
      leaf: a tree of arrays, an array of the parameters first; () for one without arrays.
    """
    arrays = jax.tree.leaves(leaf)
    weak = (jax.typeof(array).weak_type for array in arrays)
    return (*map(jnp.shape, arrays), *map(jnp.result_type, arrays), *weak)


def opaque_numbers(size: int, count: jax.Array) -> list[jax.Array]:
    """0, 1, 2, ... as numbers that XLA does not know.

    With indices that it knows it compiles a kernel of its own for every array taken out of a
    stack; without, arrays of one shape share one. It cannot know that a count is not negative.
    """
    known = [np.int32(i) for i in range(size)]
    numbers: list[jax.Array] = jax.lax.cond(count >= 0, lambda: known, lambda: known[::-1])
    return numbers


def unstacked(stack: PyTree, numbers: Sequence[jax.Array]) -> list[PyTree]:
    """The trees of arrays that were stacked, by their numbers."""

    def one(number: jax.Array) -> PyTree:
        return jax.tree.map(
            lambda x: jax.lax.dynamic_index_in_dim(x, number, keepdims=False), stack
        )

    return [one(number) for number in numbers]
