"""Sums over the rows of each layer, under any sharding, and each layer's smallest and largest row.

A row is the weights of one output unit. A mesh axis that splits rows needs sums between devices.
Along a mesh axis that splits output units, each device has whole rows of its own.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optax_spd.core import sums
from optax_spd.layers.plans import LayerPlan
from optax_spd.sharding.manual_axes import MeshAxes

PyTree = Any


class RowSums(NamedTuple):
    """Result of :func:`row_sums`.

    Attributes:
      own: per leaf the sums of the rows in this device's part of the array, shaped to broadcast
        against it: the stacked and the output axes keep their sizes, the others have size 1. None
        where there are no products.
      known: per leaf the sums of all rows known to this device. If other devices' rows are among
        them, they lie along an additional last axis.
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
    """Sums elementwise products over each row, the weights of one output unit.

    Args:
      plan: the layers.
      products: as for :func:`optax_spd.core.sums.layer_sums`.
      axes: likewise; they must say which array axis each mesh axis splits.
      of_rows: an elementwise function of the row sums, whose result is summed over each layer.

    Returns:
      See :class:`RowSums`. All sums between devices take a single ``psum``.
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
        rows[index] = tuple(sums.sums_over(terms, axes=within, stack=stack, keepdims=True))
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

    # The single psum runs over all these mesh axes, even those that split an array's output units.
    # So that it does not add up different rows, each device puts its rows in a slot of their own.
    # The cost is small: one number for each row and slot.
    slots = {
        i: tuple(sums.counted_once(_in_slot(x, units[i]), split[i], over) for x in rows[i])
        for i in partial
    }
    whole_totals = None
    if of_rows and whole:
        whole_totals = totals(
            {i: sums.counted_once(of_rows(*rows[i]), split[i], over) for i in whole}
        )
    slots, whole_totals = sums.summed_between_devices((slots, whole_totals), over)

    known = rows | slots
    own = rows | {i: tuple(_from_slot(x, units[i]) for x in slots[i]) for i in partial}
    everywhere = [i for i in rows if i in slots or not units[i]]
    known_totals = totals({i: of_rows(*known[i]) for i in everywhere} if of_rows else {})
    return RowSums(
        own=[own.get(i) for i in range(len(products))],
        known=[known.get(i) for i in range(len(products))],
        differing=tuple(sorted({name for i in whole for name in units[i]})),
        totals=known_totals if whole_totals is None else whole_totals + known_totals,
    )


def row_axes(plan: LayerPlan, axes: Sequence[MeshAxes] | None) -> list[MeshAxes] | None:
    """Per leaf the hand-split mesh axes along which devices hold different rows."""
    if axes is None:
        return None
    return [
        {n: a for n, a in split.items() if entry is not None and a in entry.output_axes}
        for entry, split in zip(plan.arrays, axes, strict=True)
    ]


def _in_slot(rows: jax.Array, units: tuple[str, ...]) -> jax.Array:
    """Puts a device's rows in its slot of a new last axis; the other slots are zero."""
    slots = jnp.arange(jax.lax.axis_size(units))
    # A select, since 0 times NaN would put NaN into the other devices' slots.
    return jnp.where(slots == jax.lax.axis_index(units), rows[..., None], 0)


def _from_slot(rows: jax.Array, units: tuple[str, ...]) -> jax.Array:
    """A device's own rows; ``shard_map`` then sees that they vary between devices."""
    slot = jax.lax.axis_index(units)
    own: jax.Array = jax.lax.dynamic_index_in_dim(rows, slot, -1, keepdims=False)
    return own


def layer_extremes(
    plan: LayerPlan,
    rows: Sequence[jax.Array | None],
    differing: tuple[str, ...] = (),
) -> tuple[jax.Array, jax.Array]:
    """The smallest and the largest of each layer's rows.

    Args:
      plan: the layers.
      rows: per leaf one number for each row known to this device, or None.
      differing: the mesh axes along which devices know different rows.

    Returns:
      Two vectors of shape (``plan.vector_size``,) and dtype ``plan.dtype``: zero for a layer
      without rows. The largest is not finite if one of the rows is not.
    """
    blocks: dict[int, jax.Array] = {}
    for entry, row in zip(plan.arrays, rows, strict=True):
        if entry is None or row is None:
            continue
        over = tuple(a for a in range(row.ndim) if a not in entry.stacked_axes)
        block = _extremes(row, over=over).astype(plan.dtype)
        start = entry.start
        blocks[start] = jnp.maximum(blocks[start], block) if start in blocks else block
    table = jnp.stack(sums.joined(plan, blocks, 2))
    if differing:
        table = jax.lax.pmax(table, differing)
    return -table[0], table[1]


@functools.partial(jax.jit, static_argnames="over")  # so that arrays of one shape share a trace
def _extremes(row: jax.Array, *, over: tuple[int, ...]) -> jax.Array:
    """Per layer of one array -min and max of its rows; shape (2, layers)."""
    # Some devices lose NaN in a maximum over devices, but none loses infinity.
    highest = jnp.where(jnp.isnan(row), jnp.inf, row)
    both = jnp.stack([jnp.max(-row, axis=over), jnp.max(highest, axis=over)])
    return sums.replicated(both).reshape(2, -1)
