"""How the raw gradient gets to the stages: what is forwarded, what wins, what is said without it.

A probe in the place of a method records what it is handed.
"""

from typing import Any

import jax
import numpy as np
import optax
import pytest

import optax_spd

PARAMS = {"a": np.array([3.0, 4.0], np.float32)}
GRADS = {"a": np.array([60.0, 80.0], np.float32)}


def probe(seen: list[dict[str, Any]]) -> optax.GradientTransformationExtraArgs:
    """Passes updates through; notes them and the extra arguments."""

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> Any:
        seen.append({"updates": updates, "params": params, **extra_args})
        return updates, state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def step(tx: optax.GradientTransformation, **extra_args: Any) -> Any:
    update = optax.with_extra_args_support(tx).update
    return update(GRADS, tx.init(PARAMS), PARAMS, **extra_args)


def test_every_stage_inside_gets_what_the_wrapper_received() -> None:
    first: list[dict[str, Any]] = []
    last: list[dict[str, Any]] = []
    step(optax_spd.with_gradient(optax.chain(probe(first), optax.scale(-0.1), probe(last))))
    assert first[0]["grad"] is GRADS
    assert last[0]["grad"] is GRADS
    assert last[0]["params"] is PARAMS
    np.testing.assert_allclose(last[0]["updates"]["a"], -0.1 * GRADS["a"])


def test_chain_is_with_gradient_around_optax_chain() -> None:
    seen: list[dict[str, Any]] = []
    tx = optax_spd.chain(optax.scale(-1.0), probe(seen))
    same = optax_spd.with_gradient(optax.chain(optax.scale(-1.0), probe(seen)))
    state = tx.init(PARAMS)
    assert jax.tree.structure(state) == jax.tree.structure(same.init(PARAMS))
    updates, _ = step(tx)
    expected, _ = step(same)
    np.testing.assert_array_equal(updates["a"], expected["a"])
    assert [s["grad"] is GRADS for s in seen] == [True, True]


def test_a_gradient_that_the_caller_passes_wins() -> None:
    other = {"a": np.zeros(2, np.float32)}
    seen: list[dict[str, Any]] = []
    step(optax_spd.chain(probe(seen)), grad=other)
    assert seen[0]["grad"] is other
    step(optax_spd.chain(probe(seen)), grad=None)  # as a trainer passes what it does not have
    assert seen[1]["grad"] is GRADS


def test_other_extra_arguments_pass_through() -> None:
    seen: list[dict[str, Any]] = []
    step(optax_spd.chain(probe(seen)), value=1.5, anchor=PARAMS)
    assert seen[0]["value"] == 1.5
    assert seen[0]["anchor"] is PARAMS


def test_behind_clipping_a_stage_still_sees_the_unclipped_gradient() -> None:
    seen: list[dict[str, Any]] = []
    step(optax_spd.chain(optax.clip_by_global_norm(1.0), probe(seen)))
    np.testing.assert_allclose(seen[0]["updates"]["a"], GRADS["a"] / 100, rtol=1e-6)
    np.testing.assert_array_equal(seen[0]["grad"]["a"], GRADS["a"])


@pytest.mark.parametrize(
    ("update", "fires"), [("gradient", True), ("descent", False)], ids=["gradient", "own update"]
)
def test_judged_by_the_update_spd_would_not_have_fired(update: str, fires: bool) -> None:
    # Why there is no silent fallback: -u is what a stage would take for the gradient.
    tx = optax.chain(optax.sgd(-0.1), optax_spd.spd(anchor="zero"))
    grad = GRADS if update == "gradient" else jax.tree.map(lambda g: -0.1 * g, GRADS)
    _, state = step(tx, grad=grad)
    assert bool(optax.tree.get(state, "spd_ratio")[0] > 0) == fires


def test_an_empty_chain_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one stage"):
        optax_spd.chain()


@pytest.mark.parametrize("wrap", [optax_spd.with_gradient, optax_spd.chain])
def test_multi_steps_belongs_outside(wrap: Any) -> None:
    steps = optax.MultiSteps(optax_spd.adam_spd(0.1), 2)
    with pytest.raises(ValueError, match="Put it inside"):
        wrap(steps)


@pytest.mark.parametrize("stage", [optax_spd.spd, [optax.adam(0.1), optax_spd.spd(1.0)]])
def test_what_is_no_stage_is_refused(stage: Any) -> None:
    with pytest.raises(TypeError, match=r"must be called .* unpacked"):
        optax_spd.chain(stage)
