"""project(): against float64 NumPy, its properties as a projection, layouts, layers and inputs."""

import collections
import functools
from typing import Any

import ball_oracles
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.core import freeze
from hypothesis import given, settings, strategies as st
from jax_support import host_memory_works
from tpgm_steps import LAYERS, arrays

import optax_spd
from optax_spd import LayerSpec

both_norms = pytest.mark.parametrize("norm", ["l2", "mars"])
# Eager calls are tested with the input that they refuse; most of the time they would only compile.
project = jax.jit(optax_spd.project, static_argnames=("norm", "layers"))

# Where kernels of all kinds keep their output units and their layers.
LAYOUTS: dict[str, tuple[tuple[int, ...], LayerSpec]] = {
    "scalar": ((), LayerSpec()),
    "bias": ((5,), LayerSpec()),
    "bias, called an output": ((5,), LayerSpec(output_axes=(0,))),
    "dense": ((3, 4), LayerSpec()),
    "dense in torch": ((4, 3), LayerSpec(output_axes=(0,))),
    "conv HWIO": ((2, 2, 3, 4), LayerSpec()),
    "attention": ((4, 2, 3), LayerSpec(output_axes=(1, 2))),
    "stacked": ((3, 2, 4), LayerSpec(stacked_axes=(0,))),
    "stacked on axis 1": ((2, 3, 4), LayerSpec(stacked_axes=(1,))),
    "stacked biases": ((3, 4), LayerSpec(stacked_axes=(0,))),
    "stacked on two axes": ((2, 3, 2, 4), LayerSpec(stacked_axes=(0, 2))),
    "stacked attention": ((4, 2, 2, 3), LayerSpec(stacked_axes=(1,), output_axes=(-2, -1))),
}


def describe(path: str, array: Any) -> LayerSpec:
    return LAYOUTS[path][1]


def arrays_of_all(draw: np.random.Generator, grain: float = 0.0) -> dict[str, np.ndarray]:
    """An array of each layout. A coarse grain makes equal rows, and rows that have not moved."""
    rounded = lambda x: np.round(x / grain) * grain if grain else x
    return {name: rounded(draw.normal(size=shape)) for name, (shape, _) in LAYOUTS.items()}


def deviation(params: Any, anchor: Any, norm: str) -> ball_oracles.Balls:
    deltas = {name: np.asarray(x, np.float64) - anchor[name] for name, x in params.items()}
    return ball_oracles.Balls(deltas, norm, describe)


def radii_of(ball: ball_oracles.Balls, shares: Any) -> Any:
    """Radii as shares of each layer's norm, in the order of the layers."""
    largest = [ball.largest(name) for name in ball.members]
    return (np.asarray(shares, np.float64) * largest).astype(shares.dtype)


# Against NumPy, and what makes it a projection ---------------------------------------------------


@both_norms
def test_equals_numpy_in_every_layout(norm: str, x64: None) -> None:
    inside: collections.Counter[str] = collections.Counter()
    outside: collections.Counter[str] = collections.Counter()
    for seed in range(5):
        draw = np.random.default_rng(seed)
        params, anchor = arrays_of_all(draw), arrays_of_all(draw)
        ball = deviation(params, anchor, norm)
        assert [*ball.members] == optax_spd.layer_names(params, layers=describe)
        count = len(ball.members)
        radii = radii_of(ball, draw.uniform(0.1, 1.1, count) if seed else np.full(count, 1.1))
        by_name = dict(zip(ball.members, radii, strict=True))
        expected = ball_oracles.projected(params, anchor, by_name, norm, describe)
        result = project(params, anchor, radii, norm=norm, layers=describe)
        for layout, wanted in expected.items():
            # The documented 1e-8: what the denominator's 1e-8 moves a row by at most.
            np.testing.assert_allclose(result[layout], wanted, rtol=0, atol=1.01e-8)
        for name, radius in by_name.items():
            rows, layout = np.concatenate(ball.row_norms(name)), ball.members[name][0][0]
            inside[layout] += (rows < radius).sum()
            outside[layout] += (rows > radius).sum()
    for seen in (inside, outside):
        assert min(seen[layout] for layout in LAYOUTS) > 0, seen


@both_norms
def test_lands_inside_the_ball_and_stays_in_every_layout(norm: str) -> None:
    """What is inside keeps every bit; radius 0 gives the anchor, no bound the parameters."""
    kept = 0

    # With tenths θ₀ + (θ - θ₀) is not always θ.
    @settings(max_examples=15, deadline=None, derandomize=True)
    @given(st.integers(0, 2**16), st.sampled_from([1.0, 0.1, 2.0**-20]))
    def check(seed: int, grain: float) -> None:
        nonlocal kept
        draw = np.random.default_rng(seed)
        params, anchor = (jax.tree.map(np.float32, arrays_of_all(draw, grain)) for _ in range(2))
        before = deviation(params, anchor, norm)
        shares = draw.choice(np.float32([0.0, 0.3, 0.7, 1.0, 1.2]), len(before.members))
        radii = radii_of(before, shares)
        run = lambda params, radii: project(params, anchor, radii, norm=norm, layers=describe)
        once = run(params, radii)
        after = deviation(once, anchor, norm)
        for (name, ((layout, number),)), radius in zip(before.members.items(), radii, strict=True):
            # Each of up to 24 weights of a row is rounded at the size of θ.
            assert after.largest(name) <= radius * (1 + 1e-6) + 24 * 4 * 2.0**-23
            (norms,) = before.row_norms(name)
            inside = norms[:, 0] < radius * (1 - 1e-5)
            old, new = (
                ball_oracles.to_rows(tree[layout], LAYOUTS[layout][1])[0][number]
                for tree in (params, once)
            )
            np.testing.assert_array_equal(new[inside], old[inside])
            kept += int(inside.sum())
        same = functools.partial(np.testing.assert_allclose, rtol=0, atol=5e-6)
        jax.tree.map(same, run(once, radii), once)
        assert_equal(run(params, np.zeros_like(shares)), anchor)
        assert_equal(run(params, np.full_like(shares, np.inf)), params)

    check()
    assert kept > 0


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_row_on_the_surface_keeps_every_bit(dtype: Any, x64: None) -> None:
    # In float64 γ / (n + 1e-8) is below 1 there.
    params, anchor = {"w": np.array([3.0, 4.0], dtype)}, {"w": np.zeros(2, dtype)}
    for norm, radius in (("l2", 5.0), ("mars", 7.0)):
        result = project(params, anchor, radius, norm=norm)
        np.testing.assert_array_equal(result["w"], params["w"])


def numbers(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def close(actual: Any, expected: Any) -> None:
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


def assert_equal(actual: Any, expected: Any) -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


# Groups and radii --------------------------------------------------------------------------------


@both_norms
@pytest.mark.parametrize("layers", LAYERS)
def test_radii_are_one_per_layer_in_the_order_of_layer_names(layers: str, norm: str) -> None:
    params, anchor = arrays(0), arrays(1)
    names = optax_spd.layer_names(params, layers=LAYERS[layers])
    assert len(names) == {"per array": 5, "stacked": 7, "by module": 4, "torch": 5}[layers]
    radii = np.random.default_rng(3).uniform(0.2, 3, len(names))
    result = project(params, anchor, radii, norm=norm, layers=LAYERS[layers])
    by_name = dict(zip(names, radii, strict=True))
    expected = ball_oracles.projected(params, anchor, by_name, norm, LAYERS[layers])
    for path, array in expected.items():
        close(result[path], array)


@pytest.mark.parametrize("radius", [2, np.float64(2.0), np.array(2), jnp.bfloat16(2.0)], ids=repr)
def test_radii_may_be_any_kind_of_number(radius: Any) -> None:
    result = optax_spd.project(jnp.array([3.0, 5.0]), jnp.zeros(2), radius)
    np.testing.assert_allclose(result, [0.75, 1.25], rtol=1e-6)


# Under JAX's transformations ---------------------------------------------------------------------


@both_norms
@pytest.mark.parametrize("radius", [0.0, 1e-30, 1.0, np.inf])
@pytest.mark.parametrize("moved", [False, True])
def test_gradients_are_finite_everywhere(radius: float, moved: bool, norm: str) -> None:
    anchor = {"w": jnp.asarray(numbers(3, 4))}
    params = {"w": anchor["w"].at[:, 1:].add(0.5 if moved else 0.0)}  # unit 0 has not moved

    def score(params: Any, anchor: Any, radii: Any) -> jax.Array:
        return jnp.sum(optax_spd.project(params, anchor, radii, norm=norm)["w"] ** 2)

    gradients = jax.jit(jax.grad(score, argnums=(0, 1, 2)))(params, anchor, jnp.float32(radius))
    assert all(bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(gradients))


def test_a_radius_that_is_no_number_leaves_its_layer_alone() -> None:
    params = {"a": jnp.array([3.0, 4.0])}
    found = jax.jit(lambda r: optax_spd.project(params, {"a": jnp.zeros(2)}, r))(jnp.nan)
    np.testing.assert_array_equal(found["a"], params["a"])


# Dtypes, containers and what is no layer --------------------------------------------------------


def model(seed: int = 0) -> dict[str, dict[str, np.ndarray]]:
    return {
        "dense": {"bias": numbers(3, seed=seed), "kernel": numbers(4, 3, seed=seed + 1)},
        "head": {"kernel": numbers(3, 2, seed=seed + 2)},
    }


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


if host_memory_works():

    @pytest.mark.parametrize(("norm", "jitted"), [("l2", False), ("mars", True)])
    def test_an_anchor_in_host_memory_is_fetched(norm: str, jitted: bool) -> None:
        kind = jax.sharding.SingleDeviceSharding(jax.devices()[0], memory_kind="pinned_host")
        function = project if jitted else optax_spd.project
        result = function(model(), jax.device_put(model(seed=5), kind), 0.5, norm=norm)
        assert {x.sharding.memory_kind for x in jax.tree.leaves(result)} == {"device"}
        jax.tree.map(close, result, project(model(), model(seed=5), 0.5, norm=norm))


def test_the_result_has_the_containers_of_params() -> None:
    boxed = lambda tree: nnx.State(jax.tree.map(nnx.Param, tree))
    expected = project(model(), model(seed=5), 0.5)
    for coat, anchor_coat in ((freeze, boxed), (boxed, freeze)):
        result = project(coat(model()), anchor_coat(model(seed=5)), 0.5)
        assert_equal(result, coat(expected))


def test_what_is_no_layer_comes_back_as_the_same_object() -> None:
    others: dict[str, Any] = {
        "activation": jnp.tanh, "count": jnp.arange(3), "empty": jnp.ones((0, 4)),
        "flag": np.array(True), "left out": jnp.ones(2), "masked": optax.MaskedNode(),
        "name": "model", "none": None, "rate": 0.5, "training": False,
    }  # fmt: skip
    mask = {name: name != "left out" for name in (*others, "weight")}
    for theirs in (others, dict.fromkeys(others)):
        params, anchor = {"weight": jnp.full(2, 3.0)}, {"weight": jnp.zeros(2)}
        result = optax_spd.project(params | others, anchor | theirs, [2.0], mask=mask)
        np.testing.assert_array_equal(result["weight"], [1.0, 1.0])
        assert all(result[name] is value for name, value in others.items())
    model = {"activation": jnp.tanh, "name": "model", "rate": 0.5, "training": False}
    assert optax_spd.project(params | model, anchor, [2.0]).keys() == params.keys() | model


@pytest.mark.parametrize("params", [{}, {"none": None}, {"count": np.arange(3)}], ids=repr)
def test_a_tree_without_layers_comes_back(params: Any) -> None:
    assert_equal(optax_spd.project(params, params, 1.0), params)
    assert_equal(optax_spd.project(params, params, np.zeros(0)), params)


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


@pytest.mark.parametrize("shape", [(2,), (1,), (3, 1)])
def test_radii_of_another_number_are_refused(shape: tuple[int, ...]) -> None:
    message = "radii must be a scalar or hold one value for each of the 3 layers"
    with pytest.raises(ValueError, match=message) as error:
        call(radii=np.ones(shape))
    assert str(shape) in str(error.value)
    with pytest.raises(ValueError, match="radii must not be negative or NaN"):
        call(radii=-1.0)
    with pytest.raises(ValueError, match="norm must be"):
        call(norm="linf")


def test_trees_that_do_not_match_are_refused_unless_masked() -> None:
    lacking = {"dense": model()["dense"]}
    other = model() | {"head": {"kernel": np.ones((2, 3))}}
    for anchor, message in (
        (lacking, r"anchor does not match params: .*'head/kernel'"),
        (other, r"'head/kernel': anchor has shape \(2, 3\), params has shape \(3, 2\)"),
        (model() | {"head": {"kernel": None}}, "anchor is None at 'head/kernel'"),
    ):
        with pytest.raises(ValueError, match=message):
            call(anchor=anchor)
        result = call(anchor=anchor, mask=optax_spd.path_mask("dense"))
        assert_equal(result["head"], model()["head"])
    with pytest.raises(ValueError, match="'more/kernel'"):
        call(anchor=model() | {"more": {"kernel": np.ones(2)}})


def test_complex_arrays_are_refused() -> None:
    sick = model() | {"head": {"kernel": np.ones((3, 2), np.complex64)}}
    with pytest.raises(TypeError, match=r"'head/kernel' is complex.*split_real_and_imaginary"):
        call(params=sick)
    with pytest.raises(TypeError, match="anchor is complex at 'head/kernel'"):
        call(anchor=sick)
    mask = optax_spd.path_mask("dense")
    assert_equal(call(params=sick, anchor=sick, mask=mask)["head"], sick["head"])


@pytest.mark.parametrize("size", [1e-2, 1e18, 1e19, 1e30, 3e38])
def test_a_finite_deviation_of_any_size_lands_in_the_l2_ball(size: float) -> None:
    direction = np.array([0.6, -0.8, 0.0], np.float32)
    params = {"w": np.float32(size) * direction}
    anchor = {"w": np.zeros(3, np.float32)}
    found = optax_spd.project(params, anchor, size / 4, norm="l2")["w"]
    np.testing.assert_allclose(found, size / 4 * direction, rtol=1e-5)


def test_norms_in_a_tree_of_two_dtypes(x64: None) -> None:
    params = {"a": jnp.array([3e30, 4e30], jnp.float32), "b": jnp.array([3e200, 4e200])}
    found = optax_spd.project(params, jax.tree.map(jnp.zeros_like, params), 1.0, norm="l2")
    for projected in found.values():
        np.testing.assert_allclose(projected, [0.6, 0.8], rtol=1e-6)
    assert {str(x.dtype) for x in found.values()} == {"float32", "float64"}
