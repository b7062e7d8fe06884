"""Orbax beyond one device: other meshes, and saving while training goes on.

That a resumed run is bit-identical for every method is in tests/contract; saving from
several processes is in test_processes.py.
"""

import contextlib
import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import orbax.checkpoint as ocp
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P, SingleDeviceSharding
from jax_support import host_memory_works

import optax_spd

STEPS, STOP = 8, 4
STACKED = optax_spd.stacked("blocks")
OPTIMIZERS = {
    "adam_ftp": optax_spd.adam_ftp(
        0.1,
        radius_learning_rate=0.1,
        state_dtype=jnp.bfloat16,
        mask={"bias": False, "blocks": True, "head": True},
        layers=STACKED,
    ),
    "adam_spd": optax_spd.adam_spd(0.1, layers=STACKED),
}
# The gradients turn round, and momentum does so later: that is when SPD acts.
SIGNS = (1.0, 1.0, -1.0, -1.0, -1.0, 1.0, 1.0, -1.0)


def arrays(seed: int) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(seed)
    shapes = {"bias": (16,), "blocks": (2, 16, 8), "head": (8, 16)}
    return {name: draw.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


PRETRAINED, PULL = arrays(0), arrays(1)


@functools.cache
def step_of(name: str) -> Any:
    """A jitted step that uses up parameters and state."""

    def step(params: Any, state: Any, pull: Any, sign: Any) -> Any:
        grads = jax.tree.map(lambda x: sign * x, pull)
        updates, state = OPTIMIZERS[name].update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return jax.jit(step, donate_argnums=(0, 1))


def train(name: str, params: Any, state: Any, pull: Any, start: int, stop: int) -> Any:
    for index in range(start, stop):
        params, state = step_of(name)(params, state, pull, SIGNS[index])
    return params, state


def copies(tree: Any) -> Any:
    """In buffers of their own; on devices, since what the host looks at is not donated."""
    return jax.tree.map(jnp.copy, tree)


def assert_same_to_the_bit(found: Any, expected: Any) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def assert_close(found: Any, expected: Any) -> None:
    """The same numbers; an array in bfloat16 may round the other way."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        rtol = 1e-2 if x.dtype == jnp.bfloat16 else 1e-5
        a, b = (np.asarray(z, np.float32) for z in (x, y))
        np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-6)


# Where things lie ---------------------------------------------------------------------------------


class Place:
    """A mesh, and how parameters are split over it."""

    def __init__(self, shape: tuple[int, ...], axis_type: AxisType, **specs: P) -> None:
        axes = ("x", "y")[: len(shape)]
        self.mesh = jax.make_mesh(shape, axes, axis_types=(axis_type,) * len(axes))
        self.params = {name: NamedSharding(self.mesh, spec) for name, spec in specs.items()}
        self.everywhere = NamedSharding(self.mesh, P())

    def used(self) -> Any:
        return jax.set_mesh(self.mesh)


class OneDevice(Place):
    """No mesh at all."""

    def __init__(self) -> None:
        self.everywhere = SingleDeviceSharding(jax.devices()[1])
        self.params = dict.fromkeys(PRETRAINED, self.everywhere)

    def used(self) -> Any:
        return contextlib.nullcontext()


PLACES = {
    "4x2": lambda: Place(
        (4, 2), AxisType.Auto, bias=P("x"), blocks=P(None, "x", "y"), head=P("y", "x")
    ),
    "2x4, explicit": lambda: Place(
        (2, 4), AxisType.Explicit, bias=P(), blocks=P("x", "y"), head=P(None, ("x", "y"))
    ),
    "8": lambda: Place((8,), AxisType.Auto, bias=P("x"), blocks=P(None, "x"), head=P("x")),
    "one device": OneDevice,
}


def layout(name: str, place: Place) -> tuple[Any, Any]:
    """The shardings of parameters and state, from shapes alone."""
    tx = OPTIMIZERS[name]
    is_masked = lambda x: isinstance(x, optax.MaskedNode)
    state = optax.tree.map_params(
        tx,
        lambda x, sharding: x if is_masked(x) else sharding,
        jax.eval_shape(tx.init, PRETRAINED),
        place.params,
        transform_non_params=lambda _: place.everywhere,
        is_leaf=is_masked,
    )
    return place.params, state


def target(name: str, place: Place) -> Any:
    """What Orbax is asked for; no array is made for it."""
    tx = OPTIMIZERS[name]
    shapes = jax.eval_shape(lambda params: (params, tx.init(params)), PRETRAINED)
    return jax.tree.map(lambda x, where: x.update(sharding=where), shapes, layout(name, place))


def begin(name: str, place: Place) -> Any:
    """Parameters and state before the first step, and what pulls at them, all in their place."""
    params, where = layout(name, place)
    start, pull = jax.device_put((PRETRAINED, PULL), (params, params))
    return start, jax.jit(OPTIMIZERS[name].init, out_shardings=where)(start), pull


def save(path: pathlib.Path, tree: Any) -> None:
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, tree)


def restore(path: pathlib.Path, wanted: Any) -> Any:
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(path, wanted)


def test_restored_on_any_mesh(tmp_path: pathlib.Path) -> None:
    name = "adam_ftp"
    first = PLACES["4x2"]()
    with first.used():
        *run, pull = begin(name, first)
        run = train(name, *run, pull, 0, STOP)
        saved = copies(run)
    save(tmp_path / "run", run)
    with first.used():
        end = train(name, *run, pull, STOP, STEPS)
    assert np.all(jax.device_get(oracles.decisions(end[1]) != oracles.decisions(saved[1])))
    for key, make in PLACES.items():
        place = make()
        found = restore(tmp_path / "run", target(name, place))
        assert_same_to_the_bit(found, saved)
        where = jax.tree.leaves(layout(name, place))
        for x, sharding in zip(jax.tree.leaves(found), where, strict=True):
            assert x.sharding.is_equivalent_to(sharding, x.ndim)
        with place.used():
            found = train(name, *found, jax.device_put(PULL, place.params), STOP, STEPS)
        same = assert_same_to_the_bit if key == "4x2" else assert_close
        same(found, end)


if host_memory_works():

    def test_an_anchor_in_host_memory_is_restored_there(tmp_path: pathlib.Path) -> None:
        name, place = "adam_spd", PLACES["8"]()
        _, state, _ = begin(name, place)
        on_host = {
            key: sharding.with_memory_kind("pinned_host") for key, sharding in place.params.items()
        }
        save(tmp_path / "run", optax_spd.set_anchor(state, jax.device_put(PRETRAINED, on_host)))
        _, (adam, spd) = target(name, place)
        anchor = {key: spd.anchor[key].update(sharding=on_host[key]) for key in on_host}
        found = restore(tmp_path / "run", (adam, spd._replace(anchor=anchor)))[1].anchor
        assert_same_to_the_bit(found, PRETRAINED)
        assert {key: x.sharding for key, x in found.items()} == on_host


# In the background --------------------------------------------------------------------------------


def test_a_manager_keeps_states_without_their_anchor(tmp_path: pathlib.Path) -> None:
    """The weights to stay near come from their own checkpoint, straight to where the run is."""
    name, place = "adam_ftp", PLACES["4x2"]()
    save(tmp_path / "pretrained", jax.tree.map(jnp.array, PRETRAINED))
    params, state, pull = begin(name, place)
    saved = {}
    with ocp.CheckpointManager(tmp_path / "run") as manager:  # asynchronous by default
        for index in range(STEPS):
            params, state = train(name, params, state, pull, index, index + 1)
            if index in (1, STOP):
                parts = {"params": params, "state": optax_spd.drop_anchor(state)}
                manager.save(index, args=composite(ocp.args.StandardSave, parts))
                saved[index] = copies(parts)
        manager.wait_until_finished()
        wanted = dict(zip(("params", "state"), target(name, place), strict=True))
        anchor = restore(tmp_path / "pretrained", wanted["params"])
        wanted["state"] = optax_spd.drop_anchor(wanted["state"])
        for index, expected in saved.items():
            found = manager.restore(index, args=composite(ocp.args.StandardRestore, wanted))
            found = {key: found[key] for key in wanted}
            assert_same_to_the_bit(found, expected)
            back = optax_spd.set_anchor(found["state"], anchor)
            run = train(name, found["params"], back, pull, index + 1, STEPS)
            assert_same_to_the_bit(run, (params, state))


def composite(make: Any, parts: dict[str, Any]) -> Any:
    return ocp.args.Composite(**{key: make(part) for key, part in parts.items()})
