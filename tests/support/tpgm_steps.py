"""What the tests of TPGM share: a small model, a validation loss, steps, and what a step runs."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_spd

Arrays = dict[str, Any]

# For steps that project on purpose, without validation data.
projects_only = pytest.mark.filterwarnings("ignore:update got no validation data")

SHAPES = {
    "blocks/bias": (2, 4),
    "blocks/kernel": (2, 3, 4),
    "dense/bias": (4,),
    "dense/kernel": (3, 4),
    "scale": (),
}
STACKED = optax_spd.stacked("^blocks/")
LAYERS: dict[str, Any] = {
    "per array": None,
    "stacked": STACKED,
    "by module": optax_spd.by_module(layers=STACKED),
    "torch": optax_spd.outputs("kernel", -2),
}


def arrays(seed: int, *leading: int, scale: float = 1.0, dtype: Any = np.float32) -> Arrays:
    """Random numbers for each parameter, with leading axes on request."""
    draw = np.random.default_rng(seed)
    return {
        path: (scale * draw.normal(size=(*leading, *shape))).astype(dtype)
        for path, shape in SHAPES.items()
    }


def half_distance(params: Any, batch: Any) -> Any:
    """Half the squared distance to the batch, a tree like params: the gradient is θ' - batch."""
    return sum(
        jnp.sum((x - y) ** 2) / 2
        for x, y in zip(jax.tree.leaves(params), jax.tree.leaves(batch), strict=True)
        if jnp.issubdtype(jnp.result_type(x), jnp.floating)
    )


def stepper(tx: Any, validation_fn: Any = half_distance, **jit_options: Any) -> Callable[..., Any]:
    """A jitted step (params, state, updates, batches=None) -> (params, state)."""

    def step(params: Any, state: Any, updates: Any, batches: Any = None) -> Any:
        extra: Any = {}
        if batches is not None:
            extra = {"validation_fn": validation_fn, "validation_batches": batches}
        updates, state = tx.update(updates, state, params, **extra)
        return optax.apply_updates(params, updates), state

    return jax.jit(step, **jit_options)


class Counter:
    """Counts how often a validation function really runs."""

    def __init__(self, validation_fn: Any = half_distance) -> None:
        self.runs = 0
        self.traces = 0
        self.validation_fn = validation_fn

    def __call__(self, params: Any, batch: Any) -> Any:
        self.traces += 1
        jax.debug.callback(self._ran)
        return self.validation_fn(params, batch)

    def _ran(self) -> None:
        self.runs += 1

    def taken(self) -> int:
        """The runs since the last question."""
        jax.effects_barrier()
        runs, self.runs = self.runs, 0
        return runs


def radii_of(state: Any) -> np.ndarray:
    return np.asarray(optax.tree.get(state, "tpgm_radii"))


def assert_close(actual: Any, expected: Any, atol: float = 2e-6) -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=atol), actual, expected
    )


def assert_same_bits(actual: Any, expected: Any) -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)
