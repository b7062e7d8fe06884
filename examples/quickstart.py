"""SPD in a plain training loop; only `tx` differs from the loop without SPD."""

import jax
import jax.numpy as jnp
import optax

import optax_spd

params = {"w": jnp.ones(3), "b": jnp.zeros(())}  # your pretrained weights
x, y = jnp.eye(3), jnp.array([1.0, 2.0, 3.0])  # your data
loss = jax.value_and_grad(lambda p: jnp.mean((x @ p["w"] + p["b"] - y) ** 2))

tx = optax_spd.chain(optax.adam(0.1), optax_spd.spd(1.0))
state = tx.init(params)  # copies the pretrained weights: they are the anchor
for _ in range(100):
    value, grads = loss(params)
    updates, state = tx.update(grads, state, params)
    params = optax.apply_updates(params, updates)
print(value, params)
