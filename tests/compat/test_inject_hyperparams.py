"""What ``optax.inject_hyperparams`` must not touch is what the docstrings say, and no more."""

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from contract_methods import METHODS, documented_static_args, half_distance

import optax_spd

PARAMS = {
    "embedding": {"kernel": np.ones((4, 4), np.float32)},
    "layer_0": {"bias": np.ones(4, np.float32), "kernel": np.ones((4, 4), np.float32)},
    "layer_1": {"kernel": np.ones((4, 4), np.float32)},
}
MAKERS = {m.build.__name__: m.build for m in METHODS.values() if not m.is_wrapper}
each_maker = pytest.mark.parametrize("name", MAKERS)


class Model(eqx.Module):
    """The parameters in an Equinox model, which can be called."""

    embedding: Any
    layer_0: Any
    layer_1: Any

    def __call__(self, x: Any) -> Any:
        return x


# What could be taken for a schedule, since it can be called.
CALLED: dict[str, Any] = {
    "anchor": Model(**PARAMS),
    "anchor_dtype": np.float16,
    "depth": len,
    "embedding": optax_spd.path_mask("^emb"),
    "follows": lambda module: module,
    "layers": optax_spd.by_module(),
    "mask": lambda params: jax.tree.map(lambda p: p.ndim == 2, params),
    "mu_dtype": jnp.bfloat16,
    "state_dtype": np.float16,
}
NUMBERS = {
    **dict.fromkeys(("learning_rate", "b1", "b2", "eps", "eps_root", "momentum"), 0.1),
    **dict.fromkeys(("weight_decay", "k", "radius_learning_rate", "decay", "radii"), 0.1),
    **dict.fromkeys(("min_scale", "max_scale", "sigmoid_min", "sigmoid_max", "temperature"), 0.4),
    **dict.fromkeys(("delta", "wd_ratio", "dampening", "max_norm", "clipping"), 0.1),
    "every": 2,
}
SHAPING = {"min_eigenvalues": 4, "xmin_pos": 3, "conv_norm": 0.25, "bins": 50}
THE_REST = {
    **dict.fromkeys(("nesterov", "skip_first", "normalize", "filter_zeros", "cautious"), True),
    "skip_last": False,
    "norm": "l2",
    "fit": "median",
    "assign": "sigmoid",
    "unit": "layer",
    "block": None,
    "axis_name": None,
    "radius_optimizer": optax.sgd(0.1),
}
VALUES = NUMBERS | SHAPING | THE_REST


def injected(name: str, values: Mapping[str, Any], static_args: Iterable[str]) -> Any:
    """The types of a step's updates, and the names of the hyperparameters in its state."""
    parameters = inspect.signature(MAKERS[name]).parameters
    arguments = {argument: values[argument] for argument in parameters}  # of each a value
    tx = optax.inject_hyperparams(MAKERS[name], static_args=static_args)(**arguments)
    batches = jax.tree.map(lambda x: x[None], PARAMS)
    data = {"validation_fn": half_distance, "validation_batches": batches}
    validation = data if "radius_optimizer" in parameters else {}

    def step(params: Any) -> Any:
        state = tx.init(params)
        _, state = tx.update(params, state, params, grad=params, **validation)
        return tx.update(params, state, params, grad=params, **validation)[0], state.hyperparams

    updates, hyperparams = jax.eval_shape(step, PARAMS)
    assert jax.tree.map(np.shape, updates) == jax.tree.map(np.shape, PARAMS)
    return hyperparams.keys()


@each_maker
def test_the_documented_static_args_are_enough(name: str) -> None:
    parameters = inspect.signature(MAKERS[name]).parameters.keys()
    found = injected(name, VALUES | CALLED, documented_static_args(MAKERS[name]))
    assert found == parameters & NUMBERS.keys()


@each_maker
def test_each_of_them_is_needed(name: str) -> None:
    documented = documented_static_args(MAKERS[name])
    for argument in documented:
        static = [other for other in documented if other != argument]
        with pytest.raises((TypeError, ValueError)):
            injected(name, VALUES | CALLED, static)
