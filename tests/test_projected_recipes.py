"""The recipes with learned radii: the chains they stand for, their arguments, and their cost."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest

import optax_spd
from optax_spd import LayerSpec

STEPS = 6
RECIPES: list[Callable[..., Any]] = [optax_spd.adam_tpgm, optax_spd.adam_ftp, optax_spd.sgd_ftp]
each_recipe = pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.__name__)


def model() -> Any:
    draw = np.random.default_rng(0)
    return {
        "blocks": draw.normal(size=(2, 3, 4)).astype(np.float32),
        "head": draw.normal(size=4).astype(np.float32),
    }


def gradients() -> Any:
    """Recorded gradients that turn round, so that radii grow, and shrink by an annealed slope."""
    draw = np.random.default_rng(1)
    signs = np.array([1.0, 1.0, -1.0, -1.0, 1.0, 1.0])

    def one(x: np.ndarray) -> np.ndarray:
        turning = signs.reshape(-1, *[1] * x.ndim) * x
        return (turning + 0.5 * draw.normal(size=(STEPS, *x.shape))).astype(x.dtype)

    return jax.tree.map(one, model())


def train(tx: Any) -> tuple[Any, np.ndarray]:
    return oracles.train(tx, model(), gradients())


def assert_same(found: Any, expected: Any, atol: float = 1e-6) -> None:
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=atol), found, expected
    )


# What they are -----------------------------------------------------------------------------------

RATE = optax.linear_schedule(0.2, 0.1, STEPS)
DECAY = optax.linear_schedule(0.5, 0.1, STEPS)
K = optax.linear_schedule(0.2, 0.8, STEPS)
# Every argument differs from its default and from the others, so that none can be exchanged.
ADAM = (0.8, 0.95, 1e-3, 1e-4, jnp.bfloat16)
COMMON = {
    "norm": "l2",
    "anchor": jax.tree.map(lambda x: 1.2 * x, model()),
    "anchor_dtype": jnp.bfloat16,
    "layers": optax_spd.stacked("blocks"),
    "mask": {"blocks": True, "head": False},
}
FTP = COMMON | {"radius_learning_rate": RATE, "state_dtype": jnp.bfloat16}


def pairs() -> dict[str, tuple[Any, Any, Any]]:
    """Each recipe with all its arguments, the chain it stands for, and the chain without radii."""
    adam = (optax.scale_by_adam(*ADAM), optax_spd.l2_sp(DECAY, anchor="zero"))
    rate = optax.scale_by_learning_rate(RATE)
    sgd = (optax_spd.l2_sp(DECAY, anchor="zero"), optax.sgd(RATE, 0.7, nesterov=True))
    return {
        "adam_ftp": (
            optax_spd.adam_ftp(RATE, *ADAM, k=K, weight_decay=DECAY, **FTP),
            (*adam, rate, optax_spd.ftp(K, **FTP)),
            (*adam, rate),
        ),
        "sgd_ftp": (
            optax_spd.sgd_ftp(RATE, 0.7, True, k=K, weight_decay=DECAY, **FTP),
            (*sgd, optax_spd.ftp(K, **FTP)),
            sgd,
        ),
        "adam_tpgm": (
            optax_spd.adam_tpgm(RATE, *ADAM, radius_optimizer=optax.sgd(0.1), every=3, **COMMON),
            (optax.adam(RATE, *ADAM), optax_spd.tpgm(optax.sgd(0.1), every=3, **COMMON)),
            (optax.adam(RATE, *ADAM),),
        ),
    }


VALIDATION = {
    "validation_fn": lambda params, batch: jnp.mean((params["blocks"] - batch) ** 2),
    "validation_batches": np.ones((2, 2, 3, 4), np.float32),
}


@pytest.mark.parametrize("name", ["adam_ftp", "sgd_ftp", "adam_tpgm"])
def test_a_recipe_is_the_chain_it_stands_for(name: str) -> None:
    recipe, parts, inner = pairs()[name]

    def with_validation(tx: Any) -> Any:
        extra = VALIDATION if name == "adam_tpgm" else {}
        return tx._replace(update=functools.partial(tx.update, **extra))

    (params, radii), expected = (
        train(with_validation(tx)) for tx in (recipe, optax_spd.with_gradient(optax.chain(*parts)))
    )
    assert radii.shape == (STEPS, 2)
    assert len(np.unique(radii)) >= 4
    assert_same((params, radii), expected)
    alone = inner_only(optax.chain(*inner))
    assert_same(params["head"], alone["head"])  # masked: only the inner optimizer acts
    assert np.abs(params["blocks"] - alone["blocks"]).max() > 1e-2
    state = recipe.init(model())
    held = [x for _, x in optax.tree.get_all_with_path(state[-1], "anchor")]
    assert held[0]["blocks"].dtype == jnp.bfloat16
    assert held[0]["head"] == optax.MaskedNode()
    if name != "adam_tpgm":
        assert optax.tree.get(state, "ftp_deviation")["blocks"].dtype == jnp.bfloat16


def inner_only(tx: Any) -> Any:
    def step(carry: Any, grads: Any) -> Any:
        params, state = carry
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    start = (model(), tx.init(model()))
    return jax.jit(lambda: jax.lax.scan(step, start, gradients())[0][0])()


@each_recipe
def test_axis_name_is_passed_on(recipe: Any) -> None:
    tx = recipe(0.1, norm="l2", axis_name="shard")
    with pytest.raises(NameError, match="shard"):  # there is no such axis outside of a map
        tx.update(model(), tx.init(model()), model())
    with pytest.raises(ValueError, match="norm='mars' sums along some"):
        recipe(0.1, axis_name="shard")


@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_sgd_decays_by_a_penalty_that_the_radii_do_not_see(decay: float, x64: None) -> None:
    """The original's SGDP, against NumPy: momentum remembers λθ, q does not."""
    params = {"w": np.random.default_rng(0).normal(size=(3, 2))}
    grads = {"w": np.random.default_rng(1).normal(size=(STEPS, 3, 2)) + 1}
    rows = lambda x: oracles.rows_by_layer({"w": x}, {"w": LayerSpec()})["w"]
    for momentum, nesterov in ((None, False), (0.9, False), (0.9, True)):
        tx = optax_spd.sgd_ftp(0.1, momentum, nesterov, weight_decay=decay)
        trained, radii = oracles.train(tx, params, grads)
        theta, trace, oracle = params["w"], 0.0, oracles.FTP()
        for step in range(STEPS):
            g = grads["w"][step]
            h = g + decay * theta
            trace = (momentum or 0.0) * trace + h
            z = h + (momentum or 0.0) * trace if nesterov else trace
            (u,) = oracle.step(rows(-0.1 * z), rows(theta), rows(params["w"]), rows(g))
            theta = theta + u.T
            np.testing.assert_allclose(radii[step], [oracle.gamma], rtol=0, atol=1e-12)
        np.testing.assert_allclose(trained["w"], theta, rtol=0, atol=1e-12)
        assert oracle.met["projected"] == STEPS


def test_adam_decays_beside_the_moments_and_the_radii(x64: None) -> None:
    """The original's AdamP, as AdamW: λ times the learning rate, not in the moments, not in q."""
    params = {"w": np.random.default_rng(0).normal(size=(3, 2))}
    grads = {"w": np.random.default_rng(1).normal(size=(STEPS, 3, 2)) + 1}
    rows = lambda x: oracles.rows_by_layer({"w": x}, {"w": LayerSpec()})["w"]
    trained, radii = oracles.train(optax_spd.adam_ftp(0.1, weight_decay=0.5), params, grads)
    theta, m, v, oracle = params["w"], 0.0, 0.0, oracles.FTP()
    for step in range(STEPS):
        g = grads["w"][step]
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        hats = m / (1 - 0.9 ** (step + 1)), v / (1 - 0.999 ** (step + 1))
        u = -0.1 * (hats[0] / (np.sqrt(hats[1]) + 1e-8) + 0.5 * theta)
        (u,) = oracle.step(rows(u), rows(theta), rows(params["w"]), rows(g))
        theta = theta + u.T
        np.testing.assert_allclose(radii[step], [oracle.gamma], rtol=0, atol=1e-8)
    np.testing.assert_allclose(trained["w"], theta, rtol=0, atol=1e-8)


def test_the_decay_applies_everywhere_whatever_the_mask() -> None:
    mask = optax_spd.path_mask("blocks")
    for recipe in (optax_spd.adam_ftp, optax_spd.sgd_ftp):
        decayed, free = (
            oracles.train(recipe(0.1, weight_decay=d, mask=mask), model(), gradients())[0]["head"]
            for d in (0.5, 0.0)
        )
        assert np.abs(decayed - free).max() > 1e-2


# How they are called -----------------------------------------------------------------------------


def test_arguments_are_in_optaxs_order_and_the_rest_by_keyword() -> None:
    for recipe, theirs in (
        (optax_spd.adam_tpgm, optax.adam),
        (optax_spd.adam_ftp, optax.adam),
        (optax_spd.sgd_ftp, optax.sgd),
    ):
        parameters = list(inspect.signature(theirs).parameters.values())
        count = len([p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD])
        count = 3 if theirs is optax.sgd else count  # of sgd not its accumulator_dtype
        ours = list(inspect.signature(recipe).parameters.values())
        described = [(p.name, p.default, p.kind) for p in ours[:count]]
        assert described == [(p.name, p.default, p.kind) for p in parameters[:count]]
        assert {p.kind for p in ours[count:]} == {inspect.Parameter.KEYWORD_ONLY}


@each_recipe
def test_a_misspelt_argument_is_not_swallowed(recipe: Any) -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'nrom'"):
        recipe(0.1, nrom="l2")


STATIC = {
    "adam_tpgm": (
        *("radius_optimizer", "norm", "anchor", "anchor_dtype", "layers", "mask", "axis_name"),
        "mu_dtype",
    ),
    "adam_ftp": (
        *("norm", "state_dtype", "anchor", "anchor_dtype", "layers", "mask", "axis_name"),
        "mu_dtype",
    ),
    "sgd_ftp": (
        *("nesterov", "norm", "state_dtype", "anchor", "anchor_dtype", "layers", "mask"),
        "axis_name",
    ),
    "ftp": ("norm", "state_dtype", "anchor", "anchor_dtype", "layers", "mask", "axis_name"),
}


@pytest.mark.parametrize("name", STATIC)
def test_the_docstring_names_the_static_arguments(name: str) -> None:
    told = " ".join((getattr(optax_spd, name).__doc__ or "").split("inject_hyperparams")[1].split())
    for argument in STATIC[name]:
        assert argument in told.split("Raises:")[0], argument


@each_recipe
def test_hyperparameters_may_be_injected(recipe: Any) -> None:
    """With callables, trees and dtypes among them; k, rates and decay become arrays."""
    options = dict(COMMON)
    if recipe is not optax_spd.adam_tpgm:
        options |= {"k": 0.5, "weight_decay": 0.1, "radius_learning_rate": 0.05}
        options |= {"state_dtype": jnp.bfloat16}
    if recipe is optax_spd.sgd_ftp:
        options |= {"momentum": 0.9, "nesterov": True}
    injected = optax.inject_hyperparams(recipe, static_args=STATIC[recipe.__name__])
    state = injected(0.1, **options).init(model())
    given = {name for name in options if name not in STATIC[recipe.__name__]}
    assert given | {"learning_rate"} <= state.hyperparams.keys()
    # Injected as a float32 array, b2 gives another 1 - b2 than as a Python float.
    assert_same(train(injected(0.1, **options)), train(recipe(0.1, **options)), atol=1e-4)


def test_an_injected_k_may_be_scheduled_and_changed() -> None:
    make = optax.inject_hyperparams(optax_spd.ftp, static_args=STATIC["ftp"])
    expected = train(optax_spd.chain(optax.sgd(0.1), optax_spd.ftp(K)))
    assert_same(train(optax_spd.chain(optax.sgd(0.1), make(k=K))), expected)
    assert not np.allclose(
        train(optax_spd.chain(optax.sgd(0.1), optax_spd.ftp(1.0)))[1], expected[1]
    )

    tx = optax_spd.with_gradient(make(k=1.0, anchor="zero"))
    update, state = jax.jit(tx.update), tx.init(model())
    for _ in range(2):
        _, state = update(model(), state, model())  # outward gradients at the deviation: q > 0
    _, shrunk = update(model(), state, model())
    state.hyperparams["k"] = jnp.zeros(())
    _, kept = update(model(), state, model())
    moments = [optax.tree.get(s, "ftp_moments").first for s in (shrunk, kept, state)]
    assert np.all(moments[0] > moments[2])
    np.testing.assert_allclose(moments[1], 0.9 * moments[2], rtol=1e-6)


@pytest.mark.parametrize("name", ["adam_ftp", "sgd_ftp", "adam_tpgm"])
def test_multi_steps_equals_accumulating_by_hand(name: str) -> None:
    micro = 3
    recipe = getattr(optax_spd, name)
    noise = np.random.default_rng(2).normal(size=(STEPS, micro, 2, 3, 4))
    noise -= noise.mean(axis=1, keepdims=True)
    means = {"blocks": gradients()["blocks"]}
    split = (means["blocks"][:, None] + noise).astype(np.float32)
    expected = oracles.train(recipe(0.1), {"blocks": model()["blocks"]}, means)
    params, radii = oracles.train(
        optax.MultiSteps(recipe(0.1), micro),
        {"blocks": model()["blocks"]},
        {"blocks": split.reshape(STEPS * micro, 2, 3, 4)},
    )
    # Adam divides by the root of a second moment, which near zero enlarges what rounding differs.
    assert_same((params, radii[micro - 1 :: micro]), expected, atol=2e-5)


# What they cost ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "options", "expected"),
    [
        (optax_spd.adam_tpgm, {}, 12),
        (optax_spd.adam_ftp, {}, 16),
        (optax_spd.adam_ftp, {"state_dtype": jnp.bfloat16, "anchor_dtype": jnp.bfloat16}, 12),
        (optax_spd.adam_ftp, {"weight_decay": RATE, "anchor": "zero"}, 12),
        (optax_spd.adam_ftp, {"mu_dtype": jnp.bfloat16}, 14),
        (optax_spd.sgd_ftp, {}, 8),
        (optax_spd.sgd_ftp, {"momentum": 0.9, "weight_decay": 0.1}, 12),
    ],
)
def test_state_bytes_per_parameter(recipe: Any, options: dict[str, Any], expected: int) -> None:
    tx = recipe(0.1, **options)

    def state_bytes(count: int) -> int:
        params = {"w": jax.ShapeDtypeStruct((count,), jnp.float32)}
        leaves = jax.tree.leaves(jax.eval_shape(tx.init, params))
        return sum(x.size * x.dtype.itemsize for x in leaves)

    assert (state_bytes(3000) - state_bytes(1000)) / 2000 == expected
    assert state_bytes(1000) - 1000 * expected < 40  # counters, and a few numbers a layer
