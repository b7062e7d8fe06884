"""Sums over each layer or each of its rows, for all layers at once and under any sharding.

The methods compare inner products and norms of whole layers, or of a layer's rows: its output
units. Here elementwise products are summed array by array - with sums over axes, never ``vdot`` or
a flattening reshape, which an explicit-sharding mesh refuses - and what there is one of per layer
is gathered into one vector.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

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


class RowSums(NamedTuple):
    """What :func:`row_sums` gives.

    Attributes:
      own: per leaf the sums of the rows that this device's part of the array is of, shaped to
        broadcast against it: the stacked and the output axes keep their sizes, the others have
        size 1. None where there are no products.
      known: per leaf the sums of all rows that this device knows; where they have one more axis, at
        the end, the rows of the other devices are among them.
      differing: the mesh axes along which devices know different rows of an array.
      totals: per layer the sum of ``of_rows`` over all its rows; zeros without ``of_rows``.
    """

    own: list[tuple[jax.Array, ...] | None]
    known: list[tuple[jax.Array, ...] | None]
    differing: tuple[str, ...]
    totals: jax.Array


def row_sums(
    plan: LayerPlan,
    products: Sequence[tuple[jax.Array, ...] | None],
    axes: Sequence[MeshAxes] | None = None,
    of_rows: Callable[..., jax.Array] | None = None,
) -> RowSums:
    """Sums elementwise products over each row: everything that shares an output unit.

    Args:
      plan: the layers.
      products: as for :func:`layer_sums`.
      axes: as for :func:`layer_sums`; they must say which array axis each mesh axis splits.
      of_rows: an elementwise function of the rows' sums, to be added up over each layer's rows.

    Returns:
      See :class:`RowSums`. Sums over several devices take one ``psum`` in all.
    """
    split: Sequence[MeshAxes] = [{}] * len(products) if axes is None else axes
    one_operand = _too_many_to_merge(products)
    rows: dict[int, tuple[jax.Array, ...]] = {}
    units: dict[int, tuple[str, ...]] = {}
    for index, (entry, terms) in enumerate(zip(plan.arrays, products, strict=True)):
        if entry is None or terms is None:
            continue
        kept = entry.stacked_axes + entry.output_axes
        within = tuple(a for a in range(terms[0].ndim) if a not in kept)
        rows[index] = tuple(_sums(terms, within, one_operand=one_operand, keepdims=True))
        units[index] = tuple(sorted(n for n, a in split[index].items() if a in entry.output_axes))

    # Of some arrays a device has parts of rows. Of others it has whole rows, and others than its
    # neighbours: no row needs them, but a sum over the layer's rows does.
    partial = [i for i in rows if len(units[i]) < len(split[i])]
    whole = [i for i in rows if units[i] and len(units[i]) == len(split[i])]
    over = tuple(sorted({n for i in partial + (whole if of_rows else []) for n in split[i]}))

    def totals(terms: Mapping[int, jax.Array]) -> jax.Array:
        listed = [(terms[i],) if i in terms else None for i in range(len(products))]
        (vector,) = layer_sums(plan, listed, 1)
        return vector

    # What shares a psum is summed over the same mesh axes, and so over those that split an array's
    # units too: each device puts its rows beside those of the others, and then knows all of them.
    # It moves few numbers all the same: a row stands for as many weights as an output has inputs.
    placed = {
        i: tuple(_counted_once(_in_place(x, units[i]), split[i], over) for x in rows[i])
        for i in partial
    }
    early = None
    if of_rows and whole:
        early = totals({i: _counted_once(of_rows(*rows[i]), split[i], over) for i in whole})
    placed, early = _added_up((placed, early), over)

    known = rows | placed
    own = rows | {i: tuple(_from_place(x, units[i]) for x in placed[i]) for i in partial}
    everywhere = [i for i in rows if i in placed or not units[i]]
    late = totals({i: of_rows(*known[i]) for i in everywhere} if of_rows else {})
    return RowSums(
        own=[own.get(i) for i in range(len(products))],
        known=[known.get(i) for i in range(len(products))],
        differing=tuple(sorted({name for i in whole for name in units[i]})),
        totals=late if early is None else early + late,
    )


def _in_place(rows: jax.Array, units: tuple[str, ...]) -> jax.Array:
    """A device's rows, and zeros for those of the other devices, along an axis at the end."""
    places = jnp.arange(jax.lax.axis_size(units))
    # A select: 0 times a NaN is NaN, and would reach the other devices' rows.
    return jnp.where(places == jax.lax.axis_index(units), rows[..., None], 0)


def _from_place(rows: jax.Array, units: tuple[str, ...]) -> jax.Array:
    """A device's own rows, and for ``shard_map`` others than those of its neighbours."""
    place = jax.lax.axis_index(units)
    own: jax.Array = jax.lax.dynamic_index_in_dim(rows, place, -1, keepdims=False)
    return own


def _added_up(tree: PyTree, over: tuple[str, ...]) -> PyTree:
    """The devices' arrays added up, by one psum of one vector."""
    vector, separate = ravel_pytree(tree)
    return separate(jax.lax.psum(vector, over)) if vector.size else tree


def layer_extremes(
    plan: LayerPlan,
    rows: Sequence[jax.Array | None],
    differing: tuple[str, ...] = (),
) -> tuple[jax.Array, jax.Array]:
    """The smallest and the largest of each layer's rows.

    Args:
      plan: the layers.
      rows: per leaf one number for each row that this device knows, or None.
      differing: the mesh axes along which devices know different rows.

    Returns:
      Two vectors of shape (``plan.vector_size``,) and dtype ``plan.dtype``: zero for a layer
      without rows; the largest is infinite or NaN where one of the rows is.
    """
    blocks: dict[int, jax.Array] = {}
    for entry, row in zip(plan.arrays, rows, strict=True):
        if entry is None or row is None:
            continue
        over = tuple(a for a in range(row.ndim) if a not in entry.stacked_axes)
        # Whether a maximum over devices passes NaN on is up to the device; infinity it does.
        highest = jnp.where(jnp.isnan(row), jnp.inf, row)
        both = jnp.stack([jnp.max(-row, axis=over), jnp.max(highest, axis=over)])
        block = replicated(both).reshape(2, entry.count).astype(plan.dtype)
        start = entry.start
        blocks[start] = jnp.maximum(blocks[start], block) if start in blocks else block
    table = _joined(plan, blocks, 2)
    if differing:
        table = jax.lax.pmax(table, differing)
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
