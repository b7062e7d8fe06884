"""Optax's wrappers, schedules and other libraries' containers change no number."""

import functools
import re
from collections.abc import Callable
from typing import Any

import contract_methods
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from contract_methods import METHODS, every_method
from contract_runs import (
    GRADS,
    PRETRAINED,
    STEPS,
    STOP,
    Module,
    arrays,
    assert_close,
    assert_same_bits,
    on_device,
    program,
    reference,
    scan,
    step_of,
    vectors,
)
from flax import linen as nn, nnx
from flax.core import freeze
from jax.sharding import NamedSharding, PartitionSpec as P

import optax_spd

LAYERS = optax_spd.stacked("^blocks/")


def trained(name: str, tx: Any, params: Any = PRETRAINED, grads: Any = GRADS) -> Any:
    """Parameters and decisions of a scanned run."""

    def whole(params: Any) -> Any:
        params, _, seen = scan(name, tx, params, tx.init(params), grads)
        return params, seen

    return jax.device_get(jax.jit(whole)(params))


def expected(name: str) -> Any:
    params, _, seen = reference(name)
    return params, seen


# Hyperparameters ----------------------------------------------------------------------------------

WITH_NUMBERS = every_method(where=lambda method: bool(method.numbers))


def changing(value: float) -> Callable[[Any], Any]:
    """A schedule that halves a number in the middle of the run."""
    return lambda count: jnp.where(count < STOP, value, value / 2)


def injected(name: str) -> Any:
    """The optimizer with its numbers in the state; static is what its docstring says."""
    method = METHODS[name]
    of_the_table = [option for option in ("layers",) if method.takes(option)]
    documented = contract_methods.documented_static_args
    static = of_the_table if method.is_wrapper else documented(method.build)
    make = optax.inject_hyperparams(method.build, static_args=static)
    options = {"layers": LAYERS} if method.takes("layers") else {}
    return method.place(make(**method.numbers, **method.fixed, **options))


@WITH_NUMBERS
def test_injected_numbers_may_change_as_a_schedule_does(name: str) -> None:
    """With constant numbers it is the reference run, with changing ones the schedule's."""
    numbers, tx = METHODS[name].numbers, injected(name)

    @jax.jit
    def run_with(values: dict[str, jax.Array]) -> Any:
        def body(carry: Any, given: Any) -> Any:
            params, state = carry
            grads, now = given
            held = optax.tree.get(state, "hyperparams")
            now = {key: now.get(key, old) for key, old in held.items()}
            state = optax.tree.set(state, hyperparams=now)
            params, state = step_of(name, tx)(params, state, grads)
            return (params, state), vectors(name, state)

        start = (PRETRAINED, tx.init(PRETRAINED))
        (params, _), seen = jax.lax.scan(body, start, (GRADS, values))
        return params, seen

    kept = {key: np.full(STEPS, value, np.float32) for key, value in numbers.items()}
    assert_close(run_with(kept), expected(name), rtol=1e-4, atol=1e-5)
    halved = {key: np.where(np.arange(STEPS) < STOP, x, x / 2) for key, x in kept.items()}
    found = run_with(halved)
    schedules = {key: changing(value) for key, value in numbers.items()}
    scheduled = METHODS[name].optimizer(layers=LAYERS, **schedules)
    assert_close(trained(name, scheduled), found, rtol=1e-4, atol=1e-5)
    apart = jax.tree.map(lambda a, b: np.abs(a - b).max(), found[0], expected(name)[0])
    assert max(jax.tree.leaves(apart)) > 1e-3


# Steps and parts ----------------------------------------------------------------------------------


@every_method()
def test_multi_steps_is_a_step_on_the_mean_gradient(name: str) -> None:
    noise = arrays(7, STEPS)
    micro = jax.tree.map(
        lambda g, n: np.stack([g + n, g - n], axis=1).reshape(2 * STEPS, *g.shape[1:]), GRADS, noise
    )
    tx = optax.MultiSteps(contract_methods.optimizer(name), 2)
    params, seen = trained(name, tx, grads=micro)
    every_second = {field: decided[1::2] for field, decided in seen.items()}
    assert_close((params, every_second), expected(name), rtol=1e-3, atol=2e-5)


MASK = {"blocks": True, "embed": True, "head": False}
LABELS = {"blocks": "a", "embed": "a", "head": "b"}
# In a part of the tree the validation loss has no full parameters.
MASKABLE = every_method("parts", where=lambda method: not method.validates)


def chosen(tree: Any) -> Any:
    return {"blocks": tree["blocks"], "embed": tree["embed"]}


@functools.cache
def alone(name: str) -> Any:
    """The run on a tree that has the chosen arrays only."""
    return trained(name, contract_methods.optimizer(name), chosen(PRETRAINED), chosen(GRADS))


@MASKABLE
def test_masked_is_the_method_on_the_chosen_arrays_alone(name: str) -> None:
    params, seen = trained(name, optax.masked(contract_methods.optimizer(name), MASK))
    assert_close((chosen(params), seen), alone(name))
    passed = jax.tree.map(lambda x, g: x + g.sum(axis=0), PRETRAINED["head"], GRADS["head"])
    assert_close(params["head"], passed, atol=1e-5)


@every_method(where=lambda method: method.validates)
def test_masked_methods_refuse_validation_data(name: str) -> None:
    tx = optax.masked(contract_methods.optimizer(name), MASK)
    with pytest.raises(ValueError, match="validation_fn"):
        trained(name, tx)


@every_method(where=lambda m: m.is_stage and m.takes("mask") and not m.validates)
def test_a_mask_of_its_own_does_what_masked_does(name: str) -> None:
    method = METHODS[name]
    own = method.optimizer(layers=LAYERS, mask=lambda params: MASK)
    around = method.place(optax.masked(method.stage(layers=LAYERS), MASK))
    assert_close(trained(name, own), trained(name, around))


@pytest.mark.parametrize("masks_extra_args", [False, True])
@every_method(where=lambda method: method.gradient)
def test_a_stage_for_a_part_gets_the_gradient_whole_or_masked(
    name: str, masks_extra_args: bool
) -> None:
    """From the wrapper around it, or from a caller who passes all of it."""
    method, options = METHODS[name], {"mask_compatible_extra_args": masks_extra_args}
    stage = method.stage(layers=LAYERS)
    expected = trained(name, method.optimizer(layers=LAYERS, mask=MASK))
    parts = optax.partition({"a": stage, "b": optax.identity()}, LABELS, **options)
    assert_close(trained(name, method.place(parts)), expected)
    masked = optax.masked(stage, optax_spd.path_mask("^blocks", "^embed"), **options)
    assert_close(trained(name, method.place(masked)), expected)
    if not masks_extra_args:
        bare = method.place(masked, optax.chain)
        called = optax.GradientTransformation(
            bare.init, lambda grads, state, params: bare.update(grads, state, params, grad=grads)
        )
        assert_close(trained(name, called), expected)


# States inside wrappers ---------------------------------------------------------------------------

WRAPPERS: dict[str, Callable[[str], Any]] = {
    "plain": contract_methods.optimizer,
    "masked": lambda name: optax.masked(contract_methods.optimizer(name), MASK),
    "partition": lambda name: optax.partition(
        {"a": contract_methods.optimizer(name), "b": optax.sgd(0.1)}, LABELS
    ),
    "MultiSteps": lambda name: optax.MultiSteps(contract_methods.optimizer(name), 2),
    "inject_hyperparams": injected,
    "apply_if_finite": lambda name: optax.apply_if_finite(contract_methods.optimizer(name), 2),
}
PARTS = ("masked", "partition")
INSIDE = pytest.mark.parametrize("wrapper", WRAPPERS)


@pytest.mark.parametrize(
    ("name", "wrapper"),
    [
        (n, w)
        for n, m in METHODS.items()
        for w in WRAPPERS
        if "parameter-like" not in m.excepted and not ("parts" in m.excepted and w in PARTS)
    ],
)
def test_tree_map_params_finds_what_is_like_the_parameters(name: str, wrapper: str) -> None:
    tx = WRAPPERS[wrapper](name)
    state = jax.eval_shape(tx.init, PRETRAINED)
    marked = optax.tree.map_params(
        tx, lambda _: "param", state, transform_non_params=lambda _: "other"
    )
    assert jax.tree.structure(marked) == jax.tree.structure(state)
    # Moments, anchors and accumulated gradients stand at a parameter's path; counts and vectors
    # with one entry for each layer stand at the path of their field.
    for path, mark in jax.tree.leaves_with_path(marked):
        like_parameter = re.search(r"(kernel|bias|embedding)", jax.tree_util.keystr(path))
        assert mark == ("param" if like_parameter else "other"), path
    assert "param" in jax.tree.leaves(marked)


@INSIDE
@every_method(where=lambda method: method.has_anchor)
def test_the_anchor_is_dropped_and_set_through_wrappers(name: str, wrapper: str) -> None:
    state = WRAPPERS[wrapper](name).init(PRETRAINED)
    dropped = optax_spd.drop_anchor(state)
    assert len(jax.tree.leaves(dropped)) < len(jax.tree.leaves(state))
    dtype = METHODS[name].fixed.get("anchor_dtype")
    found = optax_spd.set_anchor(
        dropped, jax.tree.map(lambda x: x + 1, PRETRAINED), anchor_dtype=dtype
    )
    assert jax.tree.structure(found) == jax.tree.structure(state)
    changed = [
        jax.tree_util.keystr(path)
        for (path, x), y in zip(
            jax.tree.leaves_with_path(found), jax.tree.leaves(state), strict=True
        )
        if not np.array_equal(x, y)
    ]
    assert len(changed) == len(jax.tree.leaves(state)) - len(jax.tree.leaves(dropped))
    assert all("anchor" in path for path in changed)
    assert_same_bits(jax.device_get(optax_spd.set_anchor(found, PRETRAINED)), jax.device_get(state))


# Containers ---------------------------------------------------------------------------------------


class Layer(eqx.Module):
    """What an Equinox filter leaves None."""

    bias: Any = None
    embedding: Any = None
    kernel: Any = None
    activation: Any = None


class Net(eqx.Module):
    blocks: Layer
    embed: Layer
    head: Layer


def partitioned(tree: Any) -> Any:
    return jax.tree.map(lambda x: nn.Partitioned(jnp.asarray(x), (None,) * np.ndim(x)), tree)


def equinox(tree: Any) -> Any:
    return Net(**{name: Layer(**arrays) for name, arrays in tree.items()})


CONTAINERS: dict[str, Callable[[Any], Any]] = {
    "FrozenDict": freeze,
    "linen Partitioned": partitioned,
    "nnx.State": lambda tree: nnx.state(Module(tree), nnx.Param),
    "Equinox": equinox,
}


@pytest.mark.parametrize("container", CONTAINERS)
@every_method()
def test_every_container_has_the_program_of_a_dict(name: str, container: str) -> None:
    assert program(name, CONTAINERS[container]) == program(name)


# Init ---------------------------------------------------------------------------------------------


@every_method()
def test_init_answers_shapes_with_shapes(name: str) -> None:
    tx, params = contract_methods.optimizer(name), on_device(PRETRAINED)
    shapes = jax.eval_shape(lambda: params)
    answered = tx.init(shapes)
    described = lambda tree: jax.tree.map(lambda x: (x.shape, jnp.dtype(x.dtype)), tree)
    assert described(answered) == described(tx.init(params))
    assert jax.eval_shape(tx.init, shapes) == jax.eval_shape(tx.init, params)
    held = METHODS[name].stage(layers=LAYERS).init(shapes)
    for field in ("anchor", "ftp_deviation"):
        for _, tree in optax.tree.get_all_with_path(held, field):
            assert all(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(tree))


@every_method(where=lambda method: method.has_anchor)
def test_init_answers_shardings_with_shardings(name: str) -> None:
    mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    split = lambda x: NamedSharding(mesh, P(*[None] * (x.ndim - 1), "x"))
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=split(x)), PRETRAINED
    )
    held = METHODS[name].stage(layers=LAYERS).init(shapes)
    fields = ("anchor", "ftp_deviation")
    found = [tree for field in fields for _, tree in optax.tree.get_all_with_path(held, field)]
    leaves = jax.tree.leaves(found)
    assert leaves
    assert [x.sharding for x in leaves] == [split(x) for x in leaves]
