"""A state's fingerprint, and check_state after a restore."""

import collections
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.core import freeze

import optax_spd
from optax_spd.layers import fingerprints, plans

PARAMS = {
    "blocks": jnp.ones((2, 3)),
    "dense": {"bias": jnp.ones(3), "kernel": jnp.ones((2, 3))},
    "list": [jnp.ones(1) for _ in range(11)],
}
STACKED = optax_spd.stacked("blocks")
BODY = optax_spd.path_mask("^(?!dense/bias)")
OPTIONS: dict[str, Any] = {"layers": STACKED, "mask": BODY}
STATES: dict[str, Any] = {
    "adam_spd": optax_spd.adam_spd(0.1, **OPTIONS),
    "adam_tpgm": optax_spd.adam_tpgm(0.1, **OPTIONS),
    "sgd_ftp": optax_spd.sgd_ftp(0.1, **OPTIONS),
    "temp_balance": optax_spd.temp_balance(**OPTIONS),
    "in all wrappers": optax.MultiSteps(
        optax.apply_if_finite(
            optax_spd.with_gradient(
                optax_spd.with_anchor(
                    optax.chain(optax.sgd(0.1), optax_spd.spd(anchor="argument", **OPTIONS))
                )
            ),
            3,
        ),
        2,
    ),
}


@pytest.mark.parametrize("name", STATES)
def test_a_state_passes_for_its_own_layers_only(name: str) -> None:
    state = STATES[name].init(PARAMS)
    optax_spd.check_state(state, PARAMS, **OPTIONS)
    optax_spd.check_state(state, jax.eval_shape(lambda: PARAMS), **OPTIONS)
    optax_spd.check_state(jax.device_get(state), PARAMS, **OPTIONS)
    other = {k: v for k, v in PARAMS.items() if k != "list"} | {"lisp": PARAMS["list"]}
    for params, options in [
        (PARAMS, {"layers": STACKED}),  # another mask
        (PARAMS, {"mask": BODY}),  # other layers
        (PARAMS, {"layers": STACKED, "mask": optax_spd.path_mask("^(?!dense/kernel)")}),
        (other, OPTIONS),
    ]:
        with pytest.raises(ValueError, match="was made for other layers than the") as error:
            optax_spd.check_state(state, params, **options)
        assert "what init got" in str(error.value)


def test_containers_dtypes_and_an_update_change_nothing() -> None:
    tx = optax_spd.adam_spd(0.1)
    state = tx.init(PARAMS)
    _, state = jax.jit(tx.update)(PARAMS, state, PARAMS)
    # As restored: a list that came back as a dict of "0", "1", "10", and other containers.
    restored = PARAMS | {"list": {str(i): x for i, x in enumerate(PARAMS["list"])}}
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    for params in (restored, freeze(restored), collections.OrderedDict(PARAMS), half):
        optax_spd.check_state(state, params)


def test_a_state_made_under_vmap_passes() -> None:
    models = jax.tree.map(lambda x: jnp.stack([x, x + 1]), PARAMS)
    state = jax.vmap(optax_spd.adam_spd(0.1).init)(models)
    optax_spd.check_state(state, PARAMS)
    with pytest.raises(ValueError, match="other layers"):
        optax_spd.check_state(state, PARAMS, layers=STACKED)


def test_one_wrong_state_among_several_is_found() -> None:
    tx = optax_spd.chain(optax_spd.spd(), optax_spd.spd(mask=BODY))
    with pytest.raises(ValueError, match="The state SPDState was made for other layers"):
        optax_spd.check_state(tx.init(PARAMS), PARAMS)


def test_nothing_to_check_is_an_error() -> None:
    # What Orbax gives back without the structure: plain dicts.
    (_, stage) = optax_spd.adam_spd(0.1).init(PARAMS)
    for state in ({"1": stage._asdict()}, optax.adam(0.1).init(PARAMS), {}):
        with pytest.raises(ValueError, match="The state holds no values per layer"):
            optax_spd.check_state(state, PARAMS)
    with pytest.raises(TypeError, match="layers must be a function"):
        optax_spd.check_state(stage, PARAMS, layers="blocks")  # type: ignore[arg-type]


def test_the_upper_half_is_that_of_the_arrays() -> None:
    whole, split = (
        fingerprints.of_plan(plans.planned(PARAMS, layers, None).plan) for layers in (None, STACKED)
    )
    assert whole.dtype == jnp.int32
    assert whole.shape == ()
    assert whole != split
    names = ["blocks", "dense/bias", "dense/kernel", *(f"list/{i}" for i in range(11))]
    for found in (whole, split):
        assert fingerprints.arrays_half(found) == fingerprints.of_arrays(reversed(names))
    assert fingerprints.of_arrays(names) != fingerprints.of_arrays(names[1:])
    negative = np.array([-1, 0x7FFF0001], np.int32)
    np.testing.assert_array_equal(fingerprints.arrays_half(negative), [0xFFFF, 0x7FFF])


def test_other_stacked_axes_of_a_square_array_are_other_layers() -> None:
    params = {"w": jnp.ones((3, 3))}
    state = optax_spd.spd(layers=optax_spd.stacked("w", 0)).init(params)
    with pytest.raises(ValueError, match="made for other layers"):
        optax_spd.check_state(state, params, layers=optax_spd.stacked("w", 1))
