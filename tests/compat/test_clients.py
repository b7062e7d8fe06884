"""Every library that calls an optimizer in its own way gets the numbers of a plain Optax loop."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest
from flax import linen as nn, nnx
from flax.training.train_state import TrainState
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import optax_spd

RATE = 0.1
STEPS = 12
LAYERS = 3


FTP = {"k": 0.5, "radius_learning_rate": 0.05}


@functools.cache
def make(form: str) -> optax.GradientTransformationExtraArgs:
    """Adam with SPD or FTP, in each of the forms that need no ``grad=`` from the loop."""
    if form == "adam_ftp":
        return optax_spd.adam_ftp(RATE, **FTP)
    inner, stage = optax.adam(RATE), optax_spd.spd(1.0)
    if form == "chain":
        return optax_spd.chain(inner, stage)
    if form == "with_gradient":
        return optax_spd.with_gradient(optax.chain(inner, stage))
    return optax_spd.adam_spd(RATE)


FORMS = pytest.mark.parametrize("form", ["adam_spd", "chain", "adam_ftp"])


@functools.cache
def plain_of(form: str) -> Any:
    """What a form is compared with."""
    return plain_ftp() if form == "adam_ftp" else plain_optimizer()


@functools.cache
def plain_ftp() -> Any:
    """The bare Optax chain with FTP; wants ``grad=``."""
    return optax.chain(optax.adam(RATE), optax_spd.ftp(**FTP))


def plain_optimizer(weight_decay: Any = 1.0, rate: Any = RATE, **options: Any) -> Any:
    """The bare Optax chain that every client is compared with; wants ``grad=``."""
    return optax.chain(optax.adam(rate), optax_spd.spd(weight_decay, **options))


class Run(NamedTuple):
    """What a training run came to: the final parameters, and r or γ at every step and layer."""

    params: Any
    ratios: np.ndarray


def plain(tree: Any) -> dict[str, jax.Array]:
    """Any tree's arrays in a plain dict on one device, in the same order."""
    return {f"{i:03}": jnp.asarray(np.asarray(x)) for i, x in enumerate(jax.tree.leaves(tree))}


def stack(trees: list[Any]) -> Any:
    """A list of trees as one tree with a leading step axis."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


@functools.cache
def scan_of(tx: Any) -> Any:
    """A jitted plain loop; many tests compare with the same one, so it is compiled once for all."""

    def step(carry: Any, grad: Any) -> Any:
        params, state = carry
        updates, state = tx.update(grad, state, params, grad=grad)
        return (optax.apply_updates(params, updates), state), ratio_of(state)

    return jax.jit(lambda params, grads: jax.lax.scan(step, (params, tx.init(params)), grads))


def reference(tx: Any, params: Any, grads: Any) -> Run:
    """The run of a plain loop: ``tx.update(grads, state, params, grad=grads)``."""
    (params, _), ratios = scan_of(tx)(params, grads)
    return Run(params, np.asarray(ratios))


def assert_same_run(found: Run, expected: Run, rtol: float = 1e-5) -> None:
    """Checks parameters and ratios, in a run in which SPD acts, but not always, or γ changes."""
    atol = rtol / 10
    nothing = 1e-8  # the smallest radius, too
    assert (expected.ratios > nothing).any()
    assert (expected.ratios <= nothing).any()
    np.testing.assert_allclose(found.ratios, expected.ratios, rtol=rtol, atol=atol)
    found_params, expected_params = plain(found.params), plain(expected.params)
    assert found_params.keys() == expected_params.keys()
    for name, value in expected_params.items():
        np.testing.assert_allclose(found_params[name], value, rtol=rtol, atol=atol, err_msg=name)


def assert_like_plain_loop(
    params: Any, state_of: Callable[[int], Any], final: Any, grads: list[Any], tx: Any = None
) -> None:
    """Replays the gradients that a client saw in a plain loop, and compares the runs.

    Args:
      params: the client's parameters at the start.
      state_of: the optimizer state after a step, or its ratios.
      final: the client's parameters at the end.
      grads: the gradients of all steps.
      tx: the optimizer of the plain loop.
    """
    ratios = np.stack([np.asarray(state_of(step)) for step in range(len(grads))])
    expected = reference(
        tx or plain_of("adam_spd"), plain(params), stack([plain(g) for g in grads])
    )
    assert_same_run(Run(final, ratios), expected)


def ratio_of(state: Any) -> Any:
    """The last ratios or radii, out of any optimizer state."""
    return oracles.decisions(state)


# Data whose target changes sign every third step: momentum then carries Adam on against the
# gradient, which is when SPD acts.
KEY, OTHER_KEY = jax.random.split(jax.random.key(0))


def normal(seed: int, *shape: int) -> np.ndarray:
    """By NumPy: compiling jax.random for every shape would take longer than the tests."""
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


X, Y = jnp.asarray(normal(0, 16, 4)), jnp.asarray(normal(1, 16, 8))


def target(step: int) -> jax.Array:
    return Y * (1.0 if (step // 3) % 2 == 0 else -1.0)


def squares(prediction: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.mean((prediction - y) ** 2)


# Gradients that are given and not computed, for clients that are wrappers of transformations: what
# happens to one array then has no influence on another, so that groups can be compared singly.
PARAMS = {
    "dense": {"bias": jnp.asarray(normal(2, 8)), "kernel": jnp.asarray(normal(3, 4, 8))},
    "head": {"kernel": jnp.asarray(normal(4, 8, 2))},
}
SIGNS = np.array([1.0 if (step // 3) % 2 == 0 else -1.0 for step in range(STEPS)])


def scripted(params: Any) -> Any:
    """Gradients for all steps: a leading step axis on every array of ``params``."""

    def one(seed: int, leaf: jax.Array) -> jax.Array:
        drift, noise = normal(seed, 2, STEPS, *leaf.shape)
        sign = SIGNS.reshape(-1, *[1] * leaf.ndim)
        return jnp.asarray(sign * drift[:1] + 0.3 * noise, leaf.dtype)

    leaves, treedef = jax.tree.flatten(params)
    return jax.tree.unflatten(treedef, [one(10 + i, x) for i, x in enumerate(leaves)])


GRADS = scripted(PARAMS)
NAMES = ["dense/bias", "dense/kernel", "head/kernel"]


def at(grads: Any, step: int) -> Any:
    return jax.tree.map(lambda g: g[step], grads)


@functools.cache
def plain_run(weight_decay: float = 1.0, rate: float = RATE) -> Run:
    """Adam with SPD everywhere on the given gradients."""
    return reference(plain_optimizer(weight_decay, rate), PARAMS, GRADS)


@functools.cache
def plain_ftp_run() -> Run:
    """Adam with FTP everywhere on the given gradients."""
    return reference(plain_ftp(), PARAMS, GRADS)


def plain_run_of(form: str) -> Run:
    return plain_ftp_run() if form == "adam_ftp" else plain_run()


@functools.cache
def adam_run() -> Any:
    """Adam alone on the given gradients."""

    def step(carry: Any, grad: Any) -> Any:
        params, state = carry
        updates, state = tx.update(grad, state, params)
        return (optax.apply_updates(params, updates), state), None

    tx = optax.adam(RATE)
    return jax.jit(lambda carry: jax.lax.scan(step, carry, GRADS)[0][0])((PARAMS, tx.init(PARAMS)))


def columns(run: Run, *names: str) -> Run:
    """The part of a run on PARAMS that concerns some arrays."""
    params = {"/".join(k.key for k in p): x for p, x in jax.tree.leaves_with_path(run.params)}
    chosen = [NAMES.index(name) for name in names]
    return Run({name: params[name] for name in names}, run.ratios[:, chosen])


@functools.cache
def step_of(tx: Any) -> Any:
    """A jitted step without ``grad=``; an optimizer that runs twice is compiled once."""

    @jax.jit
    def step(grad: Any, state: Any, params: Any) -> Any:
        updates, state = tx.update(grad, state, params)
        return optax.apply_updates(params, updates), state

    return step


def loop(
    tx: Any,
    params: Any = PARAMS,
    grads: Any = GRADS,
    ratio: Callable[[Any], Any] = ratio_of,
) -> Run:
    """The run of ``tx.update(grads, state, params)`` in a jitted step, without ``grad=``."""

    step, state = step_of(tx), tx.init(params)
    ratios = []
    for index in range(len(jax.tree.leaves(grads)[0])):
        params, state = step(at(grads, index), state, params)
        ratios.append(np.asarray(ratio(state)))
    return Run(params, np.stack(ratios))


# Plain loops -------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["adam_spd", "chain", "with_gradient", "adam_ftp"])
def test_update_by_position_without_extra_arguments(form: str) -> None:
    assert_same_run(loop(make(form)), plain_run_of(form))


def test_a_frozen_dict_trains_as_a_dict() -> None:
    run = loop(make("adam_ftp"), flax.core.freeze(PARAMS), flax.core.freeze(GRADS))
    assert isinstance(run.params, flax.core.FrozenDict)
    assert_same_run(run, plain_ftp_run())


@FORMS
def test_update_by_keyword(form: str) -> None:
    """As EasyDeL calls it."""
    tx = make(form)
    by_keyword = optax.GradientTransformation(
        tx.init, lambda u, s, p: tx.update(updates=u, state=s, params=p)
    )
    assert_same_run(loop(by_keyword), plain_run_of(form))


ONES = jax.tree.map(jnp.ones_like, PARAMS)


@pytest.mark.parametrize(
    ("tx", "extra"),
    [
        (optax_spd.spd(1.0), {"grad": ONES}),
        (optax_spd.l2_sp(0.1), {}),
        (optax_spd.adamw_l2_sp(0.1, weight_decay=0.1), {}),
        (optax_spd.with_anchor(optax_spd.l2_sp(0.1, anchor="argument")), {}),
        (optax_spd.with_gradient(optax_spd.spd(1.0)), {}),
        (optax_spd.ftp(), {"grad": ONES}),
        (optax_spd.tpgm(), {}),
        (optax_spd.sgd_ftp(0.1), {}),
        (optax_spd.adam_tpgm(0.1), {}),
    ],
    ids=[
        *("spd", "l2_sp", "adamw_l2_sp", "with_anchor", "with_gradient"),
        *("ftp", "tpgm", "sgd_ftp", "adam_tpgm"),
    ],
)
def test_every_update_names_its_arguments_alike(tx: Any, extra: dict[str, Any]) -> None:
    state = tx.init(PARAMS)
    moved = jax.tree.map(lambda x: x + 1, PARAMS)
    named, _ = tx.update(updates=ONES, state=state, params=moved, **extra, surplus="ignored")
    placed, _ = tx.update(ONES, state, moved, **extra)
    jax.tree.map(np.testing.assert_array_equal, named, placed)
    assert not np.array_equal(named["head"]["kernel"], ONES["head"]["kernel"])


# Flax linen --------------------------------------------------------------------------------------


class LinenNet(nn.Module):
    """Two layers; the initializer decides whether the parameters are boxed."""

    kernel_init: Any = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        hidden = nn.tanh(nn.Dense(8, kernel_init=self.kernel_init)(x))
        return nn.Dense(8, kernel_init=self.kernel_init)(hidden)


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
        ratios.append(ratio_of(state.opt_state))
    return state, grads, ratios


@FORMS
def test_linen_train_state(form: str) -> None:
    start = create_linen(LinenNet(), make(form), KEY)
    end, grads, ratios = run_linen(start, jax.jit(linen_step))
    assert_like_plain_loop(start.params, ratios.__getitem__, end.params, grads, plain_of(form))


RULES = (("embed", "x"), ("mlp", "y"))


@pytest.mark.parametrize("boxes", ["partitioned", "logically partitioned"])
def test_linen_boxed_parameters_on_a_mesh(boxes: str) -> None:
    """The state's shardings come from the boxes, as Flax's guide does it."""
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    initializer = nn.initializers.lecun_normal()
    if boxes == "partitioned":
        net = LinenNet(nn.with_partitioning(initializer, ("x", "y")))
    else:
        net = LinenNet(nn.with_logical_partitioning(initializer, ("embed", "mlp")))
    tx = optax_spd.adam_spd(RATE)
    create = functools.partial(create_linen, net, tx)
    abstract = jax.eval_shape(create, KEY)
    specs = nn.get_partition_spec(abstract)
    if boxes == "partitioned":
        shardings = nn.get_sharding(abstract, mesh)
    else:
        shardings = nn.logical_to_mesh_sharding(specs, mesh, RULES)

    start = jax.jit(create, out_shardings=shardings)(KEY)
    assert jax.tree.structure(start) == jax.tree.structure(abstract)
    step = jax.jit(linen_step, out_shardings=(shardings, None))
    end, grads, ratios = run_linen(start, step)

    for state in (start, end):
        anchor = optax.tree.get(state.opt_state, "anchor")
        assert jax.tree.structure(anchor) == jax.tree.structure(state.params)
        kernel = anchor["Dense_0"]["kernel"].unbox(apply_constraint=False)
        assert kernel.sharding.is_equivalent_to(NamedSharding(mesh, P("x", "y")), 2)
        assert ratio_of(state.opt_state).sharding.is_fully_replicated
    assert_like_plain_loop(start.params, ratios.__getitem__, end.params, grads)


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


def run_nnx(model: NNXNet, optimizer: Any, update: Any) -> tuple[Any, list[Any], list[Any]]:
    """Trains in a jitted step; returns the first parameters, the gradients and the ratios."""

    @nnx.jit
    def step(model: NNXNet, optimizer: Any, y: jax.Array) -> Any:
        grads = nnx.grad(nnx_loss)(model, y)
        update(optimizer, model, grads)
        return jax.tree.leaves(grads)

    start = plain(nnx.state(model, nnx.Param))
    grads, ratios = [], []
    for index in range(STEPS):
        grads.append(step(model, optimizer, target(index)))
        ratios.append(nnx_ratio(optimizer))
    return start, grads, ratios


def nnx_ratio(optimizer: Any) -> np.ndarray:
    (ratio,) = jax.tree.leaves(ratio_of(optimizer.opt_state))
    return np.asarray(ratio)


def update_with_grad(optimizer: Any, model: NNXNet, grads: Any) -> None:
    optimizer.update(model, grads, grad=grads)


def update_plainly(optimizer: Any, model: NNXNet, grads: Any) -> None:
    optimizer.update(model, grads)


@pytest.mark.parametrize("form", ["optax.chain", "adam_spd", "chain", "adam_ftp"])
def test_nnx_optimizer(form: str) -> None:
    model = NNXNet(nnx.Rngs(0))
    tx = plain_optimizer() if form == "optax.chain" else make(form)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    update = update_with_grad if form == "optax.chain" else update_plainly
    start, grads, ratios = run_nnx(model, optimizer, update)
    end = nnx.state(model, nnx.Param)
    assert_like_plain_loop(start, ratios.__getitem__, end, grads, plain_of(form))


def test_nnx_model_and_optimizer() -> None:
    model = NNXNet(nnx.Rngs(0))
    optimizer = nnx.ModelAndOptimizer(model, optax_spd.adam_spd(RATE))
    start, grads, ratios = run_nnx(model, optimizer, lambda both, _, grads: both.update(grads))
    assert_like_plain_loop(start, ratios.__getitem__, nnx.state(model, nnx.Param), grads)


@pytest.mark.parametrize("form", ["optax.chain", "adam_spd", "adam_ftp"])
def test_nnx_optimizer_with_sharding_metadata(form: str) -> None:
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    kernel_init = nnx.with_partitioning(NORMAL, ("x", "y"))
    with jax.set_mesh(mesh):

        @nnx.jit
        def create() -> Any:
            model = NNXNet(nnx.Rngs(0), kernel_init)
            tx = plain_optimizer() if form == "optax.chain" else make(form)
            optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
            for node in (model, optimizer):
                state = nnx.state(node)
                nnx.update(
                    node, jax.lax.with_sharding_constraint(state, nnx.get_partition_spec(state))
                )
            return model, optimizer

        model, optimizer = create()
        update = update_with_grad if form == "optax.chain" else update_plainly
        start, grads, ratios = run_nnx(model, optimizer, update)

        kernel = optax.tree.get(optimizer.opt_state, "anchor")["first"]["kernel"]
        assert kernel[...].sharding.is_equivalent_to(NamedSharding(mesh, P("x", "y")), 2)
        assert kernel[...].sharding.is_equivalent_to(model.first.kernel[...].sharding, 2)
        if form == "adam_ftp":
            deviation = optax.tree.get(optimizer.opt_state, "ftp_deviation")["first"]["kernel"]
            assert deviation[...].sharding.is_equivalent_to(NamedSharding(mesh, P("x", "y")), 2)
    end = nnx.state(model, nnx.Param)
    assert_like_plain_loop(start, ratios.__getitem__, end, grads, plain_of(form))


def test_nnx_optimizer_of_parameters_given_sharding_one_by_one() -> None:
    """Created outside jit, where Flax shards at once."""
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))

    class OneKernel(nnx.Module):
        def __init__(self) -> None:
            # By with_partitioning, since the metadata's name changed between versions of Flax.
            sharded = nnx.with_partitioning(lambda: jnp.asarray(normal(5, 4, 8)) / 10, (None, "x"))
            self.kernel = nnx.Param(sharded())

        def __call__(self, x: jax.Array) -> jax.Array:
            return (x @ self.kernel[...]) / 5

    with jax.set_mesh(mesh):
        model = OneKernel()
        optimizer = nnx.Optimizer(model, optax_spd.adam_spd(RATE), wrt=nnx.Param)
        start, grads, ratios = run_nnx(model, optimizer, update_plainly)
        anchor = optax.tree.get(optimizer.opt_state, "anchor")["kernel"]
        assert model.kernel[...].sharding.is_equivalent_to(anchor[...].sharding, 2)
        assert anchor[...].sharding.is_equivalent_to(NamedSharding(mesh, P(None, "x")), 2)
    assert_like_plain_loop(start, ratios.__getitem__, nnx.state(model, nnx.Param), grads)


# Equinox -----------------------------------------------------------------------------------------


def eqx_model() -> eqx.nn.MLP:
    """Has leaves that are functions and, with a filter, None."""
    return eqx.nn.MLP(4, 8, width_size=8, depth=2, key=KEY)


def eqx_loss(model: eqx.nn.MLP, y: jax.Array) -> jax.Array:
    return squares(jax.vmap(model)(X), y)


@FORMS
def test_equinox_with_none_leaves(form: str) -> None:
    model, tx = eqx_model(), make(form)
    start = eqx.filter(model, eqx.is_inexact_array)
    assert any(leaf is None for leaf in jax.tree.leaves(start, is_leaf=lambda x: x is None))
    state = tx.init(start)

    @eqx.filter_jit
    def step(model: eqx.nn.MLP, state: Any, y: jax.Array) -> Any:
        grads = eqx.filter_grad(eqx_loss)(model, y)
        updates, state = tx.update(grads, state, eqx.filter(model, eqx.is_inexact_array))
        return eqx.apply_updates(model, updates), state, grads

    grads, ratios = [], []
    for index in range(STEPS):
        model, state, grad = step(model, state, target(index))
        grads.append(grad)
        ratios.append(ratio_of(state))
    end = eqx.filter(model, eqx.is_inexact_array)
    assert_like_plain_loop(start, ratios.__getitem__, end, grads, plain_of(form))


@pytest.mark.parametrize("stage", [optax_spd.spd(1.0), optax_spd.ftp(**FTP)], ids=["spd", "ftp"])
def test_equinox_with_gradients_of_a_part_only(stage: Any) -> None:
    """Gradients are None where the parameters are arrays: those are left where they are.

    Optax's own Adam refuses that, so its signs of gradients stand in: they turn back too late, too.
    """
    model = eqx_model()
    inner = optax.sign_sgd(RATE)
    tx = optax_spd.chain(inner, stage)
    start, static = eqx.partition(model, eqx.is_inexact_array)
    state = tx.init(start)
    trained = jax.tree.map(lambda _: False, start)
    trained = eqx.tree_at(lambda m: (m.layers[1].weight, m.layers[1].bias), trained, (True, True))

    def loss(part: Any, rest: Any, y: jax.Array) -> jax.Array:
        return eqx_loss(eqx.combine(part, rest, static), y)

    @eqx.filter_jit
    def step(params: Any, state: Any, y: jax.Array) -> Any:
        grads = eqx.filter_grad(loss)(*eqx.partition(params, trained), y)
        updates, state = tx.update(grads, state, params)
        assert jax.tree.structure(updates) == jax.tree.structure(grads)
        return eqx.apply_updates(params, updates), state, grads

    params, grads, ratios = start, [], []
    for index in range(STEPS):
        params, state, grad = step(params, state, target(index))
        grads.append(grad)
        ratios.append(ratio_of(state))

    layers = optax_spd.layer_names(start)
    ours = [i for i, name in enumerate(layers) if name.startswith("layers/1/")]
    assert len(ours) == 2
    others = [i for i in range(len(layers)) if i not in ours]
    assert not np.any(np.stack(ratios)[:, others])
    for layer in (0, 2):
        np.testing.assert_array_equal(params.layers[layer].weight, start.layers[layer].weight)
    assert_like_plain_loop(
        eqx.filter(start, trained),
        lambda step: ratios[step][jnp.array(ours)],
        eqx.filter(params, trained),
        grads,
        optax.chain(inner, stage),
    )


def test_equinox_without_params_gets_optaxs_own_error() -> None:
    params = eqx.filter(eqx_model(), eqx.is_inexact_array)
    with pytest.raises(ValueError) as theirs:  # noqa: PT011 - the message is what is compared
        optax.add_decayed_weights(0.1).update(params, optax.EmptyState(), None)
    recipes = (optax_spd.adam_spd, optax_spd.adamw_l2_sp, optax_spd.adam_ftp, optax_spd.adam_tpgm)
    for tx in (*(recipe(RATE) for recipe in recipes), make("chain")):
        state = tx.init(params)
        with pytest.raises(ValueError) as ours:  # noqa: PT011 - the message is what is compared
            tx.update(params, state)
        assert str(ours.value) == str(theirs.value)


# Optax's own wrappers ----------------------------------------------------------------------------

MASK = {"dense": {"bias": False, "kernel": True}, "head": {"kernel": True}}
CHOSEN = ("dense/kernel", "head/kernel")


@pytest.mark.parametrize(
    ("caller_passes_grad", "masks_extra_args", "as_function"),
    [(False, False, False), (False, False, True), (False, True, True), (True, False, True)],
)
def test_masked_stage_inside_the_wrapper(
    caller_passes_grad: bool, masks_extra_args: bool, as_function: bool
) -> None:
    masked = optax.masked(
        optax_spd.spd(1.0),
        optax_spd.path_mask("kernel") if as_function else MASK,
        mask_compatible_extra_args=masks_extra_args,
    )
    if caller_passes_grad:
        run = reference(optax.chain(optax.adam(RATE), masked), PARAMS, GRADS)
    else:
        run = loop(optax_spd.chain(optax.adam(RATE), masked))
    assert_same_run(
        Run({n: run.params[n.split("/")[0]]["kernel"] for n in CHOSEN}, run.ratios),
        columns(plain_run(), *CHOSEN),
    )
    np.testing.assert_allclose(run.params["dense"]["bias"], adam_run()["dense"]["bias"], rtol=1e-5)


@pytest.mark.parametrize("masks_extra_args", [False, True])
@pytest.mark.parametrize("caller_passes_grad", [False, True])
def test_masked_recipe(masks_extra_args: bool, caller_passes_grad: bool) -> None:
    tx = optax.masked(optax_spd.adam_spd(RATE), MASK, mask_compatible_extra_args=masks_extra_args)
    run = reference(tx, PARAMS, GRADS) if caller_passes_grad else loop(tx)
    assert_same_run(
        Run({n: run.params[n.split("/")[0]]["kernel"] for n in CHOSEN}, run.ratios),
        columns(plain_run(), *CHOSEN),
    )
    # masked hands the rest on as it is, here the gradient itself.
    expected = PARAMS["dense"]["bias"] + GRADS["dense"]["bias"].sum(axis=0)
    np.testing.assert_allclose(run.params["dense"]["bias"], expected, rtol=1e-4)


LABELS = {"dense": {"bias": "frozen", "kernel": "strong"}, "head": {"kernel": "weak"}}


def all_ratios(state: Any) -> np.ndarray:
    """Both groups' ratios, in the order of the groups' names."""
    found = optax.tree_utils.tree_get_all_with_path(state, "spd_ratio")
    return np.concatenate([np.asarray(ratio) for _, ratio in found])


@pytest.mark.parametrize(
    ("place", "masks_extra_args"), [("recipes", False), ("stages", False), ("stages", True)]
)
def test_partition_into_two_strengths_and_a_frozen_group(
    place: str, masks_extra_args: bool
) -> None:
    if place == "recipes":
        groups = {
            "strong": optax_spd.adam_spd(RATE, weight_decay=1.0),
            "weak": optax_spd.adam_spd(RATE, weight_decay=0.25),
            "frozen": optax.set_to_zero(),
        }
    else:
        groups = {
            "strong": optax_spd.spd(1.0),
            "weak": optax_spd.spd(0.25),
            "frozen": optax.set_to_zero(),
        }
    tx = optax.partition(groups, LABELS, mask_compatible_extra_args=masks_extra_args)
    if place == "stages":
        tx = optax_spd.chain(optax.adam(RATE), tx)
    run = loop(tx, ratio=all_ratios)
    np.testing.assert_array_equal(run.params["dense"]["bias"], PARAMS["dense"]["bias"])
    for column, (name, weight_decay) in enumerate([("dense/kernel", 1.0), ("head/kernel", 0.25)]):
        module = name.split("/")[0]
        assert_same_run(
            Run({name: run.params[module]["kernel"]}, run.ratios[:, [column]]),
            columns(plain_run(weight_decay), name),
        )


def test_ftp_masked_and_in_a_group_of_its_own() -> None:
    masked = optax_spd.chain(optax.adam(RATE), optax.masked(optax_spd.ftp(**FTP), MASK))
    group = {"frozen": optax.set_to_zero(), "strong": make("adam_ftp"), "weak": optax.adam(RATE)}
    for tx, names in (
        (masked, CHOSEN),
        (optax.partition(group, LABELS), CHOSEN[:1]),
    ):
        run = loop(tx)
        assert_same_run(
            Run({n: run.params[n.split("/")[0]]["kernel"] for n in names}, run.ratios),
            columns(plain_ftp_run(), *names),
        )
    np.testing.assert_allclose(
        run.params["head"]["kernel"], adam_run()["head"]["kernel"], rtol=1e-4
    )


MICRO = 3


def micro_gradients() -> Any:
    """Gradients of MICRO micro-steps for every step, whose mean is the step's; flattened."""

    def split(grad: jax.Array) -> jax.Array:
        noise = 4 * normal(20, STEPS, MICRO, *grad.shape[1:])
        noise = noise - noise.mean(axis=1, keepdims=True)
        return (grad[:, None] + noise).reshape(STEPS * MICRO, *grad.shape[1:])

    return jax.tree.map(split, GRADS)


@FORMS
def test_multi_steps_equals_steps_on_the_mean_gradient(form: str) -> None:
    tx = optax.MultiSteps(make(form), MICRO)
    micro = micro_gradients()
    run = loop(tx, grads=micro)
    rtol = 1e-4 if form == "adam_ftp" else 1e-5  # the mean's rounding, through the radii's Adam
    found = Run(run.params, run.ratios[MICRO - 1 :: MICRO])
    assert_same_run(found, plain_run_of(form), rtol)

    between = loop(tx, grads=jax.tree.map(lambda g: g[: MICRO - 1], micro))
    jax.tree.map(np.testing.assert_array_equal, between.params, PARAMS)


def test_multi_steps_with_an_explicit_gradient_judges_by_the_last_micro_step() -> None:
    """Why no ``grad=`` may be passed there: it wins, and it is the micro-step's."""
    micro = micro_gradients()
    run = reference(optax.MultiSteps(optax_spd.adam_spd(RATE), MICRO), PARAMS, micro)
    last = jax.tree.map(lambda g: g[MICRO - 1 :: MICRO], micro)
    pairs = optax.GradientTransformation(
        plain_optimizer().init,
        lambda pair, state, params: plain_optimizer().update(pair[0], state, params, grad=pair[1]),
    )
    judged_by_last = loop(pairs, grads=(GRADS, last))
    assert_same_run(Run(run.params, run.ratios[MICRO - 1 :: MICRO]), judged_by_last)
    assert not np.allclose(judged_by_last.ratios, plain_run().ratios, atol=1e-3)


RATES = [0.1 if step < 5 else 0.03 for step in range(STEPS)]
DECAYS = [1.0 if step < 7 else 0.25 for step in range(STEPS)]


@functools.cache
def changing_run() -> Run:
    """The plain loop with other hyperparameters at every step."""

    @jax.jit
    def step(grad: Any, state: Any, params: Any, rate: float, decay: float) -> Any:
        updates, state = plain_optimizer(decay, rate).update(grad, state, params, grad=grad)
        return optax.apply_updates(params, updates), state

    params, state, ratios = PARAMS, plain_optimizer().init(PARAMS), []
    for index, (rate, decay) in enumerate(zip(RATES, DECAYS, strict=True)):
        params, state = step(at(GRADS, index), state, params, rate, decay)
        ratios.append(np.asarray(ratio_of(state)))
    return Run(params, np.stack(ratios))


def wrapped_chain(learning_rate: optax.ScalarOrSchedule, weight_decay: float) -> Any:
    return optax_spd.chain(optax.adam(learning_rate), optax_spd.spd(weight_decay))


@pytest.mark.parametrize("factory", [optax_spd.adam_spd, wrapped_chain])
def test_inject_hyperparams_changed_between_steps(factory: Any) -> None:
    tx = optax.inject_hyperparams(factory)(learning_rate=RATES[0], weight_decay=DECAYS[0])
    step = jax.jit(tx.update)
    params, state, ratios = PARAMS, tx.init(PARAMS), []
    for index, (rate, decay) in enumerate(zip(RATES, DECAYS, strict=True)):
        state.hyperparams["learning_rate"] = jnp.asarray(rate)
        state.hyperparams["weight_decay"] = jnp.asarray(decay)
        updates, state = step(at(GRADS, index), state, params)
        params = optax.apply_updates(params, updates)
        ratios.append(np.asarray(ratio_of(state)))
    assert_same_run(Run(params, np.stack(ratios)), changing_run(), rtol=1e-4)
    # The change of λ is felt where SPD acts.
    assert changing_run().ratios[7:].any()
    assert not np.allclose(
        params["head"]["kernel"], plain_run().params["head"]["kernel"], atol=1e-3
    )


def test_inject_hyperparams_with_schedules() -> None:
    tx = optax.inject_hyperparams(optax_spd.adam_spd)(
        learning_rate=lambda count: jnp.where(count < 5, 0.1, 0.03),
        weight_decay=lambda count: jnp.where(count < 7, 1.0, 0.25),
    )
    assert_same_run(loop(tx), changing_run(), rtol=1e-4)
    state = tx.init(PARAMS)
    assert {"learning_rate", "weight_decay", "b1", "b2"} <= state.hyperparams.keys()


def test_inject_hyperparams_with_callables_and_trees_as_static_arguments() -> None:
    """The names are the ones that the recipe's docstring gives."""
    anchor = jax.tree.map(lambda x: 0.9 * x, PARAMS)
    options = {
        "anchor": anchor,
        "anchor_dtype": jnp.bfloat16,
        "layers": optax_spd.by_module(),
        "mask": optax_spd.path_mask("dense"),
    }
    static = ("anchor", "anchor_dtype", "layers", "mask", "axis_name", "mu_dtype")
    tx = optax.inject_hyperparams(optax_spd.adam_spd, static_args=static)(
        learning_rate=RATE, weight_decay=1.0, mu_dtype=jnp.float32, **options
    )
    expected = reference(
        optax.chain(optax.adam(RATE), optax_spd.spd(1.0, **options)), PARAMS, GRADS
    )
    assert expected.ratios.shape == (STEPS, 1)
    assert_same_run(loop(tx), expected, rtol=1e-4)


# Dtypes ------------------------------------------------------------------------------------------

DTYPES = {
    "bfloat16": dict.fromkeys("abc", "bfloat16"),
    "float16": dict.fromkeys("abc", "float16"),
    "float32": dict.fromkeys("abc", "float32"),
    "float64": dict.fromkeys("abc", "float64"),
    "half": {"a": "bfloat16", "b": "float16", "c": "bfloat16"},
    "mixed": {"a": "bfloat16", "b": "float16", "c": "float32"},
    "mixed with float64": {"a": "bfloat16", "b": "float64", "c": "float32"},
}


def typed_tree(dtypes: dict[str, str]) -> Any:
    shapes = {"a": (4, 8), "b": (8,), "c": (2, 3, 4)}
    return {
        name: jnp.asarray(normal(seed, *shapes[name]), dtype)
        for seed, (name, dtype) in enumerate(dtypes.items())
    } | {"steps": jnp.arange(3)}


@pytest.mark.parametrize("x64_on", [False, True], ids=["x64 off", "x64 on"])
@pytest.mark.parametrize("name", DTYPES)
def test_parameter_dtypes(name: str, x64_on: bool, request: pytest.FixtureRequest) -> None:
    """One step from given numbers: to the rounding of the params' dtype, summed in float32."""
    if x64_on:
        request.getfixturevalue("x64")
    dtypes = {key: str(jax.dtypes.canonicalize_dtype(dtype)) for key, dtype in DTYPES[name].items()}
    anchor = typed_tree(dtypes)
    moved = {k: v if k == "steps" else (v * 1.5).astype(v.dtype) for k, v in anchor.items()}
    # a: moves out against the gradient; b: moves in; c: moves out along it.
    signs = {"a": (0.3, 1), "b": (-0.3, 1), "c": (0.3, -1), "steps": (0, 0)}
    u = {k: (signs[k][0] * v).astype(v.dtype) for k, v in anchor.items()}
    g = {k: (signs[k][1] * v).astype(v.dtype) for k, v in anchor.items()}
    tx = optax_spd.spd(1.0)
    state = tx.init(anchor)
    updates, new_state = jax.jit(tx.update)(u, state, moved, grad=g)

    widest = "float64" if "float64" in dtypes.values() else "float32"
    assert new_state.spd_ratio.dtype == widest
    assert jax.tree.map(jax.typeof, state) == jax.tree.map(jax.typeof, new_state)
    assert jax.tree.map(lambda x: x.dtype, updates) == jax.tree.map(lambda x: x.dtype, u)
    np.testing.assert_array_equal(updates["steps"], u["steps"])
    ratios = []
    for key in "abc":
        expected, ratio = oracles.spd_step(u[key], moved[key], anchor[key], g[key])
        ratios.append(ratio)
        eps = float(jnp.finfo(dtypes[key]).eps)
        # One rounding to the dtype, and those of a float32 computation (float64 if it is that).
        atol = min(4 * eps, 4e-7)
        found = np.asarray(updates[key], np.float64)
        np.testing.assert_allclose(found, expected, rtol=eps, atol=atol)
    assert ratios[0] > 0
    assert ratios[1:] == [0, 0]
    np.testing.assert_allclose(new_state.spd_ratio, ratios, rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "x64_on"),
    [("half", False), ("mixed", False), ("float64", True), ("mixed with float64", True)],
)
def test_recipe_keeps_dtypes_over_a_run(
    name: str, x64_on: bool, request: pytest.FixtureRequest
) -> None:
    if x64_on:
        request.getfixturevalue("x64")
    params = {
        key: value
        for key, value in typed_tree(
            {k: str(jax.dtypes.canonicalize_dtype(d)) for k, d in DTYPES[name].items()}
        ).items()
        if key != "steps"
    }
    grads = scripted(params)
    tx = optax_spd.adam_spd(RATE, eps=1e-4)
    state, types = tx.init(params), jax.tree.map(jax.typeof, tx.init(params))
    run = loop(tx, params, grads)
    updates, state = jax.eval_shape(tx.update, at(grads, 0), state, params)
    assert jax.tree.map(jax.typeof, state) == types
    assert jax.tree.map(jax.typeof, run.params) == jax.tree.map(jax.typeof, params)
    assert jax.tree.map(jax.typeof, updates) == jax.tree.map(jax.typeof, params)
    plain_tx = optax.chain(optax.adam(RATE, eps=1e-4), optax_spd.spd(1.0))
    assert_same_run(run, reference(plain_tx, params, grads), rtol=1e-2)


# Explicit sharding -------------------------------------------------------------------------------

SPECS = {"dense": {"bias": P("x"), "kernel": P(None, "x")}, "head": {"kernel": P("x", None)}}


def run_explicitly(tx: Any, params: Any, grads: Any, specs: Any, init_in_jit: bool) -> Run:
    """The run on an explicit mesh of 8; checks that no type changes on the way."""
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
        params = jax.device_put(params, shardings)
        types = jax.tree.map(jax.typeof, params)
        state = (jax.jit(tx.init) if init_in_jit else tx.init)(params)
        state_types = jax.tree.map(jax.typeof, state)
        assert jax.tree.map(jax.typeof, optax.tree.get(state, "anchor")) == types
        step, ratios = jax.jit(tx.update), []
        for index in range(STEPS):
            updates, state = step(jax.device_put(at(grads, index), shardings), state, params)
            assert jax.tree.map(jax.typeof, updates) == types
            assert jax.tree.map(jax.typeof, state) == state_types
            params = optax.apply_updates(params, updates)
            ratios.append(np.asarray(ratio_of(state)))
    return Run(params, np.stack(ratios))


@pytest.mark.parametrize("init_in_jit", [False, True])
@FORMS
def test_explicit_sharding(form: str, init_in_jit: bool) -> None:
    run = run_explicitly(make(form), PARAMS, GRADS, SPECS, init_in_jit)
    assert_same_run(run, plain_run_of(form))


@pytest.mark.parametrize("init_in_jit", [False, True])
@pytest.mark.parametrize("shape", [(8, 4), (8,)], ids=["kernels", "one number a layer"])
def test_explicit_sharding_of_the_stacked_axis(shape: tuple[int, ...], init_in_jit: bool) -> None:
    """As in a pipeline, each device holds layers of its own."""
    params = {"blocks": jnp.asarray(normal(6, *shape))}
    grads = scripted(params)
    layers = optax_spd.stacked("blocks", axis=0)
    specs = {"blocks": P("x")}
    tx = optax_spd.adam_spd(RATE, layers=layers)
    run = run_explicitly(tx, params, grads, specs, init_in_jit)
    assert_same_run(run, reference(plain_optimizer(layers=layers), params, grads))


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
    anchor = optax.tree.get(start.opt_state, "anchor")
    assert jax.tree.structure(anchor) == jax.tree.structure(start.params)

    step = jax.jit(linen_step, out_shardings=(shardings, None))
    end, grads, ratios = run_linen(start, step)
    assert ratios[0].shape == (2 * LAYERS,)

    expected = reference(plain_optimizer(), unrolled(loaded), stack([unrolled(g) for g in grads]))
    assert_same_run(Run(unrolled(end.params), np.stack(ratios)), expected)
    # Without set_anchor the anchor would be the random initialization: other decisions.
    random = reference(
        plain_optimizer(anchor=unrolled(create(KEY).params)),
        unrolled(loaded),
        stack([unrolled(g) for g in grads]),
    )
    assert not np.allclose(random.ratios, expected.ratios, atol=1e-3)
