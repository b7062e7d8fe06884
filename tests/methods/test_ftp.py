"""FTP against the original implementation and against float64 NumPy."""

import collections
import functools
from typing import Any, NamedTuple

import ball_oracles
import golden
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest
import torch_like
from hypothesis import given, settings as examples, strategies as st

import optax_spd
from optax_spd.methods.ftp import RadiusMoments, radius_update

CASES = golden.settings("ftp")
# PyTorch keeps output units on the first axis.
TORCH_LAYOUT = optax_spd.outputs(".*", 0)


class Numbers(NamedTuple):
    """A case's hyperparameters that may change from case to case in a compiled program."""

    k: float
    weight_decay: float
    betas: tuple[float, float] | None
    eps: float | None
    momentum: float | None


class Kind(NamedTuple):
    """What decides about a case's program, besides the shapes of its arrays."""

    algorithm: str
    constrained: tuple[str, ...]
    nesterov: bool
    dampening: float
    # NumPy computes with them.
    amsgrad_betas: tuple[float, float] | None


def numbers_of(settings: dict[str, Any]) -> Numbers:
    betas = tuple(settings["betas"]) if "betas" in settings else None
    momentum = settings.get("momentum") or None
    return Numbers(settings["k"], settings["weight_decay"], betas, settings.get("eps"), momentum)


def kind_of(settings: dict[str, Any]) -> Kind:
    return Kind(
        algorithm=settings["algorithm"],
        constrained=tuple(sorted(t["name"] for t in settings["tensors"] if t["constrained"])),
        nesterov=settings.get("nesterov", False),
        dampening=settings.get("dampening", 0.0),
        amsgrad_betas=numbers_of(settings).betas if settings.get("amsgrad") else None,
    )


def inner_of(task: golden.Task, numbers: Numbers, kind: Kind) -> optax.GradientTransformation:
    """The case's AdamW or SGD, from Optax's parts where Optax computes the same."""
    rate = optax.scale_by_learning_rate(lambda count: task.lr[count])
    decay = optax.add_decayed_weights(numbers.weight_decay)
    if kind.algorithm == "AdamP":
        if kind.amsgrad_betas:
            adam = torch_like.scale_by_amsgrad(*kind.amsgrad_betas, numbers.eps)
        else:
            adam = optax.scale_by_adam(*numbers.betas, numbers.eps)
        return optax.chain(adam, decay, rate)
    if kind.dampening:
        momentum = torch_like.dampened_trace(numbers.momentum, kind.dampening)
    elif numbers.momentum is not None:
        momentum = optax.trace(numbers.momentum, kind.nesterov)
    else:
        momentum = optax.identity()
    return optax.chain(decay, momentum, rate)


def optimizer_of(
    task: golden.Task, numbers: Numbers, kind: Kind, form: str
) -> tuple[optax.GradientTransformationExtraArgs, bool]:
    """The case's optimizer in one of its forms, and whether the caller passes ``grad=``."""
    mask = {name: name in kind.constrained for name in task.theta0}
    options = {"layers": TORCH_LAYOUT, "anchor": task.anchor, "mask": mask}
    if form != "recipe":
        stages = inner_of(task, numbers, kind), optax_spd.ftp(numbers.k, **options)
        if form == "optax.chain":
            return optax.chain(*stages), True
        return optax_spd.chain(*stages), False
    rate = lambda count: task.lr[count]
    options |= {"k": numbers.k, "weight_decay": numbers.weight_decay}
    if kind.algorithm == "AdamP":
        return optax_spd.adam_ftp(rate, *numbers.betas, numbers.eps, **options), False
    return optax_spd.sgd_ftp(rate, numbers.momentum, kind.nesterov, **options), False


def has_recipe(settings: dict[str, Any]) -> bool:
    """Optax's amsgrad takes another maximum, and its trace has no dampening."""
    return not settings.get("amsgrad") and not settings.get("dampening")


def run(task: golden.Task, numbers: Numbers, kind: Kind, form: str) -> tuple[Any, Any]:
    """Parameters and FTP's state vectors after every step."""
    tx, pass_grad = optimizer_of(task, numbers, kind, form)

    def read(state: Any) -> dict[str, jax.Array]:
        moments = optax.tree.get(state, "ftp_moments")
        radii = optax.tree.get(state, "ftp_radii")
        return {"gamma": radii, "m_gamma": moments.first, "v_gamma": moments.second}

    return golden.replayed(tx, task, pass_grad, read)


@functools.cache
def program(kind: Kind, form: str) -> Any:
    """``run`` compiled, for all cases of a kind whose arrays have the same shapes.

    With x64 the hyperparameters are float64 as Python's are, and weakly typed, too: float32
    arrays stay float32.
    """
    return jax.jit(lambda task, numbers: run(task, numbers, kind, form))


# Where the recipe has the case's inner optimizer, it is that chain. A few cases are enough of a
# chain that gets ``grad=`` from outside.
REPLAYS = [(c, "recipe" if has_recipe(c) else "optax_spd.chain") for c in CASES]
REPLAYS += [(c, "optax.chain") for c in CASES[::6]]


@pytest.mark.parametrize(
    ("settings", "form"), REPLAYS, ids=[f"{c['name']}-{form}" for c, form in REPLAYS]
)
def test_replays_the_original(settings: dict[str, Any], form: str, x64: None) -> None:
    case = golden.load("ftp", settings)
    found = program(kind_of(settings), form)(case.task(), numbers_of(settings))
    assert_replayed(case, found, 1e-9 if settings["dtype"] == "float64" else 1e-5)


@pytest.mark.parametrize(
    "settings", [c for c in CASES if c["dtype"] == "float32"], ids=lambda c: c["name"]
)
def test_replays_float32_without_x64(settings: dict[str, Any]) -> None:
    case = golden.load("ftp", settings)
    # As arguments the hyperparameters would be float32: 1 - 0.999 would lose its digits.
    replay = jax.jit(lambda task: run(task, numbers_of(settings), kind_of(settings), "recipe"))
    assert_replayed(case, replay(case.task()), 2e-5)


def assert_replayed(case: golden.Case, found: tuple[Any, Any], tolerance: float) -> None:
    params, vectors = jax.tree.map(lambda rows: rows[: case.settings["steps"]], found)
    constrained = kind_of(case.settings).constrained
    mask = {name: name in constrained for name in case.theta0}
    names = optax_spd.layer_names(case.theta0, mask=mask)
    assert names == list(constrained)
    for name in case.theta0:
        assert params[name].dtype == case.settings["dtype"]
        np.testing.assert_allclose(
            params[name], case.params[name], rtol=0, atol=min(tolerance, 1e-5), err_msg=name
        )
    for index, name in enumerate(names):
        for field, vector in vectors.items():
            np.testing.assert_allclose(
                vector[:, index], case.fields[name][field], rtol=0, atol=tolerance, err_msg=field
            )
    assert vectors["gamma"].dtype == case.settings["dtype"]


# Against NumPy -----------------------------------------------------------------------------------

STEPS = 7
SHAPES = [(), (5,), (2, 3), (3, 2, 4), (0, 3)]
# Away from the anchor, back, and away again: radii grow, shrink and are clipped.
SIGNS = np.array([1.0, 1.0, 1.0, -1.0, -1.0, 1.0, 1.0])


def recorded_gradients(params: Any, seed: int) -> Any:
    """A leading step axis on every array."""
    rng = np.random.default_rng(seed)

    def one(x: Any) -> np.ndarray:
        signs = SIGNS.reshape(-1, *[1] * np.ndim(x))
        steps = (STEPS, *np.shape(x))
        return signs * rng.normal(size=np.shape(x)) + 0.3 * rng.normal(size=steps)

    return jax.tree.map(one, params)


def test_agrees_with_numpy_whatever_a_layer_is(x64: None) -> None:
    met: collections.Counter[str] = collections.Counter()
    rate = 0.2

    @examples(max_examples=12, deadline=None, derandomize=True)
    @given(
        norm=st.sampled_from(["mars", "l2"]),
        k=st.sampled_from([0.0, 0.4, 1.0]),
        radius_rate=st.sampled_from([0.01, 0.5]),
        seed=st.integers(0, 99),
    )
    def check(norm: str, k: float, radius_rate: float, seed: int) -> None:
        rng = np.random.default_rng(seed)
        shapes = {f"p{i}": SHAPES[rng.integers(len(SHAPES))] for i in range(rng.integers(1, 5))}
        specs = ball_oracles.random_specs(rng, shapes)
        start = {name: rng.normal(size=shape) for name, shape in shapes.items()}
        anchor = {name: x + 0.1 * rng.normal(size=x.shape) for name, x in start.items()}
        grads = recorded_gradients(start, seed)
        stage = optax_spd.ftp(
            k,
            norm=norm,
            radius_learning_rate=radius_rate,
            anchor=anchor,
            layers=lambda path, _: specs[path],
        )
        params, radii = oracles.train(optax_spd.chain(optax.sgd(rate), stage), start, grads)

        names = optax_spd.layer_names(start, layers=lambda path, _: specs[path])
        theta, theta_0 = (oracles.rows_by_layer(tree, specs) for tree in (start, anchor))
        found = oracles.rows_by_layer(params, specs)
        g = [
            oracles.rows_by_layer(jax.tree.map(lambda x, t=t: x[t], grads), specs)
            for t in range(STEPS)
        ]
        assert names == list(theta)
        for index, name in enumerate(names):
            oracle, rows = oracles.FTP(norm), theta[name]
            for t in range(STEPS):
                u = oracle.step(
                    [-rate * x for x in g[t][name]], rows, theta_0[name], g[t][name], k, radius_rate
                )
                rows = [x + step for x, step in zip(rows, u, strict=True)]
                np.testing.assert_allclose(radii[t, index], oracle.gamma, rtol=0, atol=1e-10)
            for ours, theirs in zip(found[name], rows, strict=True):
                np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-10)
            met.update(oracle.met)

    check()
    assert min(met[event] for event in oracles.FTP().met) >= 5, met


# One layer's radius ------------------------------------------------------------------------------


def updated(radius: float, q: float, largest: float) -> float:
    """The radius after the second step of a layer."""
    moments = RadiusMoments(jnp.int32(1), jnp.zeros(()), jnp.zeros(()))
    numbers = map(jnp.asarray, (q, largest, 1.0, 0.01))
    return float(radius_update(jnp.asarray(radius), moments, *numbers)[0])


def test_the_first_step_fixes_the_radius_and_keeps_the_moments_at_zero(x64: None) -> None:
    zero = jnp.zeros(())
    for q, largest in ((-5.0, 0.0), (5.0, 1e-9), (5.0, 3.0)):
        numbers = map(jnp.asarray, (q, largest, 1.0, 0.01))
        found = radius_update(zero, RadiusMoments(jnp.int32(0), zero, zero), *numbers)
        assert jax.tree.leaves(found) == [1e-8, 1, 0, 0]


# Adam's bias corrections are those of its second step, though this is the first.
FIRST_MOVE = 0.01 * (0.1 / 0.19) / np.sqrt(0.001 / 0.001999)


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_the_second_step_moves_by_less_than_the_rate(size: float, x64: None) -> None:
    np.testing.assert_allclose(FIRST_MOVE, 0.007441, atol=5e-7)
    grown, shrunk = updated(1.0, -size, 10.0), updated(1.0, size, 10.0)
    np.testing.assert_allclose([grown - 1, 1 - shrunk], FIRST_MOVE, rtol=3e-4)


def test_bias_corrections_have_digits_to_spare_in_float32() -> None:
    np.testing.assert_allclose(updated(0.0, -1.0, 10.0), FIRST_MOVE, rtol=5e-7)


@pytest.mark.parametrize(
    ("radius", "q", "largest", "expected"),
    [
        (1.0, -1.0, 0.4, 0.4),  # clipped to the current largest norm
        (1e-8, 1.0, 1.0, 1e-8),  # and to the smallest radius
        (1e-8, 1.0, 1e-9, 1e-9),  # of the two the upper end wins
        (0.5, 0.0, 1.0, 0.5),
    ],
)
def test_the_radius_is_clipped(
    radius: float, q: float, largest: float, expected: float, x64: None
) -> None:
    np.testing.assert_allclose(updated(radius, q, largest), expected, rtol=1e-12)


# One step ----------------------------------------------------------------------------------------


def opened(params: Any, radius: float, **options: Any) -> tuple[Any, Any]:
    """The stage, and its state in a second step in which the radii do not move."""
    tx = optax_spd.ftp(anchor="zero", radius_learning_rate=0.0, **options)
    state = tx.init(params)
    moments = state.ftp_moments._replace(steps=jnp.ones_like(state.ftp_moments.steps))
    return tx, state._replace(ftp_radii=jnp.full_like(state.ftp_radii, radius), ftp_moments=moments)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_rows_inside_their_ball_keep_the_update_to_the_bit(dtype: Any) -> None:
    rng = np.random.default_rng(0)
    columns = np.array([0.1, 3.0, 0.3, 5.0])  # the output units' sizes
    params = jnp.asarray(rng.normal(size=(6, 4)) * columns, dtype)
    step = jnp.asarray(rng.normal(size=(6, 4)) * columns / 10, dtype)
    tx, state = opened(params, 4.0)
    updates, state = jax.jit(tx.update)(step, state, params, grad=step)
    inside = np.abs(np.asarray(params + step, np.float64)).sum(axis=0) < 3.9
    np.testing.assert_array_equal(inside, [True, False, True, False])
    assert updates.dtype == dtype
    np.testing.assert_array_equal(updates[:, inside], step[:, inside])
    assert not np.any(np.asarray(updates[:, ~inside] == step[:, ~inside]).all(axis=0))
    np.testing.assert_array_equal(state.ftp_radii, [4.0])


def test_an_l2_ball_holds_all_rows_or_none() -> None:
    params = jnp.array([[3.0, 0.0], [0.0, 4.0]])
    for radius, factor in ((5.0, 1.0), (2.5, 0.5)):
        tx, state = opened(params, radius, norm="l2")
        updates, _ = tx.update(jnp.zeros_like(params), state, params, grad=params)
        np.testing.assert_allclose(params + updates, factor * params, rtol=1e-6)


@pytest.mark.parametrize("norm", ["mars", "l2"])
@pytest.mark.parametrize("anchor", ["zero", "offset"])
def test_the_first_step_takes_every_layer_to_its_anchor(anchor: str, norm: str, x64: None) -> None:
    params = {"bias": np.arange(3.0), "kernel": np.ones((2, 3)), "scale": np.float64(2.0)}
    target = jax.tree.map(lambda x: 0.0 * x if anchor == "zero" else x - 1, params)
    tx = optax_spd.sgd_ftp(0.1, norm=norm, anchor="zero" if anchor == "zero" else target)
    updates, state = tx.update(params, tx.init(params), params)
    new = optax.apply_updates(params, updates)
    distances = jax.tree.map(lambda x, t: np.abs(x - t).max(), new, target)
    assert 0 < max(jax.tree.leaves(distances)) <= 1e-8
    np.testing.assert_array_equal(optax.tree.get(state, "ftp_radii"), np.full(3, 1e-8))
