"""Sums over each layer, under any sharding, and the per-layer vectors made of them.

The methods compare inner products and norms of whole layers. Elementwise products are summed array
by array over axes, since an explicit-sharding mesh rejects ``vdot`` and flattening reshapes. The
results of all layers are joined into one vector.
"""

import functools
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from optax_spd.core import one_pass
from optax_spd.layers import trees
from optax_spd.layers.plans import ArrayLayers, LayerPlan
from optax_spd.layers.types import PyTree
from optax_spd.sharding.manual_axes import MeshAxes

Products = Sequence[tuple[jax.Array, ...] | None]
"""Elementwise products for each leaf of the parameters; None for a leaf that is not summed."""

# XLA merges the all-reduces of up to this many sums into one. Beyond that, each array's products
# are stacked and summed together. The stack costs memory where XLA does not fuse it.
MERGED_OPERANDS = 256


def layer_sums(
    plan: LayerPlan,
    products: Products,
    count: int,
    axes: Sequence[MeshAxes] | None = None,
) -> tuple[jax.Array, ...]:
    """Sums elementwise products over each layer.

    Args:
      plan: the layers.
      products: per leaf ``count`` arrays of the leaf's shape, or None for a leaf that is not a
        layer or has no update in this step.
      count: how many quantities are summed.
      axes: per leaf the mesh axes that ``shard_map`` or ``pmap`` split it over, from
        :func:`optax_spd.sharding.manual_axes.sharded_axes`; None without manual axes.

    Returns:
      ``count`` vectors of shape (``plan.vector_size``,) and dtype ``plan.dtype``, zero for a layer
      without products. All sums between devices take a single ``psum``.
    """
    return tuple(to_vectors(plan, block_sums(plan, products, axes), count))


def block_sums(
    plan: LayerPlan,
    products: Products,
    axes: Sequence[MeshAxes] | None = None,
) -> dict[int, tuple[jax.Array, ...]]:
    """The sums of :func:`layer_sums`, separate for each block of layers.

    A block is the layers of one array, or of a group of arrays. If no axis is split by hand, its
    sums depend on its own arrays only.

    Args:
      plan: the layers.
      products: as for :func:`layer_sums`.
      axes: as for :func:`layer_sums`.

    Returns:
      For each index of a block's first layer the block's sums, each with the sizes of the stacked
      axes. The sums of an array that is one layer are scalars.
    """
    blocks: dict[int, tuple[jax.Array, ...]] = {}
    all_axes = tuple(sorted({name for mesh_axes in axes or () for name in mesh_axes}))
    for index, sums in _array_sums(plan, products).items():
        entry = plan.arrays[index]
        assert entry is not None
        block = tuple(x.astype(plan.dtype) for x in sums)
        if axes is not None:
            block = tuple(from_one_device(x, axes[index], all_axes) for x in block)
        if entry.start in blocks:
            block = tuple(map(operator.add, blocks[entry.start], block))
        blocks[entry.start] = block
    return summed_between_devices(blocks, all_axes) if all_axes else blocks


def _array_sums(plan: LayerPlan, products: Products) -> dict[int, list[jax.Array]]:
    """The sums of each leaf with products, each with the sizes of the stacked axes."""
    found = {
        index: (entry, terms)
        for index, (entry, terms) in enumerate(zip(plan.arrays, products, strict=True))
        if entry is not None and terms is not None
    }
    stack = needs_stacking(products)

    def plain(index: int) -> list[jax.Array]:
        entry, terms = found[index]
        within = tuple(a for a in range(terms[0].ndim) if a not in entry.stacked_axes)
        return [replicated(x) for x in sums_over(terms, axes=within, stack=stack)]

    def in_one_pass(index: int) -> list[jax.Array]:
        entry, terms = found[index]
        return list(one_pass.sums(terms, entry.stacked_axes))

    large = [
        i
        for i, (_, terms) in found.items()
        if trees.has_at_least(terms[0], one_pass.SMALLEST_ARRAY)
    ]
    if not large or not one_pass.is_single_cpu_program(products):
        return {i: plain(i) for i in found}
    sums: dict[int, list[jax.Array]] = jax.lax.platform_dependent(
        cpu=lambda: {i: in_one_pass(i) for i in large}, default=lambda: {i: plain(i) for i in large}
    )
    return {i: sums[i] if i in sums else plain(i) for i in found}


def needs_stacking(products: Products) -> bool:
    """Whether there are too many sums for XLA to merge their all-reduces."""
    operands = sum(len(terms or ()) for terms in products)
    return operands > MERGED_OPERANDS and jax.device_count() > 1


# Jitted, as is all that is done array by array, so that arrays of one shape share a trace.
@functools.partial(jax.jit, static_argnames=("axes", "stack", "keepdims"))
def sums_over(
    terms: tuple[jax.Array, ...], *, axes: tuple[int, ...], stack: bool, keepdims: bool = False
) -> list[jax.Array]:
    """The sums of arrays of one shape.

    Args:
      terms: the arrays.
      axes: the axes to sum over.
      stack: whether to stack the arrays first, as one operand (:func:`needs_stacking`).
      keepdims: as in ``jnp.sum``.
    """
    if not stack:
        return [jnp.sum(term, axis=axes, keepdims=keepdims) for term in terms]
    return list(jnp.sum(jnp.stack(terms), tuple(axis + 1 for axis in axes), keepdims=keepdims))


def replicated(array: jax.Array) -> jax.Array:
    """Replicates an array that an explicit-sharding mesh splits.

    Such a mesh cannot join arrays that are split differently.
    """
    sharding = jax.typeof(array).sharding
    if all(part is None for part in sharding.spec):
        return array
    unsplit = jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec())
    result: jax.Array = jax.sharding.reshard(array, unsplit)
    return result


def from_one_device(block: jax.Array, axes: MeshAxes, all_axes: tuple[str, ...]) -> jax.Array:
    """Zeroes all copies of a replicated contribution but one, so that a psum counts it once.

    Args:
      block: a device's contribution.
      axes: the mesh axes along which contributions differ.
      all_axes: the mesh axes that the psum is over.
    """
    for name in all_axes:
        if name not in axes:
            block = jnp.where(jax.lax.axis_index(name) == 0, block, jnp.zeros_like(block))
    return block


def summed_between_devices(tree: PyTree, axes: tuple[str, ...]) -> PyTree:
    """Sums a tree of arrays between devices, by one psum of one vector."""
    vector, unravel = ravel_pytree(tree)
    return unravel(jax.lax.psum(vector, axes)) if vector.size else tree


def to_vectors(
    plan: LayerPlan, blocks: Mapping[int, Sequence[jax.Array] | jax.Array], count: int
) -> list[jax.Array]:
    """The ``count`` quantities of all blocks as per-layer vectors; 0 where there is no block."""
    sizes = {entry.start: entry.count for entry in plan.arrays if entry is not None}
    if not sizes:
        return [jnp.zeros(plan.vector_size, plan.dtype)] * count

    def vector(number: int) -> jax.Array:
        parts = [
            blocks[start][number].reshape(size) if start in blocks else jnp.zeros(size, plan.dtype)
            for start, size in sorted(sizes.items())
        ]
        return jnp.concatenate(parts)

    return [vector(number) for number in range(count)]


def norm_of(square: jax.Array) -> jax.Array:
    """The square root of a sum of squares; 0 where rounding made it negative.

    Its derivative at 0 is 0. That of ``sqrt`` is infinite, and would turn gradients taken through
    an update (meta-learning) into NaN.
    """
    is_zero = square <= 0
    return jnp.where(is_zero, 0, jnp.sqrt(jnp.where(is_zero, 1, square)))


def per_layer(name: str, value: Any, plan: LayerPlan) -> jax.Array:
    """Converts a scalar, or one number per layer, to a per-layer vector.

    Raises:
      ValueError: any other shape.
    """
    array = jnp.asarray(value)
    if array.ndim == 0:
        return jnp.full(plan.vector_size, array, plan.dtype)
    if array.shape != (len(plan.names),):
        raise ValueError(
            f"{name} must be a scalar or hold one value for each of the {len(plan.names)} layers "
            f"(see layer_names), got shape {array.shape}."
        )
    return array.astype(plan.dtype) if plan.names else jnp.zeros(plan.vector_size, plan.dtype)


def spread(entry: ArrayLayers, vector: jax.Array, ndim: int) -> jax.Array:
    """One array's entries of a per-layer vector, shaped to broadcast against the array."""
    values = jax.lax.slice_in_dim(vector, entry.start, entry.start + entry.count)
    return spread_block(entry, values, ndim)


def spread_block(entry: ArrayLayers, values: jax.Array, ndim: int) -> jax.Array:
    """One value for each layer of an array, shaped to broadcast against the array."""
    if not entry.stacked_axes:
        return values.reshape(())
    shape = [1] * ndim
    for axis, size in zip(entry.stacked_axes, entry.stacked_shape, strict=True):
        shape[axis] = size
    return values.reshape(shape)


def spread_over(
    plan: LayerPlan, vector: jax.Array, arrays: Sequence[jax.Array | None]
) -> list[jax.Array | None]:
    """:func:`spread` for each leaf, in the array's dtype."""
    return [
        None
        if entry is None or array is None
        else spread(entry, vector, array.ndim).astype(array.dtype)
        for entry, array in zip(plan.arrays, arrays, strict=True)
    ]


@jax.custom_jvp
def times(factor: jax.Array, array: jax.Array) -> jax.Array:
    """``factor * array``; 0 where the factor is 0, whatever the array holds.

    The derivatives are those of the product, also where the factor is 0.
    """
    return jnp.where(sharded_like(factor == 0, array), 0, factor * array)


@times.defjvp
def _(
    primals: tuple[jax.Array, jax.Array], tangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    (factor, array), (change, step) = primals, tangents
    return times(factor, array), change * array + times(factor, step)


def sharded_like(values: jax.Array, array: jax.Array) -> jax.Array:
    """Values that broadcast against ``array``, to select with or by.

    An explicit-sharding mesh wants all operands of a select sharded alike. But values that are
    spread from a per-layer vector are replicated, and the anchor may be split where the parameters
    are not.
    """
    sharding = jax.typeof(array).sharding
    if all(part is None for part in (*sharding.spec, *jax.typeof(values).sharding.spec)):
        return values
    like: jax.Array = jax.sharding.reshard(jnp.broadcast_to(values, array.shape), sharding)
    return like
