"""TPGM against the original implementation: every inner step of every call."""

from typing import Any, NamedTuple

import golden
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_spd

CASES = golden.settings("tpgm")
# PyTorch keeps output units on the first axis.
TORCH_LAYOUT = optax_spd.outputs(".*", 0)
Params = dict[str, jax.Array]


def network(model: dict[str, Any], params: Params, x: jax.Array) -> jax.Array:
    """The networks of the recorded runs, in PyTorch's layouts."""
    linear = lambda name, x: x @ params[f"{name}.weight"].T + params[f"{name}.bias"]
    activation = {"tanh": jnp.tanh, "relu": jax.nn.relu}[model.get("act", "tanh")]
    if model["type"] == "mlp":
        return linear("head", activation(linear("fc2", activation(linear("fc1", x)))))
    hidden = jax.lax.conv_general_dilated(x, params["conv.weight"], (1, 1), "VALID")
    hidden = activation(hidden + params["conv.bias"][:, None, None])
    return linear("head", hidden.reshape(len(x), -1))


def loss_of(model: dict[str, Any]) -> Any:
    def loss(params: Params, batch: Any) -> jax.Array:
        x, y = batch
        logits = network(model, params, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    return loss


class Recorded(NamedTuple):
    inner: Any
    step: jax.Array
    used: jax.Array
    gradient: jax.Array
    after: jax.Array


def recorded(inner: optax.GradientTransformation, steps: int) -> optax.GradientTransformation:
    """``inner``, whose state also holds what it was given and where it went."""

    def init(radii: jax.Array) -> Recorded:
        rows = jnp.full((steps, len(radii)), jnp.nan, radii.dtype)
        return Recorded(inner.init(radii), jnp.zeros((), jnp.int32), rows, rows, rows)

    def update(grads: jax.Array, state: Recorded, radii: jax.Array | None = None) -> Any:
        assert radii is not None
        updates, inner_state = inner.update(grads, state.inner, radii)
        put = lambda rows, row: rows.at[state.step % steps].set(row)
        return updates, Recorded(
            inner_state,
            state.step + 1,
            put(state.used, radii),
            put(state.gradient, grads),
            put(state.after, radii + updates),
        )

    return optax.GradientTransformation(init, update)


class Call(NamedTuple):
    finetuned: Params
    projected: dict[str, np.ndarray]
    final: dict[str, np.ndarray]
    # Per inner step; None in a call that only projects.
    batches: Any
    inner_steps: dict[str, dict[str, np.ndarray]] | None
    loss: np.ndarray | None


def load(case: dict[str, Any]) -> tuple[Params, list[Call]]:
    with np.load(golden.DATA / "tpgm.npz") as arrays:
        prefix = f"{case['name']}/"
        data = {k.removeprefix(prefix): arrays[k] for k in arrays.files if k.startswith(prefix)}

    def tensors(start: str) -> dict[str, np.ndarray]:
        return {k.removeprefix(start): v for k, v in data.items() if k.startswith(start)}

    calls = []
    for call in case["calls"]:
        at = f"call{call['index']}/"
        learns = not call["apply_only"]
        order = data[at + "batch_index"] if learns else None
        fields = ("radius_used", "radius_grad", "radius_after_adam")
        calls.append(
            Call(
                finetuned=jax.tree.map(jnp.asarray, tensors(at + "finetuned/")),
                projected=tensors(at + "projected/"),
                final=tensors(at + "radius_final/"),
                batches=(data["batches/x"][order], data["batches/y"][order]) if learns else None,
                inner_steps={f: tensors(f"{at}{f}/") for f in fields} if learns else None,
                loss=data[at + "loss"] if learns else None,
            )
        )
    return jax.tree.map(jnp.asarray, tensors("anchor/")), calls


def constrained(case: dict[str, Any], params: Params) -> dict[str, bool]:
    return {name: name in case["constrained"] for name in params}


def norm_of(case: dict[str, Any]) -> str:
    return "l2" if "l2" in case["norm_mode"] else "mars"


@pytest.mark.parametrize("case", CASES, ids=lambda c: c["name"])
def test_replays_the_original(case: dict[str, Any], x64: None) -> None:
    # With x64 for float32 cases too: Optax's bias corrections need it. All arrays stay float32.
    tolerance = 1e-9 if case["dtype"] == "float64" else 2e-5
    anchor, calls = load(case)
    mask = constrained(case, anchor)
    names = optax_spd.layer_names(anchor, mask=mask)
    assert sorted(case["constrained"]) == names
    optimizer = recorded(optax.adam(case["proj_lr"]), case["max_iters"])
    tx = optax_spd.tpgm(optimizer, norm=norm_of(case), layers=TORCH_LAYOUT, mask=mask)
    loss = loss_of(case["model"])

    @jax.jit
    def step(params: Params, state: Any, target: Params, batches: Any) -> Any:
        updates = jax.tree.map(jnp.subtract, target, params)
        extra = {} if batches is None else {"validation_fn": loss, "validation_batches": batches}
        updates, state = tx.update(updates, state, params, **extra)
        return optax.apply_updates(params, updates), state

    def assert_close(actual: Any, expected: Any, what: str) -> None:
        np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance, err_msg=what)

    params, state = anchor, tx.init(anchor)
    for call in calls:
        params, state = step(params, state, call.finetuned, call.batches)
        for name, expected in call.projected.items():
            assert params[name].dtype == case["dtype"]
            assert_close(params[name], expected, name)
        assert state.tpgm_radii.dtype == case["dtype"]
        for index, name in enumerate(names):
            assert_close(state.tpgm_radii[index], call.final[name], f"final radius of {name}")
            if call.inner_steps is None:
                continue
            record = state.radius_state
            for field, rows in zip(
                call.inner_steps, (record.used, record.gradient, record.after), strict=True
            ):
                assert_close(rows[:, index], call.inner_steps[field][name], f"{field} of {name}")
