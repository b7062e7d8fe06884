"""The recipes: the chains they stand for, Optax's own argument order, and what they cost."""

import functools
import inspect
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest

import optax_spd

STEPS = 6
RECIPES: list[Callable[..., Any]] = [
    optax_spd.adam_spd,
    optax_spd.adamw_l2_sp,
    optax_spd.adam_tpgm,
    optax_spd.adam_ftp,
    optax_spd.sgd_ftp,
]
each_recipe = pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.__name__)
# Those that decide nothing which a test could read in the state.
RELATED: list[Callable[..., Any]] = [optax_spd.adamp, optax_spd.sgdp, optax_spd.sgd_fednar]


def model(dtype: Any = np.float32) -> Any:
    draw = np.random.default_rng(0)
    return {
        "blocks": draw.normal(size=(2, 3, 4)).astype(dtype),
        "head": draw.normal(size=4).astype(dtype),
    }


def gradients() -> Any:
    """Recorded gradients that turn round, so that radii grow, and shrink by an annealed slope."""
    draw = np.random.default_rng(1)
    signs = np.array([1.0, 1.0, -1.0, -1.0, 1.0, 1.0])

    def one(x: np.ndarray) -> np.ndarray:
        turning = signs.reshape(-1, *[1] * x.ndim) * x
        return (turning + 0.5 * draw.normal(size=(STEPS, *x.shape))).astype(x.dtype)

    return jax.tree.map(one, model())


def train(tx: Any) -> tuple[Any, Any]:
    """Parameters after the last step, and by step what the method decided, if there is one."""

    def step(carry: Any, grads: Any) -> Any:
        params, state = carry
        updates, state = tx.update(grads, state, params)
        found = [optax.tree.get(state, field) for field in oracles.FIELDS]
        return (optax.apply_updates(params, updates), state), [x for x in found if x is not None]

    @jax.jit
    def run(params: Any) -> Any:
        (params, _), decided = jax.lax.scan(step, (params, tx.init(params)), gradients())
        return params, decided

    return jax.device_get(run(model()))


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
ANCHOR = {
    "anchor": jax.tree.map(lambda x: 1.2 * x, model()),
    "anchor_dtype": jnp.bfloat16,
    "mask": {"blocks": True, "head": False},
}
LAYERS = ANCHOR | {"layers": optax_spd.stacked("blocks")}
BALLS = LAYERS | {"norm": "l2"}
RADIAL = {"layers": LAYERS["layers"], "mask": LAYERS["mask"], "delta": 1.2, "wd_ratio": 0.4}
FTP = BALLS | {"radius_learning_rate": RATE, "state_dtype": jnp.bfloat16}


def pairs() -> dict[str, tuple[Any, tuple[Any, ...], tuple[Any, ...]]]:
    """Each recipe with all its arguments, the chain it stands for, and the inner optimizer."""
    adam, moments = optax.adam(RATE, *ADAM), optax.scale_by_adam(*ADAM)
    rate, decay = optax.scale_by_learning_rate(RATE), optax_spd.l2_sp(DECAY, anchor="zero")
    sgd = decay, optax.sgd(RATE, 0.7, nesterov=True)
    dampened = optax.scale(1 - 0.2), optax.trace(0.7)
    radii = optax.sgd(0.1)
    return {
        "adam_spd": (
            optax_spd.adam_spd(RATE, *ADAM, weight_decay=DECAY, **LAYERS),
            (adam, optax_spd.spd(DECAY, **LAYERS)),
            (adam,),
        ),
        "adamw_l2_sp": (
            optax_spd.adamw_l2_sp(RATE, *ADAM, weight_decay=DECAY, **ANCHOR),
            (moments, optax_spd.l2_sp(DECAY, **ANCHOR), rate),
            (adam,),
        ),
        "adam_tpgm": (
            optax_spd.adam_tpgm(RATE, *ADAM, radius_optimizer=radii, every=3, **BALLS),
            (adam, optax_spd.tpgm(radii, every=3, **BALLS)),
            (adam,),
        ),
        "adam_ftp": (
            optax_spd.adam_ftp(RATE, *ADAM, k=K, weight_decay=DECAY, **FTP),
            (moments, decay, rate, optax_spd.ftp(K, **FTP)),
            (moments, decay, rate),
        ),
        "sgd_ftp": (
            optax_spd.sgd_ftp(RATE, 0.7, True, k=K, weight_decay=DECAY, **FTP),
            (*sgd, optax_spd.ftp(K, **FTP)),
            sgd,
        ),
        "adamp": (
            optax_spd.adamp(RATE, *ADAM, weight_decay=DECAY, **RADIAL),
            (moments, optax_spd.remove_radial(DECAY, eps=1e-3, **RADIAL), rate),
            (adam,),
        ),
        "sgdp": (
            optax_spd.sgdp(RATE, 0.7, dampening=0.2, weight_decay=DECAY, **RADIAL),
            (*dampened, optax_spd.remove_radial(lambda t: DECAY(t) / (1 - 0.7), **RADIAL), rate),
            (*dampened, rate),
        ),
    }


VALIDATION = {
    "validation_fn": lambda params, batch: jnp.mean((params["blocks"] - batch) ** 2),
    "validation_batches": np.ones((2, 2, 3, 4), np.float32),
}


@pytest.mark.parametrize("recipe", [*RECIPES, *RELATED[:2]], ids=lambda recipe: recipe.__name__)
def test_a_recipe_is_the_chain_it_stands_for(recipe: Any) -> None:
    name = recipe.__name__
    tx, parts, inner = pairs()[name]

    def with_validation(tx: Any) -> Any:
        extra = VALIDATION if name == "adam_tpgm" else {}
        return tx._replace(update=functools.partial(tx.update, **extra))

    found, expected = map(with_validation, (tx, optax_spd.with_gradient(optax.chain(*parts))))
    params, decided = train(found)
    assert_same((params, decided), train(expected))
    for vectors in decided:
        assert vectors.shape == (STEPS, 2)
        assert len(np.unique(vectors)) >= 3
    alone, _ = train(optax.chain(*inner))
    assert_same(params["head"], alone["head"])  # masked: only the inner optimizer acts
    assert np.abs(params["blocks"] - alone["blocks"]).max() > 1e-2
    state = tx.init(model())
    for _, held in optax.tree.get_all_with_path(state, "anchor"):
        if not isinstance(held, optax.EmptyState):  # the decay toward zero of FTP's recipes
            assert held["blocks"].dtype == jnp.bfloat16
            assert held["head"] == optax.MaskedNode()
    if "adam" in name:
        assert optax.tree.get(state, "mu")["blocks"].dtype == jnp.bfloat16
    if "ftp" in name:
        assert optax.tree.get(state, "ftp_deviation")["blocks"].dtype == jnp.bfloat16


def test_adam_spd_compiles_to_the_same_text_as_its_chain() -> None:
    texts = []
    for tx in (
        optax_spd.adam_spd(0.1, weight_decay=2.0, layers=optax_spd.stacked("blocks")),
        optax_spd.chain(optax.adam(0.1), optax_spd.spd(2.0, layers=optax_spd.stacked("blocks"))),
    ):
        lowered = jax.jit(tx.update).lower(model(), tx.init(model()), model())
        texts.append(lowered.compile().as_text())
    assert texts[0] == texts[1]


@pytest.mark.parametrize("devices", [1, 2])
def test_recipes_take_as_much_memory_as_their_chains(devices: int) -> None:
    # In a process of its own, which has few devices and compiles with XLA's defaults.
    worker = pathlib.Path(__file__).parent / "support" / "temporaries_worker.py"
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    ended = subprocess.run(
        [sys.executable, "-W", "error", str(worker), str(devices)],
        env=environment | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout)
    assert found.keys() >= {"adam_spd", "adam_tpgm", "adam_ftp"}
    for name, (recipe, chain) in found.items():
        assert abs(recipe - chain) <= 1, (name, found)
        assert recipe < 16, (name, found)  # bytes a parameter


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_without_decay_adam_spd_is_adam_to_the_bit(dtype: Any) -> None:
    # Step by step without jit: a fused program may round differently.
    adam, ours = optax.adam(0.3), optax_spd.adam_spd(0.3, weight_decay=0.0)
    params = jax.tree.map(jnp.asarray, model(dtype))
    state, our_state = adam.init(params), ours.init(params)
    for step in range(STEPS):
        grads = jax.tree.map(lambda x, step=step: jnp.asarray(x[step], dtype), gradients())
        expected, state = adam.update(grads, state, params)
        updates, our_state = ours.update(grads, our_state, params)
        jax.tree.map(np.testing.assert_array_equal, updates, expected)
        assert {u.dtype for u in jax.tree.leaves(updates)} == {jnp.dtype(dtype)}
        params = optax.apply_updates(params, expected)
    assert np.all(optax.tree.get(our_state, "spd_fired") > 0)


@pytest.mark.parametrize("recipe", [r for r in RECIPES if r is not optax_spd.adamw_l2_sp])
def test_axis_name_is_passed_on(recipe: Any) -> None:
    l2 = {} if recipe is optax_spd.adam_spd else {"norm": "l2"}
    tx = recipe(0.1, axis_name="shard", **l2)
    with pytest.raises(NameError, match="shard"):  # there is no such axis outside of a map
        tx.update(model(), tx.init(model()), model())


# How they are called -----------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", [*RECIPES, *RELATED], ids=lambda recipe: recipe.__name__)
def test_arguments_are_in_optaxs_order_and_the_rest_by_keyword(recipe: Any) -> None:
    theirs = optax.sgd if recipe.__name__.startswith("sgd") else optax.adam
    parameters = list(inspect.signature(theirs).parameters.values())
    positional = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    if theirs is optax.sgd:
        positional = positional[:3]  # without its accumulator_dtype
    ours = list(inspect.signature(recipe).parameters.values())
    first, rest = ours[: len(positional)], ours[len(positional) :]
    described = [(p.name, p.default, p.kind) for p in first]
    assert described == [(p.name, p.default, p.kind) for p in positional]
    assert {p.kind for p in rest} == {inspect.Parameter.KEYWORD_ONLY}  # so no **kwargs


# What they cost ----------------------------------------------------------------------------------

HALF = jnp.bfloat16


@pytest.mark.parametrize(
    ("recipe", "options", "expected"),
    [
        (optax_spd.adam_spd, {}, 12),
        (optax_spd.adam_spd, {"anchor_dtype": HALF}, 10),
        (optax_spd.adam_spd, {"mu_dtype": HALF, "anchor": "argument"}, 6),
        (optax_spd.adamw_l2_sp, {"mu_dtype": HALF, "anchor": "zero"}, 6),
        (optax_spd.adam_tpgm, {}, 12),
        (optax_spd.adam_ftp, {"state_dtype": HALF, "anchor_dtype": HALF}, 12),
        (optax_spd.adam_ftp, {"weight_decay": RATE, "anchor": "zero"}, 12),
        (optax_spd.adam_ftp, {"mu_dtype": HALF}, 14),
        (optax_spd.sgd_ftp, {"momentum": 0.9, "weight_decay": 0.1}, 12),
        (optax_spd.adamp, {"mu_dtype": HALF, "nesterov": True}, 6),
        (optax_spd.sgdp, {"momentum": 0.9, "nesterov": True}, 4),
        (
            optax_spd.sgd_fednar,
            {"momentum": 0.9, "weight_decay": 0.1, "max_norm": 1.0, "anchor": "initial"},
            8,
        ),
    ],
)
def test_state_bytes_per_parameter(recipe: Any, options: dict[str, Any], expected: int) -> None:
    tx = recipe(0.1, **options)

    def state_bytes(count: int) -> int:
        params = {"w": jax.ShapeDtypeStruct((count,), jnp.float32)}
        leaves = jax.tree.leaves(jax.eval_shape(tx.init, params))
        return sum(x.size * x.dtype.itemsize for x in leaves)

    assert (state_bytes(3000) - state_bytes(1000)) / 2000 == expected
    assert state_bytes(1000) - 1000 * expected < 48  # counts and vectors
    # An array under the mask takes no anchor, and FTP keeps no deviation of it.
    state = recipe(0.1, mask={"blocks": True, "head": False}, **options).init(model())
    held = optax.tree.get_all_with_path(state, "anchor")
    held += optax.tree.get_all_with_path(state, "ftp_deviation")
    for _, tree in held:
        if options.get("anchor") not in ("zero", "argument") and tree != optax.EmptyState():
            assert tree["head"] == optax.MaskedNode()
