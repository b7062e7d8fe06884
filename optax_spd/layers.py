"""What a layer is: the unit that gets one decision, one ratio or one radius.

By default every parameter array is a layer, as in the papers' loops over PyTorch tensors. What
differs in JAX a :class:`LayerSpec` per array says: *stacked* axes that hold many layers
(``nn.scan``, ``nnx.vmap``), axes of *output* units, arrays judged together as one *group*.
"""

import dataclasses
import math
import operator
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from optax_spd import checks, masks, trees

PyTree = Any


@dataclasses.dataclass(frozen=True)
class LayerSpec:
    """How one parameter array divides into layers.

    Attributes:
      stacked_axes: axes along which the array holds layers of their own: one layer per index.
      output_axes: axes that count output units (Flax Dense and Conv: the last; attention kernels
        of shape (embed, heads, head_dim): two). They count in the whole array, stacked axes
        included; the default means the last axis that is not stacked. An array of rank 0 or 1
        (stacked axes removed) is one row, whatever stands here.
      spatial_axes: axes that a convolution slides along; None: see ``temp_balance``, whose spectra
        tell them from inputs.
      group: arrays with equal labels (any hashable but None) form one layer together; stacked
        ones index by index.

    Example:
      >>> import optax_spd
      >>> encoder = optax_spd.LayerSpec(stacked_axes=(0,))
    """

    stacked_axes: Sequence[int] = ()
    output_axes: Sequence[int] = (-1,)
    group: Hashable | None = None
    spatial_axes: Sequence[int] | None = None


LayerFn = Callable[[str, Any], LayerSpec]
"""Describes an array: (its "/"-joined path, the array) -> LayerSpec."""


def check_layers(layers: Any) -> None:
    """Refuses a ``layers=`` that is no function of (path, array)."""
    if layers is not None and not callable(layers):
        raise TypeError(
            f"layers must be a function (path, array) -> LayerSpec, got {layers!r}. See "
            "optax_spd.stacked, outputs and by_module."
        )


def _per_array(_path: str, _array: Any) -> LayerSpec:
    """The default: one array, one layer."""
    return LayerSpec()


def stacked(
    pattern: str, axis: int | Sequence[int] = 0, *, layers: LayerFn | None = None
) -> LayerFn:
    """Says that arrays whose path matches hold one layer per index of ``axis``.

    Args:
      pattern: regular expression searched in the "/"-joined path. It may match nothing.
      axis: the stacked axis (``nn.scan`` and ``nnx.vmap`` default to 0, MaxText uses 1), or
        several.
      layers: the description to refine; by default one layer per array.

    Returns:
      A function for the ``layers=`` argument of any stage.

    Raises:
      ValueError: ``pattern`` is not a regular expression; later, from the stage, if a matching
        array does not have the axis.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax_spd
      >>> params = {"blocks": {"kernel": jnp.ones((2, 3, 3))}, "head": jnp.ones(3)}
      >>> optax_spd.layer_names(params, layers=optax_spd.stacked("blocks", axis=0))
      ['blocks/kernel[0]', 'blocks/kernel[1]', 'head']
    """
    return _refined(pattern, layers, stacked_axes=_as_axes(axis))


def outputs(pattern: str, axes: int | Sequence[int], *, layers: LayerFn | None = None) -> LayerFn:
    """Says which axes of the matching arrays count output units.

    Args:
      pattern: regular expression searched in the "/"-joined path. It may match nothing.
      axes: the output axis or axes, counted in the whole array.
      layers: the description to refine; by default one layer per array.

    Returns:
      A function for the ``layers=`` argument of any stage.

    Raises:
      ValueError: ``pattern`` is not a regular expression; later, from the stage, if a matching
        array does not have the axes.

    Example:
      >>> import optax_spd
      >>> attention = optax_spd.outputs("(query|key|value)/kernel", axes=(1, 2))
      >>> attention("layer_0/query/kernel", None).output_axes
      (1, 2)
    """
    return _refined(pattern, layers, output_axes=_as_axes(axes))


def _as_axes(axes: int | Sequence[int]) -> tuple[int, ...]:
    try:
        return (operator.index(axes),)  # type: ignore[arg-type]
    except TypeError:
        return tuple(operator.index(axis) for axis in axes)  # type: ignore[union-attr]


def _refined(pattern: str, layers: LayerFn | None, **changes: Any) -> LayerFn:
    base = layers or _per_array
    regex = checks.compile_pattern(pattern)

    def describe(path: str, array: Any) -> LayerSpec:
        spec = base(path, array)
        return dataclasses.replace(spec, **changes) if regex.search(path) else spec

    return describe


def by_module(*, layers: LayerFn | None = None) -> LayerFn:
    """Judges all arrays of one module (kernel and bias, scale and bias) as one layer.

    A module is what the path names without its last key; all arrays at the top of the tree are one
    module, named "". A group given by ``layers`` stays.

    Args:
      layers: the description to refine; by default one layer per array.

    Returns:
      A function for the ``layers=`` argument of any stage.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax_spd
      >>> params = {"dense": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}}
      >>> optax_spd.layer_names(params, layers=optax_spd.by_module())
      ['dense']
    """
    base = layers or _per_array

    def describe(path: str, array: Any) -> LayerSpec:
        spec = base(path, array)
        if spec.group is not None:
            return spec
        return dataclasses.replace(spec, group=path.rpartition("/")[0])

    return describe


@dataclasses.dataclass(frozen=True)
class ArrayLayers:
    """Where the layers of one array stand in the per-layer vectors.

    Attributes:
      name: the array's path.
      stacked_axes: non-negative, sorted.
      output_axes: non-negative, sorted; () for an array that is one row.
      stacked_shape: the sizes of the stacked axes.
      spatial_axes: non-negative, sorted; None where nobody says.
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


@dataclasses.dataclass(frozen=True)
class LayerPlan:
    """The layers of a parameter tree: static, made anew at each trace from paths and shapes.

    Attributes:
      arrays: per leaf of the tree its layers, or None where the leaf is no layer.
      names: one per layer.
      dtype: of the per-layer vectors: the widest parameter dtype, at least float32.
    """

    arrays: tuple[ArrayLayers | None, ...]
    names: tuple[str, ...]
    dtype: Any

    @property
    def vector_size(self) -> int:
        """Length of a per-layer vector: one unused entry where there is no layer.

        Orbax cannot save an empty array.
        """
        return max(1, len(self.names))


def plan_layers(
    flat: trees.FlatTree, layers: LayerFn | None = None, selected: list[bool] | None = None
) -> LayerPlan:
    """Finds the layers of a flattened parameter tree.

    Args:
      flat: the parameters; arrays, ``ShapeDtypeStruct`` leaves or tracers.
      layers: describes an array, or None for one layer per array.
      selected: per leaf whether the method applies, or None for all.

    Raises:
      TypeError: a selected leaf is complex, or ``layers`` returns something else than a spec.
      ValueError: a spec does not fit its array, or the stacked shapes in a group differ.
    """
    describe = layers or _per_array
    arrays: list[ArrayLayers | None] = []
    names: list[str] = []
    groups: dict[Hashable, ArrayLayers] = {}
    for index, (path, leaf) in enumerate(zip(flat.paths, flat.leaves, strict=True)):
        if (selected is not None and not selected[index]) or not _is_layer(path, leaf):
            arrays.append(None)
            continue
        name = trees.path_name(path)
        spec = describe(name, leaf)
        entry = _place(name, leaf, spec, start=len(names))
        if spec.group is not None and spec.group in groups:
            first = groups[spec.group]
            if entry.stacked_shape != first.stacked_shape:
                raise ValueError(
                    f"layers= puts {first.name!r} and {name!r} in the group {spec.group!r}, but "
                    f"their stacked axes have sizes {first.stacked_shape} and "
                    f"{entry.stacked_shape}. Stack both alike or give them groups of their own."
                )
            arrays.append(dataclasses.replace(entry, start=first.start))
            continue
        if spec.group is not None:
            groups[spec.group] = entry
        arrays.append(entry)
        names.extend(_layer_names(str(name if spec.group is None else spec.group), entry))
    layered = [x for x, entry in zip(flat.leaves, arrays, strict=True) if entry is not None]
    return LayerPlan(tuple(arrays), tuple(names), compute_dtype(*layered))


def compute_dtype(*arrays: Any) -> Any:
    """The dtype to reduce arrays in: float64 if one of them is, else float32."""
    wide = any(jnp.result_type(array) == jnp.float64 for array in arrays)
    return jnp.dtype(jnp.float64 if wide else jnp.float32)


def _is_layer(path: trees.Path, leaf: Any) -> bool:
    if trees.is_gap(leaf):
        return False
    dtype = jnp.result_type(leaf)
    if jnp.issubdtype(dtype, jnp.complexfloating):
        raise TypeError(
            f"The parameter {trees.shown(path)} is complex ({dtype}). Wrap the optimizer in "
            "optax.contrib.split_real_and_imaginary, or leave the parameter out with mask=."
        )
    return jnp.issubdtype(dtype, jnp.floating) and math.prod(jnp.shape(leaf)) > 0


def _place(name: str, array: Any, spec: LayerSpec, start: int) -> ArrayLayers:
    if not isinstance(spec, LayerSpec):
        raise TypeError(f"layers= must return a LayerSpec, got {spec!r} for {name!r}.")
    shape = jnp.shape(array)
    stacked_axes = _normalized(name, shape, _as_axes(spec.stacked_axes), "stacked")
    rest = [axis for axis in range(len(shape)) if axis not in stacked_axes]
    output_axes: tuple[int, ...]
    if len(rest) <= 1:
        output_axes = ()
    elif _as_axes(spec.output_axes) == LayerSpec.output_axes:
        output_axes = (rest[-1],)
    else:
        output_axes = _normalized(name, shape, _as_axes(spec.output_axes), "output")
        if set(output_axes) & set(stacked_axes):
            raise ValueError(
                f"layers= gives {name!r} of shape {shape} the stacked axes {stacked_axes} and the "
                f"output axes {output_axes}; an axis cannot be both."
            )
    spatial_axes = None
    if spec.spatial_axes is not None:
        spatial_axes = _normalized(name, shape, _as_axes(spec.spatial_axes), "spatial")
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
                "Narrow the pattern or mend the axis."
            )
    normalized = sorted(axis % len(shape) for axis in axes)
    if len(set(normalized)) != len(normalized):
        raise ValueError(f"layers= names a {kind} axis of {name!r} twice: {tuple(axes)}.")
    return tuple(normalized)


def _layer_names(name: str, entry: ArrayLayers) -> list[str]:
    if not entry.stacked_axes:
        return [name]
    return [f"{name}[{','.join(map(str, index))}]" for index in np.ndindex(*entry.stacked_shape)]


def layer_names(
    params: PyTree, layers: LayerFn | None = None, mask: PyTree | Callable[..., Any] | None = None
) -> list[str]:
    """Names the layers, in the order of the state's per-layer vectors.

    Args:
      params: the parameter tree (arrays or ``ShapeDtypeStruct`` leaves), as given to ``init``.
      layers: the stage's ``layers=``.
      mask: the stage's ``mask=``.

    Returns:
      One name per layer: the array's path or the group's label, "[i]" behind a stacked one.

    Raises:
      TypeError, ValueError: as the stages do for the same arguments.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax_spd
      >>> optax_spd.layer_names({"dense": {"bias": jnp.ones(2), "kernel": jnp.ones((2, 2))}})
      ['dense/bias', 'dense/kernel']
    """
    flat = trees.flatten(params)
    return list(plan_layers(flat, layers, masks.resolve_mask(mask, params, flat)).names)
