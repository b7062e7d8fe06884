"""What validation_fn gets to see, what a sick loss or gradient does, and what is refused."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tpgm_steps import (
    arrays,
    assert_close,
    half_distance,
    projects_only,
    radii_of,
    stepper,
)

import optax_spd


def nested(seed: int) -> dict[str, Any]:
    """A model with all kinds of leaves; ``head`` is masked out."""
    draw = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(draw.normal(size=shape), jnp.float32)
    return {
        "dense": {"bias": normal(3), "kernel": normal(2, 3)},
        "empty": {},
        "head": {"kernel": normal(3, 2)},
        "missing": None,
        "steps": jnp.arange(3) if seed == 0 else jnp.ones(3, jnp.int32),
    }


@pytest.mark.parametrize("every", [1, 2])
def test_validation_sees_the_whole_tree_as_it_would_be_next(every: int) -> None:
    params, updates = nested(0), nested(1)
    seen: list[Any] = []

    def loss(now: Any, batch: Any) -> jax.Array:
        assert jax.tree.structure(now) == jax.tree.structure(params)
        jax.debug.callback(seen.append, now)
        return batch * sum(jnp.sum(x) for x in jax.tree.leaves(now))

    # At a rate of 0 the radii stay at their start, and the step ends where validation was.
    tx = optax_spd.tpgm(optax.sgd(0.0), mask=optax_spd.path_mask("dense"), every=every)
    new, _ = stepper(tx, loss)(params, tx.init(params), updates, jnp.ones(2))
    jax.effects_barrier()
    assert len(seen) == 2
    for now in seen:
        assert_close(jax.tree.map(jnp.asarray, now), new)
    for path in ("head", "steps"):  # at their tentative values
        assert_close(new[path], jax.tree.map(jnp.add, params[path], updates[path]))
    assert not np.allclose(new["dense"]["bias"], params["dense"]["bias"])
    tentative = params["dense"]["bias"] + updates["dense"]["bias"]
    assert not np.allclose(new["dense"]["bias"], tentative)


@pytest.mark.parametrize("gap", [None, optax.MaskedNode()], ids=repr)
def test_an_array_without_an_update_is_seen_as_it_is(gap: Any) -> None:
    params, updates = arrays(0), arrays(1)
    updates["dense/kernel"] = gap
    seen: list[Any] = []

    def loss(now: Any, batch: Any) -> Any:
        jax.debug.callback(seen.append, now["dense/kernel"])
        return half_distance(now, batch)

    tx = optax_spd.tpgm()
    state = tx.init(params)
    extra = {"validation_fn": loss, "validation_batches": arrays(2, 2)}
    new, state = jax.jit(lambda u, s: tx.update(u, s, params, **extra))(updates, state)
    jax.effects_barrier()
    np.testing.assert_array_equal(seen[0], params["dense/kernel"])
    assert type(new["dense/kernel"]) is type(gap)
    still = optax_spd.layer_names(params).index("dense/kernel")
    np.testing.assert_array_equal(radii_of(state) == 0, np.arange(5) == still)


@projects_only
def test_a_layer_that_is_sick_at_first_starts_later() -> None:
    anchor, updates = arrays(0), arrays(1)
    updates["dense/bias"][0] = np.nan
    tx = optax_spd.tpgm()
    step = stepper(tx)
    _, state = step(anchor, tx.init(anchor), updates)
    names = optax_spd.layer_names(anchor)
    np.testing.assert_array_equal(state.tpgm_started, [name != "dense/bias" for name in names])
    _, state = step(anchor, state, arrays(1))
    half = np.abs(arrays(1)["dense/bias"]).sum() / 2
    np.testing.assert_allclose(radii_of(state)[names.index("dense/bias")], half, rtol=1e-6)


BATCHES = arrays(1, 2)


@pytest.mark.parametrize(
    ("function", "batches", "words"),
    [
        (half_distance, None, "but no validation_batches"),
        (None, BATCHES, "but no validation_fn"),
        (half_distance, np.ones((0, 3)), "must have a leading axis"),
        (lambda p, b: p["dense/bias"] * b, np.ones(2), r"must return one real .*float32\[4\]"),
    ],
)
def test_wrong_validation_is_refused(function: Any, batches: Any, words: str) -> None:
    params = arrays(0)
    extra = {"validation_fn": function, "validation_batches": batches}
    for tx in (optax_spd.tpgm(), optax_spd.adam_tpgm(0.1, every=2)):
        update = lambda tx=tx: tx.update(params, tx.init(params), params, **extra)
        with pytest.raises(ValueError, match=words):
            jax.eval_shape(update)


@pytest.mark.parametrize(("every", "error"), [(np.int64(-3), ValueError), (True, TypeError)])
def test_every_is_a_positive_integer(every: Any, error: Any) -> None:
    for build in (optax_spd.tpgm, functools.partial(optax_spd.adam_tpgm, 0.1)):
        with pytest.raises(error, match="every must be"):
            build(every=every)


def test_radii_are_checked() -> None:
    for radii in (-0.1, np.nan, [1.0, -1.0, 1.0, 1.0, 1.0]):
        with pytest.raises(ValueError, match="radii must not be negative or NaN"):
            optax_spd.tpgm(radii=radii)
    with pytest.raises(ValueError, match="radii must be a scalar or hold one value for each of"):
        optax_spd.tpgm(radii=[1.0, 2.0]).init(arrays(0))
