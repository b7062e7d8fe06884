"""Adam and SPD on a small regression whose inputs shift after fine-tuning."""

import jax
import jax.numpy as jnp
import optax

import optax_spd


def predict(params, x):
    x = x[:, None]
    for layer in params[:-1]:
        x = jnp.tanh(x @ layer["kernel"] + layer["bias"])
    return (x @ params[-1]["kernel"] + params[-1]["bias"])[:, 0]


def error(params, x, y):
    return jnp.mean((predict(params, x) - y) ** 2)


def train(params, tx, x, y, steps):
    @jax.jit
    def step(params, state):
        grads = jax.grad(error)(params, x, y)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(steps):
        params, state = step(params, state)
    return params


# Pretraining: sin(2x) for x from -3 to 3.
keys = jax.random.split(jax.random.key(0), 5)
shapes = zip(keys, [(1, 32), (32, 32), (32, 1)], strict=False)
weights = [jax.random.normal(key, shape) / shape[0] ** 0.5 for key, shape in shapes]
start = [{"kernel": w, "bias": jnp.zeros(w.shape[1])} for w in weights]
line = jnp.linspace(-3, 3, 200)
pretrained = train(start, optax.adam(1e-2), line, jnp.sin(2 * line), 3000)

# Fine-tuning: 16 noisy points with x above 0, raised by 0.5.
x = jax.random.uniform(keys[3], (16,), maxval=3)
y = jnp.sin(2 * x) + 0.5 + 0.1 * jax.random.normal(keys[4], (16,))

adam = optax.adam(1e-2)
for name, tx in {"Adam": adam, "SPD": optax_spd.chain(adam, optax_spd.spd(2.0))}.items():
    tuned = train(pretrained, tx, x, y, 500)
    wrong = (predict(tuned, line) - jnp.sin(2 * line) - 0.5) ** 2
    left, right = wrong.reshape(2, 100).mean(1)
    distance = optax_spd.layer_report(tuned, pretrained).total
    print(f"{name:4}  error right {right:.3f}, left {left:.3f}, distance {distance:.2f}")
