"""Whatever axes count the layers of a stack, and whatever is split, a step is that of one device.

What each method's state keeps where is tested in tests/contract, what the compiled step does for
it, and parameters that are split by hand, in test_compiled_steps.py and beside the methods.
"""

import functools
from collections.abc import Callable, Mapping
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


class Case(NamedTuple):
    """A model whose blocks are kept in one array, how it is split, and what trains it.

    ``stacked`` are the axes of the kernels that count the blocks; biases, only there to be grouped
    with kernels, have them first. The mesh is x: 4, y: 2.
    """

    recipe: str
    stacked: tuple[int, ...]
    kernels: tuple[int, ...]
    specs: Mapping[str, P]
    grouped: bool = False

    @property
    def layers(self) -> Any:
        layers = optax_spd.stacked("blocks/bias", range(len(self.stacked)))
        layers = optax_spd.stacked("blocks/kernel", self.stacked, layers=layers)
        return optax_spd.by_module(layers=layers) if self.grouped else layers


def specs(kernels: P, kernel: P, dense_bias: P, **bias: P) -> Mapping[str, Any]:
    return {"blocks": bias | {"kernel": kernels}, "dense": {"bias": dense_bias, "kernel": kernel}}


RECIPES: dict[str, Callable[..., Any]] = {
    "adam_spd": functools.partial(optax_spd.adam_spd, 0.1),
    "adam_ftp": functools.partial(optax_spd.adam_ftp, 0.1, radius_learning_rate=0.1),
    "sgd_ftp in l2": functools.partial(
        optax_spd.sgd_ftp, 0.1, 0.9, norm="l2", radius_learning_rate=0.1
    ),
    "adam_tpgm": functools.partial(optax_spd.adam_tpgm, 0.1),
}
AXIS_0_WHOLE = ((0,), (2, 8, 16), specs(P(None, "y", "x"), P("x", "y"), P("y"), bias=P(None, "x")))
AXIS_1 = ((1,), (8, 2, 16), specs(P("x", "y"), P(None, ("x", "y")), P(("x", "y"))))
LAST_AXIS = ((2,), (8, 16, 2), specs(P(None, "x", "y"), P("y", "x"), P("x"), bias=P("y", "x")))
TWO_AXES = ((0, 1), (2, 2, 8), specs(P("y", None, "x"), P(("x", "y")), P()))
NUMBERS = ((0,), (8,), specs(P(("x", "y")), P("x"), P()))
MIDDLE = ((), (2, 8, 16), specs(P(None, ("x", "y")), P(None, "x"), P()))
CASES = {
    "adam_spd, grouped, axis 0": Case("adam_spd", *AXIS_0_WHOLE, grouped=True),
    "adam_spd, axis 1": Case("adam_spd", *AXIS_1),
    "adam_spd, two axes": Case("adam_spd", *TWO_AXES),
    "adam_spd, one number a layer": Case("adam_spd", *NUMBERS),
    "adam_ftp, grouped, last axis": Case("adam_ftp", *LAST_AXIS, grouped=True),
    "sgd_ftp in l2, axis 1": Case("sgd_ftp in l2", *AXIS_1),
    "adam_tpgm, middle axis": Case("adam_tpgm", *MIDDLE),
}
all_cases = pytest.mark.parametrize("name", CASES)


def start(case: Case) -> Any:
    """The model on the host."""
    draw = np.random.default_rng(0)
    normal = lambda *shape: draw.normal(size=shape).astype(np.float32)
    kernels = {"kernel": normal(*case.kernels)}
    biases = {"bias": normal(*(case.kernels[axis] for axis in case.stacked), 16)}
    dense = {"bias": normal(16), "kernel": normal(8, 16)}
    return {"blocks": biases | kernels if case.grouped else kernels, "dense": dense}


def unrolled(case: Case, tree: Any) -> Any:
    """A tree like the model with arrays of their own for every block, in the layers' order."""
    blocks: dict[str, Any] = {}
    for name, array in tree["blocks"].items():
        axes = case.stacked if name == "kernel" else range(len(case.stacked))
        front = np.moveaxis(np.asarray(array), axes, range(len(axes)))
        for index in np.ndindex(front.shape[: len(axes)]):
            blocks.setdefault(str(index), {})[name] = front[index]
    return {**tree, "blocks": blocks}


def stepper(tx: Any) -> Callable[..., Any]:
    def step(params: Any, state: Any, initial: Any, pull: jax.Array) -> Any:
        updates, state = tx.update(optax.tree.scale(pull, initial), state, params)
        return optax.apply_updates(params, updates), state, oracles.decisions(state)

    return step


def train(step: Callable[..., Any], params: Any, state: Any, initial: Any) -> Any:
    """Pushes away and pulls back; SPD fires on the way, and radii grow and shrink."""
    found = []
    for pull in np.float32([-1.0, -1.0, 0.2, 0.2, 0.2, -0.5]):
        # One step at a time: of several under way on eight virtual devices that share two cores,
        # the collectives can wait for each other forever.
        params, state, decided = jax.block_until_ready(step(params, state, initial, pull))
        found.append(decided)
    return params, state, np.stack(jax.device_get(found))


@functools.cache
def one_by_one(name: str) -> tuple[Any, np.ndarray]:
    """The model with an array for every block, trained on one device."""
    case = CASES[name]
    tx = RECIPES[case.recipe](layers=optax_spd.by_module() if case.grouped else None)
    initial = unrolled(case, start(case))
    params, _, decided = train(jax.jit(stepper(tx)), initial, tx.init(initial), initial)
    assert np.mean(decided > 1e-6) > 0.2
    assert len(np.unique(decided)) > 2
    return jax.device_get(params), decided


def mesh_of(axis_type: AxisType) -> jax.sharding.Mesh:
    return jax.make_mesh((4, 2), ("x", "y"), axis_types=(axis_type,) * 2)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=lambda t: t.name)
@all_cases
def test_a_sharded_step_is_that_of_single_layers_on_one_device(
    name: str, axis_type: AxisType
) -> None:
    case, mesh = CASES[name], mesh_of(axis_type)
    tx = RECIPES[case.recipe](layers=case.layers)
    with jax.set_mesh(mesh):
        shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), case.specs)
        initial = jax.device_put(start(case), shardings)
        params, _, decided = train(jax.jit(stepper(tx)), initial, tx.init(initial), initial)
    expected, wanted = one_by_one(name)
    found = unrolled(case, jax.device_get(params))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6), found, expected
    )
    np.testing.assert_allclose(decided, wanted, rtol=1e-4, atol=1e-6)


# An anchor in host memory ------------------------------------------------------------------------


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
        tx = RECIPES[recipe]()
        with jax.set_mesh(mesh):
            params = {"w": jax.device_put(initial["w"], where)}
            on_host = {"w": jax.device_put(initial["w"], where.with_memory_kind("pinned_host"))}
            state = optax_spd.set_anchor(tx.init(params), on_host)
            step = jax.jit(stepper(tx))
            jaxpr = step.trace(params, state, params, np.float32(1)).jaxpr
            assert list(primitives(jaxpr)).count("device_put") == 2
            found, state, decided = train(step, params, state, params)
        held = optax.tree.get(state, "anchor")["w"]
        assert held.sharding.memory_kind == "pinned_host"
        expected, _, wanted = train(jax.jit(stepper(tx)), initial, tx.init(initial), initial)
        np.testing.assert_allclose(found["w"], expected["w"], rtol=2e-5, atol=2e-6)
        np.testing.assert_allclose(decided, wanted, rtol=1e-4, atol=1e-6)
