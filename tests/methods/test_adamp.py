"""AdamP and SGDP against the original implementation and against float64 NumPy."""

import collections
import functools
from typing import Any, NamedTuple

import ball_oracles
import golden
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import replays
from jax.sharding import AxisType, PartitionSpec as P

import optax_spd
from optax_spd import LayerSpec
from optax_spd.methods.adamp.directions import dampened_trace

CASES = golden.settings("adamp")


class Kind(NamedTuple):
    """What decides about a case's program, besides its arrays; 1 - b2 needs all digits of b2."""

    algorithm: str
    nesterov: bool
    betas: tuple[float, float] | None
    momentum: float | None
    dampening: float
    projects_momentum: bool


def kind_of(case: dict[str, Any]) -> Kind:
    betas = tuple(case["betas"]) if "betas" in case else None
    momentum = case.get("momentum") or None
    fires = case["stats"]["channel"] + case["stats"]["layer"] > 0
    projects_momentum = momentum is not None and not case["nesterov"] and fires
    dampening = case.get("dampening", 0)
    return Kind(case["algorithm"], case["nesterov"], betas, momentum, dampening, projects_momentum)


NUMBERS = ("weight_decay", "delta", "wd_ratio")


def original_sgdp(momentum: float, dampening: float, rate: Any, **options: Any) -> Any:
    """SGDP without Nesterov momentum as the authors wrote it: the buffer itself is projected."""
    decay = options.pop("weight_decay") / (1 - momentum)
    decayed = optax_spd.remove_radial(decay, **options)
    projection = optax_spd.remove_radial(0.0, **options)

    def init(params: Any) -> Any:
        return jax.tree.map(jnp.zeros_like, params), projection.init(params)

    def update(grads: Any, state: Any, params: Any) -> Any:
        buffer, count = state
        buffer = jax.tree.map(lambda b, g: momentum * b + (1 - dampening) * g, buffer, grads)
        updates, _ = decayed.update(buffer, count, params, grad=grads)
        buffer, new_count = projection.update(buffer, count, params, grad=grads)
        updates = jax.tree.map(lambda u: -rate(count.count).astype(u.dtype) * u, updates)
        return updates, (buffer, new_count)

    return optax.GradientTransformation(init, update)


def optimizer_of(kind: Kind, rates: jax.Array, numbers: Any, eps: Any, layers: Any) -> Any:
    rate, options = lambda count: rates[count], {**numbers, "layers": layers}
    if kind.algorithm == "AdamP":
        return optax_spd.adamp(rate, *kind.betas, eps, nesterov=kind.nesterov, **options)
    if kind.projects_momentum:
        assert kind.momentum is not None
        return original_sgdp(kind.momentum, kind.dampening, rate, **options)
    more = {"dampening": kind.dampening, **options}
    return optax_spd.sgdp(rate, kind.momentum, kind.nesterov, **more)


@functools.cache
def program(kind: Kind, layout: str) -> Any:
    """A replay of all cases of a kind."""

    def run(recorded: replays.Recording, numbers: Any, eps: Any) -> Any:
        layers = replays.LAYOUTS[layout].layers
        return replays.run(optimizer_of(kind, recorded.rates, numbers, eps, layers), recorded)

    return jax.jit(run)


def replayed(case: dict[str, Any], layout: str, dtype: Any) -> float:
    recorded = replays.recording("adamp", case, layout, dtype)
    # It has no gradient; the original does not even decay it.
    for tree in (recorded.theta0, recorded.grads):
        del tree["never"]
    numbers = {name: case[name] for name in NUMBERS}
    params = program(kind_of(case), layout)(recorded, numbers, case["eps"])
    assert {x.dtype for x in params.values()} == {np.dtype(dtype)}
    return replays.largest_error("adamp", case, layout, params)


by_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])


@pytest.mark.parametrize("layout", ["PyTorch", "Flax", "stacked"])
@by_case
def test_replays_the_original(case: dict[str, Any], layout: str, x64: None) -> None:
    assert replayed(case, layout, np.float64) <= 1e-9


@by_case
def test_replays_the_original_in_float32(case: dict[str, Any]) -> None:
    assert replayed(case, "PyTorch", np.float32) <= 1e-5


# Against NumPy -----------------------------------------------------------------------------------

Arrays = dict[str, np.ndarray]


def expected_direction(
    w: Arrays, g: Arrays, p: Arrays, specs: dict[str, LayerSpec],
    decay: float, delta: float, ratio: float, eps: float,
) -> tuple[Arrays, list[str]]:  # fmt: skip
    """Section 5 of the notes on the original, one layer after the other; the views that fired."""
    p = {name: x.copy() for name, x in p.items()}  # changed in place
    balls = [ball_oracles.Balls(tree, "l2", lambda path, _: specs[path]) for tree in (w, g, p)]
    views = []

    def passes(x: np.ndarray, y: np.ndarray) -> bool:
        lengths = max(np.linalg.norm(x), eps) * max(np.linalg.norm(y), eps)
        return bool(abs(np.sum(x * y)) / lengths < delta / np.sqrt(x.size))

    def project(parts: list[np.ndarray], directions: list[np.ndarray]) -> None:
        length = np.sqrt(sum(np.sum(x**2) for x in parts)) + eps
        inner = sum(np.sum(x * y) for x, y in zip(parts, directions, strict=True))
        for x, y in zip(parts, directions, strict=True):
            y -= x / length * (inner / length)

    for members in balls[0].members.values():
        W, G, Q = ([ball.rows[path][number] for path, number in members] for ball in balls)
        is_matrix = [w[path].ndim - len(specs[path].stacked_axes) > 1 for path, _ in members]
        W2, G2, Q2 = (
            [x for x, use in zip(parts, is_matrix, strict=True) if use] for parts in (W, G, Q)
        )
        pairs = [pair for x, y in zip(W2, G2, strict=True) for pair in zip(x, y, strict=True)]
        whole = [np.concatenate([x.ravel() for x in parts]) for parts in (W2, G2) if parts]
        rho = [1.0] * len(members)
        view = "none"
        if pairs and all(passes(x, y) for x, y in pairs):
            view = "rows"
            for x, y in zip(W2, Q2, strict=True):
                for row, direction in zip(x, y, strict=True):
                    project([row], [direction])
        elif pairs and passes(*whole):
            view = "layer"
            project(W2, Q2)
        if view != "none":
            rho = [ratio if use else 1.0 for use in is_matrix]
        views += [view] if pairs else []
        for x, y, factor in zip(W, Q, rho, strict=True):
            y += decay * factor * x
    return {path: balls[2].back[path](rows) for path, rows in balls[2].rows.items()}, views


def random_specs(rng: np.random.Generator, shapes: dict[str, Any]) -> dict[str, LayerSpec]:
    """Stacked and output axes for each array, and perhaps a group with others of its like."""
    specs = {}
    for name, shape in shapes.items():
        axes = tuple(map(int, rng.permutation(len(shape))))
        stacked = int(rng.integers(len(shape)))
        outputs = int(rng.integers(1, len(shape) - stacked + 1))
        sizes = tuple(shape[a] for a in sorted(axes[:stacked]))
        specs[name] = LayerSpec(
            stacked_axes=axes[:stacked],
            output_axes=axes[stacked:][:outputs] if rng.random() < 0.5 else (-1,),
            group=f"group{sizes}" if rng.random() < 0.5 else None,
        )
    return specs


def test_agrees_with_numpy_whatever_a_layer_is(x64: None) -> None:
    met: collections.Counter[str] = collections.Counter()
    shapes = {"a": (5,), "b": (2, 3, 2), "c": (6, 2), "d": (3, 2, 4), "e": (2, 3, 2)}
    decay, ratio = 0.3, 0.2
    for seed in range(14):
        rng = np.random.default_rng(seed)
        specs = random_specs(rng, shapes)
        w, g, p = (
            {name: rng.normal(size=shape) for name, shape in shapes.items()} for _ in range(3)
        )
        delta, eps = (0.6, 1.2, 1e3)[seed % 3], (1e-8, 0.3)[seed % 2]
        describe = lambda path, _, specs=specs: specs[path]
        tx = optax_spd.remove_radial(decay, delta=delta, wd_ratio=ratio, eps=eps, layers=describe)
        found, _ = jax.jit(tx.update)(p, tx.init(w), w, grad=g)
        expected, views = expected_direction(w, g, p, specs, decay, delta, ratio, eps)
        for name in w:
            np.testing.assert_allclose(found[name], expected[name], rtol=0, atol=1e-12)
        met.update(views)
    assert min(met[view] for view in ("none", "rows", "layer")) >= 5, met


@pytest.mark.parametrize("nesterov", [False, True])
def test_the_recipe_does_not_project_the_momentum(nesterov: bool, x64: None) -> None:
    rng = np.random.default_rng(0)
    momentum, dampening, rate, decay = 0.9, 0.3, 0.05, 0.2
    w, spec = {"w": rng.normal(size=(3, 4))}, {"w": LayerSpec(output_axes=(0,))}
    options = {"delta": 1.2, "layers": optax_spd.outputs("", 0), "weight_decay": decay}
    tx = optax_spd.sgdp(rate, momentum, nesterov, dampening=dampening, **options)
    grads = {"w": rng.normal(size=(8, 3, 4))}
    found = jax.jit(lambda: replays.run(tx, replays.Recording(w, grads, np.zeros(8))))()
    buffer, fired = np.zeros((3, 4)), 0
    for step in range(8):
        g = grads["w"][step]
        buffer = momentum * buffer + (1 - dampening) * g
        p = g + momentum * buffer if nesterov else buffer.copy()
        u, views = expected_direction(
            w, {"w": g}, {"w": p}, spec, decay / (1 - momentum), 1.2, 0.1, 1e-8
        )
        w = {"w": w["w"] - rate * u["w"]}
        np.testing.assert_allclose(found["w"][step], w["w"], rtol=0, atol=1e-12)
        fired += views != ["none"]
    assert 2 <= fired <= 7


def test_weights_before_a_normalisation_grow_less_than_with_adamw() -> None:
    x, y = (jax.random.normal(jax.random.key(i), (64, n)) for i, n in ((1, 16), (2, 8)))
    start = {"kernel": jax.random.normal(jax.random.key(0), (16, 8))}

    def loss(params: Any) -> jax.Array:
        hidden = x @ params["kernel"]
        hidden -= hidden.mean(axis=0)
        return jnp.mean((hidden / jnp.sqrt(jnp.mean(hidden**2, axis=0)) - y) ** 2)

    def length_after(tx: optax.GradientTransformation) -> float:
        def step(_: int, carry: Any) -> Any:
            params, state = carry
            updates, state = tx.update(jax.grad(loss)(params), state, params)
            return optax.apply_updates(params, updates), state

        params, _ = jax.lax.fori_loop(0, 50, step, (start, tx.init(start)))
        return float(jnp.linalg.norm(params["kernel"]))

    length = float(jnp.linalg.norm(start["kernel"]))
    adamp, adamw = length_after(optax_spd.adamp(0.05)), length_after(optax.adamw(0.05))
    assert adamp - length < 0.5 * (adamw - length)
    assert adamw > 1.05 * length


def test_without_a_test_that_passes_it_is_the_optimizer_with_decoupled_decay() -> None:
    params = {"w": jnp.array([[3.0, 1.0], [-1.0, 2.0]])}
    grads = {"w": jnp.array([[0.1, -1.0], [2.0, 0.5]])}
    off = {"delta": 0.0, "weight_decay": 0.5}
    adam = (0.1, 0.8, 0.95, 1e-3, 1e-4)
    sgd = optax.trace(0.8, nesterov=True), optax.add_decayed_weights(0.5 / (1 - 0.8))
    pairs = [
        (optax_spd.adamp(*adam, **off), optax.adamw(*adam, weight_decay=0.5)),
        (optax_spd.sgdp(0.1, 0.8, True, **off), optax.chain(*sgd, optax.scale(-0.1))),
    ]
    for pair in pairs:
        runs = []
        for tx in pair:
            p, state = params, tx.init(params)
            for _ in range(3):
                updates, state = tx.update(grads, state, p)
                p = optax.apply_updates(p, updates)
            runs.append(p["w"])
        np.testing.assert_allclose(*runs, rtol=1e-6)


# Corner cases ------------------------------------------------------------------------------------

COLUMN = np.array([[3.0], [4.0]], np.float32)
ACROSS = np.array([[-4.0], [3.0]], np.float32)
WHOLE, TANGENTIAL = [1.0, 0.0], [0.64, -0.48]


@pytest.mark.parametrize("eps", [0.0, 1e-8])
@pytest.mark.parametrize(
    ("w", "g", "delta", "expected", "ratio"),
    [
        (COLUMN, ACROSS, 0.1, TANGENTIAL, 0.1),
        (COLUMN, COLUMN, 0.1, WHOLE, 1.0),  # all of the gradient is radial
        (COLUMN, ACROSS, 0.0, WHOLE, 1.0),  # strictly less
        (0 * COLUMN, ACROSS, 0.1, WHOLE, 0.1),  # zero weights pass
        (COLUMN, 0 * ACROSS, 0.1, TANGENTIAL, 0.1),  # and so does a zero gradient
        (COLUMN, np.nan * ACROSS, 0.1, WHOLE, 1.0),
        (COLUMN, np.inf * ACROSS, 1e9, WHOLE, 1.0),
        (COLUMN, np.float32(1e25) * ACROSS, 1e9, WHOLE, 1.0),  # its square overflows
        (np.float32(1e-25) * COLUMN, ACROSS, 1e9, WHOLE, 0.1),  # its square is 0
    ],
)
def test_one_unit(
    w: Any, g: Any, delta: float, expected: list[float], ratio: float, eps: float
) -> None:
    decay, p = 0.5, jnp.array([[1.0], [0.0]])
    tx = optax_spd.remove_radial(decay, delta=delta, eps=eps)
    found, _ = tx.update({"w": p}, tx.init({"w": w}), {"w": w}, grad={"w": g})
    wanted = np.array(expected)[:, None] + decay * ratio * w
    np.testing.assert_allclose(found["w"], wanted, rtol=1e-6, atol=1e-6)


def test_a_bias_is_never_projected_and_fully_decayed_also_in_its_module() -> None:
    params = {"dense": {"kernel": COLUMN, "bias": np.array([2.0], np.float32)}}
    grads = {"dense": {"kernel": ACROSS, "bias": np.array([0.0], np.float32)}}
    step = jax.tree.map(jnp.ones_like, params)
    tx = optax_spd.remove_radial(0.5, layers=optax_spd.by_module())
    found, _ = tx.update(step, tx.init(params), params, grad=grads)
    np.testing.assert_allclose(found["dense"]["bias"], [1 + 0.5 * 2.0])
    kernel = 1 - 7 / 25 * COLUMN + 0.5 * 0.1 * COLUMN
    np.testing.assert_allclose(found["dense"]["kernel"], kernel, rtol=1e-6)


def test_schedules_of_all_numbers_are_followed() -> None:
    """A step later in the schedules is the step of the numbers that they have then."""
    then = {"weight_decay": 0.3, "delta": 1.3, "wd_ratio": 0.4, "eps": 0.2}
    scheduled = {k: lambda count, v=v: jnp.where(count == 1, v, 0.0) for k, v in then.items()}
    draw = np.random.default_rng(0)
    w, g, p = ({"w": draw.normal(size=(4, 3)).astype(np.float32)} for _ in range(3))
    tx, constant = optax_spd.remove_radial(**scheduled), optax_spd.remove_radial(**then)
    updates, state = tx.update(p, tx.init(w), w, grad=g)
    np.testing.assert_array_equal(updates["w"], p["w"])
    found, _ = tx.update(p, state, w, grad=g)
    expected, _ = constant.update(p, constant.init(w), w, grad=g)
    np.testing.assert_allclose(found["w"], expected["w"], rtol=1e-6)
    # Each of them has a part in it.
    for name in then:
        other = optax_spd.remove_radial(**{**then, name: 0.0})
        without, _ = other.update(p, other.init(w), w, grad=g)
        assert np.abs(found["w"] - without["w"]).max() > 1e-3, name


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("momentum", [None, 0.5])
@pytest.mark.parametrize("number", [np.float32, jnp.float32])
def test_numbers_of_numpy_and_jax_change_no_dtype(
    number: Any, momentum: float | None, nesterov: bool
) -> None:
    params = {"w": jnp.ones((3, 2), jnp.bfloat16), "wide": jnp.ones(2)}
    grads = {"w": jnp.full((3, 2), 2.0, jnp.bfloat16), "wide": jnp.ones(2, jnp.bfloat16)}
    runs = []
    for of in (number, float):
        tx = dampened_trace(None if momentum is None else of(momentum), of(0.25), nesterov)
        state = tx.init(params)
        dtypes = jax.tree.map(jnp.result_type, state)
        for _ in range(2):
            updates, state = tx.update(grads, state)
            assert {u.dtype for u in jax.tree.leaves(updates)} == {jnp.dtype(jnp.bfloat16)}
            assert jax.tree.map(jnp.result_type, state) == dtypes
        runs.append((updates, state))
    jax.tree.map(np.testing.assert_array_equal, *runs)
    buffer = 2 * 0.75 * (1 if momentum is None else 1 + momentum)
    expected = buffer if not nesterov else 2 if momentum is None else 2 + momentum * buffer
    np.testing.assert_array_equal(runs[0][0]["w"].astype(np.float32), np.full((3, 2), expected))


def test_wrong_arguments_are_refused() -> None:
    for name in ("weight_decay", "delta", "wd_ratio", "eps"):
        with pytest.raises(ValueError, match=f"{name} must be finite and at least 0, got -1"):
            optax_spd.remove_radial(**{name: -1})
    with pytest.raises(ValueError, match="axis_name='x' does not tell which of them are split"):
        optax_spd.remove_radial(axis_name="x")
    with pytest.raises(ValueError, match="momentum must be below 1, got 1"):
        optax_spd.sgdp(0.1, 1.0, weight_decay=0.1)
    with pytest.raises(ValueError, match="momentum must be finite and between 0 and 1, got"):
        optax_spd.sgdp(0.1, 1.5)
    schedule = optax.constant_schedule(0.9)
    with pytest.raises(TypeError, match=r"momentum must be a number .*inject_hyperparams"):
        optax_spd.sgdp(0.1, momentum=schedule, weight_decay=0.1)
    injected = optax.inject_hyperparams(optax_spd.sgdp)(0.1, momentum=schedule, weight_decay=0.1)
    assert injected.init({"w": COLUMN}).hyperparams["momentum"] == np.float32(0.9)
    with pytest.raises(ValueError, match="dampening must be finite and between 0 and 1"):
        optax_spd.sgdp(0.1, dampening=-0.5)
    for recipe in (optax_spd.adamp, optax_spd.sgdp):
        with pytest.raises(TypeError, match="nesterov must be True or False, got 1"):
            recipe(0.1, nesterov=1)


# Split by hand -----------------------------------------------------------------------------------

SPECS: dict[str, Any] = {
    "inputs": {"blocks": P(None, "x"), "dense": {"bias": P(), "kernel": P("x")}},
    "outputs": {"blocks": P(None, None, "x"), "dense": {"bias": P("x"), "kernel": P(None, "x")}},
    "both": {"blocks": P(None, "x", "y"), "dense": {"bias": P("y"), "kernel": P(("y", "x"))}},
    "mixed": {"blocks": P(), "dense": {"bias": P(), "kernel": P("y", "x")}},
}


def without_radial(x: np.ndarray, w: np.ndarray, axis: int | None) -> np.ndarray:
    """The part of x that is orthogonal to w, along an axis or as a whole."""
    inner, square = (np.sum(a * w, axis=axis, keepdims=True) for a in (x, w))
    return x - inner / square * w


@pytest.mark.parametrize("specs", SPECS.values(), ids=SPECS)
def test_shard_map_equals_one_device(specs: Any) -> None:
    draw = np.random.default_rng(0)
    normal = lambda *shape: draw.normal(size=shape).astype(np.float32)
    model = lambda: {
        "blocks": normal(3, 8, 8),
        "dense": {"bias": normal(8), "kernel": normal(8, 8)},
    }
    w, g, p = model(), model(), model()
    # The first block passes by rows, the second as a whole only, the third not at all.
    blocks = w["blocks"]
    g["blocks"] = np.stack(
        [
            without_radial(g["blocks"][0], blocks[0], axis=0),
            without_radial(g["blocks"][1], blocks[1], axis=None),
            blocks[2],
        ]
    )
    layers = optax_spd.stacked("blocks")
    tx = optax_spd.remove_radial(0.2, layers=layers)
    state = tx.init(w)
    expected, _ = tx.update(p, state, w, grad=g)
    projected = [
        without_radial(p["blocks"][0], blocks[0], axis=0) + 0.2 * 0.1 * blocks[0],
        without_radial(p["blocks"][1], blocks[1], axis=None) + 0.2 * 0.1 * blocks[1],
        p["blocks"][2] + 0.2 * blocks[2],
    ]
    np.testing.assert_allclose(expected["blocks"], projected, rtol=1e-4, atol=1e-5)

    by_hand = optax_spd.remove_radial(0.2, layers=layers, axis_name=specs)
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    mapped = jax.shard_map(
        lambda p, w, g: by_hand.update(p, state, w, grad=g)[0],
        mesh=mesh,
        in_specs=(specs, specs, specs),
        out_specs=specs,
    )
    found = jax.jit(mapped)(p, w, g)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, expected
    )
