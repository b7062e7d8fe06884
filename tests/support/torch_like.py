"""Optimizer stages as PyTorch computes them, where Optax's compute something else."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax


def scale_by_amsgrad(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    """Adam whose second moment is the running maximum of the *un*corrected v, as in PyTorch.

    Optax's amsgrad takes the maximum after the bias correction: other numbers.
    """

    def init(params: Any) -> Any:
        zeros = jax.tree.map(jnp.zeros_like, params)
        return jnp.zeros((), jnp.int32), zeros, zeros, zeros

    # In double precision, as the original computes them: 1 - 0.999^t has no digits to spare.
    steps = np.arange(1, 1000, dtype=np.float64)
    corrections = jnp.asarray(1 - b1**steps), jnp.asarray(np.sqrt(1 - b2**steps))

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        count, m, v, s = state
        first, second = (c[count] for c in corrections)
        count = count + 1
        m = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, m, updates)
        v = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g**2, v, updates)
        s = jax.tree.map(jnp.maximum, s, v)
        step = jax.tree.map(
            lambda m, s: m / first.astype(m.dtype) / (jnp.sqrt(s) / second.astype(m.dtype) + eps),
            m,
            s,
        )
        return step, (count, m, v, s)

    return optax.GradientTransformation(init, update)


def dampened_trace(decay: float, dampening: float) -> optax.GradientTransformation:
    """PyTorch's momentum: the first gradient enters whole, the later ones dampened."""

    def init(params: Any) -> Any:
        return jnp.zeros((), jnp.int32), jax.tree.map(jnp.zeros_like, params)

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        count, trace = state
        weight = jnp.where(count == 0, 1.0, 1.0 - dampening)
        trace = jax.tree.map(lambda b, g: decay * b + weight.astype(g.dtype) * g, trace, updates)
        return trace, (count + 1, trace)

    return optax.GradientTransformation(init, update)
