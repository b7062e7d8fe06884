"""Recorded gradients of the related methods, in several layouts and dtypes, and their replay."""

from collections.abc import Callable
from typing import Any, NamedTuple

import golden
import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_spd


class Layout(NamedTuple):
    """How tensors are kept.

    Attributes:
      place: from a tensor in PyTorch's layout (output units first) to the array.
      found: from the array to tensors in PyTorch's layout, each of which must be the recorded one.
      layers: what a method has to be told.
    """

    place: Callable[[np.ndarray], np.ndarray]
    found: Callable[[np.ndarray], list[np.ndarray]]
    layers: Any


def in_a_stack(tensor: np.ndarray) -> np.ndarray:
    """Three layers along axis 1: the tensor, one that is no number of it, and the tensor flipped.

    No method here tells the order of output units or of their weights.
    """
    other = np.cos(np.arange(tensor.size)).reshape(tensor.shape) * (1 + np.abs(tensor).max())
    return np.stack([tensor, other.astype(tensor.dtype), np.flip(tensor)], axis=1)


LAYOUTS = {
    "PyTorch": Layout(lambda x: x, lambda x: [x], optax_spd.outputs("", 0)),
    "Flax": Layout(lambda x: np.moveaxis(x, 0, -1), lambda x: [np.moveaxis(x, -1, 0)], None),
    "stacked": Layout(
        in_a_stack,
        lambda x: [x[:, 0], np.flip(x[:, 2])],
        optax_spd.stacked("", 1, layers=optax_spd.outputs("", 0)),
    ),
    # For norms over all parameters together, to which a layer of zeros adds nothing.
    "stacked with zeros": Layout(
        lambda x: np.stack([np.zeros_like(x), x], axis=1), lambda x: [x[:, 1]], None
    ),
}


class Recording(NamedTuple):
    """Arrays with a leading step axis, but ``theta0``."""

    theta0: dict[str, np.ndarray]
    grads: dict[str, np.ndarray]
    rates: np.ndarray


def fields(method: str, case: dict[str, Any]) -> dict[str, dict[str, np.ndarray]]:
    """The recorded fields of each tensor."""
    with np.load(golden.DATA / f"{method}.npz") as arrays:
        prefix = {t["name"]: f"{case['name']}/{t['name']}/" for t in case["tensors"]}
        return {
            name: {key.removeprefix(start): arrays[key] for key in arrays if key.startswith(start)}
            for name, start in prefix.items()
        }


def recording(method: str, case: dict[str, Any], layout: str, dtype: Any) -> Recording:
    """A case's arrays. A tensor that never has a gradient has zeros."""
    place, tensors = LAYOUTS[layout].place, fields(method, case)
    with np.load(golden.DATA / f"{method}.npz") as arrays:
        rates = arrays[case["lr_array_key"]]
    zeros = lambda field: np.zeros((case["steps"], *field["theta0"].shape))
    over_steps = lambda x: np.stack([place(step) for step in np.asarray(x, dtype)])
    return Recording(
        {name: place(f["theta0"].astype(dtype)) for name, f in tensors.items()},
        {name: over_steps(f.get("grads", zeros(f))) for name, f in tensors.items()},
        np.asarray(rates, dtype),
    )


def run(tx: Any, recorded: Recording) -> dict[str, jax.Array]:
    """The parameters after every step."""

    def step(carry: Any, grads: Any) -> Any:
        params, state = carry
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), params

    start = jax.tree.map(jnp.asarray, recorded.theta0)
    return jax.lax.scan(step, (start, tx.init(start)), recorded.grads)[1]


def largest_error(method: str, case: dict[str, Any], layout: str, params: Any) -> float:
    """The largest deviation from the recorded parameters, of all steps and tensors."""
    expected = fields(method, case)
    errors = [
        np.abs(tensor - expected[name]["params"][step]).max()
        for name, array in params.items()
        for step, x in enumerate(np.asarray(array, np.float64))
        for tensor in LAYOUTS[layout].found(x)
    ]
    return float(np.max(errors))  # NaN if any is
