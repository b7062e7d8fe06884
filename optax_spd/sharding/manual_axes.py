"""Manual mesh axes: how ``shard_map`` or ``pmap`` split the arrays, from ``axis_name=``."""

from collections.abc import Mapping
from typing import Any

import jax

from optax_spd.layers import trees
from optax_spd.layers.plans import ArrayLayers, LayerPlan

# The manual mesh axes that split an array, each with the array axis it splits; None if that is
# unknown, because the caller gave a bare name.
MeshAxes = Mapping[str, int | None]


def check_axis_name(axis_name: Any) -> None:
    """Raises ValueError unless ``axis_name`` is None, names, or a tree of PartitionSpecs."""
    if axis_name is None or is_names(axis_name):
        return
    leaves = jax.tree.leaves(axis_name, is_leaf=_is_spec)
    if not leaves or not all(_is_spec(leaf) for leaf in leaves):
        raise ValueError(
            "axis_name must be a mesh axis name, a tuple of them, or a tree of PartitionSpecs "
            f"(the in_specs of shard_map), got {axis_name!r}."
        )


def sharded_axes(axis_name: Any, flat: trees.FlatTree, plan: LayerPlan) -> list[MeshAxes] | None:
    """Per leaf the manual mesh axes that split it, and which array axis each splits.

    Args:
      axis_name: a name or a tuple of names that split every array; or PartitionSpecs, as given to
        ``shard_map``, where each array is split over the axes its spec names; or None.
      flat: the parameters.
      plan: their layers.

    Raises:
      ValueError: the specs do not fit the parameters, or split a stacked axis.
    """
    if axis_name is None:
        return None
    if is_names(axis_name):
        names = (axis_name,) if isinstance(axis_name, str) else tuple(axis_name)
        return [dict.fromkeys(names) for _ in flat.leaves]
    specs = trees.broadcast_prefix(flat, axis_name, "axis_name", _is_spec)
    return [
        {} if entry is None else _axes_of_spec(spec, entry)
        for spec, entry in zip(specs, plan.arrays, strict=True)
    ]


def _axes_of_spec(spec: Any, entry: ArrayLayers) -> MeshAxes:
    if not _is_spec(spec):
        raise ValueError(
            f"axis_name holds {spec!r} for {entry.name!r}; give it a PartitionSpec, empty if "
            "every device has the whole array."
        )
    axes: dict[str, int | None] = {}
    for axis, part in enumerate(spec):
        parts = () if part is None else (part,) if isinstance(part, str) else tuple(part)
        if parts and axis in entry.stacked_axes:
            raise ValueError(
                f"axis_name= splits {entry.name!r} over {parts} along axis {axis}, which layers= "
                "calls stacked. Under shard_map each device would hold different layers; split "
                "another axis, or use jit with NamedSharding."
            )
        axes.update(dict.fromkeys(parts, axis))
    return axes


def varying_axes(array: jax.Array) -> frozenset[str]:
    """The mesh axes along which the array varies, as tracked by ``shard_map``.

    Empty under ``pmap``, and in a ``shard_map`` with ``check_vma=False``.
    """
    aval = jax.typeof(array)
    manual_axis_type = getattr(aval, "manual_axis_type", None)  # older JAX has aval.vma only
    varying: frozenset[str] = aval.vma if manual_axis_type is None else manual_axis_type.varying
    return varying


def require_whole(needs: str, name: str, array: Any) -> None:
    """Raises ValueError if ``shard_map`` is known to split the array.

    Args:
      needs: who needs what whole, the beginning of the message.
      name: the array's path.
      array: the array.
    """
    if isinstance(array, jax.core.Tracer) and (axes := varying_axes(array)):
        raise ValueError(
            f"{needs}, but shard_map splits {name!r} (it differs along {sorted(axes)}). Use jit "
            "with NamedSharding, or call the stage outside of shard_map."
        )


def is_names(axis_name: Any) -> bool:
    """Whether ``axis_name`` is a bare name or a tuple of names, not PartitionSpecs."""
    return isinstance(axis_name, str) or (
        isinstance(axis_name, tuple)
        and len(axis_name) > 0
        and all(isinstance(name, str) for name in axis_name)
    )


def require_specs(axis_name: Any, reason: str, otherwise: str = "") -> None:
    """Raises ValueError for bare names, if it matters which array axes they split.

    Args:
      axis_name: the stage's argument.
      reason: why it matters, for the message.
      otherwise: an alternative for the user, for the message.
    """
    if is_names(axis_name):
        raise ValueError(
            f"{reason}, and axis_name={axis_name!r} does not tell which of them are split. Give "
            f"axis_name the PartitionSpecs (the in_specs of shard_map){otherwise}."
        )


def _is_spec(node: Any) -> bool:
    return isinstance(node, jax.sharding.PartitionSpec)
