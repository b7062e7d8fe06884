"""A step gives the same numbers however it runs: jit, eager, scan, vmap, donated, on any mesh."""

import functools
import re
from typing import Any

import contract_methods
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from contract_methods import METHODS, every_method
from contract_runs import (
    GRADS,
    PRETRAINED,
    assert_close,
    at,
    jitted,
    on_device,
    reference,
    run,
    scan,
    step_of,
    types,
)
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from jax_support import equations, host_memory_works, primitives

import optax_spd


def test_every_public_stage_wrapper_and_recipe_has_a_line() -> None:
    lines = {name.partition(",")[0] for name in METHODS}
    # Every stage of the table stands in one of these.
    assert lines == contract_methods.public_makers() - {"chain", "with_gradient"}


@functools.cache
def without_the_method(make: Any) -> Any:
    """The parameters that the inner optimizer alone comes to."""
    tx = make()

    def step(carry: Any, grads: Any) -> Any:
        params, state = carry
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    return jax.jit(lambda p: jax.lax.scan(step, (p, tx.init(p)), GRADS)[0][0])(PRETRAINED)


@every_method()
def test_the_method_acts_in_the_run_that_all_tests_compare_with(name: str) -> None:
    params, _, seen = reference(name)
    plain = without_the_method(METHODS[name].inner)
    changed = jax.tree.map(lambda a, b: bool(np.abs(a - b).max() > 1e-3), params, plain)
    assert any(jax.tree.leaves(changed))
    for field, decided in seen.items():
        assert len(np.unique(decided)) > 2, field


@every_method()
def test_a_scanned_and_vmapped_run_is_the_jitted_loop(name: str) -> None:
    """Two members of an ensemble; the first is the run of the loop, the second has its own."""
    tx = contract_methods.optimizer(name)
    members = jax.tree.map(lambda x: jnp.stack([x, x[::-1] * 1.5]), PRETRAINED)
    state = jax.vmap(tx.init)(members)
    ensemble = jax.vmap(lambda params, state: scan(name, tx, params, state, GRADS))
    found = jax.jit(ensemble)(members, state)
    assert_close(at(found, 0), reference(name), rtol=1e-4)
    params = on_device(at(members, 1))
    assert_close(at(found, 1), run(name, jitted(name), params, tx.init(params)), rtol=1e-4)


@every_method()
def test_an_eager_step_is_a_jitted_step(name: str) -> None:
    tx, params = contract_methods.optimizer(name), on_device(PRETRAINED)
    state = tx.init(params)
    eager = jax.device_get(step_of(name, tx)(params, state, at(GRADS, 0)))
    assert_close(eager, jitted(name)(params, state, at(GRADS, 0)))


@every_method("eager")
def test_later_eager_steps_compile_nothing(name: str, caplog: pytest.LogCaptureFixture) -> None:
    tx, params = contract_methods.optimizer(name), on_device(PRETRAINED)
    step, state = step_of(name, tx), tx.init(params)
    for index in range(2):
        params, state = step(params, state, at(GRADS, index))
    with jax.log_compiles():
        step(params, state, at(GRADS, 2))
    assert not re.findall("Finished XLA compilation of .*", caplog.text)


@every_method()
def test_a_step_may_use_up_parameters_and_state(name: str) -> None:
    """Every array of a new state is a buffer of its own, made by a jitted init or not."""
    tx = contract_methods.optimizer(name)
    for init in (tx.init, jax.jit(tx.init)):
        params = on_device(PRETRAINED)
        state = init(params)
        given = jax.tree.leaves((params, state))
        pointers = [x.unsafe_buffer_pointer() for x in given]
        assert len(set(pointers)) == len(pointers)
        jax.block_until_ready(jitted(name)(params, state, at(GRADS, 0)))
        # A step does not read what it decided last; that stays. No array of the model has one axis.
        assert all(x.is_deleted() for x in given if x.ndim > 1)


@every_method()
def test_types_never_change_and_later_steps_compile_nothing(name: str) -> None:
    tx, params = contract_methods.optimizer(name), on_device(PRETRAINED)
    state = tx.init(params)
    before = types((params, state))
    assert types((params, jax.jit(tx.init)(params))) == before
    # A weak type would be lost in a checkpoint.
    assert not any(held.weak_type for held in jax.tree.leaves(before))
    programs = []
    for index in range(3):
        params, state = jitted(name)(params, state, at(GRADS, index))
        assert types((params, state)) == before
        programs.append(jitted(name)._cache_size())
    assert programs[0] == programs[-1]


@every_method()
def test_a_step_calls_nothing_on_the_host(name: str) -> None:
    tx = contract_methods.optimizer(name)
    state = jax.eval_shape(tx.init, PRETRAINED)
    jaxpr = jax.make_jaxpr(step_of(name, tx))(PRETRAINED, state, at(GRADS, 0))
    # Older versions of JAX note a constant as a device_put to no device, which moves nothing.
    found = {
        equation.primitive.name
        for equation in equations(jaxpr.jaxpr)
        if set(equation.params.get("devices", "?")) != {None}
    }
    assert "mul" in found
    forbidden = ("callback", "device_put", "infeed", "outfeed", "print")
    assert not [primitive for primitive in found if any(word in primitive for word in forbidden)]


# Sharding -----------------------------------------------------------------------------------------

# The axis that counts the blocks is split, and one split goes over both axes of the mesh.
SPECS = {
    "blocks": {"bias": P("y", None), "kernel": P("y", "x")},
    "embed": {"embedding": P(("x", "y"))},
    "head": {"kernel": P("y", "x")},
}


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=lambda t: t.name)
@every_method()
def test_a_sharded_run_is_the_run_on_one_device(name: str, axis_type: AxisType) -> None:
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(axis_type,) * 2)
    tx = contract_methods.optimizer(name)
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), SPECS)
    over_steps = jax.tree.map(lambda spec: NamedSharding(mesh, P(None, *spec)), SPECS)
    with jax.set_mesh(mesh):
        params = jax.device_put(PRETRAINED, shardings)
        state = jax.jit(tx.init)(params)
        assert_placed(tx, state, shardings)
        before = types(state)
        if axis_type == AxisType.Explicit:
            assert types(tx.init(params)) == before
        found = run(
            name, jax.jit(step_of(name, tx)), params, state, jax.device_put(GRADS, over_steps)
        )
    assert types(found[1]) == before
    assert_placed(tx, found[1], shardings)
    for x, sharding in zip(jax.tree.leaves(found[0]), jax.tree.leaves(shardings), strict=True):
        assert x.sharding.is_equivalent_to(sharding, x.ndim)
    assert_close(found, reference(name), rtol=1e-4)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=lambda t: t.name)
@every_method("split anchor")
def test_on_a_mesh_the_anchor_alone_may_be_split(name: str, axis_type: AxisType) -> None:
    """Parameters and the rest of the state are whole on each device."""
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(axis_type,) * 2)
    whole = NamedSharding(mesh, P())
    tx, params = contract_methods.optimizer(name), jax.device_put(PRETRAINED, whole)
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), SPECS)
    with jax.set_mesh(mesh):
        state = jax.device_put(tx.init(params), whole)
        if METHODS[name].has_anchor:
            state = optax_spd.set_anchor(
                state,
                jax.device_put(PRETRAINED, shardings),
                anchor_dtype=METHODS[name].fixed.get("anchor_dtype"),
            )
        before = types((params, state))
        grads = jax.device_put(GRADS, whole)
        found = run(name, jax.jit(step_of(name, tx)), params, state, grads)
    assert types(found[:2]) == before
    for _, anchor in optax.tree.get_all_with_path(found[1], "anchor"):
        split = [not x.sharding.is_fully_replicated for x in jax.tree.leaves(anchor)]
        assert all(split)
    assert_close(found, reference(name), rtol=1e-4)


def assert_placed(tx: Any, state: Any, shardings: Any) -> None:
    """What is like a parameter in a state lies where its parameter does."""
    is_missing = lambda node: isinstance(node, optax.MaskedNode)
    placed = optax.tree.map_params(
        tx,
        lambda x, sharding: is_missing(x) or x.sharding.is_equivalent_to(sharding, x.ndim),
        state,
        shardings,
        transform_non_params=lambda _: None,
        is_leaf=is_missing,
    )
    assert all(jax.tree.leaves(placed)), placed


if host_memory_works():  # on CPU, from JAX 0.10.2 on

    @every_method(where=lambda method: method.has_anchor)
    def test_an_anchor_in_host_memory_stays_there(name: str) -> None:
        """It is brought in array by array in every step, and given back where it was."""
        mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
        tx = contract_methods.optimizer(name)
        shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), SPECS)
        on_host = jax.tree.map(lambda s: s.with_memory_kind("pinned_host"), shardings)
        params = jax.device_put(PRETRAINED, shardings)
        dtype = METHODS[name].fixed.get("anchor_dtype")
        anchor = jax.device_put(
            jax.tree.map(lambda x: x.astype(dtype or x.dtype), PRETRAINED), on_host
        )
        state = optax_spd.set_anchor(tx.init(params), anchor)
        kinds = lambda tree: [x.sharding.memory_kind for x in jax.tree.leaves(tree)]
        before, step = kinds(state), jax.jit(step_of(name, tx), donate_argnums=(0, 1))
        held = [tree for _, tree in optax.tree.get_all_with_path(state, "anchor") if tree]
        assert set(kinds(held)) == {"pinned_host"}
        jaxpr = step.trace(params, state, at(GRADS, 0)).jaxpr
        stages = 2 if name == "with_anchor" else 1
        assert list(primitives(jaxpr)).count("device_put") == stages * len(kinds(held))
        with jax.set_mesh(mesh):
            found = run(name, step, params, state)
        assert kinds(found[1]) == before
        assert_close((found[0], found[2]), (reference(name)[0], reference(name)[2]), rtol=1e-4)
