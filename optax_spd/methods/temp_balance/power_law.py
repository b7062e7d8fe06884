"""PL_Alpha_Hill: Hill's estimate of the power-law exponent of a weight matrix's spectrum.

Hill: "A Simple General Approach to Inference About the Tail of a Distribution", Annals of
Statistics 1975; for weight matrices Zhou, Pang, Liu, Yang, Yan, Gal, Mahoney, Yang: "Temperature
Balancing, Layer-wise Weight Analysis, and Neural Network Training", NeurIPS 2023,
https://arxiv.org/abs/2312.00359; the authors' code: YefanZhou/TempBalance. For a matrix W with
eigenvalues e_0 <= ... <= e_{N-1} of WWᵀ (the squared singular values), and a tail of the n = N - i
largest:

    α_i = 1 + n / Σ_{j>=i} ln(e_j / e_i)                              Hill's estimate
    D_i = max_{j>=i} |1 - (e_j / e_i)^(1 - α_i) - (j - i) / n|        Kolmogorov-Smirnov distance

    "median"            i = floor(N / xmin_pos)
    "goodness-of-fit"   the first i <= N - 2 with the smallest D_i
    "fix-finger"        the same, but only i with log10(0.95 x) <= e_i <= 1.5 x, where x is the left
                        edge of the fullest of ``bins`` bins of log10 e

A small α means a heavy tail: a well-trained layer. The eigenvalues of a convolution are those of
√conv_norm times the (in, out) matrices of all its spatial positions, pooled.

Differences from the authors' code:

1. It sums ln(e_j / e_i); they sum ln e_j and ln e_i separately. The result is the same without the
   cancellation.
2. Eigenvalues come from a Gram matrix where that is accurate enough, see
   :mod:`optax_spd.methods.temp_balance.spectra`.
3. An eigenvalue of 0 is replaced by the smallest positive number, so its logarithm is finite. A
   matrix with an entry that is not finite has α = NaN. Eigenvalues that differ only by rounding
   (those of an orthogonal matrix) are treated as equal: α is infinite, not some large number.
4. The lower bound of "fix-finger" compares an eigenvalue with a logarithm, as in their code. It is
   kept to reproduce their numbers.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from optax_spd.layers import checks, plans
from optax_spd.methods.temp_balance import spectra

FitMethod = Literal["median", "goodness-of-fit", "fix-finger"]
FITS = get_args(FitMethod)
ZERO = 1e-5  # ``filter_zeros`` drops eigenvalues up to this, as in the authors' code

STARTS = 256  # how many starts of the tail are tried at once


@dataclasses.dataclass(frozen=True)
class Fit:
    """The checked arguments of :func:`power_law_alpha`: how to fit an exponent to a spectrum."""

    fit: FitMethod = "median"
    xmin_pos: float = 2
    conv_norm: float = 0.5
    filter_zeros: bool = False
    bins: int = 100

    def __post_init__(self) -> None:
        """Raises TypeError or ValueError for an invalid argument."""
        if self.fit not in FITS:
            raise ValueError(f"fit must be one of {', '.join(map(repr, FITS))}, got {self.fit!r}.")
        # Converted to Python numbers, because a static argument of jit is hashed.
        object.__setattr__(self, "xmin_pos", _static_number("xmin_pos", self.xmin_pos))
        object.__setattr__(self, "conv_norm", _static_number("conv_norm", self.conv_norm))
        if not self.xmin_pos > 1:
            raise ValueError(
                "xmin_pos must be greater than 1 (the tail starts at eigenvalue N / xmin_pos), "
                f"got {self.xmin_pos}."
            )
        if not self.conv_norm > 0:
            raise ValueError(f"conv_norm must be greater than 0, got {self.conv_norm}.")
        checks.check_flag("filter_zeros", self.filter_zeros)
        checks.check_static("bins", self.bins)
        checks.check_count("bins", self.bins)
        object.__setattr__(self, "bins", int(self.bins))

    @property
    def exact(self) -> bool:
        """Whether the fit depends on eigenvalues too small for a float32 Gram matrix.

        "fix-finger" bins the smallest eigenvalues, ``filter_zeros`` compares them with a threshold,
        and a tail that starts low has many small ones. "goodness-of-fit" tries all starts, but the
        best one is rarely among the smallest eigenvalues.
        """
        includes_small = self.fit == "median" and self.xmin_pos > 4
        return self.fit == "fix-finger" or self.filter_zeros or includes_small

    def alpha(self, relative: jax.Array, scale: jax.Array, first: jax.Array) -> jax.Array:
        """α of ascending eigenvalues ``scale * relative``, shape (N,).

        Entries before ``first`` are padding.
        """
        N = relative.shape[0]
        tiny = jnp.finfo(relative.dtype).tiny
        largest = relative[-1]
        # α does not depend on the scale. Dividing by the largest keeps quotients from overflowing.
        e = jnp.where(largest > 0, relative / jnp.where(largest > 0, largest, 1), 1)
        e = jnp.maximum(e, tiny)
        eigenvalues = scale * relative
        if self.filter_zeros:
            kept = jnp.sum(eigenvalues > ZERO, dtype=first.dtype)
            first = jnp.where(kept > 0, N - kept, first)
        if self.fit == "median":
            # floor(n / xmin_pos) for every possible n, computed on the host in double precision.
            starts = np.floor(np.arange(N + 1) / self.xmin_pos).astype(np.int32)
            start = jax.lax.dynamic_index_in_dim(starts, N - first, keepdims=False)
            return hill(e, first + start)[0]
        i = jnp.arange(N, dtype=first.dtype)
        candidate = (i >= first) & (i <= N - 2)
        if self.fit == "fix-finger":
            x = _fullest_bin(jnp.log10(jnp.maximum(eigenvalues, tiny)), i >= first, self.bins)
            candidate &= (eigenvalues >= jnp.log10(0.95 * x)) & (eigenvalues <= 1.5 * x)
        if N <= STARTS:
            alphas, distances = jax.vmap(lambda start: hill(e, start))(i)
        else:  # in batches: all pairs (i, j) at once would need N² numbers
            alphas, distances = jax.lax.map(lambda start: hill(e, start), i, batch_size=STARTS)
        best = jnp.argmin(jnp.where(candidate, distances, jnp.inf))
        return jnp.where(jnp.any(candidate), alphas[best], 0)


def _static_number(name: str, value: Any) -> float:
    """Checks a number that must be static under ``jit``, and returns it as a float."""
    checks.check_static(name, value)
    checks.check_scalar(name, value)
    return float(value)


def hill(e: jax.Array, i: jax.Array) -> tuple[jax.Array, jax.Array]:
    """α_i and D_i of the tail that starts at i; infinity and 1 if its eigenvalues are equal.

    They are treated as equal within about N eps, the accuracy of a computed eigenvalue.

    Args:
      e: ascending positive eigenvalues, shape (N,).
      i: index of the first eigenvalue in the tail.
    """
    N = e.shape[0]
    j = jnp.arange(N, dtype=i.dtype)
    n = (N - i).astype(e.dtype)
    logs = jnp.where(j >= i, jnp.log(e / e[i]), 0)  # ln(e_j / e_i); 0 outside the tail
    total = jnp.sum(logs)
    distinct = total > n * N * jnp.finfo(e.dtype).eps
    alpha = jnp.where(distinct, 1 + n / jnp.where(distinct, total, 1), jnp.inf)
    fitted = 1 - jnp.exp(jnp.where(distinct, 1 - alpha, 0) * logs)
    distance = jnp.max(jnp.where(j >= i, jnp.abs(fitted - (j - i).astype(e.dtype) / n), 0))
    return alpha, jnp.where(distinct, distance, 1)


def _fullest_bin(logs: jax.Array, kept: jax.Array, bins: int) -> jax.Array:
    """Histograms the kept ``logs``: 10 to the left edge of the fullest bin, the first if tied."""
    low = jnp.min(jnp.where(kept, logs, jnp.inf))
    high = jnp.max(jnp.where(kept, logs, -jnp.inf))
    width = high - low
    # If all are equal, they fall into the first bin, whose edge is their value.
    position = jnp.floor((logs - low) / jnp.where(width > 0, width, 1) * bins)
    index = jnp.clip(position, 0, bins - 1).astype(jnp.int32)
    counts = jnp.zeros(bins, jnp.int32).at[index].add(kept.astype(jnp.int32))
    return 10 ** (low + jnp.argmax(counts).astype(logs.dtype) * width / bins)


def power_law_alpha(
    weight: jax.typing.ArrayLike,
    *,
    fit: FitMethod = "median",
    xmin_pos: float = 2,
    conv_norm: float = 0.5,
    filter_zeros: bool = False,
    bins: int = 100,
) -> jax.Array:
    r"""Estimates the power-law exponent of a weight's spectrum (PL_Alpha_Hill).

    .. math::

        \alpha = 1 + n \Big/ \sum_{j \ge i} \ln \frac{e_j}{e_i}

    over the n = N - i largest of its N eigenvalues. Small values mean a heavy tail. α does not
    depend on the weight's scale, except with "fix-finger" or ``filter_zeros``.

    Args:
      weight: shape (in, out), or a convolution's (..., in, out) with spatial positions in front, as
        in Flax; any floating dtype. One layer: ``vmap`` over stacked ones. (Three axes are read as
        a convolution here, but as an attention kernel by ``temp_balance``.)
      fit: where the tail starts. "median": at eigenvalue N / ``xmin_pos``; "goodness-of-fit":
        where the Kolmogorov-Smirnov distance to the power law is smallest; "fix-finger": the same,
        but only near the peak of the spectrum's histogram.
      xmin_pos: greater than 1; for "median".
      conv_norm: factor on the eigenvalues of convolutions (rank 3 and more).
      filter_zeros: leave out eigenvalues up to 1e-5, unless no others exist. For low-rank weights,
        whose remaining eigenvalues are rounding errors.
      bins: number of histogram bins for "fix-finger".

    Returns:
      α, shape (), float64 for a float64 weight, else float32. Infinity if all eigenvalues of the
      tail are equal; 0 if there is no candidate for its start; NaN if the weight is not finite. It
      may be jitted and vmapped.

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
            f"weight must be an array of at least two axes, not empty, got shape {array.shape}: "
            "only matrices and convolutions have a spectrum."
        )
    matrices = array.astype(plans.compute_dtype(array)).reshape(1, -1, *array.shape[-2:])
    alpha: jax.Array = _alpha_of(matrices, options, array.ndim > 2)
    return alpha


@functools.partial(jax.jit, static_argnums=(1, 2))  # compiled as one program for eager callers too
def _alpha_of(matrices: jax.Array, options: Fit, convolution: bool) -> jax.Array:
    spectrum = spectra.decomposed(matrices, exact=options.exact)
    if convolution:
        spectrum = conv_scaled(spectrum, options)
    return fitted_alphas([spectrum], options)[0][0]


def conv_scaled(spectrum: spectra.Spectrum, options: Fit) -> spectra.Spectrum:
    """A convolution's spectrum, multiplied by ``conv_norm``."""
    return spectrum._replace(scale=spectrum.scale * options.conv_norm)


def fitted_alphas(found: Sequence[spectra.Spectrum], options: Fit) -> list[jax.Array]:
    """α of layers from their spectra; layers of similar size are fitted together.

    Returns:
      For each spectrum a vector with one entry per layer; NaN for a weight that is not finite.
    """
    # Padding to powers of two gives few shapes, and so few programs to compile.
    groups: dict[Any, list[int]] = {}
    for index, spectrum in enumerate(found):
        size = 2 ** math.ceil(math.log2(spectrum.relative.shape[1]))
        groups.setdefault((size, spectrum.relative.dtype), []).append(index)
    alphas: dict[int, jax.Array] = {}
    for (size, _), members in groups.items():
        rows = [found[i].relative for i in members]
        counts = [len(row) for row in rows]
        pads = [size - row.shape[1] for row in rows]
        padded = [jnp.pad(row, ((0, 0), (pad, 0))) for row, pad in zip(rows, pads, strict=True)]
        fitted = _fitted(
            jnp.concatenate(padded),
            jnp.concatenate([found[i].scale for i in members]),
            np.repeat(np.array(pads, np.int32), counts),
            options,
        )
        ends = np.cumsum(counts)[:-1].tolist()
        alphas.update(zip(members, jnp.split(fitted, ends), strict=True))
    return [alphas[index] for index in range(len(found))]


@functools.partial(jax.jit, static_argnums=3)
def _fitted(relative: jax.Array, scale: jax.Array, first: jax.Array, options: Fit) -> jax.Array:
    is_finite = ~jnp.isnan(scale)
    # A scale is infinite only by overflow. The largest number compares the same way.
    bounded = jnp.where(is_finite, jnp.minimum(scale, jnp.finfo(scale.dtype).max), 1)
    N = relative.shape[1]
    # "median" needs N numbers a layer, the other fits STARTS N.
    batch_size = spectra.BATCH_BYTES // (min(N, STARTS) * N * relative.dtype.itemsize)
    if options.fit == "median" or len(relative) <= batch_size:
        alphas = jax.vmap(options.alpha)(relative, bounded, first)
    else:
        layers = (relative, bounded, first)
        alphas = jax.lax.map(lambda row: options.alpha(*row), layers, batch_size=max(1, batch_size))
    return jnp.where(is_finite, alphas, jnp.nan)
