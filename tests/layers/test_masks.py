"""Masks: by path, as trees and prefixes, as functions; and what a stage does where they are False.

Where SPD is masked out, nothing may change and nothing may be stored.
"""

import re
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.core import freeze

import optax_spd


def model() -> dict[str, Any]:
    draw = np.random.default_rng(0)
    return {
        "encoder": {
            "bias": jnp.asarray(draw.normal(size=3), jnp.float32),
            "kernel": jnp.asarray(draw.normal(size=(2, 3)), jnp.float32),
        },
        "head": {
            "kernel": jnp.asarray(draw.normal(size=(3, 2)), jnp.float32),
            "scale": jnp.ones(2),
        },
    }


ENCODER = {"encoder": {"bias": True, "kernel": True}, "head": {"kernel": False, "scale": False}}


def test_a_pattern_is_searched_anywhere_in_the_path() -> None:
    expected = {
        ("encoder",): ENCODER,
        ("^encoder/",): ENCODER,
        ("kernel$",): {
            "encoder": {"bias": False, "kernel": True},
            "head": {"kernel": True, "scale": False},
        },
        ("r/k", "head/scale"): {
            "encoder": {"bias": False, "kernel": True},
            "head": {"kernel": False, "scale": True},
        },
        (r"^(?!head/)",): ENCODER,
    }
    for patterns, tree in expected.items():
        assert optax_spd.path_mask(*patterns)(model()) == tree, patterns


def test_the_mask_has_the_structure_of_params_and_keeps_missing_leaves() -> None:
    params = {"a": jnp.ones(1), "b": None, "c": optax.MaskedNode()}
    assert optax_spd.path_mask("a")(params) == {"a": True, "b": None, "c": optax.MaskedNode()}
    state = nnx.State({"dense": {"kernel": nnx.Param(jnp.ones(1)), "bias": nnx.Param(jnp.ones(1))}})
    mask = optax_spd.path_mask("kernel")(state)
    assert jax.tree.structure(mask) == jax.tree.structure(state)
    assert jax.tree.leaves(mask) == [False, True]
    assert optax_spd.path_mask("a")(freeze({"a": 1, "b": 1})) == freeze({"a": True, "b": False})


def test_a_pattern_that_matches_nothing_is_named_with_the_nearest_paths() -> None:
    mask = optax_spd.path_mask("encoder", "head/kernels")
    with pytest.raises(ValueError, match=re.escape("'head/kernels'")) as error:
        mask(model())
    message = str(error.value)
    assert "matches no parameter path" in message
    assert "'head/kernel'" in message
    assert "'encoder'" not in message  # the pattern that does match is not blamed


def test_a_pattern_may_match_nothing_where_another_mask_may_have_taken_it() -> None:
    mask = optax_spd.path_mask("head")
    assert mask({"encoder": jnp.ones(1), "head": optax.MaskedNode()}) == {
        "encoder": False,
        "head": optax.MaskedNode(),
    }
    assert mask({"head": None}) == {"head": None}
    assert mask({}) == {}
    # A None is not another mask's: it is part of the tree, and does not match.
    with pytest.raises(ValueError, match="matches no parameter path"):
        mask({"encoder": jnp.ones(1), "head": None})


def one_step(tx: Any, params: Any, **extra: Any) -> tuple[Any, Any, Any]:
    """A step that moves every layer outward against its gradient, where SPD fires: u = +0.1 g."""
    draw = np.random.default_rng(1)
    noise = lambda x: jnp.asarray(0.1 * draw.normal(size=x.shape), x.dtype)
    grads = jax.tree.map(lambda x: x + noise(x), params)
    steps = jax.tree.map(lambda g: 0.1 * g, grads)
    return (steps, *tx.update(steps, tx.init(params), params, grad=grads, **extra))


class CallableMask(eqx.Module):
    """A tree of bools that, like an Equinox model of bools, is callable."""

    encoder: dict[str, bool]
    head: dict[str, bool]

    def __call__(self, x: Any) -> Any:
        raise AssertionError("the tree was taken for a function of params")


def encoder_of(params: Any) -> Any:
    return ENCODER


class ByName(eqx.Module):
    """A mask function that is an Equinox module: callable, and a pytree without leaves."""

    name: str = eqx.field(static=True)

    def __call__(self, params: Any) -> Any:
        return {key: key == self.name for key in params}


MASKS: dict[str, Any] = {
    "tree": ENCODER,
    "frozen tree": freeze(ENCODER),
    "numpy bools": jax.tree.map(np.bool_, ENCODER),
    "mixed prefix": {"encoder": {"bias": True, "kernel": True}, "head": False},
    "function": encoder_of,
    "function of a prefix": lambda params: {"encoder": True, "head": False},
    "path_mask": optax_spd.path_mask("^encoder"),
    "callable tree": CallableMask(**ENCODER),
    "nnx.State": nnx.State(jax.tree.map(nnx.Param, ENCODER)),
    "module without leaves": ByName("encoder"),
    "Partial": jax.tree_util.Partial(encoder_of),
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_every_form_of_a_mask_selects_the_same(mask: Any) -> None:
    params = model()
    assert optax_spd.layer_names(params, mask=mask) == ["encoder/bias", "encoder/kernel"]
    tx = optax_spd.spd(anchor=jax.tree.map(jnp.zeros_like, params), mask=mask)
    state = tx.init(params)
    assert state.anchor["head"] == {"kernel": optax.MaskedNode(), "scale": optax.MaskedNode()}
    assert state.anchor["encoder"]["kernel"].shape == (2, 3)
    steps, updates, state = one_step(tx, params)
    assert state.spd_ratio.shape == (2,)
    assert np.all(state.spd_ratio > 0)
    for name in ("kernel", "scale"):
        assert updates["head"][name] is steps["head"][name]
    for name in ("kernel", "bias"):
        assert not np.array_equal(updates["encoder"][name], steps["encoder"][name])


@pytest.mark.parametrize("head", [None, {"kernel": jnp.ones((9, 9)), "scale": jnp.ones(9)}])
def test_the_anchor_of_a_masked_head_need_not_exist_or_fit(head: Any) -> None:
    # The pretrained model has another head, or none: what fine-tuning usually means.
    params = model()
    pretrained = jax.tree.map(lambda x: 0.5 * x, params)
    foreign = {"encoder": pretrained["encoder"]} | ({} if head is None else {"head": head})
    mask = optax_spd.path_mask("^encoder")
    _, expected, fired = one_step(optax_spd.spd(anchor=pretrained, mask=mask), params)
    assert np.all(fired.spd_ratio > 0)
    _, copied, _ = one_step(optax_spd.spd(anchor=foreign, mask=mask), params)
    _, handed, _ = one_step(optax_spd.spd(anchor="argument", mask=mask), params, anchor=foreign)
    jax.tree.map(np.testing.assert_array_equal, copied, expected)
    jax.tree.map(np.testing.assert_array_equal, handed, expected)


@pytest.mark.parametrize(
    ("patterns", "error", "message"),
    [
        ([], ValueError, "at least one pattern"),
        (["("], ValueError, "not valid"),
        ([["head"]], TypeError, "regular expression"),
    ],
)
def test_bad_patterns_are_refused_at_once(
    patterns: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        optax_spd.path_mask(*patterns)


def with_entry(entry: Any) -> Any:
    return {"encoder": True, "head": {"kernel": entry, "scale": True}}


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        *(
            (with_entry(entry), f"mask must hold True or False, got {entry!r} at 'head/kernel'")
            for entry in (1, "yes", 0.0, None)
        ),
        ({"encoder": True}, "mask has no entry for the parameter 'head/kernel'"),
        (
            {"encoder": True, "head": True, "decoder": True},
            "mask has an entry at 'decoder', where params has nothing",
        ),
        (False, "never act.*'encoder/bias'"),
        (jax.tree.map(lambda _: False, model()), "never act"),
        (lambda params: False, "never act"),
    ],
)
def test_masks_that_cannot_be_right_are_refused(mask: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        optax_spd.spd(mask=mask).init(model())


def test_a_mask_may_select_nothing_where_another_has_left_nothing() -> None:
    with pytest.raises(ValueError, match="never act"):  # a None is no parameter to act on
        optax_spd.spd(mask={"a": False, "none": True}).init({"a": jnp.ones(2), "none": None})
    # Inside optax.masked it is the other mask that may have left nothing.
    params = {"encoder": optax.MaskedNode(), "head": jnp.ones(2)}
    tx = optax_spd.spd(mask={"encoder": True, "head": False})
    assert tx.init(params).anchor == {"encoder": optax.MaskedNode(), "head": optax.MaskedNode()}
