"""Spectra of weights: the squared singular values of every layer's matrices.

The eigenvalues of the Gram matrix of a weight's smaller side cost less than its singular values, a
third for an MLP's kernel, and are as good - except where they are small: a Gram matrix in float32
has no digits of what is below 1e-7 of its largest eigenvalue. ``python -m benchmarks.balancing``
measures what each costs and what error it leaves.

(To take singular values only where a Gram matrix turns out to lack the digits would need a
condition inside of :func:`optax_spd.temp_balance`'s: on CPU, JAX 0.10.2 hung in such a program.)
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

# Weights are decomposed in batches whose matrices take no more than this, so that a stack of large
# layers does not need memory for all of them at once.
BATCH_BYTES = 2**26


class Spectrum(NamedTuple):
    """The eigenvalues of some layers, ``scale * relative``.

    Attributes:
      relative: ascending, of order 1 for the largest; shape (layers, N), with N the number of
        spatial positions times the smaller side.
      scale: shape (layers,); NaN for a layer that is not finite. It may overflow.
    """

    relative: jax.Array
    scale: jax.Array


class Source(NamedTuple):
    """Layers of one shape, which can be had all at once or one by one.

    Attributes:
      shape: (spatial positions, rows, columns) of a layer.
      dtype: in which it is decomposed.
      layers: how many.
      whole: from a condition that is always true to all of them, shape (layers, *shape).
      one: from a number (a tracer) to that layer, shape ``shape``.
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
      exact: by singular values, with digits of the smallest eigenvalues too; else from the Gram
        matrix of the smaller side.
    """
    matrices = _wide(matrices)
    # Squares of small weights would underflow. NaN or an infinity stays in the scale, and never
    # enters a decomposition, whose iterations it could stall.
    largest = jnp.max(jnp.abs(matrices), axis=(1, 2, 3))
    usable = jnp.isfinite(largest) & (largest > 0)
    divisor = jnp.where(usable, largest, 1)[:, None, None, None]
    unit = jnp.where(usable[:, None, None, None], matrices / divisor, 0)
    scale = jnp.where(jnp.isfinite(largest), largest, jnp.nan) ** 2
    if exact:
        return Spectrum(_pooled(jnp.linalg.svd(unit, compute_uv=False) ** 2), scale)
    # The accelerators' default would multiply in bfloat16 or TF32.
    gram = jnp.einsum("...ij,...kj->...ik", unit, unit, precision=jax.lax.Precision.HIGHEST)
    return Spectrum(_pooled(jnp.maximum(jnp.linalg.eigvalsh(gram), 0)), scale)


def _pooled(values: jax.Array) -> jax.Array:
    """All positions' eigenvalues of a layer, ascending."""
    return jnp.sort(values.reshape(len(values), -1), axis=1)


def spectra_of(sources: Sequence[Source], *, exact: bool) -> list[Spectrum]:
    """The spectra of many weights; those of one shape are decomposed together.

    Args:
      sources: the weights.
      exact: as :func:`decomposed`.
    """
    shapes: dict[Any, list[int]] = {}
    for index, source in enumerate(sources):
        positions, rows, columns = source.shape
        key = (positions, min(rows, columns), max(rows, columns), source.dtype)
        shapes.setdefault(key, []).append(index)
    found: dict[int, Spectrum] = {}
    go: jax.Array | bool = True
    for (positions, small, large, dtype), indices in shapes.items():
        # The layer itself, scaled, and the Gram matrices.
        each = positions * (2 * small * large + small * small) * jnp.dtype(dtype).itemsize
        most = max(1, BATCH_BYTES // each)
        for batch in _batches(indices, [sources[i].layers for i in indices], most):
            first = sources[batch[0]]
            if first.layers > most:
                found[batch[0]] = _one_by_one(first, most, go, exact=exact)
                go = _after(found[batch[0]])
                continue
            wide = [_wide(sources[i].whole(go)) for i in batch]
            together = decomposed(jnp.concatenate(wide), exact=exact)
            go = _after(together)
            start = 0
            for index, part in zip(batch, wide, strict=True):
                here = slice(start, start + len(part))
                found[index] = Spectrum(together.relative[here], together.scale[here])
                start += len(part)
    return [found[index] for index in range(len(sources))]


def _after(spectrum: Spectrum) -> jax.Array:
    """True, which a compiler cannot know before the spectrum is there.

    Each batch waits for the one before it. Without that all of them might be in memory at once; and
    on several CPU devices loops that gather sharded layers ran side by side, in different orders,
    and waited for each other. (An optimization barrier does not outlive compilation for a CPU.)
    """
    last = spectrum.relative[0, -1]
    return ~((last > 1) & (last < 0))


def _wide(matrices: jax.Array) -> jax.Array:
    tall = matrices.shape[-2] > matrices.shape[-1]
    return jnp.swapaxes(matrices, -1, -2) if tall else matrices


def _one_by_one(source: Source, most: int, go: jax.Array | bool, *, exact: bool) -> Spectrum:
    """Too many layers for one batch: they are taken from their array a few at a time."""

    def decompose(number: jax.Array) -> Spectrum:
        spectrum = decomposed(source.one(number)[None], exact=exact)
        return Spectrum(spectrum.relative[0], spectrum.scale[0])

    numbers = jnp.where(go, jnp.arange(source.layers), 0)
    together: Spectrum = jax.lax.map(decompose, numbers, batch_size=most if most > 1 else None)
    return together


def _batches(indices: list[int], sizes: list[int], most: int) -> list[list[int]]:
    """Cuts a list where the sizes would add up to more than ``most``."""
    batches: list[list[int]] = []
    total = most
    for index, size in zip(indices, sizes, strict=True):
        if total + size > most:
            batches.append([])
            total = 0
        batches[-1].append(index)
        total += size
    return batches
