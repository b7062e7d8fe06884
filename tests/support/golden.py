"""The original implementations' trajectories, as pytrees."""

import json
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

DATA = pathlib.Path(__file__).parents[1] / "data"
# The steps of the longest case; shorter ones go on without gradients or a learning rate.
LONGEST = 50


class Case(NamedTuple):
    """One recorded trajectory; every tree is keyed by tensor name, with a leading step axis."""

    settings: dict[str, Any]
    lr: jax.Array
    theta0: dict[str, jax.Array]
    anchor: dict[str, jax.Array] | None
    params: dict[str, np.ndarray]
    fields: dict[str, dict[str, np.ndarray]]

    def task(self) -> "Task":
        """What an optimizer has to be run on."""
        closed_loop = self.settings["kind"] == "quadratic"

        def field(name: str, key: str) -> np.ndarray:
            return self.fields[name][key if closed_loop else "theta0"] * closed_loop

        def padded(rows: np.ndarray) -> np.ndarray:
            missing = LONGEST - len(rows)
            assert missing >= 0
            return np.pad(rows, [(0, missing), *[(0, 0)] * (rows.ndim - 1)])

        return Task(
            theta0=self.theta0,
            anchor=self.anchor,
            lr=padded(np.asarray(self.lr)),
            pull={name: field(name, "A") for name in self.theta0},
            target={name: field(name, "target") for name in self.theta0},
            rows={
                name: padded(self.fields[name]["noise" if closed_loop else "grads"])
                for name in self.theta0
            },
        )


class Task(NamedTuple):
    """A case's arrays, in the same shapes for recorded and for closed-loop gradients of any length.

    A compiled program thus serves every case that has its tensors: compiling is what the replays
    take long for.
    """

    theta0: dict[str, jax.Array]
    anchor: dict[str, jax.Array] | None
    lr: Any
    pull: dict[str, Any]
    target: dict[str, Any]
    rows: dict[str, Any]

    def gradient(self, step: jax.Array, theta: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """The gradient at a step: recorded, or of the case's quadratic in closed loop."""
        return {
            name: self.pull[name] * (theta[name] - self.target[name]) + self.rows[name][step]
            for name in theta
        }


def replayed(
    tx: optax.GradientTransformationExtraArgs,
    task: Task,
    pass_grad: bool,
    read: Callable[[Any], Any],
) -> tuple[Any, Any]:
    """The parameters after every step, and what ``read`` finds in the state.

    Args:
      tx: the optimizer.
      task: what it is run on.
      pass_grad: whether the caller passes ``grad=``.
      read: from the optimizer's state to what the test compares.
    """

    def step(carry: Any, index: jax.Array) -> Any:
        params, state = carry
        grads = task.gradient(index, params)
        extra = {"grad": grads} if pass_grad else {}
        updates, state = tx.update(grads, state, params, **extra)
        params = optax.apply_updates(params, updates)
        return (params, state), (params, read(state))

    return jax.lax.scan(step, (task.theta0, tx.init(task.theta0)), jnp.arange(LONGEST))[1]


def settings(method: str) -> list[dict[str, Any]]:
    """The hyperparameters of a method's cases."""
    cases: list[dict[str, Any]] = json.loads((DATA / f"{method}_cases.json").read_text())
    return cases


def load(method: str, case: dict[str, Any]) -> Case:
    """Reads one case; float64 ones need x64."""
    with np.load(DATA / f"{method}.npz") as arrays:
        names = [tensor["name"] for tensor in case["tensors"]]
        fields = {
            name: {
                key.rpartition("/")[2]: arrays[key]
                for key in arrays.files
                if key.startswith(f"{case['name']}/{name}/")
            }
            for name in names
        }
        lr = arrays[f"{case['name']}/lr"]
    anchor = {name: jnp.asarray(f["pre"]) for name, f in fields.items() if "pre" in f}
    return Case(
        settings=case,
        lr=jnp.asarray(lr),
        theta0={name: jnp.asarray(f["theta0"]) for name, f in fields.items()},
        anchor=anchor or None,
        params={name: f["params"] for name, f in fields.items()},
        fields=fields,
    )
