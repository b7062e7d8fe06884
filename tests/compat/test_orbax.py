"""Orbax beyond one device: other meshes, host memory, and saving while training goes on.

That a resumed run is bit-identical for every method is in tests/contract; saving from several
processes is in test_processes.py.
"""

import contextlib
import pathlib
from collections.abc import Callable
from typing import Any

import contract_methods
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from contract_runs import (
    GRADS,
    PRETRAINED,
    STEPS,
    STOP,
    assert_close,
    assert_same_bits,
    at,
    state_like_params,
    step_of,
    vectors,
)
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P, SingleDeviceSharding
from jax_support import host_memory_works

import optax_spd

# FTP keeps most: an anchor and a deviation, here in bfloat16, and vectors of each layer.
NAME = "adam_ftp"
TX = contract_methods.optimizer(NAME)


class Place:
    """Where parameters lie: the shardings of bias, kernel, embedding and head."""

    def __init__(self, everywhere: Any, *shardings: Any) -> None:
        self.everywhere = everywhere
        self.params = jax.tree.unflatten(jax.tree.structure(PRETRAINED), shardings)
        self.state = state_like_params(TX, self.params, everywhere)

    @property
    def mesh(self) -> Any:
        """A context in which the mesh is set, where there is one."""
        is_mesh = isinstance(self.everywhere, NamedSharding)
        return jax.set_mesh(self.everywhere.mesh) if is_mesh else contextlib.nullcontext()

    def target(self) -> Any:
        """What Orbax is asked for; no array is made for it."""
        shapes = jax.eval_shape(lambda params: (params, TX.init(params)), PRETRAINED)
        return jax.tree.map(lambda x, s: x.update(sharding=s), shapes, (self.params, self.state))

    def begin(self) -> Any:
        """Parameters and state before the first step."""
        params = jax.device_put(PRETRAINED, self.params)
        return params, jax.jit(TX.init, out_shardings=self.state)(params)

    def train(self, run: Any, start: int, stop: int) -> Any:
        """Goes on, in the same buffers."""
        for index in range(start, stop):
            grads = jax.device_put(at(GRADS, index), self.params)
            run = jax.block_until_ready(STEP(*run, grads))
        return run


STEP = jax.jit(step_of(NAME, TX), donate_argnums=(0, 1))


def on_mesh(shape: tuple[int, ...], axis_type: AxisType, *specs: P) -> Place:
    axes = ("x", "y")[: len(shape)]
    mesh = jax.make_mesh(shape, axes, axis_types=(axis_type,) * len(axes))
    return Place(NamedSharding(mesh, P()), *(NamedSharding(mesh, spec) for spec in specs))


def on_one_device() -> Place:
    where = SingleDeviceSharding(jax.devices()[1])
    return Place(where, *[where] * 4)


def first_mesh() -> Place:
    specs = P(None, "x"), P(None, "x", "y"), P("x"), P("y", "x")
    return on_mesh((4, 2), AxisType.Auto, *specs)


def explicit_mesh() -> Place:
    specs = P(), P("x", "y"), P(("x", "y")), P(None, "y")
    return on_mesh((2, 4), AxisType.Explicit, *specs)


def save(path: pathlib.Path, tree: Any) -> None:
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, tree)


def restore(path: pathlib.Path, wanted: Any) -> Any:
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(path, wanted)


def test_restored_on_any_mesh(tmp_path: pathlib.Path) -> None:
    first = first_mesh()
    with first.mesh:
        run = first.train(first.begin(), 0, STOP)
        saved = jax.tree.map(jnp.copy, run)
    save(tmp_path / "run", run)  # Orbax of 2025 cannot save where a mesh is set
    with first.mesh:
        end = first.train(run, STOP, STEPS)
    decided = [vectors(NAME, state)["ftp_radii"] for _, state in (saved, end)]
    assert np.all(jax.device_get(decided[0]) != jax.device_get(decided[1]))
    places: list[Callable[[], Place]] = [first_mesh, explicit_mesh, on_one_device]
    for make in places:
        place = make()
        found = restore(tmp_path / "run", place.target())
        assert_same_bits(jax.device_get(found), jax.device_get(saved))
        wanted = jax.tree.leaves((place.params, place.state))
        for x, sharding in zip(jax.tree.leaves(found), wanted, strict=True):
            assert x.sharding.is_equivalent_to(sharding, x.ndim)
        with place.mesh:
            found = place.train(found, STOP, STEPS)
        same = assert_same_bits if make is first_mesh else assert_close
        same(jax.device_get(found), jax.device_get(end))


if host_memory_works():

    def test_an_anchor_in_host_memory_is_restored_there(tmp_path: pathlib.Path) -> None:
        place = first_mesh()
        on_host = jax.tree.map(lambda s: s.with_memory_kind("pinned_host"), place.params)
        state = optax_spd.set_anchor(place.begin()[1], jax.device_put(PRETRAINED, on_host))
        save(tmp_path / "run", state)
        wanted = place.target()[1]
        anchor = jax.tree.map(
            lambda x, s: x.update(sharding=s), optax.tree.get(wanted, "anchor"), on_host
        )
        found = restore(tmp_path / "run", optax.tree.set(wanted, anchor=anchor))
        held = optax.tree.get(found, "anchor")
        assert_same_bits(jax.device_get(held), PRETRAINED)
        assert jax.tree.map(lambda x: x.sharding, held) == on_host


def test_a_manager_keeps_states_without_their_anchor(tmp_path: pathlib.Path) -> None:
    """The weights to stay near come from their own checkpoint, straight to where the run is."""
    place, saved = first_mesh(), {}
    save(tmp_path / "pretrained", jax.tree.map(jnp.array, PRETRAINED))
    run = place.begin()
    composite = lambda make, parts: ocp.args.Composite(**{k: make(x) for k, x in parts.items()})
    with ocp.CheckpointManager(tmp_path / "run") as manager:  # asynchronous by default
        for index in range(STEPS):
            run = place.train(run, index, index + 1)
            if index in (1, STOP):
                parts = {"params": run[0], "state": optax_spd.drop_anchor(run[1])}
                manager.save(index, args=composite(ocp.args.StandardSave, parts))
                saved[index] = jax.tree.map(jnp.copy, parts)
        manager.wait_until_finished()
        params, state = place.target()
        anchor = restore(tmp_path / "pretrained", params)
        wanted = {"params": params, "state": optax_spd.drop_anchor(state)}
        for index, expected in saved.items():
            found = manager.restore(index, args=composite(ocp.args.StandardRestore, wanted))
            found = {key: found[key] for key in wanted}
            assert_same_bits(jax.device_get(found), jax.device_get(expected))
            back = found["params"], optax_spd.set_anchor(found["state"], anchor)
            end = place.train(back, index + 1, STEPS)
            assert_same_bits(jax.device_get(end), jax.device_get(run))
