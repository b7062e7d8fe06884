"""A population: eight runs in one program by ``vmap``, each with its own rate and its own λ.

``inject_hyperparams`` keeps the learning rate and λ in the state: each member has its own.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_spd
from examples.clients import digits

RATES = np.array([0.003, 0.003, 0.003, 0.003, 0.01, 0.01, 0.01, 0.01])
DECAYS = np.array([0.0, 0.5, 1.0, 2.0, 0.0, 0.5, 1.0, 2.0])  # 0 is plain Adam

tx = optax.inject_hyperparams(optax_spd.adam_spd)(learning_rate=0.0, weight_decay=0.0)


def apply(params: Any, images: Any) -> jax.Array:
    hidden = jax.nn.relu(images @ params["hidden"]["kernel"] + params["hidden"]["bias"])
    return hidden @ params["output"]["kernel"] + params["output"]["bias"]


def loss_fn(params: Any, batch: Any) -> jax.Array:
    logits = apply(params, batch["image"])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()


def train(params: Any, rate: Any, decay: Any, batches: Any) -> Any:
    """One member; ``vmap`` makes it a population."""
    state = tx.init(params)
    state.hyperparams.update(learning_rate=rate, weight_decay=decay)

    def step(carry: Any, batch: Any) -> Any:
        params, state = carry
        updates, state = tx.update(jax.grad(loss_fn)(params, batch), state, params)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, state), batches)[0]


def main(steps: int = 200) -> dict[str, Any]:
    data = digits.load()
    pretrained = jax.tree.map(jnp.asarray, data.pretrained)
    batches = jax.tree.map(lambda *rows: jnp.stack(rows), *digits.batches(data.train, steps))
    population, states = jax.jit(jax.vmap(train, in_axes=(None, 0, 0, None)))(
        pretrained, RATES, DECAYS, batches
    )
    rows = []
    for member, (rate, decay) in enumerate(zip(RATES, DECAYS, strict=True)):
        params, state = jax.tree.map(lambda x, i=member: x[i], (population, states))
        row = {
            "rate": float(rate),
            "decay": float(decay),
            "noisy": digits.accuracy(apply(params, data.noisy["image"]), data.noisy),
            "clean": digits.accuracy(apply(params, data.clean["image"]), data.clean),
            "distance": optax_spd.layer_report(params, state=state).total,
        }
        print("  ".join(f"{key} {value:.3f}" for key, value in row.items()))
        rows.append(row)
    alone = jax.jit(train)(pretrained, RATES[-1], DECAYS[-1], batches)[0]
    apart = optax_spd.layer_report(jax.tree.map(lambda x: x[-1], population), alone).total
    print(f"last member trained alone: {apart:.1e} apart")
    return {"members": rows, "apart": apart}


if __name__ == "__main__":
    main()
