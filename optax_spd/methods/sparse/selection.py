"""Chooses the k entries of each layer with the largest scores, and reads and writes them.

Everything here is sums over axes, gathers and scatters with one index an axis. XLA partitions these
along any sharding: each device looks at its own part, and only counts, the bits of the choice and
the k chosen numbers travel. A sort, ``top_k`` or a flattening reshape would gather the array.
"""

import collections
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from optax_spd.layers import trees
from optax_spd.layers.plans import ArrayLayers
from optax_spd.sharding import placement

WORD = 32  # bits of the words that the choice is sent in
LARGEST_LAYER = 2**31 - 1  # positions and the mark for an unused place are int32


def entries_per_layer(path: trees.Path, array: Any, entry: ArrayLayers, fraction: float) -> int:
    """K = min(int(fraction n) + 1, n), for a layer of n entries.

    Raises:
      ValueError: positions in the layer, or in the words of all layers, do not fit into int32, or
        the size is symbolic.
    """
    shape = jnp.shape(array)
    if not all(isinstance(n, int) for n in shape):
        raise ValueError(
            f"with_sparse needs the shape of {trees.shown(path)}, got {shape}: how many entries "
            "are chosen follows from it. Export with concrete shapes."
        )
    size = layer_size(shape, entry.stacked_axes)
    if size > LARGEST_LAYER:
        raise ValueError(
            f"The parameter {trees.shown(path)} of shape {shape} has {size:,} entries in a layer, "
            f"but indices are int32 and reach {LARGEST_LAYER:,}. If the array stacks layers, "
            "declare it with layers=optax_spd.stacked(...); else leave it out with mask=."
        )
    words = 2 * entry.count * _words(size)
    if words > LARGEST_LAYER:
        raise ValueError(
            f"The parameter {trees.shown(path)} of shape {shape} has {entry.count:,} layers of "
            f"{size:,} entries. The choice among them takes {words:,} words of {WORD} bits, but "
            f"they are counted in int32, up to {LARGEST_LAYER:,}. Split the array into several "
            "with fewer layers each, or leave it out with mask=."
        )
    return min(int(fraction * size) + 1, size)


def layer_size(shape: tuple[int, ...], stacked_axes: tuple[int, ...]) -> int:
    """The number of entries of each layer of an array."""
    return math.prod(shape[axis] for axis in _within(shape, stacked_axes))


def _words(size: int) -> int:
    return -(-size // WORD)


def _within(shape: tuple[int, ...], stacked_axes: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(axis for axis in range(len(shape)) if axis not in stacked_axes)


class Choice(NamedTuple):
    """Which entries of an array score high enough, as bits in words of 32 entries.

    The words are 1/32 of a float32 array. Every device has them whole.

    Attributes:
      above: per layer the entries above the k-th score, shape (layers, words).
      level: the entries at that score, of which the first are chosen too.
      count: k.
      size: the number of entries of a layer.
    """

    above: jax.Array
    level: jax.Array
    count: int  # type: ignore[assignment]  # shadows tuple.count
    size: int


def choose(score: jax.Array, count: int, stacked_axes: tuple[int, ...]) -> Choice:
    """Finds the entries of each layer with the largest scores. A NaN is never chosen.

    Args:
      score: floating, like the array.
      count: k, how many to choose in each layer.
      stacked_axes: the axes that count layers.
    """
    above, level = _chosen(score, count=count, stacked_axes=stacked_axes)
    return Choice(above, level, count, layer_size(score.shape, stacked_axes))


# Jitted, so that arrays of one shape share a trace.
@functools.partial(jax.jit, static_argnames=("count", "stacked_axes"))
def _chosen(score: jax.Array, *, count: int, stacked_axes: tuple[int, ...]) -> jax.Array:
    """The words above and at the k-th score, shape (2, layers, words)."""
    if len(stacked_axes) == score.ndim:  # layers of rank 0
        score = jnp.expand_dims(score, -1)
    shape, within = score.shape, _within(score.shape, stacked_axes)
    layers = math.prod(shape[axis] for axis in stacked_axes)
    words = _words(layer_size(shape, stacked_axes))

    def pack(score: jax.Array) -> jax.Array:
        key = _ordered_bits(score)
        threshold = jnp.expand_dims(_kth_largest(key, count, within), within)
        flat, layer = _flat_index(shape, within), _flat_index(shape, stacked_axes)
        row = jnp.where(key == threshold, layers + layer, layer)
        bit = jnp.left_shift(jnp.uint32(1), (flat % WORD).astype(jnp.uint32))
        bit = jnp.where((key >= threshold) & (key > 0), bit, jnp.zeros_like(bit))
        packed = jnp.zeros(2 * layers * words, jnp.uint32)
        # Each bit is added once.
        packed = packed.at[words * row + flat // WORD].add(bit, mode="promise_in_bounds")
        return packed.reshape(2, layers, words)

    return _partitioned(pack, score)(score)


def _ordered_bits(score: jax.Array) -> jax.Array:
    """Unsigned integers in the order of the scores; 0 for NaN alone."""
    score = jnp.where(score == 0, jnp.zeros_like(score), score)  # -0 is 0
    dtype = jnp.dtype(f"uint{jnp.finfo(score.dtype).bits}")
    bits = jax.lax.bitcast_convert_type(score, dtype)
    sign = jnp.asarray(1 << (jnp.iinfo(dtype).bits - 1), dtype)
    ordered = jnp.where((bits & sign) == 0, bits | sign, ~bits)
    return jnp.where(jnp.isnan(score), jnp.zeros_like(ordered), ordered)


def _kth_largest(key: jax.Array, count: int, axes: tuple[int, ...]) -> jax.Array:
    """The ``count``-th largest number along the axes; 0 if fewer are above 0."""
    bits = jnp.iinfo(key.dtype).bits

    def bisect(step: jax.Array, found: jax.Array) -> jax.Array:
        bit = jnp.asarray(bits - 1 - step, key.dtype)
        tried = found | jnp.left_shift(jnp.ones_like(found), bit)
        reaching = jnp.sum(key >= jnp.expand_dims(tried, axes), axes, jnp.int32)
        return jnp.where(reaching >= count, tried, found)

    nothing = jnp.zeros([n for axis, n in enumerate(key.shape) if axis not in axes], key.dtype)
    kth: jax.Array = jax.lax.fori_loop(0, bits, bisect, nothing)
    return kth


def _flat_index(shape: tuple[int, ...], axes: tuple[int, ...]) -> jax.Array:
    """Each entry's position in C order among the given axes, int32."""
    flat, stride = jnp.zeros(shape, jnp.int32), 1
    for axis in reversed(axes):
        flat += stride * jax.lax.broadcasted_iota(jnp.int32, shape, axis)
        stride *= shape[axis]
    return flat


def positions(choices: dict[trees.Path, Choice]) -> dict[trees.Path, jax.Array]:
    """The flat positions of the chosen entries of each layer, in ascending order.

    Of equal scores those at the lowest positions are chosen.

    Returns:
      Per array int32, shape (layers, k): positions in C order in the layer without its stacked
      axes. If fewer than k scores are numbers, the rest holds the layer's size.
    """
    # Layers of one size one after the other, in one program.
    groups: dict[tuple[int, int], list[trees.Path]] = collections.defaultdict(list)
    for path, choice in choices.items():
        groups[choice.count, choice.size].append(path)
    found: dict[trees.Path, jax.Array] = {}
    for (count, size), paths in groups.items():
        above = jnp.concatenate([choices[path].above for path in paths])
        level = jnp.concatenate([choices[path].level for path in paths])
        rows = jax.lax.map(functools.partial(_positions, count=count, size=size), (above, level))
        ends = np.cumsum([choices[path].above.shape[0] for path in paths])
        found |= dict(zip(paths, jnp.split(rows, ends[:-1]), strict=True))
    return found


def _positions(words: tuple[jax.Array, jax.Array], *, count: int, size: int) -> jax.Array:
    """The first ``count`` positions of a layer, ``size`` where there are fewer."""
    above, level = words
    missing = count - jnp.sum(jax.lax.population_count(above).astype(jnp.int32))
    last = _set_bits(level, jnp.expand_dims(missing - 1, 0), size)
    begins = WORD * jax.lax.iota(jnp.int32, above.size)
    upto = jnp.clip(last + 1 - begins, 0, WORD).astype(jnp.uint32)
    every = jnp.uint32(2**WORD - 1)
    # A shift by 32 is not defined.
    first = jnp.where(upto == 0, jnp.uint32(0), jnp.right_shift(every, WORD - jnp.maximum(upto, 1)))
    return _set_bits(above | (level & first), jax.lax.iota(jnp.int32, count), size)


def _set_bits(packed: jax.Array, numbers: jax.Array, size: int) -> jax.Array:
    """The positions of the bits with these numbers among those set; ``size`` if there is none."""
    ends = jnp.cumsum(jax.lax.population_count(packed).astype(jnp.int32))
    word = jnp.searchsorted(ends, numbers, side="right").astype(jnp.int32)
    bits = packed.at[word].get(mode="fill", fill_value=0)
    count = jax.lax.population_count(bits).astype(jnp.int32)
    left = numbers - (ends.at[word].get(mode="clip") - count)
    offset = jnp.zeros_like(word)
    for half in (16, 8, 4, 2, 1):
        lower = jnp.right_shift(bits, offset.astype(jnp.uint32)) & jnp.uint32((1 << half) - 1)
        below = jax.lax.population_count(lower).astype(jnp.int32)
        is_above = left >= below
        left = jnp.where(is_above, left - below, left)
        offset = jnp.where(is_above, offset + half, offset)
    return jnp.where(numbers < ends[-1], WORD * word + offset, size)


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
        changed: jax.Array = into.at[at].set(values, mode="drop")
        return changed

    shape = into.shape
    into = jnp.expand_dims(into, -1) if len(stacked_axes) == into.ndim else into
    return _partitioned(scatter, into, keep=True)(values, indices, into).reshape(shape)


def zeros_like(array: Any, like: Any) -> Any:
    """Zeros of the array's shape and dtype, sharded as the parameter ``like``."""
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
        size = jnp.full_like(indices, shape[axis])
        coordinates[axis], indices = jax.lax.rem(indices, size), jax.lax.div(indices, size)
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
