"""TPGM's equations in float64 NumPy, one layer and one row at a time, by transposing arrays.

Trees are flat dicts here, from paths ("dense/kernel") to arrays.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from optax_spd import LayerSpec

Arrays = dict[str, np.ndarray]
Radii = dict[str, float]
EPS = 1e-8


def to_rows(array: Any, spec: LayerSpec) -> tuple[np.ndarray, Callable[[np.ndarray], np.ndarray]]:
    """An array as (layers, rows, weights), and the way back."""
    array = np.asarray(array, np.float64)
    stacked = sorted(axis % array.ndim for axis in spec.stacked_axes)
    rest = [axis for axis in range(array.ndim) if axis not in stacked]
    if len(rest) <= 1:
        units = []
    elif tuple(spec.output_axes) == (-1,):
        units = [rest[-1]]
    else:
        units = sorted(axis % array.ndim for axis in spec.output_axes)
    order = stacked + units + [axis for axis in rest if axis not in units]
    moved = array.transpose(order)
    size = lambda axes: int(np.prod([array.shape[a] for a in axes]))
    back = lambda rows: rows.reshape(moved.shape).transpose(np.argsort(order))
    return moved.reshape(size(stacked), size(units), -1), back


def random_specs(rng: np.random.Generator, shapes: dict[str, Any]) -> dict[str, LayerSpec]:
    """Stacked and output axes for each array, and perhaps a group with others of its like."""
    specs = {}
    for name, shape in shapes.items():
        axes = tuple(map(int, rng.permutation(len(shape))))
        stacked = int(rng.integers(len(shape) + 1))
        rest, sizes = axes[stacked:], tuple(shape[a] for a in sorted(axes[:stacked]))
        outputs = rest[: int(rng.integers(1, len(rest) + 1))] if rest else ()
        specs[name] = LayerSpec(
            stacked_axes=axes[:stacked],
            output_axes=outputs if outputs and rng.random() < 0.5 else (-1,),
            group=f"group{sizes}" if rng.random() < 0.5 else None,
        )
    return specs


class Balls:
    """The layers of a deviation and the norms of their rows."""

    def __init__(self, deltas: dict[str, Any], norm: str, layers: Any = None) -> None:
        describe = layers or (lambda path, array: LayerSpec())
        self.norm = norm
        self.rows: Arrays = {}
        self.back: dict[str, Callable[[np.ndarray], np.ndarray]] = {}
        self.specs: dict[str, LayerSpec] = {}
        # Of each layer the arrays it has a part of, and which one of their layers it is.
        self.members: dict[str, list[tuple[str, int]]] = {}
        for path in sorted(deltas):
            spec = self.specs[path] = describe(path, deltas[path])
            self.rows[path], self.back[path] = to_rows(deltas[path], spec)
            sizes = [np.shape(deltas[path])[a] for a in sorted(spec.stacked_axes)]
            for number, index in enumerate(np.ndindex(*sizes)):
                suffix = f"[{','.join(map(str, index))}]" if sizes else ""
                name = (path if spec.group is None else str(spec.group)) + suffix
                self.members.setdefault(name, []).append((path, number))

    def row_norms(self, layer: str) -> list[np.ndarray]:
        """Per array of the layer its rows' norms, shape (rows, 1)."""
        parts = [self.rows[path][number] for path, number in self.members[layer]]
        if self.norm == "mars":
            return [np.abs(part).sum(axis=1, keepdims=True) for part in parts]
        whole = np.sqrt(sum((part**2).sum() for part in parts))
        return [np.full((len(part), 1), whole) for part in parts]

    def largest(self, layer: str) -> float:
        return float(max(n.max() for n in self.row_norms(layer)))

    def half_smallest(self, layer: str) -> float:
        return float(min(n.min() for n in self.row_norms(layer))) / 2

    def clipped(self, radii: Radii) -> Radii:
        return {name: min(max(r, EPS), self.largest(name)) for name, r in radii.items()}

    def scaled(self, radii: Radii, eps: float = EPS) -> Arrays:
        """f Δ with f = clip(γ / (n + eps), 0, 1)."""
        scaled = {path: rows.copy() for path, rows in self.rows.items()}
        for layer, members in self.members.items():
            for (path, number), n in zip(members, self.row_norms(layer), strict=True):
                tiny = np.finfo(float).tiny
                scaled[path][number] *= np.clip(radii[layer] / np.maximum(n + eps, tiny), 0, 1)
        return {path: self.back[path](rows) for path, rows in scaled.items()}

    def radius_gradient(self, radii: Radii, gradients: Arrays) -> Radii:
        """∂L/∂γ where L's gradient in θ₀ + f Δ is given."""
        total = dict.fromkeys(self.members, 0.0)
        for layer, members in self.members.items():
            for (path, number), n in zip(members, self.row_norms(layer), strict=True):
                g = to_rows(gradients[path], self.specs[path])[0][number]
                for row, length, slope in zip(self.rows[path][number], n + EPS, g, strict=True):
                    if 0 < radii[layer] / length[0] < 1:
                        total[layer] += float(np.dot(slope, row) / length[0])
        return total


def projected(params: Any, anchor: Any, radii: Radii, norm: str, layers: Any = None) -> Arrays:
    """θ₀ + min(1, γ / n) Δ."""
    start = {path: np.asarray(x, np.float64) for path, x in anchor.items()}
    deltas = {path: np.asarray(params[path], np.float64) - start[path] for path in params}
    scaled = Balls(deltas, norm, layers).scaled(radii, eps=0.0)
    return {path: start[path] + scaled[path] for path in params}


class Tpgm:
    """TPGM whose radii are learned by plain gradient descent.

    The validation loss is half the squared distance to a batch: its gradient is θ' - batch.
    """

    def __init__(
        self, anchor: Any, norm: str, rate: float, layers: Any = None, mask: Any = None
    ) -> None:
        self.anchor = {path: np.asarray(x, np.float64) for path, x in anchor.items()}
        self.norm, self.rate, self.layers = norm, rate, layers
        self.paths = [p for p in anchor if mask is None or mask[p]]
        self.radii: Radii = {}
        self.started: set[str] = set()

    def step(self, params: Any, updates: Any, batches: Any = None) -> Arrays:
        """The next parameters; learns once per batch if there are batches."""
        tentative = {p: np.asarray(params[p], float) + np.asarray(updates[p]) for p in params}
        balls = Balls(
            {p: tentative[p] - self.anchor[p] for p in self.paths}, self.norm, self.layers
        )
        for name in balls.members:
            if name not in self.started:
                self.radii[name] = balls.half_smallest(name)
            if balls.largest(name) > 0:
                self.started.add(name)

        def project() -> Arrays:
            self.radii = balls.clipped(self.radii)
            moved = balls.scaled(self.radii)
            return tentative | {p: self.anchor[p] + moved[p] for p in moved}

        for index in range(0 if batches is None else len(next(iter(batches.values())))):
            now = project()
            slopes = {p: now[p] - np.asarray(batches[p][index]) for p in now}
            gradient = balls.radius_gradient(self.radii, slopes)
            self.radii = {n: r - self.rate * gradient[n] for n, r in self.radii.items()}
        return project()
