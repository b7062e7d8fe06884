"""The hyperparameters that a docstring says to keep out of ``optax.inject_hyperparams``."""

import inspect
import re
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_spd

PARAMS = {
    "embedding": {"kernel": np.ones((4, 4), np.float32)},
    "layer_0": {"bias": np.ones(4, np.float32), "kernel": np.ones((4, 4), np.float32)},
    "layer_1": {"kernel": np.ones((4, 4), np.float32)},
}


def documented_static_args(function: Any) -> tuple[str, ...]:
    """What a docstring says to name in ``static_args`` of ``optax.inject_hyperparams``."""
    told = function.__doc__.split("optax.inject_hyperparams``")[1]
    # The list is before or after the word; the sentence ends with a stop.
    sentence = re.split(r"\.\s", told.replace("what shapes the program", ""))[0]
    return tuple(n for n in re.findall(r"[`\"](\w+)[`\"]", sentence) if n != "static_args")


def of_kernels(params: Any) -> Any:
    return jax.tree.map(lambda p: p.ndim == 2, params)


# Every argument with a value of its own, the callable ones as functions: those are what Optax would
# take for schedules.
ARGUMENTS: dict[str, tuple[Any, dict[str, Any]]] = {
    "temp_balance": (
        optax_spd.temp_balance,
        {
            "every": 3,
            "fit": "median",
            "assign": "sigmoid",
            "min_scale": 0.4,
            "max_scale": 1.6,
            "min_eigenvalues": 4,
            "unit": "layer",
            "block": None,  # of the other unit, and a string, which Optax leaves alone
            "follows": lambda module: module,
            "skip_first": True,
            "skip_last": False,
            "normalize": True,
            "xmin_pos": 3,
            "conv_norm": 0.25,
            "filter_zeros": True,
            "bins": 50,
            "sigmoid_min": 1.5,
            "sigmoid_max": 0.5,
            "temperature": 0.3,
            "layers": optax_spd.by_module(),
            "mask": of_kernels,
        },
    ),
    "layerwise_lr_decay": (
        optax_spd.layerwise_lr_decay,
        {
            "decay": 0.6,
            "depth": lambda name: float(name.endswith("1")),
            "min_scale": 0.7,
            "layers": optax_spd.by_module(),
            "mask": of_kernels,
        },
    ),
    "sgd_freeze_embed": (
        optax_spd.sgd_freeze_embed,
        {
            "learning_rate": 0.2,
            "momentum": 0.8,
            "nesterov": True,
            "embedding": optax_spd.path_mask("^emb"),
        },
    ),
}
EACH_FUNCTION = pytest.mark.parametrize("name", ARGUMENTS)


def injected(name: str, static_args: Iterable[str]) -> Any:
    """The types of a jitted step's updates and of the hyperparameters in its state."""
    function, arguments = ARGUMENTS[name]
    tx = optax.inject_hyperparams(function, static_args=static_args)(**arguments)

    def step(params: Any) -> Any:
        return tx.update(params, tx.init(params), params)[0], tx.init(params).hyperparams

    return jax.eval_shape(step, PARAMS)


@EACH_FUNCTION
def test_the_documented_static_args_are_enough(name: str) -> None:
    function, arguments = ARGUMENTS[name]
    assert arguments.keys() == inspect.signature(function).parameters.keys()
    static = documented_static_args(function)
    updates, hyperparams = injected(name, static)
    assert jax.tree.map(jnp.shape, updates) == jax.tree.map(np.shape, PARAMS)
    numbers = {k for k, v in arguments.items() if type(v) in (int, float)}
    assert hyperparams.keys() == numbers - set(static)
