"""Every library that calls an optimizer in its own way gets the numbers of a plain Optax loop."""

import functools
from typing import Any, NamedTuple

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

NOT_VALIDATING = every_method(where=lambda method: not method.validates)


@NOT_VALIDATING
def test_a_linen_train_state_runs_the_program_of_a_plain_loop(name: str) -> None:
    tx = contract_methods.optimizer(name)

    def step(params: Any, grads: Any) -> Any:
        state = TrainState.create(apply_fn=None, params=params, tx=tx)
        state = state.apply_gradients(grads=grads)
        return state.params, vectors(name, state.opt_state)

    assert str(jax.make_jaxpr(step)(PRETRAINED, at(GRADS, 0))) == program(name)


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


# Real models --------------------------------------------------------------------------------------

RATE, STEPS, LAYERS = 0.1, 12, 3
FTP = {"k": 0.5, "radius_learning_rate": 0.05}
# Data whose target changes sign every third step: momentum then carries Adam on against the
# gradient, which is when SPD acts.
KEY, OTHER_KEY = jax.random.split(jax.random.key(0))
DRAW = np.random.default_rng(0)
X, Y = (jnp.asarray(DRAW.normal(size=(16, n)), jnp.float32) for n in (4, 8))


def target(step: int) -> jax.Array:
    return Y * (1.0 if (step // 3) % 2 == 0 else -1.0)


def squares(prediction: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.mean((prediction - y) ** 2)


class Run(NamedTuple):
    """What a training run came to: the final parameters, and r or γ at every step and layer."""

    params: Any
    ratios: np.ndarray


def plain(tree: Any) -> dict[str, jax.Array]:
    """Any tree's arrays in a plain dict on one device, in the same order."""
    return {f"{i:03}": jnp.asarray(np.asarray(x)) for i, x in enumerate(jax.tree.leaves(tree))}


def reference(params: Any, grads: list[Any], tx: Any = None) -> Run:
    """The run of a plain loop on recorded gradients; the optimizer wants ``grad=``."""
    tx = tx or optax.chain(optax.adam(RATE), optax_spd.spd())

    def step(carry: Any, grad: Any) -> Any:
        params, state = carry
        updates, state = tx.update(grad, state, params, grad=grad)
        return (optax.apply_updates(params, updates), state), oracles.decisions(state)

    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *grads)
    scan = jax.jit(lambda params: jax.lax.scan(step, (params, tx.init(params)), stacked))
    (params, _), ratios = scan(params)
    return Run(params, np.asarray(ratios))


def assert_same_run(found: Run, expected: Run) -> None:
    """Checks parameters and ratios, in a run in which SPD acts, but not always, or γ changes."""
    nothing = 1e-8  # the smallest radius, too
    assert (expected.ratios > nothing).any()
    assert (expected.ratios <= nothing).any()
    np.testing.assert_allclose(found.ratios, expected.ratios, rtol=1e-5, atol=1e-6)
    assert_close(plain(found.params), plain(expected.params))


def assert_like_plain_loop(start: Any, end: Any, grads: Any, ratios: Any, tx: Any = None) -> None:
    """Replays the gradients that a client saw in a plain loop, and compares the runs."""
    expected = reference(plain(start), [plain(g) for g in grads], tx)
    assert_same_run(Run(end, np.stack([np.asarray(r) for r in ratios])), expected)


# Flax linen ---------------------------------------------------------------------------------------


def linen_step(state: TrainState, y: jax.Array) -> tuple[TrainState, Any]:
    grads = jax.grad(lambda params: squares(state.apply_fn({"params": params}, X), y))(state.params)
    return state.apply_gradients(grads=grads), grads


def create_linen(model: nn.Module, tx: Any, key: jax.Array) -> TrainState:
    return TrainState.create(apply_fn=model.apply, params=model.init(key, X)["params"], tx=tx)


def run_linen(state: TrainState, step: Any) -> tuple[TrainState, list[Any], list[Any]]:
    grads, ratios = [], []
    for index in range(STEPS):
        state, grad = step(state, target(index))
        grads.append(grad)
        ratios.append(oracles.decisions(state.opt_state))
    return state, grads, ratios


RULES = (("embed", "x"), ("mlp", "y"))


# Flax NNX ----------------------------------------------------------------------------------------


NORMAL = nnx.initializers.lecun_normal()


class NNXNet(nnx.Module):
    """Two layers and a variable that is no parameter."""

    def __init__(self, rngs: nnx.Rngs, kernel_init: Any = NORMAL) -> None:
        self.first = nnx.Linear(4, 8, kernel_init=kernel_init, rngs=rngs)
        self.second = nnx.Linear(8, 8, kernel_init=kernel_init, rngs=rngs)
        self.calls = nnx.Variable(jnp.zeros((), jnp.int32))

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.second(nnx.tanh(self.first(x)))


def nnx_loss(model: NNXNet, y: jax.Array) -> jax.Array:
    return squares(model(X), y)


def run_nnx(model: NNXNet, optimizer: Any) -> tuple[Any, list[Any], list[Any]]:
    """Trains in a jitted step; returns the first parameters, the gradients and the ratios."""

    @nnx.jit
    def step(model: NNXNet, optimizer: Any, y: jax.Array) -> Any:
        grads = nnx.grad(nnx_loss)(model, y)
        optimizer.update(model, grads)
        return jax.tree.leaves(grads)

    start = plain(nnx.state(model, nnx.Param))
    grads, ratios = [], []
    for index in range(STEPS):
        grads.append(step(model, optimizer, target(index)))
        ratios.extend(jax.tree.leaves(oracles.decisions(optimizer.opt_state)))
    return start, grads, ratios


@pytest.mark.parametrize("recipe", ["adam_spd", "adam_ftp"])
def test_an_nnx_optimizer_with_sharding_metadata(recipe: str) -> None:
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    kernel_init = nnx.with_partitioning(NORMAL, ("x", "y"))
    tx = optax_spd.adam_spd(RATE) if recipe == "adam_spd" else optax_spd.adam_ftp(RATE, **FTP)
    with jax.set_mesh(mesh):

        @nnx.jit
        def create() -> Any:
            model = NNXNet(nnx.Rngs(0), kernel_init)
            optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
            for node in (model, optimizer):
                state = nnx.state(node)
                nnx.update(
                    node, jax.lax.with_sharding_constraint(state, nnx.get_partition_spec(state))
                )
            return model, optimizer

        model, optimizer = create()
        start, grads, ratios = run_nnx(model, optimizer)
        for field in ("anchor", "ftp_deviation") if recipe == "adam_ftp" else ("anchor",):
            kernel = optax.tree.get(optimizer.opt_state, field)["first"]["kernel"][...]
            assert kernel.sharding.is_equivalent_to(NamedSharding(mesh, P("x", "y")), 2)
            assert kernel.sharding.is_equivalent_to(model.first.kernel[...].sharding, 2)
    end = nnx.state(model, nnx.Param)
    ftp = optax.chain(optax.adam(RATE), optax_spd.ftp(**FTP))
    assert_like_plain_loop(start, end, grads, ratios, ftp if recipe == "adam_ftp" else None)


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
        tx = optax_spd.adam_spd(RATE) if recipe == "adam_spd" else optax_spd.adam_ftp(RATE, **FTP)
        fields = ("anchor", "ftp_deviation") if recipe == "adam_ftp" else ("anchor",)

        def train(kernel_init: Any, steps: int) -> Any:
            model = nnx.Linear(8, 8, kernel_init=kernel_init, rngs=nnx.Rngs(0))
            optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
            step = nnx.jit(lambda model, optimizer, grads: optimizer.update(model, grads))
            for index in range(steps):
                away = target(index)[:8, 0]
                params = nnx.state(model, nnx.Param)
                step(model, optimizer, jax.tree.map(lambda x, u=away: u + 0.1 * x, params))
                jax.block_until_ready(nnx.state((model, optimizer)))
                if kernel_init is not NORMAL:  # else the partitioner may split the parameters too
                    nnx.update(model, jax.device_put(nnx.state(model), whole))
            return model, optimizer

        with jax.set_mesh(mesh):
            for steps in (0, 6):
                model, optimizer = train(kernel_init, steps)
                assert model.kernel[...].sharding.is_equivalent_to(whole, 2)
                for field in fields:
                    kernel = optax.tree.get(optimizer.opt_state, field)["kernel"][...]
                    assert kernel.sharding.is_equivalent_to(split, 2)
        expected_model, expected = train(NORMAL, 6)
        assert_close(
            plain(nnx.state((model, optimizer))), plain(nnx.state((expected_model, expected)))
        )


# MaxText -----------------------------------------------------------------------------------------


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
            length=LAYERS,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        return scanned(name="layers")(jnp.tile(x, 2), None)[0]


def unrolled(tree: Any) -> dict[str, jax.Array]:
    """Every layer of the stacked arrays by itself, in ``layer_names`` order."""
    return {
        f"{i:02}[{layer}]": jnp.asarray(np.take(np.asarray(leaf), layer, axis=1))
        for i, leaf in enumerate(jax.tree.leaves(tree))
        for layer in range(LAYERS)
    }


def test_maxtext_scanned_boxed_layers_loaded_after_init() -> None:
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    net = ScannedNet()
    tx = optax_spd.adam_spd(RATE, layers=optax_spd.stacked("layers", axis=1))
    create = functools.partial(create_linen, net, tx)
    abstract = jax.eval_shape(create, KEY)
    shardings = nn.logical_to_mesh_sharding(nn.get_partition_spec(abstract), mesh, RULES)
    start = jax.jit(create, out_shardings=shardings)(KEY)

    # The pretrained weights come without boxes, and only after tx.init.
    loaded = nn.meta.unbox(net.init(OTHER_KEY, X)["params"])
    loaded = jax.device_put(loaded, nn.meta.unbox(shardings.params))
    start = start.replace(
        params=nn.meta.replace_boxed(start.params, loaded),
        opt_state=optax_spd.set_anchor(start.opt_state, loaded),
    )
    step = jax.jit(linen_step, out_shardings=(shardings, None))
    end, grads, ratios = run_linen(start, step)
    assert ratios[0].shape == (2 * LAYERS,)
    for state in (start, end):
        anchor = optax.tree.get(state.opt_state, "anchor")
        assert jax.tree.structure(anchor) == jax.tree.structure(state.params)
        kernel = anchor["layers"]["Dense_0"]["kernel"].unbox(apply_constraint=False)
        assert kernel.sharding.is_equivalent_to(NamedSharding(mesh, P("x", None, "y")), 3)
        assert oracles.decisions(state.opt_state).sharding.is_fully_replicated

    replayed = [unrolled(g) for g in grads]
    expected = reference(unrolled(loaded), replayed)
    assert_same_run(Run(unrolled(end.params), np.stack(ratios)), expected)
