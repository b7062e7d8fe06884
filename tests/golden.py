"""The original implementations' trajectories, as pytrees."""

import json
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

DATA = pathlib.Path(__file__).parent / "data"


class Case(NamedTuple):
    """One recorded trajectory; every tree is keyed by tensor name, with a leading step axis."""

    settings: dict[str, Any]
    lr: jax.Array
    theta0: dict[str, jax.Array]
    anchor: dict[str, jax.Array] | None
    params: dict[str, np.ndarray]
    fields: dict[str, dict[str, np.ndarray]]

    def gradient(self, step: jax.Array, theta: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """The gradient at a step: recorded, or of the case's quadratic in closed loop."""

        def one(name: str) -> jax.Array:
            recorded = {k: jnp.asarray(v) for k, v in self.fields[name].items()}
            if self.settings["kind"] == "quadratic":
                pull = recorded["A"] * (theta[name] - recorded["target"])
                return pull + recorded["noise"][step]
            return recorded["grads"][step]

        return {name: one(name) for name in theta}


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
