"""project(): against float64 NumPy, its properties as a projection, layouts and layers."""

import functools
from collections.abc import Callable
from typing import Any

import ball_oracles
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

import optax_spd
from optax_spd import LayerSpec
from optax_spd.core.balls import ball_factor

both_norms = pytest.mark.parametrize("norm", ["l2", "mars"])
# Eager calls are tested with the input that they refuse; most of the time they would only compile.
project = jax.jit(optax_spd.project, static_argnames=("norm", "layers"))
EXAMPLES = settings(max_examples=15, deadline=None, derandomize=True)

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
every_layout = pytest.mark.parametrize("layout", LAYOUTS)


@functools.cache
def describe(layout: str) -> Any:
    return lambda path, array: LAYOUTS[layout][1]


def projection(layout: str, norm: str) -> Callable[..., Any]:
    return functools.partial(project, norm=norm, layers=describe(layout))


def on_arrays(layout: str) -> Callable[..., Any]:
    """Runs a check on (params, anchor, one share of the largest norm per layer)."""
    shape, spec = LAYOUTS[layout]
    count = int(np.prod([shape[a] for a in spec.stacked_axes]))

    def run(check: Callable[..., None]) -> None:
        # A coarse grain makes equal rows, rows that have not moved, and rows on the surface.
        @EXAMPLES
        @given(st.integers(0, 2**16), st.sampled_from([1.0, 0.25, 2.0**-20]))
        def on_example(seed: int, grain: float) -> None:
            draw = np.random.default_rng(seed)
            arrays = (np.round(draw.normal(size=shape) / grain) * grain for _ in range(2))
            shares = draw.choice([0.0, 0.3, 0.7, 1.0, 1.2], count)
            check(*(np.asarray(x, np.float32) for x in (*arrays, shares)))

        on_example()

    return run


def deviation(params: Any, anchor: Any, layout: str, norm: str) -> ball_oracles.Balls:
    delta = np.asarray(params, np.float64) - np.asarray(anchor, np.float64)
    return ball_oracles.Balls({"w": delta}, norm, describe(layout))


def radii_of(ball: ball_oracles.Balls, shares: Any) -> Any:
    """Radii as shares of each layer's norm."""
    largest = [ball.largest(name) for name in ball.members]
    return (np.asarray(shares, np.float64) * largest).astype(shares.dtype)


# Against NumPy, and what makes it a projection ---------------------------------------------------


@both_norms
@every_layout
def test_equals_numpy(layout: str, norm: str, x64: None) -> None:
    shape, spec = LAYOUTS[layout]
    count = int(np.prod([shape[a] for a in spec.stacked_axes]))
    inside = outside = 0
    for seed in range(5):
        draw = np.random.default_rng(seed)
        params, anchor = draw.normal(size=shape), draw.normal(size=shape)
        ball = deviation(params, anchor, layout, norm)
        radii = radii_of(ball, draw.uniform(0.1, 1.1, count) if seed else np.full(count, 1.1))
        by_name = dict(zip(ball.members, radii, strict=True))
        expected = ball_oracles.projected(
            {"w": params}, {"w": anchor}, by_name, norm, describe(layout)
        )
        result = projection(layout, norm)({"w": params}, {"w": anchor}, radii)["w"]
        # The documented 1e-8: what the denominator's 1e-8 moves a row by at most.
        np.testing.assert_allclose(result, expected["w"], rtol=0, atol=1.01e-8)
        for name, radius in by_name.items():
            rows = np.concatenate(ball.row_norms(name))
            inside, outside = inside + (rows < radius).sum(), outside + (rows > radius).sum()
    assert inside > 0
    assert outside > 0


@both_norms
@every_layout
def test_lands_inside_the_ball_and_stays(layout: str, norm: str) -> None:
    def check(params: np.ndarray, anchor: np.ndarray, shares: np.ndarray) -> None:
        radii = radii_of(deviation(params, anchor, layout, norm), shares)
        once = projection(layout, norm)({"w": params}, {"w": anchor}, radii)
        ball = deviation(once["w"], anchor, layout, norm)
        for name, radius in zip(ball.members, radii, strict=True):
            # Each of up to 24 weights of a row is rounded at the size of θ.
            assert ball.largest(name) <= radius * (1 + 1e-6) + 24 * 4 * 2.0**-23
        twice = projection(layout, norm)(once, {"w": anchor}, radii)
        np.testing.assert_allclose(twice["w"], once["w"], rtol=0, atol=5e-6)

    on_arrays(layout)(check)


@both_norms
@every_layout
def test_rows_inside_the_ball_keep_every_bit(layout: str, norm: str) -> None:
    kept = 0

    def check(params: np.ndarray, anchor: np.ndarray, shares: np.ndarray) -> None:
        nonlocal kept
        ball = deviation(params, anchor, layout, norm)
        radii = radii_of(ball, shares)
        result = projection(layout, norm)({"w": params}, {"w": anchor}, radii)["w"]
        before, _ = ball_oracles.to_rows(params, LAYOUTS[layout][1])
        after, _ = ball_oracles.to_rows(result, LAYOUTS[layout][1])
        for number, (name, radius) in enumerate(zip(ball.members, radii, strict=True)):
            (norms,) = ball.row_norms(name)
            inside = norms[:, 0] < radius * (1 - 1e-5)
            np.testing.assert_array_equal(after[number][inside], before[number][inside])
            kept += inside.sum()

    on_arrays(layout)(check)
    assert kept > 0


def test_a_row_on_the_surface_keeps_every_bit() -> None:
    params, anchor = {"w": jnp.array([3.0, 4.0])}, {"w": jnp.zeros(2)}
    for norm, radius in (("l2", 5.0), ("mars", 7.0)):
        result = project(params, anchor, radius, norm=norm)
        np.testing.assert_array_equal(result["w"], params["w"])


# Layouts -----------------------------------------------------------------------------------------

TRANSPOSED = {
    "dense": (1, 0),
    "conv HWIO": (3, 2, 0, 1),  # OIHW
    "attention": (1, 2, 0),
}


def numbers(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def pair(layout: str) -> tuple[jax.Array, jax.Array]:
    shape = LAYOUTS[layout][0]
    return numbers(*shape), numbers(*shape, seed=1)


def close(actual: Any, expected: Any) -> None:
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


@both_norms
@pytest.mark.parametrize("layout", TRANSPOSED)
def test_torch_layout_gives_the_same_numbers(layout: str, norm: str) -> None:
    order = TRANSPOSED[layout]
    params, anchor = pair(layout)
    units = (0, 1) if layout == "attention" else 0
    expected = projection(layout, norm)(params, anchor, 2.5)
    assert not np.array_equal(expected, params)
    turned = project(
        params.transpose(order),
        anchor.transpose(order),
        2.5,
        norm=norm,
        layers=optax_spd.outputs(".*", units),
    )
    close(turned, expected.transpose(order))


def test_the_layout_matters_to_mars_and_not_to_l2() -> None:
    # Without a right layers= the numbers are others, which is why the tests above mean something.
    params, anchor = pair("conv HWIO")
    as_torch = optax_spd.outputs(".*", 0)
    for norm, same in (("l2", True), ("mars", False)):
        right = projection("conv HWIO", norm)(params, anchor, 2.0)
        other = project(params, anchor, 2.0, norm=norm, layers=as_torch)
        assert np.allclose(other, right, atol=1e-6) == same


@both_norms
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name.startswith("stacked")])
def test_stacked_layers_are_projected_one_by_one(layout: str, norm: str) -> None:
    params, anchor = pair(layout)
    axes = tuple(LAYOUTS[layout][1].stacked_axes)
    sizes = [params.shape[a] for a in axes]
    radii = np.linspace(0.5, 3.0, int(np.prod(sizes))).astype(np.float32)
    stacked = projection(layout, norm)(params, anchor, radii)
    # Slices of attention kernels still have two output axes, the last.
    units = optax_spd.outputs(".*", (-2, -1)) if layout == "stacked attention" else None
    for number, index in enumerate(np.ndindex(*sizes)):
        at = [slice(None)] * params.ndim
        for axis, i in zip(axes, index, strict=True):
            at[axis] = i
        alone = project(
            params[tuple(at)], anchor[tuple(at)], radii[number], norm=norm, layers=units
        )
        close(stacked[tuple(at)], alone)


@both_norms
@pytest.mark.parametrize("ranks", [(), (4,)])
def test_an_array_of_rank_0_or_1_is_one_row(ranks: tuple[int, ...], norm: str) -> None:
    params, anchor = numbers(*ranks), numbers(*ranks, seed=1)
    as_column = lambda x: x.reshape(-1, 1)  # one output unit
    result = project(params, anchor, 0.2, norm=norm)
    column = project(as_column(params), as_column(anchor), 0.2, norm=norm)
    close(as_column(result), column)
    size = np.abs(np.asarray(result) - np.asarray(anchor)).ravel()
    close(size.sum() if norm == "mars" else np.linalg.norm(size), 0.2)


# Groups and radii --------------------------------------------------------------------------------


def network() -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    shapes = {
        "blocks/bias": (2, 4),
        "blocks/kernel": (2, 3, 4),
        "dense/bias": (4,),
        "dense/kernel": (3, 4),
        "scale": (),
    }
    params = {p: numbers(*s, seed=i) for i, (p, s) in enumerate(shapes.items())}
    return params, {p: numbers(*s, seed=i + 50) for i, (p, s) in enumerate(shapes.items())}


NETWORK_LAYERS: dict[str, Any] = {
    "per array": None,
    "stacked": optax_spd.stacked("^blocks/"),
    "by module": optax_spd.by_module(layers=optax_spd.stacked("^blocks/")),
}


@both_norms
@pytest.mark.parametrize("layers", NETWORK_LAYERS)
def test_radii_are_one_per_layer_in_the_order_of_layer_names(layers: str, norm: str) -> None:
    params, anchor = network()
    names = optax_spd.layer_names(params, layers=NETWORK_LAYERS[layers])
    assert len(names) == {"per array": 5, "stacked": 7, "by module": 4}[layers]
    radii = np.random.default_rng(3).uniform(0.2, 3, len(names))
    result = project(params, anchor, radii, norm=norm, layers=NETWORK_LAYERS[layers])
    by_name = dict(zip(names, radii, strict=True))
    expected = ball_oracles.projected(params, anchor, by_name, norm, NETWORK_LAYERS[layers])
    for path, array in expected.items():
        close(result[path], array)


def test_a_group_shares_the_radius_and_each_array_keeps_its_rows() -> None:
    params = {"dense": {"bias": jnp.array([3.0, 0.0]), "kernel": jnp.array([[4.0, 1.0]])}}
    anchor = jax.tree.map(jnp.zeros_like, params)
    layers = optax_spd.by_module()
    mars = project(params, anchor, 2.0, norm="mars", layers=layers)
    l2 = project(params, anchor, 2.0, norm="l2", layers=layers)
    close(mars["dense"]["bias"], [2.0, 0.0])
    close(mars["dense"]["kernel"], [[2.0, 1.0]])
    factor = 2 / np.sqrt(3**2 + 4**2 + 1)  # one norm of all
    jax.tree.map(lambda new, old: close(new, factor * old), l2, params)


@pytest.mark.parametrize("radius", [2, np.float64(2.0), np.array(2), jnp.bfloat16(2.0)], ids=repr)
def test_radii_may_be_any_kind_of_number(radius: Any) -> None:
    result = optax_spd.project(jnp.array([3.0, 5.0]), jnp.zeros(2), radius)
    np.testing.assert_allclose(result, [0.75, 1.25], rtol=1e-6)


# Under JAX's transformations ---------------------------------------------------------------------


@both_norms
def test_gradient_in_the_radii_is_that_of_the_factor(norm: str, x64: None) -> None:
    params, anchor = network()
    params, anchor = ({p: np.asarray(x, float) for p, x in t.items()} for t in (params, anchor))
    weights = {path: np.cos(np.arange(x.size)).reshape(x.shape) for path, x in params.items()}

    def score(radii: jax.Array) -> Any:
        result = optax_spd.project(params, anchor, radii, norm=norm)
        return sum(jnp.sum(weights[path] * x) for path, x in result.items())

    deltas = {path: params[path] - anchor[path] for path in params}
    ball = ball_oracles.Balls(deltas, norm)
    radii = {name: 0.6 * ball.largest(name) for name in ball.members}
    gradient = jax.jit(jax.grad(score))(jnp.asarray(list(radii.values())))
    expected = ball.radius_gradient(radii, weights)
    np.testing.assert_allclose(gradient, list(expected.values()), rtol=1e-6)


@both_norms
@pytest.mark.parametrize("radius", [0.0, 1e-30, 1.0, np.inf])
@pytest.mark.parametrize("moved", [False, True])
def test_gradients_are_finite_everywhere(radius: float, moved: bool, norm: str) -> None:
    anchor = {"w": numbers(3, 4)}
    params = {"w": anchor["w"].at[:, 1:].add(0.5 if moved else 0.0)}  # unit 0 has not moved

    def score(params: Any, anchor: Any, radii: Any) -> jax.Array:
        return jnp.sum(optax_spd.project(params, anchor, radii, norm=norm)["w"] ** 2)

    gradients = jax.jit(jax.grad(score, argnums=(0, 1, 2)))(params, anchor, jnp.float32(radius))
    assert all(bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(gradients))


def test_the_factor_has_no_slope_where_it_is_clipped() -> None:
    """Not even at the ends, where jnp.clip's slope is 1/2."""
    radii = jnp.array([-1.0, 0.0, 0.25, 1.0, 2.0, jnp.inf])
    one = jnp.ones(())
    np.testing.assert_array_equal(ball_factor(radii, one), [0, 0, 0.25, 1, 1, 1])
    slopes = [jax.vmap(jax.grad(ball_factor, i), (0, None))(radii, one) for i in (0, 1)]
    np.testing.assert_array_equal(slopes[0], [0, 0, 1, 0, 0, 0])
    np.testing.assert_array_equal(slopes[1], [0, 0, -0.25, 0, 0, 0])


def test_a_radius_that_is_no_number_leaves_its_layer_alone() -> None:
    params = {"a": jnp.array([3.0, 4.0])}
    found = jax.jit(lambda r: optax_spd.project(params, {"a": jnp.zeros(2)}, r))(jnp.nan)
    np.testing.assert_array_equal(found["a"], params["a"])
