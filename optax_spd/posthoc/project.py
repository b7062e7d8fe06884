"""Projection onto balls around a pretrained checkpoint, and helpers shared with ``fit_radii``.

Gouk, Hospedales, Pontil: "Distance-Based Regularisation of Deep Networks for Fine-Tuning", ICLR
2021, https://arxiv.org/abs/2002.08253; Tian et al., CVPR 2023, https://arxiv.org/abs/2303.10720:

    θ' = θ₀ + min(1, γ/n) (θ - θ₀)

with n as in :mod:`optax_spd.core.balls`. Difference from the authors' code: a row with n <= γ is
returned bit for bit, while theirs shrinks it if n + 1e-8 > γ. So a second projection changes
nothing.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optax_spd.anchors import policy
from optax_spd.core import balls, sums
from optax_spd.layers import plans, trees
from optax_spd.layers.spec import LayerFn, check_layers
from optax_spd.layers.types import Mask, Norm, PyTree


def project(
    params: PyTree,
    anchor: PyTree,
    radii: jax.typing.ArrayLike,
    *,
    norm: Norm = "mars",
    layers: LayerFn | None = None,
    mask: Mask = None,
) -> PyTree:
    r"""Projects each layer onto the ball of its radius around the anchor.

    .. math::

        \theta' = \theta_0 + \min\left(1, \frac{\gamma}{n}\right) (\theta - \theta_0)

    where n is the Euclidean norm of the layer's deviation ("l2"), or the sum of an output unit's
    absolute deviations ("mars": every output unit has its own n, all share the layer's radius).
    May be jitted and differentiated; works on sharded parameters.

    Args:
      params: θ.
      anchor: θ₀; matched by path.
      radii: γ >= 0: a scalar, or one per layer in :func:`optax_spd.layer_names` order (such as
        ``tpgm_radii``, ``ftp_radii`` or the radii of :func:`optax_spd.fit_radii`). 0 gives the
        anchor; infinity leaves the layer unchanged.
      norm: "mars" or "l2".
      layers: what a layer is, and which axes are output units (:func:`optax_spd.outputs`).
      mask: True where to project, as for :func:`optax_spd.spd`; the rest is returned as it is.

    Returns:
      A tree like ``params``, with its dtypes. A row inside its ball is returned bit for bit; one
      outside is moved to the surface (within 1e-8 and rounding). Leaves that are not layers
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
    balls.check_norm(norm)
    balls.check_radii(radii)
    plan = plan_of(params, layers, mask)
    pretrained = matched_anchor(params, anchor, plan)
    displaced = displacement(params, pretrained, plan)
    vector = sums.per_layer("radii", radii, plan)
    (norms,) = balls.ball_norms(norm, plan, None, displaced.deltas)
    multipliers = balls.factors(plan, vector, norms, jnp.isfinite(norms.largest), exact=True)
    return displaced.filled(displaced.projected(multipliers))


class Displacement(NamedTuple):
    """Two checkpoints as lists of leaves, in the order of the parameters.

    Attributes:
      flat: the parameters, missing leaves included.
      anchors: θ₀ in at least float32; None for a leaf that is not a layer.
      deltas: Δ = θ - θ₀; None for a leaf that is not a layer.
    """

    flat: trees.FlatTree
    anchors: list[jax.Array | None]
    deltas: list[jax.Array | None]

    def projected(self, multipliers: Sequence[jax.Array | None]) -> list[jax.Array | None]:
        """θ₀ + f Δ in the parameters' dtypes, exactly θ where f = 1; None outside layers."""
        return [
            None
            if theta_0 is None or delta is None or f is None
            else jnp.where(
                sums.sharded_like(f < 1, delta),
                (theta_0 + f * delta).astype(jnp.result_type(theta)),
                theta,
            )
            for theta, theta_0, delta, f in zip(
                self.flat.leaves, self.anchors, self.deltas, multipliers, strict=True
            )
        ]

    def filled(self, leaves: Sequence[jax.Array | None]) -> PyTree:
        """The parameter tree with new leaves; None keeps a leaf."""
        return self.flat.unflatten(
            theta if leaf is None else leaf
            for theta, leaf in zip(self.flat.leaves, leaves, strict=True)
        )


def plan_of(params: PyTree, layers: LayerFn | None, mask: Any) -> plans.LayerPlan:
    """The layers of a parameter tree under a mask."""
    check_layers(layers)
    return plans.planned(params, layers, mask).plan


def matched_anchor(params: PyTree, anchor: PyTree, plan: plans.LayerPlan) -> list[Any]:
    """Per leaf the anchor's array; None for a leaf that is not a layer.

    Raises:
      ValueError: the trees do not match in the layers.
    """
    wanted = trees.flatten(params).only(entry is not None for entry in plan.arrays)
    leaves = policy.match_anchor(wanted, anchor)
    return [
        None if entry is None else leaf for entry, leaf in zip(plan.arrays, leaves, strict=True)
    ]


def displacement(params: PyTree, pretrained: Sequence[Any], plan: plans.LayerPlan) -> Displacement:
    """The displacement of a checkpoint from the leaves that :func:`matched_anchor` returned.

    Raises:
      TypeError: the anchor is complex.
    """
    flat = trees.flatten(params)
    anchors: list[jax.Array | None] = []
    deltas: list[jax.Array | None] = []
    for path, entry, theta, theta_0 in zip(
        flat.paths, plan.arrays, flat.leaves, pretrained, strict=True
    ):
        if entry is None:
            anchors.append(None)
            deltas.append(None)
            continue
        dtype = plans.compute_dtype(theta, theta_0)
        pretrained_leaf = trees.as_real(policy.on_device(theta_0), dtype, "anchor", path)
        anchors.append(pretrained_leaf)
        deltas.append(jnp.asarray(theta, dtype) - pretrained_leaf)
    return Displacement(flat, anchors, deltas)
