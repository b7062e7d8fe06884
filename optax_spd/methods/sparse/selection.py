"""Chooses the k entries of each layer with the largest scores, and reads and writes them.

Everything here is sums over axes, gathers and scatters with one index an axis. XLA partitions these
along any sharding: each device looks at its own part, and only counts, the bits of the choice and
the k chosen numbers travel. A sort, ``top_k`` or a flattening reshape would gather the array.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from optax_spd.layers import trees
from optax_spd.layers.plans import ArrayLayers
from optax_spd.sharding import placement

WORD = 32  # bits of the words that the choice is sent in
LARGEST_LAYER = 2**31 - 1  # positions and the mark for an unused place are int32


def entries_per_layer(path: trees.Path, array: Any, entry: ArrayLayers, fraction: float) -> int:
    """K = min(int(fraction n) + 1, n), for a layer of n entries.

    Raises:
      ValueError: positions in the layer do not fit into int32, or the size is symbolic.
    """
    shape = jnp.shape(array)
    if not all(isinstance(n, int) for n in shape):
        raise ValueError(
            f"with_sparse needs the shape of {trees.shown(path)}, got {shape}: how many entries "
            "are chosen follows from it. Export with concrete shapes."
        )
    size = layer_size(shape, entry.stacked_axes)
    # The second bound is that of int32 for the number of words.
    if size > LARGEST_LAYER or math.prod(shape) > WORD * LARGEST_LAYER:
        raise ValueError(
            f"The parameter {trees.shown(path)} of shape {shape} has {size:,} entries in a layer, "
            f"but indices are int32 and reach {LARGEST_LAYER:,}. If the array stacks layers, "
            "declare it with layers=optax_spd.stacked(...); else leave it out with mask=."
        )
    return min(int(fraction * size) + 1, size)


def layer_size(shape: tuple[int, ...], stacked_axes: tuple[int, ...]) -> int:
    """The number of entries of each layer of an array."""
    return math.prod(shape[axis] for axis in _within(shape, stacked_axes))


def _within(shape: tuple[int, ...], stacked_axes: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(axis for axis in range(len(shape)) if axis not in stacked_axes)


# Jitted, so that arrays of one shape share a trace.
@functools.partial(jax.jit, static_argnames=("count", "stacked_axes"))
def largest_entries(score: jax.Array, *, count: int, stacked_axes: tuple[int, ...]) -> jax.Array:
    """The flat positions of each layer's entries with the largest scores, in ascending order.

    Of equal scores those at the lowest positions are chosen. A NaN is never chosen.

    Args:
      score: floating, like the array.
      count: k, how many to choose in each layer.
      stacked_axes: the axes that count layers.

    Returns:
      int32, shape (sizes of the stacked axes, k): positions in C order in the layer without its
      stacked axes. If fewer than k scores are numbers, the rest holds the layer's size.
    """
    if len(stacked_axes) == score.ndim:  # layers of rank 0
        score = jnp.expand_dims(score, -1)
    choose = functools.partial(_positions, count=count, stacked_axes=stacked_axes)
    return _partitioned(choose, score)(score)


def _positions(score: jax.Array, *, count: int, stacked_axes: tuple[int, ...]) -> jax.Array:
    within, size = _within(score.shape, stacked_axes), layer_size(score.shape, stacked_axes)
    total = lambda mask: jnp.sum(mask, axis=within, dtype=jnp.int32)
    spread = lambda values: jnp.expand_dims(values, within)

    key = _ordered_bits(score)
    usable = key > 0
    # The largest threshold that k entries reach, and of the entries at it the first few.
    threshold = _largest(lambda value: total(key >= spread(value)), count, total(usable), key.dtype)
    above, level = key > spread(threshold), usable & (key == spread(threshold))
    flat = _flat_index(score.shape, within)
    from_end = (size - 1 - flat).astype(jnp.uint32)
    last = _largest(
        lambda value: total(level & (from_end >= spread(value))),
        count - total(above),
        total(usable),
        from_end.dtype,
    )
    chosen = above | (level & (from_end >= spread(last)))
    return _compacted(chosen, flat, count, stacked_axes)


def _ordered_bits(score: jax.Array) -> jax.Array:
    """Unsigned integers in the order of the scores; 0 for NaN alone."""
    score = jnp.where(score == 0, jnp.zeros_like(score), score)  # -0 is 0
    dtype = jnp.dtype(f"uint{jnp.finfo(score.dtype).bits}")
    bits = jax.lax.bitcast_convert_type(score, dtype)
    sign = jnp.asarray(1 << (jnp.iinfo(dtype).bits - 1), dtype)
    ordered = jnp.where((bits & sign) == 0, bits | sign, ~bits)
    return jnp.where(jnp.isnan(score), jnp.zeros_like(ordered), ordered)


def _largest(
    reaching: Callable[[jax.Array], jax.Array], count: Any, like: jax.Array, dtype: Any
) -> jax.Array:
    """Per layer the largest number that at least ``count`` entries reach; 0 if there is none.

    Args:
      reaching: from one number per layer to how many of its entries reach it.
      count: a number, or one per layer.
      like: one integer per layer.
      dtype: an unsigned integer's, of the result.
    """
    bits = jnp.iinfo(dtype).bits

    def bisect(step: jax.Array, found: jax.Array) -> jax.Array:
        bit = jnp.asarray(bits - 1 - step, dtype)
        tried = found | jnp.left_shift(jnp.ones_like(found), bit)
        return jnp.where(reaching(tried) >= count, tried, found)

    return jax.lax.fori_loop(0, bits, bisect, (like * 0).astype(dtype))


def _flat_index(shape: tuple[int, ...], axes: tuple[int, ...]) -> jax.Array:
    """Each entry's position in C order among the given axes, int32."""
    flat, stride = jnp.zeros(shape, jnp.int32), 1
    for axis in reversed(axes):
        flat += stride * jax.lax.broadcasted_iota(jnp.int32, shape, axis)
        stride *= shape[axis]
    return flat


def _compacted(
    chosen: jax.Array, flat: jax.Array, count: int, stacked_axes: tuple[int, ...]
) -> jax.Array:
    """The flat positions of the chosen entries, ``count`` in each layer.

    The bits of the choice are packed into words, which is 1/32 of a float32 array, and these every
    device has whole.
    """
    shape, size = chosen.shape, layer_size(chosen.shape, stacked_axes)
    stacked_shape = tuple(shape[axis] for axis in stacked_axes)
    words = -(-size // WORD)
    bit = jnp.left_shift(jnp.uint32(1), (flat % WORD).astype(jnp.uint32))
    bit = jnp.where(chosen, bit, jnp.zeros_like(bit))
    word = words * _flat_index(shape, stacked_axes) + flat // WORD
    packed = jnp.zeros(math.prod(stacked_shape) * words, jnp.uint32)
    packed = packed.at[word].add(bit, mode="promise_in_bounds")
    unpack = functools.partial(_set_bits, count=count, size=size)
    positions = jax.vmap(unpack)(packed.reshape(-1, words))
    return positions.reshape(*stacked_shape, count)


def _set_bits(packed: jax.Array, *, count: int, size: int) -> jax.Array:
    """The positions of the first ``count`` bits that are set; ``size`` where there are fewer."""
    ends = jnp.cumsum(jax.lax.population_count(packed).astype(jnp.int32))
    number = jnp.arange(count, dtype=jnp.int32)
    word = jnp.searchsorted(ends, number, side="right").astype(jnp.int32)
    before = jnp.where(word > 0, ends.at[jnp.maximum(word - 1, 0)].get(mode="clip"), 0)
    bits, left = packed.at[word].get(mode="fill", fill_value=0), number - before
    offset = jnp.zeros_like(word)
    for half in (16, 8, 4, 2, 1):
        lower = jnp.right_shift(bits, offset.astype(jnp.uint32)) & jnp.uint32((1 << half) - 1)
        below = jax.lax.population_count(lower).astype(jnp.int32)
        is_above = left >= below
        left = jnp.where(is_above, left - below, left)
        offset = jnp.where(is_above, offset + half, offset)
    return jnp.where(number < ends[-1], WORD * word + offset, size)


@functools.partial(jax.jit, static_argnames="stacked_axes")
def gathered(array: jax.Array, indices: jax.Array, *, stacked_axes: tuple[int, ...]) -> jax.Array:
    """The entries at each layer's positions, shaped as they; 0 at unused places."""

    def gather(array: jax.Array, indices: jax.Array) -> jax.Array:
        at = _coordinates(array.shape, indices, stacked_axes)
        return array.at[at].get(mode="fill", fill_value=0)

    array = jnp.expand_dims(array, -1) if len(stacked_axes) == array.ndim else array
    return _partitioned(gather, array)(array, indices)


@functools.partial(jax.jit, static_argnames="stacked_axes")
def scattered(
    values: jax.Array, indices: jax.Array, into: jax.Array, *, stacked_axes: tuple[int, ...]
) -> jax.Array:
    """The array ``into`` with other entries at each layer's positions."""

    def scatter(values: jax.Array, indices: jax.Array, into: jax.Array) -> jax.Array:
        at = _coordinates(into.shape, indices, stacked_axes)
        return into.at[at].set(values, mode="drop")

    shape = into.shape
    into = jnp.expand_dims(into, -1) if len(stacked_axes) == into.ndim else into
    return _partitioned(scatter, into, keep=True)(values, indices, into).reshape(shape)


def zeros_like(array: jax.Array, like: jax.Array) -> jax.Array:
    """Zeros of the array's shape and dtype, sharded as ``like``."""
    return placement.with_sharding_of(jnp.zeros_like(array), like)


def _coordinates(
    shape: tuple[int, ...], indices: jax.Array, stacked_axes: tuple[int, ...]
) -> tuple[jax.Array, ...]:
    """The indices along each axis. Unused places are out of bounds along the first of a layer."""
    coordinates = {
        axis: jax.lax.broadcasted_iota(jnp.int32, indices.shape, number)
        for number, axis in enumerate(stacked_axes)
    }
    first, *others = _within(shape, stacked_axes)
    for axis in reversed(others):
        indices, coordinates[axis] = jnp.divmod(indices, jnp.int32(shape[axis]))
    coordinates[first] = indices
    return tuple(coordinates[axis] for axis in range(len(shape)))


def _partitioned(
    function: Callable[..., jax.Array], like: jax.Array, *, keep: bool = False
) -> Callable[..., jax.Array]:
    """The function, partitioned by XLA also where ``like`` is on an explicit-sharding mesh.

    Such a mesh asks how each result is split: as ``like`` if ``keep``, else not at all.
    """
    sharding = jax.typeof(like).sharding
    if all(part is None for part in sharding.spec):
        return function
    result = sharding if keep else NamedSharding(sharding.mesh, PartitionSpec())
    explicit = tuple(
        name
        for name, kind in zip(sharding.mesh.axis_names, sharding.mesh.axis_types, strict=True)
        if kind == jax.sharding.AxisType.Explicit
    )
    automatic: Callable[..., jax.Array] = jax.sharding.auto_axes(
        function, axes=explicit, out_sharding=result
    )
    return automatic
