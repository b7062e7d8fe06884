"""What a step of TPGM runs and keeps: when it validates, compilation, memory, Optax's wrappers."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax_support import equations, primitives
from tpgm_steps import (
    Counter,
    arrays,
    assert_same_bits,
    half_distance,
    projects_only,
    radii_of,
    stepper,
)

import optax_spd

# When it validates --------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [1, 3, np.int64(2)], ids=repr)
def test_radii_are_learned_on_each_kth_step_only(every: Any) -> None:
    anchor, count = arrays(0), Counter()
    tx = optax_spd.tpgm(optax.sgd(0.05), every=every)
    step, params, state = stepper(tx, count), anchor, tx.init(anchor)
    batches = arrays(5, 4)
    for index in range(5):
        # The deviations grow, so that no clip changes a radius that is not learned.
        updates = {path: 0.5 * x for path, x in arrays(1).items()}
        before = radii_of(state)
        params, state = step(params, state, updates, batches)
        learns = index % every == 0
        assert count.taken() == (4 if learns else 0)
        assert np.array_equal(radii_of(state), before) != learns
    assert state.count == 5


@projects_only
def test_the_last_of_several_steps_may_be_without_data() -> None:
    # Calls count, whether there was validation data or not.
    anchor, count = arrays(0), Counter()
    tx = optax_spd.tpgm(every=2)
    step, params, state = stepper(tx, count), anchor, tx.init(anchor)
    for data, runs in ((False, 0), (True, 0), (True, 3), (True, 0), (False, 0), (True, 0)):
        params, state = step(params, state, arrays(1), arrays(2, 3) if data else None)
        assert count.taken() == runs


@pytest.mark.parametrize(("norm", "every"), [("l2", 1), ("mars", 4)])
def test_one_scan_under_one_cond(norm: Any, every: int) -> None:
    params, tx = arrays(0), optax_spd.tpgm(norm=norm, every=every)
    extra = {"validation_fn": half_distance, "validation_batches": arrays(1, 7)}
    update = lambda updates, state: tx.update(updates, state, params, **extra)
    jaxpr = jax.make_jaxpr(update)(params, tx.init(params)).jaxpr
    found = list(primitives(jaxpr))
    assert [found.count(name) for name in ("scan", "while", "cond")] == [1, 0, every > 1]
    for cond in (e for e in equations(jaxpr) if e.primitive.name == "cond"):
        scans = [[*primitives(branch.jaxpr)].count("scan") for branch in cond.params["branches"]]
        assert sorted(scans) == [0, 1]


# Rates and memory ---------------------------------------------------------------------------


def test_a_scheduled_radius_rate_counts_inner_steps() -> None:
    # Sign descent moves each radius by the rate: 1 + 1/2 + 1/4, then 1/8 + ...
    schedule = lambda count: 0.5**count
    tx = optax_spd.tpgm(optax.sign_sgd(schedule), norm="l2", radii=1.0, anchor="zero")
    params, zeros = {"w": jnp.array([60.0, 80.0])}, {"w": jnp.zeros(2)}
    step, state = stepper(tx), tx.init(zeros)
    for expected in (2.75, 2.75 + 0.125 + 0.0625 + 0.03125):
        _, state = step(params, state, zeros, {"w": np.full((3, 2), 1000.0, np.float32)})
        np.testing.assert_allclose(radii_of(state), [expected], rtol=1e-6)


def test_memory_does_not_grow_with_the_inner_steps() -> None:
    params = {"first": np.ones((256, 128), np.float32), "second": np.ones((128, 256), np.float32)}
    size = sum(x.nbytes for x in params.values())
    tx = optax_spd.tpgm(every=2)

    def loss(params: Any, batch: jax.Array) -> jax.Array:
        return jnp.mean(jnp.tanh(batch @ params["first"]) @ params["second"])

    def scratch(inner_steps: int) -> int:
        batches = np.ones((inner_steps, 4, 256), np.float32)
        compiled = stepper(tx, loss).lower(params, tx.init(params), params, batches).compile()
        return int(compiled.memory_analysis().temp_size_in_bytes)

    few, many = scratch(2), scratch(64)
    assert few > 0
    assert many - few < size / 10


# Optax's wrappers ---------------------------------------------------------------------------------


def test_every_may_be_injected_and_changed() -> None:
    other = ("radius_optimizer", "norm", "radii", "anchor", "anchor_dtype", "layers", "mask")
    tx = optax.inject_hyperparams(optax_spd.tpgm, static_args=(*other, "axis_name"))(every=2)
    count = Counter()
    step, params, state = stepper(tx, count), arrays(0), tx.init(arrays(0))
    for every, runs in ((2, 2), (2, 0), (2, 2), (3, 2), (3, 0), (3, 0), (3, 2)):
        state.hyperparams["every"] = jnp.asarray(every)
        params, state = step(params, state, arrays(1), arrays(5, 2))
        assert count.taken() == runs


K = 3


def test_behind_accumulated_gradients_it_validates_only_where_they_are_applied() -> None:
    tx: Any = optax.chain(
        optax.MultiSteps(optax.adam(0.1), K).gradient_transformation(),
        optax.conditionally_transform(optax_spd.tpgm(), lambda step: step % K == K - 1),
    )
    count = Counter()
    step, params, state = stepper(tx, count), arrays(0), tx.init(arrays(0))
    for index in range(2 * K):
        before = (params, radii_of(state))
        params, state = step(params, state, arrays(10 + index), arrays(30 + index, 4))
        emits = index % K == K - 1
        assert count.taken() == (4 if emits else 0)
        if emits:
            assert np.all(radii_of(state) != before[1])
        else:
            assert_same_bits((params, radii_of(state)), before)


@pytest.mark.parametrize(
    "optimizer",
    [optax.polyak_sgd(), optax.chain(optax.adam(0.1), optax.contrib.reduce_on_plateau())],
    ids=["polyak_sgd", "reduce_on_plateau"],
)
def test_the_radius_optimizer_is_told_the_loss(optimizer: Any) -> None:
    params = {"a": jnp.zeros(2)}
    tx = optax_spd.tpgm(optimizer, norm="l2")
    extra = {
        "validation_fn": lambda params, batch: jnp.sum((params["a"] - batch) ** 2),
        "validation_batches": jnp.ones((20, 2)),
    }
    _, state = tx.update({"a": jnp.array([3.0, 4.0])}, tx.init(params), params, **extra)
    # (3, 4) times 0.28 is nearest to (1, 1); the radius began at 2.5.
    assert abs(float(state.tpgm_radii[0]) - 1.4) < 0.9
