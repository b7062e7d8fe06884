"""WiSE-FT: exact at both ends, linear in between, and a tree like params whatever comes in."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax_support import host_memory_works

import optax_spd


def pair() -> tuple[Any, Any]:
    """Parameters whose magnitudes differ so much that θ₀ + α(θ - θ₀) would not return θ."""
    draw = np.random.default_rng(0)
    params = {
        "bias": draw.normal(size=4).astype(np.float32),
        "blocks": draw.normal(size=(2, 3)).astype(np.float32),
    }
    anchor = jax.tree.map(lambda x: (1e6 * draw.normal(size=x.shape)).astype(np.float32), params)
    return params, anchor


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_both_ends_are_exact(dtype: Any) -> None:
    params, anchor = jax.tree.map(lambda x: jnp.asarray(x * 1e-2, dtype), pair())
    for alpha, end in ((0.0, anchor), (1.0, params), (0, anchor), (np.float32(1), params)):
        blended = optax_spd.wise_ft(params, anchor, alpha)
        jax.tree.map(np.testing.assert_array_equal, blended, end)
        assert {x.dtype for x in jax.tree.leaves(blended)} == {jnp.dtype(dtype)}


@pytest.mark.parametrize("alpha", [0.25, 0.9, -0.5, 1.5])
def test_it_interpolates_and_extrapolates_linearly(alpha: float) -> None:
    params, anchor = pair()
    blended = optax_spd.wise_ft(params, anchor, alpha)
    for name, theta in params.items():
        expected = (1 - alpha) * anchor[name].astype(np.float64) + alpha * theta.astype(np.float64)
        np.testing.assert_allclose(blended[name], expected, rtol=1e-5)


def test_alpha_per_layer_follows_layer_names() -> None:
    params, anchor = pair()
    layers = optax_spd.stacked("blocks")
    assert optax_spd.layer_names(params, layers=layers) == ["bias", "blocks[0]", "blocks[1]"]
    blended = optax_spd.wise_ft(params, anchor, [1.0, 0.0, 0.5], layers=layers)
    np.testing.assert_array_equal(blended["bias"], params["bias"])
    np.testing.assert_array_equal(blended["blocks"][0], anchor["blocks"][0])
    middle = (anchor["blocks"][1].astype(np.float64) + params["blocks"][1]) / 2
    np.testing.assert_allclose(blended["blocks"][1], middle, rtol=1e-6)


def test_the_arithmetic_of_halves_is_in_float32_and_the_result_in_the_dtype_of_params() -> None:
    # In bfloat16 1 - α rounds to 1, an error of one digit of the result.
    params = {"a": jnp.full(3, -384.0, jnp.bfloat16), "b": jnp.ones(2, jnp.float16)}
    anchor = {"a": np.ones(3, np.float32), "b": np.zeros(2, np.float32)}
    blended = optax_spd.wise_ft(params, anchor, 0.0019)
    assert blended["a"].dtype == jnp.bfloat16
    assert blended["b"].dtype == jnp.float16
    exact = (1 - 0.0019) - 0.0019 * 384
    np.testing.assert_array_equal(blended["a"], jnp.full(3, exact, jnp.bfloat16))
    np.testing.assert_array_equal(blended["b"], jnp.full(2, 0.0019, jnp.float16))


def test_containers_and_boxes_of_the_two_trees_may_differ() -> None:
    params, anchor = pair()
    state = nnx.State(jax.tree.map(nnx.Param, params))
    boxed = jax.tree.map(lambda x: nn.Partitioned(x, names=(None,) * x.ndim), anchor)
    blended = optax_spd.wise_ft(state, boxed, 0.0)
    assert jax.tree.structure(blended) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, nnx.to_pure_dict(blended), anchor)


if host_memory_works():

    def test_an_anchor_in_host_memory_is_fetched() -> None:
        params, anchor = pair()
        kind = jax.sharding.SingleDeviceSharding(jax.devices()[0], memory_kind="pinned_host")
        blended = jax.jit(optax_spd.wise_ft)(params, jax.device_put(anchor, kind), 0.25)
        expected = jax.jit(optax_spd.wise_ft)(params, anchor, 0.25)
        jax.tree.map(np.testing.assert_array_equal, blended, expected)
        assert {x.sharding.memory_kind for x in jax.tree.leaves(blended)} == {"device"}


BIAS = {"bias": np.ones(5)}


@pytest.mark.parametrize(
    ("anchor", "alpha", "options", "error", "message"),
    [
        ({}, np.nan, {}, ValueError, "alpha must be finite"),
        ({}, [0.5, np.inf], {}, ValueError, "alpha must be finite"),
        ({}, np.ones(1), {}, ValueError, r"each of the 2 layers .*got shape \(1,\)"),
        ({}, np.ones((2, 1)), {}, ValueError, r"each of the 2 layers .*got shape \(2, 1\)"),
        (BIAS, 0.5, {}, ValueError, r"at 'bias': anchor has shape \(5,\)"),
        # No value to blend with is no value: not a silent α = 1.
        ({"bias": None}, 0.5, {}, ValueError, "anchor is None at 'bias'"),
        ({"bias": optax.MaskedNode()}, 0.5, {}, ValueError, r"anchor is Masked.* at 'bias'"),
        ({"bias": np.ones(4) * 1j}, 0.5, {}, TypeError, "complex"),
        ({}, 0.5, {"layers": "blocks"}, TypeError, "layers must be a function"),
    ],
)
def test_wrong_input_is_refused(
    anchor: Any, alpha: Any, options: Any, error: type[Exception], message: str
) -> None:
    params, whole = pair()
    with pytest.raises(error, match=message):
        optax_spd.wise_ft(params, whole | anchor, alpha, **options)


@pytest.mark.parametrize("sick", [np.inf, -np.inf, np.nan])
def test_the_ends_are_exact_to_the_bit_whatever_the_other_side_holds(sick: float) -> None:
    healthy = np.array([[-0.0, 1.0], [2.0, 3.0]], np.float32)
    ill = np.full((2, 2), sick, np.float32)
    for params, anchor, alpha in ((ill, healthy, 0.0), (healthy, ill, 1.0)):
        found = optax_spd.wise_ft({"w": params}, {"w": anchor}, alpha)["w"]
        np.testing.assert_array_equal(np.asarray(found).view(np.int32), healthy.view(np.int32))
    rows = optax_spd.wise_ft(
        {"w": np.stack([ill, healthy])},
        {"w": np.stack([healthy, ill])},
        [0.0, 1.0],
        layers=optax_spd.stacked("w"),
    )["w"]
    bits = np.stack([healthy, healthy]).view(np.int32)
    np.testing.assert_array_equal(np.asarray(rows).view(np.int32), bits)


def test_the_derivatives_at_the_ends_are_those_of_the_formula() -> None:
    params, anchor = pair()
    blend = lambda p, a, alpha: jax.tree.reduce(
        lambda total, x: total + x.sum(), optax_spd.wise_ft(p, a, alpha), jnp.zeros(())
    )
    with jax.numpy_dtype_promotion("strict"):
        for alpha in (0.0, 0.25, 1.0):
            of_params, of_anchor, of_alpha = jax.grad(blend, (0, 1, 2))(params, anchor, alpha)
            differences = jax.tree.map(lambda p, a: (p - a).sum(), params, anchor)
            np.testing.assert_allclose(of_alpha, sum(jax.tree.leaves(differences)), rtol=1e-5)
            for x in jax.tree.leaves(of_params):
                np.testing.assert_array_equal(x, np.float32(alpha))
            for x in jax.tree.leaves(of_anchor):
                np.testing.assert_array_equal(x, np.float32(1 - alpha))


def test_what_is_no_layer_stays_as_it_is_whatever_the_anchor_holds() -> None:
    params, anchor = pair()
    others: dict[str, Any] = {
        "activation": jnp.tanh, "name": "model", "rate": 0.5, "training": False,
        "count": np.arange(3), "empty": np.ones((0, 2)), "none": None,
    }  # fmt: skip
    expected = optax_spd.wise_ft(params, anchor, [0.25, 0.5])
    for theirs in (dict.fromkeys(others), others, others | {"count": np.ones(3, int)}):
        found = optax_spd.wise_ft(params | others, anchor | theirs, [0.25, 0.5])
        assert all(found[key] is value for key, value in others.items())
        for key, blended in expected.items():
            np.testing.assert_array_equal(found[key], blended)
    settings = {key: others[key] for key in ("activation", "name", "rate", "training")}
    assert optax_spd.wise_ft(params | settings, anchor, 0.5).keys() == params.keys() | settings
