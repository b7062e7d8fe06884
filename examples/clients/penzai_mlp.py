"""Penzai: its StatefulTrainer, unchanged, with Adam and with SPD, and a restart in the middle.

The trainer gives the optimizer a tuple: layers are called by number. Labels tell which is which.
"""

import pickle
from typing import Any

import jax
import numpy as np
import optax
from penzai import pz
from penzai.models.simple_mlp import MLP
from penzai.toolshed.basic_training import StatefulTrainer

import optax_spd
from examples.clients import digits


def pretrained_model(weights: dict[str, Any]) -> MLP:
    model = MLP.from_config(init_base_rng=jax.random.key(0), feature_sizes=[64, 64, 10])
    arrays = [jax.device_put(x) for w in weights.values() for x in (w["kernel"], w["bias"])]
    for parameter, array in zip(pz.unbind_params(model)[1], arrays, strict=True):
        parameter.value = pz.nx.wrap(array, *parameter.value.named_axes)
    return model


def logits(model: MLP, images: Any) -> jax.Array:
    named = pz.nx.wrap(images).tag("batch", "features")
    return model(named).unwrap("batch", "features")


def loss_fn(model: MLP, state: Any, image: Any, label: Any, **_: Any) -> Any:
    losses = optax.softmax_cross_entropy_with_integer_labels(logits(model, image), label)
    return losses.mean(), state, {}


def values(trainer: StatefulTrainer) -> Any:
    """What a checkpoint holds: the parameters, and the trainer's state."""
    return pz.unbind_params(trainer.model, freeze=True)[1], trainer.state.value


def train(weights: Any, tx: Any, batches: list[digits.Batch], saved: Any = None) -> StatefulTrainer:
    trainer = StatefulTrainer.build(jax.random.key(0), pretrained_model(weights), tx, loss_fn)
    if saved:
        params, trainer.state.value = saved
        for parameter, value in zip(pz.unbind_params(trainer.model)[1], params, strict=True):
            parameter.update(value)
        optax_spd.check_state(trainer.state.value.opt_state, params)
    for batch in batches:
        trainer.step(**batch)
    return trainer


def main(steps: int = 200) -> dict[str, Any]:
    data = digits.load()
    batches = digits.batches(data.train, steps)
    start, _ = values(train(data.pretrained, optax.identity(), []))
    result: dict[str, Any] = {"layers": optax_spd.layer_names(start)}
    print("layers:", *result["layers"], "with labels", *(parameter.label for parameter in start))
    spd = optax_spd.adam_spd(3e-3, weight_decay=2.0)
    for name, tx in {"adam": optax.adam(3e-3), "spd": spd}.items():
        straight = train(data.pretrained, tx, batches)
        result[name] = {
            "noisy": digits.accuracy(logits(straight.model, data.noisy["image"]), data.noisy),
            "clean": digits.accuracy(logits(straight.model, data.clean["image"]), data.clean),
            "distance": optax_spd.layer_report(values(straight)[0], start).total,
        }
        print(f"{name:5}" + "".join(f"  {k} {v:.3f}" for k, v in result[name].items()))

    half = pickle.dumps(values(train(data.pretrained, tx, batches[: steps // 2])))
    resumed = train(data.pretrained, tx, batches[steps // 2 :], pickle.loads(half))
    ends = [jax.tree.leaves(values(trainer)) for trainer in (straight, resumed)]
    result["restart_equal"] = all(map(np.array_equal, *ends))
    print("restart: bit-equal" if result["restart_equal"] else "restart: differs")
    return result


if __name__ == "__main__":
    main()
