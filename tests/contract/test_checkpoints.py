"""A run that was saved and restored goes on to the bit as if it had never stopped."""

import functools
import pathlib
import pickle
from typing import Any

import contract_methods
import flax.serialization
import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from contract_methods import METHODS, every_method
from contract_runs import (
    GRADS,
    PRETRAINED,
    STOP,
    assert_same_bits,
    at,
    jitted,
    on_device,
    reference,
    run,
    step_of,
)

import optax_spd

WITH_ANCHOR = every_method(where=lambda method: method.has_anchor)


@functools.cache
def interrupted(name: str) -> tuple[Any, Any]:
    """Parameters and state in the middle of a run."""
    tx, params = contract_methods.optimizer(name), on_device(PRETRAINED)
    first = jax.tree.map(lambda g: g[:STOP], GRADS)
    return jax.device_get(run(name, jitted(name), params, tx.init(params), first)[:2])


def fresh(name: str) -> tuple[Any, Any]:
    """What a new process has before it restores: the structure of parameters and state."""
    shapes = lambda: (PRETRAINED, contract_methods.optimizer(name).init(PRETRAINED))
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: x.update(sharding=here), jax.eval_shape(shapes))


@pytest.fixture(scope="module")
def orbax_folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """All methods' runs in one checkpoint, and once more without their anchors."""
    folder: pathlib.Path = tmp_path_factory.mktemp("orbax")
    whole = {name: on_device(interrupted(name)) for name in METHODS}
    dropped = {n: run for n, run in whole.items() if METHODS[n].has_anchor}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "whole", whole)
        checkpointer.save(folder / "dropped", optax_spd.drop_anchor(dropped))
    return folder


@pytest.fixture(scope="module")
def from_orbax(orbax_folder: pathlib.Path) -> dict[str, Any]:
    with ocp.StandardCheckpointer() as checkpointer:
        return dict(checkpointer.restore(orbax_folder / "whole", {n: fresh(n) for n in METHODS}))


@pytest.fixture(scope="module")
def without_anchor(orbax_folder: pathlib.Path) -> dict[str, Any]:
    """With the markers in place, and with the None that Orbax gives for what it lacks."""
    shapes = {n: fresh(n) for n, method in METHODS.items() if method.has_anchor}
    with ocp.StandardCheckpointer() as checkpointer:
        path = orbax_folder / "dropped"
        return {
            "markers": checkpointer.restore(path, optax_spd.drop_anchor(shapes)),
            "None": checkpointer.restore(path, shapes),
        }


def restored(kind: str, name: str, from_orbax: dict[str, Any]) -> Any:
    if kind == "Orbax":
        return from_orbax[name]
    if kind == "pickle":
        return pickle.loads(pickle.dumps(interrupted(name)))
    target = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), fresh(name))
    saved = flax.serialization.to_bytes(interrupted(name))
    return flax.serialization.from_bytes(target, saved)


@pytest.mark.parametrize("kind", ["Orbax", "flax.serialization", "pickle"])
@every_method()
def test_a_resumed_run_is_the_uninterrupted_one(
    name: str, kind: str, from_orbax: dict[str, Any]
) -> None:
    found = restored(kind, name, from_orbax)
    assert_same_bits(jax.device_get(found), interrupted(name))
    params, state, seen = run(name, jitted(name), *on_device(found), start=STOP)
    expected_params, expected_state, expected = reference(name)
    assert_same_bits(jax.device_get((params, state)), (expected_params, expected_state))
    assert_same_bits(seen, {field: decided[STOP:] for field, decided in expected.items()})


@pytest.mark.parametrize("kind", ["markers", "None"])
@WITH_ANCHOR
def test_a_run_saved_without_its_anchor_stops_until_it_is_set_again(
    name: str, kind: str, without_anchor: dict[str, Any]
) -> None:
    params, state = interrupted(name)
    found = without_anchor[kind][name][1]
    anchors = [tree for _, tree in optax.tree.get_all_with_path(found, "anchor") if tree]
    assert not jax.tree.leaves(anchors)
    assert len(jax.tree.leaves(found)) < len(jax.tree.leaves(state))
    step = step_of(name, contract_methods.optimizer(name))
    # with_frozen sees the None before the stage does, and says where.
    told = "anchor was dropped; call set_anchor" if kind == "markers" else "anchor"
    with pytest.raises(ValueError, match=told):
        jax.eval_shape(step, params, found, at(GRADS, STOP))
    dtype = METHODS[name].fixed.get("anchor_dtype")
    set_again = optax_spd.set_anchor(found, PRETRAINED, anchor_dtype=dtype)
    assert_same_bits(jax.device_get(set_again), state)


@WITH_ANCHOR
def test_set_anchor_copies_and_the_next_step_uses_it(name: str) -> None:
    tx, other = contract_methods.optimizer(name), jax.tree.map(lambda x: x + 1, PRETRAINED)
    source = on_device(other)
    late = optax_spd.set_anchor(tx.init(on_device(PRETRAINED)), source)
    pointers = [x.unsafe_buffer_pointer() for x in jax.tree.leaves((late, source))]
    assert len(set(pointers)) == len(pointers)
    early = METHODS[name].optimizer(layers=optax_spd.stacked("^blocks/"), anchor=other)
    assert_same_bits(jax.device_get(late), jax.device_get(early.init(on_device(PRETRAINED))))
