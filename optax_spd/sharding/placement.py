"""Keeping what a state holds on the devices of the parameters it belongs to.

Zeros depend on nothing. In a jitted ``init`` under automatic sharding the partitioner therefore
puts a whole copy of them on every device; tied to their parameter they are split as it is.
"""

from typing import Any

import jax
import jax.numpy as jnp

from optax_spd.layers import trees

PyTree = Any


def with_sharding_of(array: Any, like: Any) -> Any:
    """The same array, sharded as ``like`` where a program is being traced.

    Only where both hold floating numbers in the device's memory.
    """
    if not all(map(_is_traced_on_device, (array, like))):
        return array
    # Each element is made to depend on the parameter's, as a copy would. (``shard_alike`` does not
    # do: zeros of one shape become one constant first, and what is tied to it is all split alike.)
    always = 0 * jnp.where(jnp.isfinite(like), like, 0) == 0
    return jnp.where(always, array, jnp.zeros_like(array))


def _is_traced_on_device(array: Any) -> bool:
    return (
        isinstance(array, jax.core.Tracer)
        and jnp.issubdtype(array.dtype, jnp.floating)
        and jax.typeof(array).memory_space == jax.memory.Space.Device
    )


def shard_like_params(state: PyTree, params: PyTree) -> PyTree:
    """A state whose arrays at a parameter's path and of its shape are sharded as it is.

    Args:
      state: of any transformation, as its ``init`` returned it.
      params: what that ``init`` was given.
    """
    flat = trees.flatten(params)
    if not any(isinstance(leaf, jax.core.Tracer) for leaf in flat.leaves):
        return state
    found = flat.by_path
    held = trees.flatten(state)

    def placed(path: trees.Path, leaf: Any) -> Any:
        for start in range(len(path) + 1):
            like = found.get(path[start:])
            if isinstance(like, jax.Array):
                same = isinstance(leaf, jax.Array) and leaf.shape == like.shape != ()
                return with_sharding_of(leaf, like) if same else leaf
        return leaf

    return held.unflatten(map(placed, held.paths, held.leaves))
