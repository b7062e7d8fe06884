"""Decompositions, one by one and in batches."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_spd.methods.temp_balance import spectra


def source(stack: jax.Array) -> spectra.Source:
    """Of an array (layers, positions, rows, columns)."""
    return spectra.Source(
        stack.shape[1:], stack.dtype, len(stack), lambda go: stack, lambda i: stack[i]
    )


def values(found: spectra.Spectrum) -> np.ndarray:
    return np.asarray(found.relative) * np.asarray(found.scale)[:, None]


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("bytes_of_a_batch", [1, 1500, 2**20])
def test_batches_change_nothing(
    exact: bool, bytes_of_a_batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spectra, "BATCH_BYTES", bytes_of_a_batch)
    keys = jax.random.split(jax.random.key(4), 5)
    shapes = [(2, 1, 5, 7), (5, 1, 7, 5), (1, 2, 6, 6), (1, 1, 5, 7), (3, 2, 6, 6)]
    stacks = [7 * jax.random.normal(k, shape) for k, shape in zip(keys, shapes, strict=True)]

    @jax.jit
    def run(stacks: Any) -> Any:
        return spectra.spectra_of([source(stack) for stack in stacks], exact=exact)

    for stack, found in zip(stacks, run(stacks), strict=True):
        squares = np.linalg.svd(np.asarray(stack, np.float64), compute_uv=False) ** 2
        expected = np.sort(squares.reshape(len(stack), -1), axis=1)
        np.testing.assert_allclose(values(found), expected, rtol=1e-4, atol=1e-4)


def test_singular_values_have_the_digits_that_a_gram_matrix_has_not() -> None:
    values_of = np.geomspace(1e-5, 1, 6)
    left, right = (np.linalg.qr(np.random.default_rng(i).normal(size=(6, 6)))[0] for i in (0, 1))
    weight = jnp.asarray(left @ np.diag(values_of) @ right, jnp.float32)[None, None]
    exact = np.linalg.svd(np.asarray(weight, np.float64)[0, 0], compute_uv=False)[::-1] ** 2
    np.testing.assert_allclose(values(spectra.decomposed(weight, exact=True))[0], exact, rtol=0.1)
    gram = values(spectra.decomposed(weight, exact=False))[0]
    np.testing.assert_allclose(gram[3:], exact[3:], rtol=1e-2)
    assert abs(gram[0] / exact[0] - 1) > 0.5


def test_a_broken_layer_is_marked_and_leaves_the_batch_alone() -> None:
    stack = jax.random.normal(jax.random.key(0), (4, 1, 5, 6))
    broken = stack.at[1, 0, 0, 0].set(jnp.nan).at[2, 0, 0, 0].set(jnp.inf).at[3].set(0)
    found = spectra.decomposed(broken, exact=False)
    assert np.isnan(found.scale).tolist() == [False, True, True, False]
    assert np.isfinite(found.relative).all()
    alone = spectra.decomposed(stack[:1], exact=False)
    np.testing.assert_allclose(found.relative[0], alone.relative[0], rtol=1e-5)
    np.testing.assert_array_equal(values(found)[3], np.zeros(5))


def test_eigenvalues_that_rounding_made_negative_are_zero() -> None:
    draw = np.random.default_rng(0)
    stack = draw.normal(size=(20, 1, 16, 1)) * draw.normal(size=(20, 1, 1, 16))
    found = spectra.decomposed(jnp.asarray(stack, jnp.float32), exact=False)
    assert np.asarray(found.relative).min() == 0


def test_a_stack_beyond_one_batch_is_taken_layer_by_layer() -> None:
    # 32 layers of 1 MB: the temporaries are of a few, not of the stack.
    shape, layers = (1, 512, 512), 32
    stack = jax.ShapeDtypeStruct((512, layers, 512), jnp.float32)
    size = layers * 512 * 512 * 4

    def run(array: jax.Array) -> Any:
        one = lambda i: jax.lax.dynamic_index_in_dim(array, i, 1)[None, :, 0]
        made = spectra.Source(shape, jnp.dtype(jnp.float32), layers, lambda go: array, one)
        return spectra.spectra_of([made], exact=False)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spectra, "BATCH_BYTES", 2**23)
        memory = jax.jit(run).lower(stack).compile().memory_analysis()
    assert memory.temp_size_in_bytes < size // 2
