"""A run that was saved and restored goes on to the bit as if it had never stopped."""

import functools
import pathlib
import pickle
import re
from collections.abc import Callable
from typing import Any

import contract_methods
import equinox as eqx
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
from optax_spd.anchors import policy

try:
    from orbax.checkpoint import v1
except ImportError:  # where versions until now keep it
    from orbax.checkpoint.experimental import v1

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


Read = Callable[[Any], Any]
"""Reads what was saved into a target of shapes."""


def arrays(target: Any) -> Any:
    return jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), target)


def orbax(path: pathlib.Path, tree: Any) -> Read:
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, tree)

    def read(target: Any) -> Any:
        with ocp.StandardCheckpointer() as checkpointer:
            return checkpointer.restore(path, target)

    return read


def orbax_pytree(path: pathlib.Path, tree: Any) -> Read:
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(path, tree)

    def read(target: Any) -> Any:
        how = ocp.args.PyTreeRestore(
            target, restore_args=ocp.checkpoint_utils.construct_restore_args(target)
        )
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            return checkpointer.restore(path, how)

    return read


def orbax_v1(path: pathlib.Path, tree: Any) -> Read:
    v1.save(path, tree)
    return lambda target: v1.load(path, target)


def flax_bytes(path: pathlib.Path, tree: Any) -> Read:
    saved = flax.serialization.to_bytes(tree)
    return lambda target: flax.serialization.from_bytes(arrays(target), saved)


def equinox(path: pathlib.Path, tree: Any) -> Read:
    eqx.tree_serialise_leaves(path, tree)
    return lambda target: eqx.tree_deserialise_leaves(path, target)


def pickled(path: pathlib.Path, tree: Any) -> Read:
    saved = pickle.dumps(tree)
    return lambda target: pickle.loads(saved)


FORMATS: dict[str, Callable[[pathlib.Path, Any], Read]] = {
    "Orbax": orbax,
    "Orbax PyTree": orbax_pytree,
    "flax bytes": flax_bytes,
    "Equinox": equinox,
    "pickle": pickled,
}
# In Orbax 0.11 these have other names, and leave sockets open; and a part of a checkpoint is not
# restored without warnings.
ORBAX_IS_NEW = hasattr(v1, "save")
if ORBAX_IS_NEW:
    FORMATS["Orbax v1"] = orbax_v1
MARKER = policy.DroppedAnchor()
# Format, whether the anchor was saved, what the target has in its place (None for the anchor), and
# what that leaves there. Equinox reads arrays one after the other, pickle has no target.
WITHOUT_ANCHOR = [
    *((kind, "dropped", MARKER, MARKER) for kind in FORMATS),
    *((kind, "dropped", None, None) for kind in FORMATS if kind.startswith("Orbax")),
    *((kind, "dropped", None, {}) for kind in FORMATS if kind.startswith("flax")),
]
if ORBAX_IS_NEW:
    ORBAX = ("Orbax", "Orbax PyTree", "Orbax v1")
    WITHOUT_ANCHOR += [(kind, "whole", MARKER, MARKER) for kind in ORBAX]
    WITHOUT_ANCHOR += [(kind, "whole", ocp.PLACEHOLDER, ...) for kind in ORBAX[1:]]
# One of each kind.
LEFT = {repr(row[-1]): row for row in reversed(WITHOUT_ANCHOR)}


def replaced(tree: Any, old: Any, new: Any) -> Any:
    """The tree with a node in place of each node that equals ``old`` and is of its type."""
    is_old = lambda node: type(node) is type(old) and node == old
    return jax.tree.map(lambda node: new if is_old(node) else node, tree, is_leaf=is_old)


@pytest.fixture(scope="module")
def restored(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    """The runs of all methods, through a file of any format."""
    folder = tmp_path_factory.mktemp("checkpoints")

    @functools.cache
    def saved(kind: str, what: str) -> Read:
        runs = {name: on_device(interrupted(name)) for name in METHODS}
        if what == "dropped":
            runs = {n: drop(run) if METHODS[n].has_anchor else run for n, run in runs.items()}
        return FORMATS[kind](folder / f"{kind}, {what}", runs)

    @functools.cache
    def read(kind: str, what: str, target: Any) -> dict[str, Any]:
        shapes = {name: fresh(name) for name in METHODS}
        if target is not None:
            shapes = {n: drop(run) if METHODS[n].has_anchor else run for n, run in shapes.items()}
            shapes = replaced(shapes, MARKER, target)
        return dict(saved(kind, what)(shapes))

    return read


def drop(run: Any) -> Any:
    params, state = run
    return params, optax_spd.drop_anchor(state)


@pytest.mark.parametrize("kind", FORMATS)
@every_method()
def test_a_resumed_run_is_the_uninterrupted_one(
    name: str, kind: str, restored: Callable[..., dict[str, Any]]
) -> None:
    found = restored(kind, "whole", None)[name]
    assert_same_bits(jax.device_get(found), interrupted(name))
    assert_goes_on(name, *found)


def assert_goes_on(name: str, params: Any, state: Any) -> None:
    """The rest of the run is that of the uninterrupted one."""
    found = run(name, jitted(name), *on_device((params, state)), start=STOP)
    expected_params, expected_state, expected = reference(name)
    assert_same_bits(jax.device_get(found[:2]), (expected_params, expected_state))
    assert_same_bits(found[2], {field: decided[STOP:] for field, decided in expected.items()})


@pytest.mark.parametrize("way", WITHOUT_ANCHOR, ids=lambda row: ", ".join(map(str, row)))
def test_what_a_format_leaves_where_the_anchor_was(
    way: Any, restored: Callable[..., dict[str, Any]]
) -> None:
    *how, left = way
    for name, found in restored(*how).items():
        if METHODS[name].has_anchor:
            expected = replaced(drop(interrupted(name)), MARKER, left)
            assert jax.tree.structure(found) == jax.tree.structure(expected)
            mended = set_again(name, found[1])
            assert_same_bits(jax.device_get((found[0], mended)), interrupted(name))


def set_again(name: str, state: Any) -> Any:
    dtype = METHODS[name].fixed.get("anchor_dtype")
    return optax_spd.set_anchor(state, PRETRAINED, anchor_dtype=dtype)


@pytest.mark.parametrize("left", LEFT)
@WITH_ANCHOR
def test_a_run_saved_without_its_anchor_stops_until_it_is_set_again(
    name: str, left: str, restored: Callable[..., dict[str, Any]]
) -> None:
    params, state = restored(*LEFT[left][:-1])[name]
    anchors = [tree for _, tree in optax.tree.get_all_with_path(state, "anchor") if tree]
    assert not any(hasattr(x, "shape") for x in jax.tree.leaves(anchors))
    step = step_of(name, contract_methods.optimizer(name))
    told = rf"found {re.escape(left)}.*the anchor was dropped; call set_anchor"
    with pytest.raises(ValueError, match=told):
        jax.eval_shape(lambda params, grads: step(params, state, grads), params, at(GRADS, STOP))
    assert_goes_on(name, params, set_again(name, optax_spd.drop_anchor(state)))
    assert_goes_on(name, params, set_again(name, state))


@WITH_ANCHOR
def test_set_anchor_copies_and_the_next_step_uses_it(name: str) -> None:
    tx, other = contract_methods.optimizer(name), jax.tree.map(lambda x: x + 1, PRETRAINED)
    source = on_device(other)
    late = optax_spd.set_anchor(tx.init(on_device(PRETRAINED)), source)
    pointers = [x.unsafe_buffer_pointer() for x in jax.tree.leaves((late, source))]
    assert len(set(pointers)) == len(pointers)
    early = METHODS[name].optimizer(layers=optax_spd.stacked("^blocks/"), anchor=other)
    assert_same_bits(jax.device_get(late), jax.device_get(early.init(on_device(PRETRAINED))))
