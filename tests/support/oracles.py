"""What several test files share: the methods in float64 NumPy, and a plain training run."""

import functools
from collections.abc import Mapping
from typing import Any

import ball_oracles
import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_spd

EPS = 1e-8


def normal_tree(shapes: Any, seed: int, *leading: int) -> Any:
    """Normal float32 arrays of the shapes in a tree, with leading axes."""
    draw = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: draw.normal(size=(*leading, *shape)).astype(np.float32),
        shapes,
        is_leaf=lambda node: isinstance(node, tuple),
    )


def spd_step(
    update: Any, theta: Any, anchor: Any, grad: Any, decay: float = 1.0
) -> tuple[np.ndarray, float]:
    """Algorithm 2 as the paper prints it, on one layer, in float64: the new update and r."""
    u, theta, anchor, g = (np.asarray(x, np.float64) for x in (update, theta, anchor, grad))
    delta = theta - anchor
    tentative = delta + u
    old, new = np.linalg.norm(delta.ravel()), np.linalg.norm(tentative.ravel())
    if not -np.sum(g * delta) < 0 or new == 0:
        return u, 0.0
    ratio = float(np.clip((new - old) / new, 0, 1))
    return u - decay * ratio * tentative, ratio


Rows = list[np.ndarray]


def rows_by_layer(
    tree: Mapping[str, Any], specs: Mapping[str, optax_spd.LayerSpec]
) -> dict[str, Rows]:
    """Each layer's arrays as float64 matrices with its output units as rows.

    Args:
      tree: arrays by name.
      specs: how each divides into layers. Default output axes are the last that is not stacked.
    """
    arrays = {name: array for name, array in tree.items() if np.size(array)}
    balls = ball_oracles.Balls(arrays, "mars", lambda path, _: specs[path])
    return {
        layer: [balls.rows[path][number] for path, number in parts]
        for layer, parts in balls.members.items()
    }


def row_norms(deviation: Rows, norm: str) -> Rows:
    """One column per matrix: the norm of each of its rows, or of the whole layer."""
    if norm == "mars":
        return [np.abs(c).sum(axis=1, keepdims=True) for c in deviation]
    whole = np.sqrt(sum(np.sum(c**2) for c in deviation))
    return [np.full((len(c), 1), whole) for c in deviation]


class FTP:
    """One layer under Fast Trainable Projection, as golden/README.md section 2 writes it."""

    def __init__(self, norm: str = "mars") -> None:
        self.norm = norm
        self.t = 0
        self.gamma = self.m = self.v = 0.0
        self.previous: Rows = []
        # What a test should have met: how often the radius shrank by annealed q, was clipped from
        # above, and held a row back.
        self.met = {"annealed": 0, "clipped": 0, "projected": 0, "inside": 0}

    def step(
        self,
        update: Rows,
        theta: Rows,
        anchor: Rows,
        grad: Rows,
        k: float = 1.0,
        rate: float = 0.01,
    ) -> Rows:
        """The new update; keeps γ and C."""
        C = [t + u - a for t, u, a in zip(theta, update, anchor, strict=True)]
        N = [n + EPS for n in row_norms(C, self.norm)]
        self.t += 1
        if self.t == 1:
            self.gamma = EPS
        else:
            before = [n + EPS for n in row_norms(self.previous, self.norm)]
            q = sum(
                float(np.sum(g * c / n))
                for g, c, n in zip(grad, self.previous, before, strict=True)
            )
            self.met["annealed"] += q > 0 and k < 1
            q = k * q if q > 0 else q
            self.m = 0.9 * self.m + 0.1 * q
            self.v = 0.999 * self.v + 0.001 * q * q
            m_hat, v_hat = self.m / (1 - 0.9**self.t), self.v / (1 - 0.999**self.t)
            moved = self.gamma - rate * m_hat / (np.sqrt(v_hat) + EPS)
            largest = max(float(n.max()) for n in N)
            self.met["clipped"] += moved > largest
            self.gamma = min(max(moved, EPS), largest)
        f = [np.clip(self.gamma / n, 0, 1) for n in N]
        self.met["projected"] += any(bool((x < 1).any()) for x in f)
        self.met["inside"] += any(bool((x == 1).any()) for x in f)
        self.previous = C
        return [
            np.where(x < 1, a + x * c - t, u)
            for x, a, c, t, u in zip(f, anchor, C, theta, update, strict=True)
        ]


def row_ball(radius: Any, **options: Any) -> optax.GradientTransformationExtraArgs:
    """MARS projection with a fixed radius, row by row: a row method that the library has not."""

    def decide(norm: jax.Array, one: jax.Array, *, radius: jax.Array) -> optax_spd.Decision:
        factor = jnp.clip(radius / (norm + 1e-8), 0, 1)
        return optax_spd.Decision({"factor": factor, "ones": one}, (factor,), factor < 1)

    return optax_spd.layerwise(
        "row ball",
        measure=lambda d: (jnp.abs(d.tentative), jnp.ones_like(d.step)),
        decide=decide,
        act=lambda d, factor: d.step - (1 - factor) * d.tentative,
        sums=2,
        hyperparameters={"radius": radius},
        level="row",
        gradient=False,
        **options,
    )


FIELDS = ("spd_ratio", "ftp_radii", "tpgm_radii")


def decisions(state: Any) -> jax.Array:
    """What the method in an optimizer's state decided for each layer: its ratios or its radii."""
    found = [optax.tree.get(state, field) for field in FIELDS]
    (vector,) = [vector for vector in found if vector is not None]
    return vector


@functools.lru_cache(maxsize=16)
def training(tx: Any) -> Any:
    """A jitted run; kept, since a second one on arrays of the same shapes then compiles nothing."""

    def step(carry: Any, grads: Any) -> Any:
        params, state = carry
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), decisions(state)

    return jax.jit(lambda params, grads: jax.lax.scan(step, (params, tx.init(params)), grads))


def train(tx: Any, params: Any, gradients: Any) -> tuple[Any, np.ndarray]:
    """Trains on recorded gradients (a leading step axis); parameters, and decisions by step."""
    (params, _), found = jax.device_get(training(tx)(params, gradients))
    return params, found
