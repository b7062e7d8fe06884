"""Haiku: fine-tunes a small MLP with Adam and with SPD, and resumes from a checkpoint.

The parameters are a dict of dicts, so the layers are called "hidden/w", "hidden/b" and so on. The
parameters given to ``init`` are the anchor.
"""

import pickle
from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_spd
from examples.clients import digits


@hk.without_apply_rng
@hk.transform
def net(image: Any) -> jax.Array:
    hidden = jax.nn.relu(hk.Linear(64, name="hidden")(image))
    return hk.Linear(10, name="output")(hidden)


def loss_fn(params: hk.Params, batch: Any) -> jax.Array:
    logits = net.apply(params, batch["image"])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()


def train(params: Any, state: Any, tx: Any, batches: list[digits.Batch]) -> tuple[Any, Any]:
    @jax.jit
    def step(params: hk.Params, state: Any, batch: Any) -> tuple[hk.Params, Any]:
        updates, state = tx.update(jax.grad(loss_fn)(params, batch), state, params)
        return optax.apply_updates(params, updates), state

    for batch in batches:
        params, state = step(params, state, batch)
    return params, state


def main(steps: int = 200) -> dict[str, Any]:
    data = digits.load()
    batches = digits.batches(data.train, steps)
    start = {  # Haiku says "w" and "b"
        name: {"w": jnp.asarray(layer["kernel"]), "b": jnp.asarray(layer["bias"])}
        for name, layer in data.pretrained.items()
    }
    result: dict[str, Any] = {"layers": optax_spd.layer_names(start)}
    print("layers:", *result["layers"])
    for name, tx in {
        "adam": optax.adam(3e-3),
        "spd": optax_spd.adam_spd(3e-3, weight_decay=2.0),
    }.items():
        straight = train(start, tx.init(start), tx, batches)
        result[name] = {
            "noisy": digits.accuracy(net.apply(straight[0], data.noisy["image"]), data.noisy),
            "clean": digits.accuracy(net.apply(straight[0], data.clean["image"]), data.clean),
            "distance": optax_spd.layer_report(straight[0], start).total,
        }
        print(f"{name:5}" + "".join(f"  {k} {v:.3f}" for k, v in result[name].items()))

    half = train(start, tx.init(start), tx, batches[: steps // 2])
    params, state = pickle.loads(pickle.dumps(half))
    optax_spd.check_state(state, params)
    resumed = train(params, state, tx, batches[steps // 2 :])
    result["restart_equal"] = all(map(np.array_equal, *map(jax.tree.leaves, (straight, resumed))))
    print("restart: bit-equal" if result["restart_equal"] else "restart: differs")
    return result


if __name__ == "__main__":
    main()
