"""Sums over the rows of each layer, under any sharding, and the extremes of a layer's rows.

A row is everything that shares an output unit. A device may hold parts of rows, or whole rows that
other devices do not hold, so a mesh axis is treated by what it splits: inside of rows sums are
added up between devices; along output units each device's rows stand for themselves.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optax_spd.core import sums
from optax_spd.layers.plans import LayerPlan
from optax_spd.sharding.manual_axes import MeshAxes

PyTree = Any


class RowSums(NamedTuple):
    """What :func:`row_sums` gives.

    Attributes:
      own: per leaf the sums of the rows in this device's part of the array, shaped to broadcast
        against it: the stacked and the output axes keep their sizes, the others have size 1. None
        where there are no products.
      known: per leaf the sums of all rows that this device knows. With one more axis, at the end,
        they include the rows of other devices.
      differing: the mesh axes along which devices know different rows of an array.
      totals: per layer the sum of ``of_rows`` over all its rows; zeros without ``of_rows``.
    """

    own: list[tuple[jax.Array, ...] | None]
    known: list[tuple[jax.Array, ...] | None]
    differing: tuple[str, ...]
    totals: jax.Array


def row_sums(
    plan: LayerPlan,
    products: sums.Products,
    axes: Sequence[MeshAxes] | None = None,
    of_rows: Callable[..., jax.Array] | None = None,
) -> RowSums:
    """Sums elementwise products over each row: everything that shares an output unit.

    Args:
      plan: the layers.
      products: as for :func:`optax_spd.core.sums.layer_sums`.
      axes: likewise; they must say which array axis each mesh axis splits.
      of_rows: an elementwise function of the rows' sums, to be added up over each layer's rows.

    Returns:
      See :class:`RowSums`. Sums over several devices take one ``psum`` in all.
    """
    split: Sequence[MeshAxes] = [{}] * len(products) if axes is None else axes
    stack = sums.needs_stacking(products)
    rows: dict[int, tuple[jax.Array, ...]] = {}
    units: dict[int, tuple[str, ...]] = {}
    for index, (entry, terms) in enumerate(zip(plan.arrays, products, strict=True)):
        if entry is None or terms is None:
            continue
        kept = entry.stacked_axes + entry.output_axes
        within = tuple(a for a in range(terms[0].ndim) if a not in kept)
        rows[index] = tuple(sums.sums_over(terms, within, stack=stack, keepdims=True))
        units[index] = tuple(sorted(n for n, a in split[index].items() if a in entry.output_axes))

    # Some arrays have rows split across devices and need a psum per row. Others hold whole but
    # different rows per device; only the per-layer total needs a psum.
    partial = [i for i in rows if len(units[i]) < len(split[i])]
    whole = [i for i in rows if units[i] and len(units[i]) == len(split[i])]
    over = tuple(sorted({n for i in partial + (whole if of_rows else []) for n in split[i]}))

    def totals(terms: Mapping[int, jax.Array]) -> jax.Array:
        listed = [(terms[i],) if i in terms else None for i in range(len(products))]
        (vector,) = sums.layer_sums(plan, listed, 1)
        return vector

    # One psum sums everything over the same mesh axes, and so over those that split an array's
    # output units too. Each device therefore places its rows beside those of the others. That
    # moves few numbers: a row stands for as many weights as an output has inputs.
    placed = {
        i: tuple(sums.counted_once(_in_place(x, units[i]), split[i], over) for x in rows[i])
        for i in partial
    }
    early = None
    if of_rows and whole:
        early = totals({i: sums.counted_once(of_rows(*rows[i]), split[i], over) for i in whole})
    placed, early = sums.summed_between_devices((placed, early), over)

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


def row_axes(plan: LayerPlan, axes: Sequence[MeshAxes] | None) -> list[MeshAxes] | None:
    """Of the hand-split mesh axes per leaf those along which devices hold different rows."""
    if axes is None:
        return None
    return [
        {n: a for n, a in split.items() if entry is not None and a in entry.output_axes}
        for entry, split in zip(plan.arrays, axes, strict=True)
    ]


def _in_place(rows: jax.Array, units: tuple[str, ...]) -> jax.Array:
    """A device's rows along a new last axis, with zeros in place of the other devices' rows."""
    places = jnp.arange(jax.lax.axis_size(units))
    # A select: 0 times a NaN is NaN, and would reach the other devices' rows.
    return jnp.where(places == jax.lax.axis_index(units), rows[..., None], 0)


def _from_place(rows: jax.Array, units: tuple[str, ...]) -> jax.Array:
    """A device's own rows, which ``shard_map`` knows to differ between devices."""
    place = jax.lax.axis_index(units)
    own: jax.Array = jax.lax.dynamic_index_in_dim(rows, place, -1, keepdims=False)
    return own


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
        # Whether a maximum over devices passes NaN on depends on the device; infinity it does.
        highest = jnp.where(jnp.isnan(row), jnp.inf, row)
        both = jnp.stack([jnp.max(-row, axis=over), jnp.max(highest, axis=over)])
        block = sums.replicated(both).reshape(2, entry.count).astype(plan.dtype)
        start = entry.start
        blocks[start] = jnp.maximum(blocks[start], block) if start in blocks else block
    table = sums.joined(plan, blocks, 2)
    if differing:
        table = jax.lax.pmax(table, differing)
    return -table[0], table[1]
