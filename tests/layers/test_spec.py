"""What counts as a layer: arrays, slices of stacked arrays, groups.

The yardstick is the unrolled model: however the same weights are packed, they train alike.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

import optax_spd
from optax_spd import LayerSpec
from optax_spd.layers import trees


def normal(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


# Stacked axes ------------------------------------------------------------------------------------


def test_stacked_refines_only_what_matches_and_keeps_the_rest_of_the_description() -> None:
    base = lambda path, array: LayerSpec(output_axes=(0,), group=path[0])
    describe = optax_spd.stacked("blocks/.*kernel", 1, layers=base)
    assert describe("blocks/kernel", None) == LayerSpec((1,), (0,), "b")
    assert describe("head/kernel", None) == LayerSpec((), (0,), "h")
    assert optax_spd.stacked("no such path")("head", None) == LayerSpec()


# Output axes -------------------------------------------------------------------------------------


def test_stacked_and_outputs_compose_in_either_order() -> None:
    one = optax_spd.outputs("query", (1, 2), layers=optax_spd.stacked("query", -1))
    other = optax_spd.stacked("query", -1, layers=optax_spd.outputs("query", (1, 2)))
    assert one("query/kernel", None) == other("query/kernel", None) == LayerSpec((-1,), (1, 2))


# Groups ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [1.0, 2.5])
def test_a_module_is_judged_as_one_vector(decay: float) -> None:
    names = ["attention", "attention/out", "mlp_0", "mlp_1", "mlp_2"]
    params, anchor, grads, steps = (
        {
            "attention": {
                "out": {"kernel": normal((3, 2), 10 * k), "bias": normal((2,), 10 * k + 1)},
                "scale": normal((4,), 10 * k + 2),
            }
        }
        | {
            f"mlp_{i}": {
                "kernel": normal((2, 3), 10 * k + 2 * i + 3),
                "bias": normal((3,), 10 * k + 2 * i + 4),
            }
            for i in range(3)
        }
        for k in range(4)
    )
    tx = optax_spd.spd(decay, anchor=anchor, layers=optax_spd.by_module())
    updates, state = jax.jit(tx.update)(steps, tx.init(params), params, grad=grads)
    # "attention/out" comes first: its bias is the first array of the tree.
    assert sorted(optax_spd.layer_names(params, layers=optax_spd.by_module())) == names

    def members(tree: Any, module: str) -> list[Any]:
        flat = trees.flatten(tree)
        return [
            leaf
            for path, leaf in zip(flat.paths, flat.leaves, strict=True)
            if "/".join(path[:-1]) == module
        ]

    def vector(tree: Any, module: str) -> np.ndarray:
        return np.concatenate([np.ravel(x).astype(np.float64) for x in members(tree, module)])

    fired = 0
    for index, module in enumerate(optax_spd.layer_names(params, layers=optax_spd.by_module())):
        delta = vector(params, module) - vector(anchor, module)
        expected, ratio = oracles.spd_step(
            vector(steps, module), delta, 0.0, vector(grads, module), decay
        )
        np.testing.assert_allclose(state.spd_ratio[index], ratio, atol=1e-6, err_msg=module)
        np.testing.assert_allclose(vector(updates, module), expected, atol=1e-5, err_msg=module)
        fired += ratio > 0
    assert 0 < fired < len(names)


def test_by_module_keeps_groups_that_are_given() -> None:
    given = lambda path, array: LayerSpec(group="norms") if "scale" in path else LayerSpec()
    params = {f"{m}": {"kernel": jnp.ones(1), "scale": jnp.ones(1)} for m in "ab"}
    names = optax_spd.layer_names(params, layers=optax_spd.by_module(layers=given))
    assert names == ["a", "norms", "b"]


# A model with scanned layers ---------------------------------------------------------------------

DEPTH, WIDTH = 3, 4


# What is refused ---------------------------------------------------------------------------------


def test_layers_must_be_a_function() -> None:
    with pytest.raises(TypeError, match=r"optax_spd\.stacked, outputs and by_module"):
        optax_spd.spd(layers="blocks")  # type: ignore[arg-type]


def test_a_pattern_must_be_a_regular_expression() -> None:
    with pytest.raises(ValueError, match="not valid"):
        optax_spd.stacked("(")
