"""Every library that calls an optimizer in its own way gets the numbers of a plain Optax loop."""

from typing import Any

import contract_methods
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest
from contract_methods import METHODS, every_method
from contract_runs import (
    GRADS,
    PRETRAINED,
    STEPS as GIVEN_STEPS,
    Module,
    assert_close,
    at,
    program,
    reference as contract_reference,
    step_of,
    vectors,
)
from flax import linen as nn, nnx
from flax.training.train_state import TrainState
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from jax_support import optimizer_sharding_works
from tpgm_steps import projects_only

import optax_spd

# Every method, on given gradients -----------------------------------------------------------------


@projects_only
@every_method()
def test_arguments_by_keyword_are_those_by_position(name: str) -> None:
    """As EasyDeL calls it. What a stage does not know it ignores."""
    tx = contract_methods.optimizer(name)
    by_keyword = optax.GradientTransformationExtraArgs(
        tx.init,
        lambda u, s, p, **extra: tx.update(updates=u, state=s, params=p, surplus="?", **extra),
    )

    def step(params: Any, grads: Any) -> Any:
        end, state = step_of(name, by_keyword)(params, tx.init(params), grads)
        return end, vectors(name, state)

    assert str(jax.make_jaxpr(step)(PRETRAINED, at(GRADS, 0))) == program(name)
    stage = METHODS[name].stage(layers=optax_spd.stacked("^blocks/"))
    extra = {"grad": PRETRAINED} if METHODS[name].gradient else {}
    named = lambda: stage.update(
        updates=PRETRAINED, state=stage.init(PRETRAINED), params=PRETRAINED, surplus="?", **extra
    )
    assert jax.tree.structure(jax.eval_shape(named)[0]) == jax.tree.structure(PRETRAINED)


def train_nnx(name: str, tx: Any, passes_grad: bool = False) -> Any:
    """Parameters and decisions of a run in nnx.Optimizer, which passes extra arguments on."""
    model = Module(PRETRAINED)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    boxes = nnx.state(model, nnx.Param)

    @nnx.jit
    def step(model: Module, optimizer: Any, grads: Any) -> None:
        extra = contract_methods.validation(name, nnx.state(model, nnx.Param))
        extra |= {"grad": grads} if passes_grad else {}
        optimizer.update(model, grads, **extra)

    seen = []
    for index in range(GIVEN_STEPS):
        grads = jax.tree.leaves(at(GRADS, index))
        step(model, optimizer, jax.tree.unflatten(jax.tree.structure(boxes), grads))
        seen.append(jax.device_get(vectors(name, optimizer.opt_state)))
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    return params, {field: np.stack([s[field] for s in seen]) for field in seen[0]}


@every_method()
def test_an_nnx_optimizer_runs_as_a_plain_loop(name: str) -> None:
    params, _, seen = contract_reference(name)
    found = train_nnx(name, contract_methods.optimizer(name))
    assert_close(found, (params, seen), rtol=1e-4)


@every_method(where=lambda method: method.gradient)
def test_an_nnx_optimizer_passes_the_gradient_on_to_a_bare_stage(name: str) -> None:
    stage = METHODS[name].stage(layers=optax_spd.stacked("^blocks/"))
    params, _, seen = contract_reference(name)
    found = train_nnx(name, METHODS[name].place(stage, optax.chain), passes_grad=True)
    assert_close(found, (params, seen), rtol=1e-4)


@every_method(where=lambda method: method.build is optax_spd.adam_spd)
@pytest.mark.parametrize("container", [dict, nnx.State], ids=lambda c: c.__name__)
def test_an_nnx_optimizer_gets_the_pretrained_weights_after_init(name: str, container: Any) -> None:
    """Loaded after ``tx.init``: the optimizer is made for a random model."""
    tx, model = contract_methods.optimizer(name), Module(jax.tree.map(np.ones_like, PRETRAINED))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    pretrained = PRETRAINED if container is dict else nnx.state(Module(PRETRAINED), nnx.Param)
    dropped = optax_spd.drop_anchor(optimizer.opt_state)
    dtype = METHODS[name].fixed.get("anchor_dtype")
    state = optax_spd.set_anchor(dropped, pretrained, anchor_dtype=dtype)
    optimizer.opt_state = nnx.data(state)
    optimizer.update(model, jax.tree.map(jnp.zeros_like, nnx.state(model, nnx.Param)))
    held = optax.tree.get(optimizer.opt_state, "anchor")
    expected = optax.tree.get(tx.init(PRETRAINED), "anchor")
    for x, y in zip(jax.tree.leaves(held), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(x, y)


# Placement ----------------------------------------------------------------------------------------

NORMAL = nnx.initializers.lecun_normal()


def train_linear(recipe: str, kernel_init: Any, steps: int, place: Any = None) -> Any:
    """A model and its optimizer, trained in jitted steps whose gradients turn round."""
    tx = optax_spd.adam_spd(0.1) if recipe == "adam_spd" else optax_spd.adam_ftp(0.1, k=0.5)
    model = nnx.Linear(8, 8, kernel_init=kernel_init, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    step = nnx.jit(lambda model, optimizer, grads: optimizer.update(model, grads))
    for index in range(steps):
        away = jnp.arange(1.0, 9.0) * (1.0 if index < 3 else -0.2)
        params = nnx.state(model, nnx.Param)
        step(model, optimizer, jax.tree.map(lambda x, u=away: u + 0.1 * x, params))
        jax.block_until_ready(nnx.state((model, optimizer)))
        if place is not None:  # else the partitioner may split the parameters too
            nnx.update(model, jax.device_put(nnx.state(model), place))
    return model, optimizer


def assert_placed(model: Any, optimizer: Any, kernel: Any, held: Any) -> None:
    """Where the kernel lies, and what the state holds of it."""
    assert model.kernel[...].sharding.is_equivalent_to(kernel, 2)
    fields = {"anchor", "ftp_deviation"}
    found = [optax.tree.get(optimizer.opt_state, field) for field in fields]
    for tree in [tree for tree in found if tree is not None]:
        assert tree["kernel"][...].sharding.is_equivalent_to(held, 2)


def assert_same_run(found: Any, expected: Any) -> None:
    leaves = lambda pair: list(map(np.asarray, jax.tree.leaves(nnx.state(pair))))
    assert_close(leaves(found), leaves(expected))


@pytest.mark.parametrize("recipe", ["adam_spd", "adam_ftp"])
def test_an_nnx_optimizer_with_sharding_metadata(recipe: str) -> None:
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    kernel_init = nnx.with_partitioning(NORMAL, ("x", "y"))
    split = NamedSharding(mesh, P("x", "y"))
    with jax.set_mesh(mesh):
        for steps in (0, 6):
            found = train_linear(recipe, kernel_init, steps)
            assert_placed(*found, split, split)
    assert_same_run(found, train_linear(recipe, NORMAL, 6))


if optimizer_sharding_works():  # from some Flax after 0.12.0 on

    @pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=lambda t: t.name)
    @pytest.mark.parametrize("recipe", ["adam_spd", "adam_ftp"])
    def test_an_nnx_optimizer_splits_its_state_alone(recipe: str, axis_type: AxisType) -> None:
        """The parameters are replicated, and their metadata has another sharding for the state."""
        mesh = jax.make_mesh((8,), ("x",), axis_types=(axis_type,))
        whole, split = NamedSharding(mesh, P()), NamedSharding(mesh, P("x"))
        kernel_init = nnx.with_metadata(
            NORMAL, out_sharding=(None, None), optimizer_sharding=("x", None)
        )
        with jax.set_mesh(mesh):
            for steps in (0, 6):
                found = train_linear(recipe, kernel_init, steps, place=whole)
                assert_placed(*found, whole, split)
        assert_same_run(found, train_linear(recipe, NORMAL, 6))


# MaxText -----------------------------------------------------------------------------------------

COUNT = 3


class Block(nn.Module):
    """One layer of a scanned stack."""

    @nn.compact
    def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
        initializer = nn.initializers.lecun_normal()
        boxed = nn.with_logical_partitioning(initializer, ("embed", "mlp"))
        return x + nn.tanh(nn.Dense(8, kernel_init=boxed)(x)), None


class ScannedNet(nn.Module):
    """Layers stacked along axis 1, as MaxText keeps them."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scanned = nn.scan(
            Block,
            variable_axes={"params": 1},
            split_rngs={"params": True},
            length=COUNT,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        return scanned(name="layers")(x, None)[0]


def unrolled(tree: Any, axis: int) -> list[Any]:
    """Every layer of the stacked arrays by itself, in ``layer_names`` order."""
    return [
        np.take(x, i, axis) for x in map(np.asarray, jax.tree.leaves(tree)) for i in range(COUNT)
    ]


def test_maxtext_scanned_boxed_layers_loaded_after_init() -> None:
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    net, x = ScannedNet(), jnp.ones((1, 8))
    tx = optax_spd.adam_spd(0.1, layers=optax_spd.stacked("layers", axis=1))

    def create(key: jax.Array) -> TrainState:
        params = net.init(key, x)["params"]
        return TrainState.create(apply_fn=net.apply, params=params, tx=tx)

    specs = nn.get_partition_spec(jax.eval_shape(create, jax.random.key(0)))
    rules = (("embed", "x"), ("mlp", "y"))
    shardings = nn.logical_to_mesh_sharding(specs, mesh, rules)
    state = jax.jit(create, out_shardings=shardings)(jax.random.key(0))

    # The pretrained weights come without boxes, and only after tx.init.
    loaded = nn.meta.unbox(net.init(jax.random.key(1), x)["params"])
    loaded = jax.device_put(loaded, nn.meta.unbox(shardings.params))
    state = state.replace(
        params=nn.meta.replace_boxed(state.params, loaded),
        opt_state=optax_spd.set_anchor(state.opt_state, loaded),
    )
    step = jax.jit(lambda state, grads: state.apply_gradients(grads=grads), out_shardings=shardings)
    draw, given, ratios = np.random.default_rng(0), [], []
    drift = jax.tree.map(lambda x: draw.normal(size=x.shape).astype(np.float32), loaded)
    for sign in (1.0, 1.0, -1.0, -1.0, 1.0, 1.0):
        grads = jax.tree.map(lambda x, s=sign: np.float32(s) * x, drift)
        state = jax.block_until_ready(step(state, nn.meta.replace_boxed(state.params, grads)))
        given.append(unrolled(grads, axis=1))
        ratios.append(np.asarray(oracles.decisions(state.opt_state)))
    anchor = optax.tree.get(state.opt_state, "anchor")
    assert jax.tree.structure(anchor) == jax.tree.structure(state.params)
    kernel = anchor["layers"]["Dense_0"]["kernel"].unbox(apply_constraint=False)
    assert kernel.sharding.is_equivalent_to(NamedSharding(mesh, P("x", None, "y")), 3)
    assert oracles.decisions(state.opt_state).sharding.is_fully_replicated

    over_steps = jax.tree.map(lambda *leaves: np.stack(leaves), *given)
    expected, decided = oracles.train(optax_spd.adam_spd(0.1), unrolled(loaded, axis=1), over_steps)
    assert 0 < np.count_nonzero(decided) < decided.size
    assert_close((unrolled(state.params, axis=1), np.stack(ratios)), (expected, decided), 1e-5)
