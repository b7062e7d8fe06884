"""Equinox: fine-tunes a small MLP with Adam and with SPD, and resumes from a checkpoint.

The anchor is the model given to ``init``, so the pretrained weights are loaded before.
"""

import io
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

import optax_spd
from examples.clients import digits


def pretrained_model(weights: dict[str, Any]) -> eqx.nn.MLP:
    model = eqx.nn.MLP(64, 10, width_size=64, depth=1, key=jax.random.key(0))
    where = lambda m: [x for layer in m.layers for x in (layer.weight, layer.bias)]
    # Equinox has (out, in), the checkpoint (in, out).
    loaded = [x for w in weights.values() for x in (w["kernel"].T, w["bias"])]
    return eqx.tree_at(where, model, [jnp.asarray(x) for x in loaded])


def loss_fn(model: eqx.nn.MLP, batch: digits.Batch) -> jax.Array:
    logits = jax.vmap(model)(batch["image"])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()


def train(model: Any, state: Any, tx: Any, batches: list[digits.Batch]) -> tuple[Any, Any]:
    @eqx.filter_jit
    def step(model: Any, state: Any, batch: digits.Batch) -> tuple[Any, Any]:
        grads = eqx.filter_grad(loss_fn)(model, batch)
        updates, state = tx.update(grads, state, model)  # the whole model: functions pass through
        return eqx.apply_updates(model, updates), state

    for batch in batches:
        model, state = step(model, state, batch)
    return model, state


def main(steps: int = 200) -> dict[str, Any]:
    data = digits.load()
    start, batches = pretrained_model(data.pretrained), digits.batches(data.train, steps)
    arrays = eqx.filter(start, eqx.is_inexact_array)
    result: dict[str, Any] = {}
    for name, tx in {
        "adam": optax.adam(3e-3),
        "spd": optax_spd.adam_spd(3e-3, weight_decay=2.0),
    }.items():
        state = tx.init(arrays)
        model, state = train(start, state, tx, batches)
        result[name] = {
            "noisy": digits.accuracy(jax.vmap(model)(data.noisy["image"]), data.noisy),
            "clean": digits.accuracy(jax.vmap(model)(data.clean["image"]), data.clean),
            "distance": optax_spd.layer_report(eqx.filter(model, eqx.is_array), arrays).total,
        }
        print(f"{name:5}" + "".join(f"  {k} {v:.3f}" for k, v in result[name].items()))

    half = train(start, tx.init(arrays), tx, batches[: steps // 2])
    file = io.BytesIO()  # a path will do as well
    eqx.tree_serialise_leaves(file, half)
    file.seek(0)
    restored = eqx.tree_deserialise_leaves(file, (start, tx.init(arrays)))
    optax_spd.check_state(restored[1], arrays)
    resumed, _ = train(*restored, tx, batches[steps // 2 :])
    result["restart_equal"] = bool(eqx.tree_equal(resumed, model))
    print("restart: bit-equal" if result["restart_equal"] else "restart: differs")
    return result


if __name__ == "__main__":
    main()
