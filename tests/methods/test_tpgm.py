"""TPGM against the original implementation, every inner step of every call, and against NumPy."""

import functools
from typing import Any, NamedTuple

import ball_oracles
import golden
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tpgm_steps import LAYERS, SHAPES, arrays, assert_close, projects_only, radii_of, stepper

import optax_spd

CASES = golden.settings("tpgm")
# PyTorch keeps output units on the first axis.
TORCH_LAYOUT = optax_spd.outputs(".*", 0)
Params = dict[str, jax.Array]


def network(model: str, activation: Any, params: Params, x: jax.Array) -> jax.Array:
    """The networks of the recorded runs, in PyTorch's layouts."""
    linear = lambda name, x: x @ params[f"{name}.weight"].T + params[f"{name}.bias"]
    if model == "mlp":
        return linear("head", activation(linear("fc2", activation(linear("fc1", x)))))
    hidden = jax.lax.conv_general_dilated(x, params["conv.weight"], (1, 1), "VALID")
    hidden = activation(hidden + params["conv.bias"][:, None, None])
    return linear("head", hidden.reshape(len(x), -1))


def loss_of(model: str, act: str) -> Any:
    activation = {"tanh": jnp.tanh, "relu": jax.nn.relu}[act]

    def loss(params: Params, batch: Any) -> jax.Array:
        x, y = batch
        logits = network(model, activation, params, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    return loss


class Recorded(NamedTuple):
    inner: Any
    step: jax.Array
    used: jax.Array
    gradient: jax.Array
    after: jax.Array


def recorded(inner: optax.GradientTransformation, steps: int) -> optax.GradientTransformation:
    """``inner``, whose state also holds what it was given and where it went."""

    def init(radii: jax.Array) -> Recorded:
        rows = jnp.full((steps, len(radii)), jnp.nan, radii.dtype)
        return Recorded(inner.init(radii), jnp.zeros((), jnp.int32), rows, rows, rows)

    def update(grads: jax.Array, state: Recorded, radii: jax.Array | None = None) -> Any:
        assert radii is not None
        updates, inner_state = inner.update(grads, state.inner, radii)
        put = lambda rows, row: rows.at[state.step % steps].set(row)
        return updates, Recorded(
            inner_state,
            state.step + 1,
            put(state.used, radii),
            put(state.gradient, grads),
            put(state.after, radii + updates),
        )

    return optax.GradientTransformation(init, update)


class Call(NamedTuple):
    finetuned: Params
    projected: dict[str, np.ndarray]
    final: dict[str, np.ndarray]
    # Per inner step; None in a call that only projects.
    batches: Any
    inner_steps: dict[str, dict[str, np.ndarray]] | None
    loss: np.ndarray | None


def load(case: dict[str, Any]) -> tuple[Params, list[Call]]:
    with np.load(golden.DATA / "tpgm.npz") as arrays:
        prefix = f"{case['name']}/"
        data = {k.removeprefix(prefix): arrays[k] for k in arrays.files if k.startswith(prefix)}

    def tensors(start: str) -> dict[str, np.ndarray]:
        return {k.removeprefix(start): v for k, v in data.items() if k.startswith(start)}

    calls = []
    for call in case["calls"]:
        at = f"call{call['index']}/"
        learns = not call["apply_only"]
        order = data[at + "batch_index"] if learns else None
        fields = ("radius_used", "radius_grad", "radius_after_adam")
        calls.append(
            Call(
                finetuned=jax.tree.map(jnp.asarray, tensors(at + "finetuned/")),
                projected=tensors(at + "projected/"),
                final=tensors(at + "radius_final/"),
                batches=(data["batches/x"][order], data["batches/y"][order]) if learns else None,
                inner_steps={f: tensors(f"{at}{f}/") for f in fields} if learns else None,
                loss=data[at + "loss"] if learns else None,
            )
        )
    return jax.tree.map(jnp.asarray, tensors("anchor/")), calls


class Program(NamedTuple):
    """What two cases must have in common, besides shapes, to be the same compiled program."""

    model: str
    act: str
    norm: str
    constrained: tuple[str, ...]
    inner_steps: int


def program_of(case: dict[str, Any]) -> Program:
    return Program(
        model=case["model"]["type"],
        act=case["model"].get("act", "tanh"),
        norm="l2" if "l2" in case["norm_mode"] else "mars",
        constrained=tuple(sorted(case["constrained"])),
        inner_steps=case["max_iters"],
    )


@functools.cache
def replayer(program: Program) -> Any:
    """The first state, and a jitted step to a given target; both take the radii's rate."""
    loss = loss_of(program.model, program.act)

    def stage(params: Params, rate: Any) -> optax.GradientTransformationExtraArgs:
        optimizer = recorded(optax.adam(rate), program.inner_steps)
        mask = {name: name in program.constrained for name in params}
        return optax_spd.tpgm(optimizer, norm=program.norm, layers=TORCH_LAYOUT, mask=mask)

    @jax.jit
    def step(params: Params, state: Any, target: Params, batches: Any, rate: Any) -> Any:
        updates = jax.tree.map(jnp.subtract, target, params)
        extra = {} if batches is None else {"validation_fn": loss, "validation_batches": batches}
        updates, state = stage(params, rate).update(updates, state, params, **extra)
        return optax.apply_updates(params, updates), state

    return lambda params, rate: stage(params, rate).init(params), step


@projects_only
@pytest.mark.parametrize("case", CASES, ids=lambda c: c["name"])
def test_replays_the_original(case: dict[str, Any], x64: None) -> None:
    # With x64 for float32 cases too: Optax's bias corrections need it. All arrays stay float32.
    assert_replayed(case, 1e-9 if case["dtype"] == "float64" else 1e-5)


@projects_only
@pytest.mark.parametrize(
    "case", [c for c in CASES if c["dtype"] == "float32"], ids=lambda c: c["name"]
)
def test_replays_float32_without_x64(case: dict[str, Any]) -> None:
    assert_replayed(case, 2e-5)


def assert_replayed(case: dict[str, Any], tolerance: float) -> None:
    anchor, calls = load(case)
    program = program_of(case)
    names = optax_spd.layer_names(anchor, mask={n: n in program.constrained for n in anchor})
    assert list(program.constrained) == names
    init, step = replayer(program)

    def assert_near(actual: Any, expected: Any, what: str) -> None:
        np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance, err_msg=what)

    params, state = anchor, init(anchor, case["proj_lr"])
    for call in calls:
        params, state = step(params, state, call.finetuned, call.batches, case["proj_lr"])
        for name, expected in call.projected.items():
            assert params[name].dtype == case["dtype"]
            assert_near(params[name], expected, name)
        assert state.tpgm_radii.dtype == case["dtype"]
        for index, name in enumerate(names):
            assert_near(state.tpgm_radii[index], call.final[name], f"final radius of {name}")
            if call.inner_steps is None:
                continue
            record = state.radius_state
            for field, rows in zip(
                call.inner_steps, (record.used, record.gradient, record.after), strict=True
            ):
                assert_near(rows[:, index], call.inner_steps[field][name], f"{field} of {name}")


# Against NumPy, for layers that the original does not know ---------------------------------------


@pytest.mark.parametrize("norm", ["l2", "mars"])
@pytest.mark.parametrize(
    ("layers", "every"), [("per array", 1), ("stacked", 3), ("by module", 2), ("torch", 1)]
)
def test_equals_numpy_for_any_layers(layers: str, norm: str, every: int, x64: None) -> None:
    mask = {path: path != "dense/bias" for path in SHAPES}
    anchor = arrays(0, dtype=np.float64)
    tx = optax_spd.tpgm(optax.sgd(0.02), norm=norm, every=every, layers=LAYERS[layers], mask=mask)
    reference = ball_oracles.Tpgm(anchor, norm, rate=0.02, layers=LAYERS[layers], mask=mask)
    step, params, state = stepper(tx), anchor, tx.init(anchor)
    names = optax_spd.layer_names(anchor, layers=LAYERS[layers], mask=mask)
    for count in range(5):
        updates = arrays(10 + count, scale=0.3, dtype=np.float64)
        batches = arrays(20 + count, 3, dtype=np.float64)
        learns = count % every == 0
        expected = reference.step(params, updates, batches if learns else None)
        params, state = step(params, state, updates, batches)
        assert_close(params, expected, atol=1e-12)
        assert list(reference.radii) == names
        np.testing.assert_allclose(radii_of(state), list(reference.radii.values()), atol=1e-12)
        assert not np.allclose(params["dense/kernel"], anchor["dense/kernel"])
    assert state.count == 5


# Without validation data -------------------------------------------------------------------------


@projects_only
@pytest.mark.parametrize("norm", ["l2", "mars"])
@pytest.mark.parametrize("layers", ["per array", "by module"])
def test_without_validation_radii_start_at_half_the_first_step_and_never_grow(
    layers: str, norm: str
) -> None:
    anchor = arrays(0)
    tx = optax_spd.tpgm(norm=norm, layers=LAYERS[layers])
    reference = ball_oracles.Tpgm(anchor, norm, rate=0.0, layers=LAYERS[layers])
    step, params, state, last = stepper(tx), anchor, tx.init(anchor), np.inf
    for count, scale in enumerate((1.0, 3.0, 0.05, 3.0)):
        updates = arrays(10 + count, scale=scale)
        expected = reference.step(params, updates)
        params, state = step(params, state, updates)
        assert_close(params, expected, atol=1e-5)
        np.testing.assert_allclose(radii_of(state), list(reference.radii.values()), rtol=1e-4)
        assert np.all(radii_of(state) <= last)
        last = radii_of(state)


NO_RADII = {
    "stage": optax_spd.tpgm(),
    "recipe": optax_spd.adam_tpgm(0.1, every=2),
    "accumulated": optax.MultiSteps(optax_spd.adam_tpgm(0.1), 2),
}


@pytest.mark.parametrize("tx", NO_RADII.values(), ids=NO_RADII)
def test_a_run_without_validation_data_and_radii_warns_once_a_trace(tx: Any) -> None:
    params = arrays(0)
    state, step = tx.init(params), stepper(tx)
    with pytest.warns(UserWarning, match=r"Pass validation_fn= and.*tpgm\(radii=") as found:
        jax.eval_shape(tx.update, params, state, params)  # here, where the caller is
    assert {warning.filename for warning in found} == {__file__}
    with pytest.warns(UserWarning, match="learns no radii"):
        step(params, state, params)
    step(params, state, params)  # is not traced again


def test_nothing_warns_where_radii_are_given_learned_or_not_needed() -> None:
    """Warnings are errors in these tests."""
    params, batches = arrays(0), arrays(1, 2)
    for tx, data in (
        (optax_spd.tpgm(radii=0.5), None),
        (optax_spd.tpgm(every=3), batches),
        (optax_spd.adam_tpgm(0.1), batches),
    ):
        jax.eval_shape(stepper(tx), params, tx.init(params), params, batches=data)
    # Of a partition one part may hold no layer.
    rest, tx = {"count": jnp.arange(3), "none": None}, optax_spd.tpgm()
    tx.update(rest, tx.init(rest), rest)


VECTOR = np.array([0.5, np.inf, 0.0, 0.1, 2.0])


@pytest.mark.parametrize("norm", ["l2", "mars"])
@pytest.mark.parametrize("radii", [0.4, VECTOR], ids=["scalar", "vector"])
def test_given_radii_stay_and_the_step_is_project(radii: Any, norm: str) -> None:
    anchor = arrays(0)
    tx = optax_spd.tpgm(norm=norm, radii=radii)
    step, params, state = stepper(tx), anchor, tx.init(anchor)
    project = jax.jit(optax_spd.project, static_argnames="norm")
    for count, scale in enumerate((0.0, 1.0, 0.05, 3.0)):  # also before anything has moved
        updates = arrays(10 + count, scale=scale)
        tentative = jax.tree.map(np.add, params, updates)
        params, state = step(params, state, updates)
        np.testing.assert_array_equal(radii_of(state), np.broadcast_to(np.float32(radii), 5))
        assert_close(params, project(tentative, anchor, radii, norm=norm))


@pytest.mark.parametrize("norm", ["l2", "mars"])
def test_given_radii_are_where_learning_starts_once_the_array_moves(norm: str) -> None:
    """A warm-up whose first rate is 0 must not clip them to the size of no step."""
    params = {"a": jnp.zeros(2)}
    tx = optax_spd.tpgm(optax.sgd(0.0), norm=norm, radii=0.5)
    extra = {
        "validation_fn": lambda params, batch: jnp.sum((params["a"] - batch) ** 2),
        "validation_batches": jnp.ones((2, 2)),
    }
    state = tx.init(params)
    updates, state = tx.update({"a": jnp.zeros(2)}, state, params, **extra)
    np.testing.assert_array_equal(updates["a"], 0)
    np.testing.assert_array_equal(state.tpgm_radii, 0)
    _, clipped = tx.update({"a": jnp.array([0.1, 0.0])}, state, params, **extra)
    np.testing.assert_allclose(clipped.tpgm_radii, 0.1)
    updates, state = tx.update({"a": jnp.array([3.0, 4.0])}, state, params, **extra)
    np.testing.assert_allclose(state.tpgm_radii, 0.5)
    size = {"l2": jnp.linalg.norm, "mars": lambda x: jnp.sum(jnp.abs(x))}[norm]
    np.testing.assert_allclose(size(updates["a"]), 0.5, rtol=1e-6)


def test_the_state_does_not_alias_the_given_radii() -> None:
    # Else a step that donates its state deletes the caller's array.
    radii = jnp.asarray(VECTOR, jnp.float32)
    tx = optax_spd.tpgm(radii=radii)
    params = jax.tree.map(jnp.asarray, arrays(0))
    stepper(tx, donate_argnums=(0, 1))(params, tx.init(params), arrays(1))
    np.testing.assert_array_equal(radii, np.float32(VECTOR))
    np.testing.assert_array_equal(tx.init(arrays(0)).tpgm_radii, np.float32(VECTOR))


# An array that has not moved ---------------------------------------------------------------------


@projects_only
@pytest.mark.parametrize("norm", ["l2", "mars"])
@pytest.mark.parametrize("learns", [True, False], ids=["learning", "projection only"])
def test_an_array_that_has_not_moved_stays_and_can_leave_later(learns: bool, norm: str) -> None:
    anchor = arrays(0)
    names = optax_spd.layer_names(anchor)
    still = names.index("dense/kernel")
    optimizer = recorded(optax.adam(0.05), 3)
    tx = optax_spd.tpgm(optimizer, norm=norm)
    step, params, state = stepper(tx), anchor, tx.init(anchor)
    batches = arrays(2, 3) if learns else None
    for count in range(2):
        updates = arrays(10 + count) | {"dense/kernel": np.zeros((3, 4), np.float32)}
        params, state = step(params, state, updates, batches)
        np.testing.assert_array_equal(params["dense/kernel"], anchor["dense/kernel"])
        assert radii_of(state)[still] == 0
        assert np.all(np.delete(radii_of(state), still) > 0)
        if learns:
            np.testing.assert_array_equal(state.radius_state.gradient[:, still], np.zeros(3))
            assert np.all(np.any(np.delete(state.radius_state.gradient, still, 1) != 0, axis=0))
    updates = arrays(12)
    params, state = step(params, state, updates, batches)
    ball = ball_oracles.Balls({"dense/kernel": updates["dense/kernel"]}, norm)
    half = ball.half_smallest("dense/kernel")
    if learns:
        np.testing.assert_allclose(state.radius_state.used[0, still], half, rtol=1e-5)
    else:
        np.testing.assert_allclose(radii_of(state)[still], half, rtol=1e-5)
    assert np.max(np.abs(params["dense/kernel"] - anchor["dense/kernel"])) > 0.01
