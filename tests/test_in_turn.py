"""Adam and SPD layer after layer: the numbers, states and errors of the chain, in less memory.

These tests run with eight virtual devices, where the library takes the chain; that there is a
single one they pretend. test_one_cpu.py starts a process where it is so.
"""

import contextlib
import functools
import math
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.core import freeze
from jax.sharding import SingleDeviceSharding
from jax_support import host_memory_works, primitives

import optax_spd
from optax_spd import LayerSpec, in_turn, one_cpu, plans, trees

RATE = 0.1


@contextlib.contextmanager
def one_device() -> Iterator[None]:
    """Pretends that there is one CPU device, for what is traced inside."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(one_cpu, "cpu_devices", lambda: 1)
        yield


class Sizes(NamedTuple):
    """The module's constants, made small so that small trees meet all that large ones do."""

    small_array: int
    largest_stack: int
    under_way: int


@contextlib.contextmanager
def sizes_set(sizes: Sizes | None) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, size in sizes._asdict().items() if sizes else ():
            patch.setattr(in_turn, name.upper(), size)
        yield


def in_turn_taken(update: Callable[..., Any], *args: Any, **kwargs: Any) -> bool:
    """Whether what is traced holds more than the chain."""
    jaxpr = jax.make_jaxpr(lambda *args: update(*args, **kwargs))(*args)
    return "platform_index" in set(primitives(jaxpr.jaxpr))


# The same as the chain ---------------------------------------------------------------------------


SHAPES: dict[str, Any] = {
    "blocks": {"bias": (3, 4), "kernel": (3, 4, 5)},
    "dense_0": {"bias": (5,), "kernel": (4, 5)},
    "dense_1": {"bias": (5,), "kernel": (4, 5)},
    "dense_2": {"bias": (5,), "kernel": (4, 5)},
    "norm": {"scale": ()},
    "table": (9, 7),
}
IS_SHAPE = lambda node: isinstance(node, tuple)
LEAVES = trees.flatten(SHAPES, IS_SHAPE)


def numbers(seed: int, dtypes: Any = jnp.float32, scale: float = 1.0) -> Any:
    """Numbers for the model, in one dtype or in several in turn; and leaves that are no layers."""
    draw = np.random.default_rng(seed)
    dtypes = dtypes if isinstance(dtypes, list) else [dtypes]
    drawn = [
        jnp.asarray(scale * draw.normal(size=shape), dtypes[i % len(dtypes)])
        for i, shape in enumerate(LEAVES.leaves)
    ]
    tree: dict[str, Any] = LEAVES.unflatten(drawn)
    return tree | {"ids": jnp.arange(3), "empty": jnp.ones((0, 2))}


class Case(NamedTuple):
    """An optimizer with all that its update takes."""

    options: dict[str, Any] = {}
    sizes: Sizes | None = None
    dtypes: Any = jnp.float32
    grad_dtypes: Any = None
    wrapper: Callable[..., Any] | None = None
    extra: dict[str, Any] = {}


STACKED = optax_spd.stacked("^blocks/")
STATIC = ("anchor", "anchor_dtype", "layers", "mask", "axis_name", "mu_dtype")
ONE_BY_ONE = Sizes(0, 0, 0)
CASES = {
    "one stack of each kind": Case(),
    "two in a stack, a few under way": Case({"anchor": "zero"}, Sizes(20, 40, 45)),
    "one by one": Case(
        {"anchor": numbers(1, scale=0.5), "weight_decay": 1.7, "layers": STACKED}, ONE_BY_ONE
    ),
    "groups and stacked layers": Case(
        {"anchor_dtype": jnp.bfloat16, "layers": optax_spd.by_module(layers=STACKED)},
        Sizes(9, 99, 0),
    ),
    "masked, on schedules": Case(
        {
            "learning_rate": optax.linear_schedule(0.2, 0.05, 5),
            "weight_decay": optax.linear_schedule(2.0, 0.5, 5),
            "mask": lambda params: {k: k not in ("dense_1", "ids", "empty") for k in params},
            "eps_root": 1e-4,
        },
        Sizes(20, 99, 0),
    ),
    "an anchor as argument, several dtypes": Case(
        {"anchor": "argument", "mu_dtype": jnp.float32},
        Sizes(20, 40, 0),
        dtypes=[jnp.float32, jnp.bfloat16, jnp.bfloat16, jnp.float16],
        extra={"anchor": numbers(2, scale=0.5)},
    ),
    "halves with gradients in float32": Case(
        {"layers": optax_spd.by_module()}, dtypes=jnp.bfloat16, grad_dtypes=jnp.float32
    ),
    "another gradient": Case({"anchor": "zero"}, Sizes(5, 10, 0), extra={"grad": numbers(3)}),
    "injected": Case(
        {"weight_decay": optax.linear_schedule(2.0, 0.5, 5)},
        wrapper=lambda **options: optax.inject_hyperparams(optax_spd.adam_spd, static_args=STATIC)(
            **options
        ),
    ),
    "MultiSteps": Case(
        wrapper=lambda **options: optax.MultiSteps(optax_spd.adam_spd(**options), 2)
    ),
}


def optimizer(case: Case) -> Any:
    return (case.wrapper or optax_spd.adam_spd)(**({"learning_rate": RATE} | case.options))


@functools.cache
def step_of(name: str, form: str) -> Any:
    """The jitted update of a case, traced as on one CPU or as the chain."""
    case = CASES[name]
    tx = optimizer(case)

    @jax.jit
    def update(grads: Any, state: Any, params: Any) -> Any:
        within = one_device() if form == "in turn" else contextlib.nullcontext()
        with within, sizes_set(case.sizes):
            assert in_turn_taken(tx.update, grads, state, params, **case.extra) == (
                form == "in turn"
            )
            return tx.update(grads, state, params, **case.extra)

    return update


def gradients(name: str, steps: int = 5) -> list[Any]:
    case = CASES[name]
    return [numbers(10 + i, case.grad_dtypes or case.dtypes) for i in range(steps)]


def trained(name: str) -> Iterator[tuple[Any, Any, Any, Any, Any]]:
    """Each step's gradient, state, parameters, and what comes of them: updates and state."""
    params = numbers(0, CASES[name].dtypes)
    state = optimizer(CASES[name]).init(params)
    for grads in gradients(name):
        updates, new_state = step_of(name, "in turn")(grads, state, params)
        yield grads, state, params, updates, new_state
        params, state = optax.apply_updates(params, updates), new_state


def ratios(state: Any) -> np.ndarray:
    return np.asarray(optax.tree.get(state, "spd_ratio"))


def assert_close(found: Any, expected: Any) -> None:
    """The same structure and types, weak ones included, and nearly the same numbers."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    assert jax.tree.map(jax.typeof, found) == jax.tree.map(jax.typeof, expected)
    for (path, a), b in zip(
        jax.tree.leaves_with_path(found), jax.tree.leaves(expected), strict=True
    ):
        rtol = (
            max(1e-5, float(jnp.finfo(a.dtype).eps)) if jnp.isdtype(a.dtype, "real floating") else 0
        )
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-6, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize("name", CASES)
def test_every_step_is_the_chains(name: str) -> None:
    fired = []
    for step, (grads, state, params, *found) in enumerate(trained(name)):
        expected = step_of(name, "chain")(grads, state, params)
        assert_close(tuple(found), expected)
        fired.append(ratios(found[1]) > 0)
        if CASES[name].options.get("anchor", "initial") == "initial" and step == 0:
            assert not np.any(fired)  # all layers stand at the anchor
    assert np.all(np.any(fired, axis=0) | np.any(fired, axis=0)) or np.mean(fired) > 0.2
    assert np.mean(fired) < 0.8
    # The state's types are the same from init on: nothing is traced again.
    assert step_of(name, "in turn")._cache_size() == 1
