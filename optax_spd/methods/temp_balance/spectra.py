"""Spectra of weights: the squared singular values of every layer's matrices.

The eigenvalues of the Gram matrix of a weight's smaller side cost less than its singular values (a
third for an MLP's kernel). They are as accurate unless they are small: a float32 Gram matrix loses
eigenvalues below 1e-7 of the largest. ``python -m benchmarks.balancing`` measures cost and error of
both.

(Computing singular values only when the Gram matrix turns out to be too inaccurate would need a
condition inside :func:`optax_spd.temp_balance`'s own. On CPU, JAX 0.10.2 hung in such a program.)
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

# The matrices of a batch take at most this much memory, so that large stacks need not be widened
# and decomposed all at once.
BATCH_BYTES = 2**26


class Spectrum(NamedTuple):
    """The eigenvalues of several layers, ``scale * relative``.

    Attributes:
      relative: ascending, the largest of order 1; shape (layers, N), where N is the number of
        spatial positions times the smaller side.
      scale: shape (layers,); NaN for a layer that is not finite. It may overflow.
    """

    relative: jax.Array
    scale: jax.Array


class Source(NamedTuple):
    """Layers of one shape, read all at once or one by one.

    Attributes:
      shape: (spatial positions, rows, columns) of a layer.
      dtype: the dtype to decompose in.
      layers: the number of layers.
      whole: returns all layers, shape (layers, *shape). Its argument is a condition that is always
        true, and that delays the read (see :func:`_ready_after`).
      one: returns the layer of a given index (a tracer), shape ``shape``.
    """

    shape: tuple[int, int, int]
    dtype: Any
    layers: int
    whole: Callable[[jax.Array | bool], jax.Array]
    one: Callable[[jax.Array], jax.Array]


def decomposed(matrices: jax.Array, *, exact: bool) -> Spectrum:
    """The spectra of a batch of layers.

    Args:
      matrices: shape (layers, positions, rows, columns), float32 or float64.
      exact: compute singular values, accurate for the smallest eigenvalues too; else use the Gram
        matrix of the smaller side.
    """
    matrices = _wide(matrices)
    # Divide by the largest entry, since squares of small weights would underflow. NaN and infinity
    # go into the scale only: in a decomposition they could stall its iterations.
    largest = jnp.max(jnp.abs(matrices), axis=(1, 2, 3))
    usable = jnp.isfinite(largest) & (largest > 0)
    divisor = jnp.where(usable, largest, 1)[:, None, None, None]
    unit = jnp.where(usable[:, None, None, None], matrices / divisor, 0)
    scale = jnp.where(jnp.isfinite(largest), largest, jnp.nan) ** 2
    if exact:
        return Spectrum(_pooled(jnp.linalg.svd(unit, compute_uv=False) ** 2), scale)
    # Accelerators multiply in bfloat16 or TF32 by default.
    gram = jnp.einsum("...ij,...kj->...ik", unit, unit, precision=jax.lax.Precision.HIGHEST)
    return Spectrum(_pooled(jnp.maximum(jnp.linalg.eigvalsh(gram), 0)), scale)


def _pooled(values: jax.Array) -> jax.Array:
    """All positions' eigenvalues of a layer, ascending."""
    return jnp.sort(values.reshape(len(values), -1), axis=1)


def spectra_of(sources: Sequence[Source], *, exact: bool) -> list[Spectrum]:
    """The spectra of many weights; those of one shape are decomposed together.

    Args:
      sources: the weights.
      exact: as for :func:`decomposed`.
    """
    shapes: dict[Any, list[int]] = {}
    for index, source in enumerate(sources):
        positions, rows, columns = source.shape
        key = (positions, min(rows, columns), max(rows, columns), source.dtype)
        shapes.setdefault(key, []).append(index)
    found: dict[int, Spectrum] = {}
    ready: jax.Array | bool = True
    for (positions, small, large, dtype), indices in shapes.items():
        # A layer, its scaled copy, and the Gram matrices.
        layer_bytes = positions * (2 * small * large + small * small) * jnp.dtype(dtype).itemsize
        max_layers = max(1, BATCH_BYTES // layer_bytes)
        for batch in _batches(indices, [sources[i].layers for i in indices], max_layers):
            first = sources[batch[0]]
            if first.layers > max_layers:
                found[batch[0]] = _one_by_one(first, max_layers, ready, exact=exact)
                ready = _ready_after(found[batch[0]])
                continue
            wide = [_wide(sources[i].whole(ready)) for i in batch]
            combined = decomposed(jnp.concatenate(wide), exact=exact)
            ready = _ready_after(combined)
            start = 0
            for index, part in zip(batch, wide, strict=True):
                span = slice(start, start + len(part))
                found[index] = Spectrum(combined.relative[span], combined.scale[span])
                start += len(part)
    return [found[index] for index in range(len(sources))]


def _ready_after(spectrum: Spectrum) -> jax.Array:
    """True, but the compiler cannot know it before ``spectrum`` is computed.

    It makes each batch wait for the one before. Otherwise all batches might be in memory at once.
    On several CPU devices, loops that gather sharded layers also ran concurrently, in a different
    order on each device, and deadlocked. (XLA:CPU removes optimization barriers.)
    """
    last = spectrum.relative[0, -1]
    return ~((last > 1) & (last < 0))


def _wide(matrices: jax.Array) -> jax.Array:
    tall = matrices.shape[-2] > matrices.shape[-1]
    return jnp.swapaxes(matrices, -1, -2) if tall else matrices


def _one_by_one(
    source: Source, max_layers: int, ready: jax.Array | bool, *, exact: bool
) -> Spectrum:
    """Decomposes an array with more layers than a batch holds, a few layers at a time."""

    def decompose(number: jax.Array) -> Spectrum:
        spectrum = decomposed(source.one(number)[None], exact=exact)
        return Spectrum(spectrum.relative[0], spectrum.scale[0])

    numbers = jnp.where(ready, jnp.arange(source.layers), 0)
    batch_size = max_layers if max_layers > 1 else None
    spectrum: Spectrum = jax.lax.map(decompose, numbers, batch_size=batch_size)
    return spectrum


def _batches(indices: list[int], sizes: list[int], limit: int) -> list[list[int]]:
    """Splits ``indices`` into consecutive batches whose sizes add up to at most ``limit``."""
    batches: list[list[int]] = []
    total = limit
    for index, size in zip(indices, sizes, strict=True):
        if total + size > limit:
            batches.append([])
            total = 0
        batches[-1].append(index)
        total += size
    return batches
