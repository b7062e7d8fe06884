"""What FTP remembers of each layer when gradients are missing.

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

STEPS, RATE = 8, 0.1


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


# Alike in shape, so that eager operations are compiled once.
PARAMS = {name: jnp.asarray(normal(i, 3, 4)) for i, name in enumerate("abc")}
GRADS = [
    {
        name: jnp.asarray((-1.0) ** (step // 3) + normal(10 * step + i, 3, 4))
        for i, name in enumerate("abc")
    }
    for step in range(STEPS)
]


def run(grads: list[Any], names: str) -> list[dict[str, Any]]:
    """By step and name an array, its C, radius, steps and moments; None is missing.

    It trains op by op, so that results are equal to the bit. The inner optimizer has no memory:
    what one without a gradient does is not the question.
    """
    tx = optax_spd.chain(optax.sgd(RATE), optax_spd.ftp(0.5))
    params = {name: PARAMS[name] for name in names}
    state, history = tx.init(params), []
    for step, tree in enumerate(grads):
        updates, state = tx.update({name: tree[name] for name in names}, state, params)
        assert [u is None for u in updates.values()] == [tree[name] is None for name in names]
        moved = {name: params[name] + u for name, u in updates.items() if u is not None}
        params, ftp = params | moved, state[1]
        vectors = np.array([ftp.ftp_radii, *ftp.ftp_moments])
        history.append(
            {n: (params[n], ftp.ftp_deviation[n], v) for n, v in zip(names, vectors.T, strict=True)}
        )
        assert int(ftp.count) == step + 1
    return history


@functools.cache
def alone(names: str) -> list[dict[str, Any]]:
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
    untouched = (PARAMS["b"], np.zeros((3, 4)), np.zeros(4))
    single = [untouched, *(step["b"] for step in run([GRADS[step] for step in here], "b"))]
    for step, after in enumerate(found):
        taken = sum(other <= step for other in here)
        expected = others[step] | {"b": single[taken]}
        jax.tree.map(np.testing.assert_array_equal, after, expected)
    assert found[-1]["b"][2][1] == len(here)


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
