"""Which weights a spectrum is taken of, and the exponents of all of them at once."""

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optax_spd.core import sums
from optax_spd.layers import plans, trees
from optax_spd.methods.temp_balance import power_law, spectra
from optax_spd.sharding import manual_axes

BIAS = re.compile(r"bias$")


class Weight(NamedTuple):
    """An array with a spectrum: where its axes and its layers are.

    Attributes:
      leaf: its number among the tree's leaves.
      entry: its layers.
      order: its axes with the stacked ones first, then spatial positions, inputs, outputs.
      positions: number of spatial positions of a convolution; 1 for a matrix.
      rows: number of inputs.
      columns: number of outputs.
      convolution: whether it is one.
    """

    leaf: int
    entry: plans.ArrayLayers
    order: tuple[int, ...]
    positions: int
    rows: int
    columns: int
    convolution: bool

    @property
    def eigenvalues(self) -> int:
        """How many each layer has."""
        return self.positions * min(self.rows, self.columns)

    @property
    def layers(self) -> np.ndarray:
        """The numbers of its layers."""
        return np.array(self.entry.numbers)

    def source(self, array: jax.Array) -> spectra.Source:
        """Its layers as matrices (inputs, outputs) in at least float32."""
        shape = (self.positions, self.rows, self.columns)
        stacked = self.entry.stacked_axes
        rest = [axis for axis in self.order if axis not in stacked]
        inner = [axis - sum(s < axis for s in stacked) for axis in rest]
        dtype = plans.compute_dtype(array)

        def whole(go: jax.Array | bool) -> jax.Array:
            waited = array if go is True else jnp.where(go, array, jnp.zeros((), array.dtype))
            ordered = jnp.transpose(sums.replicated(waited), self.order)
            return ordered.astype(dtype).reshape(-1, *shape)

        def one(number: jax.Array) -> jax.Array:
            layer = array
            places = jnp.unravel_index(number, self.entry.stacked_shape)
            for axis, place in reversed(list(zip(stacked, places, strict=True))):
                layer = jax.lax.dynamic_index_in_dim(layer, place, axis, keepdims=False)
            # A decomposition needs whole matrices; under jit with automatic sharding XLA sees to
            # it. Only this layer is gathered and widened, not the stack.
            ordered = jnp.transpose(sums.replicated(layer), inner)
            return ordered.astype(dtype).reshape(shape)

        return spectra.Source(shape, dtype, self.entry.count, whole, one)


def as_weight(index: int, entry: plans.ArrayLayers, shape: tuple[int, ...]) -> Weight | None:
    """How an array is a matrix or a convolution; None for one that has no spectrum.

    None are arrays with fewer than two axes, those whose axes are all outputs, and biases by name
    (an attention's have two axes). Unless ``layers=`` says which axes are spatial, an array with
    one output axis and at least four in all is a convolution, whose inputs are the last axis that
    is not the output; else all axes that are not outputs are inputs. (An attention kernel has
    three axes, or several outputs.)
    """
    rest = [axis for axis in range(len(shape)) if axis not in entry.stacked_axes]
    inputs = [axis for axis in rest if axis not in entry.output_axes]
    if len(rest) < 2 or not inputs or BIAS.search(entry.name):
        return None
    if entry.spatial_axes is not None:
        spatial = [axis for axis in inputs if axis in entry.spatial_axes]
    else:
        spatial = inputs[:-1] if len(entry.output_axes) == 1 and len(rest) >= 4 else []
    inputs = [axis for axis in inputs if axis not in spatial]

    def size(axes: Sequence[int]) -> int:
        return math.prod(shape[axis] for axis in axes)

    return Weight(
        index,
        entry,
        (*entry.stacked_axes, *spatial, *inputs, *entry.output_axes),
        size(spatial),
        size(inputs),
        size(entry.output_axes),
        bool(spatial),
    )


@dataclasses.dataclass(frozen=True)
class Selection:
    """The weights whose spectra are taken.

    Attributes:
      plan: the layers.
      weights: the arrays with a spectrum and enough eigenvalues.
      counted: per layer whether it has a spectrum that counts.
    """

    plan: plans.LayerPlan
    weights: tuple[Weight, ...]
    counted: np.ndarray

    def alphas(self, leaves: list[Any], fit: power_law.Fit) -> tuple[jax.Array, jax.Array]:
        """α of every layer, and whether there is one.

        A layer of several arrays has the unweighted mean of theirs.

        Args:
          leaves: the parameters' leaves.
          fit: how a spectrum becomes an exponent.

        Returns:
          Two vectors of shape (``plan.vector_size``,): α, in ``plan.dtype``, 0 where there is none.
        """
        found = spectra.spectra_of(
            [w.source(leaves[w.leaf]) for w in self.weights], exact=fit.exact
        )
        scaled = [
            power_law.conv_scaled(spectrum, fit) if w.convolution else spectrum
            for w, spectrum in zip(self.weights, found, strict=True)
        ]
        alphas = power_law.fitted_alphas(scaled, fit)
        alpha = jnp.concatenate([a.astype(self.plan.dtype) for a in alphas])
        ids = np.concatenate([w.layers for w in self.weights])
        # 0 is "fix-finger" finding no tail, infinity a spectrum of equals, NaN a broken weight.
        usable = jnp.isfinite(alpha) & (alpha > 0) & self.counted[ids]
        return mean_by(alpha, usable, ids, self.counted.size)


def select(
    flat: trees.FlatTree,
    plan: plans.LayerPlan,
    min_eigenvalues: int,
    *,
    skip_first: bool,
    skip_last: bool,
) -> Selection:
    """Finds the weights whose spectra are taken.

    Args:
      flat: the parameters.
      plan: their layers.
      min_eigenvalues: weights with fewer do not count.
      skip_first: leave out the first layer that has a spectrum of any size.
      skip_last: leave out the last.

    Raises:
      ValueError: the weights are split by hand (``shard_map``).
    """
    weights = []
    matrices = np.zeros(plan.vector_size, bool)
    counted = np.zeros(plan.vector_size, bool)
    for index, (entry, leaf) in enumerate(zip(plan.arrays, flat.leaves, strict=True)):
        weight = None if entry is None else as_weight(index, entry, jnp.shape(leaf))
        if entry is None or weight is None:
            continue
        matrices[weight.layers] = True
        if weight.eigenvalues >= min_eigenvalues:
            _check_whole(entry.name, leaf)
            counted[weight.layers] = True
            weights.append(weight)
    present = np.flatnonzero(matrices)
    if skip_first:
        counted[present[:1]] = False
    if skip_last:
        counted[present[-1:]] = False
    return Selection(plan, tuple(w for w in weights if counted[w.layers].any()), counted)


def _check_whole(name: str, leaf: Any) -> None:
    if isinstance(leaf, jax.core.Tracer) and (axes := manual_axes.varying_axes(leaf)):
        raise ValueError(
            f"temp_balance needs whole weights, but shard_map splits {name!r} (it differs along "
            f"{sorted(axes)}). Use jit with NamedSharding, or call the stage outside of shard_map."
        )


def mean_by(
    values: jax.Array, counted: jax.Array, segments: np.ndarray, size: int
) -> tuple[jax.Array, jax.Array]:
    """The mean of the values that count in each segment (0 where none does), and where one does."""

    def total(x: jax.Array) -> jax.Array:
        return jnp.zeros(size, x.dtype).at[segments].add(x)

    number = total(counted.astype(values.dtype))
    mean = total(jnp.where(counted, values, 0)) / jnp.maximum(number, 1)
    return mean, number > 0
