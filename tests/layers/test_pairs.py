"""What pairs of kernels are found, and what is said of those that do not pair up."""

from typing import Any

import numpy as np
import optax
import pytest

from optax_spd.layers import pairs as layer_pairs, trees


def ones(*shape: int) -> np.ndarray:
    return np.ones(shape, np.float32)


MODEL: dict[str, Any] = {
    "conv_0": {"kernel": ones(3, 3, 2, 4), "bias": ones(4)},
    "conv_1": {"kernel": ones(3, 3, 4, 5)},
    "dense_0": {"kernel": ones(6, 7), "bias": ones(7)},
    "dense_1": {"kernel": ones(7, 8), "bias": ones(8)},
    "norm": {"scale": ones(8), "bias": ones(8)},
    "steps": np.arange(6).reshape(2, 3),
    "wide": {"kernel": ones(2, 6, 7), "bias": ones(2, 7)},
    "tall": {"kernel": ones(2, 7, 3), "bias": ones(2, 3)},
}


def found(pairs: Any, tree: Any = MODEL) -> list[tuple[str | None, ...]]:
    """The names of the arrays of each pair."""
    flat = trees.flatten(tree)
    name = lambda i: None if i is None else trees.path_name(flat.paths[i])
    pairs = layer_pairs.found(layer_pairs.checked(pairs), flat)
    return [tuple(map(name, pair)) for pair in pairs]


def test_pairs_are_found_with_their_biases() -> None:
    assert found([("conv_0", "conv_1"), ("dense_0/kernel$", "dense_1")]) == [
        ("conv_0/kernel", "conv_0/bias", "conv_1/kernel", None),
        ("dense_0/kernel", "dense_0/bias", "dense_1/kernel", "dense_1/bias"),
    ]
    assert found([("a", "b")], {"a": ones(2, 3), "b": ones(3, 2)}) == [("a", None, "b", None)]
    # A bias that is missing is none.
    tree = MODEL | {"dense_0": {"kernel": ones(6, 7), "bias": None}}
    assert found([("dense_0", "dense_1")], tree)[0][1] is None


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([("dense_2", "dense_1")], r"'dense_2' of pairs\[0\] matches no kernel.*'dense_1/kernel'"),
        ([("norm", "dense_1")], r"'norm' of pairs\[0\] matches no kernel \(an array with two"),
        ([("steps", "dense_1")], "'steps' .* matches no kernel"),
        (
            [("dense", "conv_1")],
            r"'dense' of pairs\[0\] matches 2 kernels: 'dense_0/kernel', ",
        ),
        ([("conv_0", "dense_1")], "both must be Dense kernels"),
        ([("dense_1", "dense_0")], "first has 8 output units .* second 6 inputs .*Flax's layout"),
        ([("wide", "tall")], r"'wide/bias' for the bias of the 7 output units.*\(2, 7\).*Stacked"),
        ([("dense_0", "dense_0")], r"'dense_0/kernel', which is in pairs\[0\] already"),
        (
            [("dense_0", "dense_1"), ("dense_1", "conv_1")],
            r"pairs\[1\] matches 'dense_1/kernel', which is in pairs\[0\] already",
        ),
    ],
)
def test_what_does_not_pair_up_is_said(pairs: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        found(pairs)


@pytest.mark.parametrize("pairs", [[3], ["ab"], [("a",)], [None], "ab", 3])
def test_what_is_no_sequence_of_pairs_is_refused(pairs: Any) -> None:
    with pytest.raises(TypeError, match="pairs must be a sequence of"):
        layer_pairs.checked(pairs)


def test_complex_kernels_are_refused() -> None:
    tree = {"a": ones(2, 3) * 1j, "b": ones(3, 2), "c": ones(2, 2) * 1j}
    with pytest.raises(TypeError, match="'a', which is complex"):
        found([("a", "b")], tree)
    tree["a"] = ones(2, 3)
    assert found([("a", "b")], tree)


def test_a_part_of_a_tree_has_all_pairs_or_none() -> None:
    masked = optax.MaskedNode()
    pairs = [("conv_0", "conv_1"), ("dense_0", "dense_1")]
    rest = {
        "norm": MODEL["norm"],
        **dict.fromkeys(("conv_0", "conv_1", "dense_0", "dense_1"), masked),
    }
    assert found(pairs, rest) == []
    assert found(pairs, {}) == []
    for missing in ("conv_0", "conv_1", "dense_1"):
        with pytest.raises(ValueError, match="mask or partition around the stage splits the pairs"):
            found(pairs, MODEL | {missing: masked})
    # None is no mask: the pattern is wrong, or the layer is not there.
    with pytest.raises(ValueError, match=r"'dense_1' .* matches no kernel") as error:
        found(pairs, MODEL | {"dense_1": None})
    assert "partition" not in str(error.value)
