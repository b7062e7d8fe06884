"""The power-law exponent of a weight matrix's spectrum, PL_Alpha_Hill.

Hill: "A Simple General Approach to Inference About the Tail of a Distribution", Annals of
Statistics 1975; for weight matrices Zhou, Pang, Liu, Yang, Yan, Gal, Mahoney, Yang: "Temperature
Balancing, Layer-wise Weight Analysis, and Neural Network Training", NeurIPS 2023,
https://arxiv.org/abs/2312.00359; the authors' code: YefanZhou/TempBalance. For a matrix W with
eigenvalues e_0 <= ... <= e_{N-1} of WWᵀ (the squared singular values), and a tail that starts at i
and has n = N - i members:

    α_i = 1 + n / Σ_{j>=i} ln(e_j / e_i)                              Hill's estimate
    D_i = max_{j>=i} |1 - (e_j / e_i)^(1 - α_i) - (j - i) / n|        how far the fit is off

    "median"            i = floor(N / xmin_pos)
    "goodness-of-fit"   the first i <= N - 2 with the smallest D_i
    "fix-finger"        the same, but only i with log10(0.95 x) <= e_i <= 1.5 x, where x is the left
                        edge of the fullest of ``bins`` bins of log10 e

A small α means a heavy tail: a layer that is well trained. The eigenvalues of a convolution are
those of √conv_norm times the (in, out) matrices of all its spatial positions, pooled.

Differences from the authors' code:

1. ln(e_j / e_i) is summed, and not ln e_j and ln e_i apart: the same number without cancellation.
2. The eigenvalues are those of the Gram matrix of the smaller side, in place of a singular value
   decomposition, where the result allows it. In float32, on all 37 weight matrices and tables of
   all-MiniLM-L6-v2 with more than two eigenvalues, against float64: α is off by at most 3e-6
   ("median") or 4e-4 ("goodness-of-fit"), with singular values by 1e-6 or 8e-5. "fix-finger" bins
   the smallest eigenvalues too, of which the Gram matrix has no digits (off by up to 1.1), and
   ``filter_zeros`` compares them with a threshold: there it is singular values.
3. An eigenvalue of 0 counts as the smallest positive number, so its logarithm is finite; a matrix
   with an entry that is not finite has α = NaN.
4. The lower bound of "fix-finger" compares an eigenvalue with a logarithm, as theirs does. It is
   kept to give their numbers.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optax_spd import checks, layers as layers_lib

FITS = ("median", "goodness-of-fit", "fix-finger")
ZERO = 1e-5  # eigenvalues up to here are zeros to ``filter_zeros``, as in the authors' code

# Decompositions run in batches whose matrices take no more than this, so that a stack of large
# layers does not need memory for all their Gram matrices at once.
BATCH_BYTES = 2**26
SMALL = 256  # so many candidates for the start of a tail are tried at once


@dataclasses.dataclass(frozen=True)
class Fit:
    """How a spectrum becomes an exponent; the arguments of :func:`power_law_alpha`, checked."""

    fit: str = "median"
    xmin_pos: float = 2
    conv_norm: float = 0.5
    filter_zeros: bool = False
    bins: int = 100

    def __post_init__(self) -> None:
        """Refuses arguments that are wrong whatever the weights."""
        if self.fit not in FITS:
            raise ValueError(f"fit must be one of {', '.join(map(repr, FITS))}, got {self.fit!r}.")
        if not _static_number("xmin_pos", self.xmin_pos) > 1:
            raise ValueError(
                "xmin_pos must be greater than 1 (the tail starts at eigenvalue N / xmin_pos), "
                f"got {self.xmin_pos}."
            )
        if not _static_number("conv_norm", self.conv_norm) > 0:
            raise ValueError(f"conv_norm must be greater than 0, got {self.conv_norm}.")
        checks.check_flag("filter_zeros", self.filter_zeros)
        checks.check_static("bins", self.bins)
        checks.check_count("bins", self.bins)

    @property
    def needs_small_eigenvalues(self) -> bool:
        """Whether the smallest eigenvalues decide, so that a Gram matrix is not good enough."""
        return self.fit == "fix-finger" or bool(self.filter_zeros)

    def alpha(self, eigenvalues: jax.Array, first: jax.Array) -> jax.Array:
        """α of ascending eigenvalues, shape (N,), of which those before ``first`` are padding."""
        N = eigenvalues.shape[0]
        tiny = jnp.finfo(eigenvalues.dtype).tiny
        largest = eigenvalues[-1]
        # α does not depend on the scale; relative to the largest no quotient overflows.
        e = jnp.where(largest > 0, eigenvalues / jnp.where(largest > 0, largest, 1), 1)
        e = jnp.maximum(e, tiny)
        if self.filter_zeros:
            kept = jnp.sum(eigenvalues > ZERO, dtype=first.dtype)
            first = jnp.where(kept > 0, N - kept, first)
        if self.fit == "median":
            # A table of what floor(n / xmin_pos) is in double precision, for any number kept.
            starts = np.floor(np.arange(N + 1) / float(self.xmin_pos)).astype(np.int32)
            return hill(e, first + jnp.asarray(starts)[N - first])[0]
        i = jnp.arange(N)
        candidate = (i >= first) & (i <= N - 2)
        if self.fit == "fix-finger":
            x = _fullest_bin(jnp.log10(jnp.maximum(eigenvalues, tiny)), i >= first, self.bins)
            candidate &= (eigenvalues >= jnp.log10(0.95 * x)) & (eigenvalues <= 1.5 * x)
        if N <= SMALL:
            alphas, distances = jax.vmap(lambda start: hill(e, start))(i)
        else:  # all pairs (i, j) at once would take N² numbers
            alphas, distances = jax.lax.map(lambda start: hill(e, start), i, batch_size=SMALL)
        best = jnp.argmin(jnp.where(candidate, distances, jnp.inf))
        return jnp.where(jnp.any(candidate), alphas[best], 0)


def _static_number(name: str, value: Any) -> float:
    """The value of an argument that shapes the program: no tracer and no schedule."""
    checks.check_static(name, value)
    checks.check_scalar(name, value)
    return float(value)


def hill(e: jax.Array, i: jax.Array) -> tuple[jax.Array, jax.Array]:
    """α_i and D_i of the tail that starts at i; infinity and 1 where its eigenvalues are equal.

    Args:
      e: ascending positive eigenvalues, shape (N,).
      i: where the tail starts, an integer.
    """
    N = e.shape[0]
    j = jnp.arange(N)
    n = (N - i).astype(e.dtype)
    logs = jnp.where(j >= i, jnp.log(e / e[i]), 0)  # ln(e_j / e_i); 0 outside of the tail
    total = jnp.sum(logs)
    alpha = jnp.where(total > 0, 1 + n / jnp.where(total > 0, total, 1), jnp.inf)
    fitted = 1 - jnp.exp(jnp.where(total > 0, 1 - alpha, 0) * logs)
    distance = jnp.max(jnp.where(j >= i, jnp.abs(fitted - (j - i) / n), 0))
    return alpha, jnp.where(total > 0, distance, 1)


def _fullest_bin(logs: jax.Array, kept: jax.Array, bins: int) -> jax.Array:
    """10 to the left edge of the first fullest bin of a histogram between least and largest."""
    low = jnp.min(jnp.where(kept, logs, jnp.inf))
    high = jnp.max(jnp.where(kept, logs, -jnp.inf))
    width = high - low
    # All equal: one bin, at the value itself.
    place = jnp.floor((logs - low) / jnp.where(width > 0, width, 1) * bins)
    index = jnp.clip(place, 0, bins - 1).astype(jnp.int32)
    counts = jnp.zeros(bins, jnp.int32).at[index].add(kept.astype(jnp.int32))
    return 10 ** (low + jnp.argmax(counts) * width / bins)


def squared_singular_values(stacks: Sequence[jax.Array], *, exact: bool) -> list[jax.Array]:
    """The spectra of stacks of matrices; matrices of one shape are decomposed together.

    Args:
      stacks: each of shape (count, rows, columns), float32 or float64.
      exact: by singular value decomposition; else from the Gram matrix of the smaller side, which
        costs less and has no digits of eigenvalues below about 1e-7 (float32) of the largest.

    Returns:
      Per stack the squares, ascending, shape (count, min(rows, columns)); NaN for a matrix that is
      not finite.
    """
    reduce, decompose = (_wide, _singular) if exact else (_gram, _eigenvalues)
    shapes: dict[Any, list[int]] = {}
    for index, stack in enumerate(stacks):
        shape = jax.eval_shape(reduce, stack)[0]
        shapes.setdefault((shape.shape[1:], shape.dtype), []).append(index)
    spectra: dict[int, jax.Array] = {}
    for (shape, dtype), indices in shapes.items():
        most = max(1, BATCH_BYTES // (math.prod(shape) * dtype.itemsize))
        for batch in _batches(indices, [len(stacks[i]) for i in indices], most):
            if len(batch) == 1 and len(stacks[batch[0]]) > most:
                spectra[batch[0]] = jax.lax.map(
                    lambda matrix: decompose(*reduce(matrix[None]))[0],
                    stacks[batch[0]],
                    batch_size=most,
                )
                continue
            reduced = [reduce(stacks[i]) for i in batch]
            together = decompose(*map(jnp.concatenate, zip(*reduced, strict=True)))
            ends = np.cumsum([len(stacks[i]) for i in batch])[:-1].tolist()
            spectra.update(zip(batch, jnp.split(together, ends), strict=True))
    return [spectra[index] for index in range(len(stacks))]


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


def _wide(matrices: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The matrices with largest entry 1, no taller than wide, and what they were divided by.

    Squares of small weights would underflow. NaN or an infinity in a matrix stays in its divisor,
    and never enters a decomposition, whose iterations it could stall.
    """
    if matrices.shape[1] > matrices.shape[2]:
        matrices = jnp.swapaxes(matrices, 1, 2)
    largest = jnp.max(jnp.abs(matrices), axis=(1, 2), keepdims=True)
    usable = jnp.isfinite(largest) & (largest > 0)
    unit = jnp.where(usable, matrices / jnp.where(usable, largest, 1), 0)
    return unit, jnp.where(jnp.isfinite(largest), largest, jnp.nan)[:, :, 0]


def _gram(matrices: jax.Array) -> tuple[jax.Array, jax.Array]:
    unit, scale = _wide(matrices)
    # The accelerators' default would multiply in bfloat16 or TF32.
    return jnp.einsum("bij,bkj->bik", unit, unit, precision=jax.lax.Precision.HIGHEST), scale


def _eigenvalues(gram: jax.Array, scale: jax.Array) -> jax.Array:
    return jnp.maximum(jnp.linalg.eigvalsh(gram), 0) * scale**2


def _singular(unit: jax.Array, scale: jax.Array) -> jax.Array:
    return (jnp.linalg.svd(unit, compute_uv=False)[:, ::-1] * scale) ** 2


def power_law_alpha(
    weight: jax.typing.ArrayLike,
    *,
    fit: str = "median",
    xmin_pos: float = 2,
    conv_norm: float = 0.5,
    filter_zeros: bool = False,
    bins: int = 100,
) -> jax.Array:
    r"""PL_Alpha_Hill: the power-law exponent of the tail of a weight's spectrum.

    .. math::

        \alpha = 1 + n \Big/ \sum_{j \ge i} \ln \frac{e_j}{e_i}

    over the n = N - i largest of its N eigenvalues. Small values mean a heavy tail. It does not
    depend on the weight's scale, except by "fix-finger" and ``filter_zeros``.

    Args:
      weight: shape (in, out), or a convolution's (..., in, out) with spatial positions in front, as
        in Flax; any floating dtype. One layer: ``vmap`` over stacked ones.
      fit: where the tail starts. "median": at eigenvalue N / ``xmin_pos``; "goodness-of-fit":
        where the Kolmogorov-Smirnov distance to the power law is least; "fix-finger": the same
        near the peak of the spectrum's histogram.
      xmin_pos: greater than 1; for "median".
      conv_norm: what the eigenvalues of convolutions (rank 3 and more) are multiplied by.
      filter_zeros: leave out eigenvalues up to 1e-5, unless that is all of them.
      bins: of the histogram, for "fix-finger".

    Returns:
      α, shape (), float64 for a float64 weight, else float32. Infinity where all eigenvalues of the
      tail are equal; 0 where no start of the tail comes into question; NaN where the weight is not
      finite. It may be jitted and vmapped.

    Raises:
      TypeError: a complex weight, or an argument of the wrong type.
      ValueError: fewer than two axes, an empty weight, an unknown ``fit``, or a number out of
        range.

    Example:
      >>> import jax
      >>> import optax_spd
      >>> weight = jax.random.normal(jax.random.key(0), (64, 96))
      >>> print(f"{optax_spd.power_law_alpha(weight):.1f}")
      2.6

    References:
      Zhou et al., `Temperature Balancing, Layer-wise Weight Analysis, and Neural Network Training
      <https://arxiv.org/abs/2312.00359>`_, NeurIPS 2023.

    .. seealso:: :func:`optax_spd.temp_balance`, :func:`optax_spd.balance_scales`
    """
    options = Fit(fit, xmin_pos, conv_norm, filter_zeros, bins)
    checks.check_real("weight", weight)
    array = jnp.asarray(weight)
    if array.ndim < 2 or array.size == 0:
        raise ValueError(
            f"weight must have at least two axes and be not empty, got shape {array.shape}: only "
            "matrices and convolutions have a spectrum."
        )
    matrices = array.astype(layers_lib.compute_dtype(array)).reshape(-1, *array.shape[-2:])
    values = _spectrum(matrices, options.needs_small_eigenvalues).reshape(1, -1)
    return fitted_alphas([pooled(values, options)] if array.ndim > 2 else [values], options)[0][0]


@functools.partial(jax.jit, static_argnums=1)  # one program, also where it is called eagerly
def _spectrum(matrices: jax.Array, exact: bool) -> jax.Array:
    return squared_singular_values([matrices], exact=exact)[0]


def pooled(values: jax.Array, options: Fit) -> jax.Array:
    """The spectra of convolutions, ascending, from all their positions' eigenvalues in any order.

    Args:
      values: shape (layers, N).
      options: with ``conv_norm``.
    """
    return jnp.sort(values * options.conv_norm, axis=1)


def fitted_alphas(spectra: Sequence[jax.Array], options: Fit) -> list[jax.Array]:
    """α of layers, from ascending eigenvalues; layers of similar size are fitted together.

    Args:
      spectra: each of shape (layers, N).
      options: the fit.

    Returns:
      Per element of ``spectra`` a vector of shape (layers,).
    """
    # Padded to powers of two there are few shapes, each of which is a program to compile.
    groups: dict[Any, list[int]] = {}
    for index, values in enumerate(spectra):
        size = 2 ** math.ceil(math.log2(values.shape[1]))
        groups.setdefault((size, values.dtype), []).append(index)
    alphas: dict[int, jax.Array] = {}
    for (size, _), members in groups.items():
        pads = [size - spectra[i].shape[1] for i in members]
        rows = [
            jnp.pad(spectra[i], ((0, 0), (pad, 0))) for i, pad in zip(members, pads, strict=True)
        ]
        counts = [len(row) for row in rows]
        first = np.repeat(np.array(pads, np.int32), counts)
        found = _fitted(jnp.concatenate(rows), first, options)
        alphas.update(zip(members, jnp.split(found, np.cumsum(counts)[:-1].tolist()), strict=True))
    return [alphas[index] for index in range(len(spectra))]


@functools.partial(jax.jit, static_argnums=2)
def _fitted(rows: jax.Array, first: jax.Array, options: Fit) -> jax.Array:
    # NaN is sorted last; it must not pass for a large eigenvalue.
    finite = jnp.all(jnp.isfinite(rows), axis=1)
    alphas = jax.vmap(options.alpha)(jnp.where(finite[:, None], rows, 1), first)
    return jnp.where(finite, alphas, jnp.nan)
