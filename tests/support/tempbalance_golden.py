"""The original TempBalance's numbers, and its networks as Flax-like trees."""

import json
import re
from typing import Any

import jax.numpy as jnp
import numpy as np
from golden import DATA

CASES: list[dict[str, Any]] = json.loads((DATA / "tempbalance_cases.json").read_text())
NETS = {case["name"]: case for case in CASES if case["kind"] == "net"}


def cases(kind: str) -> list[Any]:
    return [case for case in CASES if case["kind"] == kind]


def array(*key: str) -> np.ndarray:
    with np.load(DATA / "tempbalance.npz") as arrays:
        return arrays["/".join(key)]


def flax_layout(weight: np.ndarray) -> np.ndarray:
    """From PyTorch's (out, in, ...) to Flax's (..., in, out)."""
    return np.moveaxis(weight, (1, 0), (-2, -1))


def flax_path(parameter: str) -> tuple[str, ...]:
    """The path in a Flax tree of a parameter with a PyTorch name."""
    *module, leaf = parameter.split(".")
    is_norm = re.match(r"bn|ln|LayerNorm", module[-1])
    return (*module, {"weight": "scale" if is_norm else "kernel"}.get(leaf, leaf))


def layers_of(net: str) -> list[str]:
    return [layer["name"] for layer in NETS[net]["layers"]]


def kernels(net: str) -> dict[str, np.ndarray]:
    return {name: flax_layout(array(net, "weight", name)) for name in layers_of(net)}


def tree(net: str, parameters: list[str]) -> dict[str, Any]:
    """A nested dict of arrays with these names; what is no weight of the net is a vector."""
    weights = kernels(net)
    made: dict[str, Any] = {}
    for parameter in parameters:
        module = parameter.rpartition(".")[0]
        *folders, leaf = flax_path(parameter)
        here = made
        for folder in folders:
            here = here.setdefault(folder, {})
        is_weight = module in weights and leaf == "kernel"
        here[leaf] = jnp.asarray(weights[module] if is_weight else np.ones(3))
    return made


def at(tree: dict[str, Any], parameter: str) -> np.ndarray:
    node: Any = tree
    for key in flax_path(parameter):
        node = node[key]
    return np.asarray(node)


def numpy_alpha(e: np.ndarray, fit: str, xmin_pos: float = 2, bins: int = 100) -> float:
    """PL_Alpha_Hill of ascending positive eigenvalues, as the module's docstring writes it."""
    N, logs = len(e), np.log(e)

    def tail(i: int) -> tuple[float, float]:
        n = N - i
        alpha = 1 + n / np.sum(logs[i:] - logs[i])
        fitted = 1 - (e[i:] / e[i]) ** (1 - alpha)
        return alpha, float(np.max(np.abs(fitted - np.arange(n) / n)))

    if fit == "median":
        return tail(int(N / xmin_pos))[0]
    starts = list(range(N - 1))
    if fit == "fix-finger":
        v = np.log10(e)
        counts, edges = np.histogram(v, bins)
        x = 10 ** edges[np.argmax(counts)]
        starts = [i for i in starts if np.log10(0.95 * x) <= e[i] <= 1.5 * x]
    return min((tail(i) for i in starts), key=lambda pair: pair[1])[0]
