"""TempBalance, layer-wise decay and freezing give every client the numbers worked out by hand."""

import functools
import inspect
import pathlib
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import orbax.checkpoint as ocp
import pytest
from flax import linen as nn, nnx
from flax.core import freeze
from flax.training.train_state import TrainState
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import optax_spd
from optax_spd import trees

STEPS = 6
DEPTH = r"layer_(\d)"


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


# Few shapes, which compiles faster; in the order in which a dict, an NNX module and an Equinox
# module with these fields all keep them.
SHAPES = {
    "embedding/kernel": (4, 4),
    "head/kernel": (4, 4),
    "layer_0/bias": (4,),
    "layer_0/kernel": (4, 4),
    "layer_1/bias": (4,),
    "layer_1/kernel": (4, 4),
}
NAMES = tuple(SHAPES)
HEIGHTS = {"embedding": 3, "layer_0": 2, "layer_1": 1, "head": 0}
BODY = tuple(name for name in NAMES if name.startswith("layer"))
NOT_EMBEDDING = NAMES[1:]


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, value in flat.items():
        module, key = name.split("/")
        tree.setdefault(module, {})[key] = value
    return tree


def flat_arrays(tree: Any) -> dict[str, np.ndarray]:
    return dict(zip(NAMES, map(np.asarray, jax.tree.leaves(tree)), strict=True))


PARAMS = nested({name: normal(i, *shape) for i, (name, shape) in enumerate(SHAPES.items())})
# Gradients are given and not computed, so that every client sees the same ones. They turn round
# half way and momentum does so later: that is when SPD acts.
SIGNS = np.where(np.arange(STEPS) < STEPS // 2, 1, -1)
GRADS = nested(
    {
        name: (
            SIGNS.reshape(-1, *[1] * len(shape)) * normal(10 + i, *shape)
            + 0.3 * normal(20 + i, STEPS, *shape)
        ).astype(np.float32)
        for i, (name, shape) in enumerate(SHAPES.items())
    }
)

# The optimizers -----------------------------------------------------------------------------------

HYPER = {
    "rate": 0.1,
    "every": 2,
    "min_scale": 0.5,
    "max_scale": 1.5,
    "decay": 0.5,
    "weight_decay": 1.0,
    "momentum": 0.9,
}


def stages(
    inner: Any, last: Any, every: Any = 2, low: Any = 0.5, high: Any = 1.5, decay: Any = 0.5
) -> Any:
    """An optimizer, what sets its layers' rates, and the method that judges the step."""
    balance = optax_spd.temp_balance(every=every, min_scale=low, max_scale=high, min_eigenvalues=4)
    return optax_spd.chain(inner, balance, optax_spd.layerwise_lr_decay(decay, DEPTH), last)


def behind(rate: Any = 0.1, last: Any = None) -> Any:
    """The embedding is frozen in Adam: the stages behind it see the whole tree."""
    frozen = optax_spd.with_frozen(optax.adam(rate), "^embedding/")
    return stages(frozen, last or optax_spd.spd(1.0))


def around(
    rate: Any = 0.1,
    every: Any = 2,
    min_scale: Any = 0.5,
    max_scale: Any = 1.5,
    decay: Any = 0.5,
    weight_decay: Any = 1.0,
) -> Any:
    """The embedding is frozen around all of it."""
    inside = stages(
        optax.adam(rate), optax_spd.spd(weight_decay), every, min_scale, max_scale, decay
    )
    return optax_spd.with_frozen(inside, "^embedding/")


def sgd(rate: Any = 0.1, momentum: Any = 0.9) -> Any:
    return optax_spd.sgd_freeze_embed(rate, momentum)


K, RADIUS_RATE, RADIUS = 0.5, 0.3, 0.1
FACTORIES: dict[str, Callable[..., optax.GradientTransformationExtraArgs]] = {
    "behind": behind,
    "around": around,
    "sgd": sgd,
    "ftp": lambda: behind(last=optax_spd.ftp(K, norm="l2", radius_learning_rate=RADIUS_RATE)),
    "tpgm": lambda: behind(last=optax_spd.tpgm(norm="l2", radii=RADIUS)),
}
WHOLE = pytest.mark.parametrize("form", ["behind", "sgd"])
AROUND = pytest.mark.parametrize("form", ["around", "sgd"])
EACH = pytest.mark.parametrize("form", ["behind", "around", "sgd"])


@functools.cache
def make(form: str) -> optax.GradientTransformationExtraArgs:
    return FACTORIES[form]()


# By hand, in NumPy --------------------------------------------------------------------------------


class Run(NamedTuple):
    """A training run.

    Attributes:
      params: at the end, by name.
      seen: the state's vectors of each step, by field, in the order of the layers.
    """

    params: dict[str, np.ndarray]
    seen: dict[str, np.ndarray]


JUDGED = {"ftp": "ftp_radii", "tpgm": "tpgm_radii"}
FIELDS = ("temp_balance_scale", "layer_decay_scale", "spd_ratio", *JUDGED.values())


def vectors(state: Any) -> dict[str, Any]:
    """What the stages in a state did last."""
    found = {field: jax.tree.leaves(optax.tree.get(state, field)) for field in FIELDS}
    return {field: leaf for field, leaves in found.items() for leaf in leaves}


def balanced(weights: Mapping[str, np.ndarray], low: float, high: float) -> dict[str, float]:
    """The factor of each module with a kernel: PL_Alpha_Hill with xmin_pos = 2, assigned linearly.

    In float64 by singular values, and not with the library's functions.
    """
    alpha = {}
    for name, weight in weights.items():
        if weight.ndim == 2:
            e = np.sort(np.linalg.svd(weight, compute_uv=False) ** 2)
            tail = e[e.size // 2 :]
            alpha[name.split("/")[0]] = 1 + tail.size / np.sum(np.log(tail / tail[0]))
    least, most = min(alpha.values()), max(alpha.values())
    return {m: low + (high - low) * (a - least) / (most - least) for m, a in alpha.items()}


def by_hand(
    form: str,
    names: tuple[str, ...] = NAMES,
    *,
    start: Any = PARAMS,
    grads: Any = GRADS,
    hyper: Callable[[int], Mapping[str, float]] = lambda step: HYPER,
) -> Run:
    """The run that an optimizer comes to.

    Args:
      form: which.
      names: the arrays that it is shown; the others stay where they are.
      start: the parameters.
      grads: the gradients, with a leading step axis.
      hyper: the hyperparameters of each step.
    """
    initial = {name: x.astype(np.float64) for name, x in flat_arrays(start).items()}
    theta, g_all = dict(initial), flat_arrays(grads)
    if form in ("around", "sgd"):
        names = tuple(name for name in names if not name.startswith("embedding"))
    m, v = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
    ftp = {name: oracles.FTP("l2") for name in names}
    balance: dict[str, float] = {}
    measured, seen = 0, []
    for step in range(len(g_all[NAMES[0]])):
        h = hyper(step)
        if form == "sgd":
            for name in names:
                m[name] = h["momentum"] * m[name] + g_all[name][step]
                theta[name] = theta[name] - h["rate"] * m[name]
            continue
        if step == 0 or step - measured >= h["every"]:
            weights = {name: theta[name] for name in names}
            balance = balanced(weights, h["min_scale"], h["max_scale"])
            measured = step
        modules = [name.split("/")[0] for name in names]
        scale = [balance[module] for module in modules]
        decay = [h["decay"] ** HEIGHTS[module] for module in modules]
        judged = []
        for i, name in enumerate(names):
            g = g_all[name][step].astype(np.float64)
            m[name] = 0.9 * m[name] + 0.1 * g
            v[name] = 0.999 * v[name] + 0.001 * g**2
            m_hat, v_hat = m[name] / (1 - 0.9 ** (step + 1)), v[name] / (1 - 0.999 ** (step + 1))
            u = -h["rate"] * m_hat / (np.sqrt(v_hat) + 1e-8) * scale[i] * decay[i]
            if modules[i] == "embedding":
                u = np.zeros_like(u)
            delta = theta[name] - initial[name]
            if form == "ftp":
                (u,) = [
                    step_of_array.reshape(g.shape)
                    for step_of_array in ftp[name].step(
                        *([x.reshape(1, -1)] for x in (u, theta[name], initial[name], g)),
                        K,
                        RADIUS_RATE,
                    )
                ]
                judged.append(ftp[name].gamma)
            elif form == "tpgm":
                norm = np.linalg.norm(delta + u)
                u = min(1, RADIUS / max(norm, 1e-8)) * (delta + u) - delta
                judged.append(RADIUS)
            else:
                u, r = oracles.spd_step(u, theta[name], initial[name], g, h["weight_decay"])
                judged.append(r)
            theta[name] = theta[name] + u
        field = JUDGED.get(form, "spd_ratio")
        seen.append({"temp_balance_scale": scale, "layer_decay_scale": decay, field: judged})
    fields = seen[0] if seen else ()
    return Run(theta, {field: np.array([now[field] for now in seen]) for field in fields})


def assert_same(
    found: Run, expected: Run, names: tuple[str, ...] = NAMES, tol: float = 1e-4
) -> None:
    """Checks the arrays of these names, and all vectors."""
    assert found.seen.keys() == expected.seen.keys()
    for field, value in expected.seen.items():
        np.testing.assert_allclose(found.seen[field], value, rtol=tol, atol=tol, err_msg=field)
    for name in names:
        actual, desired = found.params[name], expected.params[name]
        np.testing.assert_allclose(actual, desired, rtol=tol, atol=tol, err_msg=name)


def test_the_run_by_hand_has_everything_in_it() -> None:
    """Else the tests below would compare little."""
    found = by_hand("around").seen
    balance, decay = found["temp_balance_scale"], found["layer_decay_scale"]
    assert np.ptp(balance, axis=1).min() == 1.0  # from s_min to s_max among the layers
    moved = np.abs(np.diff(balance, axis=0)).max(axis=1) > 0.003
    np.testing.assert_array_equal(moved, [False, True, False, True, False])  # every 2
    assert set(decay[0]) == {1.0, 0.5, 0.25}
    assert 0 < np.sum(found["spd_ratio"] > 1e-3) < found["spd_ratio"].size


# Runs ---------------------------------------------------------------------------------------------


def scan(tx: Any, params: Any, grads: Any, watch: Callable[[Any], Any] = vectors) -> Any:
    """A run's last parameters and state, and what was watched at each step; for use in jit."""

    def step(carry: Any, grad: Any) -> Any:
        params, state = carry
        updates, state = tx.update(grad, state, params)
        return (optax.apply_updates(params, updates), state), watch(state)

    (params, state), seen = jax.lax.scan(step, (params, tx.init(params)), grads)
    return params, state, seen


def trained(
    tx: Any, params: Any = PARAMS, grads: Any = GRADS, watch: Callable[[Any], Any] = vectors
) -> Run:
    """The run of a plain loop."""
    end, _, seen = jax.jit(lambda p, g: scan(tx, p, g, watch))(params, grads)
    return Run(flat_arrays(end), jax.device_get(seen))


def like(tree: Any, values: Any) -> Any:
    """The values in the containers of another tree, which keeps the same order."""
    return jax.tree.unflatten(jax.tree.structure(tree), jax.tree.leaves(values))


def at(grads: Any, step: int) -> Any:
    return jax.tree.map(lambda g: g[step], grads)


def test_an_ensemble_under_vmap() -> None:
    """Each member is balanced for itself, also where only one of them is due."""
    stage = optax_spd.temp_balance(every=2, min_eigenvalues=4)
    starts = [PARAMS, jax.tree.map(lambda p: p[::-1] * np.linspace(0.2, 1, 4), PARAMS)]
    members = jax.tree.map(lambda *p: np.stack(p).astype(np.float32), *starts)
    state = jax.vmap(stage.init)(members)._replace(count=jnp.array([0, 1]))
    ones = jax.tree.map(np.ones_like, members)
    updates, after = jax.jit(jax.vmap(stage.update))(ones, state, members)
    weights = {name: x.astype(np.float64) for name, x in flat_arrays(PARAMS).items()}
    for module, scale in balanced(weights, 0.5, 1.5).items():
        for update in updates[module].values():
            np.testing.assert_allclose(update[0], scale, rtol=1e-4)
            np.testing.assert_array_equal(update[1], 1)
    np.testing.assert_array_equal(after.count, [1, 2])


# Before the methods that judge the step -----------------------------------------------------------


@pytest.mark.parametrize("form", JUDGED)
def test_ftp_and_tpgm_judge_the_scaled_step(form: str) -> None:
    """SPD is in all the other tests."""
    expected = by_hand(form)
    assert_same(trained(make(form)), expected, tol=1e-3)
    reach = {n: np.linalg.norm(x - flat_arrays(PARAMS)[n]) for n, x in expected.params.items()}
    if form == "tpgm":  # some are held at their radius, some never got so far
        assert sum(np.isclose(r, RADIUS) for r in reach.values()) >= 2
        assert sum(0 < r < 0.9 * RADIUS for r in reach.values()) >= 1
    else:
        radii = expected.seen["ftp_radii"]
        assert np.sum(np.abs(np.diff(radii, axis=0)) > 1e-3) > STEPS


# Optax's own wrappers -----------------------------------------------------------------------------

MASK = nested({name: name in BODY for name in NAMES})


def program(tx: Any, params: Any = PARAMS) -> str:
    """What init and a step compute, whatever the containers: leaves are numbered in order."""
    grads = like(params, at(GRADS, 0))

    def step(grads: Any, params: Any) -> Any:
        updates, state = tx.update(grads, tx.init(params), params)
        return optax.apply_updates(params, updates), vectors(state)

    return str(jax.make_jaxpr(step)(grads, params))


@WHOLE
def test_masked_by_a_tree_or_by_a_function(form: str) -> None:
    """And with extra arguments masked or not: the same program."""
    programs = {
        program(optax.masked(make(form), mask, mask_compatible_extra_args=masks_extra))
        for mask in (MASK, optax_spd.path_mask("^layer"))
        for masks_extra in (False, True)
    }
    assert len(programs) == 1
    assert programs != {program(make(form))}


def test_masked() -> None:
    """Which partition, below, does with all the stages."""
    found = trained(optax.masked(make("sgd"), MASK))
    assert_same(found, by_hand("sgd", BODY), BODY)
    for name in set(NAMES) - set(BODY):  # masked hands the rest on as it is: here the gradient
        passed = flat_arrays(PARAMS)[name] + flat_arrays(GRADS)[name].sum(axis=0)
        np.testing.assert_allclose(found.params[name], passed, rtol=1e-4, atol=1e-4)


def test_partition_into_two_groups() -> None:
    """The layers are balanced among themselves."""
    rest = tuple(name for name in NAMES if name not in BODY)
    labels = nested({name: "body" if name in BODY else "rest" for name in NAMES})
    tx = optax.partition({"body": make("around"), "rest": make("sgd")}, labels)
    found = trained(tx)
    assert_same(found, by_hand("around", BODY), BODY)
    expected = by_hand("sgd", rest)
    assert_same(Run(found.params, {}), expected, rest)
    assert np.any(expected.params["head/kernel"] != flat_arrays(PARAMS)["head/kernel"])


@AROUND
def test_multi_steps_equals_steps_on_the_mean_gradient(form: str) -> None:
    def split(seed: int, grad: np.ndarray) -> np.ndarray:
        noise = 0.5 * normal(30 + seed, STEPS, 1, *grad.shape[1:])
        return (grad[:, None] + np.concatenate([noise, -noise], 1)).reshape(-1, *grad.shape[1:])

    leaves = jax.tree.leaves(GRADS)
    micro = like(GRADS, [split(seed, leaf) for seed, leaf in enumerate(leaves)])
    found = trained(optax.MultiSteps(make(form), 2), grads=micro)
    seen = {field: value[1::2] for field, value in found.seen.items()}
    assert_same(Run(found.params, seen), by_hand(form))


@AROUND
def test_a_step_that_apply_if_finite_rejects_did_not_happen(form: str) -> None:
    bad = 3
    grads = jax.tree.map(lambda g: np.insert(g, bad, np.nan, axis=0), GRADS)
    found = trained(optax.apply_if_finite(make(form), 2), grads=grads)
    assert_same(
        Run(found.params, {field: np.delete(v, bad, axis=0) for field, v in found.seen.items()}),
        by_hand(form),
    )
    for value in found.seen.values():
        np.testing.assert_array_equal(value[bad], value[bad - 1])


# Hyperparameters in the state ---------------------------------------------------------------------


def later(step: int) -> Mapping[str, float]:
    """Other hyperparameters from some step on."""
    changed = {
        "rate": 0.05,
        "every": 1,
        "min_scale": 0.2,
        "max_scale": 3.0,
        "decay": 0.75,
        "weight_decay": 0.5,
        "momentum": 0.5,
    }
    return HYPER if step < 3 else changed


@AROUND
def test_inject_hyperparams_changed_between_steps(form: str) -> None:
    tx = optax.inject_hyperparams(FACTORIES[form])()
    names = inspect.signature(FACTORIES[form]).parameters
    changed = {name: np.array([later(i)[name] for i in range(STEPS)]) for name in names}

    @jax.jit
    def run(changed: Any) -> Any:
        def step(carry: Any, given: Any) -> Any:
            grad, values = given
            params, state = carry
            old = state.hyperparams
            new = {name: values[name].astype(old[name].dtype) for name in old}
            updates, state = tx.update(grad, state._replace(hyperparams=new), params)
            return (optax.apply_updates(params, updates), state), vectors(state)

        (params, state), seen = jax.lax.scan(step, (PARAMS, tx.init(PARAMS)), (GRADS, changed))
        return params, seen, state.hyperparams

    params, seen, hyperparams = jax.device_get(run(changed))
    assert hyperparams.keys() == names.keys()
    expected = by_hand(form, hyper=later)
    assert_same(Run(flat_arrays(params), seen), expected)
    assert not np.allclose(expected.params["head/kernel"], by_hand(form).params["head/kernel"])


def documented_static_args(function: Any) -> tuple[str, ...]:
    """What a docstring says to name in ``static_args`` of ``optax.inject_hyperparams``."""
    told = function.__doc__.split("optax.inject_hyperparams``")[1]
    # The list is before or after the word; the sentence ends with a stop.
    sentence = re.split(r"\.\s", told.replace("what shapes the program", ""))[0]
    return tuple(n for n in re.findall(r"[`\"](\w+)[`\"]", sentence) if n != "static_args")


def of_kernels(params: Any) -> Any:
    return jax.tree.map(lambda p: p.ndim == 2, params)


# Every argument with a value of its own, the callable ones as functions: those are what Optax would
# take for schedules.
ARGUMENTS: dict[str, tuple[Any, dict[str, Any]]] = {
    "temp_balance": (
        optax_spd.temp_balance,
        {
            "every": 3,
            "fit": "median",
            "assign": "sigmoid",
            "min_scale": 0.4,
            "max_scale": 1.6,
            "min_eigenvalues": 4,
            "unit": "layer",
            "block": None,  # of the other unit, and a string, which Optax leaves alone
            "follows": lambda module: module,
            "skip_first": True,
            "skip_last": False,
            "normalize": True,
            "xmin_pos": 3,
            "conv_norm": 0.25,
            "filter_zeros": True,
            "bins": 50,
            "sigmoid_min": 1.5,
            "sigmoid_max": 0.5,
            "temperature": 0.3,
            "layers": optax_spd.by_module(),
            "mask": of_kernels,
        },
    ),
    "layerwise_lr_decay": (
        optax_spd.layerwise_lr_decay,
        {
            "decay": 0.6,
            "depth": lambda name: float(name.endswith("1")),
            "min_scale": 0.7,
            "layers": optax_spd.by_module(),
            "mask": of_kernels,
        },
    ),
    "sgd_freeze_embed": (
        optax_spd.sgd_freeze_embed,
        {
            "learning_rate": 0.2,
            "momentum": 0.8,
            "nesterov": True,
            "embedding": optax_spd.path_mask("^emb"),
        },
    ),
}
EACH_FUNCTION = pytest.mark.parametrize("name", ARGUMENTS)


def injected(name: str, static_args: Iterable[str]) -> Any:
    """The types of a jitted step's updates and of the hyperparameters in its state."""
    function, arguments = ARGUMENTS[name]
    tx = optax.inject_hyperparams(function, static_args=static_args)(**arguments)

    def step(params: Any) -> Any:
        return tx.update(params, tx.init(params), params)[0], tx.init(params).hyperparams

    return jax.eval_shape(step, PARAMS)


@EACH_FUNCTION
def test_the_documented_static_args_are_enough(name: str) -> None:
    function, arguments = ARGUMENTS[name]
    assert arguments.keys() == inspect.signature(function).parameters.keys()
    static = documented_static_args(function)
    updates, hyperparams = injected(name, static)
    assert jax.tree.map(jnp.shape, updates) == jax.tree.map(np.shape, PARAMS)
    numbers = {k for k, v in arguments.items() if type(v) in (int, float)}
    assert hyperparams.keys() == numbers - set(static)


NEEDED = [(n, arg) for n, (f, _) in ARGUMENTS.items() for arg in documented_static_args(f)]


@pytest.mark.parametrize(
    ("name", "left_out"), [(n, arg) for n, arg in NEEDED if type(ARGUMENTS[n][1][arg]) is not bool]
)
def test_each_documented_static_arg_is_needed(name: str, left_out: str) -> None:
    static = set(documented_static_args(ARGUMENTS[name][0])) - {left_out}
    # The functions of the user's, taken for schedules, fail in their own way.
    with pytest.raises((TypeError, ValueError, AttributeError)):
        injected(name, static)


# Dtypes -------------------------------------------------------------------------------------------

DTYPES = {
    "bfloat16": dict.fromkeys(NAMES, "bfloat16"),
    "mixed": dict.fromkeys(NAMES, "bfloat16")
    | {"head/kernel": "float32", "layer_0/bias": "float16"},
}


@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
@EACH
def test_half_precision_keeps_its_dtypes(form: str, dtypes: dict[str, str]) -> None:
    types = nested(dtypes)
    params = jax.tree.map(lambda x, dtype: jnp.asarray(x, dtype), PARAMS, types)
    grads = jax.tree.map(jnp.zeros_like, params)
    state = jax.eval_shape(make(form).init, params)
    updates, after = jax.eval_shape(make(form).update, grads, state, params)
    assert jax.tree.map(lambda u: str(u.dtype), updates) == types
    assert after == state
    assert {v.dtype for v in vectors(state).values()} <= {np.dtype("float32")}


# Containers ---------------------------------------------------------------------------------------


def boxed(tree: Any) -> Any:
    return jax.tree.map(lambda x: nn.Partitioned(jnp.asarray(x), (None,) * np.ndim(x)), tree)


@pytest.mark.parametrize("container", [freeze, boxed], ids=["FrozenDict", "Partitioned"])
@EACH
def test_linen_train_state(form: str, container: Callable[[Any], Any]) -> None:
    """The same program as for a dict, whose numbers are tested everywhere here."""
    params = container(PARAMS)

    def step(grads: Any, params: Any) -> Any:
        state = TrainState.create(apply_fn=None, params=params, tx=make(form))
        state = state.apply_gradients(grads=grads)
        assert jax.tree.structure(state.params) == jax.tree.structure(params)
        return state.params, vectors(state.opt_state)

    grads = like(params, at(GRADS, 0))
    assert str(jax.make_jaxpr(step)(grads, params)) == program(make(form))


class Module(nnx.Module):
    """Parameters under given names."""

    def __init__(self, arrays: dict[str, Any]) -> None:
        for name, value in arrays.items():
            inner = Module(value) if isinstance(value, dict) else nnx.Param(jnp.asarray(value))
            setattr(self, name, inner)


@WHOLE
def test_nnx_optimizer(form: str) -> None:
    model = Module(PARAMS)
    optimizer = nnx.Optimizer(model, make(form), wrt=nnx.Param)
    boxes = nnx.state(model, nnx.Param)
    assert tuple(optax_spd.layer_names(boxes)) == NAMES

    @nnx.jit
    def step(model: Module, optimizer: Any, grads: Any) -> None:
        optimizer.update(model, grads)

    seen = []
    for index in range(STEPS):
        step(model, optimizer, like(boxes, at(GRADS, index)))
        seen.append(vectors(optimizer.opt_state))
    history = {field: np.stack([s[field] for s in seen]) for field in seen[0]}
    end = flat_arrays(nnx.state(model, nnx.Param))
    assert_same(Run(end, history), by_hand(form))


class Layer(eqx.Module):
    bias: Any
    kernel: Any
    activation: Callable[..., Any] = jax.nn.relu


class Net(eqx.Module):
    embedding: Layer
    head: Layer
    layer_0: Layer
    layer_1: Layer


@EACH
def test_equinox_with_none_leaves(form: str) -> None:
    layers = {m: Layer(arrays.get("bias"), arrays["kernel"]) for m, arrays in PARAMS.items()}
    params = eqx.filter(Net(**layers), eqx.is_array_like)
    assert params.head.bias is None
    assert params.head.activation is None
    assert program(make(form), params) == program(make(form))


# In place, and on with a checkpoint ---------------------------------------------------------------


@functools.cache
def donating(form: str) -> Any:
    """A step that uses up parameters and state."""
    tx = make(form)

    def step(params: Any, state: Any, grad: Any) -> Any:
        updates, state = tx.update(grad, state, params)
        return optax.apply_updates(params, updates), state

    return jax.jit(step, donate_argnums=(0, 1))


def on_device(tree: Any) -> Any:
    return jax.tree.map(lambda x: jnp.array(x, copy=True), tree)


def go_on(form: str, params: Any, state: Any, steps: range) -> Any:
    for index in steps:
        params, state = donating(form)(params, state, at(GRADS, index))
    return params, state


@WHOLE
def test_a_step_that_donates_everything(form: str) -> None:
    params = on_device(PARAMS)
    state = make(form).init(params)
    given = jax.tree.leaves((params, optax.tree.get(state, "mu" if form == "behind" else "trace")))
    params, state = go_on(form, params, state, range(STEPS))
    assert all(leaf.is_deleted() for leaf in given)
    expected = by_hand(form)
    last = {field: value[-1] for field, value in expected.seen.items()}
    assert_same(Run(flat_arrays(params), vectors(state)), Run(expected.params, last))


def assert_same_to_the_bit(found: Any, expected: Any) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    assert jax.tree.map(jax.typeof, found) == jax.tree.map(jax.typeof, expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


TRAINED = ("behind", "sgd")


def interrupted(form: str) -> Any:
    params = on_device(PARAMS)
    return go_on(form, params, make(form).init(params), range(3))


def test_a_run_restored_by_orbax_is_the_uninterrupted_one(tmp_path: pathlib.Path) -> None:
    saved = {form: interrupted(form) for form in TRAINED}
    # As a new process would: the structure comes from init, the numbers from the checkpoint.
    shapes = jax.eval_shape(lambda: {f: (PARAMS, make(f).init(PARAMS)) for f in TRAINED})
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), shapes)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "run", saved)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "run", target)
    assert_same_to_the_bit(restored, saved)
    for form in TRAINED:
        rest = range(3, STEPS)
        assert_same_to_the_bit(go_on(form, *restored[form], rest), go_on(form, *saved[form], rest))


def test_the_anchor_of_such_a_chain_is_dropped_and_set() -> None:
    params, state = interrupted("behind")
    rest = range(3, STEPS)
    dropped = optax_spd.drop_anchor(on_device(state))
    assert len(jax.tree.leaves(state)) - len(jax.tree.leaves(dropped)) == len(NAMES)
    with pytest.raises(ValueError, match="the anchor was dropped; call set_anchor"):
        jax.eval_shape(make("behind").update, at(GRADS, 3), dropped, params)
    again = optax_spd.set_anchor(dropped, PARAMS)
    assert_same_to_the_bit(again, state)
    assert_same_to_the_bit(
        go_on("behind", on_device(params), again, rest), go_on("behind", params, state, rest)
    )


WRAPPERS: dict[str, Callable[[str], Any]] = {
    "plain": make,
    "masked": lambda form: optax.masked(make(form), MASK),
    "partition": lambda form: optax.partition(
        {"body": make(form), "rest": optax.sgd(0.1)},
        nested({name: "body" if name in BODY else "rest" for name in NAMES}),
    ),
    "MultiSteps": lambda form: optax.MultiSteps(make(form), 2),
    "inject_hyperparams": lambda form: optax.inject_hyperparams(FACTORIES[form])(),
    "apply_if_finite": lambda form: optax.apply_if_finite(make(form), 2),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_the_anchor_is_set_through_wrappers(wrapper: str) -> None:
    state = WRAPPERS[wrapper]("around").init(PARAMS)
    others = jax.tree.map(lambda x: x + 1, PARAMS)
    found = optax_spd.set_anchor(optax_spd.drop_anchor(state), others)
    assert jax.tree.structure(found) == jax.tree.structure(state)
    anchor = trees.flatten(optax.tree.get(found, "anchor"))
    held = {"/".join(p): x for p, x in anchor.by_path.items() if not trees.is_gap(x)}
    shown = BODY if wrapper in ("masked", "partition") else NOT_EMBEDDING
    assert tuple(held) == shown
    for name, array in held.items():
        np.testing.assert_array_equal(array, flat_arrays(others)[name])
    back = optax_spd.set_anchor(found, PARAMS)
    jax.tree.map(np.testing.assert_array_equal, back, state)


@pytest.mark.parametrize("wrapper", WRAPPERS)
@EACH
def test_tree_map_params_finds_what_is_like_the_parameters(form: str, wrapper: str) -> None:
    tx = WRAPPERS[wrapper](form)
    state = jax.eval_shape(tx.init, PARAMS)
    marked = optax.tree_utils.tree_map_params(
        tx, lambda _: "param", state, transform_non_params=lambda _: "other"
    )
    assert jax.tree.structure(marked) == jax.tree.structure(state)
    # Moments, anchors and what MultiSteps accumulates stand at a parameter's path; counts and
    # vectors with one entry per layer stand at the path of their field.
    for path, mark in jax.tree.leaves_with_path(marked):
        at_parameter = re.search(r"(kernel|bias)", jax.tree_util.keystr(path)) is not None
        assert mark == ("param" if at_parameter else "other"), path
    assert "param" in jax.tree.leaves(marked)


# Sharding -----------------------------------------------------------------------------------------

SPECS = nested(
    {
        "embedding/kernel": P("x", None),
        "head/kernel": P(None, "x"),
        "layer_0/bias": P("x"),
        "layer_0/kernel": P("x", None),
        "layer_1/bias": P(),
        "layer_1/kernel": P(None, "x"),
    }
)


@pytest.mark.parametrize(
    ("form", "axis_type"),
    [("behind", AxisType.Explicit), ("sgd", AxisType.Explicit), ("sgd", AxisType.Auto)],
)
def test_sharded_parameters(form: str, axis_type: AxisType) -> None:
    mesh = jax.make_mesh((2,), ("x",), axis_types=(axis_type,), devices=jax.devices()[:2])
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), SPECS)
    with jax.set_mesh(mesh):
        params = jax.device_put(PARAMS, shardings)
        # A scan refuses a state whose types change, of which the shardings are part.
        run = jax.jit(functools.partial(scan, make(form)))
        by_step = lambda spec: NamedSharding(mesh, P(None, *spec))
        grads = jax.device_put(GRADS, jax.tree.map(by_step, SPECS))
        end, state, seen = run(params, grads)
        assert jax.tree.map(jax.typeof, end) == jax.tree.map(jax.typeof, params)
        for moment in optax.tree_utils.tree_get_all_with_path(state, "mu"):
            kernel = moment[1]["head"]["kernel"]
            assert kernel.sharding.is_equivalent_to(shardings["head"]["kernel"], 2)
    assert_same(Run(flat_arrays(end), jax.device_get(seen)), by_hand(form))
    for array, sharding in zip(jax.tree.leaves(end), jax.tree.leaves(shardings), strict=True):
        assert array.sharding.is_equivalent_to(sharding, array.ndim)
