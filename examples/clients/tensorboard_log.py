"""A custom loop that logs what every layer did to TensorBoard: ``tensorboard --logdir runs``."""

import sys
from typing import Any

import jax
import jax.numpy as jnp
import optax
from tensorboardX import SummaryWriter

import optax_spd
from examples.clients import digits
from examples.clients.population import apply, loss_fn

EVERY = 20


def main(steps: int = 200, logdir: str = "runs") -> dict[str, Any]:
    data = digits.load()
    params = jax.tree.map(jnp.asarray, data.pretrained)
    tx = optax_spd.adam_spd(3e-3, weight_decay=2.0)
    state = tx.init(params)

    @jax.jit
    def train_step(params: Any, state: Any, batch: Any) -> Any:
        loss, grads = jax.value_and_grad(loss_fn)(params, batch)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    report = optax_spd.layer_report(params, state=state)
    assert report.total == 0  # the anchor is the checkpoint: nothing has moved yet
    with SummaryWriter(logdir) as writer:
        for step, batch in enumerate(digits.batches(data.train, steps), start=1):
            params, state, loss = train_step(params, state, batch)
            if step % EVERY == 0 or step == steps:
                report = optax_spd.layer_report(params, state=state)
                for name, value in report.as_dict(prefix="layers/").items():
                    writer.add_scalar(name, value, step)
                writer.add_scalar("loss", float(loss), step)
    print(report.table(by_deviation=True))
    accuracy = digits.accuracy(apply(params, data.noisy["image"]), data.noisy)
    print(f"noisy {accuracy:.3f}; logged to {logdir}")
    return {"scalars": report.as_dict(prefix="layers/"), "noisy": accuracy}


if __name__ == "__main__":
    main(logdir=sys.argv[1] if len(sys.argv) > 1 else "runs")
