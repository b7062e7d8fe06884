"""Sums over rows of arrays that are split by hand: those of one device, whatever is split."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec as P
from jax_support import primitives

from optax_spd import LayerSpec
from optax_spd.core.rows import layer_extremes, row_sums
from optax_spd.layers import plans, trees
from optax_spd.sharding import manual_axes


class Split(NamedTuple):
    """An array's shape, what its axes are, and how a mesh of 2 x 2 x 2 devices splits it."""

    shape: tuple[int, ...]
    spec: P
    layer: LayerSpec = LayerSpec()
    dtype: Any = np.float32

    @property
    def rows(self) -> P:
        """How its rows are split: as the array, but along the axes that are summed."""
        rest = [a for a in range(len(self.shape)) if a not in self.layer.stacked_axes]
        outputs = {a % len(self.shape) for a in self.layer.output_axes} if len(rest) > 1 else set()
        return P(*(part if a in outputs else None for a, part in enumerate(self.spec)))


MODULE = LayerSpec(group="module")
HEADS = LayerSpec(output_axes=(1, 2))
BLOCKS = LayerSpec(stacked_axes=(0,), group="blocks")
# Rows and units split in all ways: a row's parts over one mesh axis or two, in either order; units
# over one, over two, or along two axes of the array; both, or neither.
SPLITS = {
    "rows x": Split((4, 3), P("x"), MODULE),
    "rows y": Split((2, 3), P("y")),
    "rows z x": Split((8, 3), P(("z", "x"))),
    "units x": Split((3, 4), P(None, "x"), MODULE),
    "units z y": Split((3, 8), P(None, ("z", "y")), MODULE),
    "units of two axes": Split((3, 2, 4), P(None, "y", "x"), HEADS),
    "rows x, units y": Split((4, 6), P("x", "y"), MODULE),
    "rows y, units x": Split((6, 4), P("y", "x")),
    "rows z, units y x": Split((4, 8), P("z", ("y", "x"))),
    "rows z, units x y": Split((8, 2), P(("x", "y"), "z"), LayerSpec(output_axes=(0,))),
    "rows y, units of two axes": Split((2, 2, 6), P("y", "z", "x"), HEADS),
    "blocks": Split((3, 4, 6), P(None, "x", "z"), BLOCKS),
    "blocks behind": Split((4, 3, 2), P("y", None), LayerSpec(stacked_axes=(2,))),
    "block biases": Split((3, 4), P(), BLOCKS),
    "split bias": Split((6,), P("z")),
    "bias": Split((5,), P(), MODULE),
    "scale": Split((), P()),
}
DOUBLES = ("rows x, units y", "units x", "bias")


def row_terms(splits: dict[str, Split]) -> dict[str, tuple[np.ndarray, ...]]:
    draw = np.random.default_rng(5)
    return {
        name: tuple(np.asarray(draw.normal(size=split.shape), split.dtype) for _ in range(2))
        for name, split in splits.items()
    }


def rows_of(splits: dict[str, Split], by_hand: bool) -> Callable[..., Any]:
    """From terms to each array's rows, each layer's smallest and largest of them, and a total."""

    def measure(terms: Any) -> Any:
        flat = trees.flatten({name: first for name, (first, _) in terms.items()})
        plan = plans.plan_layers(flat, lambda path, _: splits[path].layer)
        specs = {name: split.spec for name, split in splits.items()}
        axes = manual_axes.sharded_axes(specs, flat, plan) if by_hand else None
        # Not linear: it takes a row's whole sums.
        ratio = lambda a, b: (a / (1 + b**2),)
        # In the tree's order, which is that of its sorted keys.
        listed = [terms[name] for name in sorted(terms)]
        rows = row_sums(plan, listed, axes, ratio)
        firsts = [None if row is None else row[0] for row in rows.gathered]
        extremes = layer_extremes(plan, firsts, rows.varying)
        return dict(zip(sorted(terms), rows.local, strict=True)), extremes, rows.totals[0]

    return measure


def rows_in_shard_map(splits: dict[str, Split], check_vma: bool = True) -> Callable[..., Any]:
    mesh = jax.make_mesh((2, 2, 2), ("x", "y", "z"), axis_types=(AxisType.Auto,) * 3)
    specs = {name: (split.spec,) * 2 for name, split in splits.items()}
    rows = {name: (split.rows,) * 2 for name, split in splits.items()}
    return jax.shard_map(
        rows_of(splits, by_hand=True),
        mesh=mesh,
        in_specs=(specs,),
        out_specs=(rows, P(), P()),
        check_vma=check_vma,
    )


@pytest.mark.parametrize("check_vma", [True, False], ids=["checked", "unchecked"])
def test_rows_of_arrays_split_in_all_ways_are_those_of_one_device(check_vma: bool) -> None:
    terms = row_terms(SPLITS)
    mapped = jax.jit(rows_in_shard_map(SPLITS, check_vma)).trace(terms)
    collectives = [n for n in primitives(mapped.jaxpr) if n.startswith(("psum", "pmax", "all_"))]
    assert sorted(name[:4] for name in collectives) == ["pmax", "psum"]
    found = mapped.lower().compile()(terms)
    expected = jax.jit(rows_of(SPLITS, by_hand=False))(terms)
    assert jax.tree.map(jnp.shape, found) == jax.tree.map(jnp.shape, expected)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), found, expected)


def test_the_extremes_of_a_group_are_those_of_all_its_arrays() -> None:
    params = {name: np.zeros((2, 3, size), np.float32) for name, size in (("a", 4), ("b", 5))}
    plan = plans.plan_layers(
        trees.flatten(params), lambda path, _: LayerSpec(stacked_axes=(0,), group="one")
    )
    assert plan.names == ("one[0]", "one[1]")
    draw = np.random.default_rng(0)
    for wide in (0, 1):  # either array may have both extremes
        rows = [draw.uniform(1, 2, size=(2, 1, size)) for size in (4, 5)]
        rows[wide][:, 0, :2] = [[0.5, 3.0], [0.25, 4.0]]
        smallest, largest = layer_extremes(plan, [jnp.asarray(x, jnp.float32) for x in rows])
        np.testing.assert_array_equal(smallest, [0.5, 0.25])
        np.testing.assert_array_equal(largest, [3.0, 4.0])


@pytest.mark.usefixtures("x64")
def test_rows_in_float64_share_a_sum_with_rows_in_float32() -> None:
    names = [*DOUBLES, "rows y, units x", "rows x", "split bias"]
    splits = {
        name: SPLITS[name]._replace(dtype=np.float64 if name in DOUBLES else np.float32)
        for name in names
    }
    terms = row_terms(splits)
    found = jax.jit(rows_in_shard_map(splits))(terms)
    for name, split in splits.items():
        assert {x.dtype for x in found[0][name]} == {np.dtype(split.dtype)}
    for name in DOUBLES:
        kept = splits[name].rows
        over = tuple(a for a in range(len(splits[name].shape)) if a >= len(kept) or not kept[a])
        for x, y in zip(found[0][name], terms[name], strict=True):
            np.testing.assert_allclose(x, y.sum(axis=over, keepdims=True), rtol=1e-13)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_row_that_is_not_finite_reaches_no_other_row(bad: float) -> None:
    update = jax.jit(rows_in_shard_map(SPLITS))
    terms = row_terms(SPLITS)
    rows, (lowest, highest), totals = jax.tree.map(np.array, update(terms))
    sick = {
        "rows z, units y x": ((3, 5), (0, 5)),  # where in the array, and in its rows
        "units of two axes": ((1, 1, 2), (0, 1, 2)),
        "blocks": ((1, 0, 4), (1, 0, 4)),
        "scale": ((), ()),
    }
    flat = trees.flatten({name: first for name, (first, _) in terms.items()})
    plan = plans.plan_layers(flat, lambda path, _: SPLITS[path].layer)
    layers = ["rows z, units y x", "units of two axes", "blocks[1]", "scale"]
    hit = np.isin(plan.names, layers)
    assert hit.sum() == len(layers)
    for name, (place, row) in sick.items():
        terms[name][0][place] = bad
        rows[name][0][row] = bad
    sick_rows, (low, high), sick_totals = jax.device_get(update(terms))
    jax.tree.map(np.testing.assert_array_equal, sick_rows, rows)
    for found, healthy in ((low, lowest), (high, highest), (sick_totals, totals)):
        np.testing.assert_array_equal(found[~hit], healthy[~hit])
    assert not np.isfinite(high[hit]).any()
    assert not np.isfinite(sick_totals[hit]).any()
