"""Balls around the anchor: norms of a layer's deviation, and the projection onto a ball.

The ball of radius γ around a layer's anchor θ₀ (Tian et al., CVPR 2023 and NeurIPS 2023; the norms
as in Gouk, Hospedales, Pontil: "Distance-Based Regularisation of Deep Networks for Fine-Tuning",
ICLR 2021, https://arxiv.org/abs/2002.08253):

    l2:    n = ‖Δ‖₂                        one number a layer
    mars:  n_j = Σ |Δ_j|                    one number a row j: the weights of one output unit
    θ' = θ₀ + clip(γ / (n + 1e-8), 0, 1) Δ  each row by its own n, all with the layer's γ

so that afterwards max_j n_j <= γ. (MARS stands for maximum absolute row sum.) Rows are output
units, on whatever axis they lie (``layers=``); an array of rank 0 or 1 is one row. Each array of a
group has its own rows. An l2 norm is finite if Δ is. A row norm may overflow; its layer passes
through.
"""

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optax_spd.core.rows import RowSums, layer_extremes, row_sums
from optax_spd.core.sums import layer_sums, norm_of, sharded_like, spread, spread_over
from optax_spd.layers import checks, plans
from optax_spd.layers.types import Norm
from optax_spd.sharding import manual_axes

Leaves = Sequence[jax.Array | None]

NORMS = ("l2", "mars")
EPS = 1e-8
"""The smallest radius, and what is added to norms, in the authors' code of TPGM and FTP."""


def check_norm(norm: Any, axis_name: Any = None) -> None:
    """Checks ``norm=`` when a stage is built.

    Raises:
      ValueError: an unknown norm, or "mars" with an ``axis_name`` that does not say which array
        axes are split.
    """
    if norm not in NORMS:
        raise ValueError(f"norm must be 'l2' or 'mars', got {norm!r}.")
    if norm == "mars":
        manual_axes.require_specs(
            axis_name,
            "norm='mars' sums along some of an array's axes and takes the maximum along others",
            ", or use norm='l2'",
        )


class BallNorms(NamedTuple):
    """Norms of the deviation, by row and by layer.

    Attributes:
      rows: per leaf its rows' norms, shaped to broadcast against the array; None where there is
        no layer.
      smallest: each layer's smallest row norm, a per-layer vector.
      largest: each layer's largest row norm, which the radius limits.
    """

    rows: list[jax.Array | None]
    smallest: jax.Array
    largest: jax.Array


def ball_norms(
    norm: Norm,
    plan: plans.LayerPlan,
    axes: Sequence[manual_axes.MeshAxes] | None,
    *arrays: Leaves,
) -> tuple[BallNorms, ...]:
    """The norms of one or several trees of deviations, measured together.

    Args:
      norm: "l2" or "mars".
      plan: the layers.
      axes: per leaf the mesh axes that split it by hand, or None.
      *arrays: deviations, each a list with one array per leaf, or None where there is no layer.
        All have arrays at the same leaves.
    """
    if norm == "l2":
        terms = _map_leaves(functools.partial(_all_squares, plan.dtype), *arrays)
        totals = layer_sums(plan, terms, 2 * len(arrays), axes)
        return tuple(
            _l2_norms(plan, l2_norm(square, scaled), leaves)
            for square, scaled, leaves in zip(totals[::2], totals[1::2], arrays, strict=True)
        )
    measured = row_sums(plan, _map_leaves(_sizes, *arrays), axes)
    return tuple(_mars_norms(plan, measured, number) for number in range(len(arrays)))


def norms_and_slope(
    norm: Norm,
    plan: plans.LayerPlan,
    axes: Sequence[manual_axes.MeshAxes] | None,
    previous: Leaves,
    current: Leaves,
    grads: Leaves,
) -> tuple[BallNorms, jax.Array]:
    """The norms of ``current``, and per layer Σ_j ⟨g_j, P_j⟩ / (n(P)_j + 1e-8) of ``previous`` P.

    All row sums are taken together; under a partitioner they would otherwise run one after another.

    Args:
      norm: "l2" or "mars".
      plan: the layers.
      axes: per leaf the mesh axes that split it by hand, or None.
      previous: P, as for :func:`ball_norms`.
      current: as for :func:`ball_norms`.
      grads: g.
    """
    if norm == "l2":
        terms = _map_leaves(
            functools.partial(_squares_and_product, plan.dtype), previous, current, grads
        )
        *squares, product = layer_sums(plan, terms, 5, axes)
        previous_norm, current_norm = l2_norm(*squares[:2]), l2_norm(*squares[2:])
        return _l2_norms(plan, current_norm, current), product / (previous_norm + EPS)
    terms = _map_leaves(_sizes_and_product, previous, current, grads)
    measured = row_sums(
        plan, terms, axes, lambda previous_norm, _, product: (product / (previous_norm + EPS),)
    )
    (slope,) = measured.totals
    return _mars_norms(plan, measured, 1), slope


def whole_norms(
    plan: plans.LayerPlan, axes: Sequence[manual_axes.MeshAxes] | None, *arrays: Leaves
) -> tuple[jax.Array, ...]:
    """The l2 norms of one or several trees, each over all its arrays together.

    A layer that is not finite in one of the trees is left out of all norms, so that it does not
    reach the others.

    Args:
      plan: the layers.
      axes: per leaf the mesh axes that split it by hand, or None.
      *arrays: as for :func:`ball_norms`.
    """
    norms = [norm.largest for norm in ball_norms("l2", plan, axes, *arrays)]
    finite = functools.reduce(operator.and_, map(jnp.isfinite, norms))
    return tuple(_joined(jnp.where(finite, norm, 0)) for norm in norms)


def _joined(norms: jax.Array) -> jax.Array:
    """√Σ n², of numbers scaled so that no square overflows or vanishes."""
    # XLA multiplies by the reciprocal of the scale, which would vanish for the largest numbers.
    largest = jnp.minimum(jnp.max(norms), 1 / _scale(norms.dtype))
    scale = jnp.where(largest > 0, largest, 1)
    return scale * norm_of(jnp.sum((norms / scale) ** 2))


def clip_factor(norm: jax.Array, bound: jax.Array) -> jax.Array:
    """min(1, bound / norm); 1 where the norm is 0."""
    outside = norm > bound
    return jnp.where(outside, bound / jnp.where(outside, norm, 1), 1)


def _map_leaves(function: Callable[..., tuple[jax.Array, ...]], *arrays: Leaves) -> list[Any]:
    """Per leaf ``function`` of the lists' arrays; None where there is no layer."""
    return [
        None if leaves[0] is None else function(*leaves) for leaves in zip(*arrays, strict=True)
    ]


def _mars_norms(plan: plans.LayerPlan, rows: RowSums, number: int) -> BallNorms:
    """The norms from the row sums of product ``number``."""
    local, gathered = (
        [None if sums is None else sums[number] for sums in per_leaf]
        for per_leaf in (rows.local, rows.gathered)
    )
    return BallNorms(local, *layer_extremes(plan, gathered, rows.varying))


def _l2_norms(plan: plans.LayerPlan, norms: jax.Array, arrays: Leaves) -> BallNorms:
    return BallNorms(spread_over(plan, norms, arrays), norms, norms)


# Jitted so that arrays of one shape share a trace; not within a function, so that eager updates do.


@functools.partial(jax.jit, static_argnums=0)
def _all_squares(dtype: Any, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    return tuple(square for x in arrays for square in _squares(x, dtype))


@functools.partial(jax.jit, static_argnums=0)
def _squares_and_product(
    dtype: Any, previous: jax.Array, current: jax.Array, gradient: jax.Array
) -> tuple[jax.Array, ...]:
    return *_squares(previous, dtype), *_squares(current, dtype), gradient * previous


@jax.jit
def _sizes(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    return tuple(jnp.abs(x) for x in arrays)


@jax.jit
def _sizes_and_product(
    previous: jax.Array, current: jax.Array, gradient: jax.Array
) -> tuple[jax.Array, ...]:
    return jnp.abs(previous), jnp.abs(current), gradient * previous


def _squares(x: jax.Array, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """The squares of ``x``, and those of ``x`` times a power of 2 small enough not to overflow."""
    x = x.astype(dtype)
    return x**2, (x * _scale(dtype)) ** 2


def _scale(dtype: Any) -> Any:
    """2^-96 in float32: even 2^60 of the largest numbers have squares with a finite sum."""
    return np.ldexp(np.ones((), dtype), -3 * jnp.finfo(dtype).maxexp // 4)


def l2_norm(square: jax.Array, scaled: jax.Array) -> jax.Array:
    """‖x‖₂ from the sums of :func:`_squares`; not finite only if an entry of x is not.

    A norm above the largest number of its dtype is that number.
    """
    overflows = ~jnp.isfinite(square) & jnp.isfinite(scaled)
    dtype = square.dtype
    root = norm_of(jnp.where(overflows, scaled, 0))
    large = jnp.minimum(root, jnp.finfo(dtype).max * _scale(dtype)) / _scale(dtype)
    return jnp.where(overflows, large, norm_of(jnp.where(overflows, 0, square)))


@functools.partial(jax.jit, static_argnames="exact")  # so that arrays of one shape share a trace
def ball_factor(
    radius: jax.Array, norm: jax.Array, active: jax.Array | bool = True, *, exact: bool = False
) -> jax.Array:
    """The factor on the deviation: clip(γ / (n + 1e-8), 0, 1), as in the authors' code.

    Its derivative is 0 wherever it is clipped, also at both ends, where ``jnp.clip``'s is 1/2.

    Args:
      radius: γ.
      norm: n.
      active: where False, the factor is 1.
      exact: whether the factor is 1 for all n <= γ. Otherwise the 1e-8 in the denominator slightly
        shrinks a row whose norm is within 1e-8 of the radius, as in the authors' code.
    """
    length = norm + EPS
    outside = active & (radius / length < 1)
    if exact:
        outside = outside & (norm > radius)
    shrinks = outside & (radius > 0)
    # The select keeps an infinite radius out of the derivative, where it would give NaN. The
    # division comes last, because XLA:CPU does not fuse a division into the kernel that uses its
    # result. Fused, the kernel would read one entry of the vector of radii, and arrays of one shape
    # could not share it.
    otherwise = (~outside).astype(length.dtype)
    return jnp.where(shrinks, radius, otherwise) / jnp.where(shrinks, length, 1)


def check_radii(radii: Any) -> None:
    """Raises for concrete radii that are negative or NaN; infinity means no bound.

    Raises:
      TypeError: not numeric.
      ValueError: a negative number or a NaN.
    """
    checks.check_real("radii", radii)
    # NumPy, because under jit jnp would trace the comparison even of concrete radii.
    if not isinstance(radii, jax.core.Tracer) and not np.all(np.asarray(radii) >= 0):
        raise ValueError(f"radii must not be negative or NaN, got {radii}.")


def factors(
    plan: plans.LayerPlan,
    radii: jax.Array,
    norms: BallNorms,
    active: jax.Array,
    *,
    exact: bool = False,
) -> list[jax.Array | None]:
    """Per leaf the factor on its deviation.

    Args:
      plan: the layers.
      radii: a per-layer vector.
      norms: the layers' norms.
      active: per layer whether to project it; the others get 1.
      exact: as for :func:`ball_factor`.
    """
    result: list[jax.Array | None] = []
    for entry, rows in zip(plan.arrays, norms.rows, strict=True):
        if entry is None or rows is None:
            result.append(None)
            continue
        radius = sharded_like(spread(entry, radii, rows.ndim).astype(rows.dtype), rows)
        is_active = sharded_like(spread(entry, active, rows.ndim), rows)
        result.append(ball_factor(radius, rows, is_active, exact=exact))
    return result
