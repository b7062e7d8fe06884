"""Several sums in one pass over an array, for programs that run on a single CPU device.

XLA:CPU hands a plain sum to a kernel library that reads its operand from memory. Intermediates that
several products share (the deviation, the inner optimizer's step) are then written out in full. One
reduction with several operands compiles into one loop that writes none of them: SPD's step on a
ViT-B takes about 3 times ``optax.adamw``'s time with it, 5.6 without (benchmarks/README.md).
Sharded arrays use plain sums, since the partitioner would gather the results of such a reduction.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# The number of terms added sequentially: a float32 sum loses digits with its length.
PIECE = 64
# In elements. Smaller arrays fit a cache, and plain sums compile in less time.
SMALLEST_ARRAY = 2**16
# Shorter pieces are not worth a second level of sums.
SHORTEST_PIECE = 8


def is_single_cpu_program(tree: Any) -> bool:
    """Whether the program being traced would run on one device if compiled for CPU.

    False outside ``jit``, and if an explicit-sharding mesh splits an array. The platform itself is
    known only at lowering.
    """
    leaves = jax.tree.leaves(tree)
    is_traced = any(isinstance(leaf, jax.core.Tracer) for leaf in leaves)
    return is_traced and not any(map(_is_split, leaves)) and cpu_devices() == 1


def cpu_devices() -> int:
    """The number of CPU devices in all processes; 0 if JAX runs without any."""
    try:
        return jax.device_count("cpu")
    except RuntimeError:
        return 0


def _is_split(leaf: Any) -> bool:
    return any(part is not None for part in jax.typeof(leaf).sharding.spec)


def sums(terms: tuple[jax.Array, ...], stacked: tuple[int, ...]) -> jax.Array:
    """The sums of arrays of one shape over all axes but the stacked ones, in a single pass.

    Args:
      terms: the arrays.
      stacked: the axes not to sum over.

    Returns:
      Shape (number of terms, sizes of the stacked axes).
    """
    in_pieces: Callable[..., jax.Array] = jax.custom_jvp(
        lambda *operands: _in_pieces(operands, stacked)
    )
    # The general reduction has no derivative; a sum's derivative is the sum of the derivatives.
    in_pieces.defjvp(  # type: ignore[attr-defined]
        lambda primals, tangents: (in_pieces(*primals), _plain(tangents, stacked))
    )
    return in_pieces(*terms)


def _plain(terms: tuple[jax.Array, ...], stacked: tuple[int, ...]) -> jax.Array:
    over = tuple(a for a in range(terms[0].ndim) if a not in stacked)
    return jnp.stack([jnp.sum(term, axis=over) for term in terms])


def _in_pieces(terms: tuple[jax.Array, ...], stacked: tuple[int, ...]) -> jax.Array:
    shape = terms[0].shape
    head = max(stacked, default=-1) + 1  # the axes after the last stacked one are contiguous
    size = math.prod(shape[head:])
    piece = max(d for d in range(1, min(PIECE, size) + 1) if size % d == 0)
    if piece < SHORTEST_PIECE:
        return _plain(terms, stacked)
    split = tuple(term.reshape(*shape[:head], size // piece, piece) for term in terms)
    zeros = tuple(np.zeros((), term.dtype) for term in terms)
    partial = jnp.stack(jax.lax.reduce(split, zeros, _add, (head + 1,)))
    return jnp.sum(partial, axis=tuple(1 + a for a in range(head + 1) if a not in stacked))


def _add(left: tuple[Any, ...], right: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(a + b for a, b in zip(left, right, strict=True))
