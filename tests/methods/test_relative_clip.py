"""SIBERT's clip against recorded trajectories, and its corner cases."""

import functools
from typing import Any

import golden
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import replays

import optax_spd
from optax_spd.methods.relative_clip import relative_factor

# Without a decay the recorded rule stops all training.
CASES = [case for case in golden.settings("sibert") if case["weight_decay"]]
by_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])


@functools.cache
def program(mask: tuple[tuple[str, bool], ...]) -> Any:
    def run(recorded: replays.Recording, decay: Any, clipping: Any) -> Any:
        rate = lambda count: recorded.rates[count]
        tx = optax.chain(
            optax_spd.clip_by_relative_norm(rate, decay, clipping, mask=dict(mask)),
            optax.add_decayed_weights(decay),
            optax.sgd(rate),
        )
        return replays.run(tx, recorded)

    return jax.jit(run)


def replayed(case: dict[str, Any], layout: str, dtype: Any) -> float:
    recorded = replays.recording("sibert", case, layout, dtype)
    mask = tuple((t["name"], t["scale_invariant"]) for t in case["tensors"])
    params = program(mask)(recorded, case["weight_decay"], np.sqrt(case["C"]).item())
    assert {x.dtype for x in params.values()} == {np.dtype(dtype)}
    return replays.largest_error("sibert", case, layout, params)


@pytest.mark.parametrize("layout", ["PyTorch", "Flax", "stacked with zeros"])
@by_case
def test_replays_the_recorded_rule(case: dict[str, Any], layout: str, x64: None) -> None:
    assert replayed(case, layout, np.float64) <= 1e-9


@by_case
def test_replays_the_recorded_rule_in_float32(case: dict[str, Any]) -> None:
    assert replayed(case, "PyTorch", np.float32) <= 1e-5


@pytest.mark.parametrize(
    ("norms", "rate", "decay", "clipping", "expected"),
    [
        ((2.0, 4.0), 0.1, 0.05, 1.0, 0.5),
        ((2.0, 4.0), 0.1, 0.05, 4.0, 1.0),
        ((2.0, 4.0), 0.0, 0.05, 1.0, 1.0),  # no rate, no step
        ((2.0, 4.0), 0.1, 0.0, 1.0, 1.0),  # off
        ((2.0, 4.0), 0.0, 0.0, 1.0, 1.0),
        ((2.0, 4.0), 1e-38, 1.0, 1.0, 1.0),
        ((2.0, 0.0), 0.1, 0.05, 1.0, 1.0),
        ((0.0, 4.0), 0.1, 0.05, 1.0, 0.0),
        ((0.0, 0.0), 0.1, 0.05, 1.0, 1.0),
        ((2.0, 4.0), 0.1, 0.05, 0.0, 0.0),
    ],
)
def test_the_factor(
    norms: Any, rate: float, decay: float, clipping: float, expected: float
) -> None:
    arguments = [jnp.float32(x) for x in (*norms, rate, decay, clipping)]
    with jax.debug_nans(True):
        np.testing.assert_allclose(relative_factor(*arguments), expected, rtol=1e-6)
        slopes = jax.grad(relative_factor, argnums=(0, 1, 2, 3, 4))(*arguments)
    assert np.isfinite(slopes).all()


def test_without_a_decay_no_bit_changes() -> None:
    """By the formula nothing would move any more."""
    tx = optax_spd.clip_by_relative_norm(0.1, lambda count: jnp.where(count == 0, 0.0, 1e-3), 0.1)
    params, grads = {"w": jnp.array([3.0, 4.0])}, {"w": jnp.array([30.0, 1.0])}
    updates, state = tx.update(grads, tx.init(params), params)
    np.testing.assert_array_equal(updates["w"], grads["w"])
    updates, _ = tx.update(grads, state, params)
    expected = 0.1 * np.sqrt(2 * 1e-3 / 0.1) * 5
    np.testing.assert_allclose(np.linalg.norm(updates["w"]), expected, rtol=1e-6)


@pytest.mark.parametrize("where", ["params", "grads"])
def test_an_array_that_is_not_finite_spoils_no_other(where: str) -> None:
    trees = {
        "params": {"sick": np.ones(2, np.float32), "well": np.array([3.0, 4.0], np.float32)},
        "grads": {"sick": np.ones(2, np.float32), "well": np.array([30.0, 40.0], np.float32)},
    }
    trees[where]["sick"] = np.array([np.nan, 1.0], np.float32)
    tx = optax_spd.clip_by_relative_norm(2.0, 1.0, 1.0)
    found, _ = tx.update(trees["grads"], tx.init(trees["params"]), trees["params"])
    np.testing.assert_allclose(found["well"], [3.0, 4.0], rtol=1e-6)


def test_a_negative_rate_is_refused() -> None:
    with pytest.raises(ValueError, match="learning_rate must be finite and at least 0, got -1"):
        optax_spd.clip_by_relative_norm(-1.0, 0.1)
