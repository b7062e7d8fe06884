"""Give optimizer state the sharding of its parameters.

Zeros depend on no input. So in a jitted ``init`` under automatic sharding the partitioner
replicates them on every device, unless they are made to depend on their parameter.
"""

from typing import Any

import jax
import jax.numpy as jnp

from optax_spd.layers import trees
from optax_spd.layers.types import PyTree


def with_sharding_of(array: Any, like: Any) -> Any:
    """The same array, sharded as ``like``.

    Only during tracing, and if both have a floating dtype and are in device memory; otherwise the
    array is returned unchanged.
    """
    if not all(map(_is_traced_on_device, (array, like))):
        return array
    explicit = jax.typeof(like).sharding
    if any(part is not None for part in explicit.spec):
        return jax.sharding.reshard(array, explicit)
    # Makes each element depend on the parameter's. (``shard_alike`` is not enough: XLA first merges
    # all zeros of one shape into a single constant, which has a single sharding.)
    always_true = 0 * jnp.where(jnp.isfinite(like), like, 0) == 0
    return jnp.where(always_true, array, jnp.zeros_like(array))


def _is_traced_on_device(array: Any) -> bool:
    return (
        isinstance(array, jax.core.Tracer)
        and jnp.issubdtype(array.dtype, jnp.floating)
        and jax.typeof(array).memory_space == jax.memory.Space.Device
    )


def shard_like_params(state: PyTree, params: PyTree) -> PyTree:
    """Gives each state array with a parameter's path and shape that parameter's sharding.

    Anchors are left unchanged: as copies of the parameters they already have the sharding. If the
    program also initialises the parameters, XLA would run the initialiser again for the anchor,
    with different rounding.

    Args:
      state: the result of any transformation's ``init``.
      params: the argument of that ``init``.
    """
    flat = trees.only_parameters(trees.flatten(params))
    if not any(isinstance(leaf, jax.core.Tracer) for leaf in flat.leaves):
        return state
    found = flat.by_path
    held = trees.flatten(state, unique=False)

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
