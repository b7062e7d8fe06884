"""The benchmark of spectra, on a small model: what it counts and writes, not the times."""

import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import balancing, vit


def test_a_run_writes_what_its_table_shows(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "result.json"
    balancing.main(["--scale", "small", "--batch", "2", "--samples", "3", "--json", str(file)])
    result: dict[str, Any] = json.loads(file.read_text())
    text = capsys.readouterr().out
    assert text.strip() == balancing.table(result)
    assert list(result["updates"]) == [balancing.PLAIN, balancing.BETWEEN, balancing.DUE]
    # The embeddings of patches (48 eigenvalues) and positions, and the block's four kernels.
    assert result["tree"]["weights"] == 6
    assert f"{result['share_of_training']:.2%} of the training time" in text
    for errors in result["errors"].values():
        assert 0 < errors["gram"] < 2e-3
        assert 0 < errors["svd"] < 2e-3
    assert not jax.config.jax_enable_x64


def test_the_vit_trains() -> None:
    scale = vit.SCALES["small"]
    params, _, _ = vit.make_trees(scale, fire=0)
    images = jax.random.normal(jax.random.key(0), (3, *vit.image_shape(scale)))
    value, grads = jax.jit(jax.value_and_grad(vit.loss), static_argnums=2)(params, images, scale)
    np.testing.assert_allclose(value, np.log(scale.classes), atol=0.1)  # of small random weights
    moved = jax.tree.map(lambda g: bool(jnp.any(g != 0)), grads)
    assert all(jax.tree.leaves(moved))
