"""What a step of TPGM runs and keeps: when it validates, compilation, memory, Optax's wrappers."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tpgm_steps import (
    Counter,
    arrays,
    assert_close,
    assert_same_bits,
    equations,
    half_distance,
    radii_of,
    stepper,
)

import optax_spd

# When it validates --------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [1, 2, 3, np.int64(2)], ids=repr)
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


def test_the_last_of_several_steps_may_be_without_data() -> None:
    # Calls count, whether there was validation data or not.
    anchor, count = arrays(0), Counter()
    tx = optax_spd.tpgm(every=2)
    step, params, state = stepper(tx, count), anchor, tx.init(anchor)
    for data, runs in ((False, 0), (True, 0), (True, 3), (True, 0), (False, 0), (True, 0)):
        params, state = step(params, state, arrays(1), arrays(2, 3) if data else None)
        assert count.taken() == runs


def names_in(jaxpr: Any) -> list[str]:
    return [equation.primitive.name for equation in equations(jaxpr)]


@pytest.mark.parametrize("every", [1, 4])
@pytest.mark.parametrize("norm", ["l2", "mars"])
def test_one_scan_under_one_cond(norm: str, every: int) -> None:
    params, tx = arrays(0), optax_spd.tpgm(norm=norm, every=every)
    state = tx.init(params)

    def update(updates: Any, state: Any, params: Any, batches: Any) -> Any:
        extra = {"validation_fn": half_distance, "validation_batches": batches}
        return tx.update(updates, state, params, **extra)

    jaxpr = jax.make_jaxpr(update)(params, state, params, arrays(1, 7)).jaxpr
    found = names_in(jaxpr)
    assert found.count("scan") == 1
    assert found.count("while") == 0
    assert found.count("cond") == (every > 1)
    if every > 1:
        (cond,) = (e for e in equations(jaxpr) if e.primitive.name == "cond")
        scans = [names_in(branch.jaxpr).count("scan") for branch in cond.params["branches"]]
        assert sorted(scans) == [0, 1]
    forbidden = ("callback", "device_put", "infeed", "outfeed", "print")
    assert not [name for name in found if any(word in name for word in forbidden)]


# Compilation and memory ---------------------------------------------------------------------------

RADIUS_OPTIMIZERS: dict[str, Any] = {
    "default": lambda: None,
    "sgd with momentum": lambda: optax.sgd(0.05, momentum=0.9),
    "a schedule": lambda: optax.adam(optax.linear_schedule(0.1, 0.01, 10)),
    "injected": lambda: optax.inject_hyperparams(optax.adam)(learning_rate=0.05),
    "injected schedule": lambda: optax.inject_hyperparams(optax.sgd)(
        learning_rate=optax.linear_schedule(0.1, 0.01, 10)
    ),
}


@pytest.mark.parametrize(
    ("optimizer", "every"), [("default", 1)] + [(name, 2) for name in RADIUS_OPTIMIZERS]
)
def test_later_steps_compile_nothing(optimizer: str, every: int) -> None:
    anchor, count = jax.tree.map(jnp.asarray, arrays(0)), Counter()
    tx = optax_spd.adam_tpgm(
        optax.linear_schedule(0.1, 0.05, 3),
        radius_optimizer=RADIUS_OPTIMIZERS[optimizer](),
        every=every,
    )
    step, params, state = stepper(tx, count), anchor, tx.init(anchor)
    types = jax.tree.map(jax.typeof, state)
    traces = 0
    for index in range(4):
        params, state = step(params, state, arrays(10 + index), arrays(5, 2))
        traces = traces or count.traces
        assert count.traces == traces
        assert jax.tree.map(jax.typeof, state) == types
    assert step._cache_size() == 1
    assert np.all(radii_of(state) > 0)


def test_a_scheduled_radius_rate_counts_inner_steps() -> None:
    # Sign descent moves each radius by the rate: 1 + 1/2 + 1/4, then 1/8 + ...
    schedule = lambda count: 0.5**count
    tx = optax_spd.tpgm(optax.sign_sgd(schedule), norm="l2", radii=1.0, anchor="zero")
    params, state = {"w": jnp.array([60.0, 80.0])}, None
    step, state = stepper(tx), tx.init({"w": jnp.zeros(2)})
    batches = {"w": np.full((3, 2), 1000.0, np.float32)}
    zeros = {"w": jnp.zeros(2)}
    params, state = step(params, state, zeros, batches)
    np.testing.assert_allclose(radii_of(state), [2.75], rtol=1e-6)
    _, state = step({"w": jnp.array([60.0, 80.0])}, state, zeros, batches)
    np.testing.assert_allclose(radii_of(state), [2.75 + 0.125 + 0.0625 + 0.03125], rtol=1e-6)


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

STATIC = (
    "mu_dtype",
    "radius_optimizer",
    "norm",
    "anchor",
    "anchor_dtype",
    "layers",
    "mask",
    "axis_name",
)


def test_injected_hyperparameters_change_nothing_and_can_be_changed() -> None:
    options: dict[str, Any] = {
        "learning_rate": optax.linear_schedule(0.1, 0.0, 5),
        "radius_optimizer": optax.adam(0.05),
        "every": 2,
        "norm": "l2",
    }
    plain = optax_spd.adam_tpgm
    injected = optax.inject_hyperparams(plain, static_args=STATIC)
    count = Counter()
    runs = []
    for tx, loss in ((plain(**options), half_distance), (injected(**options), count)):
        step, params, state = stepper(tx, loss), arrays(0), tx.init(arrays(0))
        for index in range(3):
            params, state = step(params, state, arrays(10 + index), arrays(5, 2))
        runs.append((params, radii_of(state)))
    assert_close(*runs)
    assert count.taken() == 4  # two batches on each of steps 0 and 2
    state.hyperparams["every"] = jnp.asarray(3)
    for runs_now in (2, 0, 0, 2):  # steps 3, 4, 5, 6
        params, state = step(params, state, arrays(1), arrays(5, 2))
        assert count.taken() == runs_now


K = 3


def accumulated_by_hand(norm: str, batches: list[Any], gradients: list[Any]) -> Any:
    """Adam and TPGM on mean gradients, with the validation batches of the last micro-step."""
    tx = optax_spd.adam_tpgm(0.1, radius_optimizer=optax.adam(0.05), norm=norm)
    step, params, state = stepper(tx), arrays(0), tx.init(arrays(0))
    for index in range(0, len(gradients), K):
        mean = jax.tree.map(lambda *g: np.mean(g, axis=0), *gradients[index : index + K])
        params, state = step(params, state, mean, batches[index + K - 1])
    return params, radii_of(state)


@pytest.mark.parametrize(("place", "norm"), [("inside", "mars"), ("outside", "l2")])
def test_accumulated_gradients(place: str, norm: str) -> None:
    gradients = [arrays(10 + index) for index in range(2 * K)]
    batches = [arrays(30 + index, 4) for index in range(2 * K)]
    radius_optimizer = optax.adam(0.05)
    tx: Any
    if place == "inside":  # validates on every micro-step, and drops all but the last
        recipe = optax_spd.adam_tpgm(0.1, radius_optimizer=radius_optimizer, norm=norm)
        tx = optax.MultiSteps(recipe, K)
    else:
        tx = optax.chain(
            optax.MultiSteps(optax.adam(0.1), K).gradient_transformation(),
            optax.conditionally_transform(
                optax_spd.tpgm(radius_optimizer, norm=norm), lambda step: step % K == K - 1
            ),
        )
    count = Counter()
    step, params, state = stepper(tx, count), arrays(0), tx.init(arrays(0))
    for index in range(2 * K):
        before = (params, radii_of(state))
        params, state = step(params, state, gradients[index], batches[index])
        emits = index % K == K - 1
        assert count.taken() == (4 if emits or place == "inside" else 0)
        if not emits:
            assert_same_bits((params, radii_of(state)), before)
    assert_close((params, radii_of(state)), accumulated_by_hand(norm, batches, gradients))
    assert any(np.any(params[path] != arrays(0)[path]) for path in params)


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
