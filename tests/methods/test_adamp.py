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


def test_agrees_with_numpy_whatever_a_layer_is(x64: None) -> None:
    met: collections.Counter[str] = collections.Counter()
    shapes = {"a": (5,), "b": (2, 3, 2), "c": (6, 2), "d": (3, 2, 4), "e": (2, 3, 2)}
    decay, ratio = 0.3, 0.2
    for seed in range(14):
        rng = np.random.default_rng(seed)
        specs = ball_oracles.random_specs(rng, shapes)
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
    recorded = replays.Recording(params, jax.tree.map(lambda g: np.stack([g] * 3), grads), None)
    for ours, plain in (
        (optax_spd.adamp(*adam, **off), optax.adamw(*adam, weight_decay=0.5)),
        (optax_spd.sgdp(0.1, 0.8, True, **off), optax.chain(*sgd, optax.scale(-0.1))),
    ):
        found, expected = replays.run(ours, recorded), replays.run(plain, recorded)
        np.testing.assert_allclose(found["w"], expected["w"], rtol=1e-6)


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


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("momentum", [None, 0.5])
def test_numbers_of_numpy_and_jax_change_no_dtype(momentum: float | None, nesterov: bool) -> None:
    params = {"w": jnp.ones((3, 2), jnp.bfloat16), "wide": jnp.ones(2)}
    grads = {"w": jnp.full((3, 2), 2.0, jnp.bfloat16), "wide": jnp.ones(2, jnp.bfloat16)}
    buffer = 2 * 0.75 * (1 if momentum is None else 1 + momentum)
    ahead = 2 if momentum is None else 2 + momentum * buffer
    for of in (np.float32, jnp.float32, float):
        tx = dampened_trace(None if momentum is None else of(momentum), of(0.25), nesterov)
        state = tx.init(params)
        dtypes = jax.tree.map(jnp.result_type, state)
        for _ in range(2):
            updates, state = tx.update(grads, state)
            assert {u.dtype for u in jax.tree.leaves(updates)} == {jnp.dtype(jnp.bfloat16)}
            assert jax.tree.map(jnp.result_type, state) == dtypes
        np.testing.assert_array_equal(np.float32(updates["w"]), ahead if nesterov else buffer)


SCHEDULE = optax.constant_schedule(0.9)


@pytest.mark.parametrize(
    ("make", "arguments", "error", "words"),
    [
        ("remove_radial", {"eps": -1}, ValueError, "eps must be finite and at least 0, got -1"),
        ("remove_radial", {"axis_name": "x"}, ValueError, "does not tell which of them are split"),
        ("sgdp", {"momentum": 1.0, "weight_decay": 0.1}, ValueError, "momentum must be below 1"),
        ("sgdp", {"momentum": 1.5}, ValueError, "momentum must be finite and between 0 and 1"),
        ("sgdp", {"momentum": SCHEDULE}, TypeError, "momentum must be .*inject_hyperparams"),
        ("sgdp", {"dampening": -0.5}, ValueError, "dampening must be finite and between 0 and 1"),
        ("sgdp", {"nesterov": 1}, TypeError, "nesterov must be True or False, got 1"),
        ("adamp", {"nesterov": 1}, TypeError, "nesterov must be True or False, got 1"),
    ],
)
def test_wrong_arguments_are_refused(
    make: str, arguments: Any, error: type[Exception], words: str
) -> None:
    rate = {} if make == "remove_radial" else {"learning_rate": 0.1}
    with pytest.raises(error, match=words):
        getattr(optax_spd, make)(**rate, **arguments)
