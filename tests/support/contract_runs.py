"""Training runs that the tests of the contract suite share: compiled once for each method."""

import functools
from collections.abc import Callable
from typing import Any

import contract_methods
import jax
import jax.numpy as jnp
import numpy as np
import optax
from contract_methods import METHODS
from flax import nnx

SHAPES = {
    "blocks": {"bias": (2, 4), "kernel": (2, 8, 4)},
    "embed": {"embedding": (8, 4)},
    "head": {"kernel": (8, 4)},
}
# The gradients turn round, and momentum does so later: that is when SPD acts.
SIGNS = np.array([1.0, 1.0, -1.0, -1.0, -1.0, 1.0], np.float32)
STEPS, STOP = len(SIGNS), 3


def arrays(seed: int, *leading: int, dtype: Any = np.float32) -> Any:
    """Random numbers like the model."""
    draw = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: draw.normal(size=(*leading, *shape)).astype(dtype),
        SHAPES,
        is_leaf=lambda node: isinstance(node, tuple),
    )


PRETRAINED = arrays(0)


def gradients() -> Any:
    """Recorded gradients with a leading step axis."""

    def one(drift: np.ndarray, noise: np.ndarray) -> np.ndarray:
        return SIGNS.reshape(-1, *[1] * drift.ndim) * drift + np.float32(0.3) * noise

    return jax.tree.map(one, arrays(1), arrays(2, STEPS))


GRADS = gradients()


class Module(nnx.Module):
    """The model's parameters under their names."""

    def __init__(self, arrays: dict[str, Any]) -> None:
        for name, value in arrays.items():
            inner = Module(value) if isinstance(value, dict) else nnx.Param(jnp.asarray(value))
            setattr(self, name, inner)


def at(tree: Any, step: int) -> Any:
    return jax.tree.map(lambda x: x[step], tree)


def on_device(tree: Any) -> Any:
    """In buffers of their own, which a step may use up."""
    return jax.tree.map(lambda x: jnp.array(x, copy=True), tree)


def vectors(name: str, state: Any) -> dict[str, Any]:
    """What a method decided for each layer; of several of its kind, one after the other."""
    found = {field: optax.tree.get_all_with_path(state, field) for field in METHODS[name].vectors}
    # NNX keeps each in a variable.
    leaves = lambda held: [leaf for _, vector in held for leaf in jax.tree.leaves(vector)]
    return {field: jnp.concatenate(leaves(held)) for field, held in found.items()}


Step = Callable[[Any, Any, Any], Any]


def step_of(name: str, tx: Any) -> Step:
    """A training step: parameters, state and gradients to parameters and state."""

    def step(params: Any, state: Any, grads: Any) -> Any:
        extra = contract_methods.validation(name, params)
        updates, state = tx.update(grads, state, params, **extra)
        return optax.apply_updates(params, updates), state

    return step


@functools.cache
def jitted(name: str) -> Any:
    """A compiled step that uses up parameters and state."""
    return jax.jit(step_of(name, contract_methods.optimizer(name)), donate_argnums=(0, 1))


def run(
    name: str, step: Step, params: Any, state: Any, grads: Any = GRADS, start: int = 0
) -> tuple[Any, Any, dict[str, np.ndarray]]:
    """Trains in a plain loop from some step on; parameters, state, and decisions by step."""
    seen = []
    for index in range(start, len(jax.tree.leaves(grads)[0])):
        # One step at a time: of several under way on eight virtual devices that share two cores,
        # the collectives can wait for each other forever.
        params, state = jax.block_until_ready(step(params, state, at(grads, index)))
        seen.append(jax.device_get(vectors(name, state)))
    return params, state, {field: np.stack([s[field] for s in seen]) for field in seen[0]}


@functools.cache
def reference(name: str) -> tuple[Any, Any, dict[str, np.ndarray]]:
    """The run on one device that all others are compared with."""
    tx = contract_methods.optimizer(name)
    params = on_device(PRETRAINED)
    return jax.device_get(run(name, jitted(name), params, tx.init(params)))


def scan(
    name: str, tx: Any, params: Any, state: Any, grads: Any
) -> tuple[Any, Any, dict[str, Any]]:
    """The same run as one ``lax.scan``."""
    step = step_of(name, tx)

    def body(carry: Any, grads: Any) -> Any:
        params, state = step(*carry, grads)
        return (params, state), vectors(name, state)

    (params, state), seen = jax.lax.scan(body, (params, state), grads)
    return params, state, seen


@functools.cache
def program(name: str, container: Callable[[Any], Any] = dict) -> str:
    """What init and a step compute, whatever the containers: leaves are numbered in order."""
    tx, params = contract_methods.optimizer(name), container(PRETRAINED)

    def step(params: Any, grads: Any) -> Any:
        end, state = step_of(name, tx)(params, tx.init(params), grads)
        assert jax.tree.structure(end) == jax.tree.structure(params)
        return end, vectors(name, state)

    return str(jax.make_jaxpr(step)(params, container(at(GRADS, 0))))


def assert_close(found: Any, expected: Any, rtol: float = 2e-5, atol: float = 2e-6) -> None:
    """The same tree of nearly the same numbers; bfloat16 may round the other way."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for (path, x), y in zip(
        jax.tree.leaves_with_path(jax.device_get(found)),
        jax.tree.leaves(jax.device_get(expected)),
        strict=True,
    ):
        tolerance = max(rtol, 2e-2 if x.dtype == jnp.bfloat16 else 0)
        np.testing.assert_allclose(
            np.asarray(x, np.float64),
            np.asarray(y, np.float64),
            rtol=tolerance,
            atol=atol,
            err_msg=jax.tree_util.keystr(path),
        )


def assert_same_bits(found: Any, expected: Any) -> None:
    """The same tree of the same numbers and types."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    dtypes = lambda tree: [x.dtype for x in jax.tree.leaves(tree)]
    assert dtypes(found) == dtypes(expected)


def state_like_params(tx: Any, like: Any, rest: Any) -> Any:
    """The state's structure with ``like`` in place of what is like the parameters."""
    is_missing = lambda node: isinstance(node, optax.MaskedNode)
    return optax.tree.map_params(
        tx,
        lambda held, value: held if is_missing(held) else value,
        jax.eval_shape(tx.init, PRETRAINED),
        like,
        transform_non_params=lambda _: rest,
        is_leaf=is_missing,
    )


def types(tree: Any) -> Any:
    """Shapes, dtypes, weak types and, on an explicit mesh, shardings."""
    return jax.tree.map(jax.typeof, tree)
