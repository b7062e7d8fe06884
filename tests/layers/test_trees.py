"""Trees matched by path: what a path is, and what is said where two trees differ."""

from collections import OrderedDict
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings, strategies as st

from optax_spd.layers import trees


class Value(NamedTuple):
    """Not a box: its field ``value`` has a sister."""

    value: Any
    scale: Any


def names(tree: Any) -> list[str]:
    return [trees.path_name(path) for path in trees.flatten(tree, unique=False).paths]


def flat(**leaves: Any) -> trees.FlatTree:
    return trees.flatten(leaves)


def boxed(array: jax.Array) -> nn.Partitioned[jax.Array]:
    return nn.Partitioned(array, names=(None,) * array.ndim)


def test_only_the_key_of_a_box_is_left_out() -> None:
    # Flax attention has a submodule called "value", and a NamedTuple may have such a field.
    array = jnp.ones((1, 1))
    assert names({"attention": {"value": {"kernel": array}}}) == ["attention/value/kernel"]
    assert names({"value": boxed(array)}) == ["value"]
    assert names({"head": Value(array, array)}) == ["head/value", "head/scale"]
    assert names({"head": Value(boxed(array), array)}) == ["head/value", "head/scale"]


def test_missing_leaves_are_leaves_and_survive_a_round_trip() -> None:
    tree = {"a": None, "b": optax.MaskedNode(), "c": jnp.ones(2)}
    flattened = trees.flatten(tree)
    assert trees.path_name(flattened.paths[1]) == "b"
    assert [trees.is_missing(leaf) for leaf in flattened.leaves] == [True, True, False]
    again = flattened.unflatten(flattened.leaves)
    assert again["a"] is None
    assert again["b"] == optax.MaskedNode()
    assert again["c"] is tree["c"]


def test_align_answers_with_what_is_missing_on_either_side() -> None:
    array = jnp.ones(2)
    reference = flat(a=optax.MaskedNode(), b=None, c={"x": array, "y": array}, d=array)
    # What stands where the reference has no leaf is not looked at, whatever its shape.
    tree = {"a": {"deep": jnp.ones(9)}, "b": jnp.ones(9), "c": None, "d": optax.MaskedNode()}
    aligned = trees.align(reference, tree, "grad")
    assert aligned[0] == optax.MaskedNode()
    assert aligned[1:4] == [None, None, None]
    assert aligned[4] == optax.MaskedNode()


def test_align_names_both_trees_and_a_tree_that_is_one_array() -> None:
    with pytest.raises(ValueError, match="grad does not match the updates") as error:
        trees.align(trees.flatten(jnp.ones(2)), jnp.ones(3), "grad", reference_name="the updates")
    assert "the tree itself" in str(error.value)


def is_number(node: Any) -> bool:
    return isinstance(node, int)


def test_the_longest_prefix_covers_a_leaf() -> None:
    array = jnp.ones(1)
    reference = trees.flatten({"a": {"x": array, "y": {"z": array}}, "b": array})
    covering = trees.broadcast_prefix(reference, {"a": {"x": 1, "y": 2}, "b": 3}, "mask", is_number)
    assert covering == [1, 2, 3]
    assert trees.broadcast_prefix(reference, 5, "mask", is_number) == [5, 5, 5]
    assert trees.broadcast_prefix(reference, {"a": 1, "b": 2}, "mask", is_number) == [1, 1, 2]


def test_a_prefix_need_not_cover_a_missing_leaf_and_may_have_entries_below() -> None:
    reference = flat(a=jnp.ones(1), b=None, c=optax.MaskedNode())
    assert trees.broadcast_prefix(reference, {"a": 1}, "mask", is_number) == [1, None, None]
    prefix = {"a": 1, "b": 2, "c": {"deep": 3}}
    assert trees.broadcast_prefix(reference, prefix, "mask", is_number) == [1, 2, None]


def test_replace_leaves_changes_the_given_paths_only() -> None:
    tree = {"a": boxed(jnp.ones((1, 2))), "b": {"x": jnp.ones(3)}, "c": None}
    new = trees.replace_leaves(tree, {("a",): jnp.zeros((1, 2))})
    np.testing.assert_array_equal(new["a"].value, np.zeros((1, 2)))
    assert new["a"].names == tree["a"].names
    assert new["b"]["x"] is tree["b"]["x"]
    assert new["c"] is None


def test_nearest_paths_come_most_alike_first_and_quoted() -> None:
    paths = [("encoder", "kernel"), ("encoder", "bias"), ("zzz",)]
    assert trees.nearest_paths("encoder/kernle", paths).split(", ")[0] == "'encoder/kernel'"
    assert "zzz" not in trees.nearest_paths("encoder/kernle", paths)
    # Nothing is alike: some paths are shown all the same, to say what the tree looks like.
    assert trees.nearest_paths("#", paths, count=2) == "'encoder/kernel', 'encoder/bias'"
    assert trees.nearest_paths("x", []) == "none"


# Paths that are spelled alike --------------------------------------------------------------------


class Twins:
    """A node whose children share a key."""

    def __init__(self, *children: Any) -> None:
        self.children = children


key = jax.tree_util.GetAttrKey("twin")
jax.tree_util.register_pytree_with_keys(
    Twins, lambda node: ([(key, child) for child in node.children], None), lambda _, c: Twins(*c)
)


class Field(NamedTuple):
    """Its field is spelled like a key."""

    a: Any


@pytest.mark.parametrize(
    ("tree", "path", "told"),
    [
        (OrderedDict({1: 0.0, "1": 1.0}), "1", ["tree[1]", "tree['1']"]),
        ({"a": {0: 1.0}, "b": {"c": [1.0], "c/0": 2.0}}, "b/c/0", ["['c'][0]", "['c/0']"]),
        ([Twins(1.0, 2.0)], "0/twin", ["tree[0].twin"]),
        (OrderedDict({2: Field(1.0), "2": {"a": None}}), "2/a", ["[2].a", "['2']['a']"]),
    ],
    ids=["number and string", "slash", "twins", "missing"],
)
def test_two_leaves_of_one_path_are_refused_and_both_named(
    tree: Any, path: str, told: list[str]
) -> None:
    with pytest.raises(ValueError, match=f"Two leaves have the path '{path}'") as error:
        trees.flatten(tree)
    for part in told:
        assert part in str(error.value)


KEYS = st.one_of(st.integers(0, 2), st.sampled_from(["0", "1", "a", "a/0", "value"]))
TREES = st.recursive(
    st.just(0.0),
    lambda children: st.one_of(
        st.lists(children, max_size=3),
        st.dictionaries(KEYS, children, max_size=3).map(OrderedDict),
        st.lists(children, min_size=2, max_size=2).map(lambda pair: Twins(*pair)),
    ),
    max_leaves=6,
)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(TREES)
def test_any_tree_is_matched_leaf_by_leaf_or_refused(tree: Any) -> None:
    count = len(jax.tree.leaves(tree))
    numbered = jax.tree.unflatten(jax.tree.structure(tree), range(count))
    reference = trees.flatten(numbered, unique=False)
    if len(set(names(numbered))) < count:
        with pytest.raises(ValueError, match="Two leaves have the path"):
            trees.align(reference, numbered, "tree")
        return
    assert trees.align(reference, numbered, "tree") == list(range(count))
    changed = trees.replace_leaves(numbered, {p: -x for p, x in reference.by_path.items()})
    assert jax.tree.leaves(changed) == [-i for i in range(count)]
