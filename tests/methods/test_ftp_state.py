"""What FTP remembers of each layer: with missing gradients, and what that costs.

The original counts all layers' steps with one counter and keeps NaN for good; here each layer has
steps, radius, moments and C of its own.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest

import optax_spd
from optax_spd import LayerSpec

STEPS = 8


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def by_layer(state: Any, index: int) -> tuple[float, ...]:
    """Radius, steps and moments of one layer."""
    vectors = (state.ftp_radii, *state.ftp_moments)
    return tuple(vector[index].item() for vector in vectors)


# Missing gradients -------------------------------------------------------------------------------

# Alike in shape, so that eager operations are compiled once.
PARAMS = {name: jnp.asarray(normal(i, 3, 4)) for i, name in enumerate("abc")}
GRADS = [
    {
        name: jnp.asarray((-1.0) ** (step // 3) + normal(10 * step + i, 3, 4))
        for i, name in enumerate("abc")
    }
    for step in range(STEPS)
]
RATE = 0.1


def run(grads: list[Any], names: str) -> list[tuple[Any, Any]]:
    """Trains some of the arrays, op by op so that results are equal to the bit; None is missing.

    The inner optimizer has no memory: what one without a gradient does is not the question.
    """
    tx = optax_spd.chain(optax.sgd(RATE), optax_spd.ftp(0.5))
    params = {name: PARAMS[name] for name in names}
    state, history = tx.init(params), []
    for tree in grads:
        updates, state = tx.update({name: tree[name] for name in names}, state, params)
        assert [u is None for u in updates.values()] == [tree[name] is None for name in names]
        params = {
            name: x if updates[name] is None else x + updates[name] for name, x in params.items()
        }
        history.append((params, state[1]))
    return history


@functools.cache
def alone(names: str) -> list[tuple[Any, Any]]:
    return run(GRADS, names)


@pytest.mark.parametrize(
    "present",
    ["01101100", "00010111", "11100011", "10000000", "00000000"],
    ids=["at first and later", "appears late", "a gap", "one step only", "never"],
)
def test_a_missing_gradient_leaves_its_layer_as_it_is_and_every_other_alone(present: str) -> None:
    here = [step for step in range(STEPS) if present[step] == "1"]
    grads = [g if step in here else g | {"b": None} for step, g in enumerate(GRADS)]
    found, others = run(grads, "abc"), alone("ac")
    # b as if it had trained by itself, on the steps that it took part in.
    single = run([GRADS[step] for step in here], "b")
    taken, untouched = 0, (0.0, 0, 0.0, 0.0)
    for step, (params, state) in enumerate(found):
        expected_params, expected = others[step]
        for index, (name, theirs) in enumerate([("a", 0), ("c", 1)]):
            np.testing.assert_array_equal(params[name], expected_params[name])
            np.testing.assert_array_equal(state.ftp_deviation[name], expected.ftp_deviation[name])
            assert by_layer(state, 2 * index) == by_layer(expected, theirs)
        taken += step in here
        assert int(state.count) == step + 1
        if taken == 0:
            assert by_layer(state, 1) == untouched
            np.testing.assert_array_equal(params["b"], PARAMS["b"])
            np.testing.assert_array_equal(state.ftp_deviation["b"], np.zeros((3, 4)))
            continue
        b_params, b_state = single[taken - 1]
        assert by_layer(state, 1) == by_layer(b_state, 0)
        np.testing.assert_array_equal(params["b"], b_params["b"])
        np.testing.assert_array_equal(state.ftp_deviation["b"], b_state.ftp_deviation["b"])
    assert by_layer(found[-1][1], 1)[1] == len(here)


def test_of_a_group_only_the_arrays_with_a_gradient_are_judged(x64: None) -> None:
    """The bias of a frozen-bias phase neither moves nor counts; the module's radius goes on."""
    specs = {"bias": LayerSpec(group="m"), "kernel": LayerSpec(group="m")}
    params = {"bias": normal(0, 3).astype(float), "kernel": normal(1, 2, 3).astype(float)}
    tx = optax_spd.chain(
        optax.sgd(RATE),
        optax_spd.ftp(radius_learning_rate=0.1, layers=lambda path, _: specs[path]),
    )
    state, start, oracle, update = tx.init(params), params, oracles.FTP(), jax.jit(tx.update)
    for step in range(6):
        grads = jax.tree.map(lambda x, step=step: np.cos(x + step), params)
        names = ["bias", "kernel"] if step in (0, 1, 5) else ["kernel"]
        rows = lambda tree, names=names: oracles.rows_by_layer({n: tree[n] for n in names}, specs)[
            "m"
        ]
        if len(names) != len(oracle.previous):
            kept = state[1].ftp_deviation
            oracle.previous = rows(kept) if step else []
        u = oracle.step(
            [-RATE * x for x in rows(grads)], rows(params), rows(start), rows(grads), rate=0.1
        )
        given = {name: grads[name] if name in names else None for name in params}
        updates, state = update(given, state, params)
        for ours, theirs in zip(rows(updates), u, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-12)
        np.testing.assert_allclose(state[1].ftp_radii, [oracle.gamma], rtol=0, atol=1e-12)
        params = {n: x if updates[n] is None else x + updates[n] for n, x in params.items()}
    assert oracle.met["projected"] >= 3


# What it costs and holds -------------------------------------------------------------------------


def state_bytes(tx: Any, params: Any) -> int:
    leaves = jax.tree.leaves(jax.eval_shape(tx.init, params))
    return sum(x.size * x.dtype.itemsize for x in leaves)


@pytest.mark.parametrize(
    ("dtype", "options", "expected"),
    [
        (jnp.float32, {}, 8),
        (jnp.float32, {"state_dtype": jnp.bfloat16}, 6),
        (jnp.float32, {"state_dtype": jnp.bfloat16, "anchor_dtype": jnp.bfloat16}, 4),
        (jnp.float32, {"anchor": "zero"}, 4),
        (jnp.float32, {"anchor": "argument", "state_dtype": jnp.bfloat16}, 2),
        (jnp.bfloat16, {}, 4),
    ],
)
def test_bytes_a_parameter(dtype: Any, options: dict[str, Any], expected: int) -> None:
    tx = optax_spd.ftp(**options)
    sizes = [state_bytes(tx, {"w": jax.ShapeDtypeStruct((n, 10), dtype)}) for n in (100, 300)]
    assert sizes[1] - sizes[0] == 2000 * expected
    assert sizes[0] - 1000 * expected == 2 * 4 + 4 * 4  # two scalars, four vectors
