"""What FTP remembers of each layer: with missing or sick gradients, in which dtype, and its cost.

The original counts all layers' steps with one counter and keeps NaN for good; here each layer has
steps, radius, moments and C of its own.
"""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest
from jax_support import primitives

import optax_spd
from optax_spd import LayerSpec

STEPS = 8
NORMS = pytest.mark.parametrize("norm", ["mars", "l2"])


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def by_layer(state: Any, index: int) -> tuple[float, ...]:
    """Radius, steps and moments of one layer."""
    vectors = (state.ftp_radii, *state.ftp_moments)
    return tuple(vector[index].item() for vector in vectors)


# Missing gradients -------------------------------------------------------------------------------

# Alike in shape, so that eager operations are compiled once.
PARAMS = {name: jnp.asarray(normal(i, 3, 4)) for i, name in enumerate("abc")}
GRADS = [
    {
        name: jnp.asarray((-1.0) ** (step // 3) + normal(10 * step + i, 3, 4))
        for i, name in enumerate("abc")
    }
    for step in range(STEPS)
]
RATE = 0.1


def run(grads: list[Any], names: str) -> list[tuple[Any, Any]]:
    """Trains some of the arrays, op by op so that results are equal to the bit; None is missing.

    The inner optimizer has no memory: what one without a gradient does is not the question.
    """
    tx = optax_spd.chain(optax.sgd(RATE), optax_spd.ftp(0.5))
    params = {name: PARAMS[name] for name in names}
    state, history = tx.init(params), []
    for tree in grads:
        updates, state = tx.update({name: tree[name] for name in names}, state, params)
        assert [u is None for u in updates.values()] == [tree[name] is None for name in names]
        params = {
            name: x if updates[name] is None else x + updates[name] for name, x in params.items()
        }
        history.append((params, state[1]))
    return history


@functools.cache
def alone(names: str) -> list[tuple[Any, Any]]:
    return run(GRADS, names)


@pytest.mark.parametrize(
    "present",
    ["01101100", "00010111", "11100011", "10000000", "00000000"],
    ids=["at first and later", "appears late", "a gap", "one step only", "never"],
)
def test_a_missing_gradient_leaves_its_layer_as_it_is_and_every_other_alone(present: str) -> None:
    here = [step for step in range(STEPS) if present[step] == "1"]
    grads = [g if step in here else g | {"b": None} for step, g in enumerate(GRADS)]
    found, others = run(grads, "abc"), alone("ac")
    # b as if it had trained by itself, on the steps that it took part in.
    single = run([GRADS[step] for step in here], "b")
    taken, untouched = 0, (0.0, 0, 0.0, 0.0)
    for step, (params, state) in enumerate(found):
        expected_params, expected = others[step]
        for index, (name, theirs) in enumerate([("a", 0), ("c", 1)]):
            np.testing.assert_array_equal(params[name], expected_params[name])
            np.testing.assert_array_equal(state.ftp_deviation[name], expected.ftp_deviation[name])
            assert by_layer(state, 2 * index) == by_layer(expected, theirs)
        taken += step in here
        assert int(state.count) == step + 1
        if taken == 0:
            assert by_layer(state, 1) == untouched
            np.testing.assert_array_equal(params["b"], PARAMS["b"])
            np.testing.assert_array_equal(state.ftp_deviation["b"], np.zeros((3, 4)))
            continue
        b_params, b_state = single[taken - 1]
        assert by_layer(state, 1) == by_layer(b_state, 0)
        np.testing.assert_array_equal(params["b"], b_params["b"])
        np.testing.assert_array_equal(state.ftp_deviation["b"], b_state.ftp_deviation["b"])
    assert by_layer(found[-1][1], 1)[1] == len(here)


def test_of_a_group_only_the_arrays_with_a_gradient_are_judged(x64: None) -> None:
    """The bias of a frozen-bias phase neither moves nor counts; the module's radius goes on."""
    specs = {"bias": LayerSpec(group="m"), "kernel": LayerSpec(group="m")}
    params = {"bias": normal(0, 3).astype(float), "kernel": normal(1, 2, 3).astype(float)}
    tx = optax_spd.chain(
        optax.sgd(RATE),
        optax_spd.ftp(radius_learning_rate=0.1, layers=lambda path, _: specs[path]),
    )
    state, start, oracle, update = tx.init(params), params, oracles.FTP(), jax.jit(tx.update)
    for step in range(6):
        grads = jax.tree.map(lambda x, step=step: np.cos(x + step), params)
        names = ["bias", "kernel"] if step in (0, 1, 5) else ["kernel"]
        rows = lambda tree, names=names: oracles.rows_by_layer({n: tree[n] for n in names}, specs)[
            "m"
        ]
        if len(names) != len(oracle.previous):
            kept = state[1].ftp_deviation
            oracle.previous = rows(kept) if step else []
        u = oracle.step(
            [-RATE * x for x in rows(grads)], rows(params), rows(start), rows(grads), rate=0.1
        )
        given = {name: grads[name] if name in names else None for name in params}
        updates, state = update(given, state, params)
        for ours, theirs in zip(rows(updates), u, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-12)
        np.testing.assert_allclose(state[1].ftp_radii, [oracle.gamma], rtol=0, atol=1e-12)
        params = {n: x if updates[n] is None else x + updates[n] for n, x in params.items()}
    assert oracle.met["projected"] >= 3


# Sick numbers ------------------------------------------------------------------------------------

SHAPES = {"a": (4,), "b": (2, 3), "stack": (4, 3)}
LAYERS = ["a", "b", "stack[0]", "stack[1]", "stack[2]"]
SICK = {
    "NaN gradient": ("grad", np.nan),
    "infinite gradient": ("grad", np.inf),
    "negative infinite gradient": ("grad", -np.inf),
    "a gradient whose square overflows": ("grad", 3e37),
    "NaN update": ("update", np.nan),
    "infinite update": ("update", -np.inf),
    "NaN parameter": ("params", np.nan),
    "NaN anchor": ("anchor", np.nan),
    "the norm overflows": ("update", np.float32(3e38)),
}


@functools.cache
def compiled(norm: str) -> tuple[Any, Any]:
    """A stage's update from four trees, and its state after two healthy steps."""
    layers = optax_spd.stacked("stack", axis=1)
    tx = optax_spd.ftp(norm=norm, anchor="argument", layers=layers, radius_learning_rate=0.1)

    @jax.jit
    def update(state: Any, trees: dict[str, Any]) -> Any:
        return tx.update(
            trees["update"], state, trees["params"], grad=trees["grad"], anchor=trees["anchor"]
        )

    state = tx.init(healthy(0)["params"])
    for seed in range(2):
        _, state = update(state, healthy(seed))
    return update, state


def healthy(seed: int) -> dict[str, Any]:
    """A gradient against the deviation, so that radii grow and project at once."""
    params = {name: normal(i, *shape) for i, (name, shape) in enumerate(SHAPES.items())}
    draw = np.random.default_rng(seed)
    trees = {
        "params": params,
        "anchor": {name: np.zeros(shape) for name, shape in SHAPES.items()},
        "grad": {name: draw.normal(size=x.shape) - 2 * np.sign(x) for name, x in params.items()},
        "update": {name: x / 4 + 0.1 * draw.normal(size=x.shape) for name, x in params.items()},
    }
    return jax.tree.map(lambda x: x.astype(np.float32), trees)


def entry(layer: str) -> tuple[str, tuple[Any, ...]]:
    """A layer's array, and the index of the layer in it."""
    name, bracket, index = layer.rstrip("]").partition("[")
    return name, (slice(None), int(index)) if bracket else (...,)


@NORMS
@pytest.mark.parametrize("layer", ["b", "stack[1]"])
@pytest.mark.parametrize(("tree", "value"), SICK.values(), ids=SICK)
def test_a_sick_layer_keeps_its_update_and_its_radius_and_touches_no_other(
    tree: str, value: float, layer: str, norm: str
) -> None:
    update, before = compiled(norm)
    trees = healthy(2)
    expected, well = update(before, trees)
    assert not np.any(well.ftp_radii == before.ftp_radii)
    name, index = entry(layer)
    if value == np.float32(3e38):
        trees[tree][name][index] = value
    else:
        trees[tree][name][index].flat[0] = value  # one number of a layer is enough
    updates, after = update(before, trees)

    number = LAYERS.index(layer)
    np.testing.assert_array_equal(updates[name][index], trees["update"][name][index])
    assert by_layer(after, number) == by_layer(before, number)
    np.testing.assert_array_equal(
        after.ftp_deviation[name][index], before.ftp_deviation[name][index]
    )
    for i, other in enumerate(LAYERS):
        if other != layer:
            name, index = entry(other)
            np.testing.assert_array_equal(updates[name][index], expected[name][index])
            np.testing.assert_array_equal(
                after.ftp_deviation[name][index], well.ftp_deviation[name][index]
            )
            assert by_layer(after, i) == by_layer(well, i)

    recovered, last = update(after, healthy(3))  # and it goes on from there
    assert by_layer(last, number)[1] == by_layer(after, number)[1] + 1
    assert by_layer(last, number)[0] != by_layer(after, number)[0]
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((recovered, last)))


@pytest.mark.parametrize("sick", [0, 1, 4], ids=["first step", "second step", "later"])
@NORMS
def test_training_goes_on_after_a_nan_gradient(norm: str, sick: int, x64: None) -> None:
    """With ``zero_nans`` in the chain the step is sound, and the radii see the raw gradient."""
    params = {"a": normal(0, 2, 3).astype(float), "b": normal(1, 4).astype(float)}
    grads = jax.tree.map(
        lambda x: np.cos(np.arange(STEPS) / 2).reshape(-1, *[1] * x.ndim) + 0.3 * x, params
    )
    grads["a"][sick, 0, 1] = np.nan
    stage = optax_spd.ftp(norm=norm, radius_learning_rate=0.1)
    tx = optax_spd.chain(optax.zero_nans(), optax.sgd(RATE), stage)
    trained, radii = oracles.train(tx, params, grads)
    for index, (name, start) in enumerate(params.items()):
        rows = lambda x, name=name: oracles.rows_by_layer({name: x}, {name: LayerSpec()})[name]
        theta, oracle = rows(start), oracles.FTP(norm)
        for step in range(STEPS):
            g = rows(grads[name][step])
            u = [-RATE * np.nan_to_num(x) for x in g]
            if not (name == "a" and step == sick):
                u = oracle.step(u, theta, rows(start), g, rate=0.1)
            theta = [x + y for x, y in zip(theta, u, strict=True)]
            np.testing.assert_allclose(radii[step, index], oracle.gamma, rtol=0, atol=1e-12)
        np.testing.assert_allclose(rows(trained[name])[0], theta[0], rtol=0, atol=1e-12)
        assert oracle.met["projected"] >= 3


# Dtypes ------------------------------------------------------------------------------------------


def model(dtype: Any = np.float32) -> Any:
    return {
        "dense": {"bias": normal(0, 8).astype(dtype), "kernel": normal(1, 8, 8).astype(dtype)},
        "head": normal(2, 8, 4).astype(dtype),
    }


def pulled_and_pushed(params: Any, steps: int) -> Any:
    """Recorded gradients that keep a direction for a while."""

    def one(x: Any) -> np.ndarray:
        turning = np.cos(np.arange(steps) / 9).reshape(-1, *[1] * x.ndim)
        return (turning * np.sin(7 * x) + 0.2 * normal(3, steps, *x.shape)).astype(x.dtype)

    return jax.tree.map(one, params)


@NORMS
def test_bfloat16_state_stays_near_the_float32_run(norm: str) -> None:
    steps = 60
    grads = pulled_and_pushed(model(), steps)

    def run(state_dtype: Any) -> tuple[Any, np.ndarray]:
        tx = optax_spd.adam_ftp(0.02, norm=norm, radius_learning_rate=0.05, state_dtype=state_dtype)
        return oracles.train(tx, model(), grads)

    (params, radii), (near, near_radii) = run(None), run(jnp.bfloat16)
    moved = np.concatenate(
        [
            np.ravel(x - y)
            for x, y in zip(jax.tree.leaves(params), jax.tree.leaves(model()), strict=True)
        ]
    )
    apart = np.concatenate(
        [
            np.ravel(x - y)
            for x, y in zip(jax.tree.leaves(params), jax.tree.leaves(near), strict=True)
        ]
    )
    assert radii.dtype == near_radii.dtype == np.float32
    assert 0 < np.abs(near_radii / radii - 1).max() < 0.02
    assert 0 < np.linalg.norm(apart) < 1e-3 * np.linalg.norm(moved)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("state_dtype", [None, jnp.float32], ids=["own", "float32"])
@NORMS
def test_half_precision_params_have_radii_in_float32(
    norm: str, state_dtype: Any, dtype: Any
) -> None:
    """Against float64 step by step, from the stored C and params: only their rounding is theirs."""
    params = {"kernel": jnp.asarray(normal(0, 40, 30), dtype)}
    rows = lambda x: oracles.rows_by_layer({"kernel": x["kernel"]}, {"kernel": LayerSpec()})[
        "kernel"
    ]
    tx = optax_spd.ftp(norm=norm, radius_learning_rate=0.1, state_dtype=state_dtype)
    update, state, start, oracle = jax.jit(tx.update), tx.init(params), params, oracles.FTP(norm)
    types = jax.tree.map(jax.typeof, state)
    assert state.ftp_deviation["kernel"].dtype == (state_dtype or dtype)
    assert state.ftp_radii.dtype == state.ftp_moments.second.dtype == np.float32
    for step in range(5):
        grads = jax.tree.map(lambda x, step=step: jnp.sin(x + step).astype(dtype), start)
        u = jax.tree.map(lambda g: (-0.1 * g).astype(dtype), grads)
        oracle.previous = rows(state.ftp_deviation)
        oracle.gamma = float(state.ftp_radii[0])
        (expected,) = oracle.step(rows(u), rows(params), rows(start), rows(grads), rate=0.1)
        updates, state = update(u, state, params, grad=grads)
        assert jax.tree.map(jax.typeof, state) == types
        assert updates["kernel"].dtype == dtype
        np.testing.assert_allclose(state.ftp_radii, [oracle.gamma], rtol=2e-5)
        eps = float(jnp.finfo(dtype).eps)
        np.testing.assert_allclose(rows(updates)[0], expected, rtol=eps, atol=2e-6)
        params = optax.apply_updates(params, updates)
    assert oracle.met["projected"] == 5


def test_the_widest_parameter_dtype_is_the_radii_s(x64: None) -> None:
    params = {"half": jnp.ones(3, jnp.bfloat16), "wide": jnp.ones(3, jnp.float64)}
    state = optax_spd.ftp().init(params)
    assert {x.dtype.name for x in (state.ftp_radii, state.ftp_moments.first)} == {"float64"}
    assert state.ftp_deviation["half"].dtype == jnp.bfloat16
    assert state.ftp_deviation["wide"].dtype == jnp.float64
    assert state.ftp_moments.steps.dtype == jnp.int32


def test_state_dtype_float64_without_x64_is_float32() -> None:
    state = optax_spd.ftp(state_dtype="float64").init(model())
    assert state.ftp_deviation["head"].dtype == jnp.float32


# What it costs and holds -------------------------------------------------------------------------


def state_bytes(tx: Any, params: Any) -> int:
    leaves = jax.tree.leaves(jax.eval_shape(tx.init, params))
    return sum(x.size * x.dtype.itemsize for x in leaves)


@pytest.mark.parametrize(
    ("dtype", "options", "expected"),
    [
        (jnp.float32, {}, 8),
        (jnp.float32, {"state_dtype": jnp.bfloat16}, 6),
        (jnp.float32, {"state_dtype": jnp.bfloat16, "anchor_dtype": jnp.bfloat16}, 4),
        (jnp.float32, {"anchor": "zero"}, 4),
        (jnp.float32, {"anchor": "argument", "state_dtype": jnp.bfloat16}, 2),
        (jnp.bfloat16, {}, 4),
    ],
)
def test_bytes_a_parameter(dtype: Any, options: dict[str, Any], expected: int) -> None:
    tx = optax_spd.ftp(**options)
    sizes = [state_bytes(tx, {"w": jax.ShapeDtypeStruct((n, 10), dtype)}) for n in (100, 300)]
    assert sizes[1] - sizes[0] == 2000 * expected
    assert sizes[0] - 1000 * expected == 4 + 4 * 4  # a counter; radius, steps and two moments


def test_masked_arrays_cost_nothing() -> None:
    params = model()
    whole, part = (
        state_bytes(optax_spd.ftp(mask=mask), params)
        for mask in (None, optax_spd.path_mask("dense"))
    )
    assert whole - part == 8 * 32 + 4 * 4  # the head's anchor and C, and one layer's numbers
    state = optax_spd.ftp(mask=optax_spd.path_mask("dense")).init(params)
    assert state.ftp_deviation["head"] == state.anchor["head"] == optax.MaskedNode()
    assert state.ftp_radii.shape == (2,)


def test_leaves_that_are_no_layers_pass_through_and_store_no_deviation() -> None:
    params = {
        "count": np.arange(3),
        "empty": np.ones((0, 3), np.float32),
        "layer": np.full(2, 3.0, np.float32),
        "masked": optax.MaskedNode(),
        "none": None,
    }
    tx = optax_spd.ftp(anchor="zero")
    state = tx.init(params)
    for _ in range(2):
        updates, state = tx.update(params, state, params, grad=params)
        for name in params.keys() - {"layer"}:
            assert updates[name] is params[name], name
        assert not np.array_equal(updates["layer"], params["layer"])
        assert len(jax.tree.leaves(state.ftp_deviation)) == 1
        assert state.ftp_deviation["none"] is None
        for name in ("count", "empty", "masked"):
            assert state.ftp_deviation[name] == optax.MaskedNode()


def test_a_tree_without_layers_trains_on() -> None:
    params = {"count": jnp.arange(3)}
    tx = optax_spd.ftp()
    updates, state = tx.update(params, tx.init(params), params, grad=params)
    np.testing.assert_array_equal(updates["count"], params["count"])
    assert state.ftp_radii.shape == (1,)


def buffers(tree: Any) -> list[int]:
    return [x.unsafe_buffer_pointer() for x in jax.tree.leaves(tree)]


@pytest.mark.parametrize("jitted", [False, True])
def test_every_array_of_the_state_is_its_own_buffer_and_may_be_donated(jitted: bool) -> None:
    tx = optax_spd.adam_ftp(0.1)
    params = jax.tree.map(jnp.array, model())
    state = (jax.jit(tx.init) if jitted else tx.init)(params)
    pointers = buffers(params) + buffers(state)
    assert len(set(pointers)) == len(pointers)

    def step(params: Any, state: Any, grads: Any) -> Any:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    grads = pulled_and_pushed(model(), 4)
    expected, _ = oracles.train(tx, model(), grads)
    donated, first = jax.jit(step, donate_argnums=(0, 1)), state
    for index in range(4):
        params, state = donated(params, state, jax.tree.map(lambda g, i=index: g[i], grads))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), params, expected)
    assert all(x.is_deleted() for x in jax.tree.leaves(first))


def test_init_answers_shapes_in_kind_and_agrees_with_itself() -> None:
    tx = optax_spd.ftp(state_dtype=jnp.bfloat16, mask=optax_spd.path_mask("dense"))
    params = jax.tree.map(jnp.asarray, model())
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    state = tx.init(params)
    answered = tx.init(shapes)
    held = jax.tree.leaves((answered.anchor, answered.ftp_deviation))
    assert all(isinstance(x, jax.ShapeDtypeStruct) for x in held)
    types = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
    assert types(answered) == types(state) == types(jax.eval_shape(tx.init, params))
    jitted = jax.jit(tx.init)(params)
    jax.tree.map(np.testing.assert_array_equal, jitted, state)


def test_tree_map_params_takes_anchor_and_deviation_for_parameters() -> None:
    for options in ({}, {"anchor": "zero"}, {"mask": optax_spd.path_mask("dense")}):
        tx = optax_spd.ftp(**options)
        state = tx.init(model())
        mapped = optax.tree.map_params(
            tx, lambda x: "param", state, transform_non_params=lambda _: "other"
        )
        assert set(jax.tree.leaves((mapped.anchor, mapped.ftp_deviation))) == {"param"}
        assert set(jax.tree.leaves((mapped.count, mapped.ftp_radii, mapped.ftp_moments))) == {
            "other"
        }


# The anchor --------------------------------------------------------------------------------------

SMALL = {"head": model()["head"]}
PRETRAINED = jax.tree.map(lambda x: 0.5 * x, SMALL)


def quick(stage_options: dict[str, Any], wrap: Any = lambda tx: tx, **extra: Any) -> Any:
    """Three steps of SGD with FTP."""
    tx = optax_spd.with_gradient(
        wrap(optax.chain(optax.sgd(0.1), optax_spd.ftp(radius_learning_rate=1.0, **stage_options)))
    )
    params, state = SMALL, tx.init(SMALL)
    update = jax.jit(functools.partial(tx.update, **extra))
    for _ in range(3):
        updates, state = update(SMALL, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def test_the_anchor_policies_agree_where_they_mean_the_same() -> None:
    expected, _ = quick({"anchor": PRETRAINED})
    shared = lambda tx: optax_spd.with_anchor(tx, PRETRAINED)
    found = [
        quick({"anchor": "argument"}, anchor=PRETRAINED),
        quick({"anchor": "argument"}, shared),
        quick({"anchor": "initial"}),
    ]
    for params, _ in found[:2]:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), params, expected)
    assert not np.allclose(found[2][0]["head"], expected["head"], atol=1e-2)
    zeros = jax.tree.map(np.zeros_like, SMALL)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
        quick({"anchor": "zero"})[0],
        quick({"anchor": zeros})[0],
    )


def test_set_anchor_and_drop_anchor_leave_the_deviation_alone() -> None:
    tx = optax_spd.adam_ftp(0.1)
    params = SMALL
    _, state = quick({})
    dropped = optax_spd.drop_anchor(state)
    before, after = (optax.tree.get(s, "ftp_deviation") for s in (state, dropped))
    jax.tree.map(np.testing.assert_array_equal, before, after)
    stage = optax_spd.chain(optax.sgd(0.1), optax_spd.ftp())
    with pytest.raises(ValueError, match="anchor was dropped; call set_anchor"):
        stage.update(params, dropped, params)

    late = optax_spd.set_anchor(tx.init(params), PRETRAINED)
    early = optax_spd.adam_ftp(0.1, anchor=PRETRAINED).init(params)
    jax.tree.map(np.testing.assert_array_equal, late, early)
    updates, _ = tx.update(params, late, params)
    # The first step goes to the anchor.
    jax.tree.map(
        lambda x, u, a: np.testing.assert_allclose(x + u, a, atol=1e-6), params, updates, PRETRAINED
    )


def test_a_half_precision_anchor_is_what_the_ball_is_around() -> None:
    params = {"w": np.array([1.0, 1.003], np.float32)}
    tx = optax_spd.sgd_ftp(0.1, anchor_dtype=jnp.bfloat16)
    updates, _ = tx.update(params, tx.init(params), params)
    np.testing.assert_allclose(params["w"] + updates["w"], [1.0, 1.0], atol=1e-7)


# What a step may not do --------------------------------------------------------------------------


@NORMS
def test_a_step_has_no_callback_and_is_traced_once(norm: str) -> None:
    count = lambda step: 0.5 / (1 + step)
    tx = optax_spd.adam_ftp(count, k=count, radius_learning_rate=count, norm=norm)
    params = model()
    found = set(primitives(jax.make_jaxpr(tx.update)(params, tx.init(params), params).jaxpr))
    assert "mul" in found
    forbidden = ("callback", "device_put", "infeed", "outfeed", "print")
    assert not [name for name in found if any(word in name for word in forbidden)]

    traces = 0

    @jax.jit
    def step(params: Any, state: Any) -> Any:
        nonlocal traces
        traces += 1
        updates, state = tx.update(params, state, params)
        return optax.apply_updates(params, updates), state

    params, state = jax.tree.map(jnp.asarray, params), tx.init(params)
    types = jax.tree.map(jax.typeof, state)
    for _ in range(3):
        params, state = step(params, state)
        assert jax.tree.map(jax.typeof, state) == types
    assert traces == step._cache_size() == 1
    text = step.lower(params, state).compile().as_text()
    assert not re.search('custom_call_target="[^"]*callback', text)


def test_scanned_steps_are_the_unrolled_ones() -> None:
    tx = optax_spd.sgd_ftp(0.1, 0.9, radius_learning_rate=0.1)
    grads = pulled_and_pushed(model(), 6)
    expected, radii = oracles.train(tx, model(), grads)
    params, state, update = model(), tx.init(model()), jax.jit(tx.update)
    for index in range(6):
        updates, state = update(jax.tree.map(lambda g, i=index: g[i], grads), state, params)
        params = optax.apply_updates(params, updates)
        np.testing.assert_allclose(optax.tree.get(state, "ftp_radii"), radii[index], rtol=1e-5)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), params, expected)
