"""Whatever axes count the layers of a stack, and whatever is split, a step is that of one device.

How all methods train on a mesh is tested in tests/contract; what a compiled step does for it, and
parameters that are split by hand, in test_compiled_steps.py and beside the methods.
"""

import contextlib
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
import oracles
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from jax_support import host_memory_works, primitives
from tpgm_steps import projects_only

import optax_spd

pytestmark = projects_only
FTP = functools.partial(optax_spd.ftp, radius_learning_rate=0.1)
# Stages, and the gradient by which they act: SPD fires, FTP's radii grow.
STAGES: dict[str, tuple[Any, float]] = {
    "spd": (optax_spd.spd, 1.0),
    "ftp": (FTP, -1.0),
    "ftp in l2": (functools.partial(FTP, norm="l2"), -1.0),
    "tpgm": (optax_spd.tpgm, 1.0),
}


class Case(NamedTuple):
    """A model whose blocks are kept in one array, how it is split, and the stage.

    ``stacked`` are the axes of the kernels that count the blocks; biases, only there to be grouped
    with kernels, have them first. The mesh is x: 4, y: 2.
    """

    stage: str
    stacked: tuple[int, ...]
    kernels: tuple[int, ...]
    specs: Mapping[str, Any]
    grouped: bool = False

    @property
    def layers(self) -> Any:
        layers = optax_spd.stacked("blocks/bias", range(len(self.stacked)))
        layers = optax_spd.stacked("blocks/kernel", self.stacked, layers=layers)
        return optax_spd.by_module(layers=layers) if self.grouped else layers

    def params(self) -> Any:
        draw = np.random.default_rng(0)
        normal = lambda *shape: draw.normal(size=shape).astype(np.float32)
        biases = {"bias": normal(*(self.kernels[axis] for axis in self.stacked), 16)}
        blocks = {"kernel": normal(*self.kernels)} | (biases if self.grouped else {})
        return {"blocks": blocks, "dense": {"bias": normal(16), "kernel": normal(8, 16)}}


def specs(kernels: P, kernel: P, dense_bias: P, **bias: P) -> Mapping[str, Any]:
    return {"blocks": bias | {"kernel": kernels}, "dense": {"bias": dense_bias, "kernel": kernel}}


AXIS_0_WHOLE = ((0,), (2, 8, 16), specs(P(None, "y", "x"), P("x", "y"), P("y"), bias=P(None, "x")))
AXIS_1 = ((1,), (8, 2, 16), specs(P("x", "y"), P(None, ("x", "y")), P(("x", "y"))))
LAST_AXIS = ((2,), (8, 16, 2), specs(P(None, "x", "y"), P("y", "x"), P("x"), bias=P("y", "x")))
TWO_AXES = ((0, 1), (2, 2, 8), specs(P("y", None, "x"), P(("x", "y")), P()))
NUMBERS = ((0,), (8,), specs(P(("x", "y")), P("x"), P()))
MIDDLE = ((), (2, 8, 16), specs(P(None, ("x", "y")), P(None, "x"), P()))
CASES = {
    "spd, grouped, axis 0": Case("spd", *AXIS_0_WHOLE, grouped=True),
    "spd, axis 1": Case("spd", *AXIS_1),
    "spd, two axes": Case("spd", *TWO_AXES),
    "spd, one number a layer": Case("spd", *NUMBERS),
    "ftp, grouped, last axis": Case("ftp", *LAST_AXIS, grouped=True),
    "ftp in l2, axis 1": Case("ftp in l2", *AXIS_1),
    "tpgm, middle axis": Case("tpgm", *MIDDLE),
}


def two_steps(case: Case, params: Any) -> Any:
    """Two steps that double the deviation: the updates and what is decided."""
    make, sign = STAGES[case.stage]
    tx = make(anchor="zero", layers=case.layers)
    state, grads = tx.init(params), jax.tree.map(lambda x: sign * x, params)
    for _ in range(2):
        updates, state = tx.update(params, state, params, grad=grads)
    return updates, oracles.decisions(state)


def mesh_of(axis_type: AxisType) -> jax.sharding.Mesh:
    return jax.make_mesh((4, 2), ("x", "y"), axis_types=(axis_type,) * 2)


def assert_close(found: Any, expected: Any) -> None:
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6), found, expected
    )


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=lambda t: t.name)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_sharded_step_is_that_of_one_device(case: Case, axis_type: AxisType) -> None:
    mesh, step = mesh_of(axis_type), jax.jit(functools.partial(two_steps, case))
    updates, decided = expected = jax.device_get(step(case.params()))
    assert (decided > 1e-6).all()
    assert not np.allclose(updates["blocks"]["kernel"], case.params()["blocks"]["kernel"])
    if case.stage == "spd":  # it undoes the step of each layer
        np.testing.assert_allclose(decided, np.full_like(decided, 0.5), rtol=1e-6)
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), case.specs)
    params = jax.device_put(case.params(), shardings)
    for is_set in (False, True):
        with jax.set_mesh(mesh) if is_set else contextlib.nullcontext():
            found = jax.block_until_ready(step(params))
        assert_close(jax.device_get(found), expected)


if host_memory_works():  # on CPU, from JAX 0.10.2 on

    @pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=lambda t: t.name)
    @pytest.mark.parametrize("recipe", ["adam_spd", "adam_ftp", "adam_tpgm"])
    def test_a_large_anchor_in_host_memory_is_brought_in_for_either_pass(
        recipe: str, axis_type: AxisType
    ) -> None:
        mesh = mesh_of(axis_type)
        shape, spec = (1024, 256), P("y", "x")
        draw = np.random.default_rng(0)
        initial = {"w": draw.normal(size=shape).astype(np.float32)}
        where = NamedSharding(mesh, spec)
        tx = getattr(optax_spd, recipe)(0.1)

        @jax.jit
        def step(params: Any, state: Any, initial: Any, pull: Any) -> Any:
            updates, state = tx.update(optax.tree.scale(pull, initial), state, params)
            return optax.apply_updates(params, updates), state

        def train(params: Any, state: Any, initial: Any) -> Any:
            for pull in np.float32([-1.0, -1.0, 0.2, 0.2, 0.2]):
                params, state = jax.block_until_ready(step(params, state, initial, pull))
            return params, state

        with jax.set_mesh(mesh):
            params = {"w": jax.device_put(initial["w"], where)}
            on_host = {"w": jax.device_put(initial["w"], where.with_memory_kind("pinned_host"))}
            state = optax_spd.set_anchor(tx.init(params), on_host)
            jaxpr = step.trace(params, state, params, np.float32(1)).jaxpr
            assert list(primitives(jaxpr)).count("device_put") == 2
            found, state = train(params, state, params)
        held = optax.tree.get(state, "anchor")["w"]
        assert held.sharding.memory_kind == "pinned_host"
        expected, last = train(initial, tx.init(initial), initial)
        assert_close(found, expected)
        assert_close(oracles.decisions(state), oracles.decisions(last))
