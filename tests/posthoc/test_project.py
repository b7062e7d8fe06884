"""Two checkpoints matched leaf by leaf."""

import jax.numpy as jnp
import numpy as np
import pytest

import optax_spd
from optax_spd.posthoc import project as checkpoints

PARAMS = {
    "body": {"kernel": jnp.full((2, 3), 5.0), "ids": jnp.arange(3)},
    "head": jnp.ones(3, jnp.bfloat16),
    "gap": None,
}
ANCHOR = {"body": {"kernel": jnp.ones((2, 3)), "ids": jnp.zeros(3, int)}, "head": jnp.zeros(3)}


def test_only_layers_under_the_mask_have_an_anchor_and_a_deviation() -> None:
    plan = checkpoints.plan_of(PARAMS, None, optax_spd.path_mask("^body/"))
    assert plan.names == ("body/kernel",)
    pretrained = checkpoints.matched_anchor(PARAMS, ANCHOR, plan)
    displaced = checkpoints.displacement(PARAMS, pretrained, plan)
    (delta,) = [d for d in displaced.deltas if d is not None]
    np.testing.assert_array_equal(delta, 4)
    assert [a is None for a in displaced.anchors] == [d is None for d in displaced.deltas]


def test_the_anchor_need_not_hold_what_is_masked_out() -> None:
    plan = checkpoints.plan_of(PARAMS, None, optax_spd.path_mask("^body/"))
    pretrained = checkpoints.matched_anchor(PARAMS, {"body": ANCHOR["body"]}, plan)
    assert sum(leaf is not None for leaf in pretrained) == 1
    whole = checkpoints.plan_of(PARAMS, None, None)
    with pytest.raises(ValueError, match="anchor does not match params: it has no leaf at 'head'"):
        checkpoints.matched_anchor(PARAMS, {"body": ANCHOR["body"]}, whole)


def test_halves_are_measured_in_float32_and_come_back_as_halves() -> None:
    plan = checkpoints.plan_of(PARAMS, None, None)
    pretrained = checkpoints.matched_anchor(PARAMS, ANCHOR, plan)
    displaced = checkpoints.displacement(PARAMS, pretrained, plan)
    half = [None if d is None else jnp.asarray(0.5, d.dtype) for d in displaced.deltas]
    assert {d.dtype for d in displaced.deltas if d is not None} == {np.dtype("float32")}
    filled = displaced.filled(displaced.projected(half))
    assert filled["head"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(filled["head"].astype(jnp.float32), 0.5)
    np.testing.assert_array_equal(filled["body"]["kernel"], 3)
    assert filled["body"]["ids"] is PARAMS["body"]["ids"]
    assert filled["gap"] is None
