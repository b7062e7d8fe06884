"""Sums in one pass over an array: against float64 NumPy, their derivatives, and where they apply.

These tests run with eight virtual devices, where the library takes plain sums. That there is a
single one is pretended here; test_recipes.py starts a process where it is so.
"""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from jax_support import primitives

import optax_spd
from optax_spd.core import one_pass, sums
from optax_spd.layers import plans, trees


@contextlib.contextmanager
def one_device() -> Iterator[None]:
    """Pretends that there is one CPU device, for what is traced inside."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(one_pass, "cpu_devices", lambda: 1)
        yield


def normal(shape: tuple[int, ...], seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


# Shape and stacked axes: pieces of one dimension, of several, no pieces, and the largest piece.
SUMS: list[tuple[tuple[int, ...], tuple[int, ...]]] = [
    ((), ()),
    ((127,), ()),
    ((4096,), ()),
    ((7,), (0,)),
    ((128, 67), ()),
    ((30, 4), (1,)),
    ((3, 40), (0, 1)),
    ((2, 3, 32), (1,)),
    ((2, 3, 32), (0, 2)),
    ((3, 2, 4, 5), (1, 2)),
]


def test_sums_equal_numpy_in_float64() -> None:
    terms = [
        tuple(normal(shape, seed) for seed in range(2 + i % 3)) for i, (shape, _) in enumerate(SUMS)
    ]
    axes = [stacked for _, stacked in SUMS]
    found = jax.jit(lambda terms: list(map(one_pass.sums, terms, axes)))(terms)
    for (shape, stacked), arrays, result in zip(SUMS, terms, found, strict=True):
        over = tuple(a for a in range(len(shape)) if a not in stacked)
        assert result.dtype == np.float32
        assert result.shape == (len(arrays), *(shape[a] for a in stacked))
        for numbers, term in zip(result, arrays, strict=True):
            rounding = 1e-6 * np.abs(term).sum(axis=over)
            error = np.abs(numbers - term.astype(np.float64).sum(axis=over))
            np.testing.assert_array_less(error, rounding, err_msg=f"{shape} {stacked}")


def test_many_equal_terms_lose_few_digits_and_float64_none(x64: None) -> None:
    for shape, stacked, tolerance in [
        ((1000, 1000), (), 1e-6),
        ((2, 500_000), (0,), 1e-6),
        ((500, 2, 1000), (1,), 1e-5),
    ]:
        term = np.full(shape, 0.1, np.float32)
        layers = int(np.prod([shape[a] for a in stacked]))
        exact = np.float64(np.float32(0.1)) * term.size / layers
        one_by_one = np.cumsum(term.ravel(), dtype=np.float32)[term.size // layers - 1]
        assert abs(one_by_one / exact - 1) > 1e-4  # what adding one after the other would give
        for dtype, rtol in ((np.float32, tolerance), (np.float64, 1e-12)):
            found = jax.jit(lambda x, s=stacked: one_pass.sums((x, 2 * x), s))(term.astype(dtype))
            assert found.dtype == dtype
            expected = np.broadcast_to([[exact], [2 * exact]], (2, layers))
            np.testing.assert_allclose(found.reshape(2, layers), expected, rtol=rtol)


def test_the_sums_have_derivatives_and_batches() -> None:
    # 96 elements behind the stacked axis, so that they are summed in pieces.
    x, dx = normal((2, 2, 48), 0), normal((2, 2, 48), 1)
    weights = normal((3, 2), 2)

    def loss(x: jax.Array, sums: Any) -> jax.Array:
        return jnp.sum(weights * sums((x, x**2, x**3), (0,)))

    def reference(terms: tuple[jax.Array, ...], stacked: tuple[int, ...]) -> jax.Array:
        return jnp.stack([jnp.sum(term, axis=(1, 2)) for term in terms])

    @functools.partial(jax.jit, static_argnums=1)
    def everything(x: jax.Array, sums: Any) -> Any:
        value = functools.partial(loss, sums=sums)
        gradient = jax.grad(value)
        return {
            "value": value(x),
            "grad": gradient(x),
            "second derivative": jax.jvp(gradient, (x,), (dx,))[1],
            "vmap": jax.vmap(value)(jnp.stack([x, dx, -x])),
            "checkpoint": jax.grad(jax.checkpoint(value))(x),
        }

    found, expected = everything(x, one_pass.sums), everything(x, reference)
    for name, value in expected.items():
        assert np.abs(value).max() > 0.1
        np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-5, err_msg=name)
    variadic = jax.make_jaxpr(lambda x: one_pass.sums((x, x, x), (0,)))(x)
    assert "reduce" in set(primitives(variadic.jaxpr))


def applies_to(*arrays: Any) -> bool:
    """Whether they apply to arrays that are arguments of a traced program."""
    seen = []
    jax.eval_shape(lambda *a: seen.append(one_pass.is_single_cpu_program(a)), *arrays)
    return seen[0]


def test_only_in_traced_programs_of_one_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    x = jnp.ones(2)
    assert one_pass.cpu_devices() == jax.device_count("cpu") == 8
    assert not applies_to(x)
    with one_device():
        assert applies_to(x)
        assert applies_to({"a": x, "none": None, "node": optax.MaskedNode()})
        for concrete in (x, [x, np.ones(2), 1.0], None):
            assert not one_pass.is_single_cpu_program(concrete)
        seen = []
        jax.eval_shape(lambda y: seen.append(one_pass.is_single_cpu_program([x, y, 1.0])), x)
        assert seen == [True]  # one traced array suffices

    def no_cpu(backend: str) -> int:
        raise RuntimeError(f"Unknown backend {backend}")

    monkeypatch.setattr(jax, "device_count", no_cpu)
    assert one_pass.cpu_devices() == 0
    assert not applies_to(x)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=lambda t: t.name)
def test_not_where_an_explicit_mesh_splits_an_array(axis_type: AxisType) -> None:
    mesh = jax.make_mesh((8,), ("x",), axis_types=(axis_type,))
    whole, split = (
        jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=NamedSharding(mesh, spec))
        for spec in (P(), P(None, "x"))
    )
    with jax.set_mesh(mesh), one_device():
        assert applies_to(whole)
        assert applies_to(whole, {"a": split}) == (axis_type is AxisType.Auto)


def test_layer_sums_in_one_pass_are_the_plain_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(one_pass, "SMALLEST_ARRAY", 1)
    params = {
        "blocks": {"bias": normal((3, 4), 0), "kernel": normal((3, 4, 16), 1)},
        "columns": {"kernel": normal((40, 3), 2)},
        "head": {"kernel": normal((9, 16), 3)},
        "without": {"kernel": normal((4,), 4)},
    }
    layers = optax_spd.stacked(
        "columns", 1, layers=optax_spd.stacked("blocks", layers=optax_spd.by_module())
    )
    plan = plans.plan_layers(trees.flatten(params), layers)

    def totals(params: Any) -> Any:
        products = [(x, x**2, x**3) for x in jax.tree.leaves(params)]
        return sums.layer_sums(plan, [*products[:-1], None], 3)

    plain = jax.jit(totals)(params)
    with one_device():
        traced = jax.jit(lambda params: totals(params)).trace(params)
        assert "platform_index" in set(primitives(traced.jaxpr))
        found = traced.lower().compile()(params)
    for a, b in zip(found, plain, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    text = traced.lower().as_text()
    assert text.count(":3 = stablehlo.reduce(") == 2  # of the arrays with 8 contiguous elements
