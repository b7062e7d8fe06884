"""Sums over each layer or each of its rows, for all layers at once and under any sharding.

The methods compare inner products and norms of whole layers, or of a layer's rows: its output
units. Here elementwise products are summed array by array - with sums over axes, never ``vdot`` or
a flattening reshape, which an explicit-sharding mesh refuses - and what there is one of per layer
is gathered into one vector.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optax_spd.mapped_axes import MeshAxes
from optax_spd.plans import ArrayLayers, LayerPlan

PyTree = Any
# XLA merges the all-reduces of up to so many sums into one. With more, each array's products are
# stacked and summed at once, which costs memory for the stack where XLA does not fuse it.
MERGED_OPERANDS = 256


def layer_sums(
    plan: LayerPlan,
    products: Sequence[tuple[jax.Array, ...] | None],
    count: int,
    axes: Sequence[MeshAxes] | None = None,
) -> tuple[jax.Array, ...]:
    """Sums elementwise products over each layer.

    Args:
      plan: the layers.
      products: per leaf of the tree ``count`` arrays of the leaf's shape, or None for a leaf that
        is no layer or takes no part in this step.
      count: how many quantities are summed.
      axes: per leaf the mesh axes that ``shard_map`` or ``pmap`` split it over, from
        :func:`optax_spd.mapped_axes.sharded_axes`; None where no axis is mapped.

    Returns:
      ``count`` vectors of shape (``plan.vector_size``,) and dtype ``plan.dtype``, zero for a layer
      without products. A sum over several devices takes one ``psum`` in all.
    """
    blocks: dict[int, jax.Array] = {}
    all_axes = tuple(sorted({name for mesh_axes in axes or () for name in mesh_axes}))
    one_operand = _too_many_to_merge(products)
    for index, (entry, terms) in enumerate(zip(plan.arrays, products, strict=True)):
        if entry is None or terms is None:
            continue
        block = _sums_of_array(entry, terms, one_operand=one_operand).astype(plan.dtype)
        if axes is not None:
            block = _counted_once(block, axes[index], all_axes)
        start = entry.start
        blocks[start] = blocks[start] + block if start in blocks else block
    table = _joined(plan, blocks, count)
    if all_axes:
        table = jax.lax.psum(table, all_axes)
    return tuple(table[i] for i in range(count))


def row_sums(
    plan: LayerPlan,
    products: Sequence[tuple[jax.Array, ...] | None],
    axes: Sequence[MeshAxes] | None = None,
) -> list[tuple[jax.Array, ...] | None]:
    """Sums elementwise products over each row: everything that shares an output unit.

    Args:
      plan: the layers.
      products: as for :func:`layer_sums`.
      axes: as for :func:`layer_sums`; they must say which array axis each mesh axis splits.

    Returns:
      Per leaf the sums, shaped to broadcast against the array: the stacked and the output axes
      keep their sizes, the others have size 1. A sum over several devices takes one ``psum`` for
      all arrays that are split alike.
    """
    rows: list[tuple[jax.Array, ...] | None] = []
    one_operand = _too_many_to_merge(products)
    for entry, terms in zip(plan.arrays, products, strict=True):
        if entry is None or terms is None:
            rows.append(None)
            continue
        kept = entry.stacked_axes + entry.output_axes
        over = tuple(a for a in range(terms[0].ndim) if a not in kept)
        rows.append(tuple(_sums(terms, over, one_operand=one_operand, keepdims=True)))
    return rows if axes is None else _summed_over_devices(plan, rows, axes)


def _summed_over_devices(
    plan: LayerPlan, rows: list[tuple[jax.Array, ...] | None], axes: Sequence[MeshAxes]
) -> list[tuple[jax.Array, ...] | None]:
    """The devices' partial row sums added up."""
    # Arrays that keep different splits along their output units may not share a psum: it would
    # make shard_map take the rows of both for different on every device.
    alike: dict[tuple[tuple[str, ...], tuple[str, ...]], list[int]] = {}
    for index, (entry, sums) in enumerate(zip(plan.arrays, rows, strict=True)):
        if entry is None or sums is None:
            continue
        units = _unit_axes(entry, axes[index])
        reduced = tuple(sorted(set(axes[index]) - set(units)))
        if reduced:
            alike.setdefault((reduced, units), []).append(index)
    added = list(rows)
    for (reduced, _), indices in alike.items():
        partial, treedef = jax.tree.flatten([rows[i] for i in indices])
        vector = jax.lax.psum(jnp.concatenate([x.ravel() for x in partial]), reduced)
        ends = np.cumsum([x.size for x in partial])
        pieces = zip(partial, jnp.split(vector, ends[:-1]), strict=True)
        whole = [piece.reshape(x.shape).astype(x.dtype) for x, piece in pieces]
        for i, sums in zip(indices, jax.tree.unflatten(treedef, whole), strict=True):
            added[i] = sums
    return added


def _unit_axes(entry: ArrayLayers, axes: MeshAxes) -> tuple[str, ...]:
    """The mesh axes that split an array's output units."""
    return tuple(sorted(name for name, axis in axes.items() if axis in entry.output_axes))


def unit_axes_only(plan: LayerPlan, axes: Sequence[MeshAxes] | None) -> list[MeshAxes] | None:
    """The mesh axes over which a layer's rows are spread; what splits a row is summed already."""
    if axes is None:
        return None
    return [
        {} if entry is None else {name: mesh[name] for name in _unit_axes(entry, mesh)}
        for entry, mesh in zip(plan.arrays, axes, strict=True)
    ]


def layer_extremes(
    plan: LayerPlan,
    rows: Sequence[jax.Array | None],
    axes: Sequence[MeshAxes] | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The smallest and the largest of each layer's rows.

    Args:
      plan: the layers.
      rows: per leaf one number a row, as :func:`row_sums` shapes them, or None.
      axes: as for :func:`row_sums`.

    Returns:
      Two vectors of shape (``plan.vector_size``,) and dtype ``plan.dtype``: zero for a layer
      without rows; the largest is infinite or NaN where one of the rows is.
    """
    blocks: dict[int, jax.Array] = {}
    split: set[str] = set()
    for index, (entry, row) in enumerate(zip(plan.arrays, rows, strict=True)):
        if entry is None or row is None:
            continue
        over = tuple(a for a in range(row.ndim) if a not in entry.stacked_axes)
        # Whether a maximum over devices passes NaN on is up to the device; infinity it does.
        highest = jnp.where(jnp.isnan(row), jnp.inf, row)
        both = jnp.stack([jnp.max(-row, axis=over), jnp.max(highest, axis=over)])
        block = replicated(both).reshape(2, entry.count).astype(plan.dtype)
        start = entry.start
        blocks[start] = jnp.maximum(blocks[start], block) if start in blocks else block
        if axes is not None:
            split.update(_unit_axes(entry, axes[index]))
    table = _joined(plan, blocks, 2)
    if split:
        table = jax.lax.pmax(table, tuple(sorted(split)))
    return -table[0], table[1]


def _sums_of_array(
    entry: ArrayLayers, terms: tuple[jax.Array, ...], *, one_operand: bool
) -> jax.Array:
    """The sums of one array's terms, shape (len(terms), its number of layers)."""
    over = tuple(a for a in range(terms[0].ndim) if a not in entry.stacked_axes)
    sums = jnp.stack(_sums(terms, over, one_operand=one_operand))
    return replicated(sums).reshape(len(terms), entry.count)


def _too_many_to_merge(products: Sequence[tuple[jax.Array, ...] | None]) -> bool:
    """Whether sums over several devices would need more than one all-reduce, taken one by one."""
    operands = sum(len(terms or ()) for terms in products)
    return operands > MERGED_OPERANDS and jax.device_count() > 1


def _sums(
    terms: tuple[jax.Array, ...],
    over: tuple[int, ...],
    *,
    one_operand: bool,
    keepdims: bool = False,
) -> list[jax.Array]:
    """The terms' sums, which under sharding are one operand of an all-reduce, or one each."""
    if not one_operand:
        return [jnp.sum(term, axis=over, keepdims=keepdims) for term in terms]
    return list(jnp.sum(jnp.stack(terms), tuple(axis + 1 for axis in over), keepdims=keepdims))


def replicated(array: jax.Array) -> jax.Array:
    """The same numbers on every device, where an explicit-sharding mesh splits the array.

    Such a mesh refuses to join arrays that are split differently.
    """
    sharding = jax.typeof(array).sharding
    if all(part is None for part in sharding.spec):
        return array
    everywhere = jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec())
    result: jax.Array = jax.sharding.reshard(array, everywhere)
    return result


def _counted_once(block: jax.Array, axes: MeshAxes, all_axes: tuple[str, ...]) -> jax.Array:
    """Zeroes a replica's contribution on all devices but one along the axes it is replicated over.

    So that a single psum over all axes counts a replicated bias once.
    """
    for name in all_axes:
        if name not in axes:
            block = jnp.where(jax.lax.axis_index(name) == 0, block, jnp.zeros_like(block))
    return block


def _joined(plan: LayerPlan, blocks: dict[int, jax.Array], count: int) -> jax.Array:
    """All blocks in layer order, shape (count, plan.vector_size)."""
    sizes = {entry.start: entry.count for entry in plan.arrays if entry is not None}
    columns = [
        blocks.get(start, jnp.zeros((count, sizes[start]), plan.dtype)) for start in sorted(sizes)
    ]
    if not columns:
        return jnp.zeros((count, plan.vector_size), plan.dtype)
    return jnp.concatenate(columns, axis=1)


def norm_of(square: jax.Array) -> jax.Array:
    """The square root of a sum of squares; 0 where rounding made it negative.

    Its derivative is 0 at 0, where that of a bare ``sqrt`` is infinite and would turn gradients
    taken *through* an update (meta-learning) into NaN.
    """
    gone = square <= 0
    return jnp.where(gone, 0, jnp.sqrt(jnp.where(gone, 1, square)))


def per_layer(name: str, value: Any, plan: LayerPlan) -> jax.Array:
    """An argument that is a scalar or holds one number per layer, as a per-layer vector.

    Raises:
      ValueError: another shape.
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
    shape = [1] * ndim
    for axis, size in zip(entry.stacked_axes, entry.stacked_shape, strict=True):
        shape[axis] = size
    return values.reshape(shape)


def spread_over(
    plan: LayerPlan, vector: jax.Array, arrays: Sequence[jax.Array | None]
) -> list[jax.Array | None]:
    """Per leaf its entries of a per-layer vector, as :func:`spread` and in the array's dtype."""
    return [
        None
        if entry is None or array is None
        else spread(entry, vector, array.ndim).astype(array.dtype)
        for entry, array in zip(plan.arrays, arrays, strict=True)
    ]


def predicate_like(condition: jax.Array, array: jax.Array) -> jax.Array:
    """A condition that broadcasts against ``array``, in its shape and sharding, to select by.

    An explicit-sharding mesh wants a predicate sharded as what it selects from; one that is spread
    from a per-layer vector is replicated if the array's only axes are stacked ones.
    """
    return condition | jnp.zeros_like(array, bool)
