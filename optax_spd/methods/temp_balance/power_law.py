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
2. Eigenvalues come from a Gram matrix where it has enough digits of them, see
   :mod:`optax_spd.methods.temp_balance.spectra`.
3. An eigenvalue of 0 counts as the smallest positive number, so its logarithm is finite; a matrix
   with an entry that is not finite has α = NaN. Eigenvalues that differ by no more than rounding
   (an orthogonal matrix has all of them equal) count as equal: α is infinite and not some large
   number.
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

from optax_spd.layers import checks, plans
from optax_spd.methods.temp_balance import spectra

FITS = ("median", "goodness-of-fit", "fix-finger")
ZERO = 1e-5  # eigenvalues up to here are zeros to ``filter_zeros``, as in the authors' code

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
        # Plain numbers, whatever they came as: the options are hashed, as a static argument.
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
        """Whether eigenvalues decide of which a Gram matrix may have no digits.

        "fix-finger" bins the smallest of all, ``filter_zeros`` compares them with a threshold, and
        a tail that starts low has many small ones. "goodness-of-fit" tries all starts, but the
        best one is hardly among the smallest eigenvalues.
        """
        low = self.fit == "median" and self.xmin_pos > 4
        return self.fit == "fix-finger" or self.filter_zeros or low

    def alpha(self, relative: jax.Array, scale: jax.Array, first: jax.Array) -> jax.Array:
        """α of ascending eigenvalues ``scale * relative``, shape (N,), padded before ``first``."""
        N = relative.shape[0]
        tiny = jnp.finfo(relative.dtype).tiny
        largest = relative[-1]
        # α does not depend on the scale; relative to the largest no quotient overflows.
        e = jnp.where(largest > 0, relative / jnp.where(largest > 0, largest, 1), 1)
        e = jnp.maximum(e, tiny)
        eigenvalues = scale * relative
        if self.filter_zeros:
            kept = jnp.sum(eigenvalues > ZERO, dtype=first.dtype)
            first = jnp.where(kept > 0, N - kept, first)
        if self.fit == "median":
            # A table of what floor(n / xmin_pos) is in double precision, for any number kept.
            starts = np.floor(np.arange(N + 1) / self.xmin_pos).astype(np.int32)
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

    Equal but for rounding, that is: no eigenvalue is known to better than about N eps.

    Args:
      e: ascending positive eigenvalues, shape (N,).
      i: where the tail starts, an integer.
    """
    N = e.shape[0]
    j = jnp.arange(N)
    n = (N - i).astype(e.dtype)
    logs = jnp.where(j >= i, jnp.log(e / e[i]), 0)  # ln(e_j / e_i); 0 outside of the tail
    total = jnp.sum(logs)
    apart = total > n * N * jnp.finfo(e.dtype).eps
    alpha = jnp.where(apart, 1 + n / jnp.where(apart, total, 1), jnp.inf)
    fitted = 1 - jnp.exp(jnp.where(apart, 1 - alpha, 0) * logs)
    distance = jnp.max(jnp.where(j >= i, jnp.abs(fitted - (j - i) / n), 0))
    return alpha, jnp.where(apart, distance, 1)


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
        in Flax; any floating dtype. One layer: ``vmap`` over stacked ones. (Three axes are a
        convolution here; ``temp_balance`` takes them for an attention kernel.)
      fit: where the tail starts. "median": at eigenvalue N / ``xmin_pos``; "goodness-of-fit":
        where the Kolmogorov-Smirnov distance to the power law is least; "fix-finger": the same
        near the peak of the spectrum's histogram.
      xmin_pos: greater than 1; for "median".
      conv_norm: what the eigenvalues of convolutions (rank 3 and more) are multiplied by.
      filter_zeros: leave out eigenvalues up to 1e-5, unless that is all of them. For weights of
        low rank, whose other eigenvalues are rounding.
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
    matrices = array.astype(plans.compute_dtype(array)).reshape(1, -1, *array.shape[-2:])
    alpha: jax.Array = _alpha_of(matrices, options, array.ndim > 2)
    return alpha


@functools.partial(jax.jit, static_argnums=(1, 2))  # one program, also where it is called eagerly
def _alpha_of(matrices: jax.Array, options: Fit, convolution: bool) -> jax.Array:
    spectrum = spectra.decomposed(matrices, exact=options.exact)
    if convolution:
        spectrum = conv_scaled(spectrum, options)
    return fitted_alphas([spectrum], options)[0][0]


def conv_scaled(spectrum: spectra.Spectrum, options: Fit) -> spectra.Spectrum:
    """A convolution's spectrum, with ``conv_norm``."""
    return spectrum._replace(scale=spectrum.scale * options.conv_norm)


def fitted_alphas(found: Sequence[spectra.Spectrum], options: Fit) -> list[jax.Array]:
    """α of layers from their spectra; layers of similar size are fitted together.

    Returns:
      Per spectrum a vector with one entry per layer; NaN for a weight that is not finite.
    """
    # Padded to powers of two there are few shapes, each of which is a program to compile.
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
        together = _fitted(
            jnp.concatenate(padded),
            jnp.concatenate([found[i].scale for i in members]),
            np.repeat(np.array(pads, np.int32), counts),
            options,
        )
        ends = np.cumsum(counts)[:-1].tolist()
        alphas.update(zip(members, jnp.split(together, ends), strict=True))
    return [alphas[index] for index in range(len(found))]


@functools.partial(jax.jit, static_argnums=3)
def _fitted(relative: jax.Array, scale: jax.Array, first: jax.Array, options: Fit) -> jax.Array:
    whole = ~jnp.isnan(scale)
    # Infinite only by overflow: as good as the largest number where it is compared.
    bounded = jnp.where(whole, jnp.minimum(scale, jnp.finfo(scale.dtype).max), 1)
    N = relative.shape[1]
    # "median" takes N numbers a layer, the others SMALL N.
    most = spectra.BATCH_BYTES // (min(N, SMALL) * N * relative.dtype.itemsize)
    if options.fit == "median" or len(relative) <= most:
        alphas = jax.vmap(options.alpha)(relative, bounded, first)
    else:
        each = (relative, bounded, first)
        alphas = jax.lax.map(lambda row: options.alpha(*row), each, batch_size=max(1, most))
    return jnp.where(whole, alphas, jnp.nan)
