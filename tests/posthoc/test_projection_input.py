"""What project() makes of other dtypes, containers and gaps, of sick layers, and of wrong input."""

import re
from typing import Any

import ball_oracles
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.core import FrozenDict, freeze

import optax_spd

both_norms = pytest.mark.parametrize("norm", ["l2", "mars"])
project = jax.jit(optax_spd.project, static_argnames=("norm", "layers"))


def numbers(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def model(seed: int = 0) -> dict[str, dict[str, np.ndarray]]:
    return {
        "dense": {"bias": numbers(3, seed=seed), "kernel": numbers(4, 3, seed=seed + 1)},
        "head": {"kernel": numbers(3, 2, seed=seed + 2)},
    }


def assert_equal(actual: Any, expected: Any) -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


# Dtypes ------------------------------------------------------------------------------------------


@both_norms
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_is_projected_in_float32(dtype: Any, norm: str) -> None:
    params, anchor = (jnp.asarray(numbers(300, 4, seed=s), dtype) for s in (0, 1))
    delta = np.asarray(params, np.float64) - np.asarray(anchor, np.float64)
    radius = 0.9 * ball_oracles.Balls({"w": delta}, norm).largest("w")
    result = project({"w": params}, {"w": anchor}, radius, norm=norm)["w"]
    assert result.dtype == dtype
    expected = ball_oracles.projected({"w": params}, {"w": anchor}, {"w": radius}, norm)["w"]
    assert np.max(np.abs(expected - np.asarray(params, float))) > 0.05
    # Rounded once, at the end; a sum of 300 terms in the half type would be off by per cents.
    half_ulp = float(jnp.finfo(dtype).eps) / 2
    np.testing.assert_allclose(
        np.asarray(result, np.float64), expected, rtol=1.01 * half_ulp, atol=1e-6
    )


def test_an_anchor_of_another_dtype_is_used_as_it_is() -> None:
    params = jnp.asarray(numbers(4), jnp.bfloat16)
    anchor = numbers(4, seed=1)
    np.testing.assert_array_equal(project(params, anchor, 0.0), anchor.astype(jnp.bfloat16))
    narrow = jnp.asarray(anchor, jnp.bfloat16)
    result = project(numbers(4), narrow, 0.0)
    assert result.dtype == jnp.float32
    np.testing.assert_array_equal(result, np.asarray(narrow, np.float32))


def test_radii_keep_float64_for_float64_layers_only(x64: None) -> None:
    params = {"narrow": numbers(4), "wide": numbers(4, seed=1).astype(np.float64)}
    anchor = jax.tree.map(np.zeros_like, params)
    radii = np.array([1 / 3, 1 / 3])
    result = project(params, anchor, radii, norm="l2")
    assert {k: x.dtype for k, x in result.items()} == {"narrow": np.float32, "wide": np.float64}
    np.testing.assert_allclose(np.linalg.norm(result["wide"]), 1 / 3, rtol=0, atol=1.01e-8)
    np.testing.assert_allclose(np.linalg.norm(result["narrow"]), 1 / 3, rtol=1e-6)


# Containers and gaps -----------------------------------------------------------------------------


def as_state(tree: Any) -> nnx.State:
    return nnx.State(jax.tree.map(nnx.Param, tree))


COATS: dict[str, Any] = {"dict": lambda tree: tree, "FrozenDict": freeze, "nnx.State": as_state}


@pytest.mark.parametrize("anchor_coat", COATS)
@pytest.mark.parametrize("coat", COATS)
def test_the_result_has_the_containers_of_params(coat: str, anchor_coat: str) -> None:
    params = COATS[coat](model())
    result = project(params, COATS[anchor_coat](model(seed=5)), 0.5)
    expected = project(model(), model(seed=5), 0.5)
    assert type(result) is {"dict": dict, "FrozenDict": FrozenDict, "nnx.State": nnx.State}[coat]
    assert_equal(result, COATS[coat](expected))


def test_what_is_no_layer_comes_back_as_the_same_object() -> None:
    params: dict[str, Any] = {
        "count": jnp.arange(3),
        "empty": jnp.ones((0, 4)),
        "flag": np.array(True),
        "left out": jnp.ones(2),
        "masked": optax.MaskedNode(),
        "none": None,
        "weight": jnp.full(2, 3.0),
    }
    anchor = params | {"weight": jnp.zeros(2), "left out": None, "count": None}
    mask = {name: name != "left out" for name in params}
    result = optax_spd.project(params, anchor, [2.0], mask=mask)
    np.testing.assert_array_equal(result["weight"], [1.0, 1.0])
    for name in params.keys() - {"weight"}:
        assert result[name] is params[name], name


@pytest.mark.parametrize("params", [{}, {"none": None}, {"count": np.arange(3)}], ids=repr)
def test_a_tree_without_layers_comes_back(params: Any) -> None:
    assert_equal(optax_spd.project(params, params, 1.0), params)
    assert_equal(optax_spd.project(params, params, np.zeros(0)), params)


# Sick layers -------------------------------------------------------------------------------------


@both_norms
@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["params", "anchor", "both"])
def test_a_layer_that_is_not_finite_passes_through(where: str, poison: float, norm: str) -> None:
    params, anchor = model(), model(seed=5)
    healthy = project(params, anchor, 0.5, norm=norm)
    if where != "anchor":
        params["dense"]["kernel"][1, 2] = poison
    if where != "params":
        anchor["dense"]["kernel"][1, 2] = poison
    result = project(params, anchor, 0.5, norm=norm)
    np.testing.assert_array_equal(result["dense"]["kernel"], params["dense"]["kernel"])
    np.testing.assert_array_equal(result["dense"]["bias"], healthy["dense"]["bias"])
    assert_equal(result["head"], healthy["head"])
    assert not np.array_equal(healthy["head"]["kernel"], params["head"]["kernel"])


# What is refused ---------------------------------------------------------------------------------


def call(params: Any = None, anchor: Any = None, radii: Any = 1.0, **options: Any) -> Any:
    params = model() if params is None else params
    return optax_spd.project(params, model() if anchor is None else anchor, radii, **options)


@pytest.mark.parametrize("norm", ["L2", "MARS", "linf", None, 2, ("l2",)], ids=repr)
def test_an_unknown_norm_is_refused(norm: Any) -> None:
    message = f"norm must be 'l2' or 'mars', got {norm!r}"
    with pytest.raises(ValueError, match=re.escape(message)):
        call(norm=norm)


@pytest.mark.parametrize(
    "radii", [-1.0, np.nan, -np.inf, [1.0, -1e-9, 1.0], jnp.array([1.0, 1.0, jnp.nan])], ids=repr
)
def test_radii_that_are_negative_or_nan_are_refused(radii: Any) -> None:
    with pytest.raises(ValueError, match="radii must not be negative or NaN, got"):
        call(radii=radii)


@pytest.mark.parametrize("radii", ["1", None, 1j, {"a": 1.0}, True], ids=repr)
def test_radii_that_are_no_numbers_are_refused(radii: Any) -> None:
    with pytest.raises(TypeError, match="radii"):
        call(radii=radii)


@pytest.mark.parametrize("shape", [(2,), (4,), (1,), (3, 1), (0,)])
def test_radii_of_another_number_are_refused(shape: tuple[int, ...]) -> None:
    message = "radii must be a scalar or hold one value for each of the 3 layers"
    for run in (call, jax.jit(lambda radii: call(radii=radii))):
        with pytest.raises(ValueError, match=message) as error:
            run(radii=np.ones(shape))
        assert str(shape) in str(error.value)


def test_trees_that_do_not_match_are_refused() -> None:
    other = model()
    del other["head"]
    with pytest.raises(ValueError, match=r"anchor does not match params: .*'head/kernel'"):
        call(anchor=other)
    other = model() | {"more": {"kernel": np.ones(2)}}
    with pytest.raises(ValueError, match="'more/kernel'"):
        call(anchor=other)
    other = model() | {"head": {"kernel": np.ones((2, 3))}}
    with pytest.raises(ValueError, match=r"'head/kernel': anchor has shape \(2, 3\)") as error:
        call(anchor=other)
    assert "(3, 2)" in str(error.value)
    with pytest.raises(ValueError, match="anchor is None at 'head/kernel'"):
        call(anchor=model() | {"head": {"kernel": None}})


def test_complex_arrays_are_refused() -> None:
    sick = model() | {"head": {"kernel": np.ones((3, 2), np.complex64)}}
    with pytest.raises(TypeError, match=r"'head/kernel' is complex.*split_real_and_imaginary"):
        call(params=sick)
    with pytest.raises(TypeError, match="anchor is complex at 'head/kernel'"):
        call(anchor=sick)
    mask = optax_spd.path_mask("dense")
    assert_equal(call(params=sick, anchor=sick, mask=mask)["head"], sick["head"])
