"""The driver: stages made of three functions, against NumPy, and what the driver owes to each.

The stage of these tests is none that the library has. It keeps a running mean of each layer's
distance from the anchor, and where the next step would lead further than ``slack`` times that mean
it takes the layer back to there.
"""

import functools
from typing import Any, NamedTuple

import ball_oracles
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, PartitionSpec as P
from oracles import row_ball

import optax_spd
from optax_spd import Decision, LayerSpec

SHAPES = {
    "blocks/bias": (3, 4),
    "blocks/kernel": (3, 2, 4),
    "dense/bias": (4,),
    "dense/kernel": (2, 4),
    "scale": (),
}
LAYERS: dict[str, Any] = {
    "per array": None,
    "stacked": optax_spd.stacked("^blocks/"),
    "by module": optax_spd.by_module(layers=optax_spd.stacked("^blocks/")),
}
START, RATE = 0.5, 0.25


def measure(d: Any, gradient: jax.Array) -> tuple[jax.Array, ...]:
    return d.delta**2, d.tentative**2, gradient * d.step


def decide(
    now: jax.Array,
    then: jax.Array,
    descent: jax.Array,
    average: jax.Array,
    held: jax.Array,
    *,
    slack: jax.Array,
) -> Decision:
    distance, length = jnp.sqrt(now), jnp.sqrt(then)
    average = (1 - RATE) * average + RATE * distance
    limit = slack * average
    holds = length > limit
    return Decision(
        record={"length": length, "descends": descent < 0},
        coefficients=(limit / jnp.where(holds, length, 1),),
        changes=holds,
        memory={"average": average, "held": held + holds},
    )


def act(d: Any, factor: jax.Array) -> jax.Array:
    return factor * d.tentative - d.delta


def leash(slack: Any = 1.5, **options: Any) -> optax.GradientTransformationExtraArgs:
    given: dict[str, Any] = {
        "measure": measure,
        "decide": decide,
        "act": act,
        "sums": 3,
        "memory": {"average": START, "held": 0},
        "hyperparameters": {"slack": slack},
    }
    return optax_spd.layerwise("leash", **(given | options))


def oracle(
    delta: np.ndarray, step: np.ndarray, average: float, slack: float
) -> tuple[np.ndarray, float, float, bool]:
    """One layer's step, in float64: the update, its length, the new mean, whether it was held."""
    distance, length = np.linalg.norm(delta), np.linalg.norm(delta + step)
    average = (1 - RATE) * average + RATE * distance
    if length <= slack * average:
        return step, length, average, False
    return slack * average / length * (delta + step) - delta, length, average, True


def arrays(seed: int, scale: float = 1.0, dtype: Any = np.float32) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(seed)
    return {p: np.asarray(scale * draw.normal(size=s), dtype) for p, s in SHAPES.items()}


def vectors(tree: Any, layers: str) -> dict[str, np.ndarray]:
    """Each layer's numbers as one vector, by its name."""
    balls = ball_oracles.Balls(tree, "l2", LAYERS[layers])
    return {
        name: np.concatenate([balls.rows[path][i].ravel() for path, i in parts])
        for name, parts in balls.members.items()
    }


# Against NumPy -----------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", LAYERS)
def test_a_stage_with_memory_equals_numpy(layers: str, x64: None) -> None:
    slack = optax.piecewise_constant_schedule(2.0, {2: 0.25, 4: 3.0})
    anchor = arrays(0, dtype=np.float64)
    tx = leash(slack, anchor=anchor, layers=LAYERS[layers])
    params, state, update = anchor, tx.init(anchor), jax.jit(tx.update)
    names, start = optax_spd.layer_names(anchor, layers=LAYERS[layers]), vectors(anchor, layers)
    assert sorted(start) == sorted(names)
    averages, held = dict.fromkeys(names, START), dict.fromkeys(names, 0)
    for count in range(7):
        step = arrays(10 + count, 0.4, np.float64)
        grads = arrays(20 + count, dtype=np.float64)
        updates, state = update(step, state, params, grad=grads)
        theta, u, g, new = (vectors(tree, layers) for tree in (params, step, grads, updates))
        for index, name in enumerate(names):
            delta = theta[name] - start[name]
            expected, length, averages[name], holds = oracle(
                delta, u[name], averages[name], float(slack(count))
            )
            held[name] += holds
            np.testing.assert_allclose(new[name], expected, atol=1e-12)
            np.testing.assert_allclose(state.record["length"][index], length, rtol=1e-12)
            assert state.record["descends"][index] == (np.dot(u[name], g[name]) < 0)
            np.testing.assert_allclose(state.memory["average"][index], averages[name], rtol=1e-12)
            assert state.memory["held"][index] == held[name]
        params = optax.apply_updates(params, updates)
    assert state.count == 7
    assert 0 < sum(held.values()) < 7 * len(names)


@pytest.mark.parametrize("layers", LAYERS)
def test_a_decision_for_each_row_is_tpgms_projection(layers: str) -> None:
    anchor, params, step = arrays(0), arrays(1), arrays(2, 0.5)
    options: dict[str, Any] = {"anchor": anchor, "layers": LAYERS[layers]}
    tx, tpgm = row_ball(1.5, **options), optax_spd.tpgm(norm="mars", radii=1.5, **options)
    updates, state = jax.jit(tx.update)(step, tx.init(params), params)
    expected, _ = tpgm.update(step, tpgm.init(params), params)
    for path in params:
        np.testing.assert_allclose(updates[path], expected[path], rtol=1e-5, atol=1e-6)
    # The record is the mean over a layer's rows, of all its arrays.
    tentative = {path: params[path] + step[path] - anchor[path] for path in params}
    balls = ball_oracles.Balls(tentative, "mars", LAYERS[layers])
    for index, name in enumerate(optax_spd.layer_names(params, layers=LAYERS[layers])):
        norms = np.concatenate(balls.row_norms(name))
        factor = np.minimum(1, 1.5 / norms).mean()
        np.testing.assert_allclose(state.record["factor"][index], factor, rtol=1e-5, err_msg=name)
        weights = sum(balls.rows[path][i].size for path, i in balls.members[name])
        np.testing.assert_allclose(state.record["ones"][index], weights / norms.size, rtol=1e-6)


def test_a_row_method_keeps_its_state_where_no_array_has_an_update() -> None:
    params = {"w": jnp.ones((2, 2))}
    tx = row_ball(1.0)
    state = tx.init(params)
    _, after = tx.update({"w": None}, state, params)
    assert jax.tree.map(jax.typeof, after) == jax.tree.map(jax.typeof, state)


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_rows_take_schedules_and_keep_what_is_not_finite_apart(poison: float) -> None:
    params, step = {"w": np.ones((3, 2), np.float32)}, {"w": np.ones((3, 2), np.float32)}
    step["w"][0, 1] = poison
    tx = row_ball(lambda count: 3.0 / (1 + count), anchor="zero")
    state = tx.init(params)
    for radius in (3.0, 1.5):
        updates, state = tx.update(step, state, params)
        np.testing.assert_allclose(params["w"][:, 0] + updates["w"][:, 0], radius / 3, rtol=1e-6)
        np.testing.assert_array_equal(updates["w"][:, 1], step["w"][:, 1])
        # A row that is not finite is decided as one whose sums are 0.
        np.testing.assert_array_equal(state.record["ones"], [1.5])


# The state ---------------------------------------------------------------------------------------


def test_records_and_memory_have_their_own_dtypes_from_the_start() -> None:
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), arrays(0))
    tx = leash(layers=LAYERS["stacked"])
    state = tx.init(params)
    types = {k: (*v.shape, str(v.dtype)) for k, v in (state.record | state.memory).items()}
    floats = dict.fromkeys(("length", "average"), (9, "float32"))
    assert types == floats | {"descends": (9, "bool"), "held": (9, "int32")}
    np.testing.assert_array_equal(state.memory["average"], np.full(9, START, np.float32))
    _, after = tx.update(params, state, params, grad=params)
    assert jax.tree.map(jax.typeof, after) == jax.tree.map(jax.typeof, state)
    # Row records are means: floating whatever decide returned.
    state = row_ball(1.0).init(params)
    assert (state.record["factor"].dtype, state.memory) == (jnp.float32, {})
    # A tree without layers has one unused entry in every vector.
    state = tx.init({"ids": jnp.arange(2)})
    assert {x.shape for x in (*state.record.values(), *state.memory.values())} == {(1,)}


class LeashState(NamedTuple):
    """A state class of one's own."""

    held: Any
    average: Any
    length: Any
    descends: Any
    layer_fingerprint: Any
    anchor: Any
    count: Any  # type: ignore[assignment]


def test_a_state_class_of_ones_own_holds_the_same_and_its_anchor_is_found() -> None:
    params, step = arrays(0), arrays(1, 0.5)
    own, plain = leash(state=LeashState), leash()
    state, reference = own.init(params), plain.init(params)
    assert isinstance(reference, optax_spd.LayerwiseState)
    for _ in range(2):
        updates, state = own.update(step, state, params, grad=step)
        expected, reference = plain.update(step, reference, params, grad=step)
        jax.tree.map(np.testing.assert_array_equal, updates, expected)
    assert isinstance(state, LeashState)
    for key, vector in (reference.record | reference.memory).items():
        np.testing.assert_array_equal(getattr(state, key), vector)
    moved = optax_spd.set_anchor(state, step)
    np.testing.assert_array_equal(moved.anchor["scale"], step["scale"])
    with pytest.raises(ValueError, match="the anchor was dropped; call set_anchor"):
        own.update(step, optax_spd.drop_anchor(state), params, grad=step)
    optax_spd.check_state(state, params)


# What passes through -----------------------------------------------------------------------------


@pytest.mark.parametrize("poison", [np.nan, np.inf])
@pytest.mark.parametrize("where", ["grad", "updates", "params"])
def test_what_is_not_finite_stays_in_its_layer(where: str, poison: float) -> None:
    tx = leash(layers=LAYERS["by module"], anchor="zero")
    names = optax_spd.layer_names(arrays(0), layers=LAYERS["by module"])
    update = jax.jit(tx.update)

    def run(sick: bool) -> Any:
        trees = {"params": arrays(0), "updates": arrays(1, 3.0), "grad": arrays(2)}
        if sick:
            trees[where]["blocks/bias"][1, 2] = poison
        state = tx.init(arrays(0))
        new, state = update(trees["updates"], state, trees["params"], grad=trees["grad"])
        return trees["updates"], new, state

    _, healthy, state = run(False)
    given, new, after = run(True)
    assert state.memory["held"].all()
    victim = names.index("blocks[1]")
    for path in SHAPES:
        hit = (1,) if path.startswith("blocks") else ()
        expected = np.array(healthy[path])
        if hit:
            expected[1] = given[path][1]
        np.testing.assert_array_equal(new[path], expected, err_msg=path)
    for key, start in (("average", START), ("held", 0)):
        expected = np.array(state.memory[key])
        expected[victim] = start
        np.testing.assert_array_equal(after.memory[key], expected)


def test_a_new_memory_that_is_not_finite_is_not_kept() -> None:
    def decide(square: jax.Array, scale: jax.Array) -> Decision:
        new = jnp.where(square > 1, jnp.inf, scale * 2)
        return Decision({}, (), jnp.zeros_like(square, bool), {"scale": new})

    tx = optax_spd.layerwise(
        "doubling",
        measure=lambda d: (d.step**2,),
        decide=decide,
        act=lambda d: d.step,
        sums=1,
        memory={"scale": 1.0},
        gradient=False,
    )
    params = {"far": jnp.full(2, 3.0), "near": jnp.full(2, 0.1)}
    updates, state = tx.update(params, tx.init(params), params)
    np.testing.assert_array_equal(state.memory["scale"], [1.0, 2.0])
    jax.tree.map(np.testing.assert_array_equal, updates, params)
    assert state.record == {}


# Parameters split by hand ------------------------------------------------------------------------

SPECS = {
    "blocks/bias": P(None, "x"),
    "blocks/kernel": P(None, "y", "x"),
    "dense/bias": P(),
    "dense/kernel": P("y", "x"),
    "scale": P(),
}


@pytest.mark.parametrize("level", ["layer", "row"])
@pytest.mark.parametrize("layers", ["stacked", "by module"])
def test_shard_map_equals_one_device(layers: str, level: str) -> None:
    # Replicated arrays and arrays split over one axis or both, also in one group.
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    build = leash if level == "layer" else row_ball
    trees = arrays(0), arrays(1, 0.5), arrays(2)

    def run(axis_name: Any, params: Any, step: Any, anchor: Any) -> Any:
        tx = build(1.0, layers=LAYERS[layers], anchor="argument", axis_name=axis_name)
        updates, state = tx.update(step, tx.init(params), params, grad=step, anchor=anchor)
        return updates, (state.record, state.memory)

    expected = jax.jit(functools.partial(run, None))(*trees)
    run_split = functools.partial(run, SPECS)
    mapped = jax.shard_map(run_split, mesh=mesh, in_specs=(SPECS,) * 3, out_specs=(SPECS, P()))
    found = jax.jit(mapped)(*trees)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6, atol=2e-6)
    jax.tree.map(close, found, expected)
    if level == "layer":
        assert np.sum(found[1][1]["held"]) > 0


# What is refused ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"level": "array"}, ValueError, "level must be 'layer' or 'row', got 'array'"),
        ({"level": "row"}, ValueError, r"memory holds one value a layer.*\['average', 'held'\]"),
        ({"level": "row", "memory": None, "axis_name": "x"}, ValueError, "level='row' sums along"),
        ({"sums": 0}, ValueError, "sums must be at least 1"),
        ({"sums": 1.5}, TypeError, "sums must be an integer"),
        ({"memory": {"average": np.nan}}, ValueError, r"memory\['average'\] must be finite"),
        ({"memory": {"average": "1"}}, TypeError, r"memory\['average'\] must hold real numbers"),
        ({"anchor": "pretrained"}, ValueError, "anchor must be one of"),
        ({"layers": 3}, TypeError, "layers must be a function"),
    ],
)
def test_arguments_are_checked_when_the_stage_is_built(
    options: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        leash(**options)


def hits(**changes: Any) -> Any:
    """A method whose record and coefficients have no layer axis of their own."""
    arguments = {
        "measure": lambda d: (d.step**2,),
        "decide": lambda square, *, size: Decision(
            {"hit": jnp.where(square >= 0, 1.0, 0.0)}, (size,), square > 0
        ),
        "act": lambda d, size: size * d.step,
        "sums": 1,
        "gradient": False,
        "hyperparameters": {"size": 0.5},
    }
    return optax_spd.layerwise("hits", **{**arguments, **changes})


def test_scalars_among_coefficients_and_records_keep_shapes_and_types() -> None:
    params = {"w": jnp.ones((3, 2))}
    tx = hits(layers=optax_spd.stacked("w"))
    state = tx.init(params)
    updates, after = tx.update(params, state, params)
    np.testing.assert_array_equal(updates["w"], np.full((3, 2), 0.5))
    assert jax.tree.map(jax.typeof, after) == jax.tree.map(jax.typeof, state)


class Lacking(NamedTuple):
    anchor: Any
    held: Any


def one_group(path: str, array: Any) -> LayerSpec:
    return LayerSpec((0,) if array.ndim > 2 else (), group="all")


@pytest.mark.parametrize(
    ("tx", "made_by", "message"),
    [
        (leash(state=Lacking), None, r"state=Lacking has the fields anchor, held; .*length"),
        (leash(layers=one_group), None, "in the group 'all'"),
        (leash(measure=lambda d, g: (d.delta,)), leash(), r"'leash' must return a tuple of sums=3"),
        (leash(measure=lambda d, g: d.delta), leash(), r"'leash' must return a tuple of sums=3"),
        (leash(), leash(), "leash needs the raw gradient"),
        (
            leash(layers=LAYERS["stacked"], gradient=False, measure=lambda d: d),
            leash(),
            r"The state's descends has shape \(5,\).* 9 layers",
        ),
        (
            row_ball(1.0, layers=LAYERS["stacked"]),
            row_ball(1.0),
            r"The state's factor has shape \(5,\).* 9 layers",
        ),
        (
            hits(memory={"m": 0.0}, decide=lambda q, m, *, size: Decision({}, (size,), q > m)),
            None,
            r"returned the memory \[\], but memory= declares",
        ),
        (
            hits(decide=lambda q, *, size: Decision({"count": q}, (size,), q > 0)),
            None,
            r"records \['count'\]",
        ),
    ],
)
def test_what_does_not_fit_together_is_named(tx: Any, made_by: Any, message: str) -> None:
    params = arrays(0)
    extra = {} if "raw gradient" in message else {"grad": params}
    with pytest.raises(ValueError, match=message):
        tx.update(params, (made_by or tx).init(params), params, **extra)
