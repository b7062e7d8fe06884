"""Sparse increments: the original's trajectories, which entries are chosen, what the inner sees."""

import collections
import functools
from typing import Any

import golden
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from contract_runs import assert_same_bits

import optax_spd
from optax_spd.methods.sparse import selection

# Replays -----------------------------------------------------------------------------------------

CASES = golden.settings("sift")


def group_of(case: dict[str, Any]) -> Any:
    """What decides about the optimizer. The original's decay of sparse entries does nothing."""
    options = {k: v for k, v in case["optimizer_kwargs"].items() if k != "weight_decay"}
    options = {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}
    return case["sparse_rate"], case["adam_count_offset"], tuple(sorted(options.items()))


WHOLE = ("theta", "score")  # without a step axis
GROUPS = collections.defaultdict(list)
for settings in CASES:
    GROUPS[group_of(settings)].append(settings)


def recorded(case: dict[str, Any], tensor: dict[str, Any], fields: dict[str, Any]) -> Any:
    """A tensor from its own first step on: θ₀, |g₀|, and gradient, rate and θ of each step."""
    steps, theta, grads = case["steps"], fields["theta0"], fields["grads"]
    if "used_grad" in fields:
        first, used = tensor["first_optimizer_step"], np.zeros((steps, theta.size))
        used[:, fields["idx"]] = fields["used_grad"]
        used = used.reshape(steps, *theta.shape)
    else:
        # The first gradient is dropped; a tensor that lags gets each of the others a step late.
        first = 1 + tensor["lag"]
        used = np.concatenate([grads[: tensor["lag"]], grads])[:steps]
    rate = np.broadcast_to(case["rates"].reshape(-1, *[1] * theta.ndim), (steps, *[1] * theta.ndim))
    late = lambda x: np.concatenate([x[first:], np.zeros((first, *x.shape[1:]))])
    after = np.concatenate([fields["params"][first:], np.repeat(fields["params"][-1:], first, 0)])
    return {"theta": theta, "score": abs(grads[0]), "g": late(used), "lr": late(rate), "end": after}


def trees_of(cases: list[dict[str, Any]]) -> dict[str, Any]:
    """The tensors of a group's cases, by name, stacked; those of the first also alone.

    They are in PyTorch's layout and transposed. Each array is compiled, which takes most of the
    time.
    """
    found: dict[str, Any] = {}
    stacks = collections.defaultdict(list)
    for case in cases:
        sparse = [t for t in case["tensors"] if t["role"] == "sparse" and t["selected"]]
        loaded = golden.load("sift", case | {"tensors": sparse})
        case = case | {"rates": np.asarray(loaded.lr, float)}
        for tensor in sparse:
            rows = recorded(case, tensor, loaded.fields[tensor["name"]])
            stacks[tensor["name"]].append(rows)
            if case["name"] == cases[0]["name"]:
                found[f"{tensor['name']}/torch"] = rows
                # The step axis stays first.
                found[f"{tensor['name']}/flax"] = {
                    key: x.T if key in WHOLE else x.transpose(0, *range(x.ndim - 1, 0, -1))
                    for key, x in rows.items()
                }
    for name, layers in stacks.items():
        layers = [*layers, layers[0]]  # at least two
        found[f"{name}/stack"] = {
            key: np.stack([x[key] for x in layers], axis=1 + (key not in WHOLE))
            for key in layers[0]
        }
    return found


def replay_error(group: Any, dtype: Any) -> float:
    """The largest error of any parameter at any step."""
    fraction, offset, options = group
    trees = {
        field: {
            name: jnp.asarray(rows[field], dtype) for name, rows in trees_of(GROUPS[group]).items()
        }
        for field in ("theta", "score", "g", "lr", "end")
    }
    numbers = dict(options)
    if "betas" in numbers:
        inner = optax.scale_by_adam(*numbers["betas"], numbers["eps"])
    else:
        inner = optax.trace(numbers["momentum"])
    tx = optax_spd.with_sparse(
        inner,
        fraction,
        score=lambda path, grad, param: trees["score"][path],
        layers=optax_spd.stacked("/stack$", axis=1),
        mask=optax_spd.path_mask("/"),
    )
    frozen = jnp.ones((2, 4), dtype)
    params = trees["theta"] | {"frozen.weight": frozen}
    state = tx.init(params)
    if offset:
        state = state._replace(inner_state=state.inner_state._replace(count=jnp.int32(offset)))

    def step(carry: Any, rows: Any) -> Any:
        params, state = carry
        g, lr = rows
        updates, state = tx.update(g | {"frozen.weight": frozen}, state, params)
        scaled = {name: -lr[name] * updates[name] for name in g}
        scaled["frozen.weight"] = updates["frozen.weight"]
        params = optax.apply_updates(params, scaled)
        return (params, state), params

    run = jax.jit(lambda *start: jax.lax.scan(step, start, (trees["g"], trees["lr"]))[1])
    found = run(params, state)
    assert np.all(found.pop("frozen.weight") == 1)
    errors = jax.tree.map(lambda x, y: np.abs(x - y).max(), found, trees["end"])
    return float(max(errors.values()))


@pytest.mark.parametrize("group", GROUPS, ids=lambda group: "-".join(map(str, group[:2])))
def test_the_original_is_replayed_in_every_layout(group: Any, x64: None) -> None:
    assert replay_error(group, jnp.float64) <= 1e-9
    assert replay_error(group, jnp.float32) <= 1e-5


# Which entries are chosen ------------------------------------------------------------------------


def expected_entries(score: np.ndarray, k: int) -> np.ndarray:
    """Of one layer, by a stable sort; its size where fewer than k scores are numbers."""
    flat = score.astype(np.float64).ravel()
    order = np.argsort(-flat, kind="stable")  # NaN comes last
    found = np.sort(order[: min(k, np.sum(~np.isnan(flat)))])
    return np.concatenate([found, np.full(k - len(found), flat.size)])


def scores_of(kind: str) -> np.ndarray:
    draw = np.random.default_rng(0)
    score = draw.normal(size=(3, 37, 11))
    special = {
        "distinct": score,
        "ties": np.round(score),
        "all equal": np.zeros_like(score),
        "zeros of both signs": np.where(score > 0, 0.0, -0.0),
        "infinities": np.where(abs(score) > 2, np.sign(score) * np.inf, score),
        "NaN": np.where(score > 0.5, np.nan, score),
        "negative NaN": np.where(score > 0.5, -np.float64(np.nan), score),
        "few numbers": np.where(abs(score) < 0.02, score, np.nan),
        "no number": np.full_like(score, np.nan),
    }
    return special[kind]


KINDS = [
    "distinct", "ties", "all equal", "zeros of both signs", "infinities", "NaN", "negative NaN",
    "few numbers", "no number",
]  # fmt: skip


@functools.partial(jax.jit, static_argnames=("k", "stacked_axes"))
def chosen_entries(score: jax.Array, k: int, stacked_axes: tuple[int, ...]) -> jax.Array:
    return selection.positions({(): selection.choose(score, k, stacked_axes)})[()]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_largest_scores_are_chosen_and_of_equal_ones_the_first(dtype: str, x64: None) -> None:
    for kind in KINDS:
        score = scores_of(kind).astype(dtype)
        for axis in (0, 2):
            layers = np.moveaxis(score, axis, 0)
            for k in (1, 33, layers[0].size):
                found = chosen_entries(score, k, (axis,))
                expected = [expected_entries(layer, k) for layer in layers]
                np.testing.assert_array_equal(found, expected, err_msg=f"{kind} {axis} {k}")
        whole = chosen_entries(score, 100, ())
        np.testing.assert_array_equal(whole[0], expected_entries(score, 100), err_msg=kind)


PARAMS = {
    "blocks": {"kernel": np.random.default_rng(1).normal(size=(5, 3, 7)).astype(np.float32)},
    "scale": np.ones((), np.float32),
    "scales": np.ones(3, np.float32),
}
GRADS = jax.tree.map(lambda x: (x**2 + 1).astype(np.float32), PARAMS)
LAYERS = optax_spd.stacked("kernel|scales", axis=-1)


def first_step(tx: Any, params: Any = PARAMS, grads: Any = GRADS, **extra: Any) -> Any:
    return jax.jit(tx.update)(grads, tx.init(params), params, **extra)


def top(score: Any, fraction: float, axis: int) -> np.ndarray:
    layers = np.moveaxis(np.asarray(score), axis, 0)
    k = min(int(fraction * layers[0].size) + 1, layers[0].size)
    return np.stack([expected_entries(layer, k) for layer in layers])


SCORES = {
    "gradient": lambda path, g, p: abs(g),
    "magnitude": lambda path, g, p: abs(p),
    "a function": lambda path, g, p: abs(g) / abs(p) + len(path),
}


@pytest.mark.parametrize("score", SCORES)
def test_each_layer_chooses_by_the_score(score: str) -> None:
    function = SCORES[score]
    tx = optax_spd.with_sparse(
        optax.sgd(1.0), 0.3, score=function if score == "a function" else score, layers=LAYERS
    )
    updates, state = first_step(tx, grad=GRADS)
    indices = optax.tree.get(state, "sparse_indices")
    kernel, grads = PARAMS["blocks"]["kernel"], GRADS["blocks"]["kernel"]
    expected = top(function("blocks/kernel", grads, kernel), 0.3, -1)
    np.testing.assert_array_equal(indices["blocks"]["kernel"], expected)
    assert expected.shape == (7, 5)
    np.testing.assert_array_equal(indices["scale"], [0])
    np.testing.assert_array_equal(indices["scales"], [[0], [0], [0]])
    mask = optax_spd.sparse_mask(state, PARAMS)
    for u, g, chosen in zip(*map(jax.tree.leaves, (updates, GRADS, mask)), strict=True):
        np.testing.assert_array_equal(u, np.where(chosen, -g, 0))
    assert mask["blocks"]["kernel"].sum() == 7 * 5
    assert not any(x.any() for x in jax.tree.leaves(optax_spd.sparse_mask(tx.init(PARAMS), PARAMS)))


def test_random_entries_are_the_same_in_every_run_and_other_ones_for_each_path() -> None:
    params = {name: np.zeros(1000, np.float32) for name in "ab"}
    tx = optax_spd.with_sparse(optax.sgd(1.0), 0.3, score="random")
    found = [first_step(tx, params, params)[1].sparse_indices for _ in range(2)]
    assert_same_bits(*map(jax.device_get, found))
    common = np.intersect1d(found[0]["a"], found[0]["b"]).size
    assert 60 < common < 120  # 301 · 301 / 1000 by chance


def test_the_raw_gradient_chooses_and_a_nan_never_trains() -> None:
    grads = jax.tree.map(np.copy, GRADS)
    grads["blocks"]["kernel"][0, 0, 0] = np.nan
    tx = optax_spd.chain(
        optax.clip(1e-3), optax_spd.with_sparse(optax_spd.adam_spd(0.1), 0.3, layers=LAYERS)
    )
    _, state = first_step(tx, grads=grads)
    score = abs(grads["blocks"]["kernel"])
    found = optax.tree.get(state, "sparse_indices")["blocks"]["kernel"]
    np.testing.assert_array_equal(found, top(score, 0.3, -1))
    assert 0 not in found[0]


def test_with_fewer_numbers_than_k_the_rest_trains_nothing() -> None:
    params = {"w": np.arange(1.0, 6.0, dtype=np.float32)}
    grads = {"w": np.array([np.nan, 1, np.nan, 2, np.nan], np.float32)}
    tx = optax_spd.with_sparse(optax_spd.adam_spd(0.1), 0.6)
    state = tx.init(params)
    for _ in range(3):
        updates, state = jax.jit(tx.update)(grads, state, params)
        assert np.all(np.isfinite(updates["w"]))
        np.testing.assert_array_equal(updates["w"] != 0, [False, True, False, True, False])
    np.testing.assert_array_equal(state.sparse_indices["w"], [1, 3, 5, 5])
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(state))
