"""TPGM in Flax's TrainState, which passes the optimizer no validation data.

TPGM learns its radii on held-out data. A small optimizer around it brings the data along, in this
trainer and in any other. Without it TPGM warns, and the model stays near its anchor.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax.training.train_state import TrainState

import optax_spd
from examples.clients import digits
from examples.clients.population import apply, loss_fn


def with_validation(tx: Any, held_out: Any) -> optax.GradientTransformationExtraArgs:
    """``tx``, given held-out batches in every update; their leading axis counts the batches."""

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        data = {"validation_fn": loss_fn, "validation_batches": held_out}
        return tx.update(updates, state, params, **data, **extra)

    return optax.GradientTransformationExtraArgs(tx.init, update)


def train(params: Any, tx: Any, batches: list[digits.Batch]) -> TrainState:
    @jax.jit
    def step(state: TrainState, batch: Any) -> TrainState:
        return state.apply_gradients(grads=jax.grad(loss_fn)(state.params, batch))

    state = TrainState.create(apply_fn=apply, params=params, tx=tx)
    for batch in batches:
        state = step(state, batch)
    return state


def main(steps: int = 200) -> dict[str, Any]:
    data = digits.load()
    pretrained = jax.tree.map(jnp.asarray, data.pretrained)
    batches = digits.batches(data.train, steps)
    # The first 40 noisy test scans are for the radii, in one batch. The others test.
    held_out = {key: rows[None, :40] for key, rows in data.noisy.items()}
    noisy, clean = ({k: rows[40:] for k, rows in part.items()} for part in (data.noisy, data.clean))
    tpgm = optax_spd.adam_tpgm(3e-3)
    result: dict[str, Any] = {}
    for name, tx in {
        "adam": optax.adam(3e-3),
        "tpgm": with_validation(tpgm, held_out),
        "tpgm without validation data": tpgm,  # warns
    }.items():
        params = train(pretrained, tx, batches).params
        result[name] = {
            "noisy": digits.accuracy(apply(params, noisy["image"]), noisy),
            "clean": digits.accuracy(apply(params, clean["image"]), clean),
            "distance": optax_spd.layer_report(params, pretrained).total,
        }
        print(name + "".join(f"  {k} {v:.3f}" for k, v in result[name].items()))
    return result


if __name__ == "__main__":
    main()
