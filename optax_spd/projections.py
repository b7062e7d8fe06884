"""Balls around the anchor: the norms that measure a layer's deviation, and the projection.

The ball of radius γ around a layer's anchor θ₀ (Tian et al., CVPR 2023 and NeurIPS 2023; the norms
as in Gouk, Hospedales, Pontil: "Distance-Based Regularisation of Deep Networks for Fine-Tuning",
ICLR 2021, https://arxiv.org/abs/2002.08253):

    l2:    n = ‖Δ‖₂                        one number a layer
    mars:  n_j = Σ |Δ_j|                    one a row j: the weights of one output unit
    θ' = θ₀ + min(1, γ / n) Δ              each row by its own n, all with the layer's γ

so that afterwards max_j n_j <= γ. (MARS stands for maximum absolute row sum.) Rows are output
units whatever the axis they lie on (``layers=``); an array of rank 0 or 1 is one row. In a group
of arrays each keeps its rows.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optax_spd import anchors, checks, deviations, layers as layers_lib, masks, trees

PyTree = Any

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
    if norm == "mars" and deviations.is_names(axis_name):
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
    plan: layers_lib.LayerPlan,
    axes: Sequence[deviations.MeshAxes] | None,
    *arrays: Sequence[jax.Array | None],
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
        squares = [
            None if leaves[0] is None else tuple(x**2 for x in leaves)
            for leaves in zip(*arrays, strict=True)
        ]
        vectors = [
            deviations.norm_of(square)
            for square in deviations.layer_sums(plan, squares, len(arrays), axes)
        ]
        return tuple(
            BallNorms(_spread(plan, vector, leaves), vector, vector)
            for vector, leaves in zip(vectors, arrays, strict=True)
        )
    sizes = [
        None if leaves[0] is None else tuple(jnp.abs(x) for x in leaves)
        for leaves in zip(*arrays, strict=True)
    ]
    sums = deviations.row_sums(plan, sizes, axes)
    all_rows = [[None if s is None else s[i] for s in sums] for i in range(len(arrays))]
    return tuple(BallNorms(rows, *deviations.layer_extremes(plan, rows, axes)) for rows in all_rows)


def _spread(
    plan: layers_lib.LayerPlan, vector: jax.Array, arrays: Sequence[jax.Array | None]
) -> list[jax.Array | None]:
    return [
        None
        if entry is None or array is None
        else deviations.spread(entry, vector, array.ndim).astype(array.dtype)
        for entry, array in zip(plan.arrays, arrays, strict=True)
    ]


def ball_factor(radius: jax.Array, norm: jax.Array) -> jax.Array:
    """What the deviation is multiplied by: clip(γ / (n + 1e-8), 0, 1), as the authors write it."""
    length = norm + EPS
    # Clipped before the division: an infinite radius would make its gradient NaN.
    return jnp.clip(jnp.minimum(radius, length) / length, 0, 1)


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
    plan = plan_of(params, layers, mask)
    displaced = displacement(params, matched_anchor(params, anchor, plan), plan)
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
    if isinstance(radii, jax.core.Tracer):
        return
    if not bool(jnp.all(jnp.asarray(radii) >= 0)):
        raise ValueError(f"radii must not be negative or NaN, got {radii}.")


def factors(
    plan: layers_lib.LayerPlan,
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


class Displacement(NamedTuple):
    """Two checkpoints as lists of leaves, in the order of the parameters.

    Attributes:
      flat: the parameters, with gaps.
      anchors: per layer's leaf θ₀ in at least float32, else None.
      deltas: per layer's leaf Δ = θ - θ₀, else None.
    """

    flat: trees.FlatTree
    anchors: list[jax.Array | None]
    deltas: list[jax.Array | None]

    def projected(self, multipliers: Sequence[jax.Array | None]) -> list[jax.Array | None]:
        """Per layer's leaf θ₀ + f Δ in the parameter's dtype; θ itself where f = 1."""
        return [
            None
            if theta_0 is None or delta is None or f is None
            else jnp.where(
                (f < 1) | jnp.zeros_like(delta, bool),
                (theta_0 + f * delta).astype(jnp.result_type(theta)),
                theta,
            )
            for theta, theta_0, delta, f in zip(
                self.flat.leaves, self.anchors, self.deltas, multipliers, strict=True
            )
        ]

    def filled(self, leaves: Sequence[jax.Array | None]) -> PyTree:
        """The parameter tree with other values in its layers."""
        return self.flat.unflatten(
            theta if leaf is None else leaf
            for theta, leaf in zip(self.flat.leaves, leaves, strict=True)
        )


def plan_of(params: PyTree, layers: layers_lib.LayerFn | None, mask: Any) -> layers_lib.LayerPlan:
    """The layers of a parameter tree under a mask."""
    layers_lib.check_layers(layers)
    flat = trees.flatten(params)
    return layers_lib.plan_layers(flat, layers, masks.resolve_mask(mask, params, flat))


def matched_anchor(params: PyTree, anchor: PyTree, plan: layers_lib.LayerPlan) -> list[Any]:
    """Per leaf the anchor's array where there is a layer, else None.

    Raises:
      ValueError: the trees do not match there.
    """
    wanted = trees.flatten(params).only(entry is not None for entry in plan.arrays)
    leaves = anchors.match_anchor(wanted, anchor)
    return [
        None if entry is None else leaf for entry, leaf in zip(plan.arrays, leaves, strict=True)
    ]


def displacement(
    params: PyTree, pretrained: Sequence[Any], plan: layers_lib.LayerPlan
) -> Displacement:
    """How far a checkpoint is from the anchor's leaves, as :func:`matched_anchor` gives them.

    Raises:
      TypeError: the anchor is complex.
    """
    flat = trees.flatten(params)
    anchors_found: list[jax.Array | None] = []
    deltas: list[jax.Array | None] = []
    for path, entry, theta, theta_0 in zip(
        flat.paths, plan.arrays, flat.leaves, pretrained, strict=True
    ):
        if entry is None:
            anchors_found.append(None)
            deltas.append(None)
            continue
        dtype = layers_lib.compute_dtype(theta, theta_0)
        pretrained_leaf = trees.as_real(anchors.on_device(theta_0), dtype, "anchor", path)
        anchors_found.append(pretrained_leaf)
        deltas.append(jnp.asarray(theta, dtype) - pretrained_leaf)
    return Displacement(flat, anchors_found, deltas)
