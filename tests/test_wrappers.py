"""How the raw gradient gets to the stages: what is forwarded, what wins, what is refused.

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


WRAPPERS: dict[str, Any] = {
    "with_anchor": optax_spd.with_anchor,
    "with_frozen": lambda inner: optax_spd.with_frozen(inner, "embedding"),
    "with_sparse": lambda inner: optax_spd.with_sparse(inner, 0.5),
}


def probe(seen: list[dict[str, Any]]) -> optax.GradientTransformationExtraArgs:
    """Passes updates through; notes them and the extra arguments."""

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> Any:
        seen.append({"updates": updates, "params": params, **extra_args})
        return updates, state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def step(tx: optax.GradientTransformation, **extra_args: Any) -> Any:
    update = optax.with_extra_args_support(tx).update
    return update(GRADS, tx.init(PARAMS), PARAMS, **extra_args)


@pytest.mark.parametrize("form", ["with_gradient", "chain", "nested"])
def test_every_stage_inside_gets_what_the_wrapper_received(form: str) -> None:
    seen: list[dict[str, Any]] = []
    stages = probe(seen), optax.clip_by_global_norm(1.0), probe(seen)
    tx = {
        "with_gradient": lambda: optax_spd.with_gradient(optax.chain(*stages)),
        "chain": lambda: optax_spd.chain(*stages),
        "nested": lambda: optax_spd.chain(stages[0], optax_spd.chain(*stages[1:])),
    }[form]()
    updates, state = step(tx, value=1.5)
    np.testing.assert_allclose(updates["a"], GRADS["a"] / 100, rtol=1e-6)
    if form != "nested":
        assert jax.tree.structure(state) == jax.tree.structure(optax.chain(*stages).init(PARAMS))
    for found in seen:  # behind the clipping the unclipped gradient, too
        assert found["grad"] is GRADS
        assert found["params"] is PARAMS
        assert found["value"] == 1.5
    np.testing.assert_array_equal(seen[1]["updates"]["a"], updates["a"])


def test_a_gradient_that_the_caller_passes_wins() -> None:
    other = {"a": np.zeros(2, np.float32)}
    seen: list[dict[str, Any]] = []
    step(optax_spd.chain(probe(seen)), grad=other)
    assert seen[0]["grad"] is other
    step(optax_spd.chain(probe(seen)), grad=None)  # as a trainer passes what it does not have
    assert seen[1]["grad"] is GRADS


def test_what_is_no_stage_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one stage"):
        optax_spd.chain()
    for stage in (optax_spd.spd, [optax.adam(0.1), optax_spd.spd(1.0)]):
        with pytest.raises(TypeError, match=r"must be called .* unpacked"):
            optax_spd.chain(stage)  # type: ignore[arg-type]
    accumulator = optax.MultiSteps(optax_spd.adam_spd(0.1), 2)
    for wrap in (optax_spd.with_gradient, optax_spd.chain):
        for form in (accumulator, accumulator.gradient_transformation()):
            with pytest.raises(ValueError, match="Put it inside"):
                wrap(form)  # type: ignore[arg-type]
    for wrap in WRAPPERS.values():
        with pytest.raises(TypeError, match=r"takes a gradient transformation.* must be called"):
            wrap(optax.adam)


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("form", ["MultiSteps", "gradient_transformation"])
def test_wrappers_around_multi_steps_pass_on_all_but_the_micro_gradient(
    wrapper: str, form: str
) -> None:
    def inner() -> Any:
        return optax.chain(optax.sgd(0.1), optax_spd.l2_sp(0.1, anchor="argument"))

    def run(tx: Any) -> Any:
        params = {"a": np.array([3.0, 4.0], np.float32), "embedding": np.ones(2, np.float32)}
        anchor, state = jax.tree.map(np.zeros_like, params), tx.init(params)
        for scale in (1.0, 3.0):
            grads = jax.tree.map(lambda x, scale=scale: scale * x, params)
            extra = {"anchor": anchor, "grad": grads}
            updates, state = tx.update(grads, state, params, **extra)
        return updates

    accumulator = optax.MultiSteps(optax_spd.with_gradient(inner()), 2)
    if form == "gradient_transformation":
        accumulator = accumulator.gradient_transformation()
    found = run(WRAPPERS[wrapper](accumulator))
    assert np.any(found["a"])
    steps = optax.MultiSteps(optax_spd.with_gradient(WRAPPERS[wrapper](inner())), 2)
    jax.tree.map(np.testing.assert_allclose, found, run(steps))
