"""Balls around the anchor: the norms that measure a layer's deviation, and the projection.

The ball of radius γ around a layer's anchor θ₀ (Tian et al., CVPR 2023 and NeurIPS 2023; the norms
as in Gouk, Hospedales, Pontil: "Distance-Based Regularisation of Deep Networks for Fine-Tuning",
ICLR 2021, https://arxiv.org/abs/2002.08253):

    l2:    n = ‖Δ‖₂                        one number a layer
    mars:  n_j = Σ |Δ_j|                    one a row j: the weights of one output unit
    θ' = θ₀ + clip(γ / (n + 1e-8), 0, 1) Δ  each row by its own n, all with the layer's γ

so that afterwards max_j n_j <= γ. (MARS stands for maximum absolute row sum.) Rows are output
units whatever the axis they lie on (``layers=``); an array of rank 0 or 1 is one row. In a group
of arrays each keeps its rows. :func:`project` differs in one thing from the authors' code: a row
with n <= γ is left as it is, to the bit, where theirs shrinks it if n + 1e-8 > γ; so projecting
twice is projecting once.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optax_spd import checkpoints, checks, deviations, layers as layers_lib, mapped_axes, plans

PyTree = Any
Leaves = Sequence[jax.Array | None]

NORMS = ("l2", "mars")
EPS = 1e-8
"""Added to norms, and the smallest radius, in the authors' code of TPGM and of FTP."""


def check_norm(norm: Any, axis_name: Any = None) -> None:
    """Checks ``norm=`` when a stage is built.

    Raises:
      ValueError: an unknown norm, or ``axis_name`` names axes but the norm needs to know which of
        an array's axes they split.
    """
    if norm not in NORMS:
        raise ValueError(f"norm must be 'l2' or 'mars', got {norm!r}.")
    if norm == "mars" and mapped_axes.is_names(axis_name):
        raise ValueError(
            f"norm='mars' sums along some of an array's axes and takes the maximum along others, "
            f"and axis_name={axis_name!r} does not tell which of them are split. Give axis_name "
            "the PartitionSpecs (the in_specs of shard_map), or use norm='l2'."
        )


class BallNorms(NamedTuple):
    """How far each layer is from its anchor.

    Attributes:
      rows: per leaf its rows' norms, shaped to broadcast against the array; None where there is
        no layer.
      smallest: each layer's smallest row norm, a per-layer vector.
      largest: each layer's largest: the norm that a radius limits.
    """

    rows: list[jax.Array | None]
    smallest: jax.Array
    largest: jax.Array


def ball_norms(
    norm: str,
    plan: plans.LayerPlan,
    axes: Sequence[mapped_axes.MeshAxes] | None,
    *arrays: Leaves,
) -> tuple[BallNorms, ...]:
    """Measures one or several trees of deviations, together.

    Args:
      norm: "l2" or "mars".
      plan: the layers.
      axes: per leaf the hand-mapped mesh axes, or None.
      *arrays: deviations, each a list with one array per leaf, or None where there is no layer.
        All have arrays at the same leaves.
    """
    if norm == "l2":
        squares = _together(lambda *leaves: tuple(x**2 for x in leaves), *arrays)
        sums = deviations.layer_sums(plan, squares, len(arrays), axes)
        return tuple(
            _l2_norms(plan, total, leaves) for total, leaves in zip(sums, arrays, strict=True)
        )
    sizes = _together(lambda *leaves: tuple(jnp.abs(x) for x in leaves), *arrays)
    rows = deviations.row_sums(plan, sizes, axes)
    return tuple(_mars_norms(plan, rows, which) for which in range(len(arrays)))


def norms_and_slope(
    norm: str,
    plan: plans.LayerPlan,
    axes: Sequence[mapped_axes.MeshAxes] | None,
    previous: Leaves,
    current: Leaves,
    grads: Leaves,
) -> tuple[BallNorms, jax.Array]:
    """The norms of ``current``, and per layer Σ_j ⟨g_j, P_j⟩ / (n(P)_j + 1e-8) of ``previous`` P.

    All row sums at once: under a partitioner each would else wait for the one before it.

    Args:
      norm: "l2" or "mars".
      plan: the layers.
      axes: per leaf the hand-mapped mesh axes, or None.
      previous: P, as for :func:`ball_norms`.
      current: as for :func:`ball_norms`.
      grads: g.
    """
    if norm == "l2":
        terms = _together(lambda p, c, g: (p**2, c**2, g * p), previous, current, grads)
        before, now, aligned = deviations.layer_sums(plan, terms, 3, axes)
        return _l2_norms(plan, now, current), aligned / (deviations.norm_of(before) + EPS)
    terms = _together(lambda p, c, g: (jnp.abs(p), jnp.abs(c), g * p), previous, current, grads)
    rows = deviations.row_sums(plan, terms, axes, lambda before, _, a: a / (before + EPS))
    return _mars_norms(plan, rows, 1), rows.totals


def _together(function: Callable[..., tuple[jax.Array, ...]], *arrays: Leaves) -> list[Any]:
    """``function`` of the leaves that stand at one place, where there are some."""
    return [
        None if leaves[0] is None else function(*leaves) for leaves in zip(*arrays, strict=True)
    ]


def _mars_norms(plan: plans.LayerPlan, rows: deviations.RowSums, which: int) -> BallNorms:
    """The norms that are number ``which`` of the rows' sums."""
    own, known = (
        [None if sums is None else sums[which] for sums in per_leaf]
        for per_leaf in (rows.own, rows.known)
    )
    return BallNorms(own, *deviations.layer_extremes(plan, known, rows.differing))


def _l2_norms(plan: plans.LayerPlan, square: jax.Array, arrays: Leaves) -> BallNorms:
    vector = deviations.norm_of(square)
    return BallNorms(deviations.spread_over(plan, vector, arrays), vector, vector)


def ball_factor(radius: jax.Array, norm: jax.Array) -> jax.Array:
    """What the deviation is multiplied by: clip(γ / (n + 1e-8), 0, 1), as the authors write it.

    Its derivative is 0 wherever it is clipped, also at the ends, where ``jnp.clip``'s is 1/2.
    """
    length = norm + EPS
    below = radius / length < 1
    inside = (radius > 0) & below
    # The inner select keeps an infinite radius out of the derivative, where it would make NaN.
    return jnp.where(inside, jnp.where(inside, radius, 0) / length, ~below)


def project(
    params: PyTree,
    anchor: PyTree,
    radii: jax.typing.ArrayLike,
    *,
    norm: str = "mars",
    layers: layers_lib.LayerFn | None = None,
    mask: Any = None,
) -> PyTree:
    r"""Projects each layer onto the ball of its radius around the anchor.

    .. math::

        \theta' = \theta_0 + \min\left(1, \frac{\gamma}{n}\right) (\theta - \theta_0)

    where n is the Euclidean norm of the layer's deviation ("l2"), or of each output unit the sum
    of its absolute deviations ("mars": every output unit has its own n, all share the layer's
    radius). May be jitted and differentiated; works on sharded parameters.

    Args:
      params: θ.
      anchor: θ₀; matched by path.
      radii: γ >= 0: a scalar, or one per layer in :func:`optax_spd.layer_names` order (what
        ``tpgm_radii``, ``ftp_radii`` and :func:`optax_spd.fit_radii` hold). 0 gives the anchor,
        infinity leaves the layer alone.
      norm: "mars" or "l2".
      layers: what a layer is and which axes count its output units, see :func:`optax_spd.outputs`.
      mask: True where to project, as for :func:`optax_spd.spd`; the rest is returned as it is.

    Returns:
      A tree like ``params``, with its dtypes. A row that is inside its ball comes back bit by bit;
      one outside lands on its surface (within 1e-8 and rounding). Leaves that are no layers
      (integers, empty, None), and layers that are not finite, are those of ``params``.

    Raises:
      TypeError: a complex parameter.
      ValueError: an unknown norm; ``radii`` negative, NaN or of another shape; trees or shapes
        that do not match.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax_spd
      >>> params, anchor = {"bias": jnp.array([3.0, 4.0])}, {"bias": jnp.zeros(2)}
      >>> optax_spd.project(params, anchor, 2.5, norm="l2")
      {'bias': Array([1.5, 2. ], dtype=float32)}

    References:
      Tian et al., `Trainable Projected Gradient Method for Robust Fine-tuning
      <https://arxiv.org/abs/2303.10720>`_, CVPR 2023; Gouk et al., `Distance-Based Regularisation
      of Deep Networks for Fine-Tuning <https://arxiv.org/abs/2002.08253>`_, ICLR 2021.
    """
    check_norm(norm)
    check_radii(radii)
    plan = checkpoints.plan_of(params, layers, mask)
    pretrained = checkpoints.matched_anchor(params, anchor, plan)
    displaced = checkpoints.displacement(params, pretrained, plan)
    vector = deviations.per_layer("radii", radii, plan)
    (norms,) = ball_norms(norm, plan, None, displaced.deltas)
    multipliers = factors(plan, vector, norms, jnp.isfinite(norms.largest), exact=True)
    return displaced.filled(displaced.projected(multipliers))


def check_radii(radii: Any) -> None:
    """Refuses concrete radii that are negative or NaN; infinity is no bound.

    Raises:
      TypeError: not numeric.
      ValueError: a negative number or a NaN.
    """
    checks.check_real("radii", radii)
    # NumPy: under jit jnp would trace the comparison, also that of a concrete number.
    if not isinstance(radii, jax.core.Tracer) and not np.all(np.asarray(radii) >= 0):
        raise ValueError(f"radii must not be negative or NaN, got {radii}.")


def factors(
    plan: plans.LayerPlan,
    radii: jax.Array,
    norms: BallNorms,
    acts: jax.Array,
    *,
    exact: bool = False,
) -> list[jax.Array | None]:
    """Per leaf what its deviation is multiplied by.

    Args:
      plan: the layers.
      radii: a per-layer vector.
      norms: the layers' norms.
      acts: per layer whether to project it; the others get 1.
      exact: whether rows inside their ball get 1 exactly. Otherwise the 1e-8 in the denominator
        draws one that is within 1e-8 of the surface in by as much, as in the authors' code.
    """
    result: list[jax.Array | None] = []
    for entry, rows in zip(plan.arrays, norms.rows, strict=True):
        if entry is None or rows is None:
            result.append(None)
            continue
        radius = deviations.spread(entry, radii, rows.ndim).astype(rows.dtype)
        factor = ball_factor(radius, rows)
        if exact:
            factor = jnp.where(rows <= radius, 1, factor)
        result.append(jnp.where(deviations.spread(entry, acts, rows.ndim), factor, 1))
    return result
