"""Describes how a parameter array divides into layers: the units with one decision or radius each.

By default every parameter array is a layer, as in the papers' loops over PyTorch tensors. A
:class:`LayerSpec` per array describes what differs in JAX: *stacked* axes that hold many layers
(``nn.scan``, ``nnx.vmap``), axes of *output* units, and a *group* of arrays that form one layer.
"""

import dataclasses
import operator
from collections.abc import Callable, Hashable, Sequence
from typing import Any

from optax_spd.layers import checks


@dataclasses.dataclass(frozen=True)
class LayerSpec:
    """How one parameter array divides into layers.

    Attributes:
      stacked_axes: axes with a separate layer at each index.
      output_axes: axes of output units (Flax Dense and Conv: the last; attention kernels of shape
        (embed, heads, head_dim): two). They are numbered in the whole array, stacked axes included.
        The default means the last axis that is not stacked. An array of rank 0 or 1 (without its
        stacked axes) is always one row.
      spatial_axes: axes of a convolution's spatial positions, for ``temp_balance``; None for its
        default.
      group: a label. Arrays with the same label (any hashable but None) form one layer; stacked
        arrays do so index by index.

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
    """Raises TypeError unless ``layers`` is None or a function."""
    if layers is not None and not callable(layers):
        raise TypeError(
            f"layers must be a function (path, array) -> LayerSpec, got {layers!r}. See "
            "optax_spd.stacked, outputs and by_module."
        )


def per_array(_path: str, _array: Any) -> LayerSpec:
    """The default: one array, one layer."""
    return LayerSpec()


def stacked(
    pattern: str, axis: int | Sequence[int] = 0, *, layers: LayerFn | None = None
) -> LayerFn:
    """Declares that arrays whose path matches hold one layer per index of ``axis``.

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
    return _refined(pattern, layers, stacked_axes=as_axes(axis))


def outputs(pattern: str, axes: int | Sequence[int], *, layers: LayerFn | None = None) -> LayerFn:
    """Declares which axes of the matching arrays are output units.

    Args:
      pattern: regular expression searched in the "/"-joined path. It may match nothing.
      axes: the output axis or axes, numbered in the whole array.
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
    return _refined(pattern, layers, output_axes=as_axes(axes))


def as_axes(axes: int | Sequence[int]) -> tuple[int, ...]:
    """Converts one axis or several to a tuple of ints."""
    try:
        return (operator.index(axes),)  # type: ignore[arg-type]
    except TypeError:
        return tuple(operator.index(axis) for axis in axes)  # type: ignore[union-attr]


def _refined(pattern: str, layers: LayerFn | None, **changes: Any) -> LayerFn:
    base = layers or per_array
    regex = checks.compile_pattern(pattern)

    def describe(path: str, array: Any) -> LayerSpec:
        spec = base(path, array)
        return dataclasses.replace(spec, **changes) if regex.search(path) else spec

    return describe


def by_module(*, layers: LayerFn | None = None) -> LayerFn:
    """Makes all arrays of a module (kernel and bias, scale and bias) one layer.

    An array's module is its path without the last key. All arrays at the top of the tree are one
    module, named "". A group given by ``layers`` takes precedence.

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
    base = layers or per_array

    def describe(path: str, array: Any) -> LayerSpec:
        spec = base(path, array)
        if spec.group is not None:
            return spec
        return dataclasses.replace(spec, group=path.rpartition("/")[0])

    return describe
