"""Keras on JAX: a custom loop with Adam and with SPD, and a restart in the middle.

``model.fit`` takes Keras' optimizers only, so the loop is written by hand with ``stateless_call``.
Keras lists its variables. A dict by ``variable.path`` gives the layers their names.
"""

import os
import pickle
from typing import Any

os.environ["KERAS_BACKEND"] = "jax"  # before Keras is imported

import jax
import keras
import numpy as np
import optax

import optax_spd
from examples.clients import digits


def pretrained_model(weights: dict[str, Any]) -> keras.Model:
    hidden = keras.layers.Dense(64, activation="relu", name="hidden")
    output = keras.layers.Dense(10, name="output")
    model = keras.Sequential([keras.Input((64,)), hidden, output], name="mlp")
    for layer in (hidden, output):
        layer.set_weights([weights[layer.name]["kernel"], weights[layer.name]["bias"]])
    return model


def train(model: Any, params: Any, state: Any, tx: Any, batches: list[digits.Batch]) -> Any:
    fixed = [variable.value for variable in model.non_trainable_variables]

    def loss_fn(params: dict[str, Any], batch: Any) -> jax.Array:
        values = [params[variable.path] for variable in model.trainable_variables]
        logits, _ = model.stateless_call(values, fixed, batch["image"], training=True)
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()

    @jax.jit
    def step(params: dict[str, Any], state: Any, batch: Any) -> Any:
        updates, state = tx.update(jax.grad(loss_fn)(params, batch), state, params)
        return optax.apply_updates(params, updates), state

    for batch in batches:
        params, state = step(params, state, batch)
    return params, state


def main(steps: int = 200) -> dict[str, Any]:
    data = digits.load()
    batches = digits.batches(data.train, steps)
    model = pretrained_model(data.pretrained)
    start = {variable.path: variable.value for variable in model.trainable_variables}
    result: dict[str, Any] = {"layers": optax_spd.layer_names(start)}
    print("layers:", *result["layers"])
    for name, tx in {
        "adam": optax.adam(3e-3),
        "spd": optax_spd.adam_spd(3e-3, weight_decay=2.0),
    }.items():
        straight = train(model, start, tx.init(start), tx, batches)
        for variable in model.trainable_variables:  # back into the model
            variable.assign(straight[0][variable.path])
        result[name] = {
            "noisy": digits.accuracy(model(data.noisy["image"]), data.noisy),
            "clean": digits.accuracy(model(data.clean["image"]), data.clean),
            "distance": optax_spd.layer_report(straight[0], start).total,
        }
        print(f"{name:5}" + "".join(f"  {k} {v:.3f}" for k, v in result[name].items()))

    half = train(model, start, tx.init(start), tx, batches[: steps // 2])
    params, state = pickle.loads(pickle.dumps(half))
    optax_spd.check_state(state, params)
    resumed = train(model, params, state, tx, batches[steps // 2 :])
    result["restart_equal"] = all(map(np.array_equal, *map(jax.tree.leaves, (straight, resumed))))
    print("restart: bit-equal" if result["restart_equal"] else "restart: differs")
    return result


if __name__ == "__main__":
    main()
