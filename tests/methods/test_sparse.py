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
    """The tensors of a group's cases, by name: in PyTorch's layout, transposed, and stacked."""
    found: dict[str, Any] = {}
    stacks = collections.defaultdict(list)
    for case in cases:
        sparse = [t for t in case["tensors"] if t["role"] == "sparse" and t["selected"]]
        loaded = golden.load("sift", case | {"tensors": sparse})
        case = case | {"rates": np.asarray(loaded.lr, float)}
        for tensor in sparse:
            rows = recorded(case, tensor, loaded.fields[tensor["name"]])
            name = f"{case['name']}/{tensor['name']}"
            found[f"{name}/torch"] = rows
            # The step axis stays first.
            is_row = lambda key: key in ("theta", "score")
            found[f"{name}/flax"] = {
                key: x.T if is_row(key) else x.transpose(0, *range(x.ndim - 1, 0, -1))
                for key, x in rows.items()
            }
            stacks[tensor["name"], tensor["k"]].append(rows)
    for (name, _), layers in stacks.items():
        layers = [*layers, layers[0]]  # at least two
        found[f"{name}/stack"] = {
            key: np.stack([x[key] for x in layers], axis=1 + (key not in ("theta", "score")))
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
