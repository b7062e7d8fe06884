"""What several test files share: SPD in float64 NumPy, and a plain training run."""

from typing import Any

import jax
import numpy as np
import optax


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


def train(tx: Any, params: Any, gradients: Any) -> tuple[Any, np.ndarray]:
    """Trains on recorded gradients (a leading step axis); the parameters, and r step by step."""

    def step(carry: Any, grads: Any) -> Any:
        params, state = carry
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), optax.tree.get(state, "spd_ratio")

    scan = jax.jit(lambda params: jax.lax.scan(step, (params, tx.init(params)), gradients))
    (params, _), ratios = jax.device_get(scan(params))
    return params, ratios
