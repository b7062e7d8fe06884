"""Which weights count, and how arrays of any layout become matrices."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tempbalance_golden import numpy_alpha

import optax_spd
from optax_spd.layers import plans, trees
from optax_spd.methods.temp_balance import power_law, weights


def selected(params: Any, layers: Any = None, minimum: int = 1, **skips: bool) -> Any:
    flat = trees.flatten(params)
    plan = plans.plan_layers(flat, layers)
    skips = {"skip_first": False, "skip_last": False} | skips
    return weights.select(flat, plan, minimum, **skips)


def counted(params: Any, layers: Any = None, minimum: int = 1, **skips: bool) -> list[str]:
    selection = selected(params, layers, minimum, **skips)
    return [n for n, c in zip(selection.plan.names, selection.balanced, strict=False) if c]


def alphas(selection: Any, params: Any) -> Any:
    return jax.jit(lambda leaves: selection.alphas(leaves, power_law.Fit()))(
        jax.tree.leaves(params)
    )


def alpha_of(matrices: Any) -> float:
    """From NumPy, of (in, out) matrices whose spectra are pooled."""
    matrices = np.asarray(matrices, np.float64).reshape(-1, *np.shape(matrices)[-2:])
    values = [np.linalg.svd(m, compute_uv=False) ** 2 for m in matrices]
    return numpy_alpha(np.sort(np.concatenate(values)), "median")


def normal(seed: int, *shape: int) -> jax.Array:
    """Weights whose singular values are well apart."""
    return jax.random.normal(jax.random.key(seed), shape) * jnp.geomspace(1, 9, shape[-1])


def test_what_counts() -> None:
    params = {
        "conv": {"kernel": jnp.ones((3, 3, 2, 8)), "bias": jnp.ones(8)},  # 18 eigenvalues
        "depthwise": jnp.ones((3, 3, 1, 8)),  # 9
        "empty": jnp.ones((0, 4)),
        "integer": jnp.ones((9, 9), jnp.int32),
        "matrix": jnp.ones((8, 6)),  # 6
        "none": None,
        "scalar": jnp.ones(()),
        "vector": jnp.ones(40),
    }
    assert counted(params) == ["conv/kernel", "depthwise", "matrix"]
    assert counted(params, minimum=9) == ["conv/kernel", "depthwise"]
    assert counted(params, minimum=10) == ["conv/kernel"]
    assert counted(params, minimum=19) == []
    # First and last are taken before the small ones, as in the original.
    assert counted(params, minimum=9, skip_last=True) == ["conv/kernel", "depthwise"]
    assert counted(params, minimum=9, skip_first=True) == ["depthwise"]
    assert counted({"one": jnp.ones((9, 9))}, skip_first=True, skip_last=True) == []
    many = [jnp.ones((9, 9))] * 11
    assert set(counted(many, skip_first=True, skip_last=True)) == set(map(str, range(1, 10)))


Spec = optax_spd.LayerSpec
# The shape, what it means, and the matrices of each layer.
SPECS: dict[str, tuple[tuple[int, ...], Spec, Any]] = {
    "matrix": ((8, 6), Spec(), lambda w: [w]),
    "convolution": ((2, 3, 8, 6), Spec(), lambda w: [w]),
    "attention in": ((10, 2, 3), Spec(output_axes=(1, 2)), lambda w: [w.reshape(10, 6)]),
    "attention out": ((2, 3, 10), Spec(), lambda w: [w.reshape(6, 10)]),
    "fused": ((10, 3, 2, 3), Spec(output_axes=(1, 2, 3)), lambda w: [w.reshape(10, 18)]),
    "stacked": ((3, 8, 6), Spec(stacked_axes=(0,)), list),
    "stacked behind": ((8, 3, 6), Spec(stacked_axes=(1,)), lambda w: list(np.moveaxis(w, 1, 0))),
    "stacked convolution": ((2, 2, 3, 8, 6), Spec(stacked_axes=(0,)), list),
    "PyTorch's convolution": (
        (6, 8, 2, 2),
        Spec(output_axes=(0,), spatial_axes=(2, 3)),
        lambda w: [w.transpose(2, 3, 1, 0)],
    ),
    "one-dimensional convolution": ((3, 8, 6), Spec(spatial_axes=(0,)), lambda w: [w]),
    "no convolution": ((2, 3, 4, 6), Spec(spatial_axes=()), lambda w: [w.reshape(24, 6)]),
}


def test_any_layout_has_the_spectra_of_its_matrices() -> None:
    params = {name: normal(1, *shape) for name, (shape, _, _) in SPECS.items()}
    params["too small"] = jnp.ones((1, 2))
    selection = selected(params, lambda path, _: SPECS.get(path, SPECS["matrix"])[1], 5)
    alpha, found = alphas(selection, params)
    expected = {
        name: [alpha_of(layer) for layer in matrices(np.asarray(params[name]))]
        for name, (_, _, matrices) in SPECS.items()
    }
    expected["too small"] = [0]
    np.testing.assert_allclose(
        alpha, np.concatenate([expected[name] for name in sorted(params)]), rtol=1e-4
    )
    np.testing.assert_array_equal(found, alpha > 0)


def test_the_eigenvalues_of_convolutions_alone_are_scaled() -> None:
    """The filter sees them scaled: it drops some of each convolution's and none of a matrix's."""
    convolutions = [n for n in SPECS if n.endswith("convolution") and n != "no convolution"]
    params = {name: normal(1, *shape) for name, (shape, _, _) in SPECS.items()}
    selection = selected(params, lambda path, _: SPECS[path][1])
    alpha, found = selection.alphas(
        jax.tree.leaves(params), power_law.Fit(filter_zeros=True, conv_norm=1e-7)
    )
    expected = []
    for name in sorted(params):
        for layer in SPECS[name][2](np.asarray(params[name], np.float64)):
            values = np.sort((np.linalg.svd(layer, compute_uv=False) ** 2).ravel())
            kept = values[(1e-7 if name in convolutions else 1) * values > power_law.ZERO]
            assert (len(kept) < len(values)) == (name in convolutions)
            expected.append(numpy_alpha(kept, "median"))
    np.testing.assert_allclose(alpha, expected, rtol=1e-4)
    assert found.all()


def test_biases_have_no_spectrum_whatever_their_axes() -> None:
    params = {
        "query": {"kernel": jnp.ones((16, 4, 8)), "bias": jnp.ones((4, 8))},
        "stem": {"kernel": jnp.ones((4, 4))},
        "relative_bias": {"embedding": jnp.ones((8, 4))},
        "units": jnp.ones((4, 4)),
    }
    layers = optax_spd.outputs("query/kernel", (1, 2), layers=optax_spd.outputs("units", (0, 1)))
    assert counted(params, layers) == ["query/kernel", "relative_bias/embedding", "stem/kernel"]
    assert counted(params, layers, skip_first=True) == ["relative_bias/embedding", "stem/kernel"]


def test_stacks_beyond_a_batch_are_the_same_on_any_stacked_axis(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("optax_spd.methods.temp_balance.spectra.BATCH_BYTES", 1000)
    w = normal(7, 5, 4, 6, 3)  # two stacked axes around the matrix: layer 0 to 14
    params = {"w": w, "x": normal(8, 6, 6)}
    spec = optax_spd.LayerSpec(stacked_axes=(0, 3))
    alpha, _ = alphas(
        selected(params, lambda p, _: spec if p == "w" else optax_spd.LayerSpec()), params
    )
    expected = [alpha_of(w[i, :, :, j]) for i in range(5) for j in range(3)]
    np.testing.assert_allclose(alpha[:15], expected, rtol=1e-4)


def test_a_group_has_the_mean_of_its_arrays() -> None:
    params = {"a": normal(2, 8, 8), "b": normal(3, 6, 9), "bias": jnp.ones(3)}
    group = optax_spd.LayerSpec(group="all")
    alpha, found = alphas(selected(params, lambda *_: group), params)
    np.testing.assert_allclose(
        alpha, [(alpha_of(params["a"]) + alpha_of(params["b"])) / 2], rtol=1e-4
    )
    assert found.tolist() == [True]


def test_broken_weights_have_no_exponent() -> None:
    params = {
        "equal": jnp.eye(8),
        "fine": normal(4, 8, 8),
        "inf": normal(5, 8, 8).at[0, 0].set(jnp.inf),
        "nan": normal(6, 8, 8).at[0, 0].set(jnp.nan),
        "zero": jnp.zeros((8, 8)),
    }
    alpha, found = alphas(selected(params), params)
    assert found.tolist() == [False, True, False, False, False]
    np.testing.assert_allclose(alpha, [0, alpha_of(params["fine"]), 0, 0, 0], rtol=1e-4)


def test_no_tail_and_a_layer_that_is_left_out_are_no_exponents() -> None:
    params = {"blocks": normal(4, 3, 8, 8), "one": jnp.ones((1, 8))}
    selection = selected(params, optax_spd.stacked("blocks"), skip_first=True)
    fit = power_law.Fit(fit="goodness-of-fit")  # finds no candidate in one eigenvalue
    alpha, found = selection.alphas(list(params.values()), fit)
    assert found.tolist() == [False, True, True, False]
    assert [bool(a > 1) for a in alpha] == found.tolist()
    assert alpha[0] == alpha[3] == 0


def test_means_by_segment() -> None:
    values = jnp.array([1.0, 2.0, jnp.nan, 4.0])
    mean, found = weights.mean_by(values, jnp.isfinite(values), np.array([2, 2, 0, 2]), 3)
    np.testing.assert_allclose(mean, [0, 0, 7 / 3], rtol=1e-6)
    assert found.tolist() == [False, False, True]


def test_weights_split_by_hand_are_refused() -> None:
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("x")
    tx = optax_spd.temp_balance(min_eigenvalues=1)

    def step(params: Any) -> Any:
        return tx.update(params, tx.init(params), params)[0]

    split = jax.shard_map(step, mesh=mesh, in_specs=spec, out_specs=spec)
    with pytest.raises(ValueError, match=r"needs whole weights, but shard_map splits 'w'.*'x'"):
        jax.eval_shape(split, {"w": jnp.ones((16, 4))})
