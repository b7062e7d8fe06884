"""Selects the weights whose spectra TempBalance computes, and computes their exponents."""

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
    """A weight array as a matrix or a convolution.

    Attributes:
      leaf: its index among the tree's leaves.
      entry: its layers.
      order: its axes, reordered: stacked, spatial positions, inputs, outputs.
      positions: number of spatial positions of a convolution; 1 for a matrix.
      rows: number of inputs.
      columns: number of outputs.
      convolution: whether it is a convolution.
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
        """The number of eigenvalues of each layer."""
        return self.positions * min(self.rows, self.columns)

    @property
    def layers(self) -> np.ndarray:
        """The indices of its layers in the per-layer vectors."""
        return np.array(self.entry.numbers)

    def source(self, array: jax.Array) -> spectra.Source:
        """Its layers as matrices (inputs, outputs) in at least float32."""
        shape = (self.positions, self.rows, self.columns)
        stacked = self.entry.stacked_axes
        rest = [axis for axis in self.order if axis not in stacked]
        inner = [axis - sum(s < axis for s in stacked) for axis in rest]
        dtype = plans.compute_dtype(array)

        def whole(ready: jax.Array | bool) -> jax.Array:
            delayed = (
                array if ready is True else jnp.where(ready, array, jnp.zeros((), array.dtype))
            )
            ordered = jnp.transpose(sums.replicated(delayed), self.order)
            return ordered.astype(dtype).reshape(-1, *shape)

        def one(number: jax.Array) -> jax.Array:
            layer = array
            indices = jnp.unravel_index(number, self.entry.stacked_shape)
            for axis, index in reversed(list(zip(stacked, indices, strict=True))):
                layer = jax.lax.dynamic_index_in_dim(layer, index, axis, keepdims=False)
            # A decomposition needs whole matrices. Gather and widen this layer only, not the
            # stack. (Under jit with automatic sharding XLA gathers by itself.)
            ordered = jnp.transpose(sums.replicated(layer), inner)
            return ordered.astype(dtype).reshape(shape)

        return spectra.Source(shape, dtype, self.entry.count, whole, one)


def as_weight(index: int, entry: plans.ArrayLayers, shape: tuple[int, ...]) -> Weight | None:
    """Reads an array as a matrix or a convolution; None if it has no spectrum.

    Arrays without a spectrum have fewer than two axes, or only output axes, or are named "bias" (an
    attention bias has two axes). If ``layers=`` names no spatial axes, an array with one output
    axis and at least four axes is a convolution, and its input is the last axis that is not the
    output. In all other arrays every axis that is neither output nor spatial is an input. (An
    attention kernel has three axes, or several outputs.)
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
    """The weights whose spectra are computed.

    Attributes:
      plan: the layers.
      weights: the arrays with a spectrum and enough eigenvalues.
      balanced: per layer whether it is balanced: it has such a weight and is not skipped.
    """

    plan: plans.LayerPlan
    weights: tuple[Weight, ...]
    balanced: np.ndarray

    def alphas(self, leaves: list[Any], fit: power_law.Fit) -> tuple[jax.Array, jax.Array]:
        """α of every layer, and whether it is usable.

        A layer of several arrays has the unweighted mean of their α.

        Args:
          leaves: the parameters' leaves.
          fit: how to fit an exponent to a spectrum.

        Returns:
          Two vectors of shape (``plan.vector_size``,): α in ``plan.dtype``, 0 where unusable; and
          bools.
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
        # 0: "fix-finger" found no tail. Infinity: all eigenvalues are equal. NaN: the weight is not
        # finite.
        usable = jnp.isfinite(alpha) & (alpha > 0) & self.balanced[ids]
        return mean_by(alpha, usable, ids, self.balanced.size)


def select(
    flat: trees.FlatTree,
    plan: plans.LayerPlan,
    min_eigenvalues: int,
    *,
    skip_first: bool,
    skip_last: bool,
) -> Selection:
    """Finds the weights whose spectra are computed.

    Args:
      flat: the parameters.
      plan: their layers.
      min_eigenvalues: weights with fewer are left out.
      skip_first: leave out the first layer that has a spectrum, of any size, by natural order of
        the names ("2" before "10").
      skip_last: leave out the last.

    Raises:
      ValueError: the weights are split by hand (``shard_map``).
    """
    weights = []
    matrices = np.zeros(plan.vector_size, bool)
    balanced = np.zeros(plan.vector_size, bool)
    for index, (entry, leaf) in enumerate(zip(plan.arrays, flat.leaves, strict=True)):
        weight = None if entry is None else as_weight(index, entry, jnp.shape(leaf))
        if entry is None or weight is None:
            continue
        matrices[weight.layers] = True
        if weight.eigenvalues >= min_eigenvalues:
            manual_axes.require_whole("temp_balance needs whole weights", entry.name, leaf)
            balanced[weight.layers] = True
            weights.append(weight)
    present = sorted(np.flatnonzero(matrices), key=lambda i: plans.natural_key(plan.names[i]))
    if skip_first:
        balanced[present[:1]] = False
    if skip_last:
        balanced[present[-1:]] = False
    return Selection(plan, tuple(w for w in weights if balanced[w.layers].any()), balanced)


def mean_by(
    values: jax.Array, included: jax.Array, segments: np.ndarray, size: int
) -> tuple[jax.Array, jax.Array]:
    """The mean of the included values of each segment (0 if there is none), and if there is one."""

    def total(x: jax.Array) -> jax.Array:
        return jnp.zeros(size, x.dtype).at[segments].add(x)

    number = total(included.astype(values.dtype))
    mean = total(jnp.where(included, values, 0)) / jnp.maximum(number, 1)
    return mean, number > 0
