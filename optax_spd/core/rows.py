"""Sums over the rows of each layer, under any sharding, and each layer's smallest and largest row.

A row is the weights of one output unit. A mesh axis that splits rows needs sums between devices.
Along a mesh axis that splits output units, each device has whole rows of its own.
"""

import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from optax_spd.core import sums
from optax_spd.layers.plans import LayerPlan
from optax_spd.sharding.manual_axes import MeshAxes


class RowSums(NamedTuple):
    """Result of :func:`row_sums`.

    Attributes:
      local: per leaf the sums of the rows in this device's part of the array, shaped to broadcast
        against it: the stacked and the output axes keep their sizes, the others have size 1. None
        where there are no products.
      gathered: per leaf the sums of all rows known to this device. If other devices' rows are among
        them, they lie along an additional last axis.
      varying: the mesh axes along which ``gathered`` differs between devices.
      totals: per layer the sums over all its rows of what ``of_rows`` returns.
    """

    local: list[tuple[jax.Array, ...] | None]
    gathered: list[tuple[jax.Array, ...] | None]
    varying: tuple[str, ...]
    totals: tuple[jax.Array, ...]


def row_sums(
    plan: LayerPlan,
    products: sums.Products,
    axes: Sequence[MeshAxes] | None = None,
    of_rows: Callable[..., tuple[jax.Array, ...]] | None = None,
    count: int = 1,
) -> RowSums:
    """Sums elementwise products over each row, the weights of one output unit.

    Args:
      plan: the layers.
      products: as for :func:`optax_spd.core.sums.layer_sums`.
      axes: likewise; they must say which array axis each mesh axis splits.
      of_rows: an elementwise function of the row sums, whose results are summed over each layer.
      count: how many results it has.

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

    def totals(terms: Mapping[int, tuple[jax.Array, ...]]) -> tuple[jax.Array, ...]:
        listed = [terms.get(i) for i in range(len(products))]
        return sums.layer_sums(plan, listed, count if of_rows else 0)

    # The single psum runs over all these mesh axes, even those that split an array's output units.
    # So that it does not add up different rows, each device puts its rows in a slot of their own.
    # The cost is small: one number for each row and slot.
    slots = {
        i: tuple(sums.from_one_device(_in_slot(x, units[i]), split[i], over) for x in rows[i])
        for i in partial
    }
    whole_totals: tuple[jax.Array, ...] = ()
    if of_rows and whole:
        whole_totals = totals(
            {
                i: tuple(sums.from_one_device(x, split[i], over) for x in of_rows(*rows[i]))
                for i in whole
            }
        )
    slots, whole_totals = sums.summed_between_devices((slots, whole_totals), over)

    gathered = rows | slots
    local = rows | {i: tuple(_from_slot(x, units[i]) for x in slots[i]) for i in partial}
    everywhere = [i for i in rows if i in slots or not units[i]]
    all_totals = totals({i: of_rows(*gathered[i]) for i in everywhere} if of_rows else {})
    if whole_totals:
        all_totals = tuple(map(operator.add, whole_totals, all_totals))
    return RowSums(
        local=[local.get(i) for i in range(len(products))],
        gathered=[gathered.get(i) for i in range(len(products))],
        varying=tuple(sorted({name for i in whole for name in units[i]})),
        totals=all_totals,
    )


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
    varying: tuple[str, ...] = (),
) -> tuple[jax.Array, jax.Array]:
    """The smallest and the largest of each layer's rows.

    Args:
      plan: the layers.
      rows: per leaf one number for each row known to this device, or None.
      varying: the mesh axes along which ``rows`` differ between devices.

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
    table = jnp.stack(sums.to_vectors(plan, blocks, 2))
    if varying:
        table = jax.lax.pmax(table, varying)
    return -table[0], table[1]


@functools.partial(jax.jit, static_argnames="over")  # so that arrays of one shape share a trace
def _extremes(row: jax.Array, *, over: tuple[int, ...]) -> jax.Array:
    """Per layer of one array -min and max of its rows; shape (2, layers)."""
    # Some devices lose NaN in a maximum over devices, but none loses infinity.
    highest = jnp.where(jnp.isnan(row), jnp.inf, row)
    both = jnp.stack([jnp.max(-row, axis=over), jnp.max(highest, axis=over)])
    return sums.replicated(both).reshape(2, -1)
