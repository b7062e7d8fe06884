"""Who takes whose factor."""

import re
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import optax_spd
from optax_spd.layers import plans, trees
from optax_spd.methods.temp_balance import groups, weights

PARAMS = {
    "block_0": {
        "dense": {"kernel": jnp.ones((4, 4)), "bias": jnp.ones(4)},
        "norm": {"scale": jnp.ones(4), "bias": jnp.ones(4)},
        "pair": {"wi": jnp.ones((4, 4)), "wo": jnp.ones((4, 4)), "bias": jnp.ones(4)},
        "tiny": {"kernel": jnp.ones((4, 2)), "bias": jnp.ones(2)},
    },
    "block_1": {"dense": {"kernel": jnp.ones((4, 4)), "bias": jnp.ones(4)}},
    "head": {"kernel": jnp.ones((4, 4)), "bias": jnp.ones(4)},
}
STACKED = {
    "dense": {"kernel": jnp.ones((2, 4, 4)), "bias": jnp.ones((2, 4))},
    "norm": jnp.ones((2, 4)),
}


def parts(params: Any, layers: Any = None) -> Any:
    flat = trees.flatten(params)
    plan = plans.plan_layers(flat, layers)
    selection = weights.select(flat, plan, 3, skip_first=False, skip_last=False)
    return flat, plan, selection


def pairs(params: Any, follows: Any = None, layers: Any = None) -> dict[str, list[str]]:
    flat, plan, selection = parts(params, layers)
    modules = groups.modules(flat, selection, follows, unmasked=True)
    found: dict[str, list[str]] = {}
    for follower, leader in zip(modules.followers, modules.leaders, strict=True):
        found.setdefault(plan.names[follower], []).append(plan.names[leader])
    assert [n for n, c in zip(plan.names, modules.scalable, strict=True) if c] == list(found)
    return found


def test_biases_follow_the_weights_of_their_module() -> None:
    assert pairs(PARAMS) == {
        "block_0/dense/bias": ["block_0/dense/kernel"],
        "block_0/dense/kernel": ["block_0/dense/kernel"],
        "block_0/pair/bias": ["block_0/pair/wi", "block_0/pair/wo"],
        "block_0/pair/wi": ["block_0/pair/wi"],
        "block_0/pair/wo": ["block_0/pair/wo"],
        "block_1/dense/bias": ["block_1/dense/kernel"],
        "block_1/dense/kernel": ["block_1/dense/kernel"],
        "head/bias": ["head/kernel"],
        "head/kernel": ["head/kernel"],
    }


def test_normalisation_follows_where_it_is_told() -> None:
    found = pairs(PARAMS, lambda module: module.replace("norm", "dense"))
    assert found["block_0/norm/scale"] == ["block_0/dense/kernel"]
    assert found["block_0/norm/bias"] == ["block_0/dense/kernel"]


def test_stacked_arrays_follow_index_by_index() -> None:
    found = pairs(STACKED, lambda _: "dense", optax_spd.stacked("", 0))
    assert found["dense/bias[1]"] == ["dense/kernel[1]"]
    assert found["norm[0]"] == ["dense/kernel[0]"]


def test_biases_of_attention_follow_though_they_have_two_axes() -> None:
    params = {"query": {"kernel": jnp.ones((16, 4, 8)), "bias": jnp.ones((4, 8))}}
    found = pairs(params, layers=optax_spd.outputs("kernel", (1, 2)))
    assert found == {"query/bias": ["query/kernel"], "query/kernel": ["query/kernel"]}


def test_arrays_at_the_top_follow_only_a_lone_weight() -> None:
    dense = {"kernel": jnp.ones((4, 4)), "bias": jnp.ones(4)}
    assert pairs(dense)["bias"] == ["kernel"]
    flat = {
        "w1": jnp.ones((4, 4)),
        "b1": jnp.ones(4),
        "w2": jnp.ones((4, 4)),
        "logit_scale": jnp.ones(()),
    }
    assert sorted(pairs(flat)) == ["w1", "w2"]


def test_a_group_with_a_weight_leads_itself() -> None:
    assert pairs(PARAMS["block_0"], layers=optax_spd.by_module()) == {
        "dense": ["dense"],
        "pair": ["pair"],
    }


def test_mistakes_are_named() -> None:
    with pytest.raises(
        ValueError, match=r"follows sends 'block_0/norm' to 'block_0/dens'.*/dense'"
    ):
        pairs(PARAMS, lambda module: module.replace("norm", "dens"))
    with pytest.raises(TypeError, match="follows must return the path of a module"):
        pairs(PARAMS, lambda module: None)
    with pytest.raises(
        ValueError, match="'dense/bias' follows the weights of 'dense', but layers="
    ):
        pairs(
            {"dense": {"kernel": jnp.ones((2, 4, 4)), "bias": jnp.ones(4)}},
            layers=optax_spd.stacked("kernel"),
        )


def test_factors_of_modules() -> None:
    modules = groups.Modules(4, np.array([0, 1, 1, 2]), np.array([0, 0, 2, 2]))
    alpha = jnp.array([2.0, 0.0, 4.0, 0.0])
    found = jnp.array([True, False, True, False])

    def scales(a: Any, where: Any) -> Any:
        assert where.tolist() == found.tolist()
        return jnp.where(where, a, 1)

    expected = np.array([2.0, 3.0, 4.0, 1.0])
    plain = modules.scales(alpha, found, scales, normalize=False)
    np.testing.assert_allclose(plain, expected)
    divided = modules.scales(alpha, found, scales, normalize=True)
    np.testing.assert_allclose(divided, [2 / 3, 1.0, 4 / 3, 1.0], rtol=1e-6)


def test_a_follower_of_a_broken_weight_keeps_its_update() -> None:
    modules = groups.Modules(2, np.array([0, 1]), np.array([0, 0]))
    found = modules.scales(
        jnp.zeros(2), jnp.zeros(2, bool), lambda a, w: jnp.full(2, 7.0), normalize=True
    )
    np.testing.assert_array_equal(found, [1, 1])


def test_factors_that_are_all_zero_stay_zero() -> None:
    """They have no mean to be divided by."""
    found, zeros = jnp.ones(2, bool), lambda alpha, where: jnp.zeros_like(alpha)
    for group in (
        groups.Modules(2, np.array([0, 1]), np.array([0, 1])),
        groups.Blocks(np.array([0, 1]), 2),
    ):
        factors = group.scales(jnp.ones(2), found, zeros, normalize=True)
        np.testing.assert_array_equal(factors, [0, 0])


def test_factors_of_blocks() -> None:
    blocks = groups.Blocks(np.array([0, 0, 1, -1, 1]), 2)
    alpha = jnp.array([2.0, 4.0, 9.0, 5.0, 0.0])
    found = jnp.array([True, True, True, True, False])

    def scales(a: Any, where: Any) -> Any:
        np.testing.assert_allclose(a, [3, 9])  # what does not count is not in a mean
        return a / 3

    plain = blocks.scales(alpha, found, scales, normalize=False)
    np.testing.assert_allclose(plain, [1, 1, 3, 1, 3])
    # The mean is over the layers that count, the one outside of all blocks with factor 1.
    divided = blocks.scales(alpha, found, scales, normalize=True)
    np.testing.assert_allclose(divided, np.array([1, 1, 3, 1.5, 3]) / 1.5, rtol=1e-6)


def labels(params: Any, pattern: str | None = None, layers: Any = None) -> list[Any]:
    _, plan, _ = parts(params, layers)
    regex = None if pattern is None else re.compile(pattern)
    blocks = groups.blocks(plan, regex, unmasked=True)
    assert blocks.scalable.tolist() == [bool(b >= 0) for b in blocks.block]
    return blocks.block.tolist()


W = {"w": jnp.ones(2)}


def test_blocks_by_the_first_key_that_counts() -> None:
    assert labels(PARAMS) == [0] * 9 + [1] * 2 + [-1] * 2
    two_towers = {"decoder": {"0": W, "1": W}, "encoder": {"0": W, "1": W}}
    assert labels(two_towers) == [0, 1, 2, 3]
    # A number without a sibling is part of a name.
    nested = {"wav2vec2": {"Encoder_0": {"Block_0": {"Dense_0": W, "Dense_1": W}, "Block_1": W}}}
    assert labels(nested) == [0, 0, 1]
    assert labels(PARAMS, "^block") == [0] * 11 + [-1] * 2


def test_blocks_of_stacked_layers_are_their_indices() -> None:
    stacked = optax_spd.stacked("", 0)
    assert labels(STACKED, layers=stacked) == [0, 1] * 3
    # Cycles of several kinds of layers: the kind and the index.
    assert (
        labels({"layers_0": STACKED, "layers_1": STACKED}, layers=stacked)
        == [0, 1] * 3 + [2, 3] * 3
    )
    # Two stacks look like two modules of one; a pattern with groups tells them apart.
    towers = {"decoder": STACKED, "encoder": STACKED}
    assert labels(towers, layers=stacked) == [0, 1] * 6
    by_tower = r"^(\w+)/.*(\[\d+\])$"
    assert labels(towers, by_tower, stacked) == [0, 1] * 3 + [2, 3] * 3


def test_a_tree_without_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match=r"numbered keys was looked for in 'head/bias', 'head/ker"):
        labels({"head": PARAMS["head"]})
    with pytest.raises(ValueError, match=r"what block='layerz' matches was looked for"):
        labels(PARAMS, "layerz")
    _, plan, _ = parts({"head": PARAMS["head"]})
    part = groups.blocks(plan, None, unmasked=False)  # a mask may have taken the blocks
    assert not part.scalable.any()
