"""What the compiled step of a stage does between devices: sums of a few numbers, and no more."""

import collections
import itertools
import math
import re
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
from jax_support import host_memory_works, primitives
from tpgm_steps import projects_only

import optax_spd

pytestmark = projects_only

Stage = Callable[..., Any]
STAGES: dict[str, Stage] = {
    "spd": optax_spd.spd,
    "ftp": lambda **options: optax_spd.ftp(norm="l2", **options),
    "ftp in mars": optax_spd.ftp,
    "tpgm": lambda **options: optax_spd.tpgm(norm="l2", **options),
    "tpgm in mars": optax_spd.tpgm,
    "auto_rgn": optax_spd.auto_rgn,
    "remove_radial": lambda **options: optax_spd.remove_radial(0.1, **options),
    "clip_by_relative_norm": lambda **options: optax_spd.clip_by_relative_norm(0.1, 0.1, **options),
    "sgd_fednar": lambda **options: optax_spd.sgd_fednar(
        0.1, weight_decay=0.1, max_norm=1.0, **options
    ),
}
all_stages = pytest.mark.parametrize("stage", STAGES)
MESHES = {"1-D": {"x": 8}, "2-D": {"x": 4, "y": 2}}
both_meshes = pytest.mark.parametrize("axes", MESHES)
# By mesh, how the arrays of a model are split; as many sets of mesh axes as the mesh allows.
SPECS: dict[str, list[P]] = {
    "1-D": [P("x"), P(None, "x"), P()],
    "2-D": [P("x", "y"), P(None, "x"), P(), P("y"), P(None, ("x", "y")), P("x")],
}
COLLECTIVE = re.compile("psum|pmax|pmin|ppermute|all_")
SETS = {"1-D": 1, "2-D": 3}
WHOLE = (32, 48)


def mesh_of(axes: str, axis_type: AxisType = AxisType.Auto) -> Mesh:
    names = MESHES[axes]
    return jax.make_mesh(tuple(names.values()), tuple(names), axis_types=(axis_type,) * len(names))


def model(axes: str, count: int, shape: tuple[int, ...] = WHOLE) -> tuple[Any, Any]:
    """Shapes of as many matrices, split in turn as the specs say or replicated small ones."""
    mesh = mesh_of(axes)
    specs = {f"p{i}": s for i, s in zip(range(count), itertools.cycle(SPECS[axes]), strict=False)}
    arrays = {
        name: jax.ShapeDtypeStruct(
            shape if any(spec) else (5,), jnp.float32, sharding=NamedSharding(mesh, spec)
        )
        for name, spec in specs.items()
    }
    return arrays, specs


def compiled(step: Callable[..., Any], *args: Any) -> str:
    text: str = jax.jit(step).lower(*args).compile().as_text()
    return text


def collectives(text: str) -> dict[str, list[int]]:
    """The instructions that move data between devices, each with how many numbers it gives."""
    found = collections.defaultdict(list)
    pattern = (
        r"= (.+?) (all-reduce|all-gather|all-to-all|collective-\w+|reduce-scatter)(?:-start)?\("
    )
    for shapes, name in re.findall(pattern, text):
        found[name].append(sum(sizes(shapes)))
    return dict(found)


def sizes(text: str) -> list[int]:
    shapes = re.findall(r"\b(?:f|s|u|bf|pred)\d*\[([\d,]*)\]", text)
    return [math.prod(int(n) for n in shape.split(",") if n) for shape in shapes]


def most_reductions(stage: str, axes: str) -> int:
    """One sum for each set of mesh axes, and in MARS one maximum."""
    return SETS[axes] * (2 if "mars" in stage else 1)


# jit ----------------------------------------------------------------------------------------------


@both_meshes
@all_stages
def test_a_step_takes_one_sum_for_each_set_of_mesh_axes(stage: str, axes: str) -> None:
    params, _ = model(axes, 12)
    tx = optax_spd.with_gradient(STAGES[stage]())
    text = compiled(tx.update, params, tx.init(params), params)
    found = collectives(text)
    assert set(found) == {"all-reduce"}
    assert 1 <= len(found["all-reduce"]) <= most_reductions(stage, axes), found
    # Nothing of a parameter's size is on every device.
    assert max(sizes(text)) <= math.prod(WHOLE) / 2


if host_memory_works():

    @both_meshes
    @pytest.mark.parametrize("stage", ["spd", "ftp in mars", "tpgm in mars"])
    def test_an_anchor_that_is_brought_in_twice_adds_no_sum(stage: str, axes: str) -> None:
        large = (1024, 256)
        params, _ = model(axes, 12, shape=large)
        tx = optax_spd.with_gradient(STAGES[stage]())
        on_host = jax.tree.map(
            lambda x: x.update(sharding=x.sharding.with_memory_kind("pinned_host")), params
        )
        state = optax.tree.set(tx.init(params), anchor=on_host)
        jaxpr = jax.make_jaxpr(tx.update)(params, state, params)
        assert list(primitives(jaxpr)).count("cond") == sum(x.ndim > 1 for x in params.values())
        found = collectives(text := compiled(tx.update, params, state, params))
        assert set(found) == {"all-reduce"}
        assert 1 <= len(found["all-reduce"]) <= most_reductions(stage, axes), found
        assert max(sizes(text)) <= math.prod(large) / 2


@pytest.mark.parametrize(
    ("stage", "axes", "what"),
    [
        ("spd", "1-D", "step"),
        ("spd", "2-D", "decisions"),
        ("ftp in mars", "1-D", "decisions"),
    ],
)
def test_200_arrays_take_no_more_sums_than_12(stage: str, axes: str, what: str) -> None:
    """Sums merge by themselves only up to a number that the compiler handles at once.

    All of them lead to the decisions; the arrays of a step's result take most of the compiling.
    """
    params, _ = model(axes, 200, shape=(8, 8))
    tx = optax_spd.with_gradient(STAGES[stage]())

    def step(updates: Any, state: Any, params: Any) -> Any:
        result = tx.update(updates, state, params)
        return result if what == "step" else oracles.decisions(result[1])

    found = collectives(compiled(step, params, tx.init(params), params))
    assert set(found) == {"all-reduce"}
    assert len(found["all-reduce"]) <= most_reductions(stage, axes), found


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=lambda t: t.name)
@pytest.mark.parametrize("stage", ["spd", "ftp in mars"])
def test_of_a_split_stack_only_scalars_are_gathered(stage: str, axis_type: AxisType) -> None:
    mesh = mesh_of("2-D", axis_type)
    spec = {"blocks": P("x", "y"), "stack": P(None, ("x", "y")), "head": P("y", "x")}
    shapes = {"blocks": (8, 16, 24), "stack": (16, 8, 24), "head": (32, 48)}
    layers = optax_spd.stacked("stack", 1, layers=optax_spd.stacked("blocks"))
    tx = optax_spd.with_gradient(STAGES[stage](layers=layers))
    with jax.set_mesh(mesh):
        params = {
            name: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec[name]))
            for name, shape in shapes.items()
        }
        text = compiled(tx.update, params, tx.init(params), params)
    found = collectives(text)
    assert found.pop("all-reduce")
    # Three sums for each of an array's eight layers; or one number for each of their 24 rows.
    most = 8 * (24 if "mars" in stage else 3)
    assert max(itertools.chain(*found.values()), default=0) <= most, found
    assert max(sizes(text)) <= min(map(math.prod, shapes.values())) / 2


def test_stages_without_sums_move_nothing() -> None:
    params, specs = model("2-D", 12)
    tx = optax_spd.with_anchor(
        optax.chain(
            optax_spd.l2_sp(0.1, anchor="argument"),
            optax_spd.l2_sp(0.1, anchor="argument", cautious=True),
            optax_spd.with_frozen(optax.adam(0.1), r"p1$"),
            optax_spd.layerwise_lr_decay(0.5, r"p(\d+)$"),
        )
    )

    def step(updates: Any, state: Any, params: Any) -> Any:
        updates, state = tx.update(updates, state, params)
        params = optax.apply_updates(params, updates)
        return params, state, optax_spd.wise_ft(params, state.anchor, 0.5)

    text = compiled(step, params, tx.init(params), params)
    assert collectives(text) == {}
    assert max(sizes(text)) <= math.prod(WHOLE) / 2

    by_hand, state = in_shard_map(step, tx, "2-D", params, specs, specs)
    jaxpr = jax.make_jaxpr(by_hand)(params, state, params)
    assert [name for name in primitives(jaxpr.jaxpr) if COLLECTIVE.match(name)] == []


# shard_map ----------------------------------------------------------------------------------------


def in_shard_map(
    step: Callable[..., Any], tx: Any, axes: str, params: Any, specs: Any, *more: Any
) -> tuple[Callable[..., Any], Any]:
    """A step of parameters that are split by hand, with the specs of what more it gives; state."""
    state = tx.init(params)
    is_missing = lambda node: isinstance(node, optax.MaskedNode)
    state_specs = optax.tree.map_params(
        tx,
        lambda held, spec: held if is_missing(held) else spec,
        state,
        specs,
        transform_non_params=lambda _: P(),
        is_leaf=is_missing,
    )
    mapped = jax.shard_map(
        step,
        mesh=mesh_of(axes),
        in_specs=(specs, state_specs, specs),
        out_specs=(specs, state_specs, *more),
    )
    return mapped, state


# How many numbers there are to a layer, or to a row and to a layer. An l2 norm takes two sums; in
# FTP a layer has a slope, in AdamP the number of rows that fail its test, and all that is summed.
LAYER_TERMS = {
    "spd": 3, "ftp": 5, "tpgm": 2, "auto_rgn": 4, "clip_by_relative_norm": 4, "sgd_fednar": 2
}  # fmt: skip
ROW_TERMS = {"ftp in mars": (3, 1), "tpgm in mars": (1, 0), "remove_radial": (5, 6)}


@both_meshes
@all_stages
def test_in_shard_map_one_psum_adds_up_all_layers(stage: str, axes: str) -> None:
    params, specs = model(axes, 6)
    tx = optax_spd.with_gradient(STAGES[stage](axis_name=specs))
    step, state = in_shard_map(tx.update, tx, axes, params, specs)
    traced = jax.jit(step).trace(params, state, params)
    equations = [name for name in primitives(traced.jaxpr) if COLLECTIVE.match(name)]
    kinds = sorted(re.split(r"_|2", name)[0] for name in equations)
    found = collectives(traced.lower().compile().as_text())
    assert set(found) == {"all-reduce"}
    if stage in LAYER_TERMS:
        assert kinds == ["psum"]
        assert found["all-reduce"] == [LAYER_TERMS[stage] * len(params)]
        return
    # One number for each row that the mesh splits, whatever else it splits: the rows of an array
    # that is split along its outputs alone stay where they are.
    terms, totals = ROW_TERMS[stage]
    split = sum(WHOLE[1] for spec in specs.values() if any(spec) and spec[0])
    sums = [terms * split + totals * len(params)]
    if "mars" not in stage:
        assert kinds == ["psum"]
        assert found["all-reduce"] == sums
        return
    # The smallest and the largest row of arrays whose rows need no sum.
    assert kinds == ["pmax", "psum"]
    assert sorted(found["all-reduce"]) == sorted([*sums, 2 * len(params)])


@both_meshes
def test_in_shard_map_a_row_method_takes_one_psum_and_gives_the_same_numbers(axes: str) -> None:
    shapes, specs = model(axes, 6)
    make = lambda axis_name: oracles.row_ball(3.0, anchor="zero", axis_name=axis_name)
    step, state = in_shard_map(make(specs).update, make(None), axes, shapes, specs)
    traced = jax.jit(step).trace(shapes, state, shapes)
    (only,) = (name for name in primitives(traced.jaxpr) if COLLECTIVE.match(name))
    assert only.startswith("psum")
    draw = np.random.default_rng(0)
    params = {name: draw.normal(size=x.shape).astype(x.dtype) for name, x in shapes.items()}
    state = make(None).init(params)
    found = jax.block_until_ready(jax.jit(step)(params, state, params))
    expected = make(None).update(params, state, params)
    chex.assert_trees_all_close(found, expected, rtol=1e-5)


@pytest.mark.parametrize("stage", ["ftp in mars", "tpgm in mars"])
def test_in_shard_map_rows_that_all_devices_know_take_no_maximum(stage: str) -> None:
    params, specs = model("2-D", 3)
    params["p1"], specs["p1"] = params["p0"], P("y", "x")
    tx = optax_spd.with_gradient(STAGES[stage](axis_name=specs))
    step, state = in_shard_map(tx.update, tx, "2-D", params, specs)
    jaxpr = jax.make_jaxpr(step)(params, state, params)
    (only,) = (name for name in primitives(jaxpr.jaxpr) if COLLECTIVE.match(name))
    assert only.startswith("psum")
