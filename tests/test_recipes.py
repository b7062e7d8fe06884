"""The recipes: the chains they stand for, Optax's own argument order, and what they cost."""

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_spd

STEPS = 8
RECIPES = [optax_spd.adam_spd, optax_spd.adamw_l2_sp]


def model(dtype: Any = np.float32) -> Any:
    draw = np.random.default_rng(0)
    return {
        "blocks": draw.normal(size=(2, 3)).astype(dtype),
        "head": draw.normal(size=4).astype(dtype),
    }


def train(tx: optax.GradientTransformation, params: Any) -> tuple[Any, Any, np.ndarray]:
    """Params, updates and ratios of training on noise, which makes SPD fire now and then."""
    draw = np.random.default_rng(1)
    grads = jax.tree.map(lambda x: draw.normal(size=(STEPS, *x.shape)).astype(x.dtype), params)

    def step(carry: Any, grads: Any) -> Any:
        params, state = carry
        updates, state = tx.update(grads, state, params)
        ratio = optax.tree.get(state, "spd_ratio", jnp.zeros(()))
        return (optax.apply_updates(params, updates), state), (updates, ratio)

    @jax.jit
    def run(params: Any) -> Any:
        (params, _), (updates, ratios) = jax.lax.scan(step, (params, tx.init(params)), grads)
        return params, updates, ratios

    trained, updates, ratios = jax.device_get(run(params))
    return trained, updates, ratios


def assert_equal(a: Any, b: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)


def assert_close(a: Any, b: Any) -> None:
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-6), a, b)


# What they are -----------------------------------------------------------------------------------


def test_adam_spd_is_adam_and_spd() -> None:
    # Every argument differs from its default and from the others, so that none can be exchanged.
    rate, decay = optax.linear_schedule(0.2, 0.1, STEPS), optax.linear_schedule(1.5, 0.5, STEPS)
    adam = (rate, 0.8, 0.95, 1e-3, 1e-4, jnp.bfloat16)
    stage = {
        "anchor": jax.tree.map(lambda x: 0.5 * x, model()),
        "anchor_dtype": jnp.bfloat16,
        "layers": optax_spd.stacked("blocks"),
        "mask": {"blocks": True, "head": False},
    }
    recipe = optax_spd.adam_spd(*adam, weight_decay=decay, **stage)
    parts = optax.chain(optax.adam(*adam), optax_spd.spd(decay, **stage))
    trained, _, ratios = train(recipe, model())
    assert ratios.shape == (STEPS, 2)
    assert np.all(np.any(ratios > 0, axis=0))
    expected, _, _ = train(optax_spd.with_gradient(parts), model())
    assert_close(trained, expected)
    state = recipe.init(model())
    assert {x.dtype for x in jax.tree.leaves(optax.tree.get(state, "mu"))} == {
        jnp.dtype(jnp.bfloat16)
    }
    assert optax.tree.get(state, "anchor")["blocks"].dtype == jnp.bfloat16


def test_adam_spd_passes_axis_name_on() -> None:
    tx = optax_spd.adam_spd(0.1, axis_name="shard")
    with pytest.raises(NameError, match="shard"):  # there is no such axis outside of a map
        tx.update(model(), tx.init(model()), model())


def test_adamw_l2_sp_is_adamw_with_the_decay_toward_the_anchor() -> None:
    rate, decay = optax.linear_schedule(0.2, 0.1, STEPS), optax.linear_schedule(0.5, 0.1, STEPS)
    adam = (0.8, 0.95, 1e-3, 1e-4, jnp.bfloat16)
    stage = {
        "anchor": jax.tree.map(lambda x: 0.5 * x, model()),
        "anchor_dtype": jnp.bfloat16,
        "mask": {"blocks": True, "head": False},
    }
    recipe = optax_spd.adamw_l2_sp(rate, *adam, weight_decay=decay, **stage)
    parts = optax.chain(
        optax.scale_by_adam(*adam),
        optax_spd.l2_sp(decay, **stage),
        optax.scale_by_learning_rate(rate),
    )
    trained, _, _ = train(recipe, model())
    assert_close(trained, train(parts, model())[0])
    plain, _, _ = train(optax.adam(rate, *adam), model())
    assert np.abs(trained["blocks"] - plain["blocks"]).max() > 1e-3
    assert_close(trained["head"], plain["head"])
    state = recipe.init(model())
    assert {x.dtype for x in jax.tree.leaves(optax.tree.get(state, "mu"))} == {
        jnp.dtype(jnp.bfloat16)
    }
    assert optax.tree.get(state, "anchor")["blocks"].dtype == jnp.bfloat16


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_without_decay_adam_spd_is_adam_to_the_bit(dtype: Any) -> None:
    # Step by step without jit: a fused program may round differently.
    adam, ours = optax.adam(0.3), optax_spd.adam_spd(0.3, weight_decay=0.0)
    params = jax.tree.map(jnp.asarray, model(dtype))
    state, our_state = adam.init(params), ours.init(params)
    draw = np.random.default_rng(1)
    fired = np.zeros(2, bool)
    for _ in range(STEPS):
        grads = jax.tree.map(lambda x: jnp.asarray(draw.normal(size=x.shape), dtype), params)
        expected, state = adam.update(grads, state, params)
        updates, our_state = ours.update(grads, our_state, params)
        assert_equal(updates, expected)
        assert {u.dtype for u in jax.tree.leaves(updates)} == {jnp.dtype(dtype)}
        fired |= np.asarray(optax.tree.get(our_state, "spd_ratio")) > 0
        params = optax.apply_updates(params, expected)
    assert np.all(fired)


# How they are called -----------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.__name__)
def test_arguments_start_as_adams_and_the_rest_are_by_keyword(recipe: Callable[..., Any]) -> None:
    ours = list(inspect.signature(recipe).parameters.values())
    adams = [
        p
        for p in inspect.signature(optax.adam).parameters.values()
        if p.kind is p.POSITIONAL_OR_KEYWORD
    ]
    assert [p.name for p in adams][:5] == ["learning_rate", "b1", "b2", "eps", "eps_root"]
    first, rest = ours[: len(adams)], ours[len(adams) :]
    assert [(p.name, p.default, p.kind) for p in first] == [
        (p.name, p.default, p.kind) for p in adams
    ]
    assert {p.kind for p in rest} == {inspect.Parameter.KEYWORD_ONLY}
    assert "weight_decay" in {p.name for p in rest}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.__name__)
def test_a_misspelt_argument_is_not_swallowed(recipe: Callable[..., Any]) -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'weigth_decay'"):
        recipe(0.1, weigth_decay=0.5)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.__name__)
def test_update_takes_three_arguments_by_these_names(recipe: Callable[..., Any]) -> None:
    tx = recipe(0.1)
    params = model()
    state = tx.init(params)
    by_position, _ = tx.update(params, state, params)
    by_name, _ = tx.update(updates=params, state=state, params=params)
    assert_equal(by_position, by_name)


STATIC = ("anchor", "anchor_dtype", "layers", "mask", "axis_name", "mu_dtype")


def test_hyperparameters_may_be_injected_and_scheduled() -> None:
    decay = optax.linear_schedule(2.0, 0.5, STEPS)
    injected = optax.inject_hyperparams(optax_spd.adam_spd, static_args=STATIC)(
        learning_rate=0.3, weight_decay=decay, layers=optax_spd.stacked("blocks")
    )
    trained, _, ratios = train(injected, model())
    assert np.all(np.any(ratios > 0, axis=0))
    direct = optax_spd.adam_spd(0.3, weight_decay=decay, layers=optax_spd.stacked("blocks"))
    expected, _, _ = train(direct, model())
    # Injected as a float32 array, b2 gives another 1 - b2 than as a Python float.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), trained, expected)


def test_an_injected_decay_may_be_changed_between_steps() -> None:
    tx = optax.inject_hyperparams(optax_spd.adam_spd, static_args=STATIC)(0.3, anchor="zero")
    update = jax.jit(tx.update)
    params = model()
    state = tx.init(params)
    uphill = jax.tree.map(lambda x: -x, params)
    _, state = update(uphill, state, params)  # Adam's momentum now points outward ...
    inward = jax.tree.map(lambda x: 0.5 * x, params)  # ... and the next gradient inward
    decayed, after = update(inward, state, params)
    assert np.all(optax.tree.get(after, "spd_ratio") > 0)
    state.hyperparams["weight_decay"] = jnp.zeros(())
    free, _ = update(inward, state, params)
    for name, ratio in zip(params, optax.tree.get(after, "spd_ratio"), strict=True):
        expected = free[name] - ratio * (params[name] + free[name])
        np.testing.assert_allclose(decayed[name], expected, rtol=1e-5, atol=1e-6)


# What they cost ----------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.__name__)
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, 12),
        ({"anchor_dtype": jnp.bfloat16}, 10),
        ({"anchor": "zero"}, 8),
        ({"anchor": "argument"}, 8),
        ({"mu_dtype": jnp.bfloat16, "anchor": "zero"}, 6),
    ],
    ids=["float32", "bfloat16 anchor", "zero", "argument", "bfloat16 moment"],
)
def test_state_bytes_per_parameter(
    recipe: Callable[..., Any], options: dict[str, Any], expected: int
) -> None:
    tx = recipe(0.1, **options)

    def state_bytes(count: int) -> int:
        params = {"w": jax.ShapeDtypeStruct((count,), jnp.float32)}
        leaves = jax.tree.leaves(jax.eval_shape(tx.init, params))
        return sum(x.size * x.dtype.itemsize for x in leaves)

    assert (state_bytes(3000) - state_bytes(1000)) / 2000 == expected
    assert state_bytes(1000) - 1000 * expected < 32  # counters, and one ratio a layer


def test_masked_arrays_cost_no_anchor() -> None:
    tx = optax_spd.adam_spd(0.1, mask={"blocks": True, "head": False})
    state = tx.init(model())
    assert sum(x.nbytes for x in jax.tree.leaves(optax.tree.get(state, "anchor"))) == 4 * 6
