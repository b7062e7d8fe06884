"""Decisions for each layer, or each row, from sums over them."""

import functools
import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optax_spd.core import rows, stage
from optax_spd.core.sums import Products, block_sums, spread_block, to_vectors


class Decision(NamedTuple):
    """The result of ``decide``, for a vector of layers or of rows.

    Attributes:
      record: vectors that the state keeps until the next update, by name.
      coefficients: vectors for ``act``, which gets them shaped to broadcast against the array.
      changes: where ``act`` gives the new update; elsewhere u passes through. Bool.
      memory: the memory for the next update, by name; None if there is none.
    """

    record: Mapping[str, jax.Array]
    coefficients: tuple[jax.Array, ...]
    changes: jax.Array
    memory: Mapping[str, jax.Array] | None = None


class Decisions(NamedTuple):
    """All decisions of one update.

    Attributes:
      leaves: per active leaf where it changes, and the coefficients; they broadcast against the
        array.
      record, memory: for the new state.
    """

    leaves: dict[int, tuple[jax.Array, tuple[jax.Array, ...]]]
    record: Mapping[str, jax.Array]
    memory: Mapping[str, jax.Array]


def decide_layers(
    view: stage.StageView,
    products: Products,
    count: int,
    memory: Mapping[str, jax.Array],
    decide: Callable[..., Decision],
    decide_block: Callable[..., tuple[jax.Array, tuple[jax.Array, ...]]],
    values: Mapping[str, jax.Array],
) -> Decisions:
    """One decision per layer.

    The state records the decision made from the joined vectors. Each array uses a decision made
    from its own sums, so that it waits for no other layer, and arrays of one shape can share a
    kernel. (XLA compiles a separate kernel for each entry that is read from a vector.)

    Args:
      view: of the first pass.
      products: per active leaf what is summed over layers.
      count: how many products there are.
      memory: the state's, by name.
      decide: from sums, memory and hyperparameters to a decision.
      decide_block: :func:`of_block` of it, jitted.
      values: the hyperparameters, by name.
    """
    plan = view.plan
    blocks = block_sums(plan, products, view.axes)
    vectors = to_vectors(plan, blocks, count)
    finite = _all_finite(vectors)
    decision = decide(*(jnp.where(finite, x, 0) for x in vectors), *memory.values(), **values)
    new = decision.memory or {}
    kept = {
        key: _remembered(old, new[key], finite & view.has_update) for key, old in memory.items()
    }
    decided = {}
    for start, block in blocks.items():
        shape = block[0].shape
        remembered = [m[start : start + math.prod(shape)].reshape(shape) for m in memory.values()]
        decided[start] = decide_block(block, remembered, values)
    leaves = {}
    for i, (entry, d) in enumerate(zip(plan.arrays, view.deviations, strict=True)):
        if entry is not None and d is not None:
            changes, coefficients = decided[entry.start]
            leaves[i] = (
                spread_block(entry, changes, d.step.ndim),
                tuple(spread_block(entry, c, d.step.ndim) for c in coefficients),
            )
    return Decisions(leaves, decision.record, kept)


def of_block(
    decide: Callable[..., Decision],
    block: tuple[jax.Array, ...],
    remembered: Sequence[jax.Array],
    values: Mapping[str, jax.Array],
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """Where the layers of one array or group change, and their coefficients."""
    shape = block[0].shape
    decision = decide(*block, *remembered, **values)
    changes = jnp.broadcast_to(decision.changes & _all_finite(block), shape)
    return changes, tuple(jnp.broadcast_to(c, shape) for c in decision.coefficients)


def decide_all_rows(
    view: stage.StageView,
    products: Products,
    records: Sequence[str],
    decide_rows: Callable[..., Decision],
    values: Mapping[str, jax.Array],
) -> Decisions:
    """One decision per row; the state records the mean over each layer's rows.

    Args:
      view: of the first pass.
      products: per active leaf what is summed over rows.
      records: the names of the records.
      decide_rows: :func:`of_rows` of the method's decision, jitted.
      values: the hyperparameters, by name.
    """

    def decided(sums: tuple[jax.Array, ...]) -> Decision:
        return decide_rows(sums, values, dtype=view.plan.dtype)

    def recorded(*sums: jax.Array) -> tuple[jax.Array, ...]:
        decision = decided(sums)
        terms = (*(decision.record[key] for key in records), jnp.ones_like(decision.changes))
        return tuple(term.astype(view.plan.dtype) for term in terms)

    measured = rows.row_sums(view.plan, products, view.axes, recorded, len(records) + 1)
    *totals, number = measured.totals
    means = [total / jnp.maximum(number, 1) for total in totals]
    leaves = {}
    for i, sums in enumerate(measured.local):
        if sums is not None:
            decision = decided(sums)
            leaves[i] = decision.changes, decision.coefficients
    return Decisions(leaves, dict(zip(records, means, strict=True)), {})


def of_rows(
    decide: Callable[..., Decision],
    sums: tuple[jax.Array, ...],
    values: Mapping[str, jax.Array],
    *,
    dtype: np.dtype,
) -> Decision:
    """The decisions for the rows of one array; no change where a sum is not finite."""
    finite = _all_finite(sums)
    decision = decide(*(jnp.where(finite, x, 0).astype(dtype) for x in sums), **values)
    return decision._replace(changes=decision.changes & finite)


def _all_finite(vectors: Iterable[jax.Array]) -> jax.Array:
    return functools.reduce(operator.and_, map(jnp.isfinite, vectors))


def _remembered(old: jax.Array, new: jax.Array, usable: jax.Array) -> jax.Array:
    return jnp.where(usable & jnp.isfinite(new), new, old).astype(old.dtype)
