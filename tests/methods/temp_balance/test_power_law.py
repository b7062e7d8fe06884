"""Power-law exponents of weights, against the original's numbers and plain NumPy."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tempbalance_golden as golden
from tempbalance_golden import numpy_alpha

import optax_spd
from optax_spd.methods.temp_balance import power_law

FITS = pytest.mark.parametrize("fit", power_law.FITS)


def options_of(case: dict[str, Any]) -> dict[str, Any]:
    settings = case["settings"]
    return {
        "fit": settings["pl_fitting"],
        "xmin_pos": settings["xmin_pos"],
        "conv_norm": settings["conv_norm"],
        "filter_zeros": settings["filter_zeros"],
        "bins": settings["bins"],
    }


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("case", golden.cases("esd"), ids=lambda c: c["name"])
def test_exponents_of_the_original(case: dict[str, Any]) -> None:
    weights = golden.kernels(case["net"])
    alphas = [
        optax_spd.power_law_alpha(weights[name], **options_of(case)) for name in case["layer_order"]
    ]
    expected = golden.array(case["name"], "alpha")
    double = expected.dtype == np.float64
    assert all(alpha.dtype == expected.dtype for alpha in alphas)
    np.testing.assert_allclose(alphas, expected, rtol=0, atol=1e-9 if double else 2e-3)


# Of the other network the original was run in float32 too.
DEFICIENT = [case for case in golden.cases("esd") if case["net"] in ("net_lowrank", "net_tiny")]


@pytest.mark.parametrize("case", DEFICIENT, ids=lambda c: c["name"])
def test_exponents_of_deficient_weights_in_float32(case: dict[str, Any]) -> None:
    weights = golden.kernels(case["net"])
    alphas = [
        optax_spd.power_law_alpha(weights[name].astype(np.float32), **options_of(case))
        for name in case["layer_order"]
    ]
    np.testing.assert_allclose(alphas, golden.array(case["name"], "alpha"), rtol=0, atol=2e-3)


def ill_conditioned(rows: int, columns: int, decades: float, seed: int = 0) -> np.ndarray:
    """A float32 matrix whose squared singular values fall by so many decades."""
    rng = np.random.default_rng(seed)
    left, _ = np.linalg.qr(rng.normal(size=(rows, rows)))
    right, _ = np.linalg.qr(rng.normal(size=(columns, rows)))
    values = 10 ** (-0.5 * decades * np.linspace(0, 1, rows) ** 2) * rng.uniform(0.7, 1.3, rows)
    return ((left * values) @ right.T).astype(np.float32)


@pytest.mark.parametrize(
    ("fit", "xmin_pos"),
    [*((fit, 2) for fit in power_law.FITS), *(("median", x) for x in (1.5, 8, 64))],
)
def test_float32_is_accurate_where_the_gram_matrix_has_no_small_eigenvalues(
    fit: Any, xmin_pos: float
) -> None:
    # Eigenvalues over ten decades: float32 holds seven, so the Gram matrix has lost the rest.
    weight = ill_conditioned(64, 96, decades=10)
    spectrum = np.linalg.svd(weight.astype(np.float64), compute_uv=False)[::-1] ** 2
    gram = np.linalg.eigvalsh(weight @ weight.T)
    assert np.abs(gram[0] / spectrum[0] - 1) > 0.5, "the Gram matrix should fail here"
    alpha = optax_spd.power_law_alpha(weight, fit=fit, xmin_pos=xmin_pos)
    assert alpha.dtype == jnp.float32
    np.testing.assert_allclose(alpha, numpy_alpha(spectrum, fit, xmin_pos), rtol=0, atol=2e-3)


@pytest.mark.usefixtures("x64")
@FITS
@pytest.mark.parametrize("xmin_pos", [1.1, 7])
def test_against_plain_numpy(fit: str, xmin_pos: float) -> None:
    weight = np.random.default_rng(3).normal(size=(37, 21)) * np.geomspace(1, 30, 21)
    spectrum = np.linalg.svd(weight, compute_uv=False)[::-1] ** 2
    alpha = optax_spd.power_law_alpha(weight, fit=fit, xmin_pos=xmin_pos, bins=9)
    np.testing.assert_allclose(alpha, numpy_alpha(spectrum, fit, xmin_pos, bins=9), atol=1e-10)


@pytest.mark.parametrize("rank", [4, 20])
def test_float32_on_weights_of_low_rank(rank: int) -> None:
    # More than half of the eigenvalues are below what a Gram matrix can tell from nothing.
    rng = np.random.default_rng(rank)
    weight = (rng.normal(size=(64, rank)) @ rng.normal(size=(rank, 96))).astype(np.float32)
    spectrum = np.linalg.svd(weight.astype(np.float64), compute_uv=False)[::-1] ** 2
    for same in (weight, weight[::-1], weight.T):
        # Without the filter the tail's start is rounding, which has no right value.
        assert 1 < optax_spd.power_law_alpha(same) < 1.5
        for fit in power_law.FITS:
            kept = optax_spd.power_law_alpha(same, fit=fit, filter_zeros=True)
            expected = numpy_alpha(spectrum[-rank:], fit)
            np.testing.assert_allclose(kept, expected, rtol=0, atol=2e-3)


def test_invariances() -> None:
    weight = jax.random.normal(jax.random.key(0), (24, 40)) ** 3
    alpha = optax_spd.power_law_alpha(weight)
    for same in (weight.T, weight * 1e-30, weight * 1e30, weight[::-1], -weight):
        np.testing.assert_allclose(optax_spd.power_law_alpha(same), alpha, rtol=1e-5)
    # A scale that overflows is as good as the largest number where it is compared.
    diagonal = jnp.diag(jnp.geomspace(0.1, 1, 20))
    assert optax_spd.power_law_alpha(1e30 * diagonal, fit="fix-finger") > 1
    # In bfloat16 the weight itself is rounded, and nothing else.
    coarse = weight.astype(jnp.bfloat16)
    np.testing.assert_array_equal(
        optax_spd.power_law_alpha(coarse), optax_spd.power_law_alpha(coarse.astype(jnp.float32))
    )
    assert optax_spd.power_law_alpha(coarse).dtype == jnp.float32


def test_a_convolution_pools_the_spectra_of_its_positions() -> None:
    kernel = np.asarray(jax.random.normal(jax.random.key(1), (2, 3, 8, 5)))
    spectra_of = [np.linalg.svd(m, compute_uv=False) ** 2 for m in kernel.reshape(6, 8, 5)]
    pooled = np.sort(np.concatenate(spectra_of))
    found = optax_spd.power_law_alpha(kernel)
    np.testing.assert_allclose(found, numpy_alpha(pooled, "median"), rtol=1e-5)
    # Its eigenvalues are scaled, which matters where they are compared with numbers.
    finger = optax_spd.power_law_alpha(kernel, fit="fix-finger", conv_norm=0.25, bins=5)
    np.testing.assert_allclose(finger, numpy_alpha(0.25 * pooled, "fix-finger", bins=5), rtol=1e-5)


@FITS
def test_a_weight_with_rows_of_zeros_has_a_finite_exponent(fit: Any) -> None:
    weight = jnp.zeros((16, 16)).at[:4].set(jax.random.normal(jax.random.key(3), (4, 16)))
    assert 1 < optax_spd.power_law_alpha(weight, fit=fit) < np.inf


def test_weights_without_an_exponent() -> None:
    assert np.isinf(optax_spd.power_law_alpha(jnp.zeros((8, 8))))
    orthogonal = np.linalg.qr(np.random.default_rng(0).normal(size=(64, 64)))[0]
    assert np.isinf(optax_spd.power_law_alpha(orthogonal.astype(np.float32)))
    assert np.isinf(optax_spd.power_law_alpha(jnp.ones((1, 8))))  # a tail of one eigenvalue
    assert optax_spd.power_law_alpha(jnp.ones((1, 8)), fit="goodness-of-fit") == 0  # no candidate
    for bad in (jnp.nan, jnp.inf):
        for fit in power_law.FITS:
            broken = jnp.eye(8).at[2, 3].set(bad)
            assert np.isnan(optax_spd.power_law_alpha(broken, fit=fit))


@pytest.mark.parametrize(
    ("weight", "options", "error", "message"),
    [
        (np.ones((4, 4)), {"fit": "hill"}, ValueError, "fit must be one of 'median'"),
        (np.ones((4, 4)), {"xmin_pos": 1}, ValueError, "xmin_pos must be greater than 1"),
        (np.ones((4, 4)), {"conv_norm": 0}, ValueError, "conv_norm must be greater than 0"),
        (np.ones((4, 4)), {"bins": 0}, ValueError, "bins must be at least 1"),
        (np.ones((4, 4)), {"filter_zeros": 1}, TypeError, "filter_zeros must be True or False"),
        (np.ones((4, 4)), {"xmin_pos": lambda _: 2}, TypeError, "xmin_pos shapes the program"),
        (np.ones(4), {}, ValueError, r"at least two axes.*\(4,\)"),
        (np.ones((0, 4)), {}, ValueError, r"not empty.*\(0, 4\)"),
        (np.ones((4, 4), np.complex64), {}, TypeError, "weight must hold real numbers"),
    ],
)
def test_bad_arguments(weight: Any, options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        optax_spd.power_law_alpha(weight, **options)
