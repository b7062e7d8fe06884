"""Per-layer factors on a tree of updates."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_spd
from optax_spd.core import scaling
from optax_spd.layers import plans

PARAMS = {
    "blocks": jnp.ones((2, 3), jnp.bfloat16),
    "dense": {"bias": jnp.ones(3), "kernel": jnp.ones((2, 3))},
    "ids": jnp.arange(2),
    "none": None,
}
FLAT, PLAN, _ = plans.planned(PARAMS, optax_spd.stacked("blocks"), None)
SCALE = jnp.array([2.0, 0.0, 3.0, 0.5])  # blocks[0], blocks[1], the bias, the kernel


def updates() -> dict[str, Any]:
    return {
        "blocks": jnp.array([[1.0, 2, 3], [4, 5, np.nan]], jnp.bfloat16),
        "dense": {"bias": None, "kernel": jnp.full((2, 3), 4.0, jnp.float16)},
        "ids": jnp.arange(2),
        "none": optax.MaskedNode(),
    }


def test_each_layer_is_scaled_by_its_own_factor_in_the_updates_dtype() -> None:
    given = updates()
    found = scaling.scaled(given, FLAT, PLAN, SCALE)
    # A factor of 0 stops a layer, also one whose update is not finite.
    np.testing.assert_array_equal(found["blocks"], [[2, 4, 6], [0, 0, 0]])
    np.testing.assert_array_equal(found["dense"]["kernel"], np.full((2, 3), 2.0))
    assert (found["blocks"].dtype, found["dense"]["kernel"].dtype) == (jnp.bfloat16, jnp.float16)
    assert found["dense"]["bias"] is None
    assert found["ids"] is given["ids"]
    assert found["none"] == optax.MaskedNode()


def test_factors_that_are_not_zero_pass_on_what_is_not_finite() -> None:
    found = scaling.scaled(updates(), FLAT, PLAN, jnp.full(4, 2.0))
    np.testing.assert_array_equal(found["blocks"].astype(float), [[2, 4, 6], [8, 10, np.nan]])


def test_arrays_of_which_no_layer_is_scalable_pass_through() -> None:
    given, scalable = updates(), np.array([False, False, True, True])
    found = scaling.scaled(given, FLAT, PLAN, SCALE, scalable)
    assert found["blocks"] is given["blocks"]
    np.testing.assert_array_equal(found["dense"]["kernel"], np.full((2, 3), 2.0))
    # One layer of an array is enough; the others' factors are 1 then.
    one = np.array([True, False, False, False])
    found = scaling.scaled(given, FLAT, PLAN, SCALE.at[1].set(1), one)
    np.testing.assert_array_equal(found["blocks"].astype(float), [[2, 4, 6], [4, 5, np.nan]])
    assert found["dense"]["kernel"] is given["dense"]["kernel"]


def test_complex_updates_and_other_trees_are_refused() -> None:
    wrong = updates() | {"blocks": jnp.ones((2, 3), jnp.complex64)}
    with pytest.raises(TypeError, match="updates is complex at 'blocks'"):
        scaling.scaled(wrong, FLAT, PLAN, SCALE)
    with pytest.raises(ValueError, match="updates does not match params"):
        scaling.scaled(updates() | {"more": jnp.ones(1)}, FLAT, PLAN, SCALE)
