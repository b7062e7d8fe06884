"""The directions of the authors' AdamP and SGDP, where Optax's are others."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_spd.layers.types import DType, PyTree


def scale_by_nesterov_adam(
    b1: jax.typing.ArrayLike,
    b2: jax.typing.ArrayLike,
    eps: jax.typing.ArrayLike,
    eps_root: jax.typing.ArrayLike,
    mu_dtype: DType,
) -> optax.GradientTransformation:
    """Adam's direction with the Nesterov momentum of the authors' AdamP, in Adam's own state.

        p = (b1 m + (1 - b1) g) / (1 - b1^t) / (√v̂ + ε)

    Optax's divides m by 1 - b1^(t+1) instead (Dozat's NAdam).
    """
    adam = optax.scale_by_adam(b1, b2, eps, eps_root, mu_dtype)

    def update(updates: PyTree, state: Any, params: PyTree = None) -> tuple[PyTree, Any]:
        plain, state = adam.update(updates, state, params)
        count = jnp.asarray(state.count, float)  # of an integer each eager power is a program
        first, second = 1 - b1**count, 1 - b2**count

        def direction(p: jax.Array, g: jax.Array, v: jax.Array) -> jax.Array:
            corrected = v / second.astype(v.dtype)
            denominator = jnp.sqrt(corrected + eps_root) + eps
            now = (1 - b1) * g / first.astype(v.dtype) / denominator
            return jnp.asarray(b1 * p + now, p.dtype)

        return jax.tree.map(direction, plain, updates, state.nu), state

    return optax.GradientTransformation(adam.init, update)


def dampened_trace(
    momentum: jax.typing.ArrayLike | None, dampening: jax.typing.ArrayLike, nesterov: bool
) -> optax.GradientTransformation:
    """SGD's direction with momentum b ← μ b + (1 - dampening) g, from the first step on.

    It is b, or g + μ b with Nesterov momentum. The state is that of ``optax.trace``, or none
    without momentum.
    """

    # What is multiplied by a NumPy or JAX number would take on its dtype.
    def like(g: Any, x: Any) -> jax.Array:  # g may be a Python number
        return jnp.asarray(x, jnp.result_type(g))

    def dampened(updates: PyTree) -> PyTree:
        return jax.tree.map(lambda g: like(g, (1 - dampening) * g), updates)

    if momentum is None:
        return optax.identity() if nesterov else optax.stateless(lambda g, _: dampened(g))
    trace = optax.trace(momentum)

    def kept(g: Any, old: Any, new: Any) -> Any:
        return None if g is None else jnp.asarray(new, jnp.result_type(g, old))

    def update(updates: PyTree, state: Any, params: PyTree = None) -> tuple[PyTree, Any]:
        _, new = trace.update(dampened(updates), state, params)
        buffer = jax.tree.map(kept, updates, state.trace, new.trace, is_leaf=lambda g: g is None)
        state = optax.TraceState(trace=buffer)
        if not nesterov:
            return jax.tree.map(like, updates, buffer), state
        ahead = jax.tree.map(lambda g, b: like(g, g + momentum * b), updates, buffer)
        return ahead, state

    return optax.GradientTransformation(trace.init, update)
