"""Draws what SPD does to one layer's path, on a made-up layer of two weights. Needs matplotlib."""

import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure

import optax_spd

GREY = "0.5"  # can be read on white and on black
PRETRAINED = np.array([0.9, 0.1], np.float32)
STEPS, RATE = 250, 0.02
draw = np.random.default_rng(0)
x = draw.normal(size=(16, 2)) @ [[1.0, 0.8], [0.0, 0.6]]  # the second follows the first
y = x @ [0.4, 0.8] + 0.5 * draw.normal(size=16)
batches = np.random.default_rng(1).integers(0, len(y), (STEPS, 2))


def training_loss(w: Any, rows: Any = np.s_[:]) -> Any:
    return jnp.mean((jnp.asarray(x)[rows] @ w - jnp.asarray(y)[rows]) ** 2)


def shifted_loss(w: Any) -> Any:  # features are independent, the target is the first
    return jnp.sum((w - jnp.array([1.0, 0.0])) ** 2)


def train(tx: optax.GradientTransformation) -> Any:
    """The weights after every step, and whether SPD pulled them back."""

    def step(carry: Any, rows: Any) -> Any:
        w, state = carry
        updates, state = tx.update(jax.grad(training_loss)(w, rows), state, w)
        w = optax.apply_updates(w, updates)
        return (w, state), (w, optax.tree.get(state, "spd_ratio", jnp.zeros(1))[0] > 0)

    return jax.lax.scan(step, (PRETRAINED, tx.init(PRETRAINED)), batches)[1]


figure = Figure(figsize=(8, 5.4), layout="constrained")
ax = figure.add_subplot(aspect="equal")
ax.set_xlabel("first weight", color=GREY)
ax.set_ylabel("second weight", color=GREY)
ax.tick_params(colors=GREY)
ax.spines[:].set_edgecolor(GREY)
grid = np.meshgrid(np.linspace(-0.3, 1.55, 99), np.linspace(-0.1, 1.1, 65))
for loss, colour, lowest in ((training_loss, GREY, 0.3), (shifted_loss, "#007f5f", 0.1)):
    heights = jax.vmap(jax.vmap(loss))(np.stack(grid, -1))
    ax.clabel(ax.contour(*grid, heights, lowest * 2.0 ** np.arange(5), colors=colour))
ax.text(1.07, 0.72, "training loss", fontsize=13, color=GREY)
ax.text(0.86, -0.07, "shifted loss", fontsize=13, color="#007f5f")
ax.plot(*PRETRAINED, "*", color="#cc79a7", markersize=16, zorder=3)
ax.text(0.94, 0.08, "pretrained", fontsize=13, color="#cc79a7")
runs = {"Adam": optax.adam(RATE), "SPD": optax_spd.adam_spd(RATE, weight_decay=2.0)}
for (name, tx), colour in zip(runs.items(), ("#d55e00", "#0072b2"), strict=True):
    path, fired = map(np.asarray, train(tx))
    ax.plot(*np.vstack([PRETRAINED, path]).T, color=colour, linewidth=2)
    ax.plot(*path[fired].T, "o", color=colour, markersize=4)
    top = path[np.argmax(path[:, 1])] + 0.015
    ax.annotate(name, (top[0], top[1]), fontsize=15, color=colour)
    ends = f"training loss {training_loss(path[-1]):.2f}, shifted {shifted_loss(path[-1]):.2f}"
    print(f"{name}: {ends}, pulled back in {fired.sum()} of {STEPS} steps")
figure.savefig(sys.argv[1] if len(sys.argv) > 1 else "path.png", dpi=120, transparent=True)
