"""Give optimizer state the sharding of its parameters.

Zeros depend on nothing. In a jitted ``init`` under automatic sharding the partitioner therefore
puts a whole copy of them on every device, unless they are made to depend on their parameter.
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
    # Each element is made to depend on the parameter's, as a copy would. (``shard_alike`` would not
    # do: XLA merges zeros of one shape into one constant first, and would shard it only one way.)
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

    Anchors are left alone: a copy of the parameters is sharded like them already. Here XLA would
    compute an initializer in the same program a second time for it, and round differently.

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
            if start and path[start - 1] == "anchor":
                return leaf
            if isinstance(like, jax.Array):
                same = isinstance(leaf, jax.Array) and leaf.shape == like.shape != ()
                return with_sharding_of(leaf, like) if same else leaf
        return leaf

    return held.unflatten(map(placed, held.paths, held.leaves))
