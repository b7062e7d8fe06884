"""Finds the layers of a parameter tree and their order in the per-layer vectors.

:mod:`optax_spd.layers.spec` describes how one array divides into layers; this module applies it to
a whole tree. A plan is static: it is rebuilt at each trace from paths and shapes, and is never part
of a state.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Hashable, Sequence, Set
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from optax_spd.layers import masks, trees
from optax_spd.layers.spec import LayerFn, LayerSpec, as_axes, per_array
from optax_spd.layers.types import PyTree


@dataclasses.dataclass(frozen=True)
class ArrayLayers:
    """The layers of one array, and their position in the per-layer vectors.

    Attributes:
      name: the array's path.
      stacked_axes: non-negative, sorted.
      output_axes: non-negative, sorted; () for an array that is one row.
      stacked_shape: the sizes of the stacked axes.
      spatial_axes: non-negative, sorted; None if not specified.
      start: index of its first layer.
    """

    name: str
    stacked_axes: tuple[int, ...]
    output_axes: tuple[int, ...]
    stacked_shape: tuple[int, ...]
    start: int
    spatial_axes: tuple[int, ...] | None = None

    @property
    def count(self) -> int:
        """The number of layers in the array."""
        return math.prod(self.stacked_shape)

    @property
    def numbers(self) -> range:
        """The indices of its layers in the per-layer vectors."""
        return range(self.start, self.start + self.count)


@dataclasses.dataclass(frozen=True)
class LayerPlan:
    """The layers of a parameter tree.

    Attributes:
      arrays: per leaf of the tree its layers, or None if the leaf is not a layer.
      names: one per layer.
      dtype: of the per-layer vectors: the widest parameter dtype, at least float32.
    """

    arrays: tuple[ArrayLayers | None, ...]
    names: tuple[str, ...]
    dtype: Any

    @property
    def vector_size(self) -> int:
        """Length of a per-layer vector; 1 without layers, since Orbax cannot save empty arrays."""
        return max(1, len(self.names))


class Planned(NamedTuple):
    """A parameter tree, its layers, and per leaf whether a mask selects it (None for all)."""

    flat: trees.FlatTree
    plan: LayerPlan
    selected: list[bool] | None


def planned(
    params: PyTree,
    layers: LayerFn | None,
    mask: Any,
    updates: PyTree = None,
    left_out: Set[trees.Path] = frozenset(),
) -> Planned:
    """The layers of a parameter tree under a mask.

    Args:
      params: the parameters, or a model with other leaves besides.
      layers: as for :func:`plan_layers`.
      mask: as for :func:`optax_spd.layers.masks.resolve_mask`.
      updates: the updates, if there are any; they tell which Python numbers are parameters.
      left_out: paths of arrays that are no parameters here.

    Raises:
      TypeError, ValueError: as :func:`plan_layers` and :func:`optax_spd.layers.masks.resolve_mask`.
    """
    flat = trees.only_parameters(trees.flatten(params), updates)
    if left_out:
        flat = flat.without(left_out)
    selected = masks.resolve_mask(mask, flat, updates)
    return Planned(flat, plan_layers(flat, layers, selected), selected)


def plan_layers(
    flat: trees.FlatTree,
    layers: LayerFn | None = None,
    selected: list[bool] | None = None,
) -> LayerPlan:
    """Finds the layers of a flattened parameter tree.

    Args:
      flat: the parameters; arrays, ``ShapeDtypeStruct`` leaves or tracers.
      layers: describes an array, or None for one layer per array.
      selected: per leaf whether the method applies, or None for all.

    Raises:
      TypeError: a selected leaf is complex, or ``layers`` does not return a LayerSpec.
      ValueError: a spec does not fit its array, or the stacked shapes in a group differ.
    """
    describe = layers or per_array
    arrays: list[ArrayLayers | None] = [None] * len(flat.leaves)
    names: list[str] = []
    groups: dict[Hashable, ArrayLayers] = {}
    # In the order of the path strings. A tree's own order depends on its containers (2 before 10 in
    # a list, "10" before "2" in a dict), and a state may be restored into other containers.
    for index in sorted(range(len(flat.paths)), key=flat.paths.__getitem__):
        path, leaf = flat.paths[index], flat.leaves[index]
        if (selected is not None and not selected[index]) or not _is_layer(path, leaf):
            continue
        name = trees.path_name(path)
        spec = describe(name, leaf)
        entry = _array_layers(name, leaf, spec, start=len(names))
        if spec.group is not None and spec.group in groups:
            first = groups[spec.group]
            if entry.stacked_shape != first.stacked_shape:
                raise ValueError(
                    f"layers= puts {first.name!r} and {name!r} in the group {spec.group!r}, but "
                    f"their stacked axes have sizes {first.stacked_shape} and "
                    f"{entry.stacked_shape}. Stack both alike or give them groups of their own."
                )
            arrays[index] = dataclasses.replace(entry, start=first.start)
            continue
        if spec.group is not None:
            groups[spec.group] = entry
        arrays[index] = entry
        names.extend(_layer_names(str(name if spec.group is None else spec.group), entry))
    _check_names(names, arrays)
    layered = [x for x, entry in zip(flat.leaves, arrays, strict=True) if entry is not None]
    return LayerPlan(tuple(arrays), tuple(names), compute_dtype(*layered))


def _check_names(names: list[str], arrays: list[ArrayLayers | None]) -> None:
    """Raises ValueError if two layers have the same name."""
    if len(set(names)) == len(names):
        return
    name = next(name for i, name in enumerate(names) if name in names[:i])
    numbers = [i for i, other in enumerate(names) if other == name]
    first, second = (
        next(e.name for e in arrays if e is not None and number in e.numbers)
        for number in numbers[:2]
    )
    raise ValueError(
        f"Two layers have the name {name!r}: that of the array {first!r} and that of the array "
        f"{second!r}. A group's label is its layer's name, so it must differ from all other labels "
        "and from the paths of other arrays: change group= in layers=."
    )


def compute_dtype(*arrays: Any) -> Any:
    """The dtype to reduce arrays in: float64 if any is float64, else float32."""
    wide = any(jnp.result_type(array) == jnp.float64 for array in arrays)
    return jnp.dtype(jnp.float64 if wide else jnp.float32)


def can_be_layer(leaf: Any) -> bool:
    """Whether a leaf is a non-empty array of real floating dtype."""
    if trees.is_missing(leaf):
        return False
    is_floating = jnp.issubdtype(jnp.result_type(leaf), jnp.floating)
    # A symbolic dimension (jax.export) is never 0.
    return is_floating and not any(isinstance(n, int) and n == 0 for n in jnp.shape(leaf))


def _is_layer(path: trees.Path, leaf: Any) -> bool:
    dtype = None if trees.is_missing(leaf) else jnp.result_type(leaf)
    if dtype is not None and jnp.issubdtype(dtype, jnp.complexfloating):
        raise TypeError(
            f"The parameter {trees.shown(path)} is complex ({dtype}). Wrap the optimizer in "
            "optax.contrib.split_real_and_imaginary, or leave the parameter out with mask=."
        )
    return can_be_layer(leaf)


def _array_layers(name: str, array: Any, spec: LayerSpec, start: int) -> ArrayLayers:
    if not isinstance(spec, LayerSpec):
        raise TypeError(f"layers= must return a LayerSpec, got {spec!r} for {name!r}.")
    shape = jnp.shape(array)
    stacked_axes = _normalized(name, shape, as_axes(spec.stacked_axes), "stacked")
    rest = [axis for axis in range(len(shape)) if axis not in stacked_axes]
    output_axes: tuple[int, ...]
    if len(rest) <= 1:
        output_axes = ()
    elif as_axes(spec.output_axes) == LayerSpec.output_axes:
        output_axes = (rest[-1],)
    else:
        output_axes = _normalized(name, shape, as_axes(spec.output_axes), "output")
        if set(output_axes) & set(stacked_axes):
            raise ValueError(
                f"layers= gives {name!r} of shape {shape} the stacked axes {stacked_axes} and the "
                f"output axes {output_axes}; an axis cannot be both."
            )
    spatial_axes = None
    if spec.spatial_axes is not None:
        spatial_axes = _normalized(name, shape, as_axes(spec.spatial_axes), "spatial")
        if set(spatial_axes) & {*stacked_axes, *output_axes}:
            raise ValueError(
                f"layers= gives {name!r} the spatial axes {spatial_axes}, and some of them are "
                f"stacked ({stacked_axes}) or output axes ({output_axes}) too."
            )
    sizes = tuple(shape[a] for a in stacked_axes)
    return ArrayLayers(name, stacked_axes, output_axes, sizes, start, spatial_axes)


def _normalized(
    name: str, shape: tuple[int, ...], axes: Sequence[int], kind: str
) -> tuple[int, ...]:
    for axis in axes:
        if not -len(shape) <= axis < len(shape):
            raise ValueError(
                f"layers= names the {kind} axis {axis} of {name!r}, which has shape {shape}. "
                "Narrow the pattern or fix the axis."
            )
    normalized = sorted(axis % len(shape) for axis in axes)
    if len(set(normalized)) != len(normalized):
        raise ValueError(f"layers= names a {kind} axis of {name!r} twice: {tuple(axes)}.")
    return tuple(normalized)


def _layer_names(name: str, entry: ArrayLayers) -> list[str]:
    if not entry.stacked_axes:
        return [name]
    return [f"{name}[{','.join(map(str, index))}]" for index in np.ndindex(*entry.stacked_shape)]


def natural_key(name: str) -> list[int | str]:
    """A key that sorts names as a reader would: "layer_2" before "layer_10"."""
    return [int(part) if part.isdigit() else part for part in re.split(r"([0-9]+)", name)]


def layer_names(
    params: PyTree,
    layers: LayerFn | None = None,
    mask: PyTree | Callable[..., Any] | None = None,
) -> list[str]:
    """Names the layers, in the order of the state's per-layer vectors.

    Args:
      params: the parameter tree (arrays or ``ShapeDtypeStruct`` leaves), as given to ``init``.
      layers: the stage's ``layers=``.
      mask: the stage's ``mask=``.

    Returns:
      One name per layer: the array's path or the group's label, with "[i]" for a stacked layer.

    Raises:
      TypeError, ValueError: as the stages do for the same arguments.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax_spd
      >>> optax_spd.layer_names({"dense": {"bias": jnp.ones(2), "kernel": jnp.ones((2, 2))}})
      ['dense/bias', 'dense/kernel']
    """
    return list(planned(params, layers, mask).plan.names)
